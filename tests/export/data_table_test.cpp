// Tables as files and as data of figures.
#include "notebooks-export/tables/data_table.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace kvreplay {
namespace {

using testing::Not;

TEST(DataTableTest, IsWrittenAsRFC4180Says) {
  DataTable table({"policy", "a,b"});
  table.add({std::string("restkv(alpha=0.1,beta=30)"), 0.5});
  table.add({std::string("say \"no\""), std::nan("")});
  EXPECT_EQ(table.csv(),
            "policy,\"a,b\"\n"
            "\"restkv(alpha=0.1,beta=30)\",0.5\n"
            "\"say \"\"no\"\"\",\n");
}

TEST(DataTableTest, NumbersAreTheShortestThatReadBackTheSame) {
  DataTable table({"x"});
  for (const double number : {0.1, 1.0 / 3, 1e-300, 123456789.0}) table.add({number});
  EXPECT_EQ(table.csv(), "x\n0.1\n0.3333333333333333\n1e-300\n123456789\n");
}

TEST(DataTableTest, WhatIsNoNumberIsNone) {
  DataTable table({"x", "y"});
  table.add({std::numeric_limits<double>::infinity(), 1.0});
  EXPECT_EQ(table.csv(), "x,y\n,1\n");
  EXPECT_TRUE(table.json()[0]["x"].is_null());
  EXPECT_EQ(table.json()[0]["y"], 1.0);
}

// Reads RFC 4180 as any reader does: the fields of all records.
std::vector<std::vector<std::string>> records_of(const std::string& csv) {
  std::vector<std::vector<std::string>> records = {{""}};
  bool quoted = false;
  for (std::size_t i = 0; i < csv.size(); ++i) {
    std::string& field = records.back().back();
    if (quoted && csv[i] == '"' && i + 1 < csv.size() && csv[i + 1] == '"') {
      field += csv[++i];
    } else if (csv[i] == '"') {
      quoted = !quoted;
    } else if (!quoted && csv[i] == ',') {
      records.back().emplace_back();
    } else if (!quoted && csv[i] == '\n') {
      records.push_back({""});
    } else {
      field += csv[i];
    }
  }
  records.pop_back();  // of the last line's end
  return records;
}

TEST(DataTableTest, WhatItHoldsIsReadBack) {
  const std::vector<std::string> texts = {"", "\"", "\"\"", ",", ",,\"", "a\"b,c", " a ", "größer 🙂", "'", "=1+1"};
  const std::vector<double> numbers = {0.0,        -0.0, 5e-324, 1.7976931348623157e308, -0.1, 1e22, 2.0 / 3,
                                       1e15 + 0.3, 3,    4};
  DataTable table({"te\"xt", "number"});
  for (std::size_t i = 0; i < texts.size(); ++i) table.add({texts[i], numbers[i]});
  const auto records = records_of(table.csv());
  ASSERT_EQ(records.size(), texts.size() + 1);
  EXPECT_EQ(records[0][0], "te\"xt");
  for (std::size_t i = 0; i < texts.size(); ++i) {
    ASSERT_EQ(records[i + 1].size(), 2u);
    EXPECT_EQ(records[i + 1][0], texts[i]);
    EXPECT_EQ(std::strtod(records[i + 1][1].c_str(), nullptr), numbers[i]);
    EXPECT_EQ(nlohmann::json::parse(table.json().dump())[i]["number"], numbers[i]);
  }
  EXPECT_TRUE(std::signbit(std::strtod(records[2][1].c_str(), nullptr)));
}

TEST(DataTableTest, TextThatIsNoUTF8CanBeWrittenAsJSON) {
  DataTable table({"token"});
  table.add(
      {std::string("a\xff"
                   "b\r\x7f")});
  EXPECT_EQ(table.csv(), "token\na\\xffb\\x0d\\x7f\n");
  EXPECT_EQ(table.json().dump(), R"([{"token":"a\\xffb\\x0d\\x7f"}])");
}

TEST(DataTableTest, TextIsMadePrintable) {
  DataTable table({"token"});
  table.add({std::string("line\nand \x1b[31m")});
  EXPECT_THAT(table.csv(), Not(testing::HasSubstr("\x1b")));
  EXPECT_EQ(std::ranges::count(table.csv(), '\n'), 2) << "a row stays a line";
}

TEST(DataTableTest, ARowMustFit) {
  DataTable table({"x"});
  EXPECT_THROW(table.add({1.0, 2.0}), std::logic_error);
  EXPECT_FALSE(table.is_text(0)) << "nothing is known of an empty table";
  table.add({std::string("text")});
  EXPECT_TRUE(table.is_text(0));
}

}  // namespace
}  // namespace kvreplay
