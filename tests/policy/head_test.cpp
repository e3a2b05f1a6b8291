// What a head tells policies, against its definitions in double precision.
#include "policy/head.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>

#include "base/error.h"
#include "policy/matrix_head.h"
#include "policy/projection.h"
#include "policy/smoothing.h"

namespace kvreplay {
namespace {

using Distance = WindowCombination::Distance;
using DoubleMatrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using test::MatrixHead;
using test::normal;

struct Layout {
  int prompt = 60;
  int group = 1;
  int head_dim = 8;
  int hidden_size = 24;  // 0: no output projection
  int sliding_window = 0;
  double softcapping = 0;
  int chunk = 0;
  std::vector<float> sinks = {};  // of the group
};

MatrixHead random_head(const Layout& layout, unsigned seed) {
  MatrixHead head(normal(layout.prompt, layout.head_dim, seed, 1.5f), normal(layout.prompt, layout.head_dim, seed + 1),
                  layout.group);
  head.attend_with({.softmax_scale = 1 / std::sqrt(layout.head_dim),
                    .attn_logit_softcapping = layout.softcapping,
                    .sliding_window = layout.sliding_window,
                    .attention_chunk_size = layout.chunk,
                    .sinks = layout.sinks});
  for (int member = 0; member < layout.group; ++member) {
    const auto own = seed + 10 + 2 * static_cast<unsigned>(member);
    head.member_queries.push_back(normal(layout.prompt, layout.head_dim, own, 1.5f));
    if (layout.hidden_size > 0) {
      head.member_projections.push_back(normal(layout.hidden_size, layout.head_dim, own + 1, 0.3f));
    }
  }
  return head;
}

// The definitions, of the rows that are held.
struct Reference {
  Eigen::VectorXd attention;  // [R]
  Eigen::VectorXd distance;   // [rows that o runs over]
  Eigen::VectorXd rounding;   // what float32 may make of it where the outputs are large and it is small
  double output_length = 0;
};

Eigen::VectorXd attention_of(const MatrixHead& source, const DoubleMatrix& keys, int member, Index position) {
  const HeadShape& shape = source.shape();
  Eigen::VectorXd weights =
      keys * source.member_queries[static_cast<std::size_t>(member)].row(position).cast<double>().transpose() *
      shape.rule.softmax_scale;
  const double cap = shape.rule.attn_logit_softcapping;
  if (cap > 0) weights = (weights.array() / cap).tanh() * cap;
  for (Index n = 0; n < weights.size(); ++n) {
    const Index chunk = shape.rule.attention_chunk_size;
    const bool hidden = n > position || (shape.rule.sliding_window > 0 && n <= position - shape.rule.sliding_window) ||
                        (chunk > 0 && n / chunk != position / chunk);
    if (hidden) weights(n) = -std::numeric_limits<double>::infinity();
  }
  const double largest = weights.maxCoeff();
  weights = (weights.array() - largest).exp();
  double sum = weights.sum();
  if (!shape.rule.sinks.empty()) {
    sum += std::exp(static_cast<double>(shape.rule.sinks[static_cast<std::size_t>(member)]) - largest);
  }
  return weights / sum;
}

Reference reference_for(const MatrixHead& source, int member, const WindowCombination& combination) {
  const HeadShape& shape = source.shape();
  const Index prompt = shape.prompt_length;
  const auto window = static_cast<Index>(combination.weights.size());
  Matrix floats(prompt, shape.head_dim);
  source.read_keys(0, prompt, floats.data());
  const DoubleMatrix keys = floats.cast<double>();
  source.read_values(0, prompt, floats.data());
  const DoubleMatrix values = floats.cast<double>();
  Reference reference;
  reference.attention = Eigen::VectorXd::Zero(prompt);
  for (Index i = 0; i < window; ++i) {
    reference.attention += static_cast<double>(combination.weights[static_cast<std::size_t>(i)]) *
                           attention_of(source, keys, member, prompt - window + i);
  }
  const Eigen::VectorXd of_all = reference.attention;
  const Index first = shape.positions[0];
  reference.attention = of_all.tail(prompt - first);
  if (combination.distance == Distance::none) return reference;
  const Index end = combination.whole_cache ? prompt : prompt - window;
  const Eigen::RowVectorXd output = of_all.head(end).transpose() * values.topRows(end);
  DoubleMatrix projection = DoubleMatrix::Identity(shape.head_dim, shape.head_dim);
  if (combination.distance == Distance::projected && source.has_output_projection()) {
    projection = source.member_projections[static_cast<std::size_t>(member)].cast<double>();
  }
  reference.output_length = (projection * output.transpose()).norm();
  reference.distance.resize(std::max<Index>(0, end - first));
  reference.rounding.resize(reference.distance.size());
  for (Index n = 0; n < reference.distance.size(); ++n) {
    const Eigen::RowVectorXd value = values.row(first + n);
    reference.distance(n) = (projection * (output - value).transpose()).norm();
    reference.rounding(n) = 1e-6 * projection.norm() * (output.norm() + value.norm());
  }
  return reference;
}

// Where attention is 0 it is exactly that; what is left of it after float32 must be relatively exact.
void expect_agreement(const CombinedAttention& found, const Reference& reference) {
  ASSERT_EQ(found.attention.size(), static_cast<std::size_t>(reference.attention.size()));
  for (std::size_t n = 0; n < found.attention.size(); ++n) {
    const double expected = reference.attention(static_cast<Index>(n));
    ASSERT_NEAR(found.attention[n], expected, 3e-5 * std::abs(expected) + 1e-37) << "attention of position " << n;
  }
  ASSERT_EQ(found.distance.size(), static_cast<std::size_t>(reference.distance.size()));
  for (std::size_t n = 0; n < found.distance.size(); ++n) {
    const double expected = reference.distance(static_cast<Index>(n));
    const double rounding = reference.rounding(static_cast<Index>(n));
    ASSERT_NEAR(found.distance[n], expected, 1e-4 * expected + rounding) << "distance of position " << n;
  }
  ASSERT_NEAR(found.output_length, reference.output_length,
              1e-5 * reference.output_length + (found.distance.empty() ? 0 : reference.rounding.maxCoeff()));
}

std::vector<WindowCombination> combinations_for(const std::vector<int>& windows) {
  std::vector<WindowCombination> all;
  for (const int window : windows) {
    for (const Temporal temporal : {Temporal::mean, Temporal::ema}) {
      const std::vector<float> weights = temporal_weights(temporal, 0.3, window);
      all.push_back({.weights = weights});
      for (const Distance distance : {Distance::values, Distance::projected}) {
        for (const bool whole : {false, true}) {
          all.push_back({.weights = weights, .distance = distance, .whole_cache = whole});
        }
      }
    }
  }
  return all;
}

std::string text_of(const WindowCombination& c) {
  return fmt::format("window {}, first weight {}, distance {}{}", c.weights.size(), c.weights.front(),
                     static_cast<int>(c.distance), c.whole_cache ? ", whole prompt" : "");
}

void expect_all_agree(const MatrixHead& source, const std::vector<int>& windows) {
  const Head head(source);
  for (const WindowCombination& combination : combinations_for(windows)) {
    for (int member = 0; member < source.shape().group_size; ++member) {
      SCOPED_TRACE(fmt::format("{}, member {}", text_of(combination), member));
      expect_agreement(head.combined_attention(member, combination), reference_for(source, member, combination));
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

class CombinedAttentionOf : public testing::TestWithParam<Layout> {};

TEST_P(CombinedAttentionOf, FollowsItsDefinition) {
  const Layout& layout = GetParam();
  std::vector<int> windows;
  for (const int window : {1, 2, 16, 33}) {
    if (window <= layout.prompt) windows.push_back(window);
  }
  // Many queries of many dimensions take the reference long.
  if (layout.prompt > 500 && layout.group > 1) windows = {2, 33};
  expect_all_agree(random_head(layout, 1), windows);
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, CombinedAttentionOf,
    testing::Values(
        Layout{}, Layout{.prompt = 1}, Layout{.prompt = 2, .group = 4}, Layout{.prompt = 33}, Layout{.prompt = 64},
        Layout{.prompt = 65, .group = 8, .head_dim = 20}, Layout{.prompt = 100, .head_dim = 1, .hidden_size = 3},
        Layout{.prompt = 200, .group = 4, .head_dim = 48, .hidden_size = 100},
        Layout{.prompt = 130, .group = 2, .head_dim = 128, .hidden_size = 600}, Layout{.prompt = 511},
        Layout{.prompt = 512, .group = 4, .head_dim = 20}, Layout{.prompt = 513, .head_dim = 48},
        Layout{.prompt = 544, .head_dim = 7}, Layout{.prompt = 1023}, Layout{.prompt = 1024, .group = 8, .head_dim = 8},
        Layout{.prompt = 1025, .head_dim = 20}, Layout{.prompt = 1058}, Layout{.prompt = 513, .hidden_size = 0},
        Layout{.prompt = 60, .sliding_window = 1}, Layout{.prompt = 600, .sliding_window = 20},
        Layout{.prompt = 1030, .group = 4, .sliding_window = 515}, Layout{.prompt = 60, .softcapping = 2},
        Layout{.prompt = 2100, .group = 2, .sliding_window = 70}, Layout{.prompt = 512, .sliding_window = 513},
        Layout{.prompt = 1024, .sliding_window = 1},
        Layout{.prompt = 600, .head_dim = 48, .sliding_window = 64, .softcapping = 30},
        Layout{.prompt = 600, .chunk = 256}, Layout{.prompt = 1030, .group = 2, .chunk = 515},
        Layout{.prompt = 2100, .sliding_window = 70, .chunk = 512}, Layout{.prompt = 600, .group = 2, .sinks = {1, -3}},
        Layout{.prompt = 1030, .group = 2, .sliding_window = 90, .sinks = {30, 0}}),
    [](const auto& tested) {
      const Layout& l = tested.param;
      return fmt::format("prompt_{}_group_{}_dim_{}_hidden_{}_window_{}_cap_{}_chunk_{}{}", l.prompt, l.group,
                         l.head_dim, l.hidden_size, l.sliding_window, static_cast<int>(l.softcapping), l.chunk,
                         l.sinks.empty() ? "" : "_sinks");
    });

// More values than the head keeps between its two passes over them.
TEST(Head, ValuesThatAreReadTwiceGiveTheSame) {
  const Layout layout{.prompt = 140000, .head_dim = 16, .hidden_size = 8};
  ASSERT_GT(Index{layout.prompt} * layout.head_dim * 4, Index{8} << 20);
  const MatrixHead source = random_head(layout, 2);
  const WindowCombination combination{.weights = {0.25f, 0.75f}, .distance = Distance::values};
  expect_agreement(Head(source).combined_attention(0, combination), reference_for(source, 0, combination));
}

// Values that differ by 1e-4 of their size, one of which has nearly all of the attention.
MatrixHead head_of_alike_values(int head_dim, float sink_logit) {
  const int prompt = 600;
  const Layout layout{.prompt = prompt, .group = 2, .head_dim = head_dim, .hidden_size = 2 * head_dim};
  const MatrixHead random = random_head(layout, 3);
  Matrix keys(prompt, head_dim);
  random.read_keys(0, prompt, keys.data());
  const Matrix common = normal(1, head_dim, 77);
  Matrix values = normal(prompt, head_dim, 78, 1e-4f).array().rowwise() * common.row(0).array();
  values.rowwise() += common.row(0);
  std::vector<Matrix> queries = random.member_queries;
  // The sink's key points where all queries do.
  keys.row(0).setZero();
  keys(0, 0) = sink_logit * static_cast<float>(std::sqrt(head_dim));
  for (Matrix& q : queries) q.col(0).setOnes();
  MatrixHead head(keys, values, 2);
  head.attend_with(1 / std::sqrt(head_dim));
  head.member_queries = queries;
  head.member_projections = random.member_projections;
  return head;
}

TEST(Head, DistancesBetweenAlikeValuesAreExactUpToTheRoundingOfTheOutput) {
  for (const int head_dim : {8, 128}) {
    for (const float sink_logit : {0.0f, 20.0f}) {
      const MatrixHead source = head_of_alike_values(head_dim, sink_logit);
      const Head head(source);
      for (const WindowCombination& combination : combinations_for({2, 16})) {
        SCOPED_TRACE(fmt::format("{}, head dimension {}, sink {}", text_of(combination), head_dim, sink_logit));
        const Reference reference = reference_for(source, 1, combination);
        if (sink_logit > 0) {
          ASSERT_GT(reference.attention(0), 0.999 * reference.attention.sum());
        }
        expect_agreement(head.combined_attention(1, combination), reference);
      }
    }
  }
}

void expect_distances_through(const Matrix& projection, const std::string& what) {
  SCOPED_TRACE(what);
  MatrixHead source = random_head({.prompt = 200, .head_dim = static_cast<int>(projection.cols())}, 5);
  source.member_projections = {projection};
  const Head head(source);
  for (const bool whole : {false, true}) {
    const WindowCombination combination{
        .weights = temporal_weights(Temporal::mean, 0, 8), .distance = Distance::projected, .whole_cache = whole};
    expect_agreement(head.combined_attention(0, combination), reference_for(source, 0, combination));
  }
}

// The same row times 1 … rows.
Matrix multiples_of_a_row(Index rows, Index cols) {
  Matrix matrix(rows, cols);
  for (Index i = 0; i < rows; ++i) matrix.row(i) = static_cast<float>(i + 1) * normal(1, cols, 9).row(0);
  return matrix;
}

// Independent columns, but for the second half, which repeats the first.
Matrix repeated_columns(Index rows, Index cols) {
  Matrix matrix = normal(rows, cols, 8);
  matrix.rightCols(cols / 2) = matrix.leftCols(cols / 2);
  return matrix;
}

TEST(Head, DistancesThroughProjectionsThatLoseDirections) {
  for (const Index head_dim : {8, 20, 48}) {
    expect_distances_through(normal(head_dim / 2, head_dim, 7), "fewer rows than dimensions");
    expect_distances_through(normal(1, head_dim, 7), "one row");
    expect_distances_through(repeated_columns(600, head_dim), "every column twice");
    expect_distances_through(multiples_of_a_row(5, head_dim), "multiples of one row");
    expect_distances_through(Matrix::Zero(30, head_dim), "zeros");
    Matrix dead = normal(40, head_dim, 10);
    dead.col(head_dim / 3).setZero();
    expect_distances_through(dead, "a dimension without weight");
  }
}

DoubleMatrix gram_of(const Matrix& weight) {
  const DoubleMatrix exact = weight.cast<double>();
  return exact.transpose() * exact;
}

TEST(Projection, TheFactorHasTheLengthsOfTheMatrix) {
  for (const Index head_dim : {1, 8, 20, 48, 128}) {
    for (const Matrix& weight :
         {normal(head_dim, head_dim, 11), normal(700, head_dim, 12), normal(1024, head_dim, 13, 0.01f),
          normal(std::max<Index>(1, head_dim / 2), head_dim, 14), repeated_columns(600, head_dim),
          multiples_of_a_row(5, head_dim), Matrix(Matrix::Zero(30, head_dim))}) {
      SCOPED_TRACE(fmt::format("{} × {}", weight.rows(), head_dim));
      const Matrix factor = projection_factor_of(weight);
      ASSERT_EQ(factor.rows(), head_dim);
      ASSERT_EQ(factor.cols(), factor_width(head_dim));
      const DoubleMatrix gram = gram_of(weight);
      const DoubleMatrix found = gram_of(factor.leftCols(head_dim));
      EXPECT_LE((found - gram).cwiseAbs().maxCoeff(), 1e-5 * gram.diagonal().maxCoeff());
      for (Index i = 0; i < factor.rows(); ++i) {
        for (Index j = 0; j < factor.cols(); ++j) {
          const bool stored = j >= i && j < head_dim;
          ASSERT_TRUE(stored || factor(i, j) == 0) << i << ", " << j;
        }
      }
    }
  }
}

TEST(Projection, DirectionsThatTheMatrixLosesAreRowsOfRoundingAtMost) {
  for (const Index head_dim : {8, 20, 48, 128}) {
    for (const Index rank : {Index{1}, head_dim / 4, head_dim / 2, head_dim - 1}) {
      for (const unsigned seed : {1U, 2U, 3U}) {
        const Matrix factor = projection_factor_of(normal(rank, head_dim, 20 + seed));
        const auto rows = (factor.rowwise().norm().array() > 1e-2f * factor.norm()).count();
        EXPECT_LE(rows, rank) << head_dim << " dimensions, seed " << seed;
      }
    }
  }
}

std::vector<std::uint32_t> bits_of(std::span<const float> values) {
  std::vector<std::uint32_t> bits(values.size());
  std::ranges::transform(values, bits.begin(), [](float value) { return std::bit_cast<std::uint32_t>(value); });
  return bits;
}

// All bits of an answer.
std::vector<std::uint32_t> bits_of(const CombinedAttention& answer) {
  std::vector<std::uint32_t> bits = bits_of(answer.attention);
  std::ranges::copy(bits_of(answer.distance), std::back_inserter(bits));
  bits.push_back(std::bit_cast<std::uint32_t>(answer.output_length));
  return bits;
}

TEST(Head, ACombinationIsTheSameBitsInAnyCompany) {
  for (const int prompt : {60, 600}) {
    const MatrixHead source = random_head({.prompt = prompt, .group = 3, .head_dim = 20}, 30);
    std::vector<WindowCombination> all = combinations_for({1, 4, 9, 16, 33});
    std::vector<std::vector<std::uint32_t>> alone;
    for (const WindowCombination& combination : all) {
      const Head head(source);
      for (int member = 0; member < 3; ++member) alone.push_back(bits_of(head.combined_attention(member, combination)));
    }
    const auto expect_same = [&](const Head& head, std::size_t i) {
      for (int member = 0; member < 3; ++member) {
        ASSERT_EQ(bits_of(head.combined_attention(member, all[i])), alone[3 * i + static_cast<std::size_t>(member)])
            << text_of(all[i]) << ", member " << member;
      }
    };
    const Head together(source);
    together.prepare(all);
    for (std::size_t i = 0; i < all.size(); ++i) expect_same(together, i);

    std::mt19937 generator(5);
    std::vector<std::size_t> order(all.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (const Index kept_bytes : {Index{0}, Index{1}, Index{100000}, Index{1} << 28}) {
      SCOPED_TRACE(kept_bytes);
      std::ranges::shuffle(order, generator);
      const Head head(source, kept_bytes);
      // Some are prepared together, some asked for before they are.
      std::vector<WindowCombination> some;
      for (std::size_t i = 0; i < order.size(); i += 3) some.push_back(all[order[i]]);
      expect_same(head, order[1]);
      head.prepare(some);
      for (const std::size_t i : order) expect_same(head, i);
      head.prepare(all);
      for (const std::size_t i : order) expect_same(head, i);
    }
  }
}

TEST(Head, AnAnswerOutlivesWhatTheHeadKeeps) {
  const MatrixHead source = random_head({.prompt = 100}, 31);
  CombinedAttention answer;
  std::vector<std::uint32_t> before;
  {
    const Head head(source, 1);
    answer = head.combined_attention(0, {.weights = {1}, .distance = Distance::values});
    before = bits_of(answer);
    for (const WindowCombination& other : combinations_for({2, 8})) head.combined_attention(0, other);
  }
  EXPECT_EQ(bits_of(answer), before);
}

TEST(Head, ALargerWindowAfterASmallerChangesNothing) {
  const MatrixHead source = random_head({.prompt = 520, .group = 2}, 32);
  const Head head(source);
  const WindowCombination small{.weights = temporal_weights(Temporal::ema, 0.2, 4), .distance = Distance::projected};
  const WindowCombination large{.weights = temporal_weights(Temporal::ema, 0.2, 33), .distance = Distance::projected};
  const std::span<const float> newest = head.attention(1, 0);
  const std::vector<std::uint32_t> newest_bits = bits_of(newest);
  const std::vector<std::uint32_t> small_bits = bits_of(head.combined_attention(1, small));
  expect_agreement(head.combined_attention(1, large), reference_for(source, 1, large));
  EXPECT_EQ(bits_of(newest), newest_bits) << "a row that was handed out stays";
  EXPECT_EQ(bits_of(head.attention(1, 0)), newest_bits);
  EXPECT_EQ(bits_of(head.combined_attention(1, small)), small_bits);
  const Head other(source);
  other.combined_attention(0, large);
  EXPECT_EQ(bits_of(other.attention(1, 0)), newest_bits);
  EXPECT_EQ(bits_of(other.combined_attention(1, small)), small_bits);
}

TEST(Head, AttentionOfEveryQueryFollowsItsDefinition) {
  const Layout layout{.prompt = 515, .group = 2, .sliding_window = 300};
  const MatrixHead source = random_head(layout, 33);
  Matrix keys(layout.prompt, layout.head_dim);
  source.read_keys(0, layout.prompt, keys.data());
  const Head head(source);
  // The window has dropped all that the oldest of these queries saw.
  for (const int age : {0, 1, 3, 100, 400, 514}) {
    for (int member = 0; member < 2; ++member) {
      const std::span<const float> found = head.attention(member, age);
      const Eigen::VectorXd expected =
          attention_of(source, keys.cast<double>(), member, layout.prompt - 1 - age).tail(299);
      ASSERT_EQ(found.size(), 299u);
      for (std::size_t n = 0; n < found.size(); ++n) {
        const double value = expected(static_cast<Index>(n));
        ASSERT_NEAR(found[n], value, 1e-5 * value + 1e-37) << "age " << age << ", position " << n;
      }
    }
  }
}

// What a head of some rows is to tell, from the whole cache's logits and nothing but plain arithmetic.
TEST(EvictedHead, QueriesAttendToTheRowsThatAreLeft) {
  const Index prompt = 700;
  const MatrixHead whole = random_head({.prompt = prompt, .group = 2}, 51);
  std::vector<int> rows;
  for (int n = 0; n < prompt; ++n) {
    if (n % 3 != 1 && !(n > 200 && n < 330)) rows.push_back(n);
  }
  const EvictedHead source(whole, rows);
  const Head head(source);
  ASSERT_EQ(head.rows(), static_cast<int>(rows.size()));
  Matrix floats(prompt, whole.shape().head_dim);
  whole.read_keys(0, prompt, floats.data());
  const DoubleMatrix keys = floats.cast<double>();
  whole.read_values(0, prompt, floats.data());
  const DoubleMatrix values = floats.cast<double>();
  const std::vector<float> weights = temporal_weights(Temporal::ema, 0.3, 20);
  for (int member = 0; member < 2; ++member) {
    Eigen::VectorXd combined = Eigen::VectorXd::Zero(head.rows());
    for (int age = 0; age < 20; ++age) {
      // Attention over the whole cache, of which the rows are left and sum to 1 again.
      const Eigen::VectorXd all = attention_of(whole, keys, member, prompt - 1 - age);
      Eigen::VectorXd left(head.rows());
      for (std::size_t n = 0; n < rows.size(); ++n) left(static_cast<Index>(n)) = all(rows[n]);
      left /= left.sum();
      combined += static_cast<double>(weights[static_cast<std::size_t>(19 - age)]) * left;
      const std::span<const float> told = head.attention(member, age);
      for (std::size_t n = 0; n < rows.size(); ++n) {
        ASSERT_NEAR(told[n], left(static_cast<Index>(n)), 1e-6) << "age " << age << ", row " << n;
      }
    }
    const CombinedAttention window =
        head.combined_attention(member, {.weights = weights, .distance = Distance::projected});
    // Rows of the window's 20 positions are told no distance of, however many of them are left.
    const auto before =
        static_cast<Index>(std::ranges::lower_bound(rows, static_cast<int>(prompt) - 20) - rows.begin());
    ASSERT_EQ(static_cast<Index>(window.distance.size()), before);
    Eigen::RowVectorXd output = Eigen::RowVectorXd::Zero(values.cols());
    for (Index n = 0; n < before; ++n) output += combined(n) * values.row(rows[static_cast<std::size_t>(n)]);
    const DoubleMatrix projection = whole.member_projections[static_cast<std::size_t>(member)].cast<double>();
    for (Index n = 0; n < before; ++n) {
      ASSERT_NEAR(window.attention[static_cast<std::size_t>(n)], combined(n), 1e-6);
      const double distance =
          (projection * (output - values.row(rows[static_cast<std::size_t>(n)])).transpose()).norm();
      ASSERT_NEAR(window.distance[static_cast<std::size_t>(n)], distance, 1e-4 * (1 + distance));
    }
  }
}

TEST(EvictedHead, EveryQueryAddsUpOverWhatIsLeft) {
  const MatrixHead whole = random_head({.prompt = 90, .sliding_window = 40}, 52);
  std::vector<int> rows;  // of those that the sliding window still holds
  for (int n = 0; n < whole.shape().rows(); n += 2) rows.push_back(n);
  const EvictedHead source(whole, rows);
  const Head head(source);
  std::vector<double> sums(rows.size(), 0.0);
  for (int age = 0; age < 90; ++age) {
    const std::span<const float> attention = head.attention(0, age);
    for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(attention[n]);
  }
  const std::vector<float>& told = head.accumulated_attention(0);
  ASSERT_EQ(told.size(), sums.size());
  for (std::size_t n = 0; n < sums.size(); ++n) EXPECT_NEAR(told[n], sums[n], 1e-5) << n;
}

TEST(EvictedHead, AllRowsAreTheHeadItself) {
  const MatrixHead whole = random_head({.prompt = 530, .group = 2}, 53);
  std::vector<int> rows(530);
  std::iota(rows.begin(), rows.end(), 0);
  const EvictedHead source(whole, rows);
  for (const std::string spec : {"restkv", "snapkv(pooling=max)", "h2o(mask=window)", "tova", "keydiff", "random"}) {
    EXPECT_EQ(test::scores_of(spec, source, 1), test::scores_of(spec, whole, 1)) << spec;
  }
}

TEST(EvictedHead, ASecondEvictionKeepsRowsByTheirPositions) {
  const MatrixHead whole = random_head({.prompt = 100}, 54);
  // As streamingllm at 40 leaves them, but for the second sink.
  std::vector<int> rows = {0, 2, 3};
  for (int n = 64; n < 100; ++n) rows.push_back(n);
  const EvictedHead source(whole, rows);
  const HeadShape& shape = source.shape();
  const auto positions_kept = [&](const std::string& spec, int capacity) {
    std::vector<int> positions;
    for (const int row : make_policy(spec).draw(shape, 0, capacity)) {
      positions.push_back(shape.positions[row]);
    }
    return positions;
  };
  EXPECT_EQ(positions_kept("streamingllm", 6), (std::vector<int>{0, 2, 3, 97, 98, 99}));
  EXPECT_EQ(positions_kept("recent", 3), (std::vector<int>{97, 98, 99}));
  // Four sinks are asked for and three are left; of the window all are.
  EXPECT_EQ((Protection{.sinks = 4, .window = 32}.held_by(shape).sinks), 3);
  EXPECT_EQ((Protection{.sinks = 4, .window = 40}.held_by(shape).window), 36);
  // The drawn score of a position does not depend on its row.
  const std::vector<float> all = test::scores_of("random", whole);
  const std::vector<float> left = test::scores_of("random", source);
  for (std::size_t n = 0; n < rows.size(); ++n) EXPECT_EQ(left[n], all[static_cast<std::size_t>(rows[n])]);
}

// The newest positions are gone: early queries of the window see no row that is left.
TEST(EvictedHead, AQueryThatSeesNothingPaysNothing) {
  const MatrixHead whole = random_head({.prompt = 40}, 55);
  const EvictedHead source(whole, {36, 38});
  const Head head(source);
  EXPECT_EQ(std::vector<float>(head.attention(0, 5).begin(), head.attention(0, 5).end()), (std::vector<float>{0, 0}));
  EXPECT_EQ(std::vector<float>(head.attention(0, 3).begin(), head.attention(0, 3).end()), (std::vector<float>{1, 0}));
  for (const float sum : head.accumulated_attention(0)) EXPECT_TRUE(std::isfinite(sum));
}

TEST(Head, AnswersOfOneMethodAreComputedOnce) {
  struct Question {
    int number;
    auto operator<=>(const Question&) const = default;
  };
  const MatrixHead source = random_head({.prompt = 20}, 56);
  const Head head(source);
  int computed = 0;
  const auto ask = [&](int number) { return head.once(Question{number}, [&] { return ++computed; }); };
  EXPECT_EQ(ask(7), 1);
  EXPECT_EQ(ask(8), 2);
  EXPECT_EQ(ask(7), 1);
}

TEST(CachePositions, NeighboursAndAnyOthersAnswerAlike) {
  const CachePositions neighbours(3, 4);
  const CachePositions any(std::vector<int>{3, 4, 5, 6});
  EXPECT_EQ(neighbours, any);
  for (int position = 0; position < 10; ++position) {
    EXPECT_EQ(neighbours.count_before(position), any.count_before(position)) << position;
  }
  EXPECT_EQ(CachePositions(std::vector<int>{1, 5, 9}).count_before(6), 2);
  EXPECT_NE(CachePositions(std::vector<int>{1, 5, 9}), CachePositions(1, 3));
}

// Of whose queries only the last were captured, and the ones before a gap.
class Gap : public MatrixHead {
 public:
  Gap() : MatrixHead(normal(40, 8, 35), normal(40, 8, 36)) {
    member_queries.push_back(normal(static_cast<Index>(at_hand_.size()), 8, 37));
  }
  std::span<const int> query_positions() const override { return at_hand_; }

 private:
  std::vector<int> at_hand_ = {3, 4, 36, 37, 38, 39};
};

TEST(Head, WhatWasNotCapturedIsNamed) {
  const Gap source;
  const Head head(source);
  EXPECT_EQ(contiguous_window(source.query_positions(), 40), 4);
  EXPECT_NO_THROW(head.combined_attention(0, {.weights = {1, 1, 1, 1}}));
  EXPECT_NO_THROW(head.attention(0, 3));
  const auto expect_error = [](const auto& action, int position, int window) {
    try {
      action();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()),
                fmt::format("the attention of prompt position {} is needed, but of the queries before position 40 only "
                            "the last 4 were captured; capture with --queries window:{} or more",
                            position, window));
    }
  };
  const std::vector<WindowCombination> larger = {{.weights = {1}}, {.weights = std::vector<float>(5, 1.0f)}};
  expect_error([&] { head.prepare(larger); }, 35, 5);
  expect_error([&] { head.combined_attention(0, larger[1]); }, 35, 5);
  expect_error([&] { head.attention(0, 9); }, 30, 10);
  std::vector<float> attention(40);
  expect_error([&] { head.copy_attention(0, 4, attention); }, 35, 5);
  EXPECT_EQ(head.queries(0, 4), source.queries(0, 2, 4));
  EXPECT_THROW(head.queries(0, 5), Error);
  // And it is still of use.
  EXPECT_NO_THROW(head.combined_attention(0, larger[0]));
}

}  // namespace
}  // namespace kvreplay
