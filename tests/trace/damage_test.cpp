// Damage never crashes, and never makes a trace that says something else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <random>

#include "base/error.h"
#include "trace/check.h"
#include "trace/reader.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/writer.h"

namespace kvreplay {
namespace {

using namespace test;
using testing::HasSubstr;

// All of a trace's information in one string.
std::string told(const TraceInfo& info) {
  std::string text = info.model.name + "|" + info.model.architecture + "|" + info.created_by + "|" + info.created_at +
                     "|" + info.source;
  const ModelInfo& model = info.model;
  for (const double number : {static_cast<double>(model.num_layers), static_cast<double>(model.num_attention_heads),
                              static_cast<double>(model.num_key_value_heads), static_cast<double>(model.head_dim),
                              static_cast<double>(model.hidden_size), model.rope_theta, model.softmax_scale,
                              static_cast<double>(model.sliding_window), model.attn_logit_softcapping,
                              static_cast<double>(info.prompt_length)}) {
    text += "|" + std::to_string(number);
  }
  for (const auto* list : {&info.token_ids, &info.turn_starts, &info.query_positions}) {
    for (const std::int32_t value : *list) text += "|" + std::to_string(value);
  }
  for (const int window : info.layer_sliding_window) text += "|" + std::to_string(window);
  for (const std::string& piece : info.token_pieces) text += "|" + piece;
  for (const Span& span : info.spans) {
    text += "|" + std::to_string(span.start) + "|" + std::to_string(span.end) + "|" + span.label;
  }
  return text;
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
  for (std::size_t at = 0; at < sound_.size(); at += 1 + generator() % 9) {
    std::string bytes = sound_;
    bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1U << (generator() % 8)));
    opens(bytes);
    if (HasFailure()) FAIL() << "byte " << at;
  }
}

TEST_F(Damage, RandomBytesInManyPlacesNeverCrash) {
  std::mt19937 generator(11);
  for (int round = 0; round < 500; ++round) {
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

// Writes under a limit of `bytes` per file and leaves the process in the usual way, where HDF5 might still object.
[[noreturn]] void write_within(const std::filesystem::path& path, rlim_t bytes) {
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit limit{bytes, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  try {
    write_sample(path);
    std::exit(3);
  } catch (const Error& error) {
    ::setrlimit(RLIMIT_FSIZE, &before);  // the message goes to a file
    std::cerr << error.what();
    std::exit(7);
  }
}

TEST(FullDisk, EndsInOneErrorAndLeavesNothing) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const TemporaryFolder folder;
  for (const rlim_t bytes : {0, 40, 500, 2000, 6000, 9000}) {
    EXPECT_EXIT(write_within(folder / "run.h5", bytes), testing::ExitedWithCode(7),
                "run.h5: .*cannot be written: File too large$")
        << bytes;
  }
  EXPECT_TRUE(folder.names().empty());
}

TEST(FullDisk, LeavesTheProcessAbleToWriteElsewhere) {
  const TemporaryFolder folder;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 3000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(write_sample(folder / "run.h5"), Error);
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(folder.names().empty());
  write_sample(folder / "run.h5");
  EXPECT_EQ(open_error(folder / "run.h5"), "");
}

}  // namespace
}  // namespace kvreplay
