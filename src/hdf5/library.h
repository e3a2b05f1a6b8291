// The HDF5 library: its types and spaces, what opens its files, and what it says when something fails.
#pragma once

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "hdf5/hdf5.h"

namespace kvreplay::hdf5 {

static_assert(sizeof(Id) == sizeof(hid_t));

/// The type that stores this one.
Handle type_of(DType type);

/// Which one a type is by the layout of its bits, since writers give 16-bit types no name to go by; or nothing.
std::optional<DType> float_type_of(hid_t type);

/// UTF-8 strings of variable length.
Handle string_type();

/// The name of a filter that every HDF5 has, or that which the file gives it.
std::string filter_name(H5Z_filter_t filter, const char* stored_name);

std::vector<hsize_t> extents(const Shape& shape);
Handle space_of(const Shape& shape);

/// The space of a stored dataset with a box of it selected, which a scalar has no need of; none where HDF5 fails.
Handle selected_space(hid_t dataset, const Shape& first, const Shape& count);

/// The object or group that holds it: "/a/b" is in "/a", "/a" in "/".
std::string parent_of(const std::string& path);

/// What failed to be read, and what a user can do about it.
std::string read_failure(const std::string& reason);

/// The file descriptor behind an open file, or -1.
int descriptor_of(hid_t file);

/// Reads all of `count` bytes at `offset`, or says why not.
std::optional<std::string> read_exactly(int descriptor, std::byte* out, std::size_t count, std::int64_t offset);

}  // namespace kvreplay::hdf5
