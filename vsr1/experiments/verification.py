"""Verdicts and spans in the oracle video (notebook 02)."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.evaluation import metrics
from vsr1.experiments import refinement, retrieval
from vsr1.loop import moments
from vsr1.loop.records import Episode
from vsr1.report import plots
from vsr1.report.results import Estimate

# --- 02: a video that is given away


@dataclass(frozen=True)
class Known:
    """Every test query once with its right video and once with the engine's best wrong one: one look each."""

    right: list[Episode]
    wrong: list[Episode]
    durations: list[float]  # seconds, of the right videos

    @property
    def both(self) -> list[Episode]:
        """The looks of both halves."""
        return self.right + self.wrong


def known(profile: Profile, dataset: str) -> Known:
    """Both halves of the base model's known-video test."""
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    halves = [refinement.episodes(profile, dataset, f"oracle-{half}") for half in ("right", "wrong")]
    return Known(*halves, [query.duration for query in queries])


def known_numbers(profile: Profile, dataset: str, looked: Known) -> dict[str, Estimate]:
    """V1: how the base model judges and grounds, beside the floors of one that does not look."""
    ious = metrics.moment_ious(looked.right)
    values = {"verdict": (looked.both, metrics.ver_hits(looked.both))}
    values |= {
        f"verdict_{half}": (getattr(looked, half), metrics.ver_hits(getattr(looked, half)))
        for half in ("right", "wrong")
    }
    values |= {f"grounding@{m}": (looked.right, metrics.reaches(ious, m)) for m in metrics.THRESHOLDS}
    values |= {"miou": (looked.right, ious)}
    values |= {key: (looked.both, hits) for key, hits in readings(looked.both).items() if key != "cut"}
    numbers = {f"zs/{key}": refinement.share(profile, *pair) for key, pair in values.items()}
    largest = max(len(looked.right), len(looked.wrong))
    numbers["majority/verdict"] = Estimate(100 * largest / len(looked.both), len(looked.both))
    truth, rng = np.array([one.gt_span_ms for one in looked.right]) / 1000, np.random.default_rng([profile.seed, 0])
    floors = {
        "wholevideo": metrics.whole_video_floor(looked.durations, truth),
        "random": metrics.random_span_floor(looked.durations, truth, rng=rng),
    }
    for floor, values in floors.items():
        numbers |= {f"{floor}/{key}": Estimate(value, len(truth)) for key, value in values.items()}
    return {f"V1/{dataset}/{name}": number for name, number in numbers.items()}


def readings(looked: list[Episode]) -> dict[str, np.ndarray]:
    """How replies can be read, (Q,) each, at the first turn.

    strict   the asked layout to the letter
    readable a verdict was found (the tolerant count)
    spanned  two times were found
    cut      it ended at the limit of new tokens
    """
    replies = [one.turns[0].reply if one.turns else None for one in looked]
    ways = {
        "strict": lambda reply: reply.strict,
        "readable": lambda reply: reply.matched is not None,
        "spanned": lambda reply: reply.span is not None,
        "cut": lambda reply: not reply.ended,
    }
    return {key: np.array([r is not None and way(r) for r in replies]) for key, way in ways.items()}


def confusion(looked: Known) -> pd.DataFrame:
    """Verdicts as counts: a row per half, a column per verdict; a video that could not be read has no verdict."""
    rows = {}
    for label, half in {"right video shown": looked.right, "wrong video shown": looked.wrong}.items():
        said = Counter(metrics.verdict(one, 0) if one.problem is None else "not run" for one in half)
        rows[label] = {refinement.WORDS[verdict]: said[verdict] for verdict in refinement.WORDS} | {
            "not run": said["not run"]
        }
    return pd.DataFrame(rows).T


def histogram(ious) -> list:
    """[left edge, percent] of overlaps: exactly 0 at -0.1, then ten bins that hold their left edge, the last also 1.

    >>> [pair for pair in histogram([0.0, 0.3, 1.0, 1.0]) if pair[1]]
    [[-0.1, 25.0], [0.3, 25.0], [0.9, 50.0]]
    """
    ious = np.asarray(ious, dtype=float)
    bins = np.where(ious > 0, np.minimum(np.floor(ious * 10 + metrics.IOU_EPS), 9), -1)
    return [[bin / 10, metrics.percent(bins == bin)] for bin in range(-1, 10)]


def iou_series(dataset: str, looked: Known) -> dict[str, list]:
    """V2: histograms of overlap with the right moment, of the spans that were named and of the whole video."""
    truth = np.array([one.gt_span_ms for one in looked.right]) / 1000
    whole = moments.span_iou([(0, seconds) for seconds in looked.durations], truth)
    both = {"zs": metrics.moment_ious(looked.right), "wholevideo": whole}
    return {f"V2/{dataset}/{system}/iou": histogram(ious) for system, ious in both.items()}


def cases(looked: Known) -> dict[str, Episode | None]:
    """Three looks picked by rule, the smallest query id of each kind; None where there is none of it."""

    def first(half, verdicts):
        found = [one for one in half if one.problem is None and metrics.verdict(one, 0) in verdicts]
        return min(found, key=lambda one: one.desc_id, default=None)

    wrong = [first(looked.right, (False, None)), first(looked.wrong, (True, None))]
    return {
        "right acceptance": first(looked.right, (True,)),
        "right rejection": first(looked.wrong, (False,)),
        "wrong verdict": min(filter(None, wrong), key=lambda one: one.desc_id, default=None),
    }


def case_text(kind: str, one: Episode | None) -> str:
    """A look in words: query, truth, and the reply in full."""
    if one is None:
        return f"{kind}: none"
    turn, (start, end) = one.turns[0], np.array(one.gt_span_ms) / 1000
    truth = f"the right video, moment {start:.1f} to {end:.1f} s" if turn.shown_is_gt else "a wrong video"
    overlap = f", overlap {turn.iou:.2f}" if turn.shown_is_gt and turn.span_ms else ""
    shown = f"{kind}: query {one.desc_id}, shown {turn.shown_id} ({truth}{overlap})"
    return f"{shown}\n  query: {one.query}\n  reply: {turn.reply.text}"


def case_strips(folder: Path, chosen: dict[str, Episode | None]) -> list[plots.Strip]:
    """A row of a contact sheet per look: frames around the moment of a right video, all along a wrong one."""
    rows = []
    with video_reader.Reader() as reader:
        for kind, one in chosen.items():
            if one is None:
                continue
            turn, span = one.turns[0], tuple(np.array(one.gt_span_ms) / 1000)
            path = annotations.find_videos(folder, [turn.shown_id])[0].path
            clip = reader.read(path)
            if turn.shown_is_gt:
                clip = reader.read(path, retrieval.moments_to_see(span, clip.seconds - 0.5))
            caption = f"{kind} ({refinement.WORDS[turn.reply.matched]}): {one.query}"
            rows.append(
                plots.Strip(clip.frames, clip.timestamps, caption, span if turn.shown_is_gt else None)
            )
    return rows
