"""Searches in figures are those that the rules name, and nothing moves between two drawings."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake import profile as fake_profile
from matplotlib.transforms import Bbox
from PIL import Image
from searches import episode as walk
from searches import turn

from vsr1 import cache
from vsr1.data import annotations, video_reader
from vsr1.loop import moments, records
from vsr1.mini import renderer, world
from vsr1.report import search_figures, search_panels

WIDTH = 64  # pixels of the rendered films


def soft(key, rank, iou=True, out=1, last=True):
    """SQR on a query about the first video: the second one is rejected, then the right one shown on rank `out`."""
    moment = (2.0, 8.0) if iou else (0.0, 2.5)
    first = turn(1, "b", "a", rank, False, out=(out, "a" if out == 1 else "c"))
    end = turn(2, "a" if out == 1 else "c", "a", out, out == 1, moment if out == 1 else None)
    return walk(key, "a", [first, end], "matched" if out == 1 else "budget")


def hard(key, rank, out, shown="b"):
    """HQR on the same query: a rewrite, then the right video where it is on rank 1, else that same wrong one again."""
    change = {"refine_kind": "hqr-reasoned", "update_text": "someone else", "refine_tokens": 4}
    first = replace(turn(1, shown, "a", rank, False, out=(out, "a" if out == 1 else shown)), **change)
    if out == 1:
        return walk(key, "a", [first, turn(2, "a", "a", 1, True, (2.0, 8.0))], "matched")
    return walk(key, "a", [first, replace(first, t=2, rank_in=out, reused=True)])


FIT = {  # data set: {query: (SQR, HQR, which rules they fit)}
    "charades": {
        7: (soft(7, 12), hard(7, 12, 9), "pair teaser"),
        3: (soft(3, 40), hard(3, 40, 41), "pair"),
        1: (soft(1, 9), hard(1, 9, 9), "weaker"),  # not far enough down
        2: (soft(2, 41), hard(2, 41, 9), "weaker"),  # too far
        4: (soft(4, 20, iou=False), hard(4, 20, 9), ""),  # the wrong moment
        5: (soft(5, 30), hard(5, 30, 1), "teaser"),  # both find it
        6: (soft(6, 31), hard(6, 31, 7, shown="c"), ""),  # they saw different videos
        8: (soft(8, 3, out=2), hard(8, 3, 1), "reverse"),
    },
    "didemo": {9: (soft(9, 10), hard(9, 10, 2), "pair teaser"), 10: (soft(10, 10), None, "teaser")},
}
PAIRED = {dataset: [one[:2] for one in own.values() if one[1]] for dataset, own in FIT.items()}


def named(dataset, word):
    return sorted(key for key, one in FIT[dataset].items() if word in one[2].split())


def ids(found):
    return {dataset: [walk[0].desc_id for walk in some] for dataset, some in found.items()}


def test_a_rule_takes_what_it_says_and_the_smallest_id_first():
    won = search_figures.SQR_WINS.choose(PAIRED)
    assert (
        ids(won)
        == {dataset: named(dataset, "pair") for dataset in FIT}
        == {"charades": [3, 7], "didemo": [9]}
    )
    lost = search_figures.HQR_WINS.choose(PAIRED)
    assert (
        ids(lost)
        == {dataset: named(dataset, "reverse") for dataset in FIT}
        == {"charades": [8], "didemo": []}
    )
    assert ids(search_figures.BOTH.choose(PAIRED)) == {"charades": [5], "didemo": []}
    neither = (soft(11, 20, out=3), hard(11, 20, 5))
    assert ids(search_figures.NEITHER.choose({"charades": [neither, *PAIRED["charades"]]})) == {
        "charades": [11]
    }
    alone = {dataset: [one[:1] for one in own.values()] for dataset, own in FIT.items()}
    assert ids(search_figures.TWO_TURNS.choose(alone)) == {d: named(d, "teaser") for d in FIT}


def test_one_turn_or_a_problem_is_no_example():
    one, other = FIT["charades"][7][:2]
    assert search_figures.ahead(one, other) and not search_figures.ahead(other, one)
    assert not search_figures.ahead(one, replace(other, turns=other.turns[:1]))
    assert not search_figures.ahead(one, replace(other, problem="gone"))
    nowhere = replace(one, rank_orig=None)
    for rule in (search_figures.SQR_WINS, search_figures.HQR_WINS):  # the second one's ranks have no end
        assert rule.choose({"a": [(nowhere, other)]}) == {"a": []}


def test_a_teaser_rejects_first():
    one = FIT["charades"][7][0]
    assert search_figures.in_two_turns(one)
    unread = replace(one.turns[0], reply=replace(one.turns[0].reply, matched=None))
    assert not search_figures.in_two_turns(replace(one, turns=(unread, one.turns[1])))
    assert not search_figures.in_two_turns(replace(one, turns=(*one.turns, one.turns[1])))


@pytest.mark.parametrize(
    ("tops", "fits"),
    [("bcaa", True), ("bbaa", False), ("bac", False), ("bcda", False), ("bcba", False), ("", False)],
)
def test_three_videos_are_on_rank_one_and_the_right_one_last(tops, fits):
    one = FIT["charades"][7][0]
    first = replace(one.turns[0], top1_by_depth=tuple(tops))
    assert search_figures.three_on_top(replace(one, turns=(first, one.turns[1]))) is fits


# --- On rendered films


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The searches of FIT in files, about rendered videos; the right one of query n is video n of its data set."""
    with pytest.MonkeyPatch.context() as patch:
        home = fake_profile(tmp_path_factory.mktemp("plates"), patch)
        for dataset, own in FIT.items():
            folder = home.data_dir(dataset)
            for path in (folder / "corpus", folder / "videos", home.runs(dataset) / "episodes"):
                path.mkdir(parents=True)
            scenes = renderer.write_corpus(folder / "corpus", dataset, {"test": 3}, home.world.seed)
            for scene in scenes:
                renderer.render_video(scene, folder / "videos" / f"{scene.video}.mp4", WIDTH, 2)
            names = dict(zip("abc", (scene.video for scene in scenes), strict=True))
            query = next(
                q for q in annotations.read_fig(folder / "corpus" / "test.jsonl") if q.video == names["a"]
            )
            for column, system in enumerate(("vsr1", "hqr-reasoned-sample")):
                ran = records.Run(dataset, "test", system, 3, 1, 42)
                walked = [about(one[column], ran, query, names) for one in own.values() if one[column]]
                records.write_episodes(home.runs(dataset) / "episodes" / f"{system}.jsonl", ran, walked)
        yield home


def about(one, ran, query, names):
    """An episode of FIT as one of a rendered query."""
    turns = [replace(t, shown_id=names[t.shown_id], top1_out=names.get(t.top1_out)) for t in one.turns]
    fields = {"query": query.text, "gt_video": query.video, "gt_span_ms": moments.span_ms(query.span)}
    return replace(one, run=ran, turns=tuple(turns), **fields)


def captions(paths):
    return {path.stem: Image.open(path).text["Description"] for path in paths}


@pytest.fixture(scope="module")
def said(home):
    return captions(search_figures.publish(home))


def test_data_sets_come_in_turn_and_captions_count(said):
    picked = {name: text.partition(". Rule")[0].rpartition(". ")[2] for name, text in said.items()}
    pairs = {"F7": "charades, query 3", "A3": "charades, query 8", "A4": "charades, query 5"}
    pairs |= {"A5": "didemo, query 9", "A6": "charades, query 7"}  # there is no search that neither finds
    pairs |= {
        "A7": "charades, query 1"
    }  # nor a second one that HQR wins, nor a third win of SQR by the first rule
    assert picked == pairs | {"F1": "charades, query 5"}
    assert "3 of 9 queries (charades 2 of 8, didemo 1 of 1)" in said["A5"]
    assert "exchanged: 0 of 9 queries" in said["A5"] and "weaker rule" in said["A3"]
    assert "1 of 9 queries" in said["A3"] and "exchanged: 5 of 9 queries" in said["A3"]
    assert "both accept the right video" in said["A4"] and "exchanged" not in said["A4"]
    assert "4 of 10 queries (charades 2 of 8, didemo 2 of 2)" in said["F1"]
    assert (
        "rank 27 to 1" in said["F7"] and "rank 40 at first" in said["F7"] and "not known to us" in said["A4"]
    )
    assert all("Profile mini, rendered videos" in text for name, text in said.items())


def test_what_no_search_fits_is_left_out_in_a_line_and_an_old_picture_goes_once_all_is_run(home, capsys):
    old = [home.results() / "figures" / f"F6.{kind}" for kind in ("png", "svg")]
    old[0].parent.mkdir(parents=True, exist_ok=True)
    for path in old:
        path.write_bytes(b"of an earlier run")
    search_figures.publish(home)
    assert all(path.exists() for path in old)  # it may show a data set that was not run
    for dataset in home.datasets:
        (home.runs(dataset) / "numbers").mkdir(parents=True, exist_ok=True)
        cache.write_json(home.runs(dataset) / "numbers" / "01.json", {})
    capsys.readouterr()
    search_figures.publish(home)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["left out: figure F6: no further search fits its rule"]
    assert not any(path.exists() for path in old)


def test_plates_drawn_twice_are_the_same_bytes_and_small(home):
    def publish():
        files = [path.with_suffix(kind) for path in search_figures.publish(home) for kind in (".png", ".svg")]
        return {path: path.read_bytes() for path in files}

    first = publish()
    assert len(first) == 14 and publish() == first
    limits = {".png": 250_000, ".svg": 500_000}
    assert all(len(content) < limits[path.suffix] for path, content in first.items())


def test_without_episodes_nothing_is_said(tmp_path, monkeypatch, capsys):
    assert search_figures.publish(fake_profile(tmp_path, monkeypatch)) == [] and capsys.readouterr().out == ""


def test_frames_of_real_videos_stay_out_of_results(home):
    real = replace(home, world=None)
    plates_of = {path.stem: path.parent for path in search_figures.publish(real)}
    assert set(plates_of.values()) == {home.runs("figures")} and "F7" in plates_of
    assert "real videos" in captions([home.runs("figures") / "F7.png"])["F7"]


def drawn(profile):
    """Per figure of a profile its words in the order they were written, each with its box, and its page."""
    with video_reader.Reader() as reader:
        for name, figure, _ in search_figures.figures(profile, reader):
            figure.draw_without_rendering()
            texts = [text for text in figure.axes[0].texts if text.get_text()]
            boxes = [text.get_window_extent() for text in texts]
            yield name, " ".join(text.get_text() for text in texts), boxes, figure.bbox


def test_figures_show_both_searches_and_no_words_overlap_or_leave(home):
    words = {}
    for name, words[name], boxes, page in drawn(home):
        assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
        assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
        inner = [Bbox.from_extents(b.x0 + 1, b.y0 + 3, b.x1 - 1, b.y1 - 3) for b in boxes]  # no line spacing
        assert not any(one.overlaps(other) for one, other in itertools.combinations(inner, 2)), name
    for part in ("rank 12 → 1", "rank 12 → 9", "8 soft tokens", "someone else", "Turn 2 is turn 1 again"):
        assert part in words["A6"]
    assert "Turn 2. Found first: right video" in words["F1"] and "right video: rank 30 → 1" in words["F1"]
    soft, _ = next(pair for pair in search_figures.run_pairs(home)["charades"] if pair[0].desc_id == 7)
    films = search_panels.FrameSource(home, "charades", None)
    lacks = films.lacks(soft, soft.turns[0].shown_id)
    assert lacks and all(f"{seen}, not {asked}" in words["A6"] for asked, seen in lacks.items())
    assert films.lacks(soft, soft.gt_video) == {}


def test_the_picture_of_one_search_marks_each_statement_true_or_false(home):
    """Against the rendered truth, read here without the functions that draw."""
    ((dataset, (one,)), *_) = search_figures.TWO_TURNS.in_turn(search_figures.run_searches(home))
    first = one.turns[0]
    scenes = world.read_scenes(home.data_dir(dataset) / "corpus")
    (asked,) = (
        m for m in scenes[one.gt_video].moments if moments.span_ms((m.start, m.end)) == one.gt_span_ms
    )
    shown = max(
        scenes[first.shown_id].moments,
        key=lambda m: sum(getattr(m, a) == getattr(asked, a) for a in world.ATTRIBUTES),
    )
    false = "red" if shown.shirt != "red" else "blue"
    steps = f"{shown.start} to {shown.end}."
    steps += f" object {asked.object} - {shown.object} {'yes' if asked.object == shown.object else 'no'}."
    steps += f" shirt {false} - {false} yes."
    reply = replace(first.reply, text=f"<think> {steps} </think> <answer>not_matched</answer> <REFINE>")
    searched = replace(one, turns=(replace(first, reply=reply), one.turns[1]))
    with video_reader.Reader() as reader:
        source = search_panels.FrameSource(home, dataset, reader)
        figure = search_panels.one_search(searched, source)
    words = " ".join(text.get_text() for text in figure.axes[0].texts if text.get_text())
    assert f"{shown.start} to {shown.end}. ✓ object: {shown.object}" in words and f"✗ shirt: {false}" in words
    assert source.count_statements(searched) == (2, 1)


def test_a_weaker_rule_finds_the_picture_where_the_first_finds_none(home, monkeypatch):
    weak = FIT["charades"][1][0]
    weak = next(
        one for (one,) in search_figures.run_searches(home)["charades"] if one.desc_id == weak.desc_id
    )
    monkeypatch.setattr(search_figures, "run_searches", lambda _: {"charades": [(weak,)]})
    monkeypatch.setattr(search_figures, "run_pairs", lambda _: {})
    with video_reader.Reader() as reader:
        captions = {name: words for name, _, words in search_figures.figures(home, reader)}
    assert "weaker rule" in captions["F1"] and "1 of 1 queries" in captions["F1"]


def test_a_video_that_cannot_be_read_is_named_so(home, tmp_path, monkeypatch):
    monkeypatch.setattr(search_panels.annotations, "find_videos", lambda _, ids: [SimpleNamespace(path=None)])
    assert all("cannot be read: no such file" in words for _, words, *_ in drawn(home))


# --- What is found as tokens grow


def growing(home, monkeypatch, by_depth, recorded=(25, 2, 1), rank=25):
    """{name: (figure, caption)} where one search has three videos on top, with these ranks computed."""
    one = next(one for (one,) in search_figures.run_searches(home)["charades"] if one.desc_id == 7)
    names = [one.turns[0].shown_id, one.turns[1].shown_id]
    third = next(v for v in world.read_scenes(home.data_dir("charades") / "corpus") if v not in names)
    tops = (names[0], third, one.gt_video)
    first = replace(one.turns[0], rank_in=rank, rank_by_depth=recorded, top1_by_depth=tops)
    one = replace(one, rank_orig=rank, turns=(first, one.turns[1]))
    path = home.runs("charades") / "depth_ranks" / "ranks.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"7": dict(zip(tops, by_depth, strict=True))} if by_depth else {}))
    monkeypatch.setattr(search_figures, "run_searches", lambda _: {"charades": [(one,)]})
    monkeypatch.setattr(search_figures, "run_pairs", lambda _: {})
    with video_reader.Reader() as reader:
        figures = {name: rest for name, *rest in search_figures.figures(home, reader)}
    path.unlink()
    return figures


def test_ranks_of_three_videos_are_curves_with_the_best_on_top(home, monkeypatch, capsys):
    by_depth = [[1, 7, 8], [3, 1, 2], [25, 2, 1]]
    made_of = growing(home, monkeypatch, by_depth)
    curves = made_of["F6"][0].axes[1]
    assert [list(line.get_ydata()) for line in curves.lines if len(line.get_ydata()) == 3] == by_depth
    assert curves.get_ylim()[0] > curves.get_ylim()[1]
    assert "rank 25, 2, 1." in made_of["F6"][1] and "the rejected one from 1 to 8" in made_of["F1"][1]
    assert capsys.readouterr().out == ""


def test_where_no_search_begins_as_far_back_as_the_paper_s_a_weaker_rule_takes_its_place(home, monkeypatch):
    made_of = growing(home, monkeypatch, [[1, 7, 8], [3, 1, 2], [7, 2, 1]], recorded=(7, 2, 1), rank=7)
    assert "rank 7, 2, 1." in made_of["F6"][1] and "a weaker rule" in made_of["F6"][1]
    assert "a weaker rule" not in growing(home, monkeypatch, [[1, 7, 8], [3, 1, 2], [25, 2, 1]])["F6"][1]


@pytest.mark.parametrize("by_depth", [None, [[1, 7, 9], [3, 1, 2], [25, 3, 1]]])
def test_without_ranks_or_with_others_than_recorded_there_are_no_curves(home, monkeypatch, capsys, by_depth):
    made_of = growing(home, monkeypatch, by_depth)
    assert list(made_of) == ["F1"] and "the rejected one" not in made_of["F1"][1].partition("Paper")[0]
    assert capsys.readouterr().out.startswith("left out: figure F6 of charades: notebook 08 left no ranks")
