"""Share what the benchmarks of speed and memory need: models with random weights, on which neither depends."""

import concurrent.futures
import csv
import multiprocessing
import platform
import resource
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3VLConfig

from vsr1 import cache
from vsr1.mini import architecture
from vsr1.models import policy, search_index
from vsr1.report import provenance

QUERY = "A person in a red shirt opens a blue box in the kitchen."


def make_config(shapes: dict) -> Qwen3VLConfig:
    """Return the mini model's configuration with other shapes: {"text_config": {...}, "vision_config": {...}}."""
    fields = architecture.make_config(architecture.make_tokenizer()).to_dict()
    fields["text_config"].pop("layer_types", None)  # one a layer, of the mini model
    for side, sizes in shapes.items():
        fields[side] |= sizes
    return Qwen3VLConfig(**fields)


def random_vectors(videos: int, queries: int, width: int) -> search_index.Vectors:
    """Return random unit vectors of videos v0, v1, ... and of queries 0, 1, ..."""
    vecs = np.random.default_rng(0).standard_normal((videos + queries, width)).astype(np.float32)
    vecs /= np.linalg.norm(vecs, axis=1, keepdims=True)
    names = [f"v{number}" for number in range(videos)]
    return search_index.Vectors(names, vecs[:videos], list(range(queries)), vecs[videos:])


def same_clip(clip) -> types.SimpleNamespace:
    """Return a store of clips that holds the same one for every video."""
    return types.SimpleNamespace(get=lambda ids: [clip for _ in ids])


class ForcedRefinePolicy(policy.Policy):
    """A policy whose replies have the same length and all end in <REFINE>, and that can do without sharing."""

    sharing = True  # of the class: for a policy and its reference. False: a prompt is read once for each reply to it

    @classmethod
    def like(cls, other: policy.Policy) -> "ForcedRefinePolicy":
        """Return a policy with the parts of another, whose replies never end by themselves."""
        forced = cls(other.model, other.tokenizer, other.heads, other.settings, other.max_frame_pixels)
        forced.banned_tokens[forced.stop_token_id] = True
        return forced

    def prompt(self, *args):
        """Return a prompt as every policy does; without sharing, of a video that was never encoded."""
        if not ForcedRefinePolicy.sharing:
            self.video_cache.clear()
        return super().prompt(*args)

    def prefill(self, prompts, group=1):
        """Read prompts as every policy does; without sharing, each as often as it is replied to."""
        if ForcedRefinePolicy.sharing:
            return super().prefill(prompts, group)
        counts = group if isinstance(group, list) else [group] * len(prompts)
        repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        copies = [replace(prompt, video=replace(prompt.video)) for prompt in repeated]
        return super().prefill(copies, share_prefix=False)

    def _completion(self, generated, columns):
        generated.ids[-1] = self.refine_token_id  # random weights would not say it
        return super()._completion(generated, columns)


def alone(work, *args):
    """Return what `work(*args)` returns in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_gb() -> float:
    """Return the most memory that this process has taken so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def write(rows: list, folder: Path, name: str, **facts) -> None:
    """Write `name`.json with the rows, the machine and the versions, and `name`.csv with the rows alone."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {library: provenance.version(library) for library in ("transformers", "flash-attn")}
    facts = {"seconds": "of the processor", "device": "CPU only", "machine": provenance.device()} | facts
    facts |= {"threads": torch.get_num_threads(), "commit": provenance.commit(), "versions": versions}
    rows = [asdict(row) for row in rows]
    cache.write_json(folder / f"{name}.json", facts | {"peak_memory_gb": peak_gb(), "rows": rows})
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
