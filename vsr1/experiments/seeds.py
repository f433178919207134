"""Train both stages again with other seeds, on the same corpora and vectors, to tell a result from luck.

results/<profile>/seeds/<dataset>-<N>.json        what each system got right, query by query, and the commit that did it
results/<profile>/seeds/looks/<dataset>-<N>.json  the same of the systems that `make premise` adds, by videos looked at
results/<profile>/seeds/numbers.json              tables R1, R2 and R4, read by `results.collect` like any other part
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.evaluation import claims, metrics
from vsr1.evaluation.claims import CLAIMS, METRICS, VARIANTS
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common, premise, retrieval, two_stage
from vsr1.loop.records import Episode
from vsr1.models import embedding, search_index
from vsr1.report import provenance, results

# The loop, the one that shows no video twice, and that one with soft tokens before the first search.
LOOPS = ("vsr1", "skip", "vsr1-first")
CONTROLS = (*LOOPS, "vsr1-all")  # and the one that keeps all soft tokens
# With and without a loop, at equal numbers of videos (R4). `make premise` adds all others of P1.
LOOKED = (*LOOPS, "walkdown-ft", "vsr1-walkdown", "adapter-soft-ft", "adapter-soft-vsr1")
MORE_LOOKED = tuple(name for name in premise.MORE_SYSTEMS if name not in LOOKED)


def run(profile: Profile, dataset: str, seed: int) -> Path:
    """Train and run all systems with one seed unless that is current, and write its file of hits."""
    seeded = replace(profile, seed=seed)
    runs = {name: common.run_episodes(seeded, dataset, name, whole=True) for name in ("sft", "vsr1")}
    runs["walkdown"] = common.run_episodes(seeded, dataset, "walkdown-ft")
    runs |= {name: common.run_episodes(seeded, dataset, name) for name in ("skip", "vsr1-first")}
    runs["zs-walkdown"] = common.run_episodes(profile, dataset, "walkdown")  # greedy: the same for all seeds
    runs |= {name: common.run_sample(profile, dataset, name) for name in VARIANTS}
    record = {"seed": seed, "profile": profile.digest(), "commit": provenance.commit()}
    record |= claims.tally(profile, dataset, runs)
    record["hits"]["twostage"] = _two_stage_hits(seeded, dataset)
    record["looks"] = {
        name: look_hits(common.run_episodes(seeded, dataset, name, whole=True)) for name in LOOKED
    }
    path = profile.results() / "seeds" / f"{dataset}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write_json(path, record)
    return path


def run_more(profile: Profile, dataset: str, seed: int) -> Iterator[str]:
    """Do the same with the systems that `make premise` adds; yield the name of each when its hits are in their file."""
    seeded = replace(profile, seed=seed)
    for name in MORE_LOOKED:
        episodes = common.run_episodes(seeded, dataset, name, whole=True)
        _add_looks(profile, dataset, seed, {name: look_hits(episodes)})
        yield name
    looks = {}
    for name, (episodes, hits) in premise.reranked(seeded, dataset).items():
        ids = [episode.desc_id for episode in episodes]
        looks[name] = {"ids": ids, f"vcmr@0.5_t{profile.max_turns}": claims.digits(hits)}
    _add_looks(profile, dataset, seed, looks)
    yield "rerank"


def _add_looks(profile, dataset, seed, looks):
    """Add to the hits of a seed by looks; what other knobs or another commit gave goes."""
    path = profile.results() / "seeds" / "looks" / f"{dataset}-{seed}.json"
    record = {"seed": seed, "profile": profile.digest(), "commit": provenance.commit()}
    with cache.updated_json(path) as content:
        current = {name: content.get(name) for name in record} == record
        looks = content.get("looks", {}) | looks if current else looks
        content.clear()
        content |= record | {"looks": looks}


def _two_stage_hits(profile, dataset):
    """Return the hits of the two-stage baseline, in the form of `claims.hits`."""
    folder = two_stage.run(profile, dataset)
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, dataset, "test"))
    first = retrieval.first_search(queries, vectors)
    values = two_stage.hits(profile, first, two_stage.oracle_spans(folder, queries))
    digits = {name: claims.digits(values[name]) for name in METRICS if name in values}
    return {"ids": [query.id for query in queries]} | digits


def look_hits(episodes: list[Episode]) -> dict:
    """Return what one system gets right by the number of videos that it may look at, in the form of `claims.hits`."""
    hits = {"ids": [episode.desc_id for episode in episodes]}
    for looks in range(1, episodes[0].run.max_turns + 1):
        within = metrics.within(episodes, looks)
        hits[f"vcmr@0.5_t{looks}"] = claims.digits(metrics.vcmr_hits(within, 0.5))
    return hits


# --- The tables


def summarize(profile: Profile) -> Path:
    """Write R1, R2 and R4 of all seeds that have a file and were run with this profile.

    Several processes may do so at once: the last one to write has read all files.
    """
    path = profile.results() / "seeds" / "numbers.json"
    with cache.updated_json(path) as part:
        runs = read_runs(profile)
        numbers = {}
        for dataset in (name for name in profile.datasets if name in runs):
            note = _note(run["commit"] for run in runs[dataset])
            numbers |= claims.compare(profile, f"R1/{dataset}", runs[dataset], note=note)
            numbers |= mean_numbers(profile, dataset, runs[dataset])
            numbers |= look_numbers(profile, dataset, runs[dataset])
        if runs.keys() >= set(profile.datasets):
            numbers |= mean_of_datasets(profile, numbers)
        plain = {name: results.plain(asdict(number)) for name, number in numbers.items()}
        part |= {"profile": profile.digest(), "numbers": plain, "series": {}}
    return path


def read_runs(profile: Profile) -> dict[str, list[dict]]:
    """Read {data set: what each seed got right}; files of other knobs are named and left out."""
    runs, folder = {}, profile.results() / "seeds"
    more = _current(profile, folder / "looks", "premise")
    for path, run in _current(profile, folder, "seeds").items():
        run["families"] = {int(key): name for key, name in run["families"].items()}  # json has text keys
        added = more.get(folder / "looks" / path.name, {"looks": {}, "commit": None})
        run["look_commits"] = dict.fromkeys(run["looks"], run["commit"])
        run["look_commits"] |= dict.fromkeys(added["looks"], added["commit"])
        run["looks"] |= added["looks"]
        runs.setdefault(path.stem.rpartition("-")[0], []).append(run)
    return runs


def _current(profile, folder, command):
    """Return {path: content} of the files that were run with these knobs."""
    files = {}
    for path in sorted(folder.glob("*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["profile"] == profile.digest():
            files[path] = run
        else:
            print(f"left out: {path} was run with other knobs; make it again with `make {command}`")
    return files


def mean_numbers(profile: Profile, dataset: str, runs: list[dict]) -> dict[str, Estimate]:
    """Measure the trained systems, mean over seeds (R2)."""
    numbers = {}
    for system in ("twostage", "ft", "walkdown", "sft", "vsr1", "skip", "vsr1-first"):
        ids = runs[0]["hits"][system]["ids"]
        for metric in (name for name in METRICS if name in runs[0]["hits"][system] and name != "vr@1_orig"):
            values = _values([run["hits"][system] for run in runs], metric, ids)
            mean, _ = claims.mean_over_runs(
                profile, values, ids, runs, note=_note(run["commit"] for run in runs)
            )
            numbers[f"R2/{dataset}/{system}/{metric}"] = mean
    return numbers


def _values(hits, metric, ids):
    """Return what a system got right in each of the runs, (runs, Q), queries in the order of `ids`."""
    by_query = [claims.by_query(run_hits, metric) for run_hits in hits]
    return np.array([[run_hits[key] for key in ids] for run_hits in by_query])


def look_numbers(profile: Profile, dataset: str, runs: list[dict]) -> dict[str, Estimate]:
    """Measure VCMR at IoU 0.5 by the number of videos that a system may look at, mean over seeds (R4).

    over-<control>  with all of them less that of each of CONTROLS, paired by seed and query; of `vsr1` also the lowest
                    and the highest seed
    """
    numbers, ids = {}, runs[0]["looks"]["vsr1"]["ids"]
    for name in dict.fromkeys(name for run in runs for name in run["looks"]):
        looked = [run for run in runs if name in run["looks"]]  # `make premise` may not have come to all
        columns = [metric for metric in looked[0]["looks"][name] if metric != "ids"]
        note = _note(run["look_commits"][name] for run in looked)
        for metric in columns:
            values = _values([run["looks"][name] for run in looked], metric, ids)
            mean, _ = claims.mean_over_runs(profile, values, ids, looked, note=note)
            numbers[f"R4/{dataset}/{name}/{metric}"] = mean
        for control in CONTROLS:
            if control == name or any(control not in run["looks"] for run in looked):
                continue
            less = _values([run["looks"][control] for run in looked], columns[-1], ids)
            numbers |= _gains(
                profile, f"R4/{dataset}/{name}/over-{control}", values - less, ids, looked, note
            )
    return numbers


def _gains(profile, name, gains, ids, runs, note):
    """Estimate the mean over runs of paired gains (runs, Q) and, of those over the loop, name the extreme seeds."""
    mean, _ = claims.mean_over_runs(profile, gains, ids, runs, "points", note)
    numbers = {name: mean}
    if name.endswith("over-vsr1") and len(runs) > 1:
        by_seed = [metrics.percent(seed_gains) for seed_gains in gains]
        for key, value in {"lowest": min(by_seed), "highest": max(by_seed)}.items():
            numbers[f"{name}_{key}"] = replace(mean, value=value, ci=None)
    return numbers


def mean_of_datasets(profile: Profile, numbers: dict[str, Estimate]) -> dict[str, Estimate]:
    """Average R1 over the data sets, each counting the same, where all have the same seeds; no interval."""
    means = {}
    for name in CLAIMS:
        rows = [numbers.get(f"R1/{dataset}/{name}/points", Estimate(None)) for dataset in profile.datasets]
        if len({row.seeds for row in rows}) == 1 and all(row.n for row in rows):
            value, count = float(np.mean([row.value for row in rows])), sum(row.n for row in rows)
            means[f"R1/mean/{name}/points"] = replace(rows[0], value=value, n=count, ci=None)
    return means


def _note(commits):
    return f"committed; made at {', '.join(sorted({commit[:7] for commit in commits}))}"
