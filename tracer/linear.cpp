#include "tracer/linear.h"

#include <algorithm>

#include "base/buffer.h"
#include "kernels/inference.h"
#include "kernels/kernels.h"

namespace kvreplay::tracer {

namespace {

using kernels::kPanel;

// Weights that lie in panels at a time, in float32.
constexpr Index kPackedWeights = Index{4} << 20;

// What is multiplied as one: tokens and panels of output rows that stay in the second-level cache together, and inputs
// whose products are summed on their own before they are added to the sum of those before them.
constexpr Index kTokens = 120;
constexpr Index kPanels = 4;
constexpr Index kDepth = 512;

// Pieces of work per thread, so that none waits long for the last.
constexpr Index kPiecesPerThread = 8;

// Output rows of one piece of work where a single token is multiplied.
constexpr Index kVectorRows = 32;

void add_bias(const std::vector<float>& bias, Index first, Index count, float* out) {
  if (bias.empty()) return;
  for (Index i = 0; i < count; ++i) out[i] += bias[static_cast<std::size_t>(first + i)];
}

// out [tokens, columns] = rows [tokens, width] · panel [width, kPanel], or of its first columns.
void multiply_panel(const float* rows, Index width, Index tokens, Index start, const float* panel, Index columns,
                    float* out, Index out_row) {
  const Index depth = std::min(kDepth, width - start);
  const float* const right = panel + start * kPanel;
  if (columns % kernels::kLanes == 0) {
    if (start == 0) {
      kernels::multiply(tokens, columns, depth, rows, width, 1, right, kPanel, out, out_row);
    } else {
      kernels::add_product(tokens, columns, depth, rows + start, width, 1, right, kPanel, out, out_row);
    }
    return;
  }
  // Whole vectors would reach into the next row.
  float whole[kTokens * kPanel];
  kernels::multiply(tokens, kPanel, depth, rows + start, width, 1, right, kPanel, whole, kPanel);
  for (Index token = 0; token < tokens; ++token) {
    float* const to = out + token * out_row;
    const float* const sums = whole + token * kPanel;
    for (Index j = 0; j < columns; ++j) to[j] = start == 0 ? sums[j] : to[j] + sums[j];
  }
}

}  // namespace

LinearInput::LinearInput(const Execution& execution, std::span<const float> rows, Index count, SingleRow single_row)
    : execution_(execution),
      rows_(rows),
      count_(count),
      width_(static_cast<Index>(rows.size()) / count),
      single_row_(single_row) {}

void LinearInput::multiply(const LinearWeights& linear, std::span<float> out) const {
  if (count_ == 1 && single_row_ == SingleRow::fast) {
    multiply_vector(linear, out);
  } else {
    multiply_matrix(linear, out);
  }
}

void LinearInput::multiply_vector(const LinearWeights& linear, std::span<float> out) const {
  const Tensor& weight = linear.weight;
  const Index out_rows = weight.rows();
  const Index row_bytes = width_ * static_cast<Index>(size_of(weight.type));
  const Index pieces = (out_rows + kVectorRows - 1) / kVectorRows;
  execution_.share(pieces, out_rows * width_, [&](Index piece, int) {
    const Index first = piece * kVectorRows;
    const Index rows = std::min(kVectorRows, out_rows - first);
    kernels::multiply_vector(weight.type, weight.data + first * row_bytes, rows, width_, rows_.data(),
                             out.data() + first);
    add_bias(linear.bias, first, rows, out.data() + first);
  });
}

// Some of the weights are turned into panels, once for all tokens; then blocks of tokens are multiplied with them.
void LinearInput::multiply_matrix(const LinearWeights& linear, std::span<float> out) const {
  const Tensor& weight = linear.weight;
  const Index out_rows = weight.rows();
  const Index row_bytes = width_ * static_cast<Index>(size_of(weight.type));
  const Index all_panels = (out_rows + kPanel - 1) / kPanel;
  const Index group = std::clamp<Index>(kPackedWeights / (width_ * kPanel), 1, all_panels);
  const Index blocks = (count_ + kTokens - 1) / kTokens;
  Buffer packed(group * kPanel * width_);
  for (Index first_panel = 0; first_panel < all_panels; first_panel += group) {
    const Index panels = std::min(group, all_panels - first_panel);
    const auto rows_of = [&](Index panel) { return std::min(kPanel, out_rows - (first_panel + panel) * kPanel); };
    execution_.share(panels, panels * kPanel * width_, [&](Index panel, int) {
      kernels::to_panels(weight.type, weight.data + (first_panel + panel) * kPanel * row_bytes, width_, rows_of(panel),
                         width_, packed.data() + panel * kPanel * width_);
    });

    const Index parts =
        std::clamp<Index>(kPiecesPerThread * execution_.threads() / blocks, (panels + kPanels - 1) / kPanels, panels);
    // The blocks of tokens one after the other, with the same panels.
    execution_.share(parts * blocks, count_ * panels * kPanel * width_, [&](Index piece, int) {
      const Index begin = piece / blocks * panels / parts;
      const Index end = (piece / blocks + 1) * panels / parts;
      const Index first_token = piece % blocks * count_ / blocks;
      const Index tokens = (piece % blocks + 1) * count_ / blocks - first_token;
      const float* const rows = rows_.data() + first_token * width_;
      float* const results = out.data() + first_token * out_rows + first_panel * kPanel;
      for (Index start = 0; start < width_; start += kDepth) {
        for (Index panel = begin; panel < end; ++panel) {
          multiply_panel(rows, width_, tokens, start, packed.data() + panel * kPanel * width_, rows_of(panel),
                         results + panel * kPanel, out_rows);
        }
      }
      if (linear.bias.empty()) return;
      const Index columns = (end - begin - 1) * kPanel + rows_of(end - 1);
      for (Index token = 0; token < tokens; ++token) {
        add_bias(linear.bias, (first_panel + begin) * kPanel, columns, results + token * out_rows + begin * kPanel);
      }
    });
  }
}

}  // namespace kvreplay::tracer
