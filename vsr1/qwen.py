"""Qwen3-VL plumbing that the search engine and the policy share: prompts to ids, frames to patches, batches to states.

The ids and the patches are made here, in the open, because the library's own processor doubles the vision wrapper,
needs torchvision and picks frames by average rate (STACK.md 2.4, 2.9, 2.10). The layout is transformers 4.57.1's, which
the released weights were trained with; a golden test pins it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from vsr1.params import ROOT, InputError

hf_logging.disable_progress_bar()


@dataclass(frozen=True)
class Prompt:
    """One row before batching: token ids, and the patches of its video if there is one."""

    ids: list[int]  # (L,)
    patches: torch.Tensor | None = None  # (P, 3 * 2 * patch * patch) float32
    grid: tuple[int, int, int] | None = None  # pairs of frames, patch rows, patch columns; P is their product


def place(name: str) -> str:
    """Where a model lives: a folder of the clone if there is one of that name, else a hub name, untouched."""
    return str(ROOT / name) if (ROOT / name).is_dir() else name


def load(kind, name: str, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer) of class `kind`, in eval mode; safetensors only, no code from the checkpoint."""
    if name.startswith("vsr1/") and not Path(place(name)).is_dir():
        raise InputError(
            f"{name}: the mini model is missing; restore it with `git checkout {name}` or `make foundation`"
        )
    try:
        model = kind.from_pretrained(place(name), dtype=getattr(torch, dtype), use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(place(name))
    except OSError as error:
        raise InputError(f"{name}: cannot load this model: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval(), tokenizer


def pick_device(wish: str) -> str:
    """The device a profile means: `auto` is the first GPU where there is one, else the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda asked for, but torch sees no GPU; set device: auto or cpu in the profile"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish


def chat(tokenizer, system: str, user: str) -> str:
    """The prompt text up to where the assistant speaks."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def video_text(seen_at: np.ndarray, tokens_per_pair: int) -> str:
    """A video as text: for each pair of frames the mean of their two times and its placeholders.

    >>> video_text(np.array([0.0, 1.0]), 1)
    '<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>'
    """
    assert len(seen_at) % 2 == 0, len(seen_at)
    pads = "<|video_pad|>" * tokens_per_pair
    times = seen_at.reshape(-1, 2).mean(axis=1)
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


def fit(height: int, width: int, multiple: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of a frame for the model: sides in multiples, at most `max_pixels`, aspect kept (nearly).

    >>> fit(128, 128, 32, 4096), fit(480, 854, 32, 200704)
    ((64, 64), (320, 576))
    """
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        rows, columns = (max(multiple, int(side / shrink) // multiple * multiple) for side in (height, width))
    return rows, columns


def patchify(frames: np.ndarray, config, max_pixels: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches (P, 3 * 2 * patch * patch) in [-1, 1] and their grid, from frames (T, H, W, 3) uint8, T even.

    The order is Qwen2-VL's: pairs of frames, then blocks of merge x merge patches, then the patches of a block.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    assert config.temporal_patch_size == 2 and len(frames) % 2 == 0
    pixels = (
        torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2).float()
    )  # (T, 3, H, W)
    height, width = fit(*pixels.shape[2:], patch * merge, max_pixels)
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255)
    pixels = pixels / 127.5 - 1
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(-1, 2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = (len(frames) // 2, rows, columns)
    return blocks.reshape(grid[0] * rows * columns, -1), grid


def collate(prompts: list[Prompt], model, pad: int) -> dict[str, torch.Tensor]:
    """A left-padded batch, with every position spelled out, since the model guesses them wrongly (STACK.md 2.2, 2.3).

    input_ids, attention_mask (B, L); position_ids (3, B, L); with videos also pixel_values_videos, video_grid_thw and
    mm_token_type_ids.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, length - len(prompt.ids) :] = 1
    videos = [prompt for prompt in prompts if prompt.grid is not None]
    if not videos:
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(3, -1, -1)}
    else:
        kinds = (ids == model.config.video_token_id).int() * 2
        grids = torch.tensor([prompt.grid for prompt in videos])
        core = getattr(model, "model", model)
        positions, _ = core.get_rope_index(ids, kinds, video_grid_thw=grids, attention_mask=mask)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "video_grid_thw": grids}
        batch |= {"mm_token_type_ids": kinds, "pixel_values_videos": torch.cat([p.patches for p in videos])}
    return {name: value.to(model.device) for name, value in batch.items()}


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in groups of similar length whose padded size stays within `max_tokens`; longest first.

    Longest first, so that a batch too large for the memory fails at once and not after an hour.

    >>> batches([5, 9, 5], 10)
    [[1], [0, 2]]
    """
    groups, group = [], []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            groups.append(group)
            group = []
        group.append(row)
    return [*groups, group] if group else groups
