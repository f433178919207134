"""Pretrain the mini models: one tiny Qwen3-VL taught the rendered world, then search engines and a policy from it.

Everything here is ours; it stands where Qwen's own training stands for the real models, and `make paper` never runs it.
Phases, each a step that starts from the weights of another (`recipes.yaml`): on the foundation split the backbone
learns to *see* (attributes of pairs of frames), to *name* (their captions), then to *tell* what happens when. An engine
first learns video vectors that a linear map from all seven attributes can tell apart (*index*: rich); then its *text*
side follows that index from captions whose colours are mostly wrong (coarse). What the index holds and the text side
misses is the room in which query refinement works. The policy is taught to keep in mind what each pair of frames shows
(*watch*), to *compare*, to judge, answer and rewrite (*instruct*), and to *locate* a moment.
"""

import json
import os
import resource
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import repeat
from multiprocessing import get_context
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
    return {name: config.parse(PhaseConfig, knobs, f"{path}: {name}") for name, knobs in phases.items()}


def pretrain(profile, recipes: dict[str, PhaseConfig], into: Path = WEIGHTS) -> None:
    """Train every phase, or leave what is current, and put the models where the package ships them.

    About 85 minutes on 2 cores; goes on with the phase at which it was stopped. Phases of one process that wait for the
    same phase run side by side.
    """
    pretraining_data.load_videos(profile)
    done = {""}
    while remaining := [phase for phase in recipes if phase not in done]:
        ready = [phase for phase in remaining if recipes[phase].start in done]
        if not ready:
            raise InputError(f"no phase to start from for {', '.join(remaining)}; look at `start`")
        single = [phase for phase in ready if recipes[phase].processes == 1]
        if recipes[ready[0]].processes > 1:
            single = ready[:1]
            train_phase(profile, ready[0], recipes[ready[0]])
        else:
            _train_side_by_side(profile, single, recipes)
        done.update(single)
        for phase in single:
            if recipes[phase].ships and not is_shipped(profile, phase, recipes[phase], into):
                print(f"{phase}: {publish(profile, phase, recipes, into)}", flush=True)


def _train_side_by_side(profile, phases, recipes):
    """Train phases of one process each, as many at once as there are cores."""
    try:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            list(pool.map(train_phase, repeat(profile), phases, [recipes[phase] for phase in phases]))
    except BrokenProcessPool as error:
        names = " or ".join(phases)
        raise InputError(f"training of {names} was killed; run the same command again to go on") from error


def train_phase(profile, phase: str, recipe: PhaseConfig) -> Path:
    """Train a phase and return its folder: weights in 32 bit, tokenizer, log."""
    home = profile.data_dir("foundation")
    pretraining_data.load_videos(profile)
    inputs = {"data": cache.metadata(home / "films")["key"], "recipe": asdict(recipe)}
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        cache.write_json(folder / "memory.json", {"peak_memory_gb_per_process": round(peak, 2)})
    dist.destroy_process_group()


# --- What the package ships


def publish(profile, phase: str, recipes: dict[str, PhaseConfig], into: Path) -> Path:
    """Write a phase's model as the package ships it: weights in 16 bit, tokenizer, logs, provenance."""
    home, target = profile.data_dir("foundation"), into / recipes[phase].ships
    kind = Qwen3VLModel if phase.startswith("text") else Qwen3VLForConditionalGeneration
    model, tokenizer = loading.load(kind, str(home / phase))
    shutil.rmtree(target, ignore_errors=True)
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = {"parameters": sum(weight.numel() for weight in model.parameters()), "phases": {}}
    while phase and not (facts["phases"] and recipes[phase].ships):  # back to the model it starts from
        facts["phases"][phase] = _phase_facts(home / phase, recipes[phase])
        shutil.copy(home / phase / "log.jsonl", target / f"{phase}.jsonl")
        phase = recipes[phase].start
    facts |= {"starts_from": phase or "random weights", "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "device": "cpu, one thread a process"}
    facts["data"] = "foundation splits of the mini world, rendered by vsr1.mini.renderer; no other data"
    cache.write_json(target / "provenance.json", facts)
    return target


def _phase_facts(folder, recipe):
    """Return knobs, memory, minutes and last line of the log of a trained phase."""
    last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    return asdict(recipe) | memory | {"last": last, "minutes": round(last["seconds"] / 60, 1)}


def is_shipped(profile, phase: str, recipe: PhaseConfig, into: Path) -> bool:
    """Return whether the model in `into` is what this phase made: its log is."""
    shipped, log = (
        into / recipe.ships / f"{phase}.jsonl",
        profile.data_dir("foundation") / phase / "log.jsonl",
    )
    return shipped.exists() and shipped.read_bytes() == log.read_bytes()
