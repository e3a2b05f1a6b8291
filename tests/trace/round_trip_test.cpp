// What is written comes back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>

#include <atomic>
#include <thread>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/places.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/check.h"
#include "trace/reader.h"
#include "trace/writer.h"

namespace kvreplay {
namespace {

using namespace test;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

std::vector<float> flat(const Matrix& matrix) { return {matrix.data(), matrix.data() + matrix.size()}; }

std::vector<float> part(const std::vector<float>& values, Index first, Index count) {
  return {values.begin() + first, values.begin() + first + count};
}

class RoundTrip : public testing::TestWithParam<DType> {
 protected:
  TemporaryFolder folder_;
};

TEST_P(RoundTrip, AllThatTheTraceSaysAboutItself) {
  const TraceInfo written = sample_info();
  write_sample(folder_ / "run.h5", GetParam());
  const TraceReader reader(folder_ / "run.h5");
  const TraceInfo& info = reader.info();
  EXPECT_EQ(reader.path(), folder_ / "run.h5");
  EXPECT_EQ(info.model.name, "sample");
  EXPECT_EQ(info.model.architecture, "llama");
  EXPECT_EQ(info.model.num_layers, 2);
  EXPECT_EQ(info.model.num_attention_heads, 4);
  EXPECT_EQ(info.model.num_key_value_heads, 2);
  EXPECT_EQ(info.model.head_dim, 8);
  EXPECT_EQ(info.model.hidden_size, 24);
  EXPECT_EQ(info.model.rope_theta, 10000);
  EXPECT_EQ(info.model.softmax_scale, written.model.softmax_scale);
  EXPECT_EQ(info.model.sliding_window, 0);
  EXPECT_EQ(info.model.attn_logit_softcapping, 0);
  EXPECT_EQ(info.created_by, "a test");
  EXPECT_EQ(info.created_at, "2026-01-02T03:04:05Z");
  EXPECT_EQ(info.source, written.source);
  EXPECT_EQ(info.token_ids, written.token_ids);
  EXPECT_EQ(info.token_pieces, written.token_pieces);
  EXPECT_EQ(info.prompt_length, 9);
  EXPECT_EQ(info.turn_starts, written.turn_starts);
  EXPECT_EQ(info.query_positions, written.query_positions);
  EXPECT_EQ(info.layers, written.layers);
  ASSERT_EQ(info.spans.size(), 2U);
  EXPECT_EQ(info.spans[0].start, 2);
  EXPECT_EQ(info.spans[0].end, 4);
  EXPECT_EQ(info.spans[0].label, "needle");
  EXPECT_EQ(info.spans[1].label, "question");
}

TEST_P(RoundTrip, EveryTensorOfEveryHead) {
  const TraceInfo info = sample_info();
  write_sample(folder_ / "run.h5", GetParam());
  const TraceReader reader(folder_ / "run.h5");
  for (int layer = 0; layer < 2; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      const auto shape = shape_of(info, layer, tensor);
      const auto written = sample_tensor(info, layer, tensor);
      const Index size = shape[1] * shape[2];
      for (int head = 0; head < shape[0]; ++head) {
        const Matrix read = reader.read(layer, tensor, head, 0, shape[1]);
        EXPECT_EQ(read.rows(), shape[1]);
        EXPECT_EQ(read.cols(), 8);
        EXPECT_EQ(flat(read), part(written, head * size, size));
      }
    }
    const auto projection = sample_output_projection(info, layer);
    const auto mass = sample_attention_mass(info, layer);
    ASSERT_TRUE(reader.has_output_projection(layer));
    ASSERT_TRUE(reader.has_attention_mass(layer));
    for (int head = 0; head < 4; ++head) {
      const Matrix read = reader.read_output_projection(layer, head);
      ASSERT_EQ(read.rows(), 24);
      ASSERT_EQ(read.cols(), 8);
      for (Index c = 0; c < 24; ++c) {
        for (Index d = 0; d < 8; ++d) {
          EXPECT_EQ(read(c, d), projection[static_cast<std::size_t>(c * 32 + head * 8 + d)]);
        }
      }
      EXPECT_EQ(reader.read_attention_mass(layer, head), part(mass, head * 9, 9));
    }
  }
}

TEST_P(RoundTrip, SomeRowsOfAHead) {
  const TraceInfo info = sample_info();
  write_sample(folder_ / "run.h5", GetParam());
  const TraceReader reader(folder_ / "run.h5");
  const auto keys = sample_tensor(info, 1, HeadTensor::keys);
  EXPECT_EQ(flat(reader.read(1, HeadTensor::keys, 1, 3, 2)), part(keys, (12 + 3) * 8, 2 * 8));
  EXPECT_EQ(flat(reader.read(1, HeadTensor::keys, 1, 11, 1)), part(keys, (12 + 11) * 8, 8));
  EXPECT_EQ(reader.read(1, HeadTensor::keys, 1, 12, 0).rows(), 0);
}

TEST_P(RoundTrip, StorageAndDigests) {
  write_sample(folder_ / "run.h5", GetParam());
  const TraceReader reader(folder_ / "run.h5");
  const auto tensors = reader.stored_tensors();
  ASSERT_EQ(tensors.size(), 12U);
  EXPECT_EQ(tensors[0].path, "/layers/0/keys");
  EXPECT_EQ(tensors[6].path, "/layers/1/keys");
  for (const StoredTensor& tensor : tensors) {
    const bool mass = tensor.path.ends_with("attention_mass");
    EXPECT_EQ(tensor.type, mass ? DType::float32 : GetParam()) << tensor.path;
    EXPECT_EQ(tensor.storage, "contiguous") << tensor.path;
    EXPECT_EQ(tensor.stored_bytes, hdf5::elements(tensor.shape) * static_cast<Index>(size_of(tensor.type)));
    EXPECT_EQ(tensor.xxh64, reader.compute_xxh64(tensor.path)) << tensor.path;
  }
}

// Heads of keys and values in turn, in pieces of 5 rows; the rest as bytes, in pieces that reach into the next head.
TEST_P(RoundTrip, PiecesMakeTheSameTensorsAsTheWhole) {
  const TraceInfo info = sample_info();
  write_sample(folder_ / "whole.h5", GetParam());
  {
    TraceWriter writer(folder_ / "pieces.h5", info, GetParam());
    for (int layer = 0; layer < 2; ++layer) {
      const auto keys = sample_tensor(info, layer, HeadTensor::keys);
      const auto values = sample_tensor(info, layer, HeadTensor::values);
      for (int head = 0; head < 2; ++head) {
        for (Index row = 0; row < 12; row += 5) {
          const Index count = std::min<Index>(5, 12 - row);
          writer.write_rows(layer, HeadTensor::keys, head, row, part(keys, (head * 12 + row) * 8, count * 8));
          writer.write_rows(layer, HeadTensor::values, head, row, part(values, (head * 12 + row) * 8, count * 8));
        }
      }
      for (const HeadTensor tensor : {HeadTensor::queries, HeadTensor::outputs}) {
        const auto rows = sample_tensor(info, layer, tensor);
        std::vector<std::byte> stored(rows.size() * size_of(GetParam()));
        from_float32(GetParam(), rows, stored.data());
        const std::size_t row_bytes = 8 * size_of(GetParam());
        Index row = 0;
        for (const Index count : {2, 12, 6}) {  // within a head; its rest, a whole one and part of the third; the rest
          writer.write_rows(layer, tensor, static_cast<int>(row / 5), row % 5,
                            std::span<const std::byte>(stored).subspan(static_cast<std::size_t>(row) * row_bytes,
                                                                       static_cast<std::size_t>(count) * row_bytes));
          row += count;
        }
      }
      const auto weight = sample_output_projection(info, layer);
      writer.write_output_projection_rows(layer, 0, part(weight, 0, 7 * 32));
      writer.write_output_projection_rows(layer, 7, part(weight, 7 * 32, 17 * 32));
      const auto mass = sample_attention_mass(info, layer);
      for (int head = 0; head < 4; ++head) writer.write_attention_mass_of(layer, head, part(mass, head * 9, 9));
    }
    writer.finish();
  }
  const TraceReader whole(folder_ / "whole.h5");
  const TraceReader pieces(folder_ / "pieces.h5");
  const std::vector<StoredTensor> found = pieces.stored_tensors();
  const std::vector<StoredTensor> expected = whole.stored_tensors();
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const StoredTensor& tensor = found[i];
    EXPECT_EQ(tensor.path, expected[i].path);
    EXPECT_EQ(tensor.xxh64, expected[i].xxh64) << tensor.path;
    EXPECT_EQ(tensor.storage, "contiguous");
    EXPECT_EQ(pieces.compute_xxh64(tensor.path), tensor.xxh64) << tensor.path;
  }
}

// The sample's first `tokens` tokens, of which the first five were the prompt, whose last three queries are there.
TraceInfo run_of(int tokens) {
  TraceInfo info = sample_info();
  info.token_ids.resize(static_cast<std::size_t>(tokens));
  info.token_pieces.resize(static_cast<std::size_t>(tokens));
  info.prompt_length = 5;
  info.query_positions.clear();
  for (int position = 2; position < tokens; ++position) info.query_positions.push_back(position);
  info.spans = {{2, 4, "needle"}};
  info.turn_starts.clear();
  return info;
}

TEST_P(RoundTrip, ARunThatWentOnIsTheSameAsOneThatWasKnown) {
  const TraceInfo beginning = run_of(5);
  for (const int tokens : {5, 6, 12, 21, 64}) {
    const TraceInfo info = run_of(tokens);
    write_sample(folder_ / "known.h5", GetParam(), info);
    {
      TraceWriter writer(folder_ / "grown.h5", beginning, GetParam(), 59);
      for (int layer = 0; layer < 2; ++layer) {
        for (const HeadTensor tensor :
             {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
          const auto all = sample_tensor(info, layer, tensor);
          const Index rows = shape_of(info, layer, tensor)[1];
          const Index known = shape_of(beginning, layer, tensor)[1];
          const auto heads = static_cast<int>(shape_of(info, layer, tensor)[0]);
          for (int head = heads; head-- > 0;) {  // in any order, each from its first row to its last
            writer.write_rows(layer, tensor, head, 0, part(all, head * rows * 8, 2 * 8));
            writer.write_rows(layer, tensor, head, 2, part(all, (head * rows + 2) * 8, (known - 2) * 8));
          }
          for (Index row = known; row < rows; ++row) {
            std::vector<float> next;
            for (int head = 0; head < heads; ++head) {
              const auto of_head = part(all, (head * rows + row) * 8, 8);
              next.insert(next.end(), of_head.begin(), of_head.end());
              if (row == 30) writer.write_rows(layer, tensor, head, row, of_head);  // in between
            }
            if (row != 30) writer.write_next(layer, tensor, next);
          }
        }
        writer.write_output_projection(layer, sample_output_projection(info, layer));
        writer.write_attention_mass(layer, sample_attention_mass(info, layer));
      }
      writer.finish(std::span(info.token_ids).subspan(5), std::span(info.token_pieces).subspan(5));
    }
    const TraceReader known(folder_ / "known.h5");
    const TraceReader grown(folder_ / "grown.h5");
    EXPECT_EQ(grown.info().token_ids, info.token_ids);
    EXPECT_EQ(grown.info().token_pieces, info.token_pieces);
    EXPECT_EQ(grown.info().prompt_length, 5);
    EXPECT_EQ(grown.info().query_positions, info.query_positions);
    const std::vector<StoredTensor> found = grown.stored_tensors();
    const std::vector<StoredTensor> expected = known.stored_tensors();
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_EQ(found[i].path, expected[i].path);
      EXPECT_EQ(found[i].xxh64, expected[i].xxh64) << found[i].path;
      EXPECT_EQ(grown.compute_xxh64(found[i].path), found[i].xxh64) << found[i].path;
    }
    EXPECT_EQ(found[0].storage, "chunked");
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, RoundTrip, testing::Values(DType::float32, DType::float16, DType::bfloat16),
                         [](const auto& tested) { return std::string(name_of(tested.param)); });

class Writer : public testing::Test {
 protected:
  std::string error_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
  TemporaryFolder folder_;
};

TEST_F(Writer, OptionalPartsMayBeAbsent) {
  TraceInfo info = sample_info();
  info.token_pieces.clear();
  info.turn_starts.clear();
  info.spans.clear();
  info.layers.clear();
  info.created_by.clear();
  info.created_at.clear();
  info.source.clear();
  info.model.sliding_window = 6;
  TraceWriter writer(folder_ / "run.h5", info, DType::float16);
  for (int layer = 0; layer < 2; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      writer.write(layer, tensor, sample_tensor(info, layer, tensor));
    }
  }
  writer.finish();
  const TraceReader reader(folder_ / "run.h5");
  EXPECT_TRUE(reader.info().token_pieces.empty());
  EXPECT_TRUE(reader.info().turn_starts.empty());
  EXPECT_TRUE(reader.info().spans.empty());
  EXPECT_EQ(reader.info().source, "");
  EXPECT_THAT(windows_of(reader.info()), ElementsAre(6, 6));
  EXPECT_THAT(reader.info().created_by, StartsWith("kvreplay "));
  EXPECT_THAT(reader.info().created_at, testing::ContainsRegex("^20[0-9][0-9]-[0-9-]+T[0-9:]+Z$"));
  EXPECT_FALSE(reader.has_output_projection(0));
  EXPECT_FALSE(reader.has_attention_mass(1));
  EXPECT_THAT(error_of([&] { static_cast<void>(reader.read_output_projection(0, 0)); }),
              HasSubstr("/layers/0: has no output_projection; capture the trace with it"));
  EXPECT_THAT(error_of([&] { static_cast<void>(reader.read_attention_mass(1, 0)); }),
              HasSubstr("/layers/1: has no attention_mass"));
}

TEST_F(Writer, LongTextsOfAnyBytesComeBack) {
  TraceInfo info = sample_info();
  info.source = std::string(100000, 'x') + "end";
  info.token_pieces[5] = "\xff\xfe not UTF-8";
  info.token_pieces[6] = "";
  write_sample(folder_ / "run.h5", DType::float32, info);
  const TraceReader reader(folder_ / "run.h5");
  EXPECT_EQ(reader.info().source, info.source);
  EXPECT_EQ(reader.info().token_pieces, info.token_pieces);
}

TEST_F(Writer, TheSameTraceMakesTheSameBytes) {
  write_sample(folder_ / "one.h5");
  write_sample(folder_ / "other.h5");
  EXPECT_EQ(read_bytes(folder_ / "one.h5"), read_bytes(folder_ / "other.h5"));
}

TEST_F(Writer, DestroyedEarlyLeavesNothing) {
  {
    TraceWriter writer(folder_ / "run.h5", sample_info(), DType::float32);
    writer.write(0, HeadTensor::keys, sample_tensor(sample_info(), 0, HeadTensor::keys));
  }
  EXPECT_TRUE(folder_.names().empty());
}

TEST_F(Writer, LeavesAnEarlierTraceAloneUntilItIsFinished) {
  write_sample(folder_ / "run.h5");
  const std::string before = read_bytes(folder_ / "run.h5");
  { const TraceWriter writer(folder_ / "run.h5", sample_info(), DType::float32); }
  EXPECT_EQ(read_bytes(folder_ / "run.h5"), before);
  EXPECT_THAT(folder_.names(), ElementsAre("run.h5"));
}

TEST_F(Writer, EveryRequiredTensorMustHaveBeenWritten) {
  const TraceInfo info = sample_info();
  TraceWriter writer(folder_ / "run.h5", info, DType::float32);
  for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
    writer.write(0, tensor, sample_tensor(info, 0, tensor));
    if (tensor != HeadTensor::values) writer.write(1, tensor, sample_tensor(info, 1, tensor));
  }
  EXPECT_THAT(error_of([&] { writer.finish(); }), HasSubstr("run.h5: /layers/1/values: was not written"));
}

TEST_F(Writer, RefusesWhatDoesNotFit) {
  const TraceInfo info = sample_info();
  TraceWriter writer(folder_ / "run.h5", info, DType::float32);
  auto keys = sample_tensor(info, 0, HeadTensor::keys);
  writer.write(0, HeadTensor::keys, keys);
  EXPECT_THAT(error_of([&] { writer.write(0, HeadTensor::keys, keys); }), HasSubstr("was written already"));
  EXPECT_THAT(error_of([&] { writer.write(2, HeadTensor::keys, keys); }), HasSubstr("there is no layer 2"));
  keys.pop_back();
  EXPECT_THAT(error_of([&] { writer.write(1, HeadTensor::keys, keys); }),
              HasSubstr("/layers/1/keys: 191 values do not have the shape (2, 12, 8)"));
}

TEST_F(Writer, RefusesValuesThatTheTypeCannotHold) {
  const TraceInfo info = sample_info();
  auto queries = sample_tensor(info, 0, HeadTensor::queries);
  queries[(3 * 5 + 4) * 8 + 1] = 65520;  // the smallest that rounds to infinity
  const auto error = [&](DType type) {
    TraceWriter writer(folder_ / "run.h5", info, type);
    return error_of([&] { writer.write(0, HeadTensor::queries, queries); });
  };
  EXPECT_THAT(error(DType::float16), HasSubstr("/layers/0/queries: 65520 at layer 0, head 3, position 11 is too large "
                                               "for float16; store the trace as bfloat16 or float32"));
  EXPECT_EQ(error(DType::bfloat16), "");
  queries[0] = 3.4e38F;
  EXPECT_THAT(error(DType::bfloat16), HasSubstr("position 5 is too large for bfloat16; store the trace as float32"));
  EXPECT_EQ(error(DType::float32), "");
  queries[1] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(error(DType::float32), HasSubstr("NaN at layer 0, head 0, position 5"));
  queries[1] = -std::numeric_limits<float>::infinity();
  EXPECT_THAT(error(DType::float32), HasSubstr("infinity at layer 0, head 0, position 5"));
}

TEST_F(Writer, PiecesComeInOrder) {
  const TraceInfo info = sample_info();
  TraceWriter writer(folder_ / "run.h5", info, DType::float32);
  const auto keys = sample_tensor(info, 0, HeadTensor::keys);
  const auto error = [&](int head, Index row, Index first, Index count) {
    return error_of([&] { writer.write_rows(0, HeadTensor::keys, head, row, part(keys, first * 8, count * 8)); });
  };
  EXPECT_THAT(error(0, 1, 1, 1), HasSubstr("run.h5: /layers/0/keys: layer 0, head 0, position 0 comes next, not layer "
                                           "0, head 0, position 1"));
  EXPECT_EQ(error(0, 0, 0, 7), "");
  EXPECT_THAT(error(0, 0, 0, 7), HasSubstr("position 7 comes next, not layer 0, head 0, position 0"));
  EXPECT_THAT(error(1, 0, 12, 1), HasSubstr("head 0, position 7 comes next, not layer 0, head 1, position 0"));
  EXPECT_THAT(error(2, 0, 0, 1), HasSubstr("there is no head 2; the trace has 2"));
  EXPECT_THAT(error(0, 12, 0, 1), HasSubstr("head 0 has no row 12; there are 12"));
  EXPECT_THAT(error(0, -1, 0, 1), HasSubstr("head 0 has no row -1"));
  EXPECT_THAT(error(0, 7, 6, 18), HasSubstr("144 values are not rows of 8 that the shape (2, 12, 8) has left"));
  EXPECT_THAT(error(0, 7, 7, 0), HasSubstr("0 values are not rows"));
  EXPECT_THAT(error_of([&] { writer.write_rows(0, HeadTensor::keys, 0, 7, part(keys, 0, 9)); }),
              HasSubstr("9 values are not rows"));
  EXPECT_THAT(error_of([&] { writer.write(0, HeadTensor::keys, keys); }), HasSubstr("was written already"));
  EXPECT_EQ(error(0, 7, 7, 17), "");
  EXPECT_THAT(error(0, 0, 0, 1), HasSubstr("was written already"));

  const auto weight = sample_output_projection(info, 0);
  EXPECT_THAT(error_of([&] { writer.write_output_projection_rows(0, 1, part(weight, 0, 32)); }),
              HasSubstr("/layers/0/output_projection: layer 0, head 0, row 0 comes next, not layer 0, head 0, row 1"));
  EXPECT_THAT(error_of([&] { writer.write_output_projection_rows(0, 24, part(weight, 0, 32)); }),
              HasSubstr("not row 24 of 24"));
  EXPECT_THAT(error_of([&] { writer.write_attention_mass_of(0, 2, std::vector<float>(9)); }),
              HasSubstr("head 0, position 0 comes next, not layer 0, head 2, position 0"));
}

TEST_F(Writer, HeadsOfARunThatGoesOnStayInStep) {
  const TraceInfo info = run_of(5);
  const std::vector<float> rows(5 * 8, 1.0F);
  TraceWriter writer(folder_ / "run.h5", info, DType::float16, 2);
  const auto next = [&](const std::vector<float>& values) {
    return error_of([&] { writer.write_next(0, HeadTensor::keys, values); });
  };
  const std::vector<float> both(2 * 8, 1.0F);
  writer.write_rows(0, HeadTensor::keys, 0, 0, rows);
  EXPECT_THAT(next(both), HasSubstr("run.h5: /layers/0/keys: heads have 5 and 0 rows; none comes next in all"));
  EXPECT_THAT(error_of([&] { writer.write_rows(0, HeadTensor::keys, 1, 1, rows); }),
              HasSubstr("head 1, position 0 comes next, not layer 0, head 1, position 1"));
  EXPECT_THAT(error_of([&] { writer.write_rows(0, HeadTensor::keys, 1, 0, std::vector<float>(8 * 8)); }),
              HasSubstr("64 values are not rows of 8 that the shape (2, 7, 8) has left"));
  writer.write_rows(0, HeadTensor::keys, 1, 0, rows);
  EXPECT_THAT(next(rows), HasSubstr("40 values are not one row of 8 for each of 2 heads"));
  std::vector<float> wrong = both;
  wrong[8] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(next(wrong), HasSubstr("NaN at layer 0, head 1, position 5; the run itself produced it"));
  wrong[8] = 1e6F;
  EXPECT_THAT(next(wrong), HasSubstr("1000000 at layer 0, head 1, position 5 is too large for float16"));
  EXPECT_EQ(next(both), "");
  EXPECT_EQ(next(both), "");
  EXPECT_THAT(next(both), HasSubstr("was written already"));
  EXPECT_THAT(error_of([&] { writer.write(0, HeadTensor::values, std::vector<float>(2 * 5 * 8)); }),
              HasSubstr("/layers/0/values: has no end yet"));
  wrong = std::vector<float>(4 * 8, std::numeric_limits<float>::quiet_NaN());
  for (int head = 0; head < 4; ++head) {
    writer.write_rows(0, HeadTensor::queries, head, 0, std::span(rows).first(3 * 8));
  }
  EXPECT_THAT(error_of([&] { writer.write_next(0, HeadTensor::queries, wrong); }),
              HasSubstr("NaN at layer 0, head 0, position 5"));

  TraceWriter known(folder_ / "known.h5", info, DType::float16);
  EXPECT_THAT(error_of([&] { known.write_next(0, HeadTensor::keys, both); }),
              HasSubstr("is not of a run that may go on; write its rows head by head"));
}

// All that `info` says of a run, and `later_rows` more rows of every head.
void write_zeros(TraceWriter& writer, const TraceInfo& info, int later_rows) {
  for (int layer = 0; layer < 2; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      const auto shape = shape_of(info, layer, tensor);
      for (int head = 0; head < shape[0]; ++head) {
        writer.write_rows(layer, tensor, head, 0, std::vector<float>(static_cast<std::size_t>(shape[1] * 8)));
      }
      for (int row = 0; row < later_rows; ++row) {
        writer.write_next(layer, tensor, std::vector<float>(static_cast<std::size_t>(shape[0] * 8)));
      }
    }
  }
}

TEST_F(Writer, ARunThatEndsEarlyTakesLittleMoreThanOneThatWasToEnd) {
  constexpr Index kMostLater = 100'000;
  const TraceInfo info = run_of(5);
  const auto size = [&](Index most_later) {
    TraceWriter writer(folder_ / "run.h5", info, DType::float32, most_later);
    write_zeros(writer, info, 1);
    writer.finish(std::vector<std::int32_t>{7}, std::vector<std::string>{"a"});
    return static_cast<Index>(std::filesystem::file_size(folder_ / "run.h5"));
  };
  const Index row_of_all = 2 * (2 * 2 + 2 * 4) * 8 * 4;  // layers, heads, elements, bytes
  EXPECT_LT(size(kMostLater), size(1) + (kMostLater + 5) / 128 * row_of_all + 20'000);
}

TEST_F(Writer, ARunEndsAsItsTensorsDo) {
  const auto error = [&](int later_rows, const std::vector<std::int32_t>& later_ids,
                         const std::vector<std::string>& later_pieces) {
    const TraceInfo info = run_of(5);
    TraceWriter writer(folder_ / "run.h5", info, DType::float32, 2);
    write_zeros(writer, info, later_rows);
    return error_of([&] { writer.finish(later_ids, later_pieces); });
  };
  EXPECT_THAT(error(1, {}, {}), HasSubstr("run.h5: /layers/0/keys: head 0 has 6 rows, but the run has 5"));
  EXPECT_THAT(error(1, {7, 8}, {"a", "b"}), HasSubstr("/layers/0/keys: head 0 has 6 rows, but the run has 7"));
  EXPECT_THAT(error(2, {7, 8, 9}, {"a", "b", "c"}), HasSubstr("/tokens/ids: 3 tokens came later, but 2 was the most"));
  EXPECT_THAT(error(1, {7}, {}), HasSubstr("/tokens/pieces: has 5 pieces for 6 tokens"));
  EXPECT_TRUE(folder_.names().empty());
  EXPECT_EQ(error(1, {7}, {"a"}), "");
}

TEST_F(Writer, ATensorMustHaveBeenWrittenToItsEnd) {
  const TraceInfo info = sample_info();
  const auto error = [&](const std::function<void(TraceWriter&)>& begin) {
    TraceWriter writer(folder_ / "run.h5", info, DType::float32);
    for (int layer = 0; layer < 2; ++layer) {
      for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::queries, HeadTensor::outputs}) {
        writer.write(layer, tensor, sample_tensor(info, layer, tensor));
      }
    }
    writer.write(0, HeadTensor::values, sample_tensor(info, 0, HeadTensor::values));
    begin(writer);
    return error_of([&] { writer.finish(); });
  };
  const auto values = sample_tensor(info, 1, HeadTensor::values);
  EXPECT_THAT(
      error([&](TraceWriter& writer) { writer.write_rows(1, HeadTensor::values, 0, 0, part(values, 0, 23 * 8)); }),
      HasSubstr("/layers/1/values: was not written to its end; layer 1, head 1, position 11 comes next"));
  EXPECT_THAT(error([&](TraceWriter& writer) {
                writer.write(1, HeadTensor::values, values);
                writer.write_output_projection_rows(0, 0, std::vector<float>(32));
              }),
              HasSubstr("/layers/0/output_projection: was not written to its end; layer 0, head 0, row 1 comes next"));
  EXPECT_THAT(
      error([&](TraceWriter& writer) {
        writer.write(1, HeadTensor::values, values);
        writer.write_attention_mass_of(1, 0, std::vector<float>(27));
      }),
      HasSubstr("/layers/1/attention_mass: was not written to its end; layer 1, head 3, position 0 comes next"));
  EXPECT_TRUE(folder_.names().empty());
}

TEST_F(Writer, RefusesPiecesWithoutNumbers) {
  const TraceInfo info = sample_info();
  std::vector<float> rows(3 * 8, 1.0F);
  rows[2 * 8] = std::numeric_limits<float>::quiet_NaN();
  for (const DType type : {DType::float32, DType::float16, DType::bfloat16}) {
    std::vector<std::byte> stored(rows.size() * size_of(type));
    from_float32(type, rows, stored.data());
    TraceWriter writer(folder_ / "run.h5", info, type);
    writer.write_rows(0, HeadTensor::outputs, 0, 0, std::vector<float>(6 * 8, 1.0F));
    EXPECT_THAT(error_of([&] { writer.write_rows(0, HeadTensor::outputs, 1, 1, rows); }),
                HasSubstr("NaN at layer 0, head 1, position 9"));
    EXPECT_THAT(error_of([&] { writer.write_rows(0, HeadTensor::outputs, 1, 1, std::span<const std::byte>(stored)); }),
                HasSubstr("NaN or infinity at layer 0, head 1, position 9"))
        << name_of(type);
  }
}

TEST_F(Writer, RefusesATraceThatContradictsItself) {
  const auto error = [&](const std::function<void(TraceInfo&)>& change) {
    TraceInfo info = sample_info();
    change(info);
    return error_of([&] { const TraceWriter writer(folder_ / "run.h5", info, DType::float32); });
  };
  EXPECT_THAT(error([](TraceInfo& info) { info.model.num_key_value_heads = 3; }), HasSubstr("run.h5: /model: 4 query"));
  EXPECT_THAT(error([](TraceInfo& info) { info.query_positions = {1, 12}; }), HasSubstr("/query_positions"));
  EXPECT_THAT(error([](TraceInfo& info) { info.prompt_length = 13; }), HasSubstr("prompt_length"));
  EXPECT_THAT(error([](TraceInfo& info) { info.token_pieces.pop_back(); }), HasSubstr("11 pieces for 12 tokens"));
  EXPECT_THAT(error([](TraceInfo& info) { info.layers.resize(1); }), HasSubstr("1 are described"));
  EXPECT_TRUE(folder_.names().empty());
}

TEST_F(Writer, NamesAFolderThatIsNotThere) {
  EXPECT_THAT(error_of([&] { const TraceWriter writer(folder_ / "no/run.h5", sample_info(), DType::float32); }),
              HasSubstr("no/run.h5: cannot be written: No such file or directory"));
}

// As h5py does with libver=("v110", "v110"): version 3 superblock, version 2 object headers. Of what carries no
// checksum there are only the heaps of strings, which have digests of their own.
TEST_F(Writer, UsesAFileFormatWithChecksums) {
  write_sample(folder_ / "run.h5");
  const std::string bytes = read_bytes(folder_ / "run.h5");
  EXPECT_EQ(bytes[8], 3);
  EXPECT_NE(bytes.find("OHDR"), std::string::npos);
  for (const char* unchecked : {"TREE", "SNOD", "HEAP"}) EXPECT_EQ(bytes.find(unchecked), std::string::npos);
}

void expect_variable_utf8(hid_t type, const std::string& what) {
  if (H5Tget_class(type) == H5T_STRING) {
    EXPECT_GT(H5Tis_variable_str(type), 0) << what;
    EXPECT_EQ(H5Tget_cset(type), H5T_CSET_UTF8) << what;
  }
  EXPECT_NE(H5Tget_class(type), H5T_COMPOUND) << what;
}

// What h5py gives as str, and what every reader of HDF5 takes.
TEST_F(Writer, StoresEveryStringAsUtf8OfVariableLength) {
  write_sample(folder_ / "run.h5");
  const hdf5::File file = hdf5::File::open(folder_ / "run.h5");
  const auto guard = hdf5::lock();
  int strings = 0;
  for (const char* path : {"/", "/model", "/tokens/ids", "/tokens/pieces", "/annotations/spans/start",
                           "/annotations/spans/label", "/layers/0/keys"}) {
    const hdf5::Handle object(H5Oopen(file.id(), path, H5P_DEFAULT));
    const int count = H5Aget_num_attrs(object.id());
    for (int i = 0; i < count; ++i) {
      const hdf5::Handle attribute(H5Aopen_by_idx(object.id(), ".", H5_INDEX_NAME, H5_ITER_INC, static_cast<hsize_t>(i),
                                                  H5P_DEFAULT, H5P_DEFAULT));
      const hdf5::Handle type(H5Aget_type(attribute.id()));
      strings += H5Tget_class(type.id()) == H5T_STRING ? 1 : 0;
      expect_variable_utf8(type.id(), path);
    }
    if (H5Iget_type(object.id()) != H5I_DATASET) continue;
    const hdf5::Handle type(H5Dget_type(object.id()));
    strings += H5Tget_class(type.id()) == H5T_STRING ? 1 : 0;
    expect_variable_utf8(type.id(), path);
  }
  EXPECT_EQ(strings, 5 + 3 + 5 + 2) << "of the file, of the model, digests of five datasets, two datasets of strings";
}

TEST_F(Writer, MarksTheFileCompleteAndSaysWhatItIs) {
  write_sample(folder_ / "run.h5");
  const hdf5::File file = hdf5::File::open(folder_ / "run.h5");
  EXPECT_EQ(file.read_string("/", "format"), "kvtrace");
  EXPECT_EQ(file.read_int("/", "format_version"), 2);
  EXPECT_EQ(file.read_int("/", "complete"), 1);
  EXPECT_EQ(file.read_int("/tokens/ids", "prompt_length"), 9);
  EXPECT_FALSE(file.has_attribute("/layers/0", "sliding_window"));
  EXPECT_EQ(file.read_int("/layers/1", "sliding_window"), 4);
  for (const char* path :
       {"/tokens/ids", "/tokens/pieces", "/tokens/turn_starts", "/query_positions", "/annotations/spans/start",
        "/annotations/spans/end", "/annotations/spans/label", "/layers/0/keys", "/layers/1/attention_mass"}) {
    EXPECT_EQ(file.read_string(path, "xxh64"), file.dataset(path).compute_xxh64()) << path;
  }
}

// Spans as compound elements, strings of fixed length.
TEST(OldTraces, AreRead) {
  const TraceReader trace(test_data() / "trace-version-1.h5");
  EXPECT_EQ(trace.info().model.architecture, "llama");
  EXPECT_EQ(trace.info().created_by, "kvreplay 0.1.0");
  EXPECT_EQ(trace.info().token_pieces[9], "p9");
  EXPECT_THAT(trace.info().turn_starts, ElementsAre(0, 3));
  ASSERT_EQ(trace.info().spans.size(), 1U);
  EXPECT_EQ(trace.info().spans[0].start, 1);
  EXPECT_EQ(trace.info().spans[0].end, 3);
  EXPECT_EQ(trace.info().spans[0].label, "needle");
  EXPECT_EQ(trace.read(1, HeadTensor::keys, 1, 0, 10).rows(), 10);
}

TEST(Digest, IsThatOfTheRawBytes) {
  // XXH64 with seed 0 of the bytes 01 00 00 00 02 00 00 00 03 00 00 00.
  const TemporaryFolder folder;
  {
    hdf5::File file = hdf5::File::create(folder / "x.h5");
    const std::vector<std::int32_t> values = {1, 2, 3};
    file.write("/x", std::span<const std::int32_t>(values), {3});
    file.write("/empty", std::span<const std::int32_t>(), {0});
    file.close();
  }
  const hdf5::File file = hdf5::File::open(folder / "x.h5");
  EXPECT_EQ(file.dataset("/x").compute_xxh64(), "b5148cb100a911fc");
  EXPECT_EQ(file.dataset("/empty").compute_xxh64(), "ef46db3751d8e999");
}

TEST(Digest, OfStringsIsThatOfTheirBytesWithAZeroBehindEach) {
  const TemporaryFolder folder;
  const std::vector<std::string> texts = {"ab", "", "é"};
  {
    hdf5::File file = hdf5::File::create(folder / "x.h5");
    EXPECT_EQ(file.write("/texts", std::span<const std::string>(texts), {3}).compute_xxh64(), "ad50205e7d7bf29a");
    file.close();
  }
  EXPECT_EQ(hdf5::File::open(folder / "x.h5").dataset("/texts").compute_xxh64(), "ad50205e7d7bf29a");
}

TEST(Digest, DoesNotDependOnHowTheDataIsStored) {
  const TemporaryFolder folder;
  const std::vector<float> values = sample_values(3 * 700 * 1100, 1);  // more than one block of reading
  const hdf5::Shape shape = {3, 700, 1100};
  {
    hdf5::File file = hdf5::File::create(folder / "x.h5");
    file.write("/plain", std::span<const float>(values), shape);
    file.write("/flat", std::span<const float>(values), {3 * 700 * 1100});
    file.close();
  }
  edit(folder / "x.h5", [&](std::int64_t file) {
    const hsize_t extents[] = {3, 700, 1100};
    const hsize_t chunk[] = {2, 300, 500};
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(creation, 3, chunk);
    H5Pset_shuffle(creation);
    H5Pset_deflate(creation, 1);
    const hid_t space = H5Screate_simple(3, extents, nullptr);
    const hid_t dataset = H5Dcreate2(file, "/chunked", H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    EXPECT_GE(H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
    H5Dclose(dataset);
    H5Sclose(space);
    H5Pclose(creation);
  });
  const hdf5::File file = hdf5::File::open(folder / "x.h5");
  const std::string digest = file.dataset("/plain").compute_xxh64();
  EXPECT_EQ(file.dataset("/chunked").compute_xxh64(), digest);
  EXPECT_EQ(file.dataset("/flat").compute_xxh64(), digest);
}

TEST(ConcurrentReads, GiveEveryThreadItsOwnRows) {
  const TemporaryFolder folder;
  const TraceInfo info = sample_info();
  write_sample(folder / "plain.h5", DType::bfloat16);
  write_sample(folder / "chunked.h5", DType::float32);
  edit(folder / "chunked.h5", [&](std::int64_t) {});
  const TraceReader plain(folder / "plain.h5");
  const TraceReader packed(test_data() / "reference-needle.h5");
  const auto keys = sample_tensor(info, 1, HeadTensor::keys);
  const std::vector<float> expected = flat(packed.read(2, HeadTensor::keys, 3, 100, 50));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        const Index row = (t + i) % 12;
        if (flat(plain.read(1, HeadTensor::keys, 1, row, 1)) != part(keys, (12 + row) * 8, 8)) ++wrong;
        if (i % 20 == 0 && flat(packed.read(2, HeadTensor::keys, 3, 100, 50)) != expected) ++wrong;
        if (i % 50 == 0 && TraceReader(folder / "chunked.h5").info().num_tokens() != 12) ++wrong;
        if (i % 50 == 0 && open_error(folder / "absent.h5").empty()) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(GoldenTraces, Open) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(golden_folder())) {
    if (entry.path().extension() != ".h5") continue;
    ++count;
    const TraceReader reader(entry.path());
    EXPECT_GT(reader.info().num_tokens(), reader.info().prompt_length) << entry.path();
    read_everything(reader);
  }
  EXPECT_GE(count, 1);
}

TEST(ReferenceTrace, IsReadThroughItsFilters) {
  const TraceReader reader(test_data() / "reference-needle.h5");
  const TraceInfo& info = reader.info();
  EXPECT_EQ(info.model.name, "demo-model");
  EXPECT_EQ(info.model.num_layers, 6);
  EXPECT_EQ(info.num_tokens(), 584);
  EXPECT_EQ(info.prompt_length, 569);
  EXPECT_EQ(info.num_queries(), 584);
  EXPECT_EQ(reader.stored_tensors().front().storage, "chunked, shuffle, gzip");
  read_everything(reader);
  double sum = 0;
  for (int layer = 0; layer < 6; ++layer) {
    for (int head = 0; head < 4; ++head) {
      sum += reader.read(layer, HeadTensor::keys, head, 0, 584).cast<double>().sum();
    }
  }
  EXPECT_NEAR(sum, -7740.27340532362, 1e-6);  // as h5py and NumPy have it
}

}  // namespace
}  // namespace kvreplay
