"""Show one video as the models see it: what the file is, how it was read and why, and the frames themselves."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vsr1.apps import folder_index
from vsr1.config import InputError, Profile
from vsr1.data import frame_sizes, video_reader
from vsr1.models import engine, inputs

COLUMNS, CAPTION = 8, 12  # of the sheet: frames side by side, and pixels for the seconds under each


def main(profile: Profile, path: Path, png: Path | None, npz: Path | None, as_json: bool) -> int:
    """Print what is known about a video; return 0 if it can be read, else 1.

    png, npz  files for a contact sheet, and for frames (T, H, W, 3) uint8 with timestamps (T,); None: not written
    as_json   one JSON object on stdout instead of lines
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; name one video")
    with folder_index.reader(profile) as reader:
        clip = reader.read(path)
    facts = describe(clip)
    if clip.problem is None:
        frames = frame_sizes.shrink(clip.frames, frame_sizes.PixelRule(profile.max_frame_pixels))
        facts["seen_size"] = "{1}x{0}".format(*frames.shape[1:3])
        facts["engine_size"] = "{1}x{0}".format(*_engine_size(profile, clip.frames))
        facts["looks"] = clip.timestamps.round(3).tolist()
        facts["stamps"] = inputs.pair_times(clip.timestamps).round(1).tolist()
        if png:
            contact_sheet(frames, clip.timestamps).save(png, format="PNG")
        if npz:
            with npz.open("wb") as file:  # else numpy appends an ending
                np.savez(file, frames=frames, timestamps=clip.timestamps)
    if as_json:
        print(json.dumps({"video": str(path)} | facts))
    else:
        print(folder_index.plain(str(path)))
        for name, value in facts.items():
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            print(f"  {name.replace('_', ' '):<12} {text}")
    if clip.problem is not None:
        print(f"{folder_index.plain(str(path))}: {clip.problem}", file=sys.stderr)
    return int(clip.problem is not None)


def describe(clip: video_reader.Clip) -> dict:
    """Return what is known about a clip, {name: text, number or list}."""
    if clip.problem is not None:
        return {"problem": clip.problem} | clip.facts
    return clip.facts | {"seconds": round(clip.seconds, 3)}


def _engine_size(profile, frames):
    """Return (height, width) of a frame for the search engine."""
    return engine.pixel_rule(profile).sizes(*frames.shape[1:3], len(frames), frame_sizes.MULTIPLE)[-1]


def contact_sheet(frames: np.ndarray, timestamps: np.ndarray) -> Image.Image:
    """Draw frames in rows, each over the second at which it appears."""
    height, width = frames.shape[1:3]
    rows = -(-len(frames) // COLUMNS)
    size = min(COLUMNS, len(frames)) * width, rows * (height + CAPTION)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for number, (frame, seconds) in enumerate(zip(frames, timestamps, strict=True)):
        x, y = number % COLUMNS * width, number // COLUMNS * (height + CAPTION)
        picture.paste(Image.fromarray(frame), (x, y))
        draw.text((x + 2, y + height), f"{seconds:.1f} s", fill="black")
    return picture
