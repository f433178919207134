"""Reward the turns of an episode, and turn rewards into advantages."""

from dataclasses import dataclass

import numpy as np

from vsr1.loop import records
from vsr1.training import common

EPS = 1e-4  # beside a standard deviation, as in TRL


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the parts of a turn's reward (docs/method.md section 6, the official values)."""

    verification: float
    format: float
    refine_token: float
    grounding: float
    retrieval: float


REWARD_WEIGHTS = {"charades": RewardWeights(1.6, 0.1, 0.1, 0.35, 0.8)}
REWARD_WEIGHTS |= dict.fromkeys(("didemo", "activitynet"), RewardWeights(1.2, 0.1, 0.8, 0.45, 0.8))
NO_REFINE = {"charades": 0.0, "didemo": -0.3, "activitynet": -0.3}  # official, for "delta" only


def reward_parts(episode: records.Episode, retrievals: list, retrieval_reward="exp") -> list[dict]:
    """Return {part: value} of each turn of an episode whose video could be read, before weighting.

    retrievals  (p_positive, p_positive_before) of each of these turns: the softmax probability of the right video
                after the refinement and for the original query; (None, None) without <REFINE>

    verification  +1 for a right verdict on the video shown, -1 for a wrong or unreadable one
    format        1 where the reply is the layout asked for, to the letter
    refine_token  1 where it says <REFINE>
    grounding     the overlap that the episode ends with, if it ends in the right video, for every turn whose own
                  verdict was right: a rejection that leads there shares in it. Nothing is summed over turns, so that
                  longer episodes do not pay.
    retrieval     exp(-L_ret), which is p_positive; "delta": less that of the original query (official)
    """
    last = episode.turns[-1] if episode.turns else None
    overlap = last.iou if last and last.reply and last.reply.matched and last.shown_is_gt else 0.0
    parts = []
    for turn, (after, before) in zip(episode.turns, retrievals, strict=False):
        right = turn.reply.matched is not None and turn.reply.matched == turn.shown_is_gt
        retrieval = 0.0 if after is None else after
        if retrieval_reward == "delta":
            retrieval = NO_REFINE.get(episode.run.dataset, 0.0) if after is None else after - before
        parts.append(
            {
                "verification": 1.0 if right else -1.0,
                "format": float(turn.reply.strict),
                "refine_token": float(turn.reply.has_refine),
                "grounding": overlap if right else 0.0,
                "retrieval": retrieval,
            }
        )
    return parts


def advantages(rewards, groups, reward_std: float | None = None, over=None) -> list[float | None]:
    """Return (reward - mean) / (std + 1e-4) within each group; None in a group of one, which nothing is compared with.

    over        values whose standard deviation divides; None: the rewards themselves
    reward_std  the same for all groups; None: the standard deviation of each. Dividing by its own gives a group that
                differs only by retrieval noise the same weight as one with right and wrong verdicts.

    >>> [a and round(a, 2) for a in advantages([1.0, 3.0, 2.0, 5.0], ["a", "a", "b", "c"])]
    [-0.71, 0.71, None, None]
    """
    assert len(rewards) == len(groups), f"{len(rewards)} rewards in {len(groups)} groups"
    rewards = np.array(rewards)
    over = rewards if over is None else np.array(over)
    values = [None] * len(rewards)
    for rows in common.rows_by_group(groups).values():
        if len(rows) == 1:
            continue
        std = over[rows].std(ddof=1) if reward_std is None else reward_std
        for row in rows:
            values[row] = float((rewards[row] - rewards[rows].mean()) / (std + EPS))
    return values


def component_advantages(
    parts: list[dict], weights: RewardWeights, groups, reward_std: float | None = None, decoupled=False
) -> list[dict | None]:
    """Return {component: what it adds to the advantage} of each reward; None in a group of one.

    parts      {component: value} of each, before weighting
    decoupled  False: they add up to `advantages` of the weighted sums. True: each component is compared by itself, over
               its own standard deviation in the group, then weighted (GDPO), so that one that varies little counts as
               much as one that varies a lot.

    >>> parts = [{"verification": 1.0, "retrieval": 0.1}, {"verification": -1.0, "retrieval": 0.2}]
    >>> weights = RewardWeights(1.0, 0, 0, 0, 1.0)
    >>> for decoupled in (False, True):
    ...     first = component_advantages(parts, weights, "aa", decoupled=decoupled)[0]
    ...     print({name: round(value, 2) for name, value in first.items()})
    {'verification': 0.74, 'retrieval': -0.04}
    {'verification': 0.71, 'retrieval': -0.71}
    """
    names = list(parts[0]) if parts else []
    weight = {name: getattr(weights, name) for name in names}
    totals = [sum(weight[name] * part[name] for name in names) for part in parts]
    scale = () if decoupled else (reward_std, totals)
    columns = {}
    for name in names:
        unweighted = advantages([part[name] for part in parts], groups, *scale)
        columns[name] = [value if value is None else weight[name] * value for value in unweighted]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [None if None in row.values() else row for row in rows]


def variance_shares(components: list[dict | None]) -> dict[str, float]:
    """Return which share of the variance of advantages each component carries; they add up to 1. {} without any.

    A share is the covariance with the sum over the variance of the sum: below 0 where a component works against it.
    """
    rows = [row for row in components if row is not None]
    if len(rows) < 2:
        return {}
    values = np.array([list(row.values()) for row in rows])  # (S, components)
    total = values.sum(axis=1)
    if total.var() < 1e-12:
        return {}
    shares = ((values - values.mean(axis=0)) * (total - total.mean())[:, None]).mean(axis=0) / total.var()
    return dict(zip(rows[0], shares.tolist(), strict=True))
