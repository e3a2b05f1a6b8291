#include "analysis/importance.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <span>

#include "analysis/retention.h"
#include "base/error.h"
#include "policy/policy.h"
#include "policy/smoothing.h"
#include "replay/trace_source.h"

namespace kvreplay {
namespace {

// The parameters of a restkv setting that its scores follow from.
struct RestKVSetting {
  std::string canonical;
  int window;
  double alpha;
  double beta;
  int kernel;
  Temporal temporal;
  Spatial spatial;
  bool before;
  WindowCombination::Distance distance;
  LengthRule lengths;
};

RestKVSetting setting_of(const std::string& spec) {
  const Policy policy = make_policy(spec);
  SpecPart part = parse_spec(spec).front();
  const Method* method = find_method(part.name);
  // The authors' release is restkv with its defaults.
  if (method->variant_of == "restkv") part = {.name = method->variant_of, .arguments = {}};
  if (part.name != "restkv") {
    throw UsageError(fmt::format("importance is that of restkv; '{}' is another method", policy.canonical));
  }
  const Arguments a(part, find_method(part.name)->parameters);
  using Distance = WindowCombination::Distance;
  return {.canonical = policy.canonical,
          .window = a.integer("window"),
          .alpha = a.real("alpha"),
          .beta = a.real("beta"),
          .kernel = a.integer("kernel"),
          .temporal = temporal_named(a.text("temporal")),
          .spatial = spatial_named(a.text("spatial")),
          .before = a.text("metric") == "before",
          .distance = a.flag("projection") ? Distance::projected : Distance::values,
          .lengths = {.tau = a.real("tau"), .normalize = a.flag("normalize")}};
}

// Throws where there is no such head, or nothing to show of it.
void check(const TraceReader& trace, int layer, int head, const RestKVSetting& setting, int capacity,
           int eviction_position) {
  const TraceInfo& info = trace.info();
  const std::string file = trace.path().string();
  if (layer < 0 || layer >= info.model.num_layers || head < 0 || head >= info.model.num_attention_heads) {
    throw UsageError(fmt::format("{}: there is no query head {} of layer {}; layers are 0 to {}, query heads 0 to {}",
                                 file, head, layer, info.model.num_layers - 1, info.model.num_attention_heads - 1));
  }
  if (eviction_position < 1 || eviction_position > info.num_tokens()) {
    throw Error(fmt::format("{}: eviction position {} is outside the trace's {} tokens", file, eviction_position,
                            info.num_tokens()));
  }
  if (head_shape(info, layer, 0, eviction_position).rows() <= setting.window) {
    throw Error(
        fmt::format("{}: no position is left before the observation window of {} queries that ends at {} in layer {}; "
                    "choose a smaller window",
                    file, setting.window, eviction_position, layer));
  }
  if (capacity < setting.window) {
    throw UsageError(fmt::format("capacity {} is below the {} positions that {} always keeps; ask for a larger one",
                                 capacity, setting.window, setting.canonical));
  }
  const TraceHead source(trace, layer, head / info.model.group_size(), eviction_position);
  const int at_hand = contiguous_window(source.query_positions(), eviction_position);
  if (at_hand < setting.window) {
    throw Error(fmt::format(
        "{}: {} needs the last {} queries before position {}, and the trace holds {} of them; capture with "
        "--queries window:{} or all",
        file, setting.canonical, setting.window, eviction_position, at_hand == 0 ? "none" : fmt::to_string(at_hand),
        setting.window + std::max(0, info.prompt_length - eviction_position)));
  }
}

std::vector<float> binned(std::span<const float> numbers, const RasterBins& bins) {
  std::vector<float> means;
  for (int bin = 0; bin < bins.count(); ++bin) {
    const std::span<const float> part =
        numbers.subspan(static_cast<std::size_t>(bin) * static_cast<std::size_t>(bins.width),
                        static_cast<std::size_t>(std::min(bins.width, bins.positions - bin * bins.width)));
    double sum = 0;
    for (const float number : part) sum += static_cast<double>(number);
    means.push_back(static_cast<float>(sum / static_cast<double>(part.size())));
  }
  return means;
}

// Σ weights[i] · rows[i], as far as there are weights.
std::vector<float> combined(std::span<const float> weights, const std::vector<std::vector<float>>& rows) {
  std::vector<float> sums;
  for (std::size_t bin = 0; bin < rows.front().size(); ++bin) {
    double sum = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      sum += static_cast<double>(weights[i]) * static_cast<double>(rows[i][bin]);
    }
    sums.push_back(static_cast<float>(sum));
  }
  return sums;
}

// The scores of one combination of the window's attention after another.
void score_each(const Head& head, int member, const RestKVSetting& setting,
                const std::vector<WindowCombination>& combinations,
                const std::function<void(std::size_t, std::span<const float>)>& take) {
  // Together as many as a pass over the values pays for.
  constexpr Index kTogether = Index{64} << 20;
  const auto at_once = static_cast<std::size_t>(
      std::max<Index>(1, kTogether / Head::combination_memory(head.shape(), setting.window, 1)));
  std::vector<float> errors(static_cast<std::size_t>(head.rows() - setting.window));
  for (std::size_t first = 0; first < combinations.size(); first += at_once) {
    const auto some = std::span(combinations).subspan(first, std::min(at_once, combinations.size() - first));
    head.prepare(some);
    for (std::size_t i = 0; i < some.size(); ++i) {
      reconstruction_errors(head.combined_attention(member, some[i]), setting.lengths, errors);
      take(first + i, errors);
    }
  }
}

}  // namespace

ImportanceMap importance_map(const TraceReader& trace, int layer, int head, const std::string& spec, int capacity,
                             int eviction_position, int most_bins) {
  const RestKVSetting setting = setting_of(spec);
  check(trace, layer, head, setting, capacity, eviction_position);
  const int group = trace.info().model.group_size();
  const int member = head % group;
  const int window = setting.window;
  const auto size = static_cast<std::size_t>(window);
  const TraceHead source(trace, layer, head / group, eviction_position);
  const HeadShape& shape = source.shape();
  const RasterBins bins = RasterBins::of(shape.rows() - window, most_bins);
  ImportanceMap map{.layer = layer,
                    .head = head,
                    .policy = setting.canonical,
                    .capacity = std::min(capacity, shape.rows()),
                    .query_positions = {},
                    .bin_width = bins.width,
                    .first_position = shape.positions[0],
                    .positions = bins.positions,
                    .raw = std::vector<std::vector<float>>(size),
                    .temporal = std::vector<std::vector<float>>(size),
                    .spatial = {}};
  for (int i = 0; i < window; ++i) map.query_positions.push_back(eviction_position - window + i);

  std::vector<WindowCombination> alone;  // each query
  std::vector<WindowCombination> up_to;  // each query and those before it, smoothed in time
  for (int i = 0; i < window; ++i) {
    std::vector<float> one(size, 0.0f);
    one[static_cast<std::size_t>(i)] = 1;
    alone.push_back({std::move(one), setting.distance, setting.before});
    std::vector<float> weights = temporal_weights(setting.temporal, setting.alpha, i + 1);
    weights.resize(size, 0.0f);
    up_to.push_back({std::move(weights), setting.distance, setting.before});
  }

  const Head seen(source, 0);
  std::vector<float> scores(static_cast<std::size_t>(shape.rows()), 0.0f);
  const auto past = std::span(scores).first(static_cast<std::size_t>(bins.positions));
  score_each(seen, member, setting, alone, [&](std::size_t i, std::span<const float> errors) {
    map.raw[i] = binned(errors, bins);
    if (!setting.before) return;
    const float weight = up_to.back().weights[i];
    for (std::size_t n = 0; n < past.size(); ++n) past[n] += weight * errors[n];
  });
  if (setting.before) {
    for (std::size_t i = 0; i + 1 < size; ++i) {
      map.temporal[i] = combined(std::span(up_to[i].weights).first(i + 1), map.raw);
    }
  } else {
    score_each(seen, member, setting, up_to, [&](std::size_t i, std::span<const float> errors) {
      if (i + 1 < size) {
        map.temporal[i] = binned(errors, bins);
      } else {
        std::ranges::copy(errors, past.begin());
      }
    });
  }
  map.temporal.back() = binned(past, bins);

  if (setting.spatial == Spatial::adaptive) {
    const AdaptiveWindow adaptive = AdaptiveWindow::from_drift(
        attention_drift(seen, member, window, map.capacity - window), setting.beta, setting.kernel);
    map.width = adaptive.width;
    map.shift = adaptive.shift;
  } else if (setting.spatial != Spatial::none) {
    map.width = setting.kernel;
  }
  smooth_in_space(setting.spatial, setting.kernel, setting.beta, seen, member, window, map.capacity, scores);
  map.spatial = binned(past, bins);
  return map;
}

}  // namespace kvreplay
