// VaSE (arXiv 2606.03928): values of a wide range are never lost, and the rest is kept by chance, in proportion to
// attention.
//
// Candidates are all rows but the last `recent`. Attention: softmax of the last `recent` queries over the candidates,
// mean over the queries, averaged over 5 neighbours with smooth, mean over the group. The range of a value is its
// largest minus its smallest channel. mode=
//   sample (the paper's): the `large` candidates with the widest range, the first 4 rows before all others, then rows
//       drawn without replacement in proportion to attention, from a seed;
//   range-attention: the same, the rest by attention;
//   attention: by attention alone;
//   attention-redundancy: λ · attention − (1 − λ) · softmax of the mean cosine of the candidates' keys, R-KV's idea
//       without its threshold;
//   narrow-range: the narrowest ranges.
// It evicts when the cache holds more than the capacity and a multiple of `recent` rows; the prompt waits for that.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <tuple>

#include "base/softmax.h"
#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

enum class Mode { sample, range_attention, attention, attention_redundancy, narrow_range };

struct Rule {
  Mode mode;
  int recent;
  int large;
  double lambda;
  bool smooth;
  int seed;
};

constexpr int kSinks = 4;
constexpr int kKernel = 5;
// Above every attention: what is kept for its value's range.
constexpr float kForItsRange = 1e6f;

class VaSE : public Ranking {
 public:
  explicit VaSE(Rule rule) : rule_(rule) {}

  Protection protection() const override { return {.window = rule_.recent}; }
  Requirements requirements() const override {
    if (rule_.mode == Mode::narrow_range) return {.needs = {{Need::Kind::keys_or_values}}};
    return {.needs = {Need::window(rule_.recent)}};
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const std::span<float> candidates = scores.first(static_cast<std::size_t>(head.rows() - rule_.recent));
    if (rule_.mode == Mode::narrow_range) {
      for (std::size_t n = 0; n < candidates.size(); ++n) candidates[n] = -range_of(head, static_cast<Index>(n));
      return;
    }
    const auto past = static_cast<Index>(candidates.size());
    Matrix logits = head.queries(member, rule_.recent) * head.keys().topRows(past).transpose();
    scale_logits(logits, head.shape().rule);
    for (Index query = 0; query < logits.rows(); ++query) softmax(logits.row(query), 0, past);
    const Eigen::RowVectorXf mean = logits.colwise().mean();
    std::ranges::copy(std::span(mean.data(), candidates.size()), candidates.begin());
    if (rule_.smooth) pool(Spatial::average, kKernel, candidates);
  }

  // On what the group shares.
  void refine(const Head& head, std::span<const int> /*members*/, int capacity,
              std::span<float> scores) const override {
    const std::span<float> candidates = scores.first(static_cast<std::size_t>(head.rows() - rule_.recent));
    if (rule_.mode == Mode::attention_redundancy) subtract_redundancy(head, candidates);
    if (rule_.mode != Mode::sample && rule_.mode != Mode::range_attention) return;
    if (rule_.mode == Mode::sample) draw(head, candidates);
    std::vector<float> ranges(candidates.size());
    for (std::size_t n = 0; n < ranges.size(); ++n) {
      const bool is_sink = rule_.mode == Mode::sample && n < kSinks;
      ranges[n] = is_sink ? std::numeric_limits<float>::infinity() : range_of(head, static_cast<Index>(n));
    }
    const int most = std::clamp(capacity - rule_.recent, 0, rule_.large);
    for (const int row : select_top(ranges, {}, most)) scores[static_cast<std::size_t>(row)] = kForItsRange;
  }

  bool depends_on_capacity() const override {
    return rule_.mode == Mode::sample || rule_.mode == Mode::range_attention;
  }

 private:
  static float range_of(const Head& head, Index row) {
    return head.values().row(row).maxCoeff() - head.values().row(row).minCoeff();
  }

  void subtract_redundancy(const Head& head, std::span<float> candidates) const {
    Matrix directions = head.keys().topRows(static_cast<Index>(candidates.size()));
    for (Index n = 0; n < directions.rows(); ++n) directions.row(n) /= directions.row(n).norm() + 1e-8f;
    Matrix alike = directions * directions.transpose();
    alike.diagonal().setZero();
    Matrix mean = alike.colwise().mean();
    softmax(mean.row(0), 0, mean.cols());
    const auto lambda = static_cast<float>(rule_.lambda);
    for (std::size_t n = 0; n < candidates.size(); ++n) {
      candidates[n] = lambda * candidates[n] - (1 - lambda) * mean(0, static_cast<Index>(n));
    }
  }

  // Without replacement in proportion to attention: the largest of log a + Gumbel noise are such a draw.
  void draw(const Head& head, std::span<float> candidates) const {
    const HeadShape& shape = head.shape();
    std::seed_seq seeds{rule_.seed, shape.layer, shape.kv_head, shape.next_position};
    std::mt19937_64 generator(seeds);
    for (float& score : candidates) {
      const double uniform = (static_cast<double>(generator() >> 11) + 0.5) * 0x1p-53;
      const double gumbel = -std::log(-std::log(uniform));
      score = static_cast<float>(std::log(std::max(static_cast<double>(score), 1e-30)) + gumbel);
    }
  }

  Rule rule_;
};

Composition compose(Rule rule) {
  return {
      .rule = std::make_shared<VaSE>(rule),
      .granularity = Granularity::kv,
      .share = Share::mean,
      .schedule = Schedule{.interval = rule.recent, .phase = Schedule::Phase::rows, .prompt = Schedule::Prompt::wait},
      .order = RowOrder::score};
}

Parameter recent_parameter() {
  return Parameter::integer("recent", 64, 1, "last rows that are kept, and rows between evictions: residual_length")
      .of(Parameter::Step::window);
}

constexpr const char* kSource = "github.com/terarachang/VaSE, modified/transformers/cache_utils.py";
constexpr const char* kRevision = "commit bfa2692";

const MethodRegistration vase([] {
  return Method{
      .name = "vase",
      .summary =
          "Keeps values of a wide range and, of the rest, what is drawn in proportion to attention; one seed is one "
          "draw. Evicts at multiples of so many rows.",
      .source = fmt::format("arXiv 2606.03928; {}, {}", kSource, kRevision),
      .parameters = {Parameter::choice(
                         "mode", {"sample", "range-attention", "attention", "attention-redundancy", "narrow-range"},
                         "how rows are chosen")
                         .of(Parameter::Step::score),
                     recent_parameter(),
                     Parameter::integer("large", 200, 0, "rows that are kept for their value's range: n_large")
                         .of(Parameter::Step::selection),
                     Parameter::real("lambda", 0.5, 0, 1, "mode=attention-redundancy: weight of attention: rkv_lambda")
                         .of(Parameter::Step::score),
                     Parameter::flag("smooth", false, "average attention over 5 neighbours").of(Parameter::Step::space),
                     Parameter::integer("seed", 0, 0, "mode=sample: of the draw").of(Parameter::Step::draw)},
      .compose =
          [](const Arguments& a) {
            static const std::vector<std::string> modes = {"sample", "range-attention", "attention",
                                                           "attention-redundancy", "narrow-range"};
            const auto mode = static_cast<Mode>(std::ranges::find(modes, a.text("mode")) - modes.begin());
            return compose(
                {mode, a.integer("recent"), a.integer("large"), a.real("lambda"), a.flag("smooth"), a.integer("seed")});
          },
  };
});

const MethodRegistration rkv_of_repository([] {
  return Method{
      .name = "rkv@vase",
      .summary =
          "VaSE's rewrite of R-KV: redundancy is the mean cosine of the candidates' keys, without a threshold and "
          "sparing none; softmax per query head, then the mean of the group; averages over neighbours; by the number "
          "of rows.",
      .source = kSource,
      .parameters = {recent_parameter(),
                     Parameter::real("lambda", 0.5, 0, 1, "weight of attention: rkv_lambda").of(Parameter::Step::score),
                     Parameter::flag("smooth", true, "average attention over 5 neighbours").of(Parameter::Step::space)},
      .compose =
          [](const Arguments& a) {
            return compose({Mode::attention_redundancy, a.integer("recent"), 0, a.real("lambda"), a.flag("smooth"), 0});
          },
      .variant_of = "rkv",
      .revision = kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
