// RPC, reasoning path compression (arXiv 2505.13866): a train of thought leaves behind what it builds on; of every
// stretch that was generated a fraction stays.
//
// Once the prompt, which always stays, is followed by so many tokens that c · T new ones stand before the last `recent`
// ones, those with the highest scores are kept, T more than the time before, and the recent ones: T in c · T tokens
// stay for ever, and the cache grows with the text. Score of a generated row before the recent ones: softmax over these
// rows alone, of the last queries, summed over them, mean over all heads of the layer, which keep the same, averaged
// over `kernel` neighbours (paper, section 4; the authors' code).
//
// capacity is what the first compression leaves of what was generated: T + recent. The paper's P = 1,024, c = 4, R = 32
// are a capacity of 288.
//
// The code asks R queries, but that of the step itself twice and so R − 1 different ones, and so does this. What it
// calls aggregation=none does not reach the choice. Its file for Llama lacks an attribute and stops; that for Qwen is
// followed.
#include <algorithm>

#include "base/softmax.h"
#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

class RPC : public Ranking {
 public:
  RPC(int recent, int kernel) : recent_(recent), kernel_(kernel) {}

  Protection protection() const override { return {.window = recent_}; }
  Requirements requirements() const override { return {.needs = {Need::window(queries())}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const HeadShape& shape = head.shape();
    const Index first = shape.held_of_first(shape.prompt_length);
    const Index count = head.rows() - recent_ - first;
    std::ranges::fill(scores, 0.0f);
    if (count <= 0) return;
    Matrix weights = head.queries(member, queries()) * head.keys().middleRows(first, count).transpose();
    scale_logits(weights, shape.rule);
    for (Index query = 0; query < weights.rows(); ++query) softmax(weights.row(query), 0, count);
    Eigen::RowVectorXf sum = weights.colwise().sum();
    if (recent_ > 1) sum += weights.row(weights.rows() - 1);
    const std::span<float> generated = scores.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    std::copy_n(sum.data(), sum.size(), generated.begin());
    pool(Spatial::average, kernel_, generated);
  }

 private:
  int queries() const { return std::max(1, recent_ - 1); }

  int recent_;
  int kernel_;
};

const MethodRegistration rpc([] {
  return Method{
      .name = "rpc",
      .summary =
          "Keeps the prompt and, of every stretch that was generated, the fraction that the last queries attend to "
          "most, "
          "so that the cache grows; as the authors' code does. The capacity is what the first stretch becomes.",
      .source =
          "arXiv 2505.13866, section 4; github.com/jiwonsong-dev/ReasoningPathCompression, rpc/rpc_utils.py, commit "
          "00e64b7",
      .parameters =
          {Parameter::integer("recent", 32, 1, "last rows, whose queries are asked and which are kept: R")
               .of(Parameter::Step::window),
           Parameter::integer("compression", 4, 2, "tokens of which one stays: c").of(Parameter::Step::schedule),
           Parameter::odd_integer("kernel", 7, 1, "neighbours that are averaged").of(Parameter::Step::space)},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<RPC>(a.integer("recent"), a.integer("kernel")),
                .granularity = Granularity::layer,
                .share = Share::mean,
                .schedule = Schedule{.prompt = Schedule::Prompt::wait, .compression = a.integer("compression")},
                .pin = {.prompt = true, .counted = false}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
