// Captured traces against an independent implementation's, against each other, and what a capture refuses.
#include "tracer/capture.h"
#include "support/places.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"
#include "trace/reader.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::TinyModel;
using test::TinyModelOptions;
using test::write_file;

const std::filesystem::path kModel = test::bundled_traces() / "demo-model";
const std::filesystem::path kData = test::test_data();

CaptureOptions demo_options(const TemporaryFolder& folder) {
  CaptureOptions options;
  options.model_folder = kModel;
  options.prompt_text = read_file(kData / "reference-prompt.txt");
  options.prompt_name = "reference-prompt.txt";
  options.generate = 16;
  options.output = folder / "run.h5";
  options.execution.threads = 2;
  return options;
}

double distance(const Matrix& value, const Matrix& expected) {
  return static_cast<double>((value - expected).cast<double>().norm() / expected.cast<double>().norm());
}

Matrix whole(const TraceReader& trace, int layer, HeadTensor tensor) {
  const TraceInfo& info = trace.info();
  const bool of_queries = tensor == HeadTensor::queries || tensor == HeadTensor::outputs;
  const int heads = of_queries ? info.model.num_attention_heads : info.model.num_key_value_heads;
  const Index rows = of_queries ? info.num_queries() : info.num_tokens();
  Matrix matrix(heads * rows, info.model.head_dim);
  for (int head = 0; head < heads; ++head) {
    matrix.middleRows(head * rows, rows) = trace.read(layer, tensor, head, 0, rows);
  }
  return matrix;
}

Matrix whole_mass(const TraceReader& trace, int layer) {
  Matrix mass(trace.info().model.num_attention_heads, trace.info().prompt_length);
  for (int head = 0; head < mass.rows(); ++head) {
    mass.row(head) = MatrixView(trace.read_attention_mass(layer, head).data(), 1, mass.cols());
  }
  return mass;
}

void expect_same_bits(const std::filesystem::path& a, const std::filesystem::path& b) {
  const TraceReader first(a);
  const TraceReader second(b);
  const auto tensors = first.stored_tensors();
  ASSERT_EQ(tensors.size(), second.stored_tensors().size());
  for (const StoredTensor& tensor : tensors) {
    EXPECT_EQ(first.compute_xxh64(tensor.path), second.compute_xxh64(tensor.path)) << tensor.path;
  }
  EXPECT_EQ(first.info().token_ids, second.info().token_ids);
}

TEST(Capture, EqualsTheReference) {
  const TemporaryFolder folder;
  const CaptureSummary summary = capture(demo_options(folder));
  const TraceReader trace(folder / "run.h5");
  const TraceReader reference(kData / "reference-needle.h5");
  ASSERT_EQ(trace.info().token_ids, reference.info().token_ids);
  EXPECT_EQ(trace.info().prompt_length, reference.info().prompt_length);
  EXPECT_EQ(trace.info().query_positions, reference.info().query_positions);
  EXPECT_EQ(trace.info().model.name, "demo-model");
  EXPECT_EQ(trace.info().model.architecture, "llama");
  EXPECT_EQ(trace.info().model.rope_theta, reference.info().model.rope_theta);
  EXPECT_NEAR(trace.info().model.softmax_scale, reference.info().model.softmax_scale, 1e-12);
  EXPECT_EQ(trace.info().source.find('/'), std::string::npos) << trace.info().source;
  for (int layer = 0; layer < trace.info().model.num_layers; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      EXPECT_LT(distance(whole(trace, layer, tensor), whole(reference, layer, tensor)), 1e-4) << layer;
    }
    EXPECT_LT(distance(whole_mass(trace, layer), whole_mass(reference, layer)), 1e-4) << layer;
    for (int head = 0; head < trace.info().model.num_attention_heads; ++head) {
      EXPECT_EQ(trace.read_output_projection(layer, head), reference.read_output_projection(layer, head));
    }
  }
  EXPECT_EQ(summary.prompt_tokens, 569);
  ASSERT_EQ(summary.generated_ids.size(), 16u);
  ASSERT_TRUE(summary.generated_text.has_value());
  EXPECT_TRUE(summary.generated_text->starts_with(" 48213.")) << *summary.generated_text;
  EXPECT_EQ(summary.file_bytes, std::filesystem::file_size(folder / "run.h5"));
  EXPECT_EQ(trace.info().token_pieces[0], "<s>");
  EXPECT_EQ(trace.info().token_pieces[4], "\n");
}

TEST(Capture, HoldsTheQueriesOfAWindowAndAllAfterThePrompt) {
  const TemporaryFolder folder;
  CaptureOptions options = demo_options(folder);
  options.query_window = 32;
  options.output_projection = false;
  const CaptureSummary summary = capture(options);
  EXPECT_EQ(summary.queries, 32 + 15);
  const TraceReader trace(folder / "run.h5");
  const TraceReader reference(kData / "reference-needle.h5");
  ASSERT_EQ(trace.info().num_queries(), 47);
  EXPECT_EQ(trace.info().query_positions.front(), 569 - 32);
  EXPECT_EQ(trace.info().query_positions.back(), 583);
  for (int layer = 0; layer < 6; ++layer) {
    EXPECT_FALSE(trace.has_output_projection(layer));
    EXPECT_LT(distance(whole_mass(trace, layer), whole_mass(reference, layer)), 1e-4);
    for (const HeadTensor tensor : {HeadTensor::queries, HeadTensor::outputs}) {
      for (int head = 0; head < 8; ++head) {
        EXPECT_LT(distance(trace.read(layer, tensor, head, 0, 47), reference.read(layer, tensor, head, 537, 47)), 1e-4);
      }
    }
    EXPECT_LT(distance(whole(trace, layer, HeadTensor::keys), whole(reference, layer, HeadTensor::keys)), 1e-4);
  }
}

TEST(Capture, TakesTokenIdsAsTheyAre) {
  const TemporaryFolder folder;
  CaptureOptions options = demo_options(folder);
  capture(options);
  options.prompt_text.reset();
  options.prompt_ids = parse_token_ids(read_file(kData / "reference-prompt.ids"), "ids");
  options.output = folder / "ids.h5";
  capture(options);
  expect_same_bits(folder / "run.h5", folder / "ids.h5");
}

TEST(Capture, GivesTheSameBitsForAnyThreadsAndBlocks) {
  const TemporaryFolder folder;
  CaptureOptions options = demo_options(folder);
  capture(options);
  options.execution.threads = 1;
  options.output = folder / "one.h5";
  capture(options);
  expect_same_bits(folder / "run.h5", folder / "one.h5");
  options.execution.block_tokens = 100;
  options.output = folder / "blocks.h5";
  capture(options);
  expect_same_bits(folder / "run.h5", folder / "blocks.h5");
}

CaptureOptions tiny_options(const TemporaryFolder& folder, std::vector<std::int32_t> ids = {5, 25, 59, 10, 72}) {
  CaptureOptions options;
  options.model_folder = folder / "tiny";
  options.prompt_ids = std::move(ids);
  options.prompt_name = "ids";
  options.output = folder / "tiny.h5";
  return options;
}

TEST(Capture, ReadsShardsLikeOneFile) {
  const TemporaryFolder folder;
  const TinyModel tiny({});
  tiny.write(folder / "tiny");
  CaptureOptions options = tiny_options(folder);
  options.generate = 3;
  capture(options);
  tiny.write(folder / "shards/tiny", 3);
  options.model_folder = folder / "shards/tiny";
  options.output = folder / "shards.h5";
  capture(options);
  expect_same_bits(folder / "tiny.h5", folder / "shards.h5");
}

TEST(Capture, StopsAtTheEndOfTheSequence) {
  const TemporaryFolder folder;
  const TinyModel tiny({});
  tiny.write(folder / "tiny");
  CaptureOptions options = tiny_options(folder);
  options.generate = 6;
  const CaptureSummary free_run = capture(options);
  ASSERT_EQ(free_run.generated_ids.size(), 6u);
  EXPECT_FALSE(free_run.ended);
  EXPECT_FALSE(free_run.generated_text.has_value());
  EXPECT_EQ(TraceReader(options.output).info().num_tokens(), 5 + 5);
  EXPECT_TRUE(TraceReader(options.output).info().token_pieces.empty());

  nlohmann::json config = tiny.config();
  config["eos_token_id"] = {96, free_run.generated_ids[2]};
  write_file(folder / "tiny/config.json", config.dump());
  const CaptureSummary ended = capture(options);
  EXPECT_TRUE(ended.ended);
  const auto first = std::find(free_run.generated_ids.begin(), free_run.generated_ids.end(), free_run.generated_ids[2]);
  EXPECT_EQ(ended.generated_ids, std::vector<std::int32_t>(free_run.generated_ids.begin(), first + 1));
  const TraceReader trace(options.output);
  EXPECT_EQ(trace.info().num_tokens(), 5 + static_cast<int>(ended.generated_ids.size()) - 1);
  EXPECT_EQ(trace.info().num_queries(), trace.info().num_tokens());

  // What was cut off is gone, and what is left is what a run gives that was asked for no more.
  options.generate = static_cast<int>(ended.generated_ids.size());
  options.output = folder / "asked.h5";
  capture(options);
  expect_same_bits(folder / "tiny.h5", options.output);
  for (const StoredTensor& tensor : trace.stored_tensors()) {
    EXPECT_EQ(tensor.xxh64, trace.compute_xxh64(tensor.path)) << tensor.path;
  }
}

TEST(Capture, NeedsNothingGenerated) {
  const TemporaryFolder folder;
  TinyModel({}).write(folder / "tiny");
  CaptureOptions options = tiny_options(folder, {5});
  options.query_window = 100;
  const CaptureSummary summary = capture(options);
  EXPECT_TRUE(summary.generated_ids.empty());
  const TraceReader trace(options.output);
  EXPECT_EQ(trace.info().num_tokens(), 1);
  EXPECT_EQ(trace.info().num_queries(), 1);
  EXPECT_EQ(trace.read_attention_mass(1, 3), std::vector<float>{1});
}

TEST(Capture, GeneratesWhatThePlainForwardPassWould) {
  const TemporaryFolder folder;
  TinyModelOptions tiny_model;
  tiny_model.heads = 8;
  tiny_model.hidden = 64;
  tiny_model.kv_heads = 1;
  const TinyModel tiny(tiny_model);
  tiny.write(folder / "tiny");
  CaptureOptions options = tiny_options(folder);
  options.generate = 8;
  std::vector<std::int32_t> ids = options.prompt_ids;
  for (const std::int32_t id : capture(options).generated_ids) {
    const auto logits = tiny.run(ids).logits;
    EXPECT_EQ(id, std::max_element(logits.begin(), logits.end()) - logits.begin());
    ids.push_back(id);
  }
  EXPECT_EQ(ids.size(), 13u);
}

TEST(Capture, StoresHalvesOfWhatItComputed) {
  const TemporaryFolder folder;
  TinyModel({}).write(folder / "tiny");
  CaptureOptions options = tiny_options(folder);
  capture(options);
  for (const DType type : {DType::float16, DType::bfloat16}) {
    options.dtype = type;
    options.output = folder / "half.h5";
    capture(options);
    const TraceReader exact(folder / "tiny.h5");
    const TraceReader rounded(folder / "half.h5");
    EXPECT_EQ(rounded.stored_tensors().front().type, type);
    const Matrix keys = whole(exact, 1, HeadTensor::keys);
    std::vector<std::byte> bytes(static_cast<std::size_t>(keys.size()) * 2);
    from_float32(type, {keys.data(), static_cast<std::size_t>(keys.size())}, bytes.data());
    Matrix expected(keys.rows(), keys.cols());
    to_float32(type, bytes.data(), {expected.data(), static_cast<std::size_t>(expected.size())});
    EXPECT_EQ(whole(rounded, 1, HeadTensor::keys), expected);
  }
}

TEST(Capture, RefusesHalvesThatWouldBecomeInfinite) {
  const TemporaryFolder folder;
  for (const auto& [tensor, reason] :
       {std::pair{"self_attn.v_proj", "too large for float16; store the trace as bfloat16 or float32"},
        {"self_attn.o_proj", "which float16 cannot (it ends at 65504); use --dtype bfloat16 or float32"}}) {
    TinyModel tiny({});
    tiny.set_weight(fmt::format("model.layers.1.{}.weight", tensor), 0, 1e7);
    tiny.write(folder / "tiny");
    CaptureOptions options = tiny_options(folder);
    options.dtype = DType::float16;
    const std::string message = message_of<Error>([&] { capture(options); });
    EXPECT_NE(message.find("layer 1"), std::string::npos) << message;
    EXPECT_NE(message.find(reason), std::string::npos) << message;
    EXPECT_FALSE(std::filesystem::exists(options.output)) << reason;
    options.dtype = DType::bfloat16;
    EXPECT_EQ(message_of<Error>([&] { capture(options); }), "");
    std::filesystem::remove(options.output);
  }
}

TEST(Capture, FollowsSpans) {
  const TemporaryFolder folder;
  CaptureOptions options = demo_options(folder);
  options.generate = 0;
  options.spans = {{"needle", "The secret number of falcon is 48213.", 0, 0}, {"sinks", "", 0, 4}};
  capture(options);
  const TraceReader trace(options.output);
  ASSERT_EQ(trace.info().spans.size(), 2u);
  const Span& needle = trace.info().spans[0];
  std::string text;
  for (int i = needle.start; i < needle.end; ++i) text += trace.info().token_pieces[static_cast<std::size_t>(i)];
  EXPECT_NE(text.find("The secret number of falcon is 48213."), std::string::npos);
  EXPECT_EQ(trace.info().spans[1].label, "sinks");
  EXPECT_EQ(trace.info().spans[1].end, 4);
}

TEST(Capture, WarnsBeyondTheModelsContext) {
  const TemporaryFolder folder;
  const TinyModel tiny({});
  tiny.write(folder / "tiny");
  nlohmann::json config = tiny.config();
  config["max_position_embeddings"] = 6;
  write_file(folder / "tiny/config.json", config.dump());
  CaptureOptions options = tiny_options(folder);
  std::vector<std::string> warnings;
  options.on_warning = [&](const std::string& line) { warnings.push_back(line); };
  options.generate = 2;
  capture(options);
  EXPECT_TRUE(warnings.empty());
  options.generate = 3;
  capture(options);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("7 positions, but tiny was made for 6"), std::string::npos) << warnings[0];
}

TEST(Capture, TellsHowFarItIs) {
  const TemporaryFolder folder;
  CaptureOptions options = demo_options(folder);
  std::vector<CaptureProgress> seen;
  options.on_progress = [&](const CaptureProgress& progress) { seen.push_back(progress); };
  capture(options);
  double last[2] = {};
  for (const CaptureProgress& progress : seen) {
    double& stage = last[static_cast<int>(progress.stage)];
    EXPECT_GE(progress.fraction, stage);
    stage = progress.fraction;
    if (progress.stage == CaptureProgress::Stage::prefill) {
      EXPECT_GT(progress.tokens_per_second, 0);
    }
  }
  for (const double fraction : last) EXPECT_DOUBLE_EQ(fraction, 1);
}

TEST(Capture, RefusesBadInputInOneLineAndLeavesNothing) {
  const TemporaryFolder folder;
  TinyModel({}).write(folder / "tiny");
  const auto complaint = [&](auto change) {
    CaptureOptions options = tiny_options(folder);
    change(options);
    const std::string message = message_of<Error>([&] { capture(options); });
    EXPECT_FALSE(std::filesystem::exists(options.output) && !std::filesystem::is_directory(options.output));
    return message;
  };
  const auto expect = [](const std::string& message, const std::string& reason) {
    EXPECT_NE(message.find(reason), std::string::npos) << '"' << message << '"';
  };
  expect(complaint([&](auto& o) { o.model_folder = folder / "none"; }), "none: is not a model folder");
  expect(complaint([&](auto& o) { o.model_folder = folder.path(); }), "holds no config.json");
  expect(complaint([](auto& o) { o.prompt_ids.clear(); }), "ids: the prompt is empty");
  expect(complaint([](auto& o) { o.prompt_ids[2] = 97; }),
         "ids: token id 97 at position 2 is not in the model's vocabulary of 97");
  expect(complaint([](auto& o) { o.prompt_ids[0] = -1; }), "token id -1 at position 0");
  expect(complaint([](auto& o) { o.prompt_text = "text"; }), "holds neither tokenizer.json nor tokenizer.model");
  expect(complaint([](auto& o) { o.generate = -1; }), "must not be negative");
  expect(complaint([](auto& o) { o.query_window = 0; }), "must be at least 1");
  expect(complaint([](auto& o) { o.execution.threads = 0; }), "must be at least 1");
  expect(complaint([&](auto& o) { o.output = folder / "none/run.h5"; }), "cannot be written");
  expect(complaint([&](auto& o) { o.output = folder.path(); }), "is a folder");
  expect(complaint([](auto& o) { o.spans = {{"far", "", 2, 6}}; }), "span \"far\": [2, 6) is not a range");

  CaptureOptions empty = demo_options(folder);
  empty.prompt_text = "";
  expect(message_of<Error>([&] { capture(empty); }), "reference-prompt.txt: the prompt is empty");

  TinyModel damaged({});
  damaged.set_weight("model.layers.1.self_attn.k_proj.weight", 0, std::nan(""));
  damaged.write(folder / "tiny");
  expect(complaint([](auto&) {}), "NaN in the keys of layer 1, KV head 0, position 0");
  std::filesystem::remove(folder / "tiny/model.safetensors");
  expect(complaint([](auto&) {}), "holds no weights");
}

TEST(Capture, ReadsTokenIds) {
  EXPECT_EQ(parse_token_ids(" 1 20\n3\t\r\n", "f"), (std::vector<std::int32_t>{1, 20, 3}));
  for (const auto& [text, reason] : {std::pair{"1 x 2", "f: \"x\" is not a token id"},
                                     {"1.5", "\"1.5\" is not"},
                                     {"-1", "\"-1\" is not"},
                                     {"99999999999", "is not a token id"},
                                     {"", "holds no token ids"},
                                     {" \n", "holds no token ids"},
                                     {"1,2", "\"1,2\" is not"},
                                     {"\x01\xff", "is not a token id"}}) {
    const std::string message = message_of<Error>([t = text] { parse_token_ids(t, "f"); });
    EXPECT_NE(message.find(reason), std::string::npos) << '"' << message << '"';
  }
}

}  // namespace
}  // namespace kvreplay::tracer
