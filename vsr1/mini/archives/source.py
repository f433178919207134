"""Provide archives as a data source: corpora and videos rendered, replies by somebody who knows the camera.

The contract is that of `vsr1.data.source`, with the name of a corpus where that has a data set's.
"""

import functools
from dataclasses import asdict

from vsr1 import cache
from vsr1.config import InputError
from vsr1.mini import captions, renderer
from vsr1.mini import source as rendered
from vsr1.mini import teacher as rendered_teacher
from vsr1.mini.archives import casts, corpus, teacher

USE = ("rows", "test_queries")  # knobs of `config.ArchiveConfig` that no corpus depends on


def prepare(profile, name: str) -> None:
    """Render a corpus, unless it is current."""
    if name not in corpus.CASTS or profile.archives is None:
        remedy = f"`make archives` makes {', '.join(corpus.CASTS)} of a profile with archives"
        raise InputError(f"{profile.name}: no corpus {name} of archives; {remedy}")
    home, seed = profile.data_dir(name), profile.world.seed
    sizes = {knob: value for knob, value in asdict(profile.archives).items() if knob not in USE}
    inputs = {"world": asdict(profile.world), "archives": sizes, "corpus": name}
    inputs["code"] = cache.source_digest(__name__)
    write = functools.partial(corpus.write_corpus, corpus=name, settings=profile.archives, seed=seed)
    archives = corpus.read_archives(cache.build(home / "corpus", inputs, write))
    scenes = [scene for archive in archives for scene in archive.seen_scenes()]
    workers = renderer.num_workers(profile)
    draw = functools.partial(renderer.render_videos, profile.world, workers, scenes, f"render {name}")
    cache.build(home / "videos", inputs, functools.partial(draw, paints=casts.PAINTS))


def read(profile, name: str) -> list[corpus.Archive]:
    """Read the archives of a corpus."""
    home = profile.data_dir(name) / "corpus"
    return _read(home, (home / "archives.jsonl").stat().st_mtime_ns)


@functools.lru_cache(8)
def _read(home, _):
    """Read the archives below a folder; once, for every interval asks for their families."""
    return corpus.read_archives(home)


def families(profile, name: str) -> dict[str, str]:
    """Return {video: archive}: validation holds out whole archives, and intervals draw whole archives.

    The films of an archive share its cast, so they are less independent than films of a family alone.
    """
    return {scene.video: archive.name for archive in read(profile, name) for scene in archive.scenes}


def reply_writer(profile, name: str):
    """Return (reply, caption) of somebody who knows what was rendered; both take a query and a shown video's id."""
    truth = Truth(profile, name)
    return truth.reply, truth.caption


class Truth:
    """What the films of a corpus show: true moments of queries, seen moments of videos, casts."""

    def __init__(self, profile, name: str):
        self.profile, self.archive_of, self.scenes = profile, {}, {}
        for archive in read(profile, name):
            for scene in archive.scenes:
                self.archive_of[scene.video], self.scenes[scene.video] = archive, scene

    def query_moment(self, query):
        """Return the moment that a query asks for, in true colours."""
        return self.scenes[query.video].moments[0]

    def cast(self, query) -> int:
        """Return the cast of the camera of the archive that a query searches."""
        return self.archive_of[query.video].cast

    def shown_moment(self, video: str):
        """Return the moment of a video as its camera sees it, at the times that the policy reads."""
        (moment,) = rendered.printed_moments(self.profile, self.scenes[video])
        return casts.seen_moment(moment, self.archive_of[video].cast)

    def reply(self, query, shown: str) -> str:
        """Return the teacher's reply to a query about a video."""
        return teacher.verdict(self.query_moment(query), self.shown_moment(shown), self.cast(query))

    def caption(self, query, shown: str) -> str:
        """Return a video in words, with its times; the known object is named too."""
        return rendered_teacher.caption(self.shown_moment(shown), query.id % captions.STYLES)
