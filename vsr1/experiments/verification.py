"""Measure verdicts and spans in oracle videos: verification and grounding without search (notebook 02)."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common
from vsr1.loop.moments import span_iou
from vsr1.loop.records import Episode

VERDICTS = {True: "matched", False: "not_matched", None: "unreadable"}


@dataclass(frozen=True)
class OracleEpisodes:
    """Every test query once with its right video and once with the engine's best wrong one: one turn each."""

    right: list[Episode]
    wrong: list[Episode]
    queries: list[Query]

    @property
    def both(self) -> list[Episode]:
        """The episodes of both halves."""
        return self.right + self.wrong

    @property
    def durations(self) -> list[float]:
        """Seconds of the right videos."""
        return [query.duration for query in self.queries]


def run_oracle(profile: Profile, dataset: str) -> OracleEpisodes:
    """Run both halves of the oracle-video test with the base model, unless they are current."""
    halves = [common.run_episodes(profile, dataset, f"oracle-{half}") for half in ("right", "wrong")]
    return OracleEpisodes(*halves, annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl"))


def oracle_numbers(profile: Profile, dataset: str, oracle: OracleEpisodes) -> dict[str, Estimate]:
    """Measure how the base model judges and grounds (V1), beside floors that do not look at the video."""
    ious = metrics.moment_ious(oracle.right)
    values = {"verdict": (oracle.both, metrics.ver_hits(oracle.both))}
    for name, half in {"right": oracle.right, "wrong": oracle.wrong}.items():
        values[f"verdict_{name}"] = half, metrics.ver_hits(half)
    values |= {f"grounding@{m}": (oracle.right, metrics.reaches(ious, m)) for m in metrics.THRESHOLDS}
    values |= {"miou": (oracle.right, ious)}
    replies = readable(oracle.both)
    values |= {name: (oracle.both, replies[name]) for name in ("strict", "readable", "spanned")}
    numbers = {f"zs/{name}": common.estimate(profile, *pair) for name, pair in values.items()}
    largest = max(len(oracle.right), len(oracle.wrong))
    numbers["majority/verdict"] = Estimate(100 * largest / len(oracle.both), len(oracle.both))
    for floor, values in _floors(profile, oracle).items():
        numbers |= {f"{floor}/{name}": Estimate(value, len(oracle.right)) for name, value in values.items()}
    return {f"V1/{dataset}/{name}": number for name, number in numbers.items()}


def _floors(profile, oracle):
    """Return {floor: {metric: percent}} of spans that need no eyes: the whole video, and two uniform times."""
    truth = np.array([episode.gt_span_ms for episode in oracle.right]) / 1000
    rng = np.random.default_rng([profile.seed, 0])
    return {
        "wholevideo": metrics.whole_video_floor(oracle.durations, truth),
        "random": metrics.random_span_floor(oracle.durations, truth, rng=rng),
    }


def readable(episodes: list[Episode]) -> dict[str, np.ndarray]:
    """Return how the replies of the first turn can be read, (Q,) truth values each.

    strict     the requested layout to the letter
    readable   a verdict was found
    spanned    two times were found
    truncated  it ended at the limit of new tokens
    """
    replies = [episode.turns[0].reply if episode.turns else None for episode in episodes]
    tests = {
        "strict": lambda reply: reply.strict,
        "readable": lambda reply: reply.matched is not None,
        "spanned": lambda reply: reply.span is not None,
        "truncated": lambda reply: not reply.ended,
    }
    return {
        name: np.array([reply is not None and test(reply) for reply in replies])
        for name, test in tests.items()
    }


def confusion(oracle: OracleEpisodes) -> pd.DataFrame:
    """Count verdicts: a row per half, a column per verdict; a video that could not be read has none: "not run"."""
    rows = {}
    for label, half in {"right video shown": oracle.right, "wrong video shown": oracle.wrong}.items():
        counts = Counter(
            VERDICTS[metrics.verdict(episode, 0)] if episode.problem is None else "not run"
            for episode in half
        )
        rows[label] = {verdict: counts[verdict] for verdict in (*VERDICTS.values(), "not run")}
    return pd.DataFrame(rows).T


def histogram(ious) -> list:
    """Return [left edge, percent] of overlaps: exactly 0 at -0.1, then ten bins with their left edge, the last also 1.

    >>> [pair for pair in histogram([0.0, 0.3, 1.0, 1.0]) if pair[1]]
    [[-0.1, 25.0], [0.3, 25.0], [0.9, 50.0]]
    """
    ious = np.asarray(ious, dtype=float)
    bins = np.where(ious > 0, np.minimum(np.floor(ious * 10 + metrics.IOU_EPS), 9), -1)
    return [[bin / 10, metrics.percent(bins == bin)] for bin in range(-1, 10)]


def iou_series(dataset: str, oracle: OracleEpisodes) -> dict[str, list]:
    """Return histograms of overlap with the right moment (V2): of the named spans and of whole videos."""
    truth = np.array([episode.gt_span_ms for episode in oracle.right]) / 1000
    whole = span_iou([(0, seconds) for seconds in oracle.durations], truth)
    ious = {"zs": metrics.moment_ious(oracle.right), "wholevideo": whole}
    return {f"V2/{dataset}/{system}/iou": histogram(values) for system, values in ious.items()}


def example_cases(oracle: OracleEpisodes) -> dict[str, Episode | None]:
    """Pick three episodes by rule, the smallest query id of each kind; None where there is none of it."""

    def first(half, verdicts):
        fitting = [e for e in half if e.problem is None and metrics.verdict(e, 0) in verdicts]
        return min(fitting, key=lambda episode: episode.desc_id, default=None)

    wrong = [first(oracle.right, (False, None)), first(oracle.wrong, (True, None))]
    return {
        "right acceptance": first(oracle.right, (True,)),
        "right rejection": first(oracle.wrong, (False,)),
        "wrong verdict": min(filter(None, wrong), key=lambda episode: episode.desc_id, default=None),
    }
