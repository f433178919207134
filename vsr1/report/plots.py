"""Draw the figures that numbers.json and series.json decide: a panel per data set, intervals, the paper's values.

Figures are matplotlib objects without pyplot, so no state outlives a call. `save` puts the caption inside the file,
where the report finds it. Colours are Okabe and Ito's, and no colour carries a meaning alone.
"""

import functools
import io
import math
import os
import re
import shutil
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vsr1.config import Profile
from vsr1.mini.world import ATTRIBUTES
from vsr1.report import results

BLACK, ORANGE, SKY, BLUE, RED, GREY = "#000000 #e69f00 #56b4e9 #0072b2 #d55e00 #8a8a8a".split()
# GREEN is right or true, RED (vermillion) wrong or false, DARK what was named, BLUE is SQR, GREY is HQR or chance.
GREEN, DARK = "#00805c #333333".split()
SHADES = "#08306b #08519c #2171b5 #4292c6 #6baed6 #8fc1e0 #b2d2e8 #cfe1f2".split()
DRAWINGS = Path(__file__).parent / "drawings"
WIDTH = 6.9  # inches: on a phone at 65 pixels each, letters of 11 points are 10 pixels high
KINDS = ("png", "svg")  # of what is published
REDRAW_SECONDS = 3.0  # of a curve in a notebook, at least
RANK_1 = "right video on rank 1, %"


def style():
    """Return the house style, as a context or a decorator: what is drawn and saved inside looks alike."""
    return matplotlib.rc_context(
        {
            **{"font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelsize": 10},
            **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
            **{"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False},
            **{"xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "legend.fontsize": 9.5},
            **{"figure.dpi": 150, "savefig.dpi": "figure"},
            **{"svg.hashsalt": "vsr1", "figure.facecolor": "white"},
        }
    )


@style()
def save(figure: Figure, folder: Path, name: str, caption: str, kinds=("png",)) -> Path:
    """Save a figure with its caption inside and return the path of its png; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        dateless = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{name}.{kind}", metadata={"Description": caption, **dateless})
        figure.set_layout_engine("none")  # the first drawing has placed everything
    return folder / f"{name}.png"


def save_png(picture: Image.Image, path: Path, caption: str) -> Path:
    """Save a picture with its caption inside, as `save` does, and return its path."""
    info = PngInfo()
    info.add_text("Description", caption)
    picture.save(path, pnginfo=info, optimize=True)
    return path


def publish(profile: Profile) -> list[Path]:
    """Draw every figure of `FIGURES` over the data sets whose data exist into results/<profile>/figures/."""
    numbers, series, written = results.load(profile), results.read(profile, "series"), []
    recorded = set(numbers[numbers.measured.astype(bool)].index) | series.keys()
    label = f"Profile {profile.name}{', rendered corpora and mini models' if profile.world else ''}."
    for name, (needed, _) in FIGURES.items():
        datasets = [dataset for dataset in profile.datasets if needed.format(dataset) in recorded]
        caption = f"{results.items()[name]['caption']} {label}"
        if datasets:
            figure = _render(name, numbers, series, datasets)
            written.append(save(figure, profile.results() / "figures", name, caption, KINDS))
        else:
            print(f"left out: figure {name}, of which this run has no data ({needed.format('<data set>')})")
            results.remove_figures(profile, profile.results() / "figures", [name])
    return written


def publish_drawings(profile: Profile) -> list[Path]:
    """Copy the drawings of the method (F2, F3, A1) to results/<profile>/figures/, captions inside.

    drawings/*.svg are edited by hand; *.png are the same files as chromium shows them, 1350 pixels wide. They hold no
    number of a run: its N and T stand in the captions. A test compares their words with the prompts that are run.
    """
    folder, written = profile.results() / "figures", []
    folder.mkdir(parents=True, exist_ok=True)
    sizes = f"N = {profile.n_soft} soft tokens, T = {profile.headline_turns} turns. Profile {profile.name}."
    for drawing in sorted(DRAWINGS.glob("*.svg")):
        caption = results.items()[drawing.stem]["caption"].format(turns=profile.headline_turns)
        written.append(Path(shutil.copyfile(drawing, folder / drawing.name)))
        with Image.open(drawing.with_suffix(".png")) as picture:
            written.append(save_png(picture, folder / f"{drawing.stem}.png", f"{caption} {sizes}"))
    return written


def draw(profile: Profile, name: str, datasets: list[str], series: dict | None = None) -> Figure:
    """Draw one figure of `FIGURES` for some data sets from what was collected so far.

    series   those of a figure that shows no numbers, where they are not collected yet
    """
    numbers, collected = (None, series) if series is not None else results.load_collected(profile)
    return _render(name, numbers, collected, datasets)


@style()
def _render(name, numbers, series, datasets):
    return FIGURES[name][1](numbers, series, datasets)


# --- Parts of a figure


def _facets(datasets, rows=1, height=3.3, **options):
    """Return a figure with a column per data set under its title, and its axes (rows, columns)."""
    figure = Figure(figsize=(max(4.5, WIDTH * len(datasets) / 3), height), layout="constrained")
    panels = figure.subplots(rows, len(datasets), squeeze=False, **{"sharey": "row"} | options)
    for axes, title in zip(panels[0], datasets, strict=True):
        axes.set_title(title)
    return figure, panels


def _legend(figure, handles, columns):
    """Put one legend below all panels: handles, or axes whose labelled lines count once each."""
    if not isinstance(handles, list):
        labelled = dict(zip(*reversed(handles.get_legend_handles_labels()), strict=True))
        handles = list(labelled.values())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _bars(axes, numbers, datasets, table, bars):
    """Draw a group of bars per data set with interval and value on top; a missing number leaves a gap.

    bars   {(system, metric): (label, colour, hatch)}
    """
    width, rotation = 0.72 / len(bars), 90 if len(bars) > 4 else 0
    for number, (key, (label, colour, hatch)) in enumerate(bars.items()):
        shift = width * (number - (len(bars) - 1) / 2)
        rows = {x: results.row(numbers, table, dataset, *key) for x, dataset in enumerate(datasets)}
        rows = {x + shift: entry for x, entry in rows.items() if entry is not None}
        heights = [entry.value for entry in rows.values()]
        axes.bar(list(rows), heights, 0.94 * width, label=label, color=colour, hatch=hatch, edgecolor="white")
        for x, entry in rows.items():
            low, high = (entry.value, entry.value) if entry.low is None else (entry.low, entry.high)
            axes.plot((x, x), (low, high), color=BLACK, linewidth=1.2)
            text = {"textcoords": "offset points", "ha": "center", "size": 8, "rotation": rotation}
            axes.annotate(results.digits(entry.value), (x, high), (0, 3), **text)
    axes.set_xticks(range(len(datasets)), datasets)
    axes.set_xlim(-0.55, max(1, len(datasets) - 0.45))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(3, len(bars)))


LOOPS = {"vsr1": "the loop", "vsr1-all": "the loop, all soft tokens kept"}
LOOPS |= {"skip": "the loop, no video twice", "vsr1-first": "the same, soft tokens first"}
COLOURS = dict.fromkeys(("sqr", "sqr-untrained", *LOOPS), BLUE)
COLOURS |= dict.fromkeys([f"hqr-{kind}" for kind in ("blind", "seen", "reasoned", "trained")], GREY)


def _dots(axes, numbers, table, dataset, systems, metric, before=None, shift=0.0, colour=None, **props):
    """Draw a row per system, the first on top: its value with interval, and hollow what it was before.

    systems   {system: label}
    before    metric of the value before
    colour    of all of them; None: that of COLOURS, else black
    """
    for row, system in enumerate(systems):
        row_colour = colour or COLOURS.get(system, BLACK)
        entry, y = results.best_row(numbers, table, dataset, system, metric), row + shift
        if entry is None:
            continue
        if entry.low is not None:
            axes.plot((entry.low, entry.high), (y, y), color=BLACK, linewidth=1)
        if before:
            start = results.row(numbers, table, dataset, system, before).value
            axes.plot((start, entry.value), (y, y), color=row_colour, linewidth=3, alpha=0.4)
            axes.plot(start, y, "o", color=row_colour, fillstyle="none", label="before")
        axes.plot(entry.value, y, **{"marker": "o", "linestyle": "", "color": row_colour} | props)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_yticks(range(len(systems)), systems.values())


def _curve(axes, numbers, table, dataset, system, metrics, **props):
    """Draw {x: metric} of one system with its intervals as a band; for "mean" what the paper shows there."""
    kind = "paper" if dataset == "mean" else "value"
    rows = {x: f"{table}/{dataset}/{system}/{metric}" for x, metric in metrics.items()}
    part = numbers.reindex(rows.values()).set_axis(list(rows)).dropna(subset=kind)
    axes.plot(part.index, part[kind].astype(float), **{"markersize": 5} | props)
    if kind == "value" and len(part) and part.low.notna().all():
        low, high = part.low.astype(float), part.high.astype(float)
        axes.fill_between(part.index, low, high, color=props["color"], alpha=0.12, linewidth=0)


def _series(axes, points, line="-", **props):
    """Draw a series of [x, y] if there is one."""
    if points:
        axes.plot(*np.array(points, dtype=float).T, line, **{"markersize": 4} | props)


# --- Differences between systems, in notebooks


@style()
def differences(rows: list[dict[str, dict]], xlabel: str = "points") -> Figure:
    """Draw differences and their 95 % intervals: a filled dot where the interval leaves 0 out, a hollow one elsewhere.

    rows   of panels {title: {label: Estimate, or a published value}}. Panels of a row share their labels. Panels of a
           column share their axis, so what was measured and what is published stand in columns of their own.
    """
    lengths = [len({label for values in panels.values() for label in values}) for panels in rows]
    size, shape = (WIDTH, 0.5 + sum(0.45 + 0.27 * n for n in lengths)), (len(rows), len(rows[0]))
    figure = Figure(figsize=size, layout="constrained")
    options = {"sharex": "col", "sharey": "row", "height_ratios": lengths, "squeeze": False}
    grid = figure.subplots(*shape, **options)
    for line, panels in zip(grid, rows, strict=True):
        labels = list({label: None for values in panels.values() for label in values})
        for axes, (title, values) in zip(line, panels.items(), strict=True):
            axes.axvline(0, color=GREY, linewidth=1)
            for label, number in values.items():
                _difference(axes, labels.index(label), number)
            axes.set_title(title)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    return figure


def _difference(axes, y, number):
    """Draw one difference; a published value has no interval, and a missing one no dot."""
    if not hasattr(number, "ci"):
        axes.plot(number, y, "s", color=ORANGE)
    elif number.value is not None:
        low, high = number.ci or (number.value, number.value)
        axes.plot((low, high), (y, y), color=BLACK, linewidth=1)
        fill = BLACK if low > 0 or high < 0 else "white"
        axes.plot(number.value, y, "o", color=BLACK, markerfacecolor=fill)


# --- Retrieval: one search


def headroom(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw bars for all queries and for those whose first search failed: what is reached, what could be."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    everyone, failures = figure.subplots(2, 1, sharey=True)
    bounds = {
        "words": ("best of 60 wordings (oracle)", GREY, "xx"),
        "probe": ("attribute probe", ORANGE, ".."),
    }
    bars = {("zs", "vr@1"): ("query as it is", BLACK, "")}
    bars |= {(name, "vr@1"): bar for name, bar in bounds.items()}
    _bars(everyone, numbers, datasets, "H1", bars)
    bars = {("walkdown", "vr@1_failed"): ("rank 2", SKY, "///")}
    bars |= {(name, "vr@1_failed"): bar for name, bar in bounds.items()}
    _bars(failures, numbers, datasets, "H1", bars)
    everyone.set(title="all queries", ylabel="right video, %")
    failures.set(title="queries whose first search failed", ylabel="right video, %")
    return figure


def retrieval_curves(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw R@k against k, chance below, the paper's four points as hollow markers."""
    figure, (panels,) = _facets(datasets)
    for axes, dataset in zip(panels, datasets, strict=True):
        ks, recall = np.array(series[f"H2/{dataset}/zs/vr@k"]).T
        videos = results.row(numbers, "D1", dataset, "test", "videos").value
        axes.plot(ks, recall, color=BLACK, label="measured")
        axes.plot(ks, np.minimum(100, 100 * ks / videos), color=GREY, linestyle=":", label="chance")
        points = {k: results.published().get(f"T1/{dataset}/zs/vr@{k}") for k in (1, 5, 10, 100)}
        hollow = {"color": ORANGE, "fillstyle": "none", "label": "paper, real video"}
        axes.plot(list(points), list(points.values()), "o", **hollow)
        axes.set(xscale="log", xlabel="k", ylim=(0, 102), title=f"{dataset}, {videos} videos")
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    panels[0].set_ylabel("R@k, %")
    return _legend(figure, panels[0], 3)


def arena(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw R@1 against the size of the gallery: a line a text side, and bounds of the one that is searched."""
    figure, (panels,) = _facets(datasets)
    sides = {"text-small": (BLACK, "true captions"), "text-noise-10": (SKY, "10 % of colours wrong")}
    sides |= {"text-noise-30": (ORANGE, "30 %"), "text-noise-70": (RED, "70 %")}
    bounds = {"words_r1": ("--", "best of 60 wordings (oracle)"), "probe_r1": (":", "attribute probe")}
    for axes, dataset in zip(panels, datasets, strict=True):
        for side, (colour, label) in sides.items():
            _series(axes, series.get(f"H3/{dataset}/{side}/r1"), "o-", color=colour, label=label)
        for key, (line, label) in bounds.items():
            _series(axes, series[f"H3/{dataset}/text-small/{key}"], line, color=GREY, label=label)
        videos = results.row(numbers, "D1", dataset, "test", "videos").value
        axes.axvline(videos, color=BLACK, linewidth=0.6)
        axes.set(xscale="log", xlabel="videos", ylim=(0, 102), title=dataset)
        sizes = [size for size, _ in series[f"H3/{dataset}/text-small/r1"]]
        axes.set_xticks(sizes, sizes, rotation=45)
        axes.minorticks_off()
    panels[0].set_ylabel("R@1, %")
    return _legend(figure, panels[0], 2)


# --- A given video: verification and grounding


def known_video(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw bars of verdicts by the video that is given, and of grounding in the right one beside two floors."""
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    verdicts, spans = figure.subplots(2, 1)
    bars = {("zs", "verdict_right"): ("right video shown", GREEN, "")}
    bars |= {("zs", "verdict_wrong"): ("wrong video", RED, ".."), ("zs", "verdict"): ("both", GREY, "///")}
    _bars(verdicts, numbers, datasets, "V1", bars)
    verdicts.axhline(50, color=GREY, linestyle=":")
    bars = {("zs", "grounding@0.5"): ("base model", DARK, "")}
    bars |= {("wholevideo", "grounding@0.5"): ("whole video", ORANGE, "..")}
    bars |= {("random", "grounding@0.5"): ("random span", "#cccccc", "///")}
    _bars(spans, numbers, datasets, "V1", bars)
    verdicts.set(title="verdicts; dotted: always the same verdict", ylabel="right verdict, %", ylim=(0, 108))
    spans.set(title="spans named for the right video", ylabel="R@1 at IoU 0.5, %")
    return figure


def overlaps(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw a histogram of overlaps with the right moment, that of whole videos as a line."""
    figure, (panels,) = _facets(datasets)
    for axes, dataset in zip(panels, datasets, strict=True):
        left, percent = np.array(series[f"V2/{dataset}/zs/iou"]).T
        whole = np.array(series[f"V2/{dataset}/wholevideo/iou"])[:, 1]
        axes.bar(left[1:] + 0.05, percent[1:], 0.092, color=DARK, label="base model")
        axes.bar(left[0] + 0.05, percent[0], 0.092, color=GREY, hatch="///", edgecolor="white")
        axes.step([*left, 1.0], [*whole, whole[-1]], where="post", color=ORANGE, label="whole video")
        axes.set_xlabel("IoU (grey: exactly 0)")
        axes.set_xticks([-0.05, 0.3, 0.5, 0.7, 1], ["0", ".3", ".5", ".7", "1"])
    panels[0].set_ylabel("queries, %")
    return _legend(figure, panels[0], 2)


# --- Reasons and verdicts, by stage

STAGES = {"zs": ("base model", GREY, "o"), "ft": ("FT", ORANGE, "^"), "sft": ("stage 1", SKY, "s")}
STAGES |= {"vsr1": ("both stages", BLUE, "D")}


def trace_accuracy(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw by attribute what replies say: true words for what is shown above, false "yes" below; a mark per stage."""
    figure, panels = _facets(datasets, rows=2, height=5.2, sharex=True)
    metrics = {"shown": "shown word true, %", "false_yes": "false yes, %"}
    for row, (metric, y_label) in zip(panels, metrics.items(), strict=True):
        for axes, dataset in zip(row, datasets, strict=True):
            for shift, (system, (label, colour, marker)) in enumerate(STAGES.items()):
                for n, attribute in enumerate(ATTRIBUTES):
                    entry = results.row(numbers, "V4", dataset, system, f"{metric}_{attribute}")
                    if entry is not None:
                        x = n + 0.18 * (shift - 1.5)
                        axes.plot((x, x), (entry.low, entry.high), color=colour, linewidth=1)
                        axes.plot(x, entry.value, marker, color=colour, markersize=4, label=label)
            axes.set(ylim=(-3, 103))
        row[0].set_ylabel(y_label)
    for axes in panels[-1]:
        axes.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES, rotation=45, ha="right")
    return _legend(figure, panels[0][0], len(STAGES))


def verdict_curves(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw the ROC of first verdicts by stage, with a mark at the verdicts that the stage gives."""
    figure, (panels,) = _facets(datasets, height=3.6)
    for axes, dataset in zip(panels, datasets, strict=True):
        axes.plot((0, 100), (0, 100), ":", color=GREY)
        for system, (label, colour, marker) in STAGES.items():
            _series(axes, series.get(f"V5/{dataset}/{system}/roc"), color=colour)
            wrong, right = (
                results.row(numbers, "V5", dataset, system, f"accept_{kind}") for kind in ("wrong", "right")
            )
            if wrong is not None and right is not None:
                axes.plot(wrong.value, right.value, marker, color=colour, label=label)
        axes.set(xlabel="wrong videos accepted, %")
    panels[0].set_ylabel("right videos accepted, %")
    return _legend(figure, panels[0], len(STAGES))


# --- Refinements

REFINEMENTS = {"walkdown": "rank fallback (no refinement)", "sqr": "SQR, trained"}
REFINEMENTS |= {"sqr-untrained": "SQR, untrained heads"}
REFINEMENTS |= {f"hqr-{kind}": f"HQR {kind} (ours), prompted" for kind in ("blind", "seen", "reasoned")}


def refinements(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw a row per refinement: R@1 before (hollow) and after (with its interval)."""
    figure, (panels,) = _facets(datasets, height=2.9, sharex=True, sharey=True)
    for axes, dataset in zip(panels, datasets, strict=True):
        _dots(axes, numbers, "S1", dataset, REFINEMENTS, "vr@1", "vr@1_orig", label="after")
        axes.set_xlabel("R@1, %")
    return _legend(figure, panels[0], 2)


INTERVENTIONS = {
    "sqr": ("rejected video", BLUE, ""),
    "sqr-other-video": ("random wrong video", SKY, ""),
    "sqr-right-video": ("right video", SKY, "///"),
    "sqr-no-video": ("no video", SHADES[6], ""),
    "sqr-no-reply": ("no reply", SHADES[6], "///"),
    "sqr-query-alone": ("neither", SHADES[6], ".."),
    "sqr-other-reply": ("another query's reply", ORANGE, ""),
    "sqr-asked-corrupted": ("other colours asked for", ORANGE, "///"),
}


def interventions(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw bars of R@1 after one refinement, by what the policy has before it."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    _bars(axes, numbers, datasets, "P2", {(system, "vr@1"): bar for system, bar in INTERVENTIONS.items()})
    axes.set_ylabel(RANK_1)
    return figure


EQUAL_LOOKS = {
    "hqr-trained": "the loop in trained words",
    **LOOPS,
    "rocchio-ft": "Rocchio",
    "walkdown-ft": "query as typed",
    "hqr-fixed-ft": "best fixed wording",
    "adapter-static-ft": "same soft tokens for all",
    "adapter-soft-ft": "soft tokens, no look",
    "adapter-vec-ft": "linear map of its vector",
    "engine-tuned-ft": "engine's text side tuned",
    "rerank-3-ft": "clearest verdict of 3",
    "rerank-10-ft": "clearest verdict of 10",
}


def equal_looks(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw VCMR at three videos, a row a system: loops, then FT down the ranking of a query that never saw a video."""
    rows = {
        system: label
        for system, label in EQUAL_LOOKS.items()
        if any(results.best_row(numbers, "P1", name, system, "vcmr@0.5_t3") is not None for name in datasets)
    }
    figure, (panels,) = _facets(datasets, height=4.4, sharex=True, sharey=True)
    for axes, dataset in zip(panels, datasets, strict=True):
        _dots(axes, numbers, "P1", dataset, rows, "vcmr@0.5_t3")
    panels[len(datasets) // 2].set_xlabel("VCMR at IoU 0.5, %")
    handles = [Line2D([], [], color=BLUE, marker="o", linestyle="", label="soft tokens, a loop")]
    handles += [Line2D([], [], color=GREY, marker="o", linestyle="", label="words, a loop")]
    handles += [Line2D([], [], color=BLACK, marker="o", linestyle="", label="no loop: FT down one ranking")]
    return _legend(figure, handles, 3)


GROWN = {"vsr1-walkdown": ("query as typed, rank fallback", BLACK, "s--")}
GROWN |= {"adapter-soft-vsr1": ("soft tokens without a loop, rank fallback", ORANGE, "^-")}
GROWN |= {"hqr-trained": ("rewriting in words, trained, the loop", GREY, "D-")}
GROWN |= {"vsr1": ("VideoSearch-R1, the loop", BLUE, "o-")}
GROWN |= {"vsr1-all": ("the loop, all soft tokens kept", SKY, "v-")}


def gallery_sizes(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw VCMR against R@1 of the first search, a curve a system, a point a size of the gallery."""
    figure, (panels,) = _facets(datasets, height=3.6)
    for axes, dataset in zip(panels, datasets, strict=True):
        levels = results.layouts()["P3"]["metrics"]
        first = {level: results.row(numbers, "P3", dataset, "typed", level) for level in levels}
        metrics = {entry.value: level for level, entry in first.items() if entry is not None}
        for system, (label, colour, line) in GROWN.items():
            props = {"label": label, "color": colour, "marker": line[0], "linestyle": line[1:]}
            _curve(axes, numbers, "P3", dataset, system, metrics, **props)
        axes.set_xlabel("R@1 of the first search, %")
    panels[0].set_ylabel("VCMR at IoU 0.5, %")
    return _legend(figure, panels[0], 2)


def engines(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw R@1 after one refinement of failed queries: a row per method, a mark per engine."""
    figure, (panels,) = _facets(datasets, height=3.9, sharex=True, sharey=True)
    systems = {"sqr": "SQR"}
    for kind in ("blind", "seen", "reasoned"):
        systems |= {f"hqr-{kind}": f"HQR {kind}", f"hqr-{kind}-append": f"HQR {kind}, appended"}
    for axes, dataset in zip(panels, datasets, strict=True):
        for size, shift, colour, marker in (("small", -0.18, BLUE, "o"), ("large", 0.18, ORANGE, "s")):
            props = {"shift": shift, "colour": colour, "marker": marker, "label": f"{size} engine"}
            _dots(axes, numbers, "A2", dataset, systems, f"vr@1_{size}", **props)
        axes.text(1, 0.18, "large: not trained for it", va="center", size=7, color=GREY)
        axes.set(xlabel="R@1 after, %", xlim=(0, None))
    return _legend(figure, panels[0], 2)


SWEPT = {"right": ("right video", GREEN, "o"), "shown": ("video just rejected", RED, "s")}
SWEPT |= {"best": ("best video", GREY, "^")}
HEADS = {"trained": ("trained heads", "-"), "untrained": ("untrained heads", "--")}


def prefix_sweep(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw one query as 0 to N soft tokens are added: rank of the right video above, cosines below."""
    figure, panels = _facets(datasets, rows=2, height=5.2, sharex=True, sharey=False)
    for ranks, cosines, dataset in zip(*panels, datasets, strict=True):
        for heads, (_, line) in HEADS.items():
            prefix = f"S2/{dataset}/{heads}"
            _series(ranks, series[f"{prefix}/rank"], line, marker="o", color=GREEN)
            for kind, (_, colour, marker) in SWEPT.items():
                _series(cosines, series[f"{prefix}/{kind}"], line, marker=marker, color=colour)
        ranks.set_title(f"{dataset}: one query")
        ranks.yaxis.set_major_locator(MaxNLocator(integer=True))
        ranks.set_ylim(ranks.get_ylim()[1] + 1, 0.5)  # best on top, and there is no rank 0
        cosines.set_xlabel("soft tokens in the query")
    panels[0][0].set_ylabel("rank of right video")
    panels[1][0].set_ylabel("cosine with the query")
    lines = [Line2D([], [], color=BLACK, linestyle=line, label=label) for label, line in HEADS.values()]
    for label, colour, marker in SWEPT.values():
        lines.append(Line2D([], [], color=colour, marker=marker, label=label))
    return _legend(figure, lines, min(3, len(datasets) + 1))


def soft_tokens(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw R@1 against the number of soft tokens, the paper's curve in a panel of its own."""
    figure, panels = _with_paper(datasets)
    of_run = numbers[(numbers.table == "F4") & (numbers.system == "vsr1")]
    last = max(int(metric.removeprefix("d")) for metric in of_run.metric)
    metrics = {depth: f"d{depth}" for depth in range(last + 1)}
    for dataset, axes in panels.items():
        props = {"marker": "o", "color": BLUE, "label": "all queries"}
        _curve(axes, numbers, "F4", dataset, "vsr1", metrics, **props)
        props = {"marker": "s", "color": SKY, "label": "first search failed, refined", "linestyle": "--"}
        _curve(axes, numbers, "F4", dataset, "vsr1-failed", metrics, **props)
        axes.axvspan(last - 0.5, last + 0.5, color=GREY, alpha=0.15, linewidth=0)
        axes.set(xlabel="soft tokens in the query", xticks=list(metrics))
    for dataset in datasets:
        panels[dataset].set_ylim(0, 102)
    panels[datasets[0]].set_ylabel(RANK_1)
    return _legend(figure, panels[datasets[0]], 2)


def turn_counts(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw VCMR against the most turns, the paper's in a panel of its own; dashed: no video is shown again."""
    figure, panels = _with_paper(datasets)
    of_run = numbers[(numbers.table == "F5") & (numbers.dataset == datasets[0]) & (numbers.system == "vsr1")]
    turns = sorted({int(metric.rpartition("_t")[2]) for metric in of_run.metric})
    lines = {"0.3": (SHADES[1], "o"), "0.5": (SHADES[3], "s"), "0.7": (SHADES[5], "^")}
    for dataset, axes in panels.items():
        for iou, (colour, marker) in lines.items():
            metrics = {turn: f"vcmr@{iou}_t{turn}" for turn in turns}
            props = {"marker": marker, "color": colour, "fillstyle": "none"}
            _curve(axes, numbers, "F5", dataset, "vsr1", metrics, label=f"IoU {iou}", **props)
            props |= {"linestyle": "--", "label": f"{iou}, no video twice"}
            _curve(axes, numbers, "F5", dataset, "skip", metrics, **props)
        axes.set(xlabel="turns at most", xticks=turns)
    top = max(panels[dataset].get_ylim()[1] for dataset in datasets)
    for dataset in datasets:
        panels[dataset].set_ylim(0, top)
    panels["mean"].set_ylim(bottom=0)
    panels[datasets[0]].set_ylabel("VCMR R@1, %")
    return _legend(figure, panels[datasets[0]], 3)


def _with_paper(datasets):
    """Return a figure and its panels two by two, {data set: axes}; "mean" is that of the paper's figure.

    It has an axis of its own: on ours its steps would vanish.
    """
    titles = {dataset: dataset for dataset in datasets} | {"mean": "paper (real video)"}
    rows = math.ceil(len(titles) / 2)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, 2).flatten()
    for spare in panels[len(titles) :]:
        spare.remove()
    panels = dict(zip(titles, panels, strict=False))
    for dataset, title in titles.items():
        panels[dataset].set_title(title)
    return figure, panels


# --- Training

# Per figure rows of panels: {y label: {system/metric: (label, colour, line)}}
STAGE_1 = {
    "loss (nats)": {"sft/loss": ("all", BLACK, "-"), "ft/loss": ("FT: replies only", GREY, "--")},
    "InfoNCE (nats)": {"sft/info_nce": ("search", BLUE, "-")},
}
STAGE_2 = {
    "reward": {"vsr1/reward": ("sampled", BLUE, "-"), "vsr1/held": ("held out", BLACK, "o--")},
    "parts of it": {
        "vsr1/verify": ("verdict (-1 to 1)", ORANGE, "-"),
        **{"vsr1/time": ("overlap", DARK, "--"), "vsr1/retrieve": ("search", SKY, ":")},
    },
    "KL to stage 1": {"vsr1/kl": ("KL", GREY, "-")},
}


def training_curves(
    table: str, panels: dict, numbers: pd.DataFrame, series: dict, datasets: list[str]
) -> Figure:
    """Draw what a training run logged, step by step: a row of panels per y label."""
    figure, rows = _facets(datasets, rows=len(panels), height=0.7 + 1.9 * len(panels), sharex="col")
    for row, (label, curves) in zip(rows, panels.items(), strict=True):
        for axes, dataset in zip(row, datasets, strict=True):
            for name, (curve, colour, line) in curves.items():
                assert any(f"{table}/{other}/{name}" in series for other in datasets), (
                    f"{table}: no curve {name}"
                )
                _series(axes, series.get(f"{table}/{dataset}/{name}"), line, color=colour, label=curve)
        row[0].set_ylabel(label)
        row[0].legend(fontsize=8)
    for axes in rows[-1]:
        axes.set_xlabel("step")
    return figure


def live(keys):
    """Return a `watch` for a training run whose curves redraw in JupyterLab; None elsewhere, where nobody watches."""
    if "JPY_SESSION_NAME" not in os.environ:  # set by the server for its kernels; papermill's have none
        return None
    from IPython.display import Image, display

    handle, last_drawn = display(display_id=True), [0.0]

    def watch(lines):
        if time.monotonic() - last_drawn[0] >= REDRAW_SECONDS:
            last_drawn[0] = time.monotonic()
            handle.update(Image(_live_png(lines, keys)))

    return watch


@style()
def _live_png(lines, keys):
    figure = Figure(figsize=(3 * len(keys), 2.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        _series(axes, [(line["step"], line[key]) for line in lines if line[key] is not None])
        axes.set(title=key, xlabel="step")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


# --- The upper bound of soft tokens

LAYOUTS = {"raw": ("raw embeddings", BLUE), "b": ("through B, official", DARK)}
LAYOUTS |= {"scaled": ("through B, scaled", ORANGE)}
STARTS = {"": ("random start", "-"), "-zero": ("zero", ":"), "-zero-clipped": ("zero, clipped", "--")}
HEAD_RUN = re.compile(r"held-(?P<init>[a-z]+)-n(?P<n>\d+)-r(?P<rows>\d+)(?P<more>(-[a-z]+)?)")


def soft_token_bound(numbers: pd.DataFrame, series: dict, datasets: list[str]) -> Figure:
    """Draw soft tokens optimised per query by step above; below heads alone on held-out queries, a row per run."""
    figure, panels = _facets(datasets, rows=2, height=6.4)
    systems = numbers[numbers.table == "L1"].system.unique()
    runs = sorted(filter(HEAD_RUN.fullmatch, systems), key=_run_order)
    labels = {name: _run_label(name) for name in runs}
    for free, held, dataset in zip(*panels, datasets, strict=True):
        for layout, (_, colour) in LAYOUTS.items():
            for start, (_, line) in STARTS.items():
                _series(free, series[f"L1/{dataset}/free-{layout}{start}/vr@1"], line, color=colour)
        free.axhline(results.row(numbers, "L1", dataset, "free-plain", "vr@1").value, color=GREY, linewidth=1)
        free.set(xlabel="step of Adam", ylim=(0, 102))
        _dots(held, numbers, "L1", dataset, labels, "vr@1")
        held.axvline(results.row(numbers, "L1", dataset, "held-plain", "vr@1").value, color=GREY, linewidth=1)
    panels[1][len(datasets) // 2].set_xlabel(
        "heads alone, R@1 on held-out queries, %"
    )  # as wide as two panels
    panels[0][0].set_ylabel("free soft tokens, R@1, %")
    lines = [Line2D([], [], color=colour, label=label) for label, colour in LAYOUTS.values()]
    lines += [Line2D([], [], color=BLACK, linestyle=line, label=label) for label, line in STARTS.values()]
    lines += [Line2D([], [], color=GREY, label="query as it is")]
    return _legend(figure, lines, min(3, len(datasets) + 1))


def _run_order(name):
    """Sort key: the other inits, then N, then rows, then what differs in something else."""
    parts = HEAD_RUN.fullmatch(name)
    return parts["init"] == "scaled", parts["more"], int(parts["rows"]), int(parts["n"]), parts["init"]


def _run_label(name):
    """Describe a `HeadRun` in words.

    >>> _run_label("held-scaled-n4-r600-hard")
    'scaled, N 4, 600 queries, hard'
    """
    parts = HEAD_RUN.fullmatch(name)
    return f"{parts['init']}, N {parts['n']}, {parts['rows']} queries" + parts["more"].replace("-", ", ")


FIGURES = {  # figure: (number or series without which a data set is left out, how it is drawn); captions: items.yaml
    "F4": ("F4/{}/vsr1/d0", soft_tokens),
    "F5": ("F5/{}/vsr1/vcmr@0.5_t1", turn_counts),
    "A2": ("A2/{}/sqr/vr@1_small", engines),
    "P1": ("P1/{}/walkdown-ft/vcmr@0.5_t3", equal_looks),
    "P3": ("P3/{}/typed/test", gallery_sizes),
    "H1": ("H1/{}/zs/vr@1", headroom),
    "H2": ("H2/{}/zs/vr@k", retrieval_curves),
    "H3": ("H3/{}/text-small/r1", arena),
    "V1": ("V1/{}/zs/verdict", known_video),
    "V2": ("V2/{}/zs/iou", overlaps),
    "V4": ("V4/{}/vsr1/stated", trace_accuracy),
    "V5": ("V5/{}/vsr1/roc", verdict_curves),
    "E1": ("E1/{}/sft/info_nce", functools.partial(training_curves, "E1", STAGE_1)),
    "E2": ("E2/{}/vsr1/reward", functools.partial(training_curves, "E2", STAGE_2)),
    "S1": ("S1/{}/sqr-untrained/vr@1", refinements),
    "L1": ("L1/{}/free-plain/vr@1", soft_token_bound),
    "P2": ("P2/{}/sqr/vr@1", interventions),
    "S2": ("S2/{}/trained/rank", prefix_sweep),
}
