// What each parameter of a method changes, over all settings of a sweep.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "analysis/summary.h"

namespace kvreplay {

/// One value of a parameter.
struct ParameterValue {
  std::string value;
  double layer_error = 0;  ///< mean over the groups
  double difference = 0;   ///< to the parameter's best value: 0 for that one
};

/// A parameter of a method, compared in groups of settings that agree in everything else: capacity and all other
/// parameters. A group counts only where it has a setting for every value, so that all values are averaged over the
/// same others.
struct ParameterEffect {
  std::string method;     ///< the spec's parts without arguments, as in "restkv+adakv"
  std::string parameter;  ///< "alpha"; "adakv.floor" of a later part; "base.window" within a nested spec
  int groups = 0;         ///< 0: no group has all values, so nothing can be said
  std::vector<ParameterValue>
      values;        ///< ascending where they are numbers, else in the order of the rows; at least two
  double range = 0;  ///< largest less smallest mean
};

/// Of every method with several settings, every parameter that takes several values.
std::vector<ParameterEffect> parameter_effects(const std::vector<PolicyRow>& rows);

/// The rows that a person wants to see of very many.
struct RankingExcerpt {
  std::vector<PolicyRow> rows;  ///< as ranked
  std::size_t left_out = 0;
};

/// Of each capacity with more than `limit` rows, the `best` first ones and the policies whose method has but one
/// setting, which are what the others are compared with. `rows` as PolicyRanking gives them.
RankingExcerpt excerpt(const std::vector<PolicyRow>& rows, std::size_t limit, std::size_t best);

}  // namespace kvreplay
