"""Decode one video file after the other in a process of its own: `python -P decoder.py FD`.

`video_reader.Reader` starts this script and kills it when it hangs: hangs in C code hold the GIL, and only a kill ends
them. It is neither a fork nor multiprocessing, so it never loads torch and works from notebooks and unguarded scripts.
decord and av are imported inside functions, because the parent, which imports `sample_times`, must not load them.

A file's packets are listed first, without decoding. They say when each frame is on screen and where a decoder may
start. PyAV then decodes in order and leaves out what nobody asked for where the list proves that this is safe. Frames
are taken by their own timestamps, so a list that was wrong is noticed, and all frames are decoded to get a true one.
decord is the second decoder: it reads what PyAV hangs or crashes on, if the list proves that it finds right frames.
"""

import os
import signal
import sys
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain
from multiprocessing.connection import Connection

import numpy as np

TIME_EPS = 1e-3  # s; timestamps of containers are as coarse
# Share of the claimed length that must be there; sound may outlast the pictures by a little.
MIN_COMPLETENESS = 0.95
# Ours: packets that a jump must save, or decoding on is faster.
MIN_JUMP = 48
CLOCK_JUMP = 10.0  # s; a broadcast's clock that leaps ahead by more starts a new part, as in ffmpeg
TS_DISCONT = 0x200  # of formats: clocks may leap, as in broadcasts
# Ours: all frames of a video, 64 of 1080p; larger ones are shrunk as they are decoded.
MAX_BYTES = 64 * 1088 * 1920 * 3
COVERS = 0x400 | 0x800  # dispositions of a cover picture, and of thumbnails
# Transfer characteristics of HDR pictures: PQ and HLG.
HDR = {16: "PQ", 18: "HLG"}


class Unreadable(Exception):
    """A reason why this file gives no frames."""


class Mispredicted(Exception):
    """The decoded frames are not those that the packets announced."""


def sample_times(seconds, fps=1.0, max_frames=64):
    """Return when to look at a video, (T,) seconds with T even: "1 fps, <= 64 frames, uniform" in the paper.

    Every frame stands for an equal share of the video and is taken where its share begins. The model merges
    frames in pairs, so an odd count is made even by repeating the last time.

    >>> sample_times(5.0)
    array([0., 1., 2., 3., 4., 4.])
    >>> sample_times(256.0)[[0, 1, -1]]
    array([ 0., 4., 252.])
    """
    assert seconds > 0 and fps > 0 and max_frames >= 2 and max_frames % 2 == 0, (seconds, fps, max_frames)
    count = max(1, int(np.ceil((seconds - TIME_EPS) * fps)))
    times = np.arange(count) / fps if count <= max_frames else np.arange(max_frames) * seconds / max_frames
    return np.append(times, times[-1]) if len(times) % 2 else times


def decode(path, times, fps, max_frames, size, second=False):
    """Decode the frames on screen at `times` (seconds after the first frame; None: its `sample_times`).

    size    (width, height) of the upright picture to scale to; None: as stored, in display proportions
    second  True: by decord where the file proves that it is right, else by PyAV without jumps

    Returns frames (T, H, W, 3) uint8, their own timestamps (T,), the seconds of the whole video, and facts about the
    file and its reading, {name: text or number}. Raises Unreadable, or an error of the two libraries.
    """
    with _open(path) as (container, stream):
        facts, claimed = _describe(container, stream), _claimed_seconds(container, stream)
        claimed_frames, track = stream.frames, _list_packets(container, stream)

    def choose(track):
        ends = _checked_ends(path, track, claimed, claimed_frames)
        wanted = sample_times(ends[-1], fps, max_frames) if times is None else times
        return _frame_indices(path, track, wanted, ends), float(ends[-1])

    try:
        if np.isnan(track.names[0]):
            raise Mispredicted
        index, seconds = choose(track)
        frames = None
        plain = facts["pixels"] == "yuv420p" and facts["pixel_shape"] == "1:1"
        width, height = map(int, facts["stored_size"].split("x"))
        if second and track.closed and plain and 3 * width * height * len(index) <= MAX_BYTES:
            frames = _decode_by_decord(path, index, size, track.starts)
            decoder, why = "decord", "PyAV failed; closed groups and one clock in both prove decord right"
            facts["shown_size"] = facts["stored_size"]
        if frames is None:
            jumps = () if second else track.jumps
            frames = _decode(path, track.names[index], track.names[0], jumps, size, facts)
            decoder = "PyAV"
            why = f"in order, but for {facts['jumps']} jumps to keyframes proven by the packets"
    except Mispredicted:
        facts["jumps"] = 0  # whatever the first attempt did
        track = _list_frames(path, track)
        index, seconds = choose(track)
        frames = _decode(path, index, None, (), size, facts)
        decoder, why = "PyAV", "all frames in order: the packets do not tell when they are shown"
    assert len(frames) == len(index) and frames.dtype == np.uint8, (frames.shape, frames.dtype)
    facts |= {"decoder": decoder, "why": why, "clock": track.clock, "frames": len(track.starts)}
    return frames, track.starts[index], seconds, facts


# --- What the file says


@contextmanager
def _open(path):
    """Open a file and choose its video stream: (container, stream)."""
    import av

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise Unreadable("the file is empty")
    with av.open(path, metadata_errors="ignore") as container:
        streams = _video_streams(container)
        if not streams:
            cover = ", only a cover picture" if container.streams.video else ""
            raise Unreadable(f"no video stream in the file{cover}")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise Unreadable("no decoder here for the codec of its pictures")
        stream.thread_count = 1  # other files are decoded beside it
        yield container, stream


def _video_streams(container):
    """List the video streams of a file that are no cover picture."""
    return [stream for stream in container.streams.video if not int(stream.disposition) & COVERS]


def _describe(container, stream):
    """Return facts about a file and the stream that is read, {name: text or number}."""
    shape = stream.sample_aspect_ratio or 1
    facts = {
        "container": container.format.name,
        "codec": stream.codec_context.codec.canonical_name,
        "pixels": stream.codec_context.pix_fmt,
        "stored_size": f"{stream.codec_context.width}x{stream.codec_context.height}",
        "pixel_shape": f"{shape.numerator}:{shape.denominator}",
        "turned": "no",
        "jumps": 0,
        "notes": [],
    }
    tracks = len(_video_streams(container))
    if tracks > 1:
        facts["notes"].append(f"{tracks} video tracks; track {stream.index} is read")
    if "a" in (facts["pixels"] or "").replace("gray", ""):
        facts["notes"].append("transparency is left out")
    return facts


def _claimed_seconds(container, stream):
    """Return how long the container says that the stream lasts, 0 if it does not say."""
    seconds = (stream.duration or 0) * stream.time_base
    if not seconds and container.duration:  # Matroska: of the whole file, counted from zero
        seconds = container.duration / 1e6 - (stream.start_time or 0) * stream.time_base
    return float(seconds)


@dataclass(frozen=True)
class Track:
    """The frames of a video in the order in which they are shown."""

    starts: np.ndarray  # (F,) seconds after the first frame at which they appear
    durations: np.ndarray  # (F,) seconds, as the file says; 0: it does not
    names: np.ndarray  # (F,) by which decoded frames are known: timestamps in ticks, or numbers
    jumps: np.ndarray = ()  # (K, 3) keyframes to start from: number of the packet, timestamp, where to seek
    clock: str = "of the file"  # where the starts come from
    damaged: np.ndarray = ()  # numbers of frames that damaged data may have spoilt
    lost: np.ndarray = ()  # numbers of frames after which others are lost
    closed: bool = False  # True: a plain clock, and no frame needs one from beyond a keyframe


def _clock(container, stream):
    """Return the seconds of a tick, the frames a second, and how many ticks a clock leaps to start a new part."""
    tick = float(stream.time_base)
    leap = CLOCK_JUMP / tick if container.format.flags & TS_DISCONT else np.inf
    return tick, float(stream.average_rate or stream.guessed_rate or 25), leap


def _list_packets(container, stream):
    """Return the Track that the packets of a stream announce."""
    import av

    rows, keys = [], []
    is_keyframe = _keyframe_test(stream.codec_context)
    with suppress(av.error.InvalidDataError, av.error.EOFError):  # the rest is missing: its length tells
        for packet in container.demux(stream):
            if packet.size:
                rows.append((packet.pts, packet.dts, packet.duration, packet.is_discard))
                keys.append(packet.is_keyframe and is_keyframe(packet))
    if not rows:
        raise Unreadable("not one picture in the file")
    pts, dts, durations, hidden = np.array(rows, dtype=float).T  # in ticks; NaN: none
    tick, rate, leap = _clock(container, stream)
    if np.isnan(pts).any():
        increasing = not np.isnan(dts).any() and (np.diff(dts) > 0).all()
        starts = (dts - dts[0]) * tick if increasing else np.arange(len(dts)) / rate
        # NaN: no decoded frame has such a name, so the frames themselves are listed.
        return Track(
            starts,
            durations * 0,
            np.full(len(starts), np.nan),
            clock="of decoding" if increasing else "counted",
        )
    steps = np.diff(dts)
    parts = np.append(0, np.cumsum((steps < 0) | (steps > leap)))  # NaN is neither
    order = np.lexsort((pts, parts))
    order = order[hidden[order] == 0]
    if not len(order):
        raise Unreadable("not one picture is shown: its edit list leaves out all of them")
    starts, clock = _join(pts[order] * tick, parts[order], 1 / rate)
    if parts[-1]:  # two frames may have one timestamp
        return Track(starts, durations[order] * tick, np.full(len(order), np.nan), clock=clock)
    plain = len(np.unique(pts)) == len(pts) and not hidden.any()
    jumps, closed = _jumps(pts, dts, np.flatnonzero(keys)) if plain else ((), False)
    return Track(starts, durations[order] * tick, pts[order], jumps, clock, closed=closed)


def _jumps(pts, dts, keys):
    """Return `jumps` and `closed` of a Track from the timestamps of its packets and the numbers of its keyframes."""
    latest_so_far, earliest_to_come = np.maximum.accumulate(pts), np.minimum.accumulate(pts[::-1])[::-1]
    # A decoder may start where all packets before are shown before.
    proven = keys[(keys == 0) | (latest_so_far[keys - 1] < pts[keys])]
    closed = len(keys) > 0 and len(proven) == len(keys) and proven[0] == 0
    closed = closed and (pts[keys] == earliest_to_come[keys]).all()
    offsets = np.where(np.isnan(dts), pts, dts)[proven]
    return np.stack([proven, pts[proven], offsets], axis=1), bool(closed)


def _keyframe_test(codec):
    """Return a function that says whether nothing shown after a packet needs what was decoded before it.

    Containers call more than that a keyframe in H.264 and HEVC: there the kind of the picture decides.
    """
    if codec.name not in ("h264", "hevc"):
        return lambda packet: True
    setup, hevc = codec.extradata or b"", codec.name == "hevc"
    framed = setup[:1] == b"\1"  # lengths before the units, and no start codes between them
    length = (setup[21 if hevc else 4] & 3) + 1 if framed else 0

    def headers(data):
        """Yield the first byte of each unit."""
        if not framed:
            yield from (unit[0] for unit in data.split(b"\0\0\1")[1:] if unit)
            return
        start = 0
        while start + length < len(data):
            yield data[start + length]
            start += length + int.from_bytes(data[start : start + length])

    def test(packet):
        kinds = [header >> 1 & 63 if hevc else header & 31 for header in headers(bytes(packet))]
        picture = next((kind for kind in kinds if (kind < 32 if hevc else 1 <= kind <= 5)), None)
        return picture is not None and (16 <= picture <= 23 if hevc else picture == 5)

    return test


def _join(times, parts, period):
    """Return seconds after the first frame, each part going on where the last one ends, and the name of the clock."""
    starts, shift, breaks = times - times[0], 0.0, []
    for part in np.unique(parts)[1:]:
        first = np.searchsorted(parts, part)
        shift = starts[first - 1] + period - (times[first] - times[0])
        starts[first:] = times[first:] - times[0] + shift
        breaks.append(f"{starts[first]:.1f}")
    return starts, f"of the file; it starts again at {', '.join(breaks)} s" if breaks else "of the file"


def _list_frames(path, announced):
    """Return the Track of the frames that PyAV decodes, all of them, in order."""
    with _open(path) as (container, stream):
        tick, rate, leap = _clock(container, stream)
        packets = Packets(container, stream)
        rows = [(frame.pts, frame.duration, torn) for frame, torn in _frames(packets)]
    if not rows:
        raise Unreadable("not one picture could be decoded: damaged data")
    pts, durations, torn = np.array(rows, dtype=float).T
    steps = np.diff(pts)
    breaks = (steps < 0) | (steps > leap)
    # A clock that stands still or runs back again and again tells nothing.
    if np.isnan(pts).any() or breaks.sum() > max(3, len(pts) / 50):
        same = len(pts) == len(announced.starts) and announced.clock != "of the file"
        starts = announced.starts if same else np.arange(len(pts)) / rate
        clock, durations = announced.clock if same else "counted, by the average frame rate", durations * 0
    else:
        starts, clock = _join(pts * tick, np.append(0, np.cumsum(breaks)), 1 / rate)
    if packets.failures and starts[-1] < MIN_COMPLETENESS * announced.starts[-1]:
        raise Unreadable(f"damaged data from second {starts[-1]:.1f} on")
    durations, numbers = np.nan_to_num(durations) * tick, np.arange(len(pts))
    return Track(starts, durations, numbers, (), clock, numbers[torn == 1], numbers[:-1][torn[1:] > 0])


def _checked_ends(path, track, claimed, claimed_frames):
    """Return when each frame ends at the earliest, (F,) seconds; Unreadable where less is there than is claimed."""
    starts = track.starts
    period = np.median(np.diff(starts)) if len(starts) > 1 else max(track.durations[0], TIME_EPS)
    ends = starts + np.maximum(track.durations, period)
    if ends[-1] < MIN_COMPLETENESS * claimed and _survey(path)[0] < MIN_COMPLETENESS * claimed:
        if len(starts) < MIN_COMPLETENESS * claimed_frames:
            raise Unreadable(f"cut short: {len(starts)} of {claimed_frames} frames are in the file")
        raise Unreadable(f"cut short: {ends[-1]:.1f} of {claimed:.1f} s are in the file")
    if starts[-1] < claimed:  # the last frame may be shorter than usual
        ends[-1] = min(ends[-1], claimed)
    return ends


def _frame_indices(path, track, times, ends):
    """Return the index of the frame on screen at each time, (T,); Unreadable where pictures are missing.

    A frame may stay as long as its own stamp says and then four usual periods or a second. It may stay longer where
    nothing was lost: a recorder of a screen writes a picture when something moves.
    """
    index = np.searchsorted(track.starts, times + TIME_EPS, side="right") - 1
    period = np.median(ends - track.starts)
    beyond, late = times - ends[-1], times - ends[index]
    if beyond.max() > max(period, TIME_EPS):
        raise Unreadable(f"asked for second {times.max():.2f}, the pictures end at {ends[-1]:.2f}")
    torn = np.isin(index, track.damaged) | (np.isin(index, track.lost) & (late > TIME_EPS))
    if torn.any():
        raise Unreadable(f"damaged data around second {times[torn.argmax()]:.1f}")
    if late.max() > max(1, 4 * period) and _survey(path)[1]:
        raise Unreadable(f"pictures are missing around second {times[late.argmax()]:.1f}")
    return index


def _survey(path):
    """Return when the last of all streams ends (seconds after the video's start), and whether bytes belong to none."""
    import av

    last, extents = 0.0, []
    with _open(path) as (container, stream), suppress(av.error.InvalidDataError, av.error.EOFError):
        start = float((stream.start_time or 0) * stream.time_base)
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base) - start)
            if packet.size and packet.pos is not None and packet.pos >= 0:
                extents.append((packet.pos, packet.size))
    extents = np.array(sorted(extents)).reshape(-1, 2)
    between = extents[1:, 0] - extents[:-1].sum(axis=1)
    # Ours: headers between two packets take less, and so does a sound frame or two.
    return last, bool(len(between) and between.max() > max(4096, 4 * np.median(extents[:, 1])))


# --- The pictures


class Packets:
    """The packets of a stream in decoding order; it can go on at a keyframe further on."""

    def __init__(self, container, stream):
        self.container, self.stream, self.number, self.ahead = container, stream, 0, container.demux(stream)
        self.failures = 0  # packets that did not decode since the last one that gave a frame

    def __iter__(self):
        return self

    def __next__(self):
        packet = next(self.ahead)
        self.number += packet.size > 0
        return packet

    def jump(self, number, pts, offset):
        """Go on at the packet with this timestamp. Raises Mispredicted if seeking does not lead there."""
        self.container.seek(int(offset), stream=self.stream)
        for packet in self.container.demux(self.stream):
            if packet.pts is None or packet.pts >= pts:
                break
        if packet.pts != pts:
            raise Mispredicted
        self.number, self.ahead = int(number), chain([packet], self.container.demux(self.stream))


def _frames(packets):
    """Yield (frame, damage) in the order in which frames are shown.

    damage  1: data since the last keyframe was damaged, so the frame may be; 2: only frames before it are lost
    """
    import av

    torn, started = 0, False
    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # A recording may begin in the middle: nothing can be seen before its first keyframe.
            torn = int(started)
            packets.failures += torn
            continue
        packets.failures *= not (frames and packet.size)  # an empty packet gives what was decoded before
        for frame in frames:
            torn = 1 if frame.is_corrupt else 2 * torn if frame.key_frame else torn
            yield frame, torn
            started, torn = True, torn % 2


def _decode(path, wanted, first, jumps, size, facts):
    """Decode the frames with the names `wanted` (T,); return them upright, (T, H, W, 3).

    first  the timestamp of the first frame; None: names are numbers, else timestamps
    Raises Mispredicted where a frame does not come, and adds what it sees to `facts`.
    """
    frames, todo, last = None, deque(np.unique(wanted).tolist()), -np.inf
    with _open(path) as (container, stream):
        packets, painter = Packets(container, stream), Painter(size, facts, len(wanted))
        for number, (frame, torn) in enumerate(_frames(packets)):
            name = number if first is None else frame.pts
            if name is None or (number == 0 and first not in (None, name)) or name > todo[0] or name <= last:
                raise Mispredicted
            last = name
            if name == todo[0]:
                if torn == 1 and first is not None:
                    raise Mispredicted
                picture = painter.paint(frame)
                if frames is None:
                    frames = np.empty((len(wanted), *picture.shape), np.uint8)
                frames[wanted == todo.popleft()] = picture
                if not todo:
                    return frames
            if len(jumps) and (number == 0 or name in wanted):
                near = jumps[np.searchsorted(jumps[:, 1], todo[0], side="right") - 1]
                if packets.number + MIN_JUMP < near[0] and near[1] <= todo[0]:
                    packets.jump(*near)
                    facts["jumps"] += 1
    if first is not None:
        raise Mispredicted
    raise Unreadable(f"{len(todo)} of {len(set(wanted.tolist()))} frames did not decode a second time")


class Painter:
    """Turns decoded frames into upright RGB pictures of one size, in display proportions; `count` take MAX_BYTES."""

    def __init__(self, size, facts, count):
        from av.video.reformatter import VideoReformatter

        # One converter of one thread for all frames: a new one for each costs more than the conversion.
        self.size, self.facts, self.converter = size, facts, VideoReformatter()
        self.most = MAX_BYTES / (3 * count)  # pixels of one

    def paint(self, frame):
        """Return the picture of a frame, (H, W, 3) uint8."""
        swapped, flips = self._orientation(frame)
        if self.size is None:
            stretch = float(Fraction(self.facts["pixel_shape"].replace(":", "/")))
            width, height = round(frame.width * max(1, stretch)), round(frame.height * max(1, 1 / stretch))
            shown = (height, width) if swapped else (width, height)
            shrink = min(1, (self.most / (width * height)) ** 0.5)
            self.size = tuple(max(1, int(side * shrink)) for side in shown)
            self.facts["shown_size"] = "{}x{}".format(*shown)
            self._note(shrink < 1, "shrunk to {}x{} as it was read: it is long and large".format(*self.size))
        width, height = reversed(self.size) if swapped else self.size
        hdr = HDR.get(frame.color_trc)
        kind = "rgb48le" if hdr else "rgb24"
        picture = self.converter.reformat(
            frame, width, height, kind, interpolation="BICUBIC", threads=1
        ).to_ndarray()
        self._note(frame.interlaced_frame, "interlaced; the lines of both fields are shown together")
        if hdr:
            self._note(True, f"HDR ({hdr}), mapped to standard range")
            picture = _standard_range(picture, hdr)
        return (picture.swapaxes(0, 1) if swapped else picture)[flips]

    def _orientation(self, frame):
        """Return whether rows and columns change places, and then the slices that mirror them."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return False, (slice(None), slice(None))
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
        swapped = abs(b) > abs(a)
        across, down = (c, b) if swapped else (a, d)
        mirrored = ", and mirrored" * (a * d - b * c < 0)
        self.facts["turned"] = f"by {frame.rotation % 360} degrees counterclockwise{mirrored}"
        return swapped, (slice(None, None, -1 if down < 0 else 1), slice(None, None, -1 if across < 0 else 1))

    def _note(self, holds, note):
        if holds and note not in self.facts["notes"]:
            self.facts["notes"].append(note)


@cache
def _light(hdr):
    """Return the light of each 16 bit value, (65536,); 1 is what a white page gives, 203 cd/m2 (ITU-R BT.2408)."""
    value = np.linspace(0, 1, 65536)
    if hdr == "PQ":  # SMPTE ST 2084
        root = value ** (1 / 78.84375)
        light = 10000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
            1 / 0.1593017578125
        )
    else:  # ITU-R BT.2100, HLG on a screen of 1000 cd/m2, its system gamma of 1.2 for each colour alone
        scene = np.where(
            value <= 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
        )
        light = 1000 * scene**1.2
    return (light / 203).astype(np.float32)


BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def _standard_range(picture, hdr):
    """Map an HDR picture (H, W, 3) uint16 of BT.2020 to uint8 of BT.709; light above 0.75 is compressed."""
    light = np.maximum(_light(hdr)[picture] @ BT2020_TO_BT709.T, 0)
    light = np.where(light > 0.75, 1 - 0.25 * np.exp((0.75 - light) / 0.25), light)
    return np.round(255 * light ** (1 / 2.2)).astype(np.uint8)


def _decode_by_decord(path, index, size, starts):
    """Decode frames by number with decord, (T, H, W, 3); None if it sees other frames, or them at other times."""
    import av
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(path, num_threads=1)
    timestamps = video.get_frame_timestamp(np.arange(len(video)))[:, 0].astype(float)
    if len(timestamps) != len(starts) or np.abs(timestamps - timestamps[0] - starts).max() > TIME_EPS:
        return None
    frames = video.get_batch(index).asnumpy()
    if size is None:
        return frames
    pictures = [av.VideoFrame.from_ndarray(frame, "rgb24").reformat(*size) for frame in frames]
    return np.stack([picture.to_ndarray() for picture in pictures])


# --- Answers


def decode_or_explain(path, *how):
    """Return (frames, timestamps, seconds, None, facts), or (None, None, None, a problem, {}); raise nothing."""
    import av

    try:
        frames, starts, seconds, facts = decode(path, *how)
        return frames, starts, seconds, None, facts
    except Unreadable as reason:
        problem = str(reason)
    except av.error.FFmpegError as error:
        problem = f"no readable video: {error.strerror}"
    except Exception as error:  # whatever else the two libraries raise on a strange file ends no corpus
        problem = f"the decoder failed: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None, None, None, problem, {}


def serve(pipe):
    """Answer requests until the other end is gone: a message, then the bytes of the frames if there are any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        import av
    except (ImportError, OSError) as error:
        return pipe.send(str(error))
    av.logging.set_level(av.logging.PANIC)
    pipe.send(None)
    while True:
        try:
            *request, timeout = pipe.recv()
        except EOFError:
            return None
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)  # the kernel ends a hung child whose parent is gone
        frames, *rest = decode_or_explain(*request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send((None if frames is None else frames.shape, *rest))
        if frames is not None:
            pipe.send_bytes(np.ravel(frames))  # not pickled: that would be one more copy


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
