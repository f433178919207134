"""The agent: it sees a query and one video, and says in words whether they fit, where, or that it will search again.

A `Policy` is a Qwen3-VL with its tokenizer and, once it can refine, its soft-query heads and the settings they were
trained with. A checkpoint is a folder of the library's own files plus `refine.safetensors` (the heads) and `vsr1.json`
(the settings, of which the released checkpoints record none: `convert_released`).
"""

import contextlib
import copy
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from vsr1.config import InputError
from vsr1.data import video_reader
from vsr1.models import decoding, inputs, prompt_text, soft_heads

# --- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """One reply, exactly as it was sampled. `branch` holds on to the KV cache of its batch: use it, then let it go."""

    ids: list[int]  # up to and including the first <|im_end|>
    logps: list[float]  # log-probability of each id
    ended: bool  # False: cut at the limit
    text: str  # special tokens kept, <|im_end|> dropped
    refine_context: (
        decoding.Context | None
    )  # all that was read before the last <REFINE>; None: it was not said


@dataclass(frozen=True)
class Replay:
    """Replies of a batch read once more, for training."""

    logps: torch.Tensor  # (B, L) of each token; 0 in the padding
    completion_mask: torch.Tensor  # (B, L) True on the sampled tokens: all of a reply, nothing else
    refine_contexts: list[decoding.Context | None]  # as in `Completion`


class Policy:
    """Model, tokenizer, and what refinement needs; without heads it can still judge, ground and rewrite in words."""

    def __init__(
        self,
        model,
        tokenizer,
        heads: soft_heads.SoftHeads | None,
        settings: soft_heads.Settings | None,
        pixels: int,
    ):
        self.model, self.tokenizer, self.heads, self.settings = model, tokenizer, heads, settings
        self.max_frame_pixels, self.name = pixels, tokenizer.name_or_path or "policy"
        self.adapters = None  # of LoRA, while it learns (`sft.adapt`)
        self.video_cache = (
            weakref.WeakKeyDictionary()
        )  # {clip: its `qwen.Video`}, as long as the clip is kept
        self.query_embedder = None  # folder of the engine that came with it, if one did
        self.stop_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.refine_token_id = (
            None if heads is None else find_refine_token(tokenizer, model)
        )  # the id of <REFINE>
        config, rows = model.config, model.get_input_embeddings().num_embeddings
        # A vision id in a reply is a placeholder without a picture (STACK.md 2.6); the rows above the tokenizer's own
        # are no tokens at all.
        self.banned_tokens = torch.arange(rows, device=model.device) >= len(tokenizer)
        for kind in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            self.banned_tokens[getattr(config, kind)] = True

    @contextlib.contextmanager
    def adapters_disabled(self):
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
    def adapters_merged(self):
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

    def prompt(self, system: str, query: str, clip: video_reader.Clip | str | None = None) -> inputs.Prompt:
        """One user turn: the query, and the retrieved video where there is one, or words for it (METHOD.md 4)."""
        if clip is None or isinstance(clip, str):
            return inputs.Prompt(
                self._ids(
                    system, f'Query: "{query}"' if clip is None else prompt_text.user_message(query, clip)
                )
            )
        config = self.model.config.vision_config
        if clip not in self.video_cache:
            self.video_cache[clip] = inputs.Video(
                *inputs.patchify(clip.frames, config, self.max_frame_pixels)
            )
        video = self.video_cache[clip]
        per_pair = video.grid[1] * video.grid[2] // config.spatial_merge_size**2
        by_number = self.settings is not None and self.settings.time_axis == "frame_index"
        timestamps = np.arange(len(clip.frames), dtype=float) if by_number else clip.timestamps
        return inputs.Prompt(
            self._ids(system, prompt_text.user_message(query, inputs.video_text(timestamps, per_pair))), video
        )

    def _ids(self, system, user):
        return self.tokenizer(inputs.chat(self.tokenizer, system, user), add_special_tokens=False)[
            "input_ids"
        ]

    @torch.no_grad()
    def reply(
        self, prompts: list[inputs.Prompt], *, group=1, max_new_tokens, temperature=0.0, top_p=1.0, rng=None
    ) -> list[Completion]:
        """`group` replies to each prompt, prompt after prompt, as one batch; each prompt and video is read once.

        group  one number, or one for each prompt
        rng    (numpy) draws one uniform number for each token a reply may have; or one rng for each prompt

        temperature 0 is greedy and takes no rng.
        """
        assert (rng is None) == (temperature == 0), "an rng is for sampling, and sampling needs one"
        context, now = self.prefill(prompts, group)
        draws = None
        if rng is not None:
            counts = [group] * len(prompts) if isinstance(group, int) else group
            rngs = rng if isinstance(rng, list) else [rng] * len(prompts)
            draws = [one.random((count, max_new_tokens)) for one, count in zip(rngs, counts, strict=True)]
            draws = torch.from_numpy(np.concatenate(draws)).to(now.device)
        said = decoding.decode(
            self.model, context, now, self.sampling_params(max_new_tokens, temperature, top_p), draws
        )
        return [self._completion(one, context.attention_mask.shape[1]) for one in said]

    def _completion(self, said, columns):
        ended = said.ids[-1] == self.stop_token_id
        text = self.tokenizer.decode(said.ids[:-1] if ended else said.ids, skip_special_tokens=False)
        branch = self._branch(said.context, said.row, said.ids, columns)
        return Completion(said.ids, said.logps, ended, text, branch)

    def replay(
        self, prompts: list[inputs.Prompt], replies: list[list[int]], *, group=1, temperature=0.0
    ) -> Replay:
        """Given replies, read in one forward with gradients: what `reply` recorded comes out again, token for token."""
        context, now = self.prefill(prompts, group)
        columns, lengths = context.attention_mask.shape[1], torch.tensor([[len(reply)] for reply in replies])
        ids = [torch.tensor(reply) for reply in replies]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.stop_token_id).to(
            now.device
        )
        said = (torch.arange(ids.shape[1]) < lengths).to(now.device)
        rules = self.sampling_params(ids.shape[1], temperature)
        context, logps = decoding.replay(self.model, context, now, ids, rules)
        branches = [self._branch(context, row, reply, columns) for row, reply in enumerate(replies)]
        return Replay(logps.masked_fill(~said, 0.0), said, branches)

    @torch.no_grad()
    def append_refine(self, prompts: list[inputs.Prompt], replies: list[list[int]]) -> list[tuple]:
        """(ids, branch) of each reply as if it ended in <REFINE>: what heads on a model that never says it can read."""
        asked = [
            [
                *(token for token in ids if token != self.stop_token_id),
                self.refine_token_id,
                self.stop_token_id,
            ]
            for ids in replies
        ]
        return list(zip(asked, self.replay(prompts, asked).refine_contexts, strict=True))

    def prefill(
        self, prompts: list[inputs.Prompt], group=1, share=True
    ) -> tuple[decoding.Context, torch.Tensor]:
        """What the policy has read when it starts on `group` replies to each prompt, and its states (B, H) there."""
        context, now = decoding.prefill(self.model, prompts, self.tokenizer.pad_token_id, share)
        counts = torch.tensor(group if isinstance(group, list) else [group] * len(prompts), device=now.device)
        rows = torch.arange(len(prompts), device=now.device).repeat_interleave(counts)
        return context.rows(rows), now[rows]

    def _branch(self, context, row, ids, columns):
        """All that was read before the last <REFINE> of a reply that begins at column `columns`."""
        if self.refine_token_id not in ids:
            return None
        return context.slice(row, columns + len(ids) - 1 - ids[::-1].index(self.refine_token_id))

    def sampling_params(self, limit: int, temperature: float, top_p: float = 1.0) -> decoding.SamplingParams:
        """How this policy speaks."""
        return decoding.SamplingParams(self.stop_token_id, self.banned_tokens, limit, temperature, top_p)


def find_refine_token(tokenizer, model) -> int:
    """The id of <REFINE>: one token, with a row in the embedding matrix."""
    ids = tokenizer(prompt_text.REFINE, add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().num_embeddings
    if len(ids) != 1 or ids[0] >= rows:
        name = tokenizer.name_or_path or "tokenizer"
        raise InputError(
            f"{name}: {prompt_text.REFINE} encodes to {ids}, not to one id below {rows}; take the checkpoint's own"
        )
    return ids[0]


def new_heads(policy: Policy, settings: soft_heads.Settings, seed: int, engine=None) -> Policy:
    """`policy` with fresh heads and a tokenizer that knows <REFINE>; the heads fit `engine` (else the policy itself).

    The model is shared: its row for the new token, unused until now, is set to the mean of the used rows.
    """
    model, tokenizer = policy.model, copy.deepcopy(policy.tokenizer)
    (rows, hidden), used = model.get_input_embeddings().weight.shape, len(tokenizer)
    if tokenizer.add_tokens(
        [prompt_text.REFINE], special_tokens=True
    ):  # else it knows it, and the row has been trained
        if used >= rows:
            raise InputError(
                f"{policy.name}: {rows} embeddings for {used} tokens leave none for {prompt_text.REFINE}"
            )
        with torch.no_grad():
            for layer in (
                model.get_input_embeddings(),
                model.get_output_embeddings(),
            ):  # mostly the same matrix
                layer.weight[used] = layer.weight[:used].mean(dim=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lengths = mean_embedding_norm(policy), mean_embedding_norm(engine or policy)
        heads = soft_heads.SoftHeads(
            hidden, engine.width if engine else hidden, settings.refine_init, lengths
        )
    return Policy(model, tokenizer, heads.to(model.device), settings, policy.max_frame_pixels)


def mean_embedding_norm(reader) -> float:
    """Mean length of the token embeddings of a policy or an engine, over the tokens its tokenizer knows."""
    rows = reader.model.get_input_embeddings().weight[: len(reader.tokenizer)]
    return rows.detach().float().norm(dim=1).mean().item()


def new_settings(profile, instruction: str) -> soft_heads.Settings:
    """What a profile says about refinement; `instruction` is the engine's, with its full stop."""
    shared = ("n_soft", "carry_blocks", "max_query_tokens", "refine_init")
    return soft_heads.Settings(instruction=instruction, **{name: getattr(profile, name) for name in shared})
