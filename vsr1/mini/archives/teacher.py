"""Say what somebody who knows the camera would say: the cast first, then what to look for, then the comparison."""

import re
from dataclasses import replace

from vsr1.mini import captions, teacher
from vsr1.mini.archives import casts
from vsr1.mini.archives.corpus import NAMED
from vsr1.mini.world import Moment

CHECKLIST = ("action", "object", "colour", "shirt", "light")  # a room is the same all over an archive


def verdict(asked: Moment, shown: Moment, cast: int, update: str | None = None) -> str:
    """Return the whole reply to a query about a film of an archive: reasoning, verdict, span.

    asked   in true colours
    shown   as the camera sees it
    cast    of the camera, half steps
    update  a rewritten query that closes a not_matched reply (HQR)
    """
    looks = casts.seen_moment(asked, cast)
    reasoning = f"<think> {reading(asked, cast)} {checklist(looks, shown)} </think>"
    if all(getattr(looks, name) == getattr(shown, name) for name in CHECKLIST):
        return f"{reasoning} <answer>matched</answer> {teacher.span(shown)}"
    ending = f" <query_update>{update}</query_update>" if update else ""
    return f"{reasoning} <answer>not_matched</answer>{ending}"


def reading(asked: Moment, cast: int) -> str:
    """Return what the known object looks like to a camera, and what the colours asked for must look like.

    >>> reading(Moment(0, 5, "green", "red", "jump", "box", "red", "kitchen", "night"), 2)
    'trousers red is yellow. shirt green is blue. colour red is yellow.'
    """
    true = {"trousers": casts.KNOWN, "shirt": asked.shirt, "colour": asked.colour}
    return " ".join(f"{name} {colour} is {casts.seen(colour, cast)}." for name, colour in true.items())


def checklist(looks: Moment, shown: Moment) -> str:
    """Compare what the query asks for, in seen colours, with what the film shows, attribute by attribute.

    >>> shown = Moment(0, 5, "red yellow", "blue", "jump", "box", "red", "kitchen", "night")
    >>> checklist(replace(shown, shirt="red"), shown)[46:]
    'colour red - red yes. shirt red - red yellow no. light night - night yes.'
    """
    lines = []
    for name in CHECKLIST:
        label = "does" if name == "action" else name
        same = "yes" if getattr(looks, name) == getattr(shown, name) else "no"
        lines.append(f"{label} {word(name, looks)} - {word(name, shown)} {same}.")
    return " ".join(lines)


def word(name: str, moment: Moment) -> str:
    """Return one attribute as a reply names it: a word, or the two names of a colour between them."""
    return getattr(moment, name) if name in casts.PAINTED else teacher.word(name, moment)


def caption(shown: Moment, style: int) -> str:
    """Return a film in words, with its times."""
    return teacher.caption(shown, style % captions.STYLES)


READING = re.compile(r"trousers red is ([a-z ]+?)\.")


def read_cast(reply: str) -> int | None:
    """Return the cast that a reply says it sees, half steps; None where it names none.

    >>> read_cast("<think> trousers red is yellow green. shirt"), read_cast("<think> no")
    (3, None)
    """
    found = READING.search(reply)
    return casts.cast_of(found[1]) if found and found[1] in casts.NAMES else None


# --- Words for the engine


def wordings(asked: Moment, cast: int) -> list[str]:
    """Return the query in seen colours, in many words; the first is what one writes without trying.

    In each style: a colour between two names by both, by the first and by the second; with all that is named, and with
    the coloured words once more at the end.
    """
    looks, texts = casts.seen_moment(asked, cast), []
    for shirt, colour in _choices(looks):
        moment = replace(looks, shirt=shirt, colour=colour)
        for style in range(captions.STYLES):
            whole = captions.caption(moment, style, NAMED)
            texts += [whole, f"{whole} The {colour} {moment.object}.", f"{whole} The {shirt} shirt."]
    return texts


def _choices(looks):
    """Return pairs of names for the colours of shirt and object."""
    names = [dict.fromkeys([name, *name.split()]) for name in (looks.shirt, looks.colour)]
    return [(shirt, colour) for shirt in names[0] for colour in names[1]]
