// The page of a report: what names from files cannot do to it, and that it needs nothing else. How it works in a
// browser is checked where one is: scripts/check-report.py.
#include "notebooks-export/page.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <regex>

#include "export/sample_analysis.h"

namespace kvreplay {
namespace {

using test::SampleAnalysis;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

constexpr const char* kHostile = "</script><script>alert(1)</script>\"'&<!--";

std::vector<Figure> figures_of(const Analysis& analysis) {
  std::vector<Figure> figures;
  for (const FigureKind* kind : figure_kinds()) {
    Figure figure = kind->draw(analysis, Theme::screen);
    if (!figure.table.empty()) figures.push_back(std::move(figure));
  }
  return figures;
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t found = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return found;
}

TEST(PageTest, NamesFromFilesAreText) {
  SampleAnalysis sample;
  sample.policies = {"restkv", "snapkv", kHostile};
  sample.traces = {std::string(kHostile) + ".h5"};
  const Analysis plain = SampleAnalysis{.policies = {"restkv", "snapkv", "tova"}, .traces = {"a.h5"}}.make();
  const Analysis hostile = sample.make();
  PageContent content{.title = kHostile, .findings = {kHostile}, .left_out = {kHostile}, .missing = kHostile};
  const std::string harmless =
      page_text(plain, figures_of(plain), {.title = "x", .findings = {"x"}, .left_out = {"x"}, .missing = "x"});
  const std::string page = page_text(hostile, figures_of(hostile), content);
  EXPECT_EQ(count(page, "<script"), count(harmless, "<script"));
  EXPECT_EQ(count(page, "</script"), count(harmless, "</script"));
  EXPECT_THAT(page, Not(HasSubstr("<script>alert")));
  EXPECT_THAT(page, HasSubstr("&lt;script&gt;alert(1)"));
}

TEST(PageTest, NeedsNothingFromElsewhere) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::string page = page_text(analysis, figures_of(analysis), {.title = "A title", .javascript = "var x = 1;"});
  EXPECT_THAT(page, HasSubstr("default-src 'none'"));
  const std::regex loads(R"((src|href)\s*=\s*["'](https?:)?//)");
  EXPECT_FALSE(std::regex_search(page, loads));
  EXPECT_THAT(page, Not(HasSubstr("@import")));
  EXPECT_THAT(page, Not(HasSubstr("url(http")));
}

TEST(PageTest, SaysWhatWasFoundAndWhatIsMissing) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::vector<Figure> figures = figures_of(analysis);
  const std::string page = page_text(analysis, figures,
                                     {.title = "A title",
                                      .findings = {"First finding.", "Second."},
                                      .left_out = {"It needs spans."},
                                      .missing = "no Python"});
  EXPECT_THAT(page, StartsWith(kReportMarker));
  for (const char* part :
       {"<html lang=\"en\">", "<title>A title</title>", "First finding.", "Second.", "It needs spans.", "no Python",
        "restkv(temporal=mean)", "play.h5", "aria-label=\"Filters\""}) {
    EXPECT_THAT(page, HasSubstr(part));
  }
  for (const Figure& figure : figures) {
    EXPECT_THAT(page, HasSubstr("figures/" + figure.name + ".vl.json"));
    EXPECT_THAT(page, HasSubstr("tables/" + figure.name + ".csv"));
  }
}

TEST(PageTest, HoldsEachTablesNumbers) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::vector<Figure> figures = figures_of(analysis);
  const std::string page = page_text(analysis, figures, {.title = "x"});
  // Tables stand column by column, texts each once.
  const std::string opening = "<script type=\"application/json\">";
  std::size_t tables = 0;
  for (std::size_t at = 0; (at = page.find(opening, at)) != std::string::npos;) {
    at += opening.size();
    const auto data = nlohmann::json::parse(page.substr(at, page.find("</script>", at) - at));
    if (!data.contains("table")) continue;
    const DataTable& table = figures[tables++].table;
    ASSERT_EQ(data["table"]["columns"].size(), table.columns().size());
    ASSERT_EQ(data["table"]["rows"], table.rows().size());
    for (std::size_t column = 0; column < table.columns().size(); ++column) {
      const auto& values = data["table"]["values"][column];
      const auto& cell = table.rows().back()[column];
      if (table.is_text(column)) {
        EXPECT_EQ(values["texts"][values["codes"].back().get<std::size_t>()], std::get<std::string>(cell));
      } else if (!values.back().is_null()) {
        EXPECT_EQ(values.back(), std::get<double>(cell));
      }
    }
  }
  EXPECT_EQ(tables, figures.size());
}

}  // namespace
}  // namespace kvreplay
