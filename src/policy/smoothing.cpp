#include "policy/smoothing.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "kernels/kernels.h"
#include "policy/policy.h"

namespace kvreplay {

Temporal temporal_named(const std::string& name) {
  if (name == "ema") return Temporal::ema;
  if (name == "mean") return Temporal::mean;
  if (name == "last") return Temporal::last;
  if (name == "reversed-ema") return Temporal::reversed_ema;
  throw std::invalid_argument(name);
}

std::vector<float> temporal_weights(Temporal temporal, double alpha, int window) {
  const auto size = static_cast<std::size_t>(window);
  std::vector<float> weights(size, 0.0f);
  if (window == 0) return weights;
  switch (temporal) {
    case Temporal::mean:
      std::fill(weights.begin(), weights.end(), 1.0f / static_cast<float>(window));
      break;
    case Temporal::last:
      weights.back() = 1;
      break;
    case Temporal::ema:
    case Temporal::reversed_ema:
      for (std::size_t i = 0; i < size; ++i) {
        const auto age = static_cast<double>(size - 1 - i);
        weights[i] = static_cast<float>(std::pow(1 - alpha, age) * (i == 0 ? 1 : alpha));
      }
      if (temporal == Temporal::reversed_ema) std::reverse(weights.begin(), weights.end());
      break;
  }
  return weights;
}

std::vector<WindowCombination> each_query_alone(int window, WindowCombination::Distance distance, bool whole_cache) {
  std::vector<WindowCombination> queries;
  for (int i = 0; i < window; ++i) {
    std::vector<float> alone(static_cast<std::size_t>(window), 0.0f);
    alone[static_cast<std::size_t>(i)] = 1;
    queries.push_back({std::move(alone), distance, whole_cache});
  }
  return queries;
}

Spatial spatial_named(const std::string& name) {
  if (name == "none") return Spatial::none;
  if (name == "avg") return Spatial::average;
  if (name == "max") return Spatial::maximum;
  if (name == "adaptive") return Spatial::adaptive;
  throw std::invalid_argument(name);
}

namespace {

// The scores with `before` and `after` copies of an edge's value around them.
std::span<const float> extended(std::span<const float> scores, std::size_t before, float front, std::size_t after,
                                float back) {
  thread_local std::vector<float> memory;
  memory.resize(before + scores.size() + after);
  std::fill_n(memory.begin(), before, front);
  std::ranges::copy(scores, memory.begin() + static_cast<std::ptrdiff_t>(before));
  std::fill_n(memory.end() - static_cast<std::ptrdiff_t>(after), after, back);
  return memory;
}

// Scaled sums over windows so wide that adding each up would take long: every window is the end of one block of
// `width` values and the beginning of the next, both summed from their common edge. Nothing is subtracted, so that
// small scores do not drown in the rounding of large ones.
void sum_wide(std::span<const float> values, std::size_t width, float scale, std::span<float> sums) {
  std::vector<double> ends(width + 1);  // ends[i]: of the block's values from i on
  for (std::size_t block = 0; block < sums.size(); block += width) {
    ends[width] = 0;
    for (std::size_t i = width; i-- > 0;) ends[i] = ends[i + 1] + static_cast<double>(values[block + i]);
    double beginning = 0;
    for (std::size_t i = 0; i < width && block + i < sums.size(); ++i) {
      sums[block + i] = static_cast<float>(ends[i] + beginning) * scale;
      if (block + width + i < values.size()) beginning += static_cast<double>(values[block + width + i]);
    }
  }
}

// Replaces each score by the mean over `width` values of what `before` and `after` make of the scores.
void average(std::size_t width, std::size_t before, float front, std::size_t after, float back,
             std::span<float> scores) {
  constexpr std::size_t kWide = 32;
  const auto values = extended(scores, before, front, after, back);
  const float share = 1.0f / static_cast<float>(width);
  if (width <= kWide) {
    kernels::sliding_sums(values.data(), static_cast<Index>(width), share, static_cast<Index>(scores.size()),
                          scores.data());
  } else {
    sum_wide(values, width, share, scores);
  }
}

}  // namespace

std::span<float> before_window(const Head& head, std::span<float> scores, int window) {
  return scores.first(static_cast<std::size_t>(head.positions().count_before(head.shape().next_position - window)));
}

void pool(Spatial spatial, int kernel, std::span<float> scores) {
  if (spatial == Spatial::none || kernel == 1 || scores.empty()) return;
  const auto width = static_cast<std::size_t>(kernel);
  if (spatial == Spatial::maximum) {
    const float lowest = -std::numeric_limits<float>::infinity();
    const auto values = extended(scores, width / 2, lowest, width / 2, lowest);
    kernels::sliding_maxima(values.data(), kernel, static_cast<Index>(scores.size()), scores.data());
  } else {
    average(width, width / 2, 0, width / 2, 0, scores);
  }
}

AdaptiveWindow AdaptiveWindow::from_drift(double drift, double beta, int kernel) {
  // Wider than any prompt makes no difference.
  constexpr double kMostSteps = 1 << 28;
  const double steps = std::min(std::floor(std::abs(drift) / beta), kMostSteps);
  const double shift = std::clamp(std::floor(drift / beta) + (drift > 0 ? 0 : 1), -kMostSteps, kMostSteps);
  return {std::max(kernel, static_cast<int>(2 * steps) + 1), static_cast<int>(shift)};
}

namespace {

// The positions that one query attends most, added up.
struct MostAttended {
  int member;
  int age;
  int count;

  auto operator<=>(const MostAttended&) const = default;
};

std::int64_t sum_of_most_attended(const Head& head, const MostAttended& asked) {
  return head.once(asked, [&head, &asked] {
    thread_local std::vector<float> attention;
    thread_local std::vector<std::uint32_t> most;
    attention.resize(static_cast<std::size_t>(head.rows()));
    head.copy_attention(asked.member, asked.age, attention);
    kernels::largest(attention, asked.count, most);
    std::int64_t sum = 0;
    for (const std::uint32_t row : most) sum += head.positions()[static_cast<int>(row)];
    return sum;
  });
}

}  // namespace

double attention_drift(const Head& head, int member, int window, int count) {
  const int front = window / 2;
  const int rear = window - front;
  count = std::min(count, head.rows());
  if (count <= 0 || front == 0) return 0;
  const auto sum_of_positions = [&](int first, int last) {
    std::int64_t sum = 0;
    for (int i = first; i < last; ++i) sum += sum_of_most_attended(head, {member, window - 1 - i, count});
    return sum;
  };
  // One division of a whole number: a drift of exactly n·β must not come out below it.
  const std::int64_t drift = sum_of_positions(0, front) * rear - sum_of_positions(front, window) * front;
  return static_cast<double>(drift) / (static_cast<double>(front) * rear * count);
}

void pool_adaptive(AdaptiveWindow window, std::span<float> scores) {
  const auto size = static_cast<std::int64_t>(scores.size());
  if (size == 0) return;
  // Positions from i − before on; more than all of the scores lie beyond an edge only as copies of it.
  const std::int64_t before = window.width / 2 - static_cast<std::int64_t>(window.shift);
  const std::int64_t after = window.width - 1 - before;
  if (before >= 0 && after >= 0 && before <= size && after <= size) {
    average(static_cast<std::size_t>(window.width), static_cast<std::size_t>(before), scores.front(),
            static_cast<std::size_t>(after), scores.back(), scores);
    return;
  }
  const std::vector<float> raw(scores.begin(), scores.end());
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t first = i - before;
    const std::int64_t end = first + window.width;
    const std::int64_t beyond_front = std::clamp<std::int64_t>(-first, 0, window.width);
    const std::int64_t beyond_back = std::clamp<std::int64_t>(end - size, 0, window.width);
    double sum = static_cast<double>(beyond_front) * static_cast<double>(raw.front()) +
                 static_cast<double>(beyond_back) * static_cast<double>(raw.back());
    for (std::int64_t j = std::max<std::int64_t>(first, 0); j < std::min(end, size); ++j) {
      sum += static_cast<double>(raw[static_cast<std::size_t>(j)]);
    }
    scores[static_cast<std::size_t>(i)] = static_cast<float>(sum / window.width);
  }
}

void reconstruction_errors(const CombinedAttention& window, LengthRule rule, std::span<float> errors) {
  const auto tau = static_cast<float>(rule.tau);
  const float unit = rule.normalize ? 1 / std::max(window.output_length, std::numeric_limits<float>::min()) : 1.0f;
  for (std::size_t n = 0; n < errors.size(); ++n) {
    const float length = tau == 1 ? window.distance[n] : std::pow(window.distance[n], tau);
    errors[n] = removal_error(window.attention[n], length * unit);
  }
}

void smooth_in_space(Spatial spatial, int kernel, double beta, const Head& head, int member, int window, int capacity,
                     std::span<float> scores) {
  const auto past = before_window(head, scores, window);
  if (spatial != Spatial::adaptive) {
    pool(spatial, kernel, past);
    return;
  }
  const double drift = attention_drift(head, member, window, capacity - window);
  pool_adaptive(AdaptiveWindow::from_drift(drift, beta, kernel), past);
}

}  // namespace kvreplay
