"""The loop of the paper: retrieve, verify, refine, ground, and the record it leaves. No torch and no model in here.

METHOD section 2 is the definition. What was odd there is decided here, in the docstring of whoever it concerns:
`read_reply` (what a reply says), `choose` (which video is looked at), `run_episodes` (when a walk ends, what is reused)
and `Turn` (what is written down). `metrics` turns records into numbers, and can produce the other reading too.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from vsr1 import corpus, params
from vsr1.params import InputError

# --- What a reply says

REFINE = "<REFINE>"
VERDICTS = {"matched": True, "match": True}
VERDICTS |= dict.fromkeys(("not_matched", "mismatch", "notmatch", "not-matched"), False)
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"<\|\w+\|>|" + REFINE)

_THINK = r"<think>(?!\s*</think>)(?:(?!<(?:/?(?:think|answer|start|end|query_update)|REFINE)>).)+</think>"
_SPAN = r"\s*<start>[0-9]+(?:\.[0-9]+)?</start>\s*<end>[0-9]+(?:\.[0-9]+)?</end>"
_MATCHED, _NOT = rf"<answer>matched</answer>{_SPAN}", r"<answer>not_matched</answer>"
LAYOUTS = {  # METHOD sections 4 and 11; white space between the parts is free
    "plain": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT})\s*",
    "sqr": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT})\s*{REFINE}\s*",
    "hqr": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT}\s*<query_update>\s*[^\s<][^<]*</query_update>)\s*",
}


@dataclass(frozen=True)
class Reply:
    """One completion, read once. None means "not there" or "not readable"."""

    text: str  # special tokens kept, the closing <|im_end|> dropped
    ids: tuple[int, ...]  # as sampled, with the closing <|im_end|>
    matched: bool | None  # the verdict; None: none, or a word that is no verdict
    span: tuple[float, float] | None  # seconds, in order, not clamped; None unless both times are there
    has_refine: bool
    refine_misplaced: bool
    strict: bool  # the whole completion is one of the layouts it was asked for, and it ended by itself
    update: str | None  # a better query in words (HQR)
    ended: bool  # False: cut at the limit of new tokens


def read_reply(text: str, ids, *, layout="plain", refine_id: int | None = None, ended=True) -> Reply:
    """The one reading of a completion, for rewards and evaluation alike (METHOD section 2).

    What precedes the last `</think>` is dropped, then the first `<answer>`, `<start>`, `<end>` and `<query_update>`
    that is closed counts, and in a time the first finite number. Tags and verdicts are read in either case, blanks in a
    verdict as `_`. A reversed span is swapped. `<REFINE>` counts by its id, so letters that spell it do not; one that
    anything but special tokens follows is misplaced, even if another one stands at the end. Strictness is apart:
    `strict` says whether the reply is the layout to the letter; `matched is not None` is the tolerant count.

    >>> read_reply("<think> yes </think> <answer>Match</answer> <start>9.0 s</start> <end>3</end>", [7]).span
    (3.0, 9.0)
    >>> read_reply("<think> <answer>matched</answer> </think> <answer>not matched</answer>", [7]).matched
    False
    >>> read_reply("<answer>matched", [7]).matched is None
    True
    """
    said = text.rpartition("</think>")[2]
    times = [_number(inside("start", said)), _number(inside("end", said))]
    has_refine = refine_id is not None and refine_id in ids
    tail = SPECIAL.sub("", text.partition(REFINE)[2]).strip()
    strict = ended and re.fullmatch(LAYOUTS[layout], text, re.DOTALL) is not None
    return Reply(
        text=text,
        ids=tuple(ids),
        matched=VERDICTS.get("_".join((inside("answer", said) or "").lower().split())),
        span=None if None in times else (min(times), max(times)),
        has_refine=has_refine,
        refine_misplaced=has_refine and tail != "",
        strict=strict and (layout != "sqr" or has_refine),
        update=" ".join((inside("query_update", said) or "").split()) or None,
        ended=ended,
    )


def inside(tag: str, text: str) -> str | None:
    """What stands between the first `<tag>` that is closed and its `</tag>`; None without one.

    >>> inside("end", "<end><end> 4 </end>")
    ' 4 '
    """
    found = re.search(rf"<{tag}>([^<]*)</{tag}>", text, re.IGNORECASE)
    return found and found[1]


def _number(text):
    """The first finite number in a text; None without one. `1:30` is 1, `nan` and `1e999` are none."""
    numbers = (float(found[0]) for found in NUMBER.finditer(text or ""))
    return next((number for number in numbers if abs(number) < float("inf")), None)


# --- What the loop is handed, and hands on

AS_TYPED = ()  # the state of a query that nothing was added to


@dataclass(frozen=True)
class Cost:
    """What was spent. A batch's seconds are shared evenly among its rows."""

    seconds: float = 0.0
    generated: int = 0  # tokens and latents that the policy decoded
    forward: int = 0  # positions that the policy computed, prompts included
    engine_calls: int = 0  # query vectors that the engine made

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Ranking:
    """How the gallery stands to one query vector."""

    rank: int | None  # of the right video, ties for us; None: that video has no vector
    ties: int | None  # wrong videos with exactly its score
    top: tuple[str, ...]  # best first, equal scores in gallery order; one more than there are turns
    score_gt: float | None
    score_top1: float


@dataclass(frozen=True)
class Look:
    """What came of showing one video to the policy."""

    reply: Reply | None  # None: `problem` says why
    video_seconds: float | None = None
    cost: Cost = Cost()
    state: object = None  # whatever `refine` needs of it; never written down
    problem: str | None = None


@dataclass(frozen=True)
class Refinement:
    """A query to search with next, and what it took to make it."""

    kind: str  # "sqr", "walkdown", "hqr-seen-append", ...
    state: object  # what `search` takes; None: the reply gave nothing to refine with
    tokens: int | None = None  # N of SQR; text tokens between the tags of HQR
    tokens_tagged: int | None = None  # with <REFINE>, or with the two tags
    update: str | None = None  # in words (HQR)
    cost: Cost = Cost()
    by_depth: tuple = ()  # states of the prefix sweep, 1 to N latents, the last equal to `state`


# --- The record


@dataclass(frozen=True)
class Run:
    """What all episodes of one run share."""

    dataset: str
    split: str
    method: str  # system name of ARCHITECTURE section 5
    max_turns: int  # T
    carry_blocks: int  # C
    seed: int
    next_shown: str = "top1"  # see `choose`
    reuse: bool = True  # see `run_episodes`


@dataclass(frozen=True)
class Turn:
    """One look at one video, and the refined search after it if there was one.

    The span is clamped to [0, length of the shown video] here and nowhere else, then rounded to whole milliseconds; the
    right one is not clamped. `reply.span` keeps what was said. `rank_by_depth[d]` is the rank with the first d latents
    of this turn; d = 0 is the query before them, so `rank_in`. (Where C = 1 the latents replace those of the turn
    before, and "without latents" could also mean the plain query: that number is the episode's `rank_orig`.)
    """

    t: int  # from 1
    shown_id: str
    shown_is_gt: bool
    rank_in: int  # of the right video, in the ranking behind this look
    ties_in: int
    score_gt: float
    score_top1: float
    reply: Reply | None  # None: the video could not be read, the episode's `problem` says why
    span_ms: tuple[int, int] | None
    iou: float  # of `span_ms` and the right span, whatever the verdict; 0 without a span or in a wrong video
    look_cost: Cost
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
    reused: bool = False  # an earlier turn of this episode, met again: nothing was computed


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


@dataclass
class Walk:
    """An episode on its way."""

    query: corpus.Query
    rank_orig: int | None
    ranking: Ranking  # of the query as it now stands
    state: object = AS_TYPED  # of the query as it now stands
    turns: list[Turn] = field(default_factory=list)
    after: list = field(default_factory=list)  # (state, ranking) after each turn that searched again
    stop: str | None = None
    problem: str | None = None


# --- The loop


def run_episodes(queries, search, ask, refine, run: Run) -> list[Episode]:
    """Walk all queries in step through search, verdict and refinement; one Episode per query, in order.

    search([(query, state)]) -> [Ranking]; the first state is AS_TYPED, later ones are those of Refinements
    ask([(query, video id)]) -> [Look]
    refine([(query, look, state)]) -> [Refinement]; None in its place for systems that look once

    No function is handed an empty list. Unknown verdicts go on as not_matched ones do. At turn T the query is still
    refined and its ranking recorded, but nobody looks at the video. A query whose right video has no vector is not
    run, and a walk ends at a video that cannot be read; both say so in `problem` and count as failures.
    With `run.reuse` a video that is shown again gets its recorded turn again: exact where replies are greedy and only
    the latest refinement is carried, since a turn sees nothing but the query and the video.
    """
    assert run.carry_blocks == 1 or not run.reuse, (
        "older blocks are carried: a turn met again leads elsewhere"
    )
    first = _each(search, [(query, AS_TYPED) for query in queries])
    walks = [_start(query, ranking) for query, ranking in zip(queries, first, strict=True)]
    for t in range(1, run.max_turns + 1):
        shown = [(walk, video) for walk in walks if (video := _next_video(walk, run))]
        fresh = [(walk, video) for walk, video in shown if not (run.reuse and _met_again(walk, t, video))]
        looks = _each(ask, [(walk.query, video) for walk, video in fresh])
        for (walk, video), look in zip(fresh, looks, strict=True):
            walk.turns.append(_judged(walk, t, video, look))
            walk.stop = _verdict_stop(look, refine is not None)
        rejected = [(walk, look) for (walk, _), look in zip(fresh, looks, strict=True) if walk.stop is None]
        refined = _each(refine, [(walk.query, look, walk.state) for walk, look in rejected])
        _search_again([walk for walk, _ in rejected], refined, search)
    return [_episode(walk, run) for walk in walks]


def choose(top, rejected, next_shown="top1") -> str | None:
    """The video to show: the best one (the paper); None where nothing is left. The two options never alter ranks.

    skip_rejected     the best one not yet rejected in this episode; with a refinement that changes nothing this
                      walks down the ranking
    second_if_repeat  the second best, if the best was rejected the turn before (official "sequential")
    stop_at_repeat    None, if the best was rejected before: in training that state has been sampled already

    >>> [choose("abc", ["b", "a"], how) for how in ("top1", "skip_rejected", "second_if_repeat", "stop_at_repeat")]
    ['a', 'c', 'b', None]
    """
    if next_shown == "stop_at_repeat" and top[0] in rejected:
        return None
    if next_shown == "skip_rejected":
        return next((video for video in top if video not in rejected), None)
    if next_shown == "second_if_repeat" and rejected and top[0] == rejected[-1]:
        return (top[1:] or top)[0]  # a gallery of one video has no second
    assert next_shown in ("top1", "second_if_repeat", "stop_at_repeat"), next_shown
    return top[0] if top else None


def walk_down(rejected) -> list[Refinement]:
    """The refinement that changes nothing; with `skip_rejected` the next video of the first ranking is shown."""
    return [Refinement("walkdown", AS_TYPED, tokens=0, tokens_tagged=0) for _ in rejected]


def overlap(a, b) -> float:
    """Intersection over union of two moments in whole milliseconds; 0 where one is empty.

    >>> overlap((0, 10000), (7000, 10000)), overlap((5, 5), (0, 10))
    (0.3, 0.0)
    """
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return shared / (max(a[1], b[1]) - min(a[0], b[0])) if shared > 0 else 0.0


def milliseconds(span) -> tuple[int, int]:
    """A span in seconds as whole milliseconds."""
    return round(span[0] * 1000), round(span[1] * 1000)


def _each(function, items):
    """One result of `function` for each item; it is not called without any."""
    results = function(items) if items else []
    assert len(results) == len(items), f"{len(results)} results for {len(items)} rows"
    return results


def _start(query, ranking):
    """A walk at its first ranking; one without the right video in it goes nowhere."""
    lost = ranking.rank is None
    problem = f"{query.video}: the right video has no vector" if lost else None
    return Walk(query, ranking.rank, ranking, stop="problem" if lost else None, problem=problem)


def _next_video(walk, run):
    """The video a walk shows next; None if it has ended, or ends here because none is left."""
    if walk.stop is not None:
        return None
    video = choose(walk.ranking.top, [turn.shown_id for turn in walk.turns], run.next_shown)
    walk.stop = "exhausted" if video is None else None
    return video


def _met_again(walk, t, video):
    """Whether a turn showed `video` before. It is recorded once more then, from where the query now stands to where
    that turn led."""
    for turn, (state, ranking) in zip(walk.turns, walk.after, strict=True):
        if turn.shown_id == video:
            changes = _standing(walk.ranking) | {"look_cost": Cost(), "refine_cost": Cost(), "reused": True}
            if turn.rank_by_depth:
                changes["rank_by_depth"] = (walk.ranking.rank, *turn.rank_by_depth[1:])
                changes["top1_by_depth"] = (walk.ranking.top[0], *turn.top1_by_depth[1:])
            walk.turns.append(replace(turn, t=t, **changes))
            walk.after.append((state, ranking))
            walk.state, walk.ranking = state, ranking
            return True
    return False


def _standing(ranking):
    """The fields of a turn that say in which ranking its video was shown."""
    scores = {"score_gt": ranking.score_gt, "score_top1": ranking.score_top1}
    return {"rank_in": ranking.rank, "ties_in": ranking.ties} | scores


def _judged(walk, t, video, look):
    """The first half of a turn: what was shown, and what the reply made of it."""
    assert (look.reply is None) == (look.problem is not None), look
    right, span = video == walk.query.video, look.reply and look.reply.span
    if look.problem is not None:
        walk.problem = f"{video}: {look.problem}"
    if span is not None:
        end = float("inf") if look.video_seconds is None else look.video_seconds
        span = milliseconds([min(max(time, 0.0), end) for time in span])
    iou = overlap(span, milliseconds(walk.query.span)) if right and span is not None else 0.0
    said = {"reply": look.reply, "span_ms": span, "iou": iou, "look_cost": look.cost}
    return Turn(t, video, right, **_standing(walk.ranking), **said)


def _verdict_stop(look, can_refine):
    """Why a walk ends after a look; None: it goes on to refine."""
    if look.problem is not None:
        return "problem"
    if look.reply.matched:
        return "matched"
    return None if can_refine else "no_refine"


def _search_again(walks, refined, search):
    """The second half of a turn: search with each refined query, and each step of its prefix sweep, in one call."""
    states = [() if step.state is None else (*step.by_depth[:-1], step.state) for step in refined]
    pairs = [(walk.query, state) for walk, own in zip(walks, states, strict=True) for state in own]
    found = iter(_each(search, pairs))
    for walk, step, own in zip(walks, refined, states, strict=True):
        rankings = [walk.ranking, *islice(found, len(own))]  # with none of this turn's latents, with 1, 2, ..
        walk.turns[-1] = replace(walk.turns[-1], **_refined(step, rankings))
        if step.state is None:
            walk.stop = "no_refine"
        else:
            walk.state, walk.ranking = step.state, rankings[-1]
            walk.after.append((walk.state, walk.ranking))


def _refined(step, rankings):
    """The fields of a turn that say how the query was refined, and what the search with it gave."""
    fields = {"refine_kind": step.kind, "update_text": step.update, "refine_cost": step.cost}
    fields |= {"refine_tokens": step.tokens, "refine_tokens_tagged": step.tokens_tagged}
    if step.state is not None:
        last = rankings[-1]
        fields |= {"rank_out": last.rank, "ties_out": last.ties, "top1_out": last.top[0]}
    if step.by_depth:
        fields["rank_by_depth"] = tuple(ranking.rank for ranking in rankings)
        fields["top1_by_depth"] = tuple(ranking.top[0] for ranking in rankings)
    return fields


def _episode(walk, run):
    query, stop = walk.query, walk.stop or "budget"
    known = (query.id, query.text, query.video, milliseconds(query.span))
    return Episode(run, *known, walk.rank_orig, tuple(walk.turns), stop, walk.problem)


# --- Files

FORMAT, VERSION = "vsr1 episodes", 1


@dataclass(frozen=True)
class Header:
    """First line of a file of episodes."""

    format: str
    version: int
    episodes: int  # lines that follow: a file cut at the end of a line is noticed
    run: Run


def write_episodes(path: Path, run: Run, episodes: list[Episode]) -> None:
    """A header line, then one JSON object per episode; complete or not at all."""
    assert all(episode.run == run for episode in episodes), "episodes of several runs in one file"
    rows = [asdict(Header(FORMAT, VERSION, len(episodes), run))]
    rows += [{key: value for key, value in asdict(episode).items() if key != "run"} for episode in episodes]
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a file; what is damaged is an InputError that names the line."""
    path = Path(path).resolve()  # what a link names, so that the remedy works
    lines, _ = corpus.numbered_lines(corpus.read_text(path))
    remedy = "delete this file and run it again"
    if not lines:
        raise InputError(f"{path}: empty; {remedy}")
    head = corpus.parse_json(lines[0][1], path, lines[0][0])
    if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (FORMAT, VERSION):
        raise InputError(
            f"{path}, line {lines[0][0]}: not a header of {FORMAT!r} version {VERSION}; {remedy}"
        )
    header = params.record(Header, head, f"{path}, line {lines[0][0]}")
    episodes, seen = [], {}
    for n, line in lines[1:]:
        row = corpus.parse_json(line, path, n)
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {n}: not an episode; {remedy}")
        episodes.append(params.record(Episode, row | {"run": head["run"]}, f"{path}, line {n}"))
        if (first := seen.setdefault(episodes[-1].desc_id, n)) != n:
            raise InputError(f"{path}, line {n}: its desc_id stands on line {first} already; {remedy}")
    if len(episodes) != header.episodes:
        raise InputError(f"{path}: {len(episodes)} episodes, its first line says {header.episodes}; {remedy}")
    return episodes
