"""The heads that turn policy states into soft tokens, and the settings they were trained with."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vsr1.models import prompt_text


@dataclass(frozen=True)
class Settings:
    """What a checkpoint must say about how its soft queries were made; a default is the official code's value.

    The rest is the same in all: no gate, the first latent from the state at <REFINE> before the final norm, the soft
    tokens before the closing <|im_end|>, the last state as the vector.
    """

    system: str = prompt_text.SYSTEM  # the exact system prompt
    n_soft: int = 8
    carry_blocks: int = 1  # C: soft tokens of how many turns stand in a query
    instruction: str = "Represent the user's input."
    max_query_tokens: int = 128
    time_axis: Literal["true", "frame_index"] = "true"  # times shown: seconds as seen, or frame numbers
    refine_init: Literal["zero", "default", "scaled"] = "zero"


class SoftHeads(nn.Module):
    """The modules of soft query refinement, named as in the released checkpoints (docs/method.md section 3); float32.

    init   "zero": the last layer of the projector P starts at zero, as in the official code; "default": at the
           library's random values; "scaled" (ours): the same, and outputs of A and B are as long as token embeddings
    norms  mean lengths of the token embeddings of policy and engine, for "scaled"
    """

    def __init__(self, hidden: int, width: int, init: str = "zero", norms: tuple[float, float] | None = None):
        super().__init__()
        self.refine_projector = nn.Sequential(  # P: a state of the policy to a soft token
            nn.Linear(hidden, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)
        )
        self.refine_latent_input_projector = nn.Sequential(  # A: a soft token to the policy's next input
            nn.LayerNorm(width), nn.Linear(width, hidden)
        )
        self.refine_append_input_projector = nn.Sequential(  # B: a soft token to an input of the engine
            nn.LayerNorm(width), nn.Linear(width, width)
        )
        self.refine_gate = nn.Linear(hidden, 1).requires_grad_(False)  # official: saved, never used
        for linear in (self.refine_latent_input_projector[1], self.refine_append_input_projector[1]):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        for weight in self.refine_gate.parameters():
            nn.init.zeros_(weight)
        if init == "zero":
            for weight in self.refine_projector[3].parameters():
                nn.init.zeros_(weight)
        if init == "scaled":
            # A LayerNorm's output is sqrt(D) long: 10 to 18 token embeddings of the mini models.
            projectors = self.refine_latent_input_projector, self.refine_append_input_projector
            for projector, norm in zip(projectors, norms, strict=True):
                nn.init.constant_(projector[0].weight, norm / width**0.5)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Return soft tokens (..., D) from hidden states of the policy (..., H)."""
        return _in_float32(self.refine_projector, states)

    def to_policy(self, latents: torch.Tensor) -> torch.Tensor:
        """Return input embeddings of the policy (..., H) from soft tokens (..., D)."""
        return _in_float32(self.refine_latent_input_projector, latents)

    def to_engine(self, latents: torch.Tensor) -> torch.Tensor:
        """Return input embeddings of the engine (..., D) from soft tokens (..., D)."""
        return _in_float32(self.refine_append_input_projector, latents)

    @property
    def width(self) -> int:
        """D, the width of soft tokens and of the engine they are for."""
        return self.refine_projector[3].out_features


def _in_float32(module, values):
    """Run `module` in its own precision, float32, even where training runs under autocast."""
    with torch.autocast(values.device.type, enabled=False):
        return module(values.to(module[-1].weight.dtype))
