"""Where people use the optimizers: fully_shard (FSDP2), torch.distributed.checkpoint, frameworks.

Several processes equal one, and a restored run the uninterrupted one. What frameworks do with an
optimizer is tried where they are installed: accelerate, lightning, transformers, peft.
"""
import contextlib
import io
import logging
import re
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mac import MAC
from testing import (OPTIMIZERS, Conv1D, Uses, close, loss_of, make_data, make_net, on_ranks,
                     parameters, raises, randn, snapshot, trained)

DATA = make_data(6, batch=12)
on_cpus = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                             reason="fully_shard of this torch needs GPUs")


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
        found[name] = snapshot(net, optimizer)
    return found


@on_cpus
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
        self.turned = Conv1D(8, 6)
        self.columns = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        x = self.first(x)
        return self.columns(self.turned(self.attention(x, x[..., :6], x[..., :6])[0]))


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
        found[name] = snapshot(net, optimizer)
    return found


@on_cpus
def test_fully_shard_others():
    """What cannot be cut into outputs is gathered, or takes the plain step; MAC calibrated."""
    want, result = others_on_ranks(0, 1), on_ranks(2, others_on_ranks)[1]
    for name in OPTIMIZERS:
        close(result[name], want[name], 1e-10)


def refused_on_ranks(rank, world):
    x, y = DATA[0]
    for switched in (False, True):      # Accelerate's prepare() gives the groups the new parameters
        net = make_net()
        optimizer = MAC(net)
        loss_of(sharded(net, world), x, y).backward()
        if switched:
            optimizer.param_groups[0]["params"] = [*net.parameters()]
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
    older = torch.distributed.fsdp.FullyShardedDataParallel(make_net(), device_id="cpu")
    raises(TypeError, ["fully_shard"], lambda: MAC(older))


@on_cpus
def test_fully_shard_after_the_optimizer():
    on_ranks(2, refused_on_ranks)


def computed_on_ranks(rank, world):
    """A weight is computed from the third step on, and only the last rank's rows have gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.manual_seed(0)
    net = Uses(nn.Linear(4, 6), lambda m, x: m.layer(x), beside=nn.Linear(3, 2)).double()
    optimizer = MAC(fully_shard(net, mesh=init_device_mesh("cpu", (world,))), tcov=1)
    for step in range(3):
        if step == 2:
            net.use = lambda m, x: F.linear(x, 2 * m.layer.weight)[:, -1:]
        optimizer.zero_grad()
        sum(y.square().sum() for y in net(randn(5, 4))).backward()
        optimizer.step()
    return "updates" in optimizer.state[net.layer.weight]


@on_cpus
def test_fully_shard_and_computed_later():
    assert on_ranks(2, computed_on_ranks) == [False, False]


def in_bfloat16(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for name, make in OPTIMIZERS.items():
        net = sharded(make_net(dtype=torch.float32), world, mp_policy=policy)
        optimizer = make(net)
        train_on_ranks(net, optimizer, [(x.float(), y) for x, y in DATA], rank, world, 3)
        found[name] = snapshot(net, optimizer)
        assert not any(value.dtype == torch.bfloat16 for state in optimizer.state.values()
                       for value in state.values() if torch.is_tensor(value))
    return found


@on_cpus
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


# ---- what takes the plain step ----

@pytest.mark.parametrize("rows, warned", [(100, ["8%"]), (5, [])])
def test_warning_of_a_small_share(make, rows, warned):
    """Of 72 numbers in 872 or in 112, once, when it is known what the model uses."""
    net = nn.Sequential(nn.Embedding(rows, 8), nn.Linear(8, 8)).double()
    optimizer = make(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.tensor([0, 3, 1])).square().sum().backward()
            optimizer.step()
    assert [re.search(r"\d+%", str(each.message)).group() for each in caught] == warned


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


def test_reason_of_the_plain_step(make):
    net = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8), nn.Linear(8, 8)).double()
    optimizer = make(net)
    net(randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert str(optimizer).endswith("plain step: 1 (no use of it was seen)")


# ---- torch.distributed.checkpoint ----

def with_extra(x, y, net):
    return F.cross_entropy(net(x, len(x)), y)          # so that no parameter is unused


def wrapped(net, world, kind):
    return {"one": lambda: net, "fsdp": lambda: sharded(net, world),
            "ddp": lambda: nn.parallel.DistributedDataParallel(net)}[kind]()


def with_each(rank, world, names, *arguments):
    return {name: six_steps(rank, world, name, *arguments) for name in names}


def six_steps(rank, world, name, kind, folder, save):
    """Six steps, the state written to a folder after three of them; or only the last three, with
    other numbers to begin with, from what was written."""
    net = make_net(0 if save else 1)
    model = wrapped(net, world, kind)
    optimizer = OPTIMIZERS[name](model)
    for step, (x, y) in enumerate(DATA):
        if step == 3:
            model_state, state = get_state_dict(model, optimizer)
            both = {"model": model_state, "optimizer": state}
            if save:
                checkpoint.save(both, checkpoint_id=folder / name)
            else:
                checkpoint.load(both, checkpoint_id=folder / name)
                set_state_dict(model, optimizer, model_state_dict=both["model"],
                               optim_state_dict=both["optimizer"])
        if save or step >= 3:
            optimizer.zero_grad()
            with_extra(x.chunk(world)[rank], y.chunk(world)[rank], model).backward()
            optimizer.step()
    return snapshot(net, optimizer)


@on_cpus
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("before, after, names", [
    (("fsdp", 2), ("fsdp", 3), (*OPTIMIZERS,)), (("ddp", 2), ("fsdp", 2), ("mac", "adafisher")),
    (("fsdp", 2), ("one", 1), ("mac", "kfac"))], ids=str)
def test_distributed_checkpoint(before, after, names, tmp_path):
    """Another number of ranks goes on as those that saved would have."""
    want = on_ranks(before[1], with_each, names, before[0], tmp_path, True)[0]
    for result in on_ranks(after[1], with_each, names, after[0], tmp_path, False):
        for name in names:
            close(result[name], want[name], 1e-10)


# ---- frameworks ----

HALVES = [half for x, y in DATA for half in zip(x.chunk(2), y.chunk(2))]     # micro-batches


def batches(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def test_accelerate(make):
    """Micro-batches, and steps that its wrapped optimizer takes."""
    accelerator = pytest.importorskip("accelerate").Accelerator(
        cpu=True, gradient_accumulation_steps=2)
    net = make_net()
    optimizer = make(net)
    model, wrapper, loader = accelerator.prepare(net, optimizer, batches(HALVES))
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, y))
            wrapper.step()
            wrapper.zero_grad()
    close(snapshot(net, optimizer), trained(make, data=DATA), 1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("called", ("self", "self.net"))
def test_lightning(make, called):
    """training_step() calls a part of what the optimizer was given; step() takes a closure."""
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, number):
            return loss_of(self if called == "self" else self.net, *batch)

        def configure_optimizers(self):
            return make(self)
    module = Module()
    lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", precision="64-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False).fit(module, batches(HALVES))
    close(snapshot(module.net, module.optimizers().optimizer), trained(make, data=DATA), 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(make, tmp_path):
    """A Trainer's resumed run equals the uninterrupted one; it cannot make the optimizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=30, num_labels=3, hidden_dropout_prob=0.0)
    rows = [dict(input_ids=torch.randint(30, (7,)), labels=torch.tensor(i % 3)) for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=1,
        report_to=[], disable_tqdm=True, save_steps=3, logging_strategy="no")
    ends = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        net = transformers.BertForSequenceClassification(config)
        optimizer = make(net)
        with contextlib.redirect_stdout(io.StringIO()):
            transformers.Trainer(net, arguments, train_dataset=rows, optimizers=(
                optimizer, None)).train(resume_from_checkpoint=resumed)
        ends.append(snapshot(net, optimizer))
    close(ends[1], ends[0], 0)
    assert ends[0]["bert.encoder.layer.0.output.dense.weight: updates"] == 3
    raises(TypeError, ["not list", "optimizers="], transformers.Trainer(
        net, arguments, train_dataset=rows,
        optimizer_cls_and_kwargs=(make.Optimizer, {"lr": 0.1})).create_optimizer)


def test_peft(make):
    """LoRA: frozen weights have no state, no sums and no line among those that take a step."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0,
        eos_token_id=0))
    net = peft.get_peft_model(net, peft.LoraConfig(
        target_modules=["c_attn"], r=4, fan_in_fan_out=True))
    optimizer, before = make(net), parameters(net)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randint(50, (2, 8))
        net(input_ids=x, labels=x).loss.backward()
        assert not any(layer.pending for layer in optimizer.layers.values() if not layer.active)
        optimizer.step()
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name, p in parameters(net).items()
            if not torch.equal(p, before[name])} == trainable and len(trainable) == 4
    assert optimizer.state.keys() == {p for p in net.parameters() if p.requires_grad}
    assert "preconditioned: 4 weights, 100.0% of all numbers" in str(optimizer)
    assert str(optimizer).endswith("plain step: nothing else")


def zero_redundancy(rank, world):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    ddp = nn.parallel.DistributedDataParallel(make_net(), find_unused_parameters=True)
    raises(TypeError, ["the first argument is the model"],
           lambda: ZeroRedundancyOptimizer(ddp.parameters(), MAC, lr=0.1))
    optimizer = ZeroRedundancyOptimizer(
        ddp.parameters(), lambda groups, **options: MAC(ddp, params=groups, **options), lr=0.1)
    loss_of(ddp, *DATA[0]).backward()
    raises(RuntimeError, ["ZeroRedundancyOptimizer", "fully_shard"], optimizer.step)


def test_zero_redundancy_optimizer():
    on_ranks(2, zero_redundancy)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
