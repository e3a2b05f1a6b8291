#include "trace/inspection.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/parallel.h"
#include "hdf5/hdf5.h"
#include "trace/attention.h"
#include "trace/check.h"

namespace kvreplay {

namespace {

// Attention that is off by more than this on average was not rounded but computed differently.
constexpr double kSuspiciousError = 0.02;

// Published observation windows are 8 to 64 queries; 32 is the most common.
constexpr int kUsualWindow = 32;

template <class T>
void add_distinct(std::vector<T>& list, const T& value) {
  if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
}

std::vector<TensorKind> tensor_kinds(const TraceReader& trace) {
  std::vector<TensorKind> kinds;
  for (const char* name : {"keys", "values", "queries", "outputs", "output_projection", "attention_mass", "output_gate",
                           "sinks", "projection_norm", "projection_output_norm", "residual_norm"}) {
    TensorKind kind;
    kind.name = name;
    for (const StoredTensor& tensor : trace.stored_tensors()) {
      if (tensor.path.substr(tensor.path.find_last_of('/') + 1) != name) continue;
      ++kind.layers;
      kind.shape = tensor.shape;
      add_distinct(kind.types, tensor.type);
      add_distinct(kind.storage, tensor.storage);
      kind.stored_bytes += tensor.stored_bytes;
      kind.unpacked_bytes += hdf5::elements(tensor.shape) * static_cast<Index>(size_of(tensor.type));
    }
    if (kind.layers > 0) kinds.push_back(std::move(kind));
  }
  return kinds;
}

void count_queries(Inspection& inspection) {
  const TraceInfo& info = inspection.info;
  const auto& positions = info.query_positions;
  const auto end = std::lower_bound(positions.begin(), positions.end(), info.prompt_length);
  inspection.prompt_queries = static_cast<int>(end - positions.begin());
  inspection.later_queries = info.num_queries() - inspection.prompt_queries;
  for (auto query = end; query != positions.begin(); --query) {
    if (*(query - 1) != info.prompt_length - 1 - inspection.observation_window) break;
    ++inspection.observation_window;
  }
}

// Indices of the captured queries that are recomputed.
std::vector<Index> recomputed_rows(const TraceInfo& info) {
  const Index queries = info.num_queries();
  const Index count = std::min<Index>(queries, kRecomputedQueries);
  std::vector<Index> rows;
  for (Index i = 0; i < count; ++i) rows.push_back((i + 1) * queries / count - 1);
  return rows;
}

Matrix read_rows(const TraceReader& trace, int layer, HeadTensor tensor, int head, const std::vector<Index>& rows,
                 bool piecewise) {
  const LayerInfo& of = trace.info().layers[static_cast<std::size_t>(layer)];
  Matrix result(static_cast<Index>(rows.size()), tensor == HeadTensor::queries ? of.key_dim : of.value_dim);
  if (piecewise) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      result.row(static_cast<Index>(i)) = trace.read(layer, tensor, head, rows[i], 1);
    }
  } else {
    const Matrix all = trace.read(layer, tensor, head, 0, trace.info().num_queries());
    for (std::size_t i = 0; i < rows.size(); ++i) result.row(static_cast<Index>(i)) = all.row(rows[i]);
  }
  return result;
}

void measure_fidelity(const TraceReader& trace, Inspection& inspection) {
  const TraceInfo& info = inspection.info;
  const ModelInfo& model = info.model;
  const std::vector<Index> rows = recomputed_rows(info);
  inspection.recomputed_queries = static_cast<int>(rows.size());
  std::vector<std::int32_t> positions;
  for (const Index row : rows) positions.push_back(info.query_positions[static_cast<std::size_t>(row)]);

  // A row of a chunk costs the whole chunk, so chunked heads are read in one go.
  std::map<std::string, bool> contiguous;
  for (const StoredTensor& tensor : trace.stored_tensors()) contiguous[tensor.path] = tensor.storage == "contiguous";

  struct KvHead {
    int layer;
    int head;
  };
  std::vector<KvHead> kv_heads;
  std::vector<std::vector<std::vector<double>>> errors;  // [layer][query head][query]
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    errors.emplace_back(of.attends ? static_cast<std::size_t>(of.num_attention_heads) : 0);
    for (int head = 0; of.attends && head < of.num_key_value_heads; ++head) kv_heads.push_back({layer, head});
  }
  parallel_for(static_cast<int>(kv_heads.size()), [&](int piece) {
    const int layer = kv_heads[static_cast<std::size_t>(piece)].layer;
    const int kv_head = kv_heads[static_cast<std::size_t>(piece)].head;
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    const Index keys_needed = positions.back() + 1;
    const Matrix keys = trace.read(layer, HeadTensor::keys, kv_head, 0, keys_needed);
    const Matrix values = trace.read(layer, HeadTensor::values, kv_head, 0, keys_needed);
    for (int head = kv_head * of.group_size(); head < (kv_head + 1) * of.group_size(); ++head) {
      const auto read = [&](HeadTensor tensor) {
        return read_rows(trace, layer, tensor, head, rows,
                         contiguous.at(fmt::format("/layers/{}/{}", layer, name_of(tensor))));
      };
      const Matrix exact = attention_outputs(read(HeadTensor::queries), positions, keys, values, of.rule, head);
      const Matrix stored = read(HeadTensor::outputs);
      auto& found = errors[static_cast<std::size_t>(layer)][static_cast<std::size_t>(head)];
      for (Index i = 0; i < exact.rows(); ++i) {
        const double norm = exact.row(i).cast<double>().norm();
        const double difference = (stored.row(i).cast<double>() - exact.row(i).cast<double>()).norm();
        found.push_back(norm > 0 ? difference / norm : difference > 0 ? 1 : 0);
      }
    }
  });

  for (const auto& of_layer : errors) {
    LayerFidelity fidelity;
    double sum = 0;
    for (std::size_t head = 0; head < of_layer.size(); ++head) {
      const auto& found = of_layer[head];
      for (std::size_t i = 0; i < found.size(); ++i) {
        sum += found[i];
        if (found[i] > fidelity.worst) fidelity = {0, found[i], static_cast<int>(head), positions[i]};
      }
    }
    if (!of_layer.empty()) {
      fidelity.mean = sum / (static_cast<double>(of_layer.size()) * static_cast<double>(rows.size()));
    }
    inspection.fidelity.push_back(fidelity);
  }
}

// What rounding to `type` moves a value by at most, relative to it: half of the last of its significant bits.
double rounding_of(DType type) {
  switch (type) {
    case DType::bfloat16:
      return 0x1p-8;
    case DType::float16:
      return 0x1p-11;
    case DType::float32:
      return 0x1p-24;
  }
  return 0;
}

// Says in words whether the outputs are as far from exact as their type lets expect. In float32 it is the sums over
// many keys that lose digits, in the shorter types the rounding of the outputs and of what they are computed from.
std::string explain_fidelity(const Inspection& inspection) {
  const auto outputs = std::find_if(inspection.tensors.begin(), inspection.tensors.end(),
                                    [](const TensorKind& kind) { return kind.name == "outputs"; });
  if (inspection.fidelity.empty() || outputs == inspection.tensors.end()) return "";
  const auto coarsest = std::max_element(outputs->types.begin(), outputs->types.end(),
                                         [](DType a, DType b) { return rounding_of(a) < rounding_of(b); });
  const double rounding = rounding_of(*coarsest);
  const bool single = *coarsest == DType::float32;
  const double expected = single ? 1e-5 : 2 * rounding;
  double mean = 0;
  for (const LayerFidelity& layer : inspection.fidelity) mean = std::max(mean, layer.mean);
  const std::string type =
      single ? std::string("float32: sums in another order differ by up to 1e-05")
             : fmt::format("{}: rounding alone moves a value by up to {:.1e} of it", name_of(*coarsest), rounding);
  if (mean <= expected) {
    return fmt::format("outputs are {}, and these means are no more than that explains{}", type,
                       single ? "" : "; replays recompute exact outputs in float32");
  }
  if (mean <= kSuspiciousError) {
    return fmt::format(
        "outputs are {}, and a mean of {:.1e} is more: the run computed its attention, or the trace holds its queries, "
        "keys or values, with fewer digits; replays recompute exact outputs in float32",
        type, mean);
  }
  return fmt::format("outputs are {}, and a mean of {:.1e} is far more than any rounding: see the warning below", type,
                     mean);
}

std::vector<DigestCheck> check_digests(const TraceReader& trace) {
  std::vector<DigestCheck> checks;
  const hdf5::File file = hdf5::File::open(trace.path());
  std::vector<std::string> paths = {"/tokens/ids",
                                    "/tokens/pieces",
                                    "/tokens/turn_starts",
                                    "/query_positions",
                                    "/answers",
                                    "/annotations/spans",
                                    "/annotations/spans/start",
                                    "/annotations/spans/end",
                                    "/annotations/spans/label",
                                    "/annotations/spans/group"};
  for (const RotaryTable& table : trace.info().rotary) paths.push_back("/rotary/" + table.name);
  for (const std::string& path : paths) {
    if (!file.exists(path) || file.is_group(path)) continue;
    checks.push_back({path, DigestCheck::Outcome::no_digest,
                      file.has_attribute(path, "xxh64") ? file.read_string(path, "xxh64") : "", ""});
  }
  for (const StoredTensor& tensor : trace.stored_tensors())
    checks.push_back({tensor.path, DigestCheck::Outcome::no_digest, tensor.xxh64, ""});
  parallel_for(static_cast<int>(checks.size()), [&](int i) {
    DigestCheck& check = checks[static_cast<std::size_t>(i)];
    if (check.stored.empty()) return;
    check.computed = trace.compute_xxh64(check.path);
    check.outcome = check.computed == check.stored ? DigestCheck::Outcome::ok : DigestCheck::Outcome::mismatch;
  });
  return checks;
}

std::string span_text(const TraceInfo& info, const Span& span) {
  std::string text;
  for (int i = span.start; i < span.end && !info.token_pieces.empty(); ++i) {
    text += info.token_pieces[static_cast<std::size_t>(i)];
  }
  return text;
}

std::vector<std::string> warnings(const TraceReader& trace, const Inspection& inspection) {
  std::vector<std::string> found;
  const TraceInfo& info = inspection.info;
  int layers = 0;  // that attend
  int with_projection = 0;
  int with_mass = 0;
  for (int layer = 0; layer < info.model.num_layers; ++layer) {
    if (!info.layers[static_cast<std::size_t>(layer)].attends) continue;
    ++layers;
    with_projection += trace.has_output_projection(layer) ? 1 : 0;
    with_mass += trace.has_attention_mass(layer) ? 1 : 0;
  }
  if (inspection.later_queries == 0) {
    found.push_back(
        "no query after the prompt was captured, so eviction at its end cannot be measured; "
        "use 'capture --generate N' with N at least 2, or evict earlier");
  }
  if (inspection.observation_window == 0) {
    found.push_back(
        "the prompt's last query was not captured, so policies with an observation window cannot evict at "
        "the prompt's end");
  } else if (inspection.observation_window < std::min(kUsualWindow, info.prompt_length)) {
    found.push_back(
        fmt::format("only the prompt's last {} queries were captured, so observation windows cannot be "
                    "wider; published ones have up to 64",
                    inspection.observation_window));
  }
  if (with_mass < layers && inspection.prompt_queries < info.prompt_length) {
    found.push_back(
        fmt::format("{} of {} layers have no attention mass and not all prompt queries were captured, so "
                    "accumulated attention (H2O) is not at hand",
                    layers - with_mass, layers));
  }
  if (with_projection < layers) {
    found.push_back(
        fmt::format("{} of {} layers have no output projection, so errors are measured before it and "
                    "ReST-KV scores without it",
                    layers - with_projection, layers));
  }
  if (!hdf5::File::open(trace.path()).has_checksums()) {
    found.push_back(
        "the file is in HDF5's old format without checksums, so damage may go unnoticed; rewrite it with "
        "'h5repack -L'");
  }
  std::vector<double> errors;
  for (const LayerFidelity& layer : inspection.fidelity) errors.push_back(layer.mean);
  if (std::string warning = outputs_warning(errors); !warning.empty()) found.push_back(std::move(warning));
  return found;
}

}  // namespace

std::string outputs_warning(std::span<const double> layer_errors) {
  const auto suspicious = [](double error) { return error > kSuspiciousError; };
  const auto count = std::ranges::count_if(layer_errors, suspicious);
  if (count == 0) return "";
  const auto first = std::ranges::find_if(layer_errors, suspicious) - layer_errors.begin();
  return fmt::format(
      "the stored outputs of {} of {} layers (the first is layer {}) are not the attention of the stored queries, keys "
      "and values; check softmax_scale, sliding_window, attn_logit_softcapping and how the run was captured",
      count, layer_errors.size(), first);
}

std::string name_of(DigestCheck::Outcome outcome) {
  switch (outcome) {
    case DigestCheck::Outcome::ok:
      return "ok";
    case DigestCheck::Outcome::mismatch:
      return "mismatch";
    case DigestCheck::Outcome::no_digest:
      return "no digest";
  }
  return "";
}

namespace {

// Reading refuses NaN and infinity, naming layer, head and position.
void read_everything(const TraceReader& trace) {
  const TraceInfo& info = trace.info();
  parallel_for(info.model.num_layers, [&](int layer) {
    const LayerInfo& of = info.layers[static_cast<std::size_t>(layer)];
    if (!of.attends) return;
    for (int head = 0; head < of.num_attention_heads; ++head) {
      if (head < of.num_key_value_heads) {
        trace.read(layer, HeadTensor::keys, head, 0, info.num_tokens());
        trace.read(layer, HeadTensor::values, head, 0, info.num_tokens());
      }
      trace.read(layer, HeadTensor::queries, head, 0, info.num_queries());
      trace.read(layer, HeadTensor::outputs, head, 0, info.num_queries());
      if (trace.has_output_projection(layer)) trace.read_output_projection(layer, head);
      if (trace.has_attention_mass(layer)) trace.read_attention_mass(layer, head);
      if (of.output_gate_dim > 0) trace.read_output_gate(layer, head);
    }
  });
}

}  // namespace

Inspection inspect(const TraceReader& trace, bool verify) {
  Inspection inspection;
  inspection.path = trace.path();
  inspection.file_bytes = static_cast<Index>(std::filesystem::file_size(trace.path()));
  inspection.info = trace.info();
  inspection.tensors = tensor_kinds(trace);
  count_queries(inspection);
  for (const Span& span : inspection.info.spans) inspection.span_texts.push_back(span_text(inspection.info, span));
  if (verify) inspection.digests = check_digests(trace);
  const bool damaged = std::any_of(inspection.digests.begin(), inspection.digests.end(), [](const DigestCheck& check) {
    return check.outcome == DigestCheck::Outcome::mismatch;
  });
  if (verify && !damaged) read_everything(trace);
  // Numbers from tensors that are not what was written would only mislead.
  if (!damaged) measure_fidelity(trace, inspection);
  inspection.explanation = explain_fidelity(inspection);
  inspection.warnings = warnings(trace, inspection);
  return inspection;
}

}  // namespace kvreplay
