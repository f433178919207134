"""One of the two processes of a test in test_grpo.py: `torchrun --nproc_per_node 2 tests/one_of_two.py FOLDER`."""

import sys
from pathlib import Path

import test_grpo
import torch
from safetensors.torch import save_file
from tiny import random_engine

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    course = test_grpo.begin(test_grpo.knobs(), random_engine(), test_grpo.made_vectors())
    starts = test_grpo.made_starts(test_grpo.made_vectors())
    course.run(starts, starts[:2], folder, "two")
    assert course.accelerator.num_processes == 2
    if course.accelerator.is_main_process:
        state = course.accelerator.unwrap_model(course.learner).state_dict()
        save_file({name: weight.clone() for name, weight in state.items()}, folder / "end.safetensors")
    course.accelerator.end_training()
