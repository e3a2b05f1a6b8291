#include "replay/query_statistics.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/parallel.h"
#include "base/printable.h"
#include "base/rotary.h"
#include "policy/query_statistics.h"
#include "replay/results_file.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

// Of one query head, over traces.
struct Sums {
  Eigen::VectorXd mean;
  Eigen::MatrixXd products;
  Eigen::VectorXd magnitudes;
};

// The prompt queries of a trace that count: places among those captured, and positions.
struct Counted {
  Index first = 0;
  std::vector<int> positions;
};

Counted counted_of(const TraceInfo& info, int sinks) {
  Counted counted;
  for (const std::int32_t position : info.query_positions) {
    if (position < sinks) ++counted.first;
    if (position >= sinks && position < info.prompt_length) counted.positions.push_back(position);
  }
  return counted;
}

void check_same_shape(std::span<const TraceReader> traces) {
  const ModelInfo& first = traces.front().info().model;
  for (const TraceReader& trace : traces) {
    const ModelInfo& model = trace.info().model;
    if (model.name != first.name) {
      throw Error(fmt::format("{}: is of {}, and {} is of {}; give traces of one model", trace.path().string(),
                              printable(model.name), traces.front().path().string(), printable(first.name)));
    }
    if (model.num_layers != first.num_layers || model.num_attention_heads != first.num_attention_heads ||
        model.head_dim != first.head_dim) {
      throw Error(
          fmt::format("{}: has {} layers of {} query heads of width {}, and {} has {} of {} of width {}; give "
                      "traces of one model",
                      trace.path().string(), model.num_layers, model.num_attention_heads, model.head_dim,
                      traces.front().path().string(), first.num_layers, first.num_attention_heads, first.head_dim));
    }
  }
}

}  // namespace

void write_query_statistics(const std::filesystem::path& path, std::span<const TraceReader> traces, int sinks) {
  check_same_shape(traces);
  const ModelInfo& model = traces.front().info().model;
  std::vector<Counted> counted;
  Index queries = 0;
  for (const TraceReader& trace : traces) {
    counted.push_back(counted_of(trace.info(), sinks));
    queries += static_cast<Index>(counted.back().positions.size());
  }
  if (queries == 0) {
    throw Error(fmt::format("{}: holds no prompt query from position {} on; capture with --queries all",
                            traces.front().path().string(), sinks));
  }
  ResultStream stream(path, "kvreplay-query-statistics");
  hdf5::File& file = stream.file();
  file.write_int("/", "queries", queries);
  file.write_int("/", "sinks", sinks);
  file.write_string("/", "model", model.name);
  file.create_group("/layers");
  const Index depth = model.head_dim;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const Index heads = model.num_attention_heads;
    std::vector<float> means(static_cast<std::size_t>(heads * depth));
    std::vector<float> covariances(static_cast<std::size_t>(heads * depth * depth));
    const HeadShape whole = head_shape(traces.front().info(), layer, 0, traces.front().info().prompt_length);
    const Index frequencies = depth - (whole.rotary ? std::ssize(whole.rotary->inverse_frequencies) : 0);
    std::vector<float> magnitudes(static_cast<std::size_t>(heads * frequencies));
    parallel_for(static_cast<int>(heads), [&](int head) {
      Sums sums{Eigen::VectorXd::Zero(depth), Eigen::MatrixXd::Zero(depth, depth), Eigen::VectorXd::Zero(frequencies)};
      for (std::size_t t = 0; t < traces.size(); ++t) {
        const HeadShape shape = head_shape(traces[t].info(), layer, 0, traces[t].info().prompt_length);
        if (!shape.rotary) {
          throw Error(
              fmt::format("{}: layer {}: the trace does not say how positions turned its queries; capture again",
                          traces[t].path().string(), layer));
        }
        const std::vector<int>& positions = counted[t].positions;
        if (positions.empty()) continue;
        Matrix rows =
            traces[t].read(layer, HeadTensor::queries, head, counted[t].first, static_cast<Index>(positions.size()));
        unrotate(*shape.rotary, positions, rows);
        const Eigen::MatrixXd exact = rows.cast<double>();
        sums.mean += exact.colwise().sum().transpose();
        sums.products.noalias() += exact.transpose() * exact;
        sums.magnitudes += frequency_magnitudes(*shape.rotary, rows).colwise().sum().transpose();
      }
      const Eigen::VectorXd mean = sums.mean / static_cast<double>(queries);
      const Eigen::MatrixXd covariance = sums.products / static_cast<double>(queries) - mean * mean.transpose();
      Eigen::Map<Eigen::VectorXf>(means.data() + head * depth, depth) = mean.cast<float>();
      Eigen::Map<Eigen::VectorXf>(magnitudes.data() + head * frequencies, frequencies) =
          (sums.magnitudes / static_cast<double>(queries)).cast<float>();
      Eigen::Map<Matrix>(covariances.data() + head * depth * depth, depth, depth) = covariance.cast<float>();
    });
    const std::string group = fmt::format("/layers/{}", layer);
    file.create_group(group);
    file.write(group + "/mean", means, {heads, depth});
    file.write(group + "/covariance", covariances, {heads, depth, depth});
    file.write(group + "/magnitude", magnitudes, {heads, frequencies});
  }
  stream.finish();
}

}  // namespace kvreplay
