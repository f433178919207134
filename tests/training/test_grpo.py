"""Stage 2: rewards by hand, the objective against TRL's, replay against rollout, sharing, a run that is killed."""

import copy
import dataclasses
import itertools
import json
import math
import types
from collections import Counter

import numpy as np
import pytest
import torch
import two_processes
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import QUERIES, VIDEOS, Shelf, changed, random_policy

from vsr1 import cache, config
from vsr1.data import annotations, clip_cache, video_reader
from vsr1.experiments import training_curves
from vsr1.loop import sqr
from vsr1.models import checkpoints, embedding, inputs
from vsr1.training import common, grpo, objective, rewards, rollout, sft


def made_starts(vectors):
    queries = [annotations.Query(n + 1, text, f"v{n}", (0.0, 4.0), "", 8.0) for n, text in enumerate(QUERIES)]
    return rollout.make_prompts(queries, vectors, negatives=3, seed=0)


def knobs():
    small = {
        "max_new_tokens": 16,
        "grpo_group": 4,
        "grpo_prompts_per_step": 2,
        "grpo_steps": 4,
        "grpo_lr": 1e-3,
        "save_minutes": 0.0,
    }
    official = {"grpo_exclude_sft_queries": False, "scale_rewards": "group"}
    return dataclasses.replace(config.load("smoke"), **small, **official, grpo_head_lr=1e-3)


@pytest.fixture(scope="module")
def starts(vectors):
    return made_starts(vectors)


@pytest.fixture
def profile():
    return knobs()


@pytest.fixture
def short(profile):
    """Where a test asks how a run goes, not what it learns: two short replies to each prompt."""
    return dataclasses.replace(profile, grpo_group=2, max_new_tokens=6)


def few_words(policy):
    """A random policy that knows six words, of which one ends a reply and one asks for a search."""
    number = torch.arange(len(policy.banned_tokens))
    return changed(policy, banned_tokens=(number < 20) | (number > 25), stop_token_id=20, refine_token_id=21)


def sampler(profile, search, vectors, recipe="m3", shelf=None):
    agent, recipe = few_words(random_policy()), rollout.VARIANTS[recipe]
    agent.settings = dataclasses.replace(agent.settings, carry_blocks=recipe.carry, n_soft=3)
    return rollout.RolloutWorker(profile, "charades", recipe, search, agent, vectors, shelf or Shelf())


@pytest.fixture
def rolled_out(profile, search, vectors, starts):
    worker = sampler(profile, search, vectors)
    members = [dataclasses.replace(s, group=g, member=m) for g, s in enumerate(starts[:2]) for m in range(4)]
    return worker, [row for rows in worker.rollout(members, [1]) for row in rows]


# --- starts, rewards, advantages -------------------------------------------------------------------------------------


def test_starts_show_the_first_search_and_accepting_is_right_as_often_as_rejecting(vectors, starts):
    scores = vectors.query_vecs @ vectors.video_vecs.T
    for start, row in zip(starts[:3], scores, strict=True):
        order = [VIDEOS[column] for column in np.argsort(-row)]
        assert (
            start.first_video == order[0]
            and list(start.negatives) == [v for v in order if v != start.video][:3]
        )
    hits = sum(start.first_video == start.video for start in starts)
    assert hits == len(starts) - hits and len(starts) >= 4
    assert all(start.first_video == start.video for start in starts[3:])


def turn(matched, right, iou=0.0, refine=True, strict=True, text=""):
    reply = types.SimpleNamespace(matched=matched, strict=strict, has_refine=refine, text=text)
    return types.SimpleNamespace(reply=reply, shown_is_gt=right, iou=iou)


def parts(*turns, chances, dataset="didemo", **options):
    episode = types.SimpleNamespace(turns=turns, run=types.SimpleNamespace(dataset=dataset))
    return rewards.reward_parts(episode, [(chance, 0.25) for chance in chances], **options)


def test_an_episode_of_two_turns_earns_what_the_method_says():
    """A right rejection that leads to the right moment shares in its overlap; nothing is summed over turns."""
    first, second = parts(turn(False, False), turn(True, True, 0.6), chances=[0.7, 0.9])
    assert first == {"verification": 1, "format": 1, "refine_token": 1, "grounding": 0.6, "retrieval": 0.7}
    assert second == {"verification": 1, "format": 1, "refine_token": 1, "grounding": 0.6, "retrieval": 0.9}
    first, second = parts(turn(False, True), turn(True, True, 0.6, strict=False), chances=[0.7, 0.9])
    assert (first["verification"], first["grounding"]) == (-1, 0) and (
        second["grounding"],
        second["format"],
    ) == (0.6, 0)
    (only,) = parts(turn(None, False, refine=False), chances=[None])
    assert (only["verification"], only["refine_token"], only["retrieval"]) == (-1, 0, 0)
    (only,) = parts(turn(True, False, 0.0), chances=[0.5])
    assert (only["verification"], only["grounding"]) == (-1, 0)


def test_the_official_retrieval_reward_is_a_difference():
    assert parts(turn(False, False), chances=[0.7], retrieval_reward="delta")[0][
        "retrieval"
    ] == pytest.approx(0.45)
    assert (
        parts(turn(False, False, refine=False), chances=[None], retrieval_reward="delta")[0]["retrieval"]
        == -0.3
    )


# Three members of one start; at turn 2, two of them see v1 and one v2.
TURNS = [(1, "v0", 1.0), (1, "v0", 1.0), (1, "v0", 1.0), (2, "v1", 1.0), (2, "v1", 3.0), (2, "v2", 5.0)]


def test_rows_are_compared_by_prompt():
    """The spread of (1, 3) by hand: the root of 2."""
    gains, expected = [0, 0, 0, -1 / 2**0.5, 1 / 2**0.5, None], (2, 1, 0.5, 1, 2**0.5 / 2)
    parts = dict.fromkeys(("verification", "format", "refine_token", "grounding", "retrieval"), 0.0)
    rows = [{"group": 0, "t": t, "shown": shown, "reward": reward} for t, shown, reward in TURNS]
    advantages = rewards.advantages([r["reward"] for r in rows], [(row["t"], row["shown"]) for row in rows])
    assert [gain and round(gain, 3) for gain in advantages] == [gain and round(gain, 3) for gain in gains]
    line = grpo.summarise([row | {"length": 1, "right": True, "parts": parts} for row in rows])
    keys = ("groups", "zero_std_groups", "frac_zero_std", "singletons", "reward_std")
    assert tuple(line[key] for key in keys) == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_step_learns_from_the_comparison_that_the_profile_names(profile, search, vectors, starts, scale):
    shared = ("group", "t", "shown")
    profile = dataclasses.replace(profile, scale_rewards=scale, grpo_group=8)
    trainer = begin(profile, search, vectors)
    line, rows = trainer.train_step(1, starts[3:])
    prompts = {(row["group"], row["t"], row["shown"]) for row in rows}
    assert len(prompts) > len({prompt[:2] for prompt in prompts}), "some second looks are at different videos"
    for row in rows:
        group_rewards = [other["reward"] for other in rows if all(other[key] == row[key] for key in shared)]
        if len(group_rewards) == 1:
            assert row["advantage"] is None
        else:
            over = group_rewards if scale == "group" else [other["reward"] for other in rows]
            gain = (row["reward"] - np.mean(group_rewards)) / (np.std(over, ddof=1) + 1e-4)
            assert row["advantage"] == pytest.approx(gain)
    sizes = list(Counter(tuple(row[key] for key in shared) for row in rows).values())
    assert (line["groups"], line["singletons"]) == (sum(size > 1 for size in sizes), sizes.count(1))


def test_components_add_up_and_gdpo_compares_each_by_itself(profile, search, vectors, starts):
    """One rollout, three ways of comparing: as logged, by plain loops over the same rows."""
    profile, learned = dataclasses.replace(profile, grpo_group=8), {}
    for name, change in {
        "grpo": {},
        "gdpo": {"grpo_advantages": "gdpo"},
        "shuffled": {"shuffle_advantages": True},
    }.items():
        trainer = begin(dataclasses.replace(profile, **change), search, vectors)
        line, learned[name] = trainer.train_step(1, starts[3:])
        assert sum(line["shares"].values()) == pytest.approx(1)
    weights, by_group = trainer.worker.weights, {}
    for number, row in enumerate(learned["grpo"]):
        by_group.setdefault((row["group"], row["t"], row["shown"]), []).append(number)
        assert (row["components"] is None) == (row["advantage"] is None)
        if row["components"]:
            assert sum(row["components"].values()) == pytest.approx(row["advantage"], abs=1e-6)
    sums = [row["components"] and sum(row["components"].values()) for row in learned["gdpo"]]
    spread = np.std([value for value in sums if value is not None], ddof=1)
    for rows in (rows for rows in by_group.values() if len(rows) > 1):
        for name, weight in dataclasses.asdict(weights).items():
            values = np.array([learned["gdpo"][number]["parts"][name] for number in rows])
            alone = weight * (values - values.mean()) / (values.std(ddof=1) + 1e-4)
            assert [learned["gdpo"][number]["components"][name] for number in rows] == pytest.approx(alone)
        assert [learned["gdpo"][number]["advantage"] for number in rows] == pytest.approx(
            [sums[number] / (spread + 1e-4) for number in rows]
        )
        values = [[learned[name][number]["advantage"] for number in rows] for name in ("grpo", "shuffled")]
        assert sorted(values[0]) == pytest.approx(sorted(values[1]))
    apart = [
        (a["advantage"], b["advantage"]) for a, b in zip(learned["grpo"], learned["shuffled"], strict=True)
    ]
    assert any(a is not None and abs(a - b) > 1e-3 for a, b in apart)


def test_what_changes_the_outcome_is_in_the_key_of_the_step(monkeypatch, tmp_path, profile):
    key = lambda profile: cache.fingerprint(grpo.train(profile, "charades", stage_1=tmp_path))  # noqa: E731
    monkeypatch.setattr(cache, "build", lambda target, inputs, work, distributed: inputs)
    for change in (
        {"retrieval_reward": "delta"},
        {"scale_rewards": "batch"},
        {"grpo_advantages": "gdpo"},
        {"shuffle_advantages": True},
        {"disabled_rewards": ("retrieval",)},
        {"grpo_exclude_sft_queries": True},
    ):
        assert key(dataclasses.replace(profile, **change)) != key(profile), change
    for change in (
        {"max_zero_std": 0.5},  # a stopped run may go on
        {"max_skipped": 0.5},
        {"save_minutes": 3.0},
    ):
        assert key(dataclasses.replace(profile, **change)) == key(profile), change


def test_stage_2_makes_sure_that_stage_1_is_current(monkeypatch, tmp_path, profile):
    """Of the same profile and data set, unless it is told where to start from."""
    calls, current = [], tmp_path / "sft"
    monkeypatch.setattr(sft, "train", lambda *args: calls.append(args) or current)
    monkeypatch.setattr(cache, "build", lambda target, inputs, work, distributed: work.args)
    assert current in grpo.train(profile, "charades") and calls == [(profile, "charades")]
    assert tmp_path in grpo.train(profile, "charades", stage_1=tmp_path) and len(calls) == 1


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_stage_2_asks_as_stage_1_does(rolled_out):
    """Token by token, each video that the rollouts were shown, as the batches of stage 1 lay it out."""
    worker, rows = rolled_out
    for row in rows:
        row_of_stage_1 = {"query": row.query.text, "shown": row.shown, "caption": None}
        (prompt,) = sft.Collator(worker.policy, worker.clips)._prompts([row_of_stage_1])
        assert row.prompt.ids == prompt.ids and torch.equal(row.prompt.video.patches, prompt.video.patches)


def test_a_reward_that_is_switched_off_counts_nothing_and_soft_tokens_learn_as_before(
    profile, search, vectors, starts
):
    """The same rollouts with and without it: what heads learn from is InfoNCE, which is no reward."""
    rewarded, heads = {}, {}
    for off in ((), ("retrieval",)):
        worker = sampler(dataclasses.replace(profile, disabled_rewards=off), search, vectors, "vsr1")
        members = [dataclasses.replace(starts[0], member=m) for m in range(4)]
        rewarded[off] = [row for rows in worker.rollout(members, [1]) for row in rows]
        _, grads = learned(worker, rewarded[off])
        heads[off] = {name: grad for name, grad in grads.items() if name.startswith("heads.")}
    weight = rewards.REWARD_WEIGHTS["charades"].retrieval
    for step, step_without in zip(rewarded[()], rewarded["retrieval",], strict=True):
        assert step.ids == step_without.ids and step.reward_parts == pytest.approx(step_without.reward_parts)
        assert step.reward - step_without.reward == pytest.approx(weight * step.reward_parts["retrieval"])
    assert any(row.reward_parts["retrieval"] for row in rewarded[()]) and len(heads[()]) > 6
    for name, grad in heads[()].items():
        torch.testing.assert_close(heads["retrieval",][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_are_read_again_with_the_log_probabilities_they_were_sampled_with(rolled_out):
    worker, rows = rolled_out
    assert {row.t for row in rows} == {1, 2} and {row.latents is None for row in rows} == {True, False}
    for row in rows:
        again = worker.policy.replay([row.prompt], [row.ids], temperature=1.0)
        np.testing.assert_allclose(again.logps[0].tolist(), row.old_logps, atol=1e-5)


def test_rewards_are_those_of_the_soft_tokens_that_stood_in_the_query(rolled_out):
    """The retrieval reward computed from a replayed reply and a softmax written out, at both turns."""
    worker, rows = rolled_out
    refined = [row for row in rows if row.latents is not None]
    assert {len(row.earlier_latents) for row in refined} == {0, 1}
    for row in refined:
        branch = worker.policy.replay([row.prompt], [row.ids]).refine_contexts[0]
        latents = sqr.soft_tokens(worker.policy, [branch], 3)
        carried = torch.cat([*(block[None] for block in row.earlier_latents), latents], dim=1)
        vec = sqr.soft_query(worker.engine, worker.policy.heads, [row.query.text], carried)[0].detach()
        scores = {
            v: float(worker.gallery_vecs[worker.vectors.column(v)] @ vec) / 0.1
            for v in (row.query.video, *row.negatives)
        }
        chance = np.exp(scores[row.query.video]) / np.exp(list(scores.values())).sum()
        assert row.p_positive == pytest.approx(chance, abs=1e-5)
        assert (row.shown in scores) and len(scores) == 1 + len(row.negatives)


def test_an_episode_does_not_look_at_a_video_twice(rolled_out):
    _, rows = rolled_out
    shown = [(row.query.group, row.query.member, row.shown) for row in rows]
    assert len(shown) == len(set(shown))


def test_what_a_start_meets_does_not_depend_on_the_batch_it_is_in(
    rolled_out, profile, search, vectors, starts
):
    _, together = rolled_out
    worker = sampler(profile, search, vectors)
    alone = []
    for group in (1, 0):
        members = [dataclasses.replace(starts[group], group=group, member=m) for m in range(4)]
        alone += [row for rows in worker.rollout(members, [1]) for row in rows]
    key = lambda row: (row.query.group, row.query.member, row.t)  # noqa: E731
    for step, step_alone in zip(sorted(together, key=key), sorted(alone, key=key), strict=True):
        assert step.ids == step_alone.ids and step.reward == pytest.approx(step_alone.reward, abs=1e-5)


def test_one_turn_is_the_first_turn_of_two(profile, search, vectors, starts, rolled_out):
    _, both = rolled_out
    worker = sampler(profile, search, vectors, "vsr1-single")
    members = [dataclasses.replace(s, group=g, member=m) for g, s in enumerate(starts[:2]) for m in range(4)]
    once = [row for rows in worker.rollout(members, [1]) for row in rows]
    firsts = [row for row in both if row.t == 1]
    assert [row.ids for row in once] == [row.ids for row in firsts]
    assert [row.reward_parts["retrieval"] for row in once] == [
        row.reward_parts["retrieval"] for row in firsts
    ]
    assert [row.reward_parts["verification"] for row in once] == [
        row.reward_parts["verification"] for row in firsts
    ]


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_objective_is_trl_s_in_value_and_gradient(tmp_path, beta):
    """Text only, where its trainer is right: the same tokens, masks and advantages."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    policy = random_policy()
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    options |= {"loss_type": "grpo", "epsilon": 0.2, "use_bias_correction_kl": False, "num_generations": 2}
    trainer = GRPOTrainer(
        policy.model,
        lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(str(tmp_path), per_device_train_batch_size=2, temperature=1.0, **options),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}]),
        processing_class=policy.tokenizer,
    )
    trainer.beta, trainer.current_gradient_accumulation_steps = beta, 1
    prompts = [policy.prompt("S", text) for text in QUERIES[:2]]
    policy.banned_tokens = torch.zeros_like(policy.banned_tokens)  # its softmax is over the whole vocabulary
    replies = [
        r.ids for r in policy.reply(prompts, max_new_tokens=9, temperature=1.0, rng=np.random.default_rng(0))
    ]
    replies[1] = replies[1][:5]
    advantages, noise = torch.tensor([0.7, -1.3]), np.random.default_rng(1)
    losses = []
    for way in ("ours", "theirs"):
        policy.model.zero_grad()
        replay = policy.replay(prompts, replies, temperature=1.0)
        if way == "ours":
            shifts = torch.from_numpy(noise.normal(0, 0.3, (2, *replay.logps.shape))).float()
            old_logps, ref_logps = (replay.logps.detach() + shift for shift in shifts)
            loss = objective.policy_loss(
                replay.logps, old_logps, ref_logps, advantages, replay.completion_mask, clip=0.2, beta=beta
            )[0].mean()
        else:
            batch = inputs.collate(prompts, policy.model, policy.tokenizer.pad_token_id)
            completions = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(r) for r in replies], batch_first=True
            )
            options = {"prompt_ids": batch["input_ids"], "prompt_mask": batch["attention_mask"]}
            options |= {
                "completion_ids": completions,
                "completion_mask": replay.completion_mask.int(),
                "advantages": advantages,
            }
            options |= {"old_per_token_logps": old_logps, "ref_per_token_logps": ref_logps}
            options |= {"num_items_in_batch": replay.completion_mask.sum()}
            loss = trainer._compute_loss(policy.model, options)
        loss.backward()
        grads = {name: w.grad.clone() for name, w in policy.model.named_parameters() if w.grad is not None}
        losses.append((loss.detach(), grads))
    (loss, grads), (trl_loss, other) = losses
    torch.testing.assert_close(loss, trl_loss, atol=1e-6, rtol=1e-5)
    assert len(grads) > 40 and grads.keys() == other.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other[name], atol=1e-6, rtol=1e-3, msg=name)


def test_the_objective_is_what_a_double_loop_says():
    rng = np.random.default_rng(3)
    logps, old_logps, ref_logps = (torch.from_numpy(rng.normal(-1, 0.4, (3, 5))) for _ in range(3))
    completion_mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    gains = [1.5, -0.5, 0.2]
    losses, kls, cuts = objective.policy_loss(
        logps, old_logps, ref_logps, torch.tensor(gains), completion_mask, clip=0.2, beta=0.1
    )
    for row, gain in enumerate(gains):
        tokens, kl, cut = [], [], 0
        for column in range(int(completion_mask[row].sum())):
            ratio = np.exp(float(logps[row, column] - old_logps[row, column]))
            away = float(ref_logps[row, column] - logps[row, column])
            value = min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
            cut += value < ratio * gain
            kl.append(np.exp(away) - away - 1)
            tokens.append(0.1 * kl[-1] - value)
        assert losses[row].item() == pytest.approx(np.mean(tokens))
        assert (kls[row].item(), cuts[row].item()) == pytest.approx((np.mean(kl), cut / len(tokens)))


def learned(worker, rows):
    """(loss, gradients) of a fresh Learner, read in as many parts as the knobs ask for."""
    trainer = grpo.GRPOTrainer(worker)
    advantages = rewards.advantages(
        [row.reward for row in rows], [(r.query.group, r.t, r.shown) for r in rows]
    )
    for row, advantage in zip(rows, advantages, strict=True):
        row.advantage = advantage
    compared = [row for row in rows if row.advantage is not None]
    totals = len(compared), sum(row.latents is not None for row in compared)
    parts = trainer._chunks(compared)
    assert sorted(map(id, compared)) == sorted(id(row) for part in parts for row in part)
    loss = sum(trainer.objective(part, totals)[0] for part in parts)
    trainer.optimizer.zero_grad()
    loss.backward()
    grads = {n: w.grad.clone() for n, w in trainer.objective.named_parameters() if w.grad is not None}
    return loss.detach(), grads


def same(result, expected, atol=1e-5):
    torch.testing.assert_close(result[0], expected[0], atol=atol, rtol=1e-4)
    assert result[1].keys() == expected[1].keys() and len(result[1]) > 40
    for name, grad in result[1].items():
        scale = float(expected[1][name].abs().max()) + 1e-3
        torch.testing.assert_close(grad, expected[1][name], atol=1e-4 * scale, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("knob", "value", "count"),
    [("grpo_rollout_batch", 1, 2), ("grpo_micro_batch", 3, None), ("grpo_micro_batch", 1, None)],
)
def test_all_at_once_is_one_after_the_other(rolled_out, knob, value, count):
    """At a time a prompt's replies, which share its reading, three, or one: then each reads it anew."""
    worker, rows = rolled_out
    together = learned(worker, rows)
    worker.knobs = dataclasses.replace(worker.knobs, **{knob: value})
    same(together, learned(worker, rows))
    parts = grpo.GRPOTrainer(worker)._chunks(rows)
    assert len(parts) == count or max(map(len, parts)) == value


def test_another_video_gives_another_loss(rolled_out):
    """A trainer that drops the video would not notice."""
    worker, rows = rolled_out
    before = learned(worker, rows)[0]
    black = {}
    for row in rows:  # the group still shares one
        grid = row.prompt.video.grid
        video = inputs.Video(torch.zeros(math.prod(grid), 3 * 2 * 16 * 16), grid)
        row.prompt = black.setdefault(
            (row.query.group, row.shown), dataclasses.replace(row.prompt, video=video)
        )
    assert abs(learned(worker, rows)[0] - before) > 1e-3


@pytest.mark.parametrize(("recipe", "heads"), [("m1", False), ("vsr1", True), ("m3", True), ("gauss", True)])
def test_the_heads_learn_unless_they_are_frozen(profile, search, vectors, starts, recipe, heads):
    worker = sampler(profile, search, vectors, recipe)
    members = [dataclasses.replace(s, group=g, member=m) for g, s in enumerate(starts[:2]) for m in range(4)]
    _, grads = learned(worker, [row for rows in worker.rollout(members, [1]) for row in rows])
    head_grads = [grad for name, grad in grads.items() if name.startswith("heads.refine_projector")]
    assert bool(head_grads) == heads and all(grad.abs().max() > 0 for grad in head_grads)
    assert all(weight.grad is None for weight in search.model.parameters())
    assert not any("visual" in name for name in grads)


@torch.no_grad()
def test_without_its_adapters_the_policy_is_the_anchor_that_a_copy_would_be(rolled_out):
    worker, rows = rolled_out
    copied = copy.copy(worker.policy)
    copied.model = copy.deepcopy(worker.policy.model).requires_grad_(False)
    prompts, replies = rows[0].prompt, rows[0].ids
    worker.knobs = dataclasses.replace(worker.knobs, lora_rank=4)
    objective_module = grpo.GRPOTrainer(worker).objective
    weights = {name: weight for name, weight in objective_module.named_parameters() if weight.requires_grad}
    for weight in weights.values():  # as if they had learned
        weight += 0.05 * torch.randn(weight.shape, generator=torch.manual_seed(0))
    read = lambda policy: policy.replay([prompts], [replies]).logps  # noqa: E731
    with objective_module.ref_policy.adapters_disabled():
        assert (read(objective_module.ref_policy) == read(copied)).all()
        assert objective_module.ref_policy.model is worker.policy.model
    assert (read(worker.policy) - read(copied)).abs().max() > 1e-3
    assert weights.keys() == {
        name for name, weight in objective_module.named_parameters() if weight.requires_grad
    }


def test_adapters_and_heads_get_a_gradient_and_nothing_else(rolled_out):
    """The same loss as without adapters, which begin as nothing; its KL is to the policy without them."""
    worker, rows = rolled_out
    loss, _ = learned(worker, rows)
    worker.policy.model.zero_grad()
    worker.knobs = dataclasses.replace(worker.knobs, lora_rank=4)
    other, grads = learned(worker, rows)
    torch.testing.assert_close(other, loss, atol=1e-6, rtol=1e-5)
    assert sum("lora_B" in name for name in grads) > 20 and all("layers" in n for n in grads if "lora" in n)
    others = [name for name in grads if "lora_" not in name and not name.startswith("heads.")]
    assert others == ["model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    assert any(name.startswith("heads.refine_projector") for name in grads)


@pytest.fixture
def afresh():
    """accelerate keeps one precision a process; a run of bfloat16 needs its own."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("rank", [0, 4])
def test_what_learns_is_float32_beside_bfloat16_weights_that_do_not(profile, search, vectors, starts, rank):
    profile = dataclasses.replace(profile, dtype="bfloat16", lora_rank=rank)
    worker = sampler(profile, search, vectors)
    worker.policy.model.bfloat16()
    trainer = grpo.GRPOTrainer(worker)
    line, _ = trainer.train_step(1, starts[:2])
    assert line["norm"] > 0 and line["kl"] < 1e-3
    learn = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    for name, weight in worker.policy.model.named_parameters():
        assert weight.requires_grad == (id(weight) in learn)
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name


def test_noisy_soft_tokens_are_the_actions_that_were_rewarded(profile, search, vectors, starts):
    """Gaussian recipe: what stood in the query was noisy, was read on, and its density is that of the replay."""
    worker = sampler(profile, search, vectors, "gauss")
    members = [dataclasses.replace(starts[0], member=m) for m in range(4)]
    rows = [r for rows in worker.rollout(members, [1]) for r in rows if r.latents is not None]
    for row in rows:
        branch = worker.policy.replay([row.prompt], [row.ids]).refine_contexts
        with torch.no_grad():
            means = sqr.soft_tokens(worker.policy, branch, 3, sampled=row.latents[None])
            plain = sqr.soft_tokens(worker.policy, branch, 3)
            vec = sqr.soft_query(search, worker.policy.heads, [row.query.text], row.latents[None])
        spread = (row.latents - means[0]).std().item()
        assert 0.8 * profile.latent_noise_std < spread < 1.2 * profile.latent_noise_std
        assert (means[0, 0] == plain[0, 0]).all() and not torch.allclose(
            means[0, 1:], plain[0, 1:], atol=1e-3
        )
        assert float(torch.exp(-worker.infonce_losses(vec, [row])[0])) == pytest.approx(
            row.p_positive, abs=1e-5
        )


# --- the run ---------------------------------------------------------------------------------------------------------


def begin(profile, search, vectors, recipe="m3"):
    return grpo.GRPOTrainer(sampler(profile, search, vectors, recipe))


def steadily(trainer):
    """The trainer, with an Adam that does not blow up rounding where a gradient is next to nothing."""
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-2
    return trainer


def lines(folder, name="log"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


class Killed(Exception):
    """Somebody pulled the plug."""


def kill_at(count):
    """A watcher that ends the run when its log has so many lines."""

    def watch(logged):
        if len(logged) == count:
            raise Killed

    return watch


def forget_videos_at(number, trainer):
    """Let the trainer encode its videos anew after a step, as a resumed run does.

    The last bits of a video's features depend on the videos that were encoded in the same batch.
    """
    save = trainer._save

    def save_and_forget(folder, step):
        save(folder, step)
        if step == number:
            trainer.worker.policy.video_cache.clear()

    trainer._save = save_and_forget


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_resumes_to_the_same_end(tmp_path, profile, search, vectors, starts, rank):
    """Three steps in one go, and three with a kill in the last; and each step is the same again by its seed."""
    profile = dataclasses.replace(profile, lora_rank=rank, grpo_steps=3)
    whole, parts = begin(profile, search, vectors), begin(profile, search, vectors)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    forget_videos_at(2, whole)
    whole.run(starts, starts[:2], tmp_path / "whole", "whole")
    with pytest.raises(Killed):
        parts.run(starts, starts[:2], tmp_path / "parts", "parts", kill_at(3))
    parts = begin(profile, search, vectors)
    parts.run(starts, starts[:2], tmp_path / "parts", "parts")
    for name, weight in whole.objective.state_dict().items():
        assert (parts.objective.state_dict()[name] == weight).all(), name
    logs = [lines(tmp_path / name) for name in ("whole", "parts")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3]
    for line, line_again in zip(*logs, strict=True):
        assert line.keys() == line_again.keys()
        assert line["loss"] == line_again["loss"] and line["reward"] == line_again["reward"]
    assert [line["step"] for line in lines(tmp_path / "parts", "held")] == [0, 1, 2, 3]
    assert {row["group"] for line in lines(tmp_path / "parts", "groups") for row in line["rows"]} == {0}
    assert [path.name for path in (tmp_path / "parts" / "steps").iterdir()] == ["000003"]


def test_steps_without_a_finite_gradient_are_counted_and_too_many_end_the_run(
    tmp_path, short, search, vectors, starts
):
    trainer = begin(short, search, vectors)
    before = {name: weight.clone() for name, weight in trainer.objective.state_dict().items()}
    trainer.knobs.__dict__["grpo_beta"] = float("nan")  # frozen, and this profile is the test's own
    with pytest.raises(config.InputError, match=r"3 of 3 steps .* 0 for want of memory, .* lower grpo_lr"):
        trainer.run(starts, starts[:2], tmp_path, "broken")
    assert [line["norm"] for line in lines(tmp_path)] == [None] * 3 and lines(tmp_path)[-1]["skipped"] == 3
    for name, weight in trainer.objective.state_dict().items():
        assert (weight == before[name]).all()


def unreadable(*ids):
    """Videos of which these cannot be read."""
    shelf = Shelf()
    shelf.clips |= {video: video_reader.Clip(None, None, None, "no video stream") for video in ids}
    return shelf


def test_a_step_without_a_readable_video_is_skipped_and_too_many_end_the_run(
    tmp_path, profile, search, vectors, starts
):
    """The log has null where there is no number, never NaN, which is not JSON."""
    trainer = begin(profile, search, vectors)
    trainer.worker.clips = unreadable(*VIDEOS)
    with pytest.raises(config.InputError, match=r"3 of 3 steps .* videos that cannot be read"):
        trainer.run(starts, starts[:2], tmp_path, "broken")
    text = (tmp_path / "log.jsonl").read_text() + (tmp_path / "held.jsonl").read_text()
    assert "NaN" not in text and [line["skipped"] for line in lines(tmp_path)] == [1, 2, 3]
    assert lines(tmp_path)[0]["loss"] is lines(tmp_path)[0]["reward"] is lines(tmp_path)[0]["norm"] is None


def test_without_validation_prompts_nothing_is_watched(tmp_path, short, search, vectors, starts):
    begin(dataclasses.replace(short, grpo_steps=1), search, vectors).run(starts, [], tmp_path, "unwatched")
    assert len(lines(tmp_path)) == 1 and lines(tmp_path, "held") == []
    log = training_curves.read_log(tmp_path, "held")
    assert training_curves.reward_numbers("charades", log) == {}


def test_states_are_saved_by_time(tmp_path, monkeypatch, short, search, vectors, starts):
    """By a clock that is five minutes further at each step, killed in its fourth: it goes on behind the second."""
    clock = iter(range(0, 10**6, 300))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    profile = dataclasses.replace(short, save_minutes=10.0)
    with pytest.raises(Killed):
        begin(profile, search, vectors).run(starts, starts[:2], tmp_path, "timed", kill_at(4))
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["000002"]
    began = []
    begin(profile, search, vectors).run(
        starts, starts[:2], tmp_path, "timed", lambda log: began.append(log[-1]["step"])
    )
    assert began == [3, 4]


def short_of_memory(trainer, monkeypatch, calls):
    """The objective_module runs out of memory in these of its calls, from 1: two a step, one for each start."""
    forward, passes = trainer.objective.forward, []

    def full(*args):
        passes.append(1)
        if len(passes) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args)

    monkeypatch.setattr(trainer.objective, "forward", full)


def test_a_step_out_of_memory_is_counted_and_changes_nothing(
    tmp_path, monkeypatch, profile, search, vectors, starts
):
    """The second half of step 2 does not fit, so that step has a gradient of half its rows: it must not be used."""
    profile = dataclasses.replace(profile, grpo_rollout_batch=1)
    trainer, weights = begin(profile, search, vectors), []
    short_of_memory(trainer, monkeypatch, {4})
    keep = lambda _: weights.append({n: w.clone() for n, w in trainer.objective.state_dict().items()})  # noqa: E731
    trainer.run(starts, starts[:2], tmp_path, "full", keep)
    log = lines(tmp_path)
    assert [(line["skipped"], line["no_memory"]) for line in log] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert [line["loss"] is None for line in log] == [line["norm"] is None for line in log]
    assert [line["norm"] is None for line in log] == [False, True, False, False]
    pairs = itertools.pairwise(weights)
    equal = [all((before[name] == after[name]).all() for name in before) for before, after in pairs]
    assert equal == [True, False, False]
    again = begin(profile, search, vectors)
    assert again._resume(tmp_path) == 4 and again.counts == trainer.counts and again.counts["no_memory"] == 1


@pytest.mark.parametrize(("max_skipped", "steps"), [(0.05, 3), (0.75, 4)])
def test_too_many_steps_out_of_memory_end_the_run(
    tmp_path, monkeypatch, short, search, vectors, starts, max_skipped, steps
):
    trainer = begin(dataclasses.replace(short, max_skipped=max_skipped), search, vectors)
    short_of_memory(trainer, monkeypatch, range(1, 9))
    message = rf"full: {steps} of {steps} steps .* {steps} for want of memory, .* grpo_rollout_batch"
    with pytest.raises(config.InputError, match=message):
        trainer.run(starts, starts[:2], tmp_path, "full")
    assert len(lines(tmp_path)) == steps


def test_a_rollout_out_of_memory_goes_on_with_half_the_starts_and_gives_the_same_rows(
    monkeypatch, profile, search, vectors, starts
):
    """Four starts at once do not fit, then two do; when two do not fit either, the error stands."""
    trainer = begin(dataclasses.replace(profile, grpo_rollout_batch=4, grpo_group=2), search, vectors)
    whole, walk, fits, sizes = trainer.rollout(starts[:4], 2, [1]), trainer.worker.rollout, 4, []

    def full(some, seed):
        sizes.append(len(some) // 2)
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return walk(some, seed)

    monkeypatch.setattr(trainer.worker, "rollout", full)
    fits = 2
    with pytest.warns(UserWarning, match="4 at once do not fit in memory: half of grpo_rollout_batch"):
        halves = trainer.rollout(starts[:4], 2, [1])
    assert trainer.rollout(starts[:4], 2, [1])[-1].ids == halves[-1].ids  # without another word
    assert sizes == [4, 2, 2, 2, 2] and trainer.splitter.parts == 2
    assert [row.ids for row in halves] == [row.ids for row in whole]
    assert [row.reward for row in halves] == pytest.approx([row.reward for row in whole], abs=1e-5)
    fits = 1
    with pytest.raises(torch.OutOfMemoryError):
        trainer.rollout(starts[:4], 2, [1])


def test_groups_that_all_earn_the_same_end_the_run_where_it_can_go_on(
    tmp_path, short, search, vectors, starts
):
    parts = ("verification", "format", "refine_token", "grounding", "retrieval")
    profile = dataclasses.replace(short, disabled_rewards=parts, max_zero_std=0.9)
    with pytest.raises(
        config.InputError, match=r"flat: in (\d+) of \1 groups all earned the same.* max_zero_std"
    ):
        begin(profile, search, vectors).run(starts, starts[:2], tmp_path, "flat")
    assert [(line["step"], line["frac_zero_std"]) for line in lines(tmp_path)] == [(1, 1.0)]
    begin(dataclasses.replace(profile, max_zero_std=1.0), search, vectors).run(
        starts, starts[:2], tmp_path, "flat"
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def prepared(profile, agent, vectors):
    """What stage 2 finds on disk: a checkpoint of stage 1, queries, vectors."""
    home, data = profile.runs("charades"), profile.data_dir("charades")
    for folder in (home / "sft", data / "corpus", data / "embed/engine/train"):
        folder.mkdir(parents=True)
    checkpoints.save(agent, home / "sft")
    queries = [annotations.Query(n + 1, text, f"v{n}", (0.0, 4.0), "", 8.0) for n, text in enumerate(QUERIES)]
    annotations.write_fig(profile.data_dir("charades") / "corpus" / "train.jsonl", queries)
    folder = profile.data_dir("charades") / "embed" / "engine" / "train"
    (folder / "ids.json").write_text(json.dumps({"videos": vectors.video_ids, "queries": vectors.query_ids}))
    np.save(folder / "video_vecs.npy", vectors.video_vecs)
    np.save(folder / "query_vecs.npy", vectors.query_vecs)


@pytest.mark.parametrize("recipe", ["m1", "gauss"])
def test_each_recipe_trains_to_its_end_and_resumes(tmp_path, monkeypatch, profile, search, vectors, recipe):
    """The stage as `make paper` calls it, in one go and killed in its second step; videos and words are the test's."""
    profile = dataclasses.replace(profile, grpo_steps=2, val_fraction=1 / 3)
    agent, load, factors = random_policy(), checkpoints.load, rollout.VARIANTS[recipe]
    agent.settings = dataclasses.replace(agent.settings, n_soft=3)
    monkeypatch.setattr(grpo.checkpoints, "load", lambda *args: few_words(load(*args)))
    monkeypatch.setattr(grpo.engine, "load", lambda _: search)
    monkeypatch.setattr(clip_cache, "ClipCache", lambda *_: Shelf())
    folder = lambda run, *_: run.data_dir("charades") / "embed" / "engine" / "train"  # noqa: E731
    monkeypatch.setattr(embedding, "embed_corpus", folder)

    def train(name, on_log=None):
        monkeypatch.setattr(config, "ROOT", tmp_path / name)
        if not profile.runs("charades").exists():
            prepared(profile, agent, vectors)
        return grpo.train(profile, "charades", recipe, on_log, stage_1=profile.runs("charades") / "sft")

    whole = train("whole")
    with pytest.raises(Killed):
        train("parts", kill_at(2))
    parts = train("parts")
    assert train("parts", kill_at(1)) == parts, "it is complete: nothing is trained again"
    assert [line["step"] for line in lines(parts)] == [1, 2] and not (parts / "steps").exists()
    assert [line["step"] for line in lines(parts, "held")] == [0, 1, 2]
    assert lines(parts)[-1]["loss"] == pytest.approx(lines(whole)[-1]["loss"], abs=1e-5)
    before = parts.parents[1] / "sft"
    for name, learns in (("model", True), ("refine", factors.latents != "frozen")):
        weights, whole_weights, old_weights = (
            load_file(f / f"{name}.safetensors") for f in (parts, whole, before)
        )
        for key, weight in weights.items():
            torch.testing.assert_close(weight, whole_weights[key], atol=1e-6, rtol=1e-5, msg=key)
        assert any((weight != old_weights[key]).any() for key, weight in weights.items()) == learns
    settings = json.loads((parts / "vsr1.json").read_text())["settings"]
    assert settings["carry_blocks"] == factors.carry
    assert max(len(line["turns"]) for line in lines(parts)) == factors.turns


def test_stage_1_continues_on_the_prompts_of_stage_2_in_their_order(
    tmp_path, monkeypatch, profile, search, vectors
):
    profile = dataclasses.replace(profile, grpo_steps=2, val_fraction=1 / 3, lora_rank=4, sft_negatives=None)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(grpo.engine, "load", lambda _: search)
    monkeypatch.setattr(clip_cache, "ClipCache", lambda *_: Shelf())
    folder = lambda run, *_: run.data_dir("charades") / "embed" / "engine" / "train"  # noqa: E731
    monkeypatch.setattr(embedding, "embed_corpus", folder)
    home = profile.runs("charades")
    monkeypatch.setattr(grpo.sft, "train", lambda *_: home / "sft")
    monkeypatch.setattr(grpo.sft_data, "digest", lambda *_: "replies")
    reply = lambda query, shown: f"<think> {query.id} {shown} </think> <answer>not_matched</answer>"  # noqa: E731
    data_source = types.SimpleNamespace(reply_writer=lambda *_: (reply, None), families=lambda *_: {})
    monkeypatch.setattr(grpo.source, "of", lambda _: data_source)
    prepared(profile, random_policy(), vectors)
    learned, make = [], grpo.sft.make_trainer

    def watched(knobs, policy, engine, vectors, rows, *rest):
        assert (knobs.sft_lr, knobs.sft_head_lr, knobs.sft_batch) == (
            profile.grpo_lr,
            profile.grpo_head_lr,
            2,
        )
        learned.extend(rows)
        return make(knobs, policy, engine, vectors, rows, *rest)

    monkeypatch.setattr(grpo.sft, "make_trainer", watched)
    after = grpo.continue_sft(profile, "charades")
    prompts, _ = rollout.choose_prompts(profile, "charades", vectors, home / "sft")
    drawn = [prompt for number in (1, 2) for prompt in grpo.draw(prompts, number, 2, profile.seed)]
    assert [(row.desc_id, row.shown) for row in learned] == [
        (prompt.id, prompt.first_video) for prompt in drawn
    ]
    assert all(
        row.reply == reply(prompt, prompt.first_video) for row, prompt in zip(learned, drawn, strict=True)
    )
    assert [row.contrast for row in learned] == [row.shown != row.right for row in learned]
    weights, old_weights = (load_file(folder / "model.safetensors") for folder in (after, home / "sft"))
    changed = {key for key, weight in weights.items() if (weight != old_weights[key]).any()}
    assert changed and not any("visual" in key for key in changed)


def test_every_epoch_draws_every_start_once(starts):
    epoch = [s for number in range(1, len(starts) + 1) for s in grpo.draw(starts, number, 2, 0)]
    for half in (epoch[: len(starts)], epoch[len(starts) :]):
        assert sorted((s.id, s.first_video) for s in half) == sorted((s.id, s.first_video) for s in starts)
    assert epoch[: len(starts)] != epoch[len(starts) :]


def test_fresh_starts_are_queries_that_stage_1_did_not_learn_from(tmp_path, monkeypatch, profile, vectors):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    profile = dataclasses.replace(profile, val_fraction=1 / 3)
    home = profile.runs("charades")
    prepared(profile, random_policy(), vectors)
    every, held = rollout.choose_prompts(profile, "charades", vectors, home / "sft")
    first, second = sorted({start.id for start in every})

    def fresh(*ids):
        rows = home / "sft" / "rows.jsonl"
        rows.write_text("".join(json.dumps({"desc_id": number}) + "\n" for number in ids))
        unseen = dataclasses.replace(profile, grpo_exclude_sft_queries=True)
        return rollout.choose_prompts(unseen, "charades", vectors, home / "sft")

    assert fresh() == (every, held), "nothing was told"
    starts, watched = fresh(first, 999)
    assert {start.id for start in starts} == {second} and watched == held
    with pytest.raises(
        config.InputError,
        match=r"rows\.jsonl: stage 1 learned from every query; set grpo_exclude_sft_queries",
    ):
        fresh(first, second)


def test_queries_held_out_share_no_video_with_the_others():
    queries = [annotations.Query(n, "q", f"v{n % 40:02}", (0.0, 1.0), "", 2.0) for n in range(100)]
    learn, held = annotations.split_validation(queries, 0.1)
    assert len(learn) + len(held) == 100 and len({q.video for q in held}) == 4
    assert not {q.video for q in learn} & {q.video for q in held}


@pytest.mark.parametrize("prompts", [2, 1])
def test_two_processes_are_one(tmp_path, profile, search, vectors, starts, prompts):
    """Each walks one of the two starts of a step, or one has nothing to do; gradients are averaged by gloo.

    The two are killed on their way. What all rewards of a step spread is the same to both.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    done = two_processes.forked("grpo_loop", tmp_path / "two", prompts)
    assert done.returncode == 0, done.stderr[-3000:]
    profile = dataclasses.replace(profile, grpo_prompts_per_step=prompts, scale_rewards="batch")
    before, trainer = begin(profile, search, vectors), steadily(begin(profile, search, vectors))
    trainer.run(starts, starts[:2], tmp_path / "one", "one")
    logs = [lines(tmp_path / name) for name in ("one", "two")]
    for line, line_of_two in zip(*logs, strict=True):
        assert line.keys() == line_of_two.keys()
        for key in line.keys() - {"seconds", "turns"}:
            assert line[key] == pytest.approx(line_of_two[key], abs=1e-4, rel=1e-4), (line["step"], key)
    end_of_two, began = load_file(tmp_path / "two" / "end.safetensors"), before.objective.state_dict()
    for name, weight in trainer.objective.state_dict().items():
        assert (end_of_two[name] - weight).norm() <= 1e-3 * (weight - began[name]).norm(), name
    assert any((weight != began[name]).any() for name, weight in trainer.objective.state_dict().items())


@pytest.mark.parametrize(("schedule", "left"), [("constant", 1.0), ("linear", 0.25)])
def test_the_rates_of_the_last_of_four_steps(tmp_path, short, search, vectors, starts, schedule, left):
    trainer = begin(dataclasses.replace(short, grpo_schedule=schedule), search, vectors)
    trainer.run(starts, starts[:2], tmp_path, "rates")
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * left)
