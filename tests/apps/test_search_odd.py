"""A folder of files that are not plain is searched from start to end: the moment, and the cut of it, are right."""

from fractions import Fraction

import numpy as np
import pytest
from clips import EVEN, FAST, FPS, OPEN, write
from test_search_windows import RED, is_red, red  # noqa: F401 (a fixture: an engine and an agent that see only red)

import vsr1
from vsr1.data import video_reader

LENGTH, FIRST, LAST = 80, 32, 56  # frames: ten seconds, red from the fourth to the seventh
VARIABLE = np.cumsum(np.random.default_rng(0).integers(60, 190, LENGTH))  # ms


def upright(number):
    """What a person should see: grey, or red in the moment; white in the top left corner."""
    picture = np.full((96, 128, 3), 90, np.uint8) if not FIRST <= number < LAST else np.tile(RED, (2, 2, 1))
    picture[:24, :32] = 255
    return picture


def turned(degrees):
    """As a phone stores it that was held sideways: the file says how to turn it back."""
    return lambda number: np.ascontiguousarray(np.rot90(upright(number), -degrees // 90))


KINDS = {  # name: how it is written
    "open_groups.mkv": {"codec": "libx265", "options": OPEN["libx265"]},
    "broadcast.ts": {"codec": "mpeg2video", "options": OPEN["mpeg2video"]},
    "turned.mov": {"picture": turned(90), "rotation": 90},
    "turned_and_trimmed.mp4": {"picture": turned(270), "rotation": 270, "shown_at": EVEN[:LENGTH] - 8},
    "av1.webm": {"codec": "libsvtav1", "options": FAST["libsvtav1"]},
    "ten_bits.mp4": {"codec": "libx265", "options": FAST["libx265"], "pixels": "yuv420p10le"},
    "variable.mkv": {"shown_at": VARIABLE, "tick": Fraction(1, 1000)},
    "two_tracks.mp4": {"tracks": 2},
    "wide_pixels.mkv": {"tags": {"sample_aspect_ratio": Fraction(3, 2)}},
    "no_clock.avi": {"codec": "mpeg4", "options": FAST["mpeg4"]},
}


def moment(how):
    """Seconds of the first red frame and of the first one after, since the first frame that is shown."""
    ticks = how.get("shown_at", EVEN)
    seconds = np.array(ticks, float) * float(how.get("tick", Fraction(1, FPS)))
    seconds -= seconds[seconds >= 0][0]
    return seconds[FIRST], seconds[LAST]


def test_a_folder_of_odd_files_is_searched_and_each_moment_cut_upright(red, tmp_path):  # noqa: F811
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, how in KINDS.items():
        write(str(folder / name), **{"shown_at": EVEN[:LENGTH], "picture": upright} | how)
    (folder / "cut_off.mp4").write_bytes((folder / "turned_and_trimmed.mp4").read_bytes()[:900])
    (folder / "module.ts").write_text("export const size = 1;\n" * 40)
    with vsr1.open(folder) as videos:
        found = videos.search("something red", k=len(KINDS), verdicts=len(KINDS))
        paths = videos.export(found, tmp_path / "cuts")
    assert list(found["unreadable"]) == ["cut_off.mp4"], "and TypeScript is no video"
    hits = {hit["video"]: hit for hit in found["hits"]}
    assert hits.keys() == KINDS.keys() and {hit["verdict"] for hit in hits.values()} == {"accepted"}
    with video_reader.Reader() as reader:
        cuts = {hit["video"]: reader.read(path) for hit, path in zip(found["hits"], paths, strict=True)}
    for name, how in KINDS.items():
        start, end = moment(how)
        named, cut = hits[name]["moment"], cuts[name]
        looks = np.arange(np.ceil(start), end)  # one a second sees it
        assert named == pytest.approx([looks[0], looks[-1] + 1], abs=0.05), name
        assert cut.seconds == pytest.approx(named[1] - named[0], abs=0.1), name
        assert cut.frames.shape[1:3] == (96, 192 if "wide" in name else 128), name
        assert (is_red(cut.frames) == (named[0] + cut.timestamps < end)).all(), name
        assert (cut.frames[:, :12, :16] > 200).all(), name
