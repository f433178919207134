"""Pictures for readers: one figure style, contact sheets of clips, and the figures that numbers.json decides.

Figures are matplotlib objects without pyplot, so no state outlives a call. `save` puts the caption inside the
file, where the report finds it. Colours are Okabe and Ito's, and no colour carries a meaning alone.
"""

import io
import json
import os
import re
import shutil
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vsr1.config import Profile
from vsr1.report import results

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
    timestamps: np.ndarray  # (T,) seconds
    caption: str
    span: tuple[float, float] | None = None  # seconds; frames inside are marked


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
    seconds = strip.timestamps[index]
    inside = strip.span is not None and strip.span[0] <= seconds <= strip.span[1]
    axes.imshow(strip.frames[index], interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    look = {"ha": "center", "va": "top", "size": 8, "weight": "bold" if inside else "normal"}
    axes.text(0.5, -0.03, f"{seconds:.1f} s", transform=axes.transAxes, **look)
    if inside:
        axes.plot((0, 1), (-0.01, -0.01), transform=axes.transAxes, color=RED, linewidth=3, clip_on=False)


# --- Figures of numbers.json


def sheets(profile: Profile, dataset: str) -> Path:
    """Where the contact sheets of a data set are drawn, as `<id>-<dataset>.png`."""
    return profile.runs(dataset) / "figures"


def copy_sheets(profile: Profile) -> None:
    """The sheets of these runs and no others into results/, if rendered; frames of real video stay out of git."""
    target = profile.results() / "figures"
    for old in target.glob("*-*.png"):
        old.unlink()
    for dataset in profile.datasets if profile.world else ():
        for sheet in sheets(profile, dataset).glob(f"*-{dataset}.png"):
            shutil.copyfile(sheet, target / sheet.name)


def figures(profile: Profile, numbers: dict) -> list[Path]:
    """The figures over all data sets, written to results/<profile>/figures/ where their numbers exist."""
    series = json.loads((profile.results() / "series.json").read_text(encoding="utf-8"))
    known = {name for name in numbers if _value(numbers, name) is not None} | series.keys()
    label = f"Profile {profile.name}{', rendered corpora and mini models' if profile.world else ''}."
    folder, written = profile.results() / "figures", []
    for figure, (needed, draw) in FIGURES.items():
        if datasets := [dataset for dataset in profile.datasets if needed.format(dataset) in known]:
            words = f"{results.items()[figure]['caption']} {label}"
            written.append(save(draw(numbers, series, datasets), folder, figure, words))
        else:
            for old in folder.glob(f"{figure}.*"):
                print(
                    f"left out: figure {figure}, of which this run has no data ({needed.format('<data set>')})"
                )
                old.unlink()
    return written


def _value(numbers, name):
    """The measured value called `name`, None where there is none."""
    return numbers[name]["value"] if name in numbers and numbers[name]["measured"] else None


@style()
def headroom(numbers: dict, datasets: list[str]) -> Figure:
    """Two panels of bars, all queries and first-search failures: what is reached, what the probe reaches."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    everyone, failures = figure.subplots(1, 2, sharey=True)
    ceiling = ("attribute probe", ORANGE, "..")
    plain = {"zs/vr@1": ("query as it is", BLUE, ""), "probe/vr@1": ceiling}
    again = {"walkdown/vr@1_failed": ("rank 2", SKY, "///"), "probe/vr@1_failed": ceiling}
    _bars(everyone, numbers, datasets, "H1", plain)
    _bars(failures, numbers, datasets, "H1", again)
    everyone.set(title="all queries", ylabel="right video, %")
    failures.set_title("queries whose first search failed")
    return figure


def _bars(axes, numbers, datasets, table, bars):
    """A group of bars per data set, one per `<system>/<metric>`, its value on top; a missing number leaves a gap."""
    width = 0.72 / len(bars)
    for number, (key, (label, colour, hatch)) in enumerate(bars.items()):
        entries = [numbers.get(f"{table}/{dataset}/{key}") for dataset in datasets]
        shown = {x: entry for x, entry in enumerate(entries) if entry and entry["measured"]}
        places = [x + width * (number - (len(bars) - 1) / 2) for x in shown]
        heights = [entry["value"] for entry in shown.values()]
        axes.bar(places, heights, 0.94 * width, label=label, color=colour, hatch=hatch, edgecolor="white")
        for place, height, entry in zip(places, heights, shown.values(), strict=True):
            low, high = entry["ci"] or (height, height)
            axes.plot((place, place), (low, high), color=BLACK, linewidth=1.2)
            look = {"textcoords": "offset points", "ha": "center", "size": 7}
            axes.annotate(results.digits(height), (place, high), (0, 3), **look)
    axes.set_xticks(range(len(datasets)), datasets)
    axes.set_xlim(-0.55, max(1, len(datasets) - 0.45))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(bars))


@style()
def retrieval_curves(numbers: dict, series: dict, datasets: list[str]) -> Figure:
    """One panel per data set: R@k against k, chance below, the paper's four points as hollow markers."""
    figure, panels = _panels(datasets)
    for axes, dataset in zip(panels, datasets, strict=True):
        ks, recall = np.array(series[f"H2/{dataset}/zs/vr@k"]).T
        videos = numbers[f"D1/{dataset}/test/videos"]["value"]
        axes.plot(ks, recall, color=BLUE, label="measured")
        axes.plot(ks, np.minimum(100, 100 * ks / videos), color=GREY, linestyle=":", label="chance")
        points = {k: results.published().get(f"T1/{dataset}/zs/vr@{k}") for k in (1, 5, 10, 100)}
        hollow = {"color": RED, "fillstyle": "none", "label": "paper, real video"}
        axes.plot(list(points), list(points.values()), "o", **hollow)
        axes.set(xscale="log", xlabel="k", ylim=(0, 102), title=f"{dataset}, {videos} videos")
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    return _labelled(figure, panels, "R@k, %", 3)


@style()
def known_video(numbers: dict, datasets: list[str]) -> Figure:
    """Two panels of bars: verdicts by what was shown, beside chance; spans in the right video, beside two floors."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    verdicts, spans = figure.subplots(1, 2)
    judged = {"right": ("right video shown", BLUE, ""), "wrong": ("wrong video", ORANGE, "..")}
    judged = {f"zs/verdict_{shown}": look for shown, look in judged.items()}
    _bars(verdicts, numbers, datasets, "V1", judged | {"zs/verdict": ("both", SKY, "///")})
    verdicts.axhline(50, color=GREY, linestyle=":")
    named = {"zs": ("base model", BLUE, ""), "wholevideo": ("whole video", GREY, "..")}
    named |= {"random": ("random span", "#cccccc", "///")}
    _bars(spans, numbers, datasets, "V1", {f"{who}/grounding@0.5": look for who, look in named.items()})
    verdicts.set(title="verdicts; dotted: always the same verdict", ylabel="right verdict, %", ylim=(0, 108))
    spans.set(title="spans named for the right video", ylabel="R@1 at IoU 0.5, %")
    return figure


@style()
def overlaps(series: dict, datasets: list[str]) -> Figure:
    """One panel per data set: a histogram of overlaps with the right moment, that of whole videos as a line."""
    figure, panels = _panels(datasets)
    for axes, dataset in zip(panels, datasets, strict=True):
        left, share = np.array(series[f"V2/{dataset}/zs/iou"]).T
        whole = np.array(series[f"V2/{dataset}/wholevideo/iou"])[:, 1]
        axes.bar(left[1:] + 0.05, share[1:], 0.092, color=BLUE, label="base model")
        axes.bar(left[0] + 0.05, share[0], 0.092, color=GREY, hatch="///", edgecolor="white")
        axes.step([*left, 1.0], [*whole, whole[-1]], where="post", color=RED, label="whole video")
        axes.set(title=dataset, xlabel="IoU (grey: exactly 0)")
        axes.set_xticks([-0.05, 0.3, 0.5, 0.7, 1], ["0", ".3", ".5", ".7", "1"])
    return _labelled(figure, panels, "queries, %", 2)


def _panels(datasets, rows=1, height=3.3, **options):
    """A figure with a column per data set, and its panels: a list, or a list of rows."""
    figure = Figure(figsize=(max(4.5, 3.1 * len(datasets)), height), layout="constrained")
    panels = figure.subplots(rows, len(datasets), squeeze=False, **{"sharey": "row"} | options)
    return figure, list(panels) if rows > 1 else list(panels[0])


def _labelled(figure, panels, ylabel, columns):
    """The figure with the label of its first panel, and that panel's legend below all."""
    panels[0].set_ylabel(ylabel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


def _rows(axes, labels):
    """Rows with their labels, the first on top."""
    labels = list(labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)


REFINEMENTS = {
    "walkdown": "walk down (no refinement)",
    "sqr": "SQR, trained",
    "sqr-untrained": "SQR, untrained heads",
    **{f"hqr-{variant}": f"HQR {variant} (ours), prompted" for variant in ("blind", "seen", "reasoned")},
}


@style()
def refinements(numbers: dict, datasets: list[str]) -> Figure:
    """One panel per data set, a line per refinement: R@1 before (hollow) and after (with its interval)."""
    figure, panels = _panels(datasets, height=2.9, sharex=True, sharey=True)
    for axes, dataset in zip(panels, datasets, strict=True):
        for row, system in enumerate(REFINEMENTS):
            name = f"S1/{dataset}/{system}/vr@1"
            before, after = _value(numbers, f"{name}_orig"), _value(numbers, name)
            if after is not None:
                axes.plot(numbers[name]["ci"], (row, row), color=BLACK, linewidth=1)
                axes.plot((before, after), (row, row), color=BLUE, linewidth=3, alpha=0.4)
                axes.plot(before, row, "o", color=BLUE, fillstyle="none", label="before")
                axes.plot(after, row, "o", color=BLUE, label="after")
        axes.set(title=dataset, xlabel="right video on rank 1, %")
        _rows(axes, REFINEMENTS.values())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2)
    return figure


SWEPT = {"right": ("right video", BLUE, "o"), "shown": ("video just rejected", RED, "s")}
SWEPT |= {"best": ("best video", GREY, "^")}
HEADS = {"trained": ("trained heads", "-"), "untrained": ("untrained heads", "--")}


@style()
def sweep(series: dict, datasets: list[str]) -> Figure:
    """Per data set one query as 0 to N latents are added: rank of its video above, cosines below."""
    figure, panels = _panels(datasets, rows=2, height=5.2, sharex=True, sharey=False)
    for ranks, cosines, dataset in zip(*panels, datasets, strict=True):
        for init, (_, line) in HEADS.items():
            own = {what: np.array(series[f"S2/{dataset}/{init}/{what}"]).T for what in ("rank", *SWEPT)}
            ranks.plot(*own["rank"], line, marker="o", color=BLUE, markersize=4)
            for what, (_, colour, mark) in SWEPT.items():
                cosines.plot(*own[what], line, marker=mark, color=colour, markersize=4)
        ranks.set_title(f"{dataset}: one query")
        ranks.yaxis.set_major_locator(MaxNLocator(integer=True))
        ranks.set_ylim(ranks.get_ylim()[1] + 1, 0.5)  # best on top, and there is no rank 0
        cosines.set_xlabel("latents in the query")
    panels[0][0].set_ylabel("rank of right video")
    panels[1][0].set_ylabel("cosine with the query")
    kinds = [Line2D([], [], color=BLACK, linestyle=line, label=label) for label, line in HEADS.values()]
    kinds += [
        Line2D([], [], color=colour, marker=mark, label=label) for label, colour, mark in SWEPT.values()
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=min(3, len(datasets) + 1))
    return figure


# Per figure of training: rows of panels, each {y label: {system/metric: (label, colour, line)}}
STAGE_1 = {
    "loss (nats)": {"sft/loss": ("all", BLACK, "-"), "ft/loss": ("FT: replies only", GREY, "--")},
    "InfoNCE (nats)": {"sft/info_nce": ("search", BLUE, "-")},
}
STAGE_2 = {
    "reward": {"vsr1/reward": ("sampled", BLUE, "-"), "vsr1/held": ("held out", BLACK, "o--")},
    "parts of it": {
        "vsr1/verify": ("verdict (-1 to 1)", ORANGE, "-"),
        **{"vsr1/time": ("overlap", RED, "--"), "vsr1/retrieve": ("search", SKY, ":")},
    },
    "KL to stage 1": {"vsr1/kl": ("KL", GREY, "-")},
}


@style()
def courses(table: str, panels: dict, series: dict, datasets: list[str]) -> Figure:
    """Per data set a column, per y label a row: what a training run logged, step by step."""
    figure, rows = _panels(datasets, rows=len(panels), height=0.7 + 1.9 * len(panels), sharex="col")
    for row, (label, wanted) in zip(rows, panels.items(), strict=True):
        for axes, dataset in zip(row, datasets, strict=True):
            for name, (words, colour, line) in wanted.items():
                points = series.get(f"{table}/{dataset}/{name}")
                if points:
                    axes.plot(*np.array(points, dtype=float).T, line, color=colour, label=words, markersize=4)
        row[0].set_ylabel(label)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes, dataset in zip(rows[0], datasets, strict=True):
        axes.set_title(dataset)
    for axes in rows[-1]:
        axes.set_xlabel("step")
    return figure


def live(keys, every: float = 3.0):
    """A `watch` for a training run whose curves redraw in JupyterLab; None elsewhere, where nobody is looking."""
    if "JPY_SESSION_NAME" not in os.environ:  # set by the server for its kernels; papermill's have none
        return None
    from IPython.display import Image, display

    handle, drawn = display(display_id=True), [0.0]

    def watch(lines):
        if time.monotonic() - drawn[0] < every:
            return
        drawn[0] = time.monotonic()
        handle.update(Image(_live_png(lines, keys)))

    return watch


@style()
def _live_png(lines, keys):
    figure = Figure(figsize=(3 * len(keys), 2.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        axes.plot(*zip(*((line["step"], line[key]) for line in lines if line[key] is not None), strict=True))
        axes.set(title=key, xlabel="step")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


LAYOUTS = {"raw": ("raw embeddings", BLUE), "b": ("through B, official", RED)}
LAYOUTS |= {"scaled": ("through B, scaled", ORANGE)}
STARTS = {"": ("random start", "-"), "-zero": ("zero", ":"), "-zero-clipped": ("zero, clipped", "--")}
COURSE = re.compile(r"held-(?P<init>[a-z]+)-n(?P<n>\d+)-r(?P<rows>\d+)(?P<more>(-[a-z]+)?)")


@style()
def ladder(numbers: dict, series: dict, datasets: list[str]) -> Figure:
    """Per data set free latents by step above; below heads alone on held-out queries, a row per course."""
    figure, panels = _panels(datasets, rows=2, height=6.4)
    systems = {name.split("/")[2] for name in numbers}
    courses = sorted(filter(COURSE.fullmatch, systems), key=_course)
    for free, held, dataset in zip(*panels, datasets, strict=True):
        for layout, (_, colour) in LAYOUTS.items():
            for start, (_, line) in STARTS.items():
                points = np.array(series[f"L1/{dataset}/free-{layout}{start}/vr@1"]).T
                free.plot(*points, line, color=colour)
        free.axhline(numbers[f"L1/{dataset}/free-plain/vr@1"]["value"], color=GREY, linewidth=1)
        free.set(title=f"{dataset}: free latents", xlabel="step of Adam", ylim=(0, 102))
        for row, course in enumerate(courses):
            if (value := _value(numbers, f"L1/{dataset}/{course}/vr@1")) is not None:
                held.plot(numbers[f"L1/{dataset}/{course}/vr@1"]["ci"], (row, row), color=BLACK, linewidth=1)
                held.plot(value, row, "o", color=BLUE)
        held.axvline(numbers[f"L1/{dataset}/held-plain/vr@1"]["value"], color=GREY, linewidth=1)
        held.set(title="heads alone, held out", xlabel="right video on rank 1, %")
        _rows(held, map(_course_label, courses))
    panels[0][0].set_ylabel("right video on rank 1, %")
    lines = [Line2D([], [], color=colour, label=label) for label, colour in LAYOUTS.values()]
    lines += [Line2D([], [], color=BLACK, linestyle=line, label=label) for label, line in STARTS.values()]
    plain = Line2D([], [], color=GREY, label="query as it is")
    figure.legend(handles=[*lines, plain], loc="outside lower center", ncols=min(4, len(datasets) + 1))
    return figure


def _course(name):
    """Sort key: the other inits, then N, then rows, then what differs in something else."""
    found = COURSE.fullmatch(name)
    return found["init"] == "scaled", found["more"], int(found["rows"]), int(found["n"]), found["init"]


def _course_label(name):
    """A course in words.

    >>> _course_label("held-scaled-n4-r600-hard")
    'scaled, N 4, 600 queries, hard'
    """
    found = COURSE.fullmatch(name)
    return f"{found['init']}, N {found['n']}, {found['rows']} queries" + found["more"].replace("-", ", ")


def _curve(axes, numbers, place, keys, paper=False, **look):
    """Values of {x: metric} of one system with their intervals as a band; or what the paper shows there."""
    kind = "paper" if paper else "value"
    entries = {x: numbers.get(f"{place}/{key}") for x, key in keys.items()}
    shown = {x: entry for x, entry in entries.items() if entry and entry[kind] is not None}
    axes.plot(list(shown), [entry[kind] for entry in shown.values()], markersize=5, **look)
    bands = [entry["ci"] for entry in shown.values()]
    if not paper and bands and all(bands):
        faint = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
        axes.fill_between(list(shown), *zip(*bands, strict=True), **faint)


def _and_the_paper(datasets):
    """A panel per data set, and a last one for the paper's figure, whose place in numbers.json is "mean"."""
    figure, panels = _panels([*datasets, "mean"])
    for axes, title in zip(panels, [*datasets, "paper (real video)"], strict=True):
        axes.set_title(title)
    return figure, panels, [*datasets, "mean"]


@style()
def soft_tokens(numbers: dict, datasets: list[str]) -> Figure:
    """R@1 against the number of soft tokens, a panel per data set, the paper's last."""
    figure, panels, places = _and_the_paper(datasets)
    last = max(int(name.split("/d")[-1]) for name in numbers if name.startswith(f"F4/{datasets[0]}/vsr1/"))
    keys = {depth: f"d{depth}" for depth in range(last + 1)}
    for axes, dataset in zip(panels, places, strict=True):
        paper = dataset == "mean"
        look = {"marker": "o", "color": BLUE, "label": "queries that refined at turn 1"}
        _curve(axes, numbers, f"F4/{dataset}/vsr1", keys, paper, **look)
        look = {"marker": "s", "color": RED, "label": "those whose first search failed", "linestyle": "--"}
        _curve(axes, numbers, f"F4/{dataset}/vsr1-failed", keys, paper, **look)
        axes.axvspan(last - 0.5, last + 0.5, color=GREY, alpha=0.15, linewidth=0)
        axes.set(xlabel="soft tokens in the query", xticks=list(keys), ylim=(0, 102))
    return _labelled(figure, panels, "right video on rank 1, %", 2)


@style()
def turn_counts(numbers: dict, datasets: list[str]) -> Figure:
    """VCMR against the most turns, a panel per data set, the paper's last; dashed: rejected videos are not shown."""
    figure, panels, places = _and_the_paper(datasets)
    colours = {"0.3": (BLUE, "o"), "0.5": (RED, "s"), "0.7": (ORANGE, "^")}
    own = f"F5/{datasets[0]}/vsr1/vcmr@0.5_t"
    turns = sorted(int(name.removeprefix(own)) for name in numbers if name.startswith(own))
    for axes, dataset in zip(panels, places, strict=True):
        for m, (colour, marker) in colours.items():
            keys = {turn: f"vcmr@{m}_t{turn}" for turn in turns}
            look = {"marker": marker, "color": colour, "label": f"IoU {m}", "fillstyle": "none"}
            _curve(axes, numbers, f"F5/{dataset}/vsr1", keys, dataset == "mean", **look)
            look |= {"linestyle": "--", "label": f"{m}, no video twice"}
            _curve(axes, numbers, f"F5/{dataset}/skip", keys, dataset == "mean", **look)
        axes.set(xlabel="turns at most", xticks=turns)
    panels[0].set_ylim(bottom=0)  # of all panels; before all are drawn it would end where the first does
    return _labelled(figure, panels, "VCMR R@1, %", 3)


@style()
def engines(numbers: dict, datasets: list[str]) -> Figure:
    """R@1 after one refinement of failed queries, a panel per data set, a row per method, a bar per engine."""
    figure, panels = _panels(datasets, height=3.9, sharex=True, sharey=True)
    systems = {"sqr": "SQR"}
    for way in ("blind", "seen", "reasoned"):
        systems |= {f"hqr-{way}": f"HQR {way}", f"hqr-{way}-append": f"HQR {way}, behind"}
    sizes = ("small", -0.2, BLUE, ""), ("large", 0.2, ORANGE, "///")
    for axes, dataset in zip(panels, datasets, strict=True):
        for size, shift, colour, hatch in sizes:
            for row, system in enumerate(systems):
                name = f"A2/{dataset}/{system}/vr@1_{size}"
                if (value := _value(numbers, name)) is not None:
                    label = f"{size} engine" if system == "hqr-blind" else None
                    look = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label}
                    axes.barh(row + shift, value, 0.38, **look)
                    axes.plot(numbers[name]["ci"], (row + shift,) * 2, color=BLACK, linewidth=1)
        axes.text(1, 0.2, "not trained for it", va="center", size=7, color=GREY)
        axes.set(title=dataset, xlabel="R@1 after, %")
        _rows(axes, systems.values())
        axes.grid(axis="y", visible=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


FIGURES = {  # figure: (number or series without which a data set is left out, how it is drawn); captions: items.yaml
    "F4": ("F4/{}/vsr1/d0", lambda numbers, series, datasets: soft_tokens(numbers, datasets)),
    "F5": ("F5/{}/vsr1/vcmr@0.5_t1", lambda numbers, series, datasets: turn_counts(numbers, datasets)),
    "A2": ("A2/{}/sqr/vr@1_small", lambda numbers, series, datasets: engines(numbers, datasets)),
    "H1": ("H1/{}/zs/vr@1", lambda numbers, series, datasets: headroom(numbers, datasets)),
    "H2": ("H2/{}/zs/vr@k", retrieval_curves),
    "V1": ("V1/{}/zs/verdict", lambda numbers, series, datasets: known_video(numbers, datasets)),
    "V2": ("V2/{}/zs/iou", lambda numbers, series, datasets: overlaps(series, datasets)),
    "E1": ("E1/{}/sft/info_nce", lambda numbers, series, datasets: courses("E1", STAGE_1, series, datasets)),
    "E2": ("E2/{}/vsr1/reward", lambda numbers, series, datasets: courses("E2", STAGE_2, series, datasets)),
    "S1": ("S1/{}/sqr-untrained/vr@1", lambda numbers, series, datasets: refinements(numbers, datasets)),
    "L1": ("L1/{}/free-plain/vr@1", ladder),
    "S2": ("S2/{}/trained/rank", lambda numbers, series, datasets: sweep(series, datasets)),
}
