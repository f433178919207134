"""Show one search from start to end: a few rendered films, a trained policy that ships with the package, one query.

runs/<profile>/demo/    videos/, index/ with the page
"""

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vsr1 import cache
from vsr1.apps import search_folder, search_page
from vsr1.config import InputError, Profile
from vsr1.loop.moments import span_iou, span_ms
from vsr1.mini import captions, renderer, world
from vsr1.models import adapters, checkpoints, search_index
from vsr1.report import provenance

DATASET, FAMILIES = "charades", 12
WEIGHTS = "vsr1/mini/weights/charades-vsr1"
LOGS = {
    "sft.jsonl": "sft/log.jsonl",
    "grpo.jsonl": "grpo/vsr1/log.jsonl",
    "held.jsonl": "grpo/vsr1/held.jsonl",
}


def run(profile: Profile, say: Callable[[str], None] = print) -> dict:
    """Search the first test films for one query, print it turn by turn, and return what `Folder.search` does.

    Of the test queries that the search engine alone answers with a wrong film, it is the first whose film the policy
    rejects, for a refinement is to be seen. How many of them end right is printed too.
    """
    if profile.world is None:
        raise InputError(f"profile {profile.name}: a demo needs the rendered world; leave --profile out")
    home = profile.run_root() / "demo"
    scenes, queries = render(profile, home / "videos")
    folder = search_page.short_path(home / "videos")
    about = f"{len(scenes) // 2} scenes and a near-duplicate of each, {len(queries)} queries about them"
    say(f"{len(scenes)} films of the rendered {DATASET} corpus ({about}), in {folder}")
    (home / "index").mkdir(exist_ok=True)
    with search_folder.Folder(
        profile, home / "videos", weights=WEIGHTS, system="sqr", index=home / "index", say=lambda _: None
    ) as films:
        failed = _failed(films, queries)
        results = [films.search(query.text) for query, _ in failed]
        right = sum(_is_right(result, query) for result, (query, _) in zip(results, failed, strict=True))
        rejected = [n for n, result in enumerate(results) if not result["looks"][0]["accepted"]]
        say(f"the search engine alone answers {len(failed)} of them with a wrong film")
        say(f"the policy rejects {len(rejected)} of these films; {right} of the searches end right")
        shown = rejected[0] if rejected else 0
        (query, first), result = failed[shown], results[shown]
        films.write_page(result)
    say(f"query: {query.text}")
    say(f"the search engine alone answers with {first}; right is {query.video}, {_span(query.span)}")
    for line in itertools.islice(search_page.lines(result), 1, None):  # the query stands above
        say(line)
    say(_verdict(result, query))
    return result


def render(profile, folder):
    """Render the demo's films, unless they are current, and return (films, the test queries about them).

    They are the first two films of each of the first FAMILIES test families: scenes, and a near-duplicate of each.
    """
    settings = profile.world
    scenes = world.make_scenes(DATASET, "test", settings.test_videos, settings.seed)
    rng = np.random.default_rng([settings.seed, 0])
    queries = captions.make_queries(scenes, 0, renderer.QUERIES_PER_MOMENT["test"], rng)
    families = itertools.groupby(scenes, key=lambda scene: scene.family)
    pairs = [pair for _, family in families if len(pair := list(family)[:2]) == 2]
    films = list(itertools.chain.from_iterable(pairs[:FAMILIES]))
    draw = functools.partial(renderer.render_videos, settings, 1, films, f"render {len(films)} films")
    inputs = {"scenes": [asdict(film) for film in films], "code": cache.source_digest(renderer.__name__)}
    cache.build(folder, inputs | {"size": settings.size, "fps": settings.fps}, draw)
    names = {film.video for film in films}
    return films, [query for query in queries if query.video in names]


def _failed(films, queries):
    """Return (query, the film shown first) of each query whose first search shows a wrong film."""
    names = [Path(name).stem for name in films.index.files]
    query_vecs = films.engine.embed_texts([query.text for query in queries])
    vectors = search_index.Vectors(names, films.index.vecs(), [query.id for query in queries], query_vecs)
    firsts = [names[column] for (column,) in vectors.search(query_vecs, 1)[1]]
    failed = [(query, first) for query, first in zip(queries, firsts, strict=True) if first != query.video]
    if not failed:
        reason = f"every first search is right among {len(names)} films; there is nothing to refine"
        raise InputError(f"{films.profile.engine}: {reason}")
    return failed


def _is_right(result, query):
    """Return whether the search accepted the right film."""
    return Path(result["video"]).stem == query.video and result["accepted"]


def _verdict(result, query):
    """Say whether the search came to the right film and moment, which it could not know."""
    if not _is_right(result, query):
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
    seconds = {step: cache.metadata(runs / step)["seconds"] for step in ("sft", "grpo/vsr1")}
    facts = {
        "base": profile.policy,
        "adapters": len(ranks),
        "ranks": sorted(set(ranks.values())),
        "dataset": DATASET,
        "profile": profile.name,
        "digest": profile.digest(),
        "seed": profile.seed,
        "commit": provenance.commit(),
        "minutes": {step: round(spent / 60, 2) for step, spent in seconds.items()},
    }
    cache.write_json(into / "provenance.json", facts)
    return into
