"""Decode one video file after the other in a process of its own: `python -P decoder.py FD`.

`video_reader.Reader` starts this script and kills it when it hangs: decord's hangs hold the GIL, and only a kill ends
them. It is neither a fork nor multiprocessing, so it never loads torch and works from notebooks and unguarded scripts.
decord and av are imported inside functions, because the parent, which imports `sample_times`, must not load them.
"""

import os
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import numpy as np

TIME_EPS = 1e-3  # s; decord's stamps are float32, an hour in they are 0.2 ms coarse
# Share of the claimed length that must be there; sound may outlast the pictures by a little.
MIN_COMPLETENESS = 0.95
# Containers where decord's frames agreed with PyAV's. Elsewhere PyAV reads, in order: decord finds no
# timestamps in AVI and MPEG-PS and seeks to wrong frames there, and in ASF (.wmv) it was 48 frames off.
SEEKABLE_FORMATS = {"mov", "mp4", "matroska", "webm", "mpegts"}


class Unreadable(Exception):
    """A reason why this file gives no frames."""


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


def decode(path, times, fps, max_frames, size):
    """Decode the frames on screen at `times` (seconds after the first frame; None: its `sample_times`).

    Returns frames (T, H, W, 3) uint8, their own timestamps (T,) and the seconds of the whole video.
    Raises Unreadable, or an error of the two libraries.
    """
    import decord

    formats, claimed_frames, claimed_seconds = _container_info(path)
    width, height = size or (-1, -1)
    # One thread: on short clips three times as fast as decord's own choice.
    video = decord.VideoReader(path, width=width, height=height, num_threads=1)
    starts, ends, stamped = _frame_times(video, formats)
    _check_complete(len(video), ends[-1], claimed_frames, claimed_seconds)
    if claimed_seconds and claimed_seconds > starts[-1]:  # the last frame may be shorter than usual
        ends[-1] = min(ends[-1], claimed_seconds)
    index = _frame_indices(sample_times(ends[-1], fps, max_frames) if times is None else times, starts, ends)
    if formats & SEEKABLE_FORMATS and len(starts) == len(video):
        frames = video.get_batch(index).asnumpy()
    else:  # decord does not skip hidden frames: on such a clip it was 11 frames late
        frames, shown_at = _decode_in_order(path, index, size)
        if stamped and (np.abs(shown_at - starts[index]) >= ends[index] - starts[index]).any():
            raise Unreadable("the two readers disagree on when a frame is shown")
    assert len(frames) == len(index) and frames.dtype == np.uint8, (frames.shape, frames.dtype)
    return frames, starts[index], float(ends[-1])


def _container_info(path):
    """Return what the container claims: its formats, number of frames (0: unknown) and seconds (None: unknown)."""
    import av

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise Unreadable("the file is empty")
    with av.open(path, metadata_errors="ignore") as box:
        stream = box.streams.best("video")
        if stream is None:
            raise Unreadable("no video stream in the file")
        seconds = (stream.duration or 0) * stream.time_base
        if not seconds and box.duration:  # Matroska: of the whole file, counted from zero
            seconds = box.duration / 1e6 - (stream.start_time or 0) * stream.time_base
        return set(box.format.name.split(",")), stream.frames, float(seconds) or None


def _frame_times(video, formats):
    """Return when each frame appears and ends at the earliest, (F,) seconds after the first; whether by stamps."""
    starts, ends = video.get_frame_timestamp(np.arange(len(video))).astype(np.float64).T
    stamped = bool((np.abs(starts) < 1e9).all())  # decord's "none" is about 1e15 seconds off
    if not stamped and not formats & SEEKABLE_FORMATS:  # only there are frames taken as equally long
        starts = ends = np.arange(len(video)) / video.get_avg_fps()
    elif not stamped or (np.diff(starts) < 0).any() or starts[-1] < 0:
        raise Unreadable("the timestamps are incomplete or do not increase")
    # A clip cut without recoding begins with frames that are only there to decode the others (an edit list).
    shown = starts > -TIME_EPS
    starts, ends = starts[shown], ends[shown]
    period = np.median(np.diff(starts)) if len(starts) > 1 else 1 / video.get_avg_fps()
    return starts - starts[0], np.maximum(ends, starts + period) - starts[0], stamped


def _check_complete(frames, seconds, claimed_frames, claimed_seconds):
    """Refuse a file that holds less than it claims."""
    if claimed_frames and frames < MIN_COMPLETENESS * claimed_frames:
        raise Unreadable(f"cut short: {frames} of {claimed_frames} frames are in the file")
    if claimed_seconds and seconds < MIN_COMPLETENESS * claimed_seconds:
        raise Unreadable(f"cut short: {seconds:.1f} of {claimed_seconds:.1f} s are in the file")


def _frame_indices(times, starts, ends):
    """Return the index of the frame on screen at each time, (T,); Unreadable where pictures are missing.

    A frame may stay as long as its own stamp says and then four usual periods or a second: more is loss.
    """
    index = np.searchsorted(starts, times + TIME_EPS, side="right") - 1
    period = np.median(ends - starts)
    beyond, late = times - ends[-1], times - ends[index]
    if beyond.max() > max(period, TIME_EPS):
        raise Unreadable(f"asked for second {times.max():.2f}, the pictures end at {ends[-1]:.2f}")
    if late.max() > max(1, 4 * period):
        raise Unreadable(f"pictures are missing around second {times[late.argmax()]:.1f}")
    return index


def _decode_in_order(path, index, size):
    """Decode frames by index with PyAV from the start; return them, (T, H, W, 3), and their own seconds (T,)."""
    import av

    wanted, frames, shown_at = set(index.tolist()), {}, []
    shape = dict(zip(("width", "height"), size, strict=True)) if size else {}
    with av.open(path, metadata_errors="ignore") as box:
        for number, frame in enumerate(box.decode(box.streams.best("video"))):
            shown_at.append(frame.time or 0.0)
            if number in wanted:
                frames[number] = frame.to_ndarray(format="rgb24", **shape)
            if len(frames) == len(wanted):
                return np.stack([frames[i] for i in index.tolist()]), np.array(shown_at)[index] - shown_at[0]
    raise Unreadable(f"{len(wanted) - len(frames)} of {len(wanted)} frames did not decode")


def decode_or_explain(path, *how):
    """Return (frames, timestamps, seconds, None), or (None, None, None, the problem in words); raise nothing."""
    import av
    import decord

    try:
        try:
            return *decode(path, *how), None
        except (decord.DECORDError, RuntimeError):  # decord's own messages are C++ source lines
            raise Unreadable(_damage(path)) from None
    except Unreadable as reason:
        problem = str(reason)
    except UnicodeEncodeError:  # by decord
        problem = "its name is not UTF-8; rename it"
    except av.error.FFmpegError as error:
        problem = f"no readable video: {error.strerror}"
    except Exception as error:  # whatever else the two libraries raise on a strange file ends no corpus
        problem = f"the decoder failed: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return None, None, None, problem


def _damage(path):
    """Say what is wrong with a file that decord gave up on: its index may list more frames than there are."""
    import av

    packets = 0
    with av.open(path, metadata_errors="ignore") as box, suppress(av.error.FFmpegError):
        stream = box.streams.best("video")
        for packet in box.demux(stream):
            packets += packet.size > 0
    if packets < stream.frames:
        return f"cut short: {packets} of {stream.frames} frames are in the file"
    return "the decoder gave up on damaged data"


def serve(pipe):
    """Answer requests until the other end is gone: a message, then the bytes of the frames if there are any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    try:
        import av
        import decord
    except (ImportError, OSError) as error:
        return pipe.send(str(error))
    av.logging.set_level(av.logging.PANIC)
    decord.logging.set_level(decord.logging.QUIET)
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
