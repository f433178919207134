"""What stage 1 learns from: rows with a reply, from one of three sources (METHOD.md 4 and 5).

1. `world`: a rendered corpus is told by somebody who knows what was rendered (`teacher`).
2. `sft_data`: the released `train_oneturn.json`.
3. `teacher`: a file of the same layout, written here by a local model. The paper's is Qwen3-VL-30B-A3B-Thinking; any
   Qwen3-VL will do. A row costs one reply about one video, a kill one batch of rows.
"""

import functools
import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from vsr1 import corpus, engine, evaluate, frames, miniworld, policy, qwen, stages, teacher
from vsr1.episode import read_reply
from vsr1.headroom import moment_of
from vsr1.params import ROOT, InputError

LEAD = 0.4  # ours: share of the rows told in words that come before any with a video
NEAR = 0.25  # ours: rows that show the wrong video most like the right one, for each row of another kind
FILE = "train_oneturn.json"  # its released name


@dataclass(frozen=True)
class Row:
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
    return write(profile, dataset) / FILE


def load(profile, dataset: str, vectors: engine.Vectors) -> tuple[list[Row], dict]:
    """The rows of stage 1 in their order, and notes: which file they come from and what was left out. See `source`.

    Nothing comes from videos that are held out. `sft_told` rows are told their video instead of seeing it (`course`).
    """
    file, folder = source(profile, dataset), profile.runs(dataset) / "corpus"
    queries = corpus.read_fig(folder / "train.jsonl")
    learn, held = corpus.hold_out(queries, profile.held_out)
    if file is not None:
        if profile.sft_told:
            raise InputError(
                f"{profile.name}: sft_told: {profile.sft_told}, but only rendered videos can be told; set it to 0"
            )
        rows, notes = read_released(file, queries, vectors, profile.sft_negatives)
        hidden = {query.id for query in held}
        return course(profile, [], [row for row in rows if row.desc_id not in hidden]), notes
    scenes, by_id = miniworld.read_scenes(folder), {query.id: query for query in learn}
    tell, caption = teller(profile, scenes), captioner(profile, scenes)
    pool = _chosen(profile, learn, vectors, tell, most=len(learn)) if profile.sft_told else []
    pool = [replace(row, told=caption(by_id[row.desc_id], row.shown)) for row in pool]
    return course(profile, pool, _chosen(profile, learn, vectors, tell, copies=True)), {}


def course(profile, pool: list[Row], rows: list[Row]) -> list[Row]:
    """`sft_told` rows of `pool` and `sft_epochs` times `rows`, in batches of one kind; each epoch in its own order.

    The first LEAD of the told batches come alone, the rest between the others: who sees no video for long forgets how.
    """
    size = profile.sft_batch
    told = _shuffled(pool, profile.sft_told, [profile.seed, 10])
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


def teller(profile, scenes: dict[str, miniworld.Scene]):
    """`tell` of `make_rows` on a rendered corpus: the trace of somebody who knows what was rendered."""
    return lambda query, shown: teacher.verdict(moment_of(scenes, query), _seen(profile, scenes[shown]))


def captioner(profile, scenes: dict[str, miniworld.Scene]):
    """caption(query, shown): what of a rendered video decides, in words: its moment closest to the query."""

    def caption(query, shown):
        closest = teacher.closest(moment_of(scenes, query), _seen(profile, scenes[shown]))
        return teacher.caption(closest, query.id % miniworld.STYLES)

    return caption


def _seen(profile, scene):
    """The moments of a scene at the times that the policy sees printed between the frames (`teacher.as_told`)."""
    fps = profile.world.fps
    length = round(scene.seconds * fps) / fps
    wanted = frames.sample_times(length, profile.video_fps, profile.max_frames)
    times = qwen.pair_times(np.floor(wanted * fps + 1e-6) / fps).round(1)  # of the frames on screen then
    return tuple(teacher.as_told(moment, times) or moment for moment in scene.moments)


def _chosen(profile, queries, vectors, tell, most=None, copies=False):
    many = {"most": most or profile.sft_rows, "negatives": profile.sft_negatives, "seed": profile.seed}
    return make_rows(queries, vectors, tell, copies=copies, **many)


# --- which rows ------------------------------------------------------------------------------------------------------


def make_rows(
    queries, vectors: engine.Vectors, tell, *, most: int, negatives: int | None, seed: int, copies=False
) -> list[Row]:
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
        rows.append(Row(query.id, query.text, query.video, shown, wrong, tell(query, shown), search=search))
    return rows


def nearest(video: str, vectors: engine.Vectors) -> str:
    """The other video whose vector is closest to that of `video`."""
    at = vectors.video_ids.index(video)
    alike = vectors.video_vecs @ vectors.video_vecs[at]
    alike[at] = -np.inf
    return vectors.video_ids[int(alike.argmax())]


def rankings(queries, vectors: engine.Vectors, negatives: int | None) -> list[list[str]]:
    """The videos that rank highest for each query as typed, one more than `negatives`; equal scores in row order."""
    count = 1 + (negatives or 0)
    if len(vectors.video_ids) < count:
        raise InputError(
            f"sft_negatives: {count - 1} wrong videos asked for, but the train gallery has "
            f"{len(vectors.video_ids)} videos; lower it in the profile"
        )
    place = {number: at for at, number in enumerate(vectors.query_ids)}
    vecs = vectors.query_vecs[[place[query.id] for query in queries]]  # (Q, D)
    best = np.argsort(-vecs @ vectors.video_vecs.T, axis=1, kind="stable")[:, :count]
    return [[vectors.video_ids[column] for column in order] for order in best]


def wrong_videos(order: list[str], shown: str, right: str) -> tuple[str, ...]:
    """One video less than a ranking holds: the wrong ones, the one shown first where it is wrong.

    >>> wrong_videos(["a", "b", "c"], "c", "b"), wrong_videos(["a", "b", "c"], "d", "d")
    (('c', 'a'), ('a', 'b'))
    """
    return tuple(v for v in dict.fromkeys([shown, *order]) if v != right)[: len(order) - 1]


# --- the released layout ---------------------------------------------------------------------------------------------


def entry(row: Row) -> dict:
    """A row in the released layout."""
    user = f'Query: "{row.query}"\nRetrieved video: <video>'
    said = {"system": policy.SYSTEM, "user": user, "assistant": f"{row.reply} {policy.REFINE}"}
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
META |= {"video_id": corpus.NAME, "query_pos_video_id": corpus.NAME}  # the one shown, and the right one
CLOSING = re.compile(rf"(\s*({policy.REFINE}|<\|im_end\|>))+\s*$")


def read_released(path: Path, queries, vectors: engine.Vectors, negatives: int) -> tuple[list[Row], dict]:
    """All rows of a file that can be learned from here, in its order, and notes on those that cannot.

    The query is the annotation's, which has the vector. A reply has single blanks (METHOD.md 4) and no closing
    <REFINE>. The video shown need not be the one that ranks first here.
    """
    entries = corpus.parse_json(corpus.read_text(path), path)
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
    notes = {"file": Path(path).name, "rows": len(entries), "left_out": tally(left)}
    told = [f"{some['rows']} {why} (first: {some['first']})" for why, some in notes["left_out"].items()]
    if not rows:
        raise InputError(
            f"{path}: none of {len(entries)} rows is of use here: {', '.join(told)}; another data set's?"
        )
    if left:
        warnings.warn(f"{path}: rows left out: {', '.join(told)}", corpus.CorpusWarning, stacklevel=2)
    first = rankings([known[number] for number in rows], vectors, negatives)
    made = [
        replace(row, negatives=wrong_videos(order, row.shown, row.right))
        for row, order in zip(rows.values(), first, strict=True)
    ]
    return made, notes


def _row(one, where):
    """(row without negatives and query, whether its label is `pos`) of an entry of a file."""
    corpus.check_object(one, ENTRY, where)
    corpus.check_object(one["meta"], META, f"{where}, meta")
    meta, reply = one["meta"], " ".join(CLOSING.sub("", _spoken(one["messages"])).split())
    number = int(QID.fullmatch(one["qid"])[1])
    row = Row(number, "", meta["query_pos_video_id"], meta["video_id"], (), reply)
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


def tally(left: list[tuple[str, str]]) -> dict:
    """How many rows each reason left out, and the first of them, from (reason, qid) of each."""
    found = {}
    for why, name in left:
        found.setdefault(why, {"rows": 0, "first": name})["rows"] += 1
    return found


# --- a local teacher -------------------------------------------------------------------------------------------------

TEMPERATURE, TOP_P, LIMIT = 0.4, 0.9, 16384  # official; the limit holds its thinking too

# What the teacher is asked (METHOD.md 4: the content; the wording is ours).
_ANSWER = "Name only what is visible. Answer with one line that begins with `Reasoning:`."
FITS = (
    "You see a query and a video in which it comes true from {start} to {end} seconds. In one to three sentences, say "
    "why that part fits the query, by what happens when, why it does not start earlier and why it does not end later. "
    f"{_ANSWER}"
)
LACKS = (
    "You see a query and a video that does not fit it. In one or two sentences, say what the query needs and the video "
    f"lacks. {_ANSWER}"
)


def lesson(row: Row, span: tuple[float, float]) -> tuple[str, str]:
    """What the teacher is told, and the verdict that will follow its reasoning; the true span, in seconds, in both."""
    if row.shown != row.right:
        return LACKS, "<answer>not_matched</answer>"
    start, end = map(teacher.seconds, span)
    verdict = f"<answer>matched</answer> <start>{start}</start> <end>{end}</end>"
    return FITS.format(start=start, end=end), verdict


def reasoning(text: str) -> str | None:
    """What a teacher's reply says behind `Reasoning:`, on one line and without anything like a tag; None: nothing.

    >>> reasoning("Reasoning: no.</think>\\n**Reasoning:** From <b>3 s</b> on\\nit </answer>rains.")
    'From 3 s on it rains.'
    """
    found = re.search(r"(?ims)^[\s*]*reasoning[\s*]*:[\s*]*(.*)", text.rpartition("</think>")[2])
    words = re.sub(r"</?\|?\w+\|?>|[<>]", " ", found[1] if found else "")
    return " ".join(words.split()) if re.search(r"\w", words) else None


def ask(agent: policy.Policy, clips, spans: dict, seed: int, rows: list[Row]) -> list[dict]:
    """Rows in the released layout, each with its reply, or with why it has none: `dropped`, and what was `said`.

    The draws of a row depend on seed and row alone: the batch that it is asked in makes no difference to it.
    """
    shown = clips.get([row.shown for row in rows])
    told = [lesson(row, spans[row.desc_id]) for row in rows]
    good = [at for at, clip in enumerate(shown) if clip.problem is None]
    prompts = [agent.prompt(told[at][0], rows[at].query, shown[at]) for at in good]
    rngs = [np.random.default_rng([seed, rows[at].desc_id]) for at in good]
    how = {"max_new": LIMIT, "temperature": TEMPERATURE, "top_p": TOP_P, "rng": rngs}
    replies, made = dict(zip(good, agent.reply(prompts, **how) if good else [], strict=True)), []
    for at, row in enumerate(rows):
        if at not in replies:
            why, said = "video unreadable", shown[at].problem
        else:
            said, thought = replies[at].text, reasoning(replies[at].text)
            why = "cut off" if not replies[at].ended else "no reasoning" if thought is None else None
        if why is None:
            made.append(entry(replace(row, reply=f"<think> {thought} </think> {told[at][1]}")))
        else:
            made.append({"qid": f"{row.desc_id}_fig", "dropped": why, "said": said})
    return made


def finish(rows: list, ask, size: int, path: Path, what: str) -> list[dict]:
    """ask(batch) of all rows, `size` at a time, a line of `path` for each; whole batches there are not asked again."""
    path.touch()
    lines = path.read_bytes().split(b"\n")[:-1]  # a kill may have cut what follows the last line feed
    lines = lines[: len(lines) // size * size]
    os.truncate(path, sum(len(line) + 1 for line in lines))
    done = [json.loads(line) for line in lines]
    for at in stages.progress(range(len(done), len(rows), size), what):
        made = ask(rows[at : at + size])
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in made))
        done += made
    return done


def write(profile, dataset: str) -> Path:
    """The stage: `train_oneturn.json` by `profile.teacher`, in runs/<profile>/<dataset>/traces. Resumes after a kill.

    rows.jsonl  every row asked, also those without a usable reply     notes.json  how many of those there are, and why
    """
    home = profile.runs(dataset)
    sight = [profile.video_fps, profile.max_frames, profile.frame_pixels, profile.dtype]
    inputs = {
        "vectors": stages.stamp(home / "embed" / "engine" / "train").get("key"),
        "teacher": qwen.version(profile.teacher),
        "knobs": [profile.sft_rows, profile.eval_batch, profile.seed, *sight],
        "code": stages.code("traces", "policy", "qwen", "frames", "teacher"),
    }
    return stages.run(home / "traces", inputs, lambda folder: _write(profile, dataset, folder))


def _write(profile, dataset, folder):
    home, path = profile.runs(dataset), folder / "rows.jsonl"
    queries = corpus.read_fig(home / "corpus" / "train.jsonl")
    vectors = engine.load_vectors(home / "embed" / "engine" / "train")
    rows = _chosen(profile, queries, vectors, lambda *_: "")
    agent, spans = load_teacher(profile), {query.id: query.span for query in queries}
    with frames.readers(frames.Reader(profile.video_fps, profile.max_frames), profile.decoders) as read:
        clips = evaluate.Clips(home / "videos", vectors.video_ids, read)
        asked = functools.partial(ask, agent, clips, spans, profile.seed)
        done = finish(rows, asked, profile.eval_batch, path, f"teacher {dataset}")
    kept = [one for one in done if "dropped" not in one]
    if not kept:
        raise InputError(f"{path}: {profile.teacher} gave no reasoning for any row; read there what it said")
    dropped = tally([(one["dropped"], one["qid"]) for one in done if "dropped" in one])
    notes = {"teacher": profile.teacher, "device": str(agent.model.device), "rows": len(done)}
    stages.write_json(folder / FILE, kept)
    stages.write_json(folder / "notes.json", notes | {"dropped": dropped})


def load_teacher(profile) -> policy.Policy:
    """The teacher, dense or a mixture of experts, as a policy without heads."""
    torch.set_num_threads(profile.threads)
    device = qwen.pick_device(profile.device)
    model, tokenizer = qwen.load(AutoModelForImageTextToText, profile.teacher, profile.dtype, device)
    return policy.Policy(model, tokenizer, None, None, profile.frame_pixels)
