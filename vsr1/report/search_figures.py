"""Choose searches by rule, never by hand, and publish their figures: F1, F6, and SQR against HQR (F7, A3 to A7, Q2).

Where videos are real their frames are not for git: such figures stay in runs/<profile>/figures/.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vsr1.config import Profile
from vsr1.data import video_reader
from vsr1.evaluation import metrics
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.report import plots, qualitative, results, search_panels
from vsr1.report.search_panels import FrameSource

COMPARED = ("F7", "A3", "A4", "A5", "A6", "A7")
IOU = 0.5  # from which a moment counts as found
PAPER = {  # read off its figures
    "F7": "the right video goes from rank 27 to 1 by SQR, HQR is wrong after two rewrites; moment 0.0 to 6.6 s",
    "F1": "the right video goes from rank 14 to 1, the rejected one from 1 to 9; moment 0.0 to 9.86 s",
    "F6": "the right video is on rank 28, 29, 7, 5, 2, 2, 1, 1, 1 with 0 to 8 tokens",
}
LEGEND = "Dashed red: the right video and moment; underlined: its frames. Orange: the moment that was named."
RENDERED = "Bold blue: what the first wrong video lacks. Red in a reply: what it finds amiss."

# --- Rules


def ahead(episode: Episode, other: Episode) -> bool:
    """Return whether a search ends with the right video and moment, and another, without a problem, does not.

    Both refine after the same first video, and the other does not even have the right video on rank 1 at last.
    """
    refined = min(len(episode.turns), len(other.turns)) > 1
    refined = refined and episode.turns[0].shown_id == other.turns[0].shown_id
    behind = other.problem is None and qualitative.rank(other) > 1
    return refined and behind and qualitative.rank(episode) == 1 and _found(episode)


def behind(episode: Episode, other: Episode) -> bool:
    """Return whether the other search is `ahead`."""
    return ahead(other, episode)


def in_two_turns(episode: Episode) -> bool:
    """Return whether a search is two turns: a wrong video that is rejected, then the right one and its moment."""
    wrong_first = len(episode.turns) == 2 and not episode.turns[0].shown_is_gt
    return wrong_first and bool(metrics.ver_hits([episode], 0)[0]) and _found(episode)


def three_on_top(episode: Episode) -> bool:
    """Return whether three videos are on rank 1 in turn as soft tokens are added at turn 1, the right one last."""
    tops = episode.turns[0].top1_by_depth if episode.turns else ()
    return len(set(tops)) == 3 and tops[-1] == episode.gt_video


def _found(episode):
    return bool(metrics.vcmr_hits([episode], IOU)[0])


@dataclass(frozen=True)
class Rule:
    """Which searches fit: a test of one or two episodes, and the rank of the right video at first."""

    fits: Callable
    first_ranks: tuple[int, int]  # from and to
    words: str

    def choose(self, searches: dict[str, list[tuple]]) -> dict[str, list[tuple]]:
        """Return {data set: the searches that fit, smallest query id first}; a search is a tuple of episodes."""
        low, high = self.first_ranks
        chosen = {}
        for dataset, tuples in searches.items():
            known = [episodes for episodes in tuples if episodes[0].rank_orig is not None]
            fit = [
                episodes
                for episodes in known
                if low <= episodes[0].rank_orig <= high and self.fits(*episodes)
            ]
            chosen[dataset] = sorted(fit, key=lambda episodes: episodes[0].desc_id)
        return chosen

    def first_rank(self) -> str:
        """Say where the right video is at first."""
        if self.first_ranks == ANY_FAILED:
            return "the first search failed (on whatever rank: a weaker rule, the stricter one finds none)"
        return "the right video is on rank {} to {} in the first search".format(*self.first_ranks)


ANY_FAILED = (2, metrics.UNRANKED - 1)
WINS = "both refine after the same video, {} accepts the right video with IoU 0.5 or more, and {} does not have it "
WINS += "on rank 1 at last"
SQR_WINS = Rule(ahead, (10, 40), WINS.format("SQR", "HQR"))  # ranks as in the paper's figures
HQR_WINS = Rule(behind, (10, 40), WINS.format("HQR", "SQR"))
TEASER = "a wrong one is rejected, and the right one accepted next with IoU 0.5 or more"
RULES = {
    "F1": Rule(in_two_turns, (10, 30), TEASER),
    "F6": Rule(three_on_top, (20, 40), "three videos are on rank 1 in turn, the right one last"),
}


def in_turn(chosen: dict[str, list]) -> list:
    """Return (data set, search): the first of each data set, then the second of each, and so on.

    >>> in_turn({"a": [1, 2], "b": [], "c": [3]})
    [('a', 1), ('c', 3), ('a', 2)]
    """
    rounds = zip_longest(*[[(dataset, search) for search in found] for dataset, found in chosen.items()])
    return [pair for pairs in rounds for pair in pairs if pair is not None]


def counts(searches: dict[str, list], chosen: dict[str, list]) -> str:
    """Say how many queries fit a rule.

    >>> counts({"a": [1, 2, 3], "b": [4]}, {"a": [1, 2], "b": []})
    '2 of 4 queries (a 2 of 3, b 0 of 1)'
    """
    fit, total = sum(map(len, chosen.values())), sum(map(len, searches.values()))
    parts = ", ".join(
        f"{dataset} {len(chosen[dataset])} of {len(all_)}" for dataset, all_ in searches.items()
    )
    return f"{fit} of {total} queries" + (f" ({parts})" if fit else "")


# --- Searches


def run_searches(profile: Profile) -> dict[str, list[tuple[Episode]]]:
    """Return {data set: SQR's episode of each test query, as a tuple of one}, where SQR was run."""
    files = {dataset: profile.runs(dataset) / "episodes" / "vsr1.jsonl" for dataset in profile.datasets}
    read = {dataset: records.read_episodes(path) for dataset, path in files.items() if path.exists()}
    return {dataset: [(episode,) for episode in episodes] for dataset, episodes in read.items()}


def run_pairs(profile: Profile) -> dict[str, list[tuple[Episode, Episode]]]:
    """Return {data set: (SQR's episode, HQR's) of each test query that both were run on}."""
    pairs = {}
    for dataset, searches in run_searches(profile).items():
        path = profile.runs(dataset) / "episodes" / "hqr-reasoned-sample.jsonl"
        hard = {episode.desc_id: episode for episode in records.read_episodes(path)} if path.exists() else {}
        if both := [(soft, hard[soft.desc_id]) for (soft,) in searches if soft.desc_id in hard]:
            pairs[dataset] = both
    return pairs


def first_of_rules(profile: Profile, dataset: str) -> list[Episode]:
    """Return the episodes of one data set whose ranks F1 and F6 would show."""
    searches = {dataset: run_searches(profile).get(dataset, [])}
    firsts = [in_turn(rule.choose(searches))[:1] for rule in RULES.values()]
    return list({episode.desc_id: episode for first in firsts for _, (episode,) in first}.values())


def ranks_by_depth(profile: Profile, dataset: str, episode: Episode) -> dict[str, list[int]] | None:
    """Return {video: its rank with 0, 1, .. N soft tokens} as notebook 08 left it.

    None where it left none, or where it ranks the right video otherwise than the episode does.
    """
    path = profile.runs(dataset) / "depth_ranks" / "ranks.json"
    ranks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ranks = ranks.get(str(episode.desc_id))
    agrees = ranks and ranks[episode.gt_video] == list(episode.turns[0].rank_by_depth)
    return ranks if agrees else None


# --- Figures


def comparisons(profile: Profile, source: Callable[[str], FrameSource]) -> dict[str, tuple[Figure, str]]:
    """Return {F7, A3 to A7, Q2: (figure, caption)}, as many as the rules find; Q2 is a search that HQR wins."""
    pairs = run_pairs(profile)
    sqr, hqr = SQR_WINS, HQR_WINS
    if not in_turn(hqr.choose(pairs)):
        hqr = Rule(behind, ANY_FAILED, HQR_WINS.words)
    chosen = {name: (pair, sqr) for name, pair in zip(COMPARED, in_turn(sqr.choose(pairs)), strict=False)}
    if won_by_hqr := in_turn(hqr.choose(pairs)):
        chosen["Q2"] = (won_by_hqr[0], hqr)
    _left_out(
        [name for name in (*COMPARED, "Q2") if pairs and name not in chosen],
        "no further search fits the rule",
    )
    figures = {}
    for name, ((dataset, (soft, hard)), rule) in chosen.items():
        figure = search_panels.compare(soft, hard, source(dataset))
        figures[name] = figure, _comparison_caption(profile, name, dataset, soft, hard, pairs, rule)
    return figures


def _comparison_caption(profile, name, dataset, soft, hard, pairs, rule):
    """Say what a comparison shows, and how many searches fit its rule and the opposite one."""
    ends = f"{qualitative.rank(soft)} by SQR and {qualitative.rank(hard)} by HQR"
    ends += " (reasoned, ours, the base model prompted)"
    title = f"SQR against HQR: the right video is on rank {soft.rank_orig} at first, in the end on {ends}."
    other = Rule(ahead if rule.fits is behind else behind, rule.first_ranks, "")
    words = (
        f"{rule.first_rank()}, {rule.words}: {counts(pairs, rule.choose(pairs))}. The same with SQR and HQR "
        f"exchanged: {counts(pairs, other.choose(pairs))}."
    )
    return _caption(profile, name, title, dataset, soft, words)


def singles(profile: Profile, source: Callable[[str], FrameSource]) -> dict[str, tuple[Figure, str]]:
    """Return {F1, F6: (figure, caption)}, those whose rules find a search."""
    searches, figures = run_searches(profile), {}
    chosen = {name: in_turn(rule.choose(searches))[:1] for name, rule in RULES.items()}
    _left_out([name for name in chosen if searches and not chosen[name]], "no search fits the rule")
    for name, firsts in chosen.items():
        for dataset, (episode,) in firsts:
            ranks = ranks_by_depth(profile, dataset, episode)
            if name == "F6" and ranks is None:
                why = f"notebook 08 left no ranks of {dataset}, or others than were recorded; run it again"
                _left_out([name], why)
                continue
            render = _teaser if name == "F1" else _by_soft_tokens
            figure, title = render(episode, source(dataset), ranks)
            words = f"{RULES[name].first_rank()}{',' if name == 'F1' else ' and'} {RULES[name].words}"
            words = f"{words}: {counts(searches, RULES[name].choose(searches))}."
            figures[name] = figure, _caption(profile, name, title, dataset, episode, words)
    return figures


def _teaser(episode, source, ranks):
    """Return F1 and what it shows."""
    after = ranks[episode.turns[0].shown_id][-1] if ranks else None
    title = f"A search in two turns: the right video goes from rank {episode.rank_orig} to 1"
    title += f", the rejected one from 1 to {after}." if after else "."
    return search_panels.two_turns(episode, source, after), title


def _by_soft_tokens(episode, source, ranks):
    """Return F6 and what it shows."""
    shown = ", ".join(map(str, ranks[episode.gt_video]))
    title = f"Ranks of three videos as soft tokens are added: the right one is on rank {shown}. ✓, ✗: what each has of "
    title += "the query, or in its place. Bands: which one is on rank 1."
    return search_panels.by_soft_tokens(episode, source, ranks), title


def _caption(profile, name, title, dataset, episode, rule):
    """Say what a figure shows, the rule that found it, and the paper's quantities where its figure is known."""
    world = "rendered videos and mini models" if profile.world else "real videos"
    paper = "Not in the paper." if name == "Q2" else "Paper: a further example, not known to us."
    paper = f"Paper, read off its figure: {PAPER[name]}." if name in PAPER else paper
    marks = f"{RENDERED} {LEGEND}" if profile.world else LEGEND
    picked = f"{dataset}, query {episode.desc_id}. Rule (smallest ids first, data sets in turn): {rule}"
    return f"{title} {picked} {paper} {marks} Profile {profile.name}, {world}."


def _left_out(names, why):
    if names:
        print(f"left out: figures {', '.join(names)}: {why}")


def _save(figure, folder, name, words):
    """Save the png with 256 colours: a third of the bytes, and drawings keep their edges."""
    path = plots.save(figure, folder, name, words)
    info = PngInfo()
    info.add_text("Description", words)  # as `plots.save` does
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, pnginfo=info, optimize=True)
    return path


def publish(profile: Profile) -> list[Path]:
    """Draw each figure whose rule finds a search among the episodes, and remove those of an earlier run."""
    folder = profile.results() / "figures" if profile.world else profile.runs("figures")
    with video_reader.Reader() as reader:
        source = functools.cache(lambda dataset: FrameSource(profile, dataset, reader))
        figures = comparisons(profile, source) | singles(profile, source)
        results.remove_figures(profile, folder, {*COMPARED, "Q2", "F1", "F6"} - figures.keys())
        return [_save(figure, folder, name, words) for name, (figure, words) in figures.items()]
