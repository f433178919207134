"""Run a system on the queries of a split, batch by batch, so that a killed run can be resumed."""

from dataclasses import replace
from pathlib import Path

from vsr1 import cache
from vsr1.data import annotations, clip_cache, source
from vsr1.loop import records, runner
from vsr1.models import batching, loading, search_index

EPISODES = "episodes.jsonl"
SPLITS = {"test": "test", "held": "train"}  # the corpus that a split's queries search


def run(
    profile,
    record: records.Run,
    system,
    weights: str,
    vectors: Path,
    count,
    first: Path | None,
    looks: Path | None,
    folder: Path,
) -> None:
    """Fill `folder` with episodes.jsonl and notes.json, `eval_batch` queries at a time.

    Each batch is a file until the end, so a killed run goes on behind the last whole batch. Several processes deal out
    the batches; the result does not depend on how many processes there are.

    record   what the episodes share; how many blocks are carried, and so whether turns are reused, the policy says
    vectors  folder of the vectors of the gallery and the queries
    count    how many queries, spread evenly; None: all
    first    folder of other vectors of the queries, for the first search (`query_adapters.adapt`); None: as typed
    looks    episodes of another system with the same policy: what it looked at is known
    """
    ranks, queries = cache.dist_state(), read_queries(profile, record, count)
    vectors = search_index.load_vectors(vectors, first and first / f"{record.split}.npz")
    engine, policy = runner.load_pair(profile, system, weights)
    if policy.query_embedder:
        runner.warn_engine_mismatch(engine, vectors, queries)
    with clip_cache.open_clips(profile, record.dataset, vectors.video_ids) as clips:
        knobs = replace(profile, max_turns=record.max_turns)
        known = looks and records.known_looks(records.read_episodes(looks))
        functions = runner.EpisodeRunner(knobs, system, engine, policy, vectors, clips, known)
        record = replace(record, carry_blocks=functions.carry, reuse=functions.carry == 1)
        size = profile.eval_batch
        batches = [queries[start : start + size] for start in range(0, len(queries), size)]
        parts = [folder / f"part-{number:05}.jsonl" for number in range(len(batches))]
        pairs = list(zip(parts, batches, strict=True))[ranks.process_index :: ranks.num_processes]
        _run_parts(functions, record, pairs)
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        episodes = [episode for part in parts for episode in records.read_episodes(part)]
        records.write_episodes(folder / EPISODES, record, episodes)
        cache.write_json(folder / "notes.json", loading.model_facts(policy.model))
        for part in parts:
            part.unlink()


def read_queries(profile, record: records.Run, count: int | None) -> list[annotations.Query]:
    """Read the queries of a run: of the test split, or the train queries that nothing is learned from."""
    corpus = profile.data_dir(record.dataset) / "corpus"
    queries = annotations.read_fig(corpus / f"{SPLITS[record.split]}.jsonl")
    if record.split == "held":
        families = source.families(profile, record.dataset)
        queries = annotations.split_validation(queries, profile.val_fraction, families)[1]
    return annotations.evenly_spaced(queries, count)


def _run_parts(functions, record, pairs):
    """Write the parts that are not there yet, from pairs (file, its queries)."""
    splitter = batching.OOMSplitter("eval_batch")
    for part, batch in cache.progress(pairs, f"{record.method} {record.dataset}"):
        if not part.exists():
            halves = splitter.run(lambda queries: functions.run(queries, record), batch)
            records.write_episodes(part, record, [episode for half in halves for episode in half])
