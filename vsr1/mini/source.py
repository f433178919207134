"""Provide the rendered world as a data source: corpus and videos by the renderer, replies by its teacher.

The contract is that of `vsr1.data.source`.
"""

import functools

import numpy as np

from vsr1.data import annotations, decoder
from vsr1.mini import captions, renderer, teacher, world
from vsr1.models import inputs


def prepare(profile, dataset: str) -> None:
    """Render the corpus and the videos of a data set, unless they are current."""
    renderer.render(profile, dataset)


def reply_writer(profile, dataset: str):
    """Return (reply, caption) of somebody who knows what was rendered; both take a query and a shown video's id."""
    return writers(profile, world.read_scenes(profile.data_dir(dataset) / "corpus"))


def families(profile, dataset: str) -> dict[str, str]:
    """Return {video: family} of the rendered videos."""
    corpus = profile.data_dir(dataset) / "corpus"
    return _families(corpus, (corpus / "scenes.jsonl").stat().st_mtime_ns)


@functools.cache
def _families(corpus, _):
    """Return the families of a corpus; read once, for every interval asks for them."""
    return {s.video: f"{s.split}-{s.family}" for s in world.read_scenes(corpus).values()}


def unseen_queries(profile, dataset: str) -> set[int]:
    """Return the ids of test queries about an object in a colour that the train split never shows it in."""
    corpus = profile.data_dir(dataset) / "corpus"
    scenes = world.read_scenes(corpus)
    queries = annotations.read_fig(corpus / "test.jsonl")
    return {query.id for query in queries if moment_of(scenes, query).is_unseen()}


def writers(profile, scenes: dict[str, world.Scene]):
    """Return (reply, caption) for queries about rendered scenes."""

    def reply(query, shown):
        return teacher.verdict(moment_of(scenes, query), printed_moments(profile, scenes[shown]))

    def caption(query, shown):
        closest = teacher.closest(moment_of(scenes, query), printed_moments(profile, scenes[shown]))
        return teacher.caption(closest, query.id % captions.STYLES)

    return reply, caption


def moment_of(scenes: dict[str, world.Scene], query: annotations.Query) -> world.Moment:
    """Find the moment that a query is about."""
    return next(m for m in scenes[query.video].moments if (m.start, m.end) == query.span)


def printed_moments(profile, scene: world.Scene) -> tuple[world.Moment, ...]:
    """Return the moments of a scene at the times that the policy reads between the frames."""
    fps = profile.world.fps
    length = round(scene.seconds * fps) / fps
    sampled = decoder.sample_times(length, profile.video_fps, profile.max_frames)
    times = inputs.pair_times(np.floor(sampled * fps + 1e-6) / fps).round(1)  # of the frames on screen then
    return tuple(teacher.at_printed_times(moment, times) or moment for moment in scene.moments)
