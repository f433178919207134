"""The rows of stage 1: which there are, those of a released file, those that a random policy writes as the teacher."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from tiny import clip, random_policy
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from vsr1 import cache, config
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.loop.replies import read_reply
from vsr1.mini import architecture, renderer, source, world
from vsr1.models import embedding, inputs, loading, policy, prompt_text, search_index
from vsr1.training import released_replies, sft_data, sft_examples, teacher_model

VIDEOS = [f"v{n}" for n in range(10)]


@pytest.fixture(scope="module")
def vectors():
    vecs = np.random.default_rng(0).standard_normal((70, 8)).astype(np.float32)
    vecs /= np.linalg.norm(vecs, axis=1, keepdims=True)
    return search_index.Vectors(VIDEOS, vecs[:10], list(range(60)), vecs[10:])


@pytest.fixture(scope="module")
def queries():
    spans = [(n / 4, n / 4 + 2.5) for n in range(60)]
    return [annotations.Query(n, f"query {n}", f"v{n % 10}", spans[n], "", 30.0) for n in range(60)]


def by_sorting(vectors, number):
    """Videos in the order of one query's vector, another way."""
    scores = {
        video: float(vectors.query_vecs[number] @ vec) for video, vec in zip(*both(vectors), strict=True)
    }
    return sorted(scores, key=lambda video: -scores[video])


def both(vectors):
    return vectors.video_ids, vectors.video_vecs


def test_rows_are_balanced_and_their_negatives_are_the_wrong_videos_that_rank_highest(vectors, queries):
    tell = lambda query, shown: f"{query.id} {shown}"  # noqa: E731
    rows = sft_examples.choose_examples(queries, vectors, tell, most=4, negatives=5, seed=1)
    hits = [row for row in rows if row.shown == row.right]
    assert len(hits) == 4 and len(rows) == 8
    assert [row.desc_id for row in rows] == sorted(row.desc_id for row in rows)
    for row in rows:
        order = by_sorting(vectors, row.desc_id)
        assert row.shown == order[0] and row.reply == f"{row.desc_id} {row.shown}"
        assert list(row.negatives) == [video for video in order if video != row.right][:5]
    plain = sft_examples.choose_examples(queries, vectors, tell, most=60, negatives=5, seed=1)
    more = sft_examples.choose_examples(queries, vectors, tell, most=60, negatives=5, seed=1, copies=True)
    assert more[: len(plain)] == plain
    copies = [row for row in more[len(plain) :] if not row.contrast]
    assert copies and all(by_sorting(vectors, row.desc_id)[0] != row.right == row.shown for row in copies)
    near = [row for row in more[len(plain) :] if row.contrast]
    assert len(near) == round(sft_examples.NEAREST_SHARE * len(plain))
    failed = sum(row.shown != row.right for row in plain)
    assert len(copies) == min(failed, 2 * failed - len(plain) + len(near))
    for row in near:
        column = vectors.video_ids.index(row.right)
        alike = {v: float(vec @ vectors.video_vecs[column]) for v, vec in zip(*both(vectors), strict=True)}
        assert row.shown == max((v for v in alike if v != row.right), key=alike.get) == row.negatives[0]
    assert all(row.reply == f"{row.desc_id} {row.shown}" for row in more)
    with pytest.raises(config.InputError, match=r"sft_negatives: 10 .* has 10 videos"):
        sft_examples.choose_examples(queries, vectors, str, most=4, negatives=10, seed=1)


# --- the released file -----------------------------------------------------------------------------------------------

YES = "<think> He\nsits\u2028 down. </think> <answer>matched</answer> <start>0.5</start> <end>3.0</end>"
NO = "<think> No\n\n dog. </think>\n<answer>not_matched</answer>"


def released(number, shown, right=None, reply=None, **changes):
    """One row as released; query n is about video n modulo 10."""
    right = right or f"v{number % 10}"
    reply = reply or f"{YES if shown == right else NO} <REFINE>"
    texts = {
        "system": "Judge.",
        "user": f'Query: "query {number}"\nRetrieved video: <video>',
        "assistant": reply,
    }
    ids = {"video_id": shown, "query_pos_video_id": right, "top1_video_id": shown}
    return {
        "qid": f"{number}_fig",
        "query": f"query {number}",
        "messages": [{"role": role, "content": text} for role, text in texts.items()],
        "videos": [f"train/video_npy_with_meta/{shown}.npy"],
        "meta": {"gold_label": "pos" if shown == right else "neg", "is_augmented": False} | ids,
    } | changes


@pytest.fixture
def read(tmp_path, vectors, queries):
    def go(entries, negatives=5):
        path = tmp_path / released_replies.FILE
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return released_replies.read_released(path, queries, vectors, negatives)

    return go


def test_a_released_row_keeps_its_reply_and_gets_the_negatives_of_its_query(read, vectors):
    parts = [{"role": "assistant", "content": [{"type": "text", "text": f"{NO}\n<REFINE><|im_end|>\n"}]}]
    low = by_sorting(vectors, 7)[-1]  # a video that is not among the first six, shown all the same
    low = low if low != "v7" else by_sorting(vectors, 7)[-2]
    rows = read([released(13, "v3"), released(7, low, messages=parts), released(2, "v9", query="else")])
    assert [row.desc_id for row in rows] == [13, 7, 2] and [row.right for row in rows] == ["v3", "v7", "v2"]
    assert rows[0].reply == YES.replace("\n", " ").replace("\u2028", "")
    assert rows[1].reply == rows[2].reply == "<think> No dog. </think> <answer>not_matched</answer>"
    assert rows[2].query == "query 2"
    for row in rows:
        others = [v for v in by_sorting(vectors, row.desc_id) if v not in (row.right, row.shown)]
        expected = others if row.shown == row.right else [row.shown, *others]
        assert list(row.negatives) == expected[:5]


def test_rows_that_cannot_be_learned_from_are_counted_and_the_first_is_named(read):
    good, rows = released(13, "v3"), []
    rows += [released(61, "v1"), released(60, "v0")]  # the annotations end at 59
    rows += [released(11, "v77"), good, released(13, "v4")]
    rows += [released(12, "v3", right="v3")]  # another data set's
    rows += [released(14, "v4", reply=NO), released(15, "v5", reply="<answer>matched</answer>")]
    rows += [released(16, "v6") | {"meta": released(16, "v6")["meta"] | {"gold_label": "neg"}}]
    rows += [released(17, "v7", reply=NO)]
    rows[-1]["meta"]["gold_label"] = "neg"
    with pytest.warns(annotations.CorpusWarning) as caught:
        examples = read(rows)
    assert [row.desc_id for row in examples] == [13] and examples[0].shown == "v3"
    reasons = (
        "2 with a query that is unknown here (first: 61_fig)",
        "1 with a video that is unknown here (first: 11_fig)",
        "1 with the qid of an earlier row (first: 13_fig)",
        "1 whose right video is another one here (first: 12_fig)",
        "4 whose reply, label and videos do not agree (first: 14_fig)",
    )
    assert str(caught[0].message).endswith(f": rows left out: {', '.join(reasons)}")
    with pytest.raises(config.InputError, match=r"none of 1 rows is of use here: 1 .* \(first: 61_fig\)"):
        read(rows[:1])


def without(key, of="meta"):
    row = released(13, "v3")
    del (row[of] if of else row)[key]
    return row


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"qid": ', "line 1: not JSON"),
        ({"qid": "1_fig"}, "must be a valid array"),
        ([released(2, "v2"), ["a row"]], "entry 2: must be an object"),
        ([without("video_id")], "entry 1: 'meta.video_id': Field required"),
        ([without("meta", None)], "entry 1: 'meta': Field required"),
        ([released(2, "v2", qid=2)], "entry 1: 'qid': must be a valid string, found 2"),
        ([released(2, "v2", qid="2_cog")], "entry 1: 'qid': "),
        ([released(2, "v2", messages=released(2, "v2")["messages"][:2])], "entry 1: 'messages': "),
        ([released(2, "v2", messages=[{"role": "assistant", "content": " "}])], "entry 1: 'messages': "),
    ],
)
def test_a_broken_file_is_one_line_that_names_row_and_key(read, content, expected):
    with pytest.raises(config.InputError) as caught:
        read(content)
    message = str(caught.value)
    assert expected in message and released_replies.FILE in message and "\n" not in message


# --- a teacher -------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Talker(policy.Policy):
    """The random policy: its reasoning is the numbers of what it sampled, one reply in four is cut off."""

    def reply(self, prompts, **how):
        self.prompts.append([self.tokenizer.decode(prompt.ids) for prompt in prompts])
        if len(self.prompts) == self.end:
            raise Killed
        return [self.spoken(completion) for completion in super().reply(prompts, **how)]

    @staticmethod
    def spoken(completion):
        text = "Hm.</think>\n\nReasoning: " + "\n".join(map(str, completion.ids))
        return dataclasses.replace(completion, text=text, ended=sum(completion.ids) % 4 > 0)


@pytest.fixture(scope="module")
def random_one():
    return random_policy()


def talker(base, end=None):
    """Killed when asked for the `end`th time."""
    other = Talker(base.model, base.tokenizer, None, None, base.max_frame_pixels)
    other.prompts, other.end = [], end
    return other


class Shelf:
    """Videos of random pixels, one of them broken, as `evaluate.Clips` gives them."""

    def __init__(self, *_):
        self.clips = {video: clip(4 + 2 * (n % 3), n) for n, video in enumerate(VIDEOS)}
        self.clips["v1"] = video_reader.Clip(None, None, None, "no video stream")

    def get(self, ids):
        return [self.clips[video] for video in ids]


@pytest.fixture
def clone(tmp_path, monkeypatch, vectors, queries):
    """clone(name) -> a profile without a world, with annotations and vectors, in a scratch folder of its own."""
    monkeypatch.setattr(sft_data, "ROOT", tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(teacher_model, "MAX_NEW_TOKENS", 24)
    monkeypatch.setattr(clip_cache, "ClipCache", Shelf)
    monkeypatch.setattr(video_reader, "reader_pool", lambda *_: contextlib.nullcontext())
    (tmp_path / "runs").mkdir()
    (tmp_path / loading.REVISIONS).write_text(
        '{"some/teacher": "c0ffee"}'
    )  # known once, it need not be at hand

    def make(name):
        knobs = {
            "world": None,
            "data_source": "vsr1.data.real_datasets",
            "teacher": "some/teacher",
            "sft_rows": 5,
            "sft_negatives": 5,
            "eval_batch": 4,
        }
        profile = dataclasses.replace(
            config.load("smoke"), name=name, val_fraction=0.0, sft_text_only_rows=0, **knobs
        )
        (profile.data_dir("charades") / "corpus").mkdir(parents=True)
        annotations.write_fig(profile.data_dir("charades") / "corpus" / "train.jsonl", queries)
        (folder := profile.data_dir("charades") / "embed" / "engine" / "train").mkdir(parents=True)
        ids = {"videos": vectors.video_ids, "queries": vectors.query_ids}
        (folder / "ids.json").write_text(json.dumps(ids))
        np.save(folder / "video_vecs.npy", vectors.video_vecs)
        np.save(folder / "query_vecs.npy", vectors.query_vecs)
        cache.write_json(folder / cache.RECORD, {"key": "random vectors"})
        monkeypatch.setattr(
            embedding, "embed_corpus", lambda run, *_: run.data_dir("charades") / "embed" / "engine" / "train"
        )
        return profile

    return make


def written(monkeypatch, profile, agent):
    monkeypatch.setattr(teacher_model, "load_teacher", lambda _: agent)
    return sft_data.reply_file(profile, "charades")


def test_a_killed_teacher_goes_on_to_the_same_end_and_is_not_asked_twice(clone, monkeypatch, random_one):
    whole, parts, agent = clone("whole"), clone("parts"), talker(random_one)
    file = written(monkeypatch, whole, agent)
    assert sum(map(len, agent.prompts)) < 10 and len(agent.prompts) == 3, (
        "ten rows less those of a broken video"
    )
    with pytest.raises(Killed):
        written(monkeypatch, parts, talker(random_one, end=2))
    (diary,) = parts.runs("charades").glob("traces.*.partial/rows.jsonl")
    assert diary.read_bytes().count(b"\n") == 4
    with open(diary, "ab") as half:
        half.write(b'{"qid": "5_f')
    again = talker(random_one)
    other = written(monkeypatch, parts, again)
    assert again.prompts == agent.prompts[1:]
    for name in (released_replies.FILE, "rows.jsonl"):
        assert (other.parent / name).read_bytes() == (file.parent / name).read_bytes(), name
    assert written(monkeypatch, whole, talker(random_one, end=1)) == file, "nothing is left to ask"


def test_wherever_a_file_of_rows_is_cut_the_same_batches_are_asked_again(tmp_path):
    path, batches = tmp_path / "rows.jsonl", []

    def echo(batch):
        batches.append(batch)
        return [{"row": row} for row in batch]

    rows = ["é", "a\u2028b", "c\nd", "e", "f"]
    assert teacher_model.finish(rows, echo, 2, path, "") == [{"row": row} for row in rows]
    whole, ends = path.read_bytes(), [0]
    for line in whole.split(b"\n")[:-1]:
        ends.append(ends[-1] + len(line) + 1)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        batches.clear()
        assert teacher_model.finish(rows, echo, 2, path, "") == [{"row": row} for row in rows]
        assert path.read_bytes() == whole
        assert batches == [["é", "a\u2028b"], ["c\nd", "e"], ["f"]][(cut >= ends[2]) + (cut >= ends[4]) :]


def test_what_a_teacher_wrote_is_read_back_as_the_rows_it_was_asked_about(
    clone, monkeypatch, random_one, vectors, queries
):
    """Another way: each row asked alone with its own rng, and its reply put together here."""
    profile = clone("one")
    written(monkeypatch, profile, talker(random_one))
    expected, dropped = [], {"video unreadable": [], "cut off": []}
    examples = sft_examples.choose_examples(
        queries, vectors, lambda *_: "", most=5, negatives=5, seed=profile.seed
    )
    for row in examples:
        if row.shown == "v1":
            dropped["video unreadable"].append(row.desc_id)
            continue
        start, end = queries[row.desc_id].span
        prompt = random_one.prompt(
            teacher_model.teacher_prompt(row, (start, end))[0], row.query, Shelf().get([row.shown])[0]
        )
        sample = {
            "max_new_tokens": 24,
            "temperature": 0.4,
            "top_p": 0.9,
            "rng": np.random.default_rng([42, row.desc_id]),
        }
        ids = random_one.reply([prompt], **sample)[0].ids
        if sum(ids) % 4 == 0:
            dropped["cut off"].append(row.desc_id)
            continue
        verdict = "<answer>not_matched</answer>"
        if row.shown == row.right:
            times = prompt_text.seconds_text(start), prompt_text.seconds_text(end)
            verdict = "<answer>matched</answer> <start>{}</start> <end>{}</end>".format(*times)
        reply = f"<think> {' '.join(map(str, ids))} </think> {verdict}"
        expected.append(dataclasses.replace(row, reply=reply))
    rows = sft_data.load(profile, "charades", vectors)
    rows = sorted(rows, key=lambda row: row.desc_id)
    assert rows == expected and {row.shown == row.right for row in rows} == {True, False}
    assert all(read_reply(row.reply, ()).strict for row in rows)
    lines = (profile.runs("charades") / "traces" / "rows.jsonl").read_text().splitlines()
    reasons = {entry["qid"]: entry.get("dropped") for entry in map(json.loads, lines)}
    assert len(reasons) == len(examples) and all(dropped.values()), "every kind is needed here"
    for reason, numbers in dropped.items():
        assert [qid for qid, dropped_for in reasons.items() if dropped_for == reason] == [
            f"{n}_fig" for n in numbers
        ]


class Sayer:
    """A teacher whose words the test chooses."""

    def __init__(self, *texts, ended=True):
        self.texts, self.ended = texts, ended

    def prompt(self, system, query, clip):
        return system

    def reply(self, prompts, **_):
        self.prompts = prompts
        return [
            policy.Completion([], [], self.ended, text, None)
            for text, _ in zip(self.texts, prompts, strict=True)
        ]


RIGHT = sft_examples.SFTExample(13, "query 13", "v3", "v3", (), "")
WRONG = sft_examples.SFTExample(7, "query 7", "v7", "v2", (), "")
SPANS = {13: (0.5, 11.6), 7: (5.0, 9.0)}


def test_the_teacher_is_told_the_true_span_where_the_video_is_right_and_no_time_where_it_is_wrong():
    teacher = Sayer("Reasoning: from 2.0 to 3.0 s.", "Reasoning: no dog.")
    entries = teacher_model.ask(teacher, Shelf(), SPANS, 0, [RIGHT, WRONG])
    assert "from 0.5 to 11.6 seconds" in teacher.prompts[0] and not re.search(r"\d", teacher.prompts[1])
    for word in ("one to three sentences", "earlier", "later", "`Reasoning:`"):
        assert word in teacher.prompts[0]
    for word in ("one or two sentences", "needs", "lacks", "`Reasoning:`"):
        assert word in teacher.prompts[1]
    texts = [entry["messages"][-1]["content"] for entry in entries]
    assert texts == [
        "<think> from 2.0 to 3.0 s. </think> <answer>matched</answer> <start>0.5</start> <end>11.6</end> <REFINE>",
        "<think> no dog. </think> <answer>not_matched</answer> <REFINE>",
    ]


@pytest.mark.parametrize(
    "reasoning",
    [
        "he sits <answer>not_matched</answer> <REFINE>",
        "<think><REFINE> he <|im_end|> sits <query_update>a dog</query_update>",
        "he <an<b>swer>matched</an</b>swer> sits <REF<b></b>INE> <start>9</start",
        "he sits < 3 s > <<answer>>matched<</answer>>",
        "Reasoning: <answer>\nReasoning: </answer> he sits",
    ],
)
def test_tags_in_the_words_of_a_teacher_are_harmless(read, reasoning):
    entries = teacher_model.ask(Sayer(*[f"Reasoning: {reasoning}"] * 2), Shelf(), SPANS, 0, [RIGHT, WRONG])
    rows = read(entries)
    for row, span in zip(rows, ((0.5, 11.6), None), strict=True):
        reply = read_reply(row.reply, ())
        assert reply.strict and reply.span == span and reply.update is None and "sits" in row.reply
        assert prompt_text.REFINE not in row.reply and "<|" not in row.reply
    assert [entry["messages"][-1]["content"].count("<REFINE>") for entry in entries] == [1, 1]


def test_no_reasoning_or_half_of_one_is_no_row(clone, monkeypatch):
    for text in ("", "He sits.", "Reasoning:", "**Reasoning:** <b>...</b>", "Reasoning: he sits</think>"):
        (entry,) = teacher_model.ask(Sayer(text), Shelf(), SPANS, 0, [RIGHT])
        assert entry == {"qid": "13_fig", "dropped": "no reasoning", "said": text}
    (entry,) = teacher_model.ask(Sayer("Reasoning: he", ended=False), Shelf(), SPANS, 0, [RIGHT])
    assert entry["dropped"] == "cut off"
    mute = Sayer(*[""] * 4)
    mute.reply = lambda prompts, **_: [policy.Completion([], [], True, "Yes.", None)] * len(prompts)
    with pytest.raises(config.InputError, match=r"rows.jsonl: some/teacher gave no reasoning for any row"):
        written(monkeypatch, clone("mute"), mute)


def test_a_mixture_of_experts_is_loaded_and_speaks_as_with_the_library(tmp_path):
    """The paper's teacher is one; `policy.load` knows the dense kind only."""
    torch.manual_seed(0)
    tokenizer = architecture.make_tokenizer()
    knobs = architecture.make_config(tokenizer).to_dict()
    for part in (knobs, knobs["text_config"], knobs["vision_config"]):
        part.pop("model_type")
    knobs["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**knobs))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            weight.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = teacher_model.load_teacher(
        dataclasses.replace(config.load("smoke"), teacher=str(tmp_path), device="cpu")
    )
    prompts = [teacher.prompt("Judge.", "a dog", clip(4 + 2 * n, n)) for n in range(2)]
    for prompt, reply in zip(prompts, teacher.reply(prompts, max_new_tokens=8), strict=True):
        batch = inputs.collate([prompt], teacher.model, tokenizer.pad_token_id)
        batch.pop("position_ids")
        banned = teacher.banned_tokens.nonzero()[:, 0].tolist()
        ids = teacher.model.generate(**batch, do_sample=False, max_new_tokens=8, suppress_tokens=banned)
        assert reply.ids == ids[0, len(prompt.ids) :].tolist()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_released_file_comes_before_a_teacher(clone, monkeypatch, random_one):
    profile = dataclasses.replace(clone("order"), sft_data="data/{dataset}/traces.json")
    agent = talker(random_one)
    assert written(monkeypatch, profile, agent).parent.name == "traces", "no file there"
    (folder := config.ROOT / "data" / "charades").mkdir(parents=True)
    (folder / "traces.json").write_text("[]")
    assert sft_data.reply_file(profile, "charades") == folder / "traces.json"
    for knobs in ({"sft_data": None}, {"sft_data": "data/{dataset}/other.json"}):
        with pytest.raises(config.InputError) as caught:
            sft_data.reply_file(dataclasses.replace(profile, teacher=None, **knobs), "charades")
        message = str(caught.value)
        assert all(word in message for word in ("`sft_data`", "`teacher`", "`world`")) and "\n" not in message
    assert "data/charades/other.json" in message


def test_a_course_begins_with_words_then_mixes_batches_and_goes_through_every_row_once_an_epoch():
    rows = [sft_examples.SFTExample(n, "q", "v0", "v1", (), "r") for n in range(10)]
    profile = dataclasses.replace(config.load("smoke"), sft_text_only_rows=20, sft_epochs=2.0, sft_batch=2)
    captioned = [dataclasses.replace(row, caption="w") for row in rows]
    course = sft_data.order_batches(profile, captioned, rows[:6])
    kinds = [{row.caption is not None for row in course[n : n + 2]} for n in range(0, len(course), 2)]
    assert all(len(kind) == 1 for kind in kinds)
    kinds = [kind.pop() for kind in kinds]
    assert kinds == [True] * 4 + [True, False] * 6  # the first four of ten batches alone, then one of each
    text_only, with_video = (
        [row.desc_id for row in course if (row.caption is not None) == kind] for kind in (True, False)
    )
    assert sorted(text_only[:10]) == sorted(text_only[10:]) == list(range(10))
    assert sorted(with_video[:6]) == sorted(with_video[6:]) == list(range(6))
    assert sft_data.order_batches(dataclasses.replace(profile, sft_text_only_rows=0), [], rows[:6])[:6] == [
        rows[number] for number in with_video[:6]
    ]


@pytest.mark.parametrize("dataset", ["charades", "activitynet"])
def test_the_mini_teacher_names_only_times_that_stand_between_the_frames(tmp_path, dataset):
    """Computed from the scene, against the frames that are really read: the longest video passes 64 frames."""
    profile = config.load("mini")
    scene = max(world.make_scenes(dataset, "train", 40, 1), key=lambda scene: scene.seconds)
    renderer.render_video(scene, tmp_path / "film.mp4", 128, profile.world.fps)
    with video_reader.Reader(profile.video_fps, profile.max_frames) as reader:
        clip = reader.read(tmp_path / "film.mp4")
    printed = {f"{time:.1f}" for time in inputs.pair_times(clip.timestamps)}
    for moment in scene.moments:
        query = annotations.Query(0, "q", scene.video, (moment.start, moment.end), "", scene.seconds)
        write_reply, _ = source.writers(profile, {scene.video: scene})
        reply = read_reply(write_reply(query, scene.video), [1])
        assert reply.matched and {f"{time:.1f}" for time in reply.span} <= printed
        shift = max(abs(a - b) for a, b in zip(reply.span, query.span, strict=True))
        assert shift <= 2 * float(np.diff(inputs.pair_times(clip.timestamps)).max())


def test_real_videos_cannot_be_told_in_words(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "real" / "charades" / "corpus"
    folder.mkdir(parents=True)
    annotations.write_fig(folder / "train.jsonl", [annotations.Query(1, "q", "v0", (0.0, 1.0), "c", 2.0)])
    monkeypatch.setattr(config, "ROOT", tmp_path)
    knobs = {"world": None, "data_source": "vsr1.data.real_datasets", "sft_text_only_rows": 8}
    profile = dataclasses.replace(config.load("smoke"), name="real", **knobs)
    with pytest.raises(
        config.InputError, match="real: sft_text_only_rows: 8, but only rendered videos can be told"
    ):
        sft_data.load(profile, "charades", None)
