"""Ask when looking pays: the four cells, systems side by side, and what was predicted (docs/archives.md).

results/<profile>/numbers.json   {<cell>/<system>/<metric>: Estimate}, with profile and seed
results/<profile>/README.md       the four cells, systems as rows
results/<profile>/looks.png      VCMR by the number of films looked at
results/<profile>/films.png      films of an archive as cameras see them
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vsr1 import cache
from vsr1.data import annotations, video_reader
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments.archives import headroom, search, systems
from vsr1.experiments.common import Prediction
from vsr1.mini.archives import casts, corpus, source, teacher
from vsr1.report import canvas, plots, results

LOOKS = (1, 2, 3)
ROWS = {  # of the table: words; first searches, then systems that look
    "typed": "the query as typed",
    "adapter-vec": "linear map of its vector, no look",
    "tuned-again": "engine tuned on these queries, no look",
    "adapter-soft": "soft tokens of the query alone, no look",
    "hqr": "HQR, trained: looks, then writes seen colours",
    "sqr": "SQR: looks, then soft tokens",
    "words-known": "bound: words by who knows the cast",
    "words-best": "bound: the best wording by who knows cast and answer",
    "oracle-soft": "bound: soft tokens looked up by who knows the cast",
}
FOLLOWED = ("walkdown", "adapter-soft", "hqr", "sqr", "oracle-soft")


# --- Numbers


def numbers_of(profile, cell: str, names) -> Iterator[dict[str, Estimate]]:
    """Measure a cell, unless that is current; yield the numbers of one system after the other.

    r1            R@1: of a first search; of SQR and HQR after one look
    unseen, seen  the same on queries that name the colour which no train archive of this cast holds, and on the others
    repaired      the same on queries whose first search as typed fails
    vcmr_t1 ..    VCMR at IoU 0.5 by the number of films looked at
    ver           verdicts on the first film that are right
    cast          first replies that name the cast right; `cast_near` half a step away counts too
    """
    typed = None
    for system, hits in headroom.measure(profile, cell).items():
        typed = np.array(hits) if typed is None else typed
        yield _split(profile, cell, system, np.array(hits), typed)
    for name in names:
        yield _followed(profile, cell, name, typed)
    yield _interventions(profile, cell)


def _split(profile, cell, system, hits, typed):
    """Measure R@1 of a system by kind of query."""
    queries, truth = _queries(profile, cell)
    unseen = np.array([casts.is_unseen(truth.query_moment(q), truth.cast(q)) for q in queries])
    kinds = {"r1": np.ones_like(unseen), "unseen": unseen, "seen": ~unseen, "repaired": ~typed}
    return {
        f"{cell}/{system}/{kind}": _estimate(profile, truth, np.array(queries, object)[rows], hits[rows])
        for kind, rows in kinds.items()
    }


def _queries(profile, cell):
    """Return the queries that systems are run on, without their vectors, and what is true of them."""
    name = corpus.CELLS[cell][0]
    queries = annotations.read_fig(profile.data_dir(name) / "corpus" / "test.jsonl")
    truth = source.Truth(profile, name)
    return search.sample(profile, cell, queries, truth), truth


def _estimate(profile, truth, queries, values) -> Estimate:
    return statistics.estimate(values, [truth.archive_of[query.video].name for query in queries], profile)


def _followed(profile, cell, name, typed):
    """Measure what a system finds by looking."""
    queries, truth = _queries(profile, cell)
    episodes, numbers = systems.run(profile, cell, name), {}
    assert [episode.desc_id for episode in episodes] == [query.id for query in queries]
    for looks in LOOKS:
        hits = metrics.vcmr_hits(metrics.within(episodes, looks), 0.5)
        numbers[f"{cell}/{name}/vcmr_t{looks}"] = _estimate(profile, truth, queries, hits)
    numbers[f"{cell}/{name}/ver"] = _estimate(profile, truth, queries, metrics.ver_hits(episodes, 0))
    if systems.SYSTEMS[name].like in ("sqr", "hqr-reasoned"):
        after = metrics.vr_hits(metrics.within(episodes, 1), 1)
        numbers |= _split(profile, cell, name, after, typed)
        steps = []  # of half a step each, from the true cast to the one that the reply names; None: it names none
        for episode, query in zip(episodes, queries, strict=True):
            cast = teacher.read_cast(episode.turns[0].reply.text)
            steps.append(None if cast is None else (cast - truth.cast(query)) % 12)
        for metric, right in {"cast": (0,), "cast_near": (0, 1, 11)}.items():
            hits = [step in right for step in steps]
            numbers[f"{cell}/{name}/{metric}"] = _estimate(profile, truth, queries, hits)
    return numbers


def _interventions(profile, cell):
    """Measure R@1 after one refinement of failed queries, by what was changed."""
    refined = systems.intervene(profile, cell)
    queries, truth = _queries(profile, cell)
    by_id = {query.id: query for query in queries}
    failed = [by_id[key] for key in refined["ids"]]
    return {
        f"{cell}/if-{name}/repaired": _estimate(profile, truth, failed, [rank == 1 for rank in ranks])
        for name, ranks in refined["ranks"].items()
    }


def run(profile, cells, names=FOLLOWED) -> Iterator[str]:
    """Measure cells and write what this module promises; yield what was written, system by system."""
    folder = profile.results()
    folder.mkdir(parents=True, exist_ok=True)
    with cache.updated_json(folder / "numbers.json") as content:
        content |= {"profile": profile.digest(), "seed": profile.seed}
        content["known object, base policy"] = headroom.read_known(profile)
    for cell in cells:
        for numbers in numbers_of(profile, cell, names):
            entries = results.plain({name: asdict(number) for name, number in numbers.items()})
            with cache.updated_json(folder / "numbers.json") as content:
                content.setdefault("numbers", {}).update(entries)
            yield ", ".join(sorted({name.rpartition("/")[0] for name in numbers}))
    numbers = read(folder)
    cache.write_text(folder / "README.md", table(numbers))
    plots.save(draw_looks(numbers), folder, "looks", LOOKS_CAPTION)
    plots.save(draw_films(profile), folder, "films", FILMS_CAPTION)


def read(folder: Path) -> dict[str, Estimate]:
    """Read the numbers of a folder of results; none before the study was run."""
    path = folder / "numbers.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Estimate(**number) for name, number in content.get("numbers", {}).items()}


# --- What was predicted, before the policies were trained


def _ahead(words, cell, a, b, low, high=100.0, metric="r1"):
    return Prediction(f"{cell}: {words}", f"{cell}/{a}/{metric}", f"{cell}/{b}/{metric}", low, high)


def _within(words, cell, system, metric, low, high=100.0):
    return Prediction(f"{cell}: {words}", f"{cell}/{system}/{metric}", None, low, high)


PREDICTIONS = (
    _within("the first search finds 15 to 40 %", "casts-whole", "typed", "r1", 15, 40),
    _within("the first search finds 15 to 40 %", "casts-half", "typed", "r1", 15, 40),
    _ahead(
        "soft tokens that know the cast are 30 points above it", "casts-whole", "oracle-soft", "typed", 30
    ),
    _ahead("soft tokens that know the cast are 30 points above it", "casts-half", "oracle-soft", "typed", 30),
    _within("no query-only map finds more than 30 %", "casts-whole", "adapter-soft", "r1", 0, 30),
    _within("no query-only map finds more than 30 %", "casts-half", "adapter-soft", "r1", 0, 30),
    _within("nine of ten replies name the cast", "casts-whole", "sqr", "cast", 90),
    _within("three of four replies name the cast", "casts-half", "sqr", "cast", 75),
    _ahead("SQR is 15 points ahead of soft tokens that never look", "casts-whole", "sqr", "adapter-soft", 15),
    _ahead("SQR is 10 points ahead of soft tokens that never look", "casts-half", "sqr", "adapter-soft", 10),
    _ahead("trained words are ahead of SQR, or at most 10 points behind", "casts-whole", "hqr", "sqr", -10),
    _ahead("SQR is 5 points ahead of trained words", "casts-half", "sqr", "hqr", 5),
    _ahead(
        "SQR is within 5 points of soft tokens that never look", "same-half", "sqr", "adapter-soft", -5, 5
    ),
    _ahead(
        "a film of another camera costs 10 points",
        "casts-whole",
        "if-own",
        "if-other-archive",
        10,
        metric="repaired",
    ),
    _ahead(
        "another film of the archive costs none",
        "casts-whole",
        "if-own",
        "if-same-archive",
        -5,
        5,
        "repaired",
    ),
    _ahead(
        "a wrong cast in the reply costs 20 points",
        "casts-whole",
        "if-teacher",
        "if-teacher-wrong-cast",
        20,
        metric="repaired",
    ),
    Prediction(
        "casts-whole: colours that a cast never showed cost SQR 10 points",
        "casts-whole/sqr/seen",
        "casts-whole/sqr/unseen",
        10,
        100,
    ),
)


def outcomes(numbers: dict[str, Estimate]) -> list[tuple[str, str, str]]:
    """Return (what was predicted, what was measured, whether it came out) of each prediction."""
    rows = []
    for prediction in PREDICTIONS:
        measured, came_out = prediction.outcome(numbers)
        rows.append((prediction.words, measured, "**no**" if came_out == "no" else came_out))
    return rows


# --- Table and figures


def table(numbers: dict[str, Estimate]) -> str:
    """Return the page of tables in Markdown: the four cells, looks, interventions, predictions."""
    cells = list(corpus.CELLS)
    parts = [
        "R@1, %: of a first search where nothing is looked at, after one look of SQR and HQR. "
        "± is half a 95 % interval over archives.",
        "",
    ]
    parts += _grid(["", *cells], [_row(numbers, words, f"{name}/r1") for name, words in ROWS.items()])
    parts += ["", "VCMR at IoU 0.5, %, after one / two / three films looked at.", ""]
    looks = [[name, *(_looks(numbers, cell, name) for cell in cells)] for name in FOLLOWED]
    parts += _grid(["", *cells], looks)
    parts += ["", "Queries whose first search failed, refined once by SQR: R@1, %.", ""]
    rows = [_row(numbers, words, f"if-{name}/repaired") for name, words in systems.INTERVENTIONS.items()]
    parts += _grid(["what the policy has before it", *cells], rows)
    parts += [
        "",
        "First replies: cast named right, verdict right. R@1 on queries with a colour that no train archive of the "
        "cast holds (unseen), and on the rest, %.",
        "",
    ]
    rows = []
    for name in ("hqr", "sqr"):
        rows.append(_row(numbers, f"{name}, cast / verdict", f"{name}/cast", f"{name}/ver"))
        rows.append(_row(numbers, f"{name}, unseen / seen", f"{name}/unseen", f"{name}/seen"))
    parts += _grid(["", *cells], rows)
    parts += ["", "Predictions, written before the policies were trained.", ""]
    parts += _grid(["predicted", "measured", "came out"], outcomes(numbers))
    return "\n".join(parts) + "\n"


def _grid(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _row(numbers, label, *names):
    """Return a label, then for each of `corpus.CELLS` the values of its numbers <system>/<metric>."""
    return [
        label,
        *(" / ".join(_value(numbers, f"{cell}/{name}") for name in names) for cell in corpus.CELLS),
    ]


def _value(numbers, name):
    number = numbers.get(name)
    if number is None or number.value is None:
        return "MISSING"
    spread = f" ± {(number.ci[1] - number.ci[0]) / 2:.1f}" if number.ci else ""
    return f"{number.value:.1f}{spread}"


def _looks(numbers, cell, name):
    by_looks = [numbers.get(f"{cell}/{name}/vcmr_t{looks}") for looks in LOOKS]
    return " / ".join("MISSING" if number is None else f"{number.value:.1f}" for number in by_looks)


LOOKS_CAPTION = (
    "VCMR at IoU 0.5 by the number of films looked at, four cells. Rendered archives, mini models, one seed."
)
LINES = {
    "walkdown": ("as typed, rank fallback", plots.GREY, ":"),
    "adapter-soft": ("soft tokens without a look, rank fallback", plots.SKY, "--"),
    "hqr": ("HQR, trained", plots.ORANGE, "-"),
    "sqr": ("SQR", plots.BLUE, "-"),
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
            by_looks = [numbers.get(f"{cell}/{name}/vcmr_t{looks}") for looks in LOOKS]
            if None not in by_looks:
                axes.plot(LOOKS, [n.value for n in by_looks], line, color=colour, marker="o", label=label)
                low, high = zip(*(number.ci for number in by_looks), strict=True)
                axes.fill_between(LOOKS, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xticks(LOOKS)
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
