// G-KV (arXiv 2512.00504): attention of the last queries is local; what mattered at earlier evictions counts on,
// fading.
//
// Local score of a row before the window: softmax of the last `window` queries over the whole cache, each seeing no
// later row, the largest over the group's query heads, mean over the queries, divided by the largest of these rows. A
// row that was scored at the eviction before keeps max(α · old, local) (smooth=max), or their mean with weights α and 1
// − α; that is remembered with the rows, but not of the window's, which come as new (paper, section 3). The score that
// rows are chosen by is λ · that − (1 − λ) · redundancy: R-KV's, divided by its largest as well. Cosines of all keys,
// those of a key with itself not counted, nor of each key the newest one that is more than half alike; mean, softmax.
// The window is always kept, and rows stay in the text's order.
//
// It evicts at the prompt's end and every `interval` tokens after it, where the cache is above the capacity.
//
// rkv@g-kv is what the same code makes of R-KV: nothing is remembered, and nothing divided; attention is the largest of
// `kernel` neighbours.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "base/softmax.h"
#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

// Keys are alike from here on.
constexpr float kAlike = 0.5f;

struct Rule {
  int window;
  int kernel;
  double lambda;
  double alpha;
  bool largest;    // of the old score, faded, and the local one; or their weighted mean
  bool remembers;  // or every eviction begins anew, and terms are not divided by their largest

  auto operator<=>(const Rule&) const = default;
};

// Scores of rows at the eviction before: of the first rows of the cache, all others are new.
class EarlierScores : public RankingMemory {
 public:
  bool observes_attention() const override { return false; }
  void observe(const CacheStep& /*step*/) override {}

  void keep(std::span<const int> rows) override {
    // Rows that a sliding window leaves behind go without having been scored anew.
    const std::vector<float>& scores = found_.empty() ? scores_ : found_;
    std::vector<float> left;
    for (const int row : rows) {
      if (static_cast<std::size_t>(row) < scores.size()) left.push_back(scores[static_cast<std::size_t>(row)]);
    }
    scores_ = std::move(left);
    found_.clear();
  }

  std::span<const float> scores() const { return scores_; }

  // What rows are worth now, to be remembered of those that stay.
  void find(std::span<const float> scores) const { found_.assign(scores.begin(), scores.end()); }

 private:
  std::vector<float> scores_;
  mutable std::vector<float> found_;
};

// Of the rows before the window.
std::vector<float> local_attention(const Head& head, int window) {
  const Index rows = head.rows();
  const Index past = rows - window;
  Matrix largest = Matrix::Zero(window, past);
  for (int member = 0; member < head.shape().group_size; ++member) {
    Matrix weights = head.queries(member, window) * head.keys().transpose();
    scale_logits(weights, head.shape().rule);
    for (Index query = 0; query < window; ++query) {
      softmax(weights.row(query), 0, past + query + 1, head.shape().rule.sink(head.shape().query_head(member)));
    }
    largest = largest.cwiseMax(weights.leftCols(past));
  }
  const Eigen::RowVectorXf mean = largest.colwise().mean();
  return {mean.data(), mean.data() + mean.size()};
}

// The same of redundancy.
std::vector<float> redundancy_of(const Head& head, int window) {
  Matrix directions = head.keys();
  for (Index n = 0; n < directions.rows(); ++n) directions.row(n) /= directions.row(n).norm() + 1e-6f;
  Matrix alike = directions * directions.transpose();
  alike.diagonal().setZero();
  for (Index n = 0; n < alike.rows(); ++n) {
    Index newest = alike.cols() - 1;
    while (newest >= 0 && alike(n, newest) <= kAlike) --newest;
    if (newest >= 0) alike(n, newest) = 0;
  }
  Matrix mean = alike.colwise().mean();
  softmax(mean.row(0), 0, mean.cols());
  return {mean.data(), mean.data() + mean.size() - window};
}

void divide_by_largest(std::vector<float>& scores) {
  const float largest = *std::ranges::max_element(scores);
  if (largest == 0) return;
  for (float& score : scores) score /= largest;
}

class GKV : public Ranking {
 public:
  explicit GKV(Rule rule) : rule_(rule) {}

  Protection protection() const override { return {.window = rule_.window}; }
  Requirements requirements() const override { return {.needs = {Need::window(rule_.window)}}; }
  std::unique_ptr<RankingMemory> memory(const HeadShape& /*shape*/) const override {
    return rule_.remembers ? std::make_unique<EarlierScores>() : nullptr;
  }

  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    // The same for all query heads of the group.
    const std::vector<float>& group = head.once(rule_, [&] { return of_group(head); });
    std::ranges::copy(group, scores.begin());
  }

 private:
  std::vector<float> of_group(const Head& head) const {
    std::vector<float> scores = local_attention(head, rule_.window);
    if (rule_.remembers) divide_by_largest(scores);
    if (const auto* const memory = dynamic_cast<const EarlierScores*>(head.memory())) {
      const auto alpha = static_cast<float>(rule_.alpha);
      for (std::size_t n = 0; n < std::min(scores.size(), memory->scores().size()); ++n) {
        const float old = alpha * memory->scores()[n];
        scores[n] = rule_.largest ? std::max(old, scores[n]) : old + (1 - alpha) * scores[n];
      }
      memory->find(scores);
    }
    pool(Spatial::maximum, rule_.kernel, scores);
    if (rule_.lambda < 1) {
      const auto lambda = static_cast<float>(rule_.lambda);
      std::vector<float> redundancy = redundancy_of(head, rule_.window);
      if (rule_.remembers) divide_by_largest(redundancy);
      for (std::size_t n = 0; n < scores.size(); ++n) scores[n] = lambda * scores[n] - (1 - lambda) * redundancy[n];
    }
    return scores;
  }

  Rule rule_;
};

Composition compose(Rule rule, int interval) {
  return {.rule = std::make_shared<GKV>(rule),
          .granularity = Granularity::kv,
          .share = Share::max,
          .schedule = Schedule{.interval = interval, .starts_over = true}};
}

Parameter window_parameter() {
  return Parameter::integer("window", 16, 1, "observation window: last queries, always kept")
      .of(Parameter::Step::window);
}

Parameter interval_parameter() {
  return Parameter::integer("interval", 128, 1, "tokens between evictions: divide_length")
      .of(Parameter::Step::schedule);
}

constexpr const char* kCode = "github.com/microsoft/G-KV, gkv/model/compression/score_based.py";
constexpr const char* kRevision = "commit 6db3b2e";

const MethodRegistration gkv([] {
  return Method{
      .name = "gkv",
      .summary =
          "Weighs attention of the last queries, or what is left of that at earlier evictions, against how alike a key "
          "is "
          "to the others, every so many tokens; as the authors' code does.",
      .source = std::string("arXiv 2512.00504, section 3; ") + kCode + ", " + kRevision,
      .parameters =
          {window_parameter(),
           Parameter::odd_integer("kernel", 1, 1, "positions of which the largest score counts; 1: none but its own")
               .of(Parameter::Step::space),
           Parameter::real("lambda", 0.5, 0, 1, "weight of attention, the rest being redundancy's: mix_lambda")
               .of(Parameter::Step::score),
           Parameter::real("alpha", 0.8, 0, 1, "what is left of a score at the next eviction")
               .of(Parameter::Step::time),
           Parameter::choice("smooth", {"max", "mean"}, "how it and the local score become one: smooth_method")
               .of(Parameter::Step::time),
           interval_parameter()},
      .compose =
          [](const Arguments& a) {
            return compose({a.integer("window"), a.integer("kernel"), a.real("lambda"), a.real("alpha"),
                            a.text("smooth") == "max", true},
                           a.integer("interval"));
          },
  };
});

const MethodRegistration rkv_of_repository([] {
  return Method{
      .name = "rkv@g-kv",
      .summary =
          "G-KV's rewrite of R-KV: softmax per query head over the whole cache, then the largest of the group; no key "
          "is "
          "spared where none is alike; rows in the text's order; the interval counts from the prompt's end.",
      .source = kCode,
      .parameters = {window_parameter(),
                     Parameter::odd_integer("kernel", 5, 1, "positions that are pooled").of(Parameter::Step::space),
                     Parameter::real("lambda", 0.1, 0, 1, "weight of attention: mix_lambda").of(Parameter::Step::score),
                     interval_parameter()},
      .compose =
          [](const Arguments& a) {
            return compose({a.integer("window"), a.integer("kernel"), a.real("lambda"), 0, true, false},
                           a.integer("interval"));
          },
      .variant_of = "rkv",
      .revision = kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
