"""What episodes are worth: numbers by hand, by plain loops, and by the evaluator of the benchmark."""

import json
import random
import types
from dataclasses import replace

import numpy as np
import pytest

from vsr1 import __main__ as cli
from vsr1.evaluation import metrics
from vsr1.loop.moments import span_iou, span_ms
from vsr1.loop.records import Cost, Episode, Run, Turn
from vsr1.loop.replies import read_reply

RUN = Run("charades", "test", "sqr", 3, 1, 42)
LOOK, STEP = Cost(2.0, 30, 130, 0), Cost(0.5, 8, 8, 1)


def said(verdict, span=None):
    word = {True: "matched", False: "not_matched", None: "perhaps"}[verdict]
    times = f" <start>{span[0]}</start> <end>{span[1]}</end>" if span else ""
    return read_reply(f"<think> a </think> <answer>{word}</answer>{times}", [1, 2])


def turn(t, shown, gt, rank_in, verdict, span=None, out=None, truth=(2.0, 8.0), **more):
    """A turn in a video of 10 s; `out` is (rank, top-1) after the refinement."""
    reply = said(verdict, span)
    clamped = None if reply.span is None else [min(time, 10.0) for time in reply.span]
    iou = float(span_iou(clamped, truth)) if clamped and shown == gt else 0.0
    if out is not None:
        more |= {"refine_kind": "sqr", "refine_tokens": 8, "refine_tokens_tagged": 9, "refine_cost": STEP}
        more |= {"rank_out": out[0], "ties_out": 0, "top1_out": out[1]}
    fields = {"reply": reply, "span_ms": clamped and span_ms(clamped), "iou": iou, "verify_cost": LOOK} | more
    return Turn(t, shown, shown == gt, rank_in, 0, 0.5, 0.9, **fields)


def episode(key, gt, turns, stop="budget", rank=None, problem=None, truth=(2.0, 8.0)):
    rank = turns[0].rank_in if turns else rank
    return Episode(RUN, key, f"query {key}", gt, span_ms(truth), rank, tuple(turns), stop, problem)


@pytest.fixture
def four():
    """Right at once; rescued at the second turn; rejected although right, then lost; not run."""
    at_once = [turn(1, "a", "a", 1, True, (2.0, 8.0))]
    rescued = [turn(1, "x", "b", 14, False, out=(1, "b")), turn(2, "b", "b", 1, True, (2.0, 5.0))]
    lost = [turn(1, "c", "c", 1, False, out=(7, "x")), turn(2, "x", "c", 7, None, out=(3, "y"))]
    lost += [turn(3, "y", "c", 3, False, out=(1, "c"))]
    return [
        episode(1, "a", at_once, "matched"),
        episode(2, "b", rescued, "matched"),
        episode(3, "c", lost),
        episode(4, "d", [], "problem", problem="d: the right video has no vector"),
    ]


def percents(episodes, *names):
    return [metrics.percent(metrics.hits(episodes)[name]) for name in names]


def test_the_numbers_of_four_episodes_are_those_made_by_hand(four):
    with_depths = episode(5, "e", [turn(1, "x", "e", 9, False, out=(2, "y"), rank_by_depth=(9, 8, 3, 5, 2))])
    # 3 s of 6 s is exactly one half
    assert percents(four, "vcmr@0.3", "vcmr@0.5", "vcmr@0.7") == [50, 50, 25]
    assert metrics.true_ranks(four, "orig").tolist() == [1, 14, 1, metrics.UNRANKED]
    assert metrics.right_last(four).tolist() == [True, True, False, False]
    half = metrics.ranks_at_depth([*four, with_depths], lambda n: n // 2)
    assert half.tolist() == [1, 14, 1, metrics.UNRANKED, 3]  # the first search where no depth was recorded
    assert metrics.true_ranks(four, "final").tolist() == [1, 1, 1, metrics.UNRANKED]
    assert percents(four, "vr@1", "right_last", "vr@1_orig") == [75, 50, 50]
    assert percents(four, "vr@1_failed") == [50]  # of the second and the fourth
    assert percents(four, "ver", "ver_turn1") == [75, 50]
    assert [one.desc_id for one in metrics.failed(four)] == [2, 4]
    assert [one.desc_id for one in metrics.refined(four)] == [2, 3]


def test_budgets_are_read_by_carrying_the_last_turn_forward(four):
    by_budget = {budget: metrics.within(four, budget) for budget in (1, 2, 3)}
    names = ("vcmr@0.5", "vr@1", "right_last", "ver")
    assert {budget: percents(cut, *names) for budget, cut in by_budget.items()} == {
        1: [25, 50, 50, 50],
        2: [50, 50, 50, 50],
        3: [50, 75, 50, 75],
    }
    profile = types.SimpleNamespace(headline_turns=2)
    assert metrics.headline(profile, four) == by_budget[2]
    assert metrics.headline(profile, by_budget[1]) == by_budget[1] and metrics.headline(profile, []) == []
    assert by_budget[1][1].stop_reason == "budget" and by_budget[2][1].stop_reason == "matched"
    with pytest.raises(AssertionError):
        metrics.within(four, 4)


def test_a_last_turn_that_rejects_the_right_video_scores_nothing():
    """No forced grounding: a span beside not_matched, or beside no verdict, is no answer."""
    for verdict in (False, None):
        one = episode(1, "a", [turn(1, "a", "a", 1, verdict, (2.0, 8.0))])
        assert metrics.moment_ious([one]).tolist() == [1.0] and not metrics.vcmr_hits([one], 0.3).any()
    nowhere = episode(1, "a", [turn(1, "a", "a", 1, True)], "matched")
    elsewhere = episode(1, "a", [turn(1, "b", "a", 2, True, (2.0, 8.0))], "matched")
    assert not metrics.vcmr_hits([nowhere, elsewhere], 0.3).any()


def test_an_answer_that_ends_after_the_video_is_clamped_and_the_truth_is_not():
    """Of a video of 10 s the answer 0 to 15 counts as 0 to 10."""
    one = episode(1, "a", [turn(1, "a", "a", 1, True, (0.0, 15.0), truth=(0.0, 12.0))], truth=(0.0, 12.0))
    assert metrics.moment_ious([one]).tolist() == [10 / 12]


def test_a_verdict_is_held_against_the_video_that_was_shown_and_an_unknown_one_is_wrong():
    unknown = episode(1, "a", [turn(1, "a", "a", 1, None)])
    wrong = [turn(1, "x", "b", 2, False, out=(2, "y")), turn(2, "y", "b", 2, True)]
    better = episode(
        3, "c", [turn(1, "x", "c", 2, False, out=(1, "c"))]
    )  # c is on top afterwards, and not shown
    episodes = [unknown, episode(2, "b", wrong, "matched"), better]
    assert metrics.ver_hits(episodes).tolist() == [False, False, True]


def test_costs_are_means_over_what_they_are_about(four):
    spent = metrics.costs(four)
    assert (spent["tokens"], spent["tokens_tagged"], spent["refine_seconds"]) == (8, 9, 0.5)
    assert spent["turns"] == 6 / 4 and spent["reused"] == 0
    assert spent["seconds"] == (6 * 2.0 + 4 * 0.5) / 4 and spent["generated"] == (6 * 30 + 4 * 8) / 4
    assert spent["forward"] == (6 * 130 + 4 * 8) / 4 and spent["engine_calls"] == 1 + 4 / 4


def test_a_turn_met_again_refines_and_costs_nothing():
    """Tokens are what a refinement takes; seconds are those that were spent."""
    first = turn(1, "x", "c", 3, False, out=(3, "x"))
    again = replace(first, t=2, reused=True, verify_cost=Cost(), refine_cost=Cost())
    spent = metrics.costs([episode(1, "c", [first, again])])
    assert (spent["tokens"], spent["refine_seconds"], spent["seconds"], spent["reused"]) == (8, 0.5, 2.5, 0.5)


def test_nothing_spent_is_missing_and_not_zero(four):
    spent = metrics.costs(four[:1])
    assert spent["tokens"] is None and spent["refine_seconds"] is None and spent["engine_calls"] == 1


def random_episodes(seed, count=300):
    rng = random.Random(seed)
    episodes = []
    for key in range(count):
        truth = tuple(sorted(rng.sample(range(0, 110), 2)))
        truth = (truth[0] / 10, truth[1] / 10)  # may end after the video
        turns, rank, gt = [], rng.randrange(1, 12), f"v{key % 7}"
        for t in range(1, rng.randrange(1, 5)):
            shown = gt if rank == 1 else f"v{rng.randrange(7)}"
            verdict = rng.choice([True, True, False, None])
            span = (rng.randrange(0, 100) / 10, rng.randrange(0, 100) / 10) if rng.random() < 0.8 else None
            last = rng.random() < 0.3
            out = None if verdict or last else (rng.choice([1, 1, 2, 5, 50]), f"v{rng.randrange(7)}")
            turns.append(turn(t, shown, gt, rank, verdict, span, out, truth))
            if out is None:
                break
            rank = out[0]
        episodes.append(episode(key, gt, turns, truth=truth, problem=None if turns else "gone"))
    return episodes


def test_vcmr_equals_what_the_benchmark_s_evaluator_says_of_the_same_answers(tmp_path, capsys):
    episodes = random_episodes(0)
    videos = sorted({one.gt_video for one in episodes} | {t.shown_id for one in episodes for t in one.turns})
    index = {video: number for number, video in enumerate(videos)}
    entries, rows = [], []
    for one in episodes:
        last = one.turns[-1] if one.turns else None
        answered = last is not None and last.reply.matched is True and last.reply.span is not None
        prediction = [[index[last.shown_id], *last.reply.span, 1.0]] if answered else []
        entries.append({"desc_id": one.desc_id, "desc": one.query, "predictions": prediction})
        span = [time / 1000 for time in one.gt_span_ms]
        rows.append({"desc_id": one.desc_id, "video": one.gt_video, "time": span})
    (tmp_path / "submission.json").write_text(json.dumps({"video2idx": index, "VCMR": entries}))
    (tmp_path / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "submission.json"), str(tmp_path / "truth.jsonl")]
    assert cli.main(["score", *files]) == 0
    scores = json.loads(capsys.readouterr().out)["VCMR"]
    percent = percents(episodes, *[f"vcmr@{m}" for m in metrics.THRESHOLDS])
    assert [round(value, 2) for value in percent] == [scores[f"{m}-r1"] for m in metrics.THRESHOLDS]
    assert percent[0] > percent[2] > 0, "the trial must hit and miss"


def test_hits_equal_a_reader_who_walks_the_records():
    episodes = random_episodes(1)
    hits = metrics.hits(episodes)
    for row, one in enumerate(episodes):
        last = one.turns[-1] if one.turns else None
        final = None if last is None else last.rank_in if last.rank_out is None else last.rank_out
        for k in metrics.VR_KS:
            assert hits[f"vr@{k}"][row] == (final is not None and final <= k)
        assert hits["right_last"][row] == (last is not None and last.shown_id == one.gt_video)
        assert hits["ver"][row] == (
            last is not None and last.reply.matched is (last.shown_id == one.gt_video)
        )
    assert {name for name, values in hits.items() if len(values) != len(episodes)} == {"vr@1_failed"}
    order = np.random.default_rng(0).permutation(len(episodes))
    shuffled = metrics.hits([episodes[row] for row in order])
    assert all((hits[name][order] == shuffled[name]).all() for name in hits if len(hits[name]) == len(order))
    assert metrics.costs([episodes[row] for row in order]) == pytest.approx(metrics.costs(episodes))
