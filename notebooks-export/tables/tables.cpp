#include "notebooks-export/tables/tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "notebooks-export/tables/csv_field.h"

namespace kvreplay {
namespace {

// So that a table of policies stays below some 110 columns.
constexpr std::size_t kPolicyWidth = 24;

// Width on a terminal: UTF-8 continuation bytes take none.
std::size_t display_width(const std::string& text) {
  return static_cast<std::size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }));
}

double mean(std::span<const float> numbers) {
  double sum = 0;
  for (const float number : numbers) sum += static_cast<double>(number);
  return sum / static_cast<double>(numbers.size());
}

// Positions are counts, and means of counts over heads or traces.
std::string count_text(double count) {
  return count == std::floor(count) ? fmt::format("{:.0f}", count) : fmt::format("{:.1f}", count);
}

bool is_unequal_budget(const PolicyRow& row) {
  constexpr double kVisible = 0.001;
  return row.capacity_request != kAllPositions && std::abs(row.budget - 1) > kVisible;
}

using Json = nlohmann::ordered_json;

Json json_of(const Generation& generation) {
  Json json = {{"text", generation.text},
               {"tokens", generation.ids.size()},
               {"ended", generation.ended},
               {"first_difference", nullptr},
               {"repeated_4grams", generation.repeated_4grams},
               {"answered", nullptr}};
  if (generation.first_difference) json["first_difference"] = *generation.first_difference;
  if (generation.answered) json["answered"] = *generation.answered;
  return json;
}

// What the model wrote with the full cache and over what each setting keeps; null where it was not asked to.
Json generations_of(const TraceReplay& replay) {
  if (!replay.generation) return nullptr;
  Json all = {{"full", json_of(*replay.generation)}, {"evicted", Json::array()}};
  for (const ReplayResult& result : replay.results) {
    if (!result.generation) continue;
    Json one = {{"policy", result.policy}, {"capacity_request", result.capacity_request}};
    one.update(json_of(*result.generation));
    all["evicted"].push_back(std::move(one));
  }
  return all;
}

// What a summary says about the traces.
Json json_of(const std::vector<TraceReplay>& replays) {
  Json document;
  document["format"] = "kvreplay-summary";
  document["format_version"] = 1;
  for (const TraceReplay& replay : replays) {
    Json spans = Json::array();
    for (const Span& span : replay.spans) {
      spans.push_back({{"label", span.label}, {"start", span.start}, {"end", span.end}});
    }
    document["traces"].push_back({{"trace", replay.trace},
                                  {"model", replay.model.name},
                                  {"num_layers", replay.model.num_layers},
                                  {"num_attention_heads", replay.model.num_attention_heads},
                                  {"num_key_value_heads", replay.model.num_key_value_heads},
                                  {"prompt_length", replay.prompt_length},
                                  {"evict_at", replay.eviction_position},
                                  {"evaluate_from", replay.evaluation_positions.front()},
                                  {"held", replay.held},
                                  {"evaluation_queries", replay.evaluation_positions.size()},
                                  {"spans", spans},
                                  {"notes", replay.notes}});
    if (Json written = generations_of(replay); !written.is_null()) {
      document["traces"].back()["generations"] = std::move(written);
    }
  }
  return document;
}

// Which layers a mean over layers is of.
std::string layers_text(const MeasureSummary& row) {
  return fmt::format("{}{}",
                     row.late_layers   ? "late"
                     : row.full_layers ? "full"
                                       : "all",
                     row.late_layers && row.full_layers ? " full" : "");
}

Json json_of(const MeasureSummary& row) {
  Json layer = row.layer;
  if (row.layer < 0) layer = layers_text(row);
  return {{"trace", row.trace},
          {"policy", row.policy},
          {"oracle", row.oracle},
          {"capacity_request", row.capacity_request},
          {"capacity", row.capacity},
          {"kept", row.kept},
          {"bytes_per_token", row.bytes_per_token},
          {"evict_at", row.eviction_position},
          {"evaluate_from", row.evaluate_from},
          {"heads", name_of(row.granularity)},
          {"share", name_of(row.share)},
          {"nothing_to_choose", row.nothing_to_choose},
          {"layer", layer},
          {"measure", row.measure},
          {"mean", row.distribution.mean},
          {"median", row.distribution.median},
          {"p90", row.distribution.p90},
          {"worst", row.distribution.worst},
          {"peak", row.peak},
          {"footprint", row.footprint}};
}

std::string dump(const Json& json) { return json.dump(1, ' ', false, Json::error_handler_t::replace); }

// Whether a line may end between two words: not before a unit, nor around what a number is compared by ("p = 0.003").
bool may_part(std::string_view before, std::string_view word) {
  const auto compares = [](std::string_view text) { return text == "=" || text == "<"; };
  return !word.starts_with('%') && !compares(word) && !compares(before);
}

}  // namespace

std::string aligned_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], display_width(row[i]));
  }
  std::string text;
  const auto add_line = [&](const std::vector<std::string>& row) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - display_width(row[i]), ' ');
      line += i == 0 ? row[i] + padding : "  " + padding + row[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  };
  for (std::size_t r = 0; r < rows.size(); ++r) {
    add_line(rows[r]);
    if (r > 0) continue;
    std::vector<std::string> rule;
    for (const std::size_t width : widths) {
      std::string dashes;
      for (std::size_t i = 0; i < width; ++i) dashes += "─";
      rule.push_back(dashes);
    }
    add_line(rule);
  }
  return text;
}

std::string wrapped(const std::string& text, std::size_t indent, std::size_t width) {
  std::string result;
  std::string line;
  const auto end_line = [&]() {
    result += std::string(indent, ' ') + line + '\n';
    line.clear();
  };
  std::size_t at = 0;
  while (at < text.size()) {
    // Words that stay together.
    std::size_t end = std::min(text.find(' ', at), text.size());
    for (std::size_t last = at; end < text.size();) {
      const std::size_t next = std::min(text.find(' ', end + 1), text.size());
      const auto part = [&text](std::size_t from, std::size_t to) {
        return std::string_view(text).substr(from, to - from);
      };
      if (next == end + 1 || may_part(part(last, end), part(end + 1, next))) break;
      last = end + 1;
      end = next;
    }
    const std::string word = text.substr(at, end - at);
    if (!line.empty() && indent + display_width(line) + 1 + display_width(word) > width) end_line();
    line += line.empty() ? word : fmt::format(" {}", word);
    at = end + 1;
  }
  if (!line.empty()) end_line();
  return result;
}

std::string range_text(const std::set<int>& numbers) {
  if (numbers.empty()) return "";
  if (numbers.size() == 1) return fmt::format("{}", *numbers.begin());
  return fmt::format("{} to {}", *numbers.begin(), *numbers.rbegin());
}

std::vector<std::string> broken_spec(const std::string& spec, std::size_t width) {
  std::vector<std::string> lines = {""};
  for (std::size_t at = 0; at < spec.size();) {
    std::size_t end = at + 1;
    while (end < spec.size() && spec[end - 1] != ',' && spec[end] != '+' && spec[end] != ' ') ++end;
    std::string piece = spec.substr(at, end - at);
    if (!lines.back().empty() && display_width(lines.back() + piece) > width) {
      lines.emplace_back("  ");
      piece.erase(0, piece.find_first_not_of(' '));
    }
    lines.back() += piece;
    at = end;
  }
  return lines;
}

std::string policy_table(const std::vector<PolicyRow>& rows) {
  const auto most = [&rows](auto number) {
    const auto largest = std::ranges::max_element(rows, {}, number);
    return largest == rows.end() ? 0 : (*largest).*number;
  };
  // One unit for all rows, so that they can be compared.
  const bool large = most(&PolicyRow::bytes_per_token) >= 10'000;
  const int places = most(&PolicyRow::places);
  const bool unequal = std::ranges::any_of(rows, is_unequal_budget);
  const bool partial = std::ranges::any_of(rows, [places](const PolicyRow& row) { return row.places < places; });
  const bool windowed = std::ranges::any_of(rows, &PolicyRow::windowed);
  const auto measured = [&rows](double PolicyRow::*number) {
    return std::ranges::any_of(rows, [number](const PolicyRow& row) { return !std::isnan(row.*number); });
  };
  // What the model loses comes first, and of what its layers do only what is compared with that.
  const bool live = measured(&PolicyRow::kl);
  struct Column {
    const char* head;
    double PolicyRow::*number;
    fmt::format_string<double> format;
    double factor = 1;
    bool shown = true;
  };
  const Column columns[] = {
      {"KL", &PolicyRow::kl, "{:.4f}", 1, live},
      {"loss +", &PolicyRow::nll_increase, "{:+.4f}", 1, live},
      {"agree", &PolicyRow::agree, "{:.1f} %", 100, live},
      {"same text", &PolicyRow::same_tokens, "{:.1f}", 1, live},
      {"answered", &PolicyRow::answered, "{:.0f} %", 100, live},
      {"residual error", &PolicyRow::residual_error, "{:.4f}"},
      {"layer error", &PolicyRow::layer_error, "{:.4f}"},
      {"head error", &PolicyRow::head_error, "{:.4f}", 1, !live},
      {"recall", &PolicyRow::attention_recall, "{:.4f}"},
      {"cosine", &PolicyRow::cosine, "{:.4f}", 1, !live},
      {"peak", &PolicyRow::peak, "{:.0f}"},
      {"turnover", &PolicyRow::turnover, "{:.2f} %", 100},
  };
  const Column last_columns[] = {
      {"spans kept", &PolicyRow::span_recall, "{:.1f} %", 100},
      {"Spearman", &PolicyRow::spearman, "{:.3f}"},
      {"Kendall", &PolicyRow::kendall, "{:.3f}"},
  };
  std::vector<std::vector<std::string>> cells = {{"policy", "capacity", "kept", windowed ? "of held" : "of prompt",
                                                  fmt::format("{}/token{}", large ? "KiB" : "B", unequal ? " " : ""),
                                                  "heads"}};
  const auto is_shown = [&measured](const Column& column) { return column.shown && measured(column.number); };
  const auto add_numbers = [&](const PolicyRow& row, std::span<const Column> some, std::vector<std::string>& line) {
    for (const Column& column : some) {
      if (!is_shown(column)) continue;
      const double number = row.*column.number;
      line.push_back(std::isnan(number) ? "-" : fmt::format(column.format, column.factor * number));
    }
  };
  for (const Column& column : columns) {
    if (is_shown(column)) cells[0].emplace_back(column.head);
  }
  if (partial) cells[0].emplace_back("on");
  for (const Column& column : last_columns) {
    if (is_shown(column)) cells[0].emplace_back(column.head);
  }
  for (const PolicyRow& row : rows) {
    const std::vector<std::string> spec =
        broken_spec(row.policy + (row.oracle ? " (ORACLE)" : "") + (row.nothing_to_choose ? " †" : ""), kPolicyWidth);
    std::vector<std::string> line{
        spec.front(),
        row.capacity_request,
        count_text(row.kept),
        fmt::format("{:.1f} %", 100 * row.kept_share),
        (large ? fmt::format("{:.1f}", row.bytes_per_token / 1024) : count_text(row.bytes_per_token)) +
            (is_unequal_budget(row) ? "*"
             : unequal              ? " "
                                    : ""),
        std::string(name_of(row.granularity))};
    add_numbers(row, columns, line);
    if (partial) line.push_back(fmt::format("{} of {}", row.places, places));
    add_numbers(row, last_columns, line);
    cells.push_back(std::move(line));
    for (std::size_t i = 1; i < spec.size(); ++i) cells.push_back({spec[i]});
  }
  return aligned_table(cells);
}

std::string parameter_table(const std::vector<ParameterEffect>& effects) {
  std::vector<std::vector<std::string>> cells = {
      {"parameter", "value", "layer error", "to the best", "range", "settings each"}};
  for (const ParameterEffect& effect : effects) {
    const std::string name = fmt::format("{}: {}", effect.method, effect.parameter);
    for (const ParameterValue& value : effect.values) {
      const bool first = &value == &effect.values.front();
      std::vector<std::string> line = {first ? name : "", value.value.empty() ? "-" : value.value};
      if (effect.groups == 0) {
        line.insert(line.end(), {"-", "-"});
      } else {
        line.push_back(fmt::format("{:.4f}", value.layer_error));
        line.push_back(value.difference == 0 ? "best" : fmt::format("+{:.4f}", value.difference));
      }
      if (first) {
        line.push_back(effect.groups == 0 ? "-" : fmt::format("{:.4f}", effect.range));
        line.push_back(effect.groups == 0 ? "not balanced" : fmt::format("{}", effect.groups));
      }
      cells.push_back(std::move(line));
    }
  }
  return aligned_table(cells);
}

std::string summary_csv_head() {
  return "trace,policy,oracle,capacity_request,capacity,kept,bytes_per_token,evict_at,evaluate_from,heads,share,"
         "nothing_to_choose,layer,measure,mean,median,p90,worst,peak,footprint\n";
}

std::string summary_csv_rows(const std::vector<MeasureSummary>& rows) {
  std::string text;
  for (const MeasureSummary& row : rows) {
    text += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}\n", csv_field(row.trace),
                        csv_field(row.policy), row.oracle ? 1 : 0, csv_field(row.capacity_request), row.capacity,
                        row.kept, row.bytes_per_token, row.eviction_position, row.evaluate_from,
                        name_of(row.granularity), name_of(row.share), row.nothing_to_choose ? 1 : 0,
                        row.layer >= 0 ? fmt::format("{}", row.layer) : layers_text(row), row.measure,
                        row.distribution.mean, row.distribution.median, row.distribution.p90, row.distribution.worst,
                        row.peak, row.footprint);
  }
  return text;
}

std::string summary_csv(const std::vector<MeasureSummary>& rows) { return summary_csv_head() + summary_csv_rows(rows); }

std::string summary_json_head(const std::vector<TraceReplay>& replays) {
  std::string text = dump(json_of(replays));
  text.erase(text.rfind('\n'));  // before the closing brace
  return text + ",\n \"summary\": [\n";
}

std::string summary_json_rows(const std::vector<MeasureSummary>& rows, bool first) {
  std::string text;
  for (const MeasureSummary& row : rows) {
    if (!std::exchange(first, false)) text += ",\n";
    std::string lines = "  ";
    for (const char c : dump(json_of(row))) {
      lines += c;
      if (c == '\n') lines += "  ";
    }
    text += lines;
  }
  return text;
}

std::string summary_json_foot() { return "\n ]\n}\n"; }

std::string summary_json(const std::vector<TraceReplay>& replays, const std::vector<MeasureSummary>& rows,
                         const std::vector<OverlapTable>& overlaps) {
  Json document = json_of(replays);
  for (const MeasureSummary& row : rows) document["summary"].push_back(json_of(row));
  for (const OverlapTable& table : overlaps) {
    const std::size_t policies = table.policies.size();
    const std::size_t cells = table.jaccard.numbers.size() / (policies * policies);
    for (std::size_t a = 0; a < policies; ++a) {
      for (std::size_t b = 0; b < policies; ++b) {
        const std::size_t at = (a * policies + b) * cells;
        document["overlap"].push_back({{"trace", table.trace},
                                       {"capacity_request", table.capacity_request},
                                       {"evict_at", table.eviction_position},
                                       {"policy", table.policies[a]},
                                       {"other", table.policies[b]},
                                       {"jaccard", mean(std::span(table.jaccard.numbers).subspan(at, cells))},
                                       {"containment", mean(std::span(table.containment.numbers).subspan(at, cells))}});
      }
    }
  }
  return dump(document) + "\n";
}

}  // namespace kvreplay
