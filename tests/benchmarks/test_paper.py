"""The comparison of two clones: what a command takes, and the table of steps."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import paper
from vsr1.config import ROOT


def test_a_command_is_measured_with_all_that_it_starts(tmp_path):
    hold = "data = bytearray(300_000_000); import time; time.sleep(2.5)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    taken = paper.measure([sys.executable, "-c", child], tmp_path)
    assert taken["seconds"] >= 2 and 0.3 <= taken["gb"] < 0.6 and taken["gb_process"] >= 0.3
    with pytest.raises(SystemExit, match="status 3"):
        paper.measure([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_steps_of_all_data_sets_and_of_older_names_are_one_row(tmp_path):
    def clone(name, steps):
        (tmp_path / name / "results" / "mini").mkdir(parents=True)
        stages = {step: {"minutes": minutes} for step, minutes in steps.items()}
        file = tmp_path / name / "results" / "mini" / "provenance.json"
        file.write_text(json.dumps({"stages": stages}))
        command = {"seconds": 600, "processor": 900, "gb": 1.0, "gb_process": 1.0}
        return {"make paper": command, "steps": paper.step_minutes(tmp_path / name)}

    old = clone(
        "old", {"charades/ladder": 1.5, "didemo/ladder": 2.5, "variants/no-ret/didemo/grpo/vsr1": 3.0}
    )
    new = clone(
        "new", {"charades/seed-42/soft_token_bound": 2.0, "didemo/seed-42/variants/no-ret/grpo/vsr1": 1.0}
    )
    frame = paper.table(old, new)
    assert frame.ratio["soft_token_bound"] == 0.5 and frame.old["soft_token_bound"] == 4.0
    assert frame.ratio["no-ret/grpo/vsr1"] == 0.33 and frame.old["make paper, processor"] == 15.0


def test_benchmarks_are_named_as_modules_since_a_script_by_its_path_does_not_find_the_others():
    texts = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.py")]
    commands = {
        c for path in texts for c in re.findall(r"python (?:-m )?benchmarks\S+?(?=`| )", path.read_text())
    }
    runnable = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if '"__main__"' in path.read_text()}
    assert commands == {f"python -m benchmarks.{name}" for name in runnable}
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.index", "--help"], cwd=ROOT, capture_output=True
    )
    assert shown.returncode == 0, shown.stderr
