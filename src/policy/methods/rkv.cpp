// R-KV (arXiv 2505.24133): long reasoning repeats itself, and what is said twice need be kept once.
//
// Score of position n, once per KV head: λ · attention − (1 − λ) · redundancy. Attention: logits of the last `window`
// queries on what is before them, the largest over the group's query heads, softmax over these positions, mean over the
// queries, then the maximum over `kernel` neighbours (paper, section 3.2). Redundancy: for every pair of cached keys
// their cosine, and of each row the newest key that is more than half alike is not counted, so that one of several
// survives; the mean over rows, softmax over positions (section 3.3). The window is always kept.
//
// It evicts every `interval` tokens, by the count of all tokens, and leaves survivors in the order of their scores. The
// maximum over neighbours, and which of two alike keys is the newest, go by rows: after the first eviction these are
// neighbours in score. order=position keeps the text's order.
//
// The paper has λ = 0.1 and its code 0.07; the paper spares the β newest of several alike, and its code one.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "base/softmax.h"
#include "policy/policy.h"
#include "policy/published_code.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

// Keys are alike from here on.
constexpr float kAlike = 0.5f;

// How attention of the window becomes one number per row.
struct Attention {
  int window = 8;
  int kernel = 7;

  auto operator<=>(const Attention&) const = default;
};

// Of the rows before the window: softmax of the group's largest logits, mean over the window, pooled.
std::vector<float> attention_of_group(const Head& head, const Attention& rule) {
  const Index window = rule.window;
  const Index rows = head.rows();
  const Index past = rows - window;
  const Matrix keys = head.keys().topRows(past);
  Matrix largest = Matrix::Constant(window, past, -std::numeric_limits<float>::infinity());
  for (int member = 0; member < head.shape().group_size; ++member) {
    Matrix logits = head.queries(member, rule.window) * keys.transpose();
    scale_logits(logits, head.shape().rule);
    largest = largest.cwiseMax(logits);
  }
  for (Index query = 0; query < window; ++query) softmax(largest.row(query), 0, past);
  const Eigen::RowVectorXf mean = largest.colwise().mean();
  std::vector<float> attention(mean.data(), mean.data() + past);
  pool(Spatial::maximum, rule.kernel, attention);
  return attention;
}

// Which entry of a row of cosines is not counted.
enum class Spared { newest, first };

// Of all rows: softmax of the mean cosine to all keys.
std::vector<float> redundancy_of(const Head& head, Spared spared) {
  Matrix directions = head.keys();
  for (Index n = 0; n < directions.rows(); ++n) directions.row(n) /= directions.row(n).norm() + 1e-8f;
  Matrix alike = directions * directions.transpose();
  alike.diagonal().setZero();
  for (Index n = 0; n < alike.rows(); ++n) {
    Index one = 0;
    if (spared == Spared::newest) {
      for (Index m = alike.cols() - 1; m > 0 && one == 0; --m) one = alike(n, m) > kAlike ? m : 0;
    }
    alike(n, one) = 0;
  }
  Matrix mean = alike.colwise().mean();
  softmax(mean.row(0), 0, mean.cols());
  return {mean.data(), mean.data() + mean.size()};
}

class RKV : public Ranking {
 public:
  RKV(Attention attention, double lambda, Spared spared) : attention_(attention), lambda_(lambda), spared_(spared) {}

  Protection protection() const override { return {.window = attention_.window}; }
  Requirements requirements() const override { return {.needs = {Need::window(attention_.window)}}; }

  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    const auto lambda = static_cast<float>(lambda_);
    // The same for all query heads of the group.
    const std::vector<float>& group = head.once(std::tuple(attention_, lambda_, spared_), [&] {
      std::vector<float> attention = attention_of_group(head, attention_);
      if (lambda_ < 1) {
        const std::vector<float> redundancy = redundancy_of(head, spared_);
        for (std::size_t n = 0; n < attention.size(); ++n) {
          attention[n] = lambda * attention[n] - (1 - lambda) * redundancy[n];
        }
      }
      return attention;
    });
    std::ranges::copy(group, scores.begin());
  }

 private:
  Attention attention_;
  double lambda_;
  Spared spared_;
};

// Evicts in the step whose token follows a multiple of the interval, a cache at its capacity as well.
Schedule schedule_of_code(int interval) {
  return {.interval = interval, .phase = Schedule::Phase::position, .remainder = 1, .when_full = true};
}

Parameter interval_parameter() {
  return Parameter::integer("interval", 128, 1, "tokens between evictions").of(Parameter::Step::schedule);
}

Parameter order_parameter() {
  return Parameter::choice("order", {"score", "position"}, "how survivors stand in the cache")
      .of(Parameter::Step::schedule);
}

RowOrder order_of(const Arguments& a) { return a.text("order") == "position" ? RowOrder::position : RowOrder::score; }

const MethodRegistration rkv([] {
  return Method{
      .name = "rkv",
      .summary =
          "Weighs attention against how alike a key is to the others, every so many tokens; as the authors' code does.",
      .source = "arXiv 2505.24133, section 3; github.com/Zefan-Cai/R-KV, r1_kv.py, commit d15c976",
      .parameters = {Parameter::integer("window", 8, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 7, 1, "positions that are pooled").of(Parameter::Step::space),
                     Parameter::real("lambda", 0.07, 0, 1, "weight of attention, the rest being redundancy's")
                         .of(Parameter::Step::score),
                     Parameter::choice("spared", {"newest", "first"},
                                       "which key of a row of cosines does not count: retain_direction last or first")
                         .of(Parameter::Step::score),
                     interval_parameter(), order_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<RKV>(Attention{a.integer("window"), a.integer("kernel")}, a.real("lambda"),
                                              a.text("spared") == "first" ? Spared::first : Spared::newest),
                .granularity = Granularity::kv,
                .share = Share::max,
                .schedule = schedule_of_code(a.integer("interval")),
                .order = order_of(a)};
          },
  };
});

constexpr const char* kRevision = "commit d15c976";

const MethodRegistration snapkv_of_repository([] {
  return Method{
      .name = "snapkv@r-kv",
      .summary =
          "R-KV's baseline: its attention alone, by its clock, survivors in the order of their scores. Logits become "
          "one per group before the softmax.",
      .source = "github.com/Zefan-Cai/R-KV, snapkv.py",
      .parameters = {Parameter::integer("window", 8, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 7, 1, "positions that are pooled").of(Parameter::Step::space),
                     interval_parameter(), order_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<RKV>(Attention{a.integer("window"), a.integer("kernel")}, 1, Spared::newest),
                .granularity = Granularity::kv,
                .share = Share::max,
                .schedule = schedule_of_code(a.integer("interval")),
                .order = order_of(a)};
          },
      .variant_of = "snapkv",
      .revision = kRevision,
  };
});

const MethodRegistration streamingllm_of_repository([] {
  return Method{
      .name = "streamingllm@r-kv",
      .summary = "R-KV's baseline: the first positions and the most recent ones, by its clock, where they stand.",
      .source = "github.com/Zefan-Cai/R-KV, streamingllm.py",
      .parameters =
          {Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection),
           interval_parameter()},
      .compose =
          [](const Arguments& a) {
            Composition policy = make_policy("streamingllm(sinks={sinks})", a);
            policy.schedule = schedule_of_code(a.integer("interval"));
            return policy;
          },
      .variant_of = "streamingllm",
      .revision = kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
