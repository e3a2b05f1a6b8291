// The grammar of policy specs: name(key=value, …)+name(…), as in restkv(alpha=0.5)+adakv(floor=0.2). What a step is
// mostly about needs no key: +every(64).
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvreplay {

/// One part of a spec as it was written: a name and its arguments, not yet checked against any method.
struct SpecPart {
  std::string name;
  /// In the order written, values unquoted; the first may have no name: "".
  std::vector<std::pair<std::string, std::string>> arguments;
};

/// Splits a spec into its parts. Spaces do not matter; a value may be a spec of its own, or quoted with "…" where it
/// holds commas or parentheses. Throws UsageError, with the place, where the text does not follow the grammar.
std::vector<SpecPart> parse_spec(std::string_view text);

/// `value` as it has to be written in a spec, quoted only where the grammar needs it.
std::string quote_value(const std::string& value);

}  // namespace kvreplay
