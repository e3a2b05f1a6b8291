#include "policy/plugin_interface.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "base/error.h"
#include "policy/matrix_head.h"
#include "support/places.h"

namespace kvreplay {
namespace {

std::filesystem::path plugin(const std::string& name) { return test::test_plugins() / (name + ".so"); }

// The error of loading a file, which must be a line that begins with the file's name.
std::string failure_of(const std::filesystem::path& path) {
  try {
    load_plugin(path);
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_TRUE(message.starts_with(path.string() + ": ")) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    return message.substr(path.string().size());
  }
  return "";
}

Matrix random_matrix(Index rows, Index columns, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  Matrix matrix(rows, columns);
  for (Index i = 0; i < matrix.size(); ++i) matrix.data()[i] = distribution(generator);
  return matrix;
}

TEST(Plugin, AddsMethodsLikeTheBuiltInOnes) {
  EXPECT_EQ(find_method("recency-attention"), nullptr);
  load_plugin(plugin("recency_attention"));
  load_plugin(plugin("recency_attention"));  // is left as it is
  ASSERT_NE(find_method("recency-attention"), nullptr);
  const Policy policy = make_policy("recency-attention(half_life=4,window=2)");
  EXPECT_EQ(policy.canonical, "recency-attention(window=2,half_life=4)");
  EXPECT_THROW(make_policy("recency-attention(window=0)"), UsageError);

  // Queries of zeros attend to all that they see alike: the last to 1/8 each, the one before it to 1/7 each.
  test::MatrixHead head(random_matrix(8, 4, 1), random_matrix(8, 4, 2));
  head.member_queries = {Matrix::Zero(8, 4)};
  const std::vector<float> scores = test::scores_of(*policy.ranking(), head);
  for (std::size_t n = 0; n < 7; ++n) {
    EXPECT_NEAR(scores[n], (1.0 / 8 + 1.0 / 7) / 2 * std::pow(0.5, static_cast<double>(7 - n) / 4), 1e-6) << n;
  }
}

// One of the two is compiled for another processor than the library, unless that is how both are.
TEST(Plugin, ExchangesMatricesWhateverProcessorItIsCompiledFor) {
  load_plugin(plugin("matrices"));
  load_plugin(plugin("matrices_native"));
  for (const char* spec : {"matrices", "matrices-native"}) {
    const Policy policy = make_policy(spec);
    for (const Index size : {1, 7, 16, 100}) {
      test::MatrixHead head(random_matrix(3 * size, size, 3), random_matrix(3 * size, size, 4));
      head.member_projections = {random_matrix(2 * size + 1, size, 5)};
      const std::vector<float> scores = test::scores_of(*policy.ranking(), head);
      for (Index n = 0; n < 3 * size; ++n) {
        const float length = (head.member_projections[0] * Head(head).values().row(n).transpose()).norm();
        ASSERT_NEAR(scores[static_cast<std::size_t>(n)], length, 1e-4f * (1 + length)) << spec << ", " << n;
      }
    }
  }
}

TEST(Plugin, SaysWhatIsWrongWithAFile) {
  const std::filesystem::path folder = testing::TempDir();
  EXPECT_NE(failure_of(folder / "absent.so").find("no such plug-in"), std::string::npos);
  EXPECT_NE(failure_of(folder).find("is a folder"), std::string::npos);
  const std::filesystem::path text = folder / "kvreplay-plugin-test.txt";
  std::ofstream(text) << "no shared library, however long this text may be made: it has no header of one. "
                      << std::string(1000, '.');
  EXPECT_NE(failure_of(text).find("cannot be loaded as a shared library"), std::string::npos);
  std::filesystem::remove(text);
  EXPECT_NE(failure_of(plugin("no_plugin")).find("one includes policy/plugin.h"), std::string::npos);
}

TEST(Plugin, WhatWasCompiledForAnotherKvreplayIsRefusedBeforeItRuns) {
  EXPECT_NE(
      failure_of(plugin("other_version"))
          .find("version " + std::to_string(kPolicyInterfaceVersion + 1) +
                " of the policy interface, and this kvreplay has version " + std::to_string(kPolicyInterfaceVersion)),
      std::string::npos);
  EXPECT_NE(failure_of(plugin("other_layout")).find("aligned to 16 bytes"), std::string::npos);
  EXPECT_NE(failure_of(plugin("missing_symbol")).find("kvreplay::method_of_a_later_version()"), std::string::npos);
}

TEST(Plugin, AddsAllOfItsMethodsOrNone) {
  const std::size_t before = registered_methods().size();
  EXPECT_NE(failure_of(plugin("taken_name")).find("there is a method 'snapkv' already"), std::string::npos);
  EXPECT_EQ(find_method("beside-snapkv"), nullptr);
  EXPECT_NE(failure_of(plugin("illegal_name")).find("'two words' cannot be a method's name"), std::string::npos);
  EXPECT_NE(failure_of(plugin("throws")).find("the table of weights\\nis missing"), std::string::npos);
  EXPECT_EQ(registered_methods().size(), before);
}

}  // namespace
}  // namespace kvreplay
