#include "tracer/linear.h"

#include <algorithm>

#include "base/buffer.h"
#include "kernels/inference.h"
#include "kernels/kernels.h"

namespace kvreplay::tracer {

namespace {

using kernels::kPanel;

// Inputs whose products are summed on their own before they are added to the sum of those before them, and the fewest
// that are worth a round over all tokens.
constexpr Index kDepth = 512;
constexpr Index kLeastDepth = kDepth / 2;

// Weights that are laid out at a time: panels of output rows by inputs that stay in the second-level cache, for every
// thread, or what is worth sharing out where tokens are few.
constexpr Index kPanels = 4;
constexpr Index kWorthLayingOut = Index{1} << 27;  // multiplications
constexpr Index kMostLaidOut = Index{4} << 20;

// Tokens that are multiplied as one, which stay there as well.
constexpr Index kTokens = 120;

// Pieces of work per thread, so that none waits long for the last.
constexpr Index kPiecesPerThread = 8;

// Output rows of one piece of work where a single token is multiplied.
constexpr Index kVectorRows = 32;

// How many multiplications take as long as reading one weight from memory.
constexpr Index kReading = 8;

void add_bias(const std::vector<float>& bias, Index first, Index count, float* out) {
  if (bias.empty()) return;
  for (Index i = 0; i < count; ++i) out[i] += bias[static_cast<std::size_t>(first + i)];
}

}  // namespace

LinearInput::LinearInput(const Execution& execution, std::span<const float> rows, Index count, SingleRow single_row)
    : execution_(execution),
      rows_(rows),
      count_(count),
      width_(static_cast<Index>(rows.size()) / count),
      single_row_(single_row) {}

void LinearInput::multiply(std::initializer_list<Product> products) const {
  if (count_ == 1 && single_row_ == SingleRow::fast) {
    multiply_vector(products);
  } else {
    for (const Product& product : products) multiply_matrix(product.linear, product.out);
  }
}

void LinearInput::multiply_vector(std::span<const Product> products) const {
  const auto pieces_of = [](const Product& product) {
    return (product.linear.weight.rows() + kVectorRows - 1) / kVectorRows;
  };
  Index pieces = 0;
  Index out_rows = 0;
  for (const Product& product : products) {
    pieces += pieces_of(product);
    out_rows += product.linear.weight.rows();
  }
  execution_.share(pieces, kReading * out_rows * width_, [&](Index piece, int) {
    const Product* product = products.data();
    for (; piece >= pieces_of(*product); ++product) piece -= pieces_of(*product);
    const Tensor& weight = product->linear.weight;
    const Index first = piece * kVectorRows;
    const Index rows = std::min(kVectorRows, weight.rows() - first);
    const Index row_bytes = width_ * static_cast<Index>(size_of(weight.type));
    float* const out = product->out.data() + first;
    kernels::multiply_vector(weight.type, weight.data + first * row_bytes, rows, width_, rows_.data(), out);
    add_bias(product->linear.bias, first, rows, out);
  });
}

// Some of the weights are laid out, once for all tokens; then blocks of tokens are multiplied with them.
void LinearInput::multiply_matrix(const LinearWeights& linear, std::span<float> out) const {
  const Tensor& weight = linear.weight;
  const Index element = static_cast<Index>(size_of(weight.type));
  const Index out_rows = weight.rows();
  const Index all_panels = (out_rows + kPanel - 1) / kPanel;
  const Index blocks = (count_ + kTokens - 1) / kTokens;
  const Index group = std::min(
      all_panels,
      std::max(kPanels * execution_.threads(), std::min(kWorthLayingOut / count_, kMostLaidOut) / (kDepth * kPanel)));
  Buffer packed(group * kPanel * std::min(width_, kDepth + kLeastDepth));
  for (Index first_panel = 0; first_panel < all_panels; first_panel += group) {
    const Index panels = std::min(group, all_panels - first_panel);
    const auto rows_of = [&](Index panel, Index count) {
      return std::min(count * kPanel, out_rows - (first_panel + panel) * kPanel);
    };
    for (Index start = 0, stop = 0; start < width_; start = stop) {
      stop = width_ - start < kDepth + kLeastDepth ? width_ : start + kDepth;
      // Each piece of the depth has its panels behind those of the piece before.
      const auto for_depths = [&](const auto& work) {
        for (Index begin = start; begin < stop; begin += kDepth) {
          work(begin, std::min(kDepth, stop - begin), packed.data() + (begin - start) * panels * kPanel);
        }
      };
      execution_.share(panels, kReading * panels * kPanel * (stop - start), [&](Index panel, int) {
        const Index first_row = (first_panel + panel) * kPanel;
        for_depths([&](Index begin, Index depth, float* to) {
          kernels::pack(weight.type, weight.data + (first_row * width_ + begin) * element, width_, rows_of(panel, 1),
                        depth, to + panel * kPanel * depth);
        });
      });
      const Index parts =
          std::clamp<Index>(kPiecesPerThread * execution_.threads() / blocks, (panels + kPanels - 1) / kPanels, panels);
      // The blocks of tokens one after the other, with the same panels.
      execution_.share(parts * blocks, count_ * panels * kPanel * (stop - start), [&](Index piece, int) {
        const Index part = piece / blocks * panels / parts;
        const Index first_row = (first_panel + part) * kPanel;
        const Index rows = rows_of(part, (piece / blocks + 1) * panels / parts - part);
        const Index first_token = piece % blocks * count_ / blocks;
        const Index tokens = (piece % blocks + 1) * count_ / blocks - first_token;
        float* const results = out.data() + first_token * out_rows + first_row;
        for_depths([&](Index begin, Index depth, const float* from) {
          kernels::multiply_packed(tokens, rows, depth, rows_.data() + first_token * width_ + begin, width_,
                                   from + part * kPanel * depth, results, out_rows, begin > 0);
        });
        if (stop < width_) return;
        for (Index token = 0; token < tokens; ++token) {
          add_bias(linear.bias, first_row, rows, results + token * out_rows);
        }
      });
    }
  }
}

}  // namespace kvreplay::tracer
