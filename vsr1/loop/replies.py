"""Parse what the policy replies, once, for rewards and evaluation alike."""

import re
from dataclasses import dataclass

from vsr1.data.annotations import SPECIAL_TOKEN
from vsr1.models.prompt_text import REFINE

VERDICTS = {"matched": True, "match": True}
VERDICTS |= dict.fromkeys(("not_matched", "mismatch", "notmatch", "not-matched"), False)
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

_THINK = r"<think>(?!\s*</think>)(?:(?!<(?:/?(?:think|answer|start|end|query_update)|REFINE)>).)+</think>"
_SPAN = r"\s*<start>[0-9]+(?:\.[0-9]+)?</start>\s*<end>[0-9]+(?:\.[0-9]+)?</end>"
_MATCHED, _NOT = rf"<answer>matched</answer>{_SPAN}", r"<answer>not_matched</answer>"
LAYOUTS = {  # docs/method.md sections 4 and 11; white space between the parts is free
    "plain": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT})\s*",
    "sqr": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT})\s*{REFINE}\s*",
    "hqr": rf"\s*{_THINK}\s*(?:{_MATCHED}|{_NOT}\s*<query_update>\s*[^\s<][^<]*</query_update>)\s*",
}


@dataclass(frozen=True)
class Reply:
    """One completion, read once. None means "not there" or "not readable"."""

    text: str  # special tokens kept, the closing <|im_end|> dropped
    ids: tuple[int, ...]  # as sampled, with the closing <|im_end|>
    matched: bool | None  # the verdict; None: none, or a word that is no verdict
    span: tuple[float, float] | None  # seconds, in order, not clamped; None unless both times are there
    has_refine: bool
    refine_misplaced: bool
    strict: bool  # the whole completion is one of the layouts it was asked for, and it ended by itself
    update: str | None  # a better query in words (HQR)
    ended: bool  # False: cut at the limit of new tokens


def read_reply(text: str, ids, *, layout="plain", refine_id: int | None = None, ended=True) -> Reply:
    """Parse a completion, for rewards and evaluation alike (docs/method.md section 2).

    Text up to the last `</think>` is dropped. Then the first closed `<answer>`, `<start>`, `<end>` and
    `<query_update>` counts, and in a time the first finite number. Tags and verdicts are read in either case, blanks
    in a verdict as `_`. A reversed span is swapped. `<REFINE>` counts by its id, so letters that spell it do not. One
    that anything but special tokens follows is misplaced, even if another one stands at the end. `strict` says whether
    the reply is the layout to the letter; `matched is not None` is the tolerant count.

    >>> read_reply("<think> yes </think> <answer>Match</answer> <start>9.0 s</start> <end>3</end>", [7]).span
    (3.0, 9.0)
    >>> read_reply("<think> <answer>matched</answer> </think> <answer>not matched</answer>", [7]).matched
    False
    >>> read_reply("<answer>matched", [7]).matched is None
    True
    """
    answer = text.rpartition("</think>")[2]
    times = [_number(inside("start", answer)), _number(inside("end", answer))]
    has_refine = refine_id is not None and refine_id in ids
    tail = SPECIAL_TOKEN.sub("", text.partition(REFINE)[2]).strip()
    strict = ended and re.fullmatch(LAYOUTS[layout], text, re.DOTALL) is not None
    return Reply(
        text=text,
        ids=tuple(ids),
        matched=VERDICTS.get("_".join((inside("answer", answer) or "").lower().split())),
        span=None if None in times else (min(times), max(times)),
        has_refine=has_refine,
        refine_misplaced=has_refine and tail != "",
        strict=strict and (layout != "sqr" or has_refine),
        update=" ".join((inside("query_update", answer) or "").split()) or None,
        ended=ended,
    )


def inside(tag: str, text: str) -> str | None:
    """Return the text between the first closed `<tag>` and its `</tag>`; None without one.

    >>> inside("end", "<end><end> 4 </end>")
    ' 4 '
    """
    match = re.search(rf"<{tag}>([^<]*)</{tag}>", text, re.IGNORECASE)
    return match and match[1]


def _number(text):
    """Return the first finite number in a text; None without one. `1:30` is 1, `nan` and `1e999` are none."""
    numbers = (float(match[0]) for match in NUMBER.finditer(text or ""))
    return next((number for number in numbers if abs(number) < float("inf")), None)
