"""Qwen3-VL plumbing that the search engine and the policy share: prompts to ids, frames to patches, batches to states,
and reading on from what was read before.

The ids and the patches are made here, in the open, because the library's own processor doubles the vision wrapper,
needs torchvision and picks frames by average rate (STACK.md 2.4, 2.9, 2.10). The layout is transformers 4.57.1's, which
the released weights were trained with; a golden test pins it.
"""

import json
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, DynamicCache, Qwen3VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as hf_logging

from vsr1 import params, stages
from vsr1.params import ROOT, InputError

if not torch.cuda.is_available():
    # Else the library copies keys and values for each head that shares them: a quarter of attention's time here.
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()  # of tensors: a missing one is refused here, and soft-query heads belong to no model

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # all that is fetched: no pickle, no code
PINS = "runs/revisions.json"  # the commits of hub names


@dataclass(eq=False)
class Video:
    """A video as the model takes it in: patches, until its eyes have made features of them (`_see`)."""

    patches: torch.Tensor | None  # (P, 3 * 2 * patch * patch) float32
    grid: tuple[int, int, int]  # pairs of frames, patch rows, patch columns; P is their product
    features: list[torch.Tensor] | None = (
        None  # (P / merge^2, H) each: for the input, and for the first layers
    )


@dataclass(frozen=True)
class Prompt:
    """One row before batching: token ids, and its video if there is one."""

    ids: list[int]  # (L,)
    video: Video | None = None


def place(name: str) -> str:
    """Where a model lives: a folder of the clone if there is one of that name, else a hub name, untouched."""
    return str(ROOT / name) if (ROOT / name).is_dir() else name


def fetch(name: str) -> Path:
    """The folder of a model: `place`, or what of it the hub has; `name@revision` asks for one commit, tag or branch.

    The commit of its first use is kept (`PINS`) and asked for from then on: the hub may move a name, a run stays.
    """
    if Path(place(name)).is_dir():
        return Path(place(name))
    if Path(name).is_absolute():
        raise InputError(f"{name}: no such folder")
    repository, _, revision = name.partition("@")
    wanted, file = pins().get(name) or revision or None, params.ROOT / PINS
    try:
        folder = Path(snapshot_download(repository, revision=wanted, allow_patterns=FILES))
    except (OSError, HFValidationError) as error:
        raise InputError(f"{name}: cannot fetch this model: {' '.join(str(error).split())[:300]}") from error
    known = pins()  # read again: another process may have written while this one downloaded
    if name not in known:
        file.parent.mkdir(exist_ok=True)
        stages.write_json(file, known | {name: folder.name})  # a snapshot is called after its commit
    return folder


def pins() -> dict[str, str]:
    """{hub name: the commit that it stands for in this clone}; empty before the first was fetched."""
    file = params.ROOT / PINS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def version(name: str) -> str:
    """What tells a model from any other: the digest of its files; of a hub name, its commit, once that is known."""
    folder = Path(place(name))
    return stages.digest(folder) if folder.is_dir() else pins().get(name) or fetch(name).name


def load(kind, name: str, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer) of class `kind`, in eval mode; safetensors only, no code from the checkpoint."""
    if name.startswith("vsr1/") and not Path(place(name)).is_dir():
        raise InputError(
            f"{name}: the mini model is missing; restore it with `git checkout {name}` or `make foundation`"
        )
    folder = fetch(name)
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


def facts(model) -> dict:
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


def chat(tokenizer, system: str, user: str) -> str:
    """The prompt text up to where the assistant speaks."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def video_text(seen_at: np.ndarray, tokens_per_pair: int) -> str:
    """A video as text: for each pair of frames the mean of their two times and its placeholders.

    >>> video_text(np.array([0.0, 1.0]), 1)
    '<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>'
    """
    assert len(seen_at) % 2 == 0, len(seen_at)
    pads = "<|video_pad|>" * tokens_per_pair
    times = pair_times(seen_at)
    return "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)


def pair_times(seen_at: np.ndarray) -> np.ndarray:
    """(T / 2,) seconds of each pair of frames, from those of T frames."""
    return seen_at.reshape(-1, 2).mean(axis=1)


def fit(height: int, width: int, multiple: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of a frame for the model: sides in multiples, at most `max_pixels`, aspect kept (nearly).

    >>> fit(128, 128, 32, 4096), fit(480, 854, 32, 200704)
    ((64, 64), (320, 576))
    """
    rows, columns = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        rows, columns = (max(multiple, int(side / shrink) // multiple * multiple) for side in (height, width))
    return rows, columns


def patchify(frames: np.ndarray, config, max_pixels: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches (P, 3 * 2 * patch * patch) in [-1, 1] and their grid, from frames (T, H, W, 3) uint8, T even.

    The order is Qwen2-VL's: pairs of frames, then blocks of merge x merge patches, then the patches of a block.
    """
    patch, merge = config.patch_size, config.spatial_merge_size
    assert config.temporal_patch_size == 2 and len(frames) % 2 == 0
    pixels = (
        torch.from_numpy(np.require(frames, requirements=["C", "W"])).permute(0, 3, 1, 2).float()
    )  # (T, 3, H, W)
    height, width = fit(*pixels.shape[2:], patch * merge, max_pixels)
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).round().clamp(0, 255)
    pixels = pixels / 127.5 - 1
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(-1, 2, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = (len(frames) // 2, rows, columns)
    return blocks.reshape(grid[0] * rows * columns, -1), grid


def collate(prompts: list[Prompt], model, pad: int, known: int = 0, pixels=True) -> dict[str, torch.Tensor]:
    """A left-padded batch, with every position spelled out, since the model guesses them wrongly (STACK.md 2.2, 2.3).

    input_ids (B, L), attention_mask (B, known + L); position_ids (3, B, L); with videos also pixel_values_videos,
    video_grid_thw and mm_token_type_ids.

    known   how many tokens all begin with that a cache holds (`opening`): they are left out, the padding follows them
    pixels  False leaves pixel_values_videos out
    """
    length = max(len(prompt.ids) for prompt in prompts) - known
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = prompt.ids[known:]
        ids[row, length - len(own) :] = torch.tensor(own)
        mask[row, length - len(own) :] = 1
    videos = [prompt.video for prompt in prompts if prompt.video is not None]
    if not videos:
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(3, -1, -1)}
    else:
        kinds = (ids == model.config.video_token_id).int() * 2
        grids = torch.tensor([video.grid for video in videos])
        core = getattr(model, "model", model)
        positions, _ = core.get_rope_index(ids, kinds, video_grid_thw=grids, attention_mask=mask)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "video_grid_thw": grids}
        batch |= {"mm_token_type_ids": kinds}
        if pixels:
            batch["pixel_values_videos"] = torch.cat([video.patches for video in videos])
    batch["position_ids"] = batch["position_ids"] + known
    batch["attention_mask"] = F.pad(mask, (known, 0), value=1)
    return {name: value.to(model.device) for name, value in batch.items()}


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in groups of similar length whose padded size stays within `max_tokens`; longest first.

    Longest first, so that a batch too large for the memory fails at once and not after an hour.

    >>> batches([5, 9, 5], 10)
    [[1], [0, 2]]
    """
    groups, group = [], []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            groups.append(group)
            group = []
        group.append(row)
    return [*groups, group] if group else groups


class Portions:
    """Work on rows all at once; where memory does not suffice, in halves from then on. It is said, and happens once."""

    def __init__(self, knob: str):
        self.knob, self.parts = knob, 1

    def run(self, work, rows: list) -> list:
        """[work(some of the rows)], in their order; what had been done when memory ran out is done again."""
        size = -(-len(rows) // self.parts)
        try:
            return [work(rows[at : at + size]) for at in range(0, len(rows), size)]
        except torch.OutOfMemoryError:
            if self.parts > 1 or len(rows) < 2:
                raise
        self.parts = 2
        warnings.warn(
            f"{len(rows)} at once do not fit in memory: half of {self.knob} from now on", stacklevel=2
        )
        return self.run(work, rows)


# --- reading on ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What the model has read, row by row: keys and values of every layer (the KV cache), and where each row stands.

    Reading on makes a new one and leaves the old one as it was: any number of continuations may branch off, each with
    its own gradient.
    """

    memory: tuple  # of each layer: keys and values, (B, heads, L, width of a head)
    seen: torch.Tensor  # (B, L) True where a later token may look: not at padding
    last: torch.Tensor  # (B,) position of the last token: one number, not three, since it is text

    def rows(self, some: torch.Tensor) -> "Context":
        """The rows that `some` picks, by number or by mask; a number may repeat."""
        memory = tuple((keys[some], values[some]) for keys, values in self.memory)
        return Context(memory, self.seen[some], self.last[some])

    def cut(self, row: int, length: int) -> "Context":
        """One row alone, as it was when `length` columns had been read, without padding before it. All are views.

        Padding behind an `opening` stays, and is not seen.
        """
        start = int(self.seen[row].int().argmax())
        one, columns = slice(row, row + 1), slice(start, length)
        memory = tuple((keys[one, :, columns], values[one, :, columns]) for keys, values in self.memory)
        unread = self.seen.shape[1] - length  # all of it text, one position each
        return Context(memory, self.seen[one, columns], self.last[one] - unread)


def stack(contexts: list[Context]) -> Context:
    """Contexts of one row each as one batch, padded on the right: what is not seen may stand anywhere."""
    spare = [-context.seen.shape[1] for context in contexts]
    spare = [n - min(spare) for n in spare]
    side = lambda layer, k: torch.cat(  # noqa: E731
        [F.pad(context.memory[layer][k], (0, 0, 0, n)) for context, n in zip(contexts, spare, strict=True)]
    )
    memory = tuple((side(layer, 0), side(layer, 1)) for layer in range(len(contexts[0].memory)))
    seen = torch.cat([F.pad(context.seen, (0, n)) for context, n in zip(contexts, spare, strict=True)])
    return Context(memory, seen, torch.cat([context.last for context in contexts]))


class _Memory:
    """As much of the library's cache as attention asks for; it appends to a copy, never in place."""

    def __init__(self, layers):
        self.layers = list(layers)

    def update(self, keys, values, layer, *_):
        old_keys, old_values = self.layers[layer]
        self.layers[layer] = (torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2))
        return self.layers[layer]


class _Room(_Memory):
    """The same, but it appends in place, to columns made `ROOM` at a time: for rows that no other row branches off."""

    ROOM = 32

    def __init__(self, layers):
        super().__init__(layers)
        self.used, self.rooms = [layer[0].shape[2] for layer in layers], list(layers)

    def update(self, keys, values, layer, *_):
        used, end = self.used[layer], self.used[layer] + keys.shape[2]
        if end > self.rooms[layer][0].shape[2]:
            more = max(self.ROOM, keys.shape[2])
            self.rooms[layer] = tuple(F.pad(part[:, :, :used], (0, 0, 0, more)) for part in self.rooms[layer])
        for room, new in zip(self.rooms[layer], (keys, values), strict=True):
            room[:, :, used:end] = new
        self.used[layer] = end
        self.layers[layer] = tuple(room[:, :, :end] for room in self.rooms[layer])
        return self.layers[layer]


def room(context: Context) -> _Memory:
    """The memory of a context that is read on in place, for `read`; where there are gradients, in copies."""
    return (_Memory if torch.is_grad_enabled() else _Room)(context.memory)


@contextmanager
def _final_norm(core):
    """A list that gets what goes into the final norm; `hidden_states[-1]` is that or its result (STACK.md 2.7)."""
    assert not (core.training and core.is_activation_checkpointing), "it drops the cache (STACK.md 2.8)"
    inputs = []
    hook = core.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


def common(prompts: list[Prompt], video: int) -> list[int]:
    """The ids that all prompts begin with, up to `video`, where a video begins; at least one of each is left.

    Of a single prompt none: nobody shares them.

    >>> common([Prompt([1, 2, 3, 9]), Prompt([1, 2, 3])], 9), common([Prompt([1, 9, 3, 4]), Prompt([1, 9, 3, 5])], 9)
    ([1, 2], [1])
    """
    if len(prompts) == 1:
        return []
    shortest = min((prompt.ids for prompt in prompts), key=len)
    same = lambda at: shortest[at] != video and all(p.ids[at] == shortest[at] for p in prompts)  # noqa: E731
    return shortest[: next((at for at in range(len(shortest) - 1) if not same(at)), len(shortest) - 1)]


def opening(model, ids: list[int], rows: int) -> DynamicCache:
    """A cache in which `rows` rows have read `ids`, words alone; they are read once, forward and backward.

    The system prompt is a third of what the mini models read.
    """
    cache = DynamicCache()
    if ids:
        tokens = torch.tensor([ids], device=model.device)
        model.model.language_model(input_ids=tokens, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


def _see(model, videos: list[Video]):
    """What the eyes make of videos, as the library puts it; None without any.

    As long as the eyes do not learn, it takes the place of the patches: a video is looked at once.
    """
    if not videos:
        return None
    if any(weight.requires_grad for weight in model.model.visual.parameters()):
        return _features(model, videos)
    if fresh := list(dict.fromkeys(video for video in videos if video.features is None)):
        found = _features(model, fresh)
        layers = zip(found.pooler_output, *found.deepstack_features, strict=True)
        for video, parts in zip(fresh, layers, strict=True):
            video.features, video.patches = (
                [part.clone() for part in parts],
                None,
            )  # not a view of all of them
    first, *deep = zip(*(video.features for video in videos), strict=True)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=deep)


def _features(model, videos):
    patches = torch.cat([video.patches for video in videos]).to(model.device)
    grids = torch.tensor([video.grid for video in videos], device=model.device)
    return model.model.get_video_features(patches, grids, return_dict=True)


def prefill(model, prompts: list[Prompt], pad: int, share=True) -> tuple[Context, torch.Tensor]:
    """What the model has read after prompts and their videos, and its states (B, H) at their ends, after the norm.

    share  read what all of them begin with once; False, for comparison: row by row
    """
    words = common(prompts, model.config.vision_start_token_id) if share else []
    cache, batch = opening(model, words, len(prompts)), collate(prompts, model, pad, len(words), pixels=False)
    seen = {"video": _see(model, [prompt.video for prompt in prompts if prompt.video is not None])}
    with _final_norm(model.model.language_model):
        post = model.model(**batch, past_key_values=cache, mm_encoder_outputs=seen).last_hidden_state
    last = batch["position_ids"][:, :, -1]  # (3, B)
    assert (last == last[0]).all(), "a prompt has to end in text"
    memory = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Context(memory, batch["attention_mask"].bool(), last[0]), post[:, -1]


def read(
    model, context: Context, embeds: torch.Tensor, memory: _Memory | None = None
) -> tuple[Context, torch.Tensor, torch.Tensor]:
    """What the model has read after embeddings (B, L, H) more, and its states there before and after the final norm.

    Words and soft tokens are read alike: one position each. `memory` is that of the context, unless it is handed over.
    """
    core, (rows, count) = model.model.language_model, embeds.shape[:2]
    memory = memory or _Memory(context.memory)
    new = context.seen.new_ones(rows, count, count).tril()  # each sees itself and those before it
    sight = torch.cat([context.seen[:, None].expand(-1, count, -1), new], dim=2)[:, None]
    positions = context.last[:, None] + torch.arange(1, count + 1, device=embeds.device)  # (B, L)
    options = {
        "attention_mask": sight,
        "position_ids": positions.expand(3, -1, -1),
        "past_key_values": memory,
    }
    with _final_norm(core) as inputs:
        post = core(inputs_embeds=embeds, **options).last_hidden_state
    seen = torch.cat([context.seen, new[:, -1]], dim=1)
    return Context(tuple(memory.layers), seen, positions[:, -1]), inputs[0], post


# --- speaking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """How a reply is spoken."""

    stop: int  # the token that ends it
    banned: torch.Tensor  # (vocabulary,) True where a token may not be said
    limit: int  # tokens of the longest reply
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # only the likeliest tokens that together hold this much of the mass may be said


@dataclass(frozen=True)
class Said:
    """One reply, and the row of a context where the model has read it (the last token excepted)."""

    ids: list[int]  # exactly those sampled, `stop` included where it was reached
    logps: list[float]
    context: Context
    row: int


def log_probs(logits: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Log-probabilities (..., vocabulary), float32, of the distribution that replies are drawn from.

    Rollout and replay share it. At temperature 0 it is that of temperature 1.
    """
    logits = logits.float() / (rules.temperature or 1.0)
    logp = logits.masked_fill(rules.banned, -torch.inf).log_softmax(dim=-1)
    if rules.top_p == 1.0:
        return logp
    ordered, tokens = logp.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp()
    beyond = mass.cumsum(dim=-1) - mass >= rules.top_p  # likelier tokens hold it without this one
    return logp.masked_fill(torch.zeros_like(beyond).scatter(-1, tokens, beyond), -torch.inf).log_softmax(-1)


def choose(logp: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
    """(B,) tokens: where uniform draws (B,) fall in the cumulated probabilities (B, vocabulary), or the likeliest."""
    if draws is None:
        return logp.argmax(dim=-1)
    mass = logp.double().exp().cumsum(dim=-1)
    found = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)[:, 0]
    return found.clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def decode(model, context: Context, now: torch.Tensor, rules: Rules, draws=None) -> list[Said]:
    """Every row continued in step, from the state (B, H) of its last token to `stop` or the limit.

    draws  (B, limit) float64, uniform in [0, 1), for sampling; each row has its own, so no row depends on the others

    When half of the rows have ended, the other half goes on alone: one endless reply costs a row, not a batch.
    """
    rows = torch.arange(len(now), device=now.device)  # which reply each row of the batch is
    ids = rows.new_full((len(rows), rules.limit), rules.stop)
    logps, homes = torch.zeros(ids.shape, device=ids.device), {}
    ended, memory = torch.zeros_like(rows, dtype=torch.bool), room(context)
    for step in range(rules.limit):
        logp = log_probs(model.lm_head(now), rules)  # (B, vocabulary)
        token = choose(logp, None if draws is None else draws[rows, step]).masked_fill(ended, rules.stop)
        ids[rows, step], logps[rows, step] = token, logp.gather(1, token[:, None])[:, 0]
        ended = ended | (token == rules.stop)
        if ended.all() or step + 1 == rules.limit:
            break
        if 2 * ended.sum() > len(rows):
            homes |= {row: (context, at) for at, row in enumerate(rows.tolist()) if ended[at]}
            rows, token, context, ended = rows[~ended], token[~ended], context.rows(~ended), ended[~ended]
            memory = room(context)
        context, _, post = read(model, context, model.get_input_embeddings()(token)[:, None], memory)
        now = post[:, -1]
    homes |= {row: (context, at) for at, row in enumerate(rows.tolist())}
    said = []
    for row, spoken in enumerate(ids.tolist()):
        end = spoken.index(rules.stop) + 1 if rules.stop in spoken else rules.limit
        said.append(Said(spoken[:end], logps[row, :end].tolist(), *homes[row]))
    return said


def replay(model, context: Context, now: torch.Tensor, ids: torch.Tensor, rules: Rules):
    """What the model has read after given replies (B, L), and log-probabilities (B, L) of them; differentiable."""
    context, _, post = read(model, context, model.get_input_embeddings()(ids))
    before = torch.cat([now[:, None], post[:, :-1]], dim=1)  # (B, L, H): what each token was chosen from
    logp = log_probs(model.lm_head(before), rules)  # (B, L, vocabulary)
    return context, logp.gather(2, ids[..., None])[..., 0]
