"""What the mini models are taught, phase by phase: films in memory, rows made of them, and the losses.

A phase is a function of a `Lesson` (films, tokenizer, model), a recipe and a folder; `foundation` runs them in order
and ships the results. Everything here is ours: it stands where Qwen's own training stands for the real models.
"""

import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import video_reader
from vsr1.mini import architecture, captions, renderer, teacher, world
from vsr1.mini.attribute_heads import (
    attribute_ids,
    attribute_loss,
    new_heads,
    pair_loss,
    probe_vecs,
    target_loss,
)
from vsr1.mini.world import ATTRIBUTES
from vsr1.models import engine, inputs, loading, prompt_text
from vsr1.models.prompt_text import seconds_text

HALF = 2  # text layers up to where `watch` looks
HOLD = 20.0  # weight of one minus the cosine between a video's vector and what it was


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of training, data parallel over `processes` of one torch thread each."""

    steps: int
    batch: int  # rows of one process: pictures, films or texts
    rate: float  # learning rate, warmed up, then on a cosine to nearly nothing
    frames: tuple[int, ...]  # fewest and most frames of a film
    start: str = ""  # the phase whose weights it starts from
    ships: str = ""  # the folder of vsr1/models that gets the result
    processes: int = 2
    layers: int = 0  # of the text layers, how many an engine keeps; 0: all
    place: float = 0.0  # how often a caption for the text side names the place,
    light: float = 0.0  # the light,
    detail: float = 0.0  # a colour of shirt, trousers or object,
    wrong: float = 0.0  # and how often such a colour is another than the film's
    decisive: float = 1.0  # how much a yes, a no or a verdict counts in a reply, against another token
    timing: float = 1.0  # the same for the whole seconds of a start or an end
    neutral: float = 0.0  # how often neutral tokens stand where soft tokens will
    seed: int = 7
    save_every: int = 100


# --- the foundation split in memory ----------------------------------------------------------------------------------


class Films:
    """All foundation videos at the size the models see: frames on disk, times and scenes in memory."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "films.json").read_text(encoding="utf-8"))
        pixels = np.memmap(folder / "frames.raw", np.uint8, "r")
        self.frames = pixels.reshape(-1, *index["size"], 3)  # (sum of T, H, W, 3)
        self.datasets, self.starts = index["datasets"], index["starts"]
        self.timestamps = [np.array(times) for times in index["timestamps"]]
        self.scenes = [
            world.Scene(**(row | {"moments": tuple(world.Moment(**m) for m in row["moments"])}))
            for row in index["scenes"]
        ]
        families = {}
        for number, scene in enumerate(self.scenes):
            families.setdefault((self.datasets[number], scene.family), []).append(number)
        self.families = list(families.values())
        self.family_of = {number: i for i, family in enumerate(self.families) for number in family}

    def clip(self, number: int, count: int, rng) -> video_reader.Clip:
        """`count` frames of a video in order, drawn at random: the same film at a lower, uneven rate."""
        times = self.timestamps[number]
        some = np.sort(rng.choice(len(times), min(count, len(times)) // 2 * 2, replace=False))
        pixels = self.frames[self.starts[number] + some]
        return video_reader.Clip(pixels, times[some], self.scenes[number].seconds, None)

    def window(self, number: int, count: int, rng) -> tuple[video_reader.Clip, tuple[world.Moment, ...]]:
        """`count` frames in a row, and the moments of which they show at least two, cut to what is shown."""
        times = self.timestamps[number]
        count = min(count, len(times)) // 2 * 2
        first = int(rng.integers(len(times) - count + 1))
        some = times[first : first + count]
        pixels = self.frames[self.starts[number] + first :][:count]
        clip = video_reader.Clip(pixels, some, self.scenes[number].seconds, None)
        seen = [m for m in self.scenes[number].moments if ((some >= m.start) & (some < m.end)).sum() >= 2]
        low, high = some[0], some[-1] + times[1]  # the first frame is at 0: the second at one step
        cut = [(max(m.start, round(low, 1)), min(m.end, round(high, 1))) for m in seen]
        return clip, tuple(replace(m, start=s, end=e) for m, (s, e) in zip(seen, cut, strict=True))

    def pair(self, rng) -> tuple[int, int, bool, int]:
        """Two frames in a row that show the same: (first frame, moment, busy?, video), drawn at random."""
        while True:
            number = int(rng.integers(len(self.scenes)))
            at = int(rng.integers(len(self.timestamps[number]) - 1))
            on = {
                self.scenes[number].moment_at(float(second))
                for second in self.timestamps[number][at : at + 2]
            }
            if len(on) == 1:
                return at, *on.pop(), number


def load_films(profile) -> Films:
    """Render and decode the foundation split of every data set, once."""
    homes = [renderer.render(profile, dataset, ("foundation",)) for dataset in profile.datasets]
    step_inputs = {
        "videos": [cache.metadata(home)["key"] for home in homes],
        "pixels": profile.max_frame_pixels,
    }
    target = profile.data_dir("foundation") / "films"

    def decode(folder):
        index, total = {"datasets": [], "starts": [], "timestamps": [], "scenes": []}, 0
        with open(folder / "frames.raw", "wb") as file:  # one after the other: they need not fit into memory
            for dataset, home in zip(profile.datasets, homes, strict=True):
                scenes = list(world.read_scenes(home.parent / "corpus").values())
                reader = video_reader.reader_for(profile)
                clips = video_reader.read_videos(
                    [home / f"{s.video}.mp4" for s in scenes], reader, os.cpu_count()
                )
                for scene, clip in zip(
                    scenes, cache.progress(clips, f"decode {dataset}", len(scenes)), strict=True
                ):
                    assert clip.problem is None, (scene.video, clip.problem)
                    index["size"] = inputs.resized_size(*clip.frames.shape[1:3], 32, profile.max_frame_pixels)
                    index["datasets"].append(dataset)
                    index["starts"].append(total)
                    index["timestamps"].append(clip.timestamps.round(3).tolist())
                    index["scenes"].append(asdict(scene))
                    file.write(shrink(clip.frames, index["size"]).tobytes())
                    total += len(clip.frames)
        cache.write_json(folder / "films.json", index)

    return Films(cache.build(target, step_inputs, decode))


def shrink(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames at the size `qwen.patchify` would give them, kept as uint8."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.byte().permute(0, 2, 3, 1).numpy()


# --- training ---------------------------------------------------------------------------------------------------------


def train(recipe: PhaseConfig, model, losses, folder: Path, extra=()) -> None:
    """AdamW with a cosine schedule over `losses(step, rng) -> (total, log)`; resumable; logs one line a step."""
    weights = [p for p in model.parameters() if p.requires_grad] + list(extra)
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    state, log = folder / "state.pt", folder / "log.jsonl"
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
    elif rank == 0:
        log.unlink(missing_ok=True)
    started = time.time() - spent
    model.train()
    with open(log if rank == 0 else os.devnull, "a", buffering=1, encoding="utf-8") as lines:
        steps = range(first, recipe.steps)
        for step in cache.progress(steps, folder.stem) if rank == 0 else steps:
            warm = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = (
                    recipe.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)) + 1e-6
                )
            total, row = losses(step, np.random.default_rng([recipe.seed, step, rank]))
            assert torch.isfinite(total), f"{folder}: loss {total} at step {step}"
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


class Row(NamedTuple):
    """One thing to learn to say."""

    prompt: inputs.Prompt  # with the answer
    told: int  # tokens of the answer
    looks: tuple[dict, ...] = ()  # what each pair of frames shows and when, for `pair_loss`
    asked: dict | None = None  # attributes of the moment asked for


class PretrainingTask:
    """What a phase trains on and with: the films, a tokenizer, a model that starts where its recipe says."""

    def __init__(self, profile, recipe: PhaseConfig):
        self.profile, self.films = profile, load_films(profile)
        self.tokenizer = architecture.make_tokenizer()
        torch.manual_seed(recipe.seed)
        self.model = Qwen3VLForConditionalGeneration(architecture.make_config(self.tokenizer))
        if recipe.start:
            start = profile.data_dir("foundation") / recipe.start
            kind = Qwen3VLModel if recipe.start.startswith("index") else Qwen3VLForConditionalGeneration
            self.model, theirs = loading.load(kind, str(start))
            if (
                theirs.get_vocab() != self.tokenizer.get_vocab()
            ):  # else every word would silently mean another
                raise InputError(
                    f"{start}: trained with another vocabulary; run `make foundation` from its start"
                )

    def video(self, clip: video_reader.Clip) -> tuple[str, inputs.Video]:
        """A film's place in a prompt: its text and itself."""
        config = self.model.config.vision_config
        film = inputs.Video(*inputs.patchify(clip.frames, config, self.profile.max_frame_pixels))
        per_pair = film.grid[1] * film.grid[2] // config.spatial_merge_size**2
        return inputs.video_text(clip.timestamps, per_pair), film

    def row(self, system: str, user: tuple, answer: str, looks=(), asked=None) -> "Row":
        """A prompt and its answer; `user` mixes texts and at most one `video`."""
        text = "".join(part if isinstance(part, str) else part[0] for part in user)
        film = next((part[1] for part in user if not isinstance(part, str)), None)
        told = self.tokenizer(f"{answer}<|im_end|>")["input_ids"]
        ids = self.tokenizer(inputs.chat(self.tokenizer, system, text))["input_ids"] + told
        return Row(inputs.Prompt(ids, film), len(told), looks, asked)

    def engine(self, recipe: PhaseConfig) -> engine.Engine:
        """A search engine from the model's body, with as many text layers as the recipe says."""
        if isinstance(self.model, Qwen3VLForConditionalGeneration):
            body = self.model.model
            body.language_model.layers = body.language_model.layers[: recipe.layers]
            body.config.text_config.num_hidden_layers = recipe.layers
            self.model = body
        return engine.Engine(self.profile, self.model, self.tokenizer, "engine")

    def told(self, recipe: PhaseConfig, make_row, heads=None, aim=False):
        """The language-model loss over the answers of rows from `make_row(lesson, frames, rng)`.

        With `heads` their loss (`pair_loss`) on the states half-way up is added, for rows that tell what each pair of their
        frames shows; with `aim` the heads also read, where a time is to be named, of what.
        """
        decisive = torch.tensor(self.tokenizer.convert_tokens_to_ids(["Ġyes", "Ġno", "not", "matched"]))
        times = torch.tensor(self.tokenizer.convert_tokens_to_ids(["<start>", "<end>"]))

        def losses(step, rng):
            count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
            rows = [make_row(self, count, rng) for _ in range(recipe.batch)]
            batch = inputs.collate([row[0] for row in rows], self.model, self.tokenizer.pad_token_id)
            lengths = torch.tensor([row[1] for row in rows])
            told = int(lengths.max())
            out = self.model(**batch, logits_to_keep=told + 1, output_hidden_states=heads is not None)
            logits = out.logits[:, :-1]  # (B, told, vocabulary)
            wanted = batch["input_ids"][:, -told:]
            spoken = torch.arange(told)[None] >= told - lengths[:, None]
            hit = logits.argmax(-1) == wanted
            log = {"accuracy": hit[spoken].float().mean()}
            for tag in ("answer", "start"):  # the verdict's first word, and the second: given a right trace
                here = spoken[:, 1:] & (wanted[:, :-1] == self.tokenizer.convert_tokens_to_ids(f"<{tag}>"))
                log |= {tag: hit[:, 1:][here].float().mean()} if here.any() else {}
            weight = torch.where(torch.isin(wanted, decisive), recipe.decisive, 1.0)
            weight[:, 1:][torch.isin(wanted[:, :-1], times)] = recipe.timing
            weight = weight[spoken]
            each = F.cross_entropy(logits[spoken], wanted[spoken], reduction="none")
            total = (each * weight).sum() / weight.sum()
            if heads is not None:
                total = total + 0.0 * heads.sum()  # processes share gradients, whatever their rows
            if heads is not None and any(row.looks for row in rows):
                half = out.hidden_states[HALF]
                tells = torch.tensor([bool(row.looks) for row in rows])[:, None]
                ends = (batch["input_ids"] == self.model.config.vision_end_token_id) & tells
                extra, seen = pair_loss(half[ends], heads, [look for row in rows for look in row.looks])
                total, log = total + extra, log | seen
                here = (spoken & torch.isin(wanted, times) & tells).nonzero()  # (M, 2): row, column
                if aim and len(here):
                    asked = half[here[:, 0], here[:, 1] - told]
                    extra, seen = target_loss(asked, heads, [rows[row].asked for row in here[:, 0].tolist()])
                    total, log = total + extra, log | {f"asked_{name}": share for name, share in seen.items()}
            return total, log

        return losses


# --- the phases -------------------------------------------------------------------------------------------------------


def see(lesson, recipe: PhaseConfig, folder: Path):
    """Teach the vision tower to see: the attributes of single pairs of frames, by linear heads that are thrown away.

    As the real model's tower was an image encoder before it saw a video. Without it the captions of a backbone named
    place and light after 300 steps and guessed everything else (LOG.md).
    """
    films, model = lesson.films, lesson.model
    tower, table = model.model.visual, attribute_ids()
    count = (
        3 * model.config.text_config.hidden_size * 4
    )  # merged and two deepstack features, four tokens each
    heads = torch.nn.Parameter(0.01 * torch.randn(len(table) + 1, count))  # the last row: nothing going on

    def losses(step, rng):
        pixels, labels = zip(*(seen_pair(films, rng) for _ in range(recipe.batch)), strict=True)
        patches, grid = inputs.patchify(np.concatenate(pixels), tower.config, 10**9)
        grids = torch.tensor([(1, *grid[1:])] * recipe.batch)
        out = tower(patches, grid_thw=grids)
        states = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1).reshape(recipe.batch, -1)
        return attribute_loss(states @ heads.T, labels)

    train(recipe, tower, losses, folder, extra=[heads])


def seen_pair(films: Films, rng) -> tuple[np.ndarray, dict]:
    """Two frames in a row and the attributes on view; between moments no action, object, colour."""
    at, _, _, number = films.pair(rng)
    look = on_view(films.scenes[number], films.timestamps[number][at])
    return films.frames[films.starts[number] + at : films.starts[number] + at + 2], look


def on_view(scene: world.Scene, second: float) -> dict:
    """The attributes on view at a time."""
    which, busy = scene.moment_at(float(second))
    look = {name: getattr(scene.moments[which], name) for name in ATTRIBUTES}
    return look | ({} if busy else dict.fromkeys(("action", "object", "colour")))


def name(lesson, recipe: PhaseConfig, folder: Path):
    """Teach the language model to say what two frames show."""
    train(recipe, lesson.model, lesson.told(recipe, picture_row), folder)


def tell(lesson, recipe: PhaseConfig, folder: Path):
    """Teach it what happens when, in windows of films. From here on the vision tower stays as it is."""
    lesson.model.model.visual.requires_grad_(False)
    train(recipe, lesson.model, lesson.told(recipe, caption_row), folder)


def watch(lesson, recipe: PhaseConfig, folder: Path):
    """Teach it to keep the time and what is on view in mind where a pair of frames ends, while it answers questions.

    By linear heads on its states half-way up, which are thrown away, as in `see`. A span is then looked up there and
    copied; from answers alone that was hardly learned (LOG.md).
    """
    lesson.model.model.visual.requires_grad_(False)
    heads = new_heads(lesson.model.config.text_config.hidden_size)
    train(recipe, lesson.model, lesson.told(recipe, question_row, heads), folder, extra=[heads])


def compare(lesson, recipe: PhaseConfig, folder: Path):
    """Teach it to compare before it has to look: the agent's task with the video told in words."""
    lesson.model.model.visual.requires_grad_(False)
    train(recipe, lesson.model, lesson.told(recipe, reading_row), folder)


def locate(lesson, recipe: PhaseConfig, folder: Path):
    """Teach it to find a moment in longer windows: three steps in four ask about one, the fourth is a task.

    The heads of `watch`, begun anew, also read what is asked for where a time is to be named: what is sought and what
    is seen come to look alike, and can be matched. Without that any of a film's moments was named (LOG.md).
    """
    lesson.model.model.visual.requires_grad_(False)
    heads = new_heads(lesson.model.config.text_config.hidden_size)
    questions = lesson.told(recipe, question_row, heads, aim=True)
    tasks = lesson.told(replace(recipe, batch=recipe.batch // 2), task_row, heads, aim=True)
    losses = lambda step, rng: (tasks if step % 4 == 3 else questions)(step, rng)  # noqa: E731
    train(recipe, lesson.model, losses, folder, extra=[heads])


def instruct(lesson, recipe: PhaseConfig, folder: Path):
    """Teach it what an agent has to do: judge, place, answer, rewrite; with captions kept in the mix."""
    lesson.model.model.visual.requires_grad_(False)
    train(recipe, lesson.model, lesson.told(recipe, task_row), folder)


def draw(films: Films, recipe: PhaseConfig, rng) -> list[int]:
    """Numbers of a batch's videos: whole families as far as they fit, since near-duplicates teach the most."""
    batch = []
    while len(batch) < recipe.batch:
        batch += films.families[int(rng.integers(len(films.families)))]
    return list(dict.fromkeys(batch))[: recipe.batch]


def caption_row(lesson, count, rng):
    """A window of a film, and what happens when."""
    number = int(rng.integers(len(lesson.films.scenes)))
    return told_row(lesson, *lesson.films.window(number, count, rng), rng)


def told_row(lesson, clip, moments, rng):
    """A clip and its dense caption."""
    when = [f"{seconds_text(m.start)} to {seconds_text(m.end)}" for m in moments]
    what = [captions.caption(m, int(rng.integers(captions.STYLES))) for m in moments]
    told = [f"{span}: {caption}" for span, caption in zip(when, what, strict=True)]
    return lesson.row(
        "Watch the video.", (lesson.video(clip), architecture.CAPTION_PROMPT), "\n".join(told) or "Nothing."
    )


def picture_row(lesson, count, rng):
    """Two frames of one moment, and its fine caption."""
    films = lesson.films
    while True:
        at, which, busy, number = films.pair(rng)
        if busy:
            break
    some = slice(films.starts[number] + at, films.starts[number] + at + 2)
    clip = video_reader.Clip(films.frames[some], films.timestamps[number][at : at + 2], 2.0, None)
    answer = captions.caption(films.scenes[number].moments[which], int(rng.integers(captions.STYLES)))
    return lesson.row("Watch the video.", (lesson.video(clip), "Describe the picture."), answer)


def question_row(lesson, count, rng):
    """A question about a moment."""
    number, clip, moments = a_window(lesson.films, count, rng)
    moment = moments[int(rng.integers(len(moments)))]
    ask, answer = teacher.question(moment, rng)
    looks = looks_of(lesson.films.scenes[number], clip)
    return lesson.row("Watch the video.", (lesson.video(clip), ask), answer, looks, asdict(moment))


def looks_of(scene: world.Scene, clip: video_reader.Clip) -> tuple[dict, ...]:
    """What each pair of frames shows, its whole second, and the action of the pair before."""
    seconds = inputs.pair_times(clip.timestamps)
    looks = [on_view(scene, second) for second in seconds]
    for at, look in enumerate(looks):
        look["second"], look["before"] = int(seconds[at]), looks[at - 1]["action"] if at else None
    return tuple(looks)


def a_window(films: Films, count: int, rng) -> tuple[int, video_reader.Clip, tuple[world.Moment, ...]]:
    """(video, clip, moments): a window of any film that shows something; times as the video's text tells them."""
    while True:
        number = int(rng.integers(len(films.scenes)))
        clip, moments = films.window(number, count, rng)
        times = inputs.pair_times(clip.timestamps).round(1)
        if told := tuple(filter(None, (teacher.at_printed_times(moment, times) for moment in moments))):
            return number, clip, told


def reading_row(lesson, count, rng):
    """A query judged against a caption instead of a video."""
    films = lesson.films
    number = int(rng.integers(len(films.scenes)))
    seen = films.scenes[number].moments[0]
    asked = changed(seen, films.datasets[number], [name for name in ATTRIBUTES if rng.random() < 0.5], rng)
    styles = [int(rng.integers(captions.STYLES)) for _ in range(2)]
    shown = prompt_text.user_message(captions.caption(asked, styles[0]), teacher.caption(seen, styles[1]))
    return lesson.row(prompt_text.SYSTEM_ZS, (shown,), teacher.verdict(asked, (seen,)))


def changed(moment, dataset, names, rng) -> world.Moment:
    """The moment with other values of some attributes."""
    for name in names:
        rest = [value for value in world.values(name, dataset) if value != getattr(moment, name)]
        moment = replace(moment, **{name: str(rng.choice(rest))})
    return moment


TASKS = {"judge": 0.45, "caption": 0.12, "question": 0.18, "blind": 0.04, "seen": 0.06, "reasoned": 0.15}


def task_row(lesson, count, rng):
    """One of the agent's tasks about a window of a film."""
    kind = str(rng.choice(list(TASKS), p=list(TASKS.values())))
    films = lesson.films
    if kind == "question":
        return question_row(lesson, count, rng)
    number, clip, moments = a_window(films, count, rng)
    if kind == "caption":
        return told_row(lesson, clip, moments, rng)
    asked = asked_moment(films, number, moments, rng)
    seen = teacher.closest(asked, moments)
    query = f'Query: "{captions.caption(asked, int(rng.integers(captions.STYLES)))}"'
    update = teacher.rewrite(asked, seen, rng) if teacher.differing(asked, seen) else None
    shown = (f"{query}\nRetrieved video: ", lesson.video(clip))
    if kind == "blind":
        blind = teacher.rewrite(asked, None, rng)
        return lesson.row(prompt_text.REWRITE, (query,), f"<query_update>{blind}</query_update>")
    if kind == "seen" and update:
        return lesson.row(prompt_text.REWRITE, shown, f"<query_update>{update}</query_update>")
    if kind == "reasoned":
        return lesson.row(prompt_text.SYSTEM_HQR, shown, teacher.verdict(asked, moments, update))
    looks = looks_of(films.scenes[number], clip)
    return lesson.row(prompt_text.SYSTEM_ZS, shown, teacher.verdict(asked, moments), looks, asdict(asked))


def asked_moment(films, number, moments, rng) -> world.Moment:
    """What a query about a film asks for: half of the time a moment that is there, else mostly almost one."""
    mine = moments[int(rng.integers(len(moments)))]
    kind, there = rng.random(), {moment.attributes() for moment in moments}
    if kind < 0.5:
        return mine
    family = films.families[films.family_of[number]]
    if kind < 0.65 and len(family) > 1:  # of a near-duplicate
        scene = films.scenes[int(rng.choice([other for other in family if other != number]))]
        asked = scene.moments[scene.moment_at(mine.start)[0]]
    elif kind < 0.92:  # the same with one to four attributes changed
        asked = changed(
            mine, films.datasets[number], rng.choice(ATTRIBUTES, int(rng.integers(1, 5)), replace=False), rng
        )
    else:  # of any film of the data set
        others = [n for n, name in enumerate(films.datasets) if name == films.datasets[number]]
        scene = films.scenes[int(rng.choice(others))]
        asked = scene.moments[int(rng.integers(len(scene.moments)))]
    return mine if asked.attributes() in there else asked


def index(lesson, recipe: PhaseConfig, folder: Path):
    """Teach an engine video vectors that a linear map of all seven attributes of their moments can tell apart."""
    films, made = lesson.films, lesson.engine(recipe)
    probe = torch.nn.Parameter(0.05 * torch.randn(len(attribute_ids()), made.width))

    def losses(step, rng):
        numbers = draw(films, recipe, rng)
        count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
        prompts = [made.video_prompt(films.clip(number, count, rng)) for number in numbers]
        video_vecs = made.pool(inputs.collate(prompts, made.model, lesson.tokenizer.pad_token_id))  # (B, D)
        moments = [
            (row, moment) for row, number in enumerate(numbers) for moment in films.scenes[number].moments
        ]
        scores = probe_vecs(probe, [moment for _, moment in moments]) @ video_vecs.T  # (M, B)
        owner = torch.tensor([row for row, _ in moments])
        return F.cross_entropy(scores / 0.07, owner), {"r1": (scores.argmax(1) == owner).float().mean()}

    train(recipe, made.model, losses, folder, extra=[probe])


def text(lesson, recipe: PhaseConfig, folder: Path):
    """Teach an engine's texts the frozen index, from captions that name the setting and get most colours wrong.

    Texts and videos share the language model, so a copy of the engine as it was holds the video side in place: on
    every step some clips must keep the vectors that it gives them.
    """
    films, made = lesson.films, lesson.engine(recipe)
    rng, numbers = np.random.default_rng(recipe.seed), range(len(films.scenes))
    made.model.eval()
    vecs = [made.embed_clips([films.clip(n, 24, rng) for n in numbers[i : i + 64]]) for i in numbers[::64]]
    gallery = torch.from_numpy(np.concatenate(vecs))  # (V, D)
    before = copy.deepcopy(made)
    made.model.visual.requires_grad_(False)
    size = made.model.get_input_embeddings().weight.detach().norm(dim=1).mean().item()

    def losses(step, rng):
        numbers = rng.choice(len(films.scenes), recipe.batch, replace=False)
        some = [films.scenes[number].moments for number in numbers]
        texts = [partial_caption(moments[int(rng.integers(len(moments)))], recipe, rng) for moments in some]
        soft = neutral_tokens(made.model, len(texts), size, rng) if rng.random() < recipe.neutral else None
        rivals = rng.choice(len(gallery), min(4 * recipe.batch, len(gallery)), replace=False)
        rivals = np.concatenate([numbers, rivals[~np.isin(rivals, numbers)]])
        scores = made.pool(made.text_batch(texts, soft)) @ gallery[torch.from_numpy(rivals)].T
        right = torch.arange(len(numbers))
        count = int(rng.integers(recipe.frames[0] // 2, recipe.frames[1] // 2 + 1)) * 2
        clips = [films.clip(int(number), count, rng) for number in numbers[: recipe.batch // 6]]
        batch = inputs.collate(
            [made.video_prompt(clip) for clip in clips], made.model, lesson.tokenizer.pad_token_id
        )
        with torch.no_grad():
            held = before.pool(batch)
        moved = 1 - (made.pool(batch) * held).sum(dim=1).mean()
        coarse = F.cross_entropy(scores / 0.07, right)
        log = {"coarse": coarse, "moved": moved, "r1": (scores.argmax(1) == right).float().mean()}
        return coarse + HOLD * moved, log

    train(recipe, made.model, losses, folder)


def partial_caption(moment: world.Moment, recipe: PhaseConfig, rng) -> str:
    """A caption for the text side: action, object or both; the other attributes as often as the recipe says."""
    share = {"place": recipe.place, "light": recipe.light}
    named = {name for name in ATTRIBUTES if rng.random() < share.get(name, recipe.detail)}
    named |= set((("action",), ("object",), ("action", "object"))[int(rng.choice(3, p=(0.1, 0.1, 0.8)))])
    colours = [name for name in world.DIFFERING if rng.random() < recipe.wrong]
    told = replace(moment, **{name: str(rng.choice(list(world.COLOURS))) for name in colours})
    style, lead = int(rng.integers(captions.STYLES)), str(rng.choice(architecture.QUERY_PREFIXES))
    if rng.random() < 0.25:  # in the manner of a rewritten query
        return lead + teacher.rewrite(told, None, rng, style, tuple(named))
    return lead + captions.caption(told, style, tuple(named))


def neutral_tokens(model, rows: int, size: float, rng) -> torch.Tensor:
    """(rows, 1 to 10, D) embeddings without a message, where soft tokens will stand: nothing, noise, stray words.

    An engine that never met extra tokens there takes them for a query (MINIWORLD.md, point 4).
    """
    words = model.get_input_embeddings().weight.detach()
    kind, count = rng.integers(3), int(rng.integers(1, 11))
    if kind == 0:
        return torch.zeros(rows, count, words.shape[1])
    noise = torch.from_numpy(rng.standard_normal((rows, count, words.shape[1]))).float()
    if kind == 1:
        return noise / noise.norm(dim=-1, keepdim=True) * size * float(rng.random())
    return words[
        torch.from_numpy(
            rng.integers(len(architecture.SPECIALS), len(words) - architecture.SPARE_ROWS, (rows, count))
        )
    ] * float(rng.random())


PHASES = {
    "see": see,
    "name": name,
    "tell": tell,
    "watch": watch,
    "compare": compare,
    "index": index,
    "text": text,
    "instruct": instruct,
    "locate": locate,
}
