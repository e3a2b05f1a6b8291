#include "analysis/bootstrap.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <numeric>
#include <utility>

#include "analysis/student_t.h"

namespace kvreplay {
namespace {

// SplitMix64: a number from a counter, so that what is drawn depends on nothing that was drawn before.
std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31U);
}

// Numbers below `count`, in an order that follows from the seed and from what they are drawn for.
class Draws {
 public:
  Draws(std::uint64_t seed, std::uint64_t purpose, std::size_t count)
      : state_(mixed(mixed(seed) + purpose)), count_(count) {}

  std::size_t next() {
    if (!half_) bits_ = mixed(state_++);
    const std::uint64_t drawn = half_ ? bits_ >> 32U : bits_ & 0xffffffffU;
    half_ = !half_;
    return static_cast<std::size_t>((drawn * count_) >> 32U);
  }

 private:
  std::uint64_t state_;
  std::uint64_t count_;
  std::uint64_t bits_ = 0;
  bool half_ = false;
};

// With fewer than three blocks there is nothing to tell how they vary.
int longest_block(std::size_t size) {
  const auto n = static_cast<double>(size);
  return std::max(1, static_cast<int>(std::ceil(std::min(3 * std::sqrt(n), n / 3))));
}

// A series with the sums of all its blocks, which run on at its beginning when they pass its end.
class Blocks {
 public:
  Blocks(std::span<const double> values, int block) : size_(values.size()) {
    block_ = static_cast<std::size_t>(block);
    whole_ = size_ / block_;
    rest_ = size_ % block_;
    mean_ = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(size_);
    sums_ = sums_of(values, block_);
    if (rest_ > 0) rest_sums_ = sums_of(values, rest_);
  }

  double mean() const { return mean_; }
  std::size_t length() const { return block_; }

  // How many independent numbers would vary as little: as many as there are blocks, where they are of one length.
  double effective_count() const {
    const auto squared = [](std::size_t number) { return static_cast<double>(number * number); };
    return squared(size_) / (static_cast<double>(whole_) * squared(block_) + squared(rest_));
  }

  // Of the resampled mean, exactly: what infinitely many resamples would show.
  double variance() const {
    const auto mean_square = [](const std::vector<double>& sums) {
      double square = 0;
      for (const double sum : sums) square += sum * sum;
      return sums.empty() ? 0 : square / static_cast<double>(sums.size());
    };
    const auto size = static_cast<double>(size_);
    return (static_cast<double>(whole_) * mean_square(sums_) + mean_square(rest_sums_)) / (size * size);
  }

  // A resampled mean, less the mean.
  double draw(Draws& draws) const {
    double sum = 0;
    for (std::size_t i = 0; i < whole_; ++i) sum += sums_[draws.next()];
    if (rest_ > 0) sum += rest_sums_[draws.next()];
    return sum / static_cast<double>(size_);
  }

 private:
  // Sums of values less the mean, of the block that begins at each of them.
  std::vector<double> sums_of(std::span<const double> values, std::size_t length) const {
    std::vector<double> before(2 * size_ + 1, 0.0);
    for (std::size_t i = 0; i < 2 * size_; ++i) before[i + 1] = before[i] + (values[i % size_] - mean_);
    std::vector<double> sums(size_);
    for (std::size_t i = 0; i < size_; ++i) sums[i] = before[i + length] - before[i];
    return sums;
  }

  std::size_t size_;
  std::size_t block_ = 1;
  std::size_t whole_ = 0;  // blocks of full length in a resample
  std::size_t rest_ = 0;   // length of the one that fills it up
  double mean_ = 0;
  std::vector<double> sums_;       // [size]
  std::vector<double> rest_sums_;  // [size], or none
};

// The number below which `share` of the sorted numbers lie, interpolated. `share` is small: only numbers up to `likely`
// are looked at, unless it turns out not to be among them.
double low_quantile(const std::vector<double>& numbers, double share, double likely) {
  const double place = share * static_cast<double>(numbers.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  std::vector<double> lowest(numbers.size());
  std::size_t count = 0;
  for (const double number : numbers) {
    lowest[count] = number;
    count += number <= likely ? 1 : 0;
  }
  lowest.resize(count);
  if (count < below + 2) lowest = numbers;
  const auto at = lowest.begin() + static_cast<std::ptrdiff_t>(below);
  std::nth_element(lowest.begin(), at, lowest.end());
  const double lower = *at;
  if (at + 1 == lowest.end()) return lower;
  const double upper = *std::min_element(at + 1, lowest.end());
  return lower + (place - static_cast<double>(below)) * (upper - lower);
}

// Everything about the distribution of a resampled mean but the draws.
struct Spread {
  double variance = 0;  // corrected
  double degrees = 0;   // of freedom of that variance
};

void finish(MeanEstimate& estimate, const Spread& spread, std::vector<double> deviations, double confidence) {
  estimate.standard_error = std::sqrt(spread.variance);
  const double bound = student_t_bound(confidence, spread.degrees);
  if (estimate.standard_error > 0) {
    estimate.p_value = student_t_tails(std::abs(estimate.mean) / estimate.standard_error, spread.degrees);
  } else {
    estimate.p_value = estimate.mean == 0 ? 1 : 0;
  }
  if (deviations.empty()) {
    estimate.interval = {estimate.mean - bound * estimate.standard_error,
                         estimate.mean + bound * estimate.standard_error};
    return;
  }
  // Quantiles of few blocks lie too near: they are those of a normal distribution where t would be right.
  const double normal_bound = student_t_bound(confidence, std::numeric_limits<double>::infinity());
  const double wider = bound / normal_bound;
  const double likely = -0.8 * normal_bound * estimate.standard_error;
  const double share = (1 - confidence) / 2;
  const double low = low_quantile(deviations, share, likely);
  for (double& deviation : deviations) deviation = -deviation;
  const double high = -low_quantile(deviations, share, likely);
  estimate.interval = {estimate.mean + wider * low, estimate.mean + wider * high};
}

}  // namespace

MeanEstimate bootstrap_mean(std::span<const Series> series, const BootstrapOptions& options) {
  MeanEstimate estimate;
  std::vector<Blocks> blocks;
  std::vector<std::size_t> first_of_trace;  // and the number of series at the end
  // Short series tell little of how far they depend on themselves, and what they miss makes intervals too narrow: all
  // take the longest block that one of them asks for.
  int block = options.block;
  for (std::size_t i = 0; options.block == 0 && i < series.size(); ++i) {
    block = std::max(block, block_length(series[i].values));
  }
  for (std::size_t i = 0; i < series.size(); ++i) {
    const std::size_t size = series[i].values.size();
    blocks.emplace_back(series[i].values,
                        std::min(block, options.block > 0 ? static_cast<int>(size) : longest_block(size)));
    estimate.block = std::max(estimate.block, static_cast<int>(blocks.back().length()));
    if (i == 0 || series[i].trace != series[i - 1].trace) first_of_trace.push_back(i);
  }
  const std::size_t traces = first_of_trace.size();
  first_of_trace.push_back(series.size());
  const auto count = static_cast<double>(traces);
  std::vector<double> trace_means(traces, 0.0);
  for (std::size_t t = 0; t < traces; ++t) {
    for (std::size_t i = first_of_trace[t]; i < first_of_trace[t + 1]; ++i) {
      trace_means[t] += series[i].weight * blocks[i].mean();
    }
  }
  estimate.mean = std::accumulate(trace_means.begin(), trace_means.end(), 0.0) / count;

  std::vector<double> deviations(static_cast<std::size_t>(options.resamples), 0.0);
  Spread spread;
  if (options.resampling == Resampling::queries) {
    double over_degrees = 0;  // Welch and Satterthwaite's formula
    for (std::size_t i = 0; i < series.size(); ++i) {
      if (series[i].values.size() < 2) return estimate;
      const double independent = blocks[i].effective_count();
      if (independent <= 1) return estimate;  // a single block as long as the series
      const double weight = series[i].weight / count;
      const double correction = independent / (independent - 1);
      const double variance = weight * weight * correction * blocks[i].variance();
      spread.variance += variance;
      over_degrees += variance * variance / (independent - 1);
      Draws draws(options.seed, i, series[i].values.size());
      const double scale = weight * std::sqrt(correction);
      for (double& deviation : deviations) deviation += scale * blocks[i].draw(draws);
    }
    spread.degrees = over_degrees > 0 ? spread.variance * spread.variance / over_degrees : 1;
  } else {
    if (traces < 2) return estimate;
    const double correction = count / (count - 1);
    for (std::size_t t = 0; t < traces; ++t) {
      const double apart = trace_means[t] - estimate.mean;
      double within = 0;
      for (std::size_t i = first_of_trace[t]; i < first_of_trace[t + 1]; ++i) {
        within += series[i].weight * series[i].weight * blocks[i].variance();
      }
      spread.variance += correction * (apart * apart + within) / (count * count);
    }
    spread.degrees = count - 1;
    Draws which(options.seed, series.size(), traces);
    std::vector<Draws> draws;
    for (std::size_t i = 0; i < series.size(); ++i) draws.emplace_back(options.seed, i, series[i].values.size());
    const double scale = std::sqrt(correction) / count;
    for (double& deviation : deviations) {
      for (std::size_t drawn = 0; drawn < traces; ++drawn) {
        const std::size_t t = which.next();
        double mean = trace_means[t] - estimate.mean;
        for (std::size_t i = first_of_trace[t]; i < first_of_trace[t + 1]; ++i) {
          mean += series[i].weight * blocks[i].draw(draws[i]);
        }
        deviation += scale * mean;
      }
    }
  }
  finish(estimate, spread, std::move(deviations), options.confidence);
  return estimate;
}

int block_length(std::span<const double> series) {
  const auto size = static_cast<int>(series.size());
  constexpr int kFewest = 4;  // of fewer there is no correlation to be seen
  if (size < kFewest) return 1;
  const auto n = static_cast<double>(size);
  const double mean = std::accumulate(series.begin(), series.end(), 0.0) / n;
  const auto covariance = [&](int lag) {
    double sum = 0;
    for (int i = lag; i < size; ++i) {
      sum += (series[static_cast<std::size_t>(i)] - mean) * (series[static_cast<std::size_t>(i - lag)] - mean);
    }
    return sum / n;
  };
  const int run = std::max(5, static_cast<int>(std::log10(n)));
  const int most = std::min(static_cast<int>(std::ceil(std::sqrt(n))) + run, size - 1);
  std::vector<double> covariances;
  for (int lag = 0; lag <= most; ++lag) covariances.push_back(covariance(lag));
  const double variance = covariances.front();
  if (!(variance > 0)) return 1;

  // The first lag from which on `run` correlations cannot be told from 0; twice that many are looked at.
  const double band = 2 * std::sqrt(std::log10(n) / n);
  int lags = most;
  int unremarkable = 0;
  for (int lag = 1; lag <= most; ++lag) {
    unremarkable = std::abs(covariances[static_cast<std::size_t>(lag)]) < band * variance ? unremarkable + 1 : 0;
    if (unremarkable < run) continue;
    lags = std::min(2 * (lag - run + 1), most);
    break;
  }
  double slope = 0;            // G = Σ λ(k/M) |k| R(k)
  double long_run = variance;  // Σ λ(k/M) R(k)
  for (int lag = 1; lag <= lags; ++lag) {
    const double taper = 2 * lag <= lags ? 1 : 2 * (1 - static_cast<double>(lag) / lags);
    slope += 2 * taper * lag * covariances[static_cast<std::size_t>(lag)];
    long_run += 2 * taper * covariances[static_cast<std::size_t>(lag)];
  }
  if (slope == 0) return 1;
  const double best = std::cbrt(2 * slope * slope / (4.0 / 3 * long_run * long_run) * n);
  return static_cast<int>(std::clamp(std::ceil(best), 1.0, static_cast<double>(longest_block(series.size()))));
}

std::vector<double> holm(std::vector<double> p_values) {
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < p_values.size(); ++i) {
    if (!std::isnan(p_values[i])) order.push_back(i);
  }
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return p_values[i]; });
  double largest = 0;
  for (std::size_t rank = 0; rank < order.size(); ++rank) {
    double& p = p_values[order[rank]];
    largest = std::max(largest, std::min(1.0, p * static_cast<double>(order.size() - rank)));
    p = largest;
  }
  return p_values;
}

std::vector<double> holm_within(const std::vector<double>& p_values, const std::vector<std::string>& families) {
  std::map<std::string, std::vector<std::size_t>> members;
  for (std::size_t i = 0; i < p_values.size(); ++i) members[families[i]].push_back(i);
  std::vector<double> corrected(p_values.size());
  for (const auto& [family, indices] : members) {
    std::vector<double> of_family;
    for (const std::size_t i : indices) of_family.push_back(p_values[i]);
    of_family = holm(std::move(of_family));
    for (std::size_t i = 0; i < indices.size(); ++i) corrected[indices[i]] = of_family[i];
  }
  return corrected;
}

}  // namespace kvreplay
