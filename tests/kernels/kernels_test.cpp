// The inner loops against their definitions in double precision, on every instruction set of this processor.
#include "kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "support/every_processor.h"

namespace kvreplay::kernels {
namespace {

using test::EveryProcessor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Index kDepths[] = {1, 7, 8, 20, 48, 128, 200};

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<float> normal(Index count, unsigned seed, float scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> values(at(count));
  for (float& value : values) value = draw(generator);
  return values;
}

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits(values.size());
  std::ranges::transform(values, bits.begin(), [](float value) { return std::bit_cast<std::uint32_t>(value); });
  return bits;
}

double times(float a, float b) { return static_cast<double>(a) * static_cast<double>(b); }

// What a sum of `terms` products whose absolute values sum to `size` may be off in float32.
double rounding(Index terms, double size) {
  return (static_cast<double>(terms) + 2) * static_cast<double>(std::numeric_limits<float>::epsilon()) * size + 1e-30;
}

TEST(Kernels, TheBestInstructionSetIsBackAfterATest) {
  const std::string best = instruction_set();
  std::set<std::string> names;
  EveryProcessor().for_each([&] { names.insert(instruction_set()); });
  EXPECT_TRUE(names.contains(best));
  EXPECT_EQ(instruction_set(), best);
}

struct Product {
  std::vector<float> a;
  Index a_row;
  Index a_step;
  std::vector<float> b;
  Index b_row;
};

void expect_product(const Product& p, Index rows, Index columns, Index depth, bool accumulate) {
  constexpr float kOutside = -77;
  const Index c_row = columns + 3;
  const std::vector<float> before = normal(rows * c_row, 5);
  std::vector<float> c = before;
  for (Index i = 0; i < rows; ++i) {
    for (Index j = columns; j < c_row; ++j) c[at(i * c_row + j)] = kOutside;
  }
  multiply(rows, columns, depth, p.a.data(), p.a_row, p.a_step, p.b.data(), p.b_row, c.data(), c_row, accumulate);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) {
      double sum = accumulate ? static_cast<double>(before[at(i * c_row + j)]) : 0;
      double size = std::abs(sum);
      for (Index k = 0; k < depth; ++k) {
        const double term = times(p.a[at(i * p.a_row + k * p.a_step)], p.b[at(k * p.b_row + j)]);
        sum += term;
        size += std::abs(term);
      }
      ASSERT_NEAR(c[at(i * c_row + j)], sum, rounding(depth, size)) << "row " << i << ", column " << j;
    }
    for (Index j = columns; j < c_row; ++j) ASSERT_EQ(c[at(i * c_row + j)], kOutside) << "beyond the columns";
  }
}

TEST(Multiply, FollowsItsDefinitionForAnyShape) {
  EveryProcessor().for_each([] {
    for (const Index depth : kDepths) {
      for (Index rows = 1; rows <= 13; ++rows) {
        for (const Index columns : {16, 32, 48, 64, 80, 144}) {
          SCOPED_TRACE(testing::Message() << rows << " × " << columns << " × " << depth);
          const std::vector<float> b = normal(depth * (columns + 5), 2);
          // Rows as they lie, and columns of a matrix that lies the other way round.
          const Product along{normal(rows * (depth + 2), 1), depth + 2, 1, b, columns + 5};
          const Product across{normal(depth * (rows + 3), 1), 1, rows + 3, b, columns + 5};
          const bool accumulate = (rows + depth) % 2 == 0;
          expect_product(along, rows, columns, depth, accumulate);
          expect_product(across, rows, columns, depth, !accumulate);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST(Multiply, FollowsItsDefinitionBeyondWhatItTakesAtATime) {
  EveryProcessor().for_each([] {
    // Rows and depths around the pieces that stay in the caches, and right operands that lie apart.
    for (const Index depth : {127, 128, 513, 1100}) {
      for (const Index rows : {47, 48, 120, 121, 250}) {
        for (const Index columns : {16, 304, 560}) {
          SCOPED_TRACE(testing::Message() << rows << " × " << columns << " × " << depth);
          const Index b_row = columns + (rows % 2 == 0 ? 0 : 16);
          const Product product{normal(rows * depth, 1), depth, 1, normal(depth * b_row, 2), b_row};
          expect_product(product, rows, columns, depth, rows % 3 == 0);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST(AddProduct, AddsASumThatWasMadeOnItsOwn) {
  EveryProcessor().for_each([] {
    for (const Index rows : {1, 2, 6, 13, 48, 130}) {
      for (const Index columns : {16, 48, 64, 144, 304}) {
        for (const Index depth : {1, 64, 300, 1100}) {
          SCOPED_TRACE(testing::Message() << rows << " × " << columns << " × " << depth);
          const std::vector<float> a = normal(rows * depth, 1);
          const std::vector<float> b = normal(depth * columns, 2);
          const std::vector<float> before = normal(rows * columns, 3, 100);
          std::vector<float> product(before.size());
          multiply(rows, columns, depth, a.data(), depth, 1, b.data(), columns, product.data(), columns);
          std::vector<float> expected = before;
          std::ranges::transform(before, product, expected.begin(), std::plus());
          std::vector<float> sums = before;
          add_product(rows, columns, depth, a.data(), depth, 1, b.data(), columns, sums.data(), columns);
          ASSERT_EQ(bits_of(sums), bits_of(expected));
        }
      }
    }
  });
}

TEST(Multiply, AnElementIsTheSameBitsInAnyCompany) {
  EveryProcessor().for_each([] {
    constexpr Index kRowsOfAll = 53;
    constexpr Index kColumnsOfAll = 144;
    constexpr Index kDepth = 300;
    const std::vector<float> a = normal(kRowsOfAll * kDepth, 3);
    const std::vector<float> b = normal(kDepth * kColumnsOfAll, 4);
    std::vector<float> all(at(kRowsOfAll * kColumnsOfAll));
    multiply(kRowsOfAll, kColumnsOfAll, kDepth, a.data(), kDepth, 1, b.data(), kColumnsOfAll, all.data(),
             kColumnsOfAll);
    for (Index first_row = 0; first_row < kRowsOfAll; first_row += 5) {
      for (Index rows = 1; rows <= kRowsOfAll - first_row; rows += 13) {
        for (Index first = 0; first < kColumnsOfAll; first += kLanes) {
          for (Index columns = kLanes; columns <= kColumnsOfAll - first; columns += 2 * kLanes) {
            std::vector<float> part(at(rows * columns));
            multiply(rows, columns, kDepth, a.data() + first_row * kDepth, kDepth, 1, b.data() + first, kColumnsOfAll,
                     part.data(), columns);
            for (Index i = 0; i < rows; ++i) {
              for (Index j = 0; j < columns; ++j) {
                ASSERT_EQ(std::bit_cast<std::uint32_t>(part[at(i * columns + j)]),
                          std::bit_cast<std::uint32_t>(all[at((first_row + i) * kColumnsOfAll + first + j)]));
              }
            }
          }
        }
      }
    }
  });
}

TEST(Multiply, ADepthInPiecesIsTheSameBitsAsInOne) {
  EveryProcessor().for_each([] {
    constexpr Index kDepth = 200;
    const std::vector<float> a = normal(7 * kDepth, 3);
    const std::vector<float> b = normal(kDepth * 48, 4);
    std::vector<float> whole(7 * 48);
    multiply(7, 48, kDepth, a.data(), kDepth, 1, b.data(), 48, whole.data(), 48);
    std::vector<float> pieces(7 * 48, 9);
    for (Index k = 0; k < kDepth; k += 64) {
      multiply(7, 48, std::min<Index>(64, kDepth - k), a.data() + k, kDepth, 1, b.data() + k * 48, 48, pieces.data(),
               48, k > 0);
    }
    EXPECT_EQ(bits_of(pieces), bits_of(whole));
  });
}

TEST(MultiplyPacked, IsTheSameBitsAsTheProductWithTheMatrixTurned) {
  EveryProcessor().for_each([] {
    for (const Index columns : {1, 15, 16, 17, 33, 63, 64, 65, 80, 130, 300}) {
      for (const Index depth : {1, 8, 100, 513}) {
        const Index width = rounded_up(columns, kLanes);
        const Index row = depth + 3;
        const std::vector<float> transposed = normal(columns * row, 8);
        std::vector<float> right(at(depth * width));
        for (Index k = 0; k < depth; ++k) {
          for (Index j = 0; j < columns; ++j) right[at(k * width + j)] = transposed[at(j * row + k)];
        }
        std::vector<float> packed(at(rounded_up(columns, kPanel) * depth), std::numeric_limits<float>::quiet_NaN());
        pack(DType::float32, reinterpret_cast<const std::byte*>(transposed.data()), row, columns, depth, packed.data());
        for (const Index rows : {1, 2, 7, 61, 130}) {
          SCOPED_TRACE(testing::Message() << rows << " × " << columns << " × " << depth);
          const std::vector<float> left = normal(rows * (depth + 1), 9);
          std::vector<float> product(at(rows * width));
          multiply(rows, width, depth, left.data(), depth + 1, 1, right.data(), width, product.data(), width);
          const Index c_row = columns + 2;
          std::vector<float> c(at(rows * c_row), -77.0f);
          std::vector<float> expected = c;
          for (const bool add : {false, true}) {
            for (Index i = 0; i < rows; ++i) {
              for (Index j = 0; j < columns; ++j) {
                float& sum = expected[at(i * c_row + j)];
                sum = add ? sum + product[at(i * width + j)] : product[at(i * width + j)];
              }
            }
            multiply_packed(rows, columns, depth, left.data(), depth + 1, packed.data(), c.data(), c_row, add);
            ASSERT_EQ(bits_of(c), bits_of(expected)) << (add ? "added" : "");
          }
        }
      }
    }
  });
}

TEST(Pack, TakesHalvesAndFloatsFromAnyPlace) {
  std::vector<std::uint16_t> halves(70 * 140);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i * 3);
  for (const DType type : {DType::float16, DType::bfloat16}) {
    EveryProcessor().for_each([&] {
      const auto* const data = reinterpret_cast<const std::byte*>(halves.data());
      std::vector<float> values(halves.size());
      to_float32(type, data, values);
      std::vector<std::byte> moved(values.size() * sizeof(float) + 1);
      std::memcpy(moved.data() + 1, values.data(), values.size() * sizeof(float));
      std::vector<float> expected(2 * kPanel * 140);
      std::vector<float> packed(expected.size());
      pack(DType::float32, reinterpret_cast<const std::byte*>(values.data()), 140, 70, 140, expected.data());
      pack(type, data, 140, 70, 140, packed.data());
      EXPECT_EQ(bits_of(packed), bits_of(expected)) << name_of(type);
      pack(DType::float32, moved.data() + 1, 140, 70, 140, packed.data());
      EXPECT_EQ(bits_of(packed), bits_of(expected)) << "float32 at an odd place";
    });
  }
}

TEST(ToPanels, TurnsRowsAndFillsTheRestWithZeros) {
  EveryProcessor().for_each([] {
    for (const Index depth : kDepths) {
      for (const Index count : {1, 3, 15, 16, 17, 63, 64, 65, 100, 128, 130}) {
        SCOPED_TRACE(testing::Message() << count << " rows of " << depth);
        const Index row = depth + depth % 3;
        const std::vector<float> rows = normal(count * row, 6);
        const Index panels = rounded_up(count, kPanel) / kPanel;
        std::vector<float> out(at(panels * kPanel * depth + 1), -99.0f);
        to_panels(rows.data(), row, count, depth, out.data());
        for (Index n = 0; n < panels * kPanel; ++n) {
          for (Index k = 0; k < depth; ++k) {
            const float expected = n < count ? rows[at(n * row + k)] : 0.0f;
            ASSERT_EQ(out[at(n / kPanel * kPanel * depth + k * kPanel + n % kPanel)], expected) << n << ", " << k;
          }
        }
        ASSERT_EQ(out.back(), -99.0f) << "beyond the last panel";
      }
    }
  });
}

TEST(ToPanels, WidensEveryHalfExactly) {
  std::vector<std::uint16_t> halves(65536);
  std::iota(halves.begin(), halves.end(), std::uint16_t{0});
  const auto* const data = reinterpret_cast<const std::byte*>(halves.data());
  for (const DType type : {DType::float16, DType::bfloat16}) {
    EveryProcessor().for_each([&] {
      std::vector<float> values(halves.size());
      to_float32(type, data, values);
      // 100 rows of 600, and what is left of them.
      for (const auto& [count, depth] : {std::pair<Index, Index>{100, 600}, {1, 65536}, {65, 129}}) {
        const Index panels = rounded_up(count, kPanel) / kPanel;
        std::vector<float> expected(at(panels * kPanel * depth));
        std::vector<float> packed(expected.size());
        to_panels(values.data(), depth, count, depth, expected.data());
        to_panels(type, data, depth, count, depth, packed.data());
        EXPECT_EQ(bits_of(packed), bits_of(expected)) << name_of(type) << " " << count << " " << depth;
      }
    });
  }
}

TEST(ToPanels, TakesFloatsFromAnyPlace) {
  const std::vector<float> rows = normal(70 * 40, 6);
  std::vector<std::byte> moved(rows.size() * sizeof(float) + 1);
  std::memcpy(moved.data() + 1, rows.data(), rows.size() * sizeof(float));
  std::vector<float> expected(2 * kPanel * 40);
  std::vector<float> packed(expected.size());
  to_panels(rows.data(), 40, 70, 40, expected.data());
  to_panels(DType::float32, moved.data() + 1, 40, 70, 40, packed.data());
  EXPECT_EQ(bits_of(packed), bits_of(expected));
}

TEST(PadRows, MovesRowsApartInPlace) {
  for (const Index depth : kDepths) {
    for (const Index count : {0, 1, 2, 7, 100}) {
      for (const Index width : {depth, depth + 1, rounded_up(depth, kLanes), 3 * depth}) {
        const std::vector<float> rows = normal(count * depth, 7);
        std::vector<float> moved(at(count * width + 1), -99.0f);
        std::ranges::copy(rows, moved.begin());
        pad_rows(moved.data(), count, depth, width);
        for (Index n = 0; n < count; ++n) {
          for (Index k = 0; k < width; ++k) {
            ASSERT_EQ(moved[at(n * width + k)], k < depth ? rows[at(n * depth + k)] : 0.0f);
          }
        }
        ASSERT_EQ(moved.back(), -99.0f);
      }
    }
  }
}

double bent(float product, float scale, float softcapping) {
  const double logit = times(product, scale);
  return softcapping > 0 ? static_cast<double>(softcapping) * std::tanh(logit / static_cast<double>(softcapping))
                         : logit;
}

struct Mask {
  Index panels;
  Index first;
  Index end;
};

void expect_exponentials(const Mask& mask, float size, float scale, float softcapping) {
  SCOPED_TRACE(testing::Message() << mask.panels << " panels, visible from " << mask.first << " to " << mask.end
                                  << ", products of " << size << ", capped at " << softcapping);
  const Index step = 3 * kPanel;
  const std::vector<float> products = normal(mask.panels * step, 11, size);
  std::vector<float> logits = products;
  const BlockSoftmax found = exponentiate({.logits = logits.data(),
                                           .panels = mask.panels,
                                           .panel_step = step,
                                           .first_visible = mask.first,
                                           .end_visible = mask.end},
                                          scale, softcapping);
  double maximum = -std::numeric_limits<double>::infinity();
  double largest_logit = 0;
  const auto visible = [&](Index n) { return n >= mask.first && n < mask.end; };
  const auto place = [&](Index n) { return at(n / kPanel * step + n % kPanel); };
  for (Index n = 0; n < mask.panels * kPanel; ++n) {
    if (!visible(n)) continue;
    maximum = std::max(maximum, bent(products[place(n)], scale, softcapping));
    largest_logit = std::max(largest_logit, std::abs(bent(products[place(n)], scale, softcapping)));
  }
  if (std::isinf(maximum)) {
    EXPECT_EQ(found.maximum, -kInfinity);
    EXPECT_EQ(found.sum, 0.0f);
  } else {
    EXPECT_NEAR(found.maximum, maximum, 1e-6 * largest_logit);
  }
  // A logit is rounded before it is exponentiated.
  const double tolerance = 2e-6 + 1e-6 * largest_logit;
  double sum = 0;
  double stored = 0;
  for (Index n = 0; n < mask.panels * kPanel; ++n) {
    const float weight = logits[place(n)];
    if (!visible(n)) {
      ASSERT_EQ(weight, 0.0f) << n;
      continue;
    }
    const double expected = std::exp(bent(products[place(n)], scale, softcapping) - maximum);
    ASSERT_NEAR(weight, expected, tolerance * expected + 1e-37) << n;
    sum += expected;
    stored += static_cast<double>(weight);
  }
  EXPECT_NEAR(found.sum, sum, tolerance * sum);
  EXPECT_NEAR(found.sum, stored, 1e-5 * stored);
  // What lies between the query's rows belongs to others.
  for (Index p = 0; p < mask.panels; ++p) {
    for (Index i = kPanel; i < step; ++i) ASSERT_EQ(logits[at(p * step + i)], products[at(p * step + i)]);
  }
}

TEST(Exponentiate, FollowsItsDefinitionUnderAnyMask) {
  EveryProcessor().for_each([] {
    for (const Mask& mask : {Mask{1, 0, 64}, Mask{1, 0, 1}, Mask{1, 63, 64}, Mask{1, 5, 6}, Mask{8, 0, 512},
                             Mask{8, -1000000, 511}, Mask{8, 17, 3000000}, Mask{8, 100, 101}, Mask{8, 130, 399},
                             Mask{3, 64, 128}, Mask{3, 0, 0}, Mask{3, 192, 500}, Mask{3, -50, -3}, Mask{3, 70, 70}}) {
      for (const float softcapping : {0.0f, 5.0f, 50.0f}) {
        expect_exponentials(mask, 3, 0.35f, softcapping);
        expect_exponentials(mask, 40, 1, softcapping);
      }
    }
  });
}

TEST(Exponentiate, HugeLogitsStayNumbers) {
  EveryProcessor().for_each([] {
    for (const float size : {1e3f, 1e6f, 1e10f, 1e30f}) {
      for (const float scale : {1.0f, 0.35f, 0.088388346f}) {
        for (const float softcapping : {0.0f, 30.0f}) {
          for (const Index end : {127, 128}) {
            SCOPED_TRACE(testing::Message() << "products of " << size << " times " << scale << ", capped at "
                                            << softcapping << ", " << end << " visible");
            std::vector<float> logits = normal(2 * kPanel, 12, size);
            const auto largest_product = std::max_element(logits.begin(), logits.begin() + end) - logits.begin();
            const BlockSoftmax found = exponentiate(
                {.logits = logits.data(), .panels = 2, .panel_step = kPanel, .first_visible = 0, .end_visible = end},
                scale, softcapping);
            EXPECT_TRUE(std::isfinite(found.maximum));
            EXPECT_TRUE(std::isfinite(found.sum));
            for (const float weight : logits) {
              ASSERT_GE(weight, 0.0f);
              ASSERT_LE(weight, 1.0f);
            }
            EXPECT_EQ(logits[static_cast<std::size_t>(largest_product)], 1.0f);
            EXPECT_GE(found.sum, 1.0f);
            if (softcapping > 0) {
              EXPECT_NEAR(found.maximum, softcapping, 1e-5);
            }
          }
        }
      }
    }
  });
}

TEST(Columns, LogitsAndExponentialsFollowTheirDefinition) {
  EveryProcessor().for_each([] {
    for (const std::int32_t sliding_window : {0, 1, 5, 64, 1000}) {
      for (const float softcapping : {0.0f, 4.0f}) {
        SCOPED_TRACE(testing::Message() << "sliding window " << sliding_window << ", capped at " << softcapping);
        constexpr Index kKeys = 150;
        std::vector<std::int32_t> positions(at(kPanel));
        for (Index q = 0; q < kPanel; ++q) positions[at(q)] = static_cast<std::int32_t>(q < 50 ? q * 3 : 147);
        std::vector<std::int32_t> first_visible;
        for (const std::int32_t last : positions) first_visible.push_back(std::max(0, last - sliding_window + 1));
        const QueryColumns queries{.positions = positions.data(),
                                   .first_visible = sliding_window > 0 ? first_visible.data() : nullptr,
                                   .scale = 0.3f,
                                   .softcapping = softcapping};
        const std::vector<float> products = normal(kKeys * kPanel, 13, 10);
        std::vector<float> logits = products;
        std::vector<float> maxima(at(kPanel), -kInfinity);
        // In uneven pieces, as blocks of keys come.
        const std::vector<std::pair<Index, Index>> pieces = {{0, 1}, {1, 99}, {100, 50}};
        for (const auto& [first, count] : pieces) {
          finish_logits(queries, first, count, logits.data() + first * kPanel, maxima.data());
        }
        std::vector<double> expected_maxima(at(kPanel), -std::numeric_limits<double>::infinity());
        const auto visible = [&](Index key, Index q) {
          const Index last = positions[at(q)];
          return key <= last && (sliding_window == 0 || key > last - sliding_window);
        };
        for (Index key = 0; key < kKeys; ++key) {
          for (Index q = 0; q < kPanel; ++q) {
            if (!visible(key, q)) {
              ASSERT_EQ(logits[at(key * kPanel + q)], -kInfinity) << key << ", " << q;
              continue;
            }
            const double logit = bent(products[at(key * kPanel + q)], 0.3f, softcapping);
            ASSERT_NEAR(logits[at(key * kPanel + q)], logit, 1e-6 * std::abs(logit) + 1e-7);
            expected_maxima[at(q)] = std::max(expected_maxima[at(q)], logit);
          }
        }
        for (Index q = 0; q < kPanel; ++q) ASSERT_NEAR(maxima[at(q)], expected_maxima[at(q)], 1e-5);
        for (const auto& [first, count] : pieces) {
          exponentiate_columns(count, kPanel, maxima.data(), logits.data() + first * kPanel);
        }
        for (Index q = 0; q < kPanel; ++q) {
          for (Index key = 0; key < kKeys; ++key) {
            const double weight =
                visible(key, q)
                    ? std::exp(bent(products[at(key * kPanel + q)], 0.3f, softcapping) - expected_maxima[at(q)])
                    : 0;
            ASSERT_NEAR(logits[at(key * kPanel + q)], weight, 1e-5 * weight + 1e-37);
          }
        }
      }
    }
  });
}

TEST(Columns, AsManyMakeARowAsThereAre) {
  EveryProcessor().for_each([] {
    for (const Index columns : {16, 32, 48, 64, 96, 128}) {
      constexpr Index kKeys = 5;
      const std::vector<std::int32_t> positions(at(columns), 3);
      const std::vector<float> products = normal(kKeys * columns + 16, 18);
      std::vector<float> logits = products;
      std::vector<float> maxima(at(columns), -5);
      finish_logits({.positions = positions.data(), .columns = columns}, 0, kKeys, logits.data(), maxima.data());
      exponentiate_columns(kKeys, columns, maxima.data(), logits.data());
      for (Index key = 0; key < kKeys; ++key) {
        for (Index q = 0; q < columns; ++q) {
          const std::size_t place = at(key * columns + q);
          const double weight = std::exp(static_cast<double>(products[place]) - static_cast<double>(maxima[at(q)]));
          ASSERT_NEAR(logits[place], key <= 3 ? weight : 0, key <= 3 ? 1e-5 * weight : 0);
        }
      }
      for (Index beyond = kKeys * columns; beyond < kKeys * columns + 16; ++beyond) {
        ASSERT_EQ(logits[at(beyond)], products[at(beyond)]);
      }
    }
  });
}

TEST(Columns, AMaximumOfEarlierKeysStays) {
  EveryProcessor().for_each([] {
    const std::vector<std::int32_t> positions(at(kPanel), 100);
    std::vector<float> maxima(at(kPanel), 7);
    std::vector<float> products(at(kPanel), 3);
    products[5] = 9;
    finish_logits({.positions = positions.data()}, 10, 1, products.data(), maxima.data());
    for (std::size_t q = 0; q < maxima.size(); ++q) EXPECT_EQ(maxima[q], q == 5 ? 9.0f : 7.0f);
  });
}

TEST(SquaredLengths, FollowTheirDefinition) {
  EveryProcessor().for_each([] {
    for (const Index depth : kDepths) {
      SCOPED_TRACE(depth);
      const Index row = rounded_up(depth, kLanes);
      const std::vector<float> panel = normal(depth * kPanel, 14);
      std::vector<float> factor = normal(depth * row, 15);
      for (Index i = 0; i < depth; ++i) {
        for (Index k = 0; k < row; ++k) {
          if (k < i || k >= depth) factor[at(i * row + k)] = 0;
        }
      }
      std::vector<float> lengths(at(kPanel), -1);
      std::vector<float> after(at(kPanel), -1);
      squared_lengths(panel.data(), depth, lengths.data());
      squared_lengths_after(factor.data(), row, panel.data(), depth, after.data());
      for (Index n = 0; n < kPanel; ++n) {
        double plain = 0;
        double projected = 0;
        for (Index i = 0; i < depth; ++i) {
          plain += times(panel[at(i * kPanel + n)], panel[at(i * kPanel + n)]);
          double product = 0;
          for (Index k = 0; k < depth; ++k) product += times(factor[at(i * row + k)], panel[at(k * kPanel + n)]);
          projected += product * product;
        }
        ASSERT_NEAR(lengths[at(n)], plain, 1e-5 * plain);
        ASSERT_NEAR(after[at(n)], projected, 1e-5 * projected);
      }
    }
  });
}

TEST(Distances, FollowTheirDefinitionAndMarkWhatCancels) {
  EveryProcessor().for_each([] {
    constexpr float kShare = 1.0f / 64;
    for (const bool with_cancellation : {false, true}) {
      for (const Index count : {16, 48, 64}) {
        std::vector<float> lengths(at(count));
        std::vector<float> products(at(count));
        for (Index n = 0; n < count; ++n) {
          lengths[at(n)] = 1 + static_cast<float>(n) / 8;
          products[at(n)] = static_cast<float>(n % 5) / 8 - 0.25f;
        }
        if (with_cancellation) {
          lengths[at(count - 1)] = 2;
          products[at(count - 1)] = 1.99f;
          lengths[3] = 2;
          products[3] = 2.00001f;  // below 0, which no square is
        }
        std::vector<float> found(at(count + 1), -9);
        EXPECT_EQ(distances(lengths.data(), products.data(), 2, kShare, count, found.data()), with_cancellation);
        for (Index n = 0; n < count; ++n) {
          const double squared = static_cast<double>(lengths[at(n)]) - 2 * static_cast<double>(products[at(n)]) + 2;
          if (with_cancellation && (n == 3 || n == count - 1)) {
            EXPECT_EQ(found[at(n)], -1.0f) << n;
          } else {
            EXPECT_NEAR(found[at(n)], std::sqrt(squared), 1e-6) << n;
          }
        }
        EXPECT_EQ(found.back(), -9.0f);
      }
    }
    // A vector of length 0 from another one.
    const std::vector<float> nothing(at(kPanel), 0);
    std::vector<float> found(at(kPanel), -9);
    EXPECT_FALSE(distances(nothing.data(), nothing.data(), 0, kShare, kPanel, found.data()));
    EXPECT_EQ(found, nothing);
  });
}

TEST(AddGram, FollowsItsDefinitionOnAndAboveTheDiagonal) {
  EveryProcessor().for_each([] {
    for (const Index depth : kDepths) {
      for (const Index rows : {1, 5, 64, 130}) {
        SCOPED_TRACE(testing::Message() << rows << " rows of " << depth);
        const Index width = rounded_up(depth, kLanes);
        const Index row = width + kLanes;
        const std::vector<float> x = normal(rows * row, 16);
        std::vector<float> gram(at(depth * width + 1), 0.5f);
        gram.back() = -99;
        add_gram(x.data(), row, rows, depth, gram.data());
        for (Index i = 0; i < depth; ++i) {
          for (Index j = i; j < depth; ++j) {
            double sum = 0.5;
            double size = 0.5;
            for (Index k = 0; k < rows; ++k) {
              const double term = times(x[at(k * row + i)], x[at(k * row + j)]);
              sum += term;
              size += std::abs(term);
            }
            ASSERT_NEAR(gram[at(i * width + j)], sum, rounding(rows, size)) << i << ", " << j;
          }
        }
        ASSERT_EQ(gram.back(), -99.0f);
      }
    }
  });
}

std::vector<std::uint32_t> largest_by_sorting(const std::vector<float>& values, Index count) {
  std::vector<std::uint32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0U);
  std::ranges::stable_sort(order, [&](std::uint32_t a, std::uint32_t b) { return values[a] > values[b]; });
  order.resize(std::min(order.size(), at(std::max<Index>(count, 0))));
  std::ranges::sort(order);
  return order;
}

void expect_largest(const std::vector<float>& values, const std::string& kind) {
  const auto size = static_cast<Index>(values.size());
  std::vector<std::uint32_t> found = {7, 7, 7};
  for (const Index count :
       {Index{0}, Index{1}, Index{2}, Index{15}, Index{16}, Index{17}, size / 7, size / 2, size - 1, size, size + 5}) {
    if (count < 0) continue;
    largest(values, count, found);
    ASSERT_EQ(found, largest_by_sorting(values, count)) << kind << ": " << count << " of " << size;
  }
}

TEST(Largest, AgreesWithAStableSort) {
  EveryProcessor().for_each([] {
    for (const Index size : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 66, 127, 129, 1000, 4097, 8192}) {
      std::mt19937 generator(static_cast<unsigned>(size));
      const auto drawn = [&](const auto& draw) {
        std::vector<float> values(at(size));
        for (float& value : values) value = draw();
        return values;
      };
      const std::vector<float> any = normal(size, static_cast<unsigned>(size) + 1);
      expect_largest(any, "any");
      expect_largest(drawn([&] { return -std::abs(static_cast<float>(generator() % 1000)); }), "not positive");
      expect_largest(drawn([&] { return static_cast<float>(generator() % 4); }), "many ties");
      expect_largest(drawn([&] { return generator() % 50 == 0 ? 1.0f : 0.5f; }), "two values");
      expect_largest(drawn([] { return 3.0f; }), "all equal");
      expect_largest(drawn([&] { return generator() % 2 == 0 ? 0.0f : -0.0f; }), "zeros of both signs");
      const float corner[] = {0.0f,   -0.0f,  kInfinity, -kInfinity, 1e-45f, -1e-45f, std::numeric_limits<float>::max(),
                              1e-38f, -1e30f, 1.0f};
      expect_largest(drawn([&] { return corner[generator() % std::size(corner)]; }), "corners");
      expect_largest(drawn([] { return -kInfinity; }), "-infinity");
      // As attention is: few values that matter, many that are tiny.
      expect_largest(drawn([&] { return std::exp(-static_cast<float>(generator() % 90)); }), "attention");
      std::vector<float> sorted = any;
      std::ranges::sort(sorted);
      expect_largest(sorted, "ascending");
      std::ranges::reverse(sorted);
      expect_largest(sorted, "descending");
      if (testing::Test::HasFatalFailure()) return;
    }
  });
}

TEST(Sliding, SumsAndMaximaFollowTheirDefinition) {
  EveryProcessor().for_each([] {
    for (const Index width : {1, 2, 3, 5, 7, 16, 31}) {
      for (const Index count : {0, 1, 3, 4, 15, 16, 17, 33, 100}) {
        SCOPED_TRACE(testing::Message() << count << " windows of " << width);
        // Not an element more than what is promised to be read.
        const std::vector<float> values = normal(count == 0 ? 0 : count + width - 1, 17);
        std::vector<float> sums(at(count + 1), -99.0f);
        std::vector<float> maxima(at(count + 1), -99.0f);
        sliding_sums(values.data(), width, 0.25f, count, sums.data());
        sliding_maxima(values.data(), width, count, maxima.data());
        for (Index i = 0; i < count; ++i) {
          float sum = 0;
          float maximum = -kInfinity;
          for (Index j = 0; j < width; ++j) {
            sum += values[at(i + j)];
            maximum = std::max(maximum, values[at(i + j)]);
          }
          ASSERT_EQ(sums[at(i)], 0.25f * sum) << "added in their order";
          ASSERT_EQ(maxima[at(i)], maximum);
        }
        ASSERT_EQ(sums.back(), -99.0f);
        ASSERT_EQ(maxima.back(), -99.0f);
      }
    }
  });
}

TEST(HasNan, OneIsFoundAnywhere) {
  EveryProcessor().for_each([] {
    EXPECT_FALSE(has_nan({}));
    for (const std::size_t count : {1, 7, 15, 16, 17, 64, 100}) {
      std::vector<float> values(count, kInfinity);
      values[count / 2] = -kInfinity;
      EXPECT_FALSE(has_nan(values));
      for (std::size_t i = 0; i < count; ++i) {
        for (const float nan : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
          std::vector<float> with_nan = values;
          with_nan[i] = nan;
          EXPECT_TRUE(has_nan(with_nan)) << i << " of " << count;
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvreplay::kernels
