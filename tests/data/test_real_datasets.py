"""Real files become the same folders as a rendered corpus: annotations, and videos by links."""

import csv

import pytest

from vsr1 import cache, config
from vsr1.data import annotations, real_datasets

LINE = '{{"video": "{0}", "time": [1, {1}], "desc_id": {1}, "duration": 9.0, "cog_desc": "c", "fig_desc": " f ", "fig_desc_score": 0.5}}\n'  # noqa: E501


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The `data/charades` of a profile, with a Charades-FIG of three rows and two of its videos."""
    for module in (config, real_datasets):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    annotations, videos = (tmp_path / "data" / "charades" / name for name in ("annotations", "videos"))
    annotations.mkdir(parents=True)
    videos.mkdir()
    (annotations / "charades_fig_train.jsonl").write_text(LINE.format("AAAAA", 2))
    (annotations / "charades_fig_test.jsonl").write_text(LINE.format("BBBBB", 3) + LINE.format("CCCCC", 4))
    (videos / "AAAAA.mp4").write_bytes(b"one")
    (videos / "BBBBB.mp4").write_bytes(b"two")
    return tmp_path / "data" / "charades"


@pytest.fixture
def profile(home):
    return config.load("paper")


def imported(profile):
    """The folder of links, current."""
    real_datasets.prepare(profile, "charades")
    return profile.data_dir("charades") / "videos"


def test_annotations_and_videos_arrive_and_a_missing_video_is_named(profile, capsys):
    folder = imported(profile)
    queries = annotations.read_fig(folder.parent / "corpus" / "test.jsonl")
    assert [(query.video, query.text, query.span) for query in queries] == [
        ("BBBBB", "f", (1, 3)),
        ("CCCCC", "f", (1, 4)),
    ]
    videos = annotations.find_videos(folder, annotations.gallery_ids(queries))
    assert videos[0].path.read_bytes() == b"two" and videos[1].path is None
    with open(folder / "missing.csv", newline="") as file:
        assert list(csv.reader(file)) == [["video", "split", "queries"], ["CCCCC", "test", "1"]]
    line = f"charades: 1 of 3 videos are missing (33.3%), 1 of 2 in test: {folder / 'missing.csv'}\n"
    assert capsys.readouterr().out == line


def test_a_video_that_arrives_later_changes_the_step_and_nothing_else_does(home, profile, capsys):
    videos = imported(profile)
    first = cache.metadata(videos)["key"]
    (home / "videos" / "holiday.mp4").write_bytes(b"of somebody else")
    imported(profile)
    assert cache.metadata(videos)["key"] == first
    (home / "videos" / "CCCCC.mp4").write_bytes(b"three")
    capsys.readouterr()
    imported(profile)
    assert cache.metadata(videos)["key"] != first and (videos / "CCCCC.mp4").read_bytes() == b"three"
    assert (home / "videos" / "AAAAA.mp4").exists(), "only links are replaced"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    [
        "CCCCC.MP4",
        "CCCCC.webm",
        "CCCCC.",
        "CCCCC",
        "CCCCC.mp4.webm",
        "CCCCC.qt",
        "batch 2/CCCCC.mkv",
        "test/CCCCC.m2ts",
    ],
)
def test_a_video_is_found_in_any_container_and_one_folder_down(name, home, profile, capsys):
    (home / "videos" / name).parent.mkdir(exist_ok=True)
    (home / "videos" / name).write_bytes(b"three")
    folder = imported(profile)
    assert annotations.find_videos(folder, ["CCCCC"])[0].path.read_bytes() == b"three"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name", ["CCCCC.info.json", "CCCCC.mp4.part", ".CCCCC.mp4", "ccccc.mp4", "a/b/CCCCC.mp4"]
)
def test_what_is_no_video_of_that_name_is_not_taken_for_one(name, home, profile):
    (home / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
    (home / "videos" / name).write_bytes(b"three")
    assert annotations.find_videos(imported(profile), ["CCCCC"])[0].path is None


def test_of_several_files_the_first_by_a_rule_is_taken_and_they_are_counted(home, profile):
    for name in ("CCCCC.mov", "CCCCC.qt", "later/CCCCC.mp4", "sooner/CCCCC.mkv"):
        (home / "videos" / name).parent.mkdir(exist_ok=True)
        (home / "videos" / name).write_bytes(name.encode())
    with pytest.warns(annotations.CorpusWarning, match="1 ids with several files, first taken"):
        folder = imported(profile)
    assert annotations.find_videos(folder, ["CCCCC"])[0].path.read_bytes() == b"later/CCCCC.mp4"


def test_downloads_of_activitynet_may_lack_the_mark_of_their_ids(tmp_path):
    for name in ("v_aaaaaaaaaaa.mp4", "-bbbbbbbbb_.mkv", "v_ccccccccc.mp4"):
        (tmp_path / name).write_bytes(b"")
    located = real_datasets.locate(
        tmp_path, ["v_aaaaaaaaaaa", "v_-bbbbbbbbb_", "v_v_ccccccccc", "v_dddddddddd"]
    )
    assert {id: [file.name for file in files] for id, files in located.items()} == {
        "v_aaaaaaaaaaa": ["v_aaaaaaaaaaa.mp4"],
        "v_-bbbbbbbbb_": ["-bbbbbbbbb_.mkv"],
        "v_v_ccccccccc": ["v_ccccccccc.mp4"],
    }


@pytest.mark.parametrize("absent", ["annotations/charades_fig_train.jsonl", "videos"])
def test_what_is_not_there_is_named(home, profile, absent):
    (home / absent).rename(home / "elsewhere")
    with pytest.raises(config.InputError, match=absent):
        imported(profile)


def test_a_folder_without_one_annotated_video_is_refused(home, profile):
    for file in (home / "videos").iterdir():
        file.rename(file.with_name(f"copy of {file.name}"))
    with pytest.raises(config.InputError, match=r"videos: none of the annotated videos .*: AAAAA\.mp4"):
        imported(profile)
