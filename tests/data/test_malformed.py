"""What people hand in by mistake, and what each of it gets: one line that names file and place, or a count."""

import gzip
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_engine, random_policy
from transformers import Qwen3VLModel

from vsr1 import config
from vsr1.apps import search_folder
from vsr1.config import InputError
from vsr1.data import annotations, video_reader
from vsr1.models import checkpoints, loading

ROW = {"video": "AB1CD", "time": [1.5, 4], "desc_id": 7, "duration": 30.5}
ROW |= {"cog_desc": "a person sits.", "fig_desc": "A person sits down slowly.", "fig_desc_score": -0.25}


def row(**changes):
    return ROW | {"desc_id": 8} | changes


# name: (second line of a FIG file whose first is right, what it gets)
ANNOTATIONS = {
    "no JSON": ("{", "line 2: not JSON"),
    "a list": ("[1, 2]", "line 2: must be an object"),
    "two objects": ('{"video": "A"} {}', "line 2: not JSON"),
    "too deep": ("[" * 100_000, "line 2: not JSON"),
    "a number without end": ("1" * 5000, "line 2: (not JSON|must be an object)"),
    "a key that is missing": ({"video": "A"}, "line 2: 'time': Field required"),
    "an empty query": (row(fig_desc=""), "line 2: 'fig_desc': is empty"),
    "a query of blanks": (row(fig_desc=" \n\t"), "line 2: 'fig_desc': is empty"),
    "a query of signs nobody sees": (row(fig_desc="\u200b\u2060"), "line 2: 'fig_desc': is empty"),
    "no query": (row(fig_desc=None), "line 2: 'fig_desc': must be a valid string, found None"),
    "no coarse caption": (row(cog_desc=""), "1 queries without a coarse caption: kept"),
    "the end of a turn": (row(fig_desc="a <|im_end|> b"), "line 2: 'fig_desc': holds <.im_end.>"),
    "a frame in a text": (row(cog_desc="<|video_pad|>"), "line 2: 'cog_desc': holds <.video_pad.>"),
    "the request to search": (row(fig_desc="a <REFINE>"), "line 2: 'fig_desc': holds <REFINE>"),
    "an id that climbs": (row(video="../../etc/passwd"), "line 2: 'video': is no name of a file"),
    "an absolute id": (row(video="/x"), "line 2: 'video': is no name of a file"),
    "an id of another system": (row(video="a\\b"), "line 2: 'video': is no name of a file"),
    "the folder itself": (row(video=".."), "line 2: 'video': is no name of a file"),
    "an id with an end": (row(video="a\0b"), "line 2: 'video': is no name of a file"),
    "an id of two lines": (row(video="a\nb"), "line 2: 'video': is no name of a file"),
    "an empty id": (row(video=""), "line 2: 'video': String should have at least 1 character"),
    "a number as id": (row(video=5), "line 2: 'video': must be a valid string, found 5"),
    "no time": (row(time=None), "line 2: 'time': must be a valid"),
    "one time": (row(time=[1]), r"line 2: 'time\[1\]': Field required"),
    "three times": (row(time=[1, 2, 3]), "line 2: 'time': Tuple should have at most 2 items"),
    "a time in words": (row(time=["1", 2]), r"line 2: 'time\[0\]': must be a valid number, found '1'"),
    "a time that is true": (row(time=[True, 2]), r"line 2: 'time\[0\]': must be a valid number, found True"),
    "a time that is no number": (row(time=[0, float("nan")]), r"line 2: ('time\[1\]'|not JSON)"),
    "a time without end": (row(time=[0, float("inf")]), r"line 2: ('time\[1\]'|not JSON)"),
    "a reversed span": (row(time=[4, 1]), "1 reversed spans swapped"),
    "an empty span": (row(time=[4, 4]), "1 empty spans, which no answer overlaps: kept"),
    "a span before the video": (row(time=[-1, 4]), "1 spans that begin before the video: kept"),
    "a span behind its end": (row(time=[31, 40]), "1 spans that begin behind its end: kept"),
    "a duration of zero": (row(duration=0), "line 2: 'duration': must be greater than 0, found 0"),
    "a negative duration": (row(duration=-4), "line 2: 'duration': must be greater than 0, found -4"),
    "no duration": (row(duration=None), "line 2: 'duration': must be a valid number, found None"),
    "two durations": (row(duration=31), "1 videos of two durations: kept"),
    "an id as text": (row(desc_id="7"), "line 2: 'desc_id': must be a valid integer"),
    "an id twice": (row(desc_id=7), "line 2: desc_id 7 was used before"),
    "a blank line": ("  ", "1 blank lines skipped"),
    "half a sign": (b'{"video": "\xe9"}', "fig.jsonl: cannot be read as UTF-8 text"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotations(name, tmp_path):
    second, gets = ANNOTATIONS[name]
    second = json.dumps(second) if isinstance(second, dict) else second
    second = second if isinstance(second, bytes) else second.encode()
    (tmp_path / "fig.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + second + b"\n")
    assert_gets(tmp_path / "fig.jsonl", gets, read_annotations)


def read_annotations(path):
    annotations.warn_oddities(path, annotations.read_fig(path))


def assert_gets(path, gets, read):
    """One line of an error, or a warning, that names the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", annotations.CorpusWarning)
        try:
            read(path)
            text = "; ".join(str(warning.message) for warning in caught)
        except InputError as error:
            text = str(error)
    assert re.search(gets, text) and str(path) in text and "\n" not in text, text


# name: (bytes of a file called clip.mp4, why it cannot be read)
VIDEOS = {
    "nothing": (b"", "the file is empty"),
    "text": (b"this is no video\n" * 99, "no readable video: Invalid data"),
    "zeros": (bytes(99_999), "no readable video: Invalid data"),
    "a packed file": (gzip.compress(b"x" * 999), "no readable video: Invalid data"),
    "a list of other files": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no readable video"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name, tmp_path):
    content, why = VIDEOS[name]
    (tmp_path / "clip.mp4").write_bytes(content)
    with video_reader.Reader() as reader:
        clip = reader.read(tmp_path / "clip.mp4")
    assert clip.frames is None and why in clip.problem and "\n" not in clip.problem


# name: (query, what it gets)
QUERIES = {
    "nothing": ("", "the query is empty"),
    "signs nobody sees": ("\u200b \x00", "the query is empty"),
    "the end of a turn": ("a<|im_end|>", "<.im_end.> is a sign of the models' own"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_queries(name, tmp_path):
    query, gets = QUERIES[name]
    with pytest.raises(InputError, match=gets):
        search_folder.parse_query(query)
    if query.strip():
        (tmp_path / "queries.txt").write_text(f"a dog\n{query}\n")
        with pytest.raises(InputError, match=f"queries.txt, line 2: .*{gets}"):
            list(search_folder.read_queries(tmp_path / "queries.txt"))


def edit(name, change):
    """A damage to a JSON file of a checkpoint."""

    def damage(folder):
        record = json.loads((folder / name).read_text())
        change(record)
        (folder / name).write_text(json.dumps(record))

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def index(**files):
    text = json.dumps({"weight_map": files})
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def tensors(change):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        held = {key: tensor.clone() for key, tensor in held.items()}
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return damage


TABLE, MERGER = "model.language_model.embed_tokens.weight", "model.visual.merger.linear_fc1.weight"


def rename(held):
    for key in list(held):
        held[key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = held.pop(
            key
        )


def untie(config):
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False


# name: (damage to a folder with a policy, what it gets)
CHECKPOINTS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: not readable"),
    "half a config": (put("config.json", b"{"), "config.json: not readable"),
    "another kind": (edit("config.json", lambda c: c.update(model_type="qwen2_vl")), "a model of type qwen2_vl"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load this model"),
    "names of an older library": (tensors(rename), r"is missing from its safetensors, \d\d in all; .* called: "),
    "fewer rows": (tensors(lambda t: t.update({TABLE: t[TABLE][:-5]})), r"embed_tokens.weight is \[1023, 192\], but"),
    "numbers that are none": (tensors(lambda t: t[MERGER].fill_(float("nan"))), f"{MERGER} holds numbers that are"),
    "a head that is not shared": (tensors(lambda t: t.update({"lm_head.weight": t[TABLE] + 1})), "tie_word_embeddings"),
    "no head where it is not shared": (edit("config.json", untie), "lm_head.weight is missing"),
    "a shard that is missing": (index(x="model-2.safetensors"), "model-2.safetensors, which is not there"),
    "an index of nothing": (put("model.safetensors.index.json", b"[]"), "index.json: not readable"),
    "half a file": (put("model.safetensors", b"\x08" + bytes(7)), "cannot load this model|not readable"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, tmp_path):
    damage, gets = CHECKPOINTS[name]
    policy = random_policy(seed=3)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=gets) as caught:
        checkpoints.load(str(tmp_path), config.load("smoke"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_embedding_model_needs_no_head(tmp_path):
    """Qwen3-VL-Embedding-8B has none, and its config.json says that it is not shared."""
    engine = random_engine()
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    edit("config.json", untie)(tmp_path)
    loaded, _ = loading.load(Qwen3VLModel, str(tmp_path))
    for key, tensor in engine.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
