"""The search engine, each result computed a second way."""

import dataclasses
import json
import re

import faiss
import numpy as np
import pytest
import torch
from transformers import Qwen3VLModel

from vsr1 import cache, config
from vsr1.data import annotations, video_reader
from vsr1.mini import architecture, renderer
from vsr1.models import embedding, search_index
from vsr1.models import engine as engines

TEXTS = [
    "With a red ball, someone in white trousers and a pink shirt sits on a stool in the kitchen at night.",
    "A person waves.",
    "Someone jumps up and down by the lake with a blue dog.",
]


@pytest.fixture(scope="module")
def engine():
    """An engine of the mini shape with random weights: nothing here depends on what training taught."""
    torch.manual_seed(0)
    tokenizer = architecture.make_tokenizer()
    model = Qwen3VLModel(architecture.make_config(tokenizer)).eval()
    return engines.Engine(config.load("smoke"), model, tokenizer, "random")


def clip(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return video_reader.Clip(pixels, np.arange(count, dtype=float), float(count), None)


def test_a_query_vector_is_the_normalised_state_of_the_end_of_text_token(engine):
    """Against a plain, unpadded forward of ids written out by hand."""
    text = (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
        f"{TEXTS[1]}<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    ids = torch.tensor([engine.tokenizer(text)["input_ids"]])
    state = engine.model(
        input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1)
    ).last_hidden_state[0, -1]
    np.testing.assert_allclose(
        engine.embed_texts([f" {TEXTS[1]}\n"])[0], (state / state.norm()).detach(), atol=1e-5
    )


@torch.no_grad()
def test_the_pooled_state_is_behind_the_final_norm(engine):
    """Another library took the state before it: cosines of .93 with the official vectors, and no error."""
    states, text = [], engine.model.language_model
    hook = text.layers[-1].register_forward_hook(lambda _, __, out: states.append(out))
    engine.embed_texts([TEXTS[0]])
    hook.remove()
    before = states[0][0] if isinstance(states[0], tuple) else states[0]
    before = before[:, -1].double()
    scale = (before.pow(2).mean(dim=-1, keepdim=True) + text.norm.variance_epsilon).rsqrt()
    weight = text.norm.weight.double() * torch.linspace(
        0.5, 1.5, before.shape[1]
    )  # all ones would show nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.norm.weight, "data", weight.float())
        vec = torch.from_numpy(engine.embed_texts([TEXTS[0]]))
    normed = torch.nn.functional.normalize(before * scale * weight, dim=-1)
    torch.testing.assert_close(vec.double(), normed, atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(vec.double(), before).item() < 0.99


def test_videos_that_do_not_fit_together_are_embedded_in_halves_with_a_warning(engine, monkeypatch):
    clips, pool, sizes = [clip(4, seed) for seed in range(4)], engine.pool, []
    whole = engine.embed_clips(clips)

    def full(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(batch)

    small = engines.Engine(config.load("smoke"), engine.model, engine.tokenizer, "small")
    monkeypatch.setattr(small, "pool", full)
    with pytest.warns(UserWarning, match="4 at once do not fit in memory: half of batch_tokens from now on"):
        np.testing.assert_allclose(small.embed_clips(clips), whole, atol=1e-5)
    np.testing.assert_allclose(small.embed_clips(clips), whole, atol=1e-5)
    assert sizes == [4, 2, 2, 2, 2] and engine.splitter.parts == 1


def test_a_stream_of_videos_is_embedded_while_it_is_read(engine, monkeypatch):
    clips, pool, events = [clip(4, seed) for seed in range(3)], engine.pool, []
    whole = engine.embed_clips(clips)
    monkeypatch.setattr(engines, "MAX_BATCH_BYTES", 2 * clips[0].frames.nbytes)
    monkeypatch.setattr(engine, "pool", lambda batch: events.append("embedded") or pool(batch))
    stream = (events.append("read") or film for film in clips)
    np.testing.assert_allclose(engine.embed_clips(stream), whole, atol=1e-5)
    assert events == ["read", "read", "embedded", "read", "embedded"]


def test_texts_and_videos_give_the_same_vectors_in_a_batch_alone_and_in_another_order(engine):
    together = engine.embed_texts(TEXTS)
    for text, vec in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(engine.embed_texts([text])[0], vec, atol=1e-5)
    np.testing.assert_allclose(engine.embed_texts(TEXTS[::-1])[::-1], together, atol=1e-5)
    clips = [clip(4, 1), clip(10, 2), clip(2, 3)]
    videos = engine.embed_clips(clips)
    for film, vec in zip(clips, videos, strict=True):
        np.testing.assert_allclose(engine.embed_clips([film])[0], vec, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(videos, axis=1), 1, atol=1e-6)
    assert together.dtype == videos.dtype == np.float32


def test_by_the_official_clock_frames_follow_each_other_at_two_a_second(engine):
    """Whatever their true seconds are; a repeated last frame counts on."""
    official = dataclasses.replace(config.load("smoke"), engine_clock="official")
    other = engines.Engine(official, engine.model, engine.tokenizer, "official")
    still = dataclasses.replace(clip(6), timestamps=np.array([0.0, 2.0, 4.0, 6.0, 8.0, 8.0]))

    def stamps(reader):
        return re.findall("<([0-9.]+) seconds>", reader.tokenizer.decode(reader.video_prompt(still).ids))

    assert stamps(other) == ["0.2", "1.2", "2.2"] and stamps(engine) == ["1.0", "5.0", "8.0"]


def test_soft_tokens_stand_right_after_the_last_word_of_each_query(engine):
    """Soft tokens that are the embeddings of words equal those words written at the end of the text."""
    more = " in the kitchen"
    ids = engine.tokenizer(more)["input_ids"]
    soft = engine.model.get_input_embeddings().weight[torch.tensor(ids)].detach().expand(len(TEXTS), -1, -1)
    np.testing.assert_allclose(
        engine.embed_texts(TEXTS, soft), engine.embed_texts([text + more for text in TEXTS]), atol=1e-5
    )


def test_no_soft_tokens_are_exactly_the_plain_query_and_gradients_reach_soft_tokens(engine):
    np.testing.assert_allclose(
        engine.embed_texts(TEXTS, torch.zeros(3, 0, engine.width)), engine.embed_texts(TEXTS), atol=1e-6
    )
    soft = torch.zeros(3, 2, engine.width, requires_grad=True)
    engine.text_vecs(TEXTS, soft)[:, 0].sum().backward()
    assert soft.grad.abs().sum() > 0


def test_a_query_over_the_limit_loses_words_not_the_template(engine):
    small = engines.Engine(
        dataclasses.replace(config.load("smoke"), max_query_tokens=30),
        engine.model,
        engine.tokenizer,
        "small",
    )
    prompt, end = small.query_prompt(TEXTS[0] * 5)
    assert len(prompt.ids) == 30 and end == 24 and small.num_truncated == 1
    assert engine.tokenizer.decode(prompt.ids[24:]) == "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"


def test_a_template_that_ends_differently_is_refused(engine):
    tokenizer = architecture.make_tokenizer()
    tokenizer.chat_template = architecture.CHAT.replace("<|im_start|>assistant\n", "<|im_start|>assistant")
    other = engines.Engine(config.load("smoke"), engine.model, tokenizer, "other")
    with pytest.raises(config.InputError, match="unexpected end of the query template"):
        other.query_prompt("hello")


def test_embedding_a_corpus_names_the_broken_video_and_resumes_to_the_same_files(
    tmp_path, monkeypatch, engine
):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(engines, "load", lambda profile, which: engine)
    monkeypatch.setattr(embedding, "SHARD_SIZE", 2)
    profile = config.load("smoke")
    profile = dataclasses.replace(
        profile, world=dataclasses.replace(profile.world, train_videos=2, test_videos=5)
    )
    videos = renderer.render(profile, "charades")
    queries = annotations.read_fig(videos.parent / "corpus" / "test.jsonl")
    broken = annotations.gallery_ids(queries)[1]
    (videos / f"{broken}.mp4").write_bytes(b"not a film")
    (videos / f"{annotations.gallery_ids(queries)[3]}.mp4").unlink()
    folder = embedding.embed_corpus(profile, "charades", "test")
    vectors = search_index.load_vectors(folder)
    assert broken not in vectors.video_ids and len(vectors.video_ids) == 3
    assert vectors.query_ids == [query.id for query in queries]
    skipped = (folder / "skipped.csv").read_text().splitlines()
    assert len(skipped) == 3 and skipped[1].startswith(f"{broken},test,") and "No such file" in skipped[2]
    index = faiss.read_index(str(folder / "index.faiss"))
    assert index.ntotal == 3
    before = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".faiss", ".csv")
    }
    cache.write_json(folder / ".step.json", {"key": "of another engine"})

    embed, calls = engine.embed_clips, []

    def killed(clips):
        calls.append(clips)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(clips)

    monkeypatch.setattr(engine, "embed_clips", killed)
    with pytest.raises(KeyboardInterrupt):
        embedding.embed_corpus(profile, "charades", "test")
    monkeypatch.setattr(engine, "embed_clips", lambda clips: calls.append(clips) or embed(clips))
    again = embedding.embed_corpus(profile, "charades", "test")
    assert len(calls) == 2 + 2, "the finished shard must not be embedded again"
    assert {path.name: path.read_bytes() for path in again.iterdir() if path.name in before} == before
    assert json.loads((again / "notes.json").read_text())["skipped"] == 2

    monkeypatch.setattr(search_index, "LARGE", 3)  # the same gallery as a large one
    cache.write_json(folder / ".step.json", {"key": "of another engine"})
    mapped = search_index.load_vectors(embedding.embed_corpus(profile, "charades", "test"))
    assert isinstance(mapped.video_vecs, np.memmap)
    assert (folder / "video_vecs.npy").read_bytes() == before["video_vecs.npy"]
    index_notes = json.loads((folder / "notes.json").read_text())["index"]
    assert (index_notes["vectors"], index_notes["k"], index_notes["recall"]) == (3, 3, 1.0)
    assert isinstance(mapped.index, faiss.IndexIVF)
    for by_ivf, plain in zip(
        mapped.search(vectors.query_vecs, 3), vectors.search(vectors.query_vecs, 3), strict=True
    ):
        np.testing.assert_allclose(by_ivf, plain, atol=1e-6)


def test_embedding_makes_its_corpus_current_first(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(engines, "load", lambda profile, which: engine)
    profile = config.load("smoke")
    count = {"train_videos": 1, "test_videos": 1}
    profile = dataclasses.replace(profile, world=dataclasses.replace(profile.world, **count))
    vectors = search_index.load_vectors(embedding.embed_corpus(profile, "charades", "test"))
    queries = annotations.read_fig(profile.data_dir("charades") / "corpus" / "test.jsonl")
    assert vectors.video_ids == annotations.gallery_ids(queries)


def test_an_engine_that_is_not_there_is_one_clear_line():
    profile = dataclasses.replace(config.load("smoke"), engine="vsr1/models/no-such-engine")
    with pytest.raises(config.InputError, match="no-such-engine: the mini model is missing; restore it"):
        engines.load(profile)


def test_16_bit_weights_are_saved_and_load_as_the_same_engine(tmp_path, engine):
    engine.model.half().save_pretrained(tmp_path)
    engine.model.float()
    engine.tokenizer.save_pretrained(tmp_path)
    profile = dataclasses.replace(config.load("smoke"), engine=str(tmp_path))
    loaded = engines.load(profile)
    np.testing.assert_allclose(loaded.embed_texts(TEXTS), engine.embed_texts(TEXTS), atol=2e-3)
