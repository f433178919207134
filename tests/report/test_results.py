import csv
import html
import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import browser
import pytest
import yaml
from fake import profile as fake_profile
from fake import record
from markupsafe import escape
from PIL import Image

from vsr1 import __main__ as cli
from vsr1 import cache
from vsr1.config import ROOT, InputError, load
from vsr1.report import canvas, html_report, plots, provenance, readme, results, tables, templates
from vsr1.report.results import Estimate


@pytest.fixture
def run(tmp_path, monkeypatch):
    return record(fake_profile(tmp_path, monkeypatch))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """One publication, to read: its folder, its numbers and its report.

    A later system was recorded, pictures were drawn by somebody else, two notebooks were executed.
    """
    home = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        run = record(fake_profile(home, patch))
        later = {"T1/charades/vsr1/vr@1": Estimate(30.0), "T1/charades/new/ver": Estimate(9.0)}
        results.record(run, "charades", "later", later)
        for name in ("D2", "A3-didemo", "Z9"):  # Z9: no list names it
            plots.save(plots.Figure(), run.results() / "figures", name, f"caption of {name}")
            plots.save(plots.Figure(), canvas.sheets(run, "didemo"), name, f"caption of {name}", ("png",))
        executed = [run.runs("didemo") / "notebooks", run.run_root() / "notebooks"]
        for folder, name in zip(executed, ("05_evaluation", "09_paper"), strict=True):
            for path in (folder, home / "notebooks"):
                path.mkdir(parents=True, exist_ok=True)
                (path / f"{name}.ipynb").write_text("{}")
        text = html_report.publish(run).read_text()
        return SimpleNamespace(folder=run.results(), numbers=results.load(run), text=text)


def report(run):
    """The report of a run without its figures."""
    results.publish(run)
    provenance.write(run)
    return html_report.report(run).read_text()


def expect(run, numbers, tolerance=0.5):
    """An expectations file for `run` with these numbers."""
    results.EXPECTED.mkdir(exist_ok=True)
    kept = {"reasons": {"trial": {"tolerance": tolerance, "why": "a trial"}}}
    kept["numbers"] = {name: [value, "trial"] for name, value in numbers.items()}
    (results.EXPECTED / f"{run.name}.yaml").write_text(yaml.safe_dump(kept))


def measured(run):
    numbers = results.collect(run)
    return dict(numbers[numbers.measured.astype(bool)].value)


def test_what_is_recorded_comes_out_of_numbers_json_unchanged(run):
    results.publish(run)
    entry = json.loads((run.results() / "numbers.json").read_text())["T1/charades/zs/vr@1"]
    assert (entry["value"], entry["n"], entry["ci"], entry["seeds"]) == (24.4, 412, [20.4, 28.9], [42])
    assert entry["measured"] and entry["paper"] == 21.6


def test_a_notebook_that_is_run_alone_leaves_the_committed_numbers_as_they_are(run):
    """It collects, to show what it has measured; `report` publishes."""
    results.publish(run)
    files = {path: path.read_bytes() for path in run.results().iterdir()}
    shutil.rmtree(run.runs("didemo"))
    numbers = results.collect(run)
    assert not numbers.at["T1/didemo/zs/vr@1", "measured"] and numbers.at["T1/charades/zs/vr@1", "measured"]
    assert files == {path: path.read_bytes() for path in run.results().iterdir()}


def test_a_report_that_would_empty_a_table_of_the_committed_results_is_refused(run):
    results.publish(run)
    provenance.write(run)
    files = {path: path.read_bytes() for path in run.results().iterdir()}
    shutil.rmtree(run.runs("didemo"))
    with pytest.raises(
        InputError, match=r"results/mini: this run has no numbers of 3 tables .* as of D1 on didemo"
    ):
        results.publish(run)
    assert files == {path: path.read_bytes() for path in run.results().iterdir()}
    results.publish(replace(run, n_soft=4))  # these are no longer the results of this profile


def test_a_missing_number_stays_missing_in_every_product(published):
    numbers = published.numbers
    entry = numbers.loc["T1/charades/zs/ver"]
    assert entry.value is None and entry.measured is False and entry.paper == 30.0
    assert (tables.cell(entry), tables.paper_cell(entry)) == ("—", "30.0")
    rows = list(csv.DictReader(open(published.folder / "tables" / "T1.csv")))
    row = next(r for r in rows if (r["dataset"], r["system"], r["metric"]) == ("charades", "zs", "ver"))
    assert row["value"] == "" and row["measured"] == "False"
    zeros = set(numbers[(numbers.table == "T1") & (numbers.value == 0)].metric)
    assert zeros == {"vcmr@0.7"}  # measured as zero


def test_a_value_that_is_not_a_number_is_refused(run):
    with pytest.raises(AssertionError, match="a missing value is None"):
        results.record(run, "charades", "x", {"T1/charades/zs/vr@1": Estimate(float("nan"))})
    with pytest.raises(AssertionError, match="not <id>/charades"):
        results.record(run, "charades", "x", {"T1/didemo/zs/vr@1": Estimate(1.0)})


def test_mini_numbers_never_get_a_verdict_against_the_paper(run):
    assert set(results.collect(run).verdict) == {None}
    expect(run, measured(run))
    numbers = results.collect(run)
    judged = numbers[numbers.verdict.notna()]
    assert set(judged.index) == measured(run).keys()
    assert [pair[0] for pair in judged.expected] == list(judged.value)  # 24.4, not the paper's 21.6


def test_paper_numbers_are_judged_against_the_published_ones(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch, "paper")
    hand_made = {
        "vr@1": (22.1, (21.9, 22.3), "ok"),
        "vr@5": (43.2, None, "close"),
        "vr@10": (53.1, None, "OFF"),
    }
    hand_made |= {"vr@100": (87.0, (84.0, 90.0), "ok"), "ver": (30.0, None, "ok")}  # 2.8 away, half-width 3
    numbers = {f"T1/charades/zs/{m}": Estimate(value, 3720, ci) for m, (value, ci, _) in hand_made.items()}
    results.record(run, "charades", "part", numbers)
    entries = results.collect(run)
    assert {m: entries.at[f"T1/charades/zs/{m}", "verdict"] for m in hand_made} == {
        metric: verdict for metric, (_, _, verdict) in hand_made.items()
    }
    assert entries.at["T1/charades/zs/vcmr@0.3", "verdict"] == "MISSING"
    quoted = entries.loc["T1/charades/conquer/vr@1"]
    assert (quoted["value"], quoted["measured"], quoted["verdict"]) == (2.8, False, None)
    assert results.check(run) == 1


def test_check_fails_on_off_missing_and_unexpected_and_on_nothing_to_check(run, capsys):
    assert results.check(run) == 1  # no file: a missing reference is no pass
    values = measured(run)
    expect(run, values)
    assert results.check(run) == 0
    expect(run, values | {"T1/charades/zs/vr@1": 25.4})
    assert results.check(run) == 0 and "close" in capsys.readouterr().out
    for wrong in ({"T1/charades/zs/vr@1": 29.0}, {"T1/charades/zs/vr@5": 40.0}):
        expect(run, values | wrong)
        assert results.check(run) == 1
    expect(run, {name: value for name, value in values.items() if name != "T1/charades/zs/vr@1"})
    assert results.check(run) == 1 and "nobody expected it" in capsys.readouterr().out


def test_an_unreadable_expectation_names_its_file_and_key(run):
    expect(run, {})
    for pair in ("24.4", "[1e-06, exact]"):
        numbers = f"reasons: {{exact: {{tolerance: 1}}}}\nnumbers: {{T1/charades/zs/vr@1: {pair}}}"
        (results.EXPECTED / "mini.yaml").write_text(numbers)
        with pytest.raises(
            InputError, match=r"mini.yaml: T1/charades/zs/vr@1: expected \[number, one of exact\]"
        ):
            results.collect(run)


def test_numbers_of_other_knobs_are_left_out_and_named(run, capsys):
    other = replace(run, bootstrap_samples=7)
    assert not measured(other) and "was measured with other knobs" in capsys.readouterr().out


def test_published_values_are_the_table_of_the_paper():
    cells = results.published()
    assert sum(name.startswith("T1/") for name in cells) == 3 * (6 + 6 + 8 + 8 + 8 + 8)
    assert [cells[f"T1/{d}/zs/vr@1"] for d in ("charades", "didemo", "activitynet")] == [21.6, 54.8, 55.1]
    assert "T1/charades/conquer/vcmr@0.3" not in cells  # a dash is no zero


def test_markdown_latex_and_html_show_the_cells_that_numbers_json_holds(published):
    numbers = published.numbers
    text = {kind: (published.folder / "tables" / f"T1.{kind}").read_text() for kind in ("md", "tex")}
    shown = html.unescape(re.sub("<[^>]+>", " ", published.text))
    halves = dict(
        zip((tables.MEASURED, tables.PAPER), text["md"].split("published, real video"), strict=True)
    )
    rows = [(of, row) for of in halves for row in tables.rows(numbers, "T1", of)]
    for of, (dataset, system, label, cells) in rows:
        cells = [text for _, text in cells]
        row = next(r for r in halves[of].splitlines() if r.startswith(f"| {dataset} |") and label in r)
        assert [part.strip() for part in row.split("|")[3:-1]] == cells, (dataset, system)
        assert " & ".join(map(templates.tex, cells)) in text["tex"]
        assert all(part in shown for cell in cells for part in cell.split(" "))
    lines = list(csv.DictReader(open(published.folder / "tables" / "T1.csv")))
    for line in lines:
        value = numbers.at[f"T1/{line['dataset']}/{line['system']}/{line['metric']}", "value"]
        assert line["value"] == ("" if value is None else str(value))
    assert len(lines) == (numbers.table == "T1").sum()


def test_a_later_system_becomes_a_row_without_code(published):
    table = (published.folder / "tables" / "T1.md").read_text()
    measured, paper = table.split("published, real video")
    assert "| **VideoSearch-R1** | — | — | — | — | 30.0 |" in measured and "| charades | new |" in measured
    assert "| charades | **VideoSearch-R1** | 16.5 |" in paper and "| charades | new |" not in paper


def test_a_second_publication_writes_the_same_bytes(run):
    def files():
        return {p: p.read_bytes() for p in run.results().rglob("*") if p.is_file()}

    html_report.publish(run)
    first = files()
    assert {p.suffix for p in first} == {".json", ".csv", ".md", ".tex", ".png", ".svg", ".html"}
    html_report.publish(run)
    assert files() == first


def test_what_is_current_is_not_made_again_and_what_changed_is(run, monkeypatch):
    """A second publication finds its files; a picture that was lost or a number that moved is noticed."""
    html_report.publish(run)
    files = {path: path.read_bytes() for path in run.results().rglob("*.*")}
    drawn = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda *args, **more: drawn.append(args[2]) or save(*args, **more))
    html_report.publish(run)
    assert drawn == []
    (run.results() / "figures" / "H1.svg").write_text("edited")
    (run.results() / "figures" / "H2.png").unlink()
    html_report.publish(run)
    assert drawn == ["H1", "H2"] and files == {path: path.read_bytes() for path in files}
    record(run, 31.0)
    assert "31.0" in html_report.publish(run).read_text() and drawn == ["H1", "H2"] * 2


def test_the_report_escapes_what_it_is_given_and_loads_nothing(run, monkeypatch):
    hostile = '<script>alert("x")</script>'
    layouts = json.loads(json.dumps(results.layouts()))
    layouts["T1"]["systems"]["zs"], layouts["T1"]["title"] = hostile, hostile
    monkeypatch.setattr(results, "layouts", lambda: layouts)
    numbers = {"T1/charades/sft/ver": Estimate(1.0, 5, (0.0, 2.0), note=f'">{hostile}')}
    results.record(run, "charades", "part2", numbers)

    figure = plots.Figure()
    plots.save(figure, run.results() / "figures", "D9", f'"{hostile}')
    text = html_report.publish(run).read_text()
    assert "<script" not in text and text.count(escape(hostile)) >= 4
    loads = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', text)
    kinds = {re.match(r"data:image/webp;base64,|#\w|[^:]+$", target).end() > 0 for target, _ in loads}
    assert kinds == {True} and not any(other for _, other in loads)
    pictures = list((run.results() / "figures").glob("*.png"))
    assert sum(target.startswith("data:") for target, _ in loads) == len(pictures) >= 3  # H1, H2, D9
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


def test_the_report_shows_the_sheets_of_its_runs_and_no_others(run, tmp_path, monkeypatch):
    """Results are committed: a sheet of an older corpus may lie there."""

    plots.save(plots.Figure(), run.results() / "figures", "D1-charades", "of an older corpus")
    plots.save(plots.Figure(), canvas.sheets(run, "didemo"), "D1-didemo", "six queries")
    text = html_report.publish(run).read_text()
    assert "six queries" in text and "of an older corpus" not in text
    assert [path.name for path in (run.results() / "figures").glob("D*.png")] == ["D1-didemo.png"]
    real = record(fake_profile(tmp_path, monkeypatch, "paper"))
    plots.save(plots.Figure(), canvas.sheets(real, "didemo"), "D1-didemo", "a stranger's face")
    assert "a stranger's face" not in html.unescape(html_report.publish(real).read_text())


def test_the_report_says_that_mini_is_no_evidence_and_paper_does_not(published, tmp_path, monkeypatch):
    assert tables.CAVEAT in html.unescape(published.text)
    assert tables.CAVEAT not in html.unescape(report(fake_profile(tmp_path, monkeypatch, "paper")))


def test_provenance_names_commit_device_libraries_and_what_stages_cost(run):

    own = run.data_dir("didemo") / "embed" / "engine", run.with_overrides("no-ret").runs("didemo") / "grpo"
    for folder in (*own, run.runs("elsewhere") / "sft"):
        cache.build(folder, {"a": 1}, lambda folder: (folder / "x").touch())
    origin = provenance.write(run)
    assert re.fullmatch("[0-9a-f]{40}|unknown", origin["commit"])
    assert (
        origin["libraries"]["numpy"] and origin["device"]["cores"] >= 1 and origin["digest"] == run.digest()
    )
    assert list(origin["stages"]) == ["didemo/embed/engine", "didemo/seed-42/variants/no-ret/grpo"]


# --- Every item of the paper, there or missing by name


def sections(text):
    """The ids of the report's sections, in order."""
    return re.findall('<section id="([^"]+)"', text)


def test_the_report_shows_the_items_of_the_paper_in_its_order_then_ours(published):
    ids = re.findall('<section id="([^"]+)"', published.text)
    paper = "T1 T2 T3 F1 F2 F3 F4 F5 F6 F7 A1 A2 A3 A4 A5 A6 A7 C1".split()
    assert [name for name in ids if name in paper] == paper
    assert ids.index("C1") < ids.index("R1") < ids.index("D1") < ids.index("Z9")
    shown = {name: section(published.text, name) for name in ids}
    assert all("caption of" in shown[name] and "MISSING" not in shown[name] for name in ("D2", "A3", "Z9"))
    assert "<b>MISSING.</b> 08_qualitative makes it" in shown["F1"]
    assert "make paper PROFILE=mini" in shown["F1"]
    assert "Not attempted" in shown["C1"] and "make seeds PROFILE=mini" in shown["R1"]
    assert "21.6" in shown["T1"] and "n = 412" in shown["T1"] and "Seeds 42" in shown["T1"]


def test_the_premise_opens_the_report_where_it_was_measured_and_the_regression_check_closes_it(
    published, run
):
    def order(text):
        return [
            name for name in sections(text) if name in ("answers", "P3", "P1", "claims", "T1", "R1", "check")
        ]

    assert order(published.text) == ["claims", "T1", "R1", "check"]  # nothing of it is missing by name
    assert '"#P3"' not in published.text
    for system, metric, value in (("adapter-soft", "first@1", 40.0), ("vsr1", "vr@1", 30.0)):
        numbers = {f"P1/charades/{system}/{metric}": Estimate(value, 99, (value - 4, value + 4))}
        results.record(run, "charades", f"premise-{system}", numbers)
    text = report(run)
    assert order(text) == ["answers", "P1", "claims", "T1", "R1", "check"]
    assert "40.0 against 30.0<" in section(text, "answers").replace("\n", "")  # nothing is said unpaired
    for interval, word in (((4.0, 16.0), "ahead"), ((-4.0, 24.0), "not clear")):
        gain = {"P1/charades/adapter-soft/over-vsr1": Estimate(10.0, 99, interval, unit="points")}
        results.record(run, "charades", "premise-gain", gain)
        low, high = interval
        words = f"40.0 against 30.0: +10.0 ({low:+.1f} to {high:+.1f}) {word}"
        assert words in section(report(run), "answers")
    assert "MISSING" in section(text, "answers")  # of the other data sets


def section(text, name):
    """One section of the report."""
    return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def test_links_and_anchors_of_the_report_resolve(published):
    links = re.findall('href="([^"]+)"', published.text)
    ids = re.findall(' id="([^"]+)"', published.text)
    assert len(ids) == len(set(ids))
    assert all(link[1:] in ids for link in links if link[0] == "#")
    files = [(published.folder / link).resolve() for link in links if link[0] != "#"]
    assert all(path.is_file() for path in files)
    drawn = {path for path in files if path.parent.name == "figures"}
    shown = (published.folder / "figures").glob("*.png")
    assert drawn == {vector if (vector := path.with_suffix(".svg")).exists() else path for path in shown}
    assert {path.name for path in {*files} - drawn} == {"05_evaluation.ipynb", "09_paper.ipynb"}  # sources


def test_pictures_of_real_frames_are_linked_to_and_not_missing(run):
    report(run)
    drawn = [run.runs("figures") / "F1.png", canvas.sheets(run, "didemo") / "E3-didemo.png"]
    for path in drawn:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    for real, shown in ((True, replace(run, world=None)), (False, run)):
        text, missing = html_report.report(shown).read_text(), html_report.missing(shown, results.load(run))
        links = [f'href="{os.path.relpath(path, run.results())}"' in text for path in drawn]
        assert links == [real, real] and any(item.id == "F1" for item in missing) != real


def test_what_an_item_departs_in_stands_in_the_list_of_deviations():
    named = {name for about in results.items().values() for name in about.get("deviations", ())}
    assert named and named <= html_report.departures().keys()
    known = {"title", "notebooks", "deviations", "beyond", "made", "caption", "folded"}
    assert all(about.keys() <= known for about in results.items().values())


def test_verdicts_of_an_item_are_counted_and_on_mini_never_against_the_paper(run):
    expect(run, measured(run) | {"T1/charades/zs/vr@1": 29.0})
    text = html.unescape(report(run))
    (item,) = (item for item in html_report.items(run, results.load(run)) if item.id == "T1")
    assert item.verdicts() == {"ok": len(measured_of(run, "T1")) - 1, "close": 0, "OFF": 1, "MISSING": 0}
    assert "never against the paper" in text


def measured_of(run, table):
    return [name for name in measured(run) if name.startswith(f"{table}/")]


# --- What is lost or damaged is named


def test_check_names_items_that_are_missing(run, capsys):
    expect(run, measured(run))
    assert html_report.check(run) == 1
    said = capsys.readouterr().out
    assert "MISSING F1 A search in two turns: 08_qualitative makes it" in said and "MISSING T1" not in said


def test_check_names_damaged_lines_lost_files_and_stages_that_are_gone(run, capsys):
    home = run.runs("charades")
    for folder in ("episodes", "sft", "notebooks"):
        (home / folder).mkdir()
    (home / "episodes" / "vsr1.jsonl").symlink_to("vsr1/episodes.jsonl")
    (home / "sft" / "log.jsonl").write_text('{"step": 1}\n{"step"\n')
    (home / "notebooks" / ".05_evaluation.json").write_text('{"steps": {"twostage": "key"}}')
    assert html_report.check(run) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert len(said) == 3 and all("again" in line for line in said)
    assert "episodes/vsr1/episodes.jsonl: cannot be read" in said[0]
    assert "sft/log.jsonl, line 2: not JSON" in said[1]
    assert "twostage: gone since notebook 05_evaluation ran" in said[2]


def test_a_damaged_part_is_one_line_that_names_it(run):
    path = run.runs("didemo") / "numbers" / "01_corpus_embedding.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InputError, match=r"01_corpus_embedding\.json, line"):
        results.collect(run)


def test_a_figure_without_data_is_named_and_no_old_one_is_shown(run, capsys):
    html_report.publish(run)
    assert (run.results() / "figures" / "H2.png").exists()
    for dataset in run.datasets:
        path = run.runs(dataset) / "numbers" / "01_corpus_embedding.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"series": {}}))
    text = html_report.publish(run).read_text()
    assert "left out: figure H2" in capsys.readouterr().out and not list(
        (run.results() / "figures").glob("H2.*")
    )
    assert "MISSING" in section(text, "H2")


@pytest.mark.parametrize("command", ["check", "report"])
def test_a_clone_without_a_run_keeps_its_committed_numbers(tmp_path, monkeypatch, capsys, command):
    path = fake_profile(tmp_path, monkeypatch).results() / "numbers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert cli.main([command]) == 2
    assert path.read_text() == "{}" and "run `make paper` first" in capsys.readouterr().err


# --- The README


@pytest.mark.parametrize("page", readme.PAGES)
def test_generated_parts_of_pages_say_what_the_committed_results_say(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme.fill(page, text, load("mini")) == text, "run `make readme`"


@pytest.fixture
def committed(run):
    """The committed numbers, with their picture, as those of a run whose numbers can be changed."""
    shutil.copytree(
        ROOT / "results" / "mini", run.results(), ignore=shutil.ignore_patterns("qual*", "*.svg", "[A-EG-Z]*")
    )
    return run


def test_a_departure_with_a_wrong_key_is_named(tmp_path, monkeypatch):
    text = html_report.DEVIATIONS.read_text().replace("severity: A", "severity: D", 1)
    monkeypatch.setattr(html_report, "DEVIATIONS", tmp_path / "deviations.yaml")
    html_report.DEVIATIONS.write_text(text)
    with pytest.raises(InputError, match=r"deviations.yaml: paper-1: .*severity"):
        html_report.departures()


def test_pages_follow_their_numbers_and_name_a_lost_marker(committed):
    def pages():
        return [
            readme.fill(page, (ROOT / page).read_text(), committed)
            for page in ("README.md", "docs/results.md")
        ]

    path = committed.results() / "numbers.json"
    numbers = json.loads(path.read_text())
    for table in ("R1", "R3"):  # the verdict of this run, and over seeds
        if f"{table}/didemo/refined/points" in numbers:
            numbers[f"{table}/didemo/refined/points"] |= {"value": 3.3, "ci": [1.0, 5.0]}
    path.write_text(json.dumps(numbers))
    front, all_claims = pages()
    assert "+3.3 agrees" in front and "+3.3 (+1.0 to +5.0)" in all_claims
    for table in ("R1", "R3"):
        if f"{table}/didemo/refined/points" in numbers:
            numbers[f"{table}/didemo/refined/points"] |= {"value": -3.3, "ci": [-5.0, -1.0]}
    path.write_text(json.dumps(numbers))
    changed, all_changed = pages()
    assert "-3.3 disagrees" in changed
    assert all_changed.count(" agrees") == all_claims.count(" agrees") - 1
    measured, paper = all_changed.split("The paper's values, for real video")
    assert "13.4 / 24.6 / —" in paper and "13.4 / 24.6" not in measured
    with pytest.raises(InputError, match=r"README\.md: expected one <!-- summary -->"):
        readme.fill("README.md", front.replace("<!-- /summary -->", ""), committed)


def test_results_of_other_settings_and_a_picture_that_no_search_fits_are_named(committed):
    text = (ROOT / "README.md").read_text()
    older = replace(committed, n_soft=committed.n_soft + 1)
    assert "of other settings than profile `mini` has now" in readme.fill("README.md", text, older)
    assert '<img src="results/mini/figures/F1.png"' in readme.fill("README.md", text, committed)
    (committed.results() / "figures" / "F1.png").unlink()
    assert "No search of this run fits the rule" in readme.fill("README.md", text, committed)


# --- In a browser


def test_the_report_opens_without_errors_and_fits_a_phone(run, tmp_path):
    if browser.CHROMIUM is None:
        pytest.skip("no chromium is installed; the report is not looked at")
    address = html_report.publish(run).as_uri()
    with browser.chromium(tmp_path / "chromium") as tab:
        for width in (1280, 400):
            tab.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=800,
                deviceScaleFactor=1,
                mobile=False,
            )
            tab.open(address)
            tab.wait("[...document.images].every(image => image.naturalWidth)")
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        lost = "[...document.links].filter(a => a.hash && !document.getElementById(a.hash.slice(1))).length"
        assert tab.run(lost) == 0 and tab.problems == []


def test_a_mean_of_the_data_sets_needs_all_of_them_and_stands_beside_the_paper(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    for number, dataset in enumerate(run.datasets):
        assert not results.collect(run).at["F4/mean/vsr1/d2", "measured"]
        value = 20.0 + number
        row = {f"F4/{dataset}/vsr1/d2": Estimate(value, 9, (value - 1, value + 1))}
        results.record(run, dataset, "07_tokens", row)
    entry = results.collect(run).loc["F4/mean/vsr1/d2"]
    assert (entry["value"], entry["paper"], entry["low"]) == (21.0, 32.3, None) and entry["verdict"] is None
