"""Turn prompts into token ids, frames into patches, and rows into batches, for the search engine and the policy.

The library's own processor is not used: it doubles the vision wrapper, needs torchvision, and picks frames by average
rate. The layout is that of transformers 4.57.1, which the released weights were trained with; a golden test pins it.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from vsr1.data import frame_sizes

if not torch.cuda.is_available():
    # Else the library copies keys and values for each head that shares them: a quarter of attention's time here.
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


@dataclass(eq=False)
class Video:
    """The patches of a video, until a frozen vision tower has encoded them into features (`decoding.prefill`)."""

    patches: torch.Tensor | None  # (P, 3 * 2 * patch * patch) float32
    grid: tuple[int, int, int]  # pairs of frames, patch rows, patch columns; P is their product
    features: list[torch.Tensor] | None = None  # (P / merge^2, H) each: for the input and the first layers

    def tokens_per_pair(self, merge: int) -> int:
        """Return how many tokens a pair of frames takes."""
        return self.grid[1] * self.grid[2] // merge**2


@dataclass(frozen=True)
class Prompt:
    """One row before batching: token ids, and its video if there is one."""

    ids: list[int]  # (L,)
    video: Video | None = None


def chat(tokenizer, system: str, user: str) -> str:
    """Return the text of a prompt up to where the assistant's reply begins."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def video_text(timestamps: np.ndarray, tokens_per_pair: int) -> str:
    """Return a video as text: for each pair of frames the mean of its two times, and its placeholders.

    >>> video_text(np.array([0.0, 1.0]), 1)
    '<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>'
    """
    assert len(timestamps) % 2 == 0, len(timestamps)
    pads = "<|video_pad|>" * tokens_per_pair
    times = pair_times(timestamps)
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


def pair_times(timestamps: np.ndarray) -> np.ndarray:
    """Return the seconds of each pair of frames, (T / 2,), from those of T frames."""
    return timestamps.reshape(-1, 2).mean(axis=1)


def patchify(
    frames: np.ndarray, config, rule: frame_sizes.PixelRule
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Return patches (P, 3 * 2 * patch * patch) in [-1, 1] and their grid, from frames (T, H, W, 3) uint8, T even.

    The order is Qwen2-VL's: pairs of frames, then blocks of merge x merge patches, then the patches of a block.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    assert config.temporal_patch_size == 2 and len(frames) % 2 == 0
    sizes = rule.sizes(*frames.shape[1:3], len(frames), patch * merge)
    height, width = sizes[-1]
    pixels = torch.stack([frame_sizes.resized(frame, sizes) for frame in frames])  # (T, 3, H, W)
    pixels.div_(127.5).sub_(1)
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(-1, 2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = (len(frames) // 2, rows, columns)
    return blocks.reshape(grid[0] * rows * columns, -1), grid


def collate(prompts: list[Prompt], model, pad: int, prefix: int = 0, pixels=True) -> dict[str, torch.Tensor]:
    """Return a left-padded batch with explicit position ids, which the model would guess wrongly.

    input_ids (B, L), attention_mask (B, prefix + L) and position_ids (3, B, L). With videos also pixel_values_videos,
    video_grid_thw and mm_token_type_ids.

    prefix  length of the common prefix that a cache holds: it is left out, and the padding follows it
    pixels  False leaves pixel_values_videos out
    """
    ids, mask = _pad_left([prompt.ids[prefix:] for prompt in prompts], pad)
    batch = {"input_ids": ids, "attention_mask": mask}
    videos = [prompt.video for prompt in prompts if prompt.video is not None]
    if not videos:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    else:
        kinds = (ids == model.config.video_token_id).int() * 2
        grids = torch.tensor([video.grid for video in videos])
        core = getattr(model, "model", model)
        positions, _ = core.get_rope_index(ids, kinds, video_grid_thw=grids, attention_mask=mask)
        batch |= {"position_ids": positions, "video_grid_thw": grids, "mm_token_type_ids": kinds}
        if pixels:
            batch["pixel_values_videos"] = torch.cat([video.patches for video in videos])
    batch["position_ids"] = batch["position_ids"] + prefix
    batch["attention_mask"] = F.pad(mask, (prefix, 0), value=1)
    return {name: value.to(model.device) for name, value in batch.items()}


def _pad_left(rows, pad):
    """Return (ids, mask), both (B, L), of rows of ids."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    return ids, mask
