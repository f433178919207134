"""Every notebook runs on the smoke profile, by the commands of `make paper`, and keeps the shape of a tutorial."""

import ast
import json
import statistics
import subprocess
import sys

import pytest

from vsr1.apps import notebooks
from vsr1.config import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DATASETS = ("charades", "didemo")  # activitynet: in the layout of the real data, test_real_paper
OWN_INPUT = {"10_your_videos"}  # asks for a folder of the reader's videos: not part of `make paper`


def vsr1(*words):
    """One command in a process of its own, as a person runs it; its output is shown when it fails."""
    command = [sys.executable, "-m", "vsr1", *words, "--profile", "smoke"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def smoke():
    """The smoke corpora and their vectors, on disk."""
    vsr1("corpus", "--datasets", *DATASETS)
    vsr1("embed", "--datasets", *DATASETS)


def runs():
    """(notebook, data set) pairs; None for a notebook that takes no data set."""
    for path in NOTEBOOKS:
        if path.stem not in OWN_INPUT:
            for dataset in DATASETS if "dataset" in notebooks.parameters(path) else [None]:
                yield pytest.param(path.stem, dataset, id="-".join(filter(None, (path.stem, dataset))))


@pytest.mark.parametrize(("name", "dataset"), list(runs()))
def test_a_notebook_runs_on_smoke(smoke, name, dataset):
    vsr1("notebook", name, *(["--datasets", dataset] if dataset else []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def book(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_a_notebook_is_committed_without_outputs(book):
    for cell in book["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "papermill" not in cell["metadata"]
    assert "papermill" not in book["metadata"] and "widgets" not in book["metadata"]


def test_a_notebook_names_its_kernel(book):
    """Without it papermill and JupyterLab ask, or guess."""
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert book["metadata"]["language_info"]["name"] == "python"


def test_the_second_cell_holds_the_parameters_as_literals(book):
    assert book["cells"][0]["cell_type"] == "markdown", "the first cell asks the question"
    tagged = [i for i, cell in enumerate(book["cells"]) if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [1]
    for statement in ast.parse(source(book["cells"][1])).body:
        # A value derived here would not follow when papermill injects another one.
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant), ast.unparse(
            statement
        )


def test_a_notebook_stays_readable(book):
    """At most 40 cells, of 25 lines, 6 in the median; and prose between any two code cells after the first three."""
    lengths = [len(source(cell).splitlines()) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(book["cells"]) <= 40
    assert max(lengths) <= 25 and statistics.median(lengths) <= 6, lengths
    assert all(length > 0 for length in lengths), "an empty cell"
    assert book["cells"][-1]["cell_type"] == "code", "the last cell prints the answer"


def test_a_notebook_does_not_touch_its_surroundings(book):
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "code")
    for phrase in ("!pip", "%pip", "%cd", "sys.path", "autoreload", "os.chdir", "/home/"):
        assert phrase not in text, phrase
