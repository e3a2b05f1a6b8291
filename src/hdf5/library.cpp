#include "hdf5/library.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/printable.h"
#include "hdf5/string_heap.h"

namespace kvreplay::hdf5 {
namespace {

void prepare_library() {
  // After a failed close, for want of disk space, HDF5 would try again at exit, and loop or crash over it.
  H5dont_atexit();
  H5open();
  read_strings_as_references();
}

}  // namespace

Index elements(const Shape& shape) {
  Index product = 1;
  for (const Index extent : shape) product *= extent;
  return product;
}

std::unique_lock<std::recursive_mutex> lock() {
  // Never destroyed: handles of static duration may close after everything else.
  static auto* const mutex = new std::recursive_mutex;
  std::unique_lock<std::recursive_mutex> guard(*mutex);
  // Not the initialisation of a static: preparing closes handles, and that comes back here.
  static bool prepared = false;
  if (!std::exchange(prepared, true)) prepare_library();
  // A thread-safe build keeps an error stack, and whether to print it, per thread.
  thread_local const bool silenced = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
  static_cast<void>(silenced);
  return guard;
}

std::string last_error() {
  std::string reason;
  const auto keep_first = [](unsigned position, const H5E_error2_t* entry, void* text) -> herr_t {
    if (position == 0 && entry->desc != nullptr) *static_cast<std::string*>(text) = entry->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, &reason);
  // Where the system refused, its own words are all that a person needs.
  constexpr std::string_view kSystem = "error message = '";
  if (const std::size_t start = reason.find(kSystem); start != std::string::npos) {
    const std::size_t end = reason.find('\'', start + kSystem.size());
    if (end != std::string::npos) return reason.substr(start + kSystem.size(), end - start - kSystem.size());
  }
  std::replace(reason.begin(), reason.end(), '\n', ' ');
  return reason.empty() ? "unknown HDF5 error" : reason;
}

Handle& Handle::operator=(Handle&& other) noexcept {
  if (this != &other) {
    reset();
    id_ = other.release();
  }
  return *this;
}

Id Handle::release() { return std::exchange(id_, -1); }

void Handle::reset() {
  const Id id = release();
  if (id < 0) return;
  const auto guard = lock();
  switch (H5Iget_type(id)) {
    case H5I_FILE:
      H5Fclose(id);
      break;
    case H5I_GROUP:
      H5Gclose(id);
      break;
    case H5I_DATASET:
      H5Dclose(id);
      break;
    case H5I_DATATYPE:
      H5Tclose(id);
      break;
    case H5I_DATASPACE:
      H5Sclose(id);
      break;
    case H5I_ATTR:
      H5Aclose(id);
      break;
    case H5I_GENPROP_LST:
      H5Pclose(id);
      break;
    default:
      break;  // closed along with its file
  }
}

Handle type_of(DType type) {
  Handle handle(H5Tcopy(H5T_IEEE_F32LE));
  if (type == DType::float16) {
    H5Tset_fields(handle.id(), 15, 10, 5, 0, 10);
    H5Tset_size(handle.id(), 2);
    H5Tset_ebias(handle.id(), 15);
  } else if (type == DType::bfloat16) {
    H5Tset_fields(handle.id(), 15, 7, 8, 0, 7);
    H5Tset_size(handle.id(), 2);
    H5Tset_ebias(handle.id(), 127);
  }
  return handle;
}

std::optional<DType> float_type_of(hid_t type) {
  if (H5Tget_class(type) != H5T_FLOAT) return std::nullopt;
  for (const DType candidate : {DType::float32, DType::float16, DType::bfloat16}) {
    if (H5Tequal(type, type_of(candidate).id()) > 0) return candidate;
  }
  return std::nullopt;
}

Handle string_type() {
  Handle type(H5Tcopy(H5T_C_S1));
  H5Tset_size(type.id(), H5T_VARIABLE);
  H5Tset_cset(type.id(), H5T_CSET_UTF8);
  return type;
}

std::string filter_name(H5Z_filter_t filter, const char* stored_name) {
  switch (filter) {
    case H5Z_FILTER_DEFLATE:
      return "gzip";
    case H5Z_FILTER_SHUFFLE:
      return "shuffle";
    case H5Z_FILTER_FLETCHER32:
      return "fletcher32";
    case H5Z_FILTER_SZIP:
      return "szip";
    case H5Z_FILTER_NBIT:
      return "nbit";
    case H5Z_FILTER_SCALEOFFSET:
      return "scaleoffset";
    default:
      return *stored_name != '\0' ? printable(stored_name) : fmt::format("filter {}", static_cast<int>(filter));
  }
}

std::vector<hsize_t> extents(const Shape& shape) {
  std::vector<hsize_t> result(shape.size());
  std::transform(shape.begin(), shape.end(), result.begin(), [](Index extent) { return static_cast<hsize_t>(extent); });
  return result;
}

Handle space_of(const Shape& shape) {
  if (shape.empty()) return Handle(H5Screate(H5S_SCALAR));
  return Handle(H5Screate_simple(static_cast<int>(shape.size()), extents(shape).data(), nullptr));
}

Handle selected_space(hid_t dataset, const Shape& first, const Shape& count) {
  Handle space(H5Dget_space(dataset));
  if (!first.empty() && H5Sselect_hyperslab(space.id(), H5S_SELECT_SET, extents(first).data(), nullptr,
                                            extents(count).data(), nullptr) < 0) {
    return {};
  }
  return space;
}

std::string parent_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  return slash == std::string::npos || slash == 0 ? "/" : path.substr(0, slash);
}

std::string read_failure(const std::string& reason) {
  if (reason.find("bad version number") != std::string::npos) {
    unsigned major = 0;
    unsigned minor = 0;
    unsigned release = 0;
    H5get_libversion(&major, &minor, &release);
    return fmt::format(
        "{}; the file is damaged, or in a form newer than HDF5 {}.{}.{}, which kvreplay was built with: then write it "
        "again in a form that this one reads (h5py: libver=('v{}{:02}', 'v{}{:02}'))",
        reason, major, minor, release, major, minor, major, minor);
  }
  return reason + "; the file is damaged, copy or capture it again";
}

int descriptor_of(hid_t file) {
  void* place = nullptr;
  if (H5Fget_vfd_handle(file, H5P_DEFAULT, &place) < 0 || place == nullptr) return -1;
  return *static_cast<int*>(place);
}

std::optional<std::string> read_exactly(int descriptor, std::byte* out, std::size_t count, std::int64_t offset) {
  while (count > 0) {
    const ssize_t read = ::pread(descriptor, out, std::min(count, std::size_t{1} << 30), offset);
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) return fmt::format("cannot be read: {}", std::strerror(errno));
    if (read == 0) return "the file ends before this data does; it was truncated, copy or capture it again";
    out += read;
    count -= static_cast<std::size_t>(read);
    offset += read;
  }
  return std::nullopt;
}

}  // namespace kvreplay::hdf5
