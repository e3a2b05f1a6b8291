#include "trace/reader.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "base/error.h"
#include "base/printable.h"
#include "base/work.h"
#include "hdf5/hdf5.h"
#include "trace/check.h"
#include "trace/file_kind.h"
#include "trace/layer_fields.h"

namespace kvreplay {

namespace {

// Tensors are read and converted in pieces of this many bytes: few calls, and still in a core's own cache when
// converted.
constexpr Index kPieceBytes = Index{128} << 10;

// Memory for one piece as it is stored, kept by each thread.
std::byte* staging(std::size_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

}  // namespace

struct TraceReader::State {
  struct Layer {
    std::array<std::optional<hdf5::Dataset>, 4> head_tensors;  // in the order of HeadTensor; keys and values may be
                                                               // another layer's, and values be in the keys
    std::optional<hdf5::Dataset> output_projection;
    std::optional<hdf5::Dataset> attention_mass;
    std::optional<hdf5::Dataset> output_gate;
    std::vector<hdf5::Dataset> lists;
  };

  // Reads what a group says of a layer into what holds where it says nothing.
  struct FieldReader {
    template <class Number>
    void number(const char* name, Number& member, Bound) const {
      if (!state.file.has_attribute(path, name)) return;
      if constexpr (std::is_same_v<Number, int>) {
        member = state.read_count(path, name);
      } else {
        member = state.file.read_double(path, name);
      }
    }
    void text(const char* name, std::string& member) const {
      if (state.file.has_attribute(path, name)) member = state.file.read_string(path, name);
    }
    void list(const char* name, std::vector<float>& member, Index elements) {
      const std::string place = fmt::format("{}/{}", path, name);
      if (lists == nullptr || !state.file.exists(place)) return;
      hdf5::Dataset dataset = state.open_list(place);
      // Compared before anything is allocated.
      if (dataset.shape()[0] != elements) {
        state.fail(place, fmt::format("has {} elements instead of {}", dataset.shape()[0], elements));
      }
      if (!dataset.float_type()) state.fail(place, "is not of a type that traces have: float32, little-endian");
      member = state.file.read_floats(place);
      lists->push_back(std::move(dataset));
    }
    void norm(const char* name, RmsNorm& member, Index elements) {
      list(name, member.weight, elements);
      if (!member.weight.empty()) member.epsilon = state.file.read_double(fmt::format("{}/{}", path, name), "epsilon");
    }

    const State& state;
    std::string path;
    std::vector<hdf5::Dataset>* lists;  // those that were opened; null: the group can have none
  };

  explicit State(const std::filesystem::path& path) : file(hdf5::File::open(path)) {
    check_format();
    read_model();
    read_tokens();
    read_spans();
    info.query_positions = read_positions("/query_positions");
    read_rotary();
    read_layers();
    if (const auto found = find_contradiction(info)) fail(found->path, found->reason);
    open_layers();
  }

  [[noreturn]] void fail(std::string_view where, std::string_view reason) const {
    throw Error(fmt::format("{}: {}: {}", file.path().string(), where, reason));
  }

  void check_format() {
    if (!file.has_attribute("/", "format") || file.read_string("/", "format") != "kvtrace") {
      fail("/", fmt::format("is not a kvtrace file, but {}", kind_of(file)));
    }
    version = file.read_int("/", "format_version");
    if (version > kTraceFormatVersion) {
      fail("/", fmt::format("is a kvtrace of version {}, and this kvreplay reads up to version {}; update kvreplay",
                            version, kTraceFormatVersion));
    }
    if (version < 1) fail("/", fmt::format("attribute 'format_version' is {}, which does not exist", version));
    if (!file.has_attribute("/", "complete") || file.read_int("/", "complete") != 1) {
      fail("/", "is an unfinished capture: its attribute 'complete' is not 1; capture it again");
    }
    file.check_strings("/");
    info.created_by = optional_string("/", "created_by");
    info.created_at = optional_string("/", "created_at");
    info.source = optional_string("/", "source");
  }

  std::string optional_string(const std::string& path, const std::string& name) const {
    return file.has_attribute(path, name) ? file.read_string(path, name) : std::string();
  }

  int read_count(const std::string& path, const std::string& name) const {
    const std::int64_t value = file.read_int(path, name);
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
      fail(path, fmt::format("attribute '{}' is out of range: {}", name, value));
    }
    return static_cast<int>(value);
  }

  void read_model() {
    if (!file.exists("/model")) fail("/model", "does not exist");
    file.check_strings("/model");
    ModelInfo& model = info.model;
    model.name = optional_string("/model", "name");
    model.architecture = optional_string("/model", "architecture");
    model.num_layers = read_count("/model", "num_layers");
    model.num_attention_heads = read_count("/model", "num_attention_heads");
    model.num_key_value_heads = read_count("/model", "num_key_value_heads");
    model.head_dim = read_count("/model", "head_dim");
    model.hidden_size = read_count("/model", "hidden_size");
    model.softmax_scale = file.read_double("/model", "softmax_scale");
    model.weight_shapes_digest = optional_string("/model", "weight_shapes_digest");
    if (file.has_attribute("/model", "rope_theta")) model.rope_theta = file.read_double("/model", "rope_theta");
    if (file.has_attribute("/model", "sliding_window")) model.sliding_window = read_count("/model", "sliding_window");
    if (file.has_attribute("/model", "attn_logit_softcapping")) {
      model.attn_logit_softcapping = file.read_double("/model", "attn_logit_softcapping");
    }
  }

  // What is read when the file is opened is small, so its digest is compared each time.
  void check_digest(const hdf5::Dataset& dataset) const {
    const std::string expected = optional_string(dataset.path(), "xxh64");
    if (!expected.empty() && expected != dataset.compute_xxh64()) {
      fail(dataset.path(), "does not match its digest; the file is damaged, copy or capture it again");
    }
  }

  hdf5::Dataset open_list(const std::string& path) const {
    hdf5::Dataset dataset = file.dataset(path);
    if (dataset.shape().size() != 1) fail(path, fmt::format("has {} axes instead of one", dataset.shape().size()));
    if (dataset.shape()[0] > std::numeric_limits<int>::max()) {
      fail(path, fmt::format("has {} elements, more than any context", dataset.shape()[0]));
    }
    check_digest(dataset);
    return dataset;
  }

  std::vector<std::int32_t> read_positions(const std::string& path) const {
    static_cast<void>(open_list(path));
    return file.read_int32s(path);
  }

  void read_tokens() {
    info.token_ids = read_positions("/tokens/ids");
    if (info.token_ids.empty()) fail("/tokens/ids", "is empty");
    // The format's table has the attribute on the dataset; captures exist that have it on the group.
    const bool on_dataset = file.has_attribute("/tokens/ids", "prompt_length");
    const bool on_group = file.has_attribute("/tokens", "prompt_length");
    if (!on_dataset && !on_group) fail("/tokens/ids", "has no attribute 'prompt_length'");
    info.prompt_length = read_count(on_dataset ? "/tokens/ids" : "/tokens", "prompt_length");
    if (on_dataset && on_group && read_count("/tokens", "prompt_length") != info.prompt_length) {
      fail("/tokens", "attribute 'prompt_length' differs from that of /tokens/ids");
    }
    if (file.has_attribute("/tokens", "next_id")) {
      info.next_token = {.id = read_count("/tokens", "next_id"), .logit = file.read_double("/tokens", "next_logit")};
      if (!std::isfinite(info.next_token->logit)) fail("/tokens", "attribute 'next_logit' is not a number");
    }
    if (file.exists("/tokens/pieces")) {
      const hdf5::Dataset pieces = open_list("/tokens/pieces");
      // Compared before anything is allocated for the strings.
      if (pieces.shape()[0] != info.num_tokens()) {
        fail("/tokens/pieces", fmt::format("has {} pieces for {} tokens", pieces.shape()[0], info.num_tokens()));
      }
      info.token_pieces = file.read_strings("/tokens/pieces");
    }
    if (file.exists("/tokens/turn_starts")) {
      info.turn_starts = read_positions("/tokens/turn_starts");
      if (file.has_attribute("/tokens/turn_starts", "roles")) {
        file.check_strings("/tokens/turn_starts");
        info.turn_roles = file.read_string_list("/tokens/turn_starts", "roles");
      }
    }
    if (file.exists("/answers")) {
      static_cast<void>(open_list("/answers"));
      info.answers = file.read_strings("/answers");
    }
  }

  void read_spans() {
    if (!file.exists("/annotations/spans")) return;
    if (file.is_group("/annotations/spans")) {
      for (const char* name : {"start", "end", "label"}) {
        static_cast<void>(open_list(fmt::format("/annotations/spans/{}", name)));
      }
    } else {
      static_cast<void>(open_list("/annotations/spans"));  // as version 1 has them
    }
    const std::int64_t tokens = info.num_tokens();
    for (const hdf5::LabelledRange& range : file.read_labelled_ranges("/annotations/spans")) {
      if (range.start < 0 || range.end > tokens || range.start >= range.end) {
        fail("/annotations/spans",
             fmt::format("span {} ('{}') is [{}, {}), not a range of the {} tokens", info.spans.size(),
                         printable(range.label), range.start, range.end, tokens));
      }
      info.spans.push_back({static_cast<int>(range.start), static_cast<int>(range.end), range.label});
    }
    if (!file.is_group("/annotations/spans") || !file.exists("/annotations/spans/group")) return;
    const hdf5::Dataset groups = open_list("/annotations/spans/group");
    if (groups.shape()[0] != static_cast<Index>(info.spans.size())) {
      fail("/annotations/spans/group",
           fmt::format("has {} elements for {} spans", groups.shape()[0], info.spans.size()));
    }
    std::vector<std::string> names = groups.read_strings();
    for (std::size_t i = 0; i < names.size(); ++i) info.spans[i].group = std::move(names[i]);
  }

  void read_rotary() {
    if (!file.exists("/rotary")) return;
    for (const std::string& name : file.list("/rotary")) {
      const std::string path = "/rotary/" + name;
      static_cast<void>(open_list(path));
      RotaryTable table{.name = name, .inverse_frequencies = file.read_floats(path)};
      file.check_strings(path);
      table.attention_scaling = file.read_double(path, "attention_scaling");
      if (const int rotated = read_count(path, "rotated_dims"); rotated != table.rotated_dims()) {
        fail(path, fmt::format("attribute 'rotated_dims' is {}, but there are {} frequencies", rotated,
                               table.inverse_frequencies.size()));
      }
      const std::string layout = file.read_string(path, "layout");
      if (layout != "half" && layout != "interleaved") {
        fail(path, fmt::format("attribute 'layout' is '{}', but must be 'half' or 'interleaved'", printable(layout)));
      }
      if (layout == "interleaved") table.layout = RotaryTable::Layout::interleaved;
      info.rotary.push_back(std::move(table));
    }
  }

  void read_layers() {
    constexpr int kMostLayers = 1 << 14;
    if (info.model.num_layers > kMostLayers) {
      fail("/model", fmt::format("attribute 'num_layers' is {}, more than any model has", info.model.num_layers));
    }
    LayerInfo common = info.model.layer();
    FieldReader model{*this, "/model", nullptr};
    visit_layer_fields(common, info, model);
    layers.resize(static_cast<std::size_t>(std::max(info.model.num_layers, 0)));
    for (int l = 0; l < info.model.num_layers; ++l) {
      const std::string path = fmt::format("/layers/{}", l);
      LayerInfo& layer = info.layers.emplace_back(common);
      if (!file.exists(path)) {
        if (version < 2) fail(path, fmt::format("is missing, although /model counts {} layers", info.model.num_layers));
        layer.attends = false;
        layer.rotary.clear();
        continue;
      }
      if (!file.is_group(path)) fail(path, "is not a group");
      file.check_strings(path);
      FieldReader own{*this, path, &layers[static_cast<std::size_t>(l)].lists};
      visit_layer_fields(layer, info, own);
      if (layer.values_in_keys > 0 && !file.has_attribute(path, "value_dim")) layer.value_dim = layer.values_in_keys;
    }
    for (const std::string& name : file.exists("/layers") ? file.list("/layers") : std::vector<std::string>()) {
      int number = 0;
      const auto [end, problem] = std::from_chars(name.data(), name.data() + name.size(), number);
      const bool is_number = end == name.data() + name.size() && problem == std::errc();
      if (is_number && number >= info.model.num_layers) {
        fail("/layers/" + name, fmt::format("exists, although /model counts {} layers", info.model.num_layers));
      }
    }
  }

  hdf5::Dataset open_tensor(const std::string& path, const hdf5::Shape& shape) const {
    hdf5::Dataset dataset = file.dataset(path);
    if (dataset.shape() != shape) {
      fail(path, fmt::format("has the shape ({}), but /model and /tokens make it ({})",
                             fmt::join(dataset.shape(), ", "), fmt::join(shape, ", ")));
    }
    if (!dataset.float_type()) {
      fail(path, "is not of a type that traces have: float32, float16 or bfloat16, little-endian");
    }
    return dataset;
  }

  // Whose keys and values a layer reads.
  int cache_owner(int number) const {
    const LayerInfo& layer = info.layers[static_cast<std::size_t>(number)];
    return layer.cache_of >= 0 ? layer.cache_of : number;
  }

  void open_layers() {
    const ModelInfo& model = info.model;
    for (int l = 0; l < model.num_layers; ++l) {
      const LayerInfo& described = info.layers[static_cast<std::size_t>(l)];
      if (!described.attends) continue;
      const Index heads = described.num_attention_heads;
      const std::string group = fmt::format("/layers/{}/", l);
      Layer& layer = layers[static_cast<std::size_t>(l)];
      for (const HeadTensor tensor : {HeadTensor::keys, HeadTensor::values, HeadTensor::queries, HeadTensor::outputs}) {
        const std::string path = group + name_of(tensor);
        const bool in_cache = tensor == HeadTensor::keys || tensor == HeadTensor::values;
        if (in_cache && described.cache_of >= 0) {
          if (file.exists(path))
            fail(path, fmt::format("exists, although the layer reads layer {}'s", described.cache_of));
        } else if (tensor == HeadTensor::values && described.values_in_keys > 0) {
          if (file.exists(path)) fail(path, "exists, although values are the first columns of keys");
        } else {
          layer.head_tensors[static_cast<std::size_t>(tensor)] = open_tensor(path, shape_of(info, l, tensor));
        }
      }
      if (file.exists(group + "output_projection")) {
        layer.output_projection =
            open_tensor(group + "output_projection", {model.hidden_size, heads * described.value_dim});
      }
      if (file.exists(group + "attention_mass")) {
        // Captures exist with a column for every token; prompt queries give those after the prompt nothing.
        const std::string path = group + "attention_mass";
        const bool all_tokens = file.dataset(path).shape() == hdf5::Shape{heads, info.num_tokens()};
        layer.attention_mass = open_tensor(path, {heads, all_tokens ? info.num_tokens() : info.prompt_length});
      }
      if (file.exists(group + "output_gate")) {
        const std::string path = group + "output_gate";
        const bool per_head = file.dataset(path).shape().size() == 2;
        layer.output_gate = open_tensor(path, per_head ? hdf5::Shape{heads, info.num_queries()}
                                                       : hdf5::Shape{heads, info.num_queries(), described.value_dim});
        info.layers[static_cast<std::size_t>(l)].output_gate_dim = per_head ? 1 : described.value_dim;
      }
    }
  }

  const Layer& layer(int number) const {
    if (number < 0 || number >= info.model.num_layers) {
      fail("/layers", fmt::format("there is no layer {}; the trace has {}", number, info.model.num_layers));
    }
    if (!info.layers[static_cast<std::size_t>(number)].attends) {
      fail(fmt::format("/layers/{}", number), "is not there: the layer has no attention");
    }
    return layers[static_cast<std::size_t>(number)];
  }

  // Reads a box of `dataset` as float32 into `out`, row-major, and refuses NaN and infinity. `place` names where an
  // element stands, given its offset in `out`.
  template <class Place>
  void read_box(const hdf5::Dataset& dataset, hdf5::Shape first, hdf5::Shape count, float* out, Place place) const {
    const auto axis = static_cast<std::size_t>(
        std::find_if(count.begin(), count.end() - 1, [](Index extent) { return extent != 1; }) - count.begin());
    const Index rows = count[axis];
    const Index begin = first[axis];
    const Index width = hdf5::elements({count.begin() + static_cast<std::ptrdiff_t>(axis) + 1, count.end()});
    const DType type = *dataset.float_type();
    const Index row_bytes = width * static_cast<Index>(size_of(type));
    // Of filtered data HDF5 might unpack a chunk for every piece anew.
    const Index piece = dataset.reads_directly() ? std::max<Index>(kPieceBytes / row_bytes, 1) : rows;
    std::unique_ptr<std::byte[]> whole;
    for (Index done = 0; done < rows; done += piece) {
      first[axis] = begin + done;
      count[axis] = std::min(piece, rows - done);
      const std::span<float> values(out + done * width, static_cast<std::size_t>(count[axis] * width));
      bool finite = false;
      if (type == DType::float32) {
        dataset.read_raw(first, count, reinterpret_cast<std::byte*>(values.data()));
        finite = all_finite(values);
      } else {
        const auto bytes = static_cast<std::size_t>(count[axis] * row_bytes);
        if (!dataset.reads_directly()) whole = std::make_unique_for_overwrite<std::byte[]>(bytes);
        std::byte* const stored = whole ? whole.get() : staging(bytes);
        dataset.read_raw(first, count, stored);
        finite = to_float32_checked(type, stored, values);
      }
      if (finite) continue;
      const auto found = static_cast<Index>(find_non_finite(values).value());
      const float value = values[static_cast<std::size_t>(found)];
      fail(dataset.path(), fmt::format("{} at {}; capture it again, in bfloat16 or float32 if values overflow float16",
                                       value != value ? "NaN" : "infinity", place(done * width + found)));
    }
  }

  const hdf5::Dataset& head_tensor(int number, HeadTensor tensor) const {
    static_cast<void>(layer(number));
    const bool in_cache = tensor == HeadTensor::keys || tensor == HeadTensor::values;
    const Layer& owner = layer(in_cache ? cache_owner(number) : number);
    const auto& own = owner.head_tensors[static_cast<std::size_t>(tensor)];
    return own ? *own : *owner.head_tensors[static_cast<std::size_t>(HeadTensor::keys)];
  }

  // Elements of a row, which may be less than the dataset has where values are in the keys.
  Index width_of(int number, HeadTensor tensor) const {
    const LayerInfo& layer = info.layers[static_cast<std::size_t>(number)];
    const bool of_keys = tensor == HeadTensor::keys || tensor == HeadTensor::queries;
    return of_keys ? layer.key_dim : layer.value_dim;
  }

  void check_query_head(const hdf5::Dataset& dataset, int number, int head) const {
    if (head >= 0 && head < info.layers[static_cast<std::size_t>(number)].num_attention_heads) return;
    fail(dataset.path(), fmt::format("there is no query head {}", head));
  }

  // Refuses rows that a head's tensor does not have.
  void check_rows(const hdf5::Dataset& dataset, int head, Index first, Index count) const {
    const hdf5::Shape& shape = dataset.shape();
    if (head < 0 || head >= shape[0] || first < 0 || count < 0 || first > shape[1] || count > shape[1] - first) {
      fail(dataset.path(), fmt::format("head {}, rows {} to {} are outside its {} heads and {} rows", head, first,
                                       first + count, shape[0], shape[1]));
    }
  }

  const hdf5::Dataset& output_projection(int number) const {
    const auto& dataset = layer(number).output_projection;
    if (!dataset) fail(fmt::format("/layers/{}", number), "has no output_projection; capture the trace with it");
    return *dataset;
  }

  hdf5::File file;
  std::int64_t version = 0;
  TraceInfo info;
  std::vector<Layer> layers;
};

TraceReader::TraceReader(const std::filesystem::path& path) : state_(std::make_unique<State>(path)) {}
TraceReader::~TraceReader() = default;
TraceReader::TraceReader(TraceReader&&) noexcept = default;
TraceReader& TraceReader::operator=(TraceReader&&) noexcept = default;

const std::filesystem::path& TraceReader::path() const { return state_->file.path(); }
const TraceInfo& TraceReader::info() const { return state_->info; }

Matrix TraceReader::read(int layer, HeadTensor tensor, int head, Index first, Index count) const {
  const hdf5::Dataset& dataset = state_->head_tensor(layer, tensor);
  state_->check_rows(dataset, head, first, count);
  Matrix rows(count, state_->width_of(layer, tensor));
  read_rows(layer, tensor, head, first, count, rows.data());
  return rows;
}

void TraceReader::read_rows(int layer, HeadTensor tensor, int head, Index first, Index count, float* out) const {
  const hdf5::Dataset& dataset = state_->head_tensor(layer, tensor);
  state_->check_rows(dataset, head, first, count);
  const Index width = state_->width_of(layer, tensor);
  count_bytes(count * width * static_cast<Index>(size_of(*dataset.float_type())));
  state_->read_box(dataset, {head, first, 0}, {1, count, width}, out, [&](Index offset) {
    const Index row = first + offset / width;
    const bool by_position = tensor == HeadTensor::keys || tensor == HeadTensor::values;
    const Index position = by_position ? row : state_->info.query_positions[static_cast<std::size_t>(row)];
    return fmt::format("layer {}, head {}, position {}", layer, head, position);
  });
}

void TraceReader::prefetch(int layer, HeadTensor tensor, int head) const {
  const hdf5::Dataset& dataset = state_->head_tensor(layer, tensor);
  const hdf5::Shape& shape = dataset.shape();
  state_->check_rows(dataset, head, 0, shape[1]);
  dataset.prefetch({head, 0, 0}, {1, shape[1], state_->width_of(layer, tensor)});
}

bool TraceReader::reads_directly(int layer, HeadTensor tensor) const {
  return state_->head_tensor(layer, tensor).reads_directly();
}

bool TraceReader::reads_projection_directly(int layer) const {
  return state_->output_projection(layer).reads_directly();
}

DType TraceReader::element_type() const {
  const auto first = std::ranges::find(state_->info.layers, true, &LayerInfo::attends);
  return *state_->head_tensor(static_cast<int>(first - state_->info.layers.begin()), HeadTensor::keys).float_type();
}

const RotaryTable* TraceReader::rotary(int layer) const {
  static_cast<void>(state_->layer(layer));
  return state_->info.rotary_of(state_->info.layers[static_cast<std::size_t>(layer)]);
}

bool TraceReader::has_output_projection(int layer) const { return state_->layer(layer).output_projection.has_value(); }

Matrix TraceReader::read_output_projection(int layer, int head) const {
  const hdf5::Dataset& dataset = state_->output_projection(layer);
  state_->check_query_head(dataset, layer, head);
  const Index rows = dataset.shape()[0];
  const Index width = state_->width_of(layer, HeadTensor::outputs);
  Matrix weight(rows, width);
  state_->read_box(dataset, {0, head * width}, {rows, width}, weight.data(),
                   [&](Index offset) { return fmt::format("layer {}, head {}, row {}", layer, head, offset / width); });
  return weight;
}

void TraceReader::read_projection_rows(int layer, Index first_row, Index count, float* out) const {
  const hdf5::Dataset& dataset = state_->output_projection(layer);
  const Index rows = dataset.shape()[0];
  const Index width = dataset.shape()[1];
  if (first_row < 0 || count < 0 || first_row > rows || count > rows - first_row) {
    state_->fail(dataset.path(),
                 fmt::format("rows {} to {} are outside its {} rows", first_row, first_row + count, rows));
  }
  count_bytes(count * width * static_cast<Index>(size_of(*dataset.float_type())));
  state_->read_box(dataset, {first_row, 0}, {count, width}, out, [&](Index offset) {
    return fmt::format("layer {}, head {}, row {}", layer,
                       offset % width / state_->width_of(layer, HeadTensor::outputs), first_row + offset / width);
  });
}

std::string TraceReader::projection_digest(int layer) const {
  const hdf5::Dataset& dataset = state_->output_projection(layer);
  const std::string stored = state_->optional_string(dataset.path(), "xxh64");
  return fmt::format("{} {} {}", name_of(*dataset.float_type()), fmt::join(dataset.shape(), ","),
                     stored.empty() ? dataset.compute_xxh64() : stored);
}

bool TraceReader::has_attention_mass(int layer) const { return state_->layer(layer).attention_mass.has_value(); }

std::vector<float> TraceReader::read_attention_mass(int layer, int head) const {
  const auto& dataset = state_->layer(layer).attention_mass;
  if (!dataset) state_->fail(fmt::format("/layers/{}", layer), "has no attention_mass; capture the trace with it");
  state_->check_query_head(*dataset, layer, head);
  const auto prompt = static_cast<std::size_t>(state_->info.prompt_length);
  const Index columns = dataset->shape()[1];
  std::vector<float> mass(static_cast<std::size_t>(columns));
  state_->read_box(*dataset, {head, 0}, {1, columns}, mass.data(),
                   [&](Index offset) { return fmt::format("layer {}, head {}, position {}", layer, head, offset); });
  const auto after = std::find_if(mass.begin() + static_cast<std::ptrdiff_t>(prompt), mass.end(),
                                  [](float received) { return received != 0; });
  if (after != mass.end()) {
    state_->fail(
        dataset->path(),
        fmt::format("position {} is after the prompt, but received attention; only prompt queries may be counted",
                    after - mass.begin()));
  }
  mass.resize(prompt);
  return mass;
}

Matrix TraceReader::read_output_gate(int layer, int head) const {
  const auto& dataset = state_->layer(layer).output_gate;
  if (!dataset) state_->fail(fmt::format("/layers/{}", layer), "has no output_gate");
  state_->check_query_head(*dataset, layer, head);
  const Index queries = dataset->shape()[1];
  const Index width = state_->info.layers[static_cast<std::size_t>(layer)].output_gate_dim;
  Matrix factors(queries, width);
  const bool per_head = dataset->shape().size() == 2;
  state_->read_box(
      *dataset, per_head ? hdf5::Shape{head, 0} : hdf5::Shape{head, 0, 0},
      per_head ? hdf5::Shape{1, queries} : hdf5::Shape{1, queries, width}, factors.data(), [&](Index offset) {
        const auto query = static_cast<std::size_t>(offset / width);
        return fmt::format("layer {}, head {}, position {}", layer, head, state_->info.query_positions[query]);
      });
  return factors;
}

std::vector<StoredTensor> TraceReader::stored_tensors() const {
  std::vector<StoredTensor> tensors;
  const auto add = [&](const hdf5::Dataset& dataset) {
    tensors.push_back({dataset.path(), dataset.shape(), *dataset.float_type(), dataset.stored_bytes(),
                       dataset.storage(), state_->optional_string(dataset.path(), "xxh64")});
  };
  for (const State::Layer& layer : state_->layers) {
    for (const auto& dataset : layer.head_tensors) {
      if (dataset) add(*dataset);
    }
    for (const auto* dataset : {&layer.output_projection, &layer.attention_mass, &layer.output_gate}) {
      if (*dataset) add(**dataset);
    }
    for (const hdf5::Dataset& dataset : layer.lists) add(dataset);
  }
  return tensors;
}

std::string TraceReader::compute_xxh64(const std::string& dataset_path) const {
  return state_->file.dataset(dataset_path).compute_xxh64();
}

}  // namespace kvreplay
