"""Intervals and differences of percentages."""

import types

import numpy as np

from vsr1 import config
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


def bootstrap(values, clusters=None, seed=4, samples=2000):
    profile = types.SimpleNamespace(seed=seed, bootstrap_samples=samples)
    return statistics.bootstrap(values, range(len(values)) if clusters is None else clusters, profile)


def test_the_bootstrap_of_independent_queries_agrees_with_the_binomial():
    low, high = statistics.interval(bootstrap(np.arange(1000) < 300))
    half = 196 * np.sqrt(0.3 * 0.7 / 1000)
    assert abs(low - (30 - half)) < 0.3 and abs(high - (30 + half)) < 0.3


def test_the_bootstrap_draws_whole_families():
    rng = np.random.default_rng(5)
    families = np.repeat([f"f{i}" for i in range(100)], 10)
    values = np.repeat(np.arange(100) < 30, 10)  # the ten queries of a family share their fate
    low, high = statistics.interval(bootstrap(values, families))
    half = 196 * np.sqrt(0.3 * 0.7 / 100)  # of 100 families, not of 1,000 queries
    assert abs(low - (30 - half)) < 1.5 and abs(high - (30 + half)) < 1.5
    shuffled = rng.permutation(1000)
    again = bootstrap(values[shuffled], families[shuffled], seed=6)
    np.testing.assert_array_equal(again, bootstrap(values, families, seed=6))


def test_runs_are_drawn_together_with_queries():
    """Each resample by hand: the families drawn, then as many runs as there are, with replacement."""
    rng = np.random.default_rng(2)
    values, families = rng.random((3, 40)) < 0.5, np.repeat(np.arange(10), 4)
    resamples = statistics.bootstrap(values, families, PROFILE)
    draws = np.random.default_rng(PROFILE.seed)
    drawn = draws.integers(10, size=(PROFILE.bootstrap_samples, 10))
    runs = draws.integers(3, size=(3, PROFILE.bootstrap_samples))
    for sample in (0, 17, 199):
        queries = np.concatenate([np.flatnonzero(families == family) for family in drawn[sample]])
        by_hand = np.mean([values[run][queries].mean() for run in runs[:, sample]])
        np.testing.assert_allclose(resamples[sample], 100 * by_hand, rtol=1e-12)
    same = np.stack([values[0]] * 3)
    np.testing.assert_allclose(
        statistics.bootstrap(same, families, PROFILE), statistics.bootstrap(values[0], families, PROFILE)
    )


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five():
    rng, error = np.random.default_rng(3), 2.0
    smallest = statistics.detectable(rng.normal(0, error, 100_000))
    detected = rng.normal(smallest, error, 100_000) > 1.95996 * error
    assert abs(detected.mean() - 0.8) < 0.01
    noise = rng.normal(0, error, 2000)
    p_values = [statistics.p_value(value, noise) for value in rng.normal(0, error, 2000)]
    assert abs(np.mean(np.array(p_values) < 0.05) - 0.05) < 0.015


def test_holm_stops_at_the_first_comparison_that_fails():
    p = dict(zip("abcde", (0.001, 0.013, 0.012, 0.04, 0.2), strict=True))
    corrected = statistics.holm(p)
    rejected, ranked = set(), sorted(p, key=p.get)
    for number, name in enumerate(ranked):  # the step-down rule itself
        if p[name] >= 0.05 / (len(p) - number):
            break
        rejected.add(name)
    assert {name for name in p if corrected[name] < 0.05} == rejected == {"a", "b", "c"}


def test_without_families_every_video_is_drawn_by_itself():
    assert statistics.clusters(config.load("paper"), "charades", ["a", "b", "a"]) == ["a", "b", "a"]


def test_a_paired_difference_is_narrower_than_the_two_intervals_when_systems_agree_mostly():
    rng = np.random.default_rng(8)
    b = rng.random(500) < 0.5
    a = b | (rng.random(500) < 0.05)
    ahead = statistics.difference(a, b, range(500), PROFILE)
    (low, high), alone = ahead.ci, statistics.estimate(a, range(500), PROFILE).ci
    assert 0 <= low < ahead.value < high and high - low < (alone[1] - alone[0]) / 1.5
