"""The demo: its query is chosen by the rule that it states, and what it prints is true."""

import re

import pytest

from vsr1 import config
from vsr1.apps import demo
from vsr1.config import ROOT, InputError
from vsr1.data import video_reader
from vsr1.models import checkpoints, engine


@pytest.fixture
def clone(tmp_path, monkeypatch):
    (tmp_path / "vsr1").symlink_to(ROOT / "vsr1")  # models are named relative to the clone
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return tmp_path


def test_the_demo_shows_the_first_wrong_film_that_the_policy_rejects(clone):
    profile, said = config.load("mini"), []
    result = demo.run(profile, said.append)
    folder = clone / "runs/mini/demo/videos"
    scenes, queries = demo.render(profile, folder)  # current: nothing is rendered again
    families = [scene.family for scene in scenes]
    assert families[::2] == families[1::2] and len(set(families)) == demo.FAMILIES
    encoder = engine.load(profile)
    names = [path.stem for path in sorted(folder.glob("*.mp4"))]
    with video_reader.reader_for(profile) as reader:
        clips = [reader.read(folder / f"{name}.mp4") for name in names]
    scores = encoder.embed_texts([query.text for query in queries]) @ encoder.embed_clips(clips).T
    best = [names[row] for row in scores.argmax(axis=1)]
    failed = [n for n, query in enumerate(queries) if best[n] != query.video]
    policy = checkpoints.load(demo.WEIGHTS, profile)
    for number in failed:  # one after the other, until a reply rejects
        clip = clips[names.index(best[number])]
        prompt = policy.prompt(policy.settings.system, queries[number].text, clip)
        (reply,) = policy.reply([prompt], max_new_tokens=profile.max_new_tokens)
        if "not_matched" in reply.text:
            break
    query, text = queries[number], "\n".join(said)
    assert result["query"] == query.text and result["looks"][0]["video"] == f"{best[number]}.mp4"
    assert f"answers {len(failed)} of them with a wrong film" in text
    assert f"answers with {best[number]}; right is {query.video}" in text
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
