"""Score, search and rank queries against the vectors of a gallery."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np

from vsr1.config import InputError
from vsr1.models import ivf_index

MAX_CANDIDATES = 2048  # of a query, which is what FAISS finds on a GPU; beyond, all scores are sorted

# --- Vectors


@dataclass(eq=False)
class Vectors:
    """Unit vectors of one split with the ids of their rows; scores, search and ranks are computed here alone."""

    video_ids: list[str]
    video_vecs: np.ndarray  # (V, D) float32
    query_ids: list[int]
    query_vecs: np.ndarray  # (Q, D) float32
    index_file: Path | None = field(default=None, init=False)  # of `video_vecs`; None: built when needed

    def has_video(self, video_id: str) -> bool:
        """Return whether a video has a vector."""
        return video_id in self._columns

    def has_query(self, query_id: int) -> bool:
        """Return whether a query has a vector."""
        return query_id in self._rows

    def column(self, video_id: str) -> int:
        """Return the column of a video in scores, its row in `video_vecs`."""
        return _lookup(self._columns, video_id, "video")

    def columns(self, video_ids: Iterable[str], missing: int | None = None) -> np.ndarray:
        """Return the columns of videos, (n,); `missing` for a video without a vector, which is else an InputError."""
        if missing is None:
            return np.array([self.column(video_id) for video_id in video_ids], dtype=np.int64)
        return np.array([self._columns.get(video_id, missing) for video_id in video_ids], dtype=np.int64)

    def query_vec(self, query_id: int) -> np.ndarray:
        """Return the vector of a query, (D,)."""
        return self.query_vecs[_lookup(self._rows, query_id, "query")]

    def vecs_of(self, query_ids: Iterable[int]) -> np.ndarray:
        """Return the vectors of queries, (n, D), in the order asked for."""
        return self.query_vecs[[_lookup(self._rows, query_id, "query") for query_id in query_ids]]

    def scores(self, query_vecs: np.ndarray) -> np.ndarray:
        """Return the cosine of each query with each video, (Q, V) for queries (Q, D); (V,) for a single one (D,)."""
        return self.video_vecs @ query_vecs if query_vecs.ndim == 1 else query_vecs @ self.video_vecs.T

    def search(self, query_vecs, k: int, scores=None) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, columns) of the k best videos, both (Q, k), best first; equal scores in row order.

        FAISS proposes candidates, and `scores` orders them: its last bits differ from FAISS's and between machines'
        FAISS builds, and order and rank must come from one set of numbers. The result is that of a full sort. Of a
        large gallery the candidates are those of its IVF index, so a video may be missed (`ivf_index`).

        scores  (Q, V) of `Vectors.scores`, if the caller has them
        """
        k, query_vecs = min(k, len(self.video_ids)), np.ascontiguousarray(query_vecs, np.float32)
        if not isinstance(self.index, faiss.IndexIVF):
            return self._search_exact(query_vecs, k, self.scores(query_vecs) if scores is None else scores)
        columns = np.sort(self.index.search(query_vecs, 2 * k)[1], axis=1)  # -1 where the lists held too few
        if scores is None:
            candidates = np.einsum("qkd,qd->qk", self.video_vecs[columns], query_vecs)
        else:
            candidates = np.take_along_axis(scores, columns, axis=1)
        return _best(np.where(columns < 0, -np.inf, candidates), columns, k)

    def _search_exact(self, query_vecs, k, scores):
        """Take more candidates until no other video can reach the k-th best, whatever FAISS's rounding."""
        count, margin = 2 * k + 8, self._margin(query_vecs)
        while count < min(len(self.video_ids), MAX_CANDIDATES):
            approximate, columns = self.index.search(query_vecs, count)
            columns = np.sort(columns, axis=1)
            best, columns = _best(np.take_along_axis(scores, columns, axis=1), columns, k)
            if (best[:, -1] > approximate[:, -1] + margin).all():
                return best, columns
            count *= 4
        return _best(scores, np.broadcast_to(np.arange(scores.shape[1]), scores.shape), k)

    def _margin(self, query_vecs):
        """Return how far two float32 products of the same vectors can be apart: twice the bound of one's error."""
        lengths = np.linalg.norm(query_vecs, axis=1).max(initial=0) * self._longest
        return 2 * query_vecs.shape[1] * np.finfo(np.float32).eps / 2 * lengths

    @cached_property
    def index(self) -> faiss.Index:
        """The FAISS index of `video_vecs`: exact, on the GPUs where there are any; for a large gallery IVF, mapped."""
        if self.index_file is None:
            return _to_gpu(build_index(self.video_vecs))
        if len(self.video_ids) >= ivf_index.FROM:
            return ivf_index.open_index(self.index_file)
        # Mapped, so that the gallery is not in memory twice.
        return _to_gpu(faiss.read_index(str(self.index_file), faiss.IO_FLAG_MMAP_IFC))

    @cached_property
    def _longest(self):
        return np.sqrt(np.einsum("vd,vd->v", self.video_vecs, self.video_vecs).max(initial=0))

    @cached_property
    def _columns(self):
        return {video_id: column for column, video_id in enumerate(self.video_ids)}

    @cached_property
    def _rows(self):
        return {query_id: row for row, query_id in enumerate(self.query_ids)}


def load_vectors(folder: Path) -> Vectors:
    """Load the vectors that `embed_corpus` wrote; the video vectors of a large gallery are mapped, not read."""
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    mode = None if len(ids["videos"]) < ivf_index.FROM else "r"
    video_vecs = np.load(folder / "video_vecs.npy", mmap_mode=mode)
    vectors = Vectors(ids["videos"], video_vecs, ids["queries"], np.load(folder / "query_vecs.npy"))
    if (folder / "index.faiss").exists():
        vectors.index_file = folder / "index.faiss"
    return vectors


def build_index(video_vecs: np.ndarray) -> faiss.Index:
    """Build an exact inner-product index over unit vectors (V, D), on the CPU."""
    index = faiss.IndexFlatIP(video_vecs.shape[1])
    index.add(np.ascontiguousarray(video_vecs, np.float32))
    return index


def _to_gpu(index):
    """Copy an index to the GPUs, if this build of faiss and this machine have any."""
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        return faiss.index_cpu_to_all_gpus(index)
    return index


def _lookup(places: dict, key, kind: str) -> int:
    if key not in places:
        raise InputError(
            f"{kind} {key!r} has no vector; its video may be unreadable (skipped.csv), or run `embed` again"
        )
    return places[key]


def _best(scores, columns, k):
    """Return the k best of candidates (Q, C) in row order; a stable sort keeps equal scores in that order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(columns, order, axis=1)


# --- Ranks


def ranks(scores: np.ndarray, true_columns: Sequence[int]) -> np.ndarray:
    """Return the rank of the right video of each query, (Q,), from scores (Q, V); ties count for us (official).

    >>> ranks(np.array([[0.9, 0.9, 0.1]]), np.array([1]))
    array([1])
    """
    assert not np.isnan(scores).any(), "a score that is not a number would rank its video nowhere"
    return 1 + (scores > _true_scores(scores, true_columns)).sum(axis=1)


def ranks_pessimistic(scores: np.ndarray, true_columns: Sequence[int]) -> np.ndarray:
    """Return the same ranks with ties counting against us, (Q,); printed beside `ranks`.

    >>> ranks_pessimistic(np.array([[0.9, 0.9, 0.1]]), np.array([1]))
    array([2])
    """
    return ranks(scores, true_columns) + ties(scores, true_columns)


def ties(scores: np.ndarray, true_columns: Sequence[int]) -> np.ndarray:
    """Count the wrong videos with exactly the score of the right one, (Q,)."""
    return (scores == _true_scores(scores, true_columns)).sum(axis=1) - 1


def _true_scores(scores, true_columns):
    return np.take_along_axis(scores, np.asarray(true_columns)[:, None], axis=1)  # (Q, 1)
