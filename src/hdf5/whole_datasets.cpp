// Datasets that are read and written whole.
#include <fmt/format.h>
#include <hdf5.h>

#include <cstring>
#include <limits>
#include <utility>

#include "hdf5/hdf5.h"
#include "hdf5/library.h"
#include "hdf5/string_heap.h"

namespace kvreplay::hdf5 {
namespace {

H5T_class_t class_of(const Dataset& dataset) {
  const Handle type(H5Dget_type(dataset.id()));
  return H5Tget_class(type.id());
}

template <class T>
std::vector<T> as_vector(const std::vector<std::byte>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

}  // namespace

std::vector<float> File::read_floats(const std::string& path) const {
  const auto guard = lock();
  const Dataset source = dataset(path);
  if (class_of(source) != H5T_FLOAT) fail(path, "is not of a floating-point type");
  if (!source.float_type()) return as_vector<float>(source.read_whole(H5T_NATIVE_FLOAT, sizeof(float)));
  std::vector<float> values(static_cast<std::size_t>(elements(source.shape())));
  std::vector<std::byte> bytes(values.size() * source.element_size());
  source.read_raw(Shape(source.shape().size(), 0), source.shape(), bytes.data());
  to_float32(*source.float_type(), bytes.data(), values);
  return values;
}

std::vector<std::int64_t> File::read_int64s(const std::string& path) const {
  const auto guard = lock();
  const Dataset source = dataset(path);
  if (class_of(source) != H5T_INTEGER) fail(path, "is not of an integer type");
  return as_vector<std::int64_t>(source.read_whole(H5T_NATIVE_INT64, sizeof(std::int64_t)));
}

std::vector<std::int32_t> File::read_int32s(const std::string& path) const {
  const std::vector<std::int64_t> wide = read_int64s(path);
  std::vector<std::int32_t> values(wide.size());
  for (std::size_t i = 0; i < wide.size(); ++i) {
    if (wide[i] < std::numeric_limits<std::int32_t>::min() || wide[i] > std::numeric_limits<std::int32_t>::max()) {
      fail(path, fmt::format("element {} is out of range: {}", i, wide[i]));
    }
    values[i] = static_cast<std::int32_t>(wide[i]);
  }
  return values;
}

std::vector<std::string> File::read_strings(const std::string& path) const { return dataset(path).read_strings(); }

std::vector<LabelledRange> File::read_labelled_ranges(const std::string& path) const {
  const auto guard = lock();
  if (!is_group(path)) return read_compound_ranges(path);
  const auto length = [&](const std::string& name) {
    const Shape shape = dataset(path + name).shape();
    if (shape.size() != 1) fail(path + name, fmt::format("has {} axes instead of one", shape.size()));
    return shape[0];
  };
  // Before anything is read, so that it costs no more than the shortest.
  const Index count = length("/start");
  for (const char* name : {"/end", "/label"}) {
    if (length(name) == count) continue;
    fail(path, fmt::format("has {} starts, {} ends and {} labels", count, length("/end"), length("/label")));
  }
  const std::vector<std::int64_t> starts = read_int64s(path + "/start");
  const std::vector<std::int64_t> ends = read_int64s(path + "/end");
  std::vector<std::string> labels = read_strings(path + "/label");
  std::vector<LabelledRange> ranges;
  for (std::size_t i = 0; i < starts.size(); ++i) ranges.push_back({starts[i], ends[i], std::move(labels[i])});
  return ranges;
}

std::vector<LabelledRange> File::read_compound_ranges(const std::string& path) const {
  const auto guard = lock();
  const Dataset source = dataset(path);
  const Handle type(H5Dget_type(source.id()));
  if (H5Tget_class(type.id()) != H5T_COMPOUND || source.shape().size() != 1) {
    fail(path, "is neither a group of start, end and label nor a one-dimensional compound dataset of them");
  }
  const auto member = [&](const char* name) {
    const int index = H5Tget_member_index(type.id(), name);
    if (index < 0) fail(path, fmt::format("has no member '{}'", name));
    return Handle(H5Tget_member_type(type.id(), static_cast<unsigned>(index)));
  };
  const Handle label = member("label");
  if (H5Tget_class(member("start").id()) != H5T_INTEGER || H5Tget_class(member("end").id()) != H5T_INTEGER ||
      H5Tget_class(label.id()) != H5T_STRING) {
    fail(path, "'start' and 'end' must be integers and 'label' a string");
  }
  const bool variable = H5Tis_variable_str(label.id()) > 0;
  const Handle reference = reference_type();
  const std::size_t label_size = variable ? kReferenceSize : H5Tget_size(label.id());
  if (label_size == 0 || label_size > source.element_size()) fail(path, "'label' has no size that it could have");
  const std::size_t size = 2 * sizeof(std::int64_t) + label_size;
  const Handle memory(H5Tcreate(H5T_COMPOUND, size));
  if (H5Tinsert(memory.id(), "start", 0, H5T_NATIVE_INT64) < 0 ||
      H5Tinsert(memory.id(), "end", sizeof(std::int64_t), H5T_NATIVE_INT64) < 0 ||
      H5Tinsert(memory.id(), "label", 2 * sizeof(std::int64_t), variable ? reference.id() : label.id()) < 0) {
    fail(path, last_error());
  }
  const std::vector<std::byte> bytes = source.read_whole(memory.id(), size);
  std::vector<LabelledRange> ranges;
  GlobalHeap heap(handle_.id());
  for (std::size_t at = 0; at < bytes.size(); at += size) {
    LabelledRange range{load<std::int64_t>(&bytes[at]), load<std::int64_t>(&bytes[at + sizeof(std::int64_t)]), {}};
    const std::byte* text = &bytes[at + 2 * sizeof(std::int64_t)];
    if (!variable) {
      range.label = fixed_text(text, label_size, H5Tget_strpad(label.id()));
    } else {
      std::string problem;
      auto resolved = heap.resolve(text, problem);
      if (!resolved) fail(path, fmt::format("element {}: {}", ranges.size(), problem));
      range.label = *std::move(resolved);
    }
    ranges.push_back(std::move(range));
  }
  return ranges;
}

Dataset File::create_typed(const std::string& path, Id type, const Shape& shape, const Shape& chunk) {
  create_group(parent_of(path));
  if (exists(path)) fail(path, "exists already");
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_obj_track_times(creation.id(), false);
  H5Pset_attr_phase_change(creation.id(), 64, 32);
  // Every element is written, so none needs a first value; of strings HDF5 wants one all the same.
  if (H5Tis_variable_str(type) <= 0) H5Pset_fill_time(creation.id(), H5D_FILL_TIME_NEVER);
  const Handle access(H5Pcreate(H5P_DATASET_ACCESS));
  const Handle space = space_of(shape);
  if (!chunk.empty()) {
    H5Pset_chunk(creation.id(), static_cast<int>(chunk.size()), extents(chunk).data());
    H5Pset_chunk_cache(access.id(), 0, 0, H5D_CHUNK_CACHE_W0_DEFAULT);
    // Along every axis, though one would do: HDF5 1.10 misnames the chunks where it is one other than the first.
    const std::vector<hsize_t> no_limit(shape.size(), H5S_UNLIMITED);
    H5Sset_extent_simple(space.id(), static_cast<int>(shape.size()), extents(shape).data(), no_limit.data());
  }
  Handle dataset(H5Dcreate2(handle_.id(), path.c_str(), type, space.id(), H5P_DEFAULT, creation.id(), access.id()));
  if (!dataset) fail(path, fmt::format("cannot be created: {}", last_error()));
  return adopt(path, std::move(dataset));
}

Dataset File::create_dataset(const std::string& path, DType type, const Shape& shape, const Shape& chunk) {
  const auto guard = lock();
  return create_typed(path, type_of(type).id(), shape, chunk);
}

Dataset File::write_typed(const std::string& path, Id type, const void* data, std::size_t count, const Shape& shape) {
  const auto guard = lock();
  if (static_cast<Index>(count) != elements(shape)) {
    fail(path, fmt::format("{} values do not have the shape ({})", count, fmt::join(shape, ", ")));
  }
  Dataset dataset = create_typed(path, type, shape);
  dataset.write_raw(Shape(shape.size(), 0), shape, static_cast<const std::byte*>(data));
  return dataset;
}

Dataset File::write(const std::string& path, std::span<const float> data, const Shape& shape) {
  const auto guard = lock();
  return write_typed(path, H5T_IEEE_F32LE, data.data(), data.size(), shape);
}

Dataset File::write(const std::string& path, std::span<const std::int32_t> data, const Shape& shape) {
  const auto guard = lock();
  return write_typed(path, H5T_STD_I32LE, data.data(), data.size(), shape);
}

Dataset File::write(const std::string& path, std::span<const std::int64_t> data, const Shape& shape) {
  const auto guard = lock();
  return write_typed(path, H5T_STD_I64LE, data.data(), data.size(), shape);
}

Dataset File::write(const std::string& path, std::span<const std::string> data, const Shape& shape) {
  const auto guard = lock();
  std::vector<const char*> texts;
  for (const std::string& text : data) texts.push_back(text.c_str());
  return write_typed(path, string_type().id(), static_cast<const void*>(texts.data()), data.size(), shape);
}

void File::write(const std::string& path, std::span<const LabelledRange> data) {
  const auto guard = lock();
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;
  std::vector<std::string> labels;
  for (const LabelledRange& range : data) {
    starts.push_back(static_cast<std::int32_t>(range.start));
    ends.push_back(static_cast<std::int32_t>(range.end));
    labels.push_back(range.label);
  }
  const auto count = static_cast<Index>(data.size());
  write(path + "/start", std::span<const std::int32_t>(starts), {count});
  write(path + "/end", std::span<const std::int32_t>(ends), {count});
  write(path + "/label", std::span<const std::string>(labels), {count});
}

}  // namespace kvreplay::hdf5
