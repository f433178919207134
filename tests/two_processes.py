"""Two processes of one run, by torchrun, or forked from a server that has imported torch, which takes ten seconds."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

from vsr1 import config

FOLDERS = [config.ROOT, *(config.ROOT / "tests" / name for name in ("", "evaluation", "training"))]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["one_of_two"])
PATHS = {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}


def by_torchrun(job, *words):
    """tests/one_of_two.py with these words, in two processes on the CPU, as a person starts them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(config.ROOT / "tests" / "one_of_two.py"), job, *map(str, words)]
    return subprocess.run(command, cwd=config.ROOT, env=os.environ | PATHS, capture_output=True, text=True)


def forked(job, folder, *words):
    """The same, told by the same variables; when one process has failed the other is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    outputs, two = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")], []
    for path in outputs:
        path.write_text("")
    with mock.patch.dict(os.environ, PATHS):  # the server finds what it imports
        for rank in "01":
            environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
            two.append(
                SERVER.Process(target=_work, args=(environment, outputs, job, folder, *map(str, words)))
            )
            two[-1].start()
    while any(process.is_alive() for process in two) and not any(process.exitcode for process in two):
        time.sleep(0.02)
    statuses = [process.exitcode for process in two]
    for process in two:
        process.terminate()
        process.join()
    stdout, stderr = (path.read_text() for path in outputs)
    return SimpleNamespace(returncode=next(filter(None, statuses), 0), stdout=stdout, stderr=stderr)


def _work(environment, outputs, job, *words):
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    sys.exit(getattr(importlib.import_module("one_of_two"), job)(*words))
