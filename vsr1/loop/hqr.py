"""Hard query refinement (HQR): rewrite the query in words, in three variants (docs/method.md section 11)."""

import copy

from vsr1.models import prompt_text

MAX_TOKENS = 512  # of a query with its update in words, and the engine's template around it


def rewrite_prompt(variant: str) -> tuple[str, bool]:
    """Return (system prompt, whether the rejected video is shown with it); `reasoned` judges and rewrites at once.

    Replies are parsed by `replies.read_reply`, as all others are.
    """
    return {
        "blind": (prompt_text.REWRITE, False),
        "seen": (prompt_text.REWRITE, True),
        "reasoned": (prompt_text.SYSTEM_HQR, True),
    }[variant]


def compose_query(query: str, update: str, mode: str) -> str:
    """Return the next query in words: the update in place of the query, or appended to it.

    >>> compose_query("a dog", "a red dog", "append")
    'a dog a red dog'
    """
    assert mode in ("replace", "append"), mode
    return f"{query} {update}" if mode == "append" else update


def with_query_limit(engine):
    """Return the same engine with a limit of MAX_TOKENS, so that updates are not cut where queries are."""
    other = copy.copy(engine)
    other.max_query_tokens, other.num_truncated = MAX_TOKENS, 0
    return other
