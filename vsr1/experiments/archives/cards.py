"""Make a page with one card per search in archives: what SQR and HQR made of the same first film.

results/<profile>/qualitative/   index.html and small copies of the films
"""

import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

from vsr1 import cache
from vsr1.data import annotations, previews
from vsr1.experiments.archives import systems
from vsr1.mini import teacher
from vsr1.mini.archives import casts, corpus, source
from vsr1.report import qualitative

CELLS = ("casts-whole", "casts-half")  # those in which a look is needed
CARDS = 16  # of a cell, evenly spread over its test queries
STATEMENT = re.compile(r"(\w+) (\w+) is ([a-z ]+)\.")


class ArchiveCards(qualitative.Cards):
    """Cards of one cell. What films show is named as the camera of their archive shows it."""

    names: ClassVar = {"sqr": "SQR", "hqr": "HQR, trained"}

    def __init__(self, profile, cell: str, films: dict[str, dict]):
        self.dataset, self.films = cell, films
        self.truth = source.Truth(profile, corpus.CELLS[cell][0])
        self.scenes, self.videos = self.truth.scenes, profile.archives.families * profile.archives.family_size

    def moments(self, episode, video):
        """Return the moment that a query describes and that of a film, both as the camera shows them."""
        query_moment = casts.seen_moment(self._query_moment(episode), self._cast(episode))
        return query_moment, video and self.truth.shown_moment(video)

    def differences(self, episode, video):
        """Return how a wrong film differs: (as the query says it, as its own film shows it, what is in its place).

        The first in true colours, the others as the camera shows them.
        """
        wanted, shown = self.moments(episode, video)
        names = teacher.differing(wanted, shown) if video else []
        moments = self._query_moment(episode), wanted, shown
        phrases = (tuple(qualitative.phrase(name, moment) for moment in moments) for name in names)
        return list(dict.fromkeys(phrases))  # an object and its colour are one phrase

    def note(self, episode):
        """Say what the camera does, which neither query nor engine knows."""
        cast = self._cast(episode)
        if cast == 0:
            return "The camera shows true colours."
        seen = [f"{colour} looks {casts.seen_colour(colour, cast)}" for colour in casts.CIRCLE]
        return f"The camera shifts colours by {cast / 2:g} steps: {', '.join(seen)}."

    def reasoning(self, episode, turn):
        """Return the steps of a reply; what it says of the camera is compared with the truth, too."""
        return with_misreadings(super().reasoning(episode, turn), self._cast_of(turn.shown_id))

    def _query_moment(self, episode):
        return self.scenes[episode.gt_video].moments[0]

    def _cast(self, episode):
        return self._cast_of(episode.gt_video)

    def _cast_of(self, video):
        return self.truth.archive_of[video].cast


def with_misreadings(steps, cast: int) -> list[tuple[str, bool, str]]:
    """Return the steps of `qualitative.reasoning`, those that misread the camera called false, too."""
    return [(step, amiss, errors or misread(step, cast)) for step, amiss, errors in steps]


def misread(step: str, cast: int) -> str:
    """Say what is false of what a reply says of the camera; nothing where it is true or says something else.

    >>> misread("trousers red is yellow.", 2), misread("shirt blue is blue.", 2), misread("seek shirt blue.", 2)
    ('', 'blue looks purple', '')
    """
    match = STATEMENT.fullmatch(step)
    if match is None or match[2] not in casts.CIRCLE:
        return ""
    seen = casts.seen_colour(match[2], cast)
    return "" if match[3] == seen else f"{match[2]} looks {seen}"


def publish(profile) -> Path | None:
    """Write the page, if both systems were run on a cell here; return its path."""
    folder, parts = profile.results() / "qualitative", []
    for cell in CELLS:
        episodes = {system: systems.read(profile, cell, system) for system in ArchiveCards.names}
        searches = [dict(zip(episodes, pair, strict=True)) for pair in zip(*episodes.values(), strict=True)]
        if searches:
            parts.append(
                _part(profile, cell, annotations.evenly_spaced(searches, CARDS), len(searches), folder)
            )
    if not parts:
        return None
    cache.write_text(folder / "index.html", qualitative.page(profile, parts, "archive_cards.html"))
    return folder / "index.html"


def _part(profile, cell, chosen, queries, folder):
    """Copy the films of some searches and return their cards, in the form of `qualitative.make`."""
    shutil.rmtree(folder / cell, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    home = profile.data_dir(corpus.CELLS[cell][0]) / "videos"
    previews.make(home, qualitative.shown_videos(chosen), folder, cell)
    films = folder / "films.json"
    cards = ArchiveCards(profile, cell, json.loads(films.read_text(encoding="utf-8")))
    films.unlink()
    return {"dataset": cell, "queries": queries, "cards": [cards.card(search) for search in chosen]}
