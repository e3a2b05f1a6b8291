// What all figures of a report have in common: sizes, colours, and which policies and capacities they show.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "notebooks-export/figure.h"

namespace kvreplay {

using Json = nlohmann::ordered_json;

/// Lengths are in points: on paper a figure is as wide as a column of text, 84 mm, and its letters 7 points high.
class FigureStyle {
 public:
  explicit FigureStyle(const Analysis& analysis, FigureOptions options = {});

  Theme theme() const { return options_.theme; }

  double width() const { return width_; }  ///< of the whole figure
  double font() const { return font_; }    ///< size of letters
  double line() const { return 1.2 * font_; }

  /// About how wide a text of so many characters is, and how many fit.
  double text_width(std::size_t characters) const { return 0.52 * font_ * static_cast<double>(characters); }
  std::size_t characters_in(double width) const { return static_cast<std::size_t>(width / (0.52 * font_)); }

  /// The policies that figures show, in their order: that in which they were asked for, else the best first, by the
  /// rank of their means. All of them; of more than kMostPolicies that nobody asked for, those that rule() says. What
  /// keeps everything is never among them.
  const std::vector<std::string>& policies() const { return policies_; }
  bool shows(const std::string& policy) const;

  /// Whether policies were asked for by name: then no figure leaves out what it has data of.
  bool asked() const { return !options_.policies.empty(); }

  /// Those of policies() that `present` has.
  std::vector<std::string> shown_of(const std::vector<std::string>& present) const;

  /// The policies that no figure shows, the best first; and by which rule, in a sentence.
  const std::vector<std::string>& left_out() const { return left_out_; }
  const std::string& rule() const { return rule_; }

  /// " Shown are 12 of 400 policies." for captions; empty where all are.
  const std::string& shown_text() const { return shown_text_; }

  /// Capacities as asked for, ascending in what they keep; never "all".
  const std::vector<std::string>& capacities() const { return capacities_; }

  /// About how many positions a head keeps at a capacity as asked for: where its tick stands on an axis.
  double position_of(const std::string& capacity_request) const;

  /// Sets values and labels of a logarithmic axis of positions kept: the capacities as they were asked for.
  void set_capacity_ticks(Json& axis, const std::vector<std::string>& capacities) const;

  /// The capacity that a figure shows where it shows one: the middle one of those in `present`.
  std::string middle_capacity(const std::vector<std::string>& present) const;

  /// A spec with a title, fonts and colours of everything but the marks.
  Json spec(const std::string& question, const std::string& caption) const;

  /// Encodings of the column `policy` for these policies; a policy has the same colour, shape and dashes everywhere,
  /// and no two have the same colour and dashes, of up to a hundred. The legend is that of the colours: it draws each
  /// as the lines are.
  Json colour(const std::vector<std::string>& policies) const;
  Json shape(const std::vector<std::string>& policies) const;
  Json dash(const std::vector<std::string>& policies) const;

  /// How a policy's line looks: a colour as #rrggbb, and the lengths of dashes and gaps.
  const std::string& colour_of(const std::string& policy) const { return look_of(policy).colour; }
  const std::vector<int>& dashes_of(const std::string& policy) const { return look_of(policy).dash; }

  /// A Vega expression that breaks texts longer than `most` characters into lines: for labels of axes and legends,
  /// which are not to be cut.
  std::string label_expression(const std::vector<std::string>& texts, std::size_t most) const;

  /// The most lines that one of the texts is broken into, and the most characters of a line.
  static std::size_t most_lines(const std::vector<std::string>& texts, std::size_t most);
  static std::size_t longest_line(const std::vector<std::string>& texts, std::size_t most);

  /// A choice of one value of a column: a parameter `shown_<column>` and the filter that goes with it.
  void choose(Json& spec, const std::string& column, const std::vector<std::string>& values,
              const std::string& chosen) const;

  /// How many panels stand side by side, where each has one of the texts over it and `outside` points are taken by
  /// axes.
  std::size_t panel_columns(const std::vector<std::string>& texts, double outside) const;
  double panel_width(std::size_t columns, double outside) const;

 private:
  struct Look {
    std::string colour;
    std::string shape;
    std::vector<int> dash;
  };
  const Look& look_of(const std::string& policy) const;
  double symbol_unit() const;
  std::string symbol_of(const Look& look) const;
  /// Not a scale, since legends would give symbols dashed outlines.
  Json by_policy(const std::vector<std::string>& policies, Json (*part)(const Look&, double), const Json& usual) const;
  Json legend(const std::vector<std::string>& policies) const;

  std::vector<std::string> asked_for(const std::vector<std::string>& best) const;
  std::vector<std::string> thinned(const Analysis& analysis, const std::vector<std::string>& best) const;

  FigureOptions options_;
  double width_;
  double font_;
  std::vector<std::string> policies_;
  std::map<std::string, Look> looks_;
  std::vector<std::string> left_out_;
  std::string rule_;
  std::string shown_text_;
  std::vector<std::string> capacities_;
  std::map<std::string, double> positions_;  // of capacities
};

/// Of policies that nobody asked for by name, figures show this many at most.
constexpr std::size_t kMostPolicies = 16;

/// Where those asked for by the names of their methods are more than this, they are thinned in the same way, apart from
/// those whose settings were written out.
constexpr std::size_t kMostAsked = 40;

/// A text in lines of at most `most` characters, broken after ',', '(' and '-' and before '+' and ' ' where that is
/// possible, else anywhere.
std::vector<std::string> broken(const std::string& text, std::size_t most);

/// A measure with its unit, for an axis: "layer error (share of the output's norm)".
std::string axis_title(Measure measure);

/// A number that a table holds very often, in six significant digits.
double rounded(double number);

/// Blue for less, orange for more, around 0; and white to dark for what cannot be less than 0.
Json diverging_scale(double largest);
Json sequential_scale();

/// Scales of at most four capacities that stand side by side: shades that can be told apart on white and on black, and
/// of which none is a policy's alone, since a capacity is not a policy.
Json capacity_colours(const std::vector<std::string>& capacities);
Json capacity_shapes(const std::vector<std::string>& capacities);

/// Whether any row has a number in a column.
bool has_numbers(const DataTable& table, const std::string& column);

/// Whether numbers from `least` to `most` are so far apart that equal steps would crowd them together: all positive,
/// and the ratio at least 20. Axes are logarithmic then.
bool spans_magnitudes(double least, double most);

/// The same of all the numbers in some columns.
bool spans_magnitudes(const DataTable& table, const std::vector<std::string>& columns);

/// The largest number in a column; 0 where there is none.
int last_of(const DataTable& table, const std::string& column);

/// Ticks of an axis of layers or heads 0 to `last`: integers, not too many.
std::vector<int> integer_ticks(int last);

/// The distinct texts of a column in the order of their rows.
std::vector<std::string> distinct(const DataTable& table, const std::string& column);

/// "128", "25 %" for sentences, axes and legends.
std::string capacity_text(const std::string& capacity_request);
std::string capacities_text(const std::vector<std::string>& capacity_requests);

/// The same of the labels of an axis or legend of capacities, as a Vega expression.
constexpr const char* kCapacityLabels = "replace(datum.label, '%', ' %')";

/// " At 4 of 7 capacities; not shown are 96 and 192." for captions; empty where all are shown.
std::string capacities_left_out(const std::vector<std::string>& all, const std::vector<std::string>& shown);

/// "95 % bootstrap intervals (…)" and what means are taken over: sentences for captions.
std::string about_intervals(const Analysis& analysis);
std::string about_means(const Analysis& analysis, std::string_view over);

/// What the means of a measure are over, and what its differences are paired on.
std::string_view averaged_over(Measure measure);
std::string_view paired_on(Measure measure);

/// As high as the rows that a figure has for the texts of a column, `step` points each. The page counts those that its
/// filters leave.
void rows_of(Json& spec, const std::string& column, std::size_t count, double step);

/// Which of the page's filters apply to a figure, and how: by the columns "policy", "capacity" and "layer" rows are
/// filtered, by "shown_capacity" and "shown_layer" the figure's own choice is set.
void filterable(Json& spec, const std::vector<std::string>& by);

}  // namespace kvreplay
