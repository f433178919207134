"""Run the retry study (A2): one refinement of queries whose first search failed, under engines of two sizes.

No verdict is asked for: every reply counts as a rejection, and every SQR reply is followed by a search (docs/method.md
section 11). So R@1 before the refinement is 0.
"""

from dataclasses import replace

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, clip_cache
from vsr1.evaluation import metrics
from vsr1.experiments import retrieval
from vsr1.loop import hqr, records, runner
from vsr1.loop.records import Episode
from vsr1.models import batching, embedding, engine, loading, search_index

KNOBS = ("video_fps", "max_frames", "max_frame_pixels", "max_new_tokens", "dtype", "seed")
VARIANTS = ("blind", "seen", "reasoned")  # of HQR


class RetryRunner(runner.EpisodeRunner):
    """The functions of the loop, where every SQR reply asks for a search."""

    def _reply(self, prompts):
        """Reply as in the loop, with <REFINE> behind the replies that lack it."""
        completions, seconds = super()._reply(prompts)
        token = self.policy.refine_token_id
        without = [i for i, completion in enumerate(completions) if token not in completion.ids]
        if self.system.refine == "sqr" and without:
            appended = self._append_refine([prompts[i] for i in without], [completions[i] for i in without])
            for i, completion in zip(without, appended, strict=True):
                completions[i] = completion
        return completions, seconds


def run_retries(
    profile: Profile, dataset: str, system: str, weights: str | None = None, which: str = "engine"
) -> list[Episode]:
    """Refine at most `studies.sample_queries` queries whose first search failed, once; episodes of one turn.

    weights  folder or hub name of the policy; None: the profile's
    which    knob that names the engine; `engine_large` is the `engine` of a variant of the profile
    """
    if which == "engine_large":
        profile = profile.with_overrides("large", engine=profile.engine_large)
    weights = weights or profile.policy
    folder = embedding.embed_corpus(profile, dataset, "test", which)
    inputs = {
        "vectors": cache.metadata(folder)["key"],
        "policy": loading.version(weights),
        "system": [system, *vars(runner.SYSTEMS[system]).values(), profile.studies.sample_queries],
        "knobs": [getattr(profile, knob) for knob in KNOBS],
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
    kind = replace(runner.SYSTEMS[run.method], accepts=False)
    pair = runner.load_pair(profile, kind, weights)
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    ranks = retrieval.first_search(queries, vectors).ranks
    failed = [query for query, rank in zip(queries, ranks, strict=True) if 1 < rank < metrics.UNRANKED]
    queries = annotations.evenly_spaced(failed, profile.studies.sample_queries)
    splitter, episodes = batching.OOMSplitter("eval_batch"), []
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        functions = RetryRunner(profile, kind, *pair, vectors, clips)
        for start in range(0, len(queries), profile.eval_batch):
            batch = queries[start : start + profile.eval_batch]
            for part in splitter.run(lambda part: functions.run(part, run), batch):
                episodes += part
    return episodes


def append_rewrites(
    profile: Profile, dataset: str, episodes: list[Episode], which: str = "engine"
) -> list[Episode]:
    """Search with the same rewrites behind the query instead of for it: what mode `append` would have found."""
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, dataset, "test", which))
    rewritten = [e for e in episodes if e.turns and e.turns[0].update_text]
    if not rewritten:
        return episodes
    texts = [hqr.compose_query(e.query, e.turns[0].update_text, "append") for e in rewritten]
    vecs = hqr.with_query_limit(engine.load(profile, which)).embed_texts(texts)  # (R, D)
    rankings = runner.rank_gallery(vectors, vecs, [e.gt_video for e in rewritten], 1)
    turns = {
        e.desc_id: (records.with_refined_ranking(e.turns[0], ranking),)
        for e, ranking in zip(rewritten, rankings, strict=True)
    }
    return [replace(e, turns=turns.get(e.desc_id, e.turns)) for e in episodes]


def run_study(profile: Profile, dataset: str, weights: str) -> dict[str, list[Episode]]:
    """Return {<engine>/<system>: episodes}. Soft tokens are for the engine that they were trained with only.

    weights  of the policy after both stages
    """
    runs = {"small/sqr": run_retries(profile, dataset, "sqr", weights)}
    for size, which in (("small", "engine"), ("large", "engine_large")):
        for rewrite in VARIANTS:
            episodes = run_retries(profile, dataset, f"hqr-{rewrite}", which=which)
            runs[f"{size}/hqr-{rewrite}"] = episodes
            runs[f"{size}/hqr-{rewrite}-append"] = append_rewrites(profile, dataset, episodes, which)
    return runs
