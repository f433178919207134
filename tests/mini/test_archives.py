"""Archives: what queries ask for is there once, casts can be undone, and splits share nothing."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from vsr1 import config
from vsr1.data import annotations, video_reader
from vsr1.mini.archives import casts, corpus, source, teacher
from vsr1.mini.world import COLOURS

PROFILE = config.load("archives")
SPLITS = [(name, split) for name in corpus.CASTS for split in corpus.SPLITS]


def archives_of(name, split, profile=PROFILE):
    return corpus.make_archives(profile.archives, name, split, profile.world.seed)


def small(root, monkeypatch):
    """A profile of three archives a split, rendered below `root`."""
    monkeypatch.setattr(config, "ROOT", root)
    sizes = config.ArchiveConfig(train_archives=3, test_archives=3, families=2, family_size=3)
    return dataclasses.replace(PROFILE, archives=sizes)


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_one_film_of_the_archive_fits_a_query(name, split):
    """By what the query says, in true colours, and by what the camera makes of it: no two films look the same."""
    for archive in archives_of(name, split):
        for scenes in (archive.scenes, archive.seen_scenes()):
            attributes = [tuple(getattr(s.moments[0], n) for n in corpus.NAMED) for s in scenes]
            assert len(set(attributes)) == len(attributes) == 72
    queries = corpus.make_queries(archives_of(name, split), 0, 2, 7)
    assert len({(query.text, query.video) for query in queries}) == len(queries)


@pytest.mark.parametrize("cast", range(casts.STEPS))
def test_a_cast_is_undone_by_what_remains_of_the_circle(cast):
    for colour in casts.CIRCLE:
        seen = casts.seen_colour(colour, cast)
        assert casts.seen_colour(seen, casts.STEPS - cast) == colour
        assert (seen in COLOURS) == (cast % 2 == 0), "whole steps end at a name, half steps between two"
    assert casts.cast_of(casts.seen_colour(casts.KNOWN, cast)) == cast
    assert len({casts.seen_colour(colour, cast) for colour in casts.CIRCLE}) == 6


def test_paints_are_those_of_the_world_and_half_way_between():
    assert all(casts.PAINTS[name] == COLOURS[name] for name in casts.CIRCLE)
    for position in range(1, casts.STEPS, 2):
        ends = [COLOURS[casts.NAMES[(position + step) % casts.STEPS]] for step in (-1, 1)]
        assert np.abs(np.mean(ends, axis=0) - casts.PAINTS[casts.NAMES[position]]).max() < 1


@pytest.mark.parametrize("name", list(corpus.CASTS))
def test_no_archive_and_no_film_is_in_two_splits(name):
    splits = [archives_of(name, split) for split in corpus.SPLITS]
    names, films, appearances = ([set() for _ in splits] for _ in range(3))
    for number, archives in enumerate(splits):
        names[number] = {archive.name for archive in archives}
        films[number] = {scene.video for archive in archives for scene in archive.scenes}
        appearances[number] = {str((s.extras, s.moments)) for archive in archives for s in archive.scenes}
        assert len(films[number]) == 72 * len(archives)
    for parts in (names, films, appearances):
        assert not parts[0] & parts[1]


def test_train_archives_hold_no_combination_that_is_kept_for_test():
    train, test = archives_of("casts", "train"), archives_of("casts", "test")
    unseen = lambda archives: [casts.is_unseen(s.moments[0], a.cast) for a in archives for s in a.scenes]  # noqa: E731
    assert not any(unseen(train))
    assert 0.25 < np.mean(unseen(test)) < 0.36
    assert Counter(a.cast for a in train) == dict.fromkeys(range(12), 2)
    assert Counter(a.cast for a in test) == dict.fromkeys(range(12), 2)


def test_test_films_are_the_same_under_every_camera():
    """So cells are compared on the same queries: those of half steps follow those of whole steps."""
    truth = lambda archive: [(s.extras, s.moments) for s in archive.scenes]  # noqa: E731
    whole = [truth(archive) for archive in archives_of("same-whole", "test")]
    assert whole == [truth(archive) for archive in archives_of("same-half", "test")]
    assert whole * 2 == [truth(archive) for archive in archives_of("casts", "test")]


def test_there_are_as_many_queries_as_the_study_needs():
    for name in corpus.CASTS:
        assert len(archives_of(name, "train")) * 72 * PROFILE.archives.train_queries >= 3000
        assert len(archives_of(name, "test")) >= 12
        assert 12 * 72 >= 600


def test_the_film_shows_the_colours_that_the_teacher_names(tmp_path, monkeypatch):
    """Read back from the MP4 file: the trousers are in the colour that the cast makes of red, and the reply says so."""
    profile = small(tmp_path, monkeypatch)
    source.prepare(profile, "casts")
    truth = source.Truth(profile, "casts")
    queries = annotations.read_fig(profile.data_dir("casts") / "corpus" / "test.jsonl")
    assert len(queries) == 6 * 6
    assert set(truth.archive_of) == set(source.families(profile, "casts"))
    videos = profile.data_dir("casts") / "videos"
    for query in queries[::5]:
        reply = truth.reply(query, query.video)
        assert teacher.read_cast(reply) == truth.cast(query)
        assert "matched" in reply and "not_matched" not in reply
        other = next(s.video for s in truth.archive_of[query.video].scenes if s.video != query.video)
        assert "not_matched" in truth.reply(query, other)
        with video_reader.reader_for(profile) as reader:
            clip = reader.read(videos / f"{query.video}.mp4")
        if truth.query_moment(query).light == "day":
            paint = np.array(casts.PAINTS[casts.seen_colour(casts.KNOWN, truth.cast(query))])
            near = np.abs(clip.frames[1].astype(int) - paint).max(axis=-1) < 30
            assert near.sum() > 40, (query.video, paint)


def test_the_corpus_of_another_name_is_refused_in_one_line():
    with pytest.raises(
        config.InputError, match="no corpus charades of archives; `make archives` makes same-whole"
    ):
        source.prepare(PROFILE, "charades")
