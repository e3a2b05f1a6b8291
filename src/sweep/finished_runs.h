// The finished runs of a live command, on disk, so that nothing that a model computed is ever lost.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "replay/result.h"
#include "sweep/configuration.h"
#include "sweep/unit_store.h"

namespace kvreplay {

/// A folder that holds the results of every prompt that is done, and the manifest of what was asked for. Several
/// processes may save runs at once, each run one of them.
class FinishedRuns {
 public:
  /// Of a command whose results will be `output`. Touches nothing.
  FinishedRuns(const std::filesystem::path& output, SweepIdentity identity)
      : store_(output, none_, std::move(identity)) {}

  /// As UnitStore::open().
  void open(bool resume) { store_.open(resume); }
  const std::filesystem::path& folder() const { return store_.folder(); }

  /// Stores what came of the prompt `run`: complete or not at all. Throws Error.
  void save(int run, const TraceReplay& replay) const;

  /// What save() stored, of a run by `model`; nothing where none is or where it is damaged, which `notes` tells.
  std::optional<TraceReplay> read(int run, const ModelInfo& model, std::vector<std::string>& notes) const;

  /// Whether none is stored, damaged or not.
  bool empty() const;

  /// As UnitStore::remove().
  void remove() { store_.remove(); }

 private:
  std::filesystem::path results_of(int run) const;
  std::filesystem::path kept_of(int run) const;

  std::vector<TraceReplay> none_;  // units are not what is stored
  UnitStore store_;
};

}  // namespace kvreplay
