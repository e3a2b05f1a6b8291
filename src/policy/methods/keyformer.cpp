// Keyformer (arXiv 2403.09054): what was dropped took its share of the softmax along, and noise on the logits keeps
// what is left from being trusted too far.
//
// Score of position n: Σ_t softmax_n((x_tn + ζ_tn) / τ_t), x being the logits of query t over the cache, ζ noise of
// Gumbel's distribution, and τ_t = tau + i · tau-step, i the tokens generated so far (paper, section 3; the authors'
// code). Beside the last `recent` positions, the coming token among them, those with the highest sums are kept. So is
// the code, which masks instead of dropping, but for good. The row that leaves the recent ones is not yet a candidate
// and is lost: every generated token goes through that place, so that the key tokens are chosen once, among the
// prompt's positions, and never change.
//
// noise=gumbel draws from the seed, a number per layer, query head, query and key alone. file=FILE takes it from a
// file: /gumbel_noise, [layers, query heads, queries, keys]. Logits are attention's logarithms, which is all
// the same to a softmax. The code's budgets are shares of the prompt, and it runs without grouped queries alone.
#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "base/error.h"
#include "base/softmax.h"
#include "hdf5/hdf5.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

// Adds noise to the logits of one query.
class Noise {
 public:
  virtual ~Noise() = default;

  virtual void check(const HeadShape& /*shape*/) const {}
  virtual void check_run(const RunIdentity& /*run*/) const {}

  // To the logits [R] of the query at `query` over the keys at `positions`.
  virtual void add(int layer, int query_head, int query, std::span<const int> positions,
                   Eigen::Ref<Eigen::RowVectorXf> logits) const = 0;
};

class DrawnNoise : public Noise {
 public:
  explicit DrawnNoise(int seed) : seed_(static_cast<std::uint64_t>(seed)) {}

  void add(int layer, int query_head, int query, std::span<const int> positions,
           Eigen::Ref<Eigen::RowVectorXf> logits) const override {
    const std::uint64_t stream =
        mix(mix(mix(mix(seed_) ^ static_cast<std::uint64_t>(layer)) ^ static_cast<std::uint64_t>(query_head)) ^
            static_cast<std::uint64_t>(query));
    for (std::size_t n = 0; n < positions.size(); ++n) {
      const std::uint64_t bits = mix(stream ^ static_cast<std::uint64_t>(positions[n])) >> 11;
      const double uniform = (static_cast<double>(bits) + 0.5) / 9007199254740992.0;  // 2⁵³
      logits(static_cast<Index>(n)) += static_cast<float>(-std::log(-std::log(uniform)));
    }
  }

 private:
  // SplitMix64's output function.
  static std::uint64_t mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
  }

  std::uint64_t seed_;
};

class StoredNoise : public Noise {
 public:
  explicit StoredNoise(const std::string& path) : path_(path), file_(hdf5::File::open(path)) {
    if (!file_.exists(kPlace)) throw Error(fmt::format("{}: holds no noise ({})", path, kPlace));
    const hdf5::Dataset noise = file_.dataset(kPlace);
    shape_ = noise.shape();
    type_ = noise.float_type();
    if (shape_.size() != 4 || !type_) {
      throw Error(fmt::format("{}: {}: is not [layers, query heads, queries, keys] of numbers", path, kPlace));
    }
  }

  void check(const HeadShape& shape) const override {
    const Index heads = Index{shape.num_kv_heads} * shape.group_size;
    if (shape_[0] == shape.num_layers && shape_[1] == heads) return;
    throw Error(fmt::format("{}: {}: is of {} layers of {} query heads, and the trace has {} of {}", path_, kPlace,
                            shape_[0], shape_[1], shape.num_layers, heads));
  }

  void check_run(const RunIdentity& run) const override {
    const Index tokens = std::min(shape_[2], shape_[3]);
    if (tokens >= run.tokens) return;
    throw Error(fmt::format("{}: {}: is of {} tokens, and the trace has {}", path_, kPlace, tokens, run.tokens));
  }

  void add(int layer, int query_head, int query, std::span<const int> positions,
           Eigen::Ref<Eigen::RowVectorXf> logits) const override {
    std::vector<float> row(static_cast<std::size_t>(positions.back() + 1));
    std::vector<std::byte> bytes(row.size() * size_of(*type_));
    file_.dataset(kPlace).read_raw({layer, query_head, query, 0}, {1, 1, 1, std::ssize(row)}, bytes.data());
    to_float32(*type_, bytes.data(), row);
    for (std::size_t n = 0; n < positions.size(); ++n) {
      logits(static_cast<Index>(n)) += row[static_cast<std::size_t>(positions[n])];
    }
  }

 private:
  static constexpr const char* kPlace = "/gumbel_noise";

  std::string path_;
  hdf5::File file_;
  hdf5::Shape shape_;
  std::optional<DType> type_;
};

struct Temperature {
  double first;
  double step;

  float after(int tokens) const { return static_cast<float>(first + tokens * step); }
};

// Sums of noisy attention per row, of every query head of the group.
class NoisySums : public RankingMemory {
 public:
  NoisySums(const HeadShape& shape, std::shared_ptr<const Noise> noise, Temperature temperature)
      : shape_(shape), noise_(std::move(noise)), temperature_(temperature) {}

  void begin(const Head& head) override {
    for (int row = 0; row < head.rows(); ++row) positions_.push_back(head.positions()[row]);
    const CachePositions& entries = head.entries();
    const auto dropped = static_cast<Index>(entries.size() - head.rows());
    std::vector<int> all;
    for (int entry = 0; entry < entries.size(); ++entry) all.push_back(entries[entry]);
    const int queries = head.shape().next_position;
    const Matrix keys = head.entry_keys();
    for (int member = 0; member < shape_.group_size; ++member) {
      std::vector<double>& sums = sums_.emplace_back(positions_.size(), 0.0);
      head.attend(
          member, head.queries(member, queries), keys,
          [&](Index query) { return head.visible(static_cast<int>(query)); },
          [&](Index query, std::span<const float> weights) {
            const auto [first, end] = head.visible(static_cast<int>(query));
            const auto seen =
                std::span(all).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(end - first));
            const Eigen::RowVectorXf noisy =
                with_noise(member, static_cast<int>(query), seen, weights.subspan(static_cast<std::size_t>(first)));
            for (Index n = std::max(first, dropped); n < end; ++n) {
              sums[static_cast<std::size_t>(n - dropped)] += static_cast<double>(noisy(n - first));
            }
          });
    }
  }

  void observe(const CacheStep& step) override {
    ++generated_;
    positions_.push_back(step.position);
    for (int member = 0; member < shape_.group_size; ++member) {
      std::vector<double>& sums = sums_[static_cast<std::size_t>(member)];
      sums.push_back(0);
      const std::span<const float> weights(step.attention->data() + member * step.attention->cols(), sums.size());
      const Eigen::RowVectorXf noisy = with_noise(member, step.position, positions_, weights);
      for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(noisy(static_cast<Index>(n)));
    }
  }

  void keep(std::span<const int> rows) override {
    const auto gather = [rows](auto& of) {
      std::remove_reference_t<decltype(of)> left;
      for (const int row : rows) left.push_back(of[static_cast<std::size_t>(row)]);
      of = std::move(left);
    };
    gather(positions_);
    for (std::vector<double>& sums : sums_) gather(sums);
  }

  std::span<const double> of(int member) const { return sums_[static_cast<std::size_t>(member)]; }

 private:
  // softmax((logits + noise) / τ) of a query, whose attention to the keys at `positions` is known.
  Eigen::RowVectorXf with_noise(int member, int query, std::span<const int> positions,
                                std::span<const float> weights) const {
    const auto count = static_cast<Index>(positions.size());
    Eigen::RowVectorXf logits(count);
    for (Index n = 0; n < count; ++n) {
      logits(n) = std::log(std::max(weights[static_cast<std::size_t>(n)], std::numeric_limits<float>::min()));
    }
    noise_->add(shape_.layer, shape_.query_head(member), query, positions, logits);
    logits /= temperature_.after(generated_);
    softmax(logits, 0, count);
    return logits;
  }

  HeadShape shape_;
  std::shared_ptr<const Noise> noise_;
  Temperature temperature_;
  int generated_ = 0;
  std::vector<int> positions_;             // of the rows
  std::vector<std::vector<double>> sums_;  // [member][row]
};

class Keyformer : public Ranking {
 public:
  Keyformer(int recent, std::shared_ptr<const Noise> noise, Temperature temperature)
      : recent_(recent), noise_(std::move(noise)), temperature_(temperature) {}

  // The coming token is the last of the recent ones.
  Protection protection() const override { return {.window = recent_ - 1}; }
  Requirements requirements() const override { return {.needs = {{Need::Kind::all_queries}}}; }
  void check(const HeadShape& shape) const override { noise_->check(shape); }
  void check_run(const RunIdentity& run) const override { noise_->check_run(run); }

  std::unique_ptr<RankingMemory> memory(const HeadShape& shape) const override {
    return std::make_unique<NoisySums>(shape, noise_, temperature_);
  }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const auto* const memory = dynamic_cast<const NoisySums*>(head.memory());
    if (memory != nullptr) {
      std::ranges::transform(memory->of(member), scores.begin(), [](double sum) { return static_cast<float>(sum); });
    } else {
      NoisySums prompt(head.shape(), noise_, temperature_);
      prompt.begin(head);
      std::ranges::transform(prompt.of(member), scores.begin(), [](double sum) { return static_cast<float>(sum); });
    }
    const int left_behind = head.rows() - recent_;
    if (left_behind >= 0) scores[static_cast<std::size_t>(left_behind)] = -std::numeric_limits<float>::infinity();
  }

 private:
  int recent_;
  std::shared_ptr<const Noise> noise_;
  Temperature temperature_;
};

class NoNoise : public Noise {
 public:
  void add(int /*layer*/, int /*query_head*/, int /*query*/, std::span<const int> /*positions*/,
           Eigen::Ref<Eigen::RowVectorXf> /*logits*/) const override {}
};

std::shared_ptr<const Noise> noise_of(const Arguments& a) {
  if (!a.text("file").empty()) {
    if (a.text("noise") == "none")
      throw UsageError("keyformer: noise=none takes none from a file; leave out one of both");
    return std::make_shared<StoredNoise>(a.text("file"));
  }
  if (a.text("noise") == "none") return std::make_shared<NoNoise>();
  return std::make_shared<DrawnNoise>(a.integer("seed"));
}

const MethodRegistration keyformer([] {
  return Method{
      .name = "keyformer",
      .summary =
          "Keeps the recent positions and those with the most attention, of logits with noise and a rising "
          "temperature; "
          "as the authors' code does: the key tokens are chosen once, at the prompt's end.",
      .source =
          "arXiv 2403.09054, section 3; github.com/d-matrix-ai/keyformer-llm, gptj-keyformer-lib/modeling_gptj.py, "
          "commit f327831",
      .parameters =
          {Parameter::integer("recent", 32, 1, "last positions that are kept, the coming token among them")
               .of(Parameter::Step::window),
           Parameter::real("tau", 1, 1e-3, 1e3, "temperature of the prompt's queries: tau_init")
               .of(Parameter::Step::score),
           Parameter::real("tau-step", 0.01, 0, 1e3, "added by every token: tau_delta").of(Parameter::Step::score),
           Parameter::choice("noise", {"gumbel", "none"}, "on the logits").of(Parameter::Step::score),
           Parameter::integer("seed", 0, 0, "of the noise").of(Parameter::Step::draw),
           Parameter::file("file", "noise that is given: /gumbel_noise [layers, query heads, queries, keys]")
               .of(Parameter::Step::other)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = std::make_shared<Keyformer>(a.integer("recent"), noise_of(a),
                                                                   Temperature{a.real("tau"), a.real("tau-step")}),
                               .granularity = Granularity::query,
                               .schedule = Schedule{.attend = Schedule::Attend::before}};
          },
  };
});

}  // namespace
}  // namespace kvreplay
