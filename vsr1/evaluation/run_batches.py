"""Run a system on the queries of a split, batch by batch, so that a killed run can be resumed."""

from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, clip_cache
from vsr1.loop import episode, records, runner
from vsr1.models import batching, loading, search_index

EPISODES = "episodes.jsonl"


@dataclass(frozen=True)
class Work:
    """One system on the queries of one split."""

    profile: Profile
    dataset: str
    name: str  # of the system; `system` says what it does
    system: runner.System
    weights: str
    query_file: Path  # all queries of the corpus that is searched
    vectors: Path
    split: str
    count: int | None  # how many queries, spread evenly; None: all

    def queries(self) -> list[annotations.Query]:
        """Read the queries to run."""
        queries = annotations.read_fig(self.query_file)
        if self.split == "held":
            queries = annotations.split_validation(queries, self.profile.val_fraction)[1]
        return annotations.evenly_spaced(queries, self.count)

    def run_record(self, carry: int) -> records.Run:
        """Return what the records of all episodes share."""
        profile, system = self.profile, self.system
        turns = profile.max_turns if system.refine else 1
        rule = system.display_rule or profile.display_rule
        return records.Run(self.dataset, self.split, self.name, turns, carry, profile.seed, rule, carry == 1)


def run(work: Work, folder: Path) -> None:
    """Fill `folder` with episodes.jsonl and notes.json, `eval_batch` queries at a time.

    Each batch is a file until the end, so a killed run goes on behind the last whole batch. Each of several processes
    runs its share of the batches; the result does not depend on how many processes there are.
    """
    ranks, profile, queries = cache.dist_state(), work.profile, work.queries()
    vectors = search_index.load_vectors(work.vectors)
    engine, policy = runner.load_pair(profile, work.system, work.weights)
    if policy.query_embedder:
        runner.warn_engine_mismatch(engine, vectors, queries)
    batches = [queries[i : i + profile.eval_batch] for i in range(0, len(queries), profile.eval_batch)]
    parts = [folder / f"part-{number:05}.jsonl" for number in range(len(batches))]
    share = list(zip(parts, batches, strict=True))[ranks.process_index :: ranks.num_processes]
    with clip_cache.open_clips(profile, work.dataset, vectors.video_ids) as clips:
        functions = runner.EpisodeRunner(profile, work.system, engine, policy, vectors, clips)
        run_record = work.run_record(functions.carry)
        cut = _run_parts(functions, run_record, share)
    cut = [cut] if ranks is cache.SINGLE_PROCESS else gather_object([cut])
    if ranks.is_main_process:
        _merge(folder, parts, run_record, {**loading.model_facts(policy.model), "updates_cut": sum(cut)})


def _run_parts(functions, run_record, share):
    """Write the parts that are not there yet; return how many updates in words were cut in them."""
    splitter, cut = batching.OOMSplitter("eval_batch"), 0

    def work(queries):
        before = functions.updates_cut
        episodes = episode.run_episodes(
            queries, functions.search, functions.ask, functions.refine, run_record
        )
        return episodes, functions.updates_cut - before  # without those of a try that ran out of memory

    for part, batch in cache.progress(share, f"{run_record.method} {run_record.dataset}"):
        if not part.exists():
            results = splitter.run(work, batch)
            records.write_episodes(part, run_record, [one for episodes, _ in results for one in episodes])
            cut += sum(number for _, number in results)
    return cut


def _merge(folder, parts, run_record, notes):
    """Write all parts as one file, and beside it what was odd."""
    episodes = [one for part in parts for one in records.read_episodes(part)]
    records.write_episodes(folder / EPISODES, run_record, episodes)
    problems = sorted({one.problem for one in episodes if one.problem is not None})
    cache.write_json(folder / "notes.json", notes | {"problems": problems})
    for part in parts:
        part.unlink()
