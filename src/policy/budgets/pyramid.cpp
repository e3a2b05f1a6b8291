// PyramidKV's budget (arXiv 2406.02069): lower layers attend widely, upper layers to a few positions.
//
// Of the ranked positions (capacity − window) the last layer gets about 1/β and the first twice the mean less that,
// with equal steps between (paper, section 4). Steps are rounded down as in the authors' code, so layers together keep
// at most what was granted on average, up to rounding; what was used is reported. A first layer that would exceed the
// prompt is cut to it and the last one raised by as much. For prompts shorter than twice the ranked capacity
// PyramidKV's code keeps to the uniform budget, ReST-KV's release does not: short=uniform and short=pyramid.
//
// Layers whose sliding window leaves them fewer positions than others have a pyramid of their own, so that the mean
// over the layers that hold as much is the capacity asked for.
#include <algorithm>
#include <cmath>

#include "policy/policy.h"
#include "policy/published_code.h"

namespace kvreplay {
namespace {

class Pyramid : public Budget {
 public:
  Pyramid(int beta, bool on_short_prompts) : beta_(beta), on_short_prompts_(on_short_prompts) {}

  std::vector<int> allocate(const BudgetRequest& request) const override {
    const int protected_count = request.protection.count();
    const int ranked = request.capacity - protected_count;
    const int rankable = request.rows - protected_count;
    int capacity = request.capacity;
    if (request.rows >= 2 * ranked || on_short_prompts_) {
      int smallest = ranked / beta_;
      int largest = 2 * ranked - smallest;
      if (largest >= rankable) {
        largest = rankable;
        smallest = 2 * ranked - largest;
      }
      const int step = request.layers_alike > 1 ? (largest - smallest) / (request.layers_alike - 1) : 0;
      const int first = request.layers_alike > 1 ? largest : ranked;
      capacity = protected_count + first - request.layer_among_alike * step;
    }
    capacity = std::clamp(capacity, std::max(1, protected_count), request.rows);
    return std::vector<int>(static_cast<std::size_t>(sets_per_layer(request)), capacity);
  }

 private:
  int beta_;
  bool on_short_prompts_;
};

Parameter short_prompts() {
  return Parameter::choice("short", {"uniform", "pyramid"},
                           "prompts below twice the ranked capacity: uniform, as PyramidKV's code, or pyramid, as "
                           "ReST-KV's")
      .of(Parameter::Step::budget);
}

// kvpress takes the capacity without the window for the mean, works with fractions, rounds to even at the end, counts
// the window into what a layer gets, and keeps to the uniform budget where the window would not fit the last layer. Of
// a share it takes the fraction along. A model of one layer gets what is the first of many layers'.
class PyramidOfKvpress : public Budget {
 public:
  explicit PyramidOfKvpress(int beta) : beta_(beta) {}

  std::vector<int> allocate(const BudgetRequest& request) const override {
    const int window = request.protection.count();
    const double mean = (window + request.unrounded_capacity) - window;
    const double rankable = request.rows - window;
    double smallest = mean / beta_;
    double largest = 2 * mean - smallest;
    if (largest >= rankable) {
      largest = rankable;
      smallest = 2 * mean - largest;
    }
    double capacity = request.unrounded_capacity;
    if (largest >= smallest && smallest >= window) {
      const double step = request.layers_alike > 1 ? (largest - smallest) / (request.layers_alike - 1) : 0;
      capacity = largest - request.layer_among_alike * step;
    }
    return std::vector<int>(static_cast<std::size_t>(sets_per_layer(request)),
                            std::clamp(static_cast<int>(std::nearbyint(capacity)), 1, request.rows));
  }

 private:
  int beta_;
};

const MethodRegistration pyramid([] {
  return Method{
      .name = "pyramid",
      .step = Method::Step::budget,
      .summary = "Gives lower layers more positions than upper ones, in equal steps.",
      .source = "arXiv 2406.02069, section 4",
      .parameters = {Parameter::integer("beta", 20, 1, "the last layer gets 1/beta of the ranked positions")
                         .of(Parameter::Step::budget),
                     short_prompts()},
      .compose =
          [](const Arguments& a) {
            return Composition{.budget = std::make_shared<Pyramid>(a.integer("beta"), a.text("short") == "pyramid")};
          },
  };
});

const MethodRegistration pyramidkv([] {
  return Method{
      .name = "pyramidkv",
      .summary = "SnapKV's scores under a pyramid over the layers: short for snapkv+pyramid.",
      .source = "arXiv 2406.02069",
      .parameters = {Parameter::integer("window", 32, 1, "observation window: last queries, always kept")
                         .of(Parameter::Step::window),
                     Parameter::odd_integer("kernel", 5, 1, "positions that are pooled").of(Parameter::Step::space),
                     Parameter::choice("pooling", {"avg", "max"}, "how they are pooled").of(Parameter::Step::space),
                     Parameter::integer("beta", 20, 1, "the last layer gets 1/beta of the ranked positions")
                         .of(Parameter::Step::budget)},
      .compose =
          [](const Arguments& a) {
            return make_policy("snapkv(window={window},kernel={kernel},pooling={pooling})+pyramid(beta={beta})", a);
          },
  };
});

const MethodRegistration rest_kv_code([] {
  return Method{
      .name = "pyramidkv@rest-kv",
      .summary = "One kept set per query head, as in KVCache-Factory, whose pyramid this is.",
      .source = "github.com/an-yongqi/rest-kv, PyramidKVCluster",
      .parameters = {},
      .compose =
          [](const Arguments&) {
            Composition policy = make_policy("pyramidkv");
            policy.granularity = Granularity::query;
            return policy;
          },
      .variant_of = "pyramidkv",
      .revision = rest_kv::kRevision,
  };
});

const MethodRegistration kvpress_code([] {
  return Method{
      .name = "pyramidkv@kvpress",
      .summary = kvpress::with_attention_path(
          "A pyramid drawn from the whole capacity, the window included, in fractional steps; a window of 64, one kept "
          "set per KV head."),
      .source = "github.com/NVIDIA/kvpress, pyramidkv_press.py",
      .parameters =
          {Parameter::integer("beta", 20, 1, "the last layer gets 1/beta of the capacity").of(Parameter::Step::budget)},
      .compose =
          [](const Arguments& a) {
            Composition policy = make_policy("snapkv@kvpress");
            policy.budget = std::make_shared<PyramidOfKvpress>(a.integer("beta"));
            return policy;
          },
      .variant_of = "pyramidkv",
      .revision = kvpress::kRevision,
  };
});

}  // namespace
}  // namespace kvreplay
