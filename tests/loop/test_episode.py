"""The loop without a model: queries are words, videos are letters, and what an episode needs stands in a table."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
import weakref

import pytest

from vsr1.config import InputError
from vsr1.data.annotations import Query
from vsr1.evaluation import metrics
from vsr1.loop import records
from vsr1.loop.episode import rank_fallback, run_episodes
from vsr1.loop.records import ORIGINAL, Cost, Ranking, Refinement, Run, Verification, read_episodes
from vsr1.loop.replies import read_reply

REFINE, END = 99, 98  # ids
MATCHED = "<think> it is there </think> <answer>matched</answer> <start>2.5</start> <end>9.5</end> <REFINE>"
REJECTED = "<think> no dog </think> <answer>not_matched</answer> <REFINE>"


def read(text, **options):
    """A reply of the SQR layout whose ids hold REFINE as often as the text does."""
    ids = [*range(5), *[REFINE] * text.count("<REFINE>"), END]
    return read_reply(text, ids, **{"layout": "sqr", "refine_id": REFINE} | options)


# --- Replies


@pytest.mark.parametrize(
    ("text", "matched", "span", "strict"),
    [
        (MATCHED, True, (2.5, 9.5), True),
        (REJECTED, False, None, True),
        ("", None, None, False),
        ("I see a dog.", None, None, False),
        (MATCHED.replace("2.5", "12.5"), True, (9.5, 12.5), True),  # reversed: swapped, and the layout holds
        (MATCHED.replace("<start>2.5</start>", ""), True, None, False),
        (MATCHED.replace("</end>", ""), True, None, False),  # an open tag does not count
        (MATCHED.replace("2.5", "around 2.5 s, or 3"), True, (2.5, 9.5), False),
        (MATCHED.replace("2.5", "nan inf 1e999 -.5e1"), True, (-5.0, 9.5), False),  # the first finite number
        (MATCHED.replace("2.5", "soon"), True, None, False),
        (MATCHED.replace("it is there", " "), True, (2.5, 9.5), False),  # an empty trace
        (MATCHED.replace("it is there", "at <0.5 seconds> a < b"), True, (2.5, 9.5), True),
        ("Sure! " + MATCHED, True, (2.5, 9.5), False),  # words outside the tags
        (MATCHED + " Bye.", True, (2.5, 9.5), False),
        (REJECTED + " <REFINE>", False, None, False),  # twice
        (REJECTED.replace("</think>", "</think> <think> but </think>"), False, None, False),
        # What was only thought does not count, and then the first closed answer does.
        ("<think> <answer>matched</answer> </think> " + REJECTED, False, None, False),
        (REJECTED.replace("</think>", ""), False, None, False),
        (REJECTED + " <answer>matched</answer>", False, None, False),
        (REJECTED.replace("<answer>not", "<answer>oh <answer>not"), False, None, False),
        ("<ANSWER> Matched\n</Answer>", True, None, False),
        *[(f"<answer>{word}</answer>", True, None, False) for word in ("match", " matched ", "MATCH")],
        *[
            (f"<answer>{word}</answer>", False, None, False)
            for word in ("mismatch", "notmatch", "not-matched", "not matched", "Not  Matched")
        ],
        *[
            (f"<answer>{word}</answer>", None, None, False)
            for word in ("", "yes", "matched!", "unmatched", "not_match", "matched or not_matched")
        ],
    ],
)
def test_a_reply_is_read_as_the_method_says(text, matched, span, strict):
    reply = read(text)
    assert (reply.matched, reply.span, reply.strict) == (matched, span, strict)


def test_the_refine_token_counts_by_id_and_not_by_its_letters():
    assert read(REJECTED).has_refine and not read(REJECTED).refine_misplaced
    assert not read(REJECTED, refine_id=None).has_refine  # a policy without the token
    spelled = read_reply(REJECTED, [1, 2, 3, END], layout="sqr", refine_id=REFINE)
    assert not spelled.has_refine and not spelled.strict and spelled.matched is False


def test_a_refine_token_that_words_follow_is_misplaced_even_if_another_stands_at_the_end():
    early = "<think> no <REFINE> dog </think> <answer>not_matched</answer>"
    for text, misplaced in {
        early: True,
        early + " <REFINE>": True,
        REJECTED + " <REFINE>": False,
        REJECTED + "<|endoftext|>\n": False,
        REJECTED + " so": True,
    }.items():
        assert read(text).refine_misplaced == misplaced, text
    assert not read(early, refine_id=None).refine_misplaced


def test_a_reply_cut_at_the_limit_is_read_but_is_not_strict():
    cut = read(MATCHED, ended=False)
    assert (cut.matched, cut.span, cut.strict, cut.ended) == (True, (2.5, 9.5), False, False)


@pytest.mark.parametrize(
    ("text", "update", "strict"),
    [
        (
            "<think> a </think> <answer>not_matched</answer> <query_update> red\n dog </query_update>",
            "red dog",
            True,
        ),
        ("<think> a </think> <answer>not_matched</answer> <query_update>  </query_update>", None, False),
        ("<think> a </think> <answer>not_matched</answer> <query_update>red dog", None, False),
        ("<think> a </think> <answer>not_matched</answer>", None, False),
        ("<think> a </think> <answer>matched</answer> <start>1.0</start> <end>2.0</end>", None, True),
        ("<think> <query_update>cat</query_update> </think> <query_update>dog</query_update>", "dog", False),
    ],
)
def test_an_update_in_words_is_read_from_the_reply(text, update, strict):
    reply = read_reply(text, [1], layout="hqr")
    assert (reply.update, reply.strict) == (update, strict)


def test_each_layout_is_strict_about_its_own_ending():
    plain = REJECTED.removesuffix(" <REFINE>")
    assert read_reply(plain, [1]).strict and not read(plain).strict
    assert not read_reply(REJECTED, [1, REFINE], refine_id=REFINE).strict


def test_reading_never_fails_and_never_believes_what_is_not_there():
    rng = random.Random(0)
    parts = "<think> </think> <answer> </answer> matched not_matched <start> </start> <end> </end>".split()
    parts += ["3", "-1e5", "nan", "<REFINE>", "<|im_end|>", "\n", " ", "<", "½", "٣"]
    for _ in range(3000):
        text = "".join(rng.choices(parts, k=rng.randrange(20)))
        reply = read(text)
        answer = text.rpartition("</think>")[2]
        assert reply.matched is None or ("<answer>" in answer and "</answer>" in answer)
        assert reply.span is None or reply.span[0] <= reply.span[1]
        assert reply.has_refine == ("<REFINE>" in text)
        if reply.strict:
            assert reply.has_refine and not reply.refine_misplaced and reply.matched is not None
            assert text.count("<think>") == text.count("</think>") == text.count("<REFINE>") == 1


# --- A world of letters: a state is the tuple of updates so far, a ranking a word whose letters are the videos


class World:
    """Rankings by (text, state), replies by (text, video); counts what it was asked."""

    def __init__(self, rankings, replies, broken=()):
        self.rankings, self.replies, self.broken = rankings, replies, broken
        self.verified, self.refined = [], []

    def search(self, pairs):
        assert pairs
        orders = [(query, self.rankings[query.text, state]) for query, state in pairs]
        return [
            Ranking(word.index(query.video) + 1 if query.video in word else None, 0, tuple(word), 0.5, 0.9)
            for query, word in orders
        ]

    def ask(self, pairs):
        assert pairs
        self.verified += [(query.text, video) for query, video in pairs]
        verifications = []
        for query, video in pairs:
            text = self.replies.get((query.text, video), REJECTED)
            if video in self.broken:
                verifications.append(Verification(None, problem="no video stream in the file"))
            else:
                verifications.append(Verification(read(text), 8.0, Cost(1.0, 6, 100, 0), state=video))
        return verifications

    def refine(self, rejected):
        """The state grows by the video that was rejected, as it would by its latents; C = 1 keeps the latest."""
        assert rejected
        self.refined += [(query.text, verification.state) for query, verification, _ in rejected]
        steps = []
        for _, verification, _ in rejected:
            state = (verification.state,) if verification.reply.has_refine else None
            sweep = () if state is None else (state, state)
            steps.append(Refinement("sqr", state, 8, 9, cost=Cost(0.5, 8, 8, 1), by_depth=sweep))
        return steps


def query(text, video, span=(2.0, 8.0), key=None):
    return Query(key if key is not None else sum(map(ord, text)), text, video, span, text, 8.0)


def run(turns=3, **options):
    return Run("charades", "test", "sqr", turns, 1, 42, **options)


def episodes_of(world, queries, turns=3, **options):
    return run_episodes(queries, world.search, world.ask, world.refine, run(turns, **options))


def shown(episode):
    return "".join(turn.shown_id for turn in episode.turns)


def test_a_match_ends_the_walk_and_a_rejection_sends_the_query_back_to_search():
    world = World({("q", ()): "abc", ("q", ("a",)): "bac"}, {("q", "b"): MATCHED})
    (episode,) = episodes_of(world, [query("q", "b")])
    first, second = episode.turns
    assert (episode.stop_reason, episode.rank_orig, shown(episode)) == ("matched", 2, "ab")
    assert (first.rank_in, first.rank_out, first.top1_out, first.shown_is_gt) == (2, 1, "b", False)
    assert (second.rank_in, second.rank_out, second.shown_is_gt) == (1, None, True)
    assert second.span_ms == (2500, 8000)  # 9.5 lies behind the video and is cut there
    assert second.reply.span == (2.5, 9.5) and second.iou == 5500 / 6000
    assert first.verify_cost.generated + first.refine_cost.generated == 14 and second.refine_cost == Cost()


def test_a_span_in_a_wrong_video_overlaps_nothing():
    (episode,) = episodes_of(World({("q", ()): "ab"}, {("q", "a"): MATCHED}), [query("q", "b")])
    assert episode.turns[0].span_ms == (2500, 8000) and episode.turns[0].iou == 0.0
    assert episode.stop_reason == "matched"


def test_refine_is_handed_the_state_that_the_query_is_in():
    """With every block carried, the state grows by one video a turn."""
    orders = {(): "abc", ("a",): "bac", ("a", "b"): "acb", ("a", "b", "a"): "cab"}
    world = World({("q", state): order for state, order in orders.items()}, {})

    def carry(rejected):
        return [Refinement("sqr", (*state, verification.state), 8, 9) for _, verification, state in rejected]

    rules = dataclasses.replace(run(reuse=False), carry_blocks=3)
    (episode,) = run_episodes([query("q", "c")], world.search, world.ask, carry, rules)
    assert shown(episode) == "aba" and [turn.rank_out for turn in episode.turns] == [3, 2, 1]


def test_the_last_turn_refines_and_nobody_looks():
    world = World({("q", ()): "ab", ("q", ("a",)): "ba", ("q", ("b",)): "ab"}, {})
    (episode,) = episodes_of(world, [query("q", "b")], 2)
    assert (episode.stop_reason, shown(episode)) == ("budget", "ab")
    assert (episode.turns[-1].top1_out, episode.turns[-1].rank_out) == ("a", 2)
    assert world.verified == [("q", "a"), ("q", "b")]


def test_what_a_verification_holds_is_freed_before_the_next_turn_asks():
    """It holds the KV cache of its whole batch: two of them at once cost gigabytes."""
    world, alive = World({("q", ()): "ab", ("q", ("a",)): "ba", ("q", ("b",)): "ab"}, {}), weakref.WeakSet()

    class KVCache(str):
        pass

    def ask(pairs):
        assert not alive
        caches = [KVCache(video) for _, video in pairs]
        alive.update(caches)
        return [Verification(read(REJECTED), 8.0, state=cache) for cache in caches]

    def refine(rejected):
        return [Refinement("sqr", (str(verification.state),), 8, 9) for _, verification, _ in rejected]

    (episode,) = run_episodes([query("q", "b")], world.search, ask, refine, run(3, reuse=False))
    assert shown(episode) == "aba"


def test_an_unknown_verdict_goes_on_and_a_reply_without_the_token_ends_it():
    world = World(
        {("u", ()): "ab", ("u", ("a",)): "ba", ("n", ()): "ab"},
        {
            ("u", "a"): "<answer>perhaps</answer> <REFINE>",
            ("n", "a"): "<answer>not_matched</answer>",
            ("u", "b"): MATCHED,
        },
    )
    unknown, without = episodes_of(world, [query("u", "b"), query("n", "b")])
    assert unknown.turns[0].reply.matched is None and shown(unknown) == "ab"
    assert (without.stop_reason, shown(without), without.turns[0].rank_out) == ("no_refine", "a", None)
    assert without.turns[0].refine_cost.generated == 8  # what was spent in vain is counted


def test_the_plain_baseline_looks_once():
    world = World({("q", ()): "ab"}, {})
    (episode,) = run_episodes([query("q", "b")], world.search, world.ask, None, run(1))
    assert (episode.stop_reason, shown(episode), episode.turns[0].refine_kind) == ("no_refine", "a", None)


def test_walking_down_shows_the_first_ranking_in_its_order_until_a_match():
    world = World({("q", ()): "abcd", ("r", ()): "abcd"}, {("q", "c"): MATCHED})
    rules = run(3, display_rule="skip_rejected", reuse=False)
    queries = [query("q", "c"), query("r", "d")]
    episodes = run_episodes(queries, world.search, world.ask, rank_fallback, rules)
    assert [shown(episode) for episode in episodes] == ["abc", "abc"]
    assert [episode.stop_reason for episode in episodes] == ["matched", "budget"]
    assert {turn.rank_in for turn in episodes[0].turns} == {3}, "ranks are never altered by what is shown"


def test_a_gallery_that_is_exhausted_ends_the_walk():
    world = World({("q", ()): "ab"}, {})
    rules = run(3, display_rule="skip_rejected", reuse=False)
    (episode,) = run_episodes([query("q", "b")], world.search, world.ask, rank_fallback, rules)
    assert (shown(episode), episode.stop_reason) == ("ab", "exhausted")


def test_a_fixed_point_is_recorded_again_without_asking_and_equals_asking_again():
    rankings = {("q", ()): "abc", ("q", ("a",)): "acb"}
    rankings |= {("r", ()): "abc", ("r", ("a",)): "bac", ("r", ("b",)): "abc"}
    queries = [query("q", "b"), query("r", "c")]
    reusing, asking = World(rankings, {}), World(rankings, {})
    reused = episodes_of(reusing, queries, 4)
    plain = episodes_of(asking, queries, 4, reuse=False)
    assert [shown(episode) for episode in reused] == ["aaaa", "abab"]
    assert [turn.reused for turn in reused[0].turns] == [False, True, True, True]
    assert len(reusing.verified) == 3 and len(asking.verified) == 8 and len(reusing.refined) == 3
    free = {"reused": False, "verify_cost": Cost(), "refine_cost": Cost()}
    for episode, other in zip(reused, plain, strict=True):
        for a, b in zip(episode.turns, other.turns, strict=True):
            assert dataclasses.replace(a, **free) == dataclasses.replace(b, **free)
    assert [turn.rank_in for turn in reused[0].turns[:2]] == [2, 3]  # where it stands now, not where it stood


def test_older_blocks_forbid_reuse():
    carried = dataclasses.replace(run(2), carry_blocks=2)
    with pytest.raises(AssertionError, match="older blocks"):
        run_episodes([query("q", "a")], None, None, None, carried)


def test_a_video_that_cannot_be_read_and_a_right_video_without_vector_are_recorded_failures():
    world = World({("q", ()): "ab", ("gone", ()): "ab"}, {}, broken="a")
    broken, gone = episodes_of(world, [query("q", "b"), query("gone", "z")])
    assert (broken.stop_reason, broken.problem) == ("problem", "a: no video stream in the file")
    assert broken.turns[0].reply is None and broken.turns[0].shown_id == "a"
    assert (gone.stop_reason, gone.turns, gone.rank_orig) == ("problem", (), None)
    assert "no vector" in gone.problem
    assert world.verified == [("q", "a")]


def test_the_depth_sweep_starts_with_the_ranking_before_and_ends_with_the_refined_one():
    rankings = {("q", ()): "cab", ("q", (1,)): "abc", ("q", (2,)): "bac"}
    world = World(rankings, {})

    def sweep(rejected):
        return [Refinement("sqr", (2,), 2, 3, by_depth=((1,), (2,))) for _ in rejected]

    (episode,) = run_episodes([query("q", "b")], world.search, world.ask, sweep, run(1))
    assert episode.turns[0].rank_by_depth == (3, 2, 1) and episode.turns[0].top1_by_depth == ("c", "a", "b")
    assert episode.turns[0].rank_out == 1


def a_world(seed, count=40):
    """A random world: every ranking and every reply drawn once."""
    rng = random.Random(seed)
    letters = "abcdef"
    texts = [f"query {i}" for i in range(count)]
    shuffled = lambda: "".join(rng.sample(letters, len(letters)))  # noqa: E731
    rankings = {(t, state): shuffled() for t in texts for state in [(), *[(letter,) for letter in letters]]}
    says = [MATCHED, REJECTED, REJECTED, "<answer>hm</answer> <REFINE>", "<answer>not_matched</answer>"]
    replies = {(t, letter): rng.choice(says) for t in texts for letter in letters}
    queries = [query(t, rng.choice(letters + "z"), key=i) for i, t in enumerate(texts)]
    return World(rankings, replies, broken="f"), queries


@pytest.mark.parametrize("how", ["top1", "skip_rejected"])
def test_all_queries_in_step_equal_each_alone_and_in_another_order(how):
    world, queries = a_world(1)
    together = episodes_of(world, queries, display_rule=how)
    assert {episode.stop_reason for episode in together} == {"matched", "no_refine", "budget", "problem"}
    assert [episodes_of(world, [query], display_rule=how)[0] for query in queries] == together
    assert episodes_of(world, queries[::-1], display_rule=how)[::-1] == together


def test_the_loop_in_step_equals_the_method_s_lines_for_one_query():
    """docs/method.md section 2, line by line, for one query at a time."""
    world, queries = a_world(2)
    for query, episode in zip(queries, episodes_of(world, queries), strict=True):
        state, stop, trail = ORIGINAL, "budget", []
        for _ in range(3):
            ranked = world.rankings[query.text, state]
            if query.video not in ranked:
                stop = "problem"
                break
            text = world.replies[query.text, ranked[0]]
            trail.append((ranked[0], ranked.index(query.video) + 1))
            if ranked[0] == "f":
                stop = "problem"
            elif "<answer>matched" in text:
                stop = "matched"
            elif "<REFINE>" not in text:
                stop = "no_refine"
            if stop != "budget":
                break
            state = (ranked[0],)
        assert [(turn.shown_id, turn.rank_in) for turn in episode.turns] == trail
        assert episode.stop_reason == stop


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_smaller_budget_is_read_off_a_longer_run(budget):
    world, queries = a_world(3)
    cut = metrics.within(episodes_of(world, queries, 3), budget)
    direct = episodes_of(world, queries, budget)
    assert [episode.run for episode in cut] == [episode.run for episode in direct]
    assert cut == direct


def test_the_loop_runs_without_torch():
    code = "import sys, vsr1.loop.episode; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Files


@pytest.fixture
def episode_file(tmp_path):
    world, queries = a_world(5)
    episodes = episodes_of(world, queries)
    path = tmp_path / "sqr.jsonl"
    records.write_episodes(path, run(), episodes)
    return path, episodes


def test_what_was_written_is_read_back(episode_file):
    path, episodes = episode_file
    assert read_episodes(path) == episodes
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _line(number, change):
    def damage(lines):
        row = json.loads(lines[number - 1])
        change(row)
        return [*lines[: number - 1], json.dumps(row), *lines[number:]]

    return damage


DAMAGE = {
    "line 3: not JSON": lambda lines: [*lines[:2], lines[2][: len(lines[2]) // 2], *lines[3:]],
    "line 2: stop_reason is missing": _line(2, lambda row: row.pop("stop_reason")),
    "line 2: no such knob 'rank'": _line(2, lambda row: row.update(rank=1)),
    "line 4: desc_id: should be a valid integer, found '7'": _line(4, lambda row: row.update(desc_id="7")),
    "line 4: gt_span_ms: 1 is missing": _line(4, lambda row: row.update(gt_span_ms=[1])),
    "line 4: turns: should be a valid array": _line(4, lambda row: row.update(turns=None)),
    "line 5: must be an object": lambda lines: [*lines[:4], "[1, 2]", *lines[5:]],
    "line 1: version: should be 2, found 1": _line(1, lambda row: row.update(version=1)),
    "line 1: run: method is missing": _line(1, lambda row: row["run"].pop("method")),
    "39 episodes, its first line says 40": lambda lines: lines[:-1],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(episode_file, message):
    path, _ = episode_file
    path.write_text("".join(line + "\n" for line in DAMAGE[message](path.read_text().splitlines())))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_episodes(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_an_error_and_never_a_shorter_run(episode_file):
    path, _ = episode_file
    content = path.read_bytes()
    for end in itertools.chain(range(0, 400, 7), range(400, len(content) - 1, 997)):
        path.write_bytes(content[:end])
        with pytest.raises(InputError):
            read_episodes(path)
