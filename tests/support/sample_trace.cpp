#include "support/sample_trace.h"

#include <gtest/gtest.h>
#include <hdf5.h>

#include <fstream>
#include <random>
#include <sstream>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "trace/check.h"
#include "trace/writer.h"

namespace kvreplay::test {

namespace {

using hdf5::Handle;

void require(bool success) {
  if (!success) throw std::runtime_error("the test's own use of HDF5 failed: " + hdf5::last_error());
}

void set_attribute(std::int64_t file, const std::string& object, const std::string& name, hid_t type,
                   const void* value) {
  const Handle owner(H5Oopen(file, object.c_str(), H5P_DEFAULT));
  if (H5Aexists(owner.id(), name.c_str()) > 0) H5Adelete(owner.id(), name.c_str());
  const Handle space(H5Screate(H5S_SCALAR));
  const Handle attribute(H5Acreate2(owner.id(), name.c_str(), type, space.id(), H5P_DEFAULT, H5P_DEFAULT));
  require(attribute && H5Awrite(attribute.id(), type, value) >= 0);
}

void replace(std::int64_t file, const std::string& path, const std::vector<Index>& shape, hid_t stored, hid_t memory,
             const void* values) {
  if (H5Lexists(file, path.c_str(), H5P_DEFAULT) > 0) require(H5Ldelete(file, path.c_str(), H5P_DEFAULT) >= 0);
  const std::vector<hsize_t> extent(shape.begin(), shape.end());
  const Handle space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr));
  const Handle dataset(H5Dcreate2(file, path.c_str(), stored, space.id(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  require(dataset && H5Dwrite(dataset.id(), memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0);
}

}  // namespace

TraceInfo sample_info() {
  TraceInfo info;
  info.model.name = "sample";
  info.model.architecture = "llama";
  info.model.num_layers = 2;
  info.model.num_attention_heads = 4;
  info.model.num_key_value_heads = 2;
  info.model.head_dim = 8;
  info.model.hidden_size = 24;
  info.model.rope_theta = 10000;
  info.model.softmax_scale = 0.35355339059327373;
  info.created_by = "a test";
  info.created_at = "2026-01-02T03:04:05Z";
  info.source = "sample_trace.cpp, naïve text";
  for (int i = 0; i < 12; ++i) {
    info.token_ids.push_back(100 + 7 * i);
    info.token_pieces.push_back(i == 3 ? "é" : "piece" + std::to_string(i));
  }
  info.prompt_length = 9;
  info.turn_starts = {0, 4};
  info.query_positions = {5, 7, 8, 9, 11};
  info.spans = {{2, 4, "needle"}, {6, 7, "question"}};
  info.layers = layers_with_windows(info.model, std::vector<int>{0, 4});
  return info;
}

std::vector<float> sample_values(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(static_cast<int>(generator() % 65) - 32) / 16;
  return values;
}

std::vector<float> sample_tensor(const TraceInfo& info, int layer, HeadTensor tensor) {
  const auto count = static_cast<std::size_t>(hdf5::elements(shape_of(info, layer, tensor)));
  return sample_values(count, static_cast<unsigned>(10 * layer) + static_cast<unsigned>(tensor));
}

std::vector<float> sample_output_projection(const TraceInfo& info, int layer) {
  const auto count = info.model.hidden_size * info.model.num_attention_heads * info.model.head_dim;
  return sample_values(static_cast<std::size_t>(count), static_cast<unsigned>(10 * layer) + 4);
}

std::vector<float> sample_attention_mass(const TraceInfo& info, int layer) {
  const auto count = info.model.num_attention_heads * info.prompt_length;
  return sample_values(static_cast<std::size_t>(count), static_cast<unsigned>(10 * layer) + 5);
}

std::vector<int> windows_of(const TraceInfo& info) {
  std::vector<int> windows;
  for (const LayerInfo& layer : info.layers) windows.push_back(layer.rule.sliding_window);
  return windows;
}

void write_sample(const std::filesystem::path& path, DType type, const TraceInfo& info) {
  TraceWriter writer(path, info, type);
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      writer.write(layer, tensor, sample_tensor(info, layer, tensor));
    }
    writer.write_output_projection(layer, sample_output_projection(info, layer));
    writer.write_attention_mass(layer, sample_attention_mass(info, layer));
  }
  writer.finish();
}

void edit(const std::filesystem::path& path, const std::function<void(std::int64_t)>& change) {
  const auto guard = hdf5::lock();
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  H5Pset_libver_bounds(access.id(), H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  const Handle file(H5Fopen(path.c_str(), H5F_ACC_RDWR, access.id()));
  require(static_cast<bool>(file));
  change(file.id());
}

void set_int(std::int64_t file, const std::string& object, const std::string& name, std::int64_t value) {
  set_attribute(file, object, name, H5T_NATIVE_INT64, &value);
}

void set_double(std::int64_t file, const std::string& object, const std::string& name, double value) {
  set_attribute(file, object, name, H5T_NATIVE_DOUBLE, &value);
}

void set_string(std::int64_t file, const std::string& object, const std::string& name, const std::string& value) {
  const Handle type(H5Tcopy(H5T_C_S1));
  H5Tset_size(type.id(), H5T_VARIABLE);
  const char* text = value.c_str();
  set_attribute(file, object, name, type.id(), &text);
  // The digest of what stood there would tell of the change before whatever is tested.
  const Handle owner(H5Oopen(file, object.c_str(), H5P_DEFAULT));
  if (H5Aexists(owner.id(), "attributes_xxh64") > 0) H5Adelete(owner.id(), "attributes_xxh64");
}

void remove_attribute(std::int64_t file, const std::string& object, const std::string& name) {
  require(H5Adelete_by_name(file, object.c_str(), name.c_str(), H5P_DEFAULT) >= 0);
}

void make_group(std::int64_t file, const std::string& path) {
  const Handle group(H5Gcreate2(file, path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  require(static_cast<bool>(group));
}

void remove(std::int64_t file, const std::string& path) { require(H5Ldelete(file, path.c_str(), H5P_DEFAULT) >= 0); }

void replace_floats(std::int64_t file, const std::string& path, const std::vector<Index>& shape,
                    const std::vector<float>& values) {
  replace(file, path, shape, H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, values.data());
}

void replace_ints(std::int64_t file, const std::string& path, const std::vector<std::int64_t>& values) {
  replace(file, path, {static_cast<Index>(values.size())}, H5T_STD_I64LE, H5T_NATIVE_INT64, values.data());
}

void poke(std::int64_t file, const std::string& path, const std::vector<Index>& at, float value) {
  const Handle dataset(H5Dopen2(file, path.c_str(), H5P_DEFAULT));
  const Handle space(H5Dget_space(dataset.id()));
  const std::vector<hsize_t> first(at.begin(), at.end());
  const std::vector<hsize_t> one(at.size(), 1);
  H5Sselect_hyperslab(space.id(), H5S_SELECT_SET, first.data(), nullptr, one.data(), nullptr);
  const Handle memory(H5Screate(H5S_SCALAR));
  require(H5Dwrite(dataset.id(), H5T_NATIVE_FLOAT, memory.id(), space.id(), H5P_DEFAULT, &value) >= 0);
}

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string open_error(const std::filesystem::path& path) {
  try {
    const TraceReader reader(path);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void read_everything(const TraceReader& reader) {
  const TraceInfo& info = reader.info();
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    if (!of.attends) continue;
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      const std::vector<Index> shape = shape_of(info, layer, tensor);
      for (int head = 0; head < shape[0]; ++head) {
        static_cast<void>(reader.read(layer, tensor, head, 0, shape[1]));
      }
    }
    for (int head = 0; head < of.num_attention_heads; ++head) {
      if (of.output_gate_dim > 0) static_cast<void>(reader.read_output_gate(layer, head));
      if (reader.has_output_projection(layer)) static_cast<void>(reader.read_output_projection(layer, head));
      if (reader.has_attention_mass(layer)) static_cast<void>(reader.read_attention_mass(layer, head));
    }
  }
}

}  // namespace kvreplay::test
