"""Hard query refinement (HQR): rewrite the query in words."""

import copy

from vsr1.models import prompt_text

# --- hard: the query rewritten in words, in three variants that this project defines (METHOD.md 11) ------------------


def rewrite_prompt(variant: str) -> tuple[str, bool]:
    """(system prompt, does it see the rejected video?); `reasoned` judges and rewrites in one reply.

    What it answers is read with every other reply, by `episode.read_reply`.
    """
    return {
        "blind": (prompt_text.REWRITE, False),
        "seen": (prompt_text.REWRITE, True),
        "reasoned": (prompt_text.SYSTEM_HQR, True),
    }[variant]


def compose_query(query: str, updates: list[str], mode: str, count: int = 1) -> str:
    """The next query in words: the latest `count` updates; in mode `append` after the query itself, not for it.

    >>> hard_text("a dog", ["a red dog"], "append")
    'a dog a red dog'
    """
    assert mode in ("replace", "append"), mode
    return " ".join([query] * (mode == "append") + updates[-count:])


def with_query_limit(engine, tokens: int = 512):
    """The same engine with room for longer texts, so that updates are not cut where queries are."""
    other = copy.copy(engine)
    other.max_query_tokens, other.num_truncated = tokens, 0
    return other
