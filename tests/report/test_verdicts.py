"""What is said of the paper's claims, from numbers.json alone."""

import json

from vsr1.report import verdicts


def test_every_seed_must_agree_before_a_claim_holds_over_seeds():
    entry = {"value": 4.0, "ci": [1.0, 7.0]}
    numbers = {
        f"R1/charades/refined/{key}": entry | {"value": value}
        for key, value in (("points", 4.0), ("lowest", -0.1))
    }
    (told, *_) = verdicts.judge(numbers, ["charades"])
    assert (told.verdict, told.verdict_seeds) == ("not measured", "not shown") and "lowest -0.1" in told.seeds
    numbers["R1/charades/refined/lowest"]["value"] = 0.1
    assert verdicts.judge(numbers, ["charades"])[0].verdict_seeds == "holds"


def test_soft_tokens_are_held_against_the_shortest_rewrite():
    values = {"sqr": 8.0, "hqr-blind": 26.0, "hqr-seen": 9.0, "hqr-reasoned": 27.0}
    numbers = {f"S1/charades/{name}/tokens": {"value": value, "ci": None} for name, value in values.items()}
    last = verdicts.judge(numbers, ["charades"])[-1]
    assert (last.value, last.verdict) == ("8.0 against 9.0 or more", "holds")
    numbers["S1/charades/hqr-seen/tokens"]["value"] = 7.0
    assert verdicts.judge(json.loads(json.dumps(numbers)), ["charades"])[-1].verdict == "does not hold"
