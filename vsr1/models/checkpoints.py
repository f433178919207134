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

AUTHORS = "VideoSearchR1/"  # whose checkpoints need their own prompt and times (docs/method.md section 8)
SETTINGS = "vsr1.json"  # file of a checkpoint: how its heads were trained
# Settings of older checkpoints: other names for two, and three that had one value each, now the only way.
FORMER_SETTINGS = {"seed_norm": "first_latent_state", "query_tokens": "max_query_tokens"}
FORMER_SETTINGS |= dict.fromkeys(("gate", "insertion", "pooling"))
EMBEDDER = "query_embedder"  # folder that may lie in such a checkpoint: the engine's query side


def load(name: str, profile) -> Policy:
    """Load the policy in a folder or on the hub, with its heads where it has a `vsr1.json`.

    Released checkpoints are converted first (`resolve_checkpoint`). Raises InputError for heads without a `vsr1.json`:
    nobody could say how they were trained.
    """
    torch.set_num_threads(profile.threads)
    name = resolve_checkpoint(name, profile)
    folder = loading.download(name)
    tensors, settings = _tensor_files(folder), _read_settings(folder)
    if settings is None and any(key.startswith("refine_") for key in tensors):
        raise InputError(
            f"{folder}: soft-query heads but no vsr1.json that says how they were trained; restore it"
        )
    model, tokenizer = _load_model(name, profile)
    heads = None if settings is None else _read_heads(folder, tensors, model)
    policy = Policy(model, tokenizer, heads, settings, profile.max_frame_pixels)
    policy.query_embedder = str(folder / EMBEDDER) if (folder / EMBEDDER).is_dir() else None
    return policy


def has_heads(name: str) -> bool:
    """Return whether a checkpoint in a folder or on the hub has soft-query heads of ours."""
    return (loading.download(name) / SETTINGS).exists()


def save(policy: Policy, folder: Path) -> None:
    """Write a checkpoint that `load` reads; `vsr1.json` comes last and names the digest of every weight file.

    Adapters are merged into the policy's weights, which become float32.
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
    cache.write_json(folder / SETTINGS, record)


def released_name(dataset: str, stage: int) -> str:
    """Return the authors' name of their checkpoint of a stage: a hub name, or a folder of that name in the clone."""
    return f"{AUTHORS}{dataset}-stage{stage}"


def resolve_checkpoint(name: str, profile) -> str:
    """Return where `load` finds the policy called `name`; a released one is converted first, once per commit.

    It is converted into runs/<profile>/<dataset>/released/<stage>-<commit>, with the engine of the checkpoint if one
    came along.
    """
    if not name.startswith(AUTHORS):
        return name
    match = re.fullmatch(f"{AUTHORS}({'|'.join(config.DATASETS)})-(stage[12])(@.+)?", name)
    if not match:
        known = ", ".join(released_name(dataset, stage) for dataset in config.DATASETS for stage in (1, 2))
        raise InputError(f"{name}: no released checkpoint; there are {known}")
    if profile.sft_data is None:
        raise InputError(
            f"{name}: its system prompt stands in the released sft_data/train_oneturn.json; name that file as "
            f"`sft_data` in the profile {profile.name}"
        )
    messages = config.ROOT / profile.sft_data.replace("{dataset}", match[1])
    prompt, source, version = (
        _sha256(_released_system(messages)),
        loading.download(name),
        loading.version(name),
    )
    inputs = {"checkpoint": version, "prompt": prompt, "dtype": profile.dtype}
    inputs |= {"code": cache.source_digest(__name__)}

    def convert(folder):
        save(convert_released(source, messages, profile), folder)
        if (source / EMBEDDER).is_dir():
            shutil.copytree(source / EMBEDDER, folder / EMBEDDER, dirs_exist_ok=True)

    folder = profile.runs(match[1]) / "released" / f"{match[2]}-{version[:12]}"
    return str(cache.build(folder, inputs, convert))


def convert_released(folder: Path, messages: Path, profile) -> Policy:
    """Return the policy in a released checkpoint (docs/method.md section 8); `save` it once, then `load` it.

    messages  the released `sft_data/train_oneturn.json`, whose first message is the exact system prompt
    """
    settings = soft_heads.Settings(system=_released_system(Path(messages)), time_axis="frame_index")
    tensors = _tensor_files(folder)
    model, tokenizer = _load_model(str(folder), profile)
    heads = _read_heads(folder, tensors, model)
    return Policy(model, tokenizer, heads, settings, profile.max_frame_pixels)


def _load_model(name, profile):
    device = loading.pick_device(profile.device)
    return loading.load(Qwen3VLForConditionalGeneration, name, profile.dtype, device)


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_files(folder):
    """Return {key: file} of every tensor in a folder's safetensors files."""
    files = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise InputError(f"{path}: not readable ({error}); fetch it again") from error
    return files


def _read_heads(folder, files, model):
    """Read heads from tensors of the released names; the hidden width is the model's, D that of the file."""
    hidden, last = model.get_input_embeddings().embedding_dim, "refine_projector.3.weight"
    tensors = {}
    for key, path in files.items():
        if key.startswith("refine_"):
            with safe_open(path, "pt") as file:
                tensors[key] = file.get_tensor(key).float()
    heads = soft_heads.SoftHeads(hidden, len(tensors[last]) if last in tensors else hidden)
    for key, expected in heads.state_dict().items():
        if key not in tensors:
            raise InputError(f"{folder}: {key} is missing from its safetensors; fetch it again")
        if tensors[key].shape != expected.shape:
            raise InputError(
                f"{files[key]}: {key} is {list(tensors[key].shape)}, but a policy of width {hidden} needs "
                f"{list(expected.shape)}; the file belongs to another model"
            )
        if not tensors[key].isfinite().all():
            raise InputError(f"{files[key]}: {key} holds values that are not finite; fetch it again")
    if unknown := set(tensors) - set(heads.state_dict()):
        raise InputError(f"{files[min(unknown)]}: unknown tensor {min(unknown)}; a newer layout?")
    heads.load_state_dict(tensors)
    return heads.to(model.device)


def _read_settings(folder):
    """Read `vsr1.json` and check that the folder's weights are those it was written for; None where there is none."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, files, system_sha256 = (
            dict(record["settings"]),
            dict(record["files"]),
            record["system_sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error!r}); restore it") from error
    settings = {FORMER_SETTINGS.get(key, key): value for key, value in settings.items()}
    settings.pop(None, None)
    if absent := [field.name for field in fields(soft_heads.Settings) if field.name not in settings]:
        raise InputError(f"{path}: settings.{absent[0]} is missing; restore it")  # a default would be a guess
    settings = config.parse(soft_heads.Settings, settings, str(path))
    if _sha256(settings.system) != system_sha256:
        raise InputError(f"{path}: settings.system was changed after training; restore it")
    for name, digest in files.items():
        if not (folder / name).exists() or cache.file_digest(folder / name) != digest:
            raise InputError(f"{folder / name}: not the file that vsr1.json was written for; restore it")
    return settings


def _released_system(path):
    """Return the system prompt that all rows of the released training file share."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        messages = [row["messages"][0] for row in rows]
        roles, contents = (
            {message["role"] for message in messages},
            [message["content"] for message in messages],
        )
        texts = {content if isinstance(content, str) else content[0]["text"] for content in contents}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: no rows with messages ({error!r}); take train_oneturn.json") from error
    if roles != {"system"} or len(texts) != 1:
        raise InputError(f"{path}: {len(texts)} system prompts in {len(rows)} rows; take train_oneturn.json")
    return texts.pop()
