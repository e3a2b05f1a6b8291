#include "replay/residency.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>

#include "base/error.h"

namespace kvreplay {

Residency::Residency(const std::vector<int>& positions, const std::vector<int>& until, int eviction_position) {
  if (positions.size() != until.size()) {
    throw Error(fmt::format("{} positions have {} last queries", positions.size(), until.size()));
  }
  if (!std::ranges::is_sorted(positions, std::less_equal<>()) || (!positions.empty() && positions.front() < 0)) {
    throw Error("positions do not ascend from 0 or later");
  }
  for (std::size_t i = 0; i < positions.size(); ++i) {
    const int position = positions[i];
    const bool is_kept = position < eviction_position;
    if (until[i] < (is_kept ? eviction_position : position)) {
      throw Error(fmt::format("position {} is listed up to the query at {}, which is before {}", position, until[i],
                              is_kept ? "the first after the eviction" : "its own"));
    }
    if (!is_kept && until[i] == kNever) continue;  // as if it were not listed
    positions_.push_back(position);
    until_.push_back(until[i]);
    num_kept_ += is_kept ? 1 : 0;
  }
  if (std::ranges::all_of(until_, [](int last) { return last == kNever; })) until_.clear();
}

std::vector<int> Residency::cached_at(int position, int eviction_position, int first_visible) const {
  std::vector<int> cached;
  const auto is_seen = [&](std::size_t i) { return until_.empty() || until_[i] >= position; };
  for (std::size_t i = 0; i < num_kept_; ++i) {
    if (positions_[i] >= first_visible && is_seen(i)) cached.push_back(positions_[i]);
  }
  std::size_t next = num_kept_;
  for (int n = eviction_position; n <= position; ++n) {
    const bool is_listed = next < positions_.size() && positions_[next] == n;
    if (n >= first_visible && (!is_listed || is_seen(next))) cached.push_back(n);
    next += is_listed ? 1 : 0;
  }
  return cached;
}

int Residency::count_at(int position, int eviction_position, int first_visible) const {
  const auto visible = static_cast<std::size_t>(std::ranges::lower_bound(kept(), first_visible) - kept().begin());
  int count = static_cast<int>(num_kept_ - visible) + position + 1 - std::max(eviction_position, first_visible);
  for (std::size_t i = visible; i < until_.size() && positions_[i] <= position; ++i) {
    count -= positions_[i] >= first_visible && until_[i] < position ? 1 : 0;
  }
  return count;
}

double Residency::mean_kept(int first, int end, std::span<const int> queries) const {
  const auto begin = static_cast<std::size_t>(std::ranges::lower_bound(kept(), first) - kept().begin());
  const auto stop = static_cast<std::size_t>(std::ranges::lower_bound(kept(), end) - kept().begin());
  if (until_.empty()) return static_cast<double>(stop - begin);
  std::ptrdiff_t seen = 0;
  for (std::size_t i = begin; i < stop; ++i) seen += std::ranges::upper_bound(queries, until_[i]) - queries.begin();
  return static_cast<double>(seen) / static_cast<double>(queries.size());
}

std::vector<int> Residency::kept_at_each(int first, int end, std::span<const int> queries) const {
  const auto begin = static_cast<std::size_t>(std::ranges::lower_bound(kept(), first) - kept().begin());
  const auto stop = static_cast<std::size_t>(std::ranges::lower_bound(kept(), end) - kept().begin());
  std::vector<int> counts(queries.size(), 0);
  std::vector<int> gone(queries.size() + 1, 0);  // by the first query that does not see it any more
  for (std::size_t i = begin; i < stop; ++i) {
    const bool stays = until_.empty() || until_[i] == kNever;
    ++gone[stays ? queries.size()
                 : static_cast<std::size_t>(std::ranges::upper_bound(queries, until_[i]) - queries.begin())];
  }
  int left = static_cast<int>(stop - begin);
  for (std::size_t q = 0; q < queries.size(); ++q) {
    left -= gone[q];
    counts[q] = left;
  }
  return counts;
}

std::vector<Residency::Stay> Residency::evicted_later(int eviction_position) const {
  std::vector<Stay> evicted;
  for (std::size_t i = 0; i < until_.size(); ++i) {
    if (until_[i] != kNever) {
      evicted.push_back({positions_[i], std::max(positions_[i], eviction_position), until_[i]});
    }
  }
  std::ranges::stable_sort(evicted, {}, &Stay::until);
  return evicted;
}

std::vector<Residency::Stay> Residency::seen_between(int first, int last, int eviction_position) const {
  std::vector<Stay> seen;
  const auto until_of = [this](std::size_t i) { return until_.empty() ? kNever : until_[i]; };
  for (std::size_t i = 0; i < num_kept_; ++i) {
    if (until_of(i) >= first) seen.push_back({positions_[i], eviction_position, until_of(i)});
  }
  std::size_t next = num_kept_;
  for (int n = eviction_position; n <= last; ++n) {
    const bool is_listed = next < positions_.size() && positions_[next] == n;
    const int until = is_listed ? until_of(next++) : kNever;
    if (until >= first) seen.push_back({n, n, until});
  }
  return seen;
}

void FlatResidencies::add(std::span<const Residency> sets) {
  for (const Residency& set : sets) {
    if (!set.is_one_eviction() && until.empty()) until.assign(positions.size(), Residency::kNever);
    positions.insert(positions.end(), set.positions().begin(), set.positions().end());
    if (!set.is_one_eviction()) {
      until.insert(until.end(), set.until().begin(), set.until().end());
    } else if (!until.empty()) {
      until.resize(positions.size(), Residency::kNever);
    }
    offsets.push_back(static_cast<std::int64_t>(positions.size()));
  }
}

}  // namespace kvreplay
