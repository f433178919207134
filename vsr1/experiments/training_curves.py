"""What notebooks 03 and 04 show of training: rows, ranges, curves, one group in full, and what was gained by it."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.evaluation import metrics
from vsr1.experiments import refinement
from vsr1.loop.records import Episode
from vsr1.models import engine, policy, prompt_text, search_index, soft_heads
from vsr1.report import plots
from vsr1.report.results import Estimate
from vsr1.training import rollout, sft_examples

MOMENTS = (*(f"vcmr@{m}" for m in metrics.THRESHOLDS), "ver")


# Names of reward parts in recorded numbers, which committed results have, by those in logs.
RECORDED = {
    "verification": "verify",
    "format": "form",
    "refine_token": "refine",
    "grounding": "time",
    "retrieval": "retrieve",
}


def lines(folder: Path, name: str = "log") -> list[dict]:
    """A log of a training run, one dict a line."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def series(table: str, dataset: str, system: str, log: list[dict], keys, width: int = 9) -> dict[str, list]:
    """{name: [[step, mean of the latest `width` steps], ..]} of keys of a log; steps without a value are left out."""
    found = {}
    for key in keys:
        points = [(line["step"], line[key]) for line in log if line[key] is not None]
        steps, values = zip(*points, strict=True) if points else ((), ())
        means = [float(np.mean(values[max(0, at + 1 - width) : at + 1])) for at in range(len(values))]
        found[f"{table}/{dataset}/{system}/{RECORDED.get(key, key)}"] = [
            list(pair) for pair in zip(steps, means, strict=True)
        ]
    return found


# --- 03


def counts(rows: list[sft_examples.SFTExample]) -> pd.DataFrame:
    """How many rows there are of each kind."""
    kinds = [("video seen" if r.caption is None else "video told in words", r.shown == r.right) for r in rows]
    table = pd.DataFrame(kinds, columns=["learned from", "right"])
    named = table.right.map({True: "matched", False: "not_matched"})
    return pd.crosstab(table["learned from"], named.rename("the reply says"))


def example(rows: list[sft_examples.SFTExample], matched: bool) -> sft_examples.SFTExample:
    """The row with the smallest query id that sees a video, of those to be accepted or of those to be rejected."""
    seen = [row for row in rows if row.caption is None and (row.shown == row.right) == matched]
    return min(seen, key=lambda row: row.desc_id)


def row_text(row: sft_examples.SFTExample) -> str:
    """A row in words."""
    shown = f"shown: {row.shown} ({'right' if row.shown == row.right else f'wrong; right is {row.right}'})"
    shown = shown if row.caption is None else f"told: {row.caption}"
    reply = textwrap.fill(f"{row.reply} {prompt_text.REFINE}", 116, subsequent_indent="  ")
    return f"query {row.desc_id}: {row.query}\n{shown}\nreply: {reply}"


def wrong_strips(profile: Profile, dataset: str, vectors, row: sft_examples.SFTExample) -> list[plots.Strip]:
    """The right video of a row, and the three wrong ones that rank highest: what InfoNCE holds apart."""
    scores = vectors.scores(vectors.query_vec(row.desc_id))
    order = [vectors.video_ids[column] for column in np.argsort(-scores, kind="stable")]
    wrong = [video for video in order if video != row.right][:3]
    strips, folder = [], profile.data_dir(dataset) / "videos"
    with video_reader.Reader(profile.video_fps, profile.max_frames) as reader:
        for video in (row.right, *wrong):
            clip = reader.read(annotations.find_videos(folder, [video])[0].path)
            kind = "right" if video == row.right else "wrong"
            caption = f"{kind}, rank {order.index(video) + 1}: {video}"
            caption += f" for: {row.query}" if video == row.right else ""
            strips.append(plots.Strip(clip.frames, clip.timestamps, caption))
    return strips


def reach(
    profile: Profile, vectors: search_index.Vectors, queries: list[annotations.Query]
) -> dict[str, float]:
    """InfoNCE over the train gallery (nats, mean): of a query that knows nothing, as typed, and of the right video."""
    queries = [query for query in queries if vectors.has_video(query.video)]
    right = torch.from_numpy(vectors.columns([query.video for query in queries]))
    gallery_vecs = torch.from_numpy(vectors.video_vecs)
    typed = torch.from_numpy(vectors.vecs_of([query.id for query in queries]))
    loss = lambda vecs: torch.nn.functional.cross_entropy(
        vecs @ gallery_vecs.T / profile.infonce_temperature, right
    ).item()  # noqa: E731
    chance = float(np.log(len(vectors.video_ids)))
    return {
        "chance": chance,
        "query as typed": loss(typed),
        "right video's own vector": loss(gallery_vecs[right]),
    }


def lengths(profile: Profile, made: engine.Engine, agent: policy.Policy) -> pd.DataFrame:
    """What a soft token is as long as, where it enters engine and policy, beside a word of theirs."""
    rows, words = {}, (policy.mean_embedding_norm(made), policy.mean_embedding_norm(agent))
    some = torch.randn(256, made.width, generator=torch.manual_seed(profile.seed))
    for init in ("zero", "default", "scaled"):
        heads = soft_heads.SoftHeads(
            agent.model.config.text_config.hidden_size, made.width, init, words[::-1]
        )
        with torch.no_grad():
            own = [head(some).norm(dim=-1).mean().item() for head in (heads.B, heads.A)]
        rows[f"soft token, {init}"] = own
    return pd.DataFrame({"word": list(words)} | rows, ["in the engine", "in the policy"]).T.round(2)


# --- 04


def group_text(rows: list[dict]) -> str:
    """All turns of one group that saw the same query and video: replies, parts of the reward, advantages."""
    first = rows[0]
    told = [f"query: {first['query']}\nshown: {first['shown']} ({'right' if first['right'] else 'wrong'})"]
    for row in rows:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["parts"].items())
        said = textwrap.fill(row["text"], 116, initial_indent="  ", subsequent_indent="  ")
        gain = "none" if row["advantage"] is None else f"{row['advantage']:+.2f}"
        told.append(f"{row['member']}: reward {row['reward']:.2f} ({parts}), advantage {gain}\n{said}")
    return "\n".join(told)


def telling_group(folder: Path) -> tuple[int, list[dict]]:
    """(step, rows) of the last first-turn group whose members earned differently; of the last one if none did."""
    groups = [(line["step"], [r for r in line["rows"] if r["t"] == 1]) for line in lines(folder, "groups")]
    spread = [(step, rows) for step, rows in groups if len({round(row["reward"], 3) for row in rows}) > 1]
    return (spread or groups)[-1]


REWARDS = ("reward", *RECORDED, "right_shown", "length")


def held_numbers(dataset: str, name: str, held: list[dict]) -> dict[str, Estimate]:
    """E2: what the policy earns on prompts it never learns from, before stage 2 and after it; {} without any."""
    if not held:
        return {}
    ends = {"sft": held[0], name: held[-1]}
    return {
        f"E2/{dataset}/{system}/{RECORDED.get(key, key)}": Estimate(line[key], line["rows"], unit="")
        for system, line in ends.items()
        for key in REWARDS
    }


def gains(profile: Profile, pairs: dict[str, tuple[list[Episode], list[Episode], str]]) -> pd.DataFrame:
    """Is one system better than another? {words: (ours, theirs, metric)} over the same queries, paired.

    Each a `study.difference`. `vr@1_orig` of the second is its first search.
    """
    rows = {}
    for words, (ours, theirs, metric) in pairs.items():
        assert [one.desc_id for one in ours] == [one.desc_id for one in theirs]
        mine = metrics.hits(ours, profile.vr_ks)[metric.removesuffix("_orig")]
        other = metrics.hits(theirs, profile.vr_ks)[metric]
        rows[words] = refinement.difference(profile, mine, other, [one.gt_video for one in ours])
    return pd.DataFrame(rows).T


def start_counts(starts: list[rollout.RolloutPrompt]) -> pd.Series:
    """What a first look of stage 2 is at."""
    right = sum(start.first_video == start.video for start in starts)
    return pd.Series({"right video": right, "wrong video": len(starts) - right}, name="starts")


def test_rows(profile: Profile, dataset: str, system: str, walked: list[Episode]) -> dict[str, Estimate]:
    """T1 of one system: moments, verdicts, and its rankings."""
    names = [*MOMENTS, *(f"vr@{k}" for k in profile.vr_ks)]
    return refinement.loop_numbers(profile, dataset, system, walked, names)


HELD = ("ver", "ver_turn1", "vcmr@0.5", "vr@1_orig", "vr@1", "vr@1_failed")


def held_out(profile: Profile, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """E1: systems on train queries that nothing was learned from."""
    numbers = {}
    for system, walked in runs.items():
        found = metrics.hits(walked, profile.vr_ks)
        for name in HELD:
            chosen = metrics.failed(walked) if name == "vr@1_failed" else walked
            numbers[f"E1/{dataset}/{system}/{name}"] = refinement.share(profile, chosen, found[name])
    return numbers
