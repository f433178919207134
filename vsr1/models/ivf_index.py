"""Build and open an index for galleries beyond one machine's memory: FAISS IVF by inner product, searched on disk.

Vectors lie in lists by the nearest of about sqrt(V) centroids, in 16 bits. A search reads the `nprobe` lists nearest to
its query. `nprobe` is chosen by comparison with exact search, and kept in the index.

An index is two files: `index.faiss` with the centroids, and beside it `index.ivfdata` with the lists, which is mapped.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from vsr1 import cache
from vsr1.config import InputError

Stream = Callable[
    [], Iterable[np.ndarray]
]  # each call is a pass: arrays (n, D) float32 of unit vectors, or maps

# All ours.
FROM = 100_000  # videos from which the index is not exact: 0.8 GB of 2048 dimensions, all of it read for each query
RECALL, K = 0.95, 10  # what a search must find of the K best
SAMPLE = 40  # vectors a centroid that k-means learns from; FAISS warns below 39
BLOCK = 1 << 15  # vectors encoded at once, 256 MB of 2048 dimensions: what a kill can cost
CHECKS = 1000  # at most so many queries are searched exactly


def open_index(path: Path) -> faiss.Index:
    """Open an index; its lists are read from disk as searches ask for them.

    Where the lists of a query hold fewer than k vectors, its last columns are -1. Raises InputError for a broken file.
    """
    index = _read(path, faiss.IO_FLAG_SKIP_IVF_DATA)
    lists, data = faiss.downcast_InvertedLists(index.invlists), path.with_suffix(".ivfdata")
    size = data.stat().st_size if data.exists() else 0
    if size != lists.totsize:  # a map beyond the end of a file would end the process
        raise InputError(
            f"{data}: a broken index ({size} of {lists.totsize} bytes); delete it and make it again"
        )
    lists.filename, lists.read_only = str(data), True  # the folder may have been renamed since
    lists.do_mmap()
    return index


def exact(stream: Stream, queries: np.ndarray, k: int) -> np.ndarray:
    """Return the rows (Q, k) of the vectors nearest to each query, best first, by comparison with all vectors."""
    blocks = (block for _, block in _blocks(stream))
    return knn_ground_truth(queries, blocks, k, faiss.METRIC_INNER_PRODUCT)[1]


def recalls(rows: np.ndarray, true_rows: np.ndarray) -> np.ndarray:
    """Return for each query, (Q,), the share of the true rows, (Q, k), that were found.

    >>> recalls(np.array([[7, 5], [1, 2]]), np.array([[5, 7], [1, 3]]))
    array([1. , 0.5])
    """
    pairs = zip(rows, true_rows, strict=True)
    return np.array([len(np.intersect1d(found, true)) for found, true in pairs]) / true_rows.shape[1]


def build(path: Path, stream: Stream, queries: np.ndarray, target: float = RECALL) -> dict:
    """Build the index files of a stream and return what was measured; a killed build resumes at its last block.

    A vector's row is its place in the stream. There are four passes: shape, a sample for k-means, the lists, exact
    search. The caller makes sure that a resumed build gets the same vectors, as `cache.build` does.

    queries  (Q, D), two at least. On half of them `nprobe` grows until it surely finds `target` of the K best. The
             returned recall is that of the other half
    """
    count, dim = _shape(path, stream, queries)
    parts = path.with_name(f"{path.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    trained, files = parts / "trained.faiss", []
    if not trained.exists():
        _write(_train(stream, count, dim), trained)
    for start, block in cache.progress(_blocks(stream), "index vectors", math.ceil(count / BLOCK)):
        files.append(parts / f"{start:012}.part")
        if not files[-1].exists():
            part = _read(trained)
            part.add_with_ids(block, np.arange(start, start + len(block)))
            _write(part, files[-1])
    index = _merge(_read(trained), files, parts / "merged.ivfdata")
    queries = np.ascontiguousarray(queries[:: math.ceil(len(queries) / CHECKS)], np.float32)
    measured = _tune(index, queries, exact(stream, queries, min(K, count)), target)
    os.replace(parts / "merged.ivfdata", path.with_suffix(".ivfdata"))
    _write(index, path)
    shutil.rmtree(parts)
    return {"vectors": count, "dimensions": dim, "lists": index.nlist} | measured


def _shape(path, stream, queries):
    """Return (vectors, dimensions) of a stream whose vectors and queries have one width."""
    shapes = [vecs.shape for vecs in stream()]
    widths = {dim for _, dim in shapes} | {queries.shape[1]}
    if len(widths) > 1:
        raise InputError(
            f"{path}: vectors and queries of {sorted(widths)} dimensions; index those of one engine"
        )
    if not (count := sum(size for size, _ in shapes)):
        raise InputError(f"{path}: there are no vectors to index")
    return count, widths.pop()


def _blocks(stream):
    """Give (first row, vectors) of blocks of a stream, at most BLOCK vectors each; all are checked to be finite."""
    row = 0
    for vecs in stream():
        for start in range(0, len(vecs), BLOCK):
            block = np.ascontiguousarray(vecs[start : start + BLOCK], np.float32)
            if not (finite := np.isfinite(block).all(axis=1)).all():
                raise InputError(
                    f"the vector of row {row + finite.argmin()} holds no numbers; make its shard again"
                )
            yield row, block
            row += len(block)


def _train(stream, count, dim):
    """Return the index without vectors: centroids by spherical k-means on vectors spread evenly over the stream."""
    lists = round(math.sqrt(count))
    rows = np.linspace(0, count - 1, min(count, SAMPLE * lists)).astype(int)
    sample = [
        block[rows[(rows >= start) & (rows < start + len(block))] - start] for start, block in _blocks(stream)
    ]
    half, ip = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, ip, False)
    index.train(np.concatenate(sample))
    return index


def _merge(index, files, data):
    """Give `index` the vectors of its parts, list by list in one file, which is mapped."""
    parts = [_read(file, faiss.IO_FLAG_MMAP) for file in files]  # kept alive until all are merged
    pointers = faiss.InvertedListsPtrVector()
    for part in parts:
        pointers.push_back(part.invlists)
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(data))
    index.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size())
    index.replace_invlists(lists, True)
    lists.this.disown()
    return index


def _read(path, flags=0):
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("Error: ")[2]
        raise InputError(f"{path}: a broken index ({reason}); delete it and make it again") from error


def _write(index, path):
    faiss.write_index(index, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def _tune(index, queries, true_rows, target):
    """Set the smallest `nprobe`, in steps of a quarter, that finds `target` on the even queries, two standard errors
    to spare; return it with the recall on the odd queries."""
    index.nprobe = 1
    while index.nprobe < index.nlist and _lower_bound(_recall(index, queries[::2], true_rows[::2])) < target:
        index.nprobe = min(math.ceil(1.25 * index.nprobe), index.nlist)
    measured = _recall(index, queries[1::2], true_rows[1::2])
    numbers = {"nprobe": index.nprobe, "recall": float(measured.mean())}
    return numbers | {"k": true_rows.shape[1], "queries": len(measured)}


def _lower_bound(values):
    """Return a mean less two standard errors of it."""
    return values.mean() - 2 * values.std() / math.sqrt(len(values))


def _recall(index, queries, true_rows):
    return recalls(index.search(queries, true_rows.shape[1])[1], true_rows)
