"""Score, search and rank queries against the vectors of a gallery."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
from faiss.contrib.ondisk import merge_ondisk

from vsr1 import cache
from vsr1.config import InputError

# All ours.
MAX_CANDIDATES = 2048  # of a query, which is what FAISS finds on a GPU
LARGE = 100_000  # videos from which the index is not exact: 0.8 GB of 2048 dimensions, all of it read for each query
RECALL, K = 0.95, 10  # what a search in a large gallery must find of the K best
SAMPLE = 40  # vectors a centroid that k-means learns from; FAISS warns below 39
BLOCK = 1 << 15  # vectors encoded at once, 256 MB of 2048 dimensions
CHECKS = 1000  # at most so many queries are searched exactly

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

        FAISS proposes candidates and `scores` orders them, since order and rank must come from one set of numbers and
        FAISS's differ in their last bits. More candidates are asked for while a video that was left out could belong
        to the k best. Of a large gallery the candidates are those of its IVF index, so a video may be missed.

        scores  (Q, V) of `Vectors.scores`, if the caller has them
        """
        total, query_vecs = len(self.video_ids), np.ascontiguousarray(query_vecs, np.float32)
        k = min(k, total)
        if self.index_file is not None and total >= LARGE:
            return self._best(query_vecs, self.index.search(query_vecs, 2 * k)[1], k, scores)
        scores = self.scores(query_vecs) if scores is None else scores
        # Two float32 products of unit vectors are this near.
        rounding = query_vecs.shape[1] * np.finfo(np.float32).eps
        count = 2 * k + 8
        while count < min(total, MAX_CANDIDATES):
            proposed, columns = self.index.search(query_vecs, count)
            best, columns = self._best(query_vecs, columns, k, scores)
            if (best[:, -1] > proposed[:, -1] + rounding).all():
                return best, columns
            count *= 4
        return self._best(query_vecs, np.broadcast_to(np.arange(total), scores.shape), k, scores)

    def _best(self, query_vecs, columns, k, scores):
        """Return (scores, columns) of the k best of candidates (Q, C); -1 stands for none."""
        columns = np.sort(columns, axis=1)
        if scores is None:
            values = np.einsum("qcd,qd->qc", self.video_vecs[columns], query_vecs)
        else:
            values = np.take_along_axis(scores, columns, axis=1)
        values = np.where(columns < 0, -np.inf, values)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(values, order, axis=1), np.take_along_axis(columns, order, axis=1)

    @cached_property
    def index(self) -> faiss.Index:
        """The FAISS index of `video_vecs`: exact, on the GPUs where there are any; for a large gallery IVF, mapped."""
        if self.index_file is None:
            return _to_gpu(build_index(self.video_vecs))
        if len(self.video_ids) >= LARGE:
            return open_ivf(self.index_file)
        # Mapped, so that the gallery is not in memory twice.
        return _to_gpu(faiss.read_index(str(self.index_file), faiss.IO_FLAG_MMAP_IFC))

    @cached_property
    def _columns(self):
        return {video_id: column for column, video_id in enumerate(self.video_ids)}

    @cached_property
    def _rows(self):
        return {query_id: row for row, query_id in enumerate(self.query_ids)}


def load_vectors(folder: Path, first: Path | None = None) -> Vectors:
    """Load the vectors that `embed_corpus` wrote; the video vectors of a large gallery are mapped, not read.

    first  an .npz file of other queries and vectors for the same gallery: `ids` (Q,) and `vecs` (Q, D)
    """
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    mode = None if len(ids["videos"]) < LARGE else "r"
    video_vecs = np.load(folder / "video_vecs.npy", mmap_mode=mode)
    if first is None:
        query_ids, query_vecs = ids["queries"], np.load(folder / "query_vecs.npy")
    else:
        with np.load(first) as arrays:
            query_ids, query_vecs = arrays["ids"].tolist(), arrays["vecs"]
    vectors = Vectors(ids["videos"], video_vecs, query_ids, query_vecs)
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


def _lookup(rows: dict, key, kind: str) -> int:
    if key not in rows:
        raise InputError(
            f"{kind} {key!r} has no vector; its video may be unreadable (skipped.csv), or run `embed` again"
        )
    return rows[key]


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


# --- Large galleries: FAISS IVF, searched on disk


def build_ivf(path: Path, vecs: np.ndarray, queries: np.ndarray, target: float = RECALL) -> dict:
    """Build the index of unit vectors (V, D), which may be mapped, and return what was measured.

    Vectors lie in lists by the nearest of about sqrt(V) centroids, in 16 bits, and a search reads the `nprobe` lists
    nearest to its query. `index.faiss` has the centroids, `index.ivfdata` beside it the lists.

    queries  (Q, D), two at least. On half of them `nprobe` grows until it surely finds `target` of the K best. The
             returned recall is that of the other half
    """
    index = _train(vecs)
    parts, files = path.with_name("parts"), []
    parts.mkdir(exist_ok=True)
    for start in cache.progress(range(0, len(vecs), BLOCK), "index vectors"):
        block = np.ascontiguousarray(vecs[start : start + BLOCK], np.float32)
        index.add_with_ids(block, np.arange(start, start + len(block)))
        files.append(str(parts / f"{start}.faiss"))
        faiss.write_index(index, files[-1])
        index.reset()
    merge_ondisk(index, files, str(path.with_suffix(".ivfdata")))
    shutil.rmtree(parts)
    queries = np.ascontiguousarray(queries[:: math.ceil(len(queries) / CHECKS)], np.float32)
    measured = _tune(index, queries, search_exact(vecs, queries, min(K, len(vecs))), target)
    faiss.write_index(index, str(path))
    return {"vectors": len(vecs), "dimensions": index.d, "lists": index.nlist} | measured


def _train(vecs):
    """Return the index without vectors: centroids by spherical k-means on vectors spread evenly over the gallery."""
    (count, dim), lists = vecs.shape, round(math.sqrt(len(vecs)))
    half, ip = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, ip, False)
    index.train(vecs[np.linspace(0, count - 1, min(count, SAMPLE * lists)).astype(int)])
    return index


def _tune(index, queries, true_rows, target):
    """Set the smallest `nprobe`, in steps of a quarter, that finds `target` on the even queries, two standard errors
    to spare; return it with the recall on the odd queries."""
    index.nprobe = 1
    while index.nprobe < index.nlist and _lower_bound(_recalls(index, queries[::2], true_rows[::2])) < target:
        index.nprobe = min(math.ceil(1.25 * index.nprobe), index.nlist)
    measured = _recalls(index, queries[1::2], true_rows[1::2])
    numbers = {"nprobe": index.nprobe, "recall": float(measured.mean())}
    return numbers | {"k": true_rows.shape[1], "queries": len(measured)}


def _recalls(index, queries, true_rows):
    return recalls(index.search(queries, true_rows.shape[1])[1], true_rows)


def _lower_bound(values):
    """Return a mean less two standard errors of it."""
    return values.mean() - 2 * values.std() / math.sqrt(len(values))


def recalls(rows: np.ndarray, true_rows: np.ndarray) -> np.ndarray:
    """Return for each query, (Q,), the share of the true rows, (Q, k), that were found.

    >>> recalls(np.array([[7, 5], [1, 2]]), np.array([[5, 7], [1, 3]]))
    array([1. , 0.5])
    """
    pairs = zip(rows, true_rows, strict=True)
    return np.array([len(np.intersect1d(row, true)) for row, true in pairs]) / true_rows.shape[1]


def search_exact(vecs: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Return the rows (Q, k) of the vectors nearest to each query, best first, by comparison with all vectors."""
    return faiss.knn(queries, vecs, k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def open_ivf(path: Path) -> faiss.Index:
    """Open the index of a large gallery; its lists are read from disk as searches ask for them.

    Where the lists of a query hold fewer than k vectors, its last columns are -1.
    """
    return faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
