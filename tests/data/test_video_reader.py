"""Frames are right when the number painted into them says so, and when PyAV, reading in order, agrees."""

import dataclasses
import os
import subprocess
import sys
from fractions import Fraction
from multiprocessing.connection import Connection

import av
import numpy as np
import pytest
from clips import JUMPY, STEADY, film, in_order, numbers_in, shift, wrecked
from PIL import Image

from vsr1 import config
from vsr1.data import decoder, video_reader
from vsr1.data.decoder import sample_times
from vsr1.data.video_reader import DecodeTimeout, Reader, read_videos
from vsr1.data.video_writer import write_video


@pytest.fixture(scope="module")
def reader():
    with Reader(timeout=20) as reader:
        yield reader


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Good clips by name; all but the last three have timestamps of their own."""
    folder = tmp_path_factory.mktemp("clips")
    clips = {
        "keyframe every 250": film(folder / "k250.mp4", STEADY, gop=250),
        "keyframe every 30": film(folder / "k30.mp4", STEADY, movflags="+faststart"),
        "variable rate": film(folder / "vfr.mp4", JUMPY, gop=250),
        "B-frames": film(folder / "b.mp4", JUMPY, b_frames=3, movflags="+faststart"),
        "late start, mp4": film(folder / "late.mp4", STEADY + 5400),
        "late start, mkv, B-frames": film(folder / "late.mkv", STEADY + 5400, b_frames=2),
        "late start, ts": film(folder / "late.ts", STEADY + 540),
        "wmv": film(folder / "a.wmv", STEADY, codec="wmv2"),
        "mpg": film(folder / "a.mpg", np.arange(560), codec="mpeg2video", tick=Fraction(1, 25)),
        "mp4 called avi": film(folder / "a.mp4", JUMPY).rename(folder / "mp4.avi"),
        "avi": film(folder / "h264.avi", np.arange(560), tick=Fraction(1, 8)),
    }
    clips["cut without recoding"] = shift(clips["B-frames"], folder / "cut.mp4", 1.3)
    return clips


KINDS = (
    "keyframe every 250|keyframe every 30|variable rate|B-frames|late start, mp4|late start, mkv, B-frames|"
    "late start, ts|wmv|mpg|mp4 called avi|avi|cut without recoding"
).split("|")


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_the_one_on_screen_by_its_number_and_by_a_second_reader(kind, clips, reader):
    clip = reader.read(clips[kind])
    assert clip.problem is None
    shown_at, numbers = in_order(clips[kind])
    wanted = sample_times(clip.seconds)
    on_screen = np.searchsorted(shown_at, wanted + 1e-3, side="right") - 1
    right = numbers_in(clip.frames) == numbers[on_screen]
    assert right.all(), f"{right.sum()} of {len(right)} frames right"
    assert np.abs(clip.timestamps - shown_at[on_screen]).max() < 1e-3
    assert 0 < clip.seconds - shown_at[-1] < 0.24  # a frame lasts 0.02 to 0.23 s
    if kind == "variable rate":
        assert len(right) == 64


def test_a_batch_equals_its_frames_one_by_one(clips, reader):
    for kind in ("variable rate", "B-frames", "avi", "cut without recoding"):
        times = np.array([61.2, 0.0, 17.77, 17.77, 40.0])  # any order, and one twice
        batch = reader.read(clips[kind], times)
        singles = [reader.read(clips[kind], times[i : i + 1]) for i in range(len(times))]
        assert np.array_equal(batch.frames, np.concatenate([single.frames for single in singles])), kind
        assert np.array_equal(batch.timestamps, np.concatenate([single.timestamps for single in singles]))


def test_a_slideshow_and_a_single_picture_are_whole_videos(reader, tmp_path):
    slides = reader.read(film(tmp_path / "slides.mp4", [0, 9000, 30000, 31000]))
    assert slides.seconds == 31.125 and slides.timestamps.tolist() == [0] * 9 + [9] * 21 + [30, 31]
    assert numbers_in(slides.frames).tolist() == [0] * 9 + [1] * 21 + [2, 3]
    single = reader.read(film(tmp_path / "one.mp4", [0]))
    assert single.seconds == 0.125 and numbers_in(single.frames).tolist() == [0, 0]


def test_sample_times_cover_the_video_evenly():
    for seconds in (0.04, 0.5, 1.0, 2.0, 30.0, 30.00002, 63.4, 64.0, 64.5, 1000.0):
        times = sample_times(seconds)
        slow = [second for second in range(64) if second < seconds - 1e-3]  # one a second, by counting
        if seconds <= 64:
            assert times.tolist() == slow + slow[-1:] * (len(slow) % 2)
        else:
            assert len(times) == 64 and np.allclose(np.diff(times), seconds / 64) and times[0] == 0
        assert len(times) % 2 == 0 and times[-1] < seconds
    assert sample_times(10.0, fps=2.0, max_frames=16).tolist() == (np.arange(16) * 10 / 16).tolist()


@pytest.mark.parametrize("seconds", [30.0, 117.0, 240.0])
def test_looks_stand_at_the_start_of_each_share_and_not_at_both_ends_as_the_official_ones(seconds):
    """By the official rule for 30 frames a second: round(k x rate), or 64 of them with the last one at the end."""
    times, rate = sample_times(seconds), 30
    if seconds <= 64:
        official = np.round(np.arange(int(seconds)) * rate) / rate
        assert np.abs(times - official).max() <= 0.5 / rate
        return
    official = np.linspace(0, seconds * rate - 1, 64) / rate
    earlier = official - times
    assert np.abs(earlier - np.arange(64) * seconds / 4032).max() <= 1 / rate
    assert seconds / 64 - 1 / rate - 1e-9 <= earlier.max() <= seconds / 64


def test_scaled_frames_show_the_same_numbers(clips):
    with Reader(size=(64, 48), max_frames=16) as reader:
        for kind in ("variable rate", "avi"):
            clip = reader.read(clips[kind])
            assert clip.frames.shape == (16, 48, 64, 3)
            shown_at, numbers = in_order(clips[kind])
            assert (
                numbers_in(clip.frames) == numbers[np.abs(shown_at[:, None] - clip.timestamps).argmin(0)]
            ).all()


def test_broken_files_are_named_with_a_reason_and_the_run_goes_on(clips, tmp_path):
    good, mkv = clips["keyframe every 30"], clips["late start, mkv, B-frames"]
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    with av.open(str(tmp_path / "sound.mp4"), "w") as box:
        stream = box.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        box.mux([*stream.encode(frame), *stream.encode()])
    wrecked(good, tmp_path / "half.mp4", keep=0.5)
    wrecked(clips["variable rate"], tmp_path / "no index.mp4", keep=0.5)
    wrecked(mkv, tmp_path / "half.mkv", keep=0.5)
    wrecked(good, tmp_path / "hole.mp4", hole=(0.5, 0.6))
    wrecked(mkv, tmp_path / "hole.mkv", hole=(0.4, 0.6))
    reasons = {
        "missing.mp4": "No such file",
        "empty.mp4": "the file is empty",
        "text.mp4": "Invalid data",
        "sound.mp4": "no video stream",
        "half.mp4": "cut short: ... of 560 frames",
        "no index.mp4": "Invalid data",
        "half.mkv": "cut short: ... s are in the file",
        "hole.mp4": "damaged data around second",
        "hole.mkv": "pictures are missing around second",
    }
    paths = [path for name in reasons for path in (tmp_path / name, good)]
    read = list(read_videos(paths, Reader(), workers=2))
    for name, bad, after in zip(reasons, read[::2], read[1::2], strict=True):
        assert bad.frames is None and bad.timestamps is None, name
        assert all(part in bad.problem for part in reasons[name].split("...")), (name, bad.problem)
        assert after.problem is None and numbers_in(after.frames)[:3].tolist() == [0, 8, 17], name


def test_a_name_that_is_not_utf8_is_read(clips, tmp_path, reader):
    path = wrecked(clips["avi"], tmp_path / os.fsdecode(b"\xff.avi"))
    assert reader.read(path).problem is None


def test_a_time_beyond_the_end_is_a_problem_and_not_the_last_frame_again(clips):
    clip = Reader().read(clips["variable rate"], [3.0, 200.0])
    assert clip.frames is None and "asked for second 200.00, the pictures end at" in clip.problem


def test_a_hang_is_killed_in_time_and_stops_the_caller_or_is_listed(clips, tmp_path):
    os.mkfifo(tmp_path / "hangs.mp4")  # opening it blocks for ever, inside the library
    with Reader(timeout=0.5) as reader:
        reader.timeout = 20
        reader.read(clips["keyframe every 30"])
        first, reader.timeout = reader._child.pid, 0.5
        with pytest.raises(
            DecodeTimeout, match=r"hangs\.mp4: not decoded within 0\.5 s, nor within 2 s .*same command"
        ):
            reader.read(tmp_path / "hangs.mp4")
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        reader.skip_slow, reader.timeout = True, 0.1
        assert reader.read(tmp_path / "hangs.mp4").problem.startswith(
            "not decoded within 0.1 s, nor within 0.4 s"
        )
        reader.timeout = 20
        assert reader.read(clips["keyframe every 30"]).problem is None and reader._child.pid != first


def test_a_profile_says_how_long_a_video_may_take():
    profile = dataclasses.replace(config.load("mini"), decode_timeout=7.0, video_fps=2.0, max_frames=32)
    assert video_reader.reader_for(profile) == Reader(2.0, 32, timeout=7.0)
    assert profile.digest() == dataclasses.replace(profile, decode_timeout=30.0).digest(), (
        "no result depends on it"
    )


def test_a_slow_video_is_read_at_the_second_attempt(clips, monkeypatch):
    """The first answer does not come in time: the machine was suspended, or the disk is slow."""
    with Reader(timeout=20) as reader:
        expected = reader.read(clips["avi"])
        attempts = []
        poll = Connection.poll

        def late(pipe, timeout):
            if timeout in (20, 80):
                attempts.append(timeout)
            return poll(pipe, timeout) and timeout != 20

        monkeypatch.setattr(Connection, "poll", late)
        clip = reader.read(clips["avi"])
    assert attempts == [20, 80] and clip.problem is None and np.array_equal(clip.frames, expected.frames)


def test_a_video_that_is_too_slow_stops_a_corpus_and_does_not_pass_for_a_broken_one(clips, tmp_path):
    os.mkfifo(tmp_path / "hangs.mp4")
    paths = [clips["keyframe every 30"], tmp_path / "hangs.mp4", clips["keyframe every 30"]]
    reading = read_videos(paths, Reader(timeout=1.5, max_frames=2))
    with pytest.raises(DecodeTimeout, match=r"hangs\.mp4"):
        list(reading)


@pytest.mark.parametrize("deed", ["os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(99)"])
def test_what_one_decoder_dies_of_or_hangs_on_the_other_reads_where_it_can_be_trusted(
    deed, clips, tmp_path, monkeypatch, reader
):
    script = tmp_path / "decoder.py"
    script.write_text(f"""
import os, signal, sys, time
from multiprocessing.connection import Connection
from vsr1.data import decoder
decoder._decode = lambda *_: {deed}
decoder.serve(Connection(int(sys.argv[1])))
""")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setattr(video_reader.decoder, "__file__", str(script))
    with Reader(timeout=5, skip_slow=True) as broken:
        clip, right = broken.read(clips["B-frames"]), reader.read(clips["B-frames"])
        assert clip.problem is None and clip.facts["decoder"] == "decord"
        assert np.array_equal(clip.frames, right.frames) and np.array_equal(clip.timestamps, right.timestamps)
        broken.timeout = 1
        problem = broken.read(clips["cut without recoding"]).problem
    died = "the decoder died of signal 11, the second one died of signal 11"
    assert problem == (
        died if "kill" in deed else "not decoded within 1 s, nor within 4 s at a second attempt"
    )


@pytest.mark.parametrize("error", [IndexError, TypeError, ZeroDivisionError, AssertionError, MemoryError])
def test_an_error_that_nobody_foresaw_is_one_videos_problem(error, clips, monkeypatch):
    def fail(*_):
        raise error("of a strange\nfile")

    monkeypatch.setattr(decoder, "_list_packets", fail)
    answer = decoder.decode_or_explain(str(clips["avi"]), None, 1.0, 64, None)
    assert answer == (None, None, None, f"the decoder failed: {error.__name__}: of a strange file", {})


def test_a_video_that_is_read_in_order_after_all_reports_no_jumps(clips, monkeypatch):
    """The second of two jumps does not arrive, so all frames are decoded."""
    jump, keyframes = decoder.Packets.jump, []

    def misled(packets, *keyframe):
        keyframes.append(keyframe)
        if len(keyframes) == 2:
            raise decoder.Mispredicted
        jump(packets, *keyframe)

    monkeypatch.setattr(decoder.Packets, "jump", misled)
    times = np.array([0.0, 35.0, 56.0])
    frames, *_, facts = decoder.decode(str(clips["keyframe every 30"]), times, 1.0, 64, None)
    assert numbers_in(frames).tolist() == [0, 280, 448] and len(keyframes) == 2
    assert facts["jumps"] == 0 and facts["why"].startswith("all frames in order")


def test_after_such_an_error_the_same_child_reads_on(clips):
    with Reader(timeout=20) as reader:
        reader.read(clips["avi"], [0.0])
        child = reader._child.pid
        reader.size = (64,)  # not a pair: Python's own error, where the sizes are unpacked
        assert reader.read(clips["avi"], [0.0]).problem.startswith("the decoder failed: ValueError: ")
        reader.size = None
        assert reader.read(clips["avi"], [0.0]).problem is None and reader._child.pid == child


def test_an_interrupted_read_leaves_no_answer_for_the_next_video(clips, monkeypatch):
    with Reader(timeout=20) as reader:
        reader.read(clips["avi"], [0.0])
        with monkeypatch.context() as patch:
            patch.setattr(type(reader._pipe), "recv", lambda pipe: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reader.read(clips["avi"], [0.0])
        assert numbers_in(reader.read(clips["keyframe every 30"], [10.0]).frames) == [80]


def test_one_child_reads_many_videos_without_torch_and_from_an_unguarded_script(clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
from vsr1.data.video_reader import Reader, read_videos
with Reader() as reader:
    pids = set()
    for _ in range(3):
        assert reader.read({str(clips["keyframe every 30"])!r}).problem is None
        pids.add(reader._child.pid)
    assert len(pids) == 1
    assert "torch" not in open(f"/proc/{{pids.pop()}}/maps").read()
print(sum(clip.problem is None for clip in read_videos([{str(clips["avi"])!r}] * 3, Reader(), workers=2)))
""")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(("budget", "most"), [(2**30, 2 + 3), (1, 2 + 1)])
def test_decoding_ahead_is_bounded_in_number_and_bytes_and_stops_with_its_reader(
    clips, monkeypatch, budget, most
):
    monkeypatch.setattr(video_reader, "WAITING_BYTES", budget)
    requested = []

    def paths():
        for number in range(100):
            requested.append(number)
            yield clips["keyframe every 30"]

    ahead = read_videos(paths(), Reader(max_frames=2), workers=1)
    next(ahead), next(ahead)
    ahead.close()
    assert len(requested) <= most


def test_a_missing_decoder_is_one_clear_line(tmp_path, monkeypatch, clips):
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError(\"No module named 'av'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"needs av \(No module named 'av'\): pip install"):
        Reader().read(clips["avi"])


def test_large_frames_are_shrunk_as_they_are_decoded_and_small_ones_are_not(reader, tmp_path, monkeypatch):
    """All frames of a video stay below MAX_BYTES, and show what full size shows, shrunk."""
    still = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    write_video(tmp_path / "large.mp4", [still] * 8, 1, 10)
    whole = decoder.decode(str(tmp_path / "large.mp4"), None, 1.0, 64, None)
    monkeypatch.setattr(decoder, "MAX_BYTES", whole[0].nbytes // 9)
    frames, times, seconds, facts = decoder.decode(str(tmp_path / "large.mp4"), None, 1.0, 64, None)
    assert frames.shape == (8, 85, 128, 3) and frames.nbytes <= whole[0].nbytes / 9
    assert (facts["shown_size"], whole[3]["shown_size"]) == ("384x256", "384x256")
    assert facts["notes"] == ["shrunk to 128x85 as it was read: it is long and large"]
    assert not whole[3]["notes"]
    assert seconds == whole[2] and (times == whole[1]).all()
    near = np.asarray(Image.fromarray(whole[0][3]).resize((128, 85), Image.Resampling.BICUBIC)).astype(int)
    assert (
        np.median(np.abs(near - frames[3])) <= 1
    )  # sharp edges differ more: colours are stored at half size
    sized = decoder.decode(str(tmp_path / "large.mp4"), None, 1.0, 64, (384, 256))
    assert (sized[0] == whole[0]).all(), "a size that was asked for is kept"
