"""Galleries that grow, block by block, against one matrix product over all of a gallery."""

import dataclasses

import numpy as np
import pytest
from fake import profile as fake_profile

from vsr1.experiments import gallery_growth
from vsr1.models import search_index
from vsr1.report import results


def vectors_of(count, rng):
    vecs = rng.normal(size=(count, 16)).astype(np.float32)
    vecs /= np.linalg.norm(vecs, axis=1, keepdims=True)
    return search_index.Vectors(list(range(count)), vecs, [], vecs[:0])


@pytest.fixture
def run(tmp_path, monkeypatch):
    rng, stored = np.random.default_rng(0), {}
    load = lambda profile, dataset, split: stored.setdefault(  # noqa: E731
        (dataset, split), vectors_of(3 if split == "train" else 12, rng)
    )
    # Fewer train videos than test videos, as in the profiles: a later block may be shorter than the first.
    monkeypatch.setattr(gallery_growth, "_load", load)
    monkeypatch.setattr(gallery_growth, "BLOCK", 50)  # several blocks
    return fake_profile(tmp_path, monkeypatch)


def grown(run, test):
    """{name: all vectors of the gallery}."""
    vecs, whole = test.video_vecs[:0], {}
    for name, blocks in gallery_growth.galleries(run, "didemo", test):
        whole[name] = vecs = np.concatenate([vecs, *blocks])
    return whole


def test_a_gallery_grows_by_what_is_real_first(run):
    test = gallery_growth._load(run, "didemo", "test")
    whole = grown(run, test)
    sizes = {name: len(vecs) for name, vecs in whole.items()}
    assert sizes == {"own": 12, "train": 15, "all": 45, "made": 120}
    assert {f"vr@{k}_{name}" for k in (1, 10) for name in sizes} == results.layouts()["B3"]["metrics"].keys()
    alone = grown(dataclasses.replace(run, datasets=("didemo",)), test)
    assert {name: len(vecs) for name, vecs in alone.items()} == {"own": 12, "train": 15, "made": 120}
    for vecs in whole.values():
        assert np.array_equal(vecs[:12], test.video_vecs)
        assert np.allclose(np.linalg.norm(vecs, axis=1), 1)


def test_made_up_videos_are_those_of_one_draw(run):
    """The whole gallery at once, as a formula, against blocks."""
    test, rng = gallery_growth._load(run, "didemo", "test"), np.random.default_rng(run.seed)
    whole = grown(run, test)
    real = whole["train"]
    nearest = (real @ real.T - 2 * np.eye(len(real))).argmax(axis=1)
    start, pair = rng.integers(0, len(real), (2, 120 - 45))
    moved = real[start] + real[pair] - real[nearest[pair]]
    assert np.array_equal(whole["made"][45:], moved / np.linalg.norm(moved, axis=1, keepdims=True))


def test_ranks_in_blocks_are_those_in_the_whole_gallery(run):
    test, rng = gallery_growth._load(run, "didemo", "test"), np.random.default_rng(1)
    queries = {name: vectors_of(9, rng).video_vecs for name in ("none", "sqr")}
    right = np.arange(9) + 3
    blocks = gallery_growth.galleries(run, "didemo", test)
    ranks, clear = dict(gallery_growth.growing_ranks(queries, blocks, right)), []
    for name, vecs in grown(run, test).items():
        for system, query_vecs in queries.items():
            scores = query_vecs.astype(float) @ vecs.T.astype(float)
            true = scores[np.arange(9), right][:, None]
            # Made-up videos that equal the right one but for rounding may stand before or behind it.
            first, last = 1 + (scores > true + 1e-6).sum(axis=1), (scores > true - 1e-6).sum(axis=1)
            assert ((first <= ranks[name][system]) & (ranks[name][system] <= last)).all()
            clear += (first == last).tolist()
    assert np.mean(clear) > 0.7
