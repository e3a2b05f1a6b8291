#include "hdf5/string_heap.h"

#include <sys/stat.h>

#include <array>

#include "hdf5/library.h"

namespace kvreplay::hdf5 {
namespace {

constexpr std::size_t kLargestHeap = std::size_t{256} << 20;

herr_t keep_reference(hid_t source, hid_t target, H5T_cdata_t* conversion, std::size_t, std::size_t, std::size_t, void*,
                      void*, hid_t) {
  if (conversion->command != H5T_CONV_INIT) return 0;
  conversion->need_bkg = H5T_BKG_NO;
  const bool known = H5Tget_class(source) == H5T_STRING && H5Tis_variable_str(source) > 0 &&
                     H5Tget_class(target) == H5T_OPAQUE && H5Tget_size(source) == kReferenceSize &&
                     H5Tget_size(target) == kReferenceSize;
  return known ? 0 : -1;
}

}  // namespace

void read_strings_as_references() {
  Handle variable(H5Tcopy(H5T_C_S1));
  H5Tset_size(variable.id(), H5T_VARIABLE);
  const Handle reference = reference_type();
  H5Tregister(H5T_PERS_SOFT, "heap reference", variable.id(), reference.id(), keep_reference);
}

Handle reference_type() {
  Handle type(H5Tcreate(H5T_OPAQUE, kReferenceSize));
  H5Tset_tag(type.id(), "reference into a global heap");
  return type;
}

GlobalHeap::GlobalHeap(hid_t file) : descriptor_(descriptor_of(file)) {
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

std::optional<std::string> GlobalHeap::resolve(const std::byte* reference, std::string& problem) {
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

bool GlobalHeap::load_collection(std::uint64_t address, std::string& problem) {
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
void GlobalHeap::find_objects() {
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

std::string fixed_text(const std::byte* bytes, std::size_t size, H5T_str_t padding) {
  const auto* text = reinterpret_cast<const char*>(bytes);
  if (padding == H5T_STR_NULLTERM) return std::string(text, ::strnlen(text, size));
  const char filler = padding == H5T_STR_SPACEPAD ? ' ' : '\0';
  while (size > 0 && text[size - 1] == filler) --size;
  return std::string(text, size);
}

}  // namespace kvreplay::hdf5
