#include <fmt/format.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "base/digest.h"
#include "base/error.h"
#include "hdf5/direct_reading.h"
#include "hdf5/hdf5.h"
#include "hdf5/library.h"
#include "hdf5/string_heap.h"

namespace kvreplay::hdf5 {
namespace {

// Deflate packs at most 1032 to 1. A larger ratio in a dataset of this size is a claim, not data.
constexpr Index kUnquestionedBytes = Index{64} << 20;
constexpr Index kLargestRatio = 4096;

}  // namespace

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

void Dataset::write_raw(const Shape& first, const Shape& count, const std::byte* data) {
  check_box(first, count);
  if (elements(count) == 0) return;
  const auto guard = lock();
  const Handle file_space = selected_space(handle_.id(), first, count);
  const Handle memory_space = space_of(count);
  if (!file_space) fail(last_error());
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

}  // namespace kvreplay::hdf5
