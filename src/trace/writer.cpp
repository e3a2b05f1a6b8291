#include "trace/writer.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <functional>
#include <map>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/output_file.h"
#include "hdf5/hdf5.h"
#include "trace/check.h"
#include "trace/layer_fields.h"

namespace kvreplay {

namespace {

std::string now_in_utc() { return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))); }

}  // namespace

// A tensor that is written in sequences of rows, each from its first to its last: one sequence through all of it, or
// one in each head where the run may go on.
struct TraceWriter::Tensor {
  std::string path;
  hdf5::Shape shape;  // where the run may go on, the largest that it may come to
  DType type = DType::float32;
  std::function<std::string(Index offset)> place;  // where an element stands, for messages
  hdf5::Shape chunk;

  bool grows() const { return !chunk.empty(); }
  Index width() const { return shape.back(); }
  Index rows() const { return hdf5::elements(shape) / width(); }
  Index sequence_rows() const { return rows() / static_cast<Index>(written.size()); }
  Index heads() const { return shape.front(); }

  std::optional<hdf5::Dataset> dataset;  // while it is being written
  std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> digest{nullptr, &XXH64_freeState};
  std::vector<Index> written;  // rows of each sequence

  // The last rows of every head that came one by one, [heads, kWaitingRows, width] in the stored type: each would be a
  // write of its own in every head.
  std::vector<std::byte> waiting;
  Index waiting_rows = 0;
};

struct TraceWriter::State {
  struct Layer {
    std::array<std::unique_ptr<Tensor>, 4> head_tensors;  // in the order of HeadTensor; null until something is written
    std::unique_ptr<Tensor> output_projection;
    std::unique_ptr<Tensor> attention_mass;
    std::unique_ptr<Tensor> output_gate;
    std::vector<float> residual_norms;  // of the captured queries so far
  };

  State(const std::filesystem::path& path, TraceInfo trace, DType stored_type, Index most_later_tokens)
      : info(with_layers(std::move(trace))),
        type(stored_type),
        most_later(most_later_tokens),
        output(checked(path)),
        file(hdf5::File::create(output.temporary(), path)),
        layers(static_cast<std::size_t>(info.model.num_layers)) {
    write_metadata();
  }

  static TraceInfo with_layers(TraceInfo trace) {
    if (trace.layers.empty()) {
      trace.layers.assign(static_cast<std::size_t>(std::max(trace.model.num_layers, 0)), trace.model.layer());
    }
    return trace;
  }

  const LayerInfo& described(int number) const { return info.layers[static_cast<std::size_t>(number)]; }

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
    file.write_strings("/", {{"format", "kvtrace"},
                             {"created_by", info.created_by.empty() ? "kvreplay " KVREPLAY_VERSION : info.created_by},
                             {"created_at", info.created_at.empty() ? now_in_utc() : info.created_at},
                             {"source", info.source}});
    file.write_int("/", "format_version", kTraceFormatVersion);

    const ModelInfo& model = info.model;
    file.create_group("/model");
    // What all layers say, the model says once.
    LayerInfo common = model.layer();
    if (std::ranges::all_of(info.layers, [&](const auto& layer) { return layer.rotary == info.layers[0].rotary; })) {
      common.rotary = info.layers[0].rotary;
    }
    std::vector<hdf5::NamedString> texts = {{"name", model.name}, {"architecture", model.architecture}};
    if (!common.rotary.empty()) texts.push_back({"rotary", common.rotary});
    if (!model.weight_shapes_digest.empty()) texts.push_back({"weight_shapes_digest", model.weight_shapes_digest});
    file.write_strings("/model", texts);
    file.write_int("/model", "num_layers", model.num_layers);
    file.write_int("/model", "num_attention_heads", model.num_attention_heads);
    file.write_int("/model", "num_key_value_heads", model.num_key_value_heads);
    file.write_int("/model", "head_dim", model.head_dim);
    file.write_int("/model", "hidden_size", model.hidden_size);
    file.write_double("/model", "rope_theta", model.rope_theta);
    file.write_double("/model", "softmax_scale", model.softmax_scale);
    file.write_int("/model", "sliding_window", model.sliding_window);
    file.write_double("/model", "attn_logit_softcapping", model.attn_logit_softcapping);
    for (int l = 0; l < model.num_layers; ++l) {
      const LayerInfo& layer = described(l);
      if (!layer.attends) continue;
      const std::string path = fmt::format("/layers/{}", l);
      file.create_group(path);
      FieldWriter writer(*this, path, common);
      visit_layer_fields(layer, info, writer);
    }
    for (const RotaryTable& table : info.rotary) {
      const std::string path = "/rotary/" + table.name;
      write_list(path, table.inverse_frequencies);
      file.write_double(path, "attention_scaling", table.attention_scaling);
      file.write_int(path, "rotated_dims", table.rotated_dims());
      file.write_strings(path, {{"layout", name_of(table.layout)}});
    }
  }

  // Writes what a layer says otherwise than the model.
  class FieldWriter {
   public:
    FieldWriter(State& state, std::string path, const LayerInfo& common) : state_(state), path_(std::move(path)) {
      Collector collector{.numbers = common_numbers_, .texts = common_texts_};
      visit_layer_fields(common, state.info, collector);
    }

    template <class Number>
    void number(const char* name, const Number& value, Bound) {
      if (common_numbers_.at(name) == static_cast<double>(value)) return;
      if constexpr (std::is_same_v<Number, int>) {
        state_.file.write_int(path_, name, value);
      } else {
        state_.file.write_double(path_, name, value);
      }
    }
    void text(const char* name, const std::string& value) {
      if (common_texts_.at(name) != value) state_.file.write_strings(path_, {{name, value}});
    }
    void list(const char* name, const std::vector<float>& values, Index) {
      if (!values.empty()) state_.write_list(fmt::format("{}/{}", path_, name), values);
    }
    void norm(const char* name, const RmsNorm& norm, Index elements) {
      list(name, norm.weight, elements);
      if (!norm.weight.empty()) state_.file.write_double(fmt::format("{}/{}", path_, name), "epsilon", norm.epsilon);
    }

   private:
    struct Collector {
      template <class Number>
      void number(const char* name, const Number& value, Bound) {
        numbers.emplace(name, static_cast<double>(value));
      }
      void text(const char* name, const std::string& value) { texts.emplace(name, value); }
      void list(const char*, const std::vector<float>&, Index) {}
      void norm(const char*, const RmsNorm&, Index) {}

      std::map<std::string, double>& numbers;
      std::map<std::string, std::string>& texts;
    };

    State& state_;
    std::string path_;
    std::map<std::string, double> common_numbers_;
    std::map<std::string, std::string> common_texts_;
  };

  void add_later(std::span<const std::int32_t> ids, std::span<const std::string> pieces) {
    if (static_cast<Index>(ids.size()) > most_later) {
      fail("/tokens/ids", fmt::format("{} tokens came later, but {} was the most", ids.size(), most_later));
    }
    for (const std::int32_t id : ids) {
      info.query_positions.push_back(info.num_tokens());
      info.token_ids.push_back(id);
    }
    info.token_pieces.insert(info.token_pieces.end(), pieces.begin(), pieces.end());
    if (const auto found = find_contradiction(info)) fail(found->path, found->reason);
  }

  void write_tokens() {
    write_list("/tokens/ids", info.token_ids);
    // The format's table has it on the dataset; readers exist that look for it on the group.
    file.write_int("/tokens/ids", "prompt_length", info.prompt_length);
    file.write_int("/tokens", "prompt_length", info.prompt_length);
    if (info.next_token) {
      file.write_int("/tokens", "next_id", info.next_token->id);
      file.write_double("/tokens", "next_logit", info.next_token->logit);
    }
    if (!info.token_pieces.empty()) {
      write_list("/tokens/pieces", info.token_pieces);
    }
    if (!info.turn_starts.empty()) write_list("/tokens/turn_starts", info.turn_starts);
    if (!info.turn_roles.empty()) file.write_string_list("/tokens/turn_starts", "roles", info.turn_roles);
    if (!info.answers.empty()) write_list("/answers", info.answers);
    write_list("/query_positions", info.query_positions);
    if (!info.spans.empty()) {
      std::vector<hdf5::LabelledRange> ranges;
      for (const Span& span : info.spans) ranges.push_back({span.start, span.end, span.label});
      file.write("/annotations/spans", std::span<const hdf5::LabelledRange>(ranges));
      if (std::ranges::any_of(info.spans, [](const Span& span) { return !span.group.empty(); })) {
        std::vector<std::string> groups;
        for (const Span& span : info.spans) groups.push_back(span.group);
        file.write("/annotations/spans/group", std::span<const std::string>(groups),
                   {static_cast<Index>(groups.size())});
      }
      for (const std::string& name : file.list("/annotations/spans")) {
        finish_dataset(file.dataset("/annotations/spans/" + name));
      }
    }
  }

  void write_residual_norms(int number, const std::vector<float>& norms) {
    const std::string path = fmt::format("/layers/{}/residual_norm", number);
    if (static_cast<int>(norms.size()) != info.num_queries()) {
      fail(path, fmt::format("{} lengths were given for {} queries", norms.size(), info.num_queries()));
    }
    write_list(path, norms);
  }

  template <class Value>
  void write_list(const std::string& path, const std::vector<Value>& values) {
    finish_dataset(file.write(path, std::span<const Value>(values), {static_cast<Index>(values.size())}));
  }

  void finish_dataset(const hdf5::Dataset& dataset) {
    file.write_string(dataset.path(), "xxh64", dataset.compute_xxh64());
  }

  Layer& layer(int number) {
    if (number < 0 || number >= info.model.num_layers) {
      fail("/layers", fmt::format("there is no layer {}; the trace has {}", number, info.model.num_layers));
    }
    if (!described(number).attends) fail(fmt::format("/layers/{}", number), "has no attention, and so no tensors");
    return layers[static_cast<std::size_t>(number)];
  }

  Tensor& head_tensor(int number, HeadTensor which) {
    std::unique_ptr<Tensor>& tensor = layer(number).head_tensors[static_cast<std::size_t>(which)];
    if (tensor != nullptr) return *tensor;
    if (!is_stored(number, which)) {
      fail(fmt::format("/layers/{}/{}", number, name_of(which)), "is in another tensor, and has no place of its own");
    }
    hdf5::Shape shape = shape_of(info, number, which);
    const Index known_rows = shape[1];
    shape[1] += most_later;
    const bool by_position = which == HeadTensor::keys || which == HeadTensor::values;
    describe(tensor, fmt::format("/layers/{}/{}", number, name_of(which)), shape, type,
             [this, number, shape, by_position](Index offset) {
               const Index row = offset / shape[2] % shape[1];
               return fmt::format("layer {}, head {}, position {}", number, offset / (shape[1] * shape[2]),
                                  by_position ? row : position_of_query(row));
             });
    if (most_later > 0) {
      tensor->chunk = chunk_of(*tensor, known_rows);
      tensor->written.resize(static_cast<std::size_t>(tensor->heads()));
    }
    return *tensor;
  }

  // Whether a layer has the tensor to itself.
  bool is_stored(int number, HeadTensor which) const {
    const LayerInfo& layer = described(number);
    if (which == HeadTensor::queries || which == HeadTensor::outputs) return true;
    return layer.cache_of < 0 && (which == HeadTensor::keys || layer.values_in_keys == 0);
  }

  // Large enough to be read at the disk's speed; small enough that the chunk at the end, which is stored whole, wastes
  // little of what is there in any case where the run ends early; and no more of them than all HDF5s find fast and than
  // leave each head pages of its own to be read, however far it goes.
  static hdf5::Shape chunk_of(const Tensor& tensor, Index known_rows) {
    constexpr Index kBytes = Index{1} << 20;
    constexpr Index kLeastRows = 16;
    constexpr Index kPieces = 16;
    constexpr Index kMostChunks = 128;
    const auto divided = [](Index rows, Index by) { return (rows + by - 1) / by; };
    const Index row_bytes = tensor.heads() * tensor.width() * static_cast<Index>(size_of(tensor.type));
    const Index wanted = std::max(divided(known_rows, kPieces), divided(tensor.shape[1], kMostChunks));
    const Index most = std::max(kLeastRows, std::min(wanted, kBytes / row_bytes));
    return {tensor.heads(), divided(tensor.shape[1], divided(tensor.shape[1], most)), tensor.width()};
  }

  Index position_of_query(Index row) const {
    const Index known = info.num_queries();
    return row < known ? info.query_positions[static_cast<std::size_t>(row)] : info.num_tokens() + row - known;
  }

  Tensor& output_projection(int number) {
    std::unique_ptr<Tensor>& tensor = layer(number).output_projection;
    if (tensor != nullptr) return *tensor;
    const LayerInfo& of = described(number);
    const Index dim = of.value_dim;
    const Index width = of.num_attention_heads * dim;
    return describe(tensor, fmt::format("/layers/{}/output_projection", number), {info.model.hidden_size, width}, type,
                    [number, width, dim](Index offset) {
                      return fmt::format("layer {}, head {}, row {}", number, offset % width / dim, offset / width);
                    });
  }

  Tensor& attention_mass(int number) {
    std::unique_ptr<Tensor>& tensor = layer(number).attention_mass;
    if (tensor != nullptr) return *tensor;
    const Index prompt = info.prompt_length;
    return describe(tensor, fmt::format("/layers/{}/attention_mass", number),
                    {described(number).num_attention_heads, prompt}, DType::float32, [number, prompt](Index offset) {
                      return fmt::format("layer {}, head {}, position {}", number, offset / prompt, offset % prompt);
                    });
  }

  Tensor& output_gate(int number) {
    std::unique_ptr<Tensor>& tensor = layer(number).output_gate;
    if (tensor != nullptr) return *tensor;
    const LayerInfo& of = described(number);
    const Index queries = info.num_queries();
    const Index dim = of.output_gate_dim;
    if (dim == 0) fail(fmt::format("/layers/{}/output_gate", number), "the layer is described as one that has none");
    hdf5::Shape shape = {of.num_attention_heads, queries};
    if (dim > 1) shape.push_back(dim);
    return describe(tensor, fmt::format("/layers/{}/output_gate", number), std::move(shape), type,
                    [this, number, queries, dim](Index offset) {
                      return fmt::format("layer {}, head {}, position {}", number, offset / (queries * dim),
                                         position_of_query(offset / dim % queries));
                    });
  }

  static Tensor& describe(std::unique_ptr<Tensor>& tensor, std::string path, hdf5::Shape shape, DType stored_type,
                          std::function<std::string(Index offset)> place) {
    tensor = std::make_unique<Tensor>();
    tensor->path = std::move(path);
    tensor->shape = std::move(shape);
    tensor->type = stored_type;
    tensor->place = std::move(place);
    tensor->written.resize(1);
    return *tensor;
  }

  // Writes all of a tensor of which nothing was written.
  void write_whole(Tensor& tensor, std::span<const float> data) {
    if (tensor.grows()) fail(tensor.path, "has no end yet that it could be written to; write its rows");
    if (tensor.written[0] > 0) fail(tensor.path, "was written already");
    if (static_cast<Index>(data.size()) != hdf5::elements(tensor.shape)) {
      fail(tensor.path,
           fmt::format("{} values do not have the shape ({})", data.size(), fmt::join(tensor.shape, ", ")));
    }
    write_rows(tensor, 0, data);
  }

  static std::size_t sequence_of(const Tensor& tensor, Index row) {
    return tensor.grows() ? static_cast<std::size_t>(row / tensor.sequence_rows()) : 0;
  }

  // The number of rows in `size` elements, which must be of the next rows in the sequence of row `first`.
  Index expect_rows(const Tensor& tensor, Index first, std::size_t size) const {
    const std::size_t sequence = sequence_of(tensor, first);
    const Index left = tensor.sequence_rows() - tensor.written[sequence];
    const Index next = static_cast<Index>(sequence) * tensor.sequence_rows() + tensor.written[sequence];
    if (first != next) {
      if (left == 0) fail(tensor.path, "was written already");
      fail(tensor.path,
           fmt::format("{} comes next, not {}", place_of_row(tensor, next),
                       first < 0 || first >= tensor.rows() ? fmt::format("row {} of {}", first, tensor.rows())
                                                           : place_of_row(tensor, first)));
    }
    const auto rows = static_cast<Index>(size) / tensor.width();
    if (size == 0 || rows * tensor.width() != static_cast<Index>(size) || rows > left) {
      fail(tensor.path, fmt::format("{} values are not rows of {} that the shape ({}) has left", size, tensor.width(),
                                    fmt::join(tensor.shape, ", ")));
    }
    return rows;
  }

  std::string place_of_row(const Tensor& tensor, Index row) const { return tensor.place(row * tensor.width()); }

  // Writes the rows from `first` on, which must be the next ones, a slice at a time.
  void write_rows(Tensor& tensor, Index first, std::span<const float> data) {
    const Index rows = expect_rows(tensor, first, data.size());
    const Index slice = std::max<Index>(kSliceElements / tensor.width(), 1);
    std::vector<std::byte> bytes;
    for (Index done = 0; done < rows; done += slice) {
      const Index count = std::min(slice, rows - done);
      const auto part = data.subspan(static_cast<std::size_t>(done * tensor.width()),
                                     static_cast<std::size_t>(count * tensor.width()));
      const Index offset = (first + done) * tensor.width();
      convert(tensor, part, bytes, [&](std::size_t i) { return tensor.place(offset + static_cast<Index>(i)); });
      append(tensor, first + done, count, bytes);
    }
  }

  // The same for rows that are in the stored type already.
  void write_rows(Tensor& tensor, Index first, std::span<const std::byte> stored) {
    const Index rows = expect_rows(tensor, first, stored.size() / size_of(tensor.type));
    if (const auto found = find_non_finite(tensor.type, stored)) {
      fail(tensor.path,
           fmt::format("NaN or infinity at {}", tensor.place(first * tensor.width() + static_cast<Index>(*found))));
    }
    append(tensor, first, rows, stored);
  }

  // One row of each head, the next of all of them.
  void write_next(Tensor& tensor, std::span<const float> data) {
    if (!tensor.grows()) fail(tensor.path, "is not of a run that may go on; write its rows head by head");
    const Index row = tensor.written.front();
    for (const Index other : tensor.written) {
      if (other != row) fail(tensor.path, fmt::format("heads have {} and {} rows; none comes next in all", row, other));
    }
    if (row == tensor.shape[1]) fail(tensor.path, "was written already");
    if (static_cast<Index>(data.size()) != tensor.heads() * tensor.width()) {
      fail(tensor.path, fmt::format("{} values are not one row of {} for each of {} heads", data.size(), tensor.width(),
                                    tensor.heads()));
    }
    std::vector<std::byte> bytes;
    convert(tensor, data, bytes, [&](std::size_t i) {
      const Index head = static_cast<Index>(i) / tensor.width();
      return place_of_row(tensor, head * tensor.shape[1] + row);
    });
    const std::size_t row_bytes = bytes.size() / static_cast<std::size_t>(tensor.heads());
    tensor.waiting.resize(bytes.size() * static_cast<std::size_t>(kWaitingRows));
    for (Index head = 0; head < tensor.heads(); ++head) {
      const auto from = bytes.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(head) * row_bytes);
      const auto place = static_cast<std::size_t>(head * kWaitingRows + tensor.waiting_rows) * row_bytes;
      std::copy_n(from, row_bytes, tensor.waiting.begin() + static_cast<std::ptrdiff_t>(place));
    }
    ++tensor.waiting_rows;
    for (Index& written : tensor.written) ++written;
    if (tensor.waiting_rows == kWaitingRows) write_waiting(tensor);
  }

  void write_waiting(Tensor& tensor) {
    const Index rows = std::exchange(tensor.waiting_rows, 0);
    if (rows == 0) return;
    const std::size_t head_bytes = tensor.waiting.size() / static_cast<std::size_t>(tensor.heads());
    const std::size_t used = head_bytes / static_cast<std::size_t>(kWaitingRows) * static_cast<std::size_t>(rows);
    for (std::size_t head = 1; rows < kWaitingRows && head < static_cast<std::size_t>(tensor.heads()); ++head) {
      std::copy_n(tensor.waiting.begin() + static_cast<std::ptrdiff_t>(head * head_bytes), used,
                  tensor.waiting.begin() + static_cast<std::ptrdiff_t>(head * used));
    }
    open(tensor).write_raw({0, tensor.written.front() - rows, 0}, {tensor.heads(), rows, tensor.width()},
                           tensor.waiting.data());
  }

  // Brings `values`, whose i-th stands at `place(i)`, to the stored type.
  template <class Place>
  void convert(const Tensor& tensor, std::span<const float> values, std::vector<std::byte>& bytes,
               const Place& place) const {
    if (const auto found = find_non_finite(values)) {
      fail(tensor.path, fmt::format("{} at {}; the run itself produced it",
                                    std::isnan(values[*found]) ? "NaN" : "infinity", place(*found)));
    }
    bytes.resize(values.size() * size_of(tensor.type));
    from_float32(tensor.type, values, bytes.data());
    if (const auto found = find_non_finite(tensor.type, bytes)) {
      const char* remedy = tensor.type == DType::float16 ? "bfloat16 or float32" : "float32";
      fail(tensor.path, fmt::format("{} at {} is too large for {}; store the trace as {}", values[*found],
                                    place(*found), name_of(tensor.type), remedy));
    }
  }

  hdf5::Dataset& open(Tensor& tensor) {
    if (!tensor.dataset) {
      tensor.dataset = file.create_dataset(tensor.path, tensor.type, tensor.shape, tensor.chunk);
      tensor.digest.reset(XXH64_createState());
      XXH64_reset(tensor.digest.get(), 0);
    }
    return *tensor.dataset;
  }

  // `rows` checked rows from `first` on, in as few boxes as they make: whole heads, or rows of one.
  void append(Tensor& tensor, Index first, Index rows, std::span<const std::byte> stored) {
    write_waiting(tensor);
    hdf5::Dataset& dataset = open(tensor);
    // Of heads that grow side by side the bytes do not come in the order that the digest wants.
    if (!tensor.grows()) XXH64_update(tensor.digest.get(), stored.data(), stored.size());
    Index& written = tensor.written[sequence_of(tensor, first)];
    written += rows;
    const std::size_t row_bytes = stored.size() / static_cast<std::size_t>(rows);
    const bool has_heads = tensor.shape.size() == 3;
    const Index per_head = has_heads ? tensor.shape[1] : 1;
    while (rows > 0) {
      const Index head = first / per_head;
      const Index row = first % per_head;
      const Index heads = row == 0 ? rows / per_head : 0;
      const Index count = heads > 0 ? heads * per_head : std::min(rows, per_head - row);
      if (!has_heads) {
        dataset.write_raw({head, 0}, {heads, tensor.width()}, stored.data());
      } else if (heads > 0) {
        dataset.write_raw({head, 0, 0}, {heads, per_head, tensor.width()}, stored.data());
      } else {
        dataset.write_raw({head, row, 0}, {1, count, tensor.width()}, stored.data());
      }
      first += count;
      rows -= count;
      stored = stored.subspan(static_cast<std::size_t>(count) * row_bytes);
    }
    if (tensor.grows() || written < tensor.rows()) return;
    file.write_string(tensor.path, "xxh64", fmt::format("{:016x}", XXH64_digest(tensor.digest.get())));
    tensor.digest.reset();
    tensor.dataset.reset();
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

  void require_no_gap(const Tensor& tensor) const {
    const Index written = tensor.written.front();
    if (written == tensor.rows()) return;
    fail(tensor.path, fmt::format("was not written to its end; {} comes next", place_of_row(tensor, written)));
  }

  // Checks that all of a tensor is there, and ends it where the run ended.
  void finish_tensor(Tensor& tensor, const hdf5::Shape& shape) {
    if (std::ranges::all_of(tensor.written, [](Index rows) { return rows == 0; })) {
      fail(tensor.path, "was not written, but every layer needs it");
    }
    if (!tensor.grows()) return require_no_gap(tensor);
    for (std::size_t head = 0; head < tensor.written.size(); ++head) {
      if (tensor.written[head] == shape[1]) continue;
      fail(tensor.path, fmt::format("head {} has {} rows, but the run has {}", head, tensor.written[head], shape[1]));
    }
    write_waiting(tensor);
    if (shape != tensor.shape) tensor.dataset->resize(shape);
    finish_dataset(*tensor.dataset);
    tensor.dataset.reset();
  }

  static constexpr Index kWaitingRows = 16;

  // Elements that are converted at a time: enough for a large write, little beside a head.
  static constexpr Index kSliceElements = Index{1} << 20;

  TraceInfo info;
  DType type;
  Index most_later;   // tokens that may follow those of `info`
  OutputFile output;  // before `file`, so that the file is closed before its name goes away
  hdf5::File file;
  std::vector<Layer> layers;
};

TraceWriter::TraceWriter(const std::filesystem::path& path, TraceInfo info, DType type, Index most_later)
    : state_(std::make_unique<State>(path, std::move(info), type, most_later)) {}
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

void TraceWriter::write_next(int layer, HeadTensor tensor, std::span<const float> rows) {
  state_->write_next(state_->head_tensor(layer, tensor), rows);
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

void TraceWriter::write_output_gate(int layer, std::span<const float> factors) {
  state_->write_whole(state_->output_gate(layer), factors);
}

void TraceWriter::write_residual_norms(int layer, std::span<const float> norms) {
  std::vector<float>& all = state_->layer(layer).residual_norms;
  all.insert(all.end(), norms.begin(), norms.end());
}

void TraceWriter::write_turn(std::int32_t start, const std::string& role) {
  TraceInfo& info = state_->info;
  if (!info.turn_roles.empty()) info.turn_roles.push_back(role);
  info.turn_starts.push_back(start);
}

void TraceWriter::write_next_token(const NextToken& next) { state_->info.next_token = next; }

void TraceWriter::finish(std::span<const std::int32_t> later_ids, std::span<const std::string> later_pieces) {
  state_->add_later(later_ids, later_pieces);
  for (int l = 0; l < state_->info.model.num_layers; ++l) {
    if (!state_->described(l).attends) continue;
    for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
      if (!state_->is_stored(l, tensor)) continue;
      state_->finish_tensor(state_->head_tensor(l, tensor), shape_of(state_->info, l, tensor));
    }
    const State::Layer& layer = state_->layer(l);
    if (!layer.residual_norms.empty()) state_->write_residual_norms(l, layer.residual_norms);
    if (state_->described(l).output_gate_dim > 0) state_->require_no_gap(state_->output_gate(l));
    if (layer.output_projection != nullptr) state_->require_no_gap(*layer.output_projection);
    if (layer.attention_mass != nullptr) state_->require_no_gap(*layer.attention_mass);
  }
  state_->write_tokens();
  // Last, so that a file in which anything is missing cannot carry it.
  state_->file.write_int("/", "complete", 1);
  state_->file.close();
  state_->output.commit();
}

}  // namespace kvreplay
