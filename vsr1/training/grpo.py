"""Stage 2, GRPO: the policy runs the live loop in groups, and learns from what each turn earned.

One update (docs/method.md section 6). Draw a few prompts: a query and the video its first search shows. Roll out G
episodes from each, with sampled replies and a live search. Reward every turn. Compare turns that saw the same query and
video: the advantage is the reward less the group's mean, over a standard deviation. Then make one gradient step on
exactly the tokens that were sampled, read once more with the prompt and its video shared by the group.

TRL's trainer is not used: it drops the video from the training forward without an error, and knows no soft tokens. A
test holds our objective against its.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import clip_cache, source
from vsr1.models import batching, checkpoints, decoding, embedding, engine, search_index
from vsr1.training import common, rewards, rollout, sft, sft_data
from vsr1.training.objective import Objective
from vsr1.training.rollout import RolloutPrompt, RolloutStep, RolloutWorker
from vsr1.training.sft_examples import SFTExample

# Knobs that the checkpoint and its logs depend on.
KNOBS = ("grpo_group", "grpo_prompts_per_step", "grpo_steps", "grpo_exclude_sft_queries")
KNOBS += ("grpo_lr", "grpo_head_lr", "grpo_schedule", "grpo_beta", "grpo_clip", "grpo_infonce_weight")
KNOBS += ("grpo_advantages", "shuffle_advantages", "grpo_negatives", "scale_rewards", "lora_rank")
KNOBS += ("val_fraction", "num_val_prompts")
KNOBS += ("rollout_temperature", "max_new_tokens", "retrieval_reward", "disabled_rewards", "latent_noise_std")
KNOBS += ("infonce_temperature", "sft_negatives", *common.VISION_KNOBS)

# --- The trainer


class GRPOTrainer:
    """Trains a policy by GRPO, in one process or in several that share the prompts of each step."""

    def __init__(self, worker: RolloutWorker):
        self.worker, self.knobs = worker, worker.knobs
        # Where no reply of a process asked for a search, its heads get no gradient: the others must not wait for it.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(
            cpu=worker.policy.model.device.type == "cpu",
            mixed_precision="bf16" if self.knobs.dtype == "bfloat16" else "no",
            kwargs_handlers=[unused],
        )
        objective = Objective(worker, _reference_policy(self.knobs, worker.policy))
        optimizer = torch.optim.AdamW(_parameter_groups(self.knobs, worker.variant, worker.policy))
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.splitter = batching.OOMSplitter("grpo_rollout_batch")
        self.counts = Counter()  # since step 1: skipped (of them no_memory), groups, zero_std_groups

    def rollout(self, prompts: list[RolloutPrompt], members: int, seed: list[int]) -> list[RolloutStep]:
        """Roll out `members` episodes from each prompt and return their steps; each process takes its share.

        If they do not fit in memory, half as many run at once from then on, with the same steps.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        groups = list(enumerate(prompts))[rank::processes]  # of this process
        size = max(1, self.knobs.grpo_rollout_batch * self.knobs.grpo_group // members)  # prompts at once
        work = functools.partial(self._rollout, members=members, seed=seed)
        steps = []
        for start in range(0, len(groups), size):
            for part in self.splitter.run(work, groups[start : start + size]):
                steps += part
        return steps

    def _rollout(self, groups, members, seed):
        """Roll out groups, (number, prompt) each, at once and return their steps."""
        prompts = [
            dataclasses.replace(prompt, group=group, member=member)
            for group, prompt in groups
            for member in range(members)
        ]
        with self.accelerator.autocast(), self.worker.policy.adapters_merged():
            return [step for steps in self.worker.rollout(prompts, seed) for step in steps]

    def train_step(self, number: int, prompts: list[RolloutPrompt]) -> tuple[dict, list[dict]]:
        """Do one rollout and one step of the optimizer; return (the line of the log, all rollout steps in short)."""
        started = time.perf_counter()
        steps = self.rollout(prompts, self.knobs.grpo_group, [self.knobs.seed, 7, number])
        reward_std = self._add_advantages(steps, number)
        sums, norm = self._update([step for step in steps if step.advantage is not None])
        rows = gather_object([summary_row(step) for step in steps])
        statistics = summarise(rows)
        self.counts.update({key: statistics[key] for key in ("groups", "zero_std_groups")})
        line = {"step": number} | _means_of_update(sums)
        line |= {"norm": norm, "step_reward_std": reward_std, "halved": self.splitter.parts - 1}
        line |= {key: self.counts[key] for key in ("skipped", "no_memory")}
        return line | {"seconds": time.perf_counter() - started} | statistics, rows

    def _add_advantages(self, steps, number):
        """Fill in the advantages, and return the standard deviation of all rewards; None without two of them."""
        step_rewards = [step.reward for step in steps]
        reward_std = _std_everywhere(step_rewards)
        scale = reward_std if self.knobs.scale_rewards == "batch" else None
        groups, decoupled = [_group_of(step) for step in steps], self.knobs.grpo_advantages == "gdpo"
        options = self.worker.weights, groups, scale, decoupled
        components = rewards.component_advantages([step.reward_parts for step in steps], *options)
        if decoupled:
            values = [parts and sum(parts.values()) for parts in components]
            spread = _std_everywhere([value for value in values if value is not None]) or 0.0
            values = [value if value is None else value / (spread + rewards.EPS) for value in values]
        else:
            values = rewards.advantages(step_rewards, groups, scale)
        if self.knobs.shuffle_advantages:
            values = _shuffled(values, groups, [self.knobs.seed, 10, number])
        for step, advantage, parts in zip(steps, values, components, strict=True):
            step.advantage, step.components = advantage, parts
        return reward_std

    def _update(self, steps):
        """Return (sums over the steps of all processes, norm of the gradient; None where nothing was updated).

        That is so without a step to learn from, without a finite gradient, and where memory ran out: then there are no
        sums. With several processes running out of memory is raised, for the others wait for this one's gradient.
        """
        self.optimizer.zero_grad()
        totals = self._sum({"rows": len(steps), "soft": sum(step.latents is not None for step in steps)})
        sums, norm = dict.fromkeys(("loss", "kl", "clip_frac", "info_nce"), math.nan) | totals, math.nan
        if totals["rows"]:
            sums = self._backward(steps, totals)
        if math.isfinite(sums["loss"]):
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            norm = float(self.accelerator.clip_grad_norm_(weights, 1.0))
        if not math.isfinite(norm):
            self.counts["skipped"] += 1
            return sums, None
        self.optimizer.step()
        return sums, norm

    def _backward(self, steps, totals):
        chunks, sums = self._chunks(steps), Counter(loss=0.0, kl=0.0, clip_frac=0.0, info_nce=0.0)
        try:
            for chunk in chunks:
                last = chunk is chunks[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                    loss, parts = self.objective(chunk, (totals["rows"], totals["soft"]))
                    self.accelerator.backward(loss * self.accelerator.num_processes)  # they are averaged
                sums.update({"loss": float(loss.detach())} | parts)
        except torch.OutOfMemoryError:
            if self.accelerator.num_processes > 1:
                raise
            sums = Counter(dict.fromkeys(sums, math.nan))
            self.counts["no_memory"] += 1
        return self._sum(sums) | totals

    def _chunks(self, steps):
        """Split steps into those read at once: all of `grpo_rollout_batch` prompts, or `grpo_micro_batch` of them."""
        # Those of a prompt stay together.
        steps = sorted(steps, key=lambda step: (step.query.group, step.t, step.shown))
        groups, batch = sorted({step.query.group for step in steps}), self.knobs.grpo_rollout_batch
        batches = [groups[start : start + batch] for start in range(0, len(groups), batch)]
        parts = [[step for step in steps if step.query.group in numbers] for numbers in batches]
        size = self.knobs.grpo_micro_batch or max(1, len(steps))
        chunks = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
        return chunks or [[]]

    def _sum(self, values):
        """Return the same keys with the sums over all processes."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(numbers, "sum").tolist(), strict=True))

    def run(
        self,
        prompts: list[RolloutPrompt],
        val_prompts: list[RolloutPrompt],
        folder: Path,
        label: str,
        on_log=None,
    ) -> None:
        """Do all steps from where `folder` stands, with its logs: log.jsonl, groups.jsonl, held.jsonl.

        groups.jsonl has the first group of each step, held.jsonl what validation prompts earn before, on the way and at
        the end; it stays empty without any.

        label          names the run in the progress bar and in errors
        on_log(lines)  is called after each step with the log so far, for curves that redraw
        """
        count = self.knobs.grpo_prompts_per_step
        num_steps = self.knobs.grpo_steps or -(-len(prompts) // count)
        done = self._resume(folder)
        self._open_logs(folder, done)
        if done == 0:
            self._validate(val_prompts, 0)
        timer, bar = common.SaveTimer(self.knobs.save_minutes), cache.progress(range(num_steps), label)
        bar.update(done)
        for number in range(done + 1, num_steps + 1):
            self._set_rates(1 - (number - 1) / num_steps if self.knobs.grpo_schedule == "linear" else 1.0)
            line, rows = self.train_step(number, draw(prompts, number, count, self.knobs.seed))
            self._log(number, line, rows, on_log)
            self._check_skipped(number, num_steps, label)
            if number % max(1, num_steps // 4) == 0 or number == num_steps:
                self._validate(val_prompts, number)
                self._check_zero_std(number, folder, label)
            if timer.is_due():
                self._save(folder, number)
            bar.update()
        bar.close()

    def _open_logs(self, folder, done):
        if self.accelerator.is_main_process:
            self.logs = {name: cache.JsonlLog(folder / f"{name}.jsonl") for name in ("log", "groups", "held")}
            for log in self.logs.values():
                log.truncate_after(done)

    def _set_rates(self, factor):
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]

    def _log(self, number, line, rows, on_log):
        if not self.accelerator.is_main_process:
            return
        self.logs["log"].append(line)
        self.logs["groups"].append({"step": number, "rows": [row for row in rows if row["group"] == 0]})
        if on_log:
            on_log(self.logs["log"].rows)

    def _validate(self, prompts, number):
        """Log what the policy earns on prompts that it never learns from, with the same random numbers every time."""
        if not prompts:
            return
        steps = self.rollout(prompts, 2, [self.knobs.seed, 9])
        statistics = summarise(gather_object([summary_row(step) for step in steps]))
        if self.accelerator.is_main_process:
            self.logs["held"].append({"step": number} | statistics)

    def _check_skipped(self, number, num_steps, label):
        """End a run of which too many steps updated nothing."""
        skipped, no_memory = self.counts["skipped"], self.counts["no_memory"]
        if skipped > max(2, self.knobs.max_skipped * num_steps):
            raise InputError(
                f"{label}: {skipped} of {number} steps changed nothing, {no_memory} for want of memory, the others "
                "without a finite gradient or without a reply to compare; lower grpo_lr, or for memory "
                "grpo_rollout_batch, in the profile, and look for videos that cannot be read"
            )

    def _check_zero_std(self, number, folder, label):
        """End a run in which hardly a group has members to prefer; its state is saved, so it can go on."""
        zero_std, groups = self.counts["zero_std_groups"], self.counts["groups"]
        if zero_std > self.knobs.max_zero_std * groups:
            self._save(folder, number)
            raise InputError(
                f"{label}: in {zero_std} of {groups} groups all earned the same, which teaches nothing; raise "
                "rollout_temperature or grpo_group in the profile, or max_zero_std to go on as it is"
            )

    def _save(self, folder, number):
        """Save the state after a step, complete or not at all; the one before goes away."""
        target = folder / "steps" / f"{number:06}"
        partial = target.with_suffix(".partial")
        # It would say at every state that tied embeddings are kept once; they are tied again when it is loaded.
        logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
        self.accelerator.save_state(partial)
        self.worker.policy.drafter = decoding.Drafter()  # as in a run that goes on from here, to the last bit
        self.accelerator.wait_for_everyone()  # each writes its random numbers
        if self.accelerator.is_main_process:
            cache.write_json(partial / "counts.json", self.counts)
            partial.rename(target)
            for other in target.parent.iterdir():
                if other != target:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder):
        """Load the last saved state of `folder` and return how many steps it has."""
        states = sorted(path for path in folder.glob("steps/*") if not path.suffix)
        if not states:
            return 0
        self.accelerator.load_state(states[-1])
        self.counts = Counter(json.loads((states[-1] / "counts.json").read_text()))
        return int(states[-1].name)


def _reference_policy(knobs, policy):
    """Return the policy that stage 1 left: without its adapters, which are added here, or a copy of its model."""
    reference = copy.copy(policy)
    if knobs.lora_rank:
        common.add_lora(policy, knobs.lora_rank, knobs.seed)
        reference.adapters = policy.adapters
    else:
        reference.model = copy.deepcopy(policy.model).requires_grad_(False)
    return reference


def _parameter_groups(knobs, variant, policy):
    """Return what learns, and how fast: the language model, and the heads unless the variant freezes them."""
    parts = (policy.model.model.language_model, policy.model.lm_head)
    weights = {
        id(weight): weight
        for part in parts
        for weight in part.parameters()
        if not policy.adapters or weight.requires_grad
    }.values()
    for weight in policy.model.parameters():
        weight.requires_grad_(False)
    heads = []
    for name, weight in policy.heads.named_parameters():
        weight.requires_grad_(variant.latents != "frozen" and "gate" not in name)
        heads += [weight] * weight.requires_grad
    for weight in weights:
        weight.requires_grad_()
    common.upcast_trainable(weights)
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "lr": knobs.grpo_lr, "weight_decay": 0.01},
        {"params": [w for w in weights if w.ndim < 2], "lr": knobs.grpo_lr, "weight_decay": 0.0},
    ]
    groups += [{"params": heads, "lr": knobs.grpo_head_lr, "weight_decay": 0.0}] * bool(heads)
    return [group | {"full_lr": group["lr"]} for group in groups]


def draw(prompts: list[RolloutPrompt], number: int, count: int, seed: int) -> list[RolloutPrompt]:
    """Draw the prompts of step `number`, from 1: each epoch goes through all of them in an order of its own."""
    draws = [divmod(n, len(prompts)) for n in range((number - 1) * count, number * count)]
    epochs = {epoch for epoch, _ in draws}
    orders = {epoch: np.random.default_rng([seed, 8, epoch]).permutation(len(prompts)) for epoch in epochs}
    return [prompts[orders[epoch][position]] for epoch, position in draws]


def _std_everywhere(values):
    """Return the standard deviation of the values of all processes; None without two of them."""
    values = gather_object(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _group_of(step):
    """Return what the steps have in common whose rewards are compared."""
    return step.query.group, step.t, step.shown


def _shuffled(values, groups, seed):
    """Deal out the values of each group anew among its members; the order of groups and processes does not matter."""
    shuffled = list(values)
    for (group, t, _), rows in common.rows_by_group(groups).items():
        order = np.random.default_rng([*seed, group, t]).permutation(len(rows))
        for row, position in zip(rows, order, strict=True):
            shuffled[row] = values[rows[position]]
    return shuffled


# --- The log


def summary_row(step: RolloutStep) -> dict:
    """Put what the log says of a rollout step into a json-able row."""
    return {
        "group": step.query.group,
        "member": step.query.member,
        "t": step.t,
        "query": step.query.text,
        "shown": step.shown,
        "right": step.shown == step.query.video,
        "text": step.text,
        "length": len(step.ids),
        "reward": step.reward,
        "parts": step.reward_parts,
        "advantage": step.advantage,
        "components": step.components,
        "p_positive": step.p_positive,
        "p_positive_before": step.p_positive_before,
    }


def summarise(rows: list[dict]) -> dict:
    """Return what a log says about the summary rows of a step: means over rows, and the same turn by turn.

    Rows of one group share their prompt: the query, the turn and the video shown.

    reward_std       mean over groups of the standard deviation of rewards
    groups           of more than one row
    zero_std_groups  of them, those in which all earn the same: no signal; frac_zero_std: their share
    singletons       rows that no other row can be compared with
    shares           which share of the variance of advantages each component of the reward carries
    """
    by_prompt, by_turn = {}, {}
    for row in rows:
        by_prompt.setdefault((row["group"], row["t"], row["shown"]), []).append(row["reward"])
        by_turn.setdefault(row["t"], []).append(row)
    stds = [float(np.std(group, ddof=1)) for group in by_prompt.values() if len(group) > 1]
    zero_std = sum(std < 1e-6 for std in stds)
    counts = {"rows": len(rows), "singletons": len(by_prompt) - len(stds)}
    counts |= {"groups": len(stds), "zero_std_groups": zero_std}
    counts |= {"reward_std": float(np.mean(stds)) if stds else None}
    counts |= {"frac_zero_std": zero_std / len(stds) if stds else None}
    counts |= {"shares": rewards.variance_shares([row.get("components") for row in rows])}
    turns = [{"rows": len(turn)} | _means(turn) for _, turn in sorted(by_turn.items())]
    return counts | _means(rows) | {"turns": turns}


def _means(rows):
    """Return means over rows; None where there are none."""
    values = {"reward": [row["reward"] for row in rows], "length": [row["length"] for row in rows]}
    values |= {"right_shown": [row["right"] for row in rows]}
    parts = [field.name for field in dataclasses.fields(rewards.RewardWeights)]
    values |= {part: [row["parts"][part] for row in rows] for part in parts}
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}


def _means_of_update(sums):
    """Return loss and means of an update's sums; None where nothing was computed."""
    means = {"loss": sums["loss"], "kl": sums["kl"] / max(1, sums["rows"])}
    means |= {"clip_frac": sums["clip_frac"] / max(1, sums["rows"])}
    means |= {"info_nce": sums["info_nce"] / max(1, sums["soft"])}
    return {key: mean if math.isfinite(mean) else None for key, mean in means.items()}


# --- The step


def train(profile, dataset: str, name: str = "vsr1", on_log=None, stage_1: Path | None = None) -> Path:
    """Train stage 2 by one of VARIANTS and return the folder of its checkpoint and logs. Resumes after a kill.

    stage_1  folder of the checkpoint that it starts from; None: that of this profile, trained first if it is not
             current. A variant that changes stage 2 only starts from the main run's.
    """
    if name not in rollout.VARIANTS:
        raise InputError(f"{name}: no such recipe; there are {', '.join(rollout.VARIANTS)}")
    stage_1 = stage_1 or sft.train(profile, dataset)
    inputs = {
        "sft": cache.metadata(stage_1).get("key"),
        "variant": [name, dataclasses.asdict(rollout.VARIANTS[name])],
        "knobs": {knob: getattr(profile, knob) for knob in KNOBS},
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_train, profile, dataset, name, stage_1, on_log)
    return cache.build(profile.runs(dataset) / "grpo" / name, inputs, work, distributed=True)


def _train(profile, dataset, name, stage_1, on_log, folder):
    variant = rollout.VARIANTS[name]
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, dataset, "train"))
    prompts, val_prompts = rollout.choose_prompts(profile, dataset, vectors, stage_1)
    search_engine, policy = engine.load(profile), checkpoints.load(str(stage_1), profile)
    policy.settings = dataclasses.replace(policy.settings, carry_blocks=variant.carry)
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        worker = RolloutWorker(profile, dataset, variant, search_engine, policy, vectors, clips)
        trainer = GRPOTrainer(worker)
        trainer.run(prompts, val_prompts, folder, f"grpo {name} {dataset}", on_log)
    if trainer.accelerator.is_main_process:
        checkpoints.save(policy, folder)
        if (folder / "steps").exists():  # a short run saved none
            shutil.rmtree(folder / "steps")


# --- A control


def continue_sft(profile, dataset: str, stage_1: Path | None = None) -> Path:
    """Continue stage 1 on the prompts of stage 2, and return the folder of its checkpoint and log.

    As many steps on as many prompts, in the same order and at the same rates, but each prompt has one reply to imitate
    and no reward. Where replies come from a file, only prompts of queries that it holds are learned from.

    stage_1  folder of the checkpoint that it starts from, as in `train`
    """
    stage_1 = stage_1 or sft.train(profile, dataset)
    knobs = KNOBS + sft.KNOBS + sft.RETRIEVAL_KNOBS
    inputs = {
        "sft": cache.metadata(stage_1).get("key"),
        "replies": sft_data.digest(profile, dataset),
        "knobs": {knob: getattr(profile, knob) for knob in knobs},
        "code": cache.source_digest(__name__),
    }
    work = functools.partial(_continue, profile, dataset, stage_1)
    return cache.build(profile.runs(dataset) / "sft-more", inputs, work, distributed=True)


def _continue(profile, dataset, stage_1, folder):
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, dataset, "train"))
    prompts, _ = rollout.choose_prompts(profile, dataset, vectors, stage_1)
    prompts = prompts_with_replies(profile, dataset, vectors, prompts)
    count = profile.grpo_prompts_per_step
    steps = profile.grpo_steps or -(-len(prompts) // count)
    rows = [row for step in range(1, steps + 1) for row in draw(prompts, step, count, profile.seed)]
    rates = {"sft_lr": profile.grpo_lr, "sft_head_lr": profile.grpo_head_lr, "sft_warmup": 0.0}
    knobs = dataclasses.replace(profile, sft_batch=count, sft_accumulate=1, **rates)
    search_engine, policy = engine.load(profile), checkpoints.load(str(stage_1), profile)
    policy.model.model.visual.requires_grad_(False)
    if profile.lora_rank:
        common.add_lora(policy, profile.lora_rank, profile.seed)
    common.upcast_trainable(policy.model.parameters())
    sft.train_policy(knobs, dataset, policy, search_engine, vectors, rows, folder, "sft-more")


def prompts_with_replies(profile, dataset, vectors, prompts: list[RolloutPrompt]) -> list[SFTExample]:
    """Return the prompts as examples of stage 1. Soft tokens learn from those that show a wrong video."""
    writer = source.of(profile).reply_writer(profile, dataset)
    if writer is None:
        rows = {row.desc_id: row for row in sft_data.load(profile, dataset, vectors)}
        examples = [rows[prompt.id] for prompt in prompts if prompt.id in rows]
        if not examples:
            file = sft_data.reply_file(profile, dataset)
            raise InputError(
                f"{file}: no replies to a query of stage 2, which sft-more imitates; take all rows"
            )
        return examples
    return [
        SFTExample(
            prompt.id,
            prompt.text,
            prompt.video,
            prompt.first_video,
            prompt.negatives,
            writer[0](prompt, prompt.first_video),
            contrast=prompt.first_video != prompt.video,
        )
        for prompt in prompts
    ]
