"""Search in a gallery, against a matrix product and a sort; in a large one, against the same index made in memory."""

import shutil

import faiss
import numpy as np
import pytest

from vsr1 import config
from vsr1.models import search_index


def test_search_equals_a_matrix_product_and_a_sort_with_ties_in_row_order():
    """Of unit vectors whose products are exact, for a processor may round the same row otherwise at another place."""
    rng = np.random.default_rng(0)
    videos = rng.choice((-0.25, 0.25), (50, 16)).astype(np.float32)
    videos[30] = videos[7]  # a tie, beside many
    queries = np.concatenate([videos[[7, 3]], rng.choice((-0.25, 0.25), (20, 16))]).astype(np.float32)
    vectors = search_index.Vectors([f"v{n}" for n in range(50)], videos, list(range(22)), queries)
    scores, columns = vectors.search(queries, 10)
    product = queries @ videos.T
    np.testing.assert_array_equal(scores, -np.sort(-product, axis=1)[:, :10])
    assert columns[0, :2].tolist() == [7, 30]
    right = rng.integers(0, 50, len(queries))
    by_index = [
        row.tolist().index(c) + 1 for row, c in zip(vectors.search(queries, 50)[1], right, strict=True)
    ]
    ties_before = np.array([(row[:c] == row[c]).sum() for row, c in zip(product, right, strict=True)])
    np.testing.assert_array_equal(by_index, search_index.ranks(product, right) + ties_before)
    assert ties_before.any()


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-6, 0])
def test_search_orders_near_ties_as_the_product_does(spread):
    """Vectors of real width that FAISS cannot tell apart, in a gallery larger than the candidates it proposes."""
    rng = np.random.default_rng(1)
    center = rng.standard_normal(2048)
    videos = center * (spread != 1) + spread * rng.standard_normal((3000, 2048))
    videos = (videos / np.linalg.norm(videos, axis=1, keepdims=True)).astype(np.float32)
    queries = (center / np.linalg.norm(center) + 0.01 * rng.standard_normal((40, 2048))).astype(np.float32)
    vectors = search_index.Vectors([str(n) for n in range(3000)], videos, list(range(40)), queries)
    product = queries @ videos.T
    order = np.argsort(-product, axis=1, kind="stable")[:, :4]
    scores, columns = vectors.search(queries, 4)
    np.testing.assert_array_equal(columns, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(product, order, axis=1))


def test_the_index_proposes_what_is_shown():
    rng = np.random.default_rng(2)
    videos, queries = (unit(rng.standard_normal((n, 32))) for n in (400, 5))
    vectors = search_index.Vectors([str(n) for n in range(400)], videos, list(range(5)), queries)
    vectors.index = counting = CountingIndex(search_index.build_index(videos))
    best = vectors.search(queries, 4)[1]
    assert counting.counts and max(counting.counts) < 400
    np.testing.assert_array_equal(best, np.argsort(-(queries @ videos.T), axis=1, kind="stable")[:, :4])


class CountingIndex:
    """An index that notes for how many candidates it was asked."""

    def __init__(self, index):
        self.index, self.counts = index, []

    def search(self, queries, count):
        self.counts.append(count)
        return self.index.search(queries, count)


def test_ids_find_their_rows_and_an_unknown_one_is_refused_by_name():
    vectors = search_index.Vectors(
        ["b", "a"], np.eye(2, dtype=np.float32), [7, 3], np.eye(2, dtype=np.float32)
    )
    assert vectors.column("a") == 1 and vectors.columns(["a", "b"]).tolist() == [1, 0]
    assert vectors.columns(["x", "a"], missing=0).tolist() == [0, 1]
    assert vectors.has_video("b") and not vectors.has_video("x") and vectors.has_query(3)
    np.testing.assert_array_equal(vectors.vecs_of([3, 7]), [vectors.query_vec(3), vectors.query_vec(7)])
    np.testing.assert_array_equal(vectors.scores(vectors.query_vec(3)), [0, 1])
    with pytest.raises(config.InputError, match="video 'x' has no vector"):
        vectors.column("x")


# --- Large galleries


def unit(vecs):
    return (vecs / np.linalg.norm(vecs, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(file, what was measured, vectors in clusters, queries: members a little moved)."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((30, 32))
    vecs = unit(centers[rng.integers(0, 30, 3000)] + 0.5 * rng.standard_normal((3000, 32)))
    queries = unit(vecs[rng.integers(0, 3000, 100)] + 0.05 * rng.standard_normal((100, 32)))
    path = tmp_path_factory.mktemp("index") / "index.faiss"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_index, "BLOCK", 700)
        return path, search_index.build_ivf(path, vecs, queries), vecs, queries


def test_a_mapped_index_finds_what_the_same_index_made_in_memory_finds(built, tmp_path):
    """Also where its folder has another name than when it was built."""
    path, measured, vecs, queries = built
    half, ip = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    in_memory = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(32), 32, 55, half, ip, False)
    in_memory.train(vecs[np.linspace(0, 2999, 40 * 55).astype(int)])
    in_memory.add(vecs)
    in_memory.nprobe = measured["nprobe"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.faiss", "index.ivfdata"]
    mapped = search_index.open_ivf(shutil.copytree(path.parent, tmp_path / "moved") / path.name)
    lists = faiss.downcast_InvertedLists(mapped.invlists)
    assert lists.filename == str(tmp_path / "moved/index.ivfdata")
    assert mapped.ntotal == measured["vectors"] == 3000 and mapped.nlist == measured["lists"] == 55
    for by_map, plain in zip(mapped.search(queries, 10), in_memory.search(queries, 10), strict=True):
        np.testing.assert_array_equal(by_map, plain)


def test_the_recall_of_the_record_is_that_against_a_matrix_product_and_a_sort(built):
    path, measured, vecs, queries = built
    product = queries @ vecs.T
    best = np.argsort(-product, axis=1)[:, :10]
    np.testing.assert_array_equal(search_index.search_exact(vecs, queries, 10), best)
    index = search_index.open_ivf(path)
    scores, rows = index.search(queries, 10)
    recalls = np.array([np.isin(row, true).mean() for row, true in zip(rows, best, strict=True)])
    surely = lambda part: part.mean() - 2 * part.std() / 50**0.5  # noqa: E731
    assert index.nprobe == measured["nprobe"] and measured["k"] == 10 and measured["queries"] == 50
    assert measured["recall"] == pytest.approx(np.mean(recalls[1::2])) and surely(recalls[::2]) >= 0.95
    np.testing.assert_allclose(scores, np.take_along_axis(product, rows, 1), atol=2e-3)  # 16 bits
    index.nprobe = index.nprobe * 3 // 4
    fewer = search_index.recalls(index.search(queries[::2], 10)[1], best[::2])
    assert surely(fewer) < 0.95, "fewer lists would have done"
