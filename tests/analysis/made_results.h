// Results with numbers of one's own, as a replay would have written them.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "replay/replay.h"

namespace kvreplay::test {

/// A trace at one eviction position, to which results are added.
struct MadeReplay {
  std::string trace = "a.h5";
  std::string digest = {};  ///< empty: that of the name
  int layers = 2;
  int query_heads = 4;
  int kv_heads = 2;
  int eviction_position = 100;
  int queries = 8;         ///< evaluation queries
  int evaluate_from = -1;  ///< position of the first of them; −1: the eviction
  std::vector<Span> spans = {};
  std::vector<std::string> notes = {};

  TraceReplay replay() const;
};

/// Numbers of a result by layer, query head (of layer errors: −1) and query.
using MadeNumbers = std::function<double(int layer, int head, int query)>;

/// Adds a result that has these layer errors, and head errors where `head_error` is given. It keeps the first
/// `capacity` positions; capacity 0: everything.
ReplayResult& add_result(TraceReplay& replay, const std::string& policy, int capacity, const MadeNumbers& layer_error,
                         const MadeNumbers& head_error = {});

/// Adds to a result what the model loses with it: KL divergences by query.
void add_loss(ReplayResult& result, const std::function<double(int query)>& divergence);

/// Takes away all that a replay measures, as a live run that only looks at the model's loss does.
void remove_layers(ReplayResult& result);

/// Writes results of such replays.
void write_made(const std::filesystem::path& path, const std::vector<TraceReplay>& replays);

}  // namespace kvreplay::test
