"""Judge the paper's claims from numbers.json alone."""

from dataclasses import dataclass

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


def judge(numbers: dict, datasets) -> list[Verdict]:
    """Judge every claim on every data set, from the entries of numbers.json."""
    words, verdicts = results.layouts()["R3"]["systems"], []
    for name in claims.CLAIMS:
        for dataset in datasets:
            run, mean, lowest = (
                numbers.get(f"{table}/{dataset}/{name}/{key}")
                for table, key in (("R3", "points"), ("R1", "points"), ("R1", "lowest"))
            )
            seeds = f"{points(mean)}, lowest {lowest['value']:+.1f}" if _measured(mean) else "—"
            single, several = holds(run), holds(mean, lowest)
            verdicts.append(Verdict(name, words[name], dataset, points(run), single, seeds, several))
    return verdicts + [_judge_tokens(numbers, dataset) for dataset in datasets]


def _judge_tokens(numbers, dataset):
    """Soft tokens against the fewest tokens of a rewrite; a count, so without an interval."""
    entries = [numbers.get(f"S1/{dataset}/{name}/tokens") for name in ("sqr", *claims.VARIANTS)]
    place = "tokens", "tokens a refinement, SQR under HQR", dataset
    if not all(map(_measured, entries)):
        return Verdict(*place, "—", "not measured", "—", "not measured")
    soft, *hard = (entry["value"] for entry in entries)
    value = f"{digits(soft)} against {digits(min(hard))} or more"
    return Verdict(*place, value, "holds" if soft < min(hard) else "does not hold", "—", "not measured")


def holds(entry: dict | None, lowest: dict | None = None) -> str:
    """Judge a difference: its interval without 0 decides, and every seed's sign where there are several.

    >>> holds({"value": 4.0, "ci": [1.0, 7.0]}), holds({"value": 4.0, "ci": [-1.0, 9.0]}), holds(None)
    ('holds', 'not shown', 'not measured')
    >>> holds({"value": 4.0, "ci": [1.0, 7.0]}, {"value": -0.5}), holds({"value": -4.0, "ci": [-7.0, -1.0]})
    ('not shown', 'does not hold')
    """
    if not _measured(entry):
        return "not measured"
    low, high = entry["ci"]
    if low > 0 and (lowest is None or lowest["value"] > 0):
        return "holds"
    return "does not hold" if high < 0 else "not shown"


def points(entry: dict | None) -> str:
    """Write a difference with its interval.

    >>> points({"value": 4.04, "ci": [1.0, 7.0]})
    '+4.0 (+1.0 to +7.0)'
    """
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(entry["value"], *entry["ci"]) if _measured(entry) else "—"


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


def _measured(entry):
    return entry is not None and entry["value"] is not None
