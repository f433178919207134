"""FSDP for the two trained stages: a process keeps only its share of what learns and of the optimizer's state.

`accelerate launch` asks for it. torch's `fully_shard` is called here, and accelerate is not told: its own way groups
weights by layer, and knows no CPU. All weights that learn are one group, whole in every process while they are read,
because rollouts, soft tokens and hooks call parts of a model outside its forward, each process as often as it needs.
What does not learn is whole everywhere. Saved states are whole too: any number of processes can go on from them.
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
    """Leaves each process its share of the weights in `optimizer`, if a launcher asked for that; in place.

    Both are new, and go through `accelerator.prepare` next. The states that they save from then on are put together by
    all processes, so all have to ask for them.
    """
    if os.environ.get("FSDP_VERSION") != "2" or cache.dist_state().num_processes == 1:
        return
    names = {id(weight): name for name, weight in model.named_parameters()}
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    shares = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shares[names[id(weight)]] for weight in group["params"]]
    model.register_state_dict_post_hook(_whole_weights)
    model.register_load_state_dict_pre_hook(_share_weights)
    optimizer.register_state_dict_post_hook(_whole_state)
    optimizer.register_load_state_dict_pre_hook(_share_state)
    model.no_sync = functools.partial(_no_sync, model)  # `accelerator.no_sync` asks for it
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda one, **_: prepare(one, device_placement=False, evaluation_mode=True)
    _leave_unused_alone(model, optimizer)


def _leave_unused_alone(model, optimizer):
    """A weight that some process used has a gradient in all, and one that none did has none: Adam passes it by."""
    model.set_reduce_scatter_unused_params(True)  # of zeros, where it was not used
    used = model.used = set()
    shares = {name: weight for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    with unsharded(model):  # the whole weights are the same objects each time
        for name, weight in model.named_parameters():
            if name in shares:
                weight.register_post_accumulate_grad_hook(lambda _, name=name: used.add(name))

    def agree(*_):
        device = next(iter(shares.values())).device
        counts = torch.tensor([name in used for name in shares], dtype=torch.int, device=device)
        distributed.all_reduce(counts)
        for share, count in zip(shares.values(), counts.tolist(), strict=True):
            if not count:
                share.grad = None
        used.clear()

    optimizer.register_step_pre_hook(agree)


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
    """Inside, a model that was dealt out is whole in every process, through any number of forwards and backwards."""
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
    """At the end, makes a model that was dealt out an ordinary one again, whole in every process."""
    if not isinstance(model, FSDPModule):
        return
    found = {}
    for part in model.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                if weight not in found:
                    found[weight] = nn.Parameter(_full(weight))
                setattr(part, name, found[weight])
    model.__class__ = type(model).__mro__[2]  # FSDP's own class stands before it, and wants shares


# --- states, whole in files and in shares here -----------------------------------------------------------------------


def _full(share):
    """The whole tensor, put together by all processes, and without the room that unequal shares were filled up with."""
    return share.detach().full_tensor().clone()


def _whole_weights(model, state, prefix, _):
    found = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, DTensor):
            if weight not in found:  # tied weights stay one
                found[weight] = _full(weight)
            state[prefix + name] = found[weight]


def _share_weights(model, state, prefix, *_):
    for name, weight in model.named_parameters(remove_duplicate=False):
        if isinstance(weight, DTensor) and prefix + name in state:
            state[prefix + name] = _share(state[prefix + name], weight)


def _whole_state(_, state):
    """Of the optimizer: twice the size of the weights, so it is kept by the first process only, outside a GPU."""
    main = cache.dist_state().is_main_process

    def put_together(value):
        value = _full(value)
        return value.cpu() if main else None

    moments = {
        number: {k: put_together(v) if isinstance(v, DTensor) else v for k, v in own.items()}
        for number, own in state["state"].items()
    }
    return state | {"state": moments}


def _share_state(optimizer, state):
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    like = dict(zip(numbers, weights, strict=True))
    moments = {
        number: {k: v if k == "step" else _share(v, like[number]) for k, v in own.items()}
        for number, own in state["state"].items()
    }
    return state | {"state": moments}


def _share(value, like):
    """This process's share of a whole tensor, dealt out as the weight `like` is."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
