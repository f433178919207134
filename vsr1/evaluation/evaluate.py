"""One system on one data set: the loop of `episode`, wired to engine, policy and videos, leaves its episodes on disk.

runs/<profile>/<dataset>/episodes/<system>.jsonl      read it with `episode.read_episodes`
"""

from pathlib import Path
from typing import Literal

import numpy as np
from accelerate.utils import gather_object

from vsr1 import cache
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.evaluation import metrics
from vsr1.loop import episode, records, runner
from vsr1.loop.records import Episode
from vsr1.models import batching, checkpoints, loading, search_index

SPLITS = {"test": "test", "held": "train"}  # the corpus that a split's queries search


# --- The stage


def run_system(
    profile,
    dataset: str,
    name: str,
    *,
    like: str | None = None,
    weights: str | None = None,
    count=None,
    split: Literal["test", "held"] = "test",
) -> Path:
    """The file of episodes of one system on one split; made once, resumed after a kill.

    like     which of SYSTEMS it is, where that is not its own name (`sft` walks like `sqr`)
    weights  folder or hub name of its policy; None: the profile's, with new heads where refinement needs some
    count    how many queries, spread evenly over the split; None: all
    split    "held": the train queries that nothing is learned from, in the train gallery
    """
    system, home = runner.find_system(like or name), profile.runs(dataset)
    weights = checkpoints.resolve_checkpoint(weights or profile.policy, profile)
    sight = [
        profile.video_fps,
        profile.max_frames,
        profile.max_frame_pixels,
        profile.max_new_tokens,
        profile.dtype,
    ]
    loop = [profile.max_turns, profile.display_rule, profile.eval_batch, profile.seed]
    inputs = {
        # engine, videos, annotations
        "vectors": cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / SPLITS[split]).get("key"),
        "policy": loading.version(weights),
        "system": [name, *vars(system).values()],
        "count": [count, split, profile.val_fraction if split == "held" else None],
        "knobs": [
            *sight,
            *loop,
            profile.n_soft,
            profile.refine_init,
            profile.carry_blocks,
        ],
        "code": cache.source_digest(__name__),
    }
    folder = home / "episodes" / name
    if not (folder / "episodes.jsonl").exists():  # somebody deleted a damaged file
        (folder / cache.RECORD).unlink(missing_ok=True)
    work = profile, dataset, name, system, weights, count, split
    cache.build(folder, inputs, lambda partial: _run_episodes(*work, partial), distributed=True)
    link = folder.with_name(f"{name}.jsonl")
    if cache.dist_state().is_main_process and not link.is_symlink():
        link.symlink_to(Path(name) / "episodes.jsonl")
    return link


def _run_episodes(profile, dataset, name, system, weights, count, split, folder):
    """Fill `folder` with the episodes, `profile.eval_batch` queries at a time, each batch a file until the end.

    Each of several processes walks its share of the batches: what a batch gives does not depend on how many there are.
    """
    mates = cache.dist_state()
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / f"{SPLITS[split]}.jsonl")
    queries = annotations.evenly_spaced(
        annotations.split_validation(queries, profile.val_fraction)[1] if split == "held" else queries, count
    )
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / SPLITS[split])
    made, agent = runner.load_pair(profile, system, weights)
    if agent.query_embedder:
        runner.warn_engine_mismatch(made, vectors, queries)
    with video_reader.reader_pool(
        video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    ) as read:
        wired = runner.EpisodeRunner(
            profile,
            system,
            made,
            agent,
            vectors,
            clip_cache.ClipCache(profile.data_dir(dataset) / "videos", vectors.video_ids, read),
        )
        shown, turns = system.display_rule or profile.display_rule, profile.max_turns if system.refine else 1
        run = records.Run(dataset, split, name, turns, wired.carry, profile.seed, shown, wired.carry == 1)
        batches = [queries[i : i + profile.eval_batch] for i in range(0, len(queries), profile.eval_batch)]
        parts = [folder / f"part-{number:05}.jsonl" for number in range(len(batches))]
        own = list(zip(parts, batches, strict=True))[mates.process_index :: mates.num_processes]
        portions, cut = batching.OOMSplitter("eval_batch"), []

        def walk(some):
            before = wired.long.num_truncated
            walked = episode.run_episodes(some, wired.search, wired.ask, wired.refine, run)
            cut.append(wired.long.num_truncated - before)
            return walked

        for part, batch in cache.progress(own, f"{name} {dataset}"):
            if not part.exists():
                records.write_episodes(
                    part, run, [one for walked in portions.run(walk, batch) for one in walked]
                )
    cut = [sum(cut)] if mates is cache.SINGLE_PROCESS else gather_object([sum(cut)])
    if not mates.is_main_process:
        return
    episodes = [one for part in parts for one in records.read_episodes(part)]
    records.write_episodes(folder / "episodes.jsonl", run, episodes)
    problems = sorted({one.problem for one in episodes if one.problem is not None})
    notes = loading.model_facts(agent.model) | {"updates_cut": sum(cut), "problems": problems}
    cache.write_json(folder / "notes.json", notes)
    for part in parts:
        part.unlink()


# --- A video that is given away: verification and grounding alone


def known_video(profile, dataset: str, *, weights: str | None = None, name="known") -> dict[str, float]:
    """Verification and grounding without search, percent: every test query with its right and its best wrong video.

    verdict            of both halves together, so half of the videos shown are right; `_right`, `_wrong` apart
    grounding@m, miou  of the span named for the right video, whatever the verdict; a reply without a span overlaps 0
    matched@m          the same where the verdict is matched as well
    majority, wholevideo@m, random@m   floors: always the same verdict, [0, duration], two uniform times
    """
    halves = {}
    for half in ("right", "wrong"):
        path = run_system(profile, dataset, f"{name}-{half}", like=f"known-{half}", weights=weights)
        halves[half] = records.read_episodes(path)
    return known_numbers(halves["right"], halves["wrong"], _durations(profile, dataset), profile.seed)


def known_numbers(right: list[Episode], wrong: list[Episode], durations, seed: int) -> dict[str, float]:
    """`known_video` of episodes of one turn; `durations` (Q,) seconds of the right videos."""
    assert [one.desc_id for one in right] == [one.desc_id for one in wrong]
    ious, truth = metrics.moment_ious(right), np.array([one.gt_span_ms for one in right]) / 1000
    verdicts = {"right": metrics.ver_hits(right), "wrong": metrics.ver_hits(wrong)}
    both = np.concatenate(list(verdicts.values()))
    numbers = {"verdict": metrics.percent(both)}
    numbers |= {f"verdict_{half}": metrics.percent(hits) for half, hits in verdicts.items()}
    numbers |= {f"grounding@{m}": metrics.percent(metrics.reaches(ious, m)) for m in metrics.THRESHOLDS}
    numbers |= {f"matched@{m}": metrics.percent(metrics.vcmr_hits(right, m)) for m in metrics.THRESHOLDS}
    numbers |= {"miou": metrics.percent(ious), "majority": 100 * max(len(right), len(wrong)) / len(both)}
    rng = np.random.default_rng([seed, 0])
    floors = {
        "wholevideo": metrics.whole_video_floor(durations, truth),
        "random": metrics.random_span_floor(durations, truth, rng=rng),
    }
    for floor, values in floors.items():
        numbers |= {f"{floor}@{m}": values[f"{m}-r1"] for m in metrics.THRESHOLDS}
        numbers[f"{floor}_miou"] = values["miou"]
    return numbers


def _durations(profile, dataset):
    return [
        query.duration for query in annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    ]
