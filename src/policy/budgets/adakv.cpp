// AdaKV's budget (arXiv 2407.11550): heads whose attention is spread out get more, concentrated ones less.
//
// The best heads × ranked capacity positions of the whole layer are counted per head (paper, algorithm 1); a head gets
// its count times (1 − floor) plus floor times the ranked capacity (rounded down), the sum rounded to even. With
// normalize=true a head's scores are first weighed by the share of its mass that its own best ranked-capacity positions
// hold, as in the authors' code. Rounding can make a layer keep a few positions more or fewer than was granted; what
// was used is reported. At a capacity of exactly the prompt everything is kept, as by every policy; the authors' code
// rounds there too and can leave out a position of each head.
//
// across=query lets query heads compete, as the authors' code for repeated KV heads does: at granularity query each
// gets its own capacity, at granularity kv a KV head gets the mean of its group's. across=kv lets KV heads compete with
// the scores that their groups share, as kvpress does; query heads then get their KV head's capacity.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

class AdaKV : public Budget {
 public:
  AdaKV(double floor, bool normalize, bool across_query_heads)
      : floor_(floor), normalize_(normalize), across_query_heads_(across_query_heads) {}

  bool needs_scores() const override { return true; }

  std::vector<int> allocate(const BudgetRequest& request) const override {
    if (request.granularity == Granularity::layer) return {request.capacity};
    std::vector<int> capacities =
        compete(across_query_heads_ ? request.query_head_scores : request.kv_head_scores, request);
    const bool query_sets = request.granularity == Granularity::query;
    if (query_sets == across_query_heads_) return capacities;
    const int group = request.num_query_heads / request.num_kv_heads;
    std::vector<int> result;
    if (query_sets) {
      for (const int capacity : capacities) result.insert(result.end(), static_cast<std::size_t>(group), capacity);
    } else {
      for (auto first = capacities.begin(); first != capacities.end(); first += group) {
        result.push_back(static_cast<int>(std::lround(std::accumulate(first, first + group, 0.0) / group)));
      }
    }
    return result;
  }

 private:
  std::vector<int> compete(const std::vector<std::span<const float>>& scores, const BudgetRequest& request) const {
    const auto first = static_cast<std::size_t>(request.protection.sinks);
    const auto is_protected = static_cast<std::size_t>(request.protection.count());
    const auto ranked = static_cast<std::size_t>(request.capacity) - is_protected;
    struct Entry {
      float score;
      std::uint32_t head;
    };
    std::vector<Entry> best;  // each head's own best suffice: no head can get more than all of them
    const std::size_t heads = scores.size();
    const std::size_t wanted = heads * ranked;
    best.reserve(heads * std::min(wanted, static_cast<std::size_t>(request.rows) - is_protected));
    for (std::uint32_t head = 0; head < heads; ++head) {
      const std::size_t rankable = scores[head].size() - is_protected;
      std::vector<float> own(scores[head].begin() + static_cast<std::ptrdiff_t>(first),
                             scores[head].begin() + static_cast<std::ptrdiff_t>(first + rankable));
      const std::size_t contenders = std::min(wanted, rankable);
      std::ranges::partial_sort(own, own.begin() + static_cast<std::ptrdiff_t>(contenders), std::greater<>());
      const auto sum = [&own](std::size_t count) {
        return std::accumulate(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(count), 0.0);
      };
      const double mass = sum(rankable);
      const auto weight = static_cast<float>(normalize_ && mass > 0 ? sum(std::min(ranked, rankable)) / mass : 1.0);
      for (std::size_t i = 0; i < contenders; ++i) best.push_back({own[i] * weight, head});
    }
    const std::size_t places = std::min(wanted, best.size());
    // Among equal scores the lower head wins.
    std::ranges::nth_element(
        best, best.begin() + static_cast<std::ptrdiff_t>(places),
        [](const Entry& a, const Entry& b) { return a.score != b.score ? a.score > b.score : a.head < b.head; });
    std::vector<int> won(heads, 0);
    for (std::size_t i = 0; i < places; ++i) ++won[best[i].head];
    const double floor_positions = std::floor(static_cast<double>(ranked) * floor_);
    std::vector<int> capacities;
    for (const int count : won) {
      const auto share = static_cast<float>(count * (1 - floor_) + floor_positions);
      capacities.push_back(request.protection.count() + static_cast<int>(std::nearbyint(share)));
    }
    return capacities;
  }

  double floor_;
  bool normalize_;
  bool across_query_heads_;
};

// kvpress lets KV heads compete with the scores their groups share. Each keeps a share of the capacity by its own
// ranking, its window first; the rest of the layer's positions goes to the best of all that is left.
class AdaKVOfKvpress : public Budget {
 public:
  explicit AdaKVOfKvpress(double safeguard) : safeguard_(safeguard) {}

  bool needs_scores() const override { return true; }

  void check(const BudgetRequest& request) const override {
    if (request.granularity == Granularity::kv) return;
    throw Error("adakv@kvpress divides positions among KV heads; leave out --heads");
  }

  std::vector<int> allocate(const BudgetRequest& request) const override {
    const int protected_count = request.protection.count();
    const int safe = std::max(protected_count, static_cast<int>(request.capacity * safeguard_));
    struct Entry {
      float score;
      std::uint32_t head;
    };
    std::vector<Entry> contenders;
    contenders.reserve(request.kv_head_scores.size() *
                       static_cast<std::size_t>(request.rows - std::min(safe, request.rows)));
    for (std::uint32_t head = 0; head < request.kv_head_scores.size(); ++head) {
      const std::span<const float> scores = request.kv_head_scores[head];
      const std::span<const float> ranked = scores.subspan(static_cast<std::size_t>(request.protection.sinks),
                                                           scores.size() - static_cast<std::size_t>(protected_count));
      std::vector<float> own(ranked.begin(), ranked.end());
      std::ranges::sort(own, std::greater<>());
      for (auto rank = static_cast<std::size_t>(safe - protected_count); rank < own.size(); ++rank) {
        contenders.push_back({own[rank], head});
      }
    }
    const std::size_t places =
        std::min(request.kv_head_scores.size() * static_cast<std::size_t>(request.capacity - safe), contenders.size());
    // Among equal scores the lower head wins.
    std::ranges::nth_element(
        contenders, contenders.begin() + static_cast<std::ptrdiff_t>(places),
        [](const Entry& a, const Entry& b) { return a.score != b.score ? a.score > b.score : a.head < b.head; });
    std::vector<int> capacities(request.kv_head_scores.size(), safe);
    for (std::size_t i = 0; i < places; ++i) ++capacities[contenders[i].head];
    return capacities;
  }

 private:
  double safeguard_;
};

std::vector<Parameter> budget_parameters() {
  return {Parameter::real("floor", 0.2, 0, 1, "share of the ranked capacity that every head gets at least")
              .of(Parameter::Step::budget),
          Parameter::flag("normalize", true, "weigh a head's scores by how concentrated they are")
              .of(Parameter::Step::budget),
          Parameter::choice("across", {"query", "kv"}, "which heads compete").of(Parameter::Step::budget)};
}

const MethodRegistration adakv_budget([] {
  return Method{
      .name = "adakv",
      .step = Method::Step::budget,
      .summary = "Divides a layer's positions among its heads by where the layer's best scores are, above a floor.",
      .source = "arXiv 2407.11550, algorithm 1",
      .parameters = budget_parameters(),
      .compose =
          [](const Arguments& a) {
            return Composition{
                .budget = std::make_shared<AdaKV>(a.real("floor"), a.flag("normalize"), a.text("across") == "query")};
          },
  };
});

const MethodRegistration adakv_preset([] {
  return Method{
      .name = "adakv",
      .summary = "SnapKV's scores under an adaptive budget over the heads: short for snapkv+adakv.",
      .source = "arXiv 2407.11550",
      .parameters = {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 5, 1, "positions that are pooled").of(Parameter::Step::space),
                     Parameter::choice("pooling", {"avg", "max"}, "how they are pooled").of(Parameter::Step::space),
                     budget_parameters()[0], budget_parameters()[1], budget_parameters()[2]},
      .compose =
          [](const Arguments& a) {
            return make_policy(
                "snapkv(window={window},kernel={kernel},pooling={pooling})"
                "+adakv(floor={floor},normalize={normalize},across={across})",
                a);
          },
  };
});

const MethodRegistration rest_kv_code([] {
  return Method{
      .name = "adakv@rest-kv",
      .summary = "Query heads compete, each with a kept set of its own; maximum pooling over 5 positions by default.",
      .source = "github.com/an-yongqi/rest-kv, AdaKVCluster, after github.com/FFY0/AdaKV",
      .parameters = {budget_parameters()[0], budget_parameters()[1]},
      .compose =
          [](const Arguments& a) {
            Composition policy = make_policy("adakv(pooling=max,floor={floor},normalize={normalize})", a);
            policy.granularity = Granularity::query;
            return policy;
          },
      .variant_of = "adakv",
      .revision = rest_kv::kRevision,
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "adakv@kvpress",
      .summary =
          "KV heads compete with the scores their groups share, not normalized; a share of the capacity is safe for "
          "each. Over SnapKV with kvpress's window of 64. kvpress refuses it on its eager path; under sdpa it scores "
          "as "
          "snapkv@kvpress where that path agrees with the model.",
      .source = "github.com/NVIDIA/kvpress, adakv_press.py",
      .parameters = {Parameter::real("safeguard", 0.2, 0, 1, "share of the capacity that every head keeps")
                         .of(Parameter::Step::budget)},
      .compose =
          [](const Arguments& a) {
            Composition policy = make_policy("snapkv@kvpress");
            policy.budget = std::make_shared<AdaKVOfKvpress>(a.real("safeguard"));
            return policy;
          },
      .variant_of = "adakv",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
