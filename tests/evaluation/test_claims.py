"""The paper's claims against one run: differences by plain loops over episodes, and what is said of them."""

import pytest
from fake import profile as fake_profile
from test_episode_metrics import RUN, episode, turn

from vsr1.config import InputError
from vsr1.evaluation import claims, metrics
from vsr1.loop import records
from vsr1.report import results, verdicts


def refined(key, first, after, depths):
    """A first look at a wrong video, a refinement to rank `after`, and a look at what it found."""
    rejected = turn(1, "x", "right", first, False, out=(after, "right"), rank_by_depth=depths)
    return episode(key, "right", [rejected, turn(2, "right", "right", after, True, (2.0, 8.0))], "matched")


def straight(key, matched=True):
    """One look at the right video."""
    return episode(
        key, "right", [turn(1, "right", "right", 1, matched, (2.0, 8.0))], "matched" if matched else "budget"
    )


def final():
    """Of VideoSearch-R1: two refined, one of them with success."""
    return [refined(1, 5, 1, (5, 3, 1, 1, 1)), straight(2), refined(3, 2, 2, (2, 2, 2, 3, 2)), straight(4)]


def down():
    """Of a walk down: one moment."""
    return [straight(1), straight(2, False), straight(3, False), straight(4, False)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Both on four queries, and HQR on two of them, as files of one data set."""
    run = fake_profile(tmp_path, monkeypatch)
    files = {"vsr1": final(), "walkdown-ft": down(), "hqr-seen-sample": [refined(1, 5, 4, ()), straight(2)]}
    folder = run.runs("charades") / "episodes"
    folder.mkdir(parents=True)
    for name, walked in files.items():
        records.write_episodes(folder / f"{name}.jsonl", RUN, walked)
    return run


def test_differences_are_what_a_loop_over_queries_counts(run):
    episodes, fallback = final(), down()
    numbers = verdicts.record(run, "charades")
    gained = [
        metrics.vcmr_hits([a], 0.5)[0] * 1 - metrics.vcmr_hits([b], 0.5)[0]
        for a, b in zip(episodes, fallback, strict=True)
    ]
    assert numbers["R3/charades/vsr1-walkdown/points"].value == pytest.approx(100 * sum(gained) / 4)
    moved = [(o.turns[-1].rank_in == 1) - (o.rank_orig == 1) for o in episodes]
    assert numbers["R3/charades/refined/points"].value == pytest.approx(100 * sum(moved) / 4)
    assert (
        numbers["R3/charades/sqr-hqr-seen/points"].value,
        numbers["R3/charades/sqr-hqr-seen/points"].n,
    ) == (100, 1)
    ranks = [o.turns[0].rank_by_depth or (o.turns[0].rank_in,) * 5 for o in episodes]  # of all queries
    for name, depth, before in (("latents", -1, 0), ("latents-half", 2, 0), ("latents-rest", -1, 2)):
        points = [100 * ((r[depth] == 1) - (r[before] == 1)) for r in ranks]
        number = numbers[f"R3/charades/{name}/points"]
        assert (number.value, number.n) == (sum(points) / 4, 4)
    harmed, repaired = (numbers[f"R3/charades/{name}/points"] for name in ("harmed", "repaired"))
    assert (repaired.value, repaired.n, harmed.value, harmed.n) == (50, 2, 0, 2)
    second = [
        metrics.vcmr_hits(metrics.within([o], 2), 0.5)[0] * 1
        - metrics.vcmr_hits(metrics.within([o], 1), 0.5)[0]
        for o in episodes
    ]
    assert numbers["R3/charades/turn-2/points"].value == pytest.approx(100 * sum(second) / 4)


def test_a_claim_whose_system_is_missing_names_it_and_is_never_zero(run):
    numbers = verdicts.record(run, "charades")
    assert numbers["R3/charades/vsr1-zs/points"].value is None
    judged = verdicts.judge(results.collect(run), ["charades"])
    by_name = {verdict.name: verdict for verdict in judged}
    assert by_name["vsr1-zs"].verdict == "MISSING: no episodes of zs" and by_name["vsr1-zs"].value == "—"
    assert by_name["grpo-vcmr"].verdict == "MISSING: no episodes of sft"
    assert by_name["tokens"].verdict == "MISSING: not measured"
    assert by_name["no-ret-vcmr"].verdict == "made on didemo only"
    assert by_name["refiner-8b"].verdict == "cannot be tested here, because there is no second policy"
    listed = verdicts.sheet(judged)[verdicts.GROUPS["paper"]]
    assert listed[claims.CLAIMS["vsr1-zs"].words] == ["+6.2", "MISSING: no episodes of zs"]
    with pytest.raises(InputError, match="no data set has episodes"):
        claims.datasets_with_episodes(results.dataclasses.replace(run, name="another"))
    assert claims.datasets_with_episodes(run) == ["charades"]


def test_the_papers_differences_are_those_of_its_tables():
    published = results.published()
    tables = {
        "vsr1-ft": ("ft", "vcmr@0.5"),
        "vsr1-zs": ("zs", "vcmr@0.5"),
        "vsr1-walkdown": ("ft", "vcmr@0.5"),
    }
    tables |= {"ver-ft": ("ft", "ver"), "ver-zs": ("zs", "ver"), "ver-walkdown": ("ft", "ver")}
    tables |= {"refined": ("zs", "vr@1"), "earlier": ("squidnet", "vcmr@0.5")}
    second = {"grpo-vcmr": ("sft", "vcmr@0.5"), "grpo-ver": ("sft", "ver"), "grpo-vr": ("sft", "vr@1")}
    for reward in ("no-ret", "no-verif"):
        second |= {f"{reward}-vcmr": (reward, "vcmr@0.5"), f"{reward}-ver": (reward, "ver")}
    for table, rows in {"T1": tables, "T2": second}.items():
        for name, (baseline, metric) in rows.items():
            for dataset, points in claims.CLAIMS[name].paper.items():
                value, baseline_value = (
                    published[f"{table}/{dataset}/{row}/{metric}"] for row in ("vsr1", baseline)
                )
                assert value - baseline_value == pytest.approx(points), name
    curve = [published[f"F4/mean/vsr1/d{depth}"] for depth in range(9)]
    assert claims.CLAIMS["latents"].paper["mean"] == pytest.approx(curve[8] - curve[0])
    assert claims.CLAIMS["latents-half"].paper["mean"] == pytest.approx(curve[4] - curve[0])
    assert claims.CLAIMS["latents-rest"].paper["mean"] == pytest.approx(curve[8] - curve[4])


def test_every_claim_says_what_it_must():
    for name, claim in claims.CLAIMS.items():
        assert claim.group != "construction" or claim.why, name
        assert claim.systems or claim.why, name
        assert claim.group != "control" or not claim.paper, name


def test_a_damaged_line_of_episodes_stops_the_claims_by_name(run):
    path = run.runs("charades") / "episodes" / "vsr1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    with pytest.raises(InputError, match=r"vsr1.jsonl, line 3: not JSON"):
        claims.hits_of_run(run, "charades")
