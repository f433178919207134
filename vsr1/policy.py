"""The agent (stub of the prompts; the module follows)."""

_JUDGE = (
    "You judge one retrieved video against a query. Inside <think> </think>, compare step by step what the query asks "
    "with what the video shows; be short and say only what is visible. "
)
SYSTEM = (
    _JUDGE
    + "If a scene fits, answer <answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end> <REFINE>. If no scene fits, "
    "answer <answer>not_matched</answer> <REFINE>; the token starts a refined search. Always end with <REFINE>. "
    "Write nothing outside the tags."
)
SYSTEM_ZS = (
    _JUDGE
    + "If a scene fits, answer <answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end>. If no scene fits, answer "
    "<answer>not_matched</answer>. Write nothing outside the tags."
)
SYSTEM_HQR = (
    _JUDGE
    + "If a scene fits, answer <answer>matched</answer> <start>SECONDS</start> <end>SECONDS</end>. If no scene fits, answer "
    "<answer>not_matched</answer> <query_update>TEXT</query_update> with a better query. Write nothing outside the tags."
)
REWRITE = (
    "The first search with this query failed. Rewrite the query so that the search engine finds the right video. "
    "Answer <query_update>TEXT</query_update>."
)
