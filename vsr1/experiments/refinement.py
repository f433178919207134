"""What notebooks 02 and 06 measure: verdicts and spans where the video is given away, and what refinements do.

02 reads episodes of `oracle-right` and `oracle-wrong` (each test query with its right video, and with the engine's best
wrong one) and of the loop. 06 follows one query latent by latent, and puts refinements side by side on a sample.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.evaluation import evaluate, metrics, statistics
from vsr1.loop import records, runner, sqr
from vsr1.loop.records import Episode
from vsr1.models import prompt_text, search_index
from vsr1.report.results import Estimate, digits

WORDS = {True: "matched", False: "not_matched", None: "unreadable"}


def episodes(profile: Profile, dataset: str, system: str, **options) -> list[Episode]:
    """The episodes of one system, run now if they are not there."""
    return records.read_episodes(evaluate.run_system(profile, dataset, system, **options))


def share(profile: Profile, chosen: list[Episode], values) -> Estimate:
    """A percentage of episodes with its 95 % interval, clustered by right video; missing where there are none."""
    if not len(chosen):
        return Estimate(None, 0)
    rng = np.random.default_rng(profile.seed)
    ci = statistics.bootstrap(values, [one.gt_video for one in chosen], profile.bootstrap_samples, rng=rng)
    return Estimate(metrics.percent(values), len(chosen), ci, (profile.seed,))


# --- the loop with the base model


def loop_numbers(profile: Profile, dataset: str, system: str, walked: list[Episode], names) -> dict:
    """T1: {name: Number} of the metrics called `names` of one system."""
    found = metrics.hits(walked, profile.vr_ks)
    return {f"T1/{dataset}/{system}/{name}": share(profile, walked, found[name]) for name in names}


def agreement(walked: list[Episode], looked) -> tuple[int, int]:
    """(first looks that were also given away, those of them with the very same reply)."""
    given = {(one.desc_id, one.turns[0].shown_id): one.turns[0].reply for one in looked.both if one.turns}
    firsts = [(one.desc_id, one.turns[0]) for one in walked if one.turns]
    pairs = [(turn.reply, given[desc_id, turn.shown_id]) for desc_id, turn in firsts]
    return len(pairs), sum(one == other for one, other in pairs)


def table(numbers: dict[str, Estimate]) -> pd.DataFrame:
    """Numbers as rows of systems and columns of metrics, each with half its interval."""
    rows = {}
    for name, number in numbers.items():
        _, _, system, metric = name.split("/")
        spread = f" ± {digits((number.ci[1] - number.ci[0]) / 2)}" if number.ci else ""
        rows.setdefault(system, {})[metric] = digits(number.value) + spread
    return pd.DataFrame(rows).T.fillna("")


def budgets(walked: list[Episode]) -> pd.DataFrame:
    """What one run gives at 1, 2, .. T looks, in percent."""
    rows = {}
    for budget in range(1, walked[0].run.max_turns + 1):
        found = metrics.hits(metrics.within(walked, budget))
        rows[f"{budget} looks" if budget > 1 else "1 look"] = {
            key: round(metrics.percent(found[key]), 1) for key in ("vcmr@0.3", "vcmr@0.5", "vcmr@0.7", "ver")
        }
    return pd.DataFrame(rows).T


# --- 06: one query


def pick(walked: list[Episode]) -> tuple[Episode, str]:
    """A query to look at closely, and the rule that found it: the smallest id, of the first rule that finds any."""
    rejected = [one for one in walked if one.problem is None and metrics.verdict(one, 0) is not True]
    # Those that searched again, if any.
    rejected = [one for one in rejected if one.turns[0].rank_by_depth] or rejected
    rules = {
        "right video on rank 5 to 40, first look rejected": [o for o in rejected if 5 <= o.rank_orig <= 40],
        "first search failed, first look rejected": [o for o in rejected if o.rank_orig > 1],
        "first look rejected": rejected,
        "any query that was run": [o for o in walked if o.problem is None],
    }
    rule = next(rule for rule, found in rules.items() if found)
    return min(rules[rule], key=lambda one: one.desc_id), rule


@dataclass(frozen=True, eq=False)
class Sweep:
    """One query with the first 0, 1, .. N latents of one look at one video, in the engine's space."""

    vecs: np.ndarray  # (N + 1, D)
    ranks: np.ndarray  # (N + 1,) of the right video
    cosines: dict[str, np.ndarray]  # (N + 1,) with the right, the shown, the best video, the query as typed
    lengths: np.ndarray  # (N,) of the latents
    appended: np.ndarray  # (N,) of what stands in the query for them
    words: np.ndarray  # (L,) of the engine's embeddings of the query's own tokens


@torch.no_grad()
def sweep(
    made, agent, vectors: search_index.Vectors, one: Episode, clip: video_reader.Clip, asked: str
) -> Sweep:
    """What latents after the first reply of an episode do to its query.

    asked  the system prompt of that episode
    """
    n = agent.settings.n_soft
    prompt = agent.prompt(asked, one.query, clip)
    ids = list(one.turns[0].reply.ids)
    if agent.refine_token_id in ids:
        branches = agent.replay([prompt], [ids]).refine_contexts
    else:  # it asked for no search: as if it had
        branches = [branch for _, branch in agent.append_refine([prompt], [ids])]
    latents = sqr.soft_tokens(agent, branches, n)  # (1, N, D)
    vecs = sqr.prefix_queries(made, agent.heads, [one.query], latents)[0].cpu().numpy()  # (N + 1, D)
    scores = vectors.scores(vecs)  # (N + 1, V)
    right, shown = vectors.column(one.gt_video), vectors.column(one.turns[0].shown_id)
    cosines = {"right": scores[:, right], "shown": scores[:, shown], "best": scores.max(axis=1)}
    prompt, _ = made.query_prompt(one.query)
    words = made.model.get_input_embeddings()(torch.tensor(prompt.ids, device=latents.device))
    return Sweep(
        vecs,
        search_index.ranks(scores, np.full(n + 1, right)),
        cosines | {"typed": vecs @ vecs[0]},
        *(values[0].norm(dim=-1).cpu().numpy() for values in (latents, agent.heads.to_engine(latents))),
        words.float().norm(dim=-1).cpu().numpy(),
    )


def sweeps(profile: Profile, dataset: str, vectors: search_index.Vectors, ways: dict) -> dict[str, Sweep]:
    """`sweep` of one query by several policies: {name: (system of `evaluate`, weights, its episode)}."""
    done = {}
    with video_reader.Reader(profile.video_fps, profile.max_frames) as reader:
        for name, (system, weights, one) in ways.items():
            path = annotations.find_videos(profile.data_dir(dataset) / "videos", [one.turns[0].shown_id])[
                0
            ].path
            made, agent = runner.load_pair(profile, runner.SYSTEMS[system], weights)
            asked = prompt_text.SYSTEM_ZS if runner.SYSTEMS[system].append_refine else agent.settings.system
            done[name] = sweep(made, agent, vectors, one, reader.read(path), asked)
    return done


def sweep_series(dataset: str, done: dict[str, Sweep]) -> dict[str, list]:
    """S2: rank and cosines by number of latents, per policy."""
    series = {}
    for name, swept in done.items():
        for key, values in ({"rank": swept.ranks} | swept.cosines).items():
            series[f"S2/{dataset}/{name}/{key}"] = [[n, value] for n, value in enumerate(values)]
    return series


def rewrites(runs: dict[str, list[Episode]], desc_id: int) -> pd.DataFrame:
    """What each refinement made of the first look of one query: words, rank before and after."""
    rows = {}
    for system, walked in runs.items():
        (turn,) = (one.turns[0] for one in walked if one.desc_id == desc_id)
        after = "—" if turn.rank_out is None else turn.rank_out
        rows[system] = {"the query becomes": becomes(turn), "rank before": turn.rank_in, "rank after": after}
    return pd.DataFrame(rows, dtype=object).T


def becomes(turn: records.Turn) -> str:
    """What stands in a query after a look, in words."""
    if turn.rank_out is None:
        accepted = turn.reply is not None and turn.reply.matched
        return "nothing: the video was accepted" if accepted else "nothing: no readable update"
    if turn.refine_kind == "walkdown":
        return "what it was"
    return turn.update_text or f"what it was and {turn.refine_tokens} latents"


# --- 06: refinements side by side


def sampled(profile: Profile, dataset: str, system: str) -> list[Episode]:
    """The episodes of one system on the sample of queries that refinements are compared on."""
    return episodes(profile, dataset, f"{system}-sample", like=system, count=profile.studies.sample_queries)


SHARES = ("vr@1_orig", "vr@1", "vr@1_failed", "vr@1_shown", "vcmr@0.5", "ver")
COSTS = {"tokens": "tokens", "seconds": "s", "generated": "tokens", "engine_calls": "calls", "turns": "looks"}


def side_by_side(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """S1: what each refinement gains, and what it costs.

    refined   percent of queries that were changed at least once
    tokens    of one refinement; seconds of one; generated, engine_calls, turns (looks) of a whole episode
    """
    numbers = {}
    for system, walked in runs.items():
        found = metrics.hits(walked, profile.vr_ks)
        chosen = {name: metrics.failed(walked) if name == "vr@1_failed" else walked for name in SHARES}
        row = {name: share(profile, chosen[name], found[name]) for name in SHARES}
        again = [any(turn.rank_out and turn.refine_tokens for turn in one.turns) for one in walked]
        row["refined"] = share(profile, walked, again)
        spent = metrics.costs(walked)
        spent |= {"seconds": spent["refine_seconds"]}
        row |= {key: Estimate(spent[key], len(walked), unit=unit) for key, unit in COSTS.items()}
        numbers |= {f"S1/{dataset}/{system}/{name}": number for name, number in row.items()}
    return numbers


def against(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """T3: what a refinement costs, and the R@1 that it gains: of all queries, of those that were refined at turn 1,
    and of those whose first search failed (points)."""
    numbers = {}
    for system, walked in runs.items():
        spent = metrics.costs(walked)
        keys = {"tokens": "tokens", "tokens_tagged": "tokens", "generated": "tokens", "refine_seconds": "s"}
        row = {
            key.removeprefix("refine_"): Estimate(spent[key], len(walked), unit=unit)
            for key, unit in keys.items()
        }
        groups = {"": walked, "_refined": metrics.refined(walked), "_failed": metrics.failed(walked)}
        for suffix, chosen in groups.items():
            before, after = (metrics.vr_hits(chosen, 1, which).astype(int) for which in ("orig", "final"))
            gained = after - before
            row[f"gain{suffix}"] = replace(share(profile, chosen, gained), unit="points")
        numbers |= {f"T3/{dataset}/{system}/{name}": number for name, number in row.items()}
    return numbers


def only(walked: list[Episode], ids) -> list[Episode]:
    """The episodes of some queries, in the order of `ids`."""
    by_id = {one.desc_id: one for one in walked}
    return [by_id[desc_id] for desc_id in ids]


def difference(profile: Profile, mine, theirs, videos) -> dict[str, str]:
    """How far hits (Q,) are ahead of others on the same queries, in points: paired, clustered by right video (Q,)."""
    rng = np.random.default_rng(profile.seed)
    low, high = statistics.paired_bootstrap(mine, theirs, videos, profile.bootstrap_samples, rng=rng)
    points = metrics.percent(mine) - metrics.percent(theirs)
    better = "yes" if low > 0 else "no" if high < 0 else "not shown"
    return {"points": f"{points:+.1f}", "95 % interval": f"{low:+.1f} to {high:+.1f}", "better": better}


def paired(profile: Profile, runs: dict[str, list[Episode]]) -> pd.DataFrame:
    """R@1 after against before: queries gained and lost, and the `difference`."""
    rows = {}
    for system, walked in runs.items():
        after, before = metrics.vr_hits(walked, 1), metrics.vr_hits(walked, 1, "orig")
        rows[system] = {"gained": int((after > before).sum()), "lost": int((after < before).sum())}
        rows[system] |= difference(profile, after, before, [one.gt_video for one in walked])
    return pd.DataFrame(rows).T
