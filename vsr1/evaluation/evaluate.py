"""Evaluate one system on one data set: the step that leaves the episodes that all tables are computed from.

runs/<profile>/<dataset>/episodes/<system>.jsonl      read it with `records.read_episodes`
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vsr1 import cache
from vsr1.evaluation import released_gallery, run_batches
from vsr1.loop import records, runner
from vsr1.models import checkpoints, embedding, loading
from vsr1.training import grpo, query_adapters, rollout, sft


@dataclass(frozen=True)
class Recipe:
    """What a system with weights of its own is made of."""

    like: str  # what happens after a verdict: a name of `runner.SYSTEMS`
    policy: str | None = None  # one of STAGE_1 or a variant of stage 2; None: the profile's policy
    first: str | None = None  # how its first ranking is made, one of `query_adapters.FIRST`; None: as typed
    turns: int | None = None  # videos that it shows at most; None: the profile's
    looks: str | None = None  # system with the same policy, whose looks are not taken again


STAGE_1 = ("sft", "ft", "hqr")
# {policy: the system of `make paper` that looks at most videos with it}
LOOKED = {"sft": "sft", "ft": "walkdown-ft", "vsr1": "skip"}
RECIPES = {
    "sft": Recipe("sqr", "sft"),
    "walkdown-ft": Recipe("walkdown", "ft"),
    **{name: Recipe("sqr", name) for name in rollout.VARIANTS},
    # Baselines without a loop (docs/premise.md): the same policies, the first ranking made another way.
    **{f"{name}-walkdown": Recipe("walkdown", name, looks=LOOKED[name]) for name in ("sft", "vsr1")},
    **{
        f"{first}-{name}": Recipe("walkdown", name, first, looks=LOOKED[name])
        for first in query_adapters.FIRST
        for name in ("ft", "vsr1")
    },
    **{f"rocchio-{name}": Recipe("rocchio", name, looks=LOOKED[name]) for name in ("ft", "vsr1")},
    **{f"rerank-10-{name}": Recipe("rerank", name, turns=10, looks=LOOKED[name]) for name in ("ft", "vsr1")},
    # Soft tokens of all turns stay in the query.
    **{f"{name}-all": Recipe("sqr-all", name) for name in ("sft", "vsr1")},
    # In words: learns from the rows of stage 1, in as many steps, to write what the engine ranks best.
    "hqr-trained": Recipe("hqr-reasoned", "hqr"),
    # Beyond the paper: soft tokens before the first search, then the loop, which shows no video twice.
    "vsr1-first": Recipe("sqr-skip", "vsr1", "vsr1"),
    "skip": Recipe("sqr-skip", "vsr1"),  # the loop alone, which shows no video twice
}
RELEASED = {"sft-released": 1, "vsr1-released": 2}  # the stage whose checkpoint the authors released
KNOBS = ("video_fps", "max_frames", "max_frame_pixels", "max_new_tokens", "dtype", "eval_batch")
HEAD_KNOBS = ("n_soft", "refine_init", "carry_blocks")  # of new heads; trained ones bring their own settings


def run_system(
    profile,
    dataset: str,
    name: str,
    *,
    like: str | None = None,
    weights: str | None = None,
    count: int | None = None,
    split: Literal["test", "held"] = "test",
    gallery: Path | None = None,
) -> Path:
    """Return the file of episodes of one system on one split; run now if it is not current, resumed after a kill.

    What it rests on is made current first: corpus, vectors, the weights and the first ranking of a trained system.

    like     name in SYSTEMS, where `name` is neither there nor in RECIPES
    weights  folder or hub name of its policy; None: those of `trained_weights`, else the profile's policy
    count    how many queries, spread evenly over the split; None: all
    split    "held": the train queries that nothing is learned from, in the train gallery
    gallery  step with the vectors of another gallery for the same queries, whose name the file bears; None: the split's
    """
    vectors = gallery or (released_gallery.find(profile, dataset) if name in RELEASED else None)
    vectors = vectors or embedding.embed_corpus(profile, dataset, run_batches.SPLITS[split])
    recipe = Recipe(like or name)
    if weights is None and like is None:
        recipe = RECIPES.get(name, recipe)
        like, weights = trained_weights(profile, dataset, name)
    system = runner.find_system(like or name)
    if system.refine == "rocchio":
        system = replace(system, feedback=query_adapters.choose_feedback(profile, dataset))
    weights = checkpoints.resolve_checkpoint(str(weights or profile.policy), profile)
    first = recipe.first and query_adapters.adapt(profile, dataset, recipe.first)
    # Of all test queries, so a sample alone would cost more than it saves.
    shares = recipe.looks and split == "test" and (gallery or count is None)
    looks = run_system(profile, dataset, recipe.looks).resolve() if shares else None
    turns = (recipe.turns or profile.max_turns) if system.refine else 1
    rule = system.display_rule or profile.display_rule
    run = records.Run(dataset, split, name, turns, 1, profile.seed, rule)
    knobs = KNOBS + (HEAD_KNOBS if system.append_refine else ())
    inputs = {
        "vectors": cache.metadata(vectors).get("key"),  # of engine, videos and annotations
        "policy": loading.version(weights),
        "first": first and cache.metadata(first).get("key"),
        "looks": looks and cache.metadata(looks.parent).get("key"),
        "run": vars(run),
        "system": list(vars(system).values()),
        "queries": [count, profile.val_fraction if split == "held" else None],
        "families": cache.source_digest(profile.data_source) if split == "held" else None,
        "knobs": {knob: getattr(profile, knob) for knob in knobs},
        "code": cache.source_digest(run_batches.__name__),
    }
    file = f"{name}-{gallery.name}" if gallery else name
    folder = profile.runs(dataset) / "episodes" / file
    if not (folder / run_batches.EPISODES).exists():  # somebody deleted a damaged file
        (folder / cache.RECORD).unlink(missing_ok=True)
    work = functools.partial(run_batches.run, profile, run, system, weights, vectors, count, first, looks)
    cache.build(folder, inputs, work, distributed=True)
    return _link(folder)


def trained_weights(profile, dataset: str, name: str) -> tuple[str, str | None]:
    """Return (name in SYSTEMS, checkpoint) of a system; stages that are not current are trained now.

    A system of RECIPES, sft-released and vsr1-released have checkpoints of their own; any other system has none:
    (name, None).
    """
    if name in RELEASED:
        return "sqr", checkpoints.released_name(dataset, RELEASED[name])
    if name not in RECIPES:
        return name, None
    recipe = RECIPES[name]
    stage = sft if recipe.policy in STAGE_1 else grpo
    return recipe.like, str(stage.train(profile, dataset, recipe.policy))


def _link(folder):
    """Point <folder>.jsonl at the episodes and return it; another process may do the same at the same time."""
    link = folder.with_name(f"{folder.name}.jsonl")
    if cache.dist_state().is_main_process:
        scratch = link.with_name(f".{link.name}.{os.getpid()}")
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(Path(folder.name) / run_batches.EPISODES)
        os.replace(scratch, link)
    return link
