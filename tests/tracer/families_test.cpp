// A tiny model of every family, and what transformers computes with it: the forward pass and the captures must agree.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "hdf5/hdf5.h"
#include "support/places.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"
#include "trace/check.h"
#include "trace/inspection.h"
#include "trace/reader.h"
#include "tracer/capture.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::read_file;
using test::TemporaryFolder;
using test::windows_of;
using test::write_file;

std::filesystem::path families() { return test::project_folder() / "tests" / "tracer" / "families"; }

// The furthest that a value is from what is expected, in terms of the expected values' root mean square: the scale on
// which a tensor's values matter to what is computed with it.
double distance(std::span<const float> values, std::span<const float> expected) {
  EXPECT_EQ(values.size(), expected.size());
  double furthest = 0;
  double squares = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(values[i]) - static_cast<double>(expected[i]));
    // A comparison that holds for NaN, too.
    if (!(difference <= furthest)) furthest = difference;
    squares += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return furthest / std::sqrt(squares / static_cast<double>(expected.size()));
}

constexpr double kTolerance = 1e-4;

// What transformers made of a family's prompt.
struct Expected {
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> generated;
  std::vector<float> logits;  // [generated, vocabulary]

  explicit Expected(const std::filesystem::path& folder) {
    const auto file = hdf5::File::open(folder / "expected.h5");
    prompt = file.read_int32s("/prompt_ids");
    generated = file.read_int32s("/generated_ids");
    logits = file.read_floats("/logits");
  }

  std::span<const float> logits_before(std::size_t token) const {
    const std::size_t vocabulary = logits.size() / generated.size();
    return std::span(logits).subspan(token * vocabulary, vocabulary);
  }
};

KvCache cache_for(const ModelConfig& config, const Expected& expected) {
  return {config.num_layers, config.num_key_value_heads, config.head_dim,
          static_cast<Index>(expected.prompt.size() + expected.generated.size())};
}

class Family : public testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path folder_ = families() / GetParam();
  Expected expected_{folder_};
};

TEST_P(Family, GivesTheLogitsOfTransformers) {
  const Model model(folder_);
  Transformer transformer(model, {.threads = 2});
  KvCache cache = cache_for(model.config, expected_);
  std::vector<float> logits = transformer.forward(expected_.prompt, cache);
  EXPECT_LT(distance(logits, expected_.logits_before(0)), kTolerance);
  for (std::size_t token = 1; token < expected_.generated.size(); ++token) {
    logits = transformer.forward({&expected_.generated[token - 1], 1}, cache);
    EXPECT_LT(distance(logits, expected_.logits_before(token)), kTolerance) << token;
  }
}

TEST_P(Family, GivesThemHoweverThePromptIsDivided) {
  const Model model(folder_);
  const std::span<const std::int32_t> prompt(expected_.prompt);
  for (const std::size_t piece : {1, 7, 30}) {
    Transformer transformer(model, {});
    KvCache cache = cache_for(model.config, expected_);
    std::vector<float> logits;
    for (std::size_t done = 0; done < prompt.size(); done += piece) {
      logits = transformer.forward(prompt.subspan(done, std::min(piece, prompt.size() - done)), cache);
    }
    EXPECT_LT(distance(logits, expected_.logits_before(0)), kTolerance) << piece;
  }
}

TEST_P(Family, GivesTheSameBitsForAnyThreadsAndBlocks) {
  const Model model(folder_);
  const auto run = [&](int threads, Index block) {
    Transformer transformer(model, {.threads = threads, .block_tokens = block});
    KvCache cache = cache_for(model.config, expected_);
    std::vector<float> logits = transformer.forward(expected_.prompt, cache);
    const auto more = transformer.forward({expected_.generated.data(), 1}, cache);
    logits.insert(logits.end(), more.begin(), more.end());
    return logits;
  };
  const auto whole = run(1, 1024);
  EXPECT_EQ(run(3, 1024), whole);
  EXPECT_EQ(run(2, 13), whole);
}

std::vector<float> whole(const TraceReader& trace, int layer, HeadTensor tensor) {
  const TraceInfo& info = trace.info();
  const bool of_queries = tensor == HeadTensor::queries || tensor == HeadTensor::outputs;
  const int heads = of_queries ? info.model.num_attention_heads : info.model.num_key_value_heads;
  const Index rows = of_queries ? info.num_queries() : info.num_tokens();
  std::vector<float> all;
  for (int head = 0; head < heads; ++head) {
    const Matrix matrix = trace.read(layer, tensor, head, 0, rows);
    all.insert(all.end(), matrix.data(), matrix.data() + matrix.size());
  }
  return all;
}

std::vector<float> whole_mass(const TraceReader& trace, int layer) {
  std::vector<float> all;
  for (int head = 0; head < trace.info().model.num_attention_heads; ++head) {
    const std::vector<float> mass = trace.read_attention_mass(layer, head);
    all.insert(all.end(), mass.begin(), mass.end());
  }
  return all;
}

void expect_same_model(const TraceInfo& info, const TraceInfo& expected) {
  EXPECT_EQ(info.model.name, expected.model.name);
  EXPECT_EQ(info.model.architecture, expected.model.architecture);
  EXPECT_EQ(info.model.num_layers, expected.model.num_layers);
  EXPECT_EQ(info.model.num_attention_heads, expected.model.num_attention_heads);
  EXPECT_EQ(info.model.num_key_value_heads, expected.model.num_key_value_heads);
  EXPECT_EQ(info.model.head_dim, expected.model.head_dim);
  EXPECT_EQ(info.model.hidden_size, expected.model.hidden_size);
  EXPECT_EQ(info.model.rope_theta, expected.model.rope_theta);
  EXPECT_DOUBLE_EQ(info.model.softmax_scale, expected.model.softmax_scale);
  EXPECT_EQ(info.model.sliding_window, expected.model.sliding_window);
  EXPECT_EQ(info.model.attn_logit_softcapping, expected.model.attn_logit_softcapping);
  EXPECT_EQ(windows_of(info), windows_of(expected));
}

TEST_P(Family, CapturesWhatIsCapturedFromTransformers) {
  const TraceReader expected(folder_ / "trace.h5");
  const TemporaryFolder folder;
  CaptureOptions options;
  options.model_folder = folder_;
  options.prompt_ids = parse_token_ids(read_file(folder_ / "prompt.ids"), "prompt.ids");
  options.prompt_name = "prompt.ids";
  options.query_window = expected.info().prompt_length - expected.info().query_positions.front();
  options.generate = static_cast<int>(expected_.generated.size());
  options.output = folder / "run.h5";
  EXPECT_EQ(capture(options).generated_ids, expected_.generated);

  const TraceReader trace(options.output);
  ASSERT_EQ(trace.info().token_ids, expected.info().token_ids);
  ASSERT_EQ(trace.info().prompt_length, expected.info().prompt_length);
  ASSERT_EQ(trace.info().query_positions, expected.info().query_positions);
  expect_same_model(trace.info(), expected.info());
  for (int layer = 0; layer < expected.info().model.num_layers; ++layer) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      EXPECT_LT(distance(whole(trace, layer, tensor), whole(expected, layer, tensor)), kTolerance)
          << name_of(tensor) << " of layer " << layer;
    }
    EXPECT_LT(distance(whole_mass(trace, layer), whole_mass(expected, layer)), kTolerance) << layer;
    for (int head = 0; head < expected.info().model.num_attention_heads; ++head) {
      EXPECT_EQ(trace.read_output_projection(layer, head), expected.read_output_projection(layer, head));
    }
  }
}

// Windows and caps stand in the trace as attention applied them, or its outputs could not be recomputed.
TEST_P(Family, CapturesWhatReplaysCanRecompute) {
  const TemporaryFolder folder;
  CaptureOptions options;
  options.model_folder = folder_;
  options.prompt_ids = expected_.prompt;
  options.prompt_name = "ids";
  options.generate = 3;
  options.output = folder / "run.h5";
  capture(options);
  const Inspection inspection = inspect(TraceReader(options.output), true);
  ASSERT_EQ(inspection.fidelity.size(), static_cast<std::size_t>(inspection.info.model.num_layers));
  for (const auto& layer : inspection.fidelity) EXPECT_LT(layer.worst, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Each, Family,
                         testing::Values("llama", "llama3", "llama-own-head", "mistral", "qwen2", "qwen3", "phi3",
                                         "gemma", "gemma-other-activation", "gemma2", "gemma2-pattern", "gemma3",
                                         "gemma3-layer-types", "gemma3-old-names"),
                         [](const auto& family) {
                           std::string name = family.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(Families, TellWhereTheHeadIsNotTheEmbeddingsThatItIsSaidToBe) {
  const Model own(families() / "llama-own-head");
  ASSERT_EQ(own.warnings.size(), 1u);
  EXPECT_NE(own.warnings[0].find("tie_word_embeddings is true, but lm_head.weight is not the embeddings"),
            std::string::npos)
      << own.warnings[0];
  for (const char* name : {"llama", "llama3", "gemma2", "gemma3"}) {
    EXPECT_TRUE(Model(families() / name).warnings.empty()) << name;
  }
}

// Multimodal checkpoints hold the language model under names of their own, old and new, and describe it in a section
// of their own.
TEST(Families, FindTheLanguageModelOfAMultimodalOne) {
  const auto logits_of = [](const std::filesystem::path& folder, const Expected& expected) {
    const Model model(folder);
    EXPECT_EQ(model.config.vocab_size, static_cast<int>(expected.logits_before(0).size()));
    KvCache cache = cache_for(model.config, expected);
    return Transformer(model, {}).forward(expected.prompt, cache);
  };
  const auto original = families() / "gemma3";
  const Expected expected(original);
  const std::vector<float> logits = logits_of(original, expected);
  const json text_config = json::parse(read_file(original / "config.json"));
  const std::string weights = read_file(original / "model.safetensors");
  std::uint64_t header_length;
  std::memcpy(&header_length, weights.data(), 8);
  const json header = json::parse(weights.substr(8, header_length));
  for (const std::string prefix : {"language_model.model.", "model.language_model."}) {
    const TemporaryFolder folder;
    json renamed;
    for (const auto& [name, entry] : header.items()) {
      renamed[name.starts_with("model.") ? prefix + name.substr(6) : name] = entry;
    }
    write_file(folder / "model.safetensors",
               test::safetensors_bytes(renamed.dump(), weights.substr(8 + header_length)));
    json config = {{"architectures", {"Gemma3ForConditionalGeneration"}},
                   {"model_type", "gemma3"},
                   {"text_config", text_config},
                   {"vision_config", {{"hidden_size", 8}}}};
    config["text_config"].erase("architectures");
    write_file(folder / "config.json", config.dump());
    EXPECT_EQ(logits_of(folder.path(), expected), logits) << prefix;
  }
}

}  // namespace
}  // namespace kvreplay::tracer
