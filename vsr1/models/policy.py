"""The policy: it reads a query and one video, and writes whether they match, where, or that it searches again.

A `Policy` is a Qwen3-VL with its tokenizer and, once it can refine queries, its soft-query heads and the settings they
were trained with. `checkpoints` saves and loads it.
"""

import contextlib
import copy
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from vsr1.config import InputError
from vsr1.data import frame_sizes, video_reader
from vsr1.models import decoding, inputs, prompt_text, soft_heads


@dataclass(frozen=True)
class Verdict:
    """Where a reply decides between matched and not_matched, and how clearly."""

    position: int  # of the first token in which the two words differ, among the tokens of the reply
    margin: float  # log P(matched) - log P(not_matched), by these two tokens; nats


@dataclass(frozen=True)
class Completion:
    """One reply, exactly as it was sampled.

    `refine_context` keeps the KV cache of the whole batch in memory: use it, then let it go.
    """

    ids: list[int]  # up to and including the first <|im_end|>
    logps: list[float]  # log-probability of each id
    ended: bool  # False: truncated at max_new_tokens
    text: str  # special tokens kept, <|im_end|> dropped
    refine_context: decoding.Context | None  # what was read before the last <REFINE>; None: there is none
    verdict: Verdict | None = None  # None: it has none of the two words


@dataclass(frozen=True)
class Replay:
    """Replies of a batch read once more, for training."""

    logps: torch.Tensor  # (B, L) of each token; 0 in the padding
    completion_mask: torch.Tensor  # (B, L) True on the sampled tokens: all of a reply, nothing else
    refine_contexts: list[decoding.Context | None]  # as in `Completion`


class Policy:
    """Model, tokenizer, heads and settings; without heads it can still judge, ground and rewrite in words."""

    def __init__(
        self,
        model,
        tokenizer,
        heads: soft_heads.SoftHeads | None,
        settings: soft_heads.Settings | None,
        max_frame_pixels: int,
    ):
        self.model, self.tokenizer, self.heads, self.settings = model, tokenizer, heads, settings
        self.max_frame_pixels, self.name = max_frame_pixels, tokenizer.name_or_path or "policy"
        self.adapters = None  # the LoraModel, while it is trained with adapters
        self.video_cache = weakref.WeakKeyDictionary()  # {clip: `inputs.Video`}, as long as the clip is kept
        self.drafter = decoding.Drafter()  # of all replies of this policy
        self.query_embedder = None  # folder of the engine that came with the checkpoint, if one did
        self.stop_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.refine_token_id = None if heads is None else find_refine_token(tokenizer, model)
        self.banned_tokens = self._find_banned_tokens()
        matched, not_matched = (self._encode(f"<answer>{word}") for word in ("matched", "not_matched"))
        shared = next(n for n, (a, b) in enumerate(zip(matched, not_matched, strict=False)) if a != b)
        self.verdict_lead, self.matched_ids = tokenizer.decode(matched[:shared]), matched[shared:]
        self.verdict_tokens = matched[shared], not_matched[shared]

    def _encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _find_banned_tokens(self):
        """Return (vocabulary,) True for vision tokens, which need a picture, and for rows beyond the tokenizer."""
        config, rows = self.model.config, self.model.get_input_embeddings().num_embeddings
        banned = torch.arange(rows, device=self.model.device) >= len(self.tokenizer)
        for kind in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            banned[getattr(config, kind)] = True
        return banned

    @contextlib.contextmanager
    def adapters_disabled(self):
        """Turn adapters off for the time of the block; without adapters nothing changes."""
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
        """Merge adapters into the weights for the time of the block, which makes decoding about three times cheaper.

        Weights in 16 bits stay as they are: the sum would lose most of what the adapters learned.
        """
        if self.adapters is None or self.model.dtype != torch.float32:
            yield
            return
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        unmerged = [weight.data for weight in weights]
        with torch.no_grad():
            for layer in layers:
                layer.merge(safe_merge=True)  # into a copy
        try:
            yield
        finally:
            for layer, weight, data in zip(layers, weights, unmerged, strict=True):
                layer.unmerge()
                weight.data = data  # subtracting what was added would not give the same weights

    def prompt(self, system: str, query: str, clip: video_reader.Clip | str | None = None) -> inputs.Prompt:
        """Build the prompt of one turn: the query, and the retrieved video or a text in its place, if there is one."""
        if clip is None:
            return inputs.Prompt(self._ids(system, f'Query: "{query}"'))
        if isinstance(clip, str):
            return inputs.Prompt(self._ids(system, prompt_text.user_message(query, clip)))
        config = self.model.config.vision_config
        if clip not in self.video_cache:
            patches, grid = inputs.patchify(clip.frames, config, frame_sizes.PixelRule(self.max_frame_pixels))
            self.video_cache[clip] = inputs.Video(patches, grid)
        video = self.video_cache[clip]
        by_number = self.settings is not None and self.settings.time_axis == "frame_index"
        timestamps = np.arange(len(clip.frames), dtype=float) if by_number else clip.timestamps
        text = inputs.video_text(timestamps, video.tokens_per_pair(config.spatial_merge_size))
        return inputs.Prompt(self._ids(system, prompt_text.user_message(query, text)), video)

    def _ids(self, system, user):
        return self._encode(inputs.chat(self.tokenizer, system, user))

    @torch.no_grad()
    def reply(
        self, prompts: list[inputs.Prompt], *, group=1, max_new_tokens, temperature=0.0, top_p=1.0, rng=None
    ) -> list[Completion]:
        """Sample `group` replies to each prompt, prompt after prompt, as one batch; each prompt is read once.

        group  one number, or one for each prompt
        rng    numpy generator of one uniform number for each token a reply may have, or one generator for each prompt

        Temperature 0 is greedy and takes no rng.
        """
        assert (rng is None) == (temperature == 0), "an rng is for sampling, and sampling needs one"
        context, last_hidden = self.prefill(prompts, group)
        draws = None
        if rng is not None:
            counts = _counts(group, prompts)
            rngs = rng if isinstance(rng, list) else [rng] * len(prompts)
            draws = [rng.random((n, max_new_tokens)) for rng, n in zip(rngs, counts, strict=True)]
            draws = torch.from_numpy(np.concatenate(draws)).to(last_hidden.device)
        params = self.sampling_params(max_new_tokens, temperature, top_p)
        generations = decoding.decode(self.model, context, last_hidden, params, draws, self.drafter)
        start = context.attention_mask.shape[1]
        return [self._completion(generation, start) for generation in generations]

    def _completion(self, generation, start):
        ids, ended = generation.ids, generation.ids[-1] == self.stop_token_id
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        refine_context = self._refine_context(generation.context, generation.row, ids, start)
        verdict = self._verdict(ids, generation.watched)
        return Completion(ids, generation.logps, ended, text, refine_context, verdict)

    def _verdict(self, ids, watched):
        """Return the first verdict behind the reasoning of a reply; None without one."""
        for position, token in enumerate(ids):
            if token not in self.verdict_tokens:
                continue
            before = self.tokenizer.decode(ids[max(0, position - 8) : position])
            if before.endswith(self.verdict_lead) and "</think>" not in self.tokenizer.decode(ids[position:]):
                matched, not_matched = watched[position]
                return Verdict(position, matched - not_matched)
        return None

    def reply_if_matched(
        self, prompts: list[inputs.Prompt], completions: list[Completion], max_new_tokens: int
    ) -> list[str]:
        """Return the text of replies, all with a verdict, after `matched` in its place: the spans they would name."""
        starts = [reply.ids[: reply.verdict.position] + self.matched_ids for reply in completions]
        prompts = [replace(prompt, ids=prompt.ids + ids) for prompt, ids in zip(prompts, starts, strict=True)]
        ends = self.reply(prompts, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(ids) + end.text for ids, end in zip(starts, ends, strict=True)]

    def replay(
        self, prompts: list[inputs.Prompt], replies: list[list[int]], *, group=1, temperature=0.0
    ) -> Replay:
        """Read given replies in one forward pass with gradients; the result equals what `reply` recorded."""
        context, last_hidden = self.prefill(prompts, group)
        start, lengths = context.attention_mask.shape[1], torch.tensor([[len(reply)] for reply in replies])
        ids = [torch.tensor(reply) for reply in replies]
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.stop_token_id)
        ids = ids.to(last_hidden.device)
        mask = (torch.arange(ids.shape[1]) < lengths).to(last_hidden.device)
        params = self.sampling_params(ids.shape[1], temperature)
        context, logps = decoding.replay(self.model, context, last_hidden, ids, params)
        contexts = [self._refine_context(context, row, reply, start) for row, reply in enumerate(replies)]
        return Replay(logps.masked_fill(~mask, 0.0), mask, contexts)

    @torch.no_grad()
    def append_refine(self, prompts: list[inputs.Prompt], replies: list[list[int]]) -> list[tuple]:
        """Return (ids, refine context) of each reply with <REFINE> put at its end: for a model that never writes it."""
        end = [self.refine_token_id, self.stop_token_id]
        replies = [[token for token in ids if token != self.stop_token_id] + end for ids in replies]
        return list(zip(replies, self.replay(prompts, replies).refine_contexts, strict=True))

    def prefill(
        self, prompts: list[inputs.Prompt], group=1, share_prefix=True
    ) -> tuple[decoding.Context, torch.Tensor]:
        """Read prompts; return the context and the last hidden states (B, H), each repeated `group` times."""
        context, last_hidden = decoding.prefill(
            self.model, prompts, self.tokenizer.pad_token_id, share_prefix
        )
        counts = torch.tensor(_counts(group, prompts), device=last_hidden.device)
        rows = torch.arange(len(prompts), device=last_hidden.device).repeat_interleave(counts)
        return context.rows(rows), last_hidden[rows]

    def _refine_context(self, context, row, ids, start):
        """Return what was read before the last <REFINE> of a reply that begins at column `start`; None without one."""
        if self.refine_token_id not in ids:
            return None
        return context.slice(row, start + len(ids) - 1 - ids[::-1].index(self.refine_token_id))

    def sampling_params(
        self, max_new_tokens: int, temperature: float, top_p: float = 1.0
    ) -> decoding.SamplingParams:
        """Return how this policy's replies are sampled."""
        return decoding.SamplingParams(
            self.stop_token_id, self.banned_tokens, max_new_tokens, temperature, top_p, self.verdict_tokens
        )


def _counts(group, prompts):
    """Return how many replies each prompt gets."""
    return group if isinstance(group, list) else [group] * len(prompts)


def find_refine_token(tokenizer, model) -> int:
    """Return the id of <REFINE>: one token, with a row in the embedding matrix."""
    ids = tokenizer(prompt_text.REFINE, add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().num_embeddings
    if len(ids) != 1 or ids[0] >= rows:
        name = tokenizer.name_or_path or "tokenizer"
        raise InputError(
            f"{name}: {prompt_text.REFINE} encodes to {ids}, not to one id below {rows}; take the checkpoint's own"
        )
    return ids[0]


def new_heads(policy: Policy, settings: soft_heads.Settings, seed: int, engine=None) -> Policy:
    """Return `policy` with new heads that fit `engine` (None: the policy itself) and a tokenizer that knows <REFINE>.

    The model is shared, and its row for the new token is set to the mean of the used rows.
    """
    model, tokenizer = policy.model, copy.deepcopy(policy.tokenizer)
    hidden, used = model.get_input_embeddings().weight.shape[1], len(tokenizer)
    if tokenizer.add_tokens([prompt_text.REFINE], special_tokens=True):  # else its row has been trained
        _set_refine_row(policy, used)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms = mean_embedding_norm(policy), mean_embedding_norm(engine or policy)
        heads = soft_heads.SoftHeads(hidden, engine.width if engine else hidden, settings.refine_init, norms)
    return Policy(model, tokenizer, heads.to(model.device), settings, policy.max_frame_pixels)


def _set_refine_row(policy, used):
    """Set the embedding row behind the `used` ones, and the output row, mostly the same, to the mean of these."""
    rows = policy.model.get_input_embeddings().num_embeddings
    if used >= rows:
        raise InputError(
            f"{policy.name}: {rows} embeddings for {used} tokens leave none for {prompt_text.REFINE}"
        )
    with torch.no_grad():
        for layer in (policy.model.get_input_embeddings(), policy.model.get_output_embeddings()):
            layer.weight[used] = layer.weight[:used].mean(dim=0)


def mean_embedding_norm(reader) -> float:
    """Return the mean length of the token embeddings of a policy or an engine, over its tokenizer's tokens."""
    rows = reader.model.get_input_embeddings().weight[: len(reader.tokenizer)]
    return rows.detach().float().norm(dim=1).mean().item()


def new_settings(profile, instruction: str) -> soft_heads.Settings:
    """Return what a profile says about refinement; `instruction` is the engine's, with its full stop."""
    shared = ("n_soft", "carry_blocks", "max_query_tokens", "refine_init")
    return soft_heads.Settings(instruction=instruction, **{name: getattr(profile, name) for name in shared})
