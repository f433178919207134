"""Show one search from start to end: a few rendered films, a trained policy that ships with the package, one query.

runs/<profile>/demo/    videos/, index/ with the page
"""

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vsr1 import cache
from vsr1.apps import folder_index, search_folder, search_page
from vsr1.config import InputError, Profile
from vsr1.loop.moments import span_iou, span_ms
from vsr1.mini import captions, renderer, world
from vsr1.models import adapters, checkpoints, engine, search_index
from vsr1.report import provenance

DATASET, FILMS = "charades", 24
WEIGHTS = "vsr1/mini/weights/charades-vsr1"
LOGS = {
    "sft.jsonl": "sft/log.jsonl",
    "grpo.jsonl": "grpo/vsr1/log.jsonl",
    "held.jsonl": "grpo/vsr1/held.jsonl",
}


def run(profile: Profile, say: Callable[[str], None] = print) -> dict:
    """Search the first test films for one query, print it turn by turn, and return what `search_folder.search` does.

    The query is chosen before any policy is asked: the first of the test split that the search engine alone answers
    with a wrong film.
    """
    if profile.world is None:
        raise InputError(f"profile {profile.name}: a demo needs the rendered world; leave --profile out")
    home = profile.run_root() / "demo"
    queries = _render(profile, home / "videos")
    where = search_page.short_path(home / "videos")
    say(f"{FILMS} films of the rendered {DATASET} corpus, {len(queries)} queries about them, in {where}")
    (home / "index").mkdir(exist_ok=True)
    query, first = _choose(profile, home, queries)
    say(f"query: {query.text}")
    say(f"the search engine alone answers with {first}; right is {query.video}, {_span(query.span)}")
    result = search_folder.search(
        profile,
        home / "videos",
        query.text,
        weights=WEIGHTS,
        system="sqr",
        index=home / "index",
        say=lambda _: None,
    )
    for line in itertools.islice(search_page.lines(result), 1, None):  # the query stands above
        say(line)
    say(_verdict(result, query))
    return result


def _render(profile, folder):
    """Render the first FILMS test films, unless they are current, and return the test queries about them."""
    settings = profile.world
    scenes = world.make_scenes(DATASET, "test", settings.test_videos, settings.seed)
    queries = captions.make_queries(scenes, 0, renderer.QUERIES_PER_MOMENT["test"], settings.seed)
    films = scenes[:FILMS]
    draw = functools.partial(renderer.render_videos, settings, 1, films, f"render {FILMS} films")
    inputs = {"scenes": [asdict(film) for film in films], "code": cache.source_digest(renderer.__name__)}
    cache.build(folder, inputs | {"size": settings.size, "fps": settings.fps}, draw)
    names = {film.video for film in films}
    return [query for query in queries if query.video in names]


def _choose(profile, home, queries):
    """Return the first query whose first search shows a wrong film, and that film."""
    encoder = engine.load(profile)
    videos = folder_index.refresh(profile, lambda: encoder, home / "videos", home / "index" / "index.npz")
    names = [Path(name).stem for name in videos.files]
    vectors = search_index.Vectors(
        names, videos.vecs(), [q.id for q in queries], encoder.embed_texts([q.text for q in queries])
    )
    _, columns = vectors.search(vectors.query_vecs, 1)
    for query, (column,) in zip(queries, columns, strict=True):
        if names[column] != query.video:
            return query, names[column]
    raise InputError(
        f"{profile.engine}: every first search is right among {FILMS} films; there is nothing to refine"
    )


def _verdict(result, query):
    """Say whether the search came to the right film and moment, which it could not know."""
    if Path(result["video"]).stem != query.video or not result["accepted"]:
        return f"That is not right: {query.video} was asked for, {_span(query.span)}."
    if result["moment"] is None:
        return "That is the right film, but no moment was named."
    overlap = span_iou(span_ms(result["moment"]), span_ms(query.span))
    return f"That is the right film; the moment overlaps the true one by {overlap:.0%} (intersection over union)."


def _span(span):
    return f"{search_page.clock(span[0])} to {search_page.clock(span[1])}"


def ship(profile: Profile, into: Path) -> Path:
    """Write the policy that a run trained in both stages on DATASET as the package ships it, with logs and provenance.

    Raises InputError where there is none.
    """
    runs = profile.runs(DATASET)
    source = runs / "grpo" / "vsr1"
    if not cache.metadata(source):
        raise InputError(f"{source}: not trained yet; run `make paper` first")
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    ranks = adapters.save(checkpoints.load(str(source), profile), profile.policy, into)
    for name, log in LOGS.items():
        shutil.copy(runs / log, into / name)
    facts = {
        "base": profile.policy,
        "adapters": len(ranks),
        "ranks": sorted(set(ranks.values())),
        "dataset": DATASET,
    }
    facts |= {
        "profile": profile.name,
        "digest": profile.digest(),
        "seed": profile.seed,
        "commit": provenance.commit(),
    }
    facts["minutes"] = {
        step: round(cache.metadata(runs / step)["seconds"] / 60, 2) for step in ("sft", "grpo/vsr1")
    }
    cache.write_json(into / "provenance.json", facts)
    return into
