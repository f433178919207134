"""Save and load policies, including the released checkpoints."""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import cache, config
from vsr1.config import InputError
from vsr1.models import loading, soft_heads
from vsr1.models.policy import Policy

AUTHORS = "VideoSearchR1/"  # whose checkpoints need their own prompt and times (METHOD.md 8)
EMBEDDER = "query_embedder"  # folder that may lie in such a checkpoint: the engine's query side


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load(name: str, profile) -> Policy:
    """The policy in a folder or on the hub (see `at`); with heads where the folder has a `vsr1.json`."""
    torch.set_num_threads(profile.threads)
    name = resolve_checkpoint(name, profile)
    folder = Path(loading.local_path(name))
    record, held = folder / "vsr1.json", _tensors(folder)
    own = _read_settings(record, folder) if record.exists() else None
    if own is None and any(key.startswith("refine_") for key in held):
        raise InputError(f"{folder}: soft-query heads but no vsr1.json; see policy.at")
    model, tokenizer = _model(name, profile)
    heads = None if own is None else _read_heads(folder, held, model)
    policy = Policy(model, tokenizer, heads, own, profile.max_frame_pixels)
    policy.query_embedder = str(folder / EMBEDDER) if (folder / EMBEDDER).is_dir() else None
    return policy


def save(policy: Policy, folder: Path) -> None:
    """A checkpoint that `load` reads; `vsr1.json` comes last and names the digest of every weight file.

    Adapters are merged: they are gone from the policy, and its weights are float32.
    """
    folder = Path(folder)
    if policy.adapters is not None:
        policy.model.float()  # a sum rounded to bfloat16 would lose most of what was learned
        policy.adapters.merge_and_unload()
        policy.adapters = None
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    if policy.heads is None:
        return
    tensors = {key: value.detach().cpu().contiguous() for key, value in policy.heads.state_dict().items()}
    save_file(tensors, folder / "refine.safetensors")
    settings = asdict(policy.settings) | {"code": cache.source_digest(__name__)}
    files = {path.name: cache.file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {"settings": settings, "system_sha256": _sha256(policy.settings.system), "files": files}
    cache.write_json(folder / "vsr1.json", record)


def released_name(dataset: str, stage: int) -> str:
    """What the authors call their checkpoint of a stage: a hub name, or a folder of that name in the clone."""
    return f"{AUTHORS}{dataset}-stage{stage}"


def resolve_checkpoint(name: str, profile) -> str:
    """Where `load` finds the policy called `name`: a released one is converted first, once.

    Then it lies in runs/<profile>/<dataset>/released/, with the engine of the checkpoint if one came along.
    """
    if not name.startswith(AUTHORS):
        return name
    found = re.fullmatch(f"{AUTHORS}({'|'.join(config.DATASETS)})-(stage[12])(@.+)?", name)
    if not found:
        known = ", ".join(released_name(dataset, stage) for dataset in config.DATASETS for stage in (1, 2))
        raise InputError(f"{name}: no released checkpoint; there are {known}")
    if profile.sft_data is None:
        raise InputError(
            f"{name}: its system prompt stands in the released sft_data/train_oneturn.json; name that file as "
            f"`sft_data` in the profile {profile.name}"
        )
    messages = config.ROOT / profile.sft_data.replace("{dataset}", found[1])
    prompt, source = _sha256(_released_system(messages)), loading.download(name)
    inputs = {"checkpoint": loading.version(name), "prompt": prompt}
    inputs |= {"dtype": profile.dtype, "code": cache.source_digest(__name__)}

    def convert(folder):
        save(convert_released(source, messages, profile), folder)
        if (source / EMBEDDER).is_dir():
            shutil.copytree(source / EMBEDDER, folder / EMBEDDER, dirs_exist_ok=True)

    return str(cache.build(profile.runs(found[1]) / "released" / found[2], inputs, convert))


def convert_released(folder: Path, messages: Path, profile) -> Policy:
    """The policy in a released checkpoint (METHOD.md 8); `save` it once, then `load` it like our own.

    messages  the released `sft_data/train_oneturn.json`, whose first message is the exact system prompt
    """
    held = _tensors(folder)
    settings = soft_heads.Settings(system=_released_system(Path(messages)), time_axis="frame_index")
    model, tokenizer = _model(str(folder), profile)
    return Policy(model, tokenizer, _read_heads(folder, held, model), settings, profile.max_frame_pixels)


def _model(name, profile):
    return loading.load(
        Qwen3VLForConditionalGeneration, name, profile.dtype, loading.pick_device(profile.device)
    )


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(folder):
    """{key: its file} of every tensor in a folder's safetensors files."""
    held = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                held |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise InputError(f"{path}: not readable ({error}); fetch it again") from error
    return held


def _read_heads(folder, held, model):
    """Heads from tensors of the released names; the hidden width is the model's, D that of the file."""
    hidden, last = model.get_input_embeddings().embedding_dim, "refine_projector.3.weight"
    found = {}
    for key, path in held.items():
        if key.startswith("refine_"):
            with safe_open(path, "pt") as file:
                found[key] = file.get_tensor(key).float()
    heads = soft_heads.SoftHeads(hidden, len(found[last]) if last in found else hidden)
    for key, wanted in heads.state_dict().items():
        if key not in found:
            raise InputError(f"{folder}: {key} is missing from its safetensors; fetch it again")
        if found[key].shape != wanted.shape:
            raise InputError(
                f"{held[key]}: {key} is {list(found[key].shape)}, but a policy of width {hidden} needs "
                f"{list(wanted.shape)}; the file belongs to another model"
            )
        if not found[key].isfinite().all():
            raise InputError(f"{held[key]}: {key} holds values that are not finite; fetch it again")
    if unknown := set(found) - set(heads.state_dict()):
        raise InputError(f"{held[min(unknown)]}: unknown tensor {min(unknown)}; a newer layout?")
    heads.load_state_dict(found)
    return heads.to(model.device)


def _read_settings(record, folder):
    """The settings in `vsr1.json`, after checking that the folder's weights are those it was written for."""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        settings, files, system_sha256 = dict(told["settings"]), dict(told["files"]), told["system_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record}: not readable ({error!r}); restore it") from error
    if absent := [field.name for field in fields(soft_heads.Settings) if field.name not in settings]:
        raise InputError(
            f"{record}: settings.{absent[0]} is missing; restore it"
        )  # a default would be a guess
    settings = config.parse(soft_heads.Settings, settings, str(record))
    if _sha256(settings.system) != system_sha256:
        raise InputError(f"{record}: settings.system was changed after training; restore it")
    for name, digest in files.items():
        if not (folder / name).exists() or cache.file_digest(folder / name) != digest:
            raise InputError(f"{folder / name}: not the file that vsr1.json was written for; restore it")
    return settings


def _released_system(path):
    """The system prompt that all rows of the released training file share."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        roles = {row["messages"][0]["role"] for row in rows}
        said = [row["messages"][0]["content"] for row in rows]
        texts = {content if isinstance(content, str) else content[0]["text"] for content in said}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: no rows with messages ({error!r}); take train_oneturn.json") from error
    if roles != {"system"} or len(texts) != 1:
        raise InputError(f"{path}: {len(texts)} system prompts in {len(rows)} rows; take train_oneturn.json")
    return texts.pop()
