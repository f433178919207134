r"""A better query after a look at the wrong video: in soft tokens (SQR), or in words (HQR).

Soft query refinement. The policy has judged a video and closed its reply with <REFINE>. It goes on for N more steps,
but not in words: P turns its state at <REFINE> into a soft token z1, A turns z1 into its next input, P turns the state
there into z2, and so on. Through B, the N soft tokens stand in the query right after its last word, and the frozen
engine embeds the query once more:

    policy    prompt, video, reply,  <REFINE>  A(z1)  A(z2)  ...  A(z7)        one step of the KV cache each
                                        |        |      |           |
                                        P        P      P           P
                                        |        |      |           |
                                        z1       z2     z3   ...    z8

    engine    instruction, query,     B(z1)    B(z2)  B(z3)  ...  B(z8)   <|im_end|> ... <|endoftext|>
                                                                                               |
                                                                                       next query vector

Nothing is sampled on the way, so a loss on the query vector reaches P, A, B and the policy. Rollouts (no gradients) and
training (gradients) call the same functions. The definitions are in docs/method.md sections 3 and 11.
"""

import torch

from vsr1.config import InputError
from vsr1.models import decoding, policy, soft_heads

# --- soft ------------------------------------------------------------------------------------------------------------


def soft_tokens(
    policy: policy.Policy, branches: list[decoding.Context], n: int, noise=None, taken=None
) -> torch.Tensor:
    """Z (B, n, D) float32: n soft tokens of each of B replies, by n decoding steps.

    branches  all that was read before the last <REFINE> of each reply, from `policy.reply` or, for gradients, from
              `policy.replay`. <REFINE> itself is read here, what the reply said after it is not.
    noise     (B, n, D) added to each soft token before it is read on: soft tokens as a Gaussian policy's actions
    taken     (B, n, D) soft tokens to read on instead of these: those of a rollout, to find the means they came from

    The first soft token comes from the state before the final norm, the others from the state after it: odd, but
    official, and released weights need it. The last one is not read by the policy any more.
    """
    model, heads, context = policy.model, policy.heads, decoding.stack_contexts(branches)
    memory = decoding.inplace_cache(context)
    embeds = model.get_input_embeddings()(torch.full_like(context.last_position, policy.refine_token_id))[
        :, None
    ]  # (B, 1, H)
    tokens = [torch.zeros(len(branches), 0, heads.width, device=embeds.device)]
    for step in range(n):
        context, pre, post = decoding.extend(model, context, embeds, memory)
        state = pre if step == 0 else post
        tokens.append(
            heads.project(state) if noise is None else heads.project(state) + noise[:, step : step + 1]
        )  # (B, 1, D)
        embeds = heads.to_policy(tokens[-1] if taken is None else taken[:, step : step + 1]).to(embeds.dtype)
    return torch.cat(tokens, dim=1)


def soft_query(engine, heads: soft_heads.SoftHeads, texts: list[str], latents: torch.Tensor) -> torch.Tensor:
    """(B, D) unit vectors of queries with their soft tokens (B, N, D); N = 0 gives the plain queries."""
    return engine.pool(engine.text_batch(texts, heads.to_engine(latents)))


def stack_blocks(blocks: list[torch.Tensor], count: int) -> torch.Tensor:
    """(B, N, D): the soft tokens of the latest `count` turns, one block after the other, oldest first."""
    return torch.cat(blocks[-count:], dim=1)


def prefix_queries(
    engine, heads, texts: list[str], latents: torch.Tensor, carried=None, depths=None
) -> torch.Tensor:
    """(B, N + 1, D): query vectors with the first 0, 1, .. N soft tokens of one turn, after those `carried` to it.

    depths  only these numbers of soft tokens
    """
    before = latents[:, :0] if carried is None else carried
    depths = range(latents.shape[1] + 1) if depths is None else depths
    prefixes = [stack_blocks([before, latents[:, :depth]], 2) for depth in depths]
    return torch.stack([soft_query(engine, heads, texts, prefix) for prefix in prefixes], dim=1)


def check_fit(policy: policy.Policy, engine) -> None:
    """Soft tokens mean something to the engine they were trained for, and to no other."""
    made = policy.settings
    for what, ours, theirs in (
        ("width", policy.heads.width, engine.width),
        ("instruction", made.instruction, engine.instruction),
        ("max_query_tokens", made.max_query_tokens, engine.max_query_tokens),
    ):
        if ours != theirs:
            raise InputError(
                f"{policy.name}: its soft tokens are for an engine of {what} {ours!r}, but {engine.name} has "
                f"{theirs!r}; let the profile name an engine and a policy that belong together"
            )
