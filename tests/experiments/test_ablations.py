"""Variants share what they do not change with the main run; their tables by plain loops."""

import dataclasses
import json
from pathlib import Path

import pytest
from fake import profile as fake_profile
from test_episode_metrics import episode, turn

from vsr1 import config
from vsr1.evaluation import metrics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import ablations, common
from vsr1.report import results

SMOKE = config.load("smoke")


@pytest.fixture
def three():
    """Rescued with two of three soft tokens; kept right; accepted at once."""
    far = turn(1, "x", "a", 9, False, out=(1, "a"), rank_by_depth=(9, 2, 1, 1))
    near = turn(1, "b", "b", 1, False, out=(3, "y"), rank_by_depth=(1, 1, 4, 3))
    return [
        episode(1, "a", [far, turn(2, "a", "a", 1, True, (2.0, 8.0))], "matched"),
        episode(2, "b", [near, turn(2, "y", "b", 3, False, out=(2, "z"))]),
        episode(3, "c", [turn(1, "c", "c", 1, True, (2.0, 5.0))], "matched"),
    ]


def values(numbers):
    return {name.split("/", 2)[2]: number.value for name, number in numbers.items()}


def test_soft_tokens_are_counted_over_all_and_over_those_that_refined_at_turn_1(three):
    percent = values(ablations.soft_token_depths(dataclasses.replace(SMOKE, n_soft=3), "charades", three))
    assert [round(percent[f"vsr1/d{d}"]) for d in range(4)] == [67] * 4  # the third at its first search
    assert [percent[f"vsr1-refined/d{d}"] for d in range(4)] == [50, 50, 50, 50]
    assert [percent[f"vsr1-failed/d{d}"] for d in range(4)] == [0, 0, 100, 100]
    nobody = ablations.soft_token_depths(dataclasses.replace(SMOKE, n_soft=3), "charades", three[2:])
    refined = {number.value for name, number in nobody.items() if "/vsr1-" in name}
    assert refined == {None}  # missing, not 0


def test_turns_are_cut_from_one_run_and_the_last_is_the_run_itself(three):
    percent = values(common.turn_budgets(SMOKE, "F5", "charades", {"vsr1": three}))
    assert [round(percent[f"vsr1/vcmr@0.5_t{t}"]) for t in (1, 2, 3)] == [33, 67, 67]
    assert [round(percent[f"vsr1/open_t{t}"]) for t in (1, 2)] == [67, 33]
    for m in metrics.THRESHOLDS:
        assert percent[f"vsr1/vcmr@{m}_t3"] == metrics.percent(metrics.vcmr_hits(three, m))


def test_a_variant_trains_what_it_changes_and_starts_from_the_main_run(tmp_path, monkeypatch):
    """One that changes rewards has the stage 1 of the main run; one that changes soft tokens has its own."""
    run, starts = fake_profile(tmp_path, monkeypatch), []

    def stage_2(profile, dataset, name, stage_1):
        starts.append(stage_1)
        return Path(name)

    monkeypatch.setattr(ablations.sft, "train", lambda profile, dataset: profile.runs(dataset) / "sft")
    monkeypatch.setattr(ablations.grpo, "train", stage_2)
    monkeypatch.setattr(
        ablations.grpo, "continue_sft", lambda profile, *rest: stage_2(profile, *rest[:1], "more", *rest[1:])
    )
    monkeypatch.setattr(common, "run_episodes", lambda profile, dataset, name, like, weights: weights)
    weights = {
        name: ablations.run_variant(run, "didemo", name) for name in ("no-ret", "m3", "calm-sft", "n2")
    }
    assert (weights["no-ret"], weights["m3"], weights["calm-sft"]) == ("vsr1", "m3", "more")
    assert starts == [run.runs("didemo") / "sft"] * 3
    assert weights["n2"] == str(run.with_overrides("n2").runs("didemo") / "sft") != str(starts[0])


def test_calmer_steps_are_set_against_each_of_their_controls(monkeypatch, three):
    """Points ahead are those of the two rows; nothing is ahead of itself."""
    wrong = [
        episode(n, video, [turn(1, "x", video, 9, True, (0.0, 1.0))], "matched")
        for n, video in enumerate("abc", 1)
    ]
    runs = {"calm": three, "calm-shuffled": wrong, "calm-sft": three}
    monkeypatch.setattr(ablations, "main_runs", lambda *_: {"zs": wrong, "sft": wrong, "vsr1": three})
    monkeypatch.setattr(ablations, "run_variant", lambda profile, dataset, name: runs[name])
    numbers = ablations.calmer_steps(SMOKE, "charades")
    percent = {name.removeprefix("B4/charades/"): number.value for name, number in numbers.items()}
    rows = {name.split("/")[0] for name in percent}
    assert rows == results.layouts()["B4"]["systems"].keys()
    for row in rows - {"calm"}:
        for metric in ablations.PARTS:
            assert percent[f"{row}/{metric}_calm"] == percent[f"calm/{metric}"] - percent[f"{row}/{metric}"]
    assert percent["calm-shuffled/ver_calm"] == 100 and "calm/ver_calm" not in percent


def test_what_is_kept_grows_and_forgets_other_knobs(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    common.record_committed(run, "didemo", {"B1/didemo/m1/ver": Estimate(50.0, 4)}, "ablations")
    common.record_committed(run, "didemo", {"B1/didemo/m3/ver": Estimate(60.0, 4)}, "ablations")
    entry = results.collect(run).loc["B1/didemo/m1/ver"]
    assert (entry["value"], entry["measured"]) == (50.0, True) and entry["note"].startswith(
        "committed; run at "
    )
    other = dataclasses.replace(run, infonce_temperature=0.2)
    common.record_committed(other, "didemo", {"B1/didemo/m3/ver": Estimate(70.0, 4)}, "ablations")
    path = run.results() / "ablations" / "didemo.json"
    assert list(json.loads(path.read_text())["numbers"]) == ["B1/didemo/m3/ver"]
    assert not results.collect(run).measured.get("B1/didemo/m3/ver")


def test_every_variant_has_its_words_where_its_table_is_laid_out():
    for table, variants in {"T2": ablations.REWARDS, "B1": ablations.LONGER, "B4": ablations.CALMER}.items():
        assert variants.keys() <= results.layouts()[table]["systems"].keys()
