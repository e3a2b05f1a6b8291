// Kept sets from a file: what any other system kept, measured like everything else.
//
// The file has the layout that `replay --kept` writes: a group /kept/<index> with an attribute `heads` (query or kv)
// and datasets `kept` and `offsets`; set s (layer-major, then head) is kept[offsets[s]:offsets[s+1]], ascending
// positions. The capacity asked for does not matter; sets may differ in size. Of positions that a layer's sliding
// window has dropped before the eviction nothing can be kept: those that a set lists, as files of earlier versions and
// of other systems may, are left out. Sets are of the tokens that their digests tell, where they tell any.
#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/printable.h"
#include "hdf5/hdf5.h"
#include "policy/policy.h"

namespace kvreplay {
namespace {

class KeptFromFile : public Pattern {
 public:
  KeptFromFile(const std::string& path, int index) : path_(path), place_(fmt::format("{}: /kept/{}", path, index)) {
    const hdf5::File file = hdf5::File::open(path);
    const std::string group = fmt::format("/kept/{}", index);
    if (!file.exists("/kept")) throw Error(fmt::format("{}: holds no kept sets (a group /kept)", path));
    if (!file.exists(group)) {
      throw Error(fmt::format("{} does not exist; the file holds {} of them", place_, file.list("/kept").size()));
    }
    const std::string heads = file.read_string(group, "heads");
    if (heads != "query" && heads != "kv")
      throw Error(fmt::format("{}: heads is '{}', not query or kv", place_, heads));
    per_query_head_ = heads == "query";
    const auto text = [&](const char* name) {
      return file.has_attribute(group, name) ? file.read_string(group, name) : std::string();
    };
    trace_ = printable(text("trace"));
    run_ = {.trace_digest = text("trace_digest"), .tokens_digest = text("tokens_digest")};
    if (file.has_attribute(group, "evict_at")) evict_at_ = static_cast<int>(file.read_int(group, "evict_at"));
    if (file.exists(group + "/until")) {
      throw Error(
          fmt::format("{}: was evicted more than once, which a kept set cannot tell; give the kept sets of one "
                      "eviction",
                      place_));
    }
    kept_ = file.read_int32s(group + "/kept");
    offsets_ = file.read_int64s(group + "/offsets");
    check_offsets();
  }

  CapacityRule capacity_rule() const override { return CapacityRule::own; }
  Granularity coarsest_granularity() const override { return per_query_head_ ? Granularity::query : Granularity::kv; }

  void check(const HeadShape& shape) const override {
    const int heads = heads_of(shape);
    const auto sets = static_cast<std::int64_t>(offsets_.size()) - 1;
    if (sets != static_cast<std::int64_t>(shape.num_layers) * heads) {
      throw Error(fmt::format("{}: holds {} sets; the trace has {} layers of {} {} heads", place_, sets,
                              shape.num_layers, heads, per_query_head_ ? "query" : "KV"));
    }
    if (evict_at_ && *evict_at_ != shape.next_position) {
      throw Error(fmt::format("{}: was kept at position {}, and this eviction is at {}", place_, *evict_at_,
                              shape.next_position));
    }
  }

  std::string note(const HeadShape& shape) const override {
    const int heads = heads_of(shape);
    for (int set = shape.layer * heads; set < (shape.layer + 1) * heads; ++set) {
      const auto first = static_cast<std::size_t>(offsets_[static_cast<std::size_t>(set)]);
      const bool is_empty = first == static_cast<std::size_t>(offsets_[static_cast<std::size_t>(set) + 1]);
      if (is_empty || (shape.rows() > 0 && kept_[first] >= shape.positions[0])) continue;
      return fmt::format("{}: lists positions that layers with a sliding window no longer hold; they are left out",
                         place_);
    }
    return "";
  }

  void check_run(const RunIdentity& run) const override {
    if (tells_no_run() || run_.trace_digest == run.trace_digest || run_.tokens_digest == run.tokens_digest) return;
    throw Error(
        fmt::format("{}: is of {}, {}; name kept sets of this trace, as --kept writes them, or others of the file with "
                    "index",
                    place_, trace_.empty() ? "a trace" : trace_,
                    run_.tokens_digest.empty() ? "which is another" : "which has other tokens before the eviction"));
  }

  std::string note_on_run(const RunIdentity& run) const override {
    if (tells_no_run()) {
      return fmt::format(
          "{}: does not say which tokens its kept sets are of (tokens_digest), so whether they are this trace's could "
          "not be checked",
          path_);
    }
    if (run_.trace_digest.empty() || run_.trace_digest == run.trace_digest) return "";
    return fmt::format("{}: its kept sets are of another run of the same tokens{}", path_,
                       trace_.empty() ? "" : ", " + trace_);
  }

  std::vector<int> keep(const HeadShape& shape, int member, int /*capacity*/) const override {
    const int heads = heads_of(shape);
    const int head = per_query_head_ ? shape.query_head(member) : shape.kv_head;
    const auto set = static_cast<std::size_t>(shape.layer * heads + head);
    std::vector<int> kept(kept_.begin() + offsets_[set], kept_.begin() + offsets_[set + 1]);
    if (kept.empty()) throw Error(fmt::format("{}: set {} is empty", place_, set));
    if (kept.back() >= shape.next_position) {
      throw Error(fmt::format("{}: set {} holds position {}, beyond the {} before the eviction", place_, set,
                              kept.back(), shape.next_position));
    }
    std::vector<int> rows;
    for (const int position : kept) {
      const int row = shape.positions.count_before(position);
      if (row < shape.rows() && shape.positions[row] == position) rows.push_back(row);
    }
    return rows;
  }

 private:
  int heads_of(const HeadShape& shape) const { return shape.num_kv_heads * (per_query_head_ ? shape.group_size : 1); }

  bool tells_no_run() const { return run_.trace_digest.empty() && run_.tokens_digest.empty(); }

  void check_offsets() const {
    if (offsets_.size() < 2 || offsets_.front() != 0 || offsets_.back() != static_cast<std::int64_t>(kept_.size())) {
      throw Error(
          fmt::format("{}: offsets must lead from 0 to the number of kept positions, {}", place_, kept_.size()));
    }
    for (std::size_t set = 0; set + 1 < offsets_.size(); ++set) {
      if (offsets_[set] > offsets_[set + 1] || offsets_[set + 1] > offsets_.back()) {
        throw Error(fmt::format("{}: offsets must ascend; offset {} does not", place_, set + 1));
      }
      for (auto i = offsets_[set]; i < offsets_[set + 1]; ++i) {
        const int position = kept_[static_cast<std::size_t>(i)];
        if (position < 0 || (i > offsets_[set] && position <= kept_[static_cast<std::size_t>(i - 1)])) {
          throw Error(fmt::format("{}: set {} is not ascending positions", place_, set));
        }
      }
    }
  }

  std::string path_;
  std::string place_;
  std::string trace_;
  RunIdentity run_;  // texts that the file does not tell are empty
  bool per_query_head_ = false;
  std::optional<int> evict_at_;
  std::vector<std::int32_t> kept_;
  std::vector<std::int64_t> offsets_;
};

const MethodRegistration kept([] {
  return Method{
      .name = "kept",
      .summary = "Keeps the sets that a file lists, from another system or an earlier replay.",
      .source = "given; docs/results-format.md",
      .parameters = {Parameter::file("file", "kept sets in the layout of replay --kept").of(Parameter::Step::other),
                     Parameter::integer("index", 0, 0, "which group /kept/<index>").of(Parameter::Step::other)},
      .compose =
          [](const Arguments& a) {
            if (a.text("file").empty()) throw UsageError("kept: needs a file, as in kept(file=kept.h5)");
            auto pattern = std::make_shared<KeptFromFile>(a.text("file"), a.integer("index"));
            const Granularity granularity = pattern->coarsest_granularity();
            return Composition{.rule = std::move(pattern), .granularity = granularity};
          },
  };
});

}  // namespace
}  // namespace kvreplay
