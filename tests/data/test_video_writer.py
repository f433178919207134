"""The H.264 files that are written: read back, frame by frame."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from vsr1.data import video_reader, video_writer


def grey_frames(count, height=64, width=96):
    """Frames whose brightness is their number."""
    return [np.full((height, width, 3), 20 * number, np.uint8) for number in range(count)]


def test_frames_are_read_back_at_their_times_and_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        video_writer.write_video(tmp_path / name, grey_frames(12), 4)
    clip = video_reader.Reader(fps=4.0).read(tmp_path / "a.mp4")
    assert clip.problem is None and clip.seconds == 3.0 and clip.frames.shape == (12, 64, 96, 3)
    assert clip.frames.mean(axis=(1, 2, 3)) == pytest.approx(20 * np.arange(12), abs=3)
    assert clip.timestamps.tolist() == [number / 4 for number in range(12)]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_decoded_frames_into_an_open_file_are_the_arrays_into_a_path(tmp_path):
    video_writer.write_video(tmp_path / "a.mp4", grey_frames(8), Fraction(5, 2), keyframe_interval=2)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = list(container.decode(video=0))
        assert sum(frame.key_frame for frame in frames) == 4
    again = io.BytesIO()
    video_writer.write_video(again, frames, 4)
    again.seek(0)
    with av.open(again) as container:
        assert container.streams.video[0].average_rate == 4
        shades = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert shades == pytest.approx(20 * np.arange(8), abs=3)


def test_a_video_whose_frames_fail_leaves_no_file_at_its_path(tmp_path):
    def fail():
        yield grey_frames(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video_writer.write_video(tmp_path / "a.mp4", fail(), 4)
    assert not (tmp_path / "a.mp4").exists()
