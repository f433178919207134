"""The mini foundation: one tiny Qwen3-VL taught the rendered world, then search engines and a policy made from it.

Everything here is ours; it stands where Qwen's own training stands for the real models. Phases, each a stage that
starts from the weights of another (`models/recipes.yaml`): on the `foundation` split the backbone learns to *see*
(attributes of single pictures), to *name* (their captions), then to *tell* what happens when (dense captions). An
engine first learns video vectors that a linear map from all seven attributes can tell apart (*index*: rich); then its
*text* side follows that index from captions whose colours are mostly wrong (coarse). What the index holds and the text
side misses is the room in which query refinement works (`headroom`). The policy is taught to keep in mind what each
pair of frames shows (*watch*), to *compare*, to judge, answer and rewrite (*instruct*), and to *locate* a moment.
LOG.md has what failed on the way.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import yaml
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import cache, config
from vsr1.config import InputError
from vsr1.mini import pretraining_tasks
from vsr1.mini.pretraining_tasks import PhaseConfig
from vsr1.models import loading


def recipes(path: Path = config.PACKAGE / "mini" / "recipes.yaml") -> dict[str, PhaseConfig]:
    """The phases of a recipe file, in order."""
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable yaml file of phases ({error})") from error
    return {name: config.parse(PhaseConfig, knobs, f"{path}: {name}") for name, knobs in kept.items()}


def train_phase(profile, phase: str, plan: dict[str, PhaseConfig]) -> Path:
    """The folder of a trained phase: weights in 32 bit, tokenizer, log. Resumes, or leaves what is up to date."""
    recipe, home = plan[phase], profile.data_dir("foundation")
    pretraining_tasks.load_films(profile)
    inputs = {"data": cache.metadata(home / "films")["key"], "recipe": asdict(recipe)}
    inputs["code"] = cache.source_digest(__name__)
    inputs["from"] = cache.metadata(home / recipe.start)["key"] if recipe.start else None

    def work(folder):
        with tempfile.TemporaryDirectory() as meeting:
            job = (profile, phase, recipe, folder, f"{meeting}/ranks")
            torch.multiprocessing.spawn(_work, job, nprocs=recipe.processes)

    return cache.build(home / phase, inputs, work)


def _work(rank, profile, phase, recipe, folder, meeting):
    """One process of a training run; the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=recipe.processes)
    lesson = pretraining_tasks.PretrainingTask(profile, recipe)
    pretraining_tasks.PHASES[phase.split("-")[0]](lesson, recipe, folder)
    if rank == 0:
        lesson.model.save_pretrained(folder)
        lesson.tokenizer.save_pretrained(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cache.write_json(folder / "memory.json", {"peak_memory_gb_per_process": round(peak, 2)})
        (folder / "state.pt").unlink()  # only for resuming
    dist.destroy_process_group()


def publish(profile, phase: str, plan: dict[str, PhaseConfig], into: Path) -> Path:
    """A phase's model as the package ships it: weights in 16 bit, tokenizer, logs and provenance of its own phases."""
    home, shipped = profile.data_dir("foundation"), into / plan[phase].ships
    kind = Qwen3VLModel if phase.startswith("text") else Qwen3VLForConditionalGeneration
    model, tokenizer = loading.load(kind, str(home / phase))
    shutil.rmtree(shipped, ignore_errors=True)
    facts = {"parameters": sum(weight.numel() for weight in model.parameters()), "phases": {}}
    model.half().save_pretrained(shipped)
    tokenizer.save_pretrained(shipped)
    while phase and not (facts["phases"] and plan[phase].ships):  # back to the model it starts from
        log = (home / phase / "log.jsonl").read_text(encoding="utf-8")
        last = json.loads(log.splitlines()[-1])
        told = json.loads((home / phase / "memory.json").read_text(encoding="utf-8")) | {"last": last}
        told["minutes"] = round(last["seconds"] / 60, 1)
        facts["phases"][phase] = asdict(plan[phase]) | told
        (shipped / f"{phase}.jsonl").write_text(log, encoding="utf-8")
        phase = plan[phase].start
    facts |= {"starts_from": phase or "random weights", "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "device": "cpu, one thread a process"}
    facts["data"] = "foundation splits of the mini world, rendered by vsr1.miniworld; no other data"
    cache.write_json(shipped / "provenance.json", facts)
    return shipped


def is_shipped(profile, phase: str, plan: dict[str, PhaseConfig], into: Path) -> bool:
    """Whether what lies in `into` is what this phase made: its log is."""
    kept, log = (
        into / plan[phase].ships / f"{phase}.jsonl",
        profile.data_dir("foundation") / phase / "log.jsonl",
    )
    return kept.exists() and kept.read_bytes() == log.read_bytes()


def make(profile, plan: dict[str, PhaseConfig], command: list[str], into: Path) -> None:
    """Train every phase, or leave what is up to date, and put the models where the package ships them.

    Phases of one process that wait for the same ones run side by side, each by `command` and its name.
    """
    pretraining_tasks.load_films(profile)
    done = {""}
    while len(done) <= len(plan):
        ready = [phase for phase, recipe in plan.items() if phase not in done and recipe.start in done]
        if not ready:
            raise InputError(f"no phase to start from for {', '.join(plan.keys() - done)}; look at `start`")
        single = [phase for phase in ready if plan[phase].processes == 1][: os.cpu_count()]
        if plan[ready[0]].processes > 1:
            train_phase(profile, ready[0], plan)
            done.add(ready[0])
        else:
            children = [subprocess.Popen([*command, "--phase", phase], cwd=config.ROOT) for phase in single]
            if any([child.wait() for child in children]):
                raise InputError(
                    f"training of {' or '.join(single)} stopped; run the same command again to go on"
                )
            done.update(single)
        for phase in [name for name in plan if name in done and plan[name].ships]:
            if not is_shipped(profile, phase, plan, into):
                print(f"{phase}: {publish(profile, phase, plan, into)}", flush=True)


def main(argv: list[str]) -> int:
    """`make foundation`: about 85 minutes on 2 cores; goes on where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m vsr1 foundation", description=main.__doc__)
    parser.add_argument("--profile", default="mini", help="whose world to render and learn")
    parser.add_argument("--recipes", type=Path, help="another file of phases than vsr1/models/recipes.yaml")
    parser.add_argument(
        "--into", type=Path, default=config.PACKAGE / "mini" / "weights", help="where the models go"
    )
    parser.add_argument("--phase", help="only this phase; those before it must be done")
    args = parser.parse_args(argv)
    profile, plan = config.load(args.profile), recipes(args.recipes) if args.recipes else recipes()
    if args.phase:
        if args.phase not in plan:
            raise InputError(f"--phase {args.phase}: no such phase; there are {', '.join(plan)}")
        train_phase(profile, args.phase, plan)
        return 0
    command = [sys.executable, "-m", "vsr1", "foundation", "--profile", args.profile]
    command += ["--recipes", str(args.recipes.resolve())] if args.recipes else []
    make(profile, plan, command, args.into)
    return 0
