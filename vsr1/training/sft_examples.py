"""Choose what stage 1 learns from: which queries, which video each one shows, and the negatives of InfoNCE."""

from dataclasses import dataclass

import numpy as np

from vsr1.config import InputError
from vsr1.models import search_index

NEAREST_SHARE = 0.25  # ours: examples with the nearest wrong video, for each example of another kind


@dataclass(frozen=True)
class SFTExample:
    """One thing to learn: a query, the video that its first search shows, and what to say about it."""

    desc_id: int
    query: str
    right: str  # video ids
    shown: str
    negatives: tuple[str, ...]  # the wrong videos that rank highest, the one shown first where it is wrong
    reply: str | None  # without <REFINE>; None: a padding row, which teaches nothing
    # Words that stand for the frames; None: the policy sees the video; "": it sees the query alone.
    caption: str | None = None
    contrast: bool = True  # False: the language-model loss only, no InfoNCE


def choose_examples(
    queries,
    vectors: search_index.Vectors,
    reply,
    *,
    most: int,
    negatives: int | None,
    seed: int,
    copies=False,
) -> list[SFTExample]:
    """Draw at most `most` queries whose first search is right and as many where it is wrong, in query order.

    reply(query, shown)  the reply to learn, without <REFINE>
    copies               add some queries once more. NEAREST_SHARE of all show the wrong video most like the right one:
                         that is what a better search shows when it fails. Failed queries show the right video, until
                         both verdicts are equally often right. These have no InfoNCE, for soft tokens would learn to
                         copy the video shown.
    """
    queries = [query for query in queries if vectors.has_video(query.video) and vectors.has_query(query.id)]
    top = rankings(queries, vectors, negatives)
    hit = np.array([order[0] == query.video for query, order in zip(queries, top, strict=True)], bool)
    rng, chosen = np.random.default_rng([seed, 5]), []
    for half in (np.flatnonzero(hit), np.flatnonzero(~hit)):
        chosen += rng.permutation(half)[:most].tolist()
    choices = [(row, top[row][0], True) for row in sorted(chosen)]
    if copies:
        nearest_rows = sorted(rng.permutation(chosen)[: round(NEAREST_SHARE * len(chosen))])
        choices += [(row, nearest_video(queries[row].video, vectors), True) for row in nearest_rows]
        failed = [row for row in chosen if not hit[row]]
        missing = max(0, 2 * len(failed) - len(chosen) + len(nearest_rows))
        choices += [(row, queries[row].video, False) for row in sorted(failed[:missing])]
    return [_example(queries[row], shown, top[row], reply, contrast) for row, shown, contrast in choices]


def _example(query, shown, order, reply, contrast):
    negatives = wrong_videos(order, shown, query.video)
    text = reply(query, shown)
    return SFTExample(query.id, query.text, query.video, shown, negatives, text, contrast=contrast)


def nearest_video(video: str, vectors: search_index.Vectors) -> str:
    """Find the other video whose vector is closest to that of `video`."""
    column = vectors.column(video)
    scores = vectors.scores(vectors.video_vecs[column])  # (V,)
    scores[column] = -np.inf
    return vectors.video_ids[int(scores.argmax())]


def rankings(queries, vectors: search_index.Vectors, negatives: int | None) -> list[list[str]]:
    """List the videos that rank highest for each query, one more than `negatives`; equal scores in row order.

    Raises InputError where the gallery has fewer videos.
    """
    count = 1 + (negatives or 0)
    if len(vectors.video_ids) < count:
        raise InputError(
            f"sft_negatives: {count - 1} wrong videos asked for, but the train gallery has "
            f"{len(vectors.video_ids)} videos; lower it in the profile"
        )
    _, best = vectors.search(vectors.vecs_of([query.id for query in queries]), count)  # (Q, count)
    return [[vectors.video_ids[column] for column in order] for order in best]


def wrong_videos(order: list[str], shown: str, right: str) -> tuple[str, ...]:
    """Take the wrong videos of a ranking, one fewer than it holds; the one shown comes first where it is wrong.

    >>> wrong_videos(["a", "b", "c"], "c", "b"), wrong_videos(["a", "b", "c"], "d", "d")
    (('c', 'a'), ('a', 'b'))
    """
    return tuple(v for v in dict.fromkeys([shown, *order]) if v != right)[: len(order) - 1]
