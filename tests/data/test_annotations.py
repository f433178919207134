"""The readers on small files with every quirk, and on the real files where a developer has them."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest
from pydantic import BaseModel

from vsr1.config import PACKAGE, InputError
from vsr1.data import annotations
from vsr1.data.annotations import (
    SPECIAL_TOKEN,
    CorpusWarning,
    find_videos,
    gallery_ids,
    parse_json,
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


def test_every_special_token_of_the_shipped_tokenizer_is_known():
    tokenizer = json.loads((PACKAGE / "mini/weights/policy/tokenizer.json").read_text(encoding="utf-8"))
    names = [token["content"] for token in tokenizer["added_tokens"] if "|" in token["content"]]
    assert "<|video_pad|>" in names and all(map(SPECIAL_TOKEN.fullmatch, names))
    assert not SPECIAL_TOKEN.search("a < b |> c, <|>, <| x |>, <person>")


def test_an_entry_of_a_list_is_named_by_its_number_and_key():
    class Row(BaseModel):
        times: tuple[float, float]

    rows = [{"times": [1, 2]}, {"times": [1, True]}]
    with pytest.raises(
        InputError, match=r"^rows.json, entry 2: 'times\[1\]': must be a valid number, found True$"
    ):
        parse_json(json.dumps(rows), "rows.json", kind=list[Row])


def test_numbers_are_read_as_python_reads_them():
    values = [0.1, 1 / 3, 5e-324, 1e22, 123456789012345678901234567890, 1.7976931348623157e308]
    text = (
        json.dumps(values)[:-1]
        + ", 1.00000000000000011102230246251565404236316680908203125, 9007199254740993.0]"
    )
    assert parse_json(text, "x") == json.loads(text)


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


# --- Videos


def test_videos_are_found_by_whole_name_whatever_the_container(tmp_path):
    names = ["a.mkv", "-b_@N00.mp4", "v_*.webm", "c.MOV", "d.", "e", "b.txt", "f.mp4.part", "aa.mp4"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "g.mp4").mkdir()
    ids = ["c", "v_*", "a", "-b_@N00", "d", "e", "b", "f", "g", "nowhere", "a"]
    videos = find_videos(tmp_path, ids)
    assert [video.id for video in videos] == ids
    file_names = ["c.MOV", "v_*.webm", "a.mkv", "-b_@N00.mp4", "d.", "e", None, None, None, None, "a.mkv"]
    assert [video.path and video.path.name for video in videos] == file_names


def test_of_two_files_of_one_video_mp4_comes_first_and_then_the_name(tmp_path):
    for name in ("x.avi", "x.mp4", "y.webm", "y.avi", "z.mp4"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(CorpusWarning, match="2 ids with several files"):
        videos = find_videos(tmp_path, ["x", "y", "z"])
    assert [video.path.name for video in videos] == ["x.mp4", "y.avi", "z.mp4"]


def test_a_missing_folder_of_videos_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        find_videos(tmp_path / "nowhere", ["a"])


# --- The real files, as counted in docs/data.md sections 1 and 2


def plainly(path):
    """The same by Python's own json, without any check."""
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    keys = ("desc_id", "video", "time", "fig_desc", "cog_desc", "duration")
    rows = [[row[key].strip() if isinstance(row[key], str) else row[key] for key in keys] for row in rows]
    return [(*row[:2], tuple(sorted(row[2])), *row[3:]) for row in rows]


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
def test_real_fig_files_have_the_counted_rows_videos_and_late_spans(name, rows, videos, late, most, tmp_path):
    queries = read_fig(REAL / name)
    write_fig(tmp_path / "again.jsonl", queries)
    assert read_fig(tmp_path / "again.jsonl") == queries
    assert [(q.id, q.video, q.span, q.text, q.coarse, q.duration) for q in queries] == plainly(REAL / name)
    excess = [query.span[1] - query.duration for query in queries if query.span[1] > query.duration]
    assert (len(queries), len(gallery_ids(queries)), len(excess)) == (rows, videos, late)
    assert most is None or round(max(excess), 2) == most


@real
def test_texts_repeat_in_the_benchmark_so_they_cannot_be_keys():
    videos = defaultdict(set)
    for query in (queries := read_fig(REAL / "verified_fig/charades_fig_test.jsonl.gz")):
        videos[query.text].add(query.video)
    assert len(queries) - len(videos) == 13
    assert sum(len(videos[query.text]) > 1 for query in queries) == 2


# --- validation


def queries_of(videos):
    return [annotations.Query(n, "text", video, (0.0, 1.0), "", 1.0) for n, video in enumerate(videos)]


def test_without_families_every_tenth_video_is_held_out():
    queries = queries_of([f"v{n // 2:03}" for n in range(200)])
    learn, held = annotations.split_validation(queries, 0.1)
    assert {q.video for q in held} == {f"v{n:03}" for n in range(5, 100, 10)}
    assert len(learn) + len(held) == len(queries) and len(held) == 20


def test_no_family_is_on_both_sides_and_families_of_all_sizes_are_held_out():
    families = {f"v{f}-{n}": f"family {f}" for f in range(100) for n in range(1 if f % 2 else 7)}
    queries = queries_of([*families, "alone"])
    learn, held = annotations.split_validation(queries, 0.1, families)
    sides = [{families.get(q.video, q.video) for q in side} for side in (learn, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 10
    assert len(held) == 5 + 5 * 7  # as many small families as large ones


def test_a_corpus_of_too_few_families_is_split_by_video():
    families = {f"v{n}": "all of one" for n in range(20)}
    learn, held = annotations.split_validation(queries_of(families), 0.1, families)
    assert len(held) == 2 and len(learn) == 18
