// The heavy hitters of cold-compress (github.com/AnswerDotAI/cold-compress, which follows Scissorhands,
// arXiv 2305.17118): of a full cache, the row with the least mean attention makes room for the token that comes.
//
// Score of a row: the attention that the group's query heads paid to it, their mean, averaged over the steps since it
// came (history=1) or over the last `history` of them. A row of the prompt begins with the mean over the prompt's
// queries that see it. It is a mean over what was seen, not a sum: young rows are not behind. The first `global`
// positions and the last `recent` count as 1, which nothing exceeds. A row goes before the token's own query attends,
// so that no query sees more than the capacity.
//
// A prompt above the capacity is cut first, by the mean attention of its last 16 queries, averaged over 5 neighbours
// (at the borders over those that are there); the last 16 and the first `global` positions stay.
#include <algorithm>
#include <deque>

#include "policy/policy.h"

namespace kvreplay {
namespace {

constexpr int kPromptWindow = 16;
constexpr int kPromptKernel = 5;
constexpr float kProtected = 1.0f;

// Positions that count as 1 while tokens come.
bool is_recent_or_global(const Head& head, int row, int global, int recent) {
  const int position = head.positions()[row];
  return position < global || position >= head.shape().next_position - recent;
}

// What cuts a prompt.
void score_prompt(const Head& head, int member, int global, std::span<float> scores) {
  std::vector<double> mean(scores.size(), 0.0);
  for (int age = 0; age < kPromptWindow; ++age) {
    const std::span<const float> attention = head.attention(member, age);
    for (std::size_t n = 0; n < mean.size(); ++n) mean[n] += static_cast<double>(attention[n]) / kPromptWindow;
  }
  const int rows = head.rows();
  for (int n = 0; n < rows; ++n) {
    const int first = std::max(0, n - kPromptKernel / 2);
    const int end = std::min(rows, n + kPromptKernel / 2 + 1);
    double sum = 0;
    for (int m = first; m < end; ++m) sum += mean[static_cast<std::size_t>(m)];
    const bool stays = n < head.shape().held_of_first(global) || n >= rows - kPromptWindow;
    scores[static_cast<std::size_t>(n)] = stays ? 2 * kProtected : static_cast<float>(sum / (end - first));
  }
}

// Mean attention of the group per row, over all steps or the last of them.
class MeanAttention : public RankingMemory {
 public:
  explicit MeanAttention(int history) : history_(history) {}

  void begin(const Head& head) override {
    const int group = head.shape().group_size;
    rows_.assign(static_cast<std::size_t>(head.rows()), {});
    for (int member = 0; member < group; ++member) {
      const std::vector<float>& sums = head.accumulated_attention(member);
      for (std::size_t n = 0; n < rows_.size(); ++n) {
        const int observers = head.shape().next_position - head.positions()[static_cast<int>(n)];
        rows_[n].resize(1, 0.0);
        rows_[n].front() += static_cast<double>(sums[n]) / observers / group;
      }
    }
    counts_.assign(rows_.size(), 1);
  }

  void observe(const CacheStep& step) override {
    rows_.emplace_back();
    counts_.push_back(0);
    const Eigen::RowVectorXd mean = step.attention->cast<double>().colwise().mean();
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      const double attention = mean(static_cast<Index>(n));
      ++counts_[n];
      if (history_ == 1 && !rows_[n].empty()) {
        rows_[n].front() += attention;
        continue;
      }
      rows_[n].push_back(attention);
      if (static_cast<int>(rows_[n].size()) > history_) rows_[n].pop_front();
    }
  }

  void keep(std::span<const int> rows) override {
    std::vector<std::deque<double>> left;
    std::vector<int> counts;
    for (const int row : rows) {
      left.push_back(std::move(rows_[static_cast<std::size_t>(row)]));
      counts.push_back(counts_[static_cast<std::size_t>(row)]);
    }
    rows_ = std::move(left);
    counts_ = std::move(counts);
  }

  float of(std::size_t row) const {
    double sum = 0;
    for (const double attention : rows_[row]) sum += attention;
    return static_cast<float>(sum / (history_ == 1 ? counts_[row] : static_cast<int>(rows_[row].size())));
  }

 private:
  int history_;
  std::vector<std::deque<double>> rows_;  // what each received: with a history of 1 the sum
  std::vector<int> counts_;               // observations
};

class HeavyHitter : public Ranking {
 public:
  HeavyHitter(int global, int recent, int history) : global_(global), recent_(recent), history_(history) {}

  Requirements requirements() const override {
    return {.needs = {Need::window(kPromptWindow), {Need::Kind::accumulated_attention}}};
  }

  std::unique_ptr<RankingMemory> memory(const HeadShape& /*shape*/) const override {
    return std::make_unique<MeanAttention>(history_);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const auto* const memory = dynamic_cast<const MeanAttention*>(head.memory());
    if (memory == nullptr) return score_prompt(head, member, global_, scores);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const bool stays = is_recent_or_global(head, static_cast<int>(n), global_, recent_);
      scores[n] = stays ? kProtected : memory->of(n);
    }
  }

 private:
  int global_;
  int recent_;
  int history_;
};

// A prompt is cut by the same rule.
class LongestKey : public Ranking {
 public:
  LongestKey(int global, int recent) : global_(global), recent_(recent) {}

  void score(const Head& head, int /*member*/, std::span<float> scores) const override {
    for (std::size_t n = 0; n < scores.size(); ++n) {
      const bool stays = is_recent_or_global(head, static_cast<int>(n), global_, recent_);
      scores[n] = stays ? kProtected : -head.keys().row(static_cast<Index>(n)).norm();
    }
  }

 private:
  int global_;
  int recent_;
};

Composition composition(std::shared_ptr<const Ranking> rule) {
  return {.rule = std::move(rule),
          .granularity = Granularity::kv,
          .share = Share::mean,
          .schedule = Schedule{.attend = Schedule::Attend::before, .cuts_prompt_apart = true}};
}

Parameter global_parameter() {
  return Parameter::integer("global", 4, 0, "first positions that count as 1: global_tokens")
      .of(Parameter::Step::protection);
}

Parameter recent_parameter() {
  return Parameter::integer("recent", 10, 0, "last positions that count as 1: recent_window")
      .of(Parameter::Step::window);
}

constexpr const char* kRevision = "commit 15bb300";

const MethodRegistration heavy_hitter([] {
  return Method{
      .name = "cold-compress",
      .summary = "Of a full cache the row with the least mean attention goes, before the token that comes attends.",
      .source = "github.com/AnswerDotAI/cold-compress, cache.py, heavy_hitter, commit 15bb300",
      .parameters = {global_parameter(), recent_parameter(),
                     Parameter::integer("history", 1, 1, "steps that are averaged; 1: all: history_window_size")
                         .of(Parameter::Step::time)},
      .compose =
          [](const Arguments& a) {
            return composition(
                std::make_shared<HeavyHitter>(a.integer("global"), a.integer("recent"), a.integer("history")));
          },
  };
});

const MethodRegistration longest_key([] {
  return Method{
      .name = "knorm@cold-compress",
      .summary = "Of a full cache the row with the longest key goes, before the token that comes attends.",
      .source = "github.com/AnswerDotAI/cold-compress, cache.py, l2",
      .parameters = {global_parameter(), recent_parameter()},
      .compose =
          [](const Arguments& a) {
            return composition(std::make_shared<LongestKey>(a.integer("global"), a.integer("recent")));
          },
      .variant_of = "knorm",
      .revision = kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
