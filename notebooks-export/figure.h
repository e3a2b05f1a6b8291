// Figures: each answers one question with one table and one declarative spec.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "analysis/analysis.h"
#include "notebooks-export/tables/data_table.h"

namespace kvreplay {

class FigureStyle;

enum class Theme { paper, screen };

/// How figures are drawn, and of what.
struct FigureOptions {
  Theme theme = Theme::screen;
  bool titles = true;  ///< whether pictures say their question, and the choice that they show
  /// Policies that were asked for by name, in that order: specs, or methods with all their settings, as ResultFilter
  /// takes them. Empty: nothing in particular was asked for.
  std::vector<std::string> policies = {};
};

/// A figure that was drawn up. Its spec is Vega-Lite without data; the table is what it draws.
struct Figure {
  std::string name;      ///< of its files: "error-against-capacity"
  std::string question;  ///< its title: "How much error does each policy make at each capacity?"
  std::string caption;   ///< what is to be seen, with units, what was averaged over, and what was thinned
  nlohmann::ordered_json spec;
  DataTable table{{}};
  std::vector<std::string> left_out;  ///< what there are data of and it does not draw, policies apart
};

/// A kind of figure: one per file of notebooks-export/figures/, which registers itself there.
struct FigureKind {
  std::string name;
  std::string question;
  std::string needs;  ///< what a report lacks where it cannot be drawn: "results at two capacities or more"
  int order = 0;      ///< place in the report
  /// The figure, or one with an empty table where the analysis has nothing for it.
  std::function<Figure(const Analysis&, const FigureStyle&)> draw;
  /// Whether it is of results over time: where there are none a report does not speak of it, unless it is asked for.
  bool over_time = false;
};

class FigureRegistration {
 public:
  explicit FigureRegistration(FigureKind kind);
};

/// All kinds in their order.
std::vector<const FigureKind*> figure_kinds();

}  // namespace kvreplay
