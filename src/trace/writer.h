// Writes kvtrace files that are complete or absent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "trace/trace.h"

namespace kvreplay {

/// A kvtrace file in the making. It grows under a temporary name and gets its own when finish() succeeds; destroyed
/// before that, it leaves nothing.
class TraceWriter {
 public:
  /// Tensors will be stored as `type` and with their digest, contiguous.
  /// The run may go on: then `info` is what is known of it, T tokens and Q queries, and up to `most_later` tokens
  /// follow, each of which is a query too. The tensors of heads are then stored in chunks, of all heads at some
  /// positions, and each head gets its rows in order, whatever the others have. Throws Error if the file cannot be
  /// created or `info` contradicts itself.
  TraceWriter(const std::filesystem::path& path, TraceInfo info, DType type, Index most_later = 0);
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  /// Writes one layer's tensor whole. `data` is [K, T, Dk or Dv] or [H, Q, Dk or Dv] in row-major order. Throws Error.
  void write(int layer, HeadTensor tensor, std::span<const float> data);

  /// Writes the next rows of one layer's tensor: `rows` is [n, Dk or Dv], the rows of `head` from `first` on (positions
  /// of keys and values, numbers of captured queries otherwise). n may reach into the heads that follow, unless the run
  /// may go on. A tensor is written from its first row to its last, while pieces of different tensors may alternate; no
  /// more than a piece is held in memory. Throws Error, also where another row comes next.
  void write_rows(int layer, HeadTensor tensor, int head, Index first, std::span<const float> rows);

  /// The same for rows that were brought to the trace's type before, by from_float32.
  void write_rows(int layer, HeadTensor tensor, int head, Index first, std::span<const std::byte> stored);

  /// Writes one more row of every head, [K or H, Dk or Dv], of a run that may go on; some rows are held in memory and
  /// written together. Throws Error, also where heads have different numbers of rows.
  void write_next(int layer, HeadTensor tensor, std::span<const float> rows);

  /// `weight` is [C, H·Dv], as PyTorch stores the layer's o_proj. Throws Error.
  void write_output_projection(int layer, std::span<const float> weight);

  /// Its next rows, from `first` on: [n, H·Dv]. Throws Error.
  void write_output_projection_rows(int layer, Index first, std::span<const float> rows);

  /// `mass` is [H, P]; always stored as float32. Throws Error.
  void write_attention_mass(int layer, std::span<const float> mass);

  /// The next heads, from `head` on: [n, P]. Throws Error.
  void write_attention_mass_of(int layer, int head, std::span<const float> mass);

  /// `factors` is [H, Q, output_gate_dim of the layer]. Not of a run that may go on. Throws Error.
  void write_output_gate(int layer, std::span<const float> factors);

  /// The lengths of the residual stream after a layer's attention was added, of its next captured queries. They are
  /// held in memory, and there are as many as queries in the end, or none. Throws Error.
  void write_residual_norms(int layer, std::span<const float> norms);

  /// A further turn of the conversation, behind those of `info`: its first position, which may be that of a token that
  /// follows, and who speaks, where `info` says so of the others.
  void write_turn(std::int32_t start, const std::string& role);

  /// What the model finds most likely after the prompt.
  void write_next_token(const NextToken& next);

  /// Writes the tokens, marks the file complete and puts it in its place. Of a run that went on, `later_ids`
  /// are the tokens behind those of `info`, and `later_pieces` their texts, where `info` has those of the others.
  /// Throws Error if a required tensor of a layer was not written, if one was not written to its end, or if the disk
  /// is full.
  void finish(std::span<const std::int32_t> later_ids = {}, std::span<const std::string> later_pieces = {});

 private:
  struct Tensor;
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvreplay
