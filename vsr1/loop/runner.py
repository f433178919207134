"""Connect engine, policy and videos to the loop."""

import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch

from vsr1.config import InputError
from vsr1.data import annotations, clip_cache
from vsr1.loop import episode, hqr, records, sqr
from vsr1.loop.records import ORIGINAL, Cost, Ranking, Refinement, Verification
from vsr1.loop.replies import read_reply
from vsr1.models import checkpoints, prompt_text, search_index
from vsr1.models import engine as engines
from vsr1.models import policy as policies

MIN_COSINE, COMPARED_QUERIES = 0.999, 8  # docs/method.md section 8: lowest cosine; of so many queries (ours)


@dataclass(frozen=True)
class System:
    """What a system does where systems differ."""

    # walkdown, rocchio, sqr, or an HQR variant: blind, seen, reasoned; None: it has one turn
    refine: str | None = None
    mode: str = "replace"  # of HQR: the update instead of the query; append: after the query
    display_rule: str | None = None  # None: the profile's
    # What the first search shows: "ranked", or the oracle video: "right", or "wrong", the best wrong one.
    first: str = "ranked"
    append_refine: bool = False  # <REFINE> ends every reply: for heads of a model that never says it
    keep_all: bool = False  # of sqr: soft tokens of all turns stay in the query, not as many as was trained
    accepts: bool = True  # False: every verdict counts as a rejection, for a choice among all that was shown
    feedback: float = 0.0  # of rocchio: how much of a rejected video's vector is taken off the query's


SYSTEMS = {
    "zs": System(),
    "walkdown": System("walkdown", display_rule="skip_rejected"),
    "rerank": System("walkdown", display_rule="skip_rejected", accepts=False),
    "rocchio": System("rocchio", display_rule="skip_rejected", feedback=0.5),
    "sqr": System("sqr"),
    "sqr-skip": System("sqr", display_rule="skip_rejected"),
    "sqr-all": System("sqr", keep_all=True),
    "sqr-untrained": System("sqr", append_refine=True),
    **{f"hqr-{variant}": System(variant) for variant in ("blind", "seen", "reasoned")},
    **{f"hqr-{variant}-append": System(variant, "append") for variant in ("blind", "seen", "reasoned")},
    "oracle-right": System(first="right"),
    "oracle-wrong": System(first="wrong"),
}


NEEDS_NO_STATE = (None, "walkdown", "rocchio")  # to refine, but for the id of the video


def find_system(name: str) -> System:
    """Return the system of SYSTEMS called `name`. Raises InputError."""
    if name not in SYSTEMS:
        raise InputError(f"{name}: no such system; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


@dataclass(frozen=True, eq=False)
class QueryState:
    """A query as it stands after a refinement."""

    carried: tuple  # of the latest turns, oldest first: soft tokens (N, D), or updates in words
    vec: np.ndarray  # (D,) length one


class EpisodeRunner:
    """Engine, policy and videos as the functions that the loop is handed: `search`, `ask`, `refine`."""

    def __init__(
        self, profile, system: System, engine, policy, vectors, clips: clip_cache.ClipCache, known=None
    ):
        """Hold them ready; `known` has looks of the same policy that are not taken again, as of `records.known_looks`.

        They hold no KV cache and no frames, which sqr and hqr refine from.
        """
        assert not known or system.refine in NEEDS_NO_STATE, system
        self.known = known or {}
        self.system, self.vectors, self.clips = system, vectors, clips
        self.engine, self.policy = engine, policy
        self.max_new_tokens, self.top_k = profile.max_new_tokens, profile.max_turns + 1
        self.carry = policy.settings.carry_blocks if system.refine == "sqr" else 1
        if system.keep_all:
            self.carry = profile.max_turns
        untrained = policy.settings is None or system.append_refine
        self.prompt = prompt_text.SYSTEM_ZS if untrained else policy.settings.system
        self.layout = "plain" if policy.heads is None else "sqr"
        if system.refine == "reasoned":
            self.prompt, self.layout = prompt_text.SYSTEM_HQR, "hqr"
        self.rewrite_engine = hqr.with_query_limit(engine)
        functions = {
            None: None,
            "walkdown": episode.rank_fallback,
            "rocchio": self.refine_by_feedback,
            "sqr": self.refine_soft,
        }
        self.refine = functions.get(system.refine, self.refine_hard)

    def run(self, queries, record: records.Run) -> list[records.Episode]:
        """Run the loop on queries; one episode each, in order."""
        return episode.run_episodes(queries, self.search, self.ask, self.refine, record)

    def search(self, pairs) -> list[Ranking]:
        """Rank the gallery by each query's vector; of an oracle system `top` holds what it shows."""
        vecs = [self.vectors.query_vec(q.id) if state is ORIGINAL else state.vec for q, state in pairs]
        right_videos = [query.video for query, _ in pairs]
        rankings = rank_gallery(self.vectors, np.stack(vecs), right_videos, self.top_k)
        return [
            replace(ranking, top=self._shown_first(query, ranking.top))
            for (query, _), ranking in zip(pairs, rankings, strict=True)
        ]

    def _shown_first(self, query, top):
        """Return the best videos, or the right one alone, or all but the right one."""
        if self.system.first == "right":
            return (query.video,)
        return tuple(v for v in top if v != query.video) if self.system.first == "wrong" else top

    def ask(self, pairs) -> list[Verification]:
        """Let the policy verify and ground each query in its video, where that is not known."""
        keys = [(query.id, video) for query, video in pairs]
        unknown = [pair for key, pair in zip(keys, pairs, strict=True) if key not in self.known]
        looks = iter(self._look(unknown) if unknown else [])
        verifications = [self.known[key] if key in self.known else next(looks) for key in keys]
        return verifications if self.system.accepts else list(map(_rejection, verifications))

    def _look(self, pairs):
        """Show each video to the policy; decoding it is not in the seconds."""
        clips = self.clips.get([video for _, video in pairs])
        readable = [row for row, clip in enumerate(clips) if clip.problem is None]
        prompts = [self.policy.prompt(self.prompt, pairs[row][0].text, clips[row]) for row in readable]
        verifications = [Verification(None, problem=clip.problem) for clip in clips]
        completions, seconds = self._reply(prompts)
        spans = self._forced_spans([pairs[row] for row in readable], prompts, completions)
        if self.system.append_refine and prompts:
            completions = self._append_refine(prompts, completions)
        for row, prompt, completion, span in zip(readable, prompts, completions, spans, strict=True):
            # It holds the KV cache of its whole batch: only where soft tokens are decoded from it.
            context = completion.refine_context if self.system.refine == "sqr" else None
            verifications[row] = Verification(
                self._read(completion),
                clips[row].seconds,
                _cost(prompt, completion, seconds),
                margin=completion.verdict and completion.verdict.margin,
                forced_span=span,
                state=(context, clips[row], pairs[row][1]),
            )
        return verifications

    def _forced_spans(self, pairs, prompts, completions):
        """Return the span that each reply would name if it accepted; None unless it rejects the right video."""
        spans = [None] * len(pairs)
        rows = [
            row
            for row, ((query, video), completion) in enumerate(zip(pairs, completions, strict=True))
            if query.video == video and completion.verdict and not self._read(completion).matched
        ]
        if rows:
            texts = self.policy.reply_if_matched(
                [prompts[row] for row in rows], [completions[row] for row in rows], self.max_new_tokens
            )
            for row, text in zip(rows, texts, strict=True):
                spans[row] = read_reply(text, ()).span
        return spans

    def _reply(self, prompts):
        """Decode greedily as one batch; return (completions, seconds of each)."""
        if not prompts:
            return [], 0.0
        started = time.perf_counter()
        completions = self.policy.reply(prompts, max_new_tokens=self.max_new_tokens)
        return completions, (time.perf_counter() - started) / len(completions)

    def _read(self, completion):
        """Parse a completion in the layout that was asked for."""
        options = {"layout": self.layout, "refine_id": self.policy.refine_token_id, "ended": completion.ended}
        return read_reply(completion.text, completion.ids, **options)

    def _append_refine(self, prompts, completions):
        """Return the same completions with <REFINE> at their end."""
        appended = self.policy.append_refine(prompts, [completion.ids for completion in completions])
        return [
            replace(
                completion, ids=ids, text=f"{completion.text} {prompt_text.REFINE}", refine_context=context
            )
            for completion, (ids, context) in zip(completions, appended, strict=True)
        ]

    def refine_by_feedback(self, rejected) -> list[Refinement]:
        """Rocchio's feedback: take a part of the rejected video's vector off the query's; no model is asked."""
        refinements = []
        for query, verification, state in rejected:
            vec = self.vectors.query_vec(query.id) if state is ORIGINAL else state.vec
            video_vec = self.vectors.video_vecs[self.vectors.column(verification.state[2])]
            moved = move_away(vec, video_vec, self.system.feedback)
            refinements.append(Refinement("rocchio", QueryState((), moved), tokens=0, tokens_tagged=0))
        return refinements

    @torch.no_grad()
    def refine_soft(self, rejected) -> list[Refinement]:
        """SQR: decode N soft tokens for each reply with <REFINE>, and embed the query with 1, 2, .. N of them."""
        refinements = [Refinement("sqr", None) for _ in rejected]
        rows = [row for row, (_, verification, _) in enumerate(rejected) if verification.reply.has_refine]
        if not rows:
            return refinements
        started, n, heads = time.perf_counter(), self.policy.settings.n_soft, self.policy.heads
        queries, verifications, states = zip(*(rejected[row] for row in rows), strict=True)
        texts = [query.text for query in queries]
        latents = sqr.soft_tokens(self.policy, [shown.state[0] for shown in verifications], n)  # (B, N, D)
        earlier = [() if state is ORIGINAL else state.carried for state in states]
        # All episodes are at the same turn.
        blocks = [torch.stack(turn) for turn in zip(*earlier, strict=True)]
        soft = sqr.stack_blocks([*blocks, latents], self.carry)  # (B, up to C * N, D)
        vecs = sqr.soft_query(self.engine, heads, texts, soft).cpu().numpy()
        cost = Cost((time.perf_counter() - started) / len(rows), n, n, 1)  # the last latent is not read again
        before = soft[:, : soft.shape[1] - n]  # of earlier turns
        depths = range(1, n + 1)  # the last is known; without it one soft token would leave none to embed
        sweep = sqr.prefix_queries(self.engine, heads, texts, latents, before, depths).cpu().numpy()
        for i, row in enumerate(rows):
            state = QueryState((*earlier[i], latents[i])[-self.carry :], vecs[i])
            by_depth = (*(QueryState((), vec) for vec in sweep[i, :-1]), state)
            refinements[row] = Refinement("sqr", state, n, n + 1, cost=cost, by_depth=by_depth)
        return refinements

    def refine_hard(self, rejected) -> list[Refinement]:
        """HQR: embed each query in other words, where the policy wrote any."""
        system = self.system
        kind = f"hqr-{system.refine}" + "-append" * (system.mode == "append")
        updates = self._updates(rejected)
        refinements = [Refinement(kind, None, cost=cost) for _, cost in updates]
        rows = [row for row, (update, _) in enumerate(updates) if update is not None]
        if not rows:
            return refinements
        started = time.perf_counter()
        texts = [hqr.compose_query(rejected[row][0].text, updates[row][0], system.mode) for row in rows]
        vecs = self.rewrite_engine.embed_texts(texts)
        embedding = Cost((time.perf_counter() - started) / len(rows), 0, 0, 1)
        for row, vec in zip(rows, vecs, strict=True):
            update, cost = updates[row]
            sizes = self._tokens(update), self._tokens(f"<query_update>{update}</query_update>")
            refinements[row] = Refinement(kind, QueryState((update,), vec), *sizes, update, cost + embedding)
        return refinements

    def _updates(self, rejected):
        """Return (update in words or None, its cost) of each, from the reply itself (reasoned) or from another call."""
        if self.system.refine == "reasoned":
            return [(verification.reply.update, Cost()) for _, verification, _ in rejected]
        prompt, sees_video = hqr.rewrite_prompt(self.system.refine)
        prompts = [
            self.policy.prompt(prompt, query.text, verification.state[1] if sees_video else None)
            for query, verification, _ in rejected
        ]
        completions, seconds = self._reply(prompts)
        return [
            (read_reply(reply.text, reply.ids, ended=reply.ended).update, _cost(prompt, reply, seconds))
            for prompt, reply in zip(prompts, completions, strict=True)
        ]

    def _tokens(self, text):
        return len(self.policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def rank_gallery(vectors, query_vecs: np.ndarray, right_videos: list[str], top_k: int) -> list[Ranking]:
    """Rank the gallery of `vectors` by query vectors (B, D); `top` holds the best `top_k` videos of each."""
    scores = vectors.scores(query_vecs)  # (B, V)
    _, best = vectors.search(query_vecs, top_k, scores)  # (B, top_k)
    right = vectors.columns(right_videos, missing=0)
    ranks, ties = search_index.ranks(scores, right), search_index.ties(scores, right)
    rankings = []
    for row, video in enumerate(right_videos):
        top = tuple(vectors.video_ids[column] for column in best[row])
        top1 = float(scores[row, best[row, 0]])
        if vectors.has_video(video):
            score = float(scores[row, right[row]])
            rankings.append(Ranking(int(ranks[row]), int(ties[row]), top, score, top1))
        else:
            rankings.append(Ranking(None, None, top, None, top1))
    return rankings


def move_away(vecs: np.ndarray, rejected_vecs: np.ndarray, feedback: float) -> np.ndarray:
    """Return unit vectors (..., D) of queries less `feedback` times those of the videos they were shown."""
    moved = vecs - feedback * rejected_vecs
    return moved / np.linalg.norm(moved, axis=-1, keepdims=True)


def _rejection(verification):
    """Return the same verification with `not_matched` as its verdict."""
    reply = verification.reply
    return verification if reply is None else replace(verification, reply=replace(reply, matched=False))


def _cost(prompt, completion, seconds):
    return Cost(seconds, len(completion.ids), len(prompt.ids) + len(completion.ids), 0)


# --- Engine and policy


def load_pair(profile, system: System, weights: str):
    """Load (engine, policy) that fit each other: the profile's engine, or the one that came with the policy.

    Raises InputError for SQR with a policy without heads, or with another engine's; only the untrained control
    (`System.append_refine`) gets new heads.
    """
    policy = checkpoints.load(weights, profile)
    policy.model.requires_grad_(False)  # so that `decoding.prefill` encodes a video once
    engine = engines.load(
        replace(profile, engine=policy.query_embedder) if policy.query_embedder else profile
    )
    if system.refine == "sqr":
        if policy.heads is None and not system.append_refine:
            raise InputError(
                f"{weights}: no soft-query heads in it, which sqr needs; train it, or choose sqr-untrained or walkdown"
            )
        if policy.heads is None:
            settings = policies.new_settings(profile, engine.instruction)
            policy = policies.new_heads(policy, settings, profile.seed, engine)
        sqr.check_fit(policy, engine)
    return engine, policy


def warn_engine_mismatch(engine, vectors, queries) -> None:
    """Warn where an engine that came with a policy is not the one that embedded the corpus."""
    sample = annotations.evenly_spaced(queries, COMPARED_QUERIES)
    vecs = engine.embed_texts([query.text for query in sample])  # (Q, D)
    lowest = (vecs * vectors.vecs_of([query.id for query in sample])).sum(axis=1).min()
    if lowest < MIN_COSINE:
        far = f"a query's vector has cosine {lowest:.4f} with that beside the index"
        warnings.warn(f"{engine.name}: {far}; is the profile's engine the same?", stacklevel=2)
