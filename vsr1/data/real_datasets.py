"""Import the real data sets: from the files of their owners into the folders of a run (`vsr1.data.source`).

data/<dataset>/annotations/  VERIFIED's files, named as in `annotations.FILES`
data/<dataset>/videos/       any container, also one folder down
"""

import csv
import os
from collections import Counter
from pathlib import Path

from vsr1 import cache
from vsr1.config import ROOT, InputError
from vsr1.data import annotations

SPLITS = ("train", "test")
# Endings of what lies beside downloaded videos. Any other file with a video's name is tried, and named if unreadable.
NO_VIDEO = (
    ".json .txt .csv .xml .md5 .srt .vtt .jpg .jpeg .png .webp .npy .part .ytdl .tmp .m4a .mp3 .wav".split()
)


def annotation_files(profile, dataset: str) -> list[Path]:
    """Return where the files of (train, test) should be; they need not be there."""
    return [ROOT / profile.data / dataset / "annotations" / name for name in annotations.FILES[dataset]]


def locate(folder: Path, ids) -> dict[str, list[Path]]:
    """Return {id: its files} for the ids that have any in a folder or one folder below.

    Of several files `.mp4` comes first, then other known containers. Names are compared whole, but for one ending or
    two (`x.mp4.webm`) and the `v_` that downloads of ActivityNet lack.
    """
    ids, files = set(ids), {}
    for path in sorted(_list_files(folder), key=_preference):
        stem = os.path.splitext(path.name)[0]
        names = (path.name, stem, os.path.splitext(stem)[0])
        matches = [prefix + name for name in names for prefix in ("", "v_") if prefix + name in ids]
        if matches and path.suffix.lower() not in NO_VIDEO:
            files.setdefault(matches[0], []).append(path)
    return files


def _list_files(folder):
    try:
        top = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        entries = top + [file for entry in top if entry.is_dir() for file in os.scandir(entry.path)]
        return [Path(entry.path) for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); put the videos there") from error


def _preference(path):
    ending = path.suffix.lower()
    return ending != ".mp4", ending not in annotations.CONTAINERS, path


def videos(profile, dataset: str, fig_files) -> tuple[Counter, dict[str, list[Path]]]:
    """Return ({(video, split): its queries}, {video: its files}), from the FIG files of train and test."""
    counts = Counter(
        (query.video, split)
        for split, file in zip(SPLITS, fig_files, strict=True)
        for query in annotations.read_fig(file)
    )
    folder = ROOT / profile.data / dataset / "videos"
    files = locate(folder, {video for video, _ in counts}) if folder.is_dir() else {}
    return counts, files


def prepare(profile, dataset: str) -> None:
    """Make corpus/{train,test}.jsonl and videos/, which is full of links, current (`vsr1.data.source`).

    A video without a file is named in `videos/missing.csv`, and one line says how many there are. The videos count by
    name and size: to read them all for a changed byte would take longer than it is worth.
    """
    corpus, home = _import_annotations(profile, dataset), ROOT / profile.data / dataset / "videos"
    counts, files = videos(profile, dataset, [corpus / f"{split}.jsonl" for split in SPLITS])
    if not files:
        example = f"{min(counts)[0]}.mp4"
        raise InputError(f"{home}: none of the annotated videos is there; name them as annotated: {example}")
    several = sum(len(paths) > 1 for paths in files.values())
    annotations.warn_repairs(home, {"ids with several files, first taken": several})
    missing = [[video, split, n] for (video, split), n in sorted(counts.items()) if video not in files]
    links = sorted(_link(video, paths[0]) for video, paths in files.items())

    def link(folder):
        for name, target, _ in links:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        with open(folder / "missing.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video", "split", "queries"), *missing])

    inputs = {"videos": links, "missing": missing}
    folder = cache.build(profile.data_dir(dataset) / "videos", inputs, link)
    if missing and cache.dist_state().is_main_process:
        summary = f"{len(missing)} of {len(counts)} videos are missing ({len(missing) / len(counts):.1%})"
        lacking, total = (sum(split == "test" for _, split, *_ in rows) for rows in (missing, counts))
        print(f"{dataset}: {summary}, {lacking} of {total} in test: {folder / 'missing.csv'}", flush=True)


def reply_writer(profile, dataset: str) -> None:
    """Return None: nobody knows what real videos show (`vsr1.data.source`)."""


def _import_annotations(profile, dataset):
    """Return corpus/, with the queries of both splits under names that every data source has."""
    files = annotation_files(profile, dataset)
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: not there; docs/real_data.md says what goes where")

    def write(folder):
        for split, file in zip(SPLITS, files, strict=True):
            queries = annotations.read_fig(file)
            annotations.warn_oddities(file, queries)
            annotations.write_fig(folder / f"{split}.jsonl", queries)

    inputs = {"files": [cache.file_digest(file) for file in files], "code": cache.source_digest(__name__)}
    return cache.build(profile.data_dir(dataset) / "corpus", inputs, write)


def _link(video, file):
    """Return [name, target, bytes]. An ending that `find_videos` does not know is dropped: content decides."""
    ending = file.suffix if file.suffix.lower() in annotations.CONTAINERS else ""
    return [video + ending, str(file.resolve()), file.stat().st_size]
