#include "base/memory.h"

#include <atomic>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "base/printable.h"

namespace kvreplay {
namespace {

std::atomic<bool> gives_back = false;

// A line of /proc/self/status, such as "VmRSS:      1234 kB".
Index status_of(std::string_view key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    Index kilobytes = 0;
    if (word == key && status >> kilobytes) return kilobytes * 1024;
    status.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return 0;
}

}  // namespace

Index resident_memory() { return status_of("VmRSS:"); }

Index peak_resident_memory() { return status_of("VmHWM:"); }

void give_memory_back() {
#ifdef __GLIBC__
  // Said once, they stay: otherwise the first large block that is freed lets the C library keep all that are smaller.
  ::mallopt(M_MMAP_THRESHOLD, 64 << 10);
  ::mallopt(M_TRIM_THRESHOLD, 64 << 10);
  gives_back = true;
#endif
}

void trim_memory() {
#ifdef __GLIBC__
  if (gives_back) ::malloc_trim(0);
#endif
}

std::string enough_text(Index bytes) {
  Index unit = 1;
  while (bytes / unit >= 1024) unit *= 1024;
  const Index tenths = (10 * bytes + unit - 1) / unit;
  return size_text((tenths * unit + 9) / 10);
}

}  // namespace kvreplay
