"""A layer is a use of a weight: what the optimizers see of a model, whatever its code looks like.

`test_use` needs no knowledge of a model's inside. A weight that meets rows a and makes rows s of
them has the gradient G = Σ g aᵀ, g = ∂loss/∂s. With no more rows than outputs and random g this
gives the rows back, a = (gᵀ)⁺ G. With them the step is formed as the paper has it.
"""
import contextlib
import copy
import functools
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import models
from adafisher import AdaFisherW
from test_math import EXACT, METHODS, formula
from testing import (OPTIMIZERS, Conv1D, Uses, close, factory, loop_of, loss_of, make_data,
                     on_ranks, only, parameters, randn, snapshot, take_step, trained,
                     usual)

SIX = {name: METHODS[name] for name in ("mac", "foof", "nysact, exact", "kfac", "adafisher")}
SIX["adafisherw"] = factory(AdaFisherW, **EXACT, weight_decay=0.0)


def listed(optimizer):
    """The names that print(optimizer) says are preconditioned."""
    lines = str(optimizer).split("preconditioned:")[1].split("plain step:")[0].split("\n")[1:]
    return {line.split(":")[0].strip() for line in lines if line.strip()}


# ---- uses of a weight ----

def own(kind, forward, *arguments, **options):
    """Builds a layer of a subclass with this forward(self, x)."""
    return functools.partial(type("Own", (kind,), dict(forward=forward)), *arguments, **options)


def affine(m, x):
    return F.linear(x, m.weight, m.bias)


def mirrored(m, x):
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.weight, m.bias, m.stride)


def standardised(m, x):
    w = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, w / w.flatten(1).std(1)[:, None, None, None], m.bias)


def called(m, x):
    return m.layer(x)


def replaced():
    layer = nn.Linear(4, 9)
    layer.forward = lambda x: F.linear(2 * x, layer.weight, layer.bias)
    return layer


def hooked():
    layer = nn.Linear(4, 9)
    layer.register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
    return layer


def linear():
    return nn.Linear(4, 9)


def plain_linear():
    return nn.Linear(4, 9, bias=False)


def square():
    return nn.Linear(9, 9, bias=False)


def conv(**options):
    return functools.partial(nn.Conv2d, 2, 8, 2, **options)


def parametrized(wrap):
    return lambda: wrap(nn.Linear(4, 9))


def functional(function):
    return lambda m, x: function(x, m.layer.weight, m.layer.bias)


def constant_too(m, x):
    """A use of the numbers in the weight, through which it gets no gradient."""
    with torch.no_grad():
        constant = m.layer.weight[:]
    return m.layer(x) + F.linear(x ** 2, constant)


def at_last(m, x):
    """A use that comes after a proper one."""
    return m.layer(x), torch.einsum("od,bd->bo", m.layer.weight, x)


NORMED = own(nn.Linear, lambda m, x: affine(m, F.layer_norm(x, x.shape[-1:])), 4, 9)
ROWS, TOKENS, IMAGES = (5, 4), (2, 3, 4), (2, 2, 3, 3)
EXACT_USES = {      # the layer, its use, x's shape; what comes out is (..., out) or (B, out, ...)
    "normalises": (NORMED, called, ROWS),
    "normalises tokens": (NORMED, called, TOKENS),
    "pads": (own(nn.Linear, lambda m, x: affine(m, F.pad(x, (1, 0))), 5, 9), called, ROWS),
    "drops": (own(nn.Linear, lambda m, x: affine(m, F.dropout(x, 0.5)), 4, 9), called, ROWS),
    "squares": (own(nn.Linear, lambda m, input: torch.addmm(
        m.bias, input * input, m.weight.t()), 4, 9), called, ROWS),
    "pads its images": (own(nn.Conv2d, mirrored, 2, 8, 3, stride=2), called, IMAGES),
    "turns its images": (own(nn.Conv2d, lambda m, x: nn.Conv2d.forward(m, x.mT).mT, 2, 8, (1, 3)),
                         called, (2, 2, 3, 4)),
    "returns tokens": (own(nn.Conv2d, lambda m, x: nn.Conv2d.forward(m, x).flatten(2).mT, 2, 9, 2),
                       called, IMAGES),
    "forward replaced": (replaced, called, ROWS),
    "pre-hook": (hooked, called, ROWS),
    "F.linear": (linear, functional(F.linear), TOKENS),
    "F.linear, keywords": (linear, lambda m, x: F.linear(
        bias=m.layer.bias, input=x, weight=m.layer.weight), TOKENS),
    "F.linear, no bias": (plain_linear, functional(F.linear), ROWS),
    "@ w.t()": (plain_linear, lambda m, x: x @ m.layer.weight.t(), TOKENS),
    "@ w.T": (plain_linear, lambda m, x: x @ m.layer.weight.T, ROWS),
    "@ w.mT": (square, lambda m, x: x @ m.layer.weight.mT, (5, 9)),
    "matmul": (plain_linear, lambda m, x: torch.matmul(x, m.layer.weight.transpose(0, 1)), TOKENS),
    "linalg.matmul": (plain_linear, lambda m, x: torch.linalg.matmul(x, m.layer.weight.T), TOKENS),
    "mm": (plain_linear, lambda m, x: x.mm(m.layer.weight.t()), ROWS),
    "mm, keyword": (plain_linear, lambda m, x: torch.mm(x, mat2=m.layer.weight.t()), ROWS),
    "addmm": (linear, lambda m, x: torch.addmm(m.layer.bias, x, m.layer.weight.t()), ROWS),
    "Tensor.addmm": (linear, lambda m, x: m.layer.bias.addmm(x, m.layer.weight.t()), ROWS),
    "Conv1D": (functools.partial(Conv1D, 4, 9), called, TOKENS),
    "F.conv2d": (conv(), functional(F.conv2d), IMAGES),
    "F.conv2d, own padding": (conv(), lambda m, x: F.conv2d(
        x, m.layer.weight, m.layer.bias, stride=2, padding=(0, 1)), IMAGES),
    "a view of all rows": (plain_linear, lambda m, x: F.linear(x, m.layer.weight[:]), ROWS),
    "twice": (linear, lambda m, x: (m.layer(x[:2]), F.linear(x[2:] + 1, m.layer.weight,
                                                             m.layer.bias)), ROWS),
    "without its gradient too": (plain_linear, constant_too, ROWS),
    "checkpointed function": (linear, lambda m, x: checkpoint(
        lambda x: F.linear(x.tanh(), m.layer.weight, m.layer.bias), x, use_reentrant=False), ROWS),
    "checkpointed module": (NORMED, lambda m, x: checkpoint(
        m.layer, x.requires_grad_(), use_reentrant=True), ROWS),
}
LONE_USES = {       # the bias is none of the weight's inputs' coordinates: it takes the plain step
    "bias added later": (linear, lambda m, x: x @ m.layer.weight.t() + m.layer.bias, ROWS),
    "no bias": (linear, lambda m, x: F.linear(x, m.layer.weight), ROWS),
    "another bias": (linear, lambda m, x: F.linear(x, m.layer.weight, 2 * m.layer.bias), ROWS),
    "no bias the second time": (linear, lambda m, x: (m.layer(x[:2]), F.linear(
        x[2:], m.layer.weight)), ROWS),
}
PLAIN_USES = {      # what the statistics do not describe, or nobody sees
    "its transpose": (square, lambda m, x: x @ m.layer.weight, (5, 9)),
    "F.linear of the transpose": (square, lambda m, x: F.linear(x, m.layer.weight.t()), (5, 9)),
    "on the left": (square, lambda m, x: m.layer.weight @ x, (9, 5)),
    "encoder and decoder": (square, lambda m, x: F.linear(
        F.linear(x, m.layer.weight).tanh(), m.layer.weight.t()), (5, 9)),
    "Conv1D, turned": (functools.partial(Conv1D, 9, 9), lambda m, x: F.linear(
        x, m.layer.weight, m.layer.bias), (5, 9)),
    "scaled": (linear, lambda m, x: F.linear(x, 2 * m.layer.weight, m.layer.bias), ROWS),
    "cast": (linear, lambda m, x: F.linear(x.float(), m.layer.weight.float()).double(), ROWS),
    "masked": (plain_linear, lambda m, x: F.linear(x, m.layer.weight * (m.layer.weight > 0)), ROWS),
    "standardised": (own(nn.Conv2d, standardised, 2, 8, 2), called, IMAGES),
    "weight norm": (parametrized(nn.utils.parametrizations.weight_norm), called, ROWS),
    "spectral norm": (parametrized(nn.utils.parametrizations.spectral_norm), called, ROWS),
    "of a sparse input": (plain_linear, lambda m, x: x.to_sparse() @ m.layer.weight.t(), ROWS),
    "of a nested input": (linear, lambda m, x: m.layer(torch.nested.nested_tensor(
        [x[:2], x[2:]])).to_padded_tensor(0.0), ROWS),
    "some of its rows": (linear, lambda m, x: F.linear(
        x, m.layer.weight[:3], m.layer.bias[:3]), ROWS),
    "all its rows, in parts": (plain_linear, lambda m, x: torch.cat(
        [F.linear(x, part) for part in m.layer.weight.split([3, 6])], -1), ROWS),
    "every third row": (plain_linear, lambda m, x: F.linear(x, m.layer.weight[::3]), ROWS),
    "some of its columns": (plain_linear, lambda m, x: F.linear(x[:, :3], m.layer.weight[:, :3]),
                            ROWS),
    "some of its filters": (conv(bias=False), lambda m, x: F.conv2d(x, m.layer.weight[:4]), IMAGES),
    "some of its groups": (conv(groups=2, bias=False), lambda m, x: F.conv2d(
        x, m.layer.weight[:4], groups=2), IMAGES),
    "other groups": (conv(groups=2, bias=False), lambda m, x: F.conv2d(
        x[:, :1], m.layer.weight), IMAGES),
    "filters as rows": (conv(bias=False), lambda m, x: F.linear(
        F.unfold(x, 2).mT, m.layer.weight.flatten(1)), IMAGES),
    "einsum": (plain_linear, lambda m, x: torch.einsum("od,bd->bo", m.layer.weight, x), ROWS),
    "a module, then einsum": (plain_linear, at_last, ROWS),
    "a module and inner": (plain_linear, lambda m, x: (m.layer(x), torch.inner(
        3 * x, m.layer.weight)), ROWS),
    "a module and embedding": (plain_linear, lambda m, x: (m.layer(x), F.embedding(
        torch.tensor([0, 3]), m.layer.weight)), ROWS),
    "a module and Tensor.inner": (plain_linear, lambda m, x: (m.layer(x), (3 * x).inner(
        m.layer.weight)), ROWS),
    "a module, and on the left": (square, lambda m, x: (m.layer(x), m.layer.weight @ x.mT), (5, 9)),
    "by its own transpose": (square, lambda m, x: (m.layer(x), m.layer.weight @ m.layer.weight.T),
                             (5, 9)),
    "input of another layer": (square, lambda m, x: (m.layer(x), m.beside(m.layer.weight[:, :3])),
                               (5, 9)),
    "turned, input of another layer": (own(nn.Linear, affine, 4, 3), lambda m, x: (
        m.layer(x), m.beside(m.layer.weight.t())), ROWS),
    "addmm with factors": (linear, lambda m, x: torch.addmm(
        m.layer.bias, x, m.layer.weight.t(), alpha=0.5), ROWS),
    "batches of matrices": (square, lambda m, x: torch.bmm(
        x, m.layer.weight.expand(2, 9, 9)), (2, 3, 9)),
    "transposed convolution": (conv(bias=False), lambda m, x: F.conv_transpose2d(
        x, m.layer.weight.mT), (2, 8, 3, 3)),
    "checkpointed function, reentrant": (linear, lambda m, x: checkpoint(
        lambda x: F.linear(x, m.layer.weight, m.layer.bias), x.requires_grad_(),
        use_reentrant=True), ROWS),
}


def step_of(make, net, x, steps=1):
    """The optimizer after its last step, outputs with gradients, by how much parameters moved."""
    optimizer = make(net, loss_terms=len(x), stat_decay=0.0, gamma=0.0)
    for _ in range(steps):
        ys = net(x)
        ys = [ys] if torch.is_tensor(ys) else ys
        for y in ys:
            y.retain_grad()
        torch.manual_seed(1)
        moved = take_step(net, optimizer, sum((y * randn(*y.shape)).sum() for y in ys))
    return optimizer, ys, moved


def matrix(layer, weight, bias):
    """[W | b] with an output a row, of a layer's weight and bias or what belongs to them."""
    weight = weight.mT if isinstance(layer, Conv1D) else weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


@pytest.mark.parametrize("method", SIX)
@pytest.mark.parametrize("use", [*EXACT_USES, *LONE_USES])
def test_use(use, method):
    """The step of the rows that the weight really met; print lists the layer."""
    build, function, shape = (EXACT_USES | LONE_USES)[use]
    net = Uses(build(), function).double()
    layer = net.layer
    make = SIX[method]
    if use == "twice":                      # parts of a batch: K-FAC asks how many terms there are
        make = functools.partial(make, loss_terms=shape[0])
    # the uses before the one without the bias are lost to the first step
    steps = 2 if "second time" in use else 1
    optimizer, ys, moved = step_of(make, net, randn(*shape) + 0.5, steps)
    bias = None if layer.bias is None or use in LONE_USES else layer.bias.grad
    G = matrix(layer, layer.weight.grad, bias)
    blocks = layer.groups if isinstance(layer, nn.Conv2d) else 1
    G, g = G.view(blocks, len(G) // blocks, -1), []
    for y in ys:
        last = y.grad if y.shape[-1] == len(G[0]) * blocks else y.grad.movedim(1, -1)
        g.append(last.reshape(-1, blocks, G.shape[1]).transpose(0, 1))
    g = torch.cat(g, 1)                                              # (blocks, R, out/blocks)
    assert g.shape[1] <= g.shape[2], "too few outputs to tell the rows"
    a = torch.linalg.pinv(g.mT) @ G
    want = formula(method.removesuffix("w"), G, [(a[:, None], g[:, None])],
                   dict(samples=shape[0]), 0.3)
    close(matrix(layer, moved["layer.weight"], None if bias is None else moved["layer.bias"]),
          want.flatten(0, 1), 1e-9)
    if use in LONE_USES and layer.bias.grad is not None:
        close(moved["layer.bias"], layer.bias.grad, 1e-12)
    assert listed(optimizer) == {"layer"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("method", SIX)
@pytest.mark.parametrize("use", PLAIN_USES)
def test_use_that_takes_the_plain_step(use, method):
    """And print does not list the layer."""
    build, function, shape = PLAIN_USES[use]
    net = Uses(build(), function, beside=nn.Linear(3, 2)).double()
    optimizer, _, moved = step_of(SIX[method], net, randn(*shape) + 0.5)
    for name, p in net.named_parameters():
        if name.startswith("layer"):
            close(moved[name], torch.zeros_like(p) if p.grad is None else p.grad, 1e-6
                  if use == "cast" else 1e-12)
    assert listed(optimizer) == {"beside"}


def test_bias_frozen_later(make):
    """Once it is a constant the weight's step is that of the rows a, not of [a; 1]."""
    ends = []
    for later in (False, True):
        net = small()
        net.mlp.bias.requires_grad_(later)
        optimizer = make(net)
        net.mlp.bias.requires_grad_(False)
        usual(net, optimizer, make_data(8))
        ends.append(snapshot(net, optimizer))
    close(*ends, 1e-12)


def test_bias_frozen_between_collecting_steps(make):
    """Until the next of them it counts as 0 in G = [W | b], and stays."""
    net, (one, *others) = small(), make_data(3)
    optimizer = make(net)
    usual(net, optimizer, [one])
    bias = net.mlp.bias.requires_grad_(False).clone()
    for batch, d in zip(others, (5, 4)):
        usual(net, optimizer, [batch])
        assert optimizer.layers[net.mlp.weight].d == d and torch.equal(net.mlp.bias, bias)


class Adjoint(torch.autograd.Function):
    """Three steps of x ← x + layer(x), taken again in the backward pass, each by autograd.grad."""

    @staticmethod
    def forward(ctx, x, layer, *parameters):
        ctx.layer, ctx.xs = layer, [x]
        for _ in range(3):
            ctx.xs.append(ctx.xs[-1] + layer(ctx.xs[-1]))
        return ctx.xs[-1].clone()

    @staticmethod
    def backward(ctx, grad):
        totals = [0, 0]
        for x in ctx.xs[2::-1]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = x + ctx.layer(x)
            grad, *new = torch.autograd.grad(y, [x, *ctx.layer.parameters()], grad)
            totals = [a + b for a, b in zip(totals, new)]
        return grad, None, *totals


def steps_of(x, layer, *parameters):
    for _ in range(3):
        x = x + layer(x)
    return x


def calls_of(x, layer, *parameters, which=()):
    for i in range(3):
        x = (checkpoint(layer, x, use_reentrant=True) if i in which else layer(x)).tanh()
    return x


@pytest.mark.parametrize("use, same", (
    (functools.partial(calls_of, which=(1,)), calls_of), (Adjoint.apply, steps_of)))
def test_backward_passes_in_one(make, use, same):
    """Rows of a layer that arrive in a backward pass, and in others that run inside it."""
    ends = []
    for function in (use, same):
        torch.manual_seed(0)
        net = Uses(nn.Linear(4, 4), lambda m, x: function(x, m.layer, *m.layer.parameters()))
        ends.append(trained(make, loop_of(lambda model, x, y: model(
            x.flatten(1)[:, :4].requires_grad_()).tanh().mean().backward()), net=net.double()))
    close(*ends, 1e-12)


@only("kfac", "adafisherw")
def test_gradient_that_hooks_change(make):
    """A layer's output gradient is what the model's own hooks make of it, as its weight's is."""
    def by_hook(module, args, out):
        out.register_hook(lambda grad: 3 * grad)

    def by_graph(module, args, out):
        return 3 * out - 2 * out.detach()
    ends = []
    for tripled in (by_hook, by_graph):
        net = small()
        net.head.register_forward_hook(tripled)
        ends.append(trained(make, net=net))
    close(*ends, 1e-12)


# ---- what is no training pass ----

class Small(nn.Module):
    """A convolution, attention, a weight without its module, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.attn = nn.Conv2d(3, 4, 3, stride=2), models.Attention(4, 2)
        self.mlp, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.attn(self.conv(x).flatten(2).mT)
        return self.head(F.linear(x.tanh(), self.mlp.weight, self.mlp.bias).mean(1))


def small(seed=0):
    torch.manual_seed(seed)
    return Small().double()


@functools.cache
def reference(make):
    return trained(make, net=small())


def batched_gradients(net, x):
    """By the weights, for all outputs at once."""
    y = net(x)
    torch.autograd.grad(y, list(net.parameters()), torch.eye(5)[:, None].to(y).expand(5, *y.shape),
                        is_grads_batched=True)


def with_jvp(net, x):
    with sdpa_kernel(SDPBackend.MATH):                 # the others cannot
        torch.func.jvp(net, (x,), (torch.ones_like(x),))


def forward_mode(net, x):
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def values_of(net, factor=1):
    return {name: factor * p.detach() for name, p in net.named_parameters()}


def per_sample_gradients(net, x):
    def loss(values, one):
        return torch.func.functional_call(net, values, (one[None],)).square().sum()
    torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values_of(net), x)


def other_parameters(net, x):
    values = {name: p.requires_grad_() for name, p in values_of(net, 2).items()}
    torch.func.functional_call(net, values, (x,)).sum().backward()


def hessian_product(net, x):
    p = net.head.weight
    grad, = torch.autograd.grad(net(x).square().sum(), p, create_graph=True)
    torch.autograd.grad(grad.sum(), p)


def fake(net, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        net(torch.empty(x.shape, dtype=x.dtype)).sum()


def in_inference_mode(net, x):
    with torch.inference_mode():
        net(x)


def raising(net, x):
    """An exception inside the forward pass."""
    handle = net.attn.qkv.register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        net(x)
    handle.remove()


def traced_graph(net, x):
    """The same as a copy's, whose hooks are inert."""
    watched, plain = ([node.target for node in make_fx(model)(x).graph.nodes]
                      for model in (net, copy.deepcopy(net)))
    assert list(map(str, watched)) == list(map(str, plain))


TOOLS = dict(
    vmap=lambda net, x: torch.vmap(lambda one: net(one[None])[0])(x), jvp=with_jvp,
    forward_mode=forward_mode, per_sample=per_sample_gradients, functional_call=other_parameters,
    hessian=hessian_product, batched=batched_gradients, fake=fake, exception=raising,
    make_fx=traced_graph,
    export=lambda net, x: torch.export.export(net, (x,), strict=False),
    strict_export=lambda net, x: torch.export.export(net, (x,), strict=True),
    trace=lambda net, x: torch.jit.trace(net, x, check_trace=False),
    inference=in_inference_mode)


@pytest.mark.filterwarnings("ignore")                     # torch.jit is deprecated
@pytest.mark.parametrize("tool", TOOLS)
def test_no_training_pass(make, tool):
    """A tool used before a step, and between forward and backward, changes nothing, nor fails."""
    if tool == "strict_export" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("before torch 2.7 hooks cannot tell a strict export")
    def loop(model, optimizer, data):
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            if i < 2:
                TOOLS[tool](model, x + 1)
            assert not _get_current_function_mode_stack()
            loss = loss_of(model, x, y)
            if i == 4:
                TOOLS[tool](model, x - 1)
            loss.backward()
            optimizer.step()
    close(trained(make, loop, net=small()), reference(make), 0)


def test_interrupted(make):
    """Ctrl-C in a forward pass: what was seen until then, and the watching, end with the step."""
    def loop(model, optimizer, data):
        for x, y in data:
            handle = model.attn.qkv.register_forward_hook(interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                model(2 * x[:2])
            handle.remove()
            usual(model, optimizer, [(x, y)])
            assert not _get_current_function_mode_stack()

    def interrupt(*_):
        raise KeyboardInterrupt
    close(trained(make, loop, net=small()), reference(make), 0)


def test_exception_that_the_model_catches(make):
    """A part that fails before its own hook ran does not end the watching of the whole."""
    class Forgiving(Small):
        def forward(self, x):
            with contextlib.suppress(ValueError):
                self.conv(x[0, 0, 0])
            return super().forward(x)

    def refuse(module, args):
        if args[0].dim() == 1:
            raise ValueError
    net = small()
    net.__class__ = Forgiving
    net.conv.register_forward_pre_hook(refuse)
    close(trained(make, net=net), reference(make), 0)


# ---- several models, optimizers, threads ----

@only("mac", "foof", "nysact", "kfac")
def test_two_optimizers_on_parts_of_one_model(make):
    """They end where one ends. (K-FAC without its clip, which joins all layers.)"""
    options, nets = dict(kl_clip=None, input_covariance=False), (small(), small())
    optimizers = [make(nets[0], params=[p for name, p in nets[0].named_parameters()
                                        if ("attn" in name) == wanted], **options)
                  for wanted in (False, True)]
    together = make(nets[1], **options)
    for x, y in make_data(8):
        for optimizer in (*optimizers, together):
            optimizer.zero_grad()
        for net in nets:
            loss_of(net, x, y).backward()
        for optimizer in (*optimizers, together):
            optimizer.step()
    close(parameters(nets[0]), parameters(nets[1]), 1e-12)
    assert listed(optimizers[0]) | listed(optimizers[1]) == listed(together)


def test_nested_models(make):
    """A generator inside the discriminator's call: each optimizer sees its own, and all of it."""
    class Critic(nn.Module):
        def __init__(self, generator):
            super().__init__()
            self.inner, self.head = [generator], nn.Linear(5, 2)        # not a submodule

        def forward(self, x):
            return self.head(self.inner[0](x))
    ends = []
    for nested in (True, False):
        generator = small()
        critic = Critic(generator).double()
        nn.init.constant_(critic.head.weight, 0.3)
        nn.init.zeros_(critic.head.bias)
        optimizers = make(generator, tcov=3), make(critic, tcov=2)
        for x, y in make_data(8):
            for optimizer in optimizers:
                optimizer.zero_grad()
            out = critic(x) if nested else critic.head(generator(x))
            F.cross_entropy(out, y % 2).backward()
            for optimizer in optimizers:
                optimizer.step()
        ends.append(parameters(generator) | parameters(critic))
    close(*ends, 0)


def test_threads(make):
    """Two threads that run the halves of each batch at once."""
    def at_once(model, x, y):
        outs, meet = {}, threading.Barrier(2)

        def run(i):
            meet.wait()
            outs[i] = model(x.chunk(2)[i])
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        F.cross_entropy(torch.cat([outs[0], outs[1]]), y).backward()

    def in_turn(model, x, y):
        F.cross_entropy(torch.cat([model(half) for half in x.chunk(2)]), y).backward()
    close(*(trained(make, loop_of(work), net=small(), loss_terms=6) for work in (at_once, in_turn)),
          1e-12)


def test_kfac_calls_in_threads():
    """Each thread's call of the model has its own terms, however they interleave."""
    def passes(net, at_once):
        def run(x):
            outs[len(x)] = net(x)

        def wait(*_):
            meet.wait(60)
        meet, outs, inputs = threading.Barrier(2 if at_once else 1), {}, data.split([8, 5])
        handle = net[0].register_forward_pre_hook(wait)
        threads = [threading.Thread(target=run, args=(x,)) for x in inputs]
        for thread in threads:
            thread.start()
            if not at_once:
                thread.join()
        for thread in threads:
            thread.join()
        handle.remove()
        for n in (8, 5):
            (outs[n].square().sum() / 13).backward()
    data, ends = randn(13, 4), []
    for at_once in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        ends.append(trained(OPTIMIZERS["kfac"], loop_of(lambda model, x, y: passes(
            model, at_once)), net=net))
    close(*ends, 1e-12)


class Typed(torch.Tensor):
    """A type that its results keep, as fastai's and MONAI's images do."""


@pytest.mark.parametrize("kinds", ((Typed,), (torch.Tensor, Typed)))
def test_inputs_of_another_type(make, kinds):
    """They are seen as plain tensors are, attention and masks included; the state is plain."""
    def micro_batches(kinds):
        def work(model, x, y):
            for kind, x, y in zip(kinds, x.chunk(len(kinds)), y.chunk(len(kinds))):
                (loss_of(model, x.as_subclass(kind), y) / len(kinds)).backward()
        return loop_of(work)

    def masked(m, x):
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in m.qkv(x).chunk(3, -1))
        return m.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.mT).detach())
                      .transpose(1, 2).flatten(2))
    ends = []
    for loop in (micro_batches(kinds), micro_batches([torch.Tensor for _ in kinds])):
        net = small()
        net.attn.forward = functools.partial(masked, net.attn)
        optimizer = make(net)
        loop(net, optimizer, make_data(8))
        ends.append(snapshot(net, optimizer))
        assert {type(x) for state in optimizer.state.values() for x in state.values()} <= {
            torch.Tensor, int}
    close(*ends, 0)


def test_parts_called(make):
    """A model whose parts are called, none through its own forward."""
    def work(model, x, y):
        tokens = model.attn(model.conv(x).flatten(2).mT)
        F.cross_entropy(model.head(model.mlp(tokens.tanh()).mean(1)), y).backward()
    close(trained(make, loop_of(work), net=small()), reference(make), 1e-13)


# ---- torch.compile ----

def compiled_step(model, optimizer, data):
    @torch.compile(backend="eager")
    def step(batch):
        usual(model, optimizer, [batch])
    for batch in data:
        step(batch)


def compiled(in_place=False, part=None, eager_steps=0):
    """The model, or a part of it, is compiled after so many steps."""
    def loop(model, optimizer, data):
        usual(model, optimizer, data[:eager_steps])
        if in_place:
            model.get_submodule(part or "").compile(backend="eager")
            usual(model, optimizer, data[eager_steps:])
        else:
            usual(torch.compile(model, backend="eager"), optimizer, data[eager_steps:])
    return loop


COMPILED = {"step": compiled_step, "part": compiled(in_place=True, part="attn")} | {
    f"{in_place=}, {eager_steps=}": compiled(in_place, eager_steps=eager_steps)
    for in_place in (False, True) for eager_steps in (0, 1)}


@only("mac", "kfac", "adafisher")
@pytest.mark.parametrize("loop", COMPILED)
def test_compiled(make, loop):
    """It trains as it does without; or raises, and says what to do. Never in silence."""
    torch._dynamo.reset()
    try:
        got = trained(make, COMPILED[loop], net=small())
    except RuntimeError as error:
        assert "optimizer.collecting" in str(error)
    else:
        close(got, reference(make), 1e-13)


# ---- several processes ----

def one_rank_by_einsum(rank, world, name):
    """The only layer is used in a way that is not followed, on the last rank alone."""
    use = PLAIN_USES["einsum"][1] if rank == world - 1 else called
    torch.manual_seed(0)
    net = Uses(nn.Linear(4, 9, bias=False), use).double()
    optimizer = OPTIMIZERS[name](net)
    for _ in range(3):
        optimizer.zero_grad()
        net(randn(5, 4))[0].square().sum().backward()
        torch.distributed.all_reduce(net.layer.weight.grad)
        optimizer.step()
    return parameters(net)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contradiction_on_one_rank(name):
    """All ranks take the plain step, and none waits for the others."""
    first, second = on_ranks(2, one_rank_by_einsum, name)
    close(first, second, 0)
