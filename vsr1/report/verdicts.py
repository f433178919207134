"""Judge the claims from numbers.json alone: the paper's, our controls, and what holds by construction."""

from dataclasses import dataclass

import pandas as pd

from vsr1.config import Profile
from vsr1.data import source
from vsr1.evaluation import claims, statistics
from vsr1.evaluation.claims import CLAIMS, Claim
from vsr1.evaluation.statistics import Estimate
from vsr1.report import results
from vsr1.report.results import digits

GROUPS = {
    "paper": "What the paper claims",
    "control": "Controls of ours, which the paper does not have",
    "construction": "Holds by construction, so it counts for nothing",
}
WORDS = {  # of a claim of the paper, of a control: interval on the claimed side, on the other, neither
    "paper": ("agrees", "disagrees", "inconclusive"),
    "control": ("ahead", "behind", "inconclusive"),
}
LEVEL = 0.05
# Systems that may look at three videos, and the loops that they are set against.
AT_THREE = {
    "vsr1-all": "the loop, all soft tokens kept (ours)",
    "walkdown-ft": "FT with rank fallback",
    "vsr1-walkdown": "the loop's own policy with rank fallback",
    "adapter-soft-vsr1": "soft tokens that never look, the same policy with rank fallback",
    "vsr1-first": "soft tokens first, then the loop that shows no video twice (ours)",
    "adapter-vec-ft": "a linear map of the query's vector, FT with rank fallback",
    "engine-tuned-ft": "the engine's text side tuned, FT with rank fallback",
}
LOOPS = {
    "vsr1": ("the loop", tuple(AT_THREE)),
    "vsr1-all": ("the loop with all its soft tokens kept", ("walkdown-ft", "adapter-soft-vsr1")),
    "skip": ("the loop that shows no video twice", tuple(AT_THREE)[1:]),
    "vsr1-first": ("soft tokens first, then that loop", ("adapter-vec-ft", "engine-tuned-ft")),
}
LOOP_END, REFINED = ("P1", "vsr1", "vr@1"), ("P2", "sqr", "vr@1")
ANSWERS = {  # what is measured: {a system, in words: (its number, that of its control)}
    "R@1 of the first search, against the loop at its end": {
        "soft tokens that never look": (("P1", "adapter-soft", "first@1"), LOOP_END),
        "a linear map of the query's vector": (("P1", "adapter-vec", "first@1"), LOOP_END),
    },
    **{
        f"VCMR with three videos, against {words}": {
            AT_THREE[name]: (("P1", name, "vcmr@0.5_t3"), ("P1", loop, "vcmr@0.5_t3")) for name in systems
        }
        for loop, (words, systems) in LOOPS.items()
    },
    "R@1 after one refinement of failed searches": {
        "shown a random wrong video, against the rejected one": (("P2", "sqr-other-video", "vr@1"), REFINED),
        "words, trained on the rows of stage 1, against soft tokens": (
            ("P4", "hqr-trained", "vr@1"),
            REFINED,
        ),
        **{
            f"the best {kind} there are, against the best for a wrong video": (
                ("P4", f"{oracle}-oracle", "vr@1"),
                ("P4", f"{oracle}-oracle-wrong", "vr@1"),
            )
            for kind, oracle in (("words", "hqr"), ("soft tokens", "soft"))
        },
    },
}


@dataclass(frozen=True)
class Verdict:
    """A claim on one data set, in words."""

    name: str
    group: str  # of GROUPS
    claim: str
    dataset: str
    paper: str  # the paper's value
    value: str  # of this run
    verdict: str
    corrected: str  # with Holm's correction for all claims of the run
    detectable: str  # the smallest difference that this run could have shown, points
    seeds: str  # over several seeds, if they were run
    verdict_seeds: str
    corrected_seeds: str
    why: str


def record(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Compare the systems of this run on one data set (R3) and record it as the part of notebook 09."""
    numbers = claims.compare(profile, f"R3/{dataset}", [claims.hits_of_run(profile, dataset)])
    results.record(profile, dataset, "09_paper", numbers)
    return numbers


def judge(numbers: pd.DataFrame, datasets) -> list[Verdict]:
    """Judge every claim on every data set, from a `results.frame`, in the order of the list."""
    corrected = {table: _corrected(numbers, table, datasets) for table in ("R3", "R1")}
    return [
        _judge(numbers, name, claim, dataset, corrected)
        for name, claim in CLAIMS.items()
        for dataset in datasets
    ]


def _corrected(numbers, table, datasets):
    """Return {(data set, claim): p by Holm} of all claims of a table that could have failed."""
    p_values = {}
    for name, claim in CLAIMS.items():
        for dataset in datasets if claim.group != "construction" and claim.sign else ():
            entry = results.row(numbers, table, dataset, name, "p")
            if entry is not None:
                p_values[dataset, name] = entry["value"]
    return statistics.holm(p_values)


def _judge(numbers, name, claim, dataset, corrected):
    paper = claim.paper.get(dataset, claim.paper.get("mean"))
    paper = "—" if paper is None else f"{paper:+.1f}"
    if name == "tokens":
        run, smallest, seeds = (*_tokens(numbers, dataset), ""), "", ("—", "", "")
    else:
        run, seeds = (
            _measured(numbers, table, name, claim, dataset, corrected[table].get((dataset, name)))
            for table in ("R3", "R1")
        )
        detectable = results.row(numbers, "R3", dataset, name, "detectable")
        smallest = "—" if detectable is None else digits(detectable["value"])
    return Verdict(name, claim.group, claim.words, dataset, paper, *run, smallest, *seeds, claim.why)


def _measured(numbers, table, name, claim, dataset, p):
    """Return (value, verdict, corrected verdict) of a claim by one table; p: by Holm, None without one."""
    entry = results.row(numbers, table, dataset, name, "points")
    if entry is None:
        word = _missing(numbers, table, name, claim, dataset)
        return "—", word, word
    value, word = points(entry), holds(claim, entry, dataset)
    lowest, highest = (results.row(numbers, table, dataset, name, key) for key in ("lowest", "highest"))
    if lowest is not None:
        value += f", seeds {lowest['value']:+.1f} to {highest['value']:+.1f}"
    by_sign = p is not None and (entry["low"] > 0 or entry["high"] < 0)
    return value, word, _word(claim, 2) if by_sign and p >= LEVEL else word


def _missing(numbers, table, name, claim, dataset):
    """Say why a claim has no number: it is not made here, cannot be tested, or lacks a system, by name."""
    if not claim.systems:
        return f"cannot be tested here, because {claim.why}"
    if claim.datasets and dataset not in claim.datasets:
        return f"made on {', '.join(claim.datasets)} only"
    key = f"{table}/{dataset}/{name}/points"
    return (key in numbers.index and numbers.at[key, "note"]) or "MISSING: not measured"


def _tokens(numbers, dataset):
    """Compare soft tokens with the fewest tokens of a rewrite: counts, without an interval."""
    entries = [results.row(numbers, "S1", dataset, name, "tokens") for name in ("sqr", *claims.VARIANTS)]
    if any(entry is None for entry in entries):
        return "—", "MISSING: not measured"
    soft, *hard = (entry["value"] for entry in entries)
    return f"{digits(soft)} against {digits(min(hard))} or more", "by construction"


def holds(claim: Claim, entry, dataset="mean") -> str:
    """Say on which side of a claim the 95 % interval of a difference lies.

    Of a claim that two systems are nearly equal, the interval must lie within `claims.NEARLY` points of 0. A claim of
    an advantage larger than that disagrees where the interval lies there.

    >>> def difference(low, high): return {"low": low, "high": high}
    >>> ahead, equal = Claim("paper", "", "a", "b"), Claim("paper", "", "a", "b", sign=0)
    >>> [holds(ahead, difference(*ends)) for ends in ((1, 7), (-1, 9), (-7, -1))]
    ['agrees', 'inconclusive', 'disagrees']
    >>> [holds(equal, difference(*ends)) for ends in ((-1, 1), (-1, 9), (3, 7))]
    ['agrees', 'inconclusive', 'disagrees']
    >>> holds(Claim("paper", "", "a", "b", paper={"mean": 12.9}), difference(-0.5, 1.1))
    'disagrees'
    """
    low, high, near = entry["low"], entry["high"], claims.NEARLY
    if claim.sign == 0:
        inside, outside = -near <= low and high <= near, low > near or high < -near
        return _word(claim, 0 if inside else 1 if outside else 2)
    if claim.sign < 0:
        low, high = -high, -low
    large = abs(claim.paper.get(dataset, claim.paper.get("mean", 0))) > near
    nothing = large and -near <= low <= 0 and high <= near
    return _word(claim, 0 if low > 0 else 1 if high < 0 or nothing else 2)


def _word(claim, index):
    return WORDS[claim.group][index] if claim.group in WORDS else "by construction"


def points(entry) -> str:
    """Write a difference with its interval.

    >>> points({"value": 4.04, "low": 1.0, "high": 7.0})
    '+4.0 (+1.0 to +7.0)'
    """
    return "{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**entry)


def best_known(verdict: Verdict) -> tuple[str, str, str]:
    """Return (value, verdict, verdict corrected) over seeds where they were run, else of this run."""
    if verdict.seeds != "—":
        return verdict.seeds, verdict.verdict_seeds, verdict.corrected_seeds
    return verdict.value, verdict.verdict, verdict.corrected


def cell(verdict: Verdict) -> str:
    """Write a claim on one data set in a cell: ours, its verdict, and the corrected one where it is another."""
    value, word, corrected = best_known(verdict)
    if corrected not in ("", word):
        word += f" (Holm: {corrected})"
    return word if value == "—" else f"{value} {word}"


def paper_values(rows: list[Verdict]) -> str:
    """Write the paper's values of a claim on all data sets, one where they are the same."""
    values = [row.paper for row in rows]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def reservation(rows: list[Verdict]) -> str:
    """Return what stands in parentheses behind a claim, unless its cells say it."""
    why = rows[0].why
    return f" ({why})" if why and why not in rows[0].verdict else ""


def sheet(verdicts: list[Verdict]) -> dict[str, dict[str, list[str]]]:
    """Return {heading of a group: {claim: [the paper's values, a `cell` for each data set]}}."""
    groups = {}
    for group, heading in GROUPS.items():
        by_claim = {}
        for verdict in verdicts:
            if verdict.group == group:
                by_claim.setdefault(verdict.claim, []).append(verdict)
        if by_claim:
            groups[heading] = {
                claim + reservation(rows): [paper_values(rows), *map(cell, rows)]
                for claim, rows in by_claim.items()
            }
    return groups


def rule(profile: Profile) -> str:
    """Say how a claim is judged."""
    drawn = "families of near-duplicates" if source.has_families(profile) else "videos"
    return (
        "A claim of the paper agrees if the 95 % interval of the difference lies on the claimed side of 0, disagrees "
        "if it lies on the other side, and is inconclusive otherwise. Differences are paired over the same queries; "
        f"intervals draw {drawn}, and seeds too where there are several. Two systems are nearly equal if the interval "
        f"lies within {claims.NEARLY:g} points of 0. If the paper claims more than that, and the interval lies within "
        'these bounds around 0, the claim disagrees. "Holm" gives the verdict corrected for the number of claims '
        "in the table, if it is another one."
    )


# --- The premise


def against(numbers: pd.DataFrame, dataset: str, first, other) -> str:
    """Return the values of two numbers, each (table, system, metric), their difference, and which one is ahead.

    The difference is paired over queries, with its 95 % interval: the number `over-<system>` of the first one's row.
    Neither is ahead where the interval holds 0. Without that number nothing is said of it.
    """
    pair = [results.best_row(numbers, table, dataset, *key) for table, *key in (first, other)]
    if any(entry is None for entry in pair):
        return "MISSING"
    gain = results.best_row(numbers, first[0], dataset, first[1], f"over-{other[1]}")
    if gain is None:
        return f"{digits(pair[0]['value'])} against {digits(pair[1]['value'])}"
    # Over the seeds of the first: the other one may have been run with more.
    values = digits(pair[0]["value"]), digits(pair[0]["value"] - gain["value"])
    return f"{values[0]} against {values[1]}: {points(gain)} {side(gain)}"


def side(gain) -> str:
    """Say on which side of 0 the interval of a difference lies."""
    return "ahead" if gain["low"] > 0 else "behind" if gain["high"] < 0 else "not clear"


def basis(profile: Profile, numbers: pd.DataFrame) -> str:
    """Say which seeds the answers to the premise rest on."""
    rows = numbers[(numbers.table == "R4") & numbers.system.isin({*AT_THREE, *LOOPS})]
    if rows.empty:
        return f"Seed {profile.seed}."
    seeds = sorted({seed for row in rows.seeds for seed in row})
    measured = [dataset for dataset in profile.datasets if (rows.dataset == dataset).any()]
    where = "" if measured == list(profile.datasets) else f" on {', '.join(measured)}"
    means = f"VCMR{where}: means over seeds {', '.join(map(str, seeds))}, whose intervals draw seeds too."
    fewer = sorted({row.system for row in rows.itertuples() if {*row.seeds} != {*seeds}})
    means += f" Over fewer of them: {', '.join(fewer)}." if fewer else ""
    return f"{means} All else: seed {profile.seed}."


def answers(numbers: pd.DataFrame, datasets) -> dict[str, dict[str, list[str]]]:
    """Return {what is measured: {a system, in words: `against` of each data set}}."""
    return {
        heading: {
            words: [against(numbers, dataset, *pair) for dataset in datasets] for words, pair in rows.items()
        }
        for heading, rows in ANSWERS.items()
    }
