import itertools
import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from fake import profile as fake_profile
from fake import record
from PIL import Image

from vsr1 import config
from vsr1.config import ROOT
from vsr1.evaluation.statistics import Estimate
from vsr1.mini import drawing, world
from vsr1.report import canvas, plots, results


def strip(colours, caption="a clip", span=None):
    """A clip of one second per colour."""
    frames = np.broadcast_to(np.array(colours, np.uint8)[:, None, None, :], (len(colours), 24, 32, 3))
    return canvas.Strip(frames, np.arange(len(colours), dtype=float), caption, span)


def pixels(path):
    """How often each colour occurs in a picture."""
    values, counts = np.unique(
        np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True
    )
    return {tuple(map(int, value)): int(count) for value, count in zip(values, counts, strict=True)}


def test_a_night_scene_is_printed_in_colours_that_can_be_named_and_others_as_they_are():
    (scene, *_) = world.make_scenes("charades", "test", 1, 3)

    def drawn(**changed):
        moment = replace(scene.moments[0], object="ball", **changed)
        return drawing.draw_frame(moment, True, 0.3, scene.extras, 64)

    for light in ("day", "dusk"):
        frame = drawn(colour="pink", light=light)
        assert canvas.brighten_night(frame) is frame
    dark = np.random.default_rng(0).integers(0, 120, (64, 64, 3), dtype=np.uint8)  # of no rendered scene
    assert canvas.brighten_night(dark) is dark
    for name, colour in world.COLOURS.items():
        frame = drawn(colour=name, light="night")
        other = drawn(colour="red" if name != "red" else "blue", light="night")
        ball = (frame != other).any(axis=2)
        before, after = (
            np.abs(np.median(one[ball], axis=0) - colour).sum()
            for one in (frame, canvas.brighten_night(frame))
        )
        assert after < before, name


def test_a_contact_sheet_shows_every_frame_of_every_clip(tmp_path):
    rows = [[(200, 10 * i, 30) for i in range(1, 5)], [(20, 10 * i, 130) for i in range(1, 5)]]
    sheet = canvas.contact_sheet([strip(row) for row in rows], columns=4)
    seen = pixels(plots.save(sheet, tmp_path, "sheet", "two clips", kinds=("png",)))
    areas = [seen.get(colour, 0) for row in rows for colour in row]
    assert min(areas) > 10_000 and max(areas) < 1.1 * min(areas)


def test_frames_inside_the_moment_are_marked(tmp_path):
    dark = tuple(int(plots.DARK[i : i + 2], 16) for i in (1, 3, 5))
    grey = [(90, 90, 90)] * 4
    marked, plain = (canvas.contact_sheet([strip(grey, span=span)], columns=4) for span in ((1.0, 2.0), None))
    assert pixels(plots.save(marked, tmp_path, "marked", "", kinds=("png",))).get(dark, 0) > 500
    assert pixels(plots.save(plain, tmp_path, "plain", "", kinds=("png",))).get(dark, 0) == 0


def test_a_long_clip_is_spread_over_the_columns(tmp_path):
    colours = [(i, 100, 100) for i in range(64)]
    seen = pixels(
        plots.save(canvas.contact_sheet([strip(colours)], columns=3), tmp_path, "long", "", ("png",))
    )
    assert sum(seen.get(colour, 0) > 10_000 for colour in colours) == 3
    assert seen[(0, 100, 100)] > 10_000 and seen[(63, 100, 100)] > 10_000


def collect_and_draw(run):
    results.publish(run)
    return plots.publish(run)


@pytest.fixture
def run(tmp_path, monkeypatch):
    return record(fake_profile(tmp_path, monkeypatch))


def test_figures_carry_their_captions_and_are_the_same_bytes_twice(run):
    paths = collect_and_draw(run)
    assert [path.stem for path in paths] == ["H1", "H2"]
    assert "rendered corpora" in Image.open(paths[0]).text["Description"]
    files = {p: p.read_bytes() for p in paths[0].parent.iterdir()}
    assert {p.suffix for p in files} == {".png", ".svg"} and len(files) == 4
    collect_and_draw(run)
    assert files == {p: p.read_bytes() for p in paths[0].parent.iterdir()}


def test_a_missing_number_leaves_a_gap_and_no_bar_of_height_zero(run):
    numbers = results.collect(run)
    numbers.loc["H1/didemo/probe/vr@1", ["value", "measured"]] = None, False
    heights = [bar.get_height() for bar in plots.headroom(numbers, {}, list(run.datasets)).axes[0].patches]
    assert sorted(heights) == [24.4, 34.4, 44.4, 54.4, 74.4]


def test_the_curve_shows_the_measured_series_chance_and_the_papers_points(run):
    numbers = results.collect(run)
    series = results.load_collected(run)[1]
    measured, chance, paper = plots.retrieval_curves(numbers, series, ["charades"]).axes[0].lines
    assert list(measured.get_ydata()) == [y for _, y in series["H2/charades/zs/vr@k"]]
    assert chance.get_ydata()[0] == 100 / 160 and paper.get_fillstyle() == "none"
    assert list(zip(*paper.get_data(), strict=True)) == [(1, 21.6), (5, 41.8), (10, 51.5), (100, 84.2)]


def test_drawing_leaves_matplotlib_as_it_was(run):
    before = dict(matplotlib.rcParams)
    collect_and_draw(run)
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def agent_run(run):
    """The same run with what notebooks 02 and 06 record."""
    for shift, dataset in enumerate(run.datasets):
        spread = {"n": 96, "ci": (20.0, 60.0), "seeds": (42,)}
        numbers = {
            **{
                f"V1/{dataset}/zs/verdict{half}": results.Estimate(66.0 + shift, **spread)
                for half in ("", "_right")
            },
            f"V1/{dataset}/zs/grounding@0.5": results.Estimate(41.0, **spread),
            f"V1/{dataset}/wholevideo/grounding@0.5": results.Estimate(0.0, 96),
        }
        for system, after in {"walkdown": 30.0, "sqr-untrained": 31.0, "hqr-seen": None}.items():
            numbers[f"S1/{dataset}/{system}/vr@1_orig"] = results.Estimate(30.0, **spread)
            numbers[f"S1/{dataset}/{system}/vr@1"] = results.Estimate(after, **(spread if after else {}))
        bars = [[left / 10, 100 / 11] for left in range(-1, 10)]
        series = {f"V2/{dataset}/{system}/iou": bars for system in ("zs", "wholevideo")}
        for init in plots.HEADS:
            for what in ("rank", *plots.SWEPT):
                series[f"S2/{dataset}/{init}/{what}"] = [[n, 9.0 - n] for n in range(9)]
        for side in ("text-small/r1", "text-small/words_r1", "text-small/probe_r1", "text-noise-70/r1"):
            series[f"H3/{dataset}/{side}"] = [[160, 80.0], [1000, 40.0 + shift]]
        for name in ("sft/loss", "ft/loss", "sft/info_nce"):
            series[f"E1/{dataset}/{name}"] = [[1, 4.0], [2, 2.0 + shift]]
        for name in ("reward", "held", "verify", "time", "retrieve", "kl"):
            series[f"E2/{dataset}/vsr1/{name}"] = [[1, 0.5], [2, 1.0 + shift]]
        for start in ("", "-zero", "-zero-clipped"):
            series |= {
                f"L1/{dataset}/free-{way}{start}/vr@1": [[0, 20.0], [1, 90.0]] for way in plots.LAYOUTS
            }
        for system in ("free-plain", "held-plain", "held-zero-n8-r100", "held-scaled-n8-r100-hard"):
            numbers[f"L1/{dataset}/{system}/vr@1"] = results.Estimate(41.0 + shift, **spread)
        numbers[f"P2/{dataset}/sqr/vr@1"] = results.Estimate(63.0, **spread)
        for place, level in enumerate(("asked", "test", "train")):
            numbers[f"P3/{dataset}/typed/{level}"] = results.Estimate(70.0 - 20 * place, **spread)
            numbers[f"P3/{dataset}/vsr1/{level}"] = results.Estimate(50.0 - 10 * place, **spread)
        series |= {f"V5/{dataset}/{system}/roc": [[0, 0], [10, 60], [100, 100]] for system in plots.STAGES}
        names = ("V4/{}/vsr1/stated", "V4/{}/sft/shown_shirt", "V4/{}/vsr1/false_yes_object")
        names += ("P1/{}/walkdown-ft/vcmr@0.5_t3", "P1/{}/skip/vcmr@0.5_t3", "P1/{}/hqr-fixed-ft/vcmr@0.5_t3")
        names += ("V5/{}/vsr1/accept_wrong", "V5/{}/vsr1/accept_right", "V5/{}/sft/accept_right")
        numbers |= {name.format(dataset): results.Estimate(30.0, **spread) for name in names}
        for name in ("F4/{}/vsr1/d0", "F4/{}/vsr1/d8", "F5/{}/vsr1/vcmr@0.5_t1", "A2/{}/sqr/vr@1_small"):
            numbers[name.format(dataset)] = results.Estimate(30.0, **spread)
        results.record(run, dataset, "02_and_06", numbers, series)
    return run


def test_what_is_untrained_or_ours_says_so_in_its_caption(agent_run):
    paths = {path.stem: path for path in collect_and_draw(agent_run)}
    assert list(paths) == list(plots.FIGURES)
    captions = {stem: Image.open(path).text["Description"] for stem, path in paths.items()}
    assert "what neutral tokens do" in captions["S1"] and "learned nothing" in captions["S2"]
    assert "this project's definition" in captions["S1"] and "rendered corpora" in captions["V1"]


def test_the_upper_bound_has_a_row_for_each_run_and_the_plain_query_beside_it(agent_run):
    numbers = results.collect(agent_run)
    series = results.load_collected(agent_run)[1]
    _, held = plots.soft_token_bound(numbers, series, ["didemo"]).axes
    labels = [label.get_text() for label in held.get_yticklabels()]
    assert labels == ["zero, N 8, 100 queries", "scaled, N 8, 100 queries, hard"]
    dots = [line.get_xdata()[0] for line in held.lines if line.get_marker() == "o"]
    assert dots == [numbers.at[f"L1/didemo/{name}/vr@1", "value"] for name in ("held-zero-n8-r100",) * 2]


def test_a_system_stands_above_what_the_first_search_found_in_each_gallery(agent_run):
    axes = plots.gallery_sizes(results.collect(agent_run), {}, ["didemo"]).axes[0]
    drawn = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn[plots.GROWN["vsr1"][0]] == [(30.0, 30.0), (50.0, 40.0), (70.0, 50.0)]
    assert drawn[plots.GROWN["hqr-trained"][0]] == [], "not measured: no point, and none at 0"


def test_systems_at_equal_looks_stand_over_seeds_where_they_were_run_and_those_without_a_number_nowhere(
    agent_run,
):
    seeds = {"R4/didemo/skip/vcmr@0.5_t3": results.Estimate(44.0, 9, (40.0, 48.0), (1, 42))}
    results.record(agent_run, "didemo", "seeds", seeds)
    (axes,) = plots.equal_looks(results.collect(agent_run), {}, ["didemo"]).axes
    labels = ["the loop, no video twice", "query as typed", "best fixed wording"]
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [44.0, 30.0, 30.0]
    assert [dot.get_color() for dot in dots] == [plots.BLUE, plots.BLACK, plots.BLACK]


def test_a_refinement_without_a_number_has_no_line(agent_run):
    numbers = results.collect(agent_run)
    axes = plots.refinements(numbers, {}, ["charades"]).axes[0]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_label() == "after"
    }
    rows = list(plots.REFINEMENTS)
    assert points == {
        (30.0, rows.index("walkdown")),
        (31.0, rows.index("sqr-untrained")),
    }  # hqr-seen: no point at 0


def test_bars_show_floors_of_zero_and_leave_gaps_for_what_is_missing(agent_run):
    verdicts, spans = plots.known_video(results.collect(agent_run), {}, list(agent_run.datasets)).axes
    heights = [sorted(bar.get_height() for bar in axes.patches) for axes in (verdicts, spans)]
    assert heights[0] == [66.0, 66.0, 67.0, 67.0, 68.0, 68.0]  # no half with wrong videos
    assert heights[1] == [0.0] * 3 + [41.0] * 3  # no random span


def test_a_stage_stands_on_its_panel_only_where_it_was_measured(agent_run):
    numbers = results.collect(agent_run)
    series = results.load_collected(agent_run)[1]
    marks = [
        line
        for line in plots.verdict_curves(numbers, series, ["didemo"]).axes[0].lines
        if line.get_marker() == "D"
    ]
    assert [(*mark.get_xdata(), *mark.get_ydata()) for mark in marks] == [(30.0, 30.0)]
    said = [
        [line.get_label() for line in axes.lines if line.get_marker() in "osD^"]
        for axes in plots.trace_accuracy(numbers, series, ["didemo"]).axes
    ]
    assert said == [["stage 1"], ["both stages"]]


def test_the_sweep_puts_rank_one_on_top(agent_run):
    results.collect(agent_run)
    series = results.load_collected(agent_run)[1]
    ranks = plots.prefix_sweep(None, series, ["didemo"]).axes[0]
    assert ranks.get_ylim()[0] > ranks.get_ylim()[1] and len(ranks.lines) == len(plots.HEADS)


def test_no_curve_leaves_its_panel():
    """On the committed numbers: data sets whose values are higher than those of the first one."""
    mini = config.load("mini")
    numbers = results.load(mini)
    for draw in (plots.soft_tokens, plots.turn_counts):
        for axes in draw(numbers, {}, mini.datasets).axes:
            low, high = axes.get_ylim()
            values = np.concatenate([line.get_ydata() for line in axes.lines])
            assert low <= values.min() and values.max() <= high, axes.get_title()


@pytest.mark.parametrize("name", plots.FIGURES)
def test_no_title_or_label_of_an_axis_runs_into_another(name):
    mini = config.load("mini")
    numbers, series, key = results.load(mini), results.read(mini, "series"), plots.FIGURES[name][0]
    shown = [dataset for dataset in mini.datasets if {key.format(dataset)} & {*numbers.index, *series}]
    figure = plots._render(name, numbers, series, shown)
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for (one, box), (other, beside) in itertools.combinations(boxes, 2):
        assert not box.overlaps(beside), f"{one} and {other}"


def test_sheets_and_figures_of_data_sets_that_were_not_run_stay(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    results.record(run, "didemo", "part", {"H1/didemo/zs/vr@1": results.Estimate(1.0)})
    folder = run.results() / "figures"
    for name in ("D1-charades", "D1-didemo", "H2"):
        plots.save(plots.Figure(), folder, name, "of an earlier run")
    results.publish(run)
    plots.publish(run)
    canvas.copy_sheets(run)
    assert sorted(path.stem for path in folder.glob("*.png")) == ["D1-charades", "H1", "H2"]


def test_curves_show_what_is_measured_and_the_last_panel_what_the_paper_shows(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    numbers = {f"F4/didemo/vsr1/d{d}": Estimate(10.0 * d, 9, (d, 11 * d)) for d in range(9) if d != 4}
    results.record(run, "didemo", "07_tokens", numbers)
    figure = plots.soft_tokens(results.collect(run), {}, ["didemo"])
    measured, paper = (axes.lines[0].get_xydata().tolist() for axes in figure.axes)
    assert measured == [[d, 10.0 * d] for d in range(9) if d != 4]  # a gap is no zero
    published = [results.published()[f"F4/mean/vsr1/d{d}"] for d in range(9)]
    assert paper == [[d, value] for d, value in enumerate(published)]
    assert len(figure.axes[1].lines[1].get_xydata()) == 0  # the paper has no such line


def test_every_curve_of_a_training_run_is_one_that_the_notebooks_record():
    recorded = json.loads((ROOT / "results" / "mini" / "series.json").read_text())
    for table, panels in (("E1", plots.STAGE_1), ("E2", plots.STAGE_2)):
        names = {f"{table}/charades/{name}" for curves in panels.values() for name in curves}
        assert names <= recorded.keys() and all(recorded[name] for name in names)


def test_a_difference_is_filled_where_its_interval_leaves_0_out_and_published_ones_stand_apart():
    here = {"a": results.Estimate(3.0, 9, (1.0, 5.0)), "b": results.Estimate(1.0, 9, (-1.0, 3.0))}
    figure = plots.differences([{"here": here | {"c": results.Estimate(None)}, "the paper": {"a": 2.0}}])
    measured, paper = figure.axes
    dots = [line for line in measured.lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() for dot in dots] == [plots.BLACK, "white"]
    assert [line.get_marker() for line in paper.lines][1:] == ["s"] and paper.get_ylim() == (2.5, -0.5)
