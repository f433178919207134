"""A policy of the mini shape with random weights, and things to show it: nothing depends on what training taught."""

import copy
import functools

import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import config
from vsr1.data import video_reader
from vsr1.mini import architecture
from vsr1.models import engine, policy, search_index, soft_heads

COLD = 0.1  # a temperature at which a random policy repeats itself
QUERIES = ["A person waves.", "Someone jumps up and down by the lake with a blue dog.", "Who sits?"]


def random_policy(spare=8, init="default", seed=0):
    """With fresh heads, and `spare` embedding rows above the tokenizer, one of which <REFINE> takes; to be changed."""
    return copy.deepcopy(_random_policy(spare, init, seed))


@functools.cache
def _random_policy(spare, init, seed):
    torch.manual_seed(seed)
    tokenizer = architecture.make_tokenizer()
    config = architecture.make_config(tokenizer)
    config.text_config.vocab_size = len(tokenizer) + spare
    model = Qwen3VLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():  # freshly drawn weights hardly look at anything: let them
        if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
            weight.data *= 2.5
        if (
            "norm" in name and "weight" in name
        ):  # else before and after a norm would be nearly the same to a head
            weight.data.uniform_(0.5, 1.5)
    base = policy.Policy(model, tokenizer, None, None, 4096)
    return policy.new_heads(base, soft_heads.Settings(refine_init=init), seed)


def random_engine():
    """A frozen engine of the mini shape."""
    torch.manual_seed(1)
    tokenizer = architecture.make_tokenizer()
    model = Qwen3VLModel(architecture.make_config(tokenizer)).eval().requires_grad_(False)
    return engine.Engine(config.load("smoke"), model, tokenizer, "random")


def clip(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return video_reader.Clip(pixels, np.arange(count) * 2.0 + 0.25, 2.0 * count, None)


VIDEOS = [f"v{n}" for n in range(6)]


class Shelf:
    """Six videos of random pixels, as `clip_cache.ClipCache` gives them."""

    def __init__(self, seed=0):
        self.clips = {video: clip(4 + 2 * (n % 3), seed + n) for n, video in enumerate(VIDEOS)}

    def get(self, ids):
        return [self.clips[video] for video in ids]


def random_vectors():
    """Vectors of the six videos, and of three queries."""
    vecs = torch.nn.functional.normalize(torch.randn(9, 192, generator=torch.manual_seed(2)), dim=1).numpy()
    return search_index.Vectors(VIDEOS, vecs[:6], [1, 2, 3], vecs[6:])


def changed(made, **changes):
    """The same policy with other attributes, say another end of reply: a random one never says <|im_end|>."""
    other = policy.Policy(made.model, made.tokenizer, made.heads, made.settings, made.max_frame_pixels)
    other.__dict__ |= changes
    return other


def sampled(made, prompts, group=1, limit=24, temperature=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return made.reply(prompts, group=group, max_new_tokens=limit, temperature=temperature, rng=rng)


def coming_to_an_end(made, prompts):
    """Other ids for <|im_end|> and <REFINE>: two that cold sampling of 4 replies a prompt meets at different steps."""
    said = [reply.ids for reply in sampled(made, prompts, 4, temperature=COLD)]
    often = sorted(
        {token for ids in said for token in ids}, key=lambda token: -sum(token in ids for ids in said)
    )
    return changed(made, stop_token_id=often[0], refine_token_id=often[1])
