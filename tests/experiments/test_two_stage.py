"""The two-stage baseline, on five rendered films with a random engine: each result computed a second way."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import clip, random_engine

from vsr1 import config
from vsr1.data import annotations, source, video_reader
from vsr1.evaluation import fig_scorer, metrics
from vsr1.experiments import retrieval, training_curves, two_stage
from vsr1.loop import moments
from vsr1.mini import renderer
from vsr1.models import embedding, engine, search_index


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A profile with a few films, embedded; everything under a scratch folder."""
    with pytest.MonkeyPatch.context() as patch:
        encoder = random_engine()
        patch.setattr(config, "ROOT", tmp_path_factory.mktemp("clone"))
        patch.setattr(engine, "load", lambda profile, which="engine": encoder)
        profile = config.load("smoke")
        small = dataclasses.replace(profile.world, train_videos=10, test_videos=5)
        knobs = {"max_frames": 8, "two_stage": config.TwoStageConfig(videos=4, epochs=2, width=8)}
        profile = dataclasses.replace(profile, world=small, **knobs)
        renderer.render(profile, "charades")
        for split in ("train", "test"):
            embedding.embed_corpus(profile, "charades", split)
        yield profile, encoder


@pytest.fixture(scope="module")
def folder(world):
    return two_stage.run(world[0], "charades")


def test_windows_are_the_whole_clip_in_order_and_their_vectors_those_of_the_engine():
    film = clip(10)  # two whole windows and a short one
    parts, edges = two_stage.split_windows(film)
    assert np.array_equal(np.concatenate([part.frames for part in parts]), film.frames)
    assert np.array_equal(np.concatenate([part.timestamps for part in parts]), film.timestamps)
    assert edges.tolist() == [0.25, 8.25, 16.25, 20.0]


def test_windows_read_back_are_those_of_each_video_alone(world, folder):
    profile, encoder = world
    windows = two_stage.load_windows(folder, "test")
    video = annotations.find_videos(profile.data_dir("charades") / "videos", list(windows.rows))[-1]
    with video_reader.Reader(profile.video_fps, profile.max_frames) as read:
        parts, edges = two_stage.split_windows(read.read(video.path))
    row = windows.rows[video.id]
    vecs = np.concatenate([encoder.embed_clips([part]) for part in parts])
    np.testing.assert_allclose(windows.vecs[row][windows.mask[row]], vecs, atol=1e-3)  # kept in float16
    np.testing.assert_allclose(windows.edges[row][: len(edges)], edges)


def windows_of(counts, width=6, seconds=4.0):
    torch.manual_seed(0)
    there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    vecs = torch.randn(*there.shape, width) * there[..., None]
    steps = np.arange(max(counts) + 1)
    edges = np.where(steps <= np.array(counts)[:, None], steps * seconds, np.inf)
    return two_stage.Windows({str(row): row for row in range(len(counts))}, vecs, there, edges)


class Says(torch.nn.Module):
    """A head that has what `targets` asks for by heart."""

    def __init__(self, at, shifts, width):
        super().__init__()
        self.at, self.shifts, self.width = torch.from_numpy(at), torch.from_numpy(shifts), width

    def forward(self, query, vecs, there):
        scores = torch.nn.functional.one_hot(self.at, self.width).double().log()  # (B, 2, W)
        return scores, self.shifts[:, :, None].expand(-1, -1, self.width)


def test_a_head_that_says_the_targets_gets_the_spans_back():
    windows, rows = windows_of([5, 3, 5]), np.array([0, 1, 2])
    spans = np.array([[1.3, 9.9], [4.0, 12.0], [14.2, 19.9]])
    head = Says(*two_stage.targets(windows.edges[rows], spans), 5)
    assert np.array_equal(two_stage.locate(head, None, windows, rows), spans)


def test_a_span_ends_in_the_video_and_never_before_it_starts():
    """Against a double loop over all pairs of windows, on a random head."""
    windows, rows, query = windows_of([5, 3, 4]), np.array([0, 1, 2]), torch.randn(3, 6)
    head = two_stage.SpanHead(6, 8).eval()
    scores, shifts = (part.detach() for part in head(query, windows.vecs, windows.mask))
    for row, span in enumerate(two_stage.locate(head, query, windows, rows)):
        last = int(windows.mask[row].sum())
        pairs = [(i, j) for i in range(last) for j in range(i, last)]
        i, j = max(pairs, key=lambda pair: float(scores[row, 0, pair[0]] + scores[row, 1, pair[1]]))
        ends = np.array([i + float(shifts[row, 0, i]), j + 1 + float(shifts[row, 1, j])]) * 4.0
        np.testing.assert_allclose(span, np.sort(ends.clip(0, last * 4.0)), atol=1e-3)


def test_padding_does_not_change_what_the_head_says():
    windows, query = windows_of([5, 3]), torch.randn(2, 6)
    head = two_stage.SpanHead(6, 8).eval()
    scores, shifts = head(query, windows.vecs, windows.mask)
    alone = head(query[1:], windows.vecs[1:, :3], windows.mask[1:, :3])
    torch.testing.assert_close(scores[1:, :, :3], alone[0])
    torch.testing.assert_close(shifts[1:, :, :3], alone[1])
    assert torch.isneginf(scores[1, :, 3:]).all()


def test_the_head_learns_the_moments_it_is_shown():
    """Windows that look like their query, or do not: after training the spans overlap, before they hardly do."""
    rng = np.random.default_rng(0)
    windows, profile = (
        windows_of([8] * 60, width=16),
        dataclasses.replace(config.load("smoke"), two_stage=config.TwoStageConfig(videos=8, epochs=40)),
    )
    first = rng.integers(0, 6, 60)
    query = torch.nn.functional.normalize(torch.randn(60, 16), dim=-1)
    for row, at in enumerate(first):
        windows.vecs[row, at : at + 2] += 4 * query[row]
    spans = np.stack([first * 4.0, first * 4.0 + 8], axis=1)
    parts = np.arange(48), np.arange(48, 60)
    learn, held = (two_stage.SpanQueries(query[p], p, spans[p], np.ones(len(p), bool)) for p in parts)
    head = two_stage.SpanHead(16, 8)
    log = two_stage.train(profile, head, learn, held, windows, "test")
    best = max(line["miou"] for line in log)
    again = moments.span_iou(two_stage.locate(head, held.vecs, windows, held.rows), held.spans)
    assert metrics.percent(again) == best > 80  # the head that is left is the one that was chosen


def test_nothing_is_learned_from_held_out_videos_and_the_cost_is_bounded(world, folder):
    profile, _ = world
    queries = annotations.read_fig(profile.data_dir("charades") / "corpus" / "train.jsonl")
    sides = annotations.split_validation(queries, profile.val_fraction, source.families(profile, "charades"))
    learn, held = map(annotations.gallery_ids, sides)
    used = set(two_stage.load_windows(folder, "train").rows)
    assert len(used & set(learn)) == 4 and len(used & set(held)) == 1 and len(used) == 5
    assert len(training_curves.read_log(folder)) == profile.two_stage.epochs


def split_of(profile):
    """(folder, queries, vectors) of the test split."""
    home = profile.runs("charades")
    queries = annotations.read_fig(profile.data_dir("charades") / "corpus" / "test.jsonl")
    return (
        home,
        queries,
        search_index.load_vectors(profile.data_dir("charades") / "embed" / "engine" / "test"),
    )


def test_the_evaluator_and_t1_agree(world, folder, capsys):
    """T1 counts first search and known-video span; `score` reads ranked lists and knows nothing of either."""
    profile, encoder = world
    home, queries, vectors = split_of(profile)
    column = {video: at for at, video in enumerate(vectors.video_ids)}
    for row, query in enumerate(
        queries[::2]
    ):  # half of the queries find their video, for a random engine may not
        vectors.query_vecs[2 * row] = vectors.video_vecs[column[query.video]]
    first, windows = retrieval.first_search(queries, vectors), two_stage.load_windows(folder, "test")
    answers = two_stage.submission(two_stage.SpanHead(encoder.width, 8).eval(), queries, vectors, windows)
    for query, *lists in list(zip(queries, answers["VCMR"], answers["SVMR"], strict=True))[::3]:
        for line in lists:  # and a third get their moment, wherever their right video is listed
            right = answers["video2idx"][query.video]
            line["predictions"] = [
                [at, *(query.span if at == right else span)] for at, *span in line["predictions"]
            ]
    (home / "submission.json").write_text(json.dumps(answers))
    numbers = two_stage.numbers(profile, "charades", first, two_stage.oracle_spans(home, queries))
    assert not first.ties()
    fig_scorer.print_scores(home / "submission.json", profile.data_dir("charades") / "corpus" / "test.jsonl")
    scored = json.loads(capsys.readouterr().out)
    percent = {name.split("/")[-1]: round(number.value, 2) for name, number in numbers.items()}
    assert 0 < percent["vcmr@0.5"] < percent["grounding@0.5"] < 100
    for m in metrics.THRESHOLDS:
        assert scored["VCMR"][f"{m}-r1"] == percent[f"vcmr@{m}"]
        assert scored["SVMR"][f"{m}-r1"] == percent[f"grounding@{m}"]
    assert [scored["VR"][f"r{k}"] for k in profile.vr_ks] == [percent[f"vr@{k}"] for k in profile.vr_ks]
    assert not [metric for metric in percent if metric.startswith("ver")]  # nobody judges: missing, not 0


def test_a_right_video_without_windows_is_a_miss_that_counts(world, folder):
    profile, encoder = world
    home, queries, vectors = split_of(profile)
    gone, windows = queries[0].video, two_stage.load_windows(folder, "test")
    kept = [at for at, video in enumerate(vectors.video_ids) if video != gone]
    fewer = dataclasses.replace(
        vectors, video_ids=[vectors.video_ids[at] for at in kept], video_vecs=vectors.video_vecs[kept]
    )
    windows.rows.pop(gone)
    answers = two_stage.submission(two_stage.SpanHead(encoder.width, 8).eval(), queries, fewer, windows)
    assert (
        answers["SVMR"][0] == {"desc_id": queries[0].id, "predictions": []} and gone in answers["video2idx"]
    )
    (home / "submission.json").write_text(json.dumps(answers))
    spans = two_stage.oracle_spans(home, queries)
    assert len(spans) == len(queries) and spans[0].tolist() == [0, 0]
