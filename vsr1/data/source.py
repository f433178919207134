"""Find the module that provides a profile's corpus, videos and replies: its knob `data_source`.

Such a module has two functions:

prepare(profile, dataset) -> None
    Make `profile.data_dir(dataset)` / corpus and / videos current: rendered, or imported from real files. A step that
    is current stays as it is. corpus/ holds train.jsonl and test.jsonl (FIG files), videos/ one file or link per id.

reply_writer(profile, dataset) -> None | (reply, caption)
    Return two functions of somebody who knows what the videos show, or None: then replies come from the released file
    or from a teacher model. The corpus must be current.
    reply(query, shown_video)    the whole reply of stage 1, reasoning and verdict, as text
    caption(query, shown_video)  what of the video decides about the query, as text: it stands for the frames

    query        an `annotations.Query`
    shown_video  the id of any video of the corpus

It may have a third:

families(profile, dataset) -> {video: family}
    Name the videos that are near-duplicates of each other: those of one family. A family lies in one split. Validation
    holds out whole families, and intervals draw whole families. The corpus must be current. Without this function, and
    for videos it leaves out, every video is a family of its own.

The import is by name, so the code of the module is not in a caller's `cache.source_digest(__name__)`. A step that
depends on replies or families adds `cache.source_digest(profile.data_source)` to its inputs.
"""

import importlib

from vsr1.config import InputError


def of(profile):
    """Import the module that `profile.data_source` names; InputError if there is no such module."""
    name = profile.data_source
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something it imports
        raise InputError(f"{profile.name}: data_source: no module {name!r}; check the name") from error
    lacking = [function for function in ("prepare", "reply_writer") if not hasattr(module, function)]
    if lacking:
        raise InputError(
            f"{profile.name}: data_source: {name} has no {lacking[0]}(); see vsr1/data/source.py"
        )
    return module


def families(profile, dataset: str) -> dict[str, str]:
    """Return {video: family} of a data set's videos; empty where the data source knows no families."""
    return of(profile).families(profile, dataset) if has_families(profile) else {}


def has_families(profile) -> bool:
    """Return whether the data source names families; without them every video stands for itself."""
    return hasattr(of(profile), "families")
