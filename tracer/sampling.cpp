#include "tracer/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "base/error.h"
#include "tracer/transformer.h"

namespace kvreplay::tracer {

namespace {

// A probability before it is divided by the sum of all, and an id.
using Candidate = std::pair<double, std::int32_t>;

bool is_more_likely(const Candidate& a, const Candidate& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

double sum_of(std::span<const Candidate> candidates) {
  return std::accumulate(candidates.begin(), candidates.end(), 0.0,
                         [](double sum, const Candidate& candidate) { return sum + candidate.first; });
}

// Leaves them in the order of ids. The most likely ones come first out of a heap, as few of them are left mostly.
void keep_most_likely(const SamplingOptions& options, std::vector<Candidate>& candidates) {
  const auto less = [](const Candidate& a, const Candidate& b) { return is_more_likely(b, a); };
  if (options.top_k > 0 && static_cast<std::size_t>(options.top_k) < candidates.size()) {
    const auto end = candidates.begin() + options.top_k;
    std::nth_element(candidates.begin(), end, candidates.end(), is_more_likely);
    candidates.erase(end, candidates.end());
    std::ranges::sort(candidates, {}, &Candidate::second);
  }
  if (options.top_p == 1) return;
  const double enough = options.top_p * sum_of(candidates);
  std::ranges::make_heap(candidates, less);
  double reached = 0;
  auto heap_end = candidates.end();
  while (reached < enough && heap_end != candidates.begin()) {
    std::pop_heap(candidates.begin(), heap_end, less);
    reached += (--heap_end)->first;
  }
  candidates.erase(candidates.begin(), heap_end);
  std::ranges::sort(candidates, {}, &Candidate::second);
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature)) {
    throw UsageError(fmt::format("the temperature must be a number of at least 0, not {}", options.temperature));
  }
  if (options.top_k < 0) throw UsageError(fmt::format("top-k must be at least 1, not {}", options.top_k));
  if (std::isnan(options.top_p) || options.top_p <= 0 || options.top_p > 1) {
    throw UsageError(fmt::format("top-p must be above 0 and at most 1, not {}", options.top_p));
  }
}

std::string description(const SamplingOptions& options) {
  if (options.temperature == 0) return "greedy decoding";
  std::string text = fmt::format("sampling at temperature {}", options.temperature);
  if (options.top_k > 0) text += fmt::format(", top-k {}", options.top_k);
  if (options.top_p < 1) text += fmt::format(", top-p {}", options.top_p);
  return text + fmt::format(", seed {}", options.seed);
}

std::int32_t Sampler::next(std::span<const float> logits) {
  const std::int32_t first = most_likely(logits);
  if (options_.temperature == 0) return first;
  const auto highest = static_cast<double>(logits[static_cast<std::size_t>(first)]);
  std::vector<Candidate> candidates(logits.size());
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const double weight = std::exp((static_cast<double>(logits[id]) - highest) / options_.temperature);
    candidates[id] = {weight, static_cast<std::int32_t>(id)};
  }
  keep_most_likely(options_, candidates);
  const double drawn = static_cast<double>(generator_() >> 11) * 0x1p-53 * sum_of(candidates);
  double reached = 0;
  for (const auto& [weight, id] : candidates) {
    reached += weight;
    if (drawn < reached) return id;
  }
  return first;  // where rounding leaves nothing of the last token's part
}

}  // namespace kvreplay::tracer
