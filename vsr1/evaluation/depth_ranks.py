"""Rank videos with 0, 1, .. N soft tokens of the first turn, for the figures of single searches (F1, F6)."""

from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import Profile
from vsr1.evaluation import soft_token_sweep
from vsr1.loop.records import Episode
from vsr1.models import search_index


def make(profile: Profile, dataset: str, episodes: list[Episode]) -> Path | None:
    """Write ranks.json of SQR's episodes and return its folder, a step.

    None without episodes, or where the trained policy is gone.
    """
    weights = profile.runs(dataset) / "grpo" / "vsr1"
    if not episodes or not (weights / "vsr1.json").exists():
        return None
    vectors = profile.data_dir(dataset) / "embed" / "engine" / "test"
    inputs = {
        "vectors": cache.metadata(vectors).get("key"),
        "policy": cache.file_digest(weights),
        "episodes": [[one.desc_id, one.turns[0].shown_id, list(one.turns[0].reply.ids)] for one in episodes],
        "code": cache.source_digest(__name__),
    }
    build = lambda folder: rank(profile, dataset, str(weights), episodes, folder)  # noqa: E731
    return cache.build(profile.runs(dataset) / "depth_ranks", inputs, build)


def rank(profile: Profile, dataset: str, weights: str, episodes: list[Episode], folder: Path) -> None:
    """Write ranks.json: {query id: {video: its rank by number of soft tokens}}.

    The videos are those that are best with some number of soft tokens, in that order, and the right one.
    """
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    policies = {episode.desc_id: ("sqr", weights, episode) for episode in episodes}
    sweeps, ranks = soft_token_sweep.sweep_policies(profile, dataset, vectors, policies), {}
    for episode in episodes:
        scores = vectors.scores(sweeps[episode.desc_id].vecs)  # (N + 1, V)
        videos = dict.fromkeys([*episode.turns[0].top1_by_depth, episode.gt_video])
        columns = {video: np.full(len(scores), vectors.column(video)) for video in videos}
        by_video = {video: search_index.ranks(scores, column).tolist() for video, column in columns.items()}
        ranks[episode.desc_id] = by_video
    cache.write_json(folder / "ranks.json", ranks)
