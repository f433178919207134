"""The agent: it sees a query and one video, and says in words whether they fit, where, or that it will search again.

A `Policy` is a Qwen3-VL with its tokenizer and, once it can refine, its soft-query heads and the settings they were
trained with. A checkpoint is a folder of the library's own files plus `refine.safetensors` (the heads) and `vsr1.json`
(the settings, of which the released checkpoints record none: `convert_released`).
"""

import contextlib
import copy
import hashlib
import json
import re
import shutil
import weakref
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import frames, params, qwen, stages
from vsr1.params import InputError

REFINE = "<REFINE>"
AUTHORS = "VideoSearchR1/"  # whose checkpoints need their own prompt and times (METHOD.md 8)
EMBEDDER = "query_embedder"  # folder that may lie in such a checkpoint: the engine's query side

# --- what the policy is told (METHOD.md 4: the sentences; the wording is ours) ---------------------------------------

_JUDGE = (
    "You judge one retrieved video against a query. Inside <think> </think>, compare step by step what the query asks "
    "with what the video shows; be short and say only what is visible. "
    "If a scene fits, answer <answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end>"
)
_REJECT = "If no scene fits, answer <answer>not_matched</answer>"
_ONLY = "Write nothing outside the tags."
SYSTEM = f"{_JUDGE} {REFINE}. {_REJECT} {REFINE}; the token starts a refined search. Always end with {REFINE}. {_ONLY}"
SYSTEM_ZS = f"{_JUDGE}. {_REJECT}. {_ONLY}"  # a model without the token
SYSTEM_HQR = f"{_JUDGE}. {_REJECT} <query_update>TEXT</query_update> with a better query. {_ONLY}"  # reasoned
REWRITE = (  # blind and seen
    "The first search with this query failed. Rewrite the query so that the search engine finds the right video. "
    "Answer <query_update>TEXT</query_update>."
)


# --- heads and settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a checkpoint must say about how its soft queries were made; a default is the official code's value."""

    system: str = SYSTEM  # the exact system prompt
    n_soft: int = 8
    gate: Literal["off"] = "off"
    seed_norm: Literal["pre", "post"] = "pre"  # the state at <REFINE>: before or after the final norm
    insertion: Literal["before the closing <|im_end|>"] = "before the closing <|im_end|>"
    pooling: Literal["last"] = "last"
    carry_blocks: int = 1  # C: soft tokens of how many turns stand in a query
    instruction: str = "Represent the user's input."
    query_tokens: int = 128
    time_axis: Literal["true", "frame_index"] = "true"  # times shown: seconds as seen, or frame numbers
    turns: int = 1  # T_train
    refine_init: Literal["zero", "default", "scaled"] = "zero"
    code: str = "unknown"  # digest of the modules that wrote it


class SoftHeads(nn.Module):
    """The modules of soft query refinement, named as in the released checkpoints (METHOD.md 3.1); float32.

    init  "zero": the last layer of P starts at zero, as in the official code; "default": at the library's random
          values; "scaled" (ours): the same, and what A and B hand out is as long as a token embedding
    lengths  of the token embeddings of policy and engine, for "scaled"
    """

    def __init__(
        self, hidden: int, width: int, init: str = "zero", lengths: tuple[float, float] | None = None
    ):
        super().__init__()
        self.refine_projector = nn.Sequential(  # P: a state of the policy to a soft token
            nn.Linear(hidden, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)
        )
        self.refine_latent_input_projector = nn.Sequential(  # A: a soft token to the policy's next input
            nn.LayerNorm(width), nn.Linear(width, hidden)
        )
        self.refine_append_input_projector = nn.Sequential(  # B: a soft token to an input of the engine
            nn.LayerNorm(width), nn.Linear(width, width)
        )
        self.refine_gate = nn.Linear(hidden, 1).requires_grad_(False)  # official: saved, never used
        for linear in (self.refine_latent_input_projector[1], self.refine_append_input_projector[1]):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        for weight in self.refine_gate.parameters():
            nn.init.zeros_(weight)
        if init == "zero":
            for weight in self.refine_projector[3].parameters():
                nn.init.zeros_(weight)
        if init == "scaled":
            # A LayerNorm's output is sqrt(D) long: 10 to 18 token embeddings of the mini models.
            ways_in = self.refine_latent_input_projector, self.refine_append_input_projector
            for way_in, length in zip(ways_in, lengths, strict=True):
                nn.init.constant_(way_in[0].weight, length / width**0.5)

    def P(self, states: torch.Tensor) -> torch.Tensor:
        """Soft tokens (..., D) from states of the policy (..., H)."""
        return _full(self.refine_projector, states)

    def A(self, latents: torch.Tensor) -> torch.Tensor:
        """Inputs of the policy (..., H) from soft tokens (..., D)."""
        return _full(self.refine_latent_input_projector, latents)

    def B(self, latents: torch.Tensor) -> torch.Tensor:
        """Inputs of the engine (..., D) from soft tokens (..., D)."""
        return _full(self.refine_append_input_projector, latents)

    @property
    def width(self) -> int:
        """D: of soft tokens, and of the engine they are for."""
        return self.refine_projector[3].out_features


def _full(module, values):
    """`module` in its own precision, float32, even where training runs under autocast."""
    with torch.autocast(values.device.type, enabled=False):
        return module(values.to(module[-1].weight.dtype))


# --- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """One reply, exactly as it was sampled. `branch` holds on to the KV cache of its batch: use it, then let it go."""

    ids: list[int]  # up to and including the first <|im_end|>
    logps: list[float]  # log-probability of each id
    ended: bool  # False: cut at the limit
    text: str  # special tokens kept, <|im_end|> dropped
    branch: qwen.Context | None  # all that was read before the last <REFINE>; None: it was not said


@dataclass(frozen=True)
class Replay:
    """Replies of a batch read once more, for training."""

    logps: torch.Tensor  # (B, L) of each token; 0 in the padding
    said: torch.Tensor  # (B, L) True on the sampled tokens: all of a reply, nothing else
    branches: list[qwen.Context | None]  # as in `Completion`


class Policy:
    """Model, tokenizer, and what refinement needs; without heads it can still judge, ground and rewrite in words."""

    def __init__(self, model, tokenizer, heads: SoftHeads | None, settings: Settings | None, pixels: int):
        self.model, self.tokenizer, self.heads, self.settings = model, tokenizer, heads, settings
        self.frame_pixels, self.name = pixels, tokenizer.name_or_path or "policy"
        self.adapters = None  # of LoRA, while it learns (`sft.adapt`)
        self.seen = weakref.WeakKeyDictionary()  # {clip: its `qwen.Video`}, as long as the clip is kept
        self.embedder = None  # folder of the engine that came with it, if one did
        self.stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.mark = None if heads is None else refine_id(tokenizer, model)  # the id of <REFINE>
        config, rows = model.config, model.get_input_embeddings().num_embeddings
        # A vision id in a reply is a placeholder without a picture (STACK.md 2.6); the rows above the tokenizer's own
        # are no tokens at all.
        self.banned = torch.arange(rows, device=model.device) >= len(tokenizer)
        for kind in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            self.banned[getattr(config, kind)] = True

    @contextlib.contextmanager
    def bare(self):
        """Inside, the policy is what it was before it got adapters; without any, what it is."""
        if self.adapters is None:
            yield
            return
        self.adapters.disable_adapter_layers()
        try:
            yield
        finally:
            self.adapters.enable_adapter_layers()

    @contextlib.contextmanager
    def merged(self):
        """Inside, the weights hold what adapters add to them: to speak takes a third of the products then.

        Not weights in 16 bits: in the sum most of what was learned would be lost.
        """
        if self.adapters is None or self.model.dtype != torch.float32:
            yield
            return
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        own = [weight.data for weight in weights]
        with torch.no_grad():
            for layer in layers:
                layer.merge(safe_merge=True)  # into a copy
        try:
            yield
        finally:
            for layer, weight, data in zip(layers, weights, own, strict=True):
                layer.unmerge()
                weight.data = data  # a difference would not be what it was

    def prompt(self, system: str, query: str, clip: frames.Clip | str | None = None) -> qwen.Prompt:
        """One user turn: the query, and the retrieved video where there is one, or words for it (METHOD.md 4)."""
        if clip is None or isinstance(clip, str):
            return qwen.Prompt(self._ids(system, f'Query: "{query}"' if clip is None else told(query, clip)))
        config = self.model.config.vision_config
        if clip not in self.seen:
            self.seen[clip] = qwen.Video(*qwen.patchify(clip.frames, config, self.frame_pixels))
        video = self.seen[clip]
        per_pair = video.grid[1] * video.grid[2] // config.spatial_merge_size**2
        by_number = self.settings is not None and self.settings.time_axis == "frame_index"
        seen_at = np.arange(len(clip.frames), dtype=float) if by_number else clip.seen_at
        return qwen.Prompt(self._ids(system, told(query, qwen.video_text(seen_at, per_pair))), video)

    def _ids(self, system, user):
        return self.tokenizer(qwen.chat(self.tokenizer, system, user), add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def reply(
        self, prompts: list[qwen.Prompt], *, group=1, max_new, temperature=0.0, top_p=1.0, rng=None
    ) -> list[Completion]:
        """`group` replies to each prompt, prompt after prompt, as one batch; each prompt and video is read once.

        group  one number, or one for each prompt
        rng    (numpy) draws one uniform number for each token a reply may have; or one rng for each prompt

        temperature 0 is greedy and takes no rng.
        """
        assert (rng is None) == (temperature == 0), "an rng is for sampling, and sampling needs one"
        context, now = self.begin(prompts, group)
        draws = None
        if rng is not None:
            counts = [group] * len(prompts) if isinstance(group, int) else group
            rngs = rng if isinstance(rng, list) else [rng] * len(prompts)
            draws = [one.random((count, max_new)) for one, count in zip(rngs, counts, strict=True)]
            draws = torch.from_numpy(np.concatenate(draws)).to(now.device)
        said = qwen.decode(self.model, context, now, self.rules(max_new, temperature, top_p), draws)
        return [self._completion(one, context.seen.shape[1]) for one in said]

    def _completion(self, said, columns):
        ended = said.ids[-1] == self.stop
        text = self.tokenizer.decode(said.ids[:-1] if ended else said.ids, skip_special_tokens=False)
        branch = self._branch(said.context, said.row, said.ids, columns)
        return Completion(said.ids, said.logps, ended, text, branch)

    def replay(
        self, prompts: list[qwen.Prompt], replies: list[list[int]], *, group=1, temperature=0.0
    ) -> Replay:
        """Given replies, read in one forward with gradients: what `reply` recorded comes out again, token for token."""
        context, now = self.begin(prompts, group)
        columns, lengths = context.seen.shape[1], torch.tensor([[len(reply)] for reply in replies])
        ids = [torch.tensor(reply) for reply in replies]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.stop).to(now.device)
        said = (torch.arange(ids.shape[1]) < lengths).to(now.device)
        rules = self.rules(ids.shape[1], temperature)
        context, logps = qwen.replay(self.model, context, now, ids, rules)
        branches = [self._branch(context, row, reply, columns) for row, reply in enumerate(replies)]
        return Replay(logps.masked_fill(~said, 0.0), said, branches)

    @torch.no_grad()
    def marked(self, prompts: list[qwen.Prompt], replies: list[list[int]]) -> list[tuple]:
        """(ids, branch) of each reply as if it ended in <REFINE>: what heads on a model that never says it can read."""
        asked = [[*(token for token in ids if token != self.stop), self.mark, self.stop] for ids in replies]
        return list(zip(asked, self.replay(prompts, asked).branches, strict=True))

    def begin(self, prompts: list[qwen.Prompt], group=1, share=True) -> tuple[qwen.Context, torch.Tensor]:
        """What the policy has read when it starts on `group` replies to each prompt, and its states (B, H) there."""
        context, now = qwen.prefill(self.model, prompts, self.tokenizer.pad_token_id, share)
        counts = torch.tensor(group if isinstance(group, list) else [group] * len(prompts), device=now.device)
        rows = torch.arange(len(prompts), device=now.device).repeat_interleave(counts)
        return context.rows(rows), now[rows]

    def _branch(self, context, row, ids, columns):
        """All that was read before the last <REFINE> of a reply that begins at column `columns`."""
        if self.mark not in ids:
            return None
        return context.cut(row, columns + len(ids) - 1 - ids[::-1].index(self.mark))

    def rules(self, limit: int, temperature: float, top_p: float = 1.0) -> qwen.Rules:
        """How this policy speaks."""
        return qwen.Rules(self.stop, self.banned, limit, temperature, top_p)


def told(query: str, video: str) -> str:
    """The user's words: a query, and the retrieved video as text."""
    return f'Query: "{query}"\nRetrieved video: {video}'


def refine_id(tokenizer, model) -> int:
    """The id of <REFINE>: one token, with a row in the embedding matrix."""
    ids = tokenizer(REFINE, add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().num_embeddings
    if len(ids) != 1 or ids[0] >= rows:
        name = tokenizer.name_or_path or "tokenizer"
        raise InputError(
            f"{name}: {REFINE} encodes to {ids}, not to one id below {rows}; take the checkpoint's own"
        )
    return ids[0]


def new_heads(policy: Policy, settings: Settings, seed: int, engine=None) -> Policy:
    """`policy` with fresh heads and a tokenizer that knows <REFINE>; the heads fit `engine` (else the policy itself).

    The model is shared: its row for the new token, unused until now, is set to the mean of the used rows.
    """
    model, tokenizer = policy.model, copy.deepcopy(policy.tokenizer)
    (rows, hidden), used = model.get_input_embeddings().weight.shape, len(tokenizer)
    if tokenizer.add_tokens([REFINE], special_tokens=True):  # else it knows it, and the row has been trained
        if used >= rows:
            raise InputError(f"{policy.name}: {rows} embeddings for {used} tokens leave none for {REFINE}")
        with torch.no_grad():
            for layer in (
                model.get_input_embeddings(),
                model.get_output_embeddings(),
            ):  # mostly the same matrix
                layer.weight[used] = layer.weight[:used].mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lengths = word_length(policy), word_length(engine or policy)
        heads = SoftHeads(hidden, engine.width if engine else hidden, settings.refine_init, lengths)
    return Policy(model, tokenizer, heads.to(model.device), settings, policy.frame_pixels)


def word_length(reader) -> float:
    """Mean length of the token embeddings of a policy or an engine, over the tokens its tokenizer knows."""
    rows = reader.model.get_input_embeddings().weight[: len(reader.tokenizer)]
    return rows.detach().float().norm(dim=1).mean().item()


def new_settings(profile, instruction: str) -> Settings:
    """What a profile says about refinement; `instruction` is the engine's, with its full stop."""
    shared = ("n_soft", "seed_norm", "carry_blocks", "query_tokens", "refine_init")
    return Settings(instruction=instruction, **{name: getattr(profile, name) for name in shared})


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load(name: str, profile) -> Policy:
    """The policy in a folder or on the hub (see `at`); with heads where the folder has a `vsr1.json`."""
    torch.set_num_threads(profile.threads)
    name = at(name, profile)
    folder = Path(qwen.place(name))
    record, held = folder / "vsr1.json", _tensors(folder)
    own = _read_settings(record, folder) if record.exists() else None
    if own is None and any(key.startswith("refine_") for key in held):
        raise InputError(f"{folder}: soft-query heads but no vsr1.json; see policy.at")
    model, tokenizer = _model(name, profile)
    heads = None if own is None else _read_heads(folder, held, model)
    policy = Policy(model, tokenizer, heads, own, profile.frame_pixels)
    policy.embedder = str(folder / EMBEDDER) if (folder / EMBEDDER).is_dir() else None
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
    settings = asdict(policy.settings) | {"code": stages.code("qwen", "policy", "refine")}
    files = {path.name: stages.digest(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {"settings": settings, "system_sha256": _sha256(policy.settings.system), "files": files}
    stages.write_json(folder / "vsr1.json", record)


def released_name(dataset: str, stage: int) -> str:
    """What the authors call their checkpoint of a stage: a hub name, or a folder of that name in the clone."""
    return f"{AUTHORS}{dataset}-stage{stage}"


def at(name: str, profile) -> str:
    """Where `load` finds the policy called `name`: a released one is converted first, once.

    Then it lies in runs/<profile>/<dataset>/released/, with the engine of the checkpoint if one came along.
    """
    if not name.startswith(AUTHORS):
        return name
    found = re.fullmatch(f"{AUTHORS}({'|'.join(params.DATASETS)})-(stage[12])(@.+)?", name)
    if not found:
        known = ", ".join(released_name(dataset, stage) for dataset in params.DATASETS for stage in (1, 2))
        raise InputError(f"{name}: no released checkpoint; there are {known}")
    if profile.sft_data is None:
        raise InputError(
            f"{name}: its system prompt stands in the released sft_data/train_oneturn.json; name that file as "
            f"`sft_data` in the profile {profile.name}"
        )
    messages = params.ROOT / profile.sft_data.replace("{dataset}", found[1])
    prompt, source = _sha256(_released_system(messages)), qwen.fetch(name)
    inputs = {"checkpoint": qwen.version(name), "prompt": prompt}
    inputs |= {"dtype": profile.dtype, "code": stages.code("policy", "qwen")}

    def convert(folder):
        save(convert_released(source, messages, profile), folder)
        if (source / EMBEDDER).is_dir():
            shutil.copytree(source / EMBEDDER, folder / EMBEDDER, dirs_exist_ok=True)

    return str(stages.run(profile.runs(found[1]) / "released" / found[2], inputs, convert))


def convert_released(folder: Path, messages: Path, profile) -> Policy:
    """The policy in a released checkpoint (METHOD.md 8); `save` it once, then `load` it like our own.

    messages  the released `sft_data/train_oneturn.json`, whose first message is the exact system prompt
    """
    held = _tensors(folder)
    settings = Settings(system=_released_system(Path(messages)), time_axis="frame_index")
    model, tokenizer = _model(str(folder), profile)
    return Policy(model, tokenizer, _read_heads(folder, held, model), settings, profile.frame_pixels)


def _model(name, profile):
    return qwen.load(Qwen3VLForConditionalGeneration, name, profile.dtype, qwen.pick_device(profile.device))


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
    heads = SoftHeads(hidden, len(found[last]) if last in found else hidden)
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
    if absent := [field.name for field in fields(Settings) if field.name not in settings]:
        raise InputError(
            f"{record}: settings.{absent[0]} is missing; restore it"
        )  # a default would be a guess
    settings = params.record(Settings, settings, str(record))
    if _sha256(settings.system) != system_sha256:
        raise InputError(f"{record}: settings.system was changed after training; restore it")
    for name, digest in files.items():
        if not (folder / name).exists() or stages.digest(folder / name) != digest:
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
