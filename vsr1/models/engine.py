"""The frozen video search engine: texts, videos and queries with soft tokens to unit vectors.

The recipe is Qwen3-VL-Embedding's: a chat prompt with the instruction, the hidden state of the last position after the
final norm, unit length (docs/method.md section 3). The same code loads Qwen3-VL-Embedding-2B and the mini engines.
"""

import unicodedata
from collections.abc import Iterable

import numpy as np
import torch
from transformers import Qwen3VLModel

from vsr1 import cache
from vsr1.config import InputError
from vsr1.data import frame_sizes, video_reader
from vsr1.models import batching, decoding, inputs, loading

MAX_BATCH_BYTES = 512 * 2**20  # ours: a shard of the mini world, six films of 64 frames in 480p
FRAME_LIST_FPS = 2.0  # what qwen-vl-utils takes the rate of a list of frames to be
TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"  # of a query's prompt, behind its last word


class Engine:
    """A loaded search engine. Vectors are (rows, D) float32 of length one."""

    def __init__(self, profile, model: Qwen3VLModel, tokenizer, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.instruction, self.max_query_tokens = _sentence(profile.instruction), profile.max_query_tokens
        self.pixels, self.clock = pixel_rule(profile), profile.engine_clock
        self.batch_tokens = profile.batch_tokens
        self.width = self.model.config.text_config.hidden_size
        self.tail = self.tokenizer(TAIL, add_special_tokens=False)["input_ids"]
        self.num_truncated = 0  # query texts shortened to max_query_tokens so far
        self.splitter = batching.OOMSplitter("batch_tokens")

    def query_prompt(self, text: str) -> tuple[inputs.Prompt, int]:
        """Return the prompt of a query and the position right after its last word, where soft tokens go.

        A text over max_query_tokens loses its last words, never the template's tail. The tail is checked each time,
        since soft tokens in the wrong place would be no error that anybody sees.
        """
        ids = self._ids(inputs.chat(self.tokenizer, self.instruction, text.strip()))
        closing = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        end = len(ids) - 1 - ids[::-1].index(closing)
        if ids[end:] != self.tail:
            tail = self.tokenizer.decode(ids[end:])
            raise InputError(
                f"{self.name}: unexpected end of the query template {tail!r}; this engine is not supported"
            )
        if len(ids) > self.max_query_tokens:
            self.num_truncated += 1
            end = self.max_query_tokens - len(self.tail)
            ids = ids[:end] + self.tail
        return inputs.Prompt(ids), end

    def video_prompt(self, clip: video_reader.Clip) -> inputs.Prompt:
        """Return the prompt of a video: the same instruction, and the frames with the seconds they were seen at.

        By the official clock the seconds are those of frames that follow each other at FRAME_LIST_FPS.
        """
        config = self.model.config.vision_config
        video = inputs.Video(*inputs.patchify(clip.frames, config, self.pixels))
        by_number = np.arange(len(clip.frames)) / FRAME_LIST_FPS
        timestamps = by_number if self.clock == "official" else clip.timestamps
        text = inputs.video_text(timestamps, video.tokens_per_pair(config.spatial_merge_size))
        return inputs.Prompt(self._ids(inputs.chat(self.tokenizer, self.instruction, text)), video)

    def _ids(self, text):
        """Return the ids of a prompt, with the end-of-text token whose hidden state is the vector."""
        end = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [end]
        by_default = self.tokenizer(text)["input_ids"]
        assert by_default[-1] != end or by_default == ids, "the tokenizer's own ending differs from ours"
        return ids

    def pool(self, batch: dict) -> torch.Tensor:
        """Return (B, D) float32 unit vectors of a left-padded batch: the last position is the end-of-text token."""
        states = self.model(**batch).last_hidden_state[:, -1]
        return torch.nn.functional.normalize(states.float(), dim=-1)

    def text_vecs(self, texts: list[str], soft: torch.Tensor | None = None) -> torch.Tensor:
        """Return unit vectors (B, D) of queries, each with its own soft tokens (B, N, D) if given."""
        if soft is not None:
            return self.soft_vecs(self.read_queries(texts), soft)
        prompts = [self.query_prompt(text)[0] for text in texts]
        return self.pool(inputs.collate(prompts, self.model, self.tokenizer.pad_token_id))

    def read_queries(self, texts: list[str]) -> decoding.Context:
        """Read queries up to their last word, which soft tokens follow: what they say does not change what was read."""
        prompts = [inputs.Prompt(prompt.ids[:end]) for prompt, end in map(self.query_prompt, texts)]
        return decoding.prefill(self.model, prompts, self.tokenizer.pad_token_id)[0]

    def soft_vecs(self, queries: decoding.Context, soft: torch.Tensor) -> torch.Tensor:
        """Return unit vectors (B, D) of queries that were read, with soft tokens (B, N, D) after their last word."""
        embedding = self.model.get_input_embeddings()
        tail = embedding(torch.tensor(self.tail, device=soft.device)).expand(len(soft), -1, -1)
        _, _, states = decoding.extend(self.model, queries, torch.cat([soft.to(tail), tail], dim=1))
        return torch.nn.functional.normalize(states[:, -1].float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str], soft: torch.Tensor | None = None) -> np.ndarray:
        """Embed queries, each with its own soft tokens (Q, N, D) if given; return (Q, D)."""
        lengths = [len(self.tokenizer(text)["input_ids"]) + 16 for text in texts]
        vecs = np.zeros((len(texts), self.width), np.float32)
        for rows in cache.progress(batching.batches(lengths, self.batch_tokens), "embed queries"):
            part = self.text_vecs([texts[row] for row in rows], None if soft is None else soft[rows])
            vecs[rows] = part.cpu().numpy()
        return vecs

    def embed_clips(self, clips: Iterable[video_reader.Clip]) -> np.ndarray:
        """Embed a stream of videos and return (V, D); about MAX_BATCH_BYTES of frames wait for a forward pass at once.

        Decoders read on while the engine works.
        """
        vecs, waiting = [], []
        for clip in clips:
            waiting.append(clip)
            if sum(clip.frames.nbytes for clip in waiting) >= MAX_BATCH_BYTES:
                vecs.append(self._embed_together(waiting))
                waiting = []
        return np.concatenate([*vecs, self._embed_together(waiting)])

    @torch.no_grad()
    def _embed_together(self, clips):
        prompts = [self.video_prompt(clip) for clip in clips]
        vecs = np.zeros((len(clips), self.width), np.float32)

        def embed(rows):
            batch = inputs.collate([prompts[row] for row in rows], self.model, self.tokenizer.pad_token_id)
            vecs[rows] = self.pool(batch).cpu().numpy()

        for rows in batching.batches([len(prompt.ids) for prompt in prompts], self.batch_tokens):
            self.splitter.run(embed, rows)
        return vecs


def pixel_rule(profile) -> frame_sizes.PixelRule:
    """Return how large the engine of a profile sees frames."""
    most = profile.engine_max_pixels or profile.max_frame_pixels
    least, video = profile.engine_min_pixels, profile.engine_video_pixels
    return frame_sizes.PixelRule(most, least, video, profile.engine_frame_multiple)


def load(profile, which: str = "engine") -> Engine:
    """Load the frozen engine that a profile names under `engine` or `engine_large`."""
    torch.set_num_threads(profile.threads)
    name, device = getattr(profile, which), loading.pick_device(profile.device)
    model, tokenizer = loading.load(Qwen3VLModel, name, profile.dtype, device)
    return Engine(profile, model.requires_grad_(False), tokenizer, name)


def _sentence(text):
    """Return the instruction, with a full stop where it ends without punctuation (official)."""
    return text if unicodedata.category(text.rstrip()[-1]).startswith("P") else text.rstrip() + "."
