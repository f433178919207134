"""The mini models: how they are trained, and what the ones that ship with the package are."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import engine, foundation, metrics, miniworld, params, stages

SHIPPED = ("backbone", "engine-small", "engine-large")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one, as every training run has one."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Twelve films of the foundation split, drawn frame by frame instead of filmed."""
    folder, index, total = tmp_path_factory.mktemp("films"), {"size": [64, 64]}, 0
    index |= {"datasets": [], "starts": [], "seen_at": [], "scenes": []}
    with open(folder / "frames.raw", "wb") as file:
        for scene in miniworld.write_scenes("didemo", "foundation", 12, 1):
            times = np.arange(0, scene.seconds - 1, 2.0)
            for second in times:
                which, busy = scene.on(second)
                shot = miniworld.picture("didemo", scene.moments[which], busy, 0.3, scene.extras, 64)
                file.write(shot.tobytes())
            index["datasets"].append("didemo")
            index["starts"].append(total)
            index["seen_at"].append(times.tolist())
            index["scenes"].append(dataclasses.asdict(scene))
            total += len(times)
    stages.write_json(folder / "films.json", index)
    return foundation.Films(folder)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    tokenizer = foundation.make_tokenizer(foundation.vocabulary())
    return Qwen3VLForConditionalGeneration(foundation.make_config(tokenizer)), tokenizer


def small(**knobs):
    recipe = {
        "steps": 4,
        "batch": 4,
        "rate": 1e-3,
        "frames": (4, 6),
        "layers": 2,
        "place": 0.5,
        "light": 0.5,
        "detail": 0.1,
    }
    return foundation.Recipe(**(recipe | {"processes": 1, "save_every": 2} | knobs))


def weights(made):
    return torch.cat([weight.detach().flatten() for weight in made.model.parameters()])


def test_a_killed_training_run_resumes_to_the_same_weights_and_log(
    tmp_path, monkeypatch, group, films, backbone
):
    profile, train = params.load("smoke"), foundation.train
    monkeypatch.setattr(foundation, "TEXT", (small(batch=6, neutral=0.5),))

    def run(folder):
        folder.mkdir(exist_ok=True)
        return foundation.train_engine("engine", profile, films, *backbone, small(), folder)

    whole = run(tmp_path / "whole")

    def killed(name, recipe, model, losses, folder, extra=()):
        def stops(step, rng):
            if (name, step) == phase:
                raise KeyboardInterrupt
            return losses(step, rng)

        train(name, recipe, model, stops, folder, extra)

    monkeypatch.setattr(foundation, "train", killed)
    for phase in (("engine", 3), ("text-1", 3)):  # noqa: B007  once in each: the index, then the text side
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    monkeypatch.setattr(foundation, "train", train)
    torch.manual_seed(99)
    resumed = run(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(resumed))
    logs = [(tmp_path / name / "engine.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    drop = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert drop[0] == drop[1] and len(drop[0]) == 4


def test_backbone_training_lowers_all_three_losses_on_a_handful_of_films(
    tmp_path, monkeypatch, group, films, backbone
):
    """Overfitting: what is seen, named and told must become likely."""
    for phase in ("VISION", "WORDS"):
        monkeypatch.setattr(foundation, phase, small(steps=30, batch=8, rate=2e-3))
    recipe = small(steps=20, batch=4, rate=3e-3)
    foundation.train_backbone(params.load("smoke"), films, backbone[1], recipe, tmp_path)
    for name in ("vision", "words", "backbone"):
        log = [json.loads(line)["loss"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert np.mean(log[-3:]) < 0.8 * np.mean(log[:3]), (name, log)


def test_the_text_side_learns_while_the_index_is_held_in_place(tmp_path, monkeypatch, group, films, backbone):
    """The same steps without the held clips move the video vectors several times as far."""
    model, tokenizer = backbone
    vecs = {}
    for held in (True, False):
        made = engine.Engine(params.load("smoke"), copy.deepcopy(model.model), tokenizer, "test")
        clips = [films.clip(n, 6, np.random.default_rng(n)) for n in range(12)]
        before = made.embed_clips(clips)
        if not held:
            monkeypatch.setattr(foundation, "HOLD", 0.0)
        (tmp_path / str(held)).mkdir()
        foundation.train_text_side("text", made, films, small(steps=10, batch=6), tmp_path / str(held))
        vecs[held] = 1 - (made.embed_clips(clips) * before).sum(axis=1).mean()
    assert vecs[True] < vecs[False] / 2, vecs


def test_partial_captions_name_the_extra_attributes_about_as_often_as_the_recipe_says():
    moment = miniworld.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "garage", "night")
    rng = np.random.default_rng(0)
    texts = [foundation.partial_caption(moment, small(), rng) for _ in range(2000)]
    share = lambda word: np.mean([word in text.lower() for text in texts])  # noqa: E731
    assert abs(share("garage") - 0.5) < 0.05 and abs(share("night") - 0.5) < 0.05
    assert abs(share("red shirt") - 0.1) < 0.03 and abs(share("blue trousers") - 0.1) < 0.03
    assert all("jump" in text or "umbrella" in text for text in texts)


def test_a_probe_vector_is_the_normalised_sum_of_its_attributes_rows():
    table = foundation.features()
    probe = torch.randn(len(table), 8)
    moment = miniworld.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "garage", "night")
    rows = sum(probe[table[name, getattr(moment, name)]] for name in miniworld.ATTRIBUTES)
    torch.testing.assert_close(foundation.probe_vecs(probe, [moment])[0], rows / rows.norm())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_16_bit_and_says_where_it_comes_from(name):
    folder = params.HERE / "models" / name
    assert (folder / "model.safetensors").stat().st_size <= 15e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors)
    facts = json.loads((folder / "provenance.json").read_text())
    assert 2e6 <= facts["parameters"] <= 6e6
    rows = (folder / f"{name}.jsonl").read_text().splitlines()
    assert facts["last_step"] == json.loads(rows[-1]) and len(rows) == facts["recipe"]["steps"]


def test_the_shipped_engine_finds_films_of_a_new_world_far_more_often_than_chance(tmp_path, monkeypatch):
    """From MP4 files to ranks, with the weights that ship, on scenes of a seed that nobody trained or tuned on."""
    monkeypatch.setattr(params, "ROOT", tmp_path)
    profile = params.load("smoke")
    profile = dataclasses.replace(profile, engine=str(params.HERE / "models" / "engine-small"))
    profile = dataclasses.replace(profile, world=dataclasses.replace(profile.world, test_videos=30, seed=11))
    miniworld.render(profile, "charades", ("test",))
    folder = engine.embed_corpus(profile, "charades", "test")
    vectors, scenes = engine.load_vectors(folder), miniworld.read_scenes(profile.runs("charades") / "corpus")
    queries = {
        q.id: q for q in foundation.corpus.read_fig(profile.runs("charades") / "corpus" / "test.jsonl")
    }
    column = np.array([vectors.video_ids.index(queries[number].video) for number in vectors.query_ids])
    scores = vectors.query_vecs @ vectors.video_vecs.T
    assert (
        metrics.recall_at(metrics.ranks(scores, column), 10) > 2.0 * 100 * 10 / len(vectors.video_ids) * 0.9
    )
    shown = [scenes[vectors.video_ids[best]].family for best in scores.argmax(axis=1)]
    right = [scenes[queries[number].video].family for number in vectors.query_ids]
    assert np.mean(np.array(shown) == np.array(right)) > 0.6, "the right family is what the coarse words find"
