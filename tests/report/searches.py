"""Episodes written by hand for the tests of figures and cards."""

from vsr1.loop import moments
from vsr1.loop.records import Cost, Episode, Run, Turn
from vsr1.loop.replies import read_reply

RUN = Run("charades", "test", "sqr", 3, 1, 42)


def turn(t, shown, gt, rank_in, verdict, span=None, out=None, truth=(2.0, 8.0), **more):
    """A turn in a video of 10 s; `out` is (rank, top-1) after the refinement."""
    word = {True: "matched", False: "not_matched", None: "perhaps"}[verdict]
    times = f" <start>{span[0]}</start> <end>{span[1]}</end>" if span else ""
    reply = read_reply(f"<think> a </think> <answer>{word}</answer>{times}", [1, 2])
    named = None if reply.span is None else moments.span_ms([min(time, 10.0) for time in reply.span])
    iou = moments.span_iou(named, moments.span_ms(truth)) if named and shown == gt else 0.0
    if out is not None:
        more |= {"refine_kind": "sqr", "refine_tokens": 8, "refine_tokens_tagged": 9, "refine_cost": Cost()}
        more |= {"rank_out": out[0], "ties_out": 0, "top1_out": out[1]}
    fields = {"reply": reply, "span_ms": named, "iou": iou, "verify_cost": Cost()} | more
    return Turn(t, shown, shown == gt, rank_in, 0, 0.5, 0.9, **fields)


def episode(key, gt, turns, stop="budget", truth=(2.0, 8.0)):
    rank = turns[0].rank_in
    return Episode(RUN, key, f"query {key}", gt, moments.span_ms(truth), rank, tuple(turns), stop, None)
