"""The claims: each says that one system is ahead of another on the same queries.

One list serves README, report, notebook 09 and `make check`. `hits_of_run` reads the episodes of this run, `compare`
pairs them query by query; with several runs, one a seed, it takes their mean.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from vsr1 import config
from vsr1.config import InputError, Profile
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.loop.records import Episode

# Metrics of `metrics.hits` that claims, and committed files of seeds, are computed from.
METRICS = ("vcmr@0.3", "vcmr@0.5", "vcmr@0.7", "ver", "right_last")
METRICS += ("vr@1_orig", "vr@1", "vr@5", "vr@10", "vr@100")
VARIANTS = ("hqr-blind", "hqr-seen", "hqr-reasoned")
NEARLY = 2.0  # points, ours: the paper calls a gain saturated that is smaller than this (F4, F5)


@dataclass(frozen=True)
class Claim:
    """`system` is ahead of `baseline` by a metric, on the queries that both answered.

    group   "paper": the paper says so. "control": a comparison of ours. "construction": it cannot fail here, or not
            the other way; listed with the reason, counted nowhere
    sign    of the paper's difference: 1 ahead, -1 behind, 0 nearly equal
    paper   {data set, or "mean" where the paper names none: points}, from its tables T1 to T3 and figures F4, F5
    why     what a reader must know beside the verdict; of a claim without systems, why it cannot be tested here
    """

    group: Literal["paper", "control", "construction"]
    words: str
    system: str = ""
    baseline: str = ""
    metric: str = "vcmr@0.5"
    baseline_metric: str | None = None  # where it is another one
    first: Literal["any", "failed", "right"] = "any"  # of which queries, by their first search
    sign: int = 1
    paper: dict[str, float] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()  # where it is made; empty: everywhere
    why: str = ""

    @property
    def systems(self) -> set[str]:
        """Return the systems that it compares, none where it cannot be tested here."""
        return {self.system, self.baseline} - {""}


def read_claims(path: Path) -> dict[str, Claim]:
    """Read {name: claim} in the order of the file; InputError names the claim and the key that is wrong."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: config.parse(Claim, row, f"{path.name}: {name}") for name, row in rows.items()}


CLAIMS = read_claims(config.ROOT / "results" / "expected" / "claims.yaml")
FILES = {"walkdown": "walkdown-ft", "zs-walkdown": "walkdown"} | {
    name: name for name in ("sft", "vsr1", "skip", "vsr1-first")
}
FILES |= {name: f"{name}-sample" for name in VARIANTS}  # system: its file of episodes
CHANGED = ("no-ret", "no-verif")  # the final system with other knobs


# --- Hits: what each system got right, in the form that committed files of seeds have


def hits(episodes: list[Episode]) -> dict:
    """Return what one system got right: {"ids": its query ids, metric: a text with a digit 0 or 1 a query}."""
    values = metrics.hits(episodes)
    ids = [episode.desc_id for episode in episodes]
    return {"ids": ids} | {name: digits(values[name]) for name in METRICS}


def digits(values) -> str:
    """Write truth values as a text of digits 0 and 1."""
    return "".join(str(int(value)) for value in values)


def by_query(system_hits: dict, metric: str) -> dict:
    """Return {query id: 0 or 1} of one metric of `hits`."""
    return dict(zip(system_hits["ids"], map(int, system_hits[metric]), strict=True))


def hits_of_run(profile: Profile, dataset: str) -> dict:
    """Return what the systems of this run got right, as `tally` does; those without episodes are left out."""
    paths = {name: profile.runs(dataset) / "episodes" / f"{file}.jsonl" for name, file in FILES.items()}
    for name in CHANGED:
        paths[name] = profile.with_overrides(name).runs(dataset) / "episodes" / f"{name}.jsonl"
    runs = {name: records.read_episodes(path) for name, path in paths.items() if path.exists()}
    return {"seed": profile.seed, **tally(profile, dataset, runs)}


def tally(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict:
    """Return {"families": {query id: its cluster}, "hits": {system: its `hits`}} of all systems and of parts of them.

    Systems are cut to the headline's number of turns.

    ft, zs     the rank fallback of either policy, cut to one turn
    within-k   the final system, cut to k turns
    latents-*  R@1 after the first turn of the final system, with none, half and all of its latents
    """
    parts = {name: metrics.headline(profile, episodes) for name, episodes in runs.items()}
    for single, fallback in {"ft": "walkdown", "zs": "zs-walkdown"}.items():
        if fallback in runs:
            parts[single] = metrics.within(runs[fallback], 1)
    final = runs.get("vsr1", [])
    for turns in range(1, final[0].run.max_turns + 1) if final else ():
        parts[f"within-{turns}"] = metrics.within(final, turns)
    videos = {episode.desc_id: episode.gt_video for episodes in runs.values() for episode in episodes}
    clusters = statistics.clusters(profile, dataset, videos.values())
    all_hits = {name: hits(episodes) for name, episodes in parts.items()} | _latent_hits(final)
    return {"families": dict(zip(videos, clusters, strict=True)), "hits": all_hits}


def _latent_hits(final):
    """Return hits at R@1 after turn 1, with none, half and all latents."""
    depths = {"0": lambda n: 0, "half": lambda n: n // 2, "all": lambda n: n}
    if not any(episode.turns and episode.turns[0].rank_by_depth for episode in final):
        return {}
    return {
        f"latents-{name}": {
            "ids": [episode.desc_id for episode in final],
            "vr@1": digits(metrics.ranks_at_depth(final, depth) == 1),
        }
        for name, depth in depths.items()
    }


def datasets_with_episodes(profile: Profile) -> list[str]:
    """List the data sets of the profile that have episodes. Raises InputError if none has."""
    datasets = [dataset for dataset in profile.datasets if (profile.runs(dataset) / "episodes").exists()]
    if not datasets:
        raise InputError(f"{profile.runs('any').parent}: no data set has episodes; run `make paper` first")
    return datasets


# --- Differences


def compare(profile: Profile, prefix: str, runs: list[dict], note="") -> dict[str, Estimate]:
    """Estimate each claim: {<prefix>/<claim>/<metric>}; of a claim whose system is missing, a value None that names it.

    points      the mean over runs, whose interval draws queries, and runs where there are several
    detectable  the smallest difference that would have been found with 80 % power
    p           two-sided, by the clustered standard error
    lowest, highest   of several runs, without an interval

    prefix  <table>/<data set>
    runs    a dict of `tally` with its "seed" for each run
    """
    numbers, systems = {}, set.intersection(*(set(run["hits"]) for run in runs))
    for name, claim in CLAIMS.items():
        if not claim.systems or (claim.datasets and prefix.split("/")[1] not in claim.datasets):
            continue
        if missing := sorted(claim.systems - systems):
            reason = f"MISSING: no episodes of {', '.join(missing)}"
            numbers[f"{prefix}/{name}/points"] = Estimate(None, unit="points", note=reason)
            continue
        ids, values = gains(claim, runs)
        mean, resamples = mean_over_runs(profile, values, ids, runs, "points", note)
        numbers[f"{prefix}/{name}/points"] = mean
        if not ids:
            continue
        details = {
            "detectable": statistics.detectable(resamples),
            "p": statistics.p_value(mean.value, resamples),
        }
        if len(runs) > 1:
            points = [metrics.percent(row) for row in values]
            details |= {"lowest": min(points), "highest": max(points)}
        for key, value in details.items():
            if value is not None:
                unit = "probability" if key == "p" else "points"
                numbers[f"{prefix}/{name}/{key}"] = Estimate(value, mean.n, None, mean.seeds, unit, note)
    return numbers


def gains(claim: Claim, runs: list[dict]) -> tuple[list, np.ndarray]:
    """Return (ids of the queries that both systems answered in every run, their gains (runs, Q) of -1, 0, 1)."""
    systems, baselines = ([run["hits"][name] for run in runs] for name in (claim.system, claim.baseline))
    shared = set.intersection(*(set(system["ids"]) for system in (*systems, *baselines)))
    ids = [key for key in baselines[0]["ids"] if key in shared]
    if claim.first != "any":
        first_hit = by_query(systems[0], "vr@1_orig")
        ids = [key for key in ids if first_hit[key] == (claim.first == "right")]
    values = _values(systems, claim.metric, ids)
    return ids, values - _values(baselines, claim.baseline_metric or claim.metric, ids)


def _values(systems, metric, ids):
    """Return (runs, Q) of 0 and 1: one metric of one system in each run."""
    values = [by_query(system, metric) for system in systems]
    return np.array([[value[key] for key in ids] for value in values])


def mean_over_runs(profile, values, ids, runs, unit="%", note="") -> tuple[Estimate, np.ndarray | None]:
    """Estimate the mean over runs of `percent` of each row of `values` (runs, Q); also return its resamples.

    Missing, and None, without queries. The interval is that of `statistics.bootstrap`.
    """
    seeds = tuple(run["seed"] for run in runs)
    if not ids:
        return Estimate(None, 0, seeds=seeds, unit=unit, note=note), None
    resamples = statistics.bootstrap(values, [runs[0]["families"][key] for key in ids], profile)
    value = float(np.mean([metrics.percent(row) for row in values]))
    return Estimate(value, len(ids), statistics.interval(resamples), seeds, unit, note), resamples
