"""The benchmark of large galleries: what it makes up, and that it measures what it says."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from benchmarks import index
from vsr1 import __main__ as cli
from vsr1 import config
from vsr1.models import ivf_index

WORLD = index.World("small", 10**9, 16, 50)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "SHARD", 700)
        patch.setattr(index, "COLD", 2)
        return folder, *index.measure(WORLD, 2000, 64, folder)


def test_vectors_have_length_one_and_members_of_a_cluster_are_alike():
    vecs = index.make_vectors(WORLD, 2000, 64, 3, 500)
    np.testing.assert_allclose(np.linalg.norm(vecs, axis=1), 1, atol=1e-6)
    assert vecs.dtype == np.float32
    np.testing.assert_array_equal(vecs, index.make_vectors(WORLD, 2000, 64, 3, 500))
    clustered, *others = (
        np.sort(vecs @ vecs.T, axis=1)[:, -6].mean()  # the fifth best but itself
        for vecs in (
            vecs,
            index.make_vectors(dataclasses.replace(WORLD, cluster=None), 2000, 64, 3, 500),
            index.make_vectors(index.World("random", 0, None, None), 2000, 64, 3, 500),
        )
    )
    assert clustered > 0.6 > others[0] > others[1]
    rng = np.random.default_rng(0)
    assert (index.moved(vecs, 0.5, rng) * vecs).sum(axis=1).mean() == pytest.approx(1.25**-0.5, abs=0.02)


def test_a_row_says_what_a_second_look_finds(measured):
    folder, row, curve = measured
    paths = sorted(folder.glob("*.npy"))
    assert [len(np.load(path)) for path in paths] == [700, 700, 600]
    vecs, asked = np.concatenate([np.load(path) for path in paths]), index.make_queries(paths)[1::2]
    best = np.argsort(-asked @ vecs.T, axis=1)[:, :10]
    index = ivf_index.open_index(folder / "index.faiss")
    found = index.search(asked, 10)[1]
    assert (row.nprobe, row.lists, row.vectors, row.dimensions) == (index.nprobe, 45, 2000, 64)
    assert row.recall == ivf_index.recalls(found, best).mean() and row.recall > 0.9
    cosines = np.sort(asked @ vecs.T, axis=1)
    assert row.cosine_1 == pytest.approx(cosines[:, -1].mean(), abs=1e-5)
    assert row.cosine_10 == pytest.approx(cosines[:, -10].mean(), abs=1e-5)
    assert 0 < row.ms <= row.ms_95 and 0 < row.cold_ms <= row.cold_ms_95
    assert 0 < row.search_own_gb < row.search_gb
    assert [point[0] for point in curve] == [2**power for power in range(len(curve) - 1)] + [row.nprobe]
    assert row.processor_ms > 0
    assert curve[-1][:2] == [row.nprobe, row.recall]


def test_both_files_hold_every_row(measured, tmp_path):
    _, row, curve = measured
    index.write([row], {row.world: curve}, tmp_path, minutes=1.0)
    told = json.loads((tmp_path / "large.json").read_text())
    assert {"machine", "versions", "commit", "minutes", "worlds", "peak_memory_gb"} <= set(told)
    with open(tmp_path / "large.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["recall"]) == told["rows"][0]["recall"] == pytest.approx(row.recall, abs=1e-4)
    assert len(told["curves"]["small"]) == len(curve)


def test_the_command_gives_its_disk_back_and_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(index, "WORLDS", (WORLD,))
    seen = []

    def measure(world, count, dim, folder):
        seen.append((world, count, dim, folder.exists()))
        row = index.Measurement(world.name, count, dim, 9, 1, 0.96, *[1.0] * 12)
        return dataclasses.replace(row, ms=25.0 if len(seen) == 2 else 19.0), [[1, 0.96, 19.0]]

    monkeypatch.setattr(index, "measure", measure)
    command = ["bench", "large", "--vectors", "2000", "--dimensions", "64"]
    assert [cli.main(command), cli.main(command)] == [0, 1]  # the second is too slow
    assert seen == [(WORLD, 2000, 64, True)] * 2 and not (tmp_path / "runs" / "bench" / "large").exists()
    assert cli.main(["bench", "large", "--vectors", "10"]) == 2
    assert cli.main(["bench", "large", "--vectors", "1000000000000"]) == 2
    small, full = capsys.readouterr().err.splitlines()
    assert "at least --vectors 1000" in small and "GB are free; ask for fewer --vectors" in full
