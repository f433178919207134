"""Arrange what training did: curves, initial ranges and numbers on validation queries (notebooks 03 and 04)."""

import json
from pathlib import Path

import numpy as np
import torch

from vsr1.config import Profile
from vsr1.data import annotations
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import common
from vsr1.loop.records import Episode
from vsr1.models import search_index
from vsr1.training import grpo, sft

# Names of reward parts in numbers.json, which committed results have, by those in logs.
RECORDED = {
    "verification": "verify",
    "format": "form",
    "refine_token": "refine",
    "grounding": "time",
    "retrieval": "retrieve",
}
SMOOTHED = 9  # steps


def read_log(folder: Path, name: str = "log") -> list[dict]:
    """Read a log of a training run, one dict a line."""
    # Replies hold other line breaks.
    with open(folder / f"{name}.jsonl", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def smoothed(row: str, log: list[dict], keys) -> dict[str, list]:
    """Return {<row>/<key>: [[step, mean of the latest SMOOTHED values], ..]}; steps without a value are left out.

    row  <table>/<data set>/<system>
    """
    series = {}
    for key in keys:
        points = [(line["step"], line[key]) for line in log if line[key] is not None]
        values = [value for _, value in points]
        series[f"{row}/{RECORDED.get(key, key)}"] = [
            [step, float(np.mean(values[max(0, n - SMOOTHED) : n]))] for n, (step, _) in enumerate(points, 1)
        ]
    return series


# --- Stage 1


def infonce_range(
    profile: Profile, vectors: search_index.Vectors, queries: list[annotations.Query]
) -> dict[str, float]:
    """Compute InfoNCE over the train gallery (nats, mean): of chance, of original queries, of the right videos."""
    queries = [query for query in queries if vectors.has_video(query.video)]
    right = torch.from_numpy(vectors.columns([query.video for query in queries]))
    gallery = torch.from_numpy(vectors.video_vecs)
    original = torch.from_numpy(vectors.vecs_of([query.id for query in queries]))

    def loss(vecs):
        scores = vecs @ gallery.T / profile.infonce_temperature
        return torch.nn.functional.cross_entropy(scores, right).item()

    return {
        "chance": float(np.log(len(vectors.video_ids))),
        "original query": loss(original),
        "right video's own vector": loss(gallery[right]),
    }


VALIDATION = ("ver", "ver_turn1", "vcmr@0.5", "vr@1_orig", "vr@1", "vr@1_failed")


def run_validation(profile: Profile, dataset: str, name: str) -> list[Episode]:
    """Run the base model "zs", stage 1 "sft" or both stages "vsr1" on train queries that nothing was learned from."""
    stage = {"sft": sft, "vsr1": grpo}.get(name)
    options = {"like": "sqr", "weights": str(stage.train(profile, dataset))} if stage else {"like": "zs"}
    count = profile.studies.sample_queries
    return common.run_episodes(profile, dataset, f"{name}-held", split="held", count=count, **options)


def validation_numbers(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """Measure systems on train queries that nothing was learned from (E1)."""
    numbers = {}
    for system, episodes in runs.items():
        numbers |= common.estimate_metrics(profile, f"E1/{dataset}/{system}", episodes, VALIDATION)
    return numbers


# --- Stage 2


def varied_group(folder: Path) -> tuple[int, list[dict]]:
    """Return (step, rows) of the last first-turn group with unequal rewards; of the last one if there is none."""
    groups = [(line["step"], [r for r in line["rows"] if r["t"] == 1]) for line in read_log(folder, "groups")]
    varied = [(step, rows) for step, rows in groups if len({round(row["reward"], 3) for row in rows}) > 1]
    return (varied or groups)[-1]


def share_numbers(dataset: str, log: list[dict]) -> dict[str, Estimate]:
    """Measure which share of the variance of advantages each component of the reward carries, mean over steps (E2)."""
    steps, numbers = [line["shares"] for line in log if line["shares"]], {}
    for key in steps[0] if steps else ():
        percent = 100 * float(np.mean([shares[key] for shares in steps]))
        numbers[f"E2/{dataset}/vsr1/share_{RECORDED[key]}"] = Estimate(percent, len(steps), unit="%")
    return numbers


REWARDS = ("reward", *RECORDED, "right_shown", "length")


def reward_numbers(dataset: str, log: list[dict]) -> dict[str, Estimate]:
    """Measure what the policy earns on validation prompts before and after stage 2 (E2); {} without any."""
    if not log:
        return {}
    ends = {"sft": log[0], "vsr1": log[-1]}
    return {
        f"E2/{dataset}/{system}/{RECORDED.get(key, key)}": Estimate(line[key], line["rows"], unit="")
        for system, line in ends.items()
        for key in REWARDS
    }
