"""Write frames as an H.264 file that browsers play and every decoder reads."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np


def write_video(
    target: Path | BinaryIO,
    frames: Iterable[np.ndarray | av.VideoFrame],
    fps: int | Fraction,
    crf: int = 23,
    preset: str = "medium",
    keyframe_interval: int | None = None,
) -> None:
    """Encode frames as an MP4 file without sound; the same frames give the same bytes on every machine.

    target             a path, where the whole file appears at once, or an open binary file
    frames             (H, W, 3) uint8 RGB arrays or `av.VideoFrame`s, all of one size; H and W are even
    fps                frames a second
    crf, preset        quality and effort of libx264, by its defaults
    keyframe_interval  frames from one keyframe to the next at most; None: libx264's default
    """
    whole_file = isinstance(target, Path)
    scratch = str(target.with_name(f".{target.name}")) if whole_file else target
    with av.open(scratch, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # several threads would make the bytes depend on the machine
        stream.options = {"preset": preset, "crf": str(crf)}
        if keyframe_interval:
            stream.options |= {"g": str(keyframe_interval)}
        time_base = 1 / Fraction(fps)
        for number, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = number, time_base
            frame.pict_type = 0  # of a decoded frame: the encoder chooses its own
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if whole_file:
        os.replace(scratch, target)
