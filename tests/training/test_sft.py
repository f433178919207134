"""Stage 1: its two losses computed a second way, adapters against the model they stand beside, a run that is killed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import two_processes
from safetensors.torch import load_file
from tiny import QUERIES, Shelf, clip, random_policy, random_vectors

from vsr1 import config
from vsr1.loop import sqr
from vsr1.models import checkpoints, prompt_text
from vsr1.training import common, sft, sft_examples

REPLY = "<think> does jumps - waves no. </think> <answer>not_matched</answer>"


def made_rows():
    shown = ("v0", "v3", "v5")
    return [
        sft_examples.SFTExample(
            n + 1, text, f"v{n}", shown[n], tuple(v for v in ("v5", "v3", "v4") if v != f"v{n}"), REPLY
        )
        for n, text in enumerate(QUERIES)
    ]


@pytest.fixture
def rows():
    return made_rows()


@pytest.fixture
def profile():
    return dataclasses.replace(config.load("smoke"), sft_batch=3, save_minutes=0.0)


@pytest.fixture
def trainer(tmp_path, profile, search, vectors, rows):
    agent = random_policy()
    trainer = sft.make_trainer(profile, agent, search, vectors, rows, Shelf(), tmp_path, "test")
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    return trainer


def batch(trainer, rows):
    return trainer.data_collator([dataclasses.asdict(row) for row in rows])


def test_info_nce_is_minus_the_log_of_the_share_of_the_right_video():
    vecs = torch.nn.functional.normalize(torch.randn(2, 5, 4, generator=torch.manual_seed(0)), dim=-1)
    loss = common.info_nce(vecs[:, 0], vecs[:, 1], vecs[:, 2:], 0.1)
    for row in range(2):
        weights = [np.exp(float(vecs[row, 0] @ vecs[row, k]) / 0.1) for k in range(1, 5)]
        assert abs(np.exp(-loss[row].item()) - weights[0] / sum(weights)) < 1e-5


def test_the_reply_and_nothing_else_is_learned(trainer, rows):
    inputs = batch(trainer, rows)
    for labels in inputs["labels"]:
        text = trainer.policy.tokenizer.decode(labels[labels != sft.IGNORED])
        assert text == f"{REPLY} {prompt_text.REFINE}<|im_end|>"
    assert inputs["rows"][1]["right"] == "v1"


def by_replay(trainer, rows, tau, lam):
    """Both losses another way: the policy's own replay of the replies, and a softmax written out."""
    agent, shelf, contrast = trainer.policy, trainer.data_collator.clips, trainer.contrast
    shown = [row.caption or shelf.clips[row.shown] for row in rows]
    prompts = [
        agent.prompt(agent.settings.system, row.query, clip) for row, clip in zip(rows, shown, strict=True)
    ]
    ids = agent.tokenizer(f"{REPLY} {prompt_text.REFINE}", add_special_tokens=False)["input_ids"] + [
        agent.stop_token_id
    ]
    agent.banned_tokens = torch.zeros_like(agent.banned_tokens)  # TRL's loss is over the whole vocabulary
    replay = agent.replay(prompts, [ids] * len(rows))
    latents = sqr.soft_tokens(agent, replay.refine_contexts, agent.settings.n_soft)
    losses = []
    for depth in {*trainer.knobs.infonce_prefixes, latents.shape[1]}:
        few = latents[:, :depth]
        vecs = sqr.soft_query(trainer.engine, agent.heads, [row.query for row in rows], few)
        for row, vec in zip(rows, vecs, strict=True):
            against = (
                contrast.vectors.video_ids
                if trainer.knobs.sft_negatives is None
                else (row.right, *row.negatives)
            )
            scores = {v: contrast.gallery_vecs[contrast.vectors.column(v)] @ vec / tau for v in against}
            loss = torch.logsumexp(torch.stack(list(scores.values())), 0) - scores[row.right]
            counts = trainer.knobs.infonce_rows == "all" or row.shown != row.right
            losses.append(loss if counts else 0 * loss)
    return -replay.logps.sum() / replay.completion_mask.sum() + lam * torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("negatives", "text_only", "knobs"),
    [
        (3, (), {}),
        (None, (1,), {}),
        (None, (0, 1, 2), {}),
        (3, (1,), {"infonce_prefixes": (1, 2)}),
        (None, (), {"infonce_prefixes": (1, 8), "infonce_rows": "rejected"}),
    ],
)
def test_the_loss_and_its_gradients_equal_those_of_a_replay(
    trainer, rows, profile, negatives, text_only, knobs
):
    """Also of rows told in words beside others, against the whole gallery, nested, or of rejections only."""
    profile = dataclasses.replace(profile, sft_negatives=negatives, **knobs)
    trainer.knobs = trainer.contrast.knobs = profile
    assert [row.shown == row.right for row in rows] == [True, False, False]
    caption = "0.0 to 2.0: A person waves."
    rows = [
        dataclasses.replace(row, caption=caption if number in text_only else None)
        for number, row in enumerate(rows)
    ]
    agent, grads = trainer.policy, []
    losses = (
        lambda: trainer.compute_loss(agent.model, batch(trainer, rows)),
        lambda: by_replay(trainer, rows, profile.infonce_temperature, profile.infonce_weight),
    )
    for loss in losses:
        agent.model.zero_grad()
        value = loss()
        value.backward()
        watched = [
            agent.heads.refine_projector[3].weight,
            agent.heads.refine_append_input_projector[1].weight,
        ]
        watched += [agent.model.model.language_model.layers[0].self_attn.q_proj.weight]
        grads.append([value.detach(), *(weight.grad.clone() for weight in watched)])
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)
    assert all(weight.grad is None for weight in trainer.engine.model.parameters())


@torch.no_grad()
def test_another_video_gives_another_loss(trainer, rows):
    """A trainer that drops the video would not notice."""
    before = trainer.compute_loss(trainer.policy.model, batch(trainer, rows))
    trainer.data_collator.clips = Shelf(seed=50)
    assert abs(trainer.compute_loss(trainer.policy.model, batch(trainer, rows)) - before) > 1e-3


def adapted():
    agent = random_policy()
    common.add_lora(agent, rank=4, seed=0, mergers=True)
    return agent


def outputs_of(agent):
    """Log-probabilities of a reply to each query, and the soft tokens at its end."""
    prompts = [agent.prompt("S", text, clip(4)) for text in QUERIES]
    replay = agent.replay(prompts, [[30, 31, agent.refine_token_id, agent.stop_token_id]] * len(QUERIES))
    return replay.logps, sqr.soft_tokens(agent, replay.refine_contexts, agent.settings.n_soft)


def test_a_policy_that_could_not_learn_to_say_the_token_gets_no_adapters():
    agent = random_policy()
    agent.model.config.tie_word_embeddings = False
    with pytest.raises(config.InputError, match="lora_rank: 0"):
        common.add_lora(agent, rank=4, seed=0)


@torch.no_grad()
def test_fresh_adapters_change_nothing():
    for fresh, plain in zip(outputs_of(adapted()), outputs_of(random_policy()), strict=True):
        assert (fresh == plain).all()


def test_adapters_learn_beside_a_model_that_stays_and_are_merged_into_its_checkpoint(
    tmp_path, profile, search, vectors, rows
):
    agent, before = adapted(), random_policy()
    trainer = sft.make_trainer(profile, agent, search, vectors, rows * 4, Shelf(), tmp_path, "lora")
    trainer.train()
    weights = {
        name.replace("token_adapter.", "").replace("base_layer.", ""): w
        for name, w in trainer.model.named_parameters()
    }
    unchanged = [name for name, weight in before.model.named_parameters() if (weights[name] == weight).all()]
    assert len(unchanged) == len(list(before.model.parameters()))
    learned = [weight for name, weight in weights.items() if "lora_B" in name]
    assert len(learned) > 30 and all(weight.abs().max() > 0 for weight in learned)
    assert any("deepstack_merger" in name and "lora_B" in name for name in weights)
    for (name, weight), old_weight in zip(
        agent.heads.named_parameters(), before.heads.parameters(), strict=True
    ):
        assert (weight != old_weight).any() == ("gate" not in name), name
    for head, _ in agent.heads.named_children():
        delattr(agent.model, head)
    with torch.no_grad():
        trained = outputs_of(agent)
        checkpoints.save(agent, tmp_path)
        again = checkpoints.load(str(tmp_path), profile)
        for value, value_again, value_before in zip(
            trained, outputs_of(again), outputs_of(before), strict=True
        ):
            torch.testing.assert_close(value, value_again, atol=1e-5, rtol=1e-5)
            assert (value - value_before).abs().max() > 1e-3
    embeddings = [policy.model.get_input_embeddings().weight for policy in (again, before)]
    assert (embeddings[0] != embeddings[1]).any(dim=1).nonzero().tolist() == [[agent.refine_token_id]]
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight


@pytest.mark.parametrize("rank", [0, 4])
def test_what_learns_is_float32_beside_bfloat16_weights_that_do_not(
    tmp_path, profile, search, vectors, rows, rank
):
    profile = dataclasses.replace(profile, dtype="bfloat16", lora_rank=rank, device="cpu")
    agent = sft.build_policy(profile, search)
    trainer = sft.make_trainer(profile, agent, search, vectors, rows, Shelf(), tmp_path, "half")
    before = {name: weight.clone() for name, weight in agent.model.named_parameters()}
    trainer.train()
    for name, weight in agent.model.named_parameters():
        assert weight.dtype == (
            torch.float32 if weight.requires_grad or "refine_gate" in name else torch.bfloat16
        ), name
        if not weight.requires_grad:
            assert (weight == before[name]).all(), name
    assert json.loads((tmp_path / "log.jsonl").read_text())["norm"] > 0


def test_both_rates_rise_to_their_height_and_fall_to_zero(tmp_path, profile, search, vectors, rows):
    profile = dataclasses.replace(profile, sft_batch=1, sft_warmup=0.25)
    trainer = sft.make_trainer(
        profile, random_policy(), search, vectors, (rows * 3)[:8], Shelf(), tmp_path, "warm"
    )
    trainer.train()
    rates = [json.loads(line)["rate"] for line in (tmp_path / "log.jsonl").open()]
    expected = [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # of the eight steps, two are a quarter
    assert np.allclose(rates, profile.sft_lr * np.array(expected))


class Killed(Exception):
    """Somebody pulled the plug."""


class Kill(sft.TrainerCallback):
    """Pulls it behind the second checkpoint."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise Killed


@pytest.mark.parametrize("begun", [random_policy, adapted])
def test_a_killed_run_resumes_to_the_same_end(tmp_path, profile, search, vectors, rows, begun):
    """Four steps in one go, and four with a kill after the second checkpoint; of all weights, and of adapters."""

    def begin(name):
        agent = begun()
        (tmp_path / name).mkdir(exist_ok=True)
        return sft.make_trainer(profile, agent, search, vectors, rows * 4, Shelf(), tmp_path / name, name)

    whole, parts = begin("whole"), begin("parts")
    whole.train()

    parts.add_callback(Kill())
    with pytest.raises(Killed):
        parts.train()
    assert sft.checkpoint(tmp_path / "parts") is not None
    parts = begin("parts")
    parts.train(resume_from_checkpoint=sft.checkpoint(tmp_path / "parts"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in ("whole", "parts")]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4]
    assert np.allclose([row["loss"] for row in logs[0]], [row["loss"] for row in logs[1]], atol=1e-5)


def test_states_are_saved_by_time_and_a_torn_one_is_passed_over(
    tmp_path, monkeypatch, profile, search, vectors, rows
):
    """By a clock that is 200 seconds further at each look: a state is due at every third of six steps."""
    clock = iter(range(0, 10**6, 200))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    profile = dataclasses.replace(profile, sft_batch=2, save_minutes=10.0)
    trainer = sft.make_trainer(
        profile, random_policy(), search, vectors, rows * 4, Shelf(), tmp_path, "timed"
    )
    saved = []
    trainer.add_callback(Saves(saved))
    trainer.train()
    assert saved == [3, 6]
    (tmp_path / "steps" / "checkpoint-7").mkdir()  # killed before the library wrote its last file
    assert sft.checkpoint(tmp_path) == str(tmp_path / "steps" / "checkpoint-6")


class Saves(sft.TrainerCallback):
    """Notes the steps at which a state was saved."""

    def __init__(self, steps):
        self.steps = steps

    def on_save(self, args, state, control, **_):
        self.steps.append(state.global_step)


# --- the ambiguity filter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [3, None])
def test_a_rejected_video_is_no_negative_where_ambiguous_ones_are_left_out(rows, profile, vectors, negatives):
    """A loop over videos says what counts; moving a video that does not count moves no loss."""
    profile = dataclasses.replace(profile, sft_negatives=negatives, ambiguity_filter=0.0005)
    contrast = sft.GalleryContrast(profile, vectors, "cpu")
    vecs = torch.nn.functional.normalize(torch.randn(3, 192, generator=torch.manual_seed(5)), dim=1)
    losses, rejected = contrast.infonce_losses(vecs, [dataclasses.asdict(row) for row in rows]), 0
    for row, vec, loss in zip(rows, vecs, losses, strict=True):
        typed = vectors.query_vecs[vectors.query_ids.index(row.desc_id)]
        plain = {v: float(typed @ vectors.video_vecs[vectors.column(v)]) for v in vectors.video_ids}
        among = row.negatives if negatives else [v for v in plain if v != row.right]
        clear = [v for v in among if plain[v] < plain[row.right] - 0.0005]
        scores = [float(contrast.gallery_vecs[vectors.column(v)] @ vec) / 0.1 for v in (row.right, *clear)]
        assert loss.item() == pytest.approx(np.logaddexp.reduce(scores) - scores[0], abs=1e-5)
        rejected += row.shown != row.right and row.shown not in clear
    assert rejected, "no row of the test was searched for in vain"


def test_a_row_without_clear_negatives_has_no_loss_and_no_gradient(trainer, rows, profile):
    profile = dataclasses.replace(profile, ambiguity_filter=2.5)  # wider than cosines are
    trainer.knobs = trainer.contrast.knobs = profile
    vecs = torch.randn(3, 192, generator=torch.manual_seed(5)).requires_grad_()
    losses = trainer.contrast.infonce_losses(vecs, [dataclasses.asdict(row) for row in rows])
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and (vecs.grad == 0).all()
    loss = trainer.compute_loss(trainer.policy.model, batch(trainer, rows))
    assert loss.isfinite() and not sum(trainer.infonce_sums).any(), (
        "rows that contrast with nothing are not in the log"
    )


# --- the baseline ----------------------------------------------------------------------------------------------------


def test_the_baseline_learns_the_same_replies_without_the_token_and_without_a_search(
    tmp_path, profile, search, vectors, rows
):
    agent = random_policy()
    agent.heads = agent.refine_token_id = None
    trainer = sft.make_trainer(profile, agent, search, vectors, rows, Shelf(), tmp_path, "ft")
    trainer.current_gradient_accumulation_steps = 1
    inputs = batch(trainer, rows)
    for labels in inputs["labels"]:
        assert agent.tokenizer.decode(labels[labels != sft.IGNORED]) == f"{REPLY}<|im_end|>"
    prompts = [agent.prompt(prompt_text.SYSTEM_ZS, row.query, Shelf().clips[row.shown]) for row in rows]
    ids = agent.tokenizer(REPLY, add_special_tokens=False)["input_ids"] + [agent.stop_token_id]
    agent.banned_tokens = torch.zeros_like(agent.banned_tokens)
    replay = agent.replay(prompts, [ids] * len(rows))
    torch.testing.assert_close(
        trainer.compute_loss(agent.model, inputs), -replay.logps.sum() / replay.completion_mask.sum()
    )
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [row["step"] for row in log] == [1] and log[0]["info_nce"] is None


def short_course(folder, agent, search, batch=2):
    """A trainer of three steps of up to four rows: all told in words, one of them, and no more than two rows."""
    profile = dataclasses.replace(
        config.load("smoke"), sft_batch=batch, sft_accumulate=4 // batch, save_minutes=0.0
    )
    rows = (made_rows() * 4)[:10]
    rows[:5] = [dataclasses.replace(row, caption="0.0 to 2.0: A person waves.") for row in rows[:5]]
    return sft.make_trainer(profile, agent, search, random_vectors(), rows, Shelf(), folder, "short")


def test_two_processes_learn_what_one_learns(tmp_path, search):
    """Each reads half of a step's rows; in the last step there are not enough for both."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    done = two_processes.forked("sft_loop", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    before, trainer = random_policy(), short_course(tmp_path / "one", random_policy(), search)
    trainer.train()
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    for line, line_of_two in zip(*logs, strict=True):
        for key in line.keys() - {
            "accuracy"
        }:  # the library's: a mean over forwards, of which there are fewer
            assert line[key] == pytest.approx(line_of_two[key], abs=1e-4, rel=1e-4), (line["step"], key)
    end_of_two, began = load_file(tmp_path / "two" / "end.safetensors"), before.model.state_dict()
    began |= {
        f"{name}.{key}": w
        for name, head in before.heads.named_children()
        for key, w in head.state_dict().items()
    }
    for name, weight in trainer.model.state_dict().items():
        assert (end_of_two[name] - weight).norm() <= 0.02 * (weight - began[name]).norm(), name


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_step_has_the_same_rows_whoever_shares_them(rows, count):
    """Dealt out as the library deals batches: one after the other to the processes in turn."""
    rows, profile = (rows * 5)[:14], dataclasses.replace(config.load("smoke"), sft_batch=2, sft_accumulate=3)
    batch, accumulate, filled = sft.partition_batch(profile, rows, count)
    batches = [filled[start : start + batch] for start in range(0, len(filled), batch)]
    shares = [batches[process::count] for process in range(count)]
    for step, start in enumerate(range(0, len(rows), 6)):
        read = [row for some in shares for part in some[step * accumulate :][:accumulate] for row in part]
        assert len(read) == (2 if count == 1 and step == 2 else batch * accumulate * count)
        real = [row for row in read if row.reply is not None]
        key = lambda row: (row.desc_id, row.shown)  # noqa: E731
        assert sorted(real, key=key) == sorted(rows[start : start + 6], key=key)
