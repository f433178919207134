"""Make the authors' vectors the gallery that released weights search: their soft tokens were trained against it."""

from pathlib import Path

import faiss
import numpy as np

from vsr1 import cache, config
from vsr1.data import annotations, official_release, real_datasets, source, video_reader
from vsr1.models import engine, loading, search_index

COMPARED = 8  # videos and queries that our engine embeds too, to be compared


def find(profile, dataset: str) -> Path | None:
    """Return the step with the released vectors of the test split, in the layout of `embed_corpus`.

    None where they were not fetched, and where the profile wants its own (`search_released_vectors`). `notes.json`
    holds how near our own vectors of a few videos and queries come to them, and one line says so.
    """
    files = [config.ROOT / profile.data / dataset / name for name in official_release.vector_files("test")]
    is_real = profile.world is None
    if not (profile.search_released_vectors and is_real and all(file.exists() for file in files)):
        return None
    source.of(profile).prepare(profile, dataset)
    home = profile.data_dir(dataset)
    annotated = real_datasets.annotation_files(profile, dataset)[1]
    inputs = {
        "vectors": [cache.file_digest(file) for file in files],
        "annotations": cache.file_digest(annotated),
        "videos": cache.metadata(home / "videos").get("key"),
        "model": loading.version(profile.engine),
        "pixels": [vars(engine.pixel_rule(profile)), profile.engine_clock],
        "code": cache.source_digest(__name__),
    }
    return cache.build(
        home / "embed" / "released" / "test", inputs, lambda folder: _write(profile, dataset, folder)
    )


def _write(profile, dataset, folder):
    video_ids, video_vecs, query_ids, query_vecs = official_release.read_vectors(profile, dataset)
    np.save(folder / "video_vecs.npy", video_vecs)
    np.save(folder / "query_vecs.npy", query_vecs)
    faiss.write_index(search_index.build_index(video_vecs), str(folder / "index.faiss"))
    cache.write_json(folder / "ids.json", {"videos": video_ids, "queries": query_ids})
    vectors = search_index.Vectors(video_ids, video_vecs, query_ids, query_vecs)
    cosines = compare(profile, dataset, vectors, engine.load(profile))
    cache.write_json(folder / "notes.json", cosines)
    ranges = [f"{kind} {min(values):.3f} to {max(values):.3f}" for kind, values in cosines.items() if values]
    print(
        f"{dataset}: released vectors are searched; cosine of our own with them: {', '.join(ranges)}",
        flush=True,
    )


def compare(profile, dataset: str, vectors: search_index.Vectors, search_engine: engine.Engine) -> dict:
    """Return {videos, queries: cosines of the vectors of a few, by `search_engine`, with those in `vectors`}.

    Videos without a file, or that cannot be read, are left out.
    """
    home = profile.data_dir(dataset)
    queries = annotations.read_fig(home / "corpus" / "test.jsonl")
    queries = annotations.evenly_spaced(queries, COMPARED)
    videos = [video for video in annotations.find_videos(home / "videos", vectors.video_ids) if video.path]
    videos = annotations.evenly_spaced(videos, COMPARED)
    clips = video_reader.read_videos([video.path for video in videos], video_reader.reader_for(profile))
    clips = {video.id: clip for video, clip in zip(videos, clips, strict=True) if clip.problem is None}
    released_vecs = vectors.video_vecs[vectors.columns(clips)]
    query_vecs = search_engine.embed_texts([query.text for query in queries])
    return {
        "videos": cosines(search_engine.embed_clips(list(clips.values())), released_vecs) if clips else [],
        "queries": cosines(query_vecs, vectors.vecs_of([query.id for query in queries])),
    }


def cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Return the cosine of each row of unit vectors with the same row of the others."""
    if a.shape != b.shape:
        raise config.InputError(
            f"vectors of {a.shape[1]} numbers beside released ones of {b.shape[1]}; is `engine` the released one?"
        )
    return (a * b).sum(axis=1).astype(float).round(4).tolist()
