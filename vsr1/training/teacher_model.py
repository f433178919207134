"""Write the replies of stage 1 with a local teacher model, in the released layout."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, clip_cache
from vsr1.models import embedding, loading, policy, prompt_text, search_index
from vsr1.training import common, released_replies
from vsr1.training.sft_examples import choose_examples

TEMPERATURE, TOP_P = 0.4, 0.9  # official
MAX_NEW_TOKENS = 16384  # official; the teacher's thinking counts too

# What the teacher is asked (docs/method.md section 4: the content; the wording is ours).
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


def teacher_prompt(example, span: tuple[float, float]) -> tuple[str, str]:
    """Return the teacher's system prompt and the verdict that will follow its reasoning.

    span  the true moment in seconds; both texts name it where the video shown is right
    """
    if example.shown != example.right:
        return LACKS, "<answer>not_matched</answer>"
    start, end = map(prompt_text.seconds_text, span)
    verdict = f"<answer>matched</answer> <start>{start}</start> <end>{end}</end>"
    return FITS.format(start=start, end=end), verdict


def reasoning(text: str) -> str | None:
    """Extract what follows `Reasoning:` in a teacher's reply, on one line and without tags; None: nothing does.

    >>> reasoning("Reasoning: no.</think>\\n**Reasoning:** From <b>3 s</b> on\\nit </answer>rains.")
    'From 3 s on it rains.'
    """
    match = re.search(r"(?ims)^[\s*]*reasoning[\s*]*:[\s*]*(.*)", text.rpartition("</think>")[2])
    thought = re.sub(r"</?\|?\w+\|?>|[<>]", " ", match[1] if match else "")
    return " ".join(thought.split()) if re.search(r"\w", thought) else None


def ask(teacher: policy.Policy, clips, spans: dict, seed: int, examples: list) -> list[dict]:
    """Ask the teacher about examples; return one entry of the released layout each, or why it has none.

    An entry without a usable reply has `dropped`, the reason, and `said`, the teacher's text. The random draws of an
    example depend on seed and example alone, not on its batch.
    """
    shown = clips.get([example.shown for example in examples])
    prompts = [teacher_prompt(example, spans[example.desc_id]) for example in examples]
    readable = [row for row, clip in enumerate(shown) if clip.problem is None]
    replies = (
        teacher.reply(
            [teacher.prompt(prompts[row][0], examples[row].query, shown[row]) for row in readable],
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            rng=[np.random.default_rng([seed, examples[row].desc_id]) for row in readable],
        )
        if readable
        else []
    )
    entries = [
        _dropped(example, "video unreadable", clip.problem)
        for example, clip in zip(examples, shown, strict=True)
    ]
    for row, reply in zip(readable, replies, strict=True):
        entries[row] = _entry(examples[row], reply, prompts[row][1])
    return entries


def _entry(example, reply, verdict):
    thought = reasoning(reply.text)
    if not reply.ended or thought is None:
        return _dropped(example, "no reasoning" if reply.ended else "cut off", reply.text)
    return released_replies.to_released(replace(example, reply=f"<think> {thought} </think> {verdict}"))


def _dropped(example, reason, text):
    return {"qid": f"{example.desc_id}_fig", "dropped": reason, "said": text}


def finish(examples: list, ask, size: int, path: Path, label: str) -> list[dict]:
    """Return ask(batch) of all examples, `size` at a time; whole batches in the log at `path` are not asked again.

    label  names the run in the progress bar
    """
    log = cache.JsonlLog(path)
    log.truncate(len(log.rows) // size * size)
    for start in cache.progress(range(len(log.rows), len(examples), size), label):
        log.append(*ask(examples[start : start + size]))
    return log.rows


def write(profile, dataset: str) -> Path:
    """Write `train_oneturn.json` with `profile.teacher` into the step `traces`, whose folder is returned.

    rows.jsonl  the entry of every example, also without a usable reply, and why it has none
    """
    vectors = embedding.embed_corpus(profile, dataset, "train")
    inputs = {
        "vectors": cache.metadata(vectors)["key"],
        "teacher": loading.version(profile.teacher),
        "knobs": profile.sft_rows,
        "sight": {knob: getattr(profile, knob) for knob in common.VISION_KNOBS},
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_write, profile, dataset, vectors)
    return cache.build(profile.runs(dataset) / "traces", inputs, work)


def _write(profile, dataset, vectors, folder):
    path, vectors = folder / "rows.jsonl", search_index.load_vectors(vectors)
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
    options = {"negatives": profile.sft_negatives, "seed": profile.seed}
    examples = choose_examples(queries, vectors, lambda *_: "", most=profile.sft_rows, **options)
    teacher, spans = load_teacher(profile), {query.id: query.span for query in queries}
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        ask_batch = functools.partial(ask, teacher, clips, spans, profile.seed)
        entries = finish(examples, ask_batch, profile.eval_batch, path, f"teacher {dataset}")
    usable = [entry for entry in entries if "dropped" not in entry]
    if not usable:
        raise InputError(f"{path}: {profile.teacher} gave no reasoning for any row; read there what it said")
    cache.write_json(folder / released_replies.FILE, usable)


def load_teacher(profile) -> policy.Policy:
    """Load the teacher, dense or a mixture of experts, as a policy without heads."""
    torch.set_num_threads(profile.threads)
    device = loading.pick_device(profile.device)
    model, tokenizer = loading.load(AutoModelForImageTextToText, profile.teacher, profile.dtype, device)
    return policy.Policy(model, tokenizer, None, None, profile.max_frame_pixels)
