"""Measure what a better query could still gain on a mini corpus, before any refiner is trained.

The attribute probe is a linear map from a query's attributes to a vector: a trained baseline that reads only the query.
Oracle words are the best of `captions.wordings` by somebody who knows the answer: what rewriting in words could gain.
Neutral tokens show whether anything may be inserted into a query at all.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vsr1 import cache
from vsr1.config import PACKAGE, Profile
from vsr1.data import annotations
from vsr1.evaluation.statistics import Estimate
from vsr1.mini import captions, source, world
from vsr1.mini.attribute_heads import attribute_ids, probe_vecs
from vsr1.mini.pretraining_tasks import PhaseConfig
from vsr1.models import embedding, engine, search_index


def headroom(profile: Profile, dataset: str) -> dict[str, float | int | None]:
    """Measure how much a better query could gain on the test split, unless it is current. Percent.

    n, failed                  queries, and those whose first search fails
    plain_r1, probe_r1         R@1 of the original queries and of the probe
    walkdown, probe_failed     of the failed ones: right video on rank 2; R@1 of the probe
    words_r1, words_failed     R@1 of oracle words, of all and of the failed ones
    neutral_{zeros,noise}_r1   R@1 with `neutral_tokens` vectors in the query that say nothing
    """
    folders = {split: embedding.embed_corpus(profile, dataset, split) for split in ("train", "test")}
    inputs = {
        "vectors": [cache.metadata(folder)["key"] for folder in folders.values()],
        "knobs": [profile.studies.probe_steps, profile.neutral_tokens, profile.seed],
        "code": cache.source_digest(__name__),
    }

    def work(folder):
        torch.manual_seed(profile.seed)
        train, test = (_load_split(profile, dataset, *item) for item in folders.items())
        search_engine = engine.load(profile)
        numbers = _probe_numbers(train_probe(profile, train, dataset), test)
        numbers |= _word_numbers(test, search_engine)
        numbers |= _neutral_numbers(profile, test, search_engine)
        cache.write_json(folder / "headroom.json", numbers)

    target = cache.build(profile.data_dir(dataset) / "embed" / "engine" / "headroom", inputs, work)
    return json.loads((target / "headroom.json").read_text(encoding="utf-8"))


def _load_split(profile, dataset, split, folder):
    """Return (vectors, queries whose video has a vector, their moments)."""
    corpus, vectors = profile.data_dir(dataset) / "corpus", search_index.load_vectors(folder)
    queries = [q for q in annotations.read_fig(corpus / f"{split}.jsonl") if vectors.has_video(q.video)]
    scenes = world.read_scenes(corpus)
    return vectors, queries, [source.moment_of(scenes, query) for query in queries]


def train_probe(profile: Profile, train, dataset: str) -> torch.nn.Parameter:
    """Train the probe, (features, D), by InfoNCE of train moments against the train gallery."""
    vectors, queries, moments = train
    probe = torch.nn.Parameter(0.05 * torch.randn(len(attribute_ids()), vectors.video_vecs.shape[1]))
    gallery = torch.from_numpy(vectors.video_vecs)
    right = torch.from_numpy(vectors.columns([query.video for query in queries]))
    optimizer = torch.optim.Adam([probe], lr=0.02)
    for _ in cache.progress(range(profile.studies.probe_steps), f"probe {dataset}"):
        loss = F.cross_entropy(probe_vecs(probe, moments) @ gallery.T / 0.1, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


def _percent(hits):
    return round(100 * float(np.mean(hits)), 2) if len(hits) else None


def _probe_numbers(probe, test):
    """Compare original queries with the probe's on the test split."""
    vectors, queries, moments = test
    right, plain = _original_ranks(vectors, queries)
    probed = search_index.ranks(vectors.scores(probe_vecs(probe, moments).detach().numpy()), right)
    failed = plain > 1
    numbers = {"n": len(plain), "failed": int(failed.sum()), "plain_r1": _percent(plain == 1)}
    numbers |= {"walkdown": _percent(plain[failed] == 2), "probe_r1": _percent(probed == 1)}
    return numbers | {"probe_failed": _percent(probed[failed] == 1)}


def _original_ranks(vectors, queries):
    """Return (columns of the right videos, their ranks by the original queries), (Q,) each."""
    right = vectors.columns([query.video for query in queries])
    scores = vectors.scores(vectors.vecs_of([query.id for query in queries]))
    return right, search_index.ranks(scores, right)


def _word_numbers(test, search_engine):
    """Measure R@1 of the best wording of each query, chosen by the rank that it gives the right video."""
    vectors, queries, moments = test
    right, plain = _original_ranks(vectors, queries)
    best = np.minimum(plain, oracle_ranks(_wording_vecs(search_engine, moments), vectors.video_vecs, right))
    return {"words_r1": _percent(best == 1), "words_failed": _percent(best[plain > 1] == 1)}


def _wording_vecs(search_engine, moments):
    """Embed every wording of each moment, (Q, W, D)."""
    texts = [captions.wordings(moment) for moment in moments]
    vecs = search_engine.embed_texts([text for wordings in texts for text in wordings])
    return vecs.reshape(len(texts), -1, vecs.shape[1])


def oracle_ranks(vecs: np.ndarray, gallery: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the best rank (Q,) that any of several vectors of a query gives the right video.

    vecs     (Q, W, D)
    gallery  (V, D)
    right    (Q,) rows of the gallery
    """
    count = vecs.shape[1]
    return np.min([search_index.ranks(vecs[:, n] @ gallery.T, right) for n in range(count)], axis=0)


def _neutral_numbers(profile, test, search_engine):
    """Measure R@1 with tokens in each query that say nothing: all zero, or noise half as long as a word."""
    vectors, queries, _ = test
    right, texts = vectors.columns([query.video for query in queries]), [query.text for query in queries]
    word_length = search_engine.model.get_input_embeddings().weight.norm(dim=1).mean().item()
    noise = torch.randn(len(texts), profile.neutral_tokens, search_engine.width)
    noise = noise / noise.norm(dim=-1, keepdim=True) * word_length / 2
    numbers = {}
    for kind, soft in (("zeros", torch.zeros_like(noise)), ("noise", noise)):
        ranks = search_index.ranks(vectors.scores(search_engine.embed_texts(texts, soft)), right)
        numbers[f"neutral_{kind}_r1"] = _percent(ranks == 1)
    return numbers


# --- The arena: first searches in galleries of several sizes, by text sides that heard wrong colours more or less often

ARENA = PACKAGE / "mini" / "weights" / "arena.json"


def measure_arena(profile: Profile, recipes: dict[str, PhaseConfig], into: Path = ARENA) -> None:
    """Measure first searches and the room of better words and of the probe, by text side and size of gallery.

    Writes a list of rows to `into`, unless it is current: data set, phase, share of wrong colours, videos, queries, and
    percentages: R@1, R@10, R@1 of oracle words and of the probe. Queries are those of the profile; the gallery grows by
    its distractors, then by more. Video vectors are those of the index that a text side learned to follow: training it
    moves them little.
    """
    home = profile.data_dir("foundation")
    texts = {phase: recipe for phase, recipe in recipes.items() if phase.startswith("text")}
    index = next(iter(texts.values())).start  # the headline engine's: one gallery serves all that follow it
    sides = {phase: recipe for phase, recipe in texts.items() if recipe.start == index}
    inputs = {"engines": [cache.metadata(home / phase)["key"] for phase in sides], "seed": profile.seed}
    inputs |= {"world": dataclasses.asdict(profile.world), "studies": dataclasses.asdict(profile.studies)}
    inputs |= {"datasets": profile.datasets, "code": cache.source_digest(__name__)}
    work = lambda folder: cache.write_json(folder / ARENA.name, _arena_rows(profile, index, sides))  # noqa: E731
    rows = cache.build(home / "arena", inputs, work) / ARENA.name
    if not into.exists() or into.read_bytes() != rows.read_bytes():
        print(f"arena: {shutil.copy(rows, into)}", flush=True)


def _arena_rows(profile, index, sides):
    """Return the rows of `measure_arena`."""
    home, rows = profile.data_dir("foundation"), []
    for dataset in profile.datasets:
        search = _ArenaSearch(profile, dataset, str(home / index))
        for phase, recipe in sides.items():
            searcher = engine.load(dataclasses.replace(profile, engine=str(home / phase)))
            facts = {"dataset": dataset, "phase": phase, "wrong": recipe.wrong}
            rows += [facts | numbers for numbers in search.numbers(searcher)]
    return rows


def arena_numbers(profile: Profile, dataset: str) -> tuple[dict[str, Estimate], dict[str, list]]:
    """Return what `measure_arena` left for a data set: numbers (H3) in the profile's gallery, series over all sizes.

    Both are empty where the weights that ship were never measured.
    """
    rows = json.loads(ARENA.read_text(encoding="utf-8")) if ARENA.exists() else []
    numbers, series, note = {}, {}, "measured by `make foundation`"
    for row in rows:
        for key in ("r1", "r10", "words_r1", "probe_r1") if row["dataset"] == dataset else ():
            name = f"H3/{dataset}/{row['phase']}/{key}"
            series.setdefault(name, []).append([row["videos"], row[key]])
            if row["videos"] == profile.world.test_videos:
                numbers[name] = Estimate(row[key], row["queries"], note=note)
    return numbers, series


class _ArenaSearch:
    """The queries of a profile's data set, and the largest gallery in the order in which it grows to that size."""

    def __init__(self, profile, dataset, index):
        settings = profile.world
        self.sizes = profile.studies.arena_videos
        larger = dataclasses.replace(settings, test_videos=max(self.sizes))
        arena = dataclasses.replace(profile, name=f"{profile.name}-arena", engine=index, world=larger)
        folders = [embedding.embed_corpus(arena, dataset, split) for split in ("train", "test")]
        torch.manual_seed(profile.seed)
        self.probe = train_probe(arena, _load_split(arena, dataset, "train", folders[0]), dataset)
        vectors = search_index.load_vectors(folders[1])
        scenes = world.make_scenes(dataset, "test", larger.test_videos, settings.seed)
        test_scenes = scenes[: settings.test_videos]
        queried_scenes = annotations.evenly_spaced(test_scenes, settings.queried_videos)
        rng = np.random.default_rng([settings.seed, 0])
        self.queries = captions.make_queries(queried_scenes, 0, 1, rng)
        by_id = {scene.video: scene for scene in scenes}
        self.moments = [source.moment_of(by_id, query) for query in self.queries]
        videos = [scene.video for scene in queried_scenes]
        distractors = sorted({scene.video for scene in test_scenes} - set(videos))
        videos += np.random.default_rng(settings.seed).permutation(distractors).tolist()
        videos += [scene.video for scene in scenes[settings.test_videos :]]
        self.right = np.array([videos.index(query.video) for query in self.queries])  # (Q,)
        self.gallery = vectors.video_vecs[vectors.columns(videos)]  # (V, D)

    def numbers(self, searcher):
        """Yield what a text side finds in every size."""
        typed = searcher.embed_texts([query.text for query in self.queries])
        wordings = _wording_vecs(searcher, self.moments)
        probed = probe_vecs(self.probe, self.moments).detach().numpy()
        for size in self.sizes:
            gallery = self.gallery[:size]
            plain = search_index.ranks(typed @ gallery.T, self.right)
            best = np.minimum(plain, oracle_ranks(wordings, gallery, self.right))
            probe = search_index.ranks(probed @ gallery.T, self.right)
            hits = {"r1": plain == 1, "r10": plain <= 10, "words_r1": best == 1, "probe_r1": probe == 1}
            percents = {key: _percent(values) for key, values in hits.items()}
            yield {"videos": size, "queries": len(plain)} | percents
