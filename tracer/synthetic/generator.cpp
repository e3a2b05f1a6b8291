#include "tracer/synthetic/generator.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

#include "tracer/synthetic/random.h"

namespace kvreplay::tracer {

namespace {

constexpr Index kBand = 64;           // positions that a local head attends to, or twice as many
constexpr Index kRegion = 24;         // a drifting head's region, a side of it: this part of the trace
constexpr int kDriftTokens = 64;      // queries that a drifting region takes from one end of its way to the other
constexpr int kSharedDirections = 4;  // of a head's values
constexpr Index kFine = 64;           // positions whose rotations are stored one by one

// Lengths of the keys' components. What makes a logit is the product with the query's, which is drawn to suit.
constexpr float kSinkKey = 10;
constexpr float kHeavyKey = 6;
constexpr float kEvidenceKey = 6;
constexpr float kHeavyContent = 0.5F;  // of the noise that other keys have
constexpr float kPairKey = 3;
constexpr float kPairNoise = 0.15F;
constexpr float kChannelNoise = 0.1F;

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

}  // namespace

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

Generator::Generator(const SyntheticTrace& trace)
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

void Generator::keys(int layer, int kv_head, Index first, Index count, float* out) const {
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
  for (auto heavy = std::ranges::lower_bound(heavy_, first); heavy != heavy_.end() && *heavy < first + count; ++heavy) {
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

ValuePlan Generator::plan_values(int layer, int kv_head) const {
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
    const auto direction = scaled(unit_vector(at(directions, 1 + s), channels_.dim), 0.5F / static_cast<float>(s + 1));
    plan.directions.insert(plan.directions.end(), direction.begin(), direction.end());
  }
  const std::uint64_t evidence = stream(trace_.seed, Stream::evidence, layer, kv_head);
  for (std::size_t s = 0; s < info_.spans.size(); ++s) {
    plan.evidence.push_back(scaled(unit_vector(at(evidence, static_cast<Index>(s)), channels_.dim), 1.5F));
  }
  return plan;
}

void Generator::values(const ValuePlan& plan, Index first, Index count, float* out) const {
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
      wave[s] =
          std::sin(static_cast<float>(std::fmod(static_cast<double>(position) / length + static_cast<double>(s), 1.0)) *
                   2 * std::numbers::pi_v<float>);
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

QueryPlan Generator::plan_queries(int layer, int head) const {
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
  plan.heavy =
      component(shares.heavy, std::max(0.4 * static_cast<double>(heavy_.size()), 1.0), kHeavyContent, 0.9F * kHeavyKey);
  if (shares.evidence > 0) plan.evidence = component(shares.evidence, 6, 1, kEvidenceKey);

  constexpr double kLasting = 0.7;  // of the noise's variance: the same for all queries of the head
  const auto content = static_cast<double>(channels_.content_count());
  const double length = shares.deviation * std::sqrt(dim / content);
  plan.content = unit_vector(at(stream(trace_.seed, Stream::taste, layer, head), 0), channels_.content_count());
  for (float& x : plan.content) x *= static_cast<float>(length * std::sqrt(kLasting * content));
  plan.content_noise = static_cast<float>(length * std::sqrt(1 - kLasting));
  return plan;
}

void Generator::query(const QueryPlan& plan, Index position, float* out) const {
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

void Generator::projection(int layer, Index first, Index count, float* out) const {
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

std::vector<float> Generator::rotations(Index count, Index step) const {
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

Generator::Aim Generator::aim(Index first_pair, Index width, double share) const {
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

Index Generator::region_centre(const QueryPlan& plan, Index position) const {
  const Index start = trace_.prompt_tokens - kDriftTokens / 2;
  const Index period = 2 * kDriftTokens;
  const Index phase = ((position - start) % period + period) % period;
  const double way = static_cast<double>(phase < kDriftTokens ? phase : period - phase) / kDriftTokens;
  const double share = 0.25 + 0.6 * (plan.backward ? 1 - way : way);
  const auto before = static_cast<double>(std::min<Index>(position, trace_.prompt_tokens));
  return static_cast<Index>(share * before);
}

}  // namespace kvreplay::tracer
