"""What a reader opens: report.html, every item of the paper in its order, made of what results/<profile>/ holds.

The report is one file that loads nothing else: styles inside, pictures as data, every text escaped. It is laid out in
page.html; here stands what it is filled with.
"""

import base64
import functools
import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from vsr1 import config
from vsr1.config import ROOT, Profile
from vsr1.report import diagrams, plots, qualitative, results, search_figures, tables, verdicts
from vsr1.report.tables import CAVEAT, rows


OF_RUN = re.compile(rf"{'|'.join(config.DATASETS)}|seed-\d+")  # parts of a path that every step has


def publish(profile: Profile) -> Path:
    """The report of a profile, after all that it shows: numbers.json, provenance.json, tables, figures."""

    numbers = results.collect(profile)
    results.provenance(profile)
    tables.write(profile)
    plots.figures(profile, numbers)
    diagrams.publish(profile)
    search_figures.publish(profile)
    plots.copy_sheets(profile)
    return report(profile, qualitative.publish(profile))


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
    paths, pictures, listed = [*(profile.results() / "figures").glob("*.png")], {}, results.items()
    if not profile.world:  # frames of real video stay out of results/
        paths += profile.runs("figures").glob("*.png")
        for dataset in profile.datasets:
            paths += plots.sheets(profile, dataset).glob(f"*-{dataset}.png")
    for path in sorted(paths):
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
    lost = [name for name in books if not (config.ROOT / "notebooks" / f"{name}.ipynb").exists()]
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
    folder, numbers = profile.results(), results.load(profile)
    origin, shown = results.load(profile, "provenance"), items(profile, numbers)
    facts = {key: origin[key] for key in ("commit", "tree", "digest", "seed", "date", "python")}
    facts |= {"device": _device(origin), "libraries": ", ".join(map(" ".join, origin["libraries"].items()))}
    told = {}
    for one in verdicts.judge(numbers, profile.datasets):
        cell = f"{one.verdict} / {one.verdict_seeds}".replace("not measured", "—")
        told.setdefault(one.claim, []).append(cell)  # a cell a data set
    text = qualitative.fill(
        "report.html",
        title=f"VideoSearch-R1, reproduced on the profile {profile.name}",
        caveat=CAVEAT,
        profile=profile,
        numbers=numbers,
        items=shown,
        claims=told,
        facts=facts,
        device=facts["device"],
        stages=origin["stages"],
        gone=len(missing(profile, numbers)),
        totals=Counter(entry["verdict"] for item in shown for entry in item.numbers.values()),
        verdicts=results.VERDICTS,
        departures=departures(),
        departed={name for item in shown for name in item.about.get("deviations", ())},
        searches={
            path: f"{path.parent.parent.name}: what SQR and HQR saw, said and found" for path in searches
        },
        notebooks=_notebooks(profile),
        tables=tables,
        layouts=results.layouts(),
        details=details,
        picture=picture,
        inside=lambda path: path.is_relative_to(folder),
        remedy=lambda item: remedy(profile, item),
        minutes=lambda item: _minutes(item, origin),
        copies=lambda name: _copies(profile, name),
        link=lambda path: quote(os.path.relpath(path, folder)),
    )
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


def details(entry: dict | None) -> str:
    """What a cell of a table leaves out."""
    if entry is None or not entry["measured"]:
        return "not measured here"
    said = [f"n = {entry['n']}"] if entry["n"] else []
    said += ["95 % interval {:.1f} to {:.1f}".format(*entry["ci"])] if entry["ci"] else []
    return ", ".join([*said, *filter(None, (entry["verdict"], entry["note"]))])


def picture(path: Path) -> tuple[str, tuple[int, int], str]:
    """(caption, size, address that holds all of it): as webp, a drawing bit by bit, frames of video nearly so."""
    with Image.open(path) as opened:
        drawn = path.with_suffix(".svg").exists() and opened.mode != "P"  # a plate is half frames
        how = {"lossless": True, "quality": 40} if drawn else {"quality": 80}
        opened.convert("RGB").save(data := io.BytesIO(), "webp", method=4, **how)
        source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
        return words_of(path), opened.size, source


@functools.cache
def departures() -> dict[str, list[str]]:
    """The table of DEVIATIONS.md: {departure: [the paper's, ours, measured effect]}."""
    lines = (ROOT / "DEVIATIONS.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {first: rest for first, *rest in cells[2:]}


def _minutes(item, origin):
    """What the stages of an item took, over all data sets."""
    names = tuple(item.about.get("stages", ()))
    bare = lambda name: "/".join(part for part in name.split("/") if not OF_RUN.fullmatch(part))  # noqa: E731
    own = [one["minutes"] for name, one in origin["stages"].items() if bare(name).startswith(names)]
    return f"Its stages ({', '.join(names)}) took {sum(own):.1f} minutes." if own else ""


def _device(origin):
    """The machine in words."""
    words = "{cpu}, {cores} cores, {memory_gb} GB memory, ".format(**origin["device"])
    return words + (origin["device"]["gpu"] or "no GPU")


def _folders(profile):
    """Where executed notebooks lie."""
    homes = [profile.runs(dataset) for dataset in profile.datasets]
    return [home / "notebooks" for home in (*homes, profile.run_root())]


def _copies(profile, name):
    """{executed copy or source of a notebook: its data set, or profile, or "source"}."""
    paths = {folder / f"{name}.ipynb": _place(profile, folder) for folder in _folders(profile)}
    paths |= {config.ROOT / "notebooks" / f"{name}.ipynb": "source"}
    return {path: words for path, words in paths.items() if path.exists()}


def _notebooks(profile):
    """{executed copy: its data set and name}."""
    paths = [path for folder in _folders(profile) for path in sorted(folder.glob("*.ipynb"))]
    return {path: f"{_place(profile, path.parent)}: {path.stem}" for path in paths if "." not in path.stem}


def _place(profile, folder):
    """The data set of a folder of notebooks; the profile's name where they are about all of them."""
    return folder.relative_to(profile.run_root().parent).parts[:-1][:2][-1]
