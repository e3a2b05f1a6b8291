// A tiny model of every family, and what transformers computes with it: the forward pass and the captures must agree.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/temporary_folder.h"
#include "support/tiny_model.h"
#include "trace/inspection.h"
#include "trace/reader.h"
#include "tracer/capture.h"

namespace kvreplay::tracer {
namespace {

using nlohmann::json;
using test::message_of;
using test::read_file;
using test::TemporaryFolder;
using test::write_file;

std::filesystem::path families() {
  return std::filesystem::path(KVREPLAY_TEST_DATA).parent_path() / "tracer" / "families";
}

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

TEST_P(Family, CapturesWhatReplaysCanRecompute) {
  const TemporaryFolder folder;
  CaptureOptions options;
  options.model_folder = folder_;
  options.prompt_ids = expected_.prompt;
  options.prompt_name = "ids";
  options.generate = static_cast<int>(expected_.generated.size());
  options.output = folder / "run.h5";
  const CaptureSummary summary = capture(options);
  EXPECT_EQ(summary.generated_ids, expected_.generated);
  const Inspection inspection = inspect(TraceReader(options.output), true);
  EXPECT_EQ(inspection.fidelity.size(), static_cast<std::size_t>(summary.num_layers));
  for (const auto& layer : inspection.fidelity) EXPECT_LT(layer.worst, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Each, Family,
                         testing::Values("llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2",
                                         "gemma3", "gemma3-layer-types"),
                         [](const auto& family) {
                           std::string name = family.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace kvreplay::tracer
