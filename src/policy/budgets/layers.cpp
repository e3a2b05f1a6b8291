// Given budgets: any division of positions over layers and heads that was computed elsewhere.
//
// The file is text, a line per layer: one number for all kept sets of the layer, or one for each (query heads or KV
// heads, as the sets are). With unit=positions numbers are capacities; with unit=share they multiply the capacity asked
// for. Blank lines, and what follows a '#', do not count; commas may stand between numbers.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <sstream>

#include "base/error.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

class GivenLayers : public Budget {
 public:
  GivenLayers(std::string file, bool shares) : file_(std::move(file)), shares_(shares) {
    std::ifstream input(file_);
    if (!input) throw Error(fmt::format("{}: cannot be read", file_));
    std::string line;
    for (int number = 1; std::getline(input, line); ++number) {
      line.erase(std::min(line.find('#'), line.size()));
      std::ranges::replace(line, ',', ' ');
      std::istringstream fields(line);
      std::vector<double> layer;
      std::string field;
      while (fields >> field) layer.push_back(parse(field, number));
      if (!layer.empty()) layers_.push_back(std::move(layer));
    }
    if (layers_.empty()) throw Error(fmt::format("{}: holds no budgets; write a line of numbers per layer", file_));
  }

  std::optional<int> own_capacity() const override {
    if (shares_) return std::nullopt;
    double sum = 0;
    for (const std::vector<double>& layer : layers_) {
      sum += std::accumulate(layer.begin(), layer.end(), 0.0) / static_cast<double>(layer.size());
    }
    return static_cast<int>(std::lround(sum / static_cast<double>(layers_.size())));
  }

  std::vector<int> allocate(const BudgetRequest& request) const override {
    if (static_cast<int>(layers_.size()) != request.num_layers) {
      throw Error(fmt::format("{}: has {} layers, the model has {}", file_, layers_.size(), request.num_layers));
    }
    const std::vector<double>& layer = layers_[static_cast<std::size_t>(request.layer)];
    const auto sets = static_cast<std::size_t>(sets_per_layer(request));
    if (layer.size() != 1 && layer.size() != sets) {
      throw Error(fmt::format("{}: has {} numbers for layer {}; 1 or {} are needed, one per {} head", file_,
                              layer.size(), request.layer, sets, name_of(request.granularity)));
    }
    std::vector<int> capacities;
    for (std::size_t i = 0; i < sets; ++i) {
      const double number = layer[layer.size() == 1 ? 0 : i];
      const double positions = shares_ ? std::floor(number * request.capacity + 1e-9) : number;
      if (positions < std::max(1, request.protection.count())) {
        throw Error(fmt::format("{}: grants layer {} {} positions, fewer than the {} that are always kept", file_,
                                request.layer, positions, std::max(1, request.protection.count())));
      }
      capacities.push_back(static_cast<int>(std::min<double>(positions, request.rows)));
    }
    return capacities;
  }

 private:
  double parse(const std::string& field, int line) const {
    std::size_t used = 0;
    double number = -1;
    try {
      number = std::stod(field, &used);
    } catch (const std::exception&) {
    }
    if (used != field.size() || !std::isfinite(number) || number < 0 || (!shares_ && number != std::floor(number))) {
      throw Error(fmt::format("{}: line {}: '{}' is not {}", file_, line, field,
                              shares_ ? "a share" : "a number of positions"));
    }
    return number;
  }

  std::string file_;
  bool shares_;
  std::vector<std::vector<double>> layers_;
};

const MethodRegistration layers([] {
  return Method{
      .name = "layers",
      .step = Method::Step::budget,
      .summary = "Takes the capacity of every layer and head from a file.",
      .source = "given",
      .parameters =
          {Parameter::file("file", "a line per layer: one number, or one per kept set").of(Parameter::Step::budget),
           Parameter::choice("unit", {"positions", "share"},
                             "positions: numbers are capacities; share: they multiply the capacity asked for")
               .of(Parameter::Step::budget)},
      .compose =
          [](const Arguments& a) {
            if (a.text("file").empty()) throw UsageError("layers: needs a file, as in +layers(file=budgets.txt)");
            return Composition{.budget = std::make_shared<GivenLayers>(a.text("file"), a.text("unit") == "share")};
          },
  };
});

}  // namespace
}  // namespace kvreplay
