"""The authors' release, in its published layout at a small size: its small parts arrive, and nothing else."""

import http.server
import io
import json
import re
import tarfile
import threading
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.apps import doctor
from vsr1.config import InputError
from vsr1.data import official_release, real_datasets
from vsr1.report import results
from vsr1.training import sft_data

TRAIN, TEST, WIDTH = {1: "AAAAA", 2: "BBBBB"}, {3: "CCCCC", 4: "DDDDD", 5: "DDDDD", 6: "EEEEE"}, 8
FRAMES = bytes(300_000)


def unit(rows, seed):
    vecs = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    return vecs / np.linalg.norm(vecs, axis=1, keepdims=True)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def fig(video_of):
    fixed = {"duration": 9.0, "cog_desc": "c", "fig_desc": "f", "fig_desc_score": 0.5}
    return lines(
        {"video": video, "time": [0, 4], "desc_id": number} | fixed for number, video in video_of.items()
    )


def split(name, video_of, seed):
    videos = sorted(set(video_of.values()), reverse=True)
    meta = lines({"qid": f"{number}_fig", "query": "f"} for number in video_of)
    return {
        f"{name}/query_embedding/query_embeddings.{name}.npy": npy(unit(len(video_of), seed)),
        f"{name}/query_embedding/query_meta.{name}.jsonl": meta,
        f"{name}/video_embedding_1fps/segment_embeds.npy": npy(unit(len(videos), seed + 1)),
        f"{name}/video_embedding_1fps/docid2row.json": json.dumps(
            {v: n for n, v in enumerate(videos)}
        ).encode(),
        f"{name}/index/index.faiss": b"an index",
        f"{name}/index/id_map.json": json.dumps(videos).encode(),
    }


TEXTS = {
    f"raw_annotation/{name}.jsonl": fig(video_of) for name, video_of in (("train", TRAIN), ("test", TEST))
}
TEXTS["sft_data/train_oneturn.json"] = b"[]"
VECTORS = (
    split("train", TRAIN, 0) | split("test", TEST, 2) | {"train/hard_negatives.json": b'{"1_fig": ["BBBBB"]}'}
)
STILLS = {f"test/video_npy_with_meta/{video}.npy": FRAMES for video in TEST.values()}
GRPO = {"grpo_data/train.minimal_top1.jsonl": b"{}\n"}


def header(name, size=0, **more):
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in more.items():
        setattr(member, key, value)
    return member


def tar(files, around=""):
    """The bytes of a tar: {name: content}, or (TarInfo, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = name if isinstance(name, tarfile.TarInfo) else header(around + name, len(content))
            out.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def lay(folder, **shards):
    """A release of the shards given as bytes; one as a list of bytes has as many parts."""
    (folder / "shards").mkdir(parents=True)
    entries = []
    for name, content in shards.items():
        parts = [f"{name}.{n}" for n in range(len(content))] if isinstance(content, list) else []
        entries.append(
            {"name": f"{name}.tar"} | ({"parts": [f"shards/{part}" for part in parts]} if parts else {})
        )
        for part, block in zip(parts or [f"{name}.tar"], content if parts else [content], strict=True):
            (folder / "shards" / part).write_bytes(block)
    (folder / "manifest.json").write_text(json.dumps({"shards": entries}))
    return folder


def in_three(content):
    """Both cuts are inside a file."""
    return [content[:700], content[700:5000], content[5000:]]


@pytest.fixture
def whole(tmp_path):
    """A release with everything, the frames in the shard where one wanted file lies behind them."""
    shards = {
        "frames": tar(STILLS | GRPO),
        "texts": tar(TEXTS, "./"),
        "vectors": in_three(tar(VECTORS, "charades-sta/")),
    }
    return lay(tmp_path / "copy", **shards)


@pytest.fixture
def profile(tmp_path, monkeypatch):
    results.published()  # read and kept before their folder is changed
    for module in (config, real_datasets, official_release, doctor, sft_data):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return config.load("paper")


@pytest.fixture
def home(tmp_path):
    return tmp_path / "data" / "charades"


def files_below(home):
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def arrived(home):
    """All files but the record, which must be there."""
    files = files_below(home)
    assert files.pop("release.json")
    return files


def download(profile, source=None):
    return official_release.download(profile, "charades", source and str(source))


def refused(profile, source=None):
    """The one line that a download ends with."""
    with pytest.raises(InputError) as error:
        download(profile, source)
    assert "\n" not in str(error.value)
    return str(error.value)


EXPECTED = {
    official_release.wanted("charades")[name]: content for name, content in (TEXTS | VECTORS | GRPO).items()
}


def test_the_wanted_files_arrive_whole_and_nothing_else_does(profile, whole, home, monkeypatch):
    assert download(profile, whole) == []
    got = files_below(home)
    assert json.loads(got.pop("release.json"))["source"] == str(whole)
    assert got == EXPECTED and set(EXPECTED) == set(official_release.wanted("charades").values())
    monkeypatch.setattr(official_release, "connect", None)  # a second call needs no source
    assert download(profile) == []


def test_what_is_fetched_is_where_others_look(profile, whole, home):
    download(profile, whole)
    (home / "videos").mkdir()
    (home / "videos" / "CCCCC.mp4").write_bytes(b"film")
    real_datasets.prepare(profile, "charades")
    assert (profile.data_dir("charades") / "videos" / "CCCCC.mp4").read_bytes() == b"film"
    assert sft_data.reply_file(profile, "charades").read_bytes() == b"[]"


def test_a_file_that_was_there_before_stays_as_it_is(profile, whole, home):
    file = home / "annotations" / "charades_fig_test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"mine")
    download(profile, whole)
    assert files_below(home)["annotations/charades_fig_test.jsonl"] == b"mine"


def test_what_the_release_lacks_is_named(profile, tmp_path):
    absent = download(profile, lay(tmp_path / "copy", one=tar(TEXTS | STILLS)))
    assert absent == sorted(set(official_release.wanted("charades")) - set(TEXTS))


# --- From the hub


class Hub:
    """A bucket as the hub serves it, on loopback: its description, its listing, and ranges of its files."""

    def __init__(self, folder):
        self.requests, self.sent, self.marks, prefix = [], 0, {}, "datasets/charades-sta"

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                path = unquote(handler.path.partition("?")[0])
                self.requests.append(path)
                if path == "/api/buckets/VideoSearchR1/data":
                    bucket = {"id": "VideoSearchR1/data", "private": False, "size": 1, "totalFiles": 1}
                    return self.answer(
                        handler, json.dumps(bucket | {"createdAt": "2026-07-01T00:00:00.000Z"}).encode()
                    )
                if path.startswith("/api/buckets/VideoSearchR1/data/tree"):
                    below = path.partition("/data/tree/")[2].removeprefix(prefix).strip("/")
                    files = sorted((folder / below).iterdir())
                    entries = [self.entry(file, f"{prefix}/{below}") for file in files]
                    return self.answer(handler, json.dumps(entries).encode())
                file = folder / path.removeprefix(f"/buckets/VideoSearchR1/data/resolve/{prefix}/")
                if not file.is_file():
                    return handler.send_error(404)
                content, span = file.read_bytes(), handler.headers["Range"]
                if span:
                    first, last = map(int, span.removeprefix("bytes=").split("-"))
                    content = content[first : last + 1]
                self.sent += len(content)
                return self.answer(handler, content, 206 if span else 200)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def entry(self, file, folder):
        path = f"{folder.rstrip('/')}/{file.name}"
        if file.is_dir():
            return {"type": "directory", "path": path}
        return {
            "type": "file",
            "path": path,
            "size": file.stat().st_size,
            "xetHash": self.marks.get(file.name, "a" * 64),
        }

    @staticmethod
    def answer(handler, content, status=200):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@pytest.fixture
def hub(whole, monkeypatch):
    bucket = Hub(whole)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"http://127.0.0.1:{bucket.server.server_port}"
    options = {"endpoint": address, "token": False, "skip_instance_cache": True}
    monkeypatch.setattr(official_release, "connect", lambda source: huggingface_hub.HfFileSystem(**options))
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()


def test_the_hub_gives_the_same_and_the_frames_stay_there(profile, hub, home, whole):
    """Through the library's own code for buckets; only its address is another."""
    assert download(profile) == []
    got = files_below(home)
    record = json.loads(got.pop("release.json"))
    assert record["source"] == "hf://buckets/VideoSearchR1/data/datasets/charades-sta"
    assert record["files"]["texts.tar"] == [(whole / "shards" / "texts.tar").stat().st_size, "a" * 64]
    assert got == EXPECTED
    assert hub.sent < len(FRAMES), "frames were downloaded"


def test_no_shard_is_opened_that_holds_nothing_wanted(profile, hub, home, whole):
    (whole / "shards" / "frames.tar").write_bytes(tar(STILLS))
    (whole / "shards" / "texts.tar").write_bytes(tar(TEXTS | GRPO))
    assert download(profile) == []
    assert hub.requests and not any("frames" in path for path in hub.requests)


def test_another_revision_is_refused(profile, hub, home, monkeypatch):
    """A bucket has none: the hash of its files tells."""
    read_shard, calls = official_release._read_shard, []

    def once(*args):
        if calls:
            raise RuntimeError("stopped")
        calls.append(args)
        read_shard(*args)

    monkeypatch.setattr(official_release, "_read_shard", once)
    with pytest.raises(RuntimeError, match="stopped"):
        download(profile)
    assert len(files_below(home)) > 1
    hub.marks["vectors.1"] = "b" * 64
    assert re.search(
        r"shards/vectors\.1: not of the revision begun with.*to begin anew delete", refused(profile)
    )


@pytest.mark.parametrize(
    "source", ["hf://buckets/VideoSearchR1/nothing/datasets", "hf://no", "hf://datasets/a/b@c"]
)
def test_a_place_that_is_not_on_the_hub_is_one_line(source, profile, hub):
    assert re.search(rf"^{source}/manifest.json: cannot be read .*--source", refused(profile, source))


# --- Files that are not as they should be


class Flaky(LocalFileSystem):
    """A line that breaks while the file at `number` of a fetch is read."""

    cachable = False
    number, opened = 0, 0

    def open(self, path, mode="rb", **options):
        file = super().open(path, mode, **options)
        if "/shards/" in path:
            Flaky.opened += 1
            if Flaky.opened == Flaky.number:
                file.f.close()
                file.f = Broken()
        return file


class Broken(io.RawIOBase):
    def seek(self, *_):
        return 0

    def read(self, *_):
        raise ConnectionResetError("the line broke")


@pytest.mark.parametrize("number", [1, 3, 5])
def test_after_an_interruption_the_next_call_goes_on(number, profile, whole, home, monkeypatch):
    Flaky.number, Flaky.opened = number, 0
    monkeypatch.setattr(official_release, "connect", lambda _: Flaky())
    assert re.search(
        rf"^{whole}/shards/.*the line broke.*run the same command again", refused(profile, whole)
    )
    before = {
        path: path.stat().st_mtime_ns
        for path in home.rglob("*")
        if path.is_file() and path.name in str(EXPECTED)
    }
    assert len(before) >= {1: 0, 3: 3, 5: 16}[number]
    Flaky.number = 0
    assert download(profile, whole) == []
    assert arrived(home) == EXPECTED
    assert {path: path.stat().st_mtime_ns for path in before} == before, "fetched twice"


def spoilt(content, offset, by=b"\xff"):
    return content[:offset] + by + content[offset + len(by) :]


GOOD = tar(TEXTS | VECTORS)
SECOND = GOOD.index(b"raw_annotation/test.jsonl")
BAD = {
    "cut in a file": GOOD[:700],
    "cut between two files": GOOD[:SECOND],
    "cut before the end": tar(TEXTS)[: tar(TEXTS).index(bytes(1024), SECOND) // 512 * 512],
    "first header damaged": spoilt(GOOD, 120),
    "later header damaged": spoilt(GOOD, SECOND + 120),
    "no tar": b"<html>404</html>" * 200,
    "empty": b"",
}


@pytest.mark.parametrize("damage", BAD)
def test_a_damaged_shard_is_one_line_and_what_was_fetched_stays(damage, profile, home, tmp_path):
    folder = lay(tmp_path / "copy", grpo=tar(GRPO), other=BAD[damage], big=tar(STILLS))
    assert re.search(r"shards/other\.tar: cut short, damaged, or no tar \(.*again$", refused(profile, folder))
    files = files_below(home)
    files.pop("release.json", None)
    whole = {name: content for name, content in files.items() if not name.endswith(".partial")}
    assert all(EXPECTED[name] == content for name, content in whole.items()), "half a file"
    (folder / "shards" / "other.tar").write_bytes(tar(TEXTS | VECTORS))
    assert download(profile, folder) == []
    assert arrived(home) == EXPECTED


def test_a_missing_part_is_named_where_it_matters(profile, whole, home):
    (whole / "shards" / "vectors.1").unlink()
    assert re.search(
        r"shards/vectors\.1: not there, and still missing is .*test/.*; copy or", refused(profile, whole)
    )
    assert "annotations/charades_fig_test.jsonl" in files_below(home)
    (whole / "shards" / "vectors.1").write_bytes(in_three(tar(VECTORS, "charades-sta/"))[1])
    assert download(profile) == []


def test_a_copy_without_the_frames_will_do(profile, tmp_path):
    folder = lay(tmp_path / "copy", frames=tar(STILLS), rest=tar(TEXTS | VECTORS | GRPO))
    (folder / "shards" / "frames.tar").unlink()
    assert download(profile, folder) == []


def test_another_source_halfway_is_refused(profile, whole, home, tmp_path):
    download(profile, whole)
    assert re.search(
        rf"release.json: begun from {whole}; to begin anew delete it", refused(profile, tmp_path)
    )


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            None,
            r"manifest\.json: cannot be read \(No such file or directory\); .*--source: a folder with manifest",
        ),
        ("{", r"manifest\.json, line 1: not JSON"),
        ('{"shards": [{"name": "a", "parts": [1]}]}', r"manifest\.json: 'shards\[0\].parts\[0\]': must"),
        ('{"shards": [3]}', r"manifest\.json: 'shards\[0\]': must be .*, found 3"),
        ('{"shards": [{"name": "../../secret"}]}', r"copy/shards/secret: not there"),
    ],
)
def test_a_folder_that_is_no_release_is_one_line(manifest, message, profile, tmp_path):
    (tmp_path / "copy" / "shards").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(tar(TEXTS))
    if manifest is not None:
        (tmp_path / "copy" / "manifest.json").write_text(manifest)
    assert re.search(message, refused(profile, tmp_path / "copy"))


NAME, LINK = "raw_annotation/train.jsonl", {"linkname": "/etc/passwd"}
HOSTILE = {
    "absolute": [(header("/etc/cron.d/evil", 4), b"evil")],
    "upwards": [(header("../../../evil", 4), b"evil")],
    "absolute, with a wanted name": [(header(f"/{NAME}", 4), b"evil")],
    "upwards, with a wanted name": [(header(f"../{NAME}", 4), b"evil")],
    "symlink": [(header(NAME, type=tarfile.SYMTYPE, **LINK), b"")],
    "hard link": [(header(NAME, type=tarfile.LNKTYPE, **LINK), b"")],
    "a file through a symlink": [
        (header("raw_annotation", type=tarfile.SYMTYPE, linkname="/tmp"), b""),
        (header("raw_annotation/evil", 4), b"evil"),
    ],
    "device": [(header(NAME, type=tarfile.CHRTYPE, devmajor=1, devminor=5), b"")],
    "pipe": [(header(NAME, type=tarfile.FIFOTYPE), b"")],
    "folder": [(header(NAME, type=tarfile.DIRTYPE), b"")],
    "longer than the tar": [(header(NAME, 4), b"evil"), (header("a", 4), b"evil")],
    "a negative size": [(header(name, 4), b"evil") for name in ("first", "a", "b")],
    "a header of headers": [(header("a", 4, pax_headers={"comment": "x" * 1000}), b"evil")],
}


def with_size(content, offset, size):
    """The size in the header at an offset replaced, with the right checksum."""
    head = bytearray(content[offset : offset + 512])
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return content[:offset] + bytes(head) + content[offset + 512 :]


def negative(content):
    """The size of the last member is -1536: a reader that believes it never ends."""
    return with_size(content, content.rindex(b"b\0\0\0"), b"\xff" * 10 + b"\xfa\x00")


def test_a_wanted_file_of_absurd_size_is_refused_before_it_is_read(profile, tmp_path):
    content = with_size(tar(HOSTILE["longer than the tar"]), 0, b"77777777777\0")
    assert re.search(
        "raw_annotation/train.jsonl claims 9 GB", refused(profile, lay(tmp_path / "copy", one=content))
    )


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_tar_writes_nothing_where_it_likes(attack, profile, home, tmp_path):
    content = tar(HOSTILE[attack])
    if attack == "longer than the tar":
        content = with_size(content, 0, b"00000100000\0")
    if attack == "a negative size":
        content = negative(content)
    if attack == "a header of headers":  # each of them is read by a call inside the call before
        content = content[: 512 * 4] * 1000
    folder = lay(tmp_path / "copy", one=content)
    before = {path for path in tmp_path.rglob("*")}
    assert re.search(r"one\.tar: cut short, damaged|no raw_annotation", refused(profile, folder))
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert written <= {home / "release.json", home / "annotations" / ".charades_fig_train.jsonl.partial"}


def test_links_and_strange_names_beside_good_files_do_no_harm(profile, home, tmp_path):
    strange = [*HOSTILE["absolute"], *HOSTILE["upwards"], *HOSTILE["a file through a symlink"]]
    good = [(header(name, len(content)), content) for name, content in (TEXTS | VECTORS | GRPO).items()]
    assert download(profile, lay(tmp_path / "copy", one=tar(strange + good))) == []
    assert arrived(home) == EXPECTED
    assert not any(path.is_symlink() for path in home.rglob("*"))


# --- What the vectors are good for


def test_the_first_search_by_released_vectors_is_that_of_a_plain_computation(profile, whole, home, capsys):
    assert cli.main(["download-release", "--dataset", "charades", "--source", str(whole)]) == 0
    queries, videos, order = unit(4, 2), unit(3, 3), ["EEEEE", "DDDDD", "CCCCC"]
    ranks = [
        sorted(order, key=lambda video: -float(query @ videos[order.index(video)])).index(right) + 1
        for query, right in zip(queries, TEST.values(), strict=True)
    ]
    recall = 100 * ranks.count(1) / 4
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("first search by the released vectors, 4 queries (paper): R@1 ")
    assert f"R@1 {recall:.1f} (21.6), R@5 100.0 (41.8)" in line and 0 < recall < 100


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        (
            1,
            lambda path: replace_in(path, "4_fig", "4"),
            "query_meta.test.jsonl, line 2: 'qid': .*, found '4'",
        ),
        (1, lambda path: replace_in(path, "4_fig", "3_fig"), "1 queries without a vector, 0 unknown videos"),
        (3, lambda path: replace_in(path, "EEEEE", "FFFFF"), "0 queries without a vector, 1 unknown videos"),
        (3, lambda path: replace_in(path, "2", "1"), "docid2row.json: not one row for each video"),
        (
            2,
            lambda path: np.save(path, np.eye(3, dtype=np.float32)),
            "float32 .4, 8., not 4 vectors of one width",
        ),
        (2, lambda path: np.save(path, unit(2, 3)), "segment_embeds.npy: float32 .2, 8., not 3 vectors"),
        (2, lambda path: np.save(path, 2 * unit(3, 3)), "segment_embeds.npy: not vectors of length one"),
        (2, lambda path: np.save(path, np.array([None]), allow_pickle=True), "not readable as an array"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(file, spoil, message, profile, whole, home):
    download(profile, whole)
    assert official_release.read_vectors(profile, "charades")[2] == list(TEST)
    spoil(home / official_release.vector_files("test")[file])
    with pytest.raises(InputError, match=message) as refused:
        official_release.read_vectors(profile, "charades")
    assert "\n" not in str(refused.value)


def test_doctor_says_step_by_step_what_is_there_and_what_it_allows(profile, whole, home):
    def check(status, *words):
        row = doctor.real_data(profile, "charades")
        assert row.status == status and all(word in " -> ".join(row) for word in words), row

    check("missing", "no charades_fig_train.jsonl -> ", "--dataset charades downloads about 0.2 GB")
    for name in ("raw_annotation/train.jsonl", "raw_annotation/test.jsonl"):
        path = home / official_release.wanted("charades")[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(TEXTS[name])
    check("missing", "videos of test 0.0%", "for chance of T1", "put the videos")
    download(profile, whole)
    check("missing", "VR of ZS and FT by the released vectors")
    (home / "videos").mkdir()
    for video in ("CCCCC", "DDDDD"):
        (home / "videos" / f"{video}.mp4").write_bytes(b"film")
    check("missing", "videos of test 66.7%, of train 0.0%, for ZS, rank fallback of T1")
    (home / "videos" / "AAAAA.mp4").write_bytes(b"film")
    check("limited", "of train 50.0%, for all rows of T1", "missing.csv")
    (home / official_release.REPLIES).unlink()
    check("missing", "for ZS, rank fallback, two-stage of T1", "no replies to learn stage 1 from")
    (home / "annotations" / "charades_fig_test.jsonl").write_text("{")
    check("missing", "line 1: not JSON")


def test_the_estimate_of_bytes_is_that_of_the_published_counts(profile):
    """Charades: counted on its files. Two releases of it, one by our formula, one by adding up vectors."""
    queries, videos = 12408 + 3720, 5338 + 1334
    assert official_release.size("charades") == pytest.approx(1.1 * 8192 * (queries + videos + videos))
