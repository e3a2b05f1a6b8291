#include "policy/smoothing.h"

#include <algorithm>
#include <cmath>
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
  const double steps = std::floor(std::abs(drift) / beta);
  const double shift = std::floor(drift / beta) + (drift > 0 ? 0 : 1);
  return {std::max(kernel, static_cast<int>(2 * steps) + 1), static_cast<int>(shift)};
}

double attention_drift(const Head& head, int member, int window, int count) {
  const int front = window / 2;
  count = std::min(count, head.prompt_length());
  if (count <= 0 || front == 0) return 0;
  const auto mean_position = [&](int first, int last) {
    double sum = 0;
    for (int i = first; i < last; ++i) {
      for (const int position : select_top(head.attention(member, window - 1 - i), {}, count)) sum += position;
    }
    return sum / (static_cast<double>(last - first) * count);
  };
  return mean_position(0, front) - mean_position(front, window);
}

void pool_adaptive(AdaptiveWindow window, std::span<float> scores) {
  const int size = static_cast<int>(scores.size());
  if (size == 0) return;
  const std::vector<float> raw(scores.begin(), scores.end());
  for (int i = 0; i < size; ++i) {
    const int first = i - window.width / 2 + window.shift;
    double sum = 0;
    for (int j = first; j < first + window.width; ++j) {
      sum += static_cast<double>(raw[static_cast<std::size_t>(std::clamp(j, 0, size - 1))]);
    }
    scores[static_cast<std::size_t>(i)] = static_cast<float>(sum / window.width);
  }
}

}  // namespace kvreplay
