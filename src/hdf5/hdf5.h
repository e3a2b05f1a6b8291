// HDF5 files as kvreplay needs them: by path, with handles that close themselves and errors that say what happened.
//
// Files may come from anywhere. Links are followed only within the file, external and virtual datasets are refused,
// nothing is allocated because a file merely claims a size, and variable-length strings, which HDF5 stores without
// checksums, are read by bounds-checked code of our own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/matrix.h"

namespace kvreplay::hdf5 {

/// What HDF5 calls hid_t.
using Id = std::int64_t;

/// Extents of a dataset, slowest first. Empty for a single value.
using Shape = std::vector<Index>;

/// Elements of a dataset of that shape.
Index elements(const Shape& shape);

/// Takes the lock that stands before all of HDF5, which is not thread-safe as it is commonly built. Every function here
/// takes it; whoever calls the C API directly must hold it. Taking it for the first time prepares the library.
[[nodiscard]] std::unique_lock<std::recursive_mutex> lock();

/// Why the last HDF5 call of this thread failed: the innermost entry of the error stack, on one line.
std::string last_error();

/// An HDF5 identifier of any kind that is closed with its owner.
class Handle {
 public:
  Handle() = default;
  explicit Handle(Id id) : id_(id) {}
  ~Handle() { reset(); }
  Handle(Handle&& other) noexcept : id_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept;

  Id id() const { return id_; }
  explicit operator bool() const { return id_ >= 0; }
  Id release();
  void reset();

 private:
  Id id_ = -1;
};

/// An open dataset.
class Dataset {
 public:
  const std::string& path() const { return path_; }
  const Shape& shape() const { return shape_; }

  /// How it stores floating-point elements, or nothing for any other type (big-endian and float64 included).
  std::optional<DType> float_type() const { return float_type_; }

  /// Bytes of one element as stored.
  std::size_t element_size() const { return element_size_; }

  /// Bytes on disk, after filters.
  Index stored_bytes() const { return stored_bytes_; }

  /// "contiguous", "compact", "chunked", or "chunked, " and the names of its filters in the order of writing.
  const std::string& storage() const { return storage_; }

  /// Reads a box of elements as their little-endian bytes, row-major. Room for them at `out` is the caller's.
  /// Not for variable-length elements. Where reads_directly(), threads do not wait for each other. Throws Error, also
  /// where the box leaves the dataset.
  void read_raw(const Shape& first, const Shape& count, std::byte* out) const;

  /// Whether read_raw() goes past HDF5, without the lock: contiguous datasets, and chunked ones without filters
  /// where HDF5 says in good time where their chunks lie.
  bool reads_directly() const { return offset_ >= 0 || chunks_ != nullptr; }

  /// Asks the system to read a box ahead, where reads are direct, and does not wait for it. Throws Error as read_raw().
  void prefetch(const Shape& first, const Shape& count) const;

  /// Writes a box of elements of this dataset's own type. Throws Error.
  void write_raw(const Shape& first, const Shape& count, const std::byte* data);

  /// Gives a resizable dataset these extents. Throws Error.
  void resize(const Shape& shape);

  /// XXH64 (seed 0, 16 hexadecimal digits) of all elements' little-endian bytes in logical order; of strings of
  /// variable length, of their bytes with a zero byte behind each. Throws Error on damage, and for other elements of
  /// variable length.
  std::string compute_xxh64() const;

  /// All elements of a dataset of strings, of fixed or variable length, in logical order. Throws Error.
  std::vector<std::string> read_strings() const;

  /// For what this class does not cover; hold lock().
  Id id() const { return handle_.id(); }

 private:
  friend class File;
  struct Chunks;
  // A box within a block: a whole contiguous dataset, or one chunk, whose elements lie together in row-major order.
  struct Part {
    std::int64_t place;  // of the block's first byte in the file
    const Shape& block;  // the block's extents
    Shape first;         // where the box begins in the block
    Shape count;         // and its extents
    Index out;           // where its first element goes, in elements of the caller's memory
  };
  [[noreturn]] void fail(std::string_view reason) const;
  void check_box(const Shape& first, const Shape& count) const;
  std::vector<std::byte> read_whole(Id memory_type, std::size_t memory_size) const;
  void find_chunks() const;
  template <class Action>
  void for_each_part(const Shape& first, const Shape& count, const Action& action) const;
  void read_part(const Part& part, const Shape& out_extents, std::byte* out) const;

  std::string file_;
  std::string path_;
  Handle handle_;
  Handle raw_type_;  ///< the stored type in little-endian order
  Shape shape_;
  std::optional<DType> float_type_;
  std::size_t element_size_ = 0;
  Index stored_bytes_ = 0;
  std::string storage_;
  bool variable_length_ = false;
  int descriptor_ = -1;             ///< of the open file, where bytes can be read directly
  std::int64_t offset_ = -1;        ///< of the first byte in the file, where a contiguous dataset can be read directly
  std::shared_ptr<Chunks> chunks_;  ///< where a chunked dataset can be read directly
};

/// A string attribute.
struct NamedString {
  std::string name;
  std::string value;  ///< up to its first zero byte, as HDF5 stores it
};

/// A start, an end and a label.
struct LabelledRange {
  std::int64_t start = 0;
  std::int64_t end = 0;
  std::string label;
};

/// An open file. Objects are named by their absolute path ("/layers/0/keys"); "/" is the root.
/// All members throw Error as "file: path: reason" unless they say otherwise, and may be called from several threads.
class File {
 public:
  /// Opens for reading.
  static File open(const std::filesystem::path& path);

  /// Creates for writing in the file format of HDF5 1.10, whose metadata carries checksums; replaces what is there.
  /// Errors call the file `shown_as`, where that is given: the name that an OutputFile will get.
  static File create(const std::filesystem::path& path, const std::filesystem::path& shown_as = {});

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  const std::filesystem::path& path() const { return path_; }

  /// Whether it is in a file format with checksums over its metadata (HDF5 1.8 and later, asked for by the writer).
  /// HDF5 1.10 believes the older format's sizes, so a damaged or malicious file of that kind can make it read memory
  /// that is not its own.
  bool has_checksums() const;

  /// Writes everything out and closes the file, which a destructor could only try. Throws Error if the disk is full.
  void close();

  /// Whether there is an object. Throws Error where the way leads through a link out of the file.
  bool exists(const std::string& path) const;
  bool is_group(const std::string& path) const;

  /// Names of a group's members, in the order of their bytes.
  std::vector<std::string> list(const std::string& group) const;

  /// Creates a group, and those above it, unless they exist.
  void create_group(const std::string& path);

  bool has_attribute(const std::string& path, const std::string& name) const;
  /// Any integer, boolean or enumeration type of any width.
  std::int64_t read_int(const std::string& path, const std::string& name) const;
  /// Any integer or floating-point type of any width.
  double read_double(const std::string& path, const std::string& name) const;
  /// A string of fixed or variable length, ASCII or UTF-8.
  std::string read_string(const std::string& path, const std::string& name) const;
  /// Several of them in one attribute, in logical order.
  std::vector<std::string> read_string_list(const std::string& path, const std::string& name) const;

  void write_int(const std::string& path, const std::string& name, std::int64_t value);
  void write_double(const std::string& path, const std::string& name, double value);
  /// As a UTF-8 string of variable length, which h5py and netCDF4 give as text; they give one of fixed length as bytes.
  void write_string(const std::string& path, const std::string& name, std::string_view value);

  /// The same for several, and an attribute `attributes_xxh64`, since HDF5 keeps such strings where no checksum covers
  /// them: XXH64 of their values with a zero byte behind each, and their names, all separated by spaces.
  void write_strings(const std::string& path, const std::vector<NamedString>& attributes);
  /// The same for one attribute of several strings.
  void write_string_list(const std::string& path, const std::string& name, const std::vector<std::string>& values);

  /// Throws Error where an object has an `attributes_xxh64` that is not that of the attributes which it names.
  void check_strings(const std::string& path) const;

  /// Opens a dataset whose size has been checked against what is stored. Throws Error for external and virtual
  /// datasets, for filters that this HDF5 lacks, and where data is missing.
  Dataset dataset(const std::string& path) const;

  /// Whole datasets. Integers of any width are read, and those out of range are an error; so are float widths.
  std::vector<float> read_floats(const std::string& path) const;
  std::vector<std::int32_t> read_int32s(const std::string& path) const;
  std::vector<std::int64_t> read_int64s(const std::string& path) const;
  std::vector<std::string> read_strings(const std::string& path) const;
  /// A group of one-dimensional datasets of one length: integers `start` and `end`, and strings `label`. As old files
  /// have them, also a one-dimensional compound dataset with these members. What else there is, is ignored.
  std::vector<LabelledRange> read_labelled_ranges(const std::string& path) const;

  /// Creates a dataset for Dataset::write_raw, and the groups above it. With `chunk` it can be resized and is laid out
  /// in chunks of that shape, of which HDF5 holds none in memory: every write goes to the file.
  Dataset create_dataset(const std::string& path, DType type, const Shape& shape, const Shape& chunk = {});

  /// Creates a dataset and the groups above it and writes it whole. Strings are stored as UTF-8 of variable length.
  Dataset write(const std::string& path, std::span<const float> data, const Shape& shape);
  Dataset write(const std::string& path, std::span<const std::int32_t> data, const Shape& shape);
  Dataset write(const std::string& path, std::span<const std::int64_t> data, const Shape& shape);
  Dataset write(const std::string& path, std::span<const std::string> data, const Shape& shape);
  /// Creates the group that read_labelled_ranges() reads, with int32 and strings.
  void write(const std::string& path, std::span<const LabelledRange> data);

  /// For what this class does not cover; hold lock().
  Id id() const { return handle_.id(); }

 private:
  File(std::filesystem::path path, Handle handle, bool writing);
  [[noreturn]] void fail(std::string_view path, std::string_view reason) const;
  Handle open_object(const std::string& path) const;
  Handle open_attribute(const Handle& object, const std::string& path, const std::string& name,
                        bool single = true) const;
  std::vector<std::string> read_texts(const std::string& path, const std::string& name, bool single) const;
  // One value, or a list of `count`.
  void write_attribute(const std::string& path, const std::string& name, Id type, const void* value,
                       std::optional<Index> count = std::nullopt);
  bool has_user_block() const;
  Dataset adopt(const std::string& path, Handle handle) const;
  Dataset create_typed(const std::string& path, Id type, const Shape& shape, const Shape& chunk = {});
  Dataset write_typed(const std::string& path, Id type, const void* data, std::size_t count, const Shape& shape);
  std::vector<LabelledRange> read_compound_ranges(const std::string& path) const;

  std::filesystem::path path_;
  Handle handle_;
  bool writing_ = false;
};

}  // namespace kvreplay::hdf5
