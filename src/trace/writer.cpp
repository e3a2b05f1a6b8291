#include "trace/writer.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <functional>
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

// A tensor that is written from its first row to its last.
struct TraceWriter::Tensor {
  std::string path;
  hdf5::Shape shape;
  DType type = DType::float32;
  std::function<std::string(Index offset)> place;  // where an element stands, for messages

  Index width() const { return shape.back(); }
  Index rows() const { return hdf5::elements(shape) / width(); }

  hdf5::Dataset dataset;
  std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> digest{nullptr, &XXH64_freeState};
  Index written = 0;  // rows
};

struct TraceWriter::State {
  struct Layer {
    std::array<std::unique_ptr<Tensor>, 4> head_tensors;  // in the order of HeadTensor; null until something is written
    std::unique_ptr<Tensor> output_projection;
    std::unique_ptr<Tensor> attention_mass;
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

  Tensor& head_tensor(int number, HeadTensor which) {
    std::unique_ptr<Tensor>& tensor = layer(number).head_tensors[static_cast<std::size_t>(which)];
    if (tensor != nullptr) return *tensor;
    const hdf5::Shape shape = shape_of(info, which);
    const bool by_position = which == HeadTensor::keys || which == HeadTensor::values;
    return describe(tensor, fmt::format("/layers/{}/{}", number, name_of(which)), shape, type,
                    [this, number, shape, by_position](Index offset) {
                      const Index row = offset / shape[2] % shape[1];
                      return fmt::format("layer {}, head {}, position {}", number, offset / (shape[1] * shape[2]),
                                         by_position ? row : info.query_positions[static_cast<std::size_t>(row)]);
                    });
  }

  Tensor& output_projection(int number) {
    std::unique_ptr<Tensor>& tensor = layer(number).output_projection;
    if (tensor != nullptr) return *tensor;
    const Index dim = info.model.head_dim;
    const Index width = info.model.num_attention_heads * dim;
    return describe(tensor, fmt::format("/layers/{}/output_projection", number), {info.model.hidden_size, width}, type,
                    [number, width, dim](Index offset) {
                      return fmt::format("layer {}, head {}, row {}", number, offset % width / dim, offset / width);
                    });
  }

  Tensor& attention_mass(int number) {
    std::unique_ptr<Tensor>& tensor = layer(number).attention_mass;
    if (tensor != nullptr) return *tensor;
    const Index prompt = info.prompt_length;
    return describe(tensor, fmt::format("/layers/{}/attention_mass", number), {info.model.num_attention_heads, prompt},
                    DType::float32, [number, prompt](Index offset) {
                      return fmt::format("layer {}, head {}, position {}", number, offset / prompt, offset % prompt);
                    });
  }

  static Tensor& describe(std::unique_ptr<Tensor>& tensor, std::string path, hdf5::Shape shape, DType stored_type,
                          std::function<std::string(Index offset)> place) {
    tensor = std::make_unique<Tensor>();
    tensor->path = std::move(path);
    tensor->shape = std::move(shape);
    tensor->type = stored_type;
    tensor->place = std::move(place);
    return *tensor;
  }

  // Writes all of a tensor of which nothing was written.
  void write_whole(Tensor& tensor, std::span<const float> data) {
    if (tensor.written > 0) fail(tensor.path, "was written already");
    if (static_cast<Index>(data.size()) != hdf5::elements(tensor.shape)) {
      fail(tensor.path,
           fmt::format("{} values do not have the shape ({})", data.size(), fmt::join(tensor.shape, ", ")));
    }
    write_rows(tensor, 0, data);
  }

  // The row that must come next, and the number of rows in `size` elements of it, or a complaint.
  Index expect_rows(const Tensor& tensor, Index first, std::size_t size) const {
    if (first != tensor.written) {
      if (tensor.written == tensor.rows()) fail(tensor.path, "was written already");
      fail(tensor.path,
           fmt::format("{} comes next, not {}", place_of_row(tensor, tensor.written),
                       first < 0 || first >= tensor.rows() ? fmt::format("row {} of {}", first, tensor.rows())
                                                           : place_of_row(tensor, first)));
    }
    const auto rows = static_cast<Index>(size) / tensor.width();
    if (size == 0 || rows * tensor.width() != static_cast<Index>(size) || rows > tensor.rows() - first) {
      fail(tensor.path, fmt::format("{} values are not rows of {} that the shape ({}) has left", size, tensor.width(),
                                    fmt::join(tensor.shape, ", ")));
    }
    return rows;
  }

  std::string place_of_row(const Tensor& tensor, Index row) const { return tensor.place(row * tensor.width()); }

  // Writes the rows from `first` on, which must be the next ones, a slice at a time.
  void write_rows(Tensor& tensor, Index first, std::span<const float> data) {
    Index rows = expect_rows(tensor, first, data.size());
    const Index offset = first * tensor.width();
    if (const auto found = find_non_finite(data)) {
      fail(tensor.path,
           fmt::format("{} at {}; the run itself produced it", std::isnan(data[*found]) ? "NaN" : "infinity",
                       tensor.place(offset + static_cast<Index>(*found))));
    }
    const Index slice = std::max<Index>(kSliceElements / tensor.width(), 1);
    std::vector<std::byte> bytes(static_cast<std::size_t>(std::min(slice, rows) * tensor.width()) *
                                 size_of(tensor.type));
    for (Index done = 0; done < rows;) {
      const Index count = std::min(slice, rows - done);
      const auto part = data.subspan(static_cast<std::size_t>(done * tensor.width()),
                                     static_cast<std::size_t>(count * tensor.width()));
      const auto stored = std::span(bytes).first(part.size() * size_of(tensor.type));
      from_float32(tensor.type, part, stored.data());
      if (const auto found = find_non_finite(tensor.type, stored)) {
        const char* remedy = tensor.type == DType::float16 ? "bfloat16 or float32" : "float32";
        fail(tensor.path, fmt::format("{} at {} is too large for {}; store the trace as {}", part[*found],
                                      tensor.place(offset + done * tensor.width() + static_cast<Index>(*found)),
                                      name_of(tensor.type), remedy));
      }
      append(tensor, count, stored);
      done += count;
    }
  }

  // The same for rows that are in the stored type already.
  void write_rows(Tensor& tensor, Index first, std::span<const std::byte> stored) {
    const Index rows = expect_rows(tensor, first, stored.size() / size_of(tensor.type));
    if (const auto found = find_non_finite(tensor.type, stored)) {
      fail(tensor.path,
           fmt::format("NaN or infinity at {}", tensor.place(first * tensor.width() + static_cast<Index>(*found))));
    }
    append(tensor, rows, stored);
  }

  // `rows` checked rows behind those that were written, in as few boxes as they make: whole heads, or rows of one.
  void append(Tensor& tensor, Index rows, std::span<const std::byte> stored) {
    if (tensor.written == 0) {
      tensor.dataset = file.create_dataset(tensor.path, tensor.type, tensor.shape);
      tensor.digest.reset(XXH64_createState());
      XXH64_reset(tensor.digest.get(), 0);
    }
    XXH64_update(tensor.digest.get(), stored.data(), stored.size());
    const std::size_t row_bytes = stored.size() / static_cast<std::size_t>(rows);
    const bool has_heads = tensor.shape.size() == 3;
    const Index per_head = has_heads ? tensor.shape[1] : 1;
    while (rows > 0) {
      const Index head = tensor.written / per_head;
      const Index row = tensor.written % per_head;
      const Index heads = row == 0 ? rows / per_head : 0;
      const Index count = heads > 0 ? heads * per_head : std::min(rows, per_head - row);
      if (!has_heads) {
        tensor.dataset.write_raw({head, 0}, {heads, tensor.width()}, stored.data());
      } else if (heads > 0) {
        tensor.dataset.write_raw({head, 0, 0}, {heads, per_head, tensor.width()}, stored.data());
      } else {
        tensor.dataset.write_raw({head, row, 0}, {1, count, tensor.width()}, stored.data());
      }
      tensor.written += count;
      rows -= count;
      stored = stored.subspan(static_cast<std::size_t>(count) * row_bytes);
    }
    if (tensor.written < tensor.rows()) return;
    file.write_string(tensor.path, "xxh64", fmt::format("{:016x}", XXH64_digest(tensor.digest.get())));
    tensor.digest.reset();
    tensor.dataset = {};
  }

  // Row `row` of a head, among all rows of the tensor.
  Index row_in_head(const Tensor& tensor, int head, Index row) const {
    if (head < 0 || head >= tensor.shape[0]) {
      fail(tensor.path, fmt::format("there is no head {}; the trace has {}", head, tensor.shape[0]));
    }
    if (row < 0 || row >= tensor.shape[1]) {
      fail(tensor.path, fmt::format("head {} has no row {}; there are {}", head, row, tensor.shape[1]));
    }
    return head * tensor.shape[1] + row;
  }

  void require_whole(const Tensor& tensor) const {
    if (tensor.written == 0) fail(tensor.path, "was not written, but every layer needs it");
    require_no_gap(tensor);
  }

  void require_no_gap(const Tensor& tensor) const {
    if (tensor.written == tensor.rows()) return;
    fail(tensor.path, fmt::format("was not written to its end; {} comes next", place_of_row(tensor, tensor.written)));
  }

  // Elements that are converted at a time: enough for a large write, little beside a head.
  static constexpr Index kSliceElements = Index{1} << 20;

  TraceInfo info;
  DType type;
  OutputFile output;  // before `file`, so that the file is closed before its name goes away
  hdf5::File file;
  std::vector<Layer> layers;
};

TraceWriter::TraceWriter(const std::filesystem::path& path, TraceInfo info, DType type)
    : state_(std::make_unique<State>(path, std::move(info), type)) {}
TraceWriter::~TraceWriter() = default;

void TraceWriter::write(int layer, HeadTensor tensor, std::span<const float> data) {
  state_->write_whole(state_->head_tensor(layer, tensor), data);
}

void TraceWriter::write_rows(int layer, HeadTensor tensor, int head, Index first, std::span<const float> rows) {
  Tensor& target = state_->head_tensor(layer, tensor);
  state_->write_rows(target, state_->row_in_head(target, head, first), rows);
}

void TraceWriter::write_rows(int layer, HeadTensor tensor, int head, Index first, std::span<const std::byte> stored) {
  Tensor& target = state_->head_tensor(layer, tensor);
  state_->write_rows(target, state_->row_in_head(target, head, first), stored);
}

void TraceWriter::write_output_projection(int layer, std::span<const float> weight) {
  state_->write_whole(state_->output_projection(layer), weight);
}

void TraceWriter::write_output_projection_rows(int layer, Index first, std::span<const float> rows) {
  state_->write_rows(state_->output_projection(layer), first, rows);
}

void TraceWriter::write_attention_mass(int layer, std::span<const float> mass) {
  state_->write_whole(state_->attention_mass(layer), mass);
}

void TraceWriter::write_attention_mass_of(int layer, int head, std::span<const float> mass) {
  state_->write_rows(state_->attention_mass(layer), head, mass);
}

void TraceWriter::finish() {
  for (int l = 0; l < state_->info.model.num_layers; ++l) {
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      state_->require_whole(state_->head_tensor(l, tensor));
    }
    const State::Layer& layer = state_->layer(l);
    if (layer.output_projection != nullptr) state_->require_no_gap(*layer.output_projection);
    if (layer.attention_mass != nullptr) state_->require_no_gap(*layer.attention_mass);
  }
  // Last, so that a file in which anything is missing cannot carry it.
  state_->file.write_int("/", "complete", 1);
  state_->file.close();
  state_->output.commit();
}

}  // namespace kvreplay
