"""Ask when looking pays: what systems get right on the four cells, and what was predicted (docs/archives.md).

results/<profile>/seed-<N>.json  what each system got right, query by query, and the commit that did it
results/<profile>/numbers.json   {<cell>/<system>/<metric>: Estimate}: means over the seeds that have a file
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from vsr1 import cache
from vsr1.data import annotations
from vsr1.evaluation import claims, metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.experiments import premise
from vsr1.experiments.archives import headroom, search, systems
from vsr1.experiments.common import Prediction
from vsr1.mini.archives import casts, corpus, source, teacher
from vsr1.report import provenance, results

LOOKS = (1, 2, 3)
FOLLOWED = tuple(systems.SYSTEMS)
REFINING = (
    "rocchio",
    "hqr-reasoned",
    "sqr",
    "sqr-skip",
)  # of `runner.SYSTEMS`: another query after the first look
PREFIXES = {"sqr": "if-", "hqr": "hqr-if-"}  # of the rows of interventions
COMPARED = (  # (row, control, metric): differences, paired by seed and query
    ("sqr", "adapter-soft", "r1"),
    ("hqr", "adapter-soft", "r1"),
    ("sqr", "hqr", "r1"),
    ("sqr", "adapter-vec", "r1"),
    ("sqr", "walkdown", "vcmr_t3"),
    ("sqr-skip", "sqr", "vcmr_t3"),
    ("sqr-skip", "walkdown", "vcmr_t3"),
    ("rerank", "walkdown", "vcmr_t3"),
    ("hqr", "walkdown", "vcmr_t3"),
    ("if-own", "if-same-archive", "repaired"),
    ("if-own", "if-other-archive", "repaired"),
    ("if-own", "if-other-reply", "repaired"),
    ("if-teacher", "if-teacher-wrong-cast", "repaired"),
    ("hqr-if-own", "hqr-if-same-archive", "repaired"),
    ("hqr-if-own", "hqr-if-other-archive", "repaired"),
)


# --- What each system gets right


def measure(profile, seed: int, cells, names=FOLLOWED) -> Iterator[str]:
    """Run all systems on cells with one seed, unless they are current; yield what was added to the file of the seed."""
    seeded, path = replace(profile, seed=seed), profile.results() / f"seed-{seed}.json"
    for cell in cells:
        for row, hits in _hits(seeded, cell, names):
            with cache.updated_json(path) as content:
                if content.get("profile") != profile.digest():
                    content.clear()
                    content |= {"profile": profile.digest(), "seed": seed, "cells": {}, "hits": {}}
                content["commit"] = provenance.commit()
                content["known"] = headroom.read_known(profile)
                content["cells"][cell] = _describe(profile, cell)
                content["hits"][f"{cell}/{row}"] = hits
            yield f"{cell}/{row}, seed {seed}"


def _describe(profile, cell):
    """Return the archives of a cell's queries, and which name a colour that no train archive of their cast holds."""
    queries, truth = _queries(profile, cell)
    unseen = [casts.is_unseen(truth.query_moment(query), truth.cast(query)) for query in queries]
    archives = {query.id: truth.archive_of[query.video].name for query in queries}
    return {"archives": archives, "unseen": claims.digits(unseen)}


def _queries(profile, cell):
    """Return the queries that systems are run on, without their vectors, and what is true of them."""
    name = corpus.CELLS[cell][0]
    queries = annotations.read_fig(profile.data_dir(name) / "corpus" / "test.jsonl")
    truth = source.Truth(profile, name)
    return search.sample(profile, cell, queries, truth), truth


def _hits(profile, cell, names) -> Iterator[tuple[str, dict]]:
    """Yield (row, hits in the form of `claims.hits`) of a cell.

    r1           right video on rank 1: of a first search; of those that then change the query, after one look
    vcmr_t1 ..   VCMR at IoU 0.5 by the number of films looked at; of `rerank` the clearest verdict answers
    ver          the verdict on the first film is right
    cast         the first reply names the cast; `cast_near`: half a step away counts too
    shirt        it translates the shirt asked for by the cast that it names, right or wrong; `colour`: the object's
    repaired     rank 1 after a refinement, of queries whose first search as typed fails
    """
    first = headroom.measure(profile, cell)
    ids = [query.id for query in _queries(profile, cell)[0]]
    for system, hits in first.items():
        if system not in names:
            yield system, {"ids": ids, "r1": claims.digits(hits)}
    for name in names:
        hits = {"r1": first[name]} if name in first else {}
        hits |= _followed(profile, cell, name)
        yield name, {"ids": ids} | {metric: claims.digits(values) for metric, values in hits.items()}
    for system, prefix in PREFIXES.items():
        if system in names:
            refined = systems.intervene(profile, cell, system)
            for name, ranks in refined["ranks"].items():
                hits = claims.digits(rank == 1 for rank in ranks)
                yield f"{prefix}{name}", {"ids": refined["ids"], "repaired": hits}


def _followed(profile, cell, name):
    """Return the hits of a system that looks at films."""
    queries, truth = _queries(profile, cell)
    episodes = systems.run(profile, cell, name)
    assert [episode.desc_id for episode in episodes] == [query.id for query in queries]
    like = systems.SYSTEMS[name].like
    if like == "rerank":
        return {f"vcmr_t{n}": [_clearest_is_right(episode, n) for episode in episodes] for n in LOOKS}
    hits = {f"vcmr_t{n}": metrics.vcmr_hits(metrics.within(episodes, n), 0.5) for n in LOOKS}
    hits["ver"] = metrics.ver_hits(episodes, 0)
    if like in REFINING:
        hits["r1"] = metrics.vr_hits(metrics.within(episodes, 1), 1)
    if name in PREFIXES:
        steps = []  # of half a step each, from the true cast to the one that the reply names; None: it names none
        hits |= {name: [] for name in casts.PAINTED}
        for episode, query in zip(episodes, queries, strict=True):
            reply, query_moment = episode.turns[0].reply.text, truth.query_moment(query)
            cast = teacher.read_cast(reply)
            steps.append(None if cast is None else (cast - truth.cast(query)) % casts.STEPS)
            for name in casts.PAINTED:
                hits[name].append(translates(reply, name, getattr(query_moment, name)))
        hits["cast"] = [step == 0 for step in steps]
        hits["cast_near"] = [step in (0, 1, casts.STEPS - 1) for step in steps]
    return hits


def _clearest_is_right(episode, looks):
    """Return whether the turn with the clearest verdict, of so many, names the right moment."""
    return premise.answers_right(premise.clearest_turn(episode.turns[:looks]), episode)


def translates(reply: str, name: str, colour: str) -> bool:
    """Return whether a reply says of an attribute what its colour looks like by the cast that the reply names.

    >>> reply = "<think> trousers red is yellow. shirt green is blue. colour red is red."
    >>> translates(reply, "shirt", "green"), translates(reply, "colour", "red"), translates("", "shirt", "green")
    (True, False, False)
    """
    cast = teacher.read_cast(reply)
    return cast is not None and f" {name} {colour} is {casts.seen_colour(colour, cast)}." in reply


# --- Numbers


def write(profile) -> dict[str, Estimate]:
    """Write and return the numbers of all seeds that have a file."""
    numbers = summarize(profile, read_runs(profile))
    plain = {name: results.plain(asdict(number)) for name, number in numbers.items()}
    cache.write_json(profile.results() / "numbers.json", {"profile": profile.digest(), "numbers": plain})
    return numbers


def read_runs(profile) -> list[dict]:
    """Read what each seed got right; files of other knobs are named and left out."""
    runs = []
    for path in sorted(profile.results().glob("seed-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["profile"] == profile.digest():
            runs.append(run)
        else:
            print(f"left out: {path} was run with other knobs; make it again with `make archives`")
    return runs


def summarize(profile, runs: list[dict]) -> dict[str, Estimate]:
    """Estimate {<cell>/<row>/<metric>}: means over the seeds that have the row; intervals draw archives and seeds.

    unseen, seen         R@1 on queries that name the colour which no train archive of their cast holds, and on others
    repaired             R@1 on queries whose first search as typed fails
    <metric>_over_<row>  a difference of COMPARED
    """
    numbers = {}
    for name in dict.fromkeys(name for run in runs for name in run["hits"]):
        cell = name.split("/")[0]
        for metric in dict.fromkeys(key for run in runs for key in run["hits"].get(name, ()) if key != "ids"):
            measured = _with(runs, metric, name)
            numbers[f"{name}/{metric}"] = _mean(profile, measured, cell, _values(measured, name, metric))
        if measured := _with(runs, "r1", name):
            values, unseen = _values(measured, name, "r1"), _unseen(measured[0]["cells"][cell])
            typed = _values(measured[:1], f"{cell}/typed", "r1").iloc[0]  # the same with every seed
            kinds = {"unseen": unseen, "seen": ~unseen, "repaired": typed == 0}
            for kind, chosen in kinds.items():
                numbers[f"{name}/{kind}"] = _mean(profile, measured, cell, values.loc[:, chosen])
    for cell in corpus.CELLS:
        for row, control, metric in COMPARED:
            if measured := _with(runs, metric, f"{cell}/{row}", f"{cell}/{control}"):
                gains = _values(measured, f"{cell}/{row}", metric) - _values(
                    measured, f"{cell}/{control}", metric
                )
                key = f"{cell}/{row}/{metric}_over_{control}"
                numbers[key] = _mean(profile, measured, cell, gains, "points")
    return numbers


def _with(runs, metric, *names):
    """Return the runs that measured a metric of all named rows."""
    return [run for run in runs if all(metric in run["hits"].get(name, ()) for name in names)]


def _values(runs, name, metric) -> pd.DataFrame:
    """Return 0 or 1 of each query: a row a seed, a column a query id."""
    hits = {run["seed"]: run["hits"][name] for run in runs}
    return pd.DataFrame({seed: pd.Series(map(int, row[metric]), row["ids"]) for seed, row in hits.items()}).T


def _unseen(described) -> pd.Series:
    return pd.Series([digit == "1" for digit in described["unseen"]], map(int, described["archives"]))


def _mean(profile, runs, cell, values, unit="%") -> Estimate:
    """Estimate the mean of values (R, Q) in percent."""
    seeds = tuple(run["seed"] for run in runs)
    if values.empty:
        return Estimate(None, 0, seeds=seeds, unit=unit)
    archives = [runs[0]["cells"][cell]["archives"][str(key)] for key in values.columns]
    ci = statistics.interval(statistics.bootstrap(values, archives, profile))
    note = f"made at {', '.join(sorted({run['commit'][:7] for run in runs}))}"
    return Estimate(100 * float(values.to_numpy().mean()), len(archives), ci, seeds, unit, note)


def read(folder: Path) -> dict[str, Estimate]:
    """Read the numbers of a folder of results; none before the study was run."""
    path = folder / "numbers.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Estimate(**number) for name, number in content.get("numbers", {}).items()}


# --- What was predicted, before the policies were trained


def _ahead(words, cell, a, b, low, high=100.0, metric="r1"):
    return Prediction(f"{cell}: {words}", f"{cell}/{a}/{metric}", f"{cell}/{b}/{metric}", low, high)


def _within(words, cell, system, metric, low, high=100.0):
    return Prediction(f"{cell}: {words}", f"{cell}/{system}/{metric}", None, low, high)


PREDICTIONS = (
    _within("the first search finds 15 to 40 %", "casts-whole", "typed", "r1", 15, 40),
    _within("the first search finds 15 to 40 %", "casts-half", "typed", "r1", 15, 40),
    _ahead(
        "soft tokens that know the cast are 30 points above it", "casts-whole", "oracle-soft", "typed", 30
    ),
    _ahead("soft tokens that know the cast are 30 points above it", "casts-half", "oracle-soft", "typed", 30),
    _within("no query-only map finds more than 30 %", "casts-whole", "adapter-soft", "r1", 0, 30),
    _within("no query-only map finds more than 30 %", "casts-half", "adapter-soft", "r1", 0, 30),
    _within("nine of ten replies name the cast", "casts-whole", "sqr", "cast", 90),
    _within("three of four replies name the cast", "casts-half", "sqr", "cast", 75),
    _ahead("SQR is 15 points ahead of soft tokens that never look", "casts-whole", "sqr", "adapter-soft", 15),
    _ahead("SQR is 10 points ahead of soft tokens that never look", "casts-half", "sqr", "adapter-soft", 10),
    _ahead("trained words are ahead of SQR, or at most 10 points behind", "casts-whole", "hqr", "sqr", -10),
    _ahead("SQR is 5 points ahead of trained words", "casts-half", "sqr", "hqr", 5),
    _ahead(
        "SQR is within 5 points of soft tokens that never look", "same-half", "sqr", "adapter-soft", -5, 5
    ),
    _ahead(
        "a film of another camera costs 10 points",
        "casts-whole",
        "if-own",
        "if-other-archive",
        10,
        metric="repaired",
    ),
    _ahead(
        "another film of the archive costs none",
        "casts-whole",
        "if-own",
        "if-same-archive",
        -5,
        5,
        "repaired",
    ),
    _ahead(
        "a wrong cast in the reply costs 20 points",
        "casts-whole",
        "if-teacher",
        "if-teacher-wrong-cast",
        20,
        metric="repaired",
    ),
    Prediction(
        "casts-whole: colours that a cast never showed cost SQR 10 points",
        "casts-whole/sqr/seen",
        "casts-whole/sqr/unseen",
        10,
        100,
    ),
)


# Written when the first run had failed, and a trial on held-out train archives, in words alone, had shown that replies
# translate all colours and soft tokens find 24 % where the query as typed finds 15. The trial looked at no test film.
SECOND = (
    _within("trained words find 40 to 70 %", "casts-whole", "hqr", "r1", 40, 70),
    _within("trained words find 30 to 65 %", "casts-half", "hqr", "r1", 30, 65),
    _within("SQR finds 15 to 40 %", "casts-whole", "sqr", "r1", 15, 40),
    _within("SQR finds 15 to 40 %", "casts-half", "sqr", "r1", 15, 40),
    _ahead("trained words are 15 points ahead of SQR", "casts-whole", "hqr", "sqr", 15),
    _ahead("SQR is 5 points ahead of soft tokens that never look", "casts-whole", "sqr", "adapter-soft", 5),
    _within("eight of ten replies name the cast", "casts-whole", "hqr", "cast", 80),
    _within("half of the replies name the cast", "casts-half", "hqr", "cast", 50),
    _ahead(
        "a film of another camera costs trained words 25 points",
        "casts-whole",
        "hqr-if-own",
        "hqr-if-other-archive",
        25,
        metric="repaired",
    ),
    _ahead(
        "another film of the archive costs them none",
        "casts-whole",
        "hqr-if-own",
        "hqr-if-same-archive",
        -5,
        5,
        metric="repaired",
    ),
    _ahead(
        "at three films, trained words are 10 points ahead of rank fallback (VCMR)",
        "casts-whole",
        "hqr",
        "walkdown",
        10,
        metric="vcmr_t3",
    ),
    _within("soft tokens that never look find 30 to 60 %", "same-half", "adapter-soft", "r1", 30, 60),
)

# Written when the policy had learned in words how colours shift (`translate-2` in vsr1/mini/recipes.yaml), before a run
# on the films of world 2711. 5 of 14 came out: replies no longer read the camera. They stand unchanged for the next
# run, on the films of world 2712: `translate` no longer teaches to guess it, and there are twice the rows with films.
THIRD = (
    _within("seven of ten replies name the cast", "casts-whole", "sqr", "cast", 70),
    _within("half of the replies name the cast", "casts-half", "sqr", "cast", 50),
    _within("replies translate eight of ten shirts", "casts-whole", "sqr", "shirt", 80),
    _within("replies translate eight of ten objects' colours", "casts-whole", "sqr", "colour", 80),
    _within("SQR finds 35 to 65 %", "casts-whole", "sqr", "r1", 35, 65),
    _within("SQR finds 25 to 60 %", "casts-half", "sqr", "r1", 25, 60),
    _within("trained words find 40 to 70 %", "casts-whole", "hqr", "r1", 40, 70),
    _within("trained words find 30 to 65 %", "casts-half", "hqr", "r1", 30, 65),
    _ahead("SQR is 25 points ahead of soft tokens that never look", "casts-whole", "sqr", "adapter-soft", 25),
    _ahead("SQR is 15 points ahead of soft tokens that never look", "casts-half", "sqr", "adapter-soft", 15),
    _ahead(
        "a film of another camera costs SQR 20 points",
        "casts-whole",
        "if-own",
        "if-other-archive",
        20,
        metric="repaired",
    ),
    _ahead(
        "another film of the archive costs it none",
        "casts-whole",
        "if-own",
        "if-same-archive",
        -5,
        5,
        metric="repaired",
    ),
    _ahead(
        "at three films SQR is 10 points ahead of rank fallback (VCMR)",
        "casts-whole",
        "sqr",
        "walkdown",
        10,
        metric="vcmr_t3",
    ),
    Prediction(
        "casts-whole: colours that a cast never showed cost SQR 10 points",
        "casts-whole/sqr/seen",
        "casts-whole/sqr/unseen",
        10,
        100,
    ),
)

# Written before the systems in it were run, when seeds 42 and 1 of all others were known.
FOURTH = (
    _ahead("Rocchio is within 5 points of the query as typed", "casts-whole", "rocchio", "typed", -5, 5),
    _ahead("Rocchio is within 5 points of the query as typed", "casts-half", "rocchio", "typed", -5, 5),
    _ahead("static soft tokens, too", "casts-whole", "adapter-static", "typed", -5, 5),
    _ahead("static soft tokens gain at most 15 points", "same-half", "adapter-static", "typed", -5, 15),
    _ahead("the best fixed wording is within 5 points", "casts-whole", "hqr-fixed", "typed", -5, 5),
    _within(
        "the best wording finds a random wrong film in at most 10 %",
        "casts-whole",
        "words-wrong",
        "r1",
        0,
        10,
    ),
    _ahead(
        "the clearest of three verdicts is at most 3 points of VCMR ahead of rank fallback",
        "casts-whole",
        "rerank",
        "walkdown",
        -100,
        3,
        "vcmr_t3",
    ),
    _ahead(
        "at three films SQR gains 10 points of VCMR where it shows no film twice",
        "same-whole",
        "sqr-skip",
        "sqr",
        10,
        metric="vcmr_t3",
    ),
    _ahead(
        "it is then within 3 points of rank fallback", "same-whole", "sqr-skip", "walkdown", -3, 3, "vcmr_t3"
    ),
    _within(
        "beside the rejected film, the reply to a film of another camera leaves at most 10 % repaired",
        "casts-whole",
        "if-other-reply",
        "repaired",
        0,
        10,
    ),
)


def outcomes(numbers: dict[str, Estimate], predictions) -> list[tuple[str, str, str]]:
    """Return (what was predicted, what was measured, whether it came out) of each prediction."""
    rows = []
    for prediction in predictions:
        measured, came_out = prediction.outcome(numbers)
        rows.append((prediction.words, measured, "**no**" if came_out == "no" else came_out))
    return rows
