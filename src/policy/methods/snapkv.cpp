// SnapKV (arXiv 2404.14469): the end of the prompt knows what the answer will need.
//
// Score of position n: the attention of the last `window` queries, averaged (the authors sum, which ranks alike), then
// pooled over `kernel` neighbours so that what surrounds an important token stays with it (paper, section 4, listing
// 1). Paper and code pool with an average or a maximum; beyond the edges the average counts zeros, as avg_pool1d does.
// The window itself is always kept.
#include <algorithm>
#include <numeric>

#include "policy/policy.h"
#include "policy/published_code.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

class SnapKV : public Ranking {
 public:
  SnapKV(int window, int kernel, Spatial pooling) : window_(window), kernel_(kernel), pooling_(pooling) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}, .combinations = {mean()}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.combined_attention(member, mean()).attention, scores.begin());
  }

  void smooth(const Head& head, int /*member*/, int /*capacity*/, std::span<float> scores) const override {
    pool_past(head, scores);
  }

 protected:
  void pool_past(const Head& head, std::span<float> scores) const {
    pool(pooling_, kernel_, before_window(head, scores, window_));
  }

 private:
  WindowCombination mean() const { return {.weights = temporal_weights(Temporal::mean, 0, window_)}; }

  int window_;
  int kernel_;
  Spatial pooling_;
};

// Pools what the heads that share a kept set agree on. An average is the same before and after the mean of heads, a
// maximum is not.
class SnapKVPooledLast : public SnapKV {
 public:
  using SnapKV::SnapKV;

  void smooth(const Head&, int, int, std::span<float>) const override {}
  void refine(const Head& head, std::span<const int>, int, std::span<float> scores) const override {
    pool_past(head, scores);
  }
};

std::vector<Parameter> parameters(int window, int kernel, std::vector<std::string> poolings) {
  return {Parameter::integer("window", window, 1, "observation window: last queries, always kept")
              .of(Parameter::Step::window),
          Parameter::odd_integer("kernel", kernel, 1, "positions that are pooled").of(Parameter::Step::space),
          Parameter::choice("pooling", std::move(poolings), "how they are pooled").of(Parameter::Step::space)};
}

Composition compose(const Arguments& a) {
  return {.rule = std::make_shared<SnapKV>(a.integer("window"), a.integer("kernel"), spatial_named(a.text("pooling")))};
}

Composition compose_per_query_head(const Arguments& a) {
  Composition policy = compose(a);
  policy.granularity = Granularity::query;
  return policy;
}

const MethodRegistration snapkv([] {
  return Method{
      .name = "snapkv",
      .summary = "Keeps what the observation window attends to on average, pooled over neighbouring positions.",
      .source = "arXiv 2404.14469, section 4",
      .parameters = parameters(32, 5, {"avg", "max"}),
      .compose = compose,
      .baseline = Method::Baseline::usual,
  };
});

// What tells implementations apart: whether query heads of a group share a set, and the defaults of window and pooling.
const MethodRegistration rest_kv_code([] {
  return Method{
      .name = "snapkv@rest-kv",
      .summary =
          "One kept set per query head, since keys and values are repeated for the group first; the code of "
          "FasterDecoding/SnapKV does the same with the same defaults.",
      .source = "github.com/an-yongqi/rest-kv, SnapKVCluster",
      .parameters = parameters(32, 5, {"avg", "max"}),
      .compose = compose_per_query_head,
      .variant_of = "snapkv",
      .revision = std::string(rest_kv::kRevision) + "; FasterDecoding/SnapKV e216ddc (2025-07-10)",
  };
});

const MethodRegistration kvcache_factory_code([] {
  return Method{
      .name = "snapkv@kvcache-factory",
      .summary =
          "The code of snapkv@rest-kv as KVCache-Factory's run_longbench.py calls it: a window of 8 and maximum "
          "pooling over 7 positions. Since ad51c4e (2026-07-01) also per KV head: the group's scores become one "
          "before they are pooled.",
      .source = "github.com/Zefan-Cai/KVCache-Factory, SnapKVCluster and run_longbench.py",
      .parameters =
          [] {
            std::vector<Parameter> all = parameters(8, 7, {"max", "avg"});
            all.push_back(kvcache_factory::heads_parameter());
            all.push_back(kvcache_factory::share_parameter());
            return all;
          }(),
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<SnapKVPooledLast>(a.integer("window"), a.integer("kernel"),
                                                                          spatial_named(a.text("pooling"))),
                               .granularity = granularity_named(a.text("heads")),
                               .share = share_named(a.text("share"))};
          },
      .variant_of = "snapkv",
      .revision = kvcache_factory::kRevision,
  };
});

// What kvpress' DecodingPress makes of it. On the eager path one row of attention is at hand, the newest token's,
// whatever the window. Under sdpa the window's queries are computed anew, and all of them are turned to the newest
// token's position; the causal mask within the window goes by rows.
class SnapKVWhileDecoding : public Ranking {
 public:
  SnapKVWhileDecoding(int window, int kernel, bool eager) : window_(window), kernel_(kernel), eager_(eager) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override {
    if (eager_) return {.needs = {Need::window(1)}};
    return {.needs = {Need::window(window_), {Need::Kind::rotary}}};
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    if (eager_) {
      std::ranges::copy(head.attention(member, 0), scores.begin());
      return;
    }
    const int newest = head.shape().next_position - 1;
    Matrix queries = head.queries(member, window_);
    std::vector<int> positions(static_cast<std::size_t>(window_));
    std::iota(positions.begin(), positions.end(), newest - window_ + 1);
    unrotate(*head.shape().rotary, positions, queries);
    std::ranges::fill(positions, newest);
    rotate(*head.shape().rotary, positions, queries);
    std::vector<double> sums(scores.size(), 0.0);
    head.attend(
        member, queries, head.keys(),
        [&](Index query) { return std::pair(Index{0}, head.rows() - window_ + query + 1); },
        [&](Index /*query*/, std::span<const float> weights) {
          for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(weights[n]);
        });
    for (std::size_t n = 0; n < sums.size(); ++n) scores[n] = static_cast<float>(sums[n] / window_);
  }

  void smooth(const Head& head, int /*member*/, int /*capacity*/, std::span<float> scores) const override {
    pool(Spatial::average, kernel_, scores.first(static_cast<std::size_t>(head.rows() - window_)));
  }

 private:
  int window_;
  int kernel_;
  bool eager_;
};

const MethodRegistration kvpress_decoding_code([] {
  return Method{
      .name = "snapkv@kvpress-decoding",
      .summary = kvpress::decoding(
          "attention=sdpa turns all of the window's queries to the newest token's position, attention=eager has the "
          "newest token's attention alone; the two choose differently. Pools over neighbours in score."),
      .source = "github.com/NVIDIA/kvpress, decoding_press.py over snapkv_press.py",
      .parameters = {Parameter::integer("window", 64, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 5, 1, "positions that are pooled").of(Parameter::Step::space),
                     Parameter::choice("attention", {"sdpa", "eager"}, "the model's attention implementation")
                         .of(Parameter::Step::score),
                     kvpress::interval_parameter()},
      .compose =
          [](const Arguments& a) {
            std::vector<std::string> notes;
            if (a.integer("interval") <= a.integer("window")) {
              notes.push_back(
                  "snapkv@kvpress-decoding: kvpress itself fails where the interval is no longer than the window");
            }
            return Composition{.rule = std::make_shared<SnapKVWhileDecoding>(a.integer("window"), a.integer("kernel"),
                                                                             a.text("attention") == "eager"),
                               .granularity = Granularity::kv,
                               .share = Share::mean,
                               .schedule = kvpress::decoding_schedule(a.integer("interval")),
                               .order = RowOrder::protected_first,
                               .notes = std::move(notes)};
          },
      .variant_of = "snapkv",
      .revision = kvpress::kRevision,
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "snapkv@kvpress",
      .summary = kvpress::with_attention_path(
          "One kept set per KV head: scores are averaged over the group after pooling. The window is 64 by default, "
          "and pooling is always an average."),
      .source = "github.com/NVIDIA/kvpress, snapkv_press.py",
      .parameters = {Parameter::integer("window", 64, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 5, 1, "positions that are pooled").of(Parameter::Step::space)},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<SnapKV>(a.integer("window"), a.integer("kernel"), Spatial::average),
                .granularity = Granularity::kv,
                .share = Share::mean,
                .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "snapkv",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
