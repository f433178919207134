"""Group rows into batches, and halve a batch that does not fit in memory."""

import warnings

import torch


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Row numbers in groups of similar length whose padded size stays within `max_tokens`; longest first.

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
    """Work on rows all at once; where memory does not suffice, in halves from then on. It is said, and happens once."""

    def __init__(self, knob: str):
        self.knob, self.parts = knob, 1

    def run(self, work, rows: list) -> list:
        """[work(some of the rows)], in their order; what had been done when memory ran out is done again."""
        size = -(-len(rows) // self.parts)
        try:
            return [work(rows[at : at + size]) for at in range(0, len(rows), size)]
        except torch.OutOfMemoryError:
            if self.parts > 1 or len(rows) < 2:
                raise
        self.parts = 2
        warnings.warn(
            f"{len(rows)} at once do not fit in memory: half of {self.knob} from now on", stacklevel=2
        )
        return self.run(work, rows)
