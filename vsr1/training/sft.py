"""Stage 1, the SFT cold start: the policy learns to close its reply with <REFINE>, and its soft tokens to find videos.

One forward, two losses (METHOD.md 5). The language-model loss over the reply is TRL's. On the way that forward fills a
KV cache, from which the soft tokens of each reply are decoded (`refine`); the frozen engine embeds the query with them,
and InfoNCE pulls the result to the right video and away from the one just rejected and others that rank high. Its
gradient runs through the engine's text side into the heads and the language model.
"""

import dataclasses
import gc
import json
import math
import shutil
import warnings
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import clip_cache, video_reader
from vsr1.loop import sqr
from vsr1.models import checkpoints, decoding, engine, inputs, loading, policy, prompt_text, search_index
from vsr1.training import common, fsdp, sft_data

IGNORED = -100  # the library's label of a token that is not learned


class Collator:
    """Rows as one left-padded batch: prompt, video and reply; every token but the reply's is ignored."""

    def __init__(self, agent: policy.Policy, clips):
        self.agent, self.clips = agent, clips

    def __call__(self, rows: list[dict]) -> dict:
        agent, asked, prompts, lengths = self.agent, [], [], []
        seeing = [row["shown"] for row in rows if row["caption"] is None]
        clips = dict(zip(seeing, self.clips.get(seeing), strict=True))
        system = prompt_text.SYSTEM_ZS if agent.heads is None else agent.settings.system
        ending = "" if agent.heads is None else f" {prompt_text.REFINE}"
        for row in rows:
            prompt = agent.prompt(
                system, row["query"], clips[row["shown"]] if row["caption"] is None else row["caption"]
            )
            said = agent.tokenizer(f"{row['reply'] or ''}{ending}", add_special_tokens=False)["input_ids"]
            assert agent.heads is None or said[-1] == agent.refine_token_id
            asked.append(prompt)
            prompts.append(dataclasses.replace(prompt, ids=[*prompt.ids, *said, agent.stop_token_id]))
            lengths.append(0 if row["reply"] is None else len(said) + 1)
        words = decoding.common_prefix(asked, agent.model.config.vision_start_token_id)
        batch = inputs.collate(prompts, agent.model, agent.tokenizer.pad_token_id, len(words))
        # The last columns, from the one before the longest reply: it predicts that reply's first token.
        columns, lengths = torch.arange(-max(lengths) - 1, 0), torch.tensor(lengths)[:, None]
        ids = batch["input_ids"][:, columns[0] :]
        batch["labels"] = ids.masked_fill((columns < -lengths).to(ids.device), IGNORED)
        return batch | {"rows": rows, "words": words}


class Trainer(SFTTrainer):
    """TRL's trainer with InfoNCE beside its own loss."""

    def teach(self, agent: policy.Policy, made: engine.Engine, vectors: search_index.Vectors, profile):
        """Hand over what InfoNCE needs: the policy whose model is trained, the engine, and the train gallery."""
        self.agent, self.engine, self.knobs = agent, made, profile
        self.gallery = torch.from_numpy(vectors.video_vecs).to(agent.model.device)
        self.column = {video: number for number, video in enumerate(vectors.video_ids)}
        typed = torch.from_numpy(vectors.query_vecs).to(agent.model.device)
        self.typed = dict(zip(vectors.query_ids, typed, strict=True))
        self.seen = []  # since the last log, sums over rows: InfoNCE, probability over one half, rows
        self.scored = 0  # columns of a batch that have labels; 0: all
        self.model.register_forward_pre_hook(self.open, with_kwargs=True)
        self.model.model.register_forward_hook(self.cut)
        if agent.heads is not None:
            self.model.register_forward_hook(self.soften, with_kwargs=True)
        return self

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The language-model loss, plus infonce_weight times the mean InfoNCE of a step's rows where there are heads."""
        self.rows, self.scored = inputs.pop("rows"), inputs["labels"].shape[1]
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.agent.heads is None:
            return loss
        mates = self.accelerator.num_processes  # their gradients are averaged
        return loss + self.knobs.infonce_weight * self.nce * mates / self.rows_of_step()

    def open(self, model, positional, inputs):
        """Forward pre-hook: a cache in which all rows have read the words that they begin with.

        The forward fills it, and gradients flow back through it.
        """
        words = inputs.pop("words")
        return positional, inputs | {
            "past_key_values": decoding.prefill_prefix(self.agent.model, words, len(self.rows))
        }

    def cut(self, model, _, outputs):
        """Forward hook: only columns with labels go on to the head; off a GPU, the library would score all."""
        outputs.last_hidden_state = outputs.last_hidden_state[:, -self.scored :]
        return outputs

    def soften(self, model, _, inputs, outputs):
        """Forward hook: the sum of InfoNCE over the rows, put out by the forward as well.

        Where several processes train, only weights behind what a forward puts out are expected to get a gradient.
        """
        cache = inputs["past_key_values"]
        memory = tuple((layer.keys, layer.values) for layer in cache.layers)
        context = decoding.Context(memory, inputs["attention_mask"].bool(), inputs["position_ids"][0, :, -1])
        columns = inputs["attention_mask"].shape[1]  # <REFINE> stands last but one
        branches = [context.slice(row, columns - 2) for row in range(len(self.rows))]
        latents = sqr.soft_tokens(self.agent, branches, self.agent.settings.n_soft)
        texts = [row["query"] for row in self.rows]
        n = latents.shape[1]
        depths = [*(depth for depth in self.knobs.infonce_prefixes if depth < n), n]
        vecs = sqr.prefix_queries(self.engine, self.agent.heads, texts, latents, depths=depths)
        contrast = torch.stack([self.contrast(some, self.rows) for some in vecs.unbind(dim=1)])
        real = torch.tensor([self.asks(row) for row in self.rows])
        self.nce = outputs["loss"] = (contrast.mean(dim=0) * real.to(contrast.device)).sum()
        losses = contrast[-1].detach().cpu()[real]
        losses = losses[losses > 0]  # 0: the filter left nothing to contrast with
        told = [losses.sum().item(), (losses < np.log(2)).sum().item(), len(losses)]
        self.seen.append(torch.tensor(told, device=contrast.device))
        return outputs

    def asks(self, row) -> bool:
        """Whether soft tokens learn from a row: no blank, no copy (`traces.make_rows`), and as `infonce_rows` says."""
        rejected = self.knobs.infonce_rows == "all" or row["shown"] != row["right"]
        return row["reply"] is not None and row["contrast"] and rejected

    def rows_of_step(self):
        """How many rows the current step learns from, over all batches and processes: fewer in the last."""
        most = self.knobs.sft_batch * self.knobs.sft_accumulate
        return min(most, self.count - self.state.global_step * most)

    def contrast(self, vecs, rows):
        """(B,) InfoNCE of query vectors (B, D) against each row's negatives, or the whole gallery where it has none.

        With an ambiguity filter, against those of them that are `clear`; 0, without a gradient, where none is.
        """
        right = torch.tensor([self.column[row["right"]] for row in rows], device=vecs.device)
        knobs = self.knobs
        if knobs.ambiguity_filter is None and knobs.sft_negatives is not None:
            wrong = torch.tensor(self._negatives(rows))
            return common.info_nce(vecs, self.gallery[right], self.gallery[wrong], knobs.infonce_temperature)
        logits = vecs @ self.gallery.T / knobs.infonce_temperature  # (B, V)
        if knobs.ambiguity_filter is not None:
            logits = logits.masked_fill(~self.clear(rows, right), -torch.inf)
        return F.cross_entropy(logits, right, reduction="none")

    def clear(self, rows, right) -> torch.Tensor:
        """(B, V) True at the right video (B,), and at negatives that the query as typed finds clearly less alike.

        Official (METHOD.md 5): one with a score of at least the right video's less `ambiguity_filter` may be right as
        well. It also spares every video that outranks the right one, the one just rejected among them.
        """
        scores = torch.stack([self.typed[row["desc_id"]] for row in rows]) @ self.gallery.T
        kept = scores < scores.gather(1, right[:, None]) - self.knobs.ambiguity_filter
        if self.knobs.sft_negatives is not None:
            wrong = torch.tensor(self._negatives(rows), device=kept.device)
            kept &= torch.zeros_like(kept).scatter(1, wrong, True)
        return kept.scatter(1, right[:, None], True)

    def _negatives(self, rows):
        return [[self.column[video] for video in row["negatives"]] for row in rows]

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint on the way: what learns, and no more. The library's own refuses the tied row of <REFINE>."""
        learned = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        state = self.model.state_dict()  # all processes put it together (`split`), the first writes
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file({name: state[name].contiguous() for name in learned}, _learned(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir):
        """The library asks only the first process for the state of the optimizer, which all put together (`split`)."""
        if not self.args.should_save:
            self.optimizer.state_dict()
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The other way round; what does not learn is as the run began with it."""
        found = self.model.load_state_dict(load_file(_learned(resume_from_checkpoint)), strict=False)
        assert not found.unexpected_keys, found.unexpected_keys

    def _get_train_sampler(self, *_):
        """Rows come in the order of their course (`traces.course`)."""
        return SequentialSampler(self.train_dataset)

    def log(self, logs, *args):
        """TRL's log line, with both terms of ours."""
        if self.seen:
            nce, first, rows = self.accelerator.reduce(sum(self.seen), "sum").tolist()
            logs |= {"info_nce": round(nce / rows, 4), "preferred": round(first / rows, 4)} if rows else {}
            self.seen.clear()
        super().log(logs, *args)


def _learned(folder):
    return Path(folder) / "learned.safetensors"


class JsonlLogger(TrainerCallback):
    """One JSON line a step in `log.jsonl`, a progress bar, and whoever watches."""

    def __init__(self, path: Path, what: str, watch=None):
        self.path, self.what, self.watch, self.lines = path, what, watch, []

    def on_train_begin(self, args, state, control, **_):
        """A resumed run goes on behind the lines of the steps it has."""
        self.bar = cache.progress(range(state.max_steps), self.what)
        self.bar.update(state.global_step)
        if not state.is_world_process_zero:
            return
        kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(kept[: state.global_step]), encoding="utf-8")
        self.lines = [json.loads(line) for line in kept[: state.global_step]]

    def on_log(self, args, state, control, logs, **_):
        """Fixed keys; the closing summary of the library is left out."""
        if "loss" not in logs:
            return
        if not np.isfinite(logs["loss"]):
            raise InputError(
                f"{self.what}: the loss is {logs['loss']} at step {state.global_step}; lower sft_lr"
            )
        if not state.is_world_process_zero:
            return
        keys = {"loss": "loss", "info_nce": "info_nce", "preferred": "preferred", "grad_norm": "norm"}
        keys |= {"mean_token_accuracy": "accuracy", "learning_rate": "rate"}
        row = {"step": state.global_step} | {ours: logs.get(theirs) for theirs, ours in keys.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.lines.append(row)
        if self.watch:
            self.watch(self.lines)

    def on_step_end(self, args, state, control, **_):
        """One step further."""
        self.bar.update()

    def on_train_end(self, args, state, control, **_):
        """The bar goes away."""
        self.bar.close()


# --- the stage -------------------------------------------------------------------------------------------------------


def train(profile, dataset: str, name: str = "sft", watch=None) -> Path:
    """The checkpoint of stage 1 on one data set, with its log: runs/<profile>/<dataset>/<name>. Resumes after a kill.

    name   "sft"; or "ft", the baseline of T1: the same rows, no <REFINE>, no soft tokens, no InfoNCE
    watch  is called after each step with the lines of the log so far, for curves that redraw
    """
    home = profile.runs(dataset)
    profile = profile if name == "sft" else dataclasses.replace(profile, sft_text_only_rows=0)
    knobs = {key: value for key, value in dataclasses.asdict(profile).items() if key.startswith("sft_")}
    del knobs["sft_data"]  # where it lies does not matter, what it says does
    retrieval = [
        profile.infonce_weight,
        profile.infonce_temperature,
        profile.n_soft,
        profile.refine_init,
    ]
    retrieval += [profile.ambiguity_filter, profile.infonce_prefixes, profile.infonce_rows]
    inputs = {
        "vectors": cache.metadata(profile.data_dir(dataset) / "embed" / "engine" / "train").get("key"),
        "replies": sft_data.digest(profile, dataset),
        "policy": loading.version(profile.policy),
        "knobs": [name, knobs, profile.lora_rank, profile.val_fraction, *retrieval],
        "sight": [
            profile.video_fps,
            profile.max_frames,
            profile.max_frame_pixels,
            profile.dtype,
            profile.seed,
        ],
        "code": cache.source_digest(__name__),
    }
    work = lambda folder: _train(profile, dataset, name, folder, watch)  # noqa: E731
    return cache.build(home / name, inputs, work, distributed=True)


def _train(profile, dataset, name, folder, watch):
    mates = cache.dist_state()
    vectors = search_index.load_vectors(profile.data_dir(dataset) / "embed" / "engine" / "train")
    rows, notes = sft_data.load(profile, dataset, vectors)
    if mates.is_main_process:
        cache.write_json(folder / "notes.json", notes)
        with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    made = engine.load(profile)
    with video_reader.reader_pool(
        video_reader.Reader(profile.video_fps, profile.max_frames), profile.decode_workers
    ) as read:
        clips = clip_cache.ClipCache(profile.data_dir(dataset) / "videos", vectors.video_ids, read)

        def begin(knobs):
            agent = build_policy(knobs, made, heads=name == "sft")
            trainer = make_trainer(knobs, agent, rows, clips, folder, f"{name} {dataset}", watch)
            return trainer.teach(agent, made, vectors, knobs)

        agent = train_or_halve(begin, profile, folder).agent
    fsdp.unshard(agent.model)
    if agent.heads is not None:
        for head, _ in agent.heads.named_children():
            delattr(agent.model, head)
    mates.wait_for_everyone()  # each writes its random numbers below steps/
    if mates.is_main_process:
        checkpoints.save(agent, folder)
        shutil.rmtree(folder / "steps")


def train_or_halve(begin, profile, folder: Path) -> Trainer:
    """The trainer that `begin(profile)` makes, at the end of its run; an interrupted one goes on.

    Where memory does not suffice, it goes on with half of `sft_batch` at once, the step as large as before. It is said,
    and happens once.
    """
    trainer = begin(profile)
    try:
        trainer.train(resume_from_checkpoint=checkpoint(folder))
        return trainer
    except torch.OutOfMemoryError:
        # Of several processes the others would wait for this one's gradients.
        if profile.sft_batch % 2 or cache.dist_state().num_processes > 1:
            raise
    warnings.warn(
        f"sft_batch: {profile.sft_batch} rows at once do not fit in memory: half of them from now on",
        stacklevel=2,
    )
    del trainer
    gc.collect()  # its parts know each other
    torch.cuda.empty_cache()
    half = {"sft_batch": profile.sft_batch // 2, "sft_accumulate": 2 * profile.sft_accumulate}
    trainer = begin(dataclasses.replace(profile, **half))
    trainer.train(resume_from_checkpoint=checkpoint(folder))
    return trainer


def checkpoint(folder: Path) -> str | None:
    """Where an interrupted run in `folder` goes on from."""
    return get_last_checkpoint(str(folder / "steps")) if (folder / "steps").exists() else None


def build_policy(profile, made: engine.Engine, heads=True) -> policy.Policy:
    """The base policy with new heads: what stage 1 starts from. Vision blocks stay as they are, the mergers learn."""
    agent = checkpoints.load(profile.policy, profile)
    if heads:
        agent = policy.new_heads(agent, policy.new_settings(profile, made.instruction), profile.seed, made)
    for name, weight in agent.model.model.visual.named_parameters():
        weight.requires_grad_("merger" in name)
    if profile.lora_rank:
        common.add_lora(agent, profile.lora_rank, profile.seed, mergers=True)
    common.upcast_trainable(agent.model.parameters())
    return agent


def make_trainer(profile, agent, rows, clips, folder, what, watch=None):
    """A `Trainer` of the policy with its heads, which the library sees as parts of one model."""
    learned = []
    if agent.heads is not None:
        for name, head in agent.heads.named_children():  # the names of released checkpoints
            agent.model.add_module(name, head)
        learned = [weight for weight in agent.heads.parameters() if weight.requires_grad]
    ours = {id(weight) for weight in learned}
    rest = [w for w in agent.model.parameters() if w.requires_grad and id(w) not in ours]
    groups = [{"params": rest, "lr": profile.sft_lr}]
    groups += [{"params": learned, "lr": profile.sft_head_lr}] * bool(learned)
    batch, accumulate, filled = partition_batch(profile, rows, cache.dist_state().num_processes)
    options = SFTConfig(
        str(folder / "steps"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        ddp_find_unused_parameters=True,  # rows told in words leave the eyes alone
        num_train_epochs=1,  # the rows are those of all epochs
        lr_scheduler_type="linear",
        warmup_steps=profile.sft_warmup,  # below one: a share
        max_grad_norm=1.0,
        use_cpu=agent.model.device.type == "cpu",
        bf16=profile.dtype == "bfloat16",  # autocast: the weights that learn are float32 (`masters`)
        activation_checkpointing=False,  # it would drop the cache that the soft tokens live on (STACK.md 2.8)
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # the default cuts video tokens
        logging_steps=1,
        save_steps=0.25,
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        seed=profile.seed,
    )
    options._n_gpu = 1  # else the library would copy the model to all GPUs it sees, in one process
    trainer = Trainer(
        agent.model,
        options,
        Collator(agent, clips),
        datasets.Dataset.from_list([dataclasses.asdict(row) for row in filled]),
        processing_class=agent.tokenizer,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[JsonlLogger(folder / "log.jsonl", what, watch)],
    )
    fsdp.shard(trainer.model, trainer.optimizer, trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    if profile.tensorboard:  # what `report_to` adds; its own folder is one that goes away at the end
        common.need_tensorboard()
        board = TensorBoardCallback()
        board.logging_dir = str(folder / "tensorboard")
        trainer.add_callback(board)
    trainer.count = len(rows)
    # Qwen3-VL says no here, and a mean of each forward's mean would depend on how a step's rows are dealt out.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def partition_batch(profile, rows, count: int):
    """(rows of one forward, forwards of one step, rows) of each of `count` processes, which share the rows of a step.

    A step learns from `sft_batch` x `sft_accumulate` rows, whoever reads them. Copies that teach nothing fill it up to
    as many for each process; where there are more processes than rows, some read nothing else.
    """
    step = profile.sft_batch * profile.sft_accumulate
    own = -(-step // count)
    batch = math.gcd(profile.sft_batch, own)
    if count > 1:
        blanks = [dataclasses.replace(rows[-1], reply=None)] * (own * count)
        steps = [rows[at : at + step] for at in range(0, len(rows), step)]
        rows = [row for some in steps for row in (some + blanks)[: own * count]]
    return batch, own // batch, rows
