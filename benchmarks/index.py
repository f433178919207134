"""What a search among a million videos takes: `python -m vsr1 bench large`, into results/bench/large.{json,csv}.

The vectors are made up (`World`) in the width of Qwen3-VL-Embedding-2B: how alike those of real videos are nobody here
has seen. So the kind case, in which a query has neighbours, stands beside two harder ones.
"""

import argparse
import concurrent.futures
import csv
import math
import multiprocessing
import os
import platform
import resource
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import faiss
import numpy as np

from vsr1 import cache, config
from vsr1.config import InputError
from vsr1.models import ivf_index
from vsr1.report import results

# All ours.
CORES = 2  # that a search may use
TARGET_RECALL, TARGET_MS = 0.95, 20  # of the first world
SHARD = 1 << 15  # vectors a file
QUERIES = 400  # half of them choose `nprobe`; the other half are asked one by one
COLD = 20  # of these first, each with an index that has just been opened and no list of it in memory
# Within a cluster, where centers lie 1 apart in each dimension; of a vector and of a query, whose length is 1.
SPREAD, NOISE, AWAY = 0.5, 0.3, 0.5


@dataclass(frozen=True)
class World:
    """How vectors are made: Gaussian points in `inner` dimensions, in clusters of about `cluster`, thrown by a random
    matrix into all dimensions, set to length one, moved by a random step of length NOISE and set to length one again.
    Queries are such vectors moved by AWAY.
    """

    name: str
    most: int  # vectors, as far as a run asks for so many
    inner: int | None  # None: random directions in all dimensions
    cluster: int | None  # None: one cluster


WORLDS = (
    World("clusters of 100 in 64 dimensions", 10**9, 64, 100),
    World("no clusters, 64 dimensions", 200_000, 64, None),
    World("random directions", 100_000, None, None),
)


@dataclass(frozen=True)
class Measurement:
    """One world: recall and time of single queries at the `nprobe` that was chosen, and what it took to get there."""

    world: str
    vectors: int
    dimensions: int
    lists: int
    nprobe: int
    recall: float  # at K, of queries that had no part in the choice
    ms: float  # median of single queries by the clock, lists in memory
    ms_95: float  # 95th percentile
    processor_ms: (
        float  # mean over queries, all threads together: other work on the machine hardly lengthens it
    )
    cold_ms: float  # median, no list in memory
    cold_ms_95: float
    exact_ms: float  # all vectors compared by a matrix product over mapped shards
    cosine_1: float  # of a query and the vector nearest to it, on average
    cosine_10: float
    index_gb: float
    search_gb: float  # highest of the searching process, what it has mapped and looked at included
    search_own_gb: float  # of it not mapped from files: libraries and centroids
    build_minutes: float  # of the index, exact search for its check included
    target_recall: float | None = None
    target_ms: float | None = None


def unit(vecs: np.ndarray) -> np.ndarray:
    """`vecs` at length one."""
    return vecs / np.linalg.norm(vecs, axis=1, keepdims=True)


def moved(vecs: np.ndarray, length: float, rng) -> np.ndarray:
    """Unit vectors (n, D), each moved by about `length` in a direction of its own."""
    return unit(
        vecs + rng.standard_normal(vecs.shape, np.float32) * np.float32(length / math.sqrt(vecs.shape[1]))
    )


def make_vectors(world: World, count: int, dim: int, number: int, size: int) -> np.ndarray:
    """Shard `number` of a world of `count` vectors: (size, dim) float32."""
    own, shared = np.random.default_rng([1, number]), np.random.default_rng(0)
    if world.inner is None:
        return unit(own.standard_normal((size, dim), np.float32))
    lift = shared.standard_normal((world.inner, dim), np.float32)
    points = own.standard_normal((size, world.inner), np.float32)
    if world.cluster:
        centers = shared.standard_normal((max(1, count // world.cluster), world.inner), np.float32)
        points = centers[own.integers(len(centers), size=size)] + np.float32(SPREAD) * points
    return moved(unit(points @ lift), NOISE, own)


def make_shards(world: World, count: int, dim: int, folder: Path) -> list[Path]:
    """The vectors of a world as .npy files."""
    starts = range(0, count, SHARD)
    paths = [folder / f"{number:05}.npy" for number in range(len(starts))]
    for number, start in enumerate(cache.progress(starts, "make vectors")):
        np.save(paths[number], make_vectors(world, count, dim, number, min(SHARD, count - start)))
    return paths


def make_queries(paths: list[Path]) -> np.ndarray:
    """(QUERIES, D): vectors of the shards, moved."""
    rng = np.random.default_rng(2)
    picked = [ivf_index.read_shard(paths[at]) for at in rng.integers(len(paths), size=QUERIES)]
    return moved(np.stack([vecs[rng.integers(len(vecs))] for vecs in picked]), AWAY, rng)


def by_product(stream: ivf_index.Stream, query: np.ndarray) -> np.ndarray:
    """The K rows nearest to a query (D,), best first, by a product with every vector."""
    scores = np.concatenate([vecs @ query for vecs in stream()])
    return np.argsort(-scores, kind="stable")[: ivf_index.K]


def measure(world: World, count: int, dim: int, folder: Path) -> tuple[Measurement, list[list[float]]]:
    """(the row of a world, its curve: [nprobe, recall, median ms]); `folder` is filled with all that it takes."""
    paths = make_shards(world, count, dim, folder)
    stream = lambda: map(ivf_index.read_shard, paths)  # noqa: E731
    queries, path, started = make_queries(paths), folder / "index.faiss", time.perf_counter()
    built = ivf_index.build(path, stream, queries, TARGET_RECALL)
    minutes = (time.perf_counter() - started) / 60
    asked = queries[1::2]  # the others chose nprobe
    truth = ivf_index.exact(stream, asked, ivf_index.K)
    cosines = [(_rows_of(paths, best) * query).sum(axis=1) for best, query in zip(truth, asked, strict=True)]
    slow = [clocked(lambda query=query: by_product(stream, query)) for query in asked[:3]]
    assert all((found == best).all() for (_, found), best in zip(slow, truth, strict=False)), (
        "exact is not exact"
    )
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        told = pool.submit(_search, path, asked, truth).result()
    assert told["recall"] == built["recall"], "single queries find something else than all at once"
    row = Measurement(
        world.name,
        count,
        dim,
        built["lists"],
        built["nprobe"],
        told["recall"],
        *_spread(told["warm"]),
        told["processor_ms"],
        *_spread(told["cold"]),
        1000 * float(np.median([seconds for seconds, _ in slow])),
        *np.mean(cosines, axis=0)[[0, -1]].tolist(),
        path.stat().st_size / 1e9,
        told["peak_gb"],
        told["own_gb"],
        minutes,
    )
    return row, told["curve"]


def _rows_of(paths: list[Path], rows: np.ndarray) -> np.ndarray:
    """(k, D) the vectors of rows of the whole."""
    return np.stack([ivf_index.read_shard(paths[row // SHARD])[row % SHARD] for row in rows])


def clocked(work):
    """(seconds, what came back)."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _spread(seconds):
    """Median and 95th percentile in ms."""
    return (1000 * np.percentile(seconds, (50, 95))).tolist()


def _search(path, queries, truth):
    """What a process measures that only searches, on CORES cores, one query at a time."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    cold = []
    for query in queries[:COLD]:
        _forget(path)
        index = ivf_index.open_index(path)
        cold.append(
            clocked(lambda query=query, index=index: index.search(query[None], ivf_index.K))[0]
        )
    index = ivf_index.open_index(path)
    _ask(index, queries)  # now its lists are in memory
    spent = time.process_time()
    warm, found = _ask(index, queries)
    spent = 1000 * (time.process_time() - spent) / len(queries)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, own = (int(status[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon"))
    told = {"cold": cold, "warm": warm, "processor_ms": spent, "recall": found(truth)}
    told |= {"peak_gb": peak, "own_gb": own, "curve": []}
    chosen = index.nprobe
    for power in range(math.ceil(math.log2(chosen)) + 1):
        index.nprobe = min(2**power, chosen)
        seconds, found = _ask(index, queries)
        told["curve"].append([index.nprobe, found(truth), _spread(seconds)[0]])
    return told


def _ask(index, queries):
    """(seconds of each query, asked alone; the recall as a function of the truth)."""
    asked = [
        clocked(lambda query=query: index.search(query[None], ivf_index.K)) for query in queries
    ]
    rows = np.concatenate([rows for _, (_, rows) in asked])
    return [seconds for seconds, _ in asked], lambda truth: float(ivf_index.recalls(rows, truth).mean())


def _forget(path):
    """Takes a file out of the page cache; what is still mapped somewhere stays."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(rows: list[Measurement], curves: dict, folder: Path, **facts) -> None:
    """large.json with the rows, the curves, the machine and the versions; large.csv with the rows alone."""
    folder.mkdir(parents=True, exist_ok=True)
    facts |= {"seconds": "of the clock", "device": "CPU only", "machine": results.device(), "cores": CORES}
    facts |= {"commit": results.commit(), "k": ivf_index.K, "worlds": [asdict(world) for world in WORLDS]}
    facts |= {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "faiss": faiss.__version__}
    }
    facts |= {"spread": SPREAD, "noise": NOISE, "away": AWAY, "queries": QUERIES // 2}
    facts |= {"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    lines = [{name: _short(value) for name, value in asdict(row).items()} for row in rows]
    curves = {name: [list(map(_short, point)) for point in curve] for name, curve in curves.items()}
    cache.write_json(folder / "large.json", facts | {"rows": lines, "curves": curves})
    with open(folder / "large.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        table.writeheader()
        table.writerows(lines)


def _short(value):
    return round(value, 4) if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    """Recall and time of the index for large galleries; status 1 where a target is missed. Takes 17 KB of disk a
    vector, given back at the end."""
    parser = argparse.ArgumentParser(prog="python -m vsr1 bench large", description=main.__doc__)
    parser.add_argument(
        "--vectors", type=int, default=1_000_000, help="of the first world (default: a million)"
    )
    parser.add_argument("--dimensions", type=int, default=2048, help="default: 2048, as the engine's")
    args = parser.parse_args(argv)
    if args.vectors < 1000 or args.dimensions < 64:
        raise InputError("bench large: at least --vectors 1000 and --dimensions 64 are needed")
    started, load = time.time(), os.getloadavg()[0]
    folder, rows, curves = config.ROOT / "runs" / "bench" / "large", [], {}
    need, free = 8.5 * args.vectors * args.dimensions, shutil.disk_usage(config.ROOT).free
    if need > free:
        raise InputError(
            f"{folder}: takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; ask for fewer --vectors"
        )
    for world in WORLDS:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            row, curve = measure(world, min(args.vectors, world.most), args.dimensions, folder)
        finally:
            shutil.rmtree(folder)
        if world is WORLDS[0]:
            row = Measurement(**asdict(row) | {"target_recall": TARGET_RECALL, "target_ms": TARGET_MS})
        print(
            f"{row.world}: {row.vectors} vectors, recall@{ivf_index.K} {row.recall:.3f} at {row.ms:.1f} ms (95 %: "
            f"{row.ms_95:.1f}; processor {row.processor_ms:.1f}; cold {row.cold_ms:.1f}; exact {row.exact_ms:.0f}), "
            f"{row.nprobe} of {row.lists} lists"
        )
        rows.append(row)
        curves[world.name] = curve
    loads = {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    minutes = round((time.time() - started) / 60, 1)
    write(rows, curves, config.ROOT / "results" / "bench", minutes=minutes, **loads)
    return int(rows[0].recall < TARGET_RECALL or rows[0].ms >= TARGET_MS)
