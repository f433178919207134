"""Render the corpora of the mini world: FIG annotations and real H.264 files, for machines without data or GPU."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vsr1 import cache
from vsr1.data import annotations
from vsr1.data.video_writer import write_video
from vsr1.mini import captions, drawing, world
from vsr1.mini.world import COLOURS, Scene

QUERIES_PER_MOMENT = {"train": 2, "test": 1, "foundation": 1}


def render(profile, dataset: str, splits=("test", "train")) -> Path:
    """Render a data set's splits, unless nothing changed, and return the folder of MP4 files.

    Annotations go to corpus/ and videos to videos/ of `profile.data_dir(dataset)`, those of the foundation split below
    its foundation/. A rendering that was stopped goes on with the next video.
    """
    sizes = {split: getattr(profile.world, f"{split}_videos") for split in splits}
    queried = profile.world.queried_videos
    home = profile.data_dir(dataset) / ("foundation" if "foundation" in splits else "")
    unused = {f"{split}_videos": 0 for split in ("test", "train", "foundation") if split not in splits}
    inputs = {"world": asdict(profile.world) | unused, "dataset": dataset, "splits": list(splits)}
    inputs["code"] = cache.source_digest(__name__)
    write = partial(write_corpus, dataset=dataset, sizes=sizes, seed=profile.world.seed, queried=queried)
    scenes = world.read_scenes(cache.build(home / "corpus", inputs, write))
    draw = partial(render_videos, profile.world, num_workers(profile), scenes.values(), f"render {dataset}")
    return cache.build(home / "videos", inputs, draw)


def num_workers(profile) -> int:
    """Return how many processes may render: the cores, shared by the steps that run at once."""
    return max(1, len(os.sched_getaffinity(0)) // profile.parallel_steps)


def write_corpus(
    folder: Path, dataset: str, sizes: dict[str, int], seed: int, queried: int | None = None
) -> list[Scene]:
    """Write annotations and scenes of some splits: `<split>.jsonl` (FIG), `scenes.jsonl`, and the test distractors.

    sizes    videos of each split
    queried  test videos, evenly spread over the families, that queries ask for; None: all
    """
    scenes, next_id = [], 0
    for split, count in sizes.items():
        split_scenes = world.make_scenes(dataset, split, count, seed)
        queried_scenes = annotations.evenly_spaced(split_scenes, queried if split == "test" else None)
        rng = np.random.default_rng([seed, next_id])
        queries = captions.make_queries(queried_scenes, next_id, QUERIES_PER_MOMENT[split], rng)
        annotations.write_fig(folder / f"{split}.jsonl", queries)
        annotations.write_gallery(folder, split, [scene.video for scene in split_scenes])
        next_id += len(queries)
        scenes += split_scenes
    world.write_scenes(folder / "scenes.jsonl", scenes)
    return scenes


def render_videos(world_config, workers: int, scenes, label: str, folder: Path, paints=COLOURS) -> None:
    """Render the videos of all scenes that are not in `folder` yet; one worker is this process itself.

    label   names the work in the progress bar
    paints  {name: RGB} of the colours that the scenes name
    """
    paths = {folder / f"{scene.video}.mp4": scene for scene in scenes}
    missing = {path: scene for path, scene in paths.items() if not path.exists()}
    draw = partial(render_video, size=world_config.size, fps=world_config.fps, paints=paints)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        each = partial(pool.map, chunksize=8) if workers > 1 else map
        for _ in cache.progress(each(draw, missing.values(), missing), label, len(missing)):
            pass


def render_video(scene: Scene, path: Path, size: int, fps: int, paints=COLOURS) -> None:
    """Write the scene as an H.264 MP4 file; the same scene gives the same bytes."""
    frames = _frames(scene, size, fps, paints)
    write_video(path, frames, fps, crf=24, preset="ultrafast", keyframe_interval=8 * fps)


def _frames(scene, size, fps, paints):
    """Yield the frames of a scene in order; each distinct one is drawn and converted once."""
    drawn, converter = {}, VideoReformatter()
    for number in range(round(scene.seconds * fps)):
        moment, active = scene.moment_at(number / fps)
        phase = active * (number % drawing.PHASES)  # who is not active stands still
        if (moment, active, phase) not in drawn:
            shown = scene.moments[moment], active, phase / drawing.PHASES
            pixels = drawing.draw_frame(*shown, scene.extras, size, paints)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            drawn[moment, active, phase] = converter.reformat(frame, format="yuv420p", threads=1)
        yield drawn[moment, active, phase]
