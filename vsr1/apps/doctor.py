"""What this machine can reproduce, and what is missing: one table for `make doctor`.

A row is ok, limited (it works, with less) or missing (the profile cannot run), with what was found and a remedy.
"""

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vsr1 import config
from vsr1.config import PACKAGE, ROOT, InputError
from vsr1.data import official_release, real_datasets
from vsr1.models import loading

GB = 1024**3
# Ours, rounded up: what runs/ grows to in the mini world; two 2B models and their checkpoints beside the real videos.
DISK_GB = {"rendered": 3, "real": 60}
MEMORY_GB = {"rendered": 8, "real": 32}
GPU_GB = 24
AGAIN = "rm .venv/.ready; make doctor installs them again"


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    status: str  # ok, limited, missing
    found: str
    remedy: str = ""


def main(profile) -> int:
    """0 if `profile` can run here, else 1; prints the table and which profiles can run."""
    machine = [python(), packages(), *torch_rows(), reader(), cores()]
    rows = machine + needs(profile)
    print(f"What this machine can reproduce (profile {profile.name}; PROFILE=paper asks for the real data)\n")
    wide = max(len(row.what) for row in rows)
    for row in rows:
        remedy = f"   -> {row.remedy}" if row.remedy else ""
        print(f"{row.what:{wide}}  {row.status:8} {row.found}{remedy}")
    print()
    for path in sorted((PACKAGE / "profiles").glob("*.yaml")):
        lacking = [row.what for row in machine + needs(config.load(path.stem)) if row.status == "missing"]
        print(f"{path.stem:{wide}}  " + (f"cannot run: {', '.join(lacking)}" if lacking else "can run"))
    return int(any(row.status == "missing" for row in rows))


def python() -> Line:
    """The interpreter; the pins were chosen for 3.11."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Line("python", "ok", version)
    return Line("python", "limited", version, "the pins were chosen for 3.11; make paper PYTHON=python3.11")


def packages() -> Line:
    """Installed versions against requirements.txt; either faiss will do."""
    pins = [line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    here = {
        d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    here.setdefault("faiss-cpu", here.get("faiss-gpu"))
    off = []
    for name, pin in pins:
        version = here.get(name.lower().replace("_", "-"))
        if version is None or version.split("+")[0] != pin:
            off.append(f"{name} {version or 'absent'}, not {pin}")
    if off:
        return Line("packages", "limited", f"{len(off)} of {len(pins)} differ: {off[0]}", AGAIN)
    return Line("packages", "ok", f"all {len(pins)} as pinned")


def torch_rows() -> list[Line]:
    """torch's build, the GPU it sees, and whether faiss can use that GPU."""
    try:
        import faiss
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Line("torch, faiss", "missing", " ".join(str(error).split())[:80], AGAIN)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    rows = [Line("torch", "ok", f"{torch.__version__}, {build} build")]
    if not torch.cuda.is_available():
        rows.append(Line("GPU", "limited", "none that torch can use", "mini and smoke need none"))
        return [*rows, Line("faiss", "ok", f"{faiss.__version__}, on the CPU")]
    sizes = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    rows.append(Line("GPU", "ok", ", ".join(f"{one.name} {one.total_memory / GB:.0f} GB" for one in sizes)))
    if hasattr(faiss, "StandardGpuResources"):
        return [*rows, Line("faiss", "ok", f"{faiss.__version__}, with GPU support")]
    remedy = "rm .venv/.ready; make doctor installs faiss-gpu"
    return [*rows, Line("faiss", "limited", f"{faiss.__version__}, on the CPU: slower, same result", remedy)]


def reader() -> Line:
    """PyAV writes eight H.264 frames and decord reads them back: the whole way a mini video goes."""
    try:
        import av
        import decord

        from vsr1.data.video_writer import write_video

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            shades = range(0, 256, 32)
            write_video(path, [np.full((64, 64, 3), shade, np.uint8) for shade in shades], 8)
            count = len(decord.VideoReader(str(path), num_threads=1))
    except Exception as error:  # whatever a broken codec library raises is the finding
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return Line("video", "missing", found, AGAIN)
    if count != 8:
        return Line("video", "missing", f"wrote 8 H.264 frames, read {count}", AGAIN)
    return Line("video", "ok", f"PyAV {av.__version__} writes H.264, decord {decord.__version__} reads it")


def cores() -> Line:
    """Processor cores this process may use."""
    count = len(os.sched_getaffinity(0))
    return Line("cores", "ok", str(count)) if count > 1 else Line("cores", "limited", "1", "times double")


def needs(profile) -> list[Line]:
    """What this profile asks for beyond the packages."""
    kind = "rendered" if profile.world else "real"
    rows = [_amount("memory", memory(), MEMORY_GB[kind], "close other programs, or take a larger machine")]
    free = shutil.disk_usage(ROOT).free
    rows.append(_amount("free disk", free, DISK_GB[kind], f"free some space on the disk of {ROOT.name}/"))
    models = dict.fromkeys((profile.engine, profile.engine_large, profile.policy))
    rows += [weights(model) for model in models]
    if profile.world is None:
        rows += [large_gpu(), *(row for dataset in profile.datasets for row in real_data(profile, dataset))]
    return rows


def memory() -> int:
    """Bytes this process may use: the machine's, or its container's where that is less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def _amount(what, amount, wanted, remedy):
    # A machine sold as 8 GB shows 7.6: one tenth less is as asked.
    if amount > 0.9 * wanted * GB:
        return Line(what, "ok", f"{amount / GB:.0f} GB")
    status = "missing" if amount < 0.5 * wanted * GB else "limited"
    return Line(what, status, f"{amount / GB:.1f} GB of {wanted}", remedy)


def weights(model: str) -> Line:
    """A model's safetensors: in the clone, and whole; or from the hub, in the local cache or not yet."""
    folder, what = ROOT / model, f"weights {Path(model).name}"
    if not model.startswith("vsr1/") and not folder.exists():
        if _cached(model):
            return Line(what, "ok", "in the local hub cache")
        return Line(what, "limited", "not on this machine", "downloaded at first use; needs network")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return Line(
            what, "missing", f"no *.safetensors in {model}", "git checkout vsr1/models, or make foundation"
        )
    for file in files:
        if not _whole(file):
            return Line(what, "missing", f"{file.name} is cut short", "git checkout vsr1/models")
    size = sum(file.stat().st_size for file in files) / 1e6
    return Line(what, "ok", f"{size:.1f} MB")


def _cached(name):
    """True where the hub's cache has all files of the commit that `qwen.fetch` would ask for."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    revision = loading.revisions().get(name) or revision or None
    found = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return False
    folder = Path(found).parent
    wanted = {"model.safetensors"}
    for index in folder.glob("*.safetensors.index.json"):
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / file).exists() for file in wanted)


def _whole(file):
    """True where a safetensors file is as long as its own header says."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return False
        header = json.loads(stream.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends)


def large_gpu() -> Line:
    """A GPU that holds a 2B policy and its engine."""
    try:
        import torch
    except (ImportError, OSError):
        return Line("GPU memory", "missing", "no torch to ask", AGAIN)
    if not torch.cuda.is_available():
        return Line("GPU memory", "missing", "no GPU", f"one NVIDIA GPU with {GPU_GB} GB or more")
    size = max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return _amount("GPU memory", size, GPU_GB, f"a GPU with {GPU_GB} GB or more")


def real_data(profile, dataset) -> list[Line]:
    """What of a real data set is there, what is to be fetched, and which rows of T1 can be made of what is there."""
    home, data, table = ROOT / profile.data / dataset, f"data {dataset}", f"T1 {dataset}"
    gigabytes = official_release.size(dataset) / GB
    fetch = f"python -m vsr1 download-release --dataset {dataset} downloads about {gigabytes:.1f} GB"
    absent = [file.name for file in real_datasets.annotation_files(profile, dataset) if not file.exists()]
    if absent:
        remedy = f"{fetch}, or put it into {profile.data}/{dataset}/annotations/; then the videos"
        return [Line(data, "missing", f"no {absent[0]}", remedy), Line(table, "limited", "no row")]
    try:
        ids, found = real_datasets.videos(profile, dataset)
    except InputError as error:
        return [Line(data, "missing", str(error)), Line(table, "limited", "no row")]
    test, train = (
        sum(id in found for id in ids[split]) / max(1, len(ids[split])) for split in ("test", "train")
    )
    vectors = all((home / name).exists() for name in official_release.vector_files("test"))
    replies = profile.teacher is not None or (home / official_release.REPLIES).exists()
    size = sum(files[0].stat().st_size for files in found.values()) / GB
    told = f"annotations, videos of test {test:.1%}, of train {train:.1%} ({size:.1f} GB)"
    told += ", released vectors" * vectors + f"; runs/ takes {gigabytes:.1f} GB more for vectors"
    status, remedy = "ok", ""
    if not (test and train):
        status, remedy = "missing", f"put the videos into {profile.data}/{dataset}/videos/"
    elif not replies:
        status, remedy = "missing", f"no replies to learn stage 1 from: {fetch}, or name a teacher"
    elif min(test, train) < 1:
        status, remedy = "limited", "the queries of missing videos count as failures (videos/missing.csv)"
    rows = t1(test, train, vectors, replies)
    return [Line(data, status, told, remedy), Line(table, "ok" if rows == "all rows" else "limited", rows)]


def t1(test, train, vectors, replies) -> str:
    """Rows of T1 that part of a data set allows, by the share of videos found."""
    if test and train and replies:
        return "all rows"
    if test:
        return "ZS, walking down" + ", two-stage" * bool(train)
    return "VR of ZS and FT, by the released vectors (download-release prints it)" if vectors else "chance"
