"""Measure 2B models on one GPU, seconds and memory: `python -m benchmarks.gpu`, into results/bench/gpu.{json,csv}.

With `--cpu` the same on a CPU, for the memory: into results/bench/cpu.{json,csv}, steps of few rows (`LESS`).

Random weights in the published shapes, on which neither time nor memory depends, saved once and then loaded as real
ones are. Each part runs in a process of its own, by the code that does it in earnest, with the knobs of a profile. The
video is as long as a model sees frames; replies are `--reply-tokens` long and end in <REFINE>: every search goes on.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel, TrainerCallback

from benchmarks import common
from benchmarks.common import QUERY, ForcedRefinePolicy, make_config
from vsr1 import config
from vsr1.data import annotations, video_reader
from vsr1.data.video_writer import write_video
from vsr1.loop import episode, records, runner
from vsr1.mini import architecture
from vsr1.models import checkpoints, embedding, engine, loading, policy
from vsr1.report import provenance
from vsr1.training import grpo, rollout, sft, sft_examples

SHAPES = {  # of Qwen3-VL-2B-Instruct and Qwen3-VL-Embedding-2B, as their config.json has them
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True
        },
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    },
}  # fmt: skip
SIZE, RATE = (480, 854), 24  # ours: pixels and frames a second of the video
# Fewer rows, so that a CPU is in time. `paper-24gb` trains on one row at a time: its memory is the same. Embedding and
# evaluation work on several videos at once where memory allows it; here on one.
LESS = {"sft_accumulate": 1, "grpo_prompts_per_step": 1, "grpo_group": 2, "eval_batch": 1}
VIDEOS = 64  # ours: size of the gallery; searching it is no part of what is measured
REPLY = "<think> the query asks for a blue box, the video shows none </think> <answer>not_matched</answer>"


@dataclass(frozen=True)
class Measurement:
    """One thing that was measured: the median of rounds, each of which handles `count` of it."""

    what: str
    profile: str
    learns: str
    attention: str  # of the language side / of the eyes
    prompt_tokens: int
    reply_tokens: int
    count: int
    seconds: float | None  # of a round; None: it did not fit
    per_second: float | None
    peak_gb: float | None  # memory that its process held at most: what a card must have free


def make_models(folder: Path, shapes: dict, dtype: str, device: str) -> None:
    """Save a policy and an engine with random weights, as checkpoints `folder`/policy and `folder`/engine."""
    tokenizer = architecture.make_tokenizer()
    for kind, name in ((Qwen3VLForConditionalGeneration, "policy"), (Qwen3VLModel, "engine")):
        torch.manual_seed(0)
        with torch.device(device):
            model = kind(make_config(shapes)).to(getattr(torch, dtype))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_video(path: Path, seconds: float, size: tuple[int, int]) -> None:
    """Write a video in which soft spots move sideways: it is coded, and so decoded, as real ones are."""
    spots = torch.rand(1, 3, 8, 16, generator=torch.manual_seed(0))
    picture = torch.nn.functional.interpolate(255 * spots, size, mode="bilinear")[0].permute(1, 2, 0)
    picture = picture.byte().numpy()
    count = round(RATE * seconds)
    write_video(path, (np.roll(picture, 4 * shift, axis=1) for shift in range(count)), RATE)


class BenchFixture:
    """What parts are measured on: a profile, its engine, a video in memory, queries, a gallery of random vectors."""

    def __init__(self, profile, path: Path, shard: int):
        self.profile, self.path, self.engine, self.shard = profile, path, engine.load(profile), shard
        with video_reader.reader_for(profile) as reader:
            self.clip = reader.read(path)
        assert self.clip.problem is None, self.clip.problem
        self.clips = common.same_clip(self.clip)
        count, seconds = max(profile.eval_batch, profile.grpo_prompts_per_step), self.clip.seconds
        self.queries = [annotations.Query(n, QUERY, f"v{n}", (0.0, 1.0), "", seconds) for n in range(count)]
        self.vectors = common.random_vectors(VIDEOS, count, self.engine.width)

    def policy(self) -> ForcedRefinePolicy:
        """Return the policy with new heads."""
        base = checkpoints.load(self.profile.policy, self.profile)
        settings = policy.new_settings(self.profile, self.engine.instruction)
        return ForcedRefinePolicy.like(policy.new_heads(base, settings, self.profile.seed, self.engine))

    def prompt_tokens(self, policy) -> int:
        """Return the tokens of a prompt with the video."""
        return len(policy.prompt(policy.settings.system, QUERY, self.clip).ids)


# --- The parts: each returns (model, tokens of its prompt, [(what, how many in a round, seconds of each round)])


def clock() -> float:
    """Return seconds, once the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, rounds: int) -> list[float]:
    """Return the seconds of each round; on a GPU after one to warm up."""
    if torch.cuda.is_available():
        work()
    ends = [clock()]
    for _ in range(rounds):
        work()
        ends.append(clock())
    return list(np.diff(ends))


def measure_embedding(bench: BenchFixture, rounds: int):
    """Time videos to vectors, shard by shard as `embedding.embed_corpus` does it; decoding alone; the engine alone."""
    profile = bench.profile
    size = bench.shard
    reader, paths = video_reader.reader_for(profile), [bench.path] * (2 * size)

    def decode():
        for clip in video_reader.read_videos(paths, reader, profile.decode_workers):
            assert clip.problem is None

    def decode_and_embed():
        clips = video_reader.read_videos(paths, reader, profile.decode_workers)
        for _ in range(0, len(paths), size):
            bench.engine.embed_clips(islice(clips, size))

    in_memory = timed(lambda: bench.engine.embed_clips([bench.clip] * size), rounds)
    times = [
        ("videos decoded", len(paths), timed(decode, rounds)),
        ("videos embedded, in memory", size, in_memory),
    ]
    if size > 1:  # else nothing is decoded while the engine works
        times.append(("videos decoded and embedded", len(paths), timed(decode_and_embed, rounds)))
    return bench.engine.model, len(bench.engine.video_prompt(bench.clip).ids), times


def measure_evaluation(bench: BenchFixture, rounds: int):
    """Time queries through the whole loop, `eval_batch` in step, another video at each turn."""
    profile, policy, queries = bench.profile, bench.policy(), bench.queries[: bench.profile.eval_batch]
    system = runner.SYSTEMS["sqr"]
    loop = runner.EpisodeRunner(profile, system, bench.engine, policy, bench.vectors, bench.clips)
    run = records.Run("charades", "test", "vsr1", profile.max_turns, 1, profile.seed, "skip_rejected", False)

    def work():
        episodes = episode.run_episodes(queries, loop.search, loop.ask, loop.refine, run)
        assert {len(searched.turns) for searched in episodes} == {profile.max_turns}

    label = f"episodes of {profile.max_turns} turns"
    return policy.model, bench.prompt_tokens(policy), [(label, len(queries), timed(work, rounds))]


class StepTimer(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        """Note the time."""
        self.ends.append(clock())


def measure_stage_1(bench: BenchFixture, rounds: int):
    """Time steps of the optimizer in stage 1."""
    profile, timer = bench.profile, StepTimer()
    count = profile.sft_batch * profile.sft_accumulate
    wrong = tuple(bench.vectors.video_ids[1 : 1 + (profile.sft_negatives or 1)])
    examples = [sft_examples.SFTExample(0, QUERY, "v0", "v1", wrong, REPLY)] * (count * (1 + rounds))
    policy = sft.build_policy(profile, bench.engine)
    prompt_tokens = bench.prompt_tokens(policy)
    with tempfile.TemporaryDirectory() as scratch:
        parts = policy, bench.engine, bench.vectors, examples, bench.clips
        trainer = sft.make_trainer(profile, *parts, Path(scratch), "bench")
        trainer.add_callback(timer)
        trainer.train()
    return policy.model, prompt_tokens, [("rows of a step of stage 1", count, list(np.diff(timer.ends)))]


def measure_stage_2(bench: BenchFixture, rounds: int):
    """Time steps of the optimizer in stage 2: rollouts, rewards, reference, forward, backward, update."""
    profile, policy, counts = bench.profile, bench.policy(), []
    prompt_tokens = bench.prompt_tokens(policy)
    options = {"negatives": profile.grpo_negatives, "seed": profile.seed}
    prompts = rollout.make_prompts(bench.queries, bench.vectors, **options)[: profile.grpo_prompts_per_step]
    parts = rollout.VARIANTS["vsr1"], bench.engine, policy, bench.vectors, bench.clips
    trainer = grpo.GRPOTrainer(rollout.RolloutWorker(profile, "charades", *parts))

    def work():
        line, _ = trainer.train_step(1, prompts)
        if line["no_memory"]:
            raise torch.OutOfMemoryError("a step of stage 2")
        counts.append(line["rows"])

    times = timed(work, rounds)
    return policy.model, prompt_tokens, [("replies of a step of stage 2", counts[-1], times)]


PARTS = {
    "embedding": measure_embedding,
    "evaluation": measure_evaluation,
    "stage 1": measure_stage_1,
    "stage 2": measure_stage_2,
}


def measure(
    part: str, profile, folder: Path, reply_tokens: int, rounds: int, shard: int
) -> list[Measurement]:
    """Measure a part with the models and the video in `folder`; a row without numbers where it does not fit.

    shard  videos that the engine is handed at once
    """
    models = {"policy": str(folder / "policy"), "engine": str(folder / "engine")}
    profile = replace(profile, **models, max_new_tokens=reply_tokens)
    learns = f"adapters of rank {profile.lora_rank}" if profile.lora_rank else "all weights"
    facts = profile.name, learns if part.startswith("stage") else "nothing"
    try:
        model, prompt_tokens, times = PARTS[part](BenchFixture(profile, folder / "video.mp4", shard), rounds)
    except torch.OutOfMemoryError:
        return [Measurement(f"{part}: does not fit", *facts, "", 0, reply_tokens, 0, None, None, None)]
    peak = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else common.peak_gb()
    attention = "/".join(loading.model_facts(model)["attention"])
    facts += attention, prompt_tokens, 0 if part == "embedding" else reply_tokens
    rows = []
    for label, count, spent in times:
        seconds = float(np.median(spent))
        numbers = (round(number, 3) for number in (seconds, count / seconds, peak))
        rows.append(Measurement(label, *facts, count, *numbers))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure seconds and memory of 2B models on this GPU: minutes of work, 9 GB of scratch files in runs/."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--profiles", nargs="+", default=["paper", "paper-24gb"], metavar="NAME")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with few rows a step: for the memory")
    parser.add_argument("--reply-tokens", type=int, default=128, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=3, help="measured ones; on a GPU after one more")
    args = parser.parse_args(argv)
    profiles = [config.load(name) for name in args.profiles]
    if not torch.cuda.is_available() and not args.cpu:
        parser.error("torch sees no GPU; with --cpu the models of 2B parameters are measured here")
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that measure
        threads = len(os.sched_getaffinity(0))
        profiles = [replace(profile, threads=threads, **LESS) for profile in profiles]
    started, rows, runs = time.time(), [], config.ROOT / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as scratch:
        folder = Path(scratch)
        seconds = max(profile.max_frames / profile.video_fps for profile in profiles)
        make_video(folder / "video.mp4", seconds, SIZE)
        common.alone(make_models, folder, SHAPES, "bfloat16", "cpu" if args.cpu else "cuda")
        for profile, part in product(profiles, args.parts):
            shard = 1 if args.cpu else embedding.SHARD_SIZE
            measured = common.alone(measure, part, profile, folder, args.reply_tokens, args.rounds, shard)
            for row in measured:
                print(f"{row.profile}  {row.what}: {row.seconds} s a round, {row.peak_gb} GB", flush=True)
            rows += measured  # written after each part: the next one may end for lack of memory
            facts = {"seconds": "of the clock", "minutes": round((time.time() - started) / 60, 1)}
            facts |= {"rows_a_step": LESS} if args.cpu else {"device": provenance.device()["gpu"]}
            common.write(rows, config.ROOT / "results" / "bench", "cpu" if args.cpu else "gpu", **facts)


if __name__ == "__main__":
    main()
