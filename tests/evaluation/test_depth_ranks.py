"""Ranks by number of soft tokens are those that the loop recorded."""

import json

from test_evaluate import agent, made, random_one, read, run, world  # noqa: F401 (fixtures)

from vsr1.evaluation import depth_ranks


def test_ranks_computed_again_are_those_that_the_loop_recorded(world, agent, run, tmp_path):  # noqa: F811
    episodes = run(agent, "sqr")
    depth_ranks.rank(world, "charades", "its weights", episodes, tmp_path)
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    for episode in episodes:
        by_video, first = ranks[str(episode.desc_id)], episode.turns[0]
        assert by_video[episode.gt_video] == list(first.rank_by_depth)
        assert all(by_video[video][depth] == 1 for depth, video in enumerate(first.top1_by_depth))
    assert len({tuple(episode.turns[0].rank_by_depth) for episode in episodes}) > 3


def test_without_episodes_or_a_policy_nothing_is_ranked(world, agent, run):  # noqa: F811
    assert depth_ranks.make(world, "charades", []) is None
    assert depth_ranks.make(world, "charades", run(agent, "sqr")[:1]) is None
