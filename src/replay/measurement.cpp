#include "replay/measurement.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/parallel.h"
#include "replay/reconstruction_oracle.h"

namespace kvreplay {
namespace {

// The mean squared layer error over the evaluation queries: what oracle-reconstruction minimises.
double mean_square(const std::vector<float>& layer_error) {
  double sum = 0;
  for (const float error : layer_error) sum += static_cast<double>(error) * static_cast<double>(error);
  return sum / static_cast<double>(layer_error.size());
}

}  // namespace

std::vector<LayerMeasures> measure_layer(const TraceReader& trace, int layer, int eviction_position,
                                         const std::vector<const LayerSets*>& settings) {
  const ModelInfo& model = trace.info().model;
  const auto queries = static_cast<Index>(evaluation_queries(trace.info(), eviction_position).count());
  const Index width = static_cast<Index>(model.num_attention_heads) * model.head_dim;
  Matrix outputs(queries, width);
  std::vector<Matrix> differences(settings.size(), Matrix(queries, width));
  std::vector<LayerMeasures> measures(settings.size());
  for (LayerMeasures& m : measures) m.heads.resize(static_cast<std::size_t>(model.num_attention_heads));

  parallel_for(model.num_key_value_heads, [&](int kv_head) {
    const HeadEvaluation evaluation(trace, layer, kv_head, eviction_position);
    for (int member = 0; member < model.group_size(); ++member) {
      const int query_head = kv_head * model.group_size() + member;
      const Index column = static_cast<Index>(query_head) * model.head_dim;
      std::vector<const std::vector<int>*> kept;
      std::vector<Eigen::Ref<Matrix>> head_differences;
      for (std::size_t i = 0; i < settings.size(); ++i) {
        const bool per_query_head = static_cast<int>(settings[i]->size()) == model.num_attention_heads;
        kept.push_back(&(*settings[i])[static_cast<std::size_t>(per_query_head ? query_head : kv_head)]);
        head_differences.emplace_back(differences[i].middleCols(column, model.head_dim));
      }
      std::vector<HeadMeasures> found =
          evaluation.measure(member, kept, outputs.middleCols(column, model.head_dim), head_differences);
      for (std::size_t i = 0; i < found.size(); ++i) {
        measures[i].heads[static_cast<std::size_t>(query_head)] = std::move(found[i]);
      }
    }
  });

  Matrix projection;  // [C, H·D]
  if (trace.has_output_projection(layer)) {
    projection.resize(model.hidden_size, width);
    for (int head = 0; head < model.num_attention_heads; ++head) {
      projection.middleCols(static_cast<Index>(head) * model.head_dim, model.head_dim) =
          trace.read_output_projection(layer, head);
    }
  }
  const auto lengths = [&](const Matrix& rows) -> Eigen::VectorXf {
    Eigen::VectorXf norms = projection.size() == 0 ? Eigen::VectorXf(rows.rowwise().norm())
                                                   : Eigen::VectorXf((rows * projection.transpose()).rowwise().norm());
    if (!norms.allFinite()) {
      throw Error(fmt::format("{}: layer {}: the outputs exceed float32's range", trace.path().string(), layer));
    }
    return norms;
  };
  const Eigen::VectorXf reference = lengths(outputs);
  parallel_for(static_cast<int>(settings.size()), [&](int i) {
    const Eigen::VectorXf error = lengths(differences[static_cast<std::size_t>(i)]);
    for (Index e = 0; e < queries; ++e) {
      measures[static_cast<std::size_t>(i)].layer_error.push_back(reference(e) > 0 ? error(e) / reference(e)
                                                                                   : (error(e) > 0 ? 1.0f : 0.0f));
    }
  });
  return measures;
}

void improve_oracles(const TraceReader& trace, int layer, int eviction_position, const std::vector<Setting>& settings,
                     std::vector<LayerSets>& kept) {
  for (std::size_t oracle = 0; oracle < settings.size(); ++oracle) {
    const Setting& setting = settings[oracle];
    if (setting.policy->exchanges == 0 || setting.keeps_all(eviction_position)) continue;
    std::vector<const LayerSets*> candidates = {&kept[oracle]};
    for (std::size_t i = 0; i < settings.size(); ++i) {
      const bool comparable = i != oracle && settings[i].granularity == setting.granularity &&
                              std::ranges::all_of(kept[i], [&setting](const std::vector<int>& set) {
                                return static_cast<int>(set.size()) == setting.capacity;
                              });
      if (comparable) candidates.push_back(&kept[i]);
    }
    const auto best_of = [&](const std::vector<const LayerSets*>& sets) {
      const std::vector<LayerMeasures> measures = measure_layer(trace, layer, eviction_position, sets);
      const auto best =
          std::ranges::min_element(measures, {}, [](const LayerMeasures& m) { return mean_square(m.layer_error); });
      return sets[static_cast<std::size_t>(best - measures.begin())];
    };
    const LayerSets start = *best_of(candidates);
    const LayerSets improved =
        exchange_positions(trace, layer, eviction_position, setting.granularity, start, setting.policy->exchanges);
    // Measured like any other sets: where rounding made it worse, the start stays.
    kept[oracle] = *best_of({&start, &improved});
  }
}

}  // namespace kvreplay
