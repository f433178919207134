"""A slow result is a file. A stage makes it once, resumes when interrupted, and is skipped while nothing changed.

"Nothing changed" is decided by content, never by file time: a clone or a branch switch touches every file's time.
"""

import ast
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import time
import types
from datetime import timedelta
from pathlib import Path

from tqdm.auto import tqdm

from vsr1.params import InputError

ALONE = types.SimpleNamespace(
    num_processes=1, process_index=0, is_main_process=True, wait_for_everyone=lambda: None
)
LONGEST = timedelta(days=7)  # ours: that the others wait while the first process builds alone


def team(device="auto"):
    """The processes that share this run: accelerate's `PartialState` under a launcher, else ALONE.

    device  as in a profile; it counts at the first call, where the processes meet
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # torchrun and `accelerate launch` set it
        return ALONE
    import torch  # only here: a stage that stands is found without it
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=LONGEST)


def progress(items, what, total=None):
    """`items`, with a bar that goes away when it is done; silent into pipes and files, and but for one process."""
    disable = None if team().is_main_process else True
    return tqdm(items, desc=what, total=total, disable=disable, leave=False, dynamic_ncols=True)


def run(target: Path, inputs: dict, build, together=False) -> Path:
    """`target`, made by `build(partial)` unless it already stands for the same `inputs`.

    `build` gets a folder beside `target` to fill; after a kill the next call finds that folder as it was left, if the
    inputs are the same, and may go on from there. The folder is renamed to `target` at the end: a `target` that exists
    is complete. `inputs` is whatever decides the content, json-able; the digests come from `digest` and `code`.
    Of two commands that want the same target the second one waits for the first. In a `team` only the first process
    decides and renames; the others wait for it, or build in the same folder where they work `together`.
    """
    key, mates = fingerprint(inputs), team()
    stands = lambda: stamp(target).get("key") == key  # noqa: E731
    if not mates.is_main_process:
        mates.wait_for_everyone()  # the first has looked
        if not stands():
            if together:
                build(_partial(target))
            mates.wait_for_everyone()  # all have built
            mates.wait_for_everyone()  # it has its name
        return target
    try:
        if not stands():
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target.with_name(f".{target.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not stands():
                    return _make(target, key, inputs, build)
        mates.wait_for_everyone()
        return target
    except OSError as error:
        if error.errno in (28, 30):  # no space left, read-only
            raise InputError(
                f"{target}: {error.strerror}; free some space and run the same command again"
            ) from error
        raise


def _partial(target):
    return target.with_name(target.name + ".partial")


def _make(target, key, inputs, build):
    partial, mates = _partial(target), team()
    if partial.exists() and stamp(partial).get("key") != key:
        shutil.rmtree(partial)
    started = time.time()
    partial.mkdir(exist_ok=True)
    spent = stamp(partial).get("seconds", 0.0)
    write_json(partial / ".stage.json", {"key": key, "seconds": spent, "inputs": inputs})
    mates.wait_for_everyone()
    build(partial)
    mates.wait_for_everyone()
    stamped = {"key": key, "seconds": spent + time.time() - started, "inputs": inputs}
    # The peak is the process's so far, in MB on Linux: an upper bound where several stages share a process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(partial / ".stage.json", stamped | {"made": time.strftime("%Y-%m-%d"), "peak_mb": peak})
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    mates.wait_for_everyone()
    return target


def stamp(target: Path) -> dict:
    """What `run` recorded about a folder: key, seconds, inputs, day, peak memory. Empty if it never did."""
    path = Path(target) / ".stage.json"
    return json.loads(path.read_text()) if path.exists() else {}


def fingerprint(inputs) -> str:
    """Sixteen hex digits of a json-able value.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def digest(*paths) -> str:
    """Sixteen hex digits of the content of files, and of all files below folders (hidden ones left out)."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if not file.name.startswith("."):
                total.update(f"{file.relative_to(path)}\0".encode())
                with open(file, "rb") as content:
                    total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


@functools.cache
def code(*modules) -> str:
    """Sixteen hex digits of what modules of this package do: comments, docstrings and layout do not count."""
    total = hashlib.sha256()
    for module in modules:
        tree = ast.parse(Path(importlib.util.find_spec(f"vsr1.{module}").origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)  # expressions have no body
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(getattr(body[0].value, "value", None), str):
                    del body[0]
        total.update(ast.dump(tree).encode())
    return total.hexdigest()[:16]


def write_json(path: Path, value) -> None:
    """`value` as json under `path`, complete or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
