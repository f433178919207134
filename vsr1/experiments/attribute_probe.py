"""Measure what a better query could still gain on a mini corpus, before any refiner is trained.

The attribute probe is a linear map from a query's attributes to a vector: a trained baseline that reads only the query.
Neutral tokens show whether anything may be inserted into a query at all.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.mini import source, world
from vsr1.mini.attribute_heads import attribute_ids, probe_vecs
from vsr1.models import embedding, engine, search_index


def headroom(profile: Profile, dataset: str, which: str = "engine") -> dict[str, float | int | None]:
    """Measure how much a better query could gain on the test split, unless it is current. Percent.

    n, failed                  queries, and those whose first search fails
    plain_r1, probe_r1         R@1 of the original queries and of the probe
    walkdown, probe_failed     of the failed ones: right video on rank 2; R@1 of the probe
    neutral_{zeros,noise}_r1   R@1 with `neutral_tokens` vectors in the query that say nothing
    """
    folders = [embedding.embed_corpus(profile, dataset, split, which) for split in ("train", "test")]
    inputs = {
        "vectors": [cache.metadata(folder)["key"] for folder in folders],
        "knobs": [profile.studies.probe_steps, profile.neutral_tokens, profile.seed],
        "code": cache.source_digest(__name__),
    }

    def work(folder):
        torch.manual_seed(profile.seed)
        train, test = (
            _load_split(profile, dataset, *pair) for pair in zip(("train", "test"), folders, strict=True)
        )
        numbers = _probe_numbers(train_probe(profile, train, dataset), test)
        numbers |= _neutral_numbers(profile, test, engine.load(profile, which))
        cache.write_json(folder / "headroom.json", numbers)

    target = cache.build(profile.data_dir(dataset) / "embed" / which / "headroom", inputs, work)
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
    right = vectors.columns([query.video for query in queries])
    original = vectors.scores(vectors.vecs_of([query.id for query in queries]))
    plain = search_index.ranks(original, right)
    probed = search_index.ranks(vectors.scores(probe_vecs(probe, moments).detach().numpy()), right)
    failed = plain > 1
    numbers = {"n": len(plain), "failed": int(failed.sum()), "plain_r1": _percent(plain == 1)}
    numbers |= {"walkdown": _percent(plain[failed] == 2), "probe_r1": _percent(probed == 1)}
    return numbers | {"probe_failed": _percent(probed[failed] == 1)}


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
