// CAKE (arXiv 2503.12491): layers share one budget by how their attention spreads, over positions and over time.
//
// With A the softmax attention of the last `window` queries to the positions before the window, not renormalised, the
// score of position n is its mean over the queries plus γ times its variance (divided by window − 1), averaged over
// `kernel` neighbours with zeros beyond the ends (paper, section 4.2). A layer's preference for cache is
//   P = H^(1/τ₁) · V^(1/τ₂),   H = −Σ A·ln(A + 1e-10),   V = Σ_n Var_t(A[t, n])
// over all query heads (section 4.1); layers get what is ranked of the budget in proportion to it. As in the authors'
// code shares are cut to whole positions and no layer gets more than it holds; what a cap leaves over goes in equal
// parts to the others, and so does what cutting leaves over, the remainder to the first layers. Layers whose sliding
// window leaves them fewer positions divide theirs among themselves.
//
// Evicting layer by layer while the prompt is read (the paper's cascade) ends at the same budgets: scores do not
// change, and shares only shrink. τ₁, τ₂ and γ come from a table per model in the authors' code; 1, 1 and 200 are what
// it uses where the table has no entry.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "policy/policy.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

// Mean and variance over the window's queries, of every row of a head: [R] each.
struct Moments {
  std::vector<double> mean;
  std::vector<double> variance;
};

Moments moments_of(const Head& head, int member, int window) {
  const auto rows = static_cast<std::size_t>(head.rows());
  Moments moments{std::vector<double>(rows, 0.0), std::vector<double>(rows, 0.0)};
  std::vector<float> attention(rows);
  const auto for_each_query = [&](const auto& take) {
    for (int age = window - 1; age >= 0; --age) {
      head.copy_attention(member, age, attention);
      for (std::size_t n = 0; n < rows; ++n) take(n, static_cast<double>(attention[n]));
    }
  };
  for_each_query([&](std::size_t n, double a) { moments.mean[n] += a / window; });
  if (window == 1) return moments;
  for_each_query([&](std::size_t n, double a) {
    moments.variance[n] += (a - moments.mean[n]) * (a - moments.mean[n]) / (window - 1);
  });
  return moments;
}

class Cake : public Ranking {
 public:
  Cake(int window, int kernel, double gamma) : window_(window), kernel_(kernel), gamma_(gamma) {}

  Protection protection() const override { return {.window = window_}; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}}; }

  void score(const Head& head, int member, std::span<float> scores) const override {
    const Moments moments = moments_of(head, member, window_);
    for (std::size_t n = 0; n < scores.size(); ++n) {
      scores[n] = static_cast<float>(moments.mean[n] + gamma_ * moments.variance[n]);
    }
  }

  void smooth(const Head& head, int /*member*/, int /*capacity*/, std::span<float> scores) const override {
    pool(Spatial::average, kernel_, before_window(head, scores, window_));
  }

 private:
  int window_;
  int kernel_;
  double gamma_;
};

class CakeBudget : public Budget {
 public:
  // `whole_if_short`: prompts of no more than capacity + window positions are left whole, as the authors' code does.
  CakeBudget(int window, double tau1, double tau2, bool whole_if_short)
      : window_(window), tau1_(tau1), tau2_(tau2), whole_if_short_(whole_if_short) {}

  bool surveys() const override { return true; }
  Requirements requirements() const override { return {.needs = {Need::window(window_)}}; }

  // H and V of a group's query heads.
  std::vector<float> survey(const Head& head, std::span<const float> /*scores*/,
                            Protection /*protection*/) const override {
    const auto before = static_cast<std::size_t>(head.positions().count_before(head.shape().next_position - window_));
    double entropy = 0;
    double variance = 0;
    std::vector<float> attention(static_cast<std::size_t>(head.rows()));
    for (int member = 0; member < head.shape().group_size; ++member) {
      for (int age = 0; age < window_; ++age) {
        head.copy_attention(member, age, attention);
        for (std::size_t n = 0; n < before; ++n) {
          const auto a = static_cast<double>(attention[n]);
          entropy -= a * std::log(a + 1e-10);
        }
      }
      const Moments moments = moments_of(head, member, window_);
      variance = std::accumulate(moments.variance.begin(),
                                 moments.variance.begin() + static_cast<std::ptrdiff_t>(before), variance);
    }
    return {static_cast<float>(entropy), static_cast<float>(variance)};
  }

  std::vector<int> allocate(const BudgetRequest& request) const override {
    const auto sets = static_cast<std::size_t>(sets_per_layer(request));
    const int ranked = request.capacity - request.protection.count();
    const int rankable = request.rows - request.protection.count();
    if (whole_if_short_ && request.rows <= request.capacity + request.protection.count()) {
      return std::vector<int>(sets, request.rows);
    }
    const std::vector<int> shares = shares_of(preferences(request.surveys), ranked, rankable);
    const int share = shares[static_cast<std::size_t>(request.layer_among_alike)];
    const int least = std::max(1, request.protection.count());
    return std::vector<int>(sets, std::max(least, request.protection.count() + std::min(share, rankable)));
  }

 private:
  std::vector<double> preferences(std::span<const LayerSurvey> layers) const {
    std::vector<double> preferences;
    for (const LayerSurvey& heads : layers) {
      double entropy = 0;
      double variance = 0;
      for (const std::vector<float>& head : heads) {
        entropy += static_cast<double>(head[0]);
        variance += static_cast<double>(head[1]);
      }
      preferences.push_back(std::pow(std::max(entropy, 0.0), 1 / tau1_) * std::pow(variance, 1 / tau2_));
    }
    return preferences;
  }

  // `ranked` positions per layer on average, divided by preference; without any, evenly.
  static std::vector<int> shares_of(const std::vector<double>& preferences, int ranked, int rankable) {
    const auto layers = static_cast<int>(preferences.size());
    const int total = ranked * layers;
    const double sum = std::accumulate(preferences.begin(), preferences.end(), 0.0);
    std::vector<int> shares;
    int excess = 0;
    for (const double preference : preferences) {
      const int share = sum > 0 ? static_cast<int>(preference / sum * total) : ranked;
      excess += std::max(0, share - rankable);
      shares.push_back(std::min(share, rankable));
    }
    const auto spread = [&shares, rankable](int count) {
      std::vector<std::size_t> open;
      for (std::size_t i = 0; i < shares.size(); ++i) {
        if (shares[i] < rankable) open.push_back(i);
      }
      if (open.empty()) return;
      const auto some = static_cast<int>(open.size());
      for (std::size_t i = 0; i < open.size(); ++i) {
        shares[open[i]] += count / some + (static_cast<int>(i) < count % some ? 1 : 0);
      }
    };
    if (excess > 0) spread(excess);
    const int left = total - std::accumulate(shares.begin(), shares.end(), 0);
    if (left > 0) spread(left);
    return shares;
  }

  int window_;
  double tau1_;
  double tau2_;
  bool whole_if_short_;
};

Parameter window() {
  return Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
      .of(Parameter::Step::window);
}
Parameter kernel() {
  return Parameter::odd_integer("kernel", 5, 1, "positions whose scores are averaged").of(Parameter::Step::space);
}
Parameter gamma() {
  return Parameter::real("gamma", 200, 0, 1e9, "weight of the variance over the window").of(Parameter::Step::score);
}
Parameter tau1() {
  return Parameter::real("tau1", 1, 1e-3, 1e3, "a layer's preference: 1/tau1 is the entropy's power")
      .of(Parameter::Step::budget);
}
Parameter tau2() {
  return Parameter::real("tau2", 1, 1e-3, 1e3, "1/tau2 is the power of the variance").of(Parameter::Step::budget);
}

const MethodRegistration cake_budget([] {
  return Method{
      .name = "cake",
      .step = Method::Step::budget,
      .summary = "Divides positions over all layers by the entropy and the variance of their window's attention.",
      .source = "arXiv 2503.12491, section 4.1",
      .parameters = {window(), tau1(), tau2()},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .budget = std::make_shared<CakeBudget>(a.integer("window"), a.real("tau1"), a.real("tau2"), false)};
          },
  };
});

const MethodRegistration cake([] {
  return Method{
      .name = "cake",
      .summary =
          "Keeps what the window attends to much, or now and then, and gives more to layers whose attention spreads.",
      .source = "arXiv 2503.12491, section 4",
      .parameters = {window(), kernel(), gamma(), tau1(), tau2(),
                     Parameter::choice("layers", {"preference", "uniform"},
                                       "what layers get: by their preference, as +cake gives it, or all the same")
                         .of(Parameter::Step::budget)},
      .compose =
          [](const Arguments& a) {
            Composition policy{.rule =
                                   std::make_shared<Cake>(a.integer("window"), a.integer("kernel"), a.real("gamma"))};
            if (a.text("layers") == "preference") {
              policy.budget = std::make_shared<CakeBudget>(a.integer("window"), a.real("tau1"), a.real("tau2"), false);
            }
            return policy;
          },
  };
});

const MethodRegistration cakekv_code([] {
  return Method{
      .name = "cake@cakekv",
      .summary =
          "The authors' code: one kept set per KV head; a prompt of no more than capacity + window positions is left "
          "whole.",
      .source = "github.com/antgroup/cakekv, cake/cake_cache.py and cake/utils.py",
      .parameters = {window(), kernel(), gamma(), tau1(), tau2()},
      .compose =
          [](const Arguments& a) {
            return Composition{
                .rule = std::make_shared<Cake>(a.integer("window"), a.integer("kernel"), a.real("gamma")),
                .budget = std::make_shared<CakeBudget>(a.integer("window"), a.real("tau1"), a.real("tau2"), true),
                .granularity = Granularity::kv,
                .share = Share::mean};
          },
      .variant_of = "cake",
      .revision = "commit c4675ce",
  };
});

}  // namespace
}  // namespace kvreplay
