"""The mini foundation: one tiny Qwen3-VL taught to describe the rendered world, then search engines made from it.

Everything here is ours; it stands where Qwen's own pretraining stands for the real models. On the `foundation` split
the backbone learns to see (attributes of single pictures), to name (their captions), then to tell what happens when
(dense captioning). An engine starts from it and learns video vectors that a linear map from all seven attributes can
tell apart: a rich index. Its text side then follows that index from captions which rarely name a colour: coarse. What
the index holds and the text side misses is the room that query refinement can work in (`headroom`). LOG.md has what
failed on the way.
"""

import argparse
import copy
import json
import math
import os
import resource
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import corpus, engine, frames, metrics, miniworld, params, qwen, stages
from vsr1.miniworld import ATTRIBUTES

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>", "<answer>", "</answer>", "<start>", "</start>",
    "<end>", "</end>", "<query_update>", "</query_update>",
)  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FILLER = (
    "",
    "",
    "Find the video: ",
    "Show me a clip. ",
    "Which video is it? ",
    "Please search for this moment: ",
)
ASK = "Describe what happens when."


@dataclass(frozen=True)
class Recipe:
    """Training of the mini models: data parallel over `processes`, each with one torch thread."""

    steps: int
    batch: int  # videos of one process
    rate: float
    frames: tuple[int, int]  # fewest and most frames of a video shown in training
    seed: int = 7
    layers: int | None = None  # of the backbone's text layers, how many an engine keeps
    place: float = 0.0  # how often a training caption of the text side names the place,
    light: float = 0.0  # the light,
    detail: float = 0.0  # a colour: of shirt, trousers or object
    neutral: float = 0.0  # how often neutral tokens stand where soft tokens will
    processes: int = 2
    save_every: int = 100


VISION = Recipe(steps=500, batch=160, rate=1e-3, frames=(2, 2))  # backbone: its vision tower learns to see,
WORDS = Recipe(steps=300, batch=40, rate=1e-3, frames=(2, 2))  # then its language model to say what it sees,
TEXT = (  # of an engine: its text side, in two rounds, the second with the place always named and more neutral tokens
    Recipe(280, 72, 1e-3, (10, 32), place=0.8, light=0.8, detail=0.15, neutral=0.5, processes=1),
    Recipe(240, 72, 7e-4, (10, 32), place=1.0, light=0.3, detail=0.05, neutral=0.75, processes=1),
)
HOLD = 20.0  # weight of one minus the cosine between a video's vector and what it was
RECIPES = {  # then to say what happens when
    "backbone": Recipe(steps=360, batch=16, rate=7e-4, frames=(10, 16)),
    "engine-small": Recipe(steps=360, batch=40, rate=8e-4, frames=(10, 24), layers=2, processes=1),
    "engine-large": Recipe(steps=360, batch=40, rate=8e-4, frames=(10, 24), layers=3, processes=1),
}


# --- tokenizer and configuration -----------------------------------------------------------------------------------


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens; every word of `texts` and every number to 199 is one token.

    Any other text still has ids (bytes), as with the real tokenizer.
    """
    pattern = Regex(r"[ ]?seconds>|[ ]?\p{L}+|\d{1,3}|\.\d|[ ]?[^\s\p{L}\p{N}]|\s")
    split = pre_tokenizers.Split(pattern, "isolated")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **ends)
    tokenizer.chat_template = CHAT
    return tokenizer


def vocabulary() -> list[str]:
    """Texts that hold every word the mini world uses, often enough that each becomes one token."""
    numbers = " ".join(f"<{n}.{n % 10} seconds>{n}" for n in range(200))
    roles = (
        "system\nuser\nassistant\nRepresent the user's input. matched not_matched Query: Retrieved video: "
    )
    own = "the query asks for but the video shows same different no yes what who where when is it and or so to from "
    parts = [numbers, roles, own, " " + own.title(), ASK, *FILLER]
    for table in (
        miniworld.COLOURS,
        miniworld.OBJECTS,
        miniworld.LIGHTS.values(),
        miniworld.ACTIONS.values(),
    ):
        parts += [f" {word}" for word in table]
    for dataset, places in miniworld.PLACES.items():
        for place in places:
            for style in range(miniworld.STYLES):
                for named in (
                    ATTRIBUTES,
                    ("action", "object"),
                    ("colour",),
                    ("object",),
                    ("place",),
                    ("light",),
                ):
                    look = {name: miniworld.values(name, dataset)[0] for name in ATTRIBUTES} | {
                        "place": place
                    }
                    parts.append(miniworld.tell(miniworld.Moment(0, 1, **look), style, named))
    parts += [part.lower() for part in parts]
    return (parts + [f" {part}" for part in parts]) * 3


def make_config(tokenizer) -> Qwen3VLConfig:
    """A Qwen3-VL of about 3 M parameters; a visual token covers 32 x 32 pixels of two frames, as in the real one."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    marks = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True
        },
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=marks["vision_start"],
        vision_end_token_id=marks["vision_end"],
    )


# --- the foundation split in memory ----------------------------------------------------------------------------------


class Films:
    """All foundation videos at the size the models see: frames on disk, times and scenes in memory."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "films.json").read_text(encoding="utf-8"))
        pixels = np.memmap(folder / "frames.raw", np.uint8, "r")
        self.frames = pixels.reshape(-1, *index["size"], 3)  # (sum of T, H, W, 3)
        self.datasets, self.starts = index["datasets"], index["starts"]
        self.seen_at = [np.array(times) for times in index["seen_at"]]
        self.scenes = [
            miniworld.Scene(**(row | {"moments": tuple(miniworld.Moment(**m) for m in row["moments"])}))
            for row in index["scenes"]
        ]
        families = {}
        for number, scene in enumerate(self.scenes):
            families.setdefault((self.datasets[number], scene.family), []).append(number)
        self.families = list(families.values())

    def clip(self, number: int, count: int, rng) -> frames.Clip:
        """`count` frames of a video in order, drawn at random: the same film at a lower, uneven rate."""
        times = self.seen_at[number]
        some = np.sort(rng.choice(len(times), min(count, len(times)) // 2 * 2, replace=False))
        pixels = self.frames[self.starts[number] + some]
        return frames.Clip(pixels, times[some], self.scenes[number].seconds, None)

    def pair(self, rng) -> tuple[int, int, bool, int]:
        """Two frames in a row that show the same: (first frame, moment, busy?, video), drawn at random."""
        while True:
            number = int(rng.integers(len(self.scenes)))
            at = int(rng.integers(len(self.seen_at[number]) - 1))
            on = {self.scenes[number].on(float(second)) for second in self.seen_at[number][at : at + 2]}
            if len(on) == 1:
                return at, *on.pop(), number


def load_films(profile) -> Films:
    """Render and decode the foundation split of every data set, once."""
    homes = [miniworld.render(profile, dataset, ("foundation",)) for dataset in profile.datasets]
    inputs = {"videos": [stages.stamp(home)["key"] for home in homes], "pixels": profile.frame_pixels}
    target = profile.runs("foundation") / "films"

    def decode(folder):
        index, total = {"datasets": [], "starts": [], "seen_at": [], "scenes": []}, 0
        with open(folder / "frames.raw", "wb") as file:  # one after the other: they need not fit into memory
            for dataset, home in zip(profile.datasets, homes, strict=True):
                scenes = list(miniworld.read_scenes(home.parent / "corpus").values())
                reader = frames.Reader(profile.video_fps, profile.max_frames)
                clips = frames.read_many([home / f"{s.video}.mp4" for s in scenes], reader, os.cpu_count())
                for scene, clip in zip(
                    scenes, stages.progress(clips, f"decode {dataset}", len(scenes)), strict=True
                ):
                    assert clip.problem is None, (scene.video, clip.problem)
                    index["size"] = qwen.fit(*clip.frames.shape[1:3], 32, profile.frame_pixels)
                    index["datasets"].append(dataset)
                    index["starts"].append(total)
                    index["seen_at"].append(clip.seen_at.round(3).tolist())
                    index["scenes"].append(asdict(scene))
                    file.write(shrink(clip.frames, index["size"]).tobytes())
                    total += len(clip.frames)
        stages.write_json(folder / "films.json", index)

    return Films(stages.run(target, inputs, decode))


def shrink(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames at the size `qwen.patchify` would give them, kept as uint8."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.byte().permute(0, 2, 3, 1).numpy()


# --- training ------------------------------------------------------------------------------------------------------


def train(name: str, recipe: Recipe, model, losses, folder: Path, extra=()) -> None:
    """AdamW with a cosine schedule over `losses(step, rng) -> (total, log)`; resumable; logs one line a step."""
    weights = [p for p in model.parameters() if p.requires_grad] + list(extra)
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    state, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    first, spent, rank, world = 0, 0.0, dist.get_rank(), dist.get_world_size()
    if state.exists():  # resume
        saved = torch.load(state, weights_only=True)
        first, spent = saved["step"], saved["seconds"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for weight, value in zip(extra, saved["extra"], strict=True):
            weight.data.copy_(value)
        if rank == 0:
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:first]))
    started = time.time() - spent
    model.train()
    with open(log if rank == 0 else os.devnull, "a", buffering=1, encoding="utf-8") as lines:
        steps = range(first, recipe.steps)
        for step in stages.progress(steps, name) if rank == 0 else steps:
            warm = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = (
                    recipe.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)) + 1e-6
                )
            total, row = losses(step, np.random.default_rng([recipe.seed, step, rank]))
            assert torch.isfinite(total), f"{name}: loss {total} at step {step}"
            optimizer.zero_grad()
            total.backward()
            for weight in weights:
                dist.all_reduce(weight.grad)
                weight.grad /= world
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            row = {key: round(value.item(), 4) for key, value in row.items()}
            row = {"step": step, "loss": round(total.item(), 4), **row, "norm": round(norm.item(), 3)}
            lines.write(json.dumps(row | {"seconds": round(time.time() - started, 1)}) + "\n")
            if rank == 0 and ((step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps):
                lines.flush()
                saved = {"step": step + 1, "seconds": time.time() - started, "model": model.state_dict()}
                saved |= {"optimizer": optimizer.state_dict(), "extra": [weight.data for weight in extra]}
                torch.save(saved, state.with_suffix(".tmp"))
                state.with_suffix(".tmp").replace(state)
    model.eval()


def train_vision(films: Films, model, recipe: Recipe, folder: Path) -> None:
    """Teach the vision tower to see: the attributes of single pairs of frames, by linear heads that are thrown away.

    As the real model's tower was an image encoder before it saw a video. Without it the captions of a backbone named
    place and light after 300 steps and guessed everything else (LOG.md).
    """
    tower, table = model.model.visual, features()
    count = (
        3 * model.config.text_config.hidden_size * 4
    )  # merged and two deepstack features, four tokens each
    heads = torch.nn.Parameter(0.01 * torch.randn(len(table) + 1, count))  # the last row: nothing going on
    columns = {name: [n for (kind, _), n in table.items() if kind == name] for name in ATTRIBUTES}

    def losses(step, rng):
        pixels, labels = zip(*(seen_pair(films, rng) for _ in range(recipe.batch)), strict=True)
        patches, grid = qwen.patchify(np.concatenate(pixels), tower.config, 10**9)
        grids = torch.tensor([(1, *grid[1:])] * recipe.batch)
        out = tower(patches, grid_thw=grids)
        states = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1).reshape(recipe.batch, -1)
        logits, total, log = states @ heads.T, 0.0, {}
        for name in ATTRIBUTES:
            some = torch.tensor([*columns[name], len(table)])
            wanted = torch.tensor([table.get((name, look[name]), len(table)) for look in labels])
            total = total + F.cross_entropy(logits[:, some], torch.searchsorted(some, wanted))
            log[name] = (some[logits[:, some].argmax(1)] == wanted).float().mean()
        return total / len(ATTRIBUTES), log

    train("vision", recipe, tower, losses, folder, extra=[heads])


def seen_pair(films: Films, rng) -> tuple[np.ndarray, dict]:
    """Two frames in a row and the attributes on view; between moments no action, object, colour."""
    at, which, busy, number = films.pair(rng)
    look = {name: getattr(films.scenes[number].moments[which], name) for name in ATTRIBUTES}
    look |= {} if busy else dict.fromkeys(("action", "object", "colour"))
    return films.frames[films.starts[number] + at : films.starts[number] + at + 2], look


def train_backbone(profile, films: Films, tokenizer, recipe: Recipe, folder: Path):
    """A Qwen3-VL trained from nothing to see, then to tell, moment by moment, what happens when."""
    torch.manual_seed(recipe.seed)
    model = Qwen3VLForConditionalGeneration(make_config(tokenizer))
    train_vision(films, model, VISION, folder)

    def told_loss(rows):
        batch = qwen.collate([prompt for prompt, _ in rows], model, tokenizer.pad_token_id)
        told = max(length for _, length in rows)
        logits = model(**batch, logits_to_keep=told + 1).logits[:, :-1]  # (B, told, vocabulary)
        wanted = batch["input_ids"][:, -told:]
        spoken = torch.arange(told)[None] >= told - torch.tensor([length for _, length in rows])[:, None]
        loss = F.cross_entropy(logits[spoken], wanted[spoken])
        right = (logits[spoken].argmax(-1) == wanted[spoken]).float().mean()
        return loss, {"accuracy": right}

    def words(step, rng):
        return told_loss([picture_row(profile, films, tokenizer, model, rng) for _ in range(WORDS.batch)])

    def captions(step, rng):
        count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
        numbers = draw(films, recipe, rng)
        return told_loss(
            [caption_row(profile, films, tokenizer, model, number, count, rng) for number in numbers]
        )

    train("words", WORDS, model, words, folder)
    train("backbone", recipe, model, captions, folder)
    return model


def draw(films: Films, recipe: Recipe, rng) -> list[int]:
    """Numbers of a batch's videos: whole families as far as they fit, since near-duplicates teach the most."""
    batch = []
    while len(batch) < recipe.batch:
        batch += films.families[int(rng.integers(len(films.families)))]
    return list(dict.fromkeys(batch))[: recipe.batch]


def caption_row(profile, films, tokenizer, model, number, count, rng):
    """(prompt with answer, tokens of the answer): a whole film, and what happens when."""
    answer = "".join(
        f"{m.start:.1f} to {m.end:.1f}: {miniworld.tell(m, int(rng.integers(miniworld.STYLES)))}\n"
        for m in films.scenes[number].moments
    )
    return _row(profile, tokenizer, model, films.clip(number, count, rng), ASK, answer)


def picture_row(profile, films, tokenizer, model, rng):
    """(prompt with answer, tokens of the answer): two frames of one moment, and its fine caption."""
    while True:
        at, which, busy, number = films.pair(rng)
        if busy:
            break
    some = slice(films.starts[number] + at, films.starts[number] + at + 2)
    clip = frames.Clip(films.frames[some], films.seen_at[number][at : at + 2], 2.0, None)
    moment = films.scenes[number].moments[which]
    answer = miniworld.tell(moment, int(rng.integers(miniworld.STYLES))) + "\n"
    return _row(profile, tokenizer, model, clip, "Describe the picture.", answer)


def _row(profile, tokenizer, model, clip, ask, answer):
    patches, grid = qwen.patchify(clip.frames, model.config.vision_config, profile.frame_pixels)
    per_pair = grid[1] * grid[2] // model.config.vision_config.spatial_merge_size**2
    prompt = qwen.chat(tokenizer, "Watch the video.", qwen.video_text(clip.seen_at, per_pair) + ask)
    answer = tokenizer(answer + "<|im_end|>")["input_ids"]
    return qwen.Prompt(tokenizer(prompt)["input_ids"] + answer, patches, grid), len(answer)


def train_engine(name: str, profile, films: Films, backbone, tokenizer, recipe: Recipe, folder: Path):
    """A search engine from the backbone: first a rich index, then a text side that knows little but the coarse."""
    torch.manual_seed(recipe.seed)
    model = Qwen3VLModel(copy.deepcopy(backbone.config))
    model.load_state_dict(backbone.model.state_dict())
    model.language_model.layers = model.language_model.layers[: recipe.layers]
    model.config.text_config.num_hidden_layers = recipe.layers
    made = engine.Engine(profile, model, tokenizer, name)
    probe = torch.nn.Parameter(0.05 * torch.randn(len(features()), made.width))

    def rich(step, rng):
        numbers = draw(films, recipe, rng)
        count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
        prompts = [made.video_prompt(films.clip(number, count, rng)) for number in numbers]
        video_vecs = made.pool(qwen.collate(prompts, model, tokenizer.pad_token_id))  # (B, D)
        moments = [
            (row, moment) for row, number in enumerate(numbers) for moment in films.scenes[number].moments
        ]
        scores = probe_vecs(probe, [moment for _, moment in moments]) @ video_vecs.T  # (M, B)
        owner = torch.tensor([row for row, _ in moments])
        return F.cross_entropy(scores / 0.07, owner), {"r1": (scores.argmax(1) == owner).float().mean()}

    train(name, recipe, model, rich, folder, extra=[probe])
    for number, recipe in enumerate(TEXT, 1):
        train_text_side(f"text-{number}", made, films, recipe, folder)
    return made


def train_text_side(name: str, made: engine.Engine, films: Films, recipe: Recipe, folder: Path) -> None:
    """Teach an engine's texts the frozen index, from captions that mostly name action, object and setting.

    Texts and videos share the language model, so a copy of the engine as it was holds the video side in place: on
    every step some clips must keep the vectors that it gives them.
    """
    rng = np.random.default_rng(recipe.seed)
    made.model.eval()
    numbers = range(len(films.scenes))
    vecs = [made.embed_clips([films.clip(n, 24, rng) for n in numbers[i : i + 64]]) for i in numbers[::64]]
    gallery = torch.from_numpy(np.concatenate(vecs))  # (V, D)
    before = copy.deepcopy(made)
    made.model.visual.requires_grad_(False)
    size = made.model.get_input_embeddings().weight.detach().norm(dim=1).mean().item()
    pad = made.tokenizer.pad_token_id

    def coarse(step, rng):
        numbers = rng.choice(len(films.scenes), recipe.batch, replace=False)
        moments = [films.scenes[number].moments for number in numbers]
        texts = [partial_caption(some[int(rng.integers(len(some)))], recipe, rng) for some in moments]
        soft = (
            neutral_tokens(made.model, len(texts), int(rng.integers(1, 11)), size, rng)
            if rng.random() < 0.5
            else None
        )
        rivals = rng.choice(len(gallery), min(4 * recipe.batch, len(gallery)), replace=False)
        rivals = np.concatenate([numbers, rivals[~np.isin(rivals, numbers)]])
        scores = made.pool(made.text_batch(texts, soft)) @ gallery[torch.from_numpy(rivals)].T
        right = torch.arange(len(numbers))
        count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
        prompts = [
            made.video_prompt(films.clip(int(number), count, rng)) for number in numbers[: recipe.batch // 6]
        ]
        batch = qwen.collate(prompts, made.model, pad)
        with torch.no_grad():
            held = before.pool(batch)
        moved = 1 - (made.pool(batch) * held).sum(dim=1).mean()
        loss = F.cross_entropy(scores / 0.07, right)
        return loss + HOLD * moved, {
            "coarse": loss,
            "moved": moved,
            "r1": (scores.argmax(1) == right).float().mean(),
        }

    train(name, recipe, made.model, coarse, folder)


def features() -> dict[tuple[str, str], int]:
    """A number for every (attribute, value) of the world."""
    pairs = [
        (name, value)
        for name in ATTRIBUTES
        for dataset in miniworld.PLACES
        for value in miniworld.values(name, dataset)
    ]
    return {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}


def probe_vecs(probe: torch.Tensor, moments: list[miniworld.Moment]) -> torch.Tensor:
    """(M, D) unit vectors: a linear map of the seven attributes of each moment."""
    table = features()
    rows = torch.tensor(
        [[table[name, getattr(moment, name)] for name in ATTRIBUTES] for moment in moments]
    )  # (M, 7)
    return F.normalize(probe[rows].sum(dim=1), dim=-1)


def partial_caption(moment: miniworld.Moment, recipe: Recipe, rng) -> str:
    """A caption for the text side: action, object or both; the other attributes as often as the recipe says."""
    share = {"place": recipe.place, "light": recipe.light}
    named = {name for name in ATTRIBUTES if rng.random() < share.get(name, recipe.detail)}
    named |= set((("action",), ("object",), ("action", "object"))[int(rng.choice(3, p=(0.2, 0.2, 0.6)))])
    text = miniworld.tell(moment, int(rng.integers(miniworld.STYLES)), tuple(named))
    return str(rng.choice(FILLER)) + text


def neutral_tokens(model, rows: int, count: int, size: float, rng) -> torch.Tensor:
    """(rows, count, D) embeddings without a message, put where soft tokens will stand: nothing, noise, or stray words.

    An engine that never met extra tokens there takes them for a query (MINIWORLD.md, point 4).
    """
    words = model.get_input_embeddings().weight.detach()
    kind = rng.integers(3)
    if kind == 0:
        return torch.zeros(rows, count, words.shape[1])
    noise = torch.from_numpy(rng.standard_normal((rows, count, words.shape[1]))).float()
    if kind == 1:
        return noise / noise.norm(dim=-1, keepdim=True) * size * float(rng.random())
    return words[torch.from_numpy(rng.integers(len(SPECIALS), len(words), (rows, count)))] * float(
        rng.random()
    )


# --- stages --------------------------------------------------------------------------------------------------------


def publish(name: str, recipe: Recipe, model, tokenizer, folder: Path) -> None:
    """Weights in 16 bit, tokenizer, training log and provenance of a mini model, as the package ships them."""
    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    logs = sorted(folder.glob("*.jsonl"))  # one for each thing it learned
    last = json.loads((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "last_step": last,
        "minutes": round(
            sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs) / 60, 1
        ),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"cpu, {recipe.processes} process(es) of one thread",
        "data": "foundation splits of the mini world, rendered by vsr1.miniworld; no other data",
    }
    stages.write_json(folder / "provenance.json", facts)
    for state in folder.glob("*.pt"):  # optimizers and float32 weights: only for resuming
        state.unlink()


def make(profile) -> None:
    """Train backbone and engines, or leave what is up to date, and put them where the package ships them."""
    load_films(profile)
    home = profile.runs("foundation")
    for name, recipe in RECIPES.items():
        inputs = {"data": stages.stamp(home / "films")["key"], "recipe": asdict(recipe)}
        inputs["code"] = stages.code("foundation", "engine", "qwen", "miniworld")
        inputs["from"] = None if name == "backbone" else stages.stamp(home / "backbone")["key"]

        def work(folder, name=name, recipe=recipe):
            with tempfile.NamedTemporaryFile() as meeting:
                job = (profile, name, recipe, folder, meeting.name)
                torch.multiprocessing.spawn(_work, job, nprocs=recipe.processes)

        target = stages.run(home / name, inputs, work)
        shipped = params.HERE / "models" / name
        shutil.rmtree(shipped, ignore_errors=True)
        shutil.copytree(target, shipped, ignore=shutil.ignore_patterns(".*"))
        print(f"{name}: {shipped.relative_to(params.ROOT)}")


def main(argv: list[str]) -> int:
    """`make foundation`: about an hour on 2 cores; goes on where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m vsr1 foundation", description=main.__doc__)
    parser.add_argument("--profile", default="mini", help="whose world to render and learn")
    make(params.load(parser.parse_args(argv).profile))
    return 0


def _work(rank, profile, name, recipe, folder, meeting):
    """One process of a training run; the first one writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=recipe.processes)
    films, tokenizer = load_films(profile), make_tokenizer(vocabulary())
    if name == "backbone":
        model = train_backbone(profile, films, tokenizer, recipe, folder)
    else:
        backbone, _ = qwen.load(Qwen3VLForConditionalGeneration, str(profile.runs("foundation") / "backbone"))
        model = train_engine(name, profile, films, backbone, tokenizer, recipe, folder).model
    if rank == 0:
        publish(name, recipe, model, tokenizer, folder)
    dist.destroy_process_group()


# --- headroom --------------------------------------------------------------------------------------------------------


def headroom(profile, dataset: str, which: str = "engine") -> dict:
    """How much a better query could gain on a test split: see `_headroom` for the names. Percent; a stage."""
    home = profile.runs(dataset)
    folders = [engine.embed_corpus(profile, dataset, split, which) for split in ("train", "test")]
    inputs = {
        "vectors": [stages.stamp(folder)["key"] for folder in folders],
        "code": stages.code("foundation", "metrics"),
    }
    inputs["knobs"] = [profile.probe_steps, profile.neutral_tokens, profile.seed]

    def work(folder):
        stages.write_json(folder / "headroom.json", _headroom(profile, dataset, which, *folders))

    target = stages.run(home / "embed" / which / "headroom", inputs, work)
    return json.loads((target / "headroom.json").read_text(encoding="utf-8"))


def moment_of(scenes: dict[str, miniworld.Scene], query: corpus.Query) -> miniworld.Moment:
    """The moment that a query of the mini world is about."""
    return next(m for m in scenes[query.video].moments if (m.start, m.end) == query.span)


def _headroom(profile, dataset, which, train_folder, test_folder):
    """Plain and walk-down from the vectors; the probe trained on the train gallery (MINIWORLD.md, point 6)."""
    torch.manual_seed(profile.seed)
    home = profile.runs(dataset)
    scenes = miniworld.read_scenes(home / "corpus")
    sides = []
    for split, folder in (("train", train_folder), ("test", test_folder)):
        vectors = engine.load_vectors(folder)
        row = {video: number for number, video in enumerate(vectors.video_ids)}
        queries = [
            query for query in corpus.read_fig(home / "corpus" / f"{split}.jsonl") if query.video in row
        ]
        moments = [moment_of(scenes, query) for query in queries]
        sides.append((vectors, moments, np.array([row[query.video] for query in queries])))
    (train_vectors, train_moments, train_column), (vectors, moments, column) = sides
    kept = np.isin(
        vectors.query_ids, [query.id for query in queries]
    )  # a video that cannot be read has no vector
    probe = torch.nn.Parameter(0.05 * torch.randn(len(features()), vectors.video_vecs.shape[1]))
    gallery, wanted = torch.from_numpy(train_vectors.video_vecs), torch.from_numpy(train_column)
    optimizer = torch.optim.Adam([probe], lr=0.02)
    for _ in stages.progress(range(profile.probe_steps), f"probe {dataset}"):
        loss = F.cross_entropy(probe_vecs(probe, train_moments) @ gallery.T / 0.1, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = metrics.ranks(vectors.query_vecs[kept] @ vectors.video_vecs.T, column)
    probed = metrics.ranks(probe_vecs(probe, moments).detach().numpy() @ vectors.video_vecs.T, column)
    failed = plain > 1
    percent = lambda hits: round(100 * float(np.mean(hits)), 2) if len(hits) else None  # noqa: E731
    room = {"n": len(plain), "failed": int(failed.sum()), "plain_r1": percent(plain == 1)}
    room |= {"walkdown": percent(plain[failed] == 2), "probe_r1": percent(probed == 1)}
    room |= {"probe_failed": percent(probed[failed] == 1)}
    made = engine.load(profile, which)
    texts = [query.text for query in queries]
    rms = made.model.get_input_embeddings().weight.norm(dim=1).mean().item()
    noise = torch.randn(len(texts), profile.neutral_tokens, made.width)
    noise = noise / noise.norm(dim=-1, keepdim=True) * rms / 2
    for kind, soft in (("zeros", torch.zeros_like(noise)), ("noise", noise)):
        scores = made.embed_texts(texts, soft) @ vectors.video_vecs.T
        room[f"neutral_{kind}_r1"] = percent(metrics.ranks(scores, column) == 1)
    return room
