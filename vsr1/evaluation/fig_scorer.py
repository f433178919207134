"""The evaluator of the FIG benchmarks: `python -m vsr1 score SUBMISSION.json GROUNDTRUTH.jsonl`.

VERIFIED released none; published numbers come from TVR's script with renamed fields. Formats, output and
refusals are DATASETS section 5. A fault of the input is one `error:` line on stderr and exit status 2: a
number is printed only when it is about every query of the ground truth.
"""

import gc
import json
import sys
from dataclasses import dataclass

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat

from vsr1.config import InputError
from vsr1.data.annotations import Name, is_number, numbered_lines, parse_json, read_text
from vsr1.evaluation import metrics

TASKS = ("VCMR", "SVMR", "VR")  # the order of the output


@dataclass(frozen=True)
class Truth:
    """The ground truth of Q queries, in the order of the file."""

    row: dict  # desc_id, int or str, to its row 0 .. Q-1
    videos: tuple[str, ...]  # (Q,)
    spans: np.ndarray  # (Q, 2) float64 seconds, start <= end
    swapped: int  # how many were written the other way round


@dataclass(frozen=True)
class Ranked:
    """The predictions of one task, cut at 100, in the order of the ground truth."""

    right: np.ndarray  # (Q, 100) bool: names the right video; False behind the end of a list
    spans: np.ndarray  # (Q, 100, 2) float64 seconds; 0 in VR and behind the end of a list


def refuse(path, faults):
    """Stop at the first of several faults of one kind, and say how many more there are."""
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


def read_truth(path):
    """The ground truth: JSON lines, each query once, exactly one span each; blank lines are passed over."""
    rows, faults, first = [], [], {}
    for n, line in numbered_lines(read_text(path))[0]:
        try:
            row = parse_json(line, path, n, TruthRow)
            rows.append((n, row.desc_id, row.video, row.time))
        except InputError as error:
            faults.append(str(error).removeprefix(f"{path}, "))
    refuse(path, faults)
    if not rows:
        raise InputError(f"{path}: no query in it; expected one JSON object a line")
    for row, (n, query, _, _) in enumerate(rows):
        if first.setdefault(query, row) != row:
            faults.append(f"line {n}: desc_id {query!r} was used before, on line {rows[first[query]][0]}")
    refuse(path, faults)
    spans = np.array([[float(min(span)), float(max(span))] for _, _, _, span in rows])
    swapped = sum(span[0] > span[1] for _, _, _, span in rows)
    return Truth(first, tuple(video for _, _, video, _ in rows), spans, swapped)


# --- Submission


def _index_column(video2idx, truth, path):
    """Submission index to video; refuses what is no unique integer and a ground-truth video without one."""
    odd = [
        f"'video2idx' of {video!r} is not an integer" for video, i in video2idx.items() if not _is_index(i)
    ]
    refuse(path, odd)
    owner, faults = {}, []
    for video, i in video2idx.items():
        if owner.setdefault(i, video) != video:
            faults.append(f"'video2idx' gives index {i!r} to two videos, {owner[i]!r} and {video!r}")
    refuse(path, faults)
    missing = [video for video in dict.fromkeys(truth.videos) if video not in video2idx]
    refuse(path, [f"'video2idx' lacks the ground-truth video {video!r}" for video in missing])
    return owner


def _is_index(value):
    """Whether a JSON value can be an index: an integer, or a float without a fraction; not a boolean."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _entries(task, entries, truth, path):
    """desc_id to its predictions; refuses a task without exactly one readable entry per query."""
    if not isinstance(entries, list):
        raise InputError(f"{path}: {task} must be a list of entries")
    faults = []
    for n, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            faults.append(f"{task}: entry {n} is not an object with 'desc_id' and 'predictions'")
        elif missing := [key for key in ("desc_id", "predictions") if key not in entry]:
            faults.append(f"{task}: entry {n} (desc_id {entry.get('desc_id')!r}) has no {missing[0]!r}")
        elif not isinstance(entry["predictions"], list):
            faults.append(f"{task}: 'predictions' of entry {n} (desc_id {entry['desc_id']!r}) is not a list")
    refuse(path, faults)
    known = [type(entry["desc_id"]) in (int, str) and entry["desc_id"] in truth.row for entry in entries]
    strangers = [entry["desc_id"] for entry, ok in zip(entries, known, strict=True) if not ok]
    refuse(path, [f"{task}: desc_id {query!r} is not in the ground truth" for query in strangers])
    found = {}
    for entry in entries:
        if found.setdefault(entry["desc_id"], entry["predictions"]) is not entry["predictions"]:
            faults.append(f"{task}: desc_id {entry['desc_id']!r} has two entries")
    refuse(path, faults)
    refuse(path, [f"{task}: desc_id {query!r} has no entry" for query in truth.row if query not in found])
    return found


def _fault(prediction, owner, fields):
    """What is wrong with one prediction, or None; what follows the fields that are read may be anything."""
    if type(prediction) is not list or len(prediction) < fields:
        return f"is not a list of at least {fields} values"
    if not _is_index(prediction[0]) or prediction[0] not in owner:
        return f"has index {prediction[0]!r:.40}, which 'video2idx' lacks"
    for time in prediction[1:fields]:
        if not is_number(time):
            return f"has time {time!r:.40}, which is not a finite number"
    return None


def read_task(task, entries, truth, owner, path):
    """The predictions of one task as arrays; only the first 100 of each list are looked at."""
    found = _entries(task, entries, truth, path)
    fields, faults = (1 if task == "VR" else 3), []
    right = np.zeros((len(truth.row), metrics.CUT), dtype=bool)
    spans = np.zeros((len(truth.row), metrics.CUT, 2))
    for query, row in truth.row.items():
        read = found[query][: metrics.CUT]
        told = [(i, fault) for i, p in enumerate(read) if (fault := _fault(p, owner, fields))]
        faults += [
            f"{task}: desc_id {query!r}: position {i + 1} (predictions[{i}]) {what}" for i, what in told
        ]
        if read and not faults:
            right[row, : len(read)] = [owner[p[0]] == truth.videos[row] for p in read]
            if fields == 3:
                spans[row, : len(read)] = [(float(p[1]), float(p[2])) for p in read]
    refuse(path, faults)
    return Ranked(right, spans)


def read_submission(path, truth):
    """Task name to `Ranked`, in the order of the output, for the tasks that the file holds."""
    gc.disable()  # a million small lists, none of them garbage: looking for some doubles the time
    try:
        content = parse_json(read_text(path), path)
    finally:
        gc.enable()
    if not isinstance(content, dict) or not isinstance(content.get("video2idx"), dict):
        raise InputError(f"{path}: 'video2idx' must be an object that gives each video id an integer")
    tasks = [task for task in TASKS if task in content]
    if not tasks:
        raise InputError(f"{path}: none of the tasks {', '.join(TASKS)} is there")
    owner = _index_column(content["video2idx"], truth, path)
    return {task: read_task(task, content[task], truth, owner, path) for task in tasks}


# --- Scores


def task_scores(task, ranked, truth, thresholds, float32):
    """`<m>-r<K>`, or `r<K>` for VR, in percent with two decimals."""
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


# --- Command line


def print_scores(submission, groundtruth, iou=(), float32=False) -> None:
    """Print the scores of a submission as one JSON object; a warning goes to stderr.

    submission   path of ranked predictions for all queries
    groundtruth  path of FIG or TVR annotations, one query a line
    iou          thresholds as a person typed them; empty: `metrics.THRESHOLDS`
    float32      round as TVR's evaluator does
    """
    thresholds = [_threshold(text) for text in iou or metrics.THRESHOLDS]
    truth = read_truth(groundtruth)
    rankings = read_submission(submission, truth)
    if truth.swapped:
        print(f"warning: {groundtruth}: {truth.swapped} reversed times swapped", file=sys.stderr)
    scores = {
        task: task_scores(task, ranked, truth, thresholds, float32) for task, ranked in rankings.items()
    }
    print(json.dumps(scores))


def _threshold(text):
    try:
        threshold = float(text)
    except ValueError:
        threshold = float("nan")
    if not 0 < threshold <= 1:  # also where it is not a number
        raise InputError(f"--iou {text}: not a number above 0 and at most 1")
    return threshold
