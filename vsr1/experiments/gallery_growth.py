"""Measure the first refinement in galleries that grow to ten times the test videos (B3)."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from vsr1.config import Profile
from vsr1.data import clip_cache
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common
from vsr1.loop import hqr, runner, sqr
from vsr1.loop.records import Episode
from vsr1.models import batching, embedding, engine, search_index
from vsr1.training import grpo

# Size of the largest gallery: times the test videos. With 100 no query of `mini` found its video, typed or refined.
GROWTH = 10
BLOCK = 8192  # made-up videos whose vectors are in memory at once


def gallery_numbers(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Measure R@1 and R@10 before and after the first refinement as the gallery grows.

    The video that is rejected is that of the small gallery.
    """
    vectors = _load(profile, dataset, "test")
    weights = str(grpo.train(profile, dataset))
    hard = [e for e in common.run_sample(profile, dataset, "hqr-seen") if e.problem is None]
    ids = [e.desc_id for e in hard]
    soft = common.select(common.run_episodes(profile, dataset, "vsr1"), ids)
    original = vectors.vecs_of(ids)
    queries = {
        "none": original,
        "sqr": _soft_vecs(profile, dataset, soft, original, weights),
        "hqr-seen": _rewritten_vecs(profile, hard, original),
    }
    numbers = {}
    right = vectors.columns([e.gt_video for e in soft])
    for size, ranks in growing_ranks(queries, galleries(profile, dataset, vectors), right):
        for system, values in ranks.items():
            for k in (1, 10):
                numbers[f"B3/{dataset}/{system}/vr@{k}_{size}"] = common.estimate(profile, soft, values <= k)
    return numbers


def _load(profile, dataset, split):
    return search_index.load_vectors(embedding.embed_corpus(profile, dataset, split))


# --- Galleries


def galleries(
    profile: Profile, dataset: str, vectors: search_index.Vectors
) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """Yield (name, blocks (V, D) of vectors that the gallery has beyond the one before).

    own    the test videos
    train  with the train videos
    all    with the videos of the other data sets, where the profile has any
    made   with made-up videos, GROWTH times as many as the first: a video of this data set, moved by the difference of
           the two that are most alike
    """
    others = [name for name in profile.datasets if name != dataset]
    train = _load(profile, dataset, "train").video_vecs
    yield "own", [vectors.video_vecs]
    yield "train", [train]
    far = [_load(profile, name, split).video_vecs for name in others for split in ("train", "test")]
    if far:
        yield "all", far
    real = np.concatenate([vectors.video_vecs, train])
    count = GROWTH * len(vectors.video_vecs) - len(real) - sum(map(len, far))
    yield "made", _made_up(real, count, np.random.default_rng(profile.seed))


def _made_up(real, count, rng):
    """Yield blocks of `count` made-up vectors, moved from videos (V, D) by differences of near-duplicates."""
    nearest = (real @ real.T - 2 * np.eye(len(real))).argmax(axis=1)  # of each video the one most like it
    start, pair = rng.integers(0, len(real), (2, count))
    for first in range(0, count, BLOCK):
        rows, ends = start[first : first + BLOCK], pair[first : first + BLOCK]
        moved = real[rows] + real[ends] - real[nearest[ends]]
        yield moved / np.linalg.norm(moved, axis=1, keepdims=True)


def growing_ranks(
    queries: dict[str, np.ndarray], galleries: Iterable, right: np.ndarray
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield (name, {system: ranks (Q,)}) of galleries that each add blocks of videos to the one before.

    queries  {system: vectors (Q, D)}
    right    (Q,) columns in the first block
    """
    scores_right, ranks = {}, {system: np.ones(len(right), int) for system in queries}
    for name, blocks in galleries:
        for block in blocks:
            for system, vecs in queries.items():
                scores = vecs @ block.T  # (Q, V)
                if system not in scores_right:
                    scores_right[system] = scores[np.arange(len(right)), right]
                ranks[system] += (scores > scores_right[system][:, None]).sum(axis=1)
        yield name, {system: values.copy() for system, values in ranks.items()}


# --- Refined queries


@torch.no_grad()
def _soft_vecs(profile, dataset, episodes: list[Episode], original, weights):
    """Compute query vectors (Q, D) after the first refinement again, from recorded replies; original without one."""
    search_engine, policy = runner.load_pair(profile, runner.SYSTEMS["sqr"], weights)
    vecs = original.copy()
    rows = [row for row, e in enumerate(episodes) if e.turns and e.turns[0].rank_by_depth]
    shown = {episodes[row].turns[0].shown_id for row in rows}
    splitter = batching.OOMSplitter("eval_batch")
    with clip_cache.open_clips(profile, dataset, shown) as clips:

        def refine(rows):
            batch = [episodes[row] for row in rows]
            videos = clips.get([e.turns[0].shown_id for e in batch])
            texts, system = [e.query for e in batch], policy.settings.system
            prompts = [policy.prompt(system, *pair) for pair in zip(texts, videos, strict=True)]
            replies = [list(e.turns[0].reply.ids) for e in batch]
            contexts = policy.replay(prompts, replies).refine_contexts
            latents = sqr.soft_tokens(policy, contexts, policy.settings.n_soft)
            vecs[rows] = sqr.soft_query(search_engine, policy.heads, texts, latents).cpu().numpy()

        for start in range(0, len(rows), profile.eval_batch):
            splitter.run(refine, rows[start : start + profile.eval_batch])
    return vecs


def _rewritten_vecs(profile, episodes: list[Episode], original):
    """Compute query vectors (Q, D) of the first rewrite; original without one."""
    vecs = original.copy()
    rows = [row for row, e in enumerate(episodes) if e.turns and e.turns[0].update_text]
    if rows:
        rewriter = hqr.with_query_limit(engine.load(profile))
        vecs[rows] = rewriter.embed_texts([episodes[row].turns[0].update_text for row in rows])
    return vecs
