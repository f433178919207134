"""Real files become the same folders as a rendered corpus: annotations, and videos by links."""

import pytest

from vsr1 import corpus, params, stages

LINE = '{{"video": "{0}", "time": [1, {1}], "desc_id": {1}, "duration": 9.0, "cog_desc": "c", "fig_desc": " f ", "fig_desc_score": 0.5}}\n'  # noqa: E501


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A profile whose `data` folder holds a Charades-FIG of three rows and two of its videos."""
    for module in (params, corpus):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    annotations, videos = (tmp_path / "data" / "charades" / name for name in ("annotations", "videos"))
    annotations.mkdir(parents=True)
    videos.mkdir()
    (annotations / "charades_fig_train.jsonl").write_text(LINE.format("AAAAA", 2))
    (annotations / "charades_fig_test.jsonl").write_text(LINE.format("BBBBB", 3) + LINE.format("CCCCC", 4))
    (videos / "AAAAA.mp4").write_bytes(b"one")
    (videos / "BBBBB.mp4").write_bytes(b"two")
    return params.load("paper")


def test_annotations_and_videos_arrive_and_a_missing_video_is_known(real):
    home = corpus.bring(real, "charades").parent
    queries = corpus.read_fig(home / "corpus" / "test.jsonl")
    assert [(query.video, query.text, query.span) for query in queries] == [
        ("BBBBB", "f", (1, 3)),
        ("CCCCC", "f", (1, 4)),
    ]
    found = corpus.find_videos(home / "videos", corpus.gallery(queries))
    assert found[0].path.read_bytes() == b"two" and found[1].path is None


def test_a_video_that_arrives_later_changes_the_stage_and_nothing_else_does(real):
    videos = corpus.bring(real, "charades")
    first = stages.stamp(videos)["key"]
    corpus.bring(real, "charades")
    assert stages.stamp(videos)["key"] == first
    (params.ROOT / "data" / "charades" / "videos" / "CCCCC.mp4").write_bytes(b"three")
    corpus.bring(real, "charades")
    assert stages.stamp(videos)["key"] != first and (videos / "CCCCC.mp4").read_bytes() == b"three"
    assert (params.ROOT / "data" / "charades" / "videos" / "AAAAA.mp4").exists(), "only links are replaced"


@pytest.mark.parametrize("absent", ["annotations/charades_fig_train.jsonl", "videos"])
def test_what_is_not_there_is_named(real, absent):
    path = params.ROOT / "data" / "charades" / absent
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(params.InputError, match=absent):
        corpus.bring(real, "charades")
