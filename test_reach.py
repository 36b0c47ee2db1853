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


class Others(nn.Module):
    """q, k and v of unequal widths, GPT-2's transposed weight, a layer that is cut by columns."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, bias=False, batch_first=True)
        self.turned = Conv1D(6, 8)
        self.columns = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        x = self.first(x)
        return self.columns(self.turned(self.attention(x, x[..., :6], x[..., :6])[0]))


class Conv1D(nn.Module):
    def __init__(self, out, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


def others_on_ranks(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    found = {}
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        net, data = Others().double(), randn(4, 6, 5, 8) + 0.5
        if world > 1:
            net = fully_shard(
                net, mesh=init_device_mesh("cpu", (world,)), shard_placement_fn=lambda p: Shard(1)
                if p is net.columns.weight else Shard(0))
        optimizer = make(net)
        if world > 1:
            assert "columns (its shards" in str(optimizer)
        else:
            optimizer.watcher.contradict(optimizer.layers[net.columns.weight], "so it is there")
        if name == "mac":
            optimizer.calibrate(data[:2, rank::world])
        for x in data[:, rank::world]:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        found[name] = whole(net, optimizer)
    return found


def test_fully_shard_others():
    """What cannot be cut into outputs is gathered, or takes the plain step; MAC calibrated."""
    want, result = others_on_ranks(0, 1), on_ranks(2, others_on_ranks)[1]
    for name in OPTIMIZERS:
        close(result[name], want[name], 1e-10)


def refused_on_ranks(rank, world):
    net, (x, y) = make_net(), DATA[0]
    optimizer = MAC(net)
    loss_of(sharded(net, world), x, y).backward()
    raises(RuntimeError, ["fully_shard", "before MAC is made"], optimizer.step)
    optimizer = MAC(net)
    net.zero_grad()
    loss_of(net, x, y).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    listed = str(optimizer)
    with torch.no_grad():
        net(x)                                      # leaves the root's parameters whole
    assert str(optimizer) == listed


def test_fully_shard_after_the_optimizer():
    on_ranks(2, refused_on_ranks)


def in_bfloat16(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for name, make in OPTIMIZERS.items():
        net = sharded(make_net(dtype=torch.float32), world, mp_policy=policy)
        optimizer = make(net)
        train_on_ranks(net, optimizer, [(x.float(), y) for x, y in DATA], rank, world, 3)
        found[name] = whole(net, optimizer)
        assert not any(value.dtype == torch.bfloat16 for state in optimizer.state.values()
                       for value in state.values() if torch.is_tensor(value))
    return found


def test_fully_shard_in_bfloat16():
    """Statistics of bfloat16 inputs and gradients, in float32; micro-batches add up in float32."""
    result = on_ranks(2, in_bfloat16)[0]
    for name, make in OPTIMIZERS.items():
        want, keys = trained(make, data=DATA), [f"conv1.weight: {key}" for key in (
            "covariance", "sketched", "H", "updates")]
        keys = [key for key in keys if key in want]          # they depend on nothing but the images
        assert result[name].keys() == want.keys() and len(keys) == 2
        close({key: result[name][key] for key in keys}, {key: want[key] for key in keys}, 0.01)
        close(result[name]["head.weight"], want["head.weight"], 0.1)


# ---- torch.distributed.checkpoint ----

def with_extra(x, y, net):
    return F.cross_entropy(net(x, len(x)), y)          # so that no parameter is unused


def wrapped(net, world, kind):
    return {"one": lambda: net, "fsdp": lambda: sharded(net, world),
            "ddp": lambda: nn.parallel.DistributedDataParallel(net)}[kind]()


def saved_on_ranks(rank, world, kind, folder, names):
    """Six steps, the state written to a folder for each optimizer after three of them."""
    return {name: six_steps(name, rank, world, kind, folder / name, save=True) for name in names}


def restored_on_ranks(rank, world, kind, folder, names):
    """The last three of six steps, with other numbers to begin with, from what was written."""
    return {name: six_steps(name, rank, world, kind, folder / name) for name in names}


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
@pytest.mark.parametrize("before, after, names", [
    (("fsdp", 2), ("fsdp", 3), (*OPTIMIZERS,)), (("ddp", 2), ("fsdp", 2), ("mac", "adafisher")),
    (("fsdp", 2), ("one", 1), ("mac", "kfac"))], ids=str)
def test_distributed_checkpoint(before, after, names, tmp_path):
    """Another number of ranks goes on as those that saved would have."""
    want = on_ranks(before[1], saved_on_ranks, before[0], tmp_path, names)[0]
    for result in on_ranks(after[1], restored_on_ranks, after[0], tmp_path, names):
        for name in names:
            close(result[name], want[name], 1e-10)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
