"""The mini world: three rendered corpora in FIG format, with real H.264 files, for machines without data or GPU.

Everything here is ours. A video is a timeline of moments; each moment has seven attributes, and a fine caption names
all seven. Videos come in families whose members differ, moment by moment, in one attribute, so that a search engine
that hears only the coarse words finds the family and misses the video. Exactly one video of a split fits each caption.
"""

import json
import os
import string
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from vsr1 import cache
from vsr1.data import annotations
from vsr1.data.video_writer import write_video

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
ACTIONS = {
    "sit": "sits on a stool",
    "lie": "lies on the ground",
    "jump": "jumps up and down",
    "wave": "waves",
    "kneel": "kneels",
    "bend": "bends down",
    "dance": "dances",
    "walk": "walks around",
}
OBJECTS = ("umbrella", "balloon", "ball", "box", "flag", "bicycle", "dog", "ladder")
LIGHTS = {"day": "in daylight", "dusk": "at dusk", "night": "at night"}
PLACES = {  # name: wall or sky, floor or ground, motif
    "charades": {
        "kitchen": ((240, 225, 160), (170, 130, 90), "tiles"),
        "bedroom": ((200, 180, 225), (150, 110, 100), "bed"),
        "bathroom": ((165, 220, 225), (205, 215, 220), "tiles"),
        "office": ((190, 195, 200), (90, 95, 110), "desk"),
        "garage": ((120, 120, 120), (80, 80, 80), "shelves"),
        "hallway": ((225, 190, 150), (120, 60, 50), "door"),
        "library": ((130, 85, 50), (95, 70, 55), "shelves"),
        "basement": ((150, 80, 65), (110, 100, 90), "bricks"),
    },
    "didemo": {
        "beach": ((150, 205, 240), (235, 215, 150), "waves"),
        "park": ((170, 215, 240), (110, 180, 80), "trees"),
        "street": ((185, 190, 200), (85, 85, 90), "towers"),
        "forest": ((70, 110, 70), (60, 80, 45), "trees"),
        "desert": ((240, 200, 140), (220, 170, 90), "hills"),
        "lake": ((140, 190, 230), (60, 120, 180), "hills"),
        "harbour": ((120, 150, 180), (130, 110, 90), "towers"),
        "snow": ((205, 225, 240), (240, 245, 250), "hills"),
    },
    "activitynet": {
        "gym": ((210, 170, 120), (200, 140, 70), "bars"),
        "stadium": ((110, 140, 190), (70, 150, 70), "crowd"),
        "pool": ((190, 230, 240), (50, 150, 210), "waves"),
        "stage": ((110, 25, 45), (100, 70, 45), "curtain"),
        "court": ((90, 130, 100), (190, 95, 60), "net"),
        "studio": ((225, 225, 215), (175, 175, 170), "bars"),
        "rink": ((160, 185, 215), (225, 240, 250), "crowd"),
        "track": ((175, 205, 230), (185, 75, 60), "lanes"),
    },
}
INDOORS = ("charades",)
ATTRIBUTES = ("shirt", "trousers", "action", "object", "colour", "place", "light")
VARYING = {  # what may differ between the moments of one video; the rest is the video's own
    "charades": ("action", "object", "colour"),
    "didemo": ("action", "object", "colour"),
    "activitynet": ("action", "object", "colour", "shirt"),
}
FAMILY = {
    "charades": (16, 0.9),
    "didemo": (4, 0.9),
    "activitynet": (6, 0.9),
}  # members, share of videos with any
FOUNDATION_FAMILY = {"charades": (16, 0.9), "didemo": (4, 0.9), "activitynet": (4, 0.9)}
DIFFERING = (
    "shirt",
    "trousers",
    "colour",
)  # what near-duplicates differ in: a search that misses detail confuses them
WHERE = {"snow": "in the snow", "beach": "on the beach", "street": "in the street", "stage": "on the stage"}
WHERE |= {"lake": "by the lake", "track": "on the track", "court": "on the court", "rink": "on the rink"}
PHASES = 10  # pictures of one movement; at 8 fps its period of 1.25 s never locks to the 1 fps the models see


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

    def look(self) -> tuple:
        """The seven attributes, in the order of ATTRIBUTES."""
        return tuple(getattr(self, name) for name in ATTRIBUTES)


@dataclass(frozen=True)
class Scene:
    """One video before it is filmed; `extras` are what no caption tells (build, hair, skin, side)."""

    video: str
    split: str
    family: int
    seconds: float
    moments: tuple[Moment, ...]
    extras: dict

    def on(self, second: float) -> tuple[int, bool]:
        """(moment number, busy?) at a time; between two moments the one to come has set the stage already."""
        for number, moment in enumerate(self.moments):
            if second < moment.end:
                return number, second >= moment.start
        return len(self.moments) - 1, False


# --- what happens: scenes ------------------------------------------------------------------------------------------


def values(attribute: str, dataset: str) -> tuple[str, ...]:
    """All values of an attribute in a data set."""
    tables = {"action": ACTIONS, "object": OBJECTS, "place": PLACES[dataset], "light": LIGHTS}
    return tuple(tables.get(attribute, COLOURS))


def write_scenes(dataset: str, split: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes of one split, no moment's look twice in the split, families next to each other."""
    rng = np.random.default_rng([seed, corpus_index(dataset), ("train", "test", "foundation").index(split)])
    size, share = (FOUNDATION_FAMILY if split == "foundation" else FAMILY)[dataset]
    taken, scenes, family = set(), [], 0
    while len(scenes) < count:
        members = size if rng.random() < share / (share + size * (1 - share)) else 1
        base = _invent(rng, dataset)
        for member in range(min(members, count - len(scenes))):
            moments = base[1] if member == 0 else _vary(rng, dataset, base[1])
            while any(moment.look() in taken for moment in moments):
                base = _invent(rng, dataset) if member == 0 else base
                moments = base[1] if member == 0 else _vary(rng, dataset, base[1])
            taken.update(moment.look() for moment in moments)
            name = _name(rng, dataset)
            scenes.append(Scene(name, split, family, base[0], tuple(moments), base[2]))
        family += 1
    return scenes


def corpus_index(dataset: str) -> int:
    """A data set's number, for seeds."""
    return tuple(PLACES).index(dataset)


def _invent(rng, dataset):
    """(seconds, moments, extras) of a new video: distinct actions and objects, so each moment stands alone."""
    seconds, spans = _timeline(rng, dataset)
    own = {name: rng.choice(values(name, dataset)) for name in ATTRIBUTES}
    actions = rng.permutation(values("action", dataset))
    objects = rng.permutation(values("object", dataset))
    moments = []
    for (start, end), action, thing in zip(spans, actions, objects, strict=False):
        look = {
            name: rng.choice(values(name, dataset)) if name in VARYING[dataset] else own[name] for name in own
        }
        look |= {"action": action, "object": thing}
        moments.append(Moment(start, end, **{name: str(value) for name, value in look.items()}))
    extras = {
        "skin": int(rng.integers(4)),
        "hair": int(rng.integers(4)),
        "side": int(rng.choice((-1, 1))),
        "shift": int(rng.integers(-5, 6)),
        "size": round(float(rng.uniform(0.92, 1.05)), 3),
        "tone": [int(value) for value in rng.integers(-12, 13, 3)],
    }
    return seconds, moments, extras


def _timeline(rng, dataset):
    """Length of a video and the spans of its moments, in seconds, each data set in its own manner."""
    if dataset == "didemo":  # moments of one or two segments on a grid of 5 s
        slots = int(rng.integers(5, 11))
        lengths = rng.choice((1, 1, 2), size=rng.integers(2, 5 if slots > 7 else 3))
        gaps = rng.multinomial(slots - lengths.sum(), np.full(len(lengths) + 1, 1 / (len(lengths) + 1)))
        starts = np.cumsum(gaps[:-1] + np.r_[0, lengths[:-1]])
        return slots * 5.0, [(float(5 * s), float(5 * (s + n))) for s, n in zip(starts, lengths, strict=True)]
    if dataset == "charades":
        seconds, count, shortest, longest = np.clip(rng.normal(30.5, 3), 24, 37), rng.integers(2, 4), 4.0, 9.5
    else:
        seconds, count, shortest, longest = rng.uniform(60, 180), rng.integers(2, 5), 0.12, 0.21
        shortest, longest = shortest * seconds, longest * seconds
    lengths = rng.uniform(shortest, longest, size=count)
    gaps = rng.dirichlet(np.full(count + 1, 2.0)) * (seconds - lengths.sum())
    starts = np.cumsum(gaps[:-1] + np.r_[0, lengths[:-1]])
    spans = [(round(float(s), 1), round(float(s + n), 1)) for s, n in zip(starts, lengths, strict=True)]
    return round(float(seconds), 1), spans


def _vary(rng, dataset, moments):
    """A near-duplicate: every moment differs from its model in one attribute, a colour."""
    other = lambda name, old: str(rng.choice([v for v in COLOURS if v != old]))  # noqa: E731
    own = [name for name in DIFFERING if name not in VARYING[dataset]]  # one value for the whole video
    if rng.random() < len(own) / len(DIFFERING):
        name = str(rng.choice(own))
        changed = {name: other(name, getattr(moments[0], name))}
        return [replace(moment, **changed) for moment in moments]
    changed = []
    for moment in moments:
        name = str(rng.choice([name for name in DIFFERING if name in VARYING[dataset]]))
        changed.append(replace(moment, **{name: other(name, getattr(moment, name))}))
    return changed


def _name(rng, dataset):
    """A video id in the manner of the data set (DATASETS.md 2.1): not a safe shell word."""
    letters = np.array(list(string.ascii_uppercase + string.digits))
    if dataset == "charades":
        return "".join(rng.choice(letters, 7))
    if dataset == "didemo":
        user, number, photo = rng.integers(10**7, 10**8), rng.integers(10, 100), rng.integers(10**9, 10**10)
        return f"{user}@N{number}_{photo}_{rng.bytes(5).hex()}"
    marks = np.array(list(string.ascii_letters + string.digits + "-_"))
    return "v_" + "".join(rng.choice(marks, 11))


# --- how it is told: captions --------------------------------------------------------------------------------------


STYLES = 4  # ways of wording the same attributes


def caption(moment: Moment, style: int, named=ATTRIBUTES) -> str:
    """A sentence about a moment that names the attributes in `named`: all seven make a fine caption, two a coarse one.

    >>> moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> tell(moment, 0)
    'The person in the red shirt and blue trousers jumps up and down with a green umbrella in the kitchen at night.'
    >>> tell(moment, 3, ("action", "object"))
    'Someone jumps up and down with an umbrella.'
    """
    shirt = f"{moment.shirt} shirt" if "shirt" in named else ""
    trousers = f"{moment.trousers} trousers" if "trousers" in named else ""
    does = ACTIONS[moment.action] if "action" in named else "is seen"
    noun = moment.object if "object" in named else "thing"
    noun = f"{moment.colour} {noun}" if "colour" in named else noun
    thing = f"with {'an' if noun[0] in 'aeiou' else 'a'} {noun}" if {"object", "colour"} & set(named) else ""
    where = WHERE.get(moment.place, f"in the {moment.place}") if "place" in named else ""
    when = LIGHTS[moment.light] if "light" in named else ""
    wear = [f"a {shirt}" if shirt else "", trousers]
    if style == 0:
        dressed = " and ".join(filter(None, (shirt, trousers)))
        parts = ["the person", f"in the {dressed}" if dressed else "", does, thing, where, when]
    elif style == 1:
        dressed = " and ".join(filter(None, wear))
        parts = [when, "a person", f"wearing {dressed}" if dressed else "", does, where, thing]
    elif style == 2:
        dressed = " and ".join(filter(None, reversed(wear)))
        parts = [
            f"{thing}," if thing else "",
            "someone",
            f"in {dressed}" if dressed else "",
            does,
            where,
            when,
        ]
    else:
        dressed = " and ".join(filter(None, wear))
        parts = [where, "someone", does, when, thing, f"in {dressed}" if dressed else ""]
    text = " ".join(filter(None, parts))
    return text[0].upper() + text[1:] + "."


def captions(scenes: list[Scene], first_id: int, per_moment: int, seed: int) -> list[annotations.Query]:
    """FIG queries: `per_moment` fine captions for each moment, in shuffled order; spans in seconds."""
    rng = np.random.default_rng([seed, first_id])
    rows = []
    for scene in scenes:
        for moment in scene.moments:
            for style in rng.permutation(STYLES)[:per_moment]:
                coarse = caption(moment, int(rng.integers(STYLES)), ("action", "object"))
                rows.append(
                    (caption(moment, style), scene.video, (moment.start, moment.end), coarse, scene.seconds)
                )
    return [annotations.Query(first_id + n, *rows[row]) for n, row in enumerate(rng.permutation(len(rows)))]


# --- how it looks: pictures ----------------------------------------------------------------------------------------

SKINS = ((250, 215, 185), (225, 175, 130), (165, 110, 75), (105, 70, 50))
HAIRS = ((45, 35, 30), (110, 70, 40), (200, 165, 95), (130, 130, 130))
TINTS = {"day": (1.0, 1.0, 1.0), "dusk": (1.0, 0.84, 0.72), "night": (0.72, 0.76, 0.94)}
SKIES = {"day": (135, 205, 250), "dusk": (250, 130, 60), "night": (15, 20, 60)}
HORIZON, GROUND = 80, 116  # where wall meets floor, where feet stand, in the 128 x 128 units of every drawing


class Pen:
    """An ImageDraw whose lengths are 128ths of the picture's width."""

    def __init__(self, picture):
        self.draw, self.scale = ImageDraw.Draw(picture), picture.width / 128

    def _at(self, points):
        return [(x * self.scale, y * self.scale) for x, y in points]

    def box(self, x0, y0, x1, y1, colour):
        self.draw.rectangle(self._at([(min(x0, x1), y0), (max(x0, x1), y1)]), fill=colour)

    def disc(self, x, y, r, colour, tall=1.0):
        self.draw.ellipse(self._at([(x - r, y - r * tall), (x + r, y + r * tall)]), fill=colour)

    def ring(self, x, y, r, colour, width=3):
        self.draw.ellipse(
            self._at([(x - r, y - r), (x + r, y + r)]), outline=colour, width=int(width * self.scale)
        )

    def line(self, points, colour, width):
        points = self._at(points)
        self.draw.line(points, fill=colour, width=int(width * self.scale), joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            r = width * self.scale / 2
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def shape(self, points, colour):
        self.draw.polygon(self._at(points), fill=colour)


def backdrop(pen, dataset, place, light, extras):
    """Wall or sky, floor or ground, the place's motif, and the window or the sun that tells the light."""
    wall, floor, motif = PLACES[dataset][place]
    wall = tuple(int(np.clip(c + t, 0, 255)) for c, t in zip(wall, extras["tone"], strict=True))
    dark = tuple(int(c * 0.72) for c in wall)
    pen.box(0, 0, 128, HORIZON, wall)
    pen.box(0, HORIZON, 128, 128, floor)
    _motif(pen, motif, dark, tuple(int(c * 0.8) for c in floor))
    x = 64 - extras["side"] * 46
    if dataset in INDOORS:
        pen.box(x - 15, 5, x + 15, 35, (250, 250, 250))
        pen.box(x - 13, 7, x + 13, 33, SKIES[light])
    else:
        pen.box(0, 0, 128, 11, SKIES[light])
    glow = {"day": (255, 240, 90), "dusk": (255, 60, 20), "night": (235, 235, 220)}[light]
    pen.disc(x, 20 if light != "dusk" else 27, 8 if light != "night" else 5, glow)


def _motif(pen, motif, dark, ground):
    """The pattern that tells places of similar colour apart."""
    if motif == "tiles":
        for i in range(0, 128, 16):
            pen.line([(i, 40), (i, HORIZON)], dark, 1)
        for y in (40, 53, 66):
            pen.line([(0, y), (128, y)], dark, 1)
    elif motif in ("shelves", "crowd"):
        for y in range(18, HORIZON - 4, 15):
            pen.line([(0, y + 11), (128, y + 11)], dark, 2)
            for i in range(4, 128, 9):
                colour = list(COLOURS.values())[(i * 7 + y) % 8]
                if motif == "shelves":
                    pen.box(i, y, i + 5, y + 10, tuple(c // 2 + 40 for c in colour))
                else:
                    pen.disc(i, y + 6, 3, tuple(c // 2 + 60 for c in colour))
    elif motif == "bricks":
        for y in range(0, HORIZON, 10):
            pen.line([(0, y), (128, y)], dark, 1)
            for i in range((y // 10 % 2) * 10, 128, 20):
                pen.line([(i, y), (i, y + 10)], dark, 1)
    elif motif in ("bed", "desk", "door"):
        box = {"bed": (4, 62, 124, 90), "desk": (6, 66, 122, 72), "door": (82, 26, 112, HORIZON)}[motif]
        pen.box(*box, dark)
        pen.box(
            *{"bed": (8, 56, 34, 66), "desk": (84, 46, 112, 64), "door": (104, 52, 108, 56)}[motif],
            (235, 235, 240),
        )
    elif motif == "trees":
        for i in (8, 36, 92, 120):
            pen.box(i - 3, 50, i + 3, HORIZON + 4, (95, 65, 40))
            pen.disc(i, 42, 15, (35, 110, 45))
    elif motif == "towers":
        for i, top in ((0, 30), (26, 48), (52, 38), (78, 54), (104, 26)):
            pen.box(i, top, i + 20, HORIZON, dark)
            for y in range(top + 5, HORIZON - 4, 9):
                pen.box(i + 4, y, i + 8, y + 4, (240, 225, 150))
    elif motif == "hills":
        for i, top in ((10, 45), (60, 30), (112, 42)):
            pen.shape([(i - 42, HORIZON), (i, top), (i + 42, HORIZON)], dark)
    elif motif == "waves":
        for y in range(HORIZON - 22, HORIZON, 8):
            pen.box(0, y, 128, y + 4, (45, 120, 200))
    elif motif in ("bars", "curtain"):
        for i in range(4, 128, 12 if motif == "curtain" else 24):
            pen.line([(i, 12), (i, HORIZON)], dark, 5 if motif == "curtain" else 3)
    elif motif == "net":
        for i in range(0, 128, 8):
            pen.line([(i, 56), (i, HORIZON)], (235, 235, 235), 1)
        for y in (56, 64, 72):
            pen.line([(0, y), (128, y)], (235, 235, 235), 1)
    elif motif == "lanes":
        for y in range(HORIZON + 6, 128, 10):
            pen.line([(0, y), (128, y)], (240, 240, 240), 1)
    else:
        raise AssertionError(motif)
    pen.line([(0, HORIZON), (128, HORIZON)], ground, 2)


def pose(action, phase, side):
    """Joints as offsets from the spot a figure stands on: hip, neck, head, knees, feet, hands; phase in [0, 1)."""
    swing = float(np.sin(2 * np.pi * phase))
    up = abs(swing)
    hip, neck, head = (0, -30), (0, -62), (0, -73)
    knees, feet = [(-5, -15), (5, -15)], [(-6, 0), (6, 0)]
    hands = [(-14, -36), (14, -36)]
    if action == "sit":
        hip, neck, head = (0, -20), (0, -52), (0, -63)
        knees, feet = [(-side * 16, -21), (-side * 18, -17)], [(-side * 17, 0), (-side * 21, 0)]
        hands = [(-side * 14, -26 - 3 * up), (-side * 10, -30)]
    elif action == "lie":
        hip, neck, head = (0, -6), (-side * 30, -6), (-side * 41, -8)
        knees, feet = [(side * 10, -8 - 8 * up), (side * 12, -5)], [(side * 24, -4), (side * 26, -4)]
        hands = [(-side * 12, -16 - 5 * up), (-side * 14, -2)]
    elif action == "jump":
        lift = -18 * up
        hip, neck, head = (0, -32 + lift), (0, -64 + lift), (0, -75 + lift)
        knees, feet = [(-11, -17 + lift), (11, -17 + lift)], [(-14, -3 + lift), (14, -3 + lift)]
        hands = [(-20, -60 + lift), (20, -60 + lift)]
    elif action == "wave":
        hands = [(-14, -36), (14, -36)]
        hands[0 if side > 0 else 1] = (-side * (16 + 7 * swing), -88)
    elif action == "kneel":
        hip, neck, head = (0, -17), (-side * 3, -48), (-side * 4, -59)
        knees, feet = [(-side * 10, -2), (-side * 6, -2)], [(side * 12, -1), (side * 16, -1)]
        hands = [(-side * 18, -34 - 4 * up), (-side * 16, -30 - 4 * up)]
    elif action == "bend":
        hip, neck, head = (side * 6, -32), (-side * 20, -42 + 3 * up), (-side * 31, -38 + 3 * up)
        hands = [(-side * 20, -12 + 4 * up), (-side * 25, -12 + 4 * up)]
    elif action == "dance":
        hip = (5 * swing, -28)
        knees, feet = [(-12, -15), (12, -15)], [(-17, 0), (17, 0)]
        hands = [(-18, -78 + 12 * swing), (18, -78 - 12 * swing)]
    elif action == "walk":
        move = 13 * float(np.cos(2 * np.pi * phase))
        hip, neck, head = (move, -30), (move + 3, -62), (move + 4, -73)
        knees = [(move - 10 * swing, -16), (move + 10 * swing, -16)]
        feet = [(move - 15 * swing, 0), (move + 15 * swing, 0)]
        hands = [(move + 13 * swing, -40), (move - 13 * swing, -40)]
    return hip, neck, head, knees, feet, hands


def figure(pen, moment, phase, extras, action):
    """The person, dressed as the moment says."""
    side, size = extras["side"], extras["size"]
    x0 = 64 - side * 18 + extras["shift"]
    hip, neck, head, knees, feet, hands = pose(action, phase, side)
    at = lambda p: (x0 + p[0] * size, GROUND + p[1] * size)  # noqa: E731  a point of the figure on the canvas
    shirt, trousers = COLOURS[moment.shirt], COLOURS[moment.trousers]
    edge = (90, 90, 90)
    if action == "sit":
        pen.box(x0 - 9, GROUND - 14 * size, x0 + 9, GROUND, (110, 80, 55))
    for knee, foot in zip(knees, feet, strict=True):
        pen.line([at(hip), at(knee), at(foot)], edge, 12 * size)
        pen.line([at(hip), at(knee), at(foot)], trousers, 10.5 * size)
        pen.disc(*at(foot), 4, (60, 45, 40), tall=0.7)
    pen.line([at(hip), at(neck)], edge, 22 * size)
    for hand in hands:
        shoulder = (neck[0], neck[1] + 5)
        pen.line([at(shoulder), at(hand)], edge, 9 * size)
        pen.line([at(shoulder), at(hand)], shirt, 7.5 * size)
        pen.disc(*at(hand), 4.2 * size, SKINS[extras["skin"]])
    pen.line([at(hip), at(neck)], shirt, 20 * size)
    pen.disc(*at((head[0], head[1] - 2)), 10 * size, HAIRS[extras["hair"]])
    pen.disc(*at((head[0], head[1] + 1.5)), 8.2 * size, SKINS[extras["skin"]])


def thing(pen, kind, colour, phase, extras):
    """The object, in its colour, on the person's free side."""
    side = extras["side"]
    x, edge, sway = 64 + side * 34, (90, 90, 90), 2 * float(np.sin(2 * np.pi * phase))
    if kind == "umbrella":
        pen.line([(x, 62), (x, GROUND)], edge, 3)
        for r, ink in ((28, edge), (26.5, colour)):
            pen.shape(
                [(x + r * np.cos(a), 64 + 0.85 * r * np.sin(a)) for a in np.linspace(np.pi, 2 * np.pi, 16)],
                ink,
            )
    elif kind == "balloon":
        pen.line([(x, 40), (x - 4, 90)], edge, 1.5)
        pen.disc(x + sway, 30, 16, edge, tall=1.15)
        pen.disc(x + sway, 30, 15, colour, tall=1.15)
    elif kind == "ball":
        pen.disc(x, GROUND - 12 - 2 * abs(sway), 13, edge)
        pen.disc(x, GROUND - 12 - 2 * abs(sway), 12, colour)
    elif kind == "box":
        pen.box(x - 19, GROUND - 34, x + 19, GROUND + 2, edge)
        pen.box(x - 17.5, GROUND - 32.5, x + 17.5, GROUND + 0.5, colour)
        pen.line([(x - 17, GROUND - 22), (x + 17, GROUND - 22)], edge, 2)
    elif kind == "flag":
        pen.line([(x - 12, 22), (x - 12, GROUND)], edge, 3)
        pen.box(x - 11, 23, x + 23, 50, edge)
        pen.shape([(x - 10, 24), (x + 22, 26 + sway), (x + 22, 48 + sway), (x - 10, 48)], colour)
    elif kind == "bicycle":
        for dx in (-16, 16):
            pen.ring(x + dx, GROUND - 12, 13, (50, 50, 50), 3)
        frame = [
            (x - 16, GROUND - 12),
            (x - 6, GROUND - 32),
            (x + 12, GROUND - 32),
            (x, GROUND - 12),
            (x - 16, GROUND - 12),
        ]
        pen.line(frame, edge, 8)
        pen.line([*frame, frame[1]], colour, 6.5)
        pen.line([(x + 10, GROUND - 40), (x + 16, GROUND - 12)], colour, 5)
    elif kind == "dog":
        for dx in (-12, -6, 6, 12):
            pen.line([(x + dx, GROUND - 14), (x + dx, GROUND)], colour, 4)
        pen.disc(x, GROUND - 18, 17.5, edge, tall=0.55)
        pen.disc(x, GROUND - 18, 16.5, colour, tall=0.55)
        pen.disc(x - side * 17, GROUND - 30, 8.5, colour)
        pen.line([(x + side * 15, GROUND - 22), (x + side * (20 + sway), GROUND - 36)], colour, 3.5)
    elif kind == "ladder":
        for dx in (-10, 10):
            pen.line([(x + dx * 0.8, 34), (x + dx, GROUND)], colour, 5)
        for y in range(42, GROUND, 11):
            pen.line([(x - 9, y), (x + 9, y)], colour, 4)
    else:
        raise AssertionError(kind)


def picture(dataset: str, moment: Moment, busy: bool, phase: float, extras: dict, size: int) -> np.ndarray:
    """One frame (size, size, 3) uint8; while not `busy` the person stands there without the object."""
    canvas = Image.new("RGB", (2 * size, 2 * size))
    pen = Pen(canvas)
    backdrop(pen, dataset, moment.place, moment.light, extras)
    if busy:
        thing(pen, moment.object, COLOURS[moment.colour], phase, extras)
    figure(pen, moment, phase, extras, moment.action if busy else "stand")
    tint = [int(value * channel) for channel in TINTS[moment.light] for value in range(256)]
    return np.asarray(canvas.point(tint).reduce(2))


# --- films -----------------------------------------------------------------------------------------------------------


def film(scene: Scene, dataset: str, path: Path, size: int, fps: int) -> None:
    """Write the scene as an H.264 MP4 file; the same scene gives the same bytes."""
    frames = _frames(scene, dataset, size, fps)
    write_video(path, frames, fps, crf=24, preset="ultrafast", keyframe_interval=8 * fps)


def _frames(scene, dataset, size, fps):
    """The frames of a scene in order; each distinct picture is drawn and converted once."""
    pictures = {}
    for number in range(round(scene.seconds * fps)):
        key = (*scene.on(number / fps), number % PHASES)
        if key not in pictures:
            which, busy, phase = key
            pixels = picture(dataset, scene.moments[which], busy, phase / PHASES, scene.extras, size)
            pictures[key] = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
        yield pictures[key]


def _film_one(job):
    film(*job)


# --- stages ----------------------------------------------------------------------------------------------------------


def write(
    profile, dataset: str, folder: Path, splits: dict[str, int], per_moment: dict[str, int]
) -> list[Scene]:
    """Annotations (FIG) and scenes of some splits into `folder`: `<split>.jsonl` and `scenes.jsonl`."""
    scenes, next_id = [], 0
    for split, count in splits.items():
        some = write_scenes(dataset, split, count, profile.world.seed)
        queries = captions(some, next_id, per_moment[split], profile.world.seed)
        annotations.write_fig(folder / f"{split}.jsonl", queries)
        next_id += len(queries)
        scenes += some
    lines = [json.dumps({"video": scene.video} | asdict(scene)) for scene in scenes]
    (folder / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return scenes


def read_scenes(folder: Path) -> dict[str, Scene]:
    """The scenes that `write` left in a folder, by video id."""
    scenes = {}
    for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["moments"] = tuple(Moment(**moment) for moment in row["moments"])
        scenes[row["video"]] = Scene(**row)
    return scenes


def render(profile, dataset: str, splits=("test", "train")) -> Path:
    """Render a data set's splits, or leave them as they are if nothing changed; the folder of MP4 files.

    Annotations go to runs/<profile>/<dataset>/corpus/, films to .../videos/ (foundation: .../foundation/...).
    """
    sizes = {"train": profile.world.train_videos, "test": profile.world.test_videos}
    sizes["foundation"] = profile.world.foundation_videos
    home = profile.data_dir(dataset) / ("foundation" if "foundation" in splits else "")
    inputs = {"world": asdict(profile.world), "dataset": dataset, "splits": list(splits)}
    inputs["code"] = cache.source_digest(__name__)
    counts = {split: sizes[split] for split in splits}
    told = cache.build(
        home / "corpus",
        inputs,
        lambda folder: write(profile, dataset, folder, counts, {"train": 2, "test": 1, "foundation": 1}),
    )
    scenes = read_scenes(told)

    def shoot(folder):
        jobs = [
            (scene, dataset, folder / f"{scene.video}.mp4", profile.world.size, profile.world.fps)
            for scene in scenes.values()
            if not (folder / f"{scene.video}.mp4").exists()
        ]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            for _ in cache.progress(pool.map(_film_one, jobs, chunksize=8), f"render {dataset}", len(jobs)):
                pass

    return cache.build(home / "videos", inputs, shoot)
