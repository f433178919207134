"""`python -m vsr1 score SUBMISSION.json GROUNDTRUTH.jsonl`: the evaluator; see vsr1/score.py."""

import sys

from vsr1 import score
from vsr1.params import InputError


def main(argv):
    """Exit status of one command line."""
    if argv[:1] != ["score"]:
        raise InputError("the only command so far is `python -m vsr1 score`")
    return score.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
