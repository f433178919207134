"""What is said of the paper's claims, from numbers.json alone."""

import dataclasses

from vsr1.evaluation.statistics import Estimate
from vsr1.report import results, verdicts


def judge(numbers):
    """Verdicts of Estimates by name, as numbers.json would hold them."""
    rest = {"measured": True, "paper": None, "verdict": None}
    frame = results.frame({name: dataclasses.asdict(number) | rest for name, number in numbers.items()})
    return verdicts.judge(frame, ["charades"])


def test_every_seed_must_agree_before_a_claim_holds_over_seeds():
    numbers = {"R1/charades/refined/points": Estimate(4.0, ci=(1.0, 7.0))}
    first = judge(numbers | {"R1/charades/refined/lowest": Estimate(-0.1)})[0]
    assert (first.verdict, first.verdict_seeds) == (
        "not measured",
        "not shown",
    ) and "lowest -0.1" in first.seeds
    assert judge(numbers | {"R1/charades/refined/lowest": Estimate(0.1)})[0].verdict_seeds == "holds"


def test_soft_tokens_are_held_against_the_shortest_rewrite():
    values = {"sqr": 8.0, "hqr-blind": 26.0, "hqr-seen": 9.0, "hqr-reasoned": 27.0}
    numbers = {f"S1/charades/{name}/tokens": Estimate(value) for name, value in values.items()}
    last = judge(numbers)[-1]
    assert (last.value, last.verdict) == ("8.0 against 9.0 or more", "holds")
    assert judge(numbers | {"S1/charades/hqr-seen/tokens": Estimate(7.0)})[-1].verdict == "does not hold"
