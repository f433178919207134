"""Score and rank queries against the vectors of a gallery."""

import json
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from vsr1.models import ivf_index

# --- the index -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What an engine made of one split: unit vectors and the ids of their rows."""

    video_ids: list[str]
    video_vecs: np.ndarray  # (V, D)
    query_ids: list[int]
    query_vecs: np.ndarray  # (Q, D)


def build_index(video_vecs: np.ndarray) -> faiss.Index:
    """An exact inner-product index over (V, D) unit vectors, on the CPU: the form that is saved (else `large`)."""
    index = faiss.IndexFlatIP(video_vecs.shape[1])
    index.add(np.ascontiguousarray(video_vecs, np.float32))
    return index


def to_gpu(index: faiss.Index) -> faiss.Index:
    """The index on the GPUs, if this build of faiss and this machine have any; else the index itself."""
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        return faiss.index_cpu_to_all_gpus(index)
    return index


def search(index: faiss.Index, query_vecs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows), both (Q, k), best first; equal scores in row order: every machine shows the same video."""
    scores, rows = index.search(np.ascontiguousarray(query_vecs, np.float32), min(k, index.ntotal))
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def load_vectors(folder: Path) -> Vectors:
    """The vectors that `embed_corpus` left in a folder; those of a large gallery's videos are mapped."""
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    mode = None if len(ids["videos"]) < ivf_index.FROM else "r"
    video_vecs = np.load(folder / "video_vecs.npy", mmap_mode=mode)
    return Vectors(ids["videos"], video_vecs, ids["queries"], np.load(folder / "query_vecs.npy"))


def ranks(scores, true_column):
    """Rank of the right video of each query, (Q,) from (Q, V) scores; ties count for us (official).

    >>> ranks(np.array([[0.9, 0.9, 0.1]]), np.array([1]))
    array([1])
    """
    assert not np.isnan(scores).any(), "a score that is not a number would rank its video nowhere"
    return 1 + (scores > _true_score(scores, true_column)).sum(axis=1)


def ranks_pessimistic(scores, true_column):
    """The same with ties counting against us, (Q,); printed beside `ranks`.

    >>> ranks_pessimistic(np.array([[0.9, 0.9, 0.1]]), np.array([1]))
    array([2])
    """
    return ranks(scores, true_column) + ties(scores, true_column)


def ties(scores, true_column):
    """How many wrong videos have exactly the score of the right one, (Q,)."""
    return (scores == _true_score(scores, true_column)).sum(axis=1) - 1


def _true_score(scores, true_column):
    return np.take_along_axis(scores, np.asarray(true_column)[:, None], axis=1)  # (Q, 1)
