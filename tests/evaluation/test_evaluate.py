"""The wiring of the loop, on five rendered films, with a random engine and a policy that says what the test wants."""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import time
import zlib

import numpy as np
import pytest
import torch
from tiny import random_policy
from transformers import Qwen3VLModel

from vsr1 import config
from vsr1.config import InputError
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.data.annotations import Query
from vsr1.evaluation import evaluate, metrics, run_batches, soft_token_sweep
from vsr1.experiments import common
from vsr1.loop import episode as loop
from vsr1.loop import runner, sqr
from vsr1.loop.records import read_episodes
from vsr1.mini import architecture, renderer
from vsr1.models import embedding, engine, policy, prompt_text, search_index

REJECT = "<think> a dog </think> <answer>not_matched</answer> <REFINE>"
MATCH = "<think> it is </think> <answer>matched</answer> <start>1.0</start> <end>4.0</end> <REFINE>"


class Scripted(policy.Policy):
    """Says what `script(system, query, clip)` returns; branches and soft tokens are those of the real, random model."""

    def prompt(self, system, query, clip=None):
        prompt = super().prompt(system, query, clip)
        self.parts[id(prompt)] = (prompt, system, query, clip)  # held, so that ids stay apart
        return prompt

    def reply(self, prompts, *, max_new_tokens, **_):
        requests = [self.parts[id(prompt)][1:] for prompt in prompts]
        self.requests += requests
        texts = [self.script(*request) for request in requests]
        ids = [[*self.tokenizer(text)["input_ids"], self.stop_token_id] for text in texts]
        branches = self.replay(prompts, ids).refine_contexts
        return [
            policy.Completion(
                row, [0.0] * len(row), True, text, branch, self._verdict(row, [[-3, -1]] * len(row))
            )
            for row, text, branch in zip(ids, texts, branches, strict=True)
        ]

    def reply_if_matched(self, prompts, completions, max_new_tokens):
        return [MATCH.replace("4.0", "4000") for _ in prompts]


@pytest.fixture(scope="module")
def random_one():
    return random_policy(init="default")


@pytest.fixture
def agent(random_one):
    return scripted(random_one)


def scripted(base, **changes):
    other = Scripted(base.model, base.tokenizer, base.heads, base.settings, base.max_frame_pixels)
    other.parts, other.requests, other.script = {}, [], lambda system, query, clip: REJECT
    other.__dict__ |= changes
    return other


@pytest.fixture(scope="module")
def search_engine():
    torch.manual_seed(1)
    tokenizer = architecture.make_tokenizer()
    model = Qwen3VLModel(architecture.make_config(tokenizer)).eval()
    for name, weight in model.named_parameters():  # else all queries look alike to random weights
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 3
    return engine.Engine(config.load("smoke"), model, tokenizer, "random")


@pytest.fixture(scope="module")
def read():
    """Path to the Future of its Clip: at most eight frames, so that prompts are short."""
    with video_reader.reader_pool(video_reader.Reader(max_frames=8)) as reader:
        yield reader


@pytest.fixture(scope="module")
def world(tmp_path_factory, search_engine, read):
    """A profile with five films, embedded; everything under a scratch folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", tmp_path_factory.mktemp("clone"))
        patch.setattr(engine, "load", lambda profile, which="engine": search_engine)
        patch.setattr(
            video_reader, "reader_pool", lambda *_: contextlib.nullcontext(read)
        )  # one child for all tests
        profile = config.load("smoke")
        small = dataclasses.replace(profile.world, train_videos=2, test_videos=5)
        profile = dataclasses.replace(profile, world=small, eval_batch=6, max_new_tokens=16, max_frames=8)
        path = renderer.render(profile, "charades").parent / "corpus" / "test.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
        embedding.embed_corpus(profile, "charades", "test")
        yield profile


@pytest.fixture
def queries(world):
    return annotations.read_fig(world.data_dir("charades") / "corpus" / "test.jsonl")


@pytest.fixture
def run(world, search_engine, monkeypatch):
    """run(agent, system, **knobs) -> episodes of all queries, straight from the stage."""
    number = iter(range(99))

    def go(agent, system, name=None, **knobs):
        monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
        profile = dataclasses.replace(world, **knobs)
        name = name or f"{system}-{next(number)}-{time.time_ns()}"
        return read_episodes(evaluate.run_system(profile, "charades", name, like=system))

    return go


def wiring(world, search_engine, agent, system, vectors=None, clips=None):
    vectors = vectors or search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    return runner.EpisodeRunner(world, runner.SYSTEMS[system], search_engine, agent, vectors, clips)


def test_search_gives_the_ranks_of_a_sort_and_nothing_for_a_video_without_vector(world, search_engine, agent):
    vectors = search_index.Vectors(
        ["a", "b", "c", "d", "e"],
        np.array([[1, 0], [0.6, 0.8], [0.6, 0.8], [0, 1], [-1, 0]], np.float32),
        [1, 2, 3],
        np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32),
    )
    queries = [
        Query(key, "q", video, (0.0, 1.0), "q", 5.0) for key, video in ((1, "b"), (2, "c"), (3, "gone"))
    ]
    first, tied, gone = wiring(world, search_engine, agent, "zs", vectors).search(
        [(query, ()) for query in queries]
    )
    assert (first.rank, first.ties, first.top) == (
        2,
        1,
        ("a", "b", "c", "d"),
    )  # one more than there are turns
    assert (tied.rank, tied.ties, tied.top[0]) == (1, 1, "b")  # ties count for us; the first row is shown
    assert (gone.rank, gone.ties, gone.score_gt, gone.top[0]) == (None, None, None, "b")
    assert first.score_top1 == 1.0 and first.score_gt == pytest.approx(0.6)
    ids, grades = [f"v{i}" for i in range(99)], np.arange(99) % 3
    tied = search_index.Vectors(ids, grades[:, None].astype(np.float32), [1], np.ones((1, 1), np.float32))
    (ranking,) = wiring(world, search_engine, agent, "zs", tied).search(
        [(dataclasses.replace(queries[0], video="v9"), ())]
    )
    assert (ranking.rank, ranking.ties, ranking.top) == (67, 32, ("v2", "v5", "v8", "v11"))


@pytest.mark.parametrize(
    ("system", "trained", "blocks", "turns", "n"),
    [
        ("sqr", 1, 1, 3, 3),
        ("sqr", 2, 2, 3, 3),
        ("sqr", 3, 3, 4, 3),
        ("sqr", 1, 1, 3, 1),
        ("sqr-all", 1, 4, 4, 3),
    ],
)
def test_a_soft_query_of_the_loop_is_the_one_made_by_hand_for_one_row(
    world, search_engine, agent, run, read, queries, system, trained, blocks, turns, n
):
    """Turn by turn, one query alone: prompt, replay, latents, engine, ranks by a sort.

    blocks  the soft tokens of how many turns stand in a query; `trained`, of how many its policy learned with
    """
    agent.settings = dataclasses.replace(agent.settings, carry_blocks=trained, n_soft=n)
    episodes = run(agent, system, max_turns=turns)
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    films = world.data_dir("charades") / "videos"
    assert len(episodes) == len(queries) > 6 and {episode.stop_reason for episode in episodes} == {"budget"}
    for query, episode in list(zip(queries, episodes, strict=True))[::4]:
        vec, carried = vectors.query_vecs[vectors.query_ids.index(query.id)], []
        for turn in episode.turns:
            order = np.argsort(-(vectors.video_vecs @ vec), kind="stable")
            score = (vectors.video_vecs @ vec)[vectors.video_ids.index(query.video)]
            assert turn.shown_id == vectors.video_ids[order[0]] and turn.score_gt == pytest.approx(
                score, abs=1e-5
            )
            assert turn.rank_in == list(order).index(vectors.video_ids.index(query.video)) + 1
            clip = read(films / f"{turn.shown_id}.mp4").result()
            prompt = policy.Policy.prompt(agent, prompt_text.SYSTEM, query.text, clip)
            with torch.no_grad():
                branches = agent.replay([prompt], [list(turn.reply.ids)]).refine_contexts
                carried = [*carried, sqr.soft_tokens(agent, branches, n)][-blocks:]
                soft = torch.cat(carried, dim=1)
                vec = sqr.soft_query(search_engine, agent.heads, [query.text], soft)[0].numpy()
                shorter = sqr.soft_query(search_engine, agent.heads, [query.text], soft[:, :-1])[0].numpy()
            scores = vectors.video_vecs @ shorter
            right = vectors.video_ids.index(query.video)
            if n > 1:  # without any, the query is what it was at this turn, not as typed
                assert turn.rank_by_depth[-2] == search_index.ranks(scores[None], np.array([right]))[0]
            assert len(turn.rank_by_depth) == n + 1
            assert turn.rank_by_depth[0] == turn.rank_in and turn.rank_by_depth[-1] == turn.rank_out
            assert (
                turn.top1_by_depth[-1]
                == turn.top1_out
                == vectors.video_ids[(vectors.video_vecs @ vec).argmax()]
            )
            assert (turn.refine_tokens, turn.refine_tokens_tagged) == (n, n + 1)
            if not turn.reused:
                assert turn.refine_cost.generated == n and turn.refine_cost.engine_calls == 1
                assert turn.verify_cost.forward == len(prompt.ids) + turn.verify_cost.generated
    assert any(turn.reused for episode in episodes for turn in episode.turns) == (blocks == 1)


def test_a_rejected_right_video_is_asked_for_its_span_and_no_other_one(agent, run, queries):
    for system, right in {"oracle-right": True, "oracle-wrong": False}.items():
        for query, episode in zip(queries, run(agent, system), strict=True):
            (turn,) = episode.turns
            assert turn.verdict_margin == -2 and turn.span_ms is None
            assert (turn.forced_span_ms is not None) == right
            assert not right or turn.forced_span_ms == pytest.approx((1000, 1000 * query.duration), abs=99)
    agent.script = lambda *_: MATCH
    assert all(episode.turns[0].forced_span_ms is None for episode in run(agent, "oracle-right"))


def test_walking_down_equals_the_stored_ranking_and_zs_its_first_video(world, agent, run, queries):
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    row = {key: n for n, key in enumerate(vectors.query_ids)}
    order = np.argsort(-(vectors.query_vecs @ vectors.video_vecs.T), axis=1, kind="stable")
    for system, turns in {"walkdown": 3, "zs": 1}.items():
        for query, episode in zip(queries, run(agent, system), strict=True):
            shown = [turn.shown_id for turn in episode.turns]
            assert shown == [vectors.video_ids[column] for column in order[row[query.id], :turns]]
            ranks = {rank for turn in episode.turns for rank in (turn.rank_in, turn.rank_out)}
            assert ranks <= {episode.rank_orig, None}, "no ranking changes"
            assert sum(turn.refine_cost.engine_calls for turn in episode.turns) == 0


def test_a_sample_walks_as_the_same_queries_of_a_whole_run(world, agent, run, queries):
    """Evenly spaced over the split, in the same turns as without the others beside them."""
    whole = {episode.desc_id: plain(episode) for episode in metrics.headline(world, run(agent, "walkdown"))}
    studies = dataclasses.replace(world.studies, sample_queries=3)
    sample = common.run_sample(dataclasses.replace(world, studies=studies), "charades", "walkdown")
    assert [episode.desc_id for episode in sample] == [queries[at].id for at in (0, 2, 5)] and len(
        queries
    ) == 8
    assert [plain(episode) for episode in sample] == [whole[episode.desc_id] for episode in sample]


def test_feedback_takes_a_part_of_each_rejected_video_off_the_query(world, agent, run, queries, monkeypatch):
    monkeypatch.setattr(evaluate.query_adapters, "choose_feedback", lambda *_: 0.4)
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    for query, episode in zip(queries, run(agent, "rocchio"), strict=True):
        vec, rejected = vectors.query_vec(query.id).astype(float), []
        for turn in episode.turns:
            scores = vectors.video_vecs @ vec
            order = [vectors.video_ids[column] for column in np.argsort(-scores)]
            assert turn.shown_id == next(video for video in order if video not in rejected)
            assert turn.rank_in == order.index(query.video) + 1
            rejected.append(turn.shown_id)
            vec = vec - 0.4 * vectors.video_vecs[vectors.column(turn.shown_id)]
            vec = vec / np.linalg.norm(vec)
        assert len(rejected) == 3


def test_a_reranker_looks_at_all_and_keeps_what_it_thought_of_each(agent, run):
    agent.script = lambda *_: MATCH
    for episode in run(agent, "rerank"):
        assert [turn.rank_out for turn in episode.turns] == [
            episode.rank_orig
        ] * 3 and episode.stop_reason == "budget"
        assert all(turn.verdict_margin == -2 and not turn.reply.matched for turn in episode.turns)
        assert all(turn.span_ms is not None for turn in episode.turns)


def test_a_first_search_may_come_from_other_vectors_of_the_queries(
    world, search_engine, agent, run, queries, tmp_path, monkeypatch
):
    """Those of each query's right video: the first look finds it, whatever was typed."""
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    right = vectors.video_vecs[vectors.columns([query.video for query in queries])]
    np.savez(tmp_path / "test.npz", ids=[query.id for query in queries], vecs=right)
    monkeypatch.setattr(evaluate.query_adapters, "adapt", lambda *_: tmp_path)
    monkeypatch.setattr(evaluate.sft, "train", lambda profile, *_: profile.policy)
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    episodes = read_episodes(evaluate.run_system(world, "charades", "adapter-vec-ft"))
    assert [episode.turns[0].shown_id for episode in episodes] == [query.video for query in queries]
    assert {turn.refine_kind for episode in episodes for turn in episode.turns} == {"walkdown"}


@pytest.mark.parametrize("name", ["rocchio-ft", "rerank-10-ft", "sft-walkdown"])
def test_looks_of_another_system_with_the_same_policy_are_not_taken_again(
    world, search_engine, agent, name, monkeypatch
):
    """And give the episodes that looking again gives; the last of them takes those of a loop with soft tokens."""
    monkeypatch.setattr(evaluate.query_adapters, "choose_feedback", lambda *_: 0.4)
    monkeypatch.setattr(evaluate.sft, "train", lambda profile, *_: profile.policy)
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))

    def look(query, clip):
        return zlib.crc32(query.encode() + clip.frames.tobytes())

    def reply(_, query, clip):
        number = look(query, clip) % 97
        text = REJECT if number % 3 else MATCH
        return text.replace("<think>", f"<think> {number}").replace("4.0", f"{number}.0")

    def run(name, looks):
        monkeypatch.setitem(evaluate.RECIPES, name, dataclasses.replace(recipe, looks=looks))
        return asked(name)

    def asked(name):
        agent.requests = []
        episodes = read_episodes(evaluate.run_system(world, "charades", name))
        looks = {look(query, clip) for _, query, clip in agent.requests}
        return [plain(episode) for episode in episodes], looks

    agent.script, recipe = reply, evaluate.RECIPES[name]
    shutil.rmtree(world.runs("charades") / "episodes" / recipe.looks, ignore_errors=True)
    _, known = asked(recipe.looks)
    again, all_looks = run(name, None)
    shared, looks = run(name, recipe.looks)
    assert shared == again and looks == all_looks - known
    assert known & all_looks, "nothing was shared"
    assert len({turn.reply.text for episode in shared for turn in episode.turns if turn.reply}) > 5


def test_a_smaller_gallery_is_searched_under_its_own_name(world, agent, run, queries, tmp_path, monkeypatch):
    whole = run(agent, "walkdown", "walk")
    small = tmp_path / "of-2"
    shutil.copytree(world.data_dir("charades") / "embed" / "engine" / "test", small)
    vectors, rows = search_index.load_vectors(small), [1, 3]
    (small / "ids.json").write_text(
        json.dumps({"videos": [vectors.video_ids[row] for row in rows], "queries": vectors.query_ids})
    )
    np.save(small / "video_vecs.npy", vectors.video_vecs[rows])
    (small / "index.faiss").unlink()
    file = evaluate.run_system(world, "charades", "walk", like="walkdown", gallery=small)
    assert file.name == "walk-of-2.jsonl"
    allowed = {vectors.video_ids[row] for row in rows}
    readable = [episode for episode in read_episodes(file) if episode.problem is None]
    assert {episode.desc_id for episode in readable} == {
        query.id for query in queries if query.video in allowed
    }
    for episode in readable:
        scores = vectors.scores(vectors.query_vec(episode.desc_id))
        assert episode.turns[0].shown_id == max(allowed, key=lambda video: scores[vectors.column(video)])
        assert {turn.shown_id for turn in episode.turns} <= allowed
    assert any(turn.shown_id not in allowed for episode in whole for turn in episode.turns)


@pytest.mark.parametrize("variant", ["blind", "seen", "reasoned"])
@pytest.mark.parametrize("append", ["", "-append"])
def test_a_query_in_other_words_is_the_engine_s_vector_of_those_words(
    world, search_engine, agent, run, queries, variant, append
):
    update, shown = "someone in a red shirt", {}

    def script(system, query, clip):
        tag = f"<query_update> {update} </query_update>"
        if system == prompt_text.REWRITE:
            assert clip is (None if variant == "blind" else shown[query])
            return tag
        shown[query] = clip
        assert clip is not None and system == (
            prompt_text.SYSTEM_HQR if variant == "reasoned" else prompt_text.SYSTEM_ZS
        )
        return f"<think> no </think> <answer>not_matched</answer>{f' {tag}' if variant == 'reasoned' else ''}"

    agent = scripted(policy.Policy(agent.model, agent.tokenizer, None, None, 4096), script=script)
    episodes = run(agent, f"hqr-{variant}{append}", max_turns=1)
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    texts = [f"{query.text} {update}" if append else update for query in queries]
    scores = search_engine.embed_texts(texts) @ vectors.video_vecs.T
    right = np.array([vectors.video_ids.index(query.video) for query in queries])
    assert [episode.turns[0].rank_out for episode in episodes] == search_index.ranks(scores, right).tolist()
    for episode in episodes:
        (turn,) = episode.turns
        assert (turn.refine_kind, turn.update_text) == (f"hqr-{variant}{append}", update)
        tokens = agent.tokenizer(update, add_special_tokens=False)["input_ids"]
        assert (
            turn.refine_tokens == len(tokens) < turn.refine_tokens_tagged
            and turn.refine_cost.engine_calls == 1
        )
        assert turn.reply.strict and (turn.refine_cost.generated == 0) == (variant == "reasoned")


def test_an_update_that_cannot_be_read_ends_the_walk_and_its_tokens_count(agent, run):
    agent.script = lambda system, *_: "<query_update>" if system == prompt_text.REWRITE else REJECT
    for episode in run(agent, "hqr-seen"):
        assert episode.stop_reason == "no_refine" and episode.turns[0].refine_cost.generated > 0
        assert episode.turns[0].refine_cost.engine_calls == 0


def test_a_film_that_broke_after_embedding_is_a_recorded_problem_in_every_denominator(
    world, agent, run, queries
):
    films = world.data_dir("charades") / "videos"
    victim = films / f"{annotations.gallery_ids(queries)[2]}.mp4"
    content = victim.read_bytes()
    try:
        victim.write_bytes(b"not a film")
        episodes = run(agent, "oracle-right")
    finally:
        victim.write_bytes(content)
    broken = [episode for episode in episodes if episode.problem]
    assert {episode.gt_video for episode in broken} == {victim.stem} and len(episodes) == len(queries)
    assert all(episode.turns[0].reply is None and episode.stop_reason == "problem" for episode in broken)
    assert not metrics.ver_hits(broken).any() and len(metrics.ver_hits(episodes)) == len(queries)


def test_a_run_that_was_killed_goes_on_and_leaves_the_same_file(world, agent, run, monkeypatch):
    whole = run(agent, "sqr", "whole")
    run_loop, calls = loop.run_episodes, []

    def killed(*args):
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_loop(*args)

    monkeypatch.setattr(loop, "run_episodes", killed)
    with pytest.raises(KeyboardInterrupt):
        run(agent, "sqr", "resumed")
    resumed = run(agent, "sqr", "resumed")
    assert sum(calls) == len(whole) + calls[1], "the finished batch must not walk again"
    assert [plain(episode) for episode in resumed] == [plain(episode) for episode in whole]
    folder = world.runs("charades") / "episodes"
    assert sorted(path.name for path in (folder / "resumed").glob("[!.]*")) == [
        "episodes.jsonl",
        "notes.json",
    ]
    monkeypatch.setattr(run_batches, "run", lambda *_: pytest.fail("nothing changed, nothing runs"))
    assert run(agent, "sqr", "resumed") == resumed == read_episodes(folder / "resumed.jsonl")


def plain(episode):
    """An episode without its run, the clock, and the scores: their last bits depend on the batch."""
    turns = [
        dataclasses.replace(
            turn,
            score_gt=0.0,
            score_top1=0.0,
            verify_cost=dataclasses.replace(turn.verify_cost, seconds=0.0),
            refine_cost=dataclasses.replace(turn.refine_cost, seconds=0.0),
        )
        for turn in episode.turns
    ]
    return dataclasses.replace(episode, run=None, turns=tuple(turns))


def test_batches_of_queries_do_not_change_what_happens(agent, run):
    agent.script = lambda system, query, clip: MATCH if sum(map(ord, query)) % 3 else REJECT
    several, one_by_one = run(agent, "sqr"), run(agent, "sqr", eval_batch=1)
    assert {episode.stop_reason for episode in several} == {"matched", "budget"}
    assert [plain(episode) for episode in several] == [plain(episode) for episode in one_by_one]


def test_films_are_decoded_once_and_only_as_many_are_kept_as_fit(world, read, queries, monkeypatch):
    ids, stems = annotations.gallery_ids(queries), []
    count = lambda path: stems.append(path.stem) or read(path)  # noqa: E731
    clips = clip_cache.ClipCache(world.data_dir("charades") / "videos", ids, count)
    first = clips.get([ids[0], ids[1], ids[0]])
    assert first[0] is first[2] and stems == ids[:2]
    assert clips.get([ids[1]])[0] is first[1] and clips.get([ids[0]])[0] is first[0] and stems == ids[:2]
    monkeypatch.setattr(clip_cache, "CLIP_BYTES", 2 * first[1].nbytes)
    clips.get([ids[2]])  # the second was shown the longest ago, and goes
    assert clips.size == sum(clip.nbytes for clip in clips.clips.values()) <= clip_cache.CLIP_BYTES
    assert list(clips.clips) == [ids[0], ids[2]]
    again = clips.get(ids[:3])  # more than fits, and all of it is handed over
    assert [clip.problem for clip in again] == [None] * 3 and stems == [*ids[:3], ids[1]]


def test_oracle_retrieval_shows_the_right_and_the_best_wrong_video(world, agent, run, queries):
    """A policy that always matches: half right by chance, and right about the moment where the video is."""
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    agent.script = lambda *_: MATCH
    right, wrong = run(agent, "oracle-right"), run(agent, "oracle-wrong")
    assert len(agent.requests) == 2 * len(queries)
    assert metrics.ver_hits(right).all() and not metrics.ver_hits(wrong).any()
    by_hand = metrics.grounding([(1.0, 4.0)] * len(queries), [query.span for query in queries])
    for m in metrics.THRESHOLDS:
        hits = metrics.reaches(metrics.moment_ious(right), m)
        assert metrics.percent(hits) == by_hand[f"grounding@{m}"]
        assert (metrics.vcmr_hits(right, m) == hits).all()
    for episode in wrong:
        row = vectors.video_vecs @ vectors.query_vec(episode.desc_id)
        row[vectors.column(episode.gt_video)] = -9
        assert (
            episode.turns[0].shown_id == vectors.video_ids[row.argmax()] and not episode.turns[0].shown_is_gt
        )


def test_queries_that_do_not_fit_together_walk_in_halves_to_the_same_episodes(agent, run, monkeypatch):
    """Out of memory at the second look of six queries."""
    agent.script = lambda *_: "<query_update>a red dog</query_update>"
    knobs = {"display_rule": "skip_rejected"}  # every look is at another video: none is taken from before
    whole, say, sizes = run(agent, "hqr-blind", "fits", **knobs), runner.EpisodeRunner._reply, []

    def full(self, prompts):
        sizes.append(len(prompts))
        if len(prompts) > 3 and len(sizes) > 2:  # behind the first look and its updates
            raise torch.OutOfMemoryError("CUDA out of memory")
        return say(self, prompts)

    monkeypatch.setattr(runner.EpisodeRunner, "_reply", full)
    with pytest.warns(UserWarning, match="6 at once do not fit in memory: half of eval_batch from now on"):
        halves = run(agent, "hqr-blind", "halved", **knobs)
    untimed = [
        [
            (turn.shown_id, turn.rank_in, turn.rank_out, turn.reply)
            for episode in episodes
            for turn in episode.turns
        ]
        for episodes in (halves, whole)
    ]
    assert untimed[0] == untimed[1] and len(halves) == len(whole)
    assert sizes[:2] == [6, 6] and sizes[2] > 3 >= max(sizes[3:])


def test_an_unknown_system_is_one_line(world):
    with pytest.raises(InputError, match="hqr-unseen: no such system; there are zs, walkdown, rerank"):
        evaluate.run_system(world, "charades", "hqr-unseen")


@pytest.mark.parametrize(
    ("name", "like", "trained"),
    [
        ("sft", "sqr", ["sft/sft"]),
        ("walkdown-ft", "walkdown", ["sft/ft"]),
        ("vsr1-single", "sqr", ["grpo/vsr1-single"]),
        ("zs", "zs", []),
    ],
)
def test_a_trained_system_gets_the_weights_of_its_stages_trained_now(world, monkeypatch, name, like, trained):
    calls = []

    def stage(module, default):
        def train(profile, dataset, name=default):
            calls.append(f"{module}/{name}")
            return f"{dataset}/{calls[-1]}"

        return train

    monkeypatch.setattr(evaluate.sft, "train", stage("sft", "sft"))
    monkeypatch.setattr(evaluate.grpo, "train", stage("grpo", "vsr1"))
    weights = f"charades/{trained[-1]}" if trained else None
    assert evaluate.trained_weights(world, "charades", name) == (like, weights) and calls == trained


def test_vectors_are_computed_before_a_system_runs_on_them(world, search_engine, agent, monkeypatch):
    """A changed knob of the engine's input makes new vectors, and not an evaluation on the old ones."""
    monkeypatch.setattr(runner, "load_pair", lambda *_: (search_engine, agent))
    profile = dataclasses.replace(world, instruction="Find it.", name="another", max_new_tokens=15)
    for part in ("corpus", "videos"):
        shutil.copytree(world.data_dir("charades") / part, profile.data_dir("charades") / part)
    assert not (profile.data_dir("charades") / "embed").exists()
    assert len(read_episodes(evaluate.run_system(profile, "charades", "zs"))) == 8


def test_two_processes_may_link_the_same_episodes(tmp_path):
    """The second finds the link of the first, whatever it saw before."""
    (tmp_path / "zs").mkdir()
    (tmp_path / "zs.jsonl").symlink_to("elsewhere")
    for _ in range(2):
        assert evaluate._link(tmp_path / "zs") == tmp_path / "zs.jsonl"
        assert os.readlink(tmp_path / "zs.jsonl") == "zs/episodes.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zs", "zs.jsonl"]


def test_a_policy_without_heads_is_not_evaluated_with_random_ones(world, search_engine, agent, monkeypatch):
    base = policy.Policy(agent.model, copy.deepcopy(agent.tokenizer), None, None, 4096)
    monkeypatch.setattr(runner.checkpoints, "load", lambda *_: base)
    with pytest.raises(InputError, match="me/mine: no soft-query heads in it"):
        runner.load_pair(world, runner.SYSTEMS["sqr"], "me/mine")
    _, untrained = runner.load_pair(world, runner.SYSTEMS["sqr-untrained"], "me/mine")
    assert untrained.heads is not None


def test_ranks_by_depth_computed_again_are_those_that_the_loop_recorded(world, agent, run):
    episodes = run(agent, "sqr")
    ranks = soft_token_sweep.ranks_by_depth(world, "charades", "its weights", episodes)
    for episode in episodes:
        by_video, first = ranks[episode.desc_id], episode.turns[0]
        assert by_video[episode.gt_video] == list(first.rank_by_depth)
        assert all(by_video[video][depth] == 1 for depth, video in enumerate(first.top1_by_depth))
    assert len({tuple(episode.turns[0].rank_by_depth) for episode in episodes}) > 3
    assert soft_token_sweep.write_ranks(world, "charades", episodes[:1]) is None  # no policy was trained
