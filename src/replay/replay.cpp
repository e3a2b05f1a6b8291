#include "replay/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "base/parallel.h"
#include "replay/evaluation.h"
#include "replay/reconstruction_oracle.h"
#include "replay/trace_head.h"

namespace kvreplay {
namespace {

// A policy at a capacity: what one ReplayResult is about.
struct Setting {
  const Policy* policy;
  std::string capacity_request;
  int capacity;
  Granularity granularity;
  Share share;

  bool keeps_all(int prompt_length) const {
    if (policy->budget && policy->budget->own_capacity()) return false;
    if (!policy->pattern) return capacity >= prompt_length;
    const Pattern::CapacityRule rule = policy->pattern->capacity_rule();
    return rule == Pattern::CapacityRule::everything ||
           (rule == Pattern::CapacityRule::asked && capacity >= prompt_length);
  }

  // Whether a head's kept sets can be drawn without looking at the layer's other heads.
  bool is_local() const {
    return granularity != Granularity::layer && !(policy->budget && policy->budget->needs_scores());
  }
};

int sets_per_kv_head(Granularity granularity, const ModelInfo& model) {
  return granularity == Granularity::query ? model.group_size() : 1;
}

std::vector<Setting> plan(const TraceReader& trace, const ReplayRequest& request, int eviction_position,
                          std::vector<std::string>& notes) {
  const std::string& file = trace.path().string();
  std::vector<Setting> settings;
  for (const Policy& policy : request.policies) {
    const auto rule = policy.pattern ? policy.pattern->capacity_rule() : Pattern::CapacityRule::asked;
    const std::optional<int> own = policy.budget ? policy.budget->own_capacity() : std::nullopt;
    const bool once = own || rule != Pattern::CapacityRule::asked;  // the same for every capacity asked for
    for (const CapacityRequest& asked : request.capacities) {
      const int capacity = own    ? std::max(*own, policy.minimum_capacity())
                           : once ? eviction_position
                                  : asked.resolve(eviction_position);
      if (capacity < policy.minimum_capacity() && capacity < eviction_position) {
        throw Error(fmt::format(
            "{}: capacity {}{} is below the {} positions that {} always keeps; ask for a larger capacity or protect "
            "fewer",
            file, asked.text, asked.count == 0 ? fmt::format(" ({} of {} positions)", capacity, eviction_position) : "",
            policy.minimum_capacity(), policy.canonical));
      }
      const Granularity granularity = request.granularity.value_or(policy.granularity.value_or(Granularity::kv));
      const Share share = request.share.value_or(policy.share.value_or(Share::mean));
      if (policy.pattern && granularity > policy.pattern->coarsest_granularity()) {
        throw Error(fmt::format("{}: {} keeps a set per {} head, which granularity {} cannot show; leave out --heads",
                                file, policy.canonical,
                                policy.pattern->coarsest_granularity() == Granularity::query ? "query" : "KV",
                                name_of(granularity)));
      }
      if (policy.budget && policy.budget->needs_scores() && granularity == Granularity::layer) {
        throw Error(
            fmt::format("{}: {} divides positions among heads, and at granularity layer they share one set; ask "
                        "for --heads kv or query",
                        file, policy.canonical));
      }
      settings.push_back({&policy, once ? std::string(kAllPositions) : asked.text,
                          std::min(capacity, eviction_position), granularity, share});
      if (once) break;
    }
  }
  for (const CapacityRequest& asked : request.capacities) {
    const int capacity = asked.resolve(eviction_position);
    if (capacity < eviction_position) continue;
    notes.push_back(fmt::format("capacity {} {} the {} position{} before the eviction: everything is kept", asked.text,
                                capacity > eviction_position ? "exceeds" : "is all", eviction_position,
                                eviction_position == 1 ? "" : "s"));
  }
  return settings;
}

// Tells, before any work, what a policy would find missing.
void check_requirements(const TraceReader& trace, const std::vector<Setting>& settings, int eviction_position,
                        std::vector<std::string>& notes) {
  const TraceInfo& info = trace.info();
  const TraceHead head(trace, 0, 0, eviction_position);
  const int window = contiguous_window(head.query_positions(), eviction_position);
  int without_projection = 0;
  bool mass = eviction_position == info.prompt_length;
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    without_projection += trace.has_output_projection(layer) ? 0 : 1;
    mass = mass && trace.has_attention_mass(layer);
  }
  const std::string missing_projection =
      without_projection == 0 ? ""
      : without_projection == info.model.num_layers
          ? "the trace has no output projection"
          : fmt::format("{} of {} layers have no output projection", without_projection, info.model.num_layers);
  const Policy* previous = nullptr;
  for (const Setting& setting : settings) {
    if (!setting.policy->ranking || setting.keeps_all(eviction_position) || setting.policy == previous) continue;
    previous = setting.policy;
    const Requirements needs = setting.policy->ranking->requirements();
    const auto refuse = [&](const std::string& what, const std::string& remedy) {
      return Error(fmt::format("{}: {} needs {}, and the trace holds the last {} prompt queries; {}",
                               trace.path().string(), setting.policy->canonical, what, window, remedy));
    };
    if (needs.window_queries > window) {
      throw refuse(
          fmt::format("the last {} queries before position {}", needs.window_queries, eviction_position),
          fmt::format("capture with --queries window:{} or all, or choose a smaller window", needs.window_queries));
    }
    if ((needs.all_queries || (needs.accumulated_attention && !mass)) && window < eviction_position) {
      throw refuse(fmt::format("{}all {} queries before the eviction",
                               needs.all_queries ? "" : "the recorded attention mass of the whole prompt, or ",
                               eviction_position),
                   "capture with --queries all");
    }
    if (needs.output_projection && !missing_projection.empty()) {
      notes.push_back(
          fmt::format("{}: {}; lengths are taken before it there", setting.policy->canonical, missing_projection));
    }
  }
  if (!missing_projection.empty()) {
    notes.push_back(fmt::format("layer error: {}; the concatenated heads are compared there", missing_projection));
  }
}

// The kept sets of a layer's settings, drawn head by head and then, where heads depend on each other, together.
class LayerSelection {
 public:
  LayerSelection(const TraceReader& trace, const std::vector<Setting>& settings, int layer, int eviction_position)
      : trace_(trace), settings_(settings), layer_(layer), prompt_(eviction_position), model_(trace.info().model) {
    const auto kv_heads = static_cast<std::size_t>(model_.num_key_value_heads);
    deferred_.resize(settings.size(), std::vector<HeadScores>(kv_heads));
    for (const Setting& setting : settings) {
      kept_.emplace_back(kv_heads * static_cast<std::size_t>(sets_per_kv_head(setting.granularity, model_)));
    }
  }

  // One list of kept sets per setting: H of them at granularity query, K otherwise.
  std::vector<std::vector<std::vector<int>>> run() {
    parallel_for(model_.num_key_value_heads, [this](int kv_head) { rank_head(kv_head); });
    parallel_for(static_cast<int>(settings_.size()), [this](int setting) { select_together(setting); });
    return std::move(kept_);
  }

 private:
  // Scores of one KV head after step 3; a part is empty where nothing asks for it.
  struct HeadScores {
    Matrix query;   // [group, P]: every query head's own
    Matrix shared;  // [1, P]: what the group shares
  };

  void rank_head(int kv_head) {
    const TraceHead source(trace_, layer_, kv_head, prompt_);
    const Head head(source);
    const Setting* scored = nullptr;  // whose scores `scores` holds; a policy's capacities follow each other
    HeadScores scores;
    for (std::size_t i = 0; i < settings_.size(); ++i) {
      const Setting& setting = settings_[i];
      const Policy& policy = *setting.policy;
      try {
        if (setting.keeps_all(prompt_)) {
          keep_all(i, kv_head);
        } else if (policy.pattern) {
          keep_pattern(i, head.shape());
        } else {
          const bool reusable =
              scored != nullptr && scored->policy == setting.policy && !policy.ranking->depends_on_capacity();
          if (!reusable) scores = score_head(setting, head);
          scored = &setting;
          if (setting.is_local()) {
            select_locally(i, kv_head, scores);
          } else {
            deferred_[i][static_cast<std::size_t>(kv_head)] = scores;
          }
        }
      } catch (const Error& error) {
        throw in_context(setting, kv_head, error);
      }
    }
  }

  // Steps 1 to 3 for one KV head.
  HeadScores score_head(const Setting& setting, const Head& head) const {
    const Ranking& ranking = *setting.policy->ranking;
    const bool compare_all = setting.policy->budget && setting.policy->budget->needs_scores();
    const int group = model_.group_size();
    HeadScores scores;
    scores.query = Matrix::Zero(group, prompt_);
    for (int member = 0; member < group; ++member) {
      ranking.score(head, member, setting.capacity, row_of(scores.query, member));
    }
    std::vector<int> members(static_cast<std::size_t>(group));
    std::iota(members.begin(), members.end(), 0);
    if (setting.granularity != Granularity::query || compare_all) {
      scores.shared = combine(scores.query, setting.share);
      ranking.refine(head, members, setting.capacity, row_of(scores.shared, 0));
    }
    if (setting.granularity == Granularity::query || compare_all) {
      for (const int& member : members)
        ranking.refine(head, {&member, 1}, setting.capacity, row_of(scores.query, member));
    } else {
      scores.query.resize(0, 0);
    }
    check_numbers(scores.query, ranking.protection());
    check_numbers(scores.shared, ranking.protection());
    return scores;
  }

  static Matrix combine(const Matrix& rows, Share share) {
    switch (share) {
      case Share::mean:
        return rows.colwise().mean();
      case Share::max:
        return rows.colwise().maxCoeff();
      case Share::sum:
        return rows.colwise().sum();
    }
    return rows;
  }

  void check_numbers(const Matrix& scores, Protection protection) const {
    for (Index row = 0; row < scores.rows(); ++row) {
      for (Index position = protection.sinks; position < prompt_ - protection.window; ++position) {
        if (std::isnan(scores(row, position))) {
          throw Error(fmt::format("the score of position {} is not a number", position));
        }
      }
    }
  }

  void keep_all(std::size_t setting, int kv_head) {
    std::vector<int> all(static_cast<std::size_t>(prompt_));
    std::iota(all.begin(), all.end(), 0);
    const int sets = sets_per_kv_head(settings_[setting].granularity, model_);
    for (int i = 0; i < sets; ++i) kept_[setting][static_cast<std::size_t>(kv_head * sets + i)] = all;
  }

  void keep_pattern(std::size_t setting, const HeadShape& shape) {
    const Setting& s = settings_[setting];
    const int sets = sets_per_kv_head(s.granularity, model_);
    const std::vector<int> capacities = allocate(s, {});
    for (int i = 0; i < sets; ++i) {
      const int set = shape.kv_head * sets + i;
      kept_[setting][static_cast<std::size_t>(set)] =
          checked(s.policy->pattern->keep(shape, i, capacity_for(capacities, set)));
    }
  }

  // Steps 4 and 5 for the kept sets of one KV head.
  void select_locally(std::size_t setting, int kv_head, const HeadScores& scores) {
    const Setting& s = settings_[setting];
    const Matrix& rows = s.granularity == Granularity::query ? scores.query : scores.shared;
    const int sets = static_cast<int>(rows.rows());
    const std::vector<int> capacities = allocate(s, {});
    for (int i = 0; i < sets; ++i) {
      const int set = kv_head * sets + i;
      kept_[setting][static_cast<std::size_t>(set)] = select_set(s, row_of(rows, i), capacity_for(capacities, set));
    }
  }

  // Steps 4 and 5 for settings whose heads depend on each other.
  void select_together(int index) {
    const auto setting = static_cast<std::size_t>(index);
    const Setting& s = settings_[setting];
    if (s.is_local() || s.policy->pattern || s.keeps_all(prompt_)) return;
    const std::vector<HeadScores>& parts = deferred_[setting];
    try {
      if (s.granularity == Granularity::layer) {
        Matrix rows(static_cast<Index>(parts.size()), prompt_);
        for (std::size_t i = 0; i < parts.size(); ++i) rows.row(static_cast<Index>(i)) = parts[i].shared;
        const Matrix scores = combine(rows, s.share);
        std::ranges::fill(kept_[setting], select_set(s, row_of(scores, 0), allocate(s, parts)[0]));
        return;
      }
      const std::vector<int> capacities = allocate(s, parts);
      const int sets = sets_per_kv_head(s.granularity, model_);
      for (std::size_t set = 0; set < kept_[setting].size(); ++set) {
        const HeadScores& part = parts[set / static_cast<std::size_t>(sets)];
        const std::span<const float> scores = s.granularity == Granularity::query
                                                  ? row_of(part.query, static_cast<Index>(set) % sets)
                                                  : row_of(part.shared, 0);
        kept_[setting][set] = select_set(s, scores, capacities[set]);
      }
    } catch (const Error& error) {
      throw in_context(s, -1, error);
    }
  }

  std::vector<int> allocate(const Setting& setting, const std::vector<HeadScores>& scores) const {
    const Policy& policy = *setting.policy;
    if (!policy.budget) return {setting.capacity};
    BudgetRequest request{.layer = layer_,
                          .num_layers = model_.num_layers,
                          .prompt_length = prompt_,
                          .capacity = setting.capacity,
                          .protection = policy.ranking ? policy.ranking->protection()
                                                       : Protection{.sinks = policy.pattern->minimum_capacity()},
                          .granularity = setting.granularity,
                          .num_query_heads = model_.num_attention_heads,
                          .num_kv_heads = model_.num_key_value_heads,
                          .pyramid_on_short_prompts = policy.ranking && policy.ranking->pyramid_on_short_prompts(),
                          .query_head_scores = {},
                          .kv_head_scores = {}};
    for (const HeadScores& part : scores) {
      for (Index member = 0; member < part.query.rows(); ++member) {
        request.query_head_scores.push_back(row_of(part.query, member));
      }
      if (part.shared.rows() > 0) request.kv_head_scores.push_back(row_of(part.shared, 0));
    }
    return policy.budget->allocate(request);
  }

  // Without a budget, or at granularity layer, one capacity serves all sets.
  static int capacity_for(const std::vector<int>& capacities, int set) {
    return capacities[capacities.size() == 1 ? 0 : static_cast<std::size_t>(set)];
  }

  std::vector<int> select_set(const Setting& setting, std::span<const float> scores, int capacity) const {
    const Policy& policy = *setting.policy;
    const Protection protection = policy.ranking->protection();
    return checked(policy.selection ? policy.selection->select(scores, protection, capacity)
                                    : select_top(scores, protection, capacity));
  }

  // A method, maybe a plug-in's, that keeps what is not there must not get as far as the measures.
  std::vector<int> checked(std::vector<int> kept) const {
    const bool inside = !kept.empty() && kept.front() >= 0 && kept.back() < prompt_;
    if (!inside || !std::ranges::is_sorted(kept, std::less_equal<>())) {
      throw Error(fmt::format("a kept set is not ascending positions from 0 to {}", prompt_ - 1));
    }
    return kept;
  }

  Error in_context(const Setting& setting, int kv_head, const Error& error) const {
    return Error(fmt::format("{}: {}, layer {}{}: {}", trace_.path().string(), setting.policy->canonical, layer_,
                             kv_head < 0 ? "" : fmt::format(", KV head {}", kv_head), error.what()));
  }

  static std::span<const float> row_of(const Matrix& matrix, Index row) {
    return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
  }
  static std::span<float> row_of(Matrix& matrix, Index row) {
    return {matrix.data() + row * matrix.cols(), static_cast<std::size_t>(matrix.cols())};
  }

  const TraceReader& trace_;
  const std::vector<Setting>& settings_;
  int layer_;
  int prompt_;
  const ModelInfo& model_;
  std::vector<std::vector<HeadScores>> deferred_;    // [setting][KV head]: scores that wait for the other heads
  std::vector<std::vector<std::vector<int>>> kept_;  // [setting][set]
};

float span_recall(const std::vector<int>& kept, const Span& span, int eviction_position) {
  const int end = std::min(span.end, eviction_position);
  const auto first = std::ranges::lower_bound(kept, span.start);
  const auto last = std::ranges::lower_bound(kept, end);
  return static_cast<float>(last - first) / static_cast<float>(end - span.start);
}

std::span<float> table_row(Table& table, Index row) {
  const Index width = table.shape.back();
  return {table.numbers.data() + row * width, static_cast<std::size_t>(width)};
}

using LayerSets = std::vector<std::vector<int>>;  // a layer's kept sets, as in KeptSets

// What one layer's kept sets do, [H][E] and [E].
struct LayerMeasures {
  std::vector<HeadMeasures> heads;
  std::vector<float> layer_error;
};

// Measures several kept sets of a layer against the same full outputs.
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

// The mean squared layer error over the evaluation queries: what oracle-reconstruction minimises.
double mean_square(const std::vector<float>& layer_error) {
  double sum = 0;
  for (const float error : layer_error) sum += static_cast<double>(error) * static_cast<double>(error);
  return sum / static_cast<double>(layer_error.size());
}

// Replaces the kept sets of oracles that exchange positions by better ones, starting from the best of the run.
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

std::vector<const LayerSets*> addresses(const std::vector<LayerSets>& kept) {
  std::vector<const LayerSets*> pointers;
  for (const LayerSets& sets : kept) pointers.push_back(&sets);
  return pointers;
}

// Fills a layer's part of a result.
void store(const LayerMeasures& measures, int layer, const TraceReplay& replay, ReplayResult& result) {
  const ModelInfo& model = replay.model;
  std::ranges::copy(measures.layer_error, table_row(result.layer_error, layer).begin());
  for (int head = 0; head < model.num_attention_heads; ++head) {
    const HeadMeasures& found = measures.heads[static_cast<std::size_t>(head)];
    const Index row = static_cast<Index>(layer) * model.num_attention_heads + head;
    std::ranges::copy(found.head_error, table_row(result.head_error, row).begin());
    std::ranges::copy(found.attention_recall, table_row(result.attention_recall, row).begin());
    std::ranges::copy(found.cosine, table_row(result.cosine, row).begin());
    const std::vector<int>& kept = result.kept.of_query_head(layer, head, model.group_size());
    for (std::size_t s = 0; s < replay.spans.size(); ++s) {
      table_row(result.span_recall, row)[s] = span_recall(kept, replay.spans[s], replay.eviction_position);
    }
  }
}

TraceReplay prepare(const TraceReader& trace, int eviction_position) {
  const TraceInfo& info = trace.info();
  TraceReplay replay;
  replay.trace = trace.path().string();
  replay.model = info.model;
  replay.prompt_length = info.prompt_length;
  replay.eviction_position = eviction_position;
  if (eviction_position < 1 || eviction_position > info.num_tokens()) {
    throw Error(fmt::format("{}: eviction position {} is outside the trace's {} tokens", replay.trace,
                            eviction_position, info.num_tokens()));
  }
  const auto positions = evaluation_queries(info, eviction_position).positions;
  replay.evaluation_positions.assign(positions.begin(), positions.end());
  if (replay.evaluation_positions.empty()) {
    throw Error(fmt::format(
        "{}: no query at or after position {} was captured, so there is nothing to evaluate; capture with --generate 2 "
        "or more, or evict earlier with --evict-at",
        replay.trace, eviction_position));
  }
  for (const Span& span : info.spans) {
    if (span.start < eviction_position && span.end > span.start) replay.spans.push_back(span);
  }
  return replay;
}

}  // namespace

int CapacityRequest::resolve(int prompt_length) const {
  if (count > 0) return count;
  // A share such as 0.29 of 100 is 28.999… in binary; it means 29.
  return std::max(1, static_cast<int>(std::floor(share * prompt_length + 1e-9)));
}

CapacityRequest CapacityRequest::parse(std::string_view text) {
  const auto refuse = [text]() {
    return UsageError(fmt::format(
        "capacity '{}' is neither a count of positions (128) nor a share of the prompt, up to 100% (25%)", text));
  };
  CapacityRequest request;
  if (text == "0" || text == "0%") throw UsageError("capacity 0 keeps nothing; ask for at least 1 position");
  const bool is_share = text.ends_with('%');
  const std::string_view digits = is_share ? text.substr(0, text.size() - 1) : text;
  const char* end = digits.data() + digits.size();
  if (is_share) {
    double percent = 0;
    const auto [stop, failure] = std::from_chars(digits.data(), end, percent);
    if (failure != std::errc() || stop != end || !(percent > 0 && percent <= 100)) throw refuse();
    request.share = percent / 100;
    request.text = fmt::format("{}%", percent);
  } else {
    const auto [stop, failure] = std::from_chars(digits.data(), end, request.count);
    if (failure != std::errc() || stop != end || request.count < 1) throw refuse();
    request.text = fmt::format("{}", request.count);
  }
  return request;
}

Table Table::of_shape(std::vector<Index> shape) {
  const Index size = std::accumulate(shape.begin(), shape.end(), Index{1}, std::multiplies<>());
  return {std::move(shape), std::vector<float>(static_cast<std::size_t>(size), 0.0f)};
}

const std::vector<int>& KeptSets::of_query_head(int layer, int query_head, int group_size) const {
  const int set = granularity == Granularity::query ? query_head : query_head / group_size;
  return sets[static_cast<std::size_t>(layer * sets_per_layer + set)];
}

double KeptSets::mean_size() const {
  double positions = 0;
  for (const std::vector<int>& set : sets) positions += static_cast<double>(set.size());
  return positions / static_cast<double>(sets.size());
}

std::vector<TraceReplay> replay(const TraceReader& trace, const ReplayRequest& request,
                                const std::function<void(double)>& progress) {
  const ModelInfo& model = trace.info().model;
  std::vector<int> evictions = request.eviction_positions;
  if (evictions.empty()) evictions.push_back(trace.info().prompt_length);

  std::vector<TraceReplay> replays;
  std::vector<std::vector<Setting>> plans;
  for (const int eviction : evictions) {
    replays.push_back(prepare(trace, eviction));
    plans.push_back(plan(trace, request, eviction, replays.back().notes));
    check_requirements(trace, plans.back(), eviction, replays.back().notes);
  }

  for (std::size_t e = 0; e < evictions.size(); ++e) {
    TraceReplay& result = replays[e];
    const auto layers = static_cast<Index>(model.num_layers);
    const auto heads = static_cast<Index>(model.num_attention_heads);
    const auto queries = static_cast<Index>(result.evaluation_positions.size());
    for (const Setting& setting : plans[e]) {
      ReplayResult& r = result.results.emplace_back();
      r.trace = result.trace;
      r.policy = setting.policy->canonical;
      r.capacity_request = setting.capacity_request;
      r.capacity = setting.capacity;
      r.eviction_position = result.eviction_position;
      r.granularity = setting.granularity;
      r.share = setting.share;
      r.oracle = setting.policy->oracle;
      r.kept.granularity = setting.granularity == Granularity::query ? Granularity::query : Granularity::kv;
      r.kept.sets_per_layer = model.num_key_value_heads * sets_per_kv_head(setting.granularity, model);
      r.head_error = Table::of_shape({layers, heads, queries});
      r.layer_error = Table::of_shape({layers, queries});
      r.attention_recall = Table::of_shape({layers, heads, queries});
      r.cosine = Table::of_shape({layers, heads, queries});
      r.span_recall = Table::of_shape({layers, heads, static_cast<Index>(result.spans.size())});
    }
    for (int layer = 0; layer < model.num_layers; ++layer) {
      std::vector<LayerSets> kept = LayerSelection(trace, plans[e], layer, result.eviction_position).run();
      improve_oracles(trace, layer, result.eviction_position, plans[e], kept);
      const std::vector<const LayerSets*> all = addresses(kept);
      const std::vector<LayerMeasures> measures = measure_layer(trace, layer, result.eviction_position, all);
      for (std::size_t i = 0; i < kept.size(); ++i) {
        std::ranges::move(kept[i], std::back_inserter(result.results[i].kept.sets));
        store(measures[i], layer, result, result.results[i]);
      }
      if (progress) {
        progress((static_cast<double>(e) + static_cast<double>(layer + 1) / static_cast<double>(layers)) /
                 static_cast<double>(evictions.size()));
      }
    }
  }
  for (TraceReplay& result : replays) {
    for (ReplayResult& r : result.results) {
      // A pattern with a capacity of its own is compared with those that were asked for as many positions.
      if (r.capacity_request != kAllPositions || r.kept.mean_size() == result.eviction_position) continue;
      r.capacity = static_cast<int>(std::lround(r.kept.mean_size()));
      r.capacity_request = fmt::format("{}", r.capacity);
    }
  }
  return replays;
}

}  // namespace kvreplay
