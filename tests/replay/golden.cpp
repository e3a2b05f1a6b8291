#include "replay/golden.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>

#include "support/golden_attributes.h"
#include "support/places.h"
#include "trace/reader.h"

namespace kvreplay::test {
namespace {

// The calls' arguments carry the names of the original codes; here they are said in our terms.
class CallTranslation : public GoldenAttributes {
 public:
  using GoldenAttributes::GoldenAttributes;

  // Empty where no method here is the call's.
  std::string spec(int capacity) const {
    const std::string method = text("method");
    if (method == "snapkv") {
      return fmt::format("snapkv(window={},kernel={},pooling={})", number("window_size"), number("kernel_size"),
                         pooling());
    }
    if (method == "h2o") return fmt::format("h2o(window={},mask=window)", number("window_size"));
    if (method == "streamingllm") return fmt::format("streamingllm(sinks={})", capacity - number("window_size"));
    if (method == "tova") return "tova";
    if (method == "pyramidkv") {
      return fmt::format("pyramidkv(window={},kernel={},pooling={},beta={})", number("window_size"),
                         number("kernel_size"), pooling(), number("beta"));
    }
    if (method == "adakv") {
      return fmt::format("adakv(window={},kernel={},pooling={},floor={},normalize={})", number("window_size"),
                         number("kernel_size"), pooling(), real("floor"), flag("normalize"));
    }
    if (method == "l2norm") return "knorm";
    if (method == "lacache") {
      return fmt::format("lacache(sinks={},span={},overlap={})", number("start_size"), number("span"),
                         number("overlap"));
    }
    if (method == "restkv") {
      return flag("use_pyramid") ? restkv() + fmt::format("+pyramid(beta={},short=pyramid)", number("beta")) : restkv();
    }
    if (method == "ablation") return ablation();
    if (method == "kvpress-knorm") return "knorm";
    if (method == "kvpress-keydiff") return "keydiff";
    if (method == "kvpress-lagkv") return fmt::format("lagkv(lag={})", lag());
    if (method == "kvpress-critical-snapkv") {
      return fmt::format("criticalkv(base=snapkv(window={}))", number("window_size"));
    }
    if (method == "kvpress-snapkv") return fmt::format("snapkv(window={})", number("window_size"));
    if (method == "kvpress-tova") return "tova(last=true)";
    if (method == "kvpress-observed-attention") return "h2o(window=0,normalize=true)";
    if (method == "cake") {
      return fmt::format("cake@cakekv(window={},kernel={},gamma={},tau1={},tau2={})", number("window_size"),
                         number("kernel_size"), real("gamma"), real("tau1"), real("tau2"));
    }
    if (method == "expected-attention") {
      return fmt::format("expected-attention@kvpress(future={},sinks={},covariance={},values={},epsilon={})",
                         number("n_future_positions"), number("n_sink"), flag("use_covariance"), flag("use_vnorm"),
                         real("epsilon"));
    }
    static const std::set<std::string> known_elsewhere = {
        "capkv",   "chunkkv",   "compactor", "curdkv",    "entropy-gated-chunkkv", "kvcompose", "kvzip", "leverage",
        "merging", "noncausal", "qfilter",   "simlayerkv"};
    if (known_elsewhere.contains(method)) return "";
    throw std::runtime_error(group() + ": no translation for method " + method);
  }

  int capacity(int prompt_length) const {
    if (has("max_capacity_prompt")) return number("max_capacity_prompt");
    if (has("capacity")) return number("capacity");
    if (has("cache_size")) return number("cache_size");
    if (has("compression_ratio")) return static_cast<int>(prompt_length * (1 - real("compression_ratio")));
    return prompt_length;  // methods that have none
  }

 private:
  std::string restkv() const {
    std::string spec =
        fmt::format("restkv(window={},alpha={},beta={},kernel={},temporal={},spatial={},metric={},projection={}",
                    number("window_size"), real("alpha"), real("scale"), number("kernel_size"),
                    flag("use_ema") ? "ema" : "mean", pooling(), text("metric_mode"), flag("use_wo"));
    if (has("tau")) spec += fmt::format(",tau={}", real("tau"));
    if (flag("use_norm")) spec += ",normalize=true";
    return spec + ")";
  }

  std::string ablation() const {
    static const std::map<std::string, std::string> temporal = {
        {"ema", "ema"}, {"mean", "mean"}, {"inv-ema", "reversed-ema"}, {"none", "last"}};
    static const std::map<std::string, std::string> spatial = {
        {"avgpool", "avg"}, {"maxpool", "max"}, {"none", "none"}, {"adaptive", "adaptive"}};
    // The release pools the plain indicators over 5 positions whatever `ss` says, and averages them over the window.
    if (text("indicator") != "reconstruction") {
      return fmt::format("attention(window={},values={})", number("window_size"), text("indicator") == "attn-v");
    }
    return fmt::format("restkv(window={},temporal={},spatial={})", number("window_size"), temporal.at(text("ts")),
                       spatial.at(text("ss")));
  }

  // The call's lag is not among its attributes; its scores are the ranks 0/lag … (lag − 1)/lag and 1.
  int lag() const {
    const std::vector<float> scores = file().read_floats(group() + "/scores");
    return static_cast<int>(std::set<float>(scores.begin(), scores.end()).size()) - 1;
  }

  std::string pooling() const {
    static const std::map<std::string, std::string> names = {
        {"avgpool", "avg"}, {"maxpool", "max"}, {"none", "none"}, {"adaptive", "adaptive"}};
    return names.at(text("pooling"));
  }
};

}  // namespace

std::vector<std::filesystem::path> golden_files() {
  // Golden files from elsewhere can be run in place of the bundled ones.
  const char* elsewhere = std::getenv("KVREPLAY_GOLDEN_DIR");
  std::vector<std::filesystem::path> files;
  for (const auto& entry :
       std::filesystem::directory_iterator(elsewhere ? std::filesystem::path(elsewhere) : golden_folder())) {
    // A capture that goes with golden calls in another file has none of its own.
    if (entry.path().extension() == ".h5" && hdf5::File::open(entry.path()).exists("/golden")) {
      files.push_back(entry.path());
    }
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
      std::vector<int> set(kept.begin() + offsets[i], kept.begin() + offsets[i + 1]);
      // LaCache's code can gather one position twice; a kept set holds it once.
      set.erase(std::unique(set.begin(), set.end()), set.end());
      call.kept.sets.emplace_back(std::move(set));
    }
    if (file.exists(group + "/scores")) call.scores = file.read_floats(group + "/scores");
    // Of methods that change values too, what the kept sets alone do.
    const std::string unmerged = file.exists(group + "/head_error_unmerged") ? "_unmerged" : "";
    call.head_error = file.read_floats(group + "/head_error" + unmerged);
    call.layer_error = file.read_floats(group + "/layer_error" + unmerged);
    call.attention_recall = file.read_floats(group + "/attention_recall");
    calls.push_back(std::move(call));
  }
  return calls;
}

}  // namespace kvreplay::test
