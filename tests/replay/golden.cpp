#include "replay/golden.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "trace/reader.h"

namespace kvreplay::test {
namespace {

// The calls' arguments carry the names of the original codes; here they are said in our terms.
class CallTranslation {
 public:
  CallTranslation(const hdf5::File& file, std::string group) : file_(file), group_(std::move(group)) {}

  std::string spec(int capacity) const {
    const std::string method = text("method");
    if (method == "snapkv") {
      return fmt::format("snapkv(window={},kernel={},pooling={})", number("window_size"), number("kernel_size"),
                         pooling());
    }
    if (method == "h2o") return fmt::format("h2o(window={},mask=window)", number("window_size"));
    if (method == "streamingllm") return fmt::format("streamingllm(sinks={})", capacity - number("window_size"));
    if (method == "tova") return "tova";
    if (method == "restkv" && !flag("use_pyramid")) return restkv();
    if (method == "ablation" && text("indicator") == "reconstruction") return ablation();
    if (method == "kvpress-snapkv") return fmt::format("snapkv(window={})", number("window_size"));
    if (method == "kvpress-tova") return "tova(last=true)";
    if (method == "kvpress-observed-attention") return "h2o(window=0,normalize=true)";
    return "";
  }

  int capacity(int prompt_length) const {
    if (has("max_capacity_prompt")) return number("max_capacity_prompt");
    if (has("capacity")) return number("capacity");
    if (has("compression_ratio")) return static_cast<int>(prompt_length * (1 - real("compression_ratio")));
    return 0;
  }

  std::string text(const std::string& name) const { return file_.read_string(group_, name); }

 private:
  std::string restkv() const {
    std::string spec = fmt::format(
        "restkv(window={},alpha={},beta={},kernel={},temporal={},spatial={},metric={},projection={}",
        number("window_size"), real("alpha"), real("scale"), number("kernel_size"), flag("use_ema") ? "ema" : "mean",
        pooling(), text("metric_mode"), flag("use_wo"));
    if (has("tau")) spec += fmt::format(",tau={}", real("tau"));
    if (flag("use_norm")) spec += ",normalize=true";
    return spec + ")";
  }

  std::string ablation() const {
    static const std::map<std::string, std::string> temporal = {
        {"ema", "ema"}, {"mean", "mean"}, {"inv-ema", "reversed-ema"}, {"none", "last"}};
    static const std::map<std::string, std::string> spatial = {
        {"avgpool", "avg"}, {"maxpool", "max"}, {"none", "none"}, {"adaptive", "adaptive"}};
    return fmt::format("restkv(window={},temporal={},spatial={})", number("window_size"), temporal.at(text("ts")),
                       spatial.at(text("ss")));
  }

  std::string pooling() const {
    static const std::map<std::string, std::string> names = {
        {"avgpool", "avg"}, {"maxpool", "max"}, {"none", "none"}, {"adaptive", "adaptive"}};
    return names.at(text("pooling"));
  }

  bool has(const std::string& name) const { return file_.has_attribute(group_, name); }
  int number(const std::string& name) const { return static_cast<int>(file_.read_int(group_, name)); }
  double real(const std::string& name) const { return file_.read_double(group_, name); }
  bool flag(const std::string& name) const { return has(name) && file_.read_int(group_, name) != 0; }

  const hdf5::File& file_;
  std::string group_;
};

}  // namespace

std::vector<std::filesystem::path> golden_files() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(KVREPLAY_GOLDEN_DIR)) {
    if (entry.path().extension() == ".h5") files.push_back(entry.path());
  }
  std::ranges::sort(files);
  return files;
}

std::vector<GoldenCall> golden_calls(const std::filesystem::path& path) {
  const TraceReader trace(path);
  const hdf5::File file = hdf5::File::open(path);
  std::vector<GoldenCall> calls;
  for (const std::string& id : file.list("/golden")) {
    const std::string group = "/golden/" + id;
    const CallTranslation translation(file, group);
    GoldenCall call;
    call.file = path;
    call.id = id;
    call.capacity = translation.capacity(trace.info().prompt_length);
    call.spec = translation.spec(call.capacity);
    const bool per_query_head = translation.text("heads") == "query";
    // TOVA's one set per layer is stored once for every KV head.
    const bool per_layer = translation.text("method").ends_with("tova");
    call.granularity = per_layer ? Granularity::layer : per_query_head ? Granularity::query : Granularity::kv;
    call.kept.granularity = per_query_head ? Granularity::query : Granularity::kv;
    call.kept.sets_per_layer =
        per_query_head ? trace.info().model.num_attention_heads : trace.info().model.num_key_value_heads;
    const std::vector<std::int64_t> kept = file.read_int64s(group + "/kept");
    const std::vector<std::int64_t> offsets = file.read_int64s(group + "/offsets");
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      std::vector<int>& set = call.kept.sets.emplace_back(kept.begin() + offsets[i], kept.begin() + offsets[i + 1]);
      // LaCache's code can gather one position twice; a kept set holds it once.
      set.erase(std::unique(set.begin(), set.end()), set.end());
    }
    if (file.exists(group + "/scores")) call.scores = file.read_floats(group + "/scores");
    call.head_error = file.read_floats(group + "/head_error");
    call.layer_error = file.read_floats(group + "/layer_error");
    call.attention_recall = file.read_floats(group + "/attention_recall");
    calls.push_back(std::move(call));
  }
  return calls;
}

}  // namespace kvreplay::test
