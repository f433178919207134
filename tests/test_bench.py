"""The benchmark itself: that it compares like with like, and what it writes."""

import csv
import json

import pytest
import torch

from vsr1 import bench


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    return bench.measure(False, "mini", 100, 6, rounds=2, targets=True)


def test_ratios_are_those_of_the_seconds_and_targets_stand_beside_them(rows):
    assert [row.target for row in rows] == [5.0, None, 2.5, 2.5]
    for row in rows:
        assert 0 < row.ratio_low <= row.ratio <= row.ratio_high
        assert (
            row.ratio_low * row.ours_s <= 2 * row.plain_s and row.plain_s <= 2 * row.ratio_high * row.ours_s
        )


def test_ways_that_disagree_are_not_timed_as_equals():
    with pytest.raises(AssertionError):
        bench.in_turn([lambda: torch.zeros(2), lambda: torch.ones(2)], 1, torch.testing.assert_close)


def test_rounds_take_turns_and_the_slow_way_is_not_run_for_nothing():
    order = []
    ways = [lambda: order.append("plain"), lambda: order.append("ours")]
    assert bench.in_turn(ways, 2, lambda first, other: None).shape == (2, 2)
    assert order == ["ours", "plain", "ours", "plain", "ours"]


def test_the_larger_model_and_the_prompts_are_as_large_as_claimed():
    with torch.device("meta"):
        config = bench.make_config(large=True, rows=1000)
        size = sum(weight.numel() for weight in bench.Qwen3VLForConditionalGeneration(config).parameters())
    assert 180e6 < size < 240e6
    assert 512 <= len(bench.long_prompt(bench.random_policy(large=False), 512).ids) < 600


def test_both_files_hold_every_row(rows, tmp_path):
    bench.write(rows, tmp_path, minutes=1.0)
    told = json.loads((tmp_path / "agent.json").read_text())
    assert {"machine", "threads", "versions", "peak_memory_gb", "minutes"} <= set(told) and told[
        "threads"
    ] == 1
    with open(tmp_path / "agent.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert (
        [float(row["ratio"]) for row in table]
        == [row.ratio for row in rows]
        == [r["ratio"] for r in told["rows"]]
    )
