"""The two-stage baseline of T1: the engine's first search, then a small trained head that places the moment.

The head reads the frozen engine's vectors of short windows of a video beside the vector of the query. There is no
policy, no verdict (VER is missing) and no second turn. Answers are kept as a submission that `fig_scorer` reads:

runs/<profile>/<dataset>/<seed>/twostage/   windows-<split>-*.npz, head.safetensors, log.jsonl, submission.json
"""

import copy
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, frame_store, source, video_reader
from vsr1.data.annotations import Query, evenly_spaced
from vsr1.evaluation import metrics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import retrieval
from vsr1.loop.moments import span_iou
from vsr1.models import embedding, engine, search_index

WINDOW = 4  # ours, frames: two of the model's pairs; of 64 frames at most, so a video has at most 16 windows
BATCH = 64  # ours, queries of a training step
VALIDATION_SHARE = 4  # ours: one validation video for so many that the head learns from


# --- Windows


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of V videos, padded to the longest."""

    rows: dict[str, int]  # of video ids
    vecs: torch.Tensor  # (V, W, D)
    mask: torch.Tensor  # (V, W) False at padding
    edges: np.ndarray  # (V, W + 1) seconds: window i lasts from edge i to edge i + 1; inf at padding


def split_windows(clip: video_reader.Clip) -> tuple[list[video_reader.Clip], np.ndarray]:
    """Return the windows of a clip and their edges, (W + 1,) seconds."""
    parts = [slice(start, start + WINDOW) for start in range(0, len(clip.timestamps), WINDOW)]
    windows = [replace(clip, frames=clip.frames[part], timestamps=clip.timestamps[part]) for part in parts]
    return windows, np.append(clip.timestamps[::WINDOW], clip.seconds)


def embed_windows(
    profile: Profile, dataset: str, encoder: engine.Engine, split: str, video_ids: list[str], folder: Path
) -> None:
    """Embed the windows of videos into `folder`, a file for each SHARD_SIZE of them; a file that is there stays."""
    videos = annotations.find_videos(profile.data_dir(dataset) / "videos", video_ids)
    size = embedding.SHARD_SIZE
    shards = [videos[start : start + size] for start in range(0, len(videos), size)]
    files = [folder / f"windows-{split}-{number:05}.npz" for number in range(len(shards))]
    todo = [(file, shard) for file, shard in zip(files, shards, strict=True) if not file.exists()]
    paths = [video.path for _, shard in todo for video in shard]
    reader = frame_store.reader_for(profile, dataset)
    clips = video_reader.read_videos(paths, reader, profile.decode_workers)
    clips = iter(cache.progress(clips, f"windows {dataset} {split}", len(paths)))
    for file, shard in todo:
        _write_shard(file, shard, [next(clips) for _ in shard], encoder)


def _write_shard(file, videos, clips, encoder):
    """Embed the windows of some clips and write them as one file, complete or not at all."""
    for video, clip in zip(videos, clips, strict=True):
        if clip.problem is not None:  # it has a vector, so it could be read once
            raise InputError(f"{video.path}: was read before, and now: {clip.problem}; run it again")
    windows, edges = zip(*map(split_windows, clips), strict=True)
    vecs = encoder.embed_clips([window for parts in windows for window in parts])
    arrays = {"ids": [video.id for video in videos], "vecs": vecs.astype(np.float16)}
    arrays |= {"counts": [len(parts) for parts in windows], "edges": np.concatenate(edges)}
    with cache.replacing(file) as scratch:
        np.savez(scratch, **arrays)


def load_windows(folder: Path, split: str, device="cpu") -> Windows:
    """Load what `embed_windows` wrote."""
    files = [np.load(path) for path in sorted(folder.glob(f"windows-{split}-*.npz"))]
    joined = {name: np.concatenate([file[name] for file in files]) for name in files[0].files}
    counts, width = joined["counts"], joined["vecs"].shape[1]
    mask = np.arange(counts.max()) < counts[:, None]  # (V, W)
    vecs = np.zeros((*mask.shape, width), np.float32)
    vecs[mask] = joined["vecs"]
    edges = np.full((len(counts), mask.shape[1] + 1), np.inf)
    edges[np.arange(edges.shape[1]) <= counts[:, None]] = joined["edges"]
    rows = {str(video): number for number, video in enumerate(joined["ids"])}
    return Windows(rows, torch.from_numpy(vecs).to(device), torch.from_numpy(mask).to(device), edges)


# --- The head


class SpanHead(nn.Module):
    """Score where a moment starts and ends: query and window meet in C products, convolutions see the neighbours."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.query, self.window = nn.Linear(width, channels), nn.Linear(width, channels)
        self.near = nn.Conv1d(channels + 1, channels, 3, padding="same")
        self.wide = nn.Conv1d(channels, channels, 3, padding="same")
        self.out = nn.Conv1d(channels, 4, 3, padding="same")
        self.drop = nn.Dropout(0.2)
        self.scale = width**0.5  # the entries of a unit vector are small: to about one

    def forward(self, query, vecs, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and shifts of start and end, (B, 2, W) each; log-probabilities are -inf at padding.

        A shift says by how many windows the moment's edge lies behind the window's.

        query  (B, D)
        vecs   (B, W, D), with `mask` (B, W) False at padding
        """
        cosines = 10 * (vecs @ query[:, :, None])  # (B, W, 1)
        window, query = self.window(self.drop(vecs) * self.scale), self.query(self.drop(query) * self.scale)
        products, mask = window * query[:, None], mask[:, None]  # (B, W, C), (B, 1, W)
        states = torch.cat([products, cosines], dim=-1).transpose(1, 2) * mask
        states = self.drop(F.relu(self.near(states))) * mask
        scores, shifts = self.out(F.relu(self.wide(states)) * mask).chunk(2, dim=1)
        return scores.masked_fill(~mask, -torch.inf).log_softmax(-1), shifts


def targets(edges: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return first and last window (B, 2) whose edges are nearest to spans (B, 2), and shifts (B, 2) within 1 window.

    >>> targets(np.array([[0.0, 4.0, 8.0, np.inf]]), np.array([[3.0, 9.0]]))  # the truth may end behind the video
    (array([[1, 1]]), array([[-0.25,  0.25]]))
    """
    last = np.abs(edges[:, 1:] - spans[:, 1:]).argmin(axis=1)
    first = np.minimum(np.abs(edges[:, :-1] - spans[:, :1]).argmin(axis=1), last)
    ends = np.stack([first, last], axis=1)
    shifts = (spans - _outer_edges(edges, ends)) / (edges[:, 1:2] - edges[:, :1])
    return ends, shifts.clip(-1, 1)


def _outer_edges(edges, ends):
    """Return where first windows begin and last windows end, (B, 2) seconds; `ends` (B, 2) windows."""
    return np.take_along_axis(edges, ends + np.array([0, 1]), axis=1)


@torch.no_grad()
def locate(head: SpanHead, query: torch.Tensor, windows: Windows, rows) -> np.ndarray:
    """Return the best span of each (query, video) pair, (B, 2) seconds in whole milliseconds, inside the video."""
    scores, shifts = (part.cpu() for part in head(query, windows.vecs[rows], windows.mask[rows]))
    pairs = scores[:, 0, :, None] + scores[:, 1, None]  # (B, W, W)
    pairs = pairs.masked_fill(~torch.ones(pairs.shape[1:], dtype=torch.bool).triu(), -torch.inf)
    ends = np.stack(np.divmod(pairs.flatten(1).argmax(dim=1).numpy(), pairs.shape[2]), axis=1)  # (B, 2)
    edges, shifts = windows.edges[rows], _pick(shifts, torch.from_numpy(ends)).numpy()
    spans = _outer_edges(edges, ends) + shifts * (edges[:, 1:2] - edges[:, :1])
    seconds = np.where(np.isinf(edges), 0, edges).max(axis=1)
    return np.sort(spans.clip(0, seconds[:, None]), axis=1).round(3)


def _pick(values, ends):
    """Pick the values (B, 2, W) of start and end at their windows `ends` (B, 2)."""
    return values.gather(2, ends[:, :, None])[..., 0]


# --- Training


@dataclass(frozen=True, eq=False)
class SpanQueries:
    """Queries with the windows of their right videos."""

    vecs: torch.Tensor  # (Q, D)
    rows: np.ndarray  # (Q,) of the windows
    spans: np.ndarray  # (Q, 2) seconds
    hit: np.ndarray  # (Q,) whether the first search shows the right video


def span_queries(queries: list[Query], vectors: search_index.Vectors, windows: Windows) -> SpanQueries:
    """Collect the queries whose right video has windows."""
    queries = [query for query in queries if query.video in windows.rows]
    vecs = torch.from_numpy(vectors.vecs_of([query.id for query in queries])).to(windows.vecs.device)
    rows = np.array([windows.rows[query.video] for query in queries])
    spans = np.array([query.span for query in queries])
    return SpanQueries(vecs, rows, spans, retrieval.first_search(queries, vectors).shows_right())


def train(
    profile: Profile,
    head: SpanHead,
    learn: SpanQueries,
    validation: SpanQueries,
    windows: Windows,
    label: str,
) -> list[dict]:
    """Train `head` and return the log, a line an epoch; its weights are those of the best validation overlap."""
    knobs, rng = profile.two_stage, np.random.default_rng([profile.seed, 5])
    optimizer, batches = torch.optim.AdamW(head.parameters()), -(-len(learn.rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, knobs.lr, total_steps=knobs.epochs * batches)
    device, (ends, shifts) = learn.vecs.device, targets(windows.edges[learn.rows], learn.spans)
    wanted = torch.from_numpy(ends).to(device), torch.from_numpy(shifts).float().to(device)  # (Q, 2) each
    log, best, weights = [], -1.0, None
    for epoch in cache.progress(range(1, knobs.epochs + 1), label):
        losses = []
        for batch in np.array_split(rng.permutation(len(learn.rows)), batches):
            loss = _span_loss(head.train(), learn, windows, wanted, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        log.append({"epoch": epoch, "loss": float(np.mean(losses))} | validate(head, validation, windows))
        if log[-1]["miou"] > best:
            best, weights = log[-1]["miou"], copy.deepcopy(head.state_dict())
    head.load_state_dict(weights)
    return log


def _span_loss(head, queries, windows, wanted, batch):
    """Return the cross entropy of the right windows, plus a smooth L1 loss of the shifts there."""
    ends, shifts = (values[batch] for values in wanted)
    rows = queries.rows[batch]
    scores, predicted = head(queries.vecs[batch], windows.vecs[rows], windows.mask[rows])
    shift_loss = F.smooth_l1_loss(_pick(predicted, ends), shifts, beta=0.1)
    return 2 * (F.nll_loss(scores.transpose(1, 2), ends) + shift_loss)


def validate(head: SpanHead, queries: SpanQueries, windows: Windows) -> dict[str, float]:
    """Measure mean overlap in the right videos, and moments found by the first search, in percent."""
    ious = span_iou(locate(head.eval(), queries.vecs, windows, queries.rows), queries.spans)
    numbers = {"miou": metrics.percent(ious)}
    for m in metrics.THRESHOLDS:
        numbers[f"vcmr@{m}"] = metrics.percent(metrics.reaches(ious, m) & queries.hit)
    return numbers


# --- The step


def run(profile: Profile, dataset: str) -> Path:
    """Train the head and answer all test queries unless that is current; return the folder. Resumed after a kill."""
    embedded = [embedding.embed_corpus(profile, dataset, split) for split in ("train", "test")]
    knobs = profile.two_stage
    inputs = {
        "vectors": [cache.metadata(folder)["key"] for folder in embedded],
        "knobs": [knobs.videos, knobs.epochs, knobs.lr, knobs.width, profile.val_fraction, profile.seed],
        "code": cache.source_digest(__name__),
        "families": cache.source_digest(profile.data_source),
    }
    work = functools.partial(_run, profile, dataset, embedded)
    return cache.build(profile.runs(dataset) / "twostage", inputs, work)


def _run(profile, dataset, embedded, folder):
    encoder, corpus = engine.load(profile), profile.data_dir(dataset) / "corpus"
    train_queries, test_queries = (annotations.read_fig(corpus / f"{s}.jsonl") for s in ("train", "test"))
    train_vectors, test_vectors = map(search_index.load_vectors, embedded)
    families = source.families(profile, dataset)
    sides = annotations.split_validation(train_queries, profile.val_fraction, families)  # (learn, validation)
    videos = _train_videos(profile, sides, train_vectors)
    embed_windows(profile, dataset, encoder, "train", videos, folder)
    embed_windows(profile, dataset, encoder, "test", _test_videos(test_queries, test_vectors), folder)
    device = encoder.model.device
    train_windows, test_windows = (load_windows(folder, s, device) for s in ("train", "test"))
    torch.manual_seed(profile.seed)
    head = SpanHead(encoder.width, profile.two_stage.width).to(device)
    learn, validation = (span_queries(side, train_vectors, train_windows) for side in sides)
    log = train(profile, head, learn, validation, train_windows, f"spans {dataset}")
    cache.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    save_file(head.state_dict(), folder / "head.safetensors")
    answers = submission(head, test_queries, test_vectors, test_windows)
    cache.write_text(folder / "submission.json", json.dumps(answers))


def _train_videos(profile, sides, vectors):
    """List the readable train videos whose windows are embedded: to learn from, then of validation."""
    most = profile.two_stage.videos, max(1, profile.two_stage.videos // VALIDATION_SHARE)
    galleries = [[v for v in annotations.gallery_ids(side) if vectors.has_video(v)] for side in sides]
    return [video for pair in zip(galleries, most, strict=True) for video in evenly_spaced(*pair)]


def _test_videos(queries, vectors):
    """List the readable videos that need a span: the first of each query, and the right ones."""
    _, columns = vectors.search(vectors.vecs_of([query.id for query in queries]), 1)
    first = {vectors.video_ids[column] for column in columns[:, 0]}
    return sorted(first | {query.video for query in queries if vectors.has_video(query.video)})


def submission(head: SpanHead, queries: list[Query], vectors: search_index.Vectors, windows: Windows) -> dict:
    """Write answers as `fig_scorer` reads them: the first 100 videos, a span in the first one and in the right one.

    A span in each of 100 videos would need the windows of the whole gallery, and no table reads more than the first.
    """
    videos = sorted({query.video for query in queries}.union(vectors.video_ids))
    numbers = {video: number for number, video in enumerate(videos)}
    vecs = vectors.vecs_of([query.id for query in queries])
    _, columns = vectors.search(vecs, metrics.CUT)  # (Q, k)
    answers = {"video2idx": numbers, "VCMR": [], "SVMR": [], "VR": []}
    for query, vec, best in zip(cache.progress(queries, "spans"), vecs, columns, strict=True):
        ranked = [vectors.video_ids[column] for column in best]
        videos = ranked[:1] + ([query.video] if query.video in windows.rows else [])
        rows = [windows.rows[video] for video in videos]
        query_vecs = torch.from_numpy(vec).to(windows.vecs.device).expand(len(rows), -1)
        spans = locate(head, query_vecs, windows, rows).tolist()
        moments = [[numbers[video], *span] for video, span in zip(videos, spans, strict=True)]
        predictions = {"VR": [[numbers[video]] for video in ranked], "VCMR": moments[:1], "SVMR": moments[1:]}
        for task, rows in predictions.items():
            answers[task].append({"desc_id": query.id, "predictions": rows})
    return answers


# --- Numbers


def oracle_spans(folder: Path, queries: list[Query]) -> np.ndarray:
    """Read the span in the right video of each query, (Q, 2) seconds; empty, a miss, where it was not readable."""
    entries = json.loads((folder / "submission.json").read_text(encoding="utf-8"))["SVMR"]
    predictions = {entry["desc_id"]: entry["predictions"] for entry in entries}
    return np.array([predictions[q.id][0][1:] if predictions[q.id] else (0.0, 0.0) for q in queries])


def hits(profile: Profile, first: retrieval.FirstSearch, spans: np.ndarray) -> dict[str, np.ndarray]:
    """Return {metric: (Q,) values}; a moment counts where the first search shows its video. There is no verdict."""
    ious = span_iou(spans, [query.span for query in first.queries])
    reached = {m: metrics.reaches(ious, m) for m in metrics.THRESHOLDS}
    values = {f"vcmr@{m}": first.shows_right() & enough for m, enough in reached.items()}
    values |= {f"vr@{k}": first.hits(k) for k in profile.vr_ks} | {"right_last": first.shows_right()}
    return values | {f"grounding@{m}": enough for m, enough in reached.items()} | {"miou": ious}


def numbers(
    profile: Profile, dataset: str, first: retrieval.FirstSearch, spans: np.ndarray
) -> dict[str, Estimate]:
    """Measure the row `twostage` of T1, and of V1 what concerns oracle videos."""
    measured = {}
    for metric, values in hits(profile, first, spans).items():
        table = "V1" if metric.startswith(("grounding", "miou")) else "T1"
        measured[f"{table}/{dataset}/twostage/{metric}"] = first.estimate(profile, dataset, values)
    return measured
