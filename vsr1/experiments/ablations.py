"""Ablate stages, rewards, soft tokens, turns and engines (notebook 07), and run studies beyond the paper.

A variant is the profile with a few knobs changed; what it computes lies in variants/<variant>, and it shares corpus,
vectors and all that it does not change with the main run. `make ablations` runs what would take too long for
`make paper`; its results are committed:

results/<profile>/ablations/<dataset>.json     tables B1 to B4, read by `results.collect` like any other part
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from vsr1.config import ABLATED, Profile
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common, gallery_growth, retry
from vsr1.loop.records import Episode
from vsr1.report import results
from vsr1.training import grpo, sft

PARTS = ("vcmr@0.5", "vr@1", "ver")  # columns of T2


@dataclass(frozen=True)
class Variant:
    """The main run with something changed in one stage of training; published.yaml has the words."""

    knobs: dict = field(default_factory=dict)
    # Of stage 2. "sft-more": stage 1 is continued in its place; "sft": stage 1 alone is trained again, and is compared
    # with stage 1.
    recipe: str = "vsr1"

    @property
    def baseline(self) -> str:
        """Return the system of the main run that the variant is compared with."""
        return "sft" if self.recipe == "sft" else "vsr1"


WIDE = {"grpo_prompts_per_step": 32, "grpo_lr": 1.5e-3}
CALM = WIDE | {"grpo_lr": 6e-4, "grpo_steps": 45}  # as far in all, in smaller steps
REWARDS = {  # T2
    "no-ret": Variant({"disabled_rewards": ("retrieval",)}),
    "no-verif": Variant({"disabled_rewards": ("verification",)}),
}
LONGER = {  # B1
    "no-time": Variant({"disabled_rewards": ("grounding",)}),
    # Each of both pays right verdicts only.
    "no-right": Variant({"disabled_rewards": ("verification", "grounding")}),
    "no-form": Variant({"disabled_rewards": ("format", "refine_token")}),
    "delta": Variant({"retrieval_reward": "delta"}),
    "gdpo": Variant({"grpo_advantages": "gdpo"}),
    # Controls: a policy that moves as far for no reason, and stage 1 continued on the prompts of stage 2.
    "shuffled": Variant({"shuffle_advantages": True}),
    "sft-more": Variant(recipe="sft-more"),
    # What stage 2 might do with more of it: of its steps, and of the gradient that teaches it to search.
    "long": Variant({"grpo_steps": 60}),
    "infonce": Variant({"grpo_infonce_weight": 0.1}),
    # Longer steps, with less noise in each, and their control.
    "wide": Variant(WIDE),
    "wide-shuffled": Variant(WIDE | {"shuffle_advantages": True}),
    "single": Variant(recipe="vsr1-single"),
    "m1": Variant(recipe="m1"),
    "m3": Variant(recipe="m3"),
    # Its soft tokens learn from rewards, not beside them.
    "gauss": Variant({"grpo_infonce_weight": 1.0}, "gauss"),
    "filter": Variant({"ambiguity_filter": 0.0005}, "sft"),
    **{f"n{n}": Variant({"n_soft": n}, "sft") for n in (1, 2, 4)},
}
CALMER = {  # B4: stage 2 with more of it, and the controls "shuffled" and "sft-more" with as much
    "calm": Variant(CALM),
    "calm-shuffled": Variant(CALM | {"shuffle_advantages": True}),
    "calm-sft": Variant(CALM, "sft-more"),
}


def run_variant(profile: Profile, dataset: str, name: str) -> list[Episode]:
    """Train a variant unless it is current, and return its test episodes."""
    variant = (REWARDS | LONGER | CALMER)[name]
    changed = profile.with_overrides(name, **variant.knobs)
    if variant.recipe == "sft":
        weights = sft.train(changed, dataset)
    elif variant.recipe == "sft-more":
        weights = grpo.continue_sft(changed, dataset, sft.train(profile, dataset))
    else:
        weights = grpo.train(changed, dataset, variant.recipe, stage_1=sft.train(profile, dataset))
    return common.run_episodes(changed, dataset, name, like="sqr", weights=str(weights))


def main_runs(profile: Profile, dataset: str) -> dict[str, list[Episode]]:
    """Return the episodes of the base model (one turn), stage 1 and both stages: what variants are compared with."""
    zero_shot = metrics.within(common.run_episodes(profile, dataset, "walkdown"), 1)
    trained = {name: common.run_episodes(profile, dataset, name) for name in ("sft", "vsr1")}
    return {"zs": zero_shot} | trained


def stages_and_rewards(profile: Profile) -> dict[str, Estimate]:
    """Measure what each stage adds, and what stage 2 loses without a reward (T2).

    The gradient of InfoNCE stays in all of them.
    """
    runs = main_runs(profile, ABLATED) | {name: run_variant(profile, ABLATED, name) for name in REWARDS}
    numbers = {}
    for name, episodes in runs.items():
        numbers |= common.estimate_metrics(profile, f"T2/{ABLATED}/{name}", episodes, PARTS)
    return numbers


def soft_token_depths(profile: Profile, dataset: str, episodes: list[Episode]) -> dict[str, Estimate]:
    """Measure R@1 with the first d latents of the first refinement (F4): prefixes of one model, not a model per d.

    Of all queries, of those that refined at turn 1, and of the latter those whose first search failed. The paper's
    curve begins at 23.3, near its R@1 of all queries of one data set (21.6); those that a good verdict sends on begin
    near 0.
    """
    refined = [e for e in episodes if e.turns and e.turns[0].rank_by_depth]
    groups = {"vsr1": episodes, "vsr1-refined": refined, "vsr1-failed": metrics.failed(refined)}
    numbers = {}
    for system, chosen in groups.items():
        for depth in range(profile.n_soft + 1):
            hits = metrics.ranks_at_depth(chosen, lambda _: depth) == 1  # noqa: B023
            numbers[f"F4/{dataset}/{system}/d{depth}"] = common.estimate(profile, chosen, hits)
    return numbers


def run_retries(profile: Profile, dataset: str, system: str, which: str = "engine") -> list[Episode]:
    """Run one system of the retry study: with the policy after both stages for "sqr", with the base policy for HQR."""
    weights = str(grpo.train(profile, dataset)) if system == "sqr" else None
    return retry.run_retries(profile, dataset, system, weights, which)


def retry_numbers(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """Measure R@k after one refinement, the median change of rank (above 0: better) and the share worse (A2)."""
    numbers = {}
    shared_ids = sorted(set.intersection(*({e.desc_id for e in episodes} for episodes in runs.values())))
    for key, episodes in runs.items():
        size, system = key.split("/")
        after, before = metrics.true_ranks(episodes), metrics.true_ranks(episodes, "orig")
        values = {f"vr@{k}": after <= k for k in (1, 5, 10)} | {"worse": after > before}
        row = {name: common.estimate(profile, episodes, hits) for name, hits in values.items()}
        row["change"] = Estimate(float(np.median(before - after)), len(episodes), unit="ranks")
        shared = common.select(episodes, shared_ids)
        row["vr@1_both"] = common.estimate(profile, shared, metrics.vr_hits(shared, 1))
        numbers |= {f"A2/{dataset}/{system}/{name}_{size}": number for name, number in row.items()}
    return numbers


# --- Beyond the paper: `make ablations`


def run(profile: Profile, dataset: str) -> Iterator[str]:
    """Run the longer studies of one data set, one after the other; yield the name of each when it is recorded."""
    for study in (longer_turns, gallery_growth.gallery_numbers, calmer_steps):
        common.record_committed(profile, dataset, study(profile, dataset), "ablations")
        yield study.__name__
    for name in LONGER if dataset == ABLATED else ():
        common.record_committed(profile, dataset, variant_numbers(profile, name), "ablations")
        yield name


def variant_numbers(profile: Profile, name: str) -> dict[str, Estimate]:
    """Measure a variant, and how far it is ahead of the main run after the same stage (B1)."""
    base = LONGER[name].baseline
    main, variant = main_runs(profile, ABLATED)[base], run_variant(profile, ABLATED, name)
    numbers = common.estimate_metrics(profile, f"B1/{ABLATED}/{base}", main, PARTS)
    numbers |= common.estimate_metrics(profile, f"B1/{ABLATED}/{name}", variant, PARTS)
    lead = _lead(profile, variant, main)
    return numbers | {f"B1/{ABLATED}/{name}/{metric}_ahead": number for metric, number in lead.items()}


def calmer_steps(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Measure stage 2 with calmer steps, and how far it is ahead of the main run and of its controls (B4)."""
    runs = main_runs(profile, dataset) | {name: run_variant(profile, dataset, name) for name in CALMER}
    numbers = {}
    for system in ("sft", "vsr1", *CALMER):
        numbers |= common.estimate_metrics(profile, f"B4/{dataset}/{system}", runs[system], PARTS)
        if system != "calm":
            lead = _lead(profile, runs["calm"], runs[system])
            numbers |= {f"B4/{dataset}/{system}/{metric}_calm": number for metric, number in lead.items()}
    return numbers


def _lead(profile, episodes, others):
    """Return {metric: how far a run is ahead of another of the same queries}, in points."""
    hits, other_hits = metrics.hits(episodes), metrics.hits(others)
    families = common.clusters(profile, episodes)
    return {m: statistics.difference(hits[m], other_hits[m], families, profile) for m in PARTS}


def longer_turns(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """Measure up to four turns, and what happens where rejected videos are not shown again (B2)."""
    weights, runs = str(grpo.train(profile, dataset)), {}
    for name, rule in {"turns4": profile.display_rule, "turns4-skip": "skip_rejected"}.items():
        changed = profile.with_overrides(name, max_turns=4, display_rule=rule)
        runs[name] = common.run_episodes(changed, dataset, "vsr1", whole=True, like="sqr", weights=weights)
    numbers = common.turn_budgets(profile, "B2", dataset, runs)
    shown = results.layouts()["B2"]["metrics"]
    return {name: number for name, number in numbers.items() if name.split("/")[-1] in shown}
