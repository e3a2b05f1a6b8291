// Tables as files and as data of figures.
#include "notebooks-export/data_table.h"

#include <gmock/gmock.h>

#include <cmath>
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
