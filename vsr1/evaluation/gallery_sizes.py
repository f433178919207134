"""Vary what a first search finds, by the size of the gallery, and ask the same systems each time (P3).

Engine, policies and queries stay as they are. The smallest gallery holds the videos that the queries ask for. It grows
by the other test videos, then by the train videos.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.data import annotations
from vsr1.evaluation import evaluate, metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.models import embedding, search_index
from vsr1.training import query_adapters

# The policy of both stages judges and grounds in all, but for the one whose rewriting in words is trained.
SYSTEMS = ("vsr1-walkdown", "adapter-soft-vsr1", "hqr-trained", "vsr1", "vsr1-all")
LEVELS = ("asked", "x2", "x4", "test", "train")
QUERIES = 400  # ours, at most, spread evenly: about as many as the mini test splits have


def numbers(profile, dataset: str) -> dict[str, Estimate]:
    """Measure VCMR at IoU 0.5 of SYSTEMS with all turns, in galleries of each of `sizes` (P3).

    typed   R@1 of the first search as typed
    videos  of the gallery
    """
    folder = embedding.embed_corpus(profile, dataset, "test")
    queries, estimates = _queries(profile, dataset), {}
    ids = [query.id for query in queries]
    families = statistics.clusters(profile, dataset, [query.video for query in queries])
    for level, size in sizes(profile, dataset).items():
        gallery = None if level == "test" else make_gallery(profile, dataset, size)
        vectors = search_index.load_vectors(gallery or folder)
        hits = {"typed": query_adapters.first_hits(vectors, vectors.vecs_of(ids), queries)}
        for name in SYSTEMS:
            options = {} if gallery is None else {"gallery": gallery, "count": QUERIES}
            episodes = records.read_episodes(evaluate.run_system(profile, dataset, name, **options))
            by_id = {episode.desc_id: episode for episode in episodes}
            hits[name] = metrics.vcmr_hits([by_id[key] for key in ids], 0.5)
        estimates |= {
            f"P3/{dataset}/{name}/{level}": statistics.estimate(values, families, profile)
            for name, values in hits.items()
        }
        estimates[f"P3/{dataset}/videos/{level}"] = Estimate(size, len(ids), unit="videos")
    return estimates


def _queries(profile, dataset):
    """Read the queries that are searched in all galleries."""
    corpus = profile.data_dir(dataset) / "corpus" / "test.jsonl"
    return annotations.evenly_spaced(annotations.read_fig(corpus), QUERIES)


def sizes(profile, dataset: str) -> dict[str, int]:
    """Return {level: videos}: those that are asked for, twice and four times as many, "test", and with "train"."""
    right, test, train = _videos(profile, dataset)
    levels = {"asked": len(right), "x2": 2 * len(right), "x4": 4 * len(right)}
    levels = {level: size for level, size in levels.items() if size < len(test)}
    return levels | {"test": len(test), "train": len(test) + len(train)}


def _videos(profile, dataset):
    """Return (right videos, all of test with these first, those of train), in orders that no seed changes."""
    test, train = (
        search_index.load_vectors(embedding.embed_corpus(profile, dataset, split)).video_ids
        for split in ("test", "train")
    )
    right = sorted({query.video for query in _queries(profile, dataset)} & set(test))
    rng = np.random.default_rng(28)
    others = rng.permutation(sorted(set(test) - set(right))).tolist()
    return right, right + others, rng.permutation(sorted(set(train) - set(test))).tolist()


def make_gallery(profile, dataset: str, size: int) -> Path:
    """Return the step with the vectors of the first `size` videos, and of all test queries."""
    folders = {split: embedding.embed_corpus(profile, dataset, split) for split in ("test", "train")}
    inputs = {
        "vectors": {split: cache.metadata(folder).get("key") for split, folder in folders.items()},
        "size": size,
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_make_gallery, profile, dataset, size, folders)
    return cache.build(profile.data_dir(dataset) / "galleries" / f"of-{size}", inputs, work)


def _make_gallery(profile, dataset, size, folders, folder):
    test, train = (search_index.load_vectors(folders[split]) for split in ("test", "train"))
    _, test_videos, train_videos = _videos(profile, dataset)
    test_videos = test_videos[:size]
    train_videos = train_videos[: size - len(test_videos)]
    vecs = [test.video_vecs[test.columns(test_videos)], train.video_vecs[train.columns(train_videos)]]
    np.save(folder / "video_vecs.npy", np.concatenate(vecs))
    shutil.copy(folders["test"] / "query_vecs.npy", folder)
    ids = json.loads((folders["test"] / "ids.json").read_text(encoding="utf-8"))
    cache.write_json(folder / "ids.json", ids | {"videos": test_videos + train_videos})
