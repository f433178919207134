"""A folder of one's own videos: the index, the same walk as in evaluation, the page, and what may be wrong."""

import copy
import dataclasses
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys

import browser
import numpy as np
import pytest
from markupsafe import escape

from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.apps import folder_index, search_folder, search_page
from vsr1.config import ROOT, InputError
from vsr1.data import annotations, decoder, video_reader
from vsr1.evaluation import evaluate
from vsr1.loop import records, runner
from vsr1.mini import renderer
from vsr1.models import checkpoints, embedding, engine, policy

HOSTILE = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> $(touch hacked)'
# A folder `<` and a file in it, so that the name holds a slash; quotes, a blank, a line break, a dash.
NAMES = [
    "<b/script>.mp4",
    '"><img src=x onerror=window.hacked=1>.mp4',
    "-rf '$(touch hacked)'.mp4",
    "a\nb\x1b[2J.mp4",
]

TAGS = set("h1 h2 p q b i s section video div img span table tbody tr th td".split())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A profile with eight rendered videos and ten queries, embedded by the mini engine, in a scratch folder."""
    with pytest.MonkeyPatch.context() as patch:
        clone = tmp_path_factory.mktemp("clone")
        (clone / "vsr1").symlink_to(ROOT / "vsr1")  # models are named relative to the clone
        patch.setattr(config, "ROOT", clone)
        profile = config.load("smoke")
        small = dataclasses.replace(profile.world, train_videos=2, test_videos=8)
        profile = dataclasses.replace(profile, world=small, max_new_tokens=128)  # 96 cut an update off
        told = renderer.render(profile, "charades").parent / "corpus" / "test.jsonl"
        told.write_text("".join(told.read_text().splitlines(keepends=True)[::2][:10]))
        embedding.embed_corpus(profile, "charades", "test")
        patch.setattr(runner, "load_pair", functools.cache(runner.load_pair))
        yield profile


@pytest.fixture(scope="module")
def films(world):
    """The videos that the queries search, with those that nobody asks for."""
    home = world.data_dir("charades")
    ids = json.loads((home / "embed" / "engine" / "test" / "ids.json").read_text())["videos"]
    return [video.path for video in annotations.find_videos(home / "videos", ids)]


@pytest.fixture(scope="module")
def folder(films, tmp_path_factory):
    """Those videos alone, as somebody's folder."""
    folder = tmp_path_factory.mktemp("videos")
    for film in films:
        shutil.copy(film, folder)
    return folder


@pytest.fixture(scope="module")
def made(world):
    return engine.load(world)


def find(world, folder, query, index, **how):
    """(what is told, the lines that were said before)."""
    said = []
    with search_folder.Folder(world, folder, index=index, say=said.append, **how) as videos:
        result = videos.search(query)
        videos.write_page(result)
    return result, said


# --- The walk


@pytest.fixture(scope="module")
def with_heads(world, made, tmp_path_factory):
    """A checkpoint of the base policy with heads that nobody trained: they move queries about."""
    settings = dataclasses.replace(policy.new_settings(world, made.instruction), refine_init="scaled")
    target = tmp_path_factory.mktemp("policy")
    checkpoints.save(policy.new_heads(checkpoints.load(world.policy, world), settings, 3, made), target)
    return str(target)


@pytest.fixture
def no_film(monkeypatch):
    """Where no page is looked at: a film takes longer than a search."""
    monkeypatch.setattr(search_page, "film", lambda *_: (b"", "left out"))


@pytest.mark.usefixtures("no_film")
@pytest.mark.parametrize("system", ["walkdown", "hqr-reasoned", "sqr-untrained"])
def test_a_walk_is_the_one_that_is_evaluated(world, folder, with_heads, system, tmp_path):
    """FAISS over a folder, without a right video, one query at a time: against the stage with its matrix product."""
    weights = with_heads if system == "sqr-untrained" else world.policy
    skipping = dataclasses.replace(world, display_rule="skip_rejected")
    path = evaluate.run_system(skipping, "charades", system, weights=weights)
    lengths = []
    for one in records.read_episodes(path):
        told, _ = find(world, folder, one.query, tmp_path / "index", weights=weights, system=system)
        looks = [
            {
                "video": f"{turn.shown_id}.mp4",
                "reply": turn.reply.text,
                "moment": turn.span_ms and [time / 1000 for time in turn.span_ms],
                "best": turn.top1_out and f"{turn.top1_out}.mp4",
                "words": turn.update_text,
            }
            for turn in one.turns
        ]
        for look in told["looks"]:
            look |= look["next"] or {"best": None, "words": None}
        assert [{key: look[key] for key in looks[0]} for look in told["looks"]] == looks
        assert (told["stop"], told["accepted"]) == (one.stop_reason, one.stop_reason == "matched")
        lengths.append(len(looks))
    assert min(lengths) < max(lengths), "all walks are alike: this shows little"


@pytest.mark.usefixtures("no_film")
def test_a_video_accepted_is_named_with_its_moment_and_else_a_candidate_that_is_not(world, folder, tmp_path):
    queries = annotations.read_fig(world.data_dir("charades") / "corpus" / "test.jsonl")
    once = dataclasses.replace(world, max_turns=1)  # a rejection ends the search
    ends = {}
    for profile in (world, once):
        for query in queries:
            told, _ = find(profile, folder, query.text, tmp_path)
            ends.setdefault(told["accepted"], told)
    found, lost = ends[True], ends[False]
    assert found["looks"][-1]["accepted"] and found["video"] == found["looks"][-1]["video"]
    assert (
        search_page.end(found)
        == f"Found: {found['video']}, {' to '.join(map(search_page.clock, found['moment']))}"
    )
    assert not any(look["accepted"] for look in lost["looks"])
    assert search_page.end(lost).startswith(
        "No video was accepted; best candidate, unverified (not accepted): "
    )


# --- The index


def test_a_video_is_embedded_once(world, films, made, tmp_path, monkeypatch):
    """What was embedded, counted at the engine, and the vectors against the engine's own of each file."""
    seen, embed = [], made.embed_clips
    monkeypatch.setattr(made, "embed_clips", lambda clips: seen.append(len(clips)) or embed(clips))
    mine, path = tmp_path / "mine", tmp_path / "index.npz"
    (mine / "below").mkdir(parents=True)

    def again():
        seen.clear()
        index = folder_index.refresh(world, lambda: made, mine, path)
        assert sum(seen) == index.embedded
        for name, file in index.files.items():
            vecs = embed([video_reader.Reader().read(mine / name)])
            np.testing.assert_allclose(file.vecs, vecs, atol=1e-5)
        return index.embedded, list(index.files)

    for place, film in zip(("a.mp4", "b.MP4", "below/c.mp4"), films, strict=False):
        shutil.copy(film, mine / place)
    assert again() == (3, ["a.mp4", "b.MP4", "below/c.mp4"])
    assert again() == (0, ["a.mp4", "b.MP4", "below/c.mp4"])
    shutil.copy(films[3], mine / "d.mp4")
    assert again() == (1, ["a.mp4", "b.MP4", "below/c.mp4", "d.mp4"])  # added
    (mine / "d.mp4").rename(mine / "below" / "e.mp4")
    assert again() == (0, ["a.mp4", "b.MP4", "below/c.mp4", "below/e.mp4"])  # renamed
    shutil.copy(films[0], mine / "copy.mp4")
    os.utime(mine / "b.MP4", ns=(0, 0))
    assert again() == (0, ["a.mp4", "b.MP4", "below/c.mp4", "below/e.mp4", "copy.mp4"])  # copied, touched
    shutil.copy(films[4], mine / "a.mp4")
    assert again() == (1, ["a.mp4", "b.MP4", "below/c.mp4", "below/e.mp4", "copy.mp4"])  # changed
    (mine / "b.MP4").unlink()
    (mine / ".hidden.mp4").write_bytes(b"")
    (mine / "notes.txt").write_text("no video")
    assert again() == (0, ["a.mp4", "below/c.mp4", "below/e.mp4", "copy.mp4"])  # removed


def test_an_index_of_another_engine_is_made_again(world, folder, made, tmp_path):
    path = tmp_path / "index.npz"
    count = folder_index.refresh(world, lambda: made, folder, path).embedded
    other = dataclasses.replace(world, max_frames=8)
    assert folder_index.refresh(other, lambda: made, folder, path).embedded == count > 0
    assert folder_index.refresh(other, lambda: made, folder, path).embedded == 0


def test_the_index_is_of_the_engine_that_is_really_used(world, folder, made, tmp_path):
    """A policy may bring an engine of its own, which the profile does not name."""
    path, other = tmp_path / "index.npz", copy.copy(made)
    other.name = world.engine_large
    count = folder_index.refresh(world, lambda: made, folder, path).embedded
    assert folder_index.refresh(world, lambda: other, folder, path).embedded == count > 0
    assert folder_index.refresh(world, lambda: other, folder, path).embedded == 0


def test_a_video_that_is_too_slow_is_listed_and_the_rest_is_searched(
    world, films, made, tmp_path, monkeypatch
):
    for film in films[:3]:
        shutil.copy(film, tmp_path)
    attempt, slow = video_reader.Reader._attempt, films[1].name
    monkeypatch.setattr(
        video_reader.Reader,
        "_attempt",
        lambda self, path, *rest: None if path.name == slow else attempt(self, path, *rest),
    )
    index = folder_index.refresh(world, lambda: made, tmp_path, tmp_path / "index.npz")
    assert list(index.files) == sorted(film.name for film in (films[0], films[2]))
    assert list(index.unreadable) == [slow] and "not decoded within 120 s" in index.unreadable[slow]


def test_a_stopped_index_goes_on_where_it_was(world, folder, made, tmp_path, monkeypatch):
    path, embed, count = tmp_path / "index.npz", made.embed_clips, len(list(folder.iterdir()))
    monkeypatch.setattr(folder_index, "SAVE_SECONDS", 0)
    calls = []

    def stopped(clips):
        calls.append(len(clips))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(clips)

    with monkeypatch.context() as patch:
        patch.setattr(made, "embed_clips", stopped)
        with pytest.raises(KeyboardInterrupt):
            folder_index.refresh(world, lambda: made, folder, path)
    left = folder_index.refresh(world, lambda: made, folder, path)
    assert (left.embedded, len(left.files)) == (count - 2, count)


def test_what_cannot_be_read_is_listed_and_the_rest_is_searched(world, films, made, tmp_path):
    (tmp_path / "bad.avi").write_bytes(b"no film")
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(films[2].read_bytes())
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")  # reading it would wait for ever
    shutil.copy(films[0], tmp_path / "good.mp4")
    index = folder_index.refresh(world, lambda: made, tmp_path, tmp_path / "index.npz")
    assert list(index.files) == ["good.mp4", "\udcff.mp4"], "a name that is no text is read, too"
    assert list(index.unreadable) == ["bad.avi", "gone.mp4"]
    assert index.unreadable["gone.mp4"] == "No such file or directory"
    shutil.copy(films[1], tmp_path / "bad.avi")  # the copy has arrived
    assert "bad.avi" in folder_index.refresh(world, lambda: made, tmp_path, tmp_path / "index.npz").files


def test_a_broken_index_and_a_full_disk_are_one_line(world, folder, made, tmp_path, monkeypatch):
    path = tmp_path / "index.npz"
    folder_index.refresh(world, lambda: made, folder, path)
    whole = path.read_bytes()
    half = len(whole) // 2  # among the vectors
    for broken in (b"", whole[:40], whole[:half], whole[:-1], whole[:half] + b"break" + whole[half + 5 :]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"a broken index .*delete it and search again$"):
            folder_index.refresh(world, lambda: pytest.fail("loaded for nothing"), folder, path)
    pickled = np.array([{}], dtype=object)
    np.savez(path, facts=pickled, vecs=pickled)
    with pytest.raises(InputError, match="a broken index"):
        folder_index.refresh(world, lambda: made, folder, path)
    path.unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*index\.npz'"):
        folder_index.refresh(world, lambda: made, folder, path)
    assert list(tmp_path.iterdir()) == []  # no half of a file is left


# --- The page


def hostile(told):
    """The same facts, where every text is one that a page must not run."""
    if isinstance(told, dict):
        return {key: hostile(value) for key, value in told.items()}
    if isinstance(told, list):
        return [hostile(value) for value in told]
    return HOSTILE if isinstance(told, str) else told


@pytest.fixture(scope="module")
def odd(world, films, tmp_path_factory):
    """What is told of a search for a hostile query, among hostile names."""
    folder, index = tmp_path_factory.mktemp("odd"), tmp_path_factory.mktemp("index")
    for name, film in zip(NAMES, films, strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(film, folder / name)
    (folder / f"unreadable {NAMES[1]}").write_bytes(b"no film")
    profile, started = dataclasses.replace(world, max_turns=len(NAMES)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        start = subprocess.Popen
        patch.setattr(subprocess, "Popen", lambda *a, **k: started.append((a[0], k)) or start(*a, **k))
        told, said = find(profile, folder, HOSTILE, index)
        assert os.listdir() == []
    return told, said, started


def test_hostile_names_and_queries_reach_no_shell(odd):
    """The one program that is started reads frames, and is told its file through a pipe."""
    _, _, started = odd
    for command, options in started:
        assert command[:3] == [sys.executable, "-P", decoder.__file__] and command[3].isdigit()
        assert not options.get("shell")
    assert started


def test_hostile_names_and_queries_are_shown_as_text(odd):
    told, said, _ = odd
    assert sorted(look["video"] for look in told["looks"]) == sorted(NAMES), "not all were looked at"
    text = open(told["page"], encoding="utf-8").read()
    body = text.partition("<body>")[2]
    for name in NAMES:
        assert escape(folder_index.plain(name)) in body
    assert escape(HOSTILE) in body and "<script" not in text and "onerror=window" in html.unescape(body)
    assert set(re.findall(r"<(\w+)", body)) <= TAGS
    for line in [*said, *search_page.lines(told)]:
        assert line.isprintable()
    assert json.loads(json.dumps(told)) == told


def test_every_text_on_the_page_is_escaped(odd):
    told = hostile({**odd[0], "unreadable": {HOSTILE: HOSTILE}, "caveat": "x", "problem": "x"})
    told["looks"][0]["next"] = dict.fromkeys(("kind", "words", "best"), HOSTILE) | {"soft_tokens": None}
    clips = {search_page.key(look): video_reader.Clip(None, None, None, HOSTILE) for look in told["looks"]}
    text = search_page.html_page(told, clips, b"", HOSTILE)
    assert "<script" not in text and "<img" not in text and text.count(escape(HOSTILE)) > 10


@pytest.mark.parametrize(("best", "ends"), [("b.mp4", "b.mp4"), ("a.mp4", "not shown again")])
def test_a_refinement_that_leaves_the_rejected_video_first_says_why_another_is_shown(best, ends):
    look = {"video": "a.mp4", "reasoning": "", "accepted": False}
    look["next"] = {"kind": "sqr", "soft_tokens": 8, "words": None, "best": best}
    assert search_page.turn_texts(look)[1].endswith(ends)


def test_a_film_shows_the_seconds_that_it_names(films, tmp_path):
    clip = video_reader.Reader().read(films[0])
    filmer = video_reader.Reader()
    tape, words = search_page.film(filmer, films[0], clip, search_page.with_margin((6.0, 9.0), clip.seconds))
    assert words == "The film runs from 00:04.0 to 00:11.0, without sound."
    (tmp_path / "part.mp4").write_bytes(tape)
    part = video_reader.Reader().read(tmp_path / "part.mp4", np.arange(7.0))
    whole = video_reader.Reader().read(films[0], np.arange(20.0))
    assert abs(part.seconds - 7) <= 1 / search_page.FPS
    errors = np.abs(part.frames[:, None].astype(int) - whole.frames[None]).mean(axis=(2, 3, 4))  # (7, 20)
    over = errors - errors.min(axis=1, keepdims=True)  # how much worse than the second that fits best
    assert np.diag(over, 4).max() < 0.5 and np.diag(over, 5).max() > 1  # a second off would be noticed
    assert search_page.with_margin((1.0, clip.seconds - 1), clip.seconds) == (0.0, clip.seconds)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("no chromium is installed; the page is not looked at")
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def test_the_page_plays_its_film_and_runs_and_loads_nothing(odd, tab):
    for width in (1280, 500):
        tab.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        tab.open(f"file://{odd[0]['page']}")
        tab.wait("[...document.images].length && [...document.images].every(image => image.naturalWidth)")
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        tab.run("document.querySelector('video').play()")
        tab.wait("document.querySelector('video').currentTime > 0.3")
        outside = "performance.getEntriesByType('resource').filter(one => !one.name.startsWith('data:'))"
        assert tab.run(f"{outside}.length") == 0 and tab.run("typeof window.hacked") == "undefined"
    assert tab.problems == []


# --- The command


def test_the_command_prints_one_object_and_nothing_else(folder, tmp_path):
    """In a process of its own, as another program would use it."""
    words = ["search", "--videos", folder, "--query", "A person waves.", "--profile", "smoke", "--turns", "2"]
    words += ["--weights", ROOT / "vsr1" / "mini" / "weights" / "policy", "--index", tmp_path, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "vsr1", *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    assert done.returncode == (0 if told["accepted"] else 1) and done.stdout.count("\n") == 1
    kinds = {
        key: type(told[key]) for key in ("query", "folder", "index", "page", "profile", "weights", "system")
    }
    assert set(kinds.values()) == {str} and told["system"] == "walkdown"
    assert told["videos"] == told["embedded"] == len(list(folder.iterdir())) and told["unreadable"] == {}
    assert 1 <= len(told["looks"]) <= 2 and told["looks"][0]["rank"] == 1
    assert set(told["looks"][0]) == set("video window rank accepted reasoning reply moment next".split())
    assert done.stderr.splitlines()[0] == told["caveat"] == search_folder.CAVEAT, "said before anything else"


def test_what_a_person_gets_wrong_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"")
    (tmp_path / "file").write_text("")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    for words, problem in [
        (["--videos", tmp_path / "nowhere"], "no such folder"),
        (["--videos", tmp_path / "empty"], "no video in it or below; looked for .mp4"),
        (["--videos", tmp_path / "bad"], "not one of 1 videos could be read; x.mp4: the file is empty"),
        (["--query", ""], "the query is empty"),
        (["--query", " \n\u200b"], "the query is empty"),
        (["--query", "a <|video_pad|>"], "a sign of the models' own"),
        (["--index", tmp_path / "file"], "or choose another place"),
        (["--turns", "0"], "'--turns': Input should be greater than or equal to 1"),
        (["--system", "best"], "no such system; there are"),
        (["--dataset", "charade"], "unknown data set"),
        (["--dataset", "didemo"], "not trained yet"),
        (["--weights", tmp_path / "nowhere"], "not a folder with safetensors"),
        (["--weights", tmp_path / "pickle"], "could run any code and is never read"),
        (["--weights", ROOT / "vsr1/mini/weights/engine-small"], "which is no policy"),
        (["--weights", ROOT / "vsr1/mini/weights/policy", "--system", "sqr"], "no soft-query heads"),
        (["--profile", "maxi"], "no such profile"),
    ]:
        given = {"--videos": folder, "--query": "x", "--index": tmp_path / "index", "--profile": "smoke"}
        given |= dict(zip(words[::2], words[1::2], strict=True))
        status = cli.main(["search", "--json", *(str(word) for pair in given.items() for word in pair)])
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert (status, out) == (2, "") and last.startswith("error: ") and problem in last, (words, err)
        assert "Traceback" not in err


def test_the_first_policy_that_was_trained_is_taken(world, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    assert search_folder.pick(world) == (world.policy, "walkdown")
    home = world.runs("didemo") / "grpo" / "vsr1"
    home.mkdir(parents=True)
    for name in (".step.json", "vsr1.json"):
        (home / name).write_text('{"key": 1}')
    assert search_folder.pick(world) == search_folder.pick(world, dataset="didemo") == (str(home), "sqr")
    assert search_folder.pick(world, system="hqr-seen") == (world.policy, "hqr-seen")
    with pytest.raises(InputError, match=r"charades/.*grpo/vsr1: not trained yet"):
        search_folder.pick(world, dataset="charades")
