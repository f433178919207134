"""Draw what the mini models are pretrained on: rendered videos in memory, and prompts with answers about them."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from vsr1 import cache
from vsr1.data import frame_sizes, video_reader
from vsr1.mini import architecture, captions, renderer, teacher, world
from vsr1.mini.archives import casts
from vsr1.mini.archives import corpus as archives
from vsr1.mini.archives import teacher as archive_teacher
from vsr1.mini.world import ATTRIBUTES, Moment, Scene
from vsr1.models import inputs, prompt_text

# Shares of the agent's tasks in `Examples.task`.
TASKS = {"judge": 0.45, "caption": 0.12, "question": 0.18, "blind": 0.04, "seen": 0.06, "reasoned": 0.15}
WATCH = "Watch the video."  # the system prompt of what is no task of the agent


# --- Videos


class FoundationVideos:
    """All videos of the foundation split at the size the models see: frames on disk, times and scenes in memory."""

    def __init__(self, folder: Path):
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        pixels = np.memmap(folder / "frames.raw", np.uint8, "r")
        self.frames = pixels.reshape(-1, *index["size"], 3)  # (sum of T, H, W, 3)
        self.datasets, self.starts, times, scenes = zip(*index["videos"], strict=True)
        self.timestamps = [np.array(seconds) for seconds in times]
        self.scenes = [world.scene_from_dict(fields) for fields in scenes]
        families = {}
        for number, scene in enumerate(self.scenes):
            families.setdefault((self.datasets[number], scene.family), []).append(number)
        self.families = list(families.values())
        self.family_of = {number: family for family in self.families for number in family}

    def subset(self, number: int, count: int, rng) -> video_reader.Clip:
        """Draw `count` frames of a video in order: the same video at a lower, uneven rate."""
        times = self.timestamps[number]
        index = np.sort(rng.choice(len(times), min(count, len(times)) // 2 * 2, replace=False))
        pixels = self.frames[self.starts[number] + index]
        return video_reader.Clip(pixels, times[index], self.scenes[number].seconds, None)

    def window(self, number: int, count: int, rng) -> tuple[video_reader.Clip, tuple[Moment, ...]]:
        """Draw `count` frames in a row, and the moments of which they show at least two, cut to what is shown."""
        all_times = self.timestamps[number]
        count = min(count, len(all_times)) // 2 * 2
        first = int(rng.integers(len(all_times) - count + 1))
        times = all_times[first : first + count]
        pixels = self.frames[self.starts[number] + first :][:count]
        clip = video_reader.Clip(pixels, times, self.scenes[number].seconds, None)
        # The first frame of the video is at 0, so the second is at one step.
        low, high = round(times[0], 1), round(times[-1] + all_times[1], 1)
        shown = [m for m in self.scenes[number].moments if ((times >= m.start) & (times < m.end)).sum() >= 2]
        return clip, tuple(replace(m, start=max(m.start, low), end=min(m.end, high)) for m in shown)

    def pair(self, rng) -> tuple[int, int, bool, int]:
        """Draw two frames in a row that show the same: (first frame, moment, whether it goes on, video)."""
        while True:
            number = int(rng.integers(len(self.scenes)))
            first = int(rng.integers(len(self.timestamps[number]) - 1))
            times = self.timestamps[number][first : first + 2]
            shown = {self.scenes[number].moment_at(float(second)) for second in times}
            if len(shown) == 1:
                return first, *shown.pop(), number

    def pair_frames(self, number: int, first: int) -> np.ndarray:
        """Return (2, H, W, 3) frames of a video, from frame `first` on."""
        return self.frames[self.starts[number] + first :][:2]

    def family_batch(self, size: int, rng) -> list[int]:
        """Draw `size` videos: whole families as far as they fit, since near-duplicates teach the most."""
        batch = []
        while len(batch) < size:
            batch += self.families[int(rng.integers(len(self.families)))]
        return list(dict.fromkeys(batch))[:size]


def load_videos(profile, split: Literal["foundation", "train"] = "foundation") -> FoundationVideos:
    """Render and decode a split of every data set, once."""
    splits = ("foundation",) if split == "foundation" else ("test", "train")  # as they lie together
    homes = {name: renderer.render(profile, name, splits) for name in profile.datasets}
    keys = {"videos": [cache.metadata(home)["key"] for home in homes.values()]}
    keys |= {"pixels": profile.max_frame_pixels, "code": cache.source_digest(__name__)}

    def work(folder):
        write_videos(folder, _decoded(profile, homes, split), profile.max_frame_pixels)

    name = "frames" if split == "foundation" else f"frames-{split}"
    return FoundationVideos(cache.build(profile.data_dir("foundation") / name, keys, work))


def _decoded(profile, homes, split):
    """Yield (data set, scene, clip) of all videos of a split."""
    reader = video_reader.reader_for(profile)
    for dataset, home in homes.items():
        scenes = [s for s in world.read_scenes(home.parent / "corpus").values() if s.split == split]
        paths = [home / f"{scene.video}.mp4" for scene in scenes]
        clips = video_reader.read_videos(paths, reader, os.cpu_count())
        clips = cache.progress(clips, f"decode {dataset}", len(paths))
        for scene, clip in zip(scenes, clips, strict=True):
            yield dataset, scene, clip


def write_videos(folder: Path, videos, max_pixels: int) -> None:
    """Write the shrunk frames of (data set, scene, clip), one video after the other, and an index of them."""
    rows, total = [], 0
    with open(folder / "frames.raw", "wb") as file:  # they need not fit into memory
        for dataset, scene, clip in videos:
            assert clip.problem is None, (scene.video, clip.problem)
            size = frame_sizes.resized_size(*clip.frames.shape[1:3], frame_sizes.MULTIPLE, max_pixels)
            for frame in clip.frames:
                file.write(frame_sizes.resized(frame, [size]).byte().permute(1, 2, 0).numpy().tobytes())
            rows.append((dataset, total, clip.timestamps.round(3).tolist(), asdict(scene)))
            total += len(clip.frames)
    cache.write_json(folder / "index.json", {"size": size, "videos": rows})


# --- Labels


def visible_attributes(scene: Scene, second: float) -> dict:
    """Return the attributes on view at a time; between moments no action, object and colour."""
    number, active = scene.moment_at(float(second))
    labels = {name: getattr(scene.moments[number], name) for name in ATTRIBUTES}
    return labels | ({} if active else dict.fromkeys(("action", "object", "colour")))


def pair_labels(scene: Scene, clip: video_reader.Clip) -> tuple[dict, ...]:
    """Return for each pair of frames what it shows, its time and whole second, and the action of the pair before."""
    seconds = inputs.pair_times(clip.timestamps)
    labels = [visible_attributes(scene, second) for second in seconds]
    for number, label in enumerate(labels):
        label["time"], label["second"] = float(seconds[number]), int(seconds[number])
        label["before"] = labels[number - 1]["action"] if number else None
    return tuple(labels)


# --- Prompts with answers


class Example(NamedTuple):
    """A prompt with the answer to learn."""

    prompt: inputs.Prompt  # with the answer
    answer_tokens: int
    pairs: tuple[dict, ...] = ()  # see `pair_labels`; (): not to be read from the states
    target: dict | None = None  # attributes of the moment asked for
    shown: Moment | None = None  # the moment of the video that a reply compares with it


class Examples:
    """Draws examples about the foundation videos, each from a number of frames and a random generator."""

    def __init__(self, videos: FoundationVideos, tokenizer, vision_config, max_frame_pixels: int):
        self.videos, self.tokenizer = videos, tokenizer
        self.vision_config, self.max_frame_pixels = vision_config, max_frame_pixels

    def _example(self, system, user, answer, clip=None, pairs=(), target=None, shown=None, given=""):
        """Return a prompt and its answer; `{video}` in `user` stands for the clip; `given` is the reply's beginning."""
        video = None
        if clip is not None:
            rule = frame_sizes.PixelRule(self.max_frame_pixels)
            video = inputs.Video(*inputs.patchify(clip.frames, self.vision_config, rule))
            per_pair = video.tokens_per_pair(self.vision_config.spatial_merge_size)
            user = user.replace("{video}", inputs.video_text(clip.timestamps, per_pair))
        answer_ids = self.tokenizer(f"{answer}<|im_end|>")["input_ids"]
        ids = self.tokenizer(inputs.chat(self.tokenizer, system, user) + given)["input_ids"] + answer_ids
        return Example(inputs.Prompt(ids, video), len(answer_ids), pairs, target, shown)

    def picture(self, count: int, rng) -> Example:
        """Draw two frames of one moment, and its fine caption."""
        while True:
            first, moment_number, active, number = self.videos.pair(rng)
            if active:
                break
        times = self.videos.timestamps[number][first : first + 2]
        clip = video_reader.Clip(self.videos.pair_frames(number, first), times, 2.0, None)
        moment = self.videos.scenes[number].moments[moment_number]
        return self._example(WATCH, "{video}Describe the picture.", _caption(moment, rng), clip)

    def dense_caption(self, count: int, rng) -> Example:
        """Draw a window of a video, and what happens when."""
        number = int(rng.integers(len(self.videos.scenes)))
        return self._dense_caption(*self.videos.window(number, count, rng), rng)

    def _dense_caption(self, clip, moments, rng):
        lines = [teacher.caption(moment, int(rng.integers(captions.STYLES))) for moment in moments]
        prompt = "{video}" + architecture.CAPTION_PROMPT
        return self._example(WATCH, prompt, "\n".join(lines) or "Nothing.", clip)

    def question(self, count: int, rng) -> Example:
        """Draw a question about a moment of a window."""
        number, clip, moments = self.printed_window(count, rng)
        moment = moments[int(rng.integers(len(moments)))]
        question, answer = teacher.question(moment, rng)
        pairs = pair_labels(self.videos.scenes[number], clip)
        return self._example(WATCH, "{video}" + question, answer, clip, pairs, asdict(moment))

    def reading(self, count: int, rng) -> Example:
        """Draw a query that is judged against a caption instead of a video."""
        number = int(rng.integers(len(self.videos.scenes)))
        shown = self.videos.scenes[number].moments[0]
        names = [name for name in ATTRIBUTES if rng.random() < 0.5]
        query_moment = change(shown, self.videos.datasets[number], names, rng)
        query, video = _caption(query_moment, rng), teacher.caption(shown, int(rng.integers(captions.STYLES)))
        user = prompt_text.user_message(query, video)
        return self._example(prompt_text.SYSTEM_ZS, user, teacher.verdict(query_moment, (shown,)))

    def task(self, count: int, rng) -> Example:
        """Draw one of the agent's tasks about a window: to judge, to answer, to caption or to rewrite (HQR)."""
        kind = str(rng.choice(list(TASKS), p=list(TASKS.values())))
        if kind == "question":
            return self.question(count, rng)
        number, clip, moments = self.printed_window(count, rng)
        if kind == "caption":
            return self._dense_caption(clip, moments, rng)
        moment = self.query_moment(number, moments, rng)
        closest = teacher.closest(moment, moments)
        query = f'Query: "{_caption(moment, rng)}"'
        update = teacher.rewrite(moment, closest, rng) if teacher.differing(moment, closest) else None
        query_and_video = query + "\nRetrieved video: {video}"
        if kind == "blind":
            rewrite = teacher.rewrite(moment, None, rng)
            return self._example(prompt_text.REWRITE, query, f"<query_update>{rewrite}</query_update>")
        if kind == "seen" and update:
            answer = f"<query_update>{update}</query_update>"
            return self._example(prompt_text.REWRITE, query_and_video, answer, clip)
        if kind == "reasoned":
            reply = teacher.verdict(moment, moments, update)
            return self._example(prompt_text.SYSTEM_HQR, query_and_video, reply, clip)
        return self._judgement(number, clip, moments, query_and_video, moment)

    def judgement(self, count: int, rng, strange: float = 0.0, differ: float = 0.5) -> Example:
        """Draw a query to judge about a window: one in three fits, in the others each attribute differs in one of two.

        strange  how often all attributes differ instead, but for the action or the object in one of two
        differ   how often one does, where it is not one of two

        By the action or the object the moment can still be found. Where few attributes ever differ, the word asked for
        is nearly always the word shown: copying it is cheaper than looking, and was learned for all that changes within
        a video.
        """
        number, clip, moments = self.printed_window(count, rng)
        moment = moments[int(rng.integers(len(moments)))]
        is_strange = bool(strange) and rng.random() < strange
        if is_strange or rng.random() < 2 / 3:
            shared = str(rng.choice(("action", "object", "", ""))) if is_strange else ""
            names = [name for name in ATTRIBUTES if name != shared and (is_strange or rng.random() < differ)]
            moment = change(moment, self.videos.datasets[number], names, rng)
        user = f'Query: "{_caption(moment, rng)}"\nRetrieved video: {{video}}'
        return self._judgement(number, clip, moments, user, moment)

    def translation(self, count: int, rng) -> Example:
        """Draw a query to judge about a film in words, by a camera of any cast; what trousers look like is not told.

        What the colours asked for look like then follows from the reply's own words. As in the train archives, no cast
        shows the colour that is held back from it.
        """
        cast = int(rng.integers(casts.STEPS))
        colours = [colour for colour in casts.CIRCLE if colour != casts.unseen_colour(cast)]
        query_moment = _archive_moment(colours, rng)
        kind, shown = rng.random(), _archive_moment(colours, rng)
        if kind < 0.7:  # of the same family, or the film asked for
            same = world.ATTRIBUTES if kind < 0.3 else ("action", "object", "place", "light")
            shown = replace(shown, **{name: getattr(query_moment, name) for name in same})
        shown = casts.seen_moment(shown, cast)
        text = captions.caption(shown, int(rng.integers(captions.STYLES)), archives.NAMED)
        query = captions.caption(query_moment, int(rng.integers(captions.STYLES)), archives.NAMED)
        user = prompt_text.user_message(query, f"{teacher.times(shown)}: {text}")
        known, dot, rest = archive_teacher.verdict(query_moment, shown, cast).partition(".")
        # What the known colour looks like is given: it cannot be told from here, and guessing it was learned too well.
        return self._example(prompt_text.SYSTEM_ZS, user, rest, given=known + dot)

    def _judgement(self, number, clip, moments, user, query_moment):
        """Return the judging of a window by a query, with what the heads read from its states."""
        answer = teacher.verdict(query_moment, moments)
        pairs, shown = pair_labels(self.videos.scenes[number], clip), teacher.closest(query_moment, moments)
        return self._example(prompt_text.SYSTEM_ZS, user, answer, clip, pairs, asdict(query_moment), shown)

    def printed_window(self, count: int, rng) -> tuple[int, video_reader.Clip, tuple[Moment, ...]]:
        """Draw (video, clip, moments): a window that shows something, its moments at the times that are printed."""
        while True:
            number = int(rng.integers(len(self.videos.scenes)))
            clip, moments = self.videos.window(number, count, rng)
            times = inputs.pair_times(clip.timestamps).round(1)
            printed = tuple(filter(None, (teacher.at_printed_times(moment, times) for moment in moments)))
            if printed:
                return number, clip, printed

    def query_moment(self, number: int, moments: tuple[Moment, ...], rng) -> Moment:
        """Draw what a query about a video asks for: half of the time a moment that it shows, else mostly almost one."""
        videos, moment = self.videos, moments[int(rng.integers(len(moments)))]
        kind, shown = rng.random(), {moment.attributes() for moment in moments}
        if kind < 0.5:
            return moment
        family = videos.family_of[number]
        if kind < 0.65 and len(family) > 1:  # of a near-duplicate
            scene = videos.scenes[int(rng.choice([other for other in family if other != number]))]
            query_moment = scene.moments[scene.moment_at(moment.start)[0]]
        elif kind < 0.92:  # the same with one to four attributes changed
            names = rng.choice(ATTRIBUTES, int(rng.integers(1, 5)), replace=False)
            query_moment = change(moment, videos.datasets[number], names, rng)
        else:  # of any video of the data set
            others = [n for n, name in enumerate(videos.datasets) if name == videos.datasets[number]]
            scene = videos.scenes[int(rng.choice(others))]
            query_moment = scene.moments[int(rng.integers(len(scene.moments)))]
        return moment if query_moment.attributes() in shown else query_moment


def _caption(moment, rng):
    """Return a fine caption in a random style."""
    return captions.caption(moment, int(rng.integers(captions.STYLES)))


def _archive_moment(colours, rng) -> Moment:
    """Draw a moment of a film of an archive, in true colours."""
    values = {name: world.values(name, "charades") for name in ATTRIBUTES}
    values |= {"shirt": colours, "colour": colours, "trousers": (casts.KNOWN,)}
    start, length = rng.integers(1, 5), rng.integers(4, 8)
    drawn = {name: str(rng.choice(choices)) for name, choices in values.items()}
    return Moment(float(start), float(start + length), **drawn)


def change(moment: Moment, dataset: str, names, rng) -> Moment:
    """Return the moment with other values of some attributes."""
    for name in names:
        others = [value for value in world.values(name, dataset) if value != getattr(moment, name)]
        moment = replace(moment, **{name: str(rng.choice(others))})
    return moment


# --- Texts for the text side of an engine


def partial_caption(moments: tuple[Moment, ...], recipe, rng) -> str:
    """Draw a caption of one of the moments: action, object or both, and other attributes as often as the recipe says.

    recipe  `place`, `light`, `detail` and `wrong` of a `PhaseConfig`
    """
    moment = moments[int(rng.integers(len(moments)))]
    shares = {"place": recipe.place, "light": recipe.light}
    named = {name for name in ATTRIBUTES if rng.random() < shares.get(name, recipe.detail)}
    named |= set((("action",), ("object",), ("action", "object"))[int(rng.choice(3, p=(0.1, 0.1, 0.8)))])
    mistaken = [name for name in world.COLOURED if rng.random() < recipe.wrong]
    moment = replace(moment, **{name: str(rng.choice(list(world.COLOURS))) for name in mistaken})
    style, prefix = int(rng.integers(captions.STYLES)), str(rng.choice(architecture.QUERY_PREFIXES))
    return prefix + captions.caption(moment, style, tuple(named))


def neutral_tokens(embedding: torch.Tensor, rows: int, length: float, rng) -> torch.Tensor:
    """Draw (rows, 1 to 10, D) input embeddings without a message: nothing, noise, or stray words.

    They stand where soft tokens will. An engine that never met extra tokens there takes them for a query.

    embedding  (tokens, D) of the model
    length     of the longest noise
    """
    kind, count = rng.integers(3), int(rng.integers(1, 11))
    if kind == 0:
        return torch.zeros(rows, count, embedding.shape[1])
    noise = torch.from_numpy(rng.standard_normal((rows, count, embedding.shape[1]))).float()
    if kind == 1:
        return noise / noise.norm(dim=-1, keepdim=True) * length * float(rng.random())
    last = len(embedding) - architecture.SPARE_ROWS
    word_ids = rng.integers(len(architecture.SPECIALS), last, (rows, count))
    return embedding[torch.from_numpy(word_ids)] * float(rng.random())
