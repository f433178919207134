"""The soft-token upper bound: gradients by finite differences, losses by another formula, what must not move."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import QUERIES, random_engine, random_policy

from vsr1 import config
from vsr1.data import annotations
from vsr1.experiments import soft_token_bound
from vsr1.loop import sqr
from vsr1.models import policy, prompt_text, soft_heads
from vsr1.report import results
from vsr1.training import common, released_replies, sft_data, sft_examples

PROFILE = config.load("smoke")


@pytest.fixture(scope="module")
def encoder():
    engine = random_engine()
    for name, weight in engine.model.named_parameters():  # else all queries look alike to random weights
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 3
    engine.model.get_input_embeddings().weight.data *= 1.7  # words of another length than the policy's
    return engine


@pytest.fixture(scope="module")
def gallery(encoder):
    videos = torch.randn(9, encoder.width, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(videos, dim=-1)


RIGHT = torch.tensor([4, 0, 7])


@pytest.fixture
def agent(encoder):
    base = random_policy()
    return policy.new_heads(base, soft_heads.Settings(refine_init="scaled"), 0, encoder)


def rows():
    replies = ["<think> a dog </think>", "<answer>not_matched</answer>", "<think> no blue dog </think> yes"]
    return [
        sft_examples.SFTExample(i, text, "v", "w", (), reply)
        for i, (text, reply) in enumerate(zip(QUERIES, replies, strict=True))
    ]


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- free latents


@pytest.mark.parametrize("name", ["raw", "raw-kept", "b", "scaled"])
def test_the_slope_of_free_latents_is_that_of_finite_differences(encoder, gallery, name):
    layout = soft_token_bound.layouts(encoder)[name]
    free, turn = 0.1 * drawn((3, 4, encoder.width)), drawn((3, 4, encoder.width), seed=1)

    def losses(step):
        vecs = encoder.text_vecs(QUERIES, layout.to_engine(free + step * turn))
        return soft_token_bound.gallery_nce(vecs, gallery, RIGHT, 0.1)

    _, slope, _ = soft_token_bound.latent_step(
        encoder, layout, encoder.read_queries(QUERIES), free, gallery, RIGHT, 0.1
    )
    with torch.no_grad():
        measured = (losses(1e-3) - losses(-1e-3)) / 2e-3  # (Q,)
    assert torch.allclose((slope * turn).sum((1, 2)), measured, rtol=0.03, atol=0.03)


def test_each_query_has_its_latents_to_itself(encoder, gallery):
    layout, free = (
        soft_token_bound.layouts(encoder)["scaled-zero-clipped"],
        0.1 * drawn((3, 2, encoder.width)),
    )
    losses, slope, ranks = soft_token_bound.latent_step(
        encoder, layout, encoder.read_queries(QUERIES), free, gallery, RIGHT, 0.1
    )
    for row, text in enumerate(QUERIES):
        alone = soft_token_bound.latent_step(
            encoder,
            layout,
            encoder.read_queries([text]),
            free[row : row + 1],
            gallery,
            RIGHT[row : row + 1],
            0.1,
        )
        assert torch.allclose(alone[0], losses[row : row + 1], atol=1e-4)
        assert torch.allclose(alone[1][0], slope[row], atol=1e-4)
        assert alone[2][0] == ranks[row]


def test_what_stands_in_the_query_has_the_length_that_its_way_promises(encoder):
    length = np.mean(
        [
            encoder.model.get_input_embeddings()(torch.tensor(token)).norm().item()
            for token in range(len(encoder.tokenizer))
        ]
    )
    free = drawn((2, 3, encoder.width)) * torch.tensor([0.1, 1.0, 40.0])[:, None]
    longs = {
        name: layout.to_engine(free).norm(dim=-1)
        for name, layout in soft_token_bound.layouts(encoder).items()
    }
    for name in ("raw-kept", "scaled", "scaled-zero"):
        assert torch.allclose(longs[name], torch.tensor(length, dtype=torch.float32), rtol=1e-2), name
    assert torch.allclose(longs["b"], torch.tensor(encoder.width**0.5), rtol=1e-2)
    assert torch.equal(longs["raw"], free.norm(dim=-1))


def test_clipping_shortens_long_slopes_and_leaves_short_ones(encoder, gallery):
    layout, free = soft_token_bound.layouts(encoder)["raw"], 0.1 * drawn((3, 2, encoder.width))
    _, slope, _ = soft_token_bound.latent_step(
        encoder, layout, encoder.read_queries(QUERIES), free, gallery, RIGHT, 0.1
    )
    lengths = slope.flatten(1).norm(dim=1)
    limit = lengths.median().item()
    _, clipped, _ = soft_token_bound.latent_step(
        encoder,
        replace(layout, max_grad_norm=limit),
        encoder.read_queries(QUERIES),
        free,
        gallery,
        RIGHT,
        0.1,
    )
    want = slope * (limit / lengths).clamp(max=1)[:, None, None]
    assert torch.allclose(clipped, want) and (lengths > limit).any() and (lengths < limit).any()


def test_the_gallery_loss_is_info_nce_with_all_others_as_negatives(encoder, gallery):
    vecs = torch.nn.functional.normalize(drawn((3, encoder.width), seed=5), dim=-1)
    others = torch.stack(
        [gallery[[v for v in range(len(gallery)) if v != right]] for right in RIGHT.tolist()]
    )
    want = common.info_nce(vecs, gallery[RIGHT], others, 0.1)
    assert torch.allclose(soft_token_bound.gallery_nce(vecs, gallery, RIGHT, 0.1), want, atol=1e-5)
    hard = soft_token_bound.QueryBatch(
        rows(), None, None, gallery, RIGHT, torch.tensor([[1, 2], [3, 4], [5, 6]])
    )
    assert torch.allclose(
        hard.losses(vecs, 0.1), common.info_nce(vecs, gallery[RIGHT], gallery[hard.wrong], 0.1)
    )


# --- heads


@torch.no_grad()
def read_once(agent, encoder, gallery):
    contexts, words = soft_token_bound.read_replies(agent, rows()), encoder.read_queries(QUERIES)
    return soft_token_bound.QueryBatch(rows(), contexts, words, gallery, RIGHT)


def test_scaled_heads_hand_out_token_lengths_and_are_default_heads_otherwise(agent, encoder):
    latents = drawn((5, encoder.width))
    for entering, reader in (
        (agent.heads.to_policy(latents), agent),
        (agent.heads.to_engine(latents), encoder),
    ):
        tokens = reader.model.get_input_embeddings().weight[: len(reader.tokenizer)].detach()
        assert torch.allclose(entering.norm(dim=-1), tokens.norm(dim=1).mean(), rtol=2e-2)
    plain = policy.new_heads(agent, soft_heads.Settings(refine_init="default"), 0, encoder).heads.state_dict()
    differ = {
        name for name, weight in agent.heads.state_dict().items() if not torch.equal(weight, plain[name])
    }
    assert differ == {f"refine_{which}_input_projector.0.weight" for which in ("latent", "append")}


def test_what_was_read_once_gives_the_vectors_of_reading_anew(agent, encoder, gallery):
    once = read_once(agent, encoder, gallery)
    anew = replace(once, contexts=None)
    with torch.no_grad():
        pair = [soft_token_bound.query_vecs(encoder, agent, batch, 2) for batch in (once, anew)]
        plain = soft_token_bound.query_vecs(encoder, agent, once, 0)
    assert torch.allclose(*pair, atol=1e-5)
    assert np.allclose(plain, encoder.embed_texts(QUERIES), atol=1e-5)
    order = (plain @ gallery.T).argsort(dim=1, descending=True)
    scores = soft_token_bound.evaluate_heads(encoder, agent, once, 0, 0.1, size=2)
    assert scores["ranks"] == [order[row].tolist().index(RIGHT[row]) + 1 for row in range(3)]
    some = soft_token_bound.query_vecs(encoder, agent, once.select([2, 0]), 2)
    assert torch.allclose(some, pair[0][[2, 0]], atol=1e-5)


def test_what_is_read_is_what_a_rollout_reads_of_prompt_and_reply(agent):
    """As one text, or in two parts with the cache in between; several at once, or one alone."""
    prompts = [agent.prompt(agent.settings.system, row.query) for row in rows()]
    said = [agent.tokenizer(f"{row.reply} {prompt_text.REFINE}")["input_ids"] for row in rows()]
    with torch.no_grad():
        replayed = agent.replay(prompts, [[*ids, agent.stop_token_id] for ids in said]).refine_contexts
        together = soft_token_bound.read_replies(agent, rows())
        want = sqr.soft_tokens(agent, replayed, 3)
        assert torch.allclose(sqr.soft_tokens(agent, together, 3), want, atol=1e-5)
        for row, example in enumerate(rows()):
            alone = sqr.soft_tokens(agent, soft_token_bound.read_replies(agent, [example]), 3)
            assert torch.allclose(alone[0], want[row], atol=1e-5)


def weights(module):
    return [weight.detach().clone() for weight in module.parameters()]


def same(module, before):
    return [torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True)]


def test_heads_learn_alone_or_with_the_policy(agent, encoder, gallery):
    """Heads alone leave policy and engine as they are to the last bit; with the policy both move, the engine never."""
    batch = read_once(agent, encoder, gallery)
    before = {part: weights(part) for part in (agent.heads, agent.model, encoder.model)}
    losses = soft_token_bound.train_heads(encoder, agent, batch, 2, 6, PROFILE)
    assert all(same(agent.model, before[agent.model])) and all(same(encoder.model, before[encoder.model]))
    assert not all(same(agent.heads, before[agent.heads])) and np.mean(losses[-2:]) < np.mean(losses[:2])
    soft_token_bound.train_heads(encoder, agent, replace(batch, contexts=None), 2, 1, PROFILE)
    assert not all(same(agent.model, before[agent.model])) and all(same(encoder.model, before[encoder.model]))


# --- what it compares, and what it says


def test_runs_differ_from_the_reference_in_one_thing():
    profile = config.load("mini")
    runs = soft_token_bound.head_runs(profile)
    reference = soft_token_bound.HeadRun(
        "scaled", profile.soft_token_bound.n_soft, profile.soft_token_bound.train_queries[-1]
    )
    assert reference in runs and len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert sum(vars(run)[key] != value for key, value in vars(reference).items()) <= 1


def test_numbers_are_shares_of_the_right_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    videos = ["a", "b", "c", "d"]
    systems = {
        "free-plain": {"ranks": [1, 2, 3, 4], "nce": [1.0, 2.0, 3.0, 4.0], "videos": videos},
        "free-raw": {"ranks": [1, 1, 1, 2], "curve": [25.0, 50.0, 92.5, 75.0], "videos": videos},
        "held-plain": {"ranks": [1, 2, 3, 1], "nce": [1.0] * 4, "videos": videos},
        "held-scaled-n4-r8": {"ranks": [2, 1, 1, 2], "nce": [0.5] * 4, "videos": videos, "curve": [3.0, 2.0]},
    }
    numbers = soft_token_bound.numbers(PROFILE, "charades", systems)
    value = lambda name: numbers[f"L1/charades/{name}"].value  # noqa: E731
    assert (
        value("free-raw/vr@1") == 75.0 and value("free-raw/steps90") == 2 and value("free-plain/nce") == 2.5
    )
    assert value("held-scaled-n4-r8/vr@1") == 50.0 and value("held-scaled-n4-r8/vr@1_failed") == 100.0
    assert value("held-scaled-n4-r8/vr@1_kept") == 0.0 and value("held-walkdown/vr@1_failed") == 50.0
    results.record(
        PROFILE, "charades", "06c_upper_bound", numbers, soft_token_bound.series("charades", systems)
    )
    assert soft_token_bound.series("charades", systems)["L1/charades/free-raw/vr@1"][2] == [2, 92.5]


def test_real_queries_take_the_replies_of_stage_1(monkeypatch, tmp_path):
    """Those about held-out videos to be evaluated, the others to learn from; without either it is one line."""
    profile = replace(PROFILE, world=None, val_fraction=0.25, data_source="vsr1.data.real_datasets")
    queries = [annotations.Query(n, "q", f"v{n}", (0.0, 1.0), "c", 2.0) for n in range(8)]
    learn, held = ({query.id for query in part} for part in annotations.split_validation(queries, 0.25))
    released = [sft_examples.SFTExample(query.id, "q", query.video, "w", (), "reply") for query in queries]
    file = tmp_path / released_replies.FILE
    monkeypatch.setattr(sft_data, "reply_file", lambda *_: file)
    monkeypatch.setattr(released_replies, "read_released", lambda *_: released)
    learned, held_out = soft_token_bound.split_examples(profile, "charades", queries, None)
    assert {row.desc_id for row in learned} == learn and {row.desc_id for row in held_out} == held
    released[:] = learned
    with pytest.raises(config.InputError, match=f"{file}: no replies about held-out videos"):
        soft_token_bound.split_examples(profile, "charades", queries, None)
