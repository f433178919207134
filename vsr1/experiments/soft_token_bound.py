"""The ladder: from what any soft query could reach down to what heads learn, with one more restriction on each rung.

    free       latents of each test query, optimised against the frozen engine, by how they are written: the bound
    range      InfoNCE of the query as it is and of the right video's own vector: the room to work in
    overfit    a handful of train queries by heart: through the heads alone, then through heads and policy
    held       heads alone, trained on some train queries, asked about train videos held out

All but the first go the real way: the state at <REFINE>, `refine.soft_tokens`, `refine.soft_query`. They are text
only: the policy reads the query and what the teacher says about the video that the first search shows, not the video.
Negatives are the whole gallery. Test queries take part in the first rung only, which chooses nothing.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import annotations, source
from vsr1.data.annotations import evenly_spaced
from vsr1.evaluation import metrics, statistics
from vsr1.loop import sqr
from vsr1.models import checkpoints, decoding, engine, loading, policy, prompt_text, search_index, soft_heads
from vsr1.report.results import Estimate
from vsr1.training import common, released_replies, sft_data, sft_examples

INITS = ("zero", "default", "scaled")
DEPTHS = (1, 2, 4, 8)  # soft tokens


# --- free latents: nothing but the frozen engine


@dataclass(frozen=True)
class Way:
    """How free latents are written: their length at the start (0: all zero), and what they pass on their way in."""

    start: float
    through: Callable
    clip: float = torch.inf  # longest gradient of one query's latents


def ways(made: engine.Engine) -> dict[str, Way]:
    """Raw embeddings, or what B makes of latents in the official and in the scaled layout; three starts of each."""
    length = policy.mean_embedding_norm(made)
    heads = {
        init: soft_heads.SoftHeads(made.width, made.width, init, (length, length))
        for init in ("zero", "scaled")
    }
    layouts = {"raw": lambda free: free, "b": heads["zero"].B, "scaled": heads["scaled"].B}
    found = {"raw-kept": Way(length, lambda free: length * F.normalize(free, dim=-1))}
    for name, through in layouts.items():
        found |= {name: Way(length, through), f"{name}-zero": Way(0.0, through)}
        found[f"{name}-zero-clipped"] = Way(0.0, through, clip=1.0)
    return found


def free_step(made, way: Way, texts, free, gallery, right, tau):
    """Losses (Q,) of queries with their free latents (Q, N, D), the gradient of their sum, and ranks (Q,)."""
    free = free.detach().requires_grad_()
    vecs = made.pool(made.text_batch(texts, way.through(free)))
    losses = gallery_nce(vecs, gallery, right, tau)
    (slope,) = torch.autograd.grad(losses.sum(), free)
    longest = slope.flatten(1).norm(dim=1)[:, None, None]  # (Q, 1, 1)
    return losses.detach(), slope * (way.clip / longest).clamp(max=1), ranks_of(vecs, gallery, right)


def free_latents(made, way: Way, texts, gallery, right, profile):
    """Ranks (steps + 1, Q) of the right videos as the latents of each query are optimised for it alone."""
    noise = torch.randn(
        len(texts), profile.n_soft, made.width, generator=torch.Generator().manual_seed(profile.seed)
    )
    free = way.start * F.normalize(noise, dim=-1).to(gallery)
    adam, ranks = torch.optim.Adam([free], profile.soft_token_bound.free_lr), []
    for _ in range(profile.soft_token_bound.free_steps + 1):
        _, free.grad, now = free_step(made, way, texts, free, gallery, right, profile.infonce_temperature)
        ranks.append(now)
        adam.step()
    return np.array(ranks)


def gallery_nce(vecs, gallery, right, tau):
    """(Q,) InfoNCE of query vectors (Q, D) against all of a gallery (V, D); `right` (Q,) are columns of it."""
    return F.cross_entropy(vecs @ gallery.T / tau, right, reduction="none")


def ranks_of(vecs, gallery, right):
    """(Q,) ranks of the right videos."""
    return search_index.ranks((vecs.detach() @ gallery.T).cpu().numpy(), right.cpu().numpy())


# --- heads on a policy that reads


def read(agent: policy.Policy, rows: list[sft_examples.SFTExample]) -> list[decoding.Context]:
    """All that the policy has read when it comes to the <REFINE> of each row's reply; the video is left out."""
    prompts = [agent.prompt(agent.settings.system, row.query) for row in rows]
    said = [
        agent.tokenizer(f"{row.reply} {prompt_text.REFINE}", add_special_tokens=False)["input_ids"]
        for row in rows
    ]
    return agent.replay(prompts, [[*ids, agent.stop_token_id] for ids in said]).refine_contexts


@torch.no_grad()
def read_once(agent, rows, batch=32) -> list[decoding.Context]:
    """The same for a policy that stays as it is."""
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [context for part in cache.progress(parts, "read replies") for context in read(agent, part)]


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """Rows that heads learn from or are asked about, in one gallery."""

    rows: list[sft_examples.SFTExample]
    contexts: list[decoding.Context] | None  # None: the policy learns too, and reads anew each time
    gallery: torch.Tensor  # (V, D)
    right: torch.Tensor  # (R,) columns
    wrong: torch.Tensor | None = None  # (R, K) columns of the only negatives; None: the whole gallery

    def some(self, picked) -> "QueryBatch":
        """A few of the rows, by number."""
        wrong = None if self.wrong is None else self.wrong[picked]
        contexts = None if self.contexts is None else [self.contexts[i] for i in picked]
        return QueryBatch([self.rows[i] for i in picked], contexts, self.gallery, self.right[picked], wrong)

    def losses(self, vecs, tau) -> torch.Tensor:
        """InfoNCE of the rows' query vectors (R, D), (R,)."""
        if self.wrong is None:
            return gallery_nce(vecs, self.gallery, self.right, tau)
        return common.info_nce(vecs, self.gallery[self.right], self.gallery[self.wrong], tau)


def vecs_of(made, agent, asked: QueryBatch, n: int) -> torch.Tensor:
    """(R, D): query vectors with `n` soft tokens, as in the loop."""
    contexts = read(agent, asked.rows) if asked.contexts is None else asked.contexts
    latents = sqr.soft_tokens(agent, contexts, n)
    return sqr.soft_query(made, agent.heads, [row.query for row in asked.rows], latents)


def learn(made, agent, asked: QueryBatch, n: int, steps: int, profile) -> list[float]:
    """Losses of `steps` steps that train the heads of `agent`; and the policy too, unless it has read already."""
    learned = [weight for weight in agent.heads.parameters() if weight.requires_grad]
    groups = [{"params": learned, "lr": profile.soft_token_bound.head_lr}]
    if asked.contexts is None:
        groups.append({"params": list(agent.model.parameters()), "lr": profile.soft_token_bound.policy_lr})
    adam = torch.optim.Adam(groups)
    fade = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    rng, order, losses = np.random.default_rng([profile.seed, 12]), [], []
    for _ in cache.progress(range(steps), f"heads {agent.settings.refine_init}"):
        if not order:
            order = np.array_split(
                rng.permutation(len(asked.rows)), -(-len(asked.rows) // profile.soft_token_bound.batch)
            )
        batch = asked.some(order.pop())
        vecs = vecs_of(made, agent, batch, n)
        loss = batch.losses(vecs, profile.infonce_temperature).mean()
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:  # apart: zero heads start with a gradient that would drown all others
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        adam.step()
        fade.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def ask(made, agent, asked: QueryBatch, n: int, tau: float, batch=48) -> dict:
    """`scored` for the rows with `n` soft tokens; the queries as they are with n = 0."""
    starts = range(0, len(asked.rows), batch)
    parts = [asked.some(range(start, min(start + batch, len(asked.rows)))) for start in starts]
    vecs = torch.cat([vecs_of(made, agent, part, n) for part in parts])
    return scored(vecs, asked.gallery, asked.right, tau)


def scored(vecs, gallery, right, tau) -> dict:
    """Rank of the right video and InfoNCE of each query vector (Q, D), as lists of Q."""
    losses = gallery_nce(vecs, gallery, right, tau)
    return {"ranks": ranks_of(vecs, gallery, right).tolist(), "nce": losses.tolist()}


# --- the stage


def ladder(profile, dataset: str) -> dict[str, dict]:
    """{system: ranks, InfoNCE and right videos of its queries, curve over its steps}, a stage: see `numbers`."""
    home, knobs = profile.runs(dataset), asdict(profile.soft_token_bound)
    shared = (
        "infonce_temperature",
        "n_soft",
        "val_fraction",
        "grpo_negatives",
        "seed",
        "dtype",
        "instruction",
    )
    inputs = {
        "vectors": [
            cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / split).get("key")
            for split in ("train", "test")
        ],
        "replies": sft_data.digest(profile, dataset),
        "policy": loading.version(profile.policy),
        "knobs": knobs | {name: getattr(profile, name) for name in shared},
        "code": cache.source_digest(__name__),
    }

    def work(folder):
        made = engine.load(profile)
        found = climb_free(profile, dataset, made) | climb_heads(profile, dataset, made)
        cache.write_json(folder / "ladder.json", found)

    target = cache.build(home / "ladder", inputs, work)
    return json.loads((target / "ladder.json").read_text(encoding="utf-8"))


def climb_free(profile, dataset, made) -> dict[str, dict]:
    """The first rung, on test queries spread evenly."""
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "test")
    queries = [
        q
        for q in annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
        if vectors.has_video(q.video)
    ]
    queries = evenly_spaced(queries, profile.soft_token_bound.free_queries)
    texts, videos = [query.text for query in queries], [query.video for query in queries]
    gallery = torch.from_numpy(vectors.video_vecs).to(made.model.device)
    right = torch.from_numpy(vectors.columns(videos)).to(gallery.device)
    with torch.no_grad():
        plain = scored(made.pool(made.text_batch(texts)), gallery, right, profile.infonce_temperature)
    found = {"free-plain": plain | {"videos": videos}}
    for name, way in cache.progress(ways(made).items(), f"free latents {dataset}"):
        ranks = free_latents(made, way, texts, gallery, right, profile)
        curve = [metrics.percent(row == 1) for row in ranks]
        found[f"free-{name}"] = {"ranks": ranks[-1].tolist(), "videos": videos, "curve": curve}
    return found


@dataclass(frozen=True)
class HeadRun:
    """How heads of the last rung are trained."""

    init: str
    n: int  # soft tokens
    rows: int  # train queries at most
    hard: bool = False  # negatives: the hard ones of stage 1 only, not the whole gallery
    long: bool = False  # goes on for `long_steps`

    @property
    def name(self) -> str:
        """What its numbers are filed under."""
        return f"held-{self.init}-n{self.n}-r{self.rows}" + "-hard" * self.hard + "-long" * self.long


def plan(profile) -> list[HeadRun]:
    """What the last rung compares: one thing changed at a time."""
    n, most = profile.soft_token_bound.n_soft, profile.soft_token_bound.train_queries[-1]
    courses = [HeadRun(init, n, most) for init in INITS] + [
        HeadRun("scaled", depth, most) for depth in DEPTHS
    ]
    courses += [HeadRun("scaled", n, rows) for rows in profile.soft_token_bound.train_queries]
    return list(
        dict.fromkeys(
            [*courses, HeadRun("scaled", n, most, hard=True), HeadRun("scaled", n, most, long=True)]
        )
    )


def taught(profile, dataset, queries, vectors) -> list[list[sft_examples.SFTExample]]:
    """Rows of train queries to learn from, and of those held out, with what a teacher says: the replies of stage 1."""
    parts, negatives = annotations.split_validation(queries, profile.val_fraction), profile.grpo_negatives
    writer = source.of(profile).reply_writer(profile, dataset)
    if writer is not None:
        many = {"most": len(queries), "negatives": negatives, "seed": profile.seed}
        return [sft_examples.choose_examples(part, vectors, writer[0], **many) for part in parts]
    file = sft_data.reply_file(profile, dataset)
    rows, _ = released_replies.read_released(file, queries, vectors, negatives)
    ids = [{query.id for query in part} for part in parts]
    parts = [[row for row in rows if row.desc_id in some] for some in ids]
    if not all(parts):
        raise InputError(f"{file}: no replies about held-out videos, which the ladder asks; take all rows")
    return parts


class Workshop:
    """Engine, base policy and train rows that the heads of a data set share; test queries do not come in."""

    def __init__(self, profile, dataset: str, made: engine.Engine):
        self.profile, self.made = profile, made
        vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "train")
        queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
        parts, rng = taught(profile, dataset, queries, vectors), np.random.default_rng(profile.seed)
        ours, held = ([rows[at] for at in rng.permutation(len(rows))] for rows in parts)
        self.column = vectors.column
        self.gallery = torch.from_numpy(vectors.video_vecs).to(made.model.device)
        self.base = checkpoints.load(profile.policy, profile)
        self.base.model.requires_grad_(False)
        self.ours = self.asked(ours[: profile.soft_token_bound.train_queries[-1]])
        self.held = self.asked(held[: profile.soft_token_bound.val_queries])
        self.few = self.ours.some(range(min(profile.soft_token_bound.overfit_queries, len(self.ours.rows))))

    def fresh(self, init: str, learns: bool = False) -> policy.Policy:
        """The policy with new heads; a copy of it if it `learns` too."""
        model = copy.deepcopy(self.base.model).requires_grad_() if learns else self.base.model
        bare = policy.Policy(model, self.base.tokenizer, None, None, self.profile.max_frame_pixels)
        settings = replace(policy.new_settings(self.profile, self.made.instruction), refine_init=init)
        return policy.new_heads(bare, settings, self.profile.seed, self.made)

    def asked(self, rows: list[sft_examples.SFTExample]) -> QueryBatch:
        """Rows with what the base policy has read of them, whatever its heads."""
        right = torch.tensor([self.column(row.right) for row in rows], device=self.gallery.device)
        return QueryBatch(rows, read_once(self.fresh("zero"), rows), self.gallery, right)

    def lessons(self, course: HeadRun) -> QueryBatch:
        """What the heads of a course learn from."""
        some = self.ours.some(range(min(course.rows, len(self.ours.rows))))
        if not course.hard:
            return some
        wrong = [[self.column(video) for video in row.negatives] for row in some.rows]
        return replace(some, wrong=torch.tensor(wrong, device=self.gallery.device))


def climb_heads(profile, dataset, made) -> dict[str, dict]:
    """The other rungs, on train queries in the train gallery."""
    shop, n, tau = (
        Workshop(profile, dataset, made),
        profile.soft_token_bound.n_soft,
        profile.infonce_temperature,
    )
    few, held, agent = shop.few, shop.held, shop.fresh("scaled")
    found = {"overfit-plain": ask(made, agent, few, 0, tau), "held-plain": ask(made, agent, held, 0, tau)}
    found["range-own"] = scored(held.gallery[held.right], held.gallery, held.right, tau)
    for init in INITS:
        found[f"range-{init}"] = ask(made, shop.fresh(init), held, n, tau)
    brief, whole = profile.soft_token_bound.policy_steps, replace(few, contexts=None)
    courses = [("heads", few, profile.soft_token_bound.steps)]
    courses += [("heads", few, brief), ("policy", whole, brief)] if brief else []
    for who, asked, steps in courses:
        agent = shop.fresh("scaled", learns=who == "policy")
        losses = learn(made, agent, asked, n, steps, profile)
        found[f"overfit-{who}-s{steps}"] = ask(made, agent, asked, n, tau) | {"curve": losses}
    for course in plan(profile):
        agent = shop.fresh(course.init)
        steps = profile.soft_token_bound.long_steps if course.long else profile.soft_token_bound.steps
        losses = learn(made, agent, shop.lessons(course), course.n, steps, profile)
        found[course.name] = ask(made, agent, held, course.n, tau) | {"curve": losses}
    for name, one in found.items():
        one["videos"] = [row.right for row in (few if name.startswith("overfit") else held).rows]
    return found


# --- what it says


def steps_to(curve: list[float], start: float, share: float) -> int | None:
    """The first step at which a curve has closed `share` of the distance from `start` to 100; None: never.

    >>> steps_to([22.0, 50.0, 95.0, 90.0], 20.0, 0.9), steps_to([22.0, 21.0], 20.0, 0.9)
    (2, None)
    """
    goal = start + share * (100 - start)
    return next((step for step, value in enumerate(curve) if value >= goal), None)


def numbers(profile, dataset: str, found: dict[str, dict]) -> dict[str, Estimate]:
    """L1: R@1 of every rung; steps90 of the first; R@1 on failures, on hits, and InfoNCE of the others."""
    measured, plain = {}, metrics.percent(np.array(found["free-plain"]["ranks"]) == 1)
    for system, one in found.items():
        ranks = np.array(one["ranks"])
        picked = {"vr@1": np.ones(len(ranks), bool)}
        if system.startswith("held"):
            failed = np.array(found["held-plain"]["ranks"]) > 1
            picked |= {"vr@1_failed": failed, "vr@1_kept": ~failed}
        for metric, rows in picked.items():
            measured[f"{system}/{metric}"] = _share(profile, ranks[rows] == 1, np.array(one["videos"])[rows])
        if system.startswith("free") and "curve" in one:
            measured[f"{system}/steps90"] = Estimate(
                steps_to(one["curve"], plain, 0.9), len(ranks), unit="steps"
            )
        if "nce" in one:
            measured[f"{system}/nce"] = Estimate(float(np.mean(one["nce"])), len(ranks), unit="nats")
    failed = [rank for rank in found["held-plain"]["ranks"] if rank > 1]
    second = metrics.percent(np.array(failed) == 2) if failed else None
    measured["held-walkdown/vr@1_failed"] = Estimate(second, len(failed))
    return {f"L1/{dataset}/{name}": number for name, number in measured.items()}


def _share(profile, hits, videos):
    """A percentage with its interval, clustered by right video; missing where there is no query."""
    if not len(hits):
        return Estimate(None, 0)
    rng = np.random.default_rng(profile.seed)
    ci = statistics.bootstrap(hits, videos, profile.bootstrap_samples, rng=rng)
    return Estimate(metrics.percent(hits), len(hits), ci, (profile.seed,))


def series(dataset: str, found: dict[str, dict]) -> dict[str, list]:
    """L1: R@1 by step of free latents, loss by step of heads."""
    kinds = {
        name: "vr@1" if name.startswith("free") else "loss" for name, one in found.items() if "curve" in one
    }
    return {
        f"L1/{dataset}/{name}/{kind}": [list(p) for p in enumerate(found[name]["curve"])]
        for name, kind in kinds.items()
    }
