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
import sys
import time
import types
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import cache, config
from vsr1.data import annotations, video_reader
from vsr1.loop import sqr
from vsr1.mini import architecture
from vsr1.models import engine, inputs, policy, prompt_text, search_index, soft_heads
from vsr1.report import provenance
from vsr1.training import grpo, rollout

LATENTS = GROUP = 8
FEW = 2  # replies that the plain way learns from at once on the larger model; eight took more than 19 GB
QUERY = "A person in a red shirt opens a blue box in the kitchen."
SQR_TARGET, GROUP_TARGET = 5.0, 2.5  # lowest median ratios on the larger model


@dataclass(frozen=True)
class Measurement:
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
    target: float | None = None
    ours_gb: float | None = None  # memory of a process that did nothing else, at its highest
    plain_gb: float | None = None


def make_config(large: bool, rows: int) -> Qwen3VLConfig:
    """The mini policy's configuration, or one of about 200 M parameters; `rows` of the embedding matrix."""
    config = architecture.make_config(architecture.make_tokenizer()).to_dict()
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
    tokenizer = architecture.make_tokenizer()
    model = Qwen3VLForConditionalGeneration(make_config(large, len(tokenizer) + 8)).eval()
    base = policy.Policy(model, tokenizer, None, None, 4096)
    made = policy.new_heads(base, soft_heads.Settings(refine_init="default"), seed)
    made.banned_tokens[made.stop_token_id] = True
    return made


def long_clip(made: policy.Policy, tokens: int, seed: int = 0) -> video_reader.Clip:
    """A video of noise, with as many frames as make a prompt of at least `tokens` tokens."""
    rng = np.random.default_rng(seed)
    for count in range(8, 1000, 8):
        pixels = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        clip = video_reader.Clip(pixels, np.arange(count, dtype=float), float(count), None)
        if len(made.prompt(prompt_text.SYSTEM, QUERY, clip).ids) >= tokens:
            return clip


@torch.no_grad()
def by_full_forwards(made: policy.Policy, prompt: inputs.Prompt, reply: list[int], n: int) -> torch.Tensor:
    """(n, D) soft tokens by n forwards over prompt, video, reply and latents: no cache, as in the official code."""
    core, heads = made.model.model, made.heads
    ids = prompt.ids + reply[: len(reply) - reply[::-1].index(made.refine_token_id)]
    batch = inputs.collate([inputs.Prompt(ids, prompt.video)], made.model, made.tokenizer.pad_token_id)
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


class Speaker(policy.Policy):
    """A policy whose replies all end in <REFINE>, as those of a trained one do, and that can read the plain way."""

    sharing = True  # False, for a policy and its reference: a prompt is read once for each reply to it

    def prompt(self, *what):
        """As every policy does; or, the plain way, of a video that nobody has looked at."""
        if not Speaker.sharing:
            self.video_cache.clear()
        return super().prompt(*what)

    def prefill(self, prompts, group=1):
        """As every policy does; or, the plain way, with each prompt in the batch as often as it is replied to."""
        if Speaker.sharing:
            return super().prefill(prompts, group)
        counts = group if isinstance(group, list) else [group] * len(prompts)
        each = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        return super().prefill([replace(prompt, video=replace(prompt.video)) for prompt in each], share=False)

    def _completion(self, said, columns):
        said.ids[-1] = self.refine_token_id  # weights that are random would not say it
        return super()._completion(said, columns)


class Step:
    """A whole GRPO step of one prompt, by `grpo.GRPOTrainer` itself.

    It is a turn with a group of replies, soft tokens, rewards, a reading by the reference policy, forward and backward,
    and an update. The rate is zero: every step computes the same.
    """

    def __init__(self, large: bool, read: int, said: int):
        # Adapters as in `mini`; the larger model learns with all its weights, as in the paper.
        knobs = {"max_new_tokens": said, "rollout_temperature": 1.0, "grpo_group": GROUP}
        knobs |= {"grpo_lr": 0.0, "grpo_head_lr": 0.0}
        profile = replace(config.load("mini"), **knobs, **({"lora_rank": 0} if large else {}))
        made = random_policy(large)
        searches = Qwen3VLModel(architecture.make_config(made.tokenizer)).eval().requires_grad_(False)
        search = engine.Engine(profile, searches, made.tokenizer, "random")
        vecs = torch.nn.functional.normalize(torch.randn(33, search.width), dim=1).numpy()
        vectors = search_index.Vectors([f"v{n}" for n in range(32)], vecs[:32], [0], vecs[32:])
        made = policy.new_heads(made, soft_heads.Settings(refine_init="default"), 0, search)
        made = Speaker(made.model, made.tokenizer, made.heads, made.settings, made.max_frame_pixels)
        made.banned_tokens[made.stop_token_id] = True
        clip = long_clip(made, read)
        shelf = types.SimpleNamespace(get=lambda ids: [clip for _ in ids])
        query = annotations.Query(0, QUERY, "v0", (0.0, 1.0), "", clip.seconds)
        self.starts = rollout.make_prompts([query], vectors, negatives=profile.grpo_negatives, seed=0)
        recipe = replace(rollout.VARIANTS["vsr1"], turns=1)
        self.trainer = grpo.GRPOTrainer(
            rollout.RolloutWorker(profile, "charades", recipe, search, made, vectors, shelf)
        )
        self.spent = Counter()
        self.prompt = made.prompt(prompt_text.SYSTEM, QUERY, clip)
        self._watch("rollout", self.trainer, "rollout")
        self._watch("learning", self.trainer, "_update")
        self._watch("reference", self.trainer.objective.ref_policy, "replay")
        self._watch("update", self.trainer.optimizer, "step")

    def _watch(self, part, home, name):
        """Adds up the seconds that `home` spends in what it calls `name`."""
        work = getattr(home, name)

        def watched(*args, **options):
            started = time.process_time()
            result = work(*args, **options)
            self.spent[part] += time.process_time() - started
            return result

        setattr(home, name, watched)

    def run(self, sharing: bool, at_once: int | None = None) -> tuple[list[str], float, torch.Tensor]:
        """What was said, the loss, and the gradient, of one step that learns from `at_once` replies at a time, or all.

        Each gradient (R, C) as its product with a random vector: matrices that agree there are equal (Freivalds), and
        to keep them all would show in the memory.
        """
        Speaker.sharing = sharing
        self.spent.clear()
        self.trainer.knobs = replace(self.trainer.knobs, grpo_micro_batch=at_once)
        line, rows = self.trainer.train_step(1, self.starts)
        rng, sums = torch.manual_seed(0), []
        for group in self.trainer.optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:  # A's, for the last soft token is not read
                    grad = weight.grad.reshape(len(weight), -1)
                    sums.append(grad @ torch.randn(grad.shape[1], generator=rng))
        return [row["text"] for row in rows], line["loss"], torch.cat(sums)


def same_step(first, other) -> None:
    """Fails where two steps do not agree in every word, in the loss and in the gradient."""
    assert first[0] == other[0], "other replies were sampled"
    assert abs(first[1] - other[1]) < 1e-3 * max(1.0, abs(first[1])), "another loss"
    assert (first[2] - other[2]).norm() < 1e-3 * first[2].norm(), "another gradient"


def steps(large: bool, read: int, said: int, rounds: int, at_once: int | None = None):
    """({way: {part: (rounds,) seconds}}, {way: GB}, prompt tokens) of whole steps, in an own process.

    A way is what `Step.run` is given: shared with all replies at once, and with `at_once` shared and plain.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_steps, large, read, said, rounds, at_once).result()


def _steps(large, read, said, rounds, at_once):
    torch.set_num_threads(1)
    step, spent, highest = Step(large, read, said), {}, {}
    # What takes less memory first, or it could not be seen.
    ways = dict.fromkeys([(True, at_once), (False, at_once), (True, None)])

    def run(way):
        result = step.run(*way)
        spent.setdefault(way, []).append(dict(step.spent))
        highest.setdefault(way, peak_gb())
        return result

    whole = in_turn([lambda way=way: run(way) for way in ways], rounds, same_step, warm=False)
    for way, seconds in zip(ways, whole, strict=True):
        one = {part: np.array([own[part] for own in spent[way]]) for part in spent[way][0]}
        parts = {"rollout": one["rollout"], "reading of the reference policy": one["reference"]}
        parts |= {"forward and backward": one["learning"] - one["reference"] - one["update"]}
        ways[way] = {"": seconds} | parts | {"rest": seconds - sum(parts.values())}
    return ways, highest, len(step.prompt.ids)


def peak_gb() -> float:
    """The memory that this process has taken so far, at its highest."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def in_turn(ways, rounds: int, same, warm=True) -> np.ndarray:
    """(ways, rounds) seconds: in a round, each way once; `same(first, other)` then compares what they gave.

    Seconds of the processor, which for one thread are those of the clock, less what others on the machine took: by the
    clock, a ratio of 7 was once measured as 29. Warm: each way runs unmeasured once, but for the first, the slow one.
    """
    for way in ways[1:] if warm else ():
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


def measure_latents(
    large: bool, model: str, read: int, said: int, rounds: int, targets: bool
) -> list[Measurement]:
    """Soft tokens behind a prompt of at least `read` tokens and a reply of `said` tokens."""
    made = random_policy(large)
    prompt = made.prompt(prompt_text.SYSTEM, QUERY, long_clip(made, read))
    reply = [*made.reply([prompt], max_new_tokens=said - 1)[0].ids, made.refine_token_id]
    size = sum(weight.numel() for weight in made.model.parameters()) / 1e6

    @torch.no_grad()
    def from_nothing():
        return sqr.soft_tokens(made, made.replay([prompt], [reply]).refine_contexts, LATENTS)[0]

    with torch.no_grad():
        branches = made.replay([prompt], [reply]).refine_contexts

    @torch.no_grad()
    def from_cache():
        return sqr.soft_tokens(made, branches, LATENTS)[0]

    def close(first, other):
        torch.testing.assert_close(first, other, atol=1e-3, rtol=1e-3)

    plain, *ours = in_turn(
        [lambda: by_full_forwards(made, prompt, reply, LATENTS), from_nothing, from_cache], rounds, close
    )
    facts = model, round(size, 1), len(prompt.ids), said
    claims = "prompt and reply read once", "from the cache of the reply"
    aims = SQR_TARGET if targets else None, None
    return [
        Measurement(f"8 soft tokens, {claim}: 8 full forwards", *facts, *_summary(plain, seconds), aim)
        for claim, seconds, aim in zip(claims, ours, aims, strict=True)
    ]


def measure_steps(
    large: bool, model: str, read: int, said: int, rounds: int, at_once=None
) -> list[Measurement]:
    """A whole GRPO step and its parts: a prompt of at least `read` tokens, replies of `said` tokens.

    Where the plain way cannot learn from all replies at once, it does from `at_once`; a last row has both ways do so.
    """
    size = sum(weight.numel() for weight in random_policy(large).model.parameters()) / 1e6
    took, highest, tokens = steps(large, read, said, rounds, at_once)
    plain = False, at_once

    def row(claim, ours, part="", target=None):
        memory = () if part else (target, highest[ours], highest[plain])
        seconds = _summary(took[plain][part], took[ours][part])
        return Measurement(claim, model, round(size, 1), tokens, said, *seconds, *memory)

    claim = f"a whole GRPO step, G = {GROUP}, prompt read once: once a reply"
    rows = [row(claim, (True, None), target=GROUP_TARGET)]
    rows += [row(f"of it: {part}", (True, None), part) for part in took[plain] if part]
    if at_once:
        rows.append(row(f"the same, learning from {at_once} replies at once both ways", (True, at_once)))
    return rows


def _summary(plain, ours):
    """Both medians in seconds, then median, lowest and highest ratio of a round."""
    ratios = plain / ours
    values = (np.median(ours), np.median(plain), np.median(ratios), ratios.min(), ratios.max())
    return [round(float(value), 4) for value in values]


def write(rows: list, folder: Path, name="agent", **facts) -> None:
    """`name`.json with the rows, the machine and the versions; `name`.csv with the rows alone."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    facts = {"seconds": "of the processor", "device": "CPU only", "machine": provenance.device()} | facts
    facts |= {"threads": torch.get_num_threads(), "commit": provenance.commit()}
    facts |= {"versions": versions | {name: provenance.version(name) for name in ("transformers", "flash-attn")}}
    facts |= {"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    cache.write_json(folder / f"{name}.json", facts | {"rows": [asdict(row) for row in rows]})
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(asdict(rows[0])))
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Measure every claim on one thread, in about nine minutes; status 1 where a target is missed."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    torch.set_num_threads(1)
    started, load = time.time(), os.getloadavg()[0]
    rows = measure_latents(False, "mini", 512, 32, rounds=5, targets=False)
    rows += measure_latents(True, "large", 512, 32, rounds=2, targets=True)
    rows += measure_steps(False, "mini", 512, 75, rounds=5)
    rows += measure_steps(True, "large", 512, 75, rounds=1, at_once=FEW)
    for row in rows:
        aim = f", at least {row.target:g} wanted" if row.target else ""
        print(
            f"{row.model:5}  {row.claim}: {row.ours_s:.2f} s for {row.plain_s:.2f} s, {row.ratio:.1f} x{aim}"
        )
    # A load of one is this process; what is above it was somebody else's.
    loads = {"load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    write(rows, config.ROOT / "results" / "bench", minutes=round((time.time() - started) / 60, 1), **loads)
    return int(any(row.target and row.ratio < row.target for row in rows))


if __name__ == "__main__":
    sys.exit(main())
