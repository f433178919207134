"""Load Qwen3-VL models and tokenizers from a folder or the hub, and say which revision was used."""

import json
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, Qwen3VLModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from vsr1 import cache, config
from vsr1.config import REVISIONS, InputError, revisions

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()  # of tensors: a missing one is refused here, and soft-query heads belong to no model

MODEL_TYPE = "qwen3_vl"
ADAPTERS = "adapter_config.json"  # PEFT's file: the folder holds differences to the base that it names
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # all that is fetched: no pickle, no code


def _local_folder(name):
    """Return the folder that is called `name`, in the clone or from here; a hub name is none that exists."""
    return config.ROOT / name if (config.ROOT / name).is_dir() else Path(name)


def download(name: str) -> Path:
    """Return the folder of a model: that of the clone, or the hub's snapshot, fetched if it is not on this machine.

    `name@revision` asks for one commit, tag or branch. The commit of the first use is kept in `REVISIONS` and asked
    for from then on: the hub may move a name, a run stays. Raises InputError where nothing can be fetched.
    """
    if (folder := _local_folder(name)).is_dir():
        return folder
    if name.startswith("vsr1/"):
        raise InputError(
            f"{name}: the mini model is missing; restore it with `git checkout {name}` or `make foundation`"
        )
    if Path(name).is_absolute():
        raise InputError(f"{name}: no such folder")
    repository, _, revision = name.partition("@")
    wanted = revisions().get(name) or revision or None
    try:
        folder = Path(snapshot_download(repository, revision=wanted, allow_patterns=FILES))
    except (OSError, HFValidationError) as error:
        raise InputError(f"{name}: cannot fetch this model: {_one_line(error)}") from error
    if name in revisions():
        return folder
    with cache.updated_json(config.ROOT / REVISIONS) as commits:
        commit = commits.setdefault(name, folder.name)  # a snapshot folder is called after its commit
    return folder if commit == folder.name else download(name)  # another process was first, at another commit


def version(name: str) -> str:
    """Return what tells a model from any other: the digest of its folder's files, or the commit of a hub name."""
    folder = _local_folder(name)
    return cache.file_digest(folder) if folder.is_dir() else revisions().get(name) or download(name).name


def load(kind, name: str, dtype: str = "float32", device: str = "cpu"):
    """Load (model, tokenizer) of class `kind` in eval mode; safetensors only, no code from the checkpoint.

    Raises InputError for a missing, unreadable or misshapen tensor: the library would fill it with random numbers.
    """
    folder = download(name)
    if (folder / ADAPTERS).exists():
        return _load_adapted(kind, folder, dtype, device)
    _check_config(folder)
    _check_shards(folder)
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "ignore_mismatched_sizes": True}
    options |= attention(kind, dtype, device)
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{name}: cannot load this model: {_one_line(error)}") from error
    if report["mismatched_keys"]:
        key, shape, wanted = sorted(report["mismatched_keys"])[0]
        raise InputError(f"{name}: tensor {key} is {list(shape)}, but config.json asks for {list(wanted)}")
    unknown = report["unexpected_keys"]
    if missing := report["missing_keys"]:
        other = f"; what it has and nothing here is called: {min(unknown)}" if unknown else ""
        raise InputError(
            f"{name}: tensor {min(missing)} is missing from its safetensors, {len(missing)} in all{other}"
        )
    _check_values(name, model)
    return model.to(device).eval(), tokenizer


def _load_adapted(kind, folder, dtype, device):
    """Load a policy that is kept as adapters: its base, with their differences added in float32."""
    from peft import PeftConfig, PeftModel  # slow to import, and nothing else here needs it

    settings = PeftConfig.from_pretrained(folder)
    base = settings.base_model_name_or_path
    if version(base) != settings.revision:
        raise InputError(
            f"{folder}: made for other weights than {base} has now; restore both, or train again"
        )
    model, _ = load(kind, base)
    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # peft asks for an old name in the library
        adapted = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return adapted.to(device, getattr(torch, dtype)).eval(), AutoTokenizer.from_pretrained(folder)


def _one_line(error):
    return " ".join(str(error).split())[:300]


def _check_config(folder):
    """Refuse a folder without the config.json of such a model: the library would make one of the largest size."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error!r}); fetch it again") from error
    if not str(kind).startswith(MODEL_TYPE):  # a mixture of experts too: a teacher may be one
        raise InputError(f"{path}: a model of type {kind}, not {MODEL_TYPE}; name another model")


def _check_shards(folder):
    """Refuse an index of safetensors that lists a pickle, which the library would open, or a file that is not there."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not readable ({error!r}); fetch it again") from error
        for file in sorted(files, key=str):
            if not str(file).endswith(".safetensors"):
                raise InputError(f"{index}: lists {file}, which is no safetensors file; convert it first")
            if not (folder / file).exists():
                raise InputError(f"{index}: lists {file}, which is not there; fetch it again")


def _check_values(name, model):
    """Refuse tensors that are not finite, and an output layer of its own where config.json says that it is shared."""
    for key, tensor in model.named_parameters():
        if not tensor.detach().sum(dtype=torch.float32).isfinite():
            raise InputError(f"{name}: tensor {key} holds numbers that are not finite; fetch it again")
    head = model.get_output_embeddings()
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        if head.weight is not model.get_input_embeddings().weight:
            raise InputError(
                f"{name}: config.json says tie_word_embeddings, but its lm_head.weight differs from its embeddings; "
                "correct one of them"
            )


def attention(kind, dtype: str, device: str) -> dict:
    """Return the option that turns on flash-attention where its package, a GPU and 16-bit weights are there, else {}.

    The policy decodes with a KV cache under a mask of four dimensions (`decoding.extend`), which flash-attention does
    not take: only its vision tower gets it. The search engine gets it in both towers.
    """
    if not (is_flash_attn_2_available() and device == "cuda" and dtype in ("bfloat16", "float16")):
        return {}
    flash = "flash_attention_2"
    chosen = flash if kind is Qwen3VLModel else {"text_config": "sdpa", "vision_config": flash}
    return {"attn_implementation": chosen}


def model_facts(model) -> dict:
    """Return what a record says of a model: device, attention of text and vision tower, commit if it is the hub's."""
    folder, towers = Path(model.name_or_path), (model.config.text_config, model.config.vision_config)
    commit = folder.name if folder.parent.name == "snapshots" else None
    attentions = [tower._attn_implementation for tower in towers]
    return {"device": str(model.device), "attention": attentions, "commit": commit}


def pick_device(wish: str) -> str:
    """Return the device that a profile names; `auto` is the GPU where there is one, else the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device: cuda asked for, but torch sees no GPU; set device: auto or cpu in the profile"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wish == "auto" else wish
