"""The one-shot competitor of T1: the engine's first search, then a small trained head that places the moment.

Stage two reads the frozen engine's vectors of short windows of a video beside the vector of the query; there is no
agent, no verdict (VER is missing) and no second look. Answers are kept as a submission that `vsr1.score` reads:

runs/<profile>/<dataset>/twostage/   windows-<split>-*.npz, head.safetensors, log.jsonl, submission.json
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, video_reader
from vsr1.data.annotations import Query, evenly_spaced
from vsr1.evaluation import metrics
from vsr1.experiments import retrieval
from vsr1.loop import moments
from vsr1.models import embedding, engine, search_index
from vsr1.report.results import Estimate

WINDOW = 4  # ours, frames: two of the model's pairs; of 64 frames at most, so a video has at most 16 windows
BATCH = 64  # ours, queries of a training step
HELD = 4  # ours: one held-out video for so many that are learned from


# --- Windows


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of V videos, padded to the longest."""

    row: dict[str, int]  # of a video id
    vecs: torch.Tensor  # (V, W, D)
    there: torch.Tensor  # (V, W) False at padding
    edges: np.ndarray  # (V, W + 1) seconds: window i lasts from edge i to edge i + 1; inf at padding


def cut(clip: video_reader.Clip) -> tuple[list[video_reader.Clip], np.ndarray]:
    """The windows of a clip and their edges, (W + 1,) seconds."""
    starts = range(0, len(clip.timestamps), WINDOW)
    parts = [slice(start, start + WINDOW) for start in starts]
    windows = [replace(clip, frames=clip.frames[part], timestamps=clip.timestamps[part]) for part in parts]
    return windows, np.append(clip.timestamps[::WINDOW], clip.seconds)


def embed(profile, dataset: str, made: engine.Engine, split: str, ids: list[str], folder: Path) -> None:
    """The windows of some videos into `folder`, a file for each `engine.SHARD` of them; what is there stays."""
    videos = annotations.find_videos(profile.data_dir(dataset) / "videos", ids)
    shards = [
        videos[start : start + embedding.SHARD_SIZE] for start in range(0, len(videos), embedding.SHARD_SIZE)
    ]
    files = [folder / f"windows-{split}-{number:05}.npz" for number in range(len(shards))]
    todo = [(file, shard) for file, shard in zip(files, shards, strict=True) if not file.exists()]
    paths = [video.path for _, shard in todo for video in shard]
    clips = video_reader.read_videos(
        paths, video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    )
    clips = iter(cache.progress(clips, f"windows {dataset} {split}", len(paths)))
    for file, shard in todo:
        read = [next(clips) for _ in shard]
        for video, clip in zip(shard, read, strict=True):
            if clip.problem is not None:  # it has a vector, so it could be read once
                raise InputError(f"{video.path}: was read before, and now: {clip.problem}; run it again")
        cuts = [cut(clip) for clip in read]
        vecs = made.embed_clips([window for windows, _ in cuts for window in windows])
        parts = {"ids": [video.id for video in shard], "vecs": vecs.astype(np.float16)}
        parts |= {"counts": [len(windows) for windows, _ in cuts]}
        with open(folder / "shard.tmp", "wb") as scratch:
            np.savez(scratch, **parts, edges=np.concatenate([edges for _, edges in cuts]))
        (folder / "shard.tmp").rename(file)


def load_windows(folder: Path, split: str, device="cpu") -> Windows:
    """What `embed` left."""
    files = [np.load(path) for path in sorted(folder.glob(f"windows-{split}-*.npz"))]
    joined = {name: np.concatenate([file[name] for file in files]) for name in files[0].files}
    counts, width = joined["counts"], joined["vecs"].shape[1]
    there = np.arange(counts.max()) < counts[:, None]  # (V, W)
    vecs = np.zeros((*there.shape, width), np.float32)
    vecs[there] = joined["vecs"]
    edges = np.full((len(counts), there.shape[1] + 1), np.inf)
    edges[np.arange(edges.shape[1]) <= counts[:, None]] = joined["edges"]
    row = {str(video): number for number, video in enumerate(joined["ids"])}
    return Windows(row, torch.from_numpy(vecs).to(device), torch.from_numpy(there).to(device), edges)


# --- The head


class Head(nn.Module):
    """Where a moment starts and ends: query and window meet in C products, two convolutions look around."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.query, self.window = nn.Linear(width, channels), nn.Linear(width, channels)
        self.near = nn.Conv1d(channels + 1, channels, 3, padding="same")
        self.wide = nn.Conv1d(channels, channels, 3, padding="same")
        self.out = nn.Conv1d(channels, 4, 3, padding="same")
        self.drop = nn.Dropout(0.2)
        self.scale = width**0.5  # the entries of a unit vector are small: to about one

    def forward(self, query, vecs, there) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries (B, D) in windows (B, W, D), two of (B, 2, W), for start and end each: log-probability of a
        window (-inf at padding), and by how many windows the moment's edge lies behind the window's."""
        alike = 10 * (vecs @ query[:, :, None])  # (B, W, 1) cosine
        met = self.window(self.drop(vecs) * self.scale) * self.query(self.drop(query) * self.scale)[:, None]
        seen = there[:, None]  # (B, 1, W)
        states = torch.cat([met, alike], dim=-1).transpose(1, 2) * seen
        states = self.drop(F.relu(self.near(states))) * seen
        scores, shifts = self.out(F.relu(self.wide(states)) * seen).chunk(2, dim=1)
        return scores.masked_fill(~seen, -torch.inf).log_softmax(-1), shifts


def targets(edges: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last window (B, 2) whose edges are nearest to spans (B, 2), and shifts (B, 2), at most one window.

    >>> targets(np.array([[0.0, 4.0, 8.0, np.inf]]), np.array([[3.0, 9.0]]))  # the truth may end behind the video
    (array([[1, 1]]), array([[-0.25,  0.25]]))
    """
    last = np.abs(edges[:, 1:] - spans[:, 1:]).argmin(axis=1)
    first = np.minimum(np.abs(edges[:, :-1] - spans[:, :1]).argmin(axis=1), last)
    at = np.stack([first, last], axis=1)
    shifts = (spans - _outer(edges, at)) / (edges[:, 1:2] - edges[:, :1])
    return at, shifts.clip(-1, 1)


def _outer(edges, at):
    """Where first windows begin and last windows end, (B, 2) seconds; `at` (B, 2)."""
    return np.take_along_axis(edges, at + np.array([0, 1]), axis=1)


@torch.no_grad()
def locate(head: Head, query: torch.Tensor, windows: Windows, rows) -> np.ndarray:
    """The best span of each (query, video) pair, (B, 2) seconds in whole milliseconds, inside the video."""
    scores, shifts = (part.cpu() for part in head(query, windows.vecs[rows], windows.there[rows]))
    pairs = scores[:, 0, :, None] + scores[:, 1, None]  # (B, W, W)
    pairs = pairs.masked_fill(~torch.ones(pairs.shape[1:], dtype=torch.bool).triu(), -torch.inf)
    at = np.stack(np.divmod(pairs.flatten(1).argmax(dim=1).numpy(), pairs.shape[2]), axis=1)  # (B, 2)
    edges, moved = windows.edges[rows], shifts.gather(2, torch.from_numpy(at)[:, :, None])[..., 0].numpy()
    spans = _outer(edges, at) + moved * (edges[:, 1:2] - edges[:, :1])
    seconds = np.where(np.isinf(edges), 0, edges).max(axis=1)
    return np.sort(spans.clip(0, seconds[:, None]), axis=1).round(3)


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """Queries with their right videos."""

    query: torch.Tensor  # (Q, D)
    rows: np.ndarray  # (Q,) of the windows
    spans: np.ndarray  # (Q, 2) seconds
    hit: np.ndarray  # (Q,) whether the first search shows the right video


def asked(queries: list[Query], vectors: search_index.Vectors, windows: Windows) -> QueryBatch:
    """Those of the queries whose right video has windows."""
    queries = [query for query in queries if query.video in windows.row]
    found = retrieval.first_search(queries, vectors)
    vecs = torch.from_numpy(vectors.vecs_of([query.id for query in queries]))
    rows = np.array([windows.row[query.video] for query in queries])
    spans = np.array([query.span for query in queries])
    return QueryBatch(vecs.to(windows.vecs.device), rows, spans, right_first(found))


def right_first(found: retrieval.FirstSearch) -> np.ndarray:
    """Whether the video that the first search shows is the right one, (Q,)."""
    return np.array([video == query.video for video, query in zip(found.shown, found.queries, strict=True)])


def train(profile, head: Head, ours: QueryBatch, held: QueryBatch, windows: Windows, what: str) -> list[dict]:
    """The log, a line an epoch; `head` is left as it was when its spans of held-out queries overlapped most."""
    rng, adam = np.random.default_rng([profile.seed, 5]), torch.optim.AdamW(head.parameters())
    batches, epochs, device = -(-len(ours.rows) // BATCH), profile.two_stage.epochs, ours.query.device
    pace = torch.optim.lr_scheduler.OneCycleLR(adam, profile.two_stage.lr, total_steps=epochs * batches)
    at, shifts = targets(windows.edges[ours.rows], ours.spans)
    at, shifts = torch.from_numpy(at).to(device), torch.from_numpy(shifts).float().to(device)  # (Q, 2)
    log, best, kept = [], -1.0, None
    for epoch in cache.progress(range(1, epochs + 1), what):
        losses = []
        for some in np.array_split(rng.permutation(len(ours.rows)), batches):
            rows = ours.rows[some]
            scores, moved = head.train()(ours.query[some], windows.vecs[rows], windows.there[rows])
            moved = moved.gather(2, at[some][:, :, None])[..., 0]  # (B, 2)
            off = F.smooth_l1_loss(moved, shifts[some], beta=0.1)
            loss = 2 * (F.nll_loss(scores.transpose(1, 2), at[some]) + off)
            adam.zero_grad()
            loss.backward()
            adam.step()
            pace.step()
            losses.append(loss.item())
        ious = moments.span_iou(locate(head.eval(), held.query, windows, held.rows), held.spans)
        line = {"epoch": epoch, "loss": float(np.mean(losses)), "miou": metrics.percent(ious)}
        for m in metrics.THRESHOLDS:
            line[f"vcmr@{m}"] = metrics.percent(metrics.reaches(ious, m) & held.hit)
        log.append(line)
        if line["miou"] > best:
            best, kept = line["miou"], copy.deepcopy(head.state_dict())
    head.load_state_dict(kept)
    return log


# --- The stage


def run(profile, dataset: str) -> Path:
    """The folder of the trained head and its answers to all test queries; made once, resumed after a kill."""
    home = profile.runs(dataset)
    knobs = [
        profile.two_stage.videos,
        profile.two_stage.epochs,
        profile.two_stage.lr,
        profile.two_stage.width,
    ]
    inputs = {
        "vectors": [
            cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / s).get("key")
            for s in ("train", "test")
        ],
        "knobs": [*knobs, profile.val_fraction, profile.seed],
        "code": cache.source_digest(__name__),
    }
    return cache.build(home / "twostage", inputs, lambda folder: _run(profile, dataset, folder))


def _run(profile, dataset, folder):
    made = engine.load(profile)
    queries = {
        split: annotations.read_fig(profile.data_dir(dataset) / "corpus" / f"{split}.jsonl")
        for split in ("train", "test")
    }
    vectors = {
        split: search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / split)
        for split in queries
    }
    sides = annotations.split_validation(queries["train"], profile.val_fraction)  # (learned from, held out)
    most = profile.two_stage.videos, max(1, profile.two_stage.videos // HELD)
    readable = set(vectors["train"].video_ids)
    galleries = [[video for video in annotations.gallery_ids(side) if video in readable] for side in sides]
    chosen = [video for pair in zip(galleries, most, strict=True) for video in evenly_spaced(*pair)]
    embed(profile, dataset, made, "train", chosen, folder)
    embed(profile, dataset, made, "test", vectors["test"].video_ids, folder)
    train_windows, test_windows = (load_windows(folder, s, made.model.device) for s in ("train", "test"))
    torch.manual_seed(profile.seed)
    head = Head(made.width, profile.two_stage.width).to(made.model.device)
    ours, held = (asked(side, vectors["train"], train_windows) for side in sides)
    log = train(profile, head, ours, held, train_windows, f"spans {dataset}")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    save_file(head.state_dict(), folder / "head.safetensors")
    told = submission(head, queries["test"], vectors["test"], test_windows)
    (folder / "submission.json").write_text(json.dumps(told), encoding="utf-8")


def submission(head: Head, queries: list[Query], vectors: search_index.Vectors, windows: Windows) -> dict:
    """Answers as `vsr1.score` reads them: the first 100 videos with a span each; SVMR, the span in the right one."""
    number = {video: at for at, video in enumerate(annotations.gallery_ids(queries))}
    vecs = vectors.vecs_of([query.id for query in queries])
    _, found = vectors.search(vecs, metrics.CUT)  # (Q, k)
    told = {"video2idx": number, "VCMR": [], "SVMR": [], "VR": []}
    for query, vec, columns in zip(cache.progress(queries, "spans"), vecs, found, strict=True):
        videos = [vectors.video_ids[column] for column in columns]
        right = [query.video] if query.video in windows.row else []
        asked_in = [windows.row[video] for video in videos + right]
        one = torch.from_numpy(vec).to(windows.vecs.device).expand(len(asked_in), -1)
        spans = locate(head, one, windows, asked_in).tolist()
        lines = [[number[video], *span] for video, span in zip(videos + right, spans, strict=True)]
        ranked = {"VCMR": lines[: len(videos)], "SVMR": lines[len(videos) :]}
        ranked["VR"] = [[video] for video, *_ in ranked["VCMR"]]
        for task, predictions in ranked.items():
            told[task].append({"desc_id": query.id, "predictions": predictions})
    return told


# --- What it says


def known_spans(folder: Path, queries: list[Query]) -> np.ndarray:
    """The span in the right video of each query, (Q, 2) seconds; empty, a miss, where that video was not readable."""
    entries = json.loads((folder / "submission.json").read_text(encoding="utf-8"))["SVMR"]
    told = {entry["desc_id"]: entry["predictions"] for entry in entries}
    return np.array([told[query.id][0][1:] if told[query.id] else (0.0, 0.0) for query in queries])


def hits(profile, found: retrieval.FirstSearch, spans: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: one value per query}; a moment counts where the first search shows its video. There is no verdict."""
    ious = moments.span_iou(spans, [query.span for query in found.queries])
    reached = {m: metrics.reaches(ious, m) for m in metrics.THRESHOLDS}
    values = {f"vcmr@{m}": right_first(found) & enough for m, enough in reached.items()}
    values |= {f"vr@{k}": found.hits(k) for k in profile.vr_ks}
    return values | {f"grounding@{m}": enough for m, enough in reached.items()} | {"miou": ious}


def numbers(profile, dataset: str, found: retrieval.FirstSearch, spans: np.ndarray) -> dict[str, Estimate]:
    """The row `twostage` of T1, and of V1 what concerns a known video."""
    rows = {}
    for metric, values in hits(profile, found, spans).items():
        table, ci = "T1" if metric.startswith("v") else "V1", found.interval(profile, values)
        number = Estimate(metrics.percent(values), len(values), ci, (profile.seed,))
        rows[f"{table}/{dataset}/twostage/{metric}"] = number
    return rows
