"""Intervals and paired tests over training seeds. Everything is SciPy's; here is only what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
"""A difference counts as found where its adjusted p-value is below."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds and its 95 % interval by Student's t; of one seed the ends are NaN."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two variants on the same ``n`` seeds: what one has more, and the p-value of a paired t-test (two-sided)."""

    difference: Interval
    p: float
    adjusted_p: float = math.nan
    """For the number of comparisons that are made together."""

    @property
    def verdict(self) -> str:
        """helps, hurts, open (not told apart), or "" where there is no test."""
        if not math.isfinite(self.adjusted_p):
            return ""
        if self.adjusted_p >= SIGNIFICANT:
            return "open"
        return "helps" if self.difference.mean > 0 else "hurts"


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of one number per seed; values that are not finite are left out."""
    from scipy import stats

    finite = [value for value in values if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else math.nan
    if len(finite) < 2:
        return Interval(mean, math.nan, math.nan, len(finite))
    if min(finite) == max(finite):
        return Interval(mean, mean, mean, len(finite))
    low, high = stats.ttest_1samp(finite, 0.0).confidence_interval(CONFIDENCE)
    return Interval(mean, float(low), float(high), len(finite))


def compare(values: Sequence[float], reference: Sequence[float]) -> Comparison:
    """``values`` against ``reference``, seed by seed. Fewer than two seeds, or differences all equal: p is NaN."""
    from scipy import stats

    difference = interval([value - other for value, other in zip(values, reference, strict=True)])
    if difference.n < 2 or difference.low == difference.high:
        return Comparison(difference, math.nan)
    return Comparison(difference, float(stats.ttest_rel(values, reference).pvalue))


def adjusted(p: Sequence[float]) -> list[float]:
    """p-values of one study's comparisons, adjusted by Benjamini and Hochberg; NaN stays NaN and counts for none."""
    from scipy import stats

    known = [value for value in p if math.isfinite(value)]
    found = iter(stats.false_discovery_control(known).tolist() if known else [])
    return [next(found) if math.isfinite(value) else math.nan for value in p]
