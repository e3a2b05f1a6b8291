// The notebook of a report, as Jupyter, GitHub and pandas take it. That it runs is checked where Python is:
// scripts/check-report.py.
#include <gmock/gmock.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "notebooks-export/report.h"

namespace kvreplay {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::MatchesRegex;
using testing::Not;
using testing::SizeIs;
using testing::StartsWith;

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// A PNG of 1400 x 300 dots, as far as its size is told.
constexpr const char* kWidePicture = "iVBORw0KGgoAAAANSUhEUgAABXgAAAEsCAYAAAA=";

Figure curves() {
  Figure figure;
  figure.name = "error-against-capacity";
  figure.question = "How much error does each policy make at each capacity?";
  figure.caption = "Mean over 155 queries.";
  figure.spec = {{"$schema", "https://vega.github.io/schema/vega-lite/v6.json"},
                 {"mark", "line"},
                 {"encoding", {{"x", {{"field", "kept"}, {"type", "quantitative"}}}}}};
  figure.table = DataTable({"kept", "capacity", "policy", "interval"});
  figure.table.add({64.0, std::string("64"), std::string("restkv(alpha=0.3)"), 0.25});
  figure.table.add({128.0, std::string("128"), std::string("snapkv"), kNone});
  return figure;
}

std::string text_of(const json& lines) {
  std::string text;
  for (const json& line : lines) text += line.get<std::string>();
  return text;
}

class Notebook : public testing::Test {
 protected:
  static json notebook(const std::vector<Figure>& figures, const std::vector<std::string>& pictures = {},
                       const std::string& title = "A report", const std::string& thinned = "") {
    return json::parse(notebook_text(title, thinned, figures, pictures));
  }

  // Its cells: a title, the setup, and two per figure.
  static json figure_cell(const json& notebook, std::size_t figure = 0) { return notebook["cells"][3 + 2 * figure]; }
};

TEST_F(Notebook, IsOneOfNbformat45) {
  const json whole = notebook({curves()}, {kWidePicture});
  EXPECT_EQ(whole["nbformat"], 4);
  EXPECT_EQ(whole["nbformat_minor"], 5);
  EXPECT_EQ(whole["metadata"]["kernelspec"]["name"], "python3");
  ASSERT_THAT(whole["cells"], SizeIs(4));
  for (const json& cell : whole["cells"]) {
    const bool code = cell["cell_type"] == "code";
    EXPECT_EQ(cell.contains("outputs"), code);
    EXPECT_EQ(cell.contains("execution_count"), code);
    EXPECT_TRUE(cell["metadata"].is_object());
    // A list of lines, each with its end but the last.
    ASSERT_THAT(cell["source"], Not(IsEmpty()));
    for (std::size_t i = 0; i < cell["source"].size(); ++i) {
      const auto line = cell["source"][i].get<std::string>();
      EXPECT_EQ(line.find('\n'), i + 1 < cell["source"].size() ? line.size() - 1 : std::string::npos) << line;
    }
  }
}

TEST_F(Notebook, CellsAreToldApartByIdentifiersThatNbformatTakes) {
  Figure accents = curves();
  accents.name = "réseau of a name that is longer than what an identifier may have in Jupyter";
  Figure other = curves();
  other.name = "regret";
  std::set<std::string> seen;
  for (const json& cell : notebook({curves(), accents, other})["cells"]) {
    const auto id = cell["id"].get<std::string>();
    EXPECT_THAT(id, MatchesRegex("[a-zA-Z0-9_-]+"));
    EXPECT_LE(id.size(), 64u);
    EXPECT_TRUE(seen.insert(id).second) << id;
  }
}

TEST_F(Notebook, SaysWhatEachFigureAnswers) {
  const json whole = notebook({curves()});
  EXPECT_THAT(text_of(whole["cells"][0]["source"]), StartsWith("# A report\n"));
  EXPECT_EQ(text_of(whole["cells"][2]["source"]),
            "## How much error does each policy make at each capacity?\n\nMean over 155 queries.");
}

TEST_F(Notebook, TextStaysTextInMarkdown) {
  Figure figure = curves();
  figure.question = "Is a_b*c < $d$ & <b>e</b>?";
  figure.caption = "[x](y) `z`\n# no heading";
  const json whole = notebook({figure}, {}, "1 # _t_\xff\ntwo");
  EXPECT_THAT(text_of(whole["cells"][0]["source"]), StartsWith("# 1 \\# \\_t\\_\\\\xff\\\\ntwo\n"));
  EXPECT_EQ(text_of(whole["cells"][2]["source"]),
            "## Is a\\_b\\*c &lt; \\$d\\$ &amp; &lt;b\\>e&lt;/b\\>?\n\n\\[x\\](y) \\`z\\` \\# no heading");
}

TEST_F(Notebook, ACellReadsItsTableAndDrawsIt) {
  Figure figure = curves();
  figure.name = "two";
  const json whole = notebook({curves(), figure});
  EXPECT_THAT(text_of(whole["cells"][1]["source"]), AllOf(HasSubstr("import altair as alt"), Not(HasSubstr("@"))));
  EXPECT_EQ(text_of(figure_cell(whole, 0)["source"]),
            "data = table(\"error-against-capacity\", text=[\"capacity\"])\n"
            "# data = data[data[\"policy\"] == \"restkv(alpha=0.3)\"]  # to draw a part of it\n"
            "figure(\"error-against-capacity\", data)")
      << "capacities would be read as numbers";
  EXPECT_THAT(text_of(figure_cell(whole, 1)["source"]), EndsWith("figure(\"two\", data)"));
}

TEST_F(Notebook, SaysWhichTextPandasWouldReadAsSomethingElse) {
  Figure figure = curves();
  figure.table = DataTable({"share", "oracle", "empty", "layer", "number"});
  figure.table.add({std::string("1e3"), std::string("true"), std::string(), std::string("all"), 3.0});
  figure.table.add({std::string("+.5"), std::string("False"), std::string(), std::string("3"), kNone});
  EXPECT_THAT(text_of(figure_cell(notebook({figure}))["source"]),
              StartsWith("data = table(\"error-against-capacity\", text=[\"share\", \"oracle\", \"empty\"])\n"));
}

TEST_F(Notebook, AlreadyShowsItsFigures) {
  const json cell = figure_cell(notebook({curves()}, {kWidePicture}));
  ASSERT_THAT(cell["outputs"], SizeIs(1));
  const json& output = cell["outputs"][0];
  EXPECT_EQ(output["output_type"], "execute_result");
  EXPECT_EQ(output["execution_count"], cell["execution_count"]);
  const json& chart = output["data"]["application/vnd.vegalite.v5+json"];
  EXPECT_EQ(chart["mark"], "line");
  EXPECT_THAT(chart["$schema"].get<std::string>(), HasSubstr("/v5")) << "as the type says";
  EXPECT_EQ(chart["data"]["values"], json::parse(R"json([
    {"kept": 64, "capacity": "64", "policy": "restkv(alpha=0.3)", "interval": 0.25
},
    {"kept": 128, "capacity": "128", "policy": "snapkv", "interval": null}])json"));
  EXPECT_EQ(output["data"]["image/png"], kWidePicture);
  EXPECT_EQ(text_of(output["data"]["text/plain"]), "How much error does each policy make at each capacity?");
  EXPECT_EQ(output["metadata"]["image/png"], json({{"width", 700}, {"height", 150}})) << "not wider than a column";
}

TEST_F(Notebook, WithoutPicturesTheSpecificationShows) {
  for (const std::vector<std::string>& pictures : {std::vector<std::string>{}, std::vector<std::string>{""}}) {
    const json cell = figure_cell(notebook({curves()}, pictures));
    ASSERT_THAT(cell["outputs"], SizeIs(1));
    EXPECT_TRUE(cell["outputs"][0]["data"].contains("application/vnd.vegalite.v5+json"));
    EXPECT_FALSE(cell["outputs"][0]["data"].contains("image/png"));
  }
}

TEST_F(Notebook, LargeTablesStayBesideIt) {
  Figure large = curves();
  for (int i = 0; i < 20'000; ++i) large.table.add({64.0 + i, std::string("64"), std::string("snapkv"), 0.5});
  const json pictured = notebook({curves(), large}, {"", kWidePicture});
  EXPECT_THAT(pictured.dump(), SizeIs(testing::Lt(20'000u)));
  EXPECT_TRUE(figure_cell(pictured, 0)["outputs"][0]["data"].contains("application/vnd.vegalite.v5+json"));
  EXPECT_FALSE(figure_cell(pictured, 1)["outputs"][0]["data"].contains("application/vnd.vegalite.v5+json"));
  EXPECT_EQ(figure_cell(pictured, 1)["outputs"][0]["data"]["image/png"], kWidePicture);

  const json bare = notebook({large});
  EXPECT_THAT(figure_cell(bare)["outputs"], IsEmpty());
  EXPECT_THAT(text_of(bare["cells"][2]["source"]), HasSubstr("run the next cell"));
}

TEST_F(Notebook, IsTheSameTextEveryTime) {
  EXPECT_EQ(notebook_text("A report", "", {curves()}, {kWidePicture}),
            notebook_text("A report", "", {curves()}, {kWidePicture}));
}

TEST_F(Notebook, WithoutFiguresThereIsTheSetup) { EXPECT_THAT(notebook({})["cells"], SizeIs(2)); }

}  // namespace
}  // namespace kvreplay
