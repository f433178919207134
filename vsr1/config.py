"""Profiles: every knob of a run, typed and checked, in one frozen record read from `vsr1/profiles/<name>.yaml`.

Quoted words are the paper's or its project page's. "official" is the authors' code. "ours" marks a choice of this
project, with its reason in DEVIATIONS.md.
"""

import dataclasses
import functools
import hashlib
import json
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent  # the clone: profiles name their files relative to it
PROFILES = PACKAGE / "profiles"
REVISIONS = "revisions.json"  # in the clone, as `make clean` of runs/ must not move a model to another commit
# Knobs that no result of a data set depends on, but for the rounding of sums: they enter no key and no digest.
NO_RESULT = set(
    "name variant part datasets parallel_steps decode_workers threads device save_minutes "
    "decode_timeout keep_frames".split()
)

Dataset = Literal["charades", "didemo", "activitynet"]
DATASETS = typing.get_args(Dataset)
ABLATED = "didemo"  # the data set of the paper's ablation of stages and rewards (T2)
# Components of the reward of stage 2.
Reward = Literal["verification", "format", "refine_token", "grounding", "retrieval"]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class InputError(ValueError):
    """Something a person gave us is wrong; the message is one line: what, where (file, line, key), what to do."""


@dataclass(frozen=True)
class WorldConfig:
    """Size of the rendered corpora; absent where the videos are real. All ours."""

    train_videos: Count
    test_videos: Count
    foundation_videos: Count  # per data set; for `make foundation` only
    # Test videos that queries ask for, the others are distractors; None: all.
    queried_videos: Count | None = None
    size: Annotated[int, Field(ge=16, multiple_of=2)] = 128  # pixels, width and height of the MP4 files
    fps: Count = 8
    seed: CountOrZero = 2607  # of the world, not of the experiment: every seed searches the same corpora


@dataclass(frozen=True)
class ArchiveConfig:
    """Sizes of the study of archives: a world of its own, beside the paper's corpora. All ours."""

    train_archives: Count  # of each world; every camera has as many
    test_archives: Count
    families: Annotated[int, Field(ge=2)] = 12  # of one archive; films of one differ in their colours alone
    family_size: Annotated[int, Field(ge=2, le=25)] = 6
    train_queries: Count = 2  # wordings of one film
    rows: Count = 4000  # rows of each training, at most
    test_queries: Count | None = None  # of each cell, spread evenly, that systems are run on; None: all


@dataclass(frozen=True)
class StudyConfig:
    """Amounts of the studies beside the paper's tables. All ours."""

    probe_steps: Count = 600  # training steps of the attribute probe
    # Videos of the galleries that `make foundation` searches; the first hold what queries ask for.
    arena_videos: tuple[Count, ...] = (163, 320, 640, 1000, 1600, 2400)
    sample_queries: Count = 96  # test queries, evenly spread, that refinements are compared on


@dataclass(frozen=True)
class TwoStageConfig:
    """The two-stage baseline of notebook 05: a span head on the frozen engine's vectors of windows. All ours."""

    videos: Count = 2000  # train videos whose windows the head learns from, at most; it bounds the cost
    epochs: Count = 50
    lr: Positive = 3e-3  # the highest of one cycle
    width: Count = 128  # channels: about 150,000 weights beside the mini engine


@dataclass(frozen=True)
class BoundConfig:
    """The upper bound on soft tokens of notebook 06c: as much as a minute or so on one core allows. All ours."""

    free_queries: Count = 32  # test queries, evenly spread, whose soft tokens are optimised freely
    free_steps: CountOrZero = 14
    free_lr: Positive = 0.05
    n_soft: Count = 4  # soft tokens of the heads that differ in something else
    overfit_queries: Count = 32  # train queries to learn by heart
    train_queries: Annotated[tuple[Count, ...], Field(min_length=1)] = (100, 600)  # most heads: the last
    val_queries: Count = 96  # queries of held-out train videos
    batch: Count = 32  # train queries of one step
    steps: Count = 28  # of heads alone
    long_steps: Count = 72  # of the heads that are trained for longer
    policy_steps: CountOrZero = 8  # of heads and policy together, and of heads beside them; 0: left out
    head_lr: Positive = 3e-3
    policy_lr: Positive = 1e-3  # of all weights of the policy


@dataclass(frozen=True)
class Profile:
    """One way to run everything. A knob without a default must stand in the yaml file."""

    name: str
    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)]
    engine: Text  # "Qwen3-VL-Embedding-2B": folder relative to the clone, or hub name
    engine_large: Text  # "Qwen3-VL-Embedding-8B", for table A2
    policy: Text  # "Qwen3-VL-2B-Instruct"
    variant: str = ""  # not a knob: set by `with_overrides`, part of the path of what it computes
    part: str = ""  # not a knob: set by `load` where seed or data sets are not the profile's own
    data_source: str = "vsr1.data.real_datasets"  # the module that provides corpus, videos and replies
    world: WorldConfig | None = None  # None: real annotations and videos under `data`
    data: Text = "data"  # <data>/<dataset>/{annotations,videos}/ for real data
    seed: CountOrZero = 42  # official; `make paper SEED=...` replaces it

    # What the machine does at once. All ours.
    threads: Count = 1  # of torch and OpenMP; two can stall on a shared machine, a GPU machine wants more
    parallel_steps: Count = 1  # steps of a run at once, a process each; more would share one GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the first GPU where there is one, else the CPU
    dtype: Literal["float32", "bfloat16"] = "float32"  # "bf16" at paper scale
    decode_workers: Count = 1  # processes that decode ahead of the engine
    decode_timeout: Positive = 30.0  # seconds for one video; a second attempt gets four times as many
    keep_frames: bool = (
        False  # whether frames stay on disk as models see them; 64 of 200,704 pixels are 39 MB
    )

    # The loop.
    max_turns: Count = 3  # T of a run; it holds all shorter ones
    # T of the numbers: "T = 2" by a reading of the full text, and in the official script.
    headline_turns: Count = 2
    # "top1": the paper. "skip_rejected", ours: no rejected video again.
    display_rule: Literal["top1", "skip_rejected"] = "top1"
    eval_batch: Count = 64  # ours: queries of one batch; their KV caches are held, and a kill costs as many
    max_new_tokens: Count = 1024  # official: tokens of the longest reply

    # What engine and policy read.
    video_fps: Positive = 1.0  # "1 fps"
    # Official: at most 64 frames, spread over the whole video. They are read in pairs.
    max_frames: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    # Official: most pixels of a frame; its sides are multiples of patch x merge, 32 pixels.
    max_frame_pixels: Annotated[int, Field(ge=1024)] = 200704
    # What the engine reads otherwise than the policy. "official": as qwen-vl-utils treats a list of frames.
    # Most pixels of a frame; official: 786432. None: max_frame_pixels.
    engine_max_pixels: Annotated[int, Field(ge=1024)] | None = None
    engine_min_pixels: CountOrZero = 0  # official: 131072; smaller frames are enlarged
    engine_video_pixels: Count | None = None  # official: 7864320, of one frame of each pair; None: any
    # Official: 64; frames become multiples of it first. 0: they do not.
    engine_frame_multiple: CountOrZero = 0
    # Official: released weights search the vectors that their soft tokens were trained against, once these are fetched.
    search_released_vectors: bool = True
    # "official": stamps as if there were two frames a second, whatever there are.
    engine_clock: Literal["true", "official"] = "true"
    instruction: str = "Represent the user's input"  # official; without punctuation it gets a full stop
    max_query_tokens: Count = 128  # official: the engine's limit; longer query texts are cut and counted
    batch_tokens: Count = 4096  # ours: padded tokens that a batch of the engine may hold

    # Soft query refinement.
    n_soft: Count = 8  # "N = 8 soft query tokens"
    # "zero", official: the last layer of the projector starts at zero. "scaled" is ours, see `SoftHeads`.
    refine_init: Literal["zero", "default", "scaled"] = "zero"
    carry_blocks: Count = 1  # official; "q_{t+1} = [q_t, soft_t]" is as many as there were turns in training
    neutral_tokens: Count = 8  # ours: inserted where the paper's "N = 8" soft tokens will stand

    # Evaluation.
    vr_ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 5, 10, 100)  # "R@1/5/10/100"
    bootstrap_samples: Count = 2000  # ours: resamples behind every 95 % interval

    # Stage 1, supervised fine-tuning (SFT).
    sft_data: str | None = None  # the released train_oneturn.json; {dataset} in the path stands for its name
    teacher: str | None = None  # writes one where there is none; official: "Qwen3-VL-30B-A3B-Thinking"
    sft_rows: Count = 1000  # official: rows whose first search is right; as many where it is wrong
    sft_negatives: Count | None = 24  # official: wrong videos of InfoNCE; None: all of the gallery
    sft_text_only_rows: CountOrZero = 0  # ours: further rows, with videos in words: heads need many
    sft_epochs: Positive = 1.0  # official
    sft_batch: Count = 1  # rows of one forward; times `sft_accumulate`: the 4 of a public log
    sft_accumulate: Count = 4  # official: batches of one optimizer step
    sft_lr: PositiveOrZero = 2e-5  # official, of the language model
    sft_head_lr: PositiveOrZero = 5e-5  # official, of the soft-query heads
    sft_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0  # official; share of the steps with rising rates
    # Ours: InfoNCE is the mean over queries with the first so many soft tokens, and with all; (): with all (official).
    infonce_prefixes: tuple[Count, ...] = ()
    # Ours: "rejected" lets soft tokens learn only from rows that show a wrong video, where alone they are used.
    infonce_rows: Literal["all", "rejected"] = "all"
    infonce_weight: PositiveOrZero = 0.3  # official: weight of InfoNCE beside the language-model loss
    infonce_temperature: Positive = 0.1  # official: its temperature
    ambiguity_filter: PositiveOrZero | None = None  # official: 0.0005; None: plain InfoNCE
    lora_rank: CountOrZero = 0  # ours, of adapters in both stages; 0: full fine-tuning (official)

    # Held-out train videos. All ours.
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of train videos; nothing learns from them
    num_val_prompts: Count = 48  # prompts on them whose reward stage 2 logs

    # Stage 2, GRPO.
    grpo_group: Annotated[int, Field(ge=2)] = 8  # "G = 8": episodes from one prompt
    grpo_prompts_per_step: Count = 4  # prompts of one optimizer step; official: 32 episodes
    grpo_rollout_batch: Count = 4  # ours: prompts rolled out, and learned from, at once; costs memory
    grpo_micro_batch: Count | None = None  # ours: replies that one forward learns from; None: all
    grpo_steps: Count | None = None  # None: one epoch (official)
    # Ours: take only queries that stage 1 did not learn from. On others its soft tokens know the right video by heart.
    grpo_exclude_sft_queries: bool = False
    # An advantage is over the rewards' spread in its group (official), or in all of the step: TRL's scale_rewards.
    scale_rewards: Literal["group", "batch"] = "group"
    # "gdpo": each component of the reward is divided by its own spread in the group before they are added up
    # (arXiv 2601.05242), and the sum by its spread in the step.
    grpo_advantages: Literal["grpo", "gdpo"] = "grpo"
    # Ours, a control: each turn gets the advantage of another one of its group.
    shuffle_advantages: bool = False
    grpo_lr: PositiveOrZero = 5e-7  # official, of the language model
    grpo_head_lr: PositiveOrZero = 5e-5  # official for stage 1, of the heads; frozen heads have none
    grpo_schedule: Literal["constant", "linear"] = "constant"  # official; "linear" falls to zero
    grpo_beta: PositiveOrZero = 0.01  # official: weight of the KL to the policy of stage 1
    grpo_clip: Annotated[float, Field(gt=0, lt=1)] = 0.2  # official
    grpo_negatives: Count = 24  # official: wrong videos of the retrieval reward
    grpo_infonce_weight: PositiveOrZero = 1.0  # official, of InfoNCE in stage 2
    rollout_temperature: Positive = 1.0  # official: of sampled replies
    # R_ret is "exp(-L_ret)"; "delta", official: less that of the original query.
    retrieval_reward: Literal["exp", "delta"] = "exp"
    disabled_rewards: tuple[Reward, ...] = ()  # ours: components that count nothing
    latent_noise_std: Positive = 0.05  # official: noise on soft tokens, for variants that sample them
    max_skipped: Share = 0.05  # ours: share of steps, and always two, that may end without an update
    max_zero_std: Share = 0.9  # ours: share of groups, per quarter of a run, that may earn all the same
    save_minutes: PositiveOrZero = 10.0  # ours: between saved states, what a kill costs; 0: every step

    archives: ArchiveConfig | None = None  # the study of docs/archives.md; None: not in this profile

    # Studies beside the paper's tables.
    studies: StudyConfig = StudyConfig()
    two_stage: TwoStageConfig = TwoStageConfig()
    soft_token_bound: BoundConfig = BoundConfig()

    def data_dir(self, dataset: str) -> Path:
        """Return where the corpus, videos and vectors of `dataset` lie: no seed or variant changes them."""
        return self.run_root() / dataset

    def runs(self, dataset: str) -> Path:
        """Return where this seed and variant keep what they compute for `dataset`."""
        home = self.data_dir(dataset) / f"seed-{self.seed}"
        return home / "variants" / self.variant if self.variant else home

    def run_root(self) -> Path:
        """Return where this profile keeps all that it computes."""
        return ROOT / "runs" / self.name

    def results(self) -> Path:
        """Return where numbers, tables and figures go; those of a part of a run never touch the committed ones."""
        return self.run_root() / f"results-{self.part}" if self.part else ROOT / "results" / self.name

    def with_overrides(self, variant: str, **knobs) -> "Profile":
        """Return the profile with other knobs, whose results lie in variants/<variant>."""
        variant = "/".join(filter(None, (self.variant, variant)))
        return dataclasses.replace(self, variant=variant, **knobs)

    def digest(self) -> str:
        """Hash the knobs that a result depends on to twelve hex digits.

        A knob with its default value counts as if it did not exist, so a new knob changes no digest. A model that is a
        folder here counts by its weights: it may be trained again under its name.
        """
        knobs = {name: value for name, value in _set_knobs(self).items() if name not in NO_RESULT}
        for role in ("engine", "engine_large", "policy"):
            files = sorted((ROOT / knobs[role]).glob("*.safetensors"))
            knobs[role] = [knobs[role], *(_weights_digest(file, file.stat().st_mtime_ns) for file in files)]
        return hashlib.sha256(json.dumps(knobs, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _weights_digest(file, mtime):
    """Hash a file of weights; `mtime` only keeps one process from hashing it twice."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _set_knobs(config):
    """Return {name: value} of the knobs of a record that differ from their defaults; records are dictionaries."""
    knobs = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            knobs[field.name] = _set_knobs(value) if dataclasses.is_dataclass(value) else value
    return knobs


def revisions() -> dict[str, str]:
    """Return {hub name: the commit that it stands for in this clone}; empty before the first was fetched."""
    path = ROOT / REVISIONS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load(name: str, seed: int | None = None, datasets: typing.Sequence[str] = ()) -> Profile:
    """Read the profile called `name`, or the file `name` if that is a path that ends in .yaml.

    seed, datasets  replace the profile's own; results then lie below runs/, beside no committed ones

    >>> load("mini").max_frames
    64
    >>> load("mini", 7, ["charades"]).results().relative_to(ROOT).as_posix()
    'runs/mini/results-charades-seed7'
    """
    _check_clone()
    path = _profile_path(name)
    try:
        knobs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not readable as yaml: {' '.join(str(error).split())}") from error
    if not isinstance(knobs, dict):
        raise InputError(f"{path}: expected `key: value` lines")
    profile = parse(Profile, knobs | {"name": path.stem}, str(path))
    return _part_of(profile, seed, [check_dataset(dataset) for dataset in datasets])


def _check_clone():
    """Raise InputError where the package is not in a clone, or in another one than the folder of work."""
    if not (PACKAGE.parent / "notebooks").is_dir():
        raise InputError(f"{PACKAGE}: installed without its clone; clone the repository and run this in it")
    here = Path.cwd()
    for clone in (here, *here.parents):
        other = clone / "vsr1" / "config.py"
        if other.exists() and not other.samefile(__file__):
            raise InputError(f"{here} is in one clone, {PACKAGE} in another; start this in {PACKAGE.parent}")


def _profile_path(name):
    path = Path(name) if name.endswith(".yaml") else PROFILES / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise InputError(f"{path}: no such profile; there are {names}")
    shipped = PROFILES / path.name
    if shipped.exists() and not path.samefile(shipped):
        raise InputError(f"{path}: its results would replace those of vsr1's own {path.stem}; rename it")
    return path


def _part_of(profile, seed, datasets):
    """Return the profile with this seed and these data sets, if there are any; `part` says how it differs."""
    part = []
    if set(datasets) in (set(), set(profile.datasets)):
        datasets = profile.datasets
    else:
        datasets = tuple(name for name in DATASETS if name in datasets)
        part += datasets
    if seed not in (None, profile.seed):
        part.append(f"seed{seed}")
        if seed < 0:
            raise InputError(f"SEED: {seed}: should be 0 or more")
        profile = dataclasses.replace(profile, seed=seed)
    return dataclasses.replace(profile, datasets=datasets, part="-".join(part))


def claim(path: Path) -> None:
    """Let the private profile file `path` own its folder below runs/, or raise InputError if another file does."""
    owner = ROOT / "runs" / path.stem / ".profile"
    if owner.exists():
        other = Path(owner.read_text(encoding="utf-8"))
        if other.exists():
            if not other.samefile(path):
                raise InputError(
                    f"{path}: runs/{path.stem} belongs to {other}; give one of them another name"
                )
            return
    owner.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: another process of the same run must not read half of it.
    scratch = owner.with_name(f".profile.{os.getpid()}")
    scratch.write_text(str(path.resolve()), encoding="utf-8")
    os.replace(scratch, owner)


def check_dataset(dataset: str, where: str = "DATASETS") -> str:
    """Return `dataset`, or raise InputError if there is no such data set."""
    if dataset not in DATASETS:
        raise InputError(f"{where}: unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    return dataset


def parse(kind, knobs: dict, where: str):
    """Return the record `kind` with the values in `knobs`, checked against its types and bounds.

    kind   a dataclass; lists become its tuples and whole numbers its floats, and no other type is converted
    where  file, and line or key, for the message

    Raises InputError of one line for the first unknown, missing, wrongly typed or impossible value.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(knobs, default=str), strict=True, extra="forbid")
    except pydantic.ValidationError as errors:
        # A misspelt knob may be reported as missing too: it comes first.
        error = min(errors.errors(), key=lambda error: error["type"] != "unexpected_keyword_argument")
        raise InputError(f"{where}: {_describe(error)}") from None


_adapter = functools.cache(pydantic.TypeAdapter)


def _describe(error):
    """Return what is wrong, and with which key, from an error of pydantic."""
    keys = [str(key) for key in error["loc"]]
    if error["type"] == "unexpected_keyword_argument":
        text = f"no such knob {keys.pop()!r}; remove it or look into vsr1/config.py"
    elif error["type"] == "missing":
        text = f"{keys.pop()} is missing; add it"
    else:
        text = f"{error['msg'].replace('Input should', 'should')}, found {error['input']!r:.60}"
    return ": ".join([*keys, text])
