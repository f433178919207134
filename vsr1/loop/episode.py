"""Run the loop of the paper: retrieve, verify, refine, ground. It is handed functions and knows no model.

The definition is docs/method.md section 2. Where that leaves a choice, the docstring of the function that makes it
says so: `replies.read_reply` (what a reply says), `select_video` (which video is shown), `run_episodes` (when an
episode ends, which turns are reused) and `records.Turn` (what is recorded).
"""

from dataclasses import dataclass, field, replace
from itertools import islice

from vsr1.data import annotations
from vsr1.loop import moments, records

NO_COST = {"verify_cost": records.Cost(), "refine_cost": records.Cost()}


@dataclass
class EpisodeState:
    """An episode that is still running."""

    query: annotations.Query
    rank_orig: int | None
    ranking: records.Ranking  # of the query as it now stands
    query_state: object = records.ORIGINAL
    turns: list[records.Turn] = field(default_factory=list)
    after: list = field(default_factory=list)  # (query state, ranking) after each turn that searched again
    stop: str | None = None
    problem: str | None = None


# --- The loop


def run_episodes(queries, search, ask, refine, run: records.Run) -> list[records.Episode]:
    """Run all queries in step through search, verification and refinement; return one Episode per query, in order.

    search  [(query, query state)] -> [Ranking]; the first state is ORIGINAL, later ones are those of Refinements
    ask     [(query, video id)] -> [Verification]
    refine  [(query, Verification, query state)] -> [Refinement]; None for systems that have one turn

    No function is handed an empty list. An unknown verdict is treated as not_matched. At turn T the query is still
    refined and its ranking recorded, but its video is not shown. A query whose right video has no vector is not run,
    and an episode ends at a video that cannot be read. Both say so in `problem` and count as failures.
    With `run.reuse` a video that is shown again gets its recorded turn again. This is exact where replies are greedy
    and only the latest refinement is carried, since a turn depends on nothing but the query and the video.
    """
    assert run.carry_blocks == 1 or not run.reuse, (
        "with older blocks carried a turn met again leads elsewhere"
    )
    first = _call(search, [(query, records.ORIGINAL) for query in queries])
    episodes = [_start(query, ranking) for query, ranking in zip(queries, first, strict=True)]
    for t in range(1, run.max_turns + 1):
        _run_turn(t, episodes, search, ask, refine, run)
    return [_finish(episode, run) for episode in episodes]


def _run_turn(t, episodes, search, ask, refine, run):
    """Run turn `t` of all episodes that have not ended.

    A Verification may hold the KV cache of its whole batch. None of them outlives this function, so the next turn
    does not need memory for two.
    """
    shown = [(episode, video) for episode in episodes if (video := _next_video(episode, run))]
    unseen = [
        (episode, video) for episode, video in shown if not (run.reuse and _reuse_turn(episode, t, video))
    ]
    verifications = _call(ask, [(episode.query, video) for episode, video in unseen])
    rejected = []
    for (episode, video), verification in zip(unseen, verifications, strict=True):
        episode.turns.append(_verified_turn(episode, t, video, verification))
        episode.stop = _stop_reason(verification, refine is not None)
        if episode.stop is None:
            rejected.append((episode, verification))
    verified = [(episode.query, verification, episode.query_state) for episode, verification in rejected]
    refinements = _call(refine, verified)
    _search_again([episode for episode, _ in rejected], refinements, search)


def select_video(top, rejected, display_rule) -> str | None:
    """Return the video to show: the best one (the paper), or None where nothing is left. Ranks are never altered.

    skip_rejected   the best one not yet rejected in this episode; with a refinement that changes nothing this is
                    the rank fallback
    stop_at_repeat  None if the best was rejected before: in training that state has been sampled already

    >>> [select_video("abc", ["b", "a"], rule) for rule in ("top1", "skip_rejected", "stop_at_repeat")]
    ['a', 'c', None]
    """
    assert display_rule in ("top1", "skip_rejected", "stop_at_repeat"), display_rule
    if display_rule == "skip_rejected":
        return next((video for video in top if video not in rejected), None)
    if not top or (display_rule == "stop_at_repeat" and top[0] in rejected):
        return None
    return top[0]


def rank_fallback(rejected) -> list[records.Refinement]:
    """Leave each query as it is; with `skip_rejected` the next video of the first ranking is shown."""
    return [records.Refinement("walkdown", records.ORIGINAL, tokens=0, tokens_tagged=0) for _ in rejected]


def _call(function, items):
    """Return one result of `function` for each item; it is not called without any."""
    results = function(items) if items else []
    assert len(results) == len(items), f"{len(results)} results for {len(items)} items"
    return results


def _start(query, ranking):
    """Return an episode at its first ranking; one whose right video has no vector ends there."""
    episode = EpisodeState(query, ranking.rank, ranking)
    if ranking.rank is None:
        episode.stop, episode.problem = "problem", f"{query.video}: the right video has no vector"
    return episode


def _next_video(episode, run):
    """Return the video an episode shows next; None if it has ended, or ends here because no video is left."""
    if episode.stop is not None:
        return None
    rejected = [turn.shown_id for turn in episode.turns]
    video = select_video(episode.ranking.top, rejected, run.display_rule)
    if video is None:
        episode.stop = "exhausted"
    return video


def _reuse_turn(episode, t, video):
    """Record the turn that showed `video` earlier once more, at the present ranking; return whether there is one."""
    for turn, (query_state, ranking) in zip(episode.turns, episode.after, strict=True):
        if turn.shown_id == video:
            changes = _present_ranking(episode) | NO_COST | {"reused": True}
            if turn.rank_by_depth:
                changes["rank_by_depth"] = (episode.ranking.rank, *turn.rank_by_depth[1:])
                changes["top1_by_depth"] = (episode.ranking.top[0], *turn.top1_by_depth[1:])
            episode.turns.append(replace(turn, t=t, **changes))
            episode.after.append((query_state, ranking))
            episode.query_state, episode.ranking = query_state, ranking
            return True
    return False


def _present_ranking(episode):
    """Return the fields of a turn that say how its video was found."""
    ranking = episode.ranking
    return {
        "rank_in": ranking.rank,
        "ties_in": ranking.ties,
        "score_gt": ranking.score_gt,
        "score_top1": ranking.score_top1,
    }


def _verified_turn(episode, t, video, verification):
    """Return the first half of a turn: the video that was shown, the verdict and the span."""
    reply, seconds = verification.reply, verification.video_seconds
    assert (reply is None) == (verification.problem is not None), verification
    if reply is None:
        episode.problem = f"{video}: {verification.problem}"
    right = video == episode.query.video
    span = None if reply is None else _clamp(reply.span, seconds)
    return records.Turn(
        t,
        video,
        right,
        **_present_ranking(episode),
        reply=reply,
        span_ms=moments.span_ms(span),
        iou=float(moments.span_iou(span, episode.query.span)) if right and span is not None else 0.0,
        verify_cost=verification.cost,
        verdict_margin=verification.margin,
        forced_span_ms=moments.span_ms(_clamp(verification.forced_span, seconds)),
        video_seconds=seconds,
    )


def _clamp(span, seconds):
    """Return a span inside a video of so many seconds, if they are known; None without a span."""
    end = float("inf") if seconds is None else seconds
    return None if span is None else [min(max(time, 0.0), end) for time in span]


def _stop_reason(verification, can_refine):
    """Return why an episode ends after a verification; None: it goes on to refine."""
    if verification.problem is not None:
        return "problem"
    if verification.reply.matched:
        return "matched"
    return None if can_refine else "no_refine"


def _search_again(episodes, refinements, search):
    """Search with each refined query, and each step of its prefix sweep, in one call: the second half of a turn."""
    states = [() if step.state is None else (*step.by_depth[:-1], step.state) for step in refinements]
    pairs = [
        (episode.query, state) for episode, sweep in zip(episodes, states, strict=True) for state in sweep
    ]
    results = iter(_call(search, pairs))
    for episode, step, sweep in zip(episodes, refinements, states, strict=True):
        # With no latents of this turn, with 1, 2, ..
        rankings = [episode.ranking, *islice(results, len(sweep))]
        episode.turns[-1] = _refined_turn(episode.turns[-1], step, rankings)
        if step.state is None:
            episode.stop = "no_refine"
        else:
            episode.query_state, episode.ranking = step.state, rankings[-1]
            episode.after.append((step.state, rankings[-1]))


def _refined_turn(turn, step, rankings):
    """Return a turn with its second half: how the query was refined, and what the search with it gave."""
    turn = replace(
        turn,
        refine_kind=step.kind,
        update_text=step.update,
        refine_cost=step.cost,
        refine_tokens=step.tokens,
        refine_tokens_tagged=step.tokens_tagged,
    )
    if step.by_depth:
        turn = replace(
            turn,
            rank_by_depth=tuple(ranking.rank for ranking in rankings),
            top1_by_depth=tuple(ranking.top[0] for ranking in rankings),
        )
    return turn if step.state is None else records.with_refined_ranking(turn, rankings[-1])


def _finish(episode, run):
    """Return the record of an episode; one that was not stopped has used up its turns."""
    query = episode.query
    return records.Episode(
        run,
        query.id,
        query.text,
        query.video,
        moments.span_ms(query.span),
        episode.rank_orig,
        tuple(episode.turns),
        stop_reason=episode.stop or "budget",
        problem=episode.problem,
    )
