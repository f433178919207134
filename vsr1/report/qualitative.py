"""One card per search, on one page: how soft and rewritten queries went on from the same first look.

The cards are the sample of test queries that notebook 06 compares refinements on, all of it. The page is static: styles
and script inside, clips and frame strips beside it, nothing loaded from elsewhere, every text escaped.

runs/<profile>/<dataset>/qualitative/   index.html, cards.json, films.json, <dataset>/<video>.{mp4,webp}
results/<profile>/qualitative/          all data sets on one page, where videos are rendered
"""

import html
import json
import math
import os
import re
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, video_reader
from vsr1.data.video_writer import write_video
from vsr1.evaluation import metrics
from vsr1.loop import moments, records
from vsr1.loop.records import Episode, Turn
from vsr1.mini import captions, teacher, world
from vsr1.mini.world import ATTRIBUTES, Moment

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))
SYSTEMS = {"sqr": ("vsr1", "SQR")}  # system: its file of episodes, its name on the page
SYSTEMS |= {f"hqr-{way}": (f"hqr-{way}-sample", f"HQR {way}") for way in ("blind", "seen", "reasoned")}
OUTCOMES = {  # by the rank after the last search; HQR rescues where at least one variant does
    "sqr": "rescued by SQR alone",
    "both": "rescued by SQR and HQR",
    "hqr": "rescued by HQR alone",
    "none": "rescued by none",
    "harmed": "right at first, lost by some",
    "kept": "right at first, kept by all",
}
# Of the copies on the page; all ours: three data sets in about 6 MB, and the drawings can still be told apart.
FPS, FRAMES, PIXELS, CRF = 4, 200, 128, 38  # at most: fps, frames, height; and x264's crf
STRIP, STRIP_PIXELS, STRIP_QUALITY = 8, 96, 35  # frames, pixels of height, webp's quality

# --- Which searches, and what became of them


def walks(profile: Profile, dataset: str) -> list[dict[str, Episode]]:
    """{system: its episode} of each query of the sample, in its order."""
    runs, remedy = {}, f"run notebook 06_sqr_vs_hqr on {dataset} first"
    for system, (name, _) in reversed(SYSTEMS.items()):  # SQR, which walks all test queries, last
        path = profile.runs(dataset) / "episodes" / f"{name}.jsonl"
        if not path.exists():
            raise InputError(f"{path}: not there; {remedy}")
        runs[system] = {one.desc_id: one for one in records.read_episodes(path)}
        sample = next(iter(runs.values()))
        if lost := sample.keys() - runs[system].keys():
            raise InputError(f"{path}: query {min(lost)} is not in it; {remedy}")
    return [{system: runs[system][key] for system in SYSTEMS} for key in sample]


def rank(one: Episode, which="final") -> int:
    """Of the right video after the last search ("final"), or before; `metrics.NEVER` where it has no vector."""
    return int(metrics.true_ranks([one], which)[0])


def outcome(walk: dict[str, Episode]) -> str:
    """A key of OUTCOMES."""
    soft, *hard = (rank(one) == 1 for one in walk.values())
    if rank(walk["sqr"], "orig") == 1:
        return "kept" if soft and all(hard) else "harmed"
    return {(True, True): "both", (True, False): "sqr", (False, True): "hqr"}.get((soft, any(hard)), "none")


def lead(walk: dict[str, Episode]) -> tuple[int, int]:
    """How far SQR ends before the best HQR: (whether it alone finds the moment, IoU 0.5; ranks). Below 0: behind."""
    found, *others = (int(metrics.vcmr_hits([one], 0.5)[0]) for one in walk.values())
    soft, *hard = map(rank, walk.values())
    return found - max(others), min(hard) - soft


def wrong_video(walk: dict[str, Episode]) -> str | None:
    """The first wrong video that one of them saw, or found at last; None: there was none."""
    turns = [turn for one in walk.values() for turn in one.turns]
    seen = [turn.shown_id for turn in turns] + [turn.top1_out for turn in turns]
    return next((video for video in seen if video not in (None, walk["sqr"].gt_video)), None)


# --- What matters in a query


def asked_for(one: Episode, scenes: dict) -> Moment | None:
    """The rendered moment that a query describes; None for real video."""
    if not scenes:
        return None
    spans = {moments.span_ms((m.start, m.end)): m for m in scenes[one.gt_video].moments}
    return spans[tuple(one.gt_span_ms)]


def contrast(asked: Moment | None, seen: Moment | None) -> dict[str, str]:
    """{what was asked for: what a moment has in its place}, in words; empty without one of the two."""
    differing = teacher.differing(asked, seen) if asked and seen else ()
    return {_words(name, asked): _words(name, seen) for name in differing}


def _words(name, moment):
    """One attribute as captions have it; an object and its colour are one phrase."""
    thing = name in ("object", "colour")
    return f"{moment.colour} {moment.object}" if thing else captions.phrase(name, moment)


def dropped(query: str, updates: list[str]) -> list[str]:
    """The words of a query that no rewrite has kept, short ones left out.

    >>> dropped("A man opens the red door", ["a man at a door", "the man opens it"])
    ['red']
    """
    kept = set(re.findall(r"\w+", " ".join(updates).lower()))
    return [word for word in re.findall(r"\w{3,}", query) if updates and word.lower() not in kept]


def mark(text: str, phrases) -> str:
    """`text` as html with the phrases that stand in it marked, longest first.

    >>> mark("<i>A red hat", ["red", "RED HAT"])
    '&lt;i&gt;A <mark>red hat</mark>'
    """
    return "".join(f"<mark>{_safe(p)}</mark>" if found else _safe(p) for p, found in pieces(text, phrases))


def pieces(text: str, phrases) -> list[tuple[str, bool]]:
    """`text` as (piece, whether it is one of the phrases), longest first."""
    pattern = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True)) or r"(?!)"
    return [(part, n % 2 == 1) for n, part in enumerate(re.split(rf"(?i)\b({pattern})\b", text))]


def steps(thought: str) -> list[tuple[str, bool]]:
    """Reasoning as (step, whether it ends with "no", as the traces of `teacher` do where something is amiss)."""
    return [(step, step.endswith(" no.")) for step in re.split(r"(?<=\.) ", thought)]


def thought(turn: Turn) -> str:
    """What was thought before the verdict."""
    text = "" if turn.reply is None else turn.reply.text
    return text.partition("</think>")[0].replace("<think>", "").strip()


def ranks(turn: Turn) -> str:
    """Of the right video, before and after a refinement."""
    return f"rank {_rank(turn.rank_in)} → {_rank(turn.rank_out)}"


def _rank(value) -> str:
    return "—" if value is None or value == metrics.UNRANKED else str(value)


# --- Films and strips


def film(source: Path, target: Path) -> None:
    """A small copy of a video that browsers play, H.264, without sound."""
    with av.open(str(source)) as box:
        stream = box.streams.best("video")
        begin = (stream.start_time or 0) * stream.time_base  # clocks of cut or recorded films begin anywhere
        seconds = float(stream.duration * stream.time_base if stream.duration else box.duration / 1e6 - begin)
        rate = Fraction(min(FPS, FRAMES / seconds)).limit_denominator(100)
        write_video(target, _small_frames(box, stream, begin, rate), rate, CRF)


def _small_frames(box, stream, begin, rate):
    """The frames of a video at a lower rate and size."""
    height = min(PIXELS, stream.height) // 2 * 2
    width = round(height * stream.width / stream.height / 2) * 2
    number = 0
    for frame in box.decode(stream):
        if (frame.time - begin) * rate >= number:
            yield frame.reformat(width, height, "yuv420p")
            number += 1


def strip(clip: video_reader.Clip) -> tuple[Image.Image, list[float]]:
    """Frames spread evenly over a clip, side by side, and their seconds: a picture that is a time axis too."""
    wanted = (np.arange(STRIP) + 0.5) / STRIP * clip.seconds
    index = np.abs(clip.timestamps[:, None] - wanted).argmin(axis=0)  # (STRIP,)
    height, width = clip.frames.shape[1:3]
    size = (round(STRIP_PIXELS * width / height), STRIP_PIXELS)
    pictures = [np.asarray(Image.fromarray(frame).resize(size)) for frame in clip.frames[index]]
    return Image.fromarray(np.concatenate(pictures, axis=1)), [float(time) for time in clip.timestamps[index]]


def place(span_ms, seconds: float) -> str:
    """The style of a moment's band over its video, never too thin to be seen."""
    start, end = (min(100, time / seconds / 10) for time in span_ms)
    return f"left:{start:.1f}%;width:{max(0.6, end - start):.1f}%"


def shoot(profile: Profile, dataset: str, videos: list[str], folder: Path) -> None:
    """Film and strip of each readable video into `folder`/<dataset>, and films.json: {video: {seconds, times}}."""
    films, target = {}, folder / dataset
    target.mkdir(exist_ok=True)
    found = annotations.find_videos(profile.data_dir(dataset) / "videos", videos)
    with video_reader.Reader() as reader:
        for video in cache.progress([video for video in found if video.path], f"films {dataset}"):
            clip, made = reader.read(video.path), target / f"{video.id}.mp4"
            if clip.problem is None:
                picture, times = strip(clip)
                films[video.id] = {"seconds": clip.seconds, "times": times}
                if not made.exists():
                    picture.save(made.with_suffix(".webp"), quality=STRIP_QUALITY, method=6)
                    film(video.path, made.with_suffix(".part"))
                    os.replace(made.with_suffix(".part"), made)
    cache.write_json(folder / "films.json", films)


# --- A card


class Shelf:
    """What the cards of one data set refer to: its films and, if they were rendered, their scenes."""

    def __init__(self, profile: Profile, dataset: str, films: dict[str, dict]):
        self.dataset, self.films = dataset, films
        home = profile.data_dir(dataset) / "corpus"
        self.scenes = world.read_scenes(home) if profile.world else {}
        self.queries = annotations.read_fig(home / "test.jsonl")
        self.videos = len(annotations.gallery_ids(self.queries))

    def card(self, walk: dict[str, Episode]) -> str:
        """The html of one search: the query, what was wanted and found, all systems in a table, then look by look."""
        one, kind, video = walk["sqr"], outcome(walk), wrong_video(walk)
        asked, key, before = asked_for(one, self.scenes), f"{self.dataset}-{one.desc_id}", rank(one, "orig")
        seen, ahead = self.closest(asked, video), lead(walk)
        missed = contrast(asked, seen)
        updates = [turn.update_text for way in walk.values() for turn in way.turns if turn.update_text]
        matters = list(missed) if asked else dropped(one.query, updates)
        figures = self.still(one.gt_video, one.gt_span_ms, "wanted", missed.keys())
        if video:
            found = "found first" if before > 1 else "found instead"
            figures += self.still(video, _span(seen) or one.gt_span_ms, found, missed.values())
        rows = "".join(self.row(system, way) for system, way in walk.items())
        seconds = f"{self.films[one.gt_video]['seconds']:.0f} s" if one.gt_video in self.films else "?"
        return (
            f'<article id="{key}" tabindex="-1" data-set="{self.dataset}" data-outcome="{kind}" '
            f'data-gain="{before - rank(one)}" data-lead="{ahead[1]}" data-found="{ahead[0]}">'
            f'<header><b class="tag {kind}">{OUTCOMES[kind]}</b> <a href="#{key}">{key}</a></header>'
            f'<h2>{mark(one.query, matters)}</h2><div class="sum"><div class="pair">{figures}</div><table><thead><tr>'
            f'<th scope="col">refined by<th scope="col">rank<th scope="col" class="axis"><span>{self.videos}</span> '
            f'rank of the right video <span>1</span><th scope="col" class="axis"><span>0</span> moment '
            f'<span>{seconds}</span><th scope="col">in the end</thead><tbody>{rows}</tbody></table></div>'
            f"<details><summary>Look by look</summary>{self.looks(walk, asked, matters)}</details></article>"
        )

    def closest(self, asked: Moment | None, video: str | None) -> Moment | None:
        """The moment of a rendered video that has most of what was asked for."""
        return teacher.closest(asked, self.scenes[video].moments) if asked and video else None

    def clip(self, video: str, start_ms: float, inside: str, shape: str = "") -> str:
        """A strip that is a link to its film, which starts at a moment; a word for a video that cannot be read."""
        if video not in self.films:
            return f"<p>{_safe(video)} cannot be read</p>"
        name = quote(f"{self.dataset}/{video}")
        picture = f'<img loading="lazy" src="{name}.webp" alt="play {_safe(video)}"{shape}>'
        return f'<a class="clip" href="{name}.mp4#t={start_ms / 1000:.1f}">{picture}{inside}</a>'

    def still(self, video: str, span_ms, title: str, words) -> str:
        """The frame of a strip that is nearest to the middle of a moment, and what of the query matters in it."""
        times = self.films[video]["times"] if video in self.films else [0.0]
        place = int(np.abs(np.array(times) - sum(span_ms) / 2000).argmin())
        shape = f' style="width:{STRIP}00%;margin-left:-{place}00%"'
        said = f" {_safe(', '.join(words))}" if words else ""
        clip = self.clip(video, span_ms[0], "", shape)
        return f"<figure>{clip}<figcaption><b>{title}</b>{said}</figcaption></figure>"

    def band(self, video: str, kind: str, span_ms) -> str:
        """A moment as a piece of the width of its video; nothing without one."""
        if span_ms is None or video not in self.films:
            return ""
        return f'<i class="{kind}" style="{place(span_ms, self.films[video]["seconds"])}"></i>'

    def row(self, system: str, one: Episode) -> str:
        """One system in one line: its ranks, search by search; the right and the named moment on one bar; its end."""
        ranks = [rank(one, "orig")] + [turn.rank_out for turn in one.turns if turn.rank_out is not None]
        named = one.turns[-1].span_ms if one.turns and one.turns[-1].shown_is_gt else None
        bands = self.band(one.gt_video, "right", one.gt_span_ms) + self.band(one.gt_video, "said", named)
        return (
            f'<tr class="{"won" if ranks[-1] == 1 else ""}"><th scope="row">{SYSTEMS[system][1]}'
            f'<td>{" → ".join(map(_rank, ranks))}<td class="lane"><div>{self.lane(ranks)}</div>'
            f'<td class="time"><div>{bands}</div><td>{_end(one)}'
        )

    def lane(self, ranks: list[int]) -> str:
        """Ranks as dots on a logarithmic line: the last of the gallery at its left end, rank 1 at its right."""
        whole = math.log(max(2, self.videos))
        places = [round(100 - 100 * math.log(min(rank, self.videos)) / whole) for rank in ranks]
        low, high = sorted((places[0], places[-1]))
        dots = "".join(f'<i style="left:{place}%"></i>' for place in dict.fromkeys(places[::-1]))
        return f'<b style="left:{low}%;width:{high - low}%"></b>{dots}'

    def looks(self, walk: dict[str, Episode], asked, matters: list[str]) -> str:
        """All turns of all systems: look by look, those that see the same video together."""
        told = []
        for look in range(max(len(one.turns) for one in walk.values())):
            told.append(f"<h3>Look {look + 1}</h3>")
            at = {system: one.turns[look] for system, one in walk.items() if len(one.turns) > look}
            for video in dict.fromkeys(turn.shown_id for turn in at.values()):
                seen = {system: turn for system, turn in at.items() if turn.shown_id == video}
                told.append(self.look(walk["sqr"], video, seen, asked, matters))
        told += [f"<p>{_safe(one.problem)}</p>" for one in walk.values() if one.problem]
        return "".join(told)

    def look(self, query: Episode, video: str, seen: dict[str, Turn], asked, matters: list[str]) -> str:
        """One video, then what each system that saw it said and did."""
        if video == query.gt_video:
            kind, span, title = "right", query.gt_span_ms, "The right video"
        else:
            near = self.closest(asked, video)
            pairs = contrast(asked, near).items()
            kind, span = "near", _span(near)
            title = "A wrong video" + ": " * bool(pairs) + "; ".join(f"{b}, not {a}" for a, b in pairs)
        named = dict.fromkeys(turn.span_ms for turn in seen.values())
        bands = self.band(video, kind, span) + "".join(self.band(video, "said", one) for one in named)
        times = self.films[video]["times"] if video in self.films else []
        inside = f"{bands}<span>{''.join(f'<s>{time:.1f} s</s>' for time in times)}</span>"
        told, first = [], {}  # the first system that gave a reply
        for system, turn in seen.items():
            same = first.setdefault(turn.reply, system)
            said = _reasoning(turn) if same == system else f"says the same as {SYSTEMS[same][1]}. "
            said += _verdict(turn) + _next(turn, matters, asked, query.query)
            said = (
                f"sees that video again: same reply, same next query, {ranks(turn)}" if turn.reused else said
            )
            told.append(f'<li class="turn {system}"><b>{SYSTEMS[system][1]}</b> {said}')
        return f"<p>{_safe(title)}</p>{self.clip(video, (span or (0,))[0], inside)}<ul>{''.join(told)}</ul>"


def _span(moment) -> tuple[int, int] | None:
    return moment and moments.span_ms((moment.start, moment.end))


def _reasoning(turn) -> str:
    """What was thought before the verdict; steps that found something amiss stand out."""
    told = " ".join(f"<em>{_safe(s)}</em>" if amiss else _safe(s) for s, amiss in steps(thought(turn)))
    return f'<q class="think">{told}</q> ' if told else ""


def _safe(text) -> str:
    return html.escape(str(text))


def _verdict(turn) -> str:
    """The verdict and whether it is right: in words and with a mark, never by colour alone."""
    matched = None if turn.reply is None else turn.reply.matched
    if matched is None:
        return '<b class="bad">✗ no readable verdict</b>'
    fits = matched == turn.shown_is_gt
    word = f"{'accepted' if matched else 'rejected'}, {'rightly' if fits else 'wrongly'}"
    return f'<b class="{"good" if fits else "bad"}">{"✓" if fits else "✗"} {word}</b>'


def _next(turn, matters, asked, query) -> str:
    """What followed a verdict: a moment, soft tokens, or other words; the ranks before and after."""
    if turn.rank_out is None:
        if turn.span_ms is None:
            return ""
        start, end = np.array(turn.span_ms) / 1000
        return f", {start:.1f} to {end:.1f} s" + (f", IoU {turn.iou:.2f}" if turn.shown_is_gt else "")
    if turn.update_text is None:
        depths = ", ".join(map(_rank, turn.rank_by_depth))
        swept = f" <small>(with 0 to {turn.refine_tokens} of them: {depths})</small>" if depths else ""
        return f" → adds {turn.refine_tokens} soft tokens: <b>{ranks(turn)}</b>{swept}"
    words = [_words(name, asked) for name in ATTRIBUTES] if asked else dropped(query, [turn.update_text])
    lost = dict.fromkeys(word for word in words if word.lower() not in turn.update_text.lower())
    gone = f" <small>(not in it any more: {_safe(', '.join(lost))})</small>" if lost else ""
    return f" → writes <q>{mark(turn.update_text, matters)}</q>: <b>{ranks(turn)}</b>{gone}"


def _end(one) -> str:
    """How a search ended, in a few words."""
    last = one.turns[-1] if one.turns else None
    if one.stop_reason == "matched":
        return f"saw it, accepted it, IoU {last.iou:.2f}" if last.shown_is_gt else "accepted a wrong video"
    if one.problem is not None:
        return "could not go on"
    seen = any(turn.shown_is_gt for turn in one.turns)
    return "saw it, rejected it" if seen else "never saw the right video"


# --- The page


def make(profile: Profile, dataset: str) -> Path:
    """The folder with the page of one data set; its films are a stage."""
    home, walked = profile.runs(dataset), walks(profile, dataset)
    shown = {turn.shown_id for walk in walked for one in walk.values() for turn in one.turns}
    shown |= {found for walk in walked if (found := wrong_video(walk))}
    videos = sorted(shown | {walk["sqr"].gt_video for walk in walked})
    key, code = cache.metadata(profile.data_dir(dataset) / "videos").get("key"), cache.source_digest(__name__)
    inputs = {"films": key, "videos": videos, "code": code}
    folder = cache.build(home / "qualitative", inputs, lambda part: shoot(profile, dataset, videos, part))
    shelf = Shelf(profile, dataset, json.loads((folder / "films.json").read_text(encoding="utf-8")))
    made = {"profile": profile.digest(), "dataset": dataset, "queries": len(shelf.queries)}
    made["cards"] = [[outcome(walk), shelf.card(walk)] for walk in sorted(walked, key=lead, reverse=True)]
    cache.write_json(folder / "cards.json", made)
    (folder / "index.html").write_text(page(profile, [made]), encoding="utf-8")
    return folder


def fill(template: str, **said) -> str:
    """vsr1/`template` filled with what is `said`; every text in it is escaped."""
    return PAGES.get_template(template).render(said)


def page(profile: Profile, parts: list[dict]) -> str:
    """The whole page of some data sets, as `make` left them in cards.json."""
    counts = {part["dataset"]: Counter(kind for kind, _ in part["cards"]) for part in parts}
    return fill("qualitative.html", parts=parts, counts=counts, outcomes=OUTCOMES, world=bool(profile.world))


def publish(profile: Profile) -> list[Path]:
    """The pages to link to: one for all data sets in results/; where video is real, those in runs/, not for git."""
    files = [profile.runs(dataset) / "qualitative" / "cards.json" for dataset in profile.datasets]
    read = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in files if path.exists()}
    made = {folder: part for folder, part in read.items() if part["profile"] == profile.digest()}
    target = profile.results() / "qualitative"
    shutil.rmtree(target, ignore_errors=True)
    if not profile.world or not made:
        return [folder / "index.html" for folder in made]
    for folder, part in made.items():
        shutil.copytree(folder / part["dataset"], target / part["dataset"])
    (target / "index.html").write_text(page(profile, list(made.values())), encoding="utf-8")
    return [target / "index.html"]
