"""Rewrite queries in words as well as can be learned: fixed wordings, and the best of several rewrites.

Soft tokens of stage 1 learn to search, so words must, too: of several rewrites of a query, the one by which the engine
ranks the right video best teaches the policy what to write (`sft.train`, "hqr").
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.loop import hqr, replies
from vsr1.models import batching, checkpoints, embedding, loading, search_index
from vsr1.models import engine as engines
from vsr1.training import sft_data
from vsr1.training.sft_examples import SFTExample

SAMPLES = 8  # ours, rewrites of a query: as many as stage 2 samples replies
# What the rows depend on, and how replies are sampled.
KNOBS = ("sft_rows", "sft_negatives", "sft_text_only_rows", "sft_epochs", "sft_batch", "val_fraction", "seed")
KNOBS += ("rollout_temperature", "max_new_tokens", "dtype", "instruction")

# --- Fixed wordings

FRAMES = (
    "{}",
    "{0} {0}",
    "A video of this: {}",
    "Find the scene in which this happens: {}",
    "{} Every detail counts.",
)
SHORT = 3  # letters of the longest word that says nothing on its own: articles, most prepositions


def wordings(query: str) -> list[str]:
    """Word a query in all fixed ways, the query itself first: each of FRAMES around the whole and its parts.

    >>> texts = wordings("A dog runs on the red beach.")
    >>> len(texts), texts[2], texts[5]
    (30, 'A video of this: A dog runs on the red beach.', 'runs beach.')
    """
    words = query.split()
    half = len(words) // 2
    first, last = " ".join(words[:half]), " ".join(words[half:])
    long = " ".join(word for word in words if len(word) > SHORT) or query
    bodies = (query, long, f"{query} {first}", f"{query} {last}", f"{query} {long}", f"{last} {first}")
    return [frame.format(body) for body in bodies for frame in FRAMES]


# --- The best of several rewrites


def write(profile, dataset: str) -> Path:
    """Return the step with rewrites.json: {query id: the best rewrite}.

    There is one for each query of stage 1 that shows a wrong video. Its candidates are SAMPLES rewrites by the base
    policy, which reads the query alone, and the fixed wordings without a frame.
    """
    vectors = embedding.embed_corpus(profile, dataset, "train")
    inputs = {
        "vectors": cache.metadata(vectors).get("key"),
        "policy": loading.version(profile.policy),
        "replies": sft_data.digest(profile, dataset),
        "knobs": {knob: getattr(profile, knob) for knob in KNOBS},
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_write, profile, dataset, search_index.load_vectors(vectors))
    return cache.build(profile.runs(dataset) / "rewrites", inputs, work, distributed=True)


def _write(profile, dataset, vectors, folder):
    rows = sft_data.load(profile, dataset, vectors)
    if not cache.dist_state().is_main_process:
        return
    failed = list({row.desc_id: row for row in rows if is_rejected(row)}.values())
    policy, engine = checkpoints.load(profile.policy, profile), engines.load(profile)
    splitter, best = batching.OOMSplitter("eval_batch"), {}
    size = max(1, profile.eval_batch // SAMPLES)
    work = functools.partial(best_rewrites, profile, policy, hqr.with_query_limit(engine), vectors)
    for start in cache.progress(range(0, len(failed), size), f"rewrites {dataset}"):
        for part in splitter.run(work, failed[start : start + size]):
            best |= part
    cache.write_json(folder / "rewrites.json", best)


def best_rewrites(profile, policy, engine, vectors, rows: list[SFTExample]) -> dict[int, str]:
    """Return {query id: the rewrite that gives the right video its best rank}, of equals the first.

    The fixed wordings without a frame come before those that are sampled: they say nothing that the query does not.
    """
    prompt, _ = hqr.rewrite_prompt("blind")
    completions = policy.reply(
        [policy.prompt(prompt, row.query) for row in rows],
        group=SAMPLES,
        max_new_tokens=profile.max_new_tokens,
        temperature=profile.rollout_temperature,
        rng=[np.random.default_rng([profile.seed, 27, row.desc_id]) for row in rows],
    )
    updates = [replies.read_reply(reply.text, reply.ids, ended=reply.ended).update for reply in completions]
    best = {}
    for number, row in enumerate(rows):
        sampled = [text for text in updates[number * SAMPLES :][:SAMPLES] if text is not None]
        texts = list(dict.fromkeys([*wordings(row.query)[:: len(FRAMES)], *sampled]))
        right = vectors.columns([row.right] * len(texts))
        ranks = search_index.ranks(vectors.scores(engine.embed_texts(texts)), right)
        best[row.desc_id] = texts[int(ranks.argmin())]
    return best


def is_rejected(row: SFTExample) -> bool:
    """Return whether a row shows a wrong video."""
    return row.shown not in ("", row.right)


def with_updates(rows: list[SFTExample], folder: Path) -> list[SFTExample]:
    """Let the reply of each row that shows a wrong video end with the rewrite in `folder`, where there is one."""
    best = json.loads((folder / "rewrites.json").read_text(encoding="utf-8"))
    return [with_update(row, best.get(str(row.desc_id)) if is_rejected(row) else None) for row in rows]


def with_update(row: SFTExample, update: str | None) -> SFTExample:
    """Return the row whose reply ends with an update in words; as it is without one."""
    if update is None or row.reply is None:
        return row
    return replace(row, reply=f"{row.reply} <query_update>{update}</query_update>")
