#include "sweep/finished_runs.h"

#include <fmt/format.h>

#include "base/error.h"
#include "replay/results_file.h"
#include "replay/stored_replay.h"

namespace kvreplay {

std::filesystem::path FinishedRuns::results_of(int run) const { return folder() / fmt::format("run-{}.h5", run); }

std::filesystem::path FinishedRuns::kept_of(int run) const { return folder() / fmt::format("run-{}.kept", run); }

void FinishedRuns::save(int run, const TraceReplay& replay) const {
  // The results last: where they are, all is there.
  write_kept_sets(kept_of(run), {replay});
  write_results(results_of(run), {replay}, {});
}

bool FinishedRuns::empty() const {
  std::error_code failure;
  for (const auto& entry : std::filesystem::directory_iterator(folder(), failure)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("run-") && name.ends_with(".h5")) return false;
  }
  return true;
}

std::optional<TraceReplay> FinishedRuns::read(int run, const ModelInfo& model, std::vector<std::string>& notes) const {
  std::error_code failure;
  if (!std::filesystem::exists(results_of(run), failure)) return std::nullopt;
  try {
    return read_replay(model, results_of(run), kept_of(run));
  } catch (const Error& error) {
    notes.push_back(fmt::format("{}; it is done again", error.what()));
    return std::nullopt;
  }
}

}  // namespace kvreplay
