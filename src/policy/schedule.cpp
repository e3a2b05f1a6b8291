#include "policy/schedule.h"

#include <algorithm>
#include <cmath>

namespace kvreplay {

int Schedule::grow(int asked, int protected_last) {
  if (compression == 0) return 0;
  const int growth = asked - protected_last;
  slack = (compression - 1) * growth;
  return growth;
}

bool Schedule::is_full(int rows, int capacity) const {
  const int above = when_full ? 0 : std::max(slack, 1);
  const int least = std::max(capacity + above, static_cast<int>(std::ceil(burst * capacity)));
  return rows + coming() >= least;
}

bool Schedule::is_due(int position, int last, int rows, bool ends_turn) const {
  if (interval == kOnce) return false;
  switch (phase) {
    case Phase::since_last:
      return position - last >= interval;
    case Phase::position:
      return (position + 1 - remainder) % interval == 0;
    case Phase::rows:
      return rows % interval == 0;
    case Phase::turns:
      return ends_turn;
  }
  return false;
}

}  // namespace kvreplay
