"""Baselines that do not iterate: what is counted, and interventions against the loop itself."""

# ruff: noqa: F811

import dataclasses

import numpy as np
import pytest
from test_evaluate import agent, random_one, read, search_engine, world  # noqa: F401 (fixtures)
from test_retry import vectors  # noqa: F401 (fixture)

from vsr1.evaluation import evaluate
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import premise, retry
from vsr1.loop import runner
from vsr1.loop.records import read_episodes
from vsr1.report import readme, results


@pytest.fixture
def refined(world, search_engine, agent, monkeypatch):
    """(ranks of each intervention, the retry study on the same queries)"""
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    monkeypatch.setattr(premise.grpo, "train", lambda profile, _: profile.policy)
    reply = "<think> colour green - black no. </think> <answer>not_matched</answer> <REFINE>"
    agent.script = lambda system, query, clip: reply
    found = premise.intervene(world, "charades")
    return found, retry.run_retries(world, "charades", "sqr")


def test_without_an_intervention_the_loop_s_own_refinement_comes_out(refined, world):
    found, episodes = refined
    assert found["ids"] == [episode.desc_id for episode in episodes]
    assert found["ranks"]["sqr"] == [episode.turns[0].rank_out for episode in episodes]
    # All say the same, so another query's reply is the same reply.
    assert found["ranks"]["sqr-other-reply"] == found["ranks"]["sqr"]
    assert found["ranks"].keys() == premise.INTERVENTIONS.keys()
    numbers = premise.intervention_numbers(world, "charades", found)
    hits = np.mean([episode.turns[0].rank_out == 1 for episode in episodes])
    assert numbers["P2/charades/sqr/vr@1"].value == pytest.approx(100 * hits)
    same = numbers["P2/charades/sqr-other-reply/over-sqr"]
    assert (same.value, same.ci) == (0, (0, 0))


def test_an_intervention_that_needs_rendered_truth_is_missing_without_it(refined, world):
    found = refined[0] | {"ranks": {"sqr": refined[0]["ranks"]["sqr"]}}
    numbers = premise.intervention_numbers(world, "charades", found)
    assert numbers["P2/charades/sqr-asked-corrupted/vr@1"].value is None
    assert numbers["P2/charades/sqr-asked-corrupted/vr@1"].note == "needs rendered truth"


def test_what_a_system_is_over_the_loop_is_paired_over_queries(world, search_engine, agent, monkeypatch):
    """Two systems that hit half of the queries: if the same half, their difference is exactly 0."""
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    one, *_ = read_episodes(evaluate.run_system(world, "charades", "clearest", like="rerank"))

    def system(found):
        turns = [dataclasses.replace(one.turns[0], iou=float(hit)) for hit in found]
        rows = [dataclasses.replace(one, desc_id=n, turns=(turn,)) for n, turn in enumerate(turns)]
        return [dataclasses.replace(row, gt_video=f"{n}") for n, row in enumerate(rows)]

    runs = {"vsr1": system([True, False] * 20), "skip": system([False, True] * 20)}
    runs["walkdown-ft"] = system([True, False] * 20)
    monkeypatch.setattr(premise.common, "run_episodes", lambda profile, dataset, name, whole: runs[name])
    monkeypatch.setattr(premise.metrics, "verdict", lambda episode, turn: True)
    monkeypatch.setattr(premise.common, "clusters", lambda profile, rows: [row.gt_video for row in rows])
    numbers = premise.look_numbers(world, "charades", tuple(runs))
    same, other = (numbers[f"P1/charades/walkdown-ft/over-{name}"] for name in ("vsr1", "skip"))
    assert (same.value, same.ci) == (0, (0, 0))
    assert other.value == 0 and other.ci[0] < -10 and other.ci[1] > 10
    assert "P1/charades/vsr1/over-vsr1" not in numbers


def test_the_clearest_of_several_looks_answers(world, search_engine, agent, monkeypatch):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    one, *_ = read_episodes(evaluate.run_system(world, "charades", "clearest", like="rerank"))
    inside = tuple(one.gt_span_ms)
    looks = [
        dataclasses.replace(
            one.turns[0], verdict_margin=margin, shown_is_gt=right, span_ms=None, forced_span_ms=span
        )
        for margin, right, span in ((-3.0, False, None), (None, True, inside), (-1.0, True, inside))
    ]
    assert premise.clearest_turn(looks) is looks[2] and premise.clearest_turn(looks[1:2]) is None
    assert [premise.answers_right(look, one) for look in (*looks, None)] == [False, True, True, False]
    assert not premise.answers_right(dataclasses.replace(looks[2], forced_span_ms=None), one)


def test_a_prediction_is_held_against_what_was_measured():
    words = "soft tokens without a loop"
    numbers = {"P1/didemo/adapter-soft/first@1": Estimate(70.0), "P1/didemo/vsr1/vr@1": Estimate(72.5)}
    rows = premise.outcomes("didemo", numbers)
    assert (
        list(rows.loc["X1 tokens"])[1:] == ["-2.5 points", "yes"]
        and words in rows.loc["X1 tokens", "predicted"]
    )
    assert set(rows.drop("X1 tokens")["measured"]) == {"MISSING"}


def test_the_cost_on_the_page_is_that_of_the_systems_that_are_run():
    assert sorted(readme.extra_systems()) == sorted(premise.MORE_SYSTEMS + premise.RERANKED)


def test_every_row_of_the_tables_has_words():
    tables = results.layouts()
    assert set(tables["P2"]["systems"]) == premise.INTERVENTIONS.keys()
    first = map(premise.row_name, (*premise.FIRST, *premise.MORE_FIRST))
    rows = {
        "typed",
        *first,
        *premise.SYSTEMS,
        *premise.MORE_SYSTEMS,
        *premise.LOOP,
    }
    assert rows <= set(tables["P1"]["systems"])
