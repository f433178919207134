"""What `make doctor` says, by a second calculation, without torch, and of damaged weights."""

import dataclasses
import os
import subprocess
import sys

import pytest

from vsr1 import config
from vsr1.apps import doctor
from vsr1.config import ROOT


@pytest.fixture
def alone(monkeypatch):
    """No hub model is on this machine."""
    monkeypatch.setattr(doctor.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


def test_the_disk_of_the_paper_is_the_sum_of_what_it_keeps(alone):
    """Eleven float32 checkpoints, two saved states of all weights, three hub models, the vectors of three data sets."""
    policy, vectors = 2.2e9, sum(map(doctor.official_release.size, config.DATASETS))
    expected = 11 * 4 * policy + 2 * 12 * policy + 2 * (2.2e9 + 2.2e9 + 8.8e9) + vectors
    paper = config.load("paper")
    assert doctor.disk(paper) == pytest.approx(expected) and expected > 170e9
    one = dataclasses.replace(paper, datasets=("charades",))  # three checkpoints, T2 is of DiDeMo
    released = doctor.official_release.size("charades")
    assert doctor.disk(one) == pytest.approx(expected - 8 * 4 * policy - vectors + released)


def test_adapters_save_small_states_and_models_in_the_cache_need_no_more(alone, monkeypatch):
    paper, adapters = config.load("paper"), config.load("paper-24gb")
    learned = 36.7e6 + 16.8e6  # of adapters and heads, counted on the published shapes
    assert doctor.disk(paper) - doctor.disk(adapters) == pytest.approx(24 * (2.2e9 - learned), rel=0.01)
    before = doctor.disk(paper)
    monkeypatch.setattr(doctor, "_is_here", lambda model: True)
    assert before - doctor.disk(paper) == pytest.approx(2 * (2.2e9 + 2.2e9 + 8.8e9))


def test_mini_needs_little_more_than_its_videos(alone):
    assert doctor.RENDERED_BYTES < doctor.disk(config.load("mini")) < doctor.RENDERED_BYTES + doctor.GB


def test_weights_that_are_gone_are_named_with_the_remedy(tmp_path, monkeypatch):
    name = "vsr1/mini/weights/policy"
    assert doctor.weights(name).status == "ok"
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    check = doctor.weights(name)
    assert check.status == "missing" and name in check.finding and f"git checkout {name}" in check.remedy


def test_it_runs_where_torch_and_faiss_are_missing(tmp_path):
    for name in ("torch", "faiss"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "vsr1", "doctor", "--profile", "smoke"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    rows = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert "missing" in rows["torch, faiss"] and "No module named" in rows["torch, faiss"]
    assert " ok " in rows["video"] and done.stdout.splitlines()[-1] == "smoke cannot run here: torch, faiss"


def test_hours_follow_the_amounts_of_the_profile():
    """One epoch of stage 2 is most of it: a group of eight replies, twice, for each train query."""
    paper = config.load("paper")
    parts = doctor.estimate_hours(paper, "charades")
    decoded = 2 * 12408 * doctor.REPLY * doctor.DECODED / 3600
    assert decoded < parts["stage 2"] < 2 * decoded and parts["stage 2"] > 0.7 * sum(parts.values())
    few = doctor.estimate_hours(dataclasses.replace(paper, grpo_steps=100), "charades")
    assert few["stage 2"] == pytest.approx(parts["stage 2"] * 400 / 12408) and few["embed"] == parts["embed"]
    small = doctor.estimate_hours(config.load("paper-24gb"), "charades")
    assert small["evaluate"] < parts["evaluate"] and small["embed"] == parts["embed"], (
        "one engine, both see it"
    )
    said = doctor.time_needed(paper)
    assert "on one GPU: embed " in said.finding and "never run" in said.finding
    assert "of the published run" in doctor.time_needed(config.load("mini")).finding


def test_states_that_take_a_tenth_of_the_time_to_write_are_named_with_the_remedy():
    often = dataclasses.replace(config.load("paper"), save_minutes=1.0)
    assert doctor.saves(config.load("paper")).status == "ok" and doctor.saves(often).status == "limited"
    minutes = float(doctor.saves(often).remedy.split()[1])
    assert doctor.saves(dataclasses.replace(often, save_minutes=minutes)).status == "ok"
