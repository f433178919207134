"""Index a folder of videos: embed each content once, and keep the vectors up to date.

A file of the same name, size and time is taken as unchanged; any other is compared by content with what is known.
"""

import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, video_reader
from vsr1.models import engine, loading

# A file without an extension is no video here.
EXTENSIONS = tuple(extension for extension in annotations.CONTAINERS if len(extension) > 1)
DECODE_TIMEOUT = 120.0  # ours: seconds for one video, which may be an hour long
SAVE_SECONDS = 30.0  # ours: seconds of work that a kill may cost


@dataclass(frozen=True)
class IndexedFile:
    """A video as it was when it was embedded."""

    size: int  # bytes
    changed: int  # ns, as the file system says
    digest: str  # of the content
    vec: np.ndarray = field(compare=False)  # (D,) length one; the content decides it


@dataclass(frozen=True)
class FolderIndex:
    """The videos of a folder that can be searched, and those that cannot."""

    files: dict[str, IndexedFile]  # by name, relative to the folder
    unreadable: dict[str, str]  # name: why
    embedded: int  # videos that were embedded just now
    seconds: float  # that this took, without loading the engine

    def vecs(self) -> np.ndarray:
        """Return the vectors (V, D), in the order of the names."""
        return np.stack([file.vec for file in self.files.values()])


def find_videos(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """List a folder and all below it: ({name: video file}, {name: why it cannot be listed}), without hidden ones.

    Raises InputError where there is no folder, or no video in it.
    """
    found, closed = {}, []
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the one with your videos")
    for place, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if name[0] != "."]
        paths = [Path(place, name) for name in names if name[0] != "." and name.lower().endswith(EXTENSIONS)]
        # A pipe would be waited for. A link that leads nowhere is one of the files that cannot be read.
        found |= {os.path.relpath(p, folder): p for p in paths if p.is_file() or p.is_symlink()}
    unlisted = {os.path.relpath(error.filename, folder): error.strerror for error in closed}
    if not found:
        why = "".join(f"; {plain(name)}: {problem}" for name, problem in unlisted.items())
        raise InputError(f"{folder}: no video in it or below; looked for {' '.join(EXTENSIONS)}{why}")
    return dict(sorted(found.items())), unlisted


def plain(text: str) -> str:
    """Return `text` on one line, without what could steer a terminal; file names may hold anything.

    >>> plain("a\\x1b[2Jb\\nc")
    'a�[2Jb�c'
    """
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def reader(profile: Profile) -> video_reader.Reader:
    """Return a reader for files of any length; one that takes too long twice is a problem of that file alone."""
    return video_reader.Reader(profile.video_fps, profile.max_frames, timeout=DECODE_TIMEOUT, skip_slow=True)


# --- The index file


def read_index(path: Path) -> tuple[str, dict[str, IndexedFile]]:
    """Read (key, {name: file}) of an index; ("", {}) where there is none. Raises InputError for a broken file."""
    if not path.exists():
        return "", {}
    try:
        with np.load(path) as arrays:  # numpy reads no pickles by default
            facts = json.loads(str(arrays["files"]))
            rows = zip(facts.items(), arrays["vecs"], strict=True)
            return str(arrays["key"]), {name: IndexedFile(*row, vec) for (name, row), vec in rows}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: a broken index ({error}); delete it and search again") from error


def write_index(path: Path, key: str, files: dict[str, IndexedFile]) -> None:
    """Write an index as one file."""
    facts = {name: [file.size, file.changed, file.digest] for name, file in files.items()}
    vecs = np.stack([file.vec for file in files.values()])
    with cache.replacing(path) as file:
        np.savez(file, key=key, files=json.dumps(facts), vecs=vecs)


# --- Bringing it up to date


def refresh(profile: Profile, load: Callable[[], engine.Engine], folder: Path, path: Path) -> FolderIndex:
    """Bring the index in `path` up to date: one content is embedded once, under whatever names it lies there.

    An index of another engine, or of other settings, is built anew: vectors of two engines cannot be compared.

    load  returns the engine; it is called once folder and index have been checked
    """
    (found, unreadable), (old_key, old) = find_videos(folder), read_index(path)
    encoder, started = load(), time.monotonic()
    key = index_key(profile, encoder)
    old = old if old_key == key else {}
    files, new = _compare(found, old, unreadable)
    paths = [found[same[0][0]] for same in new.values()]
    clips = video_reader.read_videos(paths, reader(profile), profile.decode_workers)
    embedded, saved = 0, time.monotonic()
    for same, clip in zip(new.values(), cache.progress(clips, "embed videos", len(new)), strict=True):
        if clip.problem is not None:
            unreadable |= {name: clip.problem for name, _ in same}
            continue
        # One by one: reading takes longer, and frames as large as files have them fill the memory.
        (vec,) = encoder.embed_clips([clip])
        files |= {name: IndexedFile(*facts, vec) for name, facts in same}
        embedded += 1
        if time.monotonic() - saved > SAVE_SECONDS:
            write_index(path, key, files)
            saved = time.monotonic()
    if not files:
        name, why = next(iter(unreadable.items()))
        raise InputError(f"{folder}: not one of {len(found)} videos could be read; {plain(name)}: {why}")
    files = dict(sorted(files.items()))
    if files != old:
        write_index(path, key, files)
    return FolderIndex(files, dict(sorted(unreadable.items())), embedded, time.monotonic() - started)


def index_key(profile: Profile, encoder: engine.Engine) -> str:
    """Hash what decides a video's vector: the engine that embeds it, its instruction, the frames, and the code."""
    frames = [profile.video_fps, profile.max_frames, encoder.max_pixels, profile.dtype]
    version = [encoder.name, loading.version(encoder.name)]
    return cache.fingerprint([version, encoder.instruction, frames, cache.source_digest(__name__)])


def _compare(found, old, unreadable):
    """Return ({name: IndexedFile} of what is known, {digest: [(name, its size, time and digest)]} of what is new).

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
            files[name] = IndexedFile(*facts, digest, known[digest])
        else:
            new.setdefault(digest, []).append((name, (*facts, digest)))
    return files, new
