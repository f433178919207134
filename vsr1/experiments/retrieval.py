"""What notebook 01 measures: a corpus, and how far one search of it gets.

A query whose video could not be read has no place in any ranking: its rank is `metrics.NEVER`, and it counts.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics, statistics
from vsr1.loop import moments
from vsr1.models import search_index
from vsr1.report import plots
from vsr1.report.results import Estimate


@dataclass(frozen=True)
class FirstSearch:
    """What the query as it is finds; arrays are (Q,), in the order of `queries`."""

    queries: list[Query]
    videos: int  # of the gallery, the unreadable ones included
    ranks: np.ndarray  # of the right video, ties for us
    pessimistic: np.ndarray  # ties against us
    shown: list[str]  # id of the video on rank 1

    def hits(self, k: int = 1) -> np.ndarray:
        """Whether the right video is among the first k, (Q,)."""
        return self.ranks <= k

    def ties(self) -> int:
        """How many queries share the score of their video with another."""
        return int((self.ranks != self.pessimistic).sum())

    def interval(self, profile: Profile, hits: np.ndarray) -> tuple[float, float]:
        """95 % interval of the share of `hits`, clustered by right video."""
        clusters, rng = [query.video for query in self.queries], np.random.default_rng(profile.seed)
        return statistics.bootstrap(hits, clusters, profile.bootstrap_samples, rng=rng)


def first_search(queries: list[Query], vectors) -> FirstSearch:
    """Ranks of all queries by a plain matrix product over the whole gallery."""
    known = np.array([vectors.has_video(query.video) for query in queries])
    right = vectors.columns([query.video for query in queries], missing=0)
    scores = vectors.scores(vectors.vecs_of([query.id for query in queries]))  # (Q, V)
    ranks, pessimistic = search_index.ranks(scores, right), search_index.ranks_pessimistic(scores, right)
    # Of equals the first, as the index does.
    shown = [vectors.video_ids[best] for best in scores.argmax(axis=1)]
    never = metrics.UNRANKED
    return FirstSearch(
        queries,
        len({query.video for query in queries}),
        np.where(known, ranks, never),
        np.where(known, pessimistic, never),
        shown,
    )


def corpus_numbers(dataset: str, queries: list[Query], skipped: int) -> dict[str, Estimate]:
    """D1: what is searched. Means over queries, videos counted once."""
    seconds = np.array(list({query.video: query.duration for query in queries}.values()), dtype=float)
    spans = np.array([query.span[1] - query.span[0] for query in queries])
    shares = spans / np.array([query.duration for query in queries])
    words, coarse = (np.mean([len(text.split()) for text in texts]) for texts in _texts(queries))
    values = {
        "queries": (len(queries), "queries"),
        "videos": (len(seconds), "videos"),
        "queries_per_video": (len(queries) / len(seconds), "queries"),
        "video_seconds": (seconds.mean(), "s"),
        "video_seconds_median": (np.median(seconds), "s"),
        "span_seconds": (spans.mean(), "s"),
        "span_seconds_median": (np.median(spans), "s"),
        "span_share": (100 * shares.mean(), "%"),
        "words": (words, "words"),
        "words_coarse": (coarse, "words"),
        "skipped": (skipped, "videos"),
    }
    return {
        f"D1/{dataset}/test/{key}": Estimate(value, len(queries), unit=unit)
        for key, (value, unit) in values.items()
    }


def _texts(queries):
    return [query.text for query in queries], [query.coarse for query in queries]


def retrieval_numbers(profile: Profile, dataset: str, found: FirstSearch) -> dict[str, Estimate]:
    """T1: R@k of the first search and of chance, and the floor of answering with the whole top-1 video."""
    numbers = {}
    for k in profile.vr_ks:
        hits = found.hits(k)
        ci = found.interval(profile, hits)
        numbers[f"T1/{dataset}/zs/vr@{k}"] = Estimate(metrics.percent(hits), len(hits), ci, (profile.seed,))
        numbers[f"T1/{dataset}/random/vr@{k}"] = Estimate(metrics.chance_recall(found.videos, k), len(hits))
    iou = moments.span_iou(
        [(0, query.duration) for query in found.queries], [query.span for query in found.queries]
    )
    right = np.array([video == query.video for video, query in zip(found.shown, found.queries, strict=True)])
    for threshold in metrics.THRESHOLDS:
        hits = right & metrics.reaches(iou, threshold)
        number = Estimate(metrics.percent(hits), len(hits), found.interval(profile, hits), (profile.seed,))
        numbers[f"T1/{dataset}/wholevideo/vcmr@{threshold}"] = number
    return numbers


def headroom_numbers(
    profile: Profile, dataset: str, found: FirstSearch, room: dict, families: dict
) -> dict[str, Estimate]:
    """H1: what the first search leaves to gain. `room` is foundation's; empty without attributes to probe."""
    everyone, failed, seeds = len(found.queries), int((~found.hits()).sum()), (profile.seed,)
    low_high = found.interval(profile, found.hits())
    rank_2 = metrics.percent(found.ranks[~found.hits()] == 2) if failed else None
    values = {
        "zs/vr@1": Estimate(metrics.recall_at(found.ranks, 1), everyone, low_high, seeds),
        "zs/vr@1_pessimistic": Estimate(metrics.recall_at(found.pessimistic, 1), everyone, seeds=seeds),
        "zs/ties": Estimate(found.ties(), everyone, unit="queries"),
        "zs/wrong_from_family": Estimate(family_share(found, families), failed),
        "walkdown/vr@1_failed": Estimate(rank_2, failed),
        "probe/vr@1": Estimate(room.get("probe_r1"), everyone, seeds=seeds),
        "probe/vr@1_failed": Estimate(room.get("probe_failed"), failed, seeds=seeds),
        "neutral-zeros/vr@1": Estimate(room.get("neutral_zeros_r1"), everyone),
        "neutral-noise/vr@1": Estimate(room.get("neutral_noise_r1"), everyone, seeds=seeds),
    }
    return {f"H1/{dataset}/{name}": number for name, number in values.items()}


def family_share(found: FirstSearch, families: dict) -> float | None:
    """Percent of the wrong top-1 videos from the right one's family; None without failures or families."""
    wrong = [
        families[shown] == families[query.video]
        for shown, query, hit in zip(found.shown, found.queries, found.hits(), strict=True)
        if not hit and families
    ]
    return metrics.percent(wrong) if wrong else None


def recall_curve(found: FirstSearch, longest: int = 100) -> list:
    """[k, R@k] for k up to `longest` or the size of the gallery."""
    return [[k, metrics.recall_at(found.ranks, k)] for k in range(1, min(longest, found.videos) + 1)]


def skipped(folder: Path) -> list[dict]:
    """The rows of a stage's skipped.csv: video, split, problem."""
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- Clips to look at


def differences(one, other) -> list[str]:
    """What differs between two rendered scenes of a family, moment by moment; words for scenes of two families."""
    if one.family != other.family:
        return ["not of one family"]
    pairs = enumerate(zip(one.moments, other.moments, strict=True), 1)
    return [
        f"moment {number}: {name} {getattr(b, name)} instead of {getattr(a, name)}"
        for number, (a, b) in pairs
        for name in vars(a)
        if getattr(a, name) != getattr(b, name)
    ]


def moments_to_see(span: tuple[float, float], seconds: float, inside: int = 4) -> np.ndarray:
    """Seconds of the frames that show a moment: one from before it, `inside` from within, one from after.

    >>> moments_to_see((10, 20), 30)
    array([ 5. , 11.25, 13.75, 16.25, 18.75, 25. ])
    """
    start, end = min(span[0], seconds), min(span[1], seconds)  # the truth may end behind the video
    within = start + (end - start) * (np.arange(inside) + 0.5) / inside
    return np.array([start / 2, *within, (end + seconds) / 2])


def strips(folder: Path, queries: list[Query], videos: list[str], captions: list[str]) -> list[plots.Strip]:
    """A row of a contact sheet per readable video of `folder`, with frames around the moment of its query."""
    rows = []
    with video_reader.Reader() as reader:
        for video, query, caption in zip(
            annotations.find_videos(folder, videos), queries, captions, strict=True
        ):
            if video.path is not None:
                clip = reader.read(video.path, moments_to_see(query.span, query.duration - 0.5))
                if clip.problem is None:
                    rows.append(plots.Strip(clip.frames, clip.timestamps, caption, query.span))
    return rows


def family_of(scenes: dict, members: int = 4) -> list:
    """The first `members` scenes of the first family of the test split that has two; empty without families."""
    test = [scene for scene in scenes.values() if scene.split == "test"]
    sizes = Counter(scene.family for scene in test)
    first = next((family for family, size in sizes.items() if size > 1), None)
    return [scene for scene in test if scene.family == first][:members]


def a_failure(found: FirstSearch, families: dict) -> int | None:
    """Row of the failed query with the smallest id, those first whose wrong top-1 is a near-duplicate.

    Its right video can be seen: it has a rank.
    """

    def order(row):
        query = found.queries[row]
        return not families or families[found.shown[row]] != families[query.video], query.id

    failed = np.flatnonzero(~found.hits() & (found.ranks != metrics.UNRANKED))
    return min(failed, key=order, default=None)


def failure_strips(folder: Path, found: FirstSearch, row: int | None, scenes: dict) -> list[plots.Strip]:
    """Two rows of a contact sheet: the right video of one query, then the wrong one and what differs in it."""
    if row is None:
        return []
    query, shown = found.queries[row], found.shown[row]
    told = "; ".join(differences(scenes[query.video], scenes[shown])) if scenes else ""
    captions = [f"right, on rank {found.ranks[row]}: {query.text}", f"shown: {shown} {told}"]
    return strips(folder, [query, query], [query.video, shown], captions)


def shorten(text: str, token: str) -> str:
    """`text` with every run of `token` as one and a count.

    >>> shorten("a<p><p><p>b", "<p>")
    'a<p>x3b'
    """
    return re.sub(f"(?:{re.escape(token)})+", lambda run: f"{token}x{len(run[0]) // len(token)}", text)
