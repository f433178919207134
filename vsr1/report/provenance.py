"""Say where numbers come from: commit, machine, libraries, and what each step cost."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from vsr1 import cache
from vsr1.config import ROOT, Profile
from vsr1.data import real_datasets

CODE = ("--", ".", ":!results")  # for git: all but what runs write
INPUT_KNOBS = [
    *"video_fps max_frames max_frame_pixels engine_max_pixels engine_min_pixels engine_video_pixels".split(),
    *"engine_frame_multiple engine_clock search_released_vectors instruction max_query_tokens".split(),
]
LIBRARIES = "torch transformers trl accelerate numpy faiss-cpu faiss-gpu decord matplotlib flash-attn".split()


def write(profile: Profile) -> dict:
    """Write results/<profile>/provenance.json and return its content.

    Commit and tree are those of all but results/: committing results must not change what they say.
    A rerun with nothing changed writes the same bytes: the date is that of the youngest step.
    """
    steps = _steps(profile)
    changes = _output("git", "status", "--porcelain", *CODE)
    versions = {name: version(name) for name in LIBRARIES}
    content = {
        "commit": commit(),
        "tree": "unknown" if changes is None else "changed" if changes else "clean",
        "profile": profile.name,
        "digest": profile.digest(),
        "seed": profile.seed,
        "date": max((step.get("made", "") for step in steps.values()), default="") or None,
        "device": device(),
        "seen": _model_inputs(profile),
        "python": platform.python_version(),
        "libraries": {name: number for name, number in versions.items() if number},
        "stages": {
            name: {"minutes": round(step["seconds"] / 60, 2), "peak_mb": step.get("peak_mb")}
            for name, step in steps.items()
        },
    }
    profile.results().mkdir(parents=True, exist_ok=True)
    cache.write_json(profile.results() / "provenance.json", content)
    return content


def _model_inputs(profile):
    """Return what the models were shown: frames, their sizes and stamps, and the source of real annotations."""
    facts = {name: getattr(profile, name) for name in INPUT_KNOBS}
    for dataset in profile.datasets if profile.world is None else ():
        files = [file for file in real_datasets.annotation_files(profile, dataset) if file.exists()]
        facts[f"annotations of {dataset}"] = {file.name: cache.file_digest(file) for file in files}
    return facts


def _steps(profile):
    """Return {path below runs/<profile>: record} of every finished step of this profile's data sets."""
    home = profile.run_root()
    return {
        folder.relative_to(home).as_posix(): cache.metadata(folder)
        for folder in cache.steps(home)
        if set(profile.datasets) & set(folder.relative_to(home).parts)
    }


def device() -> dict:
    """Describe the machine: processor, cores this process may use, memory, GPU (None without one)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu or None,
    }


def commit() -> str:
    """Return the last commit that changed anything but results."""
    return _output("git", "log", "-1", "--format=%H", *CODE) or "unknown"


def version(library: str) -> str | None:
    """Return the installed version of a library, None without it."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _output(*command):
    """Return what a command prints, None if it fails or does not exist."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
