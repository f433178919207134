"""The benchmark itself: that it compares like with like, and what it writes."""

import csv
import json

import pytest
import torch

from benchmarks import common, speed
from vsr1.models import prompt_text


@pytest.fixture(scope="module")
def rows():
    """Of both claims, without a process of its own: its memory is that of pytest."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "alone", lambda work, *args: work(*args))
        latents = speed.measure_latents("mini", 100, 6, rounds=2, target=5.0)
        return latents + speed.measure_steps("mini", 100, 6, rounds=2, at_once=2)


def test_ratios_are_those_of_the_seconds_and_targets_stand_beside_them(rows):
    assert [row.target for row in rows] == [5.0, None, 2.5, None]
    for row in rows:
        assert 0 < row.ratio_low <= row.ratio <= row.ratio_high
        assert (
            row.ratio_low * row.ours_s <= 2 * row.plain_s and row.plain_s <= 2 * row.ratio_high * row.ours_s
        )
    whole, few = rows[2:]
    assert 0 < few.ours_gb <= few.plain_gb == whole.plain_gb  # the highest so far, in the order of the ways
    assert few.plain_s == whole.plain_s


def test_steps_that_say_or_learn_something_else_are_not_timed_as_equals():
    step = speed.GRPOStep("mini", 100, 6)
    words, loss, gradient = first = step.run(True)
    speed.same_step(first, step.run(False))
    others = {"other replies": (words[1:], loss, gradient), "another loss": (words, loss + 0.01, gradient)}
    others["another gradient"] = words, loss, gradient * 1.01
    for message, other in others.items():
        with pytest.raises(AssertionError, match=message):
            speed.same_step(first, other)
    step.trainer.objective.worker.knobs.__dict__["grpo_infonce_weight"] = 0.5  # frozen, but this step's own
    with pytest.raises(AssertionError):
        speed.same_step(first, step.run(True))


def test_ways_that_disagree_are_not_timed_as_equals():
    with pytest.raises(AssertionError):
        speed.in_turn([lambda: torch.zeros(2), lambda: torch.ones(2)], 1, torch.testing.assert_close)


def test_rounds_take_turns_and_the_slow_way_is_not_run_for_nothing():
    order = []
    ways = [lambda: order.append("plain"), lambda: order.append("ours")]
    assert speed.in_turn(ways, 2, lambda first, other: None).shape == (2, 2)
    assert order == ["ours", "plain", "ours", "plain", "ours"]


def test_the_larger_model_and_the_prompts_are_as_large_as_claimed():
    with torch.device("meta"):
        model = speed.Qwen3VLForConditionalGeneration(common.make_config(speed.LARGE))
    assert 180e6 < sum(weight.numel() for weight in model.parameters()) < 240e6
    policy = speed.random_policy("mini")
    prompt = policy.prompt(prompt_text.SYSTEM, common.QUERY, speed.noise_clip(policy, 512))
    assert 512 <= len(prompt.ids) < 600


def test_both_files_hold_every_row(rows, tmp_path):
    common.write(rows, tmp_path, "agent", minutes=1.0)
    written = json.loads((tmp_path / "agent.json").read_text())
    assert {"machine", "versions", "commit", "peak_memory_gb", "minutes"} <= set(written)
    assert written["threads"] == 1
    with open(tmp_path / "agent.csv", newline="") as file:
        table = list(csv.DictReader(file))
    ratios = [row.ratio for row in rows]
    assert [float(row["ratio"]) for row in table] == [row["ratio"] for row in written["rows"]] == ratios
