"""Follow single queries as their soft tokens are added one by one: vectors, ranks and cosines at each depth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.loop import runner, sqr
from vsr1.loop.records import Episode
from vsr1.models import prompt_text, search_index


@dataclass(frozen=True, eq=False)
class Sweep:
    """One query with the first 0, 1, .. N soft tokens after one reply, in the engine's space."""

    vecs: np.ndarray  # (N + 1, D)
    ranks: np.ndarray  # (N + 1,) of the right video
    cosines: dict[str, np.ndarray]  # (N + 1,) with the right, the shown, the best video, the original query


@torch.no_grad()
def sweep(
    engine, policy, vectors: search_index.Vectors, episode: Episode, clip: video_reader.Clip, system: str
) -> Sweep:
    """Sweep the soft tokens after the first reply of an episode; a reply without <REFINE> gets one behind it.

    clip    the video of its first turn
    system  the system prompt of that episode
    """
    n = policy.settings.n_soft
    prompt, ids = policy.prompt(system, episode.query, clip), list(episode.turns[0].reply.ids)
    if policy.refine_token_id in ids:
        contexts = policy.replay([prompt], [ids]).refine_contexts
    else:
        contexts = [context for _, context in policy.append_refine([prompt], [ids])]
    latents = sqr.soft_tokens(policy, contexts, n)  # (1, N, D)
    vecs = sqr.prefix_queries(engine, policy.heads, [episode.query], latents)[0].cpu().numpy()  # (N + 1, D)
    scores = vectors.scores(vecs)  # (N + 1, V)
    right, shown = vectors.column(episode.gt_video), vectors.column(episode.turns[0].shown_id)
    cosines = {"right": scores[:, right], "shown": scores[:, shown], "best": scores.max(axis=1)}
    cosines["typed"] = vecs @ vecs[0]
    return Sweep(vecs, search_index.ranks(scores, np.full(n + 1, right)), cosines)


def sweep_policies(
    profile: Profile, dataset: str, vectors: search_index.Vectors, policies: dict
) -> dict[str, Sweep]:
    """Sweep one query by several policies: {name: (system of `runner.SYSTEMS`, weights, its episode)}."""
    sweeps, folder = {}, profile.data_dir(dataset) / "videos"
    with video_reader.reader_for(profile) as reader:
        for name, (system, weights, episode) in policies.items():
            (video,) = annotations.find_videos(folder, [episode.turns[0].shown_id])
            engine, policy = runner.load_pair(profile, runner.SYSTEMS[system], weights)
            prompt = prompt_text.SYSTEM_ZS if runner.SYSTEMS[system].append_refine else policy.settings.system
            sweeps[name] = sweep(engine, policy, vectors, episode, reader.read(video.path), prompt)
    return sweeps


# --- Ranks of several videos, for the figures of single searches (F1, F6)


def write_ranks(profile: Profile, dataset: str, episodes: list[Episode]) -> Path | None:
    """Write depth_ranks/ranks.json of episodes of the final system, a step; return its folder.

    None without episodes, or where the trained policy is gone.
    """
    weights = profile.runs(dataset) / "grpo" / "vsr1"
    if not episodes or not (weights / "vsr1.json").exists():
        return None
    vectors = profile.data_dir(dataset) / "embed" / "engine" / "test"
    inputs = {
        "vectors": cache.metadata(vectors).get("key"),
        "policy": cache.file_digest(weights),
        "episodes": [
            [episode.desc_id, episode.turns[0].shown_id, list(episode.turns[0].reply.ids)]
            for episode in episodes
        ],
        "code": cache.source_digest(__name__),
    }

    def work(folder):
        ranks = ranks_by_depth(profile, dataset, str(weights), episodes)
        cache.write_json(folder / "ranks.json", ranks)

    return cache.build(profile.runs(dataset) / "depth_ranks", inputs, work)


def ranks_by_depth(profile: Profile, dataset: str, weights: str, episodes: list[Episode]) -> dict:
    """Return {query id: {video: its rank by number of soft tokens}}.

    The videos are those that are best with some number of soft tokens, in that order, and the right one.
    """
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    policies = {episode.desc_id: ("sqr", weights, episode) for episode in episodes}
    sweeps = sweep_policies(profile, dataset, vectors, policies)
    ranks = {}
    for episode in episodes:
        scores = vectors.scores(sweeps[episode.desc_id].vecs)  # (N + 1, V)
        ranks[episode.desc_id] = {
            video: search_index.ranks(scores, np.full(len(scores), vectors.column(video))).tolist()
            for video in dict.fromkeys([*episode.turns[0].top1_by_depth, episode.gt_video])
        }
    return ranks
