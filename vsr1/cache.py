"""Keep slow results in folders: build a step once, resume it after a kill, keep what it replaces.

"Nothing changed" is decided by content, never by file time: a clone or a branch switch touches every file's time.
"""

import ast
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import time
import types
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from tqdm.auto import tqdm

from vsr1.config import PACKAGE, InputError

SINGLE_PROCESS = types.SimpleNamespace(
    num_processes=1, process_index=0, is_main_process=True, wait_for_everyone=lambda: None
)
BARRIER_TIMEOUT = timedelta(days=7)  # ours: the other ranks wait this long while rank 0 builds alone
RECORD = ".step.json"  # what `build` knows about a folder
REPLACED = ".replaced"  # where results go whose inputs changed; `make clean` removes them
# Knobs enter a key by value, and how a result is kept does not change it.
NOT_CODE = {"vsr1", "vsr1.config", "vsr1.cache"}


# --- Several processes, and progress


def dist_state(device="auto"):
    """Return the processes that share this run: accelerate's `PartialState` under a launcher, else SINGLE_PROCESS.

    device  as in a profile; it counts at the first call, where the processes meet
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # torchrun and `accelerate launch` set it
        return SINGLE_PROCESS
    import torch  # only here: a step that is current is found without it
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=BARRIER_TIMEOUT)


def progress(items, label, total=None):
    """Iterate over `items` with a bar that goes away at the end; silent in pipes, files and all ranks but 0.

    Silent too in processes that work side by side: their bars would overwrite each other.
    """
    disable = None if dist_state().is_main_process and multiprocessing.parent_process() is None else True
    return tqdm(items, desc=label, total=total, disable=disable, leave=False, dynamic_ncols=True)


# --- Steps


def build(target: Path, inputs: dict, work, distributed=False) -> Path:
    """Return `target`, built by `work(folder)` unless it is current: built from the same `inputs`.

    `work` fills a folder beside `target`, which is renamed at the end, so a `target` that exists is complete. After a
    kill the next call with the same inputs finds the folder as it was left and may resume from it. A `target` that was
    built from other inputs moves to `.replaced/` beside it; it moves back when those inputs return.

    inputs       json-able: all that decides the content, with digests from `file_digest` and `source_digest`
    distributed  with several processes: every rank calls `work` on the shared folder; else rank 0 alone

    A second command that wants the same target waits for the first. Rank 0 checks and renames; the others wait.
    """
    key, ranks = fingerprint(inputs), dist_state()
    if not ranks.is_main_process:
        ranks.wait_for_everyone()  # rank 0 has checked
        if metadata(target).get("key") != key:
            if distributed:
                work(_partial(target, key))
            ranks.wait_for_everyone()  # all have built
            ranks.wait_for_everyone()  # rank 0 has renamed
        return target
    if metadata(target).get("key") != key:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if metadata(target).get("key") != key and not _restore(target, key):
                _build(target, key, inputs, work)
                return target
    ranks.wait_for_everyone()
    return target


def _partial(target, key):
    return target.with_name(f"{target.name}.{key}.partial")


def _build(target, key, inputs, work):
    """Fill the partial folder and give it its name."""
    partial, ranks = _partial(target, key), dist_state()
    partial.mkdir(exist_ok=True)
    spent, started = _seconds_spent(partial), time.time()
    write_json(partial / RECORD, {"key": key, "seconds": spent, "started": started, "inputs": inputs})
    ranks.wait_for_everyone()
    work(partial)
    ranks.wait_for_everyone()
    # The peak is the process's so far, in MB on Linux: an upper bound where several steps share a process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record = {"key": key, "seconds": spent + time.time() - started, "inputs": inputs}
    write_json(partial / RECORD, record | {"made": time.strftime("%Y-%m-%d"), "peak_mb": peak})
    _replace(target)
    os.replace(partial, target)
    ranks.wait_for_everyone()


def _seconds_spent(partial):
    """Return the seconds of earlier attempts: until the last file that a killed one wrote."""
    record = metadata(partial)
    if "started" not in record:
        return 0.0
    last = max(path.stat().st_mtime for path in partial.rglob("*") if path.is_file())
    return record["seconds"] + max(0.0, last - record["started"])


def _replace(target):
    """Move a result that was built from other inputs out of the way; nothing is deleted."""
    if target.exists():
        key = metadata(target).get("key") or f"unknown-{time.time_ns()}"  # a folder that `build` did not make
        replaced = target.parent / REPLACED / f"{target.name}.{key}"
        replaced.parent.mkdir(exist_ok=True)
        if replaced.exists():  # the same inputs were built a second time: their older copy goes
            shutil.rmtree(replaced)
        os.replace(target, replaced)


def _restore(target, key):
    """Bring a replaced result back if it was built from these inputs."""
    replaced = target.parent / REPLACED / f"{target.name}.{key}"
    if metadata(replaced).get("key") != key:
        return False
    _replace(target)
    os.replace(replaced, target)
    return True


def metadata(target: Path) -> dict:
    """Return what `build` recorded about a folder: key, seconds, inputs, day, peak memory; {} if it never built it."""
    path = Path(target) / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def steps(folder: Path) -> list[Path]:
    """List the folders of all finished steps below `folder`, sorted; replaced and partial ones are left out."""
    paths = (path.parent for path in Path(folder).rglob(RECORD))
    return sorted(path for path in paths if path.suffix != ".partial" and REPLACED not in path.parts)


# --- Keys


def fingerprint(inputs) -> str:
    """Hash a json-able value to sixteen hex digits.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(*paths) -> str:
    """Hash the content of files, and of all files below folders, to sixteen hex digits.

    Below a folder, files and folders whose name begins with a dot are left out.
    """
    total = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path)
            if not any(part.startswith(".") for part in name.parts):
                total.update(f"{name}\0".encode())
                with open(file, "rb") as content:
                    total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def _module_name(path):
    """Return the dotted name under which a source file of the package is imported."""
    return ".".join(("vsr1", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
# Read when this module is imported: an edit while a command runs does not stamp results of the old code as new ones.
SOURCES = {name: path.read_bytes() for name, path in FILES.items()}


def _refuse_edited(name, path=None, target=None):
    """Refuse to import a module that was edited since SOURCES; leave all else to the next import finder."""
    if name in FILES and FILES[name].read_bytes() != SOURCES[name]:
        raise InputError(f"{FILES[name]}: edited since this process began; restart it, or the kernel")


sys.meta_path.insert(0, types.SimpleNamespace(find_spec=_refuse_edited))


def source_digest(module: str) -> str:
    """Hash what a module of the package and all it imports from the package do, to sixteen hex digits.

    module  `__name__` of the caller

    Comments, docstrings, layout and the texts of errors and warnings do not count.
    """
    return fingerprint({name: _digest(name) for name in import_closure(module) - NOT_CODE})


@functools.cache
def _digest(name):
    """Hash what one module does."""
    return hashlib.sha256(ast.dump(_without_words(ast.parse(SOURCES[name]))).encode()).hexdigest()


def import_closure(module: str) -> set[str]:
    """Return the modules of this package that `module` imports, directly or not, and itself."""
    closure, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in SOURCES and name not in closure:
            closure.add(name)
            todo += _imports(name)
    return closure


@functools.cache
def _imports(name):
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(imported & set(SOURCES))


def _without_words(tree):
    """Drop what no result depends on: docstrings, arguments of raised errors and of warnings, assertion messages."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)  # expressions have no body
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(getattr(body[0].value, "value", None), str):
                del body[0]
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
        elif isinstance(node, ast.Assert):
            node.msg = None
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("warn", "progress"):
            node.args = [arg for arg in node.args if not isinstance(arg, (ast.Constant, ast.JoinedStr))]
    return tree


# --- Files


@contextmanager
def replacing(path: Path):
    """Give a binary file to write that becomes `path` at the end of the block, complete or not at all."""
    scratch = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            yield file
        os.replace(scratch, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, complete or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value) -> None:
    """Write `value` as json to `path`, complete or not at all; a list of numbers takes one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # A line never ends inside a string, so nothing but lists can look like this.
    text = re.sub(r'\[\n([^]["{}]*)\n *\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    write_text(path, text + "\n")


@contextmanager
def locked(path: Path):
    """Hold the lock that belongs to `path` for the time of the block; other processes wait for it."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def updated_json(path: Path):
    """Give the value in a json file, {} if there is none, to a block that changes it; then write it.

    Other processes that update the same file wait, so that no change is lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        yield value
        write_json(path, value)


class JsonlLog:
    """A file of JSON lines that a resumed run goes on with: `rows` are those it has.

    A line that a kill cut short is dropped at once. One process writes.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.touch()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        self.rows = [json.loads(line) for line in lines]
        self._sizes = [len(line) + 1 for line in lines]  # bytes
        self.truncate(len(lines))

    def truncate(self, count: int) -> None:
        """Keep the first `count` lines."""
        del self.rows[count:], self._sizes[count:]
        os.truncate(self.path, sum(self._sizes))

    def truncate_after(self, step: int) -> None:
        """Keep the lines up to a step, which each line names; 0: none, for the run begins again."""
        self.truncate(sum(row["step"] <= step for row in self.rows) if step else 0)

    def append(self, *rows: dict) -> None:
        """Write rows at the end, all at once."""
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        with open(self.path, "ab") as file:
            file.write(b"".join(lines))
        self.rows += rows
        self._sizes += map(len, lines)
