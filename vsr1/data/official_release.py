"""Download the small parts of the authors' prepared release (docs/method.md section 8) into data/<dataset>/.

The release is 107 to 436 GiB of tars, nearly all of it frames, which nothing here needs. So only the headers of a tar
are read, and its wanted files, by range requests where it lies on the hub. Nothing is unpacked: a file is wanted by its
name and goes where `wanted` says, so no name, link or device in a tar leads anywhere. release.json records the source.

The released vectors train nothing: `embed` computes the same with the engine that the loop needs anyway. They show,
without a video or a GPU, that annotations and engine are the paper's (`read_vectors`), and released weights search them
(`vsr1.evaluation.released_gallery`).
"""

import tarfile
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Annotated

import fsspec
import numpy as np
from huggingface_hub.errors import EntryNotFoundError, HfUriError, HTTPError
from pydantic import BaseModel, StringConstraints

from vsr1 import cache
from vsr1.config import ROOT, InputError
from vsr1.data import annotations, real_datasets
from vsr1.data.real_datasets import SPLITS

HUB = "hf://buckets/VideoSearchR1/data/datasets"
RELEASED = {"charades": "charades-sta", "didemo": "didemo", "activitynet": "activitynet"}
RECORD, REPLIES = "release.json", "sft_data/train_oneturn.json"
HEADER = 2**14  # bytes of one request for a header, ours: 20 MB of frames may follow
# Bytes, ours: the largest wanted file, vectors of 37,261 queries, has less than a third of it.
MAX_MEMBER = 2**30
# Queries and videos of train and test (docs/data.md section 1; DiDeMo's and ActivityNet's train videos: their sources).
COUNTS = {"charades": (16128, 6672), "didemo": (36916, 9397), "activitynet": (54227, 14894)}
VECTOR_BYTES = 2048 * 4
ANEW = "delete it, and download again"


# --- What is wanted of it


def vector_files(split: str) -> list[str]:
    """Name the files of query vectors, their ids, video vectors, their rows."""
    queries, videos = f"{split}/query_embedding/query", f"{split}/video_embedding_1fps"
    queries = [f"{queries}_embeddings.{split}.npy", f"{queries}_meta.{split}.jsonl"]
    return [*queries, f"{videos}/segment_embeds.npy", f"{videos}/docid2row.json"]


def wanted(dataset: str) -> dict[str, str]:
    """Return {name in the release: where it goes below data/<dataset>/}; annotations get VERIFIED's names."""
    files = zip(SPLITS, annotations.FILES[dataset], strict=True)
    renamed = {f"raw_annotation/{split}.jsonl": f"annotations/{name}" for split, name in files}
    names = [name for split in SPLITS for name in vector_files(split)]
    names += [f"{split}/index/{name}" for split in SPLITS for name in ("index.faiss", "id_map.json")]
    names += ["train/hard_negatives.json", REPLIES, "grpo_data/train.minimal_top1.jsonl"]
    return renamed | {name: name for name in names}


def size(dataset: str) -> float:
    """Estimate the bytes of what is wanted: vectors, those of videos again in the index, a tenth more for texts."""
    queries, videos = COUNTS[dataset]
    return 1.1 * (queries + 2 * videos) * VECTOR_BYTES


# --- Where it lies


class Shard(BaseModel):
    """One tar of manifest.json; parts where it is cut into several files."""

    name: annotations.Name  # of the file below shards/
    parts: list[annotations.Name] = []  # shards/<file>, in order


class Manifest(BaseModel):
    """manifest.json of a release."""

    shards: list[Shard]


class Record(BaseModel):
    """release.json: where files came from. Hashes pin the source, for a bucket has no revisions."""

    source: str
    files: dict[str, tuple[int, str | None]]  # {file below shards/: (bytes, hash on the hub)}


def connect(source: str):
    """Return the file system of a source: the hub's for hf://, else the local disk."""
    return fsspec.filesystem("hf" if source.startswith("hf://") else "file", skip_instance_cache=True)


@contextmanager
def _reading(path):
    """Turn whatever the hub or the disk has against reading `path` into one line."""
    try:
        yield
    except (OSError, HTTPError, EntryNotFoundError, HfUriError) as error:  # the library has tried five times
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read ({reason}); run the same command again, it goes on, or name another "
            "--source: a folder with manifest.json and shards/, or hf://..."
        ) from error


class JoinedFile:
    """Open files one after the other, as the one file that `tarfile` reads and seeks in."""

    def __init__(self, path: str, parts: list, sizes: list[int]):
        self.path, self.parts, self.ends, self.position = path, parts, list(accumulate(sizes)), 0

    def tell(self):
        return self.position

    def seek(self, position):
        self.position = position

    def read(self, size):
        """Read the next `size` bytes, fewer at the end; at most MAX_MEMBER, whatever length a header claims."""
        content, start, size = b"", 0, min(size, MAX_MEMBER)
        for part, end in zip(self.parts, self.ends, strict=True):
            if start <= self.position < end and len(content) < size:
                with _reading(self.path):
                    part.seek(self.position - start)
                    block = part.read(min(end - self.position, size - len(content)))
                content, self.position = content + block, self.position + len(block)
            start = end
        return content


def _list_shards(fs, source):
    """Return [files of each shard], smallest first, those with a file missing last; {file: (bytes, hash)}."""
    path = f"{source}/manifest.json"
    with _reading(path):
        text = fs.cat_file(path).decode("utf-8", "replace")
        entries = fs.ls(f"{source}/shards", detail=True)
    files = {
        PurePosixPath(entry["name"]).name: (entry["size"], entry.get("xet_hash") or entry.get("blob_id"))
        for entry in entries
    }
    manifest = annotations.parse_json(text, path, kind=Manifest)
    shards = [[PurePosixPath(name).name for name in s.parts or [s.name]] for s in manifest.shards]
    return sorted(shards, key=lambda shard: sum(files.get(name, (np.inf,))[0] for name in shard)), files


# --- Bring it here


def download(profile, dataset: str, source: str | None = None) -> list[str]:
    """Bring what is `wanted` below data/<dataset>/; return the names of what the release lacks.

    The smallest shards are read first, none after the last wanted file. A file that is there already stays as it is,
    so the same call goes on after an interruption.

    source  a folder with manifest.json and shards/, or hf://...; None: that of release.json, else the authors' bucket
    """
    folder = ROOT / profile.data / dataset
    if source and not source.startswith("hf://"):
        source = str(Path(source).resolve())
    path = folder / RECORD
    begun = annotations.parse_json(annotations.read_text(path), path, kind=Record) if path.exists() else None
    if begun and source not in (None, begun.source):
        raise InputError(
            f"{path}: begun from {begun.source}; to begin anew delete it and what was downloaded"
        )
    source = begun.source if begun else source or f"{HUB}/{RELEASED[dataset]}"
    missing = {name: folder / to for name, to in wanted(dataset).items() if not (folder / to).exists()}
    if not missing:
        return []
    fs = connect(source)
    shards, files = _list_shards(fs, source)
    if begun:
        _check_pins(begun, source, files)
    folder.mkdir(parents=True, exist_ok=True)
    cache.write_json(path, {"source": source, "files": files})
    for shard in cache.progress(shards, f"download {dataset}"):
        if missing:
            _read_shard(fs, f"{source}/shards", {name: files.get(name) for name in shard}, missing)
    if any(name.startswith("raw_annotation/") for name in missing):
        raise InputError(
            f"{source}: no raw_annotation/ with train.jsonl and test.jsonl in any shard; is it the release?"
        )
    return sorted(missing)


def _check_pins(begun, source, files):
    """Refuse a source where the hash of a file differs from that of an earlier call."""
    for name, pin in files.items():
        if pin[1] and begun.files.get(name, pin) != pin:
            raise InputError(
                f"{source}/shards/{name}: not of the revision begun with, by its hash; to begin anew delete "
                f"what was downloaded, and {RECORD}"
            )


def _read_shard(fs, folder, files, missing):
    """Save what is missing and lies in a shard, and take it from `missing`."""
    for name, pin in files.items():
        if pin is None:
            raise InputError(
                f"{folder}/{name}: not there, and still missing is {min(missing)}; copy or download that file"
            )
    paths = [f"{folder}/{name}" for name in files]
    with ExitStack() as stack:
        with _reading(paths[0]):
            parts = [stack.enter_context(fs.open(path, "rb", block_size=HEADER)) for path in paths]
        file = JoinedFile(paths[0], parts, [size for size, _ in files.values()])
        for name, content in _members(file, missing):
            target = missing.pop(name)
            _save(content, target)
            print(f"{target}: {len(content) / 1e6:.1f} MB", flush=True)
            if not missing:
                return


def _members(file, missing):
    """Yield (name, content) of each member that is missing; of all others only the headers are read."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError("a negative size")  # it would send the reader back, without end
                path = PurePosixPath(member.name)
                # With or without a folder around it.
                spellings = ("/".join(path.parts), "/".join(path.parts[1:]))
                name = next((name for name in spellings if name in missing), None)
                if name:
                    yield name, _content(file, member, path)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # `tarfile` takes it for the end
                raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
    except InputError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file.path}: cut short, damaged, or no tar ({error}); copy or download it again"
        ) from error


def _content(file, member, path):
    """Read a member; refuse a link, a device or a folder, a name that leads elsewhere, and an absurd size."""
    if path.is_absolute() or ".." in path.parts or not member.isreg() or member.issparse():
        raise tarfile.ReadError(f"{member.name} is no plain file of this release")
    if member.size > MAX_MEMBER:
        raise tarfile.ReadError(f"{member.name} claims {member.size / 1e9:.0f} GB")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError(f"it ends inside {member.name}")
    return content


def _save(content, target):
    """Write a file, complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with cache.replacing(target) as file:
        file.write(content)


# --- The released vectors


class QueryMeta(BaseModel):
    """One line of the ids of query vectors."""

    qid: Annotated[str, StringConstraints(pattern=r"^[0-9]+_fig$")]


def read_vectors(profile, dataset: str) -> tuple:
    """Return the released (video ids, video vectors (V, D), query ids, query vectors (Q, D)) of the test split.

    Vectors are float32, of length one. InputError where ids or shapes do not fit the annotations.
    """
    folder = ROOT / profile.data / dataset
    query_file, meta, video_file, rows = (folder / name for name in vector_files("test"))
    query_ids = []
    for number, line in annotations.numbered_lines(annotations.read_text(meta))[0]:
        row = annotations.parse_json(line, meta, number, QueryMeta)
        query_ids.append(int(row.qid.removesuffix("_fig")))
    row_of = annotations.parse_json(annotations.read_text(rows), rows, kind=dict[str, int])
    video_ids = sorted(row_of, key=row_of.get)
    if sorted(row_of.values()) != list(range(len(row_of))):
        raise InputError(f"{rows}: not one row for each video, from 0; {ANEW}")
    _, test_file = real_datasets.annotation_files(profile, dataset)
    _check_ids(meta, annotations.read_fig(test_file), query_ids, video_ids)
    video_vecs = _matrix(video_file, len(video_ids))
    return video_ids, video_vecs, query_ids, _matrix(query_file, len(query_ids), video_vecs.shape[1])


def _check_ids(meta, queries, query_ids, video_ids):
    lacking = {query.id for query in queries} - set(query_ids)
    unknown = set(video_ids) - set(annotations.gallery_ids(queries))
    if lacking or unknown or len(set(query_ids)) < len(query_ids):
        counts = f"{len(lacking)} queries without a vector, {len(unknown)} unknown videos"
        raise InputError(f"{meta}: vectors of other annotations ({counts}); `embed` makes those of your own")


def _matrix(path, rows, width=None):
    """Read (rows, width) unit vectors of an .npy file as float32."""
    try:
        vecs = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not readable as an array ({error}); {ANEW}") from error
    if vecs.ndim != 2 or vecs.shape != (rows, width or vecs.shape[1]) or vecs.dtype.kind != "f":
        raise InputError(f"{path}: {vecs.dtype} {vecs.shape}, not {rows} vectors of one width; {ANEW}")
    vecs = vecs.astype(np.float32)
    if not np.allclose(np.linalg.norm(vecs, axis=1), 1, atol=1e-2):
        raise InputError(f"{path}: not vectors of length one; {ANEW}")
    return vecs
