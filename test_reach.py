"""Where people use the optimizers: fully_shard (FSDP2), torch.distributed.checkpoint, frameworks.

Several processes equal one, and a restored run the uninterrupted one. What frameworks do with an
optimizer is tried where they are installed: accelerate, lightning, transformers, peft.
"""
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from foof import FOOF
from mac import MAC
from testing import (OPTIMIZERS, close, factory, loss_of, make_data, make_net, on_ranks, raises,
                     randn, trained, usual)

DATA = make_data(6, batch=12)


# ---- fully_shard ----

def sharded(net, *shape, **options):
    """The network cut into rows over all ranks: its blocks, and what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    names = ("copies", "rows")[-len(shape):]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in (*(net.get_submodule(name) for name in ("block", "encoder")), net):
        fully_shard(module, mesh=mesh, **options)
    return net


def whole(net, optimizer):
    """What testing.snapshot gives, of parameters and states that ranks share."""
    values = {name: p for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            values[f"{name}: {key}"] = value
    values = {key: value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
              for key, value in values.items()}
    return {key: value.detach().double() for key, value in values.items()}


def train_on_ranks(net, optimizer, data, rank, world, parts=1):
    """Each rank's equal share of the batches, in so many micro-batches."""
    for x, y in data:
        optimizer.zero_grad()
        shares = zip(x.chunk(world)[rank].chunk(parts), y.chunk(world)[rank].chunk(parts))
        for i, (x, y) in enumerate(shares, 1):
            net.set_requires_gradient_sync(i == parts)
            (loss_of(net, x, y) / parts).backward()
        optimizer.step()


def under_fully_shard(rank, world, shape, parts, options):
    found = {}
    for name, make in OPTIMIZERS.items():
        net = sharded(make_net(), *shape, **options)
        optimizer = make(net)
        train_on_ranks(net, optimizer, DATA, rank, world, parts)
        found[name] = whole(net, optimizer)
    return found


@pytest.mark.parametrize("shape, parts, options", [
    ((2,), 1, {}), ((3,), 1, {}), ((2, 2), 1, {}), ((2,), 3, {"reshard_after_forward": False})],
    ids=("two", "three", "hybrid", "accumulated"))
def test_fully_shard(shape, parts, options):
    """A grouped convolution, fused qkv, nn.MultiheadAttention; of three ranks one has no row of
    conv1, and the others unequal parts of the head."""
    world = torch.Size(shape).numel()
    results = on_ranks(world, under_fully_shard, shape, parts, options)
    for name, make in OPTIMIZERS.items():
        close(results[0][name], trained(make, data=DATA), 1e-10)
        for result in results[1:]:
            close(result[name], results[0][name], 0)


# ---- torch.distributed.checkpoint ----

def with_extra(x, y, net):
    return F.cross_entropy(net(x, len(x)), y)          # so that no parameter is unused


def wrapped(net, world, kind):
    return {"one": lambda: net, "fsdp": lambda: sharded(net, world),
            "ddp": lambda: nn.parallel.DistributedDataParallel(net)}[kind]()


def saved_on_ranks(rank, world, kind, folder):
    """Six steps, the state written to a folder for each optimizer after three of them."""
    return {name: six_steps(name, rank, world, kind, folder / name, save=True)
            for name in OPTIMIZERS}


def restored_on_ranks(rank, world, kind, folder):
    """The last three of six steps, with other numbers to begin with, from what was written."""
    return {name: six_steps(name, rank, world, kind, folder / name) for name in OPTIMIZERS}


def six_steps(name, rank, world, kind, folder, save=False):
    net = make_net(0 if save else 1)
    model = wrapped(net, world, kind)
    optimizer = OPTIMIZERS[name](model)
    for step, (x, y) in enumerate(DATA):
        if step == 3:
            model_state, state = get_state_dict(model, optimizer)
            both = {"model": model_state, "optimizer": state}
            if save:
                checkpoint.save(both, checkpoint_id=folder)
            else:
                checkpoint.load(both, checkpoint_id=folder)
                set_state_dict(model, optimizer, model_state_dict=both["model"],
                               optim_state_dict=both["optimizer"])
        if save or step >= 3:
            optimizer.zero_grad()
            with_extra(x.chunk(world)[rank], y.chunk(world)[rank], model).backward()
            optimizer.step()
    return whole(net, optimizer)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("before, after", [
    (("fsdp", 2), ("fsdp", 3)), (("ddp", 2), ("fsdp", 2)), (("fsdp", 3), ("one", 1))], ids=str)
def test_distributed_checkpoint(before, after, tmp_path):
    """Another number of ranks goes on as those that saved would have."""
    want = on_ranks(before[1], saved_on_ranks, before[0], tmp_path)[0]
    for result in on_ranks(after[1], restored_on_ranks, after[0], tmp_path):
        for name in OPTIMIZERS:
            close(result[name], want[name], 1e-10)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
