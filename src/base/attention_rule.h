// How the queries of a layer attend: which keys they see, and what becomes of a product q·k.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "base/matrix.h"

namespace kvreplay {

/// The rule of one layer. A query sees itself and what is before it, as far back as first_visible(); its attention is
/// softmax(bent(softmax_scale · q·k)) over what it sees, bent(x) being c·tanh(x/c) for a cap c and x otherwise.
struct AttentionRule {
  double softmax_scale = 1;           ///< what q·k is multiplied by
  double attn_logit_softcapping = 0;  ///< c; 0: none
  int sliding_window = 0;             ///< keys that a query sees, its own included; 0: all before it
  int attention_chunk_size = 0;       ///< a query sees no key before the last multiple of it; 0: no chunks
  std::vector<float> sinks = {};      ///< [H] a learned logit per query head that stands in the softmax's denominator
                                      ///< with no value; empty: none

  /// The first position that the query at `position` sees. It never falls from one position to the next, so that what
  /// the next query does not see is lost to all later ones.
  Index first_visible(Index position) const {
    const Index by_window = sliding_window > 0 && position >= sliding_window ? position - sliding_window + 1 : Index{0};
    const Index by_chunk = attention_chunk_size > 0 ? position / attention_chunk_size * attention_chunk_size : Index{0};
    return std::max(by_window, by_chunk);
  }

  /// The sink's logit of a query head; −∞, whose exponential is 0, where there is none.
  float sink(int query_head) const {
    return sinks.empty() ? -std::numeric_limits<float>::infinity() : sinks[static_cast<std::size_t>(query_head)];
  }

  bool operator==(const AttentionRule&) const = default;
};

}  // namespace kvreplay
