// Oracle: the kept sets with the least layer error that exchanging positions can find.
//
// Objective: the mean over the evaluation queries of the squared layer error, every kept set having exactly the
// capacity. The sets that oracle-attention ranks first are one start, those of the run's other policies at the same
// granularity and capacity the others; the best of them is improved by exchanges (policy/exchanges.h). It
// is never worse in the objective than any of its starts. It is not the minimum, and it costs far more than a policy:
// docs/oracles.md.
#include "policy/exchanges.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

class ExchangeRefinement : public Refinement {
 public:
  explicit ExchangeRefinement(int exchanges) : exchanges_(exchanges) {}

  std::unique_ptr<LayerRefinement> begin(const LayerSource& layer) const override {
    class OfLayer : public LayerRefinement {
     public:
      OfLayer(const LayerSource& source, int exchanges) : layer_(source), exchanges_(exchanges) {}
      LayerSets refine(Granularity granularity, LayerSets sets) override {
        return layer_.improve(granularity, std::move(sets), exchanges_);
      }

     private:
      LayerExchanges layer_;
      int exchanges_;
    };
    return std::make_unique<OfLayer>(layer, exchanges_);
  }

  double operations(const RefinementShape& shape) const override { return exchange_operations(shape, exchanges_); }
  Index memory(const RefinementShape& shape) const override { return exchange_memory(shape); }

 private:
  int exchanges_;
};

const MethodRegistration reconstruction_oracle([] {
  return Method{
      .name = "oracle-reconstruction",
      .summary =
          "ORACLE: minimises the mean squared layer error over the evaluation queries, greedily, by exchanging "
          "positions; starts from the best kept sets of the run, so that it is never worse than they are. Not "
          "the minimum: exchanges can end in a local one.",
      .source = "a bound on the layer error; docs/oracles.md",
      .parameters =
          {Parameter::integer("exchanges", 64, 1, "exchanges per kept set, at most").of(Parameter::Step::selection)},
      .compose =
          [](const Arguments& a) {
            return Composition{.rule = make_policy("oracle-attention").ranking(),
                               .oracle = true,
                               .refinement = std::make_shared<ExchangeRefinement>(a.integer("exchanges"))};
          },
  };
});

}  // namespace
}  // namespace kvreplay
