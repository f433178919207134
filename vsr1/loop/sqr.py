r"""Soft query refinement (SQR): a better query in soft tokens, after a wrong video was shown.

The policy has judged a video and closed its reply with <REFINE>. It goes on for N more steps, but not in words: P turns
its state at <REFINE> into a soft token z1, A turns z1 into its next input, P turns the state there into z2, and so on.
Through B, the N soft tokens stand in the query right after its last word, and the frozen engine embeds the query once
more:

    policy    prompt, video, reply,  <REFINE>  A(z1)  A(z2)  ...  A(z7)        one step of the KV cache each
                                        |        |      |           |
                                        P        P      P           P
                                        |        |      |           |
                                        z1       z2     z3   ...    z8

    engine    instruction, query,     B(z1)    B(z2)  B(z3)  ...  B(z8)   <|im_end|> ... <|endoftext|>
                                                                                               |
                                                                                       next query vector

P, A and B are `project`, `to_policy` and `to_engine` of the heads. Nothing is sampled on the way, so a loss on the
query vector reaches P, A, B and the policy. Rollouts (no gradients) and training (gradients) call the same functions.
The definition is docs/method.md section 3.
"""

import torch

from vsr1.config import InputError
from vsr1.models import decoding
from vsr1.models.policy import Policy
from vsr1.models.soft_heads import SoftHeads


def soft_tokens(
    policy: Policy, contexts: list[decoding.Context], n: int, noise=None, sampled=None
) -> torch.Tensor:
    """Decode n soft tokens for each of B replies: Z (B, n, D) float32.

    contexts  what was read before the last <REFINE> of each reply, from `policy.reply` or, for gradients, from
              `policy.replay`. <REFINE> itself is read here, what the reply said after it is not.
    noise     (B, n, D) added to each soft token before it is read on: soft tokens as a Gaussian policy's actions
    sampled   (B, n, D) soft tokens of a rollout, read on instead of these, to find the means they were drawn around

    The first soft token comes from the state before the final norm, the others from the state after it. This is odd,
    but official, and released weights need it. The last soft token is not read on.
    """
    model, heads, context = policy.model, policy.heads, decoding.stack_contexts(contexts)
    cache = decoding.inplace_cache(context)
    ids = torch.full_like(context.last_position, policy.refine_token_id)
    embeds = model.get_input_embeddings()(ids)[:, None]  # (B, 1, H)
    tokens = [torch.zeros(len(contexts), 0, heads.width, device=embeds.device)]
    for step in range(n):
        context, pre, post = decoding.extend(model, context, embeds, cache)
        token = heads.project(pre if step == 0 else post)  # (B, 1, D)
        tokens.append(token if noise is None else token + noise[:, step : step + 1])
        read = tokens[-1] if sampled is None else sampled[:, step : step + 1]
        embeds = heads.to_policy(read).to(embeds.dtype)
    return torch.cat(tokens, dim=1)


def soft_query(engine, heads: SoftHeads, texts: list[str], latents: torch.Tensor) -> torch.Tensor:
    """Embed queries with their soft tokens (B, N, D): unit vectors (B, D); N = 0 gives the plain queries."""
    return engine.soft_vecs(engine.read_queries(texts), heads.to_engine(latents))


def stack_blocks(blocks: list[torch.Tensor], count: int) -> torch.Tensor:
    """Join the soft tokens of the latest `count` turns, (B, N, D) each, oldest first: (B, up to count * N, D)."""
    return torch.cat(blocks[-count:], dim=1)


def prefix_queries(
    engine, heads, texts: list[str], latents: torch.Tensor, carried=None, depths=None
) -> torch.Tensor:
    """Embed queries with the first 0, 1, .. N soft tokens of one turn, after those `carried` to it: (B, N + 1, D).

    depths  only these numbers of soft tokens
    """
    before = latents[:, :0] if carried is None else carried
    depths = range(latents.shape[1] + 1) if depths is None else depths
    prefixes = [torch.cat([before, latents[:, :depth]], dim=1) for depth in depths]
    queries = engine.read_queries(texts)
    return torch.stack([engine.soft_vecs(queries, heads.to_engine(prefix)) for prefix in prefixes], dim=1)


def check_fit(policy: Policy, engine) -> None:
    """Raise InputError unless the policy's soft tokens were trained for an engine like this one."""
    settings = policy.settings
    for name, trained_for, actual in (
        ("width", policy.heads.width, engine.width),
        ("instruction", settings.instruction, engine.instruction),
        ("max_query_tokens", settings.max_query_tokens, engine.max_query_tokens),
    ):
        if trained_for != actual:
            raise InputError(
                f"{policy.name}: its soft tokens are for an engine of {name} {trained_for!r}, but {engine.name} has "
                f"{actual!r}; let the profile name an engine and a policy that belong together"
            )
