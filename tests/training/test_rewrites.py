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
    said = [f"A {colour} dog." for colour in "red blue green pink black white grey brown".split()]
    written = [f"<query_update>{text}</query_update>" for text in said[:-1]] + ["nothing"]
    asked = []

    def reply(prompts, group, rng, **options):
        asked.extend(prompts)
        assert (group, options["temperature"]) == (rewrites.SAMPLES, profile.rollout_temperature)
        texts = written if len(prompts) > 1 else ["nothing"] * group
        return [SimpleNamespace(text=text, ids=[], ended=True) for _ in prompts for text in texts]

    agent = SimpleNamespace(prompt=lambda system, query: (system, query), reply=reply)
    found = rewrites.best_rewrites(profile, agent, search, vectors, rows)
    assert asked == [(prompt_text.REWRITE, text) for text in QUERIES]
    for row in rows:
        texts = rewrites.wordings(row.query)[::5] + said[:-1]
        scores = search.embed_texts(texts) @ vectors.video_vecs.T
        ranks = [(one > one[VIDEOS.index(row.right)]).sum() for one in scores]
        assert found[row.desc_id] == texts[int(np.argmin(ranks))]
    alone = rewrites.best_rewrites(profile, agent, search, vectors, rows[:1])
    assert alone[1] in rewrites.wordings(QUERIES[0]), "nothing that was sampled can be read"


def test_only_replies_that_reject_end_with_a_rewrite(tmp_path, rows):
    rows.append(dataclasses.replace(rows[1], desc_id=4, shown="", reply=""))
    (tmp_path / "rewrites.json").write_text(json.dumps({"1": "red", "2": "blue", "4": "green"}))
    made = rewrites.with_updates(rows, tmp_path)
    assert made[0] == rows[0] and made[2:] == rows[2:]
    read = replies.read_reply(made[1].reply, [], layout="hqr")
    assert (read.update, read.strict, read.matched) == ("blue", True, False)


def test_it_learns_to_write_them_in_the_prompt_that_it_is_evaluated_with(
    tmp_path, profile, search, vectors, rows
):
    agent = random_policy()
    words = Policy(agent.model, agent.tokenizer, None, None, 4096)
    rows = [rewrites.with_update(row, "A red dog.") for row in rows]
    parts = words, search, vectors, rows, Shelf(), tmp_path, "test"
    trainer = sft.make_trainer(profile, *parts, system=prompt_text.SYSTEM_HQR)
    made = trainer.data_collator([dataclasses.asdict(row) for row in rows])
    for ids, labels, row in zip(made["input_ids"], made["labels"], rows, strict=True):
        prompt = words.prompt(prompt_text.SYSTEM_HQR, row.query, Shelf().clips[row.shown])
        told = words.tokenizer(row.reply, add_special_tokens=False)["input_ids"] + [words.stop_token_id]
        whole, read = [*prompt.ids, *told], list(made["prefix"])
        assert read + ids.tolist()[len(read) - len(whole) :] == whole
        assert labels[labels != sft.IGNORED].tolist() == told
