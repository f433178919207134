"""Run systems, read their episodes and compare them: what several notebooks and studies share."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.data.annotations import Query
from vsr1.evaluation import evaluate, metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.report import provenance, results
from vsr1.report.canvas import Strip
from vsr1.report.results import digits

MOMENTS = (*(f"vcmr@{m}" for m in metrics.THRESHOLDS), "ver")


def run_episodes(profile: Profile, dataset: str, system: str, whole=False, **options) -> list[Episode]:
    """Run a system unless its episodes are current, and return them; options as of `evaluate.run_system`.

    whole  all turns that were run, not only those that headline numbers count
    """
    episodes = records.read_episodes(evaluate.run_system(profile, dataset, system, **options))
    return episodes if whole else metrics.headline(profile, episodes)


def run_sample(profile: Profile, dataset: str, system: str) -> list[Episode]:
    """Run a system on the sample of test queries that refinements are compared on."""
    count = profile.studies.sample_queries
    return run_episodes(profile, dataset, f"{system}-sample", like=system, count=count)


def select(episodes: list[Episode], ids) -> list[Episode]:
    """Return the episodes of the queries `ids`, in that order."""
    by_id = {episode.desc_id: episode for episode in episodes}
    return [by_id[desc_id] for desc_id in ids]


# --- Numbers


def estimate(profile: Profile, episodes: list[Episode], values, unit: str = "%") -> Estimate:
    """Estimate the percentage of `values` (Q,), one an episode, clustered by family; missing without episodes."""
    return statistics.estimate(values, clusters(profile, episodes), profile, unit)


def clusters(profile: Profile, episodes: list[Episode]) -> list[str]:
    """Return the family of the right video of each episode."""
    if not episodes:
        return []
    return statistics.clusters(profile, episodes[0].run.dataset, [episode.gt_video for episode in episodes])


def estimate_metrics(
    profile: Profile, row: str, episodes: list[Episode], names: tuple[str, ...]
) -> dict[str, Estimate]:
    """Estimate metrics of `metrics.hits`: {<row>/<metric>}; `vr@1_failed` over failed first searches only.

    row  <table>/<data set>/<system>
    """
    hits = metrics.hits(episodes, profile.vr_ks)
    chosen = {name: metrics.failed(episodes) if name == "vr@1_failed" else episodes for name in names}
    return {f"{row}/{name}": estimate(profile, chosen[name], hits[name]) for name in names}


def test_row(profile: Profile, dataset: str, system: str, episodes: list[Episode]) -> dict[str, Estimate]:
    """Estimate the row of one system in T1: moments, verdicts, and its last rankings."""
    names = (*MOMENTS, *(f"vr@{k}" for k in profile.vr_ks), "right_last")
    return estimate_metrics(profile, f"T1/{dataset}/{system}", episodes, names)


def turn_budgets(profile: Profile, table: str, dataset: str, runs: dict) -> dict[str, Estimate]:
    """Measure what {system: episodes} give at 1, 2, .. T turns (F5, B2); `open` are those that want another one."""
    numbers = {}
    for system, episodes in runs.items():
        for budget in range(1, episodes[0].run.max_turns + 1):
            within = metrics.within(episodes, budget)
            hits = metrics.hits(within)
            hits["open"] = [e.problem is None and e.stop_reason == "budget" for e in within]
            for metric in (*MOMENTS, "open"):
                name = f"{table}/{dataset}/{system}/{metric}_t{budget}"
                numbers[name] = estimate(profile, within, hits[metric])
    return numbers


def combination_numbers(profile: Profile, dataset: str, runs: dict, unseen: set) -> dict[str, Estimate]:
    """Measure {system: episodes} on queries whose combination of values train never shows, and on the others (U1).

    unseen  ids of the former
    """
    numbers = {}
    for system, episodes in runs.items():
        for name, wanted in {"unseen": True, "seen": False}.items():
            part = [episode for episode in episodes if (episode.desc_id in unseen) == wanted]
            hits = metrics.hits(part)
            for metric in ("vr@1_orig", "vr@1", "right_last", "ver", "vcmr@0.5"):
                numbers[f"U1/{dataset}/{system}/{metric}_{name}"] = estimate(profile, part, hits[metric])
    return numbers


# --- Committed numbers of the longer studies: results/<profile>/<study>/<dataset>.json


def record_committed(profile: Profile, dataset: str, numbers: dict[str, Estimate], study: str) -> None:
    """Add numbers to those of a study of `make ablations` or `make premise`; what other knobs gave goes."""
    note = f"committed; run at {provenance.commit()[:7]}"
    entries = {name: results.plain(asdict(replace(number, note=note))) for name, number in numbers.items()}
    with cache.updated_json(_committed(profile, dataset, study)) as content:
        recorded = content.get("numbers", {}) if content.get("profile") == profile.digest() else {}
        content.clear()
        content |= {"profile": profile.digest(), "numbers": recorded | entries, "series": {}}


def read_committed(profile: Profile, dataset: str, study: str) -> dict[str, Estimate]:
    """Return the numbers that a study left for these knobs; none before it was run."""
    path = _committed(profile, dataset, study)
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("profile") != profile.digest():
        return {}
    return {name: Estimate(**number) for name, number in content["numbers"].items()}


def _committed(profile, dataset, study):
    return profile.results() / study / f"{dataset}.json"


# --- Tables for readers


def table(numbers: dict[str, Estimate]) -> pd.DataFrame:
    """Arrange numbers as rows of systems and columns of metrics, each with half its interval."""
    rows = {}
    for name, number in numbers.items():
        _, _, system, metric = name.split("/")
        spread = f" ± {digits((number.ci[1] - number.ci[0]) / 2)}" if number.ci else ""
        rows.setdefault(system, {})[metric] = digits(number.value) + spread
    return pd.DataFrame(rows).T.fillna("")


def difference(profile: Profile, a, b, families) -> dict[str, str]:
    """Say how far hits `a` (Q,) are ahead of `b` on the same queries: points, interval, and whether that is better."""
    ahead = statistics.difference(a, b, families, profile)
    if ahead.value is None:
        return {"points": "—", "95 % interval": "—", "better": "not shown"}
    low, high = ahead.ci
    better = "yes" if low > 0 else "no" if high < 0 else "not shown"
    return {"points": f"{ahead.value:+.1f}", "95 % interval": f"{low:+.1f} to {high:+.1f}", "better": better}


def compare(profile: Profile, pairs: dict[str, tuple[list[Episode], list[Episode], str]]) -> pd.DataFrame:
    """Arrange the `difference` of each pair {label: (system, baseline, metric)}, paired over the same queries.

    `vr@1_orig` compares the last ranking of the system with the first of the baseline.
    """
    rows = {}
    for label, (system, baseline, metric) in pairs.items():
        assert [episode.desc_id for episode in system] == [episode.desc_id for episode in baseline]
        a = metrics.hits(system, profile.vr_ks)[metric.removesuffix("_orig")]
        b = metrics.hits(baseline, profile.vr_ks)[metric]
        rows[label] = difference(profile, a, b, clusters(profile, system))
    return pd.DataFrame(rows).T


# --- What was predicted, and what came out


@dataclass(frozen=True)
class Prediction:
    """`a` less `b` lies from `low` to `high`, in points; without `b`, `a` does, in percent. Written before the run."""

    words: str
    a: str  # name of a number; {} stands for the data set
    b: str | None
    low: float
    high: float

    def outcome(self, numbers: dict[str, Estimate], dataset: str = "") -> tuple[str, str]:
        """Return (what was measured, whether it came out: "yes" or "no"); ("MISSING", "—") without a number."""
        measured = [numbers.get(name.format(dataset)) for name in (self.a, self.b) if name]
        if any(number is None or number.value is None for number in measured):
            return "MISSING", "—"
        value = measured[0].value - (measured[1].value if self.b else 0)
        text = f"{value:+.1f} points" if self.b else f"{value:.1f} %"
        return text, "yes" if self.low <= value <= self.high else "no"


# --- Rows of contact sheets


def moments_to_see(span: tuple[float, float], seconds: float) -> np.ndarray:
    """Return the seconds of frames that show a moment: one from before it, four from within, one from after.

    >>> moments_to_see((10, 20), 30)
    array([ 5. , 11.25, 13.75, 16.25, 18.75, 25. ])
    """
    start, end = min(span[0], seconds), min(span[1], seconds)  # the truth may end behind the video
    within = start + (end - start) * (np.arange(4) + 0.5) / 4
    return np.array([start / 2, *within, (end + seconds) / 2])


def moment_strips(folder: Path, queries: list[Query], videos: list[str], captions: list[str]) -> list[Strip]:
    """Return a row for each readable video of `folder`, with frames around the moment of its query."""
    rows = []
    with video_reader.Reader() as reader:
        for video, query, caption in zip(
            annotations.find_videos(folder, videos), queries, captions, strict=True
        ):
            if video.path is not None:
                clip = reader.read(video.path, moments_to_see(query.span, query.duration - 0.5))
                if clip.problem is None:
                    rows.append(Strip(clip.frames, clip.timestamps, caption, query.span))
    return rows


def video_strips(profile: Profile, dataset: str, videos: list[str], captions: list[str]) -> list[Strip]:
    """Return a row for each readable video of a data set, with frames along all of it, as the policy sees it."""
    rows, folder = [], profile.data_dir(dataset) / "videos"
    with video_reader.reader_for(profile) as reader:
        for video, caption in zip(annotations.find_videos(folder, videos), captions, strict=True):
            clip = reader.read(video.path)
            if clip.problem is None:
                rows.append(Strip(clip.frames, clip.timestamps, caption))
    return rows


def differences(scene, other) -> list[str]:
    """Say what differs between two rendered scenes of a family, moment by moment."""
    if scene.family != other.family:
        return ["not of one family"]
    return [
        f"moment {number}: {name} {getattr(b, name)} instead of {getattr(a, name)}"
        for number, (a, b) in enumerate(zip(scene.moments, other.moments, strict=True), 1)
        for name in vars(a)
        if getattr(a, name) != getattr(b, name)
    ]
