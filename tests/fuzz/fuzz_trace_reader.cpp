// Whatever bytes a trace consists of, reading it ends in a result or in an Error.
//
// The seeds are in the file format that writers of traces use, whose metadata has checksums. HDF5 1.10 itself reads
// beyond its buffers on damaged metadata of the older format without them (attribute messages, members of compound
// types); nothing here can prevent that, and `inspect` warns of such files.
#include <hdf5.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "scratch_file.h"
#include "trace/check.h"
#include "trace/inspection.h"
#include "trace/reader.h"

namespace {

using namespace kvreplay;

// Attention over a few positions is all that a run has time for.
bool is_small(const TraceInfo& info) {
  return info.num_tokens() <= 4096 && info.model.hidden_size <= 4096 && info.model.num_layers <= 16 &&
         std::ranges::all_of(info.layers, [](const LayerInfo& layer) {
           return layer.key_dim <= 1024 && layer.value_dim <= 1024 && layer.num_attention_heads <= 64;
         });
}

void read_all(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    if (!of.attends) continue;
    static_cast<void>(trace.rotary(layer));
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      const std::vector<Index> shape = shape_of(info, layer, tensor);
      for (int head = 0; head < shape[0]; ++head) {
        trace.prefetch(layer, tensor, head);
        static_cast<void>(trace.read(layer, tensor, head, 0, shape[1]));
      }
    }
    if (trace.has_output_projection(layer)) {
      const Index count = std::min(info.model.hidden_size, 16);
      std::vector<float> rows(static_cast<std::size_t>(count * of.num_attention_heads * of.value_dim));
      trace.read_projection_rows(layer, info.model.hidden_size - count, count, rows.data());
    }
    for (int head = 0; head < of.num_attention_heads; ++head) {
      if (trace.has_output_projection(layer)) static_cast<void>(trace.read_output_projection(layer, head));
      if (trace.has_attention_mass(layer)) static_cast<void>(trace.read_attention_mass(layer, head));
      if (of.output_gate_dim > 0) static_cast<void>(trace.read_output_gate(layer, head));
    }
  }
}

void exercise(const std::string& path) {
  const TraceReader trace(path);
  static_cast<void>(trace.stored_tensors());
  if (!is_small(trace.info())) return;
  try {
    read_all(trace);
  } catch (const Error&) {
    // Digests are compared all the same.
  }
  static_cast<void>(inspect(trace, true));
}

}  // namespace

// HDF5 leaks memory of its own on some damaged inputs, and asks for more than there is on others, which ends in an
// error like any other. What reading leaves open is counted below instead.
extern "C" const char* __asan_default_options() { return "detect_leaks=0:allocator_may_return_null=1"; }

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static ScratchFile scratch;
  try {
    exercise(scratch.fill(data, size));
  } catch (const Error&) {
    // The one way in which reading may fail.
  }
  const auto guard = hdf5::lock();
  if (H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL) != 0) std::abort();
  return 0;
}
