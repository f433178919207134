"""Connect engine, policy and videos to the loop."""

import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

from vsr1.config import InputError
from vsr1.data import annotations, clip_cache
from vsr1.loop import episode, hqr, sqr
from vsr1.loop.records import ORIGINAL, Cost, Ranking, Refinement, Verification
from vsr1.loop.replies import read_reply
from vsr1.models import checkpoints, engine, policy, prompt_text, search_index

MIN_COSINE, COMPARED_QUERIES = 0.999, 8  # METHOD.md 8: lowest cosine; of so many queries (ours)


@dataclass(frozen=True)
class System:
    """What a system does where systems differ."""

    refine: str | None = None  # walkdown, sqr, or an HQR variant: blind, seen, reasoned; None: it looks once
    mode: str = "replace"  # of HQR: the update instead of the query, or append: behind it
    display_rule: str | None = None  # None: as the profile says
    first: str = "ranked"  # what the first search shows; "right" and "wrong" are given away (known video)
    marked: bool = False  # <REFINE> is put behind every reply: heads on a model that never learned to say it


SYSTEMS = {
    "zs": System(),
    "walkdown": System("walkdown", display_rule="skip_rejected"),
    "sqr": System("sqr"),
    "sqr-untrained": System("sqr", marked=True),
    **{f"hqr-{variant}": System(variant) for variant in ("blind", "seen", "reasoned")},
    **{f"hqr-{variant}-append": System(variant, "append") for variant in ("blind", "seen", "reasoned")},
    "known-right": System(first="right"),
    "known-wrong": System(first="wrong"),
}


@dataclass(frozen=True, eq=False)
class QueryState:
    """A query as it stands after a refinement."""

    carried: tuple  # of the latest turns, oldest first: soft tokens (N, D), or updates in words
    vec: np.ndarray  # (D,) length one


class EpisodeRunner:
    """Engine, policy and videos as the functions that the loop is handed: `search`, `ask`, `refine`."""

    def __init__(self, profile, system: System, made, agent, vectors, clips: clip_cache.ClipCache):
        self.system, self.engine, self.agent, self.vectors, self.clips = system, made, agent, vectors, clips
        self.max_new_tokens, self.top = profile.max_new_tokens, profile.max_turns + 1
        self.carry = agent.settings.carry_blocks if system.refine == "sqr" else 1
        plain = agent.settings is None or system.marked  # it is asked for what it knows
        self.prompt = prompt_text.SYSTEM_ZS if plain else agent.settings.system
        self.layout = "plain" if agent.heads is None else "sqr"
        if system.refine == "reasoned":
            self.prompt, self.layout = prompt_text.SYSTEM_HQR, "hqr"
        self.long = hqr.with_query_limit(made)  # for updates in words
        kinds = {None: None, "walkdown": episode.rank_fallback, "sqr": self.soft}
        self.refine = kinds.get(system.refine, self.hard)

    def search(self, pairs) -> list[Ranking]:
        """The gallery in the order of each query's vector."""
        # (B, D) query vectors against (V, D) of the videos
        vecs = np.stack(
            [self.vectors.query_vec(q.id) if state is ORIGINAL else state.vec for q, state in pairs]
        )
        scores = self.vectors.scores(vecs)  # (B, V)
        _, best = self.vectors.search(vecs, self.top, scores)  # (B, top)
        right = self.vectors.columns([query.video for query, _ in pairs], missing=0)
        ranks, ties = search_index.ranks(scores, right), search_index.ties(scores, right)
        found = []
        for row, (query, _) in enumerate(pairs):
            top = tuple(self.vectors.video_ids[column] for column in best[row])
            score, first = float(scores[row, right[row]]), float(scores[row, best[row, 0]])
            known = self.vectors.has_video(query.video)
            place = (int(ranks[row]), int(ties[row])) if known else (None, None)
            found.append(Ranking(*place, self._given(query, top), score if known else None, first))
        return found

    def _given(self, query, top):
        """What is shown where the right or the best wrong video is given away."""
        if self.system.first == "right":
            return (query.video,)
        return tuple(v for v in top if v != query.video) if self.system.first == "wrong" else top

    def ask(self, pairs) -> list[Verification]:
        """What the policy says to each query and its video; videos are decoded apart from the seconds."""
        clips = self.clips.get([video for _, video in pairs])
        good = [row for row, clip in enumerate(clips) if clip.problem is None]
        prompts = [self.agent.prompt(self.prompt, pairs[row][0].text, clips[row]) for row in good]
        looks = [Verification(None, problem=clip.problem) for clip in clips]
        replies = self._say(prompts)
        if self.system.marked and replies:
            replies = self._mark(prompts, replies)
        for row, prompt, (said, seconds) in zip(good, prompts, replies, strict=True):
            reply = read_reply(
                said.text,
                said.ids,
                layout=self.layout,
                refine_id=self.agent.refine_token_id,
                ended=said.ended,
            )
            cost = Cost(seconds, len(said.ids), len(prompt.ids) + len(said.ids), 0)
            # A branch holds the KV cache of its whole batch: only where soft tokens are made from it.
            branch = said.refine_context if self.system.refine == "sqr" else None
            looks[row] = Verification(reply, clips[row].seconds, cost, state=(branch, clips[row]))
        return looks

    def _say(self, prompts):
        """(completion, seconds) of each prompt, greedily, as one batch."""
        started = time.perf_counter()
        said = self.agent.reply(prompts, max_new_tokens=self.max_new_tokens) if prompts else []
        seconds = (time.perf_counter() - started) / max(1, len(said))
        return [(one, seconds) for one in said]

    def _mark(self, prompts, replies):
        """The same replies with <REFINE> at their end, and their branches there."""
        branches = self.agent.append_refine(prompts, [said.ids for said, _ in replies])
        return [
            (replace(said, ids=ids, text=f"{said.text} {prompt_text.REFINE}", refine_context=branch), seconds)
            for (said, seconds), (ids, branch) in zip(replies, branches, strict=True)
        ]

    @torch.no_grad()
    def soft(self, rejected) -> list[Refinement]:
        """SQR: N latents of each reply that asks for them, and the query with 1, 2, .. N of them."""
        started, n = time.perf_counter(), self.agent.settings.n_soft
        steps = [Refinement("sqr", None) for _ in rejected]
        rows = [row for row, (_, look, _) in enumerate(rejected) if look.reply.has_refine]
        if not rows:
            return steps
        latents = sqr.soft_tokens(self.agent, [rejected[row][1].state[0] for row in rows], n)  # (B, N, D)
        earlier = [() if rejected[row][2] is ORIGINAL else rejected[row][2].carried for row in rows]
        blocks = [torch.stack(turn) for turn in zip(*earlier, strict=True)]  # all walks are at the same turn
        texts = [rejected[row][0].text for row in rows]
        carried = sqr.stack_blocks([*blocks, latents], self.carry)  # (B, up to C * N, D)
        vecs = sqr.soft_query(self.engine, self.agent.heads, texts, carried).cpu().numpy()
        seconds = (time.perf_counter() - started) / len(rows)
        kept = carried[:, : carried.shape[1] - n]  # of earlier turns
        depths = range(1, n + 1)  # with the last, which is known, for one soft token has no other
        sweep = sqr.prefix_queries(self.engine, self.agent.heads, texts, latents, kept, depths).cpu().numpy()
        for i, row in enumerate(rows):
            state = QueryState((*earlier[i], latents[i])[-self.carry :], vecs[i])
            by_depth = (*(QueryState((), vec) for vec in sweep[i, :-1]), state)
            cost = Cost(seconds, n, n, 1)  # <REFINE> is read once more, the last latent is not
            steps[row] = Refinement("sqr", state, n, n + 1, cost=cost, by_depth=by_depth)
        return steps

    def hard(self, rejected) -> list[Refinement]:
        """HQR: the query in other words, from the reply itself (reasoned) or from another call (blind, seen)."""
        variant, mode = self.system.refine, self.system.mode
        updates, costs = [look.reply.update for _, look, _ in rejected], [Cost()] * len(rejected)
        if variant != "reasoned":
            system, sees = hqr.rewrite_prompt(variant)
            asked = [(query.text, look.state[1] if sees else None) for query, look, _ in rejected]
            prompts = [self.agent.prompt(system, *one) for one in asked]
            said = self._say(prompts)
            updates = [read_reply(one.text, one.ids, ended=one.ended).update for one, _ in said]
            costs = [
                Cost(seconds, len(one.ids), len(prompt.ids) + len(one.ids), 0)
                for prompt, (one, seconds) in zip(prompts, said, strict=True)
            ]
        started = time.perf_counter()
        rows = [row for row, update in enumerate(updates) if update is not None]
        texts = [hqr.compose_query(rejected[row][0].text, [updates[row]], mode) for row in rows]
        vecs = self.long.embed_texts(texts) if texts else []
        seconds = (time.perf_counter() - started) / max(1, len(rows))
        kind = f"hqr-{variant}" + "-append" * (mode == "append")
        steps = [Refinement(kind, None, cost=cost) for cost in costs]
        for row, vec in zip(rows, vecs, strict=True):
            size = self._tokens(updates[row]), self._tokens(f"<query_update>{updates[row]}</query_update>")
            cost = costs[row] + Cost(seconds, 0, 0, 1)
            steps[row] = Refinement(kind, QueryState((updates[row],), vec), *size, updates[row], cost)
        return steps

    def _tokens(self, text):
        return len(self.agent.tokenizer(text, add_special_tokens=False)["input_ids"])


def find_system(name):
    if name not in SYSTEMS:
        raise InputError(f"{name}: no such system; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def load_pair(profile, system: System, weights: str):
    """(engine, policy) that fit each other: the profile's engine, or the one that came with the policy.

    Raises InputError for SQR with a policy without heads; only the untrained control (`System.marked`) gets new ones.
    """
    agent = checkpoints.load(weights, profile)
    agent.model.requires_grad_(False)  # a video is looked at once, then (`qwen.prefill`)
    made = engine.load(replace(profile, engine=agent.query_embedder) if agent.query_embedder else profile)
    if system.refine == "sqr":
        if agent.heads is None and not system.marked:
            raise InputError(
                f"{weights}: no soft-query heads in it, which sqr needs; train it, or choose sqr-untrained or walkdown"
            )
        if agent.heads is None:
            settings = policy.new_settings(profile, made.instruction)
            agent = policy.new_heads(agent, settings, profile.seed, made)
        sqr.check_fit(agent, made)
    return made, agent


def warn_engine_mismatch(made, vectors, queries) -> None:
    """Says so where an engine that came with a policy is not the one that embedded the corpus (METHOD.md 8)."""
    some = annotations.evenly_spaced(queries, COMPARED_QUERIES)
    cosines = (made.embed_texts([q.text for q in some]) * vectors.vecs_of([q.id for q in some])).sum(axis=1)
    if cosines.min() < MIN_COSINE:
        far = f"a query's vector has cosine {cosines.min():.4f} with that beside the index"
        warnings.warn(f"{made.name}: {far}; is the profile's engine the same?", stacklevel=2)
