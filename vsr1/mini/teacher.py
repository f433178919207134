"""What somebody who knows the rendered truth would say: reasoning traces, verdicts, rewrites, answers.

It stands where the paper has a 30B teacher model. The mini policy's foundation and stage 1 on the mini profile learn
from it; nothing that is evaluated calls it.
"""

from dataclasses import replace

import numpy as np

from vsr1.mini import renderer
from vsr1.mini.renderer import ACTIONS, ATTRIBUTES, LIGHTS, Moment

WEIGHT = {"action": 2, "object": 2}  # of an attribute when a video's closest moment is sought; else 1


CHECKLIST = {
    "action": "does",
    "object": "object",
    "colour": "colour",
    "shirt": "shirt",
    "trousers": "trousers",
}
CHECKLIST |= {"place": "place", "light": "light"}


def closest(asked: Moment, moments: tuple[Moment, ...]) -> Moment:
    """The moment of a video that has most in common with the one asked for; the earliest of equals."""
    shared = [
        sum(WEIGHT.get(name, 1) * (getattr(moment, name) == getattr(asked, name)) for name in ATTRIBUTES)
        for moment in moments
    ]
    return moments[shared.index(max(shared))]


def differing(asked: Moment, seen: Moment) -> list[str]:
    """The attributes in which two moments differ, in the order of ATTRIBUTES."""
    return [name for name in ATTRIBUTES if getattr(asked, name) != getattr(seen, name)]


def phrase(name: str, moment: Moment) -> str:
    """One attribute in words.

    >>> moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> [phrase(name, moment) for name in ("shirt", "action", "colour", "place")]
    ['red shirt', 'jumps up and down', 'green', 'in the kitchen']
    """
    value = getattr(moment, name)
    where = renderer.WHERE.get(value, f"in the {value}")
    words = {"action": ACTIONS.get(value), "place": where, "light": LIGHTS.get(value)}
    return words.get(name) or (f"{value} {name}" if name in ("shirt", "trousers") else value)


def trace(asked: Moment, seen: Moment) -> str:
    """A checklist: what the query asks for, what the closest moment shows, and whether that is the same.

    One word each, side by side: a small model learns to compare what stands next to each other (LOG.md).

    >>> asked = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> seen = Moment(12, 18.5, "red", "blue", "jump", "umbrella", "black", "kitchen", "night")
    >>> trace(asked, seen)[:79]
    'does jumps - jumps yes. object umbrella - umbrella yes. colour green - black no'
    """
    lines = []
    for name, label in CHECKLIST.items():
        same = "yes" if getattr(asked, name) == getattr(seen, name) else "no"
        lines.append(f"{label} {word(name, asked)} - {word(name, seen)} {same}.")
    return " ".join(lines)


def word(name: str, moment: Moment) -> str:
    """One attribute in one word."""
    words = phrase(name, moment).split()
    return words[0] if name in ("action", "shirt", "trousers") else words[-1]


def seconds(time: float) -> str:
    """A time as the targets write it (METHOD section 4).

    >>> seconds(18), seconds(11.60)
    ('18.0', '11.6')
    """
    return f"{time:.1f}" if time == int(time) else f"{time:.6f}".rstrip("0")


def as_told(moment: Moment, times) -> Moment | None:
    """The moment with times that the video's text carries, (P,) seconds of its pairs of frames as printed there.

    It starts at its first pair and ends at the first pair after it, or at the last; None: no two pairs tell it. A small
    model copies times, it does not compute them (LOG.md).

    >>> moment = Moment(1.2, 4.7, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> told = as_told(moment, np.array([0.5, 2.5, 4.5, 6.5]))
    >>> told.start, told.end
    (2.5, 6.5)
    """
    inside = np.flatnonzero((times >= moment.start) & (times < moment.end))
    last = min(inside[-1] + 1, len(times) - 1) if len(inside) else 0
    if not len(inside) or inside[0] == last:
        return None
    return replace(moment, start=float(times[inside[0]]), end=float(times[last]))


def span(moment: Moment) -> str:
    """When a moment happens, in tags."""
    return f"<start>{seconds(moment.start)}</start> <end>{seconds(moment.end)}</end>"


def caption(moment: Moment, style: int) -> str:
    """A moment in words, with its times: a video told instead of shown.

    >>> caption(Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night"), 0)[:12]
    '0.0 to 5.0: '
    """
    return f"{seconds(moment.start)} to {seconds(moment.end)}: {renderer.caption(moment, style)}"


def verdict(asked: Moment, moments: tuple[Moment, ...], update: str | None = None) -> str:
    """The whole reply to a query about a video: trace, verdict, span; `update` closes a not_matched one (HQR)."""
    seen = closest(asked, moments)
    thought = f"<think> {trace(asked, seen)} </think>"
    if not differing(asked, seen):
        return f"{thought} <answer>matched</answer> {span(seen)}"
    ending = f" <query_update>{update}</query_update>" if update else ""
    return f"{thought} <answer>not_matched</answer>{ending}"


def rewrite(asked: Moment, seen: Moment | None, rng, style: int | None = None, named=ATTRIBUTES) -> str:
    """The query in other words, and where to look: at what the shown video lacked, or at any detail without one."""
    style = int(rng.integers(renderer.STYLES)) if style is None else style
    name = str(rng.choice(differing(asked, seen) if seen else sorted(named)))
    focus = {"colour": f"the {asked.colour} {asked.object}", "object": f"the {asked.object}"}
    focus |= {"action": f"someone who {ACTIONS[asked.action]}", "light": f"the scene {LIGHTS[asked.light]}"}
    focus |= {"place": f"the {asked.place}"}
    where = focus.get(name, f"the {phrase(name, asked)}")
    return f"{renderer.caption(asked, style, named)} Focus on {where}."


def question(moment: Moment, rng) -> tuple[str, str]:
    """A question about a moment, and its answer: when something happens, or one attribute of a time."""
    if rng.random() < 0.7:
        named = ("action", "object") if rng.random() < 0.5 else ATTRIBUTES
        ask = renderer.caption(moment, int(rng.integers(renderer.STYLES)), named)
        return f'When does this happen? "{ask}"', span(moment)
    name = str(rng.choice(ATTRIBUTES))
    ask = {
        "shirt": "What colour is the shirt",
        "trousers": "What colour are the trousers",
        "action": "What does the person do",
        "object": "Which object is there",
        "colour": "What colour is the object",
        "place": "Where is it",
        "light": "When is it",
    }[name]
    answer = getattr(moment, name) if name in ("shirt", "trousers") else phrase(name, moment)
    return f"{ask} from {seconds(moment.start)} to {seconds(moment.end)}?", f"{answer}."
