"""Draw the frames of the mini world: a person, an object, a place and a light, from a few shapes each."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from vsr1.mini.world import COLOURS, PLACES, Moment

PHASES = 10  # frames of one movement; at 8 fps its period of 1.25 s never locks to the 1 fps the models see
HORIZON, GROUND = 80, 116  # where wall meets floor, where feet stand, in the 128 x 128 units of every drawing
SKINS = ((250, 215, 185), (225, 175, 130), (165, 110, 75), (105, 70, 50))
HAIRS = ((45, 35, 30), (110, 70, 40), (200, 165, 95), (130, 130, 130))
LIGHTS = {  # tint of the whole picture, sky, and the sun or the moon: height, radius, colour
    "day": ((1.0, 1.0, 1.0), (135, 205, 250), (20, 8, (255, 240, 90))),
    "dusk": ((1.0, 0.84, 0.72), (250, 130, 60), (27, 8, (255, 60, 20))),
    "night": ((0.72, 0.76, 0.94), (15, 20, 60), (20, 5, (235, 235, 220))),
}
INDOORS = PLACES["charades"]
BACKDROPS = {  # wall or sky, floor or ground, motif
    "kitchen": ((240, 225, 160), (170, 130, 90), "tiles"),
    "bedroom": ((200, 180, 225), (150, 110, 100), "bed"),
    "bathroom": ((165, 220, 225), (205, 215, 220), "tiles"),
    "office": ((190, 195, 200), (90, 95, 110), "desk"),
    "garage": ((120, 120, 120), (80, 80, 80), "shelves"),
    "hallway": ((225, 190, 150), (120, 60, 50), "door"),
    "library": ((130, 85, 50), (95, 70, 55), "shelves"),
    "basement": ((150, 80, 65), (110, 100, 90), "bricks"),
    "beach": ((150, 205, 240), (235, 215, 150), "waves"),
    "park": ((170, 215, 240), (110, 180, 80), "trees"),
    "street": ((185, 190, 200), (85, 85, 90), "towers"),
    "forest": ((70, 110, 70), (60, 80, 45), "trees"),
    "desert": ((240, 200, 140), (220, 170, 90), "hills"),
    "lake": ((140, 190, 230), (60, 120, 180), "hills"),
    "harbour": ((120, 150, 180), (130, 110, 90), "towers"),
    "snow": ((205, 225, 240), (240, 245, 250), "hills"),
    "gym": ((210, 170, 120), (200, 140, 70), "bars"),
    "stadium": ((110, 140, 190), (70, 150, 70), "crowd"),
    "pool": ((190, 230, 240), (50, 150, 210), "waves"),
    "stage": ((110, 25, 45), (100, 70, 45), "curtain"),
    "court": ((90, 130, 100), (190, 95, 60), "net"),
    "studio": ((225, 225, 215), (175, 175, 170), "bars"),
    "rink": ((160, 185, 215), (225, 240, 250), "crowd"),
    "track": ((175, 205, 230), (185, 75, 60), "lanes"),
}
EDGE, BRIGHT = (90, 90, 90), (235, 235, 240)


def draw_frame(
    moment: Moment, active: bool, phase: float, extras: dict, size: int, paints: dict = COLOURS
) -> np.ndarray:
    """Return one frame (size, size, 3) uint8; a person who is not `active` stands there without the object.

    phase   of the movement, in [0, 1)
    extras  those of the scene
    paints  {name: RGB} of shirt, trousers and object
    """
    canvas = _draw_place(moment.place, moment.light, tuple(extras["tone"]), extras["side"], size).copy()
    pen = Pen(canvas, LIGHTS[moment.light][0])
    if active:
        side, sway = extras["side"], 2 * float(np.sin(2 * np.pi * phase))
        _draw_object(pen, moment.object, paints[moment.colour], 64 + side * 34, side, sway)
    _draw_person(pen, moment, moment.action if active else "stand", phase, extras, paints)
    return np.asarray(canvas.reduce(2))


class Pen:
    """An ImageDraw whose lengths are 128ths of the picture's width, in inks of the light's tint."""

    def __init__(self, picture, tint):
        self.draw, self.scale, self.tint = ImageDraw.Draw(picture), picture.width / 128, tint

    def _ink(self, colour):
        (red, green, blue), tint = colour, self.tint
        return int(red * tint[0]), int(green * tint[1]), int(blue * tint[2])

    def _scaled(self, *points):
        return [(x * self.scale, y * self.scale) for x, y in points]

    def box(self, x0, y0, x1, y1, colour):
        """Fill a rectangle."""
        self.draw.rectangle(self._scaled((min(x0, x1), y0), (max(x0, x1), y1)), fill=self._ink(colour))

    def disc(self, x, y, r, colour, tall=1.0):
        """Fill an ellipse, `tall` times as high as it is wide."""
        self.draw.ellipse(self._scaled((x - r, y - r * tall), (x + r, y + r * tall)), fill=self._ink(colour))

    def ring(self, x, y, r, colour, width):
        """Draw a circle."""
        corners = self._scaled((x - r, y - r), (x + r, y + r))
        self.draw.ellipse(corners, outline=self._ink(colour), width=int(width * self.scale))

    def line(self, points, colour, width):
        """Draw a line through points, with round ends."""
        points = self._scaled(*points)
        self.draw.line(points, fill=self._ink(colour), width=int(width * self.scale), joint="curve")
        for x, y in (points[0], points[-1]):
            r = width * self.scale / 2
            self.draw.ellipse([x - r, y - r, x + r, y + r], fill=self._ink(colour))

    def upright(self, x, y0, y1, colour, width):
        """Draw a vertical line."""
        self.line([(x, y0), (x, y1)], colour, width)

    def level(self, x0, x1, y, colour, width):
        """Draw a horizontal line."""
        self.line([(x0, y), (x1, y)], colour, width)

    def shape(self, points, colour):
        """Fill a polygon."""
        self.draw.polygon(self._scaled(*points), fill=self._ink(colour))


# --- Places


@lru_cache(maxsize=4)  # a film has one place
def _draw_place(place, light, tone, side, size):
    """Draw wall or sky, floor or ground, the place's motif, and the window or the sky that shows the light."""
    canvas = Image.new("RGB", (2 * size, 2 * size))
    pen = Pen(canvas, LIGHTS[light][0])
    wall, floor, motif = BACKDROPS[place]
    wall = tuple(min(255, max(0, c + t)) for c, t in zip(wall, tone, strict=True))
    pen.box(0, 0, 128, HORIZON, wall)
    pen.box(0, HORIZON, 128, 128, floor)
    _draw_motif(pen, motif, tuple(int(c * 0.72) for c in wall))
    pen.level(0, 128, HORIZON, tuple(int(c * 0.8) for c in floor), 2)
    x, (_, sky, (height, radius, colour)) = 64 - side * 46, LIGHTS[light]
    if place in INDOORS:
        pen.box(x - 15, 5, x + 15, 35, (250, 250, 250))
        pen.box(x - 13, 7, x + 13, 33, sky)
    else:
        pen.box(0, 0, 128, 11, sky)
    pen.disc(x, height, radius, colour)
    return canvas


def _draw_motif(pen, motif, dark):
    """Draw what tells places of similar colour apart, in a darker tone of the wall."""
    match motif:
        case "tiles":
            for x in range(0, 128, 16):
                pen.upright(x, 40, HORIZON, dark, 1)
            for y in (40, 53, 66):
                pen.level(0, 128, y, dark, 1)
        case "bricks":
            for y in range(0, HORIZON, 10):
                pen.level(0, 128, y, dark, 1)
                for x in range((y // 10 % 2) * 10, 128, 20):
                    pen.upright(x, y, y + 10, dark, 1)
        case "shelves" | "crowd":
            _draw_rows(pen, motif, dark)
        case "bed":
            pen.box(4, 62, 124, 90, dark)
            pen.box(8, 56, 34, 66, BRIGHT)
        case "desk":
            pen.box(6, 66, 122, 72, dark)
            pen.box(84, 46, 112, 64, BRIGHT)
        case "door":
            pen.box(82, 26, 112, HORIZON, dark)
            pen.box(104, 52, 108, 56, BRIGHT)
        case "bars" | "curtain":
            distance, width = {"bars": (24, 3), "curtain": (12, 5)}[motif]
            for x in range(4, 128, distance):
                pen.upright(x, 12, HORIZON, dark, width)
        case _:
            _draw_outdoor_motif(pen, motif, dark)


def _draw_rows(pen, motif, dark):
    """Draw rows of books or of heads in all colours."""
    colours = list(COLOURS.values())
    for y in range(18, HORIZON - 4, 15):
        pen.level(0, 128, y + 11, dark, 2)
        for x in range(4, 128, 9):
            colour = [c // 2 for c in colours[(x * 7 + y) % 8]]
            if motif == "shelves":
                pen.box(x, y, x + 5, y + 10, tuple(c + 40 for c in colour))
            else:
                pen.disc(x, y + 6, 3, tuple(c + 60 for c in colour))


def _draw_outdoor_motif(pen, motif, dark):
    match motif:
        case "trees":
            for x in (8, 36, 92, 120):
                pen.box(x - 3, 50, x + 3, HORIZON + 4, (95, 65, 40))
                pen.disc(x, 42, 15, (35, 110, 45))
        case "towers":
            for x, top in ((0, 30), (26, 48), (52, 38), (78, 54), (104, 26)):
                pen.box(x, top, x + 20, HORIZON, dark)
                for y in range(top + 5, HORIZON - 4, 9):
                    pen.box(x + 4, y, x + 8, y + 4, (240, 225, 150))
        case "hills":
            for x, top in ((10, 45), (60, 30), (112, 42)):
                pen.shape([(x - 42, HORIZON), (x, top), (x + 42, HORIZON)], dark)
        case "waves":
            for y in range(HORIZON - 22, HORIZON, 8):
                pen.box(0, y, 128, y + 4, (45, 120, 200))
        case "net":
            for x in range(0, 128, 8):
                pen.upright(x, 56, HORIZON, (235, 235, 235), 1)
            for y in (56, 64, 72):
                pen.level(0, 128, y, (235, 235, 235), 1)
        case "lanes":
            for y in range(HORIZON + 6, 128, 10):
                pen.level(0, 128, y, (240, 240, 240), 1)


def _draw_object(pen, name, colour, x, side, sway):
    """Draw an object in its colour around x, on the person's free side."""
    match name:
        case "umbrella":
            pen.upright(x, 62, GROUND, EDGE, 3)
            angles = np.linspace(np.pi, 2 * np.pi, 16)
            for r, ink in ((28, EDGE), (26.5, colour)):
                pen.shape([(x + r * np.cos(a), 64 + 0.85 * r * np.sin(a)) for a in angles], ink)
        case "balloon":
            pen.line([(x, 40), (x - 4, 90)], EDGE, 1.5)
            pen.disc(x + sway, 30, 16, EDGE, tall=1.15)
            pen.disc(x + sway, 30, 15, colour, tall=1.15)
        case "ball":
            pen.disc(x, GROUND - 12 - 2 * abs(sway), 13, EDGE)
            pen.disc(x, GROUND - 12 - 2 * abs(sway), 12, colour)
        case "box":
            pen.box(x - 19, GROUND - 34, x + 19, GROUND + 2, EDGE)
            pen.box(x - 17.5, GROUND - 32.5, x + 17.5, GROUND + 0.5, colour)
            pen.level(x - 17, x + 17, GROUND - 22, EDGE, 2)
        case "flag":
            pen.upright(x - 12, 22, GROUND, EDGE, 3)
            pen.box(x - 11, 23, x + 23, 50, EDGE)
            pen.shape([(x - 10, 24), (x + 22, 26 + sway), (x + 22, 48 + sway), (x - 10, 48)], colour)
        case "bicycle":
            for dx in (-16, 16):
                pen.ring(x + dx, GROUND - 12, 13, (50, 50, 50), 3)
            back, saddle = (x - 16, GROUND - 12), (x - 6, GROUND - 32)
            frame = [back, saddle, (x + 12, GROUND - 32), (x, GROUND - 12), back]
            pen.line(frame, EDGE, 8)
            pen.line([*frame, saddle], colour, 6.5)
            pen.line([(x + 10, GROUND - 40), (x + 16, GROUND - 12)], colour, 5)
        case "dog":
            for dx in (-12, -6, 6, 12):
                pen.upright(x + dx, GROUND - 14, GROUND, colour, 4)
            pen.disc(x, GROUND - 18, 17.5, EDGE, tall=0.55)
            pen.disc(x, GROUND - 18, 16.5, colour, tall=0.55)
            pen.disc(x - side * 17, GROUND - 30, 8.5, colour)
            pen.line([(x + side * 15, GROUND - 22), (x + side * (20 + sway), GROUND - 36)], colour, 3.5)
        case "ladder":
            for dx in (-10, 10):
                pen.line([(x + dx * 0.8, 34), (x + dx, GROUND)], colour, 5)
            for y in range(42, GROUND, 11):
                pen.level(x - 9, x + 9, y, colour, 4)


# --- The person


STANDING = {
    "hip": (0, -30), "neck": (0, -62), "head": (0, -73),
    "knees": [(-5, -15), (5, -15)], "feet": [(-6, 0), (6, 0)], "hands": [(-14, -36), (14, -36)],
}  # fmt: skip
# The joints that differ from those of standing: s is the side a person turns to (-1 or 1), sin and cos are the phase's
# sine and cosine, up is |sin|.
POSES = {
    "stand": lambda s, sin, cos, up: {},
    "sit": lambda s, sin, cos, up: {
        "hip": (0, -20), "neck": (0, -52), "head": (0, -63),
        "knees": [(-s * 16, -21), (-s * 18, -17)], "feet": [(-s * 17, 0), (-s * 21, 0)],
        "hands": [(-s * 14, -26 - 3 * up), (-s * 10, -30)],
    },
    "lie": lambda s, sin, cos, up: {
        "hip": (0, -6), "neck": (-s * 30, -6), "head": (-s * 41, -8),
        "knees": [(s * 10, -8 - 8 * up), (s * 12, -5)], "feet": [(s * 24, -4), (s * 26, -4)],
        "hands": [(-s * 12, -16 - 5 * up), (-s * 14, -2)],
    },
    "jump": lambda s, sin, cos, up: {
        "hip": (0, -32 - 18 * up), "neck": (0, -64 - 18 * up), "head": (0, -75 - 18 * up),
        "knees": [(-11, -17 - 18 * up), (11, -17 - 18 * up)],
        "feet": [(-14, -3 - 18 * up), (14, -3 - 18 * up)],
        "hands": [(-20, -60 - 18 * up), (20, -60 - 18 * up)],
    },
    "wave": lambda s, sin, cos, up: {"hands": [(-s * (16 + 7 * sin), -88), (s * 14, -36)][::s]},  # left, right
    "kneel": lambda s, sin, cos, up: {
        "hip": (0, -17), "neck": (-s * 3, -48), "head": (-s * 4, -59),
        "knees": [(-s * 10, -2), (-s * 6, -2)], "feet": [(s * 12, -1), (s * 16, -1)],
        "hands": [(-s * 18, -34 - 4 * up), (-s * 16, -30 - 4 * up)],
    },
    "bend": lambda s, sin, cos, up: {
        "hip": (s * 6, -32), "neck": (-s * 20, -42 + 3 * up), "head": (-s * 31, -38 + 3 * up),
        "hands": [(-s * 20, -12 + 4 * up), (-s * 25, -12 + 4 * up)],
    },
    "dance": lambda s, sin, cos, up: {
        "hip": (5 * sin, -28),
        "knees": [(-12, -15), (12, -15)], "feet": [(-17, 0), (17, 0)],
        "hands": [(-18, -78 + 12 * sin), (18, -78 - 12 * sin)],
    },
    "walk": lambda s, sin, cos, up: {
        "hip": (13 * cos, -30), "neck": (13 * cos + 3, -62), "head": (13 * cos + 4, -73),
        "knees": [(13 * cos - 10 * sin, -16), (13 * cos + 10 * sin, -16)],
        "feet": [(13 * cos - 15 * sin, 0), (13 * cos + 15 * sin, 0)],
        "hands": [(13 * cos + 13 * sin, -40), (13 * cos - 13 * sin, -40)],
    },
}  # fmt: skip


def pose(action: str, phase: float, side: int) -> dict:
    """Return the joints (hip, neck, head, knees, feet, hands) as offsets from the spot a person stands on."""
    sin, cos = float(np.sin(2 * np.pi * phase)), float(np.cos(2 * np.pi * phase))
    return STANDING | POSES[action](side, sin, cos, abs(sin))


def _draw_person(pen, moment, action, phase, extras, paints):
    """Draw the person in an action, dressed as the moment says."""
    side, size = extras["side"], extras["size"]
    x0 = 64 - side * 18 + extras["shift"]
    joints = pose(action, phase, side)
    on_canvas = lambda joint: (x0 + joint[0] * size, GROUND + joint[1] * size)  # noqa: E731
    hip, neck, (head_x, head_y) = on_canvas(joints["hip"]), on_canvas(joints["neck"]), joints["head"]
    shoulder = on_canvas((joints["neck"][0], joints["neck"][1] + 5))
    shirt, trousers, skin = paints[moment.shirt], paints[moment.trousers], SKINS[extras["skin"]]
    if action == "sit":
        pen.box(x0 - 9, GROUND - 14 * size, x0 + 9, GROUND, (110, 80, 55))
    for knee, foot in zip(map(on_canvas, joints["knees"]), map(on_canvas, joints["feet"]), strict=True):
        pen.line([hip, knee, foot], EDGE, 12 * size)
        pen.line([hip, knee, foot], trousers, 10.5 * size)
        pen.disc(*foot, 4, (60, 45, 40), tall=0.7)
    pen.line([hip, neck], EDGE, 22 * size)
    for hand in map(on_canvas, joints["hands"]):
        pen.line([shoulder, hand], EDGE, 9 * size)
        pen.line([shoulder, hand], shirt, 7.5 * size)
        pen.disc(*hand, 4.2 * size, skin)
    pen.line([hip, neck], shirt, 20 * size)
    pen.disc(*on_canvas((head_x, head_y - 2)), 10 * size, HAIRS[extras["hair"]])
    pen.disc(*on_canvas((head_x, head_y + 1.5)), 8.2 * size, skin)
