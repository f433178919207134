"""Pages that a person reads: links and pictures lead somewhere, and measured numbers are generated, not typed."""

import ast
import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from test_setup import text, tracked
from typer.main import get_command

from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.config import ROOT
from vsr1.report import html_report

PAGES = sorted(path for path in tracked() if path.suffix == ".md" and path.exists())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWN = [ROOT / "results/mini/report.html", ROOT / "results/mini/qualitative/index.html"]
LINK = re.compile(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")


def prose(path):
    """The text that a reader sees: of a notebook its markdown cells, of any page no code."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(content)["cells"]
        content = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```$", "", content, flags=re.S | re.M)


@cache
def anchors(path):
    """What a code host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in plain}


def dead(path, content):
    """The relative links and pictures of a page that lead nowhere."""
    found = []
    for target in {one or other for one, other in LINK.findall(content)}:
        name, _, anchor = unquote(target).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        goal = (path.parent / name).resolve() if name else path
        page = anchor and goal.suffix == ".md" and goal.exists()
        if not goal.exists() or (page and anchor not in anchors(goal)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_and_pictures_of_a_page_lead_somewhere(path):
    assert not dead(path, prose(path))


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_links_and_pictures_of_the_committed_html_lead_somewhere(path):
    # Reports of before 29 November 2026 link to executed notebooks in runs/, which is not committed.
    assert not [target for target in dead(path, path.read_text(encoding="utf-8")) if "/runs/" not in target]


def test_a_dead_link_a_lost_picture_and_a_lost_heading_are_found(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, `here`\n")
    page = "[a](there.md) [b](gone.md) ![c](gone.png) [d](there.md#a-heading-here) [e](there.md#no) [f](https://x.y)"
    assert sorted(dead(tmp_path / "page.md", page + ' <img src="lost.png">')) == [
        "gone.md",
        "gone.png",
        "lost.png",
        "there.md#no",
    ]


LOG = ROOT / "docs" / "log"


def log_faults(folder):
    """What is wrong with the pages of a log and its index, one line each."""
    index = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| \[[^]]+\]\(([^)]+)\) \| (.+) \| (.*?) ?\|$", index, re.M)
    dates = [date for date, *_ in rows]
    found = [] if dates == sorted(dates, reverse=True) else ["README.md: not newest first"]
    marks = {name: (date, conclusion, mark) for date, name, conclusion, mark in rows}
    pages = {path.name: path for path in folder.glob("*.md") if path.name != "README.md"}
    found += [f"{name}: in the index, not in the folder" for name in marks.keys() - pages.keys()]
    found += [
        f"{name}: not in the index exactly once" for name in pages if [r[1] for r in rows].count(name) != 1
    ]
    for name, path in pages.items():
        title, blank, sentence, *_ = [*path.read_text(encoding="utf-8").split("\n"), "", "", ""]
        if not re.fullmatch(r"20\d\d-\d\d-\d\d-[a-z0-9-]+\.md", name):
            found.append(f"{name}: not named YYYY-MM-DD-short-topic.md")
        if not title.startswith("# ") or blank or not re.match(r"\*\*In one sentence\.\*\* \S", sentence):
            found.append(f"{name}: no title and conclusion in its first lines")
        date, _, mark = marks.get(name, (name[:10], "", None))
        if date != name[:10]:
            found.append(f"{name}: another date in the index")
        if mark is not None and ("negative" in mark) != ("negative" in title + sentence):
            found.append(f"{name}: negative on the page or in the index only")
    return found


def test_each_page_of_the_log_begins_with_its_conclusion_and_stands_in_the_index():
    assert LOG.exists() and not log_faults(LOG)


def test_pages_of_the_log_that_measured_in_the_first_arena_say_so_in_their_first_lines():
    silent = []
    for path in LOG.glob("20*.md"):
        page = path.read_text(encoding="utf-8")
        if path.name < "2026-11-29" and re.search(r"R@1|VCMR|VER\b", page):
            if not re.search("first arena", "\n".join(page.split("\n")[:6]), re.I):
                silent.append(path.name)
    assert not silent


def test_a_page_of_the_log_without_a_conclusion_or_a_line_of_the_index_is_found(tmp_path):
    good, sentence = "2026-01-02-a.md", "# T\n\n**In one sentence.** It is 3.\n"
    (tmp_path / good).write_text(sentence)
    line = f"| 2026-01-02 | [a]({good}) | it is 3 | |\n"
    (tmp_path / "README.md").write_text(line)
    assert not log_faults(tmp_path)
    (tmp_path / good).write_text("# T\n\nIt is 3.\n")
    assert log_faults(tmp_path) == [f"{good}: no title and conclusion in its first lines"]
    (tmp_path / good).write_text(sentence.replace("3.", "3 (negative)."))
    assert log_faults(tmp_path) == [f"{good}: negative on the page or in the index only"]
    (tmp_path / good).write_text(sentence)
    (tmp_path / "2026-01-03-b.md").write_text(sentence)
    assert log_faults(tmp_path) == ["2026-01-03-b.md: not in the index exactly once"]
    (tmp_path / "README.md").write_text(line + line.replace(good, "2026-01-03-b.md"))
    assert log_faults(tmp_path) == ["2026-01-03-b.md: another date in the index"]
    swapped = line + line.replace(good, "2026-01-03-b.md").replace("2026-01-02 ", "2026-01-03 ")
    (tmp_path / "README.md").write_text(swapped)
    assert log_faults(tmp_path) == ["README.md: not newest first"]
    (tmp_path / "2026-01-03-b.md").unlink()
    (tmp_path / "README.md").write_text(line + line.replace(good, "2026-01-01-c.md"))
    assert log_faults(tmp_path) == ["2026-01-01-c.md: in the index, not in the folder"]


# A decimal, a percentage, or a count with the unit of a measurement. Versions, ids and thresholds are none.
MEASURED = re.compile(
    r"(?<![\w.-])[+-]?\d+\.\d+\b(?![\w.]*[-/])|\b\d[\d,]* ?%|\b\d+ (?:points|ok|agree|minutes)\b"
)
# Overlaps, a version of Python, levels of confidence and power, shares that are definitions.
ALLOWED = {"0.5", "0.7", "3.11", "95 %", "80 %", "100 %", "90 %", "70 %"}


def typed(content):
    """What looks like a measured number in hand-written text."""
    content = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", content, flags=re.S)
    content = re.sub(r"`[^`]*`|\]\([^)]*\)", "", content)
    return [found for found in MEASURED.findall(content) if found not in ALLOWED]


FRONT = [ROOT / "README.md", ROOT / "docs" / "results.md"]  # other pages date what they measured


@pytest.mark.parametrize("path", [*FRONT, *NOTEBOOKS], ids=lambda path: path.name)
def test_no_measured_number_is_typed_where_numbers_are_generated(path):
    assert not typed(prose(path))


def test_a_typed_number_is_found():
    page = "At 0.5 with Python 3.11 and `1.5`.\n<!-- a -->\n9.5\n<!-- /a -->\n"
    assert typed(page) == [] and typed(page + "It gains 4.7 (30 %), +3.0 and 12 points.") == [
        "4.7",
        "30 %",
        "+3.0",
        "12 points",
    ]


def test_the_readme_is_short_and_names_what_to_type():
    page = text("README.md")
    assert len(page.splitlines()) <= 130
    for command in ("make demo", "make paper", "make check", "make lab", "make test"):
        assert command in page
    linked = {Path(one).name for one, _ in LINK.findall(page)}
    assert {path.name for path in NOTEBOOKS} <= linked
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= linked


def test_the_page_of_commands_names_each():
    page = text("docs/cli.md")
    commands = get_command(cli.app).commands
    assert all(re.search(rf"`(make )?{name}\b", page) for name in commands), set(commands)
    targets = re.search(r"^\.PHONY: (.*)$", text("Makefile"), re.M)[1].split()
    assert all(f"`make {name}" in page for name in targets if name != "setup")


def test_the_workflow_of_code_hosts_runs_what_a_person_types():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    runs = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in runs


def test_the_citation_is_complete():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "references"} <= citation.keys()
    assert citation["references"][0]["title"].startswith("VideoSearch-R1")


# --- Departures from the paper


@cache
def functions(path):
    """The names of the functions of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def faults(departures):
    """What is wrong with the tests that departures name."""
    found, areas = [], {}
    for one in departures.values():
        areas.setdefault(one.test, set()).add(one.area)
    for name, one in departures.items():
        file, _, test = one.test.partition("::")
        if one.test == "none":
            found += [f"{name}: none, without a reason"] * (not one.why)
        elif not (ROOT / file).exists():
            found.append(f"{name}: no file {file}")
        elif test not in functions(file):
            found.append(f"{name}: no {test} in {file}")
        elif len(areas[one.test]) > 1 and not one.why:
            found.append(f"{name}: {test} is that of another area too")
    return found


def test_every_departure_names_the_test_that_holds_it():
    assert not faults(html_report.departures())


def test_a_lost_test_of_a_departure_is_found():
    known = html_report.departures()
    lost = (
        {"test": "tests/test_docs.py::test_of_old"},
        {"test": "tests/test_gone.py::test_a"},
        {"test": "none"},
    )
    lost += ({"test": known["grpo-2"].test},)
    for change, word in zip(
        lost, ("no test_of_old", "no file", "without a reason", "another area"), strict=True
    ):
        broken = known | {"eval-2": dataclasses.replace(known["eval-2"], **change)}
        found = faults(broken)
        assert found and word in found[0], change
        assert not faults({key: dataclasses.replace(one, why="both") for key, one in broken.items()}) == (
            word in ("without a reason", "another area")
        )


# What a profile may choose for itself: where its videos and models come from, how large its world and its studies are,
# and what changes no result but for the rounding of sums. Sizes of frames and stamps of the engine go by one word.
FREE = {*config.NO_RESULT, "data_source", "engine", "engine_large", "policy", "world", "sft_data", "dtype"}
FREE |= {"batch_tokens", "eval_batch", "two_stage"}


@pytest.mark.parametrize("name", ["mini", "paper", "paper-24gb"])
def test_every_knob_that_is_not_the_official_value_stands_in_a_departure(name):
    said = " ".join(one.ours for one in html_report.departures().values())
    knobs = yaml.safe_load(text(f"vsr1/profiles/{name}.yaml"))
    changed = {knob for knob in knobs if not knob.startswith("engine_")} - FREE
    assert "`engine_*`" in said and changed
    assert not [knob for knob in changed if not re.search(rf"`([^`]*\W)?{knob}\b", said)]


def test_what_a_departure_names_in_our_code_is_there():
    sources = [path for path in tracked() if path.suffix in (".py", ".yaml") and "vsr1" in path.parts]
    code = " ".join(path.read_text(encoding="utf-8") for path in sources if path.exists())
    departures = html_report.departures()
    for name, one in departures.items():
        for words in re.findall(r"`([^`]+)`", f"{one.ours} {one.effect}"):
            first = re.match(r"[\w./<>@-]+", words)[0]
            known = all(re.search(rf"(?<!\w){re.escape(part)}", code) for part in first.split("."))
            places = (ROOT / place for place in (first, f"vsr1/{first}", f"vsr1/profiles/{first}.yaml"))
            assert known or first in departures or any(map(Path.exists, places)), f"{name}: {words}"
