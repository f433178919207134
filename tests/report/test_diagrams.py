"""Diagrams say what the profile runs, hold their words, and show the pair of searches that the rule names."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fake import profile as fake_profile
from matplotlib.transforms import Bbox
from PIL import Image

from vsr1.data import annotations
from vsr1.loop import hqr, moments, records, replies
from vsr1.loop.records import Cost, Episode, Turn
from vsr1.loop.replies import REFINE
from vsr1.mini import renderer
from vsr1.models import prompt_text
from vsr1.report import diagrams

LONG = "With $5 and <b>one $</b> " + "umbrella " * 30 + "x" * 200


def walk(key, ranks, system, iou=0.8, first="wrong", text="a query"):
    """A search that ranks the right video so, look by look, and says matched where it is first."""
    turns, after = [], [*ranks[1:], None]
    for t, (rank, out) in enumerate(zip(ranks, after, strict=True), 1):
        said = "<answer>matched</answer> <start>0</start> <end>8</end>" if rank == 1 else diagrams.NOT
        reply = replies.read_reply(f"<think> {text} </think> {said}", [7])
        shown = "gt" if rank == 1 else first if t == 1 else "other"
        turn = Turn(t, shown, rank == 1, rank, 0, 0.5, 0.9, reply, None, iou * (rank == 1), Cost())
        turns.append(replace(turn, rank_out=out, update_text=None if system == "vsr1" else f"{text} again"))
    run = records.Run("charades", "test", system, 3, 1, 42)
    return Episode(run, key, text, "gt", (0, 8000), ranks[0], tuple(turns), "matched")


def write(run, dataset, soft, hard):
    """Both systems' searches of a data set, {key: arguments of `walk`}, as files."""
    folder = run.runs(dataset) / "episodes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, walks in (("vsr1", soft), ("hqr-reasoned-sample", hard)):
        found = [walk(key, system=name, **given) for key, given in walks.items()]
        records.write_episodes(folder / f"{name}.jsonl", found[0].run, found)


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
    """All drawings: with and without an example, with few and many soft tokens, short words and endless ones."""
    pair = "charades", walk(1, [30, 12, 1], "vsr1", text=LONG), walk(1, [30, 31, 32], "hqr", text=LONG)
    for n in (1, 8, 64):
        numbered = replace(run, n_soft=n, max_turns=10, sft_negatives=1024)
        yield from (diagrams.loop(numbered), diagrams.hard_and_soft(numbered, pair, {}))
    yield from (diagrams.hard_and_soft(run, None, {}), diagrams.rewriters())


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
    loop, two = diagrams.loop(run), diagrams.hard_and_soft(run, None, {})
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


def test_the_example_is_the_one_that_the_rule_names(run):
    good = {"ranks": [12, 1]}, {"ranks": [12, 9]}
    wrong = {
        1: ({"ranks": [9, 1]}, good[1]),  # too near
        2: ({"ranks": [41, 1]}, good[1]),  # too far
        3: ({"ranks": [12, 2]}, good[1]),  # not found
        4: ({"ranks": [12, 1], "iou": 0.4}, good[1]),  # not the moment
        5: (good[0], {"ranks": [12, 1]}),  # HQR finds it too
        6: (good[0], {"ranks": [12]}),  # HQR does not look again
        7: (good[0], {"ranks": [12, 9], "first": "elsewhere"}),  # not the same first video
    }
    pairs = {9: good, **wrong, 8: good}
    write(run, run.datasets[0], *({key: pair[n] for key, pair in wrong.items()} for n in (0, 1)))
    assert diagrams.example(run) is None
    write(run, run.datasets[1], *({key: pair[n] for key, pair in pairs.items()} for n in (0, 1)))
    dataset, soft, hard = diagrams.example(run)
    assert (dataset, soft.desc_id, hard.desc_id) == (run.datasets[1], 8, 8)
    assert (soft.run.method, hard.run.method) == ("vsr1", "hqr-reasoned-sample")


def test_the_first_reply_is_quoted_with_the_verdict_that_was_read(run):
    one = walk(1, [12, 1], "vsr1", text="a shirt < a coat")
    unsure = replace(
        one.turns[0].reply, text="<think> hm </think> <answer>perhaps</answer> <REFINE>", matched=None
    )
    other = replace(one, turns=(replace(one.turns[0], reply=unsure), one.turns[1]))
    words = said(diagrams.hard_and_soft(run, ("charades", other, one), {}))
    assert (
        "<think> a shirt < a coat </think>" in words
        and "<think> hm </think> <answer>perhaps</answer>" in words
    )
    assert words.count(f"</think> {diagrams.NOT}") == 1


def test_without_episodes_there_is_a_drawing_that_says_so_and_its_bytes_stand_still(run):
    first = [
        path.with_suffix(kind).read_bytes() for path in diagrams.publish(run) for kind in (".png", ".svg")
    ]
    paths = diagrams.publish(run)
    again = [path.with_suffix(kind).read_bytes() for path in paths for kind in (".png", ".svg")]
    assert first == again and [path.stem for path in paths] == ["F2", "F3", "A1"]
    assert "without an example" in Image.open(paths[0]).text["Description"]
    assert "rank" not in said(diagrams.hard_and_soft(run, None, {}))


def test_the_example_shows_its_ranks_and_its_frames_unless_they_are_of_real_video(run):
    home, data, dataset = run.runs("charades"), run.data_dir("charades"), "charades"
    for name in ("corpus", "videos"):
        (data / name).mkdir(parents=True)
    scenes = renderer.write_corpus(data / "corpus", dataset, {"test": 3}, {"test": 1}, run.world.seed)
    for scene in scenes:
        renderer.render_video(scene, data / "videos" / f"{scene.video}.mp4", 64, 4)
    query = annotations.read_fig(data / "corpus" / "test.jsonl")[0]
    others = [scene.video for scene in scenes if scene.video != query.video]
    names = {"gt": query.video, "wrong": others[0], "other": others[1]}
    pair = [walk(3, ranks, "any", text=query.text) for ranks in ([12, 1], [12, 9])]
    soft, hard = (
        replace(
            one,
            gt_video=query.video,
            gt_span_ms=moments.span_ms(query.span),
            turns=tuple(replace(turn, shown_id=names[turn.shown_id]) for turn in one.turns),
        )
        for one in pair
    )
    shown = diagrams.frames(run, dataset, soft, hard)
    assert shown.keys() == set(names.values()) and all(len(pictures) == 2 for pictures in shown.values())
    figure = diagrams.hard_and_soft(run, (dataset, soft, hard), shown)
    words = said(figure)
    assert len(figure.axes[0].images) == 8 and words.count("rank 12") == 2
    assert words.count("rank 9") == words.count("rank 1 ") + words.endswith("rank 1") == 1
    (home / "episodes").mkdir(parents=True)
    for name, one in (("vsr1", soft), ("hqr-reasoned-sample", hard)):
        records.write_episodes(home / "episodes" / f"{name}.jsonl", one.run, [one])
    seen = []
    for one in (run, replace(run, world=None)):
        path = diagrams.publish(one)[0]
        seen.append(("<image" in path.with_suffix(".svg").read_text(), Image.open(path).text["Description"]))
    assert [pictures for pictures, _ in seen] == [True, False]
    assert all("Example: query 3 of charades" in words and "on rank 9, 9," in words for _, words in seen)
