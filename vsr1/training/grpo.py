"""Stage 2, GRPO: the policy walks the live loop in groups, and learns from what each turn was worth (METHOD.md 6).

One step. Draw a few starts (a query and the video its first search shows). Walk each G times through the loop of
`episode`, with sampled replies and a live search. Reward every turn. Compare turns that saw the same query and video:
the advantage is the reward less the group's mean, over its spread. Then one gradient step on exactly the tokens that
were sampled, read once more with the prompt and its video shared by the group.

TRL's trainer is not used: it drops the video from the training forward without an error, and knows no soft tokens
(STACK.md 5). A test holds our objective against its.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import math
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import nn

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import clip_cache, video_reader
from vsr1.loop import sqr
from vsr1.models import checkpoints, engine, policy, search_index
from vsr1.training import fsdp, rewards, rollout
from vsr1.training.common import add_lora, need_tensorboard, upcast_trainable


class Learner(nn.Module):
    """The loss of rows as one module, which accelerate can wrap for several processes."""

    def __init__(self, sampler: rollout.RolloutWorker, anchor: policy.Policy):
        super().__init__()
        agent = sampler.agent
        self.model, self.heads, self.sampler, self.anchor = agent.model, agent.heads, sampler, anchor

    def forward(self, rows: list[rollout.RolloutStep], totals: tuple[int, int], shared=True):
        """(loss, sums for the log) of some rows of a step that has `totals` rows, and rows with soft tokens.

        shared  read each prompt with its video once for all replies to it, forward and backward; False, for
                comparison: once a reply
        """
        sampler, knobs = self.sampler, self.sampler.knobs
        if not rows:  # of this process; the others wait for its share of the gradient
            some = next(weight for weight in self.parameters() if weight.requires_grad)
            return 0.0 * some.sum(), {}
        rows = sorted(rows, key=lambda row: (row.start.group, row.shown, row.t))
        prompts, counts = [row.prompt for row in rows], [1] * len(rows)
        if shared:
            groups = Counter(id(row.prompt) for row in rows)
            prompts, counts = (
                list({id(row.prompt): row.prompt for row in rows}.values()),
                list(groups.values()),
            )
        replies, options = (
            [row.ids for row in rows],
            {"group": counts, "temperature": knobs.rollout_temperature},
        )
        seen = sampler.agent.replay(prompts, replies, **options)
        with torch.no_grad(), self.anchor.adapters_disabled():
            anchored = self.anchor.replay(prompts, replies, **options).logps
        sampled = nn.utils.rnn.pad_sequence([torch.tensor(row.logps) for row in rows], batch_first=True)
        gains = torch.tensor([row.advantage for row in rows]).to(anchored)
        losses, kl, cut = rewards.policy_loss(
            seen.logps,
            sampled.to(anchored),
            anchored,
            gains,
            seen.completion_mask,
            clip=knobs.grpo_clip,
            beta=knobs.grpo_beta,
        )
        loss, contrast = losses.sum() / totals[0], 0.0
        if sampler.recipe.latents != "frozen":
            soft, contrast = self._soft(rows, seen.refine_contexts)
            loss = loss + knobs.grpo_infonce_weight * soft / max(1, totals[1])
        return loss, {"kl": float(kl.sum()), "clipped": float(cut.sum()), "info_nce": contrast}

    def _soft(self, rows, branches):
        """What soft tokens learn from rows that asked for them: (sum of losses, the sum of InfoNCE in it)."""
        total, contrast, sampler = 0.0, 0.0, self.sampler
        for turns in sorted({len(row.earlier) for row in rows}):
            some = [at for at, row in enumerate(rows) if row.taken is not None and len(row.earlier) == turns]
            if not some:
                continue
            own, n = [rows[at] for at in some], len(rows[some[0]].taken)
            if sampler.recipe.latents == "gauss":
                # The noisy tokens are the action: they stood in the query, and the policy read them.
                taken = torch.stack([row.taken for row in own])
                means = sqr.soft_tokens(sampler.agent, [branches[at] for at in some], n, taken=taken)
                density = -((taken - means) ** 2).sum(dim=(1, 2)) / (2 * sampler.knobs.latent_noise_std**2)
                ratio = torch.exp(density - density.detach())  # one step a rollout: one, but not its gradient
                total = total - (ratio * torch.tensor([row.advantage for row in own]).to(ratio)).sum()
                continue
            latents = sqr.soft_tokens(sampler.agent, [branches[at] for at in some], n)
            losses = sampler.contrast(sampler.vectors_of(own, latents), own, learn=True)
            total, contrast = total + losses.sum(), contrast + float(losses.detach().sum())
        return total, contrast


# --- the run ---------------------------------------------------------------------------------------------------------


class GRPOTrainer:
    """A policy on its way through GRPO, in one process or in several that share the starts of each step."""

    def __init__(self, sampler: rollout.RolloutWorker):
        self.sampler, self.knobs, agent = sampler, sampler.knobs, sampler.agent
        on_cpu = agent.model.device.type == "cpu"
        # Where no reply of a process asked for a search, its heads get no gradient: the others must not wait for it.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        precision = "bf16" if self.knobs.dtype == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[unused])
        anchor = copy.copy(agent)
        if self.knobs.lora_rank:  # without its adapters the model is its own anchor
            add_lora(agent, self.knobs.lora_rank, self.knobs.seed)
            anchor.adapters = agent.adapters
        else:
            anchor.model = copy.deepcopy(agent.model).requires_grad_(False)
        learner = Learner(sampler, anchor)
        optimizer = torch.optim.AdamW(_groups(self.knobs, sampler.recipe, agent))
        fsdp.shard(learner, optimizer, self.accelerator)
        self.learner, self.optimizer = self.accelerator.prepare(learner, optimizer)
        self.counts = (
            Counter()
        )  # since step 1: steps skipped, those for want of memory, halved walks, groups, those flat

    def walk(
        self, starts: list[rollout.RolloutPrompt], members: int, seed: list[int]
    ) -> list[rollout.RolloutStep]:
        """The rows of `members` episodes from each start; each process walks its share of the starts.

        If they do not fit in memory, half as many are walked at once from then on: the same rows. That happens once.
        """
        share = list(enumerate(starts))[self.accelerator.process_index :: self.accelerator.num_processes]
        rows, most = [], self.knobs.grpo_rollout_batch * self.knobs.grpo_group  # episodes at once
        while share:
            size = max(1, (most // members) >> self.counts["halved"])
            walked = self._walk(share[:size], members, seed)
            if walked is not None:
                rows, share = rows + walked, share[size:]
        return rows

    def _walk(self, share, members, seed):
        """The rows of some (group, start); None: they did not fit, and fewer are to be tried."""
        some = [
            dataclasses.replace(start, group=group, member=member)
            for group, start in share
            for member in range(members)
        ]
        try:
            with self.accelerator.autocast(), self.sampler.agent.adapters_merged():
                return [row for walked in self.sampler.walk(some, seed) for row in walked]
        except torch.OutOfMemoryError:
            if self.counts["halved"] or len(share) < 2:
                raise
        self.counts["halved"] += 1
        told = f"episodes from {len(share)} starts at once do not fit in memory: half of grpo_rollout_batch from now on"
        warnings.warn(told, stacklevel=2)
        return None

    def step(self, number: int, starts: list[rollout.RolloutPrompt]) -> tuple[dict, list[dict]]:
        """One rollout and one step of the optimizer: (the line of the log, all rows in short)."""
        began = time.perf_counter()
        with fsdp.unsharded(self.learner):
            rows = self.walk(starts, self.knobs.grpo_group, [self.knobs.seed, 7, number])
            earned = [row.reward for row in rows]
            spread = float(np.std(gather_object(earned), ddof=1))
            scale = spread if self.knobs.scale_rewards == "batch" else None
            found = rewards.advantages(earned, [rewards.group_key(_short(row)) for row in rows], scale)
            for row, advantage in zip(rows, found, strict=True):
                row.advantage = advantage
            sums, norm = self._descend([row for row in rows if row.advantage is not None])
        short = gather_object([_short(row) for row in rows])
        told = tally(short)
        self.counts.update(groups=told["groups"], flat=told["flat_groups"])
        means = {"loss": sums["loss"], "kl": sums["kl"] / sums["rows"]}
        means |= {"clipped": sums["clipped"] / sums["rows"]}
        means |= {"info_nce": sums["info_nce"] / max(1, sums["soft"])}
        line = {"step": number} | {key: mean if math.isfinite(mean) else None for key, mean in means.items()}
        line |= {"norm": norm, "step_spread": spread}
        line |= {key: self.counts[key] for key in ("skipped", "no_memory", "halved")}
        return line | {"seconds": time.perf_counter() - began} | told, short

    def _descend(self, kept):
        """(sums over the rows of all processes, norm of the gradient; None: not finite, and no step was made).

        A step that runs out of memory has no sums; one process of several ends, for the others wait for its gradient.
        """
        self.optimizer.zero_grad()
        totals = self._sum({"rows": len(kept), "soft": sum(row.taken is not None for row in kept)})
        assert totals["rows"], "no reply to learn from"
        chunks, sums = self._chunks(kept), Counter(loss=0.0, kl=0.0, clipped=0.0, info_nce=0.0)
        try:
            for chunk in chunks:
                last = chunk is chunks[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.learner):
                    loss, parts = self.learner(chunk, (totals["rows"], totals["soft"]))
                    self.accelerator.backward(loss * self.accelerator.num_processes)  # they are averaged
                sums.update({"loss": float(loss.detach())} | parts)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1:
                raise
            sums = Counter(dict.fromkeys(sums, math.nan))
            self.counts["no_memory"] += 1
        sums, norm = self._sum(sums) | totals, math.nan
        if math.isfinite(sums["loss"]):
            learned = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            norm = float(self.accelerator.clip_grad_norm_(learned, 1.0))
        if not math.isfinite(norm):
            self.counts["skipped"] += 1
            return sums, None
        self.optimizer.step()
        return sums, norm

    def _chunks(self, rows):
        """Rows that are read at once: all of up to `grpo_rollout_batch` starts, or `grpo_micro_batch` of them."""
        rows = sorted(rows, key=lambda row: (row.start.group, row.t, row.shown))  # a prompt's stay together
        groups = sorted({row.start.group for row in rows})
        parts = [
            set(groups[at : at + self.knobs.grpo_rollout_batch])
            for at in range(0, len(groups), self.knobs.grpo_rollout_batch)
        ]
        chunks = [[row for row in rows if row.start.group in part] for part in parts]
        size = self.knobs.grpo_micro_batch or max(1, len(rows))
        return [chunk[at : at + size] for chunk in chunks for at in range(0, len(chunk), size)] or [[]]

    def _sum(self, values):
        """The same keys with the sums over all processes."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(numbers, "sum").tolist(), strict=True))

    def run(
        self,
        starts: list[rollout.RolloutPrompt],
        held: list[rollout.RolloutPrompt],
        folder: Path,
        what: str,
        watch=None,
    ) -> None:
        """All steps, from where `folder` stands: log.jsonl, groups.jsonl (the first group of each step), held.jsonl.

        watch(lines)  is called after each step with the log so far, for curves that redraw
        """
        main, count = self.accelerator.is_main_process, self.knobs.grpo_prompts_per_step
        steps = self.knobs.grpo_steps or -(-len(starts) // count)
        done, lines = self._resume(folder), []
        if self.knobs.tensorboard:
            need_tensorboard()
            self.accelerator.log_with = [TensorBoardTracker("tensorboard", folder, purge_step=done + 1)]
            self.accelerator.init_trackers("grpo")
        if main:
            lines = [_keep(folder / f"{name}.jsonl", done) for name in ("groups", "held", "log")][-1]
        if done == 0:
            self._look(held, 0, folder)
        bar = cache.progress(range(steps), what)
        bar.update(done)
        for number in range(done + 1, steps + 1):
            left = 1 - (number - 1) / steps if self.knobs.grpo_schedule == "linear" else 1.0
            for group in self.optimizer.param_groups:
                group["lr"] = left * group["full_lr"]
            line, short = self.step(number, draw(starts, number, count, self.knobs.seed))
            if main:
                lines.append(line)
                _append(folder / "log.jsonl", line)
                _append(folder / "groups.jsonl", {"step": number, "rows": _first_group(short)})
            self.accelerator.log(_numbers(line), number)
            if watch and main:
                watch(lines)
            self._check_skipped(number, steps, what)
            if number % max(1, steps // 4) == 0 or number == steps:
                self._look(held, number, folder)
                self._save(folder, number)
                self._check_flat(what)
            bar.update()
        bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _check_skipped(self, number, steps, what):
        """Ends a run of which too many steps were no steps."""
        skipped, no_memory = self.counts["skipped"], self.counts["no_memory"]
        if skipped > max(2, self.knobs.max_skipped * steps):
            raise InputError(
                f"{what}: {skipped} of {number} steps changed nothing, {no_memory} for want of memory, the others "
                "without a finite gradient; lower grpo_lr, or for memory grpo_rollout_batch, in the profile"
            )

    def _check_flat(self, what):
        """Ends a run in which hardly a group has members to prefer; its state is saved, so it can go on."""
        flat, groups = self.counts["flat"], self.counts["groups"]
        if flat > self.knobs.max_zero_std * groups:
            raise InputError(
                f"{what}: in {flat} of {groups} groups all earned the same, which teaches nothing; raise rollout_temperature "
                "or grpo_group in the profile, or max_zero_std to go on as it is"
            )

    def _look(self, held, number, folder):
        """Writes what the policy earns on starts that it never learns from, with the same random numbers every time."""
        with fsdp.unsharded(self.learner):
            rows = self.walk(held, 2, [self.knobs.seed, 9])
        short = gather_object([_short(row) for row in rows])
        told = tally(short)
        if self.accelerator.is_main_process:
            _append(folder / "held.jsonl", {"step": number} | told)
        self.accelerator.log({f"held/{name}": value for name, value in _numbers(told).items()}, number)

    def _save(self, folder, number):
        """The state after a step, complete or not at all; the one before goes away."""
        target = folder / "steps" / f"{number:06}"
        partial = target.with_suffix(".partial")
        # It would say at every state that tied embeddings are kept once; they are tied again when it is loaded.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        self.accelerator.save_state(partial)
        self.accelerator.wait_for_everyone()  # each writes its random numbers
        if self.accelerator.is_main_process:
            cache.write_json(partial / "counts.json", self.counts)
            partial.rename(target)
            for other in target.parent.iterdir():
                if other != target:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder):
        """How many steps `folder` has; their state is loaded."""
        states = sorted(path for path in folder.glob("steps/*") if not path.suffix)
        if not states:
            return 0
        self.accelerator.load_state(states[-1])
        self.counts = Counter(json.loads((states[-1] / "counts.json").read_text()))
        return int(states[-1].name)


def _groups(knobs, recipe, agent):
    """What learns, and how fast: the language model, and the heads unless they are frozen (METHOD.md 6.3)."""
    parts = (agent.model.model.language_model, agent.model.lm_head)
    words = {
        id(w): w for part in parts for w in part.parameters() if not agent.adapters or w.requires_grad
    }.values()
    for weight in agent.model.parameters():
        weight.requires_grad_(False)
    heads = []
    for name, weight in agent.heads.named_parameters():
        weight.requires_grad_(recipe.latents != "frozen" and "gate" not in name)
        heads += [weight] * weight.requires_grad
    for weight in words:
        weight.requires_grad_()
    upcast_trainable(words)
    groups = [
        {"params": [w for w in words if w.ndim > 1], "lr": knobs.grpo_lr, "weight_decay": 0.01},
        {"params": [w for w in words if w.ndim < 2], "lr": knobs.grpo_lr, "weight_decay": 0.0},
    ]
    groups += [{"params": heads, "lr": knobs.grpo_head_lr, "weight_decay": 0.0}] * bool(heads)
    return [group | {"full_lr": group["lr"]} for group in groups]


def draw(
    starts: list[rollout.RolloutPrompt], number: int, count: int, seed: int
) -> list[rollout.RolloutPrompt]:
    """The starts of step `number`, from 1: each epoch goes through all of them in an order of its own."""
    places = range((number - 1) * count, number * count)
    epochs = {at // len(starts) for at in places}
    orders = {epoch: np.random.default_rng([seed, 8, epoch]).permutation(len(starts)) for epoch in epochs}
    return [starts[orders[at // len(starts)][at % len(starts)]] for at in places]


def _short(row):
    """A row in the words of the log."""
    kept = {"group": row.start.group, "member": row.start.member, "t": row.t, "query": row.start.text}
    kept |= {
        "shown": row.shown,
        "right": row.shown == row.start.video,
        "text": row.text,
        "length": len(row.ids),
    }
    kept |= {"reward": row.reward, "parts": row.parts, "advantage": row.advantage}
    return kept | {"chance": row.chance, "before": row.before}


def tally(rows: list[dict]) -> dict:
    """What a log says about the rows of a step: means over rows, and the same turn by turn.

    spread       mean over groups of the standard deviation of rewards
    groups       of more than one member
    flat         share of them whose members all earn the same: no signal; flat_groups: how many
    alone        rows that no other row can be compared with
    """
    own = {}
    for row in rows:
        own.setdefault(rewards.group_key(row), []).append(row["reward"])
    spreads = [float(np.std(rewards, ddof=1)) for rewards in own.values() if len(rewards) > 1]
    flat = sum(spread < 1e-6 for spread in spreads)
    told = {"rows": len(rows), "alone": len(own) - len(spreads), "groups": len(spreads), "flat_groups": flat}
    told |= {"spread": float(np.mean(spreads)) if spreads else None}
    told |= {"flat": flat / len(spreads) if spreads else None} | _means(rows)
    by_turn = [[row for row in rows if row["t"] == t] for t in sorted({row["t"] for row in rows})]
    return told | {"turns": [{"rows": len(own)} | _means(own) for own in by_turn]}


def _means(rows):
    values = {"reward": [row["reward"] for row in rows], "length": [row["length"] for row in rows]}
    values |= {"right_shown": [row["right"] for row in rows]}
    values |= {
        part: [row["parts"][part] for row in rows]
        for part in ("verify", "form", "refine", "time", "retrieve")
    }
    return {name: float(np.mean(own)) for name, own in values.items()}


def _first_group(rows):
    return [row for row in rows if row["group"] == 0]


def _numbers(line):
    """What of a line of the log can be drawn as a curve."""
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _keep(path, steps):
    """The lines of a log up to a step; a resumed run goes on behind them."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= steps] if steps else []
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return [json.loads(line) for line in kept]


# --- the stage -------------------------------------------------------------------------------------------------------


def train(profile, dataset: str, name: str = "vsr1", watch=None, stage_1: Path | None = None) -> Path:
    """The checkpoint of stage 2 by one of RECIPES, with its logs: runs/<profile>/<dataset>/grpo/<name>. Resumes.

    stage_1  folder of the checkpoint that it starts from; None: that of this profile. A variant that changes stage 2
             only starts from the main run's.
    """
    if name not in rollout.VARIANTS:
        raise InputError(f"{name}: no such recipe; there are {', '.join(rollout.VARIANTS)}")
    home = profile.runs(dataset)
    stage_1 = stage_1 or home / "sft"
    knobs = dataclasses.asdict(profile)
    used = [key for key in knobs if key.startswith(("grpo_", "re"))]
    used += [
        "lora_rank",
        "sft_negatives",
        "rollout_temperature",
        "grpo_infonce_weight",
        "latent_noise_std",
        "infonce_temperature",
    ]
    used += ["val_fraction", "max_new_tokens", "seed", "scale_rewards", "disabled_rewards"]
    inputs = {
        "sft": cache.metadata(stage_1).get("key"),
        "recipe": [name, *vars(rollout.VARIANTS[name]).values()],
        "knobs": {key: knobs[key] for key in used},
        "sight": [profile.video_fps, profile.max_frames, profile.max_frame_pixels, profile.dtype],
        "code": cache.source_digest(__name__),
    }
    work = lambda folder: _train(profile, dataset, name, folder, stage_1, watch)  # noqa: E731
    return cache.build(home / "grpo" / name, inputs, work, distributed=True)


def _train(profile, dataset, name, folder, stage_1, watch=None):
    recipe = rollout.VARIANTS[name]
    if not stage_1.exists():
        raise InputError(f"{stage_1}: not there; stage 1 comes first: vsr1 train --stage sft")
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "train")
    starts, held = rollout.choose_prompts(profile, dataset, vectors, stage_1)
    made, agent = engine.load(profile), checkpoints.load(str(stage_1), profile)
    agent.settings = dataclasses.replace(agent.settings, carry_blocks=recipe.carry, turns=recipe.turns)
    with video_reader.reader_pool(
        video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    ) as read:
        clips = clip_cache.ClipCache(profile.data_dir(dataset) / "videos", vectors.video_ids, read)
        course = GRPOTrainer(rollout.RolloutWorker(profile, dataset, recipe, made, agent, vectors, clips))
        course.run(starts, held, folder, f"grpo {name} {dataset}", watch)
    fsdp.unshard(course.learner)
    if course.accelerator.is_main_process:
        checkpoints.save(agent, folder)
        shutil.rmtree(folder / "steps")
