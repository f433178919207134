"""An index for galleries beyond one machine's memory: FAISS IVF by inner product, built in passes, searched on disk.

Vectors lie in lists by the nearest of about sqrt(V) centroids, in 16 bits; a search reads the `nprobe` lists nearest to
its query, whatever the others hold. How many these are is measured, against exact search, and kept in the file.

That file is what `faiss.write_index` would write of the same index made in memory, to the byte; FAISS reads it into
memory, or maps it. It is put together here because FAISS's own way (OnDiskInvertedLists, merge_ondisk) maps all that it
merges, keeps the lists in a second file under a path that must not change, and tells stdout when it looks elsewhere.
"""

import math
import os
import shutil
import struct
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


def read_shard(path: Path) -> np.ndarray:
    """The (n, D) vectors of a .npy file, mapped: what is not looked at is not read."""
    try:
        vecs = np.load(path, mmap_mode="r")  # numpy reads no pickles unless told to
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: a broken shard of vectors ({error}); make it again") from error
    if vecs.ndim != 2 or vecs.dtype != np.float32:
        raise InputError(
            f"{path}: {vecs.dtype} of shape {vecs.shape}; a shard is float32, (vectors, dimensions)"
        )
    return vecs


def open_index(path: Path) -> faiss.Index:
    """The index in a file, mapped: lists are read from disk as searches ask for them, for `engine.search`.

    Where the lists it looks at hold fewer than k vectors, its last rows are -1. One query has one thread: two that
    share its lists (`parallel_mode` 1) wait for each other where a machine has other work.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        why = str(error).splitlines()[0].rpartition("Error: ")[2]
        raise InputError(f"{path}: a broken index ({why}); delete it and make it again") from error


def exact(stream: Stream, queries: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) rows of the vectors nearest to each query, best first: one pass, all of them compared."""
    return knn_ground_truth(queries, _blocks(stream), k, faiss.METRIC_INNER_PRODUCT)[1]


def recalls(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each query, (Q,), the share of the truth's rows, (Q, k), that were found.

    >>> recalls(np.array([[7, 5], [1, 2]]), np.array([[5, 7], [1, 3]]))
    array([1. , 0.5])
    """
    pairs = zip(found, truth, strict=True)
    return np.array([len(np.intersect1d(one, other)) for one, other in pairs]) / truth.shape[1]


def build(path: Path, stream: Stream, queries: np.ndarray, wanted: float = RECALL) -> dict:
    """Makes the index file of a stream; says what was measured. A stopped build goes on where it was.

    A vector's row is its place in the stream. Four passes: sizes, a sample for k-means, the lists, exact search. Each
    block of lists is a file; they are merged last. Who calls sees to it that the vectors are still the same when a
    build goes on, as `stages.run` does.

    queries  (Q, D) like those that will be asked, two at least. On half of them `nprobe` grows until it surely finds
             `wanted` of the K best; the recall that is told is that of the other half
    """
    count, dim = _shape(stream)
    if queries.shape[1] != dim:
        raise InputError(
            f"{path}: queries of {queries.shape[1]} dimensions for vectors of {dim}; take one engine"
        )
    parts = path.with_name(f"{path.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    index = _trained(parts / "trained.faiss", stream, count, dim)
    files, row = [], 0
    for block in cache.progress(_blocks(stream), "index vectors", math.ceil(count / BLOCK)):
        files.append(parts / f"{row:012}.part")
        if not files[-1].exists():
            _encode(index, np.array(block), row, files[-1])
        row += len(block)
    scratch = parts / "merged.faiss"
    counts = _merge(index, files, scratch)
    queries = np.ascontiguousarray(queries[:: math.ceil(len(queries) / CHECKS)], np.float32)
    told = _tune(open_index(scratch), queries, exact(stream, queries, min(K, count)), wanted)
    index.nprobe = told["nprobe"]
    with open(scratch, "r+b") as file:
        file.write(_head(index, counts))
    os.replace(scratch, path)
    shutil.rmtree(parts)
    return {"vectors": count, "dimensions": dim, "lists": index.nlist} | told


def _shape(stream):
    """(vectors, dimensions) of a stream."""
    shapes = [vecs.shape for vecs in stream()]
    for number, (_, dim) in enumerate(shapes):
        if dim != shapes[0][1]:
            first = f"the first has {shapes[0][1]}"
            raise InputError(
                f"shard {number}: vectors of {dim} dimensions, {first}; index those of one engine"
            )
    if not (count := sum(size for size, _ in shapes)):
        raise InputError("there are no vectors to index")
    return count, shapes[0][1]


def _blocks(stream):
    """The vectors of a stream, at most BLOCK at once."""
    for vecs in stream():
        for start in range(0, len(vecs), BLOCK):
            yield vecs[start : start + BLOCK]


def _trained(path, stream, count, dim):
    """The index without vectors: centroids by spherical k-means over vectors evenly spread through the stream."""
    if path.exists():
        return faiss.read_index(str(path))
    lists = round(math.sqrt(count))
    rows, start, sample = np.linspace(0, count - 1, min(count, SAMPLE * lists)).astype(int), 0, []
    for vecs in stream():
        sample.append(vecs[rows[(rows >= start) & (rows < start + len(vecs))] - start])
        start += len(vecs)
    half = faiss.ScalarQuantizer.QT_fp16
    ip = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, ip, False)
    index.train(_finite(np.concatenate(sample), rows))
    faiss.write_index(index, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    return index


def _finite(vecs, rows):
    """`vecs` of these rows, if all of them are numbers."""
    if not np.isfinite(vecs).all():
        bad = rows[~np.isfinite(vecs).all(axis=1)][0]
        raise InputError(f"the vector of row {bad} holds values that are no numbers; make its shard again")
    return vecs


def _encode(index, vecs, row, path):
    """The part of a block: how many vectors each list gets, (L,) int64, then their codes and rows, list after list."""
    vecs = _finite(vecs, np.arange(row, row + len(vecs)))
    lists = index.quantizer.search(vecs, 1)[1][:, 0]
    order = np.argsort(lists, kind="stable")
    scratch = path.with_suffix(".tmp")
    with open(scratch, "wb") as file:
        np.bincount(lists, minlength=index.nlist).tofile(file)
        index.sq.compute_codes(vecs[order]).tofile(file)
        (row + order).tofile(file)
    os.replace(scratch, path)


def _merge(index, files, path):
    """The parts as one file; (L,) lengths of its lists. No more than one list of one part is in memory at once."""
    counts = np.stack([np.fromfile(file, np.int64, index.nlist) for file in files])  # (P, L)
    starts, sizes = counts.cumsum(axis=1) - counts, counts.sum(axis=1)
    for file, size in zip(files, sizes, strict=True):
        if file.stat().st_size != 8 * index.nlist + size * (index.code_size + 8):
            raise InputError(f"{file}: a broken part of an index; delete it and run the same command again")
    with open(path, "wb") as merged:
        merged.write(_head(index, counts.sum(axis=0)))
        for number in range(index.nlist):
            for width, skipped in ((index.code_size, 0 * sizes), (8, index.code_size * sizes)):  # codes, rows
                for file, start, size, skip in zip(files, starts, counts, skipped, strict=True):
                    offset = 8 * index.nlist + skip + width * start[number]
                    merged.write(np.fromfile(file, np.uint8, width * size[number], offset=offset))
    return counts.sum(axis=0)


def _head(index, counts):
    """What FAISS writes of an index before its lists: all about it, and (L,) how many vectors each list holds."""
    index.ntotal = int(counts.sum())
    written = faiss.serialize_index(index).tobytes()
    none = struct.pack("<4sQ", b"sprs", 0)  # which ends with no list, as `index` itself is empty
    assert written.endswith(none), "FAISS writes its lists otherwise now"
    return (
        written.removesuffix(none)
        + struct.pack("<4sQ", b"full", len(counts))
        + counts.astype("<u8").tobytes()
    )


def _tune(index, queries, truth, wanted):
    """The fewest lists, in steps of a quarter, that find `wanted` of the even queries' truth, two standard errors to
    spare; the recall on the odd ones."""
    index.nprobe = 1
    while index.nprobe < index.nlist and _surely(_measure(index, queries[::2], truth[::2])) < wanted:
        index.nprobe = min(math.ceil(1.25 * index.nprobe), index.nlist)
    measured = _measure(index, queries[1::2], truth[1::2])
    return {
        "nprobe": index.nprobe,
        "recall": float(measured.mean()),
        "k": truth.shape[1],
        "queries": len(measured),
    }


def _surely(measured):
    """A mean less two standard errors of it."""
    return measured.mean() - 2 * measured.std() / math.sqrt(len(measured))


def _measure(index, queries, truth):
    return recalls(index.search(queries, truth.shape[1])[1], truth)
