"""A measured run that never ran: numbers for three data sets in a scratch folder."""

import numpy as np

from vsr1 import params, results
from vsr1.results import Number


def profile(tmp_path, monkeypatch, name="mini"):
    """A profile whose runs/ and results/ lie in `tmp_path`, without expected values."""
    monkeypatch.setattr(params, "ROOT", tmp_path)
    results.layouts(), results.items(), results.published()  # read and kept before their folder is changed
    monkeypatch.setattr(results, "EXPECTED", tmp_path / "expected")
    return params.load(name)


def record(run, value=24.4):
    """Numbers of every table for every data set of the profile `run`."""
    for shift, dataset in enumerate(run.datasets):
        first = value + 10 * shift
        numbers = {
            f"D1/{dataset}/test/queries": Number(412, unit="queries"),
            f"D1/{dataset}/test/videos": Number(160, unit="videos"),
            f"D1/{dataset}/test/skipped": Number(0, unit="videos"),
            f"D1/{dataset}/test/span_seconds": Number(7.5, 412, unit="s"),
            f"T1/{dataset}/random/vr@1": Number(0.625, 412),
            f"T1/{dataset}/zs/vr@1": Number(first, 412, (first - 4, first + 4.5), (42,)),
            f"T1/{dataset}/zs/vr@100": Number(99.0, 412, (98.0, 99.5), (42,)),
            f"T1/{dataset}/wholevideo/vcmr@0.7": Number(0.0, 412, (0.0, 0.0), (42,)),
            f"T1/{dataset}/zs/ver": Number(None, 412, note="no verdict yet"),
            f"H1/{dataset}/zs/vr@1": Number(first, 412, (first - 4, first + 4.5), (42,)),
            f"H1/{dataset}/zs/ties": Number(3, 412, unit="queries"),
            f"H1/{dataset}/walkdown/vr@1_failed": Number(14.0, 300),
            f"H1/{dataset}/probe/vr@1": Number(first + 30, 412),
            f"H1/{dataset}/probe/vr@1_failed": Number(41.0, 300),
        }
        ks = np.arange(1, 101)
        curve = {f"H2/{dataset}/zs/vr@k": list(zip(ks, 100 - 75 / ks**0.5, strict=True))}
        results.record(run, dataset, "01_corpus_embedding", numbers, curve)
    return run
