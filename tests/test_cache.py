"""Stages: made once, made again when something changed, resumed after a kill, never half a target."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vsr1 import cache
from vsr1.config import InputError

# A stage of forty small files; argument two is the pause after each. It goes on where a former run stopped.
WORKER = """
import sys, time
from pathlib import Path
from vsr1 import stages

def build(folder):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("begun\\n")
    for number in range(40):
        file = folder / f"{number:02}.txt"
        if not file.exists():
            (folder / ".new").write_text(f"{number}\\n")
            (folder / ".new").rename(file)  # whole or not at all, as a kill may come at any time
            time.sleep(float(sys.argv[2]))

stages.run(Path(sys.argv[1]), {"count": 40}, build)
"""


def counting(made):
    def build(folder):
        made.append(1)
        (folder / "value.txt").write_text(str(len(made)))

    return build


def test_a_stage_is_made_once_while_its_inputs_stay(tmp_path):
    made = []
    for _ in range(3):
        cache.build(tmp_path / "out", {"a": 1, "b": [2]}, counting(made))
    assert len(made) == 1
    assert cache.metadata(tmp_path / "out")["inputs"] == {"a": 1, "b": [2]}


def test_a_stage_is_made_again_when_an_input_changes_and_nothing_old_stays(tmp_path):
    cache.build(tmp_path / "out", {"a": 1}, lambda folder: (folder / "old.txt").write_text("old"))
    cache.build(tmp_path / "out", {"a": 2}, lambda folder: (folder / "new.txt").write_text("new"))
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name[0] != "."] == ["new.txt"]


def test_touching_a_target_does_not_make_it_again(tmp_path):
    made = []
    out = cache.build(tmp_path / "out", {"a": 1}, counting(made))
    os.utime(out / "value.txt", (1, 1))
    os.utime(out, (1, 1))
    cache.build(out, {"a": 1}, counting(made))
    assert len(made) == 1


def test_a_stage_that_raises_leaves_the_last_good_target(tmp_path):
    cache.build(tmp_path / "out", {"a": 1}, counting([]))

    def fail(folder):
        (folder / "value.txt").write_text("half")
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        cache.build(tmp_path / "out", {"a": 2}, fail)
    assert (tmp_path / "out" / "value.txt").read_text() == "1"
    assert cache.metadata(tmp_path / "out")["inputs"] == {"a": 1}


def test_a_partial_folder_of_other_inputs_is_not_resumed(tmp_path):
    def fail(folder):
        (folder / "stale.txt").write_text("from other inputs")
        raise KeyError

    with pytest.raises(KeyError):
        cache.build(tmp_path / "out", {"a": 1}, fail)
    out = cache.build(tmp_path / "out", {"a": 2}, counting([]))
    assert not (out / "stale.txt").exists()


def worker(target, pause):
    return [sys.executable, "-c", WORKER, str(target), str(pause)]


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name[0] != "."}


def test_a_killed_stage_shows_no_target_and_resumes_to_the_same_content(tmp_path):
    subprocess.run(worker(tmp_path / "whole", 0), check=True)
    process = subprocess.Popen(worker(tmp_path / "out", 0.05))
    while len(list((tmp_path / "out.partial").glob("*.txt"))) < 5:
        assert process.poll() is None, "the worker ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    begun = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.txt")}
    assert 5 <= len(begun) < 40
    subprocess.run(worker(tmp_path / "out", 0), check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert begun == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in begun}, "done again"
    assert not (tmp_path / "out.partial").exists()


def test_of_two_processes_with_one_target_the_second_waits(tmp_path):
    both = [subprocess.Popen(worker(tmp_path / "out", 0.02)) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len((tmp_path / "out.log").read_text().split()) == 1, "it was made twice"
    assert len(content(tmp_path / "out")) == 40


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_line_with_a_remedy(tmp_path, number):
    def full(folder):
        raise OSError(number, os.strerror(number))

    with pytest.raises(InputError, match="free some space") as caught:
        cache.build(tmp_path / "out", {}, full)
    assert os.strerror(number) in str(caught.value) and "\n" not in str(caught.value)


def test_another_os_error_keeps_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.build(tmp_path / "out", {}, lambda folder: (folder / "absent").read_text())


def test_write_json_leaves_the_old_file_when_the_disk_fills(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    cache.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        cache.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def digest_of(tmp_path, monkeypatch, source):
    """`stages.code` of a module of this source."""
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    cache.source_digest.cache_clear()
    spec = type("Spec", (), {"origin": str(file)})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    try:
        return cache.source_digest("module")
    finally:
        cache.source_digest.cache_clear()


PLAIN = "def half(x):\n    return x / 2\n"
SAME = '"""A docstring."""\n\ndef half(x):\n    """Half of x."""\n    # a comment\n    return (x  /  2)\n'


@pytest.mark.parametrize(
    ("source", "other", "equal"),
    [
        ('"""One."""\n' + PLAIN, '"""Two."""\n' + PLAIN, True),
        (PLAIN, PLAIN.replace("return", "# why\n    return"), True),
        (PLAIN, SAME, True),
        (PLAIN, PLAIN.replace("2", "3"), False),
        (PLAIN, PLAIN.replace("/", "//"), False),
        (PLAIN + "N = 'text'\n", PLAIN + "N = 'other'\n", False),
        ("def f():\n    return 'a'\n", "def f():\n    return 'b'\n", False),
    ],
)
def test_the_code_digest_sees_code_and_nothing_else(tmp_path, monkeypatch, source, other, equal):
    assert (digest_of(tmp_path, monkeypatch, source) == digest_of(tmp_path, monkeypatch, other)) is equal


def test_the_digest_sees_content_and_names_but_not_times(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    first = cache.file_digest(folder)
    os.utime(folder / "a.txt", (1, 1))
    assert cache.file_digest(folder) == first
    (folder / ".hidden").write_text("x")
    assert cache.file_digest(folder) == first
    (folder / "a.txt").rename(folder / "b.txt")
    assert cache.file_digest(folder) != first
