// Every kind of figure on analyses of many shapes: what is drawn is in its table, can be read, and stays small. That
// Vega-Lite takes the specifications and what they look like is checked where Python is: scripts/check-report.py.
#include "notebooks-export/figure.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <tuple>

#include "base/printable.h"
#include "export/sample_analysis.h"
#include "notebooks-export/figure_style.h"

namespace kvreplay {
namespace {

using test::SampleAnalysis;
using testing::HasSubstr;
using testing::Not;

// Analyses by what is special about them.
const std::vector<std::pair<std::string, Analysis>>& samples() {
  static const auto kSamples = []() {
    SampleAnalysis one_head;
    one_head.num_layers = 1;
    one_head.num_heads = 1;
    one_head.traces = {"one.h5"};
    one_head.eviction_positions = {64};
    one_head.prompt_length = 64;
    SampleAnalysis nothing_else;
    nothing_else.oracle = "";
    nothing_else.kept_sets = false;
    nothing_else.token_pieces = false;
    nothing_else.spans = false;
    nothing_else.live = false;
    nothing_else.steps = 0;
    nothing_else.alphas = {};
    nothing_else.betas = {};
    SampleAnalysis odd;
    odd.policies = {"restkv",           "snapkv",
                    "</script><b>&\"'", printable("a\nb\x1b[0m"),
                    "größer 🙂",    "attention(" + std::string(300, 'x') + "=1,y=2)"};
    odd.traces = {"</script>.h5", "\"quoted\" 'name'.h5"};
    SampleAnalysis large;
    large.prompt_length = 131072;
    large.eviction_positions = {65536, 131072};
    large.num_layers = 80;
    large.num_heads = 64;
    large.policies = {"restkv", "snapkv", "tova"};
    large.alphas = {0.5};
    large.betas = {500};
    SampleAnalysis sweep;
    sweep.alphas.clear();
    sweep.betas.clear();
    for (int i = 1; i <= 20; ++i) sweep.alphas.push_back(0.04 * i);
    for (int i = 1; i <= 20; ++i) sweep.betas.push_back(100.0 * i);
    sweep.policies = {"snapkv"};
    for (const double alpha : sweep.alphas) {
      for (const double beta : sweep.betas)
        sweep.policies.push_back(fmt::format("restkv(alpha={},beta={})", alpha, beta));
    }
    sweep.num_layers = 2;
    sweep.num_heads = 2;
    sweep.kept_sets = false;
    std::vector<std::pair<std::string, Analysis>> made;
    made.emplace_back("demo", SampleAnalysis{}.make());
    made.emplace_back("one head", one_head.make());
    made.emplace_back("nothing else", nothing_else.make());
    made.emplace_back("odd names", odd.make());
    made.emplace_back("large", large.make());
    made.emplace_back("sweep", sweep.make());
    return made;
  }();
  return kSamples;
}

using Json = nlohmann::ordered_json;

// The kinds of nulls that Vega-Lite knows: "no title", "no legend", …: anywhere else a null is a number that was none.
bool may_be_null(const std::string& key) {
  static const std::set<std::string> kKeys = {"title", "legend", "axis", "header", "sort", "scale", "tooltip"};
  return kKeys.contains(key);
}

// Whatever a spec must not hold, wherever it is.
void expect_sound(const Json& node, const std::string& path) {
  if (node.is_string()) {
    EXPECT_EQ(node.get<std::string>(), printable(node.get<std::string>())) << path;
  } else if (node.is_number_float()) {
    EXPECT_TRUE(std::isfinite(node.get<double>())) << path;
  } else if (node.is_array()) {
    for (std::size_t i = 0; i < node.size(); ++i) {
      EXPECT_FALSE(node[i].is_null()) << path << '/' << i;
      expect_sound(node[i], fmt::format("{}/{}", path, i));
    }
  }
  if (!node.is_object()) return;
  for (const auto& [key, value] : node.items()) {
    EXPECT_TRUE(!value.is_null() || may_be_null(key)) << path << '/' << key;
    EXPECT_EQ(key, printable(key)) << path;
    expect_sound(value, path + '/' + key);
  }
}

// The columns that expressions name: "datum.layer + 0.5".
std::set<std::string> columns_in_expressions(const std::string& spec) {
  static const std::regex kColumn(R"(\bdatum\.([A-Za-z_]\w*))");
  std::set<std::string> found;
  for (std::sregex_iterator match(spec.begin(), spec.end(), kColumn), end; match != end; ++match) {
    if ((*match)[1] != "label" && (*match)[1] != "value") found.insert((*match)[1]);  // of an axis' or legend's entry
  }
  return found;
}

// Scales and orders that list texts of a column list all that its table has: what is missing would get a colour that
// means something else, or a place at the end.
void expect_all_listed(const Json& node, const DataTable& table) {
  if (node.is_array()) {
    for (const Json& part : node) expect_all_listed(part, table);
    return;
  }
  if (!node.is_object()) return;
  for (const auto& [key, value] : node.items()) expect_all_listed(value, table);
  const std::string field = node.value("field", Json()).is_string() ? node["field"].get<std::string>() : "";
  const auto place = static_cast<std::size_t>(std::ranges::find(table.columns(), field) - table.columns().begin());
  if (place == table.columns().size() || !table.is_text(place)) return;
  for (const Json& listed : {node.value("/scale/domain"_json_pointer, Json()), node.value("sort", Json())}) {
    if (!listed.is_array()) continue;
    std::set<std::string> texts;
    for (const Json& text : listed) texts.insert(text.get<std::string>());
    for (const std::string& text : distinct(table, field)) {
      if (text.empty()) continue;  // of rows of something else, such as spans
      EXPECT_TRUE(texts.contains(text)) << field << " lacks " << text;
    }
  }
}

// The columns that a node and what it holds draw, by the property "field"; those that transforms make.
void find_fields(const Json& node, std::set<std::string>& used, std::set<std::string>& made) {
  if (node.is_array()) {
    for (const Json& part : node) find_fields(part, used, made);
    return;
  }
  if (!node.is_object()) return;
  for (const auto& [key, value] : node.items()) {
    if (key == "field" && value.is_string()) used.insert(value.get<std::string>());
    if (key == "as" && value.is_string()) made.insert(value.get<std::string>());
    if (key == "transform") {
      for (const Json& step : value) EXPECT_TRUE(step.is_object()) << value.dump();
    }
    if (key == "layer" || key == "concat" || key == "vconcat") {
      EXPECT_FALSE(value.empty());
    }
    find_fields(value, used, made);
  }
}

// The page filters rows by columns, sets the figure's own choices, and counts rows by a column.
void expect_page_can_filter(const Figure& figure) {
  const Json& ours = figure.spec["usermeta"]["kvreplay"];
  EXPECT_GT(ours.value("ppi", 0), 0);
  const auto has = [&](const std::string& column) {
    return std::ranges::find(figure.table.columns(), column) != figure.table.columns().end();
  };
  for (const Json& filter : ours.value("filters", Json::array())) {
    const auto by = filter.get<std::string>();
    EXPECT_TRUE(has(by.starts_with("shown_") ? by.substr(6) : by)) << by;
  }
  if (ours.contains("rows")) {
    const auto column = ours["rows"]["column"].get<std::string>();
    ASSERT_TRUE(has(column)) << column;
    EXPECT_NEAR(figure.spec["height"].get<double>(),
                ours["rows"]["step"].get<double>() * static_cast<double>(distinct(figure.table, column).size()), 1e-9);
  }
  for (const Json& parameter : figure.spec.value("params", Json::array())) {
    const auto name = parameter["name"].get<std::string>();
    ASSERT_TRUE(name.starts_with("shown_") && has(name.substr(6))) << name;
    const std::vector<std::string> texts = distinct(figure.table, name.substr(6));
    EXPECT_THAT(texts, testing::Contains(parameter["value"].get<std::string>())) << "or nothing is drawn at first";
    for (const Json& option : parameter["bind"]["options"]) {
      EXPECT_THAT(texts, testing::Contains(option.get<std::string>())) << name;
    }
  }
}

class Figures : public testing::TestWithParam<std::string> {
 protected:
  static const FigureKind& kind() {
    const auto kinds = figure_kinds();
    return **std::ranges::find(kinds, GetParam(), &FigureKind::name);
  }
};

TEST_P(Figures, DrawWhatTheirTablesHold) {
  bool drawn = false;
  for (const auto& [name, analysis] : samples()) {
    for (const Theme theme : {Theme::paper, Theme::screen}) {
      SCOPED_TRACE(fmt::format("{}, {}", name, theme == Theme::paper ? "paper" : "screen"));
      const FigureStyle style(analysis, {.theme = theme});
      const Figure figure = kind().draw(analysis, style);
      EXPECT_EQ(figure.name, kind().name);
      if (figure.table.empty()) continue;
      drawn = true;
      std::set<std::string> used;
      std::set<std::string> made;
      find_fields(figure.spec, used, made);
      EXPECT_FALSE(used.empty());
      const std::set<std::string> columns(figure.table.columns().begin(), figure.table.columns().end());
      for (const std::string& field : used) EXPECT_TRUE(columns.contains(field) || made.contains(field)) << field;
      EXPECT_THAT(figure.spec["$schema"].get<std::string>(), HasSubstr("vega-lite/v6"));
      std::string title;
      for (const Json& line : figure.spec["title"]["text"]) title += line.get<std::string>();
      std::string question = figure.question;
      std::erase_if(title, [](char c) { return c == ' '; });
      std::erase_if(question, [](char c) { return c == ' '; });
      EXPECT_EQ(title, question) << "in lines";
      EXPECT_EQ(figure.spec["description"], figure.caption);
      EXPECT_TRUE(figure.caption.ends_with('.')) << figure.caption;
      EXPECT_THAT(figure.caption, Not(HasSubstr("  ")));
      EXPECT_FALSE(figure.spec.contains("data")) << "which is the table";
      expect_sound(figure.spec, "");
      expect_all_listed(figure.spec, figure.table);
      for (const std::string& column : columns_in_expressions(figure.spec.dump())) {
        EXPECT_TRUE(columns.contains(column) || made.contains(column)) << "datum." << column;
      }
      expect_page_can_filter(figure);
      const FigureStyle again(analysis, {.theme = theme});
      EXPECT_EQ(kind().draw(analysis, again).spec, figure.spec);
      EXPECT_EQ(kind().draw(analysis, again).table.csv(), figure.table.csv());
    }
  }
  EXPECT_TRUE(drawn) << "by none of the samples";
}

TEST_P(Figures, StaySmallAndSayWhatTheyLeaveOut) {
  constexpr std::size_t kMostBytes = 2'000'000;
  constexpr std::size_t kMostRows = 30'000;
  for (const auto& [name, analysis] : samples()) {
    SCOPED_TRACE(name);
    const Figure figure = kind().draw(analysis, FigureStyle(analysis));
    EXPECT_LT(figure.table.csv().size(), kMostBytes);
    EXPECT_LE(figure.table.rows().size(), kMostRows);
    const std::set<std::string> rasters = {"error-by-head",    "difference-by-head", "kept-positions", "importance",
                                           "residency-raster", "error-over-steps",   "span-survival"};
    if (name == "large" && !figure.table.empty() && rasters.contains(figure.name)) {
      EXPECT_THAT(figure.caption, HasSubstr("Thinned:"));
    }
    if (name == "sweep" && figure.name == "error-against-capacity") {
      EXPECT_THAT(figure.caption, testing::ContainsRegex("Shown are [0-9]+ of 402 policies\\."));
    }
  }
}

TEST_P(Figures, AreLeftOutWhereThereIsNothingToDraw) {
  const Analysis nothing;
  const Figure figure = kind().draw(nothing, FigureStyle(nothing));
  EXPECT_TRUE(figure.table.empty());
  EXPECT_FALSE(kind().needs.empty());
  EXPECT_TRUE(kind().question.ends_with('?'));
}

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const FigureKind* kind : figure_kinds()) names.push_back(kind->name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Kind, Figures, testing::ValuesIn(names()), [](const auto& tested) {
  std::string name = tested.param;
  std::ranges::replace(name, '-', '_');
  return name;
});

// Scales of the column policy, wherever they are.
void find_colours(const Json& node, std::map<std::string, std::set<std::string>>& colours) {
  if (node.is_array()) {
    for (const Json& part : node) find_colours(part, colours);
    return;
  }
  if (!node.is_object()) return;
  if (node.value("field", Json()) == "policy" && node.contains("scale") && node["scale"].contains("range") &&
      node["scale"]["range"][0].is_string() && node["scale"]["range"][0].get<std::string>().starts_with('#')) {
    for (std::size_t i = 0; i < node["scale"]["domain"].size(); ++i) {
      colours[node["scale"]["domain"][i]].insert(node["scale"]["range"][i]);
    }
  }
  for (const auto& [key, value] : node.items()) find_colours(value, colours);
}

TEST(FigureSetTest, APolicyHasTheSameColourEverywhere) {
  const Analysis analysis = SampleAnalysis{}.make();
  const FigureStyle style(analysis);
  std::map<std::string, std::set<std::string>> colours;
  for (const FigureKind* kind : figure_kinds()) find_colours(kind->draw(analysis, style).spec, colours);
  EXPECT_GE(colours.size(), 7u);
  for (const auto& [policy, its] : colours) EXPECT_EQ(its.size(), 1u) << policy;
  EXPECT_NE(colours["restkv"], colours["snapkv"]);
}

// Policies that were replayed at capacities, for styles; the first ones are the best.
Analysis replayed(const std::vector<std::pair<std::string, std::vector<std::string>>>& policies) {
  Analysis analysis;
  for (std::size_t p = 0; p < policies.size(); ++p) {
    for (const std::string& capacity : policies[p].second) {
      ComparisonRow row;
      row.key.policy = policies[p].first;
      row.key.capacity_request = capacity;
      row.distribution.mean = 0.1 + 0.01 * static_cast<double>(p);
      row.kept = std::stod(capacity);
      analysis.comparison.push_back(row);
      analysis.settings.push_back({policies[p].first, capacity});
    }
  }
  return analysis;
}

const std::vector<std::string> kFifteen = {"snapkv",  "h2o",   "tova",      "restkv",  "streamingllm",
                                           "lagkv",   "knorm", "random",    "recent",  "adakv",
                                           "keydiff", "cam",   "pyramidkv", "lacache", "attention"};

std::vector<std::string> beta_settings(int count) {
  std::vector<std::string> settings;
  for (int i = 1; i <= count; ++i) settings.push_back(fmt::format("restkv(beta={})", i));
  return settings;
}

TEST(FigureSetTest, WhatIsThinnedFollowsARuleAndIsListed) {
  // restkv is worse than variants that were tried at one capacity only, and is what a line is drawn of.
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& setting : beta_settings(20)) policies.push_back({setting, {"64"}});
  policies.push_back({"restkv", {"64", "128"}});
  policies.push_back({"snapkv", {"64", "128"}});
  Analysis analysis = replayed(policies);
  analysis.options.baseline = "snapkv";
  const FigureStyle style(analysis);
  EXPECT_THAT(style.policies(), testing::ElementsAre("restkv", "snapkv")) << "the better one first";
  EXPECT_THAT(style.left_out(), testing::ElementsAreArray(beta_settings(20))) << "all others, the best first";
  EXPECT_THAT(style.shown_text(), testing::StrEq(" Shown are 2 of 22 policies.")) << "by which rule is said once";
  EXPECT_THAT(style.rule(), HasSubstr("2 of 22 policies: the baseline, the oracle, random and recent"));
  EXPECT_THAT(style.rule(), HasSubstr("--policy shows"));
  EXPECT_THAT(style.rule(), HasSubstr("the most capacities"));
  EXPECT_THAT(style.capacities(), testing::ElementsAre("64", "128"));
}

TEST(FigureSetTest, AsManyAsAnEyeTellsApartAreAllShown) {
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& setting : beta_settings(14)) policies.push_back({setting, {"64"}});
  policies.push_back({"restkv", {"64", "128"}});
  policies.push_back({"random", {"64", "128"}});
  const FigureStyle style(replayed(policies));
  EXPECT_EQ(style.policies().size(), 16u);
  EXPECT_TRUE(style.left_out().empty());
  EXPECT_EQ(style.shown_text(), "");
}

TEST(FigureSetTest, SettingsThatWereWrittenOutAreShownBesideManyOfAMethod) {
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& setting : beta_settings(60)) policies.push_back({setting, {"64"}});
  policies.push_back({"restkv", {"64", "128"}});
  const FigureStyle style(replayed(policies), {.policies = {"restkv(beta=60)", "restkv"}});
  EXPECT_THAT(style.policies(), testing::Contains("restkv(beta=60)"));
  EXPECT_EQ(style.policies().front(), "restkv(beta=60)") << "in the order that was asked for";
  EXPECT_THAT(style.policies(), testing::Contains("restkv"));
  EXPECT_EQ(style.policies().size() + style.left_out().size(), 61u);
  EXPECT_THAT(style.rule(), HasSubstr("written out"));
  EXPECT_THAT(style.rule(), Not(HasSubstr("--policy"))) << "which is what was used";
}

TEST(FigureSetTest, WhatIsWrittenOutKeepsItsPlaceBesideItsMethod) {
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& setting : beta_settings(3)) policies.push_back({setting, {"64"}});
  policies.push_back({"snapkv", {"64"}});
  policies.push_back({"restkv", {"64"}});
  const FigureStyle style(replayed(policies), {.policies = {"restkv", "snapkv", "restkv(beta=1)", "restkv()"}});
  EXPECT_THAT(style.policies(),
              testing::ElementsAre("restkv(beta=2)", "restkv(beta=3)", "snapkv", "restkv(beta=1)", "restkv"));
}

TEST(FigureSetTest, PoliciesThatWereNamedAreInEveryFigureThatHasDataOfThem) {
  const SampleAnalysis sample{.policies = kFifteen, .alphas = {}, .betas = {}};
  const Analysis analysis = sample.make();
  std::vector<std::string> named = kFifteen;
  named.push_back(sample.oracle);
  std::ranges::reverse(named);
  const FigureStyle style(analysis, {.policies = named});
  EXPECT_EQ(style.policies(), named) << "in their order";
  EXPECT_TRUE(style.left_out().empty());
  for (const FigureKind* kind : figure_kinds()) {
    const Figure figure = kind->draw(analysis, style);
    if (std::ranges::find(figure.table.columns(), "policy") == figure.table.columns().end()) continue;
    SCOPED_TRACE(kind->name);
    EXPECT_THAT(figure.caption, Not(HasSubstr("Shown")));
    std::set<std::string> missing(named.begin(), named.end());
    for (const std::string& policy : distinct(figure.table, "policy")) missing.erase(policy);
    // What they are measured against has no difference from itself; not all reach a goal, which the caption says.
    if (kind->name.starts_with("difference-")) missing.erase(analysis.options.baseline);
    if (kind->name == "regret" || kind->name == "loss-prediction") missing.erase(analysis.oracle);
    if (kind->name == "capacity-for-goal") {
      std::erase_if(missing,
                    [&](const std::string& policy) { return figure.caption.find(policy) != std::string::npos; });
    }
    EXPECT_THAT(missing, testing::IsEmpty());
  }
}

TEST(FigureSetTest, OtherResultsDoNotChangeWhichOfTheNamedAreShown) {
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& policy : kFifteen) policies.push_back({policy, {"64"}});
  const FigureStyle alone(replayed(policies), {.policies = kFifteen});
  // A file with further capacities of some of them.
  for (const std::size_t i : {3u, 7u}) policies[i].second = {"64", "128", "256"};
  const FigureStyle beside(replayed(policies), {.policies = kFifteen});
  EXPECT_EQ(alone.policies(), kFifteen);
  EXPECT_EQ(beside.policies(), kFifteen);
}

// The symbols of a legend that is drawn with the policies' lines.
Json symbols_of(const Json& colour) {
  const auto expression = colour["legend"]["symbolType"]["expr"].get<std::string>();
  return Json::parse(expression.substr(0, expression.rfind('[')));
}

TEST(FigureSetTest, NoTwoPoliciesLookAlike) {
  std::vector<std::pair<std::string, std::vector<std::string>>> policies;
  for (const std::string& policy : kFifteen) policies.push_back({policy, {"64"}});
  for (const std::string& setting : beta_settings(25)) policies.push_back({setting, {"64"}});
  for (const std::size_t count : {6u, 15u, 30u, 40u}) {
    std::vector<std::pair<std::string, std::vector<std::string>>> some(policies.begin(), policies.begin() + count);
    std::vector<std::string> named;
    for (const auto& [policy, capacities] : some) named.push_back(policy);
    const FigureStyle style(replayed(some), {.policies = named});
    std::set<std::string> hues;
    std::set<std::pair<std::string, std::vector<int>>> looks;
    for (const std::string& policy : named) {
      hues.insert(style.colour_of(policy));
      looks.emplace(style.colour_of(policy), style.dashes_of(policy));
    }
    EXPECT_EQ(looks.size(), count);
    if (count <= 15) {
      EXPECT_EQ(hues.size(), count);
    }
    // The legend shows what tells them apart: a whole line is one piece, a dashed one several, and all have a marker.
    std::set<std::pair<std::string, std::string>> drawn;
    const Json colour = style.colour(named);
    EXPECT_EQ(colour["legend"]["symbolLimit"], 0) << "or it would end after 30";
    const Json symbols = symbols_of(colour);
    for (const std::string& policy : named) {
      const auto path = symbols[policy].get<std::string>();
      const auto pieces = std::ranges::count(path, 'M') - 1;
      EXPECT_EQ(pieces > 1, style.dashes_of(policy)[1] > 0) << path;
      drawn.emplace(style.colour_of(policy), path.substr(0, path.rfind('M')));
    }
    EXPECT_EQ(drawn.size(), count) << "in legends";
  }
}

TEST(FigureSetTest, TheBestIsFirstUnlessAnotherOrderIsAskedFor) {
  const Analysis analysis = replayed({{"tova", {"64", "128"}}, {"h2o", {"64", "128"}}, {"snapkv", {"64", "128"}}});
  EXPECT_THAT(FigureStyle(analysis).policies(), testing::ElementsAre("tova", "h2o", "snapkv"));
  const FigureStyle asked(analysis, {.policies = {"snapkv", "tova"}});
  EXPECT_THAT(asked.policies(), testing::ElementsAre("snapkv", "tova", "h2o")) << "a baseline comes along";
  EXPECT_EQ(asked.colour(asked.policies())["scale"]["domain"], Json({"snapkv", "tova", "h2o"})) << "in legends too";
  EXPECT_EQ(FigureStyle(analysis).colour_of("snapkv"), asked.colour_of("snapkv")) << "colours stay";
}

TEST(FigureSetTest, TicksAreTheCapacitiesThatWereAskedFor) {
  Analysis analysis = SampleAnalysis{}.make();
  // Policies keep about what they were asked for.
  const auto about = [&](double& kept, const std::string& policy) {
    if (policy == "snapkv") kept += 1;
    if (policy == "tova") kept -= 0.4;
  };
  for (ComparisonRow& row : analysis.comparison) about(row.kept, row.key.policy);
  for (CapacityCurve& curve : analysis.curves) {
    for (CapacityPoint& point : curve.points) about(point.kept, curve.policy);
  }
  for (ComparisonRow& row : analysis.regret) about(row.kept, row.key.policy);
  const FigureStyle style(analysis);
  for (const char* name : {"error-against-capacity", "regret", "capacity-for-goal"}) {
    SCOPED_TRACE(name);
    const auto kinds = figure_kinds();
    const Figure figure = (*std::ranges::find(kinds, name, &FigureKind::name))->draw(analysis, style);
    const Json& axis = figure.spec["encoding"]["x"]["axis"];
    ASSERT_EQ(axis["values"].size(), 3u);
    EXPECT_EQ(axis["values"][0], 64);
    EXPECT_EQ(axis["values"][1], 128);
    EXPECT_NEAR(axis["values"][2].get<double>(), 256, 1) << "where a share of 25 % lies: what was kept, on average";
    EXPECT_THAT(axis["labelExpr"].get<std::string>(), testing::StartsWith(R"(["64","128","25 %"])"));
  }
}

TEST(FigureSetTest, CapacitiesThatAreTheSameShareATick) {
  Analysis analysis = replayed({{"tova", {"64", "128"}}});
  analysis.comparison.push_back(analysis.comparison.front());
  analysis.comparison.back().key.capacity_request = "25%";
  analysis.settings.push_back({"tova", "25%"});
  Json axis;
  FigureStyle(analysis).set_capacity_ticks(axis, {"64", "128", "25%"});
  EXPECT_EQ(axis["values"], Json({64, 128}));
  EXPECT_THAT(axis["labelExpr"].get<std::string>(), testing::StartsWith(R"(["64, 25 %","128"])"));
}

TEST(FigureSetTest, TitlesAreLeftOutWhereTextHasCaptions) {
  const Analysis analysis = SampleAnalysis{}.make();
  const FigureStyle style(analysis, {.theme = Theme::paper, .titles = false});
  for (const FigureKind* kind : figure_kinds()) {
    const Figure figure = kind->draw(analysis, style);
    EXPECT_FALSE(figure.spec.contains("title")) << kind->name;
    EXPECT_FALSE(figure.question.empty());
    // What a picture shows of several is then in its caption alone.
    for (const Json& parameter : figure.spec.value("params", Json::array())) {
      if (parameter["name"] != "shown_capacity") continue;
      EXPECT_THAT(figure.caption, HasSubstr(capacity_text(parameter["value"].get<std::string>()))) << kind->name;
    }
  }
}

TEST(FigureSetTest, ChangesThatAreNotDrawnAreListed) {
  Analysis analysis = SampleAnalysis{}.make();
  const StepEffect effect = analysis.step_effects.front();
  for (int i = 0; i < 30; ++i) {
    analysis.step_effects.push_back(effect);
    analysis.step_effects.back().change = fmt::format("window: 32 → {}", i + 100);
    analysis.step_effects.back().layer = -1;
  }
  const auto kinds = figure_kinds();
  const FigureKind* ablation = *std::ranges::find(kinds, "ablation", &FigureKind::name);
  const Figure thinned = ablation->draw(analysis, FigureStyle(analysis));
  const std::size_t shown = distinct(thinned.table, "change").size();
  EXPECT_THAT(thinned.left_out, testing::SizeIs(36 - shown));
  EXPECT_THAT(thinned.caption, HasSubstr(fmt::format("Shown are the {} changes of 36", shown)));
  const Figure named = ablation->draw(analysis, FigureStyle(analysis, {.policies = {"restkv", "snapkv"}}));
  EXPECT_EQ(distinct(named.table, "change").size(), 36u);
  EXPECT_THAT(named.left_out, testing::IsEmpty());
}

// The table of one figure.
DataTable drawn(const Analysis& analysis, const std::string& name) {
  const auto kinds = figure_kinds();
  return (*std::ranges::find(kinds, name, &FigureKind::name))->draw(analysis, FigureStyle(analysis)).table;
}

// A row's cells by the names of their columns.
class Row {
 public:
  Row(const DataTable& table, std::size_t row) : table_(&table), row_(row) {}
  const std::string& text(const std::string& column) const { return std::get<std::string>(cell(column)); }
  double number(const std::string& column) const { return std::get<double>(cell(column)); }

 private:
  const Cell& cell(const std::string& column) const {
    const auto& columns = table_->columns();
    return table_->rows().at(row_).at(static_cast<std::size_t>(std::ranges::find(columns, column) - columns.begin()));
  }
  const DataTable* table_;
  std::size_t row_;
};

TEST(FigureSetTest, CurvesAreThoseOfTheAnalysis) {
  const Analysis analysis = SampleAnalysis{}.make();
  std::map<std::pair<std::string, std::string>, CapacityPoint> points;
  for (const CapacityCurve& curve : analysis.curves) {
    for (const CapacityPoint& point : curve.points) points[{curve.policy, point.capacity_request}] = point;
  }
  const DataTable table = drawn(analysis, "error-against-capacity");
  ASSERT_EQ(table.rows().size(), points.size()) << "each once";
  for (std::size_t i = 0; i < table.rows().size(); ++i) {
    const Row row(table, i);
    const auto found = points.extract({row.text("policy"), row.text("capacity")});
    ASSERT_FALSE(found.empty()) << row.text("policy") << " is there twice, or never was";
    EXPECT_EQ(row.number("mean"), found.mapped().mean);
    EXPECT_EQ(row.number("low"), found.mapped().interval.low);
    EXPECT_EQ(row.number("high"), found.mapped().interval.high);
    EXPECT_EQ(row.number("kept"), found.mapped().kept);
  }
}

TEST(FigureSetTest, CurvesThatAreFarApartHaveALogarithmicAxis) {
  Analysis analysis = SampleAnalysis{}.make();
  const auto kinds = figure_kinds();
  const FigureKind* kind = *std::ranges::find(kinds, "error-against-capacity", &FigureKind::name);
  const Json::json_pointer kind_of_scale("/scale/type");
  const auto errors = [&] { return kind->draw(analysis, FigureStyle(analysis)).spec["layer"]; };
  for (const Json& layer : errors()) EXPECT_NE(layer["encoding"]["y"].value(kind_of_scale, ""), "log");
  CapacityPoint& point = analysis.curves.front().points.front();
  point.mean *= 1000;
  point.interval.high *= 1000;
  const Json far_apart = errors();
  for (const Json& layer : far_apart) EXPECT_EQ(layer["encoding"]["y"]["scale"]["type"], "log");
  EXPECT_THAT(far_apart[0]["encoding"]["y"]["title"].get<std::string>(), testing::EndsWith(" (log scale)"));
  point.interval.low = 0;
  for (const Json& layer : errors()) EXPECT_NE(layer["encoding"]["y"].value(kind_of_scale, ""), "log");
}

TEST(FigureSetTest, PointsOfTheLossAreThoseOfTheAnalysis) {
  Analysis analysis = SampleAnalysis{}.make();
  LossPredictions& loss = analysis.loss_predictions;
  loss.settings.front().loss = 0;
  const auto kinds = figure_kinds();
  const FigureKind* kind = *std::ranges::find(kinds, "loss-prediction", &FigureKind::name);
  const Figure figure = kind->draw(analysis, FigureStyle(analysis));
  EXPECT_THAT(distinct(figure.table, "measure"), testing::ElementsAre("squared layer error", "layer error"))
      << "the best, and the layer error beside it";
  ASSERT_EQ(figure.table.rows().size(), 2 * loss.settings.size());
  for (std::size_t i = 0; i < figure.table.rows().size(); ++i) {
    const Row row(figure.table, i);
    const PredictedLoss& setting = loss.settings[i % loss.settings.size()];
    EXPECT_EQ(row.text("policy"), setting.policy);
    EXPECT_EQ(row.text("trace"), setting.trace);
    EXPECT_EQ(row.number("kl"), setting.loss);
    EXPECT_EQ(row.number("offline"), setting.offline[i < loss.settings.size() ? 1 : 0]);
  }
  const Json& panels = figure.spec["concat"];
  ASSERT_EQ(panels.size(), 2 * SampleAnalysis{}.capacities.size());
  EXPECT_EQ(panels[0]["title"]["text"],
            fmt::format("64: Spearman {:.2f}", loss.predictions.front().of_capacity.at("64")));
  EXPECT_EQ(panels[0]["encoding"]["y"]["scale"]["type"], "log");
  EXPECT_THAT(figure.caption, HasSubstr("Not drawn is 1 point without a loss."));
  // Where the layer error is the best, the next one stands beside it.
  std::ranges::swap(loss.predictions[0].predictor, loss.predictions[1].predictor);
  EXPECT_THAT(distinct(drawn(analysis, "loss-prediction"), "measure"),
              testing::ElementsAre("layer error", "squared layer error"));
}

TEST(FigureSetTest, AblationIsThatOfTheAnalysis) {
  const Analysis analysis = SampleAnalysis{}.make();
  std::map<std::pair<std::string, std::string>, PairedDifference> effects;
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer < 0) effects[{effect.change, effect.capacity_request}] = effect.difference;
  }
  const DataTable table = drawn(analysis, "ablation");
  ASSERT_EQ(table.rows().size(), effects.size()) << "each once";
  std::set<std::string> sure;
  for (std::size_t i = 0; i < table.rows().size(); ++i) {
    const Row row(table, i);
    const auto found = effects.extract({row.text("change"), row.text("capacity")});
    ASSERT_FALSE(found.empty());
    EXPECT_EQ(row.number("difference"), found.mapped().mean);
    EXPECT_EQ(row.number("low"), found.mapped().interval.low);
    EXPECT_EQ(row.number("high"), found.mapped().interval.high);
    EXPECT_EQ(row.text("sure"), found.mapped().adjusted < 0.05 ? "yes" : "no");
    sure.insert(row.text("sure"));
  }
  EXPECT_EQ(sure.size(), 2u) << "the sample has both";
}

TEST(FigureSetTest, OverlapsAreThoseOfTheAnalysis) {
  const Analysis analysis =
      SampleAnalysis{.policies = {"restkv", "snapkv", "tova", "random"}, .alphas = {}, .betas = {}}.make();
  std::map<std::tuple<std::string, std::string, std::string, std::string>, PolicyOverlap> overlaps;
  for (const PolicyOverlap& each : analysis.overlaps) {
    const std::string layer = each.layer < 0 ? "all" : fmt::format("{}", each.layer);
    overlaps[{each.capacity_request, layer, each.policy, each.other}] = each;
  }
  const DataTable table = drawn(analysis, "policy-overlap");
  ASSERT_EQ(table.rows().size(), overlaps.size()) << "each once";
  for (std::size_t i = 0; i < table.rows().size(); ++i) {
    const Row row(table, i);
    const auto found =
        overlaps.extract({row.text("capacity"), row.text("layer"), row.text("policy"), row.text("other")});
    ASSERT_FALSE(found.empty());
    const PolicyOverlap& its = found.mapped();
    EXPECT_NEAR(row.number("jaccard"), its.jaccard, 1e-5 * its.jaccard) << "in six digits";
    EXPECT_NEAR(row.number("containment"), its.containment, 1e-5 * its.containment);
  }
}

TEST(FigureSetTest, LayersAndHeadsHaveIntegerTicks) {
  EXPECT_THAT(integer_ticks(0), testing::ElementsAre(0));
  EXPECT_THAT(integer_ticks(1), testing::ElementsAre(0, 1));
  EXPECT_THAT(integer_ticks(31), testing::ElementsAre(0, 5, 10, 15, 20, 25, 30));
  for (const int last : {2, 9, 79, 127, 1000}) EXPECT_LE(integer_ticks(last).size(), 9u);
}

TEST(FigureSetTest, LongNamesAreBrokenIntoLines) {
  EXPECT_THAT(broken("attention(temporal=ema,spatial=adaptive)", 23),
              testing::ElementsAre("attention(temporal=ema,", "spatial=adaptive)"));
  EXPECT_THAT(broken("restkv+adakv", 8), testing::ElementsAre("restkv", "+adakv"));
  EXPECT_THAT(broken("oracle-reconstruction", 14), testing::ElementsAre("oracle-", "reconstruction"));
  EXPECT_THAT(broken("größerundmehr", 5), testing::ElementsAre("größe", "rundm", "ehr"));
  EXPECT_THAT(broken("short", 8), testing::ElementsAre("short"));
}

}  // namespace
}  // namespace kvreplay
