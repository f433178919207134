"""The objective of stage 2: the clipped policy gradient with a KL term, and what soft tokens learn beside it."""

from collections import Counter

import torch
from torch import nn

from vsr1.loop import sqr
from vsr1.models.policy import Policy
from vsr1.training.rollout import RolloutStep, RolloutWorker


def policy_loss(logps, old_logps, ref_logps, advantages, completion_mask, *, clip: float, beta: float):
    """Return (loss, KL, fraction of clipped tokens), (B,) each: the mean over a reply's tokens.

    logps            (B, L)  under the weights being trained
    old_logps        (B, L)  under those that sampled; no gradient
    ref_logps        (B, L)  under the policy that stage 1 left; no gradient
    advantages       (B,)
    completion_mask  (B, L)  True on sampled tokens

    Clipped policy gradient plus beta times the k3 estimate of the KL to the reference (docs/method.md section 6).
    """
    assert not (old_logps.requires_grad or ref_logps.requires_grad)
    ratio = torch.exp((logps - old_logps).masked_fill(~completion_mask, 0))
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    log_ratio = (ref_logps - logps).masked_fill(~completion_mask, 0)
    kl = torch.exp(log_ratio) - log_ratio - 1
    is_clipped = (clipped * advantages[:, None] < ratio * advantages[:, None]).float()
    mean = lambda values: (values * completion_mask).sum(dim=1) / completion_mask.sum(dim=1)  # noqa: E731
    return mean(beta * kl - gain), mean(kl.detach()), mean(is_clipped)


class Objective(nn.Module):
    """The loss of rollout steps as one module, which accelerate can wrap for several processes."""

    def __init__(self, worker: RolloutWorker, ref_policy: Policy):
        super().__init__()
        self.model, self.heads = worker.policy.model, worker.policy.heads
        self.policy, self.worker, self.ref_policy = worker.policy, worker, ref_policy

    def forward(self, steps: list[RolloutStep], totals: tuple[int, int]):
        """Return (loss, sums for the log) of some steps of an update; replies to one prompt share its reading.

        totals  of the update over all processes: steps, and steps with soft tokens
        """
        if not steps:  # of this process; the others wait for its share of the gradient
            weight = next(weight for weight in self.parameters() if weight.requires_grad)
            return 0.0 * weight.sum(), {}
        steps = sorted(steps, key=lambda step: (step.query.group, step.shown, step.t))
        replay, ref_logps = self._replay(steps)
        old_logps = [torch.tensor(step.old_logps) for step in steps]
        losses, kl, clip_frac = policy_loss(
            replay.logps,
            nn.utils.rnn.pad_sequence(old_logps, batch_first=True).to(ref_logps),
            ref_logps,
            torch.tensor([step.advantage for step in steps]).to(ref_logps),
            replay.completion_mask,
            clip=self.worker.knobs.grpo_clip,
            beta=self.worker.knobs.grpo_beta,
        )
        loss, info_nce = losses.sum() / totals[0], 0.0
        if self.worker.variant.latents != "frozen":
            latent_loss, info_nce = self._latent_loss(steps, replay.refine_contexts)
            loss = loss + self.worker.knobs.grpo_infonce_weight * latent_loss / max(1, totals[1])
        return loss, {"kl": float(kl.sum()), "clip_frac": float(clip_frac.sum()), "info_nce": info_nce}

    def _replay(self, steps):
        """Return (replies read once more with gradients, their log-probs (B, L) under the reference policy)."""
        counts = Counter(id(step.prompt) for step in steps)
        prompts = list({id(step.prompt): step.prompt for step in steps}.values())
        replies = [step.ids for step in steps]
        options = {"group": list(counts.values()), "temperature": self.worker.knobs.rollout_temperature}
        replay = self.policy.replay(prompts, replies, **options)
        with torch.no_grad(), self.ref_policy.adapters_disabled():
            ref_logps = self.ref_policy.replay(prompts, replies, **options).logps
        return replay, ref_logps

    def _latent_loss(self, steps, contexts):
        """Return (sum of what soft tokens learn from, sum of InfoNCE in it) of the steps that said <REFINE>."""
        total, info_nce, worker = 0.0, 0.0, self.worker
        for depth in sorted({len(step.earlier_latents) for step in steps}):
            rows = [
                r for r, s in enumerate(steps) if s.latents is not None and len(s.earlier_latents) == depth
            ]
            if not rows:
                continue
            turn_steps, turn_contexts = [steps[row] for row in rows], [contexts[row] for row in rows]
            if worker.variant.latents == "gauss":
                total = total - self._gaussian_gain(turn_steps, turn_contexts)
                continue
            latents = sqr.soft_tokens(self.policy, turn_contexts, len(turn_steps[0].latents))
            vecs = worker.query_vecs(turn_steps, latents)
            losses = worker.infonce_losses(vecs, turn_steps, all_videos=True)
            total, info_nce = total + losses.sum(), info_nce + float(losses.detach().sum())
        return total, info_nce

    def _gaussian_gain(self, steps, contexts):
        """Return the policy gain of noisy soft tokens: they are the action, stood in the query, and were read on."""
        sampled = torch.stack([step.latents for step in steps])  # (B, N, D)
        means = sqr.soft_tokens(self.policy, contexts, sampled.shape[1], sampled=sampled)
        logp = -((sampled - means) ** 2).sum(dim=(1, 2)) / (2 * self.worker.knobs.latent_noise_std**2)
        # One update a rollout: the ratio is one, but not its gradient.
        ratio = torch.exp(logp - logp.detach())
        return (ratio * torch.tensor([step.advantage for step in steps]).to(ratio)).sum()
