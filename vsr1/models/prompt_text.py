"""The prompts of the policy."""

REFINE = "<REFINE>"

# System prompts, docs/method.md section 4. The wording is ours.

_JUDGE = (
    "You judge one retrieved video against a query. Inside <think> </think>, compare step by step what the query asks "
    "with what the video shows; be short and say only what is visible. "
    "If a scene fits, answer <answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end>"
)
_REJECT = "If no scene fits, answer <answer>not_matched</answer>"
_ONLY = "Write nothing outside the tags."
SYSTEM = f"{_JUDGE} {REFINE}. {_REJECT} {REFINE}; the token starts a refined search. Always end with {REFINE}. {_ONLY}"
SYSTEM_ZS = f"{_JUDGE}. {_REJECT}. {_ONLY}"  # a model without the token
SYSTEM_HQR = f"{_JUDGE}. {_REJECT} <query_update>TEXT</query_update> with a better query. {_ONLY}"  # reasoned
REWRITE = (  # blind and seen
    "The first search with this query failed. Rewrite the query so that the search engine finds the right video. "
    "Answer <query_update>TEXT</query_update>."
)


def user_message(query: str, video: str) -> str:
    """Return the user's message: a query, and the retrieved video as text."""
    return f'Query: "{query}"\nRetrieved video: {video}'


def seconds_text(seconds: float) -> str:
    """Write a time as replies have it: at least one decimal, none that says nothing.

    >>> seconds_text(18), seconds_text(11.60)
    ('18.0', '11.6')
    """
    return f"{seconds:.1f}" if seconds == int(seconds) else f"{seconds:.6f}".rstrip("0")
