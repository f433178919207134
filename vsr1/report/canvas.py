"""Paper to draw searches on: text that wraps, frames, replies in boxes; and the plates that `plates` publishes."""

import math
import re
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.experiments import common
from vsr1.loop import replies
from vsr1.loop.records import Episode, Turn
from vsr1.mini import captions, teacher, world
from vsr1.mini.world import ATTRIBUTES
from vsr1.report import plots, qualitative
from vsr1.report.plots import BLACK, BLUE, GREY, ORANGE, RED, SKY

VIOLET = "#7b3294"  # of verdicts, as in the paper
BOLD = {"weight": "bold"}
LONGEST = 330  # letters of a reply's reasoning that are shown
DASHED = {"fill": False, "edgecolor": RED, "linestyle": "--", "linewidth": 1.4}  # the right video and moment
MARGIN, HALF, GAP = 0.15, 4.25, 0.2  # inches: two columns
COLUMNS = (MARGIN, MARGIN + HALF + GAP)


class Sheet:
    """White paper measured in inches from its top left corner; as long as what is drawn on it."""

    def __init__(self, width: float = 2 * (MARGIN + HALF) + GAP):
        self.width, self.figure = width, Figure(figsize=(width, 1))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.pen = FigureCanvasAgg(self.figure).get_renderer()

    def cut(self, height: float) -> Figure:
        """The figure, this long."""
        self.axes.set(xlim=(0, self.width), ylim=(height, 0))
        self.figure.set_size_inches(self.width, height)
        return self.figure

    def words(self, x: float, y: float, width: float, pieces: list[tuple[str, dict]], size=8.5) -> float:
        """Pieces of (text, its look) as one wrapped paragraph; the y where it ends."""
        left, line = x, size * 1.4 / 72
        for text, look in pieces:
            shape = {key: value for key, value in look.items() if key != "color"}
            font = FontProperties(size=size, **shape)
            for word in re.findall(r"\s+|\S{1,40}", text):
                blank = word.isspace()
                pixels, _, _ = self.pen.get_text_width_height_descent(" " if blank else word, font, False)
                wide = pixels / self.figure.dpi
                if not blank and x < left and left + wide > x + width + 0.02:
                    left, y = x, y + line
                if not blank:
                    ink = look.get("color", BLACK)
                    place = left, y + 0.72 * line
                    self.axes.text(*place, word, fontproperties=font, color=ink, parse_math=False)
                left += 0 if blank and left == x else wide
        return y + line

    def frames(self, x: float, y: float, strip: plots.Strip | None, each: float, right: bool) -> float:
        """Frames side by side with their seconds below; of the right video in dashed red, its moment underlined."""
        if strip is None:
            return self.words(x, y, HALF, [("this video cannot be read", {"color": RED})])
        high = each * strip.frames.shape[1] / strip.frames.shape[2]
        for n, (frame, seconds) in enumerate(zip(strip.frames, strip.timestamps, strict=True)):
            left = x + n * (each + 0.05)
            self.axes.imshow(frame, extent=(left, left + each, y + high, y), aspect="auto")
            inside = right and strip.span[0] <= seconds <= strip.span[1]
            look = {"size": 7.5, "ha": "center", "weight": "bold" if inside else "normal"}
            self.axes.text(left + each / 2, y + high + 0.15, f"{seconds:.1f} s", **look)
            if inside:
                self.axes.plot((left, left + each), (y + high + 0.02,) * 2, color=RED, linewidth=2.5)
        if right:
            wide = len(strip.frames) * (each + 0.05) + 0.03
            self.axes.add_patch(Rectangle((x - 0.04, y - 0.04), wide, high + 0.25, **DASHED))
        return y + high + 0.28

    def box(self, x: float, top: float, width: float, bottom: float) -> None:
        """A rounded box behind what stands there already."""
        look = {"boxstyle": "round,pad=0,rounding_size=0.08", "edgecolor": GREY, "facecolor": "#f6f6f6"}
        self.axes.add_patch(FancyBboxPatch((x, top), width, bottom - top, zorder=0, linewidth=0.8, **look))

    def chips(self, x: float, y: float, count: int) -> float:
        """Soft tokens as small squares of two colours; the x where they end."""
        for n in range(count):
            self.axes.add_patch(Rectangle((x + 0.15 * n, y), 0.12, 0.12, facecolor=(ORANGE, SKY)[n % 2]))
        return x + 0.15 * count + 0.05

    def bar(self, x: float, y: float, width: float, seconds: float, right, said) -> float:
        """The length of a video with the right moment (dashed red) and the named one (orange), in seconds."""
        self.axes.add_patch(Rectangle((x, y), width, 0.12, facecolor="#dddddd"))
        for span, look in ((said, {"facecolor": ORANGE}), (right, DASHED)):
            start, end = (min(time, seconds) * width / seconds for time in span)
            self.axes.add_patch(Rectangle((x + start, y), end - start, 0.12, **look))
        return y + 0.2


class Films:
    """Frames of one data set's videos, and what is to be seen in them where they were rendered."""

    def __init__(self, profile: Profile, dataset: str, reader: video_reader.Reader):
        self.dataset, self.folder, self.reader = dataset, profile.data_dir(dataset) / "videos", reader
        self.scenes = world.read_scenes(profile.data_dir(dataset) / "corpus") if profile.world else {}
        self.seconds = {}  # of the videos that were read

    def moments(self, one: Episode, video: str):
        """What a query asks for and what of it a video has: two rendered moments; None, None for real video."""
        asked = qualitative.asked_for(one, self.scenes)
        return asked, teacher.closest(asked, self.scenes[video].moments) if asked else None

    def lacks(self, one: Episode, video: str) -> dict[str, str]:
        """{what a query asks for: what a video has in its place}, in words."""
        return qualitative.contrast(*self.moments(one, video))

    def strip(self, one: Episode, video: str, count: int) -> plots.Strip | None:
        """Frames of the moment of a query, in a wrong video of what is nearest to it, or all along a real one; None
        where the video cannot be read."""
        path = annotations.find_videos(self.folder, [video])[0].path
        clip = None if path is None else self.reader.read(path)
        if clip is None or clip.problem is not None:
            return None
        self.seconds[video] = clip.seconds
        _, near = self.moments(one, video)
        span = (near.start, near.end) if near else (0.0, clip.seconds)
        span = tuple(np.array(one.gt_span_ms) / 1000) if video == one.gt_video else span
        times = common.moments_to_see(span, clip.seconds, count)[1:-1]
        clip = self.reader.read(path, times)
        return plots.Strip(clip.frames, clip.timestamps, video, span) if clip.problem is None else None


# --- Parts of a plate


def _query(sheet, films, one):
    """The query on top, with the words in bold blue that the first video lacks; the y below."""
    sheet.words(MARGIN, 0.08, 3, [(f"{films.dataset}, query {one.desc_id}", {"color": GREY})])
    lacks = films.lacks(one, one.turns[0].shown_id)
    bottom = sheet.words(2 * MARGIN, 0.36, sheet.width - 4 * MARGIN, _marked(one.query, lacks), 12)
    sheet.box(MARGIN, 0.3, sheet.width - 2 * MARGIN, bottom + 0.06)
    return bottom + 0.18


def _marked(text, phrases, look=None):
    """Pieces of a text, those phrases in bold blue that stand in it."""
    return [
        (p, {"color": BLUE} | BOLD if found else look or {}) for p, found in qualitative.pieces(text, phrases)
    ]


def _strips(sheet, y, films, one, shown, width=HALF, each=1.0, count=3):
    """Videos side by side under their headings, with what wrong ones have instead; the y below.

    shown   [(x, video, heading)]
    """
    below = []
    for x, video, head in shown:
        lacks = [f"{seen}, not {asked}" for asked, seen in films.lacks(one, video).items()]
        said = "wrong video" + ": " * bool(lacks) + "; ".join(lacks)
        said, ink = ("right video", RED) if video == one.gt_video else (said, BLACK)
        below.append(sheet.words(x, y, width, [(f"{head}: ", BOLD), (said, {"color": ink})]) + 0.06)
    top = max(below)
    strips = [(x + 0.04, films.strip(one, video, count), video == one.gt_video) for x, video, _ in shown]
    return max(sheet.frames(x, top, strip, each, right) for x, strip, right in strips)


def _reply(sheet, x, y, films, one, turn, width=HALF):
    """What was said to a video and done next, in a box; the y below."""
    top, inner, left = y, width - 0.2, x + 0.1
    if turn.reused:
        first = next(before.t for before in one.turns if before.shown_id == turn.shown_id)
        again = f"Look {turn.t} is look {first} again, reply and next query; {qualitative.ranks(turn)}."
        y = sheet.words(left, y + 0.06, inner, [(again, {"style": "italic"})])
    else:
        y = sheet.words(left, y + 0.06, inner, _thought(turn))
        y = sheet.words(left, y + 0.02, inner, _verdict(turn))
        y = _next(sheet, left, y + 0.02, inner, films, one, turn)
    sheet.box(x, top, width, y + 0.05)
    return y + 0.17


def _thought(turn):
    """The reasoning of a reply, its steps in red that found something amiss."""
    steps = qualitative.steps(textwrap.shorten(qualitative.thought(turn), LONGEST, placeholder=" …"))
    return [(f"{step} ", {"color": RED} if amiss else {}) for step, amiss in steps]


def _verdict(turn):
    """The verdict of a reply and whether it is right, in words and with a mark."""
    word = {True: "matched", False: "not_matched", None: "no readable verdict"}[turn.reply.matched]
    fits = turn.reply.matched is not None and turn.reply.matched == turn.shown_is_gt
    return [(word, {"color": VIOLET} | BOLD), (" ✓ rightly" if fits else " ✗ wrongly", {})]


def _next(sheet, x, y, width, films, one, turn: Turn):
    """Soft tokens or other words, and the ranks around them; or the moment, on a bar. The y below."""
    if turn.rank_out is not None and turn.update_text is None:
        sheet.words(x, y, width, [(replies.REFINE, BOLD)])
        end = sheet.chips(x + 0.75, y + 0.02, turn.refine_tokens)
        return sheet.words(
            end, y, width, [(f"{turn.refine_tokens} soft tokens; {qualitative.ranks(turn)}", {})]
        )
    if turn.rank_out is not None:
        update = _marked(turn.update_text, films.lacks(one, one.turns[0].shown_id), {"style": "italic"})
        return sheet.words(x, y, width, [("rewritten: ", BOLD), *update, (f" {qualitative.ranks(turn)}", {})])
    if not turn.reply.matched or turn.span_ms is None:
        return sheet.words(x, y, width, [("nothing to search or to answer with", {"color": RED})])
    said, right = np.array(turn.span_ms) / 1000, np.array(one.gt_span_ms) / 1000
    told = f"moment {said[0]:.1f} to {said[1]:.1f} s"
    told += f" (right: {right[0]:.1f} to {right[1]:.1f} s), IoU {turn.iou:.2f}" if turn.shown_is_gt else ""
    y = sheet.words(x, y, width, [(told, {})])
    seconds = films.seconds.get(turn.shown_id) if turn.shown_is_gt else None
    return sheet.bar(x, y + 0.04, width, seconds, right, said) if seconds else y


# --- Plates


@plots.style()
def pair(soft: Episode, hard: Episode, films: Films) -> Figure:
    """One first look, then HQR on the left and SQR on the right, look by look."""
    sheet = Sheet()
    first = ((soft.turns[0].shown_id, "look 1, rank 1"), (soft.gt_video, f"rank {soft.rank_orig}"))
    shown = [(x, *video) for x, video in zip(COLUMNS, first, strict=True)]
    y, ends = _strips(sheet, _query(sheet, films, soft), films, soft, shown) + 0.1, []
    for x, one, name in zip(COLUMNS, (hard, soft), ("Hard", "Soft"), strict=True):
        below = sheet.words(x, y, HALF, [(f"{name} query refinement", BOLD)], 11) + 0.05
        for turn in one.turns:
            if turn.t > 1 and not turn.reused:
                look = [(x, turn.shown_id, f"look {turn.t}, rank 1")]
                below = _strips(sheet, below, films, one, look) + 0.02
            below = _reply(sheet, x, below, films, one, turn)
        ends.append(sheet.words(x, below, HALF, _end(one), 9.5))
    middle = COLUMNS[1] - GAP / 2
    sheet.axes.plot((middle, middle), (y, max(ends)), color=GREY, linewidth=0.8)
    return sheet.cut(max(ends) + 0.1)


def _end(one):
    """How a search ended."""
    last = one.turns[-1]
    found = bool(last.reply.matched and last.shown_is_gt)
    told = "✓ found: " if found else "⚠ not found: "
    ranks = f"right video from rank {one.rank_orig} to {qualitative.rank(one)}"
    return [(told, BOLD | {"color": BLUE if found else RED}), (ranks, {})]


@plots.style()
def teaser(one: Episode, films: Films, rejected: int | None) -> Figure:
    """F1: two looks side by side, each at the first video of its ranking.

    rejected   rank of the first video after the refinement; None: not known
    """
    sheet, wrong, half = Sheet(), one.turns[0].shown_id, HALF / 2
    top = _query(sheet, films, one)
    heads = "the query as it was typed", f"the query and {one.turns[0].refine_tokens} soft tokens"
    after = f"rank {rejected}" if rejected else "rejected"
    first = (wrong, "rank 1"), (one.gt_video, f"rank {one.rank_orig}")
    then, shown = ((one.gt_video, "rank 1"), (wrong, after)), []
    for x, turn, head, videos in zip(COLUMNS, one.turns, heads, (first, then), strict=True):
        y = sheet.words(x, top, HALF, [(f"Turn {turn.t}: {head}", BOLD)], 11) + 0.05
        shown += [(x, *videos[0]), (x + half + 0.08, *videos[1])]
    y = _strips(sheet, y, films, one, shown, half - 0.1, 0.95, 2) + 0.05
    return sheet.cut(
        max(_reply(sheet, x, y, films, one, turn) for x, turn in zip(COLUMNS, one.turns, strict=True))
    )


LINES = ((RED, "D"), (ORANGE, "^"), (BLUE, "*"))  # of the video found first, of the next, of the right one


@plots.style()
def growing(one: Episode, films: Films, ranks: dict[str, list[int]]) -> Figure:
    """F6: three videos and what they have of the query on the left, their ranks by number of latents on the right.

    ranks   {video: its rank with 0, 1, .. N latents}, in the order in which they are on rank 1
    """
    sheet = Sheet()
    top = y = _query(sheet, films, one)
    for n, video in enumerate(ranks, 1):
        name = f"video {n}" + ", the right one" * (video == one.gt_video)
        y = sheet.words(MARGIN, y, 3, [(name, BOLD | {"color": LINES[n - 1][0]})], 10) + 0.06
        below = sheet.frames(MARGIN + 0.04, y, films.strip(one, video, 2), 0.95, video == one.gt_video)
        asked, seen = films.moments(one, video)
        for attribute in ATTRIBUTES if asked else ():
            has = getattr(asked, attribute) == getattr(seen, attribute)
            told = f"{'✓' if has else '✗'} {captions.phrase(attribute, seen)}"
            y = sheet.words(2.35, y, 2, [(told, {"color": BLUE if has else RED})])
        y = max(y, below) + 0.08
    figure = sheet.cut(y)
    place = np.array((4.75, 0.55, 4.05, y - top - 0.9)) / (sheet.width, y, sheet.width, y)
    _curves(figure.add_axes(place), ranks)
    return figure


def _curves(axes, ranks):
    """Ranks by number of latents, the best on top; bands say who is on rank 1, a circle since when the last one is."""
    worst = max(map(max, ranks.values()))
    for n, (line, (colour, mark)) in enumerate(zip(ranks.values(), LINES, strict=True), 1):
        axes.plot(line, marker=mark, color=colour, markersize=9 if mark == "*" else 5, label=f"video {n}")
        for depth in np.flatnonzero(np.array(line) == 1):
            axes.axvspan(depth - 0.5, depth + 0.5, color=colour, alpha=0.12, linewidth=0)
    axes.plot(line.index(1), 1, "o", markersize=16, fillstyle="none", color=RED)
    axes.set(xlabel="soft tokens in the query", ylabel="rank", xlim=(-0.5, len(line) - 0.5))
    axes.set_ylim(worst + 1, 1 - worst / 20)  # best on top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = 5 * math.ceil(worst / 50)
    axes.set_yticks([1, *range(step, worst + 1, step)])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
