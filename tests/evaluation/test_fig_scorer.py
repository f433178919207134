"""The evaluator as a person runs it: its formats, its refusals, and an independent evaluator beside it."""

import gzip
import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_metrics import exact_iou, float32_iou

from vsr1 import __main__ as cli
from vsr1.evaluation import fig_scorer

ROOT = Path(__file__).parents[2]

# The worked example of docs/data.md section 5.
TRUTH = [{"desc_id": 1, "video": "A", "time": [0, 10]}, {"desc_id": 2, "video": "B", "time": [5, 15]}]
SUBMISSION = """
{"video2idx": {"A": 0, "B": 1},
 "VCMR": [{"desc_id": 1, "predictions": [[1, 0, 10, 0.9], [0, 0, 5, 0.8]]},
          {"desc_id": 2, "predictions": [[1, 5, 12, 0.7]]}],
 "SVMR": [{"desc_id": 2, "predictions": [[0, 5, 15, 0.9], [1, 15, 5, 0.8]]},
          {"desc_id": 1, "predictions": [[0, 0, 5, 0.8]]}],
 "VR":   [{"desc_id": 1, "predictions": [[1, 0, 0, 0.9], [0, 0, 0, 0.8]]}, {"desc_id": 2, "predictions": []}]}
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Run the evaluator on a submission and a ground truth, objects or raw text; (status, stdout, stderr)."""

    def run(submission, truth, *options):
        text = submission if isinstance(submission, str) else json.dumps(submission)
        lines = truth if isinstance(truth, str) else "".join(json.dumps(row) + "\n" for row in truth)
        (tmp_path / "sub.json").write_text(text, encoding="utf-8")
        (tmp_path / "truth.jsonl").write_text(lines, encoding="utf-8")
        status = cli.main(["score", str(tmp_path / "sub.json"), str(tmp_path / "truth.jsonl"), *options])
        return status, *capsys.readouterr()

    return run


def example(**change):
    """The example with some keys of the submission changed; None takes a key away."""
    return {key: value for key, value in (json.loads(SUBMISSION) | change).items() if value is not None}


def vcmr(*predictions):
    """The example with these predictions for query 1 as its only task."""
    entries = [{"desc_id": 2, "predictions": []}, {"desc_id": 1, "predictions": list(predictions)}]
    return example(VCMR=entries, SVMR=None, VR=None)


def refused(result, *named):
    """Whether one error line names all of these and nothing else was printed."""
    status, out, err = result
    assert (status, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, err
    for name in named:
        assert name in err, err
    return True


# --- Formats


def test_the_worked_example_prints_the_stated_numbers(run):
    status, out, err = run(SUBMISSION, TRUTH)
    scores = json.loads(out)
    keys = [f"{m}-r{k}" for m in (0.3, 0.5, 0.7) for k in (1, 5, 10, 100)]
    assert (status, err) == (0, "") and list(scores) == ["VCMR", "SVMR", "VR"]
    assert scores["VCMR"] == dict(zip(keys, [50.0, 100.0, 100.0, 100.0] * 2 + [50.0] * 4, strict=True))
    assert scores["SVMR"] == dict(zip(keys, [50.0] * 8 + [0.0] * 4, strict=True))
    assert scores["VR"] == {"r1": 0.0, "r5": 50.0, "r10": 50.0, "r100": 50.0}
    assert list(scores["VCMR"]) == keys and list(scores["VR"]) == ["r1", "r5", "r10", "r100"]


def test_the_command_line_prints_the_same_without_loading_torch_or_pandas(tmp_path):
    (tmp_path / "s.json").write_text(SUBMISSION)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, TRUTH)))
    command = [
        sys.executable,
        *"-X importtime -m vsr1 score".split(),
        tmp_path / "s.json",
        tmp_path / "t.jsonl",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and json.loads(done.stdout)["VR"]["r5"] == 50.0
    assert done.stdout.count("\n") == 1
    assert "numpy" in loaded and not loaded & {"torch", "pandas", "transformers"}


def test_thresholds_are_printed_as_python_prints_the_number(run):
    scores = json.loads(run(SUBMISSION, TRUTH, "--iou", "0.50", "1")[1])
    assert list(scores["SVMR"]) == [f"{m}-r{k}" for m in ("0.5", "1.0") for k in (1, 5, 10, 100)]


def test_tvr_keys_are_read_and_fig_keys_win(run):
    tvr = [{"desc_id": row["desc_id"], "vid_name": row["video"], "ts": row["time"]} for row in TRUTH]
    both = [row | {"vid_name": "Z", "ts": [90, 99], "duration": "?"} for row in TRUTH]
    assert run(SUBMISSION, tvr) == run(SUBMISSION, both) == run(SUBMISSION, TRUTH)


def test_reversed_ground_truth_is_swapped_with_one_warning(run):
    reversed_rows = [row | {"time": row["time"][::-1]} for row in TRUTH]
    status, out, err = run(SUBMISSION, reversed_rows)
    assert (status, out) == run(SUBMISSION, TRUTH)[:2]
    assert err.startswith("warning: ") and len(err.splitlines()) == 1 and " 2 " in err


def test_ids_are_told_apart_by_type(run):
    rows = [TRUTH[0], TRUTH[1] | {"desc_id": "1"}]
    entries = [{"desc_id": "1", "predictions": [[1, 5, 15]]}, {"desc_id": 1, "predictions": []}]
    scores = json.loads(run({"video2idx": {"A": 0, "B": 1}, "VR": entries}, rows)[1])
    assert scores["VR"]["r1"] == 50.0


def test_what_is_not_read_may_be_anything(run):
    plain = run(vcmr([0, 0, 5]), TRUTH)
    tail = json.dumps(vcmr([0.0, 0, 5, "x", None, {"a": []}])).replace('"x"', "NaN, Infinity, " + "9" * 4000)
    late = vcmr([0, 0, 5], *[[0, 20, 30]] * 99, ["bad"], None, [7, True])
    more = vcmr([0, 0, 5]) | {"other": 1, "video2idx": {"A": 0, "B": 10**30, "C": -7}}
    assert plain[0] == 0 and plain[:2] == run(tail, TRUTH)[:2] == run(late, TRUTH)[:2] == run(more, TRUTH)[:2]


def test_blank_lines_a_missing_last_line_end_and_gzip_change_nothing(run, tmp_path, capsys):
    lines = "\n\n".join(map(json.dumps, TRUTH)) + "\n \r\n"
    plain = run(SUBMISSION, TRUTH)
    assert run(SUBMISSION, lines) == plain
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert cli.main(["score", str(tmp_path / "sub.json"), str(tmp_path / "t.jsonl.gz")]) == 0
    assert capsys.readouterr().out == plain[1]


def test_only_the_first_hundred_predictions_are_read_before_any_filter(run):
    behind = vcmr(*[[1, 0, 10]] * 100, [0, 0, 10])
    within = vcmr(*[[1, 0, 10]] * 99, [0, 0, 10])
    for submission, percent in ((behind, 0.0), (within, 50.0)):
        submission["SVMR"] = submission["VCMR"]
        scores = json.loads(run(submission, TRUTH)[1])
        assert scores["VCMR"]["0.5-r100"] == scores["SVMR"]["0.5-r1"] == percent
        assert scores["VCMR"]["0.5-r10"] == 0.0


def test_a_video_listed_twice_takes_two_places_and_empty_spans_hit_nothing(run):
    first = {"desc_id": 1, "predictions": [[1]] * 5 + [[0]]}
    second = {"desc_id": 2, "predictions": [[1.0, "any"]]}
    scores = json.loads(run(example(VR=[first, second]), TRUTH)[1])["VR"]
    assert list(scores.values()) == [50.0, 50.0, 100.0, 100.0]
    empty = json.loads(run(vcmr([0, 3, 3]), [TRUTH[0] | {"time": [3, 3]}, TRUTH[1]], "--iou", "1e-300")[1])
    assert set(empty["VCMR"].values()) == {0.0}


def test_enormous_times_are_misses_and_print_no_warning(run):
    for float32 in ((), ("--float32",)):
        status, out, err = run(vcmr([0, -1e308, 1e308], [0, 1e300, 10**300]), TRUTH, *float32)
        assert (status, err) == (0, "") and set(json.loads(out)["VCMR"].values()) == {0.0}


# --- Refusals: every row of the table in docs/data.md section 5


@pytest.mark.parametrize("name", ["sub.json", "truth.jsonl"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe{"])
def test_a_file_that_cannot_be_read_is_named(run, tmp_path, capsys, name, content):
    run(SUBMISSION, TRUTH)
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_bytes(content)
    status = cli.main(["score", str(tmp_path / "sub.json"), str(tmp_path / "truth.jsonl")])
    assert refused((status, *capsys.readouterr()), str(tmp_path / name))


@pytest.mark.parametrize(("text", "line"), [("", 1), ("{\n\n}}", 3), ("[" * 100_000, 1)])
def test_a_submission_that_is_not_json_is_refused_with_its_line(run, text, line):
    assert refused(run(text, TRUTH), "sub.json", f"line {line}")


@pytest.mark.parametrize(
    "row",
    ["{", "[]", "[" * 100_000]
    + [{"video": "A", "time": [0, 1]}, {"desc_id": 3, "time": [0, 1]}, {"desc_id": 3, "video": "A"}]
    + [TRUTH[0] | {"desc_id": value} for value in (1.0, True, None, 2)]  # 2 is used again on the last line
    + [TRUTH[0] | {"desc_id": 3, "video": value} for value in (None, 5)]
    + [TRUTH[0] | {"desc_id": 3, "time": value} for value in (1, [1], [1, 2, 3], ["0", 1], [0, True])]
    + [TRUTH[0] | {"desc_id": 3, "time": [0, value]} for value in (float("nan"), float("inf"), 10**400)],
)
def test_a_bad_line_of_the_ground_truth_is_refused_with_its_number(run, row):
    lines = [json.dumps(TRUTH[1]), "", row if isinstance(row, str) else json.dumps(row), json.dumps(TRUTH[0])]
    assert refused(run(SUBMISSION, "\n".join(lines)), "truth.jsonl", "line 3")


@pytest.mark.parametrize("nothing", ["", "\n\n"])
def test_an_empty_ground_truth_is_refused(run, nothing):
    assert refused(run(SUBMISSION, nothing), "truth.jsonl")


@pytest.mark.parametrize(
    ("submission", "named"),
    [
        ("[]", ["must be an object"]),
        (example(video2idx=None), ["video2idx"]),
        (example(video2idx=[["A", 0]]), ["video2idx"]),
        (example(video2idx={"A": 0}), ["'B'"]),
        (example(video2idx={"A": 0, "B": 1, "Cee": 0}), ["'A'", "'Cee'"]),
        *[(example(video2idx={"A": 0, "B": 1, "Cee": value}), ["Cee"]) for value in ("0", None, True, [0])],
        (example(VCMR=None, SVMR=None, VR=None), ["VCMR", "SVMR", "VR"]),
        (example(VR={"1": []}), ["VR"]),
        (example(VR=[{"predictions": []}]), ["VR[0].desc_id"]),
        (example(VR=[{"desc_id": 1, "predictions": None}]), ["VR[0].predictions"]),
        (example(SVMR=[[1, []]]), ["SVMR[0]"]),
    ],
)
def test_a_submission_without_its_keys_is_refused_with_key_and_task(run, submission, named):
    assert refused(run(submission, TRUTH), "sub.json", *named)


@pytest.mark.parametrize("task", fig_scorer.TASKS)
def test_every_query_needs_exactly_one_entry(run, task):
    one, two = {"desc_id": 1, "predictions": []}, {"desc_id": 2, "predictions": []}
    for entries in ([two], [one, two, one]):
        assert refused(run(example(**{task: entries}), TRUTH), "sub.json", f"{task}: desc_id 1")
    for stranger in (33, "1"):
        entries = [{"desc_id": stranger, "predictions": []}, two]
        assert refused(run(example(**{task: entries}), TRUTH), "sub.json", f"{task}: desc_id {stranger!r}")
    for stranger in (1.0, True, None, [1]):  # 1.0 and True equal 1 in Python
        entries = [{"desc_id": stranger, "predictions": []}, two]
        assert refused(run(example(**{task: entries}), TRUTH), "sub.json", f"{task}[0].desc_id")


@pytest.mark.parametrize(
    "prediction",
    [None, [], [0, 1], "012", ["0", 0, 1], [True, 0, 1], [None, 0, 1], [float("nan"), 0, 1]]
    + [[0, value, 1] for value in (float("nan"), "1", None, True, 10**400)]
    + [[0, 1, value] for value in (float("-inf"), {}, "huge")],
)
def test_a_bad_prediction_is_refused_with_task_and_position(run, prediction):
    text = json.dumps(vcmr([0, 0, 1], prediction))
    text = text.replace('"huge"', "1" + "0" * 4000)  # Python would not write it
    assert refused(run(text, TRUTH), "sub.json", "VCMR[1].predictions[1]")


@pytest.mark.parametrize("index", [9, 0.5, -1])
def test_an_index_of_no_video_is_refused_with_task_query_and_position(run, index):
    assert refused(run(vcmr([0, 0, 1], [index, 0, 1]), TRUTH), "sub.json", "VCMR: desc_id 1: position 2")
    entries = [{"desc_id": 1, "predictions": [[index]]}, {"desc_id": 2, "predictions": []}]
    assert refused(run(example(VR=entries), TRUTH), "VR: desc_id 1: position 1")


def test_a_bad_prediction_in_vr_is_one_without_an_index(run):
    for prediction in ([], ["A"], None):
        entries = [{"desc_id": 1, "predictions": [prediction]}, {"desc_id": 2, "predictions": []}]
        assert refused(run(example(VR=entries), TRUTH), "VR[0].predictions[0]")


def test_an_error_leaves_no_warning_beside_it(run):
    assert refused(run(example(VR=[]), [TRUTH[0] | {"time": [10, 0]}, TRUTH[1]]))


def test_a_name_with_line_ends_stays_on_one_line(run, capsys):
    rows = [TRUTH[0] | {"video": "A\nB\u2028C\r"}, TRUTH[1]]
    assert refused(run(SUBMISSION, rows), "sub.json")
    assert refused((cli.main(["score", "no\nsuch.json", "no\nsuch.jsonl"]), *capsys.readouterr()))


@pytest.mark.parametrize("value", ["0", "-0.5", "1.01", "nan", "half"])
def test_a_threshold_outside_its_range_is_named(run, value):
    assert refused(run(SUBMISSION, TRUTH, "--iou", "0.5", value), "--iou", value)


def test_an_unknown_option_or_a_missing_file_name_is_one_error_line(capsys):
    for argv in (["one.json"], ["a", "b", "c"], ["a", "b", "--float"]):
        assert refused((cli.main(["score", *argv]), *capsys.readouterr()))


# --- The same numbers computed another way


def slow_scores(submission, truth, iou, number):
    """An evaluator that walks every list; `iou` compares two spans, `number` makes a threshold comparable."""
    scores, videos = {}, {i: video for video, i in submission["video2idx"].items()}
    for task in [task for task in ("VCMR", "SVMR", "VR") if task in submission]:
        lists = {entry["desc_id"]: entry["predictions"][:100] for entry in submission[task]}
        for m in [None] if task == "VR" else ["0.3", "0.5", "0.7"]:
            for k in (1, 5, 10, 100):
                hits = 0
                for row in truth:
                    listed = [(videos[p[0]] == row["video"], p[1:3]) for p in lists[row["desc_id"]]]
                    if task == "SVMR":
                        listed = [p for p in listed if p[0]]
                    hits += any(
                        right and (m is None or iou(span, sorted(row["time"])) >= number(m))
                        for right, span in listed[:k]
                    )
                key = f"r{k}" if m is None else f"{m}-r{k}"
                scores.setdefault(task, {})[key] = round(hits / len(truth) * 100, 2)
    return scores


def random_world(seed, queries=60):
    """A ground truth and a submission on a coarse 0.1 s grid, where overlaps often equal a threshold."""
    draw = random.Random(seed)
    videos = [f"v{i}" for i in range(5)]

    def span():
        return [draw.randint(140, 165) / 10, draw.randint(155, 180) / 10]

    truth = [{"desc_id": i, "video": draw.choice(videos), "time": sorted(span())} for i in range(queries)]
    entries = {
        task: [
            {
                "desc_id": i,
                "predictions": [
                    [draw.randrange(5), *span(), 0.1] for _ in range(draw.choice((0, 1, 7, 30, 110)))
                ],
            }
            for i in draw.sample(range(queries), queries)
        ]
        for task in ("VCMR", "SVMR", "VR")
    }
    return {"video2idx": {video: i for i, video in enumerate(videos)}, **entries}, truth


@pytest.mark.parametrize("seed", range(4))
def test_an_evaluator_in_fractions_gives_the_same_numbers(run, seed):
    submission, truth = random_world(seed)
    assert json.loads(run(submission, truth)[1]) == slow_scores(submission, truth, exact_iou, Fraction)


def test_a_scalar_float32_evaluator_gives_the_numbers_of_the_float32_option(run):
    different = 0
    for seed in range(3):
        submission, truth = random_world(seed)
        scores = json.loads(run(submission, truth, "--float32")[1])
        assert scores == slow_scores(submission, truth, float32_iou, np.float32)
        different += scores != json.loads(run(submission, truth)[1])
    assert different  # or the option is not tested


def test_four_thousand_queries_with_a_hundred_predictions_score_in_ten_seconds(run):
    truth = [{"desc_id": i, "video": f"v{i % 20}", "time": [1.5, 12.5]} for i in range(4000)]
    lists = np.random.default_rng(0).uniform(0, 30, size=(20, 100, 3)).round(2).tolist()
    lists = [
        json.dumps([[(i + n) % 1000, *p] for n, p in enumerate(listed)]) for i, listed in enumerate(lists)
    ]
    entries = ", ".join(f'{{"desc_id": {i}, "predictions": {lists[i % 20]}}}' for i in range(4000))
    index = json.dumps({f"v{i}": i for i in range(1000)})
    text = f'{{"video2idx": {index}, "VCMR": [{entries}], "SVMR": [{entries}], "VR": [{entries}]}}'
    start = time.process_time()  # not the clock on the wall: the machine may be busy with something else
    status, out, _ = run(text, truth)
    seconds = time.process_time() - start
    assert status == 0 and json.loads(out)["VR"]["r1"] == 100.0 and seconds < 10, seconds
