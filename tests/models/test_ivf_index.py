"""The index of large galleries, against the same index made in memory by FAISS, and against exact search."""

import shutil

import faiss
import numpy as np
import pytest

from vsr1.config import InputError
from vsr1.models import ivf_index


def unit(vecs):
    return (vecs / np.linalg.norm(vecs, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    """(shards of vectors in clusters, queries: members a little moved)."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((30, 32))
    vecs = unit(centers[rng.integers(0, 30, 3000)] + 0.5 * rng.standard_normal((3000, 32)))
    queries = unit(vecs[rng.integers(0, 3000, 100)] + 0.05 * rng.standard_normal((100, 32)))
    return [vecs[:1000], vecs[1000:1100], vecs[1100:1100], vecs[1100:]], queries


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """(file, what was measured, shards, queries)."""
    path = tmp_path_factory.mktemp("index") / "index.faiss"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ivf_index, "BLOCK", 700)
        told = ivf_index.build(path, lambda: world[0], world[1])
    return path, told, *world


def in_memory(shards, nprobe):
    """The same index as FAISS makes and writes it."""
    vecs = np.concatenate(shards)
    half, ip = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(32), 32, 55, half, ip, False)
    index.train(vecs[np.linspace(0, 2999, 40 * 55).astype(int)])
    index.add(vecs)
    index.nprobe = nprobe
    return index


def test_a_mapped_index_finds_what_the_same_index_made_in_memory_finds(built, tmp_path, capfd):
    """Also where its folder has another name than when it was built."""
    path, told, shards, queries = built
    assert told["vectors"] == 3000 and told["lists"] == 55
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.faiss", "index.ivfdata"]
    moved = shutil.copytree(path.parent, tmp_path / "moved") / path.name
    mapped, loaded = ivf_index.open_index(moved), in_memory(shards, told["nprobe"])
    lists = faiss.downcast_InvertedLists(mapped.invlists)
    assert isinstance(lists, faiss.OnDiskInvertedLists) and lists.filename == str(
        tmp_path / "moved/index.ivfdata"
    )
    assert mapped.ntotal == 3000 and mapped.nprobe == told["nprobe"]
    for by_map, plain in zip(mapped.search(queries, 10), loaded.search(queries, 10), strict=True):
        np.testing.assert_array_equal(by_map, plain)
    assert capfd.readouterr().out == ""


def test_the_recall_that_is_told_is_that_against_a_matrix_product_and_a_sort(built):
    path, told, shards, queries = built
    product = queries @ np.concatenate(shards).T
    best = np.argsort(-product, axis=1)[:, :10]
    np.testing.assert_array_equal(ivf_index.exact(lambda: shards, queries, 10), best)
    index = ivf_index.open_index(path)
    scores, rows = index.search(queries, 10)
    share = np.array([np.isin(one, other).mean() for one, other in zip(rows, best, strict=True)])
    surely = lambda part: part.mean() - 2 * part.std() / 50**0.5  # noqa: E731
    assert index.nprobe == told["nprobe"] and told["k"] == 10 and told["queries"] == 50
    assert told["recall"] == pytest.approx(np.mean(share[1::2])) and surely(share[::2]) >= 0.95
    np.testing.assert_allclose(scores, np.take_along_axis(product, rows, 1), atol=2e-3)  # 16 bits
    steps = [1]
    while steps[-1] < told["nprobe"]:
        steps.append(-(-steps[-1] * 5 // 4))
    assert steps[-1] == told["nprobe"]
    index.nprobe = steps[-2]
    assert surely(ivf_index.recalls(index.search(queries[::2], 10)[1], best[::2])) < 0.95, (
        "fewer would have done"
    )
    index.nprobe = index.nlist
    assert ivf_index.recalls(index.search(queries, 10)[1], best).mean() > 0.99


def test_a_killed_build_goes_on_to_the_same_file(built, tmp_path, monkeypatch):
    path, told, shards, queries = built
    monkeypatch.setattr(ivf_index, "BLOCK", 700)
    write, calls = ivf_index._write, []

    def killed(index, file):
        calls.append(file.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(index, file)

    monkeypatch.setattr(ivf_index, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        ivf_index.build(tmp_path / "index.faiss", lambda: shards, queries)
    assert not (tmp_path / "index.faiss").exists()
    monkeypatch.setattr(faiss.IndexIVFScalarQuantizer, "train", None)  # the centroids stand
    assert ivf_index.build(tmp_path / "index.faiss", lambda: shards, queries) == told
    rows = [0, 700, 1000, 1000, 1100, 1800, 2500]
    assert calls == ["trained.faiss", *(f"{row:012}.part" for row in rows), "index.faiss"]
    assert (tmp_path / "index.ivfdata").read_bytes() == path.with_suffix(".ivfdata").read_bytes()


def test_what_is_damaged_is_one_line(built, tmp_path, monkeypatch):
    path, _, shards, queries = built
    lists = path.with_suffix(".ivfdata").read_bytes()
    (tmp_path / "index.ivfdata").write_bytes(lists[:-1])
    (tmp_path / "index.faiss").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"index.ivfdata: a broken index \(\d+ of \d+ bytes\); delete it"):
        ivf_index.open_index(tmp_path / "index.faiss")
    for size in (10, 2000, path.stat().st_size - 1):
        (tmp_path / "index.faiss").write_bytes(path.read_bytes()[:size])
        with pytest.raises(InputError, match=r"index.faiss: a broken index \([^\n]*\); delete it"):
            ivf_index.open_index(tmp_path / "index.faiss")
    with pytest.raises(InputError, match=r"none\.faiss: a broken index .*No such file"):
        ivf_index.open_index(tmp_path / "none.faiss")
    holes = shards[3].copy()
    holes[1500, 3] = np.nan
    with pytest.raises(InputError, match=r"the vector of row 2600 holds no numbers; make its shard again"):
        ivf_index.build(tmp_path / "holes.faiss", lambda: [*shards[:3], holes], queries)

    def cut(index, files, merged):
        files[0].write_bytes(files[0].read_bytes()[:-8])
        return merge(index, files, merged)

    merge = ivf_index._merge
    monkeypatch.setattr(ivf_index, "_merge", cut)
    with pytest.raises(InputError, match=r"000000000000\.part: a broken index .*; delete it"):
        ivf_index.build(tmp_path / "cut.faiss", lambda: shards, queries)


def test_vectors_of_another_length_and_no_vectors_are_refused(world, tmp_path):
    shards, queries = world
    for stream, asked, words in [
        ([*shards, shards[0][:, :16]], queries, r"vectors and queries of \[16, 32\] dimensions"),
        (shards, queries[:, :16], r"vectors and queries of \[16, 32\] dimensions"),
        ([shards[2]], queries, "no vectors to index"),
    ]:
        with pytest.raises(InputError, match=words):
            ivf_index.build(tmp_path / "index.faiss", lambda stream=stream: stream, asked)
