"""Search a folder of one's own videos by the loop that is evaluated. What a person sees of it: docs/search.md.

Nobody knows the right video here. So every `Ranking` says rank 0, which no ranking has, and no number of `metrics` is
made of these episodes. A rejected video is not shown again (`episode.select_video`: skip_rejected). What is ranked and
shown is a window (`folder_index.Window`), which of a short video is all of it.

indexes/<profile>/<hash of the folder's real path>/    index.npz, and a page for each query in pages/
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import Qwen3VLForConditionalGeneration

from vsr1 import cache, config
from vsr1.apps import folder_index, search_page
from vsr1.apps.folder_index import Window, plain
from vsr1.apps.search_page import short_path
from vsr1.config import InputError, Profile
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.data.annotations import Query
from vsr1.loop import episode, records, runner
from vsr1.loop.records import ORIGINAL, Ranking, Turn
from vsr1.models import checkpoints, search_index

CONTROLS = ("oracle-right", "oracle-wrong", "sqr-untrained", "rerank", "rocchio")
SYSTEMS = [name for name in runner.SYSTEMS if name not in CONTROLS]
CAVEAT = "The mini models know only the rendered world; what they say of any other video means nothing."
TOP = 5  # ours: moments that are listed
FOLLOWED = 8  # ours: windows at most into which a moment is followed


# --- What searches


def pick(profile, dataset=None, weights=None, system=None) -> tuple[str, str]:
    """Return (weights, system): those that are named, else the first policy trained in both stages, by soft queries.

    Without a trained policy it is the base policy, down the first ranking (walkdown).
    """
    if dataset:
        config.check_dataset(dataset, "--dataset")
    if system not in (None, *SYSTEMS, "sqr-untrained"):
        raise InputError(f"--system {system}: no such system; there are {', '.join(SYSTEMS)}")
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


def parse_query(text: str) -> Query:
    """Return a query about an unknown video. Raises InputError for an empty one and for special tokens."""
    text = " ".join(text.split())
    if not any(sign.isprintable() and not sign.isspace() for sign in text):
        raise InputError("the query is empty; say what to look for")
    if token := annotations.SPECIAL_TOKEN.search(text):
        raise InputError(f"query {text!r}: {token[0]} is a sign of the models' own; leave it out")
    return Query(0, text, "", (0.0, 0.0), text, None)


def open_folder(folder, profile="mini", **options) -> "Folder":
    """Return a `Folder`; `profile` is a name, a path to a .yaml, or a `Profile`, `options` are those of `Folder`."""
    loaded = profile if isinstance(profile, Profile) else config.load(profile)
    return Folder(loaded, folder, **{"say": lambda _: None} | options)


class Folder:
    """The videos of a folder, their index, and the models that search them, loaded once."""

    def __init__(
        self,
        profile: Profile,
        folder,
        *,
        dataset: str | None = None,
        weights: str | None = None,
        system: str | None = None,
        index=None,
        retry: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Bring the index up to date.

        dataset, weights, system   see `pick`
        index   folder of the index and the pages; None: indexes/<profile>/<folder>, which `make clean` leaves
        retry   try again what could not be read before, though it has not changed
        say     gets, line by line, what a reader should know before the search
        """
        if profile.world:
            say(CAVEAT)
        self.profile, self.folder = profile, Path(folder).expanduser().resolve()
        folder_index.find_videos(self.folder)
        self.weights, self.system = pick(profile, dataset, weights, system)
        say(f"weights: {short_path(self.weights)}; system: {self.system}")
        default = config.ROOT / "indexes" / profile.name / cache.fingerprint(str(self.folder))
        self.home = Path(index or default).expanduser().absolute()
        load = functools.cache(lambda: runner.load_pair(profile, runner.SYSTEMS[self.system], self.weights))
        (self.home / "pages").mkdir(parents=True, exist_ok=True)
        path = self.home / "index.npz"
        with cache.locked(path):  # a second search waits until the index is up to date
            self.index = folder_index.refresh(profile, lambda: load()[0], self.folder, path, retry)
        self._say_index(say)
        (self.engine, self.policy), self.windows = load(), self.index.windows()
        self.names, self.vecs, self.ended = list(self.windows), self.index.vecs(), ExitStack()
        read = video_reader.reader_pool(folder_index.reader(profile), profile.decode_workers)
        self.read = self.ended.enter_context(read)
        self.filmer = self.ended.enter_context(replace(folder_index.reader(profile)))
        self.clips = clip_cache.ClipCache(self.folder, (), self._read_window)
        self.clips.paths = self.windows

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the processes that decode. They end by themselves with this one."""
        self.ended.close()

    def _say_index(self, say):
        index = self.index
        if index.rebuilt:
            say(f"index: all videos were embedded again, for this has changed: {index.rebuilt}")
        counts = f"{len(index.files)} videos, {index.embedded} embedded now, {index.seconds:.1f} s"
        say(f"index: {counts}; {short_path(self.home)}")
        for name, problem in index.unreadable.items():
            again = ", as before" * (name in index.repeated)
            say(f"cannot be read{again}: {plain(name)}: {problem}")
        if index.repeated:
            say("what has not changed since is not tried again; --retry does")

    def _read_window(self, window):
        """Return the Future of the frames of a window."""
        times = folder_index.read_times(window, self.profile)
        return _Then(
            self.read(self.folder / window.video, times), lambda clip: folder_index.as_video(clip, window)
        )

    # --- One query

    def search(self, text: str, k: int = TOP, verdicts: int | None = None, turns: int | None = None) -> dict:
        """Search for one query and return what `--json` prints, with the `k` best moments in `hits`.

        verdicts  judge so many of the best windows too; None: those that the loop comes to; 0: not even those
        turns     at most so many; None: the profile's max_turns
        """
        query, started = parse_query(text), time.monotonic()
        run = _QuerySearch(self, query)
        result = run.search(turns or self.profile.max_turns) if verdicts != 0 else run.search_unseen()
        scores, looks = run.scores, run.looks
        run.judge([name for name in _best_apart(scores, self.windows, verdicts or 0) if name not in looks])
        run.follow()
        hits = _hits(scores, looks, self.windows)
        if hits and hits[0]["verdict"] == "accepted":
            result |= {"accepted": True} | {key: hits[0][key] for key in ("video", "window", "moment")}
        facts = {"query": query.text, "folder": str(self.folder), "index": str(self.home), "page": None}
        facts |= {"profile": self.profile.name, "caveat": CAVEAT if self.profile.world else None}
        facts |= {"weights": self.weights, "system": self.system, "videos": len(self.index.files)}
        facts |= {"windows": len(self.names), "embedded": self.index.embedded}
        facts |= {"unreadable": self.index.unreadable}
        result = facts | result | {"looks": list(looks.values())}
        times = {"index": round(self.index.seconds, 2), "search": round(time.monotonic() - started, 2)}
        return result | {"hits": hits[:k], "exported": [], "seconds": times}

    def write_page(self, result: dict) -> Path:
        """Write a page about a result of `search` and note it there: the moment first, then each look."""
        about = [result["query"], self.system, self.weights, len(result["looks"])]
        page = self.home / "pages" / f"{cache.fingerprint(about)}.html"
        result["page"] = str(page)
        clips = {search_page.key(entry): self._clip(entry) for entry in result["looks"]}
        span, seconds = result["moment"], self.index.files[result["video"]].seconds
        span = tuple(result["window"]) if span is None else search_page.with_margin(span, seconds)
        film = search_page.film(self.filmer, self.folder / result["video"], self._clip(result), span)
        cache.write_text(page, search_page.html_page(result, clips, *film))
        return page

    def export(self, result: dict, target) -> list[Path]:
        """Cut each accepted moment of a result into a file in `target`, and note them there.

        Raises InputError for a place among the videos, which the next search would search, and where a file cannot
        be read.
        """
        target = Path(target).expanduser().absolute()
        if target.resolve().is_relative_to(self.folder):
            raise InputError(
                f"{target}: lies among the videos, the next search would find it; choose another place"
            )
        target.mkdir(parents=True, exist_ok=True)
        paths = []
        for hit in (hit for hit in result["hits"] if hit["verdict"] == "accepted"):
            digest, span = self.index.files[hit["video"]].digest[:8], hit["moment"] or hit["window"]
            seconds = (f"{time:.1f}" for time in span)
            path = target / f"{'_'.join([plain(Path(hit['video']).stem)[:80], *seconds, digest])}.mp4"
            search_page.write_moment(self.filmer, self.folder / hit["video"], self._clip(hit), span, path)
            paths.append(path)
        result["exported"] = list(map(str, paths))
        return paths

    def _clip(self, entry):
        return self.clips.get([self._window(entry).id])[0]

    def _window(self, entry):
        """Return the window that a look, a hit or a result is about."""
        part = Window(entry["video"], tuple(entry["window"]), whole=False)
        return self.windows.get(part.id) or self.windows[part.video]


class _Then:
    """The Future of something made of another Future's result."""

    def __init__(self, future, change):
        self.future, self.change = future, change

    def result(self):
        return self.change(self.future.result())


class _QuerySearch:
    """The search for one query: the loop, and verdicts beside it."""

    def __init__(self, folder: Folder, query: Query):
        self.folder, self.query, self.looks = folder, query, {}  # {id of a window: its look}
        engine = folder.engine
        vecs = folder_index.check_finite(engine.embed_texts([query.text]), engine.name, "the query")
        self.vectors = search_index.Vectors(folder.names, folder.vecs, [query.id], vecs)
        kind = runner.SYSTEMS[folder.system]
        self.functions = runner.EpisodeRunner(
            folder.profile, kind, engine, folder.policy, self.vectors, folder.clips
        )
        self.first = self.rank([(query, ORIGINAL)])[0].top

    def rank(self, pairs):
        """Rank all windows by each query's vector; no video is known to be the right one."""
        vecs = [self.vectors.query_vec(q.id) if state is ORIGINAL else state.vec for q, state in pairs]
        vecs = folder_index.check_finite(np.stack(vecs), self.folder.weights, "the refined query")
        scores, columns = self.vectors.search(vecs, len(self.folder.names))  # (B, W)
        tops = [tuple(self.folder.names[column] for column in order) for order in columns]
        # {id of a window: cosine}, best first, by the last state: the one that the loop goes on with.
        self.scores = dict(zip(tops[-1], scores[-1].tolist(), strict=True))
        return [Ranking(0, 0, top, None, float(best[0])) for top, best in zip(tops, scores, strict=True)]

    def search_unseen(self):
        """Return the outcome of a search whose videos nobody looks at."""
        return self._outcome(self.first[0], False, "engine alone", None)

    def search(self, turns):
        """Run the loop and return its outcome: where no verdict accepts, the window that the last search put first."""
        run = self._record(turns if self.functions.system.refine else 1)
        functions = self.rank, self.functions.ask, self.functions.refine
        (result,) = episode.run_episodes([self.query], *functions, run)
        for turn in result.turns:
            self._note(turn, result.problem)
        accepted, last = result.stop_reason == "matched", result.turns[-1]
        name = last.shown_id if accepted or last.top1_out is None else last.top1_out
        return self._outcome(name, accepted, result.stop_reason, result.problem)

    def _outcome(self, name, accepted, stop, problem):
        window, look = self.folder.windows[name], self.looks.get(name, {"moment": None})
        result = {"accepted": accepted, "video": window.video, "window": list(window.span)}
        return result | {"moment": look["moment"], "stop": stop, "problem": problem}

    def _record(self, turns):
        # A greedy policy says the same of the same video: nobody waits for that. What it is worth stands in R1.
        profile, carry = self.folder.profile, self.functions.carry
        return records.Run(
            "yours", "all", self.folder.system, turns, carry, profile.seed, "skip_rejected", False
        )

    def judge(self, names):
        """Let the policy judge windows, each by itself, as in one turn of the loop."""
        size = self.folder.profile.eval_batch
        for part in (names[start : start + size] for start in range(0, len(names), size)):
            shown = lambda _, part=part: [Ranking(0, 0, (name,), None, 0.0) for name in part]  # noqa: E731
            queries = [self.query] * len(part)
            for result in episode.run_episodes(queries, shown, self.functions.ask, None, self._record(1)):
                self._note(result.turns[0], result.problem)

    def follow(self):
        """Follow each accepted moment that reaches an edge of its window into the next one."""
        left = FOLLOWED
        while names := [name for name in self._next_windows() if name not in self.looks][:left]:
            self.judge(names)
            left -= len(names)

    def _next_windows(self):
        names, windows = self.folder.names, self.folder.windows
        frame_seconds = 1 / self.folder.profile.video_fps
        for number, name in enumerate(names):
            look = self.looks.get(name, {})
            if look.get("accepted") and look["moment"]:
                (start, end), moment = windows[name].span, look["moment"]
                neighbours = names[number - 1 : number] if moment[0] < start + frame_seconds else []
                if moment[1] > end - frame_seconds:
                    neighbours = neighbours + names[number + 1 : number + 2]
                for other in neighbours:
                    if windows[other].video == windows[name].video:
                        yield other

    def _note(self, turn: Turn, problem):
        """Keep one turn in words and numbers; its rank is that of the window for the original query.

        problem  why there is no reply, if there is none
        """
        window = self.folder.windows[turn.shown_id]
        text = "" if turn.reply is None else turn.reply.text
        reasoning = text.rpartition("</think>")[0].replace("<think>", "").strip()
        refinement = None
        if turn.top1_out is not None:
            soft_tokens = turn.refine_tokens if turn.refine_kind == "sqr" else None
            refinement = {"kind": turn.refine_kind, "soft_tokens": soft_tokens, "words": turn.update_text}
            refinement["best"] = turn.top1_out
        begin = window.span[0]
        self.looks[turn.shown_id] = {
            "video": window.video,
            "window": list(window.span),
            "rank": 1 + self.first.index(turn.shown_id),
            "accepted": turn.reply and turn.reply.matched,  # None: no readable verdict
            "reasoning": reasoning if text else problem or "",
            "reply": text,
            "moment": None if turn.span_ms is None else [begin + time / 1000 for time in turn.span_ms],
            "next": refinement,
        }


# --- The best moments


def _overlap(a, b):
    return a[0] < b[1] and b[0] < a[1]


def _best_apart(order: Iterable[str], windows, count) -> list[str]:
    """Return the first `count` windows of a ranking that overlap no better one."""
    best = []
    for name in order:
        if len(best) == count:
            break
        window = windows[name]
        better = [windows[other] for other in best if windows[other].video == window.video]
        if not any(_overlap(window.span, other.span) for other in better):
            best.append(name)
    return best


def _hits(scores, looks, windows) -> list[dict]:
    """Return all moments, best first: those that were accepted, then the others, by score.

    scores  {id of a window: cosine}, best first

    Accepted moments of one video that meet become one. Another window is left out where it meets a better one, but
    for a rejected one.
    """
    hits = []
    for name, score in scores.items():
        window, look = windows[name], looks.get(name)
        verdict = search_page.VERDICTS[look["accepted"]] if look else "not looked at"
        moment = look["moment"] if verdict == "accepted" else None
        hit = {"video": window.video, "window": list(window.span), "moment": moment}
        hits.append(hit | {"score": round(score, 4), "verdict": verdict})
    by_video = {window.video: [] for window in windows.values()}
    for hit in sorted(hits, key=lambda hit: hit["verdict"] != "accepted"):  # stable
        span = hit["moment"] or hit["window"]
        near = [
            other for other in by_video[hit["video"]] if _overlap(other["moment"] or other["window"], span)
        ]
        near = [other for other in near if other["verdict"] != "rejected" or hit["verdict"] == "rejected"]
        if not near:
            by_video[hit["video"]].append(hit)
        elif hit["moment"] and near[0]["moment"]:
            start, end = near[0]["moment"]
            near[0]["moment"] = [min(start, span[0]), max(end, span[1])]
    hits = itertools.chain.from_iterable(by_video.values())
    return sorted(hits, key=lambda hit: (hit["verdict"] != "accepted", -hit["score"]))


# --- The command


def read_queries(path: Path) -> Iterator[str]:
    """Yield the queries of a file, one a line; `-` is the standard input. InputError names the line of a bad one."""
    lines = sys.stdin if str(path) == "-" else annotations.read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                parse_query(line)
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
            yield line


def _queries(query, queries, file) -> Iterable[str]:
    """Return what to search for; a bad query or line is said before anything is loaded, but for a pipe's."""
    if query is not None:
        parse_query(query)
        return [query]
    if queries:
        texts = read_queries(queries)
        return texts if str(queries) == "-" else list(texts)
    if not sys.stdin.isatty():
        raise InputError("no query; name one with --query, or a file of them with --queries (- for a pipe)")
    return _ask_queries(file)


def _ask_queries(file):
    """Yield what a person types, until an empty line."""
    while True:
        print("query (empty: end): ", end="", file=file, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        try:
            parse_query(line)
        except InputError as error:
            print(error, file=file)
        else:
            yield line


def search_and_print(
    profile: Profile, folder, query: str | None, queries: Path | None, as_json: bool, how: dict, options: dict
) -> int:
    """Search a folder and print what came of it; the status is 0 if a moment was accepted, else 1.

    query    what to look for; without it, each line of `queries`; without both, what a person types
    as_json  one JSON object a query on stdout, all else on stderr
    how      k, verdicts, turns of `Folder.search`, and export: a folder for the accepted moments
    options  of `Folder`
    """
    out, target = sys.stderr if as_json else sys.stdout, how.pop("export")
    say = functools.partial(print, file=out, flush=True)
    texts, any_accepted = _queries(query, queries, out), False
    with Folder(profile, folder, say=say, **options) as videos:
        for text in texts:
            result = videos.search(text, **how)
            videos.write_page(result)
            if target:
                videos.export(result, target)
            for line in [json.dumps(result)] if as_json else search_page.lines(result):
                print(line, flush=True)
            any_accepted |= result["accepted"]
    return 0 if any_accepted else 1
