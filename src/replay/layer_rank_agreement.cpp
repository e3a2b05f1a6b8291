#include "replay/layer_rank_agreement.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <utility>

namespace kvreplay {

class LayerRankAgreement::Importance {
 public:
  explicit Importance(const Head& head) : head_(head), members_(static_cast<std::size_t>(head.shape().group_size)) {}

  const RankedValues& of_member(int member) {
    std::optional<RankedValues>& ranked = members_[static_cast<std::size_t>(member)];
    if (!ranked) ranked.emplace(head_.evaluation_attention(member));
    return *ranked;
  }

  const RankedValues& of_group(Share share) {
    const auto found = groups_.find(share);
    if (found != groups_.end()) return found->second;
    const Matrix importance = shared(share);
    return groups_.emplace(share, RankedValues(row_of(importance, 0))).first->second;
  }

  // Step 3, as of any policy's scores: [1, R].
  Matrix shared(Share share) const {
    Matrix rows(static_cast<Index>(members_.size()), head_.rows());
    for (Index member = 0; member < rows.rows(); ++member) {
      std::ranges::copy(head_.evaluation_attention(static_cast<int>(member)), row_of(rows, member).begin());
    }
    Matrix shared;
    combine(rows, share, shared);
    return shared;
  }

 private:
  const Head& head_;
  std::vector<std::optional<RankedValues>> members_;
  std::map<Share, RankedValues> groups_;
};

LayerRankAgreement::LayerRankAgreement(std::span<const Setting> settings, std::vector<bool> is_compared,
                                       const HeadShape& shape)
    : settings_(settings),
      is_compared_(std::move(is_compared)),
      shape_(shape),
      heads_(static_cast<std::size_t>(shape.num_kv_heads)),
      numbers_(settings.size()) {
  const auto kv_heads = static_cast<std::size_t>(shape.num_kv_heads);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (!is_compared_[i]) continue;
    const auto query_heads = kv_heads * static_cast<std::size_t>(shape.group_size);
    for (const auto& [measure, calculate] : formulas<RankCorrelation>()) {
      numbers_[i][measure].assign(query_heads, std::numeric_limits<float>::quiet_NaN());
    }
    if (!settings[i].goes_by_ranks(shape)) continue;
    if (settings[i].granularity == Granularity::layer) importance_[settings[i].share].resize(kv_heads);
  }
}

LayerRankAgreement::~LayerRankAgreement() = default;

void LayerRankAgreement::begin_head(const Head& head) {
  const auto kv_head = static_cast<std::size_t>(head.shape().kv_head);
  heads_[kv_head] = std::make_unique<Importance>(head);
  for (auto& [share, groups] : importance_) groups[kv_head] = heads_[kv_head]->shared(share);
}

void LayerRankAgreement::end_head(const Head& head) { heads_[static_cast<std::size_t>(head.shape().kv_head)].reset(); }

void LayerRankAgreement::head_scored(std::size_t setting, const Head& head, const HeadScores& scores, bool as_before) {
  if (!is_compared_[setting]) return;
  const Setting& s = settings_[setting];
  const int group = shape_.group_size;
  const int first = head.shape().kv_head * group;
  if (as_before) {
    for (const auto& [measure, calculate] : formulas<RankCorrelation>()) {
      std::copy_n(numbers_[setting - 1][measure].begin() + first, group, numbers_[setting][measure].begin() + first);
    }
    return;
  }
  Importance& importance = *heads_[static_cast<std::size_t>(head.shape().kv_head)];
  RankCorrelation agreement;
  for (int member = 0; member < group; ++member) {
    if (s.granularity == Granularity::query) {
      agreement = agreement_of(setting, importance.of_member(member), row_of(scores.query, member));
    } else if (member == 0) {
      agreement = agreement_of(setting, importance.of_group(s.share), row_of(scores.shared, 0));
    }
    put(setting, first + member, agreement);
  }
}

void LayerRankAgreement::layer_scored(std::size_t setting, std::span<const float> scores) {
  if (!is_compared_[setting]) return;
  const Share share = settings_[setting].share;
  const std::vector<Matrix>& groups = importance_.at(share);
  Matrix rows(static_cast<Index>(groups.size()), shape_.rows());
  for (Index i = 0; i < rows.rows(); ++i) rows.row(i) = groups[static_cast<std::size_t>(i)];
  Matrix importance;
  combine(rows, share, importance);
  const RankCorrelation agreement = agreement_of(setting, RankedValues(row_of(std::as_const(importance), 0)), scores);
  for (int head = 0; head < shape_.num_kv_heads * shape_.group_size; ++head) put(setting, head, agreement);
}

RankCorrelation LayerRankAgreement::agreement_of(std::size_t setting, const RankedValues& importance,
                                                 std::span<const float> scores) const {
  const Protection protection = settings_[setting].policy->protection().held_by(shape_);
  return importance.correlation(scores, protection.sinks, shape_.rows() - protection.window);
}

void LayerRankAgreement::put(std::size_t setting, int query_head, const RankCorrelation& agreement) {
  for (const auto& [measure, calculate] : formulas<RankCorrelation>()) {
    numbers_[setting][measure][static_cast<std::size_t>(query_head)] = static_cast<float>(calculate(agreement));
  }
}

Index LayerRankAgreement::memory_of_head(const HeadShape& shape, Index tokens) {
  // The oracle's importance of the group and what it shares, their orders, and the keys while it is taken.
  const Index prompt = shape.next_position;
  const Index rows = shape.group_size + 1;
  return (rows + shape.group_size) * prompt * static_cast<Index>(sizeof(float)) + rows * RankedValues::memory(prompt) +
         std::max(Head::evaluation_memory(shape, tokens), RankedValues::working_memory(prompt));
}

Index LayerRankAgreement::memory_of_layer(const HeadShape& shape, std::span<const Setting> settings) {
  std::set<Share> shares;
  for (const Setting& setting : settings) {
    if (setting.granularity == Granularity::layer) shares.insert(setting.share);
  }
  return static_cast<Index>(shares.size()) * shape.num_kv_heads * shape.rows() * static_cast<Index>(sizeof(float));
}

Index LayerRankAgreement::memory_of_setting(const HeadShape& shape) {
  return (2 * shape.num_kv_heads + 6) * shape.rows() * static_cast<Index>(sizeof(float)) +
         RankedValues::memory(shape.rows()) + RankedValues::working_memory(shape.rows());
}

}  // namespace kvreplay
