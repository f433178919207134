"""Load Qwen3-VL models and tokenizers from a folder or the hub, and say which revision was used."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, Qwen3VLModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from vsr1 import cache, config
from vsr1.config import ROOT, InputError

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()  # of tensors: a missing one is refused here, and soft-query heads belong to no model

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # all that is fetched: no pickle, no code
REVISIONS = "runs/revisions.json"  # the commits of hub names


def local_path(name: str) -> str:
    """Where a model lives: a folder of the clone if there is one of that name, else a hub name, untouched."""
    return str(ROOT / name) if (ROOT / name).is_dir() else name


def download(name: str) -> Path:
    """The folder of a model: `place`, or what of it the hub has; `name@revision` asks for one commit, tag or branch.

    The commit of its first use is kept (`PINS`) and asked for from then on: the hub may move a name, a run stays.
    """
    if Path(local_path(name)).is_dir():
        return Path(local_path(name))
    if Path(name).is_absolute():
        raise InputError(f"{name}: no such folder")
    repository, _, revision = name.partition("@")
    wanted, file = revisions().get(name) or revision or None, config.ROOT / REVISIONS
    try:
        folder = Path(snapshot_download(repository, revision=wanted, allow_patterns=FILES))
    except (OSError, HFValidationError) as error:
        raise InputError(f"{name}: cannot fetch this model: {' '.join(str(error).split())[:300]}") from error
    known = revisions()  # read again: another process may have written while this one downloaded
    if name not in known:
        file.parent.mkdir(exist_ok=True)
        cache.write_json(file, known | {name: folder.name})  # a snapshot is called after its commit
    return folder


def revisions() -> dict[str, str]:
    """{hub name: the commit that it stands for in this clone}; empty before the first was fetched."""
    file = config.ROOT / REVISIONS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def version(name: str) -> str:
    """What tells a model from any other: the digest of its files; of a hub name, its commit, once that is known."""
    folder = Path(local_path(name))
    return cache.file_digest(folder) if folder.is_dir() else revisions().get(name) or download(name).name


def load(kind, name: str, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer) of class `kind`, in eval mode; safetensors only, no code from the checkpoint."""
    if name.startswith("vsr1/") and not Path(local_path(name)).is_dir():
        raise InputError(
            f"{name}: the mini model is missing; restore it with `git checkout {name}` or `make foundation`"
        )
    folder = download(name)
    _check_shards(folder)
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "ignore_mismatched_sizes": True}
    options |= attention(kind, dtype, device)
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name}: cannot load this model: {' '.join(str(error).split())[:300]}") from error
    if report["mismatched_keys"]:  # the library would fill both kinds with random numbers and go on
        key, found, wanted = sorted(report["mismatched_keys"])[0]
        raise InputError(f"{name}: tensor {key} is {list(found)}, but config.json asks for {list(wanted)}")
    if report["missing_keys"]:
        raise InputError(f"{name}: tensor {min(report['missing_keys'])} is missing from its safetensors")
    return model.to(device).eval(), tokenizer


def _check_shards(folder):
    """An index of safetensors that lists a pickle is refused: the library would open it."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not readable ({error!r}); fetch it again") from error
        if odd := sorted(str(name) for name in listed if not str(name).endswith(".safetensors")):
            raise InputError(f"{index}: lists {odd[0]}, which is no safetensors file; convert it first")


def attention(kind, dtype: str, device: str) -> dict:
    """The option that makes a model of class `kind` use flash-attention: where its package, a GPU, 16 bits are there.

    Else none: torch's own (sdpa). What speaks reads on from a cache under a mask of four dimensions (`read`), which
    flash-attention does not take: only its eyes get it, the search engine all of it.
    """
    if not (is_flash_attn_2_available() and device == "cuda" and dtype in ("bfloat16", "float16")):
        return {}
    flash = "flash_attention_2"
    chosen = flash if kind is Qwen3VLModel else {"text_config": "sdpa", "vision_config": flash}
    return {"attn_implementation": chosen}


def model_facts(model) -> dict:
    """What a record of work says of a model: device, attention of language side and eyes, commit if the hub had it."""
    folder, config = Path(model.name_or_path), model.config
    kinds = [part._attn_implementation for part in (config.text_config, config.vision_config)]
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {"device": str(model.device), "attention": kinds, "commit": commit}


def pick_device(wish: str) -> str:
    """The device a profile means: `auto` is the first GPU where there is one, else the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda asked for, but torch sees no GPU; set device: auto or cpu in the profile"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish
