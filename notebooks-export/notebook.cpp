// The notebook of a report: shows the figures as it is opened, and draws them again from the tables beside it.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "base/printable.h"
#include "notebooks-export/report.h"

namespace kvreplay {
namespace {

using nlohmann::ordered_json;

// A figure's specification is stored with its data in them where both together take at most this many bytes; of others
// the notebook holds the picture alone, since viewers refuse notebooks of tens of megabytes.
constexpr std::size_t kMostStored = 300'000;

// What JupyterLab and Visual Studio Code draw themselves: they know Vega-Lite 5, of which a chart of version 6 is one
// too unless it uses what only 6 has.
constexpr const char* kChartType = "application/vnd.vegalite.v5+json";
constexpr const char* kChartSchema = "https://vega.github.io/schema/vega-lite/v5.json";

constexpr std::string_view kSetup = R"py(import base64
import json
from pathlib import Path

import altair as alt
import pandas as pd

try:
    import vl_convert
except ImportError:
    vl_convert = None  # charts are then stored without a picture, which GitHub and other plain viewers would show


def table(name, text=()):
    """The numbers behind a figure, a row per observation. Columns of text that may look like numbers are named."""
    data = pd.read_csv(Path("tables", f"{name}.csv"), dtype=dict.fromkeys(text, str), keep_default_na=False,
                       na_values=[""])
    words = data.select_dtypes(exclude="number").columns
    data[words] = data[words].fillna("")
    return data


def figure(name, data):
    """A figure of the report as a chart of Altair that shows `data`, which has the columns of its table."""
    specification = json.loads(Path("figures", f"{name}.vl.json").read_text(encoding="utf-8"))
    chart = alt.Chart.from_dict(specification | {"data": {"name": name}})
    chart.data = data
    return chart


def stored(specification, **options):
    """What the notebook keeps of a chart: itself, unless that is long, and a picture for whatever cannot draw it."""
    specification = specification | {"$schema": "@SCHEMA@"}
    short = vl_convert is None or len(json.dumps(specification)) <= @MOST@
    bundle = {"@TYPE@": specification} if short else {}
    if vl_convert:
        bundle["image/png"] = base64.b64encode(vl_convert.vegalite_to_png(specification, scale=2)).decode()
    return bundle


alt.data_transformers.disable_max_rows()
alt.theme.enable("none")  # the figures bring their own
alt.renderers.register("report", stored)
alt.renderers.enable("report");)py";

// Text as it stands, in a line of Markdown.
std::string markdown(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else if (c == '\n') {
      escaped += ' ';
    } else {
      if (std::string_view("\\`*_{}[]#$|~>").find(c) != std::string_view::npos) escaped += '\\';
      escaped += c;
    }
  }
  return escaped;
}

// A string of Python. JSON's are, of text without what Python would not take as it stands, which tables do not have.
std::string python(const std::string& text) { return ordered_json(text).dump(); }

// Lines as nbformat keeps them: each with its end.
ordered_json lines(std::string_view text) {
  ordered_json result = ordered_json::array();
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size() - 1) + 1;
    result.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  return result;
}

std::string replaced(std::string text, std::string_view what, std::string_view with) {
  const std::size_t at = text.find(what);
  return text.replace(at, what.size(), with);
}

// Identifiers are of letters, digits, '-' and '_', 64 at most.
std::string cell_id(std::string_view role, std::string_view name) {
  std::string id = fmt::format("{}-{}", role, name).substr(0, 64);
  std::ranges::replace_if(
      id, [](char c) { return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_'; }, '-');
  return id;
}

ordered_json markdown_cell(const std::string& id, const std::string& source) {
  return {{"cell_type", "markdown"}, {"id", id}, {"metadata", ordered_json::object()}, {"source", lines(source)}};
}

ordered_json code_cell(const std::string& id, int count, const std::string& source, ordered_json outputs) {
  return {{"cell_type", "code"},           {"execution_count", count}, {"id", id}, {"metadata", ordered_json::object()},
          {"outputs", std::move(outputs)}, {"source", lines(source)}};
}

// Whether pandas would read the text as something else.
bool looks_like_another_type(const std::string& text) {
  std::string lower = text;
  std::ranges::transform(lower, lower.begin(),
                         [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 32) : c; });
  if (lower == "true" || lower == "false") return true;
  double number = 0;
  const char* begin = lower.data() + (lower.starts_with('+') ? 1 : 0);
  const char* end = lower.data() + lower.size();
  const auto [rest, failure] = std::from_chars(begin, end, number);
  return failure != std::errc::invalid_argument && rest == end;
}

// Columns of text that has to be said to be text.
std::vector<std::string> ambiguous_columns(const DataTable& table) {
  std::vector<std::string> result;
  for (std::size_t column = 0; column < table.columns().size(); ++column) {
    bool text = false;
    bool plain = false;  // of a word
    for (const std::vector<Cell>& row : table.rows()) {
      const std::string* cell = std::get_if<std::string>(&row[column]);
      text = text || cell != nullptr;
      plain = plain || (cell != nullptr && !cell->empty() && !looks_like_another_type(*cell));
    }
    if (text && !plain) result.push_back(table.columns()[column]);
  }
  return result;
}

// A line that shows how to draw a part of the data, by the first column of text: policies where there are any.
std::string filter_line(const DataTable& table) {
  if (table.empty()) return "";
  const auto text_of = [&](std::size_t column) { return std::get_if<std::string>(&table.rows().front()[column]); };
  std::optional<std::size_t> chosen;
  for (std::size_t i = 0; i < table.columns().size(); ++i) {
    if (text_of(i) != nullptr && (!chosen || table.columns()[i] == "policy")) chosen = i;
  }
  if (!chosen) return "";
  return fmt::format("# data = data[data[{}] == {}]  # to draw a part of it\n", python(table.columns()[*chosen]),
                     python(*text_of(*chosen)));
}

std::string code_of(const Figure& figure) {
  std::string text;
  for (const std::string& column : ambiguous_columns(figure.table)) {
    text += (text.empty() ? "" : ", ") + python(column);
  }
  if (!text.empty()) text = fmt::format(", text=[{}]", text);
  const std::string name = python(figure.name);
  return fmt::format("data = table({}{})\n{}figure({}, data)", name, text, filter_line(figure.table), name);
}

// Width and height of a PNG file given as base64, from its first bytes; none of what is no PNG.
std::optional<std::pair<int, int>> size_of_png(std::string_view base64) {
  // The signature and the first chunk: 8 bytes, its length and name, the two sizes.
  constexpr std::size_t kBytes = 24;
  std::vector<std::uint32_t> bytes;
  std::uint32_t bits = 0;
  int filled = 0;
  for (const char c : base64) {
    if (bytes.size() == kBytes) break;
    constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const std::size_t digit = kDigits.find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    bits = (bits << 6) | static_cast<std::uint32_t>(digit);
    filled += 6;
    if (filled >= 8) {
      filled -= 8;
      bytes.push_back((bits >> filled) & 0xFF);
    }
  }
  if (bytes.size() < kBytes || bytes[1] != 'P' || bytes[2] != 'N' || bytes[3] != 'G') return std::nullopt;
  const auto number = [&](std::size_t at) {
    return static_cast<int>(((bytes[at] & 0x7F) << 24) | (bytes[at + 1] << 16) | (bytes[at + 2] << 8) | bytes[at + 3]);
  };
  return std::pair(number(16), number(20));
}

// Pictures are drawn with more dots than a screen has; shown no wider than a notebook's column.
constexpr int kWidestShown = 700;

ordered_json outputs_of(const Figure& figure, const std::string& picture, int count) {
  ordered_json data = ordered_json::object();
  ordered_json metadata = ordered_json::object();
  ordered_json chart = figure.spec;
  chart["$schema"] = kChartSchema;
  chart["data"] = {{"values", figure.table.json()}};
  if (chart.dump().size() <= kMostStored) data[kChartType] = std::move(chart);
  if (!picture.empty()) {
    data["image/png"] = picture;
    if (const auto size = size_of_png(picture); size && size->first > kWidestShown) {
      metadata["image/png"] = {{"height", size->second * kWidestShown / size->first}, {"width", kWidestShown}};
    }
  }
  if (data.empty()) return ordered_json::array();
  data["text/plain"] = lines(figure.question);
  return ordered_json::array({{{"data", std::move(data)},
                               {"execution_count", count},
                               {"metadata", std::move(metadata)},
                               {"output_type", "execute_result"}}});
}

}  // namespace

std::string notebook_text(const std::string& title, const std::string& thinned, const std::vector<Figure>& figures,
                          const std::vector<std::string>& pictures) {
  ordered_json cells = ordered_json::array();
  cells.push_back(markdown_cell(
      "about", fmt::format("# {}\n"
                           "\n"
                           "The figures of this report. Run the cells to draw them again from the tables beside this "
                           "notebook, with other data or another look:\n"
                           "each reads its table with pandas and draws it with Altair 6 "
                           "(`pip install pandas \"altair>=6\" vl-convert-python`).{}",
                           markdown(printable(title)), thinned.empty() ? "" : "\n\n" + markdown(thinned))));
  std::string setup(kSetup);
  setup = replaced(std::move(setup), "@SCHEMA@", kChartSchema);
  setup = replaced(std::move(setup), "@TYPE@", kChartType);
  setup = replaced(std::move(setup), "@MOST@", fmt::format("{}", kMostStored));
  int count = 1;
  cells.push_back(code_cell("setup", count, setup, ordered_json::array()));
  for (std::size_t i = 0; i < figures.size(); ++i) {
    const Figure& figure = figures[i];
    ++count;
    ordered_json outputs = outputs_of(figure, i < pictures.size() ? pictures[i] : std::string(), count);
    std::string text = fmt::format("## {}\n\n{}", markdown(figure.question), markdown(figure.caption));
    if (!figure.left_out.empty()) {
      text += "\n\n" + markdown(printable(fmt::format("Not drawn: {}.", fmt::join(figure.left_out, ", "))));
    }
    if (outputs.empty()) text += "\n\n*Too much to be stored here without a picture: run the next cell to see it.*";
    cells.push_back(markdown_cell(cell_id("text", figure.name), text));
    cells.push_back(code_cell(cell_id("figure", figure.name), count, code_of(figure), std::move(outputs)));
  }
  // With its keys in the order that Jupyter saves them in, so that opening and saving it changes nothing.
  const nlohmann::json notebook =
      ordered_json{{"cells", std::move(cells)},
                   {"metadata",
                    {{"kernelspec", {{"display_name", "Python 3"}, {"language", "python"}, {"name", "python3"}}},
                     {"language_info", {{"name", "python"}}}}},
                   {"nbformat", 4},
                   {"nbformat_minor", 5}};
  return notebook.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + '\n';
}

}  // namespace kvreplay
