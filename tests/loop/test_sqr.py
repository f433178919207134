"""Soft and hard query refinement, each result computed a second way."""

import numpy as np
import pytest
import torch
from tiny import COLD, QUERIES, changed, clip, coming_to_an_end, random_engine, random_policy, sampled

from benchmarks import speed
from vsr1.loop import hqr, sqr
from vsr1.models import decoding, prompt_text, soft_heads


@pytest.fixture(scope="module")
def policy():
    return random_policy(seed=5)


@pytest.fixture(scope="module")
def search():
    return random_engine()


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prompt(prompt_text.SYSTEM, query, clip(4 + 2 * n, n)) for n, query in enumerate(QUERIES)]


REPLIES = ([5, 9, "R"], [11, "R", 12, 13, "R", 40, 41], ["R", 300, 7, 8, 9, 10])


@pytest.fixture(scope="module")
def replies(policy):
    """Replies of different lengths with <REFINE> at the end, twice, and right at the start."""
    return [[policy.refine_token_id if token == "R" else token for token in reply] for reply in REPLIES]


@pytest.fixture(scope="module")
def branches(policy, prompts, replies):
    with torch.no_grad():
        return policy.replay(prompts, replies).refine_contexts


# --- soft ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_soft_tokens_by_cache_equal_full_forwards_for_rows_of_different_lengths(
    policy, prompts, replies, branches
):
    tokens = sqr.soft_tokens(policy, branches, 8)
    for prompt, reply, row in zip(prompts, replies, tokens, strict=True):
        torch.testing.assert_close(
            row, speed.by_full_forwards(policy, prompt, reply, 8), atol=1e-5, rtol=1e-5
        )
    assert (tokens[:, 1:] - tokens[:, :-1]).abs().amax(dim=2).min() > 0.05, (
        "tokens that hardly differ test little"
    )


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch_and_in_another_order(policy, branches):
    together = sqr.soft_tokens(policy, branches, 8)
    for row, branch in enumerate(branches):
        torch.testing.assert_close(
            sqr.soft_tokens(policy, [branch], 8)[0], together[row], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(
        sqr.soft_tokens(policy, branches[::-1], 8).flip(0), together, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_any_number_of_soft_tokens_is_a_beginning_of_sixteen(policy, branches):
    sixteen = sqr.soft_tokens(policy, branches, 16)
    for n in range(17):
        some = sqr.soft_tokens(policy, branches, n)
        assert some.shape == (3, n, policy.heads.width) and some.dtype == torch.float32
        torch.testing.assert_close(some, sixteen[:, :n], atol=1e-6, rtol=1e-6)


def test_rollout_and_replay_give_the_same_soft_tokens(policy, prompts):
    """Sampled replies that say the token once, twice or never, and end at different steps."""
    quick = coming_to_an_end(policy, prompts)
    rolled = sampled(quick, prompts, 4, temperature=COLD)
    again = quick.replay(prompts, [reply.ids for reply in rolled], group=4)
    replayed = again.refine_contexts
    without = [branch is None for branch in replayed]
    assert without == [reply.refine_context is None for reply in rolled] and set(without) == {True, False}
    assert len({len(reply.ids) for reply in rolled}) > 2
    pairs = [(reply.refine_context, branch) for reply, branch in zip(rolled, replayed, strict=True) if branch]
    with torch.no_grad():
        first, second = (sqr.soft_tokens(quick, list(side), 4) for side in zip(*pairs, strict=True))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_reply_cut_right_at_the_token_can_still_refine(policy, prompts, replies):
    """The limit may fall on <REFINE> itself, which decoding then never reads."""
    ids = sampled(policy, prompts[:1], limit=3)[0].ids
    quick = changed(policy, refine_token_id=ids[-1])
    cut = sampled(quick, prompts[:1], limit=3)[0]
    assert not cut.ended and cut.ids[-1] == quick.refine_token_id
    tokens = sqr.soft_tokens(quick, [cut.refine_context], 3)[0]
    torch.testing.assert_close(
        tokens, speed.by_full_forwards(quick, prompts[0], cut.ids, 3), atol=1e-5, rtol=1e-5
    )


def test_a_refinement_reads_one_token_per_latent_and_no_prompt(policy, branches, monkeypatch):
    read, run = [], policy.model.model.language_model.forward

    def counted(**inputs):
        read.append(inputs["inputs_embeds"].shape[1])
        return run(**inputs)

    monkeypatch.setattr(policy.model.model.language_model, "forward", counted)
    sqr.soft_tokens(policy, branches, 8)
    assert read == [1] * 8


@torch.no_grad()
def test_the_first_soft_token_reads_the_state_before_the_norm(policy, branches):
    first = sqr.soft_tokens(policy, branches, 1)[:, 0]
    embeds = policy.model.get_input_embeddings().weight[policy.refine_token_id].expand(3, 1, -1)
    states = decoding.extend(policy.model, decoding.stack_contexts(branches), embeds)[1][:, 0]
    torch.testing.assert_close(first, policy.heads.project(states), atol=1e-6, rtol=1e-6)
    normed = policy.heads.project(policy.model.model.language_model.norm(states))
    assert (first - normed).abs().max() > 0.01


def loss_of(policy, search, prompts, replies, target):
    """A ranking loss as training will have it: cosine of the refined queries with given vectors."""
    branches = policy.replay(prompts, replies).refine_contexts
    latents = sqr.soft_tokens(policy, branches, 4)
    return (sqr.soft_query(search, policy.heads, QUERIES, latents) * target).sum()


@pytest.mark.parametrize(
    "name",
    [
        "heads.refine_projector.0.weight",
        "heads.refine_projector.3.bias",
        "heads.refine_latent_input_projector.1.weight",
        "heads.refine_append_input_projector.1.weight",
        "model.model.language_model.layers.0.self_attn.q_proj.weight",
        "model.model.language_model.layers.2.mlp.down_proj.weight",
        "model.model.visual.blocks.0.mlp.linear_fc1.weight",
    ],
)
def test_gradients_reach_heads_language_model_and_eyes(policy, search, prompts, replies, name):
    """Autograd against central differences of fourth order, along the gradient itself."""
    weight = (policy.heads if name.startswith("heads") else policy.model).get_parameter(
        name.partition(".")[2]
    )
    target = torch.nn.functional.normalize(
        torch.randn(3, search.width, generator=torch.manual_seed(0)), dim=-1
    )
    policy.model.zero_grad(), policy.heads.zero_grad()
    loss_of(policy, search, prompts, replies, target).backward()
    slope, direction = weight.grad.norm(), weight.grad / weight.grad.norm()
    assert slope > 1e-6
    step, start, change = 0.003 / float(slope), weight.detach().clone(), 0.0
    with torch.no_grad():
        for steps, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
            weight.copy_(start + steps * step * direction)
            change += factor * loss_of(policy, search, prompts, replies, target)
        weight.copy_(start)
    torch.testing.assert_close(change / (12 * step), slope, rtol=0.01, atol=0)


def test_no_soft_tokens_are_exactly_the_plain_query(policy, search, branches):
    none = sqr.soft_tokens(policy, branches, 0)
    np.testing.assert_allclose(
        sqr.soft_query(search, policy.heads, QUERIES, none).detach(), search.embed_texts(QUERIES), atol=1e-6
    )


@torch.no_grad()
def test_soft_tokens_stand_right_after_the_query_s_last_word(policy, search):
    """Latents that B turns into the embeddings of words equal those words written at the end of the text."""
    ids = search.tokenizer(" in the kitchen")["input_ids"]
    embeds = search.model.get_input_embeddings().weight[torch.tensor(ids)].expand(3, -1, -1)
    copycat = soft_heads.SoftHeads(4, search.width)
    copycat.refine_append_input_projector = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Linear(192, 192)
    )
    copycat.refine_append_input_projector[1].weight.copy_(torch.eye(192))
    copycat.refine_append_input_projector[1].bias.zero_()
    written = search.embed_texts([query + " in the kitchen" for query in QUERIES])
    np.testing.assert_allclose(sqr.soft_query(search, copycat, QUERIES, embeds), written, atol=1e-5)


@torch.no_grad()
def test_the_sweep_over_depths_equals_one_query_each_and_keeps_what_is_carried(policy, search, branches):
    earlier, latest = sqr.soft_tokens(policy, branches, 2), sqr.soft_tokens(policy, branches[::-1], 3)
    sweep = sqr.prefix_queries(search, policy.heads, QUERIES, latest)
    np.testing.assert_allclose(sweep[:, 0], search.embed_texts(QUERIES), atol=1e-6)
    for depth in range(4):
        vecs = sqr.soft_query(search, policy.heads, QUERIES, sqr.soft_tokens(policy, branches[::-1], depth))
        torch.testing.assert_close(sweep[:, depth], vecs, atol=1e-5, rtol=0)
    carried = sqr.prefix_queries(search, policy.heads, QUERIES, latest, carried=earlier)
    both = sqr.soft_query(search, policy.heads, QUERIES, sqr.stack_blocks([latest, earlier, latest], 2))
    torch.testing.assert_close(carried[:, -1], both, atol=1e-5, rtol=0)
    assert torch.equal(sqr.stack_blocks([earlier, latest], 1), latest)
    assert torch.equal(sqr.stack_blocks([earlier, latest], 5), torch.cat([earlier, latest], dim=1))


@torch.no_grad()
def test_zero_heads_insert_the_same_soft_tokens_whatever_was_seen(search):
    """The official start: eight zero latents. Not a no-op: B turns them into eight zero embeddings in the query."""
    fresh = random_policy(init="zero")
    prompts = [fresh.prompt(prompt_text.SYSTEM, QUERIES[0], clip(4, n)) for n in (0, 1)]
    branches = fresh.replay(prompts, [[fresh.refine_token_id]] * 2).refine_contexts
    latents = sqr.soft_tokens(fresh, branches, 8)
    assert not latents.any()
    query = sqr.soft_query(search, fresh.heads, QUERIES[:2], latents)
    np.testing.assert_allclose(
        query, search.embed_texts(QUERIES[:2], torch.zeros(2, 8, search.width)), atol=1e-6
    )


# --- hard ------------------------------------------------------------------------------------------------------------


def test_the_three_rewriters_see_what_they_should(policy):
    film = clip(4)
    texts = []
    for variant in ("blind", "seen", "reasoned"):
        system, sees_video = hqr.rewrite_prompt(variant)
        texts.append(
            policy.tokenizer.decode(policy.prompt(system, "a dog", film if sees_video else None).ids)
        )
    blind, seen, reasoned = texts
    assert prompt_text.REWRITE in blind and "<|video_pad|>" not in blind
    assert prompt_text.REWRITE in seen and "<|video_pad|>" in seen
    assert prompt_text.SYSTEM_HQR in reasoned and "<|video_pad|>" in reasoned
    assert all('Query: "a dog"' in text for text in texts)


def test_a_long_update_fits_where_a_query_would_be_cut(search):
    text = "a red dog by the lake " * 30
    long = hqr.with_query_limit(search)
    long.embed_texts([text])
    assert (long.num_truncated, search.num_truncated) == (0, 0)
    search.embed_texts([text])
    assert (long.num_truncated, search.num_truncated) == (0, 1)
