"""Search in a gallery by FAISS, against a matrix product and a sort."""

import numpy as np
import pytest

from vsr1 import config
from vsr1.models import search_index


def test_search_equals_a_matrix_product_and_a_sort_with_ties_in_row_order():
    rng = np.random.default_rng(0)
    videos = rng.standard_normal((50, 16)).astype(np.float32)
    videos[30] = videos[7]  # a tie
    videos /= np.linalg.norm(videos, axis=1, keepdims=True)
    queries = np.concatenate([videos[[7, 3]], rng.standard_normal((20, 16))]).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    vectors = search_index.Vectors([f"v{n}" for n in range(50)], videos, list(range(22)), queries)
    scores, columns = vectors.search(queries, 10)
    product = queries @ videos.T
    np.testing.assert_array_equal(scores, -np.sort(-product, axis=1)[:, :10])
    assert columns[0, :2].tolist() == [7, 30]
    right = rng.integers(0, 50, len(queries))
    by_index = [
        row.tolist().index(c) + 1 for row, c in zip(vectors.search(queries, 50)[1], right, strict=True)
    ]
    np.testing.assert_array_equal(by_index, search_index.ranks(product, right))


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
