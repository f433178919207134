"""Tables as people read them: what a cell shows, what a table rests on, and tables/<id>.{csv,md,tex}.

All of it from results/<profile>/numbers.json, in the layouts of results/expected/published.yaml.
"""

import csv
import io
from pathlib import Path

from vsr1.config import Profile
from vsr1.report import results

MARKS = "†‡§¶"  # of footnotes, in the order of published.yaml
CAVEAT = (
    "Rendered corpora and mini models: these numbers show the mechanism and guard the code. They are no "
    "evidence about the paper's numbers, which stand in parentheses and speak of real video and Qwen3-VL-2B."
)


def cell(entry) -> str:
    """An entry as tables show it: measured ± half its interval, the published value in parentheses.

    >>> cell({"value": 24.4, "ci": [21.4, 27.4], "measured": True, "paper": 21.6})
    '24.4±3.0 (21.6)'
    >>> cell({"value": -0.066, "ci": None, "measured": True, "paper": None, "unit": "points"})
    '-0.1'
    >>> cell({"value": None, "ci": None, "measured": False, "paper": 12.2})
    '— (12.2)'
    """
    if entry is None or (entry["value"] is None and entry["paper"] is None):
        return "—"
    digits = "{:+.1f}".format if entry.get("unit") == "points" else results.digits  # a difference has a sign
    spread = f"±{results.digits((entry['ci'][1] - entry['ci'][0]) / 2)}" if entry["ci"] else ""
    paper = "" if entry["paper"] is None else f"({results.digits(entry['paper'])})"
    ours = digits(entry["value"]) + spread if entry["measured"] else "—" if entry["value"] is None else ""
    return " ".join(part for part in (ours, paper) if part) + entry.get("mark", "")


def rows(numbers: dict, table: str) -> list:
    """(dataset, system, label, [entry or None per metric]) for each row of a table with anything to show."""
    layout = results.layouts()[table]
    marks = dict(zip(layout.get("footnotes", {}), MARKS, strict=False))
    pairs = [tuple(name.split("/")[1:3]) for name in numbers if name.startswith(f"{table}/")]
    found = []
    for dataset, system in dict.fromkeys(pairs):  # each once, in order
        names = [f"{table}/{dataset}/{system}/{metric}" for metric in layout["metrics"]]
        shown = [numbers.get(name) for name in names]
        entries = [
            one and one | {"mark": marks.get(name, "")} for name, one in zip(names, shown, strict=True)
        ]
        if any(cell(entry) != "—" for entry in entries):
            found.append((dataset, system, layout["systems"].get(system, system), entries))
    return found


def caption(profile: Profile, numbers: dict, table: str) -> str:
    """The title of a table, what it rests on, and what mini means: a table may be copied out of its page."""
    title, caveat = results.layouts()[table]["title"], [CAVEAT] if profile.world else []
    return " ".join([f"{title}.", basis(profile, numbers, table), *caveat])


def basis(profile: Profile, numbers: dict, table: str) -> str:
    """What a table rests on: profile, queries, videos, unreadable videos, seeds; and how to read a cell."""
    layout, facts = results.layouts()[table], []
    own = {name: entry for name, entry in numbers.items() if name.startswith(f"{table}/")}
    for dataset in profile.datasets:
        sizes = {entry["n"] for name, entry in own.items() if name.split("/")[1] == dataset} - {None}
        if sizes:
            span = " to ".join(results.digits(size) for size in sorted({min(sizes), max(sizes)}))
            facts.append(f"{dataset} {span} {layout.get('counts', 'queries')}")
            corpus = [f"D1/{dataset}/test/{key}" for key in ("videos", "skipped")]
            found = [numbers.get(name, {}).get("value") for name in corpus]
            if layout.get("split", "test") == "test" and None not in found:
                facts[-1] += ", {} videos ({} unreadable)".format(*map(results.digits, found))
    seeds = sorted({seed for entry in own.values() for seed in entry["seeds"]})
    legend = "± is half the 95 % interval; in parentheses the published value; — is missing."
    parts = [f"Profile {profile.name}: {'; '.join(facts) or 'nothing measured yet'}."]
    parts += [f"Seeds {', '.join(map(str, seeds))}."] if seeds else []
    notes = {entry["note"] for entry in own.values()} - {""}
    parts += [f"All of it {notes.pop()}."] if len(notes) == 1 and layout.get("committed") else []
    return " ".join([*parts, legend])


def footnotes(numbers: dict, table: str) -> list[str]:
    """The notes of a table whose cell is shown, each behind the mark that its cell carries."""
    notes = results.layouts()[table].get("footnotes", {})
    marked = zip(MARKS, notes.items(), strict=False)
    return [f"{mark} {' '.join(note.split())}" for mark, (name, note) in marked if name in numbers]


def write(profile: Profile) -> list[Path]:
    """results/<profile>/tables/<id>.{csv,md,tex}, from numbers.json alone."""
    numbers = results.load(profile)
    folder, written = profile.results() / "tables", []
    folder.mkdir(parents=True, exist_ok=True)
    for table in results.layouts():
        if rows(numbers, table):
            for kind, write in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
                written.append(folder / f"{table}.{kind}")
                written[-1].write_text(write(profile, numbers, table), encoding="utf-8")
    return written


def to_csv(profile: Profile, numbers: dict, table: str) -> str:
    """One line per number, nothing rounded; an empty field is missing."""
    keys = ("value", "n", "paper", "measured", "verdict", "unit", "note")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("profile", "dataset", "system", "metric", "ci_low", "ci_high", *keys))
    for name, entry in numbers.items():
        if name.startswith(f"{table}/"):
            writer.writerow(
                [profile.name, *name.split("/")[1:], *(entry["ci"] or ("", "")), *(entry[k] for k in keys)]
            )
    return out.getvalue()


def to_markdown(profile: Profile, numbers: dict, table: str) -> str:
    """The table for a reader of plain text, its caption first."""
    layout = results.layouts()[table]
    lines = [f"**{table}.** {caption(profile, numbers, table)}", ""]
    lines += ["| data set | system | " + " | ".join(layout["metrics"].values()) + " |"]
    lines += ["|---|---|" + "---:|" * len(layout["metrics"])]
    for dataset, system, label, entries in rows(numbers, table):
        label = f"**{label}**" if system in layout.get("highlight", ()) else label
        lines += [f"| {dataset} | {label} | " + " | ".join(map(cell, entries)) + " |"]
    return "\n".join([*lines, "", *(f"* {note}" for note in footnotes(numbers, table))]).rstrip() + "\n"


def to_latex(profile: Profile, numbers: dict, table: str) -> str:
    """The table for a paper that loads booktabs."""
    layout = results.layouts()[table]
    lines = [r"\begin{table}", rf"\caption{{{_tex(caption(profile, numbers, table))}}}", r"\small"]
    lines += [rf"\begin{{tabular}}{{ll{'r' * len(layout['metrics'])}}}", r"\toprule"]
    lines += [" & ".join(["data set", "system", *map(_tex, layout["metrics"].values())]) + r" \\"]
    last = None
    for dataset, system, label, entries in rows(numbers, table):
        lines += [r"\midrule"] if dataset != last else []
        label = rf"\textbf{{{_tex(label)}}}" if system in layout.get("highlight", ()) else _tex(label)
        cells = ["" if dataset == last else dataset, label, *(_tex(cell(entry)) for entry in entries)]
        lines += [" & ".join(cells) + r" \\"]
        last = dataset
    notes = [rf"\par {_tex(note)}" for note in footnotes(numbers, table)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"]) + "\n"


def _tex(text):
    """`text` with LaTeX's own characters made harmless."""
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    marks |= {"±": r"$\pm$", "—": "---", "†": r"$\dagger$", "‡": r"$\ddagger$"}
    return "".join(marks.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
