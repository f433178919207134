"""Search a folder of one's own videos by the loop that is evaluated.

Nobody knows the right video here. So every `Ranking` says rank 0, which no ranking has, and no number of `metrics` is
made of these episodes. A rejected video is not shown again (`episode.select_video`: skip_rejected).

indexes/<profile>/<hash of the folder's path>/    index.npz, and a page for each query in pages/
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import cache, config
from vsr1.apps import folder_index, search_page
from vsr1.apps.folder_index import FolderIndex, plain
from vsr1.apps.search_page import short_path
from vsr1.config import InputError, Profile
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.data.annotations import Query
from vsr1.loop import episode, records, runner
from vsr1.loop.records import ORIGINAL, Episode, Ranking, Turn
from vsr1.models import checkpoints, search_index

CONTROLS = ("oracle-right", "oracle-wrong", "sqr-untrained", "rerank", "rocchio")
SYSTEMS = [name for name in runner.SYSTEMS if name not in CONTROLS]
CAVEAT = "The mini models know only the rendered world; what they say of any other video means nothing."


def pick(profile, dataset=None, weights=None, system=None) -> tuple[str, str]:
    """Return (weights, system): those that are named, else the first policy trained in both stages, by soft queries.

    Without a trained policy it is the base policy, down the first ranking (walkdown).
    """
    homes = [profile.runs(name) / "grpo" / "vsr1" for name in ([dataset] if dataset else profile.datasets)]
    trained = [str(home) for home in homes if cache.metadata(home)]
    if dataset and not weights and not trained:
        raise InputError(f"{homes[0]}: not trained yet; train it, or leave --dataset out")
    if not weights:
        weights = trained[0] if trained and (dataset or system in (None, "sqr")) else profile.policy
    elif not weights.startswith(checkpoints.AUTHORS) and (Path(weights).exists() or weights[0] in "./~"):
        weights = str(_policy_folder(Path(weights).absolute()))  # else a name on the hub
    weights = checkpoints.resolve_checkpoint(weights, profile)
    soft = checkpoints.has_heads(weights)
    if system == "sqr" and not soft:
        raise InputError(f"{weights}: no soft-query heads in it; train it, or choose --system walkdown")
    return weights, system or ("sqr" if soft else "walkdown")


def _policy_folder(folder):
    """Return `folder` if a policy lies in it: the library would fill a policy with what it finds in an engine, too."""
    if not list(folder.glob("*.safetensors")):
        why = "a pickle (.bin, .pt) could run any code and is never read"
        raise InputError(f"{folder}: not a folder with safetensors; {why}")
    config = annotations.parse_json(annotations.read_text(folder / "config.json"), folder / "config.json")
    kinds = config.get("architectures") if isinstance(config, dict) else None
    if kinds != [Qwen3VLForConditionalGeneration.__name__]:
        raise InputError(f"{folder}: its config.json names {kinds}, which is no policy")
    return folder


def search(
    profile: Profile,
    folder,
    query: str,
    *,
    dataset: str | None = None,
    weights: str | None = None,
    system: str | None = None,
    index=None,
    say: Callable[[str], None] = print,
) -> dict:
    """Search the videos of `folder` for one query, write a page, and return what `--json` prints.

    index  folder of the index and the pages; None: indexes/<profile>/<folder>, which `make clean` leaves
    say    gets, line by line, what a reader should know before the search
    """
    if profile.world:
        say(CAVEAT)
    folder, parsed = Path(folder).absolute(), _parse_query(query)
    folder_index.find_videos(folder)
    weights, system = pick(profile, dataset, weights, system)
    say(f"weights: {short_path(weights)}; system: {system}")
    home = Path(index or config.ROOT / "indexes" / profile.name / cache.fingerprint(str(folder))).absolute()
    load = functools.cache(lambda: runner.load_pair(profile, runner.SYSTEMS[system], weights))
    (home / "pages").mkdir(parents=True, exist_ok=True)
    with cache.locked(home / "index.npz"):  # a second search waits until the index is up to date
        videos = folder_index.refresh(profile, lambda: load()[0], folder, home / "index.npz")
    _say_index(say, videos, home)
    started = time.monotonic()
    result = _search(profile, load(), folder, videos, parsed, system)
    clips, seconds = result.pop("clips"), {"index": round(videos.seconds, 2)}
    page = home / "pages" / f"{cache.fingerprint([parsed.text, system, weights, profile.max_turns])}.html"
    facts = {"query": parsed.text, "folder": str(folder), "index": str(home), "page": str(page)}
    facts |= {"profile": profile.name, "caveat": CAVEAT if profile.world else None}
    facts |= {"weights": weights, "system": system, "videos": len(videos.files), "embedded": videos.embedded}
    result = facts | {"unreadable": videos.unreadable} | result
    result["seconds"] = seconds | {"search": round(time.monotonic() - started, 2)}
    _write_page(page, folder, result, clips)
    return result


def _parse_query(text):
    """Return a query about an unknown video. Raises InputError for an empty one and for special tokens."""
    text = " ".join(text.split())
    if not any(sign.isprintable() and not sign.isspace() for sign in text):
        raise InputError("the query is empty; say what to look for")
    if token := annotations.SPECIAL_TOKEN.search(text):
        raise InputError(f"query {text!r}: {token[0]} is a sign of the models' own; leave it out")
    return Query(0, text, "", (0.0, 0.0), text, None)


def _say_index(say, videos, home):
    counts = f"{len(videos.files)} videos, {videos.embedded} embedded now, {videos.seconds:.1f} s"
    say(f"index: {counts}; {short_path(home)}")
    for name, problem in videos.unreadable.items():
        say(f"cannot be read: {plain(name)}: {problem}")


def _write_page(page, folder, result, clips):
    film = search_page.film(folder / result["video"], clips[result["video"]], result["moment"])
    html = search_page.html_page(result, clips, *film)
    cache.write_text(page, html)


def _search(profile, pair, folder, videos: FolderIndex, query: Query, system) -> dict:
    """Run the loop; return its `outcome`, and {name: Clip} of the videos that it came across as `clips`."""
    engine, policy = pair
    names, kind = list(videos.files), runner.SYSTEMS[system]
    vectors = search_index.Vectors(names, videos.vecs(), [query.id], engine.embed_texts([query.text]))

    def rank(pairs):
        """Rank the whole gallery by each query's vector; no video is known to be the right one."""
        vecs = [vectors.query_vec(query.id) if state is ORIGINAL else state.vec for query, state in pairs]
        scores, columns = vectors.search(np.stack(vecs), len(names))  # (B, V)
        tops = [tuple(names[column] for column in order) for order in columns]
        return [Ranking(0, 0, top, None, float(best[0])) for top, best in zip(tops, scores, strict=True)]

    with video_reader.reader_pool(folder_index.reader(profile), profile.decode_workers) as read:
        clips = clip_cache.ClipCache(folder, (), read)
        clips.paths = {name: folder / name for name in names}
        functions = runner.EpisodeRunner(profile, kind, engine, policy, vectors, clips)
        turns = profile.max_turns if kind.refine else 1
        # A greedy policy says the same of the same video: nobody waits for that. What it is worth stands in R1.
        run = records.Run(
            "yours", "all", system, turns, functions.carry, profile.seed, "skip_rejected", False
        )
        (found,) = episode.run_episodes([query], rank, functions.ask, functions.refine, run)
        seen = {name for turn in found.turns for name in (turn.shown_id, turn.top1_out) if name}
        (first,) = rank([(query, ORIGINAL)])
        return outcome(found, first.top) | {"clips": {name: clips.get([name])[0] for name in seen}}


def outcome(found: Episode, ranking: tuple[str, ...]) -> dict:
    """Return what an episode came to; `ranking` is that of the original query.

    accepted  False: `video` is the one that the last search put first, and no verdict says that it is right
    moment    seconds; None: none was named
    """
    looks = [_turn_entry(turn, 1 + ranking.index(turn.shown_id)) for turn in found.turns]
    accepted, last = found.stop_reason == "matched", found.turns[-1]
    video = last.shown_id if accepted or last.top1_out is None else last.top1_out
    moment = next((look["moment"] for look in reversed(looks) if look["video"] == video), None)
    result = {"accepted": accepted, "video": video, "moment": moment, "stop": found.stop_reason}
    return result | {"problem": found.problem, "looks": looks}


def _turn_entry(turn: Turn, rank: int) -> dict:
    """Return one turn in words and numbers; `rank` is that of its video for the original query."""
    text = "" if turn.reply is None else turn.reply.text
    soft_tokens = turn.refine_tokens if turn.refine_kind == "sqr" else None
    refinement = {"kind": turn.refine_kind, "soft_tokens": soft_tokens, "words": turn.update_text}
    return {
        "video": turn.shown_id,
        "rank": rank,
        "accepted": turn.reply and turn.reply.matched,  # None: no readable verdict
        "reasoning": text.rpartition("</think>")[0].replace("<think>", "").strip(),
        "reply": text,
        "moment": None if turn.span_ms is None else [time / 1000 for time in turn.span_ms],
        "next": None if turn.top1_out is None else refinement | {"best": turn.top1_out},
    }


def search_and_print(profile, videos, query: str, as_json: bool, options: dict) -> int:
    """Search a folder and print what came of it; the status is 0 if a video was accepted, else 1.

    as_json  one JSON object on stdout, all else on stderr
    options  dataset, weights, system and index as in `search`, and turns: at most so many; None means unset
    """
    if options["dataset"]:
        config.check_dataset(options["dataset"], "--dataset")
    if options["system"] not in (None, *SYSTEMS):
        raise InputError(f"--system {options['system']}: no such system; there are {', '.join(SYSTEMS)}")
    if turns := options.pop("turns"):
        profile = replace(profile, max_turns=turns)
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    result = search(profile, videos, query, say=say, **options)
    for line in [json.dumps(result)] if as_json else search_page.lines(result):
        print(line)
    return 0 if result["accepted"] else 1
