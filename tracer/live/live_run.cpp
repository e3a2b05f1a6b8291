#include "tracer/live/live_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "tracer/prompt.h"
#include "tracer/stop_tokens.h"

namespace kvreplay::tracer {

namespace {

// Tokens that go through the model together, of all settings.
constexpr Index kTokensAtOnce = 1024;

// Logits that are held together.
constexpr Index kLogitsAtOnce = Index{16} << 20;

// Settings with a schedule whose caches are held together.
constexpr std::size_t kDecodedAtOnce = 16;

// Which of the settings are worth a run: the first of equal ones, and for each setting the place of its own.
struct Distinct {
  std::vector<const KeptSets*> settings;
  std::vector<std::size_t> place;
};

Distinct distinct(const std::vector<const KeptSets*>& settings) {
  const auto less = [](const KeptSets* a, const KeptSets* b) {
    if (a == nullptr || b == nullptr) return a == nullptr && b != nullptr;
    return a->sets < b->sets;
  };
  std::map<const KeptSets*, std::size_t, decltype(less)> known(less);
  Distinct found;
  for (const KeptSets* setting : settings) {
    const auto [entry, is_new] = known.try_emplace(setting, found.settings.size());
    if (is_new) found.settings.push_back(setting);
    found.place.push_back(entry->second);
  }
  return found;
}

// The distribution of the next token that logits stand for.
struct Prediction {
  double log_sum = 0;  // of the exponentials
  std::int32_t most_likely = 0;

  Prediction() = default;
  explicit Prediction(std::span<const float> logits) : most_likely(tracer::most_likely(logits)) {
    const auto highest = static_cast<double>(logits[static_cast<std::size_t>(most_likely)]);
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - highest);
    log_sum = highest + std::log(sum);
  }
};

// `probabilities` are those of `full`; `next` is the token that came, or −1.
ModelOutcome outcome_of(std::span<const float> full, const Prediction& of_full, std::span<const double> probabilities,
                        std::span<const float> evicted, std::int32_t next) {
  const Prediction of_evicted(evicted);
  // Σ p (ln p − ln q), in which the sums of the exponentials stand apart: equal logits give exactly 0.
  double difference = 0;
  for (std::size_t i = 0; i < full.size(); ++i) {
    difference += probabilities[i] * (static_cast<double>(full[i]) - static_cast<double>(evicted[i]));
  }
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  const auto loss = [next](const Prediction& token, std::span<const float> logits) {
    return next < 0 ? kNone : token.log_sum - static_cast<double>(logits[static_cast<std::size_t>(next)]);
  };
  return {.divergence = std::max(0.0, difference - (of_full.log_sum - of_evicted.log_sum)),
          .loss = loss(of_evicted, evicted),
          .full_loss = loss(of_full, full),
          .same_most_likely = of_full.most_likely == of_evicted.most_likely};
}

std::span<const float> row_of(const std::vector<float>& rows, Index row, Index width) {
  return std::span(rows).subspan(static_cast<std::size_t>(row * width), static_cast<std::size_t>(width));
}

// Of the letters of ASCII, which answers are mostly written in; others stay.
std::string lower_case(std::string text) {
  for (char& letter : text) {
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return text;
}

}  // namespace

LiveRun::LiveRun(const Model& model, Transformer& transformer, HeldRun& run, OnProgress on_progress)
    : model_(model), transformer_(transformer), run_(run), on_progress_(std::move(on_progress)) {}

void LiveRun::report(LiveProgress::Stage stage, double fraction) const {
  if (on_progress_) on_progress_({stage, fraction});
}

void LiveRun::read_prompt() {
  const std::span ids(run_.info().token_ids.data(), static_cast<std::size_t>(run_.eviction_position()));
  const Sequence sequence{ids, &run_.before()};
  report(LiveProgress::Stage::prompt, 0);
  const Buffer states = transformer_.run({&sequence, 1}, &run_);
  const Index width = model_.config.hidden_size;
  prompt_logits_.resize(static_cast<std::size_t>(model_.config.vocab_size));
  transformer_.logits(states.part(states.size() - width, width), 1, prompt_logits_);
  report(LiveProgress::Stage::prompt, 1);
}

KvCache LiveRun::view_of(const KeptSets* setting, Index capacity) const {
  std::vector<std::vector<int>> kept;
  int sets_per_layer = model_.config.num_key_value_heads;
  if (setting == nullptr) {
    kept = run_.everything();
  } else {
    sets_per_layer = setting->sets_per_layer;
    for (const Residency& set : setting->sets) {
      if (!set.is_one_eviction()) {
        throw Error(
            fmt::format("{}: a kept set tells of several evictions, and a live run takes those of one", run_.name()));
      }
      kept.emplace_back(set.kept().begin(), set.kept().end());
    }
  }
  return {run_.before(), kept, sets_per_layer, capacity};
}

std::vector<std::int32_t> LiveRun::write(Index count, const Writing& how) {
  if (count < 1) return {};
  KvCache cache = view_of(nullptr, count);
  Sampler sampler(how.sampling);
  std::vector<std::int32_t> ids = {sampler.next(prompt_logits_)};
  while (static_cast<Index>(ids.size()) < count && !is_over(how.stop_ids, ids.back())) {
    ids.push_back(sampler.next(transformer_.forward({&ids.back(), 1}, cache)));
    report(LiveProgress::Stage::continuation, static_cast<double>(ids.size()) / static_cast<double>(count));
  }
  // What follows the end is of no sequence.
  if (is_over(how.stop_ids, ids.back())) ids.pop_back();
  return ids;
}

void LiveRun::follow(std::span<const std::int32_t> ids, const std::vector<std::string>& pieces) {
  const Sequence sequence{ids, &run_.follow_with(ids, pieces)};
  full_states_ = transformer_.run({&sequence, 1}, &run_);
}

std::vector<std::vector<ModelOutcome>> LiveRun::evict(const std::vector<const KeptSets*>& settings) {
  if (settings.empty()) return {};
  const Distinct different = distinct(settings);
  const Index later = run_.later();
  const std::span ids = std::span(run_.info().token_ids).last(static_cast<std::size_t>(later));
  std::vector<std::vector<ModelOutcome>> outcomes(different.settings.size());
  const auto at_once = static_cast<std::size_t>(std::max<Index>(1, kTokensAtOnce / later));
  for (std::size_t first = 0; first < outcomes.size(); first += at_once) {
    report(LiveProgress::Stage::evicted, static_cast<double>(first) / static_cast<double>(outcomes.size()));
    std::vector<std::size_t> batch(std::min(at_once, outcomes.size() - first));
    std::iota(batch.begin(), batch.end(), first);
    std::vector<KvCache> caches;
    caches.reserve(batch.size());
    std::vector<Sequence> sequences;
    for (const std::size_t setting : batch) {
      caches.push_back(view_of(different.settings[setting], later));
      sequences.push_back({ids, &caches.back()});
    }
    compare(batch, transformer_.run(sequences), outcomes);
  }
  report(LiveProgress::Stage::evicted, 1);
  std::vector<std::vector<ModelOutcome>> all;
  for (const std::size_t place : different.place) all.push_back(outcomes[place]);
  return all;
}

// At the prompt's end, layer by layer.
std::vector<std::unique_ptr<DecodingCaches>> LiveRun::begin_decoding(std::span<const Setting> settings) {
  const int layers = model_.config.num_layers;
  const Execution& execution = transformer_.execution();
  if (!settings.empty() && projections_.empty()) {
    projections_.resize(static_cast<std::size_t>(layers));
    const bool asked = std::ranges::any_of(settings, [](const Setting& setting) {
      return RankingRequirements({&setting, 1}, std::numeric_limits<int>::max()).projected_distance;
    });
    if (asked) {
      execution.share(layers, std::numeric_limits<Index>::max(), [&](Index layer, int) {
        auto& projection = projections_[static_cast<std::size_t>(layer)];
        projection = std::make_unique<LayerProjection>(run_, static_cast<int>(layer));
        projection->compute();
      });
    }
  }
  std::vector<std::unique_ptr<DecodingCaches>> caches;
  for (const Setting& setting : settings) {
    caches.push_back(std::make_unique<DecodingCaches>(run_, setting, projections_));
  }
  const auto pieces = static_cast<Index>(caches.size()) * layers;
  execution.share(pieces, std::numeric_limits<Index>::max(), [&](Index piece, int) {
    caches[static_cast<std::size_t>(piece / layers)]->begin(static_cast<int>(piece % layers));
  });
  return caches;
}

std::vector<LiveRun::Decoded> LiveRun::decode(std::span<const Setting> settings) {
  const Index later = run_.later();
  const Index width = model_.config.hidden_size;
  const std::span ids = std::span(run_.info().token_ids).last(static_cast<std::size_t>(later));
  std::vector<Decoded> decoded(settings.size());
  std::vector<std::vector<ModelOutcome>> outcomes(settings.size());
  for (std::size_t first = 0; first < settings.size(); first += kDecodedAtOnce) {
    const std::size_t count = std::min(kDecodedAtOnce, settings.size() - first);
    const std::vector<std::unique_ptr<DecodingCaches>> caches = begin_decoding(settings.subspan(first, count));
    Buffer states(static_cast<Index>(count) * later * width);
    for (Index token = 0; token < later; ++token) {
      const double done = static_cast<double>(first) + static_cast<double>(count * token) / static_cast<double>(later);
      report(LiveProgress::Stage::decoding, done / static_cast<double>(settings.size()));
      std::vector<Sequence> sequences;
      for (const auto& of_setting : caches) {
        sequences.push_back({ids.subspan(static_cast<std::size_t>(token), 1), nullptr, of_setting.get()});
      }
      const Buffer rows = transformer_.run(sequences);
      for (std::size_t i = 0; i < count; ++i) {
        const auto run = static_cast<Index>(i);
        std::copy_n(rows.data() + run * width, width, states.data() + (run * later + token) * width);
      }
    }
    std::vector<std::size_t> batch(count);
    std::iota(batch.begin(), batch.end(), first);
    compare(batch, states, outcomes);
    for (std::size_t i = 0; i < count; ++i) decoded[first + i].sets = caches[i]->take();
  }
  for (std::size_t i = 0; i < decoded.size(); ++i) decoded[i].outcomes = std::move(outcomes[i]);
  return decoded;
}

// The logits of some tokens at a time, of the full run and of all settings, so that the output head is read once for
// them.
void LiveRun::compare(std::span<const std::size_t> batch, const Buffer& states,
                      std::vector<std::vector<ModelOutcome>>& outcomes) const {
  const Index width = model_.config.hidden_size;
  const Index vocabulary = model_.config.vocab_size;
  const Index later = run_.later();
  const auto runs = static_cast<Index>(batch.size()) + 1;
  const Index at_once = std::clamp<Index>(kLogitsAtOnce / (vocabulary * runs), 1, later);
  const std::vector<std::int32_t>& ids = run_.info().token_ids;
  const Execution& execution = transformer_.execution();
  for (const std::size_t setting : batch) outcomes[setting].resize(static_cast<std::size_t>(later));
  std::vector<float> rows;
  std::vector<float> logits;
  for (Index first = 0; first < later; first += at_once) {
    const Index tokens = std::min(at_once, later - first);
    rows.resize(static_cast<std::size_t>(runs * tokens * width));
    for (Index run = 0; run < runs; ++run) {
      const float* from = run == 0 ? full_states_.data() : states.data() + (run - 1) * later * width;
      std::copy_n(from + first * width, tokens * width, rows.data() + run * tokens * width);
    }
    logits.resize(static_cast<std::size_t>(runs * tokens * vocabulary));
    transformer_.logits(rows, runs * tokens, logits);
    const Index numbers = runs * tokens * vocabulary * 10;
    std::vector<Prediction> of_full(static_cast<std::size_t>(tokens));
    std::vector<std::vector<double>> probabilities(static_cast<std::size_t>(tokens));
    execution.share(tokens, numbers / runs, [&](Index token, int) {
      const std::span<const float> full = row_of(logits, token, vocabulary);
      Prediction& prediction = of_full[static_cast<std::size_t>(token)];
      prediction = Prediction(full);
      std::vector<double>& shares = probabilities[static_cast<std::size_t>(token)];
      shares.resize(full.size());
      std::ranges::transform(full, shares.begin(), [&prediction](float logit) {
        return std::exp(static_cast<double>(logit) - prediction.log_sum);
      });
    });
    execution.share((runs - 1) * tokens, numbers, [&](Index piece, int) {
      const Index token = piece % tokens;
      const Index run = piece / tokens + 1;
      const auto next = static_cast<std::size_t>(run_.eviction_position() + first + token + 1);
      outcomes[batch[static_cast<std::size_t>(run - 1)]][static_cast<std::size_t>(first + token)] =
          outcome_of(row_of(logits, token, vocabulary), of_full[static_cast<std::size_t>(token)],
                     probabilities[static_cast<std::size_t>(token)], row_of(logits, run * tokens + token, vocabulary),
                     next < ids.size() ? ids[next] : -1);
    });
  }
}

std::vector<Generation> LiveRun::generate(const std::vector<const KeptSets*>& kept, std::span<const Setting> scheduled,
                                          Index count, const Writing& how) {
  const Distinct different = distinct(kept);
  const std::size_t views = different.settings.size();
  std::vector<KvCache> caches;
  caches.reserve(views);
  for (const KeptSets* const setting : different.settings) caches.push_back(view_of(setting, count));
  const std::vector<std::unique_ptr<DecodingCaches>> decoding = begin_decoding(scheduled);
  std::vector<Generation> texts(views + scheduled.size());
  std::vector<Sampler> samplers(texts.size(), Sampler(how.sampling));
  const auto add_token = [&](std::size_t i, std::span<const float> token_logits) {
    texts[i].ids.push_back(samplers[i].next(token_logits));
    texts[i].ended = is_over(how.stop_ids, texts[i].ids.back());
  };
  for (std::size_t i = 0; i < texts.size(); ++i) add_token(i, prompt_logits_);
  const Index vocabulary = model_.config.vocab_size;
  const Index at_once = std::max<Index>(1, kLogitsAtOnce / vocabulary);
  std::vector<float> logits;
  for (Index length = 1; length < count; ++length) {
    report(LiveProgress::Stage::generation, static_cast<double>(length) / static_cast<double>(count));
    std::vector<std::size_t> open;
    for (std::size_t i = 0; i < texts.size(); ++i) {
      if (!texts[i].ended) open.push_back(i);
    }
    if (open.empty()) break;
    for (std::size_t first = 0; first < open.size(); first += static_cast<std::size_t>(at_once)) {
      const auto here =
          std::span(open).subspan(first, std::min(static_cast<std::size_t>(at_once), open.size() - first));
      std::vector<Sequence> sequences;
      for (const std::size_t i : here) {
        const bool is_view = i < views;
        sequences.push_back(
            {{&texts[i].ids.back(), 1}, is_view ? &caches[i] : nullptr, is_view ? nullptr : decoding[i - views].get()});
      }
      const Buffer states = transformer_.step(sequences);
      logits.resize(here.size() * static_cast<std::size_t>(vocabulary));
      transformer_.logits(states.part(0, states.size()), static_cast<Index>(here.size()), logits);
      for (std::size_t row = 0; row < here.size(); ++row) {
        add_token(here[row], row_of(logits, static_cast<Index>(row), vocabulary));
      }
    }
  }
  report(LiveProgress::Stage::generation, 1);
  std::vector<Generation> all;
  for (const std::size_t place : different.place) all.push_back(texts[place]);
  std::ranges::move(texts.begin() + static_cast<std::ptrdiff_t>(views), texts.end(), std::back_inserter(all));
  return all;
}

namespace {

// Results of settings that evict once, and of those with a schedule, which are settings themselves.
struct Divided {
  std::vector<const KeptSets*> kept;
  std::vector<Setting> scheduled;
  std::vector<ReplayResult*> results;  // of these and of those

  Divided(std::span<const Setting> settings, TraceReplay& replay) {
    std::vector<ReplayResult*> later;
    for (std::size_t i = 0; i < settings.size(); ++i) {
      ReplayResult& result = replay.results[i];
      if (result.scheduled) {
        scheduled.push_back(settings[i]);
        later.push_back(&result);
      } else {
        kept.push_back(&result.kept);
        results.push_back(&result);
      }
    }
    std::ranges::copy(later, std::back_inserter(results));
  }
};

// The positions that queries see of what the model's caches kept.
void count_cached(const TraceInfo& info, const TraceReplay& replay, ReplayResult& result) {
  Table& table = result.measures[Measure::cache_size];
  table = Table::of_shape(table_shape(traits_of(Measure::cache_size), replay.model.num_layers, replay.extent()));
  auto number = table.numbers.begin();
  for (int layer = 0; layer < replay.model.num_layers; ++layer) {
    const AttentionRule rule = head_shape(info, layer, 0, replay.eviction_position).rule;
    for (int head = 0; head < replay.model.num_attention_heads; ++head) {
      const Residency& set = result.kept.of_query_head(layer, head, replay.model.group_size());
      for (const int position : replay.evaluation_positions) {
        *number++ = static_cast<float>(
            set.count_at(position, replay.eviction_position, static_cast<int>(rule.first_visible(position))));
      }
    }
  }
}

}  // namespace

void measure_live(LiveRun& run, std::span<const Setting> settings, TraceReplay& replay) {
  const Divided divided(settings, replay);
  std::vector<std::vector<ModelOutcome>> outcomes = run.evict(divided.kept);
  std::vector<LiveRun::Decoded> decoded = run.decode(divided.scheduled);
  for (LiveRun::Decoded& of_setting : decoded) {
    ReplayResult& result = *divided.results[outcomes.size()];
    result.kept.sets = std::move(of_setting.sets);
    count_cached(run.run().info(), replay, result);
    outcomes.push_back(std::move(of_setting.outcomes));
  }
  for (std::size_t i = 0; i < outcomes.size(); ++i) {
    ReplayResult& result = *divided.results[i];
    result.live = true;
    for (const auto& [measure, calculate] : formulas<ModelOutcome>()) {
      Table& table = result.measures[measure];
      table = Table::of_shape(table_shape(traits_of(measure), replay.model.num_layers, replay.extent()));
      std::ranges::transform(outcomes[i], table.numbers.begin(), [calculate = calculate](const ModelOutcome& outcome) {
        return static_cast<float>(calculate(outcome));
      });
    }
  }
}

void generate_live(LiveRun& run, std::span<const Setting> settings, TraceReplay& replay, Index count,
                   const Writing& how, const Tokenizer* tokenizer, const std::vector<std::string>& answers) {
  Divided divided(settings, replay);
  divided.kept.insert(divided.kept.begin(), nullptr);
  std::vector<Generation> texts = run.generate(divided.kept, divided.scheduled, count, how);
  const std::vector<std::int32_t>& ids = run.run().info().token_ids;
  const auto prompt = std::span(ids).first(static_cast<std::size_t>(run.run().eviction_position()));
  const std::vector<std::int32_t> full = texts.front().ids;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    Generation& text = texts[i];
    const auto [ours, theirs] = std::ranges::mismatch(text.ids, full);
    if (ours != text.ids.end() || theirs != full.end()) {
      text.first_difference = static_cast<int>(ours - text.ids.begin());
    }
    text.repeated_4grams = repeated_4grams(text.ids);
    if (tokenizer != nullptr) text.text = text_after(*tokenizer, prompt, text.ids);
    if (tokenizer != nullptr && !answers.empty()) {
      const std::string written = lower_case(text.text);
      text.answered = std::ranges::any_of(answers, [&written](const std::string& answer) {
        return written.find(lower_case(answer)) != std::string::npos;
      });
    }
    (i == 0 ? replay.generation : divided.results[i - 1]->generation) = std::move(text);
  }
}

double repeated_4grams(std::span<const std::int32_t> ids) {
  if (ids.size() < 5) return 0;
  std::set<std::array<std::int32_t, 4>> seen;
  std::size_t repeated = 0;
  for (std::size_t i = 0; i + 4 <= ids.size(); ++i) {
    if (!seen.insert({ids[i], ids[i + 1], ids[i + 2], ids[i + 3]}).second) ++repeated;
  }
  return static_cast<double>(repeated) / static_cast<double>(ids.size() - 3);
}

}  // namespace kvreplay::tracer
