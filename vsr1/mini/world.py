"""Invent the videos of the mini world: what each shows and when, before anything is drawn.

Everything here is ours, for machines without data or GPU. A video is a timeline of moments, each with seven attributes.
No two moments of a split share all seven, so exactly one video fits each fine caption. Videos come in families whose
members differ, moment by moment, in one attribute: a search that misses one word finds the family and misses the video.
Test queries ask for some videos only; the others of their families, and strangers, are distractors.
"""

import json
import string
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vsr1 import cache

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (250, 220, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 55, 165),
    "pink": (245, 140, 190),
    "white": (245, 245, 245),
    "black": (32, 32, 32),
}
ACTIONS = ("sit", "lie", "jump", "wave", "kneel", "bend", "dance", "walk")
OBJECTS = ("umbrella", "balloon", "ball", "box", "flag", "bicycle", "dog", "ladder")
LIGHTS = ("day", "dusk", "night")
PLACES = {
    "charades": ("kitchen", "bedroom", "bathroom", "office", "garage", "hallway", "library", "basement"),
    "didemo": ("beach", "park", "street", "forest", "desert", "lake", "harbour", "snow"),
    "activitynet": ("gym", "stadium", "pool", "stage", "court", "studio", "rink", "track"),
}
ATTRIBUTES = ("shirt", "trousers", "action", "object", "colour", "place", "light")
VARYING = {  # what may differ between the moments of one video; the rest is the same all along
    "charades": ("action", "object", "colour"),
    "didemo": ("action", "object", "colour"),
    "activitynet": ("action", "object", "colour", "shirt"),
}
FAMILY_SIZE = {"charades": 11, "didemo": 2, "activitynet": 2}
FOUNDATION_FAMILY_SIZE = {"charades": 16, "didemo": 4, "activitynet": 4}
FAMILY_SHARE = 0.9  # of videos that have near-duplicates
COLOURED = ("shirt", "trousers", "colour")
# What near-duplicates of a split differ in.
DIFFERING = {"train": ATTRIBUTES, "test": ATTRIBUTES, "foundation": COLOURED}
# Objects in these colours are never in train, so that test queries about them ask for an unseen combination.
UNSEEN = dict(zip(OBJECTS, COLOURS, strict=True))
SPLITS = ("train", "test", "foundation")  # by number in seeds


@dataclass(frozen=True)
class Moment:
    """What happens from `start` to `end` (seconds): the seven attributes."""

    start: float
    end: float
    shirt: str
    trousers: str
    action: str
    object: str
    colour: str
    place: str
    light: str

    def attributes(self) -> tuple:
        """Return the seven attributes, in the order of ATTRIBUTES."""
        return tuple(getattr(self, name) for name in ATTRIBUTES)

    def is_unseen(self) -> bool:
        """Return whether the train split has no object of this kind in this colour."""
        return UNSEEN[self.object] == self.colour


@dataclass(frozen=True)
class Scene:
    """One video before it is rendered; `extras` are what no caption names (build, hair, skin, side)."""

    video: str
    split: str
    family: int
    seconds: float
    moments: tuple[Moment, ...]
    extras: dict

    def moment_at(self, second: float) -> tuple[int, bool]:
        """Return (moment number, whether it goes on) at a time; between two moments the next one is prepared."""
        for number, moment in enumerate(self.moments):
            if second < moment.end:
                return number, second >= moment.start
        return len(self.moments) - 1, False


def values(attribute: str, dataset: str) -> tuple[str, ...]:
    """Return all values of an attribute in a data set."""
    tables = {"action": ACTIONS, "object": OBJECTS, "place": PLACES[dataset], "light": LIGHTS}
    return tables.get(attribute, tuple(COLOURS))


# --- Inventing scenes


def make_scenes(dataset: str, split: str, count: int, seed: int) -> list[Scene]:
    """Invent `count` scenes of one split: no attributes twice, and the members of a family next to each other."""
    rng = np.random.default_rng([seed, tuple(PLACES).index(dataset), SPLITS.index(split)])
    size = (FOUNDATION_FAMILY_SIZE if split == "foundation" else FAMILY_SIZE)[dataset]
    # The chance of a family, per draw of `size` videos or of one.
    chance = FAMILY_SHARE / (FAMILY_SHARE + size * (1 - FAMILY_SHARE))
    used, scenes, family = set(), [], 0
    while len(scenes) < count:
        members = size if rng.random() < chance else 1
        draw = partial(_invent, rng, dataset, split, family)
        for _ in range(min(members, count - len(scenes))):
            scene = _draw_unused(draw, used, split)
            scenes.append(replace(scene, video=video_id(rng, dataset)))
            if draw.func is _invent:
                draw = partial(_vary, rng, dataset, scene)
        family += 1
    return scenes


def _draw_unused(draw, used, split):
    """Draw scenes until one has no moment whose attributes are `used` or UNSEEN in train; add its own to `used`."""
    while True:
        scene = draw()
        attributes = {moment.attributes() for moment in scene.moments}
        is_unseen = split == "train" and any(moment.is_unseen() for moment in scene.moments)
        if not attributes & used and not is_unseen:
            used |= attributes
            return scene


def _invent(rng, dataset, split, family):
    """Invent a new scene: its moments have distinct actions and objects, so that each stands alone."""
    seconds, spans = TIMELINES[dataset](rng)
    constant = {name: rng.choice(values(name, dataset)) for name in ATTRIBUTES}
    actions = rng.permutation(ACTIONS)
    objects = rng.permutation(OBJECTS)
    moments = []
    for span, action, thing in zip(spans, actions, objects, strict=False):
        varying = {name: rng.choice(values(name, dataset)) for name in ATTRIBUTES if name in VARYING[dataset]}
        attributes = constant | varying | {"action": action, "object": thing}
        moments.append(Moment(*span, **{name: str(value) for name, value in attributes.items()}))
    return Scene("", split, family, seconds, tuple(moments), draw_extras(rng))


def draw_extras(rng) -> dict:
    """Draw what no caption names: build, hair and skin of a person, and the tone of a room."""
    return {
        "skin": int(rng.integers(4)),
        "hair": int(rng.integers(4)),
        "side": int(rng.choice((-1, 1))),
        "shift": int(rng.integers(-5, 6)),
        "size": round(float(rng.uniform(0.92, 1.05)), 3),
        "tone": [int(value) for value in rng.integers(-12, 13, 3)],
    }


def _vary(rng, dataset, scene):
    """Make a near-duplicate of a scene: every moment differs in one attribute."""
    differing = DIFFERING[scene.split]
    constant = [name for name in differing if name not in VARYING[dataset]]
    varying = [name for name in differing if name in VARYING[dataset]]
    if rng.random() < len(constant) / len(differing):
        name = str(rng.choice(constant))
        value = _other_value(rng, dataset, name, scene.moments[:1])
        return replace(scene, moments=tuple(replace(moment, **{name: value}) for moment in scene.moments))
    moments = list(scene.moments)
    for number, moment in enumerate(moments):
        name = str(rng.choice(varying))
        # Actions and objects stay distinct within a video.
        taken = moments if name in ("action", "object") else [moment]
        moments[number] = replace(moment, **{name: _other_value(rng, dataset, name, taken)})
    return replace(scene, moments=tuple(moments))


def _other_value(rng, dataset, name, moments):
    """Draw a value of an attribute that none of the moments has."""
    taken = {getattr(moment, name) for moment in moments}
    return str(rng.choice([value for value in values(name, dataset) if value not in taken]))


def _charades_timeline(rng):
    """Draw the length of a video of about 30 s and the spans of two or three moments, in seconds."""
    seconds = np.clip(rng.normal(30.5, 3), 24, 37)
    return _spread(rng, seconds, rng.integers(2, 4), 4.0, 9.5)


def _activitynet_timeline(rng):
    """Draw the length of a video of one to three minutes and the spans of two to four moments, in seconds."""
    seconds = rng.uniform(60, 180)
    return _spread(rng, seconds, rng.integers(2, 5), 0.12 * seconds, 0.21 * seconds)


def _didemo_timeline(rng):
    """Draw the length of a video and the spans of moments of one or two segments, on a grid of 5 s."""
    slots = int(rng.integers(5, 11))
    lengths = rng.choice((1, 1, 2), size=rng.integers(2, 5 if slots > 7 else 3))
    gaps = rng.multinomial(slots - lengths.sum(), np.full(len(lengths) + 1, 1 / (len(lengths) + 1)))
    starts = np.cumsum(gaps[:-1] + np.r_[0, lengths[:-1]])
    return slots * 5.0, [(float(5 * s), float(5 * (s + n))) for s, n in zip(starts, lengths, strict=True)]


def _spread(rng, seconds, count, shortest, longest):
    """Draw `count` spans of `shortest` to `longest` seconds with gaps around them, on a grid of 0.1 s."""
    lengths = rng.uniform(shortest, longest, size=count)
    gaps = rng.dirichlet(np.full(count + 1, 2.0)) * (seconds - lengths.sum())
    starts = np.cumsum(gaps[:-1] + np.r_[0, lengths[:-1]])
    spans = [(round(float(s), 1), round(float(s + n), 1)) for s, n in zip(starts, lengths, strict=True)]
    return round(float(seconds), 1), spans


TIMELINES = dict(charades=_charades_timeline, didemo=_didemo_timeline, activitynet=_activitynet_timeline)


def video_id(rng, dataset: str) -> str:
    """Draw a video id in the manner of the data set (docs/data.md section 2): not a safe shell word."""
    if dataset == "charades":
        return "".join(rng.choice(list(string.ascii_uppercase + string.digits), 7))
    if dataset == "didemo":
        user, number, photo = rng.integers(10**7, 10**8), rng.integers(10, 100), rng.integers(10**9, 10**10)
        return f"{user}@N{number}_{photo}_{rng.bytes(5).hex()}"
    return "v_" + "".join(rng.choice(list(string.ascii_letters + string.digits + "-_"), 11))


# --- On disk


def write_scenes(path: Path, scenes: list[Scene]) -> None:
    """Write scenes as JSON lines."""
    lines = [json.dumps(asdict(scene)) for scene in scenes]
    cache.write_text(path, "\n".join(lines) + "\n")


def read_scenes(corpus: Path) -> dict[str, Scene]:
    """Read the scenes of a rendered corpus, by video id."""
    lines = (corpus / "scenes.jsonl").read_text(encoding="utf-8").splitlines()
    return {scene.video: scene for scene in map(scene_from_dict, map(json.loads, lines))}


def scene_from_dict(fields: dict) -> Scene:
    """Return the scene that `dataclasses.asdict` made into `fields`."""
    return Scene(**fields | {"moments": tuple(Moment(**moment) for moment in fields["moments"])})
