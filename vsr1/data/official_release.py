"""The authors' prepared release (METHOD.md 8): its small parts, from a folder or from the hub, into data/<dataset>/.

It is 107 to 436 GiB of tars, nearly all of it frames, which nothing here needs. So the headers of a tar are read and
its wanted files, by range requests where it lies on the hub. Nothing is unpacked: a file is wanted by its name and goes
where `wanted` says, so no name, link or device in a tar leads anywhere. release.json there says whence, with checksums.

No stage takes the released vectors for its own: `embed` makes the same with the engine that the loop needs anyway. They
show, without a video or a GPU, that annotations and engine are the paper's (`first_search`).
"""

import argparse
import os
import re
import tarfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from vsr1 import cache, config
from vsr1.config import ROOT, InputError
from vsr1.data import annotations, real_datasets
from vsr1.data.real_datasets import SPLITS
from vsr1.evaluation import metrics
from vsr1.experiments import retrieval
from vsr1.models.search_index import Vectors
from vsr1.report import results

HUB = "hf://buckets/VideoSearchR1/data/datasets"
RELEASED = {"charades": "charades-sta", "didemo": "didemo", "activitynet": "activitynet"}
RECORD, REPLIES = "release.json", "sft_data/train_oneturn.json"
# Bytes of one request, ours: for a header, after which 20 MB of frames may follow, and for a file.
HEADER, CHUNK = 2**14, 2**23
# Queries and videos of (train, test) together (DATASETS 1; train videos of DiDeMo and ActivityNet: of their sources).
COUNTS = {"charades": (16128, 6672), "didemo": (36916, 9397), "activitynet": (54227, 14894)}
VECTOR = 2048 * 4  # bytes
QID = {"qid": ("a text like '17_fig'", lambda value: re.fullmatch(r"[0-9]+_fig", str(value)))}


def vector_files(split):
    """Query vectors, their ids, video vectors, their ids."""
    queries, videos = f"{split}/query_embedding/query", f"{split}/video_embedding_1fps"
    queries = [f"{queries}_embeddings.{split}.npy", f"{queries}_meta.{split}.jsonl"]
    return [*queries, f"{videos}/segment_embeds.npy", f"{videos}/docid2row.json"]


def wanted(dataset: str) -> dict[str, str]:
    """{name in the release: where it goes below data/<dataset>/}; annotations get VERIFIED's names."""
    files = zip(SPLITS, annotations.FILES[dataset], strict=True)
    moved = {f"raw_annotation/{split}.jsonl": f"annotations/{name}" for split, name in files}
    kept = [name for split in SPLITS for name in vector_files(split)]
    kept += [f"{split}/index/{name}" for split in SPLITS for name in ("index.faiss", "id_map.json")]
    kept += ["train/hard_negatives.json", REPLIES, "grpo_data/train.minimal_top1.jsonl"]
    return moved | {name: name for name in kept}


def size(dataset: str) -> float:
    """Bytes of what is wanted, estimated: vectors, the index with those of the videos again, a tenth more for texts."""
    queries, videos = COUNTS[dataset]
    return 1.1 * (queries + 2 * videos) * VECTOR


def connect(source: str):
    """The file system of a source, by the hub's own library where it lies there."""
    from fsspec.implementations.local import LocalFileSystem
    from huggingface_hub import HfFileSystem

    return HfFileSystem(skip_instance_cache=True) if source.startswith("hf://") else LocalFileSystem()


@contextmanager
def _reading(path):
    """Whatever the hub or the disk has against reading `path`, as one line."""
    from huggingface_hub.errors import EntryNotFoundError, HfUriError, HTTPError

    try:
        yield
    except (
        OSError,
        HTTPError,
        EntryNotFoundError,
        HfUriError,
    ) as error:  # the hub's library has tried five times
        what, remedy = "not readable now", "run the same command again, it goes on; or --source FOLDER"
        absent = isinstance(error, (FileNotFoundError, NotADirectoryError, EntryNotFoundError, HfUriError))
        status = getattr(getattr(error, "response", None), "status_code", None)
        if absent or status in (401, 403, 404):  # the hub does not say which of them are private
            what, remedy = "not there", "--source names a folder with manifest.json and shards/, or hf://..."
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: {what} ({said}); {remedy}") from error


class Joined:
    """Files of a source one after the other, as the one file that `tarfile` reads and seeks in."""

    def __init__(self, fs, paths: list[str], sizes: list[int]):
        self.fs, self.paths, self.ends, self.at = fs, paths, np.cumsum(sizes).tolist(), 0
        self.path, self.file = None, None  # the one that is open

    def tell(self):
        return self.at

    def seek(self, at):
        self.at = at

    def read(self, size):
        """The next `size` bytes, fewer at the end; CHUNK at most, whatever length a header claims for the next."""
        got, start, size = b"", 0, min(size, CHUNK)
        for path, end in zip(self.paths, self.ends, strict=True):
            if start <= self.at < end and len(got) < size:
                with _reading(path):
                    if path != self.path:
                        self.path, self.file = path, self.fs.open(path, "rb", block_size=HEADER)
                    self.file.seek(self.at - start)
                    block = self.file.read(min(end - self.at, size - len(got)))
                got, self.at = got + block, self.at + len(block)
            start = end
        return got


def _shards(fs, source):
    """([files of each shard], smallest first, those with a file missing last; {file: [bytes, hash on the hub]})."""
    path = f"{source}/manifest.json"
    with _reading(path):
        text = fs.cat_file(path).decode("utf-8", "replace")
        there = fs.ls(f"{source}/shards", detail=True)
    manifest = annotations.parse_json(text, path)
    annotations.check_object(manifest, {"shards": ("a list", lambda value: isinstance(value, list))}, path)
    files = {
        PurePosixPath(one["name"]).name: [one["size"], one.get("xet_hash") or one.get("blob_id")]
        for one in there
    }
    shards = []
    for number, shard in enumerate(manifest["shards"], 1):
        parts = (isinstance(shard, dict) and shard.get("parts")) or [shard]
        names = [one.get("name") if isinstance(one, dict) else one for one in parts]
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: shard {number} is not named, or a part of it; take the manifest again")
        names = [PurePosixPath(name).name for name in names]
        shards.append([f"{name}.tar" if f"{name}.tar" in files else name for name in names])
    return sorted(shards, key=lambda shard: sum(files.get(name, [np.inf])[0] for name in shard)), files


def fetch(profile, dataset: str, source: str | None = None) -> list[str]:
    """Bring what is `wanted` below data/<dataset>/; the names of what the release lacks.

    The smallest shards are read first, none after the last wanted file. A file that is there already stays as it is.
    release.json remembers the source, its files with the hashes that the hub gives (they pin it: a bucket has no
    revisions), the shards read to the end, and the checksum of what was kept.
    """
    folder = ROOT / profile.data / dataset
    if source and not source.startswith("hf://"):
        source = str(Path(source).resolve())
    record = _recorded(folder, source)
    source = record["source"] = record["source"] or f"{HUB}/{RELEASED[dataset]}"
    lacking = {name: folder / to for name, to in wanted(dataset).items() if not (folder / to).exists()}
    if not lacking:
        return []
    fs = connect(source)
    shards, files = _shards(fs, source)
    for name, pin in files.items():
        if record["files"].setdefault(name, pin) != pin and pin[1]:
            raise InputError(
                f"{source}/shards/{name}: another revision than the one begun with ({pin[1]}, it was "
                f"{record['files'][name]}); to begin anew delete {folder / RECORD} and the files it lists"
            )
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name, content):
        record["kept"][wanted(dataset)[name]] = _save(content, lacking[name])
        cache.write_json(folder / RECORD, record)
        print(f"{lacking[name]}: {lacking.pop(name).stat().st_size / 1e6:.1f} MB", flush=True)

    for shard in cache.progress(
        [shard for shard in shards if shard not in record["read"]], f"fetch {dataset}"
    ):
        if lacking:
            _walk(
                fs,
                [f"{source}/shards/{name}" for name in shard],
                [files.get(name) for name in shard],
                lacking,
                keep,
            )
            record["read"] += [shard] * bool(lacking)
            cache.write_json(folder / RECORD, record)
    if any(name.startswith("raw_annotation/") for name in lacking):
        raise InputError(
            f"{source}: no raw_annotation/ with train.jsonl and test.jsonl in any shard; is it the release?"
        )
    return sorted(lacking)


def _recorded(folder, source):
    """What release.json says, with every file that it lists as it was fetched."""
    path = folder / RECORD
    if not path.exists():
        return {"source": source, "files": {}, "read": [], "kept": {}}
    record = annotations.parse_json(annotations.read_text(path), path)
    if source not in (None, record["source"]):
        raise InputError(f"{path}: begun from {record['source']}; to begin anew delete it and what it lists")
    for name, digest in record["kept"].items():
        if not (folder / name).exists():
            record["read"] = []  # the shard that had it has to be read again
        elif cache.file_digest(folder / name) != digest:
            raise InputError(
                f"{folder / name}: not what was fetched, by its checksum; delete it, and fetch again"
            )
    return record


def _walk(fs, paths, pins, lacking, keep):
    """keep(name, blocks of bytes) for what is lacking and lies in a shard; of all else only the headers are read."""
    for path, pin in zip(paths, pins, strict=True):
        if pin is None:
            raise InputError(
                f"{path}: not there, and still missing is {min(lacking)}; copy or download that file"
            )
    shard = Joined(fs, paths, [size for size, _ in pins])
    try:
        with tarfile.open(fileobj=shard, mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise tarfile.ReadError("a negative size")  # it would send the walk back, without end
                path = PurePosixPath(member.name)  # with or without a folder around it
                name = next(
                    (n for n in ("/".join(path.parts), "/".join(path.parts[1:])) if n in lacking), None
                )
                strange = path.is_absolute() or ".." in path.parts or not member.isreg() or member.issparse()
                if name and strange:
                    raise tarfile.ReadError(f"{member.name} is no plain file of this release")
                if name:
                    keep(name, _content(shard, member))
                if not lacking:
                    return
            shard.seek(tar.offset)
            if shard.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # `tarfile` takes it for the end
                raise tarfile.ReadError(f"neither a header nor the end at byte {tar.offset}")
    except InputError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        where = paths[0] + f" and {len(paths) - 1} more" * (len(paths) > 1)
        raise InputError(
            f"{where}: cut short, damaged, or no tar ({error}); copy or download it again"
        ) from error


def _content(shard, member):
    for at in range(0, member.size, CHUNK):
        shard.seek(member.offset_data + at)
        block = shard.read(min(CHUNK, member.size - at))
        if len(block) < min(CHUNK, member.size - at):
            raise tarfile.ReadError(f"it ends inside {member.name}")
        yield block


def _save(content, target):
    """Write a file, complete or not at all; its checksum as `stages.digest` has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    with open(scratch, "wb") as file:
        file.writelines(content)
    os.replace(scratch, target)
    return cache.file_digest(target)


def vectors(profile, dataset: str, split: str = "test"):
    """The released vectors of one split as `Vectors`, refused where ids or shapes do not fit the annotations."""

    home = ROOT / profile.data / dataset
    query_file, meta, video_file, rows = (home / name for name in vector_files(split))
    queries = annotations.read_fig(real_datasets.annotation_files(profile, dataset)[SPLITS.index(split)])
    asked = []
    for number, line in annotations.numbered_lines(annotations.read_text(meta))[0]:
        row = annotations.parse_json(line, meta, number)
        annotations.check_object(row, QID, f"{meta}, line {number}")
        asked.append(int(row["qid"].removesuffix("_fig")))
    places = annotations.parse_json(annotations.read_text(rows), rows)
    if not isinstance(places, dict) or set(map(repr, places.values())) != set(map(repr, range(len(places)))):
        raise InputError(f"{rows}: not one row for each video, from 0; delete it, and fetch again")
    ids = sorted(places, key=places.get)
    made = Vectors(ids, _matrix(video_file, len(ids)), asked, _matrix(query_file, len(asked)))
    if made.video_vecs.shape[1] != made.query_vecs.shape[1]:
        raise InputError(
            f"{query_file}: vectors of another width than {video_file}; delete both, and fetch again"
        )
    lost, strange = (
        {query.id for query in queries} - set(asked),
        set(ids) - set(annotations.gallery_ids(queries)),
    )
    if lost or strange or len(set(asked)) < len(asked):
        told = f"{len(lost)} queries without a vector, {len(strange)} unknown videos"
        raise InputError(f"{meta}: vectors of other annotations ({told}); `embed` makes those of your own")
    return made


def _matrix(path, rows):
    """(rows, D) unit vectors of an .npy file, float32."""
    try:
        vecs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not readable as an array ({error}); delete it, and fetch again") from error
    if vecs.ndim != 2 or len(vecs) != rows or vecs.dtype.kind != "f":
        raise InputError(f"{path}: {vecs.dtype} {vecs.shape}, not {rows} vectors; delete it, and fetch again")
    if not np.allclose(np.linalg.norm(vecs.astype(np.float32), axis=1), 1, atol=1e-2):
        raise InputError(f"{path}: not vectors of length one; delete it, and fetch again")
    return vecs.astype(np.float32)


def main(argv: list[str]) -> int:
    """Fetch annotations, vectors, SFT and GRPO files of the authors' prepared release, without its frames."""
    parser = argparse.ArgumentParser(prog="python -m vsr1 download-release", description=main.__doc__)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="charades, didemo or activitynet")
    parser.add_argument(
        "--source", metavar="PLACE", help=f"a folder with manifest.json and shards/ ({HUB}/...)"
    )
    parser.add_argument("--profile", default="paper", help="name in vsr1/profiles/, or a path to a .yaml")
    args = parser.parse_args(argv)
    profile, dataset = config.load(args.profile), config.check_dataset(args.dataset, "--dataset")
    absent = fetch(profile, dataset, args.source)
    if absent:
        print(f"not in the release: {', '.join(absent)}")
    if all((ROOT / profile.data / dataset / name).exists() for name in vector_files("test")):
        print(first_search(profile, dataset))
    return 0


def first_search(profile, dataset: str) -> str:
    """How far one search gets by the released vectors, beside the paper's numbers: the first gate, no video needed."""

    queries = annotations.read_fig(real_datasets.annotation_files(profile, dataset)[1])
    found = retrieval.first_search(queries, vectors(profile, dataset))
    paper = results.published()
    told = [
        f"R@{k} {metrics.recall_at(found.ranks, k):.1f} ({paper[f'T1/{dataset}/zs/vr@{k}']})"
        for k in profile.vr_ks
    ]
    return f"first search by the released vectors, {len(queries)} queries (paper): {', '.join(told)}"
