// Damage never crashes, and never makes a trace that says something else.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <random>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/odd_trace.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/check.h"
#include "trace/layer_fields.h"
#include "trace/reader.h"
#include "trace/writer.h"

#ifdef __SANITIZE_ADDRESS__
// HDF5 1.10 leaks memory of its own where it meets damage or a full disk. That nothing of ours stays open is looked at
// below, for all tests of this program.
extern "C" const char* __lsan_default_suppressions() { return "leak:libhdf5"; }
#endif

namespace kvreplay {
namespace {

using namespace test;

class NothingStaysOpen : public testing::Environment {
 public:
  void TearDown() override {
    const auto guard = hdf5::lock();
    EXPECT_EQ(H5Fget_obj_count(H5F_OBJ_ALL, H5F_OBJ_ALL), 0);
  }
};

const testing::Environment* const nothing_stays_open = testing::AddGlobalTestEnvironment(new NothingStaysOpen);

using testing::HasSubstr;

// All of a trace's information in one string.
std::string told(const TraceInfo& info) {
  const ModelInfo& model = info.model;
  std::string text =
      fmt::format("{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}", model.name, model.architecture, info.created_by,
                  info.created_at, info.source, model.num_layers, model.num_attention_heads, model.num_key_value_heads,
                  model.head_dim, model.hidden_size, model.rope_theta, model.softmax_scale, model.sliding_window,
                  model.attn_logit_softcapping, info.prompt_length);
  text += fmt::format("|{}|{}|{}|{}|{}", fmt::join(info.token_ids, " "), fmt::join(info.turn_starts, " "),
                      fmt::join(info.query_positions, " "), fmt::join(windows_of(info), " "),
                      fmt::join(info.token_pieces, " "));
  for (const Span& span : info.spans) {
    text += fmt::format("|{} {} {} {}", span.start, span.end, span.label, span.group);
  }
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    text += fmt::format("|{} {}", of.attends, of.output_gate_dim);
    for (const LayerField& field : fields_of_its_own(info, layer)) text += " " + field.name + " " + field.value;
  }
  for (const RotaryTable& table : info.rotary) {
    text += fmt::format("|{} {} {} {}", table.name, fmt::join(table.inverse_frequencies, " "), table.attention_scaling,
                        name_of(table.layout));
  }
  return text + fmt::format("|{}|{}", fmt::join(info.turn_roles, " "), fmt::join(info.answers, " "));
}

class Damage : public testing::Test {
 protected:
  Damage() {
    write_sample(folder_ / "sound.h5", DType::bfloat16);
    sound_ = read_bytes(folder_ / "sound.h5");
    told_ = told(TraceReader(folder_ / "sound.h5").info());
  }

  // Opens `bytes` as a trace; whether that worked. If it does, the trace must say what the sound one says.
  bool opens(const std::string& bytes) {
    write_bytes(folder_ / "damaged.h5", bytes);
    try {
      const TraceReader reader(folder_ / "damaged.h5");
      EXPECT_EQ(told(reader.info()), told_);
      read_everything(reader);
      return true;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("damaged.h5: "));
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return false;
    }
  }

  TemporaryFolder folder_;
  std::string sound_;
  std::string told_;
};

TEST_F(Damage, ATruncatedTraceIsRefused) {
  for (std::size_t size = 0; size < sound_.size(); size += size < 300 ? 1 : 61) {
    EXPECT_FALSE(opens(sound_.substr(0, size))) << size;
  }
  write_bytes(folder_ / "damaged.h5", sound_.substr(0, sound_.size() - 1));
  EXPECT_THAT(open_error(folder_ / "damaged.h5"), HasSubstr("the file is truncated; copy or capture it again"));
}

TEST_F(Damage, AFlippedBitIsAnErrorOrInATensor) {
  ASSERT_TRUE(opens(sound_));
  std::mt19937 generator(7);
  for (std::size_t at = 0; at < sound_.size(); at += 1 + generator() % 15) {
    std::string bytes = sound_;
    bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1U << (generator() % 8)));
    opens(bytes);
    if (HasFailure()) FAIL() << "byte " << at;
  }
}

TEST_F(Damage, AFlippedBitInWhatLayersSayIsAnErrorToo) {
  OddTrace().write_with_digests(folder_ / "sound.h5");
  sound_ = read_bytes(folder_ / "sound.h5");
  told_ = told(TraceReader(folder_ / "sound.h5").info());
  ASSERT_TRUE(opens(sound_));
  std::mt19937 generator(9);
  for (std::size_t at = 0; at < sound_.size(); at += 1 + generator() % 15) {
    std::string bytes = sound_;
    bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1U << (generator() % 8)));
    opens(bytes);
    if (HasFailure()) FAIL() << "byte " << at;
  }
}

TEST_F(Damage, RandomBytesInManyPlacesNeverCrash) {
  std::mt19937 generator(11);
  for (int round = 0; round < 300; ++round) {
    std::string bytes = sound_;
    for (auto count = 1 + generator() % 20; count > 0; --count) {
      bytes[generator() % bytes.size()] = static_cast<char>(generator() % 256);
    }
    opens(bytes);
  }
  EXPECT_FALSE(HasFailure());
}

TEST_F(Damage, AChangedTensorIsFoundByItsDigest) {
  const TraceReader sound(folder_ / "sound.h5");
  int different = 0;
  std::mt19937 generator(13);
  for (int round = 0; round < 300; ++round) {
    std::string bytes = sound_;
    bytes[generator() % bytes.size()] ^= 4;
    write_bytes(folder_ / "damaged.h5", bytes);
    try {
      const TraceReader reader(folder_ / "damaged.h5");
      for (const StoredTensor& tensor : reader.stored_tensors()) {
        if (sound.compute_xxh64(tensor.path) == reader.compute_xxh64(tensor.path)) continue;
        ++different;
        EXPECT_NE(reader.compute_xxh64(tensor.path), tensor.xxh64);
      }
    } catch (const Error&) {
      continue;
    }
  }
  EXPECT_GT(different, 10);
}

// Lets no file grow beyond `bytes` while it lives.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
  void (*handler_)(int);
};

std::string error_of_writing(const std::filesystem::path& path, rlim_t bytes) {
  const FileSizeLimit limit(bytes);
  try {
    write_sample(path);
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

// For a process of its own, which leaves in the usual way: there HDF5 might still object.
[[noreturn]] void write_within(const std::filesystem::path& path, rlim_t bytes) {
  std::cerr << error_of_writing(path, bytes);
  std::exit(7);
}

[[noreturn]] void write_again_with_more_room(const std::filesystem::path& path) {
  const bool failed = !error_of_writing(path, 3000).empty() && !std::filesystem::exists(path);
  write_sample(path);
  std::exit(failed ? 7 : 3);
}

TEST(FullDisk, EndsInOneErrorAndLeavesNothing) {
  const TemporaryFolder folder;
  for (const rlim_t bytes : {0, 40, 500, 2000, 6000, 9000}) {
    EXPECT_EXIT(write_within(folder / "run.h5", bytes), testing::ExitedWithCode(7),
                "run.h5: .*cannot be written: File too large")
        << bytes;
  }
  EXPECT_TRUE(folder.names().empty());
}

TEST(FullDisk, LeavesTheProcessAbleToWriteElsewhere) {
  const TemporaryFolder folder;
  EXPECT_EXIT(write_again_with_more_room(folder / "run.h5"), testing::ExitedWithCode(7), "");
  EXPECT_EQ(folder.names(), std::vector<std::string>{"run.h5"});
  EXPECT_EQ(open_error(folder / "run.h5"), "");
}

}  // namespace
}  // namespace kvreplay
