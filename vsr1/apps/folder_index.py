"""Index a folder of videos: embed each content once, and keep the vectors up to date.

A file of the same name, size and time is taken as unchanged; any other is compared by content with what is known.
A video that is longer than the frames of one look is embedded in windows that overlap.
"""

import codecs
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, decoder, video_reader
from vsr1.models import engine, loading

# A file without an extension is no video here.
EXTENSIONS = tuple(extension for extension in annotations.CONTAINERS if len(extension) > 1)
SOURCE_CODE = ".ts", ".mts", ".mod"  # of TypeScript and Go too
DECODE_TIMEOUT = 120.0  # ours: seconds for one video, which may be an hour long
SAVE_SECONDS = 30.0  # ours: seconds of work that a kill may cost, beside the long video that is worked on
# Ours: length of a window, in frames that fit one look; from window to window, in windows.
WINDOW, STEP = 1 / 2, 3 / 4


class Window(NamedTuple):
    """A part of a video that is compared with queries and shown to the agent; a short video is one."""

    video: str
    span: tuple[float, float]  # seconds of the file
    whole: bool = True

    @property
    def id(self) -> str:
        """Return the name of the file, with the seconds where it is a part: `film.mp4#t=24,56`."""
        return self.video if self.whole else f"{self.video}#t={self.span[0]:g},{self.span[1]:g}"


@dataclass(frozen=True)
class IndexedFile:
    """A video as it was when it was embedded."""

    size: int  # bytes
    changed: int  # ns, as the file system says
    digest: str  # of the content
    seconds: float
    spans: tuple[tuple[float, float], ...]  # of its windows; one is the whole video
    problem: str | None  # of the windows that could not be read
    vecs: np.ndarray = field(compare=False)  # (windows, D) length one; the content decides them


@dataclass(frozen=True)
class Unread:
    """A video that could not be read, as it was then."""

    size: int
    changed: int
    problem: str


@dataclass(frozen=True)
class FolderIndex:
    """The videos of a folder that can be searched, and those that cannot."""

    files: dict[str, IndexedFile]  # by name, relative to the folder
    unreadable: dict[str, str]  # name: why
    repeated: frozenset[str]  # names of `unreadable` that were not tried again, for they have not changed
    embedded: int  # videos that were embedded just now
    rebuilt: str | None  # what changed, so that all of them were embedded anew
    seconds: float  # that this took, without loading the engine

    def vecs(self) -> np.ndarray:
        """Return the vectors of all windows (W, D), in the order of `windows`."""
        return np.concatenate([file.vecs for file in self.files.values()])

    def windows(self) -> dict[str, Window]:
        """Return {id: window} of all videos; those of a video follow each other in time."""
        parts = [
            Window(name, span, span == (0.0, file.seconds))
            for name, file in self.files.items()
            for span in file.spans
        ]
        return {part.id: part for part in parts}


def find_videos(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """List a folder and all below it: ({name: video file}, {name: why it cannot be listed}), without hidden ones.

    Raises InputError where there is no folder, or no video in it.
    """
    videos, errors = {}, []
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one with your videos")
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if name[0] != "."]
        paths = [Path(parent, name) for name in names if name[0] != "." and name.lower().endswith(EXTENSIONS)]
        # A pipe would be waited for. A link that leads nowhere is one of the files that cannot be read.
        paths = [path for path in paths if path.is_symlink() or path.is_file()]
        videos |= {os.path.relpath(path, folder): path for path in paths if not _is_source_code(path)}
    unlisted = {os.path.relpath(error.filename, folder): error.strerror for error in errors}
    if not videos:
        why = "".join(f"; {plain(name)}: {problem}" for name, problem in unlisted.items())
        raise InputError(f"{folder}: no video in it or below; looked for {' '.join(EXTENSIONS)}{why}")
    return dict(sorted(videos.items())), unlisted


def _is_source_code(path):
    """Return whether a file that could be a program is text: no video stream begins with 512 bytes of it."""
    if not path.name.lower().endswith(SOURCE_CODE) or not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a sign may be cut at its end
    except (OSError, UnicodeDecodeError):
        return False
    return bool(head) and b"\0" not in head


def plain(text: str) -> str:
    """Return `text` on one line, without what could steer a terminal; file names may hold anything.

    >>> plain("a\\x1b[2Jb\\nc")
    'a�[2Jb�c'
    """
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def check_finite(vecs: np.ndarray, engine_name: str, source: str) -> np.ndarray:
    """Return vectors; InputError where a number is not finite, since no comparison with it means anything."""
    if not np.isfinite(vecs).all():
        raise InputError(
            f"{engine_name}: its vector of {plain(source)} holds numbers that are not finite; are the weights damaged, "
            "or too large for the profile's dtype?"
        )
    return vecs


# --- Windows


def reader(profile: Profile) -> video_reader.Reader:
    """Return a reader for files of any length; one that takes too long twice is a problem of that file alone."""
    return video_reader.Reader(profile.video_fps, profile.max_frames, timeout=DECODE_TIMEOUT, skip_slow=True)


def spans_of(seconds: float, profile: Profile) -> tuple[tuple[float, float], ...]:
    """Return the windows of a video from its first second to its last; the last one may be longer by a look.

    What fits the frames of one look at `video_fps` is one window.
    """
    if seconds * profile.video_fps <= profile.max_frames:
        return ((0.0, seconds),)
    length = WINDOW * profile.max_frames / profile.video_fps
    count = 1 + int(np.ceil((seconds - length) / (STEP * length)))
    starts = np.linspace(0, seconds - length, count) * profile.video_fps
    starts = (np.floor(starts) / profile.video_fps).tolist()  # whole looks: neighbours see the same frames
    return (*((start, start + length) for start in starts[:-1]), (starts[-1], seconds))


def read_times(window: Window, profile: Profile) -> np.ndarray | None:
    """Return the seconds of the file at which a window is looked at; None: as a reader does by itself."""
    if window.whole:
        return None
    start, end = window.span
    return start + decoder.sample_times(end - start, profile.video_fps, profile.max_frames)


def as_video(clip: video_reader.Clip, window: Window) -> video_reader.Clip:
    """Return the frames of a window as a video that begins where it begins."""
    if window.whole or clip.problem is not None:
        return clip
    start, end = window.span
    return replace(clip, timestamps=np.maximum(clip.timestamps - start, 0), seconds=end - start)


# --- The index file


def read_index(path: Path) -> tuple[dict, dict[str, IndexedFile], dict[str, Unread]]:
    """Read (what it was made by, {name: file}, {name: unreadable file}) of an index; empty where there is none.

    Raises InputError for a broken file.
    """
    if not path.exists():
        return {}, {}, {}
    try:
        with np.load(path) as arrays:  # numpy reads no pickles by default
            if "key" in arrays:  # before videos had windows
                return {"format": 1}, {}, {}
            facts, vecs, files = json.loads(str(arrays["facts"])), arrays["vecs"], {}
        if not np.isfinite(vecs).all() or len(vecs) != sum(len(row[4]) for row in facts["files"].values()):
            raise ValueError("vectors are missing or not finite")
        for name, (*row, spans, problem) in facts["files"].items():
            files[name] = IndexedFile(*row, tuple(map(tuple, spans)), problem, vecs[: len(spans)])
            vecs = vecs[len(spans) :]
        return facts["made_by"], files, {name: Unread(*row) for name, row in facts["unread"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: a broken index ({error}); delete it and search again") from error


def write_index(path: Path, made_by: dict, files: dict[str, IndexedFile], unread: dict[str, Unread]) -> None:
    """Write an index as one file."""
    rows = {n: [f.size, f.changed, f.digest, f.seconds, f.spans, f.problem] for n, f in files.items()}
    facts = {"made_by": made_by, "files": rows}
    facts["unread"] = {name: [file.size, file.changed, file.problem] for name, file in unread.items()}
    vecs = np.concatenate([file.vecs for file in files.values()]) if files else np.zeros((0, 0), np.float32)
    with cache.replacing(path) as file:
        np.savez(file, facts=json.dumps(facts), vecs=vecs)


# --- Bringing it up to date


def refresh(
    profile: Profile, load: Callable[[], engine.Engine], folder: Path, path: Path, retry=False
) -> FolderIndex:
    """Bring the index in `path` up to date: one content is embedded once, under whatever names it lies there.

    An index of another engine, or of other settings, is built anew: vectors of two engines cannot be compared.

    load   returns the engine; it is called once folder and index have been checked
    retry  try again what could not be read before, though it has not changed
    """
    (paths, unreadable), before = find_videos(folder), read_index(path)
    encoder, started = load(), time.monotonic()
    facts = made_by(profile, encoder)
    differing = [name for name in facts if facts[name] != before[0].get(name)] if before[0] else []
    indexed, unread = ({}, {}) if differing else before[1:]
    files, contents, unread = _compare(paths, indexed, {} if retry else unread, unreadable)
    repeated, saved = frozenset(unread), time.monotonic()
    unreadable |= {name: file.problem for name, file in unread.items()}
    embedded = 0
    for copies, result in zip(contents.values(), _embed(profile, encoder, paths, contents), strict=True):
        if isinstance(result, str):
            unread |= {name: Unread(*row[:2], result) for name, row in copies}
            unreadable |= {name: result for name, _ in copies}
            continue
        files |= {name: IndexedFile(*row, *result) for name, row in copies}
        embedded += 1
        if time.monotonic() - saved > SAVE_SECONDS:
            write_index(path, facts, files, unread)
            saved = time.monotonic()
    files = dict(sorted(files.items()))
    if (facts, files, unread) != before:
        write_index(path, facts, files, unread)
    unreadable |= {name: file.problem for name, file in files.items() if file.problem}
    if not files:
        name, why = next(iter(unreadable.items()))
        raise InputError(f"{folder}: not one of {len(paths)} videos could be read; {plain(name)}: {why}")
    rebuilt = "format" if "format" in differing else ", ".join(differing) or None
    seconds = time.monotonic() - started
    return FolderIndex(files, dict(sorted(unreadable.items())), repeated, embedded, rebuilt, seconds)


def made_by(profile: Profile, encoder: engine.Engine) -> dict:
    """Return what decides a video's vectors: the engine that embeds it, its instruction, the frames, and the code."""
    facts = {"format": 2, "engine": encoder.name, "weights of the engine": loading.version(encoder.name)}
    facts |= {"instruction": encoder.instruction, "precision": profile.dtype}
    facts["frames"] = [profile.video_fps, profile.max_frames, profile.engine_clock]
    facts["pixels"] = vars(engine.pixel_rule(profile))
    return facts | {"code": cache.source_digest(__name__)}


def _compare(paths, indexed, unread, unreadable):
    """Return the files whose content is indexed, the contents that are not, and the files that are still unreadable.

    They are {name: IndexedFile}, {digest: [(name, its size, time and digest)]} and {name: Unread}; the last are as they
    were when they could not be read. What cannot be opened is tried again each time: its permissions may have changed.
    """
    by_digest, files, contents, still = {file.digest: file for file in indexed.values()}, {}, {}, {}
    for name, path in paths.items():
        try:
            facts = path.stat().st_size, path.stat().st_mtime_ns
            for before, unchanged in ((indexed, files), (unread, still)):
                if name in before and (before[name].size, before[name].changed) == facts:
                    unchanged[name] = before[name]
            if name in files or name in still:
                continue
            digest = cache.file_digest(path)
        except OSError as error:
            unreadable[name] = error.strerror
            continue
        if digest in by_digest:
            files[name] = replace(by_digest[digest], size=facts[0], changed=facts[1])
        else:
            contents.setdefault(digest, []).append((name, (*facts, digest)))
    return files, contents, still


def _embed(profile, encoder, paths, contents):
    """Yield (seconds, spans, problem of some windows, vectors) of each content, or why it cannot be read."""
    names = [copies[0][0] for copies in contents.values()]
    clips = video_reader.read_videos([paths[name] for name in names], reader(profile), profile.decode_workers)
    for name, clip in zip(names, cache.progress(clips, "embed videos", len(names)), strict=True):
        if clip.problem is not None:
            yield clip.problem
            continue
        spans = spans_of(clip.seconds, profile)
        if len(spans) > 1:
            yield _embed_windows(profile, encoder, paths[name], name, clip.seconds, spans)
        else:
            yield clip.seconds, spans, None, _vec(encoder, clip, name)


def _embed_windows(profile, encoder, path, name, seconds, spans):
    """Embed a long video, window by window; one that cannot be read costs itself alone."""
    windows, good, vecs, problems = [Window(name, span, False) for span in spans], [], [], []
    requests = [(path, read_times(window, profile)) for window in windows]
    clips = video_reader.read_videos(requests, reader(profile), 1)
    for window, clip in zip(windows, cache.progress(clips, f"embed {plain(name)}", len(spans)), strict=True):
        if clip.problem is None:
            good.append(window.span)
            vecs.append(_vec(encoder, as_video(clip, window), window.id))
        else:
            start, end = window.span
            problems.append(f"second {start:.0f} to {end:.0f} is left out: {clip.problem}")
    if not good:
        return problems[0]
    return seconds, tuple(good), "; ".join(problems) or None, np.concatenate(vecs)


def _vec(encoder, clip, name):
    # One by one: reading takes longer, and frames as large as files have them fill the memory.
    return check_finite(encoder.embed_clips([clip]), encoder.name, name)
