"""What holds for every optimizer: what counts as a pass, torch's interface, several processes.

Mostly one way of training is compared with another that must end at the same parameters and state.
"""
import contextlib
import copy
import functools
import gc
import importlib.util
import inspect
import io
import math
import weakref

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as prune
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import models
from blocks import joined
from testing import (OPTIMIZERS, SGD_FAMILY, Uses, close, copy_of_run, device_type, known, loop_of,
                     loss_of, make_data, make_net, on_ranks, only, only_cpu, parameters, raises,
                     randn, set_everywhere, snapshot, take_step, trained, usual)


@functools.cache
def reference(make):
    """What the usual loop gives."""
    return trained(make)


# ---- the capture rule: each of these loops must end where the usual one ends ----

def zero_after_forward(model, optimizer, data):
    for x, y in data:
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def zero_by_model(model, optimizer, data):
    """model.zero_grad() in place of the optimizer's, before and after the forward pass in turn."""
    for i, (x, y) in enumerate(data):
        if i % 2 == 0:
            model.zero_grad()
        loss = loss_of(model, x, y)
        if i % 2 == 1:
            model.zero_grad()
        loss.backward()
        optimizer.step()


def extra_forwards(model, x, y):
    """Forwards that are not backpropagated: before, between and after, in every mode."""
    model.eval()
    model(x + 1)
    model.train()
    kept = [model(x + 2)]
    loss = loss_of(model, x, y)
    kept.append(model(x + 3))
    with torch.no_grad():
        model(x + 4)
    loss.backward()
    kept.append(model(x + 5))


def with_copies(model, x, y):
    """Copies by copy.deepcopy and torch.save that are trained in between feed nothing."""
    loss, file = loss_of(model, x, y), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in copy.deepcopy(model), torch.load(file, weights_only=False):
        loss_of(other, 3 * x, y).backward()
    loss.backward()


def skipped_steps(zero_grad, forward_first):
    """Before each step another batch goes forward and back, and its step is left out."""
    def loop(model, optimizer, data):
        for x, y in data:
            for inputs, labels, step in ((3 * x - 1, y, False), (x, y, True)):
                if not forward_first:
                    zero_grad(model, optimizer)
                loss = loss_of(model, inputs, labels)
                if forward_first:
                    zero_grad(model, optimizer)
                loss.backward()
                if step:
                    optimizer.step()
    return loop


def micro_batches(sizes):
    """Each batch in pieces; each piece's loss is weighted by its share of the batch."""
    def work(model, x, y):
        for part, labels in zip(x.split(sizes), y.split(sizes)):
            (loss_of(model, part, labels) * len(part) / len(x)).backward()
    return loop_of(work)


def with_a_gradient_by_inputs(model, x, y):
    """After the backward pass one that ends at the inputs, as for a saliency map."""
    loss_of(model, x, y).backward()
    z = (3 * x).requires_grad_()
    torch.autograd.grad(loss_of(model, z, y), z)
    loss_of(model, z, y).backward(inputs=[z])


def with_an_empty_batch(model, x, y):
    loss_of(model, x, y).backward()
    model(x[:0]).sum().backward()


def forwards_before_backwards(model, x, y):
    """Two micro-batches whose forward passes both come before the backward passes."""
    losses = [loss_of(model, part, labels) / 2 for part, labels in zip(x.chunk(2), y.chunk(2))]
    for loss in losses:
        loss.backward()


LOOPS = {
    "zero after forward": (zero_after_forward, 0), "zero by model": (zero_by_model, 0),
    "extra forwards": (loop_of(extra_forwards), 0), "copies": (loop_of(with_copies), 0),
    "gradient by inputs": (loop_of(with_a_gradient_by_inputs), 0),
    "empty batch": (loop_of(with_an_empty_batch), 0),
    "forwards before backwards": (loop_of(forwards_before_backwards), 1e-11),
} | {
    f"micro-batches of {sizes}": (micro_batches(sizes), 1e-11)
    for sizes in (3, 2, [1, 5], [3, 1, 2])
} | {
    f"skipped step, {name}{', forward first' * first}": (skipped_steps(zero_grad, first), 1e-14)
    for first in (False, True) for name, zero_grad in (
        ("zero_grad()", lambda model, optimizer: optimizer.zero_grad()),
        ("model.zero_grad()", lambda model, optimizer: model.zero_grad()),
        ("set_to_none=False", lambda model, optimizer: optimizer.zero_grad(set_to_none=False)))}


@pytest.mark.parametrize("loop", LOOPS)
def test_loop(make, loop):
    close(trained(make, LOOPS[loop][0]), reference(make), LOOPS[loop][1])


@only("mac", "foof", "nysact", "adafisher")         # the steps of the others see the loss's scale
def test_loss_scale(make):
    """The loss times 2¹⁰ and the gradients divided by it; AdaFisher's S sees it, F̃ does not."""
    def scaled(model, x, y):
        (loss_of(model, x, y) * 1024).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= 1024
    got = {k: v for k, v in trained(make, loop_of(scaled)).items() if not k.endswith(": S")}
    close(got, {key: reference(make)[key] for key in got}, 0)


@pytest.mark.parametrize("repeats", (1, 2))
@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(make, repeats, reentrant):
    want = trained(make, net=make_net(repeats=repeats))
    for loop in (usual, micro_batches([2, 4])):
        net = make_net(repeats=repeats, checkpointing=reentrant)
        close(trained(make, loop, net=net), want, 1e-11)


@pytest.mark.parametrize("fused", (False, True))
def test_grad_scaler(make, fused):
    """A scale so large that gradients overflow float32, once at the start and again after growth.

    Scales are powers of two, so the steps that are taken equal those of plain training.
    """
    scaler = torch.amp.GradScaler(device_type(), init_scale=2.0 ** 127, growth_factor=2.0 ** 8,
                                  backoff_factor=2.0 ** -8, growth_interval=5)
    taken, data = [], make_data(14, dtype=torch.float32)

    def scaled(model, optimizer, data):
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(64 * loss_of(model, x, y)).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() >= before:
                taken.append((x, y))

    plain = loop_of(lambda model, x, y: (64 * loss_of(model, x, y)).backward())
    options = dict(lr=1e-5, fused=True) if fused else dict(lr=1e-5)
    got = trained(make, scaled, data, make_net(dtype=torch.float32), grad_scaler=scaler, **options)
    close(got, trained(make, plain, taken, make_net(dtype=torch.float32), **options), 0)
    assert 2 <= len(data) - len(taken) <= 8, "the scale was to overflow twice at least"


def test_pickled_model(make):
    """A saved model drags nothing along but inert hooks."""
    net, sizes = make_net(), []
    for optimizer in (None, make(net)):
        if optimizer:
            usual(net, optimizer, make_data(2))
            net.zero_grad()
        file = io.BytesIO()
        torch.save(net, file)
        sizes.append(len(file.getvalue()))
    assert sizes[1] - sizes[0] < 20 * len(list(net.modules()))


class Activated(nn.Module):
    """Activations of layer outputs: 2-D, 3-D, with and without bias, single images."""

    def __init__(self, in_place):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False),
                                     nn.Linear(16, 6), nn.Linear(6, 6, bias=False),
                                     nn.Linear(6, 6), nn.Linear(6, 5, bias=False)])
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x):
        x = self.act(self.layers[0](x))
        x = torch.stack([self.act(self.layers[1](image)) for image in x])   # unbatched input
        x = x.flatten(2)                                                    # (B, 4, 16)
        x = self.act(self.layers[3](self.act(self.layers[2](x)))).mean(1)   # (B, 6)
        return self.act(self.layers[5](self.act(self.layers[4](x))))


def test_in_place_activations(make):
    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        results.append(trained(make, net=Activated(in_place).double()))
    close(results[1], results[0], 0)
    assert all(any(key.startswith(f"layers.{i}.weight: ") for key in results[0]) for i in range(6))


class Compiled(nn.Module):
    """Few layers, as each hooked one costs the compiler about a tenth of a second."""

    def __init__(self):
        super().__init__()
        self.conv, self.fused = nn.Conv2d(3, 8, 3, stride=3), models.Attention(8, 2)
        self.multi, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.fused(self.conv(x).relu().flatten(2).mT)
        return self.fc(self.multi(x, x, x, need_weights=False)[0].mean(1))


def compiled_net():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Compiled().double()


@only("mac", "kfac")                # the others share the code that this is about, which is slow
def test_compile(make):
    """torch.compile's graph equals eager, and is compiled for on and off steps, then no more."""
    want, frames = trained(make, net=compiled_net()), []

    def compiled(model, optimizer, data):
        fast = torch.compile(model, backend="aot_eager")
        for x, y in data:
            take_step(model, optimizer, loss_of(fast, x, y))
            frames.append(torch._dynamo.utils.counters["frames"]["total"])
    close(trained(make, compiled, net=compiled_net()), want, 1e-11)
    assert frames[-1] == frames[3]


def alternating(fast):
    """The plain model where statistics are collected, else the compiled one, fast(model)."""
    def loop(model, optimizer, data):
        compiled = fast(model)
        for x, y in data:
            optimizer.zero_grad()
            loss_of(model if optimizer.collecting else compiled, x, y).backward()
            optimizer.step()
    return loop


@only("mac", "kfac")
def test_compile_off_steps(make):
    """Where the plain model collects statistics the compiled one is one graph."""
    want, graphs = trained(make, net=compiled_net()), []
    loop = alternating(lambda model: torch.compile(model, backend=lambda graph, inputs: lambda *x:
                                                   graphs.append(1) or graph.forward(*x)))
    close(trained(make, loop, net=compiled_net()), want, 0)
    assert len(graphs) == 4, "tcov is 2, of 8 steps"


def test_layer_that_rests(make):
    """A layer's average counts the updates of its own; at rest it keeps its state."""
    def statistics(data, extra_in, **options):
        net = make_net()
        optimizer = make(net, lr=0.0, **options)
        for i, (x, y) in enumerate(data):
            take_step(net, optimizer, F.cross_entropy(net(x, 4 if i in extra_in else 0), y))
        return {key: value for key, value in snapshot(net, optimizer).items()
                if key.startswith("extra.weight: ") and "moment" not in key and "step" not in key}
    data = make_data(12)
    got = statistics(data, (1, 4, 7, 10), tcov=2, tinv=2)
    want = statistics([data[4], data[10]], (0, 1), tcov=1, tinv=1)
    assert want
    close(got, want, 1e-12)


@pytest.mark.parametrize("compute", (
    lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh())))
def test_weight_computed_later(make, compute):
    """Its statistics describe it no more: it takes the plain step, also in print."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer, weight = make(net, tcov=1, tinv=1), net[0].weight
    for step in range(4):
        assert ("updates" in optimizer.state[weight]) == (step > 0)
        if step == 3:
            compute(net[0])
        take_step(net, optimizer, net(randn(5, 4)).square().sum())
    assert "updates" not in optimizer.state[weight] and "0: 3×5" not in str(optimizer)
    assert optimizer.state[net[2].weight]["updates"] == 4


def copy_trained(net, optimizer, x, y):
    loss_of(copy.deepcopy(net), x, y).backward()


def zero_grad_late(net, optimizer, x, y):
    loss_of(net, x, y).backward()
    optimizer.zero_grad(set_to_none=False)


def zero_grad_late_by_model(net, optimizer, x, y):
    loss_of(net, x, y).backward()
    net.zero_grad()


def forward_only(net, optimizer, x, y):
    net(x)


@pytest.mark.parametrize("cause", (copy_trained, zero_grad_late, zero_grad_late_by_model,
                                   forward_only))
def test_first_step_without_capture(make, cause):
    """RuntimeError, and nothing has changed."""
    net = make_net()
    optimizer = make(net)
    before = snapshot(net, optimizer)
    cause(net, optimizer, *make_data(1)[0])
    raises(RuntimeError, ["zero_grad()", "copy", "compiled", "backward()"], optimizer.step)
    close(snapshot(net, optimizer), before, 0)
    usual(net, optimizer, make_data(8))
    close(snapshot(net, optimizer), reference(make), 0)


def test_compiled_before(make):
    """A model that was compiled and called before the optimizer was made runs without its hooks."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    fast = torch.compile(net, backend="eager")
    fast(torch.randn(5, 4))
    optimizer = make(net)
    fast(torch.randn(5, 4)).sum().backward()
    raises(RuntimeError, ["compiled and called before"], optimizer.step)


@pytest.mark.parametrize("poison", (math.inf, math.nan))
def test_non_finite_input(make, poison):
    """A statistic that is not finite: the layer's name; nothing has changed, training goes on."""
    net, data = make_net(), make_data(8)
    optimizer = make(net)
    usual(net, optimizer, data[:4])
    before = snapshot(net, optimizer)
    x, y = data[0]
    x = x.clone()
    x[0, 0, 2, 2] = poison
    raises(FloatingPointError, ["layer conv1 ", "step 4"], lambda: usual(net, optimizer, [(x, y)]))
    close(snapshot(net, optimizer), before, 0)
    usual(net, optimizer, data[4:])
    close(snapshot(net, optimizer), reference(make), 0)


@only("mac", "foof", "nysact")                      # to the others all gradients are nan then
def test_non_finite_inside(make):
    net = make_net()
    optimizer = make(net)
    net.block.mlp.fc1.register_forward_hook(lambda _, args, y: y * math.inf)
    raises(FloatingPointError, ["layer block.mlp.fc2 ", "step 0"],
           lambda: usual(net, optimizer, make_data(1)))


def test_nothing_kept_alive(make):
    """After the step no activation lives on; without its optimizer the model has no hook."""
    net, alive = make_net(), []
    optimizer = make(net, tcov=1)
    hooks = [net.get_submodule(name).register_forward_hook(
        lambda _, args, y: alive.append(weakref.ref(args[0])))
        for name in ("conv2", "block.attn", "block.attn.qkv", "encoder.self_attn", "head")]
    usual(net, optimizer, make_data(1))
    for handle in hooks:
        handle.remove()
    gc.collect()
    assert len(alive) == 5 and not any(ref() is not None for ref in alive)
    del optimizer
    gc.collect()
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_collected_in_a_pass(make):
    """An optimizer that another one replaced may be collected at any time."""
    net, modes = make_net(), _get_current_function_mode_stack()
    old = make(net)
    old.itself = old                                        # it lives on until a collection
    optimizer = make(net)

    def collect(*_):                                        # returns None: the output stays
        gc.collect()
    net.conv1.register_forward_hook(collect)
    del old
    usual(net, optimizer, make_data(8))
    close(snapshot(net, optimizer), reference(make), 0)
    assert _get_current_function_mode_stack() == modes


# ---- torch's interface ----

def with_another_bias():
    """A layer that parts with its bias, beside an ordinary one."""
    return nn.Sequential(Uses(nn.Linear(108, 9), lambda m, x: F.linear(
        x.flatten(1), m.layer.weight, 2 * m.layer.bias)), nn.Linear(9, 5)).double()


RESUMED = {     # the network, the step at which it goes on, options
    "between statistics": (make_net, 5, {}), "before a refresh": (make_net, 5, dict(tcov=3)),
    "before statistics": (make_net, 4, dict(momentum=0.0)),
    "nothing due": (make_net, 5, dict(tcov=4, tinv=2)),
    "bfloat16": (lambda: make_net(dtype=torch.bfloat16), 5, dict(tcov=3, tinv=2)),
    "bfloat16, before statistics": (lambda: make_net(dtype=torch.bfloat16), 4, {}),
    "stacks": (lambda: make_twins(), 4, dict(loss_terms=6)),
    "no bias": (with_another_bias, 3, {}),
    "all layers used": (lambda: compiled_net(), 3, {}),       # torch.distributed asks for that
}


@pytest.mark.parametrize("case, flat", [(case, None) for case in RESUMED] + [
    (case, flat) for case in ("all layers used", "no bias") for flat in (False, True)])
def test_resume(make, case, flat):
    """Bit-exact, whatever is due at that step: from a file read by torch.load's default into an
    optimizer with a state; from torch.distributed.checkpoint's into one that took no step."""
    build, step, options = RESUMED[case]
    net, fresh = build(), build()
    dtype = next(net.parameters()).dtype
    data = twins_data() if case == "stacks" else make_data(10, dtype=dtype)
    optimizer, resumed = make(net, **options), make(fresh, **options)
    usual(net, optimizer, data[:step])
    if flat is None:
        usual(fresh, resumed, data[-1:])
    copy_of_run(net, optimizer, fresh, resumed, flat)
    for model, each in ((net, optimizer), (fresh, resumed)):
        usual(model, each, data[step:])
    close(snapshot(fresh, resumed), snapshot(net, optimizer), 0)
    for p, q in zip(net.parameters(), fresh.parameters()):
        for key, value in optimizer.state.get(p, {}).items():
            assert not torch.is_tensor(value) or resumed.state[q][key].dtype == value.dtype, key


def test_refused_checkpoint_changes_nothing(make):
    net, other = (nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3)) for n in (6, 9))
    optimizer, source = make(net), make(other)
    take_step(other, source, other(torch.randn(6, 4)).square().mean())
    raises(ValueError, ["of layer", " is "],
           lambda: optimizer.load_state_dict(source.state_dict()))
    assert all(layer.bias is not None and not layer.found for layer in optimizer.layers.values())


def test_zeros_of_a_trial_step_are_not_applied(make):
    """torch.distributed.checkpoint makes a state of zeros; a layer that first runs between two
    refreshes gets what its own statistics give."""
    ends = []
    for asked in (True, False):
        net = make_net()
        optimizer = make(net, tcov=1, tinv=50)
        if asked:
            get_optimizer_state_dict(net, optimizer)
        for i, (x, y) in enumerate(make_data(3)):
            take_step(net, optimizer, F.cross_entropy(net(x, 4 if i else 0), y))
        ends.append(parameters(net))
    close(*ends, 0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_state_is_plain(make, dtype):
    """Strings as keys, tensors and numbers as values, under the parameters; float32 at least.

    print(optimizer) tells the bytes of the statistics.
    """
    net = make_net(dtype=dtype)
    optimizer = make(net)
    (x, y), = make_data(1, dtype=dtype)
    take_step(net, optimizer, F.cross_entropy(net(x, 4), y))
    size = 0
    for p, state in optimizer.state.items():
        assert isinstance(p, nn.Parameter)
        for key, value in state.items():
            assert isinstance(key, str) and isinstance(value, (torch.Tensor, int, float))
            if torch.is_tensor(value) and key != "momentum_buffer":
                assert value.dtype == torch.promote_types(dtype, torch.float32), key
                size += value.numel() * value.itemsize
    assert f"{size:,} bytes of statistics" in str(optimizer)


def test_step_hooks_and_closures(make):
    """Hooks fire once, also if a plain SGD was made first, or even before the file's import."""
    torch.optim.SGD(make_net().parameters(), lr=1.0)
    net, fired, batch = make_net(), [], make_data(1)[0]
    optimizer = make(net)
    again = importlib.util.spec_from_file_location("again", inspect.getfile(make.Optimizer))
    module = importlib.util.module_from_spec(again)
    again.loader.exec_module(module)
    late = getattr(module, make.Optimizer.__name__)(net, lr=0.0)
    every = register_optimizer_step_post_hook(lambda *_: fired.append("all"))
    try:
        for each in (optimizer, late):
            each.register_step_pre_hook(lambda *_: fired.append("pre"))
            each.register_step_post_hook(lambda *_: fired.append("post"))

        def closure():
            optimizer.zero_grad()
            loss = loss_of(net, *batch)
            loss.backward()
            return loss
        want = loss_of(net, *batch).item()
        assert optimizer.step(closure).item() == want
        late.step()
    finally:
        every.remove()
    assert fired == ["pre", "post", "all"] * 2
    close(snapshot(net, optimizer), trained(make, data=[batch]), 0)


def test_raw_gradients_again(make):
    net = make_net()
    optimizer = make(net)
    for x, y in make_data(4):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        want = {name: (p.grad, p.grad.clone()) for name, p in net.named_parameters()
                if p.grad is not None}
        optimizer.step()
    for name, (grad, values) in want.items():
        assert net.get_parameter(name).grad is grad and torch.equal(grad, values), name


@pytest.mark.parametrize("decoupled", (False, True))
def test_scheduler(make, decoupled):
    """A rate that a scheduler set is that of the constructor, everywhere in the step."""
    def scheduled(model, optimizer, data):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.25)
        for batch in data:
            usual(model, optimizer, [batch])
            scheduler.step()
    options = dict(weight_decay=0.3, decoupled_weight_decay=decoupled)
    lr = 0.1 if issubclass(make.Optimizer, torch.optim.SGD) else 1e-3
    close(trained(make, scheduled, lr=lr, **options), trained(make, lr=lr / 4, **options), 1e-13)


def test_parameter_groups(make):
    """Names, groups, groups added later and an empty one change nothing."""
    net = make_net()
    close(trained(make, net=net, params=net.named_parameters()), reference(make), 0)
    net = make_net()
    params = list(net.parameters())                 # weights and biases apart
    close(trained(make, net=net, params=[dict(params=[]), dict(params=params[1::2]),
                                         dict(params=params[::2])]), reference(make), 0)
    for i in (0, 1):
        net = make_net()
        halves = [list(net.conv1.parameters()), list(net.parameters())[2:]]
        optimizer = make(net, params=halves[i])
        optimizer.add_param_group({"params": halves[1 - i]})
        usual(net, optimizer, make_data(8))
        close(snapshot(net, optimizer), reference(make), 0)


def test_layers_that_left_their_group(make):
    """No step collects for them."""
    net, batch = make_net(), make_data(1)
    optimizer = make(net, tcov=1)
    usual(net, optimizer, batch)
    optimizer.param_groups[0]["params"] = [net.conv1.bias]
    usual(net, optimizer, batch)
    assert not optimizer.collecting
    usual(net, optimizer, batch)


@pytest.mark.parametrize("switched", (False, True))
def test_parameters_that_were_replaced(make, switched):
    """An error tells what replaces them, also where the groups were given the new ones."""
    net = make_net()
    optimizer = make(net)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    if switched:
        optimizer.param_groups[0]["params"] = [*net.parameters()]
        optimizer.load_state_dict(optimizer.state_dict())
    loss_of(net, *make_data(1)[0]).backward()
    raises(RuntimeError, ["model's no more", "fully_shard()", "assign=True"], optimizer.step)


def test_group_options(make):
    """Two groups do what optimizers with their options do: a step, then state, as weights stay."""
    options = [known(make.Optimizer, values) for values in (
        dict(tcov=2, tinv=3, stat_decay=0.9, gamma=0.9, beta=0.5, damping=0.5, weight_decay=0.3,
             averaging="printed"),
        dict(tcov=3, tinv=4, stat_decay=0.5, gamma=0.5, beta=0.9, damping=2.0, weight_decay=0.1,
             averaging="released"))]
    for lr, steps in ((0.1, 1), (0.0, 9)):
        net, data, common = make_net(), make_data(steps), dict(lr=lr, kl_clip=None)
        params = list(net.parameters())
        groups = [dict(params=params[:2], **options[0]), dict(params=params[2:], **options[1])]
        got = trained(make, data=data, net=net, params=groups, **common)
        want = [trained(make, data=data, **common, **option) for option in options]
        close(got, {key: want[not key.startswith("conv1")][key] for key in got}, 0)


def test_parameters_that_stay(make):
    """Those of a group with lr=0, and of no group; all others move."""
    net = make_net()
    before = parameters(net)
    usual(net, make(net, params=[{"params": list(net.conv1.parameters()), "lr": 0.0},
                                 {"params": list(net.block.parameters())}]), make_data(8))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("block"), name


def test_maximize(make):
    loop = loop_of(lambda model, x, y: (-loss_of(model, x, y)).backward())
    got, names = trained(make, loop, maximize=True), parameters(make_net())
    close({name: got[name] for name in names}, {name: reference(make)[name] for name in names}, 0)


def frozen_block():
    net = make_net()
    net.block.mlp.requires_grad_(False)
    return net


@pytest.mark.parametrize("build, size", (
    (lambda: models.resnet20(5), 6), (frozen_block, 6),
    (lambda: models.VisionTransformer(6, 2, 24, 2, 3, 5, 3), 6),
    (lambda: models.SwinTransformer(24, 8, (2, 2), (2, 2), 5), 24)),
    ids=("ResNet", "torch's encoder, frozen and unused layers", "ViT", "Swin"))
def test_every_parameter_moves(make, build, size):
    net = build().double()
    before = parameters(net)
    usual(net, make(net, weight_decay=0.0),
          [(F.interpolate(x, size) + 0.1 * randn(6, 3, size, size), y) for x, y in make_data(3)])
    for name, p in net.named_parameters():
        frozen = not p.requires_grad or name.startswith("extra")
        assert torch.equal(p, before[name]) == frozen and p.isfinite().all(), name


class Twins(nn.Module):
    """Layers of equal shapes, with and without bias, grouped, tied and frozen."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(5))
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.strided.weight = self.plain[0].weight              # one weight, two geometries
        self.modes = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
                                   for mode in ("zeros", "reflect", "replicate", "circular"))
        self.groups = nn.ModuleList(nn.Conv2d(4, 4, 2, groups=2) for _ in range(3))
        self.lines = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 5)
        self.lines[1].weight.requires_grad_(False)
        self.lines[2].bias.requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        for conv in (*self.plain, self.strided, *self.modes):
            x = x + F.interpolate(torch.tanh(conv(x)), x.shape[2:])
        for conv in self.groups:
            x = torch.tanh(conv(x))
        x = x.mean((2, 3))
        for i, line in enumerate(self.lines):
            x = x if i == 3 and len(x) % 2 else x + torch.tanh(line(x))    # one is skipped at times
        return self.head(x)


def make_twins():
    torch.manual_seed(0)
    return Twins().double()


def twins_data():
    """Images of three sizes, in batches of five and six."""
    return [(F.interpolate(x, 6 + i % 3)[:5 + i % 2], y[:5 + i % 2])
            for i, (x, y) in enumerate(make_data(9))]


def two_at_a_time(model, optimizer, data):
    """Micro-batches of images of two sizes."""
    for pair in zip(data, data[1:]):
        take_step(model, optimizer, sum(loss_of(model, x, y) for x, y in pair))


@only(*SGD_FAMILY)
@pytest.mark.parametrize("loop", (usual, two_at_a_time))
def test_stacks(make, loop, monkeypatch):
    """Layers of one shape take their step together as they do one by one, or two by two."""
    want = trained(make, loop, twins_data(), make_twins(), loss_terms=11)
    for stack in (1, 2 * 4 * 4 * 9):
        set_everywhere(monkeypatch, "STACK", stack)
        close(trained(make, loop, twins_data(), make_twins(), loss_terms=11), want, 1e-11)


def test_joined():
    """All parts of a tensor in order are that tensor, without a copy; others are put together."""
    whole = randn(6, 2)
    parts = whole.split(2)
    assert joined(parts) is whole and joined(parts[:1]) is parts[0]
    for some in (parts[:2], parts[::-1]):
        close(joined(some), torch.cat(some), 0)


def test_launches(make):
    """Off steps compute nothing in the passes, and launch as much for 30 layers as for 3."""
    counts = {}
    for depth in (3, 30):
        blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
                                nn.ReLU()) for _ in range(depth)]
        net = nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.Linear(64, 5))
        optimizer = make(net, tcov=3, tinv=100, foreach=True)
        for step, batch in enumerate(make_data(5, dtype=torch.float32)):
            names = []
            for model in (copy.deepcopy(net), net):                    # the copy's hooks are inert
                model.zero_grad()
                with bench.Operators() as launches:
                    loss_of(model, *batch).backward()
                names.append(launches.names)
            assert (names[0] == names[1]) == (step % 3 != 0), step
            with bench.Operators() as launches:
                optimizer.step()
        counts[depth] = len(launches.names)
    assert counts[30] <= counts[3]


@only(*SGD_FAMILY)
def test_fused(make):
    """SGD gets gradients that lie in memory as their parameters do: its fused kernel needs it."""
    for channels_last in ((), (3,), (0, 1, 3, 5)):
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 2, groups=6),
                                nn.Tanh(), nn.Conv2d(6, 6, 2), nn.Tanh(), nn.Conv2d(6, 6, 2),
                                nn.Flatten(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)).double()
            for i in channels_last:
                net[i].to(memory_format=torch.channels_last)
            results.append(trained(make, net=net, fused=fused))
        close(results[1], results[0], 1e-12)


@only(*SGD_FAMILY)
@pytest.mark.parametrize("options", (
    {}, dict(momentum=0.0), dict(nesterov=True), dict(weight_decay=0.1), dict(foreach=True),
    dict(foreach=False), dict(fused=True), dict(maximize=True)), ids=str)
@pytest.mark.parametrize("resumed", (False, True))
def test_is_sgd_for_large_damping(make, options, resumed):
    """ρ → ∞ is torch's SGD, with all its options, also where that one's checkpoint is loaded.

    All but MAC leave the factor 1/ρ to lr.
    """
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2, bias=False),
                        nn.Tanh(), nn.Flatten(), nn.Linear(54, 5)).double()
    data, nets = make_data(6), (net, copy.deepcopy(net))
    damping, options = 2.0 ** 100, dict(lr=0.1, momentum=0.9) | options
    factor = 1.0 if make is OPTIMIZERS["mac"] else damping
    sgd = torch.optim.SGD(nets[1].parameters(), **options)
    if resumed:
        usual(nets[1], sgd, data[:3])
        nets[0].load_state_dict(nets[1].state_dict())
    decay = options.get("weight_decay", 0.0)
    own = options | dict(lr=options["lr"] * factor, weight_decay=decay / factor)
    optimizer = make(nets[0], damping=damping, kl_clip=None, **own)
    if resumed:
        saved = copy.deepcopy(sgd.state_dict())
        for state in saved["state"].values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"] /= factor
        saved["param_groups"][0] |= dict(lr=own["lr"], weight_decay=own["weight_decay"])
        optimizer.load_state_dict(saved)
    for net, each in zip(nets, (optimizer, sgd)):
        usual(net, each, data[3:])
    close(parameters(nets[0]), parameters(nets[1]), 1e-11)


@only(*SGD_FAMILY, "adafisherw")
def test_decoupled_weight_decay(make):
    """W ← (1 − η·wd)W before the step without decay; parameters without gradient do not decay."""
    nets = make_net(), make_net()
    one = make(nets[0], weight_decay=0.3, decoupled_weight_decay=True)
    two = make(nets[1], weight_decay=0.0)
    for i, (x, y) in enumerate(make_data(5)):
        one.param_groups[0]["lr"] = two.param_groups[0]["lr"] = lr = 0.1 / (1 + i)
        usual(nets[0], one, [(x, y)])
        two.zero_grad()
        loss_of(nets[1], x, y).backward()
        with torch.no_grad():
            for p in nets[1].parameters():
                if p.grad is not None:
                    p.mul_(1 - lr * 0.3)
        two.step()
    close(snapshot(nets[0], one), snapshot(nets[1], two), 1e-12)
    assert one.param_groups[0]["weight_decay"] == 0.3


class OneDevice(TorchDispatchMode):
    """Raises where an operator meets tensors of two devices, or the host reads from a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        devices = {x.device for x in tree_leaves((args, kwargs or {}))
                   if torch.is_tensor(x) and x.dim()}
        assert len(devices) < 2 or name in ("copy_", "_to_copy"), (name, devices)
        assert name not in ("_local_scalar_dense", "nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@only_cpu
def test_devices(make, monkeypatch):
    """Away from the CPU nothing stays on it; a step without statistics reads nothing from there.

    The meta device stands in for a GPU: its tensors have no numbers, so each read is answered here.
    """
    reads = []

    def counts(tensor):              # of rows; KFAC: of ranks that failed; least and most
        reads.append("tolist")
        failed = 0.0 if make is OPTIMIZERS["kfac"] else 1.0
        return [1.0] * (len(tensor) - 3) + [failed, 1.0, 1.0]

    def no_failure(tensor):
        reads.append("bool")
        return False
    net = make_net(dtype=torch.float32).to("meta")
    optimizer = make(net, foreach=True)
    x, y = torch.empty(6, 3, 6, 6, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    for name, fake in dict(tolist=counts, __bool__=no_failure, cpu=lambda tensor: tensor).items():
        monkeypatch.setattr(torch.Tensor, name, fake)
    set_everywhere(monkeypatch, "full_precision", lambda device: contextlib.nullcontext())
    for step in range(5):
        reads.clear()
        with OneDevice():
            usual(net, optimizer, [(x, y)])
        assert reads.count("tolist") == (step % 2 == 0), (step, reads)
        assert step % 2 == 0 or step % 3 == 0 or not reads, (step, reads)
    assert {v.device.type for s in optimizer.state.values() for v in s.values()
            if torch.is_tensor(v)} == {"meta"}


def test_all_weights_frozen(make):
    """A bias learns where all weights are frozen."""
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    net[0].weight.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    assert take_step(net, make(net), net(randn(5, 4)).square().sum())["0.bias"].any()


def test_unfrozen(make):
    """Where all weights were frozen and others learned, the next batch counts."""
    net = Uses(nn.Linear(4, 3), lambda m, x: m.layer(x + m.shift)).double()
    net.shift = nn.Parameter(randn(4))
    net.layer.requires_grad_(False)
    optimizer = make(net, loss_terms=5)
    for step in range(4):
        net.layer.requires_grad_(step > 1)
        take_step(net, optimizer, net(randn(5, 4)).square().sum())
    assert optimizer.state[net.layer.weight]["updates"] == 1


def test_step_of_an_empty_batch(make):
    """Later than the first: nothing is added to the averages."""
    net = make_net()
    optimizer = make(net)
    usual(net, optimizer, make_data(2))
    take_step(net, optimizer, net(make_data(1)[0][0][:0]).sum())
    assert optimizer.state[net.head.weight]["updates"] == 1


@only(*SGD_FAMILY)
@pytest.mark.filterwarnings("ignore:.* no weight")
def test_warm_up_from_zero_without_layers(make):
    """A first step at lr 0 is a step: its gradient is in the momentum."""
    ends = []
    for Optimizer in (make, torch.optim.SGD):
        net = nn.Embedding(3, 3).double()
        nn.init.ones_(net.weight)
        optimizer = Optimizer(net if Optimizer is make else net.parameters(), lr=0.0, momentum=0.9,
                              weight_decay=0.0)
        for lr in (0.0, 0.1):
            optimizer.param_groups[0]["lr"] = lr
            take_step(net, optimizer, net.weight.square().sum())
        ends.append(net.weight)
    close(*ends, 1e-14)


@pytest.mark.parametrize("Optimizer", (torch.optim.RMSprop, torch.optim.Adam))
def test_checkpoint_of_another_optimizer(make, Optimizer):
    """What it lacks is as when the optimizer was made."""
    net, other = make_net(), make_net(1)
    source = Optimizer(other.parameters(), lr=1e-3, **known(Optimizer, dict(momentum=0.9)))
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    source.step()
    optimizer = make(net)
    optimizer.load_state_dict(source.state_dict())
    usual(net, optimizer, make_data(2))
    assert optimizer.state[net.head.weight]["updates"] == 1
    assert optimizer.param_groups[0]["tcov"] == 2 and optimizer.param_groups[0]["lr"] == 1e-3


# ---- what is refused ----

def test_arguments_refused(make):
    bad = dict(damping=(0, -1.0, math.inf, math.nan), stat_decay=(1.0, -0.1, math.nan),
               gamma=(1.0, -0.1), beta=(1.0,), tcov=(0, -5, 2.5, math.inf, math.nan),
               tinv=(0, 1.5, math.inf, math.nan), rank=(0, 1.5, "10", None),
               seed=(-1, 2 ** 32, "0", None), sketch=("columns", 1), averaging=("mean",),
               fisher=("true",), inverse=("exact",), weight_sharing=("none",), loss_terms=("rows",),
               kl_clip=(0.0, math.nan), weight_decay=(-0.1, None), momentum=(-0.5, math.nan),
               lr=(-1.0, math.nan, math.inf, "1"),
               decoupled_weight_decay=(2,))
    net = make_net()
    for name, values in known(make.Optimizer, bad).items():
        for value in values:
            raises(ValueError, [name, str(value)],
                   lambda: make.Optimizer(net, **{name: value}))
    params = [{"params": list(net.head.parameters()), "damping": -2}]
    raises(ValueError, ["damping", "-2"], lambda: make(net, params=params))
    optimizer = make(net, params=[net.conv1.weight])
    for wrong in (dict(tcov=0), dict(lr=-1)):
        raises(ValueError, [*wrong], lambda: optimizer.add_param_group(
            dict(params=list(net.head.parameters())) | wrong))
    assert len(optimizer.param_groups) == 1
    if issubclass(make.Optimizer, torch.optim.SGD):
        raises(ValueError, ["Nesterov"], lambda: make(net, momentum=0.0, nesterov=True))
    with pytest.warns(UserWarning, match="no Linear|no weight"):
        make(nn.Sequential(nn.Embedding(3, 3)))
    raises(TypeError, ["torch.nn.Module", "params="], lambda: make.Optimizer(net.parameters()))
    raises(TypeError, ["DataParallel"], lambda: make(nn.DataParallel(net)))
    raises(ValueError, ["uninitialized", "dummy batch"], lambda: make(nn.LazyLinear(3)))


DEFAULTS = dict(
    MAC=dict(damping=1.0, input_covariance=True, attention=True), FOOF=dict(damping=1.0),
    NysAct=dict(damping=1.0, rank=10, sketch="gaussian", seed=0),
    KFAC=dict(damping=0.03, fisher="empirical", inverse="factored", weight_sharing="expand",
              loss_terms="samples", kl_clip=1e-3, grad_scaler=None))
OF_SGD = dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, decoupled_weight_decay=False,
              stat_decay=0.95, tcov=5, tinv=50, maximize=False, foreach=None, fused=None)
OF_ADAFISHER = dict(lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3, gamma=0.8, tcov=100,
                    averaging="released", maximize=False, grad_scaler=None)


def test_defaults(make):
    """As documented, for keywords only; those of plain() are the class's."""
    signature = inspect.signature(make.Optimizer).parameters
    own = DEFAULTS.get(make.Optimizer.__name__)
    want = OF_ADAFISHER if own is None else OF_SGD | own
    found = {name: p.default for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    assert found == want | dict(params=None) and len(signature) == len(found) + 1
    for name, p in inspect.signature(inspect.getmodule(make.Optimizer).plain).parameters.items():
        assert p.default is p.empty or name in ("first", "decoupled") or p.default == want[name]
        assert name not in ("first", "decoupled") or p.default is False


# ---- several processes ----

RANK_DATA = make_data(6, batch=12)


def under_ddp(rank, world, name):
    """Equal shards in DDP; the layer `extra` runs on the first rank only."""
    net = make_net(seed=rank)                    # DDP hands rank 0's parameters to the others
    model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = OPTIMIZERS[name](model)
    for x, y in RANK_DATA:
        x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(x, len(x) if rank == 0 else 0), y).backward()
        optimizer.step()
    return snapshot(net, optimizer)


def without_ddp(rank, world, name):
    """Shards of 1, 2, ... samples and the rest, two micro-batches, gradients averaged by hand."""
    net = make_net()
    optimizer = OPTIMIZERS[name](net)
    sizes = [1, 2][:world - 1]
    sizes.append(12 - sum(sizes))
    for x, y in RANK_DATA:
        x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        optimizer.zero_grad()
        for part, labels in zip(x.tensor_split(2), y.tensor_split(2)):
            if len(part):
                (loss_of(net, part, labels) * len(part) * world / 12).backward()
        for p in net.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
            p.grad /= world              # as DDP does, and as statistics of gradients expect
        optimizer.step()
    return snapshot(net, optimizer)


@only_cpu
@pytest.mark.parametrize("world", (2, 3))
@pytest.mark.parametrize("work", (under_ddp, without_ddp))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks(name, work, world):
    """Processes with different data equal one with all of it, and each other bit for bit."""
    n_extra = 12 // world if work is under_ddp else 0

    loop = loop_of(lambda model, x, y: F.cross_entropy(model(x, n_extra), y).backward())
    results, want = on_ranks(world, work, name), trained(OPTIMIZERS[name], loop, RANK_DATA)
    if work is without_ddp:            # its zero gradients decay and give momentum to `extra`
        for values in (*results, want):
            for key in [key for key in values if key.startswith("extra")]:
                del values[key]
    close(results[0], want, 1e-11)
    for result in results[1:]:
        close(result, results[0], 0)


# ---- on a GPU alone ----

def on_the_gpu(optimizer):
    return all(v.is_cuda for state in optimizer.state.values() for v in state.values()
               if torch.is_tensor(v))


@pytest.mark.only_cuda
def test_as_on_the_cpu(make):
    net = make_net()
    with torch.device("cpu"):
        want = trained(make, net=copy.deepcopy(net).cpu(),
                       data=[(x.cpu(), y.cpu()) for x, y in make_data(8)])
    close(trained(make, net=net), want, 1e-9)


@pytest.mark.only_cuda
def test_fp16(make):
    """Autocast and a scale that overflows at first: skipped steps change nothing, all others move
    every parameter, and statistics are float32, on the GPU."""
    net, skipped = make_net(dtype=torch.float32), 0
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** 40, backoff_factor=2.0 ** -4)
    optimizer, start = make(net, grad_scaler=scaler, lr=1e-3), parameters(net)
    for x, y in make_data(20, dtype=torch.float32):
        before, scale = snapshot(net, optimizer), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(net, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            close(snapshot(net, optimizer), before, 0)
    assert 0 < skipped < 15 and on_the_gpu(optimizer)
    for name, p in net.named_parameters():
        assert p.isfinite().all() and torch.equal(p, start[name]) == name.startswith("extra"), name
    assert {v.dtype for state in optimizer.state.values() for v in state.values()
            if torch.is_tensor(v)} == {torch.float32}


@pytest.mark.only_cuda
@pytest.mark.parametrize("options", (dict(foreach=True), dict(fused=True)), ids=str)
def test_no_synchronisation(make, options):
    """Where no statistics and no refresh are due the host waits for nothing."""
    net, data = make_net(dtype=torch.float32), make_data(9, dtype=torch.float32)
    optimizer = make(net, tcov=4, tinv=4, **options)
    try:
        for step, batch in enumerate(data):
            torch.cuda.set_sync_debug_mode("error" if step % 4 else "default")
            usual(net, optimizer, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_the_gpu(optimizer)


@pytest.mark.only_cuda
@only("mac", "kfac", "adafisher")
def test_cuda_graphs(make):
    """torch.compile(mode="reduce-overhead") of the model, between statistics, trains as eager."""
    loop = alternating(lambda model: torch.compile(model, mode="reduce-overhead"))
    want = trained(make, net=compiled_net())
    close(trained(make, loop, net=compiled_net()), want, 1e-9)
