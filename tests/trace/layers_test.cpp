// One shape for each layer: what traces of the second version say of layers is what a reader tells, and a writer
// writes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>

#include <algorithm>

#include "support/odd_trace.h"
#include "support/places.h"
#include "support/sample_trace.h"
#include "support/temporary_folder.h"
#include "trace/check.h"
#include "trace/identity.h"
#include "trace/inspection.h"
#include "trace/reader.h"
#include "trace/writer.h"

namespace kvreplay {
namespace {

using namespace test;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr HeadTensor kHeadTensors[] = {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs};

class Layers : public testing::Test {
 protected:
  Layers() { odd_.write(path_); }

  const std::vector<float>& tensor(int layer, HeadTensor which) const {
    const OddTrace::Tensors& of = odd_.layers[static_cast<std::size_t>(layer)];
    switch (which) {
      case HeadTensor::keys:
        return of.keys;
      case HeadTensor::values:
        return of.values;
      case HeadTensor::queries:
        return of.queries;
      default:
        return of.outputs;
    }
  }

  // That a file holds what the odd trace says.
  void expect_odd(const std::filesystem::path& path) const {
    const TraceReader reader(path);
    const TraceInfo& found = reader.info();
    EXPECT_EQ(found.layers, odd_.info.layers);
    EXPECT_EQ(found.rotary, odd_.info.rotary);
    EXPECT_EQ(found.answers, odd_.info.answers);
    EXPECT_EQ(found.turn_roles, odd_.info.turn_roles);
    ASSERT_EQ(found.spans.size(), 3U);
    EXPECT_EQ(found.spans[0].group, "pair");
    EXPECT_EQ(found.spans[1].group, "pair");
    EXPECT_EQ(found.spans[2].group, "");
    for (int l = 0; l < 6; ++l) {
      const LayerInfo& layer = odd_.info.layers[static_cast<std::size_t>(l)];
      if (!layer.attends) {
        EXPECT_THROW(static_cast<void>(reader.read(l, HeadTensor::keys, 0, 0, 1)), std::exception);
        continue;
      }
      SCOPED_TRACE(testing::Message() << "layer " << l);
      for (const HeadTensor which : kHeadTensors) {
        const std::vector<Index> shape = shape_of(odd_.info, l, which);
        const std::vector<float>& expected = tensor(l, which);
        for (Index head = 0; head < shape[0]; ++head) {
          const Matrix rows = reader.read(l, which, static_cast<int>(head), 1, shape[1] - 1);
          ASSERT_EQ(rows.cols(), shape[2]);
          EXPECT_TRUE(
              std::equal(rows.data(), rows.data() + rows.size(), expected.begin() + (head * shape[1] + 1) * shape[2]));
        }
      }
      const OddTrace::Tensors& of = odd_.layers[static_cast<std::size_t>(l)];
      const Index width = layer.num_attention_heads * layer.value_dim;
      for (int head = 0; head < layer.num_attention_heads; ++head) {
        const Matrix weight = reader.read_output_projection(l, head);
        ASSERT_EQ(weight.cols(), layer.value_dim);
        for (Index c = 0; c < 10; ++c) {
          for (Index d = 0; d < layer.value_dim; ++d) {
            EXPECT_EQ(weight(c, d), of.projection[static_cast<std::size_t>(c * width + head * layer.value_dim + d)]);
          }
        }
        if (layer.output_gate_dim == 0) continue;
        const Matrix gate = reader.read_output_gate(l, head);
        ASSERT_EQ(gate.size(), 6 * layer.output_gate_dim);
        EXPECT_TRUE(std::equal(gate.data(), gate.data() + gate.size(), of.gate.begin() + head * gate.size()));
      }
    }
    EXPECT_EQ(reader.rotary(OddTrace::kPlain)->name, "global");
    EXPECT_EQ(reader.rotary(OddTrace::kTwoWidths)->name, "local");
  }

  TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "odd.h5";
  const OddTrace odd_;
};

TEST_F(Layers, AreReadAsTheFileDescribesThem) { expect_odd(path_); }

TEST_F(Layers, AreWrittenAsTheyAreDescribed) {
  odd_.write_with_digests(folder_ / "written.h5");
  expect_odd(folder_ / "written.h5");
  const Inspection inspection = inspect(TraceReader(folder_ / "written.h5"), true);
  for (const DigestCheck& check : inspection.digests) {
    EXPECT_EQ(check.outcome, DigestCheck::Outcome::ok) << check.path;
  }
}

TEST_F(Layers, WriterWantsTensorsWhereTheyBelong) {
  TraceWriter writer(folder_ / "written.h5", odd_.info, DType::float32);
  const auto error = [&](int layer, HeadTensor which) {
    try {
      writer.write(layer, which, tensor(layer, which));
    } catch (const std::exception& problem) {
      return std::string(problem.what());
    }
    return std::string();
  };
  EXPECT_THAT(error(OddTrace::kGap, HeadTensor::keys), HasSubstr("/layers/1: has no attention"));
  EXPECT_THAT(error(OddTrace::kShared, HeadTensor::keys), HasSubstr("/layers/2/keys: is in another tensor"));
  EXPECT_THAT(error(OddTrace::kLatent, HeadTensor::values), HasSubstr("/layers/3/values: is in another tensor"));
}

TEST_F(Layers, HaveTheOutputsThatTheirRuleGives) {
  const Inspection inspection = inspect(TraceReader(path_), true);
  ASSERT_EQ(inspection.fidelity.size(), 6U);
  for (int l = 0; l < 6; ++l) {
    const LayerFidelity& fidelity = inspection.fidelity[static_cast<std::size_t>(l)];
    EXPECT_LT(fidelity.worst, 2e-6) << l;
    EXPECT_EQ(fidelity.mean == 0, l == OddTrace::kGap) << l;
  }
  // Each field decides: without it the outputs are others.
  for (const char* name : {"attention_chunk_size", "softmax_scale", "sliding_window", "attn_logit_softcapping"}) {
    odd_.write(path_);
    bool found = false;
    edit(path_, [&](auto file) {
      for (const char* layer : {"/layers/0", "/layers/2", "/layers/4"}) {
        if (H5Aexists_by_name(file, layer, name, H5P_DEFAULT) <= 0) continue;
        remove_attribute(file, layer, name);
        found = true;
      }
    });
    ASSERT_TRUE(found);
    const auto changed = inspect(TraceReader(path_), false).fidelity;
    EXPECT_GT(std::ranges::max(changed, {}, &LayerFidelity::worst).worst, 1e-3) << name;
  }
  odd_.write(path_);
  edit(path_, [&](auto file) { test::remove(file, "/layers/0/sinks"); });
  EXPECT_GT(inspect(TraceReader(path_), false).fidelity[OddTrace::kSinks].worst, 1e-3);
}

TEST_F(Layers, TellTracesApart) {
  const std::string original = trace_digest(TraceReader(path_));
  const auto changed = [&](const std::function<void(std::int64_t)>& change) {
    odd_.write(path_);
    edit(path_, change);
    return trace_digest(TraceReader(path_));
  };
  EXPECT_EQ(changed([](auto) {}), original);
  EXPECT_NE(changed([](auto file) { set_double(file, "/layers/2", "softmax_scale", 0.3); }), original);
  EXPECT_NE(changed([](auto file) { set_int(file, "/layers/0", "attention_chunk_size", 4); }), original);
  EXPECT_NE(changed([](auto file) { replace_floats(file, "/layers/0/sinks", {4}, {0, -1, 2, 1}); }), original);
  EXPECT_NE(changed([](auto file) { set_double(file, "/layers/4/projection_norm", "epsilon", 1e-3); }), original);
  EXPECT_NE(changed([](auto file) { set_string(file, "/layers/5", "rotary", "local"); }), original);
  EXPECT_NE(changed([](auto file) { set_double(file, "/rotary/local", "attention_scaling", 1.5); }), original);
}

TEST(LayersOfOldTraces, AreAsTheModelSays) {
  const TraceReader reader(test::test_data() / "trace-version-1.h5");
  for (const LayerInfo& layer : reader.info().layers) {
    LayerInfo expected = reader.info().model.layer();
    expected.rule.sliding_window = layer.rule.sliding_window;
    EXPECT_EQ(layer, expected);
  }
  EXPECT_EQ(reader.rotary(0), nullptr);
}

}  // namespace
}  // namespace kvreplay
