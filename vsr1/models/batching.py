"""Group rows into batches, and halve a batch that does not fit in memory."""

import gc
import warnings

import torch


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Group row numbers by similar length, padded size at most `max_tokens`, longest first.

    Longest first, so that a batch too large for the memory fails at once and not after an hour.

    >>> batches([5, 9, 5], 10)
    [[1], [0, 2]]
    """
    groups, group = [], []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            groups.append(group)
            group = []
        group.append(row)
    return [*groups, group] if group else groups


class OOMSplitter:
    """Run work on whole batches until one does not fit in memory, and on half batches from then on.

    The first out-of-memory error is a warning that names `knob`. A second one is raised.
    """

    def __init__(self, knob: str):
        self.knob, self.parts = knob, 1

    def run(self, work, rows: list) -> list:
        """Return [work(part)] for the parts of `rows` in their order; parts done before the error are done again."""
        size = -(-len(rows) // self.parts)
        try:
            return [work(rows[start : start + size]) for start in range(0, len(rows), size)]
        except torch.OutOfMemoryError:
            if self.parts > 1 or len(rows) < 2:
                raise
        self.parts = 2
        warnings.warn(
            f"{len(rows)} at once do not fit in memory: half of {self.knob} from now on", stacklevel=2
        )
        gc.collect()
        torch.cuda.empty_cache()
        return self.run(work, rows)
