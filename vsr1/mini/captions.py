"""Word the moments of the mini world: captions, and the queries of a corpus."""

from vsr1.data import annotations
from vsr1.mini.world import ATTRIBUTES, Moment, Scene

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
LIGHTS = {"day": "in daylight", "dusk": "at dusk", "night": "at night"}
PREPOSITIONS = {"beach": "on", "stage": "on", "track": "on", "court": "on", "rink": "on", "lake": "by"}
STYLES = 4  # ways of wording the same attributes
COARSE = ("action", "object")  # what a coarse caption names


def phrase(name: str, moment: Moment) -> str:
    """Return one attribute in words.

    >>> moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> [phrase(name, moment) for name in ("shirt", "action", "colour", "place")]
    ['red shirt', 'jumps up and down', 'green', 'in the kitchen']
    """
    value = getattr(moment, name)
    if name in ("shirt", "trousers"):
        return f"{value} {name}"
    if name == "place":
        return f"{PREPOSITIONS.get(value, 'in')} the {value}"
    return {"action": ACTIONS, "light": LIGHTS}.get(name, {}).get(value, value)


def caption(moment: Moment, style: int, named=ATTRIBUTES) -> str:
    """Return a sentence about a moment that names the attributes in `named`: all seven, or COARSE.

    >>> moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> caption(moment, 0)
    'The person in the red shirt and blue trousers jumps up and down with a green umbrella in the kitchen at night.'
    >>> caption(moment, 3, ("action", "object"))
    'Someone jumps up and down with an umbrella.'
    """
    words = {name: phrase(name, moment) if name in named else "" for name in ATTRIBUTES}
    action, place, light = words["action"] or "is seen", words["place"], words["light"]
    thing = _object_phrase(words["colour"], words["object"])
    clothes = _clothes_phrase(words["shirt"], words["trousers"], style)
    parts = (
        ("the person", clothes, action, thing, place, light),
        (light, "a person", clothes, action, place, thing),
        (thing and f"{thing},", "someone", clothes, action, place, light),
        (place, "someone", action, light, thing, clothes),
    )[style]
    text = " ".join(filter(None, parts))
    return text[0].upper() + text[1:] + "."


def _object_phrase(colour, name):
    """Return "with a green box", "with a box", "with a green thing" or nothing."""
    if not colour and not name:
        return ""
    noun = " ".join(filter(None, (colour, name or "thing")))
    return f"with {'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _clothes_phrase(shirt, trousers, style):
    """Return what the person wears in one of the styles, or nothing."""
    if shirt and style > 0:
        shirt = f"a {shirt}"
    pieces = [shirt, trousers]
    joined = " and ".join(filter(None, reversed(pieces) if style == 2 else pieces))
    return joined and f"{('in the', 'wearing', 'in', 'in')[style]} {joined}"


def wordings(moment: Moment) -> list[str]:
    """Return a moment in many true words: every style, with one attribute left out or named again at the end.

    >>> moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> texts = wordings(moment)
    >>> len(texts), texts[1]
    (60, 'The person in the blue trousers jumps up and down with a green umbrella in the kitchen at night.')
    """
    texts = []
    for style in range(STYLES):
        whole = caption(moment, style)
        texts.append(whole)
        texts += [
            caption(moment, style, tuple(other for other in ATTRIBUTES if other != name))
            for name in ATTRIBUTES
        ]
        texts += [f"{whole} {_again(moment, name)}" for name in ATTRIBUTES]
    return texts


def _again(moment, name):
    """Return one attribute as a sentence of its own."""
    words = f"the {moment.colour} {moment.object}" if name == "colour" else phrase(name, moment)
    return f"{words[0].upper()}{words[1:]}."


def make_queries(
    scenes: list[Scene], first_id: int, per_moment: int, rng, named=ATTRIBUTES
) -> list[annotations.Query]:
    """Write `per_moment` fine captions about each moment as queries, in shuffled order, with ids from `first_id` on.

    named  as of `caption`, of the fine captions
    """
    rows = []
    for scene in scenes:
        for moment in scene.moments:
            for style in rng.permutation(STYLES)[:per_moment]:
                coarse = caption(moment, int(rng.integers(STYLES)), COARSE)
                span = moment.start, moment.end
                rows.append((caption(moment, style, named), scene.video, span, coarse, scene.seconds))
    return [annotations.Query(first_id + n, *rows[row]) for n, row in enumerate(rng.permutation(len(rows)))]
