"""Search archives: every query inside the one that it is asked of."""

from collections.abc import Iterable

import numpy as np

from vsr1.data import annotations
from vsr1.loop import runner
from vsr1.loop.records import ORIGINAL
from vsr1.mini.archives import corpus, source
from vsr1.models import embedding, search_index


def sample(profile, cell: str, queries, truth: source.Truth) -> list[annotations.Query]:
    """Return those of the test queries that systems are run on in one of `corpus.CELLS`."""
    half = corpus.CELLS[cell][1]
    of_cell = [query for query in queries if truth.cast(query) % 2 == half]
    return annotations.evenly_spaced(of_cell, profile.archives.test_queries)


class ArchiveGallery:
    """The archives of one split of a corpus: queries, what is true of them, and vectors, one gallery an archive."""

    def __init__(self, profile, name: str, split: str):
        folder = embedding.embed_corpus(profile, name, split)
        self.vectors = search_index.load_vectors(folder)
        self.truth = source.Truth(profile, name)
        self.queries = annotations.read_fig(profile.data_dir(name) / "corpus" / f"{split}.jsonl")
        self.parts = {}
        for archive in source.read(profile, name):
            if archive.split == split:
                videos = [scene.video for scene in archive.scenes]
                rows = self.vectors.columns(videos)
                self.parts[archive.name] = search_index.Vectors(
                    videos, self.vectors.video_vecs[rows], self.vectors.query_ids, self.vectors.query_vecs
                )

    def with_queries(self, query_vecs: np.ndarray) -> "ArchiveGallery":
        """Give the queries other vectors, (Q, D) in the order of `queries`; return the same gallery."""
        for vectors in (self.vectors, *self.parts.values()):
            vectors.query_ids, vectors.query_vecs = [query.id for query in self.queries], query_vecs
        return self

    def part(self, query) -> search_index.Vectors:
        """Return the archive that a query searches."""
        return self.parts[self.truth.archive_of[query.video].name]

    def typed(self, queries) -> np.ndarray:
        """Return the vectors of queries as they are typed, (Q, D)."""
        return self.vectors.vecs_of([query.id for query in queries])

    def ranks(self, queries, vecs: np.ndarray) -> np.ndarray:
        """Return the rank of each query's right video in its archive, (Q,), by vectors (Q, D)."""
        ranks = np.zeros(len(queries), dtype=int)
        for part, rows in self.by_archive(queries):
            right = part.columns([queries[row].video for row in rows])
            ranks[rows] = search_index.ranks(part.scores(vecs[rows]), right)
        return ranks

    def by_archive(self, queries) -> Iterable[tuple[search_index.Vectors, list[int]]]:
        """Yield (archive, rows of the queries that search it)."""
        rows = {}
        for row, query in enumerate(queries):
            rows.setdefault(self.truth.archive_of[query.video].name, []).append(row)
        for name, members in rows.items():
            yield self.parts[name], members


class ArchiveRunner(runner.EpisodeRunner):
    """Engine, policy and videos as the functions of the loop, where each query searches its own archive."""

    def __init__(self, profile, system, engine, policy, gallery: ArchiveGallery, clips, first=None):
        super().__init__(profile, system, engine, policy, gallery.vectors, clips)
        self.gallery = gallery
        self.first = first  # {query id: vector (D,)} of first searches; None: as typed

    def search(self, pairs):
        """Rank the archive of each query by its vector."""
        rankings = [None] * len(pairs)
        vecs = [self._first(query) if state is ORIGINAL else state.vec for query, state in pairs]
        for part, rows in self.gallery.by_archive([query for query, _ in pairs]):
            right = [pairs[row][0].video for row in rows]
            part_vecs = np.stack([vecs[row] for row in rows])
            ranked = runner.rank_gallery(part, part_vecs, right, self.top_k)
            for row, ranking in zip(rows, ranked, strict=True):
                rankings[row] = ranking
        return rankings

    def _first(self, query):
        return self.vectors.query_vec(query.id) if self.first is None else self.first[query.id]
