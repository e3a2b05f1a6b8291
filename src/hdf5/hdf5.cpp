#include "hdf5/hdf5.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "base/digest.h"
#include "base/error.h"
#include "base/output_file.h"
#include "base/printable.h"
#include "hdf5/cache.h"

namespace kvreplay::hdf5 {

static_assert(sizeof(Id) == sizeof(hid_t));

namespace {

// Deflate packs at most 1032 to 1. A larger ratio in a dataset of this size is a claim, not data.
constexpr Index kUnquestionedBytes = Index{64} << 20;
constexpr Index kLargestRatio = 4096;
constexpr std::size_t kLargestAttribute = std::size_t{64} << 20;
constexpr std::size_t kLargestHeap = std::size_t{256} << 20;

constexpr const char* kAttributeDigest = "attributes_xxh64";
constexpr int kMostDigestedAttributes = 64;  // as many as stay in the header of their object

constexpr std::int64_t kReadAheadBytes = std::int64_t{128} << 10;  // what a Linux file system reads ahead by default
constexpr Index kShortRunBytes = Index{8} << 10;    // of these a call to the system each costs more than copying
constexpr Index kLargestGap = 4;                    // bytes read for each that is asked for, at most
constexpr Index kGatheredBytes = Index{128} << 10;  // stays in a core's own cache

bool keeps_chunks = true;

// What a file holds of a string of variable length, which ends at a zero.
std::string as_stored(const std::string& text) { return text.substr(0, text.find('\0')); }

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

// ---- Variable-length strings -------------------------------------------------------------------------------------
// In the file, an element is a reference into a global heap: length, address of the collection, index in it. The heaps
// carry no checksums, and HDF5 1.10 trusts their sizes when it copies. So HDF5 is asked for the bare references, by
// way of a conversion to an opaque type of the same 16 bytes that leaves them as they are, and the heaps are read here.

constexpr std::size_t kReferenceSize = 16;

herr_t keep_reference(hid_t source, hid_t target, H5T_cdata_t* conversion, std::size_t, std::size_t, std::size_t, void*,
                      void*, hid_t) {
  if (conversion->command != H5T_CONV_INIT) return 0;
  conversion->need_bkg = H5T_BKG_NO;
  const bool known = H5Tget_class(source) == H5T_STRING && H5Tis_variable_str(source) > 0 &&
                     H5Tget_class(target) == H5T_OPAQUE && H5Tget_size(source) == kReferenceSize &&
                     H5Tget_size(target) == kReferenceSize;
  return known ? 0 : -1;
}

Handle reference_type() {
  Handle type(H5Tcreate(H5T_OPAQUE, kReferenceSize));
  H5Tset_tag(type.id(), "reference into a global heap");
  return type;
}

void prepare_library() {
  // After a failed close, for want of disk space, HDF5 would try again at exit, and loop or crash over it.
  H5dont_atexit();
  H5open();
  Handle variable(H5Tcopy(H5T_C_S1));
  H5Tset_size(variable.id(), H5T_VARIABLE);
  const Handle reference = reference_type();
  H5Tregister(H5T_PERS_SOFT, "heap reference", variable.id(), reference.id(), keep_reference);
}

template <class T>
T load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// Reads all of `count` bytes at `offset`, or says why not.
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

// The file descriptor behind an open file, or -1.
int descriptor_of(hid_t file) {
  void* place = nullptr;
  if (H5Fget_vfd_handle(file, H5P_DEFAULT, &place) < 0 || place == nullptr) return -1;
  return *static_cast<int*>(place);
}

// Resolves references into the global heaps of one file.
class GlobalHeap {
 public:
  explicit GlobalHeap(hid_t file) : descriptor_(descriptor_of(file)) {
    const Handle creation(H5Fget_create_plist(file));
    hsize_t user_block = 0;
    std::size_t address_size = 0;
    std::size_t length_size = 0;
    struct stat status {};
    readable_ = descriptor_ >= 0 && ::fstat(descriptor_, &status) == 0 &&
                H5Pget_userblock(creation.id(), &user_block) >= 0 &&
                H5Pget_sizes(creation.id(), &address_size, &length_size) >= 0 && address_size == 8 && length_size == 8;
    base_ = user_block;
    file_size_ = static_cast<std::uint64_t>(status.st_size);
  }

  // The string that `reference` (kReferenceSize bytes) stands for. On damage, sets `problem` and returns nothing.
  std::optional<std::string> resolve(const std::byte* reference, std::string& problem) {
    const auto length = load<std::uint32_t>(reference);
    const auto address = load<std::uint64_t>(reference + 4);
    const auto index = load<std::uint32_t>(reference + 12);
    if (length == 0 || address == 0) return std::string();
    if (!readable_) {
      problem = "has variable-length strings in a form that cannot be read here";
      return std::nullopt;
    }
    if ((address != address_ || collection_.empty()) && !load_collection(address, problem)) return std::nullopt;
    const Object object = index < objects_.size() ? objects_[index] : Object{};
    if (index == 0 || object.place == 0 || length > object.size) {
      problem = "a string is damaged; copy or capture the file again";
      return std::nullopt;
    }
    // Writers store every string once. References that share one make more of a small file than memory has room for.
    total_ += length;
    if (total_ > file_size_) {
      problem = "its strings amount to more than the whole file; it is damaged, copy or capture it again";
      return std::nullopt;
    }
    const auto* text = reinterpret_cast<const char*>(&collection_[object.place]);
    return std::string(text, ::strnlen(text, length));
  }

 private:
  bool load_collection(std::uint64_t address, std::string& problem) {
    collection_.clear();
    std::array<std::byte, 16> header{};
    const bool inside =
        address <= file_size_ && base_ <= file_size_ - address && file_size_ - address - base_ >= header.size();
    const auto place = static_cast<std::int64_t>(base_ + address);
    if (inside && !read_exactly(descriptor_, header.data(), header.size(), place)) {
      const auto size = load<std::uint64_t>(&header[8]);
      if (std::memcmp(header.data(), "GCOL\1", 5) == 0 && size >= header.size() && size <= kLargestHeap &&
          size <= file_size_ - address - base_) {
        collection_.resize(static_cast<std::size_t>(size));
        if (!read_exactly(descriptor_, collection_.data(), collection_.size(), place)) {
          address_ = address;
          find_objects();
          return true;
        }
        collection_.clear();
      }
    }
    problem = "a string is damaged; copy or capture the file again";
    return false;
  }

  // Where the objects of the collection lie, up to the first that cannot be.
  void find_objects() {
    objects_.clear();
    for (std::size_t at = 16; at + 16 <= collection_.size();) {
      const auto index = load<std::uint16_t>(&collection_[at]);
      const auto size = load<std::uint64_t>(&collection_[at + 8]);
      const std::size_t data = at + 16;
      if (index == 0 || size > collection_.size() - data) return;  // index 0: what remains is free
      if (index >= objects_.size()) objects_.resize(std::size_t{index} + 1);
      if (objects_[index].place == 0) objects_[index] = {data, static_cast<std::size_t>(size)};
      at = data + static_cast<std::size_t>((size + 7) / 8 * 8);
    }
  }

  struct Object {
    std::size_t place = 0;  // in the collection; 0: there is none
    std::size_t size = 0;
  };

  int descriptor_;
  bool readable_ = false;
  std::uint64_t base_ = 0;
  std::uint64_t file_size_ = 0;
  std::uint64_t address_ = 0;
  std::vector<std::byte> collection_;
  std::vector<Object> objects_;  // by index
  std::uint64_t total_ = 0;
};

// Text of a fixed-length string element.
std::string fixed_text(const std::byte* bytes, std::size_t size, H5T_str_t padding) {
  const auto* text = reinterpret_cast<const char*>(bytes);
  if (padding == H5T_STR_NULLTERM) return std::string(text, ::strnlen(text, size));
  const char filler = padding == H5T_STR_SPACEPAD ? ' ' : '\0';
  while (size > 0 && text[size - 1] == filler) --size;
  return std::string(text, size);
}

// What failed to be read, and what a user can do about it.
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

// ---- Types -------------------------------------------------------------------------------------------------------

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

// By the layout of the bits: writers give 16-bit types no name to go by.
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

// The object or group that holds it: "/a/b" is in "/a", "/a" in "/".
std::string parent_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  return slash == std::string::npos || slash == 0 ? "/" : path.substr(0, slash);
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

// ---- Dataset -----------------------------------------------------------------------------------------------------

void Dataset::fail(std::string_view reason) const { throw Error(fmt::format("{}: {}: {}", file_, path_, reason)); }

void Dataset::check_box(const Shape& first, const Shape& count) const {
  bool inside = first.size() == shape_.size() && count.size() == shape_.size();
  for (std::size_t i = 0; inside && i < shape_.size(); ++i) {
    inside = first[i] >= 0 && count[i] >= 0 && first[i] <= shape_[i] && count[i] <= shape_[i] - first[i];
  }
  if (!inside) {
    fail(fmt::format("the range from ({}) of ({}) elements is outside its shape ({})", fmt::join(first, ", "),
                     fmt::join(count, ", "), fmt::join(shape_, ", ")));
  }
}

// Where the chunks of a dataset without filters lie in the file. HDF5 is asked when they are first needed.
struct Dataset::Chunks {
  Chunks(Shape extents, const Shape& dataset) : shape(std::move(extents)) {
    for (std::size_t i = 0; i < shape.size(); ++i) counts.push_back((dataset[i] - 1) / shape[i] + 1);
  }

  bool worth_finding(std::size_t element_size) const;

  const Shape shape;                 // of a chunk; those at the edge are stored whole as well
  Shape counts;                      // chunks along each axis
  std::vector<std::int64_t> places;  // of each chunk's first byte, row-major; empty until `known`
  std::atomic<bool> known = false;
};

// Whether finding them all takes less than what reading without the lock gains. HDF5 before 1.14 walks through all
// chunks before the one that it is asked about, some 50 ns for each; reading them itself, it manages some 4 GB/s.
bool Dataset::Chunks::worth_finding(std::size_t element_size) const {
#if H5_VERSION_GE(1, 14, 0)
  static_cast<void>(element_size);
  return true;
#else
  constexpr Index kFewChunks = 256;
  constexpr Index kBytesPerChunk = 512;
  const Index chunk_bytes = elements(shape) * static_cast<Index>(element_size);
  return elements(counts) <= std::max(kFewChunks, chunk_bytes / kBytesPerChunk);
#endif
}

void Dataset::find_chunks() const {
  if (chunks_->known.load(std::memory_order_acquire)) return;
  const auto guard = lock();
  if (chunks_->known.load(std::memory_order_relaxed)) return;
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) fail(fmt::format("cannot be read: {}", std::strerror(errno)));

  // Nothing that HDF5 found in the file is believed: an address may be anything.
  struct Found {
    const Chunks& chunks;
    std::uint64_t bytes;
    std::uint64_t file_size;
    std::vector<std::int64_t> places;
    const char* problem = nullptr;

    void add(const hsize_t* start, haddr_t address, hsize_t stored) {
      std::size_t number = 0;
      bool sound = stored == bytes && address != HADDR_UNDEF;
      for (std::size_t i = 0; sound && i < chunks.shape.size(); ++i) {
        const auto extent = static_cast<hsize_t>(chunks.shape[i]);
        sound = start[i] % extent == 0 && start[i] / extent < static_cast<hsize_t>(chunks.counts[i]);
        number = number * static_cast<std::size_t>(chunks.counts[i]) + static_cast<std::size_t>(start[i] / extent);
      }
      if (!sound || places[number] >= 0) {
        problem = "the index of its chunks is damaged; copy or capture the file again";
      } else if (address > file_size || bytes > file_size - address) {
        problem = "a chunk lies beyond the end of the file; it was truncated, copy or capture it again";
      } else {
        places[number] = static_cast<std::int64_t>(address);
      }
    }
  };
  const auto total = static_cast<std::size_t>(elements(chunks_->counts));
  Found found{*chunks_, static_cast<std::uint64_t>(elements(chunks_->shape)) * element_size_,
              static_cast<std::uint64_t>(status.st_size), std::vector<std::int64_t>(total, -1)};
#if H5_VERSION_GE(1, 14, 0)
  const auto add = [](const hsize_t* start, unsigned, haddr_t address, hsize_t stored, void* data) -> int {
    static_cast<Found*>(data)->add(start, address, stored);
    return static_cast<Found*>(data)->problem == nullptr ? H5_ITER_CONT : H5_ITER_STOP;
  };
  if (H5Dchunk_iter(handle_.id(), H5P_DEFAULT, add, &found) < 0) fail(read_failure(last_error()));
#else
  const Handle space(H5Dget_space(handle_.id()));
  std::vector<hsize_t> start(shape_.size());
  for (hsize_t i = 0; i < total && found.problem == nullptr; ++i) {
    haddr_t address = HADDR_UNDEF;
    hsize_t stored = 0;
    unsigned filters = 0;
    if (H5Dget_chunk_info(handle_.id(), space.id(), i, start.data(), &filters, &address, &stored) < 0) {
      fail(read_failure(last_error()));
    }
    found.add(start.data(), address, stored);
  }
#endif
  if (found.problem != nullptr) fail(found.problem);
  if (std::find(found.places.begin(), found.places.end(), -1) != found.places.end()) {
    fail("is not stored completely; capture it again");
  }
  chunks_->places = std::move(found.places);
  chunks_->known.store(true, std::memory_order_release);
}

// Calls `action` for the pieces of a box that lie in one block each, in the order of the blocks.
template <class Action>
void Dataset::for_each_part(const Shape& first, const Shape& count, const Action& action) const {
  if (!chunks_) {
    action(Part{offset_, shape_, first, count, 0});
    return;
  }
  find_chunks();
  const Shape& extents = chunks_->shape;
  const std::size_t rank = shape_.size();
  Shape begin(rank);  // of the chunks that the box meets
  Shape end(rank);
  for (std::size_t i = 0; i < rank; ++i) {
    begin[i] = first[i] / extents[i];
    end[i] = (first[i] + count[i] - 1) / extents[i] + 1;
  }
  Part part{0, extents, Shape(rank), Shape(rank), 0};
  for (Shape at = begin;;) {
    Index number = 0;
    part.out = 0;
    for (std::size_t i = 0; i < rank; ++i) {
      const Index start = at[i] * extents[i];
      const Index from = std::max(first[i], start);
      part.first[i] = from - start;
      part.count[i] = std::min(first[i] + count[i], start + extents[i]) - from;
      part.out = part.out * count[i] + from - first[i];
      number = number * chunks_->counts[i] + at[i];
    }
    part.place = chunks_->places[static_cast<std::size_t>(number)];
    action(part);
    std::size_t axis = rank;
    while (axis > 0 && ++at[axis - 1] == end[axis - 1]) {
      --axis;
      at[axis] = begin[axis];
    }
    if (axis == 0) return;
  }
}

// Reads the box of `part` to `out`, where it is part of a box of `out_extents`.
void Dataset::read_part(const Part& part, const Shape& out_extents, std::byte* out) const {
  // Axes that are read whole, and the last one that is not, make runs of consecutive bytes.
  std::size_t axis = part.block.size();
  auto run = static_cast<Index>(element_size_);
  while (axis > 0) {
    --axis;
    run *= part.count[axis];
    if (part.count[axis] != part.block[axis] || part.count[axis] != out_extents[axis]) break;
  }
  const std::size_t rank = part.block.size();
  Shape from_stride(rank, static_cast<Index>(element_size_));
  Shape to_stride(rank, static_cast<Index>(element_size_));
  for (std::size_t i = rank; i-- > 1;) {
    from_stride[i - 1] = from_stride[i] * part.block[i];
    to_stride[i - 1] = to_stride[i] * out_extents[i];
  }
  std::int64_t from = part.place;
  for (std::size_t i = 0; i < rank; ++i) from += part.first[i] * from_stride[i];

  // Runs along the last of the other axes at a time.
  const Index runs = axis > 0 ? part.count[axis - 1] : 1;
  const Index from_step = axis > 0 ? from_stride[axis - 1] : run;
  const Index to_step = axis > 0 ? to_stride[axis - 1] : run;
  // Short runs not far apart are read with what is between them, and the rest is dropped.
  const bool gather = runs > 1 && run < kShortRunBytes && from_step <= kLargestGap * run;
  const Index together = gather ? std::max<Index>((kGatheredBytes - run) / from_step + 1, 1) : 1;
  thread_local std::vector<std::byte> gathered;
  const auto run_bytes = static_cast<std::size_t>(run);
  const auto read = [&](std::byte* to, std::size_t bytes, std::int64_t place) {
    if (const auto problem = read_exactly(descriptor_, to, bytes, place)) fail(*problem);
  };
  Shape at(axis > 0 ? axis - 1 : 0, 0);
  for (bool more = true; more;) {
    for (Index done = 0; done < runs; done += together) {
      const Index these = std::min(together, runs - done);
      std::byte* to = out + done * to_step;
      if (these == 1) {
        read(to, run_bytes, from + done * from_step);
        continue;
      }
      const auto bytes = static_cast<std::size_t>((these - 1) * from_step + run);
      if (gathered.size() < bytes) gathered.resize(bytes);
      read(gathered.data(), bytes, from + done * from_step);
      for (Index i = 0; i < these; ++i) std::memcpy(to + i * to_step, &gathered[i * from_step], run_bytes);
    }
    more = false;
    for (std::size_t i = at.size(); i-- > 0 && !more;) {
      more = ++at[i] < part.count[i];
      const Index steps = more ? 1 : 1 - part.count[i];
      if (!more) at[i] = 0;
      from += steps * from_stride[i];
      out += steps * to_stride[i];
    }
  }
}

void Dataset::read_raw(const Shape& first, const Shape& count, std::byte* out) const {
  check_box(first, count);
  if (variable_length_) fail("has elements of variable length");
  const Index total = elements(count);
  if (total == 0) return;

  if (reads_directly()) {
    for_each_part(first, count, [&](const Part& part) {
      read_part(part, count, out + static_cast<std::size_t>(part.out) * element_size_);
    });
    return;
  }

  const auto guard = lock();
  const Handle file_space(H5Dget_space(handle_.id()));
  const Handle memory_space = space_of(count);
  if (!shape_.empty() && H5Sselect_hyperslab(file_space.id(), H5S_SELECT_SET, extents(first).data(), nullptr,
                                             extents(count).data(), nullptr) < 0) {
    fail(last_error());
  }
  if (H5Dread(handle_.id(), raw_type_.id(), memory_space.id(), file_space.id(), H5P_DEFAULT, out) < 0) {
    fail(fmt::format("cannot be read: {}", read_failure(last_error())));
  }
}

void Dataset::prefetch(const Shape& first, const Shape& count) const {
  check_box(first, count);
  if (!reads_directly() || elements(count) == 0) return;
  for_each_part(first, count, [&](const Part& part) {
    // From its first to its last element: boxes worth reading ahead are whole rows, which lie together.
    Index begin = 0;
    Index last = 0;
    for (std::size_t i = 0; i < part.block.size(); ++i) {
      begin = begin * part.block[i] + part.first[i];
      last = last * part.block[i] + part.first[i] + part.count[i] - 1;
    }
    const auto size = static_cast<Index>(element_size_);
    const std::int64_t end = part.place + (last + 1) * size;
    // Linux cuts a longer request to its window without saying so. Advice that is not taken costs time alone.
    for (std::int64_t at = part.place + begin * size; at < end; at += kReadAheadBytes) {
      static_cast<void>(
          ::posix_fadvise(descriptor_, at, std::min<std::int64_t>(kReadAheadBytes, end - at), POSIX_FADV_WILLNEED));
    }
  });
}

void Dataset::write_raw(const Shape& first, const Shape& count, const std::byte* data) {
  check_box(first, count);
  if (elements(count) == 0) return;
  const auto guard = lock();
  const Handle file_space(H5Dget_space(handle_.id()));
  const Handle memory_space = space_of(count);
  if (!shape_.empty() && H5Sselect_hyperslab(file_space.id(), H5S_SELECT_SET, extents(first).data(), nullptr,
                                             extents(count).data(), nullptr) < 0) {
    fail(last_error());
  }
  if (H5Dwrite(handle_.id(), raw_type_.id(), memory_space.id(), file_space.id(), H5P_DEFAULT, data) < 0) {
    fail(fmt::format("cannot be written: {}", last_error()));
  }
}

void Dataset::resize(const Shape& shape) {
  const auto guard = lock();
  if (H5Dset_extent(handle_.id(), extents(shape).data()) < 0) fail(fmt::format("cannot be resized: {}", last_error()));
  shape_ = shape;
}

std::vector<std::byte> Dataset::read_whole(Id memory_type, std::size_t memory_size) const {
  std::vector<std::byte> bytes(static_cast<std::size_t>(elements(shape_)) * memory_size);
  if (!bytes.empty() && H5Dread(id(), memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) < 0) {
    fail(fmt::format("cannot be read: {}", read_failure(last_error())));
  }
  return bytes;
}

std::vector<std::string> Dataset::read_strings() const {
  const auto guard = lock();
  const Handle type(H5Dget_type(id()));
  if (H5Tget_class(type.id()) != H5T_STRING) fail("is not of a string type");
  const bool variable = H5Tis_variable_str(type.id()) > 0;
  const Handle reference = reference_type();
  const std::size_t size = variable ? kReferenceSize : element_size_;
  const std::vector<std::byte> bytes = read_whole(variable ? reference.id() : type.id(), size);
  std::vector<std::string> strings;
  strings.reserve(bytes.size() / size);
  const Handle file(H5Iget_file_id(id()));
  unsigned intent = 0;
  // The heaps of a file that is being written may still be in memory.
  if (variable && H5Fget_intent(file.id(), &intent) >= 0 && intent != H5F_ACC_RDONLY &&
      H5Fflush(file.id(), H5F_SCOPE_LOCAL) < 0) {
    fail(fmt::format("cannot be written: {}", last_error()));
  }
  GlobalHeap heap(file.id());
  for (std::size_t at = 0; at < bytes.size(); at += size) {
    if (!variable) {
      strings.push_back(fixed_text(&bytes[at], size, H5Tget_strpad(type.id())));
      continue;
    }
    std::string problem;
    auto text = heap.resolve(&bytes[at], problem);
    if (!text) fail(fmt::format("element {}: {}", strings.size(), problem));
    strings.push_back(*std::move(text));
  }
  return strings;
}

std::string Dataset::compute_xxh64() const {
  if (variable_length_) {
    Digest digest;
    for (const std::string& text : read_strings()) digest.add(text);
    return digest.text();
  }
  const std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> digest(XXH64_createState(), &XXH64_freeState);
  XXH64_reset(digest.get(), 0);

  // Blocks of whole trailing axes, as many as fit, taken in logical order.
  constexpr Index kBlockBytes = Index{8} << 20;
  std::size_t axis = 0;
  Index inner = elements(shape_);
  while (axis < shape_.size() && shape_[axis] > 0) {
    inner /= shape_[axis];
    if (inner * static_cast<Index>(element_size_) <= kBlockBytes) break;
    ++axis;
  }
  if (elements(shape_) > 0) {
    Shape first(shape_.size(), 0);
    Shape count = shape_;
    std::vector<std::byte> bytes;
    const auto take = [&] {
      bytes.resize(static_cast<std::size_t>(elements(count)) * element_size_);
      read_raw(first, count, bytes.data());
      XXH64_update(digest.get(), bytes.data(), bytes.size());
    };
    if (axis >= shape_.size()) {
      take();
    } else {
      const Index rows = std::max<Index>(kBlockBytes / (inner * static_cast<Index>(element_size_)), 1);
      std::fill(count.begin(), count.begin() + static_cast<std::ptrdiff_t>(axis), 1);
      for (bool more = true; more;) {
        for (Index row = 0; row < shape_[axis]; row += rows) {
          first[axis] = row;
          count[axis] = std::min(rows, shape_[axis] - row);
          take();
        }
        more = false;
        for (std::size_t i = axis; i-- > 0 && !more;) {
          more = ++first[i] < shape_[i];
          if (!more) first[i] = 0;
        }
      }
    }
  }
  return fmt::format("{:016x}", XXH64_digest(digest.get()));
}

void keep_little() {
  keeps_chunks = false;
  H5set_free_list_limits(0, 0, 0, 0, 0, 0);
}

// ---- File --------------------------------------------------------------------------------------------------------

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

// ---- Attributes --------------------------------------------------------------------------------------------------

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

// ---- Datasets ----------------------------------------------------------------------------------------------------

Dataset File::dataset(const std::string& path) const {
  const auto guard = lock();
  Handle object = open_object(path);
  if (H5Iget_type(object.id()) != H5I_DATASET) fail(path, "is not a dataset");
  return adopt(path, std::move(object));
}

Dataset File::adopt(const std::string& path, Handle handle) const {
  Dataset dataset;
  dataset.file_ = path_.string();
  dataset.path_ = path;
  dataset.handle_ = std::move(handle);
  const hid_t id = dataset.handle_.id();

  const Handle creation(H5Dget_create_plist(id));
  if (!creation) fail(path, last_error());
  const H5D_layout_t layout = H5Pget_layout(creation.id());
  if (layout == H5D_VIRTUAL || H5Pget_external_count(creation.id()) != 0) {
    fail(path, "takes its data from other files, which is not followed; store the data in this file");
  }

  const Handle space(H5Dget_space(id));
  const H5S_class_t kind = space ? H5Sget_simple_extent_type(space.id()) : H5S_NO_CLASS;
  if (kind != H5S_SIMPLE && kind != H5S_SCALAR) fail(path, "has no shape");
  std::vector<hsize_t> extent(static_cast<std::size_t>(std::max(H5Sget_simple_extent_ndims(space.id()), 0)));
  std::vector<hsize_t> limit(extent.size());
  if (!extent.empty() && H5Sget_simple_extent_dims(space.id(), extent.data(), limit.data()) < 0) {
    fail(path, last_error());
  }

  const Handle type(H5Dget_type(id));
  if (!type) fail(path, last_error());
  dataset.element_size_ = H5Tget_size(type.id());
  dataset.variable_length_ = H5Tdetect_class(type.id(), H5T_VLEN) > 0 || H5Tis_variable_str(type.id()) > 0;
  for (int i = 0; H5Tget_class(type.id()) == H5T_COMPOUND && i < H5Tget_nmembers(type.id()); ++i) {
    const Handle member(H5Tget_member_type(type.id(), static_cast<unsigned>(i)));
    if (H5Tis_variable_str(member.id()) > 0) dataset.variable_length_ = true;
  }
  if (dataset.element_size_ == 0) fail(path, "has elements without a size");
  dataset.float_type_ = float_type_of(type.id());
  dataset.raw_type_ = Handle(H5Tcopy(type.id()));
  const H5T_class_t type_class = H5Tget_class(type.id());
  const bool ordered = type_class == H5T_INTEGER || type_class == H5T_FLOAT;
  const bool as_is = !ordered || H5Tget_order(type.id()) == H5T_ORDER_LE;
  if (!as_is) H5Tset_order(dataset.raw_type_.id(), H5T_ORDER_LE);

  // Sizes come from the file: no product of them may wrap, here or later.
  Index total = 1;
  bool empty = false;
  constexpr Index kLimit = Index{1} << 62;
  for (const hsize_t e : extent) {
    empty = empty || e == 0;
    const bool fits = e <= static_cast<hsize_t>(kLimit) && (e == 0 || total <= kLimit / static_cast<Index>(e));
    if (!fits) fail(path, fmt::format("claims an absurd size: ({})", fmt::join(extent, ", ")));
    dataset.shape_.push_back(static_cast<Index>(e));
    if (e != 0) total *= static_cast<Index>(e);
  }
  if (dataset.element_size_ > static_cast<std::size_t>(kLimit / total)) {
    fail(path, fmt::format("claims an absurd size: ({})", fmt::join(extent, ", ")));
  }
  const Index bytes = empty ? 0 : total * static_cast<Index>(dataset.element_size_);
  dataset.stored_bytes_ = static_cast<Index>(H5Dget_storage_size(id));

  const int filters = H5Pget_nfilters(creation.id());
  switch (layout) {
    case H5D_COMPACT:
      dataset.storage_ = "compact";
      break;
    case H5D_CONTIGUOUS:
      dataset.storage_ = "contiguous";
      break;
    case H5D_CHUNKED:
      dataset.storage_ = "chunked";
      break;
    default:
      fail(path, "is stored in a way that is not known here");
  }
  for (int i = 0; i < filters; ++i) {
    std::array<char, 64> name{};
    unsigned flags = 0;
    std::size_t values = 0;
    const H5Z_filter_t filter = H5Pget_filter2(creation.id(), static_cast<unsigned>(i), &flags, &values, nullptr,
                                               name.size() - 1, name.data(), nullptr);
    if (filter < 0) fail(path, last_error());
    const std::string text = filter_name(filter, name.data());
    if (H5Zfilter_avail(filter) <= 0) {
      fail(path,
           fmt::format("is compressed with {}, which this HDF5 lacks; rewrite it with 'h5repack -f GZIP=4'", text));
    }
    dataset.storage_ += ", " + text;
  }
  if (writing_) return dataset;

  const int descriptor = descriptor_of(handle_.id());
  struct stat status {};
  const bool readable = descriptor >= 0 && ::fstat(descriptor, &status) == 0;
  const auto file_size = static_cast<hsize_t>(status.st_size);
  Shape chunk_shape;
  if (bytes > 0) {
    // A chunk that was never written would be read as zeros.
    bool whole = true;
    if (layout == H5D_CHUNKED) {
      std::vector<hsize_t> chunk(extent.size());
      if (H5Pget_chunk(creation.id(), static_cast<int>(chunk.size()), chunk.data()) < 0) fail(path, last_error());
      hsize_t expected = 1;
      hsize_t chunk_bytes = dataset.element_size_;
      for (std::size_t i = 0; i < chunk.size(); ++i) {
        if (chunk[i] == 0) fail(path, "has chunks without a size");
        expected *= (extent[i] - 1) / chunk[i] + 1;
        if (chunk[i] > static_cast<hsize_t>(kLimit) / chunk_bytes) fail(path, "has chunks of an absurd size");
        chunk_bytes *= chunk[i];
        chunk_shape.push_back(static_cast<Index>(chunk[i]));
      }
      // HDF5 counts one by one, so it is not asked about more chunks than the file has room for.
      const bool possible = filters > 0 || !readable || expected <= file_size / chunk_bytes;
      hsize_t present = 0;
      if (possible && dataset.stored_bytes_ > 0 && H5Dget_num_chunks(id, space.id(), &present) < 0) {
        fail(path, read_failure(last_error()));
      }
      whole = present == expected;
      const bool plausible = bytes <= kUnquestionedBytes || bytes / kLargestRatio <= dataset.stored_bytes_;
      if (whole && !plausible) {
        fail(path, fmt::format("claims {} bytes but stores only {}", bytes, dataset.stored_bytes_));
      }
    } else {
      whole = dataset.stored_bytes_ >= bytes;
    }
    if (!whole) fail(path, "is not stored completely; capture it again");
  }
  if (bytes == 0 || !as_is || dataset.variable_length_ || !readable) return dataset;
  dataset.descriptor_ = descriptor;
  if (layout == H5D_CONTIGUOUS) {
    const haddr_t offset = H5Dget_offset(id);
    if (offset != HADDR_UNDEF) {
      if (offset > file_size || static_cast<haddr_t>(bytes) > file_size - offset) {
        fail(path, "lies beyond the end of the file; it was truncated, copy or capture it again");
      }
      dataset.offset_ = static_cast<std::int64_t>(offset);
    }
  }
  // Releases of HDF5 differ over whether a chunk's address counts a user block. And of a dataset that can grow without
  // limit along one axis, if that is not the first, HDF5 1.10 names the chunks in the order of another array.
  const auto unlimited = std::count(limit.begin(), limit.end(), H5S_UNLIMITED);
  const bool known_order = unlimited != 1 || limit[0] == H5S_UNLIMITED;
  if (layout == H5D_CHUNKED && filters == 0 && known_order && !has_user_block()) {
    auto chunks = std::make_shared<Dataset::Chunks>(std::move(chunk_shape), dataset.shape_);
    if (chunks->worth_finding(dataset.element_size_)) dataset.chunks_ = std::move(chunks);
  }
  return dataset;
}

bool File::has_user_block() const {
  const Handle creation(H5Fget_create_plist(handle_.id()));
  hsize_t size = 0;
  return !creation || H5Pget_userblock(creation.id(), &size) < 0 || size != 0;
}

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

Dataset File::create_typed(const std::string& path, Id type, const Shape& shape, const Storage& storage) {
  create_group(parent_of(path));
  if (exists(path)) fail(path, "exists already");
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
  H5Pset_obj_track_times(creation.id(), false);
  H5Pset_attr_phase_change(creation.id(), 64, 32);
  // Every element is written, so none needs a first value; of strings HDF5 wants one all the same.
  if (H5Tis_variable_str(type) <= 0) H5Pset_fill_time(creation.id(), H5D_FILL_TIME_NEVER);
  const Handle access(H5Pcreate(H5P_DATASET_ACCESS));
  if (!storage.chunk.empty() && elements(shape) > 0) {
    H5Pset_chunk(creation.id(), static_cast<int>(storage.chunk.size()), extents(storage.chunk).data());
    if (storage.shuffle) H5Pset_shuffle(creation.id());
    if (storage.gzip_level > 0) H5Pset_deflate(creation.id(), static_cast<unsigned>(storage.gzip_level));
  }
  const Handle space = space_of(shape);
  if (storage.resizable) {
    H5Pset_chunk_cache(access.id(), 0, 0, H5D_CHUNK_CACHE_W0_DEFAULT);
    // Along every axis, though one would do: HDF5 1.10 misnames the chunks where it is one other than the first.
    const std::vector<hsize_t> no_limit(shape.size(), H5S_UNLIMITED);
    H5Sset_extent_simple(space.id(), static_cast<int>(shape.size()), extents(shape).data(), no_limit.data());
  }
  Handle dataset(H5Dcreate2(handle_.id(), path.c_str(), type, space.id(), H5P_DEFAULT, creation.id(), access.id()));
  if (!dataset) fail(path, fmt::format("cannot be created: {}", last_error()));
  return adopt(path, std::move(dataset));
}

Dataset File::create_dataset(const std::string& path, DType type, const Shape& shape, const Storage& storage) {
  const auto guard = lock();
  return create_typed(path, type_of(type).id(), shape, storage);
}

Dataset File::write_typed(const std::string& path, Id type, const void* data, std::size_t count, const Shape& shape,
                          const Storage& storage) {
  const auto guard = lock();
  if (static_cast<Index>(count) != elements(shape)) {
    fail(path, fmt::format("{} values do not have the shape ({})", count, fmt::join(shape, ", ")));
  }
  Dataset dataset = create_typed(path, type, shape, storage);
  dataset.write_raw(Shape(shape.size(), 0), shape, static_cast<const std::byte*>(data));
  return dataset;
}

Dataset File::write(const std::string& path, std::span<const float> data, const Shape& shape, const Storage& storage) {
  const auto guard = lock();
  return write_typed(path, H5T_IEEE_F32LE, data.data(), data.size(), shape, storage);
}

Dataset File::write(const std::string& path, std::span<const std::int32_t> data, const Shape& shape,
                    const Storage& storage) {
  const auto guard = lock();
  return write_typed(path, H5T_STD_I32LE, data.data(), data.size(), shape, storage);
}

Dataset File::write(const std::string& path, std::span<const std::int64_t> data, const Shape& shape,
                    const Storage& storage) {
  const auto guard = lock();
  return write_typed(path, H5T_STD_I64LE, data.data(), data.size(), shape, storage);
}

Dataset File::write(const std::string& path, std::span<const std::string> data, const Shape& shape,
                    const Storage& storage) {
  const auto guard = lock();
  std::vector<const char*> texts;
  for (const std::string& text : data) texts.push_back(text.c_str());
  return write_typed(path, string_type().id(), static_cast<const void*>(texts.data()), data.size(), shape, storage);
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
