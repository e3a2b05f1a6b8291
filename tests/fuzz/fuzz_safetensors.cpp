// A safetensors header is either refused with an Error or gives tensors that lie inside the file.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "base/error.h"
#include "tracer/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    for (const auto& [name, entry] : kvreplay::tracer::parse_safetensors(file, "input")) {
      if (entry.data.data() < file.data() || entry.data.data() + entry.data.size() > file.data() + file.size()) {
        std::abort();
      }
    }
  } catch (const kvreplay::Error&) {
  }
  return 0;
}
