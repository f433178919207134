"""One system on one data set: the loop of `episode`, wired to engine, policy and videos, leaves its episodes on disk.

runs/<profile>/<dataset>/episodes/<system>.jsonl      read it with `episode.read_episodes`
"""

import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object

from vsr1 import corpus, engine, episode, frames, metrics, policy, qwen, refine, stages
from vsr1.episode import AS_TYPED, Cost, Episode, Look, Ranking, Refinement, read_reply
from vsr1.params import InputError

ALIKE, ALIKE_QUERIES = 0.999, 8  # METHOD.md 8: lowest cosine; of so many queries (ours)
CLIP_BYTES = 512 * 2**20  # ours: decoded frames that are kept; the mini test videos of one data set fit


SPLITS = {"test": "test", "held": "train"}  # the corpus that a split's queries search


@dataclass(frozen=True)
class System:
    """What a system does where systems differ."""

    refine: str | None = None  # walkdown, sqr, or an HQR variant: blind, seen, reasoned; None: it looks once
    mode: str = "replace"  # of HQR: the update instead of the query, or append: behind it
    next_shown: str | None = None  # None: as the profile says
    first: str = "ranked"  # what the first search shows; "right" and "wrong" are given away (known video)
    marked: bool = False  # <REFINE> is put behind every reply: heads on a model that never learned to say it


SYSTEMS = {
    "zs": System(),
    "walkdown": System("walkdown", next_shown="skip_rejected"),
    "sqr": System("sqr"),
    "sqr-untrained": System("sqr", marked=True),
    **{f"hqr-{variant}": System(variant) for variant in ("blind", "seen", "reasoned")},
    **{f"hqr-{variant}-append": System(variant, "append") for variant in ("blind", "seen", "reasoned")},
    "known-right": System(first="right"),
    "known-wrong": System(first="wrong"),
}


@dataclass(frozen=True, eq=False)
class Asked:
    """A query as it stands after a refinement."""

    carried: tuple  # of the latest turns, oldest first: soft tokens (N, D), or updates in words
    vec: np.ndarray  # (D,) length one


class Clips:
    """The videos of a gallery, decoded when first shown; the latest `CLIP_BYTES` of them are kept."""

    def __init__(self, folder: Path, ids, read):
        self.paths = {v.id: v.path or folder / f"{v.id}.mp4" for v in corpus.find_videos(folder, ids)}
        self.read, self.kept, self.size = read, OrderedDict(), 0

    def get(self, ids) -> list[frames.Clip]:
        """One Clip per id; a video that cannot be read is one with a `problem`."""
        coming = {
            video: self.read(self.paths[video]) for video in dict.fromkeys(ids) if video not in self.kept
        }
        found = {video: self.kept[video] if video in self.kept else coming[video].result() for video in ids}
        for video, clip in found.items():
            if video in coming:
                self.kept[video] = clip
                self.size += _bytes(clip)
            self.kept.move_to_end(video)
        while self.size > CLIP_BYTES and self.kept:
            self.size -= _bytes(self.kept.popitem(last=False)[1])
        return [found[video] for video in ids]


def _bytes(clip):
    return 0 if clip.frames is None else clip.frames.nbytes


class Wiring:
    """Engine, policy and videos as the functions that the loop is handed: `search`, `ask`, `refine`."""

    def __init__(self, profile, system: System, made, agent, vectors, clips: Clips):
        self.system, self.engine, self.agent, self.vectors, self.clips = system, made, agent, vectors, clips
        self.max_new, self.top = profile.max_new, profile.max_turns + 1
        self.column = {video: number for number, video in enumerate(vectors.video_ids)}
        self.typed = dict(zip(vectors.query_ids, vectors.query_vecs, strict=True))
        self.carry = agent.settings.carry_blocks if system.refine == "sqr" else 1
        plain = agent.settings is None or system.marked  # it is asked for what it knows
        self.prompt = policy.SYSTEM_ZS if plain else agent.settings.system
        self.layout = "plain" if agent.heads is None else "sqr"
        if system.refine == "reasoned":
            self.prompt, self.layout = policy.SYSTEM_HQR, "hqr"
        self.long = refine.longer(made)  # for updates in words
        kinds = {None: None, "walkdown": episode.walk_down, "sqr": self.soft}
        self.refine = kinds.get(system.refine, self.hard)

    def search(self, pairs) -> list[Ranking]:
        """The gallery in the order of each query's vector."""
        # (B, D) query vectors against (V, D) of the videos
        vecs = np.stack([self.typed[q.id] if state is AS_TYPED else state.vec for q, state in pairs])
        scores = vecs @ self.vectors.video_vecs.T  # (B, V)
        right = np.array([self.column.get(query.video, 0) for query, _ in pairs])
        ranks, ties = metrics.ranks(scores, right), metrics.ties(scores, right)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.top]  # equal scores in row order
        found = []
        for row, (query, _) in enumerate(pairs):
            top = tuple(self.vectors.video_ids[column] for column in best[row])
            score, first = float(scores[row, right[row]]), float(scores[row, best[row, 0]])
            known = query.video in self.column
            place = (int(ranks[row]), int(ties[row])) if known else (None, None)
            found.append(Ranking(*place, self._given(query, top), score if known else None, first))
        return found

    def _given(self, query, top):
        """What is shown where the right or the best wrong video is given away."""
        if self.system.first == "right":
            return (query.video,)
        return tuple(v for v in top if v != query.video) if self.system.first == "wrong" else top

    def ask(self, pairs) -> list[Look]:
        """What the policy says to each query and its video; videos are decoded apart from the seconds."""
        clips = self.clips.get([video for _, video in pairs])
        good = [row for row, clip in enumerate(clips) if clip.problem is None]
        prompts = [self.agent.prompt(self.prompt, pairs[row][0].text, clips[row]) for row in good]
        looks = [Look(None, problem=clip.problem) for clip in clips]
        replies = self._say(prompts)
        if self.system.marked and replies:
            replies = self._mark(prompts, replies)
        for row, prompt, (said, seconds) in zip(good, prompts, replies, strict=True):
            reply = read_reply(
                said.text, said.ids, layout=self.layout, refine_id=self.agent.mark, ended=said.ended
            )
            cost = Cost(seconds, len(said.ids), len(prompt.ids) + len(said.ids), 0)
            # A branch holds the KV cache of its whole batch: only where soft tokens are made from it.
            branch = said.branch if self.system.refine == "sqr" else None
            looks[row] = Look(reply, clips[row].seconds, cost, state=(branch, clips[row]))
        return looks

    def _say(self, prompts):
        """(completion, seconds) of each prompt, greedily, as one batch."""
        started = time.perf_counter()
        said = self.agent.reply(prompts, max_new=self.max_new) if prompts else []
        seconds = (time.perf_counter() - started) / max(1, len(said))
        return [(one, seconds) for one in said]

    def _mark(self, prompts, replies):
        """The same replies with <REFINE> at their end, and their branches there."""
        branches = self.agent.marked(prompts, [said.ids for said, _ in replies])
        return [
            (replace(said, ids=ids, text=f"{said.text} {policy.REFINE}", branch=branch), seconds)
            for (said, seconds), (ids, branch) in zip(replies, branches, strict=True)
        ]

    @torch.no_grad()
    def soft(self, rejected) -> list[Refinement]:
        """SQR: N latents of each reply that asks for them, and the query with 1, 2, .. N of them."""
        started, n = time.perf_counter(), self.agent.settings.n_soft
        steps = [Refinement("sqr", None) for _ in rejected]
        rows = [row for row, (_, look, _) in enumerate(rejected) if look.reply.has_refine]
        if not rows:
            return steps
        latents = refine.soft_tokens(self.agent, [rejected[row][1].state[0] for row in rows], n)  # (B, N, D)
        earlier = [() if rejected[row][2] is AS_TYPED else rejected[row][2].carried for row in rows]
        blocks = [torch.stack(turn) for turn in zip(*earlier, strict=True)]  # all walks are at the same turn
        texts = [rejected[row][0].text for row in rows]
        carried = refine.carry([*blocks, latents], self.carry)  # (B, up to C * N, D)
        vecs = refine.soft_query(self.engine, self.agent.heads, texts, carried).cpu().numpy()
        seconds = (time.perf_counter() - started) / len(rows)
        kept = carried[:, : carried.shape[1] - n]  # of earlier turns
        depths = range(1, n + 1)  # with the last, which is known, for one soft token has no other
        sweep = refine.by_depth(self.engine, self.agent.heads, texts, latents, kept, depths).cpu().numpy()
        for i, row in enumerate(rows):
            state = Asked((*earlier[i], latents[i])[-self.carry :], vecs[i])
            by_depth = (*(Asked((), vec) for vec in sweep[i, :-1]), state)
            cost = Cost(seconds, n, n, 1)  # <REFINE> is read once more, the last latent is not
            steps[row] = Refinement("sqr", state, n, n + 1, cost=cost, by_depth=by_depth)
        return steps

    def hard(self, rejected) -> list[Refinement]:
        """HQR: the query in other words, from the reply itself (reasoned) or from another call (blind, seen)."""
        variant, mode = self.system.refine, self.system.mode
        updates, costs = [look.reply.update for _, look, _ in rejected], [Cost()] * len(rejected)
        if variant != "reasoned":
            system, sees = refine.rewriter(variant)
            asked = [(query.text, look.state[1] if sees else None) for query, look, _ in rejected]
            prompts = [self.agent.prompt(system, *one) for one in asked]
            said = self._say(prompts)
            updates = [read_reply(one.text, one.ids, ended=one.ended).update for one, _ in said]
            costs = [
                Cost(seconds, len(one.ids), len(prompt.ids) + len(one.ids), 0)
                for prompt, (one, seconds) in zip(prompts, said, strict=True)
            ]
        started = time.perf_counter()
        rows = [row for row, update in enumerate(updates) if update is not None]
        texts = [refine.hard_text(rejected[row][0].text, [updates[row]], mode) for row in rows]
        vecs = self.long.embed_texts(texts) if texts else []
        seconds = (time.perf_counter() - started) / max(1, len(rows))
        kind = f"hqr-{variant}" + "-append" * (mode == "append")
        steps = [Refinement(kind, None, cost=cost) for cost in costs]
        for row, vec in zip(rows, vecs, strict=True):
            size = self._tokens(updates[row]), self._tokens(f"<query_update>{updates[row]}</query_update>")
            cost = costs[row] + Cost(seconds, 0, 0, 1)
            steps[row] = Refinement(kind, Asked((updates[row],), vec), *size, updates[row], cost)
        return steps

    def _tokens(self, text):
        return len(self.agent.tokenizer(text, add_special_tokens=False)["input_ids"])


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
    system, home = _system(like or name), profile.runs(dataset)
    weights = policy.at(weights or profile.policy, profile)
    used = ("episode", "evaluate", "refine", "policy", "engine", "qwen", "frames", "metrics")
    sight = [profile.video_fps, profile.max_frames, profile.frame_pixels, profile.max_new, profile.dtype]
    loop = [profile.max_turns, profile.next_shown, profile.eval_batch, profile.seed]
    inputs = {
        # engine, videos, annotations
        "vectors": stages.stamp(home / "embed" / "engine" / SPLITS[split]).get("key"),
        "policy": qwen.version(weights),
        "system": [name, *vars(system).values()],
        "count": [count, split, profile.held_out if split == "held" else None],
        "knobs": [
            *sight,
            *loop,
            profile.n_soft,
            profile.seed_norm,
            profile.refine_init,
            profile.carry_blocks,
        ],
        "code": stages.code(*used),
    }
    folder = home / "episodes" / name
    if not (folder / "episodes.jsonl").exists():  # somebody deleted a damaged file
        (folder / ".stage.json").unlink(missing_ok=True)
    work = profile, dataset, name, system, weights, count, split
    stages.run(folder, inputs, lambda partial: _walk(*work, partial), together=True)
    link = folder.with_name(f"{name}.jsonl")
    if stages.team().is_main_process and not link.is_symlink():
        link.symlink_to(Path(name) / "episodes.jsonl")
    return link


def _system(name):
    if name not in SYSTEMS:
        raise InputError(f"{name}: no such system; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def _walk(profile, dataset, name, system, weights, count, split, folder):
    """Fill `folder` with the episodes, `profile.eval_batch` queries at a time, each batch a file until the end.

    Each of several processes walks its share of the batches: what a batch gives does not depend on how many there are.
    """
    home, mates = profile.runs(dataset), stages.team()
    queries = corpus.read_fig(home / "corpus" / f"{SPLITS[split]}.jsonl")
    queries = sample(corpus.hold_out(queries, profile.held_out)[1] if split == "held" else queries, count)
    vectors = engine.load_vectors(home / "embed" / "engine" / SPLITS[split])
    made, agent = load_pair(profile, system, weights)
    if agent.embedder:
        check_same(made, vectors, queries)
    with frames.readers(frames.Reader(profile.video_fps, profile.max_frames), profile.decoders) as read:
        wired = Wiring(profile, system, made, agent, vectors, Clips(home / "videos", vectors.video_ids, read))
        shown, turns = system.next_shown or profile.next_shown, profile.max_turns if system.refine else 1
        run = episode.Run(dataset, split, name, turns, wired.carry, profile.seed, shown, wired.carry == 1)
        batches = [queries[i : i + profile.eval_batch] for i in range(0, len(queries), profile.eval_batch)]
        parts = [folder / f"part-{number:05}.jsonl" for number in range(len(batches))]
        own = list(zip(parts, batches, strict=True))[mates.process_index :: mates.num_processes]
        portions, cut = qwen.Portions("eval_batch"), []

        def walk(some):
            before = wired.long.cut
            walked = episode.run_episodes(some, wired.search, wired.ask, wired.refine, run)
            cut.append(wired.long.cut - before)
            return walked

        for part, batch in stages.progress(own, f"{name} {dataset}"):
            if not part.exists():
                episode.write_episodes(
                    part, run, [one for walked in portions.run(walk, batch) for one in walked]
                )
    cut = [sum(cut)] if mates is stages.ALONE else gather_object([sum(cut)])
    if not mates.is_main_process:
        return
    episodes = [one for part in parts for one in episode.read_episodes(part)]
    episode.write_episodes(folder / "episodes.jsonl", run, episodes)
    problems = sorted({one.problem for one in episodes if one.problem is not None})
    notes = qwen.facts(agent.model) | {"updates_cut": sum(cut), "problems": problems}
    stages.write_json(folder / "notes.json", notes)
    for part in parts:
        part.unlink()


def sample(queries: list, count: int | None) -> list:
    """At most `count` of the queries, spread evenly, in their order; all of them without a count.

    >>> sample([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 2, 4]
    """
    count = len(queries) if count is None else min(count, len(queries))
    return [queries[i * len(queries) // count] for i in range(count)]


def load_pair(profile, system: System, weights: str):
    """(engine, policy) that fit each other: the profile's engine, or the one that came with the policy.

    A policy without heads gets new, untrained ones where SQR needs them.
    """
    agent = policy.load(weights, profile)
    agent.model.requires_grad_(False)  # a video is looked at once, then (`qwen.prefill`)
    made = engine.load(replace(profile, engine=agent.embedder) if agent.embedder else profile)
    if system.refine == "sqr":
        if agent.heads is None:
            settings = policy.new_settings(profile, made.instruction)
            agent = policy.new_heads(agent, settings, profile.seed, made)
        refine.check_fit(agent, made)
    return made, agent


def check_same(made, vectors, queries) -> None:
    """Says so where an engine that came with a policy is not the one that embedded the corpus (METHOD.md 8)."""
    typed = dict(zip(vectors.query_ids, vectors.query_vecs, strict=True))
    some = sample(queries, ALIKE_QUERIES)
    cosines = (made.embed_texts([q.text for q in some]) * np.stack([typed[q.id] for q in some])).sum(axis=1)
    if cosines.min() < ALIKE:
        far = f"a query's vector has cosine {cosines.min():.4f} with that beside the index"
        warnings.warn(f"{made.name}: {far}; is the profile's engine the same?", stacklevel=2)


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
        halves[half] = episode.read_episodes(path)
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
    return [query.duration for query in corpus.read_fig(profile.runs(dataset) / "corpus" / "test.jsonl")]
