#include "tracer/linear.h"

#include <algorithm>

namespace kvreplay::tracer {

namespace {

// A block of weights is widened to float32 once for all tokens: 64 output rows by 512 inputs are 128 KiB, which stay
// in the second-level cache while the tokens' activations stream past.
constexpr Index kBlockRows = 64;
constexpr Index kBlockDepth = 512;

// Output rows of one task where a single token is multiplied.
constexpr Index kVectorRows = 32;

void add_bias(const std::vector<float>& bias, Index first, Index count, float* out) {
  if (bias.empty()) return;
  for (Index i = 0; i < count; ++i) out[i] += bias[static_cast<std::size_t>(first + i)];
}

}  // namespace

LinearInput::LinearInput(const Execution& execution, std::span<const float> rows, Index count)
    : execution_(execution), rows_(rows), count_(count), width_(static_cast<Index>(rows.size()) / count) {
  if (count_ == 1) return;
  const Kernels& kernels = *execution_.kernels;
  const Index panel_rows = kernels.tile_rows;
  const Index panels = (count_ + panel_rows - 1) / panel_rows;
  packed_.resize(static_cast<std::size_t>(panels * panel_rows * width_));
#pragma omp parallel for num_threads(execution_.threads) schedule(static)
  for (Index panel = 0; panel < panels; ++panel) {
    const Index first = panel * panel_rows;
    kernels.pack(DType::float32, reinterpret_cast<const std::byte*>(rows_.data() + first * width_), width_,
                 std::min(panel_rows, count_ - first), width_, panel_rows, packed_.data() + first * width_);
  }
}

void LinearInput::multiply(const LinearWeights& linear, std::span<float> out) const {
  const Kernels& kernels = *execution_.kernels;
  const Tensor& weight = linear.weight;
  const Index out_rows = weight.rows();
  const Index row_bytes = width_ * static_cast<Index>(size_of(weight.type));
  if (count_ == 1) {
    const Index tasks = (out_rows + kVectorRows - 1) / kVectorRows;
#pragma omp parallel for num_threads(execution_.threads) schedule(static)
    for (Index task = 0; task < tasks; ++task) {
      const Index first = task * kVectorRows;
      const Index rows = std::min(kVectorRows, out_rows - first);
      kernels.multiply_vector(weight.type, weight.data + first * row_bytes, rows, width_, rows_.data(),
                              out.data() + first);
      add_bias(linear.bias, first, rows, out.data() + first);
    }
    return;
  }
  const Index tasks = (out_rows + kBlockRows - 1) / kBlockRows;
#pragma omp parallel num_threads(execution_.threads)
  {
    std::vector<float> block(static_cast<std::size_t>(kBlockRows * kBlockDepth));
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < tasks; ++task) {
      const Index first = task * kBlockRows;
      const Index rows = std::min(kBlockRows, out_rows - first);
      for (Index start = 0; start < width_; start += kBlockDepth) {
        const Index depth = std::min(kBlockDepth, width_ - start);
        const std::byte* from = weight.data + first * row_bytes + start * static_cast<Index>(size_of(weight.type));
        kernels.pack(weight.type, from, width_, rows, depth, kernels.tile_columns, block.data());
        kernels.multiply(count_, rows, depth, packed_.data() + start * kernels.tile_rows, kernels.tile_rows * width_,
                         kernels.tile_rows, block.data(), kernels.tile_columns * depth, kernels.tile_columns,
                         out.data() + first, out_rows, start > 0);
      }
      if (linear.bias.empty()) continue;
      for (Index token = 0; token < count_; ++token) {
        add_bias(linear.bias, first, rows, out.data() + token * out_rows + first);
      }
    }
  }
}

}  // namespace kvreplay::tracer
