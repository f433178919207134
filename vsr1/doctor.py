"""What this machine can reproduce, and what is missing: one table for `make doctor`.

A row is ok, limited (it works, with less) or missing (the profile cannot run), with what was found and a remedy.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vsr1 import corpus, params
from vsr1.params import HERE, ROOT

GB = 1024**3
# Ours, rounded up: what runs/ grows to in the mini world; two 2B models and their checkpoints beside the real videos.
DISK_GB = {"rendered": 3, "real": 60}
MEMORY_GB = {"rendered": 8, "real": 32}
GPU_GB = 24
AGAIN = "rm .venv/.ready; make doctor installs them again"


@dataclass(frozen=True)
class Row:
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
    for path in sorted((HERE / "profiles").glob("*.yaml")):
        lacking = [row.what for row in machine + needs(params.load(path.stem)) if row.status == "missing"]
        print(f"{path.stem:{wide}}  " + (f"cannot run: {', '.join(lacking)}" if lacking else "can run"))
    return int(any(row.status == "missing" for row in rows))


def python() -> Row:
    """The interpreter; the pins were chosen for 3.11."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Row("python", "ok", version)
    return Row("python", "limited", version, "the pins were chosen for 3.11; make paper PYTHON=python3.11")


def packages() -> Row:
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
        return Row("packages", "limited", f"{len(off)} of {len(pins)} differ: {off[0]}", AGAIN)
    return Row("packages", "ok", f"all {len(pins)} as pinned")


def torch_rows() -> list[Row]:
    """torch's build, the GPU it sees, and whether faiss can use that GPU."""
    try:
        import faiss
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return [Row("torch, faiss", "missing", " ".join(str(error).split())[:80], AGAIN)]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    rows = [Row("torch", "ok", f"{torch.__version__}, {build} build")]
    if not torch.cuda.is_available():
        rows.append(Row("GPU", "limited", "none that torch can use", "mini and smoke need none"))
        return [*rows, Row("faiss", "ok", f"{faiss.__version__}, on the CPU")]
    sizes = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    rows.append(Row("GPU", "ok", ", ".join(f"{one.name} {one.total_memory / GB:.0f} GB" for one in sizes)))
    if hasattr(faiss, "StandardGpuResources"):
        return [*rows, Row("faiss", "ok", f"{faiss.__version__}, with GPU support")]
    remedy = "rm .venv/.ready; make doctor installs faiss-gpu"
    return [*rows, Row("faiss", "limited", f"{faiss.__version__}, on the CPU: slower, same result", remedy)]


def reader() -> Row:
    """PyAV writes eight H.264 frames and decord reads them back: the whole way a mini video goes."""
    try:
        import av
        import decord

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "clip.mp4")
            with av.open(path, "w") as clip:
                stream = clip.add_stream("libx264", rate=8)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv420p"
                for shade in range(0, 256, 32):
                    picture = np.full((64, 64, 3), shade, np.uint8)
                    clip.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                clip.mux(stream.encode())
            count = len(decord.VideoReader(path, num_threads=1))
    except Exception as error:  # whatever a broken codec library raises is the finding
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        return Row("video", "missing", found, AGAIN)
    if count != 8:
        return Row("video", "missing", f"wrote 8 H.264 frames, read {count}", AGAIN)
    return Row("video", "ok", f"PyAV {av.__version__} writes H.264, decord {decord.__version__} reads it")


def cores() -> Row:
    """Processor cores this process may use."""
    count = len(os.sched_getaffinity(0))
    return Row("cores", "ok", str(count)) if count > 1 else Row("cores", "limited", "1", "times double")


def needs(profile) -> list[Row]:
    """What this profile asks for beyond the packages."""
    kind = "rendered" if profile.world else "real"
    rows = [_amount("memory", memory(), MEMORY_GB[kind], "close other programs, or take a larger machine")]
    free = shutil.disk_usage(ROOT).free
    rows.append(_amount("free disk", free, DISK_GB[kind], f"free some space on the disk of {ROOT.name}/"))
    rows += [weights(engine) for engine in dict.fromkeys((profile.engine, profile.engine_large))]
    if profile.world is None:
        rows += [large_gpu(), *(real_data(profile, dataset) for dataset in profile.datasets)]
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
        return Row(what, "ok", f"{amount / GB:.0f} GB")
    status = "missing" if amount < 0.5 * wanted * GB else "limited"
    return Row(what, status, f"{amount / GB:.1f} GB of {wanted}", remedy)


def weights(engine) -> Row:
    """The engine's safetensors: in the clone, whole and unchanged; or from the hub, in the local cache or not yet."""
    folder, what = ROOT / engine, f"weights {Path(engine).name}"
    if not engine.startswith("vsr1/") and not folder.exists():
        import huggingface_hub

        if isinstance(huggingface_hub.try_to_load_from_cache(engine, "config.json"), str):
            return Row(what, "ok", "in the local hub cache")
        return Row(what, "limited", "not on this machine", "downloaded at first use; needs network")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return Row(
            what, "missing", f"no *.safetensors in {engine}", "git checkout vsr1/models, or make foundation"
        )
    sums = folder.parent / "SHA256SUMS"  # in sha256sum's own format
    known = dict(reversed(line.split()) for line in sums.read_text().splitlines()) if sums.exists() else {}
    for file in files:
        if not _whole(file):
            return Row(what, "missing", f"{file.name} is cut short", "git checkout vsr1/models")
        wanted = known.get(file.relative_to(folder.parent).as_posix())
        if wanted and hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            return Row(what, "limited", f"{file.name} is not the one that ships", "git checkout vsr1/models")
    size = sum(file.stat().st_size for file in files) / 1e6
    return Row(what, "ok", f"{size:.1f} MB" + ("" if known else ", no checksum to compare"))


def _whole(file):
    """True where a safetensors file is as long as its own header says."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return False
        header = json.loads(stream.read(length))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + length + max(ends)


def large_gpu() -> Row:
    """A GPU that holds a 2B policy and its engine."""
    try:
        import torch
    except (ImportError, OSError):
        return Row("GPU memory", "missing", "no torch to ask", AGAIN)
    if not torch.cuda.is_available():
        return Row("GPU memory", "missing", "no GPU", f"one NVIDIA GPU with {GPU_GB} GB or more")
    size = max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return _amount("GPU memory", size, GPU_GB, f"a GPU with {GPU_GB} GB or more")


def real_data(profile, dataset) -> Row:
    """Annotation files and a folder of videos for one real data set."""
    folder = ROOT / profile.data / dataset
    absent = [name for name in corpus.FILES[dataset] if not (folder / "annotations" / name).exists()]
    videos = sum(1 for _ in (folder / "videos").glob("*")) if (folder / "videos").is_dir() else 0
    if absent:
        remedy = f"put it into {profile.data}/{dataset}/annotations/"
        return Row(f"data {dataset}", "missing", f"no {absent[0]}, {videos} videos", remedy)
    if not videos:
        return Row(
            f"data {dataset}", "missing", "no videos", f"put them into {profile.data}/{dataset}/videos/"
        )
    return Row(f"data {dataset}", "ok", f"annotations, {videos} videos")
