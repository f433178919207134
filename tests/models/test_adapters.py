"""Policies kept as adapters: the same replies as the whole weights, and what cannot be kept so."""

import dataclasses
import shutil

import pytest
import torch
from tiny import QUERIES, clip, random_policy

from vsr1 import config
from vsr1.config import InputError
from vsr1.mini import architecture
from vsr1.models import adapters, checkpoints, policy, prompt_text
from vsr1.training import common

RANK = 3


@pytest.fixture(scope="module")
def profile():
    return dataclasses.replace(config.load("smoke"), device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a base policy, as the hub or the package has one."""
    folder = tmp_path_factory.mktemp("base")
    whole = random_policy()
    checkpoints.save(policy.Policy(whole.model, architecture.make_tokenizer(), None, None, 4096), folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, profile):
    """A policy in which two rounds of random adapters were merged, as two stages leave it."""
    learner = policy.new_heads(checkpoints.load(str(base), profile), random_policy().settings, 5)
    for seed in (1, 2):
        common.add_lora(learner, RANK, seed, mergers=seed == 1)
        torch.manual_seed(seed)
        for name, weight in learner.model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                weight.data += 0.02 * torch.randn_like(weight)
        learner.adapters.merge_and_unload()
        learner.adapters = None
    return learner


@pytest.fixture
def adapter_folder(trained, base, tmp_path):
    adapters.save(trained, str(base), tmp_path)
    return tmp_path


def test_adapters_give_the_weights_and_replies_of_the_whole_policy(trained, adapter_folder, base, profile):
    ranks = adapters.save(trained, str(base), adapter_folder)
    assert set(ranks.values()) == {RANK, 2 * RANK}  # mergers learn in the first round alone
    loaded = checkpoints.load(str(adapter_folder), profile)
    for name, weight in trained.model.state_dict().items():
        assert torch.allclose(loaded.model.state_dict()[name], weight, atol=2e-4), name
    for name, weight in trained.heads.state_dict().items():
        assert torch.allclose(loaded.heads.state_dict()[name], weight, rtol=1e-3, atol=1e-6), name
    prompts = [trained.prompt(prompt_text.SYSTEM, query, clip(4, n)) for n, query in enumerate(QUERIES)]
    whole, small = (speaker.reply(prompts, max_new_tokens=8) for speaker in (trained, loaded))
    assert [reply.ids for reply in whole] == [reply.ids for reply in small]
    assert loaded.settings == trained.settings
    size = sum(path.stat().st_size for path in adapter_folder.glob("*.safetensors"))
    assert size < 0.2 * (base / "model.safetensors").stat().st_size


def test_adapters_of_another_base_are_refused(adapter_folder, base, tmp_path_factory, profile):
    other = shutil.copytree(base, tmp_path_factory.mktemp("other"), dirs_exist_ok=True)
    config_file = adapter_folder / "adapter_config.json"
    config_file.write_text(config_file.read_text().replace(str(base), str(other)))
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match="made for other weights than"):
        checkpoints.load(str(adapter_folder), profile)


@pytest.mark.parametrize("part", ["norm.weight", "embed_tokens.weight", "layers.0.mlp.up_proj.weight"])
def test_what_no_adapter_can_hold_is_refused(trained, base, tmp_path, part):
    weight = next(w for name, w in trained.model.named_parameters() if name.endswith(part))
    before = weight.data.clone()
    weight.data += 0.1 * torch.randn_like(weight)
    with pytest.raises(InputError, match="such a policy is kept whole"):
        adapters.save(trained, str(base), tmp_path)
    weight.data = before
