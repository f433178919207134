"""Bring the frames of videos to the sizes in which models see them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

MULTIPLE = 32  # sides of frames: patches of 16 pixels, merged in twos, in Qwen3-VL and the mini models


@dataclass(frozen=True)
class PixelRule:
    """How large a model sees the frames of a video; the official engine enlarges small ones (docs/method.md, 3.3)."""

    max_pixels: int  # of a frame
    min_pixels: int = 0  # of a frame; smaller ones are enlarged
    video_pixels: int | None = None  # of one frame of each pair, together; None: any number
    first_multiple: int = 0  # sides are brought to multiples of it before anything else; 0: they are not

    def sizes(self, height: int, width: int, frames: int, multiple: int) -> list[tuple[int, int]]:
        """Return (height, width) after each step from a frame as it is, for a video of so many frames."""
        sizes, most = [], self.max_pixels
        if self.first_multiple:
            area = self.first_multiple**2  # as of a still picture: 4 to 16384 tokens
            height, width = resized_size(height, width, self.first_multiple, 16384 * area, 4 * area)
            sizes.append((height, width))
        if self.video_pixels is not None:
            most = max(min(most, 2 * self.video_pixels / frames), int(1.05 * self.min_pixels))
        return [*sizes, resized_size(height, width, multiple, most, self.min_pixels)]


def resized_size(
    height: int, width: int, multiple: int, max_pixels: float, min_pixels: int = 0
) -> tuple[int, int]:
    """Return (height, width) of a frame for the model: multiples of `multiple`, `min_pixels` to `max_pixels`.

    >>> resized_size(128, 128, 32, 4096), resized_size(480, 854, 32, 200704)
    ((64, 64), (320, 576))
    """
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        rows, columns = (max(multiple, int(side / shrink) // multiple * multiple) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = (min_pixels / (height * width)) ** 0.5
        rows, columns = (math.ceil(side * grow / multiple) * multiple for side in (height, width))
    return rows, columns


def resized(frame: np.ndarray, sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Bring one frame to each (height, width) in turn, (3, H, W) float32 whole numbers.

    All frames at once would take gigabytes.
    """
    pixels = torch.from_numpy(np.require(frame, requirements=["C", "W"])).permute(2, 0, 1).float()
    for size in sizes:
        if size != tuple(pixels.shape[1:]):
            pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
            pixels = pixels.round().clamp(0, 255)
    return pixels


def shrink(frames: np.ndarray, rule: PixelRule) -> np.ndarray:
    """Return frames (T, H, W, 3) uint8 in the size in which a model gets them."""
    sizes = rule.sizes(*frames.shape[1:3], len(frames), MULTIPLE)
    return np.stack([resized(frame, sizes).permute(1, 2, 0).byte().numpy() for frame in frames])
