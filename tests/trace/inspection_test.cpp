// What inspect finds out, held against attention written down as its definition has it.
#include "trace/inspection.h"
#include "support/places.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <omp.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "base/error.h"
#include "hdf5/hdf5.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/attention.h"
#include "trace/check.h"
#include "trace/writer.h"

namespace kvreplay {
namespace {

using namespace test;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;

// One output element by element, in double.
std::vector<double> attention_by_definition(const float* query, int position, const float* keys, const float* values,
                                            int width, double scale, int window, double cap, int chunk = 0,
                                            double sink = -std::numeric_limits<double>::infinity()) {
  std::vector<double> weights;
  double sum = std::exp(sink);
  int first = window > 0 ? std::max(0, position - window + 1) : 0;
  while (chunk > 0 && first / chunk < position / chunk) ++first;
  for (int n = first; n <= position; ++n) {
    double logit = 0;
    for (int d = 0; d < width; ++d) {
      logit += static_cast<double>(query[d]) * static_cast<double>(keys[n * width + d]);
    }
    logit *= scale;
    if (cap > 0) logit = cap * std::tanh(logit / cap);
    weights.push_back(std::exp(logit));
    sum += weights.back();
  }
  std::vector<double> output(static_cast<std::size_t>(width));
  for (int n = first; n <= position; ++n) {
    for (int d = 0; d < width; ++d) {
      output[static_cast<std::size_t>(d)] +=
          weights[static_cast<std::size_t>(n - first)] / sum * static_cast<double>(values[n * width + d]);
    }
  }
  return output;
}

// The sample trace with outputs that are its attention.
struct FaithfulTrace {
  explicit FaithfulTrace(TraceInfo trace_info = sample_info()) : info(std::move(trace_info)) {}

  std::vector<float> outputs(int layer) const {
    const auto keys = sample_tensor(info, layer, HeadTensor::keys);
    const auto values = sample_tensor(info, layer, HeadTensor::values);
    const auto queries = sample_tensor(info, layer, HeadTensor::queries);
    std::vector<float> result;
    for (int head = 0; head < 4; ++head) {
      const int offset = head / 2 * info.num_tokens() * 8;
      for (int q = 0; q < info.num_queries(); ++q) {
        const int position = info.query_positions[static_cast<std::size_t>(q)];
        for (const double value : attention_by_definition(
                 &queries[static_cast<std::size_t>((head * info.num_queries() + q) * 8)], position,
                 &keys[static_cast<std::size_t>(offset)], &values[static_cast<std::size_t>(offset)], 8,
                 info.model.softmax_scale, info.layer(layer).rule.sliding_window, info.model.attn_logit_softcapping)) {
          result.push_back(static_cast<float>(value));
        }
      }
    }
    return result;
  }

  void write(const std::filesystem::path& path, bool optional_parts = true) const {
    TraceWriter writer(path, info, DType::float32);
    for (int layer = 0; layer < 2; ++layer) {
      for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries}) {
        writer.write(layer, tensor, sample_tensor(info, layer, tensor));
      }
      writer.write(layer, HeadTensor::outputs, outputs(layer));
      if (!optional_parts) continue;
      writer.write_output_projection(layer, sample_output_projection(info, layer));
      writer.write_attention_mass(layer, sample_attention_mass(info, layer));
    }
    writer.finish();
  }

  TraceInfo info;
};

class Inspect : public testing::Test {
 protected:
  Inspection inspected(bool verify = false) { return inspect(TraceReader(path_), verify); }

  TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "run.h5";
};

TEST_F(Inspect, FindsStoredOutputsFaithful) {
  FaithfulTrace().write(path_);
  const Inspection found = inspected();
  EXPECT_EQ(found.recomputed_queries, 5);
  ASSERT_EQ(found.fidelity.size(), 2U);
  for (const LayerFidelity& layer : found.fidelity) {
    EXPECT_LT(layer.worst, 2e-6);
    EXPECT_LE(layer.mean, layer.worst);
    EXPECT_GT(layer.mean, 0);
  }
}

TEST_F(Inspect, HonoursSoftCappingAndWindowsOfLayers) {
  TraceInfo info = sample_info();
  info.model.attn_logit_softcapping = 1.5;
  info.model.sliding_window = 3;
  info.layers = layers_with_windows(info.model, std::vector<int>{3, 0});
  FaithfulTrace(info).write(path_);
  EXPECT_LT(inspected().fidelity[0].worst, 2e-6);
  EXPECT_LT(inspected().fidelity[1].worst, 2e-6);
  // The same outputs under another rule are not faithful, so the rule was not ignored.
  edit(path_, [](auto file) { set_double(file, "/model", "attn_logit_softcapping", 0); });
  EXPECT_GT(inspected().fidelity[0].mean, 0.02);
  edit(path_, [](auto file) {
    set_double(file, "/model", "attn_logit_softcapping", 1.5);
    set_int(file, "/layers/1", "sliding_window", 2);
  });
  EXPECT_LT(inspected().fidelity[0].worst, 2e-6);
  EXPECT_GT(inspected().fidelity[1].mean, 0.02);
}

TEST_F(Inspect, MeasuresAKnownError) {
  const FaithfulTrace faithful;
  faithful.write(path_);
  // Twice the output of head 2 at the third captured query, position 8: a relative error of one.
  const auto outputs = faithful.outputs(1);
  edit(path_, [&](auto file) {
    for (int d = 0; d < 8; ++d) {
      poke(file, "/layers/1/outputs", {2, 2, d}, 2 * outputs[static_cast<std::size_t>((2 * 5 + 2) * 8 + d)]);
    }
  });
  const Inspection found = inspected();
  EXPECT_NEAR(found.fidelity[1].worst, 1, 1e-5);
  EXPECT_EQ(found.fidelity[1].worst_head, 2);
  EXPECT_EQ(found.fidelity[1].worst_position, 8);
  EXPECT_NEAR(found.fidelity[1].mean, 1.0 / 20, 1e-5);
  EXPECT_LT(found.fidelity[0].worst, 2e-6);
  EXPECT_THAT(found.warnings, Contains(HasSubstr("the stored outputs of 1 of 2 layers (the first is layer 1)")));
}

TEST_F(Inspect, GivesTheSameBitsForAnyNumberOfThreads) {
  const TraceReader trace(test_data() / "reference-needle.h5");
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const Inspection one = inspect(trace, false);
  omp_set_num_threads(7);
  const Inspection seven = inspect(trace, false);
  omp_set_num_threads(before);
  ASSERT_EQ(one.fidelity.size(), 6U);
  for (std::size_t layer = 0; layer < 6; ++layer) {
    EXPECT_EQ(one.fidelity[layer].mean, seven.fidelity[layer].mean);
    EXPECT_EQ(one.fidelity[layer].worst, seven.fidelity[layer].worst);
    EXPECT_EQ(one.fidelity[layer].worst_position, seven.fidelity[layer].worst_position);
    EXPECT_LT(one.fidelity[layer].worst, 1e-5);
  }
  EXPECT_EQ(one.recomputed_queries, kRecomputedQueries);
}

TEST_F(Inspect, GoldenTracesAreFaithful) {
  for (const auto& entry : std::filesystem::directory_iterator(golden_folder())) {
    if (entry.path().extension() != ".h5") continue;
    for (const LayerFidelity& layer : inspect(TraceReader(entry.path()), false).fidelity) {
      EXPECT_LT(layer.worst, 1e-4) << entry.path();
    }
  }
}

TEST_F(Inspect, CountsQueries) {
  FaithfulTrace().write(path_);
  const Inspection found = inspected();
  EXPECT_EQ(found.prompt_queries, 3);      // 5, 7, 8 of a prompt of 9
  EXPECT_EQ(found.observation_window, 2);  // 7, 8
  EXPECT_EQ(found.later_queries, 2);       // 9, 11
  EXPECT_THAT(found.warnings, Contains(HasSubstr("only the prompt's last 2 queries were captured")));
}

TEST_F(Inspect, AddsUpStorage) {
  FaithfulTrace().write(path_);
  const Inspection found = inspected();
  EXPECT_EQ(found.file_bytes, static_cast<Index>(std::filesystem::file_size(path_)));
  ASSERT_EQ(found.tensors.size(), 6U);
  EXPECT_EQ(found.tensors[0].name, "keys");
  EXPECT_EQ(found.tensors[0].layers, 2);
  EXPECT_THAT(found.tensors[0].shape, ElementsAre(2, 12, 8));
  EXPECT_THAT(found.tensors[0].types, ElementsAre(DType::float32));
  EXPECT_THAT(found.tensors[0].storage, ElementsAre("contiguous"));
  EXPECT_EQ(found.tensors[0].stored_bytes, 2 * 2 * 12 * 8 * 4);
  EXPECT_EQ(found.tensors[0].unpacked_bytes, found.tensors[0].stored_bytes);
  const Inspection packed = inspect(TraceReader(test_data() / "reference-needle.h5"), false);
  EXPECT_LT(packed.tensors[0].stored_bytes, packed.tensors[0].unpacked_bytes);
}

TEST_F(Inspect, TellsWhatSpansSay) {
  FaithfulTrace().write(path_);
  EXPECT_THAT(inspected().span_texts, ElementsAre("piece2é", "piece6"));
}

TEST_F(Inspect, WarnsOfWhatATraceCannotBeUsedFor) {
  TraceInfo info = sample_info();
  info.query_positions = {3, 5};
  FaithfulTrace(info).write(path_, false);
  const Inspection found = inspected();
  EXPECT_THAT(found.warnings, Contains(HasSubstr("use 'capture --generate N'")));
  EXPECT_THAT(found.warnings, Contains(HasSubstr("the prompt's last query was not captured")));
  EXPECT_THAT(found.warnings, Contains(HasSubstr("2 of 2 layers have no attention mass")));
  EXPECT_THAT(found.warnings, Contains(HasSubstr("2 of 2 layers have no output projection")));
}

// The same objects in a file of HDF5's earliest format.
void rewrite_in_the_old_format(const std::filesystem::path& path) {
  const std::filesystem::path old = path.string() + ".old";
  const auto lock = hdf5::lock();
  const hid_t from = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  const hid_t to = H5Fcreate(old.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  for (const char* name : {"layers", "model", "tokens", "query_positions", "annotations"}) {
    if (H5Lexists(from, name, H5P_DEFAULT) > 0) {
      ASSERT_GE(H5Ocopy(from, name, to, name, H5P_DEFAULT, H5P_DEFAULT), 0);
    }
  }
  ASSERT_GE(H5Fclose(to), 0);
  ASSERT_GE(H5Fclose(from), 0);
  {
    const hid_t file = H5Fopen(old.c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    const auto write = [file](const char* name, hid_t type, const void* value) {
      const hid_t space = H5Screate(H5S_SCALAR);
      const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
      ASSERT_GE(H5Awrite(attribute, type, value), 0);
      H5Aclose(attribute);
      H5Sclose(space);
    };
    const hid_t text = H5Tcopy(H5T_C_S1);
    H5Tset_size(text, 7);
    const int one = 1;
    write("format", text, "kvtrace");
    write("format_version", H5T_NATIVE_INT, &one);
    write("complete", H5T_NATIVE_INT, &one);
    H5Tclose(text);
    ASSERT_GE(H5Fclose(file), 0);
  }
  std::filesystem::rename(old, path);
}

TEST_F(Inspect, WarnsOfAFormatWithoutChecksums) {
  FaithfulTrace().write(path_);
  const std::vector<std::string> before = inspected().warnings;
  rewrite_in_the_old_format(path_);
  const std::vector<std::string> after = inspected().warnings;
  ASSERT_EQ(after.size(), before.size() + 1);
  EXPECT_THAT(after, Contains(HasSubstr("old format without checksums")));
}

TEST_F(Inspect, HasNothingAgainstACompleteTrace) {
  TraceInfo info = sample_info();
  info.query_positions = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  FaithfulTrace(info).write(path_);
  EXPECT_EQ(inspected().warnings, std::vector<std::string>());
}

TEST_F(Inspect, VerifiesDigests) {
  FaithfulTrace().write(path_);
  EXPECT_TRUE(inspected().digests.empty());
  const Inspection sound = inspected(true);
  EXPECT_EQ(sound.digests.size(), 7U + 12U);
  for (const DigestCheck& check : sound.digests) EXPECT_EQ(name_of(check.outcome), "ok") << check.path;

  edit(path_, [](auto file) {
    poke(file, "/layers/1/values", {1, 3, 2}, 7);
    remove_attribute(file, "/layers/0/keys", "xxh64");
  });
  const Inspection damaged = inspected(true);
  for (const DigestCheck& check : damaged.digests) {
    const char* expected = check.path == "/layers/1/values" ? "mismatch"
                           : check.path == "/layers/0/keys" ? "no digest"
                                                            : "ok";
    EXPECT_EQ(name_of(check.outcome), expected) << check.path;
  }
  EXPECT_TRUE(damaged.fidelity.empty());
}

TEST_F(Inspect, ReportsNaNWithItsPlace) {
  FaithfulTrace().write(path_);
  edit(path_, [](auto file) { poke(file, "/layers/1/values", {1, 3, 2}, std::nanf("")); });
  try {
    static_cast<void>(inspected());
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("/layers/1/values: NaN at layer 1, head 1, position 3"));
  }
}

TEST(AttentionOutputs, AgreeWithTheDefinitionOverManyKeys) {
  constexpr int kKeys = 9000;  // more than two blocks
  constexpr int kWidth = 16;
  const auto keys = sample_values(kKeys * kWidth, 1);
  const auto values = sample_values(kKeys * kWidth, 2);
  const auto queries = sample_values(4 * kWidth, 3);
  const std::vector<std::int32_t> positions = {0, 4095, 4096, 8999};
  const MatrixView key_rows(keys.data(), kKeys, kWidth);
  const MatrixView value_rows(values.data(), kKeys, kWidth);
  const MatrixView query_rows(queries.data(), 4, kWidth);
  struct Rule {
    int window;
    double cap;
    int chunk = 0;
    double sink = -std::numeric_limits<double>::infinity();
  };
  for (const auto [window, cap, chunk, sink] :
       {Rule{0, 0}, Rule{1, 0}, Rule{5000, 0}, Rule{0, 2}, Rule{1, 2}, Rule{5000, 2}, Rule{0, 0, 4096},
        Rule{100, 2, 64}, Rule{0, 0, 0, 8}, Rule{5000, 2, 0, -1}}) {
    const AttentionRule rule{.softmax_scale = 0.25,
                             .attn_logit_softcapping = cap,
                             .sliding_window = window,
                             .attention_chunk_size = chunk,
                             .sinks = {0, static_cast<float>(sink)}};
    const Matrix outputs = attention_outputs(query_rows, positions, key_rows, value_rows, rule, 1);
    ASSERT_EQ(outputs.rows(), 4);
    for (int i = 0; i < 4; ++i) {
      const auto expected = attention_by_definition(&queries[static_cast<std::size_t>(i * kWidth)],
                                                    positions[static_cast<std::size_t>(i)], keys.data(), values.data(),
                                                    kWidth, 0.25, window, cap, chunk, sink);
      for (int d = 0; d < kWidth; ++d) {
        EXPECT_NEAR(outputs(i, d), expected[static_cast<std::size_t>(d)], 2e-6) << window << " " << cap << " " << i;
      }
    }
  }
}

TEST(AttentionOutputs, LargeLogitsDoNotOverflow) {
  const std::vector<float> keys = {100, -100, 100};
  const std::vector<float> values = {1, 2, 5};
  const float query = 100;
  const std::vector<std::int32_t> positions = {2};
  const Matrix output = attention_outputs(MatrixView(&query, 1, 1), positions, MatrixView(keys.data(), 3, 1),
                                          MatrixView(values.data(), 3, 1), {.softmax_scale = 1}, 0);
  EXPECT_FLOAT_EQ(output(0, 0), 3);
}

TEST(AttentionOutputs, RefuseAPositionWithoutAKey) {
  const Matrix rows = Matrix::Ones(3, 2);
  const std::vector<std::int32_t> positions = {3};
  EXPECT_THROW(static_cast<void>(attention_outputs(rows.topRows(1), positions, rows, rows, {}, 0)), Error);
}

}  // namespace
}  // namespace kvreplay
