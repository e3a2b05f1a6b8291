// MorphKV (arXiv 2503.00979): what the last tokens attend to is kept, anew at every step.
//
// Score of a row before the window: softmax over these rows of the logits of each of the last `window` queries, summed
// over the queries (fusion=sum) or their maximum (fusion=max); logits of a group's query heads are added up before the
// softmax (the authors' code). The last `window` rows are always kept. A token joins the cache, rows make room for it,
// then its query attends, which has no say: the capacity counts the token, the code's max_capacity does not. With
// burst > 1 the cache grows to so many times the capacity first. The prompt is not evicted at its end.
//
// Where a group has several query heads the code keeps, of each query head's logits, the columns that this head alone
// would choose, and of the cache the rows that the group chooses. From the second eviction on logits and rows are of
// different tokens, and go on being added place by place; so they are here. The code also masks each query head by its
// own choice; here all of a group see the cache.
#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>

#include "base/softmax.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

enum class Fusion { sum, max };

// Of logits [queries, R], what their first `past` columns are worth.
std::vector<float> fused(const Matrix& logits, Index past, Fusion fusion) {
  std::vector<float> scores(static_cast<std::size_t>(past), 0.0f);
  for (Index query = 0; query < logits.rows(); ++query) {
    Matrix weights = logits.row(query).head(past);
    softmax(weights.row(0), 0, past);
    for (Index n = 0; n < past; ++n) {
      float& score = scores[static_cast<std::size_t>(n)];
      score = fusion == Fusion::sum ? score + weights(0, n) : std::max(score, weights(0, n));
    }
  }
  return scores;
}

// Logits of the last queries per row of the cache, of every query head of the group. Their differences are all that
// counts, and those of attention's logarithms are the same.
class LastLogits : public RankingMemory {
 public:
  LastLogits(const HeadShape& shape, int window, Fusion fusion)
      : window_(window), fusion_(fusion), rule_(shape.rule), members_(static_cast<std::size_t>(shape.group_size)) {}

  void begin(const Head& head) override {
    for (int row = 0; row < head.rows(); ++row) positions_.push_back(head.positions()[row]);
    for (std::size_t member = 0; member < members_.size(); ++member) {
      for (int age = window_ - 1; age >= 0; --age) {
        add(members_[member], head.attention(static_cast<int>(member), age));
      }
    }
  }

  void observe(const CacheStep& step) override {
    positions_.push_back(step.position);
    for (std::size_t member = 0; member < members_.size(); ++member) {
      const float* row = step.attention->data() + static_cast<Index>(member) * step.attention->cols();
      add(members_[member], {row, static_cast<std::size_t>(step.attention->cols())});
    }
  }

  void keep(std::span<const int> rows) override {
    // What a sliding window leaves behind is gone for all, and nobody chose it.
    std::vector<int> held;
    for (const int row : rows) held.push_back(positions_[static_cast<std::size_t>(row)]);
    const auto first_visible = static_cast<int>(rule_.first_visible(positions_.back() + 1));
    const bool is_chosen = std::ranges::any_of(positions_, [&](int position) {
      return position >= first_visible && !std::ranges::binary_search(held, position);
    });
    positions_ = std::move(held);
    for (std::deque<std::vector<float>>& queries : members_) {
      std::vector<int> own(rows.begin(), rows.end());
      if (members_.size() > 1 && is_chosen) {
        // What this query head would keep by itself.
        const Matrix logits = as_matrix({&queries, 1});
        const std::vector<float> scores = fused(logits.topRows(window_), logits.cols() - window_ - 1, fusion_);
        own = select_top(scores, {}, static_cast<int>(rows.size()) - window_ - 1);
        for (int row = static_cast<int>(scores.size()); row < static_cast<int>(logits.cols()); ++row)
          own.push_back(row);
      }
      const std::size_t rows_before = longest(queries);
      for (std::vector<float>& query : queries) {
        query.resize(rows_before, 0.0f);
        std::vector<float> left;
        for (const int row : own) left.push_back(query[static_cast<std::size_t>(row)]);
        query = std::move(left);
      }
    }
  }

  // Added up over the group: [window, R].
  Matrix of_group() const { return as_matrix(members_).bottomRows(window_); }

 private:
  static std::size_t longest(const std::deque<std::vector<float>>& queries) {
    std::size_t most = 0;
    for (const std::vector<float>& query : queries) most = std::max(most, query.size());
    return most;
  }

  // The window's queries and, until another comes, the one that left it: what a query head would keep by itself is
  // found when the newest has come already.
  void add(std::deque<std::vector<float>>& queries, std::span<const float> attention) const {
    if (static_cast<int>(queries.size()) > window_) queries.pop_front();
    std::vector<float>& query = queries.emplace_back();
    for (const float weight : attention) {
      query.push_back(std::log(std::max(weight, std::numeric_limits<float>::min())));
    }
  }

  // Rows that came after a query are never looked at in its logits.
  static Matrix as_matrix(std::span<const std::deque<std::vector<float>>> members) {
    const std::deque<std::vector<float>>& first = members.front();
    Matrix sum = Matrix::Zero(static_cast<Index>(first.size()), static_cast<Index>(longest(first)));
    for (const std::deque<std::vector<float>>& queries : members) {
      for (std::size_t query = 0; query < queries.size(); ++query) {
        for (std::size_t n = 0; n < queries[query].size(); ++n) {
          sum(static_cast<Index>(query), static_cast<Index>(n)) += queries[query][n];
        }
      }
    }
    return sum;
  }

  int window_;
  Fusion fusion_;
  AttentionRule rule_;
  std::vector<int> positions_;                           // of the rows
  std::vector<std::deque<std::vector<float>>> members_;  // [member][query], oldest first: a logit per row
};

class MorphKV : public Ranking {
 public:
  MorphKV(int window, Fusion fusion) : window_(window), fusion_(fusion) {}

  // The newest row, of the token whose query has no say, beside the window.
  Protection protection() const override { return {.window = window_ + 1}; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}}; }
  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<LastLogits>(shape, window_, fusion_);
  }

  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    const std::vector<float>& group = head.once(std::pair(window_, fusion_), [&] {
      const Index past = head.rows() - protection().window;
      const auto* const memory = dynamic_cast<const LastLogits*>(head.memory());
      if (memory != nullptr) return fused(memory->of_group(), past, fusion_);
      LastLogits prompt(head.shape(), window_, fusion_);
      prompt.begin(head);
      return fused(prompt.of_group(), past, fusion_);
    });
    std::ranges::copy(group, scores.begin());
  }

 private:
  int window_;
  Fusion fusion_;
};

const MethodRegistration morphkv([] {
  return Method{
      .name = "morphkv",
      .summary = "Keeps what the last queries attend to, chosen anew before every token; as the authors' code does.",
      .source = "arXiv 2503.00979, section 3; github.com/ghadiaravi13/MorphKV, morphkv/morph_cache.py, commit 8903d2a",
      .parameters = {Parameter::integer("window", 32, 1, "last queries that are asked, and rows that are always kept")
                         .of(Parameter::Step::window),
                     Parameter::choice("fusion", {"sum", "max"}, "how the queries' attention becomes one")
                         .of(Parameter::Step::time),
                     Parameter::real("burst", 1, 1, 100, "grows to so many times the capacity: evict_after")
                         .of(Parameter::Step::schedule)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<MorphKV>(a.integer("window"),
                                                                 a.text("fusion") == "max" ? Fusion::max : Fusion::sum),
                               .granularity = Granularity::kv,
                               .share = Share::max,
                               .schedule = Schedule{.attend = Schedule::Attend::before,
                                                    .prompt = Schedule::Prompt::wait,
                                                    .burst = a.real("burst"),
                                                    .joins_first = true}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
