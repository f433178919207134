"""The mini models: how they are trained, and what the ones that ship with the package are."""

import dataclasses
import json
import re
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from transformers import Qwen3VLForConditionalGeneration

from benchmarks import replies as windows
from vsr1 import config
from vsr1.__main__ import app
from vsr1.data import annotations, video_reader
from vsr1.evaluation import metrics
from vsr1.loop import replies
from vsr1.mini import (
    attribute_heads,
    drawing,
    pretraining,
    pretraining_data,
    pretraining_tasks,
    renderer,
    teacher,
    world,
)
from vsr1.mini.archives import casts
from vsr1.mini.archives import teacher as archive_teacher
from vsr1.models import embedding, inputs, loading, search_index

SHIPPED = ("backbone", "policy", "policy-archives", "engine-small", "engine-large", "engine-noisy")


@pytest.fixture
def group(tmp_path):
    """A process group of one, as every training run has one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve videos of the foundation split, drawn frame by frame instead of rendered to files."""

    def drawn():
        for scene in world.make_scenes("didemo", "foundation", 12, 1):
            times = np.arange(0, scene.seconds - 1, 2.0)
            shown = [scene.moment_at(second) for second in times]
            frames = [drawing.draw_frame(scene.moments[n], on, 0.3, scene.extras, 64) for n, on in shown]
            yield "didemo", scene, video_reader.Clip(np.stack(frames), times, scene.seconds, None)

    folder = tmp_path_factory.mktemp("videos")
    pretraining_data.write_videos(folder, drawn(), 4096)
    return pretraining_data.FoundationVideos(folder)


def small(**knobs):
    recipe = {"steps": 4, "batch": 4, "rate": 1e-3, "frames": (4, 6), "layers": 2, "place": 0.5, "light": 0.5}
    return pretraining_tasks.PhaseConfig(**(recipe | {"detail": 0.1, "processes": 1} | knobs))


@pytest.fixture
def make_task(monkeypatch, videos):
    """What a phase trains with, on a handful of videos and from random weights of the recipe's seed."""
    monkeypatch.setattr(pretraining_data, "load_videos", lambda profile: videos)
    return lambda recipe: pretraining_tasks.PretrainingTask(config.load("smoke"), recipe)


FIRST_LOSSES = {  # of three steps of `small(batch=6)`; text: since its captions are true;
    # tell, compare, instruct: since every time weighs more, and a reply names one first
    "see": [2.2331, 2.2135, 2.2069],
    "name": [6.9643, 6.9166, 6.8112],
    "tell": [6.9658, 6.9285, 6.8524],
    "watch": [11.6737, 11.4782, 11.3436],
    "compare": [7.0458, 6.9557, 6.8274],
    "instruct": [7.0471, 6.9794, 6.8729],
    "locate": [13.8419, 13.608, 13.456],
    "judge": [14.0379, 13.8533, 13.7407],
    "look": [24.8647, 24.1037, 22.9918],
    "translate": [7.0294, 6.9637, 6.8614],
    "index": [1.7082, 1.3997, 1.6187],
    "text": [2.6734, 2.6216, 2.7491],
}


@pytest.mark.parametrize("phase", pretraining_tasks.PHASES)
def test_first_losses_of_a_phase_are_those_that_made_the_shipped_weights(tmp_path, group, make_task, phase):
    torch.set_num_threads(1)
    recipe = small(steps=3, batch=6, decisive=3.0, timing=2.0, wrong=0.5, neutral=0.5)
    pretraining_tasks.PHASES[phase](make_task(recipe), recipe, tmp_path)
    log = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == pytest.approx(FIRST_LOSSES[phase], abs=2e-4)


def test_the_text_side_learns_while_the_index_is_held_in_place(
    tmp_path, monkeypatch, group, videos, make_task
):
    """The same steps without the held clips move the video vectors several times as far."""
    moved, recipe = {}, small(steps=10, batch=6)
    clips = [videos.subset(n, 6, np.random.default_rng(n)) for n in range(12)]
    for held in (True, False):
        task = make_task(recipe)
        before = task.engine(recipe).embed_clips(clips)
        if not held:
            monkeypatch.setattr(pretraining_tasks, "HOLD", 0.0)
        (tmp_path / str(held)).mkdir()
        pretraining_tasks.text(task, recipe, tmp_path / str(held))
        moved[held] = 1 - (task.engine(recipe).embed_clips(clips) * before).sum(axis=1).mean()
    assert moved[True] < moved[False] / 2, moved


def test_partial_captions_name_and_mistake_attributes_about_as_often_as_the_recipe_says():
    moment = world.Moment(0, 5, "red", "blue", "jump", "umbrella", "green", "garage", "night")
    rng = np.random.default_rng(0)
    texts = [
        pretraining_data.partial_caption((moment,), small(detail=0.4, wrong=0.5), rng) for _ in range(3000)
    ]
    frequency = lambda word: np.mean([word in text.lower() for text in texts])  # noqa: E731
    assert abs(frequency("garage") - 0.5) < 0.05 and abs(frequency("night") - 0.5) < 0.05
    right = 0.4 * (
        1 - 0.5 * 7 / 8
    )  # half of the colours are drawn anew, one in eight of these is right again
    assert abs(frequency(" shirt") - 0.4) < 0.04 and abs(frequency("red shirt") - right) < 0.04
    assert all("jump" in text or "umbrella" in text for text in texts)


def test_half_of_the_judged_queries_fit_and_the_rest_are_near_misses(videos, make_task):
    examples, rng, fits, misses = make_task(small()).examples, np.random.default_rng(0), 0, []
    for _ in range(600):
        number = int(rng.integers(len(videos.scenes)))
        _, moments = videos.window(number, 12, rng)
        if moments:
            wanted = examples.query_moment(number, moments, rng)
            count = len(teacher.differing(wanted, teacher.closest(wanted, moments)))
            fits += not count
            misses += [count] if count else []
    assert abs(fits / (fits + len(misses)) - 0.5) < 0.08
    assert np.mean(np.array(misses) <= 2) > 0.5 and np.mean(np.array(misses) <= 4) > 0.8


def test_a_window_shows_the_moments_it_says_it_shows(videos):
    rng = np.random.default_rng(0)
    for _ in range(100):
        number = int(rng.integers(len(videos.scenes)))
        scene = videos.scenes[number]
        clip, moments = videos.window(number, 8, rng)
        assert len(clip.frames) == len(clip.timestamps) and len(clip.frames) % 2 == 0
        first = videos.timestamps[number].tolist().index(clip.timestamps[0])
        assert np.array_equal(clip.frames, videos.frames[videos.starts[number] + first :][: len(clip.frames)])
        for moment in moments:
            inside = [scene.moment_at(t) for t in clip.timestamps if moment.start <= t < moment.end]
            assert len(inside) >= 2 and all(active for _, active in inside) and len(set(inside)) == 1


def test_a_moment_is_placed_by_times_that_the_text_of_its_video_carries(videos, make_task):
    """Read back from the text: between start and end every pair shows the moment, and the pair before does not."""
    examples, rng = make_task(small()).examples, np.random.default_rng(0)
    for _ in range(100):
        number, clip, moments = examples.printed_window(8, rng)
        text = inputs.video_text(clip.timestamps, 4)
        times = [float(time) for time in re.findall(r"<([\d.]+) seconds>", text)]
        scene = videos.scenes[number]
        shown_at = [scene.moment_at(time) for time in times]
        for moment in moments:
            first, last = times.index(moment.start), times.index(moment.end)
            shown = set(shown_at[first:last])
            assert len(shown) == 1 and scene.moments[shown.pop()[0]].attributes() == moment.attributes()
            assert first == 0 or shown_at[first - 1] != shown_at[first]
            assert last == len(times) - 1 or shown_at[last] != shown_at[first]


def test_labels_of_a_pair_of_frames_stand_where_the_pair_ends(make_task):
    task = make_task(small())
    prompt, _, pairs, *_ = task.examples.question(8, np.random.default_rng(0))
    text = task.tokenizer.decode(prompt.ids)
    seconds = [int(time) for time in re.findall(r"<(\d+)\.\d seconds>", text)]
    assert [pair["second"] for pair in pairs] == seconds
    assert prompt.ids.count(task.model.config.vision_end_token_id) == len(pairs)
    assert [pair["before"] for pair in pairs] == [None, *(pair["action"] for pair in pairs[:-1])]
    heads = torch.zeros_like(attribute_heads.new_heads(16))
    states = torch.randn(len(pairs), 16)
    even, _ = attribute_heads.pair_loss(states, heads, pairs)
    row = pairs[0]["second"] - attribute_heads.LAST_SECOND
    heads[row] = 9 * torch.nn.functional.rms_norm(states[0], (16,))
    better, log = attribute_heads.pair_loss(states[:1], heads, pairs[:1])
    assert log["second"] == 1 and better < even


def test_looks_are_what_the_attention_pays_to_the_pairs_of_the_moment(group, make_task):
    """Computed from the kept queries and keys, and read from the whole matrix of attention."""
    recipe, rng = small(), np.random.default_rng(3)
    task = make_task(recipe)
    examples = [task.examples.judgement(6, rng, strange=1.0) for _ in range(3)]
    batch = task.collate([example.prompt for example in examples])
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    rows, columns = (ids == task.ids("-")).nonzero().T
    seen = torch.rand(ids.shape) < 0.5
    task.model.set_attn_implementation({"text_config": pretraining_tasks.KEEPING})
    loss = pretraining_tasks.AnswerLoss(task, recipe, None, task.new_heads(), lookups=True)
    with torch.no_grad():
        kept = task.model(**batch).logits
        looks = loss._looks(ids, rows, columns, seen)
        task.model.set_attn_implementation("eager")
        out = task.model(**batch, output_attentions=True)
    torch.testing.assert_close(out.logits[:, -1], kept[:, -1], atol=1e-4, rtol=1e-4)
    config = task.model.config.text_config
    heads = range(0, config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads)
    whole = out.attentions[pretraining_tasks.HALF]  # (B, heads, length, length)
    assert whole.shape[-1] == length and len(rows) >= 7 * len(examples)
    for m, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        paid = [whole[row, head, column][seen[row]].sum() for head in heads]
        torch.testing.assert_close(looks[m], torch.stack(paid), atol=1e-5, rtol=1e-4)


def test_a_strange_query_shares_at_most_what_its_moment_is_found_by_and_the_reply_says_what_is_shown(
    make_task,
):
    examples, rng, differing, kept = make_task(small()).examples, np.random.default_rng(1), [], set()
    for _ in range(20):
        example = examples.judgement(6, rng, strange=1.0)
        asked = world.Moment(**example.target)
        differing.append(len(teacher.differing(asked, example.shown)))
        kept |= set(world.ATTRIBUTES) - set(teacher.differing(asked, example.shown))
        within = [pretraining_tasks._is_within(pair, example.shown) for pair in example.pairs]
        shown = [pair for pair, inside in zip(example.pairs, within, strict=True) if inside]
        assert shown and all(pair["action"] == example.shown.action for pair in shown)
        assert shown[0]["second"] == int(example.shown.start)
    assert np.mean(differing) > 5.2, "now and then another moment of the video has something in common"
    assert {"action", "object"} <= kept


def test_what_a_reply_says_is_counted_by_what_the_window_shows(make_task):
    """The teacher's replies are right in all; one that copies the query says yes to what differs."""
    examples, rng = make_task(small()).examples, np.random.default_rng(4)
    for wrong in (False, True) * 6:
        _, asked, shown = windows._draw(examples, "didemo", wrong, rng)
        differing = teacher.differing(asked, shown)
        assert bool(differing) == wrong
        said = windows.outcomes(replies.read_reply(teacher.verdict(asked, (shown,)), ()), asked, shown)
        right = (
            [("wrong", True), ("false_yes", False), ("read", True)]
            if wrong
            else [("right", True), ("found", True)]
        )
        assert sorted(set(said)) == sorted(right)
        copied = replies.read_reply(teacher.verdict(asked, (asked,)), ())
        said = windows.outcomes(copied, asked, shown)
        if wrong:
            assert sorted(said) == sorted(
                [("wrong", False), *[("false_yes", True), ("read", False)] * len(differing)]
            )
        else:
            assert ("right", True) in said


def test_what_colours_look_like_follows_from_the_words_of_the_reply_alone(make_task):
    """The film in words names no trousers, and no cast shows the colour that train archives hold back from it."""
    task, rng, casts_seen = make_task(small()), np.random.default_rng(2), set()
    for _ in range(150):
        example = task.examples.translation(6, rng)
        text = task.tokenizer.decode(example.prompt.ids)
        prompt, reply = text.split("<|im_start|>assistant")
        assert "trousers" not in prompt
        cast = archive_teacher.read_cast(reply)
        casts_seen.add(cast)
        for name, true, seen in re.findall(r"(shirt|colour) (\w+) is ([a-z ]+)\.", reply):
            assert casts.seen_colour(true, cast) == seen, name
            assert true != casts.unseen_colour(cast)
    assert len(casts_seen) == casts.STEPS


RECIPES = """
see: {steps: 2, batch: 4, rate: 1.0e-3, frames: [2, 2], processes: 2, ships: backbone}
index-small: {start: see, steps: 2, batch: 4, rate: 1.0e-3, frames: [4, 6], layers: 2, processes: 1}
text-small: {start: index-small, steps: 2, batch: 6, rate: 1.0e-3, frames: [4, 6], processes: 1, ships: engine-small}
"""


def test_the_foundation_is_made_by_one_command_and_then_left_alone(tmp_path, monkeypatch, capsys):
    """Phases of two processes and of one, each from the weights of another, on six videos."""
    fork = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork)  # ranks that know of this test's folder
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / "few.yaml").write_text(RECIPES)
    profile = dataclasses.replace(config.load("smoke"), datasets=("charades",))
    tiny = dataclasses.replace(
        profile, world=dataclasses.replace(profile.world, foundation_videos=6, size=64)
    )
    monkeypatch.setattr(config, "load", lambda name: tiny)
    command = ["foundation", "--recipes", str(tmp_path / "few.yaml"), "--into", str(tmp_path / "made")]
    outputs = []
    for _ in range(2):
        app(command, standalone_mode=False)
        outputs.append(capsys.readouterr().out)
    assert outputs[0].count("\n") == 3 and not outputs[1], outputs
    rows = json.loads((tmp_path / "made" / "arena.json").read_text())
    assert [row["videos"] for row in rows] == list(tiny.studies.arena_videos)
    recalls = [row["r1"] for row in rows]
    assert recalls == sorted(recalls, reverse=True), "a larger gallery hides what a smaller one shows"
    assert all(row["r1"] <= row["words_r1"] and row["r1"] <= row["r10"] for row in rows)
    for name, phases in {"backbone": ["see"], "engine-small": ["text-small", "index-small"]}.items():
        facts = json.loads((tmp_path / "made" / name / "provenance.json").read_text())
        assert list(facts["phases"]) == phases, facts
        assert all(phase["last"]["step"] == 1 for phase in facts["phases"].values())
        tensors = safetensors.torch.load_file(tmp_path / "made" / name / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_recipe_names_a_phase_above_it(tmp_path):
    (tmp_path / "few.yaml").write_text(RECIPES.replace("start: see", "start: sea"))
    with pytest.raises(config.InputError, match=r"few\.yaml: index-small: start: sea is no phase above it"):
        pretraining.read_recipes(tmp_path / "few.yaml")


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
    tensors = safetensors.torch.load_file(folder / "model.safetensors").values()
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors)
    facts = json.loads((folder / "provenance.json").read_text())
    assert 2e6 <= facts["parameters"] <= 6e6
    plan = pretraining.read_recipes()
    for phase, record in facts["phases"].items():
        rows = (folder / f"{phase}.jsonl").read_text().splitlines()
        assert record["last"] == json.loads(rows[-1]) and len(rows) == record["steps"] == plan[phase].steps, (
            phase
        )
    assert any(recipe.ships == name and phase in facts["phases"] for phase, recipe in plan.items())


def test_the_shipped_policy_of_archives_translates_colours_by_the_words_of_its_reply(monkeypatch, videos):
    """What it would write behind "is", the true words before it given, on queries drawn by a seed of their own."""
    monkeypatch.setattr(pretraining_data, "load_videos", lambda profile: videos)
    task = pretraining_tasks.PretrainingTask(config.load("mini"), small())
    model, tokenizer = loading.load(Qwen3VLForConditionalGeneration, "vsr1/mini/weights/policy-archives")
    rng, right = np.random.default_rng(77), []
    for _ in range(64):
        example = task.examples.translation(2, rng)
        start = len(example.prompt.ids) - example.answer_tokens
        with torch.no_grad():
            logits = model.eval()(**task.collate([example.prompt])).logits[0]
        written = logits[start - 1 : -1].argmax(dim=-1).tolist()
        for said in re.finditer(
            r"(shirt|colour) \w+ is [a-z ]+\.", tokenizer.decode(example.prompt.ids[start:])
        ):
            first = len(tokenizer(tokenizer.decode(example.prompt.ids[start:])[: said.start()])["input_ids"])
            last = first + len(tokenizer(f" {said[0]}")["input_ids"])
            right.append(written[first:last] == example.prompt.ids[start:][first:last])
    assert len(right) == 128 and np.mean(right) > 0.95


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
