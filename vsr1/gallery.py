"""Pictures for readers: one figure style, contact sheets of clips, and the figures that numbers.json decides.

Figures are matplotlib objects without pyplot, so no state outlives a call. `save` puts the caption inside the
file, where the report finds it. Colours are Okabe and Ito's, and no colour carries a meaning alone.
"""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vsr1 import results
from vsr1.params import Profile

BLACK, ORANGE, SKY, BLUE, RED, GREY = "#000000 #e69f00 #56b4e9 #0072b2 #d55e00 #8a8a8a".split()


def style():
    """The house style, as a context or a decorator: what is drawn and saved inside looks alike."""
    return matplotlib.rc_context(
        {
            **{"font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9},
            **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
            **{"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False},
            **{"xtick.labelsize": 9, "ytick.labelsize": 9, "figure.dpi": 150, "savefig.dpi": "figure"},
            **{"svg.hashsalt": "vsr1", "figure.facecolor": "white"},
        }
    )


@style()
def save(figure: Figure, folder: Path, name: str, caption: str, kinds=("png", "svg")) -> Path:
    """The png of a figure in `folder`, its caption inside; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        dateless = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{name}.{kind}", metadata={"Description": caption, **dateless})
    return folder / f"{name}.png"


# --- Clips


@dataclass(frozen=True)
class Strip:
    """One row of a contact sheet."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    seen_at: np.ndarray  # (T,) seconds
    caption: str
    span: tuple[float, float] | None = (
        None  # seconds; frames inside are underlined and their times printed bold
    )


def save_sheet(strips: list[Strip], folder: Path, name: str, caption: str) -> Path:
    """The png of a contact sheet; no svg, which would only wrap the same pixels."""
    words = f"{caption}. Underlined frames lie inside the moment."
    return save(contact_sheet(strips), folder, name, words, kinds=("png",))


@style()
def contact_sheet(strips: list[Strip], columns: int = 6) -> Figure:
    """Rows of at most `columns` frames, spread over the clip, times below and the caption above."""
    if not strips:
        figure = Figure(figsize=(4, 0.5))
        figure.text(0.05, 0.4, "nothing to show here")
        return figure
    wrapped = [textwrap.wrap(strip.caption, 23 * columns) or [""] for strip in strips]
    frame_inches = 1.5 * strips[0].frames.shape[1] / strips[0].frames.shape[2]
    heights = [frame_inches + 0.32 + 0.17 * len(lines) for lines in wrapped]
    figure = Figure(figsize=(1.55 * columns, sum(heights)), dpi=100)  # frames at about their own size
    top = 1.0
    for strip, lines, height in zip(strips, wrapped, heights, strict=True):
        share = height / sum(heights)
        figure.text(0.005, top - 0.04 / sum(heights), "\n".join(lines), va="top", size=9, linespacing=1.15)
        bottom = top - share + 0.2 / sum(heights)
        picked = np.unique(np.linspace(0, len(strip.frames) - 1, columns).round().astype(int))
        for column, index in enumerate(picked):
            box = (column / columns + 0.003, bottom, 1 / columns - 0.006, frame_inches / sum(heights))
            _frame(figure.add_axes(box), strip, index)
        top -= share
    return figure


def _frame(axes, strip, index):
    """One frame with its time below; inside the moment the time is bold and the picture underlined."""
    seconds = strip.seen_at[index]
    inside = strip.span is not None and strip.span[0] <= seconds <= strip.span[1]
    axes.imshow(strip.frames[index], interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    weight = "bold" if inside else "normal"
    axes.text(
        0.5, -0.03, f"{seconds:.1f} s", transform=axes.transAxes, ha="center", va="top", size=8, weight=weight
    )
    if inside:
        axes.plot((0, 1), (-0.01, -0.01), transform=axes.transAxes, color=RED, linewidth=3, clip_on=False)


# --- Figures of numbers.json


def figures(profile: Profile, numbers: dict) -> list[Path]:
    """The figures over all data sets, written to results/<profile>/figures/ where their numbers exist."""
    folder = profile.results() / "figures"
    series = json.loads((profile.results() / "series.json").read_text(encoding="utf-8"))
    label = f"Profile {profile.name}{', rendered corpora and mini models' if profile.world else ''}."
    datasets = [d for d in profile.datasets if _value(numbers, f"H1/{d}/zs/vr@1") is not None]
    curved = [d for d in profile.datasets if f"H2/{d}/zs/vr@k" in series]
    written = []
    if datasets:
        words = (
            "Headroom of the first search. Left: R@1 of the query as it is (line: 95 % interval) and of a "
            "linear attribute probe, the ceiling for a refiner that only understands the query. Right: among "
            "queries whose first search failed, what rank 2 would answer and what the probe answers."
        )
        written.append(save(headroom(numbers, datasets), folder, "H1", f"{words} {label}"))
    if curved:
        words = (
            "R@k of the first search; dotted: chance for a gallery of that size. Hollow markers are the "
            "paper's values for its engine on real video."
        )
        written.append(save(retrieval_curves(numbers, series, curved), folder, "H2", f"{words} {label}"))
    return written


def _value(numbers, name):
    """The measured value called `name`, None where there is none."""
    return numbers[name]["value"] if name in numbers and numbers[name]["measured"] else None


@style()
def headroom(numbers: dict, datasets: list[str]) -> Figure:
    """Two panels of bars, all queries and first-search failures: what is reached, what the probe reaches."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    everyone, failures = figure.subplots(1, 2, sharey=True)
    probe = ("attribute probe", ORANGE, "..")
    plain = {"zs": ("query as it is", BLUE, ""), "probe": probe}
    looked_again = {"walkdown": ("rank 2", SKY, "///"), "probe": probe}
    _bars(everyone, numbers, datasets, "vr@1", plain)
    _bars(failures, numbers, datasets, "vr@1_failed", looked_again)
    everyone.set_title("all queries")
    failures.set_title("queries whose first search failed")
    everyone.set_ylabel("right video, %")
    return figure


def _bars(axes, numbers, datasets, metric, systems):
    """A group of bars per data set, a bar per system with its value on top; a missing number leaves a gap."""
    for shift, (system, (label, colour, hatch)) in enumerate(systems.items()):
        names = [f"H1/{dataset}/{system}/{metric}" for dataset in datasets]
        shown = [(x, name) for x, name in enumerate(names) if _value(numbers, name) is not None]
        places = [x + 0.36 * shift - 0.18 for x, _ in shown]
        heights = [_value(numbers, name) for _, name in shown]
        axes.bar(places, heights, 0.34, label=label, color=colour, hatch=hatch, edgecolor="white")
        for place, height, (_, name) in zip(places, heights, shown, strict=True):
            low, high = numbers[name]["ci"] or (height, height)
            axes.plot((place, place), (low, high), color=BLACK, linewidth=1.2)
            axes.annotate(
                results.digits(height), (place, high), (0, 3), textcoords="offset points", ha="center"
            )
    axes.set_xticks(range(len(datasets)), datasets)
    axes.set_xlim(-0.8, max(1, len(datasets) - 0.2))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


@style()
def retrieval_curves(numbers: dict, series: dict, datasets: list[str]) -> Figure:
    """One panel per data set: R@k against k, chance below, the paper's four points as hollow markers."""
    figure = Figure(figsize=(max(4.5, 3.1 * len(datasets)), 3.3), layout="constrained")
    for axes, dataset in zip(
        figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0], datasets, strict=True
    ):
        ks, recall = np.array(series[f"H2/{dataset}/zs/vr@k"]).T
        videos = numbers[f"D1/{dataset}/test/videos"]["value"]
        axes.plot(ks, recall, color=BLUE, label="measured")
        axes.plot(ks, np.minimum(100, 100 * ks / videos), color=GREY, linestyle=":", label="chance")
        points = {k: results.published().get(f"T1/{dataset}/zs/vr@{k}") for k in (1, 5, 10, 100)}
        axes.plot(
            *zip(*points.items(), strict=True), "o", color=RED, fillstyle="none", label="paper, real video"
        )
        axes.set(xscale="log", xlabel="k", ylim=(0, 102), title=f"{dataset}, {videos} videos")
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    figure.axes[0].set_ylabel("R@k, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
