// Synthetic traces are what they promise to be: reproducible, exact, and structured like real attention.
#include "tracer/synthetic/synthetic.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "support/temporary_folder.h"
#include "trace/inspection.h"
#include "trace/reader.h"

namespace kvreplay::tracer {
namespace {

using test::message_of;
using test::TemporaryFolder;
using testing::ElementsAre;
using testing::HasSubstr;

SyntheticTrace small_trace() {
  SyntheticTrace trace;
  trace.num_layers = 2;
  trace.num_attention_heads = 4;
  trace.num_key_value_heads = 2;
  trace.head_dim = 20;
  trace.hidden_size = 72;
  trace.prompt_tokens = 1500;
  trace.later_tokens = 40;
  return trace;
}

void write(const SyntheticTrace& trace, const std::filesystem::path& path, int threads = 2) {
  write_synthetic(trace, path, Execution(threads));
}

// Digest by path, of all tensors.
std::map<std::string, std::string> digests(const std::filesystem::path& path) {
  const TraceReader reader(path);
  std::map<std::string, std::string> found;
  for (const StoredTensor& tensor : reader.stored_tensors()) found[tensor.path] = tensor.xxh64;
  for (const char* list : {"/tokens/ids", "/query_positions"}) found[list] = reader.compute_xxh64(list);
  return found;
}

class Synthetic : public testing::Test {
 protected:
  std::map<std::string, std::string> digests_of(const SyntheticTrace& trace, int threads = 2) const {
    write(trace, folder_ / "run.h5", threads);
    return digests(folder_ / "run.h5");
  }

  TemporaryFolder folder_;
};

TEST_F(Synthetic, TheNumberOfThreadsChangesNoBit) {
  SyntheticTrace windowed = small_trace();
  windowed.dtype = DType::float16;
  SyntheticTrace everything = small_trace();
  everything.query_window = std::nullopt;
  everything.attention_mass = true;
  for (const SyntheticTrace& trace : {windowed, everything}) {
    const auto one = digests_of(trace, 1);
    EXPECT_EQ(one.size(), trace.attention_mass ? 14U : 12U);
    EXPECT_EQ(digests_of(trace, 2), one);
    EXPECT_EQ(digests_of(trace, 3), one);
  }
}

TEST_F(Synthetic, AnotherSeedMakesAnotherTraceInEveryTensor) {
  SyntheticTrace trace = small_trace();
  trace.attention_mass = true;
  const auto zero = digests_of(trace);
  trace.seed = 1;
  const auto one = digests_of(trace);
  for (const auto& [path, digest] : zero) {
    if (path == "/query_positions") continue;
    EXPECT_NE(one.at(path), digest) << path;
  }
}

TEST_F(Synthetic, LayersAndHeadsDiffer) {
  const auto found = digests_of(small_trace());
  EXPECT_NE(found.at("/layers/0/keys"), found.at("/layers/1/keys"));
  EXPECT_NE(found.at("/layers/0/output_projection"), found.at("/layers/1/output_projection"));
  const TraceReader reader(folder_ / "run.h5");
  EXPECT_NE(reader.read(0, HeadTensor::values, 0, 0, 50), reader.read(0, HeadTensor::values, 1, 0, 50));
}

// Where one block of positions ends and the next begins, at 1024, nothing repeats.
TEST_F(Synthetic, BlocksHaveNoSeams) {
  SyntheticTrace trace = small_trace();
  write(trace, folder_ / "long.h5");
  const TraceReader reader(folder_ / "long.h5");
  const Matrix values = reader.read(1, HeadTensor::values, 1, 1000, 48);
  for (Index i = 0; i + 1 < values.rows(); ++i) EXPECT_NE(values.row(i), values.row(i + 1));
}

struct Shape {
  const char* name;
  int heads;
  int kv_heads;
  int dim;
  int prompt;
  int later;
  std::optional<int> window;
};

void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

class Shapes : public testing::TestWithParam<Shape> {};

TEST_P(Shapes, AreComplete) {
  const Shape& shape = GetParam();
  SyntheticTrace trace;
  trace.num_layers = 2;
  trace.num_attention_heads = shape.heads;
  trace.num_key_value_heads = shape.kv_heads;
  trace.head_dim = shape.dim;
  trace.hidden_size = 33;
  trace.prompt_tokens = shape.prompt;
  trace.later_tokens = shape.later;
  trace.query_window = shape.window;
  trace.attention_mass = shape.prompt < 200;
  const TemporaryFolder folder;
  write(trace, folder / "run.h5");
  EXPECT_THAT(folder.names(), ElementsAre("run.h5"));

  const TraceReader reader(folder / "run.h5");
  EXPECT_EQ(reader.info().prompt_length, shape.prompt);
  EXPECT_EQ(reader.info().num_tokens(), shape.prompt + shape.later);
  EXPECT_EQ(reader.info().query_positions.front(), shape.window ? std::max(0, shape.prompt - *shape.window) : 0);
  EXPECT_EQ(reader.info().query_positions.back(), shape.prompt + shape.later - 1);
  EXPECT_EQ(reader.has_attention_mass(1), trace.attention_mass);
  // Verifying reads everything and compares every digest; fidelity compares outputs with attention by other code.
  const Inspection inspection = inspect(reader, true);
  for (const DigestCheck& check : inspection.digests) EXPECT_EQ(check.outcome, DigestCheck::Outcome::ok) << check.path;
  ASSERT_EQ(inspection.fidelity.size(), 2U);
  for (const LayerFidelity& layer : inspection.fidelity) EXPECT_LT(layer.worst, 2e-5);
}

INSTANTIATE_TEST_SUITE_P(
    All, Shapes,
    testing::Values(Shape{"EightToOne", 16, 2, 32, 300, 10, 64}, Shape{"OneHead", 1, 1, 16, 200, 5, 64},
                    Shape{"OneKvHead", 6, 1, 20, 2100, 33, 64}, Shape{"OneToOne", 4, 4, 8, 1024, 1, 1},
                    Shape{"PromptShorterThanTheWindow", 4, 2, 20, 20, 3, 64},
                    Shape{"OddDimension", 2, 1, 9, 130, 4, 32}, Shape{"TwoTokens", 2, 2, 11, 1, 1, 64},
                    Shape{"NothingLater", 2, 1, 16, 1025, 0, 64}, Shape{"AllQueries", 4, 1, 24, 1200, 20, std::nullopt},
                    Shape{"LargeHead", 2, 1, 256, 100, 40, std::nullopt}),
    [](const testing::TestParamInfo<Shape>& shape) { return shape.param.name; });

TEST_F(Synthetic, OutputsAreThoseOfTheStoredTensors) {
  SyntheticTrace trace = small_trace();
  for (const auto& [type, rounding] : {std::pair{DType::float16, 1e-3}, {DType::bfloat16, 8e-3}}) {
    trace.dtype = type;
    write(trace, folder_ / "run.h5");
    // No more than the outputs' own rounding: queries, keys and values were rounded before they attended.
    for (const LayerFidelity& layer : inspect(TraceReader(folder_ / "run.h5"), false).fidelity) {
      EXPECT_LT(layer.worst, rounding);
    }
  }
}

// Attention [queries, keys] of a head, by the definition and in double.
Eigen::MatrixXd attention(const TraceReader& reader, int layer, int head) {
  const TraceInfo& info = reader.info();
  const Eigen::MatrixXd queries = reader.read(layer, HeadTensor::queries, head, 0, info.num_queries()).cast<double>();
  const Eigen::MatrixXd keys =
      reader.read(layer, HeadTensor::keys, head / info.model.group_size(), 0, info.num_tokens()).cast<double>();
  Eigen::MatrixXd weights = queries * keys.transpose() * info.model.softmax_scale;
  for (Index i = 0; i < weights.rows(); ++i) {
    const Index seen = info.query_positions[static_cast<std::size_t>(i)] + 1;
    auto row = weights.row(i);
    row.head(seen) = (row.head(seen).array() - row.head(seen).maxCoeff()).exp();
    row.tail(row.size() - seen).setZero();
    row /= row.sum();
  }
  return weights;
}

TEST_F(Synthetic, AttentionMassIsTheSumOverAllPromptQueries) {
  SyntheticTrace trace = small_trace();
  trace.num_layers = 1;
  trace.attention_mass = true;
  trace.query_window = std::nullopt;
  const auto all = digests_of(trace);
  const TraceReader reader(folder_ / "run.h5");
  for (int head = 0; head < trace.num_attention_heads; ++head) {
    const Eigen::MatrixXd weights = attention(reader, 0, head);
    const std::vector<float> mass = reader.read_attention_mass(0, head);
    const Eigen::VectorXd expected = weights.topLeftCorner(trace.prompt_tokens, trace.prompt_tokens).colwise().sum();
    double total = 0;
    for (Index j = 0; j < expected.size(); ++j) {
      EXPECT_NEAR(mass[static_cast<std::size_t>(j)], expected[j], 1e-4 * std::max(1.0, expected[j])) << j;
      total += mass[static_cast<std::size_t>(j)];
    }
    EXPECT_NEAR(total, trace.prompt_tokens, 0.01);
  }
  // Queries that are not captured count as well.
  trace.query_window = 10;
  EXPECT_EQ(digests_of(trace).at("/layers/0/attention_mass"), all.at("/layers/0/attention_mass"));
}

// A prompt of 4096 with all kinds of heads in each group, its attention head by head.
class Structure : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>();
    trace_ = SyntheticTrace();
    trace_.num_layers = 1;
    trace_.num_attention_heads = 8;
    trace_.num_key_value_heads = 2;
    trace_.head_dim = 64;
    trace_.hidden_size = 512;
    write(trace_, *folder_ / "run.h5");
    reader_ = std::make_unique<TraceReader>(*folder_ / "run.h5");
    attention_.clear();
    for (int head = 0; head < 8; ++head) attention_.push_back(attention(*reader_, 0, head));
  }
  static void TearDownTestSuite() {
    reader_.reset();
    folder_.reset();
  }

  // Mean attention of all captured queries on positions [first, end).
  static double mass(int head, Index first, Index end) {
    const Eigen::MatrixXd& weights = attention_[static_cast<std::size_t>(head)];
    return weights.middleCols(first, end - first).rowwise().sum().mean();
  }

  static Index window() { return *trace_.query_window; }

  static inline std::unique_ptr<TemporaryFolder> folder_;
  static inline SyntheticTrace trace_;
  static inline std::unique_ptr<TraceReader> reader_;
  static inline std::vector<Eigen::MatrixXd> attention_;  // [8][Q, T]
};

TEST_F(Structure, EveryGroupHasEveryRole) {
  for (int group = 0; group < 2; ++group) {
    std::vector<HeadRole> roles;
    for (int member = 0; member < 4; ++member) roles.push_back(role_of(0, group * 4 + member));
    EXPECT_THAT(roles, testing::UnorderedElementsAre(HeadRole::local, HeadRole::global, HeadRole::drifting,
                                                     HeadRole::retrieval));
  }
  EXPECT_NE(role_of(0, 0), role_of(1, 0));
}

TEST_F(Structure, SinksDrawAttentionAndHaveShortValues) {
  for (int head = 0; head < 8; ++head) {
    EXPECT_GT(mass(head, 0, kSinks), 0.1) << head;
    EXPECT_LT(mass(head, 0, kSinks), 0.7) << head;
  }
  for (int head = 0; head < 2; ++head) {
    const Matrix values = reader_->read(0, HeadTensor::values, head, 0, 200);
    const float usual = values.bottomRows(100).rowwise().norm().mean();
    EXPECT_LT(values.topRows(kSinks).rowwise().norm().maxCoeff(), 0.2F * usual);
  }
}

TEST_F(Structure, LocalHeadsAttendToWhatIsNear) {
  for (int head = 0; head < 8; ++head) {
    double near = 0;
    for (Index i = 0; i < attention_[0].rows(); ++i) {
      const Index position = reader_->info().query_positions[static_cast<std::size_t>(i)];
      near += attention_[static_cast<std::size_t>(head)].row(i).segment(position - 127, 128).sum();
    }
    near /= static_cast<double>(attention_[0].rows());
    if (role_of(0, head) == HeadRole::local) {
      EXPECT_GT(near, 0.4) << head;
    } else {
      EXPECT_LT(near, 0.2) << head;
    }
  }
}

TEST_F(Structure, HeavyHittersAreAttendedByEveryone) {
  const std::vector<int> heavy = heavy_hitters(trace_);
  ASSERT_GE(heavy.size(), 3U);
  ASSERT_LE(heavy.size(), 16U);
  const double even = static_cast<double>(heavy.size()) / trace_.num_tokens();
  for (int head = 0; head < 8; ++head) {
    double sum = 0;
    for (const int position : heavy) sum += mass(head, position, position + 1);
    EXPECT_GT(sum, 5 * even) << head;
    if (role_of(0, head) == HeadRole::global) {
      EXPECT_GT(sum, 0.1) << head;
    }
  }
}

TEST_F(Structure, DriftingHeadsMoveWhileTheWindowAdvances) {
  // Mean position of what the 8 queries from `first` on attend to, apart from the sinks, as a share of the prompt.
  const auto centre = [](int head, Index first) {
    const auto rows = attention_[static_cast<std::size_t>(head)].middleRows(first, 8);
    Eigen::RowVectorXd weights = rows.colwise().sum();
    weights.head(kSinks).setZero();
    return weights.dot(Eigen::RowVectorXd::LinSpaced(weights.size(), 0, 1)) / weights.sum();
  };
  for (int head = 0; head < 8; ++head) {
    const double way = std::abs(centre(head, window() - 32) - centre(head, window() - 8));
    const double on = std::abs(centre(head, window() - 32) - centre(head, window() + 24));
    if (role_of(0, head) == HeadRole::drifting) {
      EXPECT_GT(way, 0.08) << head;
      EXPECT_GT(on, way) << head;  // it goes on after the prompt
    } else if (role_of(0, head) == HeadRole::local) {
      EXPECT_LT(way, 0.05) << head;
    }
  }
}

TEST_F(Structure, EvidenceIsAttendedWhenItIsAskedFor) {
  const std::vector<Span>& spans = reader_->info().spans;
  ASSERT_EQ(spans.size(), 4U);
  std::vector<int> asked_in_prompt;
  for (int head = 0; head < 8; ++head) {
    const Eigen::MatrixXd& weights = attention_[static_cast<std::size_t>(head)];
    for (Index i = 0; i < weights.rows(); ++i) {
      const int position = reader_->info().query_positions[static_cast<std::size_t>(i)];
      const std::optional<int> asked = asked_span(trace_, position);
      EXPECT_EQ(asked.has_value(), position >= trace_.prompt_tokens - kHintingQueries);
      if (asked && position < trace_.prompt_tokens) asked_in_prompt.push_back(*asked);
      for (int s = 0; s < 4; ++s) {
        const Span& span = spans[static_cast<std::size_t>(s)];
        const double seen = weights.row(i).segment(span.start, span.end - span.start).sum();
        if (role_of(0, head) == HeadRole::retrieval && asked == s) {
          EXPECT_GT(seen, 0.2) << head << " " << position;
        } else {
          EXPECT_LT(seen, 0.15) << head << " " << position;
        }
      }
    }
  }
  EXPECT_THAT(asked_in_prompt, testing::AllOf(testing::Contains(0), testing::Contains(2),
                                              testing::Not(testing::Contains(1)), testing::Not(testing::Contains(3))));
}

TEST_F(Structure, SpansLieApartInThePromptAndSayWhenTheyAreAskedFor) {
  const std::vector<Span>& spans = reader_->info().spans;
  int end = kSinks;
  for (std::size_t s = 0; s < spans.size(); ++s) {
    EXPECT_GE(spans[s].start, end);
    EXPECT_GE(spans[s].end - spans[s].start, 8);
    end = spans[s].end;
    EXPECT_THAT(spans[s].label, HasSubstr(s % 2 == 0 ? "hinted-evidence" : "late-evidence"));
  }
  EXPECT_LT(end, trace_.prompt_tokens - window());
}

TEST_F(Structure, ValuesShareAFewDirections) {
  const Eigen::MatrixXd values = reader_->read(0, HeadTensor::values, 0, kSinks, 4000).cast<double>();
  // Σ λ² / (Σ λ)² of the eigenvalues λ of VᵀV: one over the number of directions, if all were as long.
  const Eigen::MatrixXd gram = values.transpose() * values;
  const double directions = gram.trace() * gram.trace() / gram.squaredNorm();
  EXPECT_GT(directions, 3);
  EXPECT_LT(directions, 30) << "noise alone has about 63 of 64";
}

TEST_F(Structure, NoiseIsNormalEnough) {
  // Dimensions behind the structured ones, away from sinks.
  const Eigen::MatrixXd noise = reader_->read(0, HeadTensor::keys, 1, kSinks, 4000).cast<double>().rightCols(64 - 42);
  const auto count = static_cast<double>(noise.size());
  const double mean = noise.mean();
  const double variance = (noise.array() - mean).square().mean();
  EXPECT_NEAR(mean, 0, 5 / std::sqrt(count));
  EXPECT_NEAR(variance, 1, 0.02);
  EXPECT_NEAR((noise.array() - mean).square().square().mean() / (variance * variance), 2.7, 0.1);
  const double along = (noise.leftCols(21).array() * noise.rightCols(21).array()).mean();
  const double across = (noise.topRows(3999).array() * noise.bottomRows(3999).array()).mean();
  EXPECT_NEAR(along, 0, 0.02);
  EXPECT_NEAR(across, 0, 0.02);
}

TEST_F(Structure, TheOutputProjectionKeepsLengthsAndIsNotFlat) {
  Eigen::MatrixXd weight(512, 512);
  for (int head = 0; head < 8; ++head) {
    weight.middleCols(head * 64, 64) = reader_->read_output_projection(0, head).cast<double>();
  }
  EXPECT_GT(weight.norm() / std::sqrt(512), 0.5);
  EXPECT_LT(weight.norm() / std::sqrt(512), 2.0);
  const Eigen::VectorXd columns = weight.colwise().norm();
  EXPECT_GT(columns.maxCoeff() / columns.minCoeff(), 2.5);  // noise alone has about 1.2
}

TEST_F(Synthetic, ProgressRisesToTheWhole) {
  std::vector<double> shares;
  write_synthetic(small_trace(), folder_ / "run.h5", Execution(2), [&](double share) { shares.push_back(share); });
  EXPECT_THAT(shares, ElementsAre(0.25, 0.5, 0.75, 1.0));
}

TEST_F(Synthetic, RefusesShapesThatCannotBe) {
  const auto error = [&](const std::function<void(SyntheticTrace&)>& change) {
    SyntheticTrace trace = small_trace();
    change(trace);
    return message_of<UsageError>([&] { write(trace, folder_ / "run.h5"); });
  };
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.num_key_value_heads = 3; }),
              HasSubstr("cannot have 4 query heads on 3 KV heads"));
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.head_dim = 7; }), HasSubstr("at least 8, not 7"));
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.num_layers = 0; }), HasSubstr("at least one layer"));
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.prompt_tokens = 0; }), HasSubstr("needs a prompt"));
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.prompt_tokens = 1, trace.later_tokens = 0; }),
              HasSubstr("2 tokens in all"));
  EXPECT_THAT(error([](SyntheticTrace& trace) { trace.query_window = 0; }), HasSubstr("query window of at least 1"));
  EXPECT_TRUE(folder_.names().empty());
}

TEST_F(Synthetic, APlaceThatCannotBeWrittenIsNamed) {
  EXPECT_THAT(message_of<Error>([&] { write(small_trace(), folder_ / "no/run.h5"); }),
              HasSubstr("no/run.h5: cannot be written"));
}

}  // namespace
}  // namespace kvreplay::tracer
