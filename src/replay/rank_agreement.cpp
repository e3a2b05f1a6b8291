#include "replay/rank_agreement.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <utility>

namespace kvreplay {
namespace {

// Sums of products of three counts.
__extension__ using Wide = __int128;

// A number that is ordered as the float is; 0 and −0 are equal.
std::uint32_t key_of(float value) {
  constexpr std::uint32_t kSign = 0x80000000;
  const auto bits = std::bit_cast<std::uint32_t>(value + 0.0f);
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

// Keys in the upper halves, what is sorted with them in the lower ones.
using Keyed = std::vector<std::uint64_t>;

std::uint64_t keyed(std::uint32_t key, std::uint32_t with) { return std::uint64_t{key} << 32 | with; }
std::uint32_t key(std::uint64_t entry) { return static_cast<std::uint32_t>(entry >> 32); }
std::uint32_t with(std::uint64_t entry) { return static_cast<std::uint32_t>(entry); }

// Sorts by the keys; entries with equal keys stay in their order.
void sort_by_key(Keyed& entries) {
  constexpr int kBits = 11;
  constexpr std::size_t kDigits = std::size_t{1} << kBits;
  Keyed sorted(entries.size());
  for (int shift = 32; shift < 64; shift += kBits) {
    std::array<std::size_t, kDigits> place{};
    const auto digit = [shift](std::uint64_t entry) { return (entry >> shift) & (kDigits - 1); };
    for (const std::uint64_t entry : entries) ++place[digit(entry)];
    std::size_t before = 0;
    for (std::size_t& count : place) before += std::exchange(count, before);
    for (const std::uint64_t entry : entries) sorted[place[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
}

// The end of the run of equal numbers that begins at `first`.
template <class Number>
std::size_t end_of_run(std::size_t first, std::size_t size, const Number& number) {
  std::size_t end = first + 1;
  while (end < size && number(end) == number(first)) ++end;
  return end;
}

// What ties take away: from n³ − n, and from the number of pairs.
struct Ties {
  Wide cubes = 0;
  std::int64_t pairs = 0;

  void add(std::size_t run) {
    const auto t = static_cast<std::int64_t>(run);
    cubes += Wide{t} * (Wide{t} * t - 1);
    pairs += t * (t - 1) / 2;
  }
};

// Pairs that stand in descending order. Sorts the numbers.
std::int64_t count_inversions(std::vector<std::uint32_t>& numbers) {
  std::int64_t inversions = 0;
  const std::size_t size = numbers.size();
  std::vector<std::uint32_t> merged(size);
  for (std::size_t width = 1; width < size; width *= 2) {
    for (std::size_t first = 0; first < size; first += 2 * width) {
      const std::size_t middle = std::min(first + width, size);
      const std::size_t end = std::min(middle + width, size);
      std::size_t left = first;
      std::size_t right = middle;
      std::size_t out = first;
      while (left < middle && right < end) {
        const bool descends = numbers[right] < numbers[left];
        inversions += descends ? static_cast<std::int64_t>(middle - left) : 0;
        merged[out++] = numbers[descends ? right : left];
        right += descends ? 1 : 0;
        left += descends ? 0 : 1;
      }
      const auto at = [](std::size_t place) { return static_cast<std::ptrdiff_t>(place); };
      std::copy(numbers.begin() + at(left), numbers.begin() + at(middle), merged.begin() + at(out));
      out += middle - left;
      std::copy(numbers.begin() + at(right), numbers.begin() + at(end), merged.begin() + at(out));
    }
    numbers.swap(merged);
  }
  return inversions;
}

// `part` over the geometric mean of a and b; 0 where that is 0.
double share_of(Wide part, Wide a, Wide b) {
  if (a == 0 || b == 0) return 0;
  // The root of an exact square is exact, so that a part as large as both gives 1.
  return std::clamp(static_cast<double>(part) / std::sqrt(static_cast<double>(a) * static_cast<double>(b)), -1.0, 1.0);
}

}  // namespace

RankedValues::RankedValues(std::span<const float> values) : order_(values.size()), level_(values.size()) {
  Keyed entries(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    entries[i] = keyed(key_of(values[i]), static_cast<std::uint32_t>(i));
  }
  sort_by_key(entries);
  std::uint32_t level = 0;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (i > 0 && key(entries[i]) != key(entries[i - 1])) ++level;
    order_[i] = with(entries[i]);
    level_[i] = level;
  }
}

RankCorrelation RankedValues::correlation(std::span<const float> others, Index first, Index end) const {
  if (end - first < 2) return {};
  const auto count = static_cast<std::size_t>(end - first);
  const auto n = static_cast<std::int64_t>(count);

  // The keys of the others, in the order of the values, with twice the mean rank of the value: a whole number.
  Keyed entries(count);
  std::vector<std::uint32_t> numbers(count);  // the values' levels, later their ranks
  std::size_t next = 0;
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const std::uint32_t place = order_[i];
    if (place < first || place >= end) continue;
    entries[next] = keyed(key_of(others[place]), 0);
    numbers[next++] = level_[i];
  }
  Ties ties_of_values;
  for (std::size_t i = 0; i < count;) {
    const std::size_t after = end_of_run(i, count, [&](std::size_t k) { return numbers[k]; });
    ties_of_values.add(after - i);
    for (std::size_t k = i; k < after; ++k) entries[k] |= static_cast<std::uint32_t>(i + 1 + after);
    i = after;
  }

  // Those with equal keys stay in the order of the values, and so count neither as agreeing nor as disagreeing.
  sort_by_key(entries);
  Ties ties_of_others;
  Ties ties_of_both;
  Wide covariance = 0;  // of twice the ranks less n + 1
  for (std::size_t i = 0; i < count;) {
    const std::size_t after = end_of_run(i, count, [&](std::size_t k) { return key(entries[k]); });
    ties_of_others.add(after - i);
    std::int64_t sum = 0;
    for (std::size_t k = i; k < after;) {
      const std::size_t same = end_of_run(k, after, [&](std::size_t j) { return with(entries[j]); });
      ties_of_both.add(same - k);
      sum += static_cast<std::int64_t>(same - k) * (static_cast<std::int64_t>(with(entries[k])) - n - 1);
      k = same;
    }
    covariance += Wide{sum} * (static_cast<std::int64_t>(i + 1 + after) - n - 1);
    i = after;
  }
  std::ranges::transform(entries, numbers.begin(), with);
  const std::int64_t disagreeing = count_inversions(numbers);

  const Wide cubes = Wide{n} * (Wide{n} * n - 1);
  const std::int64_t pairs = n * (n - 1) / 2;
  const std::int64_t in_order_of_values = pairs - ties_of_values.pairs;
  const std::int64_t in_order_of_others = pairs - ties_of_others.pairs;
  const std::int64_t in_both = in_order_of_values - ties_of_others.pairs + ties_of_both.pairs;
  return {
      .spearman = share_of(covariance, (cubes - ties_of_values.cubes) / 3, (cubes - ties_of_others.cubes) / 3),
      .kendall = share_of(in_both - 2 * disagreeing, in_order_of_values, in_order_of_others),
  };
}

Index RankedValues::memory(Index count) { return count * static_cast<Index>(2 * sizeof(std::uint32_t)); }

Index RankedValues::working_memory(Index count) {
  return count * static_cast<Index>(2 * sizeof(std::uint64_t) + 2 * sizeof(std::uint32_t));
}

}  // namespace kvreplay
