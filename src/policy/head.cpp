#include "policy/head.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <map>
#include <set>
#include <utility>

#include "base/buffer.h"
#include "base/error.h"
#include "base/softmax.h"
#include "base/work.h"
#include "kernels/kernels.h"
#include "policy/projection.h"

namespace kvreplay {
namespace {

using kernels::kPanel;

// Queries that accumulated attention multiplies at a time.
constexpr int kRowBlock = 16;

// Entries that are worked on at a time: their keys, panels and logits stay in the cache. Sums are cut there, so it is
// part of what a result is.
constexpr Index kBlock = 512;

// Where a squared distance is below this share of the squares that it is the difference of, rounding would show in it.
constexpr float kCancelled = 1.0f / 64;

// Values of up to so many bytes are kept between the two passes over them: from the cache they come sooner than from
// the source.
constexpr Index kKeptValues = Index{8} << 20;

Index padded(Index entries) { return kernels::rounded_up(entries, kPanel); }

// Not a multiple of a page, or the rows of many combinations would compete for the same lines of the cache.
Index row_stride(Index entries) { return padded(entries) + kernels::kLanes; }

// The most entries that a pass over the observation window of `window` queries looks at.
Index seen_by(const HeadShape& shape, Index window) {
  return std::min<Index>(shape.next_position, shape.rows() + window + shape.rule.attention_chunk_size + kBlock);
}

// The entries [first, end) that the query at `position` sees.
std::pair<Index, Index> visible_entries(const CachePositions& entries, int position, const HeadShape& shape) {
  const int gone = entries.size() - shape.rows();
  if (gone > 0 && !entries.ascend()) {
    // The newest of them come first, and no window hides any.
    int first = 0;
    while (first < gone && entries[first] > position) ++first;
    return {first, gone + shape.positions.count_before(position + 1)};
  }
  return {entries.count_before(static_cast<int>(shape.rule.first_visible(position))),
          entries.count_before(position + 1)};
}

}  // namespace

CachePositions::CachePositions(std::vector<int> positions)
    : count_(static_cast<int>(positions.size())),
      any_(std::make_shared<const std::vector<int>>(std::move(positions))),
      ascend_(std::ranges::is_sorted(*any_)) {}

int CachePositions::leading_before(int position) const {
  if (!any_) return std::clamp(position - first_, 0, count_);
  if (ascend_) return static_cast<int>(std::ranges::lower_bound(*any_, position) - any_->begin());
  return static_cast<int>(std::ranges::find_if(*any_, [position](int p) { return p >= position; }) - any_->begin());
}

int CachePositions::count_before(int position) const {
  const int count = leading_before(position);
  if (!ascend()) {
    if (std::any_of(any_->begin() + count, any_->end(), [position](int p) { return p < position; })) {
      throw Error(fmt::format("rows that stand by score are not all before those from position {} on", position));
    }
  }
  return count;
}

bool CachePositions::operator==(const CachePositions& other) const {
  if (count_ != other.count_) return false;
  if (!any_ && !other.any_) return first_ == other.first_ || count_ == 0;
  for (int i = 0; i < count_; ++i) {
    if ((*this)[i] != other[i]) return false;
  }
  return true;
}

// The window's attention: products, exponentials and sums of all query heads of the group in one pass over the keys.
// Kept are exponentials against their block's maximum, and per block and query the factor that makes them attention.
class Head::WindowPass {
 public:
  WindowPass(const HeadSource& source, int window);

  int window() const { return window_; }

  // The first entry of the pass: the beginning of the block of the first that one of its queries sees. Blocks and
  // panels are counted from there.
  Index origin() const { return origin_; }

  // Rows of weights that a combination of `member` with `weights` multiplies in a block: zeros for queries before its
  // window.
  void scaled_weights(std::span<const float> weights, int member, Index block, float* row) const {
    const Index skipped = window_ - static_cast<Index>(weights.size());
    std::fill_n(row, skipped, 0.0f);
    const float* factor = factors_.data() + block * rows_ + member * window_;
    for (Index i = skipped; i < window_; ++i) row[i] = weights[static_cast<std::size_t>(i - skipped)] * factor[i];
  }

  // The exponentials of `member` for a panel: [window, kPanel].
  const float* panel(Index panel, int member) const {
    return exponentials_.data() + (panel * rows_ + member * window_) * kPanel;
  }

  // The attention of one query of `member`, counted back from the newest, over `out.size()` entries from `first` on.
  void copy_row(int member, int age, Index first, std::span<float> out) const {
    const Index row = member * window_ + window_ - 1 - age;
    const Index end = first - origin_ + static_cast<Index>(out.size());
    float* to = out.data();
    for (Index at = first - origin_; at < end;) {
      const float factor = factors_[static_cast<std::size_t>(at / kBlock * rows_ + row)];
      const float* from = exponentials_.data() + (at / kPanel * rows_ + row) * kPanel + at % kPanel;
      const Index count = std::min(kPanel - at % kPanel, end - at);
      for (Index i = 0; i < count; ++i) to[i] = from[i] * factor;
      to += count;
      at += count;
    }
  }

 private:
  int window_;
  Index origin_;
  Index rows_;                  // query heads of the group × window
  Buffer exponentials_;         // [panel][row][kPanel]
  std::vector<float> factors_;  // [block][row]
};

Head::WindowPass::WindowPass(const HeadSource& source, int window) : window_(window) {
  const HeadShape& shape = source.shape();
  const Index depth = shape.head_dim;
  const CachePositions& entries = source.entries();
  const auto visible = [&](Index query) {
    return visible_entries(entries, shape.next_position - window + static_cast<int>(query), shape);
  };
  origin_ = std::min(visible(0).first, visible(window - 1).first) / kBlock * kBlock;
  const Index seen = entries.size() - origin_;
  const auto at_hand = static_cast<Index>(source.query_positions().size());
  rows_ = static_cast<Index>(shape.group_size) * window;
  exponentials_ = Buffer(padded(seen) * rows_);
  Buffer queries(rows_ * depth);
  for (int member = 0; member < shape.group_size; ++member) {
    const Matrix rows = source.queries(member, at_hand - window, window);
    std::copy_n(rows.data(), rows.size(), queries.data() + member * window * depth);
  }
  const Index blocks = (seen + kBlock - 1) / kBlock;
  std::vector<kernels::BlockSoftmax> parts(static_cast<std::size_t>(blocks * rows_));
  Buffer keys(kBlock * depth);
  Buffer panels(kBlock * depth);
  const auto scale = static_cast<float>(shape.rule.softmax_scale);
  const auto cap = static_cast<float>(shape.rule.attn_logit_softcapping);
  for (Index block = 0; block < blocks; ++block) {
    const Index first = block * kBlock;
    const Index count = std::min(kBlock, seen - first);
    const Index count_panels = padded(count) / kPanel;
    source.read_keys(origin_ + first, count, keys.data());
    kernels::to_panels(keys.data(), depth, count, depth, panels.data());
    float* logits = exponentials_.data() + first * rows_;
    for (Index p = 0; p < count_panels; ++p) {
      kernels::multiply(rows_, kPanel, depth, queries.data(), depth, 1, panels.data() + p * kPanel * depth, kPanel,
                        logits + p * rows_ * kPanel, kPanel);
    }
    for (Index row = 0; row < rows_; ++row) {
      const auto [first_entry, end_entry] = visible(row % window);
      const kernels::AttentionBlock part{.logits = logits + row * kPanel,
                                         .panels = count_panels,
                                         .panel_step = rows_ * kPanel,
                                         .first_visible = first_entry - origin_ - first,
                                         .end_visible = end_entry - origin_ - first};
      parts[static_cast<std::size_t>(block * rows_ + row)] = kernels::exponentiate(part, scale, cap);
    }
  }
  count_operations(2 * seen * rows_ * depth);
  count_exponentials(seen * rows_);
  factors_.resize(parts.size());
  for (Index row = 0; row < rows_; ++row) {
    const auto part = [&](Index block) -> const kernels::BlockSoftmax& {
      return parts[static_cast<std::size_t>(block * rows_ + row)];
    };
    const float sink = shape.rule.sink(shape.query_head(static_cast<int>(row / window)));
    float maximum = sink;
    for (Index block = 0; block < blocks; ++block) maximum = std::max(maximum, part(block).maximum);
    const auto weight = [&](Index block) {
      return std::exp(static_cast<double>(part(block).maximum) - static_cast<double>(maximum));
    };
    // Of an evicted cache a query may see no entry at all.
    if (maximum == -std::numeric_limits<float>::infinity()) continue;
    double sum = std::exp(static_cast<double>(sink) - static_cast<double>(maximum));
    for (Index block = 0; block < blocks; ++block) sum += weight(block) * static_cast<double>(part(block).sum);
    for (Index block = 0; block < blocks; ++block) {
      factors_[static_cast<std::size_t>(block * rows_ + row)] = static_cast<float>(weight(block) / sum);
    }
  }
}

// Combinations that were computed together.
struct Head::Batch {
  std::vector<WindowCombination> combinations;  // those with distances first
  Index origin = 0;                             // the entry that rows of attention begin with
  Index stride = 0;
  Buffer attention;                   // [combination][member][stride]
  Buffer distance;                    // the same as far as there are distances, from the block of the first row on
  std::vector<float> output_lengths;  // [combination][member]
  Index bytes = 0;
};

struct Head::Shared {
  std::optional<Matrix> keys;
  std::optional<Matrix> values;
  int window = 0;  // queries that are at hand without a gap before the eviction
  std::unique_ptr<WindowPass> pass;
  std::list<std::shared_ptr<Batch>> batches;  // newest first
  // Where each of their combinations is: grids ask for thousands.
  std::map<WindowCombination, std::pair<std::shared_ptr<Batch>, Index>> places;
  std::map<std::pair<int, int>, Buffer> rows;                  // (member, age): attention
  std::vector<std::optional<std::vector<float>>> accumulated;  // [member]
  std::vector<std::optional<std::vector<float>>> evaluation;   // [member]
  std::vector<Matrix> factors;                                 // [member]
  std::vector<Matrix> factors_transposed;
  // From the block of the first row on.
  Buffer value_rows;         // a row of factor_width(D) floats per entry, where they are few
  Buffer value_lengths;      // ‖v‖²
  Buffer projected_lengths;  // [member] ‖W v‖²
};

std::span<const float> HeadSource::newest_attention(int /*member*/) const { return {}; }

Matrix HeadSource::projection_factor(int member) const { return projection_factor_of(output_projection(member)); }

Matrix HeadSource::later_queries(int /*member*/) const { return {}; }

Matrix HeadSource::later_keys() const { return {}; }

Matrix HeadSource::evaluation_queries(int /*member*/) const { return {}; }

Matrix HeadSource::evaluation_keys() const { return {}; }

Matrix HeadSource::evaluation_values() const { return {}; }

int first_held_position(int eviction_position, const AttentionRule& rule) {
  return static_cast<int>(rule.first_visible(eviction_position));
}

EvictedHead::EvictedHead(const HeadSource& whole, std::vector<int> rows)
    : whole_(whole), entries_(std::move(rows)), shape_(whole.shape()) {
  std::vector<int> positions;
  for (const int row : entries_) positions.push_back(shape_.positions[row]);
  const int dropped = whole.entries().size() - shape_.rows();
  for (int& entry : entries_) entry += dropped;
  shape_.positions = CachePositions(std::move(positions));
}

// Neighbours are read together.
template <class Read>
void EvictedHead::gather(Index first, Index count, float* rows, const Read& read) const {
  const auto entry = [this](Index row) { return entries_[static_cast<std::size_t>(row)]; };
  for (Index row = first; row < first + count;) {
    Index next = row + 1;
    while (next < first + count && entry(next) == entry(next - 1) + 1) ++next;
    read(entry(row), next - row, rows + (row - first) * shape_.head_dim);
    row = next;
  }
}

void EvictedHead::read_keys(Index first, Index count, float* rows) const {
  gather(first, count, rows, [this](Index from, Index some, float* to) { whole_.read_keys(from, some, to); });
}

void EvictedHead::read_values(Index first, Index count, float* rows) const {
  gather(first, count, rows, [this](Index from, Index some, float* to) { whole_.read_values(from, some, to); });
}

int contiguous_window(std::span<const int> query_positions, int next_position) {
  int count = 0;
  while (count < static_cast<int>(query_positions.size()) &&
         query_positions[query_positions.size() - 1 - static_cast<std::size_t>(count)] == next_position - 1 - count) {
    ++count;
  }
  return count;
}

Head::Head(const HeadSource& source, Index kept_bytes)
    : source_(source),
      shape_(source.shape()),
      kept_bytes_(kept_bytes),
      memory_(source.memory()),
      has_output_projection_(source.has_output_projection()),
      entries_(source.entries().size()),
      first_row_(entries_ - shape_.rows()),
      first_block_(first_row_ / kBlock * kBlock),
      shared_(std::make_unique<Shared>()) {
  shared_->accumulated.resize(static_cast<std::size_t>(shape_.group_size));
  shared_->evaluation.resize(static_cast<std::size_t>(shape_.group_size));
  shared_->window = contiguous_window(source.query_positions(), shape_.next_position);
}

Head::~Head() = default;

const Matrix& Head::keys() const {
  if (!shared_->keys) {
    shared_->keys.emplace(rows(), shape_.head_dim);
    source_.read_keys(first_row_, rows(), shared_->keys->data());
  }
  return *shared_->keys;
}

const Matrix& Head::values() const {
  if (!shared_->values) {
    shared_->values.emplace(rows(), shape_.head_dim);
    source_.read_values(first_row_, rows(), shared_->values->data());
  }
  return *shared_->values;
}

Matrix Head::entry_keys() const {
  Matrix keys(entries_, shape_.head_dim);
  source_.read_keys(0, entries_, keys.data());
  return keys;
}

Matrix Head::queries(int member, int count) const {
  if (count > shared_->window) {
    throw Error(fmt::format(
        "the last {} queries before position {} are needed, and the last {} were captured; capture with --queries "
        "window:{} or more",
        count, shape_.next_position, shared_->window, count));
  }
  const auto at_hand = static_cast<Index>(source_.query_positions().size());
  return source_.queries(member, at_hand - count, count);
}

Matrix Head::later_queries(int member) const {
  const int later = shape_.prompt_length - shape_.next_position;
  const auto captured = static_cast<int>(source_.later_positions().size());
  if (later <= 0 || captured < later) {
    throw Error(fmt::format("the {} queries of the prompt from position {} on are needed, and {} were captured",
                            std::max(later, 0), shape_.next_position, captured));
  }
  return source_.later_queries(member);
}

std::pair<Index, Index> Head::visible(int position) const {
  return visible_entries(source_.entries(), position, shape_);
}

void Head::attend(int member, const Matrix& queries, const Matrix& keys,
                  const std::function<std::pair<Index, Index>(Index query)>& seen,
                  const std::function<void(Index query, std::span<const float> weights)>& take) const {
  const float sink = shape_.rule.sink(shape_.query_head(member));
  for (Index first = 0; first < queries.rows(); first += kRowBlock) {
    const Index count = std::min<Index>(kRowBlock, queries.rows() - first);
    Matrix block(count, keys.rows());
    block.noalias() = queries.middleRows(first, count) * keys.transpose();
    scale_logits(block, shape_.rule);
    count_operations(2 * block.size() * queries.cols());
    for (Index row = 0; row < count; ++row) {
      const auto [first_seen, end_seen] = seen(first + row);
      softmax(block.row(row), first_seen, end_seen, sink);
      take(first + row, {block.data() + row * block.cols(), static_cast<std::size_t>(block.cols())});
    }
  }
}

const Head::WindowPass& Head::window_pass(int window) const {
  if (window > shared_->window) {
    throw Error(fmt::format(
        "the attention of prompt position {} is needed, but of the queries before position {} only the last {} were "
        "captured; capture with --queries window:{} or more",
        shape_.next_position - window, shape_.next_position, shared_->window, window));
  }
  if (!shared_->pass || shared_->pass->window() < window) {
    shared_->pass.reset();
    shared_->pass = std::make_unique<WindowPass>(source_, window);
  }
  return *shared_->pass;
}

Index Head::memory(const HeadShape& shape, int window) {
  const Index seen = padded(seen_by(shape, window));
  const Index floats = seen * shape.group_size * window  // exponentials
                       + seen * (shape.group_size + 1)   // squared lengths
                       + 4 * kBlock * (shape.head_dim + window) +
                       (2 * shape.group_size + 4) * Index{shape.head_dim} * factor_width(shape.head_dim);
  const Index values = seen * factor_width(shape.head_dim) * static_cast<Index>(sizeof(float));
  return floats * static_cast<Index>(sizeof(float)) + (values <= kKeptValues ? values : 0);
}

Index Head::combination_memory(const HeadShape& shape, int window, Index combinations) {
  // Attention and distances; outputs in float and double, products with a panel of values.
  const Index floats = 2 * row_stride(seen_by(shape, window)) + 6 * factor_width(shape.head_dim) + kPanel + 4;
  constexpr Index kNames = 1024;  // weights and places
  return combinations * (shape.group_size * floats * static_cast<Index>(sizeof(float)) + kNames);
}

Index Head::evaluation_memory(const HeadShape& shape, Index tokens) {
  const Index queries = tokens - shape.next_position;  // or fewer
  // The keys once more as they are multiplied.
  return ((2 * tokens + queries) * shape.head_dim + 2 * kRowBlock * tokens) * static_cast<Index>(sizeof(float)) +
         shape.rows() * static_cast<Index>(sizeof(double));
}

// `count` values from `first` on, a row every factor_width(D) floats; `memory` has room for kBlock of them.
const float* Head::value_rows(Index first, Index count, Buffer& memory) const {
  const Index depth = shape_.head_dim;
  const Index width = factor_width(depth);
  const Index whole = (entries_ - first_block_) * width;
  if (first < first_block_ || whole * static_cast<Index>(sizeof(float)) > kKeptValues) {
    source_.read_values(first, count, memory.data());
    kernels::pad_rows(memory.data(), count, depth, width);
    return memory.data();
  }
  Buffer& kept = shared_->value_rows;
  if (kept.size() == 0) {
    kept = Buffer(whole);
    for (Index at = first_block_; at < entries_; at += kBlock) {
      const Index rows = std::min<Index>(kBlock, entries_ - at);
      float* const block = kept.data() + (at - first_block_) * width;
      source_.read_values(at, rows, block);
      kernels::pad_rows(block, rows, depth, width);
    }
  }
  return kept.data() + (first - first_block_) * width;
}

void Head::prepare(std::span<const WindowCombination> combinations) const {
  using Distance = WindowCombination::Distance;
  const auto batch = std::make_shared<Batch>();
  std::set<WindowCombination> added;
  int window = 1;
  for (WindowCombination combination : combinations) {
    if (!has_output_projection_ && combination.distance == Distance::projected) combination.distance = Distance::values;
    if (shared_->places.contains(combination) || !added.insert(combination).second) continue;
    window = std::max(window, static_cast<int>(combination.weights.size()));
    batch->combinations.push_back(std::move(combination));
  }
  if (batch->combinations.empty()) return;
  const auto end_of_output = [this](const WindowCombination& c) { return output_end(c); };
  std::ranges::stable_sort(batch->combinations, {}, [&](const WindowCombination& c) {
    return std::pair(c.distance == Distance::none, end_of_output(c));
  });
  const auto count = static_cast<Index>(batch->combinations.size());
  const auto distances = static_cast<Index>(std::ranges::count_if(
      batch->combinations, [](const WindowCombination& c) { return c.distance != Distance::none; }));
  const auto combination = [&](Index c) -> const WindowCombination& {
    return batch->combinations[static_cast<std::size_t>(c)];
  };

  const WindowPass& pass = window_pass(window);
  const Index depth = shape_.head_dim;
  const Index width = factor_width(depth);
  const Index group = shape_.group_size;
  const Index origin = pass.origin();
  const Index stride = row_stride(entries_ - origin);
  batch->origin = origin;
  batch->stride = stride;
  batch->attention = Buffer(count * group * stride);
  batch->distance = Buffer(distances * group * stride);
  batch->output_lengths.resize(static_cast<std::size_t>(distances * group));
  batch->bytes = (count + distances) * group * stride * static_cast<Index>(sizeof(float));

  // Attention, and the outputs that it leads to.
  Buffer weights(count * pass.window());
  Buffer rows(kBlock * width);
  Matrix outputs_of_block(distances * group, width);
  Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> outputs =
      Eigen::MatrixXd::Zero(distances * group, width);
  for (Index first = origin; first < entries_; first += kBlock) {
    const Index block = std::min(kBlock, entries_ - first);
    const Index place = first - origin;
    for (int member = 0; member < group; ++member) {
      for (Index c = 0; c < count; ++c) {
        pass.scaled_weights(combination(c).weights, member, place / kBlock, weights.data() + c * pass.window());
      }
      for (Index at = place; at < place + block; at += kPanel) {
        kernels::multiply(count, kPanel, pass.window(), weights.data(), pass.window(), 1,
                          pass.panel(at / kPanel, member), kPanel, batch->attention.data() + member * stride + at,
                          group * stride);
      }
    }
    if (distances == 0) continue;
    const float* values_of_block = value_rows(first, block, rows);
    for (Index c = 0; c < distances;) {
      const Index end = end_of_output(combination(c));
      Index next = c;
      while (next < distances && end_of_output(combination(next)) == end) ++next;
      const Index summed = std::min(block, end - first);
      if (summed > 0) {
        auto part = outputs_of_block.middleRows(c * group, (next - c) * group);
        kernels::multiply(part.rows(), width, summed, batch->attention.data() + c * group * stride + place, stride, 1,
                          values_of_block, width, part.data(), width);
        outputs.middleRows(c * group, (next - c) * group) += part.cast<double>();
      }
      c = next;
    }
  }
  count_operations(2 * (entries_ - origin) * group * (count * pass.window() + distances * depth));
  if (distances > 0) measure_distances(*batch, distances, outputs.cast<float>());

  shared_->batches.push_front(batch);
  for (Index c = 0; c < count; ++c) shared_->places.try_emplace(combination(c), batch, c);
  Index kept = 0;
  for (auto it = shared_->batches.begin(); it != shared_->batches.end();) {
    kept += (*it)->bytes;
    // The newest stays whatever its size: it was asked for.
    if (kept <= kept_bytes_ || it == shared_->batches.begin()) {
      ++it;
      continue;
    }
    for (const WindowCombination& each : (*it)->combinations) shared_->places.erase(each);
    it = shared_->batches.erase(it);
  }
}

void Head::measure_distances(Batch& batch, Index distances, const Matrix& outputs) const {
  using Distance = WindowCombination::Distance;
  const Index depth = shape_.head_dim;
  const Index width = factor_width(depth);
  const Index group = shape_.group_size;
  const auto distance_of = [&](Index row) {
    return batch.combinations[static_cast<std::size_t>(row / group)].distance;
  };
  bool plain = false;
  bool projected = false;
  for (Index c = 0; c < distances; ++c) {
    (distance_of(c * group) == Distance::projected ? projected : plain) = true;
  }
  Shared& shared = *shared_;
  if (projected && shared.factors.empty()) {
    for (int member = 0; member < group; ++member) {
      shared.factors.push_back(source_.projection_factor(member));
      Matrix& transposed = shared.factors_transposed.emplace_back(Matrix::Zero(depth, width));
      transposed.leftCols(depth) = shared.factors.back().leftCols(depth).transpose();
    }
  }

  // What is multiplied with the values: o, or WᵀW o.
  Matrix references = outputs;
  std::vector<float> squared(static_cast<std::size_t>(outputs.rows()));
  Eigen::RowVectorXf projected_output(width);
  for (Index row = 0; row < outputs.rows(); ++row) {
    const auto member = static_cast<std::size_t>(row % group);
    const float* length_of = outputs.data() + row * width;
    if (distance_of(row) == Distance::projected) {
      kernels::multiply(1, width, depth, outputs.data() + row * width, width, 1,
                        shared.factors_transposed[member].data(), width, projected_output.data(), width);
      kernels::multiply(1, width, depth, projected_output.data(), width, 1, shared.factors[member].data(), width,
                        references.data() + row * width, width);
      length_of = projected_output.data();
    }
    double sum = 0;
    for (Index d = 0; d < depth; ++d) sum += static_cast<double>(length_of[d]) * static_cast<double>(length_of[d]);
    squared[static_cast<std::size_t>(row)] = static_cast<float>(sum);
    batch.output_lengths[static_cast<std::size_t>(row)] = static_cast<float>(std::sqrt(sum));
  }

  const bool new_plain = plain && shared.value_lengths.size() == 0;
  const bool new_projected = projected && shared.projected_lengths.size() == 0;
  const Index lengths_of_member = padded(entries_ - first_block_);
  if (new_plain) shared.value_lengths = Buffer(lengths_of_member);
  if (new_projected) shared.projected_lengths = Buffer(lengths_of_member * group);
  Buffer memory(kBlock * width);
  Buffer panels(kBlock * depth);
  Buffer products(outputs.rows() * kPanel);
  for (Index first = first_block_; first < entries_; first += kBlock) {
    const Index block = std::min(kBlock, entries_ - first);
    const float* rows = value_rows(first, block, memory);
    kernels::to_panels(rows, width, block, depth, panels.data());
    for (Index at = first; at < first + block; at += kPanel) {
      const float* panel = panels.data() + (at - first) * depth;
      const Index place = at - first_block_;
      if (new_plain) kernels::squared_lengths(panel, depth, shared.value_lengths.data() + place);
      for (Index member = 0; new_projected && member < group; ++member) {
        kernels::squared_lengths_after(shared.factors[static_cast<std::size_t>(member)].data(), width, panel, depth,
                                       shared.projected_lengths.data() + member * lengths_of_member + place);
      }
      kernels::multiply(outputs.rows(), kPanel, depth, references.data(), width, 1, panel, kPanel, products.data(),
                        kPanel);
      for (Index row = 0; row < outputs.rows(); ++row) {
        const Index member = row % group;
        const bool through = distance_of(row) == Distance::projected;
        const float* lengths =
            (through ? shared.projected_lengths.data() + member * lengths_of_member : shared.value_lengths.data()) +
            place;
        float* out = batch.distance.data() + row * batch.stride + place;
        const bool cancelled = kernels::distances(lengths, products.data() + row * kPanel,
                                                  squared[static_cast<std::size_t>(row)], kCancelled, kPanel, out);
        for (Index n = 0; cancelled && n < std::min(kPanel, first + block - at); ++n) {
          if (out[n] >= 0) continue;
          const Eigen::RowVectorXf difference =
              outputs.row(row).head(depth) -
              Eigen::Map<const Eigen::RowVectorXf>(rows + (at - first + n) * width, depth);
          out[n] =
              through
                  ? (shared.factors[static_cast<std::size_t>(member)].leftCols(depth) * difference.transpose()).norm()
                  : difference.norm();
        }
      }
    }
  }
  const Index measured = entries_ - first_block_;
  count_operations(2 * measured * outputs.rows() * depth +
                   (new_projected ? measured * group * depth * (depth + 1) : 0) +
                   (new_plain ? 2 * measured * depth : 0));
}

CombinedAttention Head::combined_attention(int member, const WindowCombination& asked) const {
  using Distance = WindowCombination::Distance;
  WindowCombination combination = asked;
  if (!has_output_projection_ && combination.distance == Distance::projected) combination.distance = Distance::values;
  for (int attempt = 0;; ++attempt) {
    const auto found = shared_->places.find(combination);
    if (found != shared_->places.end()) {
      const auto& [batch, place] = found->second;
      const Index row = place * shape_.group_size + member;
      CombinedAttention result;
      result.attention = batch->attention.part(row * batch->stride + first_row_ - batch->origin, rows());
      if (combination.distance != Distance::none) {
        result.distance = batch->distance.part(row * batch->stride + first_row_ - first_block_,
                                               std::max<Index>(0, output_end(combination) - first_row_));
        result.output_length = batch->output_lengths[static_cast<std::size_t>(row)];
      }
      result.memory = batch;
      return result;
    }
    if (attempt > 0) throw Error("a combination of attention was computed and cannot be found");
    prepare({&combination, 1});
  }
}

// The first entry that o = Σ a_n v_n does not run over.
Index Head::output_end(const WindowCombination& combination) const {
  if (combination.whole_cache) return entries_;
  return visible(shape_.next_position - static_cast<int>(combination.weights.size()) - 1).second;
}

std::span<const float> Head::attention(int member, int age) const {
  if (age == 0) {
    const std::span<const float> newest = source_.newest_attention(member);
    if (!newest.empty()) return newest;
  }
  const WindowPass& pass = window_pass(age + 1);
  Buffer& row = shared_->rows[{member, age}];
  if (row.size() == 0) {
    row = Buffer(rows());
    pass.copy_row(member, age, first_row_, row.part(0, row.size()));
  }
  return row.part(0, row.size());
}

void Head::copy_attention(int member, int age, std::span<float> out) const {
  if (age == 0) {
    const std::span<const float> newest = source_.newest_attention(member);
    if (!newest.empty()) {
      std::ranges::copy(newest, out.begin());
      return;
    }
  }
  window_pass(age + 1).copy_row(member, age, first_row_, out);
}

const std::vector<float>& Head::accumulated_attention(int member) const {
  auto& accumulated = shared_->accumulated[static_cast<std::size_t>(member)];
  if (accumulated) return *accumulated;
  accumulated = source_.attention_mass(member);
  if (accumulated) {
    accumulated->erase(accumulated->begin(), accumulated->begin() + first_row_);
    return *accumulated;
  }
  if (shared_->window < shape_.next_position) {
    throw Error(fmt::format(
        "accumulated attention needs the recorded attention mass (only for an eviction at the end of the prompt) or "
        "all {} queries before the eviction, and the trace holds the last {}; capture with --queries all",
        shape_.next_position, shared_->window));
  }
  std::vector<double> sums(static_cast<std::size_t>(rows()), 0.0);
  // Queries before the first row see none, later ones maybe entries before it too.
  const int first_query = rows() > 0 ? positions()[0] : shape_.next_position;
  const Index first_key = visible(first_query).first;
  const Matrix more_keys = first_key < first_row_ ? entry_keys().bottomRows(entries_ - first_key) : Matrix();
  const Matrix& seen_keys = first_key < first_row_ ? more_keys : keys();
  // As few queries at a time as attend together: all of them are too many to be kept.
  for (int first = first_query; first < shape_.next_position; first += kRowBlock) {
    const auto seen = [&](Index query) {
      const auto [first_seen, end_seen] = visible(first + static_cast<int>(query));
      return std::pair(first_seen - first_key, end_seen - first_key);
    };
    const auto add = [&](Index /*query*/, std::span<const float> weights) {
      const auto held = weights.subspan(static_cast<std::size_t>(first_row_ - first_key));
      for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(held[n]);
    };
    attend(member, source_.queries(member, first, std::min(kRowBlock, shape_.next_position - first)), seen_keys, seen,
           add);
  }
  accumulated.emplace(sums.begin(), sums.end());
  return *accumulated;
}

const std::vector<float>& Head::evaluation_attention(int member) const {
  auto& kept = shared_->evaluation[static_cast<std::size_t>(member)];
  if (kept) return *kept;
  const std::span<const int> positions = source_.evaluation_positions();
  if (positions.empty()) throw Error("an oracle needs evaluation queries, and there are none");
  std::vector<double> sums(static_cast<std::size_t>(rows()), 0.0);
  attend(
      member, source_.evaluation_queries(member), source_.evaluation_keys(),
      [&](Index query) {
        const Index position = positions[static_cast<std::size_t>(query)];
        return std::pair(shape_.rule.first_visible(position), position + 1);
      },
      [&](Index /*query*/, std::span<const float> weights) {
        for (std::size_t n = 0; n < sums.size(); ++n) {
          sums[n] += static_cast<double>(weights[static_cast<std::size_t>(shape_.positions[static_cast<int>(n)])]);
        }
      });
  return kept.emplace(sums.begin(), sums.end());
}

}  // namespace kvreplay
