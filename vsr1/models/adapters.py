"""Keep a policy as what it learned beside its base: low-rank differences in PEFT's layout, 16 bits, and its heads.

A policy of 2B parameters takes 40 MB this way instead of 4 GB. `checkpoints.load` reads such a folder like any other.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import Qwen3VLForConditionalGeneration

from vsr1.config import InputError
from vsr1.models import checkpoints, loading
from vsr1.models.policy import Policy

NEGLIGIBLE = 1e-5  # of the largest singular value: float32 leaves so much where nothing was learned


def save(policy: Policy, base: str, folder: Path) -> dict[str, int]:
    """Write the adapters and heads of a policy trained from `base`, and return the rank of each adapter.

    Adapters of several stages add up to one of their ranks' sum, which the singular values show. Raises InputError
    where anything but linear layers and the row of <REFINE> was trained, or a rank is full: no adapters made that.
    """
    model, _ = loading.load(Qwen3VLForConditionalGeneration, base)
    before, after = model.state_dict(), policy.model.state_dict()
    row, differences = _refine_row(policy, before), {}
    embedding = policy.model.get_input_embeddings().weight
    for name, weight in after.items():
        difference = weight.float().cpu() - before[name]
        if difference.any() and weight.data_ptr() != embedding.data_ptr():
            differences[name.removesuffix(".weight")] = _factors(name, difference)
    ranks = {name: len(down) for name, (down, _) in differences.items()}
    adapted = PeftModel(model, _config(base, ranks, policy.refine_token_id))
    for name, factors in differences.items():
        layer = adapted.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factors
    tokens = adapted.get_submodule(f"base_model.model.{_embedding_name(model)}").token_adapter
    tokens.trainable_tokens_delta["default"].data = row
    adapted.half().save_pretrained(folder)
    (folder / "README.md").unlink()  # an empty form of a model card
    model.config.save_pretrained(folder)
    checkpoints.save_heads(policy, folder, torch.float16)
    return ranks


def _factors(name, difference):
    """Split a difference of rank r into (A (r, in), B (out, r)), of equal length each."""
    if difference.ndim != 2:
        raise InputError(f"{name}: not a linear layer, but trained; such a policy is kept whole")
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    rank = int((values > NEGLIGIBLE * values[0]).sum())
    if rank == len(values):
        raise InputError(
            f"{name}: a difference of full rank {rank}, not an adapter's; such a policy is kept whole"
        )
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def _refine_row(policy, before):
    """Return the embedding of <REFINE>, (1, H); every other row must be the base's."""
    weight = policy.model.get_input_embeddings().weight.detach().float().cpu()
    name = _embedding_name(policy.model)
    changed = (weight != before[f"{name}.weight"]).any(dim=1).nonzero().flatten().tolist()
    if changed != [policy.refine_token_id]:
        raise InputError(
            f"{policy.name}: {len(changed)} rows of {name} were trained; such a policy is kept whole"
        )
    return weight[changed]


def _embedding_name(model):
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding)


def _config(base, ranks, token):
    """Return PEFT's settings: alpha equals rank, so that differences are added as they are.

    `revision` says which weights they were made from: those of a folder by digest, those of the hub by commit.
    """
    most = max(ranks.values())
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(ranks),
        trainable_token_indices=[token],
        base_model_name_or_path=base,
        revision=loading.version(base),
        inference_mode=True,
    )
