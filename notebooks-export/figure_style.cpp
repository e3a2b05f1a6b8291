#include "notebooks-export/figure_style.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <set>
#include <utility>

#include "base/error.h"
#include "policy/spec.h"

namespace kvreplay {
namespace {

// The colours of Okabe and Ito that can be told apart on white and on black, by people with any colour vision.
constexpr std::array kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"};
constexpr std::array kShapes = {"circle", "square", "triangle-up", "diamond", "triangle-down", "cross"};
// References recede: greys and browns, each with dashes of its own.
constexpr std::array kReferenceColours = {"#7f7f7f", "#a6761d", "#a8a8a8", "#8c564b"};
const std::array<std::vector<int>, 4> kReferenceDashes = {{{2, 2}, {6, 2}, {1, 3}, {6, 2, 1, 2}}};
const std::vector<int> kSolid = {1, 0};

constexpr std::size_t kMostMethods = 8;  // lines that an eye can follow, next to the references
constexpr std::size_t kMostReferences = 4;

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

bool contains(const std::vector<std::string>& texts, const std::string& text) {
  return std::ranges::find(texts, text) != texts.end();
}

// Policies with their mean rank over the capacities that they have, best first.
std::vector<std::string> ranked(const Analysis& analysis) {
  std::map<std::string, std::vector<const ComparisonRow*>> of_capacity;
  for (const ComparisonRow& row : analysis.comparison) of_capacity[row.key.capacity_request].push_back(&row);
  std::map<std::string, std::pair<double, int>> ranks;
  for (auto& [capacity, rows] : of_capacity) {
    const bool lower = traits_of(analysis.options.measure).lower_is_better;
    std::ranges::stable_sort(rows, [lower](const ComparisonRow* a, const ComparisonRow* b) {
      return lower ? a->distribution.mean < b->distribution.mean : a->distribution.mean > b->distribution.mean;
    });
    for (std::size_t i = 0; i < rows.size(); ++i) {
      auto& [sum, count] = ranks[rows[i]->key.policy];
      sum += static_cast<double>(i) / static_cast<double>(rows.size());
      ++count;
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
    return found == ranks.end() ? 1.0 : found->second.first / found->second.second;
  };
  std::ranges::stable_sort(policies, {}, rank);
  return policies;
}

}  // namespace

FigureStyle::FigureStyle(const Analysis& analysis, Theme theme)
    : width_(theme == Theme::paper ? 238 : 600), font_(theme == Theme::paper ? 7 : 12) {
  std::set<std::string> oracles;
  for (const ComparisonRow& row : analysis.comparison) {
    if (row.oracle) oracles.insert(row.key.policy);
  }
  const auto is_reference = [&](const std::string& policy) {
    const std::string method = method_of(policy);
    return oracles.contains(policy) || method == "random" || method == "recent";
  };
  // Who is shown: the baseline, of each method the setting with the most capacities and the best of these, then the
  // best others of as many; apart from these the references. A setting that was tried at one capacity is no line.
  std::map<std::string, int> capacities_of;
  for (const ComparisonRow& row : analysis.comparison) ++capacities_of[row.key.policy];
  std::vector<std::string> best = ranked(analysis);
  std::ranges::stable_sort(best, std::greater(), [&](const std::string& policy) { return capacities_of[policy]; });
  std::vector<std::string> methods;
  std::vector<std::string> references;
  std::set<std::string> seen;
  const auto show = [&](const std::string& policy) {
    std::vector<std::string>& group = is_reference(policy) ? references : methods;
    const std::size_t most = &group == &references ? kMostReferences : kMostMethods;
    if (group.size() < most && !contains(group, policy)) group.push_back(policy);
  };
  if (contains(best, analysis.options.baseline)) show(analysis.options.baseline);
  if (contains(best, analysis.oracle)) show(analysis.oracle);
  for (const std::string& policy : best) {
    if (seen.insert(method_of(policy)).second) show(policy);
  }
  for (const std::string& policy : best) {
    if (capacities_of[policy] == capacities_of[best.front()]) show(policy);
  }
  // In the order of the results, so that a better ranking does not change a colour.
  std::vector<std::string> in_order;
  for (const SettingKey& setting : analysis.settings) {
    if (!contains(in_order, setting.policy)) in_order.push_back(setting.policy);
  }
  for (const std::string& policy : in_order) {
    if (contains(methods, policy)) policies_.push_back(policy);
  }
  const std::size_t number_of_methods = policies_.size();
  by_importance_ = methods;
  by_importance_.insert(by_importance_.end(), references.begin(), references.end());
  for (const std::string& policy : in_order) {
    if (contains(references, policy)) policies_.push_back(policy);
  }
  for (std::size_t i = 0; i < policies_.size(); ++i) {
    const bool reference = i >= number_of_methods;
    const std::size_t place = reference ? i - number_of_methods : i;
    Look look{reference ? kReferenceColours[place % kReferenceColours.size()] : kColours[place % kColours.size()],
              kShapes[(place + place / kColours.size()) % kShapes.size()], kSolid};
    if (!reference && place >= kColours.size()) look.dash = {4, 2};
    if (reference) look.dash = kReferenceDashes[place % kReferenceDashes.size()];
    looks_.emplace(policies_[i], std::move(look));
  }
  if (policies_.size() < best.size()) {
    left_out_ = fmt::format(
        " Of {1} policies, figures show {0} or those of them that have such numbers: baseline, oracle, random and "
        "recent, of each method the setting with the most capacities, then others with as many (the best first, by "
        "rank "
        "of the mean {2}).",
        policies_.size(), best.size(), traits_of(analysis.options.measure).noun);
  }

  std::map<std::string, std::pair<double, int>> kept;
  for (const ComparisonRow& row : analysis.comparison) {
    auto& [sum, count] = kept[row.key.capacity_request];
    sum += row.kept;
    ++count;
  }
  for (const SettingKey& setting : analysis.settings) {
    const std::string& capacity = setting.capacity_request;
    if (capacity != kAllPositions && !contains(capacities_, capacity)) capacities_.push_back(capacity);
  }
  std::ranges::stable_sort(capacities_, {}, [&](const std::string& capacity) {
    const auto found = kept.find(capacity);
    return found == kept.end() ? 0 : found->second.first / found->second.second;
  });
}

bool FigureStyle::shows(const std::string& policy) const { return looks_.contains(policy); }

std::vector<std::string> FigureStyle::some_of(const std::vector<std::string>& present, std::size_t most) const {
  std::vector<std::string> chosen;
  for (const std::string& policy : by_importance_) {
    if (chosen.size() < most && contains(present, policy)) chosen.push_back(policy);
  }
  std::vector<std::string> in_order;
  for (const std::string& policy : policies_) {
    if (contains(chosen, policy)) in_order.push_back(policy);
  }
  return in_order;
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
  const auto lines = broken(question, static_cast<std::size_t>(width_ / (0.58 * title)));
  return {{"$schema", "https://vega.github.io/schema/vega-lite/v6.json"},
          {"title", {{"text", lines}, {"anchor", "start"}, {"frame", "bounds"}}},
          {"description", caption},
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
              {"symbolSize", 0.7 * font_ * font_},
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
            {"concat", {{"spacing", font_}}}}}};
}

const FigureStyle::Look& FigureStyle::look_of(const std::string& policy) const {
  static const Look kUnknown{kReferenceColours.front(), "circle", kSolid};
  const auto found = looks_.find(policy);
  return found == looks_.end() ? kUnknown : found->second;
}

Json FigureStyle::scale(const std::vector<std::string>& policies, Json (*part)(const Look&)) const {
  Json range = Json::array();
  for (const std::string& policy : policies) range.push_back(part(look_of(policy)));
  return {{"domain", policies}, {"range", range}};
}

Json FigureStyle::legend(const std::vector<std::string>& policies) const {
  const std::size_t fit = characters_in(width_ - 3 * font_);
  const double each = text_width(longest_line(policies, fit)) + 2.5 * font_;
  return {{"title", nullptr},
          {"columns", std::clamp(static_cast<int>(width_ / each), 1, 5)},
          {"labelExpr", label_expression(policies, fit)}};
}

Json FigureStyle::colour(const std::vector<std::string>& policies) const {
  return {{"field", "policy"},
          {"type", "nominal"},
          {"scale", scale(policies, [](const Look& look) -> Json { return look.colour; })},
          {"legend", legend(policies)}};
}

Json FigureStyle::shape(const std::vector<std::string>& policies) const {
  return {{"field", "policy"},
          {"type", "nominal"},
          {"scale", scale(policies, [](const Look& look) -> Json { return look.shape; })},
          {"legend", legend(policies)}};
}

Json FigureStyle::dash(const std::vector<std::string>& policies) const {
  std::map<std::vector<int>, Json> dashed;
  for (const std::string& policy : policies) {
    const std::vector<int>& dash = look_of(policy).dash;
    if (dash != kSolid) dashed[dash].push_back(policy);
  }
  // No scale, since legends would give symbols dashed outlines.
  Json conditions = Json::array();
  for (const auto& [dash, names] : dashed) {
    conditions.push_back({{"test", fmt::format("indexof({}, datum.policy) >= 0", names.dump())}, {"value", dash}});
  }
  return {{"condition", conditions}, {"value", kSolid}};
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
                         const std::string& chosen) {
  if (values.size() < 2) return;
  const std::string parameter = "shown_" + column;
  spec["params"].push_back(
      {{"name", parameter},
       {"value", chosen},
       {"bind",
        {{"input", "select"}, {"options", values}, {"name", column == "evict_at" ? "evicted at " : column + " "}}}});
  // What a picture shows, which nobody can choose in it.
  Json& title = spec["title"]["subtitle"];
  if (title.is_null()) title = Json::array();
  title.push_back(column == "evict_at" ? fmt::format("evicted at {}", chosen) : fmt::format("{}: {}", column, chosen));
  Json& transform = spec["transform"];
  if (transform.is_null()) transform = Json::array();
  transform.insert(transform.begin(), Json{{"filter", fmt::format("datum.{} === {}", column, parameter)}});
}

std::vector<std::string> broken(const std::string& text, std::size_t most) {
  std::vector<std::string> lines = {""};
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = at + 1;
    while (end < text.size() && text[end - 1] != ',' && text[end - 1] != '(' && text[end] != '+' && text[end] != ' ')
      ++end;
    std::string piece = text.substr(at, end - at);
    at = end;
    if (characters(lines.back()) > 0 && characters(lines.back() + piece) > most) {
      lines.emplace_back();
      piece.erase(0, piece.find_first_not_of(' '));
    }
    lines.back() += piece;
  }
  return lines;
}

std::string axis_title(Measure measure) {
  switch (measure) {
    case Measure::layer_error:
    case Measure::head_error:
      return fmt::format("{} (relative to the full output)", traits_of(measure).noun);
    case Measure::attention_recall:
      return "attention recall (share of the mass)";
    case Measure::span_recall:
      return "span recall (share of positions)";
    case Measure::cosine:
    case Measure::spearman:
    case Measure::kendall:
      break;
  }
  return std::string(traits_of(measure).noun);
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

// Not Vega-Lite's own steps, which go together with a fitted width only under protest.
void rows_of(Json& spec, const std::string& column, std::size_t count, double step) {
  spec["height"] = step * static_cast<double>(count);
  spec["usermeta"]["kvreplay"]["rows"] = {{"column", column}, {"step", step}};
}

void filterable(Json& spec, const std::vector<std::string>& by) { spec["usermeta"]["kvreplay"]["filters"] = by; }

}  // namespace kvreplay
