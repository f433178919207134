"""What notebook 06 says about refinements: by hand, and latent by latent against each prefix embedded alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_episode_metrics import episode, turn
from tiny import clip, random_policy
from transformers import Qwen3VLModel

from vsr1 import config
from vsr1.evaluation import soft_token_sweep
from vsr1.experiments import refinement
from vsr1.loop import replies, sqr
from vsr1.mini import architecture
from vsr1.models import engine, prompt_text, search_index

PROFILE = config.load("smoke")


def values(numbers):
    return {name.split("/", 2)[2]: number.value for name, number in numbers.items()}


def test_a_query_is_the_smallest_id_of_the_strictest_rule_that_finds_one():
    far = [
        episode(key, "b", [turn(1, "x", "b", rank, False)])
        for key, rank in ((7, 40), (6, 41), (4, 5), (2, 3))
    ]
    picked, rule = refinement.pick_query(far)
    assert picked.desc_id == 4 and "5 to 40" in rule
    assert refinement.pick_query(far[1:2] + far[3:])[0].desc_id == 2  # failed, but not on those ranks
    refused = episode(3, "b", [turn(1, "b", "b", 1, False)])
    accepted = episode(1, "a", [turn(1, "a", "a", 1, True, (2.0, 5.0))], "matched")
    assert refinement.pick_query([accepted, refused]) == (refused, "first video rejected")
    assert refinement.pick_query([accepted]) == (accepted, "any query that was run")


def test_side_by_side_counts_gains_costs_and_what_is_missing():
    moved = episode(
        1, "a", [turn(1, "x", "a", 9, False, out=(1, "a")), turn(2, "a", "a", 1, True, (2.0, 8.0))]
    )
    stays = episode(2, "b", [turn(1, "b", "b", 1, True, (2.0, 8.0))], "matched")
    measured = values(
        refinement.side_by_side(PROFILE, "charades", {"sqr-untrained": [moved, stays], "hqr-seen": [stays]})
    )
    soft = {name.partition("/")[2]: value for name, value in measured.items() if name.startswith("sqr")}
    assert (soft["vr@1_orig"], soft["vr@1"], soft["vr@1_failed"], soft["refined"]) == (
        50.0,
        100.0,
        100.0,
        50.0,
    )
    assert (soft["tokens"], soft["seconds"], soft["engine_calls"], soft["turns"]) == (8, 0.5, 1.5, 1.5)
    assert (
        measured["hqr-seen/vr@1_failed"] is None and measured["hqr-seen/tokens"] is None
    )  # nothing failed, nothing refined


def test_gains_are_counted_over_all_over_the_refined_and_over_the_failed():
    moved = episode(1, "a", [turn(1, "x", "a", 9, False, out=(1, "a"))])
    lost = episode(2, "b", [turn(1, "b", "b", 1, False, out=(2, "x"))])
    stays = episode(3, "c", [turn(1, "c", "c", 1, True, (2.0, 8.0))], "matched")
    stuck = episode(4, "d", [turn(1, "x", "d", 5, True, (2.0, 8.0))], "matched")
    numbers = refinement.costs_and_gains(
        PROFILE, "charades", {"sqr": [moved, lost, stays, stuck], "hqr-seen": [stays]}
    )
    measured = values(numbers)
    assert [measured[f"sqr/gain{group}"] for group in ("", "_refined", "_failed")] == [0.0, 0.0, 50.0]
    assert (measured["sqr/tokens"], measured["sqr/tokens_tagged"], measured["sqr/seconds"]) == (8, 9, 0.5)
    assert measured["hqr-seen/gain"] == 0.0 and measured["hqr-seen/tokens"] is None
    assert (
        measured["hqr-seen/gain_failed"] is None and measured["hqr-seen/gain_refined"] is None
    )  # nobody to gain
    assert numbers["T3/charades/sqr/gain"].unit == "points"


def test_rewrites_say_what_became_of_the_query_or_why_nothing_did():
    def run(**more):
        return [episode(1, "a", [turn(1, "x", "a", 9, **more)])]

    words = {"refine_kind": "hqr-seen", "refine_tokens": 3, "update_text": "a red dog", "rank_out": 4}
    table = refinement.rewrites(
        {
            "walkdown": run(verdict=False, refine_kind="walkdown", refine_tokens=0, rank_out=9),
            "sqr-untrained": run(verdict=False, out=(7, "y")),
            "hqr-seen": run(verdict=False, **words),
            "hqr-blind": run(verdict=False, refine_kind="hqr-blind"),
            "hqr-reasoned": run(verdict=True),
        },
        1,
    )
    assert table["the query becomes"].tolist() == [
        "the same",
        "the same and 8 soft tokens",
        "a red dog",
        "nothing: no readable update",
        "nothing: the video was accepted",
    ]
    assert table["rank after"].tolist() == [9, 7, 4, "—", "—"]


# --- one query, latent by latent


@pytest.fixture(scope="module")
def agent():
    return random_policy(init="default")


@pytest.fixture(scope="module")
def encoder(agent):
    torch.manual_seed(1)
    config = architecture.make_config(agent.tokenizer)
    model = Qwen3VLModel(config).eval()
    for name, weight in model.named_parameters():  # else all queries look alike to random weights
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 3
    return engine.Engine(PROFILE, model, agent.tokenizer, "random")


def test_each_depth_of_a_sweep_is_a_query_with_that_many_latents(agent, encoder):
    """By depth in one go, or each prefix of the latents embedded alone and ranked by a sort."""
    ids = [
        *agent.tokenizer("<think> a dog </think> <answer>not_matched</answer>")["input_ids"],
        agent.refine_token_id,
        agent.stop_token_id,
    ]
    reply = replies.read_reply("<think> a dog </think> <answer>not_matched</answer> <REFINE>", ids)
    first = replace(turn(1, "x", "b", 3, False), reply=reply)
    example = replace(episode(4, "b", [first]), query="Someone jumps by the lake.")
    rng = np.random.default_rng(0)
    films = rng.normal(size=(6, encoder.width)).astype(np.float32)
    vectors = search_index.Vectors(
        list("axbcde"), films / np.linalg.norm(films, axis=1, keepdims=True), [4], None
    )
    swept = soft_token_sweep.sweep(encoder, agent, vectors, example, clip(4), prompt_text.SYSTEM_ZS)
    with torch.no_grad():
        prompt = agent.prompt(prompt_text.SYSTEM_ZS, example.query, clip(4))
        latents = sqr.soft_tokens(agent, agent.replay([prompt], [ids]).refine_contexts, agent.settings.n_soft)
    for depth in range(agent.settings.n_soft + 1):
        vec = encoder.embed_texts([example.query], agent.heads.to_engine(latents[:, :depth]).detach())[0]
        assert np.allclose(swept.vecs[depth], vec, atol=1e-5)
        order = np.argsort(-(vectors.video_vecs @ vec), kind="stable")
        assert swept.ranks[depth] == list(order).index(2) + 1
        assert swept.cosines["shown"][depth] == pytest.approx(float(vec @ vectors.video_vecs[1]), abs=1e-5)
        assert swept.cosines["best"][depth] == pytest.approx(
            float((vectors.video_vecs @ vec).max()), abs=1e-5
        )
    assert swept.cosines["typed"][0] == pytest.approx(1) and swept.cosines["typed"][3] < 1 - 1e-6


def test_marked_replies_branch_where_a_reply_that_says_the_token_would(agent):
    prompts = [
        agent.prompt(prompt_text.SYSTEM_ZS, text, clip(4)) for text in ("Who sits?", "A person waves.")
    ]
    words = [
        agent.tokenizer(text)["input_ids"] for text in ("<think> no </think>", "<answer>not_matched</answer>")
    ]
    bare = [[*words[0], agent.stop_token_id], words[1]]  # one ended by itself, one was cut
    said = [[*ids, agent.refine_token_id, agent.stop_token_id] for ids in words]
    with torch.no_grad():
        want = sqr.soft_tokens(agent, agent.replay(prompts, said).refine_contexts, 2)
    marked = agent.append_refine(prompts, bare)
    assert [ids for ids, _ in marked] == said
    assert torch.allclose(sqr.soft_tokens(agent, [branch for _, branch in marked], 2), want, atol=1e-5)
