"""Keep frames on disk as small as models see them, so that all steps together decode and shrink a video once.

runs/<profile>/<dataset>/frames/<video>.npz    frames and timestamps of a Clip, its other parts and the key in json

In mini an evaluation spent a third of its time on reading videos.
"""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import frame_sizes, video_reader


def reader_for(profile, dataset: str) -> video_reader.Reader:
    """Return a reader of the videos of a data set for its models; it keeps frames if `keep_frames` says so.

    Raises InputError where engine and policy see frames in different sizes: of one video one size is kept.
    """
    reader = video_reader.reader_for(profile)
    if not profile.keep_frames:
        return reader
    for knob in ("engine_max_pixels", "engine_min_pixels", "engine_video_pixels", "engine_frame_multiple"):
        if getattr(profile, knob):
            raise InputError(
                f"profile {profile.name}: with {knob} the engine sees frames in other sizes than the policy; set "
                "keep_frames: false"
            )
    rule = frame_sizes.PixelRule(profile.max_frame_pixels)
    folder = profile.data_dir(dataset) / "frames"
    return StoringReader(reader.fps, reader.max_frames, timeout=reader.timeout, folder=folder, rule=rule)


@dataclass
class StoringReader(video_reader.Reader):
    """Reads frames in the size of a rule, and from `folder` those of a video that was read before."""

    folder: Path | None = None
    rule: frame_sizes.PixelRule | None = None

    def read(self, path, times=None) -> video_reader.Clip:
        """Read a video as `Reader.read` does, and shrink its frames; frames at given `times` stay as they are."""
        if times is not None or not Path(path).exists():
            return super().read(path, times)
        file, key = self.folder / f"{Path(path).stem}.npz", self._key(path)
        clip = _load(file, key)
        if clip is None:
            clip = super().read(path)
            small = None if clip.problem else frame_sizes.shrink(clip.frames, self.rule)
            # Very long and narrow frames would be shrunk again by who gets them.
            if small is not None and frame_sizes.shrink(small[:2], self.rule).shape[1:] == small.shape[1:]:
                clip = replace(clip, frames=small)
                _save(file, key, clip)
        return clip

    def _key(self, path):
        """Return what the kept frames of a file depend on, as text."""
        stat = Path(path).stat()
        knobs = [self.fps, self.max_frames, vars(self.rule), cache.source_digest(__name__)]
        return json.dumps([Path(path).name, stat.st_size, stat.st_mtime_ns, *knobs])


def _load(file, key):
    """Return the Clip of a file; None where there is none, where it is damaged, or where it has another key."""
    try:
        with np.load(file) as arrays:
            about = json.loads(str(arrays["about"]))
            if about.pop("key") == key:
                return video_reader.Clip(arrays["frames"], arrays["timestamps"], problem=None, **about)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    return None


def _save(file, key, clip):
    """Write a Clip and its key as one file, complete or not at all."""
    about = json.dumps({"key": key, "seconds": clip.seconds, "facts": clip.facts})
    file.parent.mkdir(parents=True, exist_ok=True)
    with cache.replacing(file) as out:
        np.savez(out, frames=clip.frames, timestamps=clip.timestamps, about=np.array(about))
