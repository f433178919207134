"""Prompts, patches and batches, each against a second way of making them."""

import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import config
from vsr1.data import frame_sizes
from vsr1.mini import architecture
from vsr1.models import batching, decoding, engine, inputs, loading


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    tokenizer = architecture.make_tokenizer()
    return Qwen3VLForConditionalGeneration(architecture.make_config(tokenizer)).eval(), tokenizer


def video_row(tiny, frames, seconds=None, question="Describe what happens when."):
    model, tokenizer = tiny
    patches, grid = inputs.patchify(frames, model.config.vision_config, frame_sizes.PixelRule(4096))
    timestamps = np.arange(len(frames)) if seconds is None else seconds
    text = inputs.chat(
        tokenizer,
        "Watch.",
        inputs.video_text(np.asarray(timestamps, float), grid[1] * grid[2] // 4) + question,
    )
    return inputs.Prompt(tokenizer(text)["input_ids"], inputs.Video(patches, grid))


def noise(count, height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_the_prompt_of_a_video_has_one_wrapper_around_each_pair_of_frames(tiny):
    """Golden ids in the layout of transformers 4.57.1; 5.x's processor doubles the wrapper."""
    _, tokenizer = tiny
    tokens = tokenizer.convert_ids_to_tokens(video_row(tiny, noise(4), question="Who?").ids)
    block = ["<|vision_start|>"] + ["<|video_pad|>"] * 4 + ["<|vision_end|>"]
    start = tokens.index("<")
    assert tokens[start:][: 2 * 10] == [
        "<",
        "0",
        ".5",
        "Ġseconds>",
        *block,
        "<",
        "2",
        ".5",
        "Ġseconds>",
        *block,
    ]
    head = tokenizer.decode(video_row(tiny, noise(4), question="Who?").ids[:start])
    assert head == "<|im_start|>system\nWatch.<|im_end|>\n<|im_start|>user\n"


def test_patches_equal_the_library_s_own_for_a_still_picture(tiny):
    """The image processor repeats a picture to fill the temporal patch; two equal frames are the same thing."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture = noise(1, 96, 64)[0]
    half = [0.5, 0.5, 0.5]
    official = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, do_resize=False, image_mean=half, image_std=half
    )(picture, return_tensors="pt")
    config = tiny[0].config.vision_config
    patches, grid = inputs.patchify(np.stack([picture, picture]), config, frame_sizes.PixelRule(10**6))
    assert grid == tuple(official["image_grid_thw"][0].tolist())
    torch.testing.assert_close(patches, torch.as_tensor(official["pixel_values"]).float(), atol=1e-5, rtol=0)


def test_both_frames_of_a_pair_reach_the_patches_in_order(tiny):
    config = tiny[0].config.vision_config
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    patches, _ = inputs.patchify(np.concatenate([black, white]), config, frame_sizes.PixelRule(4096))
    both = patches.reshape(-1, 3, 2, 16, 16)
    assert (both[:, :, 0] == -1).all() and (both[:, :, 1] == 1).all()


def test_a_row_alone_equals_the_row_in_a_left_padded_batch(tiny):
    model, tokenizer = tiny
    rows = [video_row(tiny, noise(count, seed=count)) for count in (2, 6, 4)]
    batch = inputs.collate(rows, model, tokenizer.pad_token_id)
    together = model(**batch).logits[:, -1]
    for row, logits in zip(rows, together, strict=True):
        alone = model(**inputs.collate([row], model, tokenizer.pad_token_id)).logits[0, -1]
        torch.testing.assert_close(alone, logits, atol=1e-5, rtol=0)


def test_positions_of_videos_follow_the_rule_of_the_paper_s_model(tiny):
    """Text counts on; a pair of frames shares one time and spreads over rows and columns."""
    model, tokenizer = tiny
    row = video_row(tiny, noise(4))
    positions = inputs.collate([row], model, tokenizer.pad_token_id)["position_ids"][:, 0]
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    expected, position, i = [], 0, 0
    while i < len(row.ids):
        if row.ids[i] == pad:
            expected += [(position, position + r, position + c) for r in range(2) for c in range(2)]
            position, i = position + 2, i + 4
        else:
            expected.append((position, position, position))
            position, i = position + 1, i + 1
    assert positions.T.tolist() == [list(p) for p in expected]


def test_black_frames_and_other_times_change_the_answer(tiny):
    """The cheapest detector of a video that never reached the model."""
    model, tokenizer = tiny
    answer = lambda row: model(**inputs.collate([row], model, tokenizer.pad_token_id)).logits[0, -1]  # noqa: E731
    logits = answer(video_row(tiny, noise(4)))
    assert (answer(video_row(tiny, np.zeros((4, 64, 64, 3), np.uint8))) - logits).abs().max() > 1e-3
    assert (answer(video_row(tiny, noise(4), [0, 1, 7, 8])) - logits).abs().max() > 1e-3


def test_any_text_survives_the_mini_tokenizer_and_world_words_are_single_tokens(tiny):
    _, tokenizer = tiny
    for text in ("Größe 10.25 naïve 東京 <start>12.0</start>", "a\nb  c\t", "The person waves."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" trousers umbrella kitchen")["input_ids"]) == 3
    assert len(tokenizer("179.5")["input_ids"]) == 2


def test_batches_cover_every_row_once_and_respect_the_limit():
    lengths = np.random.default_rng(0).integers(1, 90, 500).tolist()
    groups = batching.batches(lengths, 256)
    assert sorted(row for group in groups for row in group) == list(range(500))
    assert all(len(group) * max(lengths[row] for row in group) <= 256 for group in groups)
    assert lengths[groups[0][0]] == max(lengths)


# Tokens of a pair of frames: by the size rule of a video alone, and after qwen-vl-utils 0.0.14 has brought each frame
# of a list to multiples of 64 (it hands 32 where the size of a patch is asked for), as the official preprocessing does.
TOKENS = [
    ("charades", 480, 270, 30, 144, 128),
    ("didemo", 320, 240, 30, 140, 143),
    ("didemo", 500, 375, 50, 192, 192),
    ("activitynet", 640, 360, 64, 220, 240),
    ("activitynet", 1280, 720, 64, 220, 220),
]


@pytest.mark.parametrize("name", ["paper", "paper-24gb"])
@pytest.mark.parametrize(("dataset", "width", "height", "frames", "alone", "official"), TOKENS)
def test_the_engine_of_the_paper_reads_the_official_number_of_tokens(
    name, dataset, width, height, frames, alone, official
):
    rule = engine.pixel_rule(config.load(name))
    tokens = lambda rule: np.prod(rule.sizes(height, width, frames, 32)[-1]) / 32**2  # noqa: E731
    assert tokens(rule) == official == np.prod(by_qwen_vl_utils(height, width, frames)) / 32**2
    assert tokens(dataclasses.replace(rule, first_multiple=0)) == alone


def by_qwen_vl_utils(height, width, frames):
    """(rows, columns) of a frame in a list, as that library's documentation gives the rule: each size by itself."""

    def fit(height, width, step, least, most):
        grid = [(r, c) for r in range(step, 4096, step) for c in range(step, 4096, step)]
        near = min(grid, key=lambda size: (abs(size[0] - height), size[0] // step % 2))[0]
        near = near, min(grid, key=lambda size: (abs(size[1] - width), size[1] // step % 2))[1]
        if near[0] * near[1] > most:
            scale = (most / height / width) ** 0.5
            return max(r for r, _ in grid if r <= height * scale), max(
                c for _, c in grid if c <= width * scale
            )
        if near[0] * near[1] < least:
            scale = (least / height / width) ** 0.5
            return min(r for r, _ in grid if r >= height * scale), min(
                c for _, c in grid if c >= width * scale
            )
        return near

    return fit(*fit(height, width, 64, 16384, 2**26), 32, 131072, min(786432, 2 * 7864320 / frames))


def test_small_frames_are_enlarged_and_a_long_video_s_shrunk_once_after_the_other():
    rule = frame_sizes.PixelRule(786432, 131072, 7864320, 64)
    assert rule.sizes(240, 320, 30, 32) == [(256, 320), (352, 416)]
    vision = types.SimpleNamespace(patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    frames = noise(2, 240, 320)
    patches, grid = inputs.patchify(frames, vision, rule)
    assert grid == (1, 22, 26)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    for size in ((256, 320), (352, 416)):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    alone, _ = inputs.patchify(
        pixels.byte().permute(0, 2, 3, 1).numpy(), vision, frame_sizes.PixelRule(10**7)
    )
    assert torch.equal(patches, alone)
    assert frame_sizes.PixelRule(4096).sizes(32, 32, 64, 32) == [(32, 32)], "the mini engine enlarges nothing"


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (100, 333), (480, 854), (37, 41)])
def test_frames_shrunk_one_by_one_are_those_shrunk_at_once(size):
    frames = np.random.default_rng(0).integers(0, 256, (6, *size, 3), dtype=np.uint8)
    vision = types.SimpleNamespace(patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    patches, (pairs, rows, columns) = inputs.patchify(frames, vision, frame_sizes.PixelRule(9000))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    height, width = 16 * rows, 16 * columns
    if (height, width) != size:
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255)
    pixels = pixels / 127.5 - 1
    by_hand = pixels.reshape(pairs, 2, 3, rows // 2, 2, 16, columns // 2, 2, 16).permute(
        0, 3, 6, 4, 7, 2, 1, 5, 8
    )
    assert torch.equal(patches, by_hand.reshape(len(patches), -1))


@pytest.mark.parametrize(
    ("installed", "dtype", "device", "choice"),
    [
        (True, "bfloat16", "cuda", "flash_attention_2"),
        (False, "bfloat16", "cuda", None),
        (True, "float32", "cuda", None),
        (True, "bfloat16", "cpu", None),
    ],
)
def test_attention_is_chosen_by_what_is_there(monkeypatch, installed, dtype, device, choice):
    """All of an engine, but only the eyes of what reads on from a cache."""
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: installed)
    whole = loading.attention(Qwen3VLModel, dtype, device)
    part = loading.attention(Qwen3VLForConditionalGeneration, dtype, device)
    assert whole == ({"attn_implementation": choice} if choice else {})
    assert part == (
        {"attn_implementation": {"text_config": "sdpa", "vision_config": choice}} if choice else {}
    )


def test_a_choice_by_side_reaches_both_sides_and_the_record(tiny, tmp_path, monkeypatch):
    """In the form that a GPU would get it, with the two kinds of attention that run anywhere: the same states."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = loading.load(Qwen3VLForConditionalGeneration, str(tmp_path))[0]
    assert loading.model_facts(plain) == {"device": "cpu", "attention": ["sdpa", "sdpa"], "commit": None}
    sides = {"text_config": "sdpa", "vision_config": "eager"}
    monkeypatch.setattr(loading, "attention", lambda *_: {"attn_implementation": sides})
    other = loading.load(Qwen3VLForConditionalGeneration, str(tmp_path))[0]
    assert loading.model_facts(other)["attention"] == ["sdpa", "eager"]
    row = video_row(tiny, noise(4))
    (context, hidden), (_, other_hidden) = (
        decoding.prefill(model, [row], tokenizer.pad_token_id) for model in (plain, other)
    )
    torch.testing.assert_close(other_hidden, hidden, atol=1e-5, rtol=0)
    assert decoding.extend(other, context, hidden[:, None])[0].attention_mask.shape[1] == len(row.ids) + 1


def test_work_that_does_not_fit_is_done_in_halves_from_then_on_once_and_loudly():
    portions, sizes, fits = batching.OOMSplitter("eval_batch"), [], 4

    def work(some):
        sizes.append(len(some))
        if len(some) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return some

    assert portions.run(work, [1, 2, 3, 4]) == [[1, 2, 3, 4]]
    with pytest.warns(UserWarning, match="7 at once do not fit in memory: half of eval_batch from now on"):
        assert portions.run(work, [1, 2, 3, 4, 5, 6, 7]) == [[1, 2, 3, 4], [5, 6, 7]]
    assert portions.run(work, [1, 2, 3]) == [[1, 2], [3]] and sizes == [4, 7, 4, 3, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        portions.run(work, list(range(9)))
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        batching.OOMSplitter("eval_batch").run(work, [1])
