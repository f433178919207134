"""Make a page with one card per search: how soft and rewritten queries went on from the same first search.

The cards are the whole sample of test queries that notebook 06 compares refinements on. A card is plain data here;
templates/qualitative.html shows it. The page is static: styles and script inside, films and strips of frames beside it,
nothing loaded from elsewhere, every text escaped.

runs/<profile>/<dataset>/seed-<n>/qualitative/   index.html, cards.json, films.json, <dataset>/<video>.{mp4,webp}
results/<profile>/qualitative/                   all data sets on one page, where videos are rendered
"""

import functools
import json
import re
import shutil
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import numpy as np
from PIL import Image

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, previews
from vsr1.evaluation import metrics
from vsr1.loop import moments, records
from vsr1.loop.records import Episode, Turn
from vsr1.mini import captions, teacher, world
from vsr1.mini.world import Moment
from vsr1.report import templates

SYSTEMS = {"sqr": ("vsr1", "SQR")}  # system: its file of episodes, its name on the page
SYSTEMS |= {f"hqr-{kind}": (f"hqr-{kind}-sample", f"HQR {kind}") for kind in ("blind", "seen", "reasoned")}
SAMPLES = 6  # cards that the report shows
OUTCOMES = {  # by the rank after the last search; HQR rescues where at least one variant does
    "sqr": "rescued by SQR alone",
    "both": "rescued by SQR and HQR",
    "hqr": "rescued by HQR alone",
    "none": "rescued by none",
    "harmed": "right at first, lost by some",
    "kept": "right at first, kept by all",
}

# --- Searches and what became of them


def searches(profile: Profile, dataset: str) -> list[dict[str, Episode]]:
    """Return {system: its episode} of each query of the sample, in its order, with as many turns as headlines count."""
    runs, remedy = {}, f"run notebook 06_sqr_vs_hqr on {dataset} first"
    for system, (name, _) in reversed(SYSTEMS.items()):  # SQR, which was run on all test queries, last
        path = profile.runs(dataset) / "episodes" / f"{name}.jsonl"
        if not path.exists():
            raise InputError(f"{path}: not there; {remedy}")
        episodes = metrics.headline(profile, records.read_episodes(path))
        runs[system] = {episode.desc_id: episode for episode in episodes}
        sample = next(iter(runs.values()))
        if lost := sample.keys() - runs[system].keys():
            raise InputError(f"{path}: query {min(lost)} is not in it; {remedy}")
    return [{system: runs[system][key] for system in SYSTEMS} for key in sample]


def rank(episode: Episode, which="final") -> int:
    """Return the rank of the right video after the last search, or another of `metrics.true_ranks`."""
    return int(metrics.true_ranks([episode], which)[0])


def outcome(search: dict[str, Episode]) -> str:
    """Return the key of OUTCOMES."""
    soft, *hard = (rank(episode) == 1 for episode in search.values())
    if rank(search["sqr"], "orig") == 1:
        return "kept" if soft and all(hard) else "harmed"
    return {(True, True): "both", (True, False): "sqr", (False, True): "hqr"}.get((soft, any(hard)), "none")


def lead(search: dict[str, Episode]) -> tuple[int, int]:
    """Return how far SQR ends before the best HQR: (whether it alone finds the moment, IoU 0.5; ranks)."""
    soft_hit, *hard_hits = (int(metrics.vcmr_hits([episode], 0.5)[0]) for episode in search.values())
    soft_rank, *hard_ranks = map(rank, search.values())
    return soft_hit - max(hard_hits), min(hard_ranks) - soft_rank


def wrong_video(search: dict[str, Episode]) -> str | None:
    """Return the first wrong video that a system saw, or found at last; None where there was none."""
    turns = [turn for episode in search.values() for turn in episode.turns]
    videos = [turn.shown_id for turn in turns] + [turn.top1_out for turn in turns]
    return next((video for video in videos if video not in (None, search["sqr"].gt_video)), None)


# --- What matters in a query


def find_query_moment(episode: Episode, scenes: dict) -> Moment | None:
    """Return the rendered moment that a query describes; None for real video."""
    if not scenes:
        return None
    spans = {_span(moment): moment for moment in scenes[episode.gt_video].moments}
    return spans[tuple(episode.gt_span_ms)]


def closest(query_moment: Moment | None, video: str | None, scenes: dict) -> Moment | None:
    """Return the moment of a rendered video that has most of what the query describes."""
    return teacher.closest(query_moment, scenes[video].moments) if query_moment and video else None


def contrast(query_moment: Moment | None, shown_moment: Moment | None) -> dict[str, str]:
    """Return {what the query asks for: what a moment has in its place}, in words; empty without one of the two."""
    if not (query_moment and shown_moment):
        return {}
    differing = teacher.differing(query_moment, shown_moment)
    return {phrase(name, query_moment): phrase(name, shown_moment) for name in differing}


def describe_wrong(differences: dict[str, str]) -> str:
    """Describe a wrong video by its `contrast` with the query.

    >>> describe_wrong({"a red hat": "a blue hat"}), describe_wrong({})
    ('wrong video: a blue hat, not a red hat', 'wrong video')
    """
    pairs = "; ".join(f"{shown}, not {wanted}" for wanted, shown in differences.items())
    return f"wrong video: {pairs}" if pairs else "wrong video"


def phrase(name: str, moment: Moment) -> str:
    """Return one attribute as captions have it; an object and its colour are one phrase."""
    if name in ("object", "colour"):
        return f"{moment.colour} {moment.object}"
    return captions.phrase(name, moment)


def _span(moment) -> tuple[int, int] | None:
    return moment and moments.span_ms((moment.start, moment.end))


def dropped(query: str, updates: list[str]) -> list[str]:
    """Return the words of a query that are in no rewrite, short ones left out.

    >>> dropped("A man opens the red door", ["a man at a door", "the man opens it"])
    ['red']
    """
    rewritten = set(re.findall(r"\w+", " ".join(updates).lower()))
    return [word for word in re.findall(r"\w{3,}", query) if updates and word.lower() not in rewritten]


def pieces(text: str, phrases) -> list[tuple[str, bool]]:
    """Split a text into (piece, whether it is one of the phrases), longest first.

    >>> pieces("<i>A red hat", ["red", "RED HAT"])
    [('<i>A ', False), ('red hat', True), ('', False)]
    """
    pattern = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True)) or r"(?!)"
    return [(part, n % 2 == 1) for n, part in enumerate(re.split(rf"(?i)\b({pattern})\b", text))]


def reasoning(
    turn: Turn,
    query_moment: Moment | None = None,
    shown_moment: Moment | None = None,
    max_letters: int | None = None,
) -> list[tuple[str, bool, str]]:
    """Split the reasoning of a reply into (step, whether it ends with "no", what is false of it in words).

    Nothing is called false without the rendered truth: `query_moment`, which the query describes, and `shown_moment`,
    the moment of the shown video that has most of it.
    """
    text = "" if turn.reply is None else turn.reply.text
    text = text.partition("</think>")[0].replace("<think>", "").strip()
    if max_letters is not None and len(text) > max_letters:
        text = f"{text[:max_letters].rpartition(' ')[0]} …"
    steps = [step for step in re.split(r"(?<=\.) ", text) if step]
    return [(step, step.endswith(" no."), _errors(step, query_moment, shown_moment)) for step in steps]


def _errors(step, query_moment, shown_moment):
    """Say what is false of one step, in words; nothing where it is true or cannot be compared."""
    statement = teacher.read_statement(step) if query_moment and shown_moment else None
    return "; ".join(statement.errors(query_moment, shown_moment)) if statement else ""


def marked_reply(profile: Profile, dataset: str, episode: Episode, turn: Turn) -> str:
    """Return a reply as plain text; where videos are rendered its false steps are ~~struck through~~ and corrected."""
    scenes = world.read_scenes(profile.data_dir(dataset) / "corpus") if profile.world else {}
    query_moment = find_query_moment(episode, scenes)
    steps = reasoning(turn, query_moment, closest(query_moment, turn.shown_id, scenes))
    if not steps:
        return turn.reply.text
    marked = " ".join(f"~~{step}~~ [{errors}]" if errors else step for step, _, errors in steps)
    return f"<think> {marked} </think>{turn.reply.text.partition('</think>')[2]}"


def ticks(seconds: float | None) -> list[tuple[int, float]]:
    """Return round seconds of a video, three to six of them, and where they lie on it in percent.

    >>> ticks(31.0)
    [(0, 0.0), (10, 32.3), (20, 64.5), (30, 96.8)]
    """
    if not seconds:
        return []
    step = next((step for step in (1, 2, 5, 10, 20, 30, 60, 120, 300) if seconds / step < 6), 600)
    return [(time, round(100 * time / seconds, 1)) for time in range(0, int(seconds) + 1, step)]


def ranks(turn: Turn) -> str:
    """Return the ranks of the right video before and after a refinement, in words."""
    return f"rank {_rank(turn.rank_in)} → {_rank(turn.rank_out)}"


def _rank(value) -> str:
    return "—" if value is None or value == metrics.UNRANKED else str(value)


# --- A card


class Cards:
    """Cards of one data set, with its films and, if they were rendered, their scenes.

    names  {system: its name on the page}
    """

    names: ClassVar = {system: name for system, (_, name) in SYSTEMS.items()}

    def __init__(self, profile: Profile, dataset: str, films: dict[str, dict]):
        self.dataset, self.films = dataset, films
        home = profile.data_dir(dataset) / "corpus"
        self.scenes = world.read_scenes(home) if profile.world else {}
        self.queries = annotations.read_fig(home / "test.jsonl")
        self.videos = len(annotations.gallery_ids(self.queries, home, "test"))

    def card(self, search: dict[str, Episode]) -> dict:
        """Return all that a card shows of one search: the query, both videos, a row per system, every turn."""
        soft, video = search["sqr"], wrong_video(search)
        moment_lead, rank_lead = lead(search)
        before, seconds = rank(soft, "orig"), self.film(soft.gt_video)["seconds"]
        query_moment, shown_moment = self.moments(soft, video)
        differences = self.differences(soft, video)
        turns = [turn for episode in search.values() for turn in episode.turns]
        updates = [turn.update_text for turn in turns if turn.update_text]
        query_phrases, wanted, instead = zip(*differences, strict=True) if differences else ((), (), ())
        phrases = list(query_phrases) if query_moment else dropped(soft.query, updates)
        stills = [self.still(soft.gt_video, soft.gt_span_ms, "wanted", wanted)]
        if video:
            title = "found first" if before > 1 else "found instead"
            span_ms = _span(shown_moment) or soft.gt_span_ms
            stills.append(self.still(video, span_ms, title, instead))
        return {
            "id": f"{self.dataset}-{soft.desc_id}",
            "dataset": self.dataset,
            "outcome": outcome(search),
            "gain": before - rank(soft),
            "found": moment_lead,
            "lead": rank_lead,
            "query": pieces(soft.query, phrases),
            "note": self.note(soft),
            "videos": self.videos,
            "seconds": seconds,
            "ticks": ticks(seconds),
            "stills": stills,
            "rows": [self.row(system, episode) for system, episode in search.items()],
            "turns": self.turns(search, phrases),
            "problems": [episode.problem for episode in search.values() if episode.problem],
        }

    def moments(self, episode: Episode, video: str | None) -> tuple[Moment | None, Moment | None]:
        """Return the moment that a query describes, and the one of a video that has most of it; None of real video."""
        query_moment = find_query_moment(episode, self.scenes)
        return query_moment, closest(query_moment, video, self.scenes)

    def differences(self, episode: Episode, video: str | None) -> list[tuple[str, str, str]]:
        """Return how a wrong video differs: (as the query says it, as its own video shows it, what is in its place)."""
        differing = contrast(*self.moments(episode, video))
        return [(wanted, wanted, shown) for wanted, shown in differing.items()]

    def note(self, episode: Episode) -> str:
        """Return what else a reader must know of a search."""
        return ""

    def reasoning(self, episode: Episode, turn: Turn) -> list[tuple[str, bool, str]]:
        """Return the steps of a reply, as `reasoning` does."""
        return reasoning(turn, *self.moments(episode, turn.shown_id))

    def film(self, video: str) -> dict:
        """Return the entry of films.json about a video."""
        return self.films.get(video, {"seconds": None, "times": [], "problem": "no such file"})

    def clip(self, video: str, start_ms: float, bands=()) -> dict:
        """Return a strip of frames that is a link to its film, which starts at a moment; or why there is none."""
        film = self.film(video)
        bands = dict.fromkeys((kind, span) for kind, span in bands if span is not None)
        styles = [(kind, previews.band(span, film["seconds"])) for kind, span in bands if film["times"]]
        link = {"source": quote(f"{self.dataset}/{video}"), "start": f"{start_ms / 1000:.1f}"}
        return film | link | {"video": video, "bands": styles}

    def still(self, video: str, span_ms, title: str, phrases) -> dict:
        """Return the frame of a strip that is nearest to the middle of a moment, and what matters in it."""
        times = self.film(video)["times"] or [0.0]
        column = int(np.abs(np.array(times) - sum(span_ms) / 2000).argmin())
        clip = self.clip(video, span_ms[0])
        return {"clip": clip, "title": title, "words": ", ".join(phrases), "column": column}

    def row(self, system: str, episode: Episode) -> dict:
        """Return one system in one line: its ranks, search by search, both moments on one bar, its end."""
        ranks = [rank(episode, "orig"), *(t.rank_out for t in episode.turns if t.rank_out is not None)]
        last = episode.turns[-1] if episode.turns else None
        named = last.span_ms if last and last.shown_is_gt else None
        bands = [("right", tuple(episode.gt_span_ms)), ("said", named and tuple(named))]
        return {
            "name": self.names[system],
            "ranks": " → ".join(map(_rank, ranks)),
            "won": ranks[-1] == 1,
            "bands": self.clip(episode.gt_video, 0, bands)["bands"],
            "end": _end(episode),
        }

    def turns(self, search: dict[str, Episode], phrases: list[str]) -> list[list[dict]]:
        """Return all turns of all systems: turn by turn, those that see the same video together."""
        turns = []
        for number in range(max(len(episode.turns) for episode in search.values())):
            by_video = {}  # {video: {system: its turn}}
            for system, episode in search.items():
                if number < len(episode.turns):
                    turn = episode.turns[number]
                    by_video.setdefault(turn.shown_id, {})[system] = turn
            turns.append([self.group(search["sqr"], group, phrases) for group in by_video.values()])
        return turns

    def group(self, episode: Episode, turns: dict[str, Turn], phrases: list[str]) -> dict:
        """Return one video, then what each system that saw it replied and did next."""
        video = next(iter(turns.values())).shown_id
        query_moment, shown_moment = self.moments(episode, video)
        if video == episode.gt_video:
            kind, span, title = "right", tuple(episode.gt_span_ms), "The right video"
        else:
            kind, span = "near", _span(shown_moment)
            title = f"A {describe_wrong(contrast(query_moment, shown_moment))}"
        named = [("said", turn.span_ms and tuple(turn.span_ms)) for turn in turns.values()]
        replies, first = [], {}  # the first system that gave a reply
        for system, turn in turns.items():
            first_system = first.setdefault(turn.reply, system)
            same = self.names[first_system] if first_system != system else None
            reply = _reply(turn, phrases, self.reasoning(episode, turn))
            replies.append({"system": system, "name": self.names[system], "same": same} | reply)
        clip = self.clip(video, (span or (0,))[0], [(kind, span), *named])
        return {"title": title, "clip": clip, "replies": replies}


def _reply(turn, phrases, steps) -> dict:
    """Return the reasoning and verdict of a reply, and what followed: a moment, soft tokens, or other words."""
    matched = None if turn.reply is None else turn.reply.matched
    seconds = re.fullmatch(r"([\d.]+ to [\d.]+)\.", steps[0][0]) if steps else None
    reply = {
        "reused": turn.reused,
        "steps": steps,
        "ranks": ranks(turn),
        "matched": matched,
        "about": seconds and f"{seconds[1]} s",
        "right": matched is not None and matched == turn.shown_is_gt,
        "moment": "",
        "tokens": None,
        "depths": ", ".join(map(_rank, turn.rank_by_depth)),
        "rewrite": None,
    }
    if turn.rank_out is None:
        if turn.span_ms is not None:
            start, end = np.array(turn.span_ms) / 1000
            overlap = f", IoU {turn.iou:.2f}" if turn.shown_is_gt else ""
            reply["moment"] = f", {start:.1f} to {end:.1f} s{overlap}"
    elif turn.update_text is None:
        reply["tokens"] = turn.refine_tokens
    else:
        reply["rewrite"] = pieces(turn.update_text, phrases)
    return reply


def _end(episode) -> str:
    """Say how a search ended, in a few words."""
    last = episode.turns[-1] if episode.turns else None
    if episode.stop_reason == "matched":
        return f"saw it, accepted it, IoU {last.iou:.2f}" if last.shown_is_gt else "accepted a wrong video"
    if episode.problem is not None:
        return "could not go on"
    saw_right = any(turn.shown_is_gt for turn in episode.turns)
    return "saw it, rejected it" if saw_right else "never saw the right video"


# --- The page


def make(profile: Profile, dataset: str) -> Path:
    """Write the page of one data set and return its folder; its films are a step."""
    chosen = searches(profile, dataset)
    videos, home = shown_videos(chosen), profile.data_dir(dataset) / "videos"
    code = cache.source_digest(previews.__name__)
    inputs = {"films": cache.metadata(home).get("key"), "videos": videos, "code": code}
    work = functools.partial(previews.make, home, videos, name=dataset)
    folder = cache.build(profile.runs(dataset) / "qualitative", inputs, work)
    cards = Cards(profile, dataset, json.loads((folder / "films.json").read_text(encoding="utf-8")))
    part = {"profile": profile.digest(), "dataset": dataset, "queries": len(cards.queries)}
    part["cards"] = [cards.card(search) for search in chosen]
    cache.write_json(folder / "cards.json", part)
    cache.write_text(folder / "index.html", page(profile, [part]))
    return folder


def shown_videos(chosen: list[dict[str, Episode]]) -> list[str]:
    """List the videos that cards of searches show."""
    shown = {turn.shown_id for search in chosen for episode in search.values() for turn in episode.turns}
    shown |= {search["sqr"].gt_video for search in chosen} | {wrong_video(search) for search in chosen}
    return sorted(shown - {None})


def page(profile: Profile, parts: list[dict], template="qualitative.html") -> str:
    """Return the whole page of some data sets, as `make` left them in cards.json."""
    cards = mixed(parts)
    values = {"parts": parts, "cards": cards, "counts": Counter(card["outcome"] for card in cards)}
    values |= {"outcomes": OUTCOMES, "strip": previews.STRIP, "rendered": bool(profile.world)}
    return templates.render(template, **values)


def in_turn(lists) -> list:
    """Return the first of each list, then the second of each, and so on.

    >>> in_turn([[1, 2, 3], [], [4]])
    [1, 4, 2, 3]
    """
    return [each for row in zip_longest(*lists) for each in row if each is not None]


def mixed(parts: list[dict]) -> list[dict]:
    """Return the cards of all data sets: outcomes in turn, and within an outcome data sets in turn."""
    wanted = ([[c for c in part["cards"] if c["outcome"] == kind] for part in parts] for kind in OUTCOMES)
    return in_turn(map(in_turn, wanted))


def samples(profile: Profile) -> list[dict]:
    """Return the first cards of the page of rendered videos, each with a `frame` of each of its stills."""
    parts, chosen = _parts(profile) if profile.world else {}, []
    homes = {part["dataset"]: folder for folder, part in parts.items()}
    for card in mixed(list(parts.values()))[:SAMPLES]:
        frames = []
        for still in card["stills"]:
            path = homes[card["dataset"]] / card["dataset"] / f"{still['clip']['video']}.webp"
            if path.exists():
                with Image.open(path) as strip:
                    width = strip.width // previews.STRIP
                    left = still["column"] * width
                    frames.append((still["title"], strip.crop((left, 0, left + width, strip.height))))
        chosen.append(card | {"frames": frames})
    return chosen


def sources(profile: Profile) -> list[Path]:
    """List the folders of cards and films that `make` may have left."""
    return [profile.runs(dataset) / "qualitative" for dataset in profile.datasets]


def _parts(profile):
    """Return {folder: its cards.json} of the data sets whose cards were made with these knobs."""
    files = [folder / "cards.json" for folder in sources(profile)]
    parts = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()}
    return {folder: part for folder, part in parts.items() if part["profile"] == profile.digest()}


def pages(profile: Profile) -> list[Path]:
    """Return the pages to link to: one for all data sets in results/; of real video those in runs/, not for git."""
    parts = _parts(profile)
    if not profile.world:
        return [folder / "index.html" for folder in parts]
    return [profile.results() / "qualitative" / "index.html"] if parts else []


def publish(profile: Profile) -> list[Path]:
    """Write the page of rendered videos with its films to results/ and return the paths.

    Films in results/ of data sets without a page in this run stay, and so does the page if none has one.
    """
    parts, target = _parts(profile), profile.results() / "qualitative"
    if not profile.world or not parts:
        return []
    for folder, part in parts.items():
        shutil.rmtree(target / part["dataset"], ignore_errors=True)
        shutil.copytree(folder / part["dataset"], target / part["dataset"])
    cache.write_text(target / "index.html", page(profile, list(parts.values())))
    return [target / "index.html", *(target / part["dataset"] for part in parts.values())]
