#include "analysis/student_t.h"

#include <cmath>
#include <limits>
#include <numbers>

namespace kvreplay {
namespace {

// Of more degrees of freedom it is the normal distribution, as far as any data can tell.
constexpr double kNormal = 1e8;

// The regularised incomplete beta function I_x(a, b) by its continued fraction (Lentz's method), which converges fast
// for x < (a + 1)/(a + b + 2); beyond that it is 1 − I_{1−x}(b, a).
double incomplete_beta(double a, double b, double x) {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - incomplete_beta(b, a, 1 - x);
  constexpr double kTiny = 1e-300;
  constexpr int kMostTerms = 500;
  const auto away_from_zero = [](double number) { return std::abs(number) < kTiny ? kTiny : number; };
  double c = 1;
  double d = 1 / away_from_zero(1 - (a + b) * x / (a + 1));
  double fraction = d;
  for (int m = 1; m < kMostTerms; ++m) {
    const double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1 / away_from_zero(1 + even * d);
    c = away_from_zero(1 + even / c);
    fraction *= c * d;
    const double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / away_from_zero(1 + odd * d);
    c = away_from_zero(1 + odd / c);
    fraction *= c * d;
    if (std::abs(c * d - 1) < std::numeric_limits<double>::epsilon()) break;
  }
  // lgamma is not safe in threads that share its sign, lgamma_r is.
  int sign = 0;
  const double log_beta = ::lgamma_r(a, &sign) + ::lgamma_r(b, &sign) - ::lgamma_r(a + b, &sign);
  return std::exp(a * std::log(x) + b * std::log1p(-x) - log_beta) / a * fraction;
}

}  // namespace

double student_t_tails(double t, double degrees) {
  if (std::isinf(t)) return 0;
  if (degrees > kNormal) return std::erfc(t / std::numbers::sqrt2);
  return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t));
}

double student_t_bound(double share, double degrees) {
  const double tails = 1 - share;
  // Newton's method: tails() is convex, so that from the left it approaches the bound without passing it.
  const auto solve = [tails](double t, const auto& tails_beyond, const auto& density) {
    for (int i = 0; i < 500; ++i) {
      const double step = (tails_beyond(t) - tails) / (2 * density(t));
      t += step;
      if (!(step > 1e-14 * t)) break;
    }
    return t;
  };
  const double normal = solve(
      0, [](double t) { return std::erfc(t / std::numbers::sqrt2); },
      [](double t) { return std::exp(-t * t / 2) / std::sqrt(2 * std::numbers::pi); });
  if (degrees > kNormal) return normal;
  int sign = 0;
  const double scale = std::exp(::lgamma_r((degrees + 1) / 2, &sign) - ::lgamma_r(degrees / 2, &sign)) /
                       std::sqrt(degrees * std::numbers::pi);
  return solve(
      normal, [degrees](double t) { return student_t_tails(t, degrees); },
      [&](double t) { return scale * std::pow(1 + t * t / degrees, -(degrees + 1) / 2); });
}

}  // namespace kvreplay
