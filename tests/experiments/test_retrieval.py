from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vsr1 import config
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics
from vsr1.experiments import common, retrieval
from vsr1.mini import attribute_heads, attribute_probe, world
from vsr1.models import search_index

QUERIES = [Query(7, "one", "b", (2.0, 4.0), "o", 10.0), Query(3, "two", "a", (0.0, 9.0), "t", 8.0)]
QUERIES += [Query(5, "three", "gone", (1.0, 2.0), "th", 5.0), Query(9, "four", "c", (0.0, 5.0), "f", 10.0)]
# Query ids in another order than the queries, as a file may have them; no vector for the video "gone".
VECTORS = search_index.Vectors(
    video_ids=["a", "b", "c"],
    video_vecs=np.eye(3, dtype=np.float32),
    query_ids=[3, 5, 7, 9],
    query_vecs=np.array([[0.9, 0.1, 0], [0, 1, 0], [0.5, 0.5, 0], [0.1, 0.7, 0.2]], np.float32),
)
PROFILE = config.load("smoke")


@pytest.fixture
def first():
    return retrieval.first_search(QUERIES, VECTORS)


def test_ranks_follow_the_ids_and_a_video_without_a_vector_is_a_failure_that_counts(first):
    assert first.ranks.tolist() == [1, 1, metrics.UNRANKED, 2]
    assert first.pessimistic.tolist() == [2, 1, metrics.UNRANKED, 2] and first.ties() == 1
    assert first.shown == ["a", "a", "b", "b"]  # of equal videos the first is shown
    numbers = retrieval.retrieval_numbers(PROFILE, "charades", first)
    assert numbers["T1/charades/zs/vr@1"].value == 50.0 and numbers["T1/charades/zs/vr@100"].value == 75.0
    assert numbers["T1/charades/random/vr@1"].value == 25.0  # of four videos, one unreadable


def test_the_whole_video_floor_needs_the_right_video_on_screen_and_enough_overlap(first):
    floor = retrieval.retrieval_numbers(PROFILE, "charades", first)["T1/charades/wholevideo/vcmr@0.5"]
    assert floor.value == 25.0  # only "two": "one" ties and is not shown, "four" is wrong


def test_the_curve_is_recall_at_every_k_up_to_the_gallery(first):
    assert retrieval.recall_curve(first) == [[1, 50.0], [2, 75.0], [3, 75.0], [4, 75.0]]


def test_headroom_keeps_missing_what_real_video_cannot_give(first):
    numbers = retrieval.headroom_numbers(PROFILE, "charades", first, {}, {})
    missing = {name for name, number in numbers.items() if number.value is None}
    names = (
        "zs/wrong_from_family",
        "probe/vr@1",
        "probe/vr@1_failed",
        "words/vr@1",
        "words/vr@1_failed",
        "neutral-zeros/vr@1",
        "neutral-noise/vr@1",
    )
    assert missing == {f"H1/charades/{name}" for name in names}
    assert numbers["H1/charades/walkdown/vr@1_failed"].value == 50.0  # "four" at rank 2, "three" nowhere


def test_the_study_of_headroom_starts_from_the_same_first_search(first):
    readable = [query for query in QUERIES if VECTORS.has_video(query.video)]
    moment = world.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    probe = torch.ones(len(attribute_heads.attribute_ids()), 3)
    numbers = attribute_probe._probe_numbers(probe, (VECTORS, readable, [moment] * len(readable)))
    share = 100 * first.hits()[first.ranks != metrics.UNRANKED].mean()
    assert numbers["n"] == len(readable) and numbers["plain_r1"] == pytest.approx(share, abs=0.01)


def test_families_decide_what_a_near_duplicate_is(first):
    families = {"a": 0, "b": 1, "c": 1, "gone": 2}
    # "four" was shown b of its family, "three" was not
    assert retrieval.family_share(first, families) == 50.0 and retrieval.family_share(first, {}) is None


def test_corpus_numbers_count_videos_once_and_queries_all():
    numbers = {
        name.split("/")[-1]: number.value
        for name, number in retrieval.corpus_numbers("didemo", QUERIES * 2, 1, 9).items()
    }
    assert (numbers["queries"], numbers["videos"], numbers["skipped"]) == (8, 9, 1)
    assert numbers["distractors"] == 5
    assert numbers["video_seconds"] == 33 / 4 and numbers["span_seconds"] == 17 / 4


def test_frames_around_a_moment_stay_inside_the_video():
    times = common.moments_to_see((8.0, 12.0), 9.0)  # the truth ends behind the video
    assert (np.diff(times) >= 0).all() and times.min() >= 0 and times.max() <= 9.0


def test_differences_name_the_attribute_of_each_moment():
    def scene(family, colour):
        return SimpleNamespace(family=family, moments=[SimpleNamespace(action="wave", colour=colour)])

    assert common.differences(scene(1, "red"), scene(1, "blue")) == ["moment 1: colour blue instead of red"]
    assert common.differences(scene(1, "red"), scene(2, "blue")) == ["not of one family"]
