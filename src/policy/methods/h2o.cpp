// H2O, heavy-hitter oracle (arXiv 2306.14048): a few positions collect most of the attention.
//
// Score of position n: the attention it received from all prompt queries, Σ_t A[t, n] (paper, section 4); the last
// `window` positions are kept beside the heavy hitters. The paper splits the capacity evenly between the two; the
// codes that people run fix the window, and so do we.
//
// mask=causal is the paper's sum. mask=window is what KVCache-Factory computed in the prefill until 9f9aa2e: only the
// last `window` queries are masked causally, so that earlier queries also look at later keys.
#include <algorithm>
#include <limits>
#include <utility>

#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

// Σ over all queries of attention per row, where only the last `window` queries are masked, causally: every earlier
// one looks at all entries, those after it too.
std::vector<float> attention_masked_in_window(const Head& head, int member, int window) {
  const int queries = head.shape().next_position;
  const CachePositions& entries = head.entries();
  const auto first_row = static_cast<std::size_t>(entries.size() - head.rows());
  std::vector<double> sums(static_cast<std::size_t>(head.rows()), 0.0);
  head.attend(
      member, head.queries(member, queries), head.entry_keys(),
      [&](Index query) {
        const auto position = static_cast<int>(query);
        const Index end = position >= queries - window ? entries.count_before(position + 1) : entries.size();
        return std::pair(Index{0}, end);
      },
      [&](Index /*query*/, std::span<const float> weights) {
        for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(weights[first_row + n]);
      });
  return {sums.begin(), sums.end()};
}

// Σ over the queries so far of attention per row, kept while rows come and go.
class AttentionSums : public RankingMemory {
 public:
  explicit AttentionSums(int group_size) : sums_(static_cast<std::size_t>(group_size)) {}

  void begin(const Head& head) override {
    for (std::size_t member = 0; member < sums_.size(); ++member) {
      const std::vector<float>& prompt = head.accumulated_attention(static_cast<int>(member));
      sums_[member].assign(prompt.begin(), prompt.end());
    }
  }

  void observe(const CacheStep& step) override {
    for (std::size_t member = 0; member < sums_.size(); ++member) {
      std::vector<double>& sums = sums_[member];
      sums.resize(static_cast<std::size_t>(step.attention->cols()), 0.0);
      for (std::size_t n = 0; n < sums.size(); ++n) {
        sums[n] += static_cast<double>((*step.attention)(static_cast<Index>(member), static_cast<Index>(n)));
      }
    }
  }

  void keep(std::span<const int> rows) override {
    for (std::vector<double>& sums : sums_) {
      std::vector<double> left;
      for (const int row : rows) left.push_back(sums[static_cast<std::size_t>(row)]);
      sums = std::move(left);
    }
  }

  std::vector<float> of(int member) const {
    const std::vector<double>& sums = sums_[static_cast<std::size_t>(member)];
    return {sums.begin(), sums.end()};
  }

 protected:
  std::vector<std::vector<double>> sums_;  // [member][row]
};

class H2O : public Ranking {
 public:
  H2O(int window, bool causal, bool normalize) : window_(window), causal_(causal), normalize_(normalize) {}

  Protection protection() const override { return {.window = window_}; }

  Requirements requirements() const override {
    return {.needs = {{causal_ ? Need::Kind::accumulated_attention : Need::Kind::all_queries}}};
  }

  // Token by token no query sees what comes after it, and the mask is causal by itself.
  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<AttentionSums>(shape.group_size);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const auto* const memory = dynamic_cast<const AttentionSums*>(head.memory());
    const std::vector<float> sums = memory != nullptr ? memory->of(member)
                                    : causal_         ? head.accumulated_attention(member)
                                                      : attention_masked_in_window(head, member, window_);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const int position = head.positions()[static_cast<int>(n)];
      const auto observers =
          static_cast<float>(head.shape().next_position - position);  // queries that can see this key
      scores[n] = normalize_ ? sums[n] / observers : sums[n];
    }
  }

 private:
  int window_;
  bool causal_;
  bool normalize_;
};

const MethodRegistration h2o([] {
  return Method{
      .name = "h2o",
      .summary = "Keeps the positions that received most attention from all prompt queries, and the most recent ones.",
      .source = "arXiv 2306.14048, section 4",
      .parameters = {Parameter::integer("window", 32, 0, "last positions that are always kept; 0: none")
                         .of(Parameter::Step::window),
                     Parameter::choice("mask", {"causal", "window"},
                                       "causal: as the paper; window: only the window's queries are masked, as "
                                       "KVCache-Factory before 9f9aa2e")
                         .of(Parameter::Step::score),
                     Parameter::flag("normalize", false,
                                     "divide by the number of queries that can see the key, as kvpress does")
                         .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<H2O>(a.integer("window"), a.text("mask") == "causal", a.flag("normalize"))};
          },
  };
});

// The authors' code has three classes that keep different sets: this one, which drops rows, the same with rows that
// take their places as positions, and one that masks.
Composition real_drop(const Arguments& a, std::optional<RowPositions> positions) {
  return {.rule = std::make_shared<H2O>(a.integer("recent"), true, false),
          .granularity = Granularity::query,
          .schedule = Schedule{},
          .row_positions = positions};
}

Parameter recent_parameter() {
  return Parameter::integer("recent", 32, 0, "last positions that are kept: recent_size").of(Parameter::Step::window);
}

constexpr const char* kAuthorsRevision = "commit ac75c2a";

const MethodRegistration authors_code([] {
  return Method{
      .name = "h2o@h2o",
      .summary =
          "Drops rows after every token: sums of attention, a token's own to itself included, go with the rows; one "
          "set per query head. A query sees one position more than the capacity. The code runs without grouped "
          "queries alone.",
      .source = "github.com/FMInference/H2O, utils_real_drop/modify_llama.py",
      .parameters = {recent_parameter()},
      .compose = [](const Arguments& a) { return real_drop(a, std::nullopt); },
      .variant_of = "h2o",
      .revision = kAuthorsRevision,
  };
});

// Sums of the code that masks: those of hidden rows are 0 from then on, but that of the one which is hidden because it
// is neither recent nor a candidate, the last `recent` rows' first.
class MaskedAttentionSums : public AttentionSums {
 public:
  MaskedAttentionSums(int group_size, int recent) : AttentionSums(group_size), recent_(recent) {}

  void mask(std::span<const int> rows) override {
    for (std::vector<double>& sums : sums_) {
      std::vector<double> left(sums.size(), 0.0);
      for (const int row : rows) left[static_cast<std::size_t>(row)] = sums[static_cast<std::size_t>(row)];
      std::copy(sums.end() - std::min(recent_, std::ssize(sums)), sums.end(),
                left.end() - std::min(recent_, std::ssize(sums)));
      sums = std::move(left);
    }
  }

 private:
  std::ptrdiff_t recent_;
};

class MaskingH2O : public Ranking {
 public:
  explicit MaskingH2O(int recent) : recent_(recent) {}

  // The coming token is the last of the recent ones, and the row that they leave behind for it is not among the others
  // yet.
  Protection protection() const override { return {.window = recent_ - 1}; }
  Requirements requirements() const override { return {.needs = {{Need::Kind::accumulated_attention}}}; }
  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<MaskedAttentionSums>(shape.group_size, recent_);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const auto* const memory = dynamic_cast<const MaskedAttentionSums*>(head.memory());
    std::ranges::copy(memory != nullptr ? memory->of(member) : head.accumulated_attention(member), scores.begin());
    const int left_behind = head.rows() - recent_;
    if (left_behind >= 0) scores[static_cast<std::size_t>(left_behind)] = -std::numeric_limits<float>::infinity();
  }

 private:
  int recent_;
};

const MethodRegistration authors_masking_code([] {
  return Method{
      .name = "h2o@h2o-mask",
      .summary =
          "Masks, per query head: hidden rows stay and may return, and memory does not fall. The coming query sees the "
          "heavy hitters and the recent positions, itself included. The row that leaves the recent ones is hidden for "
          "one step before it may be a heavy hitter; all others that are hidden lose their sums. The code's budgets "
          "are shares of the prompt, heavy_ratio and recent_ratio; the capacity is both together.",
      .source = "github.com/FMInference/H2O, utils_hh/modify_llama.py",
      .parameters = {Parameter::integer("recent", 32, 1, "recent positions: int(recent_ratio · prompt)")
                         .of(Parameter::Step::window)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<MaskingH2O>(a.integer("recent")),
                               .granularity = Granularity::query,
                               // Nothing is masked before there is one row more than the capacity.
                               .schedule = Schedule{.slack = 2, .attend = Schedule::Attend::before},
                               .masks = true,
                               .notes = {"h2o@h2o-mask: hides positions and drops none, so that memory does not fall; "
                                         "what it keeps, and what that costs, is what queries see"}};
          },
      .variant_of = "h2o",
      .revision = kAuthorsRevision,
  };
});

const MethodRegistration authors_rolled_code([] {
  return Method{
      .name = "h2o@h2o-rolled",
      .summary = "h2o@h2o with keys and queries turned to their places in the cache, which changes the sums.",
      .source = "github.com/FMInference/H2O, utils_real_drop/modify_llama.py, the streaming class",
      .parameters = {recent_parameter()},
      .compose = [](const Arguments& a) { return real_drop(a, RowPositions::reindexed); },
      .variant_of = "h2o",
      .revision = kAuthorsRevision,
  };
});

// What the name of KVCache-Factory's variant meant before its code changed.
constexpr const char* kBeforeCausalMask = "h2o@kvcache-factory-before-9f9aa2e";

const MethodRegistration kvcache_factory_code([] {
  return Method{
      .name = "h2o@kvcache-factory",
      .summary =
          "Masks every query causally, since 9f9aa2e (2026-06-22). One kept set per query head, or, since ad51c4e "
          "(2026-07-01), per KV head. The window is that of its classes; its run_longbench.py sets 8.",
      .source = "github.com/Zefan-Cai/KVCache-Factory, H2OKVCluster",
      .parameters =
          {Parameter::integer("window", 32, 0, "last positions that are always kept").of(Parameter::Step::window),
           kvcache_factory::heads_parameter(), kvcache_factory::share_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<H2O>(a.integer("window"), true, false),
                .granularity = granularity_named(a.text("heads")),
                .share = share_named(a.text("share")),
                .notes = {std::string("h2o@kvcache-factory: describes ") + kvcache_factory::kRevision +
                          ", whose mask is causal; its code before that change is " + kBeforeCausalMask}};
          },
      .variant_of = "h2o",
      .revision = kvcache_factory::kRevision,
  };
});

const MethodRegistration kvcache_factory_before([] {
  return Method{
      .name = kBeforeCausalMask,
      .summary =
          "Masks only the window's queries causally, so that early queries count attention to keys after them; one "
          "kept set per query head. The ReST-KV release (a8bb112) has the same code.",
      .source = "github.com/Zefan-Cai/KVCache-Factory, H2OKVCluster",
      .parameters =
          {Parameter::integer("window", 32, 0, "last positions that are always kept").of(Parameter::Step::window)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<H2O>(a.integer("window"), false, false),
                               .granularity = Granularity::query};
          },
      .variant_of = "h2o",
      .revision = "commit 360b1ff (2026-06-22), the last one before 9f9aa2e",
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "h2o@kvpress",
      .summary =
          "ObservedAttention: causal, divided by the number of queries that see a key, averaged over the group; "
          "protects no recent positions. Runs on the eager path alone.",
      .source = "github.com/NVIDIA/kvpress, observed_attention_press.py",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            return Composition{.rule = std::make_shared<H2O>(0, true, true),
                               .granularity = Granularity::kv,
                               .share = Share::mean,
                               .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "h2o",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
