#include "replay/residency.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>

#include "base/error.h"

namespace kvreplay {

Residency::Residency(const std::vector<int>& positions, const std::vector<int>& until, int eviction_position,
                     const std::vector<int>& from) {
  if (positions.size() != until.size()) {
    throw Error(fmt::format("{} positions have {} last queries", positions.size(), until.size()));
  }
  if (!from.empty() && positions.size() != from.size()) {
    throw Error(fmt::format("{} positions have {} first queries", positions.size(), from.size()));
  }
  const bool ascend =
      from.empty() ? std::ranges::is_sorted(positions, std::less_equal<>()) : std::ranges::is_sorted(positions);
  if (!ascend || (!positions.empty() && positions.front() < 0)) {
    throw Error("positions do not ascend from 0 or later");
  }
  for (std::size_t i = 0; i < positions.size();) {
    const int position = positions[i];
    const bool is_kept = position < eviction_position;
    const int arrival = is_kept ? eviction_position : position;
    int last = arrival - 1;  // that saw it, or did not because it had not come
    for (const std::size_t first_span = i; i < positions.size() && positions[i] == position; ++i) {
      const int since = from.empty() ? arrival : std::max(arrival, from[i]);
      if (until[i] < since) {
        throw Error(fmt::format("position {} is listed up to the query at {}, which is before {}", position, until[i],
                                since > arrival ? fmt::format("its first at {}", since)
                                : is_kept       ? "the first after the eviction"
                                                : "its own"));
      }
      if (i > first_span && since <= last) {
        throw Error(fmt::format("position {} is listed for the query at {} twice", position, since));
      }
      if (since > last + 1) gaps_.push_back({position, last + 1, since - 1});
      last = until[i];
    }
    if (!is_kept && last == kNever) continue;  // as if it were not listed
    positions_.push_back(position);
    until_.push_back(last);
    num_kept_ += is_kept ? 1 : 0;
  }
  if (gaps_.empty() && std::ranges::all_of(until_, [](int last) { return last == kNever; })) until_.clear();
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
  for (const Gap& gap : gaps_) {
    if (gap.first > position || gap.last < position) continue;
    const auto hidden = std::ranges::lower_bound(cached, gap.position);
    if (hidden != cached.end() && *hidden == gap.position) cached.erase(hidden);
  }
  return cached;
}

int Residency::count_at(int position, int eviction_position, int first_visible) const {
  const auto visible = static_cast<std::size_t>(std::ranges::lower_bound(kept(), first_visible) - kept().begin());
  int count = static_cast<int>(num_kept_ - visible) + position + 1 - std::max(eviction_position, first_visible);
  for (std::size_t i = visible; i < until_.size() && positions_[i] <= position; ++i) {
    count -= positions_[i] >= first_visible && until_[i] < position ? 1 : 0;
  }
  for (const Gap& gap : gaps_) {
    count -= gap.position >= first_visible && gap.first <= position && position <= gap.last ? 1 : 0;
  }
  return count;
}

double Residency::mean_kept(int first, int end, std::span<const int> queries) const {
  const auto begin = static_cast<std::size_t>(std::ranges::lower_bound(kept(), first) - kept().begin());
  const auto stop = static_cast<std::size_t>(std::ranges::lower_bound(kept(), end) - kept().begin());
  if (until_.empty()) return static_cast<double>(stop - begin);
  std::ptrdiff_t seen = 0;
  for (std::size_t i = begin; i < stop; ++i) seen += std::ranges::upper_bound(queries, until_[i]) - queries.begin();
  for (const Gap& gap : gaps_) {
    if (begin == stop || gap.position < positions_[begin] || gap.position > positions_[stop - 1]) continue;
    seen -= std::ranges::upper_bound(queries, gap.last) - std::ranges::lower_bound(queries, gap.first);
  }
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
  for (const Gap& gap : gaps_) {
    if (begin == stop || gap.position < positions_[begin] || gap.position > positions_[stop - 1]) continue;
    const auto hidden = std::ranges::lower_bound(queries, gap.first) - queries.begin();
    const auto back = std::ranges::upper_bound(queries, gap.last) - queries.begin();
    for (auto q = hidden; q < back; ++q) --counts[static_cast<std::size_t>(q)];
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
  auto gap = gaps_.begin();
  const auto add = [&](int position, int from, int until) {
    while (gap != gaps_.end() && gap->position < position) ++gap;
    for (; gap != gaps_.end() && gap->position == position; ++gap) {
      if (gap->first > from && gap->first > first && from <= last) seen.push_back({position, from, gap->first - 1});
      from = gap->last + 1;
    }
    if (until >= first && from <= last) seen.push_back({position, from, until});
  };
  for (std::size_t i = 0; i < num_kept_; ++i) add(positions_[i], eviction_position, until_of(i));
  std::size_t next = num_kept_;
  for (int n = eviction_position; n <= last; ++n) {
    const bool is_listed = next < positions_.size() && positions_[next] == n;
    const int until = is_listed ? until_of(next++) : kNever;
    add(n, n, until);
  }
  return seen;
}

void FlatResidencies::add(std::span<const Residency> sets, int eviction_position) {
  for (const Residency& set : sets) {
    if (!set.gaps().empty()) {
      add_spans(set, eviction_position);
      continue;
    }
    if (!from.empty()) from.insert(from.end(), set.positions().begin(), set.positions().end());
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

void FlatResidencies::add_spans(const Residency& set, int eviction_position) {
  if (until.empty()) until.assign(positions.size(), Residency::kNever);
  if (from.empty()) from = positions;
  const std::span<const Residency::Gap> gaps = set.gaps();
  const auto add_span = [this](int position, int first, int last) {
    positions.push_back(position);
    from.push_back(first);
    until.push_back(last);
  };
  std::size_t gap = 0;
  const auto add_position = [&](int position, int last) {
    int since = position;
    for (; gap < gaps.size() && gaps[gap].position == position; ++gap) {
      if (gaps[gap].first > std::max(since, eviction_position)) add_span(position, since, gaps[gap].first - 1);
      since = gaps[gap].last + 1;
    }
    add_span(position, since, last);
  };
  // What is never evicted is not listed, and yet may have been hidden.
  const auto add_gaps_before = [&](int position) {
    while (gap < gaps.size() && gaps[gap].position < position) add_position(gaps[gap].position, Residency::kNever);
  };
  for (std::size_t i = 0; i < set.positions().size(); ++i) {
    add_gaps_before(set.positions()[i]);
    add_position(set.positions()[i], set.until()[i]);
  }
  add_gaps_before(Residency::kNever);
  offsets.push_back(static_cast<std::int64_t>(positions.size()));
}

}  // namespace kvreplay
