"""vsr1: VideoSearch-R1 (arXiv 2607.00446), reproduced in a size that can be read.

Letters for shapes, everywhere in this package:

    Q  queries           V  videos in a gallery        B  rows of a batch
    T  frames            L  tokens of a sequence       N  soft tokens (latents) of one refinement
    H  hidden width of the policy                      D  width of the engine and of its vectors
"""
