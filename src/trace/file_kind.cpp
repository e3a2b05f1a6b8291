#include "trace/file_kind.h"

#include <fmt/format.h>

#include "base/printable.h"

namespace kvreplay {

std::string kind_of(const hdf5::File& file) {
  if (!file.has_attribute("/", "format")) return "a file of something else";
  const std::string format = file.read_string("/", "format");
  if (format == "kvreplay-results") return "a file of results, as --output writes it; look at it with kvreplay analyze";
  if (format == "kvreplay-kept") return "a file of kept sets, as --kept writes it";
  if (format == "kvtrace") return "a trace, which a replay makes results of";
  return fmt::format("a file of the format '{}'", printable(format));
}

}  // namespace kvreplay
