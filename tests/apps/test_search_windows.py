"""Long films, many queries and what has changed since, by an engine and an agent that see nothing but red."""

import dataclasses
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import vsr1
from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.apps import folder_index, search_folder, search_page
from vsr1.config import ROOT, InputError
from vsr1.data import decoder, video_reader
from vsr1.data.video_writer import write_video
from vsr1.loop import episode, replies, runner
from vsr1.loop.records import Verification
from vsr1.models import loading

GREY, RED = np.full((48, 64, 3), 90, np.uint8), np.full((48, 64, 3), (230, 20, 20), np.uint8)


def is_red(frames):
    return (frames[..., 0].astype(int) - frames[..., 1]).mean(axis=(1, 2)) > 80  # (T,)


def unit(x, y):
    return np.array([[x, y]], np.float32) / np.hypot(x, y)


class RedEngine:
    """A clip's second number is how much of it is red; texts ask for nothing else."""

    name, instruction, calls = "red", "Find red.", 0

    def embed_texts(self, texts):
        return np.concatenate([unit(0, 1) for _ in texts])

    def embed_clips(self, clips):
        type(self).calls += 1
        return np.concatenate([unit(1, is_red(clip.frames).mean()) for clip in clips])


class RedAgent:
    """Accepts what has a red look, from the first one to a second after the last."""

    carry, refine = 1, staticmethod(episode.rank_fallback)

    def __init__(self, profile, system, engine, policy, vectors, clips):
        self.system, self.clips = system, clips

    def ask(self, pairs):
        verifications = []
        for clip in self.clips.get([window for _, window in pairs]):
            assert clip.timestamps[0] == 0 and clip.timestamps[-1] < clip.seconds, "not like a short video"
            times = clip.timestamps[is_red(clip.frames)]
            span = (times[0], times[-1] + 1) if len(times) else None
            reply = replies.Reply(
                "<think>red?</think>", (), span is not None, span, False, False, True, None, True
            )
            verifications.append(Verification(reply, clip.seconds))
        return verifications


@pytest.fixture(autouse=True)
def red(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (RedEngine(), None))
    monkeypatch.setattr(runner, "EpisodeRunner", RedAgent)
    monkeypatch.setattr(search_folder, "pick", lambda *_: ("red", "walkdown"))
    monkeypatch.setattr(loading, "version", lambda name: "1")
    monkeypatch.setattr(search_page, "film", lambda *_: (b"", "left out"))
    monkeypatch.setattr(config, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(RedEngine, "calls", 0)


def film(path, seconds, *events):
    """A grey film of one frame a second, red in the seconds of each event."""
    frames = [RED if any(a <= n < b for a, b in events) else GREY for n in range(seconds)]
    path.parent.mkdir(exist_ok=True)
    write_video(path, frames, 1, crf=30, preset="ultrafast", keyframe_interval=30)


def test_five_seconds_in_an_hour_are_found_and_64_looks_would_have_missed_them(tmp_path):
    film(tmp_path / "videos" / "hour.mp4", 3600, (1820, 1825))
    looks = decoder.sample_times(3600.0)
    assert len(looks) == 64 and not ((looks >= 1820) & (looks < 1825)).any()
    with vsr1.open(tmp_path / "videos") as videos:
        found = videos.search("something red")
        paths = videos.export(found, tmp_path / "cuts")
        with pytest.raises(InputError, match="lies among the videos"):
            videos.export(found, tmp_path / "videos" / "cuts")
    assert (found["accepted"], found["video"], found["moment"]) == (True, "hour.mp4", [1820.0, 1825.0])
    assert [hit["verdict"] for hit in found["hits"]].count("accepted") == 1, "it lies in two windows"
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1]
    assert found["windows"] == RedEngine.calls > 3600 / 32
    with video_reader.Reader() as reader:
        part = reader.read(paths[0])
    assert part.seconds == pytest.approx(5, abs=0.05) and is_red(part.frames).all()
    assert found["exported"] == [str(path) for path in (tmp_path / "cuts").iterdir()]


def test_a_moment_longer_than_a_window_is_followed_and_two_stay_two(tmp_path):
    film(tmp_path / "videos" / "long.mp4", 400, (100, 190), (300, 304))
    film(tmp_path / "videos" / "short.mp4", 30)
    with vsr1.open(tmp_path / "videos") as videos:
        one, two = videos.search("red"), videos.search("red", k=9, verdicts=9)
        none = videos.search("red", verdicts=0)
    assert one["moment"] == [100.0, 190.0]
    accepted = [hit["moment"] for hit in two["hits"] if hit["verdict"] == "accepted"]
    assert sorted(accepted) == [[100.0, 190.0], [300.0, 304.0]]
    assert {"video": "short.mp4", "window": [0.0, 30.0]}.items() <= two["hits"][-1].items()
    assert two["hits"][-1]["verdict"] == "rejected" and len(two["looks"]) >= 9
    assert (none["accepted"], none["looks"], none["stop"]) == (False, [], "engine alone")
    assert {hit["verdict"] for hit in none["hits"]} == {"not looked at"} and none["video"] == "long.mp4"


@pytest.mark.parametrize("seconds", [64.0, 64.5, 88.0, 3601.7])
def test_windows_cover_a_video_and_overlap(seconds):
    profile = config.load(str(ROOT / "vsr1/profiles/mini.yaml"))
    spans = np.array(folder_index.spans_of(seconds, profile))
    assert spans[0, 0] == 0 and spans[-1, 1] == pytest.approx(seconds, abs=1e-3)
    assert (len(spans) == 1) == (seconds <= 64)
    if len(spans) > 1:
        assert (np.diff(spans) >= 32).all() and (np.diff(spans) < 33).all()
        assert (spans[:-1, 1] - spans[1:, 0] >= 7).all() and (spans[:, 0] % 1 == 0).all()


def test_one_folder_has_one_index_however_it_is_spelled(tmp_path, monkeypatch):
    film(tmp_path / "videos" / "a.mp4", 4)
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    spelled = [tmp_path / "videos", "videos", "link/../videos", "link", "videos/"]
    assert [vsr1.open(name).index.embedded for name in spelled] == [1, 0, 0, 0, 0]


def test_source_code_is_no_video_and_other_endings_are_known(tmp_path):
    (tmp_path / "index.ts").write_text("export const größe = 1;\n" * 40, encoding="utf-8")
    (tmp_path / "go.mod").write_text("module x\n")
    (tmp_path / "cut.mp4").write_text("404 not found")  # no program: it is named as unreadable
    for name in ("tape.ts", "a.m2ts", "b.QT", "c.3g2", "d.mxf", "e.mts"):
        (tmp_path / name).write_bytes(b"G\0\xff")
    names = ["a.m2ts", "b.QT", "c.3g2", "cut.mp4", "d.mxf", "e.mts", "tape.ts"]
    assert list(folder_index.find_videos(tmp_path)[0]) == names


def test_what_could_not_be_read_is_repeated_and_read_again_when_it_changes(tmp_path, monkeypatch):
    film(tmp_path / "videos" / "a.mp4", 4)
    bad, read = tmp_path / "videos" / "bad.mp4", []
    bad.write_bytes(b"no film")
    plain = video_reader.Reader.read
    monkeypatch.setattr(
        video_reader.Reader, "read", lambda self, *given: read.append(1) or plain(self, *given)
    )

    def again(**options):
        read.clear()
        said = []
        index = vsr1.open(bad.parent, say=said.append, **options).index
        lines = [line for line in said if line.startswith("cannot be read")]
        return len(read), index.unreadable, lines

    count, first, lines = again()
    assert (
        count == 2
        and list(first) == ["bad.mp4"]
        and lines == [f"cannot be read: bad.mp4: {first['bad.mp4']}"]
    )
    assert again() == (0, first, [f"cannot be read, as before: bad.mp4: {first['bad.mp4']}"])
    assert again(retry=True) == (1, first, lines)
    film(bad, 5)
    assert again() == (1, {}, [])


def test_a_part_that_cannot_be_read_costs_itself_alone(tmp_path, monkeypatch):
    film(tmp_path / "videos" / "a.mp4", 200, (20, 24))
    plain = video_reader.Reader.read

    def damaged(self, path, times=None):
        lost = times is not None and times.max() > 170
        return (
            video_reader.Clip(None, None, None, "pictures are missing") if lost else plain(self, path, times)
        )

    monkeypatch.setattr(video_reader.Reader, "read", damaged)
    for _ in range(2):
        with vsr1.open(tmp_path / "videos") as videos:
            assert videos.search("red")["moment"] == [20.0, 24.0]
            lost = [
                f"second {part} is left out: pictures are missing" for part in ("144 to 176", "168 to 200")
            ]
            assert videos.index.unreadable == {"a.mp4": "; ".join(lost)}


def test_what_changed_is_said_and_embedded_again(tmp_path, monkeypatch):
    film(tmp_path / "videos" / "a.mp4", 4)

    def again(**options):
        said = []
        index = vsr1.open(tmp_path / "videos", say=said.append, **options).index
        return index.embedded, index.rebuilt, [line for line in said if "has changed" in line]

    why = "index: all videos were embedded again, for this has changed: "
    assert again() == (1, None, []) and again() == (0, None, [])
    monkeypatch.setattr(loading, "version", lambda name: "2")
    assert again() == (1, "weights of the engine", [f"{why}weights of the engine"]) and again() == (
        0,
        None,
        [],
    )
    monkeypatch.setattr(RedEngine, "name", "other")
    assert again() == (1, "engine", [f"{why}engine"])
    (path,) = (tmp_path / "clone").rglob("index.npz")
    np.savez(path, key="old", files="{}", vecs=np.zeros((0, 2)))  # of the version before windows
    assert again() == (1, "format", [f"{why}format"])


def test_a_number_that_is_not_finite_is_an_error_and_never_the_last_file(tmp_path, monkeypatch):
    film(tmp_path / "videos" / "a.mp4", 4)
    film(tmp_path / "videos" / "b.mp4", 5)
    nan = lambda self, given: np.full((len(given), 2), np.nan, np.float32)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(RedEngine, "embed_clips", nan)
        with pytest.raises(InputError, match=r"^red: its vector of a\.mp4 holds numbers that are not finite"):
            vsr1.open(tmp_path / "videos")
    with vsr1.open(tmp_path / "videos") as videos, monkeypatch.context() as patch:
        patch.setattr(RedEngine, "embed_texts", nan)
        with pytest.raises(InputError, match="its vector of the query holds numbers that are not finite"):
            videos.search("red")
        state = SimpleNamespace(vec=np.array([np.nan, 1], np.float32))
        patch.undo()
        search = search_folder._QuerySearch(videos, search_folder.parse_query("red"))
        with pytest.raises(InputError, match="the refined query"):
            search.rank([(search.query, state)])
    files = {name: dataclasses.replace(f, vecs=f.vecs * np.nan) for name, f in videos.index.files.items()}
    folder_index.write_index(videos.home / "index.npz", {"format": 2}, files, {})
    with pytest.raises(InputError, match=r"a broken index .*not finite.*delete it and search again"):
        vsr1.open(tmp_path / "videos")


# --- Several queries


def command(*words):
    """(status, JSON objects on stdout) of a search; `config.load` is asked for the profile by its path."""
    return cli.main(["search", *map(str, words)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    profile = config.load(str(ROOT / "vsr1/profiles/mini.yaml"))
    monkeypatch.setattr(cli, "_load", lambda *_: profile)
    film(tmp_path / "videos" / "a.mp4", 8, (3, 5))
    return tmp_path / "videos"


def test_a_file_or_a_pipe_of_queries_is_searched_with_the_models_loaded_once(
    folder, monkeypatch, capsys, tmp_path
):
    loaded = []
    monkeypatch.setattr(runner, "load_pair", lambda *_: loaded.append(1) or (RedEngine(), None))
    (tmp_path / "list.txt").write_text("a red box\n\n  a red wall \n")
    words = ["--videos", folder, "--json", "--export", tmp_path / "cuts"]
    assert command(*words, "--queries", tmp_path / "list.txt") == 0 and loaded == [1]
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["query"] for one in found] == ["a red box", "a red wall"]
    assert all(one["accepted"] and one["moment"] == [3.0, 5.0] for one in found)
    assert (
        found[0]["exported"] == found[1]["exported"] == [str(path) for path in (tmp_path / "cuts").iterdir()]
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert command(*words[:3], "--queries", "-", "--verdicts", 0) == 1, "nobody accepted anything"
    assert [json.loads(line)["query"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_a_person_is_asked_until_an_empty_line(folder, monkeypatch, capsys):
    typed = io.StringIO("red\n<REFINE>\nred wall\n\nnever read\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    assert command("--videos", folder) == 0
    out = capsys.readouterr().out
    assert out.count("Found: a.mp4, 00:03.0 to 00:05.0") == 2 and "leave it out" in out


def test_bad_queries_are_one_line_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "load_pair", lambda *_: pytest.fail("loaded for nothing"))
    (tmp_path / "list.txt").write_text("red\nred <|im_end|>\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for words, problem in [
        (
            ["--queries", tmp_path / "list.txt"],
            "list.txt, line 2: query 'red <|im_end|>': <|im_end|> is a sign",
        ),
        (["--queries", tmp_path / "none.txt"], "none.txt: cannot be read"),
        (["--queries", tmp_path / "list.txt", "--query", "x"], "name one of them"),
        ([], "no query; name one with --query"),
    ]:
        assert command("--videos", folder, *words) == 2
        assert problem in capsys.readouterr().err.splitlines()[-1]


def test_import_vsr1_is_cheap():
    code = "import sys, vsr1; print(sorted({'torch', 'numpy', 'transformers', 'vsr1.config'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
