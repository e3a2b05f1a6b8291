// The inner loops of replay and the products of inference, compiled for several instruction sets of which the
// processor's best is chosen when the program runs. Single-threaded. What they calculate, and in which order, does not
// depend on how work was divided; it can differ in the last bits between processors with and without fused
// multiplication and addition.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay::kernels {

/// Positions that lie side by side in a panel. A panel of `depth` rows is depth × kPanel floats, one row after another.
inline constexpr Index kPanel = 64;

/// Columns come in multiples of this, which is the widest vector.
inline constexpr Index kLanes = 16;

/// The next multiple of `unit`.
constexpr Index rounded_up(Index count, Index unit) { return (count + unit - 1) / unit * unit; }

/// c[i, j] = Σ_k a[i·a_row + k·a_step] · b[k·b_row + j] for `rows` × `columns` elements, c[i·c_row + j]; with
/// `accumulate` the sum is added to what is in c. Every element is summed on its own, over k in ascending order, in
/// float32. `columns` is a multiple of kLanes.
void multiply(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
              Index b_row, float* c, Index c_row, bool accumulate = false);

/// c[i, j] += Σ_k …, as multiply() has it, with the sum over k made on its own, from 0.
void add_product(Index rows, Index columns, Index depth, const float* a, Index a_row, Index a_step, const float* b,
                 Index b_row, float* c, Index c_row);

/// Turns `count` rows of `depth` elements, `row` floats apart, into panels: position n of the rows stands in column
/// n % kPanel of panel n / kPanel. What is left of the last panel is filled with zeros.
void to_panels(const float* rows, Index row, Index count, Index depth, float* panels);

/// The same of rows of any type, widened to float32; `row` is counted in elements.
void to_panels(DType type, const std::byte* rows, Index row, Index count, Index depth, float* panels);

/// Lays `count` rows of any type, `row` elements apart, out as the columns of a right operand of multiply_packed(), in
/// float32: kPanel rows take kPanel · `depth` floats, and so do fewer at the end. How they lie within depends on the
/// instruction set.
void pack(DType type, const std::byte* rows, Index row, Index count, Index depth, float* packed);

/// c[i, j] = Σ_k a[i·a_row + k] · b[j, k] for the first `columns` rows of a packed b, summed as by multiply(); with
/// `add` that sum is added to what is in c. `columns` may be any number.
void multiply_packed(Index rows, Index columns, Index depth, const float* a, Index a_row, const float* packed, float* c,
                     Index c_row, bool add);

/// Moves `count` rows of `depth` floats that follow each other apart, so that a row begins every `width` floats, with
/// zeros between them.
void pad_rows(float* rows, Index count, Index depth, Index width);

/// One query's attention over a block of panels. The query's row in panel p begins at `logits` + p · panel_step.
struct AttentionBlock {
  float* logits = nullptr;
  Index panels = 0;
  Index panel_step = 0;
  Index first_visible = 0;  ///< counted from the first position of the block
  Index end_visible = 0;
};

/// Replaces a block's products q·k by exp(l − m), with l the product times `scale`, bent to c·tanh(l/c) for a
/// `softcapping` c > 0, and m the largest of the visible ones; those that are not visible become 0. Returns m (−∞ where
/// nothing is visible) and the sum of the exponentials, added in float32 by kLanes lanes.
struct BlockSoftmax {
  float maximum;
  float sum;
};
BlockSoftmax exponentiate(const AttentionBlock& block, float scale, float softcapping);

/// Queries that attend to the same keys, side by side: a row of logits per key.
struct QueryColumns {
  const std::int32_t* positions = nullptr;      ///< [columns]
  const std::int32_t* first_visible = nullptr;  ///< [columns] of keys; null: each query sees all before it
  Index columns = kPanel;                       ///< queries: a multiple of kLanes; so many floats make a row
  float scale = 1;
  float softcapping = 0;  ///< 0: none
};

/// Turns products q·k with the keys first_key … first_key + count − 1 into logits, those that a query does not see into
/// −∞, and raises maxima[q] to the largest of each column.
void finish_logits(const QueryColumns& queries, Index first_key, Index count, float* products, float* maxima);

/// Replaces each logit of `count` rows of `columns` by exp(logit − maxima[q]).
void exponentiate_columns(Index count, Index columns, const float* maxima, float* logits);

/// lengths[n] = Σ_d panel[d, n]² for the kPanel positions of a panel of `depth` rows.
void squared_lengths(const float* panel, Index depth, float* lengths);

/// lengths[n] = ‖R x_n‖² for the positions x_n of a panel, R being an upper triangular matrix [depth, depth] with `row`
/// floats from row to row.
void squared_lengths_after(const float* factor, Index row, const float* panel, Index depth, float* lengths);

/// out[n] = √(lengths[n] − 2·products[n] + reference): how far x_n is from a reference whose squared length is
/// `reference`. Where the difference is below `share` of what it is the difference of, so that rounding would show,
/// −1 is put instead; returns whether there is such a place.
bool distances(const float* lengths, const float* products, float reference, float share, Index count, float* out);

/// out[i] = scale · Σ_j values[i + j] over j < width, added in their order, for `count` places.
void sliding_sums(const float* values, Index width, float scale, Index count, float* out);

/// out[i] = the largest of values[i] … values[i + width − 1], for `count` places.
void sliding_maxima(const float* values, Index width, Index count, float* out);

/// gram[i, j] += Σ_k x[k, i] · x[k, j] for `rows` rows of `depth` elements, `row` floats apart; `gram` has rows of
/// rounded_up(depth, kLanes) floats, and so have the rows of x at least. Elements below the diagonal's panels are left
/// out.
void add_gram(const float* x, Index row, Index rows, Index depth, float* gram);

/// The positions of the `count` largest of `values`, ascending; among equal ones the earlier. All of them
/// where there are no more. NaN is not allowed.
void largest(std::span<const float> values, Index count, std::vector<std::uint32_t>& positions);

/// Whether one of `values` is NaN.
bool has_nan(std::span<const float> values);

/// The instruction set that was chosen, such as "AVX3".
const char* instruction_set();

}  // namespace kvreplay::kernels
