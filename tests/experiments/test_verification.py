"""What notebook 02 says about oracle videos: by hand, by plain loops, and as tables."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_episode_metrics import episode, turn

from vsr1 import config
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics
from vsr1.experiments import common, verification
from vsr1.loop.replies import read_reply
from vsr1.mini import teacher, world

PROFILE = config.load("smoke")


@pytest.fixture
def oracle():
    """Four queries: accepted and placed, refused although right, unreadable, not run; then all with a wrong video."""
    right = [
        episode(5, "a", [turn(1, "a", "a", 1, True, (2.0, 5.0))], "matched"),
        episode(3, "b", [turn(1, "b", "b", 1, False)], "no_refine"),
        episode(8, "c", [turn(1, "c", "c", 1, None, (2.0, 8.0))], "no_refine"),
        episode(9, "d", [], "problem", problem="d: the right video has no vector"),
    ]
    wrong = [
        episode(5, "a", [turn(1, "x", "a", 4, False)], "no_refine"),
        episode(3, "b", [turn(1, "x", "b", 2, True, (0.0, 1.0))], "matched"),
        episode(8, "c", [turn(1, "x", "c", 2, False)], "no_refine"),
        episode(9, "d", [], "problem", problem="d: the right video has no vector"),
    ]
    durations = {"a": 10.0, "b": 10.0, "c": 12.0, "d": 10.0}
    queries = [Query(0, "", video, (2.0, 8.0), "", seconds) for video, seconds in durations.items()]
    return verification.OracleEpisodes(right, wrong, queries)


def values(numbers):
    return {name.split("/", 2)[2]: number.value for name, number in numbers.items()}


def test_v1_counts_every_turn_of_both_halves(oracle):
    numbers = verification.oracle_numbers(PROFILE, "charades", oracle)
    percent = values(numbers)
    assert (percent["zs/verdict"], percent["zs/verdict_right"], percent["zs/verdict_wrong"]) == (
        37.5,
        25.0,
        50.0,
    )
    overlaps = [0.5, 0.0, 1.0, 0.0]
    for m in metrics.THRESHOLDS:
        assert percent[f"zs/grounding@{m}"] == 25 * sum(overlap >= m for overlap in overlaps)
    assert percent["zs/miou"] == 37.5 and percent["zs/readable"] == 62.5 and percent["zs/spanned"] == 37.5
    assert numbers["V1/charades/zs/verdict"].n == 8 and numbers["V1/charades/zs/verdict_right"].n == 4
    assert percent["majority/verdict"] == 50.0
    assert percent["wholevideo/miou"] == pytest.approx(100 * (0.6 * 3 + 0.5) / 4)


def test_the_confusion_table_has_a_place_for_every_turn(oracle):
    table = verification.confusion(oracle)
    assert table.columns.tolist() == ["matched", "not_matched", "unreadable", "not run"]
    assert table.loc["right video shown"].tolist() == [1, 1, 1, 1]
    assert table.loc["wrong video shown"].tolist() == [1, 2, 0, 1]


def test_a_histogram_puts_every_overlap_into_one_bin_and_thresholds_on_edges():
    ious = np.array([0.0, 1e-6, 0.3, 0.29999, 0.5, 0.7, 0.69, 1.0, 3 / 10, 7 / 10])
    bars = dict(map(tuple, verification.histogram(ious)))
    assert sum(bars.values()) == pytest.approx(100) and bars[-0.1] == 10.0
    for m in metrics.THRESHOLDS:
        above = sum(share for left, share in bars.items() if left >= m)
        assert above == pytest.approx(metrics.percent(metrics.reaches(ious, m)))


def test_the_cases_are_the_smallest_ids_and_say_which_are_missing(oracle):
    cases = verification.example_cases(oracle)
    ids = {kind: episode.desc_id for kind, episode in cases.items()}
    assert ids == {"right acceptance": 5, "right rejection": 5, "wrong verdict": 3}
    assert cases["wrong verdict"] is oracle.right[1]  # of two, the half that is shown first
    assert cases["right rejection"].turns[0].shown_id == "x"
    empty = replace(oracle, right=oracle.right[3:], wrong=oracle.wrong[3:])
    assert set(verification.example_cases(empty).values()) == {None}


def test_a_table_leaves_out_nothing_and_invents_nothing(oracle):
    table = common.table(verification.oracle_numbers(PROFILE, "charades", oracle))
    assert table.loc["zs", "verdict"].startswith("37.5 ±") and table.loc["majority", "verdict"] == "50.0"
    assert table.loc["majority", "miou"] == ""


# --- reasons


def test_a_true_checklist_is_true_and_each_false_word_counts_where_it_belongs():
    scenes = {scene.video: scene for scene in world.make_scenes("charades", "test", 12, 3)}
    videos, runs, wrong = list(scenes), {"true": [], "copied": []}, 0
    for key, (video, shown) in enumerate(itertools.pairwise(videos)):
        asked = scenes[video].moments[0]
        seen = teacher.closest(asked, scenes[shown].moments)
        truth, copied = teacher.checklist(asked, seen), teacher.checklist(asked, asked)
        wrong += len(teacher.differing(asked, seen))
        for name, text in {"true": truth, "copied": copied}.items():
            reply = read_reply(f"<think> {text} </think> <answer>not_matched</answer>", [1])
            looked = replace(turn(1, shown, video, 2, False), reply=reply)
            runs[name].append(episode(key, video, [looked], truth=(asked.start, asked.end)))
    silent = replace(runs["true"][0].turns[0], reply=read_reply("<answer>matched</answer>", [1]))
    runs["silent"] = [replace(runs["true"][0], turns=(silent,))]
    found = {name: verification.statements(run, scenes) for name, run in runs.items()}
    for column in ("stated", "asked", "shown", "yesno"):
        assert found["true"][column].all()
    copied = found["copied"]
    assert len(copied) == 7 * 11 and copied.asked.all() and copied.same.all()
    assert (~copied.shown.astype(bool)).sum() == (~copied.yesno.astype(bool)).sum() == wrong > 9
    assert copied.differs.sum() == wrong and not found["silent"].stated.any()


def test_nobody_knows_the_truth_of_real_video(oracle):
    numbers = verification.trace_numbers(replace(PROFILE, world=None), "charades", {"zs": oracle.right})
    (number,) = numbers.values()
    assert number.value is None and "rendered" in number.note


# --- margins


def judged(key, *margins, right=(), forced=None):
    """An episode that sees a wrong video, unless the turn is in `right`, and accepts where its margin is above 0."""
    turns = []
    for t, margin in enumerate(margins, 1):
        accepts = None if margin is None else margin > 0
        look = turn(t, "a" if t in right else "x", "a", t, accepts, (2.0, 8.0) if accepts else None)
        span = forced if t in right and not accepts else None
        turns.append(replace(look, verdict_margin=margin, forced_span_ms=span))
    return episode(key, "a", turns, "budget")


def test_the_area_under_the_curve_counts_pairs_and_a_missing_margin_accepts_nothing():
    rng = np.random.default_rng(0)
    margin, right = rng.integers(-3, 4, 60).astype(float), rng.random(60) < 0.4
    margin[:4] = -np.inf
    pairs = [(a > b) + (a == b) / 2 for a in margin[right] for b in margin[~right]]
    curve = verification.roc(margin, right)
    assert verification.auc(margin, right) == pytest.approx(np.mean(pairs))
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(np.mean(pairs))
    at_zero = [float((margin[kind] >= 0).mean()) for kind in (~right, right)]
    assert at_zero in curve.tolist() and verification.youden(margin, right) == at_zero[1] - at_zero[0]
    assert np.isnan(verification.auc(margin, np.ones(60, bool)))


def test_answers_at_0_are_those_given_and_forced_or_cheaper_ones_come_on_top():
    run = [
        judged(1, 2.0, right=(1,)),  # accepted, right
        judged(
            2, -0.5, -3.0, right=(1, 2), forced=(2000, 8000)
        ),  # rejected twice, would have named the moment
        judged(3, -0.5, 1.0, right=(2,)),  # right after a wrong video, which a lower threshold takes
        judged(4, -0.1, right=(1,), forced=(0, 1000)),  # would have named another moment
        judged(5, None, right=(1,)),  # no verdict
        judged(6, 1.0),  # a wrong video
    ]
    hits = lambda *options, **more: verification.answer_hits(run, *options, **more).tolist()  # noqa: E731
    assert hits(0) == metrics.vcmr_hits(run, 0.5).tolist() == [True, False, True, False, False, False]
    assert hits(0, forced=True) == [True, True, True, False, False, False]
    assert hits(-0.5) == [True, True, False, False, False, False]
    known = [
        row for row in range(6) if row != 4
    ]  # no verdict counts as wrong in VER, and as a rejection here
    assert (verification.judged_hits(run, 0) == metrics.ver_hits(run))[known].all()
    assert verification.choose_threshold(run, verification.answer_hits) == 0  # of equals, the nearest to 0
    assert verification.choose_threshold(run[1:2], verification.answer_hits) == -0.5
    assert verification.choose_threshold(run[3:4], verification.judged_hits) == -0.1
    numbers = verification.margin_numbers(PROFILE, "charades", {"sft": run, "zs": run}, {"sft": run})
    value = {name.split("/", 2)[2]: number.value for name, number in numbers.items()}
    assert value["sft/vcmr@0.5_forced"] == 50.0 and value["sft/theta"] == 0 and "zs/theta" not in value
    assert value["zs/accept_right"] == 25.0 and value["zs/accept_wrong"] == 50.0 and value["zs/j"] == -25.0
