"""FSDP for both training stages: each process keeps only its shard of what learns and of the optimizer's state.

`accelerate launch` asks for it. torch's `fully_shard` is called here without accelerate, whose own way groups weights
by layer and knows no CPU. All weights that learn are one group, whole in every process while they are read, because
rollouts, soft tokens and hooks call parts of a model outside its forward, each process as often as it needs. Weights
that do not learn are whole everywhere. Saved states are whole too: any number of processes can resume from them.
"""

import contextlib
import functools
import os

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vsr1 import cache


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator) -> None:
    """Leave each process its shard of the weights in `optimizer`, in place, if a launcher asked for that.

    Both are new, and go through `accelerator.prepare` next. From then on all processes put the states that they save
    together, so all have to ask for them.
    """
    if os.environ.get("FSDP_VERSION") != "2" or cache.dist_state().num_processes == 1:
        return
    names = {id(weight): name for name, weight in model.named_parameters()}
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[id(weight)]] for weight in group["params"]]
    model.register_state_dict_post_hook(_gather_weights)
    model.register_load_state_dict_pre_hook(_shard_weights)
    optimizer.register_state_dict_post_hook(_gather_moments)
    optimizer.register_load_state_dict_pre_hook(_shard_moments)
    model.no_sync = functools.partial(_no_sync, model)  # `accelerator.no_sync` asks for it
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda part, **_: prepare(part, device_placement=False, evaluation_mode=True)
    _drop_unused_gradients(model, optimizer)


def _drop_unused_gradients(model, optimizer):
    """Give weights that no process used no gradient: FSDP reduces zeros for them, which would move Adam's moments."""
    model.set_reduce_scatter_unused_params(True)
    used = model.used = set()
    shards = {name: weight for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    with unsharded(model):  # the whole weights are the same objects each time
        for name, weight in model.named_parameters():
            if name in shards:
                weight.register_post_accumulate_grad_hook(lambda _, name=name: used.add(name))

    def drop(*_):
        device = next(iter(shards.values())).device
        counts = torch.tensor([name in used for name in shards], dtype=torch.int, device=device)
        distributed.all_reduce(counts)
        for weight, count in zip(shards.values(), counts.tolist(), strict=True):
            if not count:
                weight.grad = None
        used.clear()

    optimizer.register_step_pre_hook(drop)


@contextlib.contextmanager
def _no_sync(model):
    """Inside, gradients add up in each process."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextlib.contextmanager
def unsharded(model: nn.Module):
    """Inside, a sharded model is whole in every process, through any number of forwards and backwards."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.used.clear()  # a step that was not made leaves some
    model.set_reshard_after_backward(False)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
        model.set_reshard_after_backward(True)


def unshard(model: nn.Module) -> None:
    """Make a sharded model an ordinary one again at the end, whole in every process."""
    if not isinstance(model, FSDPModule):
        return
    whole = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                if weight not in whole:
                    whole[weight] = nn.Parameter(_gather(weight))
                setattr(module, name, whole[weight])
    model.__class__ = type(model).__mro__[2]  # FSDP's own class stands before it, and wants shards


# --- States: whole in files, sharded in processes


def _gather(weight):
    """The whole tensor, put together by all processes, without the padding of unequal shards."""
    return weight.detach().full_tensor().clone()


def _shard_like(value, weight):
    """This process's shard of a whole tensor, dealt out as `weight` is."""
    return distribute_tensor(
        value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
    )


def _gather_weights(model, state, prefix, _):
    whole = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, DTensor):
            if weight not in whole:  # tied weights stay one
                whole[weight] = _gather(weight)
            state[prefix + name] = whole[weight]


def _shard_weights(model, state, prefix, *_):
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, DTensor) and prefix + name in state:
            state[prefix + name] = _shard_like(state[prefix + name], weight)


def _gather_moments(_, state):
    """Of the optimizer: twice the size of the weights, so only rank 0 keeps them, outside its GPU."""
    main = cache.dist_state().is_main_process

    def gather(value):
        value = _gather(value)
        return value.cpu() if main else None

    moments = {
        number: {k: gather(v) if isinstance(v, DTensor) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": moments}


def _shard_moments(optimizer, state):
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    weight_of = dict(zip(numbers, weights, strict=True))
    moments = {
        number: {k: v if k == "step" else _shard_like(v, weight_of[number]) for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": moments}
