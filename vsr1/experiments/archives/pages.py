"""Show what came out of the study of archives: the page of tables, and figures.

results/<profile>/README.md      the four cells, systems as rows
results/<profile>/looks.png      VCMR by the number of films looked at
results/<profile>/films.png      films of an archive as cameras see them
results/<profile>/search-*.png   one search of HQR and SQR side by side for each of SEARCHES
results/<profile>/qualitative/   a page with cards of more of them
"""

import numpy as np
from matplotlib.figure import Figure

from vsr1 import cache
from vsr1.data import video_reader
from vsr1.evaluation import metrics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments.archives import cards, study, systems
from vsr1.loop.records import Episode, Turn
from vsr1.mini.archives import casts, corpus, source
from vsr1.report import canvas, plots, search_figures, search_panels

ROWS = {  # of the table: words; first searches, then systems that look
    "typed": "the query as typed",
    "hqr-fixed": "the best fixed wording, no look",
    "adapter-vec": "linear map of its vector, no look",
    "adapter-static": "eight soft tokens, the same in every query, no look",
    "tuned-again": "engine tuned on these queries, no look",
    "adapter-soft": "soft tokens of the query alone, no look",
    "rocchio": "Rocchio: the rejected film taken off the query",
    "hqr": "HQR, trained: looks, then writes seen colours",
    "sqr": "SQR: looks, then soft tokens",
    "words-known": "bound: words by who knows the cast",
    "words-best": "bound: the best wording by who knows cast and answer",
    "words-wrong": "null of that bound: by who takes a random wrong film for the answer",
    "oracle-soft": "bound: soft tokens looked up by who knows the cast",
}
LOOKED = {  # of the table of looks
    "walkdown": "as typed, rank fallback",
    "rerank": "the same films, the clearest verdict answers",
    "rocchio": "Rocchio",
    "adapter-vec": "linear map, rank fallback",
    "adapter-static": "static soft tokens, rank fallback",
    "tuned-again": "tuned engine, rank fallback",
    "adapter-soft": "soft tokens of the query alone, rank fallback",
    "hqr": "HQR, trained",
    "sqr": "SQR",
    "sqr-skip": "SQR, no film twice (ours)",
    "oracle-soft": "bound: knows the cast, rank fallback",
}


CHANGED = "The rows were then changed because of replies to the test films of that day."
TAUGHT = (
    "The policy had learned in words how colours shift. In a run before this one, on other films, replies read too few "
    "cameras, and 5 of the 14 came out."
)


def publish(profile) -> None:
    """Write what this module promises, from the seeds that have a file."""
    folder, numbers = profile.results(), study.write(profile)
    cache.write_text(folder / "README.md", table(numbers))
    plots.save(draw_looks(numbers), folder, "looks", LOOKS_CAPTION.format(seeds=_seeds(numbers)))
    plots.save(draw_films(profile), folder, "films", FILMS_CAPTION)
    for name, (figure, caption) in draw_searches(profile).items():
        plots.save(figure, folder, f"search-{name}", caption)
    cards.publish(profile)


# --- Tables


def table(numbers: dict[str, Estimate]) -> str:
    """Return the page of tables in Markdown: the four cells, looks, interventions, predictions."""
    cells = list(corpus.CELLS)
    parts = [
        "R@1, %: of a first search where nothing is looked at, else after one look. "
        f"± is half a 95 % interval, which draws archives and seeds. Mean over {_seeds(numbers)}.",
        "",
    ]
    parts += _grid(["", *cells], [_row(numbers, words, f"{name}/r1") for name, words in ROWS.items()])
    parts += ["", "VCMR at IoU 0.5, %, after one / two / three films looked at.", ""]
    looks = [[words, *(_looks(numbers, cell, name) for cell in cells)] for name, words in LOOKED.items()]
    parts += _grid(["", *cells], looks)
    parts += ["", "Queries whose first search failed, refined once: R@1, %.", ""]
    rows = []
    for system, prefix in study.PREFIXES.items():
        for name in systems.INTERVENTIONS if system == "sqr" else systems.IN_WORDS:
            label = f"{system.upper()}, {systems.INTERVENTIONS[name]}"
            rows.append(_row(numbers, label, f"{prefix}{name}/repaired"))
    parts += _grid(["what the policy has before it", *cells], rows)
    parts += ["", "Differences, paired by seed and query, in points.", ""]
    rows = []
    for row, control, metric in study.COMPARED:
        rows.append(_row(numbers, f"{row} less {control}, {metric}", f"{row}/{metric}_over_{control}"))
    parts += _grid(["", *cells], rows)
    parts += [
        "",
        "First replies: cast named right, verdict right; colours of shirt and object right by the cast that the reply "
        "names. R@1 on queries with a colour that no train archive of the "
        "cast holds (unseen), and on the rest, %.",
        "",
    ]
    rows = []
    for name in ("hqr", "sqr"):
        rows.append(_row(numbers, f"{name}, cast / verdict", f"{name}/cast", f"{name}/ver"))
        rows.append(_row(numbers, f"{name}, shirt / object", f"{name}/shirt", f"{name}/colour"))
        rows.append(_row(numbers, f"{name}, unseen / seen", f"{name}/unseen", f"{name}/seen"))
    parts += _grid(["", *cells], rows)
    parts += ["", "Predictions, written before any policy was trained.", ""]
    parts += _grid(["predicted", "measured", "came out"], study.outcomes(numbers, study.PREDICTIONS))
    parts += ["", f"Predictions, written before stage 1 had text-only rows. {CHANGED}", ""]
    parts += _grid(["predicted", "measured", "came out"], study.outcomes(numbers, study.SECOND))
    parts += ["", f"Predictions, written before these films were drawn. {TAUGHT}", ""]
    parts += _grid(["predicted", "measured", "came out"], study.outcomes(numbers, study.THIRD))
    parts += ["", "Predictions, written before the systems in them were run.", ""]
    parts += _grid(["predicted", "measured", "came out"], study.outcomes(numbers, study.FOURTH))
    return "\n".join(parts) + "\n"


def _seeds(numbers):
    """Say which seeds the numbers of each cell are of.

    >>> numbers = {"same-half/sqr/r1": Estimate(1.0, seeds=(42,)), "casts-whole/sqr/r1": Estimate(1.0, seeds=(1, 42))}
    >>> _seeds(numbers), _seeds({"casts-whole/sqr/r1": Estimate(1.0, seeds=(1, 42))})
    ('seed 42 (same-half), seeds 1, 42 (casts-whole)', 'seeds 1, 42')
    """
    cells = {}
    for cell in corpus.CELLS:
        seeds = {
            seed for name, number in numbers.items() if name.startswith(f"{cell}/") for seed in number.seeds
        }
        if seeds:
            cells.setdefault(tuple(sorted(seeds)), []).append(cell)
    words = {seeds: f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" for seeds in cells}
    if len(cells) == 1:
        return words.popitem()[1]
    return ", ".join(f"{words[seeds]} ({', '.join(names)})" for seeds, names in cells.items())


def _grid(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _row(numbers, label, *names):
    """Return a label, then for each of `corpus.CELLS` the values of its numbers <system>/<metric>."""
    return [
        label,
        *(" / ".join(value_text(numbers, f"{cell}/{name}") for name in names) for cell in corpus.CELLS),
    ]


def value_text(numbers: dict[str, Estimate], name: str) -> str:
    """Return a number with half its interval, or MISSING."""
    number = numbers.get(name)
    if number is None or number.value is None:
        return "MISSING"
    spread = f" ± {(number.ci[1] - number.ci[0]) / 2:.1f}" if number.ci else ""
    return f"{number.value:.1f}{spread}"


def _looks(numbers, cell, name):
    by_looks = [numbers.get(f"{cell}/{name}/vcmr_t{looks}") for looks in study.LOOKS]
    return " / ".join("MISSING" if number is None else f"{number.value:.1f}" for number in by_looks)


# --- Figures

LOOKS_CAPTION = (
    "VCMR at IoU 0.5 by the number of films looked at, four cells; bands are 95 % intervals. Rendered archives, mini "
    "models, {seeds}."
)
LINES = {
    "walkdown": ("as typed, rank fallback", plots.GREY, ":"),
    "adapter-vec": ("linear map of the query, rank fallback", plots.DARK, "--"),
    "adapter-soft": ("soft tokens without a look, rank fallback", plots.SKY, "--"),
    "hqr": ("HQR, trained", plots.ORANGE, "-"),
    "sqr": ("SQR", plots.BLUE, "-"),
    "sqr-skip": ("SQR, no film twice (ours)", plots.BLUE, "--"),
    "oracle-soft": ("knows the cast, rank fallback", plots.BLACK, ":"),
}
TITLES = {
    "same-whole": "query enough, true colours",
    "same-half": "query enough, half a step",
    "casts-whole": "look needed, whole steps",
    "casts-half": "look needed, half steps",
}


@plots.style()
def draw_looks(numbers: dict[str, Estimate]) -> Figure:
    """Draw VCMR by looks, a panel a cell; a system that was not run is left out."""
    figure = Figure(figsize=(7.5, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (cell, title) in zip(panels, TITLES.items(), strict=True):
        axes.set_title(title)
        for name, (label, colour, line) in LINES.items():
            by_looks = [numbers.get(f"{cell}/{name}/vcmr_t{looks}") for looks in study.LOOKS]
            if None not in by_looks:
                axes.plot(
                    study.LOOKS, [n.value for n in by_looks], line, color=colour, marker="o", label=label
                )
                low, high = zip(*(number.ci for number in by_looks), strict=True)
                axes.fill_between(study.LOOKS, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xticks(study.LOOKS)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=plots.GREY)
    for axes in figure.axes[2:]:
        axes.set_xlabel("films looked at")
    figure.supylabel("right video and moment (IoU 0.5), %", fontsize=9)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


FILMS_CAPTION = (
    "Films by cameras of several casts, with true colours below. Trousers are red, and tell the cast."
)
SHOWN = 5  # films of a row


@plots.style()
def draw_films(profile) -> Figure:
    """Draw films of one test archive as several cameras see them, with the true colours of shirt and object."""
    drawing, y = canvas.Canvas(1.45 * SHOWN + 0.1, dpi=100), 0.05
    videos = profile.data_dir("casts") / "videos"
    archives = [archive for archive in source.read(profile, "casts") if archive.split == "test"]
    with video_reader.reader_for(profile) as reader:
        for archive in archives[: len(archives) // 2 : 2][:3] + archives[len(archives) // 2 :: 3][:2]:
            red = casts.seen_colour(casts.KNOWN, archive.cast)
            title = f"{archive.name}: shifted by {archive.cast / 2:g} steps; red looks {red}"
            y = drawing.write(0.05, y, drawing.width, [(title, {})], 9) + 0.02
            bottoms = []
            for n, scene in enumerate(archive.scenes[:: max(1, len(archive.scenes) // SHOWN)][:SHOWN]):
                (moment,) = scene.moments
                clip = reader.read(videos / f"{scene.video}.mp4", np.array([moment.start + 1]))
                strip = canvas.Strip(clip.frames[:1], clip.timestamps[:1], "")
                left, colours = 0.05 + 1.45 * n, f"{moment.shirt} shirt, {moment.colour} {moment.object}"
                bottom = drawing.frames(left, y, strip, 1.4)
                bottoms.append(drawing.write(left, bottom, 1.4, [(colours, {})], 7.5))
            y = max(bottoms) + 0.06
    return drawing.crop(y)


SEARCHES = {  # {name: (words, whether HQR, then SQR, ends with the right film and moment)}
    "words": ("HQR finds film and moment, SQR does not", True, False),
    "tokens": ("SQR finds film and moment, HQR does not", False, True),
    "neither": ("neither finds film and moment", False, False),
}
SEARCH_CELL = "casts-whole"


class ArchiveFrames(search_panels.FrameSource):
    """Frames of the films of a corpus; what a query asks for is named as the camera of its archive shows it."""

    def __init__(self, profile, name: str, reader: video_reader.Reader):
        self.truth = source.Truth(profile, name)
        self.dataset, self.folder, self.reader = name, profile.data_dir(name) / "videos", reader
        self.scenes, self.seconds = self.truth.scenes, {}

    def moments(self, episode: Episode, video: str):
        """Return the moment that a query describes and that of a film, both as the camera shows them."""
        archive = self.truth.archive_of[episode.gt_video]
        query_moment = casts.seen_moment(self.scenes[episode.gt_video].moments[0], archive.cast)
        return query_moment, self.truth.shown_moment(video)

    def reasoning(self, episode: Episode, turn: Turn, max_letters: int | None = None):
        """Return the steps of a reply; what it says of the camera is compared with the truth, too."""
        steps = super().reasoning(episode, turn, max_letters)
        return cards.with_misreadings(steps, self.truth.archive_of[turn.shown_id].cast)


def draw_searches(profile) -> dict[str, tuple[Figure, str]]:
    """Draw for each of SEARCHES the query with the smallest id that fits: {name: (figure, caption)}.

    Its first search failed, and both systems refine after it. Without such a query, or its episodes, there is none.
    """
    name, drawn = corpus.CELLS[SEARCH_CELL][0], {}
    episodes = {system: systems.read(profile, SEARCH_CELL, system) for system in ("hqr", "sqr")}
    pairs = [pair for pair in zip(*episodes.values(), strict=True) if search_figures.level(*pair)]
    with video_reader.reader_for(profile) as reader:
        frames = ArchiveFrames(profile, name, reader)
        for kind, (words, *wanted) in SEARCHES.items():
            fit = [pair for pair in pairs if metrics.vcmr_hits(pair, 0.5).tolist() == wanted]
            if fit:
                pair = min(fit, key=lambda pair: pair[0].desc_id)
                cast = frames.truth.archive_of[pair[0].gt_video].cast
                columns = {system.upper(): (e, e.turns) for system, e in zip(episodes, pair, strict=True)}
                caption = (
                    f"{words}: {len(fit)} of {len(pairs)} failed first searches after which both refine. "
                )
                caption += (
                    f"Smallest query id; the camera shifts colours by {cast / 2:g} steps, and colours beside "
                )
                caption += "films and in corrections are as it shows them. "
                caption += search_figures.LEGEND
                drawn[kind] = search_panels.turn_by_turn(columns, frames), caption
    return drawn
