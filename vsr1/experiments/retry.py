"""Run the retry study (A2): one refinement of queries whose first search failed, under engines of two sizes.

No verdict is asked for: every reply counts as a rejection, and every SQR reply is followed by a search (docs/method.md
section 11). So R@1 before the refinement is 0.
"""

from dataclasses import replace

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.data.annotations import Query
from vsr1.loop import episode, hqr, records, runner
from vsr1.loop.records import Episode
from vsr1.models import batching, embedding, engine, loading, search_index
from vsr1.models.search_index import Vectors

VARIANTS = ("blind", "seen", "reasoned")  # of HQR


class RetryRunner(runner.EpisodeRunner):
    """The functions of the loop, where every reply is a rejection and every SQR reply asks for a search."""

    def _reply(self, prompts):
        """Reply as in the loop, with <REFINE> behind the replies that lack it."""
        completions, seconds = super()._reply(prompts)
        without = [i for i, one in enumerate(completions) if self.policy.refine_token_id not in one.ids]
        if self.system.refine == "sqr" and without:
            appended = self._append_refine([prompts[i] for i in without], [completions[i] for i in without])
            for i, completion in zip(without, appended, strict=True):
                completions[i] = completion
        return completions, seconds

    def ask(self, pairs):
        """Ask as in the loop, and turn every verdict into a rejection."""
        return [
            verification
            if verification.reply is None
            else replace(verification, reply=replace(verification.reply, matched=False))
            for verification in super().ask(pairs)
        ]


def run_retries(
    profile: Profile, dataset: str, system: str, weights: str | None = None, which: str = "engine"
) -> list[Episode]:
    """Refine at most `studies.sample_queries` queries whose first search failed, once; episodes of one turn.

    weights  folder or hub name of the policy; None: the profile's
    which    knob that names the engine of the gallery's vectors; it is the profile's `engine`
    """
    weights = weights or profile.policy
    folder = embedding.embed_corpus(profile, dataset, "test", which)
    inputs = {
        "vectors": cache.metadata(folder)["key"],
        "policy": loading.version(weights),
        "system": [
            system,
            *vars(runner.SYSTEMS[system]).values(),
            profile.studies.sample_queries,
            profile.seed,
        ],
        "sight": [
            profile.video_fps,
            profile.max_frames,
            profile.max_frame_pixels,
            profile.max_new_tokens,
            profile.dtype,
        ],
        "code": cache.source_digest(__name__),
    }

    def work(partial):
        run = records.Run(dataset, "test", system, 1, 1, profile.seed, "top1")
        episodes = _refine_once(profile, dataset, run, weights, search_index.load_vectors(folder))
        records.write_episodes(partial / "episodes.jsonl", run, episodes)

    target = cache.build(profile.runs(dataset) / "retry" / system, inputs, work)
    return records.read_episodes(target / "episodes.jsonl")


def _refine_once(profile, dataset, run, weights, vectors):
    """Run the loop for one turn, `eval_batch` queries at a time, in halves where memory does not suffice."""
    kind, folder = runner.SYSTEMS[run.method], profile.data_dir(dataset)
    pair = runner.load_pair(profile, kind, weights)
    queries = annotations.read_fig(folder / "corpus" / "test.jsonl")
    queries = annotations.evenly_spaced(failed_queries(vectors, queries), profile.studies.sample_queries)
    splitter, episodes = batching.OOMSplitter("eval_batch"), []
    reader = video_reader.reader_for(profile)
    with video_reader.reader_pool(reader, profile.decode_workers) as read:
        clips = clip_cache.ClipCache(folder / "videos", vectors.video_ids, read)
        functions = RetryRunner(profile, kind, *pair, vectors, clips)

        def work(batch):
            return episode.run_episodes(batch, functions.search, functions.ask, functions.refine, run)

        for start in range(0, len(queries), profile.eval_batch):
            parts = splitter.run(work, queries[start : start + profile.eval_batch])
            episodes += [one for part in parts for one in part]
    return episodes


def failed_queries(vectors: Vectors, queries: list[Query]) -> list[Query]:
    """Return the queries whose right video is not first in the first search, in the order of their vectors."""
    by_id = {query.id: query for query in queries}
    known = [by_id[key] for key in vectors.query_ids if vectors.has_video(by_id[key].video)]
    scores = vectors.scores(vectors.vecs_of([query.id for query in known]))  # (Q, V)
    ranks = search_index.ranks(scores, vectors.columns([query.video for query in known]))
    return [query for query, rank in zip(known, ranks, strict=True) if rank > 1]


def append_rewrites(
    profile: Profile, dataset: str, episodes: list[Episode], which: str = "engine"
) -> list[Episode]:
    """Search with the same rewrites behind the query instead of for it: what mode `append` would have found."""
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, dataset, "test", which))
    rows = [row for row, one in enumerate(episodes) if one.turns and one.turns[0].update_text]
    if not rows:
        return episodes
    rewritten = [episodes[row] for row in rows]
    texts = [hqr.compose_query(one.query, one.turns[0].update_text, "append") for one in rewritten]
    vecs = hqr.with_query_limit(engine.load(profile, which)).embed_texts(texts)  # (R, D)
    rankings = runner.rank_gallery(vectors, vecs, [one.gt_video for one in rewritten], 1)
    episodes = list(episodes)
    for row, one, ranking in zip(rows, rewritten, rankings, strict=True):
        turn = records.with_refined_ranking(one.turns[0], ranking)
        episodes[row] = replace(one, turns=(turn,))
    return episodes


def run_study(profile: Profile, dataset: str, weights: str) -> dict[str, list[Episode]]:
    """Return {<engine>/<system>: episodes}. Soft tokens are for the engine that they were trained with only.

    weights  of the policy after both stages
    """
    large = profile.with_overrides("large", engine=profile.engine_large)
    runs = {"small/sqr": run_retries(profile, dataset, "sqr", weights)}
    for size, variant, which in (("small", profile, "engine"), ("large", large, "engine_large")):
        for rewrite in VARIANTS:
            episodes = run_retries(variant, dataset, f"hqr-{rewrite}", which=which)
            runs[f"{size}/hqr-{rewrite}"] = episodes
            runs[f"{size}/hqr-{rewrite}-append"] = append_rewrites(variant, dataset, episodes, which)
    return runs
