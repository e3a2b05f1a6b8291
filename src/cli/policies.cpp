#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/plugins.h"
#include "notebooks-export/tables/tables.h"
#include "policy/policy.h"
#include "policy/spec.h"

namespace kvreplay::cli {
namespace {

std::string step_of(const Method& method) {
  switch (method.step) {
    case Method::Step::policy:
      return "policy";
    case Method::Step::budget:
      return "budget";
    case Method::Step::selection:
      return "selection";
    case Method::Step::protection:
      return "protection";
    case Method::Step::schedule:
      return "schedule";
  }
  return "";
}

std::string_view described(Granularity granularity) {
  switch (granularity) {
    case Granularity::query:
      return "query head";
    case Granularity::kv:
      return "KV head";
    case Granularity::layer:
      return "layer";
  }
  return "";
}

std::string described_source(const Method& method) {
  return method.revision.empty() ? fmt::format("source: {}", method.source)
                                 : fmt::format("source: {}; as of {}", method.source, method.revision);
}

void list_methods() {
  for (const Method* method : registered_methods()) {
    if (!method->variant_of.empty()) continue;
    fmt::print("{}{}{}", wrapped(signature(*method), 0), wrapped(method->summary, 4), wrapped(method->source, 4));
  }
  fmt::print(
      "\nA spec names a policy and the parameters that differ from their defaults, as in restkv(alpha=0.5).\n"
      "'kvreplay policies NAME' explains one, 'kvreplay policies SPEC' says what a spec means, and\n"
      "'kvreplay variants NAME' how implementations of one method differ.\n");
}

// A cell of a Markdown table.
std::string cell(const std::string& text) {
  std::string escaped;
  for (const char c : text) escaped += c == '|' ? std::string("\\|") : std::string(1, c);
  return escaped;
}

// docs/policies.md.
void print_page() {
  fmt::print(R"(# Policies

Every method with its parameters and their defaults, as `kvreplay policies` lists them (`--markdown` prints this page). A spec
names a policy and the parameters that differ: `restkv(alpha=0.5)`. After a `+` stands a budget, a selection, a protection or a [schedule](decode.md):
`restkv+adakv(floor=0.5)`, `snapkv(kernel=7)+pyramid+chunks+protect(first=4)`. The file of each method, in `src/policy/`, says
where paper and authors' code differ and which is followed. Oracles: [oracles](oracles.md).

| spec | idea | source |
|---|---|---|
)");
  for (const Method* method : registered_methods()) {
    if (!method->variant_of.empty()) continue;
    fmt::print("| `{}` | {} | {} |\n", cell(signature(*method)), cell(method->summary), cell(method->source));
  }
  fmt::print(R"(
Variants are what published codes do, at the commit or release that is named. Side by side: `kvreplay variants snapkv`.

| variant | what it does | source | as of |
|---|---|---|---|
)");
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) continue;
    fmt::print("| `{}` | {} | {} | {} |\n", cell(signature(*method)), cell(method->summary), cell(method->source),
               cell(method->revision));
  }
}

void explain_method(const Method& method) {
  fmt::print("{} ({})\n{}{}", written_name(method), step_of(method), wrapped(method.summary, 2),
             wrapped(described_source(method), 2));
  if (method.parameters.empty()) {
    fmt::print("  no parameters\n");
    return;
  }
  fmt::print("\n");
  std::vector<std::vector<std::string>> rows = {{"parameter", "default", "values"}};
  for (const Parameter& parameter : method.parameters) {
    rows.push_back({parameter.name + ": " + parameter.description, parameter.default_value, parameter.legal_values()});
  }
  fmt::print("{}", aligned_table(rows));
}

void explain_spec(const std::string& spec) {
  if (spec.starts_with('+')) {
    throw UsageError(fmt::format("'{0}' is a step of a policy; write it after one, as in snapkv{0}", spec));
  }
  const Policy policy = make_policy(spec);
  fmt::print("canonical: {}\n", policy.canonical);
  bool first = true;
  for (const SpecPart& part : parse_spec(spec)) {
    const Method& method = *find_method(fmt::format("{}{}", first ? "" : "+", part.name));
    first = false;
    const Arguments arguments(part, method.parameters);
    fmt::print("\n");
    explain_method(method);
    if (method.parameters.empty()) continue;
    fmt::print("\nhere:");
    for (const Parameter& parameter : method.parameters) {
      fmt::print(" {}={}", parameter.name, arguments.text(parameter.name));
    }
    fmt::print("\n");
  }
  fmt::print("\nkept sets: one per {}; scores shared by their {}; smallest capacity {}\n",
             described(policy.granularity.value_or(Granularity::kv)), name_of(policy.share.value_or(Share::mean)),
             policy.minimum_capacity());
}

void explain_variants(const std::string& name) {
  std::vector<const Method*> variants;
  std::vector<std::string> with_variants;
  for (const Method* method : registered_methods()) {
    if (method->variant_of.empty()) continue;
    if (method->variant_of == name) variants.push_back(method);
    if (with_variants.empty() || with_variants.back() != method->variant_of)
      with_variants.push_back(method->variant_of);
  }
  if (variants.empty()) {
    throw UsageError(fmt::format("'{}' has no variants. Methods that have: {}", name, fmt::join(with_variants, ", ")));
  }
  fmt::print("{}", wrapped(fmt::format("{}: {}", name, find_method(name)->summary), 0));
  std::string specs = name;
  for (const Method* variant : variants) {
    const Policy policy = make_policy(variant->name);
    fmt::print("\n{}\n{}{}  kept sets: one per {}\n", variant->name, wrapped(variant->summary, 2),
               wrapped(described_source(*variant), 2), described(policy.granularity.value_or(Granularity::kv)));
    for (const Parameter& parameter : variant->parameters) {
      fmt::print("  {}={}: {}\n", parameter.name, parameter.default_value, parameter.description);
    }
    specs += " " + variant->name;
  }
  fmt::print("\nSide by side: kvreplay replay TRACE --policy {} --capacity 128\n", specs);
}

}  // namespace

void add_variants_command(CLI::App& app) {
  auto name = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("variants", "Say how published implementations of one method differ");
  command->add_option("method", *name, "A method's name, such as snapkv")->required()->type_name("METHOD");
  command->callback([name]() { explain_variants(*name); });
}

void add_policies_command(CLI::App& app) {
  auto name = std::make_shared<std::string>();
  auto markdown = std::make_shared<bool>(false);
  CLI::App* command = app.add_subcommand("policies", "List the policies, or explain one or a spec");
  CLI::Option* spec = command->add_option("spec", *name, "A policy's name, or a spec such as 'restkv(alpha=0.5)'");
  spec->type_name("NAME|SPEC");
  command->add_flag("--markdown", *markdown, "List them, and the variants, as docs/policies.md")->excludes(spec);
  add_plugin_option(*command);
  command->callback([name, markdown]() {
    if (*markdown) {
      print_page();
    } else if (name->empty()) {
      list_methods();
    } else if (const Method* method = find_method(*name)) {
      explain_method(*method);
    } else {
      explain_spec(*name);
    }
  });
}

}  // namespace kvreplay::cli
