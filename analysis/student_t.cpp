#include "analysis/student_t.h"

#include <cmath>
#include <limits>
#include <numbers>

namespace kvreplay {
namespace {

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
  // Far beyond any data the two distributions agree, and the fraction would need many terms.
  constexpr double kNormal = 1e8;
  if (degrees > kNormal) return std::erfc(t / std::numbers::sqrt2);
  return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t));
}

double student_t_bound(double share, double degrees) {
  const double tails = 1 - share;
  double low = 0;
  double high = 1;
  while (student_t_tails(high, degrees) > tails) high *= 2;
  for (int i = 0; i < 200 && high - low > 1e-14 * high; ++i) {
    const double middle = (low + high) / 2;
    (student_t_tails(middle, degrees) > tails ? low : high) = middle;
  }
  return (low + high) / 2;
}

}  // namespace kvreplay
