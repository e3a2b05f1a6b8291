#include "notebooks-export/page/page.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string_view>

#include "analysis/findings.h"
#include "base/printable.h"
#include "notebooks-export/embedded_files.h"
#include "notebooks-export/figure_style.h"
#include "notebooks-export/tables/tables.h"

namespace kvreplay {

const char* const kReportMarker = "<!doctype html>\n<!-- report of kvreplay -->";

namespace {

std::string html(std::string_view text) {
  std::string escaped;
  for (const char c : printable(text)) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

// JSON between <script> tags: nothing in it may look like a tag.
std::string script_json(const Json& json) {
  std::string text;
  for (const char c : json.dump(-1, ' ', false, Json::error_handler_t::replace)) {
    text += c == '<' ? std::string("\\u003c") : std::string(1, c);
  }
  return text;
}

std::string script_code(std::string text) {
  for (const auto& [tag, harmless] :
       {std::pair{std::string("</script"), std::string("<\\/script")}, {std::string("<!--"), std::string("<\\!--")}}) {
    for (std::size_t at = 0; (at = text.find(tag, at)) != std::string::npos; at += harmless.size()) {
      text.replace(at, tag.size(), harmless);
    }
  }
  return text;
}

// A table column by column, texts each once: a fraction of what rows with names take.
Json packed(const DataTable& table) {
  Json values = Json::array();
  for (std::size_t column = 0; column < table.columns().size(); ++column) {
    if (table.is_text(column)) {
      std::map<std::string, std::size_t> place;
      Json texts = Json::array();
      Json codes = Json::array();
      for (const std::vector<Cell>& row : table.rows()) {
        const std::string& text = std::get<std::string>(row[column]);
        const auto [found, is_new] = place.try_emplace(text, place.size());
        if (is_new) texts.push_back(text);
        codes.push_back(found->second);
      }
      values.push_back({{"texts", std::move(texts)}, {"codes", std::move(codes)}});
    } else {
      Json numbers = Json::array();
      for (const std::vector<Cell>& row : table.rows()) {
        const double number = std::get<double>(row[column]);
        numbers.push_back(std::isnan(number) ? Json() : Json(number));
      }
      values.push_back(std::move(numbers));
    }
  }
  return {{"columns", table.columns()}, {"rows", table.rows().size()}, {"values", std::move(values)}};
}

std::string plural(std::size_t count, std::string_view noun, std::string_view nouns) {
  return fmt::format("{} {}", count, count == 1 ? noun : nouns);
}

// What was captured, in one sentence.
std::string captured(const Analysis& analysis) {
  std::set<int> prompts;
  std::set<int> evictions;
  std::set<int> others;
  std::vector<std::string> models;
  for (const TraceOverview& trace : analysis.traces) {
    prompts.insert(trace.prompt_length);
    evictions.insert(trace.eviction_positions.begin(), trace.eviction_positions.end());
    others.insert(trace.other_eviction_positions.begin(), trace.other_eviction_positions.end());
    const std::string model = fmt::format(
        "{} ({}, {} on {})", trace.model, plural(static_cast<std::size_t>(trace.num_layers), "layer", "layers"),
        plural(static_cast<std::size_t>(trace.num_query_heads), "query head", "query heads"),
        plural(static_cast<std::size_t>(trace.num_kv_heads), "KV head", "KV heads"));
    if (std::ranges::find(models, model) == models.end()) models.push_back(model);
  }
  std::string names;
  for (std::size_t i = 0; i < models.size(); ++i) {
    if (i > 0) names += i + 1 == models.size() ? " and " : ", ";
    names += models[i];
  }
  for (const int position : evictions) others.erase(position);
  return fmt::format("{} of {}; prompts of {} tokens, evicted at position {}{}.",
                     plural(analysis.traces.size(), "trace", "traces"), names, range_text(prompts),
                     range_text(evictions),
                     others.empty() ? "" : fmt::format(", and apart from that at {}", range_text(others)));
}

std::string compared(const Analysis& analysis, const FigureStyle& style) {
  std::set<std::string> policies;
  for (const SettingKey& setting : analysis.settings) {
    if (setting.capacity_request != kAllPositions) policies.insert(setting.policy);
  }
  std::string capacities;
  for (const std::string& capacity : style.capacities()) {
    capacities += (capacities.empty() ? "" : ", ") + capacity_text(capacity);
  }
  std::string text = fmt::format("{} at {} ({}), by {}", plural(policies.size(), "policy", "policies"),
                                 plural(style.capacities().size(), "capacity", "capacities"), capacities,
                                 traits_of(analysis.options.measure).noun);
  if (!analysis.options.baseline.empty()) text += fmt::format("; baseline: {}", analysis.options.baseline);
  if (!analysis.oracle.empty()) text += fmt::format("; oracle: {}", analysis.oracle);
  return text + ".";
}

// Whether a policy keeps what was asked for: of a share, as many positions as most of the others.
bool keeps_as_asked(const ComparisonRow& row, const FigureStyle& style) {
  constexpr double kSame = 0.005;
  const double asked = style.position_of(row.key.capacity_request);
  return !(asked > 0) || std::abs(row.kept / asked - 1) <= kSame;
}

using RowsBySetting = std::map<SettingKey, const ComparisonRow*>;

RowsBySetting shown_rows(const std::vector<ComparisonRow>& comparison, const FigureStyle& style) {
  RowsBySetting rows;
  for (const ComparisonRow& row : comparison) {
    if (style.shows(row.key.policy)) rows[{row.key.policy, row.key.capacity_request}] = &row;
  }
  return rows;
}

// The table of a caption that has the id `name`: a row per policy, a column per capacity.
std::string table_by_capacity(const FigureStyle& style, const RowsBySetting& rows, const std::vector<SettingKey>& best,
                              std::string_view name, std::string_view label) {
  std::string text = fmt::format(
      "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{}\"><table class=\"means\" "
      "aria-labelledby=\"{}\"><thead><tr><th scope=\"col\">policy</th>",
      label, name);
  for (const std::string& capacity : style.capacities()) {
    text += fmt::format("<th scope=\"col\">{}</th>", html(capacity_text(capacity)));
  }
  text += "</tr></thead><tbody>\n";
  for (const std::string& policy : style.policies()) {
    text += fmt::format("<tr><th scope=\"row\">{}</th>", html(policy));
    for (const std::string& capacity : style.capacities()) {
      const auto found = rows.find({policy, capacity});
      if (found == rows.end()) {
        text += "<td>–</td>";
        continue;
      }
      const ComparisonRow& row = *found->second;
      const std::string mean = fmt::format("{:.4f}", row.distribution.mean);
      const bool first = std::ranges::find(best, SettingKey{policy, capacity}) != best.end();
      text += fmt::format("<td>{}{}</td>", first ? fmt::format("<strong>{}</strong>", mean) : mean,
                          keeps_as_asked(row, style) ? "" : fmt::format(" <small>({:.4g})</small>", row.kept));
    }
    text += "</tr>\n";
  }
  return text + "</tbody></table></div>";
}

// Means by policy and capacity, the best of each capacity marked.
std::string means_table(const Analysis& analysis, const FigureStyle& style) {
  const RowsBySetting rows = shown_rows(analysis.comparison, style);
  // Outside of what scrolls, so that it is whole where the table is wider than the window.
  std::string text = fmt::format(
      "<p class=\"caption\" id=\"means\">Mean {} at each capacity; the best policy in bold, but for oracles, what "
      "stores more than most and what had nothing to choose.{}{}{}</p>\n",
      html(traits_of(analysis.options.measure).noun),
      !analysis.apart.empty() || std::ranges::any_of(analysis.curves, &CapacityCurve::partial)
          ? " Not all are of the same traces and eviction positions: see the notes."
          : "",
      std::ranges::all_of(rows, [&](const auto& entry) { return keeps_as_asked(*entry.second, style); })
          ? ""
          : " In brackets: the positions that a head keeps, where they are not those asked for.",
      html(style.shown_text()));
  text += table_by_capacity(style, rows, best_settings(analysis), "means", "Means");
  if (analysis.beside.empty()) return text;
  text += fmt::format(
      "\n<p class=\"caption\" id=\"means-beside\">Beside it, the mean {}, which a replay measures layer by "
      "layer.</p>\n",
      html(traits_of(analysis.layer_measure).noun));
  return text + table_by_capacity(style, shown_rows(analysis.beside, style), {}, "means-beside", "Means beside it");
}

std::string traces_table(const Analysis& analysis) {
  std::string text =
      "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Traces\"><table><thead><tr>"
      "<th scope=\"col\">trace</th><th scope=\"col\">model</th><th scope=\"col\">prompt (tokens)</th>"
      "<th scope=\"col\">evicted at</th><th scope=\"col\">evaluation queries</th><th scope=\"col\">annotated spans</th>"
      "</tr></thead><tbody>\n";
  for (const TraceOverview& trace : analysis.traces) {
    std::string evictions;
    for (const int position : trace.eviction_positions) {
      evictions += fmt::format("{}{}", evictions.empty() ? "" : ", ", position);
    }
    std::string others;
    for (const int position : trace.other_eviction_positions) {
      others += fmt::format("{}{}", others.empty() ? "; apart from that " : ", ", position);
    }
    evictions += others;
    text += fmt::format("<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                        html(trace.trace), html(trace.model), trace.prompt_length, evictions, trace.evaluation_queries,
                        trace.spans.size());
  }
  return text + "</tbody></table></div>";
}

std::string list_of(const std::vector<std::string>& texts, std::string_view tag) {
  std::string text = fmt::format("<{}>\n", tag);
  for (const std::string& each : texts) text += fmt::format("<li>{}</li>\n", html(each));
  return text + fmt::format("</{}>\n", tag);
}

std::string summary(const Analysis& analysis, const FigureStyle& style, const PageContent& content) {
  std::string text =
      fmt::format("<p><span class=\"label\">Captured</span> {}</p>\n<p><span class=\"label\">Compared</span> {}</p>\n",
                  html(captured(analysis)), html(compared(analysis, style)));
  if (!content.findings.empty()) {
    text += "<h3>Findings</h3>\n" + list_of(content.findings, "ol");
  }
  text = fmt::format("<div class=\"beside\">\n<div>\n{}</div>\n<div>\n{}</div>\n</div>", text,
                     means_table(analysis, style));
  if (!style.left_out().empty()) {
    text += fmt::format("\n<details id=\"left-out\"><summary>{} in no figure</summary><p>{}</p>{}</details>",
                        plural(style.left_out().size(), "policy is", "policies are"), html(style.rule()),
                        list_of(style.left_out(), "ul"));
  }
  text += fmt::format("\n<details><summary>{}</summary>{}</details>\n",
                      plural(analysis.traces.size(), "trace", "traces"), traces_table(analysis));
  if (!analysis.notes.empty()) {
    text += fmt::format("<details><summary>{}</summary>{}</details>\n",
                        plural(analysis.notes.size(), "note about these numbers", "notes about these numbers"),
                        list_of(analysis.notes, "ul"));
  }
  if (!content.left_out.empty()) {
    text += fmt::format("<details><summary>{} not here for want of data</summary>{}</details>\n",
                        plural(content.left_out.size(), "figure is", "figures are"), list_of(content.left_out, "ul"));
  }
  return text;
}

std::string figure_section(const PageFigure& of_page, bool drawn) {
  const Figure& figure = of_page.figure;
  Json data = {{"spec", figure.spec}, {"narrow", of_page.narrow}, {"table", packed(figure.table)}};
  std::string files;
  const auto link = [&](const std::string& kind, const std::string& file) {
    files += fmt::format("{}<a href=\"{}\">{}</a>", files.empty() ? "" : " · ", file, kind);
  };
  if (drawn) {
    for (const auto& [kind, suffix] : {std::pair{"SVG", "svg"}, {"PNG", "png"}, {"PDF", "pdf"}}) {
      link(kind, fmt::format("figures/{}.{}", figure.name, suffix));
    }
  }
  link("Vega-Lite", fmt::format("figures/{}.vl.json", figure.name));
  link("CSV", fmt::format("tables/{}.csv", figure.name));
  return fmt::format(
      "<figure id=\"{0}\" aria-labelledby=\"{0}-question\">\n<h3 id=\"{0}-question\">{1}</h3>\n"
      "<div class=\"plot scroll\" role=\"group\" aria-label=\"Figure: {1}\" tabindex=\"0\"></div>\n"
      "<div class=\"choices\"></div>\n"
      "<p class=\"message\" role=\"status\"></p>\n<figcaption>{2}</figcaption>\n{6}"
      "<details class=\"numbers\"><summary>The numbers: {3}</summary><div class=\"scroll\" tabindex=\"0\" "
      "role=\"region\" aria-label=\"The numbers of: {1}\"></div></details>\n<p class=\"files\">{4}</p>\n"
      "<script type=\"application/json\">{5}</script>\n</figure>\n",
      figure.name, html(figure.question), html(figure.caption), plural(figure.table.rows().size(), "row", "rows"),
      files, script_json(data),
      figure.left_out.empty() ? ""
                              : fmt::format("<details><summary>{} more, which are not drawn</summary>{}</details>\n",
                                            figure.left_out.size(), list_of(figure.left_out, "ul")));
}

std::string contents(const std::vector<PageFigure>& figures) {
  std::string text = "<ul>\n";
  for (const auto& [figure, narrow] : figures) {
    text += fmt::format("<li><a href=\"#{}\">{}</a></li>\n", figure.name, html(figure.question));
  }
  return text + "</ul>\n";
}

// What the filters offer: policies with their colours, capacities, layers; of those that some figure is filtered by.
Json filter_choices(const Analysis& analysis, const FigureStyle& style, const std::vector<PageFigure>& figures) {
  std::set<std::string> by;
  for (const auto& [figure, narrow] : figures) {
    const Json filters = figure.spec.value("/usermeta/kvreplay/filters"_json_pointer, Json::array());
    for (const Json& filter : filters) by.insert(filter.get<std::string>());
  }
  Json choices;
  choices["policies"] = Json::array();
  choices["capacities"] = Json::array();
  choices["layers"] = Json::array();
  if (by.contains("policy") && style.policies().size() > 1) {
    for (const std::string& policy : style.policies()) {
      choices["policies"].push_back(
          {{"name", policy}, {"colour", style.colour_of(policy)}, {"dashes", style.dashes_of(policy)}});
    }
  }
  if ((by.contains("capacity") || by.contains("shown_capacity")) && style.capacities().size() > 1) {
    choices["capacities"] = style.capacities();
  }
  if (by.contains("shown_layer")) {
    int layers = 0;
    for (const TraceOverview& trace : analysis.traces) layers = std::max(layers, trace.num_layers);
    for (int layer = 0; layer < layers; ++layer) choices["layers"].push_back(fmt::format("{}", layer));
  }
  return choices;
}

// The template with every @NAME@ replaced once: what is put in may contain anything.
std::string filled(std::string_view page, const std::map<std::string, std::string>& parts) {
  std::string text;
  while (!page.empty()) {
    const std::size_t at = page.find('@');
    const std::size_t end = at == std::string_view::npos ? at : page.find('@', at + 1);
    const auto found =
        end == std::string_view::npos ? parts.end() : parts.find(std::string(page.substr(at + 1, end - at - 1)));
    if (found == parts.end()) {
      const std::size_t until = at == std::string_view::npos ? page.size() : at + 1;
      text += page.substr(0, until);
      page.remove_prefix(until);
    } else {
      text += page.substr(0, at);
      text += found->second;
      page.remove_prefix(end + 1);
    }
  }
  return text;
}

}  // namespace

std::string page_text(const Analysis& analysis, const FigureStyle& style, const std::vector<PageFigure>& figures,
                      const PageContent& content) {
  std::string sections;
  for (const PageFigure& figure : figures) sections += figure_section(figure, content.missing.empty());
  return kReportMarker +
         filled(embedded_file("page.html"),
                {{"TITLE", html(content.title)},
                 {"STYLE", std::string(embedded_file("page.css"))},
                 {"SUMMARY", summary(analysis, style, content)},
                 {"MISSING",
                  content.missing.empty() ? "" : fmt::format("<p class=\"missing\">{}</p>", html(content.missing))},
                 {"CONTENTS", contents(figures)},
                 {"FIGURES", sections},
                 {"CHOICES", script_json(filter_choices(analysis, style, figures))},
                 {"LIBRARY", script_code(content.javascript)},
                 {"SCRIPT", script_code(std::string(embedded_file("page.js")))}});
}

}  // namespace kvreplay
