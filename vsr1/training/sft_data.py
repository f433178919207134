"""Load what stage 1 learns from, in its order, from one of three sources (docs/method.md section 5).

1. The data source itself, where it knows what its videos show: `reply_writer` (`data.source`).
2. `sft_data`: the released `train_oneturn.json`.
3. `teacher`: a file of the same layout, written by a local model. The paper's is Qwen3-VL-30B-A3B-Thinking; any
   Qwen3-VL will do.
"""

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.config import ROOT, InputError
from vsr1.data import source
from vsr1.models import search_index
from vsr1.training import common, released_replies, teacher_model
from vsr1.training.sft_examples import SFTExample, choose_examples

TEXT_ONLY_LEAD = 0.4  # ours: share of the text-only batches that come before any with a video


def reply_file(profile, dataset: str) -> Path:
    """Return the file of replies that stage 1 learns from; a teacher writes it first where none was released."""
    released = profile.sft_data and ROOT / profile.sft_data.replace("{dataset}", dataset)
    if released and released.exists():
        return released
    if profile.teacher is None:
        missing = f" ({released} is not there)" if released else ""
        raise InputError(
            f"{profile.name}: stage 1 has no replies to learn from; provide the released file (`sft_data`){missing} or "
            "a `teacher` model, or take a profile with a `world`"
        )
    return teacher_model.write(profile, dataset) / released_replies.FILE


def digest(profile, dataset: str) -> str:
    """Hash where the replies come from: the code of the data source that writes them, or the file they stand in."""
    if source.of(profile).reply_writer(profile, dataset):
        return cache.source_digest(profile.data_source)
    return cache.file_digest(reply_file(profile, dataset))


def load(profile, dataset: str, vectors: search_index.Vectors) -> list[SFTExample]:
    """Return the examples of stage 1 in their order.

    Nothing comes from validation videos. `sft_text_only_rows` examples have words in place of their video.
    """
    learn, validation = common.split_train_queries(profile, dataset)
    writer = source.of(profile).reply_writer(profile, dataset)
    if writer is not None:
        return order_batches(profile, *_written(profile, learn, vectors, *writer))
    if profile.sft_text_only_rows:
        raise InputError(
            f"{profile.name}: sft_text_only_rows: {profile.sft_text_only_rows}, but only rendered videos can be told; "
            "set it to 0"
        )
    file = reply_file(profile, dataset)
    examples = released_replies.read_released(file, learn + validation, vectors, profile.sft_negatives)
    learn_ids = {query.id for query in learn}
    return order_batches(profile, [], [row for row in examples if row.desc_id in learn_ids])


def _written(profile, queries, vectors, reply, caption):
    """Return (text-only examples, examples with a video) by a data source that knows its videos."""
    options = {"negatives": profile.sft_negatives, "seed": profile.seed}
    text_only, by_id = [], {query.id: query for query in queries}
    if profile.sft_text_only_rows:
        text_only = choose_examples(queries, vectors, reply, most=len(queries), **options)
        text_only = [replace(row, caption=caption(by_id[row.desc_id], row.shown)) for row in text_only]
    return text_only, choose_examples(queries, vectors, reply, most=profile.sft_rows, copies=True, **options)


def order_batches(profile, text_only: list[SFTExample], with_video: list[SFTExample]) -> list[SFTExample]:
    """Order `sft_text_only_rows` text-only examples and `sft_epochs` times the others, in batches of one kind.

    Each epoch has its own order. The first TEXT_ONLY_LEAD of the text-only batches come alone, then both kinds are
    interleaved evenly: training on text alone for long degraded what the policy sees.
    """
    size, seed = profile.sft_batch, profile.seed
    text_only = _batches(_shuffled(text_only, profile.sft_text_only_rows, [seed, 10]), size)
    with_video = _batches(
        _shuffled(with_video, round(profile.sft_epochs * len(with_video)), [seed, 11]), size
    )
    lead = TEXT_ONLY_LEAD if text_only else 0.0
    positions = [(n + 0.5) / len(text_only) for n in range(len(text_only))]  # in [0, 1]
    positions += [lead + (1 - lead) * (n + 0.5) / len(with_video) for n in range(len(with_video))]
    order = sorted(zip(positions, text_only + with_video, strict=True), key=lambda pair: pair[0])
    return [row for _, batch in order for row in batch]


def _batches(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _shuffled(rows, count, seed):
    """Return the first `count` rows of epochs, each of which has an order of its own."""
    orders = (np.random.default_rng([*seed, epoch]).permutation(len(rows)) for epoch in range(count))
    return [rows[row] for row in islice(chain.from_iterable(orders), count)]
