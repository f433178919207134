"""Queries and videos: annotation files in, `Query` and `Video` out.

Four formats are read: the FIG files of VERIFIED (the benchmark) and the three releases they were made from.
What is odd in them, and how often, is counted in DATASETS section 2. Three rules hold everywhere:

- a query is known by its id, never by its text: texts repeat, within a video and across videos;
- the ground truth is never clamped to the video: 543 of the 3,720 Charades-FIG test spans end behind it;
- what can be repaired without a choice (reversed times, blank lines) is repaired and counted in one
  `CorpusWarning` per file; everything else is an `InputError` that names the file and the line.
"""

import gzip
import json
import os
import sys
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vsr1.config import InputError

# (train, test) of the benchmark; val_1 of ActivityNet annotates the test videos a second time and is not used.
FILES = {
    "charades": ("charades_fig_train.jsonl", "charades_fig_test.jsonl"),
    "didemo": ("didemo_fig_train.jsonl", "didemo_fig_test.jsonl"),
    "activitynet": ("activitynet_fig_train.jsonl", "activitynet_fig_val_2.jsonl"),
}
# A lone dot is real: 119 DiDeMo test rows name `x.`; a file may have lost even the dot.
CONTAINERS = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .wmv .flv .3gp .ogv .mts .ts .vob .mod . ".split(" ")


class CorpusWarning(UserWarning):
    """Something was repaired or passed over; the message names the file and counts."""


@dataclass(frozen=True)
class Query:
    """One sentence, the one video it describes, and the moment in it."""

    id: int  # `desc_id`, the only key of a query
    text: str  # what is searched for: `fig_desc`, or the sentence of a source release
    video: str  # id, without extension
    span: tuple[float, float]  # seconds, start <= end; may end after the video
    coarse: str  # the caption before VERIFIED rewrote it; never a query of the benchmark
    duration: float | None  # seconds, of the video; None: not in the file (Charades-STA, DiDeMo)


@dataclass(frozen=True)
class Video:
    """One video of a gallery and where it lies."""

    id: str
    path: Path | None  # None: no file found; its queries stay in every denominator
    seconds: float | None  # None: not measured yet


# --- What a JSON value may be


def is_number(value):
    """Whether a JSON value is a finite number: neither a boolean, nor NaN, nor too big for a float.

    >>> [is_number(value) for value in (3, 0.5, True, None, "3", float("nan"), 10**400)]
    [True, True, False, False, False, False, False]
    """
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def is_span(value):
    """Whether a JSON value is one pair of finite numbers.

    >>> [is_span(value) for value in ([0, 2.5], [0], [0, 1, 2], [[0, 1], [2, 3]], None)]
    [True, False, False, False, False]
    """
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _is_vote(value):
    return is_span(value) and all(type(k) is int for k in value) and 0 <= value[0] <= value[1]


def _list_of(test):
    return lambda value: isinstance(value, list) and all(map(test, value))


INTEGER = ("an integer", lambda value: type(value) is int)  # exactly: Python counts `true` as an int
NUMBER = ("a finite number", is_number)
TEXT = ("a text", lambda value: isinstance(value, str))
NAME = ("a text that is not empty", lambda value: isinstance(value, str) and value != "")
SPAN = ("one [start, end] of finite numbers", is_span)
SPANS = ("a list of [start, end]", _list_of(is_span))
TEXTS = ("a list of texts", _list_of(TEXT[1]))
VOTES = ("votes [first, last segment]", lambda value: value != [] and _list_of(_is_vote)(value))
SCORE = ("a finite number or null", lambda value: value is None or is_number(value))

# The keys of each format; FIG in the order of the released files. Its score is read by nobody.
FIG = {
    **{"video": NAME, "time": SPAN, "desc_id": INTEGER, "duration": NUMBER},
    **{"cog_desc": TEXT, "fig_desc": TEXT, "fig_desc_score": SCORE},
}
DIDEMO = {"annotation_id": INTEGER, "description": TEXT, "video": NAME, "times": VOTES}
ACTIVITYNET = {"duration": NUMBER, "timestamps": SPANS, "sentences": TEXTS}


def check_object(value, kinds, where):
    """Refuse a JSON value that is no object, lacks a key of `kinds`, or holds something else there."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; it needs the keys {', '.join(kinds)}")
    for key, (wanted, fits) in kinds.items():
        if key not in value:
            raise InputError(f"{where}: no key {key!r}; it must be {wanted}")
        if not fits(value[key]):
            raise InputError(f"{where}: {key!r} must be {wanted}, found {value[key]!r:.60}")


# --- Files to texts and JSON


def read_text(path):
    """Content of a UTF-8 file; `.gz` is unpacked, a byte order mark is dropped."""
    try:
        content = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except OSError as error:  # a broken gzip header is one too
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from error


def _parse_int(digits):
    # Python refuses to read integers of more than 4,300 digits; as a float such a number is merely infinite.
    return int(digits) if len(digits) < 400 else float(digits)


def parse_json(text, path, line=None):
    """The value of a JSON text; not JSON is an `InputError` that names the line (of the file, from 1)."""
    try:
        return json.loads(text, parse_int=_parse_int)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {line or error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{path}, line {line or 1}: not readable as JSON (nested too deeply)") from error


def numbered_lines(text):
    """(line number from 1, line) of every line that is not blank, and how many are.

    Only a line feed ends a line: JSON strings may hold the other line ends of Unicode as they are.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    full = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    return full, len(lines) - len(full)


def _in_order(span):
    return float(min(span)), float(max(span))


def _warn_repairs(path, counts):
    """Warn once about all that was repaired in a file; silent when nothing was."""
    told = [f"{n} {what}" for what, n in counts.items() if n]
    if told:
        warnings.warn(f"{path}: {', '.join(told)}", CorpusWarning, stacklevel=3)


# --- The four formats


def read_fig(path):
    """The queries of a FIG file (JSON lines, DATASETS 2.1), in its order."""
    lines, blank = numbered_lines(read_text(path))
    queries, swapped = {}, 0
    for n, line in lines:
        row = parse_json(line, path, n)
        check_object(row, FIG, f"{path}, line {n}")
        key, text, coarse = row["desc_id"], row["fig_desc"].strip(), row["cog_desc"].strip()
        if key in queries:
            raise InputError(f"{path}, line {n}: desc_id {key} was used before; every query needs its own")
        swapped += row["time"][0] > row["time"][1]
        queries[key] = Query(key, text, row["video"], _in_order(row["time"]), coarse, float(row["duration"]))
    _warn_repairs(path, {"reversed spans swapped": swapped, "blank lines skipped": blank})
    return list(queries.values())


def write_fig(path, queries):
    """Write queries as a FIG file: ASCII, one line each; the score is null, for nobody judged them."""
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for query in queries:
            values = (query.video, query.span, query.id, query.duration, query.coarse, query.text, None)
            file.write(json.dumps(dict(zip(FIG, values, strict=True)), allow_nan=False) + "\n")


def _charades_line(line, where):
    head, mark, sentence = line.partition("##")  # the first one: a sentence may hold another
    try:
        video, start, end = head.split()
        span = [float(start), float(end)]
    except ValueError:
        span = None
    if not mark or not is_span(span):
        raise InputError(f"{where}: not 'VIDEO start end##sentence', found {line!r:.60}")
    return video, span, sentence.strip()


def read_charades_sta(path):
    """The queries of a Charades-STA file, `VIDEO start end##sentence.` a line; ids count its rows from 0."""
    lines, blank = numbered_lines(read_text(path))
    queries, swapped = [], 0
    for n, line in lines:
        video, span, text = _charades_line(line, f"{path}, line {n}")
        swapped += span[0] > span[1]
        queries.append(Query(len(queries), text, video, _in_order(span), text, None))
    _warn_repairs(path, {"reversed spans swapped": swapped, "blank lines skipped": blank})
    return queries


def voted_span(votes):
    """Seconds of the most frequent vote, the first listed on ties; vote [s, e] means segments s to e of 5 s.

    VERIFIED's rule, true of all 8,188 val and test rows. The last segment is not cut at the end of the video.

    >>> voted_span([[3, 3], [2, 3], [2, 3], [3, 3]])
    (15.0, 20.0)
    """
    start, end = Counter(map(tuple, votes)).most_common(1)[0][0]  # equal counts keep the order of the list
    return 5.0 * start, 5.0 * (end + 1)


def read_didemo(path):
    """The queries of a LocalizingMoments file (a JSON list), one span each by `voted_span`.

    The video is what precedes the last dot, so `x.mov` and `x.mp4` become one; the extension may be empty.
    An entry that stands there twice, word for word, is one query.
    """
    entries = parse_json(read_text(path), path)
    if not isinstance(entries, list):
        raise InputError(f"{path}: not a JSON list; expected a DiDeMo file such as val_data.json")
    queries = {}
    for n, entry in enumerate(entries, 1):
        check_object(entry, DIDEMO, f"{path}, entry {n}")
        key, text, span = entry["annotation_id"], entry["description"].strip(), voted_span(entry["times"])
        video = entry["video"].rpartition(".")[0] or entry["video"]
        query = Query(key, text, video, span, text, None)
        if queries.setdefault(key, query) != query:
            raise InputError(f"{path}, entry {n}: annotation_id {key} was used before, for another query")
    _warn_repairs(path, {"repeated entries skipped": len(entries) - len(queries)})
    return list(queries.values())


def read_activitynet(path):
    """The queries of an ActivityNet Captions file (a JSON object by video); ids count its sentences from 0.

    Line breaks and runs of blanks become one blank. An empty span stays in the count; nothing can hit it.
    """
    videos = parse_json(read_text(path), path)
    if not isinstance(videos, dict):
        raise InputError(f"{path}: not a JSON object; expected ActivityNet Captions such as val_2.json")
    queries, swapped, empty = [], 0, 0
    for video, entry in videos.items():
        check_object(entry, ACTIVITYNET, f"{path}, video {video!r}")
        spans, duration = entry["timestamps"], float(entry["duration"])
        if len(spans) != len(entry["sentences"]):
            raise InputError(f"{path}, video {video!r}: {len(spans)} 'timestamps', not one for each sentence")
        swapped += sum(start > end for start, end in spans)
        empty += sum(start == end for start, end in spans)
        for span, sentence in zip(spans, entry["sentences"], strict=True):
            text = " ".join(sentence.split())
            queries.append(Query(len(queries), text, video, _in_order(span), text, duration))
    _warn_repairs(path, {"reversed spans swapped": swapped, "empty spans kept": empty})
    return queries


# --- Videos


def gallery_ids(queries):
    """Ids of the videos that are searched, sorted: those of the queries of one split, each once."""
    return sorted({query.video for query in queries})


def split_validation(queries, share):
    """(queries to learn from, queries held out): all of a video on one side, every 1/share-th video held out."""
    videos = gallery_ids(queries)
    count = round(share * len(videos))
    held = {videos[(2 * at + 1) * len(videos) // (2 * count)] for at in range(count)}
    return [q for q in queries if q.video not in held], [q for q in queries if q.video in held]


def find_videos(folder, ids):
    """One `Video` per id, in the order of ids; where several files have the id, `.mp4` first, then by name.

    The folder is listed once and names are compared whole: an id holds `@` or `-` and is never a pattern.
    """
    try:
        files = [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror}); name the folder of videos"
        ) from error
    found = {}
    for file in sorted(files, key=lambda file: (file.suffix.lower() != ".mp4", file.name)):
        stem, ending = os.path.splitext(file.name)
        if ending.lower() in CONTAINERS:
            found.setdefault(stem, []).append(file)
    ids = list(ids)
    _warn_repairs(
        folder, {"ids with several files, first taken": sum(len(found.get(id, [])) > 1 for id in set(ids))}
    )
    return [Video(id, found.get(id, [None])[0], None) for id in ids]


def evenly_spaced(queries: list, count: int | None) -> list:
    """At most `count` of the queries, spread evenly, in their order; all of them without a count.

    >>> evenly_spaced([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 2, 4]
    """
    count = len(queries) if count is None else min(count, len(queries))
    return [queries[i * len(queries) // count] for i in range(count)]
