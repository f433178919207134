"""Record, merge and judge the numbers of a run.

A notebook records its numbers in runs/. `publish` merges them into results/<profile>/numbers.json. Tables, figures and
pages are made from that file alone, read as one tidy table (`frame`), so they cannot show what was not recorded.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import yaml

from vsr1 import cache
from vsr1.config import DATASETS, ROOT, InputError, Profile
from vsr1.data import annotations
from vsr1.evaluation import claims
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records

VERDICTS = ("ok", "close", "OFF", "MISSING")
EXPECTED = ROOT / "results" / "expected"
NAME = re.compile(r"[A-Z]\d+(/[a-z0-9.-]+){2}/[a-z0-9@._-]+")
KEY = ["table", "dataset", "system", "metric"]  # the parts of a name
COLUMNS = [*KEY, *"low high value n seeds unit note measured paper verdict expected".split()]
OVER_SEEDS = {"T1": "R2", "R3": "R1", "P1": "R4"}  # table of this run: the same, mean over seeds
JUDGED = ("PAGE", "FIGURE", "FILES")  # sources that give verdicts; second-hand values give none

# --- Record


def record(profile: Profile, dataset: str, part: str, numbers: dict, series: dict | None = None) -> Path:
    """Write the numbers of one part of a notebook and return the path of the file.

    numbers   {<table>/<dataset>/<system>/<metric>: Estimate}
    series    {name: [[x, y], ...]} for figures
    """
    for name, estimate in numbers.items():
        assert NAME.fullmatch(name) and name.split("/")[1] == dataset, (
            f"{name}: not <id>/{dataset}/<system>/<metric>"
        )
        for value in (estimate.value, *(estimate.ci or ())):
            assert value is None or math.isfinite(value), f"{name}: {estimate}; a missing value is None"
    path = profile.runs(dataset) / "numbers" / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: plain(dataclasses.asdict(estimate)) for name, estimate in numbers.items()}
    cache.write_json(path, {"profile": profile.digest(), "numbers": entries, "series": plain(series or {})})
    return path


def plain(value):
    """Return `value` with numpy's numbers as Python's and floats at six decimals, on which two machines agree."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return round(value, 6) if isinstance(value, float) else value


# --- What is published and expected


@functools.cache
def layouts() -> dict:
    """Read results/expected/published.yaml: per table its rows, columns, published values and their source.

    Rows and published values of R3 and R1 are the claims of `vsr1.evaluation.claims`.
    """
    tables = _read_yaml(EXPECTED / "published.yaml")
    testable = {name: claim for name, claim in claims.CLAIMS.items() if claim.systems}
    for table in ("R3", "R1"):
        tables[table]["systems"] = {name: claim.words for name, claim in testable.items()}
    blank = [None] * (len(tables["R3"]["metrics"]) - 1)
    for name, claim in testable.items():
        for dataset, points in claim.paper.items():
            tables["R3"]["published"].setdefault(dataset, {})[name] = [points, *blank]
    return tables


@functools.cache
def items() -> dict:
    """Read results/expected/items.yaml: what the report shows, in its order, and what each item was made of."""
    return _read_yaml(EXPECTED / "items.yaml")


@functools.cache
def published() -> dict:
    """Return {name: published value} of every cell that is reported."""
    cells = {}
    for table, layout in layouts().items():
        for dataset, systems in layout["published"].items():
            for system, values in systems.items():
                row, width = f"{table}/{dataset}/{system}", len(layout["metrics"])
                assert len(values) == width, f"published.yaml: {row}: {len(values)} values of {width}"
                cells |= {f"{row}/{m}": value for m, value in zip(layout["metrics"], values, strict=True)}
    return {name: value for name, value in cells.items() if value is not None}


def expectations(profile: Profile) -> dict | None:
    """Return {name: (value, tolerance)} from results/expected/<profile>.yaml; None without such a file.

    The file is written by hand: `reasons:` gives each reason its tolerance and words, `numbers:` gives each number as
    [value, name of the reason].
    """
    path = EXPECTED / f"{profile.name}.yaml"
    if not path.exists():
        return None
    content = _read_yaml(path)
    reasons = content["reasons"]
    for name, pair in content["numbers"].items():
        fits = isinstance(pair, list) and len(pair) == 2 and pair[1] in reasons
        if not (fits and isinstance(pair[0], int | float)):  # yaml reads 1e-06 as a text
            raise InputError(
                f"{path}: {name}: expected [number, one of {', '.join(reasons)}], found {pair!r}"
            )
    return {name: (value, reasons[why]["tolerance"]) for name, (value, why) in content["numbers"].items()}


def _read_yaml(path):
    return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)  # ten times as fast as `safe_load`


def verdict(value, target, near) -> str:
    """Return `ok` within `near` of the target, `close` within three times that, `OFF` beyond, `MISSING` without one.

    >>> [verdict(v, 21.6, 0.5) for v in (22.1, 23.1, 23.2, None)]
    ['ok', 'close', 'OFF', 'MISSING']
    """
    if value is None:
        return "MISSING"
    distance = abs(value - target) - 1e-9  # the edge itself is inside, whatever the last bit says
    return "ok" if distance <= near else "close" if distance <= 3 * near else "OFF"


# --- Merge


def collect(profile: Profile) -> pd.DataFrame:
    """Merge all recorded numbers, keep them below runs/ for figures of a notebook, and return the `frame` of them.

    Results that are committed stay as they are: a notebook that is run alone has measured a part of them. Of notebooks
    that run side by side each finds its own numbers in what the last one left.
    """
    folder = _collected(profile)
    folder.mkdir(parents=True, exist_ok=True)
    with cache.locked(folder / "numbers.json"):
        numbers, series = _merge(profile)
        cache.write_json(folder / "numbers.json", numbers)
        cache.write_json(folder / "series.json", series)
    return frame(numbers)


def _merge(profile):
    """Return the entries of numbers.json, and the series, of all parts."""
    measured, series = {}, {}
    for path in _parts(profile):
        part = _read(path)
        if part["profile"] != profile.digest():
            remedy = "run its notebook, `make seeds`, `make ablations` or `make premise` again"
            print(f"left out: {path} was measured with other knobs; {remedy}")
            continue
        twice = measured.keys() & part["numbers"].keys()
        assert not twice, f"{path}: {sorted(twice)[0]} is recorded twice"
        measured |= part["numbers"]
        series |= part["series"]
    expected = expectations(profile)
    reported = {name for name in published() if name.split("/")[1] in (*profile.datasets, "mean")}
    measured |= means(profile, measured, reported)
    names = sorted(measured.keys() | reported | (expected or {}).keys(), key=_order)
    numbers = {name: _entry(profile, name, measured.get(name), expected) for name in names}
    return numbers, {name: series[name] for name in sorted(series)}


def _collected(profile):
    return profile.run_root() / "-".join(filter(None, ("collected", profile.part)))


def publish(profile: Profile) -> pd.DataFrame:
    """Collect all recorded numbers, write them to `profile.results()` and return the `frame` of them.

    Raises InputError, and writes nothing, where that would empty a table of the results that are there.
    """
    numbers, folder = collect(profile), profile.results()
    _refuse_loss(profile, numbers)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("numbers", "series"):
        cache.write_text(
            folder / f"{name}.json", (_collected(profile) / f"{name}.json").read_text(encoding="utf-8")
        )
    return numbers


def _refuse_loss(profile, numbers):
    """Raise InputError where results of the same knobs hold numbers of a table and data set, and `numbers` none."""
    folder = profile.results()
    if not all((folder / f"{name}.json").exists() for name in ("numbers", "provenance")):
        return
    if read(profile, "provenance").get("digest") != profile.digest():
        return
    if lost := sorted(_measured_tables(load(profile)) - _measured_tables(numbers)):
        table, dataset = lost[0]
        raise InputError(
            f"{folder}: this run has no numbers of {len(lost)} tables that stand there, as of {table} on {dataset}; "
            "run `make paper`, or name the data sets of this run (DATASETS=...)"
        )


def _measured_tables(numbers):
    """Return the (table, data set) pairs that have a measured number."""
    measured = numbers[numbers.measured.astype(bool)]
    return {*zip(measured.table, measured.dataset, strict=True)}


def _parts(profile):
    """Yield the files of numbers: those of notebooks, then the committed ones of seeds, ablations and premise."""
    for dataset in profile.datasets:
        yield from sorted((profile.runs(dataset) / "numbers").glob("*.json"))
    yield from profile.results().glob("seeds/numbers.json")
    for study in ("ablations", "premise"):
        yield from sorted(profile.results().glob(f"{study}/*.json"))


def means(profile: Profile, measured: dict, names) -> dict:
    """Return those of `names` that are means over data sets: each counts the same, and all must be measured."""
    averages = {}
    for name in names:
        parts = [measured.get(name.replace("/mean/", f"/{dataset}/")) for dataset in profile.datasets]
        if "/mean/" in name and None not in parts and None not in [part["value"] for part in parts]:
            value, n = sum(part["value"] for part in parts) / len(parts), sum(part["n"] for part in parts)
            mean = {"value": value, "n": n, "ci": None, "note": "mean of the data sets"}
            averages[name] = plain(parts[0] | mean)
    return averages


def _order(name):
    """Sort key: tables, data sets, systems and metrics in the order of published.yaml, all others last."""
    parts = name.split("/")
    layout = layouts().get(parts[0], {"systems": {}, "metrics": {}})
    orders = list(layouts()), list(DATASETS), list(layout["systems"]), list(layout["metrics"])
    return [(order.index(p) if p in order else len(order), p) for order, p in zip(orders, parts, strict=True)]


def _entry(profile, name, number, expected):
    """Return what numbers.json says of one name: the measurement or its absence, published value, verdict."""
    table, _, system, _ = name.split("/")
    layout, paper = layouts().get(table, {}), published().get(name)
    entry = number or dataclasses.asdict(Estimate(None))
    entry |= {"measured": number is not None and number["value"] is not None, "paper": paper, "verdict": None}
    if system in layout.get("quoted", ()):
        return entry | {"value": paper, "note": "copied from the paper"}
    if profile.world is None:  # real videos: the published value is the judge
        judged = layout.get("source") in JUDGED and system not in layout.get("beside", ())
        if paper is not None and judged:
            low, high = entry["ci"] or (0, 0)
            near = max(layout["near"], (high - low) / 2)
            entry |= {"verdict": verdict(entry["value"], paper, near), "expected": [paper, near]}
    elif expected is not None:  # rendered videos: only committed values of the same world are
        value, tolerance = expected.get(name, (None, None))
        if value is not None:
            entry |= {"verdict": verdict(entry["value"], value, tolerance), "expected": [value, tolerance]}
        elif entry["measured"]:
            entry |= {"verdict": "OFF", "expected": None}  # nobody expected it
    return entry


def frame(numbers: dict) -> pd.DataFrame:
    """Return the content of numbers.json as one tidy table, a row a number, by name and in the same order.

    Columns: `COLUMNS`, where low and high are the ends of the 95 % interval. None is missing; counts stay integers.
    """
    rows = []
    for name, entry in numbers.items():
        low, high = entry["ci"] or (None, None)
        rows.append(dict(zip(KEY, name.split("/"), strict=True)) | entry | {"low": low, "high": high})
    return pd.DataFrame(rows, list(numbers), COLUMNS, dtype=object).replace({float("nan"): None})


def load_collected(profile: Profile) -> tuple[pd.DataFrame, dict]:
    """Return what the last `collect` left: the frame of its numbers, and its series."""
    numbers, series = (_read(_collected(profile) / f"{name}.json") for name in ("numbers", "series"))
    return frame(numbers), series


def load(profile: Profile) -> pd.DataFrame:
    """Return the `frame` of results/<profile>/numbers.json."""
    return frame(read(profile, "numbers"))


def read(profile: Profile, name: str) -> dict:
    """Return the content of results/<profile>/<name>.json."""
    return _read(profile.results() / f"{name}.json")


def _read(path):
    return annotations.parse_json(annotations.read_text(path), path)


def row(numbers: pd.DataFrame, *key: str) -> pd.Series | None:
    """Return the row of (table, dataset, system, metric) whose value is known, None where there is none."""
    name = "/".join(key)
    return numbers.loc[name] if name in numbers.index and numbers.at[name, "value"] is not None else None


def best_row(numbers: pd.DataFrame, table: str, *key: str) -> pd.Series | None:
    """Return `row` of the mean over seeds where they were run, else of this run."""
    over_seeds = row(numbers, OVER_SEEDS.get(table, table), *key)
    return row(numbers, table, *key) if over_seeds is None else over_seeds


def was_run(profile: Profile, dataset: str) -> bool:
    """Return whether a notebook of this run has left numbers of a data set."""
    return any((profile.runs(dataset) / "numbers").glob("*.json"))


def remove_figures(profile: Profile, folder: Path, names) -> None:
    """Remove figures of an earlier run, unless they may show a data set that has no numbers in this one."""
    if all(was_run(profile, dataset) for dataset in profile.datasets):
        for name in names:
            for kind in ("png", "svg"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)


# --- Check


def need_run(profile: Profile) -> None:
    """Raise InputError where nothing was run: collecting would replace the committed numbers by nothing."""
    if not any(was_run(profile, dataset) for dataset in profile.datasets):
        remedy = "run `make paper` first; results/ stay as they are"
        raise InputError(f"{profile.run_root()}: no notebook has left numbers; {remedy}")


def check(profile: Profile) -> int:
    """Print a verdict per number; return 1 if one is OFF, MISSING or unexpected, or if none has a verdict."""
    numbers = collect(profile)
    judged = numbers[numbers.verdict.notna()]
    for name, entry in judged.iterrows():
        target = "expected {:g} ± {:g}".format(*entry.expected) if entry.expected else "nobody expected it"
        print(f"{entry.verdict:8}{name:48}{digits(entry.value):>8}   {target}")
    counts = Counter(judged.verdict)
    print(", ".join(f"{counts[word]} {word}" for word in VERDICTS))
    if judged.empty:
        print(f"nothing to check against: {EXPECTED / profile.name}.yaml does not exist")
    return int(judged.empty or bool(counts["OFF"] + counts["MISSING"]))


def damaged(profile: Profile) -> list[str]:
    """Return a line for each file of runs/ that is lost or unreadable: episodes, logs, steps that a notebook read."""
    lines = []
    for dataset in profile.datasets:
        home = profile.runs(dataset)
        for path in sorted(path for path in home.rglob("*.jsonl") if ".partial" not in str(path)):
            try:
                _read_lines(path)
            except InputError as error:
                lines.append(f"{error}; delete it and run `make paper` again")
        for path in sorted((home / "notebooks").glob(".*.json")):
            steps = sorted(_read(path)["steps"])
            gone = [home / name for name in steps if not (home / name / ".step.json").exists()]
            lines += [f"{step}: gone since notebook {path.stem[1:]} ran; `make paper` again" for step in gone]
    return list(dict.fromkeys(lines))


def _read_lines(path):
    """Parse every line of a file of episodes or of a log."""
    if path.resolve().parent.parent.name == "episodes":
        return records.read_episodes(path)
    lines, _ = annotations.numbered_lines(annotations.read_text(path))
    return [annotations.parse_json(line, path, number) for number, line in lines]


def digits(value) -> str:
    """Format a value as tables show it: counts whole, one decimal, two digits below one, a dash for what is missing.

    >>> digits(1334), digits(21.64), digits(0.0747), digits(0.0), digits(None)
    ('1334', '21.6', '0.075', '0.0', '—')
    """
    if value is None:
        return "—"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.95 else f"{value:.1f}"
