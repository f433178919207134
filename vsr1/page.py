"""What a reader opens: tables/<id>.{csv,md,tex} and report.html, made of what results/<profile>/ holds.

The report is one file that loads nothing else: styles inside, pictures as data, every text escaped.
"""

import base64
import csv
import html
import io
import json
import os
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from vsr1 import cards, gallery, results
from vsr1.params import Profile

STYLE = Path(__file__).with_name("page.css")
MARKS = "†‡§¶"  # of footnotes, in the order of published.yaml
CAVEAT = (
    "Rendered corpora and mini models: these numbers show the mechanism and guard the code. They are no "
    "evidence about the paper's numbers, which stand in parentheses and speak of real video and Qwen3-VL-2B."
)


def publish(profile: Profile) -> Path:
    """The report of a profile, after all that it shows: numbers.json, provenance.json, tables, figures."""
    numbers = results.collect(profile)
    results.provenance(profile)
    tables(profile)
    gallery.figures(profile, numbers)
    gallery.copy_sheets(profile)
    return report(profile, cards.publish(profile))


# --- Tables


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
        entries = [
            numbers[name] | {"mark": marks.get(name, "")} if name in numbers else None for name in names
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
    for dataset in profile.datasets:
        sizes = {entry["n"] for name, entry in numbers.items() if name.startswith(f"{table}/{dataset}/")} - {
            None
        }
        if sizes:
            span = " to ".join(results.digits(size) for size in sorted({min(sizes), max(sizes)}))
            facts.append(f"{dataset} {span} {layout.get('counts', 'queries')}")
            found = [
                numbers.get(f"D1/{dataset}/test/{key}", {}).get("value") for key in ("videos", "skipped")
            ]
            if layout.get("split", "test") == "test" and None not in found:
                facts[-1] += ", {} videos ({} unreadable)".format(*map(results.digits, found))
    seeds = sorted(
        {seed for name in numbers if name.startswith(f"{table}/") for seed in numbers[name]["seeds"]}
    )
    legend = "± is half the 95 % interval; in parentheses the published value; — is missing."
    parts = [f"Profile {profile.name}: {'; '.join(facts) or 'nothing measured yet'}."]
    parts += [f"Seeds {', '.join(map(str, seeds))}."] if seeds else []
    notes = {numbers[name]["note"] for name in numbers if name.startswith(f"{table}/")} - {""}
    parts += [f"All of it {notes.pop()}."] if len(notes) == 1 and layout.get("committed") else []
    return " ".join([*parts, legend])


def footnotes(numbers: dict, table: str) -> list[str]:
    """The notes of a table whose cell is shown, each behind the mark that its cell carries."""
    notes = results.layouts()[table].get("footnotes", {})
    marked = zip(MARKS, notes.items(), strict=False)
    return [f"{mark} {' '.join(note.split())}" for mark, (name, note) in marked if name in numbers]


def tables(profile: Profile) -> list[Path]:
    """results/<profile>/tables/<id>.{csv,md,tex}, from numbers.json alone."""
    numbers = json.loads((profile.results() / "numbers.json").read_text(encoding="utf-8"))
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
        lines += [
            " & ".join(["" if dataset == last else dataset, label, *(_tex(cell(e)) for e in entries)])
            + r" \\"
        ]
        last = dataset
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par {_tex(note)}" for note in footnotes(numbers, table)),
    ]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _tex(text):
    """`text` with LaTeX's own characters made harmless."""
    marks = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "—": "---",
        "†": r"$\dagger$",
        "‡": r"$\ddagger$",
    }
    return "".join(marks.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


# --- The report


def report(profile: Profile, searches: list[Path] = ()) -> Path:
    """results/<profile>/report.html: every table and figure, the paper's values beside, and what was run.

    searches   pages of cards to link to
    """
    folder = profile.results()
    numbers, origin = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("numbers", "provenance")
    )
    title = f"VideoSearch-R1, reproduced on the profile {profile.name}"
    body = [f"<h1>{_safe(title)}</h1>"]
    body += [f'<p class="caveat">{_safe(CAVEAT)}</p>'] if profile.world else []
    words = "what SQR and HQR saw, said and found"
    shown = {path: f"{path.parent.parent.name}: {words}" for path in searches}
    body += [_links(profile, "One card per search", shown)]
    body += [_table(profile, numbers, table) for table in results.layouts() if rows(numbers, table)]
    pictures = sorted((folder / "figures").glob("*.png"), key=lambda path: (path.stem[0] == "D", path.stem))
    body += ["<h2>Figures</h2>", *map(_figure, pictures)]  # the corpora (D) last
    body += [_origin(origin), _links(profile, "Executed notebooks", _notebooks(profile))]
    (folder / "report.html").write_text(_page(title, body), encoding="utf-8")
    return folder / "report.html"


def _safe(value):
    """A value as text that html cannot misread; a dash for None."""
    return "—" if value is None else html.escape(str(value))


def _page(title, body):
    """A whole html file."""
    viewport = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{viewport}<title>{_safe(title)}</title><style>\n{STYLE.read_text(encoding='utf-8')}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(profile, numbers, table):
    """One results table with its caption and notes; a cell's interval, n and verdict wait in its title."""
    layout, lines, last = results.layouts()[table], [], None
    heads = ("", *layout["metrics"].values())
    for dataset, system, label, entries in rows(numbers, table):
        if dataset != last:
            lines += [
                f'<tr class="set"><th scope="rowgroup" colspan="{len(heads)}">{_safe(dataset)}</th></tr>'
            ]
        last = dataset
        cells = "".join(f'<td title="{_safe(_details(e))}">{_cell(e)}</td>' for e in entries)
        kind = ' class="ours"' if system in layout.get("highlight", ()) else ""
        lines += [f'<tr{kind}><th scope="row">{_safe(label)}</th>{cells}</tr>']
    head = "".join(f'<th scope="col">{_safe(head)}</th>' for head in heads)
    body = "\n".join(lines)
    notes = "".join(f"<li>{_safe(note)}</li>" for note in footnotes(numbers, table))
    return (
        f'<section id="{table}"><h2>{table} {_safe(layout["title"])}</h2>'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p>{_safe(basis(profile, numbers, table))}</p><ul>{notes}</ul></section>"
    )


def _cell(entry):
    """A cell with the paper's part marked as such and the verdict as a word, never as a colour alone."""
    ours, _, paper = cell(entry).partition("(")
    judged = f" <b>{entry['verdict']}</b>" if entry and entry["verdict"] not in (None, "ok") else ""
    return f"{_safe(ours.strip())}{judged}" + (
        f' <span class="paper">({_safe(paper)}</span>' if paper else ""
    )


def _details(entry):
    """What a cell leaves out."""
    if entry is None or not entry["measured"]:
        return "not measured here"
    said = [f"n = {entry['n']}"] if entry["n"] else []
    said += ["95 % interval {:.1f} to {:.1f}".format(*entry["ci"])] if entry["ci"] else []
    return ", ".join([*said, *filter(None, (entry["verdict"], entry["note"]))])


def _figure(path):
    """A picture with the caption that was saved inside it."""
    with Image.open(path) as picture:
        text, (width, height) = picture.text.get("Description", path.stem), picture.size
    data = base64.b64encode(path.read_bytes()).decode()
    size = f'width="{width}" height="{height}"'
    return (
        f'<figure id="{_safe(path.stem)}"><img src="data:image/png;base64,{data}" {size} alt="{_safe(text)}">'
        f"<figcaption><b>{_safe(path.stem)}.</b> {_safe(text)}</figcaption></figure>"
    )


def _origin(origin):
    """The provenance as two tables: the run, and its stages with minutes and peak memory."""
    facts = {key: origin[key] for key in ("commit", "tree", "digest", "seed", "date", "python")}
    machine = "{cpu}, {cores} cores, {memory_gb} GB memory, GPU: {gpu}".format(**origin["device"])
    facts |= {"device": machine, "libraries": ", ".join(map(" ".join, origin["libraries"].items()))}
    run = "".join(
        f'<tr><th scope="row">{key}</th><td>{_safe(value)}</td></tr>' for key, value in facts.items()
    )
    slow = "".join(
        f'<tr><th scope="row">{_safe(name)}</th><td>{spent["minutes"]:.1f}</td>'
        f"<td>{_safe(spent['peak_mb'])}</td></tr>"
        for name, spent in origin["stages"].items()
    )
    head = (
        '<tr><th scope="col">stage</th><th scope="col">minutes</th><th scope="col">peak memory, MB</th></tr>'
    )
    return (
        f'<section id="run"><h2>What was run</h2><div class="wide"><table class="facts">{run}</table></div>'
        f'<div class="wide"><table><thead>{head}</thead><tbody>{slow}</tbody></table></div></section>'
    )


def _links(profile, title, pages):
    """A section of links to files of the same clone: {path: words}; nothing without any."""
    links = [
        f'<li><a href="{_safe(quote(os.path.relpath(path, profile.results())))}">{_safe(words)}</a></li>'
        for path, words in pages.items()
    ]
    return f"<section><h2>{title}</h2><ul>{''.join(links)}</ul></section>" if links else ""


def _notebooks(profile):
    """{executed copy: its data set and name}."""
    folders = [profile.runs(dataset) / "notebooks" for dataset in profile.datasets]
    paths = [path for folder in folders for path in sorted(folder.glob("*.ipynb")) if "." not in path.stem]
    return {path: f"{path.parent.parent.name}: {path.stem}" for path in paths}
