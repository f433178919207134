"""The study of archives on a handful of films: search stays inside the archive, and its parts agree with each other."""

import dataclasses
import json
import re

import numpy as np
import pytest

from vsr1 import config
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments.archives import cards, headroom, learning, pages, search, study, systems
from vsr1.mini.archives import casts, corpus, teacher
from vsr1.training import rewrites

CELL = "casts-whole"


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Four train and two test archives of six films; a few rows of each training."""
    sizes = config.ArchiveConfig(
        train_archives=4, test_archives=2, families=2, family_size=3, train_queries=1, rows=8
    )
    knobs = {
        "sft_batch": 4,
        "bootstrap_samples": 50,
        "max_new_tokens": 90,
        "lora_rank": 4,
        "sft_text_only_rows": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", tmp_path_factory.mktemp("clone"))
        patch.setattr(
            study.systems, "INTERVENTIONS", {"own": "", "other-archive": "", "other-reply": "", "teacher": ""}
        )
        patch.setattr(study.systems, "IN_WORDS", ("own", "other-archive"))
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


def test_text_only_rows_say_in_words_what_a_film_shows(profile):
    gallery = learning.open_gallery(profile, "casts", "train")
    truth, by_id = gallery.truth, {query.id: query for query in gallery.queries}
    some = dataclasses.replace(profile, sft_text_only_rows=12)
    rows = learning.make_rows(some, gallery, gallery.queries)
    text_only = [row for row in rows if row.caption is not None]
    assert len(text_only) == 12 and len(rows) == 12 + 8 and rows[0].caption
    assert all(row.caption is None for row in learning.make_rows(profile, gallery, gallery.queries))
    for row in text_only:
        assert row.reply == truth.reply(by_id[row.desc_id], row.shown)
        assert f"{truth.shown_moment(row.shown).trousers} trousers" in row.caption
    engine = learning.engines.load(learning.with_engine(profile))
    for row in learning.with_wordings(profile, engine, gallery, rows):
        if rewrites.is_rejected(row):
            query = by_id[row.desc_id]
            update = row.reply.split("<query_update>")[1].removesuffix("</query_update>")
            assert update in teacher.wordings(truth.query_moment(query), truth.cast(query))


def test_the_study_measures_a_cell_and_says_what_is_missing(profile):
    assert list(study.measure(profile, profile.seed, [CELL], ("walkdown", "rerank", "rocchio", "hqr", "sqr")))
    pages.publish(profile)
    numbers = study.read(profile.results())
    # The loop's own refinement is the intervention that changes nothing.
    for system in ("sqr", "hqr"):
        episodes = {episode.desc_id: episode for episode in systems.run(profile, CELL, system)}
        refined = systems.intervene(profile, CELL, system)
        for desc_id, rank in zip(refined["ids"], refined["ranks"]["own"], strict=True):
            if (after := episodes[desc_id].turns[0].rank_out) is not None:
                assert after == rank
    hits = [episode.rank_orig == 1 for episode in episodes.values()]
    assert numbers[f"{CELL}/typed/r1"].value == pytest.approx(100 * np.mean(hits))
    # The clearest of one verdict is the only one, and it answers whatever it is.
    assert numbers[f"{CELL}/rerank/vcmr_t1"].value >= numbers[f"{CELL}/walkdown/vcmr_t1"].value
    page = (profile.results() / "README.md").read_text()
    assert "MISSING" in page and "same-half" in page
    columns = [line.split(" | ")[3] for line in page.splitlines() if line.startswith("| the query as typed")]
    assert columns and "MISSING" not in columns
    assert {"looks.png", "films.png"} <= {path.name for path in profile.results().iterdir()}


def test_rocchio_searches_with_the_query_less_a_part_of_the_film_it_was_shown(profile):
    gallery, feedback = (
        learning.open_gallery(profile, "casts", "test"),
        systems.choose_feedback(profile, "casts"),
    )
    by_id, moved = {query.id: query for query in gallery.queries}, 0
    for episode in systems.run(profile, CELL, "rocchio"):
        turn = episode.turns[0]
        if turn.rank_out is not None:
            query, moved = by_id[episode.desc_id], moved + 1
            film = gallery.vectors.video_vecs[gallery.vectors.column(turn.shown_id)]
            vec = gallery.typed([query])[0] - feedback * film
            scores = gallery.part(query).scores(vec[None])[0]
            right = scores[gallery.part(query).columns([query.video])[0]]
            assert turn.rank_out == 1 + (scores > right).sum()
    assert moved


def test_a_reply_given_back_beside_its_own_film_refines_as_it_did(profile, monkeypatch, tmp_path):
    """The film of another camera is here the rejected one, so its reply is the policy's own."""

    def rejected(gallery, query):
        part = gallery.part(query)
        return [part.video_ids[int(part.scores(gallery.typed([query])[0]).argmax())]]

    def refine(*args):
        vecs, texts = plain(*args)
        made.append(vecs)
        return vecs, texts

    plain, made = systems._refine_soft, []
    monkeypatch.setattr(systems, "_elsewhere", rejected)
    monkeypatch.setattr(systems, "_refine_soft", refine)
    weights = str(learning.train(profile, "casts", "sqr"))
    systems._intervene(profile, CELL, "sqr", weights, tmp_path)
    ranks = json.loads((tmp_path / "ranks.json").read_text())["ranks"]
    assert ranks["other-archive"] == ranks["own"] == ranks["other-reply"] and ranks["own"]
    own, other_archive, other_reply, taught = np.split(np.concatenate(made), 4)
    assert np.abs(own - other_archive).max() < 1e-5 and np.abs(own - other_reply).max() < 1e-3
    assert np.abs(own - taught).max() > 0.01  # another reply, other soft tokens


def test_a_bound_by_words_is_aimed_at_another_film_of_the_archive_for_its_null(profile):
    gallery = learning.open_gallery(profile, "casts", "test")
    for query in gallery.queries:
        wrong = headroom._aimed_at_wrong(profile, gallery, query)
        assert wrong.video != query.video and wrong.text == query.text
        assert wrong.video in gallery.part(query).video_ids


def test_cards_find_nothing_false_in_what_somebody_says_who_knows_the_camera(profile):
    gallery = learning.open_gallery(profile, "casts", "test")
    by_id, made = {query.id: query for query in gallery.queries}, cards.ArchiveCards(profile, CELL, {})
    false = 0
    for episode in systems.run(profile, CELL, "sqr"):
        query, turn = by_id[episode.desc_id], episode.turns[0]
        said = lambda text, turn=turn: dataclasses.replace(  # noqa: E731
            turn, reply=dataclasses.replace(turn.reply, text=text)
        )
        reply = gallery.truth.reply(query, turn.shown_id)
        assert not any(errors for *_, errors in made.reasoning(episode, said(reply)))
        cast = gallery.truth.cast(query)
        shown = gallery.truth.shown_moment(turn.shown_id)
        reply = teacher.verdict(gallery.truth.query_moment(query), shown, (cast + 2) % casts.STEPS)
        false += any("looks" in errors for *_, errors in made.reasoning(episode, said(reply)))
    assert false == len(by_id) // 2  # of whole steps


def test_a_page_of_cards_has_the_searches_of_both_systems_and_plays_their_films(profile):
    for system in ("hqr", "sqr"):
        systems.run(profile, CELL, system)
    page = cards.publish(profile)
    text = page.read_text()
    assert text.count("<article id=") == 12 and text.count("The camera sh") == 12
    for film in set(re.findall(r'href="([^"]+\.mp4)', text)):
        assert (page.parent / film).exists()
    assert "HQR, trained" in text and "casts-half" not in text.split("<main>")[1]


def test_a_search_is_drawn_by_rule_in_the_colours_of_its_camera(profile, monkeypatch):
    """One episode refines and finds, one refines and does not: each rule in turn."""
    episodes = systems.run(profile, CELL, "sqr")
    episode = next(e for e in episodes if e.turns and e.turns[0].reply and not e.turns[0].shown_is_gt)
    turn = dataclasses.replace(episode.turns[0], refine_kind="soft", refine_tokens=8, rank_out=1)
    span = episode.gt_span_ms
    reply = dataclasses.replace(turn.reply, matched=True, span=tuple(ms / 1000 for ms in span))
    right = {"shown_id": episode.gt_video, "shown_is_gt": True, "span_ms": span, "iou": 1.0}
    last = dataclasses.replace(turn, t=2, reply=reply, rank_out=None, **right)
    found = dataclasses.replace(episode, turns=(turn, last))
    first = dataclasses.replace(episode, turns=(turn, dataclasses.replace(turn, t=2)))
    for kind, *pair in (("words", found, first), ("tokens", first, found), ("neither", first, first)):
        runs = dict(zip(("hqr", "sqr"), pair, strict=True))
        monkeypatch.setattr(systems, "read", lambda profile, cell, system, runs=runs: [runs[system]])
        ((drawn, (figure, caption)),) = pages.draw_searches(profile).items()
        assert drawn == kind and ": 1 of 1 failed" in caption
        texts = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
        assert first.query.split()[0] in texts
    monkeypatch.setattr(systems, "read", lambda *_: [])
    assert pages.draw_searches(profile) == {}


def test_numbers_are_means_over_seeds_of_the_queries_that_they_name(profile):
    """By plain loops over hits that are made up."""
    rng, ids = np.random.default_rng(3), list(range(40))
    cells = {CELL: {"archives": {str(key): f"test-{key % 4}" for key in ids}, "unseen": "01" * 20}}
    typed = "".join(rng.choice(["0", "1"], 40))
    runs = []
    for seed in (42, 1):
        hits = {f"{CELL}/typed": {"ids": ids, "r1": typed}}
        for name in ("sqr", "adapter-soft"):
            hits[f"{CELL}/{name}"] = {"ids": ids, "r1": "".join(rng.choice(["0", "1"], 40))}
        runs.append({"seed": seed, "commit": "a" * 40, "cells": cells, "hits": hits})
    del runs[1]["hits"][f"{CELL}/adapter-soft"]
    runs[1]["hits"][f"{CELL}/sqr"]["ver"] = typed  # not measured with the other seed
    numbers = study.summarize(profile, runs)

    def share(name, seeds, keep):
        hits = [int(run["hits"][name]["r1"][key]) for run in runs[:seeds] for key in ids if keep(key)]
        return pytest.approx(100 * sum(hits) / len(hits))

    sqr, soft = f"{CELL}/sqr", f"{CELL}/adapter-soft"
    assert numbers[f"{sqr}/r1"].value == share(sqr, 2, lambda key: True)
    assert numbers[f"{sqr}/r1"].seeds == (42, 1) and numbers[f"{soft}/r1"].seeds == (42,)
    assert numbers[f"{sqr}/ver"].seeds == (1,)
    assert numbers[f"{sqr}/ver"].value == pytest.approx(100 * typed.count("1") / 40)
    assert numbers[f"{sqr}/unseen"].value == share(sqr, 2, lambda key: key % 2 == 1)
    assert numbers[f"{sqr}/seen"].value == share(sqr, 2, lambda key: key % 2 == 0)
    assert numbers[f"{sqr}/repaired"].value == share(sqr, 2, lambda key: typed[key] == "0")
    assert numbers[f"{sqr}/repaired"].n == typed.count("0")
    gain = numbers[f"{sqr}/r1_over_adapter-soft"]  # of the seed that has both
    first = runs[0]["hits"]
    gains = [int(a) - int(b) for a, b in zip(first[sqr]["r1"], first[soft]["r1"], strict=True)]
    assert (
        gain.value == pytest.approx(100 * sum(gains) / 40) and gain.seeds == (42,) and gain.unit == "points"
    )


def test_a_prediction_comes_out_within_its_limits_or_not():
    predictions = (study.Prediction("x", f"{CELL}/sqr/r1", f"{CELL}/hqr/r1", 5, 100),)
    numbers = {f"{CELL}/sqr/r1": Estimate(50.0), f"{CELL}/hqr/r1": Estimate(46.0)}
    assert study.outcomes(numbers, predictions) == [("x", "+4.0 points", "**no**")]
    assert study.outcomes(numbers | {f"{CELL}/sqr/r1": Estimate(60.0)}, predictions) == [
        ("x", "+14.0 points", "yes")
    ]
    assert study.outcomes({}, predictions) == [("x", "MISSING", "—")]


def test_every_cell_has_a_corpus():
    assert {name for name, _ in corpus.CELLS.values()} == set(corpus.CASTS)
    assert set(pages.TITLES) == set(corpus.CELLS)
