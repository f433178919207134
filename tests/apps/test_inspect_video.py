"""`inspect` shows what the models get, and says why a file cannot be read."""

import json

import numpy as np
import pytest
from clips import STEADY, film, numbers_in
from PIL import Image

from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.data import frame_sizes, video_reader


def test_it_writes_the_frames_that_the_models_see(tmp_path, capsys):
    path = film(tmp_path / "a.mp4", STEADY[:80])
    out = [f"--{kind}={tmp_path / kind}" for kind in ("png", "npz")]
    assert cli.main(["inspect", str(path), "--json", *out]) == 0
    facts = json.loads(capsys.readouterr().out)
    profile = config.load("mini")
    clip = video_reader.reader_for(profile).read(path)
    written = np.load(tmp_path / "npz")
    assert facts["looks"] == written["timestamps"].tolist() == clip.timestamps.tolist()
    assert facts["decoder"] == "PyAV" and facts["codec"] == "h264" and facts["seconds"] == 10.0
    frame = frame_sizes.resized(clip.frames[3], [written["frames"].shape[1:3]]).permute(1, 2, 0).numpy()
    assert (written["frames"][3] == frame).all() and written["frames"][
        0
    ].nbytes <= 3 * profile.max_frame_pixels
    height, width = written["frames"].shape[1:3]
    picture = np.asarray(Image.open(tmp_path / "png"))
    assert (picture[:height, width : 2 * width] == written["frames"][1]).all()
    assert numbers_in(clip.frames).tolist() == list(range(0, 80, 8))


def test_it_says_why_a_file_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.mp4").write_text("not a video")
    assert cli.main(["inspect", str(tmp_path / "a.mp4")]) == 1
    printed = capsys.readouterr()
    assert (
        "problem      no readable video: Invalid data" in printed.out and "a.mp4: no readable" in printed.err
    )
    assert cli.main(["inspect", str(tmp_path / "none.mp4")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("side", [32, 96])
def test_a_sheet_has_a_row_for_eight_frames(side):
    from vsr1.apps import inspect_video

    frames = np.zeros((10, side, side, 3), np.uint8)
    assert inspect_video.contact_sheet(frames, np.arange(10.0)).size == (
        8 * side,
        2 * (side + inspect_video.CAPTION),
    )
