"""Save and load policies, including the released checkpoints."""

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
EMBEDDER = "query_embedder"  # folder that may lie in such a checkpoint: the engine's query side


def load(name: str, profile) -> Policy:
    """Load the policy in a folder or on the hub, with its heads where it has a `vsr1.json`.

    Released checkpoints are converted first (`resolve_checkpoint`). Raises InputError for heads without a `vsr1.json`:
    nobody could say how they were trained.
    """
    torch.set_num_threads(profile.threads)
    folder = loading.download(resolve_checkpoint(name, profile))
    policy = _load(folder, _read_settings(folder), profile)
    policy.query_embedder = str(folder / EMBEDDER) if (folder / EMBEDDER).is_dir() else None
    return policy


def _load(folder, settings, profile):
    tensors = _head_tensors(folder)
    if settings is None and tensors:
        raise InputError(
            f"{folder}: soft-query heads but no vsr1.json that says how they were trained; restore it"
        )
    device = loading.pick_device(profile.device)
    model, tokenizer = loading.load(Qwen3VLForConditionalGeneration, str(folder), profile.dtype, device)
    heads = None if settings is None else _make_heads(folder, tensors, model)
    return Policy(model, tokenizer, heads, settings, profile.max_frame_pixels)


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
    if policy.heads is None:
        policy.tokenizer.save_pretrained(folder)
    else:
        save_heads(policy, folder)


def save_heads(policy: Policy, folder: Path, dtype=torch.float32) -> None:
    """Write tokenizer, heads and `vsr1.json` beside the weights that lie in `folder`."""
    policy.tokenizer.save_pretrained(folder)
    tensors = {
        key: value.detach().cpu().to(dtype).contiguous() for key, value in policy.heads.state_dict().items()
    }
    save_file(tensors, folder / "refine.safetensors")
    files = {path.name: cache.file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    settings = asdict(policy.settings)
    record = {"settings": settings, "settings_digest": cache.fingerprint(settings), "files": files}
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
        names = ", ".join(released_name(dataset, stage) for dataset in config.DATASETS for stage in (1, 2))
        raise InputError(f"{name}: no released checkpoint; there are {names}")
    if profile.sft_data is None:
        raise InputError(
            f"{name}: its system prompt stands in the released sft_data/train_oneturn.json; name that file as "
            f"`sft_data` in the profile {profile.name}"
        )
    messages = config.ROOT / profile.sft_data.replace("{dataset}", match[1])
    inputs = {"prompt": _released_system(messages), "dtype": profile.dtype}
    source, version = loading.download(name), loading.version(name)
    inputs |= {"checkpoint": version, "code": cache.source_digest(__name__)}

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
    settings = soft_heads.Settings(system=_released_system(messages), time_axis="frame_index")
    return _load(folder, settings, profile)


def _head_tensors(folder):
    """Return the tensors of soft-query heads in the safetensors files of a folder, {released name: float32}."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith("refine_")]
                tensors |= {name: file.get_tensor(name).float() for name in names}
        except SafetensorError as error:
            raise InputError(f"{path}: not readable ({error}); fetch it again") from error
    return tensors


def _make_heads(folder, tensors, model):
    """Make heads of tensors of the released names; the hidden width is the model's, D that of the tensors."""
    hidden, last = model.get_input_embeddings().embedding_dim, "refine_projector.3.weight"
    heads = soft_heads.SoftHeads(hidden, len(tensors[last]) if last in tensors else hidden)
    try:
        heads.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: heads that do not fit a policy of width {hidden}: {reason}") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} holds values that are not finite; fetch it again")
    return heads.to(model.device)


def _read_settings(folder):
    """Read `vsr1.json` and check that the folder's weights are those it was written for; None where there is none."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, files, digest = dict(record["settings"]), record["files"], record["settings_digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error!r}); restore it") from error
    if absent := [field.name for field in fields(soft_heads.Settings) if field.name not in settings]:
        raise InputError(f"{path}: settings.{absent[0]} is missing; restore it")  # a default would be a guess
    if cache.fingerprint(settings) != digest:
        raise InputError(f"{path}: settings were changed after training; restore it")
    for name, digest in files.items():
        if not (folder / name).exists() or cache.file_digest(folder / name) != digest:
            raise InputError(f"{folder / name}: not the file that vsr1.json was written for; restore it")
    return config.parse(soft_heads.Settings, settings, str(path))


def _released_system(path):
    """Return the system prompt that all rows of the released training file share."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        messages = [row["messages"][0] for row in rows]
        contents = [message["content"] for message in messages if message["role"] == "system"]
        texts = {content if isinstance(content, str) else content[0]["text"] for content in contents}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: no rows with messages ({error!r}); take train_oneturn.json") from error
    if len(contents) < len(rows) or len(texts) != 1:
        raise InputError(f"{path}: {len(texts)} system prompts in {len(rows)} rows; take train_oneturn.json")
    return texts.pop()
