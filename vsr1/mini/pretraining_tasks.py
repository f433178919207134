"""Train one phase of pretraining: the losses, and what each phase teaches.

A phase is a function of a `PretrainingTask`, a `PhaseConfig` and a folder; `pretraining` runs them in order.
"""

import copy
import json
import math
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vsr1 import cache
from vsr1.data import frame_sizes
from vsr1.mini import architecture, attribute_heads, pretraining_data
from vsr1.mini.attribute_heads import attribute_ids, attribute_loss
from vsr1.mini.pretraining_data import Example, Examples
from vsr1.models import engine, inputs, loading

HEADS = "heads.safetensors"
HALF = 2  # text layers up to where heads read the states
HOLD = 20.0  # weight of one minus the cosine between a video's vector and what it was
TEMPERATURE = 0.07  # of InfoNCE


def _keep_attention(module, query, key, *rest, **options):
    """Attend as `sdpa` does, and keep what is compared."""
    module.compared = query, key
    return sdpa_attention_forward(module, query, key, *rest, **options)


KEEPING = "sdpa_keeping"
AttentionInterface.register(KEEPING, _keep_attention)
AttentionMaskInterface.register(KEEPING, sdpa_mask)


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of training, data parallel over `processes` of one torch thread each."""

    steps: int
    batch: int  # examples of one process: pictures, videos or texts
    rate: float  # learning rate, warmed up, then on a cosine to nearly nothing
    frames: tuple[int, ...]  # fewest and most frames of a video
    start: str = ""  # the phase whose weights it starts from
    ships: str = ""  # the folder of vsr1/mini/weights that gets the result
    processes: int = 2
    layers: int = 0  # of the text layers, how many an engine keeps; 0: all
    place: float = 0.0  # how often a caption for the text side names the place,
    light: float = 0.0  # the light,
    detail: float = 0.0  # a colour of shirt, trousers or object,
    wrong: float = 0.0  # and how often such a colour is another than the video's
    decisive: float = 1.0  # weight of a yes, a no or a verdict in a reply; of another token: 1
    timing: float = 1.0  # the same for whole seconds of a start or an end, of a reply and of its reasoning
    seen: float = 1.0  # the same for the word that a reply says is shown: behind a dash, or behind "is"
    query_word: float = 1.0  # the same for the word it says is asked for
    strange: float = (
        0.0  # how often a query to judge shares next to nothing with the moment it was drawn from,
    )
    differ: float = 0.5  # and how often one that does not fit differs in an attribute, if not
    neutral: float = 0.0  # how often neutral tokens stand where soft tokens will
    seed: int = 7

    def frame_count(self, rng) -> int:
        """Draw an even number of frames."""
        return int(rng.integers(self.frames[0] // 2, self.frames[1] // 2 + 1)) * 2


class PretrainingTask:
    """What a phase trains with: videos, a tokenizer, and a model that starts where its recipe says."""

    def __init__(self, profile, recipe: PhaseConfig):
        self.profile, self.videos = profile, pretraining_data.load_videos(profile)
        self.tokenizer = architecture.make_tokenizer()
        torch.manual_seed(recipe.seed)
        self.model = Qwen3VLForConditionalGeneration(architecture.make_config(self.tokenizer))
        if recipe.start:  # the random model above still moves the generator: heads are drawn after it
            kind = Qwen3VLModel if recipe.start.startswith("index") else Qwen3VLForConditionalGeneration
            self.model, _ = loading.load(kind, str(profile.data_dir("foundation") / recipe.start))
        vision_config = self.model.config.vision_config
        self.examples = Examples(self.videos, self.tokenizer, vision_config, profile.max_frame_pixels)

    def collate(self, prompts: list[inputs.Prompt]) -> dict:
        """Return a left-padded batch."""
        return inputs.collate(prompts, self.model, self.tokenizer.pad_token_id)

    def ids(self, *tokens: str) -> torch.Tensor:
        """Return the ids of tokens."""
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(tokens)))

    def new_heads(self) -> torch.nn.Parameter:
        """Return new heads on the states of the language model."""
        return attribute_heads.new_heads(self.model.config.text_config.hidden_size)

    def engine(self, recipe: PhaseConfig) -> engine.Engine:
        """Make a search engine of the model's body, with as many text layers as the recipe says."""
        if isinstance(self.model, Qwen3VLForConditionalGeneration):
            body = self.model.model
            body.language_model.layers = body.language_model.layers[: recipe.layers]
            body.config.text_config.num_hidden_layers = recipe.layers
            self.model = body
        return engine.Engine(self.profile, self.model, self.tokenizer, "engine")


# --- The training loop


def train(recipe: PhaseConfig, model, losses, folder: Path, extra=()) -> None:
    """Train by AdamW on a cosine schedule, and write a line of the log a step.

    losses  (step, rng) -> (loss, values for the log)
    extra   parameters beside those of the model
    """
    weights = [p for p in model.parameters() if p.requires_grad] + list(extra)
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    rank, started = dist.get_rank(), time.time()
    model.train()
    with open(folder / "log.jsonl" if rank == 0 else os.devnull, "w", buffering=1, encoding="utf-8") as log:
        steps = range(recipe.steps)
        for step in cache.progress(steps, folder.stem) if rank == 0 else steps:
            loss, values = losses(step, np.random.default_rng([recipe.seed, step, rank]))
            assert torch.isfinite(loss), f"{folder}: loss {loss} at step {step}"
            norm = _update(recipe, optimizer, weights, loss, step)
            values = {key: round(value.item(), 4) for key, value in values.items()}
            row = {"step": step, "loss": round(loss.item(), 4), **values, "norm": round(norm.item(), 3)}
            log.write(json.dumps(row | {"seconds": round(time.time() - started, 1)}) + "\n")
    model.eval()


def _update(recipe, optimizer, weights, loss, step):
    """Step along the gradient's mean over processes, and return its norm before clipping."""
    warmup, decay = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * warmup * decay + 1e-6
    optimizer.zero_grad()
    loss.backward()
    for weight in weights:
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return norm


# --- Phases of the language model


class AnswerLoss:
    """The language-model loss over the answers of drawn examples, as `losses` of `train`.

    draw     (frames, rng) -> Example
    heads    with them their loss (`attribute_heads.pair_loss`) on the states half-way up is added
    targets  the heads also read, where a time is to be named, what is asked for
    lookups  they also read, where a shown word is to be named, when it is shown; and the next layer's attention is
             paid for going to the pairs of that moment
    """

    def __init__(
        self, task: PretrainingTask, recipe: PhaseConfig, draw, heads=None, targets=False, lookups=False
    ):
        self.task, self.recipe, self.draw, self.heads = task, recipe, draw, heads
        self.targets, self.lookups = targets, lookups
        self.decisive = task.ids("Ġyes", "Ġno", "not", "matched")
        self.seconds = task.ids(*(str(second) for second in range(200)))
        self.dash, self.before_seen = task.ids("-"), task.ids("-", "Ġis")

    def __call__(self, step: int, rng) -> tuple[torch.Tensor, dict]:
        """Return (loss, values for the log) of a batch."""
        count = self.recipe.frame_count(rng)
        examples = [self.draw(count, rng) for _ in range(self.recipe.batch)]
        batch = self.task.collate([example.prompt for example in examples])
        lengths = torch.tensor([example.answer_tokens for example in examples])
        longest = int(lengths.max())
        read = self.heads is not None
        out = self.task.model(**batch, logits_to_keep=longest + 1, output_hidden_states=read)
        answers = batch["input_ids"][:, -longest:]  # (B, L)
        inside = torch.arange(longest)[None] >= longest - lengths[:, None]  # (B, L)
        loss, log = self._answers(out.logits[:, :-1], answers, inside)
        if read:
            loss = loss + 0.0 * self.heads.sum()  # processes share gradients, whatever their examples
            if any(example.pairs for example in examples):
                extra, values = self._states(
                    out.hidden_states[HALF], batch["input_ids"], answers, inside, examples
                )
                loss, log = loss + extra, log | values
        return loss, log

    def _answers(self, logits, answers, inside):
        """Return the weighted cross-entropy of the answers, and the accuracy of all tokens."""
        weight = torch.where(torch.isin(answers, self.decisive), self.recipe.decisive, 1.0)
        weight[torch.isin(answers, self.seconds)] = self.recipe.timing
        weight[:, 1:][torch.isin(answers[:, :-1], self.before_seen)] = self.recipe.seen
        weight[:, :-2][torch.isin(answers[:, 2:], self.dash)] = (
            self.recipe.query_word
        )  # a space stands between
        logits, answers, weight = logits[inside], answers[inside], weight[inside]
        each = F.cross_entropy(logits, answers, reduction="none")
        return (each * weight).sum() / weight.sum(), {"accuracy": _accuracy(logits, answers)}

    def _states(self, states, ids, answers, inside, examples: list[Example]):
        """Return the loss of the heads on states (B, length, D), and their accuracies."""
        labelled = torch.tensor([bool(example.pairs) for example in examples])[:, None]
        pair_ends = (ids == self.task.model.config.vision_end_token_id) & labelled
        pairs = [pair for example in examples for pair in example.pairs]
        loss, log = attribute_heads.pair_loss(states[pair_ends], self.heads, pairs)
        rows, columns = (inside & torch.isin(answers, self.seconds) & labelled).nonzero().T
        if self.targets and len(rows):
            targets = [examples[row].target for row in rows.tolist()]
            at_times = states[rows, columns - answers.shape[1] - 1]  # where the next token is a time
            extra, values = attribute_heads.target_loss(at_times, self.heads, targets)
            loss, log = loss + extra, log | {f"asked_{name}": value for name, value in values.items()}
        rows, columns = (inside & (answers == self.dash) & labelled).nonzero().T
        if self.lookups and len(rows):
            shown = [examples[row].shown for row in rows.tolist()]
            columns = columns - answers.shape[1] + ids.shape[1]  # where the next token is the word shown
            second_loss, log["shown_second"] = attribute_heads.second_loss(
                states[rows, columns], self.heads, [int(moment.start) for moment in shown]
            )
            seen = torch.zeros_like(ids, dtype=torch.bool)  # where a pair ends that shows the moment
            moments = [example.shown for example in examples for _ in example.pairs]
            seen[pair_ends] = torch.tensor([_is_within(*both) for both in zip(pairs, moments, strict=True)])
            looks = self._looks(ids, rows, columns, seen)
            loss = loss + second_loss - (looks + 1e-6).log().mean()
            log["looks"] = looks.mean()
        return loss, log

    def _looks(self, ids, rows, columns, seen):
        """Return how much of its attention a token at (rows, columns), each (M,), pays to what is `seen`, (M, 2).

        In the layer behind the states: of one head for each of the two keys.
        """
        attention = self.task.model.model.language_model.layers[HALF].self_attn
        queries, keys = attention.compared  # (B, heads, length, D), (B, 2, length, D)
        queries = queries[:, :: attention.num_key_value_groups][rows, :, columns]  # (M, 2, D)
        scores = torch.einsum("mhd,mhld->mhl", queries, keys[rows]) * attention.scaling
        before = torch.arange(ids.shape[1]) <= columns[:, None]  # (M, length)
        before &= (ids != self.task.tokenizer.pad_token_id)[rows]
        scores = scores.masked_fill(~before[:, None], -torch.inf)
        return (scores.softmax(dim=-1) * seen[rows][:, None]).sum(dim=-1)


def _is_within(pair: dict, moment) -> bool:
    """Return whether a pair of frames, a label of `pretraining_data.pair_labels`, shows a moment."""
    return moment is not None and moment.start <= round(pair["time"], 1) < moment.end


def _accuracy(scores, right):
    """Return how often the highest score of a row is in the `right` column."""
    return (scores.argmax(1) == right).float().mean()


def _language(kind, task, recipe, folder, freeze_vision=True, heads=False):
    """Teach the language model one kind of example, by the name of a method of `Examples`."""
    task.model.model.visual.requires_grad_(not freeze_vision)
    heads = [task.new_heads()] if heads else []
    train(recipe, task.model, AnswerLoss(task, recipe, getattr(task.examples, kind), *heads), folder, heads)


def locate(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach it to find a moment in longer windows: three steps in four ask about one, the fourth is a task.

    The heads of `watch`, begun anew, also read what is asked for where a time is to be named: what is sought and what
    is seen come to look alike, and can be matched. Without that it named any of a video's moments.
    """
    _mix_with_tasks(task, recipe, folder, task.examples.question, replace(recipe, batch=recipe.batch // 2))


def judge(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach it to say what the video shows where that is not what is asked for; one step in four is any task.

    What is the same all along a video it saw before; of what changes it wrote down the word of the query.
    """
    _mix_with_tasks(task, recipe, folder, task.examples.judgement, recipe)


def look(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach it to look up what is shown at the time that its reasoning names, with queries that are little help.

    Of what changes within a video, `judge` hardly learned it: actions stayed the word of the query in nine of ten. What
    a pair of frames shows, and when, can be read half-way up. Here the heads also read there, where a shown word comes
    next, when that is; and the next layer's attention is paid for going to the pairs of that moment.
    """
    task.model.set_attn_implementation({"text_config": KEEPING})
    draw = partial(task.examples.judgement, strange=recipe.strange, differ=recipe.differ)
    _mix_with_tasks(task, recipe, folder, draw, recipe, lookups=True)


def translate(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach it what colours look like to a camera by what one known colour looks like, for archives (docs/archives.md).

    One step in four is what `look` learned from.
    """
    task.model.model.visual.requires_grad_(False)
    draw = partial(task.examples.judgement, strange=recipe.strange, differ=recipe.differ)
    looks = AnswerLoss(task, replace(recipe, batch=recipe.batch // 3), draw)
    losses = AnswerLoss(task, recipe, task.examples.translation)
    train(recipe, task.model, lambda step, rng: (looks if step % 4 == 3 else losses)(step, rng), folder)


def _mix_with_tasks(task, recipe, folder, draw, task_recipe, lookups=False):
    """Train on three steps of one kind of example and one of any task, with heads that read targets too.

    The heads go on from a phase before that kept them, or begin anew.
    """
    task.model.model.visual.requires_grad_(False)
    heads_file, heads = task.profile.data_dir("foundation") / recipe.start / HEADS, task.new_heads()
    if recipe.start and heads_file.exists():
        heads = torch.nn.Parameter(load_file(heads_file)["heads"])
    examples = AnswerLoss(task, recipe, draw, heads, True, lookups)
    tasks = AnswerLoss(task, task_recipe, task.examples.task, heads, True, lookups)
    losses = lambda step, rng: (tasks if step % 4 == 3 else examples)(step, rng)  # noqa: E731
    train(recipe, task.model, losses, folder, [heads])
    if lookups:
        save_file({"heads": heads.detach()}, folder / HEADS)


# --- Phases of the vision tower and of engines


def see(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach the vision tower the attributes of single pairs of frames, by linear heads that are thrown away.

    The real model's tower was an image encoder before it saw a video, too. Without this the captions of a backbone
    named place and light after 300 steps and guessed everything else.
    """
    tower, videos = task.model.model.visual, task.videos
    width = 3 * task.model.config.text_config.hidden_size * 4  # merged, two deepstack features; four tokens
    heads = torch.nn.Parameter(0.01 * torch.randn(len(attribute_ids()) + 1, width))  # the last row: nothing

    def losses(step, rng):
        pairs, labels = [], []
        for _ in range(recipe.batch):
            first, _, _, number = videos.pair(rng)
            pairs.append(videos.pair_frames(number, first))
            second = videos.timestamps[number][first]
            labels.append(pretraining_data.visible_attributes(videos.scenes[number], second))
        patches, grid = inputs.patchify(np.concatenate(pairs), tower.config, frame_sizes.PixelRule(10**9))
        out = tower(patches, grid_thw=torch.tensor([(1, *grid[1:])] * recipe.batch))
        states = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1).reshape(recipe.batch, -1)
        return attribute_loss(states @ heads.T, labels)

    train(recipe, tower, losses, folder, [heads])


def index(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach an engine video vectors that a linear map of all seven attributes of their moments can tell apart."""
    videos, engine = task.videos, task.engine(recipe)
    probe = torch.nn.Parameter(0.05 * torch.randn(len(attribute_ids()), engine.width))

    def losses(step, rng):
        numbers = videos.family_batch(recipe.batch, rng)
        count = recipe.frame_count(rng)
        prompts = [engine.video_prompt(videos.subset(number, count, rng)) for number in numbers]
        video_vecs = engine.pool(task.collate(prompts))  # (B, D)
        moments = [(row, m) for row, number in enumerate(numbers) for m in videos.scenes[number].moments]
        right = torch.tensor([row for row, _ in moments])
        scores = attribute_heads.probe_vecs(probe, [moment for _, moment in moments]) @ video_vecs.T  # (M, B)
        return _infonce(scores, right)

    train(recipe, engine.model, losses, folder, [probe])


def text(task: PretrainingTask, recipe: PhaseConfig, folder: Path) -> None:
    """Teach an engine's texts the frozen index, from captions that name part of what a moment shows.

    Texts and videos share the language model, so a copy of the engine as it was holds the video side in place: on
    every step some videos must keep the vectors that it gives them.
    """
    videos, engine = task.videos, task.engine(recipe)
    gallery = _embed_all(videos, engine, recipe.seed)  # (V, D)
    before = copy.deepcopy(engine)
    engine.model.visual.requires_grad_(False)
    embedding = engine.model.get_input_embeddings().weight.detach()
    length = embedding.norm(dim=1).mean().item()

    def losses(step, rng):
        numbers = rng.choice(len(videos.scenes), recipe.batch, replace=False)
        scenes = [videos.scenes[number] for number in numbers]
        texts = [pretraining_data.partial_caption(scene.moments, recipe, rng) for scene in scenes]
        soft = None
        if rng.random() < recipe.neutral:
            soft = pretraining_data.neutral_tokens(embedding, len(texts), length, rng)
        rivals = rng.choice(len(gallery), min(4 * recipe.batch, len(gallery)), replace=False)
        columns = np.concatenate([numbers, rivals[~np.isin(rivals, numbers)]])
        scores = engine.text_vecs(texts, soft) @ gallery[torch.from_numpy(columns)].T
        count = recipe.frame_count(rng)
        clips = [videos.subset(int(number), count, rng) for number in numbers[: recipe.batch // 6]]
        batch = task.collate([engine.video_prompt(clip) for clip in clips])
        with torch.no_grad():
            vecs_before = before.pool(batch)
        moved = 1 - (engine.pool(batch) * vecs_before).sum(dim=1).mean()
        coarse, log = _infonce(scores, torch.arange(len(numbers)))
        return coarse + HOLD * moved, {"coarse": coarse, "moved": moved, **log}

    train(recipe, engine.model, losses, folder)


def _embed_all(videos, engine, seed):
    """Return (V, D) vectors of 24 frames of every video."""
    rng, numbers = np.random.default_rng(seed), range(len(videos.scenes))
    engine.model.eval()
    vecs = [
        engine.embed_clips([videos.subset(n, 24, rng) for n in numbers[i : i + 64]]) for i in numbers[::64]
    ]
    return torch.from_numpy(np.concatenate(vecs))


def _infonce(scores, right):
    """Return InfoNCE of (M, B) scores, and how often the `right` column is the highest."""
    return F.cross_entropy(scores / TEMPERATURE, right), {"r1": _accuracy(scores, right)}


PHASES = {
    "see": see,
    # To say what two frames show.
    "name": partial(_language, "picture", freeze_vision=False),
    # To say what happens when, in windows of videos. From here on the vision tower stays as it is.
    "tell": partial(_language, "dense_caption"),
    # To keep the time and what is on view in mind where a pair of frames ends, while it answers questions: by linear
    # heads on its states half-way up, which are thrown away. A span is then looked up there and copied; from answers
    # alone that was hardly learned.
    "watch": partial(_language, "question", heads=True),
    # To compare before it has to look: the agent's task with the video described in words.
    "compare": partial(_language, "reading"),
    # To do what an agent has to: judge, place, answer, rewrite; with captions kept in the mix.
    "instruct": partial(_language, "task"),
    "locate": locate,
    "judge": judge,
    "look": look,
    "translate": translate,
    "index": index,
    "text": text,
}
