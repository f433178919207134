"""What notebooks 02 and 06 say about episodes: by hand, by plain loops, and against the numbers of the stage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_episode_metrics import episode, said, turn
from tiny import clip, random_policy
from transformers import Qwen3VLModel

from vsr1 import config
from vsr1.evaluation import metrics
from vsr1.experiments import refinement, verification
from vsr1.loop import replies, sqr
from vsr1.mini import architecture
from vsr1.models import engine, prompt_text, search_index

PROFILE = config.load("smoke")


@pytest.fixture
def looked():
    """Four queries: said right and placed, refused although right, unreadable, not run; then all with a wrong video."""
    right = [
        episode(5, "a", [turn(1, "a", "a", 1, True, (2.0, 5.0))], "matched"),
        episode(3, "b", [turn(1, "b", "b", 1, False)], "no_refine"),
        episode(8, "c", [turn(1, "c", "c", 1, None, (2.0, 8.0))], "no_refine"),
        episode(9, "d", [], "problem", problem="d: the right video has no vector"),
    ]
    wrong = [
        episode(5, "a", [turn(1, "x", "a", 4, False)], "no_refine"),
        episode(3, "b", [turn(1, "x", "b", 2, True, (0.0, 1.0))], "matched"),
        episode(8, "c", [turn(1, "x", "c", 2, False)], "no_refine"),
        episode(9, "d", [], "problem", problem="d: the right video has no vector"),
    ]
    return verification.Known(right, wrong, [10.0, 10.0, 12.0, 10.0])


def values(numbers):
    return {name.split("/", 2)[2]: number.value for name, number in numbers.items()}


def test_v1_counts_every_oracle_video(looked):
    numbers = verification.known_numbers(PROFILE, "charades", looked)
    found = values(numbers)
    assert [found[f"zs/verdict_{half}"] for half in ("right", "wrong")] == [25.0, 50.0]
    assert found["zs/grounding@0.7"] == 25.0 and found["zs/miou"] == pytest.approx(100 * (0.5 + 1) / 4)
    assert found["zs/verdict"] == 100 * 3 / 8 and found["zs/grounding@0.5"] == 50.0
    assert found["zs/readable"] == 62.5 and found["zs/spanned"] == 37.5
    assert numbers["V1/charades/zs/verdict"].n == 8 and numbers["V1/charades/zs/verdict_right"].n == 4
    assert found["majority/verdict"] == 50.0 and found["wholevideo/miou"] == pytest.approx(
        100 * (0.6 * 3 + 0.5) / 4
    )


def test_the_confusion_table_has_a_place_for_every_look(looked):
    table = verification.confusion(looked)
    assert table.loc["right video shown"].tolist() == [
        1,
        1,
        1,
        1,
    ]  # matched, not_matched, unreadable, not run
    assert table.loc["wrong video shown"].tolist() == [1, 2, 0, 1]


def test_a_histogram_puts_every_overlap_into_one_bin_and_thresholds_on_edges():
    ious = np.array([0.0, 1e-6, 0.3, 0.29999, 0.5, 0.7, 0.69, 1.0, 3 / 10, 7 / 10])
    bars = dict(map(tuple, verification.histogram(ious)))
    assert sum(bars.values()) == pytest.approx(100) and bars[-0.1] == 10.0
    for m in metrics.THRESHOLDS:
        above = sum(share for left, share in bars.items() if left >= m)
        assert above == pytest.approx(metrics.percent(metrics.reaches(ious, m)))


def test_the_cases_are_the_smallest_ids_and_say_which_are_missing(looked):
    chosen = verification.cases(looked)
    assert {kind: one.desc_id for kind, one in chosen.items()} == {
        "right acceptance": 5,
        "right rejection": 5,
        "wrong verdict": 3,
    }
    assert chosen["wrong verdict"] is looked.right[1]  # of two, the half that is shown first
    assert chosen["right rejection"].turns[0].shown_id == "x"
    nobody = verification.cases(verification.Known(looked.right[3:], looked.wrong[3:], [10.0]))
    assert (
        set(nobody.values()) == {None}
        and verification.case_text("wrong verdict", None) == "wrong verdict: none"
    )


def test_a_case_is_told_with_its_truth_and_the_whole_reply(looked):
    text = verification.case_text("right acceptance", looked.right[0])
    assert "moment 2.0 to 8.0 s, overlap 0.50" in text and text.endswith(looked.right[0].turns[0].reply.text)
    assert "a wrong video" in verification.case_text("right rejection", looked.wrong[0])


def test_first_looks_of_a_walk_are_compared_with_the_same_looks_given_away(looked):
    walked = [looked.right[0], looked.wrong[1], replace(looked.right[2]), looked.right[3]]
    assert refinement.agreement(walked, looked) == (3, 3)
    other = replace(walked[0].turns[0], reply=said(False))
    assert refinement.agreement([replace(walked[0], turns=(other,)), *walked[1:]], looked) == (3, 2)


def test_a_query_to_look_at_is_the_smallest_id_of_the_strictest_rule_that_finds_one(looked):
    far = [
        episode(key, "b", [turn(1, "x", "b", rank, False)])
        for key, rank in ((7, 40), (6, 41), (4, 5), (2, 3))
    ]
    assert refinement.pick(far)[0].desc_id == 4 and "5 to 40" in refinement.pick(far)[1]
    assert refinement.pick(far[1:2] + far[3:])[0].desc_id == 2  # failed, but not on those ranks
    assert (
        refinement.pick(looked.right)[1] == "first look rejected"
        and refinement.pick(looked.right)[0].desc_id == 3
    )
    assert refinement.pick(looked.right[:1])[1] == "any query that was run"


def test_side_by_side_counts_gains_costs_and_what_is_missing():
    moved = episode(
        1, "a", [turn(1, "x", "a", 9, False, out=(1, "a")), turn(2, "a", "a", 1, True, (2.0, 8.0))]
    )
    stays = episode(2, "b", [turn(1, "b", "b", 1, True, (2.0, 8.0))], "matched")
    found = values(
        refinement.side_by_side(PROFILE, "charades", {"sqr-untrained": [moved, stays], "hqr-seen": [stays]})
    )
    soft = {name.partition("/")[2]: value for name, value in found.items() if name.startswith("sqr")}
    assert (soft["vr@1_orig"], soft["vr@1"], soft["vr@1_failed"], soft["refined"]) == (
        50.0,
        100.0,
        100.0,
        50.0,
    )
    assert (soft["tokens"], soft["seconds"], soft["engine_calls"], soft["turns"]) == (8, 0.5, 1.5, 1.5)
    assert (
        found["hqr-seen/vr@1_failed"] is None and found["hqr-seen/tokens"] is None
    )  # nothing failed, nothing refined
    rows = refinement.paired(PROFILE, {"sqr-untrained": [moved, stays]})
    assert rows.loc["sqr-untrained", ["gained", "lost", "points"]].tolist() == [1, 0, "+50.0"]


def test_gains_are_counted_over_all_over_the_refined_and_over_the_failed():
    moved = episode(1, "a", [turn(1, "x", "a", 9, False, out=(1, "a"))])
    lost = episode(2, "b", [turn(1, "b", "b", 1, False, out=(2, "x"))])
    stays = episode(3, "c", [turn(1, "c", "c", 1, True, (2.0, 8.0))], "matched")
    stuck = episode(4, "d", [turn(1, "x", "d", 5, True, (2.0, 8.0))], "matched")
    numbers = refinement.against(
        PROFILE, "charades", {"sqr": [moved, lost, stays, stuck], "hqr-seen": [stays]}
    )
    found = values(numbers)
    assert [found[f"sqr/gain{group}"] for group in ("", "_refined", "_failed")] == [0.0, 0.0, 50.0]
    assert (found["sqr/tokens"], found["sqr/tokens_tagged"], found["sqr/seconds"]) == (8, 9, 0.5)
    assert found["hqr-seen/gain"] == 0.0 and found["hqr-seen/tokens"] is None
    assert found["hqr-seen/gain_failed"] is None and found["hqr-seen/gain_refined"] is None  # nobody to gain
    assert numbers["T3/charades/sqr/gain"].unit == "points"


def test_rewrites_say_what_became_of_the_query_or_why_nothing_did():
    def one(**more):
        return [episode(1, "a", [turn(1, "x", "a", 9, **more)])]

    words = {"refine_kind": "hqr-seen", "refine_tokens": 3, "update_text": "a red dog", "rank_out": 4}
    table = refinement.rewrites(
        {
            "walkdown": one(verdict=False, refine_kind="walkdown", refine_tokens=0, rank_out=9),
            "sqr-untrained": one(verdict=False, out=(7, "y")),
            "hqr-seen": one(verdict=False, **words),
            "hqr-blind": one(verdict=False, refine_kind="hqr-blind"),
            "hqr-reasoned": one(verdict=True),
        },
        1,
    )
    assert table["the query becomes"].tolist() == [
        "what it was",
        "what it was and 8 latents",
        "a red dog",
        "nothing: no readable update",
        "nothing: the video was accepted",
    ]
    assert table["rank after"].tolist() == [9, 7, 4, "—", "—"]


def test_a_table_leaves_out_nothing_and_invents_nothing(looked):
    table = refinement.table(verification.known_numbers(PROFILE, "charades", looked))
    assert table.loc["zs", "verdict"].startswith("37.5 ±") and table.loc["majority", "verdict"] == "50.0"
    assert table.loc["majority", "miou"] == ""


# --- one query, latent by latent


@pytest.fixture(scope="module")
def agent():
    return random_policy(init="default")


@pytest.fixture(scope="module")
def made(agent):
    torch.manual_seed(1)
    config = architecture.make_config(agent.tokenizer)
    model = Qwen3VLModel(config).eval()
    for name, weight in model.named_parameters():  # else all queries look alike to random weights
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 3
    return engine.Engine(PROFILE, model, agent.tokenizer, "random")


def test_each_depth_of_a_sweep_is_a_query_with_that_many_latents(agent, made):
    """By depth in one go, or each prefix of the latents embedded alone and ranked by a sort."""
    ids = [
        *agent.tokenizer("<think> a dog </think> <answer>not_matched</answer>")["input_ids"],
        agent.refine_token_id,
        agent.stop_token_id,
    ]
    reply = replies.read_reply("<think> a dog </think> <answer>not_matched</answer> <REFINE>", ids)
    first = replace(turn(1, "x", "b", 3, False), reply=reply)
    one = replace(episode(4, "b", [first]), query="Someone jumps by the lake.")
    rng = np.random.default_rng(0)
    films = rng.normal(size=(6, made.width)).astype(np.float32)
    vectors = search_index.Vectors(
        list("axbcde"), films / np.linalg.norm(films, axis=1, keepdims=True), [4], None
    )
    swept = refinement.sweep(made, agent, vectors, one, clip(4), prompt_text.SYSTEM_ZS)
    with torch.no_grad():
        prompt = agent.prompt(prompt_text.SYSTEM_ZS, one.query, clip(4))
        latents = sqr.soft_tokens(agent, agent.replay([prompt], [ids]).refine_contexts, agent.settings.n_soft)
    for depth in range(agent.settings.n_soft + 1):
        vec = made.embed_texts([one.query], agent.heads.to_engine(latents[:, :depth]).detach())[0]
        assert np.allclose(swept.vecs[depth], vec, atol=1e-5)
        order = np.argsort(-(vectors.video_vecs @ vec), kind="stable")
        assert swept.ranks[depth] == list(order).index(2) + 1
        assert swept.cosines["shown"][depth] == pytest.approx(float(vec @ vectors.video_vecs[1]), abs=1e-5)
        assert swept.cosines["best"][depth] == pytest.approx(
            float((vectors.video_vecs @ vec).max()), abs=1e-5
        )
    assert swept.cosines["typed"][0] == pytest.approx(1) and swept.cosines["typed"][3] < 1 - 1e-6
    assert swept.lengths == pytest.approx(latents[0].norm(dim=-1).numpy(), rel=1e-4)
    assert len(swept.words) == len(made.query_prompt(one.query)[0].ids)


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
