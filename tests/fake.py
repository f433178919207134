"""A measured run that never ran: numbers for three data sets in a scratch folder."""

import numpy as np

from vsr1 import config
from vsr1.report import results
from vsr1.report.results import Estimate


def profile(tmp_path, monkeypatch, name="mini"):
    """A profile whose runs/ and results/ lie in `tmp_path`, without expected values."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    results.layouts(), results.items(), results.published()  # read and kept before their folder is changed
    monkeypatch.setattr(results, "EXPECTED", tmp_path / "expected")
    return config.load(name)


def record(run, value=24.4):
    """Numbers of every table for every data set of the profile `run`."""
    for shift, dataset in enumerate(run.datasets):
        first = value + 10 * shift
        numbers = {
            f"D1/{dataset}/test/queries": Estimate(412, unit="queries"),
            f"D1/{dataset}/test/videos": Estimate(160, unit="videos"),
            f"D1/{dataset}/test/skipped": Estimate(0, unit="videos"),
            f"D1/{dataset}/test/span_seconds": Estimate(7.5, 412, unit="s"),
            f"T1/{dataset}/random/vr@1": Estimate(0.625, 412),
            f"T1/{dataset}/zs/vr@1": Estimate(first, 412, (first - 4, first + 4.5), (42,)),
            f"T1/{dataset}/zs/vr@100": Estimate(99.0, 412, (98.0, 99.5), (42,)),
            f"T1/{dataset}/wholevideo/vcmr@0.7": Estimate(0.0, 412, (0.0, 0.0), (42,)),
            f"T1/{dataset}/zs/ver": Estimate(None, 412, note="no verdict yet"),
            f"H1/{dataset}/zs/vr@1": Estimate(first, 412, (first - 4, first + 4.5), (42,)),
            f"H1/{dataset}/zs/ties": Estimate(3, 412, unit="queries"),
            f"H1/{dataset}/walkdown/vr@1_failed": Estimate(14.0, 300),
            f"H1/{dataset}/probe/vr@1": Estimate(first + 30, 412),
            f"H1/{dataset}/probe/vr@1_failed": Estimate(41.0, 300),
        }
        ks = np.arange(1, 101)
        curve = {f"H2/{dataset}/zs/vr@k": list(zip(ks, 100 - 75 / ks**0.5, strict=True))}
        results.record(run, dataset, "01_corpus_embedding", numbers, curve)
    return run
