// The page of a report: what names from files cannot do to it, and that it needs nothing else. How it works in a
// browser is checked where one is: scripts/check-report.py.
#include "notebooks-export/page/page.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <regex>
#include <set>

#include "export/sample_analysis.h"
#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

using test::SampleAnalysis;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

constexpr const char* kHostile = "</script><script>alert(1)</script>\"'&<!--";

std::vector<PageFigure> figures_of(const Analysis& analysis, const std::vector<std::string>& policies = {}) {
  const FigureStyle wide(analysis, {.titles = false, .policies = policies});
  const FigureStyle narrow(analysis, {.theme = Theme::paper, .titles = false, .policies = policies});
  std::vector<PageFigure> figures;
  for (const FigureKind* kind : figure_kinds()) {
    Figure figure = kind->draw(analysis, wide);
    if (figure.table.empty()) continue;
    figures.push_back({std::move(figure), kind->draw(analysis, narrow).spec});
  }
  return figures;
}

std::string page_of(const Analysis& analysis, const PageContent& content) {
  return page_text(analysis, FigureStyle(analysis), figures_of(analysis), content);
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
  const std::string harmless = page_of(plain, {.title = "x", .findings = {"x"}, .left_out = {"x"}, .missing = "x"});
  const std::string page = page_of(hostile, content);
  EXPECT_EQ(count(page, "<script"), count(harmless, "<script"));
  EXPECT_EQ(count(page, "</script"), count(harmless, "</script"));
  EXPECT_THAT(page, Not(HasSubstr("<script>alert")));
  EXPECT_THAT(page, HasSubstr("&lt;script&gt;alert(1)"));
}

// Everything that a file can name, by something that ends tags, attributes and scripts.
TEST(PageTest, WhateverAFileNamesIsText) {
  const std::string quote = "\" onfocus=\"alert(1)";
  SampleAnalysis sample;
  sample.policies = {"restkv", "snapkv", quote};
  Analysis analysis = sample.make();
  analysis.options.baseline = quote;
  for (TraceOverview& trace : analysis.traces) {
    trace.model = kHostile;
    for (Span& span : trace.spans) span.label = kHostile;
    for (std::string& piece : trace.token_pieces) piece = kHostile;
  }
  analysis.notes = {kHostile};
  for (const char* title : {kHostile, quote.c_str()}) {
    const std::string page = page_of(analysis, {.title = title, .findings = {title}});
    EXPECT_THAT(page, Not(HasSubstr("<script>alert")));
    EXPECT_THAT(page, Not(HasSubstr("<!--\"")));
    EXPECT_THAT(page, Not(HasSubstr("\" onfocus=\"alert"))) << "in JSON its quotes are escaped, in attributes too";
    EXPECT_THAT(page, HasSubstr("&quot; onfocus=&quot;alert(1)"));
    EXPECT_EQ(count(page, "<!--"), 1u) << "its own mark";
  }
}

// What stands between <script type="application/json"> and its end, of all such elements.
std::vector<std::string> data_of(const std::string& page) {
  std::vector<std::string> found;
  const std::regex opening(R"(<script type="application/json"[^>]*>)");
  for (std::sregex_iterator match(page.begin(), page.end(), opening), end; match != end; ++match) {
    const auto at = static_cast<std::size_t>(match->position() + match->length());
    found.push_back(page.substr(at, page.find("</script>", at) - at));
  }
  return found;
}

TEST(PageTest, DataOfHostileNamesReadBackAsTheyWere) {
  const Analysis analysis = SampleAnalysis{.policies = {"restkv", "snapkv", kHostile, "größer 🙂"}}.make();
  const std::vector<PageFigure> figures = figures_of(analysis);
  const std::vector<std::string> data = data_of(page_text(analysis, FigureStyle(analysis), figures, {.title = "x"}));
  ASSERT_EQ(data.size(), figures.size() + 1) << "and what the filters offer";
  for (std::size_t i = 0; i < figures.size(); ++i) {
    EXPECT_EQ(nlohmann::ordered_json::parse(data[i])["spec"], figures[i].figure.spec) << figures[i].figure.name;
  }
  std::vector<std::string> offered;
  const auto choices = nlohmann::json::parse(data.back());
  for (const auto& policy : choices["policies"]) offered.push_back(policy["name"]);
  EXPECT_THAT(offered, testing::IsSupersetOf({std::string(kHostile), std::string("größer 🙂")}));
}

TEST(PageTest, NeedsNothingFromElsewhere) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::string page = page_of(analysis, {.title = "A title", .javascript = "var x = 1;"});
  EXPECT_THAT(page, HasSubstr("default-src 'none'"));
  const std::regex loads(R"((src|href)\s*=\s*["'](https?:)?//)");
  EXPECT_FALSE(std::regex_search(page, loads));
  // Links lead within the page or beside it; nothing else is asked for.
  const std::regex target(R"lit(<[a-z]+ [^>]*?\b(?:src|href)="([^"]*)")lit");
  const std::regex harmless(R"(#[\w-]+|data:,|notebook\.ipynb|(figures|tables)/[\w.-]+)");
  std::size_t links = 0;
  for (std::sregex_iterator match(page.begin(), page.end(), target), end; match != end; ++match, ++links) {
    EXPECT_TRUE(std::regex_match((*match)[1].str(), harmless)) << (*match)[1];
  }
  EXPECT_GT(links, 19u);
  EXPECT_THAT(page, Not(HasSubstr("@import")));
  EXPECT_THAT(page, Not(HasSubstr("url(http")));
}

TEST(PageTest, SaysWhatWasFoundAndWhatIsMissing) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::vector<PageFigure> figures = figures_of(analysis);
  const std::string page = page_text(analysis, FigureStyle(analysis), figures,
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
  for (const auto& [figure, narrow] : figures) {
    EXPECT_THAT(page, HasSubstr("figures/" + figure.name + ".vl.json"));
    EXPECT_THAT(page, HasSubstr("tables/" + figure.name + ".csv"));
  }
}

TEST(PageTest, ListsThePoliciesThatNoFigureShows) {
  SampleAnalysis sample{.policies = {"snapkv"}, .kept_sets = false};
  for (int i = 1; i <= 30; ++i) sample.policies.push_back(fmt::format("restkv(beta={})", i));
  const Analysis analysis = sample.make();
  const FigureStyle style(analysis);
  ASSERT_FALSE(style.left_out().empty());
  const std::string page = page_of(analysis, {.title = "x"});
  EXPECT_EQ(count(page, "<details id=\"left-out\">"), 1u);
  EXPECT_THAT(page, HasSubstr(fmt::format("<summary>{} policies are in no figure</summary>", style.left_out().size())));
  for (const std::string& policy : style.left_out()) EXPECT_THAT(page, HasSubstr("<li>" + policy + "</li>"));
  // Which, and by which rule, is said once.
  EXPECT_EQ(count(page, "the oracle, random"), 1u);
  for (const PageFigure& figure : figures_of(analysis)) {
    EXPECT_LE(count(figure.figure.caption, "Shown are"), 1u) << figure.figure.caption;
  }
  EXPECT_THAT(page_of(SampleAnalysis{}.make(), {.title = "x"}), Not(HasSubstr("id=\"left-out\"")));
}

TEST(PageTest, MarksPoliciesThatKeepMoreOrLessThanWasAskedFor) {
  Analysis analysis = SampleAnalysis{}.make();
  EXPECT_THAT(page_of(analysis, {.title = "x"}), Not(HasSubstr("In brackets")));
  for (ComparisonRow& row : analysis.comparison) {
    if (row.key.policy == "tova" && row.key.capacity_request == "64") row.kept = 65;
  }
  const std::string page = page_of(analysis, {.title = "x"});
  EXPECT_THAT(page, HasSubstr("In brackets: the positions that a head keeps"));
  EXPECT_EQ(count(page, " <small>(65)</small></td>"), 1u);
  EXPECT_EQ(count(page, "<small>("), 1u) << "and no other";
}

TEST(PageTest, CaptionsDoNotScrollWithTables) {
  const std::string page = page_of(SampleAnalysis{}.make(), {.title = "x"});
  EXPECT_THAT(page, Not(HasSubstr("<caption>")));
  const std::size_t caption = page.find("<p class=\"caption\" id=\"means\">Mean layer error at each capacity");
  ASSERT_NE(caption, std::string::npos);
  EXPECT_LT(caption, page.find("aria-labelledby=\"means\""));
}

// Each figure comes along for windows and, with the letters of a column of paper, for telephones.
TEST(PageTest, FiguresAreDrawnForNarrowWindowsToo) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::vector<std::string> data = data_of(page_of(analysis, {.title = "x"}));
  for (std::size_t i = 0; i + 1 < data.size(); ++i) {
    const auto figure = nlohmann::json::parse(data[i]);
    EXPECT_EQ(figure["spec"]["config"]["axis"]["labelFontSize"], 12);
    EXPECT_EQ(figure["narrow"]["config"]["axis"]["labelFontSize"], 7);
    for (const char* spec : {"spec", "narrow"}) EXPECT_FALSE(figure[spec].contains("title")) << "the page has it";
  }
}

TEST(PageTest, LinksLeadToWhatIsThereAndRegionsHaveNames) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::string page = page_of(analysis, {.title = "x"});
  std::set<std::string> ids;
  const std::regex id(R"lit(\bid="([^"]+)")lit");
  for (std::sregex_iterator match(page.begin(), page.end(), id), end; match != end; ++match) {
    EXPECT_TRUE(ids.insert((*match)[1]).second) << (*match)[1] << " twice";
  }
  const std::regex anchor(R"lit((?:href="#|aria-labelledby=")([^"]+)")lit");
  for (std::sregex_iterator match(page.begin(), page.end(), anchor), end; match != end; ++match) {
    EXPECT_TRUE(ids.contains((*match)[1])) << (*match)[1];
  }
  // What the keyboard reaches to scroll says what it is.
  const std::regex region(R"lit(<[^>]*tabindex="0"[^>]*>)lit");
  std::size_t regions = 0;
  for (std::sregex_iterator match(page.begin(), page.end(), region), end; match != end; ++match, ++regions) {
    EXPECT_THAT(match->str(), HasSubstr("aria-label"));
  }
  EXPECT_GT(regions, 19u);
}

TEST(PageTest, HoldsEachTablesNumbers) {
  const Analysis analysis = SampleAnalysis{}.make();
  const std::vector<PageFigure> figures = figures_of(analysis);
  const std::string page = page_text(analysis, FigureStyle(analysis), figures, {.title = "x"});
  // Tables stand column by column, texts each once.
  const std::string opening = "<script type=\"application/json\">";
  std::size_t tables = 0;
  for (std::size_t at = 0; (at = page.find(opening, at)) != std::string::npos;) {
    at += opening.size();
    const auto data = nlohmann::json::parse(page.substr(at, page.find("</script>", at) - at));
    if (!data.contains("table")) continue;
    const DataTable& table = figures[tables++].figure.table;
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
