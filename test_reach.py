"""Where people use the optimizers: fully_shard (FSDP2), torch.distributed.checkpoint, frameworks.

Several processes equal one, and a restored run the uninterrupted one. What frameworks do with an
optimizer is tried where they are installed: accelerate, lightning, transformers, peft.
"""
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

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


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
