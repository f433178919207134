"""The policy's decoding, each result against a second way of computing it."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from tiny import COLD, QUERIES, changed, clip, coming_to_an_end, random_policy, sampled
from transformers import Qwen3VLModel
from transformers.generation.logits_process import TopPLogitsWarper

from vsr1 import config
from vsr1.data import decoder, video_reader
from vsr1.evaluation import evaluate
from vsr1.loop import sqr
from vsr1.mini import architecture
from vsr1.models import decoding, engine, inputs, prompt_text, soft_heads
from vsr1.models import policy as policies
from vsr1.training import common, grpo, sft


def profile(**changes):
    return dataclasses.replace(config.load("smoke"), **changes)


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prompt(prompt_text.SYSTEM, query, clip(4 + 2 * n, n)) for n, query in enumerate(QUERIES)]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_prompts_say_what_the_method_says(policy):
    text = policy.tokenizer.decode(policy.prompt("S", 'a "dog"', clip(4)).ids)
    pads = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    assert text == (
        '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQuery: "a "dog""\nRetrieved video: '
        f"<1.2 seconds>{pads}<5.2 seconds>{pads}<|im_end|>\n<|im_start|>assistant\n"
    )
    blind = policy.tokenizer.decode(policy.prompt("S", "a dog").ids)
    assert blind.endswith('<|im_start|>user\nQuery: "a dog"<|im_end|>\n<|im_start|>assistant\n')
    assert prompt_text.SYSTEM == (
        "You judge one retrieved video against a query. Inside <think> </think>, compare step by step what the "
        "query asks with what the video shows; be short and say only what is visible. If a scene fits, answer "
        "<answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end> <REFINE>. If no scene fits, answer "
        "<answer>not_matched</answer> <REFINE>; the token starts a refined search. Always end with <REFINE>. "
        "Write nothing outside the tags."
    )
    without = prompt_text.SYSTEM.replace("; the token starts a refined search. Always end with <REFINE>", "")
    assert prompt_text.SYSTEM_ZS == without.replace(" <REFINE>", "")


def test_released_policies_are_shown_frame_numbers_as_times(policy):
    released = changed(policy, settings=soft_heads.Settings(time_axis="frame_index"))
    text = released.tokenizer.decode(released.prompt("S", "a", clip(4)).ids)
    assert "<0.5 seconds>" in text and "<2.5 seconds>" in text and "<1.2 seconds>" not in text


def test_above_64_seconds_the_times_shown_are_when_the_frames_were_seen():
    """By the scene: frames of a 256 s film stand four seconds apart, whatever their numbers are."""
    times = decoder.sample_times(256.0)
    film = video_reader.Clip(np.zeros((64, 32, 32, 3), np.uint8), times, 256.0, None)
    fresh = random_policy()
    text = fresh.tokenizer.decode(fresh.prompt("S", "a", film).ids)
    shown = [float(time) for time in re.findall("<([0-9.]+) seconds>", text)]
    assert shown == [8.0 * pair + 2 for pair in range(32)] != [2 * pair + 0.5 for pair in range(32)]


@pytest.mark.parametrize(("name", "most"), [("paper", 196), ("paper-24gb", 32)])
def test_the_policy_sees_frames_of_one_size_in_every_stage(name, most):
    """Counted in the prompt, over shapes of frames; the official code shows 64 tokens in GRPO alone."""
    limited = changed(random_policy(), max_frame_pixels=config.load(name).max_frame_pixels)
    pad, counts = limited.tokenizer.convert_tokens_to_ids("<|video_pad|>"), []
    for height, width in ((448, 448), (256, 512), (720, 1280), (240, 320), (1080, 608)):
        film = video_reader.Clip(np.zeros((2, height, width, 3), np.uint8), np.arange(2.0), 2.0, None)
        counts.append(limited.prompt("S", "a", film).ids.count(pad))
    assert max(counts) == most
    sized = [field.name for field in dataclasses.fields(config.Profile) if "frame_pixels" in field.name]
    assert sized == ["max_frame_pixels"] and {*sized} <= {*sft.KNOBS} & {*grpo.KNOBS} & {*evaluate.KNOBS}


# --- decoding --------------------------------------------------------------------------------------------------------


def test_greedy_replies_equal_the_library_s_own_generation(policy, prompts):
    replies = policy.reply(prompts, max_new_tokens=12)
    for prompt, reply in zip(prompts, replies, strict=True):
        batch = inputs.collate([prompt], policy.model, policy.tokenizer.pad_token_id)
        batch.pop("position_ids")  # generate makes its own
        banned = policy.banned_tokens.nonzero()[:, 0].tolist()
        ids = policy.model.generate(**batch, do_sample=False, max_new_tokens=12, suppress_tokens=banned)
        assert reply.ids == ids[0, len(prompt.ids) :].tolist()


def all_log_probs(policy, prompt, ids):
    """Log-probabilities (L, vocabulary) of a reply from one forward over everything, without a cache."""
    whole = dataclasses.replace(prompt, ids=prompt.ids + ids)
    logits = policy.model(**inputs.collate([whole], policy.model, policy.tokenizer.pad_token_id)).logits[0]
    return logits[len(prompt.ids) - 1 : -1].masked_fill(policy.banned_tokens, -torch.inf).log_softmax(-1)


def full_forward(policy, prompt, ids):
    return all_log_probs(policy, prompt, ids)[torch.arange(len(ids)), ids]


@torch.no_grad()
def test_the_margin_of_a_verdict_is_that_of_a_full_forward_at_the_first_one_behind_the_reasoning(
    policy, prompts
):
    """Sampled from a few tokens alone, so that verdicts are met, with guesses in between."""
    answer, *_, end = policy.tokenizer("<answer> </think>")["input_ids"]
    few = [answer, *policy.verdict_tokens, end]
    banned = torch.ones_like(policy.banned_tokens).index_fill(0, torch.tensor(few), False)
    spoken, verdicts = changed(policy, banned_tokens=banned), 0
    for prompt, reply in zip(
        [p for p in prompts for _ in range(6)], sampled(spoken, prompts, 6), strict=True
    ):
        answer_text = reply.text.rpartition("</think>")[2]
        positions = [position for position in range(1, len(reply.ids)) if reply.ids[position - 1] == answer]
        positions = [position for position in positions if reply.ids[position] in spoken.verdict_tokens]
        positions = [position for position in positions if end not in reply.ids[position:]]
        assert (
            (reply.verdict is None)
            == (not positions)
            == ("<answer>matched" not in answer_text and "<answer>not" not in answer_text)
        )
        if positions:
            logp = all_log_probs(spoken, prompt, reply.ids)[positions[0], list(spoken.verdict_tokens)]
            assert reply.verdict.position == positions[0]
            assert reply.verdict.margin == pytest.approx(float(logp[0] - logp[1]), abs=1e-5)
            verdicts += 1
    assert 3 < verdicts < 18


def test_the_span_after_a_forced_match_is_what_the_model_goes_on_with(policy, prompts):
    replies = [f"<think> {word} </think> <answer>not_matched</answer>" for word in ("no", "not at all")]
    ids = [policy.tokenizer(text)["input_ids"] for text in replies]
    completions = [
        policies.Completion(
            reply_ids, [], True, "", None, policy._verdict(reply_ids, [[0, 0]] * len(reply_ids))
        )
        for reply_ids in ids
    ]
    for prompt, text, forced in zip(
        prompts, replies, policy.reply_if_matched(prompts[:2], completions, 6), strict=False
    ):
        prefix = text.replace("not_matched</answer>", "matched")
        longer = dataclasses.replace(prompt, ids=prompt.ids + policy.tokenizer(prefix)["input_ids"])
        assert forced == prefix + policy.reply([longer], max_new_tokens=6)[0].text


@torch.no_grad()
def test_recorded_log_probabilities_are_those_of_a_full_forward(policy, prompts):
    replies = sampled(policy, prompts, 2)
    for prompt, reply in zip([p for p in prompts for _ in "ab"], replies, strict=True):
        torch.testing.assert_close(
            torch.tensor(reply.logps), full_forward(policy, prompt, reply.ids), atol=1e-5, rtol=0
        )


def shrinks(lengths):
    """How often a batch of replies of these lengths, sorted, goes on with less than half of its rows."""
    middle = lengths[len(lengths) // 2]
    longer = [length for length in lengths if length > middle]
    return 1 + shrinks(longer) if longer else 0


def test_rows_that_end_early_leave_the_others_as_they_are(policy, prompts):
    """Each alone against all in a batch that shrinks twice on the way."""
    quick = coming_to_an_end(policy, prompts)
    together = sampled(quick, prompts, 4, temperature=COLD)
    lengths = sorted(len(reply.ids) for reply in together)
    assert shrinks(lengths) >= 2, lengths
    draws = torch.from_numpy(np.random.default_rng(0).random((12, 24)))
    for row, reply in enumerate(together):
        context, last_hidden = quick.prefill([prompts[row // 4]])
        params = quick.sampling_params(24, COLD)
        [alone] = decoding.decode(
            quick.model, context, last_hidden, params, draws[row : row + 1], decoding.Drafter()
        )
        assert alone.ids == reply.ids
        np.testing.assert_allclose(alone.logps, reply.logps, atol=1e-5 / COLD)
        assert (
            reply.ended == (reply.ids[-1] == quick.stop_token_id)
            and quick.stop_token_id not in reply.ids[:-1]
        )
        assert reply.ended or len(reply.ids) == 24


def test_a_replayed_reply_has_the_log_probabilities_of_the_rollout_also_in_train_mode(policy, prompts):
    quick = coming_to_an_end(policy, prompts)
    for temperature in (1.0, COLD):
        replies = sampled(quick, prompts, 4, temperature=temperature)
        policy.model.train()
        again = quick.replay(prompts, [reply.ids for reply in replies], group=4, temperature=temperature)
        policy.model.eval()
        for row, reply in enumerate(replies):
            replayed = again.logps[row][again.completion_mask[row]].tolist()
            np.testing.assert_allclose(replayed, reply.logps, atol=1e-5 / temperature)
            assert (again.logps[row][~again.completion_mask[row]] == 0).all()
    policy.model.zero_grad()
    again.logps.sum().backward()
    assert all(
        weight.grad.isfinite().all() for weight in policy.model.parameters() if weight.grad is not None
    )


def test_sharing_a_prompt_gives_the_gradient_of_separate_prompts(policy, prompts):
    ids = [reply.ids for reply in sampled(policy, prompts[:2], 3)]
    grads = []
    for rows, group in ((prompts[:2], 3), ([p for p in prompts[:2] for _ in range(3)], 1)):
        policy.model.zero_grad()
        policy.replay(rows, ids, group=group).logps.sum().backward()
        grads.append([w.grad.clone() for w in policy.model.parameters() if w.grad is not None])
    for shared, separate in zip(*grads, strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-4 * float(separate.abs().max() + 1), rtol=0)


def test_replies_follow_the_model_s_distribution():
    """20,000 draws of one token against its probabilities; a banned token is never drawn."""
    logp = torch.tensor([0.5, 0.2, 0.0, 0.3]).log()
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    frequencies = decoding.sample_token(logp.expand(20_000, -1), draws).bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, logp.exp(), atol=0.015, rtol=0)
    edges = decoding.sample_token(logp.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edges.tolist() == [0, 3] and frequencies[2] == 0


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_tokens_that_the_library_keeps_and_shares_their_mass(policy, prompts, top_p):
    _, last_hidden = policy.prefill(prompts)
    logits = policy.model.lm_head(last_hidden).masked_fill(policy.banned_tokens, -torch.inf)
    expected = TopPLogitsWarper(top_p)(None, logits / 0.4).log_softmax(-1)
    logp = decoding.log_probs(policy.model.lm_head(last_hidden), policy.sampling_params(1, 0.4, top_p))
    assert 0 < (logp > -torch.inf).sum() < (~policy.banned_tokens).sum() * len(prompts)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)


def test_a_reply_with_its_own_rng_does_not_depend_on_those_beside_it(policy, prompts):
    rng_of = lambda seed: np.random.default_rng([7, seed])  # noqa: E731
    sample = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    together = policy.reply(prompts, rng=[rng_of(seed) for seed in range(len(prompts))], **sample)
    for seed, (prompt, reply) in enumerate(zip(prompts, together, strict=True)):
        assert policy.reply([prompt], rng=[rng_of(seed)], **sample)[0].ids == reply.ids


def test_vision_ids_and_rows_without_a_token_are_never_said(policy):
    loud = torch.where(policy.banned_tokens, 50.0, 0.0)
    assert (
        decoding.log_probs(loud, policy.sampling_params(1, 1.0))[policy.banned_tokens] == -torch.inf
    ).all()
    names = policy.tokenizer.convert_ids_to_tokens(policy.banned_tokens.nonzero()[:, 0].tolist())
    assert names[:4] == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    assert int(policy.banned_tokens.sum()) == 4 + 7, "eight spare rows, one of them taken by <REFINE>"


def test_a_video_is_read_once_for_all_replies_to_it(policy, prompts, monkeypatch):
    shapes, see = [], policy.model.model.visual.forward
    counted = lambda pixels, **grid: shapes.append(len(pixels)) or see(pixels, **grid)  # noqa: E731
    monkeypatch.setattr(policy.model.model.visual, "forward", counted)
    sampled(policy, prompts, 4, limit=3)
    assert shapes == [sum(math.prod(prompt.video.grid) for prompt in prompts)]


def test_what_is_kept_of_a_video_is_what_the_eyes_see_again(policy, prompts, monkeypatch):
    """Eyes that learn look each time; others once at a clip, however many prompts, replies and readings it has."""
    encoded, see = [], decoding._encode_videos
    monkeypatch.setattr(
        decoding, "_encode_videos", lambda model, videos: encoded.append(len(videos)) or see(model, videos)
    )
    film, other = clip(6, 1), clip(6, 2)
    prompts_of = lambda reader, *clips: [reader.prompt(prompt_text.SYSTEM, "Who?", shown) for shown in clips]  # noqa: E731
    replies = [[5, 6, policy.stop_token_id], [6, 5, policy.stop_token_id]]
    learning = [policy.replay(prompts_of(policy, film, other), replies).logps for _ in range(2)]
    assert encoded == [2, 2]
    fixed = copy.deepcopy(policy.model).requires_grad_(False)
    still = policies.Policy(fixed, policy.tokenizer, policy.heads, policy.settings, policy.max_frame_pixels)
    for _ in range(2):
        again = still.replay(
            [*prompts_of(still, film, film), *prompts_of(still, other)], [replies[0], *replies]
        ).logps
        torch.testing.assert_close(again[1:], learning[0], atol=1e-5, rtol=0)
    assert encoded == [2, 2, 2]
    assert not torch.allclose(
        again[0, 0], still.replay(prompts_of(still, clip(6, 3)), replies[:1]).logps[0, 0]
    )
    assert encoded == [2, 2, 2, 1]


def test_words_that_all_begin_with_are_read_once_with_the_same_states_and_gradients(policy, prompts):
    """By prompts of different lengths, two with a video; read row by row they give the same."""
    mixed = [*prompts[:2], policy.prompt(prompt_text.SYSTEM, "Who?")]
    states, grads = [], []
    for share_prefix in (True, False):
        context, last_hidden = policy.prefill(mixed, share_prefix=share_prefix)
        context, _, post = decoding.extend(
            policy.model, context.rows(torch.tensor([2, 0, 1, 1])), last_hidden[[2, 0, 1, 1], None]
        )
        parts = [
            decoding.stack_contexts([context.slice(row, context.attention_mask.shape[1])]) for row in range(4)
        ]
        states.append(
            [
                last_hidden,
                post,
                torch.cat([decoding.extend(policy.model, part, last_hidden[:1, None])[1] for part in parts]),
            ]
        )
        weights = policy.model.model.parameters()
        grads.append(
            torch.autograd.grad(sum(state.square().sum() for state in states[-1]), weights, allow_unused=True)
        )
    for shared, separate in zip(*states, strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-4, rtol=1e-4)
    for shared, separate in zip(*grads, strict=True):
        assert (shared is None) == (separate is None)
        if shared is not None:
            torch.testing.assert_close(shared, separate, atol=1e-4 * float(separate.abs().max() + 1), rtol=0)


def test_merged_adapters_speak_alike_and_leave_the_weights_as_they_were():
    adapted = random_policy()
    prompts = [
        adapted.prompt(prompt_text.SYSTEM, query, clip(4, n)) for n, query in enumerate(QUERIES)
    ]  # its eyes are fixed
    common.add_lora(adapted, 4, seed=0)
    with torch.no_grad():
        for name, weight in adapted.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    before = {name: weight.clone() for name, weight in adapted.model.named_parameters()}
    with adapted.adapters_disabled():
        without = sampled(adapted, prompts, 2)
    apart = sampled(adapted, prompts, 2)
    with adapted.adapters_merged():
        merged = sampled(adapted, prompts, 2)
        read = adapted.replay(prompts, [reply.ids for reply in merged], group=2, temperature=1.0).logps
    for reply, merged_reply, logps in zip(apart, merged, read.detach(), strict=True):
        assert reply.ids == merged_reply.ids
        np.testing.assert_allclose(reply.logps, merged_reply.logps, atol=1e-4)
        np.testing.assert_allclose(logps[: len(reply.ids)], reply.logps, atol=1e-4)
    assert [reply.ids for reply in without] != [reply.ids for reply in apart]
    assert all((weight == before[name]).all() for name, weight in adapted.model.named_parameters())
    for again, reply in zip(sampled(adapted, prompts, 2), apart, strict=True):  # guesses change the last bits
        np.testing.assert_allclose(again.logps, reply.logps, atol=1e-5)


def test_fresh_heads_take_the_mean_of_the_used_rows_and_need_a_spare_one():
    fresh = random_policy(spare=2)
    weight = fresh.model.get_input_embeddings().weight
    torch.testing.assert_close(weight[fresh.refine_token_id], weight[: fresh.refine_token_id].mean(dim=0))
    assert fresh.refine_token_id == len(fresh.tokenizer) - 1
    before = weight.clone()
    again = policies.new_heads(fresh, fresh.settings, seed=9)
    assert again.refine_token_id == fresh.refine_token_id and torch.equal(weight, before), (
        "a row that is in use is left alone"
    )
    with pytest.raises(config.InputError, match="leave none for <REFINE>"):
        random_policy(spare=0)


def test_fresh_heads_follow_the_method_and_the_seed():
    heads = soft_heads.SoftHeads(6, 4)
    assert not heads.refine_projector[3].weight.any() and heads.width == 4
    assert torch.equal(heads.refine_latent_input_projector[1].weight, torch.eye(6, 4))
    assert not heads.refine_gate.weight.any() and not heads.refine_gate.weight.requires_grad
    a, b, c = (
        random_policy(init="default", seed=seed).heads.refine_projector[3].weight for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_engine_of_another_width_or_instruction_is_refused(policy):
    torch.manual_seed(0)
    model_config = architecture.make_config(policy.tokenizer)
    core = Qwen3VLModel(model_config)
    sqr.check_fit(policy, engine.Engine(profile(), core, policy.tokenizer, "mine"))
    other = engine.Engine(profile(instruction="Find it!"), core, policy.tokenizer, "other")
    with pytest.raises(
        config.InputError, match=r"instruction .* but other has 'Find it!'; let the profile name"
    ):
        sqr.check_fit(policy, other)
    other.instruction, other.width = policy.settings.instruction, 64
    with pytest.raises(config.InputError, match="an engine of width 192, but other has 64; let"):
        sqr.check_fit(policy, other)
