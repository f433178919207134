"""Released weights search the released vectors, on files of the published layout with vectors of the mini engine."""

import dataclasses
import json

import numpy as np
import pytest

from vsr1 import config
from vsr1.data import annotations, official_release, real_datasets, video_reader
from vsr1.data.video_writer import write_video
from vsr1.evaluation import evaluate, released_gallery, run_batches
from vsr1.models import engine, search_index

TEXTS = {1: "A person waves.", 2: "A dog jumps.", 3: "A red ball rolls."}
FILMS = ["BBBBB", "AAAAA"]  # the order of rows in the release


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Charades with two films and three queries, one of them about a film that nobody has."""
    weights = str(config.ROOT / config.load("smoke").engine)
    for module in (config, real_datasets, official_release):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    home = tmp_path / "data" / "charades"
    (home / "annotations").mkdir(parents=True)
    (home / "videos").mkdir()
    videos = dict(zip(TEXTS, ("AAAAA", "BBBBB", "CCCCC"), strict=True))
    seconds = {"AAAAA": 4.0, "BBBBB": 12.5, "CCCCC": 4.0}  # of BBBBB another cut was annotated
    queries = [
        annotations.Query(n, text, videos[n], (0.0, 1.0), "c", seconds[videos[n]])
        for n, text in TEXTS.items()
    ]
    for name in annotations.FILES["charades"]:
        annotations.write_fig(home / "annotations" / name, queries)
    for seed, name in enumerate(FILMS):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        write_video(home / "videos" / f"{name}.mp4", noise.repeat(8, 1).repeat(8, 2), 2)
    knobs = {name: getattr(config.load("smoke"), name) for name in ("max_frame_pixels", "dtype")}
    knobs |= {"engine": weights, "engine_max_pixels": None, "engine_min_pixels": 0, "engine_clock": "true"}
    knobs |= {"engine_video_pixels": None, "engine_frame_multiple": 0, "datasets": ("charades",)}
    return dataclasses.replace(config.load("paper"), **knobs)


@pytest.fixture
def released(profile):
    """Vectors of the mini engine where those of the release lie."""
    home, search_engine = config.ROOT / "data/charades", engine.load(profile)
    paths = [config.ROOT / "data/charades" / name for name in official_release.vector_files("test")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with video_reader.reader_for(profile) as reader:
        videos = search_engine.embed_clips([reader.read(home / "videos" / f"{name}.mp4") for name in FILMS])
    np.save(paths[0], search_engine.embed_texts(list(TEXTS.values())))
    paths[1].write_text("".join(json.dumps({"qid": f"{n}_fig"}) + "\n" for n in TEXTS))
    np.save(paths[2], videos)
    paths[3].write_text(json.dumps({name: row for row, name in enumerate(FILMS)}))
    return videos


def test_they_are_what_is_searched_and_our_own_are_compared_with_them(profile, released, capsys):
    folder = released_gallery.find(profile, "charades")
    vectors = search_index.load_vectors(folder)
    assert vectors.video_ids == FILMS and vectors.query_ids == list(TEXTS)
    np.testing.assert_array_equal(vectors.video_vecs, released)
    np.testing.assert_array_equal(vectors.search(released, 1)[1], [[0], [1]])
    notes = json.loads((folder / "notes.json").read_text())
    assert notes == {"videos": [1.0, 1.0], "queries": [1.0, 1.0, 1.0]}
    line = "charades: released vectors are searched; cosine of our own with them: videos 1.000 to 1.000, "
    assert line in capsys.readouterr().out
    other = dataclasses.replace(profile, engine_clock="official", engine_min_pixels=16384)
    other_notes = json.loads((released_gallery.find(other, "charades") / "notes.json").read_text())
    assert max(other_notes["videos"]) < 0.9999 and other_notes["queries"] == notes["queries"], (
        "stamps and sizes count"
    )


def test_only_released_weights_search_them_and_only_where_they_are(profile, released, monkeypatch):
    searched = []

    def run(profile, run, system, weights, vectors, count, first, looks, folder):
        searched.append(vectors.relative_to(profile.data_dir("charades")).as_posix())
        (folder / run_batches.EPISODES).touch()

    monkeypatch.setattr(run_batches, "run", run)
    monkeypatch.setattr(evaluate.checkpoints, "resolve_checkpoint", lambda *_: profile.engine)
    evaluate.run_system(profile, "charades", "vsr1-released")
    with pytest.warns(annotations.CorpusWarning, match="1 videos are of another length than annotated"):
        evaluate.run_system(profile, "charades", "zs")
    lengths = (profile.data_dir("charades") / "embed/engine/test/lengths.csv").read_text().splitlines()
    assert lengths[1:] == ["BBBBB,12.5,4.0"]
    unused_release = dataclasses.replace(profile, search_released_vectors=False)
    evaluate.run_system(unused_release, "charades", "vsr1-released")
    assert searched == ["embed/released/test", "embed/engine/test", "embed/engine/test"]
    (config.ROOT / "data/charades" / official_release.vector_files("test")[2]).unlink()
    assert released_gallery.find(profile, "charades") is None
