// TriAttention (arXiv 2604.04921): before rotation queries of a head are nearly one vector, so that how much later
// queries will like a key follows from the distance alone, a sum of cosines.
//
// With q̄_f the mean over the prompt's queries before rotation, as a complex number per frequency f, m_f their mean
// magnitude, and k_f the key before rotation, the score of the key at position p for a query at position s is
//   Σ_f |q̄_f| |k_f| cos((s − p) ω_f + ∠q̄_f − ∠k_f) + Σ_f (m_f − |q̄_f|) |k_f|
// (paper, section 4). The first sum is the product of the key as it is cached with q̄ rotated to s. s runs over the next
// position plus 1, 2, 4 … 65,536; the mean over these counts (aggregation=mean), or the largest. Scores of each query
// head are then brought to mean 0 and deviation 1 over the rows that may go (normalize). No window is protected: the
// newest row may go. Dimensions that do not turn count as frequencies of 0, one by one.
//
// mode= says who keeps the same positions:
//   per-head (what its code's command line sets): all layers, KV head by KV head, by the mean over layers of the
//       group's largest score;
//   layer-head: nobody; every KV head of every layer goes by its group's largest score, or with share=mean the mean;
//   global: all heads of all layers, by the largest score of all.
// It evicts once `interval` rows stand above the capacity (slack), or at multiples of `interval` tokens; the prompt
// waits for that. The prompt stays, and takes its room in the capacity; where it fills that, the first rows of the
// prompt are all that is kept, and whatever is generated goes. prompt=evicted lets it go like all else. count-prompt=
// false: when the cache is full is counted without the prompt, what is left is not.
//
// statistics=FILE takes q̄ and m from other traces of the model, as `kvreplay query-statistics` writes them and the
// paper calibrates; then no query of the trace is needed.
//
// Of the code's ties, which it breaks by noise below 1e-6, earlier rows win here. Its caches stand by score, which
// nothing goes by; here by position.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "policy/policy.h"
#include "policy/query_statistics.h"

namespace kvreplay {
namespace {

enum class Mode { per_head, layer_head, global };

struct Rule {
  Mode mode;
  bool largest_offset;  // the largest over offsets counts, not the mean
  bool normalize;
  bool pins_prompt;

  auto operator<=>(const Rule&) const = default;
};

constexpr int kMostOffset = 65536;
constexpr double kLeastDeviation = 1e-6;

// What queries of one query head are like before rotation.
struct Calibration {
  Matrix mean;             // [1, D]
  Eigen::VectorXd excess;  // [F]: the mean magnitude, less the mean's
};

// By the queries before the eviction.
Calibration calibration_of(const Head& head, int member) {
  const RotaryTable& rotary = *head.shape().rotary;
  const int count = head.shape().next_position;
  Matrix queries = head.queries(member, count);
  std::vector<int> positions(static_cast<std::size_t>(count));
  std::iota(positions.begin(), positions.end(), 0);
  unrotate(rotary, positions, queries);
  Calibration calibration;
  calibration.mean = queries.cast<double>().colwise().mean().cast<float>();
  calibration.excess =
      (frequency_magnitudes(rotary, queries).colwise().mean() - frequency_magnitudes(rotary, calibration.mean).row(0))
          .transpose();
  return calibration;
}

// By those of other traces.
Calibration calibration_of(const QueryStatistics& statistics, const HeadShape& shape, int member) {
  Calibration calibration;
  calibration.mean = statistics.mean(shape, member).transpose().cast<float>();
  calibration.excess =
      statistics.magnitude(shape, member) - frequency_magnitudes(*shape.rotary, calibration.mean).row(0).transpose();
  return calibration;
}

// The calibration of every query head of the group, for all that comes.
class KnownCalibration : public RankingMemory {
 public:
  explicit KnownCalibration(std::shared_ptr<const QueryStatistics> statistics) : statistics_(std::move(statistics)) {}

  void begin(const Head& head) override {
    for (int member = 0; member < head.shape().group_size; ++member) {
      members_.push_back(statistics_ ? calibration_of(*statistics_, head.shape(), member)
                                     : calibration_of(head, member));
    }
  }
  bool observes_attention() const override { return false; }
  void observe(const CacheStep& /*step*/) override {}
  void keep(std::span<const int> /*rows*/) override {}

  const Calibration& of(int member) const { return members_[static_cast<std::size_t>(member)]; }

 private:
  std::shared_ptr<const QueryStatistics> statistics_;  // or null: by the prompt
  std::vector<Calibration> members_;
};

// The mean query where later queries will stand: [offsets, D].
Matrix later_queries(const HeadShape& shape, const Matrix& mean) {
  std::vector<int> positions;
  for (int offset = 1; offset <= kMostOffset; offset *= 2) positions.push_back(shape.next_position + offset);
  Matrix queries = mean.replicate(static_cast<Index>(positions.size()), 1);
  rotate(*shape.rotary, positions, queries);
  return queries;
}

// What a head's query heads have in common.
enum class Known { key_magnitudes, group_scores };

class TriAttention : public Ranking {
 public:
  TriAttention(Rule rule, std::shared_ptr<const QueryStatistics> statistics)
      : rule_(rule), statistics_(std::move(statistics)) {}

  Requirements requirements() const override {
    Requirements requirements{.needs = {{Need::Kind::rotary}, {Need::Kind::keys_or_values}}};
    if (!statistics_) requirements.needs.push_back({Need::Kind::all_queries});
    return requirements;
  }
  void check(const HeadShape& shape) const override {
    if (!statistics_) return;
    statistics_->check(shape);
    statistics_->check_magnitudes(shape);
  }
  void check_run(const RunIdentity& run) const override {
    if (statistics_) statistics_->check_run(run);
  }
  std::unique_ptr<RankingMemory> memory(const HeadShape& /*shape*/) const override {
    return std::make_unique<KnownCalibration>(statistics_);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    if (rule_.mode != Mode::per_head) {
      score_alone(head, member, scores);
      return;
    }
    // What counts of a layer is the group's largest.
    const std::vector<float>& group = head.once(std::pair(Known::group_scores, rule_), [&] {
      std::vector<float> largest(scores.size(), -std::numeric_limits<float>::infinity());
      std::vector<float> own(scores.size());
      for (int one = 0; one < head.shape().group_size; ++one) {
        score_alone(head, one, own);
        for (std::size_t n = 0; n < own.size(); ++n) largest[n] = std::max(largest[n], own[n]);
      }
      return largest;
    });
    std::ranges::copy(group, scores.begin());
  }

 private:
  void score_alone(const Head& head, int member, std::span<float> scores) const {
    const HeadShape& shape = head.shape();
    const auto* const memory = dynamic_cast<const KnownCalibration*>(head.memory());
    const Calibration calibration = memory != nullptr ? memory->of(member)
                                    : statistics_     ? calibration_of(*statistics_, shape, member)
                                                      : calibration_of(head, member);
    const Matrix queries = later_queries(shape, calibration.mean);
    const Eigen::MatrixXd keys = head.keys().cast<double>();
    Eigen::VectorXd expected = rule_.largest_offset
                                   ? (keys * queries.cast<double>().transpose()).rowwise().maxCoeff().eval()
                                   : (keys * queries.cast<double>().colwise().mean().transpose()).eval();
    const Eigen::MatrixXd& magnitudes =
        head.once(Known::key_magnitudes, [&] { return frequency_magnitudes(*shape.rotary, head.keys()); });
    // Keys bring the scaling of their rotation along, queries before theirs do not.
    expected += shape.rotary->attention_scaling * (magnitudes * calibration.excess);

    const auto stays = [&](std::size_t n) {
      return rule_.pins_prompt && head.positions()[static_cast<int>(n)] < shape.prompt_length;
    };
    double mean = 0;
    double deviation = 1;
    if (rule_.normalize) {
      double count = 0;
      double sum = 0;
      double squares = 0;
      for (std::size_t n = 0; n < scores.size(); ++n) {
        if (stays(n)) continue;
        ++count;
        sum += expected(static_cast<Index>(n));
      }
      mean = count > 0 ? sum / count : 0;
      for (std::size_t n = 0; n < scores.size(); ++n) {
        if (!stays(n)) squares += std::pow(expected(static_cast<Index>(n)) - mean, 2);
      }
      deviation = std::max(count > 0 ? std::sqrt(squares / count) : 0, kLeastDeviation);
    }
    for (std::size_t n = 0; n < scores.size(); ++n) {
      scores[n] = stays(n) ? std::numeric_limits<float>::infinity()
                           : static_cast<float>((expected(static_cast<Index>(n)) - mean) / deviation);
    }
  }

  Rule rule_;
  std::shared_ptr<const QueryStatistics> statistics_;  // or null: the prompt's own
};

const MethodRegistration triattention([] {
  return Method{
      .name = "triattention",
      .summary =
          "Keeps what the prompt's mean query would attend to at distances to come, one vector per query head, and the "
          "prompt; as the authors' code does.",
      .source =
          "arXiv 2604.04921, section 4; github.com/WeianMao/triattention, methods/triattention.py, commit c3744ee",
      .parameters =
          {Parameter::choice("mode", {"per-head", "layer-head", "global"},
                             "who keeps the same: a KV head of all layers, nobody, or all")
               .of(Parameter::Step::share),
           Parameter::choice("share", {"max", "mean"}, "mode=layer-head: how a group's scores become one")
               .of(Parameter::Step::share),
           Parameter::choice("aggregation", {"mean", "max"}, "over the distances").of(Parameter::Step::score),
           Parameter::flag("normalize", true, "each query head's scores to mean 0 and deviation 1")
               .of(Parameter::Step::score),
           Parameter::choice("prompt", {"stays", "evicted"}, "the prompt is kept, or goes like all else")
               .of(Parameter::Step::protection),
           Parameter::flag("counted", true, "the prompt counts where the cache is found full: count_prompt_tokens")
               .of(Parameter::Step::schedule),
           Parameter::integer("interval", 128, 1, "tokens between evictions: divide_length")
               .of(Parameter::Step::schedule),
           Parameter::flag("slack", true,
                           "evicts interval rows above the capacity; false: from the capacity on, where the number of "
                           "all tokens is a multiple of the interval")
               .of(Parameter::Step::schedule),
           Parameter::file("statistics", "calibrates by other traces, as kvreplay query-statistics tells them")
               .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            const Mode mode = a.text("mode") == "per-head" ? Mode::per_head
                              : a.text("mode") == "global" ? Mode::global
                                                           : Mode::layer_head;
            const int interval = a.integer("interval");
            Schedule schedule{.prompt = Schedule::Prompt::wait, .counts_prompt = a.flag("counted")};
            if (a.flag("slack")) {
              schedule.slack = interval;
            } else {
              schedule.interval = interval;
              schedule.phase = Schedule::Phase::position;
              schedule.when_full = true;
            }
            const bool is_mean = mode == Mode::per_head || (mode == Mode::layer_head && a.text("share") == "mean");
            return Composition{
                .rule = std::make_shared<TriAttention>(
                    Rule{.mode = mode,
                         .largest_offset = a.text("aggregation") == "max",
                         .normalize = a.flag("normalize"),
                         .pins_prompt = a.text("prompt") == "stays"},
                    a.text("statistics").empty() ? nullptr
                                                 : std::make_shared<const QueryStatistics>(a.text("statistics"))),
                .granularity = mode == Mode::global ? Granularity::layer : Granularity::kv,
                .share = is_mean ? Share::mean : Share::max,
                .schedule = schedule,
                .across_layers = mode != Mode::layer_head};
          },
  };
});

}  // namespace
}  // namespace kvreplay
