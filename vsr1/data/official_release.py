"""Download the small parts of the authors' prepared release (docs/method.md section 8) into data/<dataset>/.

The release is 107 to 436 GiB of tars, nearly all of it frames, which nothing here needs. So only the headers of a tar
are read, and its wanted files, by range requests where it lies on the hub. Nothing is unpacked: a file is wanted by its
name and goes where `wanted` says, so no name, link or device in a tar leads anywhere. release.json records the source
and checksums.

The released vectors replace nothing: `embed` computes the same with the engine that the loop needs anyway. They show,
without a video or a GPU, that annotations and engine are the paper's (`read_vectors`).
"""

import os
import tarfile
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, StringConstraints

from vsr1 import cache
from vsr1.config import ROOT, InputError
from vsr1.data import annotations, real_datasets
from vsr1.data.real_datasets import SPLITS

HUB = "hf://buckets/VideoSearchR1/data/datasets"
RELEASED = {"charades": "charades-sta", "didemo": "didemo", "activitynet": "activitynet"}
RECORD, REPLIES = "release.json", "sft_data/train_oneturn.json"
# Bytes of one request, ours: for a header, after which 20 MB of frames may follow, and for a file.
HEADER, CHUNK = 2**14, 2**23
MAX_MEMBER = 2**31  # bytes, ours: the largest wanted file, vectors of 37,261 queries, has a seventh of it
# Queries and videos of train and test (docs/data.md section 1; DiDeMo's and ActivityNet's train videos: their sources).
COUNTS = {"charades": (16128, 6672), "didemo": (36916, 9397), "activitynet": (54227, 14894)}
VECTOR_BYTES = 2048 * 4


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


class Part(BaseModel):
    """One file of a shard."""

    name: annotations.Name


def _by_name(entry):
    return {"name": entry} if isinstance(entry, str) else entry


class Shard(Part):
    """One tar, cut into parts where there are any."""

    parts: list[Annotated[Part, BeforeValidator(_by_name)]] = []


class Manifest(BaseModel):
    """manifest.json of a release."""

    shards: list[Annotated[Shard, BeforeValidator(_by_name)]]


class Record(BaseModel):
    """release.json: what was downloaded, and from where. Hashes pin the source: a bucket has no revisions."""

    source: str
    files: dict[str, tuple[int, str | None]] = {}  # {file of a shard: (bytes, hash on the hub)}
    read: list[list[str]] = []  # shards without a wanted file that is still missing
    kept: dict[str, str] = {}  # {file below data/<dataset>/: checksum}

    def save(self, folder: Path):
        """Write release.json."""
        cache.write_json(folder / RECORD, self.model_dump())


def connect(source: str):
    """Return the file system of a source: the hub's own library for hf://, else the local disk."""
    from fsspec.implementations.local import LocalFileSystem
    from huggingface_hub import HfFileSystem

    return HfFileSystem(skip_instance_cache=True) if source.startswith("hf://") else LocalFileSystem()


@contextmanager
def _reading(path):
    """Turn whatever the hub or the disk has against reading `path` into one line."""
    from huggingface_hub.errors import EntryNotFoundError, HfUriError, HTTPError

    try:
        yield
    except (OSError, HTTPError, EntryNotFoundError, HfUriError) as error:  # the library has tried five times
        problem, remedy = "not readable now", "run the same command again, it goes on; or --source FOLDER"
        absent = isinstance(error, (FileNotFoundError, NotADirectoryError, EntryNotFoundError, HfUriError))
        status = getattr(getattr(error, "response", None), "status_code", None)
        if absent or status in (401, 403, 404):  # the hub does not say which of them are private
            problem, remedy = (
                "not there",
                "--source names a folder with manifest.json and shards/, or hf://...",
            )
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: {problem} ({reason}); {remedy}") from error


class JoinedFile:
    """Files of a source one after the other, as the one file that `tarfile` reads and seeks in."""

    def __init__(self, fs, paths: list[str], sizes: list[int]):
        self.fs, self.paths, self.ends, self.position = fs, paths, np.cumsum(sizes).tolist(), 0
        self.path, self.file = None, None  # the one that is open

    def tell(self):
        return self.position

    def seek(self, position):
        self.position = position

    def read(self, size):
        """Read the next `size` bytes, fewer at the end; at most CHUNK, whatever length a header claims."""
        content, start, size = b"", 0, min(size, CHUNK)
        for path, end in zip(self.paths, self.ends, strict=True):
            if start <= self.position < end and len(content) < size:
                with _reading(path):
                    self._open(path)
                    self.file.seek(self.position - start)
                    block = self.file.read(min(end - self.position, size - len(content)))
                content, self.position = content + block, self.position + len(block)
            start = end
        return content

    def _open(self, path):
        if path != self.path:
            self.close()
            self.path, self.file = path, self.fs.open(path, "rb", block_size=HEADER)

    def close(self):
        """Close the file that is open."""
        if self.file is not None:
            self.file.close()
        self.path, self.file = None, None


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
    shards = []
    for shard in annotations.parse_json(text, path, kind=Manifest).shards:
        names = [PurePosixPath(part.name).name for part in shard.parts or [shard]]
        shards.append([f"{name}.tar" if f"{name}.tar" in files else name for name in names])
    return sorted(shards, key=lambda shard: sum(files.get(name, (np.inf,))[0] for name in shard)), files


# --- Bring it here


def download(profile, dataset: str, source: str | None = None) -> list[str]:
    """Bring what is `wanted` below data/<dataset>/; return the names of what the release lacks.

    The smallest shards are read first, none after the last wanted file. A file that is there already stays as it is.
    After an interruption the same call goes on.

    source  a folder with manifest.json and shards/, or hf://...; None: that of release.json, else the authors' bucket
    """
    folder = ROOT / profile.data / dataset
    if source and not source.startswith("hf://"):
        source = str(Path(source).resolve())
    record = _read_record(folder, source) or Record(source=source or f"{HUB}/{RELEASED[dataset]}")
    missing = {name: folder / to for name, to in wanted(dataset).items() if not (folder / to).exists()}
    if not missing:
        return []
    fs = connect(record.source)
    shards, files = _list_shards(fs, record.source)
    _pin(record, files, folder)
    folder.mkdir(parents=True, exist_ok=True)
    unread = [shard for shard in shards if shard not in record.read]
    for shard in cache.progress(unread, f"download {dataset}"):
        if missing:
            _read_shard(fs, record, shard, files, missing, folder)
    if any(name.startswith("raw_annotation/") for name in missing):
        raise InputError(
            f"{record.source}: no raw_annotation/ with train.jsonl and test.jsonl in any shard; is it the release?"
        )
    return sorted(missing)


def _read_record(folder, source):
    """Return release.json, if there is one and every file that it lists is as it was downloaded."""
    path = folder / RECORD
    if not path.exists():
        return None
    record = annotations.parse_json(annotations.read_text(path), path, kind=Record)
    if source not in (None, record.source):
        raise InputError(f"{path}: begun from {record.source}; to begin anew delete it and what it lists")
    for name, digest in record.kept.items():
        if not (folder / name).exists():
            record.read = []  # the shard that had it has to be read again
        elif cache.file_digest(folder / name) != digest:
            raise InputError(
                f"{folder / name}: not what was downloaded, by its checksum; delete it, and download again"
            )
    return record


def _pin(record, files, folder):
    """Remember the hashes of a source; InputError where one differs from that of an earlier call."""
    for name, pin in files.items():
        known = record.files.setdefault(name, pin)
        if known != pin and pin[1]:
            raise InputError(
                f"{record.source}/shards/{name}: another revision than the one begun with ({pin[1]}, it was "
                f"{known}); to begin anew delete {folder / RECORD} and the files it lists"
            )


def _read_shard(fs, record, shard, files, missing, folder):
    """Save what is missing and lies in a shard; release.json is renewed after each file."""
    paths = [f"{record.source}/shards/{name}" for name in shard]
    for path, name in zip(paths, shard, strict=True):
        if name not in files:
            raise InputError(
                f"{path}: not there, and still missing is {min(missing)}; copy or download that file"
            )
    with _whole(paths), closing(JoinedFile(fs, paths, [files[name][0] for name in shard])) as file:
        for name, content in _members(file, missing):
            target = missing[name]
            _save(content, target)
            record.kept[str(target.relative_to(folder))] = cache.file_digest(target)
            record.save(folder)
            del missing[name]
            print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
            if not missing:
                return
    record.read.append(shard)
    record.save(folder)


@contextmanager
def _whole(paths):
    """Turn whatever is wrong with a tar into one line."""
    try:
        yield
    except InputError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        more = f" and {len(paths) - 1} more" * (len(paths) > 1)
        raise InputError(
            f"{paths[0]}{more}: cut short, damaged, or no tar ({error}); copy or download it again"
        ) from error


def _members(file, missing):
    """Yield (name, blocks of bytes) of each member that is missing; of all others only the headers are read."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError("a negative size")  # it would send the reader back, without end
            path = PurePosixPath(member.name)
            spellings = ("/".join(path.parts), "/".join(path.parts[1:]))  # with or without a folder around it
            name = next((name for name in spellings if name in missing), None)
            if name:
                _check_plain(member, path)
                yield name, _content(file, member)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # `tarfile` takes it for the end
            raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")


def _check_plain(member, path):
    """Refuse a wanted name that is a link, a device or a folder, leads elsewhere, or claims to be huge."""
    if path.is_absolute() or ".." in path.parts or not member.isreg() or member.issparse():
        raise tarfile.ReadError(f"{member.name} is no plain file of this release")
    if member.size > MAX_MEMBER:
        raise tarfile.ReadError(f"{member.name} claims {member.size / 1e9:.0f} GB")


def _content(file, member):
    for start in range(0, member.size, CHUNK):
        length = min(CHUNK, member.size - start)
        file.seek(member.offset_data + start)
        block = file.read(length)
        if len(block) < length:
            raise tarfile.ReadError(f"it ends inside {member.name}")
        yield block


def _save(blocks, target):
    """Write a file, complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    with open(scratch, "wb") as file:
        file.writelines(blocks)
    os.replace(scratch, target)


# --- The released vectors


class ReleasedVectors(NamedTuple):
    """Vectors of one split under the engine of the paper."""

    video_ids: list[str]
    video_vecs: np.ndarray  # (V, D) float32, unit length
    query_ids: list[int]
    query_vecs: np.ndarray  # (Q, D) float32, unit length


class QueryMeta(BaseModel):
    """One line of the ids of query vectors."""

    qid: Annotated[str, StringConstraints(pattern=r"^[0-9]+_fig$")]


def read_vectors(profile, dataset: str, split: str = "test") -> ReleasedVectors:
    """Read the released vectors of a split; InputError where ids or shapes do not fit the annotations."""
    folder = ROOT / profile.data / dataset
    query_file, meta, video_file, rows = (folder / name for name in vector_files(split))
    query_ids = []
    for number, line in annotations.numbered_lines(annotations.read_text(meta))[0]:
        row = annotations.parse_json(line, meta, number, QueryMeta)
        query_ids.append(int(row.qid.removesuffix("_fig")))
    row_of = annotations.parse_json(annotations.read_text(rows), rows, kind=dict[str, int])
    video_ids = sorted(row_of, key=row_of.get)
    if sorted(row_of.values()) != list(range(len(row_of))):
        raise InputError(f"{rows}: not one row for each video, from 0; delete it, and download again")
    file = real_datasets.annotation_files(profile, dataset)[SPLITS.index(split)]
    _check_ids(meta, annotations.read_fig(file), query_ids, video_ids)
    vectors = ReleasedVectors(
        video_ids, _matrix(video_file, len(video_ids)), query_ids, _matrix(query_file, len(query_ids))
    )
    if vectors.video_vecs.shape[1] != vectors.query_vecs.shape[1]:
        raise InputError(
            f"{query_file}: vectors of another width than {video_file}; delete both, and download again"
        )
    return vectors


def _check_ids(meta, queries, query_ids, video_ids):
    lacking = {query.id for query in queries} - set(query_ids)
    unknown = set(video_ids) - set(annotations.gallery_ids(queries))
    if lacking or unknown or len(set(query_ids)) < len(query_ids):
        counts = f"{len(lacking)} queries without a vector, {len(unknown)} unknown videos"
        raise InputError(f"{meta}: vectors of other annotations ({counts}); `embed` makes those of your own")


def _matrix(path, rows):
    """Read (rows, D) unit vectors of an .npy file as float32."""
    try:
        vecs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not readable as an array ({error}); delete it, and download again"
        ) from error
    if vecs.ndim != 2 or len(vecs) != rows or vecs.dtype.kind != "f":
        raise InputError(
            f"{path}: {vecs.dtype} {vecs.shape}, not {rows} vectors; delete it, and download again"
        )
    if not np.allclose(np.linalg.norm(vecs.astype(np.float32), axis=1), 1, atol=1e-2):
        raise InputError(f"{path}: not vectors of length one; delete it, and download again")
    return vecs.astype(np.float32)
