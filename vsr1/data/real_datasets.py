"""The real data sets, from the files of their owners into the folders of a run.

data/<dataset>/annotations/  VERIFIED's files, named as in `corpus.FILES`
data/<dataset>/videos/       any container, also one folder down
"""

import csv
import os
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

from vsr1 import cache
from vsr1.config import ROOT, InputError
from vsr1.data import annotations

SPLITS = ("train", "test")
# What lies beside downloaded videos and is none. Whatever else has a video's name is tried, and named if unreadable.
BESIDE = (
    ".json .txt .csv .xml .md5 .srt .vtt .jpg .jpeg .png .webp .npy .part .ytdl .tmp .m4a .mp3 .wav".split(
        " "
    )
)


def annotation_files(profile, dataset: str) -> list[Path]:
    """The files of (train, test), in a folder where they need not be."""
    return [ROOT / profile.data / dataset / "annotations" / name for name in annotations.FILES[dataset]]


def locate(folder: Path, ids) -> dict[str, list[Path]]:
    """{id: its files} for the ids that have any in a folder or one folder below; `.mp4` first, then known containers.

    Names are compared whole, but for one ending or two (`x.mp4.webm`) and the `v_` that downloads of ActivityNet lack.
    """
    try:
        top = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        entries = top + [file for entry in top if entry.is_dir() for file in os.scandir(entry.path)]
        files = [Path(entry.path) for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); put the videos there") from error
    kind = lambda file: file.suffix.lower()  # noqa: E731
    ids, found = set(ids), {}
    for file in sorted(
        files, key=lambda file: (kind(file) != ".mp4", kind(file) not in annotations.CONTAINERS, file)
    ):
        stem = os.path.splitext(file.name)[0]
        names = (file.name, stem, os.path.splitext(stem)[0])
        known = [mark + name for name in names for mark in ("", "v_") if mark + name in ids]
        if known and kind(file) not in BESIDE:
            found.setdefault(known[0], []).append(file)
    return found


def videos(profile, dataset: str) -> tuple[dict[str, list[str]], dict[str, list[Path]]]:
    """({split: ids of its videos}, {id: its files}) of a data set whose annotations are there."""
    files, folder = annotation_files(profile, dataset), ROOT / profile.data / dataset / "videos"
    ids = {
        split: annotations.gallery_ids(annotations.read_fig(file))
        for split, file in zip(SPLITS, files, strict=True)
    }
    return ids, locate(folder, chain(*ids.values())) if folder.is_dir() else {}


def prepare(profile, dataset: str) -> None:
    """Make corpus and videos of a real data set current (`vsr1.data.source`)."""
    import_dataset(profile, dataset)


def reply_writer(profile, dataset: str) -> None:
    """Return None: nobody knows what real videos show (`vsr1.data.source`)."""


def import_dataset(profile, dataset: str) -> Path:
    """The real data set under runs/<profile>/<dataset>/: `corpus/{train,test}.jsonl`, and `videos/` full of links.

    A video without a file is named in `videos/missing.csv`, and one line says how many there are. The videos count by
    name and size: reading them all to notice a changed byte would take longer than it is worth.
    """
    home, source, files = (
        profile.data_dir(dataset),
        ROOT / profile.data / dataset,
        annotation_files(profile, dataset),
    )
    for file in files:
        if not file.exists():
            raise InputError(f'{file}: not there; README, "Real data", says what goes where')

    def annotate(folder):
        for split, file in zip(SPLITS, files, strict=True):
            annotations.write_fig(folder / f"{split}.jsonl", annotations.read_fig(file))

    inputs = {"files": [cache.file_digest(file) for file in files], "code": cache.source_digest(__name__)}
    cache.build(home / "corpus", inputs, annotate)
    queries = {split: annotations.read_fig(home / "corpus" / f"{split}.jsonl") for split in SPLITS}
    asked = Counter((query.video, split) for split in SPLITS for query in queries[split])
    found = locate(source / "videos", (video for video, _ in asked))
    if not found:
        example = f"{min(asked)[0]}.mp4"
        raise InputError(
            f"{source}/videos: none of the annotated videos is there; name them as annotated: {example}"
        )
    several = sum(len(some) > 1 for some in found.values())
    if several:
        warnings.warn(
            f"{source}/videos: {several} ids with several files, first taken",
            annotations.CorpusWarning,
            stacklevel=2,
        )
    missing = [[video, split, count] for (video, split), count in sorted(asked.items()) if video not in found]
    links = sorted(_link(video, some[0]) for video, some in found.items())

    def link(folder):
        for name, path, _ in links:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(path)
        with open(folder / "missing.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video", "split", "queries"), *missing])

    folder = cache.build(home / "videos", {"videos": links, "missing": missing}, link)
    if missing and cache.dist_state().is_main_process:
        told = f"{len(missing)} of {len(asked)} videos are missing ({len(missing) / len(asked):.1%})"
        test = sum(split == "test" for _, split, _ in missing), len(annotations.gallery_ids(queries["test"]))
        print(f"{dataset}: {told}, {test[0]} of {test[1]} in test: {folder / 'missing.csv'}", flush=True)
    return folder


def _link(video, file):
    """[name, where it leads, bytes]. An ending that `corpus.find_videos` does not know is dropped: content decides."""
    ending = file.suffix if file.suffix.lower() in annotations.CONTAINERS else ""
    return [video + ending, str(file.resolve()), file.stat().st_size]
