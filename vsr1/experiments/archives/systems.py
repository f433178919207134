"""Run systems on the four cells of the study, and change what is seen at the moment of refinement.

All systems but `hqr` share one policy, that of `sqr`: it judges, grounds, and reads the cast. They differ in how the
first ranking is made and in what happens after a rejection.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
import torch

from vsr1 import cache
from vsr1.data import annotations, clip_cache
from vsr1.evaluation import evaluate
from vsr1.experiments.archives import learning
from vsr1.experiments.archives.search import ArchiveRunner
from vsr1.loop import records, runner, sqr
from vsr1.mini.archives import corpus, teacher
from vsr1.models import loading


@dataclass(frozen=True)
class Entry:
    """What a system of this study is made of."""

    like: str  # what happens after a verdict: a name of `runner.SYSTEMS`
    policy: str = "sqr"  # one of `learning.POLICIES`
    first: str | None = None  # how its first ranking is made; None: as typed


SYSTEMS = {
    "walkdown": Entry("walkdown"),
    "adapter-soft": Entry("walkdown", first="adapter-soft"),
    "oracle-soft": Entry("walkdown", first="oracle-soft"),
    "hqr": Entry("hqr-reasoned", "hqr"),
    "sqr": Entry("sqr"),
    "sqr-skip": Entry("sqr-skip"),  # beyond the paper: no video twice
}


def run(profile, cell: str, system: str) -> list[records.Episode]:
    """Run a system on a cell, unless its episodes are current, and return them."""
    name, entry = corpus.CELLS[cell][0], SYSTEMS[system]
    weights = str(learning.train(profile, name, entry.policy))
    inputs = _inputs(profile, cell, weights) | {"system": vars(entry)}
    first = learning.first_vectors(profile, name, entry.first) if entry.first else None
    work = functools.partial(_run, profile, cell, system, weights, first)
    folder = cache.build(profile.runs(name) / "episodes" / cell / system, inputs, work)
    return records.read_episodes(folder / "episodes.jsonl")


def _inputs(profile, cell, weights):
    name = corpus.CELLS[cell][0]
    vectors = learning.embedding.embed_corpus(profile, name, "test")
    return {
        "cell": cell,
        "vectors": cache.metadata(vectors).get("key"),
        "engine": loading.version(str(learning.tune_engine(profile))),
        "policy": loading.version(weights),
        "knobs": [getattr(profile, knob) for knob in (*evaluate.KNOBS, "max_turns", "seed")],
        "queries": profile.archives.test_queries,
        "code": cache.source_digest(__name__),
    }


def sample(profile, gallery, cell) -> list[annotations.Query]:
    """Return the test queries of a cell that systems are run on."""
    return annotations.evenly_spaced(gallery.cell(cell), profile.archives.test_queries)


def _run(profile, cell, system, weights, first, folder):
    name, entry = corpus.CELLS[cell][0], SYSTEMS[system]
    gallery = learning.open_gallery(profile, name, "test")
    queries, how = sample(profile, gallery, cell), runner.find_system(entry.like)
    engine, agent = runner.load_pair(learning.with_engine(profile), how, weights)
    rule = how.display_rule or profile.display_rule
    record = records.Run(cell, "test", system, profile.max_turns, 1, profile.seed, rule)
    with clip_cache.open_clips(profile, name, gallery.vectors.video_ids) as clips:
        functions = ArchiveRunner(profile, how, engine, agent, gallery, clips, first)
        batches = [queries[at : at + profile.eval_batch] for at in range(0, len(queries), profile.eval_batch)]
        batches = cache.progress(batches, f"{system} {cell}")
        episodes = [episode for batch in batches for episode in functions.run(batch, record)]
    records.write_episodes(folder / "episodes.jsonl", record, episodes)


# --- Interventions

INTERVENTIONS = {
    "own": "its own reply to the film that was rejected",
    "same-archive": "its own reply to another wrong film of the archive",
    "other-archive": "its own reply to a film of another camera",
    "no-film": "no film and no reply",
    "teacher": "the teacher's reply to the film that was rejected",
    "teacher-wrong-cast": "the same with the cast of another camera in it",
    "given": "no film: a text that names the cast, and the teacher's reply",
}


def intervene(profile, cell: str) -> dict:
    """Refine the queries of a cell whose first search failed once for each of INTERVENTIONS, unless that is current.

    Return {"ids": of the queries, "ranks": {intervention: of the right videos}, "casts": {intervention: what the reply
    says it sees, or None}}.
    """
    name = corpus.CELLS[cell][0]
    weights = str(learning.train(profile, name, "sqr"))
    work = functools.partial(_intervene, profile, cell, weights)
    target = cache.build(profile.runs(name) / "interventions" / cell, _inputs(profile, cell, weights), work)
    return json.loads((target / "ranks.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _intervene(profile, cell, weights, folder):
    name = corpus.CELLS[cell][0]
    gallery = learning.open_gallery(profile, name, "test")
    engine, agent = runner.load_pair(learning.with_engine(profile), runner.SYSTEMS["sqr"], weights)
    queries = sample(profile, gallery, cell)
    ranks = gallery.ranks(queries, gallery.typed(queries))
    queries = [query for query, rank in zip(queries, ranks, strict=True) if rank > 1]
    found, casts_read = {}, {}
    with clip_cache.open_clips(profile, name, gallery.vectors.video_ids) as clips:
        for what in INTERVENTIONS:
            found[what], casts_read[what] = [], []
            for at in range(0, len(queries), profile.eval_batch):
                batch = queries[at : at + profile.eval_batch]
                looks = [_look(profile, gallery, what, query) for query in batch]
                vecs, texts = _refine(profile, engine, agent, clips, batch, looks)
                found[what] += gallery.ranks(batch, vecs).tolist()
                casts_read[what] += [teacher.read_cast(text) for text in texts]
    cache.write_json(
        folder / "ranks.json",
        {"ids": [query.id for query in queries], "ranks": found, "casts": casts_read},
    )


def _look(profile, gallery, what, query):
    """(id of the film or None, a text in its place or None, the reply in words or None for the policy's own)."""
    rng = np.random.default_rng([profile.seed, 34, query.id])
    part, truth = gallery.part(query), gallery.truth
    scores = part.scores(gallery.typed([query])[0])
    rejected = part.video_ids[int(scores.argmax())]
    cast, asked, shown = truth.cast(query), truth.query_moment(query), truth.shown_moment(rejected)
    if what == "same-archive":
        return str(rng.choice([v for v in part.video_ids if v not in (query.video, rejected)])), None, None
    if what == "other-archive":
        return str(rng.choice(_elsewhere(gallery, query))), None, None
    if what == "no-film":
        return None, None, ""
    if what == "teacher":
        return rejected, None, truth.reply(query, rejected)
    if what == "teacher-wrong-cast":
        wrong = int(rng.choice([other for other in range(12) if other != cast and other % 2 == cast % 2]))
        return rejected, None, teacher.verdict(asked, shown, wrong)
    if what == "given":
        return None, truth.caption(query, rejected), truth.reply(query, rejected)
    return rejected, None, None


def _elsewhere(gallery, query):
    """Films of archives with another cast; where all have the same, of other archives."""
    own = gallery.truth.archive_of[query.video]
    others = [
        one for one in gallery.truth.archive_of.values() if one.name in gallery.parts and one is not own
    ]
    far = [one for one in others if one.cast != own.cast]
    names = sorted({one.name for one in far or others})
    return [video for name in names for video in gallery.parts[name].video_ids]


def _refine(profile, engine, agent, clips, queries, looks):
    """(vectors (B, D) of the queries after one refinement, the replies before it)."""
    videos = sorted({video for video, _, _ in looks} - {None})
    seen = dict(zip(videos, clips.get(videos), strict=True))
    prompts = [
        agent.prompt(agent.settings.system, query.text, seen[video] if video else text)
        for query, (video, text, _) in zip(queries, looks, strict=True)
    ]
    if looks[0][2] is None:
        replies = [one.ids for one in agent.reply(prompts, max_new_tokens=profile.max_new_tokens)]
        replies = [[token for token in ids if token != agent.refine_token_id] for ids in replies]
    else:
        replies = [agent.tokenizer(text, add_special_tokens=False)["input_ids"] for _, _, text in looks]
    contexts = [context for _, context in agent.append_refine(prompts, replies)]
    latents = sqr.soft_tokens(agent, contexts, agent.settings.n_soft)
    vecs = sqr.soft_query(engine, agent.heads, [query.text for query in queries], latents)
    return vecs.cpu().numpy(), [agent.tokenizer.decode(ids) for ids in replies]
