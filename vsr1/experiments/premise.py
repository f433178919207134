"""Test the premise: is it the look at the wrong video and the loop, or would a trained query adapter do the same?

P1 compares systems without a loop with the loop, at equal numbers of videos watched; what is "over" another is
paired over the same queries, in points. P2 changes what the policy has before it at the moment of refinement. What was
predicted before the run stands in `PREDICTIONS`.

results/<profile>/premise/<dataset>.json     what `make premise` measured beyond `make paper`, committed
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.evaluation import evaluate, interventions, metrics, statistics
from vsr1.evaluation.interventions import INTERVENTIONS
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common, retrieval, retry
from vsr1.loop import records
from vsr1.loop.moments import span_iou
from vsr1.loop.records import Episode, Turn
from vsr1.mini import teacher
from vsr1.training import grpo, query_adapters

# What `make paper` measures; `make premise` measures the rest.
FIRST = ("adapter-vec", "adapter-soft", "vsr1")
SYSTEMS = ("vsr1-first",)
LOOP = ("walkdown-ft", "sft", "vsr1", "skip")  # what is run anyway; "skip": the loop, no video twice (ours)
ALL_TOKENS = ("vsr1-all", "sft-all")  # loops that keep the soft tokens of all turns (ours)
MORE_FIRST = tuple(name for name in query_adapters.FIRST if name not in FIRST)
MORE_SYSTEMS = ALL_TOKENS + tuple(
    name
    for name, recipe in evaluate.RECIPES.items()
    if (recipe.first or recipe.policy == "hqr" or recipe.like in ("walkdown", "rocchio"))
    and name not in (*SYSTEMS, *LOOP)
)
RERANKED = ("rerank-10-ft", "rerank-10-vsr1")


# --- P1: first searches, and the same number of videos looked at


def first_numbers(profile: Profile, dataset: str, names: tuple[str, ...]) -> dict[str, Estimate]:
    """Measure the first search of all test queries as typed and by adapters (P1).

    first@1, first@10  R@1 and R@10
    repaired, kept     R@1 of the queries whose first search as typed fails, and of those where it is right
    over-vsr1          R@1 less that of the loop at its end
    """
    loop = common.run_episodes(profile, dataset, "vsr1", whole=True)
    loop_hits = dict(zip([episode.desc_id for episode in loop], metrics.vr_hits(loop, 1), strict=True))
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    episodes = [_as_episode(profile, dataset, query) for query in queries]
    families, numbers, typed = common.clusters(profile, episodes), {}, None
    for name in ("typed", *names):
        adapter, row = None if name == "typed" else name, f"P1/{dataset}/{row_name(name)}"
        first = retrieval.first_search(queries, query_adapters.read_first(profile, dataset, adapter, "test"))
        typed = first.hits() if typed is None else typed
        groups = {"first@1": (np.ones_like(typed), 1), "first@10": (np.ones_like(typed), 10)}
        if adapter:
            groups |= {"repaired": (~typed, 1), "kept": (typed, 1)}
        for metric, (mask, k) in groups.items():
            part = [episode for episode, chosen in zip(episodes, mask, strict=True) if chosen]
            numbers[f"{row}/{metric}"] = common.estimate(profile, part, first.hits(k)[mask])
        at_end = [loop_hits[query.id] for query in queries]
        numbers[f"{row}/over-vsr1"] = statistics.difference(first.hits(), at_end, families, profile)
    return numbers


def row_name(first: str) -> str:
    """Return the row of a first search: the soft tokens of a policy are not its whole loop, whose name they have."""
    return f"{first}-tokens" if first in evaluate.RECIPES else first


def _as_episode(profile, dataset, query):
    """Return an episode that nothing was run for: estimates cluster by its video."""
    run = records.Run(dataset, "test", "first", 1, 1, profile.seed)
    return Episode(run, query.id, query.text, query.video, (0, 0), None, (), "budget")


def look_numbers(profile: Profile, dataset: str, names: tuple[str, ...]) -> dict[str, Estimate]:
    """Measure VCMR at IoU 0.5 by the number of videos that a system may look at, and R@1 at the end (P1).

    forced  VCMR where the last look answers, whatever its verdict. VCMR does not charge for a wrong answer, so no
            threshold that validation could choose gives more.
    over-vsr1, over-skip   VCMR with all looks less that of the paper's loop, and of the one that shows no video twice
    """
    numbers = {}
    loops = {name: common.run_episodes(profile, dataset, name, whole=True) for name in ("vsr1", "skip")}
    for name in names:
        episodes, row = common.run_episodes(profile, dataset, name, whole=True), f"P1/{dataset}/{name}"
        for looks in range(1, episodes[0].run.max_turns + 1):
            hits = metrics.vcmr_hits(metrics.within(episodes, looks), 0.5)
            numbers[f"{row}/vcmr@0.5_t{looks}"] = common.estimate(profile, episodes, hits)
        forced = [
            answers_right(episode.turns[-1] if episode.turns else None, episode) for episode in episodes
        ]
        numbers[f"{row}/forced"] = common.estimate(profile, episodes, forced)
        numbers[f"{row}/vr@1"] = common.estimate(profile, episodes, metrics.vr_hits(episodes, 1))
        for control, controls in loops.items():
            if control != name:
                assert [e.desc_id for e in episodes] == [e.desc_id for e in controls]
                hits = [metrics.vcmr_hits(run, 0.5) for run in (episodes, controls)]
                families = common.clusters(profile, episodes)
                numbers[f"{row}/over-{control}"] = statistics.difference(*hits, families, profile)
    return numbers


def rerank_numbers(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Measure VCMR where the clearest verdict among the first k videos answers (P1)."""
    return {
        f"P1/{dataset}/{name}/vcmr@0.5_t{profile.max_turns}": common.estimate(profile, episodes, hits)
        for name, (episodes, hits) in reranked(profile, dataset).items()
    }


def reranked(profile: Profile, dataset: str) -> dict[str, tuple[list[Episode], list[bool]]]:
    """Return {system: (episodes, hits of VCMR)} where the clearest verdict among k videos answers: k = T and 10.

    Whatever the verdict is, the span is the one that the reply names for `matched`.
    """
    answers = {}
    for name in RERANKED:
        episodes = common.run_episodes(profile, dataset, name, whole=True)
        for k in (profile.max_turns, 10):
            hits = [answers_right(clearest_turn(episode.turns[:k]), episode) for episode in episodes]
            answers[name.replace("-10-", f"-{k}-")] = episodes, hits
    return answers


def clearest_turn(turns: tuple[Turn, ...]) -> Turn | None:
    """Return the turn with the largest margin of `matched` over `not_matched`; of equals the first."""
    judged = [turn for turn in turns if turn.verdict_margin is not None]
    return max(judged, key=lambda turn: turn.verdict_margin, default=None)


def answers_right(turn: Turn | None, episode: Episode) -> bool:
    """Return whether a turn that answers names the right moment, IoU 0.5: by its own span, else by the forced one."""
    if turn is None or not turn.shown_is_gt:
        return False
    span = turn.span_ms or turn.forced_span_ms
    return span is not None and bool(metrics.reaches(span_iou(span, episode.gt_span_ms), 0.5))


# --- P2: interventions at the moment of refinement


def intervene(profile: Profile, dataset: str) -> dict:
    """Return `interventions.intervene` of the rejected videos and replies of the retry study (A2)."""
    weights = str(grpo.train(profile, dataset))
    episodes = retry.run_retries(profile, dataset, "sqr", weights)
    corrupt = teacher.corrupt_asked if profile.world is not None else None
    return interventions.intervene(profile, dataset, weights, episodes, corrupt)


def intervention_numbers(profile: Profile, dataset: str, refined: dict) -> dict[str, Estimate]:
    """Measure R@1 after one refinement of failed queries by intervention (P2); one that was not run is missing.

    refined    what `intervene` returned
    over-sqr   R@1 less that of the refinement as it is
    """
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    by_id = {query.id: query for query in queries}
    episodes, numbers = [_as_episode(profile, dataset, by_id[key]) for key in refined["ids"]], {}
    hits = {name: np.array(ranks) == 1 for name, ranks in refined["ranks"].items()}
    families = common.clusters(profile, episodes)
    for name in INTERVENTIONS:
        number = Estimate(None, 0, note="needs rendered truth")
        if name in hits:
            number = common.estimate(profile, episodes, hits[name])
        numbers[f"P2/{dataset}/{name}/vr@1"] = number
        if name in hits and name != "sqr":
            gain = statistics.difference(hits[name], hits["sqr"], families, profile)
            numbers[f"P2/{dataset}/{name}/over-sqr"] = gain
    return numbers


# --- What was predicted, and what came out

# Written on 2026-11-29, before the run.
PREDICTIONS = {
    "X1 tokens": common.Prediction(
        "soft tokens without a loop find at least what the loop finds in the end, within 3 points",
        "P1/{}/adapter-soft/first@1",
        "P1/{}/vsr1/vr@1",
        -3,
        100,
    ),
    "X1 one look": common.Prediction(
        "they are ahead of the loop in VCMR at one look",
        "P1/{}/adapter-soft-vsr1/vcmr@0.5_t1",
        "P1/{}/vsr1/vcmr@0.5_t1",
        0,
        100,
    ),
    "X1 map": common.Prediction(
        "a linear map finds 40 to 65 % at the first search", "P1/{}/adapter-vec/first@1", None, 40, 65
    ),
    "X2 policy": common.Prediction(
        "the policy of both stages, walking down, is ahead of FT walking down",
        "P1/{}/vsr1-walkdown/vcmr@0.5_t3",
        "P1/{}/walkdown-ft/vcmr@0.5_t3",
        0,
        100,
    ),
    **{
        f"X3 {name}": common.Prediction(
            f"with {INTERVENTIONS[name]} R@1 stays within 3 points",
            f"P2/{{}}/{name}/vr@1",
            "P2/{}/sqr/vr@1",
            -3,
            3,
        )
        for name in ("sqr-other-video", "sqr-right-video", "sqr-no-reply", "sqr-query-alone")
    },
    **{
        f"X3 {name}": common.Prediction(
            f"with {INTERVENTIONS[name]} R@1 falls below 5 %", f"P2/{{}}/{name}/vr@1", None, 0, 5
        )
        for name in ("sqr-other-reply", "sqr-asked-corrupted")
    },
    "beyond": common.Prediction(
        "soft tokens before the first search, then the loop, beat the paper's loop at equal looks",
        "P1/{}/vsr1-first/vcmr@0.5_t3",
        "P1/{}/vsr1/vcmr@0.5_t3",
        0,
        100,
    ),
}


def outcomes(dataset: str, numbers: dict[str, Estimate]) -> pd.DataFrame:
    """Arrange what was predicted and what {name: Estimate} say, a row per prediction."""
    rows = {}
    for key, prediction in PREDICTIONS.items():
        measured, came_out = prediction.outcome(numbers, dataset)
        rows[key] = {"predicted": prediction.words, "measured": measured, "came out": came_out}
    return pd.DataFrame(rows).T


# --- `make premise`


def run(profile: Profile, dataset: str) -> Iterator[str]:
    """Run all that `make paper` leaves out, one after the other; yield the name of each when it is recorded."""
    for name in MORE_FIRST:
        # Those of the query as typed come along; `make paper` has recorded them.
        numbers = first_numbers(profile, dataset, (name,))
        row = {key: number for key, number in numbers.items() if f"/{row_name(name)}/" in key}
        common.record_committed(profile, dataset, row, "premise")
        yield name
    for name in MORE_SYSTEMS:
        common.record_committed(profile, dataset, look_numbers(profile, dataset, (name,)), "premise")
        yield name
    common.record_committed(profile, dataset, rerank_numbers(profile, dataset), "premise")
    yield "rerank"
