// Every kind of figure on analyses of many shapes: what is drawn is in its table, can be read, and stays small. That
// Vega-Lite takes the specifications and what they look like is checked where Python is: scripts/check-report.py.
#include "notebooks-export/figure.h"

#include <fmt/format.h>
#include <gmock/gmock.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

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
    nothing_else.alphas = {};
    nothing_else.betas = {};
    SampleAnalysis odd;
    odd.policies = {"restkv",      "snapkv",        "</script><b>&\"'",
                    "a\nb\x1b[0m", "größer 🙂", "attention(" + std::string(300, 'x') + "=1,y=2)"};
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
      const Figure figure = kind().draw(analysis, theme);
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
      const std::string text = figure.spec.dump(-1, ' ', false, Json::error_handler_t::replace);
      EXPECT_THAT(text, Not(HasSubstr("\x1b")));
      EXPECT_EQ(kind().draw(analysis, theme).spec, figure.spec);
      EXPECT_EQ(kind().draw(analysis, theme).table.csv(), figure.table.csv());
    }
  }
  EXPECT_TRUE(drawn) << "by none of the samples";
}

TEST_P(Figures, StaySmallAndSayWhatTheyLeaveOut) {
  constexpr std::size_t kMostBytes = 2'000'000;
  constexpr std::size_t kMostRows = 30'000;
  for (const auto& [name, analysis] : samples()) {
    SCOPED_TRACE(name);
    const Figure figure = kind().draw(analysis, Theme::screen);
    EXPECT_LT(figure.table.csv().size(), kMostBytes);
    EXPECT_LE(figure.table.rows().size(), kMostRows);
    const std::set<std::string> rasters = {"error-by-head", "difference-by-head", "kept-positions", "importance"};
    if (name == "large" && !figure.table.empty() && rasters.contains(figure.name)) {
      EXPECT_THAT(figure.caption, HasSubstr("Thinned:"));
    }
    if (name == "sweep" && figure.name == "error-against-capacity") {
      EXPECT_THAT(figure.caption, testing::ContainsRegex("Of 402 policies, figures show [0-9]+ "));
    }
  }
}

TEST_P(Figures, AreLeftOutWhereThereIsNothingToDraw) {
  const Figure figure = kind().draw(Analysis{}, Theme::paper);
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
  std::map<std::string, std::set<std::string>> colours;
  for (const FigureKind* kind : figure_kinds()) find_colours(kind->draw(analysis, Theme::paper).spec, colours);
  EXPECT_GE(colours.size(), 7u);
  for (const auto& [policy, its] : colours) EXPECT_EQ(its.size(), 1u) << policy;
  EXPECT_NE(colours["restkv"], colours["snapkv"]);
}

TEST(FigureSetTest, SettingsOfMostCapacitiesAreShown) {
  // restkv is worse than a variant that was tried at one capacity only, and is what a line is drawn of.
  Analysis analysis;
  analysis.options.baseline = "snapkv";
  const auto add = [&](const std::string& policy, const std::string& capacity, double mean) {
    ComparisonRow row;
    row.key.policy = policy;
    row.key.capacity_request = capacity;
    row.distribution.mean = mean;
    row.kept = std::stod(capacity);
    analysis.comparison.push_back(row);
    analysis.settings.push_back({policy, capacity});
  };
  for (const char* capacity : {"64", "128"}) {
    add("snapkv", capacity, 0.5);
    add("restkv", capacity, 0.4);
  }
  for (int i = 0; i < 20; ++i) add(fmt::format("restkv(beta={})", i + 1), "64", 0.3);
  const FigureStyle style(analysis, Theme::paper);
  EXPECT_THAT(style.policies(), testing::ElementsAre("snapkv", "restkv"));
  EXPECT_THAT(style.left_out(), HasSubstr("Of 22 policies, figures show 2"));
  EXPECT_THAT(style.capacities(), testing::ElementsAre("64", "128"));
}

TEST(FigureSetTest, NumbersAreThoseOfTheAnalysis) {
  const Analysis analysis = SampleAnalysis{}.make();
  const auto drawn = [&](const std::string& name) {
    for (const FigureKind* kind : figure_kinds()) {
      if (kind->name == name) return kind->draw(analysis, Theme::paper).table;
    }
    return DataTable({});
  };
  std::map<std::pair<std::string, std::string>, double> means;
  for (const CapacityCurve& curve : analysis.curves) {
    for (const CapacityPoint& point : curve.points) means[{curve.policy, point.capacity_request}] = point.mean;
  }
  const DataTable curves = drawn("error-against-capacity");
  ASSERT_FALSE(curves.empty());
  for (const auto& row : curves.rows()) {
    EXPECT_EQ(std::get<double>(row[4]), means.at({std::get<std::string>(row[0]), std::get<std::string>(row[1])}));
  }
  std::map<std::string, double> effects;
  for (const StepEffect& effect : analysis.step_effects) {
    if (effect.layer < 0) effects[effect.change + " " + effect.capacity_request] = effect.difference.mean;
  }
  const DataTable ablation = drawn("ablation");
  ASSERT_FALSE(ablation.empty());
  for (const auto& row : ablation.rows()) {
    EXPECT_EQ(std::get<double>(row[5]),
              effects.at(std::get<std::string>(row[0]) + " " + std::get<std::string>(row[4])));
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
  EXPECT_THAT(broken("short", 8), testing::ElementsAre("short"));
}

}  // namespace
}  // namespace kvreplay
