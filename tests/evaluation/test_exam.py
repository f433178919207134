"""The fresh exam: its claims name what exists, its world is another one, its numbers by a loop over queries."""

# ruff: noqa: F811

import dataclasses

import numpy as np
import pytest
from test_evaluate import agent, queries, random_one, read, search_engine, world  # noqa: F401 (fixtures)

from vsr1 import config
from vsr1.config import DATASETS, InputError
from vsr1.evaluation import evaluate, exam, metrics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import runner
from vsr1.loop.records import read_episodes
from vsr1.mini import world as scenes
from vsr1.models import embedding, search_index
from vsr1.report import results
from vsr1.training import query_adapters


def test_every_claim_compares_systems_that_exist_and_has_its_words_in_the_table():
    seed, claims = exam.read()
    assert claims and seed != config.load("mini").world.seed
    for name, claim in claims.items():
        assert isinstance(claim.predicted, str) or claim.predicted.keys() == set(DATASETS)
        assert results.layouts()["X1"]["systems"][name] == claim.words
    assert results.layouts()["X1"]["systems"].keys() == claims.keys()


def test_a_wrong_claim_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "exam.yaml"
    path.write_text("world_seed: 3\nclaims: {a: {words: w, system: vsr1, baseline: sft, predicted: maybe}}\n")
    with pytest.raises(InputError, match=r"exam\.yaml: a: predicted.*found 'maybe'"):
        exam.read(path)
    for system in ("vsr2", "adapter-vec-ft"):  # the second would be fitted to the fresh videos
        claim = f"{{words: w, system: vsr1, baseline: {system}, predicted: open}}"
        path.write_text(f"world_seed: 3\nclaims: {{a: {claim}}}\n")
        with pytest.raises(
            InputError, match=rf"exam\.yaml: a: baseline: {system} cannot sit the exam; .*vsr1-first"
        ):
            exam.read(path)


def test_its_videos_are_of_another_world_and_real_videos_have_none():
    profile = config.load("mini")
    fresh = exam.fresh_profile(profile, exam.read()[0])
    assert fresh.data_dir("didemo") != profile.data_dir("didemo") and fresh.engine == profile.engine
    profile_scenes, fresh_scenes = (
        scenes.make_scenes("didemo", "test", 20, run.world.seed) for run in (profile, fresh)
    )
    assert not {scene.video for scene in profile_scenes} & {scene.video for scene in fresh_scenes}
    with pytest.raises(InputError, match=r"paper: the exam draws videos of a fresh world"):
        exam.sit(config.load("paper"), "didemo")


def test_a_claim_is_a_difference_on_the_same_queries(world, search_engine, agent, queries, monkeypatch):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    episodes = read_episodes(evaluate.run_system(world, "charades", "walk", like="walkdown"))
    right = [
        dataclasses.replace(episode, turns=(dataclasses.replace(episode.turns[0], rank_in=1),))
        for episode in episodes
    ]
    claim = exam.ExamClaim("w", "a", "b", "ahead", "vr@1_orig")
    monkeypatch.setattr(
        exam, "read", lambda: (5, {"one": claim, "other": dataclasses.replace(claim, system="b")})
    )
    monkeypatch.setattr(exam, "fresh_profile", lambda profile, _: profile)
    monkeypatch.setattr(exam, "_run", lambda *args: {"a": right, "b": episodes}[args[-1]])
    numbers = exam.sit(world, "charades")
    gain = np.mean([1 - (episode.rank_orig == 1) for episode in episodes])
    assert numbers["X1/charades/one/points"].value == pytest.approx(100 * gain)
    assert numbers["X1/charades/one/predicted"].value == int(
        exam.outcome(numbers["X1/charades/one/points"]) == "ahead"
    )
    assert numbers["X1/charades/other/points"].value == numbers["X1/charades/other/predicted"].value == 0
    assert exam.outcome(Estimate(-2.0, 3, (-3.0, -1.0))) == "behind"


@pytest.mark.parametrize(
    ("name", "like", "tokens_of"),
    [
        ("adapter-soft-vsr1", "walkdown", "adapter-soft"),
        ("vsr1-first", "sqr-skip", "vsr1"),
        ("vsr1-ft", "walkdown", "vsr1"),
    ],
)
def test_frozen_soft_tokens_search_the_fresh_gallery_first(
    world, search_engine, agent, queries, monkeypatch, name, like, tokens_of
):
    names = []
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    monkeypatch.setattr(query_adapters, "policy_of", lambda *args: names.append(args[-1]) or "weights")
    monkeypatch.setattr(evaluate, "trained_weights", lambda profile, *_: (like, profile.policy))
    episodes = exam._run(world, world, "charades", name)
    assert names == [tokens_of]
    vectors = search_index.load_vectors(embedding.embed_corpus(world, "charades", "test"))
    scores = query_adapters.soft_vecs(search_engine, agent, queries, 3) @ vectors.video_vecs.T
    ranks = search_index.ranks(scores, vectors.columns([query.video for query in queries]))
    assert metrics.true_ranks(episodes, "orig").tolist() == ranks.tolist()
