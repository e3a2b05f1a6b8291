#include "policy/smoothing.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

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

Spatial spatial_named(const std::string& name) {
  if (name == "none") return Spatial::none;
  if (name == "avg") return Spatial::average;
  if (name == "max") return Spatial::maximum;
  if (name == "adaptive") return Spatial::adaptive;
  throw std::invalid_argument(name);
}

void pool(Spatial spatial, int kernel, std::span<float> scores) {
  const int size = static_cast<int>(scores.size());
  const int half = kernel / 2;
  if (spatial == Spatial::none || kernel == 1) return;
  const std::vector<float> raw(scores.begin(), scores.end());
  const auto at = [&raw](int i) { return raw[static_cast<std::size_t>(i)]; };
  for (int i = 0; i < size; ++i) {
    const int first = std::max(0, i - half);
    const int last = std::min(size - 1, i + half);
    if (spatial == Spatial::maximum) {
      scores[static_cast<std::size_t>(i)] = *std::max_element(raw.begin() + first, raw.begin() + last + 1);
    } else {
      // Summed afresh for every position: a running sum would carry the rounding of large scores far along the prompt.
      double sum = 0;
      for (int j = first; j <= last; ++j) sum += static_cast<double>(at(j));
      scores[static_cast<std::size_t>(i)] = static_cast<float>(sum / kernel);
    }
  }
}

AdaptiveWindow AdaptiveWindow::from_drift(double drift, double beta, int kernel) {
  // Wider than any prompt makes no difference.
  constexpr double kMostSteps = 1 << 28;
  const double steps = std::min(std::floor(std::abs(drift) / beta), kMostSteps);
  const double shift = std::clamp(std::floor(drift / beta) + (drift > 0 ? 0 : 1), -kMostSteps, kMostSteps);
  return {std::max(kernel, static_cast<int>(2 * steps) + 1), static_cast<int>(shift)};
}

double attention_drift(const Head& head, int member, int window, int count) {
  const int front = window / 2;
  const int rear = window - front;
  count = std::min(count, head.prompt_length());
  if (count <= 0 || front == 0) return 0;
  const auto sum_of_positions = [&](int first, int last) {
    std::int64_t sum = 0;
    for (int i = first; i < last; ++i) {
      for (const int position : select_top(head.attention(member, window - 1 - i), {}, count)) sum += position;
    }
    return sum;
  };
  // One division of a whole number: a drift of exactly n·β must not come out below it.
  const std::int64_t drift = sum_of_positions(0, front) * rear - sum_of_positions(front, window) * front;
  return static_cast<double>(drift) / (static_cast<double>(front) * rear * count);
}

void pool_adaptive(AdaptiveWindow window, std::span<float> scores) {
  const std::int64_t size = static_cast<std::int64_t>(scores.size());
  if (size == 0) return;
  const std::vector<float> raw(scores.begin(), scores.end());
  // A window far wider than the scores repeats its edges; those need not be summed one by one.
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t first = i - window.width / 2 + window.shift;
    const std::int64_t end = first + window.width;
    const std::int64_t before = std::clamp<std::int64_t>(-first, 0, window.width);
    const std::int64_t after = std::clamp<std::int64_t>(end - size, 0, window.width);
    double sum = static_cast<double>(before) * static_cast<double>(raw.front()) +
                 static_cast<double>(after) * static_cast<double>(raw.back());
    for (std::int64_t j = std::max<std::int64_t>(first, 0); j < std::min(end, size); ++j) {
      sum += static_cast<double>(raw[static_cast<std::size_t>(j)]);
    }
    scores[static_cast<std::size_t>(i)] = static_cast<float>(sum / window.width);
  }
}

void smooth_in_space(Spatial spatial, int kernel, double beta, const Head& head, int member, int window, int capacity,
                     std::span<float> scores) {
  if (spatial != Spatial::adaptive) {
    pool(spatial, kernel, scores);
    return;
  }
  const double drift = attention_drift(head, member, window, capacity - window);
  pool_adaptive(AdaptiveWindow::from_drift(drift, beta, kernel), scores);
}

}  // namespace kvreplay
