"""The rendered corpora: what the annotations promise is what the films show."""

import dataclasses
import hashlib
from itertools import pairwise

import numpy as np
import pytest

from vsr1 import cache, config
from vsr1.data import annotations, video_reader
from vsr1.mini import captions, drawing, renderer, teacher, world
from vsr1.mini.world import ATTRIBUTES

DATASETS = config.DATASETS
GOLDEN = {  # of scenes, queries, texts of the teacher, frames, and one file
    "charades": ["d16574e3c6df", "29745547bc27", "1b1aad439fa6", "0df3b9534f99", "8b14baff31ea"],
    "didemo": ["c047abeb8eb7", "4a2f49b12634", "23a57d7012b5", "cd723c9d5d6d", "d3404e3f6830"],
    "activitynet": ["2b928241e992", "ffcb1b911ca7", "784b9dd4a0ce", "03c325e29005", "5a396e97894e"],
}


def scenes_of(dataset, split, count=160):
    return world.make_scenes(dataset, split, count, config.load("mini").world.seed)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_exactly_one_video_of_the_gallery_fits_each_fine_query(dataset, split):
    world = config.load("mini").world
    scenes = scenes_of(dataset, split, getattr(world, f"{split}_videos"))
    fitting, queried = (
        {},
        annotations.evenly_spaced(scenes, world.queried_videos if split == "test" else None),
    )
    for scene in scenes:
        for moment in scene.moments:
            fitting.setdefault(moment.attributes(), set()).add(scene.video)
    assert all(len(videos) == 1 for videos in fitting.values())
    rng = np.random.default_rng(0)
    queries = captions.make_queries(queried, 0, {"train": 2, "test": 1}[split], rng)
    assert len(queries) >= {"train": 3000, "test": 400}[split]
    assert len(scenes) >= {"train": 600, "test": 1000}[split]
    assert len({scene.family for scene in queried}) >= 100


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_scene_of_one_split_is_in_another(dataset):
    """Neither its id nor its extras, which all of a family have: so no family is in two splits either."""
    sizes, values_before = config.load("mini").world, set()
    for split in world.SPLITS:
        scenes = scenes_of(dataset, split, getattr(sizes, f"{split}_videos"))
        values = {scene.video for scene in scenes} | {str(scene.extras) for scene in scenes}
        assert not values & values_before
        assert len({str(scene.extras) for scene in scenes}) == len({scene.family for scene in scenes})
        values_before |= values


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", ["test", "foundation"])
def test_members_of_a_family_differ_in_one_attribute_of_every_moment(dataset, split):
    scenes = scenes_of(dataset, split)
    families, differing = {}, set()
    for scene in scenes:
        families.setdefault(scene.family, []).append(scene)
        for name in ("action", "object"):  # each moment stands alone
            assert len({getattr(moment, name) for moment in scene.moments}) == len(scene.moments)
    assert any(len(family) > 1 for family in families.values())
    for first, *others in families.values():
        for other in others:
            for a, b in zip(first.moments, other.moments, strict=True):
                names = [name for name in ATTRIBUTES if getattr(a, name) != getattr(b, name)]
                assert len(names) == 1 and (a.start, a.end) == (b.start, b.end)
                differing.update(names)
    assert differing == set(world.DIFFERING[split])


@pytest.mark.parametrize("dataset", DATASETS)
def test_some_test_queries_ask_for_a_combination_that_no_train_video_shows(dataset):
    shown = {
        split: [moment for scene in scenes_of(dataset, split, 400) for moment in scene.moments]
        for split in ("train", "test")
    }
    combinations = {(moment.object, moment.colour) for moment in shown["train"]}
    unseen = [(moment.object, moment.colour) not in combinations for moment in shown["test"]]
    assert unseen == [moment.is_unseen() for moment in shown["test"]] and 0.05 < np.mean(unseen) < 0.2


@pytest.mark.parametrize("dataset", DATASETS)
def test_spans_have_the_character_of_their_data_set(dataset):
    for scene in scenes_of(dataset, "train"):
        spans = [(moment.start, moment.end) for moment in scene.moments]
        assert all(0 <= start < end <= scene.seconds for start, end in spans)
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "moments overlap"
        if dataset == "charades":
            assert 24 <= scene.seconds <= 37 and 2 <= len(spans) <= 3
        elif dataset == "didemo":
            assert 25 <= scene.seconds <= 50 and all(t % 5 == 0 for span in spans for t in span)
        else:
            assert 60 <= scene.seconds <= 180 and len(spans) >= 2


def test_a_fine_caption_names_every_attribute_and_a_coarse_one_only_two():
    scene = scenes_of("charades", "test")[0]
    for moment in scene.moments:
        for style in range(captions.STYLES):
            fine = captions.caption(moment, style)
            named = (moment.shirt + " shirt", moment.trousers + " trousers", moment.place, moment.object)
            named += (moment.colour, captions.ACTIONS[moment.action], captions.LIGHTS[moment.light])
            assert all(word.lower() in fine.lower() for word in named), fine
            coarse = captions.caption(moment, style, ("action", "object"))
            assert not any(word in coarse for word in (moment.place, "shirt", "trousers")), coarse


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_attribute_changes_the_picture_enough_for_the_models_to_see(attribute):
    """Frames as the mini models get them, 64 x 64: the smallest change moves at least 20 pixels by a visible amount."""
    scene = scenes_of("didemo", "test")[0]
    moment = scene.moments[0]
    frame = lambda m: drawing.draw_frame(m, True, 0.2, scene.extras, 128)[::2, ::2].astype(int)  # noqa: E731
    pictures = {
        value: frame(dataclasses.replace(moment, **{attribute: value}))
        for value in world.values(attribute, "didemo")
    }
    for a in pictures:
        for b in pictures:
            assert a == b or (np.abs(pictures[a] - pictures[b]).max(axis=2) > 20).sum() >= 20, (a, b)


@pytest.mark.parametrize("dataset", DATASETS)
def test_scenes_texts_pixels_and_files_are_those_of_the_committed_results(dataset, tmp_path):
    """Digests of GOLDEN: after a change on purpose, every result of the mini profile is to be renewed."""
    scenes = world.make_scenes(dataset, "test", 12, 1)
    queries = captions.make_queries(scenes, 3, 2, np.random.default_rng([1, 3]))
    rng, texts, frames = np.random.default_rng(2), [], []
    for scene in scenes:
        shown = scenes[int(rng.integers(len(scenes)))]
        for moment in scene.moments:
            texts += [teacher.verdict(moment, shown.moments), teacher.verdict(moment, scene.moments)]
            texts += [teacher.rewrite(moment, None, rng), *teacher.question(moment, rng)]
    for number, name in enumerate(ATTRIBUTES):
        scene = scenes[number]
        for value in world.values(name, dataset):
            moment = dataclasses.replace(scene.moments[0], **{name: value})
            frames += [drawing.draw_frame(moment, True, phase, scene.extras, 64) for phase in (0.1, 0.8)]
        frames.append(drawing.draw_frame(moment, False, 0.5, scene.extras, 64))
    renderer.render_video(scenes[3], tmp_path / "a.mp4", 64, 4)
    parts = repr(scenes), repr(queries), "".join(texts), np.stack(frames), (tmp_path / "a.mp4").read_bytes()
    parts = [part.encode() if isinstance(part, str) else part for part in parts]
    assert [hashlib.sha256(part).hexdigest()[:12] for part in parts] == GOLDEN[dataset]


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_film_shows_what_the_scene_says_when_it_says(dataset, tmp_path):
    """Decoded frames against pictures drawn for the moment on at that second; H.264 costs a few grey levels."""
    scene = scenes_of(dataset, "test")[3]
    renderer.render_video(scene, tmp_path / "film.mp4", 128, 8)
    clip = video_reader.Reader().read(tmp_path / "film.mp4")
    assert clip.problem is None and abs(clip.seconds - scene.seconds) < 0.13
    busy = 0
    for pixels, second in zip(clip.frames, clip.timestamps, strict=True):
        on = [moment for moment in scene.moments if moment.start <= second < moment.end]
        next_up = on or [moment for moment in scene.moments if second < moment.end] or [scene.moments[-1]]
        phase = round(second * 8) % drawing.PHASES / drawing.PHASES
        drawn = drawing.draw_frame(next_up[0], bool(on), phase, scene.extras, 128)
        assert np.abs(pixels.astype(int) - drawn.astype(int)).mean() < 8, second
        busy += bool(on)
    assert busy >= 2 * len(scene.moments), "every moment must be seen in at least a pair of frames"


def test_render_writes_fig_files_and_a_killed_rendering_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    profile = config.load("smoke")
    small = dataclasses.replace(
        profile, world=dataclasses.replace(profile.world, train_videos=3, test_videos=2)
    )
    folder = renderer.render(small, "charades")
    files = {path.name: path.read_bytes() for path in folder.glob("*.mp4")}
    queries = annotations.read_fig(folder.parent / "corpus" / "test.jsonl")
    assert {f"{query.video}.mp4" for query in queries} <= set(files) and len(files) == 5
    cache.write_json(folder / ".step.json", {"key": "of another world"})
    folder.rename(folder.with_name("videos.partial"))
    key = cache.fingerprint({"not": "this"})
    assert cache.metadata(folder.with_name("videos.partial"))["key"] != key
    again = renderer.render(small, "charades")
    assert {path.name: path.read_bytes() for path in again.glob("*.mp4")} == files
    more = dataclasses.replace(small, world=dataclasses.replace(small.world, foundation_videos=99))
    keys = [cache.metadata(renderer.render(run, "charades"))["key"] for run in (small, more)]
    assert keys[0] == keys[1], "films of pretraining are no part of it"
