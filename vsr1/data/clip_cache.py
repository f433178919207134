"""Keep decoded clips in memory within a budget of bytes."""

from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

from vsr1.data import annotations, frame_store, video_reader

# Ours: decoded frames that are kept. A policy keeps the patches of each clip as long, four times its frames or more.
CLIP_BYTES = 192 * 2**20


class ClipCache:
    """The videos of a gallery, decoded when first shown; the latest `CLIP_BYTES` of them are kept.

    read  a function from a path to the Future of its Clip (`video_reader.reader_pool`)
    """

    def __init__(self, folder: Path, ids, read):
        self.paths = {v.id: v.path or folder / f"{v.id}.mp4" for v in annotations.find_videos(folder, ids)}
        self.read, self.clips, self.size = read, OrderedDict(), 0

    def get(self, ids) -> list[video_reader.Clip]:
        """Return one Clip per id; a video that cannot be read is one with a `problem`. DecodeTimeout: see `Reader`."""
        ids = list(ids)
        pending = {id: self.read(self.paths[id]) for id in dict.fromkeys(ids) if id not in self.clips}
        clips = {id: pending[id].result() if id in pending else self.clips[id] for id in ids}
        for id, clip in clips.items():
            if id in pending:
                self.clips[id] = clip
                self.size += clip.nbytes
            self.clips.move_to_end(id)
        while self.size > CLIP_BYTES and self.clips:
            self.size -= self.clips.popitem(last=False)[1].nbytes
        return [clips[id] for id in ids]


@contextmanager
def open_clips(profile, dataset: str, video_ids):
    """Open the videos of a data set; inside, `clips.get(ids)` gives their clips, which are decoded ahead."""
    reader = frame_store.reader_for(profile, dataset)
    with video_reader.reader_pool(reader, profile.decode_workers) as read:
        yield ClipCache(profile.data_dir(dataset) / "videos", video_ids, read)
