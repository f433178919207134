"""The set-up hangs together: pins, Makefile, setup.sh, folders, and what must not be in a tracked file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter

import pytest
import yaml

from vsr1 import cache
from vsr1.config import ROOT

MODULES = sorted(cache.SOURCES)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pins(lines):
    """{name: version}; every line must be an exact pin."""
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][\w.]*)", line.strip()) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found}


def lock(name="requirements.txt"):
    return pins([line for line in text(name).splitlines() if line and line[0] != "#"])


def asked():
    """What pyproject.toml names: dependencies and extras."""
    project = tomllib.loads(text("pyproject.toml"))["project"]
    return pins(project["dependencies"]), {k: pins(v) for k, v in project["optional-dependencies"].items()}


def test_pyproject_and_requirements_pin_the_same_versions():
    direct, extra = asked()
    wanted = direct | extra["cpu"] | extra["test"]
    assert wanted.items() <= lock().items(), wanted.items() - lock().items()
    assert extra["gpu"].items() <= lock("requirements-gpu.txt").items()
    assert extra["gpu"] == {"faiss-gpu": extra["cpu"]["faiss-cpu"]}


def test_environment_yml_pins_the_same_versions_with_faiss_gpu():
    environment = yaml.safe_load(text("environment.yml"))
    assert "python=3.11" in environment["dependencies"] and "nodefaults" in environment["channels"]
    words = environment["dependencies"][-1]["pip"]
    direct, extra = asked()
    assert pins([word for word in words if word[0] != "-"]) == direct | extra["gpu"] | extra["test"]
    assert [word for word in words if word[0] == "-"] == [
        "-c requirements.txt",
        "-c requirements-gpu.txt",
        "-e .",
    ]


def test_the_lock_is_complete_and_what_runs_here_is_what_it_says():
    """Every requirement of an installed pinned package is pinned too: two machines get the same set."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    pinned = lock()
    for name, version in pinned.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:
            assert name == "faiss-cpu", f"{name} is pinned and not installed"  # a GPU machine has faiss-gpu
            continue
        assert package.version.split("+")[0] == version, name
        for requirement in map(Requirement, package.requires or []):
            needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                # CUDA builds of torch bring NVIDIA's libraries and triton, each pinned by torch itself
                assert needed in pinned or needed.startswith(("nvidia-", "cuda-", "triton")), (
                    f"{name}: {needed}"
                )


def test_make_help_lists_every_target_and_is_the_default():
    makefile = text("Makefile")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in shown.splitlines()[1:]}
    assert listed == phony - {"setup"}
    assert set(re.findall(r"^([a-z]+):", makefile, re.M)) - {"paper"} == phony - {"paper"}


@pytest.fixture
def clone(tmp_path):
    """A clone whose Python installs nothing: it writes down what it is asked to do."""
    for name in ("setup.sh", "requirements.txt", "requirements-gpu.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


FAKE = """#!/bin/bash
here={clone}
case "$*" in
    *sys.exit*) exit {old} ;;
    *ensurepip*) exit {bare} ;;
    *print*) echo 3.11 ;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >>"$here/calls" ;;
    "-m pip --version") ;;
    "-m pip show"*) exit 1 ;;
    "-m pip"*) echo "$*" >>"$here/calls"; [ -e "$here/broken" ] && {{ seq 30; exit 1; }}; exit 0 ;;
esac
"""


def set_up(clone, old=0, bare=0, gpu=False):
    """One run of setup.sh run with a pretended Python (too old, without venv) and a pretended GPU."""
    for name, script in {
        "fakepython": FAKE.format(clone=clone, old=old, bare=bare),
        "nvidia-smi": f"#!/bin/bash\nexit {0 if gpu else 9}\n",
    }.items():
        (clone / "bin" / name).write_text(script)
        (clone / "bin" / name).chmod(0o755)
    words = ["./setup.sh", "no-such-python fakepython"]
    path = {**os.environ, "PATH": f"{clone}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        words, cwd=clone, env=path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def calls(clone):
    return (clone / "calls").read_text().splitlines() if (clone / "calls").exists() else []


def test_set_up_installs_once_for_the_same_content(clone):
    first = set_up(clone)
    assert first.returncode == 0 and len(first.stdout.splitlines()) == 1, first
    assert [call.split()[-1] for call in calls(clone)] == ["venv", ".venv/requirements.txt", "."]
    os.utime(clone / "requirements.txt", (1, 1))
    again = set_up(clone)
    assert (again.returncode, again.stdout, len(calls(clone))) == (0, "", 3)
    with (clone / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    assert set_up(clone).returncode == 0
    assert len(calls(clone)) == 5, "new pins are installed into the same environment"


def test_set_up_takes_one_faiss_and_never_both(clone):
    for gpu, faiss in ((False, "faiss-cpu"), (True, "faiss-gpu")):
        assert set_up(clone, gpu=gpu).returncode == 0
        chosen = re.findall(r"^faiss.*?(?===)", (clone / ".venv" / "requirements.txt").read_text(), re.M)
        assert chosen == [faiss]


def test_a_failed_installation_shows_its_last_lines_and_goes_on_next_time(clone):
    (clone / "broken").touch()
    failed = set_up(clone)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[:-1] == [str(number) for number in range(16, 31)]
    assert "run the same command again" in failed.stderr.splitlines()[-1]
    (clone / "broken").unlink()
    assert set_up(clone).returncode == 0
    assert calls(clone).count("venv") == 1


@pytest.mark.parametrize(
    ("fault", "words"), [({"old": 1}, "no Python 3.11 or newer"), ({"bare": 1}, "python3.11-venv")]
)
def test_an_unusable_python_is_one_line_with_the_remedy(clone, fault, words):
    done = set_up(clone, **fault)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1 and calls(clone) == []


FOLDERS = "config cache data models loop training evaluation mini report experiments apps __main__".split()
METHOD = FOLDERS[: FOLDERS.index("mini")]


def folder_of(module):
    """The folder of a module, or the module itself where it lies in none: vsr1.data.source is in data."""
    return module.split(".")[1] if "." in module else None


def imports(module):
    """All modules of the package that `module` imports, at any depth of its code."""
    return [
        name for name in cache._imports(module) if name != "vsr1" and cache.FILES[name].stem != "__init__"
    ]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "vsr1"])
def test_a_module_imports_nothing_from_a_folder_to_its_right(module):
    allowed = FOLDERS[: FOLDERS.index(folder_of(module)) + 1]
    wrong = [name for name in imports(module) if folder_of(name) not in allowed]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


@pytest.mark.parametrize("folder", METHOD)
def test_the_method_knows_nothing_of_the_rendered_world_of_pages_and_of_notebooks(folder):
    """Not even by way of what it imports."""
    for module in MODULES:
        if folder_of(module) == folder:
            assert {folder_of(name) for name in cache.import_closure(module)} <= {*METHOD, None}, module


def test_config_and_cache_import_what_stands_before_them_only():
    assert cache.import_closure("vsr1.config") == {"vsr1.config"}
    assert cache.import_closure("vsr1.cache") == {"vsr1.cache", "vsr1.config"}


def test_no_figure_is_in_the_key_of_a_step():
    """A change of how a figure looks must not make anything run again that is not a figure."""
    keyed = [name for name, text in cache.SOURCES.items() if b"cache.source_digest(__name__)" in text]
    assert len(keyed) > 15
    for module in keyed:
        assert not {name for name in cache.import_closure(module) if name.startswith("vsr1.report")}, module


def test_a_folder_has_at_most_twelve_modules():
    modules = [name for name in MODULES if cache.FILES[name].stem != "__init__"]
    sizes = Counter(cache.FILES[name].parent for name in modules)
    assert max(sizes.values()) <= 12, sizes
    assert {folder_of(name) for name in modules} == set(FOLDERS)


def test_every_package_that_the_code_imports_is_a_dependency():
    """And no dependency is left that nobody imports."""
    names = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml", "IPython": "ipykernel"}
    names["jupyter_client"] = "ipykernel"
    names |= {"huggingface_hub": "huggingface-hub", "mpl_toolkits": "matplotlib"}
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(cache.SOURCES[module])):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    packages = {names.get(name, name) for name in found - set(sys.stdlib_module_names) - {"vsr1"}}
    direct, extra = asked()
    assert packages <= direct.keys() | extra["cpu"].keys()
    tools = {
        "jupyter-server",
        "ipywidgets",
        "nbconvert",
        "nbformat",
        "nbclient",
        "jupyterlab",
        "ipykernel",
        "decord",
    }
    assert direct.keys() - packages <= tools | {"pyarrow"}  # parquet files of pandas


def test_nothing_refers_to_a_page_that_is_not_in_the_repository():
    """Pages are named by their path from the top, or from the page that names them."""
    pages, dangling = re.compile(r"[\w./<>{}*-]*\w\.md\b"), []
    for path in tracked():
        if path.suffix in {".py", ".ipynb", ".md", ".sh", ".yml", ".yaml", ".html"} and path.exists():
            if path.is_relative_to(ROOT / "results"):
                continue  # records of runs
            for page in pages.findall(path.read_text(encoding="utf-8")):
                if path.is_relative_to(ROOT / "tests") or any(mark in page for mark in "<>{}*"):
                    continue
                places = [ROOT / page, path.parent / page, ROOT / "results" / "mini" / page]
                if not any(place.exists() for place in places):
                    dangling.append(f"{path.relative_to(ROOT)}: {page}")
    assert not dangling, sorted(set(dangling))


def test_no_code_asks_for_the_name_of_a_profile():
    asks = re.compile(r"(profile|name)\w*\s*(==|!=|in)\s*\(?[\"'](mini|smoke|paper)[\"']")
    found = [
        f"{name}: {match[0]}" for name in MODULES for match in asks.finditer(cache.SOURCES[name].decode())
    ]
    assert not found


def tracked():
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.glob("*") if path.is_file()]
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in names.split("\0") if name]


def test_no_tracked_file_names_a_path_of_somebodys_machine():
    paths = re.compile(r"(?<![\w.~/}-])/(?:home|root|work|mnt|Users|opt)/\w")
    for path in tracked():
        if path.exists() and path.suffix not in {".png", ".safetensors", ".mp4", ".faiss", ".npy"}:
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                assert not paths.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"


def test_continuous_integration_types_what_a_person_types():
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "make test" in text(".ci/run")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["DATASETS=charades"], "--profile mini --datasets charades"),
        (["DATASETS=didemo,charades", "SEED=7"], "--profile mini --seed 7 --datasets didemo charades"),
        (["PROFILE=smoke"], "--profile smoke"),
    ],
)
def test_make_paper_hands_its_variables_to_every_command(words, expected):
    shown = subprocess.run(
        ["make", "-n", "paper", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line.partition(" -m vsr1 ")[2] for line in shown.stdout.splitlines()]
    commands = [" ".join(line.split()) for line in lines if line]
    assert [command.split()[0] for command in commands] == ["paper"]
    assert all(command.endswith(expected) for command in commands), commands
