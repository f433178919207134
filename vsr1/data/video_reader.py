"""Read the frames of video files, and the seconds at which they are on screen, without ever crashing or hanging.

`Reader` talks to a child process (`decoder.py`) that decodes thousands of videos and is killed when one takes too
long. A file that cannot be read is a Clip with a problem in words; only a file that is too slow twice stops the caller.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

import numpy as np

from vsr1.config import InputError
from vsr1.data import decoder

TIMEOUT = 30.0  # seconds for one video
RETRY = 4  # times as long may the second attempt take
WAITING_BYTES = 2**30  # ours: decoded frames that wait for the caller of `read_videos`


class DecodeTimeout(InputError):
    """A video was not decoded in time, twice: a slow disk or a suspended machine rather than a broken file."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Clip:
    """Some frames of a video, or the reason why there are none."""

    frames: np.ndarray | None  # (T, H, W, 3) uint8; None: unreadable
    timestamps: np.ndarray | None  # (T,) seconds after the first frame at which the frames appear
    seconds: float | None  # end of the last frame of the video; None: unknown
    problem: str | None  # None: fine
    # {name: text or number} about file and reading; see `inspect_video`
    facts: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return 0 if self.frames is None else self.frames.nbytes


@dataclass
class Reader:
    """Reads one video at a time in a child process that is killed, and replaced, when it takes too long.

    Use it as a context manager and from one thread at a time.
    """

    fps: float = 1.0
    max_frames: int = 64
    size: tuple[int, int] | None = None  # (width, height) to scale to, upright; None: as shown
    timeout: float = TIMEOUT  # seconds for one video; a second attempt gets RETRY times as many
    skip_slow: bool = False  # True: a second timeout is a problem of the clip; False: it raises DecodeTimeout
    _child: subprocess.Popen | None = field(default=None, init=False, repr=False)
    _pipe: Connection | None = field(default=None, init=False, repr=False)

    def read(self, path, times=None) -> Clip:
        """Read the frames on screen at `times` (seconds after the first frame), or at its `sample_times`.

        A second attempt takes longer and goes another way (`decoder.decode`). Raises DecodeTimeout where neither ends.
        """
        times = None if times is None else np.asarray(times, dtype=float)
        assert times is None or (times.ndim == 1 and len(times) and times.min() >= 0), times
        failures = []
        for timeout, second in ((self.timeout, False), (RETRY * self.timeout, True)):
            answer = self._attempt(path, times, timeout, second)
            if isinstance(answer, Clip):
                return answer
            failures.append(answer)
        if any(failures):  # words of a crash
            slow = f"gave no answer within {timeout:g} s"
            return Clip(
                None, None, None, f"the decoder {failures[0] or slow}, the second one {failures[1] or slow}"
            )
        problem = f"not decoded within {self.timeout:g} s, nor within {timeout:g} s at a second attempt"
        if self.skip_slow:
            return Clip(None, None, None, problem)
        raise DecodeTimeout(
            f"{path}: {problem}; a slow disk, a busy or a suspended machine? Run the same command again, or "
            "raise decode_timeout in the profile. If it is always this file, move it away"
        )

    def _attempt(self, path, times, timeout, second):
        """Ask the child for a Clip. Return it, or how the child died, or None if it did not answer in time.

        A child that gave no Clip is closed.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        clip = None
        try:
            self._pipe.send((os.fspath(path), times, self.fps, self.max_frames, self.size, second, timeout))
            if self._pipe.poll(timeout):
                clip = self._receive()
            return clip
        except (EOFError, ConnectionError):
            status = self._child.wait()
            return f"died of signal {-status}" if status < 0 else f"ended with status {status}"
        finally:
            if clip is None:  # after Ctrl-C too: a late answer must not pass for the next video's
                self.close()

    def _receive(self):
        shape, *rest = self._pipe.recv()
        if shape is None:
            return Clip(None, *rest)
        frames = np.empty(shape, np.uint8)
        received = self._pipe.recv_bytes_into(frames.reshape(-1))
        assert received == frames.nbytes, (received, shape)
        return Clip(frames, *rest)

    def _start(self):
        self.close()
        self._pipe, far_end = Pipe()
        with far_end:
            command = [sys.executable, "-P", decoder.__file__, str(far_end.fileno())]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[far_end.fileno()])
        failure = self._pipe.recv() if self._pipe.poll(120) else "the decoder did not start in 120 s"
        if failure:
            self.close()
            raise ImportError(f"decoding needs av ({failure}): pip install -r requirements.txt")

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


def reader_for(profile) -> Reader:
    """Return a reader with the sampling and the time limit of a profile."""
    return Reader(profile.video_fps, profile.max_frames, timeout=profile.decode_timeout)


def read_videos(paths, template: Reader, workers=1) -> Iterator[Clip]:
    """Yield one Clip per path, in order, read with the settings of `template`; `workers` children decode ahead.

    A pair of a path and times asks for the frames on screen then.

    Beyond the clip in the caller's hands at most `workers + 2` are decoded or being decoded, and only as many as take
    WAITING_BYTES if all are as large as the largest so far; always one.
    """
    with reader_pool(template, workers) as read:
        waiting, ahead, largest = deque(), 1, 0
        for path in paths:
            waiting.append(read(*path) if isinstance(path, tuple) else read(path))
            while len(waiting) > ahead:
                clip = waiting.popleft().result()
                largest = max(largest, clip.nbytes, 1)
                ahead = min(workers + 2, max(1, WAITING_BYTES // largest))
                yield clip
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def reader_pool(template: Reader, workers=1):
    """Give a function from a path, and times if wanted, to the Future of its Clip.

    `workers` children decode until the block ends.
    """
    with ExitStack() as stack:
        idle = SimpleQueue()
        for _ in range(workers):
            idle.put(stack.enter_context(replace(template)))

        def read(path, times):
            reader = idle.get()
            try:
                return reader.read(path, times)
            finally:
                idle.put(reader)

        pool = stack.enter_context(ThreadPoolExecutor(workers))
        yield lambda path, times=None: pool.submit(read, path, times)
