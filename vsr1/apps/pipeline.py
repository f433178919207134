"""Make the steps that one command names, in one process or in one for each data set."""

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import contextmanager

from vsr1 import cache
from vsr1.config import PACKAGE, InputError

LONGEST = ("didemo",)  # data sets that are begun first: this one trains the variants of table T2
SPLITTERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


# --- Steps


@contextmanager
def _timed(what):
    """Print, from one process, how long the block took."""
    started = time.time()
    yield
    if cache.dist_state().is_main_process:
        print(f"{what}: {time.time() - started:.0f} s", flush=True)


def corpus(profile, dataset: str) -> None:
    """Make the corpus below runs/ current: rendered, or imported from the real files."""
    from vsr1.data import source

    with _timed(f"corpus {dataset}"):
        source.of(profile).prepare(profile, dataset)


def embed(profile, dataset: str) -> None:
    """Embed the videos and queries of both splits by the small engine; a study embeds by the large one."""
    from vsr1.models import embedding

    with _timed(f"embed {dataset}"):
        for split in ("train", "test"):
            embedding.embed_corpus(profile, dataset, split, "engine")


def train(profile, dataset: str, stage: str, variant: str) -> None:
    """Train one stage, after all that it needs.

    stage    "sft"; "ft", its baseline without soft tokens; or "grpo"
    variant  of `rollout.VARIANTS`, for "grpo"
    """
    from vsr1.training import grpo, sft

    corpus(profile, dataset)
    embed(profile, dataset)
    name = variant if stage == "grpo" else stage
    with _timed(f"train {name} {dataset}"):
        (grpo if stage == "grpo" else sft).train(profile, dataset, name)


def evaluate(profile, dataset: str, systems) -> None:
    """Run systems on the test queries, after all that they need; those of released weights also print their numbers.

    systems  "sft", a variant of stage 2, one of `runner.SYSTEMS`, "sft-released" or "vsr1-released"
    """
    from vsr1.evaluation import evaluate as evaluation

    embed(profile, dataset)
    for name in systems:
        with _timed(f"evaluate {name} {dataset}"):
            path = evaluation.run_system(profile, dataset, name)
            if name in evaluation.RELEASED and cache.dist_state().is_main_process:
                _record(profile, dataset, name, path)


def _record(profile, dataset, name, path):
    """Put a row of table T1 that no notebook makes among the numbers of the report, and print it."""
    from vsr1.experiments import common
    from vsr1.loop import records
    from vsr1.report import results

    numbers = common.test_row(profile, dataset, name, records.read_episodes(path))
    results.record(profile, dataset, name, numbers)
    print(common.table(numbers).to_string())


def seeds(profile, dataset: str, numbers: list[int]) -> None:
    """Train and evaluate with every seed in `numbers`, and write tables R1 and R2 of all seeds so far after each."""
    from vsr1.experiments import seeds as study

    for seed in numbers:
        with _timed(f"seed {seed} {dataset}"):
            study.run(profile, dataset, seed)
        study.summarize(profile)


def ablations(profile, dataset: str) -> None:
    """Run the longer studies one after the other; each writes its results when it ends."""
    from vsr1.experiments import ablations as studies

    with _timed(f"ablations {dataset}"):
        for name in studies.run(profile, dataset):
            print(f"ablations {name} {dataset}: done", flush=True)


# --- Processes


def use_this_clone() -> None:
    """Let every child process and notebook kernel import the package of this clone, whatever is installed."""
    clone, paths = str(PACKAGE.parent), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([clone, *(path for path in paths if path not in ("", clone))])


def start(profile, command: str, shared: bool) -> None:
    """Set the threads of this process and its children, and check that the launcher, if any, fits the command.

    shared  whether several processes can work on this command together
    """
    # torch and OpenMP read it when they are first imported, in this process and in the kernels of notebooks.
    os.environ["OMP_NUM_THREADS"] = str(profile.threads)
    if importlib.util.find_spec("faiss") is None:  # no default dependency: the two builds exclude each other
        raise InputError(
            "faiss is not installed; `make` does it, or pip install faiss-cpu (faiss-gpu on a GPU machine)"
        )
    _check_launcher()
    if cache.dist_state(profile.device).num_processes > 1 and not shared:
        raise InputError(f"{command}: works in one process; start it without a launcher")


def _check_launcher():
    """Refuse launchers that split a model over processes: rollouts and soft tokens read parts of it as they need."""
    for variable, name in SPLITTERS.items():
        if os.environ.get(variable) == "true":
            raise InputError(f"accelerate: {name} is not supported; launch with `--multi_gpu`")


def count_jobs(profile, jobs: int | None, datasets) -> int:
    """Return how many data sets are worked on at once; processes of a launcher work on one."""
    if cache.dist_state(profile.device) is not cache.SINGLE_PROCESS:
        return 1
    return min(jobs or profile.parallel_datasets, len(datasets), len(os.sched_getaffinity(0)))


def run_side_by_side(commands: dict[str, list[list[str]]], jobs: int) -> int:
    """Run commands of this package, `jobs` data sets at once, and return the first status that is not 0.

    commands  {data set: its commands}, which run one after the other; after a failure no new one is started
    """
    waiting, running, failed = {name: list(queue) for name, queue in commands.items()}, {}, 0
    try:
        while running or (any(waiting.values()) and not failed):
            idle = [name for name, queue in waiting.items() if queue and name not in running]
            # Those with most left first, as else one works alone at the end.
            for name in sorted(idle, key=lambda name: (-len(waiting[name]), name not in LONGEST)):
                if len(running) < jobs and not failed:
                    running[name] = subprocess.Popen([sys.executable, "-m", "vsr1", *waiting[name].pop(0)])
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                status = running.pop(name).returncode
                failed = failed or status
    finally:
        for process in running.values():  # stopped by hand: they resume when they are started again
            process.terminate()
            process.wait()
    return failed
