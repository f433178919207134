"""Keep decoded clips in memory within a budget of bytes."""

from collections import OrderedDict
from pathlib import Path

from vsr1.data import annotations, video_reader

CLIP_BYTES = 512 * 2**20  # ours: decoded frames that are kept; the mini test videos of one data set fit


class ClipCache:
    """The videos of a gallery, decoded when first shown; the latest `CLIP_BYTES` of them are kept."""

    def __init__(self, folder: Path, ids, read):
        self.paths = {v.id: v.path or folder / f"{v.id}.mp4" for v in annotations.find_videos(folder, ids)}
        self.read, self.kept, self.size = read, OrderedDict(), 0

    def get(self, ids) -> list[video_reader.Clip]:
        """One Clip per id; a video that cannot be read is one with a `problem`."""
        coming = {
            video: self.read(self.paths[video]) for video in dict.fromkeys(ids) if video not in self.kept
        }
        found = {video: self.kept[video] if video in self.kept else coming[video].result() for video in ids}
        for video, clip in found.items():
            if video in coming:
                self.kept[video] = clip
                self.size += _bytes(clip)
            self.kept.move_to_end(video)
        while self.size > CLIP_BYTES and self.kept:
            self.size -= _bytes(self.kept.popitem(last=False)[1])
        return [found[video] for video in ids]


def _bytes(clip):
    return 0 if clip.frames is None else clip.frames.nbytes
