#include "export/sample_analysis.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace kvreplay::test {
namespace {

Interval around(double mean, double half) { return {mean - half, mean + half}; }

PairedDifference difference(double mean, double half) {
  PairedDifference result;
  result.mean = mean;
  result.interval = around(mean, half);
  result.relative = mean / 0.4;
  result.wins = 0.5 - std::tanh(5 * mean) / 2;
  result.p_value = std::abs(mean) > half ? 0.001 : 0.4;
  result.adjusted = std::min(1.0, 10 * result.p_value);
  result.pairs = 1000;
  return result;
}

}  // namespace

Analysis SampleAnalysis::make() const {
  std::mt19937 generator(7);
  const auto noise = [&generator](double size) {
    return size * (static_cast<double>(generator()) / static_cast<double>(std::mt19937::max()) - 0.5);
  };
  Analysis analysis;
  std::vector<std::string> all = policies;
  if (!oracle.empty()) all.push_back(oracle);
  const auto has = [&](const char* name) { return std::ranges::find(policies, name) != policies.end(); };
  analysis.options.baseline = has("snapkv") ? "snapkv" : policies.front();
  analysis.options.goal = 0.43;
  analysis.oracle = oracle;
  const std::string& baseline = analysis.options.baseline;
  for (const std::string& trace : traces) {
    TraceOverview& overview = analysis.traces.emplace_back();
    overview = {.trace = trace,
                .model = "demo-model",
                .num_layers = num_layers,
                .num_query_heads = num_heads,
                .num_kv_heads = std::max(1, num_heads / 2),
                .prompt_length = prompt_length,
                .eviction_positions = eviction_positions,
                .other_eviction_positions = {},
                .evaluation_queries = 31,
                .spans = {},
                .token_pieces = {}};
    for (int i = 0; spans && i < 5; ++i) {
      const int start = prompt_length * (2 * i + 1) / 10;
      overview.spans.push_back(
          {start, std::min(start + prompt_length / 50 + 1, prompt_length), fmt::format("fact {}", i)});
    }
    for (int i = 0; token_pieces && i < prompt_length; ++i) overview.token_pieces.push_back(i % 5 ? " word" : ".\n");
  }
  const auto kept_at = [&](std::size_t c) {
    return std::min(64.0 * std::pow(2.0, static_cast<double>(c)), 1.0 * prompt_length);
  };
  const auto error_of = [&](std::size_t p, std::size_t c) {
    const bool is_oracle = all[p] == oracle;
    const double rank = static_cast<double>(p) / static_cast<double>(all.size());
    return (is_oracle ? 0.2 : 0.42 + 0.2 * rank) / (1 + 0.35 * static_cast<double>(c));
  };
  std::size_t base = 0;
  while (base + 1 < all.size() && all[base] != baseline) ++base;
  for (std::size_t p = 0; p < all.size(); ++p) {
    CapacityCurve curve;
    curve.policy = all[p];
    curve.oracle = all[p] == oracle;
    for (std::size_t c = 0; c < capacities.size(); ++c) {
      const double mean = error_of(p, c);
      analysis.settings.push_back({all[p], capacities[c]});
      ComparisonRow row;
      row.key.policy = all[p];
      row.key.capacity_request = capacities[c];
      row.oracle = curve.oracle;
      row.kept = kept_at(c);
      row.kept_share = row.kept / prompt_length;
      row.distribution = {mean, mean * 0.95, mean * 1.5, mean * 2};
      row.interval = around(mean, 0.012);
      row.traces = static_cast<int>(traces.size());
      if (all[p] != baseline) row.difference = difference(mean - error_of(base, c), 0.01);
      analysis.comparison.push_back(row);
      curve.points.push_back({capacities[c], row.kept, row.kept_share, mean, row.interval});
      for (int layer = 0; layer < num_layers; ++layer) {
        ComparisonRow of_layer = row;
        of_layer.key.layer = layer;
        of_layer.distribution.mean = mean * (0.6 + 0.8 * layer / num_layers) + noise(0.03);
        of_layer.interval = around(of_layer.distribution.mean, 0.03);
        analysis.by_layer.push_back(of_layer);
        for (int head = 0; head < num_heads; ++head) {
          ComparisonRow of_head = of_layer;
          of_head.key.head = head;
          of_head.distribution.mean = std::max(0.0, of_layer.distribution.mean + noise(0.3));
          analysis.by_head.push_back(of_head);
        }
      }
      if (!oracle.empty() && !curve.oracle) {
        ComparisonRow regret = row;
        regret.difference = difference(mean - error_of(all.size() - 1, c), 0.01);
        analysis.regret.push_back(regret);
      }
    }
    const double last = curve.points.back().mean;
    if (curve.points.size() > 1) curve.area = last;
    if (last <= *analysis.options.goal) {
      curve.kept_for_goal = 64 + 100 * last;
      curve.reached_at_smallest = p == 0;
    }
    analysis.curves.push_back(std::move(curve));
  }
  for (std::size_t c = 0; c < capacities.size(); ++c) {
    for (const auto& [step, change] : {std::pair{"indicator", "method: restkv → attention"},
                                       {"temporal smoothing", "temporal: ema → mean"},
                                       {"temporal smoothing", "temporal: ema → last"},
                                       {"spatial smoothing", "spatial: adaptive → none"},
                                       {"spatial smoothing", "spatial: adaptive → avg"},
                                       {"observation window", "window: 32 → 16"}}) {
      for (int layer = -1; layer < num_layers; ++layer) {
        StepEffect effect;
        effect.reference = "restkv";
        effect.changed = "restkv(…)";
        effect.step = step;
        effect.change = change;
        effect.capacity_request = capacities[c];
        effect.layer = layer;
        effect.difference = difference(0.01 + noise(0.06), 0.015);
        analysis.step_effects.push_back(effect);
      }
    }
    for (const double alpha : alphas) {
      for (const double beta : betas) {
        const double mean = error_of(0, c) + 0.05 * std::pow(alpha - 0.4, 2) + 0.004 * std::abs(std::log2(beta / 1500));
        analysis.parameter_points.push_back({.policy = fmt::format("restkv(alpha={}, beta={})", alpha, beta),
                                             .method = "restkv",
                                             .capacity_request = capacities[c],
                                             .parameters = {{"alpha", alpha}, {"beta", beta}},
                                             .mean = mean,
                                             .interval = around(mean, 0.01)});
      }
    }
    for (int layer = -1; layer < num_layers; ++layer) {
      for (std::size_t p = 0; p < all.size(); ++p) {
        for (std::size_t q = 0; q < all.size(); ++q) {
          const double far = std::abs(static_cast<double>(p) - static_cast<double>(q));
          const double jaccard = p == q ? 1 : std::max(0.05, 0.8 - 0.12 * far + noise(0.05));
          analysis.overlaps.push_back({.capacity_request = capacities[c],
                                       .layer = layer,
                                       .policy = all[p],
                                       .other = all[q],
                                       .jaccard = jaccard,
                                       .containment = std::min(1.0, jaccard * 1.2)});
        }
        const double rank = static_cast<double>(p) / static_cast<double>(all.size());
        analysis.rank_agreements.push_back(
            {all[p], capacities[c], layer, 0.8 - 0.5 * rank + noise(0.1), 0.6 - 0.4 * rank});
        analysis.head_overlaps.push_back({all[p], capacities[c], layer, false, 0.7 - 0.4 * rank + noise(0.1)});
        for (const std::string& trace : traces) {
          for (int i = 0; spans && i < 5; ++i) {
            analysis.span_recalls.push_back(
                {.trace = trace,
                 .label = fmt::format("fact {}", i),
                 .depth = 0.1 + 0.2 * i,
                 .eviction_position = prompt_length,
                 .policy = all[p],
                 .capacity_request = capacities[c],
                 .layer = layer,
                 .recall = std::clamp(0.9 - rank + noise(0.4) + 0.1 * static_cast<double>(c), 0.0, 1.0)});
          }
        }
      }
    }
    if (!kept_sets) continue;
    for (std::size_t p = 0; p < all.size(); ++p) {
      for (const std::string& trace : traces) {
        KeptRaster raster{.trace = trace,
                          .policy = all[p],
                          .capacity_request = capacities[c],
                          .eviction_position = prompt_length,
                          .layer = -1,
                          .share = {}};
        const RasterBins bins{.positions = prompt_length, .width = (prompt_length + 511) / 512};
        for (int bin = 0; bin < bins.count(); ++bin) {
          const bool late = bin > bins.count() * 9 / 10 || bin == 0;
          raster.share.push_back(static_cast<float>(late ? 0.9 : std::max(0.0, 0.2 + noise(0.7))));
        }
        analysis.rasters.push_back(raster);
        for (std::size_t to = 1; to < eviction_positions.size(); ++to) {
          analysis.stabilities.push_back({.trace = trace,
                                          .policy = all[p],
                                          .capacity_request = capacities[c],
                                          .layer = -1,
                                          .from = eviction_positions.front(),
                                          .to = eviction_positions[to],
                                          .jaccard = 0.8 - 0.15 * static_cast<double>(to) + noise(0.2),
                                          .returned = 0.1 * static_cast<double>(to) + noise(0.05)});
        }
      }
    }
  }
  if (has("restkv") && token_pieces) {
    ImportanceMap map;
    map.layer = 3;
    map.head = 1;
    map.policy = "restkv";
    map.capacity = 128;
    const RasterBins bins{.positions = prompt_length - 32, .width = (prompt_length + 511) / 512};
    map.bin_width = bins.width;
    map.positions = bins.positions;
    map.width = 9;
    map.shift = 2;
    std::vector<float> average(static_cast<std::size_t>(bins.count()), 0);
    for (int q = 0; q < 32; ++q) {
      map.query_positions.push_back(prompt_length - 32 + q);
      std::vector<float> raw;
      for (std::size_t bin = 0; bin < average.size(); ++bin) {
        raw.push_back(static_cast<float>(std::pow(std::abs(noise(2)), 6) * (bin % 40 == 0 ? 8 : 1)));
        average[bin] = q == 0 ? raw.back() : 0.7F * average[bin] + 0.3F * raw.back();
      }
      map.raw.push_back(std::move(raw));
      map.temporal.push_back(average);
    }
    map.spatial = average;
    analysis.importance.push_back(std::move(map));
  }
  if (live) {
    LossPredictions& loss = analysis.loss_predictions;
    loss.predictors = {{Measure::layer_error, false}, {Measure::layer_error, true}, {Measure::cosine, false}};
    for (const std::string& trace : traces) {
      for (std::size_t p = 0; p < policies.size(); ++p) {
        for (std::size_t c = 0; c < capacities.size(); ++c) {
          const double error = error_of(p, c) + noise(0.05);
          const double divergence = std::pow(error, 4) * std::exp(noise(2));
          loss.settings.push_back(
              {trace, prompt_length, policies[p], capacities[c], divergence, {error, error * error, 1 - error}});
        }
      }
    }
    double mean = 0.8;
    for (const std::size_t which : {1U, 0U, 2U}) {
      Prediction& prediction = loss.predictions.emplace_back();
      prediction.predictor = loss.predictors[which];
      prediction.all = mean + 0.1;
      prediction.mean = mean;
      prediction.interval = around(mean, 0.15);
      prediction.smallest = mean - 0.4;
      prediction.prompts = static_cast<int>(traces.size());
      prediction.groups = static_cast<int>(capacities.size()) * prediction.prompts;
      for (const std::string& capacity : capacities) prediction.of_capacity[capacity] = mean + noise(0.1);
      mean -= 0.2;
    }
  }
  if (steps > 0) {
    const StepBins bins = StepBins::of(steps, 128);
    std::vector<std::string> scheduled(policies.begin(),
                                       policies.begin() + std::min<std::ptrdiff_t>(20, std::ssize(policies)));
    if (!oracle.empty()) scheduled.push_back(oracle);
    for (std::size_t p = 0; p < scheduled.size(); ++p) {
      for (std::size_t c = 0; c < capacities.size(); ++c) {
        for (const Measure measure : {Measure::layer_error, Measure::cache_size, Measure::late_hits}) {
          TimeCourse course{
              .policy = scheduled[p], .capacity_request = capacities[c], .measure = measure, .points = {}};
          for (int bin = 0; bin < bins.count(); ++bin) {
            const double mean = measure == Measure::cache_size ? 64.0 * static_cast<double>(c + 1) + bin % 8
                                                               : error_of(p, c) + noise(0.02);
            course.points.push_back({bins.first_step(bin), bins.last_step(bin), mean, 0.8 * mean, 1.3 * mean});
          }
          analysis.time_courses.push_back(std::move(course));
        }
        const auto survives = [&](const std::string& trace, const std::string& label, int start) {
          SpanSurvival survival{.policy = scheduled[p],
                                .capacity_request = capacities[c],
                                .trace = trace,
                                .label = label,
                                .start = start,
                                .points = {}};
          for (int bin = 0; bin < bins.count(); ++bin) {
            survival.points.push_back({bins.first_step(bin), bins.last_step(bin), std::exp(-0.02 * bin)});
          }
          analysis.span_survivals.push_back(std::move(survival));
        };
        if (spans) {
          survives("", "", 0);
          for (const std::string& trace : traces) survives(trace, "needle", 300);
        }
        for (const std::string& trace : traces) {
          if (!kept_sets) continue;
          ResidencyRaster raster{.trace = trace,
                                 .policy = scheduled[p],
                                 .capacity_request = capacities[c],
                                 .eviction_position = prompt_length,
                                 .steps = StepBins::of(steps, 64),
                                 .positions = RasterBins::of(prompt_length + steps, 512),
                                 .share = {}};
          for (int step = 0; step < raster.steps.count(); ++step) {
            for (int bin = 0; bin < raster.positions.count(); ++bin) {
              const bool has_come = bin * raster.positions.width < prompt_length + raster.steps.last_step(step);
              raster.share.push_back(has_come ? static_cast<float>(0.5 + noise(0.4)) : std::nanf(""));
            }
          }
          analysis.residency_rasters.push_back(std::move(raster));
        }
      }
    }
  }
  analysis.notes.emplace_back("numbers of a test");
  return analysis;
}

}  // namespace kvreplay::test
