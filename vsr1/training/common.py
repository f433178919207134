"""What both training stages share: InfoNCE, LoRA, float32 weights for what learns."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from transformers.integrations import is_tensorboard_available

from vsr1.config import InputError
from vsr1.models import policy, prompt_text

LORA_SCALE = 2  # ours: alpha over rank, how much an adapter's output counts


# --- the losses ------------------------------------------------------------------------------------------------------


def info_nce(query_vecs, right_vecs, wrong_vecs, tau: float) -> torch.Tensor:
    """(B,) losses of query vectors (B, D) against one right (B, D) and K wrong videos (B, K, D); unit vectors.

    exp(-loss) is the softmax probability of the right video: the retrieval reward of stage 2 (METHOD.md 6.1).
    """
    videos = torch.cat([right_vecs[:, None], wrong_vecs], dim=1)  # (B, 1 + K, D)
    logits = torch.einsum("bd,bkd->bk", query_vecs, videos) / tau
    return F.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device), reduction="none"
    )


def add_lora(agent: policy.Policy, rank: int, seed: int, mergers=False) -> None:
    """Adapters (LoRA) for the language model's linear layers and, if told, the mergers'; nothing else of it learns on.

    Except the row of <REFINE>: it is new, and the mean of the others. Its logit would stay the mean of theirs, and a
    mean is never the largest. The heads are no part of the model and learn in full.
    """
    where = r".*language_model\.layers\..*_proj" + r"|.*merger.*linear_fc\d" * mergers
    rows = None if agent.refine_token_id is None else [agent.refine_token_id]
    if rows and not agent.model.config.tie_word_embeddings:
        raise InputError(
            f"{agent.name}: the output row of {prompt_text.REFINE} is not tied to its embedding and would not learn; "
            "set lora_rank: 0"
        )
    config = LoraConfig(
        r=rank, lora_alpha=LORA_SCALE * rank, target_modules=where, trainable_token_indices=rows
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent.adapters = LoraModel(agent.model, config, "default")  # in place: the model stays `agent.model`
    if rows:
        agent.model.lm_head.bias = None  # TRL asks for it, and peft's stand-in has none


def upcast_trainable(weights) -> None:
    """float32 for those of `weights` that learn: a step of an optimizer is mostly lost in bfloat16."""
    for weight in weights:
        if weight.requires_grad:
            weight.data = weight.data.float()


def need_tensorboard() -> None:
    """TensorBoard is no part of the pinned set: whoever asks for it installs it."""
    if not is_tensorboard_available():
        raise InputError(
            "tensorboard: true, but the package tensorboard is missing; install it or remove the knob"
        )
