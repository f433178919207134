"""Invent archives of rendered films, each seen by a camera of its own, and write them as corpora of the FIG format.

An archive is a room with one camera. Its films come in families whose members differ in the colours of shirt and object
alone. Every query is asked of one archive, and search runs inside it. Three corpora show the same test films:

same-whole  every camera sees true colours
same-half   every camera shifts them by the same half step
casts       every camera has a cast of its own; test films are seen twice, by whole steps and by half steps
"""

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.data import annotations
from vsr1.mini import captions, world
from vsr1.mini.archives import casts
from vsr1.mini.world import ACTIONS, ATTRIBUTES, LIGHTS, OBJECTS, PLACES, Moment, Scene

SECONDS = 12.0  # of a film
SPLITS = ("train", "test")
NAMED = tuple(name for name in ATTRIBUTES if name != "trousers")  # what queries name
CASTS = {  # of the cameras of a corpus, in half steps: (train archives, test archives), each over and over
    "same-whole": ((0,), ((0,),)),
    "same-half": ((1,), ((1,),)),
    "casts": (tuple(range(casts.STEPS)), (tuple(range(0, casts.STEPS, 2)), tuple(range(1, casts.STEPS, 2)))),
}
CELLS = {  # the two by two: name: (corpus, whether test cameras shift by half steps)
    "same-whole": ("same-whole", False),
    "same-half": ("same-half", True),
    "casts-whole": ("casts", False),
    "casts-half": ("casts", True),
}


@dataclass(frozen=True)
class Archive:
    """Films of one camera; `scenes` show true colours."""

    name: str
    split: str
    cast: int  # half steps
    scenes: tuple[Scene, ...]

    def seen_scenes(self) -> tuple[Scene, ...]:
        """Return the scenes as the camera sees them."""
        return tuple(
            replace(scene, moments=tuple(casts.seen_moment(moment, self.cast) for moment in scene.moments))
            for scene in self.scenes
        )


# --- Inventing


def make_archives(settings, corpus: str, split: str, seed: int) -> list[Archive]:
    """Invent the archives of one split of a corpus.

    settings  a `config.ArchiveConfig`
    """
    kinds = (CASTS[corpus][0],) if split == "train" else CASTS[corpus][1]
    count = getattr(settings, f"{split}_archives")
    archives, split_number = [], SPLITS.index(split)
    for kind, shifts in enumerate(kinds):
        for number in range(count):
            cast, colours = shifts[number % len(shifts)], list(casts.CIRCLE)
            if corpus == "casts" and split == "train":
                colours.remove(casts.unseen_colour(cast))
            name = f"{split}-{number}" + "-half" * (kind == 1)
            # The first draws the same films in all corpora, the second their ids.
            rng = np.random.default_rng([seed, 27, split_number, number])
            id_rng = np.random.default_rng([seed, 28, list(CASTS).index(corpus), split_number, kind, number])
            archives.append(Archive(name, split, cast, _invent(rng, id_rng, settings, split, colours)))
    return archives


def _invent(rng, id_rng, settings, split, colours):
    """Invent the scenes of an archive; no two families have the same action and object."""
    place = str(rng.choice(PLACES["charades"]))
    activities = list(itertools.product(ACTIONS, OBJECTS))
    colour_pairs = list(itertools.product(colours, colours))
    scenes = []
    for family, activity in enumerate(rng.permutation(len(activities))[: settings.families]):
        action, thing = activities[activity]
        light = str(rng.choice(list(LIGHTS)))
        extras = world.draw_extras(rng)
        for pair in rng.permutation(len(colour_pairs))[: settings.family_size]:
            shirt, colour = colour_pairs[pair]
            length = rng.uniform(4.0, 7.0)
            start = rng.uniform(0.5, SECONDS - 0.5 - length)
            span = round(float(start), 1), round(float(start + length), 1)
            moment = Moment(*span, shirt, casts.KNOWN, action, thing, colour, place, light)
            video = world.video_id(id_rng, "charades")
            scenes.append(Scene(video, split, family, SECONDS, (moment,), extras))
    return tuple(scenes)


# --- On disk


def write_corpus(folder: Path, corpus: str, settings, seed: int) -> None:
    """Write the annotations of both splits, `<split>.jsonl` (FIG), and `archives.jsonl`."""
    archives, next_id = [], 0
    for split in SPLITS:
        split_archives = make_archives(settings, corpus, split, seed)
        per_film = settings.train_queries if split == "train" else 1
        queries = make_queries(split_archives, next_id, per_film, seed)
        annotations.write_fig(folder / f"{split}.jsonl", queries)
        next_id += len(queries)
        archives += split_archives
    lines = [json.dumps(asdict(archive)) for archive in archives]
    cache.write_text(folder / "archives.jsonl", "\n".join(lines) + "\n")


def make_queries(archives: list[Archive], first_id: int, per_film: int, seed: int) -> list[annotations.Query]:
    """Word `per_film` queries about each film, in true colours and in shuffled order."""
    scenes = [scene for archive in archives for scene in archive.scenes]
    rng = np.random.default_rng([seed, 29, first_id])
    return captions.make_queries(scenes, first_id, per_film, rng, NAMED)


def read_archives(corpus_folder: Path) -> list[Archive]:
    """Read the archives of a rendered corpus, of both splits."""
    archives = []
    for line in (corpus_folder / "archives.jsonl").read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        archives.append(Archive(**fields | {"scenes": tuple(map(world.scene_from_dict, fields["scenes"]))}))
    return archives
