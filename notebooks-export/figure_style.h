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
  FigureStyle(const Analysis& analysis, Theme theme);

  double width() const { return width_; }  ///< of the whole figure
  double font() const { return font_; }    ///< size of letters
  double line() const { return 1.2 * font_; }

  /// About how wide a text of so many characters is, and how many fit.
  double text_width(std::size_t characters) const { return 0.52 * font_ * static_cast<double>(characters); }
  std::size_t characters_in(double width) const { return static_cast<std::size_t>(width / (0.52 * font_)); }

  /// The policies that figures show, baselines and oracles after the others: all of them, or of very many, or where
  /// some have fewer capacities than others, a setting of each method and the best others. What keeps everything is
  /// never among them.
  const std::vector<std::string>& policies() const { return policies_; }
  bool shows(const std::string& policy) const;

  /// At most `most` of those that `present` has: the baseline, then the best; in the order of policies().
  std::vector<std::string> some_of(const std::vector<std::string>& present, std::size_t most) const;

  /// "12 of 400 policies are shown: …", with a space before, where some are left out.
  const std::string& left_out() const { return left_out_; }

  /// Capacities as asked for, ascending in what they keep; never "all".
  const std::vector<std::string>& capacities() const { return capacities_; }

  /// The capacity that a figure shows where it shows one: the middle one of those in `present`.
  std::string middle_capacity(const std::vector<std::string>& present) const;

  /// A spec with a title, fonts and colours of everything but the marks.
  Json spec(const std::string& question, const std::string& caption) const;

  /// Encodings of the column `policy` for these policies; a policy has the same colour, shape and dashes everywhere.
  Json colour(const std::vector<std::string>& policies) const;
  Json shape(const std::vector<std::string>& policies) const;
  Json dash(const std::vector<std::string>& policies) const;

  /// A Vega expression that breaks texts longer than `most` characters into lines: for labels of axes and legends,
  /// which are not to be cut.
  std::string label_expression(const std::vector<std::string>& texts, std::size_t most) const;

  /// The most lines that one of the texts is broken into, and the most characters of a line.
  static std::size_t most_lines(const std::vector<std::string>& texts, std::size_t most);
  static std::size_t longest_line(const std::vector<std::string>& texts, std::size_t most);

  /// A choice of one value of a column: a parameter `shown_<column>` and the filter that goes with it.
  static void choose(Json& spec, const std::string& column, const std::vector<std::string>& values,
                     const std::string& chosen);

 private:
  struct Look {
    std::string colour;
    std::string shape;
    std::vector<int> dash;
  };
  const Look& look_of(const std::string& policy) const;
  Json scale(const std::vector<std::string>& policies, Json (*part)(const Look&)) const;
  Json legend(const std::vector<std::string>& policies) const;

  double width_;
  double font_;
  std::vector<std::string> policies_;
  std::vector<std::string> by_importance_;  // the same: baseline, the best others, references
  std::map<std::string, Look> looks_;
  std::string left_out_;
  std::vector<std::string> capacities_;
};

/// A text in lines of at most `most` characters, broken after ',' and '(' and before '+' and ' ' where that is
/// possible.
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

/// The largest number in a column; 0 where there is none.
int last_of(const DataTable& table, const std::string& column);

/// Ticks of an axis of layers or heads 0 to `last`: integers, not too many.
std::vector<int> integer_ticks(int last);

/// The distinct texts of a column in the order of their rows.
std::vector<std::string> distinct(const DataTable& table, const std::string& column);

/// "128", "25 %" for sentences.
std::string capacity_text(const std::string& capacity_request);

/// "95 % bootstrap intervals (…)" and what means are taken over: sentences for captions.
std::string about_intervals(const Analysis& analysis);
std::string about_means(const Analysis& analysis, std::string_view over);

/// As high as the rows that a figure has for the texts of a column, `step` points each. The page counts those that its
/// filters leave.
void rows_of(Json& spec, const std::string& column, std::size_t count, double step);

/// Which of the page's filters apply to a figure, and how: by the columns "policy", "capacity" and "layer" rows are
/// filtered, by "shown_capacity" and "shown_layer" the figure's own choice is set.
void filterable(Json& spec, const std::vector<std::string>& by);

}  // namespace kvreplay
