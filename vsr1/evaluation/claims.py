"""The claims: each says that one system is ahead of another on the same queries.

One list serves README, report, notebook 09 and `make check`. `hits_of_run` reads the episodes of this run, `compare`
pairs them query by query; with several runs, one a seed, it takes their mean.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vsr1.config import InputError, Profile
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.loop.records import Episode

KEPT = (
    "vcmr@0.3",
    "vcmr@0.5",
    "vcmr@0.7",
    "ver",
    "right_last",
    "vr@1_orig",
    "vr@1",
    "vr@5",
    "vr@10",
    "vr@100",
)
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
        """The systems that it compares, none where it cannot be tested here."""
        return {self.system, self.baseline} - {""}


def _by_dataset(*values):
    return dict(zip(("charades", "didemo", "activitynet"), values, strict=True))


def _claims():
    """Yield (name, claim), the paper's first."""
    ours, moments = "VideoSearch-R1", "VCMR .5"
    yield (
        "refined",
        Claim(
            "paper",
            "VR R@1, refined over first search",
            "vsr1",
            "vsr1",
            "vr@1",
            "vr@1_orig",
            paper=_by_dataset(3.0, 4.2, 6.0),
        ),
    )
    fallback = "the paper's FT may be one look, or the first results in turn; its number stands beside both"
    for name, words, vcmr, ver, why in (
        ("zs", "ZS", (6.2, 19.6, 12.2), (45.7, 11.8, 20.3), ""),
        ("ft", "FT, one look", (3.0, 8.1, 3.1), (1.0, 1.5, 0.2), fallback),
        ("walkdown", "FT with rank fallback", (3.0, 8.1, 3.1), (1.0, 1.5, 0.2), fallback),
    ):
        yield (
            f"vsr1-{name}",
            Claim(
                "paper", f"{moments}, {ours} over {words}", "vsr1", name, paper=_by_dataset(*vcmr), why=why
            ),
        )
        yield (
            f"ver-{name}",
            Claim(
                "paper", f"VER, {ours} over {words}", "vsr1", name, "ver", paper=_by_dataset(*ver), why=why
            ),
        )
    second = "the paper's value is second-hand"
    for name, words, metric, points in (
        ("grpo-vcmr", moments, "vcmr@0.5", 11.5),
        ("grpo-ver", "VER", "ver", 8.6),
        ("grpo-vr", "VR R@1", "vr@1", 1.6),
    ):
        yield (
            name,
            Claim(
                "paper",
                f"{words}, stage 2 over stage 1",
                "vsr1",
                "sft",
                metric,
                paper={"didemo": points},
                why=second,
            ),
        )
    for reward, words, vcmr, ver in (
        ("no-ret", "retrieval", 12.9, 9.6),
        ("no-verif", "verification", 12.9, -0.4),
    ):
        for name, label, metric, points in (("vcmr", moments, "vcmr@0.5", vcmr), ("ver", "VER", "ver", ver)):
            yield (
                f"{reward}-{name}",
                Claim(
                    "paper",
                    f"{label}, all rewards over none for {words}",
                    "vsr1",
                    reward,
                    metric,
                    sign=0 if abs(points) < NEARLY else 1,
                    paper={"didemo": points},
                    datasets=("didemo",),
                    why=second,
                ),
            )
    prompted = (
        "HQR is the prompted base model here; the paper's way is not known, and its value is second-hand"
    )
    for name in VARIANTS:
        yield (
            f"sqr-{name}",
            Claim(
                "paper",
                f"R@1 on first-search failures, SQR over {name.replace('hqr-', 'HQR ')}",
                "vsr1",
                name,
                "vr@1",
                first="failed",
                paper={"mean": 3.5},
                why=prompted,
            ),
        )
    figure = "read off a figure that names no data set"
    yield (
        "turn-2",
        Claim(
            "paper", f"{moments}, two turns over one", "within-2", "within-1", paper={"mean": 3.1}, why=figure
        ),
    )
    yield (
        "turn-3",
        Claim(
            "paper",
            f"{moments}, three turns nearly equal two",
            "within-3",
            "within-2",
            sign=0,
            paper={"mean": 0.1},
            why=figure,
        ),
    )
    for name, words, system, baseline, sign, points in (
        ("latents", "all soft tokens over none", "all", "0", 1, 11.7),
        ("latents-half", "half of the soft tokens over none", "half", "0", 1, 11.1),
        ("latents-rest", "all soft tokens nearly equal half", "all", "half", 0, 0.6),
    ):
        yield (
            name,
            Claim(
                "paper",
                f"R@1 after turn 1, {words}",
                f"latents-{system}",
                f"latents-{baseline}",
                "vr@1",
                sign=sign,
                paper={"mean": points},
                why=figure,
            ),
        )
    yield (
        "earlier",
        Claim(
            "paper",
            f"{moments}, {ours} over SQuiDNet",
            paper=_by_dataset(10.8, 27.3, 17.6),
            why="its features of real video are not rendered; the paper's row is copied into T1",
        ),
    )
    yield (
        "engine-8b",
        Claim(
            "paper", "SQR over HQR with the 8B engine (A2)", why="soft tokens would have to be trained for it"
        ),
    )
    yield (
        "refiner-8b",
        Claim("paper", "HQR by an 8B policy over a 2B one (C1)", why="there is no second policy"),
    )

    for name, words in {"zs-walkdown": "ZS", "walkdown": "FT"}.items():
        if name == "zs-walkdown":
            yield (
                f"vsr1-{name}",
                Claim("control", f"{moments}, {ours} over {words} with rank fallback", "vsr1", name),
            )
        yield (
            f"skip-{name}",
            Claim(
                "control",
                f"{moments}, {ours} that shows no video twice over {words} with rank fallback",
                "skip",
                name,
            ),
        )
    yield (
        "right-walkdown",
        Claim(
            "control",
            f"right video shown last, {ours} over FT with rank fallback",
            "vsr1",
            "walkdown",
            "right_last",
        ),
    )
    halves = "it has one sign by its definition; together with its counterpart it makes the claim on R@1"
    yield (
        "repaired",
        Claim(
            "construction",
            "R@1 after refinement of queries whose first search failed (repaired)",
            "vsr1",
            "vsr1",
            "vr@1",
            "vr@1_orig",
            first="failed",
            why=halves,
        ),
    )
    yield (
        "harmed",
        Claim(
            "construction",
            "the same of those whose first search was right (first hits lost to refinement)",
            "vsr1",
            "vsr1",
            "vr@1",
            "vr@1_orig",
            first="right",
            why=halves,
        ),
    )
    yield (
        "tokens",
        Claim(
            "construction",
            "tokens a refinement, SQR under the shortest HQR",
            metric="tokens",
            paper={"mean": -18.8},
            why="how many soft tokens there are is a knob, and how long a rewrite is follows what HQR was taught",
        ),
    )


CLAIMS = dict(_claims())
FILES = {"vsr1": "vsr1", "sft": "sft", "walkdown": "walkdown-ft", "zs-walkdown": "walkdown"}
FILES |= {name: f"{name}-sample" for name in VARIANTS}  # system: its file of episodes
CHANGED = {"skip": "vsr1", "no-ret": "no-ret", "no-verif": "no-verif"}  # the same of runs with other knobs


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
    for name, file in CHANGED.items():
        paths[name] = profile.with_overrides(name).runs(dataset) / "episodes" / f"{file}.jsonl"
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
    """Whether the right video is first after turn 1, with none, half and all latents."""
    depths = {"0": lambda n: 0, "half": lambda n: n // 2, "all": lambda n: n}
    if not any(episode.turns and episode.turns[0].rank_by_depth for episode in final):
        return {}
    return {
        f"latents-{name}": {
            "ids": [episode.desc_id for episode in final],
            "vr@1": digits(rank == 1 for rank in metrics.ranks_at_depth(final, at)),
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
    """Estimate each claim: {<place>/<claim>/<metric>}; of a claim whose system is missing, a value None that names it.

    points      the mean over runs, whose interval draws queries, and runs where there are several
    detectable  the smallest difference that would have been found with 80 % power
    p           two-sided, by the clustered standard error
    lowest, highest   of several runs, without an interval

    place  <table>/<data set>
    runs   a dict of `tally` with its "seed" for each run
    """
    numbers, there = {}, set.intersection(*(set(run["hits"]) for run in runs))
    for name, claim in CLAIMS.items():
        if not claim.systems or (claim.datasets and place.split("/")[1] not in claim.datasets):
            continue
        if gone := sorted(claim.systems - there):
            lost = Estimate(None, unit="points", note=f"MISSING: no episodes of {', '.join(gone)}")
            numbers[f"{place}/{name}/points"] = lost
            continue
        ids, values = gains(claim, runs)
        mean, resamples = mean_over_runs(profile, values, ids, runs, "points", note)
        numbers[f"{place}/{name}/points"] = mean
        if not ids:
            continue
        found = {
            "detectable": statistics.detectable(resamples),
            "p": statistics.p_value(mean.value, resamples),
        }
        if len(runs) > 1:
            each = [metrics.percent(row) for row in values]
            found |= {"lowest": min(each), "highest": max(each)}
        for key, value in found.items():
            if value is not None:
                unit = "probability" if key == "p" else "points"
                numbers[f"{place}/{name}/{key}"] = Estimate(value, mean.n, None, mean.seeds, unit, note)
    return numbers


def gains(claim: Claim, runs: list[dict]) -> tuple[list, np.ndarray]:
    """Return (ids of the queries that both systems answered in every run, their gains (runs, Q) of -1, 0, 1)."""
    systems, baselines = ([run["hits"][name] for run in runs] for name in (claim.system, claim.baseline))
    shared = set.intersection(*(set(system["ids"]) for system in (*systems, *baselines)))
    ids = [key for key in baselines[0]["ids"] if key in shared]
    if claim.first != "any":
        first = by_query(systems[0], "vr@1_orig")
        ids = [key for key in ids if first[key] == (claim.first == "right")]
    after = _values(systems, claim.metric, ids)
    return ids, after - _values(baselines, claim.baseline_metric or claim.metric, ids)


def _values(systems, metric, ids):
    """(runs, Q) of 0 and 1: one metric of one system in each run."""
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
