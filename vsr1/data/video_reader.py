"""A video file becomes frames and the seconds at which they were seen.

decord picks frames by their timestamps. A child process does it, because decord's hangs hold the GIL and only
a kill ends them. The child starts once and answers for thousands of videos: `python -P frames.py FD`, neither
a fork nor multiprocessing, so it never loads torch and works from notebooks and unguarded scripts alike.
A video that cannot be read is a Clip with a problem in words. No bad file raises, none hangs.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

import numpy as np

TIME_EPS = 1e-3  # s; decord's stamps are float32, an hour in they are 0.2 ms coarse
MIN_COMPLETENESS = (
    0.95  # share of the claimed length that must be there; sound may outlast the pictures by a little
)
# Containers where decord's frames agreed with PyAV's. Elsewhere PyAV reads, in order: decord finds no
# timestamps in AVI and MPEG-PS and seeks to wrong frames there, and in ASF (.wmv) it was 48 frames off.
SEEKABLE_FORMATS = {"mov", "mp4", "matroska", "webm", "mpegts"}


@dataclass(frozen=True, eq=False)  # one is like no other
class Clip:
    frames: np.ndarray | None  # (T, H, W, 3) uint8; None: unreadable
    timestamps: (
        np.ndarray | None
    )  # (T,) seconds after the first frame, true timestamps, not the requested ones
    seconds: float | None  # end of the last frame; None: unknown
    problem: str | None  # None: fine


def sample_times(seconds, fps=1.0, max_frames=64):
    """When to look at a video, (T,) seconds with T even: METHOD's "1 fps, <= 64 frames, uniform".

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


@dataclass
class Reader:
    """Reads one video at a time in a child process that is killed, and replaced, when it takes too long.

    Use it as a context manager and from one thread at a time.
    """

    fps: float = 1.0
    max_frames: int = 64
    size: tuple[int, int] | None = None  # (width, height) to scale to; None: as stored
    timeout: float = 30.0  # seconds for one video
    _child: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _pipe: Connection | None = field(default=None, init=False, repr=False)

    def read(self, path, times=None) -> Clip:
        """The frames on screen at `times` (seconds after the first frame), or at its `sample_times`."""
        times = None if times is None else np.asarray(times, dtype=float)
        assert times is None or (times.ndim == 1 and len(times) and times.min() >= 0), times
        if self._child is None or self._child.poll() is not None:
            self._start()
        clip, problem = None, f"no answer within {self.timeout:g} s, the decoder was stopped"
        try:
            self._pipe.send((os.fspath(path), times, self.fps, self.max_frames, self.size, self.timeout))
            if self._pipe.poll(self.timeout):
                clip = Clip(*self._pipe.recv())
        except (EOFError, ConnectionError):
            problem = f"the decoder died of signal {-self._child.wait()}"
            if self._child.returncode > 0:
                raise RuntimeError(f"{path}: the frame worker failed, its traceback is on stderr") from None
        finally:
            if clip is None:  # after Ctrl-C too: a late answer must not pass for the next video's
                self.close()
        return clip or Clip(None, None, None, problem)

    def _start(self):
        self.close()
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        trouble = self._pipe.recv() if self._pipe.poll(120) else "the frame worker did not start in 120 s"
        if trouble:
            self.close()
            raise ImportError(f"decoding needs decord and av ({trouble}): pip install -r requirements.txt")

    def close(self):
        """Stop the child. The next read starts a new one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._pipe.close()
            self._child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_frames(path, timestamps) -> Clip:
    """The frames on screen at `timestamps`; for many videos keep a Reader."""
    with Reader() as reader:
        return reader.read(path, timestamps)


def read_videos(paths, like: Reader | None = None, workers=1) -> Iterator[Clip]:
    """One Clip per path, in order, with the settings of `like`; `workers` children decode ahead.

    At most `workers + 2` videos are decoded, or being decoded, beyond the one in the caller's hands.
    """
    with reader_pool(like, workers) as read:
        pending = deque()
        for path in paths:
            pending.append(read(path))
            if len(pending) > workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def reader_pool(like: Reader | None = None, workers=1):
    """A function from a path to the Future of its Clip; `workers` children decode, and live as long as the block."""
    with ExitStack() as stack:
        idle = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(replace(like or Reader())))

        def read(path):
            reader = idle.get()
            try:
                return reader.read(path)
            finally:
                idle.put(reader)

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        yield lambda path: pool.submit(read, path)


# From here on: the child. decord and av are imported inside functions because the parent must not load them.


class Unreadable(Exception):
    """A reason why this file gives no frames."""


def _container_info(path):
    """What the container says: its formats, count of frames (0: silent) and seconds (None: silent)."""
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
    """When each frame appears and is gone at the earliest, both (F,) seconds after the first; stamped."""
    starts, ends = video.get_frame_timestamp(np.arange(len(video))).astype(np.float64).T
    stamped = bool((np.abs(starts) < 1e9).all())  # decord's "none" is about 1e15 seconds off
    if (
        not stamped and not formats & SEEKABLE_FORMATS
    ):  # there, and only there, frames are taken as equally long
        starts = ends = np.arange(len(video)) / video.get_avg_fps()
    elif not stamped or (np.diff(starts) < 0).any() or starts[-1] < 0:
        raise Unreadable("the timestamps are incomplete or do not increase")
    # A clip cut without recoding begins with frames that are only there to decode the others (an edit list).
    shown = starts > -TIME_EPS
    starts, ends = starts[shown], ends[shown]
    period = np.median(np.diff(starts)) if len(starts) > 1 else 1 / video.get_avg_fps()
    return starts - starts[0], np.maximum(ends, starts + period) - starts[0], stamped


def _frame_indices(times, starts, ends):
    """Index of the frame on screen at each time, (T,); Unreadable where a hole or the end is.

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
    """Frames by index through PyAV, decoding from the start: (T, H, W, 3) and their own seconds (T,)."""
    import av

    wanted, kept, shown_at = set(index.tolist()), {}, []
    shape = dict(zip(("width", "height"), size, strict=True)) if size else {}
    with av.open(path, metadata_errors="ignore") as box:
        for number, frame in enumerate(box.decode(box.streams.best("video"))):
            shown_at.append(frame.time or 0.0)
            if number in wanted:
                kept[number] = frame.to_ndarray(format="rgb24", **shape)
            if len(kept) == len(wanted):
                return np.stack([kept[i] for i in index.tolist()]), np.array(shown_at)[index] - shown_at[0]
    raise Unreadable(f"{len(wanted) - len(kept)} of {len(wanted)} frames did not decode")


def _decode(path, times, fps, max_frames, size):
    """(frames, timestamps, seconds, None) of one file, or Unreadable, or an error of the two libraries."""
    import decord

    formats, claimed_frames, claimed_seconds = _container_info(path)
    width, height = size or (-1, -1)
    # One thread: on short clips three times as fast as decord's own choice.
    video = decord.VideoReader(path, width=width, height=height, num_threads=1)
    starts, ends, stamped = _frame_times(video, formats)
    if claimed_frames and len(video) < MIN_COMPLETENESS * claimed_frames:
        raise Unreadable(f"cut short: {len(video)} of {claimed_frames} frames are in the file")
    if claimed_seconds and ends[-1] < MIN_COMPLETENESS * claimed_seconds:
        raise Unreadable(f"cut short: {ends[-1]:.1f} of {claimed_seconds:.1f} s are in the file")
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
    return frames, starts[index], float(ends[-1]), None


def _missing(path):
    """Words for how much is there when the index lists more frames than the file holds, else none."""
    import av

    found = 0
    with av.open(path, metadata_errors="ignore") as box, suppress(av.error.FFmpegError):
        stream = box.streams.best("video")
        for packet in box.demux(stream):
            found += packet.size > 0
    return f"cut short: {found} of {stream.frames} frames are in the file" if found < stream.frames else ""


def _read_or_explain(path, *how):
    """_decode, with every known way to fail turned into words."""
    import av
    import decord

    try:
        return _decode(path, *how)
    except Unreadable as reason:
        problem = str(reason)
    except UnicodeEncodeError:  # by decord
        problem = "its name is not UTF-8; rename it"
    except av.error.FFmpegError as error:
        problem = f"no readable video: {error.strerror}"
    except (decord.DECORDError, RuntimeError):  # decord's own messages are C++ source lines
        problem = _missing(path) or "the decoder gave up on damaged data"
    return None, None, None, problem


def _serve(pipe):
    """Answer requests until the other end is gone."""
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
        answer = _read_or_explain(*request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
