"""Publish report.html: the premise, the gallery, the claims, every item of the paper, then our own studies.

The report is one file that loads nothing else: styles inside, pictures as data, every text escaped. Its layout is
templates/report.html. This module gathers what fills it.
"""

import base64
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import pandas as pd
import yaml
from PIL import Image
from pydantic import Field

from vsr1 import config
from vsr1.config import Profile
from vsr1.report import (
    canvas,
    outputs,
    plots,
    provenance,
    qualitative,
    results,
    search_figures,
    tables,
    templates,
    verdicts,
)

PREMISE, PAPER = "PX", "TFAC"  # first letters of ids; those of all other items are our own studies
DEVIATIONS = config.PACKAGE.parent / "results" / "expected" / "deviations.yaml"


def publish(profile: Profile) -> Path:
    """Write numbers, provenance, tables and figures, then the report that shows them; return its path."""
    results.publish(profile)
    provenance.write(profile)
    folder = profile.results()
    listed = [results.EXPECTED / f"{name}.yaml" for name in ("items", "published", "claims")]
    numbers = [folder / "numbers.json", folder / "series.json", *listed]
    outputs.keep_current(profile, tables.publish, numbers)
    outputs.keep_current(profile, plots.publish, numbers)
    outputs.keep_current(profile, plots.publish_drawings, listed)
    outputs.keep_current(profile, search_figures.publish, search_figures.sources(profile))
    outputs.keep_current(profile, qualitative.publish, qualitative.sources(profile))
    canvas.copy_sheets(profile)
    shown = [path for paths in _pictures(profile).values() for path in paths]
    shown += [*numbers, folder / "provenance.json", DEVIATIONS]
    shown += [cards / "cards.json" for cards in qualitative.sources(profile)]
    linked = [str(path) for path in (*_notebooks(profile), *qualitative.pages(profile))]
    outputs.keep_current(profile, _write, shown, linked)
    return folder / "report.html"


def _write(profile):
    return [report(profile)]


# --- Items


@dataclass(frozen=True)
class Item:
    """One table or figure, published or ours, available or missing."""

    id: str
    about: dict  # its entry in items.yaml
    numbers: pd.DataFrame  # its rows of `results.frame`
    table: bool  # whether it has rows to show
    pictures: list[Path]

    @property
    def available(self) -> bool:
        """Return whether there is anything to show."""
        return self.table or bool(self.pictures)

    @property
    def title(self) -> str:
        """Return its title, a few words."""
        return results.layouts().get(self.id, {}).get("title") or self.about.get("title", "")

    def verdicts(self) -> dict[str, int]:
        """Count its numbers by verdict."""
        counts = Counter(self.numbers.verdict)
        return {word: counts[word] for word in results.VERDICTS}


def items(profile: Profile, numbers: pd.DataFrame) -> list[Item]:
    """List everything that the report shows or misses, in the order of items.yaml, unlisted items last."""
    pictures, about, layouts = _pictures(profile), results.items(), results.layouts()
    ids = [*about, *sorted((layouts.keys() | pictures.keys()) - about.keys())]
    parts = {name: numbers[numbers.table == name] for name in ids}
    shown = {name: name in layouts and bool(tables.blocks(profile, parts[name], name)) for name in ids}
    return [Item(name, about.get(name, {}), parts[name], shown[name], pictures.get(name, [])) for name in ids]


def chapters(shown: list[Item]) -> dict[str, list[Item]]:
    """Return {heading: its items}; items of the premise that were not measured are left out."""
    parts = {
        "The premise": [item for item in shown if item.id[0] in PREMISE and item.available],
        "The paper": [item for item in shown if item.id[0] in PAPER],
        "Our own studies": [item for item in shown if item.id[0] not in PREMISE + PAPER],
    }
    return {heading: listed for heading, listed in parts.items() if listed}


def _pictures(profile):
    """Return {item: its pictures}; those with frames of real video lie in runs/."""
    paths = [*(profile.results() / "figures").glob("*.png")]
    if not profile.world:
        paths += profile.runs("figures").glob("*.png")
        for dataset in profile.datasets:
            paths += canvas.sheets(profile, dataset).glob(f"*-{dataset}.png")
    pictures = {}
    for path in sorted(paths):
        pictures.setdefault(path.stem.partition("-")[0], []).append(path)
    return pictures


def remedy(profile: Profile, item: Item) -> str:
    """Say what would make a missing item."""
    if command := item.about.get("made"):
        return f"`{command} PROFILE={profile.name}` makes it."
    notebooks = item.about.get("notebooks", [])
    lost = [name for name in notebooks if not (config.ROOT / "notebooks" / f"{name}.ipynb").exists()]
    source = f"{' and '.join(notebooks)} makes it" + (f", and {lost[0]} does not exist yet" if lost else "")
    return f"{source}; then `make paper PROFILE={profile.name}`."


def missing(profile: Profile, numbers: pd.DataFrame) -> list[Item]:
    """Return the published items that have neither a table nor a figure, but should."""
    published = [item for item in items(profile, numbers) if item.id[0] in PAPER]
    return [item for item in published if not (item.available or item.about.get("beyond"))]


def check(profile: Profile) -> int:
    """Print a verdict per number, then what is missing or damaged; return 1 if anything is wrong."""
    status = results.check(profile)
    numbers, _ = results.load_collected(profile)
    lines = [f"MISSING {i.id} {i.title}: {remedy(profile, i)}" for i in missing(profile, numbers)]
    lines += [f"damaged {line}" for line in results.damaged(profile)]
    print(*lines, sep="\n", end="\n" if lines else "")
    return int(bool(status or lines))


def show(profile: Profile, *names: str) -> None:
    """Display items in a notebook: a table in markdown, pictures with their captions, or what is missing."""
    from IPython.display import Image as Picture
    from IPython.display import Markdown, display

    by_id = {item.id: item for item in items(profile, results.load(profile))}
    for item in map(by_id.get, names):
        if item.table:
            display(Markdown((profile.results() / "tables" / f"{item.id}.md").read_text(encoding="utf-8")))
        for path in item.pictures:
            display(Picture(filename=path), Markdown(f"**{path.stem}.** {caption(path)}"))
        if not item.available:
            display(Markdown(f"**{item.id} {item.title}**: missing. {remedy(profile, item)}"))


def _measured(answers):
    """Leave out the rows of `verdicts.answers` that were measured on no data set."""
    rows = {
        heading: {words: cells for words, cells in rows.items() if {*cells} != {"MISSING"}}
        for heading, rows in answers.items()
    }
    return {heading: measured for heading, measured in rows.items() if measured}


# --- The report


def report(profile: Profile) -> Path:
    """Write results/<profile>/report.html and return its path."""
    folder, numbers, origin = profile.results(), results.load(profile), results.read(profile, "provenance")
    shown = items(profile, numbers)
    text = templates.render(
        "report.html",
        title=f"VideoSearch-R1, reproduced on the profile {profile.name}",
        caveat=tables.CAVEAT,
        profile=profile,
        numbers=numbers,
        chapters=chapters(shown),
        answers=_measured(verdicts.answers(numbers, profile.datasets)),
        basis=verdicts.basis(profile, numbers),
        legend=tables.legend(profile),
        samples=qualitative.samples(profile),
        outcomes=qualitative.OUTCOMES,
        claims=verdicts.sheet(verdicts.judge(numbers, profile.datasets)),
        rule=verdicts.rule(profile),
        facts=_facts(origin),
        stages=origin["stages"],
        gone=len(missing(profile, numbers)),
        totals=Counter(numbers.verdict),
        verdicts=results.VERDICTS,
        departures=departures(),
        departed={name for item in shown for name in item.about.get("deviations", ())},
        searches={
            path: f"{path.parent.parent.name}: what SQR and HQR saw, said and found"
            for path in qualitative.pages(profile)
        },
        notebooks={os.path.relpath(path, config.ROOT): title for path, title in _notebooks(profile).items()},
        tables=tables,
        layouts=results.layouts(),
        details=details,
        picture=picture,
        data=data,
        inside=lambda path: path.is_relative_to(folder),
        remedy=lambda item: remedy(profile, item),
        source=_source,
        link=lambda path: quote(os.path.relpath(path, folder)),
    )
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


def details(entry: dict | None) -> str:
    """Say what a cell of a table leaves out."""
    if entry is None or not entry["measured"]:
        return "not measured here"
    facts = [f"n = {entry['n']}"] if entry["n"] else []
    facts += [] if entry["low"] is None else ["95 % interval {low:.1f} to {high:.1f}".format(**entry)]
    return ", ".join([*facts, *filter(None, (entry["verdict"], entry["note"]))])


def caption(picture: Path) -> str:
    """Return the caption that was saved inside a picture."""
    with Image.open(picture) as opened:
        return opened.text.get("Description", picture.stem)


def picture(path: Path) -> tuple[str, tuple[int, int], str]:
    """Return (caption, size, address that holds all of it): drawings bit by bit, frames of video nearly so."""
    with Image.open(path) as opened:
        drawing = path.with_suffix(".svg").exists() and opened.mode != "P"  # a search figure is half frames
        how = {"lossless": True, "quality": 40} if drawing else {"quality": 80}
        return caption(path), opened.size, data(opened, **how)


def data(image: Image.Image, **how) -> str:
    """Return the address that holds all of a picture."""
    image.convert("RGB").save(content := io.BytesIO(), "webp", method=4, **how)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


@dataclass(frozen=True)
class Departure:
    """One departure from the paper or its code; the keys are explained in results/expected/deviations.yaml."""

    title: str
    area: Literal[
        "paper", "data", "engine", "policy", "loop", "sft", "grpo", "hqr", "eval", "release", "study"
    ]
    kind: Literal["forced", "choice", "fix", "mini"]
    severity: Literal["A", "B", "C"]
    scope: Literal["mini", "paper", "both"]
    theirs: str
    ours: str
    effect: str
    test: Annotated[str, Field(pattern=r"^(none|tests/[\w/]+\.py::test_\w+)$")]
    why: str = ""

    @property
    def test_file(self) -> str:
        """Return the file of its test; empty without one."""
        return "" if self.test == "none" else self.test.partition("::")[0]

    @property
    def test_name(self) -> str:
        """Return the function of its test; empty without one."""
        return self.test.partition("::")[2]


def departures() -> dict[str, Departure]:
    """Return {id: departure} of deviations.yaml; InputError names the departure and the key that is wrong."""
    rows = yaml.safe_load(DEVIATIONS.read_text(encoding="utf-8"))
    return {name: config.parse(Departure, row, f"{DEVIATIONS.name}: {name}") for name, row in rows.items()}


def _facts(origin):
    """Return what was run and where, as words by name."""
    facts = {key: origin[key] for key in ("commit", "tree", "digest", "seed", "date", "python")}
    device = "{cpu}, {cores} cores, {memory_gb} GB memory, ".format(**origin["device"])
    libraries = ", ".join(map(" ".join, origin["libraries"].items()))
    return facts | {"device": device + (origin["device"]["gpu"] or "no GPU"), "libraries": libraries}


def _notebooks(profile):
    """Return {executed copy of a notebook: its data set, or profile, and name}."""
    homes = {profile.runs(dataset): dataset for dataset in profile.datasets}
    homes[profile.run_root()] = profile.name
    return {
        path: f"{about}: {path.stem}"
        for home, about in homes.items()
        for path in sorted((home / "notebooks").glob("*.ipynb"))
        if "." not in path.stem
    }


def _source(name):
    """Return the source of a notebook, None without one. Executed copies lie in runs/, which is not committed."""
    path = config.ROOT / "notebooks" / f"{name}.ipynb"
    return path if path.exists() else None
