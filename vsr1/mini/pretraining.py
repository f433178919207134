"""Pretrain the mini models: one tiny Qwen3-VL taught the rendered world, then search engines and a policy from it.

Everything here is ours; it stands where Qwen's own training stands for the real models, and `make paper` never runs it.
Phases, each a step that starts from the weights of another (`recipes.yaml`): on the foundation split the backbone
learns to *see* (attributes of pairs of frames), to *name* (their captions), then to *tell* what happens when. An engine
first learns video vectors that a linear map from all seven attributes can tell apart (*index*); then its *text* side
follows that index from captions that are true and coarse: few name a colour.
The policy is taught to keep in mind what each pair of frames shows (*watch*), to *compare*, to judge, answer and
rewrite (*instruct*), to *locate* a moment, to say what it shows, not what is asked for (*judge*), and where to *look*
that up. The policy of archives learns what colours look like through a camera in its place (*translate*).
"""

import json
import shutil
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
from vsr1.mini import pretraining_data, pretraining_tasks
from vsr1.mini.pretraining_tasks import PhaseConfig
from vsr1.models import loading

RECIPES = config.PACKAGE / "mini" / "recipes.yaml"
WEIGHTS = config.PACKAGE / "mini" / "weights"


def read_recipes(path: Path = RECIPES) -> dict[str, PhaseConfig]:
    """Return the phases of a recipe file, in order."""
    try:
        phases = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable yaml file of phases ({error})") from error
    recipes = {}
    for name, knobs in phases.items():
        recipe = config.parse(PhaseConfig, knobs, f"{path}: {name}")
        if recipe.start not in {"", *recipes}:
            raise InputError(f"{path}: {name}: start: {recipe.start} is no phase above it")
        recipes[name] = recipe
    return recipes


def pretrain(profile, recipes: dict[str, PhaseConfig], into: Path = WEIGHTS) -> None:
    """Train every phase, or leave what is current, and put the models where the package ships them.

    Two to three hours on 2 cores; goes on with the phase at which it was stopped.
    """
    for phase, recipe in recipes.items():
        folder = train_phase(profile, phase, recipe)
        if recipe.ships and not is_shipped(folder, into / recipe.ships):
            print(f"{phase}: {publish(folder, recipes, into)}", flush=True)


def train_phase(profile, phase: str, recipe: PhaseConfig) -> Path:
    """Train a phase and return its folder: weights in 32 bit, tokenizer, log."""
    home = profile.data_dir("foundation")
    pretraining_data.load_videos(profile)
    inputs = {"data": cache.metadata(home / "frames")["key"], "recipe": asdict(recipe)}
    inputs["code"] = cache.source_digest(__name__)
    inputs["from"] = cache.metadata(home / recipe.start)["key"] if recipe.start else None

    def work(folder):
        with tempfile.TemporaryDirectory() as meeting:
            job = (profile, phase, recipe, folder, f"{meeting}/ranks")
            torch.multiprocessing.spawn(_train_rank, job, nprocs=recipe.processes)

    return cache.build(home / phase, inputs, work)


def _train_rank(rank, profile, phase, recipe, folder, meeting):
    """Run one process of a training; the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=recipe.processes)
    task = pretraining_tasks.PretrainingTask(profile, recipe)
    pretraining_tasks.PHASES[phase.split("-")[0]](task, recipe, folder)
    if rank == 0:
        task.model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
    dist.destroy_process_group()


# --- What the package ships


def is_shipped(folder: Path, shipped: Path) -> bool:
    """Return whether a folder of the package holds the model of a trained phase: its log."""
    log = shipped / f"{folder.name}.jsonl"
    return log.exists() and log.read_bytes() == (folder / "log.jsonl").read_bytes()


def publish(folder: Path, recipes: dict[str, PhaseConfig], into: Path) -> Path:
    """Write a trained phase's model as the package ships it: weights in 16 bit, tokenizer, logs, provenance."""
    home, phase = folder.parent, folder.name
    target = into / recipes[phase].ships
    kind = Qwen3VLModel if phase.startswith("text") else Qwen3VLForConditionalGeneration
    model, tokenizer = loading.load(kind, str(folder))
    shutil.rmtree(target, ignore_errors=True)
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    phases = {}
    while phase and not (phases and recipes[phase].ships):  # back to the model it starts from
        log = shutil.copy(home / phase / "log.jsonl", target / f"{phase}.jsonl")
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        minutes = round(last["seconds"] / 60, 1)
        phases[phase] = asdict(recipes[phase]) | {"last": last, "minutes": minutes}
        phase = recipes[phase].start
    facts = {"parameters": sum(weight.numel() for weight in model.parameters()), "phases": phases}
    facts |= {"starts_from": phase or "random weights", "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "device": "cpu, one thread a process"}
    facts["data"] = "foundation splits of the mini world, rendered by vsr1.mini.renderer; no other data"
    cache.write_json(target / "provenance.json", facts)
    return target
