"""The command line, `python -m vsr1 COMMAND`. The Makefile calls it; each command imports only what it needs."""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from vsr1 import config
from vsr1.apps import notebooks, paper, pipeline
from vsr1.config import DATASETS, ROOT, InputError

NAMES = re.compile(rf"({'|'.join(DATASETS)}|[, ])+")
VALUES = re.compile(r"(?!-\D).*")  # -1 is a value, --top no
# Options of several words.
LISTS = {"--datasets": NAMES, "--dataset": NAMES, "--seeds": VALUES, "--cells": VALUES, "--iou": VALUES}

Profile = Annotated[str, Option("--profile", help="Name of a file in vsr1/profiles/, or path to a .yaml.")]
Seed = Annotated[int | None, Option("--seed", min=0, help="Seed of the experiment; default: the profile's.")]
Datasets = Annotated[
    list[str] | None,
    Option("--datasets", "--dataset", help="Any of charades didemo activitynet; default: the profile's."),
]
Dataset = Annotated[str, Option("--dataset", metavar="NAME", help="One of charades, didemo and activitynet.")]
Seeds = Annotated[list[str] | None, Option("--seeds", metavar="N...", help="Seeds; default: the profile's.")]
Jobs = Annotated[
    int | None, Option("--jobs", min=1, help="Number of steps to run at once; default: the profile's.")
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="VideoSearch-R1, reproduced.")


def main(argv=None) -> int:
    """Run one command and return its exit status. Bad input is one line and 2; an error of ours keeps its traceback."""
    pipeline.use_this_clone()
    arguments = _join_lists(sys.argv[1:] if argv is None else argv)
    return pipeline.guard(lambda: _run(arguments))


def _run(arguments):
    try:
        status = app(arguments, "python -m vsr1", standalone_mode=False)
    except typer.exceptions.TyperException as error:
        message = f"{error.format_message().rstrip('.')}; see python -m vsr1 COMMAND --help"
        raise InputError(message) from error
    if status == pipeline.INTERRUPTED:  # typer has caught the interrupt
        raise KeyboardInterrupt
    return status


def _join_lists(argv):
    """Let one option take several words: `--datasets charades didemo` becomes `--datasets "charades didemo"`."""
    arguments = []
    for word in argv:
        if len(arguments) > 1 and arguments[-2] in LISTS and LISTS[arguments[-2]].fullmatch(word):
            arguments[-1] += f" {word}"
        else:
            arguments.append(word)
    return arguments


def _split(values):
    return re.split(r"[\s,]+", " ".join(values).strip(" ,")) if values else []


def _load(command, name, seed=None, datasets=(), shared=False):
    """Return the profile that a command works with, after setting up this process for it."""
    profile = config.load(name, seed, datasets)
    if name.endswith(".yaml"):
        config.claim(Path(name))
    pipeline.start(profile, command, shared)
    return profile


def _seeds(texts):
    numbers = _split(texts)
    if not all(number.isdecimal() for number in numbers):
        raise InputError(f"--seeds {' '.join(numbers)}: expected whole numbers from 0 up")
    return list(map(int, numbers))


def _per_dataset(command, work, name, seed, datasets, jobs, shared=False):
    """Do a command for every data set, in processes of their own where several are worked on at once."""
    profile = _load(command, name, seed, shared=shared)
    datasets = [config.check_dataset(dataset) for dataset in _split(datasets)] or profile.datasets
    steps = [
        pipeline.Step(f"{command} {dataset}", functools.partial(work, profile, dataset))
        for dataset in datasets
    ]
    return pipeline.run(steps, pipeline.count_jobs(profile, jobs))


@app.command("paper")
def make_paper(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None, jobs: Jobs = None):
    """Regenerate every table and figure, and print where the report is."""
    part = _load("paper", profile, seed, _split(datasets))
    status = paper.run(part, profile, pipeline.count_jobs(part, jobs))
    if status == 0:
        print(f"report: {os.path.relpath(part.results() / 'report.html')}")
    return status


@app.command()
def corpus(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None, jobs: Jobs = None):
    """Render the corpora, or import the real ones."""
    return _per_dataset("corpus", pipeline.corpus, profile, seed, datasets, jobs, shared=True)


@app.command()
def embed(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None, jobs: Jobs = None):
    """Embed videos and queries, and build the search index."""
    return _per_dataset("embed", pipeline.embed, profile, seed, datasets, jobs, shared=True)


@app.command()
def train(
    dataset: Dataset,
    stage: Annotated[
        Literal["sft", "ft", "grpo"], Option(help="sft: stage 1; ft: its baseline; grpo: stage 2.")
    ],
    variant: Annotated[str, Option(help="With --stage grpo: one of rollout.VARIANTS.")] = "vsr1",
    profile: Profile = "mini",
    seed: Seed = None,
):
    """Train one stage and its prerequisites."""
    loaded = _load("train", profile, seed, shared=True)
    name = variant if stage == "grpo" else stage
    work = functools.partial(pipeline.train, loaded, config.check_dataset(dataset, "--dataset"), name)
    return pipeline.run([pipeline.Step(f"train {name} {dataset}", work)], 1)


@app.command()
def evaluate(
    dataset: Dataset,
    systems: Annotated[
        list[str],
        Argument(help="Names in evaluate.RECIPES or runner.SYSTEMS, or sft-released, vsr1-released."),
    ],
    profile: Profile = "mini",
    seed: Seed = None,
):
    """Run systems on the test queries, after training what they need."""
    loaded = _load("evaluate", profile, seed, shared=True)
    work = functools.partial(pipeline.evaluate, loaded, config.check_dataset(dataset, "--dataset"))
    steps = [pipeline.Step(f"evaluate {name} {dataset}", functools.partial(work, name)) for name in systems]
    return pipeline.run(steps, 1)


@app.command()
def notebook(
    names: Annotated[
        list[str], Argument(metavar="NAME...", help="File names in notebooks/, without .ipynb.")
    ],
    profile: Profile = "mini",
    seed: Seed = None,
    datasets: Datasets = None,
    jobs: Jobs = None,
):
    """Run notebooks without a browser."""
    part = _load("notebook", profile, seed, _split(datasets))
    return pipeline.run(paper.notebook_steps(names, profile, part), pipeline.count_jobs(part, jobs))


@app.command()
def seeds(
    seeds: Annotated[
        list[str], Option("--seeds", metavar="N...", help="The seeds to train and evaluate with.")
    ],
    profile: Profile = "mini",
    datasets: Datasets = None,
    seed: Seed = None,
    jobs: Jobs = None,
):
    """Retrain and evaluate with other seeds, for tables R1, R2 and R4."""
    work = functools.partial(pipeline.seeds, numbers=_seeds(seeds))
    return _per_dataset("seeds", work, profile, seed, datasets, jobs)


@app.command()
def ablations(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None, jobs: Jobs = None):
    """Run longer studies beyond the paper, tables B1 to B4."""
    return _per_dataset("ablations", pipeline.ablations, profile, seed, datasets, jobs)


@app.command()
def premise(
    seeds: Seeds = None,
    profile: Profile = "mini",
    datasets: Datasets = None,
    seed: Seed = None,
    jobs: Jobs = None,
):
    """Measure all baselines without a loop, for tables P1 to P4 and R4."""
    work = functools.partial(pipeline.premise, numbers=_seeds(seeds))
    return _per_dataset("premise", work, profile, seed, datasets, jobs)


@app.command()
def exam(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None, jobs: Jobs = None):
    """Test claims written in advance on freshly rendered videos, once, for table X1."""
    return _per_dataset("exam", pipeline.exam, profile, seed, datasets, jobs)


@app.command()
def archives(
    profile: Profile = "archives",
    seeds: Seeds = None,
    cells: Annotated[
        list[str] | None, Option(help="Any of same-whole same-half casts-whole casts-half; default: all.")
    ] = None,
    jobs: Jobs = None,
):
    """Measure when looking at videos pays off, in a second rendered world, and print where the table is."""
    from vsr1.mini.archives import corpus

    chosen = _split(cells) or list(corpus.CELLS)
    if unknown := set(chosen) - corpus.CELLS.keys():
        raise InputError(
            f"--cells: no cell {', '.join(sorted(unknown))}; there are {', '.join(corpus.CELLS)}"
        )
    loaded, by_corpus = _load("archives", profile), {}
    for cell in chosen:
        by_corpus.setdefault(corpus.CELLS[cell][0], []).append(cell)
    steps = [
        pipeline.Step(
            f"archives {name}, seed {seed}", functools.partial(pipeline.archives, loaded, seed, part)
        )
        for seed in _seeds(seeds) or [loaded.seed]
        for name, part in by_corpus.items()
    ]
    status = pipeline.run(steps, pipeline.count_jobs(loaded, jobs))
    print(f"table: {os.path.relpath(loaded.results() / 'README.md')}")
    return status


@app.command()
def report(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None):
    """Write numbers, tables, figures and report.html, and print where they are."""
    from vsr1.report import html_report, results

    part = _load("report", profile, seed, _split(datasets))
    results.need_run(part)
    print(f"report: {os.path.relpath(html_report.publish(part))}")


@app.command()
def check(profile: Profile = "mini", seed: Seed = None, datasets: Datasets = None):
    """Compare measured numbers with expected ones: ok, close, OFF, MISSING."""
    from vsr1.report import html_report, results

    part = _load("check", profile, seed, _split(datasets))
    results.need_run(part)
    return html_report.check(part)


@app.command()
def readme(profile: Profile = "mini"):
    """Refresh the generated parts of README.md and docs/."""
    from vsr1.report import readme as page

    return page.write(_load("readme", profile))


@app.command()
def publish(profile: Profile = "mini"):
    """Copy executed notebooks into results/ with small pictures, and refresh all generated pages."""
    from vsr1.report import readme as page

    loaded = _load("publish", profile)
    for path in notebooks.publish(loaded):
        print(f"{path.relative_to(config.ROOT)}: {path.stat().st_size / 1000:.0f} kB")
    return page.write(loaded)


@app.command()
def doctor(profile: Profile = "mini", seed: Seed = None):
    """Print what this machine can reproduce, and what is missing."""
    from vsr1.apps import doctor as checks

    return checks.main(config.load(profile, seed))  # `pipeline.start` asks for packages that may be missing


@app.command()
def lab(port: Annotated[int, Option(help="Port; only this machine can connect.")] = 8888):
    """Open JupyterLab on the notebooks."""
    notebooks.lab(port)


@app.command()
def search(
    videos: Annotated[Path, Option(metavar="DIR", help="Folder to search, including subfolders.")],
    query: Annotated[
        str | None, Option(help="What to look for; without it, you are asked for queries.")
    ] = None,
    queries: Annotated[
        Path | None, Option(metavar="FILE", help="File of queries, one per line; - reads from a pipe.")
    ] = None,
    top: Annotated[int, Option(min=1, help="Number of moments to list.")] = 5,
    verdicts: Annotated[
        int | None,
        Option(min=0, help="Let the policy also judge this many of the best moments; 0: engine only."),
    ] = None,
    export: Annotated[
        Path | None, Option(metavar="DIR", help="Save each accepted moment as a file in this folder.")
    ] = None,
    profile: Profile = "mini",
    dataset: Annotated[str | None, Option(help="Use the policy trained on this data set.")] = None,
    weights: Annotated[
        str | None, Option(help="Weights of a policy: a folder, or a name on the hub.")
    ] = None,
    system: Annotated[
        str | None, Option(help="How to refine; default: sqr if the policy has heads, else walkdown.")
    ] = None,
    turns: Annotated[
        int | None, Option(min=1, help="Maximum number of turns; default: the profile's max_turns.")
    ] = None,
    index: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for index and pages; default: in indexes/PROFILE.")
    ] = None,
    retry: Annotated[
        bool, Option("--retry", help="Also retry unreadable files that have not changed.")
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print one JSON object per query on stdout, everything else on stderr.")
    ] = False,
):
    """Search a folder of your own videos: status 0 if a moment was accepted, 1 if none was."""
    from vsr1.apps import search_folder

    if query is not None and queries:
        raise InputError("--query and --queries: name one of them")
    how = {"k": top, "verdicts": verdicts, "turns": turns, "export": export}
    options = {"dataset": dataset, "weights": weights, "system": system, "index": index, "retry": retry}
    loaded = _load("search", profile)
    return search_folder.search_and_print(loaded, videos, query, queries, as_json, how, options)


@app.command()
def inspect(
    video: Annotated[Path, Argument(help="One video file.")],
    profile: Profile = "mini",
    png: Annotated[Path | None, Option(metavar="FILE", help="Write the frames as one image.")] = None,
    npz: Annotated[Path | None, Option(metavar="FILE", help="Write frames and timestamps.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
):
    """Show how a video is read, by which decoder and why, and the frames that the models see."""
    from vsr1.apps import inspect_video

    return inspect_video.main(config.load(profile), video, png, npz, as_json)


@app.command()
def demo(profile: Profile = "mini"):
    """Search a few rendered videos with the policy that ships with the package, turn by turn."""
    from vsr1.apps import demo as films

    films.run(_load("demo", profile))


@app.command()
def ship(
    profile: Profile = "mini",
    into: Annotated[Path | None, Option(help="Folder to write; default: the one that `demo` reads.")] = None,
):
    """Replace the adapters that `demo` searches with by those that `make paper` trained."""
    from vsr1.apps import demo as films

    print(films.ship(_load("ship", profile), into or ROOT / films.WEIGHTS))


@app.command()
def score(
    submission: Annotated[Path, Argument(help="JSON file with ranked predictions for all queries.")],
    groundtruth: Annotated[Path, Argument(help="FIG or TVR annotations, one JSON object per line.")],
    iou: Annotated[list[str] | None, Option(help="IoU thresholds; default: 0.3 0.5 0.7.")] = None,
    float32: Annotated[bool, Option("--float32", help="Round like TVR's evaluator.")] = False,
):
    """Score a submission to a FIG benchmark."""
    from vsr1.evaluation import fig_scorer

    fig_scorer.print_scores(submission, groundtruth, _split(iou), float32)


@app.command("download-release")
def download_release(
    dataset: Dataset,
    source: Annotated[
        str | None, Option(help="Folder with manifest.json, or hf://...; default: the hub.")
    ] = None,
    profile: Profile = "paper",
):
    """Download the authors' release, without its frames."""
    from vsr1.apps import download_release as release

    release.main(config.load(profile), config.check_dataset(dataset, "--dataset"), source)


@app.command()
def foundation(
    profile: Profile = "mini",
    recipes: Annotated[
        Path | None, Option(help="File with the training phases; default: vsr1/mini/recipes.yaml.")
    ] = None,
    into: Annotated[Path | None, Option(help="Folder for the models; default: vsr1/mini/weights/.")] = None,
):
    """Pretrain the mini models that ship with the package, and measure the engines (3 hours on 2 cores)."""
    from vsr1.mini import attribute_probe, pretraining

    phases = pretraining.read_recipes(recipes or pretraining.RECIPES)
    into = into or pretraining.WEIGHTS
    pretraining.pretrain(config.load(profile), phases, into)
    attribute_probe.measure_arena(config.load(profile), phases, into / attribute_probe.ARENA.name)


if __name__ == "__main__":
    sys.exit(main())
