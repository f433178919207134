"""Estimates: percentages with confidence intervals clustered by family, and what a comparison could have shown."""

import math
from dataclasses import dataclass

import numpy as np

from vsr1.data import source
from vsr1.evaluation import metrics

POWER = 1.95996 + 0.84162  # standard errors that are found with 80 % power by a two-sided test at 5 %


@dataclass(frozen=True)
class Estimate:
    """A measured value and what it rests on. None is "missing"; nothing turns it into 0."""

    value: float | int | None
    n: int | None = None  # queries it was measured on (or videos, where the metric counts videos)
    ci: tuple[float, float] | None = None  # 95 % interval
    seeds: tuple[int, ...] = ()
    unit: str = "%"
    note: str = ""


def clusters(profile, dataset: str, videos) -> list[str]:
    """Return what is drawn as a whole for each right video: its family, or itself where the source names none."""
    families = source.families(profile, dataset)
    return [families.get(video, video) for video in videos]


def estimate(values, clusters, profile, unit="%") -> Estimate:
    """Estimate `percent(values)` with its interval; missing without values.

    values    (Q,) truth values or parts in [0, 1] of the queries
    clusters  (Q,) of the queries, as `clusters` returns them
    profile   its `seed` draws `bootstrap_samples` resamples
    """
    if not len(values):
        return Estimate(None, 0, unit=unit)
    ci = interval(bootstrap(values, clusters, profile))
    return Estimate(metrics.percent(values), len(values), ci, (profile.seed,), unit)


def difference(a, b, clusters, profile) -> Estimate:
    """Estimate how many points `percent(a)` is above `percent(b)`, both (Q,) of the same queries: paired."""
    if not len(a):
        return Estimate(None, 0, unit="points")
    gains = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    ci = interval(bootstrap(gains, clusters, profile))
    return Estimate(metrics.percent(a) - metrics.percent(b), len(a), ci, (profile.seed,), "points")


def bootstrap(values, clusters, profile) -> np.ndarray:
    """Return `percent(values)` of other queries of the same kind, one for each of `bootstrap_samples` resamples.

    Queries of one family are not independent: whole clusters are drawn with replacement. With several runs, one a
    seed, as many runs are drawn with replacement too, and their mean is taken. Few seeds understate how much seeds
    differ: the spread of three is drawn too small by a factor of the square root of 2/3.

    values    (Q,), or (R, Q) of several runs
    clusters  (Q,)
    """
    values, clusters = np.atleast_2d(np.asarray(values, dtype=np.float64)), np.asarray(clusters)
    assert values.size, "an interval of no queries is undefined"
    assert clusters.shape == values.shape[1:], f"{clusters.shape} clusters for {values.shape} values"
    rng, runs = np.random.default_rng(profile.seed), len(values)
    _, cluster = np.unique(clusters, return_inverse=True)  # (Q,) 0 .. C-1
    counts = np.bincount(cluster)  # (C,)
    drawn = rng.integers(len(counts), size=(profile.bootstrap_samples, len(counts)))  # (S, C)
    sums = np.stack([np.bincount(cluster, weights=row)[drawn].sum(axis=1) for row in values])  # (R, S)
    if runs > 1:
        drawn_runs = rng.integers(runs, size=(runs, len(drawn)))  # (R, S)
        sums = np.take_along_axis(sums, drawn_runs, axis=0)
    return sums.mean(axis=0) / counts[drawn].sum(axis=1) * 100


def interval(resamples) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of a `bootstrap`, by percentiles.

    Where all values are equal, as at 0 and 100 %, it has no width, although other queries could have given another
    value.

    >>> interval([100.0, 100.0])
    (100.0, 100.0)
    """
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(low), float(high)


def detectable(resamples) -> float | None:
    """Return the smallest true difference, points, that is found with 80 % power; None where no resample differs.

    It is 2.8 clustered standard errors. A difference that is not shown may be as large as this.

    >>> round(detectable([-1.0, 0.0, 1.0]), 1), detectable([0.0, 0.0])
    (2.8, None)
    """
    error = float(np.std(resamples, ddof=1))
    return POWER * error if error > 0 else None


def p_value(value: float, resamples) -> float:
    """Return the two-sided probability of a difference as large as `value` if there were none, by its standard error.

    >>> round(p_value(1.95996, [-1.0, 0.0, 1.0]), 3), p_value(0.0, [0.0, 0.0])
    (0.05, 1.0)
    """
    error = float(np.std(resamples, ddof=1))
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def holm(p_values: dict) -> dict:
    """Return {name: p} corrected for the number of comparisons, by Holm.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, largest = {}, 0.0
    ranked = sorted(p_values.items(), key=lambda pair: pair[1])
    for number, (name, value) in enumerate(ranked):
        largest = max(largest, min(1.0, value * (len(ranked) - number)))
        corrected[name] = largest
    return corrected
