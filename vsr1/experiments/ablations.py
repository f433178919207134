"""Which parts carry it: stages, rewards, soft tokens, turns, engines (notebook 07), and studies beyond the paper.

A variant is the profile with a few knobs changed. It works beside the main run, which lends it all that it does not
change. `make ablations` runs what would take too long for `make paper`; what it finds is committed.

runs/<profile>/variants/<variant>/<dataset>/   what a variant trained and walked
results/<profile>/ablations/<dataset>.json     tables B1 to B3, read by `results.collect` like any other part
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch

from vsr1 import cache
from vsr1.config import Profile
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.evaluation import metrics, statistics
from vsr1.experiments import refinement
from vsr1.loop import episode, hqr, records, runner, sqr
from vsr1.loop.records import Episode
from vsr1.models import embedding, engine, loading, search_index
from vsr1.report import results
from vsr1.report.results import Estimate
from vsr1.training import grpo, sft

STAGES = "didemo"  # the data set of the paper's ablation of stages and rewards (T2), and so of B1
PARTS = ("vcmr@0.5", "vr@1", "ver")  # columns of T2


@dataclass(frozen=True)
class Variant:
    """The headline recipe with something changed; published.yaml has the words."""

    knobs: dict = field(default_factory=dict)
    recipe: str = "vsr1"  # of stage 2; "sft": only stage 1 is trained, and is compared with stage 1


REWARDS = {  # T2
    "no-ret": Variant({"disabled_rewards": ("retrieval",)}),
    "no-verif": Variant({"disabled_rewards": ("verification",)}),
}
LONGER = {  # B1
    "no-time": Variant({"disabled_rewards": ("grounding",)}),
    "no-right": Variant({"disabled_rewards": ("verification", "grounding")}),  # each of them pays right verdicts only
    "no-form": Variant({"disabled_rewards": ("format", "refine_token")}),
    "delta": Variant({"retrieval_reward": "delta"}),
    "single": Variant(recipe="vsr1-single"),
    "m1": Variant(recipe="m1"),
    "m3": Variant(recipe="m3"),
    "gauss": Variant(
        {"grpo_infonce_weight": 1.0}, "gauss"
    ),  # its soft tokens learn from rewards, not beside them
    "filter": Variant({"ambiguity_filter": 0.0005}, "sft"),
    **{f"n{n}": Variant({"n_soft": n}, "sft") for n in (1, 2, 4)},
}


def trained(profile: Profile, dataset: str, name: str) -> list[Episode]:
    """The test episodes of a variant, trained now if it is not there."""
    variant = (REWARDS | LONGER)[name]
    if variant.recipe == "sft":
        own = profile.with_overrides(name, **variant.knobs)
        weights = sft.train(own, dataset)
    else:
        own = profile.with_overrides(name, **variant.knobs)
        weights = grpo.train(own, dataset, variant.recipe, stage_1=sft.train(profile, dataset))
    return refinement.episodes(own, dataset, name, like="sqr", weights=str(weights))


def main_runs(profile: Profile, dataset: str) -> dict[str, list[Episode]]:
    """The base model (one look), stage 1 and both stages: what variants are compared with."""
    walked = {"zs": metrics.within(refinement.episodes(profile, dataset, "walkdown"), 1)}
    for name, train in {"sft": sft.train, "vsr1": grpo.train}.items():
        walked[name] = refinement.episodes(
            profile, dataset, name, like="sqr", weights=str(train(profile, dataset))
        )
    return walked


def shares(profile: Profile, place: str, walked: list[Episode]) -> dict[str, Estimate]:
    """PARTS of one system, as <place>/<metric>."""
    found = metrics.hits(walked)
    return {f"{place}/{key}": refinement.share(profile, walked, found[key]) for key in PARTS}


def stages_and_rewards(profile: Profile) -> dict[str, Estimate]:
    """T2: what each stage adds, and what stage 2 loses without a reward. The InfoNCE gradient stays in all of them."""
    runs = main_runs(profile, STAGES) | {name: trained(profile, STAGES, name) for name in REWARDS}
    numbers = {}
    for name, walked in runs.items():
        numbers |= shares(profile, f"T2/{STAGES}/{name}", walked)
    return numbers


def missed(profile: Profile) -> dict[str, tuple]:
    """{words: (both stages, stage 2 without a reward, metric)}: pairs for `training.gains`."""
    whole, words = main_runs(profile, STAGES)["vsr1"], results.layouts()["T2"]["systems"]
    return {
        f"{key}, {words[name]}": (whole, trained(profile, STAGES, name), key)
        for name in REWARDS
        for key in PARTS
    }


# --- F4: soft tokens


def depths(profile: Profile, dataset: str, walked: list[Episode]) -> dict[str, Estimate]:
    """F4: R@1 with the first d latents of the first refinement, over all queries that refined at turn 1, and over
    those of them whose first search failed. The prefix of one model, not a model per d."""
    asked = [one for one in walked if one.turns and one.turns[0].rank_by_depth]
    numbers = {}
    for system, chosen in {"vsr1": asked, "vsr1-failed": metrics.failed(asked)}.items():
        for depth in range(profile.n_soft + 1):
            hits = [one.turns[0].rank_by_depth[depth] == 1 for one in chosen]
            numbers[f"F4/{dataset}/{system}/d{depth}"] = refinement.share(profile, chosen, hits)
    return numbers


# --- F5: turns


def skipping(profile: Profile, dataset: str) -> list[Episode]:
    """Both stages, but a video that was rejected is not shown again."""
    own = profile.with_overrides("skip", display_rule="skip_rejected")
    weights = grpo.train(profile, dataset)
    return refinement.episodes(own, dataset, "vsr1", like="sqr", weights=str(weights))


def turns(profile: Profile, table: str, dataset: str, runs: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """F5 and B2: what runs give at 1, 2, .. T looks, and the share of episodes that want another one."""
    numbers = {}
    for system, walked in runs.items():
        for budget in range(1, walked[0].run.max_turns + 1):
            cut = metrics.within(walked, budget)
            found = metrics.hits(cut)
            found["open"] = [one.problem is None and one.stop_reason == "budget" for one in cut]
            for key in (*(f"vcmr@{m}" for m in metrics.THRESHOLDS), "ver", "open"):
                numbers[f"{table}/{dataset}/{system}/{key}_t{budget}"] = refinement.share(
                    profile, cut, found[key]
                )
    return numbers


# --- A2: engines


class Retry(runner.EpisodeRunner):
    """The loop of the retry study (METHOD.md 11): every look is a rejection, and every SQR reply asks for a search."""

    def _reply(self, prompts):
        completions, seconds = super()._reply(prompts)
        without = [i for i, one in enumerate(completions) if self.policy.refine_token_id not in one.ids]
        if self.system.refine == "sqr" and without:
            appended = self._append_refine([prompts[i] for i in without], [completions[i] for i in without])
            for i, completion in zip(without, appended, strict=True):
                completions[i] = completion
        return completions, seconds

    def ask(self, pairs):
        """As in the loop, but whatever was said means no."""
        looks = super().ask(pairs)
        return [
            one if one.reply is None else replace(one, reply=replace(one.reply, matched=False))
            for one in looks
        ]


def retry(profile: Profile, dataset: str, system: str, weights: str | None = None) -> list[Episode]:
    """One refinement of at most `studies.sample_queries` queries whose first search failed, right after the look."""
    home, weights = profile.runs(dataset), weights or profile.policy
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    inputs = {
        "vectors": cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / "test").get("key"),
        "policy": loading.version(weights),
        "system": [
            system,
            *vars(runner.SYSTEMS[system]).values(),
            profile.studies.sample_queries,
            profile.seed,
        ],
        "sight": [
            profile.video_fps,
            profile.max_frames,
            profile.max_frame_pixels,
            profile.max_new_tokens,
            profile.dtype,
        ],
        "code": cache.source_digest(__name__),
    }

    def walk(folder):
        kind = runner.SYSTEMS[system]
        made, agent = runner.load_pair(profile, kind, weights)
        queries = {
            query.id: query
            for query in annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
        }
        with video_reader.reader_pool(
            video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
        ) as read:
            clips = clip_cache.ClipCache(profile.data_dir(dataset) / "videos", vectors.video_ids, read)
            wired = Retry(profile, kind, made, agent, vectors, clips)
            run = records.Run(dataset, "test", system, 1, 1, profile.seed, "top1")
            asked = annotations.evenly_spaced(failures(vectors, queries), profile.studies.sample_queries)
            walked = []
            for at in range(0, len(asked), profile.eval_batch):
                batch = asked[at : at + profile.eval_batch]
                walked += episode.run_episodes(batch, wired.search, wired.ask, wired.refine, run)
        records.write_episodes(folder / "episodes.jsonl", run, walked)

    return records.read_episodes(cache.build(home / "retry" / system, inputs, walk) / "episodes.jsonl")


def failures(vectors: search_index.Vectors, queries: dict[int, annotations.Query]) -> list[annotations.Query]:
    """The queries whose right video is not first in the first search, in their order."""
    known = [queries[key] for key in vectors.query_ids if vectors.has_video(queries[key].video)]
    scores = vectors.scores(vectors.vecs_of([query.id for query in known]))  # (Q, V)
    ranks = search_index.ranks(scores, vectors.columns([query.video for query in known]))
    return [query for query, rank in zip(known, ranks, strict=True) if rank > 1]


def behind(profile: Profile, dataset: str, walked: list[Episode]) -> list[Episode]:
    """The same rewrites behind the query in place of for it: what mode `append` would have found."""
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    rows = [at for at, one in enumerate(walked) if one.turns and one.turns[0].update_text]
    texts = [hqr.compose_query(walked[at].query, walked[at].turns[0].update_text, "append") for at in rows]
    found = list(walked)
    if rows:
        scores = vectors.scores(hqr.with_query_limit(engine.load(profile)).embed_texts(texts))  # (R, V)
        right = vectors.columns([walked[at].gt_video for at in rows])
        for at, rank in zip(rows, search_index.ranks(scores, right), strict=True):
            turn = replace(walked[at].turns[0], rank_out=int(rank))
            found[at] = replace(walked[at], turns=(turn,))
    return found


def engines(profile: Profile, dataset: str) -> dict[str, list[Episode]]:
    """{<engine>/<system>: episodes} of the retry study. Soft tokens are for the engine they were trained with only."""
    large = profile.with_overrides("large", engine=profile.engine_large)
    embedding.embed_corpus(large, dataset, "test")
    found = {"small/sqr": retry(profile, dataset, "sqr", str(grpo.train(profile, dataset)))}
    for size, own in {"small": profile, "large": large}.items():
        for way in ("blind", "seen", "reasoned"):
            found[f"{size}/hqr-{way}"] = retry(own, dataset, f"hqr-{way}")
            found[f"{size}/hqr-{way}-append"] = behind(own, dataset, found[f"{size}/hqr-{way}"])
    return found


def retried(profile: Profile, dataset: str, found: dict[str, list[Episode]]) -> dict[str, Estimate]:
    """A2: R@k after one refinement (before: R@1 is 0), the median change of rank (above 0: better), the share worse."""
    numbers = {}
    both = set.intersection(*({one.desc_id for one in walked} for walked in found.values()))
    for key, walked in found.items():
        size, system = key.split("/")
        after, before = metrics.true_ranks(walked), metrics.true_ranks(walked, "orig")
        values = {f"vr@{k}": after <= k for k in (1, 5, 10)} | {"worse": after > before}
        values = {name: refinement.share(profile, walked, hits) for name, hits in values.items()}
        values["change"] = Estimate(float(np.median(before - after)), len(walked), unit="ranks")
        shared = refinement.only(walked, sorted(both))
        values["vr@1_both"] = refinement.share(profile, shared, metrics.vr_hits(shared, 1))
        numbers |= {f"A2/{dataset}/{system}/{name}_{size}": number for name, number in values.items()}
    return numbers


# --- Beyond the paper: `make ablations`


def run(profile: Profile, dataset: str) -> Iterator[str]:
    """The longer studies of one data set, one after the other; what is there so far is in its part after each."""
    sft.train(profile, dataset)
    for study_of in (longer_turns, growth):
        keep(profile, dataset, study_of(profile, dataset))
        yield study_of.__name__
    for name in LONGER if dataset == STAGES else ():
        keep(profile, dataset, variant_numbers(profile, name))
        yield name


def keep(profile: Profile, dataset: str, numbers: dict[str, Estimate]) -> None:
    """`numbers` into results/<profile>/ablations/<dataset>.json, beside those of the same knobs that are there."""
    path = profile.results() / "ablations" / f"{dataset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = old["numbers"] if old.get("profile") == profile.digest() else {}
    note = f"committed; run at {results.commit()[:7]}"
    kept |= {name: results.plain(asdict(replace(number, note=note))) for name, number in numbers.items()}
    cache.write_json(path, {"profile": profile.digest(), "numbers": kept, "series": {}})


def variant_numbers(profile: Profile, name: str) -> dict[str, Estimate]:
    """B1 of one variant: its shares, and how far it is ahead of the headline recipe at the same stage."""
    walked = trained(profile, STAGES, name)
    base = "sft" if LONGER[name].recipe == "sft" else "vsr1"
    other = main_runs(profile, STAGES)
    numbers = shares(profile, f"B1/{STAGES}/{base}", other[base]) | shares(
        profile, f"B1/{STAGES}/{name}", walked
    )
    videos = [one.gt_video for one in walked]
    for key in PARTS:
        mine, theirs = metrics.hits(walked)[key], metrics.hits(other[base])[key]
        rng = np.random.default_rng(profile.seed)
        ci = statistics.paired_bootstrap(mine, theirs, videos, profile.bootstrap_samples, rng=rng)
        ahead = metrics.percent(mine) - metrics.percent(theirs)
        numbers[f"B1/{STAGES}/{name}/{key}_ahead"] = Estimate(
            ahead, len(walked), ci, (profile.seed,), "points"
        )
    return numbers


def longer_turns(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """B2: up to four looks, and what happens where rejected videos are not shown again."""
    weights, runs = str(grpo.train(profile, dataset)), {}
    for name, shown in {"turns4": profile.display_rule, "turns4-skip": "skip_rejected"}.items():
        own = profile.with_overrides(name, max_turns=4, display_rule=shown)
        runs[name] = refinement.episodes(own, dataset, "vsr1", like="sqr", weights=weights)
    numbers = turns(profile, "B2", dataset, runs)
    return {
        name: number
        for name, number in numbers.items()
        if name.split("/")[-1] in results.layouts()["B2"]["metrics"]
    }


FULL = 100  # times as many videos as the corpus has, at most


def growth(profile: Profile, dataset: str) -> dict[str, Estimate]:
    """B3: R@1 before and after the first refinement as the gallery grows; the first look is that of the small one."""
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    weights = str(grpo.train(profile, dataset))
    hard = refinement.sampled(profile, dataset, "hqr-seen")
    hard = [one for one in hard if one.problem is None]  # a missing video stands in no gallery
    ids = [one.desc_id for one in hard]
    soft = refinement.only(refinement.episodes(profile, dataset, "vsr1", like="sqr", weights=weights), ids)
    typed = vectors.vecs_of(ids)
    sides = {
        "none": typed,
        "sqr": _softened(profile, dataset, soft, typed, weights),
        "hqr-seen": _reworded(profile, hard, typed),
    }
    right = vectors.columns([one.gt_video for one in soft])
    numbers = {}
    for size, gallery in galleries(profile, dataset, vectors):
        for system, vecs in sides.items():
            ranks = search_index.ranks(vecs @ gallery.T, right)
            for k in (1, 10):
                numbers[f"B3/{dataset}/{system}/vr@{k}_{size}"] = refinement.share(profile, soft, ranks <= k)
    return numbers


def galleries(
    profile: Profile, dataset: str, vectors: search_index.Vectors
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (V, D) vectors): galleries that grow, the test videos always first.

    own    the test videos; `train` with the train videos; `all` with the videos of the other data sets
    made   with synthetic ones as well, FULL times as many as the first: a video of this data set, moved by the
           difference of two that are most alike
    """
    others = [name for name in profile.datasets if name != dataset]
    load = lambda name, split: search_index.load_vectors(profile.data_dir(name) / "embed" / "engine" / split)  # noqa: E731
    real = [vectors.video_vecs, load(dataset, "train").video_vecs]
    yield "own", real[0]
    yield "train", np.concatenate(real)
    real += [load(name, split).video_vecs for name in others for split in ("train", "test")]
    grown = np.concatenate(real)
    if others:
        yield "all", grown
    rng, own = np.random.default_rng(profile.seed), np.concatenate(real[:2])
    near = (own @ own.T - 2 * np.eye(len(own))).argmax(axis=1)  # of each video the one most like it
    moved, pair = rng.integers(0, len(own), (2, FULL * len(real[0]) - len(grown)))
    made = own[moved] + own[pair] - own[near[pair]]
    yield "made", np.concatenate([grown, made / np.linalg.norm(made, axis=1, keepdims=True)])


@torch.no_grad()
def _softened(profile, dataset, walked, typed, weights):
    """(Q, D) query vectors after the first refinement, made again from the recorded replies; as typed without one."""
    made, agent = runner.load_pair(profile, runner.SYSTEMS["sqr"], weights)
    vecs, rows = (
        typed.copy(),
        [at for at, one in enumerate(walked) if one.turns and one.turns[0].rank_by_depth],
    )
    with video_reader.reader_pool(
        video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    ) as read:
        clips = clip_cache.ClipCache(
            profile.data_dir(dataset) / "videos", {one.turns[0].shown_id for one in walked if one.turns}, read
        )
        for at in range(0, len(rows), 16):
            batch = [walked[row] for row in rows[at : at + 16]]
            seen = clips.get([one.turns[0].shown_id for one in batch])
            prompts = [
                agent.prompt(agent.settings.system, one.query, clip)
                for one, clip in zip(batch, seen, strict=True)
            ]
            branches = agent.replay(prompts, [list(one.turns[0].reply.ids) for one in batch]).refine_contexts
            latents = sqr.soft_tokens(agent, branches, agent.settings.n_soft)
            soft = sqr.soft_query(made, agent.heads, [one.query for one in batch], latents)
            vecs[rows[at : at + 16]] = soft.cpu().numpy()
    return vecs


def _reworded(profile, walked, typed):
    """(Q, D) query vectors of the first rewrite; as typed without one."""
    vecs, rows = typed.copy(), [at for at, one in enumerate(walked) if one.turns and one.turns[0].update_text]
    if rows:
        made = hqr.with_query_limit(engine.load(profile))
        vecs[rows] = made.embed_texts([walked[row].turns[0].update_text for row in rows])
    return vecs
