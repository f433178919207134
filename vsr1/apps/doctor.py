"""Say what this machine can reproduce, and what is missing: one table for `make doctor`. It runs without torch.

A check is ok, limited (it works, with less) or missing (the profile cannot run), with a finding and a remedy.
"""

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
from rich.console import Console
from rich.table import Table

from vsr1 import config
from vsr1.config import ABLATED, ROOT, InputError
from vsr1.data import official_release, real_datasets

GB = 1024**3
RENDERED_BYTES = 5 * GB  # ours, rounded up: what runs/ grows to in the mini world, beside checkpoints
MEMORY_GB = {"rendered": 8, "real": 32}  # ours, rounded up
GPU_GB = 24
REINSTALL = "rm .venv/.ready; make doctor installs them again"
# What `make paper` trains and keeps: `sft`, `ft` and `grpo/vsr1` of each data set, and two reward variants of T2.
CHECKPOINTS_PER_DATASET, CHECKPOINTS_OF_T2 = 3, 2
SAVED_BYTES = 4  # of a weight in a checkpoint: float32
STATE_BYTES = 12  # of a learned weight in a saved training state: itself and Adam's two moments, float32
HUB_BYTES = 2  # of a weight on the hub: bfloat16
LORA_SHARE = (
    0.0008  # of a model's weights, for each rank of its adapters; counted on 2B at rank 32, with heads
)

WRITTEN = 0.5 * GB  # bytes a second that a disk takes, assumed
# What one GPU does, assumed and not measured: operations a second in 16 bits, and seconds for a token of a batch of
# replies. Both decide between days and weeks, no more.
FLOPS, DECODED = 1e14, 0.03
# Queries of train and test, videos, and their mean seconds (docs/data.md section 1).
AMOUNTS = {
    "charades": (12408, 3720, 6672, 31),
    "didemo": (32903, 4013, 9397, 48),
    "activitynet": (37261, 16966, 14894, 117),
}
TOKEN_PIXELS = 32 * 32  # of a pair of frames
# Ours: tokens of a reply and of a prompt without its video; looks of a query; systems of T1 that look.
REPLY, WORDS, LOOKS, SYSTEMS = 150, 300, 2, 6
LEARNING = 3  # times the operations of reading


class Check(NamedTuple):
    """One row of the table."""

    name: str
    status: str  # ok, limited, missing
    finding: str
    remedy: str = ""


def main(profile) -> int:
    """Print the table and whether `profile` can run here; return 0 if it can, else 1."""
    checks = [packages(), *torch_and_faiss(profile), decoding(), *space(profile), saves(profile)]
    checks.append(time_needed(profile))
    checks += map(weights, _models(profile))
    if profile.world is None:
        checks += [real_data(profile, dataset) for dataset in profile.datasets]
    title = f"What this machine can reproduce (profile {profile.name}; PROFILE=paper asks for the real data)"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for check in checks:
        table.add_row(*check)
    console = Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False)
    console.print(table)
    lacking = [check.name for check in checks if check.status == "missing"]
    verdict = f"cannot run here: {', '.join(lacking)}" if lacking else "can run here"
    console.print(f"{profile.name} {verdict}")
    return int(bool(lacking))


# --- The machine


def packages() -> Check:
    """Compare installed versions with requirements.txt; either faiss will do."""
    pins = [line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    installed.setdefault("faiss-cpu", installed.get("faiss-gpu", "absent"))
    versions = [(name, installed.get(name, "absent").split("+")[0], pin) for name, pin in pins]
    differing = [f"{name} {version}, not {pin}" for name, version, pin in versions if version != pin]
    if not differing:
        return Check("packages", "ok", f"all {len(pins)} as pinned")
    return Check("packages", "limited", f"{len(differing)} of {len(pins)}: {differing[0]}", REINSTALL)


def torch_and_faiss(profile) -> list[Check]:
    """Check torch's build, the largest GPU it sees against what a 2B policy and its engine take, and faiss."""
    try:
        import faiss
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Check("torch, faiss", "missing", " ".join(str(error).split())[:80], REINSTALL)]
    finding, status, remedy = f"torch {torch.__version__}, faiss {faiss.__version__}", "ok", ""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus and not hasattr(faiss, "StandardGpuResources"):
        finding, status = f"{finding} on the CPU: slower, same result", "limited"
        remedy = "rm .venv/.ready; make doctor installs faiss-gpu"
    needed = GPU_GB * GB if profile.world is None else 0
    gpu = _amount(
        "GPU", max((gpu.total_memory for gpu in gpus), default=0), needed, f"a GPU with {GPU_GB} GB"
    )
    names = ", ".join(gpu.name for gpu in gpus) or "none that torch can use"
    return [Check("torch, faiss", status, finding, remedy), gpu._replace(finding=f"{names}: {gpu.finding}")]


def decoding() -> Check:
    """Write eight H.264 frames by PyAV, and read them back by both decoders: the whole way of a mini video."""
    try:
        import decord

        from vsr1.data import decoder
        from vsr1.data.video_writer import write_video

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_video(path, [np.full((64, 64, 3), shade, np.uint8) for shade in range(0, 256, 32)], 8)
            frames = decoder.decode(str(path), np.arange(8) / 8, 1.0, 64, None)[0]
            counts = len(frames), len(decord.VideoReader(str(path), num_threads=1))
            assert counts == (8, 8), "not the frames that were written"
    except Exception as error:  # whatever a broken codec library raises is the finding
        finding = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return Check("video", "missing", finding, REINSTALL)
    return Check("video", "ok", "PyAV writes and reads H.264, decord reads it too")


def _amount(name, amount, needed, remedy):
    # A machine sold as 8 GB shows 7.6: one tenth less is as asked.
    finding = f"{amount / GB:.1f} GB of {needed / GB:.0f} needed"
    if amount >= 0.9 * needed:
        return Check(name, "ok", finding)
    return Check(name, "missing" if amount < 0.5 * needed else "limited", finding, remedy)


def space(profile) -> list[Check]:
    """Check memory, the machine's or its container's where that is less, and the free disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        memory = min(memory, int(text))
    needed, free = MEMORY_GB["rendered" if profile.world else "real"] * GB, shutil.disk_usage(ROOT).free
    return [
        _amount("memory", memory, needed, "close other programs, or take a larger machine"),
        _amount("free disk", free, disk(profile), f"free some space on the disk of {ROOT.name}/"),
    ]


def disk(profile) -> float:
    """Estimate the bytes that `make paper` adds: checkpoints, a training state, hub models, vectors or videos.

    While a training state is saved the one before is still there. Studies and other seeds come on top.
    """
    policy = parameters(profile.policy)
    count = CHECKPOINTS_PER_DATASET * len(profile.datasets)
    count += CHECKPOINTS_OF_T2 if ABLATED in profile.datasets else 0
    states = 2 * profile.parallel_steps
    hub = sum(HUB_BYTES * parameters(model) for model in _models(profile) if not _is_here(model))
    data = RENDERED_BYTES if profile.world else sum(map(official_release.size, profile.datasets))
    return policy * SAVED_BYTES * count + _learned(profile) * STATE_BYTES * states + hub + data


def saves(profile) -> Check:
    """Say what a saved training state takes, how often one is written, and whether writing takes much of the time."""
    state = _learned(profile) * STATE_BYTES
    seconds = state / WRITTEN
    finding = f"{state / GB:.1f} GB every {profile.save_minutes:g} min, about {seconds:.0f} s to write"
    if seconds <= 0.1 * 60 * profile.save_minutes:
        return Check("saved states", "ok", finding)
    return Check(
        "saved states", "limited", finding, f"save_minutes: {np.ceil(seconds / 6):.0f} in the profile"
    )


def time_needed(profile) -> Check:
    """Say how long `make paper` takes: as the published run did, or by an estimate where nobody has run it."""
    path = ROOT / "results" / profile.name / "provenance.json"
    if path.exists():
        steps = json.loads(path.read_text(encoding="utf-8"))["stages"].values()
        hours = sum(step["minutes"] or 0 for step in steps) / 60
        return Check("hours", "ok", f"{hours:.1f} for the steps of the published run, one after the other")
    if profile.world is not None:
        return Check("hours", "ok", "nobody has published a run of this profile")
    estimates = [estimate_hours(profile, dataset) for dataset in profile.datasets]
    hours = {part: sum(estimate[part] for estimate in estimates) for part in PARTS}
    parts = ", ".join(f"{part} {value:.1f}" for part, value in hours.items())
    finding = (
        f"about {sum(hours.values()):.0f} on one GPU: {parts}; never run, {FLOPS / 1e12:.0f} TFLOP/s and "
    )
    return Check("hours", "limited", f"{finding}{1000 * DECODED:.0f} ms a decoded token assumed")


PARTS = ("embed", "stage 1", "stage 2", "evaluate")


def estimate_hours(profile, dataset: str) -> dict[str, float]:
    """Estimate the hours of each part of PARTS on one GPU, by the amounts of a profile and a data set.

    Two operations a weight and token; a reply is decoded with all of its batch. Test videos and replies of stage 1 are
    read once; all else is left out.
    """
    train, test, videos, seconds = AMOUNTS[dataset]
    frames = min(profile.max_frames, seconds * profile.video_fps)
    engine_pixels = profile.engine_max_pixels or profile.max_frame_pixels
    if profile.engine_video_pixels:
        engine_pixels = min(engine_pixels, 2 * profile.engine_video_pixels / frames)
    prompt = WORDS + frames / 2 * profile.max_frame_pixels / TOKEN_PIXELS
    read = 2 * parameters(profile.policy) * prompt
    replies = LOOKS * test * SYSTEMS
    starts = min(train, (profile.grpo_steps or np.inf) * profile.grpo_prompts_per_step)
    group = LOOKS * starts  # each as one batch of replies, whose prompt is read once
    parts = (
        2 * parameters(profile.engine) * videos * frames / 2 * engine_pixels / TOKEN_PIXELS / FLOPS,
        LEARNING * 2 * profile.sft_rows * profile.sft_epochs * read / FLOPS,
        group * (REPLY * DECODED + (1 + LEARNING) * read / FLOPS),
        replies * (REPLY * DECODED / profile.eval_batch + read / FLOPS),
    )
    return {name: spent / 3600 for name, spent in zip(PARTS, parts, strict=True)}


# --- Models


def _models(profile):
    names = (profile.engine, profile.engine_large, profile.policy, profile.teacher)
    return list(dict.fromkeys(filter(None, names)))


def parameters(model: str) -> float:
    """Estimate the weights of a model: by its files in the clone, float32, else by the size in its name.

    >>> parameters("Qwen/Qwen3-VL-2B-Instruct") / 1e9  # 2.13, with the vision tower
    2.2
    """
    if _is_local(model):
        return sum(path.stat().st_size for path in (ROOT / model).glob("*.safetensors")) / SAVED_BYTES
    billions = re.search(r"(\d+(?:\.\d+)?)B", model)
    return 1.1e9 * float(billions[1]) if billions else 0.0


def _learned(profile):
    """Return how many weights of the policy learn: all, or those of its adapters and heads."""
    return parameters(profile.policy) * min(1, LORA_SHARE * profile.lora_rank or 1)


def weights(model: str) -> Check:
    """Look for a model's safetensors in the clone, or in the local cache of the hub."""
    name, local = f"weights {Path(model).name}", _is_local(model)
    if _is_here(model):
        return Check(name, "ok", "in this clone" if local else "in the local hub cache")
    if local:
        restore = f"git checkout {model}, or make foundation"
        return Check(name, "missing", f"no *.safetensors in {model}", restore)
    return Check(name, "limited", "not on this machine", "downloaded at first use; needs network")


def _is_local(model):
    return model.startswith("vsr1/") or (ROOT / model).is_dir()


def _is_here(model):
    """Return whether all weights of a model are in the clone, or in the hub cache at the commit that a run asks for."""
    if _is_local(model):
        return any((ROOT / model).glob("*.safetensors"))
    repository, _, revision = model.partition("@")
    revision = config.revisions().get(model) or revision or None

    def cached(name):
        path = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        return path if isinstance(path, str) else None

    names = ["config.json"]
    if index := cached("model.safetensors.index.json"):
        names += set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    return all(map(cached, names if index else [*names, "model.safetensors"]))


# --- Real data


def real_data(profile, dataset) -> Check:
    """Say what of a real data set is there, what is to be downloaded, and which rows of T1 that allows."""
    folder, gigabytes = ROOT / profile.data / dataset, official_release.size(dataset) / GB
    name, home = f"data {dataset}", f"{profile.data}/{dataset}"
    download = f"python -m vsr1 download-release --dataset {dataset} downloads about {gigabytes:.1f} GB"
    annotation_files = real_datasets.annotation_files(profile, dataset)
    absent = [file.name for file in annotation_files if not file.exists()]
    if absent:
        remedy = f"{download}, or put it into {home}/annotations/; then the videos"
        return Check(name, "missing", f"no {absent[0]}", remedy)
    try:
        counts, files = real_datasets.videos(profile, dataset, annotation_files)
    except InputError as error:
        return Check(name, "missing", str(error))
    train, test = (
        np.mean([video in files for video, of in counts if of == split] or 0)
        for split in real_datasets.SPLITS
    )
    replies = profile.teacher is not None or (folder / official_release.REPLIES).exists()
    vectors = all((folder / file).exists() for file in official_release.vector_files("test"))
    status, remedy = "ok", ""
    if not (test and train):
        status, remedy = "missing", f"put the videos into {home}/videos/"
    elif not replies:
        status, remedy = "missing", f"no replies to learn stage 1 from: {download}, or name a teacher"
    elif min(test, train) < 1:
        status, remedy = "limited", "the queries of missing videos count as failures (videos/missing.csv)"
    finding = (
        f"videos of test {test:.1%}, of train {train:.1%}, for {t1(test, train, vectors, replies)} of T1"
    )
    return Check(name, status, f"{finding}; runs/ takes {gigabytes:.1f} GB more for vectors", remedy)


def t1(test, train, vectors, replies) -> str:
    """Name the rows of T1 that part of a data set allows, by the share of videos found."""
    if test and train:
        return "all rows" if replies else "ZS, rank fallback, two-stage"
    if test:
        return "ZS, rank fallback"
    return "VR of ZS and FT by the released vectors (download-release prints it)" if vectors else "chance"
