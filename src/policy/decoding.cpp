#include "policy/decoding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "base/buffer.h"
#include "base/rotary.h"
#include "base/softmax.h"
#include "base/work.h"
#include "kernels/kernels.h"

namespace kvreplay {
namespace {

using kernels::kPanel;

// The scores of the setting that is decided, by which an order goes.
class ScoresKept : public ScoreObserver {
 public:
  void begin_head(const Head& /*head*/) override {}
  void end_head(const Head& /*head*/) override {}
  void head_scored(std::size_t /*setting*/, const Head& head, const HeadScores& scores, bool /*as_before*/) override {
    const std::span<const float> shared = row_of(scores.shared, 0);
    of_head_[head.shape().kv_head].assign(shared.begin(), shared.end());
  }
  void layer_scored(std::size_t /*setting*/, std::span<const float> scores) override {
    of_layer_.assign(scores.begin(), scores.end());
  }

  // Empty where nothing was ranked.
  const std::vector<float>& of(int head) { return of_layer_.empty() ? of_head_[head] : of_layer_; }

 private:
  std::map<int, std::vector<float>> of_head_;
  std::vector<float> of_layer_;
};

// Some query heads of a prompt's KV head, as a head of their own.
class PromptLane : public HeadSource {
 public:
  PromptLane(const HeadSource& whole, HeadShape shape, int first_member, const RankingMemory* memory,
             PatternMemory* pattern_memory)
      : whole_(whole),
        shape_(std::move(shape)),
        first_(first_member),
        memory_(memory),
        pattern_memory_(pattern_memory) {}

  const HeadShape& shape() const override { return shape_; }
  const CachePositions& entries() const override { return whole_.entries(); }
  void read_keys(Index first, Index count, float* rows) const override { whole_.read_keys(first, count, rows); }
  void read_values(Index first, Index count, float* rows) const override { whole_.read_values(first, count, rows); }
  std::span<const int> query_positions() const override { return whole_.query_positions(); }
  Matrix queries(int member, Index first, Index count) const override {
    return whole_.queries(first_ + member, first, count);
  }
  bool has_output_projection() const override { return whole_.has_output_projection(); }
  Matrix output_projection(int member) const override { return whole_.output_projection(first_ + member); }
  Matrix projection_factor(int member) const override { return whole_.projection_factor(first_ + member); }
  std::optional<std::vector<float>> attention_mass(int member) const override {
    return whole_.attention_mass(first_ + member);
  }
  std::span<const int> later_positions() const override { return whole_.later_positions(); }
  Matrix later_queries(int member) const override { return whole_.later_queries(first_ + member); }
  Matrix later_keys() const override { return whole_.later_keys(); }
  std::span<const int> evaluation_positions() const override { return whole_.evaluation_positions(); }
  Matrix evaluation_queries(int member) const override { return whole_.evaluation_queries(first_ + member); }
  Matrix evaluation_keys() const override { return whole_.evaluation_keys(); }
  Matrix evaluation_values() const override { return whole_.evaluation_values(); }
  const RankingMemory* memory() const override { return memory_; }
  PatternMemory* pattern_memory() const override { return pattern_memory_; }

 private:
  const HeadSource& whole_;
  HeadShape shape_;
  int first_;
  const RankingMemory* memory_;
  PatternMemory* pattern_memory_;
};

// What a survey of the prompt gave to every kept set of a layer.
class DividedBudget : public Budget {
 public:
  DividedBudget(std::vector<int> capacities, int asked) : capacities_(std::move(capacities)), asked_(asked) {}

  std::optional<int> own_capacity() const override { return asked_; }
  std::vector<int> allocate(const BudgetRequest& /*request*/) const override { return capacities_; }

 private:
  std::vector<int> capacities_;
  int asked_;
};

// Rows in the order in which they are to stand, of `kept`, ascending rows.
std::vector<int> ordered(std::vector<int> kept, RowOrder order, const std::vector<float>& scores,
                         Protection protection) {
  if (order == RowOrder::position || scores.empty()) return kept;
  const int rows = static_cast<int>(scores.size());
  const auto ranked = std::ranges::find_if(kept, [&](int row) { return row >= protection.sinks; });
  const auto last = std::find_if(ranked, kept.end(), [&](int row) { return row >= rows - protection.window; });
  std::stable_sort(ranked, last, [&scores](int a, int b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  if (order == RowOrder::protected_first) std::rotate(ranked, last, kept.end());
  return kept;
}

}  // namespace

// The keys and values that caches of one KV head hold, once for all of them, and the last queries. A slot is used again
// once no cache holds what was in it.
class LayerDecoding::Rows {
 public:
  Rows(Index head_dim, int group_size, int window) : depth_(head_dim), group_(group_size), window_(window) {}

  int add(const float* key, const float* value) {
    if (free_.empty()) {
      blocks_.emplace_back(3 * kPanel * depth_);
      for (int i = kPanel - 1; i >= 0; --i) free_.push_back(static_cast<int>(holders_.size()) + i);
      holders_.resize(holders_.size() + kPanel, 0);
    }
    const int slot = free_.back();
    free_.pop_back();
    if (static_cast<std::size_t>(slot) < is_unturned_.size()) is_unturned_[static_cast<std::size_t>(slot)] = false;
    std::copy_n(key, depth_, row(slot, 0));
    std::copy_n(value, depth_, row(slot, 1));
    float* const panel = blocks_[static_cast<std::size_t>(slot / kPanel)].data() + 2 * kPanel * depth_;
    for (Index d = 0; d < depth_; ++d) panel[d * kPanel + slot % kPanel] = key[d];
    return slot;
  }

  void hold(int slot) { ++holders_[static_cast<std::size_t>(slot)]; }
  void release(int slot) {
    if (--holders_[static_cast<std::size_t>(slot)] == 0) free_.push_back(slot);
  }

  // A key before its position turned it.
  const float* unturned_key(int slot, int position, const RotaryTable& rotary) {
    const auto block = static_cast<std::size_t>(slot / kPanel);
    if (unturned_.size() <= block) unturned_.resize(block + 1);
    if (is_unturned_.size() < holders_.size()) is_unturned_.resize(holders_.size(), false);
    if (unturned_[block].size() == 0) unturned_[block] = Buffer(kPanel * depth_);
    float* const key = unturned_[block].data() + slot % kPanel * depth_;
    if (!is_unturned_[static_cast<std::size_t>(slot)]) {
      Matrix turned = MatrixView(row(slot, 0), 1, depth_);
      unrotate(rotary, {&position, 1}, turned);
      std::copy_n(turned.data(), depth_, key);
      is_unturned_[static_cast<std::size_t>(slot)] = true;
    }
    return key;
  }

  const float* key(int slot) const { return row(slot, 0); }
  const float* value(int slot) const { return row(slot, 1); }
  Index depth() const { return depth_; }

  // A step's queries [group, D]; null: none were captured.
  void take_queries(int position, const float* queries) {
    has_products_ = false;
    if (queries == nullptr) {
      query_positions_.clear();
      queries_.clear();
      return;
    }
    query_positions_.push_back(position);
    queries_.emplace_back(queries, queries + group_ * depth_);
    if (static_cast<int>(queries_.size()) > std::max(window_, 1)) {
      query_positions_.erase(query_positions_.begin());
      queries_.erase(queries_.begin());
    }
  }
  std::span<const int> query_positions() const { return query_positions_; }
  const float* query(Index index, int member) const {
    return queries_[static_cast<std::size_t>(index)].data() + member * depth_;
  }
  const float* newest_query(int member) const { return queries_.back().data() + member * depth_; }

  // The newest query of a query head times the key in a slot, of all of them at once when first asked for.
  float product(int member, int slot) {
    if (!has_products_) multiply();
    return products_[static_cast<std::size_t>(slot / kPanel)].data()[member * kPanel + slot % kPanel];
  }

 private:
  float* row(int slot, int part) {
    return blocks_[static_cast<std::size_t>(slot / kPanel)].data() + (part * kPanel + slot % kPanel) * depth_;
  }
  const float* row(int slot, int part) const {
    return blocks_[static_cast<std::size_t>(slot / kPanel)].data() + (part * kPanel + slot % kPanel) * depth_;
  }

  void multiply() {
    while (products_.size() < blocks_.size()) products_.emplace_back(group_ * kPanel);
    for (std::size_t block = 0; block < blocks_.size(); ++block) {
      kernels::multiply(group_, kPanel, depth_, newest_query(0), depth_, 1, blocks_[block].data() + 2 * kPanel * depth_,
                        kPanel, products_[block].data(), kPanel);
    }
    count_operations(2 * static_cast<Index>(blocks_.size()) * kPanel * group_ * depth_);
    has_products_ = true;
  }

  Index depth_;
  Index group_;
  int window_;
  std::vector<Buffer> blocks_;  // of kPanel slots: keys and values by rows, and keys as a panel
  std::vector<int> holders_;    // [slot]
  std::vector<int> free_;
  std::vector<Buffer> unturned_;   // of kPanel slots, where somebody asked for one
  std::vector<bool> is_unturned_;  // [slot]: it is there
  std::vector<int> query_positions_;
  std::vector<std::vector<float>> queries_;  // [query][group · D]
  std::vector<Buffer> products_;             // [block][group][kPanel]
  bool has_products_ = false;
};

// Query heads that keep the same set, and what is cached for them.
struct LayerDecoding::Lane {
  // Queries that saw a position.
  struct Span {
    int position;
    int from;  // or before: since it came
    int until;

    auto operator<=>(const Span&) const = default;
  };
  static constexpr int kHidden = std::numeric_limits<int>::max();

  int kv_head = 0;
  int first_member = 0;
  HeadShape shape;  // as a head of its own
  std::vector<int> positions;
  std::vector<int> slots;
  std::unique_ptr<RankingMemory> memory;
  std::unique_ptr<PatternMemory> pattern_memory;
  std::vector<int> seen_since;  // of policies that mask: of each row the first query that sees it, or kHidden
  std::vector<Span> gone;
  bool pays_to_all = false;                     // attention is that of the full run: what is gone stays in still_paid
  std::vector<std::pair<int, int>> still_paid;  // (position, slot), the newest first
  Matrix attention;                             // [members, R] of the newest query
  bool has_newest = false;                      // the policy that decides may go by it
};

// The caches of one setting.
struct LayerDecoding::Caches {
  Policy policy;  // that of the setting, without its schedule
  Schedule schedule;
  Setting own;  // of one eviction: what is left after it
  std::optional<RankingRequirements> requirements;
  int capacity = 0;
  int growth = 0;  // that every eviction adds to it
  int sets_per_head = 1;
  std::vector<int> shares;  // of every set of the layer, where a survey of the prompt divides them; otherwise empty
  std::vector<Lane> lanes;
  bool looks_at_newest = false;  // the ranking looks at the attention of the newest query, and at no other's
  bool observes = false;         // a memory looks at what every step's query pays
  bool attends = false;          // it does, or somebody asks for the output
  bool reindexed = false;
  int last = 0;                // eviction, or the prompt's last token
  std::vector<float> output;   // [H · D] of the newest query, where somebody asks for it
  std::vector<float> outputs;  // [step][heads that are decoded · group · D]
};

// A lane's cache as policies see it.
class LayerDecoding::LiveHead : public HeadSource {
 public:
  // `reindexed`: what positions do, where keys are turned to their places; otherwise null.
  LiveHead(const Lane& lane, Rows& rows, const HeadSource& prompt, RotaryAngles* reindexed)
      : lane_(lane), rows_(rows), prompt_(prompt), reindexed_(reindexed), entries_(lane.shape.positions) {
    if (lane.still_paid.empty()) return;
    std::vector<int> positions;
    for (const auto& [position, slot] : lane.still_paid) positions.push_back(position);
    positions.insert(positions.end(), lane.positions.begin(), lane.positions.end());
    entries_ = CachePositions(std::move(positions));
  }

  const HeadShape& shape() const override { return lane_.shape; }
  const CachePositions& entries() const override { return entries_; }
  void read_keys(Index first, Index count, float* rows) const override {
    const Index depth = rows_.depth();
    for (Index row = first; row < first + count; ++row, rows += depth) {
      if (reindexed_ == nullptr) {
        std::copy_n(rows_.key(slot(row)), depth, rows);
        continue;
      }
      const int position = lane_.positions[static_cast<std::size_t>(row)];
      const float* const key = rows_.unturned_key(slot(row), position, *lane_.shape.rotary);
      reindexed_->rotate(static_cast<int>(row), key, depth, rows);
    }
  }
  void read_values(Index first, Index count, float* rows) const override {
    for (Index i = 0; i < count; ++i)
      std::copy_n(rows_.value(slot(first + i)), rows_.depth(), rows + i * rows_.depth());
  }
  std::span<const int> query_positions() const override { return rows_.query_positions(); }
  Matrix queries(int member, Index first, Index count) const override {
    Matrix rows(count, rows_.depth());
    for (Index i = 0; i < count; ++i) {
      std::copy_n(rows_.query(first + i, lane_.first_member + member), rows_.depth(), rows.data() + i * rows_.depth());
    }
    if (reindexed_ == nullptr) return rows;
    // The newest query is at the newest row, the one before it at the row before.
    const std::span<const int> all =
        rows_.query_positions().subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    std::vector<int> positions(all.begin(), all.end());
    unrotate(*lane_.shape.rotary, positions, rows);
    for (int& position : positions) position = std::max(0, lane_.shape.rows() - (lane_.shape.next_position - position));
    rotate(*lane_.shape.rotary, positions, rows);
    return rows;
  }
  std::span<const float> newest_attention(int member) const override {
    if (!lane_.has_newest) return {};
    return {lane_.attention.data() + member * lane_.attention.cols(), static_cast<std::size_t>(lane_.attention.cols())};
  }
  bool has_output_projection() const override { return prompt_.has_output_projection(); }
  Matrix output_projection(int member) const override { return prompt_.output_projection(lane_.first_member + member); }
  Matrix projection_factor(int member) const override { return prompt_.projection_factor(lane_.first_member + member); }
  std::optional<std::vector<float>> attention_mass(int /*member*/) const override { return std::nullopt; }
  // Of the prompt: those that came since are among them.
  std::span<const int> evaluation_positions() const override { return prompt_.evaluation_positions(); }
  Matrix evaluation_queries(int member) const override {
    return prompt_.evaluation_queries(lane_.first_member + member);
  }
  Matrix evaluation_keys() const override { return prompt_.evaluation_keys(); }
  const RankingMemory* memory() const override { return lane_.memory.get(); }
  PatternMemory* pattern_memory() const override { return lane_.pattern_memory.get(); }

 private:
  int slot(Index entry) const {
    const auto gone = std::ssize(lane_.still_paid);
    return entry < gone ? lane_.still_paid[static_cast<std::size_t>(entry)].second
                        : lane_.slots[static_cast<std::size_t>(entry - gone)];
  }

  const Lane& lane_;
  Rows& rows_;
  const HeadSource& prompt_;
  RotaryAngles* reindexed_;
  CachePositions entries_;
};

// The caches of a setting as a layer, at the prompt's end or later.
class LayerDecoding::LiveLayer : public LayerSource {
 public:
  LiveLayer(const LayerDecoding& decoding, const Caches& caches, bool of_prompt)
      : decoding_(decoding), caches_(caches), of_prompt_(of_prompt) {
    const auto rows = [](const Lane& lane) { return lane.shape.rows(); };
    shape_ = std::ranges::max_element(caches.lanes, {}, rows)->shape;
    shape_.kv_head = 0;
  }

  const HeadShape& shape() const override { return shape_; }
  std::unique_ptr<HeadSource> head(int index) const override {
    const auto found = std::ranges::find_if(caches_.lanes, [index](const Lane& l) { return l.shape.kv_head == index; });
    const HeadSource& prompt = *decoding_.heads_.at(found->kv_head);
    if (of_prompt_) {
      // A prompt that is cut apart is cut as by one eviction.
      return std::make_unique<PromptLane>(prompt, found->shape, found->first_member,
                                          decoding_.cuts_apart_ ? nullptr : found->memory.get(),
                                          decoding_.cuts_apart_ ? nullptr : found->pattern_memory.get());
    }
    return std::make_unique<LiveHead>(*found, *decoding_.rows_.at(found->kv_head), prompt,
                                      caches_.reindexed ? decoding_.angles_.get() : nullptr);
  }
  std::string name() const override { return decoding_.prompt_.name(); }

 private:
  const LayerDecoding& decoding_;
  const Caches& caches_;
  bool of_prompt_;
  HeadShape shape_;
};

int LayerDecoding::window_of(std::span<const Setting> settings) {
  int window = 0;
  for (const Setting& setting : settings) {
    const Requirements needs = setting.policy->requirements();
    window = std::max(window, needs.count(Need::Kind::window_queries));
    for (const WindowCombination& combination : needs.combinations) {
      window = std::max(window, static_cast<int>(combination.weights.size()));
    }
  }
  return window;
}

bool LayerDecoding::looks_at_queries(const Setting& setting) {
  const Policy& policy = *setting.policy;
  if (policy.row_positions == RowPositions::reindexed) return true;
  if (window_of({&setting, 1}) > 0) return true;
  if (!policy.ranking()) return false;
  const auto memory = policy.ranking()->memory({});
  return memory != nullptr && memory->observes_attention();
}

LayerDecoding::LayerDecoding(const LayerSource& prompt, std::span<const Setting> settings, std::vector<int> kv_heads,
                             Index combination_bytes, Outputs outputs)
    : prompt_(prompt),
      kv_heads_(std::move(kv_heads)),
      combination_bytes_(combination_bytes),
      shape_(prompt.shape()),
      position_(shape_.next_position - 1),
      window_(window_of(settings)),
      outputs_(outputs) {
  for (const int kv_head : kv_heads_) {
    heads_[kv_head] = prompt.head(kv_head);
    rows_[kv_head] = std::make_unique<Rows>(shape_.head_dim, shape_.group_size, window_);
  }
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    auto caches = std::make_unique<Caches>();
    caches->policy = *setting.policy;
    caches->schedule = *setting.policy->schedule;
    caches->policy.schedule.reset();
    caches->reindexed = setting.policy->row_positions == RowPositions::reindexed;
    if (caches->reindexed && !angles_) angles_ = std::make_unique<RotaryAngles>(*shape_.rotary);
    if (outputs_ == Outputs::newest || (outputs_ == Outputs::untold && caches->reindexed)) {
      caches->output.resize(static_cast<std::size_t>(Index{shape_.num_kv_heads} * shape_.group_size * shape_.head_dim));
    }
    const int held = shape_.rows();
    const int asked = setting.asked.resolve(held, setting.policy->share_rule);
    caches->capacity = asked + (caches->policy.pin.prompt && !caches->policy.pin.counted ? held : 0);
    caches->growth = caches->schedule.grow(asked, caches->policy.protection().window);
    caches->own = setting;
    caches->own.policy = &caches->policy;
    divide(*caches, i);
    const bool apart = setting.granularity == Granularity::query;
    if (apart) caches->own.granularity = Granularity::kv;
    caches->own.asked = {.text = setting.asked.text, .count = 1};
    caches->requirements.emplace(std::span<const Setting>(&caches->own, 1), std::numeric_limits<int>::max());
    caches->looks_at_newest = window_of({&caches->own, 1}) == 1;
    caches->sets_per_head = apart ? shape_.group_size : 1;
    for (const int kv_head : kv_heads_) {
      for (int set = 0; set < caches->sets_per_head; ++set) {
        Lane& lane = caches->lanes.emplace_back();
        lane.kv_head = kv_head;
        lane.first_member = set;
        lane.shape = heads_[kv_head]->shape();
        lane.pays_to_all = caches->schedule.attention == Schedule::Attention::full;
        if (apart) {
          lane.shape.kv_head = lane.shape.kv_head * lane.shape.group_size + set;
          lane.shape.num_kv_heads *= lane.shape.group_size;
          lane.shape.group_size = 1;
        }
        for (int row = 0; row < lane.shape.rows(); ++row) lane.positions.push_back(lane.shape.positions[row]);
        if (caches->policy.masks) lane.seen_since = lane.positions;
      }
    }
    caches_.push_back(std::move(caches));
  }
  for (const auto& caches : caches_) begin(*caches);

  // What any of them holds of the prompt.
  for (const int kv_head : kv_heads_) {
    std::map<int, int> slots;
    for (const auto& caches : caches_) {
      for (const Lane& lane : caches->lanes) {
        if (lane.kv_head != kv_head) continue;
        for (const int position : lane.positions) slots[position] = -1;
        for (const auto& [position, slot] : lane.still_paid) slots[position] = -1;
      }
    }
    const HeadSource& head = *heads_[kv_head];
    const Index depth = shape_.head_dim;
    constexpr Index kAtOnce = 256;
    Buffer keys(kAtOnce * depth);
    Buffer values(kAtOnce * depth);
    for (auto first = slots.begin(); first != slots.end();) {
      auto end = first;
      Index count = 0;
      while (end != slots.end() && count < kAtOnce && end->first == first->first + count) {
        ++end;
        ++count;
      }
      const Index entry = head.entries().count_before(first->first);
      head.read_keys(entry, count, keys.data());
      head.read_values(entry, count, values.data());
      for (Index i = 0; first != end; ++first, ++i) {
        first->second = rows_[kv_head]->add(keys.data() + i * depth, values.data() + i * depth);
      }
    }
    for (const auto& caches : caches_) {
      for (Lane& lane : caches->lanes) {
        if (lane.kv_head != kv_head) continue;
        for (const int position : lane.positions) {
          lane.slots.push_back(slots[position]);
          rows_[kv_head]->hold(lane.slots.back());
        }
        for (auto& [position, slot] : lane.still_paid) {
          slot = slots[position];
          rows_[kv_head]->hold(slot);
        }
      }
    }
    // The prompt's last queries stay at hand, as far as there are.
    const std::span<const int> at_hand = head.query_positions();
    const int some = std::min(window_, contiguous_window(at_hand, shape_.next_position));
    const Index first = static_cast<Index>(at_hand.size()) - some;
    std::vector<Matrix> queries;
    for (int member = 0; member < shape_.group_size; ++member) queries.push_back(head.queries(member, first, some));
    std::vector<float> of_group(static_cast<std::size_t>(shape_.group_size * depth));
    for (Index i = 0; i < some; ++i) {
      for (int member = 0; member < shape_.group_size; ++member) {
        std::copy_n(queries[static_cast<std::size_t>(member)].data() + i * depth, depth,
                    of_group.data() + member * depth);
      }
      rows_[kv_head]->take_queries(at_hand[static_cast<std::size_t>(first + i)], of_group.data());
    }
  }
  for (const auto& caches : caches_) {
    if (!caches->schedule.cuts_prompt_apart || !is_full(*caches)) continue;
    evict(*caches, LiveLayer(*this, *caches, false), position_);
  }
}

LayerDecoding::~LayerDecoding() = default;

// The memories of the prompt, and its eviction.
void LayerDecoding::begin(Caches& caches) {
  caches.last = position_;
  const auto& ranking = caches.policy.ranking();
  for (Lane& lane : caches.lanes) {
    if (!ranking) {
      lane.pattern_memory = caches.policy.pattern()->memory(lane.shape);
      continue;
    }
    lane.memory = ranking->memory(lane.shape);
    if (!lane.memory) continue;
    caches.observes = caches.observes || lane.memory->observes_attention();
    const PromptLane source(*heads_.at(lane.kv_head), lane.shape, lane.first_member, nullptr, nullptr);
    lane.memory->begin(Head(source, combination_bytes_));
  }
  caches.attends = caches.observes || !caches.output.empty();
  const Schedule& schedule = caches.schedule;
  if (schedule.prompt == Schedule::Prompt::wait) return;
  Schedule at_end = schedule;
  if (schedule.cuts_prompt_apart) at_end.attend = Schedule::Attend::after;
  cuts_apart_ = schedule.cuts_prompt_apart;
  std::swap(caches.schedule, at_end);
  if (is_full(caches)) evict(caches, LiveLayer(*this, caches, true), position_);
  std::swap(caches.schedule, at_end);
}

// Where a budget surveys, the prompt is divided among all layers, and stays so: what all of a layer's sets get. A
// capacity that holds the whole prompt is the same for all.
void LayerDecoding::divide(Caches& caches, std::size_t setting) const {
  if (!caches.policy.budget || !caches.policy.budget->surveys()) return;
  const int capacity = std::max(1, caches.capacity - caches.schedule.coming());
  BudgetRequest request = caches.own.budget_request(shape_);
  const auto sets = static_cast<std::size_t>(sets_per_layer(request));
  if (capacity >= shape_.rows()) {
    caches.shares.assign(sets, capacity);
  } else {
    request.capacity = capacity;
    request.surveys = prompt_.surveys(setting, caches.own);
    caches.shares = caches.policy.budget->allocate(request);
  }
  caches.policy.budget = std::make_shared<DividedBudget>(caches.shares, capacity);
}

bool LayerDecoding::is_full(const Caches& caches) const {
  const int apart = caches.schedule.counts_prompt ? 0 : shape_.rows();
  if (caches.shares.empty()) return caches.schedule.is_full(rows_of(caches) - apart, capacity_of(caches));
  return std::ranges::any_of(caches.lanes, [&](const Lane& lane) {
    const int share = caches.shares[caches.shares.size() == 1 ? 0 : static_cast<std::size_t>(lane.shape.kv_head)];
    return caches.schedule.is_full(static_cast<int>(lane.positions.size()) - apart, share + caches.schedule.coming());
  });
}

// What is held against the capacity: the longest cache, and where a budget makes them unequal their mean, rounded down.
int LayerDecoding::rows_of(const Caches& caches) const {
  std::size_t most = 0;
  std::size_t sum = 0;
  for (const Lane& lane : caches.lanes) {
    most = std::max(most, lane.positions.size());
    sum += lane.positions.size();
  }
  const bool is_mean = caches.policy.budget && caches.policy.budget->needs_scores();
  return static_cast<int>(is_mean ? sum / caches.lanes.size() : most);
}

// What the layer's caches may hold: by a budget over layers, the layer's own share.
int LayerDecoding::capacity_of(const Caches& caches) const {
  const auto& budget = caches.policy.budget;
  if (!budget || budget->looks_at_heads()) return caches.capacity;
  Setting asked = caches.own;
  asked.asked.count = caches.capacity;
  HeadShape shape = caches.lanes.front().shape;
  shape.kv_head = 0;
  return std::ranges::max(budget->allocate(asked.budget_request(shape)));
}

// `last_query`: the last one that saw what goes. `observes`: what the newest query paid is told between the decision
// and what comes of it.
void LayerDecoding::evict(Caches& caches, const LayerSource& layer, int last_query, bool observes) {
  Setting setting = caches.own;
  setting.asked.count = std::max(1, caches.capacity - caches.schedule.coming());
  const int rows = rows_of(caches);
  // A cache at its capacity keeps everything, and its scores are asked for as if one had to go.
  const bool only_order = caches.schedule.when_full && setting.asked.count >= rows;
  if (only_order) setting.asked.count = std::max(1, rows - 1);
  ScoresKept scores;
  LayerDecision decision(layer, {&setting, 1}, *caches.requirements, combination_bytes_, &scores);
  for (const Lane& lane : caches.lanes) decision.decide_head(lane.shape.kv_head);
  decision.decide_together(0);
  LayerSets kept = std::move(decision.take()[0]);
  if (observes) observe(caches);
  for (Lane& lane : caches.lanes) {
    const std::vector<int>& positions = kept[static_cast<std::size_t>(lane.shape.kv_head)];
    std::vector<int> left;
    std::size_t next = 0;
    for (std::size_t row = 0; row < lane.positions.size(); ++row) {
      if (only_order || (next < positions.size() && positions[next] == lane.positions[row])) {
        left.push_back(static_cast<int>(row));
        ++next;
      }
    }
    if (caches.policy.masks) {
      hide_rows(lane, left, last_query);
      continue;
    }
    keep_rows(lane,
              ordered(std::move(left), caches.policy.order.value_or(RowOrder::position), scores.of(lane.shape.kv_head),
                      caches.policy.protection().held_by(lane.shape)),
              last_query);
  }
  caches.last = position_;
  caches.capacity += caches.growth;
  if (caches.shares.empty() || caches.growth == 0) return;
  for (int& share : caches.shares) share += caches.growth;
  caches.policy.budget =
      std::make_shared<DividedBudget>(caches.shares, std::max(1, caches.capacity - caches.schedule.coming()));
}

// Queries after `last_query` see `seen`, ascending rows. All others stay in the cache.
void LayerDecoding::hide_rows(Lane& lane, const std::vector<int>& seen, int last_query) {
  auto next = seen.begin();
  for (std::size_t row = 0; row < lane.positions.size(); ++row) {
    int& since = lane.seen_since[row];
    if (next != seen.end() && *next == static_cast<int>(row)) {
      if (since == Lane::kHidden) since = last_query + 1;
      ++next;
    } else if (since != Lane::kHidden) {
      lane.gone.push_back({lane.positions[row], since, last_query});
      since = Lane::kHidden;
    }
  }
  if (lane.memory) lane.memory->mask(seen);
}

// `left`: rows in the order in which they are to stand. All others are gone, and `last_query` saw them last.
void LayerDecoding::keep_rows(Lane& lane, const std::vector<int>& left, int last_query) const {
  std::vector<bool> stays(lane.positions.size(), false);
  for (const int row : left) stays[static_cast<std::size_t>(row)] = true;
  for (std::size_t row = 0; row < stays.size(); ++row) {
    if (stays[row]) continue;
    const int since = lane.seen_since.empty() ? lane.positions[row] : lane.seen_since[row];
    if (since != Lane::kHidden) lane.gone.push_back({lane.positions[row], since, last_query});
    if (lane.pays_to_all) {
      lane.still_paid.emplace_back(lane.positions[row], lane.slots.empty() ? -1 : lane.slots[row]);
    } else if (!lane.slots.empty()) {
      rows_.at(lane.kv_head)->release(lane.slots[row]);
    }
  }
  std::ranges::sort(lane.still_paid, std::greater<>());
  const auto gather = [&left](std::vector<int>& of) {
    if (of.empty()) return;
    std::vector<int> gathered;
    gathered.reserve(left.size() + 1);
    for (const int row : left) gathered.push_back(of[static_cast<std::size_t>(row)]);
    of = std::move(gathered);
  };
  gather(lane.positions);
  gather(lane.slots);
  gather(lane.seen_since);
  lane.shape.positions = CachePositions(lane.positions);
  if (lane.memory) lane.memory->keep(left);
}

void LayerDecoding::step(const TokenRows& token) {
  position_ = token.position;
  const Index depth = shape_.head_dim;
  std::map<int, int> slots;
  for (const int kv_head : kv_heads_) {
    Rows& rows = *rows_.at(kv_head);
    slots[kv_head] = rows.add(token.keys + kv_head * depth, token.values + kv_head * depth);
    rows.hold(slots[kv_head]);  // a cache may lose it before another one takes it up
    rows.take_queries(token.position,
                      token.queries == nullptr ? nullptr : token.queries + Index{kv_head} * shape_.group_size * depth);
  }
  for (const auto& caches : caches_) {
    for (Lane& lane : caches->lanes) {
      lane.positions.push_back(token.position);
      if (caches->policy.masks) lane.seen_since.push_back(token.position);
      lane.slots.push_back(slots.at(lane.kv_head));
      rows_.at(lane.kv_head)->hold(lane.slots.back());
    }
    const Schedule& schedule = caches->schedule;
    const bool gives_output = !caches->output.empty();
    const bool attended = caches->observes || (caches->attends && !schedule.joins_first);
    if (attended) attend(*caches);
    if (!schedule.joins_first) {
      sum_values(*caches);
      observe(*caches);
      leave_behind(*caches);
    }
    const bool due = schedule.is_due(token.position, caches->last, rows_of(*caches), token.ends_turn);
    const bool evicts = due && is_full(*caches);
    if (evicts) {
      for (Lane& lane : caches->lanes) {
        lane.shape.next_position = token.position + 1;
        lane.shape.positions = CachePositions(lane.positions);
      }
      const bool offers = caches->looks_at_newest && token.queries != nullptr;
      if (offers && !attended) attend(*caches);
      for (Lane& lane : caches->lanes) lane.has_newest = offers;
      evict(*caches, LiveLayer(*this, *caches, false), token.position - (schedule.joins_first ? 1 : 0),
            schedule.joins_first);
      for (Lane& lane : caches->lanes) lane.has_newest = false;
    } else if (due && schedule.starts_over) {
      caches->last = token.position;
    }
    if (!schedule.joins_first) continue;
    if (!evicts) observe(*caches);
    if (gives_output && (evicts || !attended)) attend(*caches);
    sum_values(*caches);
    leave_behind(*caches);
  }
  for (const auto& [kv_head, slot] : slots) rows_.at(kv_head)->release(slot);
}

// What a window leaves behind is gone, as far as the policy goes for ever.
void LayerDecoding::leave_behind(Caches& caches) const {
  const auto first_visible = static_cast<int>(shape_.rule.first_visible(position_ + 1));
  const auto is_behind = [first_visible](int position) { return position < first_visible; };
  for (Lane& lane : caches.lanes) {
    if (std::ranges::none_of(lane.positions, is_behind)) continue;
    std::vector<int> left;
    for (std::size_t row = 0; row < lane.positions.size(); ++row) {
      if (!is_behind(lane.positions[row])) left.push_back(static_cast<int>(row));
    }
    keep_rows(lane, left, CacheHistory::kNever);
  }
}

void LayerDecoding::observe(Caches& caches) const {
  for (Lane& lane : caches.lanes) {
    if (lane.memory) {
      lane.memory->observe({.position = position_, .attention = caches.observes ? &lane.attention : nullptr});
    }
  }
}

// What the newest query pays to the rows of every cache, where somebody looks at it.
void LayerDecoding::attend(Caches& caches) {
  for (Lane& lane : caches.lanes) {
    Rows& rows = *rows_.at(lane.kv_head);
    const auto gone = std::ssize(lane.still_paid);
    const auto count = static_cast<Index>(lane.slots.size());
    const int members = lane.shape.group_size;
    Matrix& attention = lane.attention;
    attention.resize(members, gone + count);
    if (caches.reindexed) {
      multiply_reindexed(lane);
    } else {
      for (int member = 0; member < members; ++member) {
        const int of_group = lane.first_member + member;
        for (Index i = 0; i < gone; ++i) {
          attention(member, i) = rows.product(of_group, lane.still_paid[static_cast<std::size_t>(i)].second);
        }
        for (Index row = 0; row < count; ++row) {
          attention(member, gone + row) = rows.product(of_group, lane.slots[static_cast<std::size_t>(row)]);
        }
      }
    }
    scale_logits(attention, lane.shape.rule);
    const bool hides = caches.schedule.attention == Schedule::Attention::live;
    for (std::size_t row = 0; hides && row < lane.seen_since.size(); ++row) {
      if (lane.seen_since[row] != Lane::kHidden) continue;
      attention.col(static_cast<Index>(row)).setConstant(-std::numeric_limits<float>::infinity());
    }
    for (int member = 0; member < members; ++member) {
      softmax(attention.row(member), 0, gone + count, lane.shape.rule.sink(lane.shape.query_head(member)));
    }
    count_exponentials(members * (gone + count));
    if (gone > 0) attention = Matrix(attention.rightCols(count));
  }
}

// Products of a cache's keys at their places and the newest query at the last one, which they become the attention of.
void LayerDecoding::multiply_reindexed(Lane& lane) {
  Rows& rows = *rows_.at(lane.kv_head);
  lane.shape.next_position = position_ + 1;
  lane.shape.positions = CachePositions(lane.positions);
  const LiveHead live(lane, rows, *heads_.at(lane.kv_head), angles_.get());
  Matrix keys(std::ssize(lane.slots), rows.depth());
  live.read_keys(0, keys.rows(), keys.data());
  const auto newest = static_cast<Index>(rows.query_positions().size()) - 1;
  for (int member = 0; member < lane.shape.group_size; ++member) {
    lane.attention.row(member).noalias() = live.queries(member, newest, 1) * keys.transpose();
  }
}

// What that attention gets from the values, where somebody asks for it.
void LayerDecoding::sum_values(Caches& caches) const {
  if (caches.output.empty()) return;
  const Index depth = shape_.head_dim;
  for (const Lane& lane : caches.lanes) {
    const Rows& rows = *rows_.at(lane.kv_head);
    const auto count = static_cast<Index>(lane.slots.size());
    for (int member = 0; member < lane.shape.group_size; ++member) {
      Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(depth);
      for (Index row = 0; row < count; ++row) {
        sum += static_cast<double>(lane.attention(member, row)) *
               Eigen::Map<const Eigen::RowVectorXf>(rows.value(lane.slots[static_cast<std::size_t>(row)]), depth)
                   .cast<double>();
      }
      Eigen::Map<Eigen::RowVectorXf>(
          caches.output.data() + (lane.kv_head * shape_.group_size + lane.first_member + member) * depth, depth) =
          sum.cast<float>();
    }
    count_operations(2 * count * lane.shape.group_size * depth);
  }
  if (outputs_ == Outputs::newest) return;
  const auto width = static_cast<std::ptrdiff_t>(Index{shape_.group_size} * depth);
  for (const int kv_head : kv_heads_) {
    const auto first = caches.output.begin() + kv_head * width;
    caches.outputs.insert(caches.outputs.end(), first, first + width);
  }
}

std::span<const float> LayerDecoding::output(std::size_t setting) const { return caches_[setting]->output; }

std::vector<DecodedSetting> LayerDecoding::take() {
  std::vector<DecodedSetting> all;
  for (const auto& caches : caches_) {
    DecodedSetting& setting = all.emplace_back();
    const auto sets = static_cast<std::size_t>(shape_.num_kv_heads * caches->sets_per_head);
    setting.sets.resize(sets);
    for (Lane& lane : caches->lanes) {
      const auto index = static_cast<std::size_t>(lane.shape.kv_head);
      std::vector<Lane::Span> history = std::move(lane.gone);
      std::erase_if(history, [this](const Lane::Span& gone) { return gone.until < shape_.next_position; });
      for (std::size_t row = 0; row < lane.positions.size(); ++row) {
        const int since = lane.seen_since.empty() ? lane.positions[row] : lane.seen_since[row];
        if (since != Lane::kHidden) history.push_back({lane.positions[row], since, CacheHistory::kNever});
      }
      std::ranges::sort(history);
      CacheHistory& told = setting.sets[index];
      for (const auto& [position, from, until] : history) {
        told.positions.push_back(position);
        told.until.push_back(until);
        if (caches->policy.masks) told.from.push_back(from);
      }
    }
    if (caches->outputs.empty()) continue;
    const Index width = std::ssize(kv_heads_) * shape_.group_size * shape_.head_dim;
    setting.outputs = MatrixView(caches->outputs.data(), std::ssize(caches->outputs) / width, width);
    caches->outputs = {};
  }
  return all;
}

}  // namespace kvreplay
