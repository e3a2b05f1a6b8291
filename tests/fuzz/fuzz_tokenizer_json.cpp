// A tokenizer.json is either refused with an Error or tokenizes any text: its tokens stand for ranges of the text, and
// what it decodes and names is valid UTF-8. The input is the file, a zero byte, and a text.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "base/printable.h"
#include "tracer/tokenizer/tokenizer_json.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = input.find('\0');
  const std::string_view text = zero == std::string_view::npos ? "a b <s>" : input.substr(zero + 1);
  try {
    const auto tokenizer = kvreplay::tracer::parse_tokenizer_json(input.substr(0, zero));
    const auto encoding = tokenizer->encode(text, true);
    if (encoding.bytes.size() != encoding.ids.size()) std::abort();
    for (const auto& [begin, end] : encoding.bytes) {
      if (begin > end || end > text.size()) std::abort();
    }
    if (kvreplay::find_invalid_utf8(tokenizer->decode(encoding.ids))) std::abort();
    for (const std::int32_t id : encoding.ids) {
      if (kvreplay::find_invalid_utf8(tokenizer->piece(id))) std::abort();
    }
  } catch (const kvreplay::Error&) {
  }
  return 0;
}
