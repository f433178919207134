"""Make the steps that one command names, data set by data set, and print a line about each."""

import time

from vsr1 import cache


def corpus(profile, datasets) -> None:
    """Make every corpus below runs/ current: rendered, or imported from the real files."""
    from vsr1.data import source

    for dataset in datasets:
        started = time.time()
        source.of(profile).prepare(profile, dataset)
        _print_time(f"corpus {dataset}", started)


def embed(profile, datasets) -> None:
    """Embed the videos and queries of both splits by the small engine; a study embeds by the large one."""
    from vsr1.models import embedding

    for dataset in datasets:
        started = time.time()
        for split in ("train", "test"):
            embedding.embed_corpus(profile, dataset, split, "engine")
        _print_time(f"embed {dataset}", started)


def train(profile, dataset: str, stage: str, variant: str) -> None:
    """Train one stage, after all that it needs.

    stage    "sft"; "ft", its baseline without soft tokens; or "grpo"
    variant  of `rollout.VARIANTS`, for "grpo"
    """
    corpus(profile, (dataset,))
    embed(profile, (dataset,))
    started = time.time()
    folder = _trained(profile, dataset, variant if stage == "grpo" else stage)
    _print_time(f"train {folder}", started)


def _trained(profile, dataset, name):
    """Return the current checkpoint called `name`: "sft", "ft", or a variant of stage 2."""
    from vsr1.training import grpo, sft

    stage_1 = sft.train(profile, dataset, "ft" if name == "ft" else "sft")
    return stage_1 if name in ("sft", "ft") else grpo.train(profile, dataset, name)


def evaluate(profile, dataset: str, systems) -> None:
    """Run systems on the test queries, after all that they need; those of released weights also print their numbers.

    systems  "sft", a variant of stage 2, one of `runner.SYSTEMS`, "sft-released" or "vsr1-released"
    """
    from vsr1.evaluation import evaluate as evaluation

    embed(profile, (dataset,))
    for name in systems:
        started = time.time()
        path = evaluation.run_system(profile, dataset, name)
        if name in evaluation.RELEASED:
            _record(profile, dataset, name, path)
        _print_time(f"evaluate {name} {dataset}", started)


def _record(profile, dataset, name, path):
    """Put a row of table T1 that no notebook makes among the numbers of the report, and print it."""
    from vsr1.experiments import common
    from vsr1.loop import records
    from vsr1.report import results

    if cache.dist_state().is_main_process:
        numbers = common.test_row(profile, dataset, name, records.read_episodes(path))
        results.record(profile, dataset, name, numbers)
        print(common.table(numbers).to_string())


def seeds(profile, datasets, numbers) -> None:
    """Train and evaluate with every seed in `numbers`, and write tables R1 and R2 of all seeds so far after each."""
    from vsr1.experiments import seeds as study

    for dataset in datasets:
        for seed in numbers:
            started = time.time()
            study.run(profile, dataset, seed)
            _print_time(f"seed {seed} {dataset}", started)
            study.summarize(profile)


def ablations(profile, datasets) -> None:
    """Run the longer studies one after the other; each writes its results when it ends."""
    from vsr1.experiments import ablations as studies

    for dataset in datasets:
        started = time.time()
        for name in studies.run(profile, dataset):
            _print_time(f"ablations {name} {dataset}", started)
            started = time.time()


def _print_time(what, started):
    """Print one line about what was done, from one process."""
    if cache.dist_state().is_main_process:
        print(f"{what}: {time.time() - started:.0f} s", flush=True)
