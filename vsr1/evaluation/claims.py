"""What the paper claims, as one system ahead of another on the same queries; and whether it holds here.

R3  this run: `of_run` reads its episodes, `compare` pairs them query by query
R1  several seeds: `seeds` keeps what each got right (`tally`, as in R3), `compare` takes the mean
"""

from dataclasses import dataclass

import numpy as np

from vsr1.config import InputError, Profile
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.report import results
from vsr1.report.results import digits

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
    "turn-2": Claim("within-2", "within-1", "vcmr@0.5"),
    "turn-3": Claim("within-3", "within-2", "vcmr@0.5"),
    "skip-zs-walkdown": Claim("skip", "zs-walkdown", "vcmr@0.5"),  # walking down shows no video twice either
    "skip-walkdown": Claim("skip", "walkdown", "vcmr@0.5"),
    "latents": Claim("latents-all", "latents-0", "vr@1"),
    "latents-half": Claim("latents-half", "latents-0", "vr@1"),
    "latents-rest": Claim("latents-all", "latents-half", "vr@1"),
}
FILES = {"vsr1": "vsr1", "sft": "sft", "walkdown": "walkdown-ft", "zs-walkdown": "walkdown"}
FILES |= {name: f"{name}-sample" for name in VARIANTS}  # system: its file of episodes


def hits(walked: list[Episode]) -> dict:
    """What one system got right: the ids of its queries, and a text of digits 0 and 1 a metric."""
    found = metrics.hits(walked)
    columns = {name: bits(found[name]) for name in KEPT}
    return {"ids": [one.desc_id for one in walked]} | columns


def bits(values) -> str:
    """A digit 0 or 1 a value."""
    return "".join(str(int(value)) for value in values)


def column(found: dict, metric: str) -> dict:
    """{query id: 0 or 1} of one metric of `hits`."""
    return dict(zip(found["ids"], map(int, found[metric]), strict=True))


def of_run(profile: Profile, dataset: str) -> dict:
    """What this run got right, in the shape of a file of `seeds`; without the systems that have no episodes."""
    paths = {name: profile.runs(dataset) / "episodes" / f"{file}.jsonl" for name, file in FILES.items()}
    paths["skip"] = profile.with_overrides("skip").runs(dataset) / "episodes" / "vsr1.jsonl"
    walked = {name: records.read_episodes(path) for name, path in paths.items() if path.exists()}
    return {"seed": profile.seed, **tally(walked)}


def tally(walked: dict[str, list[Episode]]) -> dict:
    """{"videos": the right one of each query, "hits": {system: its hits}}: of all that was walked, and of parts of it:
    one look of those who walk down, the first looks of a search, and its first refinement with fewer latents."""
    parts = dict(walked)
    for one_look, longer in {"ft": "walkdown", "zs": "zs-walkdown"}.items():
        if longer in walked:
            parts[one_look] = metrics.within(walked[longer], 1)
    final = walked.get("vsr1", [])
    for turns in range(1, final[0].run.max_turns + 1) if final else ():
        parts[f"within-{turns}"] = metrics.within(final, turns)
    videos = {one.desc_id: one.gt_video for some in walked.values() for one in some}
    return {"videos": videos, "hits": {name: hits(some) for name, some in parts.items()} | _latents(final)}


def _latents(walked):
    """Whether the right video is first with none, half and all of a refinement's latents, where turn 1 made some."""
    ranks = {one.desc_id: one.turns[0].rank_by_depth for one in walked if one.turns}
    ranks = {key: by_depth for key, by_depth in ranks.items() if by_depth}
    depths = {"0": lambda n: 0, "half": lambda n: n // 2, "all": lambda n: n}
    return {
        f"latents-{name}": {
            "ids": list(ranks),
            "vr@1": bits(r[at(len(r) - 1)] == 1 for r in ranks.values()),
        }
        for name, at in depths.items()
        if ranks
    }


def places(profile: Profile) -> list[str]:
    """The data sets that have episodes; none is an error."""
    found = [dataset for dataset in profile.datasets if (profile.runs(dataset) / "episodes").exists()]
    if not found:
        raise InputError(f"{profile.runs('any').parent}: no data set has episodes; run `make paper` first")
    return found


# --- Differences


def compare(profile: Profile, place: str, runs: list[dict], note="") -> dict[str, Estimate]:
    """{`place`/<claim>/points: Number}: the mean over runs, its interval over queries; with several, the range.

    place   <table>/<data set>
    """
    numbers = {}
    for name, claim in CLAIMS.items():
        if {claim.ours, claim.theirs} <= runs[0]["hits"].keys():
            ids, values = gained(claim, runs)
            keys = ("points", "lowest", "highest")[: 3 if len(runs) > 1 else 1]
            numbers |= spread(profile, f"{place}/{name}", values, ids, runs, keys, note)
    return numbers


def gained(claim: Claim, runs: list[dict]) -> tuple[list, np.ndarray]:
    """(ids of the queries that both were asked in every run, what each gained in each: (runs, Q) of -1, 0, 1)."""
    ours, theirs = ([one["hits"][system] for one in runs] for system in (claim.ours, claim.theirs))
    asked = set.intersection(*(set(one["ids"]) for one in (*ours, *theirs)))
    ids = [key for key in theirs[0]["ids"] if key in asked]
    if claim.failed:
        first = column(ours[0], "vr@1_orig")
        ids = [key for key in ids if not first[key]]
    sides = ((ours, claim.metric), (theirs, claim.from_ or claim.metric))
    mine, other = (
        np.array([[found[key] for key in ids] for found in (column(one, metric) for one in side)])
        for side, metric in sides
    )
    return ids, mine - other


def spread(profile, name, values, ids, runs, keys, note="") -> dict[str, Estimate]:
    """A `Number` for each key: of values (runs, Q) the mean with its interval, then the lowest and highest run."""
    seeds, unit = tuple(one["seed"] for one in runs), "%" if keys[0] != "points" else "points"
    if not ids:
        return {f"{name}/{keys[0]}": Estimate(None, 0, seeds=seeds, unit=unit, note=note)}
    rng = np.random.default_rng(profile.seed)
    each = [metrics.percent(row) for row in values]
    videos = [runs[0]["videos"][key] for key in ids]
    ci = statistics.bootstrap(values.mean(axis=0), videos, profile.bootstrap_samples, rng=rng)
    found = [(float(np.mean(each)), ci), (min(each), None), (max(each), None)]
    return {
        f"{name}/{key}": Estimate(value, len(ids), ci, seeds, unit, note)
        for key, (value, ci) in zip(keys, found, strict=False)
    }


def record(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """R3 of one data set, recorded as the part of notebook 09."""
    numbers = compare(profile, f"R3/{dataset}", [of_run(profile, dataset)])
    results.record(profile, dataset, "09_paper", numbers)
    return numbers


# --- Verdicts


@dataclass(frozen=True)
class Judged:
    """A claim on one data set, in words."""

    name: str
    claim: str
    dataset: str
    value: str  # of this run
    verdict: str
    seeds: str  # over several, if they were run
    verdict_seeds: str


def stands(entry: dict | None, lowest: dict | None = None) -> str:
    """What a difference says: its interval without 0 decides, and every seed's sign where there are several.

    >>> stands({"value": 4.0, "ci": [1.0, 7.0]}), stands({"value": 4.0, "ci": [-1.0, 9.0]}), stands(None)
    ('holds', 'not shown', 'not measured')
    >>> stands({"value": 4.0, "ci": [1.0, 7.0]}, {"value": -0.5}), stands({"value": -4.0, "ci": [-7.0, -1.0]})
    ('not shown', 'does not hold')
    """
    if entry is None or entry["value"] is None:
        return "not measured"
    low, high = entry["ci"]
    if low > 0 and (lowest is None or lowest["value"] > 0):
        return "holds"
    return "does not hold" if high < 0 else "not shown"


def judged(numbers: dict, datasets) -> list[Judged]:
    """Every claim on every data set, from numbers.json alone."""
    words, rows = results.layouts()["R3"]["systems"], []
    for name in CLAIMS:
        for dataset in datasets:
            own, mean, lowest = (
                numbers.get(f"{table}/{dataset}/{name}/{key}")
                for table, key in (("R3", "points"), ("R1", "points"), ("R1", "lowest"))
            )
            told = f"{points(mean)}, lowest {lowest['value']:+.1f}" if _there(mean) else "—"
            verdicts = stands(own), stands(mean, lowest)
            rows.append(Judged(name, words[name], dataset, points(own), verdicts[0], told, verdicts[1]))
    return rows + [_tokens(numbers, dataset) for dataset in datasets]


def answer(told: list[Judged]) -> str:
    """A list in markdown: each claim, and what every data set says of it."""
    lines = []
    for name in dict.fromkeys(one.name for one in told):
        own = [one for one in told if one.name == name]
        said = [f"{one.dataset} {one.value} **{one.verdict}**" for one in own]
        said = [
            f"{words}; over seeds {one.seeds} **{one.verdict_seeds}**" if one.seeds != "—" else words
            for words, one in zip(said, own, strict=True)
        ]
        lines += [f"* {own[0].claim}", *(f"    * {words}" for words in said)]
    return "\n".join(lines)


def _there(entry):
    return entry is not None and entry["value"] is not None


def points(entry: dict | None) -> str:
    """A difference with its interval.

    >>> points({"value": 4.04, "ci": [1.0, 7.0]})
    '+4.0 (+1.0 to +7.0)'
    """
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(entry["value"], *entry["ci"]) if _there(entry) else "—"


def _tokens(numbers, dataset):
    """Soft tokens against the fewest tokens of a rewrite; a count, so without an interval."""
    entries = [numbers.get(f"S1/{dataset}/{name}/tokens") for name in ("sqr", *VARIANTS)]
    claim = "tokens a refinement, SQR under HQR"
    if not all(map(_there, entries)):
        return Judged("tokens", claim, dataset, "—", "not measured", "—", "not measured")
    soft, *hard = (entry["value"] for entry in entries)
    verdict = "holds" if soft < min(hard) else "does not hold"
    return Judged(
        "tokens",
        claim,
        dataset,
        f"{digits(soft)} against {digits(min(hard))} or more",
        verdict,
        "—",
        "not measured",
    )
