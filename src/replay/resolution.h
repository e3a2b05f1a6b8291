// What a replay is asked for, resolved for one trace: every policy at every capacity.
#pragma once

#include <string>
#include <vector>

#include "policy/setting.h"
#include "replay/left_out.h"
#include "replay/request.h"
#include "trace/captured_run.h"

namespace kvreplay {

/// A setting of a replay: what one ReplayResult is about.
struct ReplaySetting {
  Setting setting;                 ///< its policy lives in the request
  bool rank_agreement = false;     ///< whether its scores are compared with the oracle's importance
  bool nothing_to_choose = false;  ///< see ReplayResult
};

/// Every policy at every capacity for an eviction at `eviction_position`, which `run` tells from those of others,
/// policies in the order given, capacities within. The request must outlive them. What cannot be replayed is
/// `left_out`: where a capacity is below what a policy protects, a pattern or a budget cannot be drawn, heads cannot
/// share as asked, or a policy needs what the trace does not hold or was made for another run. `notes` receives what a
/// reader of the numbers has to know, what is left out included.
std::vector<ReplaySetting> settings_for(const CapturedRun& trace, const ReplayRequest& request, int eviction_position,
                                        const RunIdentity& run, std::vector<std::string>& notes, LeftOut& left_out);

}  // namespace kvreplay
