#include "replay/layer_projection.h"

#include <algorithm>

namespace kvreplay {
namespace {

// Rows that are read at a time, and taken apart into heads while they are in the cache.
constexpr Index kRows = 64;

}  // namespace

int projection_slices(const ModelInfo& model) {
  return static_cast<int>((model.hidden_size + kProjectionSlice - 1) / kProjectionSlice);
}

LayerProjection::LayerProjection(const CapturedRun& trace, int layer)
    : trace_(trace),
      layer_(layer),
      grams_(static_cast<std::size_t>(projection_slices(trace.info().model))),
      factors_(static_cast<std::size_t>(trace.info().model.num_attention_heads)) {}

void LayerProjection::read_slice(int slice) {
  const ModelInfo& model = trace_.info().model;
  const Index depth = model.head_dim;
  const Index width = factor_width(depth);
  const Index heads = model.num_attention_heads;
  Buffer& gram = grams_[static_cast<std::size_t>(slice)];
  gram = Buffer(heads * depth * width);
  std::fill_n(gram.data(), gram.size(), 0.0f);
  const Index first = slice * kProjectionSlice;
  const Index end = std::min<Index>(first + kProjectionSlice, model.hidden_size);
  const Index at_once = trace_.reads_projection_directly(layer_) ? kRows : kProjectionSlice;
  Buffer rows(at_once * heads * depth);
  Buffer part(at_once * width);
  std::fill_n(part.data(), part.size(), 0.0f);
  for (Index row = first; row < end; row += at_once) {
    const Index count = std::min(at_once, end - row);
    trace_.read_projection_rows(layer_, row, count, rows.data());
    for (Index head = 0; head < heads; ++head) {
      for (Index i = 0; i < count; ++i) {
        std::copy_n(rows.data() + (i * heads + head) * depth, depth, part.data() + i * width);
      }
      add_projection_gram(part.data(), width, count, depth, gram.data() + head * depth * width);
    }
  }
}

void LayerProjection::decompose(int query_head) {
  const Index depth = trace_.info().model.head_dim;
  const Index width = factor_width(depth);
  // In the order of memory: slices are rows of floats.
  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> gram = Eigen::MatrixXd::Zero(depth, width);
  for (const Buffer& slice : grams_) {
    gram += MatrixView(slice.data() + query_head * depth * width, depth, width).cast<double>();
  }
  factors_[static_cast<std::size_t>(query_head)] = projection_factor_from(gram.leftCols(depth));
}

void LayerProjection::compute() {
  const ModelInfo& model = trace_.info().model;
  for (int slice = 0; slice < projection_slices(model); ++slice) read_slice(slice);
  for (int head = 0; head < model.num_attention_heads; ++head) decompose(head);
  finish();
}

Index LayerProjection::memory(const ModelInfo& model) {
  const Index head = Index{model.head_dim} * factor_width(model.head_dim) * static_cast<Index>(sizeof(float));
  return (projection_slices(model) + 1) * model.num_attention_heads * head;
}

}  // namespace kvreplay
