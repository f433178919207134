"""The loop of the paper: retrieve, verify, refine, ground, and the record it leaves. No torch and no model in here.

METHOD section 2 is the definition. What was odd there is decided here, in the docstring of whoever it concerns:
`read_reply` (what a reply says), `choose` (which video is looked at), `run_episodes` (when a walk ends, what is reused)
and `Turn` (what is written down). `metrics` turns records into numbers, and can produce the other reading too.
"""

from dataclasses import dataclass, field, replace
from itertools import islice

from vsr1.data import annotations
from vsr1.loop import records


@dataclass
class EpisodeState:
    """An episode on its way."""

    query: annotations.Query
    rank_orig: int | None
    ranking: records.Ranking  # of the query as it now stands
    state: object = records.ORIGINAL  # of the query as it now stands
    turns: list[records.Turn] = field(default_factory=list)
    after: list = field(default_factory=list)  # (state, ranking) after each turn that searched again
    stop: str | None = None
    problem: str | None = None


# --- The loop


def run_episodes(queries, search, ask, refine, run: records.Run) -> list[records.Episode]:
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
    first = _each(search, [(query, records.ORIGINAL) for query in queries])
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


def select_video(top, rejected, display_rule="top1") -> str | None:
    """The video to show: the best one (the paper); None where nothing is left. The two options never alter ranks.

    skip_rejected     the best one not yet rejected in this episode; with a refinement that changes nothing this
                      walks down the ranking
    stop_at_repeat    None, if the best was rejected before: in training that state has been sampled already

    >>> [select_video("abc", ["b", "a"], rule) for rule in ("top1", "skip_rejected", "stop_at_repeat")]
    ['a', 'c', None]
    """
    if display_rule == "stop_at_repeat" and top[0] in rejected:
        return None
    if display_rule == "skip_rejected":
        return next((video for video in top if video not in rejected), None)
    assert display_rule in ("top1", "stop_at_repeat"), display_rule
    return top[0] if top else None


def rank_fallback(rejected) -> list[records.Refinement]:
    """The refinement that changes nothing; with `skip_rejected` the next video of the first ranking is shown."""
    return [records.Refinement("walkdown", records.ORIGINAL, tokens=0, tokens_tagged=0) for _ in rejected]


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
    return EpisodeState(query, ranking.rank, ranking, stop="problem" if lost else None, problem=problem)


def _next_video(walk, run):
    """The video a walk shows next; None if it has ended, or ends here because none is left."""
    if walk.stop is not None:
        return None
    video = select_video(walk.ranking.top, [turn.shown_id for turn in walk.turns], run.display_rule)
    walk.stop = "exhausted" if video is None else None
    return video


def _met_again(walk, t, video):
    """Whether a turn showed `video` before. It is recorded once more then, from where the query now stands to where
    that turn led."""
    for turn, (state, ranking) in zip(walk.turns, walk.after, strict=True):
        if turn.shown_id == video:
            changes = _standing(walk.ranking) | {
                "look_cost": records.Cost(),
                "refine_cost": records.Cost(),
                "reused": True,
            }
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
    return records.Turn(t, video, right, **_standing(walk.ranking), **said)


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
    return records.Episode(run, *known, walk.rank_orig, tuple(walk.turns), stop, walk.problem)
