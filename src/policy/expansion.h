// Many specs written as one: lists, and lists and ranges in braces.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace kvreplay {

/// The most specs that one text may stand for.
constexpr std::size_t kMostSpecs = 100'000;

/// All specs that a text with braces stands for: {a,b,c} is each of its items, {first:last:step} the numbers from first
/// to last, both inclusive, in exact decimals (step 1 where it is left out). Several braces are combined, the last of
/// them varying fastest; an item may hold braces itself; inside "…" braces are text. A text without braces stands for
/// itself. Throws UsageError for braces that are empty or do not match, for ranges that lead nowhere, and for more than
/// kMostSpecs specs.
std::vector<std::string> expand_spec(std::string_view text);

/// The texts of a list separated by commas; those inside of parentheses, braces and "…" do not separate.
std::vector<std::string> split_specs(std::string_view text);

}  // namespace kvreplay
