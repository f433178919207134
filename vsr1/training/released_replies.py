"""Read and write replies in the layout of the released `train_oneturn.json` (docs/method.md section 8)."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field

from vsr1.config import InputError
from vsr1.data import annotations
from vsr1.loop.replies import read_reply
from vsr1.models import prompt_text, search_index
from vsr1.training.sft_examples import SFTExample, rankings, wrong_videos

FILE = "train_oneturn.json"  # its released name
CLOSING = re.compile(rf"(\s*({prompt_text.REFINE}|<\|im_end\|>))+\s*$")


def to_released(example: SFTExample) -> dict:
    """Write one example as an entry of the released layout."""
    user = f'Query: "{example.query}"\nRetrieved video: <video>'
    texts = {"system": prompt_text.SYSTEM, "user": user, "assistant": f"{example.reply} {prompt_text.REFINE}"}
    label = "pos" if example.shown == example.right else "neg"
    ids = {"video_id": example.shown, "query_pos_video_id": example.right, "top1_video_id": example.shown}
    return {
        "qid": f"{example.desc_id}_fig",
        "query": example.query,
        "messages": [{"role": role, "content": text} for role, text in texts.items()],
        "videos": [example.shown],
        "meta": {"gold_label": label} | ids,
    }


def _assistant_text(messages: list) -> str:
    """Return the text of the last message, which must be the assistant's: a string, or parts to be joined."""
    last = messages[-1] if messages else None
    text = last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        text = "".join(str(part.get("text", "")) for part in text)
    if not (isinstance(text, str) and text.strip()):
        raise ValueError("the last message must be a text of the assistant's")
    return text


class Meta(BaseModel, strict=True):
    """What an entry says of its videos."""

    gold_label: Literal["pos", "neg"]
    video_id: annotations.Name  # the video shown
    query_pos_video_id: annotations.Name  # the right one


class Entry(BaseModel, strict=True):
    """One entry of the file, as far as it is used. `messages` keeps the assistant's text alone."""

    qid: Annotated[str, Field(pattern=r"^[0-9]+_fig$")]  # like '17_fig'
    messages: Annotated[list, AfterValidator(_assistant_text)]
    meta: Meta

    def example(self) -> SFTExample:
        """Return the example without query and negatives, its reply with single blanks and no closing <REFINE>."""
        reply = " ".join(CLOSING.sub("", self.messages).split())
        number = int(self.qid.removesuffix("_fig"))
        return SFTExample(number, "", self.meta.query_pos_video_id, self.meta.video_id, (), reply)


def read_released(
    path: Path, queries, vectors: search_index.Vectors, negatives: int | None
) -> list[SFTExample]:
    """Return all examples of a file that can be learned from here, in its order, and warn of those that cannot.

    The query's text is the annotation's, whose vector is known. The video shown need not rank first here.
    """
    entries = annotations.parse_json(annotations.read_text(path), path, kind=list[Entry])
    by_id = {query.id: query for query in queries if vectors.has_query(query.id)}
    examples, rejected = {}, []
    for entry in entries:
        example = entry.example()
        problem = "with the qid of an earlier row" if example.desc_id in examples else None
        problem = problem or _problem(example, entry.meta.gold_label == "pos", by_id, vectors)
        if problem is None:
            examples[example.desc_id] = replace(example, query=by_id[example.desc_id].text)
        else:
            rejected.append((problem, entry.qid))
    _warn_left_out(path, rejected, len(entries))
    top = rankings([by_id[number] for number in examples], vectors, negatives)
    return [
        replace(example, negatives=wrong_videos(order, example.shown, example.right))
        for example, order in zip(examples.values(), top, strict=True)
    ]


def _problem(example, labelled_right, queries, vectors):
    """Say why an example cannot be learned from here, given {id: query}; None: it can."""
    if example.desc_id not in queries:
        return "with a query that is unknown here"
    if not (vectors.has_video(example.right) and vectors.has_video(example.shown)):
        return "with a video that is unknown here"
    if example.right != queries[example.desc_id].video:
        return "whose right video is another one here"
    reply = read_reply(example.reply, ())
    agree = reply.matched == labelled_right == (example.shown == example.right)
    agree = agree and (reply.span is not None or not labelled_right)
    return None if agree else "whose reply, label and videos do not agree"


def _warn_left_out(path, rejected, num_entries):
    """Say why rows are left out and which is the first, from (reason, qid) of each; that all are is an error."""
    qids = {}
    for problem, qid in rejected:
        qids.setdefault(problem, []).append(qid)
    counts = ", ".join(f"{len(rows)} {problem} (first: {rows[0]})" for problem, rows in qids.items())
    if len(rejected) == num_entries:
        raise InputError(f"{path}: none of {num_entries} rows is of use here: {counts}; another data set's?")
    if rejected:
        warnings.warn(f"{path}: rows left out: {counts}", annotations.CorpusWarning, stacklevel=3)
