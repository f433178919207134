"""Show what a search of one's own videos found: lines for a terminal, a page with a film, moments as files."""

import base64
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from vsr1.apps.folder_index import plain
from vsr1.config import ROOT, InputError
from vsr1.data import previews, video_reader
from vsr1.data.video_writer import write_video
from vsr1.report import templates

# Of the film; all ours: seconds on both sides of the moment, then at most so many fps, frames, pixels high.
MARGIN, FPS, FRAMES, PIXELS, CRF = 2.0, 12, 240, 360, 28
VERDICTS = {True: "accepted", False: "rejected", None: "no readable verdict"}
CUT_FPS, CUT_CRF, CUT_BYTES = 25, 20, 256 * 2**20  # ours, of a moment as a file; frames held at once


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds.

    >>> clock(75.25), clock(59.96)
    ('01:15.2', '01:00.0')
    """
    tenths = round(seconds * 10)
    return f"{tenths // 600:02}:{tenths % 600 / 10:04.1f}"


def short_path(path) -> str:
    """Return a path as seen from the clone, if it lies there."""
    return str(path).removeprefix(f"{ROOT}{os.sep}")


def key(entry: dict) -> tuple:
    """Return what tells the window of a look, a hit or a result from any other."""
    return entry["video"], *entry["window"]


# --- Sentences


def when(entry: dict) -> str:
    """Say at which seconds something is, or in which seconds of a long video it was looked for."""
    if entry["moment"] is not None:
        return " to ".join(map(clock, entry["moment"]))
    return f"no moment named in {clock(entry['window'][0])} to {clock(entry['window'][1])}"


def end(result: dict) -> str:
    """Say how a search ended, in one sentence."""
    moment = when(result)
    if result["accepted"]:
        return f"Found: {plain(result['video'])}, {moment}"
    why = f" ({result['problem']})" if result["problem"] else ""
    verdict = "not accepted" if key(result) in map(key, result["looks"]) else "not looked at"
    candidate = f"best candidate, unverified ({verdict}): {result['video']}, {moment}"
    return plain(f"No video was accepted{why}; {candidate}")


def turn_texts(look: dict) -> tuple[str, str]:
    """Return (the reasoning of one turn, its verdict and the search after it)."""
    reasoning = plain(look["reasoning"] or "(no reasoning)")
    verdict = VERDICTS[look["accepted"]]
    if (refinement := look["next"]) is None:
        return reasoning, verdict
    if refinement["kind"] == "walkdown":
        return reasoning, f"{verdict}; goes down the ranking"
    added = f"adds {refinement['soft_tokens']} soft tokens to the query"
    change = added if refinement["words"] is None else f"searches for: {refinement['words']}"
    best = refinement["best"]
    if best == look["video"]:
        best = f"still {best}, but what was rejected is not shown again"
    return reasoning, plain(f"{verdict}; {change}; best now: {best}")


def lines(result: dict) -> Iterator[str]:
    """Yield the turns of a search for a terminal."""
    yield f"query: {plain(result['query'])}"
    for number, look in enumerate(result["looks"], 1):
        rank = f"rank {look['rank']} of {result['windows']} for the query as typed"
        yield f"look {number}: {plain(look['video'])}, {clock(look['window'][0])} to {clock(look['window'][1])}, {rank}"
        yield from (f"    {line}" for line in turn_texts(look))
    yield end(result)
    for number, hit in enumerate(result["hits"], 1):
        yield f"{number:>3}  {hit['score']:6.3f}  {hit['verdict']:<13}  {plain(hit['video'])}, {when(hit)}"
    yield from (f"cut: {short_path(path)}" for path in result["exported"])
    yield f"page: {short_path(result['page'])}"


# --- The page


def with_margin(moment, seconds: float) -> tuple[float, float]:
    """Return a moment with MARGIN on both sides, within a video of so many seconds."""
    return max(0.0, moment[0] - MARGIN), min(seconds, moment[1] + MARGIN)


def film(reader: video_reader.Reader, path: Path, clip: video_reader.Clip, span) -> tuple[bytes, str]:
    """Return (MP4, H.264, which seconds it shows) of a part of a video; no bytes, and why, where it cannot be read.

    clip  frames of the video, as it stores them
    """
    buffer, problem = io.BytesIO(), clip.problem
    if problem is None:
        problem = previews.film(reader, path, clip, buffer, span, (FPS, FRAMES, PIXELS, CRF))
    if problem is not None:
        return b"", problem
    return buffer.getvalue(), f"The film runs from {clock(span[0])} to {clock(span[1])}, without sound."


def write_moment(
    reader: video_reader.Reader, path: Path, clip: video_reader.Clip, span, target: Path
) -> None:
    """Write the seconds `span` of a video as a file of its own, in full size and without sound.

    Raises InputError where the video cannot be read.
    """
    times = np.arange(span[0], max(span[1], span[0] + 1 / CUT_FPS) - 1e-3, 1 / CUT_FPS)

    def frames():
        width, height = map(int, clip.facts["shown_size"].split("x"))
        reader.size = max(2, width // 2 * 2), max(2, height // 2 * 2)  # H.264 has no odd sides
        count = max(1, CUT_BYTES // (3 * height * width))
        for first in range(0, len(times), count):
            part = reader.read(path, times[first : first + count])
            if part.problem is not None:
                raise InputError(f"{path}: {part.problem}; this moment is not cut")
            yield from part.frames

    if clip.problem is not None:
        raise InputError(f"{path}: {clip.problem}; this moment is not cut")
    write_video(target, frames(), Fraction(CUT_FPS), CUT_CRF, "veryfast")


def html_page(result: dict, clips: dict[str, video_reader.Clip], mp4: bytes, about: str) -> str:
    """Return one file that loads nothing and runs nothing: the film, and each turn with its frames.

    Every text in it is escaped.
    """
    facts = {name: short_path(result[name]) for name in ("folder", "videos", "profile", "weights", "system")}
    facts |= {f"cannot be read: {name}": problem for name, problem in result["unreadable"].items()}
    values = {
        "result": result,
        "looks": [(look, *turn_texts(look), clips[key(look)]) for look in result["looks"]],
        "film": _base64(mp4),
        "about": about,
        "facts": facts,
        "end": end(result),
    }
    return templates.render("search.html", **values, plain=plain, strip=strip, when=when)


def strip(clip: video_reader.Clip, look: dict) -> dict:
    """Return the frames of one look as a time axis: its picture, the times below it, the band of its moment."""
    picture, times = previews.strip(clip)
    picture.save(buffer := io.BytesIO(), "webp", quality=60)
    start, moment = look["window"][0], look["moment"]
    band = previews.band(1000 * (np.array(moment) - start), clip.seconds) if moment else None
    times = [clock(start + time) for time in times]
    return {"picture": _base64(buffer.getvalue()), "times": times, "band": band}


def _base64(content):
    return base64.b64encode(content).decode()
