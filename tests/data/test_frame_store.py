"""Frames that are kept give the models what the file gives them, and are used only as long as the file is the same."""

import dataclasses
import os
import types

import numpy as np
import pytest
from clips import STEADY, film
from fake import profile as fake_profile

from vsr1 import config
from vsr1.config import InputError
from vsr1.data import clip_cache, frame_sizes, frame_store, video_reader
from vsr1.models import engine, inputs


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """The mini profile with an empty folder for its data."""
    return fake_profile(tmp_path, monkeypatch)


@pytest.fixture
def path(profile):
    """A video of 10 seconds, 128 x 96."""
    folder = profile.data_dir("didemo") / "videos"
    folder.mkdir(parents=True)
    return film(folder / "a.mp4", STEADY[:80])


def read(profile, path, times=None):
    with frame_store.reader_for(profile, "didemo") as reader:
        return reader.read(path, times)


def never_decode(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(video_reader.Reader, "read", decode)


def test_models_get_the_same_patches_from_kept_frames_as_from_the_file(profile, path, monkeypatch):
    plain = video_reader.reader_for(profile)
    with plain:
        clip = plain.read(path)
    first = read(profile, path)
    never_decode(monkeypatch)
    kept = read(profile, path)
    vision = types.SimpleNamespace(patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    for rule in (frame_sizes.PixelRule(profile.max_frame_pixels), engine.pixel_rule(profile)):
        patches, grid = inputs.patchify(clip.frames, vision, rule)
        for small in (first, kept):
            assert small.nbytes < clip.nbytes / 2
            again, same = inputs.patchify(small.frames, vision, rule)
            assert same == grid and (again == patches).all()
    for small in (first, kept):
        assert (small.timestamps == clip.timestamps).all()
        assert (small.seconds, small.problem, small.facts) == (clip.seconds, None, clip.facts)


def test_a_video_is_read_again_when_it_or_the_kept_file_changes(profile, path):
    clip = read(profile, path)
    (file,) = (profile.data_dir("didemo") / "frames").iterdir()
    whole = file.read_bytes()
    for damage in (whole[:1000], whole[:-3000] + bytes(3000), b"", whole[:200] + bytes(5000) + whole[5200:]):
        file.write_bytes(damage)
        assert (read(profile, path).frames == clip.frames).all()
        assert len(file.read_bytes()) == len(whole)
    film(path, STEADY[:40])
    os.utime(path, (1, 1))
    assert (len(clip.frames), len(read(profile, path).frames)) == (10, 6), "an even number"
    fewer = dataclasses.replace(profile, max_frames=4)
    assert len(read(fewer, path).frames) == 4
    assert len(read(profile, path).frames) == 6


def test_what_is_not_the_video_as_models_see_it_is_not_kept(profile, path, tmp_path):
    some = read(profile, path, [0.0, 3.0])
    assert some.frames.shape[:3] == (2, 96, 128), "frames at given times are for people"
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert read(profile, broken).problem and read(profile, tmp_path / "missing.mp4").problem
    assert not (profile.data_dir("didemo") / "frames").exists()
    large = dataclasses.replace(profile, keep_frames=False)
    assert read(large, path).frames.shape[1:3] == (96, 128)
    assert not (profile.data_dir("didemo") / "frames").exists()


def test_frames_that_would_be_shrunk_twice_stay_as_they_are(profile, path, monkeypatch):
    """Of a picture 100 times as wide as high the sides have to be multiples of 32, so one step is not enough."""
    wide = video_reader.Clip(np.zeros((4, 20, 2000, 3), np.uint8), np.arange(4.0), 4.0, None)
    monkeypatch.setattr(video_reader.Reader, "read", lambda *_: wide)
    assert read(profile, path).frames.shape == wide.frames.shape
    assert not (profile.data_dir("didemo") / "frames").exists()


def test_the_models_of_a_data_set_read_what_is_kept(profile, path, monkeypatch):
    read(profile, path)
    never_decode(monkeypatch)
    with clip_cache.open_clips(profile, "didemo", ["a"]) as clips:
        (clip,) = clips.get(["a"])
    assert clip.frames.shape[1:3] == (32, 64)


def test_one_size_is_kept_and_two_are_refused(profile):
    knobs = {"engine_min_pixels": 8192, "engine_max_pixels": 8192, "engine_frame_multiple": 64}
    for knob, value in knobs.items():
        with pytest.raises(
            InputError, match=f"profile mini: with {knob} the engine .* set keep_frames: false"
        ):
            frame_store.reader_for(dataclasses.replace(profile, **{knob: value}), "didemo")
    official = config.load("paper")
    assert frame_store.reader_for(official, "didemo") == video_reader.reader_for(official)
    other = dataclasses.replace(profile, keep_frames=False)
    assert profile.digest() == other.digest(), "no result depends on it"
