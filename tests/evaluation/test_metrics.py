"""The metrics against fractions, against scalar loops, and on the trivial floors of the real files."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vsr1.data.annotations import gallery_ids, read_fig
from vsr1.evaluation import metrics
from vsr1.evaluation.metrics import UNRANKED
from vsr1.loop import moments
from vsr1.models import search_index

REAL = next((up / "shared/data" for up in Path(__file__).parents if (up / "shared/data").is_dir()), None)
real = pytest.mark.skipif(REAL is None, reason="the real annotation files (shared/data) are not here")

# Ground truth, prediction, hit at .5 under the default and under --float32: the table of docs/data.md section 4.
EDGES = [
    ((14.2, 23.0), (10.1, 27.7), True, True),
    ((14.2, 23.0), (16.5, 20.9), True, False),
    ((24.0, 34.0), (23.2, 29.4), True, True),
    ((14.2, 23.0), (17.5, 25.2), True, False),
]


def grid_spans(rng, n):
    """(n, 2) seconds on the 0.1 s grid, some reversed or empty; few values, so thresholds are hit exactly."""
    return rng.integers(140, 170, size=(n, 2)) / 10


def exact_iou(a, b):
    """Intersection over union of two (start, end), as a fraction of the decimals as written."""
    (a0, a1), (b0, b1) = ([Fraction(repr(float(time))) for time in span] for span in (a, b))
    shared = max(Fraction(0), min(a1, b1) - max(a0, b0))
    union = (a1 - a0) + (b1 - b0) - shared
    return shared / union if shared else Fraction(0)


def float32_iou(a, b):
    """The formula one float32 at a time, in its order."""
    (a0, a1), (b0, b1) = ([np.float32(time) for time in span] for span in (a, b))
    shared = max(np.float32(0), np.float32(min(a1, b1) - max(a0, b0)))
    hull = np.float32(max(a1, b1) - min(a0, b0))
    return np.float32(shared / hull) if hull != 0 else np.float32(0)


@pytest.mark.parametrize(("truth", "answer", "default", "float32"), EDGES)
def test_an_overlap_of_exactly_one_half_is_decided_as_the_table_says(truth, answer, default, float32):
    assert exact_iou(answer, truth) == Fraction(1, 2)
    assert bool(metrics.reaches(moments.span_iou(answer, truth), 0.5)) is default
    assert bool(metrics.reaches(metrics.span_iou_as_written(answer, truth), 0.5)) is default
    assert bool(metrics.reaches(metrics.span_iou_as_written(answer, truth, float32=True), 0.5)) is float32


def test_overlaps_equal_fractions_on_a_grid_full_of_ties():
    rng = np.random.default_rng(0)
    answers, truth = grid_spans(rng, 5000), np.sort(grid_spans(rng, 5000), axis=1)
    exact = [exact_iou(answer, span) for answer, span in zip(answers, truth, strict=True)]
    written = metrics.span_iou_as_written(answers, truth)
    assert moments.span_iou(answers, truth).tolist() == [float(iou) for iou in exact]
    on_threshold = 0
    for m in ("0.3", "0.5", "0.7", "1"):
        hits = [iou >= Fraction(m) for iou in exact]
        on_threshold += sum(iou == Fraction(m) for iou in exact)
        assert metrics.reaches(moments.span_iou(answers, truth), float(m)).tolist() == hits
        assert metrics.reaches(written, float(m)).tolist() == hits
    assert on_threshold > 50  # or the test says little


def test_float32_overlaps_equal_a_scalar_loop_bit_for_bit():
    rng = np.random.default_rng(1)
    answers, truth = grid_spans(rng, 5000), np.sort(grid_spans(rng, 5000), axis=1)
    ious = metrics.span_iou_as_written(answers, truth, float32=True)
    loop = np.array([float32_iou(answer, span) for answer, span in zip(answers, truth, strict=True)])
    assert ious.dtype == loop.dtype == np.float32
    assert ious.tobytes() == loop.tobytes()
    for m in metrics.THRESHOLDS:
        assert metrics.reaches(ious, m).tolist() == [bool(iou > 0 and iou >= np.float32(m)) for iou in loop]


def test_overlaps_broadcast_and_leave_their_inputs_alone():
    answers, truth = (
        np.array([[[0.0, 5.0], [5.0, 15.0]], [[0.0, 10.0], [9.0, 3.0]]]),
        np.array([[0.0, 10.0]] * 2),
    )
    before = answers.copy()
    assert moments.span_iou(answers, truth[:, None]).tolist() == [[0.5, 5 / 15], [1.0, 0.0]]
    assert (answers == before).all()


def test_ranks_equal_a_sort_with_the_right_video_before_or_behind_its_ties():
    rng = np.random.default_rng(2)
    scores, truth = rng.integers(0, 6, size=(50, 20)) / 5, rng.integers(0, 20, size=50)
    for row, column, best, worst, tied in zip(
        scores,
        truth,
        search_index.ranks(scores, truth),
        search_index.ranks_pessimistic(scores, truth),
        search_index.ties(scores, truth),
        strict=True,
    ):
        first = sorted(range(20), key=lambda video: (-row[video], video != column))
        last = sorted(range(20), key=lambda video: (-row[video], video == column))
        assert (best, worst) == (first.index(column) + 1, last.index(column) + 1)
        assert tied == worst - best


def test_recall_counts_every_query_and_no_queries_are_no_number():
    assert [metrics.recall_at(np.array([1, 5, 6, UNRANKED]), k) for k in metrics.VR_KS] == [
        25.0,
        50.0,
        75.0,
        75.0,
    ]
    for empty in (lambda: metrics.recall_at([], 1), lambda: metrics.percent([])):
        with pytest.raises(AssertionError):
            empty()


# --- docs/data.md section 6: answers that look at nothing, on the real files


def numbers(queries, answer):
    """R@1 at .3, .5, .7 and mIoU of one answer per (duration, span), two decimals."""
    truth = np.array([query.span for query in queries])
    answers = np.array([answer(query.duration, query.span) for query in queries])
    return [round(value, 2) for value in metrics.grounding(answers, truth).values()]


ANSWERS = {
    "whole video": lambda duration, span: (0, duration),
    "first half": lambda duration, span: (0, duration / 2),
    "[0, 5]": lambda duration, span: (0, 5),
    "[0, 10]": lambda duration, span: (0, 10),
    "cut": lambda duration, span: (span[0], min(span[1], duration)),
    "whole seconds": lambda duration, span: (round(span[0]), round(span[1])),  # halves to even
    # times on the axis of 64 frames that are labelled 0 to 63 s although the video is longer
    "squeezed": lambda duration, span: tuple(time * min(1.0, 64 / duration) for time in span),
}
CHARADES, VAL, TEST = (
    f"verified_fig/{name}.jsonl.gz" for name in ("charades_fig_test", "didemo_fig_val", "didemo_fig_test")
)
FLOORS = {
    (CHARADES, "whole video"): [34.49, 0.00, 0.00, 26.96],
    (CHARADES, "first half"): [49.57, 25.43, 9.95, 30.12],
    (CHARADES, "cut"): [100, 100, 99.60, 98.29],
    (CHARADES, "whole seconds"): [100, 100, 100, 94.39],
    (VAL, "whole video"): [10.37, 1.80, 0.31, 16.67],
    (VAL, "[0, 5]"): [25.84, 25.10, 21.08, 23.40],
    (VAL, "squeezed"): [92.67, 88.69, 86.51, 88.20],
    (TEST, "whole video"): [9.15, 1.20, 0.12, 15.63],
    (TEST, "[0, 10]"): [43.01, 40.22, 3.69, 23.27],
    (TEST, "cut"): [100, 99.63, 99.20, 99.19],
    ("fixtures/charades_fig_test.mini.jsonl", "whole video"): [33.78, 0.00, 0.00, 28.41],
    ("fixtures/didemo_fig_test.mini.jsonl", "whole video"): [14.63, 3.66, 0.00, 18.96],
}


@pytest.fixture(scope="module")
def real_queries():
    """File name to its queries, each read once."""
    cache = {}

    def queries(name):
        if name not in cache:
            cache[name] = read_fig(REAL / name)
        return cache[name]

    return queries


@real
@pytest.mark.parametrize(("name", "answer"), FLOORS)
def test_an_answer_that_looks_at_nothing_scores_as_stated(real_queries, name, answer):
    assert numbers(real_queries(name), ANSWERS[answer]) == FLOORS[name, answer]


@real
@pytest.mark.parametrize("name", [CHARADES, VAL, TEST])
def test_the_whole_video_floor_is_the_answer_from_zero_to_duration(real_queries, name):
    queries = real_queries(name)
    floor = metrics.whole_video_floor(
        [query.duration for query in queries], [query.span for query in queries]
    )
    assert [round(value, 2) for value in floor.values()] == FLOORS[name, "whole video"]


@real
@pytest.mark.parametrize(
    ("name", "chances"),
    [
        (CHARADES, [0.075, 0.375, 0.750, 7.50]),
        (VAL, [0.094, 0.470, 0.940, 9.40]),
        (TEST, [0.100, 0.499, 0.998, 9.98]),
    ],
)
def test_chance_retrieval_is_k_out_of_the_gallery(real_queries, name, chances):
    videos = len(gallery_ids(real_queries(name)))
    recalls = [metrics.chance_recall(videos, k) for k in metrics.VR_KS]
    assert [round(value, 3) for value in recalls[:3]] == chances[:3] and round(recalls[3], 2) == chances[3]
