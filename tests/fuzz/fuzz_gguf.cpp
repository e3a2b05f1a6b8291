// A GGUF file is either refused with an Error or gives tensors that lie inside the file, each as long as its type and
// shape say, and metadata that can all be read; so can the tensors' numbers.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"
#include "tracer/dequantize.h"
#include "tracer/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvreplay::tracer;
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  const auto expect_inside = [&](const void* begin, std::size_t bytes) {
    const auto* first = static_cast<const std::byte*>(begin);
    if (bytes > 0 && (first < file.data() || first + bytes > file.data() + file.size())) std::abort();
  };
  try {
    const GgufContents contents = parse_gguf(file, "input");
    for (const auto& [name, tensor] : contents.tensors) {
      expect_inside(tensor.data.data(), tensor.data.size());
      kvreplay::Index elements = 1;
      for (const kvreplay::Index dimension : tensor.shape) elements *= dimension;
      const GgmlBlock block = block_of(tensor.type).value();
      if (tensor.data.size() != static_cast<std::size_t>(elements / block.elements * block.bytes)) std::abort();
      if (!can_dequantize(tensor.type)) continue;
      std::vector<float> numbers(static_cast<std::size_t>(elements));
      dequantize(tensor.type, tensor.data.data(), numbers);
    }
    for (const auto& [key, value] : contents.metadata) {
      if (const auto* text = std::get_if<std::string_view>(&value)) expect_inside(text->data(), text->size());
      if (const auto* texts = std::get_if<std::vector<std::string_view>>(&value)) {
        for (const std::string_view text : *texts) expect_inside(text.data(), text.size());
      }
      if (const auto* scalars = std::get_if<GgufScalars>(&value)) {
        for (kvreplay::Index i = 0; i < scalars->size; ++i) static_cast<void>(scalars->at(i));
      }
    }
  } catch (const kvreplay::Error&) {
  }
  return 0;
}
