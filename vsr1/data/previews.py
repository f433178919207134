"""Make small copies of videos for pages: a film that browsers play, and a strip of frames.

All decoding happens in the child process of a `video_reader.Reader`: a damaged file costs its own preview, no more.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from vsr1 import cache
from vsr1.data import annotations, video_reader
from vsr1.data.video_writer import write_video

# Ours: the copies of three data sets together take about 6 MB, and drawings can still be told apart.
FPS, FRAMES, PIXELS, CRF = LIMITS = 4, 200, 128, 38  # of a film, at most: fps, frames, height; and x264's crf
STRIP, STRIP_PIXELS, STRIP_QUALITY = 8, 96, 35  # frames, pixels of height, webp's quality


def make(folder: Path, videos: list[str], target: Path, name: str) -> None:
    """Write <video>.{mp4,webp} of each readable video of `folder` into `target`/<name>, and `target`/films.json.

    films.json   {video: {seconds, times, problem}}; `times` are those of the strip's frames, `problem` says why there
                 are no copies
    """
    films, home = {}, target / name
    home.mkdir(exist_ok=True)
    with video_reader.Reader() as reader, video_reader.Reader() as small:
        for video in cache.progress(annotations.find_videos(folder, videos), f"films {name}"):
            films[video.id] = _preview(reader, small, video, home)
    cache.write_json(target / "films.json", films)


def _preview(reader, small, video, home):
    """Write both copies of one video and return its entry of films.json."""
    if video.path is None:
        return {"seconds": None, "times": [], "problem": "no such file"}
    clip, times = reader.read(video.path), []
    problem = clip.problem or film(small, video.path, clip, home / f"{video.id}.mp4")
    if problem is None:
        picture, times = strip(clip)
        picture.save(home / f"{video.id}.webp", quality=STRIP_QUALITY, method=6)
    return {"seconds": clip.seconds, "times": times, "problem": problem}


def film(
    reader: video_reader.Reader, source: Path, clip: video_reader.Clip, target, span=None, limits=LIMITS
):
    """Write a small copy of a video, H.264 without sound; return why its frames cannot be read, None if they can.

    clip    what was read of the video before: its length and the size of its frames
    target  a path or an open binary file
    span    (start, end) in seconds of the part that is copied; None: all
    limits  at most so many fps, frames, pixels of height; and x264's crf
    """
    fps, frames, pixels, crf = limits
    start, end = span or (0.0, clip.seconds)
    rate = Fraction(min(fps, frames / (end - start))).limit_denominator(100)
    height, width = clip.frames.shape[1:3]
    reader.size = tuple(max(2, round(side * min(1, pixels / height) / 2) * 2) for side in (width, height))
    copy = reader.read(source, np.arange(start, end - 1e-3, 1 / float(rate)))
    if copy.problem is None:
        write_video(target, copy.frames, rate, crf)
    return copy.problem


def strip(clip: video_reader.Clip) -> tuple[Image.Image, list[float]]:
    """Return frames spread evenly over a clip, side by side, and their seconds: a picture that is a time axis too."""
    wanted = (np.arange(STRIP) + 0.5) / STRIP * clip.seconds
    index = np.abs(clip.timestamps[:, None] - wanted).argmin(axis=0)  # (STRIP,)
    height, width = clip.frames.shape[1:3]
    size = (round(STRIP_PIXELS * width / height), STRIP_PIXELS)
    pictures = [np.asarray(Image.fromarray(frame).resize(size)) for frame in clip.frames[index]]
    return Image.fromarray(np.concatenate(pictures, axis=1)), [float(time) for time in clip.timestamps[index]]


def band(span_ms, seconds: float) -> str:
    """Return the style of a moment's band over its video, never too thin to be seen."""
    start, end = (min(100, time / seconds / 10) for time in span_ms)
    return f"left:{start:.1f}%;width:{max(0.6, end - start):.1f}%"
