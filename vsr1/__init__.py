"""vsr1: VideoSearch-R1 (arXiv 2607.00446), reproduced in a size that can be read.

Letters for shapes, everywhere in this package:

    Q  queries           V  videos in a gallery        B  rows of a batch
    T  frames            L  tokens of a sequence       N  soft tokens (latents) of one refinement
    H  hidden width of the policy                      D  width of the engine and of its vectors
"""

import importlib


def open(folder, **options):
    """Return a `vsr1.apps.search_folder.Folder`: the videos of a folder, indexed, and the models that search them.

    >>> import vsr1
    >>> found = vsr1.open("~/Videos").search("a child blows out the candles", k=5)  # doctest: +SKIP
    """
    # By name: the first search pays for torch, and no module rests on this one because it says `from vsr1 import`.
    return importlib.import_module("vsr1.apps.search_folder").open_folder(folder, **options)
