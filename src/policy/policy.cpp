#include "policy/policy.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/printable.h"
#include "kernels/kernels.h"

namespace kvreplay {
namespace {

using Registry = std::map<std::string, Method, std::less<>>;

bool is_name(const std::string& text) {
  try {
    const std::vector<SpecPart> parts = parse_spec(text);
    return parts.size() == 1 && parts[0].name == text;
  } catch (const UsageError&) {
    return false;
  }
}

void add_methods(Registry& registry, std::vector<Method> methods) {
  std::set<std::string> names;
  for (const Method& method : methods) {
    const std::string name = written_name(method);
    if (!is_name(method.name)) {
      throw Error(fmt::format("'{}' cannot be a method's name: no spec could hold it", printable(method.name)));
    }
    if (!method.compose) throw Error(fmt::format("the method '{}' has no compose function", name));
    if (registry.contains(name) || !names.insert(name).second) {
      throw Error(fmt::format("there is a method '{}' already; choose another name", name));
    }
  }
  for (Method& method : methods) {
    std::string name = written_name(method);
    registry.emplace(std::move(name), std::move(method));
  }
}

Registry& registry() {
  static Registry methods = [] {
    Registry built_in;
    add_methods(built_in, MethodRegistration::methods());
    return built_in;
  }();
  return methods;
}

const Method& method_for(const SpecPart& part, bool first) {
  const std::string as_step = fmt::format("+{}", part.name);
  const Method* method = find_method(first ? part.name : as_step);
  if (method != nullptr) return *method;
  if (find_method(first ? as_step : part.name) != nullptr) {
    throw UsageError(
        first ? fmt::format("'{0}' is a step of a policy; write it after one, as in snapkv+{0}", part.name)
              : fmt::format("'{}' is a policy; after '+' stands a budget, a selection, a protection or a schedule",
                            part.name));
  }
  std::vector<std::string> names;
  for (const auto& [name, candidate] : registry()) {
    if ((candidate.step == Method::Step::policy) == first) names.push_back(candidate.name);
  }
  throw UsageError(fmt::format("unknown {} '{}'.{} Known: {}; one of your own comes with --plugin",
                               first ? "policy" : "step", part.name, suggestion(part.name, names),
                               fmt::join(names, ", ")));
}

void add_step(Policy& policy, const SpecPart& part, Composition&& step) {
  if (policy.refinement) {
    throw UsageError(fmt::format("{} keeps exactly the capacity in every set, as it finds best; leave out '+{}'",
                                 policy.canonical, part.name));
  }
  if (policy.pattern() && policy.pattern()->capacity_rule() != Pattern::CapacityRule::asked) {
    throw UsageError(fmt::format("'{}' does not go by a capacity, so '+{}' would change nothing; leave it out",
                                 policy.canonical, part.name));
  }
  if (step.budget) {
    if (policy.budget) throw UsageError(fmt::format("'{}' is a second budget; a policy has one", part.name));
    if (step.budget->needs_scores() && !policy.ranking()) {
      throw UsageError(
          fmt::format("'{}' divides the capacity by scores, and '{}' has none", part.name, policy.canonical));
    }
    policy.budget = std::move(step.budget);
  }
  if (step.selection) {
    if (policy.selection) throw UsageError(fmt::format("'{}' is a second selection; a policy has one", part.name));
    if (!policy.ranking()) {
      throw UsageError(fmt::format("'{}' selects by scores, and '{}' has none", part.name, policy.canonical));
    }
    policy.selection = std::move(step.selection);
  }
  if (step.protect.count() > 0) {
    if (policy.protect.count() > 0) {
      throw UsageError(fmt::format("'{}' is a second protection; a policy has one", part.name));
    }
    policy.protect = step.protect;
  }
  if (step.schedule) policy.schedule = step.schedule;  // in place of a published code's own
  if (step.pin.prompt) policy.pin = step.pin;
  if (step.order) policy.order = step.order;
  if (step.row_positions) policy.row_positions = step.row_positions;
  std::ranges::move(step.notes, std::back_inserter(policy.notes));
}

// What goes with a schedule alone.
void check_schedule(const Policy& policy) {
  if (policy.refinement && policy.schedule) {
    throw UsageError(
        fmt::format("{} looks for the best sets of one eviction, which a schedule has no end of", policy.canonical));
  }
  if (policy.pattern() && policy.schedule && policy.protect.count() > 0 && policy.pattern()->memory({})) {
    throw UsageError(
        fmt::format("'{}' goes on from the rows that it left before, and what is protected beside it would "
                    "shift them; leave out the protection",
                    policy.canonical));
  }
  if (policy.schedule && policy.schedule->attention == Schedule::Attention::full &&
      policy.row_positions == RowPositions::reindexed) {
    throw UsageError(
        fmt::format("'{}': attention=full is that of the run without eviction, in which no position is another; leave "
                    "out one of the two",
                    policy.canonical));
  }
  if (policy.masks && (policy.order == RowOrder::score || policy.row_positions == RowPositions::reindexed)) {
    throw UsageError(fmt::format("'{}' hides rows where they stand, and none moves; leave out '+{}'", policy.canonical,
                                 policy.order == RowOrder::score ? "order" : "positions"));
  }
  if (policy.across_layers) {
    const std::string_view unfit = policy.budget                                     ? "a budget"
                                   : policy.row_positions == RowPositions::reindexed ? "reindexed positions"
                                                                                     : "";
    if (!unfit.empty()) {
      throw UsageError(
          fmt::format("'{}' keeps the same positions in all layers, which does not go together with {}; leave it out",
                      policy.canonical, unfit));
    }
  }
  if (policy.schedule || policy.row_positions == RowPositions::reindexed) return;
  const std::string_view alone = policy.pin.prompt ? "pin" : policy.order ? "order" : "";
  if (alone.empty()) return;
  throw UsageError(fmt::format("'{}': '+{}' is about evictions after the prompt, and there is none; add '+every'",
                               policy.canonical, alone));
}

}  // namespace

std::string_view name_of(Granularity granularity) {
  switch (granularity) {
    case Granularity::query:
      return "query";
    case Granularity::kv:
      return "kv";
    case Granularity::layer:
      return "layer";
  }
  return "";
}

std::string_view name_of(Share share) {
  switch (share) {
    case Share::mean:
      return "mean";
    case Share::max:
      return "max";
    case Share::sum:
      return "sum";
  }
  return "";
}

std::optional<Granularity> granularity_named(std::string_view name) {
  for (const Granularity granularity : {Granularity::query, Granularity::kv, Granularity::layer}) {
    if (name == name_of(granularity)) return granularity;
  }
  return std::nullopt;
}

std::optional<Share> share_named(std::string_view name) {
  for (const Share share : {Share::mean, Share::max, Share::sum}) {
    if (name == name_of(share)) return share;
  }
  return std::nullopt;
}

std::vector<float> Budget::survey(const Head& /*head*/, std::span<const float> /*scores*/,
                                  Protection /*protection*/) const {
  return {};
}

void Ranking::smooth(const Head& /*head*/, int /*member*/, int /*capacity*/, std::span<float> /*scores*/) const {}

void Ranking::stages(const Head& /*head*/, int /*member*/, int /*capacity*/, const StageReceiver& /*take*/) const {}

void Ranking::refine(const Head& /*head*/, std::span<const int> /*members*/, int /*capacity*/,
                     std::span<float> /*scores*/) const {}

int sets_per_layer(const BudgetRequest& request) {
  switch (request.granularity) {
    case Granularity::query:
      return request.num_query_heads;
    case Granularity::kv:
      return request.num_kv_heads;
    case Granularity::layer:
      return 1;
  }
  return 1;
}

std::vector<int> Pattern::keep_again(const HeadShape& shape, int member, int capacity,
                                     PatternMemory& /*memory*/) const {
  return keep(shape, member, capacity);
}

int Pattern::minimum_capacity(const HeadShape& shape) const { return std::max(1, protection().held_by(shape).count()); }

namespace {

// What a rule holds of a kind; null where it is of the other.
template <class Kind>
const std::shared_ptr<const Kind>& held_in(const decltype(Policy::rule)& rule) {
  static const std::shared_ptr<const Kind> none;
  const auto* const held = std::get_if<std::shared_ptr<const Kind>>(&rule);
  return held != nullptr ? *held : none;
}

}  // namespace

const std::shared_ptr<const Ranking>& Policy::ranking() const { return held_in<Ranking>(rule); }

const std::shared_ptr<const Pattern>& Policy::pattern() const { return held_in<Pattern>(rule); }

Protection Policy::protection() const {
  const Protection own = ranking() ? ranking()->protection() : pattern()->protection();
  return {.sinks = std::max(own.sinks, protect.sinks),
          .window = std::max(own.window, protect.window),
          .prompt = pin.prompt};
}

Requirements Policy::requirements() const {
  Requirements all = ranking() ? ranking()->requirements() : Requirements{};
  if (!budget) return all;
  Requirements of_budget = budget->requirements();
  std::ranges::move(of_budget.needs, std::back_inserter(all.needs));
  std::ranges::move(of_budget.combinations, std::back_inserter(all.combinations));
  return all;
}

int Policy::minimum_capacity(const HeadShape& shape) const {
  if (pattern()) return pattern()->minimum_capacity(shape) + protect.held_by(shape).count();
  return std::max(1, protection().held_by(shape).count());
}

std::vector<int> Policy::draw(const HeadShape& shape, int member, int capacity, PatternMemory* memory) const {
  if (memory != nullptr) return pattern()->keep_again(shape, member, capacity, *memory);
  const Protection beside = protect.held_by(shape);
  if (beside.count() == 0) return pattern()->keep(shape, member, capacity);
  // As much of the pattern as there is room for.
  for (int granted = capacity;; --granted) {
    std::vector<int> rows = pattern()->keep(shape, member, granted);
    for (int row = 0; row < beside.sinks; ++row) rows.push_back(row);
    for (int row = shape.rows() - beside.window; row < shape.rows(); ++row) rows.push_back(row);
    std::ranges::sort(rows);
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    if (static_cast<int>(rows.size()) <= capacity || granted <= capacity - beside.count()) return rows;
  }
}

Protection Protection::held_by(const HeadShape& shape) const {
  const int first = shape.held_of_first(prompt ? std::max(sinks, shape.prompt_length) : sinks);
  const int last = window == 0 ? 0 : shape.rows() - shape.positions.leading_before(shape.next_position - window);
  return {.sinks = first, .window = std::min(last, shape.rows() - first)};
}

void register_methods(std::vector<Method> methods) { add_methods(registry(), std::move(methods)); }

std::vector<const Method*> registered_methods() {
  std::vector<const Method*> methods;
  for (const auto& [name, method] : registry()) methods.push_back(&method);
  std::ranges::stable_sort(methods, {}, [](const Method* method) { return method->step; });
  return methods;
}

std::string written_name(const Method& method) {
  return fmt::format("{}{}", method.step == Method::Step::policy ? "" : "+", method.name);
}

std::string signature(const Method& method) {
  std::string parameters;
  for (const Parameter& parameter : method.parameters) {
    parameters += fmt::format("{}{}={}", parameters.empty() ? "" : ", ", parameter.name,
                              parameter.kind == Parameter::Kind::file ? "FILE" : parameter.default_value);
  }
  return written_name(method) + (parameters.empty() ? "" : fmt::format("({})", parameters));
}

const Method* find_method(std::string_view written_name) {
  const auto found = registry().find(written_name);
  return found == registry().end() ? nullptr : &found->second;
}

Policy make_policy(std::string_view spec) {
  const std::vector<SpecPart> parts = parse_spec(spec);
  Policy policy;
  bool scheduled = false;  // by a step, which replaces a published code's own
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Method& method = method_for(parts[i], i == 0);
    const Arguments arguments(parts[i], method.parameters);
    Composition step = method.compose(arguments);
    if (i == 0) {
      policy = std::move(step);
      policy.canonical = arguments.canonical();
    } else {
      const auto is_again = [&](const SpecPart& part) { return part.name == parts[i].name; };
      if (method.step == Method::Step::schedule &&
          std::any_of(parts.begin() + 1, parts.begin() + static_cast<std::ptrdiff_t>(i), is_again)) {
        throw UsageError(fmt::format("'{}' is given twice; a policy has one", parts[i].name));
      }
      if (step.schedule && scheduled)
        throw UsageError(fmt::format("'{}' is a second schedule; a policy has one", parts[i].name));
      scheduled = scheduled || step.schedule;
      add_step(policy, parts[i], std::move(step));
      policy.canonical += fmt::format("+{}", arguments.canonical());
    }
  }
  check_schedule(policy);
  if (policy.row_positions == RowPositions::reindexed && !policy.schedule) {
    policy.schedule = Schedule{.interval = Schedule::kOnce};
  }
  return policy;
}

Policy make_policy(std::string_view spec, const Arguments& values) {
  std::string filled;
  for (std::size_t at = 0; at < spec.size();) {
    const std::size_t open = std::min(spec.find('{', at), spec.size());
    filled += spec.substr(at, open - at);
    if (open == spec.size()) break;
    const std::size_t close = spec.find('}', open);
    filled += values.text(spec.substr(open + 1, close - open - 1));
    at = close + 1;
  }
  return make_policy(filled);
}

std::vector<int> select_top(std::span<const float> scores, Protection protection, int capacity) {
  const int size = static_cast<int>(scores.size());
  if (capacity >= size) {
    std::vector<int> all(scores.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  const int first = std::min(protection.sinks, size);
  const int last = std::max(first, size - protection.window);
  const auto ranked = scores.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first));
  if (kernels::has_nan(ranked)) {
    const auto found = std::ranges::find_if(ranked, [](float score) { return std::isnan(score); });
    throw Error(fmt::format("the score of position {} is not a number", first + (found - ranked.begin())));
  }
  thread_local std::vector<std::uint32_t> best;
  kernels::largest(ranked, capacity - first - (size - last), best);
  std::vector<int> kept(static_cast<std::size_t>(first));
  kept.reserve(best.size() + static_cast<std::size_t>(first + size - last));
  std::iota(kept.begin(), kept.end(), 0);
  for (const std::uint32_t offset : best) kept.push_back(first + static_cast<int>(offset));
  for (int position = last; position < size; ++position) kept.push_back(position);
  return kept;
}

}  // namespace kvreplay
