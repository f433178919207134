"""The evaluator of the FIG benchmarks: `python -m vsr1 score SUBMISSION.json GROUNDTRUTH.jsonl`.

The authors of VERIFIED released none; published numbers come from TVR's script with renamed fields. Formats, output
and refusals are defined in docs/data.md section 5. A fault of the input is an InputError: a number is printed only
when it is about every query of the ground truth.
"""

import gc
import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat

from vsr1.config import InputError
from vsr1.data.annotations import Name, is_number, numbered_lines, parse_json, read_text
from vsr1.evaluation import metrics

TASKS = ("VCMR", "SVMR", "VR")  # the order of the output


def refuse(path, faults: list[str]) -> None:
    """Raise InputError with the first of several faults of one kind and how many more there are, if there are any."""
    if faults:
        more = f" (and {len(faults) - 1} more of this kind)" if len(faults) > 1 else ""
        raise InputError(f"{path}: {faults[0]}{more}")


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
    rows, faults, first = [], [], {}
    for n, line in numbered_lines(read_text(path))[0]:
        try:
            rows.append(parse_json(line, path, n, TruthRow))
        except InputError as error:
            faults.append(str(error).removeprefix(f"{path}, "))
            continue
        if (before := first.setdefault(rows[-1].desc_id, n)) != n:
            repeated = f"desc_id {rows[-1].desc_id!r} was used before, on line {before}"
            faults.append(f"line {n}: {repeated}")
    refuse(path, faults)
    if not rows:
        raise InputError(f"{path}: no query in it; expected one JSON object a line")
    spans = np.array([row.time for row in rows], dtype=np.float64)  # (Q, 2)
    row_of = {row.desc_id: number for number, row in enumerate(rows)}
    swapped = int((spans[:, 0] > spans[:, 1]).sum())
    return Truth(row_of, tuple(row.video for row in rows), np.sort(spans, axis=1), swapped)


# --- Submission


class Entry(BaseModel):
    """The predictions of one query, best first: [video index, start, end, ..] each; VR needs no times."""

    desc_id: Any
    predictions: list[Any]


class Submission(BaseModel):
    """A submission file; other keys may stand beside these."""

    video2idx: dict[str, Any]
    VCMR: list[Entry] = ()
    SVMR: list[Entry] = ()
    VR: list[Entry] = ()


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
    return {task: _read_task(task, getattr(submission, task), truth, video_of, path) for task in tasks}


def _videos_by_index(video2idx, truth, path):
    """{index: video}; refuses what is no unique integer, and a ground-truth video without one."""
    odd = [video for video, index in video2idx.items() if not _is_index(index)]
    refuse(path, [f"'video2idx' of {video!r} is not an integer" for video in odd])
    video_of, faults = {}, []
    for video, index in video2idx.items():
        if (other := video_of.setdefault(index, video)) != video:
            faults.append(f"'video2idx' gives index {index!r} to two videos, {other!r} and {video!r}")
    refuse(path, faults)
    missing = [video for video in dict.fromkeys(truth.videos) if video not in video2idx]
    refuse(path, [f"'video2idx' lacks the ground-truth video {video!r}" for video in missing])
    return video_of


def _is_index(value):
    """Whether a JSON value can be an index: an integer, or a float without a fraction; not a boolean."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _predictions_by_query(task, entries, truth, path):
    """{desc_id: its predictions}; refuses a task without exactly one entry per query."""
    ids = [entry.desc_id for entry in entries]
    strangers = [key for key in ids if type(key) not in (int, str) or key not in truth.row]
    refuse(path, [f"{task}: desc_id {key!r} is not in the ground truth" for key in strangers])
    predictions = {entry.desc_id: entry.predictions for entry in entries}
    if len(predictions) < len(ids):
        refuse(
            path, [f"{task}: desc_id {key!r} has two entries" for key in predictions if ids.count(key) > 1]
        )
    refuse(path, [f"{task}: desc_id {key!r} has no entry" for key in truth.row if key not in predictions])
    return predictions


def _read_task(task, entries, truth, video_of, path):
    """The predictions of one task as arrays; only the first 100 of each list are read."""
    lists = _predictions_by_query(task, entries, truth, path)
    fields, faults = (1 if task == "VR" else 3), []
    right = np.zeros((len(truth.row), metrics.CUT), dtype=bool)
    spans = np.zeros((len(truth.row), metrics.CUT, 2))
    for query, row in truth.row.items():
        predictions = lists[query][: metrics.CUT]
        for i, prediction in enumerate(predictions):
            if fault := _fault(prediction, video_of, fields):
                faults.append(f"{task}: desc_id {query!r}: position {i + 1} (predictions[{i}]) {fault}")
        if predictions and not faults:
            right[row, : len(predictions)] = [video_of[p[0]] == truth.videos[row] for p in predictions]
            if fields == 3:
                spans[row, : len(predictions)] = [(float(p[1]), float(p[2])) for p in predictions]
    refuse(path, faults)
    return Ranked(right, spans)


def _fault(prediction, video_of, fields):
    """What is wrong with one prediction, or None; what follows the fields that are read may be anything."""
    if type(prediction) is not list or len(prediction) < fields:
        return f"is not a list of at least {fields} values"
    if not _is_index(prediction[0]) or prediction[0] not in video_of:
        return f"has index {prediction[0]!r:.40}, which 'video2idx' lacks"
    for time in prediction[1:fields]:
        if not is_number(time):
            return f"has time {time!r:.40}, which is not a finite number"
    return None


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
