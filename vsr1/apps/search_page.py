"""Show what a search of one's own videos found: lines for a terminal, and a page with a film."""

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vsr1.apps.folder_index import DECODE_TIMEOUT, plain
from vsr1.config import ROOT
from vsr1.data import previews, video_reader
from vsr1.report import templates

# Of the film; all ours: seconds on both sides of the moment, then at most so many fps, frames, pixels high.
MARGIN, FPS, FRAMES, PIXELS, CRF = 2.0, 12, 240, 360, 28


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


# --- Sentences


def end(result: dict) -> str:
    """Say how a search ended, in one sentence."""
    at = "no moment named" if result["moment"] is None else " to ".join(map(clock, result["moment"]))
    if result["accepted"]:
        return f"Found: {plain(result['video'])}, {at}"
    why = f" ({result['problem']})" if result["problem"] else ""
    shown = [look["video"] for look in result["looks"]]
    verdict = "not accepted" if result["video"] in shown else "not looked at"
    return plain(
        f"No video was accepted{why}; best candidate, unverified ({verdict}): {result['video']}, {at}"
    )


def turn_texts(look: dict) -> tuple[str, str]:
    """Return (the reasoning of one turn, its verdict and the search after it)."""
    reasoning = plain(look["reasoning"] or "(no reasoning)")
    verdict = {True: "accepted", False: "rejected", None: "no readable verdict"}[look["accepted"]]
    if (refinement := look["next"]) is None:
        return reasoning, verdict
    if refinement["kind"] == "walkdown":
        return reasoning, f"{verdict}; goes down the ranking"
    added = f"adds {refinement['soft_tokens']} soft tokens to the query"
    change = added if refinement["words"] is None else f"searches for: {refinement['words']}"
    return reasoning, plain(f"{verdict}; {change}; best now: {refinement['best']}")


def lines(result: dict) -> Iterator[str]:
    """Yield the turns of a search for a terminal."""
    yield f"query: {plain(result['query'])}"
    for number, look in enumerate(result["looks"], 1):
        rank = f"rank {look['rank']} of {result['videos']} for the query as typed"
        yield f"look {number}: {plain(look['video'])}, {rank}"
        yield from (f"    {line}" for line in turn_texts(look))
    yield end(result)
    yield f"page: {short_path(result['page'])}"


# --- The page


def film(path: Path, clip: video_reader.Clip, moment) -> tuple[bytes, str]:
    """Return (MP4, H.264, which seconds it shows) of a moment with MARGIN on both sides, or of a whole video.

    Of a video that cannot be read there are no bytes, and the reason.
    """
    if clip.problem is not None:
        return b"", clip.problem
    first, last = (0.0, clip.seconds) if moment is None else (moment[0] - MARGIN, moment[1] + MARGIN)
    first, last = max(0.0, first), min(clip.seconds, last)
    buffer = io.BytesIO()
    with video_reader.Reader(timeout=DECODE_TIMEOUT, skip_slow=True) as reader:
        problem = previews.film(reader, path, clip, buffer, (first, last), (FPS, FRAMES, PIXELS, CRF))
    if problem is not None:
        return b"", problem
    return buffer.getvalue(), f"The film runs from {clock(first)} to {clock(last)}, without sound."


def html_page(result: dict, clips: dict[str, video_reader.Clip], mp4: bytes, about: str) -> str:
    """Return one file that loads nothing and runs nothing: the film, and each turn with its frames.

    Every text in it is escaped.
    """
    facts = {name: short_path(result[name]) for name in ("folder", "videos", "profile", "weights", "system")}
    facts |= {f"cannot be read: {name}": problem for name, problem in result["unreadable"].items()}
    values = {
        "told": result,
        "looks": [(look, *turn_texts(look), clips[look["video"]]) for look in result["looks"]],
        "film": _base64(mp4),
        "about": about,
        "facts": facts,
        "end": end(result),
    }
    return templates.render("search.html", **values, plain=plain, strip=strip)


def strip(clip: video_reader.Clip, moment) -> dict:
    """Return a whole video as a time axis: its picture, the times below it, the band of a moment named in it."""
    picture, times = previews.strip(clip)
    picture.save(buffer := io.BytesIO(), "webp", quality=60)
    band = previews.band(1000 * np.array(moment), clip.seconds) if moment else None
    return {"picture": _base64(buffer.getvalue()), "times": list(map(clock, times)), "band": band}


def _base64(content):
    return base64.b64encode(content).decode()
