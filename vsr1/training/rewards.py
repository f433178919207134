"""Rewards, advantages and the clipped objective of GRPO."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from vsr1.loop import records

# --- rewards and advantages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardWeights:
    """Of the parts of a turn's reward (METHOD.md 6.1, the official values)."""

    verify: float
    form: float
    refine: float
    time: float
    retrieve: float


REWARD_WEIGHTS = {"charades": RewardWeights(1.6, 0.1, 0.1, 0.35, 0.8)}
REWARD_WEIGHTS |= dict.fromkeys(("didemo", "activitynet"), RewardWeights(1.2, 0.1, 0.8, 0.45, 0.8))
NO_REFINE = {"charades": 0.0, "didemo": -0.3, "activitynet": -0.3}  # official, for "delta" only


def reward_parts(one: records.Episode, rows: list, retrieval_reward="exp") -> list[dict]:
    """{part: value} of each turn of an episode, before weighting.

    verify    +1 for a right verdict on the video shown, -1 for a wrong or unreadable one
    form      1 where the reply is the asked layout to the letter
    refine    1 where it says <REFINE>
    retrieve  exp(-L_ret), the softmax probability of the right video after the refinement; "delta": less that of the
              query as typed (official)
    time      the overlap that the episode ends with, if it ends in the right video, for every turn whose own verdict
              was right: a rejection that leads there shares in it. Nothing is summed over turns: long does not pay.
    """
    last, parts = one.turns[-1] if one.turns else None, []
    outcome = last.iou if last and last.reply and last.reply.matched and last.shown_is_gt else 0.0
    for turn, row in zip(one.turns, rows, strict=False):  # an unreadable video has a turn and no row
        right = turn.reply.matched is not None and turn.reply.matched == turn.shown_is_gt
        gained = 0.0 if row.chance is None else row.chance
        if retrieval_reward == "delta":
            gained = NO_REFINE.get(one.run.dataset, 0.0) if row.chance is None else row.chance - row.before
        parts.append(
            {
                "verify": 1.0 if right else -1.0,
                "form": float(turn.reply.strict),
                "refine": float(turn.reply.has_refine),
                "time": outcome if right else 0.0,
                "retrieve": gained,
            }
        )
    return parts


def group_key(row: dict) -> tuple:
    """Return what compared rows have in common, their prompt: the start of their episode, the turn and the video shown.

    It names the start, not the query: a query that stands among the starts twice was shown two videos.
    """
    return row["group"], row["t"], row["shown"]


def advantages(rewards, groups, spread: float | None = None) -> list[float | None]:
    """(reward - mean) / (spread + 1e-4) within each group; None for a group of one, which has nothing to compare with.

    spread  the same for all groups; None: the standard deviation of each. Over its own, a group whose members differ
            by the noise of a search alone counts as much as one in which half are right.

    >>> [a and round(a, 2) for a in advantages([1.0, 3.0, 2.0, 5.0], ["a", "a", "b", "c"])]
    [-0.71, 0.71, None, None]
    """
    count = Counter(groups)
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        own = np.array([r for r, g in zip(rewards, groups, strict=True) if g == group])
        if count[group] > 1:
            over = own.std(ddof=1) if spread is None else spread
            found.append(float((reward - own.mean()) / (over + 1e-4)))
        else:
            found.append(None)
    return found


# --- the objective ---------------------------------------------------------------------------------------------------


def policy_loss(logps, sampled, anchor, gains, said, *, clip: float, beta: float):
    """(loss, KL, share of clipped tokens), (B,) each: the mean over a reply's tokens.

    logps    (B, L)  under the weights being trained
    sampled  (B, L)  under those that sampled; no gradient
    anchor   (B, L)  under the policy that stage 1 left; no gradient
    gains    (B,)    advantages
    said     (B, L)  True on sampled tokens

    Clipped policy gradient plus beta times the k3 estimate of the KL to the anchor (METHOD.md 6.2).
    """
    assert not (sampled.requires_grad or anchor.requires_grad)
    ratio = torch.exp((logps - sampled).masked_fill(~said, 0))
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * gains[:, None], bounded * gains[:, None])
    away = (anchor - logps).masked_fill(~said, 0)
    kl = torch.exp(away) - away - 1
    cut = (bounded * gains[:, None] < ratio * gains[:, None]).float()
    mean = lambda values: (values * said).sum(dim=1) / said.sum(dim=1)  # noqa: E731
    return mean(beta * kl - gain), mean(kl.detach()), mean(cut)
