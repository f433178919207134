"""What the loop passes between its parts, what it records of an episode, and the JSON-lines file of records."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from vsr1 import cache, config
from vsr1.config import InputError
from vsr1.data import annotations
from vsr1.loop import replies

# --- Between the loop and the functions it is handed

ORIGINAL = ()  # the state of a query that nothing was added to


@dataclass(frozen=True)
class Cost:
    """What was spent. The seconds of a batch are shared evenly among its rows."""

    seconds: float = 0.0
    generated: int = 0  # tokens and latents that the policy decoded
    forward: int = 0  # positions that the policy computed, prompts included
    engine_calls: int = 0  # query vectors that the engine computed

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Ranking:
    """The gallery, ranked by one query vector."""

    rank: int | None  # of the right video, ties for us; None: that video has no vector
    ties: int | None  # wrong videos with exactly its score
    top: tuple[str, ...]  # best first, equal scores in gallery order; one more than there are turns
    score_gt: float | None
    score_top1: float


@dataclass(frozen=True)
class Verification:
    """The policy's reply to one query and one video."""

    reply: replies.Reply | None  # None: `problem` says why
    video_seconds: float | None = None
    cost: Cost = Cost()
    margin: float | None = None  # log P(matched) - log P(not_matched), nats; None: the reply has no verdict
    forced_span: tuple[float, float] | None = None  # seconds, see `Turn.forced_span_ms`
    state: object = None  # what `refine` needs of it, such as its KV cache; never recorded
    problem: str | None = None


@dataclass(frozen=True)
class Refinement:
    """A query to search with next, and its cost."""

    kind: str  # "sqr", "walkdown", "hqr-seen-append", ...
    state: object  # the query state that `search` takes; None: the reply gave nothing to refine with
    tokens: int | None = None  # N of SQR; text tokens between the tags of HQR
    tokens_tagged: int | None = None  # with <REFINE>, or with the two tags
    update: str | None = None  # in words (HQR)
    cost: Cost = Cost()
    by_depth: tuple = ()  # query states of the prefix sweep, 1 to N latents, the last equal to `state`


# --- The record


@dataclass(frozen=True)
class Run:
    """What all episodes of one run share."""

    dataset: str
    split: str
    method: str  # name of the system
    max_turns: int  # T
    carry_blocks: int  # C
    seed: int
    display_rule: str = "top1"  # see `episode.select_video`
    reuse: bool = True  # see `episode.run_episodes`


@dataclass(frozen=True)
class Turn:
    """One video shown to the policy, its reply, and the refined search after it if there was one.

    The span is clamped to [0, length of the shown video] here and nowhere else, then rounded to whole milliseconds.
    The right span is not clamped. `reply.span` keeps the times as they were written.
    `forced_span_ms` is what the reply names after `matched` in place of its verdict. It is decoded only where the
    right video was rejected, for in a wrong one no span counts.
    `rank_by_depth[d]` is the rank with the first d latents of this turn; d = 0 is the query before them: `rank_in`.
    (Where C = 1 the latents replace those of the turn before, and "without latents" could also mean the original
    query. That number is the episode's `rank_orig`.)
    """

    t: int  # from 1
    shown_id: str
    shown_is_gt: bool
    rank_in: int  # of the right video, in the ranking whose best video was shown
    ties_in: int
    score_gt: float
    score_top1: float
    reply: replies.Reply | None  # None: the video could not be read, the episode's `problem` says why
    span_ms: tuple[int, int] | None
    iou: float  # of `span_ms` and the right span, whatever the verdict; 0 without a span or in a wrong video
    verify_cost: Cost
    refine_kind: str | None = None
    refine_tokens: int | None = None
    refine_tokens_tagged: int | None = None
    update_text: str | None = None
    refine_cost: Cost = Cost()
    rank_out: int | None = None  # after the refined search; None: there was none
    ties_out: int | None = None
    top1_out: str | None = None
    rank_by_depth: tuple[int, ...] = ()
    top1_by_depth: tuple[str, ...] = ()
    reused: bool = False  # an earlier turn of this episode, recorded again: nothing was computed
    verdict_margin: float | None = None  # log P(matched) - log P(not_matched), nats; None: no verdict
    forced_span_ms: tuple[int, int] | None = None
    video_seconds: float | None = None  # length of the shown video; None: unknown


@dataclass(frozen=True)
class Episode:
    """One query from its first search to the end."""

    run: Run
    desc_id: int
    query: str
    gt_video: str
    gt_span_ms: tuple[int, int]
    rank_orig: int | None  # None: the right video has no vector
    turns: tuple[Turn, ...]
    stop_reason: str  # matched, no_refine, budget, exhausted (every video was rejected), problem
    problem: str | None = None


def with_refined_ranking(turn: Turn, ranking: Ranking) -> Turn:
    """Return `turn` with all its fields that say what the refined search found."""
    return replace(turn, rank_out=ranking.rank, ties_out=ranking.ties, top1_out=ranking.top[0])


def known_looks(episodes: list[Episode]) -> dict[tuple[int, str], Verification]:
    """Return {(query, video): what the policy made of it} of all turns; each `state` is that of a video alone.

    A greedy reply rests on the query as typed and the video alone, so another system with the same policy need not
    look again. What it cost is what it cost then.
    """
    looks = {}
    for episode in episodes:
        for turn in (turn for turn in episode.turns if turn.reply is not None and not turn.reused):
            span = turn.forced_span_ms and tuple(time / 1000 for time in turn.forced_span_ms)
            cost, margin = turn.verify_cost, turn.verdict_margin
            look = Verification(
                turn.reply, turn.video_seconds, cost, margin, span, (None, None, turn.shown_id)
            )
            looks[episode.desc_id, turn.shown_id] = look
    return looks


# --- Files


@dataclass(frozen=True)
class Header:
    """First line of a file of episodes."""

    format: Literal["vsr1 episodes"]
    version: Literal[2]  # 2: look_cost became verify_cost
    episodes: int  # lines that follow: a file cut at the end of a line is noticed
    run: Run


def write_episodes(path: Path, run: Run, episodes: list[Episode]) -> None:
    """Write a header line and one JSON object per episode to `path`, complete or not at all."""
    assert all(episode.run == run for episode in episodes), "episodes of several runs in one file"
    rows = [asdict(Header("vsr1 episodes", 2, len(episodes), run))]
    rows += [{key: value for key, value in asdict(episode).items() if key != "run"} for episode in episodes]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    cache.write_text(path, "\n".join(lines) + "\n")


def read_episodes(path: Path) -> list[Episode]:
    """Return the episodes of a file. Raises InputError that names the line where the file is damaged."""
    path = Path(path).resolve()  # the target of a link, so that the remedy works
    lines, _ = annotations.numbered_lines(annotations.read_text(path))
    try:
        return _parse_episodes(path, lines)
    except InputError as error:
        raise InputError(f"{error}; delete this file and run it again") from None


def _parse_episodes(path, lines):
    if not lines:
        raise InputError(f"{path}: empty")
    head, *rows = [annotations.parse_json(line, path, n, dict) for n, line in lines]
    header = config.parse(Header, head, f"{path}, line {lines[0][0]}")
    if len(rows) != header.episodes:
        raise InputError(f"{path}: {len(rows)} episodes, its first line says {header.episodes}")
    return [
        config.parse(Episode, row | {"run": head["run"]}, f"{path}, line {n}")
        for row, (n, _) in zip(rows, lines[1:], strict=True)
    ]
