"""Goodness of fit of counts to exact probabilities, and the deviation that a sample of that size can detect.

C outcomes of one multinomial, n draws. Outcomes that are expected fewer than EXPECTED times are counted together,
because the statistic follows a chi-square distribution only if counts are not small.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2, norm

EXPECTED = 10.0
"""least expected draws of an outcome that is counted by itself"""
POWER = 0.8
"""probability with which a bias that is called detectable is noticed"""


class Fit(NamedTuple):
    """A likelihood-ratio statistic (G). Fits of independent samples add up."""

    statistic: float = 0.0
    freedom: int = 0
    draws: int = 0

    def plus(self, other: "Fit") -> "Fit":
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom, self.draws + other.draws)

    @property
    def p(self) -> float:
        """Probability of a statistic this large if the distribution is right; 1 if there was nothing to compare."""
        return float(chi2.sf(self.statistic, self.freedom)) if self.freedom else 1.0

    def detectable_variation(self, level: float) -> float:
        """The total variation from which a test at this level notices a bias with probability POWER.

        The non-centrality is n sum (p' - p)^2 / p >= n (2 TV)^2 (Cauchy-Schwarz), whatever form the bias has.
        """
        if not self.freedom:
            return 1.0
        threshold = chi2.isf(level, self.freedom)
        noncentrality = brentq(lambda x: ncx2.sf(threshold, self.freedom, x) - POWER, 1e-3, 1e5)
        return min(1.0, 0.5 * math.sqrt(noncentrality / self.draws))


def g_test(counts_C: np.ndarray, probabilities_C: np.ndarray) -> Fit:
    """G = 2 sum O log(O / E) (Sokal and Rohlf, Biometry) of counts to probabilities that add up to 1."""
    draws = counts_C.sum()
    expected_C = draws * probabilities_C
    alone_C = expected_C >= EXPECTED
    observed = np.append(counts_C[alone_C], counts_C[~alone_C].sum())
    expected = np.append(expected_C[alone_C], expected_C[~alone_C].sum())
    if 0.0 < expected[-1] < EXPECTED and len(expected) > 1:  # too few even together: added to the rarest other outcome
        rarest = expected[:-1].argmin()
        observed[rarest], expected[rarest] = observed[rarest] + observed[-1], expected[rarest] + expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    observed, expected = observed[expected > 0.0], expected[expected > 0.0]
    seen = observed > 0
    statistic = 2.0 * (observed[seen] * np.log(observed[seen] / expected[seen])).sum()
    return Fit(max(0.0, float(statistic)), len(expected) - 1, int(draws))


def p_of_z(z: float) -> float:
    """The two-sided p-value of a standard normal z."""
    return float(2.0 * norm.sf(abs(z)))


def holm(p_values: list[float]) -> float:
    """The smallest p-value, corrected by Holm's method: it is multiplied by the number of p-values."""
    return min(1.0, len(p_values) * min(p_values)) if p_values else 1.0


def detectable_shift(deviation: float, limit: float) -> float:
    """The shift with which a sum of this standard deviation exceeds `limit` deviations with probability POWER."""
    return (limit + float(norm.ppf(POWER))) * deviation
