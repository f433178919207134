"""Embed one split of a data set: the step that leaves vectors and an index."""

import csv
import functools
from pathlib import Path

import faiss
import numpy as np

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, frame_store, source, video_reader
from vsr1.models import engine, loading, search_index

# Ours: a file may differ so much from the annotated duration; Charades' own table does by up to 2.45 s (docs/data.md).
LENGTH_SECONDS, LENGTH_SHARE = 3.0, 0.1
SHARD_SIZE = 64  # videos between two saves: what a kill can cost


def embed_corpus(profile, dataset: str, split: str, which: str = "engine") -> Path:
    """Embed the videos and queries of one split and return the folder with vectors and index, embed/<which>/<split>/.

    The corpus is made current first. Videos that cannot be read are listed with the reason in `skipped.csv`. They have
    no vector, and their queries stay in every denominator as failures. Files of another length than their annotation
    says are used, and listed in `lengths.csv`. From `search_index.LARGE` videos on the index is an IVF index, and
    `notes.json` holds its recall against exact search; ranks in evaluation are exact at any size.

    which  the knob that names the engine: engine or engine_large
    """
    source.of(profile).prepare(profile, dataset)
    home = profile.data_dir(dataset)
    inputs = {
        "annotations": cache.file_digest(home / "corpus" / f"{split}.jsonl"),
        "gallery": annotations.gallery_ids([], home / "corpus", split),  # what no query asks for
        "videos": cache.metadata(home / "videos").get("key"),
        "model": loading.version(getattr(profile, which)),
        "code": cache.source_digest(__name__),
        "knobs": [profile.video_fps, profile.max_frames, profile.instruction, profile.engine_clock],
        "pixels": vars(engine.pixel_rule(profile)),
        "limits": [profile.max_query_tokens, profile.dtype],
    }
    work = functools.partial(_embed, profile, dataset, split, which)
    return cache.build(home / "embed" / which / split, inputs, work, distributed=True)


def _embed(profile, dataset, split, which, folder):
    """Fill `folder` with what `embed_corpus` promises; several processes share the shards of videos."""
    home, processes = profile.data_dir(dataset), cache.dist_state()
    queries = annotations.read_fig(home / "corpus" / f"{split}.jsonl")
    gallery = annotations.gallery_ids(queries, home / "corpus", split)
    videos = annotations.find_videos(home / "videos", gallery)
    loaded = engine.load(profile, which)
    shards = [videos[start : start + SHARD_SIZE] for start in range(0, len(videos), SHARD_SIZE)]
    files = [folder / f"shard-{number:05}.npz" for number in range(len(shards))]
    _embed_shards(profile, dataset, split, loaded, shards, files)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return
    video_ids = [str(video_id) for ids in _arrays(files, "ids") for video_id in ids]
    if not video_ids:
        raise InputError(f"{home / 'videos'}: not one of {len(videos)} videos could be read; see {folder}")
    video_vecs = _join(files, folder / "video_vecs.npy", (len(video_ids), loaded.width))
    query_vecs = loaded.embed_texts([query.text for query in queries])
    np.save(folder / "query_vecs.npy", query_vecs)
    notes = {"texts_cut": loaded.num_truncated, "skipped": len(videos) - len(video_ids)}
    notes |= loading.model_facts(loaded.model)
    if len(video_ids) < search_index.LARGE:
        faiss.write_index(search_index.build_index(video_vecs), str(folder / "index.faiss"))
    else:
        notes["index"] = search_index.build_ivf(folder / "index.faiss", video_vecs, query_vecs)
    _write_skipped(files, split, folder / "skipped.csv")
    seconds = dict(zip(video_ids, np.concatenate(list(_arrays(files, "seconds"))), strict=True))
    notes["other_lengths"] = _write_lengths(queries, seconds, folder / "lengths.csv")
    cache.write_json(folder / "ids.json", {"videos": video_ids, "queries": [query.id for query in queries]})
    cache.write_json(folder / "notes.json", notes)
    for file in files:
        file.unlink()


def _embed_shards(profile, dataset, split, loaded, shards, files):
    """Embed the shards of this process that have no file yet."""
    processes = cache.dist_state()
    numbers = range(processes.process_index, len(shards), processes.num_processes)
    todo = [number for number in numbers if not files[number].exists()]
    # A video without a file is read under the name it should have: the reader says what is wrong with it.
    folder = profile.data_dir(dataset) / "videos"
    paths = [video.path or folder / f"{video.id}.mp4" for number in todo for video in shards[number]]
    reader = frame_store.reader_for(profile, dataset)
    clips = video_reader.read_videos(paths, reader, profile.decode_workers)
    clips = iter(cache.progress(clips, f"embed {dataset} {split}", len(paths)))
    for number in todo:
        _embed_shard(loaded, shards[number], clips, files[number])


def _embed_shard(loaded, videos, clips, path):
    """Write ids and vectors of the readable videos of a shard, and the problems of the others.

    clips  an iterator whose next items are the clips of these videos
    """
    ids, seconds, problems = [], [], []

    def readable():
        for video, clip in zip(videos, clips, strict=False):
            if clip.problem is None:
                ids.append(video.id)
                seconds.append(clip.seconds)
                yield clip
            else:
                problems.append((video.id, clip.problem))

    vecs = loaded.embed_clips(readable())
    with cache.replacing(path) as file:
        np.savez(
            file, ids=ids, vecs=vecs, seconds=seconds, problems=np.array(problems, dtype=str).reshape(-1, 2)
        )


def _arrays(files, name):
    """Give the array `name` of each .npz, one file after the other: thousands may not be open at once."""
    for path in files:
        with np.load(path) as arrays:
            yield arrays[name]


def _join(files, path, shape):
    """Write the vectors of all shards into one mapped .npy file and return it."""
    video_vecs, row = np.lib.format.open_memmap(path, "w+", np.float32, shape), 0
    for vecs in _arrays(files, "vecs"):
        video_vecs[row : row + len(vecs)] = vecs
        row += len(vecs)
    return video_vecs


def _write_skipped(files, split, path):
    """Write the videos that could not be read, with the reason."""
    problems = [pair for pairs in _arrays(files, "problems") for pair in pairs]
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("video", "split", "problem"))
        rows.writerows((video_id, split, problem) for video_id, problem in problems)


def _write_lengths(queries, seconds, path):
    """Write the videos whose file is another one than was annotated, by its length; return how many, and warn."""
    annotated = {query.video: query.duration for query in queries if query.duration is not None}
    lengths = {video: round(float(length), 2) for video, length in seconds.items() if video in annotated}
    rows = [
        (video, annotated[video], length)
        for video, length in lengths.items()
        if abs(length - annotated[video]) > max(LENGTH_SECONDS, LENGTH_SHARE * annotated[video])
    ]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "annotated seconds", "seconds of the file"), *rows])
    annotations.warn_repairs(path, {"videos are of another length than annotated": len(rows)})
    return len(rows)
