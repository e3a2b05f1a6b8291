#include "notebooks-export/figure.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace kvreplay {
namespace {

// A function's own, since registrations run before main() in no particular order.
std::vector<FigureKind>& registered() {
  static std::vector<FigureKind> kinds;
  return kinds;
}

}  // namespace

FigureRegistration::FigureRegistration(FigureKind kind) { registered().push_back(std::move(kind)); }

std::vector<const FigureKind*> figure_kinds() {
  std::vector<const FigureKind*> kinds;
  for (const FigureKind& kind : registered()) kinds.push_back(&kind);
  std::ranges::sort(kinds, {}, [](const FigureKind* kind) { return std::tie(kind->order, kind->name); });
  return kinds;
}

}  // namespace kvreplay
