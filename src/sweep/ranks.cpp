#include "sweep/ranks.h"

#include <charconv>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <utility>

namespace kvreplay {
namespace {

std::optional<int> number_in(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return std::nullopt;
  const std::string_view text = value;
  int number = 0;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (failure != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

}  // namespace

LaunchedRank launched_rank() {
  // Open MPI, and what MPICH, Intel MPI and Slurm set.
  for (const auto& [rank, size] : {std::pair{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
                                   std::pair{"PMI_RANK", "PMI_SIZE"}, std::pair{"PMIX_RANK", "SLURM_STEP_NUM_TASKS"}}) {
    const auto number = number_in(rank);
    const auto count = number_in(size);
    if (number && count) return {*number, *count};
  }
  return {};
}

}  // namespace kvreplay
