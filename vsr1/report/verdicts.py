"""Judge the paper's claims from numbers.json alone."""

from dataclasses import dataclass

import pandas as pd

from vsr1.config import Profile
from vsr1.evaluation import claims
from vsr1.evaluation.statistics import Estimate
from vsr1.report import results
from vsr1.report.results import digits


@dataclass(frozen=True)
class Verdict:
    """A claim on one data set, in words."""

    name: str
    claim: str
    dataset: str
    value: str  # of this run
    verdict: str
    seeds: str  # over several seeds, if they were run
    verdict_seeds: str


def record(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Compare the systems of this run on one data set (R3) and record it as the part of notebook 09."""
    numbers = claims.compare(profile, f"R3/{dataset}", [claims.hits_of_run(profile, dataset)])
    results.record(profile, dataset, "09_paper", numbers)
    return numbers


def judge(numbers: pd.DataFrame, datasets) -> list[Verdict]:
    """Judge every claim on every data set, from a `results.frame`."""
    judged = [_judge(numbers, name, dataset) for name in claims.CLAIMS for dataset in datasets]
    return judged + [_judge_tokens(numbers, dataset) for dataset in datasets]


def _judge(numbers, name, dataset):
    """Judge one claim on one data set."""
    run = results.row(numbers, "R3", dataset, name, "points")
    mean, lowest = (results.row(numbers, "R1", dataset, name, metric) for metric in ("points", "lowest"))
    seeds = "—" if mean is None else f"{points(mean)}, lowest {lowest['value']:+.1f}"
    words = results.layouts()["R3"]["systems"][name]
    return Verdict(name, words, dataset, points(run), holds(run), seeds, holds(mean, lowest))


def _judge_tokens(numbers, dataset):
    """Compare soft tokens with the fewest tokens of a rewrite; a count, so without an interval."""
    entries = [results.row(numbers, "S1", dataset, name, "tokens") for name in ("sqr", *claims.VARIANTS)]
    place = "tokens", "tokens a refinement, SQR under HQR", dataset
    if any(entry is None for entry in entries):
        return Verdict(*place, "—", "not measured", "—", "not measured")
    soft, *hard = (entry["value"] for entry in entries)
    value = f"{digits(soft)} against {digits(min(hard))} or more"
    return Verdict(*place, value, "holds" if soft < min(hard) else "does not hold", "—", "not measured")


def holds(entry, lowest=None) -> str:
    """Judge a difference: its interval without 0 decides, and every seed's sign where there are several.

    >>> def difference(value, low, high): return {"value": value, "low": low, "high": high}
    >>> holds(difference(4.0, 1.0, 7.0)), holds(difference(4.0, -1.0, 9.0)), holds(None)
    ('holds', 'not shown', 'not measured')
    >>> holds(difference(4.0, 1.0, 7.0), difference(-0.5, None, None)), holds(difference(-4.0, -7.0, -1.0))
    ('not shown', 'does not hold')
    """
    if entry is None:
        return "not measured"
    if entry["low"] > 0 and (lowest is None or lowest["value"] > 0):
        return "holds"
    return "does not hold" if entry["high"] < 0 else "not shown"


def points(entry) -> str:
    """Write a difference with its interval.

    >>> points({"value": 4.04, "low": 1.0, "high": 7.0})
    '+4.0 (+1.0 to +7.0)'
    """
    return "—" if entry is None else "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**entry)


def as_markdown(verdicts: list[Verdict]) -> str:
    """List each claim in markdown, with the verdict of every data set below it."""
    lines = []
    for name in dict.fromkeys(verdict.name for verdict in verdicts):
        rows = [verdict for verdict in verdicts if verdict.name == name]
        lines.append(f"* {rows[0].claim}")
        for row in rows:
            seeds = "" if row.seeds == "—" else f"; over seeds {row.seeds} **{row.verdict_seeds}**"
            lines.append(f"    * {row.dataset} {row.value} **{row.verdict}**{seeds}")
    return "\n".join(lines)
