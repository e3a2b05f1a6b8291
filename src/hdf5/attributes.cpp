#include <fmt/format.h>
#include <hdf5.h>

#include <algorithm>
#include <utility>

#include "base/digest.h"
#include "hdf5/hdf5.h"
#include "hdf5/library.h"
#include "hdf5/string_heap.h"

namespace kvreplay::hdf5 {
namespace {

constexpr std::size_t kLargestAttribute = std::size_t{64} << 20;
constexpr const char* kAttributeDigest = "attributes_xxh64";
constexpr int kMostDigestedAttributes = 64;  // as many as stay in the header of their object

// What a file holds of a string of variable length, which ends at a zero.
std::string as_stored(const std::string& text) { return text.substr(0, text.find('\0')); }

}  // namespace

bool File::has_attribute(const std::string& path, const std::string& name) const {
  const auto guard = lock();
  const Handle object = open_object(path);
  const htri_t found = H5Aexists(object.id(), name.c_str());
  if (found < 0) fail(path, read_failure(last_error()));
  return found > 0;
}

Handle File::open_attribute(const Handle& object, const std::string& path, const std::string& name, bool single) const {
  const htri_t found = H5Aexists(object.id(), name.c_str());
  if (found == 0) fail(path, fmt::format("has no attribute '{}'", name));
  Handle attribute(found > 0 ? H5Aopen(object.id(), name.c_str(), H5P_DEFAULT) : -1);
  if (!attribute) fail(path, fmt::format("attribute '{}': {}", name, read_failure(last_error())));
  const Handle space(H5Aget_space(attribute.id()));
  if (!space || (single && H5Sget_simple_extent_npoints(space.id()) != 1)) {
    fail(path, fmt::format("attribute '{}' is not a single value", name));
  }
  if (H5Aget_storage_size(attribute.id()) > kLargestAttribute) {
    fail(path, fmt::format("attribute '{}' claims more than 64 MiB", name));
  }
  return attribute;
}

std::int64_t File::read_int(const std::string& path, const std::string& name) const {
  const auto guard = lock();
  const Handle object = open_object(path);
  const Handle attribute = open_attribute(object, path, name);
  const Handle type(H5Aget_type(attribute.id()));
  const H5T_class_t kind = H5Tget_class(type.id());
  if (kind != H5T_INTEGER && kind != H5T_ENUM) fail(path, fmt::format("attribute '{}' is not an integer", name));
  std::int64_t value = 0;
  if (H5Aread(attribute.id(), H5T_NATIVE_INT64, &value) < 0) {
    fail(path, fmt::format("attribute '{}': {}", name, read_failure(last_error())));
  }
  return value;
}

double File::read_double(const std::string& path, const std::string& name) const {
  const auto guard = lock();
  const Handle object = open_object(path);
  const Handle attribute = open_attribute(object, path, name);
  const Handle type(H5Aget_type(attribute.id()));
  const H5T_class_t kind = H5Tget_class(type.id());
  if (kind != H5T_INTEGER && kind != H5T_FLOAT) fail(path, fmt::format("attribute '{}' is not a number", name));
  double value = 0;
  if (H5Aread(attribute.id(), H5T_NATIVE_DOUBLE, &value) < 0) {
    fail(path, fmt::format("attribute '{}': {}", name, read_failure(last_error())));
  }
  return value;
}

std::vector<std::string> File::read_texts(const std::string& path, const std::string& name, bool single) const {
  const auto guard = lock();
  const Handle object = open_object(path);
  const Handle attribute = open_attribute(object, path, name, single);
  const Handle type(H5Aget_type(attribute.id()));
  if (H5Tget_class(type.id()) != H5T_STRING) fail(path, fmt::format("attribute '{}' is not a string", name));
  const Handle space(H5Aget_space(attribute.id()));
  const auto count = static_cast<std::size_t>(std::max<hssize_t>(H5Sget_simple_extent_npoints(space.id()), 0));
  const bool variable = H5Tis_variable_str(type.id()) > 0;
  const std::size_t size = variable ? kReferenceSize : H5Tget_size(type.id());
  const Handle reference = reference_type();
  if (count > kLargestAttribute || size > kLargestAttribute || count * size > kLargestAttribute) {
    fail(path, fmt::format("attribute '{}' claims more than 64 MiB", name));
  }
  std::vector<std::byte> bytes(count * size);
  if (H5Aread(attribute.id(), variable ? reference.id() : type.id(), bytes.data()) < 0) {
    fail(path, fmt::format("attribute '{}': {}", name, read_failure(last_error())));
  }
  GlobalHeap heap(handle_.id());
  std::vector<std::string> texts;
  for (std::size_t at = 0; at < bytes.size(); at += size) {
    if (!variable) {
      texts.push_back(fixed_text(&bytes[at], size, H5Tget_strpad(type.id())));
      continue;
    }
    std::string problem;
    auto text = heap.resolve(&bytes[at], problem);
    if (!text) fail(path, fmt::format("attribute '{}': {}", name, problem));
    texts.push_back(*std::move(text));
  }
  return texts;
}

std::string File::read_string(const std::string& path, const std::string& name) const {
  return std::move(read_texts(path, name, true).front());
}

std::vector<std::string> File::read_string_list(const std::string& path, const std::string& name) const {
  return read_texts(path, name, false);
}

void File::write_attribute(const std::string& path, const std::string& name, Id type, const void* value,
                           std::optional<Index> count) {
  const Handle object = open_object(path);
  const hsize_t extent = static_cast<hsize_t>(count.value_or(1));
  const Handle space(count ? H5Screate_simple(1, &extent, nullptr) : H5Screate(H5S_SCALAR));
  if (H5Aexists(object.id(), name.c_str()) > 0) H5Adelete(object.id(), name.c_str());
  const Handle attribute(H5Acreate2(object.id(), name.c_str(), type, space.id(), H5P_DEFAULT, H5P_DEFAULT));
  if (!attribute || H5Awrite(attribute.id(), type, value) < 0) {
    fail(path, fmt::format("attribute '{}' cannot be written: {}", name, last_error()));
  }
}

void File::write_int(const std::string& path, const std::string& name, std::int64_t value) {
  const auto guard = lock();
  write_attribute(path, name, H5T_STD_I64LE, &value);
}

void File::write_double(const std::string& path, const std::string& name, double value) {
  const auto guard = lock();
  write_attribute(path, name, H5T_IEEE_F64LE, &value);
}

void File::write_string(const std::string& path, const std::string& name, std::string_view value) {
  const auto guard = lock();
  const std::string text(value);
  const char* const characters = text.c_str();
  write_attribute(path, name, string_type().id(), static_cast<const void*>(&characters));
}

void File::write_string_list(const std::string& path, const std::string& name, const std::vector<std::string>& values) {
  const auto guard = lock();
  std::vector<const char*> characters;
  Digest digest;
  for (const std::string& value : values) {
    characters.push_back(value.c_str());
    digest.add(as_stored(value));
  }
  write_attribute(path, name, string_type().id(), static_cast<const void*>(characters.data()),
                  static_cast<Index>(values.size()));
  write_string(path, kAttributeDigest, digest.text() + ' ' + name);
}

void File::write_strings(const std::string& path, const std::vector<NamedString>& attributes) {
  const auto guard = lock();
  Digest digest;
  std::string names;
  for (const NamedString& attribute : attributes) {
    write_string(path, attribute.name, attribute.value);
    digest.add(as_stored(attribute.value));
    names += ' ' + attribute.name;
  }
  write_string(path, kAttributeDigest, digest.text() + names);
}

void File::check_strings(const std::string& path) const {
  const auto guard = lock();
  if (!has_attribute(path, kAttributeDigest)) return;
  const std::string told = read_string(path, kAttributeDigest);
  const std::size_t names = told.find(' ');
  Digest digest;
  int count = 0;
  for (std::size_t at = names; at != std::string::npos && count < kMostDigestedAttributes; ++count) {
    const std::size_t end = told.find(' ', at + 1);
    for (const std::string& text : read_texts(path, told.substr(at + 1, end - at - 1), false)) {
      digest.add(as_stored(text));
    }
    at = end;
  }
  if (digest.text() == told.substr(0, names)) return;
  fail(path, fmt::format("string attributes are not those that '{0}' tells of: the file is damaged, copy or capture it "
                         "again; or they were changed, then remove '{0}'",
                         kAttributeDigest));
}

}  // namespace kvreplay::hdf5
