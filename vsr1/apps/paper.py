"""All of `make paper` as steps: what notebooks read, the notebooks, and the report.

A notebook makes what is missing, so each can be run alone. Here all is made before: side by side, long steps first.
"""

import functools
import importlib

from vsr1.apps import notebooks, pipeline
from vsr1.apps.pipeline import Step
from vsr1.config import ABLATED

REWRITES = ("hqr-blind", "hqr-seen", "hqr-reasoned")
# {notebook: {step that it is the first to read: (what the step needs, minutes of one core in the mini world)}}
READ_BY = {
    "01_corpus_embedding": {
        "corpus": ((), 0.7),
        "embed engine": (("corpus",), 1.2),
        "probe": (("embed engine",), 0.1),
    },
    "02_verify_and_ground": {
        "evaluate oracle-right": (("embed engine",), 0.3),
        "evaluate oracle-wrong": (("embed engine",), 0.3),
        "evaluate walkdown": (("embed engine",), 0.7),
    },
    "03_sft_cold_start": {
        "train sft": (("embed engine",), 4.0),
        "train ft": (("embed engine",), 2.0),
        "validate zs": (("embed engine",), 0.2),
        "validate sft": (("train sft",), 0.4),
        "evaluate sft": (("train sft",), 0.8),
        "evaluate walkdown-ft": (("train ft",), 0.7),
    },
    "04_grpo_training": {
        "train vsr1": (("train sft",), 3.4),
        "evaluate vsr1": (("train vsr1",), 0.8),
        "validate vsr1": (("train vsr1",), 0.4),
    },
    # Before 05, which shows its row.
    "05b_two_stage": {"two-stage": (("embed engine",), 1.0)},
    "05_evaluation": {},
    "06_sqr_vs_hqr": {
        "sample sqr-untrained": (("embed engine",), 0.5),
        **{f"sample {system}": (("embed engine",), 0.5) for system in REWRITES},
        **{f"sample {system}-append": (("embed engine",), 0.5) for system in REWRITES},
    },
    "06b_is_it_the_loop": {
        "adapt adapter-vec": (("embed engine",), 0.2),
        "adapt adapter-soft": (("embed engine",), 1.5),
        "adapt vsr1": (("train vsr1",), 0.1),
        "evaluate vsr1-first": (("adapt vsr1",), 0.6),
        "evaluate skip": (("train vsr1",), 0.8),
        "retry sqr": (("train vsr1",), 0.4),
        "intervene": (("retry sqr",), 0.5),
    },
    "06c_upper_bound": {"bound": (("embed engine",), 1.3)},
    "06d_when_looking_pays": {},
    "07_ablations": {
        "ablate no-ret": (("train sft",), 4.0),
        "ablate no-verif": (("train sft",), 4.0),
        "embed engine_large": (("corpus",), 0.3),
        **{f"retry {system}": (("embed engine",), 0.3) for system in REWRITES},
        **{f"retry {system} engine_large": (("embed engine_large",), 0.3) for system in REWRITES},
    },
    "08_qualitative": {
        "ranks": (("evaluate vsr1",), 0.1),
        "cards": (("evaluate vsr1", *(f"sample {system}" for system in REWRITES)), 0.5),
    },
}
# By name: the modules import torch, and a run that has nothing to do need not.
WORK = {
    "corpus": "apps.pipeline.corpus",
    "embed": "apps.pipeline.embed",
    "probe": "mini.attribute_probe.headroom",
    "train": "apps.pipeline.train",
    "evaluate": "apps.pipeline.evaluate",
    "validate": "experiments.training_curves.run_validation",
    "two-stage": "experiments.two_stage.run",
    "sample": "experiments.common.run_sample",
    "bound": "experiments.soft_token_bound.measure_bound",
    "adapt": "training.query_adapters.adapt",
    "intervene": "experiments.premise.intervene",
    "ablate": "experiments.ablations.run_variant",
    "retry": "experiments.ablations.run_retries",
    "ranks": "experiments.refinement.write_ranks",
    "cards": "report.qualitative.make",
    "report": "report.html_report.publish",
}
LAST = "09_paper"
NOTEBOOK_MINUTES = 0.1


def run(profile, profile_name: str, jobs: int) -> int:
    """Make all that is not current, `jobs` steps at once, and return the first status that is not 0."""
    if _is_current(profile, profile_name):
        # So are code and knobs. What is left to look at is what real corpora are imported from.
        for dataset in profile.datasets:
            pipeline.corpus(profile, dataset)
        if _is_current(profile, profile_name):
            print("no step or notebook has changed")
            work_on("report", profile)
            return 0
    return pipeline.run_apart(steps(profile, profile_name), jobs)


def _is_current(profile, profile_name):
    """Return whether no notebook would run, without a look into the steps that they read."""
    return all(
        notebooks.Run(name, profile_name, profile, dataset).is_current()
        for name in [*READ_BY, LAST]
        for dataset in (profile.datasets if notebooks.takes_dataset(name) else [None])
    )


def steps(profile, profile_name: str) -> list[Step]:
    """List the steps of a run, each behind those that it needs."""
    listed = [step for dataset in profile.datasets for step in _steps_read(profile, dataset)]
    listed += notebook_steps([*READ_BY, LAST], profile_name, profile)
    publish = functools.partial(work_on, "report", profile)
    return [*listed, Step("report", publish, frozenset({f"notebook {LAST}"}))]


def _steps_read(profile, dataset):
    """Yield the steps of one data set that its notebooks read."""
    for parts in READ_BY.values():
        for name, (needs, minutes) in parts.items():
            kind, *words = name.split()
            if (kind == "ablate" and dataset != ABLATED) or (kind == "probe" and not profile.world):
                continue
            work = functools.partial(work_on, kind, profile, dataset, *words)
            yield Step(f"{name} {dataset}", work, frozenset(f"{need} {dataset}" for need in needs), minutes)


def notebook_steps(names: list[str], profile_name: str, profile) -> list[Step]:
    """List the runs of notebooks: once per data set where their parameters name one, the others last and once.

    Those of a data set keep their order, for they show each other's numbers.
    """
    listed = []
    per_dataset = [name for name in names if notebooks.takes_dataset(name)]
    for dataset in profile.datasets:
        needs = set()
        for name in per_dataset:
            needs |= {f"{step} {dataset}" for step in READ_BY.get(name, ())}
            run = notebooks.Run(name, profile_name, profile, dataset)
            listed.append(Step(run.title, run.execute, frozenset(needs), NOTEBOOK_MINUTES))
            needs = {run.title}
    for name in names:
        if name not in per_dataset:
            run, needs = notebooks.Run(name, profile_name, profile, None), {step.name for step in listed}
            listed.append(Step(run.title, run.execute, frozenset(needs), NOTEBOOK_MINUTES))
    return listed


def work_on(kind: str, profile, *words: str) -> None:
    """Call the function of a kind of steps with the profile, the data set and what else a step's name says."""
    module, _, function = WORK[kind].rpartition(".")
    getattr(importlib.import_module(f"vsr1.{module}"), function)(profile, *words)
