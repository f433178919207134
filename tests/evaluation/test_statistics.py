"""Intervals and differences of percentages."""

import types

import numpy as np

from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate

PROFILE = types.SimpleNamespace(seed=42, bootstrap_samples=200)


def bootstrap_by_hand(values, videos):
    """The interval by one draw of videos after the other."""
    rng, shares = np.random.default_rng(PROFILE.seed), []
    names = np.unique(videos)
    for _ in range(PROFILE.bootstrap_samples):
        drawn = names[rng.integers(len(names), size=len(names))]
        queries = np.concatenate([np.flatnonzero(videos == name) for name in drawn])
        shares.append(100 * values[queries].mean())
    return np.percentile(shares, [2.5, 97.5])


def test_an_estimate_is_a_percentage_with_the_interval_of_draws_one_after_the_other():
    rng = np.random.default_rng(9)
    a, b, videos = rng.random(60) < 0.4, rng.random(60) < 0.3, rng.integers(20, size=60)
    measured = statistics.estimate(a, videos, PROFILE)
    assert (measured.value, measured.n, measured.seeds) == (metrics.percent(a), 60, (42,))
    np.testing.assert_allclose(measured.ci, bootstrap_by_hand(a, videos), rtol=1e-12)
    ahead = statistics.difference(a, b, videos, PROFILE)
    assert (ahead.value, ahead.unit) == (metrics.percent(a) - metrics.percent(b), "points")
    np.testing.assert_allclose(ahead.ci, bootstrap_by_hand(a.astype(int) - b, videos), rtol=1e-12)


def test_an_estimate_of_no_queries_is_missing_and_not_zero():
    assert statistics.estimate([], [], PROFILE) == Estimate(None, 0)
    assert statistics.difference([], [], [], PROFILE) == Estimate(None, 0, unit="points")


def test_the_bootstrap_of_independent_queries_agrees_with_the_binomial():
    values = np.arange(1000) < 300
    low, high = statistics.bootstrap(values, rng=np.random.default_rng(4))
    half = 196 * np.sqrt(0.3 * 0.7 / 1000)
    assert abs(low - (30 - half)) < 0.3 and abs(high - (30 + half)) < 0.3


def test_the_bootstrap_draws_whole_videos():
    rng = np.random.default_rng(5)
    videos = np.repeat([f"v{i}" for i in range(100)], 10)
    values = np.repeat(np.arange(100) < 30, 10)  # the ten queries of a video share their fate
    low, high = statistics.bootstrap(values, videos, rng=rng)
    half = 196 * np.sqrt(0.3 * 0.7 / 100)  # of 100 videos, not of 1,000 queries
    assert abs(low - (30 - half)) < 1.5 and abs(high - (30 + half)) < 1.5
    shuffled = rng.permutation(1000)
    again = statistics.bootstrap(values[shuffled], videos[shuffled], rng=np.random.default_rng(6))
    assert again == statistics.bootstrap(values, videos, rng=np.random.default_rng(6))


def test_a_paired_difference_is_narrower_than_the_two_intervals_when_systems_agree_mostly():
    rng = np.random.default_rng(8)
    b = rng.random(500) < 0.5
    a = b | (rng.random(500) < 0.05)
    ahead = statistics.difference(a, b, range(500), PROFILE)
    (low, high), alone = ahead.ci, statistics.estimate(a, range(500), PROFILE).ci
    assert 0 <= low < ahead.value < high and high - low < (alone[1] - alone[0]) / 1.5
