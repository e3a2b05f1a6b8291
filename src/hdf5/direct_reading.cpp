#include "hdf5/direct_reading.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "hdf5/library.h"

namespace kvreplay::hdf5 {
namespace {

constexpr std::int64_t kReadAheadBytes = std::int64_t{128} << 10;  // what a Linux file system reads ahead by default
constexpr Index kShortRunBytes = Index{8} << 10;    // of these a call to the system each costs more than copying
constexpr Index kLargestGap = 4;                    // bytes read for each that is asked for, at most
constexpr Index kGatheredBytes = Index{128} << 10;  // stays in a core's own cache

}  // namespace

// HDF5 before 1.14 walks through all chunks before the one that it is asked about, some 50 ns for each; reading them
// itself, it manages some 4 GB/s.
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
  if (elements(count) == 0) return;

  if (reads_directly()) {
    for_each_part(first, count, [&](const Part& part) {
      read_part(part, count, out + static_cast<std::size_t>(part.out) * element_size_);
    });
    return;
  }

  const auto guard = lock();
  const Handle file_space = selected_space(handle_.id(), first, count);
  const Handle memory_space = space_of(count);
  if (!file_space) fail(last_error());
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

}  // namespace kvreplay::hdf5
