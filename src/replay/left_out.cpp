#include "replay/left_out.h"

#include <fmt/format.h>

#include <algorithm>

namespace kvreplay {

void SettingNames::add(const std::string& policy, const std::string& capacity) {
  if (policies_.empty() || policies_.back().first != policy) policies_.emplace_back(policy, "");
  std::string& capacities = policies_.back().second;
  if (!capacity.empty()) capacities += (capacities.empty() ? " at " : ", ") + capacity;
  ++count_;
}

std::string SettingNames::text() const {
  // A grid may hold thousands.
  constexpr std::size_t kTold = 4;
  std::string text;
  for (std::size_t i = 0; i < std::min(policies_.size(), kTold); ++i) {
    text += (i == 0 ? "" : "; ") + policies_[i].first + policies_[i].second;
  }
  const std::size_t rest = policies_.size() - std::min(policies_.size(), kTold);
  if (rest > 0) text += fmt::format(" and {} more {}", rest, rest == 1 ? "policy" : "policies");
  return text;
}

namespace {

std::string with_cure(const std::string& reason, const std::string& cure) {
  return cure.empty() ? reason : fmt::format("{}; {}", reason, cure);
}

}  // namespace

void LeftOut::add(const std::string& policy, const std::string& capacity, const Obstacle& obstacle) {
  if (first_.empty()) first_ = with_cure(obstacle.reason, obstacle.cure);
  const std::string& reason = obstacle.shared.empty() ? obstacle.reason : obstacle.shared;
  const auto [place, is_new] = place_.try_emplace(reason, groups_.size());
  if (is_new) groups_.push_back({obstacle, {}});
  Group& group = groups_[place->second];
  if (obstacle.amount > group.obstacle.amount) group.obstacle = obstacle;
  group.settings.add(policy, capacity);
}

std::vector<std::string> LeftOut::notes() const {
  std::vector<std::string> notes;
  for (const auto& [obstacle, settings] : groups_) {
    const bool one = settings.count() == 1 || obstacle.shared.empty();
    const std::string reason = with_cure(one ? obstacle.reason : obstacle.shared, obstacle.cure);
    const std::string who = settings.text();
    // A reason that begins with the policy says who it is.
    notes.push_back(reason.starts_with(who + ' ') ? fmt::format("left out: {}", reason)
                                                  : fmt::format("left out: {}: {}", who, reason));
  }
  return notes;
}

}  // namespace kvreplay
