#include "cli/launched_ranks.h"

#ifdef KVREPLAY_MPI
#include <mpi.h>
#endif
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"

namespace kvreplay::cli {

#ifdef KVREPLAY_MPI
namespace {

// MPI's own answer to an error is to end all processes, which is what should happen; so its return codes are not looked
// at.
class MpiRanks final : public Ranks {
 public:
  MpiRanks() {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
    MPI_Comm node = MPI_COMM_NULL;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node);
    MPI_Comm_size(node, &size_on_node_);
    MPI_Comm_free(&node);
  }

  ~MpiRanks() override {
    receive_stops();
    MPI_Finalize();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int size_on_node() const override { return size_on_node_; }

  void barrier() override { MPI_Barrier(MPI_COMM_WORLD); }

  std::string from_first(const std::string& text) override { return from(0, text); }

  std::string first_failure(const std::string& message) override {
    const int mine = message.empty() ? size_ : rank_;
    int lowest = size_;
    MPI_Allreduce(&mine, &lowest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    return lowest == size_ ? std::string() : from(lowest, message);
  }

  // Empty messages are sent at once and need no buffer.
  void announce_stop() override {
    for (int other = 0; other < size_; ++other) {
      if (other == rank_) continue;
      MPI_Request request = MPI_REQUEST_NULL;
      MPI_Isend(nullptr, 0, MPI_BYTE, other, kStopTag, MPI_COMM_WORLD, &request);
      MPI_Request_free(&request);
    }
  }

  bool others_stopped() override {
    receive_stops();
    return stopped_;
  }

 private:
  static constexpr int kStopTag = 1;

  std::string from(int root, const std::string& text) {
    int length = static_cast<int>(text.size());
    MPI_Bcast(&length, 1, MPI_INT, root, MPI_COMM_WORLD);
    std::vector<char> bytes(text.begin(), text.end());
    bytes.resize(static_cast<std::size_t>(length));
    MPI_Bcast(bytes.data(), length, MPI_BYTE, root, MPI_COMM_WORLD);
    return {bytes.begin(), bytes.end()};
  }

  void receive_stops() {
    int there = 0;
    MPI_Status status;
    while (MPI_Iprobe(MPI_ANY_SOURCE, kStopTag, MPI_COMM_WORLD, &there, &status) == MPI_SUCCESS && there != 0) {
      MPI_Recv(nullptr, 0, MPI_BYTE, status.MPI_SOURCE, kStopTag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      stopped_ = true;
    }
  }

  int rank_ = 0;
  int size_ = 1;
  int size_on_node_ = 1;
  bool stopped_ = false;
};

}  // namespace
#endif

std::unique_ptr<Ranks> launched_ranks() {
  // Alone, MPI is not needed, and starting it without a launcher takes longer than many a sweep.
  if (launched_rank().size == 1) return std::make_unique<SingleProcess>();
#ifdef KVREPLAY_MPI
  return std::make_unique<MpiRanks>();
#else
  throw UsageError(
      "several processes were started, and this kvreplay is built without MPI; start one, or build with "
      "-DKVREPLAY_MPI=ON (see docs/sweeps.md)");
#endif
}

int threads_of(int asked, const Ranks& ranks) {
  if (asked > 0) return asked;
  const int usable = omp_get_max_threads();
  const bool said = std::getenv("OMP_NUM_THREADS") != nullptr;
  const auto processors = static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
  // Where the launcher has bound this process to some of the processors, they are its share.
  if (said || usable < processors) return usable;
  return std::max(1, usable / ranks.size_on_node());
}

}  // namespace kvreplay::cli
