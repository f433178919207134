"""What stage 1 learns from: rows with a reply, from one of three sources (METHOD.md 4 and 5).

1. `world`: a rendered corpus is told by somebody who knows what was rendered (`teacher`).
2. `sft_data`: the released `train_oneturn.json`.
3. `teacher`: a file of the same layout, written here by a local model. The paper's is Qwen3-VL-30B-A3B-Thinking; any
   Qwen3-VL will do. A row costs one reply about one video, a kill one batch of rows.
"""

import re
import warnings
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from vsr1.config import ROOT, InputError
from vsr1.data import annotations, video_reader
from vsr1.experiments.attribute_probe import moment_of
from vsr1.loop.replies import read_reply
from vsr1.mini import renderer, teacher
from vsr1.models import inputs, prompt_text, search_index
from vsr1.training import teacher_model

LEAD = 0.4  # ours: share of the rows told in words that come before any with a video
NEAR = 0.25  # ours: rows that show the wrong video most like the right one, for each row of another kind
FILE = "train_oneturn.json"  # its released name


@dataclass(frozen=True)
class SFTExample:
    """One thing to learn: a query, the video that its first search shows, and what to say about it."""

    desc_id: int
    query: str
    right: str  # video ids
    shown: str
    negatives: tuple[str, ...]  # the wrong videos that rank highest, the one shown first where it is wrong
    reply: str  # without <REFINE>
    told: str | None = None  # the video in words, for a row that is learned from without seeing it
    search: bool = True  # False: the reply only, no InfoNCE


# --- one of three sources --------------------------------------------------------------------------------------------


def source(profile, dataset: str) -> Path | None:
    """The file of replies that stage 1 learns from, written first where a teacher has to; None: a rendered corpus."""
    if profile.world is not None:
        return None
    released = profile.sft_data and ROOT / profile.sft_data.replace("{dataset}", dataset)
    if released and released.exists():
        return released
    if profile.teacher is None:
        missing = f" ({released} is not there)" if released else ""
        raise InputError(
            f"{profile.name}: stage 1 has no replies to learn from; provide the released file (`sft_data`){missing} or "
            "a `teacher` model, or take a profile with a `world`"
        )
    return teacher_model.write(profile, dataset) / FILE


def load(profile, dataset: str, vectors: search_index.Vectors) -> tuple[list[SFTExample], dict]:
    """The rows of stage 1 in their order, and notes: which file they come from and what was left out. See `source`.

    Nothing comes from videos that are held out. `sft_text_only_rows` rows are told their video instead of seeing it (`course`).
    """
    file, folder = source(profile, dataset), profile.data_dir(dataset) / "corpus"
    queries = annotations.read_fig(folder / "train.jsonl")
    learn, held = annotations.split_validation(queries, profile.val_fraction)
    if file is not None:
        if profile.sft_text_only_rows:
            raise InputError(
                f"{profile.name}: sft_text_only_rows: {profile.sft_text_only_rows}, but only rendered videos can be told; set it to 0"
            )
        rows, notes = read_released(file, queries, vectors, profile.sft_negatives)
        hidden = {query.id for query in held}
        return order_batches(profile, [], [row for row in rows if row.desc_id not in hidden]), notes
    scenes, by_id = renderer.read_scenes(folder), {query.id: query for query in learn}
    tell, caption = teller(profile, scenes), captioner(profile, scenes)
    pool = _chosen(profile, learn, vectors, tell, most=len(learn)) if profile.sft_text_only_rows else []
    pool = [replace(row, told=caption(by_id[row.desc_id], row.shown)) for row in pool]
    return order_batches(profile, pool, _chosen(profile, learn, vectors, tell, copies=True)), {}


def order_batches(profile, pool: list[SFTExample], rows: list[SFTExample]) -> list[SFTExample]:
    """`sft_text_only_rows` rows of `pool` and `sft_epochs` times `rows`, in batches of one kind; each epoch in its own order.

    The first LEAD of the told batches come alone, the rest between the others: who sees no video for long forgets how.
    """
    size = profile.sft_batch
    told = _shuffled(pool, profile.sft_text_only_rows, [profile.seed, 10])
    seen = _shuffled(rows, round(profile.sft_epochs * len(rows)), [profile.seed, 11])
    told, seen = ([some[at : at + size] for at in range(0, len(some), size)] for some in (told, seen))
    lead = LEAD if told else 0.0
    places = [(at + 0.5) / len(told) for at in range(len(told))]
    places += [lead + (1 - lead) * (at + 0.5) / len(seen) for at in range(len(seen))]
    order = sorted(zip(places, told + seen, strict=True), key=lambda pair: pair[0])
    return [row for _, batch in order for row in batch]


def _shuffled(rows, count, seed):
    orders = (np.random.default_rng([*seed, epoch]).permutation(len(rows)) for epoch in range(count))
    return [rows[at] for at in islice(chain.from_iterable(orders), count)]


def teller(profile, scenes: dict[str, renderer.Scene]):
    """`tell` of `make_rows` on a rendered corpus: the trace of somebody who knows what was rendered."""
    return lambda query, shown: teacher.verdict(moment_of(scenes, query), _seen(profile, scenes[shown]))


def captioner(profile, scenes: dict[str, renderer.Scene]):
    """caption(query, shown): what of a rendered video decides, in words: its moment closest to the query."""

    def caption(query, shown):
        closest = teacher.closest(moment_of(scenes, query), _seen(profile, scenes[shown]))
        return teacher.caption(closest, query.id % renderer.STYLES)

    return caption


def _seen(profile, scene):
    """The moments of a scene at the times that the policy sees printed between the frames (`teacher.as_told`)."""
    fps = profile.world.fps
    length = round(scene.seconds * fps) / fps
    wanted = video_reader.sample_times(length, profile.video_fps, profile.max_frames)
    times = inputs.pair_times(np.floor(wanted * fps + 1e-6) / fps).round(1)  # of the frames on screen then
    return tuple(teacher.as_told(moment, times) or moment for moment in scene.moments)


def _chosen(profile, queries, vectors, tell, most=None, copies=False):
    many = {"most": most or profile.sft_rows, "negatives": profile.sft_negatives, "seed": profile.seed}
    return make_rows(queries, vectors, tell, copies=copies, **many)


# --- which rows ------------------------------------------------------------------------------------------------------


def make_rows(
    queries, vectors: search_index.Vectors, tell, *, most: int, negatives: int | None, seed: int, copies=False
) -> list[SFTExample]:
    """At most `most` rows whose first search is right and as many where it is wrong, drawn by seed, in query order.

    tell(query, shown)  the reply to learn, without <REFINE>
    copies              some queries come once more. NEAR of all with the wrong video most like the right one: what a
                        better search shows that fails. And failed ones with the right video, until both verdicts are
                        equally often right; not to search, though, since soft tokens would copy what is shown
    """
    videos, asked = set(vectors.video_ids), set(vectors.query_ids)
    queries = [query for query in queries if query.video in videos and query.id in asked]
    first = rankings(queries, vectors, negatives)
    hit = np.array([order[0] == query.video for query, order in zip(queries, first, strict=True)], bool)
    rng, chosen = np.random.default_rng([seed, 5]), []
    for half in (np.flatnonzero(hit), np.flatnonzero(~hit)):
        chosen += rng.permutation(half)[:most].tolist()
    looks = [(at, first[at][0], True) for at in sorted(chosen)]
    if copies:
        near = sorted(rng.permutation(chosen)[: round(NEAR * len(chosen))])
        looks += [(at, nearest(queries[at].video, vectors), True) for at in near]
        failed = [at for at in chosen if not hit[at]]
        short = max(0, 2 * len(failed) - len(chosen) + len(near))
        looks += [(at, queries[at].video, False) for at in sorted(failed[:short])]
    rows = []
    for at, shown, search in looks:
        query = queries[at]
        wrong = wrong_videos(first[at], shown, query.video)
        rows.append(
            SFTExample(query.id, query.text, query.video, shown, wrong, tell(query, shown), search=search)
        )
    return rows


def nearest(video: str, vectors: search_index.Vectors) -> str:
    """The other video whose vector is closest to that of `video`."""
    column = vectors.column(video)
    alike = vectors.scores(vectors.video_vecs[column])
    alike[column] = -np.inf
    return vectors.video_ids[int(alike.argmax())]


def rankings(queries, vectors: search_index.Vectors, negatives: int | None) -> list[list[str]]:
    """The videos that rank highest for each query as typed, one more than `negatives`; equal scores in row order."""
    count = 1 + (negatives or 0)
    if len(vectors.video_ids) < count:
        raise InputError(
            f"sft_negatives: {count - 1} wrong videos asked for, but the train gallery has "
            f"{len(vectors.video_ids)} videos; lower it in the profile"
        )
    _, best = vectors.search(vectors.vecs_of([query.id for query in queries]), count)  # (Q, count)
    return [[vectors.video_ids[column] for column in order] for order in best]


def wrong_videos(order: list[str], shown: str, right: str) -> tuple[str, ...]:
    """One video less than a ranking holds: the wrong ones, the one shown first where it is wrong.

    >>> wrong_videos(["a", "b", "c"], "c", "b"), wrong_videos(["a", "b", "c"], "d", "d")
    (('c', 'a'), ('a', 'b'))
    """
    return tuple(v for v in dict.fromkeys([shown, *order]) if v != right)[: len(order) - 1]


# --- the released layout ---------------------------------------------------------------------------------------------


def to_released(row: SFTExample) -> dict:
    """A row in the released layout."""
    user = f'Query: "{row.query}"\nRetrieved video: <video>'
    said = {"system": prompt_text.SYSTEM, "user": user, "assistant": f"{row.reply} {prompt_text.REFINE}"}
    label = "pos" if row.shown == row.right else "neg"
    ids = {"video_id": row.shown, "query_pos_video_id": row.right, "top1_video_id": row.shown}
    return {
        "qid": f"{row.desc_id}_fig",
        "query": row.query,
        "messages": [{"role": role, "content": text} for role, text in said.items()],
        "videos": [row.shown],
        "meta": {"gold_label": label} | ids,
    }


def _spoken(messages):
    """What the assistant says in the last of some messages, as a string or in parts; None: nothing readable."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    text = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        text = "".join(str(part.get("text", "")) for part in text)
    return text if isinstance(text, str) and text.strip() else None


QID = re.compile(r"([0-9]+)_fig")
ENTRY = {
    "qid": ("a text like '17_fig'", lambda value: isinstance(value, str) and QID.fullmatch(value)),
    "messages": ("messages with the assistant's as the last", _spoken),
    "meta": ("an object", lambda value: isinstance(value, dict)),
}
META = {"gold_label": ("'pos' or 'neg'", lambda value: value in ("pos", "neg"))}
META |= {
    "video_id": annotations.NAME,
    "query_pos_video_id": annotations.NAME,
}  # the one shown, and the right one
CLOSING = re.compile(rf"(\s*({prompt_text.REFINE}|<\|im_end\|>))+\s*$")


def read_released(
    path: Path, queries, vectors: search_index.Vectors, negatives: int
) -> tuple[list[SFTExample], dict]:
    """All rows of a file that can be learned from here, in its order, and notes on those that cannot.

    The query is the annotation's, which has the vector. A reply has single blanks (METHOD.md 4) and no closing
    <REFINE>. The video shown need not be the one that ranks first here.
    """
    entries = annotations.parse_json(annotations.read_text(path), path)
    if not isinstance(entries, list):
        raise InputError(f"{path}: not a JSON list; take {FILE}")
    embedded, videos = set(vectors.query_ids), set(vectors.video_ids)
    known = {query.id: query for query in queries if query.id in embedded}
    rows, left = {}, []
    for number, one in enumerate(entries, 1):
        row, label = _row(one, f"{path}, row {number}")
        why = "with the qid of an earlier row" if row.desc_id in rows else _misfit(row, label, known, videos)
        if why is None:
            rows[row.desc_id] = replace(row, query=known[row.desc_id].text)
        else:
            left.append((why, one["qid"]))
    notes = {"file": Path(path).name, "rows": len(entries), "left_out": count_reasons(left)}
    told = [f"{some['rows']} {why} (first: {some['first']})" for why, some in notes["left_out"].items()]
    if not rows:
        raise InputError(
            f"{path}: none of {len(entries)} rows is of use here: {', '.join(told)}; another data set's?"
        )
    if left:
        warnings.warn(f"{path}: rows left out: {', '.join(told)}", annotations.CorpusWarning, stacklevel=2)
    first = rankings([known[number] for number in rows], vectors, negatives)
    made = [
        replace(row, negatives=wrong_videos(order, row.shown, row.right))
        for row, order in zip(rows.values(), first, strict=True)
    ]
    return made, notes


def _row(one, where):
    """(row without negatives and query, whether its label is `pos`) of an entry of a file."""
    annotations.check_object(one, ENTRY, where)
    annotations.check_object(one["meta"], META, f"{where}, meta")
    meta, reply = one["meta"], " ".join(CLOSING.sub("", _spoken(one["messages"])).split())
    number = int(QID.fullmatch(one["qid"])[1])
    row = SFTExample(number, "", meta["query_pos_video_id"], meta["video_id"], (), reply)
    return row, meta["gold_label"] == "pos"


def _misfit(row, label, known, videos):
    """Why a row cannot be learned from here; None: it can."""
    if row.desc_id not in known:
        return "with a query that is unknown here"
    if row.right not in videos or row.shown not in videos:
        return "with a video that is unknown here"
    if row.right != known[row.desc_id].video:
        return "whose right video is another one here"
    reply = read_reply(row.reply, ())
    agree = reply.matched == label == (row.shown == row.right) and (reply.span is not None or not label)
    return None if agree else "whose reply, label and videos do not agree"


def count_reasons(left: list[tuple[str, str]]) -> dict:
    """How many rows each reason left out, and the first of them, from (reason, qid) of each."""
    found = {}
    for why, name in left:
        found.setdefault(why, {"rows": 0, "first": name})["rows"] += 1
    return found
