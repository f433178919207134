"""Numbers leave a run: recorded with what they rest on, merged, judged, and given a provenance. No torch.

A notebook records its numbers in runs/; `collect` merges them into results/<profile>/numbers.json. Tables,
figures and pages (`gallery`, `page`) read only that file, so they cannot show what was not recorded.
"""

import dataclasses
import functools
import math
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from importlib import metadata
from pathlib import Path

import yaml

from vsr1 import cache
from vsr1.config import DATASETS, ROOT, InputError, Profile
from vsr1.data import annotations
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records

VERDICTS = ("ok", "close", "OFF", "MISSING")
EXPECTED = ROOT / "results" / "expected"
CODE = ("--", ".", ":!results")  # for git: all but what runs write
NAME = re.compile(r"[A-Z]\d+(/[a-z0-9.-]+){2}/[a-z0-9@._-]+")  # <id>/<dataset>/<system>/<metric>
JUDGED = ("PAGE", "FIGURE", "FILES")  # second-hand values are shown without a verdict (PAPER.md)
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "decord",
    "matplotlib",
    "flash-attn",
)


def record(profile: Profile, dataset: str, part: str, numbers: dict, series: dict | None = None) -> Path:
    """The file of one part: `numbers` (name -> Number) and, for figures, `series` (name -> [[x, y], ...])."""
    for name, number in numbers.items():
        assert NAME.fullmatch(name) and name.split("/")[1] == dataset, (
            f"{name}: not <id>/{dataset}/<system>/<metric>"
        )
        for value in (number.value, *(number.ci or ())):
            assert value is None or math.isfinite(value), f"{name}: {number}; a missing value is None"
    path = profile.runs(dataset) / "numbers" / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: plain(dataclasses.asdict(number)) for name, number in numbers.items()}
    cache.write_json(path, {"profile": profile.digest(), "numbers": kept, "series": plain(series or {})})
    return path


def plain(value):
    """`value` with numpy's numbers as Python's and floats at six decimals: two machines can agree on them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return round(value, 6) if isinstance(value, float) else value


@functools.cache
def layouts() -> dict:
    """results/expected/published.yaml: per table its rows, columns, published values, their source."""
    return yaml.safe_load((EXPECTED / "published.yaml").read_text(encoding="utf-8"))


@functools.cache
def items() -> dict:
    """results/expected/items.yaml: what the report shows, in its order, and what each item was made of."""
    return yaml.safe_load((EXPECTED / "items.yaml").read_text(encoding="utf-8"))


@functools.cache
def published() -> dict:
    """name -> published value, for every cell that is reported."""
    cells = {}
    for table, layout in layouts().items():
        for dataset, systems in layout["published"].items():
            for system, values in systems.items():
                place, wanted = f"{table}/{dataset}/{system}", len(layout["metrics"])
                assert len(values) == wanted, f"published.yaml: {place}: {len(values)} values of {wanted}"
                for metric, value in zip(layout["metrics"], values, strict=True):
                    cells[f"{place}/{metric}"] = value
    return {name: value for name, value in cells.items() if value is not None}


def expectations(profile: Profile) -> dict | None:
    """name -> (value, tolerance, reason) from results/expected/<profile>.yaml; None without such a file.

    The file is written by hand: `reasons:` gives each reason its name, tolerance and words (`why`),
    `numbers:` gives each number as [value, name of the reason].
    """
    path = EXPECTED / f"{profile.name}.yaml"
    if not path.exists():
        return None
    kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {}
    for name, pair in kept["numbers"].items():
        if not (isinstance(pair, list) and len(pair) == 2 and pair[1] in kept["reasons"]):
            raise InputError(
                f"{path}: {name}: expected [value, one of {', '.join(kept['reasons'])}], found {pair!r}"
            )
        reason = kept["reasons"][pair[1]]
        expected[name] = (pair[0], reason["tolerance"], reason["why"])
    return expected


def verdict(value, target, near) -> str:
    """`ok` within `near` of the target, `close` within three times that, `OFF` beyond, `MISSING` without one.

    >>> [verdict(v, 21.6, 0.5) for v in (22.1, 23.1, 23.2, None)]
    ['ok', 'close', 'OFF', 'MISSING']
    """
    if value is None:
        return "MISSING"
    distance = abs(value - target) - 1e-9  # the edge itself is inside, whatever the last bit says
    return "ok" if distance <= near else "close" if distance <= 3 * near else "OFF"


def collect(profile: Profile) -> dict:
    """name -> entry, as written to results/<profile>/numbers.json; figure data go to series.json."""
    measured, series = {}, {}
    folders = [profile.runs(dataset) / "numbers" for dataset in profile.datasets]
    parts = sorted(path for folder in folders for path in folder.glob("*.json"))
    for path in [
        *parts,
        *profile.results().glob("seeds/numbers.json"),
        *sorted(profile.results().glob("ablations/*.json")),
    ]:  # committed: no run of today made them
        part = annotations.parse_json(annotations.read_text(path), path)
        if part["profile"] != profile.digest():
            again = "run its notebook, `make seeds` or `make ablations` again"
            print(f"left out: {path} was measured with other knobs; {again}")
            continue
        twice = measured.keys() & part["numbers"].keys()
        assert not twice, f"{path}: {sorted(twice)[0]} is recorded twice"
        measured |= part["numbers"]
        series |= part["series"]
    expected, places = expectations(profile), (*profile.datasets, "mean")
    wanted = {name for name in published() if name.split("/")[1] in places}
    measured |= means(profile, measured, wanted)
    names = sorted(measured.keys() | wanted | (expected or {}).keys(), key=_place)
    numbers = {name: _entry(profile, name, measured.get(name), expected) for name in names}
    profile.results().mkdir(parents=True, exist_ok=True)
    cache.write_json(profile.results() / "numbers.json", numbers)
    cache.write_json(profile.results() / "series.json", {name: series[name] for name in sorted(series)})
    return numbers


def need_run(profile: Profile) -> None:
    """Refuses where nothing was run: what is collected would replace the committed numbers by nothing."""
    home = profile.run_root()
    if not any(home.glob("*/seed-*/numbers/*.json")):
        raise InputError(
            f"{home}: no notebook has left numbers; run `make paper` first; results/ stay as they are"
        )


def load(profile: Profile, name="numbers") -> dict:
    """What results/<profile>/<name>.json says."""
    path = profile.results() / f"{name}.json"
    return annotations.parse_json(annotations.read_text(path), path)


def means(profile: Profile, measured: dict, names) -> dict:
    """Those of `names` that stand for the mean of the data sets: each counts the same, and all must be there."""
    found = {}
    for name in names:
        parts = [measured.get(name.replace("/mean/", f"/{dataset}/")) for dataset in profile.datasets]
        if "/mean/" in name and None not in parts and None not in [part["value"] for part in parts]:
            value = sum(part["value"] for part in parts) / len(parts)
            counted = sum(part["n"] for part in parts)
            found[name] = plain(
                parts[0] | {"value": value, "n": counted, "ci": None, "note": "mean of the data sets"}
            )
    return found


def _place(name):
    """Sort key: tables, data sets, systems and metrics in the order of published.yaml, the rest behind."""
    table, dataset, system, metric = name.split("/")
    layout = layouts().get(table, {"systems": {}, "metrics": {}})
    orders = list(layouts()), list(DATASETS), list(layout["systems"]), list(layout["metrics"])
    parts = table, dataset, system, metric
    return [(order.index(p) if p in order else len(order), p) for order, p in zip(orders, parts, strict=True)]


def _entry(profile, name, number, expected):
    """What numbers.json says of one name: the measurement or its absence, published value, verdict."""
    table, _, system, _ = name.split("/")
    layout, paper = layouts().get(table, {}), published().get(name)
    entry = number or dataclasses.asdict(Estimate(None))
    entry |= {"measured": number is not None and number["value"] is not None, "paper": paper, "verdict": None}
    if system in layout.get("quoted", ()):
        return entry | {"value": paper, "note": "copied from the paper"}
    if profile.world is None:  # real videos: the published value is the judge
        if paper is not None and layout["source"] in JUDGED:
            low, high = entry["ci"] or (0, 0)
            near = max(layout["near"], (high - low) / 2)
            entry |= {"verdict": verdict(entry["value"], paper, near), "expected": [paper, near]}
    elif expected is not None:  # rendered videos: only committed values of the same world are
        value, tolerance, _ = expected.get(name, (None, None, None))
        if value is not None:
            entry |= {"verdict": verdict(entry["value"], value, tolerance), "expected": [value, tolerance]}
        elif entry["measured"]:
            entry |= {"verdict": "OFF", "expected": None}  # nobody expected it
    return entry


def check(profile: Profile) -> int:
    """Prints a verdict per number; 1 if one is OFF, MISSING or unexpected, or without any."""
    judged = {name: entry for name, entry in collect(profile).items() if entry["verdict"]}
    for name, entry in judged.items():
        target = (
            "expected {:g} ± {:g}".format(*entry["expected"]) if entry["expected"] else "nobody expected it"
        )
        print(f"{entry['verdict']:8}{name:48}{digits(entry['value']):>8}   {target}")
    counts = Counter(entry["verdict"] for entry in judged.values())
    print(", ".join(f"{counts[word]} {word}" for word in VERDICTS))
    if not judged:
        print(f"nothing to check against: {EXPECTED / profile.name}.yaml does not exist")
    return int(not judged or any(entry["verdict"] in ("OFF", "MISSING") for entry in judged.values()))


def damaged(profile: Profile) -> list[str]:
    """A line for each file of runs/ that is lost or cannot be read: episodes, logs, and stages that a notebook saw."""
    found = []
    for dataset in profile.datasets:
        home = profile.runs(dataset)
        for path in sorted(path for path in home.rglob("*.jsonl") if ".partial" not in str(path)):
            try:
                _read(path)
            except InputError as error:
                found.append(f"{error}; delete it and run `make paper` again")
        for record in sorted((home / "notebooks").glob(".*.json")):
            stood = annotations.parse_json(annotations.read_text(record), record)["stages"]
            gone = [name for name in sorted(stood) if not (home / name / ".step.json").exists()]
            found += [
                f"{home / name}: gone since notebook {record.stem[1:]} ran; `make paper` again"
                for name in gone
            ]
    return list(dict.fromkeys(found))


def _read(path):
    """Every line of a file, as what it is."""
    if path.resolve().parent.parent.name == "episodes":
        return records.read_episodes(path)
    lines, _ = annotations.numbered_lines(annotations.read_text(path))
    return [annotations.parse_json(line, path, number) for number, line in lines]


def digits(value) -> str:
    """A value as tables show it: counts whole, one decimal, two digits below one; a dash for what is missing.

    >>> digits(1334), digits(21.64), digits(0.0747), digits(0.0), digits(None)
    ('1334', '21.6', '0.075', '0.0', '—')
    """
    if value is None:
        return "—"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.95 else f"{value:.1f}"


def device() -> dict:
    """The machine in words: processor, cores this process may use, memory, GPU (None without one)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = (
        _say("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        if shutil.which("nvidia-smi")
        else None
    )
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu or None,
    }


def _say(*command):
    """What a command prints, or None if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The last commit that changed anything but results."""
    return _say("git", "log", "-1", "--format=%H", *CODE) or "unknown"


def provenance(profile: Profile) -> dict:
    """Where the numbers come from, as written to results/<profile>/provenance.json.

    Commit and tree are those of all but results/: committing results must not change what they say.
    A rerun with nothing changed writes the same bytes; the date is that of the youngest stage.
    """
    home, stages_made = profile.run_root(), {}
    for folder in cache.steps(home):
        parts = folder.relative_to(home).parts  # <data set>/.., or variants/<name>/<data set>/..
        if set(parts) & set(profile.datasets):
            stages_made["/".join(parts)] = cache.metadata(folder)
    changed = _say("git", "status", "--porcelain", *CODE)
    installed = {name: version(name) for name in LIBRARIES}
    kept = {
        "commit": commit(),
        "tree": "unknown" if changed is None else "changed" if changed else "clean",
        "profile": profile.name,
        "digest": profile.digest(),
        "seed": profile.seed,
        "date": max((stamp.get("made", "") for stamp in stages_made.values()), default="") or None,
        "device": device(),
        "python": platform.python_version(),
        "libraries": {name: found for name, found in installed.items() if found},
        "stages": {
            name: {"minutes": round(stamp["seconds"] / 60, 2), "peak_mb": stamp.get("peak_mb")}
            for name, stamp in stages_made.items()
        },
    }
    profile.results().mkdir(parents=True, exist_ok=True)
    cache.write_json(profile.results() / "provenance.json", kept)
    return kept


def version(library):
    """The installed version of a library, None without it."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
