"""The command line: exit statuses, one-line errors, and notebooks that run once and fail without losing anything."""

import errno
import json
import re
import socket
import subprocess
import sys

import fake
import nbformat
import pytest
import torch

from vsr1 import __main__ as cli
from vsr1 import cache, config
from vsr1.apps import pipeline
from vsr1.config import ROOT


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A clone of its own: notebooks/ and runs/ below a temporary folder, the package where it is."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "vsr1").symlink_to(ROOT / "vsr1")
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path


def notebook(home, *cells, given='profile = "mini"\ndataset = "charades"\nseed = 42', name="00_try"):
    """A notebook file in `home` with a parameters cell and these code cells; no kernelspec, as the worst case."""
    parameters = nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    nbformat.write(book, home / "notebooks" / f"{name}.ipynb")


def run(capsys, *words):
    """Exit status, stdout and stderr of one command, in this process."""
    alone = ["--jobs", "1"] * (
        words[:1] in (("corpus",), ("embed",), ("notebook",)) and "--jobs" not in words
    )
    status = cli.main([*words, *alone])
    return status, *capsys.readouterr()


def test_bad_input_is_one_line_and_status_two(capsys):
    for words in (
        ["corpus", "--profile", "maxi"],
        ["embed", "--datasets", "charade"],
        ["notebook", "no_such"],
        ["embed", "--seed", "-1"],
        ["embed", "--jobs", "0"],
        ["seeds", "--seeds", "one"],
        ["train", "--dataset", "charades", "--stage", "rl"],
        ["train", "--stage", "sft"],
        ["no-such-command"],
        ["lab", "--port", "many"],
        ["report", "--datasets", "charade"],
        [],
    ):
        status, out, err = run(capsys, *words)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: .+\n", err), err


def test_a_real_process_shows_no_traceback_for_bad_input():
    command = [sys.executable, "-m", "vsr1", "corpus", "--profile", "maxi"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_without_faiss_a_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "corpus")
    assert status == 2 and err.startswith("error: faiss is not installed; `make` does it")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(pipeline, "corpus", lambda *_: {}["absent"])
    with pytest.raises(KeyError):
        cli.main(["corpus", "--jobs", "1"])


def test_too_little_memory_and_a_launcher_that_splits_models_are_one_line_each(monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipeline, "corpus", full)
    status, _, err = run(capsys, "corpus")
    assert status == 2 and re.fullmatch(
        r"error: not enough memory \(CUDA .*\); lower batch_tokens, .*\n", err
    )
    for name in ("FSDP", "DeepSpeed"):
        with monkeypatch.context() as asked:
            asked.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
            status, _, err = run(capsys, "corpus")
        assert status == 2
        assert err == f"error: accelerate: {name} is not supported; launch with `--multi_gpu`\n"


def test_a_full_disk_is_one_line_and_an_interrupt_another(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "corpus", full)
    status, _, err = run(capsys, "corpus", "--jobs", "1")
    assert status == 2 and "No space left on device; make room there" in err and err.count("\n") == 1
    monkeypatch.setattr(pipeline, "corpus", stopped)
    assert run(capsys, "corpus", "--jobs", "1") == (130, "", "stopped; run the same command again to go on\n")


def test_an_option_takes_several_words_and_leaves_other_words_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "evaluate", lambda profile, dataset, name: seen.append((dataset, name)))
    for words in (["--dataset", "charades", "zs", "sft"], ["zs", "sft", "--dataset", "charades"]):
        assert cli.main(["evaluate", *words]) == 0
    assert seen == [("charades", "zs"), ("charades", "sft")] * 2


def test_archives_are_measured_a_corpus_and_seed_at_a_time(monkeypatch, capsys):
    """In the words of docs/archives.md: both cells of one corpus are one step, which renders and trains once."""
    steps = []
    monkeypatch.setattr(pipeline, "run", lambda listed, jobs: steps.extend(listed) or 0)
    assert cli.main("archives --seeds 42 1 --cells casts-whole casts-half same-half".split()) == 0
    parts = [(step.work.args[1], step.work.args[2]) for step in steps]
    cells = ["casts-whole", "casts-half"], ["same-half"]
    assert parts == [(42, cells[0]), (42, cells[1]), (1, cells[0]), (1, cells[1])]
    assert cli.main(["archives", "--cells", "casts"]) == 2
    assert "no cell casts; there are same-whole" in capsys.readouterr().err


def test_data_sets_may_be_separated_by_spaces_or_commas(monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "corpus", lambda profile, dataset: seen.append(dataset))
    for words in (["charades,didemo"], ["charades", "didemo"], ["charades didemo"], []):
        cli.main(["corpus", "--jobs", "1", *(["--datasets", *words] if words else [])])
    assert seen == ["charades", "didemo"] * 4 + ["activitynet"]


def test_a_notebook_runs_once_per_data_set_and_again_when_a_cell_a_seed_or_a_step_changes(home, capsys):
    cell = "import os\nfrom vsr1 import config\n"
    cell += "print(config.load(profile, seed).seed, dataset, os.environ['OMP_NUM_THREADS'])"
    notebook(home, cell)
    threads = config.load("smoke").threads
    words = ["notebook", "00_try", "--profile", "smoke", "--datasets"]

    def ran(*more):
        """The data sets whose copy was made anew."""
        out = run(capsys, *words, *more)[1]
        return [
            name for name in ("charades", "didemo") if name in more[0] and f"{name}: unchanged" not in out
        ]

    assert ran("charades,didemo") == ["charades", "didemo"]
    home, copy = home / "runs" / "smoke" / "charades", "notebooks/00_try.ipynb"
    assert f"42 charades {threads}" in (home / "seed-42" / copy).read_text()
    assert ran("charades", "--seed", "7") == ["charades"]
    assert f"7 charades {threads}" in (home / "seed-7" / copy).read_text()
    cache.build(home / "embed", {"a": 1}, lambda folder: None)
    cache.build(home / "seed-7" / "sft", {"a": 1}, lambda folder: None)
    assert ran("charades,didemo") == [], "neither another seed nor a new step is a reason to run again"
    notebook(home.parents[2], "print('another cell')")
    assert ran("charades") == ["charades"]
    cache.build(home / "embed", {"a": 2}, lambda folder: None)
    assert ran("charades") == ["charades"], "a step that was there when it ran has changed"


def test_a_failing_notebook_names_the_cell_and_keeps_both_copies(home, capsys):
    words = ["notebook", "00_try", "--profile", "smoke", "--datasets", "charades"]
    notebook(home, "print('good')")
    assert run(capsys, *words)[0] == 0
    notebook(home, "x = 1", "raise ValueError('two\\nlines')")
    status, _, err = run(capsys, *words)
    folder = home / "runs" / "smoke" / "charades" / "seed-42" / "notebooks"
    assert status == 2 and err.count("\n") == 1
    assert "00_try, cell [4]: ValueError: two lines" in err and str(folder / "00_try.failed.ipynb") in err
    assert "ValueError" in (folder / "00_try.failed.ipynb").read_text()
    assert "good" in (folder / "00_try.ipynb").read_text()
    notebook(home, "print('good again')")
    assert run(capsys, *words)[0] == 0
    assert sorted(p.name for p in folder.glob("*.ipynb")) == ["00_try.ipynb"]


def test_a_notebook_about_all_data_sets_is_told_which_part_of_the_profile_is_run(home, capsys):
    given = 'profile = "mini"\nseed = 42\ndatasets = ""'
    notebook(home, "print('part', datasets, seed)", given=given)
    words = ["notebook", "00_try", "--profile", "smoke"]
    for more, expected, folder in (
        (
            ["--datasets", "charades", "didemo"],
            "part charades didemo 42",
            "results-charades-didemo/notebooks",
        ),
        ([], "part  42", "notebooks"),
    ):
        assert run(capsys, *words, *more)[0] == 0
        assert expected in (home / "runs" / "smoke" / folder / "00_try.ipynb").read_text()


def test_a_child_and_a_kernel_import_the_code_of_the_clone_they_were_started_in(
    home, tmp_path, capsys, monkeypatch
):
    """Two clones, one environment: `make paper PY=...` ran one clone's commands and the other clone's notebooks."""
    other = tmp_path / "other"
    (other / "vsr1").mkdir(parents=True)
    (other / "vsr1" / "__init__.py").write_text("raise RuntimeError('the other clone')")
    monkeypatch.setenv("PYTHONPATH", str(other))
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook(home, "import vsr1\nprint('kernel of', vsr1.__path__[0])")
    assert run(capsys, "notebook", "00_try", "--profile", "smoke", "--datasets", "charades")[0] == 0
    copy = home / "runs" / "smoke" / "charades" / "seed-42" / "notebooks" / "00_try.ipynb"
    assert f"kernel of {ROOT / 'vsr1'}" in copy.read_text()
    child = subprocess.run(
        [sys.executable, "-c", "import vsr1; print(vsr1.__path__[0])"], capture_output=True, text=True
    )
    assert child.stdout.strip() == str(ROOT / "vsr1"), child.stderr


def test_a_profile_is_refused_in_the_folder_of_another_clone(tmp_path, monkeypatch):
    (tmp_path / "vsr1").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "vsr1" / "config.py").write_text("")
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(config.InputError, match=r"is in one clone, .* in another; start this in"):
        config.load("mini")


def test_a_notebook_about_all_data_sets_runs_again_when_numbers_change_and_not_when_it_wrote_some(
    home, capsys
):
    notebook(home, "print(profile)", given='profile = "mini"\nseed = 42')
    folder = home / "runs" / "smoke" / "didemo" / "seed-42" / "numbers"
    folder.mkdir(parents=True)

    def ran():
        return ": unchanged" not in run(capsys, "notebook", "00_try", "--profile", "smoke")[1]

    assert (ran(), ran()) == (True, False)
    (folder / "09_paper.json").write_text("{}")
    assert not ran(), "its own numbers are no reason"
    (folder / "05_evaluation.json").write_text('{"a": 1}')
    assert (ran(), ran()) == (True, False)
    (folder / "05_evaluation.json").write_text('{"a": 2}')
    assert (ran(), ran()) == (True, False)


def test_a_notebook_that_is_not_json_is_refused(home, capsys):
    (home / "notebooks" / "00_try.ipynb").write_text("<<<<<<< ours")
    status, _, err = run(capsys, "notebook", "00_try")
    assert status == 2 and "restore it with git" in err and err.count("\n") == 1


def test_the_lab_refuses_a_port_in_use_with_the_remedy(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = run(capsys, "lab", "--port", str(port))
    assert status == 2 and f"make lab PORT={port + 1}" in err


def test_an_unchanged_command_does_not_import_torch(home):
    """The reason why a second `make paper` is short."""
    source = "import sys; from vsr1 import __main__; sys.exit('torch' in sys.modules or 'papermill' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0


def test_the_report_of_a_part_leaves_the_committed_results_as_they_are(tmp_path, monkeypatch, capsys):
    """`make paper DATASETS=charades` emptied results/mini for the other data sets."""
    fake.profile(tmp_path, monkeypatch)
    committed = tmp_path / "results" / "mini" / "numbers.json"
    committed.parent.mkdir(parents=True)
    committed.write_text("{}")
    fake.record(config.load("mini", 7, ["charades"]))
    status, out, err = run(capsys, "report", "--datasets", "charades", "--seed", "7")
    assert status == 0, err
    assert "runs/mini/results-charades-seed7/report.html" in out.splitlines()[-1]
    assert committed.read_text() == "{}" and len(list((tmp_path / "results").rglob("*.*"))) == 1
    numbers = json.loads((tmp_path / "runs" / "mini" / "results-charades-seed7" / "numbers.json").read_text())
    assert {name.split("/")[1] for name in numbers} == {"charades", "mean"}
