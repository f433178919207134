"""Run notebooks headless, keep executed copies, commit small ones, and open notebooks in JupyterLab."""

import ast
import base64
import io
import itertools
import json
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from vsr1 import cache, config
from vsr1.config import InputError, Profile

ONE_SEARCH = "00_one_search"  # about a policy that ships, so about no run
READS = {  # what notebooks about no data set read, where that is not the numbers of all
    ONE_SEARCH: config.ROOT / "vsr1" / "mini" / "weights",
    "06d_when_looking_pays": config.ROOT / "results" / "archives",
}
LARGEST, WIDEST, COLOURS = 200_000, 900, 128  # ours: bytes, pixels and colours of a committed output


@dataclass(frozen=True)
class Run:
    """One execution of a notebook, about one data set or about all of a profile."""

    name: str
    profile_name: str  # as a person typed it: a kernel loads the profile by it
    profile: Profile  # of the report: a part of the profile where seed or data sets are not its own
    dataset: str | None  # None: all

    @property
    def title(self) -> str:
        """Return the name of the run that a person reads."""
        return " ".join(filter(None, ("notebook", self.name, self.dataset)))

    @property
    def copy(self) -> Path:
        """Return where the executed copy is kept, and beside it what it was made from."""
        whole = self.profile.results() if self.profile.part else self.profile.run_root()
        home = self.profile.runs(self.dataset) if self.dataset else whole
        return home / "notebooks" / f"{self.name}.ipynb"

    def parameters(self) -> dict:
        """Return the values of the notebook's parameters."""
        name = self.profile_name
        values = {"profile": os.path.abspath(name) if name.endswith(".yaml") else name}
        values |= {"seed": self.profile.seed, "dataset": self.dataset}
        values["datasets"] = " ".join(self.profile.datasets) if self.profile.part else ""
        declared = parameters(find(self.name))
        return {key: value for key, value in values.items() if key in declared}

    def is_current(self) -> bool:
        """Return whether a run would give the copy that is there.

        It would while the cells, the package, the pins, the profile, the models and every step that existed after the
        last run are the same. Steps are compared one by one: what a later notebook adds does not make an earlier one
        run again.
        """
        if not (self.copy.exists() and self._record.exists()):
            return False
        last = json.loads(self._record.read_text(encoding="utf-8"))
        return last["inputs"] == self._inputs() and last["steps"].items() <= self._steps().items()

    def execute(self) -> None:
        """Run the notebook and keep its copy, unless that is current. Raises InputError where a cell fails."""
        if self.is_current():
            print(f"{self.title}: unchanged", flush=True)
            return
        self.copy.parent.mkdir(parents=True, exist_ok=True)
        inputs = self._inputs()
        self._forget_numbers()
        from vsr1.apps import kernels

        kernels.execute(find(self.name), self.copy, self.parameters())
        cache.write_json(self._record, {"inputs": inputs, "steps": self._steps()})

    def _forget_numbers(self):
        """Remove what the last run recorded: a number that has moved to another notebook would be found twice."""
        self._record.unlink(missing_ok=True)  # so a run that is stopped here is not current
        if self.dataset:
            number = self.name.partition("_")[0]
            for part in (self.profile.runs(self.dataset) / "numbers").glob(f"{number}_*.json"):
                part.unlink()

    @property
    def _record(self):
        return self.copy.with_name(f".{self.name}.json")

    def _inputs(self):
        committed = self.profile.results() / "premise" / f"{self.dataset}.json"
        others = (committed,) if self.dataset else _inputs_of_all(self.profile)
        if self.name in READS:
            others = (READS[self.name],)
        return {
            "given": self.parameters(),
            "profile": self.profile.digest(),
            "cells": cache.fingerprint(
                [[c["cell_type"], "".join(c["source"])] for c in _cells(find(self.name))]
            ),
            "code": cache.fingerprint([cache.source_digest(name) for name in sorted(cache.SOURCES)]),
            "packages": cache.file_digest(config.ROOT / "requirements.txt"),
            "models": _models(self.profile),
            "others": cache.file_digest(*(path for path in others if path.exists())),
        }

    def _steps(self):
        """Return {folder, from runs(dataset): key} of every finished step that a notebook about one may rest on."""
        if self.dataset is None:
            return {}
        home, runs = self.profile.data_dir(self.dataset), self.profile.runs(self.dataset)
        paths = [p for p in cache.steps(home) if not p.relative_to(home).parts[0].startswith("seed-")]
        paths += cache.steps(runs)
        return {os.path.relpath(path, runs): cache.metadata(path)["key"] for path in paths}


def _models(profile):
    """List what stands for the weights of each model: the content of its folder, or the hub's commit."""
    names, revisions = (profile.engine, profile.engine_large, profile.policy), config.revisions()
    return [
        cache.file_digest(folder) if (folder := config.ROOT / name).is_dir() else revisions.get(name)
        for name in names
    ]


def _inputs_of_all(profile):
    """List what a notebook about all data sets reads: numbers and figures of the others, committed values and texts."""
    folders = [profile.runs(name) / part for name in profile.datasets for part in ("numbers", "figures")]
    paths = [path for folder in folders for path in sorted(folder.glob("*")) if path.name != "09_paper.json"]
    for part in ("seeds", "ablations", "premise"):
        paths += sorted((profile.results() / part).glob("*.json"))
    return [*paths, config.ROOT / "results" / "expected"]


# --- Notebook files


def takes_dataset(name: str) -> bool:
    """Return whether a notebook is about one data set: its parameters say so."""
    return "dataset" in parameters(find(name))


def find(name: str) -> Path:
    """Return the file of a notebook. Raises InputError where there is none."""
    source = config.ROOT / "notebooks" / f"{name}.ipynb"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in source.parent.glob("*.ipynb")))
        raise InputError(f"{source}: no such notebook; there are {names or 'none'}")
    return source


def parameters(source) -> dict:
    """Return {name: value} of the literals assigned in the cells tagged `parameters` of a notebook file."""
    tagged = [cell["source"] for cell in _cells(source) if "parameters" in cell["metadata"].get("tags", [])]
    statements = ast.parse("".join(itertools.chain(*tagged))).body
    return {
        target.id: getattr(node.value, "value", None)
        for node in statements
        if isinstance(node, ast.Assign)
        for target in node.targets
    }


def _cells(source):
    try:
        return json.loads(source.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: not readable as a notebook; restore it with git") from error


# --- Copies that a code host shows


def publish(profile: Profile) -> list[Path]:
    """Write executed notebooks with small outputs to results/<profile>/notebooks/, and return their paths.

    They are those of one data set and of all of them, as the last run left them, and `ONE_SEARCH`, executed for this.
    The one data set is that of a notebook's parameters if the profile has it, else the first. Raises InputError where
    a run has left none, and for real videos, whose frames stay out of git.
    """
    if profile.world is None:
        raise InputError(f"profile {profile.name}: frames of real video stay out of git; leave --profile out")
    runs = [
        Run(path.stem, profile.name, profile, _shown_dataset(profile, path))
        for path in sorted((config.ROOT / "notebooks").glob("*.ipynb"))
        if "videos" not in parameters(path)  # a folder of the reader's
    ]
    missing = [run for run in runs if run.name != ONE_SEARCH and not run.copy.exists()]
    if missing:
        raise InputError(f"{missing[0].copy}: not executed yet; run `make paper` first")
    next(run for run in runs if run.name == ONE_SEARCH).execute()
    home = profile.results() / "notebooks"
    home.mkdir(parents=True, exist_ok=True)
    for path in home.glob("*.ipynb"):
        path.unlink()
    for run in runs:
        book = small_copy(json.loads(run.copy.read_text(encoding="utf-8")))
        text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
        cache.write_text(home / f"{run.name}.ipynb", text)
    return sorted(home.glob("*.ipynb"))


def _shown_dataset(profile, path):
    dataset = parameters(path).get("dataset")
    return profile.datasets[0] if dataset and dataset not in profile.datasets else dataset


def small_copy(book: dict) -> dict:
    """Return an executed notebook for git: no stderr, no absolute path, and no output beyond `LARGEST`."""
    cells = [{**cell, "metadata": {}} for cell in book["cells"]]
    for cell in cells:
        if cell["cell_type"] == "markdown":  # relative links start two folders further down
            cell["source"] = re.sub(r"\]\(\.\./", "](../../../", "".join(cell["source"]))
        else:
            outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            cell["outputs"] = [_small_output(output) for output in outputs]
    metadata = {key: book["metadata"][key] for key in ("kernelspec", "language_info")}
    return {**book, "cells": cells, "metadata": metadata}


def _small_output(output):
    if "text" in output:
        return {**output, "text": _relative("".join(output["text"]))[:LARGEST]}
    data = {}
    for kind, value in output.get("data", {}).items():
        text = "".join(value) if isinstance(value, list) else value
        if kind == "image/png":
            data[kind] = _small_png(text)
        elif isinstance(text, str):
            data[kind] = _relative(text)
    large = [kind for kind, value in data.items() if len(value) > LARGEST]
    for kind in large:
        size = len(data.pop(kind)) // 1000
        data["text/plain"] = f"{kind} of {size} kB, left out here: run the notebook to see it"
    return {**output, "data": data, "metadata": {}}


def _small_png(text):
    """Return a picture in base64, at most WIDEST pixels wide, with few colours where that makes it smaller."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(text))) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDEST, 100 * WIDEST))
    files = []
    for version in (picture, picture.quantize(COLOURS)):
        version.save(file := io.BytesIO(), "png", optimize=True)
        files.append(file.getvalue())
    return base64.b64encode(min(files, key=len)).decode()


def _relative(text):
    """Return a text with paths of this machine cut down to what follows the clone."""
    return re.sub(
        r"(?<![\w.:/~])/(?:[\w.@+-]+/)+?(?=(?:runs|results|vsr1|notebooks|indexes|docs)/)", "", text
    )


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
