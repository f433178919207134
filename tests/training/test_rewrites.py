"""Rewriting in words: the best of several rewrites by plain loops, and a policy that learns to write them."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import QUERIES, VIDEOS, Shelf, random_policy

from vsr1 import config
from vsr1.loop import replies
from vsr1.models import prompt_text
from vsr1.models.policy import Policy
from vsr1.training import rewrites, sft
from vsr1.training.sft_examples import SFTExample

REPLY = "<think> does jumps - waves no. </think> <answer>not_matched</answer>"


@pytest.fixture
def profile():
    return dataclasses.replace(config.load("smoke"), sft_batch=3)


@pytest.fixture
def rows():
    shown = ("v0", "v3", "v5")  # the first is right
    return [SFTExample(n + 1, text, f"v{n}", shown[n], ("v4",), REPLY) for n, text in enumerate(QUERIES)]


def test_the_rewrite_that_the_engine_ranks_best_is_kept(profile, search, vectors, rows):
    texts_sampled = [f"A {colour} dog." for colour in "red blue green pink black white grey brown".split()]
    replies_sampled = [f"<query_update>{text}</query_update>" for text in texts_sampled[:-1]] + ["nothing"]
    prompts_asked = []

    def reply(prompts, group, rng, **options):
        prompts_asked.extend(prompts)
        assert (group, options["temperature"]) == (rewrites.SAMPLES, profile.rollout_temperature)
        texts = replies_sampled if len(prompts) > 1 else ["nothing"] * group
        return [SimpleNamespace(text=text, ids=[], ended=True) for _ in prompts for text in texts]

    agent = SimpleNamespace(prompt=lambda system, query: (system, query), reply=reply)
    best = rewrites.best_rewrites(profile, agent, search, vectors, rows)
    assert prompts_asked == [(prompt_text.REWRITE, text) for text in QUERIES]
    for row in rows:
        texts = rewrites.wordings(row.query)[::5] + texts_sampled[:-1]
        scores = search.embed_texts(texts) @ vectors.video_vecs.T
        ranks = [(row_scores > row_scores[VIDEOS.index(row.right)]).sum() for row_scores in scores]
        assert best[row.desc_id] == texts[int(np.argmin(ranks))]
    alone = rewrites.best_rewrites(profile, agent, search, vectors, rows[:1])
    assert alone[1] in rewrites.wordings(QUERIES[0]), "nothing that was sampled can be read"


def test_only_replies_that_reject_end_with_a_rewrite(tmp_path, rows):
    rows.append(dataclasses.replace(rows[1], desc_id=4, shown="", reply=""))
    (tmp_path / "rewrites.json").write_text(json.dumps({"1": "red", "2": "blue", "4": "green"}))
    updated = rewrites.with_updates(rows, tmp_path)
    assert updated[0] == rows[0] and updated[2:] == rows[2:]
    read = replies.read_reply(updated[1].reply, [], layout="hqr")
    assert (read.update, read.strict, read.matched) == ("blue", True, False)


def test_it_learns_to_write_them_in_the_prompt_that_it_is_evaluated_with(
    tmp_path, profile, search, vectors, rows
):
    agent = random_policy()
    writer = Policy(agent.model, agent.tokenizer, None, None, 4096)
    rows = [rewrites.with_update(row, "A red dog.") for row in rows]
    parts = writer, search, vectors, rows, Shelf(), tmp_path, "test"
    trainer = sft.make_trainer(profile, *parts, system=prompt_text.SYSTEM_HQR)
    batch = trainer.data_collator([dataclasses.asdict(row) for row in rows])
    for input_ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        prompt = writer.prompt(prompt_text.SYSTEM_HQR, row.query, Shelf().clips[row.shown])
        reply_ids = writer.tokenizer(row.reply, add_special_tokens=False)["input_ids"]
        reply_ids.append(writer.stop_token_id)
        whole, prefix = [*prompt.ids, *reply_ids], list(batch["prefix"])
        assert prefix + input_ids.tolist()[len(prefix) - len(whole) :] == whole
        assert labels[labels != sft.IGNORED].tolist() == reply_ids
