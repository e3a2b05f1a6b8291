#include "tracer/synthetic.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <numbers>
#include <span>
#include <string>

#include "base/error.h"
#include "kernels/inference.h"
#include "kernels/kernels.h"
#include "trace/writer.h"

namespace kvreplay::tracer {

namespace {

// Positions of a head that are made, attended and written together.
constexpr Index kBlock = 1024;

// Queries that are attended together.
constexpr Index kQueryBlock = kernels::kPanel;

// Queries that attend to a block while it is at hand: keys and values are made again for every so many.
constexpr Index kChunk = 16 * kQueryBlock;

// Keys whose weights stay in the first-level cache between the softmax and the sum over values.
constexpr Index kKeyBlock = 128;

constexpr int kHeavyHitterEvery = 512;
constexpr Index kBand = 64;           // positions that a local head attends to, or twice as many
constexpr Index kRegion = 24;         // a drifting head's region, a side of it: this part of the trace
constexpr int kDriftTokens = 64;      // queries that a drifting region takes from one end of its way to the other
constexpr int kTokensPerSpan = 1024;  // of the prompt, for every piece of evidence
constexpr int kMostSpans = 8;
constexpr int kQueriesPerSpan = 4;    // that ask for the same evidence before the next one's turn
constexpr int kPromptWithSpans = 64;  // shorter ones have no evidence
constexpr int kVocabulary = 128'000;
constexpr int kSharedDirections = 4;  // of a head's values

// Lengths of the keys' components. What makes a logit is the product with the query's, which is drawn to suit.
constexpr float kSinkKey = 10;
constexpr float kHeavyKey = 6;
constexpr float kEvidenceKey = 6;
constexpr float kHeavyContent = 0.5F;  // of the noise that other keys have
constexpr float kPairKey = 3;
constexpr float kPairNoise = 0.15F;
constexpr float kChannelNoise = 0.1F;

// ---- Random numbers ----------------------------------------------------------------------------------------------
// Of a counter, so that any row of any head can be made again, alone and on any thread.

// SplitMix64's finaliser.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

enum class Stream : std::uint64_t {
  tokens,
  spans,
  heavy_hitters,
  keys,
  values,
  value_length,
  queries,
  taste,
  directions,
  evidence,
  projection,
  projection_rows,
  projection_columns,
  strength,
};

std::uint64_t stream(std::uint64_t seed, Stream kind, int layer = 0, int head = 0) {
  return mix(mix(mix(seed) + static_cast<std::uint64_t>(kind)) + (static_cast<std::uint64_t>(layer) << 32) +
             static_cast<std::uint64_t>(head));
}

std::uint64_t at(std::uint64_t stream, Index position) { return mix(stream + static_cast<std::uint64_t>(position)); }

// In [0, 1).
float uniform(std::uint64_t bits) { return static_cast<float>(bits >> 40) * 0x1p-24F; }

// Element i of a row: the sum of the four bytes of a hash, which is close to a normal distribution of mean 0 and
// deviation 1 (excess kurtosis -0.3, nothing beyond 3.45). The hash is MurmurHash3's finaliser, with the row's second
// half put in between.
inline float bell(std::uint32_t low, std::uint32_t high, std::uint32_t i) {
  std::uint32_t h = low + i * 0x9e3779b9U;
  h = (h ^ (h >> 16)) * 0x85ebca6bU;
  h = ((h ^ (h >> 13)) + high) * 0xc2b2ae35U;
  h ^= h >> 16;
  const std::uint32_t pairs = (h & 0x00ff00ffU) + ((h >> 8) & 0x00ff00ffU);
  const auto sum = static_cast<std::int32_t>((pairs & 0xffffU) + (pairs >> 16));
  constexpr float kDeviation = 147.80055F;  // sqrt(4 * (256^2 - 1) / 12)
  return static_cast<float>(sum - 510) * (1 / kDeviation);
}

void fill_bell(std::uint64_t row, std::span<float> out) {
  const auto low = static_cast<std::uint32_t>(row);
  const auto high = static_cast<std::uint32_t>(row >> 32);
  float* to = out.data();
  const auto size = static_cast<std::uint32_t>(out.size());
  for (std::uint32_t i = 0; i < size; ++i) to[i] = bell(low, high, i);
}

std::vector<float> unit_vector(std::uint64_t row, Index size) {
  std::vector<float> vector(static_cast<std::size_t>(size));
  fill_bell(row, vector);
  double square = 0;
  for (const float x : vector) square += static_cast<double>(x) * x;
  const auto factor = static_cast<float>(1 / std::sqrt(std::max(square, 1e-6)));
  for (float& x : vector) x *= factor;
  return vector;
}

// ---- Structure ---------------------------------------------------------------------------------------------------

// Which dimensions of a head carry what.
struct Channels {
  explicit Channels(int head_dim)
      : dim(head_dim),
        pairs(std::max(2, head_dim / 4)),
        sink(2 * pairs),
        heavy(sink + 1),
        evidence(heavy + 1),
        evidence_count(std::max(1, head_dim / 8)),
        content(evidence + evidence_count) {}

  Index dim;
  Index pairs;  // the cosines of all pairs come first, then the sines
  Index sink;
  Index heavy;
  Index evidence;
  Index evidence_count;
  Index content;  // the rest

  Index content_count() const { return dim - content; }
};

// Attention that the parts of a head's logits are made for, as a share of what the noise draws.
struct Shares {
  double deviation;  // of the noise's logits
  double sink;
  double heavy;
  double aimed;
  double evidence;
};

Shares shares_of(HeadRole role) {
  switch (role) {
    case HeadRole::local:
      return {1.0, 1.0, 0.3, 3.0, 0};
    case HeadRole::global:
      return {2.0, 1.2, 1.2, 0, 0};
    case HeadRole::drifting:
      return {1.5, 1.0, 0.3, 2.5, 0};
    case HeadRole::retrieval:
      return {1.5, 1.5, 0.3, 0, 4.0};
  }
  return {};
}

// How a head that is turned to a position attends around it.
struct Aim {
  Index first_pair = 0;  // slower ones follow; faster ones would make the band narrower
  double each = 0;       // largest logit of a pair
  double far = 0;        // log of the mean of exp(logit) far from the position
};

// How a query head makes its queries.
struct QueryPlan {
  HeadRole role = HeadRole::local;
  float sink = 0;  // the query's components, along the channels
  float heavy = 0;
  float evidence = 0;
  std::vector<float> pairs;    // their lengths
  std::vector<float> content;  // what it likes at any position
  float content_noise = 0;
  bool backward = false;  // the way of a drifting region
  std::uint64_t noise = 0;
};

// How far each pair of dimensions turns from one position to the next, in radians.
std::vector<double> frequencies_of(const SyntheticTrace& trace) {
  // From some tokens to twice the trace, so that no distance comes round again.
  constexpr double kFastest = 0.7;
  const double slowest = std::numbers::pi / std::max(trace.num_tokens(), 16);
  const Index pairs = Channels(trace.head_dim).pairs;
  std::vector<double> frequencies;
  for (Index j = 0; j < pairs; ++j) {
    const double share = static_cast<double>(j) / static_cast<double>(pairs - 1);
    frequencies.push_back(kFastest * std::pow(slowest / kFastest, share));
  }
  return frequencies;
}

// Makes the tensors' elements.
class Generator {
 public:
  explicit Generator(const SyntheticTrace& trace)
      : trace_(trace),
        channels_(trace.head_dim),
        info_(describe(trace)),
        heavy_(heavy_hitters(trace)),
        frequencies_(frequencies_of(trace)),
        key_noise_(static_cast<std::size_t>(channels_.dim), 1.0F) {
    const Index pairs = channels_.pairs;
    std::fill_n(key_noise_.begin(), 2 * pairs, kPairNoise);
    std::fill_n(key_noise_.begin() + channels_.sink, channels_.content - channels_.sink, kChannelNoise);
    fine_ = rotations(kFine, 1);
    coarse_ = rotations((trace.num_tokens() + kFine - 1) / kFine, kFine);
    const double share_of_bands = shares_of(HeadRole::local).aimed;
    bands_ = {aim(0, kBand, share_of_bands), aim(pairs / 8, 2 * kBand, share_of_bands)};
    region_ = aim(pairs / 2, std::max<Index>(trace.num_tokens() / kRegion, kBand), shares_of(HeadRole::drifting).aimed);
  }

  const TraceInfo& info() const { return info_; }

  // Keys [count, D] of the positions from `first` on.
  void keys(int layer, int kv_head, Index first, Index count, float* out) const {
    const std::uint64_t noise = stream(trace_.seed, Stream::keys, layer, kv_head);
    const Index dim = channels_.dim;
    const Index pairs = channels_.pairs;
    for (Index i = 0; i < count; ++i) {
      float* key = out + i * dim;
      const Index position = first + i;
      fill_bell(at(noise, position), {key, static_cast<std::size_t>(dim)});
      const float* scale = key_noise_.data();
      for (Index d = 0; d < dim; ++d) key[d] *= scale[d];
      const float* fine = fine_.data() + position % kFine * 2 * pairs;
      const float* coarse = coarse_.data() + position / kFine * 2 * pairs;
      for (Index j = 0; j < pairs; ++j) {
        key[j] += kPairKey * (fine[j] * coarse[j] - fine[pairs + j] * coarse[pairs + j]);
        key[pairs + j] += kPairKey * (fine[pairs + j] * coarse[j] + fine[j] * coarse[pairs + j]);
      }
    }
    // What is attended for what it is, and not for where it stands, carries no position.
    const auto key_at = [&](Index position) { return out + (position - first) * dim; };
    for (Index sink = first; sink < std::min<Index>(kSinks, first + count); ++sink) {
      std::fill_n(key_at(sink), dim, 0.0F);
      key_at(sink)[channels_.sink] = kSinkKey * (1 - 0.03F * static_cast<float>(sink));
    }
    const std::uint64_t strength = stream(trace_.seed, Stream::strength, layer, kv_head);
    for (auto heavy = std::ranges::lower_bound(heavy_, first); heavy != heavy_.end() && *heavy < first + count;
         ++heavy) {
      // Most of how heavy one is goes for all heads.
      const float common = uniform(at(stream(trace_.seed, Stream::strength), *heavy));
      const float own = uniform(at(strength, *heavy));
      std::fill_n(key_at(*heavy), 2 * pairs, 0.0F);
      for (Index d = channels_.content; d < dim; ++d) key_at(*heavy)[d] *= kHeavyContent;
      key_at(*heavy)[channels_.heavy] += kHeavyKey * (0.75F + 0.2F * common + 0.05F * own);
    }
    for (std::size_t s = 0; s < info_.spans.size(); ++s) {
      const Span& span = info_.spans[s];
      for (Index position = std::max<Index>(span.start, first); position < std::min<Index>(span.end, first + count);
           ++position) {
        std::fill_n(key_at(position), 2 * pairs, 0.0F);
        key_at(position)[channels_.evidence + static_cast<Index>(s) % channels_.evidence_count] +=
            kEvidenceKey * (0.9F + 0.1F * uniform(at(strength, position)));
      }
    }
  }

  // What is the same for all values of a head.
  struct ValuePlan {
    std::uint64_t noise = 0;
    std::uint64_t length = 0;
    std::vector<float> mean;
    std::vector<float> directions;             // [kSharedDirections, D]
    std::vector<std::vector<float>> evidence;  // per span
  };

  ValuePlan plan_values(int layer, int kv_head) const {
    ValuePlan plan;
    plan.noise = stream(trace_.seed, Stream::values, layer, kv_head);
    plan.length = stream(trace_.seed, Stream::value_length, layer, kv_head);
    const std::uint64_t directions = stream(trace_.seed, Stream::directions, layer, kv_head);
    const auto length = static_cast<float>(std::sqrt(static_cast<double>(channels_.dim)));
    const auto scaled = [&](std::vector<float> vector, float factor) {
      for (float& x : vector) x *= factor * length;
      return vector;
    };
    plan.mean = scaled(unit_vector(at(directions, 0), channels_.dim), 0.4F);
    for (int s = 0; s < kSharedDirections; ++s) {
      const auto direction =
          scaled(unit_vector(at(directions, 1 + s), channels_.dim), 0.5F / static_cast<float>(s + 1));
      plan.directions.insert(plan.directions.end(), direction.begin(), direction.end());
    }
    const std::uint64_t evidence = stream(trace_.seed, Stream::evidence, layer, kv_head);
    for (std::size_t s = 0; s < info_.spans.size(); ++s) {
      plan.evidence.push_back(scaled(unit_vector(at(evidence, static_cast<Index>(s)), channels_.dim), 1.5F));
    }
    return plan;
  }

  // Values [count, D] of the positions from `first` on.
  void values(const ValuePlan& plan, Index first, Index count, float* out) const {
    static_assert(kSharedDirections == 4);
    const Index dim = channels_.dim;
    const float* mean = plan.mean.data();
    const float* shared = plan.directions.data();
    for (Index i = 0; i < count; ++i) {
      float* value = out + i * dim;
      const Index position = first + i;
      const std::uint64_t row = at(plan.noise, position);
      fill_bell(row, {value, static_cast<std::size_t>(dim)});
      // Along the shared directions neighbours are alike: waves of some tokens to some thousand.
      std::array<float, kSharedDirections> wave{};
      double length = 40;
      for (std::size_t s = 0; s < wave.size(); ++s, length *= 6) {
        wave[s] = std::sin(
            static_cast<float>(std::fmod(static_cast<double>(position) / length + static_cast<double>(s), 1.0)) * 2 *
            std::numbers::pi_v<float>);
      }
      float size = std::exp(0.3F * bell(static_cast<std::uint32_t>(plan.length), static_cast<std::uint32_t>(row), 0));
      if (position < kSinks) size *= 0.05F;
      constexpr float kNoise = 0.7F;
      for (Index d = 0; d < dim; ++d) {
        value[d] = size * (kNoise * value[d] + mean[d] + wave[0] * shared[d] + wave[1] * shared[dim + d] +
                           wave[2] * shared[2 * dim + d] + wave[3] * shared[3 * dim + d]);
      }
    }
    for (std::size_t s = 0; s < info_.spans.size(); ++s) {
      const Span& span = info_.spans[s];
      for (Index position = std::max<Index>(span.start, first); position < std::min<Index>(span.end, first + count);
           ++position) {
        for (Index d = 0; d < dim; ++d)
          out[(position - first) * dim + d] += plan.evidence[s][static_cast<std::size_t>(d)];
      }
    }
  }

  QueryPlan plan_queries(int layer, int head) const {
    QueryPlan plan;
    plan.role = role_of(layer, head);
    const Shares shares = shares_of(plan.role);
    const double dim = trace_.head_dim;
    const double scale = info_.model.softmax_scale;
    plan.pairs.assign(static_cast<std::size_t>(channels_.pairs), 0.0F);
    plan.backward = (layer + head / 4) % 2 == 1;
    plan.noise = stream(trace_.seed, Stream::queries, layer, head);

    // The logarithm of what the noise draws, which the rest is measured by.
    double background = std::log(trace_.prompt_tokens) + shares.deviation * shares.deviation / 2;
    if (shares.aimed > 0) {
      const Aim& aim = plan.role == HeadRole::drifting ? region_ : bands_[static_cast<std::size_t>(head / 4 % 2)];
      for (Index j = aim.first_pair; j < channels_.pairs; ++j) {
        plan.pairs[static_cast<std::size_t>(j)] = static_cast<float>(aim.each / (kPairKey * scale));
      }
      background += aim.far;
    }
    // `content` of the noise is on the keys themselves, which then draw more by it.
    const auto component = [&](double share, double positions, double content, float key) {
      const double variance = content * content * shares.deviation * shares.deviation;
      const double logit = std::max(background - variance / 2 + std::log(share / positions), 1.0);
      return static_cast<float>(logit / (key * scale));
    };
    plan.sink = component(shares.sink, 3, 0, kSinkKey);
    plan.heavy = component(shares.heavy, std::max(0.4 * static_cast<double>(heavy_.size()), 1.0), kHeavyContent,
                           0.9F * kHeavyKey);
    if (shares.evidence > 0) plan.evidence = component(shares.evidence, 6, 1, kEvidenceKey);

    constexpr double kLasting = 0.7;  // of the noise's variance: the same for all queries of the head
    const auto content = static_cast<double>(channels_.content_count());
    const double length = shares.deviation * std::sqrt(dim / content);
    plan.content = unit_vector(at(stream(trace_.seed, Stream::taste, layer, head), 0), channels_.content_count());
    for (float& x : plan.content) x *= static_cast<float>(length * std::sqrt(kLasting * content));
    plan.content_noise = static_cast<float>(length * std::sqrt(1 - kLasting));
    return plan;
  }

  // One query [D].
  void query(const QueryPlan& plan, Index position, float* out) const {
    const Index pairs = channels_.pairs;
    std::fill_n(out, channels_.content, 0.0F);
    const Index aim = plan.role == HeadRole::drifting ? region_centre(plan, position) : position;
    for (Index j = 0; j < pairs; ++j) {
      const float length = plan.pairs[static_cast<std::size_t>(j)];
      if (length == 0) continue;
      const double angle =
          std::fmod(frequencies_[static_cast<std::size_t>(j)] * static_cast<double>(aim), 2 * std::numbers::pi);
      out[j] = length * static_cast<float>(std::cos(angle));
      out[pairs + j] = length * static_cast<float>(std::sin(angle));
    }
    out[channels_.sink] = plan.sink;
    out[channels_.heavy] = plan.heavy;
    if (plan.role == HeadRole::retrieval) {
      if (const auto span = asked_span(trace_, static_cast<int>(position))) {
        out[channels_.evidence + *span % channels_.evidence_count] = plan.evidence;
      }
    }
    const std::span content(out + channels_.content, static_cast<std::size_t>(channels_.content_count()));
    fill_bell(at(plan.noise, position), content);
    for (std::size_t d = 0; d < content.size(); ++d) {
      content[d] = plan.content_noise * content[d] + plan.content[d];
    }
  }

  // Rows [count, H·D] of a layer's output projection from `first` on: normal, with a deviation that keeps lengths, and
  // rows and columns of different lengths, so that its singular values spread more than those of noise.
  void projection(int layer, Index first, Index count, float* out) const {
    const Index width = Index{trace_.num_attention_heads} * trace_.head_dim;
    const std::uint64_t noise = stream(trace_.seed, Stream::projection, layer);
    const auto spread = [](std::uint64_t bits) { return std::exp2(uniform(bits) * 2 - 1); };
    std::vector<float> columns(static_cast<std::size_t>(width));
    const std::uint64_t column_lengths = stream(trace_.seed, Stream::projection_columns, layer);
    for (Index i = 0; i < width; ++i) columns[static_cast<std::size_t>(i)] = spread(at(column_lengths, i));
    const std::uint64_t row_lengths = stream(trace_.seed, Stream::projection_rows, layer);
    for (Index row = 0; row < count; ++row) {
      float* weights = out + row * width;
      fill_bell(at(noise, first + row), {weights, static_cast<std::size_t>(width)});
      const float factor = spread(at(row_lengths, first + row)) / std::sqrt(static_cast<float>(width));
      for (Index i = 0; i < width; ++i) weights[i] *= factor * columns[static_cast<std::size_t>(i)];
    }
  }

 private:
  static constexpr Index kFine = 64;

  // Cosines and sines of all frequencies at `count` positions, `step` apart.
  std::vector<float> rotations(Index count, Index step) const {
    const Index pairs = channels_.pairs;
    std::vector<float> table(static_cast<std::size_t>(count * 2 * pairs));
    for (Index i = 0; i < count; ++i) {
      for (Index j = 0; j < pairs; ++j) {
        const double angle =
            std::fmod(frequencies_[static_cast<std::size_t>(j)] * static_cast<double>(i * step), 2 * std::numbers::pi);
        table[static_cast<std::size_t>(i * 2 * pairs + j)] = static_cast<float>(std::cos(angle));
        table[static_cast<std::size_t>(i * 2 * pairs + pairs + j)] = static_cast<float>(std::sin(angle));
      }
    }
    return table;
  }

  // A query turned to position c has the logit a Σ cos(ω (c - n)) for the key at n: largest at c, and far from it,
  // where the pairs are out of step, sometimes large as well. Finds a such that the `width` nearest keys on one side
  // draw `share` times what the farther ones do, or the largest where it takes very large logits.
  Aim aim(Index first_pair, Index width, double share) const {
    constexpr double kLargestLogit = 24;
    constexpr Index kSamples = 4096;
    const auto count = static_cast<double>(channels_.pairs - first_pair);
    const Index tokens = trace_.num_tokens();
    width = std::min(width, tokens);
    const auto in_step = [&](Index distance) {
      double sum = 0;
      for (Index j = first_pair; j < channels_.pairs; ++j) {
        sum += std::cos(frequencies_[static_cast<std::size_t>(j)] * static_cast<double>(distance));
      }
      return sum;
    };
    std::vector<double> near;
    std::vector<double> far;
    const Index near_step = (width + kSamples - 1) / kSamples;
    for (Index distance = 0; distance < width; distance += near_step) near.push_back(in_step(distance));
    const Index far_step = (tokens - width + kSamples - 1) / kSamples;
    for (Index distance = width; distance < tokens; distance += far_step) far.push_back(in_step(distance));
    if (far.empty()) far.push_back(0);
    const auto log_mean = [](const std::vector<double>& steps, double each) {
      double sum = 0;
      for (const double step : steps) sum += std::exp(each * step);
      return std::log(sum / static_cast<double>(steps.size()));
    };
    const double wanted =
        std::log(share * static_cast<double>(std::max<Index>(tokens - width, 1)) / static_cast<double>(width));
    double low = 0;
    double high = kLargestLogit / count;
    for (int step = 0; step < 30; ++step) {
      const double middle = (low + high) / 2;
      (log_mean(near, middle) - log_mean(far, middle) < wanted ? low : high) = middle;
    }
    return {first_pair, low, log_mean(far, low)};
  }

  // Where a drifting head looks: to and fro between a quarter and 85 % of what came before the query, one way taking
  // kDriftTokens queries, of which half are the prompt's last.
  Index region_centre(const QueryPlan& plan, Index position) const {
    const Index start = trace_.prompt_tokens - kDriftTokens / 2;
    const Index period = 2 * kDriftTokens;
    const Index phase = ((position - start) % period + period) % period;
    const double way = static_cast<double>(phase < kDriftTokens ? phase : period - phase) / kDriftTokens;
    const double share = 0.25 + 0.6 * (plan.backward ? 1 - way : way);
    const auto before = static_cast<double>(std::min<Index>(position, trace_.prompt_tokens));
    return static_cast<Index>(share * before);
  }

  SyntheticTrace trace_;
  Channels channels_;
  TraceInfo info_;
  std::vector<int> heavy_;
  std::vector<double> frequencies_;  // in radians per position
  std::vector<float> key_noise_;     // [D], deviations
  std::array<Aim, 2> bands_;         // of local heads
  Aim region_;                       // of drifting heads
  std::vector<float> fine_;          // rotations of positions 0 to kFine - 1
  std::vector<float> coarse_;        // of every kFine-th position
};

int span_count(const SyntheticTrace& trace) {
  if (trace.prompt_tokens < kPromptWithSpans) return 0;
  return std::clamp(trace.prompt_tokens / kTokensPerSpan, 2, kMostSpans);
}

// Between 5 % and 90 % of the prompt, one in each of as many equal parts.
std::vector<Span> place_spans(const SyntheticTrace& trace) {
  const int count = span_count(trace);
  std::vector<Span> spans;
  const std::uint64_t places = stream(trace.seed, Stream::spans);
  for (int s = 0; s < count; ++s) {
    const double part = 0.85 * trace.prompt_tokens / count;
    const int length = std::min(8 + static_cast<int>(at(places, 2 * s) % 9), static_cast<int>(part) / 2);
    const double room = part - length;
    const int start = std::max(static_cast<int>(0.05 * trace.prompt_tokens + s * part +
                                                room * static_cast<double>(uniform(at(places, 2 * s + 1)))),
                               kSinks);
    spans.push_back({start, start + length, fmt::format("{}-evidence-{}", s % 2 == 0 ? "hinted" : "late", s)});
  }
  return spans;
}

// ---- Writing -----------------------------------------------------------------------------------------------------

// Lets pieces of shared work do something one after the other, in the order of their numbers.
class Turns {
 public:
  // Does `work` when all lower turns are over, unless one of them failed.
  template <class Work>
  void take(Index turn, const Work& work) {
    std::unique_lock lock(mutex_);
    turn_came_.wait(lock, [&] { return turn_ == turn || failed_; });
    if (failed_) return;
    work();
    ++turn_;
    turn_came_.notify_all();
  }

  // Nobody waits any longer.
  void give_up() {
    const std::lock_guard lock(mutex_);
    failed_ = true;
    turn_came_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_came_;
  Index turn_ = 0;
  bool failed_ = false;
};

// Shares pieces that take turns at their end: make(piece, worker), then finish(piece, worker) in the order of pieces.
template <class Make, class Finish>
void share_in_order(const Execution& execution, Index pieces, const Make& make, const Finish& finish) {
  Turns turns;
  execution.share(pieces, std::numeric_limits<Index>::max(), [&](Index piece, int worker) {
    try {
      make(piece, worker);
      turns.take(piece, [&] { finish(piece, worker); });
    } catch (...) {
      turns.give_up();
      throw;
    }
  });
}

// Writes the tensors of one trace.
class TraceMaker {
 public:
  TraceMaker(const SyntheticTrace& trace, const std::filesystem::path& path, const Execution& execution)
      : trace_(trace),
        execution_(execution),
        generator_(trace),
        info_(generator_.info()),
        dim_(trace.head_dim),
        group_(info_.model.group_size()),
        writer_(path, info_, trace.dtype),
        workspaces_(static_cast<std::size_t>(execution.threads())) {
    if (trace_.attention_mass && info_.query_positions.front() > 0) {
      for (std::int32_t position = 0; position < info_.query_positions.front(); ++position) {
        attended_.push_back(position);
      }
    }
    first_captured_ = static_cast<Index>(attended_.size());
    attended_.insert(attended_.end(), info_.query_positions.begin(), info_.query_positions.end());
  }

  void write(const std::function<void(double share)>& on_progress) {
    const int groups = trace_.num_layers * trace_.num_key_value_heads;
    for (int layer = 0; layer < trace_.num_layers; ++layer) {
      for (int kv_head = 0; kv_head < trace_.num_key_value_heads; ++kv_head) {
        write_group(layer, kv_head);
        const int done = layer * trace_.num_key_value_heads + kv_head + 1;
        if (on_progress) on_progress(static_cast<double>(done) / groups);
      }
      if (trace_.output_projection) write_projection(layer);
    }
    writer_.finish();
  }

 private:
  // What a block of keys adds to a block of queries, with weights relative to the largest logit among them.
  struct Partial {
    float maxima[kQueryBlock];
    double sums[kQueryBlock];
    std::vector<float> outputs;  // [D, kQueryBlock]
  };

  struct Workspace {
    std::vector<float> rows;            // as they are made: [kBlock, D], or some of the projection
    std::vector<std::byte> keys;        // as stored
    std::vector<std::byte> values;      // as stored
    std::vector<float> widened_keys;    // [kBlock, D]
    std::vector<float> widened_values;  // [kBlock, D]
    std::vector<float> logits;          // [kBlock, kQueryBlock]
    std::vector<Partial> partials;      // of each block of queries
  };

  // Up to kQueryBlock queries that attend together. Those of a group's heads at one position follow each other.
  struct QueryRows {
    Index first = 0;  // row, over positions and heads of the group
    Index count = 0;
    Index keys = 0;              // that the last of them sees
    std::vector<float> columns;  // [D, kQueryBlock], scaled
    // Over all blocks of keys so far; in the end the largest logit of all and what the weights add up to.
    double maxima[kQueryBlock];
    double sums[kQueryBlock];
    std::vector<double> outputs;  // [D, kQueryBlock]
  };

  Index position_of(Index row) const { return attended_[static_cast<std::size_t>(row / group_)]; }

  // Everything of one KV head, and of the query heads that read it.
  void write_group(int layer, int kv_head) {
    std::vector<QueryPlan> plans;
    for (Index member = 0; member < group_; ++member) {
      plans.push_back(generator_.plan_queries(layer, static_cast<int>(kv_head * group_ + member)));
    }
    const Generator::ValuePlan values = generator_.plan_values(layer, kv_head);
    const Index captured = info_.num_queries();
    std::vector<float> outputs(static_cast<std::size_t>(group_ * captured * dim_));
    std::vector<double> mass(trace_.attention_mass ? static_cast<std::size_t>(group_ * trace_.prompt_tokens) : 0);

    const Index rows = static_cast<Index>(attended_.size()) * group_;
    for (Index first = 0; first < rows; first += kChunk) {
      std::vector<QueryRows> chunk;
      for (Index start = first; start < std::min(rows, first + kChunk); start += kQueryBlock) {
        chunk.push_back(prepare_queries(plans, start, std::min(kQueryBlock, rows - start)));
      }
      attend(layer, kv_head, values, chunk, first == 0);
      for (const QueryRows& queries : chunk) keep_outputs(queries, outputs);
      if (trace_.attention_mass) sum_mass(layer, kv_head, chunk, mass);
    }

    std::vector<float> queries(static_cast<std::size_t>(captured * dim_));
    for (Index member = 0; member < group_; ++member) {
      const int head = static_cast<int>(kv_head * group_ + member);
      for (Index i = 0; i < captured; ++i) {
        generator_.query(plans[static_cast<std::size_t>(member)], info_.query_positions[static_cast<std::size_t>(i)],
                         queries.data() + i * dim_);
      }
      writer_.write_rows(layer, HeadTensor::queries, head, 0, queries);
      writer_.write_rows(
          layer, HeadTensor::outputs, head, 0,
          std::span<const float>(outputs).subspan(static_cast<std::size_t>(member * captured * dim_), queries.size()));
      if (trace_.attention_mass) {
        const auto sums = mass.begin() + member * trace_.prompt_tokens;
        writer_.write_attention_mass_of(layer, head, std::vector<float>(sums, sums + trace_.prompt_tokens));
      }
    }
  }

  QueryRows prepare_queries(const std::vector<QueryPlan>& plans, Index first, Index count) const {
    QueryRows rows;
    rows.first = first;
    rows.count = count;
    rows.keys = position_of(first + count - 1) + 1;
    rows.columns.resize(static_cast<std::size_t>(dim_ * kQueryBlock));
    rows.outputs.resize(rows.columns.size());
    std::fill_n(rows.maxima, kQueryBlock, -std::numeric_limits<double>::infinity());
    std::fill_n(rows.sums, kQueryBlock, 0.0);
    std::vector<float> query(static_cast<std::size_t>(dim_));
    std::vector<std::byte> stored(query.size() * size_of(trace_.dtype));
    const auto scale = static_cast<float>(info_.model.softmax_scale);
    for (Index i = 0; i < count; ++i) {
      generator_.query(plans[static_cast<std::size_t>((first + i) % group_)], position_of(first + i), query.data());
      from_float32(trace_.dtype, query, stored.data());
      to_float32(trace_.dtype, stored.data(), query);
      for (Index d = 0; d < dim_; ++d) {
        rows.columns[static_cast<std::size_t>(d * kQueryBlock + i)] = query[static_cast<std::size_t>(d)] * scale;
      }
    }
    return rows;
  }

  // Makes a block's keys, as they are stored and as they are read again.
  void make_keys(int layer, int kv_head, Index first, Index count, Workspace& work) const {
    const auto size = static_cast<std::size_t>(count * dim_);
    work.rows.resize(static_cast<std::size_t>(std::max<Index>(work.rows.size(), kBlock * dim_)));
    work.widened_keys.resize(static_cast<std::size_t>(kBlock * dim_));
    work.keys.resize(size * size_of(trace_.dtype));
    generator_.keys(layer, kv_head, first, count, work.rows.data());
    from_float32(trace_.dtype, std::span(work.rows).first(size), work.keys.data());
    to_float32(trace_.dtype, work.keys.data(), std::span(work.widened_keys).first(size));
  }

  void make_values(const Generator::ValuePlan& plan, Index first, Index count, Workspace& work) const {
    const auto size = static_cast<std::size_t>(count * dim_);
    work.widened_values.resize(static_cast<std::size_t>(kBlock * dim_));
    work.values.resize(size * size_of(trace_.dtype));
    generator_.values(plan, first, count, work.rows.data());
    from_float32(trace_.dtype, std::span(work.rows).first(size), work.values.data());
    to_float32(trace_.dtype, work.values.data(), std::span(work.widened_values).first(size));
  }

  // Logits [keys, kQueryBlock] of a block of keys from `first` on; what a query does not see is -infinity.
  void multiply_logits(const QueryRows& queries, Index first, Index keys, Workspace& work) const {
    work.logits.resize(static_cast<std::size_t>(kBlock * kQueryBlock));
    float* logits = work.logits.data();
    kernels::multiply(keys, kQueryBlock, dim_, work.widened_keys.data(), dim_, 1, queries.columns.data(), kQueryBlock,
                      logits, kQueryBlock);
    for (Index i = 0; i < queries.count && position_of(queries.first + i) < first + keys - 1; ++i) {
      for (Index j = std::max<Index>(position_of(queries.first + i) + 1 - first, 0); j < keys; ++j) {
        logits[j * kQueryBlock + i] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Attends a chunk's queries to all that they see; the first time also writes the group's keys and values.
  void attend(int layer, int kv_head, const Generator::ValuePlan& values, std::vector<QueryRows>& chunk, bool writing) {
    const Index end = writing ? info_.num_tokens() : chunk.back().keys;
    share_in_order(
        execution_, (end + kBlock - 1) / kBlock,
        [&](Index piece, int worker) {
          Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          const Index first = piece * kBlock;
          const Index count = std::min(kBlock, end - first);
          make_keys(layer, kv_head, first, count, work);
          make_values(values, first, count, work);
          work.partials.resize(std::max(work.partials.size(), chunk.size()));
          for (std::size_t i = 0; i < chunk.size(); ++i) {
            if (chunk[i].keys > first) attend_block(chunk[i], first, std::min(count, chunk[i].keys - first), work, i);
          }
        },
        [&](Index piece, int worker) {
          const Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          const Index first = piece * kBlock;
          if (writing) {
            writer_.write_rows(layer, HeadTensor::keys, kv_head, first, std::span<const std::byte>(work.keys));
            writer_.write_rows(layer, HeadTensor::values, kv_head, first, std::span<const std::byte>(work.values));
          }
          for (std::size_t i = 0; i < chunk.size(); ++i) {
            if (chunk[i].keys > first) merge(work.partials[i], chunk[i]);
          }
        });
  }

  void attend_block(const QueryRows& queries, Index first, Index keys, Workspace& work, std::size_t number) const {
    Partial& partial = work.partials[number];
    multiply_logits(queries, first, keys, work);
    std::fill_n(partial.maxima, kQueryBlock, -std::numeric_limits<float>::infinity());
    kernels::raise_maxima(keys, kQueryBlock, work.logits.data(), partial.maxima);
    std::fill_n(partial.sums, kQueryBlock, 0.0);
    partial.outputs.assign(static_cast<std::size_t>(dim_ * kQueryBlock), 0.0F);
    // A query that sees none of the keys has no largest logit; any number leaves its weights 0.
    float maxima[kQueryBlock];
    for (Index i = 0; i < kQueryBlock; ++i) maxima[i] = std::isinf(partial.maxima[i]) ? 0 : partial.maxima[i];
    for (Index start = 0; start < keys; start += kKeyBlock) {
      const Index count = std::min(kKeyBlock, keys - start);
      float* weights = work.logits.data() + start * kQueryBlock;
      kernels::exponentiate_and_sum(count, kQueryBlock, maxima, weights, partial.sums);
      kernels::add_product(dim_, kQueryBlock, count, work.widened_values.data() + start * dim_, 1, dim_, weights,
                           kQueryBlock, partial.outputs.data(), kQueryBlock);
    }
  }

  void merge(const Partial& partial, QueryRows& queries) const {
    double before[kQueryBlock];
    double added[kQueryBlock];
    for (Index i = 0; i < kQueryBlock; ++i) {
      const double largest = std::max(queries.maxima[i], static_cast<double>(partial.maxima[i]));
      // Infinities of queries that saw nothing so far, or nothing here.
      before[i] = queries.sums[i] > 0 ? std::exp(queries.maxima[i] - largest) : 0;
      added[i] = partial.sums[i] > 0 ? std::exp(static_cast<double>(partial.maxima[i]) - largest) : 0;
      queries.maxima[i] = largest;
      queries.sums[i] = queries.sums[i] * before[i] + partial.sums[i] * added[i];
    }
    for (Index d = 0; d < dim_; ++d) {
      double* sums = queries.outputs.data() + d * kQueryBlock;
      const float* more = partial.outputs.data() + d * kQueryBlock;
      for (Index i = 0; i < kQueryBlock; ++i) sums[i] = sums[i] * before[i] + static_cast<double>(more[i]) * added[i];
    }
  }

  // Puts a block's outputs where the trace has them, [H/K, Q, D].
  void keep_outputs(const QueryRows& queries, std::vector<float>& outputs) const {
    for (Index i = 0; i < queries.count; ++i) {
      const Index query = (queries.first + i) / group_ - first_captured_;
      if (query < 0) continue;
      float* out = outputs.data() + ((queries.first + i) % group_ * info_.num_queries() + query) * dim_;
      for (Index d = 0; d < dim_; ++d) {
        out[d] = static_cast<float>(queries.outputs[static_cast<std::size_t>(d * kQueryBlock + i)] / queries.sums[i]);
      }
    }
  }

  // Adds the attention that the chunk's prompt queries give to each key to `mass`, [H/K, P].
  void sum_mass(int layer, int kv_head, const std::vector<QueryRows>& chunk, std::vector<double>& mass) {
    const Index prompt = trace_.prompt_tokens;
    const Index end = std::min(chunk.back().keys, prompt);
    execution_.share((end + kBlock - 1) / kBlock, std::numeric_limits<Index>::max(), [&](Index piece, int worker) {
      Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
      const Index first = piece * kBlock;
      const Index count = std::min(kBlock, end - first);
      make_keys(layer, kv_head, first, count, work);
      for (const QueryRows& queries : chunk) {
        if (queries.keys <= first) continue;
        const Index keys = std::min(count, queries.keys - first);
        multiply_logits(queries, first, keys, work);
        float maxima[kQueryBlock];
        for (Index i = 0; i < kQueryBlock; ++i) maxima[i] = static_cast<float>(queries.maxima[i]);
        double ignored[kQueryBlock] = {};
        kernels::exponentiate_and_sum(keys, kQueryBlock, maxima, work.logits.data(), ignored);
        for (Index member = 0; member < group_; ++member) {
          float factors[kQueryBlock] = {};
          for (Index i = 0; i < queries.count; ++i) {
            const Index row = queries.first + i;
            if (row % group_ == member && position_of(row) < prompt)
              factors[i] = static_cast<float>(1 / queries.sums[i]);
          }
          kernels::add_mass(keys, kQueryBlock, work.logits.data(), factors, mass.data() + member * prompt + first);
        }
      }
    });
  }

  void write_projection(int layer) {
    const Index width = Index{trace_.num_attention_heads} * dim_;
    const Index rows = std::max<Index>(kBlock * dim_ / width, 1);
    const auto count_of = [&](Index piece) { return std::min(rows, trace_.hidden_size - piece * rows); };
    share_in_order(
        execution_, (trace_.hidden_size + rows - 1) / rows,
        [&](Index piece, int worker) {
          Workspace& work = workspaces_[static_cast<std::size_t>(worker)];
          work.rows.resize(static_cast<std::size_t>(std::max(kBlock * dim_, rows * width)));
          generator_.projection(layer, piece * rows, count_of(piece), work.rows.data());
        },
        [&](Index piece, int worker) {
          const std::span<const float> made = workspaces_[static_cast<std::size_t>(worker)].rows;
          writer_.write_output_projection_rows(layer, piece * rows,
                                               made.first(static_cast<std::size_t>(count_of(piece) * width)));
        });
  }

  SyntheticTrace trace_;
  const Execution& execution_;
  Generator generator_;
  const TraceInfo& info_;
  Index dim_;
  Index group_;
  TraceWriter writer_;
  std::vector<Workspace> workspaces_;
  std::vector<std::int32_t> attended_;  // positions of all queries that attend
  Index first_captured_ = 0;            // among them
};

}  // namespace

HeadRole role_of(int layer, int query_head) {
  constexpr std::array kRoles = {HeadRole::local, HeadRole::global, HeadRole::drifting, HeadRole::retrieval};
  return kRoles[static_cast<std::size_t>(layer + query_head) % kRoles.size()];
}

std::vector<int> heavy_hitters(const SyntheticTrace& trace) {
  const std::uint64_t draw = stream(trace.seed, Stream::heavy_hitters);
  std::vector<int> positions;
  for (int position = kSinks; position < trace.prompt_tokens; ++position) {
    if (at(draw, position) % kHeavyHitterEvery == 0) positions.push_back(position);
  }
  return positions;
}

std::optional<int> asked_span(const SyntheticTrace& trace, int position) {
  const int spans = span_count(trace);
  if (spans == 0 || position < trace.prompt_tokens - kHintingQueries) return std::nullopt;
  if (position >= trace.prompt_tokens) return (position - trace.prompt_tokens) / kQueriesPerSpan % spans;
  const int hinted = (spans + 1) / 2;
  return (position - trace.prompt_tokens + kHintingQueries) / kQueriesPerSpan % hinted * 2;
}

TraceInfo describe(const SyntheticTrace& trace) {
  const auto refuse = [](const std::string& reason) { throw UsageError(fmt::format("a synthetic trace {}", reason)); };
  if (trace.num_layers < 1 || trace.num_attention_heads < 1 || trace.num_key_value_heads < 1 || trace.hidden_size < 1) {
    refuse("needs at least one layer, query head, KV head and hidden dimension");
  }
  if (trace.num_attention_heads % trace.num_key_value_heads != 0) {
    refuse(fmt::format("cannot have {} query heads on {} KV heads: they must share them evenly",
                       trace.num_attention_heads, trace.num_key_value_heads));
  }
  if (trace.head_dim < 8) refuse(fmt::format("needs a head dimension of at least 8, not {}", trace.head_dim));
  if (trace.prompt_tokens < 1 || trace.later_tokens < 0 || trace.num_tokens() < 2) {
    refuse(fmt::format("needs a prompt and 2 tokens in all, not {} and {} after it", trace.prompt_tokens,
                       trace.later_tokens));
  }
  if (trace.query_window && *trace.query_window < 1) refuse("needs a query window of at least 1");

  TraceInfo info;
  info.model.name = "synthetic";
  info.model.architecture = "synthetic";
  info.model.num_layers = trace.num_layers;
  info.model.num_attention_heads = trace.num_attention_heads;
  info.model.num_key_value_heads = trace.num_key_value_heads;
  info.model.head_dim = trace.head_dim;
  info.model.hidden_size = trace.hidden_size;
  info.model.softmax_scale = 1 / std::sqrt(static_cast<double>(trace.head_dim));
  info.source = fmt::format("synthetic, seed {}: no model was run", trace.seed);
  info.prompt_length = trace.prompt_tokens;
  const std::uint64_t tokens = stream(trace.seed, Stream::tokens);
  for (int position = 0; position < trace.num_tokens(); ++position) {
    info.token_ids.push_back(static_cast<std::int32_t>(at(tokens, position) % kVocabulary));
  }
  const int first = trace.query_window ? std::max(0, trace.prompt_tokens - *trace.query_window) : 0;
  for (int position = first; position < trace.num_tokens(); ++position) info.query_positions.push_back(position);
  info.spans = place_spans(trace);
  const std::vector<double> frequencies = frequencies_of(trace);
  info.rotary = {{.name = "place", .inverse_frequencies = {frequencies.begin(), frequencies.end()}}};
  info.layers.assign(static_cast<std::size_t>(trace.num_layers), info.model.layer());
  for (LayerInfo& layer : info.layers) layer.rotary = "place";
  return info;
}

void write_synthetic(const SyntheticTrace& trace, const std::filesystem::path& path, const Execution& execution,
                     const std::function<void(double share)>& on_progress) {
  TraceMaker(trace, path, execution).write(on_progress);
}

}  // namespace kvreplay::tracer
