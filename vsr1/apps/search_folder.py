"""Your own videos: a folder, indexed once and kept up to date, searched by the loop that is evaluated.

Nobody knows the right video here. So every `Ranking` says rank 0, which no ranking has, and no number of `metrics` is
made of these episodes. A video that was rejected is not shown again (`episode.choose`: skip_rejected). What is searched
is a FAISS index over all readable videos of the folder and those below it.

indexes/<profile>/<hash of the folder's path>/    index.npz, and a page for each query in pages/
"""

import base64
import fcntl
import functools
import io
import json
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import cache, config
from vsr1.config import ROOT, InputError
from vsr1.data import annotations, clip_cache, previews, video_reader
from vsr1.data.video_writer import write_video
from vsr1.loop import episode, records, runner
from vsr1.loop.records import ORIGINAL, Episode, Ranking
from vsr1.models import checkpoints, loading, search_index
from vsr1.report import templates

SYSTEMS = [name for name in runner.SYSTEMS if not name.startswith("oracle") and name != "sqr-untrained"]
ENDINGS = tuple(
    ending for ending in annotations.CONTAINERS if len(ending) > 1
)  # a file without is no video here
PATIENCE = 120.0  # ours: seconds for one video, which may be an hour long
SAVED = 30.0  # ours: seconds of work that a kill may cost
# Of the film on the page; all ours: seconds on both sides of the moment, then at most so many fps, frames, pixels high.
AROUND, FPS, FRAMES, PIXELS, CRF = 2.0, 12, 240, 360, 28
CAVEAT = "The mini models know only the rendered world; what they say of any other video means nothing."


# --- The index: which files there are, and their vectors


@dataclass(frozen=True)
class File:
    """A video as it was when it was embedded."""

    size: int  # bytes
    changed: int  # ns, as the file system says
    digest: str  # of the content
    vec: np.ndarray = field(compare=False)  # (D,) length one; the content decides it


@dataclass(frozen=True)
class Index:
    """The videos of a folder that can be searched, and those that cannot."""

    files: dict[str, File]  # by name, relative to the folder
    unreadable: dict[str, str]  # name: why
    embedded: int  # videos that the engine looked at just now
    seconds: float  # that this took, without loading the engine

    def vecs(self) -> np.ndarray:
        """(V, D), in the order of the names."""
        return np.stack([file.vec for file in self.files.values()])


def find(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """({name: video file} of a folder and all below it, {name: why} of what cannot be listed); hidden ones are not."""
    found, closed = {}, []
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one with your videos")
    for place, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if name[0] != "."]
        paths = [Path(place, name) for name in names if name[0] != "." and name.lower().endswith(ENDINGS)]
        # A pipe would be waited for. A link that leads nowhere is one of the files that cannot be read.
        found |= {os.path.relpath(p, folder): p for p in paths if p.is_file() or p.is_symlink()}
    unlisted = {os.path.relpath(error.filename, folder): error.strerror for error in closed}
    if not found:
        why = "".join(f"; {plain(name)}: {problem}" for name, problem in unlisted.items())
        raise InputError(f"{folder}: no video in it or below; looked for {' '.join(ENDINGS)}{why}")
    return dict(sorted(found.items())), unlisted


def read_index(path: Path, key: str) -> dict[str, File]:
    """What was embedded before, by this engine under these settings; nothing where there is no index yet."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as kept:  # numpy reads no pickles unless told to
            if str(kept["key"]) != key:
                return {}
            facts = json.loads(str(kept["files"]))
            rows = zip(facts.items(), kept["vecs"], strict=True)
            return {name: File(*row, vec) for (name, row), vec in rows}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: a broken index ({error}); delete it and search again") from error


def write_index(path: Path, key: str, files: dict[str, File]) -> None:
    """The index as one file."""
    facts = {name: [file.size, file.changed, file.digest] for name, file in files.items()}
    vecs = np.stack([file.vec for file in files.values()])
    _write(path, lambda file: np.savez(file, key=key, files=json.dumps(facts), vecs=vecs))


def _write(path, fill):
    """`path`, filled by fill(file), complete or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            fill(file)
        os.replace(scratch, path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink()
        raise InputError(f"{path}: {error.strerror}; free some space, or use --index") from error


@contextmanager
def hold(home: Path):
    """The folder of an index, ours alone: a second search waits here until the first has brought it up to date."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / ".lock", "w")
    except OSError as error:
        raise InputError(f"{home}: {error.strerror}; name a folder for the index by --index") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refresh(profile, load, folder: Path, path: Path) -> Index:
    """The index in `path`, brought up to date: one content is embedded once, under whatever names it lies there.

    load  gives the engine; it is asked once all that can be wrong with folder and index has been looked at
    """
    (found, unreadable), key = find(folder), _key(profile)
    old, made, started = read_index(path, key), load(), time.monotonic()
    files, new = _compare(found, old, unreadable)
    clips = video_reader.read_videos(
        [found[same[0][0]] for same in new.values()], _reader(profile), profile.decode_workers
    )
    embedded, saved = 0, time.monotonic()
    for same, clip in zip(new.values(), cache.progress(clips, "embed videos", len(new)), strict=True):
        if clip.problem is not None:
            unreadable |= {name: clip.problem for name, _ in same}
            continue
        # One by one: reading takes longer, and frames as large as files have them fill the memory.
        (vec,) = made.embed_clips([clip])
        files |= {name: File(*facts, vec) for name, facts in same}
        embedded += 1
        if time.monotonic() - saved > SAVED:
            write_index(path, key, files)
            saved = time.monotonic()
    if not files:
        name, why = next(iter(unreadable.items()))
        raise InputError(f"{folder}: not one of {len(found)} videos could be read; {plain(name)}: {why}")
    files = dict(sorted(files.items()))
    if files != old:
        write_index(path, key, files)
    return Index(files, dict(sorted(unreadable.items())), embedded, time.monotonic() - started)


def _compare(found, old, unreadable):
    """({name: File} of what is known, {digest: [(name, its size, time and digest)]} of what is new).

    A file of the same name, size and time is taken as unchanged; any other is compared by content with what is known.
    What could not be read is tried again each time: its permissions may have changed, or a copy may be complete now.
    """
    known, files, new = {file.digest: file.vec for file in old.values()}, {}, {}
    for name, path in found.items():
        try:
            facts = path.stat().st_size, path.stat().st_mtime_ns
            if name in old and (old[name].size, old[name].changed) == facts:
                files[name] = old[name]
                continue
            digest = cache.file_digest(path)
        except OSError as error:
            unreadable[name] = error.strerror
            continue
        if digest in known:
            files[name] = File(*facts, digest, known[digest])
        else:
            new.setdefault(digest, []).append((name, (*facts, digest)))
    return files, new


def _key(profile) -> str:
    """A fingerprint of what decides a video's vector."""
    place = Path(loading.local_path(profile.engine))
    model = cache.file_digest(place) if place.is_dir() else profile.engine
    knobs = [
        profile.video_fps,
        profile.max_frames,
        profile.max_frame_pixels,
        profile.instruction,
        profile.dtype,
    ]
    return cache.fingerprint([model, knobs, cache.source_digest(__name__)])


def _reader(profile):
    return video_reader.Reader(profile.video_fps, profile.max_frames, timeout=PATIENCE, skip_slow=True)


# --- The search


def pick(profile, dataset=None, weights=None, system=None) -> tuple[str, str]:
    """(weights, system): those that are named; else the first policy trained in both stages, by soft queries (sqr);
    else the base policy, which looks at one video of the first ranking after the other (walkdown)."""
    homes = [profile.runs(name) / "grpo" / "vsr1" for name in ([dataset] if dataset else profile.datasets)]
    trained = [str(home) for home in homes if cache.metadata(home)]
    if dataset and not weights and not trained:
        raise InputError(f"{homes[0]}: not trained yet; train it, or leave --dataset out")
    if not weights:
        weights = trained[0] if trained and (dataset or system in (None, "sqr")) else profile.policy
    elif not weights.startswith(checkpoints.AUTHORS) and (Path(weights).exists() or weights[0] in "./~"):
        weights = str(_policy_folder(Path(weights).absolute()))  # else a name on the hub
    weights = checkpoints.resolve_checkpoint(weights, profile)
    soft = checkpoints.has_heads(weights)
    if system == "sqr" and not soft:
        raise InputError(f"{weights}: no soft-query heads in it; train it, or choose --system walkdown")
    return weights, system or ("sqr" if soft else "walkdown")


def _policy_folder(folder):
    """`folder`, if a policy lies in it: the library would fill a policy with what it finds in an engine, too."""
    if not list(folder.glob("*.safetensors")):
        why = "a pickle (.bin, .pt) could run any code and is never read"
        raise InputError(f"{folder}: not a folder with safetensors; {why}")
    config = annotations.parse_json(annotations.read_text(folder / "config.json"), folder / "config.json")
    kinds = config.get("architectures") if isinstance(config, dict) else None
    if kinds != [Qwen3VLForConditionalGeneration.__name__]:
        raise InputError(f"{folder}: its config.json names {kinds}, which is no policy")
    return folder


def search(
    profile, folder, query: str, *, dataset=None, weights=None, system=None, index=None, say=print
) -> dict:
    """What became of one query over the videos of `folder`, as `--json` prints it; a page about it is written.

    index  folder of the index and the pages; None: indexes/<profile>/<folder>, which `make clean` leaves
    say    is told, line by line, what a reader should know before the search
    """
    if profile.world:
        say(CAVEAT)
    folder, asked = Path(folder).absolute(), _asked(query)
    find(folder)
    weights, system = pick(profile, dataset, weights, system)
    say(f"weights: {_near(weights)}; system: {system}")
    home = Path(index or config.ROOT / "indexes" / profile.name / cache.fingerprint(str(folder))).absolute()
    pair = functools.cache(lambda: runner.load_pair(profile, runner.SYSTEMS[system], weights))
    with hold(home):
        kept = refresh(profile, lambda: pair()[0], folder, home / "index.npz")
    counts = f"{len(kept.files)} videos, {kept.embedded} embedded now, {kept.seconds:.1f} s"
    say(f"index: {counts}; {_near(home)}")
    for name, problem in kept.unreadable.items():
        say(f"cannot be read: {plain(name)}: {problem}")
    page = home / "pages" / f"{cache.fingerprint([asked.text, system, weights, profile.max_turns])}.html"
    told = {"query": asked.text, "folder": str(folder), "index": str(home), "page": str(page)}
    told |= {"profile": profile.name, "caveat": CAVEAT if profile.world else None}
    told |= {"weights": weights, "system": system, "videos": len(kept.files), "embedded": kept.embedded}
    started = time.monotonic()
    walked, order, clips = _walk(profile, *pair(), folder, kept, asked, system)
    told |= {"unreadable": kept.unreadable} | outcome(walked, order)
    told |= {"seconds": {"index": round(kept.seconds, 2), "search": round(time.monotonic() - started, 2)}}
    page.parent.mkdir(exist_ok=True)
    shot = film(folder / told["video"], clips[told["video"]], told["moment"])
    _write(page, lambda file: file.write(html_page(told, clips, *shot).encode()))
    return told


def _asked(text):
    """A query about nobody knows which video."""
    text = " ".join(text.split())
    if not text:
        raise InputError("the query is empty; say what to look for")
    if sign := annotations.SPECIAL_TOKEN.search(text):
        raise InputError(f"query {text!r}: {sign[0]} is a sign of the models' own; leave it out")
    return annotations.Query(0, text, "", (0.0, 0.0), text, None)


def _walk(profile, made, agent, folder, kept: Index, asked, system):
    """(the episode, the ranking of the query as typed, {name: Clip} of the videos it came across)."""
    names, vecs, kind = list(kept.files), kept.vecs(), runner.SYSTEMS[system]
    vectors = search_index.Vectors(names, vecs, [0], made.embed_texts([asked.text]))

    def look_up(pairs):
        """The whole gallery in the order of each query's vector; no video is known to be the right one."""
        states = [vectors.query_vecs[0] if state is ORIGINAL else state.vec for _, state in pairs]
        scores, rows = vectors.search(np.stack(states), len(names))  # (B, V)
        tops = [tuple(names[row] for row in order) for order in rows]
        return [Ranking(0, 0, top, None, float(best[0])) for top, best in zip(tops, scores, strict=True)]

    with video_reader.reader_pool(_reader(profile), profile.decode_workers) as read:
        clips = clip_cache.ClipCache(folder, (), read)
        clips.paths = {name: folder / name for name in names}
        wired = runner.EpisodeRunner(profile, kind, made, agent, vectors, clips)
        turns = profile.max_turns if kind.refine else 1
        # A greedy agent says the same of the same video: nobody waits for that. What it is worth stands in R1.
        run = records.Run("yours", "all", system, turns, wired.carry, profile.seed, "skip_rejected", False)
        (walked,) = episode.run_episodes([asked], look_up, wired.ask, wired.refine, run)
        seen = {name for turn in walked.turns for name in (turn.shown_id, turn.top1_out) if name}
        return walked, look_up([(asked, ORIGINAL)])[0].top, {name: clips.get([name])[0] for name in seen}


def outcome(walked: Episode, order: tuple[str, ...]) -> dict:
    """What an episode came to; `order` is the ranking of the query as typed.

    accepted  False: `video` is the one that the last search put first, and nobody has said that it is right
    moment    seconds; None: none was named
    """
    looks = [_look(turn, 1 + order.index(turn.shown_id)) for turn in walked.turns]
    accepted, last = walked.stop_reason == "matched", walked.turns[-1]
    video = last.shown_id if accepted or last.top1_out is None else last.top1_out
    moment = next((look["moment"] for look in reversed(looks) if look["video"] == video), None)
    end = {"accepted": accepted, "video": video, "moment": moment, "stop": walked.stop_reason}
    return end | {"problem": walked.problem, "looks": looks}


def _look(turn, rank):
    """One turn in words and numbers; `rank` is that of its video for the query as typed."""
    text = "" if turn.reply is None else turn.reply.text
    follow = {
        "kind": turn.refine_kind,
        "soft_tokens": turn.refine_tokens if turn.refine_kind == "sqr" else None,
    }
    follow |= {"words": turn.update_text, "best": turn.top1_out}
    return {
        "video": turn.shown_id,
        "rank": rank,
        "accepted": turn.reply and turn.reply.matched,  # None: no readable verdict
        "reasoning": text.rpartition("</think>")[0].replace("<think>", "").strip(),
        "reply": text,
        "moment": None if turn.span_ms is None else [time / 1000 for time in turn.span_ms],
        "next": None if turn.top1_out is None else follow,
    }


# --- What a reader sees


def plain(text: str) -> str:
    """`text` on one line, without what could steer a terminal; file names may hold anything.

    >>> plain("a\\x1b[2Jb\\nc")
    'a�[2Jb�c'
    """
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75.25), clock(59.96)
    ('01:15.2', '01:00.0')
    """
    tenths = round(seconds * 10)
    return f"{tenths // 600:02}:{tenths % 600 / 10:04.1f}"


def _near(path):
    """A path as seen from the clone, if it lies there."""
    return str(path).removeprefix(f"{ROOT}{os.sep}")


def end(told: dict) -> str:
    """How a search ended, in one sentence."""
    at = "no moment named" if told["moment"] is None else " to ".join(map(clock, told["moment"]))
    if told["accepted"]:
        return f"Found: {plain(told['video'])}, {at}"
    why = f" ({told['problem']})" if told["problem"] else ""
    seen = "not accepted" if told["video"] in [look["video"] for look in told["looks"]] else "not looked at"
    return plain(f"No video was accepted{why}; best candidate, unverified ({seen}): {told['video']}, {at}")


def said(look: dict) -> tuple[str, str]:
    """(the reasoning of a look, its verdict and what followed it)."""
    reasoning = look["reasoning"] or "(no reasoning)"
    verdict = {True: "accepted", False: "rejected", None: "no readable verdict"}[look["accepted"]]
    if (follow := look["next"]) is None:
        return plain(reasoning), verdict
    if follow["kind"] == "walkdown":
        return plain(reasoning), f"{verdict}; goes down the ranking"
    added = f"adds {follow['soft_tokens']} soft tokens to the query"
    then = added if follow["words"] is None else f"searches for: {follow['words']}"
    return plain(reasoning), plain(f"{verdict}; {then}; best now: {follow['best']}")


def lines(told: dict) -> Iterator[str]:
    """The walk for a terminal."""
    yield f"query: {plain(told['query'])}"
    for number, look in enumerate(told["looks"], 1):
        yield f"look {number}: {plain(look['video'])}, rank {look['rank']} of {told['videos']} for the query as typed"
        yield from (f"    {line}" for line in said(look))
    yield end(told)
    yield f"page: {_near(told['page'])}"


def film(path: Path, clip: video_reader.Clip, moment) -> tuple[bytes, str]:
    """(MP4, H.264, of a moment and `AROUND` seconds on both sides, or of all of a video; which seconds these are).

    Of a video that cannot be read there are no bytes, and the reason.
    """
    if clip.problem is not None:
        return b"", clip.problem
    first, last = (0.0, clip.seconds) if moment is None else (moment[0] - AROUND, moment[1] + AROUND)
    first, last = max(0.0, first), min(clip.seconds, last)
    rate = Fraction(min(FPS, FRAMES / (last - first))).limit_denominator(100)
    height, width = clip.frames.shape[1:3]
    size = tuple(max(2, round(side * min(1, PIXELS / height) / 2) * 2) for side in (width, height))
    with video_reader.Reader(size=size, timeout=PATIENCE) as reader:
        part, tape = reader.read(path, np.arange(first, last, float(1 / rate))), io.BytesIO()
    if part.problem is not None:
        return b"", part.problem
    write_video(tape, part.frames, rate, CRF)
    return tape.getvalue(), f"The film runs from {clock(first)} to {clock(last)}, without sound."


def html_page(told: dict, clips: dict[str, video_reader.Clip], tape: bytes, about: str) -> str:
    """One file that loads nothing and runs nothing: the film, and each look with its frames; every text is escaped."""
    facts = {name: _near(told[name]) for name in ("folder", "videos", "profile", "weights", "system")}
    facts |= {f"cannot be read: {name}": problem for name, problem in told["unreadable"].items()}
    looks = [(look, *said(look), clips[look["video"]]) for look in told["looks"]]
    given = {
        "told": told,
        "looks": looks,
        "film": _data(tape),
        "about": about,
        "facts": facts,
        "end": end(told),
    }
    return templates.render("search.html", **given, plain=plain, strip=strip)


def strip(clip: video_reader.Clip, moment) -> dict:
    """A whole video as a time axis: its picture, the times below it, the band of a moment that was named in it."""
    picture, times = previews.strip(clip)
    picture.save(tape := io.BytesIO(), "webp", quality=60)
    band = previews.band(1000 * np.array(moment), clip.seconds) if moment else None
    return {"picture": _data(tape.getvalue()), "times": list(map(clock, times)), "band": band}


def _data(content):
    return base64.b64encode(content).decode()


def search_and_print(profile, videos, query: str, as_json: bool, options: dict) -> int:
    """Search a folder and print what came of it; the status is 0 if a video was accepted, else 1.

    as_json  one JSON object on stdout, all else on stderr
    options  dataset, weights, system and index as in `search`, and turns: at most so many; None means unset
    """
    if options["dataset"]:
        config.check_dataset(options["dataset"], "--dataset")
    if options["system"] not in (None, *SYSTEMS):
        raise InputError(f"--system {options['system']}: no such system; there are {', '.join(SYSTEMS)}")
    if turns := options.pop("turns"):
        profile = replace(profile, max_turns=turns)
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    result = search(profile, videos, query, say=say, **options)
    for line in [json.dumps(result)] if as_json else lines(result):
        print(line)
    return 0 if result["accepted"] else 1
