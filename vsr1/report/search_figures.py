"""Searches drawn whole, each picked by rule and never by hand: SQR against HQR (F7, A3 to A7, Q2), the teaser (F1),
what is found as soft tokens are added (F6).

`page` publishes them into results/<profile>/figures/; where videos are real their frames are not for git, and they
stay in runs/<profile>/figures/.
"""

import functools
import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import video_reader
from vsr1.evaluation import metrics, soft_token_sweep
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.models import search_index
from vsr1.report import canvas, plots, qualitative
from vsr1.report.canvas import Films

PAIRS = ("F7", "A3", "A4", "A5", "A6", "A7")
AGAINST, TEASER, GROWING = (10, 40), (10, 30), (20, 40)  # rank of the right video at first, as in PAPER.md
FAILED = (2, metrics.UNRANKED - 1)  # any first search that failed
IOU = 0.5  # from which a moment counts as found
PAPER = {  # read off its figures
    "F7": "the right video goes from rank 27 to 1 by SQR, HQR is wrong after two rewrites; moment 0.0 to 6.6 s",
    "F1": "the right video goes from rank 14 to 1, the rejected one from 1 to 9; moment 0.0 to 9.86 s",
    "F6": "the right video is on rank 28, 29, 7, 5, 2, 2, 1, 1, 1 with 0 to 8 tokens",
}
LEGEND = "Dashed red: the right video and moment; underlined: its frames. Orange: the moment that was named."
RENDERED = "Bold blue: what the first wrong video lacks. Red in a reply: what it finds amiss."

# --- Which searches


def ahead(one: Episode, other: Episode) -> bool:
    """Whether a search ends with the right video and moment, while another one, refined after the same first look and
    without a problem, does not even have that video on rank 1 at last."""
    refined = min(len(one.turns), len(other.turns)) > 1 and one.turns[0].shown_id == other.turns[0].shown_id
    behind = other.problem is None and qualitative.rank(other) > 1
    return refined and behind and qualitative.rank(one) == 1 and _found(one)


def in_two(one: Episode) -> bool:
    """Whether a search is two looks: a wrong video that is rejected, then the right one and its moment."""
    wrong_first = len(one.turns) == 2 and not one.turns[0].shown_is_gt
    return wrong_first and bool(metrics.ver_hits([one], 0)[0]) and _found(one)


def three_on_top(one: Episode) -> bool:
    """Whether three videos are on rank 1 in turn as latents are added after the first look, the right one last."""
    tops = one.turns[0].top1_by_depth if one.turns else ()
    return len(set(tops)) == 3 and tops[-1] == one.gt_video


def _found(one):
    return bool(metrics.vcmr_hits([one], IOU)[0])


def fitting(walks: dict[str, list[tuple]], rule: Callable, ranks: tuple[int, int]) -> dict[str, list[tuple]]:
    """{data set: those of its `walks` that fit a rule, smallest query id first}; a walk is one episode or several.

    ranks   from and to, of the right video in the first search
    """
    found = {}
    for dataset, some in walks.items():
        known = [walk for walk in some if walk[0].rank_orig is not None]
        fit = [walk for walk in known if ranks[0] <= walk[0].rank_orig <= ranks[1] and rule(*walk)]
        found[dataset] = sorted(fit, key=lambda walk: walk[0].desc_id)
    return found


def in_turns(found: dict[str, list]) -> list:
    """(data set, walk): the first of each data set, then the second of each, and so on.

    >>> in_turns({"a": [1, 2], "b": [], "c": [3]})
    [('a', 1), ('c', 3), ('a', 2)]
    """
    rounds = zip_longest(*[[(dataset, walk) for walk in some] for dataset, some in found.items()])
    return [one for some in rounds for one in some if one is not None]


def searches(profile: Profile) -> dict[str, list[tuple[Episode, Episode | None]]]:
    """{data set: (SQR's episode, HQR's or None) of each test query}, of the data sets that SQR was run on."""
    walks = {}
    for dataset in profile.datasets:
        folder = profile.runs(dataset) / "episodes"
        soft, hard = folder / "vsr1.jsonl", folder / "hqr-reasoned-sample.jsonl"
        if soft.exists():
            rewritten = {one.desc_id: one for one in records.read_episodes(hard)} if hard.exists() else {}
            walks[dataset] = [(one, rewritten.get(one.desc_id)) for one in records.read_episodes(soft)]
    return walks


def compared(profile: Profile) -> dict[str, list[tuple[Episode, Episode]]]:
    """{data set: (SQR's episode, HQR's) of each test query that both were asked}."""
    both = {dataset: [walk for walk in some if walk[1]] for dataset, some in searches(profile).items()}
    return {dataset: some for dataset, some in both.items() if some}


# --- Ranks of the other videos


def ranks_by_depth(profile: Profile, dataset: str, chosen: list[Episode]) -> dict[int, dict[str, list[int]]]:
    """{query id: {video: its rank with 0, 1, .. N latents of the first look}} of the videos that are best at some
    depth, in the order in which they are; a stage. Empty where the policy is gone."""
    home = profile.runs(dataset)
    weights = home / "grpo" / "vsr1"
    if not (weights / "vsr1.json").exists():
        return {}
    inputs = {
        "vectors": cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / "test").get("key"),
        "policy": cache.file_digest(weights),
        "episodes": [[one.desc_id, one.turns[0].shown_id, one.turns[0].reply.ids] for one in chosen],
        "code": cache.source_digest(__name__),
    }
    build = lambda folder: _rank(profile, dataset, str(weights), chosen, folder)  # noqa: E731
    folder = cache.build(profile.runs("plates") / dataset, inputs, build)
    kept = json.loads((folder / "ranks.json").read_text(encoding="utf-8"))
    return {int(key): ranks for key, ranks in kept.items()}


def _rank(profile, dataset, weights, chosen, folder):
    """Fill the folder of `ranks_by_depth`."""

    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    swept = soft_token_sweep.sweep_policies(
        profile, dataset, vectors, {one.desc_id: ("sqr", weights, one) for one in chosen}
    )
    ranks = {}
    for one in chosen:
        scores = vectors.scores(swept[one.desc_id].vecs)  # (N + 1, V)
        ranks[one.desc_id] = own = {}
        for video in dict.fromkeys([*one.turns[0].top1_by_depth, one.gt_video]):
            column = np.full(len(scores), vectors.column(video))
            own[video] = search_index.ranks(scores, column).tolist()
    cache.write_json(folder / "ranks.json", ranks)


# --- All of them


def pairs(profile: Profile, walks: dict, films: Callable[[str], Films]) -> dict[str, tuple[Figure, str]]:
    """{F7, A3 to A7, Q2: (figure, caption)}, as many as the rules find; Q2 is a search that HQR wins."""
    losing = lambda soft, hard: ahead(hard, soft)  # noqa: E731
    strict = in_turns(fitting(walks, losing, AGAINST))
    weaker = AGAINST if strict else FAILED
    chosen = dict(zip(PAIRS, in_turns(fitting(walks, ahead, AGAINST)), strict=False))
    chosen |= dict(zip(("Q2",), strict or in_turns(fitting(walks, losing, weaker)), strict=False))
    gone = [name for name in (*PAIRS, "Q2") if walks and name not in chosen]
    _left_out(gone, "no further search fits the rule")
    made = {}
    for name, (dataset, (soft, hard)) in chosen.items():
        ranks, (winner, loser) = (weaker, ("HQR", "SQR")) if name == "Q2" else (AGAINST, ("SQR", "HQR"))
        number = {"SQR": fitting(walks, ahead, ranks), "HQR": fitting(walks, losing, ranks)}
        ends = f"{qualitative.rank(soft)} by SQR and {qualitative.rank(hard)} by HQR (reasoned, ours, the base model prompted)"
        title = (
            f"SQR against HQR: the right video is on rank {soft.rank_orig} at first, in the end on {ends}."
        )
        rule = (
            f"{_first(ranks)}, both refine after the same look, {winner} accepts the right video with IoU {IOU} or "
            f"more, and {loser} does not have it on rank 1 at last: {counts(walks, number[winner])}. The same with "
            f"{winner} and {loser} exchanged: {counts(walks, number[loser])}."
        )
        figure = canvas.pair(soft, hard, films(dataset))
        made[name] = figure, _caption(profile, name, title, dataset, soft, rule)
    return made


def singles(profile: Profile, walked: dict, films: Callable[[str], Films]) -> dict[str, tuple[Figure, str]]:
    """{F1, F6: (figure, caption)}, those whose rules find a search."""
    walks, made = {dataset: [walk[:1] for walk in some] for dataset, some in walked.items()}, {}
    fit = {"F1": fitting(walks, in_two, TEASER), "F6": fitting(walks, three_on_top, GROWING)}
    chosen = {name: in_turns(found)[0] for name, found in fit.items() if any(found.values())}
    _left_out([name for name in fit if walks and name not in chosen], "no search fits the rule")
    ranks = {}  # {(data set, query id): {video: by depth}}
    for dataset in walks:
        own = {walk[0].desc_id: walk[0] for where, walk in chosen.values() if where == dataset}
        known = ranks_by_depth(profile, dataset, list(own.values())) if own else {}
        ranks |= {(dataset, key): by_depth for key, by_depth in known.items() if _agrees(own[key], by_depth)}
    for name, (dataset, (one,)) in chosen.items():
        by_depth = ranks.get((dataset, one.desc_id))
        if name == "F1":
            after = by_depth[one.turns[0].shown_id][-1] if by_depth else None
            title = f"A search in two turns: the right video goes from rank {one.rank_orig} to 1"
            title += f", the rejected one from 1 to {after}." if after else "."
            rule = f"{_first(TEASER)}, a wrong one is rejected, and the right one accepted next with IoU {IOU} or more"
            figure = canvas.teaser(one, films(dataset), after)
        elif by_depth is None:
            why = f"the trained policy of {dataset} is gone, or gives other ranks than were recorded"
            _left_out([name], why)
            continue
        else:
            shown = ", ".join(map(str, by_depth[one.gt_video]))
            title = f"Ranks of three videos as soft tokens are added: the right one is on rank {shown}. ✓, ✗: what "
            title += "each has of the query, or in its place. Bands: which one is on rank 1."
            rule = f"{_first(GROWING)} and three videos are on rank 1 in turn, the right one last"
            figure = canvas.growing(one, films(dataset), by_depth)
        said = f"{rule}: {counts(walks, fit[name])}."
        made[name] = figure, _caption(profile, name, title, dataset, one, said)
    return made


def _agrees(one, by_depth):
    """Whether latents computed again rank the right video as the episode has it."""
    return by_depth[one.gt_video] == list(one.turns[0].rank_by_depth)


def counts(walks: dict[str, list], found: dict[str, list]) -> str:
    """How many queries fit a rule.

    >>> counts({"a": [1, 2, 3], "b": [4]}, {"a": [1, 2], "b": []})
    '2 of 4 queries (a 2 of 3, b 0 of 1)'
    """
    fit, asked = sum(map(len, found.values())), sum(map(len, walks.values()))
    own = ", ".join(f"{dataset} {len(found[dataset])} of {len(some)}" for dataset, some in walks.items())
    return f"{fit} of {asked} queries" + (f" ({own})" if fit else "")


def _first(ranks):
    """Where the right video is at first, in words."""
    if ranks == FAILED:
        return "the first search failed (on whatever rank: a weaker rule, the stricter one finds none)"
    return f"the right video is on rank {ranks[0]} to {ranks[1]} in the first search"


def _caption(profile, name, title, dataset, one, rule):
    """What a plate shows, the rule that found it, the paper's quantities where its figure is known."""
    world = "rendered videos and mini models" if profile.world else "real videos"
    paper = "Not in the paper." if name == "Q2" else "Paper: a further example, not known to us."
    paper = f"Paper, read off its figure: {PAPER[name]}." if name in PAPER else paper
    marks = f"{RENDERED} {LEGEND}" if profile.world else LEGEND
    picked = f"{dataset}, query {one.desc_id}. Rule (smallest ids first, data sets in turn): {rule}"
    return f"{title} {picked} {paper} {marks} Profile {profile.name}, {world}."


def _left_out(names, why):
    if names:
        print(f"left out: figures {', '.join(names)}: {why}")


def _save(figure, folder, name, words):
    """The png with 256 colours: a third of the bytes, and drawings keep their edges."""
    path = plots.save(figure, folder, name, words)
    info = PngInfo()
    info.add_text("Description", words)  # as `gallery.save` does
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, pnginfo=info, optimize=True)
    return path


def publish(profile: Profile) -> list[Path]:
    """Each plate whose rule finds a search among the episodes that are there; a line for the others."""
    folder = profile.results() / "figures" if profile.world else profile.runs("figures")
    for name in (*PAIRS, "Q2", "F1", "F6"):
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    with video_reader.Reader() as reader:
        films = functools.cache(lambda dataset: Films(profile, dataset, reader))
        plates = pairs(profile, compared(profile), films) | singles(profile, searches(profile), films)
        return [_save(figure, folder, name, words) for name, (figure, words) in plates.items()]
