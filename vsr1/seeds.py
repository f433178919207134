"""Other seeds: both stages trained again on the same corpora and vectors, to tell a result from luck.

runs/<profile>-seed<N>/<dataset>/             what the other seeds left; corpus, videos and vectors are linked
results/<profile>/seeds/<dataset>-<N>.json    what each system got right, query by query, and the commit that did it
results/<profile>/seeds/numbers.json          tables R1 and R2, read by `results.collect` like any other part
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vsr1 import grpo, metrics, results, sft, stages, study
from vsr1.params import Profile
from vsr1.results import Number

KEPT = ("vcmr@0.3", "vcmr@0.5", "vcmr@0.7", "ver", "vr@1_orig", "vr@1", "vr@5", "vr@10", "vr@100")
VARIANTS = ("hqr-blind", "hqr-seen", "hqr-reasoned")


@dataclass(frozen=True)
class Claim:
    """One system ahead of another by a metric, on the queries that both were asked."""

    ours: str
    theirs: str
    metric: str
    from_: str | None = None  # of theirs, where it is another one
    failed: bool = False  # only queries whose first search failed


CLAIMS = {
    "refined": Claim("vsr1", "vsr1", "vr@1", "vr@1_orig"),
    **{f"sqr-{name}": Claim("vsr1", name, "vr@1", failed=True) for name in VARIANTS},
    **{f"vsr1-{name}": Claim("vsr1", name, "vcmr@0.5") for name in ("zs", "zs-walkdown", "ft", "walkdown")},
    "grpo-vcmr": Claim("vsr1", "sft", "vcmr@0.5"),
    "grpo-ver": Claim("vsr1", "sft", "ver"),
}


def run(profile: Profile, dataset: str, seed: int) -> Path:
    """Train and walk with one seed; its file of hits. What stands is not made again."""
    own = of_seed(profile, dataset, seed)
    walked = {
        name: study.episodes(own, dataset, name, like="sqr", weights=str(train(own, dataset)))
        for name, train in {"sft": sft.train, "vsr1": grpo.train}.items()
    }
    down = study.episodes(
        own, dataset, "walkdown-ft", like="walkdown", weights=str(sft.train(own, dataset, "ft"))
    )
    walked |= {"ft": metrics.within(down, 1), "walkdown": down}
    base = study.episodes(profile, dataset, "walkdown")  # untrained and greedy: the same for all seeds
    walked |= {"zs": metrics.within(base, 1), "zs-walkdown": base}
    walked |= {name: study.sampled(profile, dataset, name) for name in VARIANTS}
    folder = profile.results() / "seeds"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"seed": seed, "profile": profile.digest(), "commit": results.commit()}
    kept["videos"] = {one.desc_id: one.gt_video for one in walked["sft"]}
    kept["hits"] = {name: _hits(some) for name, some in walked.items()}
    path = folder / f"{dataset}-{seed}.json"
    stages.write_json(path, kept)
    return path


def of_seed(profile: Profile, dataset: str, seed: int) -> Profile:
    """The profile of another seed, with what no seed changes linked from the first."""
    if seed == profile.seed:
        return profile
    own = replace(profile, name=f"{profile.name}-seed{seed}", seed=seed)
    for part in ("corpus", "videos", "embed"):
        link = own.runs(dataset) / part
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((profile.runs(dataset) / part).resolve())
    return own


def _hits(walked):
    """{query id: {metric: 0 or 1}} as columns: the ids, and a text of digits a metric."""
    found = metrics.hits(walked)
    columns = {name: "".join(str(int(value)) for value in found[name]) for name in KEPT}
    return {"ids": [one.desc_id for one in walked]} | columns


# --- The tables


def summary(profile: Profile) -> Path:
    """R1 and R2 of all seeds that have a file and were run with this profile."""
    kept = {}
    for path in sorted((profile.results() / "seeds").glob("*-*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        if one["profile"] == profile.digest():
            kept.setdefault(path.stem.rpartition("-")[0], []).append(one)
        else:
            print(f"left out: {path} was run with other knobs; make it again with `make seeds`")
    numbers = {}
    for dataset in (name for name in profile.datasets if name in kept):
        numbers |= compare(profile, dataset, kept[dataset]) | means(profile, dataset, kept[dataset])
    if kept.keys() >= set(profile.datasets):
        numbers |= average(profile, numbers)
    told = {name: results.plain(asdict(number)) for name, number in numbers.items()}
    path = profile.results() / "seeds" / "numbers.json"
    stages.write_json(path, {"profile": profile.digest(), "numbers": told, "series": {}})
    return path


def compare(profile: Profile, dataset: str, runs: list[dict]) -> dict[str, Number]:
    """R1: each claim in points, mean over seeds with its interval over queries, and the lowest and highest seed."""
    numbers = {}
    for name, claim in CLAIMS.items():
        ours, theirs = ([one["hits"][system] for one in runs] for system in (claim.ours, claim.theirs))
        ids = [key for key in theirs[0]["ids"] if key in set(ours[0]["ids"])]
        if claim.failed:
            first = _column(ours[0], "vr@1_orig")
            ids = [key for key in ids if not first[key]]
        sides = ((ours, claim.metric), (theirs, claim.from_ or claim.metric))
        mine, other = (np.array([[_column(one, m)[key] for key in ids] for one in side]) for side, m in sides)
        numbers |= _numbers(
            profile, f"R1/{dataset}/{name}", mine - other, ids, runs, ("points", "lowest", "highest")
        )
    return numbers


def means(profile: Profile, dataset: str, runs: list[dict]) -> dict[str, Number]:
    """R2: the trained systems, mean over seeds."""
    numbers = {}
    for system in ("ft", "walkdown", "sft", "vsr1"):
        ids = runs[0]["hits"][system]["ids"]
        for metric in (name for name in KEPT if name != "vr@1_orig"):
            values = np.array([[_column(one["hits"][system], metric)[key] for key in ids] for one in runs])
            numbers |= _numbers(profile, f"R2/{dataset}/{system}", values, ids, runs, (metric,))
    return numbers


def average(profile: Profile, numbers: dict[str, Number]) -> dict[str, Number]:
    """R1 on the mean of the data sets, each counting the same, where all have the same seeds; no interval."""
    found = {}
    for name in CLAIMS:
        rows = [numbers[f"R1/{dataset}/{name}/points"] for dataset in profile.datasets]
        if len({row.seeds for row in rows}) == 1:
            value, count = float(np.mean([row.value for row in rows])), sum(row.n for row in rows)
            found[f"R1/mean/{name}/points"] = replace(rows[0], value=value, n=count, ci=None)
    return found


def _column(hits, metric):
    """{query id: 0 or 1}."""
    return dict(zip(hits["ids"], map(int, hits[metric]), strict=True))


def _numbers(profile, name, values, ids, runs, keys):
    """A `Number` for each key: of values (seeds, Q) the mean with its interval, then the lowest and highest seed."""
    seeds, rng = tuple(one["seed"] for one in runs), np.random.default_rng(profile.seed)
    note = f"committed; trained at {', '.join(sorted({one['commit'][:7] for one in runs}))}"
    each = [metrics.percent(row) for row in values]
    videos = [runs[0]["videos"][str(key)] for key in ids]
    ci = metrics.bootstrap(values.mean(axis=0), videos, profile.bootstrap, rng=rng)
    unit = "points" if len(keys) > 1 else "%"
    found = [(float(np.mean(each)), ci), (min(each), None), (max(each), None)]
    return {
        f"{name}/{key}": Number(value, len(ids), ci, seeds, unit, note)
        for key, (value, ci) in zip(keys, found, strict=False)
    }
