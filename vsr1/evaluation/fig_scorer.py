"""The evaluator of the FIG benchmarks: `python -m vsr1 score SUBMISSION.json GROUNDTRUTH.jsonl`.

The authors of VERIFIED released none; published numbers come from TVR's script with renamed fields. Formats, output
and refusals are defined in docs/data.md section 5. A fault of the input is an InputError: a number is printed only
when it is about every query of the ground truth.
"""

import gc
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from vsr1.config import InputError
from vsr1.data.annotations import Name, numbered_lines, parse_json, read_text
from vsr1.evaluation import metrics

TASKS = ("VCMR", "SVMR", "VR")  # the order of the output


# --- Ground truth


class TruthRow(BaseModel):
    """One line of the ground truth, under FIG or TVR keys; FIG wins."""

    model_config = ConfigDict(strict=True)

    desc_id: int | str
    video: Name = Field(validation_alias=AliasChoices("video", "vid_name"))
    time: tuple[FiniteFloat, FiniteFloat] = Field(validation_alias=AliasChoices("time", "ts"))


@dataclass(frozen=True)
class Truth:
    """The ground truth of Q queries, in the order of the file."""

    row: dict  # desc_id, int or str, to its row 0 .. Q-1
    videos: tuple[str, ...]  # (Q,)
    spans: np.ndarray  # (Q, 2) float64 seconds, start <= end
    swapped: int  # how many were written the other way round


def read_truth(path) -> Truth:
    """Read the ground truth: JSON lines, each query once with one span; blank lines are skipped."""
    rows = {}
    for n, line in numbered_lines(read_text(path))[0]:
        row = parse_json(line, path, n, TruthRow)
        if row.desc_id in rows:
            raise InputError(f"{path}, line {n}: desc_id {row.desc_id!r} was used before")
        rows[row.desc_id] = row
    if not rows:
        raise InputError(f"{path}: no query in it; expected one JSON object a line")
    spans = np.array([row.time for row in rows.values()], dtype=np.float64)  # (Q, 2)
    swapped = int((spans[:, 0] > spans[:, 1]).sum())
    videos = tuple(row.video for row in rows.values())
    return Truth({key: number for number, key in enumerate(rows)}, videos, np.sort(spans, axis=1), swapped)


# --- Submission

Index = int | FiniteFloat  # of a video; numpy writes whole numbers as 1.0


def _cut(fields):
    """Cut predictions at 100, and each of them behind the fields that are read: what follows may be anything."""

    def cut(predictions):
        if not isinstance(predictions, list):
            return predictions
        return [tuple(p[:fields]) if isinstance(p, list) else p for p in predictions[: metrics.CUT]]

    return BeforeValidator(cut)


class Moments(BaseModel):
    """The moments of one query, best first."""

    desc_id: int | str
    predictions: Annotated[list[tuple[Index, FiniteFloat, FiniteFloat]], _cut(3)]


class Videos(BaseModel):
    """The videos of one query, best first."""

    desc_id: int | str
    predictions: Annotated[list[tuple[Index]], _cut(1)]


class Submission(BaseModel):
    """A submission file; other keys may stand beside these."""

    video2idx: dict[str, Index]
    VCMR: list[Moments] = ()
    SVMR: list[Moments] = ()
    VR: list[Videos] = ()


@dataclass(frozen=True)
class Ranked:
    """The predictions of one task, cut at 100, in the order of the ground truth."""

    right: np.ndarray  # (Q, 100) bool: names the right video; False behind the end of a list
    spans: np.ndarray  # (Q, 100, 2) float64 seconds; 0 in VR and behind the end of a list


def read_submission(path, truth: Truth) -> dict[str, Ranked]:
    """Return {task: its predictions}, in the order of the output, for the tasks that the file holds."""
    gc.disable()  # a million small lists, none of them garbage: looking for some doubles the time
    try:
        submission = parse_json(read_text(path), path, kind=Submission)
    finally:
        gc.enable()
    tasks = [task for task in TASKS if task in submission.model_fields_set]
    if not tasks:
        raise InputError(f"{path}: none of the tasks {', '.join(TASKS)} is there")
    video_of = _videos_by_index(submission.video2idx, truth, path)
    return {task: _read_task(getattr(submission, task), truth, video_of, f"{path}: {task}") for task in tasks}


def _videos_by_index(video2idx, truth, path):
    """Return {index: video}; refuse an index of two videos, and a ground-truth video without one."""
    video_of = {}
    for video, index in video2idx.items():
        if (other := video_of.setdefault(index, video)) != video:
            raise InputError(
                f"{path}: 'video2idx' gives index {index!r} to two videos, {other!r} and {video!r}"
            )
    for video in truth.videos:
        if video not in video2idx:
            raise InputError(f"{path}: 'video2idx' lacks the ground-truth video {video!r}")
    return video_of


def _read_task(entries, truth, video_of, location):
    """Return the predictions of one task as arrays."""
    right = np.zeros((len(truth.row), metrics.CUT), dtype=bool)
    spans = np.zeros((len(truth.row), metrics.CUT, 2))
    for query, predictions in _by_query(entries, truth, location).items():
        row, count = truth.row[query], len(predictions)
        for position, (index, *_) in enumerate(predictions, 1):
            if index not in video_of:
                unknown = f"index {index!r:.40}, which 'video2idx' lacks"
                raise InputError(f"{location}: desc_id {query!r}: position {position} has {unknown}")
        right[row, :count] = [video_of[index] == truth.videos[row] for index, *_ in predictions]
        if predictions and len(predictions[0]) > 1:
            spans[row, :count] = [span for _, *span in predictions]
    return Ranked(right, spans)


def _by_query(entries, truth, location):
    """Return {desc_id: its predictions}; refuse a task without exactly one entry per query."""
    predictions = {}
    for entry in entries:
        if entry.desc_id not in truth.row:
            raise InputError(f"{location}: desc_id {entry.desc_id!r} is not in the ground truth")
        if entry.desc_id in predictions:
            raise InputError(f"{location}: desc_id {entry.desc_id!r} has two entries")
        predictions[entry.desc_id] = entry.predictions
    for query in truth.row:
        if query not in predictions:
            raise InputError(f"{location}: desc_id {query!r} has no entry")
    return predictions


# --- Scores


def task_scores(task, ranked: Ranked, truth: Truth, thresholds, float32: bool) -> dict[str, float]:
    """Return `<m>-r<K>`, or `r<K>` for VR, in percent with two decimals."""
    if task == "VR":
        return _recalls("r", metrics.vr_ranks(ranked.right))
    iou = metrics.span_iou_as_written(ranked.spans, truth.spans[:, None], float32)  # (Q, 100)
    ranks = metrics.vcmr_ranks if task == "VCMR" else metrics.svmr_ranks
    scores = {}
    for m in thresholds:
        scores |= _recalls(f"{m}-r", ranks(ranked.right, iou, m))
    return scores


def _recalls(prefix, ranks):
    return {f"{prefix}{k}": round(metrics.recall_at(ranks, k), 2) for k in metrics.VR_KS}


def print_scores(submission, groundtruth, iou=(), float32=False) -> None:
    """Print the scores of a submission as one JSON object; a warning goes to stderr.

    submission   path of ranked predictions for all queries
    groundtruth  path of FIG or TVR annotations, one query a line
    iou          thresholds as a person typed them; empty: `metrics.THRESHOLDS`
    float32      round as TVR's evaluator does
    """
    thresholds = [_threshold(text) for text in iou or metrics.THRESHOLDS]
    truth = read_truth(groundtruth)
    tasks = read_submission(submission, truth)
    if truth.swapped:
        print(f"warning: {groundtruth}: {truth.swapped} reversed times swapped", file=sys.stderr)
    scores = {task: task_scores(task, ranked, truth, thresholds, float32) for task, ranked in tasks.items()}
    print(json.dumps(scores))


def _threshold(text):
    try:
        threshold = float(text)
    except ValueError:
        threshold = float("nan")
    if not 0 < threshold <= 1:  # also where it is not a number
        raise InputError(f"--iou {text}: not a number above 0 and at most 1")
    return threshold
