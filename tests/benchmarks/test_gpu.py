"""The bench of a GPU, at mini size on the CPU: every part runs, and says what it should of itself."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import common, gpu
from vsr1 import config
from vsr1.data import video_reader
from vsr1.models import engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of the mini shape and a video of four seconds."""
    folder = tmp_path_factory.mktemp("bench")
    gpu.make_models(folder, {}, "float32", "cpu")
    gpu.make_video(folder / "video.mp4", 4, (64, 96))
    return folder


@pytest.fixture
def profile(monkeypatch):
    small = {"max_frames": 4, "eval_batch": 2, "grpo_group": 3, "grpo_prompts_per_step": 2, "max_turns": 3}
    return dataclasses.replace(config.load("smoke"), **small, sft_batch=2, sft_accumulate=2)


def test_the_video_is_as_long_as_it_claims_and_moves(folder):
    with video_reader.Reader(fps=2.0) as reader:
        clip = reader.read(folder / "video.mp4")
    assert (
        clip.problem is None
        and clip.seconds == pytest.approx(4, abs=0.1)
        and clip.frames.shape == (8, 64, 96, 3)
    )
    first, second = clip.frames[:2].astype(int)
    assert abs(second - np.roll(first, 48, axis=1)).mean() < 6, (
        "four pixels a frame, twelve frames between the two"
    )
    assert abs(second - first).mean() > 20


@pytest.mark.parametrize(
    ("part", "rank"), [*((part, 0) for part in gpu.PARTS), ("stage 1", 4), ("stage 2", 4)]
)
def test_each_part_is_measured_by_the_code_that_does_it(folder, profile, part, rank):
    rows = gpu.measure(part, dataclasses.replace(profile, lora_rank=rank), folder, 6, 1, 2)
    told = {"embedding": [4, 2, 4], "evaluation": [2], "stage 1": [4]}
    counts = [row.count for row in rows]
    assert (
        counts == told[part] if part in told else 6 <= counts[0] <= 12
    )  # one look or two of each of six episodes
    for row in rows:
        assert row.per_second == pytest.approx(row.count / row.seconds, rel=0.05) and row.peak_gb > 0
        assert row.attention == "sdpa/sdpa" and row.prompt_tokens > 8 and row.profile == "smoke"
        learns = f"adapters of rank {rank}" if rank else "all weights"
        assert row.learns == (learns if part.startswith("stage") else "nothing")


def test_what_does_not_fit_is_a_row_without_numbers(folder, profile, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.Engine, "embed_clips", full)
    (row,) = gpu.measure("embedding", profile, folder, 6, 1, 2)
    assert row.what == "embedding: does not fit" and row.seconds is row.per_second is row.peak_gb is None
    common.write([row], tmp_path, "gpu", device="a card")
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["device"] == "a card" and {"torch", "cuda", "flash-attn"} < set(told["versions"])
    with open(tmp_path / "gpu.csv", newline="") as file:
        assert [line["seconds"] for line in csv.DictReader(file)] == [""]


def test_the_shapes_are_those_of_the_2b_model():
    """2.13 billion, counted on the published shapes (profiles/paper-24gb.yaml)."""
    config = common.make_config(gpu.SHAPES)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in gpu.Qwen3VLForConditionalGeneration(config).parameters())
    assert size == pytest.approx(2.13e9, abs=0.005e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "error: torch sees no GPU;" in capsys.readouterr().err.splitlines()[-1]


def test_on_a_cpu_the_memory_of_few_rows_a_step_is_measured(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", {})
    monkeypatch.setattr(gpu, "SIZE", (64, 96))
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(config, "load", lambda name: profile)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(common, "alone", lambda work, *args: work(*args))
    how = ["--cpu", "--profiles", "smoke", "--parts", "stage 1", "--reply-tokens", "6", "--rounds", "1"]
    gpu.main(how)
    told = json.loads((tmp_path / "results" / "bench" / "cpu.json").read_text())
    (row,) = told["rows"]
    assert row["count"] == profile.sft_batch * gpu.LESS["sft_accumulate"]
    assert told["rows_a_step"] == gpu.LESS and told["device"] == "CPU only" and row["peak_gb"] > 0.1
    assert not list((tmp_path / "runs").iterdir()), "models and video are scratch"
