#!/usr/bin/env python3
"""Prints the values that the tests of the statistics hold theirs against, from other people's implementations.

Needs numpy, scipy, statsmodels and arch: pip install numpy scipy statsmodels arch
"""
import numpy as np
from arch.bootstrap import optimal_block_length
from scipy import stats
from statsmodels.stats.multitest import multipletests


def autoregressive(size, correlation, seed):
    """x[t] = correlation * x[t-1] + u, with u uniform in [-0.5, 0.5) from a linear congruential generator."""
    series, x, state = [], 0.0, seed
    for _ in range(size):
        state = (1103515245 * state + 12345) % 2**31
        x = correlation * x + state / 2**31 - 0.5
        series.append(x)
    return np.array(series)


print("tails of Student's t: t, degrees, P(|T| >= t)")
for t, degrees in [(0, 3), (0.5, 1), (1, 4.5), (2.5, 7), (3, 30.25), (12, 5), (40, 9), (1.96, 1e6)]:
    print(f"  {t}, {degrees}, {2 * stats.t.sf(t, degrees):.15e}")

print("bounds of its middle: share, degrees, t")
for share, degrees in [(0.95, 1), (0.95, 2.5), (0.9, 10), (0.99, 30), (0.999, 4)]:
    print(f"  {share}, {degrees}, {stats.t.ppf((1 + share) / 2, degrees):.15e}")
print(f"  normal, 0.95: {stats.norm.ppf(0.975):.15e}")

print("block lengths of the circular bootstrap: size, correlation, seed, length")
for size, correlation, seed in [(31, 0, 1), (64, 0.3, 2), (64, 0.8, 3), (200, 0.5, 4), (200, 0.9, 5), (1000, 0.7, 6),
                                (1000, -0.5, 7), (128, 0.95, 8)]:
    length = optimal_block_length(autoregressive(size, correlation, seed))["circular"].iloc[0]
    print(f"  {size}, {correlation}, {seed}, {length:.6f}")

p_values = [0.01, 0.04, 0.03, 0.005, 0.2, 0.005]
print(f"Holm of {p_values}: {multipletests(p_values, method='holm')[1].tolist()}")
