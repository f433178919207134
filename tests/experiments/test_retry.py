"""The retry study against the loop itself."""

# ruff: noqa: F811

import dataclasses

import pytest
import torch
from test_evaluate import MATCH, REJECT, agent, random_one, read, search_engine, world  # noqa: F401 (fixtures)

from vsr1.data import annotations
from vsr1.evaluation import evaluate
from vsr1.experiments import retry
from vsr1.loop import episode, records, runner
from vsr1.models import embedding, search_index


@pytest.fixture
def vectors(world):
    return search_index.load_vectors(embedding.embed_corpus(world, "charades", "test"))


def failed_ids(world, vectors):
    """The queries whose first search fails, by a loop over vectors."""
    queries = {q.id: q for q in annotations.read_fig(world.data_dir("charades") / "corpus" / "test.jsonl")}
    failed = []
    for key, vec in zip(vectors.query_ids, vectors.query_vecs, strict=True):
        scores = dict(zip(vectors.video_ids, vectors.video_vecs @ vec, strict=True))
        if max(scores.values()) > scores[queries[key].video]:
            failed.append(key)
    return failed


@pytest.mark.parametrize("reply", [MATCH.removesuffix(" <REFINE>"), REJECT])
def test_a_retry_refines_every_failed_query_whatever_the_reply(
    world, search_engine, agent, vectors, monkeypatch, reply
):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    agent.script = lambda system, query, clip: reply
    world = dataclasses.replace(world, seed=len(reply))  # else the other reply's episodes are current
    episodes = retry.run_retries(world, "charades", "sqr")
    assert [e.desc_id for e in episodes] == failed_ids(world, vectors)[: world.studies.sample_queries]
    assert all(len(e.turns) == 1 and e.turns[0].rank_by_depth for e in episodes)
    if reply == REJECT:  # then it is the loop's own first turn
        path = evaluate.run_system(world, "charades", "retry-check", like="sqr")
        first = {e.desc_id: e.turns[0] for e in records.read_episodes(path)}
        assert all(e.turns[0].rank_by_depth == first[e.desc_id].rank_by_depth for e in episodes)


def test_appended_rewrites_find_what_the_loop_would_have_found(world, search_engine, agent, monkeypatch):
    """Rank, ties and best video of the refined search: all three are of the new query."""
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    agent.script = lambda system, query, clip: f"<query_update>a dog near {query[:9]}</query_update>"
    replaced, appended = (
        retry.run_retries(world, "charades", f"hqr-blind{mode}") for mode in ("", "-append")
    )
    again = retry.append_rewrites(world, "charades", replaced)
    rankings = [
        [(e.turns[0].rank_out, e.turns[0].ties_out, e.turns[0].top1_out) for e in episodes]
        for episodes in (again, appended, replaced)
    ]
    assert rankings[0] == rankings[1] and (None, None, None) not in rankings[0]
    assert [rank for rank, *_ in rankings[0]] != [rank for rank, *_ in rankings[2]]
    assert [top for *_, top in rankings[0]] != [top for *_, top in rankings[2]]


def test_a_batch_that_does_not_fit_in_memory_is_halved(world, search_engine, agent, monkeypatch):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    whole = retry.run_retries(dataclasses.replace(world, seed=1), "charades", "sqr")
    run_episodes, sizes = episode.run_episodes, []

    def small_memory(batch, *functions):
        sizes.append(len(batch))
        if len(batch) > len(whole) // 2 + 1:
            raise torch.OutOfMemoryError
        return run_episodes(batch, *functions)

    monkeypatch.setattr(episode, "run_episodes", small_memory)
    with pytest.warns(UserWarning, match="half of eval_batch"):
        halves = retry.run_retries(dataclasses.replace(world, seed=2), "charades", "sqr")
    assert sizes[0] == len(whole) and len(sizes) == 3
    ranks = [[(e.desc_id, e.turns[0].rank_out) for e in episodes] for episodes in (whole, halves)]
    assert ranks[0] == ranks[1]


def test_the_large_engine_has_vectors_of_its_own(world, vectors, monkeypatch):
    """Those of the small engine stay as they are, and each engine's episodes rest on its own."""
    searched = []
    monkeypatch.setattr(retry, "_refine_once", lambda *args: searched.append(args) or [])
    world = dataclasses.replace(world, seed=3)  # else some episodes are current
    retry.run_study(world, "charades", world.policy)
    folders = {world.data_dir("charades") / "embed" / which / "test" for which in ("engine", "engine_large")}
    assert all(folder.is_dir() for folder in folders)
    assert [args[0].engine for args in searched] == [world.engine] * 4 + [world.engine_large] * 3
    assert search_index.load_vectors(min(folders)).video_ids == vectors.video_ids
