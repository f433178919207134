"""Confidence intervals of percentages, clustered by video."""

import numpy as np

# --- Intervals


def bootstrap(values, clusters=None, samples=2000, *, rng):
    """95 % interval (low, high), percent, of `percent(values)` over other queries of the same kind.

    Queries of one video are not independent: whole clusters (the right videos) are drawn with replacement.
    Without clusters every query is its own.

    >>> bootstrap([1.0, 1.0, 1.0], rng=np.random.default_rng(0))
    (100.0, 100.0)
    """
    values = np.asarray(values, dtype=np.float64)
    assert len(values), "an interval of no queries is undefined"
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    assert clusters.shape == values.shape, f"{clusters.shape} clusters for {values.shape} values"
    _, cluster = np.unique(clusters, return_inverse=True)  # (Q,) 0 .. C-1
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)  # (C,)
    means = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means * 100, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(a, b, clusters=None, samples=2000, *, rng):
    """95 % interval of `percent(a) - percent(b)` where both answered the same queries; without 0 they differ.

    >>> paired_bootstrap([1, 1, 0], [0, 0, -1], rng=np.random.default_rng(0))
    (100.0, 100.0)
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap(difference, clusters, samples, rng=rng)
