"""Change what the policy has before it at the moment of refinement, and refine once more (P2)."""

import functools
import json
from collections.abc import Callable

import numpy as np
import torch

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, clip_cache
from vsr1.evaluation import evaluate
from vsr1.loop import runner, sqr
from vsr1.loop.records import Episode
from vsr1.models import embedding, loading, search_index

INTERVENTIONS = {
    "sqr": "the video that was rejected",
    "sqr-other-video": "a random wrong video",
    "sqr-right-video": "the right video",
    "sqr-no-video": "no video",
    "sqr-no-reply": "no reply",
    "sqr-query-alone": "no video and no reply",
    "sqr-other-reply": "the reply to another query",
    "sqr-asked-corrupted": "its reply with other colours asked for",  # needs rendered truth
}


def intervene(
    profile: Profile, dataset: str, weights: str, episodes: list[Episode], corrupt: Callable | None
) -> dict:
    """Refine queries whose first search failed once for each of INTERVENTIONS, unless that is current.

    episodes  of one turn: the rejected video and the reply about it. Those whose video cannot be read are left out.
    corrupt   (text of a reply, random numbers) -> the reply with other colours asked for; None: nobody can say

    Return {"ids", "videos": of the queries, "ranks": {intervention: of the right video}}.
    """
    folder = embedding.embed_corpus(profile, dataset, "test")
    inputs = {
        "vectors": cache.metadata(folder).get("key"),
        "policy": loading.version(weights),
        "knobs": [getattr(profile, knob) for knob in (*evaluate.KNOBS, "seed")],
        "replies": [
            [episode.desc_id, list(episode.turns[0].reply.ids)]
            for episode in episodes
            if episode.problem is None
        ],
        "corrupt": corrupt and cache.source_digest(corrupt.__module__),
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_intervene, profile, dataset, weights, folder, episodes, corrupt)
    target = cache.build(profile.runs(dataset) / "interventions", inputs, work)
    return json.loads((target / "ranks.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _intervene(profile, dataset, weights, vectors_folder, episodes, corrupt, folder):
    vectors = search_index.load_vectors(vectors_folder)
    engine, policy = runner.load_pair(profile, runner.SYSTEMS["sqr"], weights)
    rejected = {episode.desc_id: episode.turns[0] for episode in episodes if episode.problem is None}
    corpus = profile.data_dir(dataset) / "corpus" / "test.jsonl"
    queries = [query for query in annotations.read_fig(corpus) if query.id in rejected]
    turns = [rejected[query.id] for query in queries]
    shown = [turn.shown_id for turn in turns]
    ids = [[token for token in turn.reply.ids if token != policy.refine_token_id] for turn in turns]
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        functions = runner.EpisodeRunner(profile, runner.SYSTEMS["sqr"], engine, policy, vectors, clips)
        ranks = {}
        for name in INTERVENTIONS:
            if name != "sqr-asked-corrupted" or corrupt:
                changed = _change(name, profile, policy, queries, shown, ids, vectors, corrupt)
                ranks[name] = _refined_ranks(profile, functions, queries, *changed)
    result = {"ids": [query.id for query in queries], "videos": [query.video for query in queries]}
    cache.write_json(folder / "ranks.json", result | {"ranks": ranks})


def _change(name, profile, policy, queries, shown, ids, vectors, corrupt):
    """Return ([id of the video or None], [ids of the reply]) that stand before <REFINE> in an intervention."""
    videos, replies = shown, ids
    rngs = [np.random.default_rng([profile.seed, 26, query.id]) for query in queries]
    if name == "sqr-other-video":
        videos = []
        for rng, query, rejected in zip(rngs, queries, shown, strict=True):
            others = [video for video in vectors.video_ids if video not in (query.video, rejected)]
            videos.append(str(rng.choice(others)))
    elif name == "sqr-right-video":
        videos = [query.video for query in queries]
    elif name in ("sqr-no-video", "sqr-query-alone"):
        videos = [None] * len(queries)
    if name in ("sqr-no-reply", "sqr-query-alone"):
        replies = [[] for _ in queries]
    elif name == "sqr-other-reply":
        replies = ids[1:] + ids[:1]
    elif name == "sqr-asked-corrupted":
        texts = [
            policy.tokenizer.decode([token for token in row if token != policy.stop_token_id]) for row in ids
        ]
        texts = [corrupt(text, rng) for text, rng in zip(texts, rngs, strict=True)]
        replies = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return videos, replies


def _refined_ranks(profile, functions, queries, videos, replies):
    """Return the ranks of the right videos after the soft tokens behind these videos and replies."""
    policy, ranks = functions.policy, []
    for start in range(0, len(queries), profile.eval_batch):
        batch = slice(start, start + profile.eval_batch)
        texts, right = [query.text for query in queries[batch]], [query.video for query in queries[batch]]
        ids = sorted(set(videos[batch]) - {None})
        clips = dict(zip(ids, functions.clips.get(ids), strict=True)) | {None: None}
        prompts = [
            policy.prompt(functions.prompt, text, clips[video])
            for text, video in zip(texts, videos[batch], strict=True)
        ]
        contexts = [context for _, context in policy.append_refine(prompts, replies[batch])]
        latents = sqr.soft_tokens(policy, contexts, policy.settings.n_soft)
        vecs = sqr.soft_query(functions.engine, policy.heads, texts, latents).cpu().numpy()
        ranks += [ranking.rank for ranking in runner.rank_gallery(functions.vectors, vecs, right, 1)]
    return ranks
