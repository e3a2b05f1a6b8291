// StreamingLLM (arXiv 2309.17453): attention sinks and the most recent positions.
//
// The first few tokens draw attention that has nowhere else to go; without them a window attention collapses (paper,
// section 3). Kept are `sinks` first positions and the last capacity − sinks. The cluster class of KVCache-Factory,
// which the ReST-KV release has too, keeps the first capacity − window and the last `window` positions instead; its
// run_longbench.py sets window to capacity − 4, which makes it the paper's again. Where a layer's sliding window has
// dropped first positions, recent ones take their places.
#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

class StreamingLLM : public Pattern {
 public:
  explicit StreamingLLM(int sinks) : sinks_(sinks) {}

  Protection protection() const override { return {.sinks = sinks_}; }

  std::vector<int> keep(const HeadShape& shape, int /*member*/, int capacity) const override {
    std::vector<int> kept;
    const int sinks = shape.held_of_first(sinks_);
    const int first_recent = std::max(sinks, shape.rows() - (capacity - sinks));
    for (int row = 0; row < sinks; ++row) kept.push_back(row);
    for (int row = first_recent; row < shape.rows(); ++row) kept.push_back(row);
    return kept;
  }

 private:
  int sinks_;
};

class FirstAndWindow : public Pattern {
 public:
  explicit FirstAndWindow(int window) : window_(window) {}

  Protection protection() const override { return {.window = window_}; }

  std::vector<int> keep(const HeadShape& shape, int member, int capacity) const override {
    return StreamingLLM(capacity - window_).keep(shape, member, capacity);
  }

 private:
  int window_;
};

const MethodRegistration streamingllm([] {
  return Method{
      .name = "streamingllm",
      .summary = "Keeps the first positions, which act as attention sinks, and the most recent ones.",
      .source = "arXiv 2309.17453, section 3",
      .parameters =
          {Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection)},
      .compose =
          [](const Arguments& a) { return Composition{.rule = std::make_shared<StreamingLLM>(a.integer("sinks"))}; },
  };
});

const MethodRegistration kvcache_factory_code([] {
  return Method{
      .name = "streamingllm@kvcache-factory",
      .summary =
          "Keeps the first capacity - window positions and the last window ones: as many sinks as the capacity "
          "leaves room for.",
      .source = "github.com/Zefan-Cai/KVCache-Factory, StreamingLLMKVCluster",
      .parameters = {Parameter::integer("window", 32, 0, "last positions that are kept").of(Parameter::Step::window),
                     kvcache_factory::heads_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<FirstAndWindow>(a.integer("window")),
                               .granularity = granularity_named(a.text("heads"))};
          },
      .variant_of = "streamingllm",
      .revision = kvcache_factory::kRevision,
  };
});

const MethodRegistration authors_code([] {
  return Method{
      .name = "streamingllm@streaming-llm",
      .summary =
          "Evicts after every token, so that a query sees one position more than the capacity; or makes room for "
          "`coming` tokens before they come, as its chat example does for every turn. Keys and queries are turned to "
          "their places in the cache.",
      .source = "github.com/mit-han-lab/streaming-llm, streaming_llm/kv_cache.py, pos_shift/modify_llama.py",
      .parameters = {Parameter::integer("sinks", 4, 0, "first positions that are always kept: start_size")
                         .of(Parameter::Step::protection),
                     Parameter::integer("coming", 0, 0,
                                        "tokens that evict_for_space() makes room for; 0: evicts after every one")
                         .of(Parameter::Step::schedule)},
      .compose =
          [](const Arguments& a) {
            Schedule schedule;
            if (a.integer("coming") > 0) {
              schedule = {.interval = a.integer("coming"), .attend = Schedule::Attend::before};
            }
            return Composition{.rule = std::make_shared<StreamingLLM>(a.integer("sinks")),
                               .schedule = schedule,
                               .row_positions = RowPositions::reindexed};
          },
      .variant_of = "streamingllm",
      .revision = "commit 2e50426",
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "streamingllm@kvpress",
      .summary = "4 sinks and the most recent positions, as in the paper; keys keep their positions.",
      .source = "github.com/NVIDIA/kvpress, streaming_llm_press.py",
      .parameters =
          {Parameter::integer("sinks", 4, 0, "first positions that are always kept").of(Parameter::Step::protection)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<StreamingLLM>(a.integer("sinks")),
                               .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "streamingllm",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
