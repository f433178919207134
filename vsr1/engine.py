"""The frozen video search engine: texts, videos and soft-token queries to unit vectors, and a FAISS index over them.

The recipe is Qwen3-VL-Embedding's: a chat prompt with the instruction, the state of the last position after the final
norm, unit length (METHOD.md 3.3). The same code loads Qwen3-VL-Embedding-2B and the mini engines.
"""

import csv
import json
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from transformers import Qwen3VLModel

from vsr1 import corpus, frames, large, qwen, stages
from vsr1.params import InputError

HELD = 512 * 2**20  # ours: a shard of the mini world, six films of 64 frames in 480p


class Engine:
    """A loaded search engine. Vectors are (rows, D) float32 of length one."""

    def __init__(self, profile, model: Qwen3VLModel, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.instruction, self.limit = _sentence(profile.instruction), profile.query_tokens
        self.max_pixels, self.batch_tokens = profile.frame_pixels, profile.batch_tokens
        self.width = self.model.config.text_config.hidden_size
        self.cut = 0  # query texts shortened to the limit so far
        self.portions = qwen.Portions("batch_tokens")

    def query_prompt(self, text: str) -> tuple[qwen.Prompt, int]:
        """The prompt of a query and the position right after its last word, where soft tokens go.

        Between the two stands the template's tail. That it is what we think is verified against the tokenizer each
        time: soft tokens in the wrong place would be no error anybody sees.
        """
        ids = self._ids(qwen.chat(self.tokenizer, self.instruction, text.strip()))
        closing = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        end = len(ids) - 1 - ids[::-1].index(closing)
        tail = self.tokenizer.decode(ids[end:])
        if tail != "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>" or len(ids) - end != 6:
            raise InputError(
                f"{self.name}: unexpected end of the query template {tail!r}; this engine is not supported"
            )
        if len(ids) > self.limit:  # shorten the text, never the tail
            self.cut += 1
            ids = ids[: self.limit - 6] + ids[end:]
            end = self.limit - 6
        return qwen.Prompt(ids), end

    def video_prompt(self, clip: frames.Clip) -> qwen.Prompt:
        """The prompt of a video: the same instruction, the frames with the seconds they were seen at."""
        config = self.model.config.vision_config
        video = qwen.Video(*qwen.patchify(clip.frames, config, self.max_pixels))
        per_pair = video.grid[1] * video.grid[2] // config.spatial_merge_size**2
        text = qwen.chat(self.tokenizer, self.instruction, qwen.video_text(clip.seen_at, per_pair))
        return qwen.Prompt(self._ids(text), video)

    def _ids(self, text):
        """Token ids of a rendered prompt, with the end-of-text token whose state is the vector."""
        end = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [end]
        own = self.tokenizer(text)["input_ids"]
        assert own[-1] != end or own == ids, "the tokenizer's own ending differs from ours"
        return ids

    def pool(self, batch: dict) -> torch.Tensor:
        """(B, D) float32 unit vectors of a left-padded batch: the last position is the end-of-text token."""
        states = self.model(**batch).last_hidden_state[:, -1]
        return torch.nn.functional.normalize(states.float(), dim=-1)

    def text_batch(self, texts: list[str], soft: torch.Tensor | None = None) -> dict:
        """A batch of queries; `soft` (B, N, D), if given, stands right after each query's last word."""
        prompts = [self.query_prompt(text) for text in texts]
        batch = qwen.collate([prompt for prompt, _ in prompts], self.model, self.tokenizer.pad_token_id)
        if soft is None:
            return batch
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows, count = soft.shape[:2]
        words = self.model.get_input_embeddings()(ids)  # (B, L, D)
        # Every row is padded on the left, so its tail of six, and the place before it, are the same columns.
        embeds = torch.cat([words[:, :-6], soft.to(words), words[:, -6:]], dim=1)
        mask = torch.cat([mask[:, :-6], mask.new_ones(rows, count), mask[:, -6:]], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions.expand(3, -1, -1)}

    @torch.no_grad()
    def embed_texts(
        self, texts: list[str], soft: torch.Tensor | None = None, what="embed queries"
    ) -> np.ndarray:
        """(Q, D) vectors of queries, each with its own soft tokens (Q, N, D) if given."""
        lengths = [len(self.tokenizer(text)["input_ids"]) + 16 for text in texts]
        vecs = np.zeros((len(texts), self.width), np.float32)
        for rows in stages.progress(qwen.batches(lengths, self.batch_tokens), what):
            batch = self.text_batch([texts[row] for row in rows], None if soft is None else soft[rows])
            vecs[rows] = self.pool(batch).cpu().numpy()
        return vecs

    def embed_clips(self, clips: Iterable[frames.Clip]) -> np.ndarray:
        """(V, D) vectors of videos. Of a stream about `HELD` bytes of frames are taken at once: decoders read on while
        the engine is at them."""
        vecs, held = [], []
        for clip in clips:
            held.append(clip)
            if sum(one.frames.nbytes for one in held) >= HELD:
                vecs.append(self._embed_held(held))
                held = []
        return np.concatenate([*vecs, self._embed_held(held)])

    @torch.no_grad()
    def _embed_held(self, clips):
        prompts = [self.video_prompt(clip) for clip in clips]
        vecs = np.zeros((len(clips), self.width), np.float32)

        def embed(rows):
            batch = qwen.collate([prompts[row] for row in rows], self.model, self.tokenizer.pad_token_id)
            vecs[rows] = self.pool(batch).cpu().numpy()

        for rows in qwen.batches([len(prompt.ids) for prompt in prompts], self.batch_tokens):
            self.portions.run(embed, rows)
        return vecs


def load(profile, which: str = "engine") -> Engine:
    """The engine that a profile names under `engine` or `engine_large`, frozen."""
    torch.set_num_threads(profile.threads)
    name, device = getattr(profile, which), qwen.pick_device(profile.device)
    model, tokenizer = qwen.load(Qwen3VLModel, name, profile.dtype, device)
    return Engine(profile, model.requires_grad_(False), tokenizer, name)


def _sentence(text):
    """The instruction, with a full stop where it ends without punctuation (official)."""
    return text if unicodedata.category(text.rstrip()[-1]).startswith("P") else text.rstrip() + "."


# --- the index -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """What an engine made of one split: unit vectors and the ids of their rows."""

    video_ids: list[str]
    video_vecs: np.ndarray  # (V, D)
    query_ids: list[int]
    query_vecs: np.ndarray  # (Q, D)


def build_index(video_vecs: np.ndarray) -> faiss.Index:
    """An exact inner-product index over (V, D) unit vectors, on the CPU: the form that is saved (else `large`)."""
    index = faiss.IndexFlatIP(video_vecs.shape[1])
    index.add(np.ascontiguousarray(video_vecs, np.float32))
    return index


def to_gpu(index: faiss.Index) -> faiss.Index:
    """The index on the GPUs, if this build of faiss and this machine have any; else the index itself."""
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        return faiss.index_cpu_to_all_gpus(index)
    return index


def search(index: faiss.Index, query_vecs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows), both (Q, k), best first; equal scores in row order: every machine shows the same video."""
    scores, rows = index.search(np.ascontiguousarray(query_vecs, np.float32), min(k, index.ntotal))
    order = np.lexsort((rows, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def load_vectors(folder: Path) -> Vectors:
    """The vectors that `embed_corpus` left in a folder; those of a large gallery's videos are mapped."""
    ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    mode = None if len(ids["videos"]) < large.FROM else "r"
    video_vecs = np.load(folder / "video_vecs.npy", mmap_mode=mode)
    return Vectors(ids["videos"], video_vecs, ids["queries"], np.load(folder / "query_vecs.npy"))


# --- stages --------------------------------------------------------------------------------------------------------

SHARD = 64  # videos between two saves: what a kill can cost


def embed_corpus(profile, dataset: str, split: str, which: str = "engine") -> Path:
    """Vectors and index of one split, in runs/<profile>/<dataset>/embed/<which>/<split>/.

    Videos that cannot be read are named with the reason in `skipped.csv` there; they have no vector, and their queries
    stay in every denominator as failures. From `large.FROM` videos on the index is that of `large`, and `notes.json`
    says what it finds of an exact search; ranks in evaluation are exact at any size.
    """
    home = profile.runs(dataset)
    annotations = home / "corpus" / f"{split}.jsonl"
    name = getattr(profile, which)
    inputs = {
        "annotations": stages.digest(annotations),
        "videos": stages.stamp(home / "videos").get("key"),
        "model": qwen.version(name),
        "code": stages.code("engine", "qwen", "frames"),
        "knobs": [profile.video_fps, profile.max_frames, profile.frame_pixels, profile.instruction],
        "limits": [profile.query_tokens, profile.dtype],
    }
    work = lambda folder: _embed(profile, dataset, split, which, folder)  # noqa: E731
    return stages.run(home / "embed" / which / split, inputs, work, together=True)


def _embed(profile, dataset, split, which, folder):
    """Fill `folder` with what `embed_corpus` promises, shard by shard; several processes share the shards."""
    home, mates = profile.runs(dataset), stages.team()
    queries = corpus.read_fig(home / "corpus" / f"{split}.jsonl")
    videos = corpus.find_videos(home / "videos", corpus.gallery(queries))
    engine = load(profile, which)
    started = time.time()
    shards = [videos[i : i + SHARD] for i in range(0, len(videos), SHARD)]
    own = range(mates.process_index, len(shards), mates.num_processes)
    todo = [shard for shard in own if not (folder / f"shard-{shard:05}.npz").exists()]
    # A video without a file is read under the name it should have: the reader says what is wrong with it.
    paths = [video.path or home / "videos" / f"{video.id}.mp4" for shard in todo for video in shards[shard]]
    clips = frames.read_many(paths, frames.Reader(profile.video_fps, profile.max_frames), profile.decoders)
    clips = iter(stages.progress(clips, f"embed {dataset} {split}", len(paths)))
    for shard in todo:
        _embed_shard(engine, shards[shard], clips, folder / f"shard-{shard:05}.npz")
    mates.wait_for_everyone()
    if not mates.is_main_process:
        return
    spent = time.time() - started
    made = [folder / f"shard-{shard:05}.npz" for shard in range(len(shards))]
    video_ids = [str(name) for part in _each(made, "ids") for name in part]
    if not video_ids:
        raise InputError(f"{home / 'videos'}: not one of {len(videos)} videos could be read; see {folder}")
    shape, at = (len(video_ids), engine.width), 0
    video_vecs = np.lib.format.open_memmap(folder / "video_vecs.npy", "w+", np.float32, shape)
    for vecs in _each(made, "vecs"):
        video_vecs[at : at + len(vecs)] = vecs
        at += len(vecs)
    query_vecs = engine.embed_texts([query.text for query in queries])
    np.save(folder / "query_vecs.npy", query_vecs)
    if len(video_ids) < large.FROM:
        faiss.write_index(build_index(video_vecs), str(folder / "index.faiss"))
        found = {}
    else:
        found = {"index": large.build(folder / "index.faiss", lambda: [video_vecs], query_vecs)}
    with open(folder / "skipped.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", "split", "problem")])
        csv.writer(file).writerows((name, split, why) for bad in _each(made, "bad") for name, why in bad)
    stages.write_json(folder / "ids.json", {"videos": video_ids, "queries": [query.id for query in queries]})
    notes = {"videos_per_second": round(len(paths) / spent, 2) if paths else None}
    notes |= {"texts_cut": engine.cut, "skipped": len(videos) - len(video_ids)}
    stages.write_json(folder / "notes.json", notes | qwen.facts(engine.model) | found)
    for part in folder.glob("shard-*"):
        part.unlink()


def _embed_shard(engine, videos, clips, path):
    """The file of a shard: ids and vectors of its readable videos, and what is wrong with the others.

    clips  an iterator of which these videos are next
    """
    good, bad = [], []

    def readable():
        for video, clip in zip(videos, clips, strict=False):
            if clip.problem is None:
                good.append(video.id)
                yield clip
            else:
                bad.append((video.id, clip.problem))

    vecs = engine.embed_clips(readable())
    parts = {"ids": good, "vecs": vecs, "bad": np.array(bad, dtype=str).reshape(-1, 2)}
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **parts)
    path.with_suffix(".tmp").rename(path)


def _each(paths, name):
    """The array `name` of each .npz, one file after the other: thousands may not be open at once."""
    for path in paths:
        with np.load(path) as part:
            yield part[name]
