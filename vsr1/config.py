"""Profiles: every knob of a run, typed, in one frozen record read from `vsr1/profiles/<name>.yaml`.

Quoted words are the paper's or its project page's; "ours" marks a choice of this project (reasons in DEVIATIONS.md).
"""

import dataclasses
import functools
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent  # the clone: profiles name their files relative to it
# Knobs that no result depends on, but for the rounding of sums: they enter no key and no digest.
NO_RESULT = {"name", "variant", "parallel_datasets", "decode_workers", "threads", "device", "tensorboard"}
DATASETS = ("charades", "didemo", "activitynet")


class InputError(ValueError):
    """Something a person gave us is wrong; the message is one line: what, where (file, line, key), what to do."""


@dataclass(frozen=True)
class WorldConfig:
    """How large the rendered corpora are (`miniworld`); absent where the videos are real. All ours."""

    train_videos: int
    test_videos: int
    foundation_videos: int  # per data set; for `make foundation` only
    size: int = 128  # pixels, width and height of the MP4 files
    fps: int = 8
    seed: int = 2607  # of the world, not of the experiment: every seed searches the same corpora


@dataclass(frozen=True)
class Profile:
    """One way to run everything. A knob without a default must stand in the yaml file."""

    name: str
    datasets: tuple[str, ...]
    engine: str  # "Qwen3-VL-Embedding-2B": folder relative to the clone, or hub name
    engine_large: str  # Qwen3-VL-Embedding-8B, for A2
    policy: str  # "Qwen3-VL-2B-Instruct"
    variant: str = ""  # not a knob: set by `with_overrides`, part of the path of what it computes
    data_source: str = "vsr1.data.real_datasets"  # the module that provides corpus, videos and replies
    world: WorldConfig | None = None  # None: real annotations and videos under `data`
    data: str = "data"  # <data>/<dataset>/{annotations,videos}/ for real data
    seed: int = 42  # official; `make paper SEED=...` replaces it
    threads: int = 1  # ours: two torch threads can stall on a shared machine
    parallel_datasets: int = (
        1  # ours: data sets that are worked on at once, a process each; more would share one GPU
    )
    device: str = "auto"  # auto: the first GPU where there is one, else the CPU
    dtype: str = "float32"  # "bf16" at paper scale
    decode_workers: int = 1  # ours: worker processes that decode ahead of the engine
    max_turns: int = 3  # T; ours: the project page says gains saturate at 3, the official script runs 2
    display_rule: typing.Literal["top1", "skip_rejected"] = "top1"  # see `episode.select_video`
    eval_batch: int = 64  # ours: queries that walk in step; their KV caches are held, a kill costs as many
    sample_queries: int = 96  # ours: test queries, evenly spread, that S1 compares refinements on
    video_fps: float = 1.0  # "1 fps"
    max_frames: int = 64  # official: at most 64 frames, spread over the whole video
    max_frame_pixels: int = (
        200704  # official: most pixels of a frame; its sides are multiples of patch x merge
    )
    instruction: str = "Represent the user's input"  # official; without punctuation it gets a full stop
    max_query_tokens: int = (
        128  # official: the embedder's length limit; longer query texts are cut and counted
    )
    batch_tokens: int = 4096  # ours: padded tokens a batch of the engine may hold
    vr_ks: tuple[int, ...] = (1, 5, 10, 100)  # "R@1/5/10/100"
    bootstrap_samples: int = 2000  # ours: resamples behind every 95 % interval
    probe_steps: int = 600  # ours: training steps of the attribute probe (the headroom figure)
    neutral_tokens: int = 8  # ours: inserted where the paper's "N = 8" soft tokens will stand
    max_new_tokens: int = 1024  # official: tokens of the longest reply
    n_soft: int = 8  # "N = 8 soft query tokens"
    # "zero", official: the last layer of the projector starts at zero. "scaled" is ours, see `SoftHeads`.
    refine_init: typing.Literal["zero", "default", "scaled"] = "zero"
    carry_blocks: int = 1  # official; "q_{t+1} = [q_t, soft_t]" is as many as there were turns in training

    sft_data: str | None = None  # the released train_oneturn.json; {dataset} in the path stands for its name
    teacher: str | None = None  # writes one where there is none; official: "Qwen3-VL-30B-A3B-Thinking"
    sft_rows: int = 1000  # official: rows of stage 1 whose first search is right; as many where it is wrong
    sft_negatives: int | None = 24  # official: wrong videos of InfoNCE; None: all of the gallery
    sft_text_only_rows: int = (
        0  # ours: rows more that are told their video in words (`traces.course`): heads need many
    )
    sft_epochs: float = 1.0  # official
    sft_batch: int = 1  # rows of one forward; times `sft_accumulate`: the 4 of a public log (METHOD.md 9)
    sft_accumulate: int = 4
    sft_lr: float = 2e-5  # official, of the language model
    sft_head_lr: float = 5e-5  # official, of the soft-query heads
    sft_warmup: float = 0.0  # official; share of stage 1's steps in which its rates rise to full height
    # Ours: InfoNCE is the mean over queries with the first so many soft tokens, and with all; (): with all (official).
    infonce_prefixes: tuple[int, ...] = ()
    # Ours: "rejected" lets soft tokens learn only from rows that show a wrong video, where alone they are used.
    infonce_rows: typing.Literal["all", "rejected"] = "all"
    lora_rank: int = 0  # ours, of adapters in both stages (`sft.adapt`); 0: full fine-tuning (official)
    infonce_weight: float = 0.3  # official: weight of InfoNCE beside the language-model loss
    infonce_temperature: float = 0.1  # official: its temperature
    ambiguity_filter: float | None = None  # official: 0.0005 (`sft.Trainer.clear`); None: plain InfoNCE

    val_fraction: float = 0.1  # ours: share of train videos to choose and watch by; nothing learns from them
    num_val_prompts: int = 48  # ours: starts on them whose reward stage 2 watches

    grpo_group: int = 8  # "G = 8": episodes from one start
    grpo_prompts_per_step: int = 4  # starts of one optimizer step (METHOD.md 9: 32 episodes)
    grpo_rollout_batch: int = (
        4  # ours: starts walked, and learned from, at once; lower it where memory is short
    )
    grpo_micro_batch: int | None = None  # ours: replies that one forward learns from; None: all
    grpo_steps: int | None = None  # None: one epoch (official)
    # Ours: starts are only queries that stage 1 did not learn from: on others its soft tokens find what they know.
    grpo_exclude_sft_queries: bool = False
    # An advantage is over the rewards' spread in its group (official), or in all of the step: TRL's scale_rewards.
    scale_rewards: typing.Literal["group", "batch"] = "group"
    grpo_lr: float = 5e-7  # official, of the language model
    grpo_head_lr: float = 5e-5  # official for stage 1, of the soft-query heads; frozen heads have none
    grpo_schedule: typing.Literal["constant", "linear"] = "constant"  # official; "linear" falls to zero
    grpo_beta: float = 0.01  # official: weight of the KL to the policy of stage 1
    grpo_clip: float = 0.2  # official
    grpo_negatives: int = 24  # official: wrong videos of the retrieval reward
    rollout_temperature: float = 1.0  # official: of sampled replies
    # R_ret is "exp(-L_ret)"; "delta", official: less that of the query as typed.
    retrieval_reward: typing.Literal["exp", "delta"] = "exp"
    # Parts of the reward that count nothing: verify, form, refine, time, retrieve.
    disabled_rewards: tuple[str, ...] = ()
    grpo_infonce_weight: float = 1.0  # official, of InfoNCE in stage 2, or of what `gauss` has instead
    latent_noise_std: float = 0.05  # official: noise on soft tokens, for recipes that sample them
    max_skipped: float = 0.05  # ours: share of steps, and always two, that may end without an update
    max_zero_std: float = (
        0.9  # ours: share of groups whose members may all earn the same; looked at each quarter
    )
    tensorboard: bool = False  # ours: curves of stages 1 and 2 for TensorBoard too, beside log.jsonl

    # The two-stage baseline of notebook 05; all ours.
    twostage_videos: int = (
        2000  # train videos whose windows its head learns from, at most; it bounds the cost
    )
    twostage_epochs: int = 50
    twostage_rate: float = 3e-3  # the highest of one cycle
    twostage_width: int = 128  # channels: about 175,000 weights beside the mini engine

    # The ladder of notebook 06; all ours: as much as a minute or so on one core allows.
    ladder_free_queries: int = 32  # test queries, evenly spread, whose latents are optimised freely
    ladder_free_steps: int = 14
    ladder_free_rate: float = 0.05
    ladder_soft: int = 4  # soft tokens of the heads that differ in something else
    ladder_few: int = 32  # train queries to learn by heart
    ladder_rows: tuple[int, ...] = (100, 600)  # train queries to learn from; most heads take the last
    ladder_held: int = 96  # queries of held-out train videos to be asked about
    ladder_batch: int = 32  # train queries of one step
    ladder_steps: int = 28  # of heads alone
    ladder_long: int = 72  # of those that go on for longer
    ladder_policy_steps: int = 8  # of heads and policy together, and of heads; 0: left out
    ladder_rate: float = 3e-3  # of heads
    ladder_policy_rate: float = 1e-3  # of all weights of the policy

    def data_dir(self, dataset: str) -> Path:
        """Where the corpus, videos and vectors of `dataset` lie: no seed or variant changes them."""
        return self.run_root() / dataset

    def runs(self, dataset: str) -> Path:
        """Where this seed and variant keep what they compute for `dataset`."""
        home = self.data_dir(dataset) / f"seed-{self.seed}"
        return home / "variants" / self.variant if self.variant else home

    def run_root(self) -> Path:
        """Where this profile keeps all that it computes."""
        return ROOT / "runs" / self.name

    def results(self) -> Path:
        """Where this profile's numbers, tables and figures go."""
        return ROOT / "results" / self.name

    def with_overrides(self, variant: str, **knobs) -> "Profile":
        """The same with other knobs; what it computes lies in variants/<variant>."""
        variant = "/".join(filter(None, (self.variant, variant)))
        return dataclasses.replace(self, variant=variant, **knobs)

    def digest(self) -> str:
        """Twelve hex digits that change when a knob changes that a result depends on.

        A knob with its default value counts as if it did not exist, so a new knob changes no digest.
        """
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        knobs = {name: value for name, value in dataclasses.asdict(self).items() if value != fields[name]}
        text = json.dumps({k: v for k, v in knobs.items() if k not in NO_RESULT}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load(name: str, seed: int | None = None) -> Profile:
    """The profile called `name`, or read from `name` if that is a path that ends in .yaml.

    >>> load("mini").max_frames
    64
    """
    path = Path(name) if name.endswith(".yaml") else PACKAGE / "profiles" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in (PACKAGE / "profiles").glob("*.yaml")))
        raise InputError(f"{path}: no such profile; there are {known}")
    try:
        knobs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as yaml: {' '.join(str(error).split())}") from error
    if not isinstance(knobs, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    knobs["name"] = path.stem
    if seed is not None:
        knobs["seed"] = seed
    profile = parse(Profile, knobs, str(path))
    for dataset in profile.datasets:
        check_dataset(dataset, str(path))
    if not 0 <= profile.sft_warmup < 1:
        raise InputError(f"{path}: sft_warmup: {profile.sft_warmup} is no share of the steps; take 0 to 0.99")
    if min(profile.infonce_prefixes, default=1) < 1:
        raise InputError(
            f"{path}: infonce_prefixes: a query has at least one soft token; take numbers from 1 up"
        )
    return profile


def check_dataset(dataset: str, where: str = "DATASETS") -> str:
    """`dataset` itself, if there is such a data set."""
    if dataset not in DATASETS:
        raise InputError(f"{where}: unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    return dataset


def parse(kind, knobs: dict, where: str):
    """A `kind` made of `knobs`; an unknown, missing or wrongly typed key is an error that names file and key."""
    fields, hints = _fields(kind)
    for key in knobs:
        if key not in fields:
            raise InputError(
                f"{where}: no such knob {key!r}; remove it or look at {kind.__module__}.{kind.__name__}"
            )
    values = {key: _typed(value, hints[key], f"{where}: {key}") for key, value in knobs.items()}
    needed = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in knobs
    ]
    if needed:
        raise InputError(f"{where}: {needed[0]} is missing; add it")
    return kind(**values)


@functools.cache
def _fields(kind):
    """({name: field}, {name: type}) of a dataclass."""
    return {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)


def _typed(value, hint, where):
    """`value` if it has the type `hint`, with yaml's lists as tuples, whole numbers as floats, mappings as records."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a mapping, found {value!r}")
        return parse(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list, found {value!r}")
        kinds = typing.get_args(hint)
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            raise InputError(f"{where}: expected {len(kinds)} values, found {value!r:.60}")
        return tuple(_typed(item, kinds[0], where) for item in value)
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            known = ", ".join(map(repr, typing.get_args(hint)))
            raise InputError(f"{where}: {value!r} is not supported; there are {known}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: True is no int here, and yaml reads 1e-6 as text
        raise InputError(f"{where}: expected {hint.__name__}, found {value!r} ({type(value).__name__})")
    return value
