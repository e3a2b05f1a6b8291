#include "analysis/retention.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "analysis/student_t.h"
#include "analysis/weighing.h"
#include "base/error.h"
#include "replay/overlap.h"

namespace kvreplay {
namespace {

// Means per layer that has numbers, and over all of them (−1).
class LayerMeans {
 public:
  // What one eviction of a trace gives, one number per layer.
  void add(const std::string& trace, const std::vector<int>& layers, const std::vector<double>& numbers) {
    Mean all;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      of_layers_[layers[i]].add(trace, numbers[i]);
      all.add(numbers[i]);
    }
    of_layers_[-1].add(trace, all.value());
  }

  // By layer, all of them first.
  std::map<int, double> means() const {
    std::map<int, double> means;
    for (const auto& [layer, of_layer] : of_layers_) {
      if (const Mean mean = of_layer.mean(); mean.count() > 0) means[layer] = mean.value();
    }
    return means;
  }

 private:
  std::map<int, MeanOverTraces> of_layers_;
};

// The means of `count` parts of a table's numbers that follow each other.
std::vector<double> means_of_parts(std::span<const float> numbers, std::size_t count) {
  std::vector<double> means;
  const std::size_t size = numbers.size() / count;
  for (std::size_t part = 0; part < count; ++part) {
    Mean mean;
    for (const float number : numbers.subspan(part * size, size)) mean.add(static_cast<double>(number));
    means.push_back(mean.value());
  }
  return means;
}

// A set of positions, quick to intersect with others.
class Positions {
 public:
  Positions(std::span<const int> kept, int count) : words_(static_cast<std::size_t>(count + 63) / 64, 0) {
    for (const int position : kept) {
      words_[static_cast<std::size_t>(position) / 64] |= std::uint64_t{1} << (static_cast<unsigned>(position) % 64);
    }
    size_ = static_cast<std::int64_t>(kept.size());
  }

  std::int64_t size() const { return size_; }

  // Both are of as many positions.
  std::int64_t common_with(const Positions& other) const {
    std::int64_t common = 0;
    for (std::size_t i = 0; i < words_.size(); ++i) common += std::popcount(words_[i] & other.words_[i]);
    return common;
  }

  // 1 for two empty sets.
  double jaccard(const Positions& other) const {
    const std::int64_t common = common_with(other);
    const std::int64_t either = size_ + other.size_ - common;
    return either == 0 ? 1 : static_cast<double>(common) / static_cast<double>(either);
  }

 private:
  std::vector<std::uint64_t> words_;
  std::int64_t size_ = 0;
};

bool keeps_everything(const StoredResult& result, const std::vector<int>& layers) {
  return result.kept_in(layers).share >= 1;
}

std::string name_of(const StoredKeptSets& kept) {
  return fmt::format("{} at {}, {} evicted at {}", kept.policy, kept.capacity_request, kept.trace,
                     kept.eviction_position);
}

// What kept sets and their result have in common.
using Identity = std::tuple<std::string, std::string, std::string, int>;

// `trace` is what the set of results calls it.
template <class Stored>
Identity identity_of(const Stored& stored, const std::string& trace) {
  return {trace, stored.policy, stored.capacity_request, stored.eviction_position};
}

// Throws where sets cannot be those of the result.
void check_fit(const KeptSetsReader& reader, std::size_t index, const StoredResult& result) {
  const StoredKeptSets& kept = reader.kept()[index];
  const auto refuse = [&](const std::string& reason) {
    return Error(fmt::format("{}: /kept/{}: the sets of {} {}; give the files of one replay", reader.path().string(),
                             index, name_of(kept), reason));
  };
  const Granularity stored = result.granularity == Granularity::query ? Granularity::query : Granularity::kv;
  if (kept.granularity != stored) {
    throw refuse(fmt::format("are per {} head, and those of its result per {} head",
                             kept.granularity == Granularity::query ? "query" : "KV",
                             stored == Granularity::query ? "query" : "KV"));
  }
  const int heads = stored == Granularity::query ? result.num_query_heads : result.num_kv_heads;
  const Index needed = Index{result.num_layers} * heads;
  if (kept.num_sets != needed) {
    throw refuse(
        fmt::format("are {}, and its result has {} layers of {} heads", kept.num_sets, result.num_layers, heads));
  }
}

// Results of a trace, by eviction position.
using ByEviction = std::map<int, RetentionSet::Entry>;

// What is kept in the layers of a result, per query head.
std::span<const int> kept_by(const KeptSets& sets, const StoredResult& result, int layer, int head) {
  return sets.of_query_head(layer, head, result.num_query_heads / result.num_kv_heads).kept();
}

// Adds one setting's stability between two evictions, of the positions that are held at both: a row over all layers,
// then one per layer, as far as there are such positions.
void add_stability(const StoredResult& from, const KeptSets& kept_from, const StoredResult& to, const KeptSets& kept_to,
                   const std::vector<int>& layers, std::vector<Stability>& rows) {
  const int before = from.eviction_position;
  Stability row{.trace = from.trace,
                .policy = from.policy,
                .capacity_request = from.capacity_request,
                .from = before,
                .to = to.eviction_position};
  std::vector<Stability> per_layer;
  Mean jaccard;
  Mean returned;
  for (const int layer : layers) {
    Mean layer_jaccard;
    Mean layer_returned;
    const int first_held = to.eviction_position - to.held[static_cast<std::size_t>(layer)];
    if (first_held >= before) continue;
    const auto held_at_both = [&](std::span<const int> kept) {
      return Positions({std::ranges::lower_bound(kept, first_held), std::ranges::lower_bound(kept, before)}, before);
    };
    for (int head = 0; head < from.num_query_heads; ++head) {
      const Positions first = held_at_both(kept_by(kept_from, from, layer, head));
      const Positions later = held_at_both(kept_by(kept_to, to, layer, head));
      layer_jaccard.add(first.jaccard(later));
      const std::int64_t gone = later.size() - first.common_with(later);
      layer_returned.add(later.size() == 0 ? 0 : static_cast<double>(gone) / static_cast<double>(later.size()));
    }
    row.layer = layer;
    row.jaccard = layer_jaccard.value();
    row.returned = layer_returned.value();
    per_layer.push_back(row);
    jaccard.add(row.jaccard);
    returned.add(row.returned);
  }
  if (per_layer.empty()) return;
  row.layer = -1;
  row.jaccard = jaccard.value();
  row.returned = returned.value();
  rows.push_back(row);
  rows.insert(rows.end(), per_layer.begin(), per_layer.end());
}

// Mean overlap between heads of every layer: within groups, and between them. A part is empty where there are no such
// pairs.
struct HeadPairs {
  std::vector<double> within;
  std::vector<double> between;
};

HeadPairs head_pairs(const StoredResult& result, const KeptSets& kept, const std::vector<int>& layers) {
  const bool by_query = kept.granularity == Granularity::query;
  const int group = by_query ? result.num_query_heads / result.num_kv_heads : 1;
  HeadPairs found;
  for (const int layer : layers) {
    const auto residencies = std::span(kept.sets).subspan(static_cast<std::size_t>(layer * kept.sets_per_layer),
                                                          static_cast<std::size_t>(kept.sets_per_layer));
    std::vector<Positions> sets;
    for (const Residency& residency : residencies) {
      sets.emplace_back(residency.kept(), result.eviction_position);
    }
    Mean within;
    Mean between;
    for (std::size_t a = 0; a < sets.size(); ++a) {
      for (std::size_t b = 0; b < a; ++b) {
        const bool same_group = static_cast<int>(a) / group == static_cast<int>(b) / group;
        const bool evicted_once = residencies[a].is_one_eviction() && residencies[b].is_one_eviction();
        (same_group ? within : between)
            .add(evicted_once ? sets[a].jaccard(sets[b])
                              : static_cast<double>(overlap(residencies[a], residencies[b], result.evaluation_positions,
                                                            result.eviction_position)
                                                        .jaccard));
      }
    }
    if (within.count() > 0) found.within.push_back(within.value());
    if (between.count() > 0) found.between.push_back(between.value());
  }
  return found;
}

}  // namespace

std::vector<PolicyOverlap> policy_overlaps(const ResultSet& results) {
  std::set<std::string> with_results;
  for (const StoredResult& result : results.results()) with_results.insert(result.policy);
  struct Pair {
    LayerMeans jaccard;
    LayerMeans containment;
  };
  std::map<std::string, std::vector<std::string>> policies;                             // of a capacity
  std::map<std::string, std::map<std::pair<std::string, std::string>, Pair>> of_pairs;  // of a capacity
  for (const OverlapTable& table : results.overlaps()) {
    const auto of_table = std::ranges::find_if(results.results(), [&table](const StoredResult& result) {
      return result.trace == table.trace && result.eviction_position == table.eviction_position;
    });
    if (of_table == results.results().end()) continue;
    const std::vector<int> layers = results.layers_of(*of_table);
    const std::size_t count = table.policies.size();
    const auto all_layers = static_cast<std::size_t>(of_table->num_layers);
    const std::size_t cells = table.jaccard.numbers.size() / (count * count);
    const auto numbers_of = [&](const Table& numbers, std::size_t pair) {
      const std::vector<double> means =
          means_of_parts(std::span(numbers.numbers).subspan(pair * cells, cells), all_layers);
      std::vector<double> chosen;
      for (const int layer : layers) chosen.push_back(means[static_cast<std::size_t>(layer)]);
      return chosen;
    };
    std::vector<std::string>& known = policies[table.capacity_request];
    for (std::size_t a = 0; a < count; ++a) {
      if (!with_results.contains(table.policies[a])) continue;
      if (std::ranges::find(known, table.policies[a]) == known.end()) known.push_back(table.policies[a]);
      for (std::size_t b = 0; b < count; ++b) {
        Pair& pair = of_pairs[table.capacity_request][{table.policies[a], table.policies[b]}];
        pair.jaccard.add(table.trace, layers, numbers_of(table.jaccard, a * count + b));
        pair.containment.add(table.trace, layers, numbers_of(table.containment, a * count + b));
      }
    }
  }
  std::vector<PolicyOverlap> rows;
  for (const std::string& capacity : results.capacities()) {
    for (const std::string& policy : policies[capacity]) {
      for (const std::string& other : policies[capacity]) {
        const auto found = of_pairs[capacity].find({policy, other});
        if (found == of_pairs[capacity].end()) continue;  // never together
        const std::map<int, double> containment = found->second.containment.means();
        for (const auto& [layer, jaccard] : found->second.jaccard.means()) {
          rows.push_back({.capacity_request = capacity,
                          .layer = layer,
                          .policy = policy,
                          .other = other,
                          .jaccard = jaccard,
                          .containment = containment.at(layer)});
        }
      }
    }
  }
  return rows;
}

std::vector<SpanRecall> span_recalls(const ResultSet& results) {
  std::vector<SpanRecall> rows;
  // Spans of a setting in a trace by their evictions.
  std::map<std::pair<SettingKey, std::string>, std::vector<EvictionKey>> members;
  std::map<std::pair<SettingKey, EvictionKey>, std::size_t> first_member;
  for (const StoredResult& result : results.results()) {
    const SettingKey key{result.policy, result.capacity_request};
    const EvictionKey eviction{result.trace, result.eviction_position};
    std::vector<EvictionKey>& of_trace = members[{key, result.trace}];
    first_member[{key, eviction}] = of_trace.size();
    of_trace.insert(of_trace.end(), result.spans.size(), eviction);
  }
  std::map<std::pair<SettingKey, std::string>, std::vector<double>> weights;
  for (const auto& [key, of_trace] : members) weights[key] = weights_of(of_trace);
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    const StoredResult& result = results.results()[i];
    if (result.spans.empty()) continue;
    const Table table = results.read(i, Measure::span_recall);
    if (table.numbers.empty()) continue;
    const std::vector<int> layers = results.layers_of(result);
    const std::size_t spans = result.spans.size();
    const auto heads = static_cast<std::size_t>(result.num_query_heads);
    for (std::size_t s = 0; s < spans; ++s) {
      SpanRecall row{.trace = result.trace,
                     .label = result.spans[s].label,
                     .start = result.spans[s].start,
                     .depth = static_cast<double>(result.spans[s].start) / result.eviction_position,
                     .eviction_position = result.eviction_position,
                     .policy = result.policy,
                     .capacity_request = result.capacity_request,
                     .oracle = result.oracle,
                     .nothing_to_choose = *result.nothing_to_choose};
      const SettingKey key{row.policy, row.capacity_request};
      row.weight = weights.at({key, row.trace})[first_member.at({key, {row.trace, row.eviction_position}}) + s];
      LayerMeans means;
      LayerMeans shares;
      std::vector<double> of_layers;
      std::vector<double> share_of_layers;  // of those that hold anything of the span
      for (std::size_t l = 0; l < layers.size(); ++l) {
        Mean mean;
        for (std::size_t h = 0; h < heads; ++h) {
          mean.add(static_cast<double>(table.numbers[(l * heads + h) * spans + s]));
        }
        of_layers.push_back(mean.value());
        share_of_layers.push_back(std::isnan(mean.value()) ? mean.value() : result.kept_in({layers[l]}).share);
      }
      means.add(result.trace, layers, of_layers);
      shares.add(result.trace, layers, share_of_layers);
      const std::map<int, double> kept_shares = shares.means();
      for (const auto& [layer, mean] : means.means()) {
        row.layer = layer;
        row.recall = mean;
        row.kept_share = kept_shares.at(layer);
        rows.push_back(row);
      }
    }
  }
  return rows;
}

std::vector<SpanExcess> span_excesses(std::span<const SpanRecall> recalls, double confidence) {
  struct OfSetting {
    SpanExcess row;
    Mean recall;
    Mean kept_share;
    std::map<std::tuple<std::string, int, std::string>, Mean> spans;  // the excess of each
  };
  std::vector<OfSetting> settings;
  std::map<SettingKey, std::size_t> place;
  for (const SpanRecall& recall : recalls) {
    if (recall.layer >= 0 || recall.capacity_request == kAllPositions) continue;
    const auto [found, is_new] = place.try_emplace({recall.policy, recall.capacity_request}, settings.size());
    if (is_new) settings.emplace_back();
    OfSetting& setting = settings[found->second];
    SpanExcess& row = setting.row;
    row.policy = recall.policy;
    row.capacity_request = recall.capacity_request;
    row.oracle = recall.oracle;
    row.nothing_to_choose = row.nothing_to_choose || recall.nothing_to_choose;
    setting.recall.add(recall.recall, recall.weight);
    setting.kept_share.add(recall.kept_share, recall.weight);
    setting.spans[{recall.trace, recall.start, recall.label}].add(recall.recall - recall.kept_share, recall.weight);
  }
  std::vector<SpanExcess> rows;
  std::vector<double> p_values;
  std::vector<std::string> asked_at;
  for (OfSetting& setting : settings) {
    SpanExcess& row = setting.row;
    row.recall = setting.recall.value();
    row.kept_share = setting.kept_share.value();
    row.mean = row.recall - row.kept_share;
    row.spans = static_cast<int>(setting.spans.size());
    double squares = 0;   // of weights
    double variance = 0;  // of the mean, too small by 1 − squares
    bool all_equal = true;
    const double first = setting.spans.begin()->second.value();
    for (const auto& [key, span] : setting.spans) {
      const double weight = span.weight() / setting.recall.weight();
      const double apart = span.value() - row.mean;
      squares += weight * weight;
      variance += weight * weight * apart * apart;
      all_equal = all_equal && span.value() == first;
    }
    if (!all_equal) {
      const double independent = 1 / squares;
      const double error = std::sqrt(variance / (1 - squares));
      const double bound = student_t_bound(confidence, independent - 1);
      // A share is from 0 to 1.
      row.interval = {std::max(row.mean - bound * error, -row.kept_share),
                      std::min(row.mean + bound * error, 1 - row.kept_share)};
      row.p_value = student_t_tails(std::abs(row.mean) / error, independent - 1);
    }
    rows.push_back(row);
    p_values.push_back(row.p_value);
    asked_at.push_back(row.capacity_request);
  }
  p_values = holm_within(p_values, asked_at);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i].adjusted = p_values[i];
  return rows;
}

std::vector<RankAgreement> rank_agreements(const ResultSet& results) {
  std::vector<RankAgreement> rows;
  for (const SettingKey& key : results.settings()) {
    LayerMeans spearman;
    LayerMeans kendall;
    for (const std::size_t i : results.of_setting(key)) {
      const std::vector<int> layers = results.layers_of(results.results()[i]);
      const auto add = [&](Measure measure, LayerMeans& means) {
        const Table table = results.read(i, measure);
        if (!table.numbers.empty())
          means.add(results.results()[i].trace, layers, means_of_parts(table.numbers, layers.size()));
      };
      add(Measure::spearman, spearman);
      add(Measure::kendall, kendall);
    }
    const std::map<int, double> kendalls = kendall.means();
    for (const auto& [layer, mean] : spearman.means()) {
      const auto of_kendall = kendalls.find(layer);
      rows.push_back({.policy = key.policy,
                      .capacity_request = key.capacity_request,
                      .layer = layer,
                      .spearman = mean,
                      .kendall = of_kendall == kendalls.end() ? 0 : of_kendall->second});
    }
  }
  return rows;
}

RetentionSet RetentionSet::open(std::span<const std::filesystem::path> files, const ResultSet& results) {
  RetentionSet set;
  std::map<std::size_t, Entry> found;
  std::map<Identity, std::size_t> place;
  for (std::size_t i = 0; i < results.results().size(); ++i) {
    place.emplace(identity_of(results.results()[i], results.results()[i].trace), i);
  }
  for (const std::filesystem::path& file : files) {
    const std::size_t r = set.readers_.size();
    set.readers_.emplace_back(file);
    const std::vector<StoredKeptSets>& kept = set.readers_[r].kept();
    std::size_t left_out = 0;
    std::size_t repeated = 0;
    for (std::size_t k = 0; k < kept.size(); ++k) {
      const auto result = place.find(identity_of(kept[k], results.trace_called(kept[k].trace)));
      if (result == place.end()) {
        ++left_out;
        continue;
      }
      check_fit(set.readers_[r], k, results.results()[result->second]);
      const Entry entry{result->second, r, k};
      const auto [known, is_new] = found.try_emplace(result->second, entry);
      if (is_new) continue;
      if (set.read(known->second, results).sets != set.read(entry, results).sets) {
        throw Error(fmt::format("{}: the sets of {} differ from those in {}; give only one of the files", file.string(),
                                name_of(kept[k]), set.readers_[known->second.reader].path().string()));
      }
      ++repeated;
    }
    if (left_out == kept.size()) {
      throw Error(fmt::format("{}: {}; give the kept sets of the replay whose results these are", file.string(),
                              kept.empty() ? std::string("holds no kept sets")
                                           : fmt::format("none of its {} kept sets is of one of the results (it begins "
                                                         "with {})",
                                                         kept.size(), name_of(kept.front()))));
    }
    if (left_out > 0) {
      set.notes_.push_back(fmt::format("{}: {} of {} kept sets are of no result that was chosen and are left out",
                                       file.string(), left_out, kept.size()));
    }
    if (repeated > 0) {
      set.notes_.push_back(
          fmt::format("{}: {} kept sets stand in an earlier file too and count once", file.string(), repeated));
    }
  }
  for (const auto& [index, entry] : found) set.entries_.push_back(entry);
  return set;
}

KeptSets RetentionSet::read(const Entry& entry, const ResultSet& results) const {
  const StoredResult& result = results.results()[entry.result];
  const KeptSetsReader& reader = readers_[entry.reader];
  KeptSets sets = reader.read(entry.index, result.num_layers);
  // Under a schedule a result tells what queries see, which is no mean over sets.
  if (std::ranges::all_of(sets.sets, &Residency::is_one_eviction) && sets.mean_size() != result.kept) {
    throw Error(
        fmt::format("{}: /kept/{}: {} positions are kept on average, and its result says {}; give the files of "
                    "one replay",
                    reader.path().string(), entry.index, sets.mean_size(), result.kept));
  }
  return sets;
}

std::vector<HeadOverlap> head_overlaps(const ResultSet& results, const RetentionSet& kept, const ResultSet& averaged) {
  std::set<Identity> counted;
  for (const StoredResult& result : averaged.results()) counted.insert(identity_of(result, result.trace));
  std::map<std::size_t, RetentionSet::Entry> entries;
  for (const RetentionSet::Entry& entry : kept.entries()) entries.emplace(entry.result, entry);
  std::vector<HeadOverlap> rows;
  for (const SettingKey& key : results.settings()) {
    LayerMeans within;
    LayerMeans between;
    for (const std::size_t i : results.of_setting(key)) {
      const StoredResult& result = results.results()[i];
      const auto entry = entries.find(i);
      if (entry == entries.end() || result.granularity == Granularity::layer ||
          !counted.contains(identity_of(result, result.trace))) {
        continue;
      }
      const std::vector<int> layers = results.layers_of(result);
      if (keeps_everything(result, layers)) continue;
      const HeadPairs pairs = head_pairs(result, kept.read(entry->second, results), layers);
      if (!pairs.within.empty()) within.add(result.trace, layers, pairs.within);
      if (!pairs.between.empty()) between.add(result.trace, layers, pairs.between);
    }
    for (const bool in_group : {true, false}) {
      for (const auto& [layer, mean] : (in_group ? within : between).means()) {
        rows.push_back({.policy = key.policy,
                        .capacity_request = key.capacity_request,
                        .layer = layer,
                        .within_group = in_group,
                        .jaccard = mean});
      }
    }
  }
  return rows;
}

std::vector<Stability> stabilities(const ResultSet& results, const RetentionSet& kept) {
  std::vector<std::tuple<std::string, std::string, std::string>> order;  // trace, policy, capacity
  std::map<std::tuple<std::string, std::string, std::string>, ByEviction> evictions;
  for (const RetentionSet::Entry& entry : kept.entries()) {
    const StoredResult& result = results.results()[entry.result];
    if (keeps_everything(result, results.layers_of(result))) continue;
    const std::tuple key(result.trace, result.policy, result.capacity_request);
    if (!evictions.contains(key)) order.push_back(key);
    evictions[key].emplace(result.eviction_position, entry);
  }
  std::vector<Stability> rows;
  for (const auto& key : order) {
    // Three at a time are in memory: of the first eviction, the one before and this one.
    std::optional<KeptSets> first;
    std::optional<KeptSets> before;
    const StoredResult* first_result = nullptr;
    const StoredResult* before_result = nullptr;
    for (const auto& [eviction, entry] : evictions[key]) {
      const StoredResult& result = results.results()[entry.result];
      KeptSets sets = kept.read(entry, results);
      const std::vector<int> layers = results.layers_of(result);
      if (!first) {
        first = std::move(sets);
        first_result = &result;
        continue;
      }
      add_stability(*first_result, *first, result, sets, layers, rows);
      if (before) add_stability(*before_result, *before, result, sets, layers, rows);
      before = std::move(sets);
      before_result = &result;
    }
  }
  return rows;
}

RasterBins RasterBins::of(int positions, int most) {
  return {.positions = positions, .width = std::max(1, (positions + most - 1) / most)};
}

std::vector<KeptRaster> kept_rasters(const ResultSet& results, const RetentionSet& kept, int most_bins,
                                     bool per_layer) {
  std::vector<KeptRaster> rows;
  for (const RetentionSet::Entry& entry : kept.entries()) {
    const StoredResult& result = results.results()[entry.result];
    const KeptSets sets = kept.read(entry, results);
    const RasterBins bins = RasterBins::of(result.eviction_position, most_bins);
    const auto count = static_cast<std::size_t>(bins.count());
    const std::vector<int> layers = results.layers_of(result);
    const auto row_of = [&](int layer, const std::vector<double>& positions, std::span<const int> of_layers) {
      KeptRaster row{.trace = result.trace,
                     .policy = result.policy,
                     .capacity_request = result.capacity_request,
                     .eviction_position = result.eviction_position,
                     .layer = layer,
                     .share = {}};
      for (std::size_t bin = 0; bin < count; ++bin) {
        const int first = static_cast<int>(bin) * bins.width;
        const int end = std::min(first + bins.width, bins.positions);
        double held = 0;
        for (const int each : of_layers) {
          const int first_held = result.eviction_position - result.held[static_cast<std::size_t>(each)];
          held += std::max(0, end - std::max(first, first_held));
        }
        const double share = held == 0 ? 0 : positions[bin] / (held * sets.sets_per_layer);
        row.share.push_back(static_cast<float>(share));
      }
      return row;
    };
    std::vector<double> in_all(count, 0);
    std::vector<KeptRaster> of_layers;
    for (const int layer : layers) {
      std::vector<double> in_layer(count, 0);
      for (int set = 0; set < sets.sets_per_layer; ++set) {
        const Residency& residency = sets.sets[static_cast<std::size_t>(layer * sets.sets_per_layer + set)];
        for (std::size_t bin = 0; bin < count; ++bin) {
          const int first = static_cast<int>(bin) * bins.width;
          in_layer[bin] += residency.mean_kept(first, first + bins.width, result.evaluation_positions);
        }
      }
      for (std::size_t bin = 0; bin < count; ++bin) in_all[bin] += in_layer[bin];
      if (per_layer) of_layers.push_back(row_of(layer, in_layer, {&layer, 1}));
    }
    rows.push_back(row_of(-1, in_all, layers));
    std::ranges::move(of_layers, std::back_inserter(rows));
  }
  return rows;
}

}  // namespace kvreplay
