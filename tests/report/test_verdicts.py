"""What is said of the paper's claims, from numbers.json alone."""

import dataclasses

from vsr1.config import load
from vsr1.evaluation.statistics import Estimate
from vsr1.report import results, verdicts


def frame(numbers):
    """Estimates by name, as numbers.json would hold them."""
    rest = {"measured": True, "paper": None, "verdict": None}
    return results.frame({name: dataclasses.asdict(number) | rest for name, number in numbers.items()})


def judge(numbers):
    return verdicts.judge(frame(numbers), ["charades"])


def difference(value, low, high, p=0.001, table="R3", name="refined"):
    """Numbers of one claim."""
    numbers = {"points": Estimate(value, 100, (low, high)), "p": Estimate(p), "detectable": Estimate(2.5)}
    return {f"{table}/charades/{name}/{key}": number for key, number in numbers.items()}


def of(name, numbers):
    return next(one for one in judge(numbers) if one.name == name)


def test_the_verdict_over_seeds_stands_before_that_of_this_run():
    seeds = difference(4.0, -1.0, 9.0, 0.2, "R1") | {"R1/charades/refined/lowest": Estimate(-0.1)}
    seeds["R1/charades/refined/highest"] = Estimate(8.0)
    told = of("refined", difference(4.0, 1.0, 7.0) | seeds)
    assert (told.paper, told.verdict, told.verdict_seeds, told.detectable) == (
        "+3.0",
        "agrees",
        "inconclusive",
        "2.5",
    )
    assert verdicts.cell(told) == "+4.0 (-1.0 to +9.0), seeds -0.1 to +8.0 inconclusive"


def test_an_answer_to_the_premise_is_over_seeds_where_they_were_run_and_the_page_says_where():
    profile, numbers = load("mini"), {}
    for table, value, seeds in (("P1", 40.0, (42,)), ("R4", 44.0, (42, 1, 2))):
        for system in ("walkdown-ft", "vsr1"):
            numbers[f"{table}/didemo/{system}/vcmr@0.5_t3"] = Estimate(value, 9, seeds=seeds)
        numbers[f"{table}/didemo/walkdown-ft/over-vsr1"] = Estimate(
            value / 10, 9, (1.0, 9.0), seeds, "points"
        )
    pair = ("P1", "walkdown-ft", "vcmr@0.5_t3"), ("P1", "vsr1", "vcmr@0.5_t3")
    words = verdicts.against(frame(numbers), "didemo", *pair)
    assert words == "44.0 against 39.6: +4.4 (+1.0 to +9.0) ahead"
    assert verdicts.basis(profile, frame(numbers)).startswith("VCMR on didemo: means over seeds 1, 2, 42,")
    fewer = {"R4/didemo/adapter-vec-ft/vcmr@0.5_t3": Estimate(50.0, 9, seeds=(1, 42))}
    assert " Over fewer of them: adapter-vec-ft. All else" in verdicts.basis(profile, frame(numbers | fewer))
    one_seed = frame({name: number for name, number in numbers.items() if name[0] == "P"})
    assert verdicts.against(one_seed, "didemo", *pair) == "40.0 against 36.0: +4.0 (+1.0 to +9.0) ahead"
    assert verdicts.basis(profile, one_seed) == "Seed 42."


def test_a_claim_that_does_not_survive_the_correction_says_so_beside_the_plain_verdict():
    numbers = difference(4.0, 0.1, 8.0, 0.04) | difference(9.0, 5.0, 13.0, 1e-6, name="vsr1-ft")
    told = of("refined", numbers)
    assert (told.verdict, told.corrected) == ("agrees", "agrees")  # the larger of two
    for name in ("vsr1-zs", "ver-zs"):
        numbers |= difference(1.0, -1.0, 3.0, 0.3, name=name)
    told = of("refined", numbers)
    assert (told.verdict, told.corrected) == ("agrees", "inconclusive")
    assert verdicts.cell(told).endswith("agrees (Holm: inconclusive)")
    assert of("vsr1-ft", numbers).corrected == "agrees"


def test_a_loss_where_the_paper_gains_disagrees_and_by_construction_nothing_is_judged():
    numbers = difference(-12.0, -15.0, -9.0, name="ver-ft") | difference(40.0, 30.0, 50.0, name="repaired")
    assert of("ver-ft", numbers).verdict == "disagrees"
    assert of("repaired", numbers).verdict == of("repaired", numbers).corrected == "by construction"
    equal = difference(0.2, 0.1, 0.4, name="turn-3")
    assert of("turn-3", equal).verdict == "agrees"  # nearly equal, although the interval lies above 0


def test_soft_tokens_are_set_beside_the_shortest_rewrite_and_count_nowhere():
    values = {"sqr": 8.0, "hqr-blind": 26.0, "hqr-seen": 9.0, "hqr-reasoned": 27.0}
    numbers = {f"S1/charades/{name}/tokens": Estimate(value) for name, value in values.items()}
    last = judge(numbers)[-1]
    assert (last.name, last.value, last.verdict) == ("tokens", "8.0 against 9.0 or more", "by construction")


def test_claims_are_grouped_and_no_total_is_given():
    sheet = verdicts.sheet(judge(difference(4.0, 1.0, 7.0)))
    assert list(sheet) == list(verdicts.GROUPS.values())
    assert sheet[verdicts.GROUPS["paper"]]["VR R@1, refined over first search"] == [
        "+3.0",
        "+4.0 (+1.0 to +7.0) agrees",
    ]
