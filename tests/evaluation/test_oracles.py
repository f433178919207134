"""Bounds of rewriting: the search for words by plain loops, its null, and a policy's own rewrites."""

# ruff: noqa: F811

import dataclasses

import numpy as np
import pytest
import torch
from test_evaluate import agent, queries, random_one, read, scripted, search_engine, world  # noqa: F401 (fixtures)

from vsr1.evaluation import oracles
from vsr1.loop import runner
from vsr1.models import embedding, policy, search_index

WORDS = ["dog", "red", "beach", "night", "umbrella", "jumps"]


@pytest.fixture
def vectors(world):
    return search_index.load_vectors(embedding.embed_corpus(world, "charades", "test"))


def by_hand(search_engine, vectors, text, target, count):
    """The same search over all words, sentence by sentence."""

    def near(text):
        return float(search_engine.embed_texts([text])[0] @ vectors.video_vecs[vectors.column(target)])

    def rank(text):
        scores = vectors.video_vecs @ search_engine.embed_texts([text])[0]
        return 1 + int((scores > scores[vectors.column(target)]).sum())

    for _ in range(count):
        best = max((f"{text} {word}" for word in WORDS), key=near)
        if rank(text) == 1 or near(best) <= near(text):
            break
        text = best
    return text, rank(text)


def test_the_search_takes_the_word_that_moves_the_query_nearest(
    world, search_engine, vectors, queries, monkeypatch
):
    monkeypatch.setattr(oracles, "WORDS", 2)
    word_vecs = search_engine.embed_texts(WORDS)
    longer = set()
    for query in queries[:3]:
        for target in (query.video, *vectors.video_ids[:2]):
            result = oracles.best_words(search_engine, vectors, query.text, target, WORDS, word_vecs)
            assert result == by_hand(search_engine, vectors, query.text, target, 2)
            longer.add(len(result[0].split()) - len(query.text.split()))
    assert len(longer) > 1, "some searches end early"


def test_the_null_is_aimed_at_another_video_of_the_gallery(world, vectors, queries):
    world = dataclasses.replace(world, studies=dataclasses.replace(world.studies, sample_queries=99))
    failed = oracles.failed_queries(world, "charades", vectors)
    scores = vectors.query_vecs @ vectors.video_vecs.T
    best = dict(zip(vectors.query_ids, scores, strict=True))
    for query in queries:
        row = best[query.id]
        assert (query in failed) == (row.max() > row[vectors.column(query.video)])
    targets = oracles.draw_targets(world, failed, vectors)
    assert targets["oracle"] == [query.video for query in failed]
    assert all(wrong != query.video for wrong, query in zip(targets["oracle-wrong"], failed, strict=True))
    assert targets == oracles.draw_targets(world, failed, vectors)


def test_each_bound_is_beside_what_words_reach(world, search_engine, agent, vectors, monkeypatch):
    """A policy that always writes the same; a fixed wording that changes nothing; tokens that find every target."""
    update = "Someone with a red dog."
    reply = f"<think> no </think> <answer>not_matched</answer> <query_update>{update}</query_update>"
    base = policy.Policy(agent.model, agent.tokenizer, None, None, 4096)
    writer = scripted(base, script=lambda *_: reply)
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, writer))
    monkeypatch.setattr(oracles, "trained_weights", lambda *_: ("hqr-reasoned", "weights"))
    monkeypatch.setattr(oracles.query_adapters, "read_first", lambda *_: vectors)
    monkeypatch.setattr(oracles, "WORDS", 1)
    (world.data_dir("charades") / "corpus" / "train.jsonl").write_text(
        (world.data_dir("charades") / "corpus" / "test.jsonl").read_text()
    )
    aimed = []

    def optimise(engine, texts, gallery, columns):
        aimed.extend(columns.tolist())
        assert torch.equal(gallery, torch.from_numpy(vectors.video_vecs))
        return [1] * len(texts)

    failed = oracles.failed_queries(world, "charades", vectors)
    soft = {
        query.id: 1 + number % 2 for number, query in enumerate(failed[1:])
    }  # the first one was not refined
    numbers = oracles.numbers(world, "charades", optimise, soft)
    value = {name.split("/")[2]: number.value for name, number in numbers.items() if name.endswith("/vr@1")}
    for name in ("hqr-oracle", "soft-oracle"):
        gain = numbers[f"P4/charades/{name}/over-{name}-wrong"].value
        assert gain == pytest.approx(value[name] - value[f"{name}-wrong"])
    targets = oracles.draw_targets(world, failed, vectors)
    assert aimed == vectors.columns(targets["oracle"] + targets["oracle-wrong"]).tolist()
    assert value["soft-oracle"] == value["soft-oracle-wrong"] == 100 and value["hqr-fixed"] == 0
    scores = vectors.video_vecs @ search_engine.embed_texts([update])[0]
    right = [vectors.video_ids[int(scores.argmax())] == query.video for query in failed]
    assert value["hqr-trained"] == pytest.approx(100 * np.mean(right))
    ahead = [
        int(hit) - (soft[query.id] == 1) for hit, query in zip(right, failed, strict=True) if query.id in soft
    ]
    over = numbers["P4/charades/hqr-trained/over-sqr"]
    assert (over.value, over.n) == (pytest.approx(100 * np.mean(ahead)), len(failed) - 1)
    assert {"hqr-oracle", "hqr-oracle-wrong"} < value.keys()
