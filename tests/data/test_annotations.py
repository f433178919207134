"""The readers on small files with every quirk, and on the real files where a developer has them."""

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from vsr1.config import InputError
from vsr1.data.annotations import (
    CorpusWarning,
    find_videos,
    gallery_ids,
    read_activitynet,
    read_charades_sta,
    read_didemo,
    read_fig,
    write_fig,
)

REAL = next((up / "shared/data" for up in Path(__file__).parents if (up / "shared/data").is_dir()), None)
real = pytest.mark.skipif(REAL is None, reason="the real annotation files (shared/data) are not here")

ROW = {
    "video": "AB1CD",
    "time": [1.5, 4],
    "desc_id": 7,
    "duration": 30.5,
    "cog_desc": "a person sits.",
    "fig_desc": "A person sits down slowly.",
    "fig_desc_score": -0.25,
}


def fig_file(folder, *rows, name="fig.jsonl"):
    """A file with one line for each row: JSON of an object, a text as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder / name


def json_file(folder, value):
    (folder / "source.json").write_text(json.dumps(value))
    return folder / "source.json"


# --- FIG


def test_a_fig_line_becomes_a_query_with_floats_for_ints(tmp_path):
    (query,) = read_fig(fig_file(tmp_path, ROW | {"time": [5, 10], "duration": 31}))
    assert (query.id, query.video, query.span, query.duration) == (7, "AB1CD", (5.0, 10.0), 31.0)
    assert all(type(value) is float for value in (*query.span, query.duration))
    assert (query.text, query.coarse) == ("A person sits down slowly.", "a person sits.")


def test_outer_blanks_go_and_letters_of_any_language_stay(tmp_path):
    texts = ["  Ein Café öffnet.\n", "Ein Café öffnet."]
    escaped = fig_file(tmp_path, *[ROW | {"fig_desc": text, "desc_id": i} for i, text in enumerate(texts)])
    raw = fig_file(
        tmp_path, json.dumps(ROW | {"fig_desc": "Ein Café\u2028öffnet."}, ensure_ascii=False), name="r"
    )
    assert [query.text for query in read_fig(escaped)] == ["Ein Café öffnet."] * 2
    assert [query.text for query in read_fig(raw)] == ["Ein Café\u2028öffnet."]  # not the end of a line


def test_a_span_behind_the_end_of_the_video_is_kept(tmp_path):
    (query,) = read_fig(fig_file(tmp_path, ROW | {"time": [31.0, 55.3]}))
    assert query.span == (31.0, 55.3) and query.duration == 30.5


def test_reversed_spans_and_blank_lines_are_repaired_and_counted(tmp_path):
    path = fig_file(tmp_path, ROW | {"time": [8.0, 7.0]}, "", "  ", ROW | {"desc_id": 8})
    with pytest.warns(CorpusWarning, match=r"fig.jsonl: 1 reversed spans swapped, 2 blank lines skipped"):
        queries = read_fig(path)
    assert [query.span for query in queries] == [(7.0, 8.0), (1.5, 4.0)]


def test_queries_with_equal_texts_and_spans_stay_apart(tmp_path):
    rows = [ROW, ROW | {"desc_id": 8}, ROW | {"desc_id": 9, "video": "ZZ"}]
    queries = read_fig(fig_file(tmp_path, *rows))
    assert [query.id for query in queries] == [7, 8, 9] and gallery_ids(queries) == ["AB1CD", "ZZ"]


def test_a_gzip_file_a_byte_order_mark_and_windows_line_ends_read_like_the_plain_file(tmp_path):
    plain = fig_file(tmp_path, ROW, ROW | {"desc_id": 8})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "c.jsonl").write_bytes(plain.read_bytes().removesuffix(b"\n"))
    assert all(read_fig(tmp_path / name) == read_fig(plain) for name in ("a.jsonl.gz", "b.jsonl", "c.jsonl"))


@pytest.mark.parametrize("key", ROW)
def test_a_missing_key_is_refused_with_file_line_and_key(tmp_path, key):
    path = fig_file(tmp_path, ROW, "", {k: value for k, value in ROW.items() if k != key} | {"extra": 1})
    with pytest.raises(InputError, match=f"fig.jsonl, line 3: .*'{key}'"):
        read_fig(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("time", value) for value in ([1], [1, 2, 3], [[1, 2]], ["1", 2], [True, 2], None, [1, float("nan")], 3)]
    + [
        ("time", [0, float("inf")]),
        ("time", [0, 10**400]),
        ("desc_id", "7"),
        ("desc_id", 7.0),
        ("desc_id", True),
    ]
    + [
        ("video", 5),
        ("video", ""),
        ("duration", None),
        ("duration", "30"),
        ("fig_desc", None),
        ("cog_desc", []),
    ]
    + [("fig_desc_score", "high")],
)
def test_a_wrong_type_is_refused_with_file_line_and_key(tmp_path, key, value):
    with pytest.raises(InputError, match=f"fig.jsonl, line 2: '{key}' must be"):
        read_fig(fig_file(tmp_path, ROW | {"desc_id": 1}, ROW | {key: value}))


@pytest.mark.parametrize("line", ["{", "[1, 2]", "nonsense", '{"video": "A"} {}', "[" * 100_000, "1" * 5000])
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path, line):
    with pytest.raises(InputError, match=r"fig.jsonl, line 2: not"):
        read_fig(fig_file(tmp_path, ROW, line))


def test_a_repeated_id_is_refused_with_file_line_and_id(tmp_path):
    with pytest.raises(InputError, match=r"fig.jsonl, line 3: desc_id 7 "):
        read_fig(fig_file(tmp_path, ROW, ROW | {"desc_id": 8}, ROW | {"video": "Z"}))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    for name in ("absent.jsonl", "latin.jsonl", "broken.jsonl.gz", "cut.jsonl.gz", "."):
        with pytest.raises(InputError) as error:
            read_fig(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_what_is_written_reads_back_and_has_the_seven_keys_in_order(tmp_path):
    rows = [ROW, ROW | {"desc_id": 0, "time": [5, 99.5], "video": "v_-x_1*", "fig_desc": "Café 犬"}]
    queries = read_fig(fig_file(tmp_path, *rows))
    write_fig(tmp_path / "out.jsonl", queries)
    written = (tmp_path / "out.jsonl").read_bytes()
    assert read_fig(tmp_path / "out.jsonl") == queries
    assert written.isascii() and written.endswith(b"}\n") and b"\r" not in written
    assert [list(json.loads(line)) for line in written.splitlines()] == [list(ROW)] * 2


# --- Source releases


def test_a_charades_line_is_split_at_the_first_mark_and_swapped_where_reversed(tmp_path):
    text = "AO8RW 0.0 6.9##a person ## puts a book.\r\n\nLEOL6 8.0 7.0##  a person laughs. \n"
    (tmp_path / "sta.txt").write_text(text, newline="")
    with pytest.warns(CorpusWarning, match=r"1 reversed spans swapped, 1 blank lines skipped"):
        first, second = read_charades_sta(tmp_path / "sta.txt")
    assert (first.id, first.video, first.span, first.text) == (
        0,
        "AO8RW",
        (0.0, 6.9),
        "a person ## puts a book.",
    )
    assert (second.id, second.span, second.text, second.duration) == (1, (7.0, 8.0), "a person laughs.", None)


@pytest.mark.parametrize(
    "line", ["A 1 2 a#b", "A 1##text", "A 1 2 3##text", "A x 2##text", "A nan 2##t", "##t"]
)
def test_a_malformed_charades_line_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "sta.txt").write_text(f"A 1 2##text\n{line}\n")
    with pytest.raises(InputError, match=r"sta.txt, line 2: "):
        read_charades_sta(tmp_path / "sta.txt")


DIDEMO = {"annotation_id": 5, "description": " a dog runs ", "video": "1@N00_2_ab.mov", "times": [[0, 0]] * 4}


@pytest.mark.parametrize(
    ("votes", "span"),
    [
        ([[3, 3], [2, 3], [3, 3], [3, 4]], (15.0, 20.0)),
        ([[5, 5], [4, 5], [5, 5], [4, 5]], (25.0, 30.0)),  # a tie: the first listed
        ([[4, 5], [5, 5], [5, 5], [4, 5]], (20.0, 30.0)),
        ([[0, 5], [1, 1], [2, 2], [3, 3]], (0.0, 30.0)),  # all differ
        ([[0, 0], [1, 2], [1, 2], [0, 0], [4, 4], [1, 2], [0, 1]], (5.0, 15.0)),  # seven votes
    ],
)
def test_the_most_frequent_didemo_vote_is_the_span(tmp_path, votes, span):
    (query,) = read_didemo(json_file(tmp_path, [DIDEMO | {"times": votes}]))
    assert (query.id, query.span, query.text) == (5, span, "a dog runs")


def test_didemo_containers_merge_and_an_empty_extension_is_one(tmp_path):
    names = ["1@N00_2_ab.mov", "1@N00_2_ab.mp4", "1@N00_2_ab.", "1@N00_2_ab", "a.b.avi"]
    entries = [DIDEMO | {"video": name, "annotation_id": i} for i, name in enumerate(names)]
    assert [query.video for query in read_didemo(json_file(tmp_path, entries))] == ["1@N00_2_ab"] * 4 + [
        "a.b"
    ]


@pytest.mark.parametrize(
    "change",
    [{"times": value} for value in ([], [[0]], [[1, 0]], [[0, 1.5]], [[-1, 0]], [[True, 1]], None)]
    + [{"annotation_id": "5"}, {"video": None}, {"description": 1}],
)
def test_a_malformed_didemo_entry_is_refused_with_its_number(tmp_path, change):
    with pytest.raises(InputError, match=rf"source.json, entry 2: '{next(iter(change))}' must be"):
        read_didemo(json_file(tmp_path, [DIDEMO, DIDEMO | {"annotation_id": 6} | change]))


def test_a_repeated_didemo_id_and_another_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"entry 2: annotation_id 5 "):
        read_didemo(json_file(tmp_path, [DIDEMO, DIDEMO | {"description": "a cat runs"}]))
    with pytest.raises(InputError, match=r"not a JSON list"):
        read_didemo(json_file(tmp_path, {}))
    with pytest.raises(InputError, match=r"not a JSON object"):
        read_activitynet(json_file(tmp_path, []))


def test_activitynet_sentences_become_queries_in_the_order_of_the_file(tmp_path):
    spans = [[0, 5.25], [9, 4.5], [3, 3], [90, 100.01]]
    sentences = ["First.", "  Leading blank.", "A line\nbreak.", "Ünïcode."]
    entry = {"duration": 100, "timestamps": spans, "sentences": sentences}
    short = {"duration": 8.5, "timestamps": [[0, 1]], "sentences": ["x"]}
    path = json_file(tmp_path, {"v_-a_B": entry, "v_c": short})
    with pytest.warns(CorpusWarning, match=r"1 reversed spans swapped, 1 empty spans kept"):
        queries = read_activitynet(path)
    assert [query.span for query in queries] == [(0, 5.25), (4.5, 9), (3, 3), (90, 100.01), (0, 1)]
    assert [query.text for query in queries[:4]] == ["First.", "Leading blank.", "A line break.", "Ünïcode."]
    assert [(query.id, query.video) for query in queries[3:]] == [(3, "v_-a_B"), (4, "v_c")]
    assert [query.duration for query in queries[3:]] == [100.0, 8.5]


@pytest.mark.parametrize(
    "change",
    [{"timestamps": []}, {"timestamps": [[1]]}, {"sentences": [3]}, {"duration": None}, {"sentences": 0}],
)
def test_a_malformed_activitynet_entry_is_refused_with_its_video(tmp_path, change):
    entry = {"duration": 9, "timestamps": [[0, 1]], "sentences": ["x"]} | change
    with pytest.raises(InputError, match=rf"source.json, video 'v_x': .*'{next(iter(change))}'"):
        read_activitynet(json_file(tmp_path, {"v_x": entry}))


# --- Videos


def test_videos_are_found_by_whole_name_whatever_the_container(tmp_path):
    names = ["a.mkv", "-b_@N00.mp4", "v_*.webm", "c.MOV", "d.", "e", "b.txt", "f.mp4.part", "aa.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "g.mp4").mkdir()
    ids = ["c", "v_*", "a", "-b_@N00", "d", "e", "b", "f", "g", "nowhere", "a"]
    videos = find_videos(tmp_path, ids)
    assert [video.id for video in videos] == ids and all(video.seconds is None for video in videos)
    found = ["c.MOV", "v_*.webm", "a.mkv", "-b_@N00.mp4", "d.", "e", None, None, None, None, "a.mkv"]
    assert [video.path and video.path.name for video in videos] == found


def test_of_two_files_of_one_video_mp4_comes_first_and_then_the_name(tmp_path):
    for name in ("x.avi", "x.mp4", "y.webm", "y.avi", "z.mp4"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(CorpusWarning, match="2 ids with several files"):
        videos = find_videos(tmp_path, ["x", "y", "z"])
    assert [video.path.name for video in videos] == ["x.mp4", "y.avi", "z.mp4"]


def test_a_missing_folder_of_videos_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        find_videos(tmp_path / "nowhere", ["a"])


# --- The real files: DATASETS 1, 2.1, 2.2 and 2.3


@real
@pytest.mark.parametrize(
    ("name", "rows", "videos", "late", "most"),
    [
        ("verified_fig/charades_fig_train.jsonl.gz", 12408, 5338, 1770, 24.8),
        ("verified_fig/charades_fig_test.jsonl.gz", 3720, 1334, 543, 1.47),
        ("verified_fig/didemo_fig_val.jsonl.gz", 4175, 1064, 184, 2.94),
        ("verified_fig/didemo_fig_test.jsonl.gz", 4013, 1002, 150, 2.95),
        ("fixtures/charades_fig_train.mini.jsonl", 32, 10, 7, None),
        ("fixtures/charades_fig_test.mini.jsonl", 74, 25, 15, None),
        ("fixtures/didemo_fig_val.mini.jsonl", 46, 10, 10, None),
        ("fixtures/didemo_fig_test.mini.jsonl", 82, 20, 8, None),
    ],
)
def test_real_fig_files_have_the_counted_rows_videos_and_late_spans(name, rows, videos, late, most):
    queries = read_fig(REAL / name)
    excess = [query.span[1] - query.duration for query in queries if query.span[1] > query.duration]
    assert (len(queries), len(gallery_ids(queries)), len(excess)) == (rows, videos, late)
    assert most is None or round(max(excess), 2) == most
    starts_late = sum(query.span[0] >= query.duration for query in queries)
    assert starts_late == (1 if "charades_fig_train.jsonl" in name else 0)


@real
@pytest.mark.parametrize(
    ("name", "reader", "rows", "videos"),
    [
        ("charades_sta/charades_sta_train.txt.gz", read_charades_sta, 12408, 5338),
        ("charades_sta/charades_sta_test.txt", read_charades_sta, 3720, 1334),
        ("fixtures/charades_sta_test.mini.txt", read_charades_sta, 40, None),
        ("didemo/val_data.json.gz", read_didemo, 4180, 1065),
        ("didemo/test_data.json.gz", read_didemo, 4021, 1004),
        ("activitynet_captions/val_1.json.gz", read_activitynet, 17505, 4917),
        ("activitynet_captions/val_2.json.gz", read_activitynet, 17031, 4885),
        ("fixtures/anet_val_1.mini.json", read_activitynet, 46, 12),
        ("fixtures/anet_val_2.mini.json", read_activitynet, 43, 12),
    ],
)
def test_real_source_files_have_the_counted_rows_and_videos(name, reader, rows, videos):
    queries = reader(REAL / name)
    assert len(queries) == rows and videos in (None, len(gallery_ids(queries)))
    assert len({query.id for query in queries}) == rows
    assert all(query.text and "\n" not in query.text for query in queries)


@real
def test_the_didemo_fixture_holds_three_entries_twice():
    with pytest.warns(CorpusWarning, match="3 repeated entries skipped"):
        assert len(read_didemo(REAL / "fixtures/didemo_val.mini.json")) == 35


@real
def test_real_activitynet_train_has_two_reversed_and_two_empty_spans():
    with pytest.warns(CorpusWarning, match=r"2 reversed spans swapped, 2 empty spans kept"):
        queries = read_activitynet(REAL / "activitynet_captions/train.json.gz")
    behind = [round(query.span[1] - query.duration, 2) for query in queries]
    assert (len(queries), len(gallery_ids(queries)), behind.count(0.01), max(behind)) == (
        37421,
        10009,
        29,
        0.01,
    )


@real
@pytest.mark.parametrize(("split", "different"), [("train", 4), ("test", 1)])
def test_charades_fig_is_charades_sta_but_for_the_stated_rows(split, different):
    fig = read_fig(REAL / f"verified_fig/charades_fig_{split}.jsonl.gz")
    (path,) = (REAL / "charades_sta").glob(f"charades_sta_{split}.txt*")
    sta = read_charades_sta(path)
    rows = [
        Counter((query.video, query.span, query.coarse.lower()) for query in queries)
        for queries in (fig, sta)
    ]
    assert sum((rows[0] - rows[1]).values()) == sum((rows[1] - rows[0]).values()) == different


@real
@pytest.mark.parametrize(("split", "dropped", "videos_dropped"), [("val", 5, 1), ("test", 8, 2)])
def test_the_didemo_rule_gives_every_span_of_the_fig_file(split, dropped, videos_dropped):
    fig = read_fig(REAL / f"verified_fig/didemo_fig_{split}.jsonl.gz")
    source = {query.id: query for query in read_didemo(REAL / f"didemo/{split}_data.json.gz")}
    for query in fig:
        assert (query.span, query.video) == (source[query.id].span, source[query.id].video), query.id
    assert len(source) - len(fig) == dropped
    assert len(gallery_ids(source.values())) - len(gallery_ids(fig)) == videos_dropped


@real
@pytest.mark.parametrize("name", ["charades_fig_test", "didemo_fig_val", "didemo_fig_test"])
def test_a_real_fig_file_survives_writing_and_reading(tmp_path, name):
    queries = read_fig(REAL / f"verified_fig/{name}.jsonl.gz")
    write_fig(tmp_path / "again.jsonl", queries)
    assert read_fig(tmp_path / "again.jsonl") == queries


@real
def test_texts_repeat_in_the_benchmark_so_they_cannot_be_keys():
    videos = defaultdict(set)
    for query in (queries := read_fig(REAL / "verified_fig/charades_fig_test.jsonl.gz")):
        videos[query.text].add(query.video)
    assert len(queries) - len(videos) == 13
    assert sum(len(videos[query.text]) > 1 for query in queries) == 2
