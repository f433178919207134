"""The authors' checkpoints by name, in the layout of the hub's cache, against a computation that shares no code."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tiny import QUERIES, clip, random_engine, random_policy
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLModel

from vsr1 import __main__ as cli
from vsr1 import cache, config
from vsr1.apps import doctor, search_folder
from vsr1.data import annotations
from vsr1.loop import records, runner, sqr
from vsr1.models import checkpoints, engine, loading, search_index
from vsr1.report import results

NAME, COMMIT = "VideoSearchR1/charades-stage2", "0123456789abcdef0123456789abcdef01234567"
QUERY = QUERIES[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub that holds one released checkpoint: random weights, the released names, an engine beside."""
    home = tmp_path_factory.mktemp("hub") / f"models--{NAME.replace('/', '--')}"
    folder, other, search = home / "snapshots" / COMMIT, random_policy(spare=1, seed=3), random_engine()
    with torch.no_grad():
        for weight in other.heads.parameters():  # identities and zeros would hide what is left out
            weight += 0.2 * torch.randn(weight.shape, generator=torch.manual_seed(4))
    for owner, path in ((other, folder), (search, folder / "query_embedder")):
        owner.model.save_pretrained(path)
        owner.tokenizer.save_pretrained(path)
    tensors = load_file(folder / "model.safetensors") | dict(other.heads.state_dict())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.fixture
def profile(hub, tmp_path, monkeypatch):
    """A clone of its own with the released rows, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.parents[2]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    rows = [{"messages": [{"role": "system", "content": "The exact prompt <REFINE>."}]}] * 2
    (tmp_path / "data/charades").mkdir(parents=True)
    (tmp_path / "data/charades/rows.json").write_text(json.dumps(rows))
    return dataclasses.replace(config.load("smoke"), sft_data="data/{dataset}/rows.json")


def by_hand(folder, film, reply):
    """Soft tokens (8, D) and query vector (D,) of a reply up to its <REFINE>, by full forwards."""
    tensors, tokenizer = load_file(folder / "model.safetensors"), AutoTokenizer.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()

    def layer(kind, number, x):
        weight, bias = (tensors[f"refine_{kind}projector.{number}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, bias.shape, weight, bias) if weight.ndim == 1 else F.linear(x, weight, bias)

    project = lambda x: layer("", 3, F.gelu(layer("", 1, layer("", 0, x))))  # noqa: E731
    way_in = lambda kind, x: layer(kind, 1, layer(kind, 0, x))  # noqa: E731
    pads = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    text = (
        "<|im_start|>system\nThe exact prompt <REFINE>.<|im_end|>\n<|im_start|>user\n"
        f'Query: "{QUERY}"\nRetrieved video: <0.5 seconds>{pads}<2.5 seconds>{pads}<|im_end|>\n<|im_start|>assistant\n'
    )  # frame numbers, not the seconds of the film
    ids, pad = tokenizer(text)["input_ids"] + reply, tokenizer.convert_tokens_to_ids("<|video_pad|>")
    positions, position = [], 0
    for i, token in enumerate(ids):
        if token != pad:
            positions.append((position,) * 3)
            position += 1
        elif ids[i - 1] != pad:  # a pair of frames: one time, two rows, two columns
            positions += [(position, position + r, position + c) for r in (0, 1) for c in (0, 1)]
            position += 2
    pixels = torch.from_numpy(film.frames).permute(0, 3, 1, 2) / 127.5 - 1
    corner = [(t, 32 * i + 16 * r, 32 * j + 16 * c) for t in (0, 2) for i in (0, 1) for j in (0, 1) for r in (0, 1) for c in (0, 1)]  # fmt: skip  # noqa: E501
    patches = [pixels[t : t + 2, :, y : y + 16, x : x + 16].transpose(0, 1).flatten() for t, y, x in corner]
    video = {"pixel_values_videos": torch.stack(patches), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    outs, latents = [], []
    model.model.language_model.layers[-1].register_forward_hook(lambda _, __, out: outs.append(out))
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    for _ in range(8):
        position_ids = torch.tensor(positions + [(position + k,) * 3 for k in range(len(latents))]).T[:, None]
        post = model.model(inputs_embeds=embeds, position_ids=position_ids, **video).last_hidden_state[0, -1]
        latents.append(project(post if latents else outs[0][0, -1]))  # the first: before the final norm
        embeds = torch.cat([embeds, way_in("latent_input_", latents[-1])[None, None]], dim=1)
    search, tokenizer = (
        kind.from_pretrained(folder / "query_embedder") for kind in (Qwen3VLModel, AutoTokenizer)
    )
    head = f"<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n{QUERY}"
    head, tail = (
        search.get_input_embeddings()(torch.tensor(tokenizer(part)["input_ids"]))
        for part in (head, "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
    )
    embeds = torch.cat([head, way_in("append_input_", torch.stack(latents)), tail])[None]
    position_ids = torch.arange(embeds.shape[1]).expand(3, 1, -1)
    vec = search(inputs_embeds=embeds, position_ids=position_ids).last_hidden_state[0, -1]
    return torch.stack(latents), vec / vec.norm()


@torch.no_grad()
def test_a_released_name_gives_the_latents_and_the_query_vector_made_by_hand(hub, profile):
    """From the hub's cache through conversion to refinement, with the engine that came along."""
    search, agent = runner.load_pair(profile, runner.SYSTEMS["sqr"], NAME)
    film, reply = clip(4), [40, 41, agent.refine_token_id]
    assert search.name == agent.query_embedder and search.name.startswith(str(profile.runs("charades")))
    prompt = agent.prompt(agent.settings.system, QUERY, film)
    latents = sqr.soft_tokens(
        agent, agent.replay([prompt], [[*reply, agent.stop_token_id]]).refine_contexts, 8
    )
    wanted, vec = by_hand(hub, film, reply)
    torch.testing.assert_close(latents[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sqr.soft_query(search, agent.heads, [QUERY], latents)[0], vec, atol=1e-5, rtol=0
    )
    assert (wanted[1:] - wanted[:-1]).abs().amax(dim=1).min() > 0.05, "latents that hardly differ test little"


def test_it_is_converted_once_and_again_for_another_prompt(hub, profile, monkeypatch):
    convert, calls = checkpoints.convert_released, []
    monkeypatch.setattr(checkpoints, "convert_released", lambda *args: calls.append(1) or convert(*args))
    for _ in range(2):
        weights, system = search_folder.pick(profile, weights=NAME)
        assert system == "sqr" and checkpoints.load(weights, profile).settings.time_axis == "frame_index"
        assert checkpoints.resolve_checkpoint(f"{NAME}@{COMMIT}", profile) == weights and calls == [1]
    rows = config.ROOT / "data/charades/rows.json"
    rows.write_text(rows.read_text().replace("exact", "other"))
    assert checkpoints.load(NAME, profile).settings.system == "The other prompt <REFINE>." and calls == [1, 1]


def test_our_own_checkpoint_on_the_hub_is_loaded_with_its_heads(hub, profile):
    """A snapshot folder is where `vsr1.json` lies, not a folder that is called like the hub name."""
    home, agent = hub.parents[2] / "models--me--mine", random_policy(seed=5)
    checkpoints.save(agent, home / "snapshots" / COMMIT)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    loaded = checkpoints.load("me/mine", profile)
    for key, tensor in agent.heads.state_dict().items():
        torch.testing.assert_close(loaded.heads.state_dict()[key], tensor, atol=0, rtol=0)
    assert loaded.settings.system == agent.settings.system
    assert search_folder.pick(profile, weights="me/mine") == ("me/mine", "sqr")
    (home / "snapshots" / COMMIT / "vsr1.json").unlink()
    with pytest.raises(config.InputError, match=r"soft-query heads but no vsr1\.json"):
        checkpoints.load("me/mine", profile)


def test_sqr_without_heads_is_refused_but_for_the_untrained_control(profile):
    with pytest.raises(config.InputError, match="no soft-query heads in it, which sqr needs"):
        runner.load_pair(profile, runner.SYSTEMS["sqr"], profile.policy)
    assert runner.load_pair(profile, runner.SYSTEMS["sqr-untrained"], profile.policy)[1].heads is not None


def test_two_commits_of_one_name_are_converted_side_by_side(hub, profile):
    other = hub.parent / ("a" * 40)
    if not other.exists():
        shutil.copytree(hub, other)
    folders = [checkpoints.resolve_checkpoint(f"{NAME}@{commit}", profile) for commit in (COMMIT, "a" * 40)]
    assert folders[0] != folders[1] and all((Path(folder) / "vsr1.json").exists() for folder in folders)
    assert loading.revisions() == {f"{NAME}@{commit}": commit for commit in (COMMIT, "a" * 40)}


def test_a_name_stays_at_the_commit_of_its_first_use(hub, profile):
    """The hub moves `main` on; this clone does not, and knows what it used even where the files are gone."""
    assert loading.version(NAME) == COMMIT and loading.download(NAME) == hub
    branch = hub.parents[1] / "refs" / "main"
    branch.write_text("f" * 40)
    try:
        assert loading.version(NAME) == COMMIT and loading.download(NAME) == hub
        with pytest.raises(config.InputError, match=f"{NAME}@main: cannot fetch"):  # another name, asked anew
            loading.version(f"{NAME}@main")
    finally:
        branch.write_text(COMMIT)
    assert json.loads((config.ROOT / loading.REVISIONS).read_text()) == {NAME: COMMIT}
    assert loading.version(str(hub)) == cache.file_digest(hub)


def test_a_pin_that_another_process_wrote_meanwhile_is_kept(hub, profile, monkeypatch):
    fetch, path = loading.snapshot_download, config.ROOT / loading.REVISIONS

    def fetch_slowly(*args, **options):
        path.write_text(json.dumps({"other/model": "b" * 40}))
        return fetch(*args, **options)

    monkeypatch.setattr(loading, "snapshot_download", fetch_slowly)
    assert loading.download(NAME) == hub
    assert loading.revisions() == {"other/model": "b" * 40, NAME: COMMIT}


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        (
            "VideoSearchR1/charades-stage3",
            {},
            "no released checkpoint; there are VideoSearchR1/charades-stage1, ",
        ),
        (f"{NAME}@v9", {}, f"{NAME}@v9: cannot fetch this model: .* for the specified revision"),
        (
            "VideoSearchR1/didemo-stage2",
            {"sft_data": "data/charades/rows.json"},
            "didemo-stage2: cannot fetch",
        ),
        ("VideoSearchR1/didemo-stage2", {}, "didemo/rows.json: no rows with messages"),
        (NAME, {"sft_data": None}, "its system prompt stands in .* as `sft_data` in the profile smoke"),
        ("Qwen/no such name", {}, "Qwen/no such name: cannot fetch this model: "),
        ("/no/such/folder", {}, "^/no/such/folder: no such folder$"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(profile, name, knobs, message):
    with pytest.raises(config.InputError, match=message) as caught:
        checkpoints.load(name, dataclasses.replace(profile, **knobs))
    assert "\n" not in str(caught.value)


def test_the_command_leaves_episodes_and_the_row_of_t1(hub, profile, tmp_path, monkeypatch, capsys):
    knobs = yaml.safe_load((config.PACKAGE / "profiles" / "smoke.yaml").read_text())
    knobs |= {"sft_data": "data/{dataset}/rows.json", "engine": str(hub / "query_embedder")}
    knobs |= {"datasets": ["charades"], "max_new_tokens": 4, "max_frames": 4, "eval_batch": 5}
    knobs["world"] |= {"train_videos": 2, "test_videos": 3}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(knobs))
    options = ["--dataset", "charades", "--profile", str(tmp_path / "small.yaml")]
    for command in (["corpus", "--jobs", "1"], ["embed", "--jobs", "1"], ["evaluate", "vsr1-released"]):
        with warnings.catch_warnings(action="error", category=UserWarning):  # the engines are the same
            assert cli.main([*command, *options]) == 0, capsys.readouterr().err
    small = config.load(str(tmp_path / "small.yaml"))
    episodes = records.read_episodes(small.runs("charades") / "episodes" / "vsr1-released.jsonl")
    numbers = results.collect(small)
    row = numbers.loc["T1/charades/vsr1-released/vr@1"]
    assert row["measured"] and row["n"] == len(episodes) > 4
    assert row["value"] == pytest.approx(100 * np.mean([episode.rank_orig == 1 for episode in episodes]))
    vectors = search_index.load_vectors(small.data_dir("charades") / "embed" / "engine" / "test")
    queries = annotations.read_fig(small.data_dir("charades") / "corpus" / "test.jsonl")
    message = r"a query's vector has cosine 0\.\d+ with .*; is the profile's engine the same"
    with pytest.warns(UserWarning, match=message):
        runner.warn_engine_mismatch(engine.load(config.load("smoke")), vectors, queries)


def test_doctor_finds_weights_in_the_cache_only_at_the_commit_that_a_run_asks_for_and_only_whole(
    profile, hub
):
    assert doctor.weights(NAME).finding == "in the local hub cache"
    assert doctor.weights(f"{NAME}@{COMMIT}").status == "ok"
    index = hub / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert doctor.weights(NAME).status == "limited", "one of its files has not come yet"
    index.unlink()
    (config.ROOT / loading.REVISIONS).write_text(json.dumps({NAME: COMMIT[::-1]}))
    assert doctor.weights(NAME).finding == "not on this machine", "what is called main now is another commit"
