"""Work on the steps of a run: in this process one after the other, or side by side in processes of their own."""

import errno
import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait

from vsr1 import cache
from vsr1.config import PACKAGE, ROOT, InputError

INTERRUPTED = 130
CLEAR = "\r\x1b[K"  # back to the beginning of a line of a terminal, and empty it
SPLITTERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
UNWRITABLE = errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.ENOSPC, errno.EROFS
MEMORY_KNOBS = "batch_tokens, eval_batch, sft_batch, grpo_rollout_batch, grpo_micro_batch or max_frame_pixels"
RANK_0_FIRST = 10  # seconds in which a launcher ends the other processes when one has ended
# Processes are forked from one that has imported all that is slow: torch is imported once in a run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vsr1.apps.preload"])


# --- Steps


@dataclass(frozen=True)
class Step:
    """A part of a run that one process works on."""

    name: str
    work: Callable[[], None]  # a function of a module or a `partial` of one: it is sent to another process
    needs: frozenset[str] = frozenset()  # names of the steps that come first, where they are part of the run
    minutes: float = 1.0  # of one core in the mini world: long ones begin early


def run(steps: list[Step], jobs: int) -> int:
    """Work on steps, `jobs` at once, and return the first status that is not 0; one job works in this process."""
    if jobs > 1:
        return run_apart(steps, jobs)
    for step in steps:
        started = time.monotonic()
        step.work()
        _say_seconds(step.name, started)
    return 0


def run_apart(steps: list[Step], jobs: int) -> int:
    """Work on each step in a process of its own, `jobs` at once; return the first status that is not 0, or 0.

    A step begins when what it needs has ended, those with most work behind them first. After a failure no new one
    begins. However this process ends, the others end with it: they resume when they are started again.
    """
    waiting, running, failed = {step.name: step for step in steps}, {}, 0
    order, began = _minutes_left(steps), time.monotonic()
    try:
        while running or (waiting and not failed):
            unfinished = waiting.keys() | {step.name for step, _, _ in running.values()}
            ready = [step for step in waiting.values() if not step.needs & unfinished]
            for step in sorted(ready, key=lambda step: -order[step.name]):
                if len(running) < jobs and not failed:
                    process = FORKS.Process(target=_work, args=(waiting.pop(step.name),))
                    process.start()
                    running[process.sentinel] = step, process, time.monotonic()
            for sentinel in wait(running, timeout=1):
                step, process, started = running.pop(sentinel)
                process.join()
                failed = _status(step, process, started) or failed
            _show(running, len(steps) - len(waiting) - len(running), len(steps), began)
    finally:
        for _, process, _ in running.values():
            with suppress(ProcessLookupError):  # one that has just begun has no group yet, and no children
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    return failed


def _minutes_left(steps):
    """Return {name: minutes from the beginning of a step to the end of the longest row of steps that wait for it}."""
    left = {}
    for step in reversed(steps):
        behind = [left[other.name] for other in steps if step.name in other.needs]
        left[step.name] = step.minutes + max(behind, default=0.0)
    return left


def _work(step):
    """Work on a step in a process of its own, in which what it starts is ended with it."""
    os.setsid()
    end_with_parent()
    sys.exit(guard(step.work, step.name))


def end_with_parent() -> None:
    """Kill this process and all of its group when the one that asked for it ends, in whatever way."""

    def watch():
        multiprocessing.parent_process().join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _status(step, process, started):
    """Return the exit status of a process; print how long it took, or what it cannot say of itself."""
    if process.exitcode < 0:
        reason = f"killed by signal {-process.exitcode}, most likely for lack of memory"
        print(f"error: {step.name}: {reason}; run the same command again to go on", file=sys.stderr)
        return 1
    if process.exitcode == 0:
        _say_seconds(step.name, started)
    return process.exitcode


def _say_seconds(name, started):
    """Print, from one process, how long a step took; one that was current takes less than is worth a line."""
    seconds = time.monotonic() - started
    if seconds >= 1 and cache.dist_state().is_main_process:
        print(f"{CLEAR * sys.stdout.isatty()}{name}: {seconds:.0f} s", flush=True)


def _show(running, done, total, began):
    """Show in a terminal, on one line that changes, which steps are worked on."""
    if sys.stdout.isatty():
        now = time.monotonic()
        names = ", ".join(f"{step.name} {now - started:.0f} s" for step, _, started in running.values())
        minutes = f"{(now - began) // 60:.0f}:{(now - began) % 60:02.0f}"
        print(f"{CLEAR}{done} of {total} steps, {minutes}: {names}"[:120], end="", flush=True)
        if not running:
            print(CLEAR, end="", flush=True)


# --- What several commands do


def corpus(profile, dataset: str) -> None:
    """Make the corpus below runs/ current: rendered, or imported from the real files."""
    from vsr1.data import source

    source.of(profile).prepare(profile, dataset)


def embed(profile, dataset: str, which: str = "engine") -> None:
    """Embed the videos and queries of both splits by the small engine; only those of test by `engine_large`."""
    from vsr1.models import embedding

    for split in ("test",) if which == "engine_large" else ("train", "test"):
        embedding.embed_corpus(profile, dataset, split, which)


def train(profile, dataset: str, name: str) -> None:
    """Train one stage, after all that it needs.

    name  "sft"; "ft", its baseline without soft tokens; or for stage 2 a variant of `rollout.VARIANTS`
    """
    from vsr1.training import grpo, sft

    (sft if name in ("sft", "ft") else grpo).train(profile, dataset, name)


def evaluate(profile, dataset: str, name: str) -> None:
    """Run a system on the test queries, after all that it needs; one of released weights also prints its numbers.

    name  one of `evaluate.RECIPES` or `runner.SYSTEMS`, "sft-released" or "vsr1-released"
    """
    from vsr1.evaluation import evaluate as evaluation

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
    """Train and evaluate with every seed in `numbers`, and write R1, R2 and R4 of all seeds so far after each."""
    from vsr1.experiments import seeds as study

    for seed in numbers:
        started = time.monotonic()
        study.run(profile, dataset, seed)
        _say_seconds(f"seed {seed} {dataset}", started)
        study.summarize(profile)


def ablations(profile, dataset: str) -> None:
    """Run the longer studies one after the other; each writes its results when it ends."""
    from vsr1.experiments import ablations as studies

    for name in studies.run(profile, dataset):
        print(f"ablations {name} {dataset}: done", flush=True)


def premise(profile, dataset: str, numbers: list[int]) -> None:
    """Run the baselines and bounds that `make paper` leaves out; each writes its results when it ends.

    numbers  seeds with which the systems of R4 are run, none: the profile's; all else has the profile's
    """
    from vsr1.evaluation import gallery_sizes, oracles
    from vsr1.experiments import common
    from vsr1.experiments import premise as studies
    from vsr1.experiments import seeds as over_seeds
    from vsr1.experiments import soft_token_bound as bound

    def optimise(engine, texts, gallery, right):
        words, layout = engine.read_queries(texts), bound.layouts(engine)["raw"]
        return bound.optimise_latents(engine, layout, words, gallery, right, profile)[-1]

    for name in studies.run(profile, dataset):
        print(f"premise {name} {dataset}: done", flush=True)
    interventions = studies.intervene(profile, dataset)
    refined = dict(zip(interventions["ids"], interventions["ranks"]["sqr"], strict=True))
    bounds = functools.partial(oracles.numbers, optimise=optimise, refined=refined)
    for name, measure in {"oracles": bounds, "galleries": gallery_sizes.numbers}.items():
        common.record_committed(profile, dataset, measure(profile, dataset), "premise")
        print(f"premise {name} {dataset}: done", flush=True)
    numbers = numbers or [profile.seed]
    seeds(profile, dataset, numbers)
    for seed in numbers:
        for name in over_seeds.run_more(profile, dataset, seed):
            print(f"premise seed {seed} {name} {dataset}: done", flush=True)
        over_seeds.summarize(profile)


def exam(profile, dataset: str) -> None:
    """Sit the fresh exam, once: what it measured stays, whatever is trained afterwards."""
    from vsr1.evaluation import exam as fresh_exam
    from vsr1.experiments import common

    if any(name.startswith("X1/") for name in common.read_committed(profile, dataset, "premise")):
        remedy = f"another one needs claims and a world_seed of its own ({fresh_exam.FILE})"
        print(f"exam {dataset}: was sat before; {remedy}")
        return
    common.record_committed(profile, dataset, fresh_exam.sit(profile, dataset), "premise")
    print(f"exam {dataset}: done", flush=True)


def archives(profile, seed: int, cells: list[str]) -> None:
    """Measure cells of one corpus of archives with one seed, and write the tables of all that is measured so far."""
    from vsr1.experiments.archives import pages, study

    for row in study.measure(profile, seed, cells):
        print(row, flush=True)
    pages.publish(profile)


# --- Processes


def guard(work: Callable[[], int | None], name: str = "") -> int:
    """Do some work and return its status. Bad input is one line and 2; an error of ours keeps its traceback.

    name  of the work, for the line
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        message = " ".join(str(error).splitlines())
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        message = f"{error.filename or ROOT}: {error.strerror}; make room there, or choose another place"
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            message = f"not enough memory ({str(error)[:90]}); lower {MEMORY_KNOBS} in the profile, then run it again"
        elif "by peer" in str(error):
            return 1  # another process ended, and has said why
        else:
            raise
    if int(os.environ.get("RANK", 0)):
        time.sleep(RANK_0_FIRST)  # the first process may be about to print the same: one line is enough
    print(f"error: {name}{': ' * bool(name)}{message}", file=sys.stderr)
    return 2


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
    for variable, name in SPLITTERS.items():  # rollouts and soft tokens read parts of a model as they need
        if os.environ.get(variable) == "true":
            raise InputError(f"accelerate: {name} is not supported; launch with `--multi_gpu`")
    if cache.dist_state(profile.device).num_processes > 1 and not shared:
        raise InputError(f"{command}: works in one process; start it without a launcher")


def count_jobs(profile, jobs: int | None) -> int:
    """Return how many steps are worked on at once; processes of a launcher work on one."""
    if cache.dist_state(profile.device) is not cache.SINGLE_PROCESS:
        return 1
    return min(jobs or profile.parallel_steps, len(os.sched_getaffinity(0)))
