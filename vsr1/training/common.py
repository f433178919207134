"""Provide what both training stages share: train queries, groups, InfoNCE, LoRA, float32 weights, when to save."""

import time

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, LoraModel

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, source
from vsr1.models import prompt_text
from vsr1.models.policy import Policy

LORA_SCALE = 2  # ours: alpha over rank, how much an adapter's output counts
LANGUAGE_LAYERS = r".*language_model\.layers\..*_proj"  # names of the linear layers that get adapters
# Part of the keys of both stages.
VISION_KNOBS = ("video_fps", "max_frames", "max_frame_pixels", "dtype", "seed")


def split_train_queries(profile, dataset: str) -> tuple[list[annotations.Query], list[annotations.Query]]:
    """Return (queries to learn from, validation queries) of the train split, by `annotations.split_validation`."""
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
    return annotations.split_validation(queries, profile.val_fraction, source.families(profile, dataset))


def rows_by_group(groups) -> dict:
    """Return {group: the numbers of its rows}, in the order in which groups first appear.

    >>> rows_by_group("aba")
    {'a': [0, 2], 'b': [1]}
    """
    rows = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


def info_nce(query_vecs, right_vecs, wrong_vecs, temperature: float) -> torch.Tensor:
    """Return the losses (B,) of query vectors (B, D) against one right (B, D) and K wrong videos (B, K, D).

    All vectors have length one. exp(-loss) is the softmax probability of the right video: the retrieval reward of
    stage 2 (docs/method.md section 6).
    """
    videos = torch.cat([right_vecs[:, None], wrong_vecs], dim=1)  # (B, 1 + K, D)
    logits = torch.einsum("bd,bkd->bk", query_vecs, videos) / temperature
    right = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, right, reduction="none")


def add_lora(policy: Policy, rank: int, seed: int, mergers=False) -> None:
    """Add adapters to the language model's linear layers, and to the vision mergers if asked; freeze the rest of it.

    Only the row of <REFINE> learns beside them. It begins as the mean of all embeddings, so frozen its logit would be
    the mean logit, which is never the largest. The heads are not part of the model and learn in full.
    """
    modules = LANGUAGE_LAYERS + r"|.*merger.*linear_fc\d" * mergers
    rows = None if policy.refine_token_id is None else [policy.refine_token_id]
    if rows and not policy.model.config.tie_word_embeddings:
        raise InputError(
            f"{policy.name}: the output row of {prompt_text.REFINE} is not tied to its embedding and would not learn; "
            "set lora_rank: 0"
        )
    config = LoraConfig(
        r=rank, lora_alpha=LORA_SCALE * rank, target_modules=modules, trainable_token_indices=rows
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.adapters = LoraModel(policy.model, config, "default")  # changes `policy.model` in place
    if rows:
        policy.model.lm_head.bias = None  # TRL asks for it, and peft's stand-in has none


def upcast_trainable(weights) -> None:
    """Turn the weights that learn into float32: an optimizer's step is mostly lost in bfloat16."""
    for weight in weights:
        if weight.requires_grad:
            weight.data = weight.data.float()


class SaveTimer:
    """Says when it is time to save a training state: `minutes` after the last one, by the clock of rank 0."""

    def __init__(self, minutes: float):
        self.minutes, self.last = minutes, time.monotonic()

    def is_due(self) -> bool:
        """Return whether to save now. All processes must call it and get the same answer; True starts the next wait."""
        due = [time.monotonic() - self.last >= 60 * self.minutes]
        if cache.dist_state().num_processes > 1:
            broadcast_object_list(due)
        if due[0]:
            self.last = time.monotonic()
        return due[0]
