"""Write the replies of stage 1 with a local teacher model."""

import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.mini import teacher
from vsr1.models import loading, policy, search_index
from vsr1.training import sft_data

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


def teacher_prompt(row, span: tuple[float, float]) -> tuple[str, str]:
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


def ask(agent: policy.Policy, clips, spans: dict, seed: int, rows: list) -> list[dict]:
    """Rows in the released layout, each with its reply, or with why it has none: `dropped`, and what was `said`.

    The draws of a row depend on seed and row alone: the batch that it is asked in makes no difference to it.
    """
    shown = clips.get([row.shown for row in rows])
    told = [teacher_prompt(row, spans[row.desc_id]) for row in rows]
    good = [at for at, clip in enumerate(shown) if clip.problem is None]
    prompts = [agent.prompt(told[at][0], rows[at].query, shown[at]) for at in good]
    rngs = [np.random.default_rng([seed, rows[at].desc_id]) for at in good]
    how = {"max_new_tokens": LIMIT, "temperature": TEMPERATURE, "top_p": TOP_P, "rng": rngs}
    replies, made = dict(zip(good, agent.reply(prompts, **how) if good else [], strict=True)), []
    for at, row in enumerate(rows):
        if at not in replies:
            why, said = "video unreadable", shown[at].problem
        else:
            said, thought = replies[at].text, reasoning(replies[at].text)
            why = "cut off" if not replies[at].ended else "no reasoning" if thought is None else None
        if why is None:
            made.append(sft_data.to_released(replace(row, reply=f"<think> {thought} </think> {told[at][1]}")))
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
    for at in cache.progress(range(len(done), len(rows), size), what):
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
    sight = [profile.video_fps, profile.max_frames, profile.max_frame_pixels, profile.dtype]
    inputs = {
        "vectors": cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / "train").get("key"),
        "teacher": loading.version(profile.teacher),
        "knobs": [profile.sft_rows, profile.eval_batch, profile.seed, *sight],
        "code": cache.source_digest(__name__),
    }
    return cache.build(home / "traces", inputs, lambda folder: _write(profile, dataset, folder))


def _write(profile, dataset, folder):
    path = folder / "rows.jsonl"
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "train")
    rows = sft_data._chosen(profile, queries, vectors, lambda *_: "")
    agent, spans = load_teacher(profile), {query.id: query.span for query in queries}
    with video_reader.reader_pool(
        video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    ) as read:
        clips = clip_cache.ClipCache(profile.data_dir(dataset) / "videos", vectors.video_ids, read)
        asked = functools.partial(ask, agent, clips, spans, profile.seed)
        done = finish(rows, asked, profile.eval_batch, path, f"teacher {dataset}")
    kept = [one for one in done if "dropped" not in one]
    if not kept:
        raise InputError(f"{path}: {profile.teacher} gave no reasoning for any row; read there what it said")
    dropped = sft_data.count_reasons([(one["dropped"], one["qid"]) for one in done if "dropped" in one])
    notes = {"teacher": profile.teacher, "device": str(agent.model.device), "rows": len(done)}
    cache.write_json(folder / sft_data.FILE, kept)
    cache.write_json(folder / "notes.json", notes | {"dropped": dropped})


def load_teacher(profile) -> policy.Policy:
    """The teacher, dense or a mixture of experts, as a policy without heads."""
    torch.set_num_threads(profile.threads)
    device = loading.pick_device(profile.device)
    model, tokenizer = loading.load(AutoModelForImageTextToText, profile.teacher, profile.dtype, device)
    return policy.Policy(model, tokenizer, None, None, profile.max_frame_pixels)
