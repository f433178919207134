"""Every notebook runs on the smoke profile and keeps the shape of a tutorial."""

import ast
import base64
import io
import json
import re
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from test_docs import dead, prose
from traitlets.config import Config

from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.apps import notebooks
from vsr1.config import ROOT, InputError

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = sorted((ROOT / "results" / "mini" / "notebooks").glob("*.ipynb"))
OWN_INPUT = {"10_your_videos"}  # asks for a folder of the reader's videos: not part of `make paper`
# The tables of a second data set. All notebooks of a third, by the command and in kernels: test_real_paper.
ALSO_CHARADES = ("01_corpus_embedding", "03_sft_cold_start", "04_grpo_training", "05b_two_stage")


def runs():
    """(notebook, data set) pairs in the order of the paper; None for a notebook that takes no data set."""
    for path in NOTEBOOKS:
        if path.stem not in OWN_INPUT:
            takes_one = "dataset" in notebooks.parameters(path)
            second = ["charades"] if path.stem in ALSO_CHARADES else []
            for dataset in ["didemo", *second] if takes_one else [None]:
                yield pytest.param(path.stem, dataset, id="-".join(filter(None, (path.stem, dataset))))


@pytest.fixture(scope="module")
def smoke():
    """The smoke corpora and their vectors, on disk."""
    for command in ("corpus", "embed"):
        assert cli.main([command, "--profile", "smoke", "--datasets", "didemo,charades", "--jobs", "1"]) == 0


@pytest.fixture
def shell(monkeypatch):
    """The cells of one notebook run in this process, as in a kernel: one that starts imports torch first."""
    monkeypatch.chdir(ROOT / "notebooks")
    with pd.option_context("display.max_colwidth", None):  # given back when the notebook has ended
        yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()
    plt.close("all")


@pytest.mark.parametrize(("name", "dataset"), list(runs()))
def test_a_notebook_runs_on_smoke(smoke, shell, name, dataset):
    """`ONE_SEARCH` runs as it is, on the few films of the demo."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            shell.run_cell(source(cell)).raise_error()
        if number == 1 and name != notebooks.ONE_SEARCH:  # as papermill replaces the parameters, see below
            shell.push({"profile": "smoke"} | ({"dataset": dataset} if dataset else {}))


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


def test_cells_have_ids_of_their_own(book):
    ids = [cell["id"] for cell in book["cells"]]
    assert len(ids) == len(set(ids))


def test_a_notebook_stays_readable(book):
    """At most 40 cells, of 25 lines, 6 in the median; and prose between any two code cells after the first three."""
    lengths = [len(source(cell).splitlines()) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(book["cells"]) <= 40
    assert max(lengths) <= 25 and statistics.median(lengths) <= 6, lengths
    assert all(length > 0 for length in lengths), "an empty cell"
    assert book["cells"][-1]["cell_type"] == "code", "the last cell prints the answer"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_records_carries_its_number(path):
    """For a notebook that runs anew removes what carries its number, see `notebooks.Run`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "code")
    for part in re.findall(r'results\.record\(\s*profile,\s*dataset,\s*"(\w+)"', code):
        assert part.partition("_")[0] == path.stem.partition("_")[0], part


def test_a_notebook_does_not_touch_its_surroundings(book):
    text = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "code")
    for phrase in ("!pip", "%pip", "%cd", "sys.path", "autoreload", "os.chdir", "/home/"):
        assert phrase not in text, phrase


# --- Executed copies that are committed


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_an_executed_copy_shows_no_failure_and_nothing_of_the_machine_it_ran_on(path):
    text = path.read_text(encoding="utf-8")
    assert "Traceback" not in text and '"output_type": "error"' not in text and "papermill" not in text
    assert not re.findall(r"(?<![\\w.:/<])/(?:home|root|tmp|work|Users|opt|usr)/", text)
    assert not dead(path, prose(path))
    codes = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in codes), "no output to look at"


def test_executed_copies_are_of_the_notebooks_and_small():
    """Copies are made by hand, by `make publish`: a notebook that has none yet is no failure."""
    assert {path.name for path in EXECUTED} <= {path.name for path in NOTEBOOKS}
    assert sum(path.stat().st_size for path in EXECUTED) < 6_000_000


def test_a_small_copy_keeps_what_a_reader_sees_and_nothing_of_the_machine():
    noise = np.random.default_rng(1).integers(0, 256, (600, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(noisy := io.BytesIO(), "png")
    Image.new("RGB", (1800, 600), "white").save(plain := io.BytesIO(), "png")
    noisy, plain = (base64.b64encode(file.getvalue()).decode() for file in (noisy, plain))
    shown = [
        {"output_type": "stream", "name": "stderr", "text": ["a warning"]},
        {
            "output_type": "stream",
            "name": "stdout",
            "text": ["in /a/b.c/clone/runs/mini/x.npz\n", "1/2 and/or\n"],
        },
        {
            "output_type": "display_data",
            "data": {"image/png": noisy, "text/plain": ["<image>"]},
            "metadata": {},
        },
        {"output_type": "display_data", "data": {"image/png": plain}, "metadata": {"a": 1}},
    ]
    cells = [
        {
            "cell_type": "markdown",
            "metadata": {},
            "source": ["see [it](../docs/method.md), ", "[02](02_a.ipynb)"],
        },
        {"cell_type": "code", "metadata": {"papermill": {"a": "/x"}}, "source": ["1"], "outputs": shown},
    ]
    kernel = {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": {**kernel, "papermill": {"output_path": "/x"}}, "nbformat": 4}
    copy = notebooks.small_copy(book)
    assert copy["metadata"] == kernel and copy["cells"][1]["metadata"] == {}
    assert copy["cells"][0]["source"] == "see [it](../../../docs/method.md), [02](02_a.ipynb)"
    printed, large, small = copy["cells"][1]["outputs"]
    assert printed["text"] == "in runs/mini/x.npz\n1/2 and/or\n"
    assert "image/png of" in large["data"]["text/plain"] and "image/png" not in large["data"]
    with Image.open(io.BytesIO(base64.b64decode(small["data"]["image/png"]))) as picture:
        assert picture.size == (900, 300)


def test_frames_of_real_video_are_not_published():
    with pytest.raises(InputError, match="stay out of git"):
        notebooks.publish(config.load("paper"))
