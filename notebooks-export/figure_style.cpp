#include "notebooks-export/figure_style.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "analysis/result_set.h"
#include "analysis/spec_structure.h"
#include "base/error.h"
#include "policy/spec.h"

namespace kvreplay {
namespace {

// The colours of Okabe and Ito that can be told apart on white and on black, by people with any colour vision; then
// those that stay farthest from all before them, also for these people (distances in Oklab, of each simulated vision).
constexpr std::array kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#a74ff8",
                                 "#9a3878", "#88c598", "#5b5e36", "#6632e0", "#8186d7", "#b3260e", "#c212a8"};
constexpr std::array kShapes = {"circle",        "square", "triangle-up",    "diamond",
                                "triangle-down", "cross",  "triangle-right", "triangle-left"};
// Of further policies, by which they differ from those of the same colour.
const std::vector<std::vector<int>> kDashes = {{1, 0},       {4, 2},       {1, 2},  {7, 2, 1, 2},
                                               {4, 2, 1, 2}, {8, 3, 3, 3}, {10, 2}, {1, 1, 4, 1}};
// References recede: greys and browns, dashed.
constexpr std::array kReferenceColours = {"#7f7f7f", "#a6761d", "#a8a8a8", "#8c564b"};
const std::vector<std::vector<int>> kReferenceDashes = {{2, 2}, {6, 2}, {1, 3}, {6, 2, 1, 2}};
constexpr double kDashFont = 12;  // the size of letters beside which dashes have these lengths, in points

// Of a legend's symbols: the size that Vega knows, by the square of the letters' size, and how far lines reach from the
// middle, in halves of its root.
constexpr double kSymbolSize = 0.7;
constexpr double kSymbolReach = 2.6;

std::string method_of(const std::string& spec) {
  try {
    std::string method;
    for (const SpecPart& part : parse_spec(spec)) method += (method.empty() ? "" : "+") + part.name;
    return method;
  } catch (const UsageError&) {
    return spec;  // a spec of a version that wrote them otherwise
  }
}

std::size_t characters(const std::string& text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

// Where the first `count` characters end, in bytes.
std::size_t end_of(const std::string& text, std::size_t count) {
  std::size_t end = 0;
  for (; end < text.size(); ++end) {
    if ((static_cast<unsigned char>(text[end]) & 0xC0) != 0x80 && count-- == 0) break;
  }
  return end;
}

// A text cut wherever a line may end.
std::vector<std::string> pieces_of(const std::string& text) {
  std::vector<std::string> pieces;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    while (end < text.size() && std::string_view(",(-").find(text[end - 1]) == std::string_view::npos &&
           text[end] != '+' && text[end] != ' ') {
      ++end;
    }
    pieces.push_back(text.substr(at, end - at));
    at = end;
  }
  return pieces;
}

// The characters of the longest piece, which no line can be shorter than without cutting a word.
std::size_t longest_piece(const std::string& text) {
  std::size_t longest = 0;
  for (const std::string& piece : pieces_of(text)) longest = std::max(longest, characters(piece));
  return longest;
}

// Whether a text that asks for policies is one's specification, rather than a method's name.
bool writes_out(const std::string& text) { return text.find('(') != std::string::npos; }

bool contains(const std::vector<std::string>& texts, const std::string& text) {
  return std::ranges::find(texts, text) != texts.end();
}

// What other policies are measured by, whether anybody chose it as a baseline or not.
bool is_floor(const std::string& policy) { return baseline_of(policy) == Method::Baseline::floor; }

// Policies with their mean rank over the capacities that they have, best first.
std::vector<std::string> ranked(const Analysis& analysis) {
  std::map<std::string, std::vector<const ComparisonRow*>> of_capacity;
  for (const ComparisonRow& row : analysis.comparison) of_capacity[row.key.capacity_request].push_back(&row);
  std::map<std::string, Mean> ranks;
  for (auto& [capacity, rows] : of_capacity) {
    const bool lower = traits_of(analysis.options.measure).lower_is_better;
    std::ranges::stable_sort(rows, [lower](const ComparisonRow* a, const ComparisonRow* b) {
      return lower ? a->distribution.mean < b->distribution.mean : a->distribution.mean > b->distribution.mean;
    });
    for (std::size_t i = 0; i < rows.size(); ++i) {
      ranks[rows[i]->key.policy].add(static_cast<double>(i) / static_cast<double>(rows.size()));
    }
  }
  std::vector<std::string> policies;
  for (const SettingKey& setting : analysis.settings) {
    if (setting.capacity_request != kAllPositions && !contains(policies, setting.policy)) {
      policies.push_back(setting.policy);
    }
  }
  const auto rank = [&](const std::string& policy) {
    const auto found = ranks.find(policy);
    return found == ranks.end() ? 1.0 : found->second.value();
  };
  std::ranges::stable_sort(policies, {}, rank);
  return policies;
}

}  // namespace

FigureStyle::FigureStyle(const Analysis& analysis, FigureOptions options)
    : options_(std::move(options)),
      width_(options_.theme == Theme::paper ? 238 : 600),
      font_(options_.theme == Theme::paper ? 7 : 12) {
  const std::vector<std::string> best = ranked(analysis);
  const std::vector<std::string> in_question = asked_for(best);
  const bool all = in_question.size() <= (asked() ? kMostAsked : kMostPolicies);
  policies_ = all ? in_question : thinned(analysis, best);
  // The order that was asked for stays.
  if (!all) {
    std::vector<std::string> ordered;
    for (const std::string& policy : in_question) {
      if (contains(policies_, policy)) ordered.push_back(policy);
    }
    policies_ = std::move(ordered);
  }

  // Looks go by the order of the results, so that a better ranking does not change a colour.
  std::set<std::string> oracles;
  for (const ComparisonRow& row : analysis.comparison) {
    if (row.oracle) oracles.insert(row.key.policy);
  }
  std::size_t references = 0;
  std::size_t others = 0;
  for (const SettingKey& setting : analysis.settings) {
    const std::string& policy = setting.policy;
    if (!contains(policies_, policy) || looks_.contains(policy)) continue;
    if (oracles.contains(policy) || is_floor(policy)) {
      const std::size_t place = references++;
      looks_[policy] = {kReferenceColours[place % kReferenceColours.size()], kShapes[place % kShapes.size()],
                        kReferenceDashes[(place + place / kReferenceColours.size()) % kReferenceDashes.size()]};
    } else {
      const std::size_t place = others++;
      const std::size_t round = place / kColours.size();
      looks_[policy] = {kColours[place % kColours.size()], kShapes[(place + round) % kShapes.size()],
                        kDashes[round % kDashes.size()]};
    }
  }

  for (const std::string& policy : best) {
    if (!looks_.contains(policy)) left_out_.push_back(policy);
  }
  if (!left_out_.empty()) {
    const std::string_view noun = traits_of(analysis.options.measure).noun;
    const std::string written_out = asked() ? "those whose settings were written out, " : "";
    shown_text_ = fmt::format(" Shown are {} of {} policies.", policies_.size(), best.size());
    rule_ = fmt::format(
        "Figures show {} of {} policies: {}the baseline, the oracle, random and recent; of each method the setting "
        "with the most capacities, of several the best; then the best others with as many. The best are those whose "
        "mean {} ranks first, on average over the capacities.{}",
        policies_.size(), best.size(), written_out, noun, asked() ? "" : " --policy shows those that it names.");
  }

  // A share is as many positions as most policies keep of it.
  std::map<std::string, std::vector<double>> kept;
  for (const ComparisonRow& row : analysis.comparison) kept[row.key.capacity_request].push_back(row.kept);
  for (auto& [capacity, numbers] : kept) std::ranges::sort(numbers);
  for (const SettingKey& setting : analysis.settings) {
    const std::string& capacity = setting.capacity_request;
    if (capacity == kAllPositions || contains(capacities_, capacity)) continue;
    capacities_.push_back(capacity);
    const std::optional<double> number = number_in(capacity);
    const std::vector<double>& numbers = kept[capacity];
    positions_[capacity] = number ? *number : numbers.empty() ? 0 : numbers[numbers.size() / 2];
  }
  std::ranges::stable_sort(capacities_, {}, [this](const std::string& capacity) { return positions_[capacity]; });
}

// In the order that figures have: of those asked for that of the names. What is written out keeps its place, whether
// its method is named before it or not; a method's other settings stand at its name, the best first.
std::vector<std::string> FigureStyle::asked_for(const std::vector<std::string>& best) const {
  const auto is_written_out = [this](const std::string& policy) {
    return std::ranges::any_of(options_.policies,
                               [&](const std::string& text) { return writes_out(text) && is_policy(policy, text); });
  };
  std::vector<std::string> policies;
  for (const std::string& text : options_.policies) {
    for (const std::string& policy : best) {
      if (!is_policy(policy, text) || contains(policies, policy)) continue;
      if (writes_out(text) || !is_written_out(policy)) policies.push_back(policy);
    }
  }
  for (const std::string& policy : best) {  // such as the baseline, which is asked for in another way
    if (!contains(policies, policy)) policies.push_back(policy);
  }
  return policies;
}

// Those that rule() says. A setting that was tried at fewer capacities than others is no line beside theirs.
std::vector<std::string> FigureStyle::thinned(const Analysis& analysis, const std::vector<std::string>& best) const {
  std::vector<std::string> shown;
  const auto show = [&](const std::string& policy) {
    if (shown.size() < kMostPolicies && contains(best, policy) && !contains(shown, policy)) shown.push_back(policy);
  };
  for (const std::string& text : options_.policies) {
    for (const std::string& policy : best) {
      const bool written_out = policy == text || (writes_out(text) && is_policy(policy, text));
      if (written_out && !contains(shown, policy)) shown.push_back(policy);
    }
  }
  show(analysis.options.baseline);
  show(analysis.oracle);
  for (const std::string& policy : best) {
    if (is_floor(policy)) show(policy);
  }
  std::map<std::string, int> capacities_of;
  for (const ComparisonRow& row : analysis.comparison) ++capacities_of[row.key.policy];
  std::vector<std::string> by_capacities = best;
  std::ranges::stable_sort(by_capacities, std::greater(),
                           [&](const std::string& policy) { return capacities_of[policy]; });
  std::set<std::string> methods;
  for (const std::string& policy : by_capacities) {
    if (methods.insert(method_of(policy)).second) show(policy);
  }
  for (const std::string& policy : by_capacities) {
    if (capacities_of[policy] == capacities_of[by_capacities.front()]) show(policy);
  }
  return shown;
}

bool FigureStyle::shows(const std::string& policy) const { return looks_.contains(policy); }

std::vector<std::string> FigureStyle::shown_of(const std::vector<std::string>& present) const {
  std::vector<std::string> shown;
  for (const std::string& policy : policies_) {
    if (contains(present, policy)) shown.push_back(policy);
  }
  return shown;
}

double FigureStyle::position_of(const std::string& capacity_request) const {
  const auto found = positions_.find(capacity_request);
  return found == positions_.end() ? 0 : found->second;
}

void FigureStyle::set_capacity_ticks(Json& axis, const std::vector<std::string>& capacities) const {
  // Those that cannot be told apart on the axis, such as 25 % of 256 positions and 64, share a tick.
  constexpr double kSame = 1.04;
  Json values = Json::array();
  Json labels = Json::array();
  for (const std::string& capacity : capacities_) {
    if (!contains(capacities, capacity) || !(position_of(capacity) > 0)) continue;
    if (!values.empty() && position_of(capacity) < kSame * values.back().get<double>()) {
      labels.back() = labels.back().get<std::string>() + ", " + capacity_text(capacity);
    } else {
      values.push_back(rounded(position_of(capacity)));
      labels.push_back(capacity_text(capacity));
    }
  }
  axis["values"] = values;
  axis["labelExpr"] = fmt::format("{}[indexof({}, datum.value)]", labels.dump(), values.dump());
  axis["labelOverlap"] = "greedy";
}

std::string FigureStyle::middle_capacity(const std::vector<std::string>& present) const {
  std::vector<std::string> ascending;
  for (const std::string& capacity : capacities_) {
    if (contains(present, capacity)) ascending.push_back(capacity);
  }
  if (ascending.empty()) return present.empty() ? "" : present.front();
  return ascending[(ascending.size() - 1) / 2];
}

Json FigureStyle::spec(const std::string& question, const std::string& caption) const {
  const double title = 1.1 * font_;
  const double stroke = font_ / 12;
  Json spec = {{"$schema", "https://vega.github.io/schema/vega-lite/v6.json"}};
  if (options_.titles) {
    const auto lines = broken(question, static_cast<std::size_t>(width_ / (0.58 * title)));
    spec["title"] = {{"text", lines}, {"anchor", "start"}, {"frame", "bounds"}};
  }
  spec.update(Json{{"description", caption},
                   {"background", "white"},
                   {"padding", 3},
                   {"usermeta", {{"kvreplay", {{"ppi", font_ < 10 ? 300 : 144}}}}},
                   {"config",
                    {{"font", "Arial, Liberation Sans, sans-serif"},
                     {"view", {{"stroke", "#bbbbbb"}, {"strokeWidth", stroke}}},
                     {"title",
                      {{"fontSize", title},
                       {"fontWeight", "bold"},
                       {"offset", 0.7 * font_},
                       {"subtitleFontSize", font_},
                       {"subtitlePadding", 0.4 * font_}}},
                     {"axis",
                      {{"labelFontSize", font_},
                       {"titleFontSize", font_},
                       {"titleFontWeight", "normal"},
                       {"labelLimit", 0},
                       {"titleLimit", 0},
                       {"labelPadding", 0.3 * font_},
                       {"titlePadding", 0.5 * font_},
                       {"gridColor", "#e4e4e4"},
                       {"gridWidth", stroke},
                       {"domainColor", "#888888"},
                       {"domainWidth", stroke},
                       {"tickColor", "#888888"},
                       {"tickWidth", stroke},
                       {"tickSize", 0.4 * font_}}},
                     {"legend",
                      {{"orient", "bottom"},
                       {"labelFontSize", font_},
                       {"titleFontSize", font_},
                       {"titleFontWeight", "normal"},
                       {"labelLimit", 0},
                       {"titleLimit", 0},
                       {"offset", 0.7 * font_},
                       {"rowPadding", 0.15 * font_},
                       {"columnPadding", font_},
                       {"symbolSize", kSymbolSize * font_ * font_},
                       {"symbolStrokeWidth", 1.5 * stroke},
                       {"gradientLength", 0.4 * width_},
                       {"gradientThickness", font_}}},
                     {"header",
                      {{"labelFontSize", font_},
                       {"titleFontSize", font_},
                       {"titleFontWeight", "normal"},
                       {"labelLimit", 0},
                       {"labelLineHeight", line()},
                       {"labelPadding", 0.3 * font_}}},
                     {"line", {{"strokeWidth", 1.8 * stroke}}},
                     {"point", {{"size", 0.45 * font_ * font_}, {"filled", true}, {"opacity", 1}}},
                     {"rule", {{"strokeWidth", 1.3 * stroke}}},
                     {"text", {{"fontSize", font_}}},
                     {"facet", {{"spacing", font_}}},
                     {"concat", {{"spacing", font_}}}}}});
  return spec;
}

const FigureStyle::Look& FigureStyle::look_of(const std::string& policy) const {
  static const Look kUnknown{kReferenceColours.front(), "circle", kDashes.front()};
  const auto found = looks_.find(policy);
  return found == looks_.end() ? kUnknown : found->second;
}

// A symbol of a legend as a path around 0, in units of half a symbol: a piece of the line, its dashes drawn as pieces
// of their own so that the marker's outline stays whole, and the marker.
std::string FigureStyle::symbol_of(const Look& look) const {
  const double unit = symbol_unit();
  std::string path;
  double at = -kSymbolReach;
  for (std::size_t i = 0; at < kSymbolReach; i = (i + 1) % look.dash.size()) {
    const bool solid = look.dash == kDashes.front();
    const double end = solid ? kSymbolReach : std::min(at + look.dash[i] * font_ / kDashFont / unit, kSymbolReach);
    if (i % 2 == 0) path += fmt::format("M{:.2f},0L{:.2f},0", at, end);
    at = end;
  }
  static const std::map<std::string, std::string> kMarkers = {
      {"circle", "M-.8,0A.8,.8,0,1,1,.8,0A.8,.8,0,1,1,-.8,0Z"},
      {"square", "M-.7,-.7h1.4v1.4h-1.4Z"},
      {"triangle-up", "M0,-.75L.85,.7H-.85Z"},
      {"triangle-down", "M0,.75L.85,-.7H-.85Z"},
      {"triangle-right", "M.75,0L-.7,.85V-.85Z"},
      {"triangle-left", "M-.75,0L.7,.85V-.85Z"},
      {"diamond", "M0,-.9L.9,0L0,.9L-.9,0Z"},
      {"cross", "M-.8,-.3h.5v-.5h.6v.5h.5v.6h-.5v.5h-.6v-.5h-.5Z"}};
  return path + kMarkers.at(look.shape);
}

double FigureStyle::symbol_unit() const { return std::sqrt(kSymbolSize) * font_ / 2; }

Json FigureStyle::legend(const std::vector<std::string>& policies) const {
  const double beside_axis = width_ - 4 * font_;  // it begins below the plot, right of the axis
  const std::size_t fit = characters_in(beside_axis);
  // Names are in small letters, which take less than others.
  constexpr double kLetter = 0.46;
  const double each = kLetter * font_ * static_cast<double>(longest_line(policies, fit)) +
                      2 * kSymbolReach * symbol_unit() + 1.4 * font_;
  Json symbols = Json::object();
  for (const std::string& policy : policies) symbols[policy] = symbol_of(look_of(policy));
  const double beyond = (kSymbolReach - 1) * symbol_unit();  // of what Vega takes for the symbol's width
  return {{"title", nullptr},
          {"columns", std::clamp(static_cast<int>(beside_axis / each), 1, 5)},
          {"symbolType", {{"expr", fmt::format("{}[datum.value]", symbols.dump())}}},
          {"symbolOffset", beyond},
          {"labelOffset", beyond + 0.4 * font_},
          {"symbolLimit", 0},  // all of them, where Vega would end with "…5 entries"
          {"labelExpr", label_expression(policies, fit)}};
}

Json FigureStyle::colour(const std::vector<std::string>& policies) const {
  Json range = Json::array();
  for (const std::string& policy : policies) range.push_back(look_of(policy).colour);
  return {{"field", "policy"},
          {"type", "nominal"},
          {"scale", {{"domain", policies}, {"range", range}}},
          {"legend", legend(policies)}};
}

Json FigureStyle::by_policy(const std::vector<std::string>& policies, Json (*part)(const Look&, double),
                            const Json& usual) const {
  std::map<std::string, Json> named;
  for (const std::string& policy : policies) {
    const Json value = part(look_of(policy), font_ / kDashFont);
    if (value != usual) named[value.dump()].push_back(policy);
  }
  Json conditions = Json::array();
  for (const auto& [value, names] : named) {
    conditions.push_back(
        {{"test", fmt::format("indexof({}, datum.policy) >= 0", names.dump())}, {"value", Json::parse(value)}});
  }
  if (conditions.empty()) return {{"value", usual}};
  return {{"condition", conditions}, {"value", usual}};
}

Json FigureStyle::shape(const std::vector<std::string>& policies) const {
  return by_policy(
      policies, [](const Look& look, double) -> Json { return look.shape; }, kShapes.front());
}

Json FigureStyle::dash(const std::vector<std::string>& policies) const {
  return by_policy(
      policies,
      [](const Look& look, double by) -> Json {
        if (look.dash == kDashes.front()) return look.dash;
        Json lengths = Json::array();
        for (const int length : look.dash) lengths.push_back(rounded(length * by));
        return lengths;
      },
      kDashes.front());
}

std::string FigureStyle::label_expression(const std::vector<std::string>& texts, std::size_t most) const {
  Json lines = Json::object();
  for (const std::string& text : texts) {
    if (characters(text) > most) lines[text] = broken(text, most);
  }
  if (lines.empty()) return "datum.label";
  // In brackets, since Vega-Lite puts an expression in the place of a header's label.
  return fmt::format("{}[(datum.label)] || (datum.label)", lines.dump());
}

std::size_t FigureStyle::most_lines(const std::vector<std::string>& texts, std::size_t most) {
  std::size_t lines = 1;
  for (const std::string& text : texts) lines = std::max(lines, broken(text, most).size());
  return lines;
}

std::size_t FigureStyle::longest_line(const std::vector<std::string>& texts, std::size_t most) {
  std::size_t longest = 1;
  for (const std::string& text : texts) {
    for (const std::string& line : broken(text, most)) longest = std::max(longest, characters(line));
  }
  return longest;
}

void FigureStyle::choose(Json& spec, const std::string& column, const std::vector<std::string>& values,
                         const std::string& chosen) const {
  if (values.size() < 2) return;
  const std::string parameter = "shown_" + column;
  spec["params"].push_back(
      {{"name", parameter},
       {"value", chosen},
       {"bind",
        {{"input", "select"}, {"options", values}, {"name", column == "evict_at" ? "evicted at " : column + " "}}}});
  // What a picture shows, which nobody can choose in it.
  if (options_.titles) {
    Json& title = spec["title"]["subtitle"];
    if (title.is_null()) title = Json::array();
    const std::string text = column == "capacity" ? capacity_text(chosen) : chosen;
    title.push_back(column == "evict_at" ? fmt::format("evicted at {}", text) : fmt::format("{}: {}", column, text));
  }
  Json& transform = spec["transform"];
  if (transform.is_null()) transform = Json::array();
  transform.insert(transform.begin(), Json{{"filter", fmt::format("datum.{} === {}", column, parameter)}});
}

std::size_t FigureStyle::panel_columns(const std::vector<std::string>& texts, double outside) const {
  constexpr std::size_t kMostColumns = 4;
  std::size_t columns = texts.size() <= 4   ? std::min<std::size_t>(texts.size(), 2)
                        : texts.size() <= 9 ? 3
                                            : kMostColumns;
  const auto fits = [&]() {
    const std::size_t fit = characters_in(panel_width(columns, outside));
    return std::ranges::all_of(texts, [&](const std::string& text) { return longest_piece(text) <= fit; });
  };
  while (columns > 1 && !fits()) --columns;
  return std::max<std::size_t>(columns, 1);
}

double FigureStyle::panel_width(std::size_t columns, double outside) const {
  return (width_ - outside - static_cast<double>(columns - 1) * font_) / static_cast<double>(columns);
}

std::vector<std::string> broken(const std::string& text, std::size_t most) {
  most = std::max<std::size_t>(most, 1);
  std::vector<std::string> lines = {""};
  for (std::string piece : pieces_of(text)) {
    if (characters(lines.back()) > 0 && characters(lines.back() + piece) > most) {
      lines.emplace_back();
      piece.erase(0, piece.find_first_not_of(' '));
    }
    while (characters(piece) > most) {
      const std::size_t end = end_of(piece, most);
      lines.back() += piece.substr(0, end);
      piece.erase(0, end);
      lines.emplace_back();
    }
    lines.back() += piece;
  }
  return lines;
}

std::string axis_title(Measure measure) {
  const MeasureTraits& traits = traits_of(measure);
  return traits.unit.empty() ? std::string(traits.noun) : fmt::format("{} ({})", traits.noun, traits.unit);
}

double rounded(double number) {
  if (!std::isfinite(number) || number == 0) return number;
  return std::strtod(fmt::format("{:.5e}", number).c_str(), nullptr);
}

Json diverging_scale(double largest) {
  if (!(largest > 0)) largest = 1;
  // Blue and orange differ in lightness too, and red-green blindness leaves both alone.
  return {{"domain", {-largest, -largest / 2, 0, largest / 2, largest}},
          {"range", {"#08519c", "#6baed6", "#f2f2f2", "#fdae6b", "#a63603"}},
          {"interpolate", "lab"}};
}

Json sequential_scale() { return {{"scheme", "cividis"}}; }

Json capacity_colours(const std::vector<std::string>& capacities) {
  constexpr std::array kShades = {"#8e4ec6", "#3a7ca5", "#35b779", "#b8a800"};
  Json range = Json::array();
  for (std::size_t i = 0; i < capacities.size(); ++i) {
    range.push_back(kShades[capacities.size() == 1 ? 1 : i % kShades.size()]);
  }
  return {{"domain", capacities}, {"range", range}};
}

Json capacity_shapes(const std::vector<std::string>& capacities) {
  Json range = Json::array();
  for (std::size_t i = 0; i < capacities.size(); ++i) range.push_back(kShapes[i % 4]);
  return {{"domain", capacities}, {"range", range}};
}

bool has_numbers(const DataTable& table, const std::string& column) {
  const auto& columns = table.columns();
  const auto place = static_cast<std::size_t>(std::ranges::find(columns, column) - columns.begin());
  return std::ranges::any_of(table.rows(), [place](const std::vector<Cell>& row) {
    const auto* number = std::get_if<double>(&row[place]);
    return number != nullptr && std::isfinite(*number);
  });
}

bool spans_magnitudes(double least, double most) { return least > 0 && most / least >= 20; }

bool spans_magnitudes(const DataTable& table, const std::vector<std::string>& columns) {
  double least = std::numeric_limits<double>::infinity();
  double most = -least;
  for (const std::string& column : columns) {
    const auto place = static_cast<std::size_t>(std::ranges::find(table.columns(), column) - table.columns().begin());
    for (const std::vector<Cell>& row : table.rows()) {
      least = std::fmin(least, std::get<double>(row[place]));
      most = std::fmax(most, std::get<double>(row[place]));
    }
  }
  return spans_magnitudes(least, most);
}

int last_of(const DataTable& table, const std::string& column) {
  const auto& columns = table.columns();
  const auto place = static_cast<std::size_t>(std::ranges::find(columns, column) - columns.begin());
  double last = 0;
  for (const std::vector<Cell>& row : table.rows()) last = std::fmax(last, std::get<double>(row[place]));
  return static_cast<int>(last);
}

std::vector<int> integer_ticks(int last) {
  constexpr int kMost = 9;
  int step = 1;
  while (last / step + 1 > kMost) {
    std::string digits = std::to_string(step);  // 1, 2, 5, 10, 20, …
    step = digits.front() == '2' ? step / 2 * 5 : step * 2;
  }
  std::vector<int> ticks;
  for (int tick = 0; tick <= last; tick += step) ticks.push_back(tick);
  return ticks;
}

std::vector<std::string> distinct(const DataTable& table, const std::string& column) {
  const auto& columns = table.columns();
  const auto place = static_cast<std::size_t>(std::ranges::find(columns, column) - columns.begin());
  std::vector<std::string> texts;
  std::set<std::string> seen;
  for (const std::vector<Cell>& row : table.rows()) {
    const std::string& text = std::get<std::string>(row[place]);
    if (seen.insert(text).second) texts.push_back(text);
  }
  return texts;
}

std::string capacity_text(const std::string& capacity_request) {
  if (!capacity_request.ends_with('%')) return capacity_request;
  return capacity_request.substr(0, capacity_request.size() - 1) + " %";
}

std::string capacities_text(const std::vector<std::string>& capacity_requests) {
  std::string text;
  for (std::size_t i = 0; i < capacity_requests.size(); ++i) {
    if (i > 0) text += i + 1 == capacity_requests.size() ? " and " : ", ";
    text += capacity_text(capacity_requests[i]);
  }
  return text;
}

std::string capacities_left_out(const std::vector<std::string>& all, const std::vector<std::string>& shown) {
  std::vector<std::string> others;
  for (const std::string& capacity : all) {
    if (!contains(shown, capacity)) others.push_back(capacity);
  }
  if (others.empty()) return "";
  return fmt::format(" Of {} capacities, {} are not shown.", all.size(), capacities_text(others));
}

std::string about_intervals(const Analysis& analysis) {
  const BootstrapOptions& bootstrap = analysis.options.bootstrap;
  if (bootstrap.resamples == 0) {
    return fmt::format("Bars: {:g} % intervals in closed form.", 100 * bootstrap.confidence);
  }
  return fmt::format("Bars: {:g} % bootstrap intervals ({} resamples of {}).", 100 * bootstrap.confidence,
                     bootstrap.resamples,
                     bootstrap.resampling == Resampling::traces ? "traces and blocks of neighbouring queries"
                                                                : "blocks of neighbouring queries");
}

std::string about_means(const Analysis& analysis, std::string_view over) {
  return fmt::format("Means over {}{}.", over,
                     analysis.traces.size() > 1 ? "; every trace and eviction position weighs the same" : "");
}

std::string_view averaged_over(Measure measure) {
  return traits_of(measure).is_of_layers() ? "layers, heads and evaluation queries" : "evaluation queries";
}

std::string_view paired_on(Measure measure) {
  return traits_of(measure).is_of_layers() ? "trace, eviction position, layer, head and query"
                                           : "trace, eviction position and query";
}

// Not Vega-Lite's own steps, which go together with a fitted width only under protest.
void rows_of(Json& spec, const std::string& column, std::size_t count, double step) {
  spec["height"] = step * static_cast<double>(count);
  spec["usermeta"]["kvreplay"]["rows"] = {{"column", column}, {"step", step}};
}

void filterable(Json& spec, const std::vector<std::string>& by) { spec["usermeta"]["kvreplay"]["filters"] = by; }

}  // namespace kvreplay
