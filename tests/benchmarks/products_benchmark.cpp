// The matrix products that occur in a replay and in a capture, by Eigen, OpenBLAS and the project's own kernels, which
// are written with Highway: one thread, float32, operands in the cache. Every result is compared with one in double
// precision before it is timed.
#include <benchmark/benchmark.h>
#include <cblas.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/matrix.h"
#include "kernels/kernels.h"
#include "tracer/linear.h"

namespace kvreplay::benchmarks {
namespace {

// c [rows, columns] = a [rows, depth] · b [depth, columns].
struct Shape {
  std::string name;
  Index rows;
  Index columns;
  Index depth;
  bool a_transposed = false;  // a lies as [depth, rows]
  bool b_transposed = false;  // b lies as [columns, depth]
};

// Positions are taken in blocks of 512, heads have 128 dimensions, the observation window 32 queries.
const std::vector<Shape> kShapes = {
    {.name = "window logits, 1 query head: Q[32,128] K[512,128]^T",
     .rows = 32,
     .columns = 512,
     .depth = 128,
     .b_transposed = true},
    {.name = "window logits, 4 query heads: Q[128,128] K[512,128]^T",
     .rows = 128,
     .columns = 512,
     .depth = 128,
     .b_transposed = true},
    {.name = "the same, transposed: K[512,128] Q[128,128]^T",
     .rows = 512,
     .columns = 128,
     .depth = 128,
     .b_transposed = true},
    {.name = "projected values: V[512,128] R[128,128]^T",
     .rows = 512,
     .columns = 128,
     .depth = 128,
     .b_transposed = true},
    {.name = "Gram matrix: W[4096,128]^T W[4096,128]",
     .rows = 128,
     .columns = 128,
     .depth = 4096,
     .a_transposed = true},
    {.name = "smoothing: weights[1,32] attention[32,512]", .rows = 1, .columns = 512, .depth = 32},
    {.name = "smoothing: weights[9,32] attention[32,512]", .rows = 9, .columns = 512, .depth = 32},
    {.name = "smoothing: weights[27,32] attention[32,512]", .rows = 27, .columns = 512, .depth = 32},
    {.name = "outputs: a[1,512] V[512,128]", .rows = 1, .columns = 128, .depth = 512},
    {.name = "outputs: a[4,512] V[512,128]", .rows = 4, .columns = 128, .depth = 512},
    {.name = "outputs: a[36,512] V[512,128]", .rows = 36, .columns = 128, .depth = 512},
    {.name = "square: 1024", .rows = 1024, .columns = 1024, .depth = 1024},
};

// A thousand tokens of a prompt through the layers of a small and of a larger model, and their attention.
const std::vector<Shape> kLinearShapes = {
    {.name = "linear layer: X[1024,576] W[576,576]^T",
     .rows = 1024,
     .columns = 576,
     .depth = 576,
     .b_transposed = true},
    {.name = "linear layer: X[1024,576] W[192,576]^T",
     .rows = 1024,
     .columns = 192,
     .depth = 576,
     .b_transposed = true},
    {.name = "linear layer: X[1024,576] W[1536,576]^T",
     .rows = 1024,
     .columns = 1536,
     .depth = 576,
     .b_transposed = true},
    {.name = "linear layer: X[1024,1536] W[576,1536]^T",
     .rows = 1024,
     .columns = 576,
     .depth = 1536,
     .b_transposed = true},
    {.name = "linear layer: X[512,2048] W[2048,2048]^T",
     .rows = 512,
     .columns = 2048,
     .depth = 2048,
     .b_transposed = true},
};
const std::vector<Shape> kAttentionShapes = {
    {.name = "logits: K[128,64] Q[64,64]", .rows = 128, .columns = 64, .depth = 64},
    {.name = "outputs: V[128,64]^T a[128,64]", .rows = 64, .columns = 64, .depth = 128, .a_transposed = true},
};

struct Operands {
  explicit Operands(const Shape& given) : shape(given) {
    std::mt19937 random(1);
    const auto filled = [&](Index rows, Index columns) {
      Matrix matrix(rows, columns);
      for (float& number : matrix.reshaped<Eigen::RowMajor>()) {
        number = static_cast<float>(random()) * 0x1p-31f - 1.0f;
      }
      return matrix;
    };
    a = shape.a_transposed ? filled(shape.depth, shape.rows) : filled(shape.rows, shape.depth);
    b = shape.b_transposed ? filled(shape.columns, shape.depth) : filled(shape.depth, shape.columns);
    c.setZero(shape.rows, shape.columns);
    if (!shape.b_transposed) return;
    panels.resize(static_cast<std::size_t>(shape.depth * kernels::rounded_up(shape.columns, kernels::kPanel)));
    pack();
  }

  // As the engine keeps keys: only for a b that lies as [columns, depth].
  void pack() { kernels::to_panels(b.data(), b.cols(), shape.columns, shape.depth, panels.data()); }

  // Whether c is the product: rounding errors of random numbers add up like the square root of their count.
  bool right() const {
    const Eigen::MatrixXd exact_a = (shape.a_transposed ? Matrix(a.transpose()) : a).cast<double>();
    const Eigen::MatrixXd exact_b = (shape.b_transposed ? Matrix(b.transpose()) : b).cast<double>();
    const Eigen::ArrayXXd error = (exact_a * exact_b - c.cast<double>()).array().abs();
    const Eigen::ArrayXXd size = (exact_a.cwiseAbs() * exact_b.cwiseAbs()).array();
    return (error <= size * 8 * std::sqrt(static_cast<double>(shape.depth)) * 0x1p-24).all();
  }

  Shape shape;
  Matrix a;
  Matrix b;
  Matrix c;
  std::vector<float, Eigen::aligned_allocator<float>> panels;
};

void by_eigen(Operands& o) {
  if (o.shape.a_transposed) {
    o.c.noalias() = o.a.transpose() * o.b;
  } else if (o.shape.b_transposed) {
    o.c.noalias() = o.a * o.b.transpose();
  } else {
    o.c.noalias() = o.a * o.b;
  }
}

void by_openblas(Operands& o) {
  const auto size = [](Index count) { return static_cast<blasint>(count); };
  cblas_sgemm(CblasRowMajor, o.shape.a_transposed ? CblasTrans : CblasNoTrans,
              o.shape.b_transposed ? CblasTrans : CblasNoTrans, size(o.shape.rows), size(o.shape.columns),
              size(o.shape.depth), 1.0f, o.a.data(), size(o.a.cols()), o.b.data(), size(o.b.cols()), 0.0f, o.c.data(),
              size(o.c.cols()));
}

// All rows of a by `columns` columns of `depth` rows of b, which begin at row `k` of it and are b_row floats apart.
void by_kernel(Operands& o, Index k, Index columns, Index depth, const float* b, Index b_row, float* c) {
  const Index a_row = o.shape.a_transposed ? 1 : o.a.cols();
  const Index a_step = o.shape.a_transposed ? o.a.cols() : 1;
  kernels::multiply(o.shape.rows, columns, depth, o.a.data() + k * a_step, a_row, a_step, b, b_row, c, o.c.cols(),
                    k > 0);
}

// With the right operand in panels already, as one that is used more than once would be.
void by_highway_in_panels(Operands& o) {
  for (Index first = 0; first < o.shape.columns; first += kernels::kPanel) {
    by_kernel(o, 0, kernels::kPanel, o.shape.depth, o.panels.data() + first * o.shape.depth, kernels::kPanel,
              o.c.data() + first);
  }
}

// From the same operands as the libraries, which pack as well.
void by_highway_with_packing(Operands& o) {
  o.pack();
  by_highway_in_panels(o);
}

// With a row-major right operand as it lies, a block of positions after the other.
void by_highway_in_place(Operands& o) {
  constexpr Index kBlock = 512;
  for (Index k = 0; k < o.shape.depth; k += kBlock) {
    by_kernel(o, k, o.shape.columns, std::min(kBlock, o.shape.depth - k), o.b.data() + k * o.b.cols(), o.b.cols(),
              o.c.data());
  }
}

// As a capture does it, laying out the weights each time.
void by_linear_layer(Operands& o) {
  static const tracer::Execution one_thread(1);
  tracer::LinearWeights linear;
  linear.weight = {DType::float32, {o.b.rows(), o.b.cols()}, reinterpret_cast<const std::byte*>(o.b.data())};
  tracer::LinearInput(one_thread, {o.a.data(), static_cast<std::size_t>(o.a.size())}, o.a.rows())
      .multiply(linear, {o.c.data(), static_cast<std::size_t>(o.c.size())});
}

void add(const Shape& shape, const std::string& library, void (*product)(Operands&)) {
  benchmark::RegisterBenchmark((shape.name + "/" + library).c_str(), [shape, product](benchmark::State& state) {
    Operands operands(shape);
    product(operands);
    if (!operands.right()) {
      state.SkipWithError("the product is wrong");
      return;
    }
    for (auto _ : state) {
      product(operands);
      benchmark::DoNotOptimize(operands.c.data());
      benchmark::ClobberMemory();
    }
    state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(shape.rows * shape.columns * shape.depth),
                                                   benchmark::Counter::kIsIterationInvariantRate);
  });
}

void add_all() {
  for (const Shape& shape : kShapes) {
    add(shape, "Eigen", by_eigen);
    add(shape, "OpenBLAS", by_openblas);
    if (shape.b_transposed) {
      add(shape, "Highway, panels", by_highway_in_panels);
      add(shape, "Highway, packing", by_highway_with_packing);
    } else {
      add(shape, "Highway, in place", by_highway_in_place);
    }
  }
  for (const Shape& shape : kLinearShapes) {
    add(shape, "Eigen", by_eigen);
    add(shape, "OpenBLAS", by_openblas);
    add(shape, "Highway, linear layer", by_linear_layer);
  }
  for (const Shape& shape : kAttentionShapes) {
    add(shape, "Eigen", by_eigen);
    add(shape, "OpenBLAS", by_openblas);
    add(shape, "Highway, in place", by_highway_in_place);
  }
}

}  // namespace
}  // namespace kvreplay::benchmarks

int main(int argc, char** argv) {
  openblas_set_num_threads(1);
  benchmark::AddCustomContext("Eigen", Eigen::SimdInstructionSetsInUse());
  benchmark::AddCustomContext("OpenBLAS", std::string(openblas_get_corename()) + ", " + openblas_get_config());
  benchmark::AddCustomContext("Highway", kvreplay::kernels::instruction_set());
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  kvreplay::benchmarks::add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
