"""Stage 2, GRPO: the policy walks the live loop in groups, and learns from what each turn was worth (METHOD.md 6).

One step. Draw a few starts (a query and the video its first search shows). Walk each G times through the loop of
`episode`, with sampled replies and a live search. Reward every turn. Compare turns that saw the same query and video:
the advantage is the reward less the group's mean, over its spread. Then one gradient step on exactly the tokens that
were sampled, read once more with the prompt and its video shared by the group.

TRL's trainer is not used: it drops the video from the training forward without an error, and knows no soft tokens
(STACK.md 5). A test holds our objective against its.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import math
import shutil
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from vsr1 import corpus, engine, episode, evaluate, frames, policy, qwen, refine, split, stages
from vsr1.episode import AS_TYPED, Look, Refinement
from vsr1.params import InputError
from vsr1.sft import adapt, info_nce, masters, need_tensorboard


@dataclass(frozen=True)
class Recipe:
    """The factors of METHOD.md 6.5, changed one at a time: M0 to M3."""

    turns: int  # T_train: looks of a training episode
    latents: Literal["frozen", "aux", "gauss"]  # how soft tokens learn (METHOD.md 6.3)
    carry: int  # C: soft tokens of how many turns stand in a query


RECIPES = {
    "vsr1-single": Recipe(1, "frozen", 1),  # M0: the structure of the official code
    "m1": Recipe(2, "frozen", 1),
    "vsr1": Recipe(2, "aux", 1),  # M2: multi-turn, soft tokens learn
    "m3": Recipe(2, "aux", 2),  # and those of the turn before stay in the query, as in the paper's formula
    "gauss": Recipe(1, "gauss", 1),
}

# --- what an episode starts from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start(corpus.Query):
    """A query, the video its first look is at, and which member of which group walks from here."""

    first: str
    wrong: tuple[str, ...]  # the wrong videos that rank highest: what the retrieval reward contrasts with
    group: int = 0
    member: int = 0


def make_starts(queries, vectors: engine.Vectors, *, negatives: int, seed: int) -> list[Start]:
    """Each query with the video of its first search; failures once more with the right one, until both are equal.

    The copies make accepting and rejecting equally often right (METHOD.md 6.4); without enough failures there are none.
    """
    column = {video: number for number, video in enumerate(vectors.video_ids)}
    place = {number: at for at, number in enumerate(vectors.query_ids)}
    starts = []
    for query in queries:
        if query.video in column and query.id in place:
            scores = vectors.video_vecs @ vectors.query_vecs[place[query.id]]
            best = [vectors.video_ids[at] for at in np.argsort(-scores, kind="stable")[: negatives + 1]]
            wrong = [video for video in best if video != query.video][:negatives]
            starts.append(Start(**vars(query), first=best[0], wrong=tuple(wrong)))
    failed = [start for start in starts if start.first != start.video]
    short = max(0, 2 * len(failed) - len(starts))
    rng = np.random.default_rng([seed, 6])
    order = [failed[at] for _ in range(0, short, max(1, len(failed))) for at in rng.permutation(len(failed))]
    return starts + [dataclasses.replace(start, first=start.video) for start in order[:short]]


def choose_starts(profile, dataset: str, vectors: engine.Vectors) -> tuple[list[Start], list[Start]]:
    """(starts to learn from, starts that are only watched) of a data set whose stage 1 is done.

    Raises InputError where `grpo_fresh` asks for queries that stage 1 did not learn from and there are none.
    """
    home = profile.runs(dataset)
    learn, held = corpus.hold_out(corpus.read_fig(home / "corpus" / "train.jsonl"), profile.held_out)
    if profile.grpo_fresh:
        with open(home / "sft" / "rows.jsonl", encoding="utf-8") as file:
            told = {json.loads(line)["desc_id"] for line in file}
        learn = [query for query in learn if query.id not in told]
        if not learn:
            raise InputError(
                f"{home / 'sft' / 'rows.jsonl'}: stage 1 learned from every query; set grpo_fresh: false in the "
                "profile, or fewer sft_rows"
            )
    options = {"negatives": profile.grpo_negatives, "seed": profile.seed}
    starts, held = (make_starts(queries, vectors, **options) for queries in (learn, held))
    return starts, evaluate.sample(held, profile.held_starts)


# --- rollouts --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Row:
    """One turn of one episode, as training needs it: nothing is decoded and encoded again."""

    start: Start
    t: int
    shown: str
    prompt: qwen.Prompt
    ids: list[int]
    logps: list[float]  # of the policy that sampled, token by token
    text: str
    wrong: list[str]  # videos the retrieval reward contrasts with
    earlier: tuple = ()  # soft tokens (N, D) of the turns before, constants
    taken: torch.Tensor | None = None  # (N, D) soft tokens put into the query; None: it did not say <REFINE>
    vec: np.ndarray | None = None  # (D,) of the query with them
    chance: float | None = None  # softmax probability of the right video after the refinement, exp(-L_ret)
    before: float | None = None  # the same of the query as typed
    parts: dict = field(default_factory=dict)  # of the reward
    reward: float = 0.0
    advantage: float | None = None  # None: nothing to compare with


class Sampler(evaluate.Wiring):
    """The functions of the loop with sampled replies, which also keep the rows that training needs."""

    def __init__(self, profile, dataset: str, recipe: Recipe, made, agent, vectors, clips):
        super().__init__(profile, evaluate.SYSTEMS["sqr"], made, agent, vectors, clips)
        self.knobs, self.dataset, self.recipe, self.refine = profile, dataset, recipe, self.step
        self.weights = dataclasses.replace(WEIGHTS[dataset], **dict.fromkeys(profile.reward_off, 0.0))
        self.gallery = torch.from_numpy(vectors.video_vecs).to(agent.model.device)

    @torch.no_grad()
    def walk(self, starts: list[Start], seed: list[int]) -> list[list[Row]]:
        """The rows of each start's `member`s, rewarded: one list an episode, one row a turn that was possible."""
        self.seed, self.turn, self.rows = seed, 0, {(s.group, s.member): [] for s in starts}
        turns, carry = self.recipe.turns, self.recipe.carry
        once = {"next_shown": "stop_at_repeat", "reuse": False}  # a state is sampled once
        run = episode.Run(self.dataset, "train", "grpo", turns, carry, self.knobs.seed, **once)
        walked = episode.run_episodes(starts, self.search, self.ask, self.refine, run)
        options = self.knobs.ret_reward, self.knobs.time_reward
        for one, rows in zip(walked, self.rows.values(), strict=True):
            for row, parts in zip(rows, reward_parts(one, rows, *options), strict=True):
                row.parts = parts
                row.reward = sum(getattr(self.weights, part) * value for part, value in parts.items())
        return list(self.rows.values())

    def search(self, pairs):
        """As in evaluation, but the first look is at the video of the start."""
        found = super().search(pairs)
        return [
            dataclasses.replace(ranking, top=(start.first,)) if state is AS_TYPED else ranking
            for (start, state), ranking in zip(pairs, found, strict=True)
        ]

    def ask(self, pairs):
        """One sampled reply and its soft tokens for each pair; a prompt that several share is read once."""
        self.turn += 1
        sharing = {}  # {(group, video): the pairs with that prompt}
        for at, (start, video) in enumerate(pairs):
            sharing.setdefault((start.group, video), []).append(at)
        clips = dict(zip(sharing, self.clips.get([video for _, video in sharing]), strict=True))
        looks = [Look(None, problem=clips[start.group, video].problem) for start, video in pairs]
        good = {key: some for key, some in sharing.items() if clips[key].problem is None}
        order = [at for some in good.values() for at in some]
        for at, row, said in zip(order, *self._answer([pairs[at] for at in order], clips), strict=True):
            self.rows[row.start.group, row.start.member].append(row)
            own = {"layout": self.layout, "refine_id": self.agent.mark, "ended": said.ended}
            reply = episode.read_reply(said.text, said.ids, **own)
            looks[at] = Look(reply, clips[row.start.group, row.shown].seconds, state=row)
        return looks

    def _answer(self, pairs, clips):
        """(rows, completions) of pairs whose videos can be seen; pairs that share a prompt stand side by side."""
        if not pairs:
            return [], []
        count = Counter((start.group, video) for start, video in pairs)  # in the order of the pairs
        texts = {start.group: start.text for start, _ in pairs}
        prompts = {key: self.agent.prompt(self.prompt, texts[key[0]], clips[key]) for key in count}
        said, noise = self._sample(prompts, list(count.values()))
        rows = [
            self._row(start, video, prompts[start.group, video], one)
            for (start, video), one in zip(pairs, said, strict=True)
        ]
        answered = zip(rows, said, noise, strict=True)
        self._soften([(row, one.branch, eps) for row, one, eps in answered if one.branch is not None])
        return rows, said

    def _sample(self, prompts, counts):
        """`counts` completions of each prompt, in one list, and (B, N, D) standard noise for their soft tokens.

        Random numbers are a prompt's own: they depend on its start, turn and video, not on the batch or the process.
        """
        keys = [(group, self.column[video]) for group, video in prompts]
        rngs = [np.random.default_rng([*self.seed, self.turn, *key]) for key in keys]
        options = {"max_new": self.max_new, "temperature": self.knobs.temperature, "rng": rngs}
        said = self.agent.reply(list(prompts.values()), group=counts, **options)
        shape = self._soft_shape()
        noise = [rng.standard_normal((count, *shape)) for rng, count in zip(rngs, counts, strict=True)]
        return said, np.concatenate(noise)

    def _row(self, start, video, prompt, said):
        """What training keeps of one completion; its soft tokens come later."""
        wrong = list(start.wrong) + [video] * (video not in (start.video, *start.wrong))
        earlier = tuple(row.taken for row in self.rows[start.group, start.member])
        return Row(start, self.turn, video, prompt, said.ids, said.logps, said.text, wrong, earlier)

    def _soft_shape(self):
        return self.agent.settings.n_soft, self.agent.heads.width

    def _soften(self, marked):
        """Soft tokens of the rows that asked for them, and what the search makes of the right video then."""
        if not marked:
            return
        rows, branches, eps = zip(*marked, strict=True)
        noise = None
        if self.recipe.latents == "gauss":
            noise = self.knobs.sigma * torch.from_numpy(np.stack(eps)).float().to(self.gallery.device)
        taken = refine.soft_tokens(self.agent, list(branches), self._soft_shape()[0], noise)  # (B, N, D)
        for row, latents in zip(rows, taken, strict=True):
            row.taken = latents
        vecs = self.vectors_of(rows, taken)
        typed = torch.from_numpy(np.stack([self.typed[row.start.id] for row in rows])).to(vecs)
        after, before = self.contrast(vecs, rows), self.contrast(typed, rows)
        for row, vec, *losses in zip(rows, vecs, after, before, strict=True):
            row.chance, row.before = (float(torch.exp(-loss)) for loss in losses)
            row.vec = vec.cpu().numpy()

    def vectors_of(self, rows, latents) -> torch.Tensor:
        """(B, D) query vectors with soft tokens (B, N, D) behind those carried; all rows are at the same turn."""
        blocks = [torch.stack(turn) for turn in zip(*(row.earlier for row in rows), strict=True)]
        carried = refine.carry([*blocks, latents], self.recipe.carry)
        return refine.soft_query(self.engine, self.agent.heads, [row.start.text for row in rows], carried)

    def contrast(self, vecs, rows, learn=False) -> torch.Tensor:
        """(B,) InfoNCE of query vectors (B, D): each row has its own wrong videos, and one more where one was shown.

        learn  not for the reward but to learn from: against what stage 1 contrasted with
        """
        if learn and self.knobs.sft_negatives is None:
            right = torch.tensor([self.column[row.start.video] for row in rows], device=vecs.device)
            return F.cross_entropy(vecs @ self.gallery.T / self.knobs.tau, right, reduction="none")
        losses = []
        for vec, row in zip(vecs, rows, strict=True):
            columns = [self.column[video] for video in (row.start.video, *row.wrong)]
            right, wrong = self.gallery[columns[:1]], self.gallery[columns[1:]]
            losses.append(info_nce(vec[None], right, wrong[None], self.knobs.tau)[0])
        return torch.stack(losses)

    def step(self, rejected):
        """What to search with after a rejection: the query with the soft tokens made when the reply was given."""
        n, vecs = self._soft_shape()[0], [look.state.vec for _, look, _ in rejected]
        states = [None if vec is None else evaluate.Asked((), vec) for vec in vecs]
        return [Refinement("sqr", state, n, n + 1) for state in states]


# --- rewards and advantages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Of the parts of a turn's reward (METHOD.md 6.1, the official values)."""

    verify: float
    form: float
    refine: float
    time: float
    retrieve: float


WEIGHTS = {"charades": Weights(1.6, 0.1, 0.1, 0.35, 0.8)}
WEIGHTS |= dict.fromkeys(("didemo", "activitynet"), Weights(1.2, 0.1, 0.8, 0.45, 0.8))
NO_REFINE = {"charades": 0.0, "didemo": -0.3, "activitynet": -0.3}  # official, for "delta" only


def reward_parts(
    one: episode.Episode, rows: list[Row], ret_reward="exp", time_reward="outcome"
) -> list[dict]:
    """{part: value} of each turn of an episode, before weighting.

    verify    +1 for a right verdict on the video shown, -1 for a wrong or unreadable one
    form      1 where the reply is the asked layout to the letter
    refine    1 where it says <REFINE>
    retrieve  exp(-L_ret), the softmax probability of the right video after the refinement; "delta": less that of the
              query as typed (official)
    time      the overlap that the episode ends with, if it ends in the right video, for every turn whose own verdict
              was right: a rejection that leads there shares in it. Nothing is summed over turns: long does not pay.
              "half_on_reject": for a right rejection one half instead, if it names no time (official)
    """
    last, parts = one.turns[-1] if one.turns else None, []
    outcome = last.iou if last and last.reply and last.reply.matched and last.shown_is_gt else 0.0
    for turn, row in zip(one.turns, rows, strict=False):  # an unreadable video has a turn and no row
        right = turn.reply.matched is not None and turn.reply.matched == turn.shown_is_gt
        timed = outcome
        if time_reward == "half_on_reject" and not turn.reply.matched:
            timed = 0.0 if _names_time(turn.reply.text) else 0.5
        gained = 0.0 if row.chance is None else row.chance
        if ret_reward == "delta":
            gained = NO_REFINE.get(one.run.dataset, 0.0) if row.chance is None else row.chance - row.before
        parts.append(
            {
                "verify": 1.0 if right else -1.0,
                "form": float(turn.reply.strict),
                "refine": float(turn.reply.has_refine),
                "time": timed if right else 0.0,
                "retrieve": gained,
            }
        )
    return parts


def _names_time(text):
    """Whether the answer behind the reasoning has a tag of a time, closed or not."""
    said = text.rpartition("</think>")[2].lower()
    return "<start>" in said or "<end>" in said


def peers(row: dict, group_by: str) -> tuple:
    """What rows have in common that are compared: the prompt, or (METHOD.md 6.4) only the start and the turn.

    Both name the start, not the query: a query that stands among the starts twice was shown two videos.
    """
    return (row["group"], row["t"]) + (row["shown"],) * (group_by == "prompt")


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


def objective(logps, sampled, anchor, gains, said, *, clip: float, beta: float):
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


class Learner(nn.Module):
    """The loss of rows as one module, which accelerate can wrap for several processes."""

    def __init__(self, sampler: Sampler, anchor: policy.Policy):
        super().__init__()
        agent = sampler.agent
        self.model, self.heads, self.sampler, self.anchor = agent.model, agent.heads, sampler, anchor

    def forward(self, rows: list[Row], totals: tuple[int, int], shared=True):
        """(loss, sums for the log) of some rows of a step that has `totals` rows, and rows with soft tokens.

        shared  read each prompt with its video once for all replies to it, forward and backward; False, for
                comparison: once a reply
        """
        sampler, knobs = self.sampler, self.sampler.knobs
        if not rows:  # of this process; the others wait for its share of the gradient
            some = next(weight for weight in self.parameters() if weight.requires_grad)
            return 0.0 * some.sum(), {}
        rows = sorted(rows, key=lambda row: (row.start.group, row.shown, row.t))
        prompts, counts = [row.prompt for row in rows], [1] * len(rows)
        if shared:
            groups = Counter(id(row.prompt) for row in rows)
            prompts, counts = (
                list({id(row.prompt): row.prompt for row in rows}.values()),
                list(groups.values()),
            )
        replies, options = [row.ids for row in rows], {"group": counts, "temperature": knobs.temperature}
        seen = sampler.agent.replay(prompts, replies, **options)
        with torch.no_grad(), self.anchor.bare():
            anchored = self.anchor.replay(prompts, replies, **options).logps
        sampled = nn.utils.rnn.pad_sequence([torch.tensor(row.logps) for row in rows], batch_first=True)
        gains = torch.tensor([row.advantage for row in rows]).to(anchored)
        losses, kl, cut = objective(
            seen.logps,
            sampled.to(anchored),
            anchored,
            gains,
            seen.said,
            clip=knobs.grpo_clip,
            beta=knobs.grpo_beta,
        )
        loss, contrast = losses.sum() / totals[0], 0.0
        if sampler.recipe.latents != "frozen":
            soft, contrast = self._soft(rows, seen.branches)
            loss = loss + knobs.soft_weight * soft / max(1, totals[1])
        return loss, {"kl": float(kl.sum()), "clipped": float(cut.sum()), "info_nce": contrast}

    def _soft(self, rows, branches):
        """What soft tokens learn from rows that asked for them: (sum of losses, the sum of InfoNCE in it)."""
        total, contrast, sampler = 0.0, 0.0, self.sampler
        for turns in sorted({len(row.earlier) for row in rows}):
            some = [at for at, row in enumerate(rows) if row.taken is not None and len(row.earlier) == turns]
            if not some:
                continue
            own, n = [rows[at] for at in some], len(rows[some[0]].taken)
            if sampler.recipe.latents == "gauss":
                # The noisy tokens are the action: they stood in the query, and the policy read them.
                taken = torch.stack([row.taken for row in own])
                means = refine.soft_tokens(sampler.agent, [branches[at] for at in some], n, taken=taken)
                density = -((taken - means) ** 2).sum(dim=(1, 2)) / (2 * sampler.knobs.sigma**2)
                ratio = torch.exp(density - density.detach())  # one step a rollout: one, but not its gradient
                total = total - (ratio * torch.tensor([row.advantage for row in own]).to(ratio)).sum()
                continue
            latents = refine.soft_tokens(sampler.agent, [branches[at] for at in some], n)
            losses = sampler.contrast(sampler.vectors_of(own, latents), own, learn=True)
            total, contrast = total + losses.sum(), contrast + float(losses.detach().sum())
        return total, contrast


# --- the run ---------------------------------------------------------------------------------------------------------


class Course:
    """A policy on its way through GRPO, in one process or in several that share the starts of each step."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.knobs, agent = sampler, sampler.knobs, sampler.agent
        on_cpu = agent.model.device.type == "cpu"
        # Where no reply of a process asked for a search, its heads get no gradient: the others must not wait for it.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        precision = "bf16" if self.knobs.dtype == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[unused])
        anchor = copy.copy(agent)
        if self.knobs.lora_rank:  # without its adapters the model is its own anchor
            adapt(agent, self.knobs.lora_rank, self.knobs.seed)
            anchor.adapters = agent.adapters
        else:
            anchor.model = copy.deepcopy(agent.model).requires_grad_(False)
        learner = Learner(sampler, anchor)
        optimizer = torch.optim.AdamW(_groups(self.knobs, sampler.recipe, agent))
        split.deal(learner, optimizer, self.accelerator)
        self.learner, self.optimizer = self.accelerator.prepare(learner, optimizer)
        self.counts = (
            Counter()
        )  # since step 1: steps skipped, those for want of memory, halved walks, groups, those flat

    def walk(self, starts: list[Start], members: int, seed: list[int]) -> list[Row]:
        """The rows of `members` episodes from each start; each process walks its share of the starts.

        If they do not fit in memory, half as many are walked at once from then on: the same rows. That happens once.
        """
        share = list(enumerate(starts))[self.accelerator.process_index :: self.accelerator.num_processes]
        rows, most = [], self.knobs.grpo_batch * self.knobs.grpo_group  # episodes at once
        while share:
            size = max(1, (most // members) >> self.counts["halved"])
            walked = self._walk(share[:size], members, seed)
            if walked is not None:
                rows, share = rows + walked, share[size:]
        return rows

    def _walk(self, share, members, seed):
        """The rows of some (group, start); None: they did not fit, and fewer are to be tried."""
        some = [
            dataclasses.replace(start, group=group, member=member)
            for group, start in share
            for member in range(members)
        ]
        try:
            with self.accelerator.autocast(), self.sampler.agent.merged():
                return [row for walked in self.sampler.walk(some, seed) for row in walked]
        except torch.OutOfMemoryError:
            if self.counts["halved"] or len(share) < 2:
                raise
        self.counts["halved"] += 1
        told = (
            f"episodes from {len(share)} starts at once do not fit in memory: half of grpo_batch from now on"
        )
        warnings.warn(told, stacklevel=2)
        return None

    def step(self, number: int, starts: list[Start]) -> tuple[dict, list[dict]]:
        """One rollout and one step of the optimizer: (the line of the log, all rows in short)."""
        began = time.perf_counter()
        by = self.knobs.group_by
        with split.whole(self.learner):
            rows = self.walk(starts, self.knobs.grpo_group, [self.knobs.seed, 7, number])
            rewards = [row.reward for row in rows]
            spread = float(np.std(gather_object(rewards), ddof=1))
            scale = spread if self.knobs.grpo_scale == "batch" else None
            found = advantages(rewards, [peers(_short(row), by) for row in rows], scale)
            for row, advantage in zip(rows, found, strict=True):
                row.advantage = advantage
            sums, norm = self._descend([row for row in rows if row.advantage is not None])
        short = gather_object([_short(row) for row in rows])
        told = tally(short, by)
        self.counts.update(groups=told["groups"], flat=told["flat_groups"])
        means = {"loss": sums["loss"], "kl": sums["kl"] / sums["rows"]}
        means |= {"clipped": sums["clipped"] / sums["rows"]}
        means |= {"info_nce": sums["info_nce"] / max(1, sums["soft"])}
        line = {"step": number} | {key: mean if math.isfinite(mean) else None for key, mean in means.items()}
        line |= {"norm": norm, "step_spread": spread}
        line |= {key: self.counts[key] for key in ("skipped", "no_memory", "halved")}
        return line | {"seconds": time.perf_counter() - began} | told, short

    def _descend(self, kept):
        """(sums over the rows of all processes, norm of the gradient; None: not finite, and no step was made).

        A step that runs out of memory has no sums; one process of several ends, for the others wait for its gradient.
        """
        self.optimizer.zero_grad()
        totals = self._sum({"rows": len(kept), "soft": sum(row.taken is not None for row in kept)})
        assert totals["rows"], "no reply to learn from"
        chunks, sums = self._chunks(kept), Counter(loss=0.0, kl=0.0, clipped=0.0, info_nce=0.0)
        try:
            for chunk in chunks:
                last = chunk is chunks[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.learner):
                    loss, parts = self.learner(chunk, (totals["rows"], totals["soft"]))
                    self.accelerator.backward(loss * self.accelerator.num_processes)  # they are averaged
                sums.update({"loss": float(loss.detach())} | parts)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1:
                raise
            sums = Counter(dict.fromkeys(sums, math.nan))
            self.counts["no_memory"] += 1
        sums, norm = self._sum(sums) | totals, math.nan
        if math.isfinite(sums["loss"]):
            learned = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            norm = float(self.accelerator.clip_grad_norm_(learned, 1.0))
        if not math.isfinite(norm):
            self.counts["skipped"] += 1
            return sums, None
        self.optimizer.step()
        return sums, norm

    def _chunks(self, rows):
        """Rows that are read at once: all of up to `grpo_batch` starts, or `grpo_replies` of them."""
        rows = sorted(rows, key=lambda row: (row.start.group, row.t, row.shown))  # a prompt's stay together
        groups = sorted({row.start.group for row in rows})
        parts = [
            set(groups[at : at + self.knobs.grpo_batch])
            for at in range(0, len(groups), self.knobs.grpo_batch)
        ]
        chunks = [[row for row in rows if row.start.group in part] for part in parts]
        size = self.knobs.grpo_replies or max(1, len(rows))
        return [chunk[at : at + size] for chunk in chunks for at in range(0, len(chunk), size)] or [[]]

    def _sum(self, values):
        """The same keys with the sums over all processes."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(numbers, "sum").tolist(), strict=True))

    def run(self, starts: list[Start], held: list[Start], folder: Path, what: str, watch=None) -> None:
        """All steps, from where `folder` stands: log.jsonl, groups.jsonl (the first group of each step), held.jsonl.

        watch(lines)  is called after each step with the log so far, for curves that redraw
        """
        main, count = self.accelerator.is_main_process, self.knobs.grpo_prompts
        steps = self.knobs.grpo_steps or -(-len(starts) // count)
        done, lines = self._resume(folder), []
        if self.knobs.tensorboard:
            need_tensorboard()
            self.accelerator.log_with = [TensorBoardTracker("tensorboard", folder, purge_step=done + 1)]
            self.accelerator.init_trackers("grpo")
        if main:
            lines = [_keep(folder / f"{name}.jsonl", done) for name in ("groups", "held", "log")][-1]
        if done == 0:
            self._look(held, 0, folder)
        bar = stages.progress(range(steps), what)
        bar.update(done)
        for number in range(done + 1, steps + 1):
            left = 1 - (number - 1) / steps if self.knobs.grpo_schedule == "linear" else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = left * group["full_lr"]
            line, short = self.step(number, draw(starts, number, count, self.knobs.seed))
            if main:
                lines.append(line)
                _append(folder / "log.jsonl", line)
                _append(folder / "groups.jsonl", {"step": number, "rows": _first_group(short)})
            self.accelerator.log(_numbers(line), number)
            if watch and main:
                watch(lines)
            self._check_skipped(number, steps, what)
            if number % max(1, steps // 4) == 0 or number == steps:
                self._look(held, number, folder)
                self._save(folder, number)
                self._check_flat(what)
            bar.update()
        bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _check_skipped(self, number, steps, what):
        """Ends a run of which too many steps were no steps."""
        skipped, no_memory = self.counts["skipped"], self.counts["no_memory"]
        if skipped > max(2, self.knobs.max_skipped * steps):
            raise InputError(
                f"{what}: {skipped} of {number} steps changed nothing, {no_memory} for want of memory, the others "
                "without a finite gradient; lower grpo_lr, or for memory grpo_batch, in the profile"
            )

    def _check_flat(self, what):
        """Ends a run in which hardly a group has members to prefer; its state is saved, so it can go on."""
        flat, groups = self.counts["flat"], self.counts["groups"]
        if flat > self.knobs.max_flat * groups:
            raise InputError(
                f"{what}: in {flat} of {groups} groups all earned the same, which teaches nothing; raise temperature "
                "or grpo_group in the profile, or max_flat to go on as it is"
            )

    def _look(self, held, number, folder):
        """Writes what the policy earns on starts that it never learns from, with the same random numbers every time."""
        with split.whole(self.learner):
            rows = self.walk(held, 2, [self.knobs.seed, 9])
        short = gather_object([_short(row) for row in rows])
        told = tally(short, self.knobs.group_by)
        if self.accelerator.is_main_process:
            _append(folder / "held.jsonl", {"step": number} | told)
        self.accelerator.log({f"held/{name}": value for name, value in _numbers(told).items()}, number)

    def _save(self, folder, number):
        """The state after a step, complete or not at all; the one before goes away."""
        target = folder / "steps" / f"{number:06}"
        partial = target.with_suffix(".partial")
        # It would say at every state that tied embeddings are kept once; they are tied again when it is loaded.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        self.accelerator.save_state(partial)
        self.accelerator.wait_for_everyone()  # each writes its random numbers
        if self.accelerator.is_main_process:
            stages.write_json(partial / "counts.json", self.counts)
            partial.rename(target)
            for other in target.parent.iterdir():
                if other != target:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder):
        """How many steps `folder` has; their state is loaded."""
        states = sorted(path for path in folder.glob("steps/*") if not path.suffix)
        if not states:
            return 0
        self.accelerator.load_state(states[-1])
        self.counts = Counter(json.loads((states[-1] / "counts.json").read_text()))
        return int(states[-1].name)


def _groups(knobs, recipe, agent):
    """What learns, and how fast: the language model, and the heads unless they are frozen (METHOD.md 6.3)."""
    parts = (agent.model.model.language_model, agent.model.lm_head)
    words = {
        id(w): w for part in parts for w in part.parameters() if not agent.adapters or w.requires_grad
    }.values()
    for weight in agent.model.parameters():
        weight.requires_grad_(False)
    heads = []
    for name, weight in agent.heads.named_parameters():
        weight.requires_grad_(recipe.latents != "frozen" and "gate" not in name)
        heads += [weight] * weight.requires_grad
    for weight in words:
        weight.requires_grad_()
    masters(words)
    groups = [
        {"params": [w for w in words if w.ndim > 1], "lr": knobs.grpo_lr, "weight_decay": 0.01},
        {"params": [w for w in words if w.ndim < 2], "lr": knobs.grpo_lr, "weight_decay": 0.0},
    ]
    groups += [{"params": heads, "lr": knobs.grpo_head_lr, "weight_decay": 0.0}] * bool(heads)
    return [group | {"full_lr": group["lr"]} for group in groups]


def draw(starts: list[Start], number: int, count: int, seed: int) -> list[Start]:
    """The starts of step `number`, from 1: each epoch goes through all of them in an order of its own."""
    places = range((number - 1) * count, number * count)
    epochs = {at // len(starts) for at in places}
    orders = {epoch: np.random.default_rng([seed, 8, epoch]).permutation(len(starts)) for epoch in epochs}
    return [starts[orders[at // len(starts)][at % len(starts)]] for at in places]


def _short(row):
    """A row in the words of the log."""
    kept = {"group": row.start.group, "member": row.start.member, "t": row.t, "query": row.start.text}
    kept |= {
        "shown": row.shown,
        "right": row.shown == row.start.video,
        "text": row.text,
        "length": len(row.ids),
    }
    kept |= {"reward": row.reward, "parts": row.parts, "advantage": row.advantage}
    return kept | {"chance": row.chance, "before": row.before}


def tally(rows: list[dict], group_by: str) -> dict:
    """What a log says about the rows of a step: means over rows, and the same turn by turn.

    spread       mean over groups of the standard deviation of rewards
    groups       of more than one member
    flat         share of them whose members all earn the same: no signal; flat_groups: how many
    alone        rows that no other row can be compared with
    """
    own = {}
    for row in rows:
        own.setdefault(peers(row, group_by), []).append(row["reward"])
    spreads = [float(np.std(rewards, ddof=1)) for rewards in own.values() if len(rewards) > 1]
    flat = sum(spread < 1e-6 for spread in spreads)
    told = {"rows": len(rows), "alone": len(own) - len(spreads), "groups": len(spreads), "flat_groups": flat}
    told |= {"spread": float(np.mean(spreads)) if spreads else None}
    told |= {"flat": flat / len(spreads) if spreads else None} | _means(rows)
    by_turn = [[row for row in rows if row["t"] == t] for t in sorted({row["t"] for row in rows})]
    return told | {"turns": [{"rows": len(own)} | _means(own) for own in by_turn]}


def _means(rows):
    values = {"reward": [row["reward"] for row in rows], "length": [row["length"] for row in rows]}
    values |= {"right_shown": [row["right"] for row in rows]}
    values |= {
        part: [row["parts"][part] for row in rows]
        for part in ("verify", "form", "refine", "time", "retrieve")
    }
    return {name: float(np.mean(own)) for name, own in values.items()}


def _first_group(rows):
    return [row for row in rows if row["group"] == 0]


def _numbers(line):
    """What of a line of the log can be drawn as a curve."""
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _keep(path, steps):
    """The lines of a log up to a step; a resumed run goes on behind them."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= steps] if steps else []
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return [json.loads(line) for line in kept]


# --- the stage -------------------------------------------------------------------------------------------------------


def train(profile, dataset: str, name: str = "vsr1", watch=None) -> Path:
    """The checkpoint of stage 2 by one of RECIPES, with its logs: runs/<profile>/<dataset>/grpo/<name>. Resumes."""
    if name not in RECIPES:
        raise InputError(f"{name}: no such recipe; there are {', '.join(RECIPES)}")
    home = profile.runs(dataset)
    knobs = dataclasses.asdict(profile)
    used = [key for key in knobs if key.startswith(("grpo_", "re"))]
    used += ["lora_rank", "sft_negatives", "temperature", "soft_weight", "sigma", "tau"]
    used += ["held_out", "max_new", "seed", "time_reward", "group_by"]
    inputs = {
        "sft": stages.stamp(home / "sft").get("key"),
        "recipe": [name, *vars(RECIPES[name]).values()],
        "knobs": {key: knobs[key] for key in used},
        "sight": [profile.video_fps, profile.max_frames, profile.frame_pixels, profile.dtype],
        "code": stages.code(
            "grpo", "episode", "evaluate", "policy", "refine", "engine", "qwen", "frames", "sft"
        ),
    }
    work = lambda folder: _train(profile, dataset, name, folder, watch)  # noqa: E731
    return stages.run(home / "grpo" / name, inputs, work, together=True)


def _train(profile, dataset, name, folder, watch=None):
    home, recipe = profile.runs(dataset), RECIPES[name]
    if not (home / "sft").exists():
        raise InputError(f"{home / 'sft'}: not there; stage 1 comes first: vsr1 train --stage sft")
    vectors = engine.load_vectors(home / "embed" / "engine" / "train")
    starts, held = choose_starts(profile, dataset, vectors)
    made, agent = engine.load(profile), policy.load(str(home / "sft"), profile)
    agent.settings = dataclasses.replace(agent.settings, carry_blocks=recipe.carry, turns=recipe.turns)
    with frames.readers(frames.Reader(profile.video_fps, profile.max_frames), profile.decoders) as read:
        clips = evaluate.Clips(home / "videos", vectors.video_ids, read)
        course = Course(Sampler(profile, dataset, recipe, made, agent, vectors, clips))
        course.run(starts, held, folder, f"grpo {name} {dataset}", watch)
    split.gather(course.learner)
    if course.accelerator.is_main_process:
        policy.save(agent, folder)
        shutil.rmtree(folder / "steps")
