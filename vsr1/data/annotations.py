"""Read annotation files into queries, and find the files of their videos.

The files are those of VERIFIED's FIG benchmark, one JSON object a line; `docs/data.md` section 2 counts what is odd in
them. Three rules hold everywhere:

- a query is known by its id, never by its text: texts repeat, within a video and across videos;
- the ground truth is never clamped to the video: 543 of the 3,720 Charades-FIG test spans end behind it;
- what can be repaired without a choice (reversed times, blank lines) is repaired and counted in one
  `CorpusWarning` per file; everything else is an `InputError` that names the file and the line.
"""

import functools
import gzip
import json
import os
import re
import typing
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from vsr1.config import InputError

# (train, test) of the benchmark; val_1 of ActivityNet annotates the test videos a second time and is not used.
FILES = {
    "charades": ("charades_fig_train.jsonl", "charades_fig_test.jsonl"),
    "didemo": ("didemo_fig_train.jsonl", "didemo_fig_test.jsonl"),
    "activitynet": ("activitynet_fig_train.jsonl", "activitynet_fig_val_2.jsonl"),
}
# A lone dot is real: 119 DiDeMo test rows name `x.`; a file may have lost even the dot.
CONTAINERS = (
    ".mp4 .m4v .mov .qt .mkv .webm .avi .mpg .mpeg .mpe .m2v .wmv .asf .flv .f4v .3gp .3g2 .ogv .ogm .mts .m2ts .m2t "
    ".ts .vob .mod .mxf .divx .dv .rm .rmvb .nut . "
).split(" ")
# What the tokenizer reads as one of the models' own tokens: a turn, a frame, the request to search again.
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|<REFINE>")
# In the corpus: ids of all videos that are searched in a split; a corpus may lack it.
GALLERY = "{}_gallery.txt"


class CorpusWarning(UserWarning):
    """Something was repaired or passed over; the message names the file and counts."""


@dataclass(frozen=True)
class Query:
    """One sentence, the one video it describes, and the moment in it."""

    id: int  # `desc_id`, the only key of a query
    text: str  # what is searched for: `fig_desc`
    video: str  # id, without extension
    span: tuple[float, float]  # seconds, start <= end; may end after the video
    coarse: str  # the caption before VERIFIED rewrote it; never a query of the benchmark
    duration: float | None  # seconds, of the video; None: unknown


@dataclass(frozen=True)
class Video:
    """One video of a gallery and where it lies."""

    id: str
    path: Path | None  # None: no file found; its queries stay in every denominator


# --- Files to texts and checked values


def read_text(path):
    """Read a UTF-8 file; `.gz` is unpacked, a byte order mark is dropped."""
    try:
        content = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as UTF-8 text ({reason}); check the file") from error


def parse_json(text, path, line=None, kind=typing.Any):
    """Parse a JSON text; InputError names the file, the line, the key, what it must be and what was found.

    line  of the file, from 1, where the text is one line of it
    kind  what the value must be, a type that pydantic checks: a model, list[model], dict[str, int]; types are strict,
          so `true` is no integer
    """
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    source = f"{path}, line {line}" if line else str(path)
    if fault["type"] == "json_invalid":
        message, _, position = fault["ctx"]["error"].rpartition(" at line ")
        line = line or position.split()[0]
        raise InputError(f"{path}, line {line}: not JSON ({message}); take the file anew")
    message = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    actual = "" if fault["type"] == "missing" else f", found {fault['input']!r:.60}"
    raise InputError(f"{source}{_key_path(fault['loc'])}: {message}{actual}")


_adapter = functools.cache(TypeAdapter)


def _key_path(keys):
    """Say where in a JSON value a fault is.

    >>> _key_path((3, "meta", "times", 0))
    ", entry 4: 'meta.times[0]'"
    """
    entry = ""
    if keys and isinstance(keys[0], int):
        entry, keys = f", entry {keys[0] + 1}", keys[1:]
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
    return f"{entry}: {path!r}" if path else entry


def numbered_lines(text):
    """Return (line number from 1, line) of every line that is not blank, and how many are blank.

    Only a line feed ends a line: JSON strings may hold the other line ends of Unicode as they are.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    full = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    return full, len(lines) - len(full)


def warn_repairs(path, counts):
    """Warn once about all that was repaired in a file; silent when nothing was."""
    repairs = [f"{n} {repair}" for repair, n in counts.items() if n]
    if repairs:
        warnings.warn(f"{path}: {', '.join(repairs)}", CorpusWarning, stacklevel=3)


# --- FIG files


def without_special_tokens(text: str) -> str:
    """Return `text`; ValueError if it holds a special token, which would end a turn or stand for frames."""
    if token := SPECIAL_TOKEN.search(text):
        raise ValueError(f"holds {token[0]}, a special token of the models; remove it")
    return text


def checked_id(id: str) -> str:
    """Return `id`; ValueError if it cannot be the name of a file, or would be one in another folder."""
    if id in (".", "..") or "/" in id or "\\" in id or not id.isprintable():
        raise ValueError("is no name of a file: it holds a separator or a control character")
    return id


def not_blank(text: str) -> str:
    """Return `text`; ValueError if nothing in it can be seen."""
    if not any(sign.isprintable() and not sign.isspace() for sign in text):
        raise ValueError("is empty; a query needs words")
    return text


Name = typing.Annotated[str, StringConstraints(min_length=1)]
PlainText = typing.Annotated[str, AfterValidator(without_special_tokens)]


class FigRow(BaseModel):
    """One line of a FIG file; the keys in the order of the released files (`docs/data.md` section 2)."""

    model_config = ConfigDict(strict=True)

    video: typing.Annotated[Name, AfterValidator(checked_id)]
    time: tuple[FiniteFloat, FiniteFloat]
    desc_id: int
    duration: typing.Annotated[FiniteFloat, Field(gt=0)]
    cog_desc: PlainText
    fig_desc: typing.Annotated[PlainText, AfterValidator(not_blank)]
    fig_desc_score: FiniteFloat | None  # nothing reads it

    def query(self) -> Query:
        """Return the query, with its times in order and without outer blanks."""
        span = min(self.time), max(self.time)
        text, coarse = self.fig_desc.strip(), self.cog_desc.strip()
        return Query(self.desc_id, text, self.video, span, coarse, self.duration)


def read_fig(path) -> list[Query]:
    """Read the queries of a FIG file, in its order; InputError names file, line and key of what is wrong."""
    lines, blank = numbered_lines(read_text(path))
    queries, swapped = {}, 0
    for n, line in lines:
        row = parse_json(line, path, n, FigRow)
        if row.desc_id in queries:
            raise InputError(
                f"{path}, line {n}: desc_id {row.desc_id} was used before; every query needs its own"
            )
        swapped += row.time[0] > row.time[1]
        queries[row.desc_id] = row.query()
    warn_repairs(path, {"reversed spans swapped": swapped, "blank lines skipped": blank})
    return list(queries.values())


def warn_oddities(path, queries) -> None:
    """Warn once about what is odd in a FIG file and is kept, since the ground truth is never changed."""
    counts = {
        "empty spans, which no answer overlaps": sum(q.span[0] == q.span[1] for q in queries),
        "spans that begin before the video": sum(q.span[0] < 0 for q in queries),
        "spans that begin behind its end": sum(q.span[0] >= q.duration for q in queries),
        "queries without a coarse caption": sum(not q.coarse for q in queries),
        "videos of two durations": len({(q.video, q.duration) for q in queries}) - len(gallery_ids(queries)),
    }
    warn_repairs(path, {f"{oddity}: kept": count for oddity, count in counts.items()})


def write_fig(path, queries):
    """Write queries as a FIG file: ASCII, one line each; the score is null, for nobody judged them."""
    with open(path, "w", encoding="ascii", newline="\n") as file:
        for query in queries:
            values = (query.video, query.span, query.id, query.duration, query.coarse, query.text, None)
            row = dict(zip(FigRow.model_fields, values, strict=True))
            file.write(json.dumps(row, allow_nan=False) + "\n")


# --- Queries and videos of a split


def gallery_ids(queries, corpus=None, split=None):
    """Return the ids of the videos that are searched, sorted, each once: those of the queries of one split.

    corpus, split  where `write_gallery` may have listed videos that no query asks for
    """
    ids = {query.video for query in queries}
    if corpus is not None:
        path = corpus / GALLERY.format(split)
        ids.update(read_text(path).split("\n")[:-1] if path.exists() else [])
    return sorted(ids)


def write_gallery(corpus: Path, split: str, videos: list[str]) -> None:
    """List the videos that are searched in a split, one id a line: also those that no query asks for."""
    (corpus / GALLERY.format(split)).write_text(
        "".join(f"{video}\n" for video in sorted(videos)), encoding="utf-8"
    )


def split_validation(queries, fraction, families=None):
    """Return (queries to learn from, queries held out): all those of a `fraction` of the families.

    Large and small families are held out alike. Where that is less than half a family, it is a fraction of the videos.

    families  {video: family}, see `vsr1.data.source`; a video that is not in it is its own family
    """
    videos, families = gallery_ids(queries), families or {}
    members = {}
    for video in videos:
        members.setdefault(families.get(video, video), []).append(video)
    groups = sorted(members.values(), key=lambda group: (len(group), group))
    if fraction * len(groups) < 0.5:
        groups = [[video] for video in videos]
    count = round(fraction * len(groups))
    chosen = (groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count))
    held_out = {video for group in chosen for video in group}
    return [q for q in queries if q.video not in held_out], [q for q in queries if q.video in held_out]


def evenly_spaced(queries: list, count: int | None) -> list:
    """Return at most `count` of the queries, spread evenly, in their order; all of them without a count.

    >>> evenly_spaced([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 2, 4]
    """
    count = len(queries) if count is None else min(count, len(queries))
    return [queries[i * len(queries) // count] for i in range(count)]


def find_videos(folder, ids):
    """Return one `Video` per id, in the order of ids; where several files have the id, `.mp4` first, then by name.

    The folder is listed once and names are compared whole: an id holds `@` or `-` and is never a pattern.
    """
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror}); name the folder of videos"
        ) from error
    files = {}
    for path in sorted(paths, key=lambda path: (path.suffix.lower() != ".mp4", path.name)):
        stem, ending = os.path.splitext(path.name)
        if ending.lower() in CONTAINERS:
            files.setdefault(stem, []).append(path)
    ids = list(ids)
    several = sum(len(files.get(id, [])) > 1 for id in set(ids))
    warn_repairs(folder, {"ids with several files, first taken": several})
    return [Video(id, files.get(id, [None])[0]) for id in ids]
