"""Bound what any soft query could reach, and measure what heads learn, with one more restriction at a time.

    free       soft tokens of each test query, optimised against the frozen engine: the upper bound
    range      InfoNCE of the original query and of the right video's own vector: the room to work in
    overfit    heads alone, then heads and policy, trained and evaluated on the same few train queries
    held       heads alone, trained on some train queries, evaluated on queries of validation videos

All but the first go through the state at <REFINE> and `sqr.soft_tokens`. They are text only: the policy reads the query
and the teacher's reply about the video that the first search shows, not the video. Negatives are the whole gallery.
What a model that is not trained has read of words is kept and read on from at each step. Test queries take part in the
first only, which chooses nothing.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from vsr1 import cache
from vsr1.config import InputError, Profile
from vsr1.data import annotations, source
from vsr1.data.annotations import evenly_spaced
from vsr1.evaluation import metrics, statistics
from vsr1.evaluation.statistics import Estimate
from vsr1.loop import sqr
from vsr1.models import (
    checkpoints,
    decoding,
    embedding,
    engine,
    inputs,
    loading,
    policy,
    prompt_text,
    search_index,
    soft_heads,
)
from vsr1.training import common, released_replies, sft_data
from vsr1.training.sft_examples import SFTExample, choose_examples

INITS = ("zero", "default", "scaled")
DEPTHS = (1, 2, 4, 8)  # soft tokens
READ_AT_ONCE = 32  # replies
KNOBS = ("infonce_temperature", "n_soft", "val_fraction", "grpo_negatives", "seed", "dtype", "instruction")


# --- Free soft tokens: nothing but the frozen engine


@dataclass(frozen=True)
class Layout:
    """How free latents become inputs of the engine, and how they are optimised."""

    start_norm: float  # length of the random start; 0: all zero
    to_engine: Callable
    max_grad_norm: float = torch.inf  # of the latents of one query


def layouts(encoder: engine.Engine) -> dict[str, Layout]:
    """Return raw embeddings, and what B makes of latents, official and scaled; three starts of each."""
    norm = policy.mean_embedding_norm(encoder)
    b, scaled = (
        soft_heads.SoftHeads(encoder.width, encoder.width, init, (norm, norm)).to_engine
        for init in ("zero", "scaled")
    )
    layouts_by_name = {"raw-kept": Layout(norm, lambda latents: norm * F.normalize(latents, dim=-1))}
    for name, to_engine in {"raw": lambda latents: latents, "b": b, "scaled": scaled}.items():
        layouts_by_name |= {name: Layout(norm, to_engine), f"{name}-zero": Layout(0.0, to_engine)}
        layouts_by_name[f"{name}-zero-clipped"] = Layout(0.0, to_engine, max_grad_norm=1.0)
    return layouts_by_name


def latent_step(encoder, layout: Layout, words: decoding.Context, latents, gallery, right, tau):
    """Return losses (Q,) of queries with their latents (Q, N, D), the clipped gradient of their sum, and ranks (Q,).

    words  what `encoder.read_queries` read of the queries
    """
    latents = latents.detach().requires_grad_()
    vecs = encoder.soft_vecs(words, layout.to_engine(latents))
    losses = gallery_nce(vecs, gallery, right, tau)
    (gradient,) = torch.autograd.grad(losses.sum(), latents)
    norms = gradient.flatten(1).norm(dim=1)[:, None, None]  # (Q, 1, 1)
    clipped = gradient * (layout.max_grad_norm / norms).clamp(max=1)
    return losses.detach(), clipped, ranks_of(vecs, gallery, right)


def optimise_latents(encoder, layout: Layout, words, gallery, right, profile: Profile) -> np.ndarray:
    """Optimise the latents of each query for it alone; return ranks (steps + 1, Q) of the right videos."""
    knobs, generator = profile.soft_token_bound, torch.Generator().manual_seed(profile.seed)
    noise = torch.randn(len(right), profile.n_soft, encoder.width, generator=generator)
    latents = layout.start_norm * F.normalize(noise, dim=-1).to(gallery)
    optimizer, ranks = torch.optim.Adam([latents], knobs.free_lr), []
    for _ in range(knobs.free_steps + 1):
        _, latents.grad, step_ranks = latent_step(
            encoder, layout, words, latents, gallery, right, profile.infonce_temperature
        )
        ranks.append(step_ranks)
        optimizer.step()
    return np.array(ranks)


def gallery_nce(vecs, gallery, right, tau):
    """Return InfoNCE (Q,) of query vectors (Q, D) against all of a gallery (V, D); `right` (Q,) are its columns."""
    return F.cross_entropy(vecs @ gallery.T / tau, right, reduction="none")


def ranks_of(vecs, gallery, right) -> np.ndarray:
    """Return the ranks (Q,) of the right videos."""
    return search_index.ranks((vecs.detach() @ gallery.T).cpu().numpy(), right.cpu().numpy())


def score(vecs, gallery, right, tau) -> dict:
    """Return rank of the right video and InfoNCE of each query vector (Q, D), as lists of Q."""
    losses = gallery_nce(vecs, gallery, right, tau)
    return {"ranks": ranks_of(vecs, gallery, right).tolist(), "nce": losses.tolist()}


# --- Heads on a policy that reads replies


def read_replies(reader: policy.Policy, rows: list[SFTExample]) -> list[decoding.Context]:
    """Return what the policy has read before the <REFINE> of each example's reply; the video is left out."""
    replies = [
        reader.tokenizer(f"{row.reply} {prompt_text.REFINE}", add_special_tokens=False) for row in rows
    ]
    prompts = [reader.prompt(reader.settings.system, row.query).ids for row in rows]
    prompts = [
        inputs.Prompt([*prompt, *reply["input_ids"][:-1]])
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    context, _ = reader.prefill(prompts)
    length = context.attention_mask.shape[1]
    return [context.slice(row, length) for row in range(len(rows))]


@dataclass(frozen=True, eq=False)
class QueryBatch:
    """Examples that heads are trained or evaluated on, in one gallery."""

    rows: list[SFTExample]
    contexts: list[decoding.Context] | None  # None: the policy is trained too, and reads anew each time
    words: decoding.Context  # what the engine has read of the queries
    gallery: torch.Tensor  # (V, D)
    right: torch.Tensor  # (R,) columns
    wrong: torch.Tensor | None = None  # (R, K) columns of the only negatives; None: the whole gallery

    def select(self, numbers) -> "QueryBatch":
        """Return some of the examples, by number."""
        wrong = None if self.wrong is None else self.wrong[numbers]
        contexts = None if self.contexts is None else [self.contexts[i] for i in numbers]
        rows, words = [self.rows[i] for i in numbers], self.words.rows(torch.as_tensor(numbers))
        return QueryBatch(rows, contexts, words, self.gallery, self.right[numbers], wrong)

    def first(self, count: int) -> "QueryBatch":
        """Return the first `count` examples, or all."""
        return self.select(range(min(count, len(self.rows))))

    def losses(self, vecs, tau) -> torch.Tensor:
        """Return InfoNCE (R,) of the query vectors (R, D) of the examples."""
        if self.wrong is None:
            return gallery_nce(vecs, self.gallery, self.right, tau)
        return common.info_nce(vecs, self.gallery[self.right], self.gallery[self.wrong], tau)


def query_vecs(encoder, reader, batch: QueryBatch, n: int) -> torch.Tensor:
    """Embed the queries with `n` soft tokens, as in the loop, (R, D)."""
    contexts = read_replies(reader, batch.rows) if batch.contexts is None else batch.contexts
    latents = sqr.soft_tokens(reader, contexts, n)
    return encoder.soft_vecs(batch.words, reader.heads.to_engine(latents))


def train_heads(encoder, reader, batch: QueryBatch, n: int, steps: int, profile: Profile) -> list[float]:
    """Train the heads of `reader` and return the loss of each step; the policy is trained too without contexts."""
    knobs = profile.soft_token_bound
    trainable = [weight for weight in reader.heads.parameters() if weight.requires_grad]
    groups = [{"params": trainable, "lr": knobs.head_lr}]
    if batch.contexts is None:
        groups.append({"params": list(reader.model.parameters()), "lr": knobs.policy_lr})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    rng, order, losses = np.random.default_rng([profile.seed, 12]), [], []
    for _ in cache.progress(range(steps), f"heads {reader.settings.refine_init}"):
        if not order:
            order = np.array_split(rng.permutation(len(batch.rows)), -(-len(batch.rows) // knobs.batch))
        part = batch.select(order.pop())
        loss = part.losses(query_vecs(encoder, reader, part, n), profile.infonce_temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:  # apart: the first gradient of zero heads would drown all others
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate_heads(encoder, reader, batch: QueryBatch, n: int, tau: float, size=48) -> dict:
    """Return `score` of the queries with `n` soft tokens; of the original queries with n = 0."""
    starts = range(0, len(batch.rows), size)
    parts = [batch.select(range(start, min(start + size, len(batch.rows)))) for start in starts]
    vecs = torch.cat([query_vecs(encoder, reader, part, n) for part in parts])
    return score(vecs, batch.gallery, batch.right, tau)


# --- The step


def measure_bound(profile: Profile, dataset: str) -> dict[str, dict]:
    """Return {system: ranks, InfoNCE and right videos of its queries, curve over its steps}, unless it is current.

    `numbers` says what the systems are called.
    """
    folders = [embedding.embed_corpus(profile, dataset, split) for split in ("train", "test")]
    inputs = {
        "vectors": [cache.metadata(folder)["key"] for folder in folders],
        "replies": sft_data.digest(profile, dataset),
        "policy": loading.version(profile.policy),
        "knobs": asdict(profile.soft_token_bound) | {name: getattr(profile, name) for name in KNOBS},
        "code": cache.source_digest(__name__),
    }

    def work(folder):
        encoder, (train, test) = engine.load(profile), map(search_index.load_vectors, folders)
        systems = optimise_free(profile, dataset, encoder, test)
        systems |= train_all_heads(HeadTrainer(profile, dataset, encoder, train))
        cache.write_json(folder / "systems.json", systems)

    target = cache.build(profile.runs(dataset) / "soft_token_bound", inputs, work)
    return json.loads((target / "systems.json").read_text(encoding="utf-8"))


def optimise_free(profile, dataset, encoder, vectors) -> dict[str, dict]:
    """Optimise the latents of test queries, spread evenly, in each layout."""
    queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    queries = [query for query in queries if vectors.has_video(query.video)]
    queries = evenly_spaced(queries, profile.soft_token_bound.free_queries)
    texts, videos = [query.text for query in queries], [query.video for query in queries]
    gallery = torch.from_numpy(vectors.video_vecs).to(encoder.model.device)
    right = torch.from_numpy(vectors.columns(videos)).to(gallery.device)
    with torch.no_grad():
        plain = score(encoder.text_vecs(texts), gallery, right, profile.infonce_temperature)
        words = encoder.read_queries(texts)
    systems = {"free-plain": plain | {"videos": videos}}
    for name, layout in cache.progress(layouts(encoder).items(), f"free latents {dataset}"):
        ranks = optimise_latents(encoder, layout, words, gallery, right, profile)
        curve = [metrics.percent(row == 1) for row in ranks]
        systems[f"free-{name}"] = {"ranks": ranks[-1].tolist(), "videos": videos, "curve": curve}
    return systems


@dataclass(frozen=True)
class HeadRun:
    """How heads that are evaluated on validation queries are trained."""

    init: str
    n: int  # soft tokens
    rows: int  # train queries at most
    hard: bool = False  # negatives: the hard ones of stage 1 only, not the whole gallery
    long: bool = False  # for `long_steps`

    @property
    def name(self) -> str:
        """Return the name of its numbers."""
        return f"held-{self.init}-n{self.n}-r{self.rows}" + "-hard" * self.hard + "-long" * self.long


def head_runs(profile: Profile) -> list[HeadRun]:
    """List the runs that are compared: one thing changed at a time."""
    n, most = profile.soft_token_bound.n_soft, profile.soft_token_bound.train_queries[-1]
    runs = [HeadRun(init, n, most) for init in INITS] + [HeadRun("scaled", depth, most) for depth in DEPTHS]
    runs += [HeadRun("scaled", n, rows) for rows in profile.soft_token_bound.train_queries]
    runs += [HeadRun("scaled", n, most, hard=True), HeadRun("scaled", n, most, long=True)]
    return list(dict.fromkeys(runs))


def split_examples(profile, dataset, queries, vectors) -> list[list[SFTExample]]:
    """Return examples of train queries to learn from, and of validation queries, with the replies of stage 1."""
    families, negatives = source.families(profile, dataset), profile.grpo_negatives
    parts = annotations.split_validation(queries, profile.val_fraction, families)
    writer = source.of(profile).reply_writer(profile, dataset)
    if writer is not None:
        options = {"most": len(queries), "negatives": negatives, "seed": profile.seed}
        return [choose_examples(part, vectors, writer[0], **options) for part in parts]
    file = sft_data.reply_file(profile, dataset)
    rows = released_replies.read_released(file, queries, vectors, negatives)
    ids = [{query.id for query in part} for part in parts]
    examples = [[row for row in rows if row.desc_id in part] for part in ids]
    if not all(examples):
        raise InputError(f"{file}: no replies about held-out videos, which this study needs; take all rows")
    return examples


class HeadTrainer:
    """Engine, base policy and train queries that the heads of a data set share; no test query comes in."""

    def __init__(self, profile: Profile, dataset: str, encoder: engine.Engine, vectors: search_index.Vectors):
        self.profile, self.encoder, self.vectors = profile, encoder, vectors
        knobs = profile.soft_token_bound
        queries = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "train.jsonl")
        parts, rng = split_examples(profile, dataset, queries, vectors), np.random.default_rng(profile.seed)
        learn, validation = ([rows[i] for i in rng.permutation(len(rows))] for rows in parts)
        self.gallery = torch.from_numpy(vectors.video_vecs).to(encoder.model.device)
        self.base = checkpoints.load(profile.policy, profile)
        self.base.model.requires_grad_(False)
        self.learn = self._read(learn[: knobs.train_queries[-1]])
        self.validation = self._read(validation[: knobs.val_queries])
        self.few = self.learn.first(knobs.overfit_queries)

    def new_policy(self, init: str, trainable: bool = False) -> policy.Policy:
        """Return the base policy with new heads; a copy of it if it is to be trained too."""
        model = copy.deepcopy(self.base.model).requires_grad_() if trainable else self.base.model
        headless = policy.Policy(model, self.base.tokenizer, None, None, self.profile.max_frame_pixels)
        settings = replace(policy.new_settings(self.profile, self.encoder.instruction), refine_init=init)
        return policy.new_heads(headless, settings, self.profile.seed, self.encoder)

    @torch.no_grad()
    def _read(self, rows):
        """Return examples with what the base policy has read of them, whatever its heads."""
        right = torch.tensor([self.vectors.column(row.right) for row in rows], device=self.gallery.device)
        reader, contexts = self.new_policy("zero"), []
        for start in cache.progress(range(0, len(rows), READ_AT_ONCE), "read replies"):
            contexts += read_replies(reader, rows[start : start + READ_AT_ONCE])
        words = self.encoder.read_queries([row.query for row in rows])
        return QueryBatch(rows, contexts, words, self.gallery, right)

    def batch_of(self, run: HeadRun) -> QueryBatch:
        """Return what the heads of a run are trained on."""
        batch = self.learn.first(run.rows)
        if not run.hard:
            return batch
        wrong = [self.vectors.columns(row.negatives).tolist() for row in batch.rows]
        return replace(batch, wrong=torch.tensor(wrong, device=self.gallery.device))

    def untrained(self, init: str, batch: QueryBatch, n: int) -> dict:
        """Evaluate new heads by `evaluate_heads`."""
        reader = self.new_policy(init)
        return evaluate_heads(self.encoder, reader, batch, n, self.profile.infonce_temperature)

    def trained(self, init: str, batch: QueryBatch, evaluated: QueryBatch, n: int, steps: int) -> dict:
        """Train new heads, and the policy too where `batch` has no contexts; return scores, and the loss by step."""
        reader = self.new_policy(init, trainable=batch.contexts is None)
        curve = train_heads(self.encoder, reader, batch, n, steps, self.profile)
        scores = evaluate_heads(self.encoder, reader, evaluated, n, self.profile.infonce_temperature)
        return scores | {"curve": curve}


def train_all_heads(trainer: HeadTrainer) -> dict[str, dict]:
    """Train and evaluate heads on train queries in the train gallery: all systems but the free ones."""
    knobs, few, validation = trainer.profile.soft_token_bound, trainer.few, trainer.validation
    n, tau = knobs.n_soft, trainer.profile.infonce_temperature
    systems = {
        "overfit-plain": trainer.untrained("scaled", few, 0),
        "held-plain": trainer.untrained("scaled", validation, 0),
        "range-own": score(validation.gallery[validation.right], validation.gallery, validation.right, tau),
    }
    systems |= {f"range-{init}": trainer.untrained(init, validation, n) for init in INITS}
    overfit = [("heads", few, knobs.steps)]
    if knobs.policy_steps:
        parts = {"heads": few, "policy": replace(few, contexts=None)}
        overfit += [(part, batch, knobs.policy_steps) for part, batch in parts.items()]
    for part, batch, steps in overfit:
        systems[f"overfit-{part}-s{steps}"] = trainer.trained("scaled", batch, batch, n, steps)
    for run in head_runs(trainer.profile):
        steps = knobs.long_steps if run.long else knobs.steps
        systems[run.name] = trainer.trained(run.init, trainer.batch_of(run), validation, run.n, steps)
    for name, system in systems.items():
        system["videos"] = [row.right for row in (few if name.startswith("overfit") else validation).rows]
    return systems


# --- Numbers


def steps_to_90(curve: list[float], start: float) -> int | None:
    """Return the first step at which a curve has closed 90 % of the distance from `start` to 100; None: never.

    >>> steps_to_90([22.0, 50.0, 95.0, 90.0], 20.0), steps_to_90([22.0, 21.0], 20.0)
    (2, None)
    """
    goal = start + 0.9 * (100 - start)
    return next((step for step, value in enumerate(curve) if value >= goal), None)


def numbers(profile: Profile, dataset: str, systems: dict[str, dict]) -> dict[str, Estimate]:
    """Measure R@1 of every system (L1).

    Also steps90 of the free ones; R@1 on failed and on successful first searches, and InfoNCE of the others.
    """
    measured, plain = {}, metrics.percent(np.array(systems["free-plain"]["ranks"]) == 1)
    failed = np.array(systems["held-plain"]["ranks"]) > 1
    for name, system in systems.items():
        ranks = np.array(system["ranks"])
        families = np.array(statistics.clusters(profile, dataset, system["videos"]))
        groups = {"vr@1": np.ones(len(ranks), bool)}
        if name.startswith("held"):
            groups |= {"vr@1_failed": failed, "vr@1_kept": ~failed}
        for metric, rows in groups.items():
            measured[f"{name}/{metric}"] = statistics.estimate(ranks[rows] == 1, families[rows], profile)
        if name.startswith("free") and "curve" in system:
            steps = steps_to_90(system["curve"], plain)
            measured[f"{name}/steps90"] = Estimate(steps, len(ranks), unit="steps")
        if "nce" in system:
            measured[f"{name}/nce"] = Estimate(float(np.mean(system["nce"])), len(ranks), unit="nats")
    lost = np.array(systems["held-plain"]["ranks"])[failed]
    rank_2 = metrics.percent(lost == 2) if len(lost) else None
    measured["held-walkdown/vr@1_failed"] = Estimate(rank_2, len(lost))
    return {f"L1/{dataset}/{name}": number for name, number in measured.items()}


def series(dataset: str, systems: dict[str, dict]) -> dict[str, list]:
    """Return R@1 by step of free latents, and loss by step of heads (L1)."""
    curves = {}
    for name, system in systems.items():
        if "curve" in system:
            metric = "vr@1" if name.startswith("free") else "loss"
            curves[f"L1/{dataset}/{name}/{metric}"] = [
                [step, value] for step, value in enumerate(system["curve"])
            ]
    return curves
