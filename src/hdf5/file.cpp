#include <fmt/format.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/output_file.h"
#include "hdf5/cache.h"
#include "hdf5/hdf5.h"
#include "hdf5/library.h"

namespace kvreplay::hdf5 {
namespace {

bool keeps_chunks = true;

// HDF5 would keep up to 32 MiB of a file's metadata, which thousands of results fill, and unpacked it takes some ten
// times what it takes in the file.
void limit_metadata(hid_t access) {
  H5AC_cache_config_t configuration;
  configuration.version = H5AC__CURR_CACHE_CONFIG_VERSION;
  if (H5Pget_mdc_config(access, &configuration) < 0) return;
  configuration.set_initial_size = true;
  configuration.initial_size = std::size_t{256} << 10;
  configuration.min_size = std::size_t{128} << 10;
  configuration.max_size = std::size_t{256} << 10;
  H5Pset_mdc_config(access, &configuration);
}

}  // namespace

void keep_little() {
  keeps_chunks = false;
  H5set_free_list_limits(0, 0, 0, 0, 0, 0);
}

File::File(std::filesystem::path path, Handle handle, bool writing)
    : path_(std::move(path)), handle_(std::move(handle)), writing_(writing) {}
File::File(File&& other) noexcept = default;
File& File::operator=(File&& other) noexcept = default;
File::~File() = default;

void File::fail(std::string_view path, std::string_view reason) const {
  throw Error(fmt::format("{}: {}: {}", path_.string(), path, reason));
}

File File::open(const std::filesystem::path& path) {
  const auto refuse = [&](std::string_view reason) {
    throw Error(fmt::format("{}: cannot be opened: {}", path.string(), reason));
  };
  // HDF5 would say all of this in its own words, from a depth of ten function calls.
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) refuse(std::strerror(errno));
  if (S_ISDIR(status.st_mode)) refuse("it is a folder");
  if (!S_ISREG(status.st_mode)) refuse("it is not a regular file");
  if (::access(path.c_str(), R_OK) != 0) refuse(std::strerror(errno));

  const auto guard = lock();
  const htri_t hdf5 = H5Fis_hdf5(path.c_str());
  if (hdf5 == 0) refuse(status.st_size == 0 ? "it is empty" : "it is not an HDF5 file");
  if (hdf5 < 0) refuse(last_error());
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  // Locks fail on many network file systems, and nobody writes to a finished file.
  H5Pset_file_locking(access.id(), false, true);
  limit_metadata(access.id());
  if (!keeps_chunks) H5Pset_cache(access.id(), 0, 0, 0, H5D_CHUNK_CACHE_W0_DEFAULT);
  Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.id()));
  if (!file) {
    const std::string reason = last_error();
    if (reason.find("truncated file") != std::string::npos) {
      refuse("the file is truncated; copy or capture it again");
    }
    refuse(read_failure(reason));
  }
  return File(path, std::move(file), false);
}

File File::create(const std::filesystem::path& path, const std::filesystem::path& shown_as) {
  const std::filesystem::path& shown = shown_as.empty() ? path : shown_as;
  const auto guard = lock();
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  // Under the bounds of later releases, types and filters are written in forms that HDF5 1.10 does not know.
  H5Pset_libver_bounds(access.id(), H5F_LIBVER_V110, H5F_LIBVER_V110);
  H5Pset_fclose_degree(access.id(), H5F_CLOSE_STRONG);
  H5Pset_file_locking(access.id(), false, true);
  limit_metadata(access.id());
  const Handle creation(H5Pcreate(H5P_FILE_CREATE));
  // The same content makes the same bytes.
  H5Pset_obj_track_times(creation.id(), false);
  const auto undisturbed = OutputFile::hold_off_abandoning();
  Handle file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.id(), access.id()));
  if (!file) throw Error(fmt::format("{}: cannot be written: {}", shown.string(), last_error()));
  return File(shown, std::move(file), true);
}

bool File::has_checksums() const {
  const auto guard = lock();
  H5F_info2_t info;
  return H5Fget_info2(handle_.id(), &info) >= 0 && info.super.version >= 2;
}

void File::close() {
  if (!handle_) return;
  const auto guard = lock();
  if (writing_ && H5Fflush(handle_.id(), H5F_SCOPE_GLOBAL) < 0) {
    throw Error(fmt::format("{}: cannot be written: {}", path_.string(), last_error()));
  }
  if (H5Fclose(handle_.release()) < 0) {
    throw Error(fmt::format("{}: cannot be written: {}", path_.string(), last_error()));
  }
}

bool File::exists(const std::string& path) const {
  const auto guard = lock();
  if (path == "/") return true;
  for (std::size_t end = 0; end != std::string::npos;) {
    end = path.find('/', end + 1);
    const std::string part = path.substr(0, end);
    const htri_t found = H5Lexists(handle_.id(), part.c_str(), H5P_DEFAULT);
    if (found < 0) fail(part, read_failure(last_error()));
    if (found == 0) return false;
    H5L_info_t link;
    if (H5Lget_info(handle_.id(), part.c_str(), &link, H5P_DEFAULT) < 0) fail(part, last_error());
    // Following it could read any file that its name says.
    if (link.type != H5L_TYPE_HARD) {
      fail(part, "is a soft or external link, which is not followed; store the object itself");
    }
    if (end == std::string::npos) return true;
    H5O_info_t object;
    if (H5Oget_info_by_name2(handle_.id(), part.c_str(), &object, H5O_INFO_BASIC, H5P_DEFAULT) < 0) {
      fail(part, read_failure(last_error()));
    }
    if (object.type != H5O_TYPE_GROUP) return false;
  }
  return true;
}

Handle File::open_object(const std::string& path) const {
  if (!exists(path)) fail(path, "does not exist");
  Handle object(H5Oopen(handle_.id(), path.c_str(), H5P_DEFAULT));
  if (!object) fail(path, read_failure(last_error()));
  return object;
}

bool File::is_group(const std::string& path) const {
  const auto guard = lock();
  return exists(path) && H5Iget_type(open_object(path).id()) == H5I_GROUP;
}

std::vector<std::string> File::list(const std::string& group) const {
  const auto guard = lock();
  const Handle object = open_object(group);
  if (H5Iget_type(object.id()) != H5I_GROUP) fail(group, "is not a group");
  std::vector<std::string> names;
  const auto collect = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  if (H5Literate(object.id(), H5_INDEX_NAME, H5_ITER_INC, nullptr, collect, &names) < 0) {
    fail(group, read_failure(last_error()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

void File::create_group(const std::string& path) {
  const auto guard = lock();
  if (exists(path)) {
    if (!is_group(path)) fail(path, "is not a group");
    return;
  }
  create_group(parent_of(path));
  const Handle creation(H5Pcreate(H5P_GROUP_CREATE));
  H5Pset_obj_track_times(creation.id(), false);
  // Attributes stay in the header of their object, under its checksum.
  H5Pset_attr_phase_change(creation.id(), 64, 32);
  const Handle group(H5Gcreate2(handle_.id(), path.c_str(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
  if (!group) fail(path, fmt::format("cannot be created: {}", last_error()));
}

}  // namespace kvreplay::hdf5
