"""The equations of the five methods against brute force, in float64 unless said otherwise.

Numbers are those of each file's docstring. `test_step` holds the step of every method against the
formula with matrices formed from explicit rows, `test_plain` whole runs against plain().

    equation                                      test
    mac.py       (1)-(3), (5)                     test_step, test_geometries, test_mac_first_layer
                 (4), (7), all together           test_plain
                 (5) by calibrate()               test_mac_calibrate, ..._calibrate_on_ranks
                 (6)                              test_mac_attention_*, test_mac_multihead_attention
                 Proposition 4.1                  test_mac_proposition_4_1
    foof.py      (1), (3), (5)                    test_step, test_geometries, test_damping_guard
                 (2)                              test_foof_ridge
                 (4), (6), all together           test_plain
    kfac.py      (1), (3), (4), (7)               test_step, test_geometries
                 (2), (8)                         test_kfac_linear_network, test_multihead_attention
                 (3)                              test_kfac_pi
                 (5)                              test_kfac_clip, test_plain
                 (6), (9), all together           test_plain
                 (7): how many terms              test_kfac_terms, ..._contradict, ..._said
                 the sampled Fisher               test_kfac_sampled, test_kfac_fisher
    nysact.py    (1), (2), (6)                    test_step, test_geometries, test_multihead_...
                 (3), (8), all together           test_plain
                 (4), (5)                         test_nysact_nystrom, test_nysact_rank
                 (7)                              test_step, test_plain, test_nysact_sketches
                 what it is for, errata           test_nysact_condition_number, ..._released
    adafisher.py (1), (5)                         test_step, test_geometries
                 (2)                              test_adafisher_norm_layers, ..._norm_seen_by_use
                 (3), (3r), (6)-(8)               test_plain
                 (4)                              test_adafisher_min_max
                 the released averages            test_adafisher_as_released_is_momentum_sgd
"""
import collections
import contextlib
import copy
import functools
import itertools
import math
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import adafisher
import covariance
import foof
import kfac
import mac
import models
import nysact
import patches
import precision
from adafisher import AdaFisher, AdaFisherW
from calls import count_terms
from foof import FOOF
from kfac import KFAC
from mac import MAC
from nysact import NysAct
from patches import Geometry
from testing import (at_most, close, copy_of_run, device_type, factory, loss_of, make_data,
                     make_net, modules_with, on_ranks, only_cpu, parameters, raises, randn,
                     set_everywhere, snapshot, take_step, trained, usual)

EXACT = dict(lr=1.0, momentum=0.0, beta=0.0, tcov=1, tinv=1, damping=0.3, kl_clip=None,
             averaging="printed")          # the first step is −G̃, of this batch's statistics
METHODS = {
    "mac": factory(MAC, **EXACT, input_covariance=False),
    "mac, first layer": factory(MAC, **EXACT),
    "foof": factory(FOOF, **EXACT),
    "nysact": factory(NysAct, **EXACT, rank=3),
    "nysact, subcolumns": factory(NysAct, **EXACT, rank=3, sketch="subcolumns"),
    "nysact, exact": factory(NysAct, **EXACT, rank=1000),
    "kfac": factory(KFAC, **EXACT),
    "kfac, eigen": factory(KFAC, **EXACT, inverse="eigen"),
    "kfac, reduce": factory(KFAC, **EXACT, weight_sharing="reduce"),
    "adafisher": factory(AdaFisher, **EXACT),
}


def whole(weight, bias=None):
    """[W | b]."""
    weight = weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def with_ones(x, bias=True):
    """[a; 1] for rows a, if the layer has a bias."""
    return F.pad(x, (0, 1), value=1.0) if bias else x


# ---- one step of every method against explicit rows ----

def conv_rows(x, conv):
    """The rows that each group of a convolution sees, by torch's im2col of the padded images:
    (groups, B, S, C/groups·kh·kw)."""
    totals = [2 * p for p in ((0, 0) if isinstance(conv.padding, str) else conv.padding)]
    if conv.padding == "same":           # what is odd goes to the end
        totals = [dil * (k - 1) for dil, k in zip(conv.dilation, conv.kernel_size)]
    (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    mode = conv.padding_mode.replace("zeros", "constant")
    x = F.pad(x.detach(), (left, right, top, bottom), mode)
    rows = F.unfold(x, conv.kernel_size, conv.dilation, 0, conv.stride)     # (B, C·kh·kw, S)
    return rows.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2)


def input_rows(x, layer):
    """(blocks, B, S, d): the input rows of a Linear or Conv2d, B samples of S rows."""
    if isinstance(layer, nn.Conv2d):
        return conv_rows(x if x.dim() == 4 else x[None], layer)
    return x.detach().reshape(1, len(x) if x.dim() > 1 else 1, -1, x.shape[-1])


def output_rows(g, layer):
    """(blocks, B, S, out/blocks): the gradients of a layer's outputs, as input_rows."""
    if isinstance(layer, nn.Linear):
        return input_rows(g, layer)
    g = (g if g.dim() == 4 else g[None]).flatten(2).unflatten(1, (layer.groups, -1))
    return g.permute(1, 0, 3, 2)


def watch(net):
    """{weight: [(input rows, output gradients) of each use]}, and the number of samples.

    Both are filled by passes.
    """
    uses, terms = collections.defaultdict(list), collections.Counter()

    def count(module, args, kwargs):
        terms.update(samples=len((*args, *kwargs.values())[0]))

    def keep(layer, args, kwargs, y):
        rows = input_rows((*args, *kwargs.values())[0], layer)
        y.register_hook(lambda g: uses[layer.weight].append((rows, output_rows(g, layer))))
    net.register_forward_pre_hook(count, with_kwargs=True)
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(keep, with_kwargs=True)
    return uses, terms


def inverse(M, damping):
    return torch.linalg.inv(M + damping * torch.eye(M.shape[-1], dtype=M.dtype))


def min_max(v):
    return ((v - v.min()) / (v.max() - v.min())).nan_to_num()           # 0 of a constant


def formula(method, G, uses, terms, ρ, S=None):
    """G̃ (blocks, o, d) of G by the method's matrices, from (a, g): (blocks, B, S, d), (..., o)."""
    a, g = zip(*uses)
    if method == "kfac, reduce":
        a, g = [x.mean(2, keepdim=True) for x in a], [x.sum(2, keepdim=True) for x in g]
    a, g = (torch.cat([x.flatten(1, 2) for x in y], 1) for y in (a, g))     # (blocks, R, ·)
    A, mean = a.mT @ a / a.shape[1], a.mean(1)
    if method == "mac":
        return ρ * G @ inverse(mean[:, :, None] * mean[:, None], ρ)
    if method == "mac, first layer":
        return ρ * G @ inverse(A, ρ)
    if S is not None:
        A = A @ S @ torch.linalg.pinv(S.mT @ A @ S, rtol=1e-12, hermitian=True) @ S.mT @ A
    if method.startswith(("foof", "nysact")):
        return G @ inverse(A, ρ)
    P = terms["samples"] * g.mT @ g
    if method == "adafisher":
        H, S = (min_max(M.diagonal(dim1=1, dim2=2)) for M in (A, P))
        return G / (S[:, :, None] * H[:, None] + ρ)
    if method == "kfac, eigen":
        return torch.stack([(inverse(torch.kron(p, b), ρ) @ v.flatten()).view_as(v)
                            for p, b, v in zip(P, A, G)])
    traces = [M.diagonal(dim1=1, dim2=2).mean(1) for M in (A, P)]
    π = (traces[0] / traces[1]).sqrt()[:, None, None]
    return inverse(P, ρ ** 0.5 / π) @ G @ inverse(A, π * ρ ** 0.5)


def check_step(method, net, call, said=False):
    """One step, loss Σ cᵢ call()ᵢ, c random: each parameter's change against formula() or −∇.

    said: K-FAC is told how many terms the loss has.
    """
    uses, terms = watch(net)
    optimizer = METHODS[method](net)
    ys = [*call()]
    learns = {p for p in net.parameters() if p.requires_grad}
    if said and isinstance(optimizer, KFAC):
        optimizer.loss_terms = terms["samples"]
    torch.manual_seed(1)
    moved = take_step(net, optimizer, sum((y * randn(*y.shape)).sum() for y in ys))
    names = {p: name for name, p in net.named_parameters()}
    want = {name: torch.zeros_like(p) if p.grad is None else p.grad for p, name in names.items()}
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for i, weight in enumerate(dict.fromkeys(layer.weight for layer in layers)):
        if weight not in learns or weight not in uses or weight.grad is None:
            continue
        biases = {layer.bias for layer in layers if layer.weight is weight}
        bias = biases.pop() if len(biases) == 1 else None
        alone = len({layer.weight for layer in layers if layer.bias is bias}) == 1
        bias = bias if bias in learns and alone else None
        rows, blocks = uses[weight], len(uses[weight][0][0])
        G = weight.grad.reshape(blocks, len(weight) // blocks, -1)
        if bias is not None:
            rows = [(with_ones(a), g) for a, g in rows]
            b = torch.zeros_like(bias) if bias.grad is None else bias.grad
            G = torch.cat([G, b.view(blocks, -1, 1)], 2)
        S = None
        if method.startswith("nysact") and G.shape[2] > 3 and "exact" not in method:
            S = sketch_of(optimizer, weight)
        first = method == "mac, first layer" and i == 0
        kind = "mac" if method == "mac, first layer" and not first else method
        new = formula(kind, G, rows, terms, 0.3, S)
        want[names[weight]] = new[:, :, :weight[0].numel()].reshape(weight.shape)
        if bias is not None and bias.grad is not None:
            want[names[bias]] = new[:, :, -1].reshape(bias.shape)
    close(moved, want, 1e-10)


def sketch_of(optimizer, weight):
    """NysAct's S (blocks, d, r) for this weight."""
    return optimizer.sketch_of(optimizer.layers[weight], randn(1))


class Tied(nn.Module):
    """Two layers with one weight, which see a different number of rows."""

    def __init__(self, *biases):
        super().__init__()
        self.a, self.b = (nn.Linear(4, 4, bias=bias) for bias in biases)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu().repeat(3, 1)[:len(x) + 2])


def freeze_biases(net):
    for name, p in net.named_parameters():
        p.requires_grad_("bias" not in name)
    return net


def shared_bias():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].bias = net[0].bias
    return net


def two_dilations(conv):
    """The outputs of one convolution, called with two geometries."""
    x = randn(2, 2, 7, 6)
    for dilation in (1, 2):
        conv.dilation = conv.padding = (dilation, dilation)
        yield conv(x)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def linear():
    return nn.Linear(4, 3)


def by_columns():
    """A weight that lies column after column in memory."""
    layer = linear()
    layer.weight.data = layer.weight.data.mT.contiguous().mT
    return layer


def conv3():
    return nn.Conv2d(2, 3, 3, padding=1)


STEPS = {     # what is called on which input(s)
    "Linear": (linear, (5, 4)),
    "Linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "Linear, one row": (linear, (4,)),
    "Linear, tokens": (linear, (5, 6, 4)),
    "Linear, image of tokens": (linear, lambda net: [net(randn(5, 4, 2, 3).permute(0, 2, 3, 1))]),
    "Linear, expanded": (linear, lambda net: [net(randn(1, 4).expand(5, 4))]),
    "Linear, frozen bias": (lambda: freeze_biases(linear()), (5, 4)),
    "Linear, by columns": (by_columns, (5, 4)),
    "Linear, keyword": (linear, lambda net: [net(input=randn(5, 4))]),
    "two calls": (linear, lambda net: [net(randn(5, 4)), net(randn(2, 4))]),
    "two layers": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (5, 4)),
    "biases frozen later": (lambda: nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 2)),
                            lambda net: [freeze_biases(net)(randn(5, 4))]),
    "weight norm beside a layer": (lambda: nn.Sequential(
        nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(linear())), (5, 4)),
    "tied": (lambda: Tied(False, False), (5, 4)),
    "tied, two biases": (lambda: Tied(True, True), (5, 4)),
    "tied, one bias": (lambda: Tied(True, False), (5, 4)),
    "one bias of two weights": (shared_bias, (5, 4)),
    "Conv2d, one image": (conv3, (2, 5, 4)),
    "Conv2d, channels_last": (lambda: channels_last(nn.Conv2d(2, 3, 3, 2)), lambda net: [
        net(channels_last(randn(2, 2, 5, 5)))]),
    "Conv2d, strided": (conv3, lambda net: [net(randn(2, 2, 6, 10)[..., ::2])]),
    "Conv2d, two geometries": (conv3, two_dilations),
    "Conv2d and Linear": (lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (5, 3, 5, 5)),
    "fused qkv": (lambda: models.Attention(6, 2), (3, 4, 6)),
}
AMBIGUOUS = ("Linear, one row", "two calls", "tied", "tied, two biases", "tied, one bias",
             "Conv2d, one image", "Conv2d, two geometries")      # as to how many terms the loss has


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STEPS)
def test_step(method, name):
    if name == "fused qkv" and "mac" in method:
        pytest.skip("the values' mean is another one: test_mac_attention_kinds")
    if name.startswith("tied") and "reduce" in method:
        pytest.skip("seven rows of five samples: test_kfac_reduce_without_samples")
    build, call = STEPS[name]
    net = build().double()
    check_step(method, net, lambda: [net(randn(*call))] if isinstance(call, tuple) else call(net),
               said=name in AMBIGUOUS)


@pytest.mark.parametrize("method", METHODS)
def test_tied_with_an_embedding(method):
    """Such a weight takes the plain step, the layer beside it does not."""
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)).double()
    net[2].weight = net[0].weight
    optimizer = METHODS[method](net)
    moved = take_step(net, optimizer, F.cross_entropy(net(torch.tensor([1, 2, 3, 3])),
                                                 torch.tensor([2, 3, 4, 0])))
    close(moved["0.weight"], net[0].weight.grad, 1e-14)
    assert (moved["1.weight"] - net[1].weight.grad).abs().max() > 1e-3


GEOMETRIES = [    # C, out, (H, W), arguments of nn.Conv2d; more of them are drawn at random
    (3, 4, (5, 6), dict(kernel_size=1, stride=2)),
    (3, 4, (5, 6), dict(kernel_size=1, stride=(1, 2))),
    (3, 4, (5, 6), dict(kernel_size=1, stride=(2, 1), padding=1)),
    (3, 4, (5, 6), dict(kernel_size=3, padding=1, stride=(1, 2))),
    (3, 4, (7, 6), dict(kernel_size=3, padding=1, dilation=2)),
    (3, 4, (5, 6), dict(kernel_size=3, padding="same", dilation=2)),
    (2, 3, (9, 8), dict(kernel_size=5, padding=2, dilation=(1, 2))),
    (2, 3, (7, 5), dict(kernel_size=5, padding=2, stride=2)),
    (2, 3, (6, 7), dict(kernel_size=4, stride=3, padding=1)),
    (2, 3, (5, 6), dict(kernel_size=2, padding=1)),             # k//2 of an even kernel
    (2, 3, (6, 5), dict(kernel_size=(4, 3), padding=(2, 1))),
    (2, 3, (7, 7), dict(kernel_size=2, stride=3)),              # pixels that no tap meets
    (3, 2, (6, 5), dict(kernel_size=(3, 1), stride=(1, 2), padding=(0, 3))),
    (3, 2, (4, 9), dict(kernel_size=(1, 5), padding=(0, 2))),
    (2, 3, (7, 6), dict(kernel_size=(4, 3), padding="same", dilation=(1, 2))),
    (2, 3, (5, 6), dict(kernel_size=(3, 4), padding="valid", stride=2)),
    (2, 3, (6, 5), dict(kernel_size=(4, 2), padding="same", padding_mode="reflect")),
    (2, 3, (6, 5), dict(kernel_size=3, padding=(1, 2), dilation=2, padding_mode="circular")),
    (6, 3, (5, 4), dict(kernel_size=(2, 3), padding=1, groups=3, stride=2)),
    (4, 8, (6, 5), dict(kernel_size=2, groups=4, stride=(1, 2), dilation=(2, 1))),
]
# Stride 1, odd kernels, padding k//2 of zeros: FOOF and K-FAC form no patches.
SHIFTS = [(C, out, size, dict(kernel_size=kernel, padding=padding, groups=groups))
          for C, out, size, kernel, padding, groups in (
    (3, 4, (5, 6), 3, 1, 1), (4, 6, (5, 6), 3, 1, 2), (4, 4, (5, 6), 3, "same", 4),
    (3, 2, (6, 7), 5, 2, 1), (4, 2, (6, 5), 5, "same", 2), (2, 3, (7, 9), 7, 3, 1),
    (2, 3, (5, 6), (3, 1), (1, 0), 1), (2, 3, (5, 6), (1, 3), "same", 1),
    (2, 3, (6, 9), (3, 7), (1, 3), 1), (4, 4, (7, 6), (7, 5), (3, 2), 2),
    (3, 4, (5, 4), 1, 0, 1), (4, 4, (5, 4), 1, "same", 2), (4, 4, (5, 4), 1, "valid", 4),
    (2, 3, (1, 1), 3, 1, 1), (2, 3, (2, 1), 3, 1, 1), (2, 3, (2, 2), 5, 2, 1),
    (2, 3, (1, 2), 5, 2, 1), (2, 3, (3, 3), 7, 3, 1), (2, 3, (4, 2), 7, 3, 1),
    (2, 3, (1, 6), (1, 5), (0, 2), 1), (20, 2, (5, 4), 3, 1, 1), (130, 2, (2, 3), 1, 0, 1))]


def random_geometries(count):
    generator = np.random.default_rng(0)

    def draw(low, high):
        return tuple(int(k) for k in generator.integers(low, high, 2))
    for i in range(count):
        groups = int(generator.integers(1, 4))
        C, out = groups * int(generator.integers(1, 3)), groups * int(generator.integers(1, 3))
        mode = str(generator.choice(["zeros", "zeros", "reflect", "replicate", "circular"]))
        options = dict(kernel_size=draw(1, 6), dilation=draw(1, 3), groups=groups,
                       bias=bool(i % 2), padding_mode=mode, stride=draw(1, 4), padding=draw(0, 3))
        if i % 4 == 0:
            options |= dict(stride=1, padding=str(generator.choice(["same", "valid"])))
        yield C, out, draw(9, 13), options


@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_geometries(method, chunked, monkeypatch):
    """Every padding, stride, dilation and group."""
    if chunked:
        set_everywhere(monkeypatch, "CHUNK", 1)           # one image at a time
    for C, out, size, options in [*GEOMETRIES, *SHIFTS, *random_geometries(0 if chunked else 60)]:
        conv = nn.Conv2d(C, out, **options).double()
        check_step(method, conv, lambda: [conv(randn(2, C, *size))])


# ---- whole runs against each file's plain() ----

def recorded(net, optimizer, data, attended):
    """The usual loop. {weight: [(rows X, gradient G, output gradients) of each step] per block}.

    attended: the optimizer tells the rows of v in the fused qkv apart, whose inputs are T X.
    """
    (uses, _), steps, qkv = watch(net), collections.defaultdict(list), net.block.attn.qkv
    outputs = []
    qkv.register_forward_hook(lambda _, args, y: outputs.append(y.detach()))
    for x, y in data:
        uses.clear()
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        for layer in net.modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight not in uses:
                continue
            a, g = uses[layer.weight][0]
            rows, grads = a.flatten(1, 2), g.flatten(1, 2)
            if layer is qkv and attended:
                q, k, _ = outputs[-1].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                TX = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ a[0][:, None]
                rows, grads = [rows[0], rows[0], TX.reshape(-1, a.shape[-1])], [None] * 3
            G = whole(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
            G = G.clone().view(len(rows), len(G) // len(rows), -1)
            steps[layer.weight].append([(with_ones(X, layer.bias is not None), each, E)
                                        for X, each, E in zip(rows, G, grads)])
        optimizer.step()
    return {weight: [*zip(*each)] for weight, each in steps.items()}


SHORT = dict(lr=0.05, weight_decay=1e-2, tcov=2, tinv=3)
PERIODS = (dict(), dict(tcov=1, tinv=1, stat_decay=0.0), dict(tcov=5, tinv=50),
           dict(tcov=3, tinv=2), dict(tcov=4, tinv=2, momentum=0.0),
           dict(damping=0.1, stat_decay=0.5), dict(tcov=2, tinv=4, damping=3.0, weight_decay=0.0))
PLAIN = [(method, Optimizer, SHORT | options | own) for method, Optimizer, own in (
    ("mac", MAC, {}), ("foof", FOOF, {}), ("kfac", KFAC, dict(kl_clip=1e-5)),
    ("kfac", KFAC, dict(kl_clip=1e-5, inverse="eigen"))) for options in PERIODS] + [
    ("kfac", KFAC, SHORT | dict(tcov=3, tinv=2, kl_clip=1.0))] + [
    ("nysact", NysAct, SHORT | dict(rank=rank, sketch=sketch, damping=0.5, stat_decay=0.9))
    for rank in (4, 1000) for sketch in ("gaussian", "subcolumns")] + [
    ("adafisher", Optimizer, dict(tcov=tcov, lr=0.02, damping=0.1, gamma=0.7, beta=0.8,
                                  weight_decay=0.1, averaging=averaging))
    for Optimizer in (AdaFisher, AdaFisherW) for averaging in ("printed", "released")
    for tcov in (1, 3)]


@pytest.mark.parametrize("method, Optimizer, options", PLAIN,
                         ids=[f"{method}-{i}" for i, (method, *_) in enumerate(PLAIN)])
def test_plain(method, Optimizer, options):
    """Sixteen steps of convolutions, in groups too, attention and linear layers, on batches of
    three sizes: every weight is where plain() brings it by the same rows and gradients."""
    net, start = make_net(), make_net()
    optimizer = Optimizer(net, **options)
    data = [(x[:4 + i % 3], y[:4 + i % 3]) for i, (x, y) in enumerate(make_data(16))]
    steps = recorded(net, optimizer, data, method == "mac")
    assert len(steps) == 9
    names = {p: name.removesuffix(".weight") for name, p in net.named_parameters()}
    plain = dict(mac=mac, foof=foof, nysact=nysact, kfac=kfac, adafisher=adafisher)[method].plain
    options = {name: value for name, value in options.items() if name not in ("rank", "sketch")}
    if method == "adafisher":
        options["decoupled"] = Optimizer is AdaFisherW
    got, weights, together, want = [], [], [], []
    for weight, blocks in steps.items():
        old, new = start.get_submodule(names[weight]), net.get_submodule(names[weight])
        if method == "adafisher" and len(blocks) > 1:
            continue                   # all groups share one min-max: test_geometries
        W = whole(old.weight, old.bias).detach()
        W = W.view(len(blocks), len(W) // len(blocks), -1)
        got += whole(new.weight, new.bias).view_as(W)
        weights += W
        together += blocks
        S = torch.eye(W.shape[2], dtype=W.dtype).expand(len(W), -1, -1)
        if method == "nysact" and "sketched" in optimizer.layers[weight].measured:
            S = sketch_of(optimizer, weight)
        first = dict(first=True) if (method, names[weight]) == ("mac", "conv1") else {}
        for w, s, block in zip(W, S, blocks) if method != "kfac" else ():
            given = [s] if method == "nysact" else []
            made = [lambda _, x=(X, E if method == "adafisher" else G): x for X, G, E in block]
            want.append(plain(w, *given, made, **options, **first))
    if method == "kfac":               # its clip joins all layers
        want = plain(weights, [lambda _, n=len(x), at=at: (n, [(X, E) for X, _, E in at])
                               for (x, _), at in zip(data, zip(*together))], **options)
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-9 if method == "nysact" else 1e-11)


# ---- precision ----

@pytest.fixture
def low_precision():
    """The user's modes for matrix products and convolutions, lower than float32."""
    torch.set_float32_matmul_precision("medium")
    backends = [torch.backends.mkldnn.conv, torch.backends.cudnn.conv] \
        if hasattr(torch.backends.cudnn, "conv") else []
    before = [backend.fp32_precision for backend in backends]
    for backend, value in zip(backends, ("bf16", "tf32")):
        backend.fp32_precision = value
    yield
    for backend, value in zip(backends, before):
        backend.fp32_precision = value
    torch.set_float32_matmul_precision("highest")


STATISTICS = ("mean", "covariance", "output_covariance", "sketched", "H", "S")


@pytest.mark.parametrize("mode", ("float32", "autocast", "bfloat16 weights"))
@pytest.mark.parametrize("method", METHODS)
def test_precision(method, mode, low_precision):
    """float32 statistics of what the layers saw, whatever lower precision is asked for."""
    for layer, shape in ((nn.Linear(24, 8), (4, 9, 24)), (nn.Conv2d(16, 8, 3), (4, 16, 7, 7))):
        x = (torch.randn(shape) + 1).bfloat16()
        exact, layer = copy.deepcopy(layer).double(), layer.to(
            torch.bfloat16 if "weights" in mode else torch.float32)
        states = []
        for net, inputs in ((layer, x.to(layer.weight.dtype)), (exact, x.double())):
            optimizer = METHODS[method](net, lr=0.0)
            with torch.autocast(device_type(), torch.bfloat16, enabled=mode == "autocast"):
                y = net(inputs)
            torch.manual_seed(0)
            c = torch.randint(-3, 4, y.shape)                              # exact in bfloat16
            take_step(net, optimizer, (y * c).sum())
            states.append({key: value for key, value in optimizer.state[net.weight].items()
                           if key in STATISTICS})
        assert states[0] and all(v.dtype == torch.float32 for v in states[0].values())
        close(*states, 3e-6)


def test_full_precision(low_precision):
    """Neither TF32 nor bf16 inside, the user's modes after it, also where an error ends it."""
    backends = precision.BACKENDS
    if not backends:
        pytest.skip("this torch has no setting per operation")
    modes = [backend.fp32_precision for backend in backends]
    for module in modules_with("full_precision"):
        for device, ours in (("cpu", backends[1::2]), ("cuda", backends[::2])):
            with contextlib.suppress(KeyError), warnings.catch_warnings():
                warnings.simplefilter("ignore")          # autocast's, where there is no GPU
                with module.full_precision(device):
                    assert {backend.fp32_precision for backend in ours} == {"ieee"}
                    raise KeyError
            assert [backend.fp32_precision for backend in backends] == modes
        assert torch.get_float32_matmul_precision() == "medium"


def test_full_precision_in_threads(low_precision):
    """The settings are the process's: the last thread that leaves gives the user's back."""
    def first():
        with precision.full_precision("cpu"):
            entered.set()
            leave.wait(60)
    of_user, entered, leave = precision.settings(), threading.Event(), threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(60)
    with precision.full_precision("cpu"):
        ours = precision.settings()
        leave.set()
        thread.join()
        assert precision.settings() == ours != of_user
    assert precision.settings() == of_user


# ---- nn.MultiheadAttention, and what MAC makes of attention ----

class KFACOfProjections(KFAC):
    kinds = KFAC.kinds | dict(projection="Kronecker factors")


def projections(module):
    """(weight's name, its rows, their part of in_proj_bias) of q, k and v in turn."""
    E = module.embed_dim
    thirds = [slice(i * E, i * E + E) for i in range(3)]
    if module.in_proj_weight is not None:
        return [("in_proj_weight", rows, rows) for rows in thirds]
    return [(f"{c}_proj_weight", slice(None), rows) for c, rows in zip("qkv", thirds)]


def given_rows(module, values, name, rows, bias_rows):
    """[W | b] of these rows of a weight, from values or gradients by name."""
    bias = values.get("in_proj_bias") if name != "out_proj.weight" else values.get("out_proj.bias")
    return whole(values[name][rows], None if bias is None else bias[bias_rows]).detach()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ("foof", "nysact", "kfac", "kfac, reduce"))
@pytest.mark.parametrize("options", ({}, dict(bias=False), dict(kdim=4, vdim=5),
                                     dict(batch_first=True), dict(dropout=0.5)), ids=str)
@pytest.mark.parametrize("own", (False, True))
def test_multihead_attention(method, options, own):
    """q, k and v rows by their own inputs, out_proj by the rows that it really got.

    G = Σ g aᵀ gives g where the rows a are known and independent, and a where the g are.
    """
    if own and "kdim" in options:
        pytest.skip("one input has one width")
    kdim, vdim = options.get("kdim", 6), options.get("vdim", 6)
    given = [randn(2, n, d) for n, d in ((3, 6), (2, kdim), (2, vdim))]            # (B, S, d)
    given = given[:1] * 3 if own else given
    Optimizer = dict(foof=FOOF, nysact=NysAct).get(method, KFACOfProjections)
    module = nn.MultiheadAttention(6, 2, **options).double()
    optimizer = factory(Optimizer, **EXACT, rank=3, loss_terms=2, weight_sharing=(
        "reduce" if "reduce" in method else "expand"))(module)
    c = randn(2, 3, 6)

    def turn(x):
        return x if "batch_first" in options else x.transpose(0, 1)
    output = turn(module(*map(turn, given), need_weights=own)[0])
    moved = take_step(module, optimizer, (output * c).sum())
    sides = [*projections(module), ("out_proj.weight", slice(None), slice(None))]
    for side, x in zip(sides, (*given, None)):
        G = given_rows(module, gradients(module), *side)
        if x is None:
            g, a = c, (torch.linalg.pinv(c.flatten(0, 1).mT) @ G).view(2, 3, -1)
        else:
            a = with_ones(x, module.in_proj_bias is not None)
            g = (G @ torch.linalg.pinv(a.flatten(0, 1))).mT.view(2, -1, 6)
        S = None
        if method == "nysact":
            S = sketch_of(optimizer, module.get_parameter(side[0]))
            S = S[side[1].start // 6:][:1] if len(S) > 1 else S
        want = formula(method, G[None], [(a[None], g[None])], dict(samples=2), 0.3, S)
        close(given_rows(module, moved, *side), want[0], 1e-9)


def mac_step(module, loss, **options):
    """MAC after its first step, and by how much the parameters changed."""
    optimizer = METHODS["mac"](module, **options)
    return optimizer, take_step(module, optimizer, loss())


def check_rows(G, change, a):
    """(3) row by row: each row of [W | b] (out, d) by the mean a of its own (out, d) or (d,)."""
    a = a.expand_as(G)
    inner = (G * a).sum(1, keepdim=True) / (0.3 + a.square().sum(1, keepdim=True))
    close(change, G - inner * a, 1e-10)


def spread(*modules):
    """Weights large enough that attention is far from uniform."""
    for module in modules:
        for p in module.parameters():
            nn.init.normal_(p)


def set_identity(projection):
    """So that the loss Σ output has ∂loss/∂O = 1, and the rows of G_V add up to Σ (TX)ᵀ1."""
    with torch.no_grad():
        projection.weight.copy_(torch.eye(len(projection.weight)))


def mean_row(x, bias):
    return with_ones(x.detach().reshape(-1, x.shape[-1]).mean(0), bias)


def check_multihead(options, inputs, **call):
    """nn.MultiheadAttention's means of query, key, attended value, and of out_proj's inputs."""
    module = nn.MultiheadAttention(6, 2, **options).double()
    spread(module)
    set_identity(module.out_proj)
    _, moved = mac_step(module, lambda: module(*inputs, **call)[0].sum())
    given, bias = (*inputs, *call.values())[:3], module.in_proj_bias is not None
    count, grads = given[0].numel() / 6, gradients(module)
    for i, side in enumerate(projections(module)):
        G, a = given_rows(module, grads, *side), mean_row(given[i], bias)
        if i == 2 and not (options.get("add_bias_kv") or options.get("add_zero_attn")):
            a = G.mean(0) / count       # (keys that are added are not v's rows: the plain mean)
        check_rows(G, given_rows(module, moved, *side), a)
    out = "out_proj.weight", slice(None), slice(None)
    G = given_rows(module, grads, *out)
    check_rows(G, given_rows(module, moved, *out), G.mean(0) / count)


def test_mac_multihead_attention(monkeypatch):
    B, L, S = 3, 4, 5
    x, query, memory = randn(B, L, 6), randn(B, L, 6), randn(B, S, 6)
    first, widths = dict(batch_first=True), dict(batch_first=True, kdim=3, vdim=7)
    added = dict(add_bias_kv=True, add_zero_attn=True)
    own, cross, wide = (x, x, x), (query, memory, memory), (query, randn(B, S, 3), randn(B, S, 7))
    single = (query[0], memory[0], memory[0])
    check_multihead(first, own)
    check_multihead(first, own, need_weights=False)
    check_multihead({}, own)
    check_multihead({}, (x[0], x[0], x[0]))
    check_multihead(dict(bias=False) | first, own)
    check_multihead(first, cross)
    check_multihead(first, (), query=query, key=memory, value=memory)
    check_multihead(widths, wide)
    check_multihead(widths | dict(bias=False), wide)
    check_multihead(dict(kdim=3), (randn(L, B, 6), randn(S, B, 3)), value=randn(S, B, 6))
    check_multihead(first | dict(add_bias_kv=True), cross)
    check_multihead(first | dict(add_zero_attn=True), cross)
    check_multihead(widths | added, wide)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])                     # (B, S)
    check_multihead(first, cross, key_padding_mask=padding)
    check_multihead(first, cross, key_padding_mask=randn(B, S))
    check_multihead({}, single, key_padding_mask=padding[1])
    mask, per_head = torch.rand(L, S) < 0.4, torch.rand(2 * B, L, S) < 0.4
    mask[:, 0] = per_head[:, :, 0] = False
    check_multihead(first, cross, attn_mask=mask)
    check_multihead(first, cross, attn_mask=randn(L, S))
    check_multihead({}, (query.mT.mT.transpose(0, 1), *(memory.transpose(0, 1),) * 2),
                    attn_mask=per_head)
    check_multihead({}, single, attn_mask=randn(2, L, S))
    check_multihead(first, cross, attn_mask=mask, key_padding_mask=padding)
    check_multihead(first | added, cross, attn_mask=per_head, key_padding_mask=padding)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    check_multihead(first, own, attn_mask=causal, is_causal=True, need_weights=False)
    mask[1] = True                                          # a query that may attend to nothing
    check_multihead(first, cross, attn_mask=mask, need_weights=False)
    set_everywhere(monkeypatch, "CHUNK", 1)                 # one sample at a time
    check_multihead(first | added, cross, attn_mask=per_head)


def encoder(**options):
    """torch's encoder with a causal mask and padding."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, **options)

    def call(layer):
        padding = torch.arange(4) >= torch.tensor([[4], [2], [3]])
        return layer(randn(3, 4, 6), torch.ones(4, 4, dtype=torch.bool).triu(1), padding)
    return layer, call


NETWORKS = {
    "swin": lambda: (models.SwinTransformer(48, 8, (2, 2, 2), (2, 2, 4), 5),
                     lambda net: net(randn(2, 3, 48, 48))),
    "vit": lambda: (models.VisionTransformer(6, 2, 12, 1, 2, 3, 3),
                    lambda net: net(randn(2, 3, 6, 6))),
    "gpt": lambda: (models.GPT(7, 5, layers=2, heads=2, width=8, bias=False),
                    lambda net: net(torch.arange(10).view(2, 5) % 7)),
    "decoder": lambda: (nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True),
                        lambda net: net(randn(3, 4, 6), randn(3, 5, 6))),
} | {f"encoder, {options}": functools.partial(encoder, **options) for options in (
    dict(), dict(dropout=0.0), dict(norm_first=True))}


@pytest.mark.parametrize("network", NETWORKS)
def test_mac_attention_in_networks(network):
    """(6) in every attention of a network, in training mode, as in that attention alone: inputs
    after the norms, T before dropout. Parameters that belong to no layer take the plain step."""
    (net, call), seen = NETWORKS[network](), {}
    net.double()
    kinds = models.Attention, nn.MultiheadAttention

    def keep(name, module, args, kwargs):
        args = [x if x is None else x.detach() for x in args]
        seen.setdefault(name, (copy.deepcopy(module), args, kwargs))
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            spread(module)
            module.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
    _, moved = mac_step(net, lambda: 1e3 * call(net).square().mean())
    grads = gradients(net)
    plain = [name for name in grads if not isinstance(net.get_submodule(
        name.rpartition(".")[0]), (nn.Linear, nn.Conv2d, *kinds)) or "bias_table" in name]
    close({name: moved[name] for name in plain}, {name: grads[name] for name in plain}, 1e-10)
    assert seen and any("bias_table" in name for name in plain) == (network == "swin")
    for name, (alone, args, kwargs) in seen.items():
        multi = isinstance(alone, nn.MultiheadAttention)
        set_identity(alone.out_proj if multi else alone.proj)
        alone.dropout = 0.0
        out = alone(*args, **kwargs)
        (out[0] if multi else out).sum().backward()
        key, b = ("in_proj_weight", "in_proj_bias") if multi else ("qkv.weight", "qkv.bias")
        own, count, bias = gradients(alone), args[0][..., 0].numel(), f"{name}.{b}".lstrip(".")
        weight = f"{name}.{key}".lstrip(".")
        a = [mean_row(x, bias in grads) for x in ((args[0], args[1]) if multi else args[:1] * 2)]
        v = whole(own[key], own.get(b)).view(3, len(own[key]) // 3, -1)[2].mean(0) / count
        check_rows(whole(grads[weight], grads.get(bias)), whole(moved[weight], moved.get(bias)),
                   torch.stack([*a, v]).repeat_interleave(len(own[key]) // 3, 0))


# ---- kinds of attention ----

class Attends(nn.Module):
    """Linear layers by name with so many outputs, and a function of it and x (B, 4, 6) for O."""

    def __init__(self, attend, **widths):
        super().__init__()
        self.attend, self.training_drop = attend, 0.5
        for name, width in widths.items():
            setattr(self, name, nn.Linear(6, width))

    def forward(self, x):
        return self.attend(self, x)


sdpa = F.scaled_dot_product_attention


def heads(y, n=2):
    """(B, N, n·d_h) to (B, n, N, d_h)."""
    return y.unflatten(-1, (n, -1)).transpose(1, 2)


def thirds(y, n=2):
    return [heads(part, n) for part in y.chunk(3, -1)]


def scores(q, k):
    return q @ k.mT / q.shape[-1] ** 0.5


def eager(q, k, v, bias=0):
    return (scores(q, k) + bias).softmax(-1) @ v


def on(parts, attention=eager):
    """Attention of q, k, v that are parts of one layer's output."""
    return lambda m, x: attention(*parts(m.qkv(x)))


def apart(attention, of_q=lambda x: x, of_v=lambda x: x):
    return lambda m, x: attention(heads(m.q(of_q(x))), heads(m.k(x)), heads(m.v(of_v(x))))


def few_values(y):
    """Four heads of q share two of k and v."""
    return heads(y[..., :8], 4), heads(y[..., 8:12]), heads(y[..., 12:])


def repeated(q, k, v):
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for y in (k, v))
    return eager(q, k, v)


def one_value(y):
    return heads(y[..., :6], 3), y[:, None, :, 6:8], y[:, None, :, 8:]


def opened(*shape):
    """A mask under which each query sees two keys at least."""
    return (torch.arange(math.prod(shape)).view(shape) % 5 % 2 == 0) | torch.eye(4).bool()


def masked(mask, attention=sdpa):
    return on(thirds, lambda q, k, v: attention(q, k, v, mask()))


def window_masks(q, k, v):
    """A mask for each of two windows, as Swin adds it: (windows, 2, 2)."""
    mask = torch.tensor([[[0.0, -9.0], [1.0, 0.0]], [[0.0, 3.0], [-9.0, 0.0]]]).double()
    return ((scores(q, k).view(3, 2, 2, 2, 2) + mask[:, None]).view(6, 2, 2, 2).softmax(-1)) @ v


def windows(y):
    """Two windows of two tokens each, cut out of qkv's output."""
    return thirds(y.unflatten(1, (2, 2)).flatten(0, 1))


def rotary(q, k, v):
    angle = torch.arange(4.0).double()[:, None]
    return eager(*(y * angle.cos() + y.flip(-1) * angle.sin() for y in (q, k)), v)


def normed(q, k, v):
    return sdpa(*(F.layer_norm(y, y.shape[-1:]) for y in (q, k)), v)


def relative(q, k, v):
    i = torch.arange(4)
    return eager(q, k, v, torch.linspace(-3, 3, 7).double()[i - i[:, None] + 3])


def talking(before):
    def attention(q, k, v):
        mix, S = torch.tensor([[1.0, 0.5], [-0.3, 1.0]]).double(), scores(q, k)
        if before:
            return torch.einsum("gh,bhqk->bgqk", mix, S).softmax(-1) @ v
        return torch.einsum("gh,bhqk->bgqk", mix, S.softmax(-1)) @ v
    return attention


def dropped(m, x):
    q, k, v = thirds(m.qkv(x))
    return F.dropout(scores(q, k).softmax(-1), m.training_drop) @ v


def cross(m, x):
    return eager(heads(m.q(x[:, :3])), *map(heads, m.kv(x.roll(1, 1) ** 2).chunk(2, -1)))


def learned_queries(m, x):
    q = torch.arange(12.0).double().view(1, 2, 2, 3).sin()
    return eager(q, *map(heads, m.kv(x).chunk(2, -1)))


def flat_heads(q, k, v):
    q, k, v = (y.reshape(-1, *y.shape[2:]) for y in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def sequence_first(m, x):
    return eager(*(y.reshape(4, -1, 3).transpose(0, 1)
                   for y in m.qkv(x.transpose(0, 1)).chunk(3, -1)))


def across_tokens(y):
    """Values that begin in a token's columns and end in the next one's."""
    return y[:, :3, :6], y[:, :3, 6:12], y.flatten(1)[:, 15:69].unflatten(1, (3, 18))[..., :6]


def changed_in_place(y):
    y[..., 12:].relu_()
    return thirds(y)


def scores_in_place(q, k, v):
    T = F.dropout(scores(q, k).softmax(-1), 0.5)
    T *= torch.arange(1, 3).view(2, 1, 1)
    return T @ v


def causal_bias(q, k, v):
    from torch.nn.attention.bias import causal_upper_left
    return sdpa(q, k, v, attn_mask=causal_upper_left(4, 4))


def checkpointed(reentrant):
    def attend(m, x):
        return checkpoint(lambda x: eager(*thirds(m.qkv(x))), x.clone().requires_grad_(),
                          use_reentrant=reentrant)
    return attend


QKV, QK_V, V = dict(qkv=18), dict(q=6, k=6, v=6), dict(qkv=slice(12, 18))
V_OF_THREE = dict(v=slice(0, 6))
ATTENTIONS = {       # O, the layers, which of their rows are those of v; none: the plain mean
    "thirds": (on(thirds), QKV, V),
    "thirds, fused": (on(thirds, sdpa), QKV, V),
    "softmax by keyword": (on(thirds, lambda q, k, v: torch.softmax(
        input=scores(q, k), dim=-1) @ v), QKV, V),
    "scale": (on(thirds, functools.partial(sdpa, scale=0.1)), QKV, V),
    "heads first": (on(lambda y: y.unflatten(-1, (2, 3, 2)).permute(3, 0, 2, 1, 4)), dict(qkv=12),
                    dict(qkv=[4, 5, 10, 11])),
    "interleaved": (on(lambda y: y.unflatten(-1, (2, 2, 3)).permute(4, 0, 2, 1, 3)), dict(qkv=12),
                    {}),
    "separate": (apart(eager), QK_V, V_OF_THREE),
    "one head": (on(lambda y: y.chunk(3, -1)), QKV, V),
    "kv": (cross, dict(q=6, kv=12), dict(kv=slice(6, 12))),
    "repeated kv": (on(few_values, repeated), dict(qkv=16), dict(qkv=slice(12, 16))),
    "grouped queries": (on(few_values, functools.partial(sdpa, enable_gqa=True)), dict(qkv=16),
                        dict(qkv=slice(12, 16))),
    "one head of kv": (on(one_value), dict(qkv=10), dict(qkv=slice(8, 10))),
    "one head of kv, fused": (on(one_value, sdpa), dict(qkv=10), dict(qkv=slice(8, 10))),
    "causal": (on(thirds, functools.partial(sdpa, is_causal=True)), QKV, V),
    "mask": (masked(lambda: opened(4, 4)), QKV, V),
    "masks of samples": (masked(lambda: opened(3, 1, 4, 4)), QKV, V),
    "mask of keys": (masked(lambda: opened(3, 1, 4, 4)[:, :, :1]), QKV, V),
    "float mask": (masked(lambda: opened(4, 4).double() * 3), QKV, V),
    "float masks of heads": (masked(lambda: randn(2, 4, 4)), QKV, V),
    "mask of eager": (masked(lambda: ~opened(4, 4) * -1e9, eager), QKV, V),
    "windows": (on(windows), QKV, V),
    "masks of windows": (on(windows, window_masks), QKV, V),
    # each pair of neighbours is a window, so that most tokens are in two
    "overlapping windows": (on(lambda y: [p.unfold(2, 2, 1).mT for p in thirds(y)]), QKV, V),
    "image of tokens": (lambda m, x: eager(*thirds(m.qkv(x.unflatten(1, (2, 2))).flatten(1, 2))),
                        QKV, V),
    "relative positions": (on(thirds, relative), QKV, V),
    "rotary": (on(thirds, rotary), QKV, V),
    "norms of q and k": (on(thirds, normed), QKV, V),
    "talking before softmax": (on(thirds, talking(True)), QKV, V),
    "talking after softmax": (on(thirds, talking(False)), QKV, {}),
    "one query": (apart(eager, of_q=lambda x: x[:, :1]), QK_V, V_OF_THREE),
    "one key": (lambda m, x: sdpa(*thirds(m.qkv(x[:, :1]))), QKV, V),
    "one key of one sample": (lambda m, x: sdpa(*thirds(m.qkv(x[:1, :1]))), QKV, V),
    "learned queries": (learned_queries, dict(kv=12), dict(kv=slice(6, 12))),
    "values of one image": (apart(eager, of_v=lambda x: x[:1]), QK_V, V_OF_THREE),
    "channels": (on(lambda y: [p.mT for p in thirds(y)], lambda q, k, v: eager(
        F.normalize(q), F.normalize(k), v)), QKV, {}),
    "dropout": (dropped, QKV, V),
    "dropout, fused": (lambda m, x: sdpa(*thirds(m.qkv(x)), dropout_p=m.training_drop), QKV, V),
    "flat heads": (on(thirds, flat_heads), QKV, V),
    "sequence first": (sequence_first, QKV, V),
    "two attentions": (on(thirds, lambda q, k, v: eager(q, k, v) + sdpa(
        q, k.flip(1), v, is_causal=True)), QKV, V),
    # what are k's rows in one attention are v's in the other
    "k is v elsewhere": (on(thirds, lambda q, k, v: eager(q, k, v) + eager(q, v, k)), QKV, {}),
    "a key is two tokens": (on(lambda y: [p.reshape(-1, 1, 2, 12) for p in y.chunk(3, -1)]), QKV,
                            {}),
    "across tokens": (on(across_tokens), QKV, {}),
    "changed in place": (on(changed_in_place), QKV, {}),
    "scores in place": (on(thirds, scores_in_place), QKV, {}),
    "CausalBias": (on(thirds, causal_bias), QKV, {}),
    "copied": (on(thirds, lambda q, k, v: eager(q, k, v.contiguous().clone())), QKV, V),
    "reshaped": (on(thirds, lambda q, k, v: eager(q, k, v.reshape(6, 4, 3).view(3, 2, 4, 3))), QKV,
                 V),
    "activated": (on(thirds, lambda q, k, v: eager(q, k, F.gelu(v))), QKV, {}),
    "repeated in new memory": (on(few_values, lambda q, k, v: eager(
        q, *(y.repeat_interleave(2, 1) for y in (k, v)))), dict(qkv=16), {}),
    "with more keys": (on(lambda y: [torch.cat([p, p[:, :, :1]], 2) for p in thirds(y)], sdpa), QKV,
                       {}),
    "checkpointing": (checkpointed(False), QKV, V),
    # the rerun in the backward pass goes through the layer alone, not through the model
    "checkpointing, reentrant": (checkpointed(True), QKV, {}),
}


@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("kind", [*ATTENTIONS])
def test_mac_attention_kinds(kind, chunked, monkeypatch):
    """(6) for whatever leads from linear layers to attention, against autograd.

    With V = X W_Vᵀ + 1bᵀ and the loss Σ O the rows of [G_V | g_v] add up to Σ [TX; 1]: their mean,
    divided by its last number, is ā_V.
    """
    if chunked:
        set_everywhere(monkeypatch, "CHUNK", 1)           # one sample at a time
    attend, widths, values = ATTENTIONS[kind]
    net, inputs = Attends(attend, **widths).double(), {}
    spread(net)
    for name in widths:
        getattr(net, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, args[0].detach()))
    x, exact = randn(3, 4, 6) + 0.5, copy.deepcopy(net)
    exact.training_drop = 0.0
    torch.manual_seed(1)                                  # of masks
    exact(x).sum().backward()
    torch.manual_seed(1)
    optimizer, moved = mac_step(net, lambda: net(x).sum())
    for name in widths:
        layer, without = getattr(net, name), getattr(exact, name)
        G, a = whole(layer.weight.grad, layer.bias.grad), mean_row(inputs[name], True)
        rows = a.expand_as(G).clone()
        if name in values:
            mean = whole(without.weight.grad, without.bias.grad)[values[name]].mean(0)
            rows[values[name]] = mean / mean[-1]
            if inputs[name].shape[1] > 1:
                assert (mean / mean[-1] - a).abs().max() > 1e-2
        check_rows(G, whole(moved[f"{name}.weight"], moved[f"{name}.bias"]), rows)
        line = str(optimizer).split(f" {name}: ")[1].split("\n")[0]
        assert ("attended" in line) == (name in values)


def test_mac_values_of_a_part():
    """v's input may be a view that nothing holds but its call: the graph keeps a copy of it."""
    net = Attends(lambda m, x: sdpa(heads(m.q(x)), *(
        heads(layer(x[:, :3])) for layer in (m.k, m.v))), **QK_V).double()
    optimizer = MAC(net)
    take_step(net, optimizer, net(randn(3, 4, 6)).sum())
    total = whole(net.v.weight.grad, net.v.bias.grad).mean(0)
    close(optimizer.state[net.v.weight]["mean"][-1], total / total[-1], 1e-12)


def test_mac_without_attention():
    """attention=False: v has the mean input, as q and k have."""
    net, x = models.Attention(8, 2).double(), randn(3, 5, 8)
    optimizer, moved = mac_step(net, lambda: net(x).square().sum(), attention=False)
    check_rows(whole(net.qkv.weight.grad, net.qkv.bias.grad),
               whole(moved["qkv.weight"], moved["qkv.bias"]), mean_row(x, True))
    assert optimizer.state[net.qkv.weight]["values"] == -1


@pytest.mark.parametrize("mode", ("float32", "autocast", "bfloat16 weights"))
def test_mac_attention_precision(mode):
    """(6) in float32 of the q and k that were used, norms included, and of an X without a name."""
    def attend(m, x):
        q, k, v = thirds(m.qkv(x * 1))
        seen.extend(F.layer_norm(y, y.shape[-1:]) for y in (q, k))
        return sdpa(*seen, v)
    net, seen = Attends(attend, qkv=18), []
    spread(net)
    net = net.to(torch.bfloat16 if "weights" in mode else torch.float32)
    x = (torch.randn(4, 9, 6) + 1).bfloat16().to(net.qkv.weight.dtype)
    with torch.autocast(device_type(), torch.bfloat16, enabled=mode == "autocast"):
        optimizer, _ = mac_step(net, lambda: net(x).float().sum())
    mean, X = optimizer.state[net.qkv.weight]["mean"], x.double()
    q, k = (y.detach().double() for y in seen)
    want = [X.mean((0, 1)), (scores(q, k).softmax(-1) @ X[:, None]).mean((0, 1, 2))]
    assert mean.dtype == torch.float32
    close(mean, with_ones(torch.stack(want)), 3e-6)


def test_mac_attention_of_a_changed_input():
    """Autocast's copy of X is what met the weight; X itself holds something else by then."""
    def attend(m, x):
        y = m.qkv(x)
        x.mul_(2)
        return sdpa(*thirds(y))
    net, x = Attends(attend, qkv=18), torch.randn(4, 9, 6)
    with torch.autocast(device_type(), torch.bfloat16):
        optimizer, _ = mac_step(net, lambda: net(x.clone()).float().sum())
    assert optimizer.state[net.qkv.weight]["values"] == -1


def test_mac_attention_of_an_inference_tensor():
    """Features of a frozen part, whose changes torch does not count."""
    net = Attends(lambda m, x: sdpa(*thirds(m.qkv(x))), qkv=18)
    with torch.inference_mode():
        x = torch.randn(4, 9, 6)
    with torch.autocast(device_type(), torch.bfloat16):
        optimizer, _ = mac_step(net, lambda: net(x).float().sum())
    assert optimizer.state[net.qkv.weight]["values"] == 8 + 4


def not_followed(m, x):
    return eager(*thirds(m.qkv(x).sin()))


OTHERS = {      # no attention that is seen, or another one than above
    "not followed": not_followed, "v first": on(lambda y: [thirds(y)[i] for i in (1, 2, 0)]),
    "einsum": lambda m, x: torch.einsum("od,bnd->bno", m.qkv.weight, x) + m.qkv.bias,
    "wide heads first": on(lambda y: y.unflatten(-1, (2, 3, 3)).permute(3, 0, 2, 1, 4)),
    "thirds": ATTENTIONS["thirds"][0]}


def attend_and_step(net, optimizer, x, attend):
    net.attend = attend
    take_step(net, optimizer, net(net.beside(x)).square().sum())


def train_attention(rank, world, kinds):
    """Four steps in which shard i of the batch goes through attention of the i-th kind.

    With ranks, each has one shard; else all are micro-batches of one process.
    """
    torch.manual_seed(0)
    net = Attends(None, qkv=18, beside=6).double()
    optimizer = MAC(net, lr=0.01, input_covariance=False, tcov=2, tinv=1)
    for _ in range(4):
        optimizer.zero_grad()
        x = randn(2 * len(kinds), 4, 6)
        for i, kind in enumerate(kinds):
            if world == 1 or i == rank:
                net.attend = OTHERS[kind]
                (net(net.beside(x[2 * i:2 * i + 2])).square().sum() * world).backward()
        for p in net.parameters() if world > 1 else ():
            torch.distributed.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
    return snapshot(net, optimizer)


@only_cpu
@pytest.mark.parametrize("kinds, values", (
    (("thirds", "not followed"), 8 + 4), (("not followed", "thirds"), 8 + 4),
    (("thirds", "v first"), 2), (("not followed", "wide heads first", "thirds"), 2),
    (("thirds", "einsum"), None), (("einsum", "einsum"), None)), ids=str)
def test_mac_attention_on_ranks(kinds, values):
    """Ranks that see other attention than others, or none, keep one state: a single process's.

    Where they contradict each other, v has the plain mean from then on.
    """
    want, results = train_attention(0, 1, kinds), on_ranks(len(kinds), train_attention, kinds)
    for result in results:
        close(result, results[0], 0)
    for result in (want, results[0]):
        assert result.get("qkv.weight: values") == values
    if values != 2:
        close(results[0], want, 1e-12)


def test_mac_attention_not_followed_later():
    """Where a step's attention is not followed the rows of v are unknown: it is a plain step."""
    net, means = Attends(None, qkv=18, beside=6).double(), []
    optimizer = MAC(net, input_covariance=False, tcov=1)
    for kind in ("thirds", "not followed", "thirds"):
        attend_and_step(net, optimizer, randn(3, 4, 6), OTHERS[kind])
        means.append(optimizer.state[net.qkv.weight].get("mean"))
        assert (" qkv: " in str(optimizer)) == (kind == "thirds")
    assert means[1] is None and not torch.equal(means[2], means[0])
    assert optimizer.state[net.qkv.weight]["updates"] == 1


@pytest.mark.parametrize("before", ("thirds", "not followed", "wide heads first"))
@pytest.mark.parametrize("step", range(1, 6))
def test_mac_attention_resumed(before, step):
    """A resumed run equals the other bit for bit, with what was known of the values; so does one
    that is loaded into an optimizer which has seen another attention."""
    def make(net):
        return MAC(net, input_covariance=False, tcov=2, tinv=3)
    later = "thirds" if before == "not followed" else before
    net, data = Attends(None, qkv=18, beside=6).double(), randn(8, 3, 4, 6)
    optimizer, fresh = make(net), copy.deepcopy(net)
    other = make(fresh)
    for x in data[:step]:
        attend_and_step(net, optimizer, x, OTHERS[before])
    for x in data[:2]:
        attend_and_step(fresh, other, x, OTHERS["thirds"])
    copy_of_run(net, optimizer, fresh, other)
    for model, each in ((net, optimizer), (fresh, other)):
        for x in data[step:]:
            attend_and_step(model, each, x, OTHERS[later])
    close(snapshot(fresh, other), snapshot(net, optimizer), 0)


# ---- MAC ----

def random_rows(count):
    """Matrices X of all shapes, as after a ReLU (mean far from zero) and Gaussian."""
    for i in range(count):
        m, n = (int(k) for k in torch.randint(2, 40, (2,)))
        X = randn(m, n) @ randn(n, n) / n ** 0.5 + randn(n)
        yield X.relu() + 0.01 if i % 2 else X


def norm2(M):
    return torch.linalg.matrix_norm(M, 2)


def test_mac_proposition_4_1():
    """Its four parts: A = ā āᵀ + Σ, the eigenvalues, the angle's sine and tangent."""
    for X in random_rows(100):
        m, n = X.shape
        mean = X.mean(0)
        A, Σ, μ = X.T @ X / m, (X - mean).T @ (X - mean) / m, mean @ mean
        close(A, torch.outer(mean, mean) + Σ, 1e-12)                                    # (a)
        λ, v = torch.linalg.eigh(A)
        at_most(torch.stack([μ, λ[-1], λ[-2]]) / λ[-1],                                 # (b)
                torch.stack([λ[-1], μ + norm2(Σ), norm2(Σ)]) / λ[-1])
        Q = torch.eye(n, dtype=X.dtype) - torch.outer(mean, mean) / μ
        sine, cosine = (Q @ v[:, -1]).norm(), (mean @ v[:, -1]).abs() / μ.sqrt()
        assert (sine - (Q @ Σ @ v[:, -1]).norm() / λ[-1]).abs() < 1e-9                  # (c)
        at_most(sine, norm2(Σ) / μ)
        b, s = (Q @ Σ @ mean).norm() / μ.sqrt(), norm2(Q @ Σ @ Q)
        if λ[-1] > s * (1 + 1e-6):
            at_most(sine / cosine, b / (λ[-1] - s), 1e-9)                               # (d)
    X = randn(4000, 3)
    X = (X - X.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(X.T.cov(correction=0)).T)
    mean = torch.tensor([0.3, 0.1, 0.2], dtype=X.dtype)
    v = torch.linalg.eigh((X + mean).T @ (X + mean) / len(X))[1][:, -1]
    close((v @ mean).abs(), mean.norm(), 1e-9)     # an isotropic Σ leaves ā an eigenvector


def numbers_of(optimizer):
    """How many numbers of statistics the state holds."""
    return sum(v.numel() for state in optimizer.state.values() for k, v in state.items()
               if torch.is_tensor(v) and k != "momentum_buffer")


def test_mac_state_size():
    """Two vectors for each block of inputs, and two for rows that attention may weigh; of the first
    layer a triangle and its factor."""
    net, want = make_net(), 28 * 29 // 2 + 28 ** 2
    optimizer = MAC(net, tcov=2, tinv=3)
    usual(net, optimizer, make_data(5))
    for name, p in net.named_parameters():
        if p.dim() > 1 and not name.startswith(("conv1", "extra")):
            blocks = {"conv2.weight": 2, "encoder.self_attn.in_proj_weight": 4}.get(name, 2)
            want += 2 * blocks * (p[0].numel() + (name != "conv2.weight"))
    assert numbers_of(optimizer) == want
    for layer, values in ((net.block.attn.qkv, 8 + 4), (net.head, -1)):
        assert optimizer.state[layer.weight]["values"] == values
    text = str(optimizer)
    for words in ("conv1: 4×28, input covariance", "block.attn.proj: 8×9, mean input,",
                  "block.attn.qkv: 24×9, mean input, v: mean attended input",
                  "plain step: block.norm1", f"{8 * want:,} bytes of statistics"):
        assert words in text, text


def first_covariance(optimizer, weight):
    """A₁ (d, d) in the state, whole or packed as its lower triangle by rows."""
    A = optimizer.state[weight]["covariance"][0]
    d = int((2 * len(A)) ** 0.5)
    A = A.new_zeros(d, d).index_put(tuple(torch.tril_indices(d, d)), A)
    return A + A.tril(-1).T


def covariance_of(inputs, layer):
    rows = with_ones(torch.cat([input_rows(x, layer).flatten(0, 2) for x in inputs]))
    return rows.T @ rows / len(rows)


def norm_then_conv(out=4):
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, out, 3), nn.Flatten(),
                         nn.Linear(16 * out, 5))


def small_vit():
    return models.VisionTransformer(6, 2, 12, 1, 2, 5, 3)


@pytest.mark.parametrize("build, first, shape", (
    (norm_then_conv, "1", (2, 3, 6, 6)), (small_vit, "patch_embed.proj", (2, 3, 6, 6)),
    (lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), linear()), "1", (5, 4)),
    (lambda: nn.Sequential(nn.Embedding(9, 4), linear()), None, None),
    (lambda: models.Attention(4, 2), None, (2, 3, 4))))
def test_mac_first_layer(build, first, shape):
    """(5) which layer it is, and A₁ (test_step has the step)."""
    net, inputs = build().double(), []
    if first:
        net.get_submodule(first).register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
    optimizer, _ = mac_step(net, lambda: net(
        torch.arange(6) if shape is None else randn(*shape)).square().sum(), input_covariance=True)
    found = [p for p, state in optimizer.state.items() if "covariance" in state]
    assert len(found) == bool(first)
    if first:
        layer = net.get_submodule(first)
        close(first_covariance(optimizer, layer.weight), covariance_of(inputs, layer), 1e-12)


@pytest.mark.parametrize("build, first, shape", (
    (lambda: nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 5)), "0", (4,)),
    (small_vit, "patch_embed.proj", (3, 6, 6)), (norm_then_conv, "1", (3, 6, 6))),
    ids=("Linear", "patch embedding", "after a norm"))
@pytest.mark.parametrize("training", (False, True))
def test_mac_calibrate(build, first, shape, training):
    """One pass over uneven batches is the covariance of all rows, of which the next step is made,
    whatever came before; it stays, the model too, and a resumed run has it."""
    def make(net):
        return MAC(net, tcov=1, tinv=50, damping=0.5)
    labels, batches = torch.randint(5, (6,)), [randn(n, *shape) + 1 for n in (4, 6, 1, 5)]
    net, inputs, later = build().double(), [], []
    data, layer = [(randn(6, *shape), labels) for _ in range(7)], net.get_submodule(first)
    optimizer = make(net)
    optimizer.calibrate(x + 3 for x in batches)
    usual(net, optimizer, data[:1])
    optimizer.zero_grad()
    before, twin = copy.deepcopy(net.train(training).state_dict()), copy.deepcopy(net)
    twin.get_submodule(first).register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
    for x in batches:
        twin(x)
    want = covariance_of(inputs, layer)
    last = [*net.children()][-1].register_forward_hook(lambda *_: later.append("ran"))
    optimizer.calibrate((x, labels) if i % 2 else x for i, x in enumerate(batches))
    last.remove()
    close(first_covariance(optimizer, layer.weight), want, 1e-12)
    close(net.state_dict(), before, 0)
    assert all(m.training == training for m in net.modules()) and not later
    assert all(p.grad is None for p in net.parameters())
    old = whole(layer.weight, layer.bias).detach().clone()
    optimizer.param_groups[0].update(lr=1.0, momentum=0.0)
    usual(net.train(), optimizer, data[1:2])
    G = whole(layer.weight.grad, layer.bias.grad)
    close(old - whole(layer.weight, layer.bias), 0.5 * G @ inverse(want, 0.5), 1e-10)
    usual(net, optimizer, data[2:4])
    fresh = build().double()
    resumed = make(fresh)
    copy_of_run(net, optimizer, fresh, resumed)
    for model, each in ((net, optimizer), (fresh, resumed)):
        usual(model, each, data[4:])
        close(first_covariance(each, model.get_submodule(first).weight), want, 1e-12)
    close(snapshot(fresh, resumed), snapshot(net, optimizer), 0)


def calibrated_on_ranks(rank, world):
    """Uneven shards, under DDP; the first layer's covariance."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(make_net())
    optimizer = MAC(model)
    parts = make_data(1, batch=12)[0][0].split([1, 3, 8] if world == 3 else [1, 11])
    optimizer.calibrate(parts[rank].split(2))
    return first_covariance(optimizer, model.module.conv1.weight)


@only_cpu
@pytest.mark.parametrize("world", (2, 3))
def test_mac_calibrate_on_ranks(world):
    results = on_ranks(world, calibrated_on_ranks)
    close(results[0], covariance_of([make_data(1, batch=12)[0][0]], make_net().conv1), 1e-12)
    assert all(torch.equal(result, results[0]) for result in results)


def test_mac_refuses():
    wide = nn.Sequential(nn.Linear(20_000, 2))
    raises(ValueError, ["20001", "input_covariance=False", "layer, 0"], lambda: MAC(wide))
    MAC(wide, input_covariance=False)
    raises(ValueError, ["calibrate", "no batch"],
           lambda: MAC(nn.Conv2d(3, 4, 3)).calibrate([torch.zeros(0, 3, 5, 5)]))
    raises(ValueError, ["calibrate", "no first layer"],
           lambda: MAC(models.Attention(4, 2)).calibrate([torch.zeros(1, 2, 4)]))
    raises(TypeError, ["calibrate", "dict"], lambda: MAC(make_net()).calibrate([{"x": 1}]))
    frozen = make_net()
    optimizer = MAC(frozen)
    frozen.conv1.requires_grad_(False)
    raises(ValueError, ["calibrate", "conv1", "frozen"],
           lambda: optimizer.calibrate([make_data(1)[0]]))
    net = nn.Sequential(linear())          # A₁ + ρI that float32 cannot tell from a singular A₁
    optimizer, before = MAC(net, damping=1e-6), net[0].weight.detach().clone()
    net(1e4 * torch.randn(2, 4)).sum().backward()
    raises(FloatingPointError, ["layer 0 ", "1e-06", "damping"], optimizer.step)
    assert torch.equal(net[0].weight, before)


# ---- FOOF ----

@pytest.mark.parametrize("R, d, out, ρ", ((7, 3, 2, 0.5), (4, 9, 5, 1.0), (50, 10, 3, 1e-3),
                                          (3, 6, 4, 10.0)))
def test_foof_ridge(R, d, out, ρ):
    """(2) = (3): the minimiser by least squares on augmented rows; zero gradient of (2)."""
    X, E, layer = randn(R, d) + 1, randn(R, out), nn.Linear(d, out, bias=False).double()
    optimizer = METHODS["foof"](layer, damping=ρ)
    Δ = take_step(layer, optimizer, (layer(X) * E).sum() / R)["weight"]
    G = E.T @ X / R                                    # rows a, and e = R ∂loss/∂s
    rows = torch.cat([X / R ** 0.5, ρ ** 0.5 * torch.eye(d, dtype=X.dtype)])
    targets = torch.cat([E / R ** 0.5, X.new_zeros(d, out)])
    close(Δ, torch.linalg.lstsq(rows, targets).solution.T, 1e-11)
    free = Δ.clone().requires_grad_()
    value = 0.5 * (X @ free.T - E).square().sum() / R + 0.5 * ρ * free.square().sum()
    close(torch.autograd.grad(value, free)[0] + G, G, 1e-12)


# ---- covariance.py and patches.py ----

def shape_of(conv):
    return Geometry.of(conv.weight, conv.stride, conv.padding, conv.dilation, conv.groups)


def test_shifts(monkeypatch):
    """Convolutions of stride 1 with odd kernels form no patches, in float32 too."""
    calls, fast = [], covariance.shift_gram
    monkeypatch.setattr(covariance, "shift_gram", lambda *args: calls.append(1) or fast(*args))
    for C, out, size, options in SHIFTS:
        covariance.patch_gram(randn(2, C, *size), shape_of(nn.Conv2d(C, out, **options)))
    assert len(calls) >= 8, "images smaller than the kernel take patches"
    x, geometry = torch.randn(4, 3, 16, 16), shape_of(nn.Conv2d(3, 4, 3, padding=1))
    close(covariance.patch_gram(x, geometry), covariance.patch_gram(x.double(), geometry), 1e-6)


@pytest.mark.parametrize("arguments", (
    dict(), dict(padding="valid"), dict(padding=1, stride=2), dict(padding=(1,), stride=[2, 1]),
    dict(padding=torch.Size((1, 0)), dilation=(2,)), dict(padding="same", dilation=2)), ids=str)
def test_geometry_of_calls(arguments):
    """torch.conv2d takes ints, strings and sequences of one or two: W ∗ x = W · patches."""
    x, weight = randn(2, 2, 7, 6), randn(3, 2, 3, 2)
    y = torch.conv2d(x, weight, **arguments)
    rows = patches.patches(x, Geometry.of(weight, **arguments))[0]
    close(weight.flatten(1) @ rows, y.transpose(0, 1).flatten(1), 1e-13)


# ---- inputs that leave a covariance singular ----

def dead(net):
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    return torch.randn(4, 4)


def constant(net):
    return torch.full((4, 4), 3.0)


def hard_step(method, input_of, damping, bias=True, scale=1.0, steps=3):
    """Steps of a float32 network; its parameters stay finite, whatever is raised."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias))
    optimizer = METHODS[method](net, lr=0.01, damping=damping, kl_clip=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(input_of(net)), torch.tensor([0, 1, 2, 0]))
        (loss * scale).backward()
        try:
            optimizer.step()
        finally:
            assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("damping", (1.0, 1e-3))
@pytest.mark.parametrize("input_of, scale", (
    (dead, 1.0), (constant, 1.0), (lambda net: torch.zeros(4, 4), 1.0),
    (lambda net: torch.randn(4, 4), 0.0), (lambda net: torch.randn(4, 4), 1e-25)),
    ids=("dead", "constant", "zero", "no gradient", "tiny gradient"))
@pytest.mark.parametrize("method", METHODS)
def test_singular(method, input_of, scale, damping):
    """Dead ReLU, constant input, no gradient: finite steps."""
    for bias in (True, False):
        hard_step(method, input_of, damping, bias, scale)


@pytest.mark.parametrize("method, dampings", (
    ("foof", (1e-9, 1e-30, 1e-45)), ("mac, first layer", (1e-30,)),
    ("kfac", (1e-16, 1e-30, 1e-45)), ("kfac, eigen", (1e-16, 1e-30, 1e-45))))
def test_damping_too_small(method, dampings):
    """An error that says so."""
    for damping in dampings:
        raises(FloatingPointError, ("layer ", str(damping), "raise damping"),
               lambda: hard_step(method, constant, damping))


@pytest.mark.parametrize("method", ("foof", "mac, first layer", "nysact, exact", "kfac"))
@pytest.mark.parametrize("factor", (0.9, 1.1))
def test_damping_guard(method, factor):
    """ρ < ε tr A is refused, also of an A that has a factor; K-FAC compares both its factors' ρ."""
    X, E, layer = torch.randn(64, 4), torch.randn(64, 3), nn.Linear(4, 3, bias=False)
    A, P = X.T @ X / 64, 64 * E.T @ E
    damping = factor * torch.finfo(torch.float32).eps * A.trace().item()
    if method == "kfac":                # π√λ beside ε tr A and √λ/π beside ε tr P, d = 4, out = 3
        damping = (damping * (P.trace() / 3 / (A.trace() / 4)).sqrt().item()) ** 2
    optimizer = METHODS[method](layer, damping=damping)
    (layer(X) * E).sum().backward()
    if factor < 1:
        raises(FloatingPointError, ["damping"], optimizer.step)
    else:
        optimizer.step()


def test_overflow_names_the_side():
    for method in ("foof", "kfac"):
        raises(FloatingPointError, ("(covariance) of layer 0 ", "not finite"),
               lambda: hard_step(method, lambda net: torch.full((4, 4), 1e30), 1.0))
    raises(FloatingPointError, ("(output_covariance) of layer ", "not finite"),
           lambda: hard_step("kfac", constant, 1.0, scale=1e30))


# ---- K-FAC ----

def test_kfac_pi():
    """(3) π is where the cross terms' trace norm is least; 1 where a trace is 0; no overflow."""
    A, P = (M @ M.mT for M in (randn(1, 6, 4), randn(1, 3, 2)))

    def cross(s):
        return (1 / s * A[0].trace() * len(P[0]) + s * P[0].trace() * len(A[0])).item()

    def π(A, P):
        return kfac.dampings(kfac.pack(A), kfac.pack(P), 1.0)[0]
    assert cross(π(A, P)[0]) < min(cross(π(A, P)[0] * 1.001), cross(π(A, P)[0] / 1.001))
    close(kfac.dampings(kfac.pack(A), kfac.pack(P), 0.04)[1], 0.2 / π(A, P), 1e-14)
    close(π(0 * A, P), [1.0], 0)
    close(π(A, 0 * P), [1.0], 0)
    close(π(torch.eye(3)[None] * 1e30, torch.eye(3)[None] * 1e-30), [1e30], 1e-5)


def all_pairs(x, residuals):
    """Each input with each residual: over these, inputs and residuals are independent."""
    repeats = [1] * (residuals.dim() - 1)
    return x.repeat_interleave(len(residuals), 0), residuals.repeat(len(x), *repeats)


class LinearNetwork(nn.Module):
    def __init__(self, pooled):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        self.pooled = pooled

    def forward(self, x):
        return self.layers(x).mean(1) if self.pooled else self.layers(x)


@pytest.mark.parametrize("sharing, terms, kind, exact", (
    ("expand", "samples", "plain", True), ("reduce", "samples", "plain", True),
    ("expand", "tokens", "tokens", True), ("reduce", "samples", "pooled", True),
    ("expand", "samples", "pooled", False), ("reduce", "tokens", "tokens", False)))
def test_kfac_linear_network(sharing, terms, kind, exact):
    """(2), (8) exact: F = A ⊗ P in linear networks with squared loss, where K-FAC says it is.

    The loss of an example with output f and residual r is ½|f − y|², y = f − r held fixed; over all
    pairs of inputs and residuals its gradients have the Fisher matrix of the model for covariance.
    """
    S, o, λ = 3, 2, 0.1
    model = LinearNetwork(kind == "pooled").double()
    r = 2.0 * torch.cat([torch.eye(o), -torch.eye(o)]).double()            # mean 0
    if kind == "tokens":           # independent residuals of the tokens: a row of a product set
        signs = torch.tensor([[1.0 if i >> t & 1 else -1.0 for t in range(S)]
                              for i in range(2 ** S)]).double()
        r = (signs[:, None, :, None] * torch.eye(o).double()[None, :, None]).flatten(0, 1)
    x, r = all_pairs(randn(*((3, 3) if kind == "plain" else (3, S, 3))), r)
    fishers = []
    for layer in model.layers:                 # one row of D for each loss term
        D = []
        for k in range(len(x)):
            f = model(x[k:k + 1]).flatten(0, -2)
            for t in range(len(f)):
                loss = (0.5 * (f[t] - (f[t].detach() - r[k].view(-1, o)[t])).square()).sum()
                D.append(whole(*torch.autograd.grad(loss, list(layer.parameters()),
                                                    retain_graph=True)).flatten())
        D = torch.stack(D)
        fishers.append(D.T @ D / len(D))
    optimizer = factory(KFAC, **EXACT)(model, damping=λ, inverse="eigen", weight_sharing=sharing,
                                       loss_terms=terms)
    before = [whole(*layer.parameters()).detach().clone() for layer in model.layers]
    f = model(x)
    (0.5 * (f - (f.detach() - r)).square()).sum().div(f.numel() / o).backward()
    for p in model.parameters():                           # any gradient serves, and this one is 0
        p.grad = randn(*p.shape)
    G = [whole(*(p.grad for p in layer.parameters())) for layer in model.layers]
    optimizer.step()
    for layer, W, V, Fisher in zip(model.layers, before, G, fishers):
        step, want = W - whole(*layer.parameters()), inverse(Fisher, λ) @ V.flatten()
        if exact:
            close(step, want.view_as(V), 1e-12)
        else:
            assert (step - want.view_as(V)).norm() > 0.05 * want.norm()


def factors(net, optimizer):
    return {k: v for k, v in snapshot(net, optimizer).items() if "covariance" in k}


def kfac_factors(monkeypatch, labels, drawn, fisher="sampled", parts=1, joined=False, **options):
    """The gradients, and the state's factors, after one step in which `drawn` are drawn.

    joined: the model's calls for all parts stand behind one set of logits.
    """
    x, _ = make_data(1)[0]
    net = make_net(**{k: options.pop(k) for k in [*options] if k == "checkpointing"})
    optimizer = KFAC(net, lr=0.1, tcov=1, fisher=fisher, **options)
    batches = [*zip(x.chunk(parts), labels.chunk(parts), drawn.chunk(parts))]
    if joined:
        batches = [(x, labels, drawn)]
    for part, label, other in batches:
        monkeypatch.setattr(kfac, "draw_labels", lambda logits: other)
        logits = torch.cat([net(piece) for piece in part.chunk(parts if joined else 1)])
        if fisher == "sampled":
            before = {name: p.grad for name, p in net.named_parameters()}
            optimizer.sample_fisher(logits)
            optimizer.sample_fisher(logits)               # its labels are drawn already
            assert all(p.grad is before[name] for name, p in net.named_parameters())
        (F.cross_entropy(logits, label) / len(batches)).backward()
    grads = {name: grad.clone() for name, grad in gradients(net).items()}
    optimizer.step()
    return grads, factors(net, optimizer)


@pytest.mark.parametrize("options", (
    dict(), dict(parts=2), dict(parts=2, joined=True), dict(parts=3, joined=True),
    dict(checkpointing=False)), ids=str)
@pytest.mark.parametrize("sharing", ("expand", "reduce"))
def test_kfac_sampled(sharing, options, monkeypatch):
    """Labels of sample_fisher: forced ones give their empirical factors, the true ones ∇."""
    y, forced = make_data(1)[0][1], torch.randint(5, (6,))
    run = functools.partial(kfac_factors, monkeypatch, weight_sharing=sharing)
    _, want = run(forced, forced, fisher="empirical")
    plain, _ = run(y, forced, fisher="empirical")
    grads, got = run(y, forced, **options)
    close(got, want, 1e-12)
    close(grads, plain, 1e-12)


def test_kfac_fisher():
    """Many draws of few inputs: P converges to Σ_c p_c g_c g_cᵀ, and not to the labels' factor."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 4)).double()
    x, exact, P = randn(3, 4), torch.zeros(3, 3, dtype=torch.float64), {}
    for n in range(3):
        hidden = model[0](x[n:n + 1]).detach().requires_grad_()
        log_p = model[2](hidden.relu()).log_softmax(1)[0]
        for c in range(4):
            g, = torch.autograd.grad(log_p[c], hidden, retain_graph=True)
            exact += log_p[c].exp().detach() * g.T @ g / 3
    for fisher in ("sampled", "empirical"):
        optimizer = KFAC(model, lr=0.0, fisher=fisher)
        logits = model(x.repeat(20_000, 1))
        if fisher == "sampled":
            optimizer.sample_fisher(logits)
        take_step(model, optimizer, F.cross_entropy(logits, torch.zeros(len(logits)).long()))
        P[fisher] = kfac.unpack(optimizer.state[model[0].weight]["output_covariance"])[0]
    close(P["sampled"], exact.tril(), 0.03)
    assert (P["empirical"] - exact.tril()).norm() > 0.3 * exact.norm()


def test_kfac_sampled_refuses():
    """A backward pass without sample_fisher() costs its own step only, and nan logits no crash;
    logits without a dimension of classes, or with it elsewhere, are refused with the remedy."""
    net = nn.Sequential(nn.Linear(4, 6)).double()
    optimizer, x = KFAC(net, lr=0.1, tcov=1, fisher="sampled"), randn(5, 4)
    for logits in (net(x)[:, :1], net(x)[:, 0], randn(2, 3, 5, 5)):
        raises(ValueError, ["(N, classes)", str(tuple(logits.shape)), "movedim", "stack"],
               lambda: optimizer.sample_fisher(logits))
    net(x).square().sum().backward()
    raises(RuntimeError, ["sample_fisher", "before each"], optimizer.step)
    for factor in (1.0, 1.0, math.nan):
        optimizer.zero_grad()
        logits = net(x) * factor
        optimizer.sample_fisher(logits)
        logits.square().sum().backward()
        if factor == 1.0:
            optimizer.step()
    raises(FloatingPointError, ["0"], optimizer.step)
    raises(RuntimeError, ("fisher='sampled'",), lambda: KFAC(net).sample_fisher(x))


# What calls a model, how, and how many terms the loss then has: B = 4 samples, S = 3 tokens.

class Returns(nn.Module):
    """A layer on the first argument of floats; turn makes it the layer's input, shape makes the
    layer's output what it returns."""

    def __init__(self, shape=lambda y: y, module=None, turn=lambda x: x):
        super().__init__()
        self.layer = nn.Linear(6, 5) if module is None else module
        self.shape, self.turn = shape, turn

    def forward(self, *args, **kwargs):
        x = next(x for x in (*args, *kwargs.values()) if x.is_floating_point())
        return self.shape(self.layer(self.turn(x)))


class Parts(nn.Module):
    """Parts that a training loop calls, none of them the whole; of images, they halve the size."""

    def __init__(self, halved=False):
        super().__init__()
        if halved:
            self.encoder, self.layer = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 2, 1)
        else:
            self.encoder, self.layer = nn.Linear(6, 6), nn.Linear(6, 5)


class Language(nn.Module):
    """Token ids to logits, by an embedding; or a number, without any tensor, to logits."""

    def __init__(self, shape=lambda y: y):
        super().__init__()
        self.embedding, self.layer, self.shape = nn.Embedding(7, 6), nn.Linear(6, 7), shape

    def forward(self, ids, mask=None):
        ids = torch.zeros(ids, 3).long() if isinstance(ids, int) else ids
        return self.shape(self.layer(self.embedding(ids)))


class Encoder(nn.Module):
    """torch's encoder, which takes positions first inside a model that takes samples first; or in
    one that takes positions first and returns them (order None); or samples first throughout."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.block = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=order == "samples")
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        if self.order is None:
            return self.layer(self.block(x))
        turned = self.order == "positions"
        x = self.block(x.transpose(0, 1)).transpose(0, 1) if turned else self.block(x)
        return self.layer(x.mean(1))


def mean_loss(*ys):
    sum(y.square().mean() for y in ys).backward()


def one(*shape):
    """One call, one backward pass."""
    return lambda net: mean_loss(net(randn(*shape)))


def tokens(net):
    mean_loss(net(torch.randint(7, (4, 3))))


def parts_in_turn(*sizes):
    """Micro-batches, whose parts take turns."""
    def passes(net):
        hidden = [net.encoder(randn(n, 6)).relu() for n in sizes]
        for loss, n in zip([net.layer(h).square().mean() for h in hidden], sizes):
            (loss * n / sum(sizes)).backward()
    return passes


def towers(net):
    """Two parts side by side."""
    (net.encoder(randn(4, 6))[:, :5] * net.layer(randn(4, 6))).sum(1).mean().backward()


def twice(net):
    """Two losses of one forward pass."""
    y = net(randn(4, 6))
    y.mean().backward(retain_graph=True)
    mean_loss(y)


def micro_batches(net):
    for n in (1, 2, 3):
        (net(randn(n, 6)).square().mean() * n / 6).backward()


def no_grad_pass(net):
    with torch.no_grad():
        net(randn(9, 6))


def with_a_test(net):
    """Batches of a test before, between and after, in train mode too."""
    no_grad_pass(net)
    y = net(randn(4, 6))
    no_grad_pass(net)
    net(randn(8, 6))
    mean_loss(y)


def run_again(net):
    """The whole model under reentrant checkpointing, and a test before it is run again."""
    y = checkpoint(net, randn(4, 6).requires_grad_(), use_reentrant=True)
    no_grad_pass(net)
    mean_loss(y)


def perturbed(net):
    """The second call's input has a graph, but not of this model."""
    x, noise = randn(4, 6), torch.zeros(4, 6).double().requires_grad_()
    mean_loss(net(x), net(x + noise))


def unrolled(net):
    """A cell that goes on from its own output, with a loss of each step."""
    states = [randn(4, 6)]
    for _ in range(3):
        states.append(net.encoder(states[-1]))
    mean_loss(*(net.layer(state) for state in states[1:]))


def conv(shape=lambda y: y, out=2):
    return Returns(shape, nn.Conv2d(3, out, 3, padding=1))


def returns(shape):
    return lambda: Returns(shape)


def speaks(shape):
    return lambda: Language(shape)


def counted(net, passes, loss_terms):
    """N, as the ratio of net.layer's P to Σ ĝ ĝᵀ of the passes."""
    net, traces = net.double(), []

    def keep(layer, args, y):
        if y.requires_grad:
            y.register_hook(lambda g: traces.append(g.square().sum()))
    net.layer.register_forward_hook(keep)
    optimizer = KFAC(net, lr=0.0, loss_terms=loss_terms)
    passes(net)
    optimizer.step()
    state = optimizer.state[net.layer.weight]["output_covariance"]
    return (kfac.unpack(state)[0].trace() / sum(traces)).item()


@pytest.mark.parametrize("loss_terms, build, passes, want", (
    ("samples", Returns, one(4, 6), 4), ("samples", Returns, one(4, 3, 6), 4),
    ("samples", conv, one(4, 3, 5, 6), 4), ("samples", Returns, micro_batches, 6),
    ("samples", Returns, with_a_test, 4), ("samples", Returns, run_again, 4),
    ("samples", Returns, lambda net: mean_loss(net(torch.ones(3).long(), x=randn(4, 6))), 4),
    ("samples", returns(lambda y: dict(loss=y.sum(), logits=y)),
     lambda net: net(randn(4, 6))["loss"].backward(), 4),
    ("samples", returns(lambda y: y.mean()), one(4, 6), 4),
    ("samples", Parts, parts_in_turn(4), 4), ("samples", Parts, parts_in_turn(4, 2), 6),
    ("samples", Parts, towers, 4), ("samples", Returns, twice, 4),
    ("samples", lambda: Encoder("positions"), one(4, 3, 6), 4),
    ("tokens", Returns, one(4, 3, 6), 12), ("tokens", Returns, micro_batches, 6),
    ("tokens", Language, tokens, 12), ("tokens", speaks(lambda y: y.flatten(0, 1)), tokens, 12),
    ("tokens", speaks(lambda y: y.mT), tokens, 12), ("tokens", speaks(torch.mean), tokens, 12),
    ("tokens", speaks(lambda y: y[..., 0]), tokens, 12),
    ("tokens", returns(lambda y: y.transpose(0, 1)), one(3, 4, 6), 12),
    ("tokens", conv, one(4, 3, 5, 6), 120), ("tokens", conv, one(4, 3, 3, 3), 36),
    ("tokens", lambda: conv(out=3), one(4, 3, 5, 6), 120),
    ("tokens", lambda: conv(lambda y: y[:, 0]), one(4, 3, 5, 6), 120),
    (7, Returns, one(6), 7), (7, Returns, micro_batches, 7), (0.5, Returns, perturbed, 0.5),
    (torch.tensor(9), Returns, one(4, 6), 9)))
def test_kfac_terms(loss_terms, build, passes, want):
    """How many terms the loss has, for models that are called as a whole and by their parts."""
    close(counted(build(), passes, loss_terms), want, 1e-12)


@pytest.mark.parametrize("loss_terms, build, passes, why", (
    ("samples", Returns, one(6), "single sample"), ("tokens", Returns, one(6), "single sample"),
    ("samples", conv, one(3, 5, 6), "single sample"), ("tokens", conv, one(3, 5, 6), "single"),
    ("samples", returns(lambda y: y.mean(0)), one(3, 4, 6), "(3, 4, 6) went in"),
    ("samples", returns(lambda y: y.flatten(0, 1)), one(4, 3, 6), "in common"),
    ("samples", lambda: Encoder(None), one(3, 4, 6), "batch_first"),
    ("samples", Returns, lambda net: mean_loss(net(randn(4, 6)), net(randn(4, 6))),
     "several calls"),
    ("samples", Returns, perturbed, "several"), ("samples", Parts, unrolled, "several calls"),
    ("samples", Parts, lambda net: mean_loss(net.encoder(randn(4, 6)), net.layer(randn(3, 6))),
     "[3, 4]"),
    ("samples", Language, lambda net: mean_loss(net(4)), "no tensor"),
    ("tokens", lambda: Parts(halved=True),
     lambda net: mean_loss(net.layer(net.encoder(randn(4, 3, 6, 8)))), "tokens in common"),
    ("tokens", returns(lambda y: y.mean(1)), one(4, 3, 6), "tokens in common"),
    ("tokens", lambda: conv(lambda y: y[..., ::2, ::2]), one(4, 3, 5, 6), "tokens in common")))
def test_kfac_terms_that_contradict(loss_terms, build, passes, why):
    """Nothing is guessed: the reason and what to do, and that it helps."""
    raises(RuntimeError, ["not known", why, "loss_terms=<number>"],
           lambda: counted(build(), passes, loss_terms))
    close(counted(build(), passes, 3), 3, 1e-12)


def test_kfac_terms_said():
    """A number for each step, of targets that are not ignored; what is refused."""
    for value in ("rows", -1, math.inf, math.nan):
        raises(ValueError, ["loss_terms", str(value)], lambda: KFAC(make_net(), loss_terms=value))
    KFAC(make_net(), loss_terms=0)             # all targets of a rank may be ignored
    y = torch.tensor([[1, -100, 2], [3, -100, -100], [0, 1, 2], [-100, -100, 4]])
    kept, states = y.flatten() != -100, []
    x, layer = randn(4, 3, 6), nn.Linear(6, 5).double()
    for rows, labels in ((x, y), (x.flatten(0, 1)[kept], y.flatten()[kept])):
        optimizer = KFAC(layer, lr=0.0, loss_terms="tokens")
        if rows is x:
            optimizer.loss_terms = (y != -100).sum()
        take_step(layer, optimizer, F.cross_entropy(layer(rows).flatten(0, -2), labels.flatten()))
        states.append(optimizer.state[layer.weight]["output_covariance"])
    close(*states, 1e-12)
    assert count_terms([], 5, False) == 0           # of a rank none of whose layers ran
    optimizer.loss_terms = "all"
    optimizer.steps = 0
    optimizer.begin_step()
    layer(x).mean().backward()
    raises(ValueError, ["loss_terms", "'all'"], optimizer.step)


def test_kfac_positions_first():
    """'reduce' knows the samples of modules that take positions first in a model that does not."""
    x, y, states = randn(4, 3, 6), torch.arange(4), []
    for order in ("samples", "positions"):
        torch.manual_seed(0)
        net = Encoder(order).double()
        optimizer = KFAC(net, lr=0.0, weight_sharing="reduce")
        take_step(net, optimizer, loss_of(net, x, y))
        states.append(factors(net, optimizer))
    assert len(states[0]) == 6
    close(*states, 1e-12)


@pytest.mark.parametrize("turn, back", (
    (lambda x: x.flatten(0, 1), lambda y: y.view(4, 3, 5).mean(1)),                # rows of tokens
    (lambda x: x.unflatten(1, (3, 1)).flatten(0, 1), lambda y: y.view(4, 3, 5).mean(1)),  # windows
    (lambda x: x.transpose(0, 1), lambda y: y.mean(0))))                           # positions first
def test_kfac_reduce_without_samples(turn, back):
    """Where a layer's rows are not told apart by sample, 'reduce' takes the plain step."""
    net = Returns(back, nn.Linear(6, 5), turn).double()
    optimizer = KFAC(net, lr=1.0, weight_sharing="reduce")
    moved = take_step(net, optimizer, net(randn(4, 3, 6)).square().mean())
    assert "needs its samples first" in repr(optimizer)
    close(moved["layer.weight"], net.layer.weight.grad, 1e-12)


@pytest.mark.parametrize("fused", (False, True))
def test_kfac_finds_the_scale(fused):
    """With a GradScaler that it was not told of steps equal unscaled ones, skipped ones or not."""
    scaler = torch.amp.GradScaler(device_type(), init_scale=2.0 ** 16, growth_interval=3)
    data = make_data(9)

    def scaled(model, optimizer, data):
        for i, (x, y) in enumerate(data):
            for factor in (math.inf, 1.0) if i % 4 == 0 else (1.0,):
                model.zero_grad(set_to_none=False)
                scaler.scale(factor * loss_of(model, x, y)).backward()
                scaler.step(optimizer)
                scaler.update()
    make = factory(KFAC, tcov=2, tinv=3, fused=fused)
    close(trained(make, scaled, data), trained(make, data=data), 1e-13)
    net = make_net()
    optimizer = make(net)
    for told in (None, scaler):
        optimizer = make(net, grad_scaler=told)
        optimizer.zero_grad()
        scaler.scale(loss_of(net, *data[0])).backward()
        scaler.unscale_(optimizer)
        if told is None:
            raises(RuntimeError, ["unscale_", "grad_scaler=scaler"],
                   lambda: scaler.step(optimizer))
            scaler.update()
        else:
            scaler.step(optimizer)


def fails_somewhere(rank, world):
    """What each rank raises: where one does not know its terms, and where one cannot factor."""
    said = []
    batched = randn(4, 6)
    for x, damping in ((batched if rank else batched[0], 0.1), (torch.ones_like(batched), 1e-40)):
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)).double()
        optimizer = KFAC(net, damping=damping)
        net(x).square().mean().backward()
        try:
            optimizer.step()
        except (RuntimeError, FloatingPointError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_kfac_fails_on_all_ranks():
    """What fails on one rank is raised by all, and none waits."""
    for rank, (terms, factors) in enumerate(on_ranks(2, fails_somewhere)):
        assert ("another rank" in terms) == (rank == 1) and terms.startswith("RuntimeError")
        assert factors.startswith("FloatingPointError") and "raise damping" in factors


def test_kfac_clip():
    """(5) over all layers, with the current lr of each group; plain parameters are not scaled."""
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y, steps = randn(6, 4), torch.randint(3, (6,)), {}
    lrs = {f"{i}.{name}": lr for i, lr in enumerate((0.15, 0.2, 0.05)) for name in ("weight",
                                                                                  "bias")}
    for kl_clip in (None, 1e-3, 1e9):
        model = copy.deepcopy(net)
        optimizer = KFAC(model, params=[dict(params=list(m.parameters()), lr=lr) for m, lr in
                                        zip(model, (0.3, 0.2, 0.05))], momentum=0.0,
                         kl_clip=kl_clip)
        optimizer.param_groups[0]["lr"] *= 0.5                       # as a scheduler does
        moved = take_step(model, optimizer, loss_of(model, x, y))
        steps[kl_clip] = {name: moved[name] / lrs[name] for name in moved}
    raw = gradients(model)
    total = sum(lr ** 2 * (steps[None][name] * raw[name]).sum() for name, lr in lrs.items()
                if name[0] != "1")
    ν = (1e-3 / total.item()) ** 0.5
    assert ν < 1
    close(steps[1e-3], {name: value * (1 if name[0] == "1" else ν)
                        for name, value in steps[None].items()}, 1e-12)
    close(steps[1e9], steps[None], 0)
    close(steps[1e-3]["1.weight"], raw["1.weight"], 1e-13)


def test_kfac_shares():
    """Ranks share the factorisations: every job has one owner, and the longest load shrinks."""
    wide = [(w * 9) ** 3 for w in [64] * 5 + [128] * 4 + [256] * 4 + [512] * 3] + [512 ** 3] * 16
    for jobs in ([27 ** 3, 4 ** 3, 64, 8, 729, 5], wide):
        before = sum(jobs)
        for world in (1, 2, 3, 4, 8):
            owners = kfac.shares(jobs, world)
            assert len(owners) == len(jobs) and set(owners) <= set(range(world))
            longest = max(sum(c for c, o in zip(jobs, owners) if o == r) for r in range(world))
            assert longest <= min(before, 4 / 3 * max(max(jobs), sum(jobs) / world)), world
            before = longest


def dead_features(seed):
    """A float32 covariance of 51 inputs, few of them ever non-zero, on which LAPACK may give up."""
    generator = torch.Generator("cpu").manual_seed(seed)
    live = torch.randperm(50, generator=generator, device="cpu")[:7 + seed % 8]
    X = torch.rand(len(live), 3 * len(live), generator=generator, device="cpu")
    A = torch.zeros(51, 51, device="cpu")
    A[live[:, None], live] = X @ X.mT / X.shape[1]
    return A.to(torch.get_default_device())


def test_dead_features():
    """K-FAC's (4) and NysAct's (5) where float32 eigenvalues fail: some raise, some return nan."""
    S = torch.eye(51)[None, :, :50]
    for seed in range(150):
        A = dead_features(seed)
        vectors, values, failed = kfac.eigenbasis(A)
        assert not failed, seed
        close((vectors * values) @ vectors.mT, A, 1e-5)
        U, λ, failed = nysact.nystrom(A[None] @ S, S)
        assert not failed, seed
        close(rebuilt(U.double(), λ.double())[0], A, 1e-5)


# ---- NysAct ----

def activations(rows, d, rank=None):
    """Rows as after a ReLU: a large mean and a decaying spectrum, or one of the given rank."""
    scale = torch.arange(1, (rank or d) + 1).double() ** -1
    X = (randn(rows, rank or d) * scale) @ randn(rank or d, d)
    return X if rank else (X + 0.3 * randn(d)).relu()


def second_moment(X):
    return X.mT @ X / X.shape[-2]


def rebuilt(U, eigenvalues):
    return U * eigenvalues.unsqueeze(-2) @ U.mT


def drawn(*arguments):
    """S, on the device of the tests."""
    return nysact.draw_sketch(*arguments).to(torch.get_default_device())


def approximated(A, S):
    """Â of (5)."""
    return rebuilt(*nysact.nystrom(A @ S, S)[:2])


kinds = pytest.mark.parametrize("kind", ("gaussian", "subcolumns"))


@kinds
@pytest.mark.parametrize("d, r", ((12, 1), (40, 5), (40, 39), (150, 10)))
def test_nysact_nystrom(d, r, kind):
    """(5) against (4); Â S = A S; 0 ⪯ Â ⪯ A."""
    A = torch.stack([second_moment(activations(4 * d, d)) for _ in range(3)])
    S, eigenvalues = drawn(3, d, r, kind, 3), torch.linalg.eigvalsh
    Y = A @ S
    U, λ, failed = nysact.nystrom(Y, S)
    assert not failed.any() and U.shape == (3, d, r) and λ.shape == (3, r)
    close(rebuilt(U, λ), Y @ torch.linalg.solve(S.mT @ Y, Y.mT), 1e-9)
    close(rebuilt(U, λ) @ S, Y, 1e-12)
    close(U.mT @ U, torch.eye(r).expand(3, r, r), 1e-12)
    at_most(1 + eigenvalues(rebuilt(U, λ) - A)[:, -1] / λ[:, 0], torch.ones(3), 1e-13)
    at_most(torch.cat([λ, -λ]), torch.cat([eigenvalues(A).flip(1)[:, :r], torch.zeros(3, r)]))


def outlier(d, κ, τ, S):
    """A = κvvᵀ + τI, v (d, 1), and c = ‖Sᵀv‖²."""
    v = torch.linalg.qr(randn(d, 1))[0]
    return κ * v @ v.T + τ * torch.eye(d).double(), v, (S[0].T @ v).square().sum()


@kinds
def test_nysact_rank(kind):
    """Â = A of rank ≤ r; Â depends on range(S) only; what it sees of one outlier."""
    S = drawn(1, 60, 10, kind, 3)
    for rank in (1, 3, 10):
        A = second_moment(activations(50, 60, rank))
        close(approximated(A, S)[0], A, 1e-9)
    zero = nysact.nystrom(torch.zeros_like(S), S)[1]          # ν, 1e-154 here, was taken off again
    assert zero.max() < 1e-160
    A, S = second_moment(activations(99, 30)), drawn(1, 30, 6, kind, 0)
    M = torch.linalg.qr(randn(6, 6))[0]
    close(approximated(A, S @ M), approximated(A, S), 1e-11)
    A, v, c = outlier(30, 7.0, 0.2, S)
    close(v.T @ approximated(A, S)[0] @ v, (7.2 ** 2 * c / (7.0 * c + 0.2)).view(1, 1), 1e-12)


@pytest.mark.parametrize("δ, fails", ((4e-4, False), (6e-4, True)))
def test_nysact_of_another_sketch(δ, fails):
    """Beside ‖Y‖ = 1 the eigenvalue −δ of SᵀY, or 2δ of asymmetry, is rounding up to 2δ = 1e-3."""
    S = torch.eye(5, 2).double()[None]
    for core in ([[1, 0], [0, -δ]], [[1, 2 ** 0.5 * δ], [0, 0]]):
        assert nysact.nystrom(S @ torch.tensor(core).double(), S)[2].item() == fails


def released(A, S, damping):
    """U and λ̂ as in the authors' released code: ĈL⁻¹, and a large shift, of SᵀĈ alone."""
    C = A @ S + damping * S
    W = S.mT @ C
    shift = torch.linalg.eigvalsh(W)[0, 0].abs() + damping
    L = torch.linalg.cholesky(W + shift * torch.eye(W.shape[-1], dtype=W.dtype))
    U, sigma, _ = torch.linalg.svd(C @ torch.linalg.inv(L), full_matrices=False)
    return U, (sigma.square() - shift).clamp(min=0)


@pytest.mark.parametrize("d, r, κ, seen, by_theirs", (
    (144, 50, 1000.0, (0.9999, 1.0001), (50, 150)), (576, 10, 10.0, (0.93, 0.96), (0, 0)),
    (576, 10, 100.0, (0.994, 0.996), (0.25, 0.45))))
def test_nysact_released(d, r, κ, seen, by_theirs):
    """The shares of an outlier that (5) and the released arithmetic see."""
    shares = []
    for seed in range(25):
        S = drawn(1, d, r, "gaussian", seed)
        A, *_ = outlier(d, κ, 0.01, S)
        shares.append([λ.max() / κ for λ in (nysact.nystrom(A @ S, S)[1], released(A, S, 1.0)[1])])
    for share, (least, most) in zip(torch.tensor(shares).median(0).values, (seen, by_theirs)):
        assert least <= share <= most


@kinds
@pytest.mark.parametrize("r, target", ((5, 2.2), (10, 1.5), (50, 1.1)))
def test_nysact_condition_number(r, target, kind):
    """What (Â + ρI)⁻¹ is for: the condition number of (Â + ρI)⁻¹(A + ρI); d = 200."""
    ρ, d, eigenvalues = 1.0, 200, torch.linalg.eigvalsh
    X = ((randn(4000, d) * torch.arange(1, d + 1) ** -0.85) @ randn(d, d) + randn(d)).relu()
    A = second_moment(X)
    A = A * 10.3 / eigenvalues(A)[-1]                          # decaying, with one outlier
    R = torch.linalg.cholesky(A + ρ * torch.eye(d))            # the same eigenvalues as RᵀP R

    def condition(U, λ):
        values = eigenvalues(R.mT @ torch.linalg.solve(rebuilt(U, λ)[0] + ρ * torch.eye(d), R))
        return values[-1] / values[0], values[0]
    draws = [drawn(1, d, r, kind, seed) for seed in range(9)]
    ours = [condition(*nysact.nystrom(A @ S, S)[:2]) for S in draws]
    theirs = torch.stack([condition(*released(A, S, ρ))[0] for S in draws]).median()
    ours, smallest = (torch.stack(x) for x in zip(*ours))
    assert ours.median() <= target * (1 if kind == "gaussian" else 1.05)
    assert theirs > 1.3 * ours.median()
    close(smallest.clamp(max=1.0), torch.ones(9), 1e-12)


@kinds
def test_nysact_sketches(kind):
    """S: orthonormal; drawn from seed and place alone, its own for each layer and block; none in
    layers with d ≤ r."""
    S = drawn(3, 20, 6, kind, 3)
    close(S.mT @ S, torch.eye(6).expand(3, 6, 6), 1e-14)
    assert not torch.equal(S[0], S[1])
    assert kind == "gaussian" or ((S == 0) | (S == 1)).all()

    def sketches(seed=0, noise=0, later=()):
        net = make_net(seed=noise)
        groups = [{"params": list(part.parameters())} for part in net.children()][::-1]
        optimizer = NysAct(net, params=[group for i, group in enumerate(groups) if i not in later],
                           rank=5, seed=seed, sketch=kind)
        for i in later:
            optimizer.add_param_group(groups[i])
        torch.rand(noise)                            # the global generator plays no part
        return {name: sketch_of(optimizer, p) for name, p in net.named_parameters()
                if p in optimizer.layers}
    first, second = sketches(), sketches(1)
    close(sketches(noise=7), first, 0)
    close(sketches(later=(2, 1)), first, 0)
    assert all(not torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], first["extra.weight"][:, :9])
    for rank in (9, 10, 11):
        layer = nn.Linear(9, 4).double()
        optimizer = NysAct(layer, rank=rank, sketch=kind)
        take_step(layer, optimizer, layer(randn(5, 9)).sum())
        assert ("covariance" in optimizer.state[layer.weight]) == (rank >= 10)


@pytest.mark.parametrize("rank", (4, 1000))
def test_nysact_resumes_the_sketch(rank):
    """A checkpoint's rank, sketch and seed come along; another one's average is refused."""
    data, net, other = make_data(4), make_net(), make_net()
    optimizer = NysAct(net, rank=5, seed=3, sketch="subcolumns", tcov=1, tinv=2)
    usual(net, optimizer, data)
    resumed = NysAct(other, rank=rank, seed=4, tcov=1, tinv=2)
    copy_of_run(net, optimizer, other, resumed)
    for model, opt in ((net, optimizer), (other, resumed)):
        usual(model, opt, data)
    close(snapshot(other, resumed), snapshot(net, optimizer), 0)
    for group in resumed.param_groups:
        group["seed"] = 5
    resumed.load_state_dict(resumed.state_dict())
    raises(FloatingPointError, ["conv1", "another sketch", "same seed"],
           lambda: usual(other, resumed, data))


def hard_inputs(dtype):
    """Zero, constant, rank-deficient, huge inputs, and a constant row whose columns' rounding shows
    in eigenvalues only."""
    live = torch.arange(40) < 20
    yield from (torch.zeros(64, 40), torch.full((64, 40), 3.0), torch.rand(64, 1) * torch.rand(40),
                torch.rand(2, 40), torch.rand(64, 3) @ torch.rand(3, 40) * 1e-12,
                torch.rand(64, 40) * 1e6, torch.rand(64, 40) * live)
    yield from (torch.randn(1, 40).expand(3000, 40).contiguous() for _ in range(20))


@kinds
@pytest.mark.parametrize("damping", (1e-8, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_nysact_hard_inputs(dtype, damping, kind):
    """Tiny damping too: finite, and Â ⪯ A to rounding, with A's trace where its rank is one."""
    for seed, x in enumerate(hard_inputs(dtype)):
        A = second_moment(with_ones(x.double()))
        net = nn.Linear(40, 5).to(dtype)
        optimizer = NysAct(net, lr=1e-6, damping=damping, sketch=kind, seed=seed, tcov=1, tinv=1)
        for _ in range(3):
            y = net(x.to(dtype)) / x.abs().max().clamp(min=1)
            take_step(net, optimizer, F.mse_loss(y, torch.ones_like(y)))
        assert all(p.isfinite().all() for p in net.parameters())
        state = optimizer.state[net.weight]
        λ, largest = state["eigenvalues"].double(), torch.linalg.eigvalsh(A)[-1]
        excess = torch.linalg.eigvalsh(rebuilt(state["U"].double(), λ)[0] - A)[-1]
        if seed < 7:
            assert excess <= 50 * torch.finfo(dtype).eps * largest
        else:
            close(λ.max(), A.trace(), 1e-4)


def test_nysact_overflow():
    net = nn.Sequential(nn.Linear(40, 5))
    optimizer = NysAct(net)
    (net(torch.rand(9, 40) * 1e18) * 1e-30).sum().backward()
    before = parameters(net)
    raises(FloatingPointError, ["layer 0", "scale"], optimizer.step)
    close(parameters(net), before, 0)


class Allocations(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and which operation that was."""

    def __init__(self):
        super().__init__()
        self.largest = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().size() // x.itemsize
                self.largest = max(self.largest, (size, str(func)))
        return out


@pytest.mark.parametrize("build, shape", (
    (lambda: nn.Conv2d(64, 32, 3, padding=1), (4, 64, 8, 8)),
    (lambda: nn.Conv2d(64, 32, 3, padding="same", padding_mode="circular"), (4, 64, 8, 8)),
    (lambda: nn.Conv2d(64, 64, 5, groups=2), (4, 64, 9, 9)), (lambda: nn.Linear(700, 16),
                                                              (24, 700))))
def test_nysact_memory(build, shape):
    """Nothing of the size d×d, nor of a batch's patches, in the passes and the step."""
    layer, x = build(), torch.randn(shape)
    d, net = layer.weight[0].numel(), nn.Sequential(layer)
    optimizer = NysAct(net, tcov=1, tinv=1)
    for _ in range(2):
        optimizer.zero_grad()
        with Allocations() as found:
            y = net(x)
            y.square().mean().backward()
            optimizer.step()
    positions = y[0, 0].numel() if y.dim() == 4 else 1
    patches = len(x) * positions * d * getattr(layer, "groups", 1)
    padded = x[0, 0].numel() if y.dim() == 2 else (x.shape[2] + 4) * (x.shape[3] + 4)
    image = len(x) * x.shape[1] * (padded if x.dim() == 4 else 1)
    G = layer.weight.numel() + layer.bias.numel()
    bound = max(G, 20 * len(x) * positions, y.numel(), image, 30 * d)
    assert found.largest[0] <= bound < d * d and (x.dim() == 2 or bound < patches), found.largest


def test_nysact_state_size():
    """3·10·Σd numbers beside the momentum at most."""
    net = models.CIFAR_MODELS["resnet20"]()
    optimizer = NysAct(net)
    take_step(net, optimizer, net(torch.randn(4, 3, 32, 32)).square().mean())
    assert numbers_of(optimizer) <= 30 * sum(m.weight[0].numel() + 1 for m in net.modules()
                                             if isinstance(m, (nn.Conv2d, nn.Linear)))


# ---- AdaFisher ----

@pytest.mark.parametrize("build, shape", (
    (lambda: nn.BatchNorm1d(6), (9, 6)), (lambda: nn.BatchNorm1d(6), (5, 6, 4)),
    (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 3, 2)), (lambda: nn.BatchNorm3d(6), (3, 6, 2, 2, 2)),
    (lambda: nn.BatchNorm2d(6, eps=0.3), (4, 6, 3, 2)), (lambda: nn.LayerNorm(6), (3, 5, 6)),
    (lambda: nn.LayerNorm(6, eps=0.3), (3, 5, 6)), (lambda: nn.LayerNorm((2, 3)), (5, 2, 3)),
    (lambda: nn.LayerNorm(6, bias=False), (3, 6)), (lambda: nn.GroupNorm(3, 6), (5, 6, 3, 2)),
    (lambda: nn.GroupNorm(3, 6, eps=0.3), (5, 6, 3, 2))))
def test_adafisher_norm_layers(build, shape):
    """(2) F̃_ν and F̃_b against Proposition 3.1's matrices, h from the layer without affine."""
    layer, x = build().double(), randn(*shape) * 3 + 1
    nn.init.zeros_(layer.weight)                # z = ν ⊙ h + b says nothing about h at ν = 0
    bare = copy.deepcopy(layer)
    nn.init.ones_(bare.weight)
    h = bare(x).detach()                        # b is 0 at first
    optimizer, s = METHODS["adafisher"](layer), randn(*shape)
    moved = take_step(layer, optimizer, (layer(x) * s).sum())
    last = isinstance(layer, nn.LayerNorm)
    h, s = (y.reshape(-1, 6) if last else y.movedim(1, -1).reshape(-1, 6) for y in (h, s))
    H, S = h.T @ h / len(h), s.T @ s
    exact = torch.einsum("xc,xd->cd", h, h) / len(h) * S                    # Hadamard
    H, S = H.diagonal(), S.diagonal()
    close(exact.diagonal(), H * S, 1e-12)
    fisher = {"weight": min_max(H) * min_max(S) + 0.3, "bias": min_max(S) + 0.3}
    # of BatchNorm float64 leaves few digits of H − 1 = −ε/(σ² + ε), from which H′ comes
    few = isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    for name, p in layer.named_parameters():
        close(moved[name], p.grad / fisher[name].view_as(p), 1e-7 if few else 1e-12)


def test_adafisher_batch_norm_finding():
    """E[h²] = σ²/(σ² + ε), in float32: what is stored keeps the digits that 1 − ε/σ² loses."""
    x = torch.randn(64, 5) * torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0]) + 5
    layer = nn.BatchNorm1d(5)
    optimizer = AdaFisher(layer, averaging="printed")
    take_step(layer, optimizer, layer(x).square().sum())
    variance = x.double().var(0, correction=0)
    H = optimizer.state[layer.weight]["H"][0].double()
    close(H * (variance + 1e-5) / -1e-5, torch.ones(5), 1e-5)


def test_adafisher_min_max():
    """(4): constants up to rounding; invariance to shift, scale; a dead layer's F̃ = λ."""
    v = randn(40).exp()
    close(adafisher.min_max(v), min_max(v), 1e-15)
    close(adafisher.min_max(v * 2.0 ** 30), adafisher.min_max(v), 0)
    close(adafisher.min_max(v * 1e-9 - 3e-9), min_max(v), 1e-13)
    for dtype, value in itertools.product((torch.float64, torch.float32), (0.0, 1.0, -0.3, 1e-30)):
        flat = torch.full((9,), value, dtype=dtype)
        flat[::2] *= 1 + torch.finfo(dtype).eps
        close(adafisher.min_max(flat), torch.zeros(9), 0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    net[0].bias.data.fill_(-100.0)                                          # all of ReLU is dead
    optimizer = METHODS["adafisher"](net, lr=0.1, damping=0.5)
    moved = take_step(net, optimizer, net(randn(6, 4)).sum())
    assert not moved["0.weight"].any()
    close(moved["2.bias"], 0.1 / 0.5 * net[2].bias.grad, 1e-14)


def kantorovich(r):
    """The least cosine between v and D v for a positive diagonal D with largest/smallest = r."""
    return 2 * r ** 0.5 / (1 + r)


def test_adafisher_as_released_is_momentum_sgd():
    """As released on a BatchNorm network: F̃'s extreme ratio bounds cosine(update, m̂): 0.9965."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True),
        nn.Flatten(), nn.Linear(8 * 64, 10)).double()
    cosines, limits = {}, []
    for averaging in ("released", "printed"):
        model = copy.deepcopy(net)
        optimizer, cosines[averaging] = AdaFisher(model, tcov=1, averaging=averaging), []
        low, high, limits = 1.0, 1.0, []
        for _ in range(8):
            low, high = 0.08 * low, 0.08 * high + 0.008                     # of H and of S
            limits.append((1e-3 + high ** 2) / (1e-3 + low ** 2))
            moved = take_step(model, optimizer, loss_of(model, randn(16, 3, 8, 8) + 0.5,
                                                   torch.randint(10, (16,))))
            update = torch.cat([each.flatten() for each in moved.values()])
            moment = torch.cat([optimizer.state[p]["momentum_buffer"].flatten()
                                for p in model.parameters()])
            ratio = (moment / update)[update != 0].abs()
            cosines[averaging].append(F.cosine_similarity(update, moment, dim=0).item())
            if averaging == "released":
                assert ratio.max() / ratio.min() <= limits[-1] * (1 + 1e-8)
                assert cosines[averaging][-1] >= kantorovich(limits[-1]) - 1e-12
    close([kantorovich(limits[0]), kantorovich(limits[2]), kantorovich(1 + 1e3 / 115 ** 2)],
          [0.9965, 0.9992, 0.9993], 6e-5)
    assert max(cosines["printed"]) < 0.9


@pytest.mark.parametrize("Optimizer", (AdaFisher, AdaFisherW))
@pytest.mark.parametrize("build, plain, said", (
    (make_net, ("encoder.self_attn", "extra"), (
        "block.norm1: 8×2, per channel", "head: 5×9, outer product")),
    (lambda: models.VisionTransformer(6, 2, 24, 1, 3, 5, 3).double(), ("cls_token", "pos_embed"),
     ("plain step: cls_token",))))
def test_adafisher_without_a_layer(Optimizer, build, plain, said):
    """F̃ = 1 where no layer is: class tokens, positions, q, k and v of nn.MultiheadAttention."""
    net = build()
    optimizer = Optimizer(net, lr=1e-3, averaging="printed")
    moved = take_step(net, optimizer, loss_of(net, *make_data(1)[0]))
    for name, grad in gradients(net).items():
        ratio = (moved[name] / (1e-3 * grad))[grad.abs() > 1e-9]
        assert (ratio - 1).abs().max() < 1e-5 if name.startswith(plain) else \
            ratio.min() > 0.99 / 1.001 and ratio.max() > 100, name
    for words in said:
        assert words in str(optimizer), str(optimizer)


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.rare = nn.Embedding(7, 4), nn.Embedding(7, 4, sparse=True)
        self.late, self.head = nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, ids, late):
        h = self.words(ids) + self.rare(ids)
        return self.head(self.late(h) if late else h)


def test_adafisher_late_layer():
    """A layer that runs late has F̃ = 1 until its statistics come; sparse gradients are taken."""
    net, ids = Late().double(), torch.arange(6)
    optimizer = AdaFisher(net, tcov=3, lr=0.01, beta=0.0)
    for i in range(5):
        moved = take_step(net, optimizer, F.cross_entropy(net(ids, i > 0), ids))
        for name in moved:
            assert moved[name].any() != (name.startswith("late") and i == 0), (name, i)
        if i > 0:
            F̃ = 0.01 * net.late.weight.grad / moved["late.weight"]
            assert ((F̃ - 1).abs().max() < 1e-10) == (i < 3), i


class Permuted(nn.LayerNorm):
    """A LayerNorm over the channels of images, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SyncBatchNorm(torch.autograd.Function):
    """Of the name that torch's has, which runs on several GPUs only."""

    @staticmethod
    def forward(ctx, *given):
        with torch.enable_grad():
            ctx.given = [x.detach().requires_grad_() for x in given]
            ctx.out = F.batch_norm(ctx.given[0], None, None, *ctx.given[1:], training=True)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, grad):
        return torch.autograd.grad(ctx.out, ctx.given, grad)


class Synchronised(nn.SyncBatchNorm):
    def forward(self, x):
        return SyncBatchNorm.apply(x, self.weight, self.bias)


@pytest.mark.parametrize("norm, same, turn", (
    (Permuted, nn.LayerNorm, (0, 2, 3, 1)), (Synchronised, nn.BatchNorm2d, (0, 1, 2, 3))))
def test_adafisher_norm_seen_by_use(norm, same, turn):
    """What a norm's forward really normalises, also where another function does it."""
    x, s = randn(4, 6, 3, 2) * 3 + 1, randn(4, 6, 3, 2)
    steps = []
    for layer, turn in ((norm(6), (0, 1, 2, 3)), (same(6), turn)):
        optimizer = METHODS["adafisher"](layer.double())
        steps.append(take_step(layer, optimizer, (layer(x.permute(turn)) * s.permute(turn)).sum()))
        assert "preconditioned: 1 weights, 100.0%" in str(optimizer)
    close(*steps, 1e-12)


@pytest.mark.parametrize("schedule", (
    lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3)))
def test_adafisher_cycled_momentum(schedule):
    """A schedule that cycles "momentum" cycles β."""
    ends = []
    for by_schedule in (True, False):
        net, other = make_net(), torch.optim.SGD([nn.Parameter(randn(1))], momentum=0.5)
        optimizer = AdaFisher(net, damping=0.1)
        follows = schedule(optimizer if by_schedule else other)
        for batch in make_data(6):
            if not by_schedule:
                now = other.param_groups[0]
                optimizer.param_groups[0].update(lr=now["lr"], beta=now["momentum"])
                other.step()
            usual(net, optimizer, [batch])
            follows.step()
        ends.append(parameters(net))
    close(*ends, 0)


def test_adafisher_checkpoints():
    """One of the old layout is refused; a fresh state, as torch.distributed saves it, is whole."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    net, fresh = make_net(), make_net()
    optimizer = AdaFisher(net)
    usual(net, optimizer, make_data(1))
    trial = get_optimizer_state_dict(fresh, AdaFisher(fresh))["state"]
    for name, state in get_optimizer_state_dict(net, optimizer)["state"].items():
        assert state.keys() == trial[name].keys(), name
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({key: state[key].flatten() for key in ("S",) if key in state})
    raises(ValueError, ["of layer conv1", "another version"],
           lambda: AdaFisher(fresh).load_state_dict(saved))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
