"""Train on archives: an engine that knows the names of colours, query-only adapters, SQR, and rewriting in words.

All of a corpus learn from the same train queries, against the archive that each query searches.

engine          the text side of the shipped engine, on archives of neutral cameras: it must know the names of colours
adapter-vec     a linear map, added to the vector of the query; sees no film
adapter-static  eight learned soft tokens, the same in every query; sees no film
adapter-soft    policy and heads, <REFINE> right behind the query; sees no film, as many rows as SQR's soft tokens
tuned-again     the engine's text side once more, on this corpus; sees no film
oracle-soft     eight soft tokens looked up by the colours that a camera makes of those asked for: it knows the cast
sqr             stage 1 of the paper, with replies that read the cast
hqr             the same rows and steps, with the best of eight wordings in seen colours behind each rejection
"""

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vsr1 import cache
from vsr1.data import annotations
from vsr1.experiments.archives.search import ArchiveGallery
from vsr1.mini import captions
from vsr1.mini.archives import casts, corpus, source, teacher
from vsr1.models import checkpoints, embedding, loading, policy, prompt_text
from vsr1.models import engine as engines
from vsr1.training import query_adapters, rewrites, sft, sft_data
from vsr1.training.sft_examples import SFTExample, choose_examples

NEUTRAL = "same-whole"  # the corpus whose cameras see true colours
ADAPTERS = {  # (learning rate, times that it reads its rows); all ours, not searched
    "engine": (1e-3, 2),
    "adapter-vec": (3e-3, 20),
    "adapter-static": (1e-2, 2),
    "tuned-again": (1e-3, 1),
    "oracle-soft": (1e-2, 2),
}
KNOBS = sft.KNOBS + sft.RETRIEVAL_KNOBS + ("max_query_tokens", "instruction", "seed")


# --- Rows


def split_train(profile, gallery: ArchiveGallery, name: str) -> tuple[list, list]:
    """Return (train queries to learn from, train queries of archives held out)."""
    return annotations.split_validation(gallery.queries, profile.val_fraction, source.families(profile, name))


def make_rows(profile, gallery: ArchiveGallery, queries) -> list[SFTExample]:
    """Return the rows of stage 1 in their order, chosen archive by archive as on other corpora.

    Negatives are the whole archive. `sft_text_only_rows` of them have words in place of the film.
    """
    with_film, text_only = [], []
    for part, members in gallery.by_archive(queries):
        asking = [queries[row] for row in members]
        options = {"most": len(asking), "negatives": len(part.video_ids) - 1, "seed": profile.seed}
        with_film += choose_examples(asking, part, gallery.truth.reply, copies=True, **options)
        if profile.sft_text_only_rows:
            text_only += choose_examples(asking, part, gallery.truth.reply, **options)
    by_id = {query.id: query for query in queries}
    text_only = [
        replace(row, caption=gallery.truth.caption(by_id[row.desc_id], row.shown)) for row in text_only
    ]
    with_film = _shuffled(with_film, [profile.seed, 30])[: profile.archives.rows]
    return sft_data.order_batches(profile, text_only, with_film)


def _shuffled(items, seed):
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def query_rows(profile, gallery: ArchiveGallery, queries) -> list[SFTExample]:
    """Return rows of queries alone, shuffled: what adapters learn from."""
    rows = []
    for part, members in gallery.by_archive(queries):
        for query in (queries[row] for row in members):
            wrong = tuple(video for video in part.video_ids if video != query.video)
            rows.append(SFTExample(query.id, query.text, query.video, "", wrong, "", "", contrast=True))
    return _shuffled(rows, [profile.seed, 31])


def with_wordings(profile, engine, gallery: ArchiveGallery, rows: list[SFTExample]) -> list[SFTExample]:
    """Let each rejection end with the best of `rewrites.SAMPLES` wordings in seen colours, by the engine's rank."""
    by_id, truth, sampled = {query.id: query for query in gallery.queries}, gallery.truth, {}
    for query in (by_id[row.desc_id] for row in filter(rewrites.is_rejected, rows)):
        plain, *others = teacher.wordings(truth.query_moment(query), truth.cast(query))
        others = _shuffled(others, [profile.seed, 32, query.id])
        sampled[query.id] = [plain, *others[: rewrites.SAMPLES - 1]]
    queries = [by_id[desc_id] for desc_id, texts in sampled.items() for _ in texts]
    vecs = engine.embed_texts([text for texts in sampled.values() for text in texts])
    ranks = iter(gallery.ranks(queries, vecs))
    best = {
        desc_id: texts[int(np.argmin([next(ranks) for _ in texts]))] for desc_id, texts in sampled.items()
    }
    return [
        rewrites.with_update(row, best[row.desc_id] if rewrites.is_rejected(row) else None) for row in rows
    ]


# --- The engine of the study


def tune_engine(profile) -> Path:
    """Return the folder of the engine whose text side learned the names of colours from neutral archives.

    Its video side is the shipped engine's, and so are all video vectors: it reads queries alone. It is the same for all
    seeds, as the shipped engine is.
    """
    profile = replace(profile, seed=profile.world.seed)
    inputs = {
        "vectors": cache.metadata(embedding.embed_corpus(profile, NEUTRAL, "train")).get("key"),
        "knobs": [getattr(profile, knob) for knob in KNOBS],
        "recipe": ADAPTERS["engine"],
        "code": cache.source_digest(__name__),
    }
    return cache.build(profile.data_dir("engine"), inputs, functools.partial(_tune_engine, profile))


def _tune_engine(profile, folder):
    torch.manual_seed(profile.seed)
    engine, gallery = engines.load(profile), ArchiveGallery(profile, NEUTRAL, "train")
    learn, held = split_train(profile, gallery, NEUTRAL)
    adapter = query_adapters.TunedEngine(profile, engine)
    before = _r1(gallery, held, engine.embed_texts([query.text for query in held]))
    rate, times = ADAPTERS["engine"]
    losses = query_adapters.fit(
        profile, adapter, gallery.vectors, _styled(profile, gallery, learn) * times, rate
    )
    after = _r1(gallery, held, engine.embed_texts([query.text for query in held]))
    adapter.adapters.merge_and_unload().save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    cache.write_json(folder / "notes.json", {"held_r1": [before, after], "losses": losses[::20]})


def _styled(profile, gallery, learn):
    """Return rows of every film that `learn` asks about, in all styles."""
    rows = {row.right: row for row in query_rows(profile, gallery, learn)}
    rows = [replace(row, query=text) for row in rows.values() for text in _styles(gallery, row.right)]
    return _shuffled(rows, [profile.seed, 33])


def _styles(gallery, video):
    (moment,) = gallery.truth.scenes[video].moments
    return [captions.caption(moment, style, corpus.NAMED) for style in range(captions.STYLES)]


def with_engine(profile):
    """Return the profile with the engine of the study, which embeds queries; video vectors stay as they are."""
    return replace(profile, engine=str(tune_engine(profile)))


@functools.lru_cache(4)
def open_gallery(profile, name: str, split: str) -> ArchiveGallery:
    """Return the archives of a split, with the vectors of queries by the engine of the study."""
    gallery = ArchiveGallery(profile, name, split)
    engine = engines.load(with_engine(profile))
    return gallery.with_queries(engine.embed_texts([query.text for query in gallery.queries]))


def _r1(gallery, queries, vecs):
    return 100 * float(np.mean(gallery.ranks(queries, vecs) == 1))


# --- Policies


def train(profile, name: str, system: str) -> Path:
    """Train a policy on a corpus, "sqr", "adapter-soft" or "hqr", and return its checkpoint. Resumes after a kill."""
    work = functools.partial(_train, profile, name, system)
    return cache.build(profile.runs(name) / system, _inputs(profile, name, system), work)


def _inputs(profile, name, system):
    return {
        "name": system,
        "vectors": cache.metadata(embedding.embed_corpus(profile, name, "train")).get("key"),
        "engine": loading.version(str(tune_engine(profile))),
        "policy": loading.version(profile.policy),
        "knobs": [getattr(profile, knob) for knob in KNOBS] + [profile.archives.rows],
        "recipe": ADAPTERS.get(system),
        "code": cache.source_digest(__name__),
    }


def _train(profile, name, system, folder):
    gallery, engine = open_gallery(profile, name, "train"), engines.load(with_engine(profile))
    rows = make_rows(profile, gallery, split_train(profile, gallery, name)[0])
    if system == "adapter-soft":
        rows = sft.draw_queries(profile, rows)
    elif system == "hqr":
        rows = with_wordings(profile, engine, gallery, rows)
    lines = (json.dumps(asdict(row) | {"negatives": []}, ensure_ascii=False) + "\n" for row in rows)
    cache.write_text(folder / "rows.jsonl", "".join(lines))
    agent = sft.build_policy(profile, engine, heads=system != "hqr")
    prompt = prompt_text.SYSTEM_HQR if system == "hqr" else None
    sft.train_policy(profile, name, agent, engine, gallery.vectors, rows, folder, system, system=prompt)


# --- Adapters of queries


class LookedUpTokens(nn.Module):
    """Puts N soft tokens behind a query: a sum of what is looked up for the seen colours of shirt and object.

    Texts are those of `known_text`: the query, and a line for each of the two colours.
    """

    def __init__(self, profile, engine):
        super().__init__()
        self.device, self.engine = engine.model.device, engine
        shape = len(casts.PAINTED), casts.STEPS, profile.n_soft, engine.width
        noise = nn.functional.normalize(torch.randn(shape), dim=-1)
        self.table = nn.Parameter((noise * policy.mean_embedding_norm(engine)).to(self.device))

    def forward(self, texts, typed):
        """Return the adapted vectors (B, D)."""
        queries, *colours = zip(*(text.split("\n") for text in texts), strict=True)
        rows = [[casts.NAMES.index(name) for name in names] for names in colours]  # (2, B)
        soft = sum(table[torch.tensor(row)] for table, row in zip(self.table, rows, strict=True))
        return self.engine.text_vecs(list(queries), soft)


def known_text(gallery: ArchiveGallery, query) -> str:
    """Return a query with the seen colours of shirt and object behind it, for an oracle that knows the cast."""
    moment = casts.seen_moment(gallery.truth.query_moment(query), gallery.truth.cast(query))
    return "\n".join((query.text, *(getattr(moment, name) for name in casts.PAINTED)))


KINDS = {
    "adapter-vec": query_adapters.VectorMap,
    "adapter-static": query_adapters.StaticTokens,
    "tuned-again": query_adapters.TunedEngine,
    "oracle-soft": LookedUpTokens,
}


def first_vectors(profile, name: str, system: str) -> dict[int, np.ndarray]:
    """Return {test query id: vector (D,)} of the first search by an adapter, which is trained now."""
    inputs = _inputs(profile, name, system)
    inputs["test"] = cache.metadata(embedding.embed_corpus(profile, name, "test")).get("key")
    inputs["weights"] = str(train(profile, name, system)) if system == "adapter-soft" else None
    work = functools.partial(_first_vectors, profile, name, system, inputs["weights"])
    folder = cache.build(profile.runs(name) / "first" / system, inputs, work)
    with np.load(folder / "test.npz") as arrays:
        return dict(zip(arrays["ids"].tolist(), arrays["vecs"], strict=True))


def _first_vectors(profile, name, system, weights, folder):
    text = known_text if system == "oracle-soft" else _plain_text
    test, engine = open_gallery(profile, name, "test"), engines.load(with_engine(profile))
    if weights:
        vecs = query_adapters.soft_vecs(
            engine, checkpoints.load(weights, profile), test.queries, profile.eval_batch
        )
    else:
        train_gallery = open_gallery(profile, name, "train")
        by_id = {query.id: query for query in train_gallery.queries}
        learn = split_train(profile, train_gallery, name)[0]
        rows = query_rows(profile, train_gallery, learn)
        rows = [replace(row, query=text(train_gallery, by_id[row.desc_id])) for row in rows]
        torch.manual_seed(profile.seed)
        adapter, (rate, times) = KINDS[system](profile, engine), ADAPTERS[system]
        losses = query_adapters.fit(profile, adapter, train_gallery.vectors, rows * times, rate)
        cache.write_json(folder / "notes.json", {"rate": rate, "times": times, "losses": losses[::20]})
        queries = [replace(query, text=text(test, query)) for query in test.queries]
        vecs = query_adapters.adapted_vecs(adapter, test.vectors, queries, profile.eval_batch)
    np.savez(folder / "test.npz", ids=[query.id for query in test.queries], vecs=vecs)


def _plain_text(gallery, query):
    return query.text
