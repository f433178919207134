"""Galleries of other sizes: what they hold, and systems in them against a ranking by hand."""

# ruff: noqa: F811

import numpy as np
import pytest
from test_evaluate import agent, queries, random_one, read, search_engine, world  # noqa: F401 (fixtures)

from vsr1.evaluation import evaluate, gallery_sizes, metrics
from vsr1.loop import runner
from vsr1.loop.records import read_episodes
from vsr1.models import embedding, search_index


@pytest.fixture
def vectors(world):
    return {
        split: search_index.load_vectors(embedding.embed_corpus(world, "charades", split))
        for split in ("test", "train")
    }


def test_a_gallery_grows_from_the_videos_that_are_asked_for_to_all_of_train(world, queries, vectors):
    test, train = vectors["test"], vectors["train"]
    levels = gallery_sizes.sizes(world, "charades")
    right = {query.video for query in queries}
    assert levels["asked"] == len(right) < levels["test"] == len(test.video_ids) < levels["train"]
    before = set()
    for level, size in levels.items():
        gallery = search_index.load_vectors(gallery_sizes.make_gallery(world, "charades", size))
        assert (
            len(gallery.video_ids) == size
            and right <= set(gallery.video_ids)
            and before < set(gallery.video_ids)
        )
        assert gallery.query_ids == test.query_ids and (gallery.query_vecs == test.query_vecs).all()
        for video, vec in zip(gallery.video_ids, gallery.video_vecs, strict=True):
            split = test if test.has_video(video) else train
            assert (vec == split.video_vecs[split.column(video)]).all(), level
        before = set(gallery.video_ids)


def test_every_gallery_is_asked_the_same_and_its_first_search_is_counted(
    world, search_engine, agent, queries, vectors, monkeypatch
):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    monkeypatch.setattr(evaluate, "trained_weights", lambda profile, _, name: ("walkdown", profile.policy))
    monkeypatch.setattr(gallery_sizes, "SYSTEMS", ("vsr1-walkdown",))
    numbers = gallery_sizes.numbers(world, "charades")
    levels = gallery_sizes.sizes(world, "charades")
    for level, size in levels.items():
        assert numbers[f"P3/charades/videos/{level}"].value == size
        allowed = search_index.load_vectors(gallery_sizes.make_gallery(world, "charades", size))
        first = [(allowed.video_vecs @ allowed.query_vec(query.id)).argmax() for query in queries]
        right = [allowed.video_ids[row] == query.video for row, query in zip(first, queries, strict=True)]
        assert numbers[f"P3/charades/typed/{level}"].value == pytest.approx(100 * np.mean(right))
        assert numbers[f"P3/charades/typed/{level}"].n == len(queries)
    whole = read_episodes(evaluate.run_system(world, "charades", "vsr1-walkdown"))
    hits = metrics.vcmr_hits(whole, 0.5)
    assert numbers["P3/charades/vsr1-walkdown/test"].value == pytest.approx(100 * np.mean(hits))
    less = [f"P3/charades/typed/{level}" for level in levels]
    values = [numbers[name].value for name in less]
    assert values == sorted(values, reverse=True), "more videos never help"
