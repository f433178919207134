"""Measure the speed claims side by side: `python -m benchmarks.speed`, into results/bench/agent.{json,csv}.

Each claim is two ways to the same result, checked to be the same and timed in turn. Two sizes with random weights: the
mini policy's, and about 200 M parameters, where the sums weigh more than Python does.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from benchmarks import common
from benchmarks.common import QUERY, ForcedRefinePolicy, peak_gb
from vsr1 import config
from vsr1.data import annotations, video_reader
from vsr1.loop import sqr
from vsr1.mini import architecture
from vsr1.models import engine, inputs, policy, prompt_text, soft_heads
from vsr1.training import grpo, rollout

LATENTS = GROUP = 8
FEW = 2  # replies that the plain way learns from at once on the larger model; eight took more than 19 GB
SQR_TARGET, GROUP_TARGET = 5.0, 2.5  # lowest median ratios on the larger model
LARGE = {  # about 200 M parameters
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 20, "head_dim": 64,
        "num_attention_heads": 12, "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True
        },
    },
    "vision_config": {
        "depth": 8, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "out_hidden_size": 768
    },
}  # fmt: skip
SHAPES = {"mini": {}, "large": LARGE}


@dataclass(frozen=True)
class Measurement:
    """One claim on one model: median processor seconds of rounds in which both ways took turns, and their ratio."""

    claim: str
    model: str
    parameters_m: float
    prompt_tokens: int
    reply_tokens: int
    ours_s: float
    plain_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    target: float | None = None
    ours_gb: float | None = None  # memory of a process that did nothing else, at its highest
    plain_gb: float | None = None


def random_policy(model: str, engine=None) -> ForcedRefinePolicy:
    """Return a policy of one of SHAPES with random weights and heads, for the engine if there is one."""
    torch.manual_seed(0)
    tokenizer = architecture.make_tokenizer()
    text = SHAPES[model].get("text_config", {}) | {"vocab_size": len(tokenizer) + 8}
    shapes = SHAPES[model] | {"text_config": text}
    base = Qwen3VLForConditionalGeneration(common.make_config(shapes)).eval()
    base = policy.Policy(base, tokenizer, None, None, 4096)
    settings = soft_heads.Settings(refine_init="default")
    return ForcedRefinePolicy.like(policy.new_heads(base, settings, 0, engine))


def noise_clip(policy: policy.Policy, tokens: int) -> video_reader.Clip:
    """Return a video of noise, with as many frames as make a prompt of at least `tokens` tokens."""
    rng = np.random.default_rng(0)
    for count in range(8, 1000, 8):
        pixels = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        clip = video_reader.Clip(pixels, np.arange(count, dtype=float), float(count), None)
        if len(policy.prompt(prompt_text.SYSTEM, QUERY, clip).ids) >= tokens:
            return clip


def in_turn(ways, rounds: int, check_same, warm_up=True) -> np.ndarray:
    """Time each way once a round, and return (ways, rounds) seconds; `check_same(first, other)` compares the results.

    Seconds of the processor, which for one thread are those of the clock, less what others on the machine took: by the
    clock, a ratio of 7 was once measured as 29.

    warm_up  each way runs unmeasured once, but for the first, the slow one
    """
    for way in ways[1:] if warm_up else ():
        way()
    seconds = np.zeros((len(ways), rounds))
    for turn in range(rounds):
        results = []
        for number, way in enumerate(ways):
            started = time.process_time()
            results.append(way())
            seconds[number, turn] = time.process_time() - started
        for result in results[1:]:
            check_same(results[0], result)
    return seconds


def _summary(plain, ours):
    """Return both medians in seconds, then median, lowest and highest ratio of a round."""
    ratios = plain / ours
    values = (np.median(ours), np.median(plain), np.median(ratios), ratios.min(), ratios.max())
    return [round(float(value), 4) for value in values]


# --- Soft tokens


@torch.no_grad()
def by_full_forwards(policy: policy.Policy, prompt: inputs.Prompt, reply: list[int], n: int) -> torch.Tensor:
    """Return (n, D) soft tokens by n forwards over prompt, video, reply and latents: no cache, as the official code."""
    core, heads = policy.model.model, policy.heads
    ids = prompt.ids + reply[: len(reply) - reply[::-1].index(policy.refine_token_id)]
    batch = inputs.collate([inputs.Prompt(ids, prompt.video)], policy.model, policy.tokenizer.pad_token_id)
    words, positions = core.get_input_embeddings()(batch["input_ids"]), batch["position_ids"]
    video = {name: batch[name] for name in ("pixel_values_videos", "video_grid_thw")}
    before_norm, tokens = [], []
    hook = core.language_model.layers[-1].register_forward_hook(lambda _, __, out: before_norm.append(out))
    for k in range(n):
        latents = [heads.refine_latent_input_projector(token)[None, None] for token in tokens]
        steps = positions[:, :, -1:] + torch.arange(1, k + 1)
        embeds, places = torch.cat([words, *latents], dim=1), torch.cat([positions, steps], dim=2)
        states = core(inputs_embeds=embeds, position_ids=places, **video).last_hidden_state
        tokens.append(heads.refine_projector(states[0, -1] if k else before_norm[0][0, -1]))
    hook.remove()
    return torch.stack(tokens)


@torch.no_grad()
def measure_latents(model: str, read: int, reply_tokens: int, rounds: int, target=None) -> list[Measurement]:
    """Measure soft tokens behind a prompt of at least `read` tokens and a reply of `reply_tokens`."""
    policy = random_policy(model)
    prompt = policy.prompt(prompt_text.SYSTEM, QUERY, noise_clip(policy, read))
    reply = [*policy.reply([prompt], max_new_tokens=reply_tokens - 1)[0].ids, policy.refine_token_id]
    contexts = policy.replay([prompt], [reply]).refine_contexts
    plain, once, cached = in_turn(
        [
            lambda: by_full_forwards(policy, prompt, reply, LATENTS),
            lambda: sqr.soft_tokens(policy, policy.replay([prompt], [reply]).refine_contexts, LATENTS)[0],
            lambda: sqr.soft_tokens(policy, contexts, LATENTS)[0],
        ],
        rounds,
        lambda first, other: torch.testing.assert_close(first, other, atol=1e-3, rtol=1e-3),
    )
    facts = model, _millions(policy), len(prompt.ids), reply_tokens
    claims = (("prompt and reply read once", once, target), ("from the cache of the reply", cached, None))
    return [
        Measurement(f"8 soft tokens, {claim}: 8 full forwards", *facts, *_summary(plain, seconds), aim)
        for claim, seconds, aim in claims
    ]


def _millions(policy):
    return round(sum(weight.numel() for weight in policy.model.parameters()) / 1e6, 1)


# --- A step of GRPO


class GRPOStep:
    """A whole GRPO step of one prompt, by `grpo.GRPOTrainer` itself.

    It is a turn with a group of replies, soft tokens, rewards, a reading by the reference policy, forward and backward,
    and an update. The rate is zero: every step computes the same.
    """

    def __init__(self, model: str, read: int, reply_tokens: int):
        knobs = {"max_new_tokens": reply_tokens, "rollout_temperature": 1.0, "grpo_group": GROUP}
        knobs |= {"grpo_lr": 0.0, "grpo_head_lr": 0.0}
        # Adapters as in `mini`; the larger model learns with all its weights, as in the paper.
        profile = replace(config.load("mini"), **knobs, **({"lora_rank": 0} if model == "large" else {}))
        tokenizer = architecture.make_tokenizer()
        body = Qwen3VLModel(architecture.make_config(tokenizer)).eval().requires_grad_(False)
        search_engine = engine.Engine(profile, body, tokenizer, "random")
        self.policy = random_policy(model, search_engine)
        clip, vectors = noise_clip(self.policy, read), common.random_vectors(32, 1, search_engine.width)
        query = annotations.Query(0, QUERY, "v0", (0.0, 1.0), "", clip.seconds)
        self.prompts = rollout.make_prompts([query], vectors, negatives=profile.grpo_negatives, seed=0)
        parts = replace(rollout.VARIANTS["vsr1"], turns=1), search_engine, self.policy, vectors
        worker = rollout.RolloutWorker(profile, "charades", *parts, common.same_clip(clip))
        self.trainer = grpo.GRPOTrainer(worker)
        self.prompt_tokens = len(self.policy.prompt(prompt_text.SYSTEM, QUERY, clip).ids)

    def run(self, sharing: bool, at_once: int | None = None) -> tuple[list[str], float, torch.Tensor]:
        """Return replies, loss and gradient of a step that learns from `at_once` replies at a time, or all.

        Each gradient (R, C) as its product with a random vector: matrices that agree there are equal (Freivalds), and
        to keep them all would show in the memory.
        """
        ForcedRefinePolicy.sharing = sharing
        self.trainer.knobs = replace(self.trainer.knobs, grpo_micro_batch=at_once)
        line, rows = self.trainer.train_step(1, self.prompts)
        rng, sums = torch.manual_seed(0), []
        for group in self.trainer.optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:  # A's, for the last soft token is not read
                    grad = weight.grad.reshape(len(weight), -1)
                    sums.append(grad @ torch.randn(grad.shape[1], generator=rng))
        return [row["text"] for row in rows], line["loss"], torch.cat(sums)


def same_step(first, other) -> None:
    """Fail where two steps do not agree in every word, in the loss and in the gradient."""
    assert first[0] == other[0], "other replies were sampled"
    assert abs(first[1] - other[1]) < 1e-3 * max(1.0, abs(first[1])), "another loss"
    assert (first[2] - other[2]).norm() < 1e-3 * first[2].norm(), "another gradient"


def time_steps(model: str, read: int, reply_tokens: int, rounds: int, at_once: int | None):
    """Return ({way: (rounds,) seconds}, {way: GB}, parameters in millions, prompt tokens) of whole steps.

    A way is what `GRPOStep.run` is given: shared with all replies at once, and with `at_once` shared and plain. Call
    it in a process of its own, for the memory.
    """
    torch.set_num_threads(1)
    step, highest = GRPOStep(model, read, reply_tokens), {}
    # What takes less memory first, or it could not be seen.
    ways = list(dict.fromkeys([(True, at_once), (False, at_once), (True, None)]))

    def run(way):
        result = step.run(*way)
        highest.setdefault(way, peak_gb())
        return result

    seconds = in_turn([partial(run, way) for way in ways], rounds, same_step, warm_up=False)
    return dict(zip(ways, seconds, strict=True)), highest, _millions(step.policy), step.prompt_tokens


def measure_steps(model: str, read: int, reply_tokens: int, rounds: int, at_once=None) -> list[Measurement]:
    """Measure a whole GRPO step: a prompt of at least `read` tokens, replies of `reply_tokens`.

    Where the plain way cannot learn from all replies at once, it does from `at_once`; a last row has both ways do so.
    """
    args = model, read, reply_tokens, rounds, at_once
    seconds, highest, millions, prompt_tokens = common.alone(time_steps, *args)
    facts, plain = (model, millions, prompt_tokens, reply_tokens), (False, at_once)

    def row(claim, ours, target=None):
        summary = _summary(seconds[plain], seconds[ours])
        return Measurement(claim, *facts, *summary, target, highest[ours], highest[plain])

    claim = f"a whole GRPO step, G = {GROUP}, prompt read once: once a reply"
    rows = [row(claim, (True, None), GROUP_TARGET)]
    if at_once:
        rows.append(row(f"the same, learning from {at_once} replies at once both ways", (True, at_once)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure every claim on one thread, in about nine minutes; status 1 where a target is missed."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    torch.set_num_threads(1)
    started, load = time.time(), os.getloadavg()[0]
    rows = measure_latents("mini", 512, 32, rounds=5)
    rows += measure_latents("large", 512, 32, rounds=2, target=SQR_TARGET)
    rows += measure_steps("mini", 512, 75, rounds=5)
    rows += measure_steps("large", 512, 75, rounds=1, at_once=FEW)
    for row in rows:
        aim = f", at least {row.target:g} wanted" if row.target else ""
        times = f"{row.ours_s:.2f} s for {row.plain_s:.2f} s, {row.ratio:.1f} x"
        print(f"{row.model:5}  {row.claim}: {times}{aim}")
    # A load of one is this process; what is above it was somebody else's.
    loads = {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    minutes = round((time.time() - started) / 60, 1)
    common.write(rows, config.ROOT / "results" / "bench", "agent", minutes=minutes, **loads)
    return int(any(row.target and row.ratio < row.target for row in rows))


if __name__ == "__main__":
    sys.exit(main())
