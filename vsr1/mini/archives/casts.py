"""See colours through cameras whose cast shifts them along the circle of hues.

A cast is a number of half steps. Whole steps turn a named colour into another named one; a half step turns it into one
that lies between two names. Every cast can be undone.
"""

from dataclasses import replace

from vsr1.mini.world import COLOURS, Moment

CIRCLE = ("red", "yellow", "green", "blue", "purple", "pink")  # the last is next to the first
STEPS = 2 * len(CIRCLE)  # half steps of a full turn
PAINTED = ("shirt", "colour")  # attributes that queries name and casts change
KNOWN = "red"  # everybody knows that trousers are red here: no query names them, and they tell the cast


def _names():
    """Name the colours of the circle: at odd positions by both neighbours."""
    between = (f"{a} {b}" for a, b in zip(CIRCLE, CIRCLE[1:] + CIRCLE[:1], strict=True))
    return tuple(name for pair in zip(CIRCLE, between, strict=True) for name in pair)


def _paint(name):
    """Mix the colours that a name is made of, as RGB."""
    parts = [COLOURS[word] for word in name.split()]
    return tuple(sum(values) // len(parts) for values in zip(*parts, strict=True))


NAMES = _names()  # of all colours that a camera can see, by position in half steps
PAINTS = {name: _paint(name) for name in NAMES}


def seen_colour(colour: str, cast: int) -> str:
    """Return what a colour looks like to a camera.

    >>> seen_colour("red", 0), seen_colour("red", 4), seen_colour("red", 1), seen_colour("pink", 3)
    ('red', 'green', 'red yellow', 'red yellow')
    """
    return NAMES[(NAMES.index(colour) + cast) % STEPS]


def cast_of(colour: str) -> int:
    """Return the cast of a camera to which the known colour looks like `colour`.

    >>> cast_of(seen_colour(KNOWN, 7))
    7
    """
    return (NAMES.index(colour) - NAMES.index(KNOWN)) % STEPS


def seen_moment(moment: Moment, cast: int) -> Moment:
    """Return the moment as a camera sees it: shirt, trousers and object in other colours, all else as it is."""
    colours = {name: seen_colour(getattr(moment, name), cast) for name in (*PAINTED, "trousers")}
    return replace(moment, **colours)


def is_unseen(moment: Moment, cast: int) -> bool:
    """Return whether a moment holds the colour that no train video shows by this cast."""
    return unseen_colour(cast) in (moment.shirt, moment.colour)


def unseen_colour(cast: int) -> str:
    """Return the colour that the train archives of a cast do not hold, so that tests ask for it anew."""
    return CIRCLE[(cast + 1) % len(CIRCLE)]
