// Whatever bytes a file of results or kept sets consists of, reading it ends in numbers or in an Error. What
// fuzz_trace_reader says of HDF5 1.10 holds here too.
#include <hdf5.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "replay/results_reader.h"
#include "scratch_file.h"

namespace {

using namespace kvreplay;

template <class Action>
void attempt(const Action& action) {
  try {
    action();
  } catch (const Error&) {
    // The one way in which reading may fail.
  }
}

void read_results(const std::string& path) {
  const ResultsReader reader(path);
  for (std::size_t i = 0; i < reader.results().size(); ++i) {
    for (const MeasureTraits& measure : measures()) {
      attempt([&] { static_cast<void>(reader.read(i, measure.measure)); });
    }
  }
  for (std::size_t i = 0; i < reader.overlaps().size(); ++i) {
    attempt([&] { static_cast<void>(reader.read_overlap(i)); });
  }
}

void read_kept_sets(const std::string& path) {
  const KeptSetsReader reader(path);
  for (std::size_t i = 0; i < reader.kept().size(); ++i) {
    attempt([&] { static_cast<void>(reader.read(i, 2)); });
  }
}

}  // namespace

extern "C" const char* __asan_default_options() { return "detect_leaks=0:allocator_may_return_null=1"; }

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static ScratchFile scratch;
  const std::string& path = scratch.fill(data, size);
  attempt([&] { read_results(path); });
  attempt([&] { read_kept_sets(path); });
  const auto guard = hdf5::lock();
  if (H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL) != 0) std::abort();
  return 0;
}
