"""Stage 1, the SFT cold start: the policy learns to close its reply with <REFINE>, and its soft tokens to find videos.

One forward, two losses (docs/method.md section 5). The language-model loss over the reply is TRL's. The same forward
fills a KV cache, from which the soft tokens of each reply are decoded (`loop.sqr`). The frozen engine embeds the query
with them, and InfoNCE pulls the result to the right video and away from the one just rejected and others that rank
high. Its gradient runs through the engine's text side into the heads and the language model.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import clip_cache
from vsr1.loop import sqr
from vsr1.models import checkpoints, decoding, embedding, inputs, loading, prompt_text, search_index
from vsr1.models import engine as engines
from vsr1.models.policy import Policy, new_heads, new_settings
from vsr1.training import common, rewrites, sft_data

IGNORED = -100  # the library's label of a token that is not learned

# Knobs that the checkpoint depends on; where the replies lie (`sft_data`) does not matter, what they say does.
KNOBS = ("sft_rows", "sft_negatives", "sft_text_only_rows", "sft_epochs", "val_fraction")
KNOBS += ("sft_batch", "sft_accumulate", "sft_lr", "sft_warmup", "lora_rank", *common.VISION_KNOBS)
RETRIEVAL_KNOBS = ("sft_head_lr", "infonce_weight", "infonce_temperature", "infonce_prefixes", "infonce_rows")
RETRIEVAL_KNOBS += ("ambiguity_filter", "n_soft", "carry_blocks", "refine_init")
WITHOUT_HEADS = ("ft", "hqr")


# --- Batches


class Collator:
    """Makes rows one left-padded batch of prompt, video and reply; every token but the reply's is ignored.

    system  prompt; None: the one that the policy is evaluated with
    """

    def __init__(self, policy: Policy, clips, system: str | None = None):
        self.policy, self.clips = policy, clips
        evaluated = prompt_text.SYSTEM_ZS if policy.heads is None else policy.settings.system
        self.system = system or evaluated

    def __call__(self, rows: list[dict]) -> dict:
        policy = self.policy
        prompts = self._prompts(rows)
        replies = [self._reply_ids(row["reply"] or "") for row in rows]
        whole = [
            dataclasses.replace(prompt, ids=[*prompt.ids, *ids])
            for prompt, ids in zip(prompts, replies, strict=True)
        ]
        prefix = decoding.common_prefix(prompts, policy.model.config.vision_start_token_id)
        batch = inputs.collate(whole, policy.model, policy.tokenizer.pad_token_id, len(prefix))
        lengths = [0 if row["reply"] is None else len(ids) for row, ids in zip(rows, replies, strict=True)]
        return batch | {"labels": _labels(batch["input_ids"], lengths), "rows": rows, "prefix": prefix}

    def _prompts(self, rows):
        shown = [row["shown"] for row in rows if row["caption"] is None]
        clips = dict(zip(shown, self.clips.get(shown), strict=True))
        videos = [clips[row["shown"]] if row["caption"] is None else row["caption"] or None for row in rows]
        pairs = zip(rows, videos, strict=True)
        return [self.policy.prompt(self.system, row["query"], video) for row, video in pairs]

    def _reply_ids(self, reply):
        policy = self.policy
        ending = "" if policy.heads is None else f" {prompt_text.REFINE}"
        ids = policy.tokenizer(f"{reply}{ending}".lstrip(), add_special_tokens=False)["input_ids"]
        assert policy.heads is None or ids[-1] == policy.refine_token_id
        return [*ids, policy.stop_token_id]


def _labels(input_ids, lengths):
    """Label the last columns alone, from the one before the longest reply, which predicts its first token."""
    columns, lengths = torch.arange(-max(lengths) - 1, 0), torch.tensor(lengths)[:, None]
    ids = input_ids[:, columns[0] :]
    return ids.masked_fill((columns < -lengths).to(ids.device), IGNORED)


def partition_batch(profile, rows, num_processes: int):
    """Return (rows of one forward, forwards of one step, rows) for each process; they share the rows of a step.

    A step learns from `sft_batch` x `sft_accumulate` rows, whatever the number of processes. Padding rows, which teach
    nothing, give each process as many; where there are more processes than rows, some read padding alone.
    """
    size = profile.sft_batch * profile.sft_accumulate
    rows_per_process = -(-size // num_processes)
    batch = math.gcd(profile.sft_batch, rows_per_process)
    if num_processes > 1:
        padded_size = rows_per_process * num_processes
        padding_rows = [dataclasses.replace(rows[-1], reply=None)] * padded_size
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        rows = [row for step_rows in steps for row in (step_rows + padding_rows)[:padded_size]]
    return batch, rows_per_process // batch, rows


# --- InfoNCE


def uses_infonce(profile, row: dict) -> bool:
    """Return whether soft tokens learn from a row: not from padding or copies, and only as `infonce_rows` says."""
    selected = profile.infonce_rows == "all" or row["shown"] != row["right"]
    return row["reply"] is not None and row["contrast"] and selected


class GalleryContrast:
    """InfoNCE of query vectors against the videos of a gallery: how stage 1 and adapters of queries learn to search.

    Rows are dictionaries with the keys of `sft_data.SFTExample`.
    """

    def __init__(self, profile, vectors: search_index.Vectors, device):
        self.knobs, self.vectors = profile, vectors
        self.gallery_vecs = torch.from_numpy(vectors.video_vecs).to(device)  # (V, D)

    def infonce_losses(self, vecs, rows):
        """Return InfoNCE (B,) of query vectors (B, D) against each row's negatives, or all of the gallery without any.

        With an ambiguity filter, only negatives of the `ambiguity_mask` count; 0, without a gradient, where none is
        left.
        """
        right = torch.from_numpy(self.vectors.columns([row["right"] for row in rows])).to(vecs.device)
        knobs = self.knobs
        if knobs.ambiguity_filter is None and knobs.sft_negatives is not None:
            wrong_vecs = self.gallery_vecs[self._negative_columns(rows)]
            return common.info_nce(vecs, self.gallery_vecs[right], wrong_vecs, knobs.infonce_temperature)
        logits = vecs @ self.gallery_vecs.T / knobs.infonce_temperature  # (B, V)
        if knobs.ambiguity_filter is not None:
            logits = logits.masked_fill(~self.ambiguity_mask(rows, right), -torch.inf)
        return F.cross_entropy(logits, right, reduction="none")

    def ambiguity_mask(self, rows, right) -> torch.Tensor:
        """Return (B, V), True at the right video's column (B,) and at negatives that are clearly less like the query.

        Official (docs/method.md section 5): a video whose score for the original query is at least the right one's less
        `ambiguity_filter` may be right as well. That spares every video that outranks the right one, so also the one
        just rejected.
        """
        query_vecs = torch.from_numpy(self.vectors.vecs_of([row["desc_id"] for row in rows]))
        scores = query_vecs.to(right.device) @ self.gallery_vecs.T
        mask = scores < scores.gather(1, right[:, None]) - self.knobs.ambiguity_filter
        if self.knobs.sft_negatives is not None:
            wrong = self._negative_columns(rows).to(mask.device)
            mask &= torch.zeros_like(mask).scatter(1, wrong, True)
        return mask.scatter(1, right[:, None], True)

    def _negative_columns(self, rows):
        return torch.from_numpy(np.stack([self.vectors.columns(row["negatives"]) for row in rows]))


# --- The trainer


class Trainer(SFTTrainer):
    """TRL's trainer with InfoNCE beside its own loss."""

    def attach_retrieval(
        self, policy: Policy, engine: engines.Engine, vectors: search_index.Vectors, profile
    ) -> None:
        """Hand over what InfoNCE needs: policy, frozen engine and the vectors of the train gallery."""
        self.policy, self.engine, self.knobs = policy, engine, profile
        self.contrast = GalleryContrast(profile, vectors, policy.model.device)
        self.infonce_sums = []  # since the last log, over rows: InfoNCE, probability over one half, rows
        self.num_label_columns = 0  # columns of a batch that have labels; 0: all
        self.model.register_forward_pre_hook(self.prefix_hook, with_kwargs=True)
        self.model.model.register_forward_hook(self.label_columns_hook)
        if policy.heads is not None:
            self.model.register_forward_hook(self.retrieval_loss_hook, with_kwargs=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the language-model loss; with heads, plus `infonce_weight` times the mean InfoNCE of a step's rows."""
        self.rows, self.num_label_columns = inputs.pop("rows"), inputs["labels"].shape[1]
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.policy.heads is None:
            return loss
        # The gradients of several processes are averaged.
        scale = self.accelerator.num_processes / self.rows_of_step()
        return loss + self.knobs.infonce_weight * self.infonce * scale

    def prefix_hook(self, model, positional, inputs):
        """Forward pre-hook: give a cache in which all rows have read the words that they begin with.

        The forward fills it, and gradients flow back through it.
        """
        prefix = inputs.pop("prefix")
        kv_cache = decoding.prefill_prefix(self.policy.model, prefix, len(self.rows))
        return positional, inputs | {"past_key_values": kv_cache}

    def label_columns_hook(self, model, _, outputs):
        """Forward hook: hand only columns with labels to the head; off a GPU the library would score all."""
        outputs.last_hidden_state = outputs.last_hidden_state[:, -self.num_label_columns :]
        return outputs

    def retrieval_loss_hook(self, model, _, inputs, outputs):
        """Forward hook: add the sum of InfoNCE over the rows to what the forward puts out.

        With several processes, only weights behind an output of the forward are expected to get a gradient.
        """
        latents = self._latents(inputs)  # (B, N, D)
        n, texts = latents.shape[1], [row["query"] for row in self.rows]
        depths = [*(depth for depth in self.knobs.infonce_prefixes if depth < n), n]
        vecs = sqr.prefix_queries(self.engine, self.policy.heads, texts, latents, depths=depths)
        losses = torch.stack([self.contrast.infonce_losses(part, self.rows) for part in vecs.unbind(dim=1)])
        learned = torch.tensor([uses_infonce(self.knobs, row) for row in self.rows])
        self.infonce = outputs["loss"] = (losses.mean(dim=0) * learned.to(losses.device)).sum()
        self._count_infonce(losses[-1].detach().cpu()[learned], losses.device)
        return outputs

    def _latents(self, inputs):
        """Decode the soft tokens (B, N, D) of each row from the cache that the forward has filled."""
        layers = inputs["past_key_values"].layers
        kv_cache = tuple((layer.keys, layer.values) for layer in layers)
        context = decoding.Context(
            kv_cache, inputs["attention_mask"].bool(), inputs["position_ids"][0, :, -1]
        )
        columns = inputs["attention_mask"].shape[1]  # <REFINE> stands last but one
        contexts = [context.slice(row, columns - 2) for row in range(len(self.rows))]
        return sqr.soft_tokens(self.policy, contexts, self.policy.settings.n_soft)

    def _count_infonce(self, losses, device):
        losses = losses[losses > 0]  # 0: the filter left nothing to contrast with
        sums = [losses.sum().item(), (losses < np.log(2)).sum().item(), len(losses)]
        self.infonce_sums.append(torch.tensor(sums, device=device))

    def rows_of_step(self):
        """Return how many rows the current step learns from, over all batches and processes: fewer in the last."""
        size = self.knobs.sft_batch * self.knobs.sft_accumulate
        return min(size, self.num_rows - self.state.global_step * size)

    def _save(self, output_dir=None, state_dict=None):
        """Save what learns, and no more. The library's own refuses the tied row of <REFINE>."""
        if not self.args.should_save:
            return
        learned = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        state = self.model.state_dict()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: state[name].contiguous() for name in learned}, _weights_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load what `_save` saved; what does not learn is as the run began with it."""
        result = self.model.load_state_dict(load_file(_weights_file(resume_from_checkpoint)), strict=False)
        assert not result.unexpected_keys, result.unexpected_keys

    def _get_train_sampler(self, *_):
        """Keep the rows in the order of `sft_data.order_batches`."""
        return SequentialSampler(self.train_dataset)

    def log(self, logs, *args):
        """Write TRL's log line with the mean InfoNCE and how often the right video has most of the probability."""
        if self.infonce_sums:
            infonce, preferred, rows = self.accelerator.reduce(sum(self.infonce_sums), "sum").tolist()
            if rows:
                logs |= {"info_nce": round(infonce / rows, 4), "preferred": round(preferred / rows, 4)}
            self.infonce_sums.clear()
        super().log(logs, *args)


def _weights_file(folder):
    return Path(folder) / "learned.safetensors"


class SaveByTime(TrainerCallback):
    """Saves the training state every `minutes`."""

    def __init__(self, minutes: float):
        self.timer = common.SaveTimer(minutes)

    def on_step_end(self, args, state, control, **_):
        """Ask for a save if one is due."""
        control.should_save = self.timer.is_due()


LOGGED = {"loss": "loss", "info_nce": "info_nce", "preferred": "preferred", "grad_norm": "norm"}
LOGGED |= {"mean_token_accuracy": "accuracy", "learning_rate": "rate"}


class JsonlLogger(TrainerCallback):
    """Writes one JSON line a step to `path`, draws a progress bar, and calls `on_log` with all lines so far."""

    def __init__(self, path: Path, label: str, on_log=None):
        self.path, self.label, self.callback = path, label, on_log

    def on_train_begin(self, args, state, control, **_):
        """Open the log; a resumed run goes on behind the lines of the steps it has."""
        self.bar = cache.progress(range(state.max_steps), self.label)
        self.bar.update(state.global_step)
        if state.is_world_process_zero:
            self.log = cache.JsonlLog(self.path)
            self.log.truncate(state.global_step)

    def on_log(self, args, state, control, logs, **_):
        """Write a line with fixed keys; the closing summary of the library is left out."""
        if "loss" not in logs:
            return
        if not np.isfinite(logs["loss"]):
            raise InputError(
                f"{self.label}: the loss is {logs['loss']} at step {state.global_step}; lower sft_lr"
            )
        if state.is_world_process_zero:
            values = {name: logs.get(library_name) for library_name, name in LOGGED.items()}
            self.log.append({"step": state.global_step} | values)
            if self.callback:
                self.callback(self.log.rows)

    def on_step_end(self, args, state, control, **_):
        """Move the progress bar one step on."""
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        """Take the progress bar away."""
        self.bar.close()


def make_trainer(
    profile, policy, engine, vectors, rows, clips, folder, label, on_log=None, system: str | None = None
) -> Trainer:
    """Build the `Trainer` of a policy on `rows`, in their order; states go to `folder`/steps, the log to log.jsonl.

    label   names the run in the progress bar and in errors
    system  as of `Collator`
    """
    attach_heads(policy)
    batch, accumulate, filled = partition_batch(profile, rows, cache.dist_state().num_processes)
    trainer = Trainer(
        policy.model,
        _training_arguments(profile, policy, folder, batch, accumulate),
        Collator(policy, clips, system),
        datasets.Dataset.from_list([dataclasses.asdict(row) for row in filled]),
        processing_class=policy.tokenizer,
        optimizers=(torch.optim.AdamW(_parameter_groups(profile, policy), weight_decay=0.0), None),
        callbacks=[JsonlLogger(folder / "log.jsonl", label, on_log), SaveByTime(profile.save_minutes)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.num_rows = len(rows)
    # Qwen3-VL says no here, and a mean of each forward's mean would depend on how a step's rows are dealt out.
    trainer.model_accepts_loss_kwargs = True
    trainer.attach_retrieval(policy, engine, vectors, profile)
    return trainer


def train_policy(
    profile, dataset, policy, engine, vectors, rows, folder, name, on_log=None, system: str | None = None
) -> None:
    """Train a policy on `rows`, in their order, and leave its checkpoint and log in `folder`. Resumes after a kill.

    on_log, system  as of `make_trainer`
    """
    with clip_cache.open_clips(profile, dataset, vectors.video_ids) as clips:
        parts = policy, engine, vectors, rows, clips
        trainer = make_trainer(profile, *parts, folder, f"{name} {dataset}", on_log, system)
        trainer.train(resume_from_checkpoint=checkpoint(folder))
    detach_heads(policy)
    dist = cache.dist_state()
    dist.wait_for_everyone()  # each writes its random numbers below steps/
    if dist.is_main_process:
        checkpoints.save(policy, folder)
        shutil.rmtree(folder / "steps")


def attach_heads(policy) -> None:
    """Make the heads parts of the model, under the names of released checkpoints: the library trains one model."""
    if policy.heads is not None:
        for name, head in policy.heads.named_children():
            policy.model.add_module(name, head)


def detach_heads(policy) -> None:
    """Undo `attach_heads`."""
    if policy.heads is not None:
        for name, _ in policy.heads.named_children():
            delattr(policy.model, name)


def _parameter_groups(profile, policy):
    heads = [] if policy.heads is None else [w for w in policy.heads.parameters() if w.requires_grad]
    head_ids = {id(weight) for weight in heads}
    others = [w for w in policy.model.parameters() if w.requires_grad and id(w) not in head_ids]
    groups = [{"params": others, "lr": profile.sft_lr}]
    return groups + [{"params": heads, "lr": profile.sft_head_lr}] * bool(heads)


def _training_arguments(profile, policy, folder, batch, accumulate):
    options = SFTConfig(
        str(folder / "steps"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        ddp_find_unused_parameters=True,  # text-only rows leave the vision mergers without a gradient
        num_train_epochs=1,  # the rows are those of all epochs
        lr_scheduler_type="linear",
        warmup_steps=profile.sft_warmup,  # below one: a share
        max_grad_norm=1.0,
        use_cpu=policy.model.device.type == "cpu",
        bf16=profile.dtype == "bfloat16",  # autocast: the weights that learn are float32
        activation_checkpointing=False,  # it would drop the KV cache that the soft tokens are decoded from
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # the default cuts video tokens
        logging_steps=1,
        save_strategy="no",  # `SaveByTime` saves
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        seed=profile.seed,
    )
    options._n_gpu = 1  # else the library would copy the model to all GPUs it sees, in one process
    return options


# --- The step


def train(profile, dataset: str, name: str = "sft", on_log=None) -> Path:
    """Train stage 1 on one data set and return the folder of its checkpoint and log. Resumes after a kill.

    name    "sft"; "ft", the baseline of T1: no <REFINE>, no soft tokens, no InfoNCE; "hqr", which learns to rewrite in
            words where stage 1 learns soft tokens (`rewrites`); or "adapter-soft", the one of `query_adapters`: the
            same queries as often, <REFINE> right behind each, no video and no reply
    on_log  is called after each step with the lines of the log so far, for curves that redraw
    """
    vectors = embedding.embed_corpus(profile, dataset, "train")
    # FT reads the rows of stage 1 in their order, text-only ones included: what it lacks is the search, nothing else.
    # Only the rows with video, for as many steps, would show it each video three times as often as stage 1 sees it.
    knobs = KNOBS + RETRIEVAL_KNOBS * (name not in WITHOUT_HEADS)
    inputs = {
        "name": name,
        "vectors": cache.metadata(vectors).get("key"),
        "replies": sft_data.digest(profile, dataset),
        "policy": loading.version(profile.policy),
        "knobs": {knob: getattr(profile, knob) for knob in knobs},
        "code": cache.source_digest(__name__),
    }
    if name == "hqr":
        inputs["rewrites"] = cache.metadata(rewrites.write(profile, dataset)).get("key")
    work = functools.partial(_train, profile, dataset, name, vectors, on_log)
    return cache.build(profile.runs(dataset) / name, inputs, work, distributed=True)


def _train(profile, dataset, name, vectors, on_log, folder):
    vectors = search_index.load_vectors(vectors)
    rows = sft_data.load(profile, dataset, vectors)
    if name == "adapter-soft":
        rows = draw_queries(profile, rows)
    elif name == "hqr":
        rows = rewrites.with_updates(rows, rewrites.write(profile, dataset))
    if cache.dist_state().is_main_process:
        lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
        cache.write_text(folder / "rows.jsonl", "".join(lines))
    engine = engines.load(profile)
    policy = build_policy(profile, engine, heads=name not in WITHOUT_HEADS)
    system = prompt_text.SYSTEM_HQR if name == "hqr" else None
    train_policy(profile, dataset, policy, engine, vectors, rows, folder, name, on_log, system)


def draw_queries(profile, rows: list[sft_data.SFTExample]) -> list[sft_data.SFTExample]:
    """Return rows of queries alone: as many as soft tokens learn from in stage 1, the first in its order.

    They are of all queries, failed or not, because an adapter searches first. None shows a video or has a reply:
    <REFINE> stands right behind the query.
    """
    count = sum(uses_infonce(profile, vars(row)) for row in rows)
    alone = {"shown": "", "caption": "", "reply": "", "contrast": True}
    return [dataclasses.replace(row, **alone) for row in rows[:count]]


def build_policy(profile, engine: engines.Engine, heads=True) -> Policy:
    """Load the base policy with new heads: what stage 1 starts from. Of the vision tower only the mergers learn."""
    policy = checkpoints.load(profile.policy, profile)
    if heads:
        policy = new_heads(policy, new_settings(profile, engine.instruction), profile.seed, engine)
    for name, weight in policy.model.model.visual.named_parameters():
        weight.requires_grad_("merger" in name)
    if profile.lora_rank:
        common.add_lora(policy, profile.lora_rank, profile.seed, mergers=True)
    common.upcast_trainable(policy.model.parameters())
    return policy


def checkpoint(folder: Path) -> str | None:
    """Find the last complete training state below `folder`; the library writes trainer_state.json last."""
    states = [path.parent for path in folder.glob("steps/checkpoint-*/trainer_state.json")]
    latest = max(states, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return latest and str(latest)
