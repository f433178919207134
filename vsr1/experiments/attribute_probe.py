"""Headroom: what a better query could still gain on a mini corpus, measured before any refiner is trained.

The attribute probe is a linear map from a query's attributes to a vector, the ceiling of a refiner that only
understands the query (MINIWORLD.md, point 6); neutral tokens show whether anything may be inserted at all.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F

from vsr1 import cache
from vsr1.data import annotations
from vsr1.mini import source, world
from vsr1.mini.attribute_heads import attribute_ids, probe_vecs
from vsr1.models import embedding, engine, search_index


def headroom(profile, dataset: str, which: str = "engine") -> dict:
    """How much a better query could gain on a test split: see `_headroom` for the names. Percent; a stage."""
    folders = [embedding.embed_corpus(profile, dataset, split, which) for split in ("train", "test")]
    inputs = {
        "vectors": [cache.metadata(folder)["key"] for folder in folders],
        "code": cache.source_digest(__name__),
    }
    inputs["knobs"] = [profile.studies.probe_steps, profile.neutral_tokens, profile.seed]

    def work(folder):
        cache.write_json(folder / "headroom.json", _headroom(profile, dataset, which, *folders))

    target = cache.build(profile.data_dir(dataset) / "embed" / which / "headroom", inputs, work)
    return json.loads((target / "headroom.json").read_text(encoding="utf-8"))


def _headroom(profile, dataset, which, train_folder, test_folder):
    """Plain and walk-down from the vectors; the probe trained on the train gallery (MINIWORLD.md, point 6)."""
    torch.manual_seed(profile.seed)
    scenes = world.read_scenes(profile.data_dir(dataset) / "corpus")
    sides = []
    for split, folder in (("train", train_folder), ("test", test_folder)):
        vectors = search_index.load_vectors(folder)
        queries = [
            query
            for query in annotations.read_fig(profile.data_dir(dataset) / "corpus" / f"{split}.jsonl")
            if vectors.has_video(query.video)
        ]
        moments = [source.moment_of(scenes, query) for query in queries]
        sides.append((vectors, moments, vectors.columns([query.video for query in queries])))
    (train_vectors, train_moments, train_column), (vectors, moments, column) = sides
    kept = np.isin(
        vectors.query_ids, [query.id for query in queries]
    )  # a video that cannot be read has no vector
    probe = torch.nn.Parameter(0.05 * torch.randn(len(attribute_ids()), vectors.video_vecs.shape[1]))
    gallery, wanted = torch.from_numpy(train_vectors.video_vecs), torch.from_numpy(train_column)
    optimizer = torch.optim.Adam([probe], lr=0.02)
    for _ in cache.progress(range(profile.studies.probe_steps), f"probe {dataset}"):
        loss = F.cross_entropy(probe_vecs(probe, train_moments) @ gallery.T / 0.1, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = search_index.ranks(vectors.scores(vectors.query_vecs[kept]), column)
    probed = search_index.ranks(vectors.scores(probe_vecs(probe, moments).detach().numpy()), column)
    failed = plain > 1
    percent = lambda hits: round(100 * float(np.mean(hits)), 2) if len(hits) else None  # noqa: E731
    room = {"n": len(plain), "failed": int(failed.sum()), "plain_r1": percent(plain == 1)}
    room |= {"walkdown": percent(plain[failed] == 2), "probe_r1": percent(probed == 1)}
    room |= {"probe_failed": percent(probed[failed] == 1)}
    made = engine.load(profile, which)
    texts = [query.text for query in queries]
    rms = made.model.get_input_embeddings().weight.norm(dim=1).mean().item()
    noise = torch.randn(len(texts), profile.neutral_tokens, made.width)
    noise = noise / noise.norm(dim=-1, keepdim=True) * rms / 2
    for kind, soft in (("zeros", torch.zeros_like(noise)), ("noise", noise)):
        scores = vectors.scores(made.embed_texts(texts, soft))
        room[f"neutral_{kind}_r1"] = percent(search_index.ranks(scores, column) == 1)
    return room
