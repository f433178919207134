"""Roll out groups of episodes for GRPO: the loop of evaluation with sampled replies."""

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
from vsr1.loop import records, replies, runner, sqr
from vsr1.loop.records import ORIGINAL, Refinement, Verification
from vsr1.models import inputs, search_index
from vsr1.training import common, rewards

# --- Variants


@dataclass(frozen=True)
class Variant:
    """How stage 2 trains; the variants change one thing at a time (docs/method.md section 6)."""

    turns: int  # T_train: turns of a training episode
    latents: Literal["frozen", "aux", "gauss"]  # how soft tokens learn: not, by InfoNCE, as noisy actions
    carry: int  # C: soft tokens of how many turns stand in a query


VARIANTS = {
    "vsr1-single": Variant(1, "frozen", 1),  # M0: the structure of the official code
    "m1": Variant(2, "frozen", 1),
    "vsr1": Variant(2, "aux", 1),  # M2: multi-turn, soft tokens learn
    "m3": Variant(2, "aux", 2),  # and those of the turn before stay in the query
    "gauss": Variant(1, "gauss", 1),
}


# --- Prompts


@dataclass(frozen=True)
class RolloutPrompt(annotations.Query):
    """A query and the video of its first turn, with the place of an episode in its group."""

    first_video: str
    negatives: tuple[str, ...]  # the wrong videos that rank highest: what the retrieval reward contrasts with
    group: int = 0
    member: int = 0


def make_prompts(queries, vectors: search_index.Vectors, *, negatives: int, seed: int) -> list[RolloutPrompt]:
    """Give each query the video of its first search, and add copies of failed ones that show the right video.

    There are as many copies as make accepting and rejecting equally often right (docs/method.md section 6); none
    without enough failures.
    """
    prompts = [
        _prompt(query, vectors, negatives)
        for query in queries
        if vectors.has_video(query.video) and vectors.has_query(query.id)
    ]
    failed = [prompt for prompt in prompts if prompt.first_video != prompt.video]
    missing = max(0, 2 * len(failed) - len(prompts))
    rng = np.random.default_rng([seed, 6])
    order = [
        failed[row] for _ in range(0, missing, max(1, len(failed))) for row in rng.permutation(len(failed))
    ]
    return prompts + [dataclasses.replace(prompt, first_video=prompt.video) for prompt in order[:missing]]


def _prompt(query, vectors, negatives):
    vec = vectors.query_vec(query.id)
    _, columns = vectors.search(vec[None], negatives + 1, vectors.scores(vec)[None])
    best = [vectors.video_ids[column] for column in columns[0]]
    wrong = [video for video in best if video != query.video][:negatives]
    return RolloutPrompt(**vars(query), first_video=best[0], negatives=tuple(wrong))


def choose_prompts(
    profile, dataset: str, vectors: search_index.Vectors, stage_1: Path
) -> tuple[list[RolloutPrompt], list[RolloutPrompt]]:
    """Return (training prompts, validation prompts) of a data set whose stage 1 lies in the folder `stage_1`.

    Raises InputError where `grpo_exclude_sft_queries` asks for queries that stage 1 did not learn from and there are
    none.
    """
    learn, validation = common.split_train_queries(profile, dataset)
    if profile.grpo_exclude_sft_queries:
        file = stage_1 / "rows.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")
        sft_ids = {json.loads(line)["desc_id"] for line in lines if line}
        learn = [query for query in learn if query.id not in sft_ids]
        if not learn:
            raise InputError(
                f"{file}: stage 1 learned from every query; set grpo_exclude_sft_queries: false in the "
                "profile, or fewer sft_rows"
            )
    prompts, val_prompts = (
        make_prompts(queries, vectors, negatives=profile.grpo_negatives, seed=profile.seed)
        for queries in (learn, validation)
    )
    return prompts, annotations.evenly_spaced(val_prompts, profile.num_val_prompts)


# --- Rollouts


@dataclass(eq=False)
class RolloutStep:
    """One turn of one episode, as training needs it: nothing is decoded and encoded again."""

    query: RolloutPrompt
    t: int  # the turn, from 1
    shown: str
    prompt: inputs.Prompt
    ids: list[int]
    old_logps: list[float]  # of the policy that sampled, token by token
    text: str
    negatives: list[str]  # videos the retrieval reward contrasts with
    earlier_latents: tuple = ()  # soft tokens (N, D) of the turns before, constants
    latents: torch.Tensor | None = None  # (N, D) soft tokens in the query; None: it did not say <REFINE>
    query_vec: np.ndarray | None = None  # (D,) of the query with them
    p_positive: float | None = None  # of the right video after the refinement: exp(-L_ret), a softmax
    p_positive_before: float | None = None  # the same of the original query
    reward_parts: dict = field(default_factory=dict)
    reward: float = 0.0
    advantage: float | None = None  # None: nothing to compare with
    components: dict | None = None  # of the advantage, by component of the reward, before any shuffling


class RolloutWorker(runner.EpisodeRunner):
    """The functions of the loop with sampled replies, which also keep the steps that training needs."""

    def __init__(self, profile, dataset: str, variant: Variant, engine, policy, vectors, clips):
        super().__init__(profile, runner.SYSTEMS["sqr"], engine, policy, vectors, clips)
        self.knobs, self.dataset, self.variant = profile, dataset, variant
        disabled = dict.fromkeys(profile.disabled_rewards, 0.0)
        self.weights = dataclasses.replace(rewards.REWARD_WEIGHTS[dataset], **disabled)
        self.gallery_vecs = torch.from_numpy(vectors.video_vecs).to(policy.model.device)

    @torch.no_grad()
    def rollout(self, prompts: list[RolloutPrompt], seed: list[int]) -> list[list[RolloutStep]]:
        """Roll out all episodes and return, per episode, one rewarded step per turn whose video could be read."""
        self.seed, self.turn, self.steps = seed, 0, {(p.group, p.member): [] for p in prompts}
        turns, carry = self.variant.turns, self.variant.carry
        options = {"display_rule": "stop_at_repeat", "reuse": False}  # a state is sampled once
        run = records.Run(self.dataset, "train", "grpo", turns, carry, self.knobs.seed, **options)
        episodes = self.run(prompts, run)
        for episode, steps in zip(episodes, self.steps.values(), strict=True):
            self._add_rewards(episode, steps)
        return list(self.steps.values())

    def _add_rewards(self, episode, steps):
        """Fill in the rewards of an episode's steps."""
        retrievals = [(step.p_positive, step.p_positive_before) for step in steps]
        parts = rewards.reward_parts(episode, retrievals, self.knobs.retrieval_reward)
        for step, values in zip(steps, parts, strict=True):
            step.reward_parts = values
            step.reward = sum(getattr(self.weights, part) * value for part, value in values.items())

    def search(self, pairs):
        """Search as in evaluation, but the first turn shows the video of the prompt."""
        return [
            dataclasses.replace(ranking, top=(prompt.first_video,)) if state is ORIGINAL else ranking
            for (prompt, state), ranking in zip(pairs, super().search(pairs), strict=True)
        ]

    def ask(self, pairs):
        """Sample one reply and its soft tokens for each pair; a prompt that several share is read once."""
        self.turn += 1
        rows_of = common.rows_by_group((prompt.group, video) for prompt, video in pairs)
        clips = dict(zip(rows_of, self.clips.get([video for _, video in rows_of]), strict=True))
        verifications = [
            Verification(None, problem=clips[prompt.group, video].problem) for prompt, video in pairs
        ]
        order = [row for key, rows in rows_of.items() if clips[key].problem is None for row in rows]
        steps, completions = self._generate([pairs[row] for row in order], clips)
        for row, step, completion in zip(order, steps, completions, strict=True):
            self.steps[step.query.group, step.query.member].append(step)
            options = {"layout": self.layout, "refine_id": self.policy.refine_token_id}
            reply = replies.read_reply(completion.text, completion.ids, **options, ended=completion.ended)
            seconds = clips[step.query.group, step.shown].seconds
            verifications[row] = Verification(reply, seconds, state=step)
        return verifications

    def _generate(self, pairs, clips):
        """Return (steps, completions) of readable pairs, of which those that share a prompt stand side by side."""
        if not pairs:
            return [], []
        counts = Counter((prompt.group, video) for prompt, video in pairs)  # in the order of the pairs
        texts = {prompt.group: prompt.text for prompt, _ in pairs}
        prompts = {key: self.policy.prompt(self.prompt, texts[key[0]], clips[key]) for key in counts}
        completions, noise = self._sample(prompts, list(counts.values()))
        steps = [
            self._new_step(query, video, prompts[query.group, video], completion)
            for (query, video), completion in zip(pairs, completions, strict=True)
        ]
        rows = [row for row, completion in enumerate(completions) if completion.refine_context is not None]
        if rows:
            contexts = [completions[row].refine_context for row in rows]
            self._add_latents([steps[row] for row in rows], contexts, noise[rows])
        return steps, completions

    def _sample(self, prompts, counts):
        """Sample `counts` completions of each prompt, in one list, and noise (B, N, D) for their soft tokens.

        Random numbers belong to a prompt: they depend on its group, turn and video, not on the batch or the process.
        """
        keys = [(group, self.vectors.column(video)) for group, video in prompts]
        rngs = [np.random.default_rng([*self.seed, self.turn, *key]) for key in keys]
        completions = self.policy.reply(
            list(prompts.values()),
            group=counts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.knobs.rollout_temperature,
            rng=rngs,
        )
        shape = self.policy.settings.n_soft, self.policy.heads.width
        noise = [rng.standard_normal((count, *shape)) for rng, count in zip(rngs, counts, strict=True)]
        return completions, np.concatenate(noise)

    def _new_step(self, query, video, prompt, completion):
        """Return the step of one completion; its soft tokens come later."""
        negatives = list(query.negatives) + [video] * (video not in (query.video, *query.negatives))
        earlier = tuple(step.latents for step in self.steps[query.group, query.member])
        sampled = completion.ids, completion.logps, completion.text
        return RolloutStep(query, self.turn, video, prompt, *sampled, negatives, earlier)

    def _add_latents(self, steps, contexts, noise):
        """Fill in the soft tokens of steps that said <REFINE>, and how probable they make the right video."""
        noise = torch.from_numpy(noise).float().to(self.gallery_vecs.device)
        noise = self.knobs.latent_noise_std * noise if self.variant.latents == "gauss" else None
        latents = sqr.soft_tokens(self.policy, contexts, self.policy.settings.n_soft, noise)  # (B, N, D)
        vecs = self.query_vecs(steps, latents)
        original = torch.from_numpy(self.vectors.vecs_of([step.query.id for step in steps])).to(vecs)
        after, before = self.infonce_losses(vecs, steps), self.infonce_losses(original, steps)
        for step, step_latents, vec, *losses in zip(steps, latents, vecs, after, before, strict=True):
            step.latents, step.query_vec = step_latents, vec.cpu().numpy()
            step.p_positive, step.p_positive_before = (float(torch.exp(-loss)) for loss in losses)

    def query_vecs(self, steps, latents) -> torch.Tensor:
        """Embed the queries of steps of one turn with soft tokens (B, N, D), behind those carried: (B, D)."""
        blocks = [torch.stack(turn) for turn in zip(*(step.earlier_latents for step in steps), strict=True)]
        carried = sqr.stack_blocks([*blocks, latents], self.variant.carry)
        return sqr.soft_query(self.engine, self.policy.heads, [step.query.text for step in steps], carried)

    def infonce_losses(self, vecs, steps, all_videos=False) -> torch.Tensor:
        """Return InfoNCE (B,) of query vectors (B, D), against each step's own negatives.

        all_videos  against all videos, if stage 1 did so: for learning, not for the reward
        """
        temperature = self.knobs.infonce_temperature
        if all_videos and self.knobs.sft_negatives is None:
            right = self.vectors.columns([step.query.video for step in steps])
            logits = vecs @ self.gallery_vecs.T / temperature
            return F.cross_entropy(logits, torch.from_numpy(right).to(vecs.device), reduction="none")
        losses = []
        for vec, step in zip(vecs, steps, strict=True):
            columns = self.vectors.columns([step.query.video, *step.negatives])
            right, wrong = self.gallery_vecs[columns[:1]], self.gallery_vecs[columns[1:]]
            losses.append(common.info_nce(vec[None], right, wrong[None], temperature)[0])
        return torch.stack(losses)

    def refine_soft(self, rejected):
        """Search next with the query and the soft tokens that were made when the reply was given."""
        n = self.policy.settings.n_soft
        vecs = [verification.state.query_vec for _, verification, _ in rejected]
        states = [None if vec is None else runner.QueryState((), vec) for vec in vecs]
        return [Refinement("sqr", state, n, n + 1) for state in states]
