#include "decode/golden.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "hdf5/hdf5.h"
#include "support/golden_attributes.h"
#include "support/places.h"
#include "trace/reader.h"

namespace kvreplay::test {
namespace {

// The runs' arguments carry the names of the original codes; here they are said in our terms.
class RunTranslation : public GoldenAttributes {
 public:
  RunTranslation(const hdf5::File& file, std::string group, int prompt)
      : GoldenAttributes(file, std::move(group)), prompt_(prompt) {}

  std::string spec() const {
    const std::string method = text("method");
    if (method == "h2o_real_drop") {
      return fmt::format("h2o@h2o{}(recent={})", flag("rolled") ? "-rolled" : "", number("recent_size"));
    }
    if (method == "h2o_mask") return fmt::format("h2o@h2o-mask(recent={})", of_prompt("recent_ratio", 1));
    if (method == "keyformer") {
      return fmt::format("keyformer(recent={},tau={},tau-step={},{})", recent_of_keyformer(), real("tau_init"),
                         real("tau_delta"), has_noise() ? "file={noise}" : "noise=none");
    }
    if (method == "tova") return "tova@tova";
    if (method == "streamingllm") {
      return fmt::format("streamingllm@streaming-llm(sinks={},coming={})", number("start_size"),
                         text("mode") == "before" ? number("chunk") : 0);
    }
    if (method == "rkv") return rkv();
    if (method == "kvpress") return kvpress();
    if (method == "coldcompress") {
      const int history = has("history_window_size") ? number("history_window_size") : 1;
      return text("cache_strategy") == "l2" ? fmt::format("knorm@cold-compress(global={},recent={})",
                                                          number("global_tokens"), number("recent_window"))
                                            : fmt::format("cold-compress(global={},recent={},history={})",
                                                          number("global_tokens"), number("recent_window"), history);
    }
    if (method == "morphkv") {
      return fmt::format("morphkv(window={},fusion={},burst={})", number("window_size"),
                         text("morph_type") == "max_fused" ? "max" : "sum", real("evict_after"));
    }
    if (method == "vase" && text("eviction_mode") == "attn_rkv") {
      return fmt::format("rkv@vase(recent={},lambda={},smooth={})", number("residual_length"), real("rkv_lambda"),
                         flag("smooth"));
    }
    if (method == "vase") {
      static const std::map<std::string, std::string> modes = {
          {"attn", "attention"}, {"range_attn", "range-attention"}, {"evict_large_range", "narrow-range"}};
      return fmt::format("vase(mode={},recent={},large={},smooth={})", modes.at(text("eviction_mode")),
                         number("residual_length"), has("n_large") ? number("n_large") : 200, flag("smooth"));
    }
    if (method == "triattention") return triattention();
    if (method == "lacache") {
      return fmt::format("lacache@lacache(sinks={},span={},overlap={})", number("start_size"), number("span"),
                         number("overlap"));
    }
    throw std::runtime_error(fmt::format("{}: no policy is known for '{}'", group(), method));
  }

  bool has_noise() const { return file().exists(group() + "/gumbel_noise"); }

  int capacity() const {
    if (text("method") == "h2o_mask") return of_prompt("heavy_ratio", 1) + of_prompt("recent_ratio", 1);
    if (text("method") == "keyformer") return of_prompt("kv_cache", 100);
    for (const char* name : {"budget", "target_size", "cache_size", "kv_budget", "token_budget", "max_cache_length"}) {
      if (has(name)) return number(name);
    }
    if (has("max_capacity")) return number("max_capacity") + 1;
    if (has("hh_size")) return number("hh_size") + number("recent_size");
    if (has("start_size")) return number("start_size") + number("recent_size");
    return 1;
  }

 private:
  // Shares of the prompt, as the codes cut them off.
  int of_prompt(const std::string& share, double whole) const {
    return static_cast<int>(prompt_ * real(share) / whole);
  }
  int recent_of_keyformer() const { return static_cast<int>(of_prompt("kv_cache", 100) * real("recent") / 100); }

  std::string rkv() const {
    const std::string order = has("resorted") ? ",order=position" : "";
    const std::string method = has("rkv_method") ? text("rkv_method") : "";
    if (method == "streamingllm") {
      return fmt::format("streamingllm@r-kv(sinks={},interval={})", number("first_tokens"), number("divide_length"));
    }
    if (method == "snapkv") {
      return fmt::format("snapkv@r-kv(window={},interval={}{})", number("window_size"), number("divide_length"), order);
    }
    return fmt::format("rkv(window={},kernel={},lambda={},spared={},interval={}{})", number("window_size"),
                       number("kernel_size"), real("mix_lambda"),
                       text("retain_direction") == "first" ? "first" : "newest", number("divide_length"), order);
  }

  std::string triattention() const {
    static const std::map<std::string, std::string> modes = {
        {"per_layer_perhead", "layer-head"}, {"per_head", "per-head"}, {"global", "global"}};
    const auto said = [this](const std::string& name, bool otherwise) { return has(name) ? flag(name) : otherwise; };
    return fmt::format(
        "triattention(mode={},share={},aggregation={},normalize={},prompt={},counted={},interval={},slack={})",
        modes.at(text("mode")), has("layer_perhead_aggregation") ? text("layer_perhead_aggregation") : "max",
        has("score_aggregation") ? text("score_aggregation") : "mean", said("normalize_scores", true),
        flag("allow_prefill_compression") ? "evicted" : "stays", said("count_prompt_tokens", true),
        number("divide_length"), said("use_slack_trigger", true));
  }

  std::string kvpress() const {
    const std::string base = text("base");
    if (base == "snapkv") {
      return fmt::format("snapkv@kvpress-decoding(window={},kernel={},attention={},interval={})", number("window_size"),
                         number("kernel_size"), text("attentions"), number("compression_interval")) +
             (has("resorted") ? "+order(position)" : "");
    }
    return fmt::format("{}@kvpress-decoding(interval={})", base, number("compression_interval"));
  }

  int prompt_;
};

}  // namespace

std::vector<std::filesystem::path> golden_decode_files() {
  const char* elsewhere = std::getenv("KVREPLAY_GOLDEN_DECODE_DIR");
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(elsewhere ? std::filesystem::path(elsewhere)
                                                                         : project_folder() / "tests/golden-decode")) {
    if (entry.path().extension() == ".h5") files.push_back(entry.path());
  }
  std::ranges::sort(files);
  return files;
}

std::vector<GoldenRun> golden_runs(const std::filesystem::path& path) {
  const TraceReader trace(path);
  const ModelInfo& model = trace.info().model;
  const hdf5::File file = hdf5::File::open(path);
  std::vector<GoldenRun> runs;
  for (const std::string& id : file.list("/golden-decode")) {
    const std::string group = "/golden-decode/" + id;
    const RunTranslation translation(file, group, trace.info().prompt_length);
    GoldenRun run;
    run.file = path;
    run.id = id;
    run.spec = translation.spec();
    if (translation.has_noise()) run.noise = group + "/gumbel_noise";
    run.capacity = translation.capacity();
    const std::string heads = translation.text("heads");
    run.granularity = heads == "query" ? Granularity::query : heads == "kv" ? Granularity::kv : Granularity::layer;
    run.sets_per_layer = heads == "query" ? model.num_attention_heads : heads == "kv" ? model.num_key_value_heads : 1;
    run.tie_dependent = translation.has("tie_dependent");
    run.masked_at_once = translation.text("attends") == "after eviction";
    const auto ints = [&](const std::string& name) {
      const std::vector<std::int64_t> read = file.read_int64s(fmt::format("{}/{}", group, name));
      return std::vector<int>(read.begin(), read.end());
    };
    run.steps = ints("steps");
    const std::vector<int> offsets = ints("offsets");
    const auto sets = [&](const std::string& name) {
      const std::vector<int> all = ints(name);
      std::vector<std::vector<int>> split;
      for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
        split.emplace_back(all.begin() + offsets[i], all.begin() + offsets[i + 1]);
      }
      return split;
    };
    run.kept = sets("kept");
    if (file.exists(group + "/kept_in_cache_order")) run.in_order = sets("kept_in_cache_order");
    std::string as_published;
    for (const char* suffix : {"_reindexed", "_live"}) {
      if (file.exists(fmt::format("{}/head_error{}", group, suffix))) as_published = suffix;
    }
    run.head_error = file.read_floats(fmt::format("{}/head_error{}", group, as_published));
    run.layer_error = file.read_floats(fmt::format("{}/layer_error{}", group, as_published));
    run.attention_recall = file.read_floats(group + "/attention_recall");
    run.cache_size = ints("cache_size");
    runs.push_back(std::move(run));
  }
  return runs;
}

}  // namespace kvreplay::test
