"""The mini models: how they are trained, and what the ones that ship with the package are."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open

from vsr1 import cache, config
from vsr1.data import annotations
from vsr1.evaluation import metrics
from vsr1.mini import attribute_heads, drawing, pretraining, pretraining_tasks, renderer, teacher, world
from vsr1.models import embedding, inputs, search_index

SHIPPED = ("backbone", "policy", "engine-small", "engine-large")


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
    index |= {"datasets": [], "starts": [], "timestamps": [], "scenes": []}
    with open(folder / "frames.raw", "wb") as file:
        for scene in world.make_scenes("didemo", "foundation", 12, 1):
            times = np.arange(0, scene.seconds - 1, 2.0)
            for second in times:
                which, busy = scene.moment_at(second)
                shot = drawing.draw_frame(scene.moments[which], busy, 0.3, scene.extras, 64)
                file.write(shot.tobytes())
            index["datasets"].append("didemo")
            index["starts"].append(total)
            index["timestamps"].append(times.tolist())
            index["scenes"].append(dataclasses.asdict(scene))
            total += len(times)
    cache.write_json(folder / "films.json", index)
    return pretraining_tasks.Films(folder)


def small(**knobs):
    recipe = {"steps": 4, "batch": 4, "rate": 1e-3, "frames": (4, 6), "layers": 2, "place": 0.5, "light": 0.5}
    return pretraining_tasks.PhaseConfig(
        **(recipe | {"detail": 0.1, "processes": 1, "save_every": 2} | knobs)
    )


def lesson(monkeypatch, films, recipe):
    """What a phase trains with, on a handful of films and from random weights of the recipe's seed."""
    monkeypatch.setattr(pretraining_tasks, "load_films", lambda profile: films)
    return pretraining_tasks.PretrainingTask(config.load("smoke"), recipe)


def weights(made):
    return torch.cat([weight.detach().flatten() for weight in made.model.parameters()])


@pytest.mark.parametrize("phase", ["instruct", "text"])
def test_a_killed_phase_resumes_to_the_same_weights_and_log(tmp_path, monkeypatch, group, films, phase):
    recipe, train = small(batch=6, neutral=0.5), pretraining_tasks.train

    def run(folder):
        folder.mkdir(exist_ok=True)
        work = lesson(monkeypatch, films, recipe)
        pretraining_tasks.PHASES[phase](work, recipe, folder)
        return work

    whole = run(tmp_path / "whole")

    def killed(recipe, model, losses, folder, extra=()):
        def stops(step, rng):
            if step == 3:
                raise KeyboardInterrupt
            return losses(step, rng)

        train(recipe, model, stops, folder, extra)

    monkeypatch.setattr(pretraining_tasks, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.setattr(pretraining_tasks, "train", train)
    torch.manual_seed(99)
    resumed = run(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(resumed))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    drop = [[{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs]
    assert drop[0] == drop[1] and len(drop[0]) == 4


@pytest.mark.parametrize("phase", ["see", "name", "tell", "watch", "locate", "instruct", "index"])
def test_a_phase_lowers_its_loss_on_a_handful_of_films(tmp_path, monkeypatch, group, films, phase):
    recipe = small(steps=24, batch=6, rate=3e-3, save_every=24)
    pretraining_tasks.PHASES[phase](lesson(monkeypatch, films, recipe), recipe, tmp_path)
    log = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean(log[-3:]) < 0.85 * np.mean(log[:3]), log


def test_the_text_side_learns_while_the_index_is_held_in_place(tmp_path, monkeypatch, group, films):
    """The same steps without the held clips move the video vectors several times as far."""
    vecs, recipe = {}, small(steps=10, batch=6)
    clips = [films.clip(n, 6, np.random.default_rng(n)) for n in range(12)]
    for held in (True, False):
        work = lesson(monkeypatch, films, recipe)
        before = work.engine(recipe).embed_clips(clips)
        if not held:
            monkeypatch.setattr(pretraining_tasks, "HOLD", 0.0)
        (tmp_path / str(held)).mkdir()
        pretraining_tasks.text(work, recipe, tmp_path / str(held))
        vecs[held] = 1 - (work.engine(recipe).embed_clips(clips) * before).sum(axis=1).mean()
    assert vecs[True] < vecs[False] / 2, vecs


def test_partial_captions_name_and_mistake_attributes_about_as_often_as_the_recipe_says():
    moment = world.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "garage", "night")
    rng = np.random.default_rng(0)
    texts = [
        pretraining_tasks.partial_caption(moment, small(detail=0.4, wrong=0.5), rng) for _ in range(3000)
    ]
    share = lambda word: np.mean([word in text.split("Focus")[0].lower() for text in texts])  # noqa: E731
    assert abs(share("garage") - 0.5) < 0.05 and abs(share("night") - 0.5) < 0.05
    right = 0.4 * (
        1 - 0.5 * 7 / 8
    )  # half of the colours are drawn anew, one in eight of these is right again
    assert abs(share(" shirt") - 0.4) < 0.04 and abs(share("red shirt") - right) < 0.04
    assert all("jump" in text or "umbrella" in text for text in texts)


def test_half_of_the_judged_queries_fit_and_the_rest_are_near_misses(monkeypatch, films):
    rng, fits, misses = np.random.default_rng(0), 0, []
    for _ in range(600):
        number = int(rng.integers(len(films.scenes)))
        _, moments = films.window(number, 12, rng)
        if moments:
            asked = pretraining_tasks.asked_moment(films, number, moments, rng)
            apart = teacher.differing(asked, teacher.closest(asked, moments))
            fits += not apart
            misses += [len(apart)] if apart else []
    assert abs(fits / (fits + len(misses)) - 0.5) < 0.08
    assert np.mean(np.array(misses) <= 2) > 0.5 and np.mean(np.array(misses) <= 4) > 0.8


def test_a_window_shows_the_moments_it_says_it_shows(films):
    rng = np.random.default_rng(0)
    for _ in range(100):
        number = int(rng.integers(len(films.scenes)))
        clip, moments = films.window(number, 8, rng)
        assert len(clip.frames) == len(clip.timestamps) and len(clip.frames) % 2 == 0
        at = films.timestamps[number].tolist().index(clip.timestamps[0])
        assert np.array_equal(clip.frames, films.frames[films.starts[number] + at :][: len(clip.frames)])
        for moment in moments:
            inside = [
                films.scenes[number].moment_at(t) for t in clip.timestamps if moment.start <= t < moment.end
            ]
            assert len(inside) >= 2 and all(busy for _, busy in inside) and len(set(inside)) == 1


def test_a_moment_is_placed_by_times_that_the_text_of_its_video_carries(films):
    """Read back from the text: between start and end every pair shows the moment, and the pair before does not."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        number, clip, moments = pretraining_tasks.a_window(films, 8, rng)
        times = [
            float(time) for time in re.findall(r"<([\d.]+) seconds>", inputs.video_text(clip.timestamps, 4))
        ]
        on = {time: films.scenes[number].moment_at(time) for time in times}
        for moment in moments:
            first, last = times.index(moment.start), times.index(moment.end)
            shown = {on[time] for time in times[first:last]}
            assert (
                len(shown) == 1
                and films.scenes[number].moments[shown.pop()[0]].attributes() == moment.attributes()
            )
            assert first == 0 or on[times[first - 1]] != on[times[first]]
            assert last == len(times) - 1 or on[times[last]] != on[times[first]]


def test_what_is_noted_of_each_pair_of_frames_stands_where_the_pair_ends(monkeypatch, films):
    work, rng = lesson(monkeypatch, films, small()), np.random.default_rng(0)
    prompt, _, looks, _ = pretraining_tasks.question_row(work, 8, rng)
    text = work.tokenizer.decode(prompt.ids)
    assert [look["second"] for look in looks] == [
        int(time) for time in re.findall(r"<(\d+)\.\d seconds>", text)
    ]
    assert prompt.ids.count(work.model.config.vision_end_token_id) == len(looks)
    assert [look["before"] for look in looks] == [None, *(look["action"] for look in looks[:-1])]
    heads = torch.zeros(2 * (len(attribute_heads.attribute_ids()) + 1) + attribute_heads.LAST_SECOND, 16)
    states = torch.randn(len(looks), 16)
    even, _ = attribute_heads.pair_loss(states, heads, looks)
    heads[-attribute_heads.LAST_SECOND + looks[0]["second"]] = 9 * torch.nn.functional.rms_norm(
        states[0], (16,)
    )
    better, log = attribute_heads.pair_loss(states[:1], heads, looks[:1])
    assert log["second"] == 1 and better < even


def test_the_whole_foundation_is_made_by_one_command_and_then_left_alone(tmp_path):
    """Every phase for two steps, on films of the smoke profile, as `make foundation` does it."""
    plan = yaml.safe_load((config.PACKAGE / "mini" / "recipes.yaml").read_text())
    for name, knobs in plan.items():
        knobs |= {"steps": 2, "save_every": 1, "batch": 6}
        knobs |= {} if name in ("see", "name") else {"frames": [4, 6]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    command = [sys.executable, "-m", "vsr1", "foundation", "--profile", "smoke", "--into", str(tmp_path)]
    command += ["--recipes", str(tmp_path / "two.yaml")]
    first, second = (subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True) for _ in "ab")
    assert first.returncode == 0, first.stderr[-3000:]
    made = {line.split(":")[0] for line in first.stdout.splitlines() if line.strip()}
    assert made == {name for name, knobs in plan.items() if knobs.get("ships")}, first.stdout
    for name in SHIPPED:
        facts = json.loads((tmp_path / name / "provenance.json").read_text())
        assert all(told["last"]["step"] == 1 for told in facts["phases"].values()), facts
    assert second.returncode == 0 and not second.stdout.strip(), "nothing to do"


def test_a_probe_vector_is_the_normalised_sum_of_its_attributes_rows():
    table = attribute_heads.attribute_ids()
    probe = torch.randn(len(table), 8)
    moment = world.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "garage", "night")
    rows = sum(probe[table[name, getattr(moment, name)]] for name in world.ATTRIBUTES)
    torch.testing.assert_close(attribute_heads.probe_vecs(probe, [moment])[0], rows / rows.norm())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_small_16_bit_and_says_where_it_comes_from(name):
    folder = config.PACKAGE / "mini" / "weights" / name
    assert (folder / "model.safetensors").stat().st_size <= 15e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors)
    facts = json.loads((folder / "provenance.json").read_text())
    assert 2e6 <= facts["parameters"] <= 6e6
    plan = pretraining.recipes()
    for phase, told in facts["phases"].items():
        rows = (folder / f"{phase}.jsonl").read_text().splitlines()
        assert told["last"] == json.loads(rows[-1]) and len(rows) == told["steps"] == plan[phase].steps, phase
    assert any(recipe.ships == name and phase in facts["phases"] for phase, recipe in plan.items())


def test_the_shipped_engine_finds_films_of_a_new_world_far_more_often_than_chance(tmp_path, monkeypatch):
    """From MP4 files to ranks, with the weights that ship, on scenes of a seed that nobody trained or tuned on."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    profile = config.load("smoke")
    profile = dataclasses.replace(profile, engine=str(config.PACKAGE / "mini" / "weights" / "engine-small"))
    profile = dataclasses.replace(profile, world=dataclasses.replace(profile.world, test_videos=30, seed=11))
    renderer.render(profile, "charades", ("test",))
    folder = embedding.embed_corpus(profile, "charades", "test")
    vectors, scenes = (
        search_index.load_vectors(folder),
        world.read_scenes(profile.data_dir("charades") / "corpus"),
    )
    queries = {q.id: q for q in annotations.read_fig(profile.data_dir("charades") / "corpus" / "test.jsonl")}
    column = np.array([vectors.video_ids.index(queries[number].video) for number in vectors.query_ids])
    scores = vectors.query_vecs @ vectors.video_vecs.T
    assert (
        metrics.recall_at(search_index.ranks(scores, column), 10)
        > 2.0 * 100 * 10 / len(vectors.video_ids) * 0.9
    )
    shown = [scenes[vectors.video_ids[best]].family for best in scores.argmax(axis=1)]
    right = [scenes[queries[number].video].family for number in vectors.query_ids]
    assert np.mean(np.array(shown) == np.array(right)) > 0.6, "the right family is what the coarse words find"
