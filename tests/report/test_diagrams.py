"""Diagrams say what the profile runs, and hold their words."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fake import profile as fake_profile
from matplotlib.transforms import Bbox

from vsr1.loop import hqr
from vsr1.loop.replies import REFINE
from vsr1.models import prompt_text
from vsr1.report import diagrams


@pytest.fixture
def run(tmp_path, monkeypatch):
    return fake_profile(tmp_path, monkeypatch)


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def said(figure):
    return " ".join(text.get_text() for text in texts(figure))


def chips(figure):
    return sum(patch.get_gid() == "chip" for patch in figure.axes[0].patches)


def every(run):
    """All drawings, with few and many soft tokens."""
    for n in (1, 8, 64):
        numbered = replace(run, n_soft=n, max_turns=10, sft_negatives=1024)
        yield from (diagrams.loop(numbered), diagrams.hard_and_soft(numbered))
    yield diagrams.rewriters()


def inside(small, large):
    return large.x0 <= small.x0 and small.x1 <= large.x1 and large.y0 <= small.y0 and small.y1 <= large.y1


def test_no_words_leave_their_box_or_meet_other_words(run):
    for figure in every(run):
        figure.draw_without_rendering()
        placed = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        parts = figure.axes[0].patches
        boxes = [part.get_window_extent() for part in parts if part.get_gid() == "box"]
        solid = [part.get_window_extent() for part in parts if part.get_gid() == "chip"]
        solid += [one for one in boxes if not any(inside(other, one) and other is not one for other in boxes)]
        for number, (words, place) in enumerate(placed):
            assert inside(place, figure.bbox), words
            homes = [box for box in boxes if place.overlaps(box)]
            assert all(inside(place, box) for box in homes), words
            assert not any(place.overlaps(other) for _, other in placed[:number]), words
            assert not any(place.overlaps(one) and not inside(place, one) for one in solid), words


def test_arrows_go_around_boxes_and_words(run):
    for figure in every(run):
        figure.draw_without_rendering()
        parts, axes = figure.axes[0].patches, figure.axes[0]
        boxes = [part.get_window_extent() for part in parts if part.get_gid() == "box"]
        leaves = [one for one in boxes if not any(inside(other, one) and other is not one for other in boxes)]
        arrows = [part for part in parts if part.get_gid() == "arrow"]
        assert arrows
        for arrow in arrows:
            corners = axes.transData.transform(arrow._path_original.vertices)
            steps = [np.linspace(a, b, 100) for a, b in itertools.pairwise(corners)]
            way = np.concatenate(steps)[2:-2]
            for one in [*leaves, *(text.get_window_extent() for text in texts(figure))]:
                within = Bbox.from_extents(one.x0 + 1, one.y0 + 1, one.x1 - 1, one.y1 - 1)
                assert not any(within.contains(*point) for point in way), (corners, one)


def test_the_loop_and_the_refinements_have_the_numbers_of_the_profile(run):
    run = replace(run, n_soft=5, max_turns=4, sft_negatives=24)
    loop, two = diagrams.loop(run), diagrams.hard_and_soft(run)
    assert all(
        words in said(loop) for words in ("N = 5", "T = 4", "at t = 4", REFINE, "or unknown", "no_refine")
    )
    assert chips(loop) == 10 and chips(two) == 5 and "5 soft tokens" in said(two) and "24 others" in said(two)


def test_the_rewriters_are_those_that_are_run(run):
    words = said(diagrams.rewriters())
    seen = [hqr.rewrite_prompt(variant) for variant in ("blind", "seen", "reasoned")]
    assert words.count("in a call after") == sum(prompt == prompt_text.REWRITE for prompt, _ in seen) == 2
    assert words.count("none") == sum(not sees for _, sees in seen) + 2  # no video, no reasoning
    assert words.count("ours") == 3 and hqr.compose_query("$q_1$", "TEXT", "append") in words
    assert " ".join(prompt_text.REWRITE.split()) in words


def test_diagrams_drawn_twice_are_the_same_bytes(run):
    def publish():
        paths = [path.with_suffix(kind) for path in diagrams.publish(run) for kind in (".png", ".svg")]
        return {path.name: path.read_bytes() for path in paths}

    first = publish()
    assert publish() == first and {name.partition(".")[0] for name in first} == {"F2", "F3", "A1"}
