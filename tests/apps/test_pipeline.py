"""Steps in processes of their own: in the order that they need, ended together, and what `make paper` consists of."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vsr1 import cache, config
from vsr1.apps import notebooks, paper, pipeline
from vsr1.apps.pipeline import Step
from vsr1.config import ROOT, InputError

pipeline.FORKS.set_forkserver_preload(["vsr1.apps.pipeline"])  # torch is not needed here


def note(log, name, seconds=0.0, error=None):
    """Write when a step begins and ends, and by which process."""
    log.with_name(f"{name}.pid").write_text(str(os.getpid()))
    for word in ("begins", "ends"):
        with open(log, "a") as file:
            file.write(f"{name} {word}\n")
        if word == "begins":
            time.sleep(seconds)
            if error == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif error:
                raise {"bad": InputError, "bug": KeyError}[error]("no such file:\nbring one")


def steps(log, *rows):
    """Steps that write into `log`: (name, what it needs, minutes, further arguments of `note`)."""
    return [
        Step(name, functools.partial(note, log, name, *more), frozenset(needs), minutes)
        for name, needs, minutes, *more in rows
    ]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_pipeline
from vsr1.apps import pipeline

if __name__ == "__main__":
    listed = test_pipeline.steps(Path({log!r}), *{rows!r})
    sys.exit(pipeline.guard(lambda: pipeline.run_apart(listed, 2)))
"""


def command(folder, *rows):
    """A process of its own that runs steps, two at once."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), log=str(folder / "log"), rows=rows)
    (folder / "run.py").write_text(script)
    words = [sys.executable, folder / "run.py"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What starts the tests may ignore Ctrl-C, and its children would, too.
    return subprocess.Popen(words, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_a_step_waits_for_what_it_needs_and_the_longest_way_begins_first(tmp_path):
    log = tmp_path / "log"
    short, long = ("short", (), 3), ("first", (), 1)
    listed = steps(log, short, long, ("second", ("first",), 1), ("third", ("second", "absent"), 2))
    assert pipeline.run_apart(listed, 1) == 0
    began = [line.split()[0] for line in log.read_text().splitlines() if "begins" in line]
    assert began == ["first", "short", "second", "third"], "4 minutes wait for the first, 3 for the second"


def test_two_steps_run_side_by_side(tmp_path):
    log = tmp_path / "log"
    assert pipeline.run_apart(steps(log, ("a", (), 1, 0.7), ("b", (), 1, 0.7), ("c", ("a", "b"), 1)), 2) == 0
    words = log.read_text().split()[1::2]
    assert words[:4] == ["begins", "begins", "ends", "ends"]


@pytest.mark.parametrize(
    ("error", "status", "said"), [("bad", 2, "no such file: bring one"), ("kill", 1, "signal 9")]
)
def test_a_failure_is_one_line_and_ends_the_run_behind_the_running_steps(tmp_path, error, status, said):
    log = tmp_path / "log"
    rows = ("fails", (), 2, 0.3, error), ("goes on", (), 2, 1.0), ("never", (), 1)
    process = command(tmp_path, *rows)
    out, err = process.communicate()
    assert process.returncode == status
    assert err.count("\n") == 1 and err.startswith("error: fails: ") and said in err
    assert out.startswith("goes on: ")
    assert "goes on ends" in log.read_text() and "never" not in log.read_text()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_steps_end_with_the_process_that_began_them_however_it_ends(tmp_path, how):
    log, process = tmp_path / "log", command(tmp_path, ("a", (), 1, 60), ("b", (), 1, 60))
    _until(lambda: log.exists() and log.read_text().count("begins") == 2)
    children = [int(log.with_name(f"{name}.pid").read_text()) for name in "ab"]
    process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    assert how != signal.SIGINT or err == "stopped; run the same command again to go on\n"
    _until(lambda: not any(Path("/proc", str(pid)).exists() for pid in children))


def _until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- `make paper`


def test_a_paper_runs_every_notebook_but_the_one_about_a_shipped_policy_and_the_one_that_asks_for_videos():
    there = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted([notebooks.ONE_SEARCH, *paper.READ_BY, paper.LAST, "10_your_videos"]) == there
    order = list(paper.READ_BY)
    assert order.index("05b_two_stage") < order.index("05_evaluation"), "05 shows what 05b records"


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_every_step_of_a_paper_comes_behind_what_it_needs_and_can_be_called(name):
    listed, before = paper.steps(config.load(name), name), set()
    names = {step.name for step in listed}
    for step in listed:
        assert step.needs & names <= before, step.name
        assert step.name not in before, "two steps of one name"
        before.add(step.name)
    kinds = {step.split()[0] for parts in paper.READ_BY.values() for step in parts} | {"report"}
    assert kinds == paper.WORK.keys()
    for path in paper.WORK.values():
        module, _, function = path.rpartition(".")
        assert f"def {function}(".encode() in cache.SOURCES[f"vsr1.{module}"], path
    assert [step.name for step in listed if step.name.startswith("ablate")] == [
        "ablate no-ret didemo",
        "ablate no-verif didemo",
    ]
    assert any(step.name.startswith("probe") for step in listed) == (name == "mini")


def test_notebooks_of_a_data_set_keep_their_order_and_one_about_all_is_the_last():
    profile = config.load("smoke", None, ["charades", "didemo"])
    listed = {
        step.name: step for step in paper.notebook_steps([*paper.READ_BY, paper.LAST], "smoke", profile)
    }
    *each, last = listed
    assert last == "notebook 09_paper" and listed[last].needs == set(each)
    second = listed["notebook 02_verify_and_ground didemo"].needs
    assert {"notebook 01_corpus_embedding didemo", "evaluate walkdown didemo"} < second
    assert not [name for name in second if "charades" in name]


def test_a_notebook_that_runs_anew_forgets_what_it_recorded_last_time(tmp_path, monkeypatch):
    """A number that has moved to another notebook would be found twice."""
    profile = config.load("smoke", None, ["didemo"])
    monkeypatch.setattr(type(profile), "runs", lambda self, dataset: tmp_path / dataset)
    monkeypatch.setattr("vsr1.apps.kernels.execute", lambda source, copy, parameters: copy.write_text("{}"))
    (tmp_path / "didemo" / "numbers").mkdir(parents=True)
    parts = ("05_evaluation", "05_unseen", "05b_two_stage", "06_tokens")
    for part in parts:
        (tmp_path / "didemo" / "numbers" / f"{part}.json").write_text("{}")
    notebooks.Run("05_evaluation", "smoke", profile, "didemo").execute()
    assert sorted(path.stem for path in (tmp_path / "didemo" / "numbers").iterdir()) == [*parts[2:]]


@pytest.mark.parametrize("dataset", ["didemo", None])
def test_a_notebook_is_not_current_once_the_premise_was_measured_again(dataset, tmp_path, monkeypatch):
    """06b and 09 read what `make premise` commits."""
    profile = config.load("smoke", None, ["didemo"])
    monkeypatch.setattr(type(profile), "runs", lambda self, dataset: tmp_path / f"runs-{dataset}")
    monkeypatch.setattr(type(profile), "run_root", lambda self: tmp_path)
    monkeypatch.setattr(type(profile), "results", lambda self: tmp_path / "results")
    monkeypatch.setattr("vsr1.apps.kernels.execute", lambda source, copy, parameters: copy.write_text("{}"))
    run = notebooks.Run("06b_is_it_the_loop" if dataset else "09_paper", "smoke", profile, dataset)
    run.execute()
    assert run.is_current()
    measured = tmp_path / "results" / "premise" / "didemo.json"
    measured.parent.mkdir(parents=True)
    measured.write_text("{}")
    assert not run.is_current()
