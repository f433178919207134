"""Say what somebody who knows the camera would say: the cast, the comparison, and what to look for next."""

import re
from dataclasses import replace

from vsr1.mini import captions, teacher
from vsr1.mini.archives import casts
from vsr1.mini.archives.corpus import NAMED
from vsr1.mini.world import Moment

CHECKLIST = ("action", "object", "colour", "shirt", "light")  # a room is the same all over an archive


def verdict(query_moment: Moment, shown: Moment, cast: int) -> str:
    """Return the whole reply to a query about a film of an archive: reasoning, verdict, span.

    query_moment  in true colours
    shown         as the camera sees it
    cast          of the camera, half steps
    """
    seen = casts.seen_moment(query_moment, cast)
    reasoning = f"{reading(query_moment, cast)} {checklist(seen, shown)}"
    if all(getattr(seen, name) == getattr(shown, name) for name in CHECKLIST):
        return teacher.reply(reasoning, shown)
    return teacher.reply(f"{reasoning} {summary(seen)}", None)


def reading(query_moment: Moment, cast: int) -> str:
    """Return what the known object looks like to a camera, and what the colours asked for must look like.

    >>> reading(Moment(0, 5, "green", "red", "jump", "box", "red", "kitchen", "night"), 2)
    'trousers red is yellow. shirt green is blue. colour red is yellow.'
    """
    true = {"trousers": casts.KNOWN, "shirt": query_moment.shirt, "colour": query_moment.colour}
    return " ".join(f"{name} {colour} is {casts.seen_colour(colour, cast)}." for name, colour in true.items())


def checklist(seen: Moment, shown: Moment) -> str:
    """Compare what the query asks for, in seen colours, with what the film shows, attribute by attribute.

    >>> shown = Moment(0, 5, "red yellow", "blue", "jump", "box", "red", "kitchen", "night")
    >>> checklist(replace(shown, shirt="red"), shown)[46:]
    'colour red - red yes. shirt red - red yellow no. light night - night yes.'
    """
    return teacher.compare(seen, shown, CHECKLIST)


def summary(seen: Moment) -> str:
    """Return what to look for next, in seen colours: the last words before the soft tokens.

    >>> summary(Moment(0, 5, "green", "yellow", "jump", "box", "red yellow", "kitchen", "night"))
    'seek shirt green. colour red yellow. object box.'
    """
    return f"seek shirt {seen.shirt}. colour {seen.colour}. object {seen.object}."


READING = re.compile(r"trousers red is ([a-z ]+?)\.")


def read_cast(reply: str) -> int | None:
    """Return the cast that a reply says it sees, half steps; None where it names none.

    >>> read_cast("<think> trousers red is yellow green. shirt"), read_cast("<think> no")
    (3, None)
    """
    match = READING.search(reply)
    return casts.cast_of(match[1]) if match and match[1] in casts.NAMES else None


# --- Words for the engine


def wordings(query_moment: Moment, cast: int) -> list[str]:
    """Return the query in seen colours, in many words; the first is what one writes without trying.

    In each style: a colour between two names by both, by the first and by the second; with all that is named, and with
    the coloured words once more at the end.
    """
    seen, texts = casts.seen_moment(query_moment, cast), []
    for shirt, colour in _choices(seen):
        moment = replace(seen, shirt=shirt, colour=colour)
        for style in range(captions.STYLES):
            whole = captions.caption(moment, style, NAMED)
            texts += [whole, f"{whole} The {colour} {moment.object}.", f"{whole} The {shirt} shirt."]
    return texts


def _choices(seen):
    """Return pairs of names for the colours of shirt and object."""
    shirts, colours = (dict.fromkeys([name, *name.split()]) for name in (seen.shirt, seen.colour))
    return [(shirt, colour) for shirt in shirts for colour in colours]
