"""The study of archives on a handful of films: search stays inside the archive, and its parts agree with each other."""

import dataclasses

import numpy as np
import pytest

from vsr1 import config
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments.archives import learning, search, study, systems
from vsr1.mini.archives import casts, corpus
from vsr1.training import rewrites

CELL = "casts-whole"


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Four train and two test archives of six films; a few rows of each training."""
    sizes = config.ArchiveConfig(
        train_archives=4, test_archives=2, families=2, family_size=3, train_queries=1, rows=8
    )
    knobs = {"sft_batch": 4, "bootstrap_samples": 50, "max_new_tokens": 90, "lora_rank": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", tmp_path_factory.mktemp("clone"))
        patch.setattr(study.systems, "INTERVENTIONS", {"own": "", "other-archive": "", "teacher": ""})
        patch.setitem(learning.ADAPTERS, "engine", (1e-3, 1))
        loaded = config.load("archives")
        absolute = {name: str(config.PACKAGE.parent / getattr(loaded, name)) for name in ("engine", "policy")}
        yield dataclasses.replace(loaded, archives=sizes, **knobs, **absolute)


def test_ranks_are_those_of_a_matrix_product_inside_the_archive(profile):
    gallery = learning.open_gallery(profile, "casts", "test")
    truth = gallery.truth
    queries = search.sample(profile, CELL, gallery.queries, truth)
    assert {truth.cast(query) % 2 for query in queries} == {0} and len(queries) == 12
    vecs, found = gallery.typed(queries), []
    for query, vec in zip(queries, vecs, strict=True):
        own = [v for v in gallery.vectors.video_ids if truth.archive_of[v] is truth.archive_of[query.video]]
        scores = {v: float(vec @ gallery.vectors.video_vecs[gallery.vectors.column(v)]) for v in own}
        found.append(1 + sum(score > scores[query.video] for score in scores.values()))
    assert gallery.ranks(queries, vecs).tolist() == found
    assert max(found) <= 6


def test_rows_name_the_films_of_their_archive_alone_and_rewrites_name_seen_colours(profile):
    gallery = learning.open_gallery(profile, "casts", "train")
    rows = learning.make_rows(profile, gallery, gallery.queries)
    family = gallery.truth.archive_of
    assert all(
        {family[v].name for v in (row.right, row.shown, *row.negatives)} == {family[row.right].name}
        for row in rows
    )
    assert all(len(row.negatives) == 5 for row in rows)
    engine = learning.engines.load(learning.with_engine(profile))
    by_id = {query.id: query for query in gallery.queries}
    for row in learning.with_wordings(profile, engine, gallery, rows):
        if rewrites.is_rejected(row):
            query = by_id[row.desc_id]
            looks = casts.seen_colour(gallery.truth.query_moment(query).shirt, gallery.truth.cast(query))
            update = row.reply.split("<query_update>")[1]
            assert any(f"{name} shirt" in update for name in (looks, *looks.split())), (looks, update)
        else:
            assert "query_update" not in row.reply


def test_the_study_measures_a_cell_and_says_what_is_missing(profile):
    done = list(study.run(profile, [CELL], ("walkdown", "hqr", "sqr")))
    assert done
    numbers = study.read(profile.results())
    # The loop's own refinement is the intervention that changes nothing.
    episodes = {one.desc_id: one for one in systems.run(profile, CELL, "sqr")}
    found = systems.intervene(profile, CELL)
    for desc_id, rank in zip(found["ids"], found["ranks"]["own"], strict=True):
        if (after := episodes[desc_id].turns[0].rank_out) is not None:
            assert after == rank
    hits = [one.rank_orig == 1 for one in episodes.values()]
    assert numbers[f"{CELL}/typed/r1"].value == pytest.approx(100 * np.mean(hits))
    page = (profile.results() / "README.md").read_text()
    assert "MISSING" in page and "same-half" in page
    columns = [line.split(" | ")[3] for line in page.splitlines() if line.startswith("| the query as typed")]
    assert columns and "MISSING" not in columns
    assert (profile.results() / "looks.png").exists() and (profile.results() / "films.png").exists()


def test_a_prediction_comes_out_within_its_limits_or_not(monkeypatch):
    one = study.Prediction("x", f"{CELL}/sqr/r1", f"{CELL}/hqr/r1", 5, 100)
    monkeypatch.setattr(study, "PREDICTIONS", (one,))
    numbers = {f"{CELL}/sqr/r1": Estimate(50.0), f"{CELL}/hqr/r1": Estimate(46.0)}
    assert study.outcomes(numbers) == [("x", "+4.0 points", "**no**")]
    assert study.outcomes(numbers | {f"{CELL}/sqr/r1": Estimate(60.0)}) == [("x", "+14.0 points", "yes")]
    assert study.outcomes({}) == [("x", "MISSING", "—")]


def test_every_cell_has_a_corpus():
    assert {name for name, _ in corpus.CELLS.values()} == set(corpus.CASTS)
    assert set(study.TITLES) == set(corpus.CELLS)
