// Strings: of variable length by bounds-checked code of our own, and of fixed length.
// In the file, an element of variable length is a reference into a global heap: length, address of the collection,
// index in it. The heaps carry no checksums, and HDF5 1.10 trusts their sizes when it copies. So HDF5 is asked for the
// bare references, by way of a conversion to an opaque type of the same 16 bytes that leaves them as they are, and the
// heaps are read here.
#pragma once

#include <hdf5.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "hdf5/hdf5.h"

namespace kvreplay::hdf5 {

constexpr std::size_t kReferenceSize = 16;

/// Lets HDF5 give strings of variable length as elements of reference_type(). Once, before any are read.
void read_strings_as_references();

/// kReferenceSize bytes that stand for a string of variable length.
Handle reference_type();

/// Resolves references into the global heaps of one file.
class GlobalHeap {
 public:
  explicit GlobalHeap(hid_t file);

  /// The string that `reference` (kReferenceSize bytes) stands for. On damage, sets `problem` and returns nothing.
  std::optional<std::string> resolve(const std::byte* reference, std::string& problem);

 private:
  struct Object {
    std::size_t place = 0;  // in the collection; 0: there is none
    std::size_t size = 0;
  };
  bool load_collection(std::uint64_t address, std::string& problem);
  void find_objects();

  int descriptor_;
  bool readable_ = false;
  std::uint64_t base_ = 0;
  std::uint64_t file_size_ = 0;
  std::uint64_t address_ = 0;
  std::vector<std::byte> collection_;
  std::vector<Object> objects_;  // by index
  std::uint64_t total_ = 0;
};

/// Text of a string element of fixed length.
std::string fixed_text(const std::byte* bytes, std::size_t size, H5T_str_t padding);

/// A value of that type at `bytes`, which need not be aligned.
template <class T>
T load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace kvreplay::hdf5
