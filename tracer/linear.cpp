#include "tracer/linear.h"

#include <algorithm>

namespace kvreplay::tracer {

namespace {

// A block of weights is widened to float32 once for all tokens: 64 output rows by 512 inputs are 128 KiB, which stay
// in the second-level cache while the tokens' activations stream past.
constexpr Index kBlockRows = 64;
constexpr Index kBlockDepth = 512;

// Output rows of one piece of work where a single token is multiplied.
constexpr Index kVectorRows = 32;

void add_bias(const std::vector<float>& bias, Index first, Index count, float* out) {
  if (bias.empty()) return;
  for (Index i = 0; i < count; ++i) out[i] += bias[static_cast<std::size_t>(first + i)];
}

}  // namespace

LinearInput::LinearInput(const Execution& execution, std::span<const float> rows, Index count)
    : execution_(execution), rows_(rows), count_(count), width_(static_cast<Index>(rows.size()) / count) {
  if (count_ == 1) return;
  const Kernels& kernels = execution_.kernels();
  const Index panel_rows = kernels.tile_rows;
  const Index panels = (count_ + panel_rows - 1) / panel_rows;
  packed_.resize(static_cast<std::size_t>(panels * panel_rows * width_));
  execution_.share(panels, count_ * width_, [&](Index panel, int) {
    const Index first = panel * panel_rows;
    kernels.pack(DType::float32, reinterpret_cast<const std::byte*>(rows_.data() + first * width_), width_,
                 std::min(panel_rows, count_ - first), width_, panel_rows, packed_.data() + first * width_);
  });
}

void LinearInput::multiply(const LinearWeights& linear, std::span<float> out) const {
  if (count_ == 1) {
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
    execution_.kernels().multiply_vector(weight.type, weight.data + first * row_bytes, rows, width_, rows_.data(),
                                         out.data() + first);
    add_bias(linear.bias, first, rows, out.data() + first);
  });
}

void LinearInput::multiply_matrix(const LinearWeights& linear, std::span<float> out) const {
  const Kernels& kernels = execution_.kernels();
  const Tensor& weight = linear.weight;
  const Index out_rows = weight.rows();
  const Index element = static_cast<Index>(size_of(weight.type));
  std::vector<std::vector<float>> blocks(static_cast<std::size_t>(execution_.threads()));
  const Index pieces = (out_rows + kBlockRows - 1) / kBlockRows;
  execution_.share(pieces, count_ * out_rows * width_, [&](Index piece, int worker) {
    std::vector<float>& block = blocks[static_cast<std::size_t>(worker)];
    block.resize(static_cast<std::size_t>(kBlockRows * kBlockDepth));
    const Index first = piece * kBlockRows;
    const Index rows = std::min(kBlockRows, out_rows - first);
    for (Index start = 0; start < width_; start += kBlockDepth) {
      const Index depth = std::min(kBlockDepth, width_ - start);
      kernels.pack(weight.type, weight.data + (first * width_ + start) * element, width_, rows, depth,
                   kernels.tile_columns, block.data());
      kernels.multiply(count_, rows, depth, packed_.data() + start * kernels.tile_rows, kernels.tile_rows * width_,
                       kernels.tile_rows, block.data(), kernels.tile_columns * depth, kernels.tile_columns,
                       out.data() + first, out_rows, start > 0);
    }
    if (linear.bias.empty()) return;
    for (Index token = 0; token < count_; ++token) {
      add_bias(linear.bias, first, rows, out.data() + token * out_rows + first);
    }
  });
}

}  // namespace kvreplay::tracer
