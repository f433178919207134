"""The paper's claims: each says that one system is ahead of another on the same queries.

`hits_of_run` reads the episodes of this run, `compare` pairs them query by query; with several runs, one a seed, it
takes their mean.
"""

from dataclasses import dataclass

import numpy as np

from vsr1.config import InputError, Profile
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.loop.records import Episode

KEPT = ("vcmr@0.3", "vcmr@0.5", "vcmr@0.7", "ver", "vr@1_orig", "vr@1", "vr@5", "vr@10", "vr@100")
VARIANTS = ("hqr-blind", "hqr-seen", "hqr-reasoned")


@dataclass(frozen=True)
class Claim:
    """`system` is ahead of `baseline` by a metric, on the queries that both answered."""

    system: str
    baseline: str
    metric: str
    baseline_metric: str | None = None  # where it is another one
    failed_only: bool = False  # only queries whose first search failed


CLAIMS = {
    "refined": Claim("vsr1", "vsr1", "vr@1", "vr@1_orig"),
    **{f"sqr-{name}": Claim("vsr1", name, "vr@1", failed_only=True) for name in VARIANTS},
    **{f"vsr1-{name}": Claim("vsr1", name, "vcmr@0.5") for name in ("zs", "zs-walkdown", "ft", "walkdown")},
    "grpo-vcmr": Claim("vsr1", "sft", "vcmr@0.5"),
    "grpo-ver": Claim("vsr1", "sft", "ver"),
    "turn-2": Claim("within-2", "within-1", "vcmr@0.5"),
    "turn-3": Claim("within-3", "within-2", "vcmr@0.5"),
    "skip-zs-walkdown": Claim("skip", "zs-walkdown", "vcmr@0.5"),  # the rank fallback never repeats either
    "skip-walkdown": Claim("skip", "walkdown", "vcmr@0.5"),
    "latents": Claim("latents-all", "latents-0", "vr@1"),
    "latents-half": Claim("latents-half", "latents-0", "vr@1"),
    "latents-rest": Claim("latents-all", "latents-half", "vr@1"),
}
FILES = {"vsr1": "vsr1", "sft": "sft", "walkdown": "walkdown-ft", "zs-walkdown": "walkdown"}
FILES |= {name: f"{name}-sample" for name in VARIANTS}  # system: its file of episodes


# --- Hits: what each system got right, in the form that committed files of seeds have


def hits(episodes: list[Episode]) -> dict:
    """Return what one system got right: {"ids": its query ids, metric: a text with a digit 0 or 1 a query}."""
    values = metrics.hits(episodes)
    return {"ids": [episode.desc_id for episode in episodes]} | {name: digits(values[name]) for name in KEPT}


def digits(values) -> str:
    """Write truth values as a text of digits 0 and 1."""
    return "".join(str(int(value)) for value in values)


def by_query(system_hits: dict, metric: str) -> dict:
    """Return {query id: 0 or 1} of one metric of `hits`."""
    return dict(zip(system_hits["ids"], map(int, system_hits[metric]), strict=True))


def hits_of_run(profile: Profile, dataset: str) -> dict:
    """Return what the systems of this run got right, as `tally` does; those without episodes are left out."""
    paths = {name: profile.runs(dataset) / "episodes" / f"{file}.jsonl" for name, file in FILES.items()}
    paths["skip"] = profile.with_overrides("skip").runs(dataset) / "episodes" / "vsr1.jsonl"
    runs = {name: records.read_episodes(path) for name, path in paths.items() if path.exists()}
    return {"seed": profile.seed, **tally(runs)}


def tally(runs: dict[str, list[Episode]]) -> dict:
    """Return {"videos": {query id: right video}, "hits": {system: its `hits`}} of all systems and of parts of them.

    ft, zs     the rank fallback of either policy, cut to one turn
    within-k   the final system, cut to k turns
    latents-*  the first refinement of the final system with none, half and all of its latents
    """
    parts = dict(runs)
    for single, fallback in {"ft": "walkdown", "zs": "zs-walkdown"}.items():
        if fallback in runs:
            parts[single] = metrics.within(runs[fallback], 1)
    final = runs.get("vsr1", [])
    for turns in range(1, final[0].run.max_turns + 1) if final else ():
        parts[f"within-{turns}"] = metrics.within(final, turns)
    videos = {episode.desc_id: episode.gt_video for episodes in runs.values() for episode in episodes}
    all_hits = {name: hits(episodes) for name, episodes in parts.items()}
    return {"videos": videos, "hits": all_hits | _latent_hits(final)}


def _latent_hits(episodes):
    """Whether the right video is first with none, half and all latents, of the queries that turn 1 refined."""
    ranks = {episode.desc_id: episode.turns[0].rank_by_depth for episode in episodes if episode.turns}
    ranks = {key: by_depth for key, by_depth in ranks.items() if by_depth}
    if not ranks:
        return {}
    depths = {"0": lambda n: 0, "half": lambda n: n // 2, "all": lambda n: n}
    return {
        f"latents-{name}": {
            "ids": list(ranks),
            "vr@1": digits(by_depth[at(len(by_depth) - 1)] == 1 for by_depth in ranks.values()),
        }
        for name, at in depths.items()
    }


def datasets_with_episodes(profile: Profile) -> list[str]:
    """List the data sets of the profile that have episodes. Raises InputError if none has."""
    found = [dataset for dataset in profile.datasets if (profile.runs(dataset) / "episodes").exists()]
    if not found:
        raise InputError(f"{profile.runs('any').parent}: no data set has episodes; run `make paper` first")
    return found


# --- Differences


def compare(profile: Profile, place: str, runs: list[dict], note="") -> dict[str, Estimate]:
    """Estimate each claim that `runs` can test: {<place>/<claim>/points: the mean over runs}.

    With several runs also `lowest` and `highest`, without an interval.

    place  <table>/<data set>
    runs   a dict of `tally` with its "seed" for each run
    """
    numbers = {}
    for name, claim in CLAIMS.items():
        if {claim.system, claim.baseline} <= runs[0]["hits"].keys():
            ids, values = gains(claim, runs)
            mean = mean_over_runs(profile, values, ids, runs, "points", note)
            numbers[f"{place}/{name}/points"] = mean
            if len(runs) > 1 and ids:
                each = [metrics.percent(row) for row in values]
                for key, value in {"lowest": min(each), "highest": max(each)}.items():
                    numbers[f"{place}/{name}/{key}"] = Estimate(
                        value, mean.n, None, mean.seeds, "points", note
                    )
    return numbers


def gains(claim: Claim, runs: list[dict]) -> tuple[list, np.ndarray]:
    """Return (ids of the queries that both systems answered in every run, their gains (runs, Q) of -1, 0, 1)."""
    systems, baselines = ([run["hits"][name] for run in runs] for name in (claim.system, claim.baseline))
    shared = set.intersection(*(set(system["ids"]) for system in (*systems, *baselines)))
    ids = [key for key in baselines[0]["ids"] if key in shared]
    if claim.failed_only:
        first = by_query(systems[0], "vr@1_orig")
        ids = [key for key in ids if not first[key]]
    after = _values(systems, claim.metric, ids)
    return ids, after - _values(baselines, claim.baseline_metric or claim.metric, ids)


def _values(systems, metric, ids):
    """(runs, Q) of 0 and 1: one metric of one system in each run."""
    values = [by_query(system, metric) for system in systems]
    return np.array([[value[key] for key in ids] for value in values])


def mean_over_runs(profile, values, ids, runs, unit="%", note="") -> Estimate:
    """Estimate the mean over runs of `percent` of each row of `values` (runs, Q); missing without queries.

    The interval is over queries, clustered by right video, of each query's mean over runs.
    """
    seeds = tuple(run["seed"] for run in runs)
    if not ids:
        return Estimate(None, 0, seeds=seeds, unit=unit, note=note)
    videos, rng = [runs[0]["videos"][key] for key in ids], np.random.default_rng(profile.seed)
    ci = statistics.bootstrap(values.mean(axis=0), videos, profile.bootstrap_samples, rng=rng)
    value = float(np.mean([metrics.percent(row) for row in values]))
    return Estimate(value, len(ids), ci, seeds, unit, note)
