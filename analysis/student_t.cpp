#include "analysis/student_t.h"

#include <boost/math/distributions/students_t.hpp>

namespace kvreplay {
namespace {

namespace policies = boost::math::policies;

// What is undefined is NaN, as elsewhere in <cmath>, and nothing depends on how exact this processor's long double is.
using StudentT = boost::math::students_t_distribution<
    double, policies::policy<policies::domain_error<policies::ignore_error>, policies::promote_double<false>>>;

}  // namespace

double student_t_tails(double t, double degrees) { return 2 * cdf(complement(StudentT(degrees), t)); }

double student_t_bound(double share, double degrees) {
  return quantile(complement(StudentT(degrees), (1 - share) / 2));
}

}  // namespace kvreplay
