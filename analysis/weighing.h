// How means weigh what they are over, everywhere: every trace the same, in it every eviction position, and there all
// that stands beside each other, be it results, layers, heads, queries or spans.
#pragma once

#include <cmath>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace kvreplay {

/// A mean of numbers that each have a weight. NaN, where there was nothing to measure, does not count.
class Mean {
 public:
  void add(double number, double weight = 1) {
    if (std::isnan(number)) return;
    sum_ += weight * number;
    weight_ += weight;
    ++count_;
  }

  /// How many numbers count.
  int count() const { return count_; }

  /// What they weigh together.
  double weight() const { return weight_; }

  /// NaN where none counts.
  double value() const { return sum_ / weight_; }

 private:
  double sum_ = 0;
  double weight_ = 0;
  int count_ = 0;
};

/// The mean over traces of the means of what each gives, one number per eviction position.
class MeanOverTraces {
 public:
  void add(const std::string& trace, double number) { of_traces_[trace].add(number); }

  /// Of the traces of which a number counts.
  Mean mean() const;

 private:
  std::map<std::string, Mean> of_traces_;
};

/// An eviction of a trace.
struct EvictionKey {
  std::string trace;
  int eviction_position = 0;

  auto operator<=>(const EvictionKey&) const = default;
};

/// The weights of members by the eviction that each is of, together 1: every trace weighs the same, in it every
/// eviction, and of an eviction every member.
std::vector<double> weights_of(std::span<const EvictionKey> members);

}  // namespace kvreplay
