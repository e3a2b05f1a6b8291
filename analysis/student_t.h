// Student's t distribution: what a standard error that is itself an estimate says about a mean.
#pragma once

namespace kvreplay {

/// The probability that |t| is at least `t` with `degrees` of freedom, which need not be whole. `t` at least 0; 1 at 0.
double student_t_tails(double t, double degrees);

/// The t of which the middle `share` of the distribution, in (0, 1), lies between −t and t. Infinite degrees: the
/// normal distribution.
double student_t_bound(double share, double degrees);

}  // namespace kvreplay
