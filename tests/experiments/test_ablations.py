"""Variants work beside the main run; their tables by plain loops, and the retry study against the loop itself."""

# ruff: noqa: F811

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from fake import profile as fake_profile
from test_episode_metrics import episode, turn
from test_evaluate import MATCH, REJECT, agent, made, random_one, read, world  # noqa: F401 (fixtures)

from vsr1.data import annotations
from vsr1.evaluation import evaluate, metrics
from vsr1.experiments import ablations
from vsr1.loop import records, runner
from vsr1.models import search_index
from vsr1.report import plots, results
from vsr1.report.results import Estimate


@pytest.fixture
def three():
    """Rescued with two of three soft tokens; kept right; accepted at once."""
    far = turn(1, "x", "a", 9, False, out=(1, "a"), rank_by_depth=(9, 2, 1, 1))
    near = turn(1, "b", "b", 1, False, out=(3, "y"), rank_by_depth=(1, 1, 4, 3))
    return [
        episode(1, "a", [far, turn(2, "a", "a", 1, True, (2.0, 8.0))], "matched"),
        episode(2, "b", [near, turn(2, "y", "b", 3, False, out=(2, "z"))]),
        episode(3, "c", [turn(1, "c", "c", 1, True, (2.0, 5.0))], "matched"),
    ]


def values(numbers):
    return {name.split("/", 2)[2]: number.value for name, number in numbers.items()}


def test_soft_tokens_are_counted_over_those_that_refined_at_turn_1(world, three):
    found = values(ablations.depths(dataclasses.replace(world, n_soft=3), "charades", three))
    assert [found[f"vsr1/d{d}"] for d in range(4)] == [50, 50, 50, 50]
    assert [found[f"vsr1-failed/d{d}"] for d in range(4)] == [0, 0, 100, 100]
    nobody = ablations.depths(dataclasses.replace(world, n_soft=3), "charades", three[2:])
    assert {number.value for number in nobody.values()} == {None}  # missing, not 0


def test_turns_are_cut_from_one_run_and_the_last_is_the_run_itself(world, three):
    found = values(ablations.turns(world, "F5", "charades", {"vsr1": three}))
    assert [round(found[f"vsr1/vcmr@0.5_t{t}"]) for t in (1, 2, 3)] == [33, 67, 67]
    assert [round(found[f"vsr1/open_t{t}"]) for t in (1, 2)] == [67, 33]
    for m in metrics.THRESHOLDS:
        assert found[f"vsr1/vcmr@{m}_t3"] == metrics.percent(metrics.vcmr_hits(three, m))


def test_a_variant_trains_what_it_changes_and_starts_from_the_main_run(tmp_path, monkeypatch):
    """One that changes rewards has the stage 1 of the main run; one that changes soft tokens has its own."""
    run, trained = fake_profile(tmp_path, monkeypatch), []
    monkeypatch.setattr(ablations.sft, "train", lambda profile, dataset: profile.runs(dataset) / "sft")
    monkeypatch.setattr(
        ablations.grpo, "train", lambda profile, dataset, name, stage_1: trained.append(stage_1) or Path(name)
    )
    monkeypatch.setattr(
        ablations.refinement, "episodes", lambda profile, dataset, name, like, weights: weights
    )
    assert (
        ablations.trained(run, "didemo", "no-ret") == "vsr1"
        and ablations.trained(run, "didemo", "m3") == "m3"
    )
    assert trained == [run.runs("didemo") / "sft"] * 2
    stage_1 = Path(ablations.trained(run, "didemo", "n2"))
    assert stage_1 == run.with_overrides("n2").runs("didemo") / "sft" != trained[0]


def test_what_is_kept_grows_and_forgets_other_knobs(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    ablations.keep(run, "didemo", {"B1/didemo/m1/ver": Estimate(50.0, 4)})
    ablations.keep(run, "didemo", {"B1/didemo/m3/ver": Estimate(60.0, 4)})
    entry = results.collect(run)["B1/didemo/m1/ver"]
    assert (entry["value"], entry["measured"]) == (50.0, True) and entry["note"].startswith(
        "committed; run at "
    )
    other = dataclasses.replace(run, infonce_temperature=0.2)
    ablations.keep(other, "didemo", {"B1/didemo/m3/ver": Estimate(70.0, 4)})
    path = run.results() / "ablations" / "didemo.json"
    assert list(json.loads(path.read_text())["numbers"]) == ["B1/didemo/m3/ver"]
    assert not results.collect(run).get("B1/didemo/m3/ver", {}).get("measured")


def failed_ids(world):
    """The queries whose first search fails, by a loop over vectors."""
    vectors = search_index.load_vectors(world.data_dir("charades") / "embed" / "engine" / "test")
    queries = {q.id: q for q in annotations.read_fig(world.data_dir("charades") / "corpus" / "test.jsonl")}
    lost = []
    for key, vec in zip(vectors.query_ids, vectors.query_vecs, strict=True):
        scores = dict(zip(vectors.video_ids, vectors.video_vecs @ vec, strict=True))
        if max(scores.values()) > scores[queries[key].video]:
            lost.append(key)
    return lost


@pytest.mark.parametrize("says", [MATCH.removesuffix(" <REFINE>"), REJECT])
def test_a_retry_refines_every_failed_query_whatever_is_said(world, made, agent, monkeypatch, says):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (made, agent))
    agent.script = lambda system, query, clip: says
    world = dataclasses.replace(world, seed=len(says))  # else the other answer stands
    walked = ablations.retry(world, "charades", "sqr")
    assert [one.desc_id for one in walked] == failed_ids(world)[: world.studies.sample_queries]
    assert all(len(one.turns) == 1 and one.turns[0].rank_by_depth for one in walked)
    if says == REJECT:  # then it is the loop's own first turn
        name = evaluate.run_system(world, "charades", "retry-check", like="sqr")
        first = {one.desc_id: one.turns[0] for one in records.read_episodes(name)}
        assert all(one.turns[0].rank_by_depth == first[one.desc_id].rank_by_depth for one in walked)


def test_a_rewrite_behind_the_query_is_what_the_loop_would_have_asked(world, made, agent, monkeypatch):
    monkeypatch.setattr(runner, "load_pair", lambda *_: (made, agent))
    agent.script = lambda system, query, clip: f"<query_update>a dog near {query[:9]}</query_update>"
    walked = {mode: ablations.retry(world, "charades", f"hqr-blind{mode}") for mode in ("", "-append")}
    behind = ablations.behind(world, "charades", walked[""])
    ranks = [[one.turns[0].rank_out for one in some] for some in (behind, walked["-append"], walked[""])]
    assert ranks[0] == ranks[1] != ranks[2] and None not in ranks[0]


def test_the_longer_studies_train_stage_1_where_it_is_not_there(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(ablations.sft, "train", lambda *_: done.append("stage 1"))
    monkeypatch.setattr(ablations, "longer_turns", lambda *_: done.append("turns") or {})
    next(ablations.run(fake_profile(tmp_path, monkeypatch), "charades"))
    assert done == ["stage 1", "turns"]


def test_a_gallery_grows_by_what_is_real_first(tmp_path, monkeypatch):
    run, rng = fake_profile(tmp_path, monkeypatch), np.random.default_rng(0)

    def some(count):
        vecs = rng.normal(size=(count, 4))
        return search_index.Vectors(
            list(range(count)), vecs / np.linalg.norm(vecs, axis=1, keepdims=True), [], vecs[:0]
        )

    stored = {}
    monkeypatch.setattr(
        search_index,
        "load_vectors",
        lambda path: stored.setdefault(str(path), some(12 if "train" in str(path) else 3)),
    )
    test = some(3)
    grown = dict(ablations.galleries(run, "didemo", test))
    sizes = {name: len(vecs) for name, vecs in grown.items()}
    assert sizes == {"own": 3, "train": 15, "all": 45, "made": 300}
    assert {f"vr@{k}_{name}" for k in (1, 10) for name in sizes} == results.layouts()["B3"]["metrics"].keys()
    alone = dict(ablations.galleries(dataclasses.replace(run, datasets=("didemo",)), "didemo", test))
    assert {name: len(vecs) for name, vecs in alone.items()} == {"own": 3, "train": 15, "made": 300}
    for vecs in grown.values():
        assert np.array_equal(vecs[:3], test.video_vecs)
        assert np.allclose(np.linalg.norm(vecs, axis=1), 1)


def measured(run, dataset, names):
    results.record(
        run, dataset, "07_tokens", {name: Estimate(value, 9, (value - 1, value + 1)) for name, value in names}
    )


def test_a_mean_of_the_data_sets_needs_all_of_them_and_stands_beside_the_paper(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    for at, dataset in enumerate(run.datasets):
        assert not results.collect(run)["F4/mean/vsr1/d2"]["measured"]
        measured(run, dataset, [(f"F4/{dataset}/vsr1/d{d}", 10.0 * d + at) for d in range(9)])
    entry = results.collect(run)["F4/mean/vsr1/d2"]
    assert (entry["value"], entry["paper"], entry["ci"]) == (21.0, 32.3, None) and entry["verdict"] is None


def test_curves_show_what_is_measured_and_the_last_panel_what_the_paper_shows(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    for dataset in run.datasets:
        measured(run, dataset, [(f"F4/{dataset}/vsr1/d{d}", 10.0 * d) for d in range(9) if d != 4])
    figure = plots.soft_tokens(results.collect(run), ["didemo"])
    ours, paper = (axes.lines[0].get_xydata().tolist() for axes in figure.axes)
    assert ours == [[d, 10.0 * d] for d in range(9) if d != 4]  # a gap is no zero
    published = [results.published()[f"F4/mean/vsr1/d{d}"] for d in range(9)]
    assert paper == [[d, value] for d, value in enumerate(published)]
    assert len(figure.axes[1].lines[1].get_xydata()) == 0  # the paper has no such line


def test_bars_of_two_engines_leave_a_gap_where_soft_tokens_were_not_trained(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    measured(run, "didemo", [("A2/didemo/sqr/vr@1_small", 70.0), ("A2/didemo/hqr-seen/vr@1_large", 5.0)])
    (axes,) = plots.engines(results.collect(run), ["didemo"]).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [5.0, 70.0]


def test_every_variant_has_its_words_where_its_table_is_laid_out():
    for table, variants in {"T2": ablations.REWARDS, "B1": ablations.LONGER}.items():
        assert variants.keys() <= results.layouts()[table]["systems"].keys()
