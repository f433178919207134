"""What a reader opens: report.html, every item of the paper in its order, made of what results/<profile>/ holds.

The report is one file that loads nothing else: styles inside, pictures as data, every text escaped.
"""

import base64
import functools
import html
import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from vsr1 import cards, claims, gallery, params, plates, results, tables
from vsr1.params import ROOT, Profile
from vsr1.tables import CAVEAT, basis, cell, footnotes, rows

STYLE = Path(__file__).with_name("page.css")


def publish(profile: Profile) -> Path:
    """The report of a profile, after all that it shows: numbers.json, provenance.json, tables, figures."""
    from vsr1 import diagrams  # the prompts it draws come with torch, which `check` and `show` do without

    numbers = results.collect(profile)
    results.provenance(profile)
    tables.write(profile)
    gallery.figures(profile, numbers)
    diagrams.publish(profile)
    plates.publish(profile)
    gallery.copy_sheets(profile)
    return report(profile, cards.publish(profile))


@dataclass(frozen=True)
class Item:
    """One table or figure, published or ours, there or missing."""

    id: str
    about: dict  # its entry in items.yaml
    numbers: dict  # of numbers.json, by name
    table: bool  # whether it has rows to show
    pictures: list[Path]

    @property
    def made(self) -> bool:
        """Whether there is anything to show."""
        return self.table or bool(self.pictures)

    @property
    def title(self) -> str:
        """A few words."""
        return results.layouts().get(self.id, {}).get("title") or self.about.get("title", "")

    def verdicts(self) -> dict[str, int]:
        """How many of its numbers got which verdict."""
        counts = Counter(entry["verdict"] for entry in self.numbers.values())
        return {word: counts[word] for word in results.VERDICTS}


def items(profile: Profile, numbers: dict) -> list[Item]:
    """Everything that the report shows or misses, in the order of items.yaml; what it does not list comes last."""
    pictures, listed = {}, results.items()
    for path in sorted((profile.results() / "figures").glob("*.png")):
        pictures.setdefault(path.stem.partition("-")[0], []).append(path)
    ids = [*listed, *sorted((results.layouts().keys() | pictures.keys()) - listed.keys())]
    found = []
    for name in ids:
        own = {key: entry for key, entry in numbers.items() if key.startswith(f"{name}/")}
        table = name in results.layouts() and bool(rows(own, name))
        found.append(Item(name, listed.get(name, {}), own, table, pictures.get(name, [])))
    return found


def remedy(profile: Profile, item: Item) -> str:
    """What would make a missing item."""
    again = f"make paper PROFILE={profile.name}"
    made = item.about.get("made")
    if made:
        return f"`{made}{again.removeprefix('make paper')}` makes it."
    books = item.about.get("notebooks", [])
    lost = [name for name in books if not (params.ROOT / "notebooks" / f"{name}.ipynb").exists()]
    told = f"{' and '.join(books)} makes it" + (f", and {lost[0]} does not exist yet" if lost else "")
    return f"{told}; then `{again}`."


def missing(profile: Profile, numbers: dict) -> list[str]:
    """A line for each published item that has neither a table nor a figure."""
    gone = [item for item in items(profile, numbers) if item.id[0] in "TFA" and not item.made]
    return [f"{item.id} {item.title}: {remedy(profile, item)}" for item in gone]


def check(profile: Profile) -> int:
    """Prints a verdict per number, then what is missing or damaged; 1 if anything is wrong."""
    status = results.check(profile)
    numbers = results.load(profile)
    wrong = [f"MISSING {line}" for line in missing(profile, numbers)]
    wrong += [f"damaged {line}" for line in results.damaged(profile)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(status or wrong))


def show(profile: Profile, *names: str) -> None:
    """Items in a notebook: a table in markdown, pictures with their captions, or what is missing."""
    from IPython.display import Image as Shown
    from IPython.display import Markdown, display

    found = {item.id: item for item in items(profile, results.load(profile))}
    for item in map(found.get, names):
        if item.table:
            display(Markdown((profile.results() / "tables" / f"{item.id}.md").read_text(encoding="utf-8")))
        for path in item.pictures:
            display(Shown(filename=path), Markdown(f"**{path.stem}.** {words_of(path)}"))
        if not item.made:
            display(Markdown(f"**{item.id} {item.title}**: missing. {remedy(profile, item)}"))


def words_of(picture: Path) -> str:
    """The caption that was saved inside a picture."""
    with Image.open(picture) as opened:
        return opened.text.get("Description", picture.stem)


def report(profile: Profile, searches: list[Path] = ()) -> Path:
    """results/<profile>/report.html: every table and figure, the paper's values beside, and what was run.

    searches   pages of cards to link to
    """
    folder = profile.results()
    numbers, origin = results.load(profile), results.load(profile, "provenance")
    title, shown = f"VideoSearch-R1, reproduced on the profile {profile.name}", items(profile, numbers)
    pages = {path: f"{path.parent.parent.name}: what SQR and HQR saw, said and found" for path in searches}
    body = [f"<h1>{_safe(title)}</h1>"]
    body += [f'<p class="caveat">{_safe(CAVEAT)}</p>'] if profile.world else []
    body += [_contents(profile, shown, origin), _claims(profile, numbers)]
    body += [_links(profile, "One card per search", pages)]
    body += [_item(profile, numbers, origin, item) for item in shown]
    body += [_origin(origin), _departures(shown), _links(profile, "Executed notebooks", _notebooks(profile))]
    (folder / "report.html").write_text(_page(title, body), encoding="utf-8")
    return folder / "report.html"


def _safe(value):
    """A value as text that html cannot misread; a dash for None."""
    return "—" if value is None else html.escape(str(value))


def _page(title, body):
    """A whole html file."""
    viewport = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{viewport}<title>{_safe(title)}</title><style>\n{STYLE.read_text(encoding='utf-8')}</style>"
    lines = "\n".join(filter(None, body))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{lines}\n</body></html>\n'


def _grid(heads, lines, kind="numbers"):
    """A table that scrolls in itself where it is too wide; lines are whole <tr>."""
    head = "".join(f'<th scope="col">{_safe(head)}</th>' for head in heads)
    body = "\n".join(lines)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(first, cells):
    """A <tr>: its first cell is a heading, and html already; the others are text."""
    told = "".join(f"<td>{_safe(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{first}</th>{told}</tr>'


def _contents(profile, shown, origin):
    """The contents list, with the verdicts of each item."""
    against = "the published values"
    if profile.world:
        against = (
            "values that an earlier run of the same code left (results/expected), never against the paper"
        )
    lines = []
    for item in shown:
        words = f'<a href="#{item.id}">{item.id}</a> {_safe(item.about.get("title") or item.title)}'
        words += "" if item.made else ", not attempted" if "beyond" in item.about else ", <b>missing</b>"
        lines.append(_row(words, [count or "" for count in item.verdicts().values()]))
    total = Counter(entry["verdict"] for item in shown for entry in item.numbers.values())
    said = ", ".join(f"{total[word]} {word}" for word in results.VERDICTS)
    gone = sum(item.id[0] in "TFA" and not item.made for item in shown)
    return (
        f'<section id="contents"><h2>Contents and verdicts</h2><p>Numbers judged against {_safe(against)}: {said}. '
        f"{gone} published tables and figures are missing. Run on: {_safe(_device(origin))}.</p>"
        f"{_grid(('', *results.VERDICTS), lines)}</section>"
    )


def _claims(profile, numbers):
    """Whether the paper's claims hold here, in words: a row a claim, a column a data set; the numbers are R3 and R1."""
    told = claims.judged(numbers, profile.datasets)
    lines = []
    for claim in dict.fromkeys(one.claim for one in told):
        cells = [f"{one.verdict} / {one.verdict_seeds}" for one in told if one.claim == claim]
        lines.append(_row(_safe(claim), [cell.replace("not measured", "—") for cell in cells]))
    words = (
        "An advantage holds where its 95 % interval, paired over the same queries, lies above 0; over several "
        "seeds, where every one of them has that sign as well. Before the stroke this run, behind it the "
        "seeds of `make seeds`; — is not measured. Numbers: "
    )
    links = " and ".join(f'<a href="#{name}">{name}</a>' for name in ("R3", "R1"))
    return (
        f'<section id="claims"><h2>Is the paper reproduced?</h2><p>{_code(words)}{links}.</p>'
        f"{_grid(('', *profile.datasets), lines, 'words')}</section>"
    )


def _item(profile, numbers, origin, item):
    """One item of the report: its table, its pictures, what they rest on; or what would make it."""
    head = f'<section id="{item.id}"><h2>{item.id} {_safe(item.title)}</h2>'
    if not item.made:
        why = item.about.get("beyond")
        state = f"Not attempted. {_code(why)}" if why else f"<b>MISSING.</b> {_code(remedy(profile, item))}"
        return f"{head}<p>{state}</p></section>"
    notes = footnotes(numbers, item.id) if item.table else []
    told = [_code(basis(profile, numbers, item.id)) if item.table else f"Profile {_safe(profile.name)}."]
    told += [_verdict_words(item), _made(profile, item), _minutes(item, origin), _departs(item)]
    return (
        head
        + (_table(numbers, item.id) if item.table else "")
        + "".join(map(_figure, item.pictures))
        + "".join(f'<p class="note">{_safe(note)}</p>' for note in notes)
        + f"<p>{' '.join(filter(None, told))}</p></section>"
    )


def _verdict_words(item):
    """The verdicts of an item in words."""
    counts = {word: count for word, count in item.verdicts().items() if count}
    return f"Verdicts: {', '.join(f'{count} {word}' for word, count in counts.items())}." if counts else ""


def _made(profile, item):
    """Links to the notebooks that made an item: the executed copies, and the source."""
    said = [_code(f"Made by `{item.about['made']}`.")] if "made" in item.about else []
    for name in item.about.get("notebooks", ()):
        folders = [profile.runs(dataset) / "notebooks" for dataset in profile.datasets]
        folders = [*folders, profile.runs(profile.datasets[0]).parent / "notebooks"]
        paths = {path / f"{name}.ipynb": path.parent.name for path in folders}
        paths |= {params.ROOT / "notebooks" / f"{name}.ipynb": "source"}
        found = ", ".join(_link(profile, path, words) for path, words in paths.items() if path.exists())
        said.append(f"Notebook {_safe(name)}{f' ({found})' if found else ''}.")
    return " ".join(said)


def _minutes(item, origin):
    """What the stages of an item took, over all data sets."""
    names = item.about.get("stages", ())
    spent = {name: said["minutes"] for name, said in origin["stages"].items()}
    own = [spent[name] for name in spent if name.partition("/")[2].startswith(tuple(names))] if names else []
    return f"Its stages ({_safe(', '.join(names))}) took {sum(own):.1f} minutes." if own else ""


def _departs(item):
    """Links to the departures from the paper that touch an item."""
    numbers = {name: number for number, name in enumerate(departures())}
    links = [
        f'<a href="#deviation-{numbers[name]}">{_code(name)}</a>' for name in item.about.get("deviations", ())
    ]
    return f"Departs from the paper in: {', '.join(links)}." if links else ""


@functools.cache
def departures() -> dict[str, list[str]]:
    """The table of DEVIATIONS.md: {departure: [the paper's, ours, measured effect]}."""
    lines = (ROOT / "DEVIATIONS.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")
    ]
    return {first: rest for first, *rest in cells[2:]}


def _departures(shown):
    """Every departure that some item names."""
    named = {name for item in shown for name in item.about.get("deviations", ())}
    lines = [
        f'<dt id="deviation-{number}">{_code(name)}</dt><dd>Paper or its code: {_code(paper)}. '
        f"Ours: {_code(ours)}. Measured effect: {_code(effect)}.</dd>"
        for number, (name, (paper, ours, effect)) in enumerate(departures().items())
        if name in named
    ]
    return f'<section id="deviations"><h2>Departures from the paper</h2><dl>{"".join(lines)}</dl></section>'


def _code(text):
    """Text with `code` marked as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _safe(text))


def _table(numbers, table):
    """One results table; a cell's interval, n and verdict wait in its title."""
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
    return _grid(heads, lines)


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
    """A picture with the caption that was saved inside it, as webp: a drawing bit by bit, frames of video nearly so."""
    with Image.open(path) as picture:
        text, (width, height) = words_of(path), picture.size
        data, drawing = io.BytesIO(), path.with_suffix(".svg").exists()
        how = {"lossless": True, "quality": 40} if drawing else {"quality": 80}
        picture.convert("RGB").save(data, "webp", method=4, **how)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return (
        f'<figure id="figure-{_safe(path.stem)}"><img src="{source}" width="{width}" height="{height}" '
        f'alt="{_safe(text)}"><figcaption><b>{_safe(path.stem)}.</b> {_safe(text)}</figcaption></figure>'
    )


def _origin(origin):
    """The provenance as two tables: the run, and its stages with minutes and peak memory."""
    facts = {key: origin[key] for key in ("commit", "tree", "digest", "seed", "date", "python")}
    facts |= {"device": _device(origin), "libraries": ", ".join(map(" ".join, origin["libraries"].items()))}
    run = [_row(key, [value]) for key, value in facts.items()]
    spent = origin["stages"].items()
    slow = [_row(_safe(name), [f"{one['minutes']:.1f}", one["peak_mb"]]) for name, one in spent]
    slow.append(_row("all of them", [f"{sum(one['minutes'] for _, one in spent):.1f}", ""]))
    return (
        f'<section id="run"><h2>What was run</h2>{_grid((), run, "facts")}'
        f"{_grid(('stage', 'minutes', 'peak memory, MB'), slow)}</section>"
    )


def _device(origin):
    """The machine in words."""
    return "{cpu}, {cores} cores, {memory_gb} GB memory, ".format(**origin["device"]) + (
        origin["device"]["gpu"] or "no GPU"
    )


def _link(profile, path, words):
    """A link to a file of the same clone."""
    return f'<a href="{_safe(quote(os.path.relpath(path, profile.results())))}">{_safe(words)}</a>'


def _links(profile, title, pages):
    """A section of links: {path: words}; nothing without any."""
    links = "".join(f"<li>{_link(profile, path, words)}</li>" for path, words in pages.items())
    return f"<section><h2>{title}</h2><ul>{links}</ul></section>" if links else ""


def _notebooks(profile):
    """{executed copy: its data set and name}."""
    folders = [profile.runs(dataset) / "notebooks" for dataset in profile.datasets]
    folders.append(folders[0].parent.parent / "notebooks")
    paths = [path for folder in folders for path in sorted(folder.glob("*.ipynb")) if "." not in path.stem]
    return {path: f"{path.parent.parent.name}: {path.stem}" for path in paths}
