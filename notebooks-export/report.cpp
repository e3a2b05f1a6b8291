#include "notebooks-export/report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <string_view>
#include <system_error>

#include "analysis/findings.h"
#include "base/error.h"
#include "base/file_text.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "notebooks-export/figure_style.h"
#include "notebooks-export/page/page.h"
#include "notebooks-export/pictures/renderer.h"
#include "policy/parameter.h"

namespace kvreplay {
namespace {

// Throws unless `folder` does not exist, or may be replaced: with the user's word, and only by what is nothing else's.
void check_place(const std::filesystem::path& folder, bool force) {
  std::error_code failure;
  if (std::filesystem::is_symlink(folder, failure) && !std::filesystem::exists(folder, failure)) {
    throw Error(fmt::format("{}: is a symbolic link that leads nowhere; name a folder", folder.string()));
  }
  if (!std::filesystem::is_directory(folder, failure)) return;  // of a file OutputFolder complains
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder, failure)) {
    names.push_back(entry.path().filename().string());
  }
  if (failure) throw Error(fmt::format("{}: cannot be read: {}", folder.string(), failure.message()));
  if (names.empty()) return;
  std::string beginning(std::string_view(kReportMarker).size(), '\0');
  std::ifstream page(folder / "index.html", std::ios::binary);
  page.read(beginning.data(), static_cast<std::streamsize>(beginning.size()));
  if (!page || beginning != kReportMarker) {
    throw Error(
        fmt::format("{}: exists and is no report, so it is not replaced; name another folder", folder.string()));
  }
  if (!force) throw Error(fmt::format("{}: exists; name another folder, or replace it with --force", folder.string()));
  constexpr std::array kOurs = {"index.html", "figures", "tables", "notebook.ipynb", ".ipynb_checkpoints"};
  std::ranges::sort(names);
  for (const std::string& name : names) {
    if (std::ranges::find(kOurs, name) == kOurs.end()) {
      throw Error(
          fmt::format("{}: holds {} beside a report, so it is not replaced; move that away, or name another folder",
                      folder.string(), printable(name)));
    }
  }
}

std::vector<const FigureKind*> chosen_kinds(const std::vector<std::string>& only) {
  std::vector<const FigureKind*> all = figure_kinds();
  if (only.empty()) return all;
  std::vector<std::string> names;
  for (const FigureKind* kind : all) names.push_back(kind->name);
  for (const std::string& name : only) {
    if (std::ranges::find(names, name) == names.end()) {
      throw UsageError(fmt::format("no figure is called '{}'.{} Figures: {}", name, suggestion(name, names),
                                   fmt::join(names, ", ")));
    }
  }
  std::vector<const FigureKind*> chosen;
  for (const FigureKind* kind : all) {
    if (std::ranges::find(only, kind->name) != only.end()) chosen.push_back(kind);
  }
  return chosen;
}

// How the table is read where it stands beside the spec: types said, since "128" may be a capacity and so a text.
Json data_of(const Figure& figure) {
  Json types = Json::object();
  for (std::size_t i = 0; i < figure.table.columns().size(); ++i) {
    types[figure.table.columns()[i]] = figure.table.is_text(i) ? "string" : "number";
  }
  return {{"url", fmt::format("../tables/{}.csv", figure.name)},
          {"format", {{"type", "csv"}, {"parse", std::move(types)}}}};
}

std::string base64(std::string_view bytes) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    unsigned group = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      group = group << 8 | (at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0U);
    }
    for (std::size_t i = 0; i < 4; ++i) {
      text += at + i <= bytes.size() ? kDigits[(group >> (18 - 6 * i)) & 0x3F] : '=';
    }
  }
  return text;
}

std::string title_of(const Analysis& analysis) {
  std::vector<std::string> models;
  for (const TraceOverview& trace : analysis.traces) {
    if (std::ranges::find(models, trace.model) == models.end()) models.push_back(trace.model);
  }
  return fmt::format("KV-cache eviction on {}", fmt::join(models, ", "));
}

// All files of a report into `output`.
void write_files(const OutputFolder& output, const Analysis& analysis, const ReportOptions& options,
                 const FigureStyle& style, const std::vector<Figure>& figures, const std::vector<PageFigure>& of_page,
                 PageContent& content, ReportOutcome& outcome) {
  const std::filesystem::path& place = output.temporary();
  const std::filesystem::path drawings = output.add_folder("figures");
  const std::filesystem::path tables = output.add_folder("tables");
  for (const Figure& figure : figures) {
    Json spec = figure.spec;
    spec["data"] = data_of(figure);
    OutputFile::write_text(drawings / (figure.name + ".vl.json"),
                           spec.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
    OutputFile::write_text(tables / (figure.name + ".csv"), figure.table.csv());
  }

  std::vector<std::string> pictures;
  if (const std::optional<Renderer> renderer = Renderer::find(options.python, outcome.missing)) {
    renderer->draw(place, outcome.figures);
    content.javascript = renderer->javascript();
    for (const Figure& figure : figures) {
      pictures.push_back(base64(file_text(drawings / (figure.name + ".png"))));
    }
  }
  content.missing = outcome.missing;
  std::string thinned = style.rule();
  if (!thinned.empty()) thinned += fmt::format(" Left out are {}.", fmt::join(style.left_out(), ", "));
  OutputFile::write_text(place / "notebook.ipynb", notebook_text(content.title, thinned, figures, pictures));
  OutputFile::write_text(place / "index.html", page_text(analysis, style, of_page, content));
}

}  // namespace

void check_report(const std::filesystem::path& folder, const ReportOptions& options) {
  static_cast<void>(chosen_kinds(options.only));
  check_place(folder, options.force);
  std::string missing;
  if (!options.python.empty() && !Renderer::find(options.python, missing)) throw Error(missing);
  const OutputFolder probe(folder);
}

ReportOutcome write_report(const std::filesystem::path& folder, const Analysis& analysis,
                           const ReportOptions& options) {
  const std::vector<const FigureKind*> kinds = chosen_kinds(options.only);
  check_place(folder, options.force);
  OutputFolder output(folder);

  ReportOutcome outcome;
  PageContent content;
  content.title = options.title.empty() ? title_of(analysis) : options.title;
  outcome.findings = findings(analysis, std::numeric_limits<std::size_t>::max());
  content.findings = outcome.findings;
  const FigureStyle style(analysis, options.figures);
  // The page says each question itself. It draws for the width that it has: on a telephone as for a column of paper.
  const auto styled = [&](Theme theme) {
    return FigureStyle(analysis, {.theme = theme, .titles = false, .policies = options.figures.policies});
  };
  const FigureStyle wide = styled(Theme::screen);
  const FigureStyle narrow = styled(Theme::paper);
  outcome.thinned = style.rule();
  std::vector<Figure> figures;
  std::vector<PageFigure> of_page;
  for (const FigureKind* kind : kinds) {
    Figure figure = kind->draw(analysis, style);
    if (figure.table.empty() && kind->over_time && analysis.time_courses.empty() && options.only.empty()) continue;
    if (figure.table.empty()) {
      outcome.left_out.push_back(fmt::format("{}: {}", kind->name, kind->needs));
      content.left_out.push_back(fmt::format("{} It needs {}.", kind->question, kind->needs));
      continue;
    }
    outcome.figures.push_back(figure.name);
    of_page.push_back({kind->draw(analysis, wide), kind->draw(analysis, narrow).spec});
    figures.push_back(std::move(figure));
  }

  try {
    write_files(output, analysis, options, wide, figures, of_page, content, outcome);
  } catch (const Error& error) {
    // By the name that the user gave, which nothing stands at yet.
    std::string text = error.what();
    const std::string temporary = output.temporary().string();
    const std::size_t at = text.find(temporary);
    if (at != std::string::npos) text.replace(at, temporary.size(), folder.string());
    throw Error(text);
  }
  output.commit();
  return outcome;
}

}  // namespace kvreplay
