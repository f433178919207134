"""The speed claims, measured side by side on this machine: `make bench`, into results/bench/agent.{json,csv}.

Each claim is two ways to the same result, checked to be the same and timed in turn. Two sizes with random weights, on
which speed does not depend: the mini policy's, and about 200 M parameters, where the sums weigh more than Python does.
"""

import argparse
import concurrent.futures
import csv
import multiprocessing
import os
import platform
import resource
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import engine, frames, grpo, lessons, params, policy, qwen, refine, results, stages

LATENTS = GROUP = 8
LATENT_WIDTH = 192  # of the engine in a GRPO step, which is the mini one
SQR_TARGET, GROUP_TARGET = 5.0, 2.5  # lowest median ratios on the larger model


@dataclass(frozen=True)
class Row:
    """One claim on one model: median processor seconds of rounds in which the ways took turns, and their ratio."""

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
    target: float | None
    ours_gb: float | None = None  # memory of a process that did nothing else, at its highest
    plain_gb: float | None = None


def make_config(large: bool, rows: int) -> Qwen3VLConfig:
    """The mini policy's configuration, or one of about 200 M parameters; `rows` of the embedding matrix."""
    config = lessons.make_config(lessons.make_tokenizer(lessons.vocabulary())).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    text["vocab_size"] = rows
    if large:
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 20, "head_dim": 64}
        text |= {"num_attention_heads": 12, "num_key_value_heads": 4}
        text["rope_parameters"] |= {"mrope_section": [12, 10, 10]}
        text.pop("layer_types", None)  # one a layer, of the smaller model
        vision |= {
            "depth": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_heads": 8,
            "out_hidden_size": 768,
        }
    return Qwen3VLConfig(**config)


def random_policy(large: bool, seed: int = 0) -> policy.Policy:
    """A policy with random weights and heads that never ends a reply by itself."""
    torch.manual_seed(seed)
    tokenizer = lessons.make_tokenizer(lessons.vocabulary())
    model = Qwen3VLForConditionalGeneration(make_config(large, len(tokenizer) + 8)).eval()
    base = policy.Policy(model, tokenizer, None, None, 4096)
    made = policy.new_heads(base, policy.Settings(refine_init="default"), seed)
    made.banned[made.stop] = True
    return made


def long_prompt(made: policy.Policy, tokens: int, seed: int = 0) -> qwen.Prompt:
    """A query and a video of noise, with as many frames as make a prompt of at least `tokens` tokens."""
    rng = np.random.default_rng(seed)
    for count in range(8, 1000, 8):
        pixels = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        clip = frames.Clip(pixels, np.arange(count, dtype=float), float(count), None)
        prompt = made.prompt(policy.SYSTEM, "A person in a red shirt opens a blue box in the kitchen.", clip)
        if len(prompt.ids) >= tokens:
            return prompt


@torch.no_grad()
def by_full_forwards(made: policy.Policy, prompt: qwen.Prompt, reply: list[int], n: int) -> torch.Tensor:
    """(n, D) soft tokens by n forwards over prompt, video, reply and latents: no cache, as in the official code."""
    core, heads = made.model.model, made.heads
    ids = prompt.ids + reply[: len(reply) - reply[::-1].index(made.mark)]
    batch = qwen.collate(
        [qwen.Prompt(ids, prompt.patches, prompt.grid)], made.model, made.tokenizer.pad_token_id
    )
    words, where = core.get_input_embeddings()(batch["input_ids"]), batch["position_ids"]
    video = {name: batch[name] for name in ("pixel_values_videos", "video_grid_thw")}
    layer_out, tokens = [], []
    hook = core.language_model.layers[-1].register_forward_hook(lambda _, __, out: layer_out.append(out))
    for k in range(n):
        embeds = torch.cat(
            [words, *(heads.refine_latent_input_projector(z)[None, None] for z in tokens)], dim=1
        )
        places = torch.cat([where, where[:, :, -1:] + torch.arange(1, k + 1, device=where.device)], dim=2)
        post = core(inputs_embeds=embeds, position_ids=places, **video).last_hidden_state
        state = post[0, -1] if k else layer_out[0][0, -1]  # the first one before the final norm
        tokens.append(heads.refine_projector(state))
    hook.remove()
    return torch.stack(tokens)


class Step:
    """A whole GRPO step of one start: roll out a group, read it again with gradients and the anchor's, update.

    Its group shares one reading of the prompt, sampling and training; or, the plain way, reads it once a reply.
    The learning rate is zero: every step computes the same.
    """

    def __init__(self, made: policy.Policy, read: int, said: int):
        torch.manual_seed(0)
        tokenizer = lessons.make_tokenizer(lessons.vocabulary())
        searches = Qwen3VLModel(lessons.make_config(tokenizer)).eval().requires_grad_(False)
        knobs = {"grpo_lr": 0.0, "grpo_head_lr": 0.0, "grpo_group": GROUP, "max_new": said}
        profile = replace(params.load("smoke"), **knobs)
        vecs = torch.nn.functional.normalize(torch.randn(33, LATENT_WIDTH), dim=1).numpy()
        vectors = engine.Vectors([f"v{n}" for n in range(32)], vecs[:32], [0], vecs[32:])
        search = engine.Engine(profile, searches, tokenizer, "random")
        made = policy.new_heads(made, policy.Settings(refine_init="default"), 0, search)
        made.banned[made.stop], self.made, self.prompt, self.said = True, made, long_prompt(made, read), said
        wired = (search, made, vectors, None)
        self.course = grpo.Course(grpo.Sampler(profile, "charades", grpo.RECIPES["vsr1"], *wired))
        text = "A person in a red shirt opens a blue box in the kitchen."
        self.start = grpo.Start(
            0, text, "v0", (0.0, 1.0), "", 2.0, "v1", tuple(f"v{n}" for n in range(1, 25))
        )

    def run(self, shared: bool) -> torch.Tensor:
        """The loss of one step."""
        prompts, group = ([self.prompt], GROUP) if shared else ([self.prompt] * GROUP, 1)
        options = {"max_new": self.said - 1, "temperature": 1.0, "rng": np.random.default_rng(0)}
        rows = []
        for number, one in enumerate(self.made.reply(prompts, group=group, **options)):
            ids, logps = [*one.ids, self.made.mark], [*one.logps, -1.0]
            row = grpo.Row(self.start, 1, "v1", self.prompt, ids, logps, "", list(self.start.wrong))
            row.taken, row.advantage = torch.zeros(LATENTS, LATENT_WIDTH), (-1.0) ** number
            rows.append(row)
        self.course.optimizer.zero_grad()
        loss, _ = self.course.learner(rows, (GROUP, GROUP), shared=shared)
        loss.backward()
        self.course.optimizer.step()
        return loss.detach()


def peak_gb(large: bool, shared: bool, read: int, said: int) -> float:
    """The memory that a process of its own takes for such a step, at its highest."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_gb, large, shared, read, said).result()


def _peak_gb(large, shared, read, said):
    torch.set_num_threads(1)
    Step(random_policy(large), read, said).run(shared)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def in_turn(ways, rounds: int, same) -> np.ndarray:
    """(ways, rounds) seconds: in a round, each way once; `same(first, other)` then compares what they gave.

    Seconds of the processor, which for one thread are those of the clock, less what others on the machine took: by the
    clock, a ratio of 7 was once measured as 29. Each way runs unmeasured once, but for the first, the slow one.
    """
    for way in ways[1:]:
        way()
    seconds = np.zeros((len(ways), rounds))
    for turn in range(rounds):
        results = []
        for number, way in enumerate(ways):
            started = time.process_time()
            results.append(way())
            seconds[number, turn] = time.process_time() - started
        for result in results[1:]:
            same(results[0], result)
    return seconds


def measure(large: bool, model: str, read: int, said: int, rounds: int, targets: bool) -> list[Row]:
    """All claims for one policy: a prompt of at least `read` tokens, replies of `said` tokens."""
    made = random_policy(large)
    prompt = long_prompt(made, read)
    reply = [*made.reply([prompt], max_new=said - 1)[0].ids, made.mark]
    size = sum(weight.numel() for weight in made.model.parameters()) / 1e6

    @torch.no_grad()
    def from_nothing():
        return refine.soft_tokens(made, made.replay([prompt], [reply]).branches, LATENTS)[0]

    with torch.no_grad():
        branches = made.replay([prompt], [reply]).branches

    @torch.no_grad()
    def from_cache():
        return refine.soft_tokens(made, branches, LATENTS)[0]

    def replies(prompts, group):
        rng = np.random.default_rng(0)
        some = made.reply(prompts, group=group, max_new=said, temperature=1.0, rng=rng)
        return torch.tensor([one.ids for one in some])

    def close(first, other):
        torch.testing.assert_close(first, other, atol=1e-3, rtol=1e-3)

    ways = [lambda: by_full_forwards(made, prompt, reply, LATENTS), from_nothing, from_cache]
    latents = in_turn(ways, rounds, close)
    group = in_turn([lambda: replies([prompt] * GROUP, 1), lambda: replies([prompt], GROUP)], rounds, close)
    stepper = Step(random_policy(large), read, said)
    steps = in_turn([lambda: stepper.run(False), lambda: stepper.run(True)], rounds, close)
    memory = [peak_gb(large, shared, read, said) for shared in (True, False)]
    facts = model, round(size, 1), len(prompt.ids), said
    return [
        Row(claim, *facts, *_summary(plain, ours), target if targets else None, *gb)
        for claim, plain, ours, target, *gb in (
            (
                "8 soft tokens, prompt and reply read once: 8 full forwards",
                latents[0],
                latents[1],
                SQR_TARGET,
            ),
            ("8 soft tokens from the cache of the reply: 8 full forwards", latents[0], latents[2], None),
            ("8 replies to a prompt read once: to one read 8 times, in a batch", *group, GROUP_TARGET),
            ("a whole GRPO step, G = 8, prompt read once: once a reply", *steps, GROUP_TARGET, *memory),
        )
    ]


def _summary(plain, ours):
    """Both medians in seconds, then median, lowest and highest ratio of a round."""
    ratios = plain / ours
    values = (np.median(ours), np.median(plain), np.median(ratios), ratios.min(), ratios.max())
    return [round(float(value), 4) for value in values]


def write(rows: list[Row], folder: Path, **facts) -> None:
    """agent.json with the rows, the machine and the versions; agent.csv with the rows alone."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {"seconds": "of the processor", "device": "CPU only", "machine": results.device()}
    facts |= {"threads": torch.get_num_threads()}
    facts |= {"versions": versions | {"transformers": transformers.__version__}}
    facts |= {"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    stages.write_json(folder / "agent.json", facts | {"rows": [asdict(row) for row in rows]})
    with open(folder / "agent.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def main(argv: list[str]) -> int:
    """`make bench`: one thread, about eight minutes; status 1 where a target is missed."""
    argparse.ArgumentParser(prog="python -m vsr1 bench", description=main.__doc__).parse_args(argv)
    torch.set_num_threads(1)
    started, load = time.time(), os.getloadavg()[0]
    rows = measure(False, "mini", 512, 32, rounds=5, targets=False)
    rows += measure(True, "large", 512, 32, rounds=2, targets=True)
    for row in rows:
        aim = f", at least {row.target:g} wanted" if row.target else ""
        print(
            f"{row.model:5}  {row.claim}: {row.ours_s:.2f} s for {row.plain_s:.2f} s, {row.ratio:.1f} x{aim}"
        )
    # A load of one is this process; what is above it was somebody else's.
    loads = {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    write(rows, params.ROOT / "results" / "bench", minutes=round((time.time() - started) / 60, 1), **loads)
    return int(any(row.target and row.ratio < row.target for row in rows))
