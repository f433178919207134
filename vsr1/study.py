"""What notebooks 02 and 06 measure: verdicts and spans where the video is given away, and what refinements do.

02 reads episodes of `known-right` and `known-wrong` (each test query with its right video, and with the engine's best
wrong one) and of the loop. 06 follows one query latent by latent, and puts refinements side by side on a sample.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vsr1 import corpus, engine, episode, evaluate, frames, gallery, metrics, policy, refine, survey
from vsr1.episode import Episode
from vsr1.params import Profile
from vsr1.results import Number, digits

WORDS = {True: "matched", False: "not_matched", None: "unreadable"}


def episodes(profile: Profile, dataset: str, system: str, **options) -> list[Episode]:
    """The episodes of one system, run now if they are not there."""
    return episode.read_episodes(evaluate.run_system(profile, dataset, system, **options))


def share(profile: Profile, chosen: list[Episode], values) -> Number:
    """A percentage of episodes with its 95 % interval, clustered by right video; missing where there are none."""
    if not len(chosen):
        return Number(None, 0)
    rng = np.random.default_rng(profile.seed)
    ci = metrics.bootstrap(values, [one.gt_video for one in chosen], profile.bootstrap, rng=rng)
    return Number(metrics.percent(values), len(chosen), ci, (profile.seed,))


# --- 02: a video that is given away


@dataclass(frozen=True)
class Known:
    """Every test query once with its right video and once with the engine's best wrong one: one look each."""

    right: list[Episode]
    wrong: list[Episode]
    durations: list[float]  # seconds, of the right videos

    @property
    def both(self) -> list[Episode]:
        """The looks of both halves."""
        return self.right + self.wrong


def known(profile: Profile, dataset: str) -> Known:
    """Both halves of the base model's known-video test."""
    queries = corpus.read_fig(profile.runs(dataset) / "corpus" / "test.jsonl")
    halves = [episodes(profile, dataset, f"known-{half}") for half in ("right", "wrong")]
    return Known(*halves, [query.duration for query in queries])


def known_numbers(profile: Profile, dataset: str, looked: Known) -> dict[str, Number]:
    """V1: how the base model judges and grounds, beside the floors of one that does not look."""
    ious = metrics.moment_ious(looked.right)
    values = {"verdict": (looked.both, metrics.ver_hits(looked.both))}
    values |= {
        f"verdict_{half}": (getattr(looked, half), metrics.ver_hits(getattr(looked, half)))
        for half in ("right", "wrong")
    }
    values |= {f"grounding@{m}": (looked.right, metrics.reaches(ious, m)) for m in metrics.THRESHOLDS}
    values |= {"miou": (looked.right, ious)}
    values |= {key: (looked.both, hits) for key, hits in readings(looked.both).items() if key != "cut"}
    numbers = {f"zs/{key}": share(profile, *pair) for key, pair in values.items()}
    told = evaluate.known_numbers(looked.right, looked.wrong, looked.durations, profile.seed)
    numbers["majority/verdict"] = Number(told["majority"], len(looked.both))
    for floor in ("wholevideo", "random"):
        for m in metrics.THRESHOLDS:
            numbers[f"{floor}/grounding@{m}"] = Number(told[f"{floor}@{m}"], len(looked.right))
        numbers[f"{floor}/miou"] = Number(told[f"{floor}_miou"], len(looked.right))
    return {f"V1/{dataset}/{name}": number for name, number in numbers.items()}


def readings(looked: list[Episode]) -> dict[str, np.ndarray]:
    """How replies can be read, (Q,) each, at the first turn.

    strict   the asked layout to the letter
    readable a verdict was found (the tolerant count)
    spanned  two times were found
    cut      it ended at the limit of new tokens
    """
    replies = [one.turns[0].reply if one.turns else None for one in looked]
    ways = {
        "strict": lambda reply: reply.strict,
        "readable": lambda reply: reply.matched is not None,
        "spanned": lambda reply: reply.span is not None,
        "cut": lambda reply: not reply.ended,
    }
    return {key: np.array([r is not None and way(r) for r in replies]) for key, way in ways.items()}


def confusion(looked: Known) -> pd.DataFrame:
    """Verdicts as counts: a row per half, a column per verdict; a video that could not be read has no verdict."""
    rows = {}
    for label, half in {"right video shown": looked.right, "wrong video shown": looked.wrong}.items():
        said = Counter(metrics.verdict(one, 0) if one.problem is None else "not run" for one in half)
        rows[label] = {WORDS[verdict]: said[verdict] for verdict in WORDS} | {"not run": said["not run"]}
    return pd.DataFrame(rows).T


def histogram(ious) -> list:
    """[left edge, percent] of overlaps: exactly 0 at -0.1, then ten bins that hold their left edge, the last also 1.

    >>> [pair for pair in histogram([0.0, 0.3, 1.0, 1.0]) if pair[1]]
    [[-0.1, 25.0], [0.3, 25.0], [0.9, 50.0]]
    """
    ious = np.asarray(ious, dtype=float)
    bins = np.where(ious > 0, np.minimum(np.floor(ious * 10 + metrics.SLACK), 9), -1)
    return [[bin / 10, metrics.percent(bins == bin)] for bin in range(-1, 10)]


def iou_series(dataset: str, looked: Known) -> dict[str, list]:
    """V2: histograms of overlap with the right moment, of the spans that were named and of the whole video."""
    truth = np.array([one.gt_span_ms for one in looked.right]) / 1000
    whole = metrics.span_iou([(0, seconds) for seconds in looked.durations], truth)
    both = {"zs": metrics.moment_ious(looked.right), "wholevideo": whole}
    return {f"V2/{dataset}/{system}/iou": histogram(ious) for system, ious in both.items()}


def cases(looked: Known) -> dict[str, Episode | None]:
    """Three looks picked by rule, the smallest query id of each kind; None where there is none of it."""

    def first(half, verdicts):
        found = [one for one in half if one.problem is None and metrics.verdict(one, 0) in verdicts]
        return min(found, key=lambda one: one.desc_id, default=None)

    wrong = [first(looked.right, (False, None)), first(looked.wrong, (True, None))]
    return {
        "right acceptance": first(looked.right, (True,)),
        "right rejection": first(looked.wrong, (False,)),
        "wrong verdict": min(filter(None, wrong), key=lambda one: one.desc_id, default=None),
    }


def case_text(kind: str, one: Episode | None) -> str:
    """A look in words: query, truth, and the reply in full."""
    if one is None:
        return f"{kind}: none"
    turn, (start, end) = one.turns[0], np.array(one.gt_span_ms) / 1000
    truth = f"the right video, moment {start:.1f} to {end:.1f} s" if turn.shown_is_gt else "a wrong video"
    overlap = f", overlap {turn.iou:.2f}" if turn.shown_is_gt and turn.span_ms else ""
    shown = f"{kind}: query {one.desc_id}, shown {turn.shown_id} ({truth}{overlap})"
    return f"{shown}\n  query: {one.query}\n  reply: {turn.reply.text}"


def case_strips(folder: Path, chosen: dict[str, Episode | None]) -> list[gallery.Strip]:
    """A row of a contact sheet per look: frames around the moment of a right video, all along a wrong one."""
    rows = []
    with frames.Reader() as reader:
        for kind, one in chosen.items():
            if one is None:
                continue
            turn, span = one.turns[0], tuple(np.array(one.gt_span_ms) / 1000)
            path = corpus.find_videos(folder, [turn.shown_id])[0].path
            clip = reader.read(path)
            if turn.shown_is_gt:
                clip = reader.read(path, survey.moments_to_see(span, clip.seconds - 0.5))
            caption = f"{kind} ({WORDS[turn.reply.matched]}): {one.query}"
            rows.append(gallery.Strip(clip.frames, clip.seen_at, caption, span if turn.shown_is_gt else None))
    return rows


# --- the loop with the base model


def loop_numbers(profile: Profile, dataset: str, system: str, walked: list[Episode], names) -> dict:
    """T1: {name: Number} of the metrics called `names` of one system."""
    found = metrics.hits(walked, profile.vr_ks)
    return {f"T1/{dataset}/{system}/{name}": share(profile, walked, found[name]) for name in names}


def agreement(walked: list[Episode], looked: Known) -> tuple[int, int]:
    """(first looks that were also given away, those of them with the very same reply)."""
    given = {(one.desc_id, one.turns[0].shown_id): one.turns[0].reply for one in looked.both if one.turns}
    firsts = [(one.desc_id, one.turns[0]) for one in walked if one.turns]
    pairs = [(turn.reply, given[desc_id, turn.shown_id]) for desc_id, turn in firsts]
    return len(pairs), sum(one == other for one, other in pairs)


def table(numbers: dict[str, Number]) -> pd.DataFrame:
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
def sweep(made, agent, vectors: engine.Vectors, one: Episode, clip: frames.Clip, asked: str) -> Sweep:
    """What latents after the first reply of an episode do to its query.

    asked  the system prompt of that episode
    """
    n = agent.settings.n_soft
    prompt = agent.prompt(asked, one.query, clip)
    ids = list(one.turns[0].reply.ids)
    if agent.mark in ids:
        branches = agent.replay([prompt], [ids]).branches
    else:  # it asked for no search: as if it had
        branches = [branch for _, branch in agent.marked([prompt], [ids])]
    latents = refine.soft_tokens(agent, branches, n)  # (1, N, D)
    vecs = refine.by_depth(made, agent.heads, [one.query], latents)[0].cpu().numpy()  # (N + 1, D)
    column = {video: number for number, video in enumerate(vectors.video_ids)}
    scores = vecs @ vectors.video_vecs.T  # (N + 1, V)
    right, shown = column[one.gt_video], column[one.turns[0].shown_id]
    cosines = {"right": scores[:, right], "shown": scores[:, shown], "best": scores.max(axis=1)}
    prompt, _ = made.query_prompt(one.query)
    words = made.model.get_input_embeddings()(torch.tensor(prompt.ids, device=latents.device))
    return Sweep(
        vecs,
        metrics.ranks(scores, np.full(n + 1, right)),
        cosines | {"typed": vecs @ vecs[0]},
        *(values[0].norm(dim=-1).cpu().numpy() for values in (latents, agent.heads.B(latents))),
        words.float().norm(dim=-1).cpu().numpy(),
    )


def sweeps(profile: Profile, dataset: str, vectors: engine.Vectors, ways: dict) -> dict[str, Sweep]:
    """`sweep` of one query by several policies: {name: (system of `evaluate`, weights, its episode)}."""
    done = {}
    with frames.Reader(profile.video_fps, profile.max_frames) as reader:
        for name, (system, weights, one) in ways.items():
            path = corpus.find_videos(profile.runs(dataset) / "videos", [one.turns[0].shown_id])[0].path
            made, agent = evaluate.load_pair(profile, evaluate.SYSTEMS[system], weights)
            asked = policy.SYSTEM_ZS if evaluate.SYSTEMS[system].marked else agent.settings.system
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


def becomes(turn: episode.Turn) -> str:
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
    return episodes(profile, dataset, f"{system}-sample", like=system, count=profile.sample_queries)


SHARES = ("vr@1_orig", "vr@1", "vr@1_failed", "vr@1_shown", "vcmr@0.5", "ver")
COSTS = {"tokens": "tokens", "seconds": "s", "generated": "tokens", "engine_calls": "calls", "turns": "looks"}


def side_by_side(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Number]:
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
        row |= {key: Number(spent[key], len(walked), unit=unit) for key, unit in COSTS.items()}
        numbers |= {f"S1/{dataset}/{system}/{name}": number for name, number in row.items()}
    return numbers


def against(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Number]:
    """T3: what a refinement costs, and the R@1 that it gains: of all queries, of those that were refined at turn 1,
    and of those whose first search failed (points)."""
    numbers = {}
    for system, walked in runs.items():
        spent = metrics.costs(walked)
        keys = {"tokens": "tokens", "tokens_tagged": "tokens", "generated": "tokens", "refine_seconds": "s"}
        row = {
            key.removeprefix("refine_"): Number(spent[key], len(walked), unit=unit)
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
    low, high = metrics.paired_bootstrap(mine, theirs, videos, profile.bootstrap, rng=rng)
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
