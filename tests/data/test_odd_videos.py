"""Files that are not plain show the picture on screen, upright, or are refused with a true reason.

Every kind is written in two codecs and two containers at least. The oracle is PyAV in decoding order and the number
painted into each frame; what a container did to the clock is said where the clip is made.
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import COUNT, EVEN, FAST, FPS, OPEN, film, in_order, numbers_in, paint, shift, wrecked, write

from vsr1.data.decoder import sample_times
from vsr1.data.video_reader import Reader


@pytest.fixture(scope="module")
def reader():
    with Reader(timeout=60) as reader:
        yield reader


def check(reader, path, seconds=None, numbers=None, upright=lambda frames: frames):
    """Compare what the reader gives, for its own looks and for a few far apart, with PyAV in order."""
    if numbers is None:
        seconds, numbers = in_order(path)
    clip = reader.read(path)
    assert clip.problem is None, (path, clip.problem)
    few = seconds[[len(seconds) * 4 // 5, 0, len(seconds) // 2]] + 0.01
    few_clip = reader.read(path, few)
    for wanted, actual in ((sample_times(clip.seconds), clip), (few, few_clip)):
        on_screen = np.searchsorted(seconds, wanted + 2e-3, side="right") - 1
        shown = numbers_in(upright(actual.frames))
        assert (shown == numbers[on_screen]).all(), (path, clip.facts, shown - numbers[on_screen])
        assert np.abs(actual.timestamps - seconds[on_screen]).max() < 2e-3, (path, clip.facts)
    assert 0 < clip.seconds - seconds[-1] < 0.3, (clip.seconds, seconds[-1])
    return clip, few_clip


@pytest.mark.parametrize("codec", OPEN)
@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts"])
def test_open_groups_of_pictures(codec, ending, reader, tmp_path):
    path = write(str(tmp_path / f"open.{ending}"), codec, options=OPEN[codec])
    _, few = check(reader, path)
    assert few.facts["decoder"] == "PyAV" and (few.facts["jumps"] == 0) == (codec == "libx264"), few.facts


@pytest.mark.parametrize(
    ("codec", "ending"), [(c, e) for c in FAST for e in ("mkv", "mp4") if c + e != "libvpxmp4"]
)
def test_codecs_jump_to_keyframes_and_arrive(codec, ending, reader, tmp_path):
    _, few = check(reader, write(str(tmp_path / f"a.{ending}"), codec))
    assert few.facts["jumps"] == 2, few.facts


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_edit_lists_negative_and_late_clocks(codec, ending, reader, tmp_path):
    path = write(str(tmp_path / f"a.{ending}"), codec, tick=Fraction(1, 8000), shown_at=EVEN * 1000)
    clip, _ = check(reader, shift(path, tmp_path / f"cut.{ending}", 1.3))
    assert "0 jumps" in clip.facts["why"]
    check(reader, write(str(tmp_path / f"late.{ending}"), codec, EVEN + 5400))
    check(reader, shift(path, tmp_path / "early.mkv", 0.6))


@pytest.mark.parametrize(
    ("codec", "ending"),
    [
        ("libx264", "avi"),
        ("mpeg4", "avi"),
        ("mpeg2video", "avi"),
        ("libx264", "h264"),
        ("mpeg2video", "m2v"),
        ("mpeg2video", "mpg"),
    ],
)
def test_missing_timestamps(codec, ending, reader, tmp_path):
    options = OPEN.get(codec, FAST.get(codec))
    if ending in ("m2v", "mpg"):
        path = film(tmp_path / f"a.{ending}", EVEN, codec=codec, tick=Fraction(1, 25))
        seconds = EVEN / 25
    else:
        path, seconds = write(str(tmp_path / f"a.{ending}"), codec, options=options), EVEN / FPS
    if ending == "h264":
        seconds = EVEN / 25  # nothing in the file says how fast it is; 25 is ffmpeg's guess
    with av.open(str(path)) as box:
        rate = float(box.streams.video[0].average_rate)
    check(reader, path, EVEN / rate if ending == "h264" else seconds, EVEN)


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", FAST["libx264"]), ("mpeg2video", OPEN["mpeg2video"]), ("libx265", OPEN["libx265"])],
)
def test_clocks_that_start_again_or_leap(codec, options, reader, tmp_path):
    first = write(str(tmp_path / "a.ts"), codec, EVEN[:200], options)
    later = write(
        str(tmp_path / "b.ts"), codec, EVEN[:200] + 80000, options, picture=lambda n: paint(n + 200)
    )
    first, later = (Path(path).read_bytes() for path in (first, later))
    for name, content in (
        ("twice.ts", first + first),
        ("leap.ts", first + later),
        ("back.m2ts", later + first),
    ):
        (tmp_path / name).write_bytes(content)
    check(reader, tmp_path / "twice.ts", EVEN / FPS, np.tile(EVEN[:200], 2))
    check(reader, tmp_path / "leap.ts", EVEN / FPS, EVEN)
    clip, _ = check(reader, tmp_path / "back.m2ts", EVEN / FPS, np.append(EVEN[200:], EVEN[:200]))
    assert clip.facts["clock"] == "of the file; it starts again at 25.0 s"


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_several_tracks_and_cover_pictures(codec, ending, reader, tmp_path):
    clip, _ = check(reader, write(str(tmp_path / f"two.{ending}"), codec, EVEN[:80], tracks=2))
    assert "2 video tracks; track 0 is read" in clip.facts["notes"]
    if ending == "mp4":
        path = write(str(tmp_path / f"cover.{ending}"), codec, EVEN[:80], cover=True)
        check(reader, path, EVEN[:80] / FPS, EVEN[:80])
        only = write(str(tmp_path / "music.mp4"), codec, [], cover=True)
        assert reader.read(only).problem == "no video stream in the file, only a cover picture"


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_films_are_upright_with_and_without_an_edit_list(codec, ending, degrees, reader, tmp_path):
    def upright(frames):
        return np.rot90(frames, -degrees // 90, axes=(1, 2))

    path = write(str(tmp_path / f"a.{ending}"), codec, EVEN[:80], rotation=degrees)
    clip, _ = check(reader, path, *in_order(path), upright)
    assert clip.frames.shape[1:3] == ((96, 128) if degrees == 180 else (128, 96))
    if ending != "mkv":
        cut = str(tmp_path / f"cut.{ending}")
        write(cut, codec, EVEN[:80] - 11, rotation=degrees)
        check(reader, cut, *in_order(cut), upright)
    with Reader(size=(48, 64)) as small:
        assert small.read(path, [0]).frames.shape == (1, 64, 48, 3)


@pytest.mark.parametrize(
    ("codec", "ending"), [("libx264", "mp4"), ("libx265", "mkv"), ("libvpx-vp9", "webm")]
)
def test_variable_rates_holds_and_odd_pixels(codec, ending, reader, tmp_path):
    jumpy = np.cumsum(np.random.default_rng(0).integers(20, 230, COUNT))
    check(reader, write(str(tmp_path / f"vfr.{ending}"), codec, jumpy, tick=Fraction(1, 1000)))
    held = np.append(EVEN[:100], EVEN[:100] + 300)  # a screen on which nothing moved for 25 s
    path = write(str(tmp_path / f"held.{ending}"), codec, held)
    check(reader, path)
    if codec == "libvpx-vp9":  # nothing in its stream says how wide a pixel is
        return
    wide = write(
        str(tmp_path / f"wide.{ending}"), codec, EVEN[:40], tags={"sample_aspect_ratio": Fraction(3, 2)}
    )
    clip = reader.read(wide)
    assert clip.frames.shape[1:3] == (96, 192) and (numbers_in(clip.frames)[:3] == [0, 8, 16]).all()


DEEP = [
    ("libx264", "yuv420p10le", "mkv"),
    ("libx265", "yuv420p10le", "mp4"),
    ("libsvtav1", "yuv420p10le", "webm"),
    ("prores_ks", "yuv422p10le", "mov"),
    ("ffv1", "yuv444p16le", "mkv"),
    ("libx264", "yuv444p", "mp4"),
]
CLEAR = [
    ("qtrle", "argb", "mov"),
    ("prores_ks", "yuva444p10le", "mov"),
    ("libvpx-vp9", "yuva420p", "webm"),
    ("ffv1", "bgra", "mkv"),
]


@pytest.mark.parametrize(("codec", "pixels", "ending"), DEEP + CLEAR)
def test_deep_and_transparent_pixels(codec, pixels, ending, reader, tmp_path):
    path = write(str(tmp_path / f"a.{ending}"), codec, EVEN[:80], pixels=pixels)
    clip, _ = check(reader, path)
    assert (clip.facts["notes"] == ["transparency is left out"]) == (
        "a" in pixels.replace("yuva420p", "yuv420p")
    )


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mkv"), ("ffv1", "avi"), ("qtrle", "mov")])
def test_odd_sizes(codec, ending, reader, tmp_path):
    pixels = "rgb24" if codec == "qtrle" else "yuv444p"

    def picture(number):
        return np.pad(paint(number), ((0, 3), (0, 1), (0, 0)), mode="edge")

    path = write(str(tmp_path / f"odd.{ending}"), codec, EVEN[:80], pixels=pixels, picture=picture)
    clip, _ = check(reader, path, EVEN[:80] / FPS, EVEN[:80], lambda frames: frames[:, :96, :128])
    assert clip.frames.shape[1:3] == (99, 129)


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mkv"), ("mpeg2video", "ts")])
def test_interlaced_films_say_so(codec, ending, reader, tmp_path):
    options = {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}
    path = write(
        str(tmp_path / f"a.{ending}"),
        codec,
        EVEN[:80],
        {k: options[k] for k in options if k[0] == "f" or "264" in codec},
    )
    clip, _ = check(reader, path)
    assert any("interlaced" in note for note in clip.facts["notes"])


def to_pq(light):
    """The PQ signal of light, where 1 is 203 cd/m2."""
    power = (light * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def to_hlg(light):
    scene = (light * 203 / 1000) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12,
        np.sqrt(3 * scene),
        0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073,
    )


@pytest.mark.parametrize(("codec", "ending"), [("libx265", "mov"), ("libx264", "mkv")])
@pytest.mark.parametrize(("name", "characteristic", "curve"), [("PQ", 16, to_pq), ("HLG", 18, to_hlg)])
def test_hdr_is_mapped_to_what_an_ordinary_film_of_the_scene_shows(
    codec, ending, name, characteristic, curve, reader, tmp_path
):
    def graded(number):
        return np.round(255 * curve((paint(number) / 255.0) ** 2.2)).astype(np.uint8)

    tags = {"color_trc": characteristic, "color_primaries": 9, "colorspace": 9}
    path = write(
        str(tmp_path / f"hdr.{ending}"), codec, EVEN[:40], pixels="yuv420p10le", picture=graded, tags=tags
    )
    clip = reader.read(path)
    assert clip.facts["notes"] == [f"HDR ({name}), mapped to standard range"]
    assert numbers_in(clip.frames)[:3].tolist() == [0, 8, 16]
    dark, bright = (clip.frames[1][rows, columns].mean() for rows, columns in ((16, 16), (16, 112)))
    assert abs(dark - 30) < 8 and abs(bright - 225) < 16, (dark, bright)


@pytest.mark.parametrize(
    ("codec", "ending", "muxer"),
    [
        ("libx264", "matroska", {"live": 1}),
        ("libvpx-vp9", "webm", {"live": 1}),
        ("libx265", "matroska", {}),
        ("libvpx", "webm", {}),
        ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
        ("libx264", "flv", {}),
    ],
)
def test_files_without_length_or_index(codec, ending, muxer, reader, tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self, file):
            self.write = file.write

        def writable(self):
            return True

        def seekable(self):
            return False

    path = tmp_path / f"a.{ending}"
    with open(path, "wb") as file:
        write(Pipe(file), codec, format=ending, **muxer)
    check(reader, path)


@pytest.mark.parametrize(
    ("codec", "ending"), [("libx264", "ts"), ("mpeg2video", "ts"), ("libx265", "ts"), ("mpeg2video", "mpg")]
)
def test_recordings_that_begin_or_end_in_the_middle(codec, ending, reader, tmp_path):
    whole = write(str(tmp_path / f"a.{ending}"), codec, options=OPEN[codec])
    with open(whole, "rb") as file:
        content = file.read()
    (tmp_path / f"cut.{ending}").write_bytes(content[len(content) // 5 // 188 * 188 : len(content) * 4 // 5])
    path = tmp_path / f"cut.{ending}"
    with av.open(str(path)) as box:
        stream, frames = box.streams.video[0], []
        stream.thread_count = 1
        for packet in box.demux(stream):
            try:
                frames += packet.decode()
            except av.error.InvalidDataError:
                continue
    numbers = numbers_in([frame.to_ndarray(format="rgb24") for frame in frames])
    clip = reader.read(path)
    if clip.problem:
        assert clip.problem.startswith(("damaged data", "cut short")), clip.problem
        return
    steps = np.round((clip.timestamps[:-1]) * FPS).astype(int) if ending == "ts" else None
    if steps is not None:
        assert (numbers_in(clip.frames)[:-1] == numbers[0] + steps).all(), (
            numbers_in(clip.frames),
            numbers[0] + steps,
        )


def test_a_hole_of_one_packet_is_named_where_it_is_seen_and_does_not_spoil_the_rest(reader, tmp_path):
    for codec in ("libx264", "libx265"):
        path = write(str(tmp_path / f"{codec}.mp4"), codec, movflags="+faststart")
        with av.open(path) as box:
            packets = [(packet.pos, packet.size) for packet in box.demux(video=0) if packet.size]
        position, size = packets[205]
        content = bytearray(open(path, "rb").read())
        content[position : position + size] = bytes([255]) * size
        (tmp_path / "hole.mp4").write_bytes(content)
        assert reader.read(tmp_path / "hole.mp4", [0, 25.7]).problem == "damaged data around second 25.7"
        content[position : packets[-1][0] + packets[-1][1]] = bytes(
            packets[-1][0] + packets[-1][1] - position
        )
        (tmp_path / "tail.mp4").write_bytes(content)
        assert reader.read(tmp_path / "tail.mp4").problem.startswith("damaged data from second 25."), codec
        fine = reader.read(tmp_path / "hole.mp4", [0, 10, 30, 45])
        assert numbers_in(fine.frames).tolist() == [0, 80, 240, 360]


def test_a_film_that_ends_before_its_sound_is_whole_and_one_cut_short_is_not(reader, tmp_path):
    for ending, codec in (("mkv", "libx264"), ("mp4", "libx265")):
        path = tmp_path / f"long.{ending}"
        with av.open(str(path), "w") as box:
            film_, sound = (
                box.add_stream(codec, rate=FPS, width=128, height=96, pix_fmt="yuv420p"),
                box.add_stream("aac", rate=16000),
            )
            film_.options = FAST[codec]
            for number in range(80):
                box.mux(film_.encode(av.VideoFrame.from_ndarray(paint(number))))
            box.mux(film_.encode())
            for block in range(300):
                frame = av.AudioFrame.from_ndarray(
                    np.random.default_rng(block).normal(size=(1, 1024)).astype(np.float32), "fltp", "mono"
                )
                frame.sample_rate, frame.pts = 16000, block * 1024
                box.mux(sound.encode(frame))
            box.mux(sound.encode())
        check(reader, path)
        cut = wrecked(path, tmp_path / f"cut.{ending}", keep=0.5)
        assert reader.read(cut).problem.startswith(("cut short", "no readable video: Invalid data"))
