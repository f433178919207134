"""Prefill, decode and replay with an explicit KV cache that many continuations can share."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vsr1.models import inputs

# --- reading on ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What the model has read, row by row: keys and values of every layer (the KV cache), and where each row stands.

    Reading on makes a new one and leaves the old one as it was: any number of continuations may branch off, each with
    its own gradient.
    """

    kv_cache: tuple  # of each layer: keys and values, (B, heads, L, width of a head)
    attention_mask: torch.Tensor  # (B, L) True where a later token may look: not at padding
    last_position: torch.Tensor  # (B,) position of the last token: one number, not three, since it is text

    def rows(self, some: torch.Tensor) -> "Context":
        """The rows that `some` picks, by number or by mask; a number may repeat."""
        memory = tuple((keys[some], values[some]) for keys, values in self.kv_cache)
        return Context(memory, self.attention_mask[some], self.last_position[some])

    def slice(self, row: int, length: int) -> "Context":
        """One row alone, as it was when `length` columns had been read, without padding before it. All are views.

        Padding behind an `opening` stays, and is not seen.
        """
        start = int(self.attention_mask[row].int().argmax())
        one, columns = slice(row, row + 1), slice(start, length)
        memory = tuple((keys[one, :, columns], values[one, :, columns]) for keys, values in self.kv_cache)
        unread = self.attention_mask.shape[1] - length  # all of it text, one position each
        return Context(memory, self.attention_mask[one, columns], self.last_position[one] - unread)


def stack_contexts(contexts: list[Context]) -> Context:
    """Contexts of one row each as one batch, padded on the right: what is not seen may stand anywhere."""
    spare = [-context.attention_mask.shape[1] for context in contexts]
    spare = [n - min(spare) for n in spare]
    side = lambda layer, k: torch.cat(  # noqa: E731
        [F.pad(context.kv_cache[layer][k], (0, 0, 0, n)) for context, n in zip(contexts, spare, strict=True)]
    )
    memory = tuple((side(layer, 0), side(layer, 1)) for layer in range(len(contexts[0].kv_cache)))
    seen = torch.cat(
        [F.pad(context.attention_mask, (0, n)) for context, n in zip(contexts, spare, strict=True)]
    )
    return Context(memory, seen, torch.cat([context.last_position for context in contexts]))


class KVCache:
    """As much of the library's cache as attention asks for; it appends to a copy, never in place."""

    def __init__(self, layers):
        self.layers = list(layers)

    def update(self, keys, values, layer, *_):
        old_keys, old_values = self.layers[layer]
        self.layers[layer] = (torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2))
        return self.layers[layer]


class PreallocatedKVCache(KVCache):
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


def inplace_cache(context: Context) -> KVCache:
    """The memory of a context that is read on in place, for `read`; where there are gradients, in copies."""
    return (KVCache if torch.is_grad_enabled() else PreallocatedKVCache)(context.kv_cache)


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


def common_prefix(prompts: list[inputs.Prompt], video: int) -> list[int]:
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


def prefill_prefix(model, ids: list[int], rows: int) -> DynamicCache:
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


def _video_features(model, videos: list[inputs.Video]):
    """What the eyes make of videos, as the library puts it; None without any.

    As long as the eyes do not learn, it takes the place of the patches: a video is looked at once.
    """
    if not videos:
        return None
    if any(weight.requires_grad for weight in model.model.visual.parameters()):
        return _encode_videos(model, videos)
    if fresh := list(dict.fromkeys(video for video in videos if video.features is None)):
        found = _encode_videos(model, fresh)
        layers = zip(found.pooler_output, *found.deepstack_features, strict=True)
        for video, parts in zip(fresh, layers, strict=True):
            video.features, video.patches = (
                [part.clone() for part in parts],
                None,
            )  # not a view of all of them
    first, *deep = zip(*(video.features for video in videos), strict=True)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=deep)


def _encode_videos(model, videos):
    patches = torch.cat([video.patches for video in videos]).to(model.device)
    grids = torch.tensor([video.grid for video in videos], device=model.device)
    return model.model.get_video_features(patches, grids, return_dict=True)


def prefill(model, prompts: list[inputs.Prompt], pad: int, share=True) -> tuple[Context, torch.Tensor]:
    """What the model has read after prompts and their videos, and its states (B, H) at their ends, after the norm.

    share  read what all of them begin with once; False, for comparison: row by row
    """
    words = common_prefix(prompts, model.config.vision_start_token_id) if share else []
    cache, batch = (
        prefill_prefix(model, words, len(prompts)),
        inputs.collate(prompts, model, pad, len(words), pixels=False),
    )
    seen = {"video": _video_features(model, [prompt.video for prompt in prompts if prompt.video is not None])}
    with _final_norm(model.model.language_model):
        post = model.model(**batch, past_key_values=cache, mm_encoder_outputs=seen).last_hidden_state
    last = batch["position_ids"][:, :, -1]  # (3, B)
    assert (last == last[0]).all(), "a prompt has to end in text"
    memory = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Context(memory, batch["attention_mask"].bool(), last[0]), post[:, -1]


def extend(
    model, context: Context, embeds: torch.Tensor, memory: KVCache | None = None
) -> tuple[Context, torch.Tensor, torch.Tensor]:
    """What the model has read after embeddings (B, L, H) more, and its states there before and after the final norm.

    Words and soft tokens are read alike: one position each. `memory` is that of the context, unless it is handed over.
    """
    core, (rows, count) = model.model.language_model, embeds.shape[:2]
    memory = memory or KVCache(context.kv_cache)
    new = context.attention_mask.new_ones(rows, count, count).tril()  # each sees itself and those before it
    sight = torch.cat([context.attention_mask[:, None].expand(-1, count, -1), new], dim=2)[:, None]
    positions = context.last_position[:, None] + torch.arange(1, count + 1, device=embeds.device)  # (B, L)
    options = {
        "attention_mask": sight,
        "position_ids": positions.expand(3, -1, -1),
        "past_key_values": memory,
    }
    with _final_norm(core) as inputs:
        post = core(inputs_embeds=embeds, **options).last_hidden_state
    seen = torch.cat([context.attention_mask, new[:, -1]], dim=1)
    return Context(tuple(memory.layers), seen, positions[:, -1]), inputs[0], post


# --- speaking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How a reply is spoken."""

    stop_token_id: int  # the token that ends it
    banned_tokens: torch.Tensor  # (vocabulary,) True where a token may not be said
    max_new_tokens: int  # tokens of the longest reply
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # only the likeliest tokens that together hold this much of the mass may be said


@dataclass(frozen=True)
class Generation:
    """One reply, and the row of a context where the model has read it (the last token excepted)."""

    ids: list[int]  # exactly those sampled, `stop` included where it was reached
    logps: list[float]
    context: Context
    row: int


def log_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities (..., vocabulary), float32, of the distribution that replies are drawn from.

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
    """(B,) tokens: where uniform draws (B,) fall in the cumulated probabilities (B, vocabulary), or the likeliest."""
    if draws is None:
        return logp.argmax(dim=-1)
    mass = logp.double().exp().cumsum(dim=-1)
    found = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)[:, 0]
    return found.clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def decode(
    model, context: Context, now: torch.Tensor, params: SamplingParams, draws=None
) -> list[Generation]:
    """Every row continued in step, from the state (B, H) of its last token to `stop` or the limit.

    draws  (B, limit) float64, uniform in [0, 1), for sampling; each row has its own, so no row depends on the others

    When half of the rows have ended, the other half goes on alone: one endless reply costs a row, not a batch.
    """
    rows = torch.arange(len(now), device=now.device)  # which reply each row of the batch is
    ids = rows.new_full((len(rows), params.max_new_tokens), params.stop_token_id)
    logps, homes = torch.zeros(ids.shape, device=ids.device), {}
    ended, memory = torch.zeros_like(rows, dtype=torch.bool), inplace_cache(context)
    for step in range(params.max_new_tokens):
        logp = log_probs(model.lm_head(now), params)  # (B, vocabulary)
        token = sample_token(logp, None if draws is None else draws[rows, step]).masked_fill(
            ended, params.stop_token_id
        )
        ids[rows, step], logps[rows, step] = token, logp.gather(1, token[:, None])[:, 0]
        ended = ended | (token == params.stop_token_id)
        if ended.all() or step + 1 == params.max_new_tokens:
            break
        if 2 * ended.sum() > len(rows):
            homes |= {row: (context, at) for at, row in enumerate(rows.tolist()) if ended[at]}
            rows, token, context, ended = rows[~ended], token[~ended], context.rows(~ended), ended[~ended]
            memory = inplace_cache(context)
        context, _, post = extend(model, context, model.get_input_embeddings()(token)[:, None], memory)
        now = post[:, -1]
    homes |= {row: (context, at) for at, row in enumerate(rows.tolist())}
    said = []
    for row, spoken in enumerate(ids.tolist()):
        end = (
            spoken.index(params.stop_token_id) + 1
            if params.stop_token_id in spoken
            else params.max_new_tokens
        )
        said.append(Generation(spoken[:end], logps[row, :end].tolist(), *homes[row]))
    return said


def replay(model, context: Context, now: torch.Tensor, ids: torch.Tensor, params: SamplingParams):
    """What the model has read after given replies (B, L), and log-probabilities (B, L) of them; differentiable."""
    context, _, post = extend(model, context, model.get_input_embeddings()(ids))
    before = torch.cat([now[:, None], post[:, :-1]], dim=1)  # (B, L, H): what each token was chosen from
    logp = log_probs(model.lm_head(before), params)  # (B, L, vocabulary)
    return context, logp.gather(2, ids[..., None])[..., 0]
