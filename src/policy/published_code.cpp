#include "policy/published_code.h"

#include <cmath>

namespace kvreplay {
namespace kvpress {

double positions_of_share(double share, int length) {
  // The ratio as a person writes it: 1 − 0.7 is 0.30000000000000004, and what was meant is 0.3.
  constexpr double kWritten = 1e12;
  const double ratio = std::round((1 - share) * kWritten) / kWritten;
  return length * (1 - ratio);
}

std::string with_attention_path(const std::string& summary) {
  return summary +
         " Attention is the model's own, as on kvpress's eager path. Under sdpa it is computed anew, with q_norm for "
         "Qwen3's and Gemma 3's own classes alone, 1/sqrt(head_dim) for every scale and no sliding window: models that "
         "differ there keep other positions.";
}

Schedule decoding_schedule(int interval) {
  return {.interval = interval, .prompt = Schedule::Prompt::wait, .starts_over = true};
}

Parameter interval_parameter() {
  return Parameter::integer("interval", 512, 1, "tokens between evictions: compression_interval")
      .of(Parameter::Step::schedule);
}

std::string decoding(const std::string& summary) {
  return "DecodingPress: the prompt stays whole for the first interval, and survivors stand in the order of their "
         "scores. " +
         summary;
}

}  // namespace kvpress

namespace kvcache_factory {

Parameter heads_parameter() {
  return Parameter::choice("heads", {"query", "kv"}, "whose kept sets are the same: --kv_cache_granularity")
      .of(Parameter::Step::share);
}

Parameter share_parameter() {
  return Parameter::choice("share", {"mean", "max", "sum"},
                           "heads=kv: how a group's scores become one: --gqa_score_agg")
      .of(Parameter::Step::share);
}

}  // namespace kvcache_factory
}  // namespace kvreplay
