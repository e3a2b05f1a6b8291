// TOVA, token omission via attention (arXiv 2401.06104): the cache as a bounded multi-state RNN.
//
// Score of position n: the attention of the last query, averaged over all heads of the layer, so that the layer has
// one kept set (paper, section 4). The paper and its code do not force the last position to stay; kvpress does, and
// last=true follows it.
#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

class Tova : public Ranking {
 public:
  explicit Tova(bool keep_last) : keep_last_(keep_last) {}

  Protection protection() const override { return {.window = keep_last_ ? 1 : 0}; }
  Requirements requirements() const override { return {.needs = {Need::window(1)}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    std::ranges::copy(head.attention(member, 0), scores.begin());
  }

 private:
  bool keep_last_;
};

const MethodRegistration tova([] {
  return Method{
      .name = "tova",
      .summary = "Keeps what the last query attends to, averaged over the heads: one set for the whole layer.",
      .source = "arXiv 2401.06104, section 4",
      .parameters = {Parameter::flag("last", false, "always keep the last position, as kvpress does")
                         .of(Parameter::Step::protection)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Tova>(a.flag("last")),
                               .granularity = Granularity::layer,
                               .share = Share::mean};
          },
  };
});

const MethodRegistration authors_code([] {
  return Method{
      .name = "tova@tova",
      .summary =
          "Evicts after the prompt and after every token. The newest token is a candidate like any other and is often "
          "dropped at once.",
      .source = "github.com/schwartz-lab-NLP/TOVA, src/tova_cache.py",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            return Composition{.rule = std::make_shared<Tova>(false),
                               .granularity = Granularity::layer,
                               .share = Share::mean,
                               .schedule = Schedule{}};
          },
      .variant_of = "tova",
      .revision = "commit 9c7d09b",
  };
});

const MethodRegistration kvpress_decoding_code([] {
  return Method{
      .name = "tova@kvpress-decoding",
      .summary = kvpress::decoding("Mean attention of the newest token, which is always kept."),
      .source = "github.com/NVIDIA/kvpress, decoding_press.py over tova_press.py",
      .parameters = {kvpress::interval_parameter()},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Tova>(true),
                               .granularity = Granularity::layer,
                               .share = Share::mean,
                               .schedule = kvpress::decoding_schedule(a.integer("interval")),
                               .order = RowOrder::protected_first};
          },
      .variant_of = "tova",
      .revision = kvpress::kRevision,
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "tova@kvpress",
      .summary = kvpress::with_attention_path("The last position is always kept; otherwise the paper's."),
      .source = "github.com/NVIDIA/kvpress, tova_press.py",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            return Composition{.rule = std::make_shared<Tova>(true),
                               .granularity = Granularity::layer,
                               .share = Share::mean,
                               .share_rule = kvpress::positions_of_share};
          },
      .variant_of = "tova",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
