"""Say what somebody who knows the rendered truth would say: reasoning, verdicts, rewrites, answers.

This stands where the paper has a 30B teacher model. Pretraining of the mini policy and stage 1 on the mini profile
learn from it; nothing that is evaluated calls it.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from vsr1.mini import captions
from vsr1.mini.captions import phrase
from vsr1.mini.world import ATTRIBUTES, COLOURS, Moment
from vsr1.models.prompt_text import seconds_text

WEIGHT = {"action": 2, "object": 2}  # of an attribute when a video's closest moment is sought; else 1
CHECKLIST = ("action", "object", "colour", "shirt", "trousers", "place", "light")
QUESTIONS = {
    "shirt": "What colour is the shirt",
    "trousers": "What colour are the trousers",
    "action": "What does the person do",
    "object": "Which object is there",
    "colour": "What colour is the object",
    "place": "Where is it",
    "light": "When is it",
}


# --- The verdict on a video


def closest(query_moment: Moment, moments: tuple[Moment, ...]) -> Moment:
    """Return the moment of a video that has most in common with the one asked for; the earliest of equals."""

    def shared(moment):
        return sum(WEIGHT.get(n, 1) for n in ATTRIBUTES if getattr(moment, n) == getattr(query_moment, n))

    return max(moments, key=shared)


def differing(query_moment: Moment, shown: Moment) -> list[str]:
    """Return the attributes in which two moments differ, in the order of ATTRIBUTES."""
    return [name for name in ATTRIBUTES if getattr(query_moment, name) != getattr(shown, name)]


def verdict(query_moment: Moment, moments: tuple[Moment, ...], update: str | None = None) -> str:
    """Return the whole reply to a query about a video: reasoning, verdict, span.

    update  a rewritten query that closes a not_matched reply (HQR)
    """
    shown = closest(query_moment, moments)
    matched = None if differing(query_moment, shown) else shown
    return reply(checklist(query_moment, shown), matched, update)


def reply(reasoning: str, matched: Moment | None, update: str | None = None) -> str:
    """Return a reply with this reasoning that names the moment that matches, or says that the video does not match.

    update  a rewritten query that closes a not_matched reply (HQR)
    """
    if matched:
        return f"<think> {reasoning} </think> <answer>matched</answer> {span(matched)}"
    ending = f" <query_update>{update}</query_update>" if update else ""
    return f"<think> {reasoning} </think> <answer>not_matched</answer>{ending}"


def checklist(query_moment: Moment, shown: Moment) -> str:
    """Say when the closest moment is, then compare what the query asks for with what is shown, attribute by attribute.

    The time first: a small model looks up by it what was shown then. Without it, what changes within a video was copied
    from the query. One word each, side by side: it learns to compare what stands next to each other.

    >>> query_moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> shown = Moment(12, 18.5, "red", "blue", "jump", "umbrella", "black", "kitchen", "night")
    >>> checklist(query_moment, shown)[:93]
    '12.0 to 18.5. does jumps - jumps yes. object umbrella - umbrella yes. colour green - black no'
    """
    return f"{times(shown)}. {compare(query_moment, shown, CHECKLIST)}"


def compare(query_moment: Moment, shown: Moment, names) -> str:
    """Compare two moments attribute by attribute: the word asked for, the word shown, and whether they are the same."""
    lines = []
    for name in names:
        label = "does" if name == "action" else name
        same = "yes" if getattr(query_moment, name) == getattr(shown, name) else "no"
        lines.append(f"{label} {word(name, query_moment)} - {word(name, shown)} {same}.")
    return " ".join(lines)


def corrupt_asked(reply: str, rng) -> str:
    """Return a reply whose checklist asks for other colours, each drawn anew; what it says of the video stays.

    >>> corrupt_asked("colour green - black no. shirt red - red yes.", np.random.default_rng(0)).count("green")
    0
    """

    def other(match):
        return f"{match[1]} {rng.choice([colour for colour in COLOURS if colour != match[2]])} -"

    return re.sub(r"\b(colour|shirt|trousers) (\w+) -", other, reply)


def word(name: str, moment: Moment) -> str:
    """Return one attribute as a reply names it: a word, or the two names of a colour that lies between them."""
    if name in ("action", "light"):
        words = phrase(name, moment).split()
        return words[0] if name == "action" else words[-1]
    return getattr(moment, name)


# --- What a reply states, and whether it is true

WORDS = r"(\S+(?: \S+)?)"  # one, or the two names of a colour that lies between them
STATEMENT = re.compile(rf"({'|'.join(('does', *CHECKLIST[1:]))}) {WORDS} - {WORDS} (yes|no)\.")


@dataclass(frozen=True)
class Statement:
    """What a reply says of one attribute: the word asked for, the word shown, and whether they are the same."""

    attribute: str
    query_word: str
    shown_word: str
    same: bool

    def errors(self, query_moment: Moment, shown: Moment) -> list[str]:
        """Name what is false of it, in words, for a query and the closest moment of the shown video.

        >>> query_moment = Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
        >>> read_statement("colour green - green yes.").errors(query_moment, replace(query_moment, colour="pink"))
        ['pink is shown', 'not the same']
        """
        query_word, shown_word = (word(self.attribute, moment) for moment in (query_moment, shown))
        same = getattr(query_moment, self.attribute) == getattr(shown, self.attribute)
        errors = {
            f"{query_word} is asked for": self.query_word != query_word,
            f"{shown_word} is shown": self.shown_word != shown_word,
            "the same" if same else "not the same": self.same != same,
        }
        return [text for text, is_false in errors.items() if is_false]


def read_statement(step: str) -> Statement | None:
    """Read one step of the reasoning of a reply; None where it is not one of `checklist`.

    >>> read_statement("colour green blue - red no.")
    Statement(attribute='colour', query_word='green blue', shown_word='red', same=False)
    """
    if not (match := STATEMENT.fullmatch(step)):
        return None
    label, query_word, shown_word, same = match.groups()
    return Statement("action" if label == "does" else label, query_word, shown_word, same == "yes")


# --- Times


def times(moment: Moment) -> str:
    """Return when a moment happens, in words."""
    return f"{seconds_text(moment.start)} to {seconds_text(moment.end)}"


def span(moment: Moment) -> str:
    """Return when a moment happens, in tags."""
    return f"<start>{seconds_text(moment.start)}</start> <end>{seconds_text(moment.end)}</end>"


def caption(moment: Moment, style: int) -> str:
    """Return a moment in words, with its times.

    >>> caption(Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "kitchen", "night"), 0)[:12]
    '0.0 to 5.0: '
    """
    return f"{times(moment)}: {captions.caption(moment, style)}"


def at_printed_times(moment: Moment, printed) -> Moment | None:
    """Return the moment with start and end among the times that are printed in the video's prompt.

    It starts at its first pair of frames and ends at the first pair after it, or at the last. None: no two pairs tell
    when it is. A small model copies times, it does not compute them.

    printed  (P,) seconds of the pairs of frames, as printed

    >>> moment = Moment(1.2, 4.7, "red", "blue", "jump", "umbrella", "green", "kitchen", "night")
    >>> shown = at_printed_times(moment, np.array([0.5, 2.5, 4.5, 6.5]))
    >>> shown.start, shown.end
    (2.5, 6.5)
    """
    inside = np.flatnonzero((printed >= moment.start) & (printed < moment.end))
    last = min(inside[-1] + 1, len(printed) - 1) if len(inside) else 0
    if not len(inside) or inside[0] == last:
        return None
    return replace(moment, start=float(printed[inside[0]]), end=float(printed[last]))


# --- Rewrites and questions


def rewrite(query_moment: Moment, shown: Moment | None, rng) -> str:
    """Return the query in other words, and what to look for: what the shown video lacks, or any detail."""
    style = int(rng.integers(captions.STYLES))
    name = str(rng.choice(differing(query_moment, shown) if shown else sorted(ATTRIBUTES)))
    focus = {
        "colour": f"the {query_moment.colour} {query_moment.object}",
        "action": f"someone who {phrase('action', query_moment)}",
        "light": f"the scene {phrase('light', query_moment)}",
        "place": f"the {query_moment.place}",
    }.get(name, f"the {phrase(name, query_moment)}")
    return f"{captions.caption(query_moment, style)} Focus on {focus}."


def question(moment: Moment, rng) -> tuple[str, str]:
    """Return a question about a moment and its answer: when something happens, or one attribute of a time."""
    if rng.random() < 0.7:
        named = captions.COARSE if rng.random() < 0.5 else ATTRIBUTES
        text = captions.caption(moment, int(rng.integers(captions.STYLES)), named)
        return f'When does this happen? "{text}"', span(moment)
    name = str(rng.choice(ATTRIBUTES))
    answer = getattr(moment, name) if name in ("shirt", "trousers") else phrase(name, moment)
    return f"{QUESTIONS[name]} from {times(moment)}?", f"{answer}."
