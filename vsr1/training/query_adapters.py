"""Search better without a loop: baselines that change the query alone, before its first search, and see no video.

They are what the loop must beat. All learn from InfoNCE of stage 1, from the same train queries and gallery, and from
as many draws as the soft tokens of stage 1 (`sft.draw_queries`). What is chosen is chosen on validation queries.

adapter-vec     a linear map, added to the vector of the query
adapter-static  N learned soft tokens, the same in every query
adapter-soft    policy and heads as in stage 1, <REFINE> right behind the query: SQR without video, reply and loop
engine-tuned    low-rank adapters in the text side of the engine, which all others leave as it is
hqr-fixed       the one of `rewrites.wordings` that finds most of these train queries; nothing is trained
<policy>        "sft" or "vsr1": the soft tokens of that policy, which never learned to make them from a query alone

`rocchio` learns nothing and takes a part of the rejected video's vector off the query's; that part is chosen here.
"""

import functools
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, LoraModel
from torch import nn

from vsr1 import cache
from vsr1.data import annotations
from vsr1.loop import hqr, runner, sqr
from vsr1.models import batching, embedding, loading, policy, search_index
from vsr1.models import engine as engines
from vsr1.training import common, grpo, rewrites, sft, sft_data

SOFT = ("adapter-soft", "sft", "vsr1")  # soft tokens of a policy that has read the query
FIRST = ("adapter-vec", "adapter-static", "engine-tuned", "hqr-fixed", *SOFT)
# All ours: (learning rate, times that it reads its draws) to choose from; the engine's are multiples of `sft_lr`.
# The linear map may read its draws more often than any other learner, which favours it and costs seconds.
RECIPES = {
    "adapter-vec": ((3e-3, 1), (3e-3, 40)),
    "adapter-static": ((3e-3, 1), (3e-2, 1)),
    "engine-tuned": ((0.25, 1), (1.0, 1)),
}
# Ours: parts of the rejected video's vector that `rocchio` chooses from.
FEEDBACK = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
KNOBS = sft.KNOBS + sft.RETRIEVAL_KNOBS + ("max_query_tokens", "instruction")


# --- Vectors of queries before their first search


def adapt(profile, dataset: str, name: str) -> Path:
    """Return the step with the query vectors of one of `FIRST`; what it needs is trained now.

    test.npz, held.npz   `ids` (Q,) and `vecs` (Q, D) of all test queries, and of the validation queries
    notes.json           R@1 on the validation queries in the train gallery: as typed, with each of `RECIPES`, and as
                         chosen; of "hqr-fixed" `wordings`: R@1 of each on the train queries that it is chosen on
    """
    folders = [embedding.embed_corpus(profile, dataset, split) for split in ("train", "test")]
    inputs = {
        "name": name,
        "vectors": [cache.metadata(folder).get("key") for folder in folders],
        "knobs": {knob: getattr(profile, knob) for knob in KNOBS},
        "code": cache.source_digest(__name__),
        "data": sft_data.digest(profile, dataset),  # of replies, which choose the rows, and of families
    }
    weights = str(policy_of(profile, dataset, name)) if name in SOFT else None
    inputs["weights"] = weights and loading.version(weights)
    work = functools.partial(_adapt, profile, dataset, name, weights, folders)
    return cache.build(profile.runs(dataset) / "first" / name, inputs, work, distributed=True)


def policy_of(profile, dataset: str, name: str) -> Path:
    """Return the checkpoint whose soft tokens `name`, one of `SOFT`, stands for; trained now if it is not current."""
    return grpo.train(profile, dataset) if name == "vsr1" else sft.train(profile, dataset, name)


def read_first(profile, dataset: str, name: str | None, split: str) -> search_index.Vectors:
    """Return the gallery and the queries of a split, "test" or "held", as a first search by `name` finds them.

    None: the queries as they are typed.
    """
    folder = embedding.embed_corpus(profile, dataset, "test" if split == "test" else "train")
    first = None if name is None else adapt(profile, dataset, name) / f"{split}.npz"
    return search_index.load_vectors(folder, first)


def split_queries(profile, dataset: str) -> dict:
    """Read {"test", "held": queries}: all test queries, and the train queries that nothing is learned from."""
    test = annotations.read_fig(profile.data_dir(dataset) / "corpus" / "test.jsonl")
    return {"test": test, "held": common.split_train_queries(profile, dataset)[1]}


def _adapt(profile, dataset, name, weights, folders, folder):
    queries, (train, test) = split_queries(profile, dataset), map(search_index.load_vectors, folders)
    rows = [] if name in SOFT else sft.draw_queries(profile, sft_data.load(profile, dataset, train))
    if not cache.dist_state().is_main_process:  # the others were needed for a teacher's replies alone
        return
    torch.manual_seed(profile.seed)
    engine, typed = engines.load(profile), train.vecs_of([query.id for query in queries["held"]])
    notes = {"typed": recall_at_1(train, typed, queries["held"])}
    if name in SOFT:
        _, agent = runner.load_pair(profile, runner.SYSTEMS["sqr"], weights)
        embed = functools.partial(soft_vecs, engine, agent, size=profile.eval_batch)
    elif name == "hqr-fixed":
        engine, ids = hqr.with_query_limit(engine), {row.desc_id for row in rows}
        learn, _ = common.split_train_queries(profile, dataset)
        notes["wordings"] = wording_recalls(engine, train, [query for query in learn if query.id in ids])
        chosen = int(np.argmax(notes["wordings"]))
        embed = functools.partial(worded_vecs, engine, chosen)
    else:
        adapter, notes["recipes"] = _fit_best(profile, name, engine, train, rows, queries["held"])
        embed = functools.partial(adapted_vecs, adapter, train, size=profile.eval_batch)
    vecs = {"held": embed(queries["held"])}
    notes["chosen"] = recall_at_1(train, vecs["held"], queries["held"])
    if name in RECIPES:
        embed = functools.partial(adapted_vecs, adapter, test, size=profile.eval_batch)
    vecs["test"] = embed(queries["test"])
    for split, values in vecs.items():
        np.savez(folder / f"{split}.npz", ids=[query.id for query in queries[split]], vecs=values)
    cache.write_json(folder / "notes.json", notes)


def recall_at_1(vectors: search_index.Vectors, query_vecs: np.ndarray, queries) -> float:
    """Return the percentage of queries, (Q, D), whose right video is first: the mean of `first_hits`."""
    return 100 * float(np.mean(first_hits(vectors, query_vecs, queries)))


def first_hits(vectors: search_index.Vectors, query_vecs: np.ndarray, queries) -> np.ndarray:
    """Return whether the right video of each query, (Q, D), is on rank 1, (Q,); one without a vector never is."""
    videos = [query.video for query in queries]
    ranks = search_index.ranks(vectors.scores(query_vecs), vectors.columns(videos, missing=0))
    return (ranks == 1) & [vectors.has_video(video) for video in videos]


def wording_recalls(engine, vectors: search_index.Vectors, queries) -> list[float]:
    """Return R@1 of queries in each of `rewrites.wordings`; of equals the first is the simplest."""
    count = len(rewrites.wordings(queries[0].text))
    return [recall_at_1(vectors, worded_vecs(engine, n, queries), queries) for n in range(count)]


def worded_vecs(engine, number: int, queries) -> np.ndarray:
    """Embed queries (Q, D) in one of `rewrites.wordings`."""
    return engine.embed_texts([rewrites.wordings(query.text)[number] for query in queries])


@torch.no_grad()
def soft_vecs(engine, agent: policy.Policy, queries, size: int) -> np.ndarray:
    """Embed queries (Q, D) with the soft tokens of a policy that has read <REFINE> right behind each, and no video."""

    def embed(batch):
        texts = [query.text for query in batch]
        prompts = [agent.prompt(agent.settings.system, text) for text in texts]
        contexts = [context for _, context in agent.append_refine(prompts, [[] for _ in texts])]
        latents = sqr.soft_tokens(agent, contexts, agent.settings.n_soft)
        return sqr.soft_query(engine, agent.heads, texts, latents).cpu().numpy()

    return _in_batches(embed, queries, size)


@torch.no_grad()
def adapted_vecs(adapter, vectors: search_index.Vectors, queries, size: int) -> np.ndarray:
    """Embed queries (Q, D) by one of the adapters below; their vectors as typed are in `vectors`."""

    def embed(batch):
        typed = torch.from_numpy(vectors.vecs_of([query.id for query in batch])).to(adapter.device)
        return adapter([query.text for query in batch], typed).cpu().numpy()

    return _in_batches(embed, queries, size)


def _in_batches(embed, queries, size):
    splitter = batching.OOMSplitter("eval_batch")
    batches = [queries[start : start + size] for start in range(0, len(queries), size)]
    return np.concatenate([part for batch in batches for part in splitter.run(embed, batch)])


# --- Adapters: (texts, their vectors as typed (B, D)) to vectors (B, D) of length one


class VectorMap(nn.Module):
    """Adds a linear map of a query's vector to it; it starts at zero."""

    def __init__(self, profile, engine):
        super().__init__()
        self.device = engine.model.device
        self.map = nn.Parameter(torch.zeros(engine.width, engine.width, device=self.device))

    def forward(self, texts, typed):
        """Return the adapted vectors (B, D)."""
        return nn.functional.normalize(typed + typed @ self.map, dim=-1)


class StaticTokens(nn.Module):
    """Puts the same N soft tokens behind every query; they start as noise that is as long as a word."""

    def __init__(self, profile, engine):
        super().__init__()
        self.device, self.engine = engine.model.device, engine
        noise = nn.functional.normalize(torch.randn(profile.n_soft, engine.width), dim=-1)
        self.tokens = nn.Parameter((noise * policy.mean_embedding_norm(engine)).to(self.device))

    def forward(self, texts, typed):
        """Return the adapted vectors (B, D)."""
        return self.engine.text_vecs(texts, self.tokens.expand(len(texts), -1, -1))


class TunedEngine(nn.Module):
    """Embeds queries by the engine with low-rank adapters in its language model, which change the engine in place."""

    def __init__(self, profile, engine):
        super().__init__()
        self.device, self.engine = engine.model.device, engine
        rank = profile.lora_rank or 16  # ours, where stage 1 has no adapters
        modules, scale = common.LANGUAGE_LAYERS, common.LORA_SCALE
        config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=modules)
        self.adapters = LoraModel(engine.model, config, "default")
        common.upcast_trainable(self.adapters.parameters())

    def forward(self, texts, typed):
        """Return the adapted vectors (B, D)."""
        return self.engine.text_vecs(texts)


KINDS = {"adapter-vec": VectorMap, "adapter-static": StaticTokens, "engine-tuned": TunedEngine}


def _fit_best(profile, name, engine, vectors, rows, held):
    """Return (the adapter with the best R@1 on validation queries, {"rate x times": that R@1 of each})."""
    best, recalls = None, {}
    for rate, times in RECIPES[name]:
        if name == "engine-tuned":
            engine = engines.load(profile)  # the one before has its adapters
        torch.manual_seed(profile.seed)
        adapter = KINDS[name](profile, engine)
        scale = profile.sft_lr if name == "engine-tuned" else 1
        fit(profile, adapter, vectors, rows * times, rate * scale)
        recall = recall_at_1(vectors, adapted_vecs(adapter, vectors, held, profile.eval_batch), held)
        if recall > max(recalls.values(), default=-1):
            best = adapter
        recalls[f"{rate} x {times}"] = recall
    return best, recalls


def fit(profile, adapter, vectors: search_index.Vectors, rows: list, rate: float) -> list[float]:
    """Train an adapter on rows, in their order and batches as large as a step of stage 1; return the losses."""
    contrast, losses = sft.GalleryContrast(profile, vectors, adapter.device), []
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    size = profile.sft_batch * profile.sft_accumulate
    starts = range(0, len(rows), size)
    warm = max(1, round(profile.sft_warmup * len(starts)))
    shape = lambda step: min((step + 1) / warm, (len(starts) - step) / max(1, len(starts) - warm))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for start in cache.progress(starts, type(adapter).__name__):
        batch = [asdict(row) for row in rows[start : start + size]]
        typed = torch.from_numpy(vectors.vecs_of([row["desc_id"] for row in batch])).to(adapter.device)
        vecs = adapter([row["query"] for row in batch], typed)
        loss = contrast.infonce_losses(vecs, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# --- Rocchio


def choose_feedback(profile, dataset: str) -> float:
    """Choose the part of a rejected video's vector that `rocchio` takes off the query's.

    The best is what brings most validation queries whose first search failed to rank 1, in the train gallery; of equals
    the smallest.
    """
    vectors = read_first(profile, dataset, None, "held")
    queries = [q for q in split_queries(profile, dataset)["held"] if vectors.has_video(q.video)]
    vecs, right = vectors.vecs_of([q.id for q in queries]), vectors.columns([q.video for q in queries])
    return max(FEEDBACK, key=functools.partial(count_repaired, vectors, vecs, right))


def count_repaired(vectors, query_vecs: np.ndarray, right: np.ndarray, feedback: float) -> int:
    """Count the failed searches that find the right video once part of the top video's vector is taken off.

    vectors     of the gallery: its `scores` and `video_vecs`
    query_vecs  (Q, D)
    right       (Q,): columns of the right videos
    """
    top1 = vectors.scores(query_vecs).argmax(axis=1)
    scores = vectors.scores(runner.move_away(query_vecs, vectors.video_vecs[top1], feedback))
    scores[np.arange(len(scores)), top1] = -np.inf  # it is not shown again
    return int(np.sum(search_index.ranks(scores, right)[top1 != right] == 1))
