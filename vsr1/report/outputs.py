"""Make published files again only where what they are made of has changed, or they themselves."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vsr1 import cache
from vsr1.config import PACKAGE, Profile


def keep_current(
    profile: Profile, make: Callable[[Profile], list[Path]], inputs: Iterable[Path], more=None
) -> bool:
    """Call `make`, which returns the paths of what it wrote, unless that is as its last call left it.

    inputs   files and folders that decide the content; one that does not exist counts as such
    more     json-able: what else decides it

    Counts as well: the code of `make`'s module and all it imports, templates, drawings, knobs. Returns whether it was
    called. What is remembered lies in runs/, so a clone publishes everything once.
    """
    shapes = [path for path in (PACKAGE / "report").rglob("*.*") if path.suffix not in (".py", ".pyc")]
    code = cache.source_digest(make.__module__), cache.file_digest(*sorted(shapes))
    files = {str(path): cache.file_digest(path) for path in inputs if path.exists()}
    key = cache.fingerprint([code, profile.name, profile.digest(), files, more])
    with cache.updated_json(profile.run_root() / "published.json") as parts:
        part = f"{os.path.relpath(profile.results(), profile.run_root())}: {make.__module__}.{make.__name__}"
        left = parts.get(part, {"files": {}})
        if left.get("key") == key and all(map(_unchanged, left["files"], left["files"].values())):
            return False
        parts[part] = {"key": key, "files": {str(path): cache.file_digest(path) for path in make(profile)}}
    return True


def _unchanged(path, digest):
    return Path(path).exists() and cache.file_digest(Path(path)) == digest
