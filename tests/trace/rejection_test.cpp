// Every file that is not a sound trace is refused, with a line that says what is wrong with it and where.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/stat.h>

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/reader.h"

namespace kvreplay {
namespace {

using namespace test;
using hdf5::Handle;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class Rejects : public testing::Test {
 protected:
  Rejects() { write_sample(path_); }

  // What opening says after `change`. One line that begins with the file's name.
  std::string after(const std::function<void(std::int64_t)>& change) {
    write_sample(path_);
    edit(path_, change);
    return error();
  }

  std::string error() {
    const std::string message = open_error(path_);
    if (!message.empty()) {
      EXPECT_THAT(message, StartsWith(path_.string() + ": "));
      EXPECT_THAT(message, Not(HasSubstr("\n")));
    }
    return message;
  }

  std::string read_error(const std::function<void(const TraceReader&)>& read) {
    const TraceReader reader(path_);
    try {
      read(reader);
    } catch (const Error& failure) {
      EXPECT_THAT(failure.what(), StartsWith(path_.string() + ": "));
      return failure.what();
    }
    return "";
  }

  TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "run.h5";
};

TEST_F(Rejects, WhatCannotBeOpened) {
  EXPECT_THAT(open_error(folder_ / "absent.h5"), HasSubstr("absent.h5: cannot be opened: No such file or directory"));
  EXPECT_THAT(open_error(folder_.path()), HasSubstr("it is a folder"));
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(open_error(folder_ / "pipe"), HasSubstr("it is not a regular file"));
  write_bytes(path_, "");
  EXPECT_THAT(error(), HasSubstr("it is empty"));
  write_bytes(path_, "PK\3\4 certainly not a trace");
  EXPECT_THAT(error(), HasSubstr("it is not an HDF5 file"));
}

TEST_F(Rejects, HDF5FilesThatAreNotTraces) {
  EXPECT_THAT(after([](auto file) { set_string(file, "/", "format", "something"); }), HasSubstr("not a kvtrace file"));
  EXPECT_THAT(after([](auto file) { remove_attribute(file, "/", "format"); }), HasSubstr("not a kvtrace file"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/", "format", 1); }), HasSubstr("'format' is not a string"));
}

TEST_F(Rejects, OtherVersions) {
  EXPECT_EQ(after([](auto file) { set_int(file, "/", "format_version", 1); }), "");
  EXPECT_THAT(after([](auto file) { set_int(file, "/", "format_version", 3); }),
              HasSubstr("is a kvtrace of version 3, and this kvreplay reads up to version 2; update kvreplay"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/", "format_version", 0); }), HasSubstr("format_version"));
  EXPECT_THAT(after([](auto file) { remove_attribute(file, "/", "format_version"); }),
              HasSubstr("has no attribute 'format_version'"));
}

// HDF5 keeps strings of variable length where no checksum covers them.
TEST_F(Rejects, StringsThatAreNotWhatWasWritten) {
  const std::string sound = read_bytes(path_);
  const struct {
    const char* text;
    const char* reason;
  } cases[] = {
      {"naïve text", "/: string attributes are not those that 'attributes_xxh64' tells of: the file is damaged"},
      {"llama", "/model: string attributes are not those that 'attributes_xxh64' tells of: the file is damaged"},
      {"piece7", "/tokens/pieces: does not match its digest"},
      {"question", "/annotations/spans/label: does not match its digest"},
  };
  for (const auto& damaged : cases) {
    std::string bytes = sound;
    bytes[bytes.find(damaged.text)] ^= 1;
    write_bytes(path_, bytes);
    EXPECT_THAT(error(), HasSubstr(damaged.reason));
  }
}

// A reference says how long a string is and where it lies; references that share one would make gigabytes of a small
// file.
TEST_F(Rejects, StringsThatAmountToMoreThanTheFile) {
  const std::string text(200'000, 'x');
  ASSERT_EQ(after([&](auto file) {
              remove_attribute(file, "/tokens/pieces", "xxh64");
              const Handle dataset(H5Dopen2(file, "/tokens/pieces", H5P_DEFAULT));
              const Handle type(H5Dget_type(dataset.id()));
              std::vector<const char*> pieces(12, "short");
              pieces.front() = text.c_str();
              H5Dwrite(dataset.id(), type.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, pieces.data());
            }),
            "");
  std::string bytes = read_bytes(path_);
  constexpr std::size_t kReference = 16;  // a length of four bytes, an address of eight, an index of four
  const std::size_t first = bytes.find(std::string("\x40\x0d\x03\x00", 4));
  ASSERT_NE(first, std::string::npos);
  for (std::size_t element = 1; element < 12; ++element) {
    bytes.replace(first + element * kReference, kReference, bytes, first, kReference);
  }
  write_bytes(path_, bytes);
  EXPECT_THAT(error(), HasSubstr("/tokens/pieces: element 1: its strings amount to more than the whole file"));
}

TEST_F(Rejects, UnfinishedCaptures) {
  EXPECT_THAT(after([](auto file) { remove_attribute(file, "/", "complete"); }), HasSubstr("unfinished capture"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/", "complete", 0); }), HasSubstr("unfinished capture"));
}

TEST_F(Rejects, AModelThatCannotBe) {
  for (const char* name : {"num_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"}) {
    EXPECT_THAT(after([&](auto file) { remove_attribute(file, "/model", name); }),
                HasSubstr(std::string("/model: has no attribute '") + name));
    for (const std::int64_t value : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 31, std::int64_t{1} << 40}) {
      EXPECT_NE(after([&](auto file) { set_int(file, "/model", name, value); }), "") << name << " " << value;
    }
    EXPECT_THAT(after([&](auto file) { set_double(file, "/model", name, 2.0); }), HasSubstr("is not an integer"));
  }
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "num_key_value_heads", 3); }),
              HasSubstr("/model: 4 query heads cannot share 3 key/value heads evenly"));
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double scale : {0.0, -1.0, infinity, nan}) {
    EXPECT_THAT(after([&](auto file) { set_double(file, "/model", "softmax_scale", scale); }),
                HasSubstr("softmax_scale"));
  }
  for (const double cap : {-1.0, infinity, nan}) {
    EXPECT_THAT(after([&](auto file) { set_double(file, "/model", "attn_logit_softcapping", cap); }),
                HasSubstr("attn_logit_softcapping"));
  }
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "sliding_window", -5); }), HasSubstr("sliding_window"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/layers/1", "sliding_window", -5); }),
              HasSubstr("/layers/1: attribute 'sliding_window' is -5"));
  EXPECT_THAT(after([](auto file) { remove(file, "/model"); }), HasSubstr("/model: does not exist"));
}

TEST_F(Rejects, ShapesThatDisagreeWithTheModel) {
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "head_dim", 16); }),
              HasSubstr("/layers/0/keys: has the shape (2, 12, 8), but /model and /tokens make it (2, 12, 16)"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "num_key_value_heads", 4); }),
              HasSubstr("/layers/0/keys: has the shape (2, 12, 8), but /model and /tokens make it (4, 12, 8)"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "hidden_size", 25); }),
              HasSubstr("/layers/0/output_projection: has the shape (24, 32)"));
  EXPECT_THAT(after([](auto file) {
                set_int(file, "/", "format_version", 1);  // since the second, layers may be without attention
                set_int(file, "/model", "num_layers", 3);
              }),
              HasSubstr("/layers/2: is missing, although /model counts 3 layers"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "num_layers", 1 << 30); }),
              HasSubstr("/model: attribute 'num_layers' is 1073741824, more than any model has"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "num_layers", 1); }),
              HasSubstr("/layers/1: exists, although /model counts 1 layers"));
  for (const char* name : {"keys", "values", "queries", "outputs"}) {
    const std::string path = std::string("/layers/1/") + name;
    EXPECT_THAT(after([&](auto file) { remove(file, path); }), HasSubstr(path + ": does not exist"));
    EXPECT_THAT(after([&](auto file) {
                  replace_floats(file, path, {3, 4}, std::vector<float>(12));
                }),
                HasSubstr(path + ": has the shape (3, 4)"));
  }
  EXPECT_THAT(after([](auto file) {
                replace_floats(file, "/layers/1/attention_mass", {4, 8}, std::vector<float>(32));
              }),
              HasSubstr("/layers/1/attention_mass: has the shape (4, 8)"));
  EXPECT_THAT(after([](auto file) { remove(file, "/layers"); }), HasSubstr("/layers: no layer attends"));
}

TEST_F(Rejects, TensorsOfOtherTypes) {
  EXPECT_THAT(after([](auto file) {
                remove(file, "/layers/0/keys");
                const hsize_t extent[] = {2, 12, 8};
                const Handle space(H5Screate_simple(3, extent, nullptr));
                const Handle dataset(H5Dcreate2(file, "/layers/0/keys", H5T_IEEE_F64LE, space.id(), H5P_DEFAULT,
                                                H5P_DEFAULT, H5P_DEFAULT));
                const std::vector<double> values(192);
                H5Dwrite(dataset.id(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
              }),
              HasSubstr("/layers/0/keys: is not of a type that traces have: float32, float16 or bfloat16"));
}

TEST_F(Rejects, TokensThatCannotBe) {
  EXPECT_THAT(after([](auto file) { remove(file, "/tokens/ids"); }), HasSubstr("/tokens/ids: does not exist"));
  EXPECT_THAT(after([](auto file) {
                remove_attribute(file, "/tokens/ids", "prompt_length");
                remove_attribute(file, "/tokens", "prompt_length");
              }),
              HasSubstr("/tokens/ids: has no attribute 'prompt_length'"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/tokens", "prompt_length", 8); }), HasSubstr("differs"));
  for (const std::int64_t length : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{13}, std::int64_t{1} << 40}) {
    EXPECT_THAT(after([&](auto file) {
                  set_int(file, "/tokens/ids", "prompt_length", length);
                  set_int(file, "/tokens", "prompt_length", length);
                }),
                AllOf(HasSubstr("/tokens/ids: attribute 'prompt_length'"), HasSubstr(std::to_string(length))));
  }
  const auto ids = [&](const std::vector<std::int64_t>& values) {
    return after([&](auto file) {
      replace_ints(file, "/tokens/ids", values);
      set_int(file, "/tokens/ids", "prompt_length", 9);
    });
  };
  EXPECT_THAT(ids({1, 2, 3, 4, -5, 6, 7, 8, 9, 10, 11, 12}),
              HasSubstr("/tokens/ids: the token at position 4 has the negative id -5"));
  EXPECT_THAT(ids({1, 2, 3, 4, std::int64_t{1} << 33, 6, 7, 8, 9, 10, 11, 12}),
              HasSubstr("/tokens/ids: element 4 is out of range: 8589934592"));
  EXPECT_THAT(ids({}), HasSubstr("/tokens/ids: is empty"));
  EXPECT_THAT(after([](auto file) { replace_floats(file, "/tokens/pieces", {12}, std::vector<float>(12)); }),
              HasSubstr("/tokens/pieces: is not of a string type"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/tokens/pieces", {1, 2});
              }),
              HasSubstr("/tokens/pieces: has 2 pieces for 12 tokens"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/tokens/turn_starts", {0, 12});
              }),
              HasSubstr("/tokens/turn_starts: element 1 is 12, outside the 12 tokens"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/tokens/turn_starts", {4, 0});
              }),
              HasSubstr("/tokens/turn_starts: positions must ascend"));
}

TEST_F(Rejects, QueryPositionsThatCannotBe) {
  const auto positions = [&](const std::vector<std::int64_t>& values) {
    return after([&](auto file) { replace_ints(file, "/query_positions", values); });
  };
  EXPECT_THAT(positions({5, 7, 8, 9, 12}), HasSubstr("/query_positions: element 4 is 12, outside the 12 tokens"));
  EXPECT_THAT(positions({-1, 7, 8, 9, 11}), HasSubstr("/query_positions: element 0 is -1, outside the 12 tokens"));
  EXPECT_THAT(positions({5, 8, 7, 9, 11}), HasSubstr("positions must ascend, but 7 follows 8 at element 2"));
  EXPECT_THAT(positions({5, 7, 7, 9, 11}), HasSubstr("positions must ascend, but 7 follows 7 at element 2"));
  EXPECT_THAT(positions({5, 7, 8, 9}), HasSubstr("/layers/0/queries: has the shape (4, 5, 8)"));
  EXPECT_THAT(positions({}), HasSubstr("/query_positions: is empty"));
  EXPECT_THAT(positions({std::int64_t{1} << 32, 7, 8, 9, 11}), HasSubstr("out of range"));
  EXPECT_THAT(after([](auto file) {
                replace_floats(file, "/query_positions", {5}, {5, 7, 8, 9, 11});
              }),
              HasSubstr("/query_positions: is not of an integer type"));
  EXPECT_THAT(after([](auto file) {
                replace_floats(file, "/query_positions", {1, 5}, {5, 7, 8, 9, 11});
              }),
              HasSubstr("/query_positions: has 2 axes instead of one"));
}

// As the sample writes them, but for the second one's ends.
void replace_span(std::int64_t file, std::int64_t start, std::int64_t end) {
  replace_ints(file, "/annotations/spans/start", {2, start});
  replace_ints(file, "/annotations/spans/end", {4, end});
}

// As version 1 of the format has them.
void replace_by_compound(std::int64_t file, std::int64_t start, std::int64_t end) {
  struct Row {
    std::int64_t start;
    std::int64_t end;
    const char* label;
  };
  remove(file, "/annotations/spans");
  const Handle text(H5Tcopy(H5T_C_S1));
  H5Tset_size(text.id(), H5T_VARIABLE);
  H5Tset_cset(text.id(), H5T_CSET_UTF8);
  const Handle type(H5Tcreate(H5T_COMPOUND, sizeof(Row)));
  H5Tinsert(type.id(), "start", HOFFSET(Row, start), H5T_NATIVE_INT64);
  H5Tinsert(type.id(), "end", HOFFSET(Row, end), H5T_NATIVE_INT64);
  H5Tinsert(type.id(), "label", HOFFSET(Row, label), text.id());
  const hsize_t extent[] = {2};
  const Handle space(H5Screate_simple(1, extent, nullptr));
  const Handle dataset(
      H5Dcreate2(file, "/annotations/spans", type.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
  const Row rows[] = {{0, 2, "first, with a label of variable length"}, {start, end, "needle"}};
  H5Dwrite(dataset.id(), type.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, rows);
}

TEST_F(Rejects, SpansThatCannotBe) {
  EXPECT_EQ(after([](auto file) { replace_by_compound(file, 3, 12); }), "");
  EXPECT_EQ(TraceReader(path_).info().spans[0].label, "first, with a label of variable length");
  EXPECT_EQ(TraceReader(path_).info().spans[1].end, 12);
  EXPECT_EQ(after([](auto file) { replace_span(file, 3, 12); }), "");
  EXPECT_EQ(TraceReader(path_).info().spans[0].label, "needle");
  EXPECT_EQ(TraceReader(path_).info().spans[1].end, 12);
  for (const auto replace : {replace_span, replace_by_compound}) {
    EXPECT_THAT(after([&](auto file) { replace(file, 3, 13); }),
                AllOf(HasSubstr("/annotations/spans: span 1 ('"), HasSubstr("') is [3, 13), not a range of the 12")));
    EXPECT_NE(after([&](auto file) { replace(file, -1, 3); }), "");
    EXPECT_NE(after([&](auto file) { replace(file, 5, 5); }), "");
    EXPECT_NE(after([&](auto file) { replace(file, 5, 3); }), "");
    EXPECT_NE(after([&](auto file) { replace(file, 0, (std::int64_t{1} << 32) + 3); }), "");
  }
  EXPECT_THAT(
      after([](auto file) {
        remove(file, "/annotations/spans");
        replace_ints(file, "/annotations/spans", {1, 2});
      }),
      HasSubstr("/annotations/spans: is neither a group of start, end and label nor a one-dimensional compound"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/annotations/spans/end", {4, 7, 8});
              }),
              HasSubstr("/annotations/spans: has 2 starts, 3 ends and 2 labels"));
  EXPECT_THAT(after([](auto file) { remove(file, "/annotations/spans/label"); }),
              HasSubstr("/annotations/spans/label: does not exist"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/annotations/spans/label", {4, 7});
              }),
              HasSubstr("/annotations/spans/label: is not of a string type"));
}

TEST_F(Rejects, LayersThatCannotBe) {
  struct Case {
    const char* name;
    std::int64_t value;
    const char* reason;
  };
  for (const auto& [name, value, reason] : {
           Case{"num_attention_heads", 0, "/layers/1: attribute 'num_attention_heads' is 0, but must be positive"},
           Case{"num_key_value_heads", 3, "/layers/1: 4 query heads cannot share 3 key/value heads evenly"},
           Case{"num_key_value_heads", 4, "/layers/1/keys: has the shape (2, 12, 8), but"},
           Case{"key_dim", 9, "/layers/1/keys: has the shape (2, 12, 8), but"},
           Case{"value_dim", 9, "/layers/1/values: has the shape (2, 12, 8), but"},
           Case{"softmax_scale", -1, "/layers/1: attribute 'softmax_scale' is -1, but must be positive"},
           Case{"attn_logit_softcapping", -1, "attribute 'attn_logit_softcapping' is -1, but must be 0 or positive"},
           Case{"attention_chunk_size", -1, "attribute 'attention_chunk_size' is -1, but must be 0 or positive"},
           Case{"cache_of", 1, "/layers/1: attribute 'cache_of' is 1, but must be the number of an earlier layer"},
           Case{"cache_of", 0, "/layers/1/keys: exists, although the layer reads layer 0's"},
           Case{"values_in_keys", 9, "/layers/1: its values of 9 dimensions cannot be the first 9 of 8 of its keys"},
           Case{"values_in_keys", 8, "/layers/1/values: exists, although values are the first columns of keys"},
       }) {
    EXPECT_THAT(after([&](auto file) { set_int(file, "/layers/1", name, value); }), HasSubstr(reason));
  }
  // What the model says for all layers is not overlooked either.
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "key_dim", 9); }), HasSubstr("/layers/0/keys: has the"));
  EXPECT_THAT(after([](auto file) { set_int(file, "/model", "attention_chunk_size", -2); }),
              HasSubstr("attribute 'attention_chunk_size' is -2"));
  EXPECT_THAT(after([](auto file) { set_string(file, "/layers/0", "rotary", "local"); }),
              HasSubstr("/layers/0: attribute 'rotary' is 'local', which is not in /rotary"));
  EXPECT_THAT(after([](auto file) {
                set_int(file, "/layers/1", "cache_of", 0);
                set_int(file, "/layers/1", "value_dim", 4);
                remove(file, "/layers/1/keys");
                remove(file, "/layers/1/values");
              }),
              HasSubstr("/layers/1: attribute 'cache_of' is 0, but that layer's cache has another shape"));
}

TEST_F(Rejects, ListsOfLayersThatDoNotFit) {
  const auto with = [&](const char* name, std::vector<float> values) {
    return after([&](auto file) {
      const std::string path = std::string("/layers/0/") + name;
      replace_floats(file, path, {static_cast<Index>(values.size())}, values);
      if (std::string_view(name).starts_with("projection")) set_double(file, path, "epsilon", 1e-6);
    });
  };
  EXPECT_EQ(with("sinks", {0, 1, 2, 3}), "");
  EXPECT_THAT(with("sinks", {0, 1, 2}), HasSubstr("/layers/0/sinks: has 3 elements instead of 4"));
  EXPECT_THAT(with("sinks", {0, 1, std::numeric_limits<float>::infinity(), 3}),
              HasSubstr("/layers/0/sinks: element 2 is inf"));
  EXPECT_THAT(with("projection_norm", std::vector<float>(24)),
              HasSubstr("/layers/0/projection_norm: has 24 elements instead of 32"));
  EXPECT_THAT(with("projection_output_norm", std::vector<float>(32)),
              HasSubstr("/layers/0/projection_output_norm: has 32 elements instead of 24"));
  EXPECT_THAT(with("residual_norm", std::vector<float>(12)),
              HasSubstr("/layers/0/residual_norm: has 12 elements instead of 5"));
  EXPECT_THAT(after([](auto file) { replace_floats(file, "/layers/0/projection_norm", {32}, std::vector<float>(32)); }),
              HasSubstr("/layers/0/projection_norm: has no attribute 'epsilon'"));
  EXPECT_THAT(after([](auto file) {
                replace_floats(file, "/layers/0/sinks", {2, 2}, std::vector<float>(4));
              }),
              HasSubstr("/layers/0/sinks: has 2 axes instead of one"));
  EXPECT_THAT(after([](auto file) {
                replace_ints(file, "/layers/0/sinks", {1, 2, 3, 4});
              }),
              HasSubstr("/layers/0/sinks: is not of a type that traces have"));
  EXPECT_THAT(after([](auto file) {
                replace_floats(file, "/layers/0/output_gate", {4, 12}, std::vector<float>(48));
              }),
              HasSubstr("/layers/0/output_gate: has the shape (4, 12), but"));
}

TEST_F(Rejects, RotaryTablesThatSayTooLittle) {
  const auto with = [&](const std::function<void(std::int64_t)>& change) {
    return after([&](auto file) {
      make_group(file, "/rotary");
      replace_floats(file, "/rotary/all", {3}, {1, 0.1F, 0.01F});
      set_double(file, "/rotary/all", "attention_scaling", 1);
      set_int(file, "/rotary/all", "rotated_dims", 6);
      set_string(file, "/rotary/all", "layout", "half");
      set_string(file, "/model", "rotary", "all");
      change(file);
    });
  };
  EXPECT_EQ(with([](auto) {}), "");
  for (const char* name : {"attention_scaling", "rotated_dims", "layout"}) {
    EXPECT_THAT(with([&](auto file) { remove_attribute(file, "/rotary/all", name); }),
                HasSubstr(std::string("/rotary/all: has no attribute '") + name + "'"));
  }
  EXPECT_THAT(with([](auto file) { set_int(file, "/rotary/all", "rotated_dims", 8); }),
              HasSubstr("/rotary/all: attribute 'rotated_dims' is 8, but there are 3 frequencies"));
  EXPECT_THAT(with([](auto file) { set_string(file, "/rotary/all", "layout", "both"); }),
              HasSubstr("attribute 'layout' is 'both', but must be 'half' or 'interleaved'"));
  EXPECT_THAT(with([](auto file) { set_double(file, "/rotary/all", "attention_scaling", 0); }),
              HasSubstr("/rotary/all: attribute 'attention_scaling' is 0, but must be positive"));
  EXPECT_THAT(with([](auto file) {
                replace_floats(file, "/rotary/all", {5}, std::vector<float>(5));
                set_double(file, "/rotary/all", "attention_scaling", 1);
                set_int(file, "/rotary/all", "rotated_dims", 10);
                set_string(file, "/rotary/all", "layout", "half");
              }),
              HasSubstr("/layers/0: its rotary embedding turns 10 dimensions, but keys have 8"));
}

TEST_F(Rejects, ClaimsOfHugeSizeWithoutAllocatingThem) {
  const auto claim = [&](const std::string& path, std::vector<hsize_t> extent, hid_t type, bool chunked) {
    return after([&](auto file) {
      remove(file, path);
      const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
      std::vector<hsize_t> chunk = extent;
      for (hsize_t& size : chunk) size = std::min<hsize_t>(size, 16);
      if (chunked) H5Pset_chunk(creation.id(), static_cast<int>(chunk.size()), chunk.data());
      const Handle space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr));
      const Handle dataset(H5Dcreate2(file, path.c_str(), type, space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
    });
  };
  for (const bool chunked : {false, true}) {
    EXPECT_THAT(claim("/tokens/ids", {hsize_t{2000000000}}, H5T_STD_I32LE, chunked),
                HasSubstr("/tokens/ids: is not stored completely"));
    EXPECT_THAT(claim("/tokens/pieces", {hsize_t{2000000000}}, H5T_STD_I32LE, chunked),
                HasSubstr("/tokens/pieces: is not stored completely"));
    EXPECT_NE(claim("/query_positions", {hsize_t{1} << 60}, H5T_STD_I32LE, chunked), "");
    EXPECT_NE(claim("/query_positions", {hsize_t{1} << 33}, H5T_STD_I32LE, chunked), "");
    EXPECT_THAT(claim("/layers/0/keys", {hsize_t{1} << 30, hsize_t{1} << 20, hsize_t{8}}, H5T_IEEE_F32LE, chunked),
                HasSubstr("/layers/0/keys: "));
  }
  // The right shape, but never written: what would be read is zeros that nobody computed.
  EXPECT_THAT(claim("/layers/0/keys", {2, 12, 8}, H5T_IEEE_F32LE, false), HasSubstr("is not stored completely"));
  EXPECT_THAT(claim("/layers/0/keys", {2, 12, 8}, H5T_IEEE_F32LE, true), HasSubstr("is not stored completely"));
}

TEST_F(Rejects, DataThatLiesInOtherFiles) {
  const std::string secret = (folder_ / "secret.h5").string();
  write_sample(secret);
  EXPECT_THAT(after([&](auto file) {
                remove(file, "/layers/0/keys");
                H5Lcreate_external(secret.c_str(), "/layers/0/keys", file, "/layers/0/keys", H5P_DEFAULT, H5P_DEFAULT);
              }),
              HasSubstr("/layers/0/keys: is a soft or external link, which is not followed"));
  EXPECT_THAT(after([&](auto file) {
                remove(file, "/model");
                H5Lcreate_external(secret.c_str(), "/model", file, "/model", H5P_DEFAULT, H5P_DEFAULT);
              }),
              HasSubstr("/model: is a soft or external link"));
  EXPECT_THAT(after([&](auto file) {
                remove(file, "/layers/0/keys");
                H5Lcreate_soft("/layers/0/values", file, "/layers/0/keys", H5P_DEFAULT, H5P_DEFAULT);
              }),
              HasSubstr("/layers/0/keys: is a soft or external link"));
  const hsize_t extent[] = {2, 12, 8};
  EXPECT_THAT(after([&](auto file) {
                remove(file, "/layers/0/keys");
                const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
                H5Pset_external(creation.id(), "/etc/passwd", 0, 768);
                const Handle space(H5Screate_simple(3, extent, nullptr));
                const Handle dataset(H5Dcreate2(file, "/layers/0/keys", H5T_IEEE_F32LE, space.id(), H5P_DEFAULT,
                                                creation.id(), H5P_DEFAULT));
              }),
              HasSubstr("/layers/0/keys: takes its data from other files"));
  EXPECT_THAT(after([&](auto file) {
                remove(file, "/layers/0/keys");
                const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
                const Handle space(H5Screate_simple(3, extent, nullptr));
                H5Pset_virtual(creation.id(), space.id(), secret.c_str(), "/layers/0/keys", space.id());
                const Handle dataset(H5Dcreate2(file, "/layers/0/keys", H5T_IEEE_F32LE, space.id(), H5P_DEFAULT,
                                                creation.id(), H5P_DEFAULT));
              }),
              HasSubstr("/layers/0/keys: takes its data from other files"));
}

TEST_F(Rejects, NaNAndInfinityInWhateverIsRead) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  edit(path_, [&](auto file) {
    poke(file, "/layers/1/keys", {1, 10, 3}, nan);
    poke(file, "/layers/1/queries", {3, 4, 0}, -infinity);
    poke(file, "/layers/0/output_projection", {20, 17}, nan);
    poke(file, "/layers/0/attention_mass", {2, 8}, infinity);
  });
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read(1, HeadTensor::keys, 1, 0, 12)); }),
              HasSubstr("/layers/1/keys: NaN at layer 1, head 1, position 10"));
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read(1, HeadTensor::keys, 1, 10, 1)); }),
              HasSubstr("position 10"));
  // A row of queries is named by its position, not by its index.
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read(1, HeadTensor::queries, 3, 2, 3)); }),
              HasSubstr("/layers/1/queries: infinity at layer 1, head 3, position 11"));
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read_output_projection(0, 2)); }),
              HasSubstr("/layers/0/output_projection: NaN at layer 0, head 2, row 20"));
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read_attention_mass(0, 2)); }),
              HasSubstr("/layers/0/attention_mass: infinity at layer 0, head 2, position 8"));
  EXPECT_EQ(read_error([](const auto& trace) { static_cast<void>(trace.read(1, HeadTensor::keys, 1, 0, 10)); }), "");
  EXPECT_EQ(read_error([](const auto& trace) { static_cast<void>(trace.read(1, HeadTensor::keys, 0, 0, 12)); }), "");
}

TEST_F(Rejects, RowsAndHeadsThatAreNotThere) {
  for (const auto& [head, first, count] : {std::tuple{2, 0, 1}, {-1, 0, 1}, {0, 12, 1}, {0, -1, 1}, {0, 0, 13}}) {
    EXPECT_THAT(read_error([&, h = head, f = first, c = count](const auto& trace) {
                  static_cast<void>(trace.read(0, HeadTensor::keys, h, f, c));
                }),
                HasSubstr("/layers/0/keys: head"));
  }
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read(2, HeadTensor::keys, 0, 0, 1)); }),
              HasSubstr("there is no layer 2; the trace has 2"));
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read_output_projection(0, 4)); }),
              HasSubstr("there is no query head 4"));
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read_attention_mass(0, -1)); }),
              HasSubstr("there is no query head -1"));
}

TEST_F(Rejects, AttentionMassThatCountsQueriesAfterThePrompt) {
  const auto mass = [](float last) {
    std::vector<float> values(48, 0.5F);
    for (std::size_t head = 0; head < 4; ++head) {
      for (std::size_t position = 9; position < 12; ++position) values[head * 12 + position] = 0;
    }
    values[47] = last;
    return values;
  };
  ASSERT_EQ(after([&](auto file) { replace_floats(file, "/layers/0/attention_mass", {4, 12}, mass(0)); }), "");
  EXPECT_EQ(TraceReader(path_).read_attention_mass(0, 3), std::vector<float>(9, 0.5F));
  ASSERT_EQ(after([&](auto file) { replace_floats(file, "/layers/0/attention_mass", {4, 12}, mass(0.25F)); }), "");
  EXPECT_THAT(read_error([](const auto& trace) { static_cast<void>(trace.read_attention_mass(0, 3)); }),
              HasSubstr("position 11 is after the prompt"));
}

// Traces written by other programs: integers of other widths, strings of variable length, chunks and filters.
TEST_F(Rejects, NothingThatTheFormatAllows) {
  EXPECT_EQ(after([](auto file) {
              set_string(file, "/", "format", "kvtrace");
              set_string(file, "/", "source", "");
              set_string(file, "/model", "name", "a name of variable length");
              set_int(file, "/model", "rope_theta", 500000);
              remove_attribute(file, "/model", "attn_logit_softcapping");
              remove_attribute(file, "/tokens", "prompt_length");
              replace_ints(file, "/query_positions", {5, 7, 8, 9, 11});
              remove(file, "/annotations");
              remove(file, "/tokens/turn_starts");
              const Handle text(H5Tcopy(H5T_C_S1));
              H5Tset_size(text.id(), H5T_VARIABLE);
              remove(file, "/tokens/pieces");
              const hsize_t extent[] = {12};
              const Handle space(H5Screate_simple(1, extent, nullptr));
              const Handle dataset(
                  H5Dcreate2(file, "/tokens/pieces", text.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
              const char* pieces[12] = {"a", "", "ccc", "é", "e", "f", "g", "h", "i", "j", "k", "the last"};
              H5Dwrite(dataset.id(), text.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, pieces);
              const Handle unknown(H5Gcreate2(file, "/something_else", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
              H5Lcreate_external("elsewhere.h5", "/", file, "/not_ours", H5P_DEFAULT, H5P_DEFAULT);
            }),
            "");
  const TraceReader reader(path_);
  EXPECT_EQ(reader.info().model.name, "a name of variable length");
  EXPECT_EQ(reader.info().model.rope_theta, 500000);
  EXPECT_EQ(reader.info().token_pieces[1], "");
  EXPECT_EQ(reader.info().token_pieces[3], "é");
  EXPECT_EQ(reader.info().token_pieces[11], "the last");
}

class Filters : public testing::TestWithParam<const char*> {};

TEST_P(Filters, AreReadLikePlainStorage) {
  const std::string name = GetParam();
  const TemporaryFolder folder;
  write_sample(folder / "run.h5");
  const auto keys = sample_tensor(sample_info(), 0, HeadTensor::keys);
  edit(folder / "run.h5", [&](auto file) {
    remove(file, "/layers/0/keys");
    const Handle creation(H5Pcreate(H5P_DATASET_CREATE));
    const hsize_t extent[] = {2, 12, 8};
    const hsize_t chunk[] = {1, 5, 8};  // does not divide 12
    if (name == "compact") {
      H5Pset_layout(creation.id(), H5D_COMPACT);
    } else {
      H5Pset_chunk(creation.id(), 3, chunk);
    }
    if (name == "gzip") H5Pset_deflate(creation.id(), 6);
    if (name == "shuffle") H5Pset_shuffle(creation.id());
    if (name == "fletcher32") H5Pset_fletcher32(creation.id());
    if (name == "szip") H5Pset_szip(creation.id(), H5_SZIP_NN_OPTION_MASK, 8);
    if (name == "nbit") H5Pset_nbit(creation.id());
    if (name == "scaleoffset") H5Pset_scaleoffset(creation.id(), H5Z_SO_FLOAT_DSCALE, 4);
    const Handle space(H5Screate_simple(3, extent, nullptr));
    const Handle dataset(
        H5Dcreate2(file, "/layers/0/keys", H5T_IEEE_F32LE, space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT));
    ASSERT_GE(H5Dwrite(dataset.id(), H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, keys.data()), 0);
  });
  const TraceReader reader(folder / "run.h5");
  const std::string storage = name == "compact" ? "compact" : name == "chunked" ? "chunked" : "chunked, " + name;
  EXPECT_EQ(reader.stored_tensors().front().storage, storage);
  for (int head = 0; head < 2; ++head) {
    const Matrix rows = reader.read(0, HeadTensor::keys, head, 3, 9);
    for (Index i = 0; i < rows.size(); ++i) {
      const float expected = keys[static_cast<std::size_t>((head * 12 + 3) * 8 + i)];
      EXPECT_NEAR(rows.data()[i], expected, name == "scaleoffset" ? 1e-4 : 0);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(BuiltIn, Filters,
                         testing::Values("compact", "chunked", "gzip", "shuffle", "fletcher32", "szip", "nbit",
                                         "scaleoffset"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace kvreplay
