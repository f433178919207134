"""Other seeds: both stages trained again on the same corpora and vectors, to tell a result from luck.

runs/<profile>-seed<N>/<dataset>/             what the other seeds left; corpus, videos and vectors are linked
results/<profile>/seeds/<dataset>-<N>.json    what each system got right, query by query, and the commit that did it
results/<profile>/seeds/numbers.json          tables R1 and R2, read by `results.collect` like any other part
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.evaluation import claims
from vsr1.evaluation.claims import CLAIMS, KEPT, VARIANTS
from vsr1.experiments import ablations, refinement, retrieval, two_stage
from vsr1.models import search_index
from vsr1.report import results
from vsr1.report.results import Estimate
from vsr1.training import grpo, sft


def run(profile: Profile, dataset: str, seed: int) -> Path:
    """Train and walk with one seed; its file of hits. What stands is not made again."""
    own = replace(profile, seed=seed)
    walked = {
        name: refinement.episodes(own, dataset, name, like="sqr", weights=str(train(own, dataset)))
        for name, train in {"sft": sft.train, "vsr1": grpo.train}.items()
    }
    down = refinement.episodes(
        own, dataset, "walkdown-ft", like="walkdown", weights=str(sft.train(own, dataset, "ft"))
    )
    walked |= {"walkdown": down, "skip": ablations.skipping(own, dataset)}
    walked["zs-walkdown"] = refinement.episodes(
        profile, dataset, "walkdown"
    )  # greedy: the same for all seeds
    walked |= {name: refinement.sampled(profile, dataset, name) for name in VARIANTS}
    folder = profile.results() / "seeds"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"seed": seed, "profile": profile.digest(), "commit": results.commit()} | claims.tally(walked)
    kept["hits"]["twostage"] = _one_shot(own, dataset)
    path = folder / f"{dataset}-{seed}.json"
    cache.write_json(path, kept)
    return path


def _one_shot(own, dataset):
    """Hits of the two-stage baseline, in the shape of `claims.hits`."""
    folder, home = two_stage.run(own, dataset), own.data_dir(dataset)
    queries = annotations.read_fig(home / "corpus" / "test.jsonl")
    found = retrieval.first_search(queries, search_index.load_vectors(home / "embed" / "engine" / "test"))
    values = two_stage.hits(own, found, two_stage.known_spans(folder, queries))
    return {"ids": [query.id for query in queries]} | {
        name: claims.digits(values[name]) for name in KEPT if name in values
    }


# --- The tables


def summary(profile: Profile) -> Path:
    """R1 and R2 of all seeds that have a file and were run with this profile."""
    kept = {}
    for path in sorted((profile.results() / "seeds").glob("*-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        if one["profile"] == profile.digest():
            one["videos"] = {
                int(key): video for key, video in one["videos"].items()
            }  # json has text keys only
            kept.setdefault(path.stem.rpartition("-")[0], []).append(one)
        else:
            print(f"left out: {path} was run with other knobs; make it again with `make seeds`")
    numbers = {}
    for dataset in (name for name in profile.datasets if name in kept):
        numbers |= claims.compare(profile, f"R1/{dataset}", kept[dataset], note=_note(kept[dataset])) | means(
            profile, dataset, kept[dataset]
        )
    if kept.keys() >= set(profile.datasets):
        numbers |= average(profile, numbers)
    told = {name: results.plain(asdict(number)) for name, number in numbers.items()}
    path = profile.results() / "seeds" / "numbers.json"
    cache.write_json(path, {"profile": profile.digest(), "numbers": told, "series": {}})
    return path


def means(profile: Profile, dataset: str, runs: list[dict]) -> dict[str, Estimate]:
    """R2: the trained systems, mean over seeds."""
    numbers = {}
    for system in ("twostage", "ft", "walkdown", "sft", "vsr1", "skip"):
        ids = runs[0]["hits"][system]["ids"]
        for metric in (name for name in KEPT if name in runs[0]["hits"][system] and name != "vr@1_orig"):
            by_query = [claims.by_query(run["hits"][system], metric) for run in runs]
            values = np.array([[hits[key] for key in ids] for hits in by_query])
            numbers[f"R2/{dataset}/{system}/{metric}"] = claims.mean_over_runs(
                profile, values, ids, runs, note=_note(runs)
            )
    return numbers


def average(profile: Profile, numbers: dict[str, Estimate]) -> dict[str, Estimate]:
    """R1 on the mean of the data sets, each counting the same, where all have the same seeds; no interval."""
    found = {}
    for name in CLAIMS:
        rows = [numbers[f"R1/{dataset}/{name}/points"] for dataset in profile.datasets]
        if len({row.seeds for row in rows}) == 1 and all(row.n for row in rows):
            value, count = float(np.mean([row.value for row in rows])), sum(row.n for row in rows)
            found[f"R1/mean/{name}/points"] = replace(rows[0], value=value, n=count, ci=None)
    return found


def _note(runs):
    return f"committed; made at {', '.join(sorted({one['commit'][:7] for one in runs}))}"
