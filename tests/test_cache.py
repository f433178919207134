"""Steps: built once, built again when something changed, resumed after a kill, never half a target, nothing lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vsr1 import cache
from vsr1.config import PACKAGE

# A step of forty small files; argument two is the pause after each. It goes on where a former run stopped.
WORKER = """
import sys, time
from pathlib import Path
from vsr1 import cache

def build(folder):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("begun\\n")
    for number in range(40):
        file = folder / f"{number:02}.txt"
        if not file.exists():
            (folder / ".new").write_text(f"{number}\\n")
            (folder / ".new").rename(file)  # whole or not at all, as a kill may come at any time
            time.sleep(float(sys.argv[2]))

cache.build(Path(sys.argv[1]), {"count": 40}, build)
"""


def counting(builds):
    """Work that writes how many times it was called, and counts in the list `builds`."""

    def work(folder):
        builds.append(1)
        (folder / "value.txt").write_text(str(len(builds)))

    return work


def test_a_step_is_built_once_while_its_inputs_stay(tmp_path):
    builds = []
    for _ in range(3):
        cache.build(tmp_path / "out", {"a": 1, "b": [2]}, counting(builds))
    assert len(builds) == 1
    assert cache.metadata(tmp_path / "out")["inputs"] == {"a": 1, "b": [2]}


def test_a_step_is_built_again_when_an_input_changes_and_nothing_old_stays_in_it(tmp_path):
    cache.build(tmp_path / "out", {"a": 1}, lambda folder: (folder / "old.txt").write_text("old"))
    cache.build(tmp_path / "out", {"a": 2}, lambda folder: (folder / "new.txt").write_text("new"))
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name[0] != "."] == ["new.txt"]
    assert cache.steps(tmp_path) == [tmp_path / "out"]


def test_a_result_comes_back_with_its_inputs_and_is_not_computed_again(tmp_path):
    """A seed, a knob or a git branch that changes and changes back costs nothing, however often."""
    builds, out = [], tmp_path / "out"
    for value, expected in ((1, "1"), (2, "2"), (1, "1"), (2, "2"), (1, "1")):
        cache.build(out, {"a": value}, counting(builds))
        assert (out / "value.txt").read_text() == expected
        assert cache.metadata(out)["inputs"] == {"a": value}
    assert len(builds) == 2


def test_a_folder_that_no_step_built_is_kept_aside_too(tmp_path):
    for number in range(2):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text(str(number))
        cache.build(tmp_path / "out", {"a": 1}, counting([]))
        (tmp_path / "out").rename(tmp_path / f"moved{number}")
    assert {path.read_text() for path in tmp_path.rglob("notes.txt")} == {"0", "1"}


def test_seconds_of_a_killed_attempt_count(tmp_path):
    def killed(folder):
        time.sleep(0.3)
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build(tmp_path / "out", {}, killed)
    cache.build(tmp_path / "out", {}, lambda folder: time.sleep(0.3))
    assert cache.metadata(tmp_path / "out")["seconds"] >= 0.6


def test_touching_a_target_does_not_build_it_again(tmp_path):
    builds = []
    out = cache.build(tmp_path / "out", {"a": 1}, counting(builds))
    os.utime(out / "value.txt", (1, 1))
    os.utime(out, (1, 1))
    cache.build(out, {"a": 1}, counting(builds))
    assert len(builds) == 1


def test_a_step_that_raises_leaves_the_last_good_target(tmp_path):
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


def test_a_killed_step_shows_no_target_and_resumes_to_the_same_content(tmp_path):
    subprocess.run(worker(tmp_path / "whole", 0), check=True)
    process = subprocess.Popen(worker(tmp_path / "out", 0.05))
    while len(list(tmp_path.glob("out.*.partial/*.txt"))) < 5:
        assert process.poll() is None, "the worker ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    begun = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.*.partial/*.txt")}
    assert 5 <= len(begun) < 40
    subprocess.run(worker(tmp_path / "out", 0), check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert begun == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in begun}, "done again"
    assert not list(tmp_path.glob("*.partial"))


def test_of_two_processes_with_one_target_the_second_waits(tmp_path):
    both = [subprocess.Popen(worker(tmp_path / "out", 0.02)) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len((tmp_path / "out.log").read_text().split()) == 1, "it was made twice"
    assert len(content(tmp_path / "out")) == 40


def test_a_list_of_numbers_takes_one_line_and_every_value_comes_back(tmp_path):
    path = tmp_path / "a.json"
    value = {
        "a": [1, -2.5e-7, None, True],
        "b": [[0, 1], []],
        "c": ["[\n 1\n]", "x"],
        "d": [{"e": [3]}],
        "f": [],
    }
    cache.write_json(path, value)
    assert json.loads(path.read_text()) == value
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert '"a": [1, -2.5e-07, null, true],' in lines and "[0, 1]," in lines and '"e": [3]' in lines
    assert '"x"' in lines  # words stay a line each


def test_write_json_leaves_the_old_file_when_the_disk_fills(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    cache.write_json(path, {"a": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        cache.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_of_two_processes_that_update_a_json_file_none_loses_a_change(tmp_path):
    source = """
import sys
from pathlib import Path
from vsr1 import cache

for number in range(100):
    with cache.updated_json(Path(sys.argv[1])) as value:
        value[f"{sys.argv[2]}{number}"] = number
"""
    path = tmp_path / "folder" / "value.json"
    both = [subprocess.Popen([sys.executable, "-c", source, str(path), name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert len(json.loads(path.read_text())) == 200


@pytest.fixture
def sources(monkeypatch):
    """What the package would be made of: a dictionary of sources that a test fills."""
    monkeypatch.setattr(cache, "SOURCES", {})
    yield cache.SOURCES
    _forget()


def _forget():
    cache._digest.cache_clear()
    cache._imports.cache_clear()


def digest_of(sources, source, module="vsr1.module"):
    """`cache.source_digest` of a module where the module `vsr1.module` has this source."""
    sources["vsr1.module"] = source.encode()
    _forget()
    return cache.source_digest(module)


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
        ("raise ValueError(f'{x} is bad')\n", "raise ValueError(f'{x} is wrong', x)\n", True),
        ("raise ValueError('bad')\n", "raise KeyError('bad')\n", False),
        ("assert x, 'bad'\n", "assert x, 'wrong'\n", True),
        ("assert x\n", "assert not x\n", False),
        ("warnings.warn('slow')\n", "warnings.warn('very slow')\n", True),
        ("for x in cache.progress(y, 'a'): f(x)\n", "for x in cache.progress(y, 'b'): f(x)\n", True),
        ("for x in cache.progress(y, 'a'): f(x)\n", "for x in cache.progress(z, 'a'): f(x)\n", False),
    ],
)
def test_the_source_digest_sees_what_computes_and_no_words(sources, source, other, equal):
    assert (digest_of(sources, source) == digest_of(sources, other)) is equal


def test_the_source_digest_covers_all_that_a_module_imports_and_no_more(sources):
    sources |= {
        "vsr1.top": b"from vsr1.middle import f\n",
        "vsr1.middle": b"def f():\n    from vsr1 import module, top\n    return module.half(2)\n",
        "vsr1.other": b"import vsr1.middle\n",
    }
    before = digest_of(sources, PLAIN, "vsr1.top")
    assert cache.import_closure("vsr1.top") == {"vsr1.top", "vsr1.middle", "vsr1.module"}
    assert digest_of(sources, SAME, "vsr1.top") == before
    sources["vsr1.other"] += b"x = 1\n"
    assert digest_of(sources, PLAIN, "vsr1.top") == before
    assert digest_of(sources, PLAIN.replace("2", "3"), "vsr1.top") != before


CLONE = """
from pathlib import Path
from vsr1 import cache
from vsr1.data import first

before = cache.source_digest("vsr1.data.first")
cache._digest.cache_clear()
for name in ("first", "second"):
    path = Path("vsr1", "data", f"{name}.py")
    path.write_text(path.read_text().replace("1", "2"))
assert cache.source_digest("vsr1.data.first") == before, "an edit after the import is not what computes"
from vsr1.data import second
"""


def test_sources_count_as_they_were_imported_and_a_module_edited_before_its_import_is_refused(tmp_path):
    for name in ("__init__", "config", "cache", "data/__init__"):
        (tmp_path / "vsr1" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "vsr1" / f"{name}.py")
    for name in ("first", "second"):
        (tmp_path / "vsr1" / "data" / f"{name}.py").write_text("X = 1\n")
    run = [sys.executable, "-c", CLONE]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "second.py: edited since this process began" in done.stderr.splitlines()[-1], done.stderr


def test_the_digest_sees_content_and_names_but_not_times(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    first = cache.file_digest(folder)
    os.utime(folder / "a.txt", (1, 1))
    assert cache.file_digest(folder) == first
    (folder / ".hidden").write_text("x")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "fetched").write_text("x")
    assert cache.file_digest(folder) == first
    (folder / "a.txt").rename(folder / "b.txt")
    assert cache.file_digest(folder) != first


def test_a_log_goes_on_behind_its_whole_lines_wherever_it_was_cut(tmp_path):
    rows, path = [{"step": 1, "text": "é\u2028"}, {"step": 2}, {"step": 4}], tmp_path / "log.jsonl"
    cache.JsonlLog(path).append(*rows)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = cache.JsonlLog(path)
        assert log.rows == rows[: sum(end <= cut for end in ends)]
        log.append(*rows[len(log.rows) :])
        assert path.read_bytes() == whole
    log.truncate_after(3)
    assert cache.JsonlLog(path).rows == log.rows == rows[:2]
    log.truncate_after(0)
    assert path.read_bytes() == b"" and log.rows == []
