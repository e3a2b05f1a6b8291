// A matrix product written with Highway, to compare with those of libraries. Operands are float32.
#pragma once

#include "base/matrix.h"

namespace kvreplay::benchmarks {

/// Columns of a panel: four registers of AVX-512.
inline constexpr Index kPanelColumns = 64;

/// A matrix with any two strides: element (i, j) is data[i * row_stride + j * column_stride].
struct Strided {
  const float* data;
  Index row_stride;
  Index column_stride;
};

/// The right operand, whose columns come in panels of kPanelColumns: row k of panel p starts at
/// data + p * panel_stride + k * row_stride. With panels in one piece, [columns / 64][depth][64], the strides are
/// depth * 64 and 64; a row-major matrix as it lies has the strides 64 and its number of columns.
struct Panels {
  const float* data;
  Index panel_stride;
  Index row_stride;
};

/// Writes b [depth, columns] as panels [columns / 64][depth][64]. One of b's strides must be 1, `columns` a multiple of
/// 64, and `depth` one of 4 unless b's rows lie in one piece.
void pack(const Strided& b, Index depth, Index columns, float* panels);

/// c [rows, columns] = a [rows, depth] · b [depth, columns], c row-major and in one piece; `columns` is a multiple
/// of 64.
void multiply(const Strided& a, const Panels& b, Index rows, Index depth, Index columns, float* c);

/// What multiply() runs on: the name of Highway's target.
const char* instruction_set();

}  // namespace kvreplay::benchmarks
