// LazyEviction (arXiv 2506.15969): tokens of a train of thought matter again after a while, and each has its own while.
//
// A query uses a row where it pays it `threshold` or more. Of every row the longest interval between two of its uses so
// far is known, from when it came, and the time since the last. Rows whose time since then is longest in parts of their
// own interval go first: those that are overdue before those that may still be used. One that was never used again has
// an interval of one step. Rows go every `window` steps alone, so that a use can be waited for, and the last `window`
// rows always stay (paper, section 4).
//
// From the paper: its code could not be had. The paper combines the quotient with more; what is here is the order by
// the quotient alone, and the default window is not the paper's. A row is used where one of the query heads that share
// it uses it.
#include <algorithm>

#include "policy/policy.h"

namespace kvreplay {
namespace {

// Uses of each row of a KV head.
class Recurrence : public RankingMemory {
 public:
  explicit Recurrence(double threshold) : threshold_(static_cast<float>(threshold)) {}

  void begin(const Head& head) override {
    const int prompt = head.shape().next_position;
    for (int row = 0; row < head.rows(); ++row) add(head.positions()[row]);
    // Uses by any query head of the group: the largest attention counts.
    const auto dropped = static_cast<std::size_t>(head.entries().size() - head.rows());
    const Matrix keys = head.entry_keys();
    std::vector<std::vector<bool>> used(static_cast<std::size_t>(prompt), std::vector<bool>(rows_.size(), false));
    for (int member = 0; member < head.shape().group_size; ++member) {
      head.attend(
          member, head.queries(member, prompt), keys,
          [&](Index query) { return head.visible(static_cast<int>(query)); },
          [&](Index query, std::span<const float> weights) {
            for (std::size_t n = 0; n < rows_.size(); ++n) {
              if (weights[dropped + n] >= threshold_) used[static_cast<std::size_t>(query)][n] = true;
            }
          });
    }
    for (int query = 0; query < prompt; ++query) {
      for (std::size_t n = 0; n < rows_.size(); ++n) {
        if (used[static_cast<std::size_t>(query)][n]) use(rows_[n], query);
      }
    }
    now_ = prompt - 1;
  }

  void observe(const CacheStep& step) override {
    now_ = step.position;
    add(step.position);
    const Eigen::RowVectorXf largest = step.attention->colwise().maxCoeff();
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      if (largest(static_cast<Index>(n)) >= threshold_) use(rows_[n], step.position);
    }
  }

  void keep(std::span<const int> rows) override {
    std::vector<Row> left;
    for (const int row : rows) left.push_back(rows_[static_cast<std::size_t>(row)]);
    rows_ = std::move(left);
  }

  // The time since each row's last use in parts of its longest interval.
  void overdue(std::span<float> parts) const {
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      const Row& row = rows_[n];
      parts[n] = static_cast<float>(now_ - row.last_use) / static_cast<float>(std::max(row.longest_interval, 1));
    }
  }

 private:
  struct Row {
    int last_use;
    int longest_interval;
  };

  void add(int position) { rows_.push_back({position, 0}); }

  static void use(Row& row, int position) {
    row.longest_interval = std::max(row.longest_interval, position - row.last_use);
    row.last_use = position;
  }

  float threshold_;
  int now_ = 0;
  std::vector<Row> rows_;
};

class LazyEviction : public Ranking {
 public:
  LazyEviction(int window, double threshold) : window_(window), threshold_(threshold) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override { return {.needs = {{Need::Kind::all_queries}}}; }
  std::unique_ptr<RankingMemory> memory(const HeadShape& /*shape*/) const override {
    return std::make_unique<Recurrence>(threshold_);
  }

  // The same for all query heads of the group.
  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    if (const auto* const memory = dynamic_cast<const Recurrence*>(head.memory())) {
      memory->overdue(scores);
    } else {
      Recurrence prompt(threshold_);
      prompt.begin(head);
      prompt.overdue(scores);
    }
    for (float& score : scores) score = -score;
  }

 private:
  int window_;
  double threshold_;
};

const MethodRegistration lazyeviction([] {
  return Method{
      .name = "lazyeviction",
      .summary =
          "Drops what has not been used for longest, measured by the longest interval after which it was used again "
          "before, every so many tokens. From the paper: its code could not be had, and the default window is ours.",
      .source = "arXiv 2506.15969, section 4",
      .parameters = {Parameter::integer("window", 32, 1,
                                        "steps between evictions, and last positions that are always kept")
                         .of(Parameter::Step::window),
                     Parameter::real("threshold", 0.0001, 0, 1, "attention from which on a query uses a position")
                         .of(Parameter::Step::score)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<LazyEviction>(a.integer("window"), a.real("threshold")),
                               .granularity = Granularity::kv,
                               .schedule = Schedule{.interval = a.integer("window"), .starts_over = true}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
