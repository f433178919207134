"""Checkpoints: saved and loaded, released ones converted, damaged ones refused."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import QUERIES, clip, random_policy
from transformers import Qwen3VLModel

from vsr1 import config
from vsr1.mini import architecture
from vsr1.models import checkpoints, prompt_text, soft_heads
from vsr1.models import policy as policies


@pytest.fixture(scope="module")
def policy():
    return random_policy()


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prompt(prompt_text.SYSTEM, query, clip(4 + 2 * n, n)) for n, query in enumerate(QUERIES)]


def profile(**changes):
    return dataclasses.replace(config.load("smoke"), **changes)


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    checkpoints.save(policy, folder)
    return folder


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


def test_a_saved_policy_comes_back_with_heads_settings_and_the_same_replies(policy, saved, prompts):
    loaded = checkpoints.load(str(saved), profile())
    assert loaded.settings == policy.settings
    for key, value in policy.heads.state_dict().items():
        assert torch.equal(loaded.heads.state_dict()[key], value)
    assert loaded.refine_token_id == policy.refine_token_id
    assert [r.ids for r in loaded.reply(prompts, max_new_tokens=5)] == [
        r.ids for r in policy.reply(prompts, max_new_tokens=5)
    ]


def test_a_base_model_has_no_heads_and_can_reply(policy, tmp_path, prompts):
    base = policies.Policy(policy.model, architecture.make_tokenizer(), None, None, 4096)
    checkpoints.save(base, tmp_path)
    loaded = checkpoints.load(str(tmp_path), profile())
    assert loaded.heads is loaded.settings is None
    reply = loaded.reply([loaded.prompt(prompt_text.SYSTEM_ZS, QUERIES[0], clip(4))], max_new_tokens=3)[0]
    assert len(reply.ids) == 3 and not reply.ended and reply.refine_context is None


def break_setting(key, value):
    def edit(folder):
        record = json.loads((folder / "vsr1.json").read_text())
        record["settings"][key] = value
        (folder / "vsr1.json").write_text(json.dumps(record))

    return edit


def change_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def drop_setting(folder, name):
    record = json.loads((folder / "vsr1.json").read_text())
    del record["settings"][name]
    (folder / "vsr1.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_setting("n_latents", 8), "vsr1.json: settings were changed after training"),
        (break_setting("n_soft", 4), "vsr1.json: settings were changed after training"),
        (lambda folder: drop_setting(folder, "carry_blocks"), "vsr1.json: settings.carry_blocks is missing"),
        (lambda folder: (folder / "vsr1.json").write_text("{"), "vsr1.json: not readable"),
        (lambda folder: (folder / "vsr1.json").unlink(), "soft-query heads but no vsr1.json that says how"),
        (change_tensors(lambda t: t.popitem()), "model.safetensors: not the file that vsr1.json was written"),
        (lambda folder: (folder / "refine.safetensors").unlink(), "refine.safetensors: not the file"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_file_and_key(saved, tmp_path, damage, message):
    folder = copy_of(saved, tmp_path)
    damage(folder)
    with pytest.raises(config.InputError) as caught:
        checkpoints.load(str(folder), profile())
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint in the released layout: one row above the base tokenizer's, heads beside the model, no json."""
    folder = tmp_path_factory.mktemp("released")
    other = random_policy(spare=1, seed=3)
    other.model.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | dict(other.heads.state_dict())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rows = [
        {"messages": [{"role": "system", "content": "The exact prompt."}, {"role": "user", "content": "x"}]}
    ] * 2
    (folder / "train_oneturn.json").write_text(json.dumps(rows))
    return folder, other


def convert(folder):
    return checkpoints.convert_released(folder, folder / "train_oneturn.json", profile())


def test_a_released_checkpoint_is_converted_and_then_loads_like_our_own(released, tmp_path, prompts):
    folder, other = released
    converted = convert(folder)
    assert converted.settings == soft_heads.Settings(system="The exact prompt.", time_axis="frame_index")
    checkpoints.save(converted, tmp_path)
    loaded = checkpoints.load(str(tmp_path), profile())
    assert loaded.settings == converted.settings
    replies = [reply.ids for reply in other.reply(prompts, max_new_tokens=5)]
    for read in (converted, loaded):
        assert all(torch.equal(read.heads.state_dict()[k], v) for k, v in other.heads.state_dict().items())
        assert [reply.ids for reply in read.reply(prompts, max_new_tokens=5)] == replies


def as_engine(folder):
    torch.manual_seed(0)
    config = architecture.make_config(architecture.make_tokenizer())
    Qwen3VLModel(config).save_pretrained(folder)


def plain_tokenizer(folder):
    architecture.make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_tensors(lambda t: t.pop("refine_projector.1.bias")),
            r'do not fit a policy of width 192: .* Missing key\(s\) in state_dict: "refine_projector.1.bias"',
        ),
        (
            change_tensors(lambda t: t.update({"refine_extra.bias": torch.zeros(2)})),
            r'Unexpected key\(s\) in state_dict: "refine_extra.bias"',
        ),
        (
            change_tensors(lambda t: t.update({"refine_projector.0.weight": torch.zeros(192, 64)})),
            r"size mismatch for refine_projector.0.weight: .*\[192, 64\].*\[192, 192\]",
        ),
        (
            change_tensors(lambda t: t["refine_projector.3.bias"].fill_(np.nan)),
            "refine_projector.3.bias holds values",
        ),
        (
            change_tensors(lambda t: t.pop("model.language_model.layers.1.mlp.up_proj.weight")),
            "tensor model.language_model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            change_tensors(lambda t: t.update({"model.language_model.norm.weight": torch.zeros(64)})),
            r"tensor model.language_model.norm.weight is \[64\], but config.json asks for \[192\]",
        ),
        (as_engine, "heads that do not fit"),
        (plain_tokenizer, r"<REFINE> encodes to \["),
        (lambda folder: (folder / "train_oneturn.json").write_text("[]"), "0 system prompts in 0 rows"),
        (
            lambda folder: (folder / "train_oneturn.json").write_text('[{"query": 1}]'),
            "no rows with messages",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64),
            "model.safetensors: not readable",
        ),
    ],
)
def test_a_damaged_released_checkpoint_is_one_line_that_names_file_and_key(
    released, tmp_path, damage, message
):
    folder = copy_of(released[0], tmp_path)
    damage(folder)
    with pytest.raises(config.InputError) as caught:
        convert(folder)
    assert re.search(message, str(caught.value)) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_released_checkpoint_does_not_load_as_a_base_model(released):
    with pytest.raises(config.InputError, match=r"soft-query heads but no vsr1\.json that"):
        checkpoints.load(str(released[0]), profile())
