"""Estimates: percentages with confidence intervals clustered by video."""

from dataclasses import dataclass

import numpy as np

from vsr1.evaluation import metrics


@dataclass(frozen=True)
class Estimate:
    """A measured value and what it rests on. None is "missing"; nothing turns it into 0."""

    value: float | int | None
    n: int | None = None  # queries it was measured on (or videos, where the metric counts videos)
    ci: tuple[float, float] | None = None  # 95 % interval
    seeds: tuple[int, ...] = ()
    unit: str = "%"
    note: str = ""


def estimate(values, clusters, profile, unit="%") -> Estimate:
    """Estimate `percent(values)` with its interval; missing without values.

    values    (Q,) truth values or parts in [0, 1] of the queries
    clusters  (Q,) the right video of each query
    profile   its `seed` draws `bootstrap_samples` resamples
    """
    if not len(values):
        return Estimate(None, 0, unit=unit)
    ci = bootstrap(values, clusters, profile.bootstrap_samples, rng=np.random.default_rng(profile.seed))
    return Estimate(metrics.percent(values), len(values), ci, (profile.seed,), unit)


def difference(a, b, clusters, profile) -> Estimate:
    """Estimate how many points `percent(a)` is above `percent(b)`, both (Q,) of the same queries: paired."""
    if not len(a):
        return Estimate(None, 0, unit="points")
    gains = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    ci = bootstrap(gains, clusters, profile.bootstrap_samples, rng=np.random.default_rng(profile.seed))
    return Estimate(metrics.percent(a) - metrics.percent(b), len(a), ci, (profile.seed,), "points")


def bootstrap(values, clusters=None, samples=2000, *, rng) -> tuple[float, float]:
    """Return the 95 % interval (low, high), percent, of `percent(values)` over other queries of the same kind.

    Queries of one video are not independent: whole clusters (the right videos) are drawn with replacement.
    Without clusters every query is its own. This is the percentile bootstrap: where all values are equal, as at 0
    and 100 %, its interval has no width, although other queries could have given another value.

    >>> bootstrap([1.0, 1.0, 1.0], rng=np.random.default_rng(0))
    (100.0, 100.0)
    """
    values = np.asarray(values, dtype=np.float64)
    assert len(values), "an interval of no queries is undefined"
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    assert clusters.shape == values.shape, f"{clusters.shape} clusters for {values.shape} values"
    _, cluster = np.unique(clusters, return_inverse=True)  # (Q,) 0 .. C-1
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)  # (C,)
    drawn = rng.integers(len(sums), size=(samples, len(sums)))  # (S, C)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means * 100, [2.5, 97.5])
    return float(low), float(high)
