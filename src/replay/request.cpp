#include "replay/request.h"

namespace kvreplay {

ReplayRequest make_request(const std::vector<std::string>& specs, const std::vector<std::string>& capacities,
                           std::optional<Granularity> granularity) {
  ReplayRequest request;
  for (const std::string& spec : specs) request.policies.push_back(make_policy(spec));
  for (const std::string& capacity : capacities) request.capacities.push_back(CapacityRequest::parse(capacity));
  request.granularity = granularity;
  return request;
}

}  // namespace kvreplay
