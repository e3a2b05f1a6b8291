// Scissorhands (arXiv 2305.17118): what was important stays important, and what no query of late found so may go.
//
// A row is unimportant to a query that pays it less than an equal share, 1/n of a cache of n rows. Of the last
// `history` queries those are counted that a row was unimportant to, and the rows with the fewest stay; so do the last
// `recent` ones (paper, algorithm 2). Several go at once: the cache grows to `burst` times the capacity before it is
// cut again, which is the paper's budget, half of which it drops.
//
// From the paper: the authors have published no code. Not here is its division of the budget between layers. Where
// query heads share a kept set their counts are averaged, of which the paper says nothing.
#include <deque>

#include "policy/policy.h"

namespace kvreplay {
namespace {

// Which rows were unimportant to each of the last queries, of every query head of the group.
class Unimportant : public RankingMemory {
 public:
  Unimportant(int group_size, int history) : history_(history), members_(static_cast<std::size_t>(group_size)) {}

  void begin(const Head& head) override {
    const int prompt = head.shape().next_position;
    std::vector<float> weights(static_cast<std::size_t>(head.rows()));
    for (std::size_t member = 0; member < members_.size(); ++member) {
      for (int age = std::min(history_, prompt) - 1; age >= 0; --age) {
        head.copy_attention(static_cast<int>(member), age, weights);
        const int position = prompt - 1 - age;
        const auto [first, end] = head.visible(position);
        const int rows = head.positions().count_before(position + 1);
        add(members_[member], std::span(weights).first(static_cast<std::size_t>(rows)),
            static_cast<float>(end - first));
      }
    }
  }

  void observe(const CacheStep& step) override {
    const auto rows = static_cast<std::size_t>(step.attention->cols());
    for (std::size_t member = 0; member < members_.size(); ++member) {
      const float* const weights = step.attention->data() + member * rows;
      add(members_[member], {weights, rows}, static_cast<float>(rows));
    }
  }

  void keep(std::span<const int> rows) override {
    for (auto& queries : members_) {
      for (std::vector<bool>& query : queries) {
        std::vector<bool> left;
        for (const int row : rows) {
          if (static_cast<std::size_t>(row) < query.size()) left.push_back(query[static_cast<std::size_t>(row)]);
        }
        query = std::move(left);
      }
    }
  }

  // To how many queries each row was unimportant.
  void count(int member, std::span<float> counts) const {
    std::ranges::fill(counts, 0.0f);
    for (const std::vector<bool>& query : members_[static_cast<std::size_t>(member)]) {
      for (std::size_t n = 0; n < query.size(); ++n) counts[n] += query[n] ? 1.0f : 0.0f;
    }
  }

 private:
  void add(std::deque<std::vector<bool>>& queries, std::span<const float> weights, float cached) const {
    if (static_cast<int>(queries.size()) == history_) queries.pop_front();
    std::vector<bool>& query = queries.emplace_back();
    for (const float weight : weights) query.push_back(weight < 1 / cached);
  }

  int history_;
  std::vector<std::deque<std::vector<bool>>> members_;  // [member][query], oldest first: a bit per row that it saw
};

class Scissorhands : public Ranking {
 public:
  Scissorhands(int history, int recent) : history_(history), recent_(recent) {}

  Protection protection() const override { return {.window = recent_}; }
  Requirements requirements() const override { return {.needs = {{Need::Kind::all_queries}}}; }
  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<Unimportant>(shape.group_size, history_);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    if (const auto* const memory = dynamic_cast<const Unimportant*>(head.memory())) {
      memory->count(member, scores);
    } else {
      Unimportant prompt(head.shape().group_size, history_);
      prompt.begin(head);
      prompt.count(member, scores);
    }
    for (float& score : scores) score = -score;
  }

 private:
  int history_;
  int recent_;
};

const MethodRegistration scissorhands([] {
  return Method{
      .name = "scissorhands",
      .summary =
          "Drops what the last queries paid less than an equal share most often, several at once. From the paper: "
          "there is no published code, and the defaults are ours.",
      .source = "arXiv 2305.17118, algorithm 2",
      .parameters =
          {Parameter::integer("history", 400, 1, "last queries that are asked").of(Parameter::Step::time),
           Parameter::integer("recent", 10, 0, "last positions that are always kept").of(Parameter::Step::window),
           Parameter::real("burst", 2, 1, 100, "grows to so many times the capacity").of(Parameter::Step::schedule)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Scissorhands>(a.integer("history"), a.integer("recent")),
                               .schedule = Schedule{.burst = a.real("burst")}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
