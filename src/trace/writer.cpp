#include "trace/writer.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/output_file.h"
#include "hdf5/hdf5.h"
#include "trace/check.h"

namespace kvreplay {

namespace {

std::string now_in_utc() { return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))); }

}  // namespace

struct TraceWriter::State {
  struct Layer {
    std::array<bool, 4> head_tensors{};  // in the order of HeadTensor
    bool output_projection = false;
    bool attention_mass = false;
  };

  State(const std::filesystem::path& path, TraceInfo trace, DType stored_type)
      : info(std::move(trace)),
        type(stored_type),
        output(checked(path)),
        file(hdf5::File::create(output.temporary(), path)),
        layers(static_cast<std::size_t>(info.model.num_layers)) {
    write_metadata();
  }

  // Before the file is made, so that a contradiction leaves no trace on the disk.
  const std::filesystem::path& checked(const std::filesystem::path& path) const {
    if (const auto found = find_contradiction(info)) {
      throw Error(fmt::format("{}: {}: {}", path.string(), found->path, found->reason));
    }
    return path;
  }

  [[noreturn]] void fail(std::string_view where, std::string_view reason) const {
    throw Error(fmt::format("{}: {}: {}", output.path().string(), where, reason));
  }

  void write_metadata() {
    file.write_string("/", "format", "kvtrace");
    file.write_int("/", "format_version", 1);
    file.write_string("/", "created_by", info.created_by.empty() ? "kvreplay " KVREPLAY_VERSION : info.created_by);
    file.write_string("/", "created_at", info.created_at.empty() ? now_in_utc() : info.created_at);
    file.write_string("/", "source", info.source);

    const ModelInfo& model = info.model;
    file.create_group("/model");
    file.write_string("/model", "name", model.name);
    file.write_string("/model", "architecture", model.architecture);
    file.write_int("/model", "num_layers", model.num_layers);
    file.write_int("/model", "num_attention_heads", model.num_attention_heads);
    file.write_int("/model", "num_key_value_heads", model.num_key_value_heads);
    file.write_int("/model", "head_dim", model.head_dim);
    file.write_int("/model", "hidden_size", model.hidden_size);
    file.write_double("/model", "rope_theta", model.rope_theta);
    file.write_double("/model", "softmax_scale", model.softmax_scale);
    file.write_int("/model", "sliding_window", model.sliding_window);
    file.write_double("/model", "attn_logit_softcapping", model.attn_logit_softcapping);

    write_list("/tokens/ids", info.token_ids);
    // The format's table has it on the dataset; readers exist that look for it on the group.
    file.write_int("/tokens/ids", "prompt_length", info.prompt_length);
    file.write_int("/tokens", "prompt_length", info.prompt_length);
    if (!info.token_pieces.empty()) {
      finish_dataset(
          file.write("/tokens/pieces", std::span<const std::string>(info.token_pieces), {info.num_tokens()}));
    }
    if (!info.turn_starts.empty()) write_list("/tokens/turn_starts", info.turn_starts);
    write_list("/query_positions", info.query_positions);
    if (!info.spans.empty()) {
      std::vector<hdf5::LabelledRange> ranges;
      for (const Span& span : info.spans) ranges.push_back({span.start, span.end, span.label});
      finish_dataset(file.write("/annotations/spans", std::span<const hdf5::LabelledRange>(ranges)));
    }
    for (int l = 0; l < model.num_layers; ++l) {
      const std::string path = fmt::format("/layers/{}", l);
      file.create_group(path);
      if (info.layer_sliding_window.empty()) continue;
      const int window = info.layer_sliding_window[static_cast<std::size_t>(l)];
      if (window != model.sliding_window) file.write_int(path, "sliding_window", window);
    }
  }

  void write_list(const std::string& path, const std::vector<std::int32_t>& values) {
    finish_dataset(file.write(path, std::span<const std::int32_t>(values), {static_cast<Index>(values.size())}));
  }

  void finish_dataset(const hdf5::Dataset& dataset) {
    file.write_string(dataset.path(), "xxh64", dataset.compute_xxh64());
  }

  Layer& layer(int number) {
    if (number < 0 || number >= info.model.num_layers) {
      fail("/layers", fmt::format("there is no layer {}; the trace has {}", number, info.model.num_layers));
    }
    return layers[static_cast<std::size_t>(number)];
  }

  // Writes a tensor in slices along its first axis. `place` names where an element stands, given its offset.
  template <class Place>
  void write_tensor(const std::string& path, const hdf5::Shape& shape, DType stored_type, std::span<const float> data,
                    bool& written, Place place) {
    if (std::exchange(written, true)) fail(path, "was written already");
    if (static_cast<Index>(data.size()) != hdf5::elements(shape)) {
      fail(path, fmt::format("{} values do not have the shape ({})", data.size(), fmt::join(shape, ", ")));
    }
    if (const auto found = find_non_finite(data)) {
      const char* what = std::isnan(data[*found]) ? "NaN" : "infinity";
      fail(path, fmt::format("{} at {}; the run itself produced it", what, place(static_cast<Index>(*found))));
    }
    hdf5::Dataset dataset = file.create_dataset(path, stored_type, shape);
    const std::size_t slice = data.size() / static_cast<std::size_t>(shape[0]);
    const std::size_t group = std::clamp<std::size_t>(kSliceElements / slice, 1, static_cast<std::size_t>(shape[0]));
    std::vector<std::byte> bytes(group * slice * size_of(stored_type));
    std::vector<float> rounded(stored_type == DType::float32 ? 0 : group * slice);
    XXH64_reset(digest.get(), 0);
    hdf5::Shape first(shape.size(), 0);
    hdf5::Shape count = shape;
    for (std::size_t start = 0; start < static_cast<std::size_t>(shape[0]); start += group) {
      const std::size_t slices = std::min(group, static_cast<std::size_t>(shape[0]) - start);
      const auto part = data.subspan(start * slice, slices * slice);
      const std::size_t size = part.size() * size_of(stored_type);
      from_float32(stored_type, part, bytes.data());
      if (!rounded.empty()) {
        to_float32(stored_type, bytes.data(), std::span(rounded).first(part.size()));
        if (const auto found = find_non_finite(std::span<const float>(rounded).first(part.size()))) {
          const char* remedy = stored_type == DType::float16 ? "bfloat16 or float32" : "float32";
          fail(path, fmt::format("{} at {} is too large for {}; store the trace as {}", part[*found],
                                 place(static_cast<Index>(start * slice + *found)), name_of(stored_type), remedy));
        }
      }
      XXH64_update(digest.get(), bytes.data(), size);
      first[0] = static_cast<Index>(start);
      count[0] = static_cast<Index>(slices);
      dataset.write_raw(first, count, bytes.data());
    }
    file.write_string(path, "xxh64", fmt::format("{:016x}", XXH64_digest(digest.get())));
  }

  // Elements that are converted at a time: enough for a large write, little beside a head.
  static constexpr std::size_t kSliceElements = std::size_t{1} << 20;

  TraceInfo info;
  DType type;
  OutputFile output;  // before `file`, so that the file is closed before its name goes away
  hdf5::File file;
  std::vector<Layer> layers;
  std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> digest{XXH64_createState(), &XXH64_freeState};
};

TraceWriter::TraceWriter(const std::filesystem::path& path, TraceInfo info, DType type)
    : state_(std::make_unique<State>(path, std::move(info), type)) {}
TraceWriter::~TraceWriter() = default;

void TraceWriter::write(int layer, HeadTensor tensor, std::span<const float> data) {
  State::Layer& state = state_->layer(layer);
  const hdf5::Shape shape = shape_of(state_->info, tensor);
  const bool by_position = tensor == HeadTensor::keys || tensor == HeadTensor::values;
  state_->write_tensor(fmt::format("/layers/{}/{}", layer, name_of(tensor)), shape, state_->type, data,
                       state.head_tensors[static_cast<std::size_t>(tensor)], [&](Index offset) {
                         const Index row = offset / shape[2] % shape[1];
                         const auto& positions = state_->info.query_positions;
                         return fmt::format("layer {}, head {}, position {}", layer, offset / (shape[1] * shape[2]),
                                            by_position ? row : positions[static_cast<std::size_t>(row)]);
                       });
}

void TraceWriter::write_output_projection(int layer, std::span<const float> weight) {
  State::Layer& state = state_->layer(layer);
  const ModelInfo& model = state_->info.model;
  const Index width = Index{model.num_attention_heads} * model.head_dim;
  state_->write_tensor(fmt::format("/layers/{}/output_projection", layer), {model.hidden_size, width}, state_->type,
                       weight, state.output_projection, [&](Index offset) {
                         return fmt::format("layer {}, head {}, row {}", layer, offset % width / model.head_dim,
                                            offset / width);
                       });
}

void TraceWriter::write_attention_mass(int layer, std::span<const float> mass) {
  State::Layer& state = state_->layer(layer);
  const Index prompt = state_->info.prompt_length;
  state_->write_tensor(fmt::format("/layers/{}/attention_mass", layer),
                       {state_->info.model.num_attention_heads, prompt}, DType::float32, mass, state.attention_mass,
                       [&](Index offset) {
                         return fmt::format("layer {}, head {}, position {}", layer, offset / prompt, offset % prompt);
                       });
}

void TraceWriter::finish() {
  for (int l = 0; l < state_->info.model.num_layers; ++l) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      if (!state_->layer(l).head_tensors[static_cast<std::size_t>(tensor)]) {
        state_->fail(fmt::format("/layers/{}/{}", l, name_of(tensor)), "was not written, but every layer needs it");
      }
    }
  }
  // Last, so that a file in which anything is missing cannot carry it.
  state_->file.write_int("/", "complete", 1);
  state_->file.close();
  state_->output.commit();
}

}  // namespace kvreplay
