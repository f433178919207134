"""Bound what rewriting could reach (P4): the best words and soft tokens of a query, by a search that knows its answer.

A bound says something only beside its null: the same search, aimed at a random wrong video. Where that succeeds as
often, the bound says what the engine can be driven to, and nothing about the query.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from vsr1 import cache
from vsr1.data import annotations, clip_cache
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.evaluate import trained_weights
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import hqr, records, runner
from vsr1.models import batching, embedding, search_index
from vsr1.models import engine as engines
from vsr1.training import query_adapters

# All ours.
WORDS = 8  # put behind a query, at most: as many as there are soft tokens
CANDIDATES = 64  # words that each place is chosen from
MARKS = ".,;:!?\"'()"  # around words


def numbers(profile, dataset: str, optimise: Callable, refined: dict[int, int]) -> dict[str, Estimate]:
    """Measure R@1 of rewrites of failed queries, and how often the searches for a wrong video put that one first (P4).

    The queries are those that interventions refine (P2).

    optimise(engine, texts, gallery (V, D), columns (Q,))  ranks (Q,) of these videos once soft tokens were optimised
    refined  {id of a query: rank of its right video after SQR}, which trained words are compared with
    """
    folder = embedding.embed_corpus(profile, dataset, "test")
    vectors = search_index.load_vectors(folder)
    queries = failed_queries(profile, dataset, vectors)
    targets = draw_targets(profile, queries, vectors)
    ranks = json.loads((_search(profile, dataset, folder) / "ranks.json").read_text(encoding="utf-8"))
    engine, size = engines.load(profile), profile.soft_token_bound.free_queries
    gallery = torch.from_numpy(vectors.video_vecs).to(engine.model.device)
    for name, videos in targets.items():
        columns = torch.from_numpy(vectors.columns(videos)).to(gallery.device)
        ranks[f"soft-{name}"] = []
        for start in range(0, len(queries), size):
            texts = [query.text for query in queries[start : start + size]]
            ranks[f"soft-{name}"].extend(optimise(engine, texts, gallery, columns[start : start + size]))
    fixed = query_adapters.read_first(profile, dataset, "hqr-fixed", "test")
    scores = fixed.scores(fixed.vecs_of([query.id for query in queries]))
    ranks["hqr-fixed"] = search_index.ranks(scores, fixed.columns(targets["oracle"]))
    ranks["hqr-trained"] = rewritten_ranks(profile, dataset, queries, vectors)
    families = statistics.clusters(profile, dataset, targets["oracle"])
    hits = {name: np.array(values) == 1 for name, values in ranks.items()}
    estimates = {
        f"P4/{dataset}/{name}/vr@1": statistics.estimate(values, families, profile)
        for name, values in hits.items()
    }
    for name in ("hqr-oracle", "soft-oracle"):  # over its null, paired
        gain = statistics.difference(hits[name], hits[f"{name}-wrong"], families, profile)
        estimates[f"P4/{dataset}/{name}/over-{name}-wrong"] = gain
    both = [row for row, query in enumerate(queries) if query.id in refined]
    soft = [refined[queries[row].id] == 1 for row in both]
    gain = statistics.difference(hits["hqr-trained"][both], soft, [families[row] for row in both], profile)
    estimates[f"P4/{dataset}/hqr-trained/over-sqr"] = gain
    return estimates


def failed_queries(profile, dataset: str, vectors: search_index.Vectors) -> list[annotations.Query]:
    """Return at most `studies.sample_queries` test queries whose first search fails, spread evenly."""
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    queries = [query for query in queries if vectors.has_video(query.video)]
    right = vectors.columns([query.video for query in queries])
    ranks = search_index.ranks(vectors.scores(vectors.vecs_of([query.id for query in queries])), right)
    failed = [query for query, rank in zip(queries, ranks, strict=True) if rank > 1]
    return annotations.evenly_spaced(failed, profile.studies.sample_queries)


def draw_targets(profile, queries, vectors: search_index.Vectors) -> dict[str, list[str]]:
    """Return {"oracle": the right video of each query, "oracle-wrong": a random other one}."""
    wrong = []
    for query in queries:
        others = [video for video in vectors.video_ids if video != query.video]
        wrong.append(others[np.random.default_rng([profile.seed, 29, query.id]).integers(len(others))])
    return {"oracle": [query.video for query in queries], "oracle-wrong": wrong}


# --- The best words


def _search(profile, dataset, folder):
    """Build the step with ranks.json: {"hqr-oracle", "hqr-oracle-wrong": ranks of targets behind the best words}."""
    inputs = {
        "vectors": cache.metadata(folder).get("key"),
        "words": cache.file_digest(profile.data_dir(dataset) / "corpus" / "train.jsonl"),
        "knobs": [profile.seed, profile.studies.sample_queries, profile.instruction, profile.dtype],
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_find_words, profile, dataset, search_index.load_vectors(folder))
    return cache.build(profile.runs(dataset) / "oracles", inputs, work)


def _find_words(profile, dataset, vectors, folder):
    engine, queries = hqr.with_query_limit(engines.load(profile)), failed_queries(profile, dataset, vectors)
    train = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
    vocabulary = vocabulary_of([query.text for query in train])
    word_vecs, ranks = engine.embed_texts(vocabulary), {}
    for name, videos in draw_targets(profile, queries, vectors).items():
        pairs = list(zip(queries, videos, strict=True))
        ranks[f"hqr-{name}"] = [
            best_words(engine, vectors, query.text, video, vocabulary, word_vecs)[1]
            for query, video in cache.progress(pairs, f"{name} {dataset}")
        ]
    cache.write_json(folder / "ranks.json", ranks)


def vocabulary_of(texts: list[str]) -> list[str]:
    """Return the words of texts, each once.

    >>> vocabulary_of(["A dog.", "A red dog"])
    ['a', 'dog', 'red']
    """
    return sorted({word.strip(MARKS).lower() for text in texts for word in text.split()} - {""})


def best_words(
    engine,
    vectors: search_index.Vectors,
    text: str,
    target: str,
    vocabulary: list[str],
    word_vecs: np.ndarray,
) -> tuple[str, int]:
    """Put up to WORDS words behind a query that bring `target` to rank 1; return (the new text, the rank of `target`).

    One word after the other, each the one that moves the query nearest to the target's vector, of the CANDIDATES that
    are nearest to it by themselves. A word that moves it no nearer ends the search, as rank 1 does.

    word_vecs  (W, D) of the vocabulary
    """
    column = vectors.column(target)
    near = np.argsort(-(word_vecs @ vectors.video_vecs[column]), kind="stable")[:CANDIDATES]
    vec = engine.embed_texts([text])[0]
    for _ in range(WORDS):
        if search_index.ranks(vectors.scores(vec)[None], [column])[0] == 1:
            break
        texts = [f"{text} {vocabulary[row]}" for row in near]
        vecs = engine.embed_texts(texts)
        scores = vecs @ vectors.video_vecs[column]
        best = int(scores.argmax())
        if scores[best] <= vec @ vectors.video_vecs[column]:
            break
        text, vec = texts[best], vecs[best]
    return text, int(search_index.ranks(vectors.scores(vec)[None], [column])[0])


# --- Words that a policy writes


def rewritten_ranks(profile, dataset: str, queries, vectors: search_index.Vectors) -> list[int]:
    """Return the rank (Q,) of each right video after one rewrite by "hqr-trained"; without one, that of the query.

    Every verdict counts as a rejection. A reply that accepts the wrong video has no rewrite.
    """
    like, weights = trained_weights(profile, dataset, "hqr-trained")
    system = replace(runner.SYSTEMS[like], accepts=False)
    engine, policy = runner.load_pair(profile, system, weights)
    record = records.Run(dataset, "test", "hqr-trained", 1, 1, profile.seed, "top1")
    splitter, ranks = batching.OOMSplitter("eval_batch"), []
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        functions = runner.EpisodeRunner(profile, system, engine, policy, vectors, clips)
        for start in range(0, len(queries), profile.eval_batch):
            batch = queries[start : start + profile.eval_batch]
            for part in splitter.run(lambda part: functions.run(part, record), batch):
                ranks += metrics.true_ranks(part).tolist()
    return ranks
