#include "policy/capacity.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "base/error.h"

namespace kvreplay {

int CapacityRequest::resolve(int held, ShareRule rule) const {
  return std::max(1, static_cast<int>(unrounded(held, rule)));
}

double CapacityRequest::unrounded(int held, ShareRule rule) const {
  if (count > 0) return count;
  if (rule != nullptr) return rule(share, held);
  // A share such as 0.29 of 100 is 28.999… in binary; it means 29.
  return share * held + 1e-9;
}

CapacityRequest CapacityRequest::parse(std::string_view text) {
  const auto refuse = [text]() {
    return UsageError(fmt::format(
        "capacity '{}' is neither a count of positions (128) nor a share of the prompt, up to 100% (25%)", text));
  };
  CapacityRequest request;
  if (text == "0" || text == "0%") throw UsageError("capacity 0 keeps nothing; ask for at least 1 position");
  const bool is_share = text.ends_with('%');
  const std::string_view digits = is_share ? text.substr(0, text.size() - 1) : text;
  const char* end = digits.data() + digits.size();
  if (is_share) {
    double percent = 0;
    const auto [stop, failure] = std::from_chars(digits.data(), end, percent);
    if (failure != std::errc() || stop != end || !(percent > 0) || percent > 100) throw refuse();
    request.share = percent / 100;
    request.text = fmt::format("{}%", percent);
  } else {
    const auto [stop, failure] = std::from_chars(digits.data(), end, request.count);
    if (failure != std::errc() || stop != end || request.count < 1) throw refuse();
    request.text = fmt::format("{}", request.count);
  }
  return request;
}

}  // namespace kvreplay
