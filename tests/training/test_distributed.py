"""Commands that two processes share: what they leave is what one leaves, and neither waits for a lost one."""

import json
import shutil

import numpy as np
import pytest
import two_processes
import yaml

from vsr1 import __main__ as cli
from vsr1 import cache, config
from vsr1.models import checkpoints, embedding
from vsr1.training import grpo, sft

SMALL = {"eval_batch": 3, "grpo_steps": 1, "num_val_prompts": 2, "max_new_tokens": 32, "max_turns": 2}
SMALL |= {"sft_negatives": 4, "grpo_negatives": 4, "sft_rows": 3, "save_minutes": 0}
EVALUATED = ("zs", "vsr1")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder whose runs/ two processes filled: embedded, trained through both stages, evaluated.

    The first try lost a process in stage 1. `kept` is the line of its log that a person marked in between.
    """
    folder = tmp_path_factory.mktemp("clone")
    knobs = yaml.safe_load((config.PACKAGE / "profiles" / "smoke.yaml").read_text()) | SMALL
    knobs["world"] |= {"train_videos": 8, "test_videos": 7}
    (folder / "small.yaml").write_text(yaml.safe_dump(knobs))
    lost = two_processes.by_torchrun("dying", folder, *arguments(folder, "train", "--stage", "sft"))
    assert lost.returncode and "Signal 9" in lost.stderr, lost.stderr[-3000:]
    (partial,) = home_of(folder).glob("sft.*.partial")
    assert sft.checkpoint(partial), lost.stderr[-3000:]
    log = (partial / "log.jsonl").read_text().splitlines()
    (partial / "log.jsonl").write_text("".join(f"{line}\n" for line in ['{"marked": 1}', *log[1:]]))
    train, walk = arguments(folder, "train", "--stage", "grpo"), arguments(folder, "evaluate", *EVALUATED)
    done = two_processes.forked("commands", folder, *train, "then", *walk)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [line.split(":")[0].split("/")[-1] for line in done.stdout.splitlines() if line.endswith(" s")]
    assert "train vsr1 charades" in steps and len(steps) == len(set(steps)), "one of two processes speaks"
    return folder


def home_of(folder):
    return folder / "runs" / "small" / "charades" / "seed-42"


def arguments(folder, command, *more):
    return [command, *more, "--dataset", "charades", "--profile", str(folder / "small.yaml")]


def test_a_run_that_lost_a_process_goes_on_when_it_is_started_again(clone):
    home = home_of(clone)
    log = [json.loads(line) for line in (home / "sft" / "log.jsonl").open()]
    assert log[0] == {"marked": 1} and [line["step"] for line in log[1:]] == list(range(2, len(log) + 1))
    assert len(log) > 2 and not list(home.rglob("*.partial")) and not list(home.rglob("steps"))
    for folder in (home / "sft", home / "grpo" / "vsr1"):
        assert cache.metadata(folder)["key"] and checkpoints.load(str(folder), config.load("smoke")).heads
    assert len((home / "grpo" / "vsr1" / "log.jsonl").read_text().splitlines()) == 1


def test_one_process_finds_standing_what_two_have_trained(clone, monkeypatch):
    monkeypatch.setattr(config, "ROOT", clone)
    for module in (sft, grpo):
        monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    assert cli.main(arguments(clone, "train", "--stage", "grpo")) == 0


def test_two_processes_embed_and_evaluate_as_one_does(clone, tmp_path, monkeypatch):
    """To the last bit: a shard of videos and a batch of queries are the same whoever works on them."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(embedding, "SHARD_SIZE", 3)
    shutil.copytree(clone / "runs", tmp_path / "runs", symlinks=True)
    home, home_of_two = map(home_of, (tmp_path, clone))
    for step in (home.parent / "embed", home / "episodes"):
        shutil.rmtree(step)
    for command in (("embed",), ("evaluate", *EVALUATED)):
        assert cli.main(arguments(clone, *command)) == 0
    for split in ("train", "test"):
        folder, folder_of_two = (folder.parent / "embed" / "engine" / split for folder in (home, home_of_two))
        assert {path.name for path in folder.iterdir()} == {path.name for path in folder_of_two.iterdir()}
        for name in ("video_vecs.npy", "query_vecs.npy"):
            np.testing.assert_array_equal(np.load(folder / name), np.load(folder_of_two / name))
        for name in ("ids.json", "skipped.csv", "index.faiss"):
            assert (folder / name).read_bytes() == (folder_of_two / name).read_bytes()
    for system in EVALUATED:
        lines, lines_of_two = (untimed(folder / "episodes" / system) for folder in (home, home_of_two))
        assert lines == lines_of_two and len(lines) > 6
        assert sorted(path.name for path in (home_of_two / "episodes" / system).iterdir()) == sorted(
            path.name for path in (home / "episodes" / system).iterdir()
        )


def untimed(folder):
    """The lines of a file of episodes without what its turns cost in seconds."""

    def drop(value):
        if isinstance(value, dict):
            return {key: drop(item) for key, item in value.items() if key != "seconds"}
        return [drop(item) for item in value] if isinstance(value, list) else value

    return [drop(json.loads(line)) for line in (folder / "episodes.jsonl").open()]


@pytest.mark.parametrize(
    ("job", "more", "expected"),
    [
        ("refused", ["0"], "this one has no videos; bring some"),
        ("refused", ["1"], "this one has no videos; bring some"),
        ("commands", ["embed", "--profile", "maxi"], "no such profile"),
    ],
)
def test_an_error_of_one_process_or_of_both_is_one_line_and_ends_all(tmp_path, job, more, expected):
    done = two_processes.forked(job, tmp_path / "clone", *more)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(errors) == 1 and expected in errors[0], done.stderr[-3000:]
    assert "RuntimeError" not in done.stderr and not (tmp_path / "clone" / "out").exists()
