"""Import what the processes of a run need, once: they are forked from one that has imported this module."""

from vsr1 import cache
from vsr1.apps import kernels
from vsr1.experiments import (
    ablations,
    premise,
    refinement,
    soft_token_bound,
    training_curves,
    verification,
)
from vsr1.mini import attribute_probe, source
from vsr1.report import html_report

IMPORTED = kernels, ablations, premise, refinement, soft_token_bound, training_curves, verification
IMPORTED += attribute_probe, source, html_report

for name in cache.SOURCES:
    cache.source_digest(name)
