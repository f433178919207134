"""Choose searches by rule, never by hand, and publish their figures: F1, F6, and SQR against HQR (F7, A3 to A7).

Where videos are real their frames are not for git: such figures stay in runs/<profile>/figures/.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from vsr1.config import Profile
from vsr1.data import video_reader
from vsr1.evaluation import metrics
from vsr1.loop import records
from vsr1.loop.records import Episode
from vsr1.report import canvas, plots, qualitative, results, search_panels
from vsr1.report.search_panels import FrameSource

HARD = "hqr-reasoned-sample"  # the episodes of HQR that SQR is compared with
IOU = 0.5  # from which a moment counts as found
PAPER = {  # read off its figures
    "F7": "the right video goes from rank 27 to 1 by SQR, HQR is wrong after two rewrites; moment 0.0 to 6.6 s",
    "F1": "the right video goes from rank 14 to 1, the rejected one from 1 to 9; moment 0.0 to 9.86 s",
    "F6": "the right video is on rank 28, 29, 7, 5, 2, 2, 1, 1, 1 with 0 to 8 tokens",
}
LEGEND = (
    "Dashed green: the right video and moment; underlined: its frames. Dark bar: the moment that was named."
)
RENDERED = (
    "Bold in the query: what the first video lacks. Bold in a reply: what it finds amiss. Vermillion, struck "
)
RENDERED += "through: what is false of the closest moment of the shown video, with the truth in brackets. "
RENDERED += canvas.BRIGHTENED

# --- Rules


def ahead(episode: Episode, other: Episode) -> bool:
    """Return whether a search ends with the right video and moment, and another, without a problem, does not.

    Both refine after the same first video, and the other does not even have the right video on rank 1 at last.
    """
    return level(episode, other) and _lost(other) and qualitative.rank(episode) == 1 and _is_hit(episode)


def level(episode: Episode, other: Episode) -> bool:
    """Return whether two searches refine after the same first video."""
    refined = min(len(episode.turns), len(other.turns)) > 1
    return refined and episode.turns[0].shown_id == other.turns[0].shown_id


def in_two_turns(episode: Episode) -> bool:
    """Return whether a search is two turns: a wrong video that is rejected, then the right one and its moment."""
    wrong_first = len(episode.turns) == 2 and not episode.turns[0].shown_is_gt
    return wrong_first and bool(metrics.ver_hits([episode], 0)[0]) and _is_hit(episode)


def three_on_top(episode: Episode) -> bool:
    """Return whether three videos are on rank 1 in turn as soft tokens are added at turn 1, the right one last."""
    tops = episode.turns[0].top1_by_depth if episode.turns else ()
    in_turn = [video for video, _ in itertools.groupby(tops)]
    return len(in_turn) == len(set(in_turn)) == 3 and in_turn[-1] == episode.gt_video


def _lost(episode):
    return episode.problem is None and qualitative.rank(episode) > 1


def _is_hit(episode):
    return bool(metrics.vcmr_hits([episode], IOU)[0])


FAILED = range(2, metrics.UNRANKED)  # ranks of the right video where the first search failed


@dataclass(frozen=True)
class Rule:
    """Which searches, each a tuple of episodes of one query, a figure may show."""

    words: str
    fits: Callable  # of the episodes
    first_ranks: range = FAILED  # of the right video in the first search

    def choose(self, searches: dict[str, list[tuple]]) -> dict[str, list[tuple]]:
        """Return {data set: the searches that fit, smallest query id first}."""
        chosen = {}
        for dataset, tuples in searches.items():
            # None, of a query that was not run, would be looked for in each number of the range.
            run = [episodes for episodes in tuples if episodes[0].rank_orig is not None]
            fit = [e for e in run if e[0].rank_orig in self.first_ranks and self.fits(*e)]
            chosen[dataset] = sorted(fit, key=lambda episodes: episodes[0].desc_id)
        return chosen

    def in_turn(self, searches: dict[str, list[tuple]]) -> list[tuple]:
        """Return (data set, search) of those that fit: the first of each data set, then the second of each ..."""
        chosen = self.choose(searches)
        return qualitative.in_turn([(dataset, search) for search in fit] for dataset, fit in chosen.items())

    def count(self, searches: dict[str, list[tuple]]) -> str:
        """Say how many queries fit, in all and of each data set."""
        counts = {dataset: len(fit) for dataset, fit in self.choose(searches).items()}
        total = f"{sum(counts.values())} of {sum(map(len, searches.values()))} queries"
        if not any(counts.values()):
            return total
        parts = (f"{dataset} {count} of {len(searches[dataset])}" for dataset, count in counts.items())
        return f"{total} ({', '.join(parts)})"


WINS = "both refine after the same video, {} accepts the right video with IoU 0.5 or more, and {} does not have it "
WINS += "on rank 1 at last"
TWO_VIDEOS = "a wrong {} is rejected, and the right one accepted next with IoU 0.5 or more"
FIRST = "the right video is on rank {} to {} in the first search"
ANY_RANK = "the first search failed (whatever the rank: a weaker rule), "
REFINED = "the first search failed, both refine after the same video, and "
# The first one as in the paper.
SQR_WINS = Rule(f"{FIRST.format(10, 40)}, {WINS.format('SQR', 'HQR')}", ahead, range(10, 41))
SQR_WINS_FROM_ANY_RANK = Rule(ANY_RANK + WINS.format("SQR", "HQR"), ahead)
HQR_WINS = Rule(ANY_RANK + WINS.format("HQR", "SQR"), lambda soft, hard: ahead(hard, soft))
BOTH = Rule(
    f"{REFINED}both accept the right video with IoU 0.5 or more",
    lambda soft, hard: level(soft, hard) and _is_hit(soft) and _is_hit(hard),
)
NEITHER = Rule(
    f"{REFINED}neither has the right video on rank 1 at last",
    lambda soft, hard: level(soft, hard) and _lost(soft) and _lost(hard),
)
COMPARED = {"F7": SQR_WINS, "A3": HQR_WINS, "A4": BOTH, "A5": NEITHER, "A6": SQR_WINS, "A7": HQR_WINS}
TWO_TURNS = Rule(f"{FIRST.format(10, 30)}, {TWO_VIDEOS.format('one')}", in_two_turns, range(10, 31))
TWO_TURNS_FROM_ANY_RANK = Rule(ANY_RANK + TWO_VIDEOS.format("video"), in_two_turns)
THREE_VIDEOS = "three videos are on rank 1 in turn, the right one last"
THREE_ON_TOP = Rule(f"{FIRST.format(20, 40)} and {THREE_VIDEOS}", three_on_top, range(20, 41))
THREE_ON_TOP_FROM_ANY_RANK = Rule(ANY_RANK + THREE_VIDEOS, three_on_top)
# Of a figure of one search: as in the paper, and what takes its place where no search of a run is like that.
ALONE = {
    "F1": (TWO_TURNS, TWO_TURNS_FROM_ANY_RANK),
    "F6": (THREE_ON_TOP, THREE_ON_TOP_FROM_ANY_RANK),
}


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
        path = profile.runs(dataset) / "episodes" / f"{HARD}.jsonl"
        hard = {episode.desc_id: episode for episode in records.read_episodes(path)} if path.exists() else {}
        if both := [(soft, hard[soft.desc_id]) for (soft,) in searches if soft.desc_id in hard]:
            pairs[dataset] = both
    return pairs


def first_of_rules(profile: Profile, dataset: str) -> list[Episode]:
    """Return the episodes of one data set whose ranks F1 and F6 would show, whatever the others have."""
    searches = run_searches(replace(profile, datasets=(dataset,)))
    firsts = [rule.in_turn(searches)[:1] for rules in ALONE.values() for rule in rules]
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


def figures(profile: Profile, reader: video_reader.Reader) -> Iterator[tuple[str, Figure, str]]:
    """Yield (name, figure, caption) of each figure whose rule finds a search; print which are left out."""
    source = functools.cache(lambda dataset: FrameSource(profile, dataset, reader))
    pairs, searches = run_pairs(profile), run_searches(profile)
    wanted = [(name, rule, pairs, index, _comparison) for name, (rule, index) in _compared(pairs).items()]
    renders = {"F1": _two_turns, "F6": _by_soft_tokens}
    for name, (rule, weaker) in ALONE.items():
        chosen = rule if rule.in_turn(searches) else weaker
        wanted.append((name, chosen, searches, 0, renders[name]))
    for name, rule, candidates, index, render in wanted:
        fit = rule.in_turn(candidates)
        if index >= len(fit):
            if candidates:
                print(f"left out: figure {name}: no further search fits its rule")
            continue
        dataset, episodes = fit[index]
        ranks = ranks_by_depth(profile, dataset, episodes[0])
        if name == "F6" and ranks is None:
            why = "notebook 08 left no ranks of it, or others than were recorded; run it again"
            print(f"left out: figure F6 of {dataset}: {why}")
            continue
        figure, title = render(*episodes, source(dataset), ranks)
        rule_words = f"{rule.words}: {rule.count(candidates)}."
        if rule in (SQR_WINS, SQR_WINS_FROM_ANY_RANK, HQR_WINS):
            exchanged = {dataset: [pair[::-1] for pair in both] for dataset, both in pairs.items()}
            rule_words += f" The same with SQR and HQR exchanged: {rule.count(exchanged)}."
        yield name, figure, _caption(profile, name, title, dataset, episodes[0], rule_words)


def _compared(pairs):
    """Return {figure: (rule, index of its search among those that fit)} of COMPARED; no search is shown twice.

    Where a run has no further search of the kind, another win of SQR takes its place, or one that neither finds.
    """
    chosen, shown = {}, set()
    for name, wanted in COMPARED.items():
        chosen[name] = wanted, len(wanted.in_turn(pairs))  # behind the last one
        rules = (wanted, SQR_WINS, SQR_WINS_FROM_ANY_RANK, NEITHER)
        fit = ((rule, index, pair) for rule in rules for index, pair in enumerate(rule.in_turn(pairs)))
        for rule, index, (dataset, (soft, _)) in fit:
            if (dataset, soft.desc_id) not in shown:
                shown.add((dataset, soft.desc_id))
                chosen[name] = rule, index
                break
    return chosen


def _comparison(soft, hard, source, _):
    """Return a figure of HQR beside SQR, and what it shows."""
    columns = {"Hard query refinement": (hard, hard.turns), "Soft query refinement": (soft, soft.turns)}
    ends = f"{qualitative.rank(soft)} by SQR and {qualitative.rank(hard)} by HQR"
    ends += " (reasoned, ours, the base model prompted)"
    title = f"SQR against HQR: the right video is on rank {soft.rank_orig} at first, in the end on {ends}."
    return search_panels.turn_by_turn(columns, source), title


def _two_turns(episode, source, ranks):
    """Return F1, turn below turn, and what it shows."""
    after = ranks[episode.turns[0].shown_id][-1] if ranks else None
    title = f"A search in two turns: the right video goes from rank {episode.rank_orig} to 1"
    title += f", the rejected one from 1 to {after}." if after else "."
    if count := source.count_statements(episode):
        title += f" False statements about the videos: {count[1]} of {count[0]}."
    return search_panels.one_search(episode, source), title


def _by_soft_tokens(episode, source, ranks):
    """Return F6 and what it shows."""
    right = ", ".join(map(str, ranks[episode.gt_video]))
    title = f"Ranks of three videos as soft tokens are added: the right one is on rank {right}. ✓, ✗: what each has of "
    title += "the query, or in its place. Bands: which one is on rank 1."
    return search_panels.by_soft_tokens(episode, source, ranks), title


def _caption(profile, name, title, dataset, episode, rule):
    """Say what a figure shows, the rule that found it, and the paper's quantities where its figure is known."""
    world = "rendered videos and mini models" if profile.world else "real videos"
    paper = "Paper: a further example, not known to us."
    if name in PAPER:
        paper = f"Paper, read off its figure: {PAPER[name]}."
    marks = f"{RENDERED} {LEGEND}" if profile.world else LEGEND
    picked = f"{dataset}, query {episode.desc_id}. Rule (smallest ids first, data sets in turn): {rule}"
    return f"{title} {marks} Profile {profile.name}, {world}. {picked} {paper}"


def _save(figure, folder, name, caption):
    """Save the png with 256 colours: a third of the bytes, and drawings keep their edges."""
    path = plots.save(figure, folder, name, caption, plots.KINDS)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    return plots.save_png(small, path, caption)


def sources(profile: Profile) -> list[Path]:
    """List the files that decide the figures: searches, ranks, and what was rendered."""
    of_runs = ("episodes/vsr1.jsonl", f"episodes/{HARD}.jsonl", "depth_ranks/ranks.json")
    of_data = ("corpus/scenes.jsonl", "videos/.step.json")
    paths = [profile.runs(dataset) / name for dataset in profile.datasets for name in of_runs]
    return paths + [profile.data_dir(dataset) / name for dataset in profile.datasets for name in of_data]


def publish(profile: Profile) -> list[Path]:
    """Draw each figure whose rule finds a search among the episodes, and remove those of an earlier run."""
    folder = profile.results() / "figures" if profile.world else profile.runs("figures")
    with video_reader.Reader() as reader:
        drawn = {name: (figure, caption) for name, figure, caption in figures(profile, reader)}
    results.remove_figures(profile, folder, {*COMPARED, "F1", "F6"} - drawn.keys())
    return [_save(figure, folder, name, caption) for name, (figure, caption) in drawn.items()]
