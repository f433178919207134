"""Embed one split of a data set: the step that leaves vectors and an index."""

import csv
import time
from pathlib import Path

import faiss
import numpy as np

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, video_reader
from vsr1.models import engine, ivf_index, loading, search_index

# --- stages --------------------------------------------------------------------------------------------------------

SHARD_SIZE = 64  # videos between two saves: what a kill can cost


def embed_corpus(profile, dataset: str, split: str, which: str = "engine") -> Path:
    """Vectors and index of one split, in runs/<profile>/<dataset>/embed/<which>/<split>/.

    Videos that cannot be read are named with the reason in `skipped.csv` there; they have no vector, and their queries
    stay in every denominator as failures. From `large.FROM` videos on the index is that of `large`, and `notes.json`
    says what it finds of an exact search; ranks in evaluation are exact at any size.
    """
    annotations = profile.data_dir(dataset) / "corpus" / f"{split}.jsonl"
    name = getattr(profile, which)
    inputs = {
        "annotations": cache.file_digest(annotations),
        "videos": cache.metadata(profile.data_dir(dataset) / "videos").get("key"),
        "model": loading.version(name),
        "code": cache.source_digest(__name__),
        "knobs": [profile.video_fps, profile.max_frames, profile.max_frame_pixels, profile.instruction],
        "limits": [profile.max_query_tokens, profile.dtype],
    }
    work = lambda folder: _embed(profile, dataset, split, which, folder)  # noqa: E731
    return cache.build(profile.data_dir(dataset) / "embed" / which / split, inputs, work, distributed=True)


def _embed(profile, dataset, split, which, folder):
    """Fill `folder` with what `embed_corpus` promises, shard by shard; several processes share the shards."""
    home, mates = profile.data_dir(dataset), cache.dist_state()
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / f"{split}.jsonl")
    videos = annotations.find_videos(profile.data_dir(dataset) / "videos", annotations.gallery_ids(queries))
    loaded = engine.load(profile, which)
    started = time.time()
    shards = [videos[i : i + SHARD_SIZE] for i in range(0, len(videos), SHARD_SIZE)]
    own = range(mates.process_index, len(shards), mates.num_processes)
    todo = [shard for shard in own if not (folder / f"shard-{shard:05}.npz").exists()]
    # A video without a file is read under the name it should have: the reader says what is wrong with it.
    paths = [video.path or home / "videos" / f"{video.id}.mp4" for shard in todo for video in shards[shard]]
    clips = video_reader.read_videos(
        paths, video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    )
    clips = iter(cache.progress(clips, f"embed {dataset} {split}", len(paths)))
    for shard in todo:
        _embed_shard(loaded, shards[shard], clips, folder / f"shard-{shard:05}.npz")
    mates.wait_for_everyone()
    if not mates.is_main_process:
        return
    spent = time.time() - started
    made = [folder / f"shard-{shard:05}.npz" for shard in range(len(shards))]
    video_ids = [str(name) for part in _each(made, "ids") for name in part]
    if not video_ids:
        raise InputError(f"{home / 'videos'}: not one of {len(videos)} videos could be read; see {folder}")
    shape, at = (len(video_ids), loaded.width), 0
    video_vecs = np.lib.format.open_memmap(folder / "video_vecs.npy", "w+", np.float32, shape)
    for vecs in _each(made, "vecs"):
        video_vecs[at : at + len(vecs)] = vecs
        at += len(vecs)
    query_vecs = loaded.embed_texts([query.text for query in queries])
    np.save(folder / "query_vecs.npy", query_vecs)
    if len(video_ids) < ivf_index.FROM:
        faiss.write_index(search_index.build_index(video_vecs), str(folder / "index.faiss"))
        found = {}
    else:
        found = {"index": ivf_index.build(folder / "index.faiss", lambda: [video_vecs], query_vecs)}
    with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "split", "problem")])
        csv.writer(file).writerows((name, split, why) for bad in _each(made, "bad") for name, why in bad)
    cache.write_json(folder / "ids.json", {"videos": video_ids, "queries": [query.id for query in queries]})
    notes = {"videos_per_second": round(len(paths) / spent, 2) if paths else None}
    notes |= {"texts_cut": loaded.num_truncated, "skipped": len(videos) - len(video_ids)}
    cache.write_json(folder / "notes.json", notes | loading.model_facts(loaded.model) | found)
    for part in folder.glob("shard-*"):
        part.unlink()


def _embed_shard(engine, videos, clips, path):
    """The file of a shard: ids and vectors of its readable videos, and what is wrong with the others.

    clips  an iterator of which these videos are next
    """
    good, bad = [], []

    def readable():
        for video, clip in zip(videos, clips, strict=False):
            if clip.problem is None:
                good.append(video.id)
                yield clip
            else:
                bad.append((video.id, clip.problem))

    vecs = engine.embed_clips(readable())
    parts = {"ids": good, "vecs": vecs, "bad": np.array(bad, dtype=str).reshape(-1, 2)}
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **parts)
    path.with_suffix(".tmp").rename(path)


def _each(paths, name):
    """The array `name` of each .npz, one file after the other: thousands may not be open at once."""
    for path in paths:
        with np.load(path) as part:
            yield part[name]
