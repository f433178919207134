"""Run systems on the four cells of the study, and change what is seen at the moment of refinement.

All systems but `hqr` share one policy, that of `sqr`: it judges, grounds, and reads the cast. They differ in how the
first ranking is made and in what happens after a rejection. `rerank` shows the same films as `walkdown`, rejects all,
and answers by the clearest verdict.
"""

import functools
import json
from dataclasses import dataclass, replace

import numpy as np
import torch

from vsr1 import cache
from vsr1.data import clip_cache
from vsr1.evaluation import evaluate
from vsr1.experiments.archives import learning, search
from vsr1.loop import hqr, records, replies, runner, sqr
from vsr1.mini.archives import corpus, teacher
from vsr1.models import embedding, loading, prompt_text
from vsr1.training import query_adapters


@dataclass(frozen=True)
class Entry:
    """What a system of this study is made of."""

    like: str  # what happens after a verdict: a name of `runner.SYSTEMS`
    policy: str = "sqr"  # as of `learning.train`
    first: str | None = None  # how its first ranking is made; None: as typed


SYSTEMS = {
    "walkdown": Entry("walkdown"),
    "rerank": Entry("rerank"),
    "rocchio": Entry("rocchio"),
    **{name: Entry("walkdown", first=name) for name in ("adapter-soft", *learning.KINDS)},
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


def read(profile, cell: str, system: str) -> list[records.Episode]:
    """Read the episodes that `run` left; none before."""
    folder = profile.runs(corpus.CELLS[cell][0]) / "episodes" / cell / system
    return records.read_episodes(folder / "episodes.jsonl") if folder.exists() else []


def _inputs(profile, cell, weights):
    name = corpus.CELLS[cell][0]
    vectors = embedding.embed_corpus(profile, name, "test")
    return {
        "cell": cell,
        "vectors": cache.metadata(vectors).get("key"),
        "engine": loading.version(str(learning.tune_engine(profile))),
        "policy": loading.version(weights),
        "knobs": [getattr(profile, knob) for knob in (*evaluate.KNOBS, "max_turns", "seed")],
        "queries": profile.archives.test_queries,
        "code": cache.source_digest(__name__),
    }


def _run(profile, cell, system, weights, first, folder):
    name, entry = corpus.CELLS[cell][0], SYSTEMS[system]
    gallery = learning.open_gallery(profile, name, "test")
    queries = search.sample(profile, cell, gallery.queries, gallery.truth)
    kind = runner.find_system(entry.like)
    if entry.like == "rocchio":
        kind = replace(kind, feedback=choose_feedback(profile, name))
    engine, agent = runner.load_pair(learning.with_engine(profile), kind, weights)
    rule = kind.display_rule or profile.display_rule
    record = records.Run(cell, "test", system, profile.max_turns, 1, profile.seed, rule)
    with clip_cache.open_clips(profile, name, gallery.vectors.video_ids) as clips:
        functions = search.ArchiveRunner(profile, kind, engine, agent, gallery, clips, first)
        batches = cache.progress(_batches(profile, queries), f"{system} {cell}")
        episodes = [episode for batch in batches for episode in functions.run(batch, record)]
    records.write_episodes(folder / "episodes.jsonl", record, episodes)


def choose_feedback(profile, name: str) -> float:
    """Choose the part of a rejected film's vector that `rocchio` takes off the query's, as on other corpora.

    The best is what brings most failed queries of held-out train archives to rank 1; of equals the smallest.
    """
    gallery = learning.open_gallery(profile, name, "train")
    _, held = learning.split_train(profile, gallery, name)

    def count_repaired(feedback):
        return sum(
            query_adapters.count_repaired(
                part,
                gallery.typed([held[row] for row in rows]),
                part.columns([held[row].video for row in rows]),
                feedback,
            )
            for part, rows in gallery.by_archive(held)
        )

    return max(query_adapters.FEEDBACK, key=count_repaired)


def _batches(profile, queries):
    size = profile.eval_batch
    return [queries[start : start + size] for start in range(0, len(queries), size)]


# --- Interventions

INTERVENTIONS = {
    "own": "its own reply to the film that was rejected",
    "same-archive": "its own reply to another wrong film of the archive",
    "other-archive": "its own reply to a film of another camera",
    "other-reply": "that same reply, beside the film that was rejected",
    "no-film": "no film and no reply",
    "teacher": "the teacher's reply to the film that was rejected",
    "teacher-wrong-cast": "the same with the cast of another camera in it",
    "given": "no film: a text that names the cast, and the teacher's reply",
}


IN_WORDS = ("own", "same-archive", "other-archive")  # those of HQR, whose words come out of its own reply


def intervene(profile, cell: str, system: str) -> dict:
    """Refine the queries of a cell whose first search failed once for each intervention, unless that is current.

    Return {"ids": of the queries, "ranks": {intervention: of the right videos}, "casts": {intervention: what the reply
    says it sees, or None}}.

    system  "sqr", all of INTERVENTIONS; or "hqr", those IN_WORDS
    """
    name = corpus.CELLS[cell][0]
    weights = str(learning.train(profile, name, system))
    inputs = _inputs(profile, cell, weights) | {"system": system}
    work = functools.partial(_intervene, profile, cell, system, weights)
    target = cache.build(profile.runs(name) / "interventions" / cell / system, inputs, work)
    return json.loads((target / "ranks.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _intervene(profile, cell, system, weights, folder):
    name = corpus.CELLS[cell][0]
    gallery = learning.open_gallery(profile, name, "test")
    kind = runner.SYSTEMS[SYSTEMS[system].like]
    engine, agent = runner.load_pair(learning.with_engine(profile), kind, weights)
    refine = _refine_soft if system == "sqr" else _refine_hard
    queries = search.sample(profile, cell, gallery.queries, gallery.truth)
    first = gallery.ranks(queries, gallery.typed(queries))
    failed = [query for query, rank in zip(queries, first, strict=True) if rank > 1]
    ranks, casts, said = {}, {}, {}  # said: what was replied to a film of another camera, by query
    with clip_cache.open_clips(profile, name, gallery.vectors.video_ids) as clips:
        for intervention in INTERVENTIONS if system == "sqr" else IN_WORDS:
            ranks[intervention], casts[intervention] = [], []
            for batch in _batches(profile, failed):
                contexts = [
                    _context(profile, gallery, intervention, query, said.get(query.id)) for query in batch
                ]
                vecs, texts = refine(profile, engine, agent, clips, batch, contexts)
                ranks[intervention] += gallery.ranks(batch, vecs).tolist()
                casts[intervention] += [teacher.read_cast(text) for text in texts]
                if intervention == "other-archive":
                    said |= {query.id: text for query, text in zip(batch, texts, strict=True)}
    ids = [query.id for query in failed]
    cache.write_json(folder / "ranks.json", {"ids": ids, "ranks": ranks, "casts": casts})


def _context(profile, gallery, intervention, query, said):
    """Return what the policy has before it refines a query.

    (id of the film or None, a text in its place or None, the reply in words or None for the policy's own)

    said  its reply to a film of another camera
    """
    rng = np.random.default_rng([profile.seed, 34, query.id])
    part, truth = gallery.part(query), gallery.truth
    scores = part.scores(gallery.typed([query])[0])
    rejected = part.video_ids[int(scores.argmax())]
    if intervention == "same-archive":
        return str(rng.choice([v for v in part.video_ids if v not in (query.video, rejected)])), None, None
    if intervention == "other-archive":
        return str(rng.choice(_elsewhere(gallery, query))), None, None
    if intervention == "other-reply":
        return rejected, None, said
    if intervention == "no-film":
        return None, None, ""
    if intervention == "teacher":
        return rejected, None, truth.reply(query, rejected)
    if intervention == "teacher-wrong-cast":
        cast = truth.cast(query)
        wrong = int(rng.choice([other for other in range(12) if other != cast and other % 2 == cast % 2]))
        return rejected, None, teacher.verdict(truth.query_moment(query), truth.shown_moment(rejected), wrong)
    if intervention == "given":
        return None, truth.caption(query, rejected), truth.reply(query, rejected)
    return rejected, None, None


def _elsewhere(gallery, query):
    """Return the films of archives with another cast; where all have the same, of other archives."""
    searched = gallery.truth.archive_of[query.video]
    archives = [archive for archive in gallery.truth.archive_of.values() if archive.name in gallery.parts]
    others = [archive for archive in archives if archive is not searched]
    other_casts = [archive for archive in others if archive.cast != searched.cast]
    names = sorted({archive.name for archive in other_casts or others})
    return [video for name in names for video in gallery.parts[name].video_ids]


def _refine_soft(profile, engine, agent, clips, queries, contexts):
    """Return (vectors (B, D) of the queries after one refinement, the replies before it); contexts: of `_context`."""
    prompts = _prompts(agent, agent.settings.system, clips, queries, contexts)
    if contexts[0][2] is None:
        completions = agent.reply(prompts, max_new_tokens=profile.max_new_tokens)
        reply_ids = [[token for token in c.ids if token != agent.refine_token_id] for c in completions]
    else:
        reply_ids = [agent.tokenizer(text, add_special_tokens=False)["input_ids"] for _, _, text in contexts]
    refine_contexts = [context for _, context in agent.append_refine(prompts, reply_ids)]
    latents = sqr.soft_tokens(agent, refine_contexts, agent.settings.n_soft)
    vecs = sqr.soft_query(engine, agent.heads, [query.text for query in queries], latents)
    return vecs.cpu().numpy(), [agent.tokenizer.decode(ids) for ids in reply_ids]


def _refine_hard(profile, engine, agent, clips, queries, contexts):
    """Do the same in words; a reply without a rewrite leaves the query as it is."""
    prompts = _prompts(agent, prompt_text.SYSTEM_HQR, clips, queries, contexts)
    completions = agent.reply(prompts, max_new_tokens=profile.max_new_tokens)
    updates = [replies.read_reply(c.text, c.ids, ended=c.ended).update for c in completions]
    texts = [update or query.text for update, query in zip(updates, queries, strict=True)]
    return hqr.with_query_limit(engine).embed_texts(texts), [c.text for c in completions]


def _prompts(agent, system, clips, queries, contexts):
    videos = sorted({video for video, _, _ in contexts} - {None})
    clip_of = dict(zip(videos, clips.get(videos), strict=True))
    return [
        agent.prompt(system, query.text, clip_of[video] if video else text)
        for query, (video, text, _) in zip(queries, contexts, strict=True)
    ]
