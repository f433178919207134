"""What notebook 02 says about oracle videos: by hand, by plain loops, and as tables."""

from dataclasses import replace

import numpy as np
import pytest
from test_episode_metrics import episode, turn

from vsr1 import config
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics
from vsr1.experiments import common, verification

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
