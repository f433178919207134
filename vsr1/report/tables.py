"""Write tables as people read them, results/<profile>/tables/<id>.{csv,md,tex}, from numbers.json alone.

Their rows and columns are those of results/expected/published.yaml.
"""

from pathlib import Path

import pandas as pd

from vsr1.config import Profile
from vsr1.data import source
from vsr1.report import results, templates

MARKS = "†‡§¶"  # of footnotes, in the order of published.yaml
CAVEAT = (
    "Rendered corpora and mini models: these numbers show the mechanism and guard the code. They are no "
    "evidence about the paper's numbers, which are for real video and Qwen3-VL-2B and have rows of their own."
)
MEASURED, PAPER = "measured", "paper"  # the two kinds of rows
CSV = {"dataset": "dataset", "system": "system", "metric": "metric", "low": "ci_low", "high": "ci_high"}
CSV |= {name: name for name in ("value", "n", "paper", "measured", "verdict", "unit", "note")}


def cell(entry, mark: str = "") -> str:
    """Format a row of `results.frame`: measured ± half its interval.

    >>> cell({"value": 24.4, "low": 21.4, "high": 27.4, "measured": True, "unit": "%"})
    '24.4±3.0'
    >>> cell({"value": -0.066, "low": None, "measured": True, "unit": "points"}, "†")
    '-0.1†'
    >>> cell({"value": 2.8, "low": None, "measured": False, "unit": "%"})
    '—'
    """
    if entry is None or not entry["measured"]:
        return "—"
    spread = "" if entry["low"] is None else f"±{results.digits((entry['high'] - entry['low']) / 2)}"
    return _digits(entry, "value") + spread + mark


def paper_cell(entry, mark: str = "") -> str:
    """Format the published value of a row of `results.frame`.

    >>> paper_cell({"paper": 21.6, "unit": "%"}), paper_cell({"paper": 3.0, "unit": "points"}), paper_cell(None)
    ('21.6', '+3.0', '—')
    """
    return "—" if entry is None or entry["paper"] is None else _digits(entry, "paper") + mark


def _digits(entry, key):
    """Format a value as tables show it; a difference has a sign."""
    return f"{entry[key]:+.1f}" if entry["unit"] == "points" else results.digits(entry[key])


def rows(numbers: pd.DataFrame, table: str, of: str = MEASURED) -> list:
    """Return (dataset, system, label, [(row of numbers or None, cell) per metric]) of each row that shows anything.

    of   MEASURED or PAPER: what was measured and what is published never share a row
    """
    layout, write = results.layouts()[table], {MEASURED: cell, PAPER: paper_cell}[of]
    marks, listed = dict(zip(layout.get("footnotes", {}), MARKS, strict=False)), []
    for (dataset, system), part in _of(numbers, table).groupby(["dataset", "system"], sort=False):
        entries, cells = dict(zip(part.metric, part.to_dict("records"), strict=True)), []
        for metric in layout["metrics"]:
            mark = marks.get(f"{table}/{dataset}/{system}/{metric}", "")
            cells.append((entries.get(metric), write(entries.get(metric), mark)))
        if any(text != "—" for _, text in cells):
            listed.append((dataset, system, layout["systems"].get(system, system), cells))
    return listed


def blocks(profile: Profile, numbers: pd.DataFrame, table: str) -> dict[str, list]:
    """Return {heading: `rows`} of a table: what was measured, then what is published, where there is any of it."""
    parts = {
        f"measured, profile {profile.name}": rows(numbers, table),
        "published, real video and Qwen3-VL-2B": rows(numbers, table, PAPER),
    }
    return {heading: listed for heading, listed in parts.items() if listed}


def grid(numbers: pd.DataFrame, table: str, dataset: str, of: str = MEASURED) -> pd.DataFrame:
    """Return the cells of one data set in a table, with labels of systems as rows and of metrics as columns."""
    texts = {
        label: [text for _, text in cells]
        for name, _, label, cells in rows(numbers, table, of)
        if name == dataset
    }
    return pd.DataFrame(texts, results.layouts()[table]["metrics"].values()).T


def _of(numbers, table):
    return numbers[numbers.table == table]


def caption(profile: Profile, numbers: pd.DataFrame, table: str) -> str:
    """Return the title of a table, what it rests on, and what mini means: a table may be copied out of its page."""
    title, caveat = results.layouts()[table]["title"], [CAVEAT] if profile.world else []
    return " ".join([f"{title}.", basis(profile, numbers, table), legend(profile), *caveat])


def basis(profile: Profile, numbers: pd.DataFrame, table: str) -> str:
    """Say what a table rests on: profile, queries, videos, unreadable videos, seeds."""
    layout, part = results.layouts()[table], _of(numbers, table)
    sizes = [_sizes(numbers, part[part.dataset == dataset], dataset, layout) for dataset in profile.datasets]
    sizes = "; ".join(filter(None, sizes)) or "nothing measured yet"
    seeds = sorted({seed for seeds in part.seeds for seed in seeds})
    notes = set(part.note) - {""}
    sentences = [f"Profile {profile.name}: {sizes}."]
    sentences += [f"Seeds {', '.join(map(str, seeds))}."] if seeds else []
    sentences += [f"All of it {notes.pop()}."] if len(notes) == 1 and layout.get("committed") else []
    return " ".join(sentences)


def legend(profile: Profile) -> str:
    """Say how to read a cell."""
    drawn = "by family" if source.has_families(profile) else "by video, for the data source knows no families"
    return f"± is half the 95 % interval, clustered {drawn}; — is missing."


def _sizes(numbers, part, dataset, layout):
    """Say how many queries and videos the numbers of one data set rest on; nothing if none is measured."""
    counts = sorted(set(part.n) - {None})
    if not counts:
        return ""
    span = " to ".join(map(results.digits, sorted({counts[0], counts[-1]})))
    text = f"{dataset} {span} {layout.get('counts', 'queries')}"
    videos, skipped = (results.row(numbers, "D1", dataset, "test", key) for key in ("videos", "skipped"))
    if layout.get("split", "test") == "test" and videos is not None and skipped is not None:
        text += f", {results.digits(videos.value)} videos ({results.digits(skipped.value)} unreadable)"
    return text


def footnotes(numbers: pd.DataFrame, table: str) -> list[str]:
    """Return the notes of a table whose cell is shown, each behind the mark that its cell carries."""
    notes = results.layouts()[table].get("footnotes", {})
    pairs = zip(MARKS, notes.items(), strict=False)
    return [f"{mark} {' '.join(note.split())}" for mark, (name, note) in pairs if name in numbers.index]


def publish(profile: Profile) -> list[Path]:
    """Write results/<profile>/tables/<id>.{csv,md,tex} of every table with anything to show."""
    numbers, folder, written = results.load(profile), profile.results() / "tables", []
    folder.mkdir(parents=True, exist_ok=True)
    for table, layout in results.layouts().items():
        if shown := blocks(profile, numbers, table):
            values = {"heads": list(layout["metrics"].values()), "highlight": layout.get("highlight", ())}
            values |= {"caption": caption(profile, numbers, table), "notes": footnotes(numbers, table)}
            values |= {"table": table, "blocks": shown}
            texts = {"csv": _csv(profile, numbers, table)}
            texts |= {kind: templates.render(f"table.{kind}", **values) for kind in ("md", "tex")}
            for kind, text in texts.items():
                written.append(folder / f"{table}.{kind}")
                written[-1].write_text(text.rstrip() + "\n", encoding="utf-8")
    return written


def _csv(profile, numbers, table):
    """Return one line per number, nothing rounded; an empty field is missing."""
    part = _of(numbers, table)[list(CSV)].rename(columns=CSV)
    part.insert(0, "profile", profile.name)
    return part.to_csv(index=False)
