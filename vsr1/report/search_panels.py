"""Draw whole searches: frames, replies and ranks, turn by turn (F1, F6, F7, A3 to A7)."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.loop import replies
from vsr1.loop.records import Episode, Turn
from vsr1.mini import captions, teacher, world
from vsr1.mini.world import ATTRIBUTES
from vsr1.report import plots, qualitative
from vsr1.report.canvas import COLUMN, COLUMNS, GAP, MARGIN, Canvas, Strip
from vsr1.report.plots import BLACK, BLUE, GREEN, GREY, ORANGE, RED

VIOLET = "#7b3294"  # of verdicts, as in the paper
BOLD, ITALIC, STRUCK = {"weight": "bold"}, {"style": "italic"}, {"struck": True}
LONGEST = 330  # letters of a reply's reasoning that are shown


class FrameSource:
    """Frames of one data set's videos, and what is to be seen in them where they were rendered."""

    def __init__(self, profile: Profile, dataset: str, reader: video_reader.Reader):
        self.dataset, self.folder, self.reader = dataset, profile.data_dir(dataset) / "videos", reader
        self.scenes = world.read_scenes(profile.data_dir(dataset) / "corpus") if profile.world else {}
        self.seconds = {}  # of the videos that were read

    def moments(self, episode: Episode, video: str):
        """Return the moment that a query describes and the nearest one of a video; None, None for real video."""
        query_moment = qualitative.find_query_moment(episode, self.scenes)
        return query_moment, qualitative.closest(query_moment, video, self.scenes)

    def lacks(self, episode: Episode, video: str) -> dict[str, str]:
        """Return {what a query asks for: what a video has in its place}, in words."""
        return qualitative.contrast(*self.moments(episode, video))

    def reasoning(self, episode: Episode, turn: Turn, max_letters: int | None = None):
        """Return the steps of a reply with what is false of each, as `qualitative.reasoning` does."""
        return qualitative.reasoning(turn, *self.moments(episode, turn.shown_id), max_letters)

    def count_statements(self, episode: Episode) -> tuple[int, int] | None:
        """Count what the replies of a search state, and what of it is false; None where no truth is known."""
        if not self.scenes:
            return None
        errors = [
            step_errors
            for turn in episode.turns
            for step, _, step_errors in self.reasoning(episode, turn)
            if teacher.read_statement(step)
        ]
        return len(errors), sum(map(bool, errors))

    def strip(self, episode: Episode, video: str, count: int) -> Strip:
        """Return frames of the query's moment, in a wrong video of the nearest one, or all along a real one."""
        path = annotations.find_videos(self.folder, [video])[0].path
        if path is None:
            return Strip(None, None, video, problem="no such file")
        clip = self.reader.read(path)
        if clip.problem is not None:
            return Strip(None, None, video, problem=clip.problem)
        self.seconds[video] = clip.seconds
        _, near = self.moments(episode, video)
        right = video == episode.gt_video
        span = (near.start, near.end) if near else (0.0, clip.seconds)
        span = tuple(np.array(episode.gt_span_ms) / 1000) if right else span
        start, end = (min(time, clip.seconds) for time in span)  # the truth may end behind the video
        clip = self.reader.read(path, start + (end - start) * (np.arange(count) + 0.5) / count)
        return Strip(clip.frames, clip.timestamps, video, span if right else None, clip.problem)


# --- Parts


def _query(canvas, source, episode):
    """Draw the query on top, in bold what the first video lacks of it; return the y below."""
    canvas.write(MARGIN, 0.08, 3, [(f"{source.dataset}, query {episode.desc_id}", {"color": GREY})])
    pieces = _highlight(episode.query, source.lacks(episode, episode.turns[0].shown_id))
    bottom = canvas.write(2 * MARGIN, 0.36, canvas.width - 4 * MARGIN, pieces, 12)
    canvas.box(MARGIN, 0.3, canvas.width - 2 * MARGIN, bottom + 0.06)
    return bottom + 0.18


def _highlight(text, phrases, props=None):
    """Return pieces of a text, in bold those phrases that stand in it."""
    return [(piece, BOLD if match else props or {}) for piece, match in qualitative.pieces(text, phrases)]


def _video(canvas, x, y, source, episode, video, heading):
    """Draw frames of a video under a heading, with what a wrong one has instead; return the y below."""
    kind = _kind(source, episode, video, BLACK)
    y = canvas.write(x, y, COLUMN, [(f"{heading}: ", BOLD), kind]) + 0.06
    return canvas.frames(x + 0.04, y, source.strip(episode, video, 3), 1.0, dashed=video == episode.gt_video)


def _kind(source, episode, video, wrong_colour):
    """Return the piece of text that says whether a video is the right one, and what a wrong one has instead."""
    if video == episode.gt_video:
        return "right video", {"color": GREEN} | BOLD
    return qualitative.describe_wrong(source.lacks(episode, video)), {"color": wrong_colour}


def _reply(canvas, x, y, source, episode, turn):
    """Draw the reply to a video and what was done next in a box; return the y below."""
    top, inner, left = y, COLUMN - 0.2, x + 0.1
    if turn.reused:
        first = next(before.t for before in episode.turns if before.shown_id == turn.shown_id)
        again = f"Turn {turn.t} is turn {first} again, reply and next query; {qualitative.ranks(turn)}."
        y = canvas.write(left, y + 0.06, inner, [(again, ITALIC)])
    else:
        steps = source.reasoning(episode, turn, LONGEST)
        y = canvas.write(left, y + 0.06, inner, [piece for step in steps for piece in _step(*step)])
        y = canvas.write(left, y + 0.02, inner, _verdict(turn))
        y = _next(canvas, left, y + 0.02, inner, source, episode, turn)
    canvas.box(x, top, COLUMN, y + 0.05)
    return y + 0.17


def _step(step, amiss, errors):
    """Return the pieces of one step: bold where it ends with "no", struck through and corrected where it is false."""
    ink = BOLD if amiss else {}
    false = {"color": RED} | STRUCK
    return [(step, ink | false), (f" ({errors}) ", ITALIC)] if errors else [(f"{step} ", ink)]


def _verdict(turn):
    """Return the verdict of a reply and whether it is right, in words and with a mark."""
    word = {True: "matched", False: "not_matched", None: "no readable verdict"}[turn.reply.matched]
    right = turn.reply.matched is not None and turn.reply.matched == turn.shown_is_gt
    mark = (" ✓ correct", {"color": GREEN}) if right else (" ✗ wrong", {"color": RED})
    return [(word, {"color": VIOLET} | BOLD), mark]


def _next(canvas, x, y, width, source, episode, turn: Turn):
    """Draw soft tokens or a rewrite, and the ranks around them; or the named moment, on a bar; return the y below."""
    ranks = qualitative.ranks(turn)
    if turn.rank_out is not None and turn.update_text is None:
        canvas.write(x, y, width, [(replies.REFINE, BOLD)])
        end = canvas.soft_tokens(x + 0.75, y + 0.02, turn.refine_tokens)
        return canvas.write(end, y, width, [(f"{turn.refine_tokens} soft tokens; {ranks}", {})])
    if turn.rank_out is not None:
        update = _highlight(turn.update_text, source.lacks(episode, episode.turns[0].shown_id), ITALIC)
        return canvas.write(x, y, width, [("rewritten: ", BOLD), *update, (f" {ranks}", {})])
    return _moment(canvas, x, y, width, source, episode, turn, "moment")


def _moment(canvas, x, y, width, source, episode, turn, label, size=8.5, with_iou=True):
    """Draw the moment that a reply names, with the right one on a bar; return the y below."""
    if not turn.reply.matched or turn.span_ms is None:
        return canvas.write(x, y, width, [("nothing to search or to answer with", {"color": RED})], size)
    named, right = np.array(turn.span_ms) / 1000, np.array(episode.gt_span_ms) / 1000
    text = f"{label} {named[0]:.1f} to {named[1]:.1f} s"
    if turn.shown_is_gt:
        text += f" (right: {right[0]:.1f} to {right[1]:.1f} s)" + f", IoU {turn.iou:.2f}" * with_iou
    y = canvas.write(x, y, width, [(text, {})], size)
    seconds = source.seconds.get(turn.shown_id) if turn.shown_is_gt else None
    return canvas.timeline(x, y + 0.04, width, seconds, right, named) if seconds else y


def _end(episode):
    """Say how a search ended."""
    last = episode.turns[-1]
    ranks = f"right video from rank {episode.rank_orig} to {qualitative.rank(episode)}"
    if last.reply.matched and last.shown_is_gt:
        return [("✓ found: ", BOLD | {"color": GREEN}), (ranks, {})]
    return [("⚠ not found: ", BOLD | {"color": RED}), (ranks, {})]


# --- Figures


@plots.style()
def turn_by_turn(columns: dict[str, tuple[Episode, tuple[Turn, ...]]], source: FrameSource) -> Figure:
    """Draw the query, the first video and the right one, then a column of turns under each heading.

    columns   {heading: (episode, those of its turns that stand below)}; the episodes share query and first video
    """
    canvas, ends = Canvas(), []
    first, _ = next(iter(columns.values()))
    top = _query(canvas, source, first)
    pair = ((first.turns[0].shown_id, "turn 1, rank 1"), (first.gt_video, f"rank {first.rank_orig}"))
    bottoms = [_video(canvas, x, top, source, first, *video) for x, video in zip(COLUMNS, pair, strict=True)]
    y = max(bottoms) + 0.1
    for x, (heading, (episode, turns)) in zip(COLUMNS, columns.items(), strict=True):
        below = canvas.write(x, y, COLUMN, [(heading, BOLD)], 11) + 0.05
        for turn in turns:
            if turn.t > 1 and not turn.reused:
                label = f"turn {turn.t}, rank 1"
                below = _video(canvas, x, below, source, episode, turn.shown_id, label) + 0.02
            below = _reply(canvas, x, below, source, episode, turn)
        if turns[-1] is episode.turns[-1]:
            below = canvas.write(x, below, COLUMN, _end(episode), 9.5)
        ends.append(below)
    middle = COLUMNS[1] - GAP / 2
    canvas.axes.plot((middle, middle), (y, max(ends)), color=GREY, linewidth=0.8)
    return canvas.crop(max(ends) + 0.1)


NARROW = 5.4  # inches: read on a phone at about 80 pixels each, so its smallest letters are 10 points


@plots.style()
def one_search(episode: Episode, source: FrameSource) -> Figure:
    """Draw F1, turn below turn: the query, then each video with what the reply states of it, and what follows."""
    canvas = Canvas(NARROW)
    inner, left = NARROW - 2 * MARGIN, MARGIN
    query = _highlight(episode.query, source.lacks(episode, episode.turns[0].shown_id))
    y = canvas.write(left + 0.1, 0.16, inner - 0.2, [("query: ", {"color": GREY}), *query], 12)
    canvas.box(left, 0.08, inner, y + 0.04)
    y += 0.2
    for turn in episode.turns:
        kind = _kind(source, episode, turn.shown_id, RED)
        y = canvas.write(left, y, inner, [(f"Turn {turn.t}. Found first: ", BOLD), kind], 11) + 0.08
        strip, frame_width = source.strip(episode, turn.shown_id, 4), (inner - 0.21) / 4
        top = y = canvas.frames(left + 0.03, y, strip, frame_width, dashed=turn.shown_is_gt) + 0.04
        y = _statements(canvas, left + 0.1, y + 0.05, inner - 0.2, source, episode, turn)
        y = canvas.write(left + 0.1, y, inner - 0.2, [("verdict: ", {}), *_verdict(turn)], 11)
        y = _then(canvas, left + 0.1, y + 0.02, inner - 0.2, source, episode, turn)
        canvas.box(left, top, inner, y + 0.04)
        y += 0.2
    return canvas.crop(y)


def _statements(canvas, x, y, width, source, episode, turn):
    """Draw the reasoning of a reply: its statements in two columns, true (✓) or false (✗), below what else it says.

    Without a known truth all of it is one paragraph. Returns the y below.
    """
    steps = source.reasoning(episode, turn, LONGEST)
    stated, other = [], []
    for step in steps:
        statement = teacher.read_statement(step[0]) if source.scenes else None
        (stated if statement else other).append((statement, step))
    if other:
        y = canvas.write(x, y, width, [piece for _, step in other for piece in _step(*step)], 10)
    half, ends = math.ceil(len(stated) / 2), [y]
    for column in (stated[:half], stated[half:]):
        below = y
        for statement, (_, _, errors) in column:
            below = canvas.write(x, below, width / 2 - 0.05, _stated(statement, errors), 10)
        x, ends = x + width / 2, [*ends, below]
    return max(ends) + 0.02


def _stated(statement, errors):
    """Return the pieces of one statement: its mark, what it says is shown, and the truth where it is false."""
    compared = (
        statement.shown_word if statement.same else f"{statement.shown_word}, not {statement.query_word}"
    )
    text = f"{statement.attribute}: {compared}"
    if errors:
        truth = f" ({errors.partition(';')[0]})"
        return [("✗ ", {"color": RED}), (text, {"color": RED} | STRUCK), (truth, ITALIC)]
    return [("✓ ", {"color": GREEN}), (text, {} if statement.same else BOLD)]


def _then(canvas, x, y, width, source, episode, turn):
    """Draw what follows a verdict, soft tokens and a new rank, or the moment on a bar; return the y below."""
    if turn.rank_out is not None:
        end = canvas.soft_tokens(x, y + 0.05, turn.refine_tokens)
        text = f"{turn.refine_tokens} soft tokens; right video: {qualitative.ranks(turn)}"
        return canvas.write(end, y, width - end + x, [(text, {"color": BLUE})], 10)
    return _moment(canvas, x, y, width, source, episode, turn, "moment:", 10, with_iou=False)


LINES = ((RED, "D"), (ORANGE, "^"), (GREEN, "*"))  # of the video found first, of the next, of the right one


@plots.style()
def by_soft_tokens(episode: Episode, source: FrameSource, ranks: dict[str, list[int]]) -> Figure:
    """Draw F6: three videos and what they have of the query, beside their ranks by number of soft tokens.

    ranks   {video: its rank with 0, 1, .. N soft tokens}, in the order in which they are on rank 1
    """
    canvas = Canvas()
    top = y = _query(canvas, source, episode)
    for n, (video, (colour, _)) in enumerate(zip(ranks, LINES, strict=False), 1):
        right = video == episode.gt_video
        name = f"video {n}" + ", the right one" * right
        y = canvas.write(MARGIN, y, 3, [(name, BOLD | {"color": colour})], 10) + 0.06
        below = canvas.frames(MARGIN + 0.04, y, source.strip(episode, video, 2), 0.95, dashed=right)
        query_moment, shown_moment = source.moments(episode, video)
        for attribute in ATTRIBUTES if query_moment else ():
            has = getattr(query_moment, attribute) == getattr(shown_moment, attribute)
            text = f"{'✓' if has else '✗'} {captions.phrase(attribute, shown_moment)}"
            y = canvas.write(2.35, y, 2, [(text, {"color": GREEN if has else RED})])
        y = max(y, below) + 0.08
    figure = canvas.crop(y)
    box = np.array((4.75, 0.55, 4.05, y - top - 0.9)) / (canvas.width, y, canvas.width, y)
    _rank_curves(figure.add_axes(box), ranks)
    return figure


def _rank_curves(axes, ranks):
    """Draw ranks by number of soft tokens, the best on top; bands say which video is on rank 1."""
    worst = max(map(max, ranks.values()))
    for n, (line, (colour, marker)) in enumerate(zip(ranks.values(), LINES, strict=True), 1):
        size = 9 if marker == "*" else 5
        axes.plot(line, marker=marker, color=colour, markersize=size, label=f"video {n}")
        for depth in np.flatnonzero(np.array(line) == 1):
            axes.axvspan(depth - 0.5, depth + 0.5, color=colour, alpha=0.12, linewidth=0)
    axes.plot(line.index(1), 1, "o", markersize=16, fillstyle="none", color=GREEN)
    axes.set(xlabel="soft tokens in the query", ylabel="rank", xlim=(-0.5, len(line) - 0.5))
    axes.set_ylim(worst + 1, 1 - worst / 20)  # best on top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = 5 * math.ceil(worst / 50)
    axes.set_yticks([1, *range(step, worst + 1, step)])
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
