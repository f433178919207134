"""Measure what a better query could gain in archives, and whether a policy can read the known object."""

import functools
import json
from dataclasses import replace

import numpy as np
import torch

from vsr1 import cache
from vsr1.data import annotations, clip_cache, frame_sizes
from vsr1.experiments.archives import learning, search
from vsr1.loop import hqr
from vsr1.mini import pretraining_data, teacher
from vsr1.mini.archives import casts, corpus
from vsr1.mini.archives import teacher as archive_teacher
from vsr1.models import checkpoints, embedding, inputs, loading
from vsr1.models import engine as engines
from vsr1.training import query_adapters, rewrites

FIRST = ("adapter-vec", "adapter-static", "tuned-again", "adapter-soft", "oracle-soft")
CASTS = "casts"  # the corpus whose cameras have a cast
WORDED = 480  # train queries, evenly spaced, that the fixed wording is chosen on
READ = 96  # test films, evenly spread, that the base policy is asked about


def measure(profile, cell: str) -> dict[str, list[bool]]:
    """Return {system: hits (Q,)} of first searches on a cell, unless they are current.

    typed         the query as it is
    words-known   in seen colours, in the query's own style: what one writes who knows the cast
    words-best    the best of all wordings in seen colours, by somebody who also knows the answer
    words-wrong   the same for a random wrong film of the archive, in its place: what such a choice finds by chance
    hqr-fixed     in the one of `rewrites.wordings` that finds most of WORDED train queries
    and each of FIRST
    """
    name = corpus.CELLS[cell][0]
    first = {system: learning.first_vectors(profile, name, system) for system in FIRST}
    gallery = learning.open_gallery(profile, name, "test")
    queries = search.sample(profile, cell, gallery.queries, gallery.truth)
    hits = {"typed": gallery.ranks(queries, gallery.typed(queries)) == 1}
    for system, vecs in first.items():
        hits[system] = gallery.ranks(queries, np.stack([vecs[query.id] for query in queries])) == 1
    hits |= _word_hits(profile, gallery, queries)
    hits["hqr-fixed"] = _fixed_hits(profile, name, gallery, queries)
    return {system: values.tolist() for system, values in hits.items()}


def _word_hits(profile, gallery, queries):
    """Return the hits of wordings by somebody who knows the cast."""
    engine = engines.load(learning.with_engine(profile))
    wordings = [
        archive_teacher.wordings(gallery.truth.query_moment(q), gallery.truth.cast(q)) for q in queries
    ]
    rows = [row for row, texts in enumerate(wordings) for _ in texts]
    vecs = engine.embed_texts([text for texts in wordings for text in texts])
    hit = gallery.ranks([queries[row] for row in rows], vecs) == 1
    wrong = [_aimed_at_wrong(profile, gallery, query) for query in queries]
    hit_wrong = gallery.ranks([wrong[row] for row in rows], vecs) == 1
    own_style = np.r_[0, np.cumsum([len(texts) for texts in wordings])[:-1]]  # the first of each query
    best, chance = np.zeros(len(queries), bool), np.zeros(len(queries), bool)
    np.logical_or.at(best, rows, hit)
    np.logical_or.at(chance, rows, hit_wrong)
    return {"words-known": hit[own_style], "words-best": best, "words-wrong": chance}


def _aimed_at_wrong(profile, gallery, query):
    """Return the query with a random wrong film of its archive as the right one."""
    others = [video for video in gallery.part(query).video_ids if video != query.video]
    return replace(query, video=str(np.random.default_rng([profile.seed, 35, query.id]).choice(others)))


def _fixed_hits(profile, name, gallery, queries):
    """Return the hits of the wording, the same for all, that finds most of WORDED train queries."""
    engine = hqr.with_query_limit(engines.load(learning.with_engine(profile)))
    train = learning.open_gallery(profile, name, "train")
    learn = annotations.evenly_spaced(learning.split_train(profile, train, name)[0], WORDED)
    numbers = range(len(rewrites.wordings(learn[0].text)))
    recalls = [
        np.mean(train.ranks(learn, query_adapters.worded_vecs(engine, n, learn)) == 1) for n in numbers
    ]
    return gallery.ranks(queries, query_adapters.worded_vecs(engine, int(np.argmax(recalls)), queries)) == 1


# --- The known object


def read_known(profile) -> dict[str, float | int]:
    """Measure how often the base policy, before any training here, names the colour that the trousers seem to have.

    whole, half  percent right of films by cameras of whole and of half steps; of half steps either neighbour counts
    n            films
    """
    gallery = learning.ArchiveGallery(profile, CASTS, "test")
    key = {"vectors": cache.metadata(embedding.embed_corpus(profile, CASTS, "test")).get("key")}
    key |= {"policy": loading.version(profile.policy), "code": cache.source_digest(__name__)}
    work = functools.partial(_read_known, profile, gallery)
    folder = cache.build(profile.runs(CASTS) / "known", key, work)
    return json.loads((folder / "known.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _read_known(profile, gallery, folder):
    agent = checkpoints.load(profile.policy, profile)
    queries = gallery.queries[:: max(1, len(gallery.queries) // READ)]
    right = {"whole": [], "half": []}
    with clip_cache.open_clips(profile, CASTS, gallery.vectors.video_ids) as clips:
        films = clips.get(query.video for query in queries)
    shown = [gallery.truth.shown_moment(query.video) for query in queries]
    prompts = [_question(agent, *pair) for pair in zip(films, shown, strict=True)]
    for query, completion in zip(queries, agent.reply(prompts, max_new_tokens=8), strict=True):
        colour = casts.seen_colour(casts.KNOWN, gallery.truth.cast(query))  # of a half step: two names
        right["half" if " " in colour else "whole"].append(completion.text.strip(" .\n") in colour.split())
    numbers = {kind: 100 * float(np.mean(values)) if values else None for kind, values in right.items()}
    cache.write_json(folder / "known.json", numbers | {"n": len(queries)})


def _question(agent, clip, shown):
    """Return a question of pretraining about the trousers of a film."""
    config, rule = agent.model.config.vision_config, frame_sizes.PixelRule(agent.max_frame_pixels)
    video = inputs.Video(*inputs.patchify(clip.frames, config, rule))
    text = inputs.video_text(clip.timestamps, video.tokens_per_pair(config.spatial_merge_size))
    start, end = (teacher.seconds_text(time) for time in (shown.start, shown.end))
    user = f"{text}{teacher.QUESTIONS['trousers']} from {start} to {end}?"
    chat = inputs.chat(agent.tokenizer, pretraining_data.WATCH, user)
    return inputs.Prompt(agent.tokenizer(chat, add_special_tokens=False)["input_ids"], video)
