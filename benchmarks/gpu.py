"""What a 2B policy and a 2B engine cost on one GPU: `python benchmarks/gpu.py`, into results/bench/gpu.{json,csv}.

With `--cpu` the same on a CPU, for the memory: into results/bench/cpu.{json,csv}, steps of few rows (`LESS`).

Random weights in the published shapes, on which neither time nor memory depends, saved once and then loaded as real
ones are. Each part runs in a process of its own, by the code that does it in earnest, with the knobs of a profile. The
film is as long as a model sees frames; replies are `--said` tokens long and end in <REFINE>: every search goes on.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import tempfile
import time
import types
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, TrainerCallback

from benchmarks import speed
from vsr1 import config
from vsr1.data import annotations, video_reader
from vsr1.data.video_writer import write_video
from vsr1.loop import episode, records, runner
from vsr1.mini import architecture
from vsr1.models import checkpoints, embedding, engine, loading, policy, search_index
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
SIZE, RATE = (480, 854), 24  # ours: pixels and frames a second of the film
# `paper-24gb` works on the rows of a step one by one: with fewer of them its memory is the same, and a CPU is in time.
LESS = {"sft_accumulate": 1, "grpo_prompts_per_step": 1, "grpo_group": 2}
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


def make_config(shapes: dict) -> Qwen3VLConfig:
    """The mini model's configuration with other shapes."""
    config = architecture.make_config(architecture.make_tokenizer()).to_dict()
    config["text_config"].pop("layer_types", None)  # one a layer, of the mini model
    for side, sizes in shapes.items():
        config[side] |= sizes
    return Qwen3VLConfig(**config)


def make_models(folder: Path, shapes: dict, dtype: str, device: str) -> None:
    """A policy and an engine with random weights, as checkpoints `folder`/policy and `folder`/engine."""
    tokenizer = architecture.make_tokenizer()
    for kind, name in ((Qwen3VLForConditionalGeneration, "policy"), (Qwen3VLModel, "engine")):
        torch.manual_seed(0)
        with torch.device(device):
            model = kind(make_config(shapes)).to(getattr(torch, dtype))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_film(path: Path, seconds: float, size: tuple[int, int]) -> None:
    """A film in which soft spots move sideways: it is coded, and so decoded, as real ones are."""
    spots = torch.rand(1, 3, 8, 16, generator=torch.manual_seed(0))
    picture = torch.nn.functional.interpolate(255 * spots, size, mode="bilinear")[0].permute(1, 2, 0)
    picture = picture.byte().numpy()
    count = round(RATE * seconds)
    write_video(path, (np.roll(picture, 4 * shift, axis=1) for shift in range(count)), RATE)


class Bed:
    """What parts are measured on: a profile, its engine, its film in memory, queries, a gallery of random vectors."""

    def __init__(self, profile, film: Path):
        self.profile, self.film, self.made = profile, film, engine.load(profile)
        with video_reader.reader_for(profile) as reader:
            self.clip = reader.read(film)
        assert self.clip.problem is None, self.clip.problem
        self.shelf = types.SimpleNamespace(get=lambda ids: [self.clip for _ in ids])
        numbers, seconds = (
            list(range(max(profile.eval_batch, profile.grpo_prompts_per_step))),
            self.clip.seconds,
        )
        self.queries = [annotations.Query(n, speed.QUERY, f"v{n}", (0.0, 1.0), "", seconds) for n in numbers]
        rng = np.random.default_rng(0)
        vecs = rng.standard_normal((VIDEOS + len(numbers), self.made.width)).astype(np.float32)
        vecs /= np.linalg.norm(vecs, axis=1, keepdims=True)
        self.vectors = search_index.Vectors(
            [f"v{n}" for n in range(VIDEOS)], vecs[:VIDEOS], numbers, vecs[VIDEOS:]
        )

    def agent(self) -> speed.Speaker:
        """The policy with new heads; its replies never end by themselves, and then in <REFINE>."""
        base = checkpoints.load(self.profile.policy, self.profile)
        settings = policy.new_settings(self.profile, self.made.instruction)
        agent = policy.new_heads(base, settings, self.profile.seed, self.made)
        agent = speed.Speaker(agent.model, agent.tokenizer, agent.heads, settings, agent.max_frame_pixels)
        agent.banned_tokens[agent.stop_token_id] = True
        return agent

    def tokens(self, agent) -> int:
        """Of a prompt with the film."""
        return len(agent.prompt(agent.settings.system, speed.QUERY, self.clip).ids)


# --- the parts: (the model in question, tokens of its prompt, [(what, how many in a round, seconds of each round)]) ---


def clock() -> float:
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work, rounds: int) -> list[float]:
    """Seconds of each round, after one to warm up."""
    ends = []
    for _ in range(1 + rounds):
        work()
        ends.append(clock())
    return list(np.diff(ends))


def embed(bed: Bed, rounds: int):
    """Videos to vectors, shard by shard as `engine.embed_corpus` does it; and decoding alone, the engine alone."""
    profile, made, size = bed.profile, bed.made, embedding.SHARD_SIZE
    reader, paths = video_reader.reader_for(profile), [bed.film] * (2 * size)

    def decode():
        for clip in video_reader.read_videos(paths, reader, profile.decode_workers):
            assert clip.problem is None

    def both():
        clips = video_reader.read_videos(paths, reader, profile.decode_workers)
        for _ in range(0, len(paths), size):
            made.embed_clips(islice(clips, size))

    alone = timed(lambda: made.embed_clips([bed.clip] * size), rounds)
    found = [
        ("videos decoded", len(paths), timed(decode, rounds)),
        ("videos embedded, in memory", size, alone),
    ]
    found += [("videos decoded and embedded", len(paths), timed(both, rounds))]
    return made.model, len(made.video_prompt(bed.clip).ids), found


def walk(bed: Bed, rounds: int):
    """Queries through the whole loop, `eval_batch` in step, another video at each turn."""
    profile, agent, some = bed.profile, bed.agent(), bed.queries[: bed.profile.eval_batch]
    wired = runner.EpisodeRunner(profile, runner.SYSTEMS["sqr"], bed.made, agent, bed.vectors, bed.shelf)
    run = records.Run("charades", "test", "vsr1", profile.max_turns, 1, profile.seed, "skip_rejected", False)

    def work():
        walked = episode.run_episodes(some, wired.search, wired.ask, wired.refine, run)
        assert {len(one.turns) for one in walked} == {profile.max_turns}

    what = f"episodes of {profile.max_turns} looks"
    return agent.model, bed.tokens(agent), [(what, len(some), timed(work, rounds))]


class Laps(TrainerCallback):
    """The time at the end of each step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        """One more."""
        self.ends.append(clock())


def stage_one(bed: Bed, rounds: int):
    """Steps of the optimizer in stage 1."""
    profile, laps, wrong = (
        bed.profile,
        Laps(),
        bed.vectors.video_ids[1 : 1 + (bed.profile.sft_negatives or 1)],
    )
    step, row = (
        profile.sft_batch * profile.sft_accumulate,
        sft_examples.SFTExample(0, speed.QUERY, "v0", "v1", tuple(wrong), REPLY),
    )
    agent = sft.build_policy(profile, bed.made)
    tokens, rows = bed.tokens(agent), [row] * (step * (1 + rounds))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = sft.make_trainer(profile, agent, rows, bed.shelf, Path(scratch), "bench")
        trainer.add_callback(laps)
        trainer.attach_retrieval(agent, bed.made, bed.vectors, profile).train()
    return agent.model, tokens, [("rows of a step of stage 1", step, list(np.diff(laps.ends)))]


def stage_two(bed: Bed, rounds: int):
    """Steps of the optimizer in stage 2: rollouts from each start, rewards, reference, forward, backward, update."""
    profile, agent, count = bed.profile, bed.agent(), []
    tokens, options = bed.tokens(agent), {"negatives": profile.grpo_negatives, "seed": profile.seed}
    starts = rollout.make_prompts(bed.queries, bed.vectors, **options)[: profile.grpo_prompts_per_step]
    parts = rollout.VARIANTS["vsr1"], bed.made, agent, bed.vectors, bed.shelf
    trainer = grpo.GRPOTrainer(rollout.RolloutWorker(profile, "charades", *parts))

    def work():
        line, _ = trainer.train_step(1, starts)
        if line["no_memory"]:
            raise torch.OutOfMemoryError("a step of stage 2")
        count[:] = [line["rows"]]

    spent = timed(work, rounds)
    return agent.model, tokens, [("replies of a step of stage 2", *count, spent)]


PARTS = {"embedding": embed, "evaluation": walk, "stage 1": stage_one, "stage 2": stage_two}


# --- the bench -------------------------------------------------------------------------------------------------------


def measure(part: str, profile, folder: Path, said: int, rounds: int) -> list[Measurement]:
    """The rows of a part with the models and the film in `folder`; one without numbers where it does not fit."""
    profile = replace(
        profile, policy=str(folder / "policy"), engine=str(folder / "engine"), max_new_tokens=said
    )
    adapters = f"adapters of rank {profile.lora_rank}" if profile.lora_rank else "all weights"
    kind = profile.name, adapters if part.startswith("stage") else "nothing"
    try:
        model, tokens, found = PARTS[part](Bed(profile, folder / "film.mp4"), rounds)
    except torch.OutOfMemoryError:
        return [Measurement(f"{part}: does not fit", *kind, "", 0, said, 0, None, None, None)]
    peak = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else speed.peak_gb()
    kind += "/".join(loading.model_facts(model)["attention"]), tokens, 0 if part == "embedding" else said
    rows = [(what, count, float(np.median(spent))) for what, count, spent in found]
    return [
        Measurement(what, *kind, count, *(round(x, 3) for x in (s, count / s, peak)))
        for what, count, s in rows
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure seconds and memory of 2B models on this GPU: minutes of work, 9 GB of scratch files in runs/."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--profiles", nargs="+", default=["paper", "paper-24gb"], metavar="NAME")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with few rows a step: for the memory")
    parser.add_argument("--said", type=int, default=128, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=3, help="measured ones, after one to warm up")
    args = parser.parse_args(argv)
    profiles = [config.load(name) for name in args.profiles]
    if not torch.cuda.is_available() and not args.cpu:
        parser.error("torch sees no GPU; with --cpu the models of 2B parameters are measured here")
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that measure
        profiles = [replace(one, threads=len(os.sched_getaffinity(0)), **LESS) for one in profiles]
    started, rows, runs = time.time(), [], config.ROOT / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as scratch:
        folder = Path(scratch)
        make_film(folder / "film.mp4", max(one.max_frames / one.video_fps for one in profiles), SIZE)
        jobs = [
            (measure, part, one, folder, args.said, args.rounds) for one in profiles for part in args.parts
        ]
        for job in [(make_models, folder, SHAPES, "bfloat16", "cpu" if args.cpu else "cuda"), *jobs]:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                rows += (found := alone.submit(*job).result() or [])
            for row in found:
                print(f"{row.profile}  {row.what}: {row.seconds} s a round, {row.peak_gb} GB", flush=True)
    facts = {"seconds": "of the clock", "minutes": round((time.time() - started) / 60, 1)}
    facts |= {"rows_a_step": LESS} if args.cpu else {"device": provenance.device()["gpu"]}
    speed.write(rows, config.ROOT / "results" / "bench", "cpu" if args.cpu else "gpu", **facts)


if __name__ == "__main__":
    main()
