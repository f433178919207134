"""What one of two processes of a test does: `torchrun --nproc_per_node 2 tests/one_of_two.py JOB FOLDER WORDS...`."""

import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path

import test_grpo
import test_sft
import torch
from safetensors.torch import save_file
from tiny import random_engine, random_policy, random_vectors

from vsr1 import __main__ as cli
from vsr1 import cache, config
from vsr1.apps import pipeline
from vsr1.models import embedding
from vsr1.training import sft


def grpo_loop(folder, prompts):
    """Stage 2 with so many starts a step, killed in its third and resumed; the weights that it ends with."""
    knobs = dataclasses.replace(test_grpo.knobs(), grpo_prompts_per_step=int(prompts), scale_rewards="batch")
    starts = test_grpo.made_starts(random_vectors())

    def fatal(number, *_):
        if number == 3:
            raise test_grpo.Killed

    for killed in (True, False):
        trainer = test_grpo.steadily(test_grpo.begin(knobs, random_engine(), random_vectors()))
        if killed:
            trainer._check_skipped = fatal
        with contextlib.suppress(test_grpo.Killed):
            trainer.run(starts, starts[:2], folder, "two")
    assert trainer.accelerator.num_processes == 2
    keep(trainer.accelerator, trainer.objective, folder)


def sft_loop(folder):
    """Stage 1, and the weights that it ends with."""
    assert cache.dist_state().num_processes == 2
    trainer = test_sft.short_course(folder, random_policy(), random_engine())
    trainer.train()
    keep(trainer.accelerator, trainer.model, folder)


def keep(accelerator, model, folder):
    """The weights of a model that accelerate may have wrapped, as end.safetensors."""
    if accelerator.is_main_process:
        state = accelerator.unwrap_model(model).state_dict()
        save_file({name: weight.clone() for name, weight in state.items()}, folder / "end.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def commands(folder, *words):
    """Commands of the package, split by "then", in a clone of their own."""
    config.ROOT, embedding.SHARD_SIZE = folder, 3
    for command in " ".join(words).split(" then "):
        if status := cli.main(command.split()):
            return status


def dying(folder, *words):
    """The same, but the second process is killed behind the first checkpoint of stage 1."""
    step = sft.Trainer.training_step

    def fatal(self, *args, **options):
        if self.state.global_step == 2 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **options)

    sft.Trainer.training_step = fatal
    return commands(folder, *words)


def refused(folder, process):
    """A stage that one process cannot build, while the other works."""

    def build(partial):
        if cache.dist_state().process_index == int(process):
            raise config.InputError("this one has no videos; bring some")
        cache.dist_state().wait_for_everyone()

    cli.RANK_0_FIRST = 0  # only one of the two has something to say
    pipeline.corpus = lambda *_: cache.build(folder / "out", {}, build, distributed=True)
    return cli.main(["corpus", "--profile", "smoke"])


torch.set_num_threads(1)
if __name__ == "__main__":
    jobs = {job.__name__: job for job in (grpo_loop, sft_loop, commands, dying, refused)}
    sys.exit(jobs[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:]))
