"""Adapters of queries: what they learn, and that training and search read the same tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import QUERIES, VIDEOS, Shelf, random_engine, random_policy

from vsr1 import config
from vsr1.data.annotations import Query
from vsr1.loop import sqr
from vsr1.training import query_adapters, rewrites, sft
from vsr1.training.sft_examples import SFTExample

QUERY = [Query(n + 1, text, f"v{n}", (0.0, 1.0), text, 5.0) for n, text in enumerate(QUERIES)]


@pytest.fixture
def profile():
    return dataclasses.replace(config.load("smoke"), sft_batch=3, sft_negatives=None, infonce_prefixes=())


@pytest.fixture
def rows():
    reply = "<think> no </think> <answer>not_matched</answer>"
    pairs = zip(QUERY, ("v0", "v3", "v5"), strict=True)
    return [SFTExample(q.id, q.text, q.video, shown, ("v5",), reply) for q, shown in pairs]


def test_training_decodes_the_soft_tokens_that_a_first_search_uses(tmp_path, profile, search, vectors, rows):
    agent = random_policy()
    profile = dataclasses.replace(profile, infonce_rows="all")
    alone = sft.draw_queries(profile, rows)
    trainer = sft.make_trainer(profile, agent, search, vectors, alone, Shelf(), tmp_path, "test")
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.data_collator([dataclasses.asdict(row) for row in alone])
    trainer.compute_loss(agent.model, dict(batch))
    vecs = torch.from_numpy(query_adapters.soft_vecs(search, agent, QUERY, size=2))
    loss = trainer.contrast.infonce_losses(vecs, batch["rows"]).sum()
    assert trainer.infonce.item() == pytest.approx(loss.item(), abs=1e-4)
    assert len(alone) == len(rows)
    assert all(sft.uses_infonce(profile, dataclasses.asdict(row)) for row in alone)


def test_a_first_search_reads_refine_right_behind_the_query(search):
    agent = random_policy()
    vecs = query_adapters.soft_vecs(search, agent, QUERY, size=3)
    for query, vec in zip(QUERY, vecs, strict=True):
        prompt = agent.prompt(agent.settings.system, query.text)
        with torch.no_grad():
            contexts = agent.replay([prompt], [[agent.refine_token_id, agent.stop_token_id]]).refine_contexts
            assert contexts[0].attention_mask.shape[1] == len(prompt.ids)
            latents = sqr.soft_tokens(agent, contexts, agent.settings.n_soft)
            assert vec == pytest.approx(
                sqr.soft_query(search, agent.heads, [query.text], latents)[0], abs=1e-5
            )


def test_adapters_draw_as_many_queries_as_soft_tokens_learn_from(profile, rows):
    drawn = sft.draw_queries(dataclasses.replace(profile, infonce_rows="rejected"), rows)
    assert [row.desc_id for row in drawn] == [1, 2]  # two of three show a wrong video
    assert {(row.shown, row.caption, row.reply) for row in drawn} == {("", "", "")}
    assert len(sft.draw_queries(dataclasses.replace(profile, infonce_rows="all"), rows)) == 3


@pytest.mark.parametrize("name", query_adapters.RECIPES)
def test_an_adapter_learns_to_find_and_begins_at_the_typed_query(profile, vectors, rows, name):
    torch.manual_seed(0)
    search = random_engine()  # its own: tuning changes it
    adapter = query_adapters.KINDS[name](profile, search)
    typed = torch.from_numpy(vectors.vecs_of([1, 2, 3]))
    before = adapter(QUERIES, typed)
    plain = {"adapter-vec": typed, "engine-tuned": search.text_vecs(QUERIES).detach()}
    if name in plain:
        assert torch.allclose(before, plain[name], atol=1e-5)
    losses = query_adapters.fit(profile, adapter, vectors, rows * 12, 0.02)
    assert losses[-1] < losses[0] - 0.1, losses
    hits = query_adapters.recall_at_1(vectors, query_adapters.adapted_vecs(adapter, vectors, QUERY, 2), QUERY)
    ranks = (adapter(QUERIES, typed) @ torch.from_numpy(vectors.video_vecs).T).argmax(dim=1)
    assert hits == pytest.approx(
        100 * np.mean([VIDEOS[r] == q.video for r, q in zip(ranks, QUERY, strict=True)])
    )


def test_the_fixed_wording_is_the_one_that_finds_most(search, vectors):
    recalls = query_adapters.wording_recalls(search, vectors, QUERY)
    assert len(recalls) == len(rewrites.wordings(QUERY[0].text))
    for number in (0, 7):
        texts = [rewrites.wordings(query.text)[number] for query in QUERY]
        best = (search.embed_texts(texts) @ vectors.video_vecs.T).argmax(axis=1)
        right = [VIDEOS[row] == query.video for row, query in zip(best, QUERY, strict=True)]
        assert recalls[number] == pytest.approx(100 * np.mean(right))
    assert rewrites.wordings(QUERY[0].text)[0] == QUERY[0].text, "the query as typed can be chosen"


def test_feedback_is_what_brings_most_failed_validation_queries_to_the_top(monkeypatch, profile, vectors):
    monkeypatch.setattr(query_adapters, "read_first", lambda *_: vectors)
    monkeypatch.setattr(query_adapters, "split_queries", lambda *_: {"held": QUERY})
    counts = {}
    for part in query_adapters.FEEDBACK:
        counts[part] = 0
        for query in QUERY:
            vec, scores = vectors.query_vec(query.id), vectors.scores(vectors.query_vec(query.id))
            worst = int(scores.argmax())
            if vectors.video_ids[worst] != query.video:
                again = vectors.video_vecs @ (vec - part * vectors.video_vecs[worst])
                again[worst] = -9
                counts[part] += vectors.video_ids[int(again.argmax())] == query.video
    assert query_adapters.choose_feedback(profile, "charades") == max(counts, key=counts.get)
