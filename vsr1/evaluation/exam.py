"""Sit a fresh exam: frozen checkpoints on rendered videos that no choice was ever made on (X1).

results/expected/exam.yaml    the seed of its world, the claims, and what was predicted of each before the run
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from vsr1 import cache, config
from vsr1.config import InputError
from vsr1.data import annotations
from vsr1.evaluation import evaluate, metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records, runner
from vsr1.models import embedding, search_index
from vsr1.training import query_adapters

FILE = config.ROOT / "results" / "expected" / "exam.yaml"
Outcome = Literal["ahead", "behind", "open"]


@dataclass(frozen=True)
class ExamClaim:
    """`system` against `baseline` by a metric of `metrics.hits`, on the same queries, at the headline's turns."""

    words: str
    system: str
    baseline: str
    predicted: Outcome | dict[str, Outcome]  # one word, or {data set: word}
    metric: str = "vcmr@0.5"
    baseline_metric: str | None = None  # where it is another one


def read(path: Path = FILE) -> tuple[int, dict[str, ExamClaim]]:
    """Read (seed of the world, {name: claim}); InputError names the claim and the key that is wrong."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = content["claims"].items()
    claims = {name: config.parse(ExamClaim, row, f"{path.name}: {name}") for name, row in rows}
    # A first search that is no policy's would be learned on the fresh videos.
    known = [
        name for name, recipe in evaluate.RECIPES.items() if recipe.first in (None, *query_adapters.SOFT)
    ]
    for name, claim in claims.items():
        for key in ("system", "baseline"):
            if getattr(claim, key) not in known:
                line = f"{path.name}: {name}: {key}: {getattr(claim, key)}"
                raise InputError(f"{line} cannot sit the exam; take one of {', '.join(known)}")
    return content["world_seed"], claims


def sit(profile, dataset: str) -> dict[str, Estimate]:
    """Measure every claim of the exam with the checkpoints of a profile (X1).

    points     `system` less `baseline`, with its interval
    predicted  1 if that came out as predicted, 0 if not

    Raises InputError where no videos can be drawn.
    """
    if profile.world is None:
        raise InputError(
            f"{profile.name}: the exam draws videos of a fresh world; take a profile with a `world`"
        )
    seed, claims = read()
    fresh = fresh_profile(profile, seed)
    names = {name for claim in claims.values() for name in (claim.system, claim.baseline)}
    runs = {name: _run(profile, fresh, dataset, name) for name in sorted(names)}
    hits = {name: metrics.hits(episodes, profile.vr_ks) for name, episodes in runs.items()}
    videos = [episode.gt_video for episode in next(iter(runs.values()))]
    families, numbers = statistics.clusters(fresh, dataset, videos), {}
    for name, claim in claims.items():
        a, b = hits[claim.system][claim.metric], hits[claim.baseline][claim.baseline_metric or claim.metric]
        points = statistics.difference(a, b, families, profile)
        predicted = claim.predicted if isinstance(claim.predicted, str) else claim.predicted[dataset]
        is_right = int(outcome(points) == predicted)
        numbers[f"X1/{dataset}/{name}/points"] = points
        numbers[f"X1/{dataset}/{name}/predicted"] = Estimate(is_right, points.n, unit="1 or 0")
    return numbers


def outcome(points: Estimate) -> Outcome:
    """Say on which side of 0 the interval of a difference lies.

    >>> outcome(Estimate(2.0, 9, (0.5, 3.5))), outcome(Estimate(2.0, 9, (-0.5, 4.5)))
    ('ahead', 'open')
    """
    low, high = points.ci
    return "ahead" if low > 0 else "behind" if high < 0 else "open"


def fresh_profile(profile, seed: int):
    """Return the profile with a world of another seed, whose test split has nothing to do with the profile's own."""
    assert seed != profile.world.seed
    world = replace(profile.world, seed=seed, train_videos=1)  # nothing is trained on it
    return replace(profile, name=f"{profile.name}-exam-{seed}", world=world)


def _run(profile, fresh, dataset, name):
    """Return the episodes of a system of the profile on the fresh test split, cut to the headline's turns."""
    like, weights = evaluate.trained_weights(profile, dataset, name)
    first, gallery = evaluate.RECIPES[name].first, None
    if first:
        tokens = str(query_adapters.policy_of(profile, dataset, first))
        gallery = _first_searches(fresh, dataset, first, tokens)
    path = evaluate.run_system(fresh, dataset, name, like=like, weights=weights, gallery=gallery)
    return metrics.headline(profile, records.read_episodes(path))


def _first_searches(fresh, dataset, name, weights):
    """Build the step with the fresh gallery, and its queries as the soft tokens of frozen weights embed them."""
    folder = embedding.embed_corpus(fresh, dataset, "test")
    inputs = {"vectors": cache.metadata(folder).get("key"), "code": cache.source_digest(__name__)}
    inputs["weights"] = cache.metadata(Path(weights)).get("key")
    work = functools.partial(_embed_first, fresh, dataset, weights, folder)
    return cache.build(fresh.runs(dataset) / "galleries" / f"fresh-{name}", inputs, work)


def _embed_first(fresh, dataset, weights, vectors, folder):
    engine, policy = runner.load_pair(fresh, runner.SYSTEMS["sqr"], weights)
    queries = annotations.read_fig(fresh.data_dir(dataset) / "corpus" / "test.jsonl")
    loaded = search_index.load_vectors(vectors)
    np.save(folder / "query_vecs.npy", query_adapters.soft_vecs(engine, policy, queries, fresh.eval_batch))
    np.save(folder / "video_vecs.npy", loaded.video_vecs)
    ids = {"videos": loaded.video_ids, "queries": [query.id for query in queries]}
    cache.write_json(folder / "ids.json", ids)
