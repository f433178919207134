"""Clips whose frames show their number, so that a picture says which frame it is."""

from fractions import Fraction
from itertools import chain

import av
import numpy as np
from av.stream import Disposition

WIDTH, HEIGHT, BITS = 128, 96, 12
STEADY = np.arange(560) * 125  # ms: 8 fps, 70 s
JUMPY = np.append(0, np.cumsum(np.random.default_rng(0).integers(20, 230, 559)))  # ms: variable rate

COUNT, FPS = 400, 8
EVEN = np.arange(COUNT)
OPEN = {
    "libx264": {"preset": "superfast", "x264-params": "open-gop=1:keyint=20:bframes=3:b-adapt=0:scenecut=0"},
    "libx265": {
        "preset": "ultrafast",
        "x265-params": "log-level=none:pools=1:keyint=20:open-gop=1:bframes=3",
    },
    "mpeg2video": {"g": "12", "bf": "2", "qmin": "2", "qmax": "4"},
}
FAST = {
    "libx264": {"preset": "ultrafast", "g": "20"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:keyint=20:open-gop=0"},
    "libsvtav1": {"preset": "12", "g": "20", "svtav1-params": "lp=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "g": "20"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "g": "20"},
    "mpeg4": {"g": "20", "bf": "2"},
}


def paint(number):
    """A picture of 4 x 3 blocks, each one bit: survives compression and scaling."""
    bits = (number >> np.arange(BITS) & 1).reshape(3, 4, 1).astype(np.uint8)
    return np.kron(bits * 195 + 30, np.ones((32, 32, 3), np.uint8))


def number_in(picture):
    blocks = picture.reshape(3, picture.shape[0] // 3, 4, picture.shape[1] // 4, 3)
    return int(((blocks.mean(axis=(1, 3, 4)) > 128).ravel() << np.arange(BITS)).sum())


def numbers_in(frames):
    return np.array([number_in(picture) for picture in frames])


def film(path, shown_at, gop=30, b_frames=0, codec="libx264", tick=Fraction(1, 1000), **muxer):
    """A clip whose n-th frame shows the number n at shown_at[n] ticks."""
    with av.open(str(path), "w", options=muxer) as box:
        stream = box.add_stream(codec, rate=8, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        stream.codec_context.time_base = stream.time_base = tick
        if codec == "libx264":
            speed = (
                {"preset": "superfast", "b-adapt": "0", "bf": str(b_frames)}
                if b_frames
                else {"preset": "ultrafast"}
            )
            stream.options = {"g": str(gop), "sc_threshold": "0", **speed}
        for number, ticks in enumerate(shown_at):
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24")
            frame.pts, frame.time_base = int(ticks), tick
            box.mux(stream.encode(frame))
        box.mux(stream.encode())
    return path


def write(
    target, codec="libx264", shown_at=EVEN, options=None, pixels="yuv420p", picture=paint, tick=None, **more
):
    """Write a film: frame n shows `picture(n)` at shown_at[n] ticks, of an eighth of a second by default.

    more  `tags` of the codec context, `rotation` in degrees, `cover` and `tracks`, all else for the muxer
    """
    tick = tick or Fraction(1, FPS)
    named = {name: more.pop(name, None) for name in ("tags", "rotation", "cover", "tracks", "format")}
    first = picture(0)
    with av.open(target, "w", format=named["format"], options={k: str(v) for k, v in more.items()}) as box:
        if named["cover"]:
            still = box.add_stream("mjpeg", rate=1, width=320, height=320, pix_fmt="yuvj420p")
            still.disposition = Disposition.attached_pic
        streams = []
        for _ in range(named["tracks"] or 1):
            stream = box.add_stream(
                codec, rate=FPS, pix_fmt=pixels, width=first.shape[1], height=first.shape[0]
            )
            stream.options = FAST.get(codec, {}) if options is None else options
            stream.codec_context.time_base = stream.time_base = tick
            stream.codec_context.thread_count = 1
            for name, value in (named["tags"] or {}).items():
                setattr(stream.codec_context, name, value)
            if named["rotation"]:
                stream.set_display_rotation(named["rotation"])
            streams.append(stream)
        if named["cover"]:
            frame = av.VideoFrame.from_ndarray(np.full((320, 320, 3), 200, np.uint8))
            box.mux(chain(still.encode(frame.reformat(format="yuvj420p")), still.encode()))
        for number, ticks in enumerate(shown_at):
            for track, stream in enumerate(streams):
                frame = av.VideoFrame.from_ndarray(picture(number + 1000 * track), format="rgb24")
                frame.pts, frame.time_base = int(ticks), tick
                box.mux(stream.encode(frame))
        for stream in streams:
            box.mux(stream.encode())
    return target


def shift(source, path, seconds):
    """The same packets, earlier: an edit list hides what starts before zero, as after `-c copy`."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts -= int(seconds / stream.time_base)
                packet.dts -= int(seconds / stream.time_base)
                packet.stream = copy
                new.mux(packet)
    return path


def in_order(path):
    """PyAV, every frame: seconds since the first, and its number."""
    with av.open(str(path)) as box:
        frames = [(frame.time, number_in(frame.to_ndarray(format="rgb24"))) for frame in box.decode(video=0)]
    seconds, numbers = np.array(frames).T
    return seconds - seconds[0], numbers.astype(int)


def wrecked(source, path, keep=1.0, hole=None):
    """The first `keep` of a file's bytes, with zeros between the two shares named by `hole`."""
    content = bytearray(source.read_bytes())
    if hole:
        first, last = (int(len(content) * share) for share in hole)
        content[first:last] = bytes(last - first)
    path.write_bytes(content[: int(len(content) * keep)])
    return path
