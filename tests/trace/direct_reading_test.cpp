// Reading past HDF5 gives what HDF5 gives.
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <random>
#include <thread>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/check.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using namespace test;
using hdf5::Handle;
using hdf5::Shape;
using testing::HasSubstr;

enum class Growth { fixed, limited, first_axis, second_axis, all_axes };

// How a dataset of a test is stored. HDF5 has another index of chunks for nearly every combination.
struct Layout {
  Shape chunk;  // contiguous where empty
  Growth growth = Growth::fixed;
  bool newest_format = true;
  bool allocated_early = false;
  int gzip_level = 0;
  hsize_t user_block = 0;
};

void require(bool success) {
  if (!success) throw std::runtime_error("the test's own use of HDF5 failed: " + hdf5::last_error());
}

std::vector<hsize_t> extents(const Shape& shape) { return {shape.begin(), shape.end()}; }

// Creates /x in a file of its own, or `path` in an open one, of `type` (an HDF5 type) with random bytes.
void create(hid_t file, const std::string& path, hid_t type, const Shape& shape, const Layout& layout,
            const std::vector<std::byte>& bytes) {
  std::vector<hsize_t> most = extents(shape);
  if (layout.growth == Growth::limited)
    std::transform(most.begin(), most.end(), most.begin(), [](hsize_t e) { return 3 * e; });
  if (layout.growth == Growth::first_axis) most[0] = H5S_UNLIMITED;
  if (layout.growth == Growth::second_axis) most[1] = H5S_UNLIMITED;
  if (layout.growth == Growth::all_axes) std::fill(most.begin(), most.end(), H5S_UNLIMITED);
  const Handle space(H5Screate_simple(static_cast<int>(shape.size()), extents(shape).data(), most.data()));
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
  if (!layout.chunk.empty()) {
    require(H5Pset_chunk(creation.id(), static_cast<int>(shape.size()), extents(layout.chunk).data()) >= 0);
    if (layout.allocated_early) H5Pset_alloc_time(creation.id(), H5D_ALLOC_TIME_EARLY);
    if (layout.gzip_level > 0) H5Pset_deflate(creation.id(), static_cast<unsigned>(layout.gzip_level));
  }
  const Handle dataset(H5Dcreate2(file, path.c_str(), type, space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
  require(dataset && H5Dwrite(dataset.id(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) >= 0);
}

Handle create_file(const std::filesystem::path& path, const Layout& layout) {
  const Handle access(H5Pcreate(H5P_FILE_ACCESS));
  if (layout.newest_format) H5Pset_libver_bounds(access.id(), H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE));
  if (layout.user_block > 0) H5Pset_userblock(creation.id(), layout.user_block);
  Handle file(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.id(), access.id()));
  require(static_cast<bool>(file));
  return file;
}

std::vector<std::byte> random_bytes(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(generator());
  return bytes;
}

// An HDF5 type of that many bytes whose elements are read as they lie.
hid_t type_of_size(std::size_t size) { return size == 4 ? H5T_IEEE_F32LE : size == 2 ? H5T_STD_I16LE : H5T_STD_I8LE; }

void write_random(const std::filesystem::path& path, std::size_t size, const Shape& shape, const Layout& layout,
                  unsigned seed = 1) {
  const auto guard = hdf5::lock();
  const Handle file = create_file(path, layout);
  create(file.id(), "/x", type_of_size(size), shape, layout,
         random_bytes(static_cast<std::size_t>(hdf5::elements(shape)) * size, seed));
}

std::vector<std::byte> as_hdf5_reads(const hdf5::Dataset& dataset, const Shape& first, const Shape& count) {
  const auto guard = hdf5::lock();
  std::vector<std::byte> bytes(static_cast<std::size_t>(hdf5::elements(count)) * dataset.element_size());
  const Handle type(H5Dget_type(dataset.id()));
  const Handle in_file(H5Dget_space(dataset.id()));
  const Handle in_memory(H5Screate_simple(static_cast<int>(count.size()), extents(count).data(), nullptr));
  require(H5Sselect_hyperslab(in_file.id(), H5S_SELECT_SET, extents(first).data(), nullptr, extents(count).data(),
                              nullptr) >= 0 &&
          H5Dread(dataset.id(), type.id(), in_memory.id(), in_file.id(), H5P_DEFAULT, bytes.data()) >= 0);
  return bytes;
}

std::vector<std::byte> read(const hdf5::Dataset& dataset, const Shape& first, const Shape& count) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(hdf5::elements(count)) * dataset.element_size());
  dataset.read_raw(first, count, bytes.data());
  return bytes;
}

struct Box {
  Shape first;
  Shape count;
};

// Often a whole axis, a single row, or nothing.
Box random_box(const Shape& shape, std::mt19937& generator) {
  Box box;
  for (const Index extent : shape) {
    const auto kind = generator() % 4;
    const Index from = kind == 0 ? 0 : static_cast<Index>(generator()) % (extent + 1);
    const Index rest = extent - from;
    box.first.push_back(from);
    box.count.push_back(kind <= 1   ? rest
                        : kind == 2 ? std::min<Index>(rest, 1)
                                    : static_cast<Index>(generator()) % (rest + 1));
  }
  return box;
}

void expect_random_boxes(const hdf5::Dataset& dataset, int boxes, unsigned seed) {
  std::mt19937 generator(seed);
  for (int i = 0; i < boxes; ++i) {
    const Box box = random_box(dataset.shape(), generator);
    ASSERT_EQ(read(dataset, box.first, box.count), as_hdf5_reads(dataset, box.first, box.count))
        << fmt::format("from {} count {}", box.first, box.count);
  }
  const Shape origin(dataset.shape().size(), 0);
  ASSERT_EQ(read(dataset, origin, dataset.shape()), as_hdf5_reads(dataset, origin, dataset.shape()));
}

class DirectReading : public testing::Test {
 protected:
  void expect_equal(std::size_t size, const Shape& shape, const Layout& layout, int boxes) {
    SCOPED_TRACE(fmt::format("elements of {} bytes, shape {}, chunk {}, growth {}, newest {}, early {}", size, shape,
                             layout.chunk, static_cast<int>(layout.growth), layout.newest_format,
                             layout.allocated_early));
    const auto path = folder_ / "x.h5";
    write_random(path, size, shape, layout);
    const hdf5::File file = hdf5::File::open(path);
    const hdf5::Dataset dataset = file.dataset("/x");
    EXPECT_EQ(dataset.reads_directly(), layout.growth != Growth::second_axis);
    EXPECT_EQ(dataset.storage(), layout.chunk.empty() ? "contiguous" : "chunked");
    expect_random_boxes(dataset, boxes, 5);
  }

  std::string error_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return error.what();
    }
    return "";
  }

  TemporaryFolder folder_;
};

TEST_F(DirectReading, ChunksOfAnyShapeUnderAnyIndex) {
  const Shape shape = {3, 37, 10};
  const std::vector<Shape> within = {{1, 1, 10},  {1, 1, 5}, {3, 37, 10}, {1, 37, 10}, {2, 5, 7},
                                     {1, 16, 10}, {3, 8, 3}, {2, 37, 4},  {3, 1, 10}};
  for (const std::size_t size : {1, 2, 4}) {
    expect_equal(size, shape, {}, 40);
    for (const bool newest : {false, true}) {
      for (const Shape& chunk : within) {
        expect_equal(size, shape, {chunk, Growth::fixed, newest}, 20);
        expect_equal(size, shape, {chunk, Growth::limited, newest}, 20);
        expect_equal(size, shape, {chunk, Growth::first_axis, newest}, 20);
        expect_equal(size, shape, {chunk, Growth::second_axis, newest}, 20);
        expect_equal(size, shape, {chunk, Growth::all_axes, newest}, 20);
        expect_equal(size, shape, {chunk, Growth::fixed, newest, true}, 20);
      }
      // Only a dataset that may grow can have chunks larger than itself.
      expect_equal(size, shape, {{4, 64, 16}, Growth::all_axes, newest}, 20);
      expect_equal(size, shape, {{5, 30, 10}, Growth::first_axis, newest}, 20);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(DirectReading, OtherNumbersOfAxes) {
  expect_equal(4, {1000}, {{64}}, 40);
  expect_equal(2, {41, 23}, {{7, 23}}, 40);
  expect_equal(2, {41, 23}, {{41, 5}}, 40);
  expect_equal(1, {3, 4, 5, 6, 7}, {{2, 3, 2, 4, 7}}, 60);
}

// Long enough that what lies between short runs is read in several pieces.
TEST_F(DirectReading, BoxesOfManyShortRuns) {
  expect_equal(4, {2, 3000, 64}, {}, 60);
  expect_equal(4, {2, 3000, 64}, {{1, 2000, 24}}, 60);
  expect_equal(2, {2, 3000, 64}, {{2, 3000, 64}}, 60);
}

// Finding that many chunks is left to HDF5 where it is slow; what is read is the same.
TEST_F(DirectReading, ManyChunks) {
  write_random(folder_ / "x.h5", 2, {3, 400, 4}, {{1, 1, 2}});
  const hdf5::File file = hdf5::File::open(folder_ / "x.h5");
  expect_random_boxes(file.dataset("/x"), 40, 7);
}

TEST_F(DirectReading, BehindAUserBlock) {
  for (const Shape& chunk : {Shape{}, Shape{1, 7, 4}}) {
    Layout layout{chunk};
    layout.user_block = 2048;
    write_random(folder_ / "x.h5", 4, {3, 20, 4}, layout);
    const hdf5::File file = hdf5::File::open(folder_ / "x.h5");
    expect_random_boxes(file.dataset("/x"), 40, 9);
  }
}

TEST_F(DirectReading, FilteredDataIsLeftToHDF5) {
  Layout layout{{1, 7, 4}};
  layout.gzip_level = 1;
  write_random(folder_ / "x.h5", 4, {3, 20, 4}, layout);
  const hdf5::File file = hdf5::File::open(folder_ / "x.h5");
  const hdf5::Dataset dataset = file.dataset("/x");
  EXPECT_FALSE(dataset.reads_directly());
  EXPECT_EQ(dataset.storage(), "chunked, gzip");
  expect_random_boxes(dataset, 40, 11);
}

TEST_F(DirectReading, ThreadsThatComeAtOnceFindTheSame) {
  const Shape shape = {4, 60, 16};
  write_random(folder_ / "x.h5", 4, shape, {{1, 7, 16}});
  const hdf5::File file = hdf5::File::open(folder_ / "x.h5");
  const auto expected = as_hdf5_reads(file.dataset("/x"), {0, 0, 0}, shape);
  std::atomic<int> wrong = 0;
  for (int round = 0; round < 50; ++round) {
    const hdf5::Dataset dataset = file.dataset("/x");  // whose chunks are not known yet
    std::atomic<bool> go = false;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        while (!go) std::this_thread::yield();
        const auto bytes = read(dataset, {t, 0, 0}, {1, 60, 16});
        if (std::memcmp(bytes.data(), &expected[static_cast<std::size_t>(t) * bytes.size()], bytes.size()) != 0)
          ++wrong;
      });
    }
    go = true;
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(wrong, 0);
}

TEST_F(DirectReading, AChunkThatWasNeverWrittenIsMissingData) {
  const auto path = folder_ / "x.h5";
  {
    const auto guard = hdf5::lock();
    const Handle file = create_file(path, {});
    const hsize_t extent = 10;
    const hsize_t chunk = 4;
    const Handle space(H5Screate_simple(1, &extent, nullptr));
    const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
    H5Pset_chunk(creation.id(), 1, &chunk);
    const Handle dataset(
        H5Dcreate2(file.id(), "/x", H5T_IEEE_F32LE, space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
    const hsize_t first = 0;
    const hsize_t count = 4;
    H5Sselect_hyperslab(space.id(), H5S_SELECT_SET, &first, nullptr, &count, nullptr);
    const Handle memory(H5Screate_simple(1, &count, nullptr));
    const float values[4] = {};
    require(H5Dwrite(dataset.id(), H5T_IEEE_F32LE, memory.id(), space.id(), H5P_DEFAULT, values) >= 0);
  }
  const hdf5::File file = hdf5::File::open(path);
  EXPECT_THAT(error_of([&] { static_cast<void>(file.dataset("/x")); }), HasSubstr("/x: is not stored completely"));
}

// The old format's index has no checksum, so it can be made to say anything.
TEST_F(DirectReading, AnIndexThatCannotBeIsRefused) {
  const auto path = folder_ / "x.h5";
  Layout layout{{1, 5, 4}};
  layout.newest_format = false;
  write_random(path, 4, {2, 20, 4}, layout);
  const std::string sound = read_bytes(path);
  std::uint64_t address = 0;
  {
    const hdf5::File file = hdf5::File::open(path);
    const hdf5::Dataset dataset = file.dataset("/x");
    const auto guard = hdf5::lock();
    const hsize_t start[3] = {1, 5, 0};
    unsigned filters = 0;
    hsize_t size = 0;
    haddr_t found = 0;
    require(H5Dget_chunk_info_by_coord(dataset.id(), start, &filters, &found, &size) >= 0);
    address = found;
  }
  const auto error_with = [&](std::ptrdiff_t at, std::uint64_t value) {
    const std::size_t place = sound.find(std::string(reinterpret_cast<const char*>(&address), 8));
    EXPECT_NE(place, std::string::npos);
    std::string bytes = sound;
    std::memcpy(&bytes[place + static_cast<std::size_t>(at)], &value, 8);
    write_bytes(path, bytes);
    return error_of([&] {
      const hdf5::File file = hdf5::File::open(path);
      static_cast<void>(read(file.dataset("/x"), {0, 0, 0}, {2, 20, 4}));
    });
  };
  EXPECT_EQ(error_with(0, address), "");
  const std::string prefix = path.string() + ": /x: ";
  const std::string beyond =
      prefix + "a chunk lies beyond the end of the file; it was truncated, copy or capture it again";
  EXPECT_EQ(error_with(0, sound.size()), beyond);
  EXPECT_EQ(error_with(0, sound.size() - 79), beyond);
  EXPECT_EQ(error_with(0, std::uint64_t{1} << 63), beyond);
  // A key stands before the address: size, filter mask, then the chunk's first element along each axis and a zero.
  const std::string damaged = prefix + "the index of its chunks is damaged; copy or capture the file again";
  EXPECT_EQ(error_with(-24, 400), damaged);
  EXPECT_EQ(error_with(-24, 0), damaged);
  EXPECT_EQ(error_with(-40, 76), damaged);
}

TEST_F(DirectReading, AFileThatShrinksWhileItIsReadIsAnError) {
  for (const Shape& chunk : {Shape{}, Shape{1, 50, 4}}) {
    const auto path = folder_ / "x.h5";
    write_random(path, 4, {2, 2000, 4}, {chunk});
    const hdf5::File file = hdf5::File::open(path);
    const hdf5::Dataset dataset = file.dataset("/x");
    static_cast<void>(read(dataset, {0, 0, 0}, {1, 1, 1}));
    std::filesystem::resize_file(path, 30000);
    EXPECT_THAT(error_of([&] {
                  static_cast<void>(read(dataset, {0, 0, 0}, {2, 2000, 4}));
                }),
                HasSubstr("/x: the file ends before this data does; it was truncated"));
  }
}

// ---- Of a trace
// ------------------------------------------------------------------------------------------------------

// Stores every tensor of a sample trace in another way.
void store_again(const std::filesystem::path& path, const TraceInfo& info, int gzip_level) {
  edit(path, [&](std::int64_t file) {
    for (int layer = 0; layer < info.model.num_layers; ++layer) {
      for (const char* name : {"keys", "values", "queries", "outputs", "output_projection", "attention_mass"}) {
        const std::string place = fmt::format("/layers/{}/{}", layer, name);
        Handle type;
        Shape shape;
        std::vector<std::byte> bytes;
        {
          const Handle dataset(H5Dopen2(file, place.c_str(), H5P_DEFAULT));
          const Handle space(H5Dget_space(dataset.id()));
          std::vector<hsize_t> extent(static_cast<std::size_t>(H5Sget_simple_extent_ndims(space.id())));
          H5Sget_simple_extent_dims(space.id(), extent.data(), nullptr);
          shape.assign(extent.begin(), extent.end());
          type = Handle(H5Dget_type(dataset.id()));
          bytes.resize(static_cast<std::size_t>(hdf5::elements(shape)) * H5Tget_size(type.id()));
          require(H5Dread(dataset.id(), type.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) >= 0);
        }
        remove(file, place);
        Layout layout{shape};
        for (Index& extent : layout.chunk) extent = std::max<Index>(extent * 2 / 5, 1);
        layout.gzip_level = gzip_level;
        create(file, place, type.id(), shape, layout, bytes);
      }
    }
  });
}

class TraceStorage : public testing::TestWithParam<std::tuple<DType, std::string>> {
 protected:
  DType type() const { return std::get<0>(GetParam()); }

  void write(const TraceInfo& info) {
    write_sample(path_, type(), info);
    const std::string& storage = std::get<1>(GetParam());
    if (storage != "contiguous") store_again(path_, info, storage == "gzip" ? 1 : 0);
  }

  TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "run.h5";
};

// More rows than fit in one piece of reading, whatever the type.
TraceInfo long_info() {
  TraceInfo info = sample_info();
  info.token_pieces.clear();
  info.token_ids.assign(20000, 7);
  info.model.num_layers = 1;
  info.model.num_key_value_heads = 1;
  info.model.hidden_size = 5000;
  info.layers.clear();
  return info;
}

TEST_P(TraceStorage, RowsComeIntoTheCallersMemoryAndNoFurther) {
  const TraceInfo info = long_info();
  write(info);
  const TraceReader reader(path_);
  const auto keys = sample_tensor(info, 0, HeadTensor::keys);
  for (const auto& [first, count] : {std::pair<Index, Index>{0, 20000}, {19999, 1}, {4095, 9000}, {7, 0}, {3, 4096}}) {
    std::vector<float> rows(static_cast<std::size_t>(count * 8) + 2, -99);
    reader.prefetch(0, HeadTensor::keys, 0);
    reader.read_rows(0, HeadTensor::keys, 0, first, count, rows.data() + 1);
    EXPECT_EQ(rows.front(), -99);
    EXPECT_EQ(rows.back(), -99);
    EXPECT_TRUE(std::equal(rows.begin() + 1, rows.end() - 1, keys.begin() + first * 8)) << first << " " << count;
  }
}

TEST_P(TraceStorage, WholeRowsOfTheOutputProjection) {
  const TraceInfo info = long_info();
  write(info);
  const TraceReader reader(path_);
  const auto projection = sample_output_projection(info, 0);
  std::vector<float> rows(projection.size());
  reader.read_projection_rows(0, 0, 5000, rows.data());
  EXPECT_EQ(rows, projection);
  reader.read_projection_rows(0, 4990, 10, rows.data());
  EXPECT_TRUE(std::equal(projection.end() - 320, projection.end(), rows.begin()));
  const Matrix head = reader.read_output_projection(0, 3);
  for (Index row = 0; row < 5000; ++row) {
    for (Index d = 0; d < 8; ++d) ASSERT_EQ(head(row, d), projection[static_cast<std::size_t>(row * 32 + 24 + d)]);
  }
}

TEST_P(TraceStorage, NaNAndInfinityAreFoundWhereverTheyAre) {
  const TraceInfo info = long_info();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto error_of = [&](const auto& action) -> std::string {
    try {
      const TraceReader reader(path_);
      action(reader);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  std::vector<float> rows(20000 * 8);
  for (const Index position : {0, 4095, 4096, 12345, 19999}) {
    write(info);
    edit(path_, [&](std::int64_t file) {
      poke(file, "/layers/0/keys", {0, position, 7}, position == 0 ? -infinity : nan);
      poke(file, "/layers/0/output_projection", {position / 4, 17}, infinity);
    });
    const auto read = [&](Index first, Index count) {
      return error_of(
          [&](const TraceReader& reader) { reader.read_rows(0, HeadTensor::keys, 0, first, count, rows.data()); });
    };
    EXPECT_THAT(read(0, 20000), HasSubstr(fmt::format("/layers/0/keys: {} at layer 0, head 0, position {}; capture",
                                                      position == 0 ? "infinity" : "NaN", position)));
    EXPECT_NE(read(position, 1), "");
    EXPECT_EQ(read(0, position), "");
    EXPECT_EQ(read(position + 1, 20000 - position - 1), "");
    EXPECT_THAT(
        error_of([&](const TraceReader& reader) { reader.read_projection_rows(0, 0, 5000, rows.data()); }),
        HasSubstr(fmt::format("/layers/0/output_projection: infinity at layer 0, head 2, row {};", position / 4)));
    EXPECT_EQ(error_of([&](const TraceReader& reader) { static_cast<void>(reader.read_output_projection(0, 1)); }), "");
  }
}

TEST_P(TraceStorage, WhatTheTraceDoesNotHaveIsRefused) {
  write(sample_info());
  const TraceReader reader(path_);
  float row[32];
  EXPECT_THROW(reader.read_rows(0, HeadTensor::keys, 2, 0, 1, row), Error);
  EXPECT_THROW(reader.read_rows(0, HeadTensor::keys, 0, 12, 1, row), Error);
  EXPECT_THROW(reader.read_rows(0, HeadTensor::keys, 0, -1, 1, row), Error);
  EXPECT_THROW(reader.read_rows(2, HeadTensor::keys, 0, 0, 1, row), Error);
  EXPECT_THROW(reader.read_projection_rows(0, 24, 1, row), Error);
  EXPECT_THROW(reader.read_projection_rows(0, -1, 1, row), Error);
  EXPECT_THROW(reader.prefetch(0, HeadTensor::keys, 2), Error);
  EXPECT_THROW(reader.prefetch(2, HeadTensor::keys, 0), Error);
}

INSTANTIATE_TEST_SUITE_P(Formats, TraceStorage,
                         testing::Combine(testing::Values(DType::float32, DType::float16, DType::bfloat16),
                                          testing::Values("contiguous", "chunked", "gzip")),
                         [](const auto& tested) {
                           return std::string(name_of(std::get<0>(tested.param))) + "_" + std::get<1>(tested.param);
                         });

}  // namespace
}  // namespace kvreplay
