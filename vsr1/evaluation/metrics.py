"""Measure rankings, verdicts and moments, as docs/method.md section 7 and docs/data.md section 4 define it.

Numbers about a set of queries are percent of ALL its queries: a query that was not answered counts as wrong.
No queries is an assertion, never 0.0. Nothing here reads files; randomness comes in as `rng`.

    P  ranked predictions of one query, best first      hit   (Q, P) this prediction is right
    place  position in a list, from 1                   right (Q, P) it names the right video
"""

from dataclasses import replace

import numpy as np

from vsr1.loop.moments import overlap, span_iou
from vsr1.loop.records import Cost

CUT = 100  # a list of predictions is cut here before anything else
VR_KS = (1, 5, 10, 100)  # K of R@K
THRESHOLDS = (0.3, 0.5, 0.7)  # m of IoU=m
RANDOM_DRAWS = 100  # of the floor of random spans
UNRANKED = np.iinfo(np.int64).max  # the place of an answer that is not in the list
# Times lie on a 0.1 s grid, so overlaps fall exactly on a threshold often, and float64 puts some of them just
# below it. An overlap of times in whole milliseconds that is not on a threshold is much farther from it.
IOU_EPS = 1e-9


# --- Overlap of two moments


def span_iou_as_written(a, b, float32=False):
    """Return the IoU of times as a submission writes them, which need not be whole milliseconds.

    With `float32` every step is rounded as TVR's evaluator rounds it, bit for bit.

    >>> truth, answers = (14.2, 23.0), [(10.1, 27.7), (16.5, 20.9), (17.5, 25.2)]  # all exactly 1/2
    >>> [bool(reaches(span_iou_as_written(answer, truth), 0.5)) for answer in answers]
    [True, True, True]
    >>> [bool(reaches(span_iou_as_written(answer, truth, float32=True), 0.5)) for answer in answers]
    [True, False, False]
    """
    dtype = np.float32 if float32 else np.float64
    with np.errstate(over="ignore", invalid="ignore"):  # 1e300 is a number, if a silly one, and a miss
        return overlap(
            np.asarray(a, dtype=np.float64).astype(dtype), np.asarray(b, dtype=np.float64).astype(dtype)
        )


def reaches(iou, threshold):
    """Return whether an overlap is at least the threshold, which is inclusive; shape of `iou`.

    >>> bool(reaches(0.3, 0.3)), bool(reaches(0.0, 1e-12))
    (True, False)
    """
    iou = np.asarray(iou)
    bar = np.float32(threshold) if iou.dtype == np.float32 else threshold - IOU_EPS
    return (iou > 0) & (iou >= bar)


# --- Ranks: from the scores of a whole gallery, or from a list of predictions


def first_place(hit, counted):
    """Return the place of the first hit among the predictions that take a place, (Q,); UNRANKED without a hit.

    >>> hit = np.array([[False, False, True]])
    >>> first_place(hit, np.array([[True, True, True]])), first_place(hit, np.array([[False, True, True]]))
    (array([3]), array([2]))
    """
    assert hit.shape == counted.shape and not (hit & ~counted).any(), "a hit that takes no place"
    return np.where(hit, np.cumsum(counted, axis=1), UNRANKED).min(axis=1)


def vr_ranks(right):
    """Return the place of the right video in each list, (Q,). A video that is listed twice takes two places."""
    return first_place(right, np.ones_like(right))


def vcmr_ranks(right, iou, threshold):
    """Return the place of the first prediction with the right video and enough overlap, (Q,)."""
    return first_place(right & reaches(iou, threshold), np.ones_like(right))


def svmr_ranks(right, iou, threshold):
    """Return the same with the video given: only predictions in the right video take a place, (Q,)."""
    return first_place(right & reaches(iou, threshold), right)


# --- Percent of queries


def percent(values):
    """Return the mean of one value per query, truth values or parts in [0, 1], in percent.

    >>> percent([True, False, False, False]), percent([0.5, 1.0])
    (25.0, 75.0)
    """
    assert len(values), "a share of no queries is undefined, not zero"
    return float(np.sum(values)) / len(values) * 100


def recall_at(ranks, k):
    """Return R@k: percent of the queries whose right answer stands at place k or before.

    >>> recall_at(np.array([1, 3, UNRANKED]), 1) == 1 / 3 * 100
    True
    """
    return percent(np.asarray(ranks) <= k)


# --- Floors


def chance_recall(videos, k):
    """Return VR R@k of a random ranking of a gallery, percent.

    >>> round(chance_recall(1334, 100), 2), chance_recall(20, 100)
    (7.5, 100.0)
    """
    assert videos > 0, "a gallery without videos has no chance"
    return min(k / videos, 1.0) * 100


def grounding(answers, truth):
    """Return `grounding@m` and `miou`, percent, of one answer per query in its right video; both (Q, 2) seconds."""
    iou = span_iou(answers, truth)  # (Q,)
    return {f"grounding@{m}": percent(reaches(iou, m)) for m in THRESHOLDS} | {"miou": percent(iou)}


def whole_video_floor(durations, truth):
    """Return `grounding` of the answer [0, duration]; (Q,) and (Q, 2) seconds.

    >>> whole_video_floor([10, 10], [(0, 5), (2, 4)])
    {'grounding@0.3': 50.0, 'grounding@0.5': 50.0, 'grounding@0.7': 0.0, 'miou': 35.0}
    """
    durations = np.asarray(durations, dtype=np.float64)
    return grounding(np.stack([np.zeros_like(durations), durations], axis=1), truth)


def random_span_floor(durations, truth, *, rng):
    """Return `grounding` of an answer with two uniform times in [0, duration], a mean over RANDOM_DRAWS draws."""
    durations = np.asarray(durations, dtype=np.float64)
    trials = [
        grounding(np.sort(rng.random((len(durations), 2)), axis=1) * durations[:, None], truth)
        for _ in range(RANDOM_DRAWS)
    ]
    return {name: sum(trial[name] for trial in trials) / RANDOM_DRAWS for name in trials[0]}


# --- Episodes: the last executed turn counts


def within(episodes, budget):
    """Return the episodes of the same run with at most `budget` turns; the last of them is carried forward.

    This is exact, since a run refines at its last turn too: the record of a longer run holds all of a shorter one.
    """
    assert budget > 0 and all(episode.run.max_turns >= budget for episode in episodes), budget
    return [_truncate(episode, budget) for episode in episodes]


def _truncate(episode, budget):
    turns, stop = episode.turns, episode.stop_reason
    run = replace(episode.run, max_turns=budget)
    if len(turns) > budget or (len(turns) == budget and stop == "exhausted"):  # it did not end by itself
        return replace(episode, run=run, turns=turns[:budget], stop_reason="budget", problem=None)
    return replace(episode, run=run)


def headline(profile, episodes):
    """Return the episodes `within` the number of turns that headline numbers count; shorter runs stay as they are."""
    return within(episodes, min(profile.headline_turns, episodes[0].run.max_turns)) if episodes else []


def failed(episodes):
    """Return the episodes whose first search did not have the right video on rank 1."""
    return [episode for episode in episodes if episode.rank_orig != 1]


def refined(episodes):
    """Return the episodes whose first turn rejected its video and searched again."""
    return [episode for episode in episodes if episode.turns and episode.turns[0].rank_out is not None]


def true_ranks(episodes, which="final"):
    """Return the rank of the right video, (Q,), ties for us; UNRANKED where it has no vector.

    final  after the last executed refinement: the official convention of T turns and up to T + 1 searches
    orig   of the original query
    """
    assert which in ("final", "orig"), which
    return np.array([_true_rank(episode, which) for episode in episodes], np.int64)


def _true_rank(episode, which):
    if not episode.turns:
        assert episode.rank_orig is None, episode.desc_id
        return UNRANKED
    turn = episode.turns[0 if which == "orig" else -1]
    return turn.rank_out if which == "final" and turn.rank_out is not None else turn.rank_in


def ranks_at_depth(episodes, depth):
    """Return the rank of the right video after turn 1 with the first soft tokens of its refinement, (Q,).

    Without a refinement it is that of the first search. So no tokens give the original query for all.

    depth(n)  how many of the n soft tokens
    """
    ranks = true_ranks(episodes, "orig")
    for row, episode in enumerate(episodes):
        if episode.turns and (by_depth := episode.turns[0].rank_by_depth):
            ranks[row] = by_depth[depth(len(by_depth) - 1)]
    return ranks


def vr_hits(episodes, k, which="final"):
    """Return whether the right video is on rank k or better, (Q,): VR R@k."""
    return true_ranks(episodes, which) <= k


def moment_ious(episodes):
    """Return the IoU of the last span, (Q,), whatever the verdict; 0 in a wrong video or without a span."""
    return np.array([episode.turns[-1].iou if episode.turns else 0.0 for episode in episodes])


def vcmr_hits(episodes, threshold):
    """Return whether the last verdict is matched, on the right video, with enough overlap, (Q,): VCMR R@1.

    A last verdict of not_matched, or none, is a miss even if the right video was shown: nothing is forced.
    """
    matched = np.array([verdict(episode, -1) is True for episode in episodes], bool)
    return matched & reaches(moment_ious(episodes), threshold)


def verdict(episode, turn):
    """Return the verdict of a turn: True, False, or None where it cannot be read or there is no such turn."""
    reply = episode.turns[turn].reply if episode.turns else None
    return None if reply is None else reply.matched


def ver_hits(episodes, turn=-1):
    """Return whether the verdict of a turn (-1: the last, 0: the first) fits the video shown, (Q,): VER.

    An unknown verdict is wrong, and so is a query that was not run.
    """
    verdicts = [verdict(episode, turn) for episode in episodes]
    shown = [bool(episode.turns) and episode.turns[turn].shown_is_gt for episode in episodes]
    return np.array([judged is right for judged, right in zip(verdicts, shown, strict=True)], bool)


def right_last(episodes):
    """Return whether the video shown last is the right one, (Q,), whatever was said about it."""
    return np.array([bool(episode.turns) and episode.turns[-1].shown_is_gt for episode in episodes], bool)


def costs(episodes):
    """Return the mean costs of a run; None where nothing was spent on. A reused turn refines, at no cost.

    tokens, tokens_tagged  mean over all turns that searched again: N, or text tokens, without and with their tags
    refine_seconds         mean over the refinements that were computed
    seconds, generated, forward, engine_calls, turns   mean of an episode; its first search is an engine call
    """
    turns = [turn for episode in episodes for turn in episode.turns]
    again = [turn for turn in turns if turn.rank_out is not None]
    paid = [turn.refine_cost.seconds for turn in turns if turn.refine_kind is not None and not turn.reused]
    spent = [cost for turn in turns for cost in (turn.verify_cost, turn.refine_cost)]
    each = {key: sum(getattr(cost, key) for cost in spent) / len(episodes) for key in vars(Cost())}
    return {
        "tokens": _mean([turn.refine_tokens for turn in again]),
        "tokens_tagged": _mean([turn.refine_tokens_tagged for turn in again]),
        "refine_seconds": _mean(paid),
        "turns": len(turns) / len(episodes),
        "reused": _mean([turn.reused for turn in turns]),
        **{key: value + (key == "engine_calls") for key, value in each.items()},
    }


def _mean(values):
    return sum(values) / len(values) if values else None


def hits(episodes, ks=VR_KS):
    """Return {metric: one truth value per query}, under the names that numbers.json has.

    The plain names are the headline variants. `vr@1_failed` is about the queries whose first search failed: its
    array is shorter, and empty where there are none.
    """
    values = {f"vcmr@{m}": vcmr_hits(episodes, m) for m in THRESHOLDS}
    values |= {"ver": ver_hits(episodes), "ver_turn1": ver_hits(episodes, 0)}
    values["right_last"] = right_last(episodes)
    for which, suffix in {"final": "", "orig": "_orig"}.items():
        values |= {f"vr@{k}{suffix}": vr_hits(episodes, k, which) for k in ks}
    return values | {"vr@1_failed": vr_hits(failed(episodes), 1)}
