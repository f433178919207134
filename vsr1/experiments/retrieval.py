"""Measure a corpus and the first search of its queries (notebook 01).

A query whose video could not be read has no place in any ranking: its rank is `metrics.UNRANKED`, and it counts.
"""

from dataclasses import dataclass

import numpy as np

from vsr1.config import Profile
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop.moments import span_iou
from vsr1.models import search_index


@dataclass(frozen=True)
class FirstSearch:
    """What the original queries find; arrays are (Q,), in the order of `queries`."""

    queries: list[Query]
    videos: int  # of the gallery, with those that a query asks for and that could not be read
    ranks: np.ndarray  # of the right video, ties for us
    pessimistic: np.ndarray  # ties against us
    shown: list[str]  # id of the video on rank 1

    def hits(self, k: int = 1) -> np.ndarray:
        """Return whether the right video is among the first k, (Q,)."""
        return self.ranks <= k

    def shows_right(self) -> np.ndarray:
        """Return whether the video on rank 1 is the right one, (Q,): `hits()`, but for ties."""
        return np.array([video == query.video for video, query in zip(self.shown, self.queries, strict=True)])

    def ties(self) -> int:
        """Count the queries whose right video shares its score with another."""
        return int((self.ranks != self.pessimistic).sum())

    def estimate(self, profile: Profile, dataset: str, values: np.ndarray) -> Estimate:
        """Estimate the percentage of `values` (Q,) of the queries, clustered by family."""
        families = statistics.clusters(profile, dataset, [query.video for query in self.queries])
        return statistics.estimate(values, families, profile)


def first_search(queries: list[Query], vectors: search_index.Vectors) -> FirstSearch:
    """Rank the whole gallery for each query by a plain matrix product."""
    readable = np.array([vectors.has_video(query.video) for query in queries])
    right = vectors.columns([query.video for query in queries], missing=0)
    scores = vectors.scores(vectors.vecs_of([query.id for query in queries]))  # (Q, V)
    ranks, pessimistic = search_index.ranks(scores, right), search_index.ranks_pessimistic(scores, right)
    # Of equals the first, as in the loop.
    shown = [vectors.video_ids[best] for best in scores.argmax(axis=1)]
    return FirstSearch(
        queries,
        len({query.video for query in queries}.union(vectors.video_ids)),
        np.where(readable, ranks, metrics.UNRANKED),
        np.where(readable, pessimistic, metrics.UNRANKED),
        shown,
    )


def corpus_numbers(dataset: str, queries: list[Query], skipped: int, gallery: int) -> dict[str, Estimate]:
    """Measure what is searched (D1): means over queries; times over the videos they ask for, each counted once.

    skipped  videos that could not be read
    gallery  videos that are searched, also those that no query asks for: distractors
    """
    seconds = np.array(list({query.video: query.duration for query in queries}.values()), dtype=float)
    spans = np.array([query.span[1] - query.span[0] for query in queries])
    shares = spans / np.array([query.duration for query in queries])
    values = {
        "queries": (len(queries), "queries"),
        "videos": (gallery, "videos"),
        "distractors": (gallery - len(seconds), "videos"),
        "queries_per_video": (len(queries) / len(seconds), "queries"),
        "video_seconds": (seconds.mean(), "s"),
        "video_seconds_median": (np.median(seconds), "s"),
        "span_seconds": (spans.mean(), "s"),
        "span_seconds_median": (np.median(spans), "s"),
        "span_share": (100 * shares.mean(), "%"),
        "words": (np.mean([len(query.text.split()) for query in queries]), "words"),
        "words_coarse": (np.mean([len(query.coarse.split()) for query in queries]), "words"),
        "skipped": (skipped, "videos"),
    }
    return {
        f"D1/{dataset}/test/{key}": Estimate(value, len(queries), unit=unit)
        for key, (value, unit) in values.items()
    }


def retrieval_numbers(profile: Profile, dataset: str, first: FirstSearch) -> dict[str, Estimate]:
    """Measure R@k of the first search and of chance (T1), and the floor: the whole top-1 video as the moment."""
    numbers = {}
    for k in profile.vr_ks:
        numbers[f"T1/{dataset}/zs/vr@{k}"] = first.estimate(profile, dataset, first.hits(k))
        chance = metrics.chance_recall(first.videos, k)
        numbers[f"T1/{dataset}/random/vr@{k}"] = Estimate(chance, len(first.queries))
    whole = [(0, query.duration) for query in first.queries]
    ious, right = span_iou(whole, [query.span for query in first.queries]), first.shows_right()
    for threshold in metrics.THRESHOLDS:
        hits = right & metrics.reaches(ious, threshold)
        numbers[f"T1/{dataset}/wholevideo/vcmr@{threshold}"] = first.estimate(profile, dataset, hits)
    return numbers


def headroom_numbers(
    profile: Profile, dataset: str, first: FirstSearch, probe: dict, families: dict
) -> dict[str, Estimate]:
    """Measure what the first search leaves to gain (H1).

    probe     what `attribute_probe.headroom` returned; {} without attributes to probe
    families  {video: family of near-duplicates}; {} where none are known
    """
    everyone, failed, seeds = len(first.queries), int((~first.hits()).sum()), (profile.seed,)
    rank_2 = metrics.percent(first.ranks[~first.hits()] == 2) if failed else None
    values = {
        "zs/vr@1": first.estimate(profile, dataset, first.hits()),
        "zs/vr@1_pessimistic": Estimate(metrics.recall_at(first.pessimistic, 1), everyone, seeds=seeds),
        "zs/ties": Estimate(first.ties(), everyone, unit="queries"),
        "zs/wrong_from_family": Estimate(family_share(first, families), failed),
        "walkdown/vr@1_failed": Estimate(rank_2, failed),
        "probe/vr@1": Estimate(probe.get("probe_r1"), everyone, seeds=seeds),
        "probe/vr@1_failed": Estimate(probe.get("probe_failed"), failed, seeds=seeds),
        "words/vr@1": Estimate(probe.get("words_r1"), everyone),
        "words/vr@1_failed": Estimate(probe.get("words_failed"), failed),
        "neutral-zeros/vr@1": Estimate(probe.get("neutral_zeros_r1"), everyone),
        "neutral-noise/vr@1": Estimate(probe.get("neutral_noise_r1"), everyone, seeds=seeds),
    }
    return {f"H1/{dataset}/{name}": number for name, number in values.items()}


def family_share(first: FirstSearch, families: dict) -> float | None:
    """Return the percentage of wrong top-1 videos of the right one's family; None without failures or families."""
    wrong = [
        families[shown] == families[query.video]
        for shown, query, hit in zip(first.shown, first.queries, first.hits(), strict=True)
        if not hit and families
    ]
    return metrics.percent(wrong) if wrong else None


def recall_curve(first: FirstSearch) -> list:
    """Return [k, R@k] for k up to 100 or the size of the gallery."""
    return [[k, metrics.recall_at(first.ranks, k)] for k in range(1, min(100, first.videos) + 1)]
