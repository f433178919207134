"""Prefill, decode and replay with an explicit KV cache that many continuations can share."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vsr1.models import inputs

# --- Contexts and KV caches


@dataclass(frozen=True)
class Context:
    """The KV cache of a batch with its attention mask and last positions; a prefix that continuations branch off from.

    Reading more tokens makes a new context and leaves the old one as it was, so that any number of continuations may
    start from it, each with its own gradient.
    """

    kv_cache: tuple  # of each layer: keys and values, (B, heads, L, width of a head)
    attention_mask: torch.Tensor  # (B, L) False at padding
    last_position: torch.Tensor  # (B,) position id of the last token: one number, not three, since it is text

    def rows(self, index: torch.Tensor) -> "Context":
        """Return the rows that `index` picks, by number or by mask; a number may repeat."""
        kv_cache = tuple((keys[index], values[index]) for keys, values in self.kv_cache)
        return Context(kv_cache, self.attention_mask[index], self.last_position[index])

    def slice(self, row: int, length: int) -> "Context":
        """Return one row as it was after `length` columns, without the padding before it. All tensors are views.

        Padding behind a shared prefix stays, masked out.
        """
        start = int(self.attention_mask[row].int().argmax())
        rows, columns = slice(row, row + 1), slice(start, length)
        kv_cache = tuple((keys[rows, :, columns], values[rows, :, columns]) for keys, values in self.kv_cache)
        later = self.attention_mask.shape[1] - length  # all of it text, one position each
        return Context(kv_cache, self.attention_mask[rows, columns], self.last_position[rows] - later)


def stack_contexts(contexts: list[Context]) -> Context:
    """Join contexts of one row each into a batch, padded on the right: masked columns may stand anywhere."""
    lengths = [context.attention_mask.shape[1] for context in contexts]
    padding = [max(lengths) - length for length in lengths]

    def join(layer, part):
        tensors = [context.kv_cache[layer][part] for context in contexts]
        return torch.cat([F.pad(tensor, (0, 0, 0, n)) for tensor, n in zip(tensors, padding, strict=True)])

    kv_cache = tuple((join(layer, 0), join(layer, 1)) for layer in range(len(contexts[0].kv_cache)))
    masks = [F.pad(context.attention_mask, (0, n)) for context, n in zip(contexts, padding, strict=True)]
    return Context(kv_cache, torch.cat(masks), torch.cat([context.last_position for context in contexts]))


class KVCache:
    """As much of the library's cache as attention calls; it appends to a copy, never in place."""

    def __init__(self, layers):
        self.layers = list(layers)

    def reserve(self, columns: torch.Tensor) -> int:
        """Let the next update append `columns` (B, L); return how many columns the cache then has."""
        return self.layers[0][0].shape[2] + columns.shape[1]

    def update(self, keys, values, layer, *_):
        old_keys, old_values = self.layers[layer]
        self.layers[layer] = (torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2))
        return self.layers[layer]


class InplaceKVCache(KVCache):
    """A cache that writes in place, each row at its own `columns` (B, L): for rows that no other row branches off."""

    STEP = 32  # columns allocated at a time

    def __init__(self, layers):
        super().__init__(layers)
        self.buffers, self.columns, self.end = list(layers), None, layers[0][0].shape[2]

    def reserve(self, columns: torch.Tensor) -> int:
        """Let the next update write to `columns` (B, L); return how many columns the cache then has."""
        width, end = self.buffers[0][0].shape[2], int(columns.max()) + 1
        if end > width:
            more = max(self.STEP, end - width)
            self.buffers = [tuple(F.pad(part, (0, 0, 0, more)) for part in layer) for layer in self.buffers]
        self.columns, self.end = columns, end
        return end

    def update(self, keys, values, layer, *_):
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        for buffer, states in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[rows, :, self.columns] = states.transpose(1, 2).to(buffer)  # autocast may mix precisions
        self.layers[layer] = tuple(buffer[:, :, : self.end] for buffer in self.buffers[layer])
        return self.layers[layer]


def inplace_cache(context: Context) -> KVCache:
    """Return a cache for `extend` that grows in place; where gradients are on, one that grows in copies."""
    return (KVCache if torch.is_grad_enabled() else InplaceKVCache)(context.kv_cache)


# --- Prefill


def _backbone(model):
    """Return a policy's model without its output layer; an engine's has none."""
    return getattr(model, "model", model)


def common_prefix(prompts: list[inputs.Prompt], vision_start: int) -> list[int]:
    """Return the ids that all prompts begin with, up to where a video begins; each prompt keeps one more token.

    A single prompt shares nothing.

    >>> common_prefix([inputs.Prompt([1, 2, 3, 9]), inputs.Prompt([1, 2, 3])], 9)
    [1, 2]
    >>> common_prefix([inputs.Prompt([1, 9, 3, 4]), inputs.Prompt([1, 9, 3, 5])], 9)
    [1]
    """
    if len(prompts) == 1:
        return []
    shortest = min((prompt.ids for prompt in prompts), key=len)
    for length in range(len(shortest) - 1):
        token = shortest[length]
        if token == vision_start or any(prompt.ids[length] != token for prompt in prompts):
            return shortest[:length]
    return shortest[: len(shortest) - 1]


def prefill_prefix(model, ids: list[int], rows: int) -> DynamicCache:
    """Return a cache in which `rows` rows share `ids`, text alone, read in one forward and one backward pass.

    The system prompt is a third of what the mini models read.
    """
    cache = DynamicCache()
    if ids:
        tokens = torch.tensor([ids], device=model.device)
        _backbone(model).language_model(input_ids=tokens, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
    return cache


def prefill(model, prompts: list[inputs.Prompt], pad: int, share_prefix=True) -> tuple[Context, torch.Tensor]:
    """Read prompts with their videos; return the context and the last hidden states (B, H), after the final norm.

    share_prefix  read the common prefix once; False, for comparison: row by row
    """
    prefix = common_prefix(prompts, model.config.vision_start_token_id) if share_prefix else []
    cache = prefill_prefix(model, prefix, len(prompts))
    batch = inputs.collate(prompts, model, pad, len(prefix), pixels=False)
    features = _video_features(model, [prompt.video for prompt in prompts if prompt.video is not None])
    core = _backbone(model)
    with _final_norm_inputs(core.language_model):
        output = core(**batch, past_key_values=cache, mm_encoder_outputs={"video": features})
    last = batch["position_ids"][:, :, -1]  # (3, B)
    assert (last == last[0]).all(), "a prompt has to end in text"
    kv_cache = tuple((layer.keys, layer.values) for layer in cache.layers)
    context = Context(kv_cache, batch["attention_mask"].bool(), last[0])
    return context, output.last_hidden_state[:, -1]


def extend(
    model, context: Context, embeds: torch.Tensor, cache: KVCache | None = None
) -> tuple[Context, torch.Tensor, torch.Tensor]:
    """Read embeddings (B, L, H) on; return the context and the hidden states before and after the final norm.

    Token embeddings and soft tokens are read alike, one position each.

    cache  that of the context, to be grown in place (`inplace_cache`); None: in a copy
    """
    cache = cache or KVCache(context.kv_cache)
    width, count = context.attention_mask.shape[1], embeds.shape[1]
    columns = torch.arange(width, width + count, device=embeds.device).expand(len(embeds), -1)  # (B, L)
    pre_norm, post_norm = _read(model, context, embeds, columns, cache)
    return _grown(context, cache, width + count), pre_norm, post_norm


def _read(model, context, embeds, columns, cache):
    """Read embeddings (B, L, H) into `columns` (B, L) behind a context; each sees all columns up to its own.

    Return the hidden states before and after the final norm.
    """
    core, context_mask = _backbone(model).language_model, context.attention_mask
    width = cache.reserve(columns)
    causal = torch.arange(width, device=embeds.device) <= columns[..., None]  # (B, L, width)
    mask = (causal & F.pad(context_mask, (0, width - context_mask.shape[1]), value=True)[:, None])[:, None]
    positions = context.last_position[:, None] + columns + 1 - context_mask.shape[1]  # (B, L)
    options = {"attention_mask": mask, "position_ids": positions.expand(3, -1, -1), "past_key_values": cache}
    with _final_norm_inputs(core) as pre_norm:
        post_norm = core(inputs_embeds=embeds, **options).last_hidden_state
    return pre_norm[0], post_norm


def _grown(context, cache, width):
    """Return the context with the columns that a cache holds more, all of them text."""
    more = width - context.attention_mask.shape[1]
    mask = F.pad(context.attention_mask, (0, more), value=True)
    return Context(tuple(cache.layers), mask, context.last_position + more)


@contextmanager
def _final_norm_inputs(core):
    """Give a list that collects what enters the final norm: `hidden_states[-1]` of the library is its result."""
    assert not (core.training and core.is_activation_checkpointing), (
        "activation checkpointing drops the cache"
    )
    states = []
    hook = core.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        yield states
    finally:
        hook.remove()


def _video_features(model, videos: list[inputs.Video]):
    """Encode videos in the form the library expects; None without any.

    As long as the vision tower is frozen, the features replace the patches: a video is encoded once.
    """
    if not videos:
        return None
    if any(weight.requires_grad for weight in model.model.visual.parameters()):
        return _encode_videos(model, videos)
    if fresh := list(dict.fromkeys(video for video in videos if video.features is None)):
        encoded = _encode_videos(model, fresh)
        layers = zip(encoded.pooler_output, *encoded.deepstack_features, strict=True)
        for video, features in zip(fresh, layers, strict=True):
            video.features = [part.clone() for part in features]  # a view would keep those of all videos
            video.patches = None
    first, *deep = zip(*(video.features for video in videos), strict=True)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=deep)


def _encode_videos(model, videos):
    patches = torch.cat([video.patches for video in videos]).to(model.device)
    grids = torch.tensor([video.grid for video in videos], device=model.device)
    return model.model.get_video_features(patches, grids, return_dict=True)


# --- Decoding


@dataclass(frozen=True)
class SamplingParams:
    """How replies are sampled."""

    stop_token_id: int  # the token that ends a reply
    banned_tokens: torch.Tensor  # (vocabulary,) True where a token may not be sampled
    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float  # only the likeliest tokens that together hold this much of the mass are sampled; 1: all
    watched_tokens: tuple[int, ...]  # W tokens whose log-probabilities are recorded beside the sampled one's


@dataclass(frozen=True)
class Generation:
    """One reply, and the row of a context in which it was read, its last token excepted."""

    ids: list[int]  # exactly those sampled, the stop token included where it was reached
    logps: list[float]
    context: Context
    row: int
    watched: list[list[float]]  # of each token: log-probabilities (W,) of `watched_tokens` in its place


def log_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return log-probabilities (..., vocabulary), float32, of the distribution that replies are sampled from.

    Rollout and replay share it. At temperature 0 it is that of temperature 1.
    """
    logits = logits.float() / (params.temperature or 1.0)
    logp = logits.masked_fill(params.banned_tokens, -torch.inf).log_softmax(dim=-1)
    if params.top_p == 1.0:
        return logp
    ordered, tokens = logp.sort(dim=-1, descending=True, stable=True)
    mass = ordered.exp()
    beyond = mass.cumsum(dim=-1) - mass >= params.top_p  # likelier tokens hold it without this one
    return logp.masked_fill(torch.zeros_like(beyond).scatter(-1, tokens, beyond), -torch.inf).log_softmax(-1)


def sample_token(logp: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
    """Return tokens (...) at uniform draws (...) in cumulated probabilities (..., vocabulary); None: the likeliest."""
    if draws is None:
        return logp.argmax(dim=-1)
    mass = logp.double().exp().cumsum(dim=-1)
    tokens = torch.searchsorted(mass, draws[..., None] * mass[..., -1:], right=True)[..., 0]
    return tokens.clamp(max=logp.shape[-1] - 1)


class Drafter:
    """Guesses how a reply goes on: with what most recently followed the same last tokens in any reply.

    A guess costs little to check (`decode`) and never changes a reply. Replies to like questions are much alike.
    """

    ORDERS = (8, 4, 2)  # ours: last tokens that have to be the same; the longest that were met before count
    LENGTH = 8  # ours: tokens guessed at once
    MOST = 1_000_000  # ours: entries, some hundred MB; then it begins anew

    def __init__(self):
        self.following = {}

    def learn(self, ids: list[int], start: int) -> None:
        """Remember what the tokens of a reply from `start` on followed."""
        if len(self.following) > self.MOST:
            self.following.clear()
        padded, first = [None] * max(self.ORDERS) + ids, max(self.ORDERS)
        for position in range(first + start, len(padded)):
            for order in self.ORDERS:
                self.following[tuple(padded[position - order : position])] = padded[position]

    def guess(self, ids: list[int]) -> list[int]:
        """Return at most `LENGTH` tokens that may come next."""
        padded, guesses = [None] * max(self.ORDERS) + ids, []
        for _ in range(self.LENGTH):
            keys = (tuple(padded[-order:]) for order in self.ORDERS)
            token = next((self.following[key] for key in keys if key in self.following), None)
            if token is None:
                break
            guesses.append(token)
            padded.append(token)
        return guesses


@dataclass
class _Reply:
    """A reply as far as it is decoded."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    watched: list[list[float]] = field(default_factory=list)

    def goes_on(self, params: SamplingParams) -> bool:
        """Return whether it takes another token."""
        return not self.ids or (
            self.ids[-1] != params.stop_token_id and len(self.ids) < params.max_new_tokens
        )

    def take(self, tokens, logps, watched, guesses, params: SamplingParams) -> None:
        """Take the samples up to the first that was guessed wrongly: what is behind it was read in vain."""
        for token, logp, others, guess in zip(tokens, logps, watched, [*guesses, None], strict=True):
            if not self.goes_on(params):
                return
            self.ids.append(token)
            self.logps.append(logp)
            self.watched.append(others)
            if token != guess:
                return


@torch.no_grad()
def decode(
    model,
    context: Context,
    last_hidden: torch.Tensor,
    params: SamplingParams,
    draws: torch.Tensor | None,
    drafter: Drafter,
) -> list[Generation]:
    """Sample a reply for every row in step, from the hidden state (B, H) of its last token to the stop token.

    draws    (B, max_new_tokens) float64, uniform in [0, 1), for sampling; each row has its own, so that no row depends
             on the others; None: greedy
    drafter  guesses the next tokens

    Each step reads a row's latest token and the guesses behind it, and samples a token after each of them. Samples
    count up to the first that was guessed wrongly, so they are those of token after token (speculative decoding).

    When more than half of the rows have ended, the others continue alone: one endless reply costs a row, not a batch.
    """
    device, start = last_hidden.device, context.attention_mask.shape[1]
    replies = [_Reply() for _ in last_hidden]
    contexts = {}  # {number of a reply that has ended: the context and the row in which it was read}
    active, guesses = list(range(len(replies))), [[] for _ in replies]  # numbers of the replies in the batch
    positions = torch.zeros(len(replies), 1, dtype=torch.long)  # (B, L) of the next samples in their replies
    cache, hidden = inplace_cache(context), last_hidden[:, None]  # (B, L, H)
    while True:
        logp = log_probs(model.lm_head(hidden), params)  # (B, L, vocabulary)
        tokens = _sample_step(logp, draws, active, positions)  # (B, L)
        token_logps = logp.gather(2, tokens[..., None])[..., 0].tolist()
        watched_logps = logp[..., list(params.watched_tokens)].tolist()  # (B, L, W)
        samples = zip(tokens.tolist(), token_logps, watched_logps, guesses, strict=True)
        for reply, sampled in zip((replies[number] for number in active), samples, strict=True):
            before = len(reply.ids)
            reply.take(*sampled, params)
            drafter.learn(reply.ids, before)
        open_rows = [row for row, number in enumerate(active) if replies[number].goes_on(params)]
        if 2 * len(open_rows) < len(active):
            grown = _grown(context, cache, cache.layers[0][0].shape[2])
            contexts |= {number: (grown, row) for row, number in enumerate(active) if row not in open_rows}
            if not open_rows:
                break
            active = [active[row] for row in open_rows]
            index = torch.tensor(open_rows, device=device)
            cache = inplace_cache(grown.rows(index))
            context = Context((), context.attention_mask[index], context.last_position[index])
        read = [replies[number] for number in active]
        guesses = [drafter.guess(reply.ids) if reply.goes_on(params) else [] for reply in read]
        longest = max(map(len, guesses))
        guesses = [guess + [params.stop_token_id] * (longest - len(guess)) for guess in guesses]
        latest = torch.tensor([[reply.ids[-1], *guess] for reply, guess in zip(read, guesses, strict=True)])
        positions = torch.tensor([[len(reply.ids)] for reply in read]) + torch.arange(longest + 1)
        columns = (start - 1 + positions).to(device)
        embeds = model.get_input_embeddings()(latest.to(device))
        _, hidden = _read(model, context, embeds, columns, cache)
    return [
        Generation(reply.ids, reply.logps, *contexts[number], reply.watched)
        for number, reply in enumerate(replies)
    ]


def _sample_step(logp, draws, active, positions):
    """Sample tokens (B, L) at `positions` (B, L) of the `active` replies, each with the draw of its position."""
    if draws is None:
        return sample_token(logp, None)
    positions = positions.clamp(max=draws.shape[1] - 1)  # a guess behind the limit is never kept
    rows = torch.tensor(active)[:, None]
    return sample_token(logp, draws[rows.to(draws.device), positions.to(draws.device)])


def replay(model, context: Context, last_hidden: torch.Tensor, ids: torch.Tensor, params: SamplingParams):
    """Read given replies (B, L); return the context and their log-probabilities (B, L), differentiable."""
    context, _, hidden = extend(model, context, model.get_input_embeddings()(ids))
    hidden = torch.cat([last_hidden[:, None], hidden[:, :-1]], dim=1)  # (B, L, H) each token was sampled from
    logp = log_probs(model.lm_head(hidden), params)  # (B, L, vocabulary)
    return context, logp.gather(2, ids[..., None])[..., 0]
