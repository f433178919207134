"""Run notebooks headless, keep executed copies until something they rest on changes, and open them in JupyterLab."""

import ast
import itertools
import json
import os
import secrets
import socket
import time

from vsr1 import cache, config
from vsr1.config import InputError


def run(names, profile_name: str, profile, datasets) -> None:
    """Execute notebooks: once per data set where their parameters name one, the others last and once.

    profile_name  as a person typed it: a kernel loads the profile by it
    profile       of the report: a part of the profile where seed or data sets are not its own
    """
    if profile_name.endswith(".yaml"):
        profile_name = os.path.abspath(profile_name)  # the kernel starts in another folder
    for name in sorted(names, key=takes_dataset, reverse=True):  # stable
        for dataset in datasets if takes_dataset(name) else [None]:
            started = time.time()
            ran = _run_one(name, profile_name, profile, dataset)
            took = f"{time.time() - started:.0f} s" if ran else "unchanged"
            print(f"notebook {' '.join(filter(None, (name, dataset)))}: {took}", flush=True)


def _run_one(name, profile_name, profile, dataset):
    source, declared = find(name)
    values = {"profile": profile_name, "seed": profile.seed, "dataset": dataset}
    values["datasets"] = " ".join(profile.datasets) if profile.part else ""
    parameters = {key: value for key, value in values.items() if key in declared}
    if dataset:
        return execute(source, parameters, profile, profile.runs(dataset), _steps_of(profile, dataset), ())
    home = profile.results() if profile.part else profile.run_root()
    return execute(source, parameters, profile, home, {}, _inputs_of_all(profile))


def takes_dataset(name: str) -> bool:
    """Return whether a notebook is about one data set: its parameters say so."""
    return "dataset" in find(name)[1]


def find(name: str):
    """Return (the file of a notebook, the names of its parameters). Raises InputError where there is none."""
    source = config.ROOT / "notebooks" / f"{name}.ipynb"
    if not source.exists():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("*.ipynb")))
        raise InputError(f"{source}: no such notebook; there are {known or 'none'}")
    return source, parameters(source)


def parameters(source) -> set[str]:
    """Return the names assigned in the cells tagged `parameters` of a notebook file."""
    tagged = [cell["source"] for cell in _cells(source) if "parameters" in cell["metadata"].get("tags", [])]
    statements = ast.parse("".join(itertools.chain(*tagged))).body
    return {target.id for node in statements if isinstance(node, ast.Assign) for target in node.targets}


def _cells(source):
    try:
        return json.loads(source.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: not readable as a notebook; restore it with git") from error


# --- When a copy is current


def _steps_of(profile, dataset):
    """Return {folder, from runs(dataset): key} of every finished step that a notebook about `dataset` may rest on."""
    home, runs = profile.data_dir(dataset), profile.runs(dataset)
    paths = [path for path in cache.steps(home) if not path.relative_to(home).parts[0].startswith("seed-")]
    paths += cache.steps(runs)
    return {os.path.relpath(path, runs): cache.metadata(path)["key"] for path in paths}


def _inputs_of_all(profile):
    """List what a notebook about all data sets reads: numbers and figures of the others, committed values and texts."""
    folders = [profile.runs(name) / part for name in profile.datasets for part in ("numbers", "figures")]
    paths = [path for folder in folders for path in sorted(folder.glob("*")) if path.name != "09_paper.json"]
    for part in ("seeds", "ablations"):
        paths += sorted((profile.results() / part).glob("*.json"))
    return [*paths, config.ROOT / "results" / "expected", config.ROOT / "DEVIATIONS.md"]


def execute(source, parameters: dict, profile, home, steps: dict, others) -> bool:
    """Run a notebook and keep its copy in `home`/notebooks; return False, and run nothing, if that copy is current.

    It is current while the cells, the package, the pins, the profile and every step that existed after its last run
    are the same. Steps are compared one by one: what a later notebook adds does not make an earlier one run again.

    steps   {folder: key} of now; where it is empty no step counts
    others  files and folders whose content counts as well
    """
    copy = home / "notebooks" / source.name
    record = copy.with_name(f".{source.stem}.json")
    inputs = {
        "given": parameters,
        "profile": profile.digest(),
        "cells": cache.fingerprint([[c["cell_type"], "".join(c["source"])] for c in _cells(source)]),
        "code": cache.fingerprint([cache.source_digest(name) for name in sorted(cache.SOURCES)]),
        "packages": cache.file_digest(config.ROOT / "requirements.txt"),
        "others": cache.file_digest(*(path for path in others if path.exists())),
    }
    if copy.exists() and record.exists():
        last = json.loads(record.read_text(encoding="utf-8"))
        if last["inputs"] == inputs and last["steps"].items() <= steps.items():
            return False
    copy.parent.mkdir(parents=True, exist_ok=True)
    _papermill(source, copy, parameters)
    after = _steps_of(profile, parameters["dataset"]) if "dataset" in parameters else {}
    cache.write_json(record, {"inputs": inputs, "steps": after})
    return True


def _papermill(source, copy, parameters):
    import papermill
    from nbclient.exceptions import DeadKernelError

    running, failed = (copy.with_name(f"{source.stem}.{state}.ipynb") for state in ("running", "failed"))
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": False,
        # Else kernels warn that they talk over TCP (on loopback), and some that they were interrupted at their end.
        "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"],
        "shutdown_kernel": "immediate",  # nothing is left to do then; asking a kernel to end takes two seconds
    }
    try:
        papermill.execute_notebook(source, running, parameters, cwd=source.parent, **options)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        os.replace(running, failed)
        reason = f"{source.stem}: the kernel died, most likely for lack of memory"
        if isinstance(error, papermill.PapermillExecutionError):
            reason = f"{source.stem}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise InputError(f"notebook {reason}; the executed copy is {failed}") from error
    os.replace(running, copy)
    failed.unlink(missing_ok=True)


# --- JupyterLab


def lab(port: int) -> None:
    """Run JupyterLab in this process, on loopback and with a token, until it is stopped."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}); make lab PORT={port + 1}") from error
    from jupyterlab.labapp import LabApp

    token = secrets.token_hex(24)
    print(f"JupyterLab: http://127.0.0.1:{port}/lab?token={token}   (Ctrl-C twice stops it)", flush=True)
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    options = [f"--ServerApp.{name}={value}" for name, value in server.items()]
    # Handed over inside the process: a token on a command line could be read by every user of the machine.
    options += ["--ServerApp.log_level=WARN", f"--IdentityProvider.token={token}"]
    LabApp.launch_instance([*options, f"--ServerApp.root_dir={config.ROOT}/notebooks"])
