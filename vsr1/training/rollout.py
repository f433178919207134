"""Roll out groups of episodes for GRPO."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from vsr1.config import InputError
from vsr1.data import annotations
from vsr1.loop import episode, records, replies, runner, sqr
from vsr1.loop.records import ORIGINAL, Refinement, Verification
from vsr1.models import inputs, search_index
from vsr1.training import rewards
from vsr1.training.common import info_nce


@dataclass(frozen=True)
class Variant:
    """The factors of METHOD.md 6.5, changed one at a time: M0 to M3."""

    turns: int  # T_train: looks of a training episode
    latents: Literal["frozen", "aux", "gauss"]  # how soft tokens learn (METHOD.md 6.3)
    carry: int  # C: soft tokens of how many turns stand in a query


VARIANTS = {
    "vsr1-single": Variant(1, "frozen", 1),  # M0: the structure of the official code
    "m1": Variant(2, "frozen", 1),
    "vsr1": Variant(2, "aux", 1),  # M2: multi-turn, soft tokens learn
    "m3": Variant(2, "aux", 2),  # and those of the turn before stay in the query, as in the paper's formula
    "gauss": Variant(1, "gauss", 1),
}

# --- what an episode starts from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutPrompt(annotations.Query):
    """A query, the video its first look is at, and which member of which group walks from here."""

    first: str
    wrong: tuple[str, ...]  # the wrong videos that rank highest: what the retrieval reward contrasts with
    group: int = 0
    member: int = 0


def make_prompts(queries, vectors: search_index.Vectors, *, negatives: int, seed: int) -> list[RolloutPrompt]:
    """Each query with the video of its first search; failures once more with the right one, until both are equal.

    The copies make accepting and rejecting equally often right (METHOD.md 6.4); without enough failures there are none.
    """
    starts = []
    for query in queries:
        if vectors.has_video(query.video) and vectors.has_query(query.id):
            vec = vectors.query_vec(query.id)
            _, columns = vectors.search(vec[None], negatives + 1, vectors.scores(vec)[None])
            best = [vectors.video_ids[column] for column in columns[0]]
            wrong = [video for video in best if video != query.video][:negatives]
            starts.append(RolloutPrompt(**vars(query), first=best[0], wrong=tuple(wrong)))
    failed = [start for start in starts if start.first != start.video]
    short = max(0, 2 * len(failed) - len(starts))
    rng = np.random.default_rng([seed, 6])
    order = [failed[at] for _ in range(0, short, max(1, len(failed))) for at in rng.permutation(len(failed))]
    return starts + [dataclasses.replace(start, first=start.video) for start in order[:short]]


def choose_prompts(
    profile, dataset: str, vectors: search_index.Vectors, stage_1: Path
) -> tuple[list[RolloutPrompt], list[RolloutPrompt]]:
    """(starts to learn from, starts that are only watched) of a data set whose stage 1 lies in the folder `stage_1`.

    Raises InputError where `grpo_exclude_sft_queries` asks for queries that stage 1 did not learn from and there are none.
    """
    learn, held = annotations.split_validation(
        annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl"), profile.val_fraction
    )
    if profile.grpo_exclude_sft_queries:
        with open(stage_1 / "rows.jsonl", encoding="utf-8") as file:
            told = {json.loads(line)["desc_id"] for line in file}
        learn = [query for query in learn if query.id not in told]
        if not learn:
            raise InputError(
                f"{stage_1 / 'rows.jsonl'}: stage 1 learned from every query; set grpo_exclude_sft_queries: false in the "
                "profile, or fewer sft_rows"
            )
    options = {"negatives": profile.grpo_negatives, "seed": profile.seed}
    starts, held = (make_prompts(queries, vectors, **options) for queries in (learn, held))
    return starts, annotations.evenly_spaced(held, profile.num_val_prompts)


# --- rollouts --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class RolloutStep:
    """One turn of one episode, as training needs it: nothing is decoded and encoded again."""

    start: RolloutPrompt
    t: int
    shown: str
    prompt: inputs.Prompt
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


class RolloutWorker(runner.EpisodeRunner):
    """The functions of the loop with sampled replies, which also keep the rows that training needs."""

    def __init__(self, profile, dataset: str, recipe: Variant, made, agent, vectors, clips):
        super().__init__(profile, runner.SYSTEMS["sqr"], made, agent, vectors, clips)
        self.knobs, self.dataset, self.recipe, self.refine = profile, dataset, recipe, self.step
        self.weights = dataclasses.replace(
            rewards.REWARD_WEIGHTS[dataset], **dict.fromkeys(profile.disabled_rewards, 0.0)
        )
        self.gallery = torch.from_numpy(vectors.video_vecs).to(agent.model.device)

    @torch.no_grad()
    def walk(self, starts: list[RolloutPrompt], seed: list[int]) -> list[list[RolloutStep]]:
        """The rows of each start's `member`s, rewarded: one list an episode, one row a turn that was possible."""
        self.seed, self.turn, self.rows = seed, 0, {(s.group, s.member): [] for s in starts}
        turns, carry = self.recipe.turns, self.recipe.carry
        once = {"display_rule": "stop_at_repeat", "reuse": False}  # a state is sampled once
        run = records.Run(self.dataset, "train", "grpo", turns, carry, self.knobs.seed, **once)
        walked = episode.run_episodes(starts, self.search, self.ask, self.refine, run)
        for one, rows in zip(walked, self.rows.values(), strict=True):
            for row, parts in zip(
                rows, rewards.reward_parts(one, rows, self.knobs.retrieval_reward), strict=True
            ):
                row.parts = parts
                row.reward = sum(getattr(self.weights, part) * value for part, value in parts.items())
        return list(self.rows.values())

    def search(self, pairs):
        """As in evaluation, but the first look is at the video of the start."""
        found = super().search(pairs)
        return [
            dataclasses.replace(ranking, top=(start.first,)) if state is ORIGINAL else ranking
            for (start, state), ranking in zip(pairs, found, strict=True)
        ]

    def ask(self, pairs):
        """One sampled reply and its soft tokens for each pair; a prompt that several share is read once."""
        self.turn += 1
        sharing = {}  # {(group, video): the pairs with that prompt}
        for at, (start, video) in enumerate(pairs):
            sharing.setdefault((start.group, video), []).append(at)
        clips = dict(zip(sharing, self.clips.get([video for _, video in sharing]), strict=True))
        looks = [Verification(None, problem=clips[start.group, video].problem) for start, video in pairs]
        good = {key: some for key, some in sharing.items() if clips[key].problem is None}
        order = [at for some in good.values() for at in some]
        for at, row, said in zip(order, *self._answer([pairs[at] for at in order], clips), strict=True):
            self.rows[row.start.group, row.start.member].append(row)
            own = {"layout": self.layout, "refine_id": self.agent.refine_token_id, "ended": said.ended}
            reply = replies.read_reply(said.text, said.ids, **own)
            looks[at] = Verification(reply, clips[row.start.group, row.shown].seconds, state=row)
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
        self._soften(
            [(row, one.refine_context, eps) for row, one, eps in answered if one.refine_context is not None]
        )
        return rows, said

    def _sample(self, prompts, counts):
        """`counts` completions of each prompt, in one list, and (B, N, D) standard noise for their soft tokens.

        Random numbers are a prompt's own: they depend on its start, turn and video, not on the batch or the process.
        """
        keys = [(group, self.vectors.column(video)) for group, video in prompts]
        rngs = [np.random.default_rng([*self.seed, self.turn, *key]) for key in keys]
        options = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.knobs.rollout_temperature,
            "rng": rngs,
        }
        said = self.agent.reply(list(prompts.values()), group=counts, **options)
        shape = self._soft_shape()
        noise = [rng.standard_normal((count, *shape)) for rng, count in zip(rngs, counts, strict=True)]
        return said, np.concatenate(noise)

    def _row(self, start, video, prompt, said):
        """What training keeps of one completion; its soft tokens come later."""
        wrong = list(start.wrong) + [video] * (video not in (start.video, *start.wrong))
        earlier = tuple(row.taken for row in self.rows[start.group, start.member])
        return RolloutStep(start, self.turn, video, prompt, said.ids, said.logps, said.text, wrong, earlier)

    def _soft_shape(self):
        return self.agent.settings.n_soft, self.agent.heads.width

    def _soften(self, marked):
        """Soft tokens of the rows that asked for them, and what the search makes of the right video then."""
        if not marked:
            return
        rows, branches, eps = zip(*marked, strict=True)
        noise = None
        if self.recipe.latents == "gauss":
            noise = self.knobs.latent_noise_std * torch.from_numpy(np.stack(eps)).float().to(
                self.gallery.device
            )
        taken = sqr.soft_tokens(self.agent, list(branches), self._soft_shape()[0], noise)  # (B, N, D)
        for row, latents in zip(rows, taken, strict=True):
            row.taken = latents
        vecs = self.vectors_of(rows, taken)
        typed = torch.from_numpy(self.vectors.vecs_of([row.start.id for row in rows])).to(vecs)
        after, before = self.contrast(vecs, rows), self.contrast(typed, rows)
        for row, vec, *losses in zip(rows, vecs, after, before, strict=True):
            row.chance, row.before = (float(torch.exp(-loss)) for loss in losses)
            row.vec = vec.cpu().numpy()

    def vectors_of(self, rows, latents) -> torch.Tensor:
        """(B, D) query vectors with soft tokens (B, N, D) behind those carried; all rows are at the same turn."""
        blocks = [torch.stack(turn) for turn in zip(*(row.earlier for row in rows), strict=True)]
        carried = sqr.stack_blocks([*blocks, latents], self.recipe.carry)
        return sqr.soft_query(self.engine, self.agent.heads, [row.start.text for row in rows], carried)

    def contrast(self, vecs, rows, learn=False) -> torch.Tensor:
        """(B,) InfoNCE of query vectors (B, D): each row has its own wrong videos, and one more where one was shown.

        learn  not for the reward but to learn from: against what stage 1 contrasted with
        """
        if learn and self.knobs.sft_negatives is None:
            right = torch.tensor([self.vectors.column(row.start.video) for row in rows], device=vecs.device)
            return F.cross_entropy(
                vecs @ self.gallery.T / self.knobs.infonce_temperature, right, reduction="none"
            )
        losses = []
        for vec, row in zip(vecs, rows, strict=True):
            columns = [self.vectors.column(video) for video in (row.start.video, *row.wrong)]
            right, wrong = self.gallery[columns[:1]], self.gallery[columns[1:]]
            losses.append(info_nce(vec[None], right, wrong[None], self.knobs.infonce_temperature)[0])
        return torch.stack(losses)

    def step(self, rejected):
        """What to search with after a rejection: the query with the soft tokens made when the reply was given."""
        n, vecs = self._soft_shape()[0], [look.state.vec for _, look, _ in rejected]
        states = [None if vec is None else runner.QueryState((), vec) for vec in vecs]
        return [Refinement("sqr", state, n, n + 1) for state in states]
