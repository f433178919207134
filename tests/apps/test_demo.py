"""The demo: its query is chosen before the policy is asked, and what it prints is true."""

import re

import pytest

from vsr1 import config
from vsr1.apps import demo
from vsr1.config import ROOT, InputError
from vsr1.models import engine


@pytest.fixture
def clone(tmp_path, monkeypatch):
    (tmp_path / "vsr1").symlink_to(ROOT / "vsr1")  # models are named relative to the clone
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path


def test_the_demo_shows_the_first_query_that_the_engine_alone_gets_wrong(clone):
    profile, said = config.load("mini"), []
    result = demo.run(profile, said.append)
    queries = demo._render(profile, clone / "runs/mini/demo/videos")  # current: nothing is rendered again
    encoder = engine.load(profile)
    names = [path.stem for path in sorted((clone / "runs/mini/demo/videos").glob("*.mp4"))]
    with demo.folder_index.video_reader.reader_for(profile) as reader:
        clips = [reader.read(clone / f"runs/mini/demo/videos/{name}.mp4") for name in names]
    vecs = encoder.embed_clips(clips)
    scores = encoder.embed_texts([query.text for query in queries]) @ vecs.T
    best = [names[row] for row in scores.argmax(axis=1)]
    wrong = next(n for n, query in enumerate(queries) if best[n] != query.video)
    query = queries[wrong]
    assert result["query"] == query.text and result["looks"][0]["video"] == f"{best[wrong]}.mp4"
    text = "\n".join(said)
    assert f"answers with {best[wrong]}; right is {query.video}" in text
    right = result["accepted"] and result["video"] == f"{query.video}.mp4"
    assert bool(re.search("That is the right film", text)) == right
    assert (clone / result["page"]).exists()


def test_the_demo_needs_the_rendered_world(clone):
    with pytest.raises(InputError, match="a demo needs the rendered world"):
        demo.run(config.load("paper"))


def test_nothing_is_shipped_of_a_run_that_was_not_trained(clone, tmp_path):
    with pytest.raises(InputError, match="not trained yet"):
        demo.ship(config.load("mini"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
