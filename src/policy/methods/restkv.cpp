// ReST-KV (arXiv 2605.08840): a position matters as much as the layer's output would change without it.
//
// Removing position n from a softmax attention with output o moves the output by a[n]/(1 − a[n]) · (o − v_n). With a
// the attention of the observation window, smoothed in time, and the length taken after the output projection W, the
// score is
//   I[n] = a[n] / (1 − a[n]) · ‖W (o − v_n)‖^τ,   a = EMA_α of the window's attention,   o = Σ_n a[n] v_n   (1)
// over the positions before the window, not renormalised ("metric=after", as in the authors' release), or the same for
// every query of the window and then smoothed in time, o being that query's full output ("metric=before").
//
// Spatial smoothing averages I over a window that follows how the attention drifts: D_front and D_rear are the mean
// positions of the capacity − window most attended keys in the window's first and second half, and the drift
// D_front − D_rear sets width and shift in units of β positions (AdaptiveWindow).
//
// The authors' code applies τ only with metric=after and projection=true, and normalizes only with metric=before; here
// both apply always. A position with all of the attention comes first and has a finite score (removal_error).
// Without an output projection in the trace, lengths are taken before it, as with projection=false.
#include <algorithm>
#include <cmath>

#include "policy/policy.h"
#include "policy/published_code.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

struct RestKVParameters {
  int window;
  double alpha;
  double beta;
  int kernel;
  Temporal temporal;
  Spatial spatial;
  bool before;
  bool projection;
  double tau;
  bool normalize;
};

class RestKV : public Ranking {
 public:
  explicit RestKV(RestKVParameters parameters) : p_(parameters) {}

  Protection protection() const override { return {.window = p_.window}; }
  Requirements requirements() const override {
    Requirements requirements{.needs = {Need::window(p_.window)}, .combinations = combinations()};
    if (p_.projection) requirements.needs.push_back({Need::Kind::output_projection});
    return requirements;
  }
  bool depends_on_capacity() const override { return p_.spatial == Spatial::adaptive; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const auto past = before_window(head, scores, p_.window);
    if (!p_.before) {
      // Equation (1).
      reconstruction_errors(head.combined_attention(member, combinations()[0]), length_rule(), past);
      return;
    }
    // Equation (1) for every query of the window, smoothed in time afterwards.
    const std::vector<float> weights = temporal_weights(p_.temporal, p_.alpha, p_.window);
    const std::vector<WindowCombination> queries = combinations();
    std::vector<float> error(past.size());
    std::ranges::fill(past, 0.0f);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      reconstruction_errors(head.combined_attention(member, queries[i]), length_rule(), error);
      for (std::size_t n = 0; n < past.size(); ++n) past[n] += weights[i] * error[n];
    }
  }

  void smooth(const Head& head, int member, int capacity, std::span<float> scores) const override {
    smooth_in_space(p_.spatial, p_.kernel, p_.beta, head, member, p_.window, capacity, scores);
  }

  bool has_stages() const override { return true; }

  void stages(const Head& head, int member, int capacity, const StageReceiver& take) const override {
    using Step = ScoreStage::Step;
    const auto size = static_cast<std::size_t>(p_.window);
    const std::vector<WindowCombination> alone = each_query_alone(p_.window, distance(), p_.before);
    std::vector<WindowCombination> up_to;
    for (int i = 0; i < p_.window; ++i) {
      std::vector<float> weights = temporal_weights(p_.temporal, p_.alpha, i + 1);
      weights.resize(size, 0.0f);
      up_to.push_back({std::move(weights), distance(), p_.before});
    }
    std::vector<float> scores(static_cast<std::size_t>(head.rows()), 0.0f);
    const std::span<float> past = before_window(head, scores, p_.window);
    std::vector<std::vector<float>> queries;  // metric=before: scores are smoothed, not attention
    score_each(head, member, alone, past.size(), [&](int i, std::span<const float> errors) {
      take({.step = Step::alone, .query = i}, errors);
      if (p_.before) queries.emplace_back(errors.begin(), errors.end());
    });
    if (p_.before) {
      for (std::size_t i = 0; i < size; ++i) {
        std::ranges::fill(past, 0.0f);
        for (std::size_t q = 0; q <= i; ++q) {
          for (std::size_t n = 0; n < past.size(); ++n) past[n] += up_to[i].weights[q] * queries[q][n];
        }
        take({.step = Step::in_time, .query = static_cast<int>(i)}, past);
      }
    } else {
      score_each(head, member, up_to, past.size(), [&](int i, std::span<const float> errors) {
        take({.step = Step::in_time, .query = i}, errors);
        std::ranges::copy(errors, past.begin());
      });
    }
    ScoreStage last{.step = Step::in_space};
    if (p_.spatial == Spatial::adaptive) {
      const AdaptiveWindow window = AdaptiveWindow::from_drift(
          attention_drift(head, member, p_.window, capacity - p_.window), p_.beta, p_.kernel);
      last.width = window.width;
      last.shift = window.shift;
    } else if (p_.spatial != Spatial::none) {
      last.width = p_.kernel;
    }
    smooth(head, member, capacity, scores);
    take(last, past);
  }

 private:
  // Equation (1) for one combination after another, as many of them prepared together as a pass over the values pays
  // for.
  void score_each(const Head& head, int member, const std::vector<WindowCombination>& combinations, std::size_t count,
                  const std::function<void(int, std::span<const float>)>& take) const {
    constexpr Index kTogether = Index{64} << 20;
    const auto at_once =
        static_cast<std::size_t>(std::max<Index>(1, kTogether / Head::combination_memory(head.shape(), p_.window, 1)));
    std::vector<float> errors(count);
    for (std::size_t first = 0; first < combinations.size(); first += at_once) {
      const auto some = std::span(combinations).subspan(first, std::min(at_once, combinations.size() - first));
      head.prepare(some);
      for (std::size_t i = 0; i < some.size(); ++i) {
        reconstruction_errors(head.combined_attention(member, some[i]), length_rule(), errors);
        take(static_cast<int>(first + i), errors);
      }
    }
  }

  // a and ‖W (o − v)‖: of the window as smoothed in time, or of each of its queries.
  std::vector<WindowCombination> combinations() const {
    if (!p_.before) return {{temporal_weights(p_.temporal, p_.alpha, p_.window), distance()}};
    return each_query_alone(p_.window, distance(), true);
  }

  WindowCombination::Distance distance() const {
    return p_.projection ? WindowCombination::Distance::projected : WindowCombination::Distance::values;
  }

  LengthRule length_rule() const { return {.tau = p_.tau, .normalize = p_.normalize}; }

  RestKVParameters p_;
};

const MethodRegistration restkv([] {
  return Method{
      .name = "restkv",
      .summary =
          "Keeps the positions whose removal would change the layer's output most, with the attention smoothed "
          "over the observation window and the scores over an adaptive window of positions.",
      .source = "arXiv 2605.08840",
      .parameters =
          {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
               .of(Parameter::Step::window),
           Parameter::real("alpha", 0.3, 0, 1, "weight of the newest query in the moving average")
               .of(Parameter::Step::time),
           Parameter::real("beta", 2000, 1, 1e9, "drift, in positions, that widens the window by one step")
               .of(Parameter::Step::space),
           Parameter::odd_integer("kernel", 5, 1, "smallest width of the spatial window, in positions")
               .of(Parameter::Step::space),
           Parameter::choice("temporal", {"ema", "mean", "last", "reversed-ema"}, "how queries are combined")
               .of(Parameter::Step::time),
           Parameter::choice("spatial", {"adaptive", "avg", "max", "none"}, "how positions are combined")
               .of(Parameter::Step::space),
           Parameter::choice("metric", {"after", "before"}, "score after or before smoothing in time")
               .of(Parameter::Step::score),
           Parameter::flag("projection", true, "measure lengths after the output projection")
               .of(Parameter::Step::score),
           Parameter::real("tau", 1, 0, 100, "exponent of the length").of(Parameter::Step::score),
           Parameter::flag("normalize", false, "divide the length by that of the output").of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<RestKV>(RestKVParameters{
                                   .window = a.integer("window"),
                                   .alpha = a.real("alpha"),
                                   .beta = a.real("beta"),
                                   .kernel = a.integer("kernel"),
                                   .temporal = temporal_named(a.text("temporal")),
                                   .spatial = spatial_named(a.text("spatial")),
                                   .before = a.text("metric") == "before",
                                   .projection = a.flag("projection"),
                                   .tau = a.real("tau"),
                                   .normalize = a.flag("normalize"),
                               })};
          },
  };
});

const MethodRegistration rest_kv_code([] {
  return Method{
      .name = "restkv@rest-kv",
      .summary =
          "The authors' release as its LongBench scripts call it: one kept set per query head, since keys and values "
          "are repeated for the group first.",
      .source = "github.com/an-yongqi/rest-kv, RestKVCluster and scripts/longbench/run_llama3.sh",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            Composition policy = make_policy("restkv");
            policy.granularity = Granularity::query;
            return policy;
          },
      .variant_of = "restkv",
      .revision = rest_kv::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
