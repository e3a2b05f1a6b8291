#include "policy/head.h"

#include <fmt/format.h>

#include <Eigen/QR>
#include <algorithm>

#include "base/error.h"
#include "policy/softmax.h"

namespace kvreplay {
namespace {

// Window queries are always multiplied in blocks of this many rows, counted from the last one, so that the bits of a
// row do not depend on which windows the policies of a run ask for.
constexpr int kRowBlock = 16;

}  // namespace

struct Head::Shared {
  struct Member {
    std::vector<Matrix> attention;  // blocks of kRowBlock rows, by age: row 0 of block 0 is the last prompt query's
    std::vector<Matrix> outputs;    // attention · values, the same blocks
    std::optional<std::vector<float>> accumulated;
    std::optional<Matrix> factor;
    std::optional<Matrix> projected_values;
  };
  std::optional<Matrix> keys;
  std::optional<Matrix> values;
  int window = 0;  // queries that are at hand without a gap before the eviction
  std::vector<Member> members;
};

Matrix HeadSource::evaluation_queries(int /*member*/) const { return {}; }

Matrix HeadSource::evaluation_keys() const { return {}; }

int contiguous_window(std::span<const int> query_positions, int prompt_length) {
  int count = 0;
  while (count < static_cast<int>(query_positions.size()) &&
         query_positions[query_positions.size() - 1 - static_cast<std::size_t>(count)] == prompt_length - 1 - count) {
    ++count;
  }
  return count;
}

Head::Head(const HeadSource& source)
    : source_(source),
      shape_(source.shape()),
      has_output_projection_(source.has_output_projection()),
      shared_(std::make_unique<Shared>()) {
  shared_->members.resize(static_cast<std::size_t>(shape_.group_size));
  shared_->window = contiguous_window(source.query_positions(), shape_.prompt_length);
}

Head::~Head() = default;

const Matrix& Head::keys() const {
  if (!shared_->keys) shared_->keys = source_.keys();
  return *shared_->keys;
}

const Matrix& Head::values() const {
  if (!shared_->values) shared_->values = source_.values();
  return *shared_->values;
}

Matrix Head::logits(const Matrix& queries) const {
  Matrix logits(queries.rows(), shape_.prompt_length);
  logits.noalias() = queries * keys().transpose();
  scale_logits(logits, shape_.softmax_scale, shape_.attn_logit_softcapping);
  return logits;
}

std::span<const float> Head::attention(int member, int age) const {
  if (age >= shared_->window) {
    throw Error(fmt::format(
        "the attention of prompt position {} is needed, but of the queries before position {} only the last {} were "
        "captured; capture with --queries window:{} or more",
        shape_.prompt_length - 1 - age, shape_.prompt_length, shared_->window, age + 1));
  }
  auto& blocks = shared_->members[static_cast<std::size_t>(member)].attention;
  while (static_cast<int>(blocks.size()) * kRowBlock <= age) {
    const int first_age = static_cast<int>(blocks.size()) * kRowBlock;
    const int rows = std::min(kRowBlock, shared_->window - first_age);
    const Index last = static_cast<Index>(source_.query_positions().size()) - first_age;
    // Newest first, so that a row's place does not depend on how many there are.
    Matrix block = logits(source_.queries(member, last - rows, rows).colwise().reverse());
    for (int row = 0; row < rows; ++row) {
      const int position = shape_.prompt_length - 1 - first_age - row;
      causal_softmax(block.row(row), position, shape_.sliding_window);
    }
    blocks.push_back(std::move(block));
  }
  const Matrix& block = blocks[static_cast<std::size_t>(age / kRowBlock)];
  return {block.data() + static_cast<Index>(age % kRowBlock) * block.cols(), static_cast<std::size_t>(block.cols())};
}

void Head::combine_attention(int member, std::span<const float> weights, std::span<float> out) const {
  std::ranges::fill(out, 0.0f);
  Eigen::Map<Eigen::ArrayXf> sum(out.data(), static_cast<Index>(out.size()));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto row = attention(member, static_cast<int>(weights.size() - 1 - i));
    sum += weights[i] * Eigen::Map<const Eigen::ArrayXf>(row.data(), sum.size());
  }
}

std::span<const float> Head::attention_output(int member, int age) const {
  attention(member, age);
  auto& shared = shared_->members[static_cast<std::size_t>(member)];
  while (shared.outputs.size() < shared.attention.size()) {
    shared.outputs.push_back(shared.attention[shared.outputs.size()] * values());
  }
  const Matrix& block = shared.outputs[static_cast<std::size_t>(age / kRowBlock)];
  return {block.data() + static_cast<Index>(age % kRowBlock) * block.cols(), static_cast<std::size_t>(block.cols())};
}

const std::vector<float>& Head::accumulated_attention(int member) const {
  auto& accumulated = shared_->members[static_cast<std::size_t>(member)].accumulated;
  if (accumulated) return *accumulated;
  accumulated = source_.attention_mass(member);
  if (accumulated) return *accumulated;
  if (shared_->window < shape_.prompt_length) {
    throw Error(fmt::format(
        "accumulated attention needs the recorded attention mass (only for an eviction at the end of the prompt) or "
        "all {} queries before the eviction, and the trace holds the last {}; capture with --queries all",
        shape_.prompt_length, shared_->window));
  }
  std::vector<double> sums(static_cast<std::size_t>(shape_.prompt_length), 0.0);
  for (int first = 0; first < shape_.prompt_length; first += kRowBlock) {
    const int rows = std::min(kRowBlock, shape_.prompt_length - first);
    Matrix block = logits(source_.queries(member, first, rows));
    for (int row = 0; row < rows; ++row) {
      causal_softmax(block.row(row), first + row, shape_.sliding_window);
      for (int position = 0; position <= first + row; ++position) {
        sums[static_cast<std::size_t>(position)] += static_cast<double>(block(row, position));
      }
    }
  }
  accumulated.emplace(sums.begin(), sums.end());
  return *accumulated;
}

std::vector<float> Head::unmasked_accumulated_attention(int member, int window) const {
  const int prompt = shape_.prompt_length;
  if (shared_->window < prompt) {
    throw Error(fmt::format(
        "attention without a causal mask needs all {} queries before the eviction, and the trace holds the last {}; "
        "capture with --queries all",
        prompt, shared_->window));
  }
  std::vector<double> sums(static_cast<std::size_t>(prompt), 0.0);
  for (int first = 0; first < prompt; first += kRowBlock) {
    const int rows = std::min(kRowBlock, prompt - first);
    Matrix block = logits(source_.queries(member, first, rows));
    for (int row = 0; row < rows; ++row) {
      const int position = first + row;
      const int last_visible = position >= prompt - window ? position : prompt - 1;
      causal_softmax(block.row(row), last_visible, 0);
      for (int key = 0; key <= last_visible; ++key) {
        sums[static_cast<std::size_t>(key)] += static_cast<double>(block(row, key));
      }
    }
  }
  return {sums.begin(), sums.end()};
}

std::vector<float> Head::evaluation_attention(int member) const {
  const std::span<const int> positions = source_.evaluation_positions();
  if (positions.empty()) throw Error("an oracle needs evaluation queries, and there are none");
  const Matrix queries = source_.evaluation_queries(member);
  const Matrix visible_keys = source_.evaluation_keys();
  std::vector<double> sums(static_cast<std::size_t>(shape_.prompt_length), 0.0);
  for (Index first = 0; first < queries.rows(); first += kRowBlock) {
    const Index rows = std::min<Index>(kRowBlock, queries.rows() - first);
    Matrix block = queries.middleRows(first, rows) * visible_keys.transpose();
    scale_logits(block, shape_.softmax_scale, shape_.attn_logit_softcapping);
    for (Index row = 0; row < rows; ++row) {
      causal_softmax(block.row(row), positions[static_cast<std::size_t>(first + row)], shape_.sliding_window);
      for (std::size_t n = 0; n < sums.size(); ++n) sums[n] += static_cast<double>(block(row, static_cast<Index>(n)));
    }
  }
  return {sums.begin(), sums.end()};
}

const Matrix& Head::projection_factor(int member) const {
  auto& factor = shared_->members[static_cast<std::size_t>(member)].factor;
  if (factor) return *factor;
  const Matrix weight = source_.output_projection(member);
  const Eigen::HouseholderQR<Eigen::MatrixXf> decomposition(weight);
  const Index rows = std::min(weight.rows(), weight.cols());
  factor = decomposition.matrixQR().topRows(rows).triangularView<Eigen::Upper>();
  return *factor;
}

const Matrix& Head::projected_values(int member) const {
  auto& projected = shared_->members[static_cast<std::size_t>(member)].projected_values;
  if (!projected) projected = values() * projection_factor(member).transpose();
  return *projected;
}

}  // namespace kvreplay
