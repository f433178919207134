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
from pathlib import Path

from tqdm.auto import tqdm

from vsr1.params import InputError


def progress(items, what, total=None):
    """`items`, with a bar that goes away when it is done; silent into pipes and files."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False, dynamic_ncols=True)


def run(target: Path, inputs: dict, build) -> Path:
    """`target`, made by `build(partial)` unless it already stands for the same `inputs`.

    `build` gets a folder beside `target` to fill; after a kill the next call finds that folder as it was left, if the
    inputs are the same, and may go on from there. The folder is renamed to `target` at the end: a `target` that exists
    is complete. `inputs` is whatever decides the content, json-able; the digests come from `digest` and `code`.
    Of two processes that want the same target the second one waits for the first.
    """
    key = fingerprint(inputs)
    if stamp(target).get("key") == key:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return target if stamp(target).get("key") == key else _make(target, key, inputs, build)
    except OSError as error:
        if error.errno in (28, 30):  # no space left, read-only
            raise InputError(
                f"{target}: {error.strerror}; free some space and run the same command again"
            ) from error
        raise


def _make(target, key, inputs, build):
    partial = target.with_name(target.name + ".partial")
    if partial.exists() and stamp(partial).get("key") != key:
        shutil.rmtree(partial)
    started = time.time()
    partial.mkdir(exist_ok=True)
    spent = stamp(partial).get("seconds", 0.0)
    write_json(partial / ".stage.json", {"key": key, "seconds": spent, "inputs": inputs})
    build(partial)
    stamped = {"key": key, "seconds": spent + time.time() - started, "inputs": inputs}
    # The peak is the process's so far, in MB on Linux: an upper bound where several stages share a process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(partial / ".stage.json", stamped | {"made": time.strftime("%Y-%m-%d"), "peak_mb": peak})
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
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
