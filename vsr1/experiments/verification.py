"""Measure verdicts: in oracle videos without search (notebook 02), their reasons and their margins (notebook 04)."""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common
from vsr1.loop.moments import span_iou
from vsr1.loop.records import Episode, Turn
from vsr1.mini import teacher, world
from vsr1.mini.world import ATTRIBUTES
from vsr1.report import qualitative

VERDICTS = {True: "matched", False: "not_matched", None: "unreadable"}


@dataclass(frozen=True)
class OracleEpisodes:
    """Every test query once with its right video and once with the engine's best wrong one: one turn each."""

    right: list[Episode]
    wrong: list[Episode]
    queries: list[Query]

    @property
    def both(self) -> list[Episode]:
        """Return the episodes of both halves."""
        return self.right + self.wrong

    @property
    def durations(self) -> list[float]:
        """Return the seconds of the right videos."""
        return [query.duration for query in self.queries]


def run_oracle(profile: Profile, dataset: str) -> OracleEpisodes:
    """Run both halves of the oracle-video test with the base model, unless they are current."""
    halves = [common.run_episodes(profile, dataset, f"oracle-{half}") for half in ("right", "wrong")]
    return OracleEpisodes(*halves, annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl"))


def oracle_numbers(profile: Profile, dataset: str, oracle: OracleEpisodes) -> dict[str, Estimate]:
    """Measure how the base model judges and grounds (V1), beside floors that do not look at the video."""
    ious = metrics.moment_ious(oracle.right)
    values = {"verdict": (oracle.both, metrics.ver_hits(oracle.both))}
    for name, half in {"right": oracle.right, "wrong": oracle.wrong}.items():
        values[f"verdict_{name}"] = half, metrics.ver_hits(half)
    values |= {f"grounding@{m}": (oracle.right, metrics.reaches(ious, m)) for m in metrics.THRESHOLDS}
    values |= {"miou": (oracle.right, ious)}
    replies = readable(oracle.both)
    values |= {name: (oracle.both, replies[name]) for name in ("strict", "readable", "spanned")}
    numbers = {f"zs/{name}": common.estimate(profile, *pair) for name, pair in values.items()}
    largest = max(len(oracle.right), len(oracle.wrong))
    numbers["majority/verdict"] = Estimate(100 * largest / len(oracle.both), len(oracle.both))
    for floor, values in _floors(profile, oracle).items():
        numbers |= {f"{floor}/{name}": Estimate(value, len(oracle.right)) for name, value in values.items()}
    return {f"V1/{dataset}/{name}": number for name, number in numbers.items()}


def _floors(profile, oracle):
    """Return {floor: {metric: percent}} of spans that need no eyes: the whole video, and two uniform times."""
    truth = np.array([episode.gt_span_ms for episode in oracle.right]) / 1000
    rng = np.random.default_rng([profile.seed, 0])
    return {
        "wholevideo": metrics.whole_video_floor(oracle.durations, truth),
        "random": metrics.random_span_floor(oracle.durations, truth, rng=rng),
    }


def readable(episodes: list[Episode]) -> dict[str, np.ndarray]:
    """Return how the replies of the first turn can be read, (Q,) truth values each.

    strict     the requested layout to the letter
    readable   a verdict was found
    spanned    two times were found
    truncated  it ended at the limit of new tokens
    """
    replies = [episode.turns[0].reply if episode.turns else None for episode in episodes]
    tests = {
        "strict": lambda reply: reply.strict,
        "readable": lambda reply: reply.matched is not None,
        "spanned": lambda reply: reply.span is not None,
        "truncated": lambda reply: not reply.ended,
    }
    return {
        name: np.array([reply is not None and test(reply) for reply in replies])
        for name, test in tests.items()
    }


def confusion(oracle: OracleEpisodes) -> pd.DataFrame:
    """Count verdicts: a row per half, a column per verdict; a video that could not be read has none: "not run"."""
    rows = {}
    for label, half in {"right video shown": oracle.right, "wrong video shown": oracle.wrong}.items():
        counts = Counter(
            VERDICTS[metrics.verdict(episode, 0)] if episode.problem is None else "not run"
            for episode in half
        )
        rows[label] = {verdict: counts[verdict] for verdict in (*VERDICTS.values(), "not run")}
    return pd.DataFrame(rows).T


def histogram(ious) -> list:
    """Return [left edge, percent] of overlaps: exactly 0 at -0.1, then ten bins with their left edge, the last also 1.

    >>> [pair for pair in histogram([0.0, 0.3, 1.0, 1.0]) if pair[1]]
    [[-0.1, 25.0], [0.3, 25.0], [0.9, 50.0]]
    """
    ious = np.asarray(ious, dtype=float)
    bins = np.where(ious > 0, np.minimum(np.floor(ious * 10 + metrics.IOU_EPS), 9), -1)
    return [[bin / 10, metrics.percent(bins == bin)] for bin in range(-1, 10)]


def iou_series(dataset: str, oracle: OracleEpisodes) -> dict[str, list]:
    """Return histograms of overlap with the right moment (V2): of the named spans and of whole videos."""
    truth = np.array([episode.gt_span_ms for episode in oracle.right]) / 1000
    whole = span_iou([(0, seconds) for seconds in oracle.durations], truth)
    ious = {"zs": metrics.moment_ious(oracle.right), "wholevideo": whole}
    return {f"V2/{dataset}/{system}/iou": histogram(values) for system, values in ious.items()}


def example_cases(oracle: OracleEpisodes) -> dict[str, Episode | None]:
    """Pick three episodes by rule, the smallest query id of each kind; None where there is none of it."""

    def first(half, verdicts):
        fitting = [e for e in half if e.problem is None and metrics.verdict(e, 0) in verdicts]
        return min(fitting, key=lambda episode: episode.desc_id, default=None)

    wrong = [first(oracle.right, (False, None)), first(oracle.wrong, (True, None))]
    return {
        "right acceptance": first(oracle.right, (True,)),
        "right rejection": first(oracle.wrong, (False,)),
        "wrong verdict": min(filter(None, wrong), key=lambda episode: episode.desc_id, default=None),
    }


# --- Is the reasoning true?


def trace_numbers(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """Measure how much of what {system: episodes} say at the first look is true (V4).

    All systems see the same video first. The truth is that of its rendered moment which has most of the query; of real
    video nobody knows it, and all numbers are missing.

    stated     attributes about which something was said at all
    asked      words asked for, as the query has them
    shown      words shown, as the video has them
    yesno      "yes" and "no" that are true
    false_yes  of attributes that differ, those said to match; false_no: of those that match, said to differ
    """
    numbers, scenes = {}, None
    if profile.world:
        scenes = world.read_scenes(profile.data_dir(dataset) / "corpus")
    for system, episodes in runs.items():
        if scenes is None:
            values = {"shown": Estimate(None, 0, note="only rendered videos tell what they show")}
        else:
            values = _trace_shares(profile, episodes, statements(episodes, scenes))
        numbers |= {f"V4/{dataset}/{system}/{name}": number for name, number in values.items()}
    return numbers


def statements(episodes: list[Episode], scenes: dict) -> pd.DataFrame:
    """Return a row for each attribute of each first look: the query's place in `episodes`, what is said, what is true.

    Columns: query, attribute, differs, stated; where it is stated whether asked, shown and yesno are true, and same.
    """
    rows = []
    for number, episode in enumerate(episodes):
        if not episode.turns or (turn := episode.turns[0]).reply is None:
            continue
        query_moment = qualitative.find_query_moment(episode, scenes)
        shown_moment = qualitative.closest(query_moment, turn.shown_id, scenes)
        read = [teacher.read_statement(step) for step, *_ in qualitative.reasoning(turn)]
        by_attribute = {statement.attribute: statement for statement in read if statement is not None}
        for name in ATTRIBUTES:
            differs = getattr(query_moment, name) != getattr(shown_moment, name)
            row = {"query": number, "attribute": name, "differs": differs, "stated": name in by_attribute}
            if statement := by_attribute.get(name):
                row |= {"asked": statement.query_word == teacher.word(name, query_moment)}
                row |= {"shown": statement.shown_word == teacher.word(name, shown_moment)}
                row |= {"same": statement.same, "yesno": statement.same != differs}
            rows.append(row)
    return pd.DataFrame(rows, columns=[*"query attribute differs stated asked shown same yesno".split()])


def _trace_shares(profile, episodes, rows):
    """Return {metric: Estimate} of the rows of one system."""

    def percent(part, column, flip=False):
        values = part[column].to_numpy(bool) ^ flip
        return common.estimate(profile, [episodes[number] for number in part["query"]], values)

    stated = rows[rows.stated]
    differs = stated.differs.astype(bool)
    numbers = {"stated": percent(rows, "stated")}
    numbers |= {column: percent(stated, column) for column in ("asked", "shown", "yesno")}
    numbers |= {"false_yes": percent(stated[differs], "same")}
    numbers |= {"false_no": percent(stated[~differs], "same", flip=True)}
    for name in ATTRIBUTES:
        of_name = stated.attribute == name
        numbers |= {f"shown_{name}": percent(stated[of_name], "shown")}
        numbers |= {f"false_yes_{name}": percent(stated[of_name & differs], "same")}
    return numbers


# --- How clearly is it decided, and what would another threshold give?


def _margin(turn: Turn) -> float:
    """Return log P(matched) - log P(not_matched) of a turn, nats; -inf without a verdict, which accepts nothing."""
    return -np.inf if turn.verdict_margin is None else turn.verdict_margin


def roc(margin: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the share of wrong and of right videos (T, 2) accepted at each threshold, from none to all.

    margin  (L,)    right  (L,) whether the right video is shown

    >>> roc(np.array([2.0, 1.0, 1.0]), np.array([True, True, False])).tolist()
    [[0.0, 0.0], [0.0, 0.5], [1.0, 1.0]]
    """
    levels = np.unique(margin)[::-1]
    accepted = margin >= np.concatenate([[np.inf], levels])[:, None]  # (T, L)
    return np.stack([accepted[:, ~right].mean(axis=1), accepted[:, right].mean(axis=1)], axis=1)


def auc(margin: np.ndarray, right: np.ndarray) -> float:
    """Return the chance that a right video has a higher margin than a wrong one, ties half: the area under `roc`."""
    wrong, accepted = np.sort(margin[~right]), margin[right]
    if not len(wrong) or not len(accepted):
        return np.nan
    below = np.searchsorted(wrong, accepted) + np.searchsorted(wrong, accepted, side="right")
    return float(below.mean() / 2 / len(wrong))


def youden(margin: np.ndarray, right: np.ndarray) -> float:
    """Return Youden's J: the share of right videos that is accepted less that of wrong ones."""
    if right.all() or not right.any():
        return np.nan
    return float((margin[right] >= 0).mean() - (margin[~right] >= 0).mean())


def _judged(episodes):
    """Return (margins, whether the video is right, right videos) of first turns."""
    judged = [episode for episode in episodes if episode.turns and episode.turns[0].reply is not None]
    margin = np.array([_margin(episode.turns[0]) for episode in judged])
    right = np.array([episode.turns[0].shown_is_gt for episode in judged])
    return margin, right, np.array([episode.gt_video for episode in judged])


def _resampled(profile, statistic, videos, unit="%"):
    """Estimate `statistic(rows)`, in percent, over looks; its interval resamples families, as others do."""
    if not len(videos):
        return Estimate(None, 0, unit=unit)
    _, cluster = np.unique(videos, return_inverse=True)
    members = [np.flatnonzero(cluster == number) for number in range(cluster.max() + 1)]
    rng = np.random.default_rng(profile.seed)
    draws = rng.integers(len(members), size=(profile.bootstrap_samples, len(members)))
    values = [
        statistic(np.concatenate([members[c] for c in draw])) for draw in draws
    ]  # NaN: of one kind only
    value = 100 * statistic(np.arange(len(videos)))
    if np.isnan(value):
        return Estimate(None, len(videos), unit=unit)
    low, high = np.nanpercentile(100 * np.array(values), [2.5, 97.5])
    return Estimate(value, len(videos), (float(low), float(high)), (profile.seed,), unit)


def margin_numbers(
    profile: Profile, dataset: str, runs: dict[str, list[Episode]], held: dict[str, list[Episode]]
) -> dict[str, Estimate]:
    """Measure how well margins tell right from wrong videos, and what forced and shifted answers give (V5).

    runs  {system: test episodes}
    held  {system: those of validation queries}, on which thresholds are chosen; without them they are missing

    auc, j, accept_right, accept_wrong  at the first look, which all systems share
    vcmr@0.5_forced     the last look answers, whatever its verdict
    vcmr@0.5_threshold  each look with a margin from `theta` on answers; at most 0, since a walk ends where it matched
    ver_threshold       the last look is right with `theta_ver` in place of 0
    repaired, harmed    first searches that refinement puts right, or spoils
    """
    numbers = {}
    for system, episodes in runs.items():
        values = _first_look(profile, episodes)
        score = functools.partial(common.estimate, profile, episodes)
        values |= {"vcmr@0.5": score(metrics.vcmr_hits(episodes, 0.5))}
        values |= {"ver": score(metrics.ver_hits(episodes))}
        values |= {"vcmr@0.5_forced": score(answer_hits(episodes, 0, forced=True))}
        if system in held:
            theta, theta_ver = (choose_threshold(held[system], hits) for hits in (answer_hits, judged_hits))
            values |= {"vcmr@0.5_threshold": score(answer_hits(episodes, theta))}
            values |= {"ver_threshold": score(judged_hits(episodes, theta_ver))}
            thetas = {"theta": theta, "theta_ver": theta_ver}
            count = len(held[system])
            values |= {name: Estimate(level, count, unit="nats") for name, level in thetas.items()}
        if {turn.refine_kind for episode in episodes for turn in episode.turns} - {None, "walkdown"}:
            before, after = (metrics.true_ranks(episodes, which) == 1 for which in ("orig", "final"))
            values |= {"repaired": score(after & ~before), "harmed": score(before & ~after)}
        numbers |= {f"V5/{dataset}/{system}/{name}": number for name, number in values.items()}
    return numbers


def _first_look(profile, episodes):
    margin, right, videos = _judged(episodes)
    videos = np.array(statistics.clusters(profile, episodes[0].run.dataset, videos))
    accepted = margin >= 0
    kinds = {"accept_right": right, "accept_wrong": ~right}
    numbers = {
        name: statistics.estimate(accepted[rows], videos[rows], profile) for name, rows in kinds.items()
    }
    numbers["auc"] = _resampled(profile, lambda rows: auc(margin[rows], right[rows]), videos)
    numbers["j"] = _resampled(profile, lambda rows: youden(margin[rows], right[rows]), videos, "points")
    return numbers


def gained_numbers(
    profile: Profile, dataset: str, before: list[Episode], after: list[Episode]
) -> dict[str, Estimate]:
    """Measure what stage 2 changes on the same queries (V5): the area under ROC, moments found and moments lost."""
    assert [episode.desc_id for episode in before] == [episode.desc_id for episode in after]
    (margins_before, right, videos), (margins_after, also_right, _) = _judged(before), _judged(after)
    assert (right == also_right).all(), "first looks are those of one search"
    videos = np.array(statistics.clusters(profile, after[0].run.dataset, videos))

    def auc_ahead(rows):
        return auc(margins_after[rows], right[rows]) - auc(margins_before[rows], right[rows])

    hits_before, hits_after = (metrics.vcmr_hits(episodes, 0.5) for episodes in (before, after))
    values = {"auc_ahead": _resampled(profile, auc_ahead, videos, "points")}
    values |= {"gained": common.estimate(profile, after, hits_after & ~hits_before)}
    values |= {"lost": common.estimate(profile, after, hits_before & ~hits_after)}
    return {f"V5/{dataset}/vsr1/{name}": number for name, number in values.items()}


def answer_hits(episodes: list[Episode], threshold: float, forced=False) -> np.ndarray:
    """Return whether the answer is right at IoU 0.5, (Q,), where the first look with margin >= threshold answers.

    threshold  at most 0: what would follow a look that was accepted is not known
    forced     where none does, the last look answers
    """
    assert threshold <= 0, threshold
    return np.array([_is_hit(episode, threshold, forced) for episode in episodes], bool)


def _is_hit(episode, threshold, forced):
    answering = [turn for turn in episode.turns if _margin(turn) >= threshold]
    answering += episode.turns[-1:] if forced else ()
    if not answering or not answering[0].shown_is_gt or answering[0].reply is None:
        return False
    turn = answering[0]
    span = turn.span_ms if turn.reply.matched else turn.forced_span_ms
    return span is not None and bool(metrics.reaches(span_iou(span, episode.gt_span_ms), 0.5))


def judged_hits(episodes: list[Episode], threshold: float) -> np.ndarray:
    """Return whether the last look is judged rightly, (Q,), if a margin >= threshold accepts."""
    lasts = [episode.turns[-1] if episode.turns else None for episode in episodes]
    hits = [last is not None and (_margin(last) >= threshold) == last.shown_is_gt for last in lasts]
    return np.array(hits, bool)


def choose_threshold(episodes: list[Episode], hits) -> float:
    """Return the threshold with most hits on validation episodes; of equals the one nearest to 0.

    hits  `answer_hits`, whose thresholds are at most 0, or `judged_hits`
    """
    levels = np.unique([_margin(turn) for episode in episodes for turn in episode.turns])
    levels = levels[np.isfinite(levels) & ((levels <= 0) | (hits is judged_hits))]
    return float(max([0.0, *levels], key=lambda level: (hits(episodes, level).sum(), -abs(level))))


def margin_series(dataset: str, runs: dict[str, list[Episode]]) -> dict[str, list]:
    """Return the ROC of first looks of {system: episodes} (V5), percent."""
    curves = {}
    for system, episodes in runs.items():
        margin, right, _ = _judged(episodes)
        if right.any() and not right.all():
            curves[f"V5/{dataset}/{system}/roc"] = (100 * roc(margin, right)).tolist()
    return curves
