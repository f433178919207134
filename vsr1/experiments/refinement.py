"""Compare ways to refine a query: one query, soft token by soft token, and all of them on a sample (notebook 06)."""

from pathlib import Path

import pandas as pd

from vsr1.config import Profile
from vsr1.evaluation import metrics, soft_token_sweep
from vsr1.evaluation.soft_token_sweep import Sweep
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.report import search_figures

# --- One query


def write_ranks(profile: Profile, dataset: str) -> Path | None:
    """Write the ranks of the queries that F1 and F6 would show of a data set, see `soft_token_sweep.write_ranks`."""
    chosen = search_figures.first_of_rules(profile, dataset)
    return soft_token_sweep.write_ranks(profile, dataset, chosen)


def pick_query(episodes: list[Episode]) -> tuple[Episode, str]:
    """Pick a query to follow, and say by which rule: the smallest id of the first rule that finds any."""
    rejected = [e for e in episodes if e.problem is None and metrics.verdict(e, 0) is not True]
    # Those that searched again, if any.
    rejected = [e for e in rejected if e.turns[0].rank_by_depth] or rejected
    rules = {
        "right video on rank 5 to 40, first video rejected": [e for e in rejected if 5 <= e.rank_orig <= 40],
        "first search failed, first video rejected": [e for e in rejected if e.rank_orig > 1],
        "first video rejected": rejected,
        "any query that was run": [e for e in episodes if e.problem is None],
    }
    rule = next(rule for rule, fitting in rules.items() if fitting)
    return min(rules[rule], key=lambda episode: episode.desc_id), rule


def sweep_series(dataset: str, sweeps: dict[str, Sweep]) -> dict[str, list]:
    """Return rank and cosines by number of soft tokens, per policy (S2)."""
    return {
        f"S2/{dataset}/{name}/{key}": [[n, value] for n, value in enumerate(values)]
        for name, sweep in sweeps.items()
        for key, values in ({"rank": sweep.ranks} | sweep.cosines).items()
    }


def rewrites(runs: dict[str, list[Episode]], desc_id: int) -> pd.DataFrame:
    """Arrange what each refinement made of one query after its first turn: words, rank before and after."""
    rows = {}
    for system, episodes in runs.items():
        turn = common.select(episodes, [desc_id])[0].turns[0]
        after = "—" if turn.rank_out is None else turn.rank_out
        rows[system] = {
            "the query becomes": refined_query(turn),
            "rank before": turn.rank_in,
            "rank after": after,
        }
    return pd.DataFrame(rows, dtype=object).T


def refined_query(turn: records.Turn) -> str:
    """Say in words what stands in a query after a turn."""
    if turn.rank_out is None:
        accepted = turn.reply is not None and turn.reply.matched
        return "nothing: the video was accepted" if accepted else "nothing: no readable update"
    if turn.refine_kind == "walkdown":
        return "the same"
    return turn.update_text or f"the same and {turn.refine_tokens} soft tokens"


# --- All queries of the sample

SHARES = ("vr@1_orig", "vr@1", "vr@1_failed", "right_last", "vcmr@0.5", "ver")
COSTS = {"tokens": "tokens", "seconds": "s", "generated": "tokens", "engine_calls": "calls", "turns": "looks"}


def side_by_side(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """Measure what each refinement gains and costs (S1).

    refined   percentage of queries that were changed at least once
    tokens    of one refinement; seconds of one; generated, engine_calls, turns of a whole episode
    """
    numbers = {}
    for system, episodes in runs.items():
        row = f"S1/{dataset}/{system}"
        numbers |= common.estimate_metrics(profile, row, episodes, SHARES)
        refined = [any(turn.rank_out and turn.refine_tokens for turn in e.turns) for e in episodes]
        numbers[f"{row}/refined"] = common.estimate(profile, episodes, refined)
        costs = metrics.costs(episodes)
        costs |= {"seconds": costs["refine_seconds"]}
        for name, unit in COSTS.items():
            numbers[f"{row}/{name}"] = Estimate(costs[name], len(episodes), unit=unit)
    return numbers


def costs_and_gains(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """Measure what a refinement costs, and the R@1 that it gains in points (T3).

    Gains are over all queries, over those that were refined at turn 1, and over those whose first search failed.
    """
    units = {"tokens": "tokens", "tokens_tagged": "tokens", "generated": "tokens", "refine_seconds": "s"}
    numbers = {}
    for system, episodes in runs.items():
        row, costs = f"T3/{dataset}/{system}", metrics.costs(episodes)
        for name, unit in units.items():
            short = name.removeprefix("refine_")
            numbers[f"{row}/{short}"] = Estimate(costs[name], len(episodes), unit=unit)
        groups = {"": episodes, "_refined": metrics.refined(episodes), "_failed": metrics.failed(episodes)}
        for suffix, chosen in groups.items():
            after, before = (metrics.vr_hits(chosen, 1, which).astype(int) for which in ("final", "orig"))
            numbers[f"{row}/gain{suffix}"] = common.estimate(profile, chosen, after - before, "points")
    return numbers
