// The measures of a result, as everything that reads or writes them goes through them.
#pragma once

#include <span>
#include <string_view>

#include "replay/result.h"

namespace kvreplay {

enum class Measure { layer_error, head_error, attention_recall, cosine, span_recall, spearman, kendall };

/// What there is to know about a measure. docs/measures.md defines them.
struct MeasureTraits {
  /// What its numbers are per, beside layer and trace.
  enum class Per { query, head_and_query, head_and_span, head };

  Measure measure;
  std::string_view name;       ///< in files and options: "layer_error"
  std::string_view noun;       ///< in sentences and on axes: "layer error"
  Table ReplayResult::*table;  ///< [L, E], [L, H, E], [L, H, S] or [L, H]; empty where it was not measured
  Per per;
  bool lower_is_better;
  /// Whether a number may be NaN, since there was nothing to measure: it counts in no mean.
  bool may_be_missing = false;
};

/// All of them, layer_error first.
std::span<const MeasureTraits> measures();

const MeasureTraits& traits_of(Measure measure);

/// The measure called `name`. Throws UsageError, naming those that there are.
Measure measure_named(std::string_view name);

}  // namespace kvreplay
