"""The command line, `python -m vsr1 COMMAND`. The Makefile calls it; each command imports only what it needs."""

import argparse
import ast
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

from vsr1 import cache, config
from vsr1.config import ROOT, InputError

# Command, of one word or two: the module whose main reads its own arguments.
OTHERS = {
    "score": "evaluation.fig_scorer",
    "search": "apps.search_folder",
    "fetch": "data.official_release",
    "foundation": "mini.pretraining",
}
SHARED = ("corpus", "embed", "train", "evaluate")  # what a launcher may start in several processes
FSDP = {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
MOMENT = 10  # seconds in which a launcher ends the other processes when one has ended


def main(argv=None) -> int:
    """The exit status of one command. Bad input is one line and 2; an error of ours keeps its traceback."""
    try:
        return _command(sys.argv[1:] if argv is None else argv) or 0
    except InputError as error:
        message = " ".join(str(error).splitlines())
    except OSError as error:
        if error.errno not in (28, 30):  # no space left, read-only
            raise
        message = f"{error.filename or ROOT}: {error.strerror}; free some space, then run it again"
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            knobs = "batch_tokens, eval_batch, sft_batch, grpo_rollout_batch, grpo_micro_batch or max_frame_pixels"
            message = (
                f"not enough memory ({str(error)[:90]}); lower {knobs} in the profile, then run it again"
            )
        elif "closed by peer" not in str(error):
            raise
        else:
            return 1  # another process ended, and has said why
    if int(os.environ.get("RANK", 0)):
        time.sleep(MOMENT)  # the first process may be about to say the same: one line is enough
    print(f"error: {message}", file=sys.stderr)
    return 2


def _command(argv):
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in OTHERS:
            return __import__(f"vsr1.{OTHERS[name]}", fromlist=["main"]).main(argv[words:])
    args = _parser().parse_args(argv)
    if args.command == "lab":
        return lab(args.port)
    profile = config.load(args.profile, args.seed)
    # torch and OpenMP read it when they are first imported, in this process and in the kernels of notebooks.
    os.environ["OMP_NUM_THREADS"] = str(profile.threads)
    _check_launcher()
    mates = cache.dist_state(profile.device)
    if mates.num_processes > 1 and args.command not in SHARED:
        raise InputError(f"{args.command}: works in one process; several can share {', '.join(SHARED)}")
    if args.command == "train":
        return train(profile, config.check_dataset(args.dataset), args.stage, args.recipe)
    if args.command == "evaluate":
        return evaluate(profile, config.check_dataset(args.dataset), args.systems)
    if args.command in ("report", "check"):
        from vsr1.report import html_report as page
        from vsr1.report import results

        results.need_run(profile)
        return page.check(profile) if args.command == "check" else page.publish(profile) and None
    if args.command == "readme":
        from vsr1.report import readme

        return readme.write(profile)
    if args.command == "doctor":
        from vsr1.apps import doctor

        return doctor.main(profile)
    given = " ".join(args.datasets).replace(",", " ").split()
    datasets = tuple(config.check_dataset(name) for name in given) or profile.datasets
    jobs = min(args.jobs or profile.parallel_datasets, len(datasets), len(os.sched_getaffinity(0)))
    if jobs > 1 and mates is cache.SINGLE_PROCESS:
        failed = side_by_side(args, datasets, jobs)
        if failed or args.command != "notebook":
            return failed
        return notebooks(
            [name for name in args.names if not of_dataset(name)], args.profile, profile, datasets
        )
    if args.command == "notebook":
        return notebooks(args.names, args.profile, profile, datasets)
    if args.command == "seeds":
        return seeds(profile, datasets, args.seeds)
    return {"corpus": corpus, "embed": embed, "ablations": ablations}[args.command](profile, datasets)


def _check_launcher():
    """Takes FSDP over from accelerate and transformers, which would do it another way than `split`, or refuses."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise InputError(
            "accelerate: DeepSpeed is not supported; launch with `--multi_gpu`, or FSDP with `fsdp_version: 2`"
        )
    if os.environ.pop("ACCELERATE_USE_FSDP", None) == "true":
        os.environ.setdefault("FSDP_VERSION", "1")  # as accelerate reads it
        for name, wanted in FSDP.items():
            if (told := os.environ.get(name, wanted)) != wanted:
                raise InputError(f"accelerate: {name.lower()}: {told} is not supported; set it to {wanted}")


def side_by_side(args, datasets, jobs):
    """The command in processes of one data set each, `jobs` at once; a data set's notebooks stay in their order.

    Notebooks that take no data set are left to the caller.
    """
    alone = [sys.executable, "-m", "vsr1", args.command]
    alone += ["--seeds", *map(str, args.seeds)] if args.command == "seeds" else []
    common = ["--profile", args.profile, "--jobs", "1"]
    common += ["--seed", str(args.seed)] * (args.seed is not None)
    parts = [[name] for name in args.names if of_dataset(name)] if args.command == "notebook" else [[]]
    waiting = {name: [[*alone, *part, *common, "--datasets", name] for part in parts] for name in datasets}
    running, failed = {}, 0
    try:
        while running or (any(waiting.values()) and not failed):
            free = [name for name, todo in waiting.items() if todo and name not in running]
            for name in sorted(free, key=lambda name: -len(waiting[name])):  # else one works alone at the end
                if len(running) < jobs and not failed:
                    running[name] = subprocess.Popen(waiting[name].pop(0))
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                status = running.pop(name).returncode
                failed = failed or status
    finally:
        for process in running.values():  # stopped by hand: they go on where they were when asked again
            process.terminate()
            process.wait()
    return failed


def _parser():
    parser = argparse.ArgumentParser(prog="python -m vsr1", description="VideoSearch-R1, reproduced.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", default="mini", help="name in vsr1/profiles/, or a path to a .yaml")
    common.add_argument("--seed", type=int, help="of the experiment (the profile's own)")
    sets = argparse.ArgumentParser(add_help=False, parents=[common])
    words = "charades didemo activitynet, by spaces or commas (the profile's own)"
    sets.add_argument("--datasets", "--dataset", nargs="+", default=[], metavar="NAME", help=words)
    sets.add_argument("--jobs", type=int, help="data sets worked on at once (the profile's own)")
    commands.add_parser("corpus", parents=[sets], help="render the corpora, or bring in the real ones")
    commands.add_parser("embed", parents=[sets], help="videos and queries to vectors and an index")
    one = argparse.ArgumentParser(add_help=False, parents=[common])
    one.add_argument("--dataset", required=True, metavar="NAME", help="charades, didemo or activitynet")
    told = commands.add_parser("train", parents=[one], help="one stage of training, and what it needs")
    told.add_argument("--stage", required=True, choices=("sft", "ft", "grpo"))
    told.add_argument("--recipe", default="vsr1", help="of grpo.RECIPES, for --stage grpo")
    told = commands.add_parser("evaluate", parents=[one], help="the episodes of systems on the test queries")
    told.add_argument(
        "systems", nargs="+", metavar="SYSTEM", help="sft, a recipe, of evaluate.SYSTEMS, or vsr1-released"
    )
    told = commands.add_parser("notebook", parents=[sets], help="run notebooks headless")
    told.add_argument("names", nargs="+", metavar="NAME", help="file names in notebooks/, without .ipynb")
    told = commands.add_parser(
        "seeds", parents=[sets], help="both stages again with other seeds, and their tables"
    )
    told.add_argument("--seeds", nargs="+", type=int, required=True, metavar="N")
    commands.add_parser("ablations", parents=[sets], help="longer studies beyond the paper (B1 to B3)")
    commands.add_parser("report", parents=[common], help="numbers, tables, figures and report.html")
    commands.add_parser("readme", parents=[common], help="the numbers of README.md")
    commands.add_parser("check", parents=[common], help="measured numbers against expected ones")
    commands.add_parser("doctor", parents=[common], help="what this machine can reproduce")
    told = commands.add_parser("lab", help="JupyterLab on the notebooks")
    told.add_argument("--port", type=int, default=8888)
    for name in OTHERS:
        commands.add_parser(name, help=f"`python -m vsr1 {name} --help` says more")
    return parser


def corpus(profile, datasets):
    """Every corpus under runs/: rendered, or brought in from the real files."""
    from vsr1.data import source

    for dataset in datasets:
        started = time.time()
        source.of(profile).prepare(profile, dataset)
        _say(f"corpus {dataset}", started)


def embed(profile, datasets):
    """Vectors and index of both splits under the small engine; the large one belongs to the study that needs it."""
    from vsr1.models import embedding

    for dataset in datasets:
        started = time.time()
        for split in ("train", "test"):
            embedding.embed_corpus(profile, dataset, split, "engine")
        _say(f"embed {dataset}", started)


def train(profile, dataset, stage, recipe):
    """One stage of training, with whatever it needs and is not there yet."""
    from vsr1.training import grpo, sft

    corpus(profile, (dataset,))
    embed(profile, (dataset,))
    started = time.time()
    folder = sft.train(profile, dataset, "ft" if stage == "ft" else "sft")
    if stage == "grpo":
        folder = grpo.train(profile, dataset, recipe)
    _say(f"train {folder}", started)


def evaluate(profile, dataset, systems):
    """The test episodes of systems, each with the weights that training left for it, if any."""
    from vsr1.evaluation import evaluate as loop
    from vsr1.models import checkpoints
    from vsr1.training import rollout

    home = profile.runs(dataset)
    trained = {"sft": ("sqr", home / "sft"), "walkdown-ft": ("walkdown", home / "ft")}
    trained |= {recipe: ("sqr", home / "grpo" / recipe) for recipe in rollout.VARIANTS}
    released = {
        "sft-released": checkpoints.released_name(dataset, 1),
        "vsr1-released": checkpoints.released_name(dataset, 2),
    }
    for name in systems:
        started, (like, weights) = time.time(), trained.get(name, (name, None))
        if weights and not cache.metadata(weights):
            raise InputError(f"{weights}: not trained yet; `python -m vsr1 train --help` says how")
        if name in released:
            like, weights = "sqr", released[name]
        path = loop.run_system(profile, dataset, name, like=like, weights=weights and str(weights))
        if name in released:
            record(profile, dataset, name, path)
        _say(f"evaluate {name} {dataset}", started)


def record(profile, dataset, name, path):
    """Puts a row of T1 that no notebook makes among the numbers of the report, and prints it."""
    from vsr1.experiments import refinement, training_curves
    from vsr1.loop import records
    from vsr1.report import results

    if cache.dist_state().is_main_process:
        numbers = training_curves.test_rows(profile, dataset, name, records.read_episodes(path))
        results.record(profile, dataset, name, numbers)
        print(refinement.table(numbers).to_string())


def seeds(profile, datasets, numbers):
    """What each seed got right, and the tables R1 and R2 of all that have been run."""
    from vsr1.experiments import seeds as others

    for dataset in datasets:
        for seed in numbers:
            started = time.time()
            others.run(profile, dataset, seed)
            _say(f"seed {seed} {dataset}", started)
            others.summary(profile)


def ablations(profile, datasets):
    """The longer studies, one after the other; what is found so far stands in results/ after each."""
    from vsr1.experiments import ablations as longer

    for dataset in datasets:
        started = time.time()
        for name in longer.run(profile, dataset):
            _say(f"ablations {name} {dataset}", started)
            started = time.time()


def _say(what, started):
    """One line about what was done, from one process."""
    if cache.dist_state().is_main_process:
        print(f"{what}: {time.time() - started:.0f} s", flush=True)


def notebooks(names, profile_name, profile, datasets):
    """Executed copies under runs/: one per data set where a notebook takes `dataset`; the others last, once."""
    if profile_name.endswith(".yaml"):
        profile_name = str(Path(profile_name).resolve())  # the kernel starts in another folder
    for name in sorted(names, key=of_dataset, reverse=True):  # stable
        source, each = notebook_file(name)[0], of_dataset(name)
        for dataset in datasets if each else [None]:
            given = {"profile": profile_name, "seed": profile.seed}
            if dataset:
                given["dataset"] = dataset
            started = time.time()
            folder = profile.runs(dataset) if dataset else profile.run_root()
            ran = execute(source, given, folder, profile.digest(), () if dataset else shared(profile))
            took = f"{time.time() - started:.0f} s" if ran else "unchanged"
            print(f"notebook {' '.join(filter(None, (name, dataset)))}: {took}", flush=True)


def of_dataset(name):
    """Whether a notebook is about one data set: its parameters say so."""
    return "dataset" in notebook_file(name)[1]


def shared(profile):
    """What a notebook about all data sets reads besides stages: numbers and figures of the others, committed values."""
    folders = [
        profile.runs(dataset) / part for dataset in profile.datasets for part in ("numbers", "figures")
    ]
    own = [path for folder in folders for path in sorted(folder.glob("*")) if path.name != "09_paper.json"]
    kept = [
        path for part in ("seeds", "ablations") for path in sorted((profile.results() / part).glob("*.json"))
    ]
    return [*own, *kept, ROOT / "results" / "expected", ROOT / "DEVIATIONS.md"]


def notebook_file(name):
    """(the file of a notebook, the names of its parameters), if it can be run."""
    source = ROOT / "notebooks" / f"{name}.ipynb"
    if not source.exists():
        known = ", ".join(sorted(path.stem for path in source.parent.glob("*.ipynb")))
        raise InputError(f"{source}: no such notebook; there are {known or 'none'}")
    declared = parameters(source)
    if lacking := {"profile", "seed"} - declared:  # papermill would only warn
        raise InputError(f"{source}: its parameters cell has no {min(lacking)!r}; add it")
    return source, declared


def parameters(source):
    """The names assigned in the one cell tagged `parameters` of a notebook file."""
    tagged = [cell for cell in _cells(source) if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{source}: expected one cell tagged `parameters`, found {len(tagged)}")
    statements = ast.parse("".join(tagged[0]["source"])).body
    return {target.id for node in statements if isinstance(node, ast.Assign) for target in node.targets}


def _cells(source):
    try:
        return json.loads(source.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{source}: not readable as a notebook; restore it with git") from error


def execute(source, given, folder, profile_digest, others=()):
    """True after `source` ran and its copy lies in `folder`/notebooks; False where that copy still stands.

    It stands while the cells, the package, the pins, the profile and every stage that existed after the last run are
    the same. Stages are compared one by one: what a later notebook adds does not make an earlier one run again.

    others   files and folders whose content counts as well
    """
    copy = folder / "notebooks" / source.name
    record = copy.with_name(f".{source.stem}.json")
    inputs = {
        "given": given,
        "profile": profile_digest,
        "cells": cache.fingerprint([[c["cell_type"], "".join(c["source"])] for c in _cells(source)]),
        "code": cache.fingerprint([cache.source_digest(name) for name in sorted(cache.SOURCES)]),
        "packages": cache.file_digest(ROOT / "requirements.txt"),
        "others": cache.file_digest(*(path for path in others if path.exists())),
    }
    if copy.exists() and record.exists():
        last, now = json.loads(record.read_text(encoding="utf-8")), stage_keys(folder)
        if last["inputs"] == inputs and last["stages"].items() <= now.items():
            return False
    copy.parent.mkdir(parents=True, exist_ok=True)
    _papermill(source, copy, given)
    cache.write_json(record, {"inputs": inputs, "stages": stage_keys(folder)})
    return True


def stage_keys(folder):
    """{folder of a finished stage: its key} for everything below `folder`."""
    return {path.relative_to(folder).as_posix(): cache.metadata(path)["key"] for path in cache.steps(folder)}


def _papermill(source, copy, given):
    import papermill
    from nbclient.exceptions import DeadKernelError

    running, failed = (copy.with_name(f"{source.stem}.{state}.ipynb") for state in ("running", "failed"))
    # Else every kernel warns that it talks over TCP (on loopback), and some that they were interrupted at their end.
    quiet = ["--IPKernelApp.log_level=CRITICAL"]
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": False,
        "extra_arguments": quiet,
        "shutdown_kernel": "immediate",  # nothing is left to do then; asking a kernel to end takes two seconds
    }
    try:
        papermill.execute_notebook(source, running, given, cwd=source.parent, **options)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        os.replace(running, failed)
        what = f"{source.stem}: the kernel died, most likely for lack of memory"
        if isinstance(error, papermill.PapermillExecutionError):
            what = f"{source.stem}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise InputError(f"notebook {what}; the executed copy is {failed}") from error
    os.replace(running, copy)
    failed.unlink(missing_ok=True)


def lab(port):
    """JupyterLab in this process, on loopback and with a token, until it is stopped."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} cannot be used ({error}); make lab PORT={port + 1}") from error
    from jupyterlab.labapp import LabApp

    token = secrets.token_hex(24)
    print(f"JupyterLab: http://127.0.0.1:{port}/lab?token={token}   (Ctrl-C twice stops it)", flush=True)
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    text = [f"--ServerApp.{name}={value}" for name, value in server.items()] + ["--ServerApp.log_level=WARN"]
    # Handed over inside the process: a token on a command line could be read by every user of the machine.
    text += [f"--ServerApp.root_dir={ROOT}/notebooks", f"--IdentityProvider.token={token}"]
    LabApp.launch_instance(text)


if __name__ == "__main__":
    sys.exit(main())
