// A small trace whose numbers follow from its seed, and ways to damage it.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "trace/reader.h"
#include "trace/trace.h"

namespace kvreplay::test {

/// 2 layers, 4 query heads on 2 KV heads of 8 dimensions, hidden size 24, 12 tokens of which 9 are the prompt,
/// 5 captured queries; pieces, turn starts, two spans, and a sliding window on layer 1.
TraceInfo sample_info();

/// `count` values between -2 and 2 that every stored type holds exactly (multiples of 1/16).
std::vector<float> sample_values(std::size_t count, unsigned seed);

/// Queries, keys and values as written by write_sample; outputs are another draw, not their attention.
std::vector<float> sample_tensor(const TraceInfo& info, int layer, HeadTensor tensor);
std::vector<float> sample_output_projection(const TraceInfo& info, int layer);
std::vector<float> sample_attention_mass(const TraceInfo& info, int layer);

/// The sliding window of each layer.
std::vector<int> windows_of(const TraceInfo& info);

void write_sample(const std::filesystem::path& path, DType type = DType::float32,
                  const TraceInfo& info = sample_info());

/// Opens a finished file for change through the HDF5 C API; `file` is its hid_t.
void edit(const std::filesystem::path& path, const std::function<void(std::int64_t file)>& change);

void set_int(std::int64_t file, const std::string& object, const std::string& name, std::int64_t value);
void set_double(std::int64_t file, const std::string& object, const std::string& name, double value);
void set_string(std::int64_t file, const std::string& object, const std::string& name, const std::string& value);
void remove_attribute(std::int64_t file, const std::string& object, const std::string& name);
void make_group(std::int64_t file, const std::string& path);
void remove(std::int64_t file, const std::string& path);

/// Replaces a dataset by one of `shape` with these values, stored as float32 or int32.
void replace_floats(std::int64_t file, const std::string& path, const std::vector<Index>& shape,
                    const std::vector<float>& values);
void replace_ints(std::int64_t file, const std::string& path, const std::vector<std::int64_t>& values);

/// Sets one element of a float dataset.
void poke(std::int64_t file, const std::string& path, const std::vector<Index>& at, float value);

std::string read_bytes(const std::filesystem::path& path);
void write_bytes(const std::filesystem::path& path, const std::string& bytes);

/// What TraceReader says about the file, or "" if it opens.
std::string open_error(const std::filesystem::path& path);

/// Reads all that a trace holds.
void read_everything(const TraceReader& reader);

}  // namespace kvreplay::test
