"""The equations of the five methods against brute force, in float64 unless said otherwise."""
import contextlib
import copy
import functools
import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adafisher
import foof
import kfac
import mac
import models
import nysact
from adafisher import AdaFisher, AdaFisherW
from foof import FOOF
from kfac import KFAC
from mac import MAC
from nysact import NysAct
from testing import (at_most, close, loss_of, make_data, make_net, on_ranks, raises, randn,
                     snapshot, trained, usual)

close_all, skip = close, pytest.skip        # names that other test files still import


def run_tests(tests, words=()):
    sys.exit(pytest.main([tests["__file__"], *(["-k", " or ".join(words)] if words else [])]))


# ---------------------------------------------------------------------------------------------
# MAC: the mathematics
# ---------------------------------------------------------------------------------------------

def random_rows(count):
    """Matrices X of all shapes, as after a ReLU (mean far from zero) and Gaussian."""
    for i in range(count):
        m, n = (int(k) for k in torch.randint(2, 40, (2,)))
        X = randn(m, n) @ randn(n, n) / n ** 0.5 + randn(n)
        yield X.relu() + 0.01 if i % 2 else X


def norm2(M):
    return torch.linalg.matrix_norm(M, 2)


def test_mac_proposition_4_1():
    """The four parts of the proposition, on matrices of rows; bounds count by what exceeds them."""
    torch.manual_seed(0)
    A_got, A_want, eigen, bound, sines, angles = [], [], [], [], [], []
    for X in random_rows(100):
        m, n = X.shape
        mean = X.mean(0)
        A, Σ, μ = X.T @ X / m, (X - mean).T @ (X - mean) / m, mean @ mean
        A_got.append((A / μ).flatten())
        A_want.append(((torch.outer(mean, mean) + Σ) / μ).flatten())
        λ, v = torch.linalg.eigh(A)
        eigen.append(torch.stack([μ, λ[-1], λ[-2]]) / λ[-1])
        bound.append(torch.stack([λ[-1], μ + norm2(Σ), norm2(Σ)]) / λ[-1])
        Q = torch.eye(n, dtype=X.dtype) - torch.outer(mean, mean) / μ
        sine, cosine = (Q @ v[:, -1]).norm(), (mean @ v[:, -1]).abs() / μ.sqrt()
        sines.append(torch.stack([sine, (Q @ Σ @ v[:, -1]).norm() / λ[-1], norm2(Σ) / μ]))
        b, s = (Q @ Σ @ mean).norm() / μ.sqrt(), norm2(Q @ Σ @ Q)
        if λ[-1] > s * (1 + 1e-6):
            angles.append(torch.stack([sine / cosine, b / (λ[-1] - s)]))
    close(torch.cat(A_got), torch.cat(A_want), 1e-12)
    at_most(torch.stack(eigen), torch.stack(bound))
    sine, formula, limit = torch.stack(sines).T
    close(sine, formula, 1e-9)
    at_most(sine / limit, 1.0)
    tangent, limit = torch.stack(angles).T
    at_most(tangent / limit, 1.0, 1e-9)
    X = randn(4000, 3)
    X = (X - X.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(X.T.cov(correction=0)).T)
    mean = torch.tensor([0.3, 0.1, 0.2], dtype=X.dtype)
    v = torch.linalg.eigh((X + mean).T @ (X + mean) / len(X))[1][:, -1]
    close((v @ mean).abs(), mean.norm(), 1e-9)


def dense(grad, bias_grad, A, damping):
    """ρ G (A + ρI)⁻¹ with G = [W | b] and A as plain matrices; (new grad, new bias_grad)."""
    G = grad.reshape(len(grad), -1)
    if bias_grad is not None:
        G = torch.cat([G, bias_grad[:, None]], 1)
    G = damping * G @ torch.linalg.inv(A + damping * torch.eye(len(A), dtype=A.dtype))
    d = grad[0].numel()
    return G[:, :d].reshape(grad.shape), None if bias_grad is None else G[:, d]


def test_mac_sherman_morrison():
    """(3) and (5) against dense inverses, in blocks, for gradients of any shape, with bias."""
    torch.manual_seed(0)
    for shape, blocks, bias in (((6, 5), 1, True), ((6, 5), 1, False), ((9, 4), 3, True),
                                ((8, 2, 3, 4), 1, True), ((8, 2, 3, 4), 4, True),
                                ((8, 2, 3, 4), 2, False), ((1, 1), 1, False)):
        got, want = {}, {}
        for damping in (1e-3, 1.0, 30.0):
            G, g = randn(*shape), randn(shape[0]) if bias else None
            mean, rows = randn(blocks, G[0].numel() + bias), randn(blocks, 50, G[0].numel() + bias)
            A = rows.mT @ rows / 50
            L, info = mac.damped_cholesky(A, damping)
            assert not info.any()
            outer = mean[:, :, None] * mean[:, None]
            for equation, new, matrices in (
                    ("(3)", mac.precondition(G, g, mean, damping), outer),
                    ("(5)", mac.precondition_first(G, g, L, damping), A)):
                parts = [None] * blocks if g is None else g.chunk(blocks)
                old = [dense(*part, damping) for part in zip(G.chunk(blocks), parts, matrices)]
                for i, what in enumerate(("weight", "bias")[:1 + bias]):
                    got[equation, damping, what] = new[i]
                    want[equation, damping, what] = torch.cat([parts[i] for parts in old])
        close(got, want, 1e-11)
    like = randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    new = mac.precondition(like, None, randn(1, 36), 1.0)[0]
    assert new.stride() == like.stride(), "the memory layout is the gradient's"


def test_mac_multiplier():
    """ρ(āāᵀ + ρI)⁻¹: ρ/(ρ + ‖ā‖²) along ā and 1 elsewhere; large ρ is SGD, small ρ projects."""
    torch.manual_seed(0)
    a = randn(1, 7)
    eigenvalues = torch.linalg.eigvalsh(mac.precondition(torch.eye(7).double(), None, a, 0.5)[0])
    want = torch.ones(7, dtype=torch.float64)
    want[0] = 0.5 / (0.5 + a.square().sum())
    close(eigenvalues, want, 1e-14)
    G = randn(3, 7)
    close(mac.precondition(G, None, a, 1e16)[0], G, 1e-14)
    small = mac.precondition(G, None, a, 1e-14)[0]
    close(1 + small @ a[0], torch.ones(3), 1e-12)


def test_mac_running_mean():
    """(4) against m ← βm + (1 − β)x, divided by 1 − βᵏ, in numpy."""
    generator = np.random.default_rng(0)
    for β in (0.0, 0.5, 0.95, 0.999):
        m, mean, got, want = np.zeros(4), None, [], []
        for k in range(1, 31):
            x = generator.standard_normal(4)
            m = β * m + (1 - β) * x
            mean, = mac.running_mean([torch.zeros(4).double() if mean is None else mean],
                                     [torch.tensor(x)], k, β)
            got.append(mean.clone())
            want.append(torch.tensor(m / (1 - β ** k)))
        close(torch.stack(got), torch.stack(want), 1e-12)


def grams(net, X, slope, damping):
    """J Jᵀ, J (C⁻¹ ⊗ I) Jᵀ with autograd's Jacobian J and C = x̄x̄ᵀ + ρI, XC⁻¹Xᵀ and S."""
    W = net[0].weight
    C = torch.outer(X.mean(0), X.mean(0)) + damping * torch.eye(X.shape[1], dtype=X.dtype)
    J = torch.stack([torch.autograd.grad(net(x).sum(), W)[0] for x in X])           # (n, m, d)
    slopes = slope(X @ W.detach().T)
    G_mac = torch.einsum("imd,de,jme->ij", J, torch.linalg.inv(C), J)
    return (J.flatten(1) @ J.flatten(1).T, G_mac, X @ torch.linalg.inv(C) @ X.T,
            slopes @ slopes.T / len(W))


def test_mac_convergence():
    """G_MAC = (X C⁻¹ Xᵀ) ∘ S, its bounds, and that MAC contracts the residual by I − ηG_MAC.

    The net is f(x) = Σ_r a_r φ(w_rᵀx)/√m, a_r = ±1, of which W is trained. With ReLU the steps are
    linear up to neurons that switch, with tanh up to second order.
    """
    n, d, m, ρ = 20, 30, 512, 0.1
    eigenvalues = torch.linalg.eigvalsh
    for act, slope, tol in ((nn.ReLU(), lambda z: (z > 0).double(), 2e-2),
                            (nn.Tanh(), lambda z: 1 - z.tanh() ** 2, 1e-7)):
        torch.manual_seed(0)
        X, y = F.normalize(randn(n, d).abs()), randn(n)
        net = nn.Sequential(nn.Linear(d, m, bias=False), act, nn.Linear(m, 1, bias=False)).double()
        net[0].weight.data.normal_()
        net[2].weight.data = (torch.rand(1, m, dtype=X.dtype) - 0.5).sign() / m ** 0.5
        net[2].weight.requires_grad_(False)
        G, G_mac, K, S = grams(net, X, slope, ρ)
        λ, name = eigenvalues(G_mac), type(act).__name__
        close(G_mac, K * S, 1e-12)
        at_most(torch.zeros(n), eigenvalues(G_mac - G / (ρ + X.mean(0).square().sum())))
        at_most(torch.zeros(n), eigenvalues(G / ρ - G_mac))
        at_most(K.diagonal().min() * eigenvalues(S)[0], λ[0])
        plain = eigenvalues(G)
        assert λ[-1] / λ[0] < plain[-1] / plain[0] / 2

        η = 1 / λ[-1].item()         # of the plain inverse; MAC applies ρ times it
        optimizer = MAC(net, lr=η / ρ, momentum=0.0, damping=ρ, tcov=1, tinv=1,
                        input_covariance=False)
        for step in range(150):
            optimizer.zero_grad()
            r = net(X)[:, 0] - y
            (r @ r / 2).backward()
            before = grams(net, X, slope, ρ)[1] if step == 149 else None
            optimizer.step()
        r, after = r.detach(), (net(X)[:, 0] - y).detach()
        close(after, r - η * before @ r, tol)
        close(after.norm() / r.norm(), 1 - η * eigenvalues(before)[0], 1e-2)


# ---------------------------------------------------------------------------------------------
# MAC: convolutions
# ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def chunk_of(numbers):
    """mac.CHUNK, so small that batches are taken in pieces."""
    before, mac.CHUNK = mac.CHUNK, numbers
    try:
        yield
    finally:
        mac.CHUNK = before


def explicit_patches(x, conv):
    """The rows that each group of a convolution sees, by loops: (groups, rows, C/groups·kh·kw)."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    if conv.padding == "same":           # what is odd goes to the end
        totals = [dil * (k - 1) for dil, k in zip(conv.dilation, conv.kernel_size)]
        before_after = [(total // 2, total - total // 2) for total in totals]
    else:
        before_after = [(p, p) for p in ((0, 0) if conv.padding == "valid" else conv.padding)]
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge",
            "circular": "wrap"}[conv.padding_mode]
    image = np.pad(x.detach().numpy(), [(0, 0), (0, 0), *before_after], mode=mode)
    height = (image.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (image.shape[3] - dw * (kw - 1) - 1) // sw + 1
    size, groups = conv.in_channels // conv.groups, []
    for g in range(conv.groups):
        rows = []
        for b, i, j in itertools.product(range(len(image)), range(height), range(width)):
            rows.append([image[b, c, i * sh + dh * p, j * sw + dw * q]
                         for c in range(g * size, g * size + size)
                         for p in range(kh) for q in range(kw)])
        groups.append(rows)
    return torch.tensor(np.array(groups))


GEOMETRIES = [    # C, out, (H, W), arguments of nn.Conv2d
    (3, 4, (5, 6), dict(kernel_size=1)),
    (3, 4, (5, 6), dict(kernel_size=1, stride=2)),
    (3, 4, (5, 6), dict(kernel_size=3)),
    (3, 4, (5, 6), dict(kernel_size=3, padding=1)),
    (2, 3, (7, 5), dict(kernel_size=5, padding=2, stride=2)),
    (2, 3, (6, 7), dict(kernel_size=2)),
    (2, 3, (6, 7), dict(kernel_size=4, stride=3, padding=1)),
    (2, 3, (8, 8), dict(kernel_size=4, stride=4)),
    (2, 3, (7, 7), dict(kernel_size=2, stride=3)),              # pixels that no tap meets
    (3, 2, (6, 8), dict(kernel_size=(2, 3), stride=(2, 1), padding=(1, 0))),
    (3, 2, (6, 5), dict(kernel_size=(3, 1), stride=(1, 2), padding=(0, 3))),
    (3, 2, (4, 9), dict(kernel_size=(1, 5), padding=(0, 2))),
    (2, 3, (5, 6), dict(kernel_size=3, padding="same")),
    (2, 3, (5, 6), dict(kernel_size=(2, 4), padding="same")),
    (2, 3, (7, 6), dict(kernel_size=(4, 3), padding="same", dilation=(1, 2))),
    (2, 3, (6, 6), dict(kernel_size=2, padding="same", dilation=3)),
    (2, 3, (5, 6), dict(kernel_size=(3, 4), padding="valid", stride=2)),
    (2, 3, (9, 8), dict(kernel_size=3, dilation=2)),
    (2, 3, (9, 8), dict(kernel_size=(3, 2), dilation=(2, 3), stride=2, padding=(2, 1))),
    (2, 3, (6, 5), dict(kernel_size=3, padding=(2, 1), padding_mode="reflect")),
    (2, 3, (6, 5), dict(kernel_size=(4, 2), padding="same", padding_mode="reflect")),
    (2, 3, (6, 5), dict(kernel_size=3, padding=2, stride=2, padding_mode="replicate")),
    (2, 3, (6, 5), dict(kernel_size=3, padding=(1, 2), dilation=2, padding_mode="circular")),
    (4, 6, (5, 6), dict(kernel_size=3, padding=1, groups=2)),
    (6, 3, (5, 4), dict(kernel_size=(2, 3), padding=1, groups=3, stride=2)),
    (4, 4, (5, 6), dict(kernel_size=3, padding=1, groups=4)),                   # depthwise
    (3, 6, (5, 6), dict(kernel_size=5, padding="same", groups=3, padding_mode="circular")),
    (4, 8, (6, 5), dict(kernel_size=2, groups=4, stride=(1, 2), dilation=(2, 1))),
]


def test_mac_conv_geometries():
    """Σ a and Σ a aᵀ over patches against explicit ones; and these, times the filters, convolve."""
    torch.manual_seed(0)
    for C, out, size, options in GEOMETRIES:
        conv, x = nn.Conv2d(C, out, **options).double(), randn(2, C, *size)
        rows = explicit_patches(x, conv)                                    # (groups, R, d)
        ones = F.pad(rows, (0, 1), value=1.0)
        filters = conv.weight.view(conv.groups, -1, rows.shape[2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # 'same' with an even kernel copies the input
            y = conv(x)
        got = {"convolution": y, "sum": mac.patch_sum(x.sum(0), conv),
               "gram": mac.patch_gram(x, conv)}
        want = {"convolution": (filters @ rows.mT).view(out, 2, *y.shape[2:]).transpose(0, 1)
                + conv.bias[:, None, None], "sum": rows.sum(1), "gram": ones.mT @ ones}
        with chunk_of(1):
            got["gram, one image at a time"] = mac.patch_gram(x, conv)
        want["gram, one image at a time"] = want["gram"]
        words = ", ".join(f"{k} {v}" for k, v in options.items()).replace("kernel_size", "k")
        close(got, want, 1e-12)


def test_mac_conv_random_geometries():
    """Two hundred drawn geometries, the oracle being autograd: for loss = Σ output, G = 1 Σaᵀ."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    got, want, grams, patches = {}, {}, {}, {}

    def draw(low, high):
        return tuple(int(k) for k in generator.integers(low, high, 2))
    for i in range(200):
        groups = int(generator.integers(1, 4))
        C, out = groups * int(generator.integers(1, 3)), groups * int(generator.integers(1, 3))
        mode = str(generator.choice(["zeros", "zeros", "reflect", "replicate", "circular"]))
        kernel, dilation = draw(1, 6), draw(1, 3)
        stride, padding = draw(1, 4), draw(0, 3)
        if i % 4 == 0:
            stride, padding = 1, str(generator.choice(["same", "valid"]))
        conv = nn.Conv2d(C, out, kernel, stride, padding, dilation, groups, bool(i % 2), mode)
        x = randn(2, C, *draw(9, 13))
        conv.double()(x).sum().backward()
        got[i] = mac.patch_sum(x.sum(0), conv)
        want[i] = conv.weight.grad.view(groups, out // groups, -1).mean(1)
        if i % 10 == 0:
            rows = F.pad(explicit_patches(x, conv), (0, 1), value=1.0)
            grams[i], patches[i] = mac.patch_gram(x, conv), rows.mT @ rows
    close(got, want, 1e-12)
    close(grams, patches, 1e-12)


def means_by_autograd(weight, bias, blocks, rows, bias_rows=slice(None)):
    """The mean input of each block, [a; 1]: for loss = Σ output, G = 1 Σaᵀ and rows of G agree."""
    G = weight.grad.reshape(blocks, -1, weight[0].numel()).mean(1)
    if bias is not None:
        G = torch.cat([G, bias.grad[bias_rows].view(blocks, -1).mean(1, keepdim=True)], 1)
    return G / rows


def one_step(model, call, **options):
    """MAC after one step of size 0 with loss = Σ call(); p.grad stays as autograd left it."""
    optimizer = MAC(model, **dict(lr=0.0, tcov=1, tinv=1, input_covariance=False) | options)
    optimizer.zero_grad()
    call().sum().backward()
    optimizer.step()
    return optimizer


def test_mac_means():
    """(1) in the optimizer's state: any leading dimensions, layout and groups, by autograd."""
    torch.manual_seed(0)
    for name, layer, x in (
            ("Linear, (B, d)", nn.Linear(4, 3), randn(5, 4)),
            ("Linear without bias", nn.Linear(4, 3, bias=False), randn(5, 4)),
            ("Linear, (d,)", nn.Linear(4, 3), randn(4)),
            ("Linear, (B, N, d)", nn.Linear(4, 3), randn(5, 6, 4)),
            ("Linear, (B, H, W, d)", nn.Linear(4, 3), randn(5, 4, 2, 3).permute(0, 2, 3, 1)),
            ("Linear, expanded input", nn.Linear(4, 3), randn(1, 4).expand(5, 4)),
            ("Conv2d", nn.Conv2d(2, 3, 3, padding=1), randn(2, 2, 5, 4)),
            ("Conv2d, one image (C, H, W)", nn.Conv2d(2, 3, 3, padding=1), randn(2, 5, 4)),
            ("Conv2d, channels_last", nn.Conv2d(2, 3, 3, 2).to(memory_format=torch.channels_last),
             randn(2, 2, 5, 5).to(memory_format=torch.channels_last)),
            ("Conv2d, groups", nn.Conv2d(4, 6, (1, 2), groups=2, bias=False), randn(2, 4, 3, 4)),
            ("Conv2d, depthwise", nn.Conv2d(4, 4, 3, groups=4, padding="same"), randn(2, 4, 3, 4))):
        model = nn.Sequential(layer).double()
        optimizer = one_step(model, lambda: model(x))
        rows = model(x).numel() / len(layer.weight)
        want = means_by_autograd(layer.weight, layer.bias, getattr(layer, "groups", 1), rows)
        close(optimizer.state[layer.weight]["mean"], want, 1e-12)


# ---------------------------------------------------------------------------------------------
# MAC: attention
# ---------------------------------------------------------------------------------------------

def attention_loop(q, k, X, scale, scores_added):
    """Explicit softmax for each sample, head and query: (Σ_queries T, mean row of TX)."""
    B, h, L, S = *q.shape[:3], k.shape[2]
    total, row = torch.zeros(B, h, S, dtype=q.dtype), torch.zeros(X.shape[2], dtype=q.dtype)
    for b, head, i in itertools.product(range(B), range(h), range(L)):
        scores = torch.stack([q[b, head, i] @ k[b, head, j] * scale for j in range(S)])
        weights = (scores + scores_added[b, head, i]).exp()
        weights = weights / weights.sum() if weights.any() else weights
        total[b, head] += weights
        row += weights @ X[b] / (B * h * L)
    return total, row


def test_mac_attention_sum():
    """(6) Tᵀ1 and the mean row of TX against loops over batch, heads, queries, for every mask."""
    torch.manual_seed(0)
    B, h, L, S, d = 4, 2, 3, 5, 3
    q, k, X = randn(B, h, L, d), randn(B, h, S, d), randn(B, S, 6)
    causal = torch.ones(L, S, dtype=torch.bool).tril()
    some, inf = torch.rand(B, 1, L, S) < 0.6, float("inf")
    some[1, 0, 2] = False                                          # may attend to nothing
    windows, bias = randn(2, 1, L, S), randn(h, L, S)              # two windows, two images
    for name, options, added in (
            ("no mask", {}, torch.zeros(())),
            ("causal", dict(causal=True), torch.zeros(L, S).masked_fill(~causal, -inf)),
            ("boolean mask, one query masked", dict(mask=some), torch.where(some, 0.0, -inf)),
            ("boolean mask, the same for all", dict(mask=some[:1, :, :1]),
             torch.where(some[:1, :, :1], 0.0, -inf)),
            ("boolean and causal", dict(mask=some, causal=True),
             torch.where(some & causal, 0.0, -inf)),
            ("mask per head, added", dict(mask=bias[None]), bias),
            ("mask with −∞, added", dict(mask=torch.where(some, 1.5, -inf)),
             torch.where(some, 1.5, -inf)),
            ("relative position bias", dict(bias=bias), bias),
            ("bias and masks of windows", dict(bias=bias, mask=windows),
             windows.repeat(2, 1, 1, 1) + bias)):
        total, row = attention_loop(q, k, X, 0.7, added.double().expand(B, h, L, S))
        for chunk in (mac.CHUNK, 1, 3 * h * L * S):
            with chunk_of(chunk):
                t = mac.attention_sum(q, k, 0.7, **options)
            value = mac.value_sum(X, t)[0] / (B * L)
            want = torch.cat([total.flatten(), row, total.sum().view(1) / (B * h * L)])
            pieces = "" if chunk == 2 ** 24 else f", {max(1, chunk // 30)} at a time"
            close(torch.cat([t.flatten(), value]), want, 1e-12)


def test_mac_attention_gradient():
    """G_V = Σ(∂O)ᵀ(TX) by autograd: the rows that W_V sees are those of TX; O = (TX)W_Vᵀ."""
    torch.manual_seed(0)
    B, N, D, h, d = 2, 5, 6, 2, 3
    X, W, b = randn(B, N, D), randn(2, h * d, D), randn(2, h * d)
    W_V, b_V = randn(h * d, D).requires_grad_(), randn(h * d).requires_grad_()
    q, k, v = (F.linear(X, w, c).view(B, N, h, d).transpose(1, 2)
               for w, c in ((W[0], b[0]), (W[1], b[1]), (W_V, b_V)))
    T = (q @ k.mT / d ** 0.5).softmax(-1)
    O = F.scaled_dot_product_attention(q, k, v)
    dO = randn(*O.shape)
    G_V, g_V = torch.autograd.grad((O * dO).sum(), (W_V, b_V))
    TX = T @ X[:, None]                                                     # (B, h, N, D)
    close(G_V, torch.einsum("bhni,bhnd->hid", dO, TX).flatten(0, 1), 1e-13)
    close(g_V, dO.sum((0, 2)).flatten(), 1e-13)
    mean = mac.value_sum(X, mac.attention_sum(q, k, d ** -0.5))[0] / (B * N)
    close(mean[:-1], TX.mean((0, 1, 2)), 1e-14)
    close(mean[-1], 1.0, 1e-14)
    product_of_means = X.mean(0).T @ T.mean((0, 1)).mean(0)


class FusedAttention(nn.Module):
    """Self-attention as timm has it: fused qkv, norms of q and k, masks as arguments."""

    def __init__(self, D, heads, norm=False, bias=True, is_causal=False, scale=None):
        super().__init__()
        self.num_heads, self.is_causal, self.scale = heads, is_causal, scale
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D)
        self.q_norm = nn.LayerNorm(D // heads) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(D // heads) if norm else nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=None):
        tokens = x.flatten(1, -2)
        q, k, v = self.qkv(x).view(*tokens.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        causal = self.is_causal if is_causal is None else is_causal
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask,
                                             is_causal=causal, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class WindowAttention(nn.Module):
    """Attention in Swin's windows: a bias learned by relative position, shifted windows' masks."""

    def __init__(self, D, window, heads):
        super().__init__()
        self.num_heads, self.scale = heads, (D // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)

    def forward(self, x, mask=None):
        n, N, D = x.shape                                       # images · windows, tokens, D
        q, k, v = self.qkv(x).view(n, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = q * self.scale @ k.mT
        scores = scores + self.relative_position_bias_table[self.relative_position_index] \
            .permute(2, 0, 1)
        if mask is not None:                                    # (windows, N, N)
            scores = scores.view(-1, len(mask), self.num_heads, N, N) + mask[:, None]
            scores = scores.view(n, self.num_heads, N, N)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, N, D))


def set_identity(projection):
    """So that the loss Σ output has ∂loss/∂O = 1, and the rows of G_V are Σ (TX)ᵀ1."""
    with torch.no_grad():
        projection.weight.copy_(torch.eye(len(projection.weight)))


def check_fused(name, module, x, *args, **kwargs):
    """A fused qkv module's three means: of tokens, of tokens, of TX by autograd's G_V."""
    module.double()
    with torch.no_grad():
        for p in module.qkv.parameters():
            p.normal_()
    set_identity(module.proj)
    optimizer = one_step(module, lambda: module(x, *args, **kwargs))
    rows = x.numel() / x.shape[-1]
    want = means_by_autograd(module.qkv.weight, module.qkv.bias, 3, rows)
    mean = F.pad(x.reshape(-1, x.shape[-1]).mean(0), (0, module.qkv.bias is not None), value=1.0)
    want = torch.stack([mean, mean, want[2]])
    close(optimizer.state[module.qkv.weight]["mean"], want, 1e-12)
    out = means_by_autograd(module.proj.weight, module.proj.bias, 1, rows)
    close(optimizer.state[module.proj.weight]["mean"], out, 1e-12)


def test_mac_attention_padding_mask():
    """A mask that is none of the known forms is refused, and not read as something else."""
    net = FusedAttention(4, 2).double()
    optimizer = MAC(net)
    raises(ValueError, ["mask", "3, 4"], lambda: net(
        randn(3, 5, 4), attn_mask=torch.ones(3, 4, dtype=torch.bool)))
    assert optimizer.layers            # whose hook spoke; without the optimizer it would be gone


def test_mac_attention_fused():
    """The modules that timm and this project have, through the optimizer, against autograd."""
    torch.manual_seed(0)
    B, N, D = 3, 4, 6
    x, mask = randn(B, N, D), torch.rand(B, 1, N, N) < 0.6
    mask |= torch.eye(N, dtype=torch.bool)
    check_fused("models.Attention", models.Attention(D, 2), x)
    check_fused("without bias, three heads", FusedAttention(D, 3, bias=False), x)
    check_fused("its own scale", FusedAttention(D, 2, scale=0.1), x)
    check_fused("q_norm and k_norm", FusedAttention(D, 2, norm=True), x)
    check_fused("causal by attribute", FusedAttention(D, 2, is_causal=True), x)
    check_fused("causal by argument", FusedAttention(D, 2), x, is_causal=True)
    check_fused("argument before attribute", FusedAttention(D, 2, is_causal=True), x, None, False)
    check_fused("boolean mask, (B, 1, N, N)", FusedAttention(D, 2), x, mask)
    check_fused("boolean mask, (N, N), keyword", FusedAttention(D, 2), x, attn_mask=mask[0, 0])
    check_fused("added mask, (heads, N, N)", FusedAttention(D, 2), x, randn(2, N, N))
    check_fused("image of tokens, (B, H, W, D)", FusedAttention(D, 2), randn(B, 2, 3, D))
    mask[1, 0, 2] = False
    check_fused("a query that may attend to nothing", FusedAttention(D, 2), x, mask)
    with chunk_of(2 * N * N):
        check_fused("one sample at a time", FusedAttention(D, 2), x, mask)
    x = randn(2 * 3, 4, D)                          # two images of three windows of 2×2
    check_fused("Swin's window", WindowAttention(D, 2, 2), x)
    check_fused("Swin's shifted window", WindowAttention(D, 2, 2), x, randn(3, 4, 4))
    shifted = torch.where(torch.rand(3, 4, 4) < 0.5, 0.0, -100.0).double()
    with chunk_of(4 * 2 * 16):
        check_fused("Swin's, four at a time", WindowAttention(D, 2, 2), x, mask=shifted)


def small_swin():
    """Maps of 12, 6, 3 tokens, windows of 3, shifted in two stages; weights far from uniform T."""
    net = models.SwinTransformer(48, 8, (2, 2, 2), (2, 2, 4), 5).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "attn" in name or "reduction" in name:
                p.normal_(std=2 / p[0].numel() ** 0.5 if "weight" in name else 1.0)
    return net


def rows_in_windows(attn, x, window, shift):
    """The rows TX of window attention on maps x (B, H, W, D): (B·windows, queries, heads, D).

    From the image: a window's tokens lie `shift` further down and right, where the map goes on with
    its other border; two tokens on different sides of a border score 100 less.
    """
    (B, H, W, D), h = x.shape, attn.num_heads
    q, k, _ = F.linear(x, attn.qkv.weight, attn.qkv.bias).detach().unflatten(-1, (3, h, -1)) \
        .permute(3, 4, 0, 1, 2, 5).numpy()                                      # (h, B, H, W, d_h)
    table, x, rows = attn.relative_position_bias_table.detach().numpy(), x.numpy(), []
    places = [(i, j) for i in range(window) for j in range(window)]
    for b, top, left in itertools.product(range(B), range(0, H, window), range(0, W, window)):
        i, j = (np.array(places) + (top + shift, left + shift)).T
        side, (i, j) = 2 * (i >= H) + (j >= W), (i % H, j % W)
        for n, (y, z) in enumerate(places):
            offset = [(y - a + window - 1) * (2 * window - 1) + z - c + window - 1
                      for a, c in places]
            for head in range(h):
                scores = k[head, b, i, j] @ q[head, b, i[n], j[n]] / (D // h) ** 0.5
                weights = np.exp(scores + table[offset, head] - 100 * (side != side[n]))
                rows.append(weights @ x[b, i, j] / weights.sum())
    return torch.from_numpy(np.stack(rows)).view(-1, window ** 2, h, D)


def test_mac_attention_swin():
    """(6) in every block of a Swin: G_V = Σ(∂O)ᵀ(TX) by autograd, ā_V = mean row of those TX."""
    torch.manual_seed(0)
    net, x, y = small_swin(), randn(2, 3, 48, 48), torch.tensor([0, 3])
    maps, heads = {}, {}

    def keep(name, module, args, output):
        if isinstance(module, nn.LayerNorm):
            maps[name] = output.detach()
        else:
            args[0].retain_grad()
            heads[name] = args[0]                                   # the heads' outputs O
    blocks = {name: m for name, m in net.named_modules() if isinstance(m, models.SwinBlock)}
    for name, block in blocks.items():
        for module in (block.norm1, block.attn.proj):
            module.register_forward_hook(functools.partial(keep, name))
    optimizer = one_step(net, lambda: F.cross_entropy(net(x), y))
    for i, (name, block) in enumerate(blocks.items()):
        side, attn = (12, 6, 3)[i // 2], block.attn
        assert maps[name].shape[1:3] == (side, side)
        TX = rows_in_windows(attn, maps[name], 3, (0, 1, 0, 1, 0, 0)[i])
        dO = heads[name].grad.unflatten(-1, (attn.num_heads, -1))   # (B·windows, 9, h, d_h)
        title = f"stage {i // 2}, {'shifted' if block.shift else 'not shifted'}"
        close(attn.qkv.weight.grad.chunk(3)[2], torch.einsum("nqhe,nqhd->hed", dO, TX).flatten(0, 1),
              1e-12)
        tokens = maps[name].mean((0, 1, 2))
        want = torch.stack([tokens, tokens, TX.mean((0, 1, 2))])
        close(optimizer.state[attn.qkv.weight]["mean"], F.pad(want, (0, 1), value=1.0), 1e-12)


def test_mac_vision_transformers():
    """One step of 1 on Swin and DeiT: (3) by thirds of each qkv, the raw gradient for the rest."""
    torch.manual_seed(0)
    for title, net, size in (("Swin", small_swin(), 48), (
            "DeiT", models.VisionTransformer(24, 8, 12, 2, 3, 5, 3).double(), 24)):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = MAC(net, lr=1.0, momentum=0.0, damping=0.5, tcov=1, tinv=1)
        F.cross_entropy(net(randn(2, 3, size, size)), torch.tensor([1, 4])).backward()
        optimizer.step()
        step = {name: before[name] - p for name, p in net.named_parameters()}
        still = [name for name, value in step.items() if not value.any()]
        close(len(still), 0, 0)
        plain, qkv = {}, {}
        for name, p in net.named_parameters():
            layer = net.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                plain[name] = p.grad
            elif name.endswith("qkv.weight"):
                means = optimizer.state[p]["mean"]
                parts = [dense(G, g, m.outer(m), 0.5) for G, g, m in
                         zip(p.grad.chunk(3), layer.bias.grad.chunk(3), means)]
                qkv[name] = torch.cat([G for G, _ in parts])
                qkv[name.replace("weight", "bias")] = torch.cat([g for _, g in parts])
        assert any("attn" in name for name in plain) == (title == "Swin"), "the bias tables"
        close({name: step[name] for name in plain}, plain, 1e-10)
        close({name: step[name] for name in qkv}, qkv, 1e-10)


def test_mac_attention_gpt():
    """(6) ā_V of each block of the causal GPT, from its weights, by loops over all that it sees."""
    torch.manual_seed(0)
    B, N, D, h = 3, 5, 6, 2
    net, inputs = models.GPT(7, N, layers=2, heads=h, width=D).double(), []
    for block in net.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        nn.init.normal_(block.attn.qkv.weight)
        nn.init.normal_(block.attn.qkv.bias)
    tokens = torch.randint(7, (B, N))
    optimizer = one_step(net, lambda: net(tokens))
    later = torch.zeros(N, N, dtype=torch.float64).masked_fill(torch.ones(N, N).triu(1) > 0,
                                                               -float("inf"))
    for i, (block, X) in enumerate(zip(net.blocks, inputs)):
        weight, bias = (p.detach() for p in (block.attn.qkv.weight, block.attn.qkv.bias))
        q, k, _ = F.linear(X, weight, bias).view(B, N, 3, h, -1).permute(2, 0, 3, 1, 4)
        _, row = attention_loop(q, k, X, (D // h) ** -0.5, later.expand(B, h, N, N))
        _, open_row = attention_loop(q, k, X, (D // h) ** -0.5, torch.zeros(B, h, N, N))
        mean, one = X.mean((0, 1)), torch.ones(1, dtype=torch.float64)
        want = torch.stack([torch.cat([y, one]) for y in (mean, mean, row)])
        close(optimizer.state[block.attn.qkv.weight]["mean"], want, 1e-12)
        assert (row - open_row).norm() > 0.1 * row.norm()      # the mask matters here
    assert net.wte.weight not in optimizer.layers and "plain step: wte" in repr(optimizer)


def check_multihead(name, options, inputs, **call):
    """nn.MultiheadAttention's means of query, key, attended value, and concat_h(V_hᵀt̄_h)."""
    attention = nn.MultiheadAttention(6, 2, **options).double()
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_()
    set_identity(attention.out_proj)
    optimizer = one_step(attention, lambda: attention(*inputs, **call)[0])
    query, key = ((*inputs, *call.values())[i] for i in (0, 1))
    rows = query.numel() / 6
    bias = attention.in_proj_bias
    means = [F.pad(y.reshape(-1, y.shape[-1]).mean(0), (0, bias is not None), value=1.0)[None]
             for y in (query, key)]
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if attention.in_proj_weight is not None:
        weights = [attention.in_proj_weight]
        value = means_by_autograd(attention.in_proj_weight, bias, 3, rows)[2:]
        want = [torch.cat([*means, value])]
    else:
        weights = [getattr(attention, name) for name in names]
        want = [*means, means_by_autograd(weights[2], bias, 1, rows, slice(12, 18))]
    want.append(means_by_autograd(attention.out_proj.weight, attention.out_proj.bias, 1, rows))
    weights.append(attention.out_proj.weight)
    close({i: optimizer.state[w]["mean"] for i, w in enumerate(weights)}, dict(enumerate(want)),
          1e-12)


def test_mac_multihead_attention():
    torch.manual_seed(0)
    B, L, S = 3, 4, 5
    x, query, memory = randn(B, L, 6), randn(B, L, 6), randn(B, S, 6)
    first = dict(batch_first=True)
    own, cross = (x, x, x), (query, memory, memory)
    check_multihead("self-attention", first, own)
    check_multihead("weights not needed", first, own, need_weights=False)
    check_multihead("sequence first", {}, own)
    check_multihead("one sample", {}, (x[0], x[0], x[0]))
    check_multihead("no bias", dict(bias=False) | first, own)
    check_multihead("cross-attention", first, cross)
    check_multihead("query, key, value as keywords", first, (),
                    query=query, key=memory, value=memory)
    widths = dict(kdim=3, vdim=7) | first
    wide = (query, randn(B, S, 3), randn(B, S, 7))
    check_multihead("kdim, vdim", widths, wide)
    check_multihead("kdim, vdim, no bias", widths | dict(bias=False), wide)
    check_multihead("kdim, sequence first, keyword value", dict(kdim=3),
                    (randn(L, B, 6), randn(S, B, 3)), value=randn(S, B, 6))
    added = dict(add_bias_kv=True, add_zero_attn=True)
    check_multihead("add_bias_kv", first | dict(add_bias_kv=True), cross)
    check_multihead("add_zero_attn", first | dict(add_zero_attn=True), cross)
    check_multihead("both added, kdim, vdim", widths | added, wide)
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])                     # (B, S)
    check_multihead("key_padding_mask", first, cross, key_padding_mask=padding)
    check_multihead("key_padding_mask, float", first, cross, key_padding_mask=randn(B, S))
    check_multihead("key_padding_mask, one sample", {}, (query[0], memory[0], memory[0]),
                    key_padding_mask=padding[1])
    mask = torch.rand(L, S) < 0.4
    mask[:, 0] = False
    check_multihead("attn_mask, 2-D", first, cross, attn_mask=mask)
    check_multihead("attn_mask, 2-D, float", first, cross, attn_mask=randn(L, S))
    per_head = torch.rand(2 * B, L, S) < 0.4
    per_head[:, :, 0] = False
    check_multihead("attn_mask, 3-D", {}, (query.transpose(0, 1), *(memory.transpose(0, 1),) * 2),
                    attn_mask=per_head)
    check_multihead("attn_mask, 3-D, float, one sample", {}, (query[0], memory[0], memory[0]),
                    attn_mask=randn(2, L, S))
    check_multihead("both masks", first, cross, attn_mask=mask, key_padding_mask=padding)
    check_multihead("both masks and keys added", first | added, cross, attn_mask=per_head,
                    key_padding_mask=padding)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    check_multihead("causal", first, own, attn_mask=causal, is_causal=True, need_weights=False)
    nothing = mask.clone()
    nothing[1] = True
    check_multihead("a query that may attend to nothing", first, cross, attn_mask=nothing,
                    need_weights=False)
    with chunk_of(1):
        check_multihead("one sample at a time", first | added, cross, attn_mask=per_head)


def test_mac_transformer_layers():
    """torch's encoder and decoder in training mode: inputs after the norms, T before dropout."""
    torch.manual_seed(0)
    x, memory = randn(3, 4, 6), randn(3, 5, 6)
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    padding = torch.arange(4) >= torch.tensor([[4], [2], [3]])
    for norm_first, dropout in itertools.product((False, True), (0.0, 0.5)):
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout, batch_first=True,
                                           norm_first=norm_first).double()
        attention = layer.self_attn
        optimizer = one_step(layer, lambda: layer(x, src_mask=causal, src_key_padding_mask=padding))
        got = {key: optimizer.state[p]["mean"].clone() for key, p in attention.named_parameters()
               if p in optimizer.layers}
        set_identity(attention.out_proj)
        attention.dropout = 0.0
        inputs = layer.norm1(x).detach() if norm_first else x
        optimizer = one_step(attention, lambda: attention(
            inputs, inputs, inputs, attn_mask=causal, key_padding_mask=padding)[0])
        tokens = means_by_autograd(attention.in_proj_weight, attention.in_proj_bias, 3, 12)
        tokens[:2] = F.pad(inputs.mean((0, 1)), (0, 1), value=1.0)
        want = {"in_proj_weight": tokens, "out_proj.weight":
                means_by_autograd(attention.out_proj.weight, attention.out_proj.bias, 1, 12)}
        close(got, want, 1e-12)

    layer = nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True).double()
    inputs = []
    handle = layer.multihead_attn.register_forward_pre_hook(lambda _, args: inputs.extend(args))
    optimizer = one_step(layer, lambda: layer(x, memory))
    handle.remove()
    query, key, value = (y.detach() for y in inputs)
    attention = layer.multihead_attn
    got = optimizer.state[attention.in_proj_weight]["mean"].clone()
    one_step(attention, lambda: attention(query, key, value)[0])
    close(got[:2], torch.stack( [F.pad(y.mean((0, 1)), (0, 1), value=1.0) for y in (query, key)]),
          1e-12)


# ---------------------------------------------------------------------------------------------
# MAC: the optimizer's step
# ---------------------------------------------------------------------------------------------

def rows_of(module, x):
    """The input rows of a Linear or Conv2d, with a 1 for the bias: (R, d)."""
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
    rows = x.detach().reshape(-1, x.shape[-1])
    return (F.pad(rows, (0, 1), value=1.0) if module.bias is not None else rows).numpy()


def mac_in_numpy(net, data, lr, momentum, weight_decay, damping, stat_decay, tcov, tinv,
                 nesterov=False, decoupled=False):
    """The paper's method as plainly as can be: patches unfolded, matrices formed and inverted."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    inputs, S, C, M = {}, {}, {}, {p: 0 for p in net.parameters()}
    for m in layers:
        m.register_forward_hook(lambda m, x, y: inputs.__setitem__(m, rows_of(m, x[0])))
    for t, (x, y) in enumerate(data):
        net.zero_grad()
        loss_of(net, x, y).backward()
        for m in layers:
            a, I = inputs[m], np.eye(inputs[m].shape[1])
            if t % tcov == 0:
                new = a.T @ a / len(a) if m is layers[0] else a.mean(0)
                S[m] = stat_decay * S.get(m, 0) + (1 - stat_decay) * new
            if t % tinv == 0:
                A = S[m] / (1 - stat_decay ** (t // tcov + 1))
                A = A if m is layers[0] else np.outer(A, A)
                C[m] = damping * np.linalg.inv(A + damping * I)
            G = m.weight.grad.flatten(1).numpy()
            if m.bias is not None:
                G = np.hstack([G, m.bias.grad[:, None].numpy()])
                m.bias.grad = torch.tensor((G @ C[m])[:, -1])
            m.weight.grad = torch.tensor((G @ C[m])[:, :m.weight[0].numel()]).view_as(m.weight)
        for p in net.parameters():
            g = p.grad + (0 if decoupled else weight_decay * p.data)
            M[p] = momentum * M[p] + g
            p.data = p.data * (1 - lr * weight_decay if decoupled else 1) \
                - lr * (g + momentum * M[p] if nesterov else M[p])


def conv_bn_linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 7), nn.ReLU(), nn.Linear(7, 5, bias=False)).double()


def test_mac_twenty_steps():
    """(1)-(5), (7): twenty steps of convolutions, batch norm and linear against numpy."""
    common = dict(lr=0.1, momentum=0.9, weight_decay=1e-2, damping=1.0, stat_decay=0.95)
    data = make_data(20)
    for options in (dict(tcov=2, tinv=3), dict(tcov=1, tinv=1), dict(tcov=5, tinv=50),
                    dict(tcov=3, tinv=2), dict(tcov=4, tinv=2, momentum=0.0),
                    dict(tcov=2, tinv=3, nesterov=True, damping=0.1, stat_decay=0.5),
                    dict(tcov=2, tinv=4, decoupled_weight_decay=True, damping=3.0)):
        options = common | options
        net, plain = conv_bn_linear(), conv_bn_linear()
        usual(net, MAC(net, **options), data)
        options["decoupled"] = options.pop("decoupled_weight_decay", False)
        mac_in_numpy(plain, data, **options)
        words = ", ".join(f"{k} {v}" for k, v in options.items() if common.get(k) != v)
        close(dict(net.state_dict()), dict(plain.state_dict()), 1e-9)


def test_mac_blocks_applied():
    """One step of size 1 is −G̃, block by block: groups, q k v, separate weights with one bias."""
    torch.manual_seed(0)
    x, image, memory = randn(3, 4, 6), randn(2, 4, 5, 5), (randn(3, 5, 3), randn(3, 5, 7))
    conv, fused = nn.Conv2d(4, 6, 3, groups=2), FusedAttention(6, 2)
    one = nn.MultiheadAttention(6, 2)
    three = nn.MultiheadAttention(6, 2, kdim=3, vdim=7, batch_first=True)
    for name, module, call, weights in (
            ("grouped convolution", conv, lambda: conv(image), {"weight": ("bias", 0, 6)}),
            ("fused qkv", fused, lambda: fused(x), {"qkv.weight": ("qkv.bias", 0, 18),
                                                    "proj.weight": ("proj.bias", 0, 6)}),
            ("nn.MultiheadAttention", one, lambda: one(x, x, x)[0],
             {"in_proj_weight": ("in_proj_bias", 0, 18),
              "out_proj.weight": ("out_proj.bias", 0, 6)}),
            ("nn.MultiheadAttention, separate weights", three, lambda: three(x, *memory)[0],
             {f"{c}_proj_weight": ("in_proj_bias", 6 * i, 6 * i + 6)
              for i, c in enumerate("qkv")})):
        module.double()
        before = {key: p.detach().clone() for key, p in module.named_parameters()}
        optimizer = one_step(module, lambda: call().square(), lr=1.0, momentum=0.0, damping=0.3)
        changes = {key: before[key] - p.detach() for key, p in module.named_parameters()}
        got, want = {}, {}
        for key, (bias, start, stop) in weights.items():
            weight, part = module.get_parameter(key), slice(start, stop)
            means = optimizer.state[weight]["mean"]
            blocks = zip(weight.grad.chunk(len(means)),
                         module.get_parameter(bias).grad[part].chunk(len(means)), means)
            old = [dense(G, g, torch.outer(a, a), 0.3) for G, g, a in blocks]
            got |= {key: changes[key], (key, "bias"): changes[bias][part]}
            want |= {key: torch.cat([G for G, _ in old]),
                     (key, "bias"): torch.cat([g for _, g in old])}
        close(got, want, 1e-12)


def test_mac_bias_without_gradient():
    """A bias that got no gradient, as one frozen later, counts as 0 in G = [W | b] and stays."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), randn(5, 4)
    optimizer = MAC(net, lr=1.0, momentum=0.0, damping=0.3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in (net[0].bias, net[2].bias):
        p.requires_grad_(False)
    net(x).square().sum().backward()
    optimizer.step()
    got = {name: before[name] - p.detach() for name, p in net.named_parameters()}
    want = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    hidden = F.linear(x, before["0.weight"], before["0.bias"]).tanh()
    mean = F.pad(hidden.mean(0), (0, 1), value=1.0)
    for i, A in ((0, rows_and_covariance(net[0], [x])), (2, torch.outer(mean, mean))):
        want[f"{i}.weight"] = dense(net[i].weight.grad, torch.zeros_like(net[i].bias), A, 0.3)[0]
    close(got, want, 1e-12)


def test_mac_geometry_of_each_call():
    """One convolution, called with two dilations in one step: the mean is over both calls' rows."""
    torch.manual_seed(0)
    conv, x, sums, rows = nn.Conv2d(2, 3, 3, padding=1).double(), randn(2, 2, 7, 6), 0, 0
    optimizer = MAC(conv, lr=0.0, input_covariance=False)
    for dilation in (1, 2):
        conv.dilation = conv.padding = (dilation, dilation)
        conv(x).sum().backward()
        patches = F.pad(explicit_patches(x, conv)[0], (0, 1), value=1.0)
        sums, rows = sums + patches.sum(0), rows + len(patches)
    optimizer.step()
    close(optimizer.state[conv.weight]["mean"][0], sums / rows, 1e-13)


def test_mac_statistics_only_when_due():
    """Between the updates the hooks compute nothing: the step costs what SGD's costs."""
    computed, names = [], ("input_sum", "image_sum", "patch_sum", "patch_gram", "attention_sum")
    kept = {name: getattr(mac, name) for name in names}
    net = make_net()
    optimizer = MAC(net, tcov=3, tinv=2)
    try:
        for name in names:
            setattr(mac, name,
                    lambda *args, name=name: (computed.append(name), kept[name](*args))[1])
        for step, batch in enumerate(make_data(7)):
            computed.clear()
            usual(net, optimizer, [batch])
            assert bool(computed) == (step % 3 == 0), (step, computed)
            assert set(computed) == set(names) or step % 3, computed
    finally:
        for name in names:
            setattr(mac, name, kept[name])


def test_mac_state_size():
    """Two vectors for each layer, one if tcov is a multiple of tinv; print() tells the bytes."""
    for options, factor in ((dict(tcov=2, tinv=3), 2), (dict(tcov=3, tinv=3), 1),
                            (dict(tcov=4, tinv=2), 1)):
        net = make_net()
        optimizer = MAC(net, **options)
        usual(net, optimizer, make_data(5))
        numbers, want = 0, 0
        for p, state in optimizer.state.items():
            numbers += sum(v.numel() for k, v in state.items()
                           if torch.is_tensor(v) and k != "momentum_buffer")
        for name, p in net.named_parameters():
            if name == "conv1.weight":
                want += 2 * 28 ** 2
            elif p.dim() > 1 and not name.startswith("extra"):
                blocks = {"conv2.weight": 2, "block.attn.qkv.weight": 3,
                          "encoder.self_attn.in_proj_weight": 3}.get(name, 1)
                want += factor * blocks * (p[0].numel() + (name != "conv2.weight"))
        close(numbers, want, 0)
        text = str(optimizer)
        extra = 9 * factor                                   # listed, and not yet seen
        assert f"{8 * (want + extra):,} bytes of statistics" in text, text
        assert "conv1: 4×28, input covariance" in text and "plain step: block.norm1" in text, text


# ---------------------------------------------------------------------------------------------
# MAC: the first layer, calibration, shared weights
# ---------------------------------------------------------------------------------------------

def rows_and_covariance(module, inputs):
    rows = torch.cat([torch.tensor(rows_of(module, x)) for x in inputs])
    return rows.T @ rows / len(rows)


def test_mac_first_layer():
    """(5) A₁ and its step, for whatever comes first; and which layer that is."""
    torch.manual_seed(0)
    bn = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    frozen[0].requires_grad_(False)
    no_bias = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    no_bias[0].bias.requires_grad_(False)
    for name, net, first, x in (
            ("Linear", nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "0", randn(5, 4)),
            ("Linear on tokens", nn.Sequential(nn.Linear(4, 3, bias=False)), "0", randn(5, 6, 4)),
            ("Conv2d, one image", nn.Sequential(nn.Conv2d(3, 4, 3)), "0", randn(3, 5, 5)),
            ("patch embedding", models.VisionTransformer(6, 2, 12, 1, 2, 3, 3), "patch_embed.proj",
             randn(2, 3, 6, 6)),
            ("BatchNorm before it", bn, "1", randn(2, 3, 6, 6)),
            ("the first is frozen", frozen, "1", randn(5, 4)),
            ("its bias is frozen", no_bias, "0", randn(5, 4))):
        net.double()
        layer, inputs = net.get_submodule(first), []
        layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        optimizer = one_step(net, lambda: net(x).square(), input_covariance=True, lr=1.0,
                             momentum=0.0, damping=0.5)
        first_weights = [p for p, s in optimizer.state.items() if "covariance" in s]
        assert first_weights == [layer.weight] and "mean" not in optimizer.state[layer.weight]
        A = rows_and_covariance(layer, [inputs[0] if inputs[0].dim() != 3 or "image" not in name
                                        else inputs[0][None]])
        bias = layer.bias if layer.bias is not None and layer.bias.requires_grad else None
        A = A if bias is not None or layer.bias is None else A[:-1, :-1]
        want = dense(layer.weight.grad, None if bias is None else bias.grad, A, 0.5)
        got = {"covariance": optimizer.state[layer.weight]["covariance"][0]}
        got |= {n: before[n] - p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        close(got, dict(zip(("weight", "bias", "covariance"), (*want, A))) if bias is not None else
              {"weight": want[0], "covariance": A}, 1e-12)
    for name, net, x in (
            ("an Embedding comes first", nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)),
             torch.arange(6)),
            ("qkv comes first", models.Attention(4, 2), randn(2, 3, 4)),
            ("input_covariance=False", nn.Sequential(nn.Linear(4, 3)), randn(2, 4))):
        optimizer = one_step(net.double(), lambda: net(x), input_covariance=name[0] != "i")
        close(sum("covariance" in s for s in optimizer.state.values()), 0, 0)


def test_mac_first_layer_groups():
    """(5) a grouped or depthwise first convolution has one A₁ for each group."""
    torch.manual_seed(0)
    for groups in (2, 4):
        conv, x = nn.Conv2d(4, 8, 3, groups=groups).double(), randn(3, 4, 5, 6)
        optimizer = one_step(conv, lambda: conv(x).square(), input_covariance=True)
        rows = F.pad(explicit_patches(x, conv), (0, 1), value=1.0)
        close(optimizer.state[conv.weight]["covariance"], rows.mT @ rows / rows.shape[1], 1e-12)


def test_mac_calibrate():
    """One pass over uneven batches is the covariance of all rows; it stays, the model too."""
    torch.manual_seed(0)
    labels = torch.randint(5, (6,))
    for name, make_model, first, shape in (
            ("Linear", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), "0",
             (4,)),
            ("convolution and batch norm", conv_bn_linear, "0", (3, 6, 6)),
            ("patch embedding", lambda: models.VisionTransformer(6, 2, 12, 1, 2, 5, 3),
             "patch_embed.proj", (3, 6, 6)),
            ("BatchNorm before it", lambda: nn.Sequential(
                nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 5)), "1",
             (3, 6, 6))):
        batches = [randn(n, *shape) + 1 for n in (4, 6, 1, 5)]
        net = make_model().double()
        for training in (True, False):
            net.train(training)
            layer = net.get_submodule(first)
            twin = copy.deepcopy(net)
            before = {key: value.clone() for key, value in net.state_dict().items()}
            optimizer = MAC(net, tcov=1, tinv=2, damping=0.5)
            optimizer.calibrate((x, labels) if i % 2 else x for i, x in enumerate(batches))
            inputs = []
            twin.get_submodule(first).register_forward_hook(lambda _, x, y: inputs.append(x[0]))
            for x in batches:
                twin(x)
            want = rows_and_covariance(layer, inputs)
            covariance = optimizer.state[layer.weight]["covariance"][0]
            mode = "train" if training else "eval"
            close(covariance, want, 1e-12)
            close(dict(net.state_dict()), before, 0)
            assert all(m.training == training for m in net.modules())
            assert all(p.grad is None for p in net.parameters())
        data = [(randn(6, *shape), labels) for _ in range(6)]
        net.train()
        usual(net, optimizer, data[:3])
        fresh = make_model().double()
        fresh.load_state_dict(net.state_dict())
        resumed = MAC(fresh, tcov=1, tinv=2, damping=0.5)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, opt in ((net, optimizer), (fresh, resumed)):
            usual(model, opt, data[3:])
            state = opt.state[model.get_submodule(first).weight]
            close(state["covariance"][0], want, 1e-12)
        close(snapshot(fresh, resumed), snapshot(net, optimizer), 0)


def test_mac_calibrate_step():
    """The step uses the calibrated A₁, not the batch's; a later call replaces it at once."""
    torch.manual_seed(0)
    net, x, later = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(), randn(5, 4), []
    optimizer = MAC(net, lr=1.0, momentum=0.0, damping=0.5, tcov=1, tinv=50)
    for calls in (1, 2):
        data = [randn(7, 4) + 3, randn(2, 4)]
        handle = net[1].register_forward_hook(lambda *_: later.append("ran"))
        optimizer.calibrate(data)
        handle.remove()
        before = net[0].weight.detach().clone()
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        A = rows_and_covariance(net[0], data)
        want = dense(net[0].weight.grad, net[0].bias.grad, A, 0.5)[0]
        close(before - net[0].weight.detach(), want, 1e-11)
    close(len(later), 0, 0)


def test_mac_tied_weights():
    """Two modules with one weight pool their rows; one tied to an Embedding takes SGD's step."""
    class Tied(nn.Module):
        def __init__(self, first, bias):
            super().__init__()
            self.start = nn.Identity() if first else nn.Linear(4, 4)
            self.a, self.b = nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.start(x)).relu().repeat(3, 1)[:len(x) + 2])

    torch.manual_seed(0)
    for first, bias in itertools.product((False, True), (False, True)):
        net, inputs = Tied(first, bias).double(), []
        for module in (net.a, net.b):
            module.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
        optimizer = one_step(net, lambda: net(randn(5, 4)), input_covariance=True)
        rows = torch.cat(inputs)                         # two biases: each takes the plain step
        key, want = ("covariance", rows.T @ rows / 12) if first else ("mean", rows.mean(0))
        assert len(rows) == 12
        close(optimizer.state[net.a.weight][key][0], want, 1e-12)

    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)).double()
    net[2].weight = net[0].weight
    twin = copy.deepcopy(net)
    x, y = torch.tensor([1, 2, 3, 3]), torch.tensor([2, 3, 4, 0])
    usual(net, MAC(net, lr=0.5), [(x, y)])
    usual(twin, torch.optim.SGD(twin.parameters(), lr=0.5), [(x, y)])
    close(net[0].weight, twin[0].weight, 0)
    assert not torch.equal(net[1].weight, twin[1].weight)


def test_mac_subclasses():
    """forward() with other names and keywords; a weight that is computed takes the plain step."""
    class Renamed(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class RenamedConv(nn.Conv2d):
        def forward(self, image, scale=1.0):
            return super().forward(image * scale)

    torch.manual_seed(0)
    x, image = randn(5, 4), randn(2, 3, 4, 4)
    for name, layer, call in (
            ("nn.Linear(input=x)", nn.Linear(4, 3), lambda layer: layer(input=x)),
            ("a Linear's forward(x)", Renamed(4, 3), lambda layer: layer(x)),
            ("a Conv2d's forward(image=x)", RenamedConv(3, 2, 3),
             lambda layer: layer(image=image))):
        layer.double()
        optimizer = one_step(layer, lambda: call(layer))
        rows = call(layer).numel() / len(layer.weight)
        close(optimizer.state[layer.weight]["mean"], means_by_autograd(layer.weight, layer.bias, 1,
                                                                       rows), 1e-12)
    net = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    optimizer = one_step(net.double(), lambda: net(x))
    close(sum("mean" in state for state in optimizer.state.values()), 1, 0)


# ---------------------------------------------------------------------------------------------
# MAC: precision, memory, errors
# ---------------------------------------------------------------------------------------------

class Mixed(nn.Module):
    """Convolution, fused qkv with norms, nn.MultiheadAttention, linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.fused, self.multi = FusedAttention(8, 2, norm=True), nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).flatten(2).mT
        x = self.fused(x)
        return self.head(self.multi(x, x, x, need_weights=False)[0].mean(1))


def statistics_in_float64(net, x, run):
    """The means and A₁ of Mixed, from the inputs that its layers see in run(x), in float64."""
    seen, names = {}, ("conv1", "conv2", "fused.qkv", "fused.proj", "multi", "head")
    handles = [net.get_submodule(name).register_forward_hook(
        lambda _, args, y, name=name: seen.__setitem__(name, (args[0].detach(), y)))
        for name in names]
    run(x)
    for handle in handles:
        handle.remove()
    inputs = {name: value[0].double() for name, value in seen.items()}
    want = {f"{name}.weight": torch.tensor(rows_of(net.get_submodule(name), inputs[name])).mean(0)
            for name in ("conv2", "fused.proj", "head")}
    want["conv1.weight"] = rows_and_covariance(net.conv1, [inputs["conv1"]])
    X = inputs["fused.qkv"]
    q, k, _ = seen["fused.qkv"][1].detach().view(*X.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    dtype = net.fused.q_norm.weight.dtype                  # the norms are computed in their own
    q, k = net.fused.q_norm(q.to(dtype)).detach(), net.fused.k_norm(k.to(dtype)).detach()
    t = mac.attention_sum(q.double(), k.double(), 0.5)
    tokens = mac.input_sum(X)
    want["fused.qkv.weight"] = torch.cat([tokens, tokens, mac.value_sum(X, t)]) / X[..., 0].numel()
    multi = copy.deepcopy(net.multi).double()
    X = inputs["multi"]
    set_identity(multi.out_proj)
    one_step(multi, lambda: multi(X, X, X)[0])
    want["multi.in_proj_weight"] = means_by_autograd(
        multi.in_proj_weight, multi.in_proj_bias, 3, X[..., 0].numel())
    want["multi.in_proj_weight"][:2] = tokens = mac.input_sum(X) / X[..., 0].numel()
    want["multi.out_proj.weight"] = means_by_autograd(
        multi.out_proj.weight, multi.out_proj.bias, 1, X[..., 0].numel())
    return want


def test_mac_precision():
    """float32 statistics of what the layers saw, though autocast or the weights are in bfloat16."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6) + 1
    before = torch.get_float32_matmul_precision()
    try:
        for matmul in ("highest", "medium"):
            torch.set_float32_matmul_precision(matmul)
            for mode in ("float32", "autocast", "bfloat16 weights"):
                net = Mixed().to(torch.bfloat16 if "weights" in mode else torch.float32)

                def run(x):
                    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                        return net(x.to(net.head.weight.dtype))
                optimizer = one_step(net, lambda: run(x), input_covariance=True)
                assert torch.get_float32_matmul_precision() == matmul
                want, got = statistics_in_float64(net, x, run), {}
                for name in want:
                    state = optimizer.state[net.get_parameter(name)]
                    value = state["covariance" if name == "conv1.weight" else "mean"]
                    assert value.dtype == torch.float32, f"{name}: {value.dtype}"
                    got[name] = value.double().view_as(want[name])
                close(got, want, 3e-6)
    finally:
        torch.set_float32_matmul_precision(before)


def test_mac_argument_errors():
    net, inf, nan = make_net(), math.inf, math.nan
    for name, values in (("damping", (0, -1.0, inf, nan)), ("stat_decay", (1.0, -0.1, nan)),
                         ("tcov", (0, -5, 2.5, inf, nan)), ("tinv", (0, 1.5, inf, nan))):
        for value in values:
            raises(ValueError, [name, str(value)], lambda: MAC(net, **{name: value}))
    params = [{"params": list(net.head.parameters()), "damping": -2}]
    raises(ValueError, ["damping", "-2"], lambda: MAC(net, params=params))
    for name, words, value in (("lr", "learning rate", -1.0), ("momentum", "momentum", -0.5),
                               ("weight_decay", "weight_decay", -0.1)):
        raises(ValueError, [words, str(value)], lambda: MAC(net, **{name: value}))
    raises(ValueError, ["Nesterov"], lambda: MAC(net, momentum=0.0, nesterov=True))
    wide = nn.Sequential(nn.Linear(20_000, 2))
    raises(ValueError, ["20001", "input_covariance=False", "layer, 0"], lambda: MAC(wide))
    MAC(wide, input_covariance=False)
    optimizer = MAC(net)
    raises(ValueError, ["calibrate", "no batch"], lambda: optimizer.calibrate([]))
    raises(ValueError, ["calibrate", "no first layer"],
           lambda: MAC(models.Attention(4, 2)).calibrate([torch.zeros(1, 2, 4)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MAC(nn.Sequential(nn.LayerNorm(3)))
    assert "no Linear" in str(caught[0].message)


def test_mac_damping_lost_in_rounding():
    """A₁ + ρI that float32 cannot tell from a singular A₁: an error that says so, no step."""
    net = nn.Sequential(nn.Linear(4, 3))
    optimizer, before = MAC(net, damping=1e-6), net[0].weight.detach().clone()
    net(1e4 * torch.randn(2, 4)).sum().backward()
    raises(FloatingPointError, ["layer 0 ", "1e-06", "damping"], optimizer.step)
    close(net[0].weight, before, 0)


# ---------------------------------------------------------------------------------------------
# FOOF
# ---------------------------------------------------------------------------------------------

def gram(rows):
    """E[[a; 1][a; 1]ᵀ] of explicit rows (..., R, d)."""
    rows = F.pad(rows, (0, 1), value=1.0)
    return rows.mT @ rows / rows.shape[-2]


def foof_of(grad, bias_grad, A, damping):
    """foof.py's (3) for A (blocks, d, d)."""
    packed = foof.pack(A)
    L, failed = foof.damped_cholesky(foof.unpack(packed, A.shape[-1]),
                                     torch.full(A.shape[:1], damping, dtype=A.dtype))
    assert not failed.any()
    return foof.precondition(grad, bias_grad, L)


def foof_after(model, call, **options):
    """FOOF after one step of size 0 with loss = Σ call()."""
    optimizer = FOOF(model, **dict(lr=0.0, tcov=1, tinv=1) | options)
    optimizer.zero_grad()
    call().sum().backward()
    optimizer.step()
    return optimizer


def covariance_of(optimizer, weight, d):
    A = foof.unpack(optimizer.state[weight]["covariance"], d)
    return A + A.tril(-1).mT


def test_foof_golden():
    """Two rows, λ = 1, by hand."""
    x = torch.tensor([[1.0, 2], [3, -1]], dtype=torch.float64)
    g = torch.tensor([[0.5, -1], [0.25, 0.5]], dtype=torch.float64)
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_()
    optimizer = FOOF(layer, lr=1.0, momentum=0.0, damping=1.0)
    (layer(x) * g).sum().backward()
    optimizer.step()
    close(covariance_of(optimizer, layer.weight, 3)[0], [[5, -0.5, 2], [-0.5, 2.5, 0.5], [2, 0.5,
                                                                                          1]], 1e-15)
    close(torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1), [[1.25, 0.75, 0.75], [0.5,
                                                                                             -2.5,
                                                                                             -0.5]],
          1e-15)
    close(-torch.cat([layer.weight, layer.bias[:, None]], 1), [[0.18, 0.22, 0.14], [0.08, -0.68,
                                                                                    -0.16]], 1e-14)
    # the paper's Appendix F: two points, squared loss, no bias, solved by one undamped step
    x, y = torch.tensor([[3.0, 1], [1, 0]], dtype=torch.float64), torch.tensor([[1.0], [-1]])
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = FOOF(layer, lr=1.0, momentum=0.0, damping=1e-14)
    (0.5 * (layer(x) - y).square()).mean().backward()
    close(-2 * layer.weight.grad, [[2.0, 1]], 1e-15)
    optimizer.step()
    close(layer.weight, [[-1.0, 4]], 1e-10)


def test_foof_ridge():
    """(2) = (3): the minimiser by least squares on augmented rows; zero gradient of (2)."""
    torch.manual_seed(0)
    for R, d, out, damping in ((7, 3, 2, 0.5), (4, 9, 5, 1.0), (50, 10, 3, 1e-3), (3, 6, 4, 10.0)):
        X, E = randn(R, d) + 1, randn(R, out)          # rows a, and e = R ∂loss/∂s
        G, A = E.T @ X / R, (X.T @ X / R)[None]
        step, _ = foof_of(G, None, A, damping)
        rows = torch.cat([X / R ** 0.5, damping ** 0.5 * torch.eye(d, dtype=X.dtype)])
        targets = torch.cat([E / R ** 0.5, X.new_zeros(d, out)])
        close(step, torch.linalg.lstsq(rows, targets).solution.T, 1e-11)
        free = step.clone().requires_grad_()
        value = 0.5 * (X @ free.T - E).square().sum() / R + 0.5 * damping * free.square().sum()
        close(torch.autograd.grad(value, free)[0] + G, G, 1e-12)


def test_foof_identities():
    """R ≤ d, ρ → 0: outputs move by −e; invariance to linear maps; one row: MAC; P = I: K-FAC."""
    torch.manual_seed(0)
    X, E = randn(4, 9), randn(4, 3)
    step, _ = foof_of(E.T @ X / 4, None, (X.T @ X / 4)[None], 1e-11)
    close(X @ step.T, E, 1e-8)
    M, W = randn(5, 5), randn(3, 5)
    X, E = randn(20, 5), randn(20, 3)
    moved = []
    for T in torch.eye(5, dtype=X.dtype), M:
        rows, weight = X @ T.T, W @ torch.linalg.inv(T)
        step, _ = foof_of(E.T @ rows / 20, None, (rows.T @ rows / 20)[None], 1e-13)
        moved.append(rows @ (weight - step).T)
    close(moved[1], moved[0], 1e-9)
    mean, G, g = randn(1, 6), randn(4, 5), randn(4)
    ours = foof_of(G, g, mean[:, :, None] * mean[:, None], 0.3)
    macs = mac.precondition(G, g, mean, 0.3)
    close(0.3 * torch.cat([ours[0], ours[1][:, None]], 1), torch.cat([macs[0], macs[1][:, None]], 1),
          1e-13)
    G = randn(3, 5)
    close(1e9 * foof_of(G, None, gram(randn(6, 4))[None], 1e9)[0], G, 1e-8)


def test_foof_cholesky():
    """(6) = the dense G (A + ρI)⁻¹, in blocks, with and without bias, in both memory layouts."""
    torch.manual_seed(0)
    for out, shape, blocks, bias in ((4, (6,), 1, True), (4, (6,), 1, False),
                                     (6, (2, 3, 3), 3, True),
                                     (6, (2, 3, 2), 2, False), (9, (5,), 3, True)):
        d = int(np.prod(shape)) + bias
        G, g = randn(out, *shape), randn(out) if bias else None
        A = gram(randn(blocks, 2 * d, d - 1))
        whole = G.reshape(blocks, out // blocks, -1)
        whole = torch.cat([whole, g.view(blocks, -1, 1)], 2) if bias else whole
        want = whole @ torch.linalg.inv(A + 0.1 * torch.eye(d, dtype=A.dtype))
        layouts = [torch.contiguous_format] + [torch.channels_last] * (G.dim() == 4)
        for layout in layouts:
            given = G.contiguous(memory_format=layout)
            new, new_g = foof_of(given, g, A, 0.1)
            assert new.shape == G.shape and new.stride() == given.stride()
            got = new.reshape(blocks, out // blocks, -1)
            got = torch.cat([got, new_g.view(blocks, -1, 1)], 2) if bias else got
            close(got, want, 1e-12)
    A = randn(3, 2, 7, 7)
    A = A @ A.mT
    close(foof.unpack(foof.pack(A), 7), A.tril(), 0)
    close(foof.pack(A[..., :5, :5]), foof.pack(A)[..., :15], 0)
    stacked = foof.damped_cholesky(A.tril(), torch.full((3, 2), 0.1, dtype=A.dtype))[0]
    alone = [foof.damped_cholesky(a[None].tril(), a.new_tensor([0.1]))[0][0]
             for a in A.flatten(0, 1)]
    close(stacked.flatten(0, 1), torch.stack(alone), 1e-15)
    close(stacked @ stacked.mT, A + 0.1 * torch.eye(7, dtype=A.dtype), 1e-14)


FOOF_GEOMETRIES = [(C, out, size, dict(kernel_size=kernel, padding=padding, groups=groups))
                   for C, out, size, kernel, padding, groups in (
    (3, 4, (5, 6), 3, 1, 1), (4, 6, (5, 6), 3, 1, 2), (4, 4, (5, 6), 3, "same", 4),
    (3, 2, (6, 7), 5, 2, 1), (4, 2, (6, 5), 5, "same", 2), (2, 3, (7, 9), 7, 3, 1),
    (2, 3, (5, 6), (3, 1), (1, 0), 1), (2, 3, (5, 6), (1, 3), "same", 1),
    (2, 3, (6, 9), (3, 7), (1, 3), 1), (4, 4, (7, 6), (7, 5), (3, 2), 2),
    (3, 4, (5, 4), 1, 0, 1), (4, 4, (5, 4), 1, "same", 2), (4, 4, (5, 4), 1, "valid", 4),
    (2, 3, (1, 1), 3, 1, 1), (2, 3, (2, 1), 3, 1, 1), (2, 3, (2, 2), 5, 2, 1),
    (2, 3, (1, 2), 5, 2, 1), (2, 3, (3, 3), 7, 3, 1), (2, 3, (4, 2), 7, 3, 1),
    (2, 3, (1, 6), (1, 5), (0, 2), 1), (20, 2, (5, 4), 3, 1, 1), (130, 2, (2, 3), 1, 0, 1))]


def test_foof_conv_covariance():
    """(5), im2col and pixels: Σ [a; 1][a; 1]ᵀ against explicit patches, for every geometry."""
    torch.manual_seed(0)
    fast, calls = 0, []
    plain = foof.shift_gram
    foof.shift_gram = lambda *arguments: calls.append(1) or plain(*arguments)
    try:
        for C, out, size, options in GEOMETRIES + FOOF_GEOMETRIES:
            conv, x = nn.Conv2d(C, out, **options).double(), randn(2, C, *size)
            rows = F.pad(explicit_patches(x, conv), (0, 1), value=1.0)
            calls.clear()
            (total, (count, *_)), = foof.linear_or_conv(conv, {"input": x}, conv(x), True)
            words = ", ".join(f"{k} {v}" for k, v in options.items()).replace("kernel_size", "k")
            close(total, foof.pack(rows.mT @ rows), 1e-13)
            assert count == rows.shape[1]
            fast += bool(calls)
    finally:
        foof.shift_gram = plain
    assert fast >= 18, f"only {fast} geometries went the fast way"
    conv, x = nn.Conv2d(3, 4, 3, padding=1).double(), randn(5, 3, 6, 5)
    want = foof.patch_gram(x, conv)
    for name, y in (("channels_last", x.contiguous(memory_format=torch.channels_last)),
                    ("strided", torch.cat([x, x], 3)[..., :5])):
        close(foof.patch_gram(y, conv), want, 1e-14)
    conv, before = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), foof.CHUNK
    want = foof.patch_gram(x, conv)
    try:
        foof.CHUNK = 1
        close(foof.patch_gram(x, conv), want, 1e-14)
    finally:
        foof.CHUNK = before
    x = randn(4, 3, 16, 16).float()
    close(foof.patch_gram(x, nn.Conv2d(3, 4, 3, padding=1)), foof.patch_gram(x.double(), nn.Conv2d(3,
                                                                                                   4,
                                                                                                   3,
                                                                                                   padding=1)),
          1e-6)


def test_foof_covariance():
    """(1) in the optimizer's state: for loss = Σ output, per-example gradients have the rows a."""
    torch.manual_seed(0)
    for name, layer, x in (
            ("Linear, (B, d)", nn.Linear(4, 3), randn(5, 4)),
            ("Linear without bias", nn.Linear(4, 3, bias=False), randn(5, 4)),
            ("Linear, (B, N, d)", nn.Linear(4, 3), randn(2, 6, 4)),
            ("Linear, one vector", nn.Linear(4, 3), randn(4)),
            ("Conv2d 1×1 image per example", nn.Conv2d(2, 3, 3), randn(7, 2, 3, 3)),
            ("grouped Conv2d without bias", nn.Conv2d(4, 6, 2, groups=2, bias=False),
             randn(6, 4, 2, 2)),
            ("Conv2d, one unbatched image", nn.Conv2d(2, 3, 3, bias=False), randn(2, 3, 3))):
        layer.double()
        optimizer, blocks = foof_after(layer, lambda: layer(x)), getattr(layer, "groups", 1)
        examples = x.reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else \
            x.reshape(-1, *x.shape[-3:])
        rows = []
        for example in examples:
            grads = torch.autograd.grad(layer(example[None]).sum(), list(layer.parameters()))
            row = grads[0].view(blocks, len(grads[0]) // blocks, -1)[:, 0]        # (blocks, d)
            rows.append(torch.cat([row, grads[1].view(blocks, -1)[:, :1]], 1)
                        if len(grads) == 2 else row)
        rows = torch.stack(rows, 1)
        close(covariance_of(optimizer, layer.weight, rows.shape[2]), rows.mT @ rows / len(examples),
              1e-14)
    # two uses of one weight pool their rows
    layer, x, y = nn.Linear(3, 3).double(), randn(4, 3), randn(6, 3)
    optimizer = foof_after(layer, lambda: torch.cat([layer(x), layer(y)]))
    close(covariance_of(optimizer, layer.weight, 4)[0], gram(torch.cat([x, y])), 1e-14)


def test_foof_multihead_attention():
    """q, k and v rows of in_proj by the covariance of their own input; out_proj plain."""
    torch.manual_seed(0)
    for options in ({}, {"bias": False}, {"kdim": 4, "vdim": 5}, {"batch_first": True}):
        module = nn.MultiheadAttention(6, 2, **options).double()
        inputs = [randn(3, 3, d) for d in (6, options.get("kdim", 6), options.get("vdim", 6))]
        for given in (inputs, [inputs[0]] * 3) if len(options) < 2 else (inputs,):
            optimizer = foof_after(module, lambda: module(*given, need_weights=False)[0].square(),
                                   damping=0.2)
            fused = module.in_proj_weight is not None
            weights = module.in_proj_weight.chunk(3) if fused else \
                [getattr(module, f"{x}_proj_weight") for x in "qkv"]
            grads = module.in_proj_weight.grad.chunk(3) if fused else [w.grad for w in weights]
            got, want = {}, {}
            raw = {p: p.grad.clone() for p in module.parameters()}
            seen, plain = {}, foof.sgd_step
            foof.sgd_step = lambda _: seen.update({p: p.grad.clone() for p in module.parameters()})
            try:
                optimizer.steps = 1
                optimizer.param_groups[0]["tcov"] = 10
                optimizer.step()
            finally:
                foof.sgd_step = plain
            news = seen[module.in_proj_weight].chunk(3) if fused else [seen[w] for w in weights]
            for i, (name, x) in enumerate(zip("qkv", given)):
                rows = x.flatten(0, 1)
                bias = module.in_proj_bias
                A = gram(rows) if bias is not None else gram(rows)[:-1, :-1]
                G = grads[i]
                if bias is not None:
                    G = torch.cat([G, raw[bias].chunk(3)[i][:, None]], 1)
                dense = G @ torch.linalg.inv(A + 0.2 * torch.eye(len(A), dtype=A.dtype))
                want[name] = dense
                got[name] = news[i] if bias is None else \
                    torch.cat([news[i], seen[bias].chunk(3)[i][:, None]], 1)
            close(got, want, 1e-11)
            close(seen[module.out_proj.weight], raw[module.out_proj.weight], 0)


def test_foof_transcription():
    """Twelve steps of a small network against the update written out in numpy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    lr, mu, wd, rho, beta, tcov, tinv = 0.1, 0.9, 1e-2, 0.3, 0.8, 2, 3
    optimizer = FOOF(net, lr=lr, momentum=mu, weight_decay=wd, damping=rho, stat_decay=beta,
                     tcov=tcov, tinv=tinv)
    W1 = np.c_[net[0].weight.detach().numpy(), net[0].bias.detach().numpy()]
    W2, M, m, P = net[2].weight.detach().numpy().copy(), [0, 0], [0, 0], [None, None]
    for t in range(12):
        x, y = randn(5, 3) + 1, randn(5, 2)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        a1 = np.c_[x.numpy(), np.ones(5)]
        a2 = np.tanh(a1 @ W1.T)
        e2 = 2 * (a2 @ W2.T - y.numpy()) / 10
        e1 = e2 @ W2 * (1 - a2 ** 2)
        for i, (a, e, W) in enumerate(((a1, e1, W1), (a2, e2, W2))):
            if t % tcov == 0:
                m[i] = beta * m[i] + (1 - beta) * a.T @ a / 5
            if t % tinv == 0:
                A = m[i] / (1 - beta ** (t // tcov + 1))
                P[i] = np.linalg.inv(A + rho * np.eye(len(A)))
            M[i] = mu * M[i] + e.T @ a @ P[i] + wd * W
            W -= lr * M[i]
        got = torch.cat([net[0].weight, net[0].bias[:, None]], 1)
    close(got, W1, 1e-12)
    close(net[2].weight, W2, 1e-12)


def test_foof_singular():
    """Dead ReLU, constant input, tiny damping, float32: a finite step, or an error that says."""
    torch.manual_seed(0)

    def step(input_of, damping, bias=True, steps=3):
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias))
        optimizer = FOOF(net, lr=0.1, damping=damping, tcov=1, tinv=1)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(input_of(net)), torch.tensor([0, 1, 2, 0])).backward()
            try:
                optimizer.step()
            finally:
                assert all(p.isfinite().all() for p in net.parameters())
        return net

    def dead(net):
        with torch.no_grad():
            net[0].bias.fill_(-100.0)
        return torch.randn(4, 4)
    for name, inputs in (("dead ReLU", dead),
                         ("constant input", lambda net: torch.full((4, 4), 3.0)),
                         ("zero input", lambda net: torch.zeros(4, 4))):
        for damping in (1.0, 1e-3):
            for bias in (True, False):
                step(inputs, damping, bias)
    for damping in (1e-9, 1e-30, 1e-45):
        raises(FloatingPointError, ("layer 0 ", str(damping), "raise damping"),
               lambda: step(lambda net: torch.full((4, 4), 3.0), damping))
    raises(FloatingPointError, ("layer 0 ", "not finite"),
           lambda: step(lambda net: torch.full((4, 4), 1e30), 1.0))
    net = step(lambda net: torch.randn(4, 4), 1e-6)


# ---------------------------------------------------------------------------------------------
# K-FAC
# ---------------------------------------------------------------------------------------------

def kfac_after(model, loss_of_outputs, *inputs, sample=False, **options):
    """KFAC after one step of size 0."""
    optimizer = KFAC(model, **dict(lr=0.0, tcov=1, tinv=1) | options)
    optimizer.zero_grad()
    outputs = model(*inputs)
    if sample:
        optimizer.sample_fisher(outputs)
    loss_of_outputs(outputs).backward()
    optimizer.step()
    return optimizer


def factors_of(optimizer, layer):
    """A and P of the optimizer's state, (blocks, ·, ·)."""
    for side in (optimizer.layers[layer.weight], optimizer.layers[layer.weight].outputs):
        name = "output_covariance" if side.what == "output gradients" else "covariance"
        M = kfac.unpack(optimizer.state[layer.weight][name], side.d)
        yield M + M.tril(-1).mT


def kfac_applied(optimizer, layer):
    """The [W | b] gradient that a step hands to SGD."""
    seen, plain = {}, kfac.sgd_step
    kfac.sgd_step = lambda _: seen.update({p: p.grad.clone() for p in layer.parameters()})
    try:
        optimizer.step()
    finally:
        kfac.sgd_step = plain
    return whole(seen[layer.weight], None if layer.bias is None else seen[layer.bias])


def whole(weight, bias):
    weight = weight.flatten(1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def homogeneous(x):
    return F.pad(x, (0, 1), value=1.0)


def test_kfac_golden():
    """Two rows, N = 2, λ = 0.01, by hand: factors, π, both inverses, the KL clip."""
    x = torch.tensor([[1.0, 2], [3, -1]], dtype=torch.float64)
    g = torch.tensor([[0.5, -1], [0.25, 0.5]], dtype=torch.float64)
    wanted = {
        "factored": [[0.483726437437, 0.065962266819, 0.226157692278],
                     [0.177471032429, -0.326671173036, -0.017275606969]],
        "eigen": [[0.593960360961, 0.064606214701, 0.273013358898],
                  [0.216743429965, -0.354292145135, -0.008336285768]]}
    for inverse, want in wanted.items():
        for kl_clip, nu in ((None, 1.0), (1e-3, 0.239883399595)):
            if inverse == "eigen" and kl_clip:
                continue
            layer = nn.Linear(2, 2).double()
            optimizer = KFAC(layer, lr=0.1, momentum=0.0, damping=0.01, inverse=inverse,
                             kl_clip=kl_clip)
            before = whole(layer.weight, layer.bias).clone()
            (layer(x) * g).sum().backward()
            optimizer.step()
            A, P = factors_of(optimizer, layer)
            close(A[0], [[5, -0.5, 2], [-0.5, 2.5, 0.5], [2, 0.5, 1]], 1e-15)
            close(P[0], [[0.625, -0.75], [-0.75, 2.5]], 1e-15)
            close((before - whole(layer.weight, layer.bias)) / 0.1, torch.tensor(want,
                                                                                 dtype=torch.float64)
                  * nu, 1e-11)
    pi = kfac.pi_of(kfac.pack(A), kfac.pack(P), 3, 2)
    close(pi, [1.346600658448], 1e-12)
    close([0.1 * pi.item(), 0.1 / pi.item()], [0.134660065845, 0.074261065726], 1e-10)
    close([0.1 * pi.item() / (A[0].trace() / 3).item(), 0.1 / pi.item() / (P[0].trace() / 2).item()],
          [0.0475270820629] * 2, 1e-11)
    inner = torch.tensor([0.017377992684 * 0.3, 0.017377992684 * 0.7], dtype=torch.float64)
    close(kfac.kl_scale([inner], 1e-3), 0.239883399595, 1e-11)
    close(kfac.kl_scale([inner * 0], 1e-3), 1.0, 0)


def test_kfac_inverse():
    """(3) against its dense form, (4) against the dense (A ⊗ P + λI)⁻¹; blocks, biases, layouts."""
    torch.manual_seed(0)
    for out, shape, blocks, bias in ((4, (6,), 1, True), (4, (6,), 1, False),
                                     (6, (2, 3, 3), 3, True),
                                     (6, (2, 3, 2), 2, False), (5, (3,), 5, True)):
        d, o = int(np.prod(shape)) + bias, out // blocks
        A, P = (M @ M.mT / 3 for M in (randn(blocks, d, 4), randn(blocks, o, 2)))
        G, g = randn(out, *shape), randn(out) if bias else None
        V = whole(G, g).view(blocks, o, d)
        lam = 0.02
        pi = (A.diagonal(dim1=1, dim2=2).mean(1) / P.diagonal(dim1=1, dim2=2).mean(1)).sqrt()
        close(kfac.pi_of(kfac.pack(A), kfac.pack(P), d, o), pi, 1e-14)
        eye_d, eye_o = torch.eye(d).double(), torch.eye(o).double()
        dense = {"factored": [torch.kron(p + lam ** 0.5 / s * eye_o, a + s * lam ** 0.5 * eye_d)
                              for a, p, s in zip(A, P, pi)],
                 "eigen": [torch.kron(p, a) + lam * torch.kron(eye_o, eye_d)
                           for a, p in zip(A, P)]}
        L, failed = kfac.damped_cholesky(A.tril(), pi * lam ** 0.5)
        M, failed_too = kfac.damped_cholesky(P.tril(), lam ** 0.5 / pi)
        Q, values, _ = kfac.eigenbasis(A.tril())
        R, output_values, _ = kfac.eigenbasis(P.tril())
        assert not (failed | failed_too).any()
        solves = {"factored": lambda V: kfac.solve_factored(V, L, M),
                  "eigen": lambda V: kfac.solve_eigen(V, Q, values, R, output_values, lam)}
        for name, solve in solves.items():
            want = torch.stack([torch.linalg.solve(F_, v.flatten()).view(o, d)
                                for F_, v in zip(dense[name], V)])
            for layout in [torch.contiguous_format] + [torch.channels_last] * (G.dim() == 4):
                given = G.contiguous(memory_format=layout)
                new = kfac.precondition(given, g, blocks, solve)
                assert new[0].stride() == given.stride()
                close(whole(*new).view(blocks, o, d), want, 1e-11)
    # K5: the clip's inner product in the eigenbasis
    W = R.mT @ V @ Q
    close((solves["eigen"](V) * V).sum(), (W.square() / (output_values[:, :, None] * values[:, None]
                                                         + lam)).sum(), 1e-13)
    # π is where the trace norm of the cross terms is smallest
    def cross(s):
        return (1 / s * A[0].trace() * len(P[0]) + s * P[0].trace() * len(A[0])).item()
    assert cross(pi[0]) < min(cross(pi[0] * 1.001), cross(pi[0] / 1.001))
    zero = torch.zeros_like(A)
    close(kfac.pi_of(kfac.pack(zero), kfac.pack(P), d, o), torch.ones(blocks), 0)
    tiny = torch.eye(3)[None] * 1e-30
    close(kfac.pi_of(kfac.pack(1 / tiny.diagonal(dim1=1, dim2=2) .diag_embed()), kfac.pack(tiny), 3,
                     3), [1e30], 1e-5)


def test_kfac_factors():
    """(1), (7) against autograd's per-example gradients, for every kind of layer, group, layout."""
    torch.manual_seed(0)
    for name, layer, x in (
            ("Linear", nn.Linear(4, 3), randn(5, 4)),
            ("Linear without bias", nn.Linear(4, 3, bias=False), randn(5, 4)),
            ("Conv2d, one position", nn.Conv2d(2, 3, 3), randn(5, 2, 3, 3)),
            ("grouped, one position", nn.Conv2d(4, 6, 2, groups=2), randn(5, 4, 2, 2)),
            ("depthwise, no bias", nn.Conv2d(3, 3, 2, groups=3, bias=False), randn(5, 3, 2, 2))):
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer.weight.shape[0], 4))
        model.double()
        y, groups = torch.randint(4, (5,)), getattr(layer, "groups", 1)
        optimizer = kfac_after(model, lambda z: F.cross_entropy(z, y), x)
        A, P = factors_of(optimizer, layer)
        rank_one = []
        for i in range(5):        # D = g aᵀ: D Dᵀ = |a|² g gᵀ, DᵀD = |g|² a aᵀ; over all examples
            grads = torch.autograd.grad(F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]),
                                        list(layer.parameters()))
            rank_one.append(whole(*grads, *[None] * (2 - len(grads))).view(groups, -1, A.shape[1]))
        D = torch.stack(rank_one)                                     # (5, groups, out/groups, d)
        a = [homogeneous(r) if layer.bias is not None else r for r in
             (explicit_patches(x, layer) if isinstance(layer, nn.Conv2d) else x[None])]
        a = torch.stack(a).transpose(0, 1)                            # (5, groups, d)
        g = (D @ a[..., None]).squeeze(-1) / a.square().sum(-1, keepdim=True)
        close(g[..., None] * a[:, :, None], D, 1e-12)
        close(A, torch.einsum("ngi,ngj->gij", a, a) / 5, 1e-13)
        close(P, torch.einsum("ngi,ngj->gij", g, g) / 5, 1e-13)
    for C, out, size, options in GEOMETRIES:
        conv, x = nn.Conv2d(C, out, **options).double(), randn(2, C, *size)
        y = conv(x)
        g = randn(*y.shape)
        rows, S = homogeneous(explicit_patches(x, conv)), y[0, 0].numel()
        per_image = rows.unflatten(1, (2, S)).mean(2)
        grads = g.transpose(0, 1).reshape(conv.groups, out // conv.groups, 2, S)
        want, got = {}, {}
        for reduce in (False, True):
            (total, (count, *_)), = kfac.linear_or_conv(conv, {"input": x}, y, True, reduce)
            r = per_image if reduce else rows
            h = grads.sum(3) if reduce else grads.flatten(2)
            got |= {("A", reduce): total, ("P", reduce): kfac.output_gram(conv, g, reduce)}
            want |= {("A", reduce): kfac.pack(r.mT @ r), ("P", reduce): kfac.pack(h @ h.mT)}
            assert count == r.shape[1]
        words = ", ".join(f"{k} {v}" for k, v in options.items()).replace("kernel_size", "k")
        close(got, want, 1e-12)


def all_pairs(x, residuals):
    """Each input with each residual: over these, inputs and residuals are independent."""
    repeats = [1] * (residuals.dim() - 1)
    return x.repeat_interleave(len(residuals), 0), residuals.repeat(len(x), *repeats)


def test_kfac_linear_network():
    """(2), (10) exact: F = A ⊗ P in linear networks with squared loss, where K-FAC says it is.

    The loss of an example with output f and residual r is ½|f − y|², y = f − r held fixed; over all
    pairs of inputs and residuals its gradients have the Fisher matrix of the model for covariance.
    """
    torch.manual_seed(0)
    B, S, d, h, o = 3, 3, 3, 4, 2

    def check(name, sharing, terms, kind, want_exact):
        layers = [nn.Linear(d, h).double(), nn.Linear(h, o, bias=False).double()]
        shape = (B, d) if kind == "plain" else (B, S, d)
        r = 2.0 * torch.cat([torch.eye(o), -torch.eye(o)]).double()            # mean 0
        if kind == "tokens":           # independent residuals of the tokens: a row of a product set
            signs = torch.tensor([[1.0 if i >> t & 1 else -1.0 for t in range(S)]
                                  for i in range(2 ** S)]).double()
            r = (signs[:, None, :, None] * torch.eye(o).double()[None, :, None]).flatten(0, 1)
        x, r = all_pairs(randn(*shape), r)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(layers)

            def forward(self, x):
                f = layers[1](layers[0](x))
                return f.mean(1) if kind == "pooled" else f
        model = Model()

        def loss(f, r):                # with gradient r by f, averaged over samples or tokens
            n = f.shape[0] * (f.shape[1] if kind == "tokens" else 1)
            return (0.5 * (f - (f.detach() - r)).square()).sum() / n
        optimizer = kfac_after(model, lambda f: loss(f, r), x, weight_sharing=sharing,
                               loss_terms=terms)
        for i, layer in enumerate(layers):
            A, P = (M[0] for M in factors_of(optimizer, layer))
            D = []
            for k in range(len(x)):
                f = model(x[k:k + 1])
                for t in range(S if kind == "tokens" else 1):
                    one = f[:, t] if kind == "tokens" else f
                    target = one.detach() - (r[k:k + 1, t] if kind == "tokens" else r[k:k + 1])
                    grads = torch.autograd.grad((0.5 * (one - target).square()).sum(),
                                                list(layer.parameters()), retain_graph=True)
                    D.append(whole(*grads, *[None] * (2 - len(grads))).flatten())
            D = torch.stack(D)
            Fisher, product = D.T @ D / len(D), torch.kron(P, A)
            if want_exact:
                close(product, Fisher, 1e-13)
            else:
                error = ((product - Fisher).norm() / Fisher.norm()).item()
                assert error > 0.05

    check("no sharing", "expand", "samples", "plain", True)
    check("no sharing, reduce", "reduce", "samples", "plain", True)
    check("a loss for each token, expand", "expand", "tokens", "tokens", True)
    check("mean over tokens, reduce", "reduce", "samples", "pooled", True)
    check("mean over tokens, expand", "expand", "samples", "pooled", False)
    check("a loss for each token, reduce", "reduce", "tokens", "tokens", False)


def test_kfac_scaling():
    """(7), (10): factors do not depend on batch size, micro-batches or the GradScaler's scale."""
    data = make_data(1, batch=6)[0]

    def factors(**options):
        net = make_net()
        optimizer = KFAC(net, **dict(lr=0.0, tcov=1) | options)
        return net, optimizer, lambda: {k: v for k, v in snapshot(net, optimizer).items()
                                        if "covariance" in k}
    for sharing in ("expand", "reduce"):
        net, optimizer, result = factors(weight_sharing=sharing)
        F.cross_entropy(net(data[0]), data[1]).backward()
        optimizer.step()
        want = result()
        net, optimizer, result = factors(weight_sharing=sharing)
        F.cross_entropy(net(data[0].repeat(3, 1, 1, 1)), data[1].repeat(3)).backward()
        optimizer.step()
        close(result(), want, 1e-12)
        net, optimizer, result = factors(weight_sharing=sharing)
        for i in range(6):
            (F.cross_entropy(net(data[0][i:i + 1]), data[1][i:i + 1]) / 6).backward()
        optimizer.step()
        close(result(), want, 1e-12)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 60)
        net, optimizer, result = factors(weight_sharing=sharing, grad_scaler=scaler)
        scaler.scale(F.cross_entropy(net(data[0]), data[1])).backward()
        scaler.step(optimizer)
        close(result(), want, 1e-14)
    layer = nn.Linear(4, 3).double()
    x, y = randn(5, 6, 4), torch.randint(3, (5, 6))
    P = [list(factors_of(kfac_after(layer, lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten()),
                                    x, loss_terms=terms), layer))[1] for terms in
         ("samples", "tokens")]
    g = (layer(x).softmax(2) - F.one_hot(y, 3)).flatten(0, 1)
    close(P[1][0], g.T @ g / 30, 1e-14)
    close(6 * P[0], P[1], 1e-14)


def test_kfac_sampled_again():
    """A backward pass without sample_fisher() costs its own step only, and nan logits no crash."""
    net = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer, x = KFAC(net, lr=0.1, tcov=1, fisher="sampled"), randn(5, 4)
    net(x).square().sum().backward()
    raises(RuntimeError, ["sample_fisher"], optimizer.step)
    for scale in (1.0, 1.0):
        optimizer.zero_grad()
        logits = scale * net(x)
        optimizer.sample_fisher(logits)
        logits.square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    logits = net(x) * float("nan")
    optimizer.sample_fisher(logits)
    logits.sum().backward()
    raises(FloatingPointError, ["0"], optimizer.step)


def test_kfac_sampled():
    """Labels of sample_fisher: forced ones give their empirical factors; the mean is the Fisher."""
    torch.manual_seed(0)
    x, y = make_data(1)[0]
    forced = torch.randint(5, (6,))
    draw = kfac.draw_labels

    def run(fisher, labels, reduce, parts=1, **options):
        net = make_net(**options)
        optimizer = KFAC(net, lr=0.1, tcov=1, fisher=fisher, weight_sharing=reduce)
        for part, label, other in zip(x.chunk(parts), labels.chunk(parts), forced.chunk(parts)):
            kfac.draw_labels = lambda logits: other
            logits = net(part)
            if fisher == "sampled":
                before = {name: p.grad for name, p in net.named_parameters()}
                optimizer.sample_fisher(logits)
                optimizer.sample_fisher(logits)               # its labels are drawn already
                assert all(p.grad is before[name] for name, p in net.named_parameters())
            (F.cross_entropy(logits, label) / parts).backward()
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()
                     if p.grad is not None}
        optimizer.step()
        return gradients, {k: v for k, v in snapshot(net, optimizer).items() if "covariance" in k}
    try:
        for reduce in ("expand", "reduce"):
            _, want = run("empirical", forced, reduce)
            plain, _ = run("empirical", y, reduce)
            gradients, got = run("sampled", y, reduce)
            close(got, want, 1e-13)
            close(gradients, plain, 0)
            close(run("sampled", y, reduce, parts=2)[1], want, 1e-12)
            close(run("sampled", y, reduce, checkpointing=False)[1], want, 1e-13)
    finally:
        kfac.draw_labels = draw
    # many draws of few inputs: P converges to Σ_c p_c g_c g_cᵀ, and not to the labels' factor
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 4)).double()
    x, repeats = randn(3, 4), 20000
    exact = torch.zeros(3, 3, dtype=torch.float64)
    for n in range(3):
        hidden = model[0](x[n:n + 1]).detach().requires_grad_()
        log_p = model[2](hidden.relu()).log_softmax(1)[0]
        for c in range(4):
            g, = torch.autograd.grad(log_p[c], hidden, retain_graph=True)
            exact += log_p[c].exp().detach() * g.T @ g / 3
    many = x.repeat(repeats, 1)
    optimizer = kfac_after(model, lambda z: F.cross_entropy(z, torch.zeros(len(z)).long()),
                           many, sample=True, fisher="sampled")
    P = list(factors_of(optimizer, model[0]))[1][0]
    close(P, exact, 0.03)
    optimizer = kfac_after(model, lambda z: F.cross_entropy(z, torch.zeros(len(z)).long()),
                           many)
    P = list(factors_of(optimizer, model[0]))[1][0]
    raises(RuntimeError, ("sample_fisher", "before each"), lambda: kfac_after(
        model, lambda z: z.sum(), x, fisher="sampled"))
    raises(RuntimeError, ("fisher='sampled'",), lambda: KFAC(model).sample_fisher(x))


def dead_features(seed):
    """A float32 covariance of 51 inputs, few of them ever non-zero, on which LAPACK may give up."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.randperm(50, generator=generator)[:7 + seed % 8]
    X = torch.rand(len(live), 3 * len(live), generator=generator)
    A = torch.zeros(51, 51)
    A[live[:, None], live] = X @ X.mT / X.shape[1]
    return A


def test_kfac_dead_features():
    """(4) where float32 eigenvalues fail: some of these raise, some return nan."""
    worst = 0.0
    for seed in range(150):
        A = dead_features(seed)
        vectors, values, failed = kfac.eigenbasis(A)
        assert not failed, seed
        worst = max(worst, ((vectors * values) @ vectors.mT - A).abs().max() / A.abs().max())
    close(1 + worst, 1.0, 1e-5)


def test_kfac_clip():
    """(5) over all layers, with the current lr of each group; plain parameters are not scaled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = randn(6, 4), torch.randint(3, (6,))
    lrs = {net[0]: 0.3, net[1]: 0.2, net[2]: 0.05}
    seen = {}
    for kl_clip in (None, 1e-3, 1e9):
        optimizer = KFAC(net, params=[{"params": list(m.parameters()), "lr": lr}
                                      for m, lr in lrs.items()], kl_clip=kl_clip)
        optimizer.param_groups[0]["lr"] *= 0.5                       # as a scheduler does
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        plain, kfac.sgd_step = kfac.sgd_step, lambda _: seen.update(
            {kl_clip: {name: p.grad.clone() for name, p in net.named_parameters()}})
        try:
            optimizer.step()
        finally:
            kfac.sgd_step = plain
    raw = {name: p.grad for name, p in net.named_parameters()}
    total = sum(lr ** 2 * (seen[None][name] * raw[name]).sum() for lr, names in
                ((0.15, ("0.weight", "0.bias")), (0.05, ("2.weight", "2.bias"))) for name in names)
    nu = min(1.0, (1e-3 / total.item()) ** 0.5)
    assert nu < 1
    want = {name: value * (1 if name.startswith("1") else nu) for name, value in seen[None].items()}
    close(seen[1e-3], want, 1e-13)
    close(seen[1e9], seen[None], 0)
    close({"1": seen[1e-3]["1.weight"]}, {"1": raw["1.weight"]}, 0)


def test_kfac_shares():
    """Ranks share the factorisations: every job has one owner, and the longest load shrinks."""
    costs = [side.d ** 3 * side.blocks for layer in KFAC(make_net()).layers.values()
             for side in (layer, layer.outputs)]
    wide = [(w * 9) ** 3 for w in [64] * 5 + [128] * 4 + [256] * 4 + [512] * 3] + [512 ** 3] * 16
    for name, jobs in (("a small network", costs), ("ResNet-18", wide)):
        before = sum(jobs)
        for world in (1, 2, 3, 4, 8):
            owners = kfac.shares(jobs, world)
            assert len(owners) == len(jobs) and set(owners) <= set(range(world))
            longest = max(sum(c for c, o in zip(jobs, owners) if o == r) for r in range(world))
            best = max(max(jobs), sum(jobs) / world)
            assert longest <= min(before, 4 / 3 * best), (name, world)
            before = longest


def test_kfac_transcription():
    """Twelve steps of a small network against the update written out in numpy."""
    for inverse in ("factored", "eigen"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
        lr, mu, wd, lam, beta, kappa, tcov, tinv = 0.1, 0.9, 1e-2, 0.03, 0.8, 1e-3, 2, 3
        optimizer = KFAC(net, lr=lr, momentum=mu, weight_decay=wd, damping=lam, stat_decay=beta,
                         tcov=tcov, tinv=tinv, inverse=inverse, kl_clip=kappa)
        W = [whole(net[0].weight, net[0].bias).detach().numpy().copy(),
             net[2].weight.detach().numpy().copy()]
        M, mA, mP, old = [0, 0], [0, 0], [0, 0], [None, None]
        for t in range(12):
            x, y = randn(5, 3) + 1, randn(5, 2)
            optimizer.zero_grad()
            (net(x) - y).square().sum(1).mean().backward()
            optimizer.step()
            a1 = np.c_[x.numpy(), np.ones(5)]
            a2 = np.tanh(a1 @ W[0].T)
            g2 = 2 * (a2 @ W[1].T - y.numpy())                      # of one term; the loss has /5
            g1 = g2 @ W[1] * (1 - a2 ** 2)
            U, G, clip = [], [], 0.0
            for i, (a, g) in enumerate(((a1, g1), (a2, g2))):
                if t % tcov == 0:
                    mA[i] = beta * mA[i] + (1 - beta) * a.T @ a / 5
                    mP[i] = beta * mP[i] + (1 - beta) * g.T @ g / 5
                if t % tinv == 0:
                    correction = 1 - beta ** (t // tcov + 1)
                    A, P = mA[i] / correction, mP[i] / correction
                    pi = np.sqrt(np.trace(A) / len(A) / (np.trace(P) / len(P)))
                    old[i] = (np.linalg.inv(A + pi * lam ** 0.5 * np.eye(len(A))),
                              np.linalg.inv(P + lam ** 0.5 / pi * np.eye(len(P))),
                              np.linalg.inv(np.kron(P, A) + lam * np.eye(len(A) * len(P))))
                G.append(g.T @ a / 5)
                U.append(old[i][1] @ G[i] @ old[i][0] if inverse == "factored" else
                         (old[i][2] @ G[i].ravel()).reshape(G[i].shape))
                clip += lr ** 2 * (U[i] * G[i]).sum()
            for i in (0, 1):
                M[i] = mu * M[i] + min(1, (kappa / clip) ** 0.5) * U[i] + wd * W[i]
                W[i] = W[i] - lr * M[i]
        close(whole(net[0].weight, net[0].bias), W[0], 1e-11)
        close(net[2].weight, W[1], 1e-11)


def test_kfac_singular():
    """Dead ReLU, constant input, no gradient, tiny damping: finite, or an error that says."""
    torch.manual_seed(0)

    def step(input_of, damping, inverse, bias=True, scale=1.0, steps=3):
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=bias))
        optimizer = KFAC(net, lr=0.1, damping=damping, tcov=1, tinv=1, inverse=inverse)
        for _ in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(net(input_of(net)), torch.tensor([0, 1, 2, 0])) * scale).backward()
            try:
                optimizer.step()
            finally:
                assert all(p.isfinite().all() for p in net.parameters())

    def dead(net):
        with torch.no_grad():
            net[0].bias.fill_(-100.0)
        return torch.randn(4, 4)

    def constant(net):
        return torch.full((4, 4), 3.0)
    for inverse in ("factored", "eigen"):
        for name, inputs, scale in (("dead ReLU", dead, 1.0), ("constant input", constant, 1.0),
                                    ("zero input", lambda net: torch.zeros(4, 4), 1.0),
                                    ("no gradient", lambda net: torch.randn(4, 4), 0.0),
                                    ("tiny gradient", lambda net: torch.randn(4, 4), 1e-25)):
            for damping in (1.0, 1e-3):
                for bias in (True, False):
                    step(inputs, damping, inverse, bias, scale)
        for damping in (1e-16, 1e-30, 1e-45):
            raises(FloatingPointError, ("layer ", str(damping), "raise damping"),
                   lambda: step(constant, damping, inverse))
    raises(FloatingPointError, ("inputs of layer 0 ", "not finite"),
           lambda: step(lambda net: torch.full((4, 4), 1e30), 1.0, "factored"))
    raises(FloatingPointError, ("gradients of layer ", "not finite"),
           lambda: step(constant, 1.0, "factored", scale=1e30))


def test_kfac_interface():
    """What is refused, and what is said."""
    net = make_net()
    for name, value in (("fisher", "true"), ("inverse", "exact"), ("weight_sharing", "none"),
                        ("loss_terms", "rows"), ("kl_clip", 0.0), ("kl_clip", float("nan")),
                        ("damping", 0.0), ("tinv", 0)):
        raises(ValueError, (name, str(value)), lambda: KFAC(net, **{name: value}))
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)}).double()
    optimizer = KFAC(model)
    model["head"](model["body"](randn(4, 3))).sum().backward()
    raises(RuntimeError, ("loss terms", "parts"), optimizer.step)
    text = repr(KFAC(net))
    for words in ("head: 5×9, Kronecker factors", "encoder.self_attn.out_proj", "plain step"):
        assert words in text, words


# ---------------------------------------------------------------------------------------------
# NysAct
# ---------------------------------------------------------------------------------------------

def activations(rows, d, rank=None):
    """Rows as after a ReLU: a large mean and a decaying spectrum, or one of the given rank."""
    scale = torch.arange(1, (rank or d) + 1).double() ** -1
    X = (randn(rows, rank or d) * scale) @ randn(rank or d, d)
    return X if rank else (X + 0.3 * randn(d)).relu()


def second_moment(X):
    return X.mT @ X / X.shape[-2]


def rebuilt(U, eigenvalues):
    return U * eigenvalues.unsqueeze(-2) @ U.mT


def sketches(blocks, d, r):
    return [(kind, nysact.draw_sketch(blocks, d, r, kind, 3))
            for kind in ("gaussian", "subcolumns")]


def test_nysact_constant_rows():
    """Columns of a covariance of rank one in float32: their rounding shows in eigenvalues only."""
    refused, errors = 0, []
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(1, 29).expand(3000, 29).contiguous()
        a = F.pad(x[0], (0, 1), value=1.0)
        for kind in ("gaussian", "subcolumns"):
            net = nn.Linear(29, 3)
            optimizer = NysAct(net, lr=0.0, tcov=1, tinv=1, sketch=kind, seed=seed)
            net(x).square().mean().backward()
            try:
                optimizer.step()
                errors.append(optimizer.state[net.weight]["eigenvalues"].max() / a.square().sum())
            except FloatingPointError:
                refused += 1
    close(refused, 0, 0)
    close(torch.stack(errors), torch.ones(len(errors)), 1e-4)


def test_nysact_nystrom():
    """(5) against Y (SᵀY)⁻¹ Yᵀ; Â S = A S; 0 ⪯ Â ⪯ A; Â = A if A has rank ≤ r."""
    torch.manual_seed(0)
    eigenvalues = torch.linalg.eigvalsh
    for d, r in ((12, 1), (40, 5), (40, 39), (150, 10)):
        A = torch.stack([second_moment(activations(4 * d, d)) for _ in range(3)])
        for kind, S in sketches(3, d, r):
            Y = A @ S
            U, λ, well = nysact.nystrom(Y, S)
            assert well.all() and U.shape == (3, d, r) and λ.shape == (3, r)
            A_hat, name = rebuilt(U, λ), f"d {d}, r {r}, {kind}"
            plain = Y @ torch.linalg.solve(S.mT @ Y, Y.mT)
            close(A_hat, plain, 1e-9)
            close(A_hat @ S, Y, 1e-12)
            close(U.mT @ U, torch.eye(r).expand(3, r, r), 1e-12)
            at_most(1 + eigenvalues(A_hat - A)[:, -1] / λ[:, 0], 1.0, 1e-13)
            at_most(torch.cat([λ, -λ]), torch.cat( [eigenvalues(A).flip(1)[:, :r], torch.zeros(3,
                                                                                               r)]))
    for kind, S in sketches(1, 60, 10):
        for rank in (1, 3, 10):
            A = second_moment(activations(50, 60, rank))
            close(rebuilt(*nysact.nystrom(A @ S, S)[:2])[0], A, 1e-9)


def test_nysact_rank():
    """Â depends on range(S) only; what it sees of one outlier."""
    torch.manual_seed(0)
    A, S = second_moment(activations(99, 30)), nysact.draw_sketch(1, 30, 6, "gaussian", 0)
    M = torch.linalg.qr(randn(6, 6))[0]
    close(rebuilt(*nysact.nystrom(A @ S @ M, S @ M)[:2]), rebuilt(*nysact.nystrom(A @ S, S)[:2]),
          1e-11)
    v, λ, σ = torch.linalg.qr(randn(30, 1))[0], 7.0, 0.2
    A, s = λ * v @ v.T + σ * torch.eye(30).double(), (S[0].T @ v).square().sum()
    close(v.T @ rebuilt(*nysact.nystrom(A @ S, S)[:2])[0] @ v, ((λ + σ) ** 2 * s / (λ * s +
                                                                                    σ)).view(1, 1),
          1e-12)


def test_nysact_multiplier():
    """(2) against the dense inverse and Woodbury's; ρ times it at rank 1 is MAC's (3)."""
    torch.manual_seed(0)
    for shape, blocks, bias in (((6, 15), 1, True), ((6, 15), 1, False), ((9, 14), 3, True),
                                ((8, 2, 3, 4), 1, True), ((8, 2, 3, 4), 4, True),
                                ((8, 2, 3, 4), 2, False)):
        d, got, want, woodbury = math.prod(shape[1:]) + bias, {}, {}, {}
        A = torch.stack([second_moment(activations(99, d)) for _ in range(blocks)])
        S = nysact.draw_sketch(blocks, d, 4, "gaussian", 0)
        Y = A @ S
        U, λ, _ = nysact.nystrom(Y, S)
        for ρ in (1e-3, 1.0, 30.0):
            G, g = randn(*shape), randn(shape[0]) if bias else None
            new = nysact.precondition(G, g, U, λ, ρ)
            parts = [None] * blocks if g is None else g.chunk(blocks)
            old = [dense(*part, ρ) for part in zip(G.chunk(blocks), parts, rebuilt(U, λ))]
            inner = torch.linalg.solve(ρ * S.mT @ Y + Y.mT @ Y, Y.mT)
            rows = G.reshape(blocks, -1, d - bias)
            rows = rows if g is None else torch.cat([rows, g.view(blocks, -1, 1)], 2)
            rows = ((rows - rows @ Y @ inner) / ρ)[:, :, :d - bias].reshape(shape)
            got[ρ, "weight"], want[ρ, "weight"] = new[0], torch.cat([x for x, _ in old]) / ρ
            woodbury[ρ, "weight"] = rows
            if bias:
                got[ρ, "bias"], want[ρ, "bias"] = new[1], torch.cat([x for _, x in old]) / ρ
                woodbury[ρ, "bias"] = new[1]
        close(got, want, 1e-11)
        close(got, woodbury, 1e-9)
    like = randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    for new in (nysact.precondition(like, None, randn(1, 36, 2), randn(1, 2).abs(), 1.0)[0],
                nysact.precondition_exact(like, None, torch.eye(36).double()[None])[0]):
        assert new.stride() == like.stride(), "the memory layout is the gradient's"
    a, G, g = randn(1, 9), randn(5, 8), randn(5)
    size = a.norm(dim=1, keepdim=True)
    new = nysact.precondition(G, g, (a / size).unsqueeze(2), size ** 2, 0.3)
    for got, want in zip(new, mac.precondition(G, g, a, 0.3)):
        close(0.3 * got, want, 1e-13)


def test_nysact_conv_geometries():
    """(3) Σ a aᵀS against explicit patches, with and without the coordinate 1, in chunks or not."""
    torch.manual_seed(0)
    chunk, got, want = nysact.CHUNK, {}, {}
    try:
        for i, (C, out, size, options) in enumerate(GEOMETRIES):
            conv, x = nn.Conv2d(C, out, **options).double(), randn(3, C, *size)
            rows = explicit_patches(x, conv)                                # (groups, R, d)
            nysact.CHUNK = chunk if i % 2 else 1
            for bias in (0, 1):
                a = F.pad(rows, (0, bias), value=1.0)
                d = a.shape[2]
                for kind, r in (("gaussian", min(3, d)), ("subcolumns", min(2, d)),
                                ("gaussian", d)):
                    S = nysact.draw_sketch(conv.groups, d, r, kind, i)
                    got[i, bias, kind, r] = nysact.sketched_patches(x, conv, S)
                    want[i, bias, kind, r] = a.mT @ (a @ S)
    finally:
        nysact.CHUNK = chunk
    close(got, want, 1e-12)


def test_nysact_statistics():
    """(3) in the optimizer's state, per kind of layer: Y = A S with S of its own per block."""
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    apart = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=7)
    q, k, v, k6, v7 = randn(2, 5, 8), randn(2, 6, 8), randn(2, 6, 8), randn(2, 6, 6), randn(2, 6, 7)
    grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    image, tokens, attention = randn(2, 4, 5, 6), randn(2, 3, 8), models.Attention(8, 2)
    seen = []
    handle = attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for name, module, call, weights, blocks in (
            ("Linear, (B, N, d)", nn.Linear(8, 3), (tokens,), ["weight"], [[tokens]]),
            ("Linear without bias", nn.Linear(8, 3, bias=False), (tokens,), ["weight"], [[tokens]]),
            ("fused qkv: an ordinary Linear", attention, (tokens,), ["qkv.weight", "proj.weight"],
             [[tokens], [seen]]),
            ("nn.MultiheadAttention: q, k, v", mha, (q, k, v), ["in_proj_weight"], [[q, k, v]]),
            ("the same with kdim, vdim", apart, (q, k6, v7),
             ["q_proj_weight", "k_proj_weight", "v_proj_weight"], [[q], [k6], [v7]]),
            ("grouped convolution", grouped, (image,), ["weight"],
             [explicit_patches(image, grouped.double())])):
        optimizer = NysAct(module.double(), lr=0.0, rank=3)
        out = module(*call)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        optimizer.step()
        got, want, layers = {}, {}, {p: layer for p, layer in optimizer.layers.items()}
        for weight, inputs in zip(weights, blocks):
            layer = layers.pop(module.get_parameter(weight))
            S = nysact.draw_sketch(*layer.shape, "gaussian", layer.seed)
            inputs = seen if inputs is blocks[-1] and inputs == [seen] else inputs
            rows = [F.pad(x.reshape(-1, x.shape[-1]), (0, int(layer.bias is not None)), value=1.0)
                    for x in inputs]
            got[weight] = optimizer.state[layer.weight]["sketched"]
            want[weight] = torch.stack([second_moment(a) @ s for a, s in zip(rows, S)])
        assert not layers, [layer.name for layer in layers.values()]
        close(got, want, 1e-12)
    handle.remove()


def test_nysact_transcription():
    """Twenty steps of a small network against the update in numpy, with dense inverses."""
    β, ρ, η, μ, wd, r = 0.9, 0.5, 0.05, 0.9, 0.01, 3
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).double()
    optimizer = NysAct(net, lr=η, momentum=μ, weight_decay=wd, damping=ρ, stat_decay=β, tcov=2,
                       tinv=4, rank=r, seed=5)
    S = [nysact.draw_sketch(*layer.shape, "gaussian", layer.seed)[0].numpy()
         for layer in optimizer.layers.values()]
    W = [torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().numpy().copy(),
         net[2].weight.detach().numpy().copy()]
    C, M, P, updates = [0, 0], [0, 0], [None, None], 0
    for step in range(20):
        x, y = randn(7, 6), torch.randint(4, (7,))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        G = [torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1).numpy().copy(),
             net[2].weight.grad.numpy().copy()]
        a = [np.c_[x.numpy(), np.ones(7)]]
        a.append(np.tanh(a[0] @ W[0].T))
        updates += step % 2 == 0
        for i in (0, 1):
            if step % 2 == 0:
                C[i] = β * C[i] + (1 - β) * a[i].T @ a[i] / 7               # the whole covariance
            if step % 4 == 0:
                Y = C[i] / (1 - β ** updates) @ S[i]
                P[i] = np.linalg.inv(Y @ np.linalg.inv(S[i].T @ Y) @ Y.T + ρ * np.eye(len(Y)))
            M[i] = μ * M[i] + G[i] @ P[i] + wd * W[i]
            W[i] = W[i] - η * M[i]
        optimizer.step()
    close(torch.cat([net[0].weight, net[0].bias[:, None]], 1), torch.tensor(W[0]), 1e-10)
    close(net[2].weight, torch.tensor(W[1]), 1e-10)


def test_nysact_exact_layers():
    """(6) With d ≤ r every layer is FOOF's, through a whole run; the first above r is not."""
    data, runs = make_data(8), {}
    for name, cls, options in (("nysact", NysAct, dict(rank=1000)), ("foof", FOOF, {})):
        net = make_net()
        optimizer = cls(net, lr=0.1, weight_decay=1e-2, tcov=2, tinv=3, **options)
        usual(net, optimizer, data)
        runs[name] = {key: p.detach().clone() for key, p in net.named_parameters()}
    close(runs["nysact"], runs["foof"], 1e-11)
    for rank in (9, 10, 11):
        net = nn.Linear(9, 4).double()
        layer = NysAct(net, rank=rank).layers[net.weight]
        assert layer.exact == (rank >= 10) and layer.shape == (1, 10, min(rank, 10))


def released(A, S, damping):
    """U and λ̂ as in the authors' released code: ĈL⁻¹, and a large shift, of SᵀĈ alone."""
    C = A @ S + damping * S
    W = S.mT @ C
    shift = torch.linalg.eigvalsh(W)[0, 0].abs() + damping
    L = torch.linalg.cholesky(W + shift * torch.eye(W.shape[-1], dtype=W.dtype))
    U, sigma, _ = torch.linalg.svd(C @ torch.linalg.inv(L), full_matrices=False)
    return U, (sigma.square() - shift).clamp(min=0)


def test_nysact_condition_number():
    """What (Â + ρI)⁻¹ is for: the condition number of (Â + ρI)⁻¹(A + ρI), by rank; d = 200."""
    torch.manual_seed(0)
    ρ, d, eigenvalues = 1.0, 200, torch.linalg.eigvalsh
    X = ((randn(4000, d) * torch.arange(1, d + 1) ** -0.85) @ randn(d, d) + randn(d)).relu()
    A = second_moment(X)
    A = A * 10.3 / eigenvalues(A)[-1]                          # decaying, with one outlier
    R, λ = torch.linalg.cholesky(A + ρ * torch.eye(d)), eigenvalues(A).flip(0)

    def condition(U, λ_hat):
        # R = G in (2) gives RᵀP, and RᵀP R has the eigenvalues of P (A + ρI)
        values = eigenvalues(nysact.precondition(R.mT.contiguous(), None, U, λ_hat, ρ)[0] @ R)
        return values[-1] / values[0], values[0]
    for r, target in ((5, 2.2), (10, 1.5), (50, 1.1)):
        for kind in ("gaussian", "subcolumns"):
            draws = [nysact.draw_sketch(1, d, r, kind, seed) for seed in range(9)]
            ours = [condition(*nysact.nystrom(A @ S, S)[:2]) for S in draws]
            theirs = torch.stack([condition(*released(A, S, ρ))[0] for S in draws]).median()
            ours, smallest = (torch.stack(x) for x in zip(*ours))
            assert ours.median() <= target * (1 if kind == "gaussian" else 1.05)
            assert theirs > 1.3 * ours.median()
            close(smallest.clamp(max=1.0), torch.ones(9), 1e-12)


def test_nysact_stationary_input():
    """(4) The average does not drift: the same batch for 40 steps leaves Y = A S."""
    torch.manual_seed(0)
    X, net = activations(64, 30), nn.Linear(30, 4, bias=False).double()
    optimizer = NysAct(net, lr=0.1, tcov=1, tinv=1, rank=6)
    layer = optimizer.layers[net.weight]
    S = nysact.draw_sketch(*layer.shape, "gaussian", layer.seed)
    for step in range(40):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    state = optimizer.state[net.weight]
    close(state["sketched"], second_moment(X) @ S, 1e-13)
    close(rebuilt(state["U"], state["eigenvalues"]), rebuilt(*nysact.nystrom(second_moment(X) @ S,
                                                                             S)[:2]), 1e-11)


def test_nysact_sketches():
    """S: orthonormal; drawn from seed and place alone; another one's average is refused."""
    for kind, S in sketches(3, 20, 6):
        close(S.mT @ S, torch.eye(6).expand(3, 6, 6), 1e-14)
        assert not torch.equal(S[0], S[1]), "each block has its own"
        if kind == "subcolumns":
            assert ((S == 0) | (S == 1)).all()
    S = nysact.draw_sketch(2, 5, 5, "gaussian", 0)
    close(S, torch.eye(5).expand(2, 5, 5), 0)

    def drawn(seed=0, noise=0, **options):
        torch.manual_seed(noise)
        net = make_net(seed=noise)
        optimizer = NysAct(net, rank=5, seed=seed, **options)
        torch.rand(noise)                            # the global generator plays no part
        return {layer.name: layer.sketch(torch.zeros(1, dtype=torch.float64))
                for layer in optimizer.layers.values()}
    for kind in ("gaussian", "subcolumns"):
        first, second = drawn(sketch=kind), drawn(1, sketch=kind)
        close(drawn(sketch=kind, noise=7), first, 0)
        assert all(not torch.equal(first[key], second[key]) for key in first), "seed counts"
    all_seeds = [layer.seed for layer in NysAct(make_net(), rank=2).layers.values()]
    assert len(set(all_seeds)) == len(all_seeds), "each layer has its own"

    data = make_data(4)
    net = make_net()
    optimizer = NysAct(net, rank=5, seed=3, sketch="subcolumns", tcov=1, tinv=2)
    usual(net, optimizer, data)
    other = make_net()
    resumed = NysAct(other, rank=4, seed=4, tcov=1, tinv=2)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((net, optimizer), (other, resumed)):
        usual(model, opt, data)
    close(snapshot(other, resumed), snapshot(net, optimizer), 0)
    for group in resumed.param_groups:
        group["seed"] = 5
    resumed.load_state_dict(resumed.state_dict())
    raises(FloatingPointError, ["conv1", "another sketch", "same seed"],
           lambda: usual(other, resumed, data))


def test_nysact_hard_inputs():
    """Zero, constant, rank-deficient, huge inputs, tiny damping: a finite step or a named error."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        inputs = {"zero": torch.zeros(64, 40), "constant": torch.full((64, 40), 3.0),
                  "rank 1": torch.rand(64, 1) * torch.rand(40), "two samples": torch.rand(2, 40),
                  "rank 3, tiny": (torch.rand(64, 3) @ torch.rand(3, 40)) * 1e-12,
                  "large": torch.rand(64, 40) * 1e6, "one dead half": torch.rand(64, 40)
                  * (torch.arange(40) < 20)}
        for kind in ("gaussian", "subcolumns"):
            for damping in (1e-8, 1.0):
                worst = 0.0
                for name, x in inputs.items():
                    net = nn.Linear(40, 5).to(dtype)
                    optimizer = NysAct(net, lr=1e-6, damping=damping, sketch=kind, tcov=1, tinv=1)
                    for _ in range(3):
                        optimizer.zero_grad()
                        F.mse_loss(net(x.to(dtype)) / x.abs().max().clamp(min=1), torch.ones(
                            len(x), 5, dtype=dtype)).backward()
                        optimizer.step()
                    assert all(p.isfinite().all() for p in net.parameters()), (name, kind, damping)
                    state = optimizer.state[net.weight]
                    A = second_moment(F.pad(x.double(), (0, 1), value=1.0))
                    excess = torch.linalg.eigvalsh(
                        rebuilt(state["U"].double(), state["eigenvalues"].double())[0] - A)[-1]
                    worst = max(worst, (excess / torch.linalg.eigvalsh(A)[-1]).item())
                close(1 + max(worst, 0), 1.0, 50 * torch.finfo(dtype).eps)
    net = nn.Sequential(nn.Linear(40, 5))
    optimizer = NysAct(net)
    (net(torch.rand(9, 40) * 1e18) * 1e-30).sum().backward()
    before = snapshot(net, optimizer)
    raises(FloatingPointError, ["layer 0", "scale"], optimizer.step)
    close({k: v for k, v in snapshot(net, optimizer).items() if k in before}, before, 0)


def test_nysact_dead_features():
    """(5) where float32 eigenvalues fail, as test_kfac_dead_features."""
    worst, S = 0.0, torch.eye(51)[None, :, :50]
    for seed in range(150):
        A = dead_features(seed)
        U, eigenvalues, well = nysact.nystrom(A[None] @ S, S)
        assert well, seed
        error = rebuilt(U.double(), eigenvalues.double())[0] - A
        worst = max(worst, error.abs().max() / A.abs().max())
    close(1 + worst, 1.0, 1e-5)


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


def test_nysact_memory():
    """Nothing of the size d×d, nor of a batch's patches, in hook and step; state within bounds."""
    torch.manual_seed(0)
    small = torch.randn(4, 64, 8, 8)
    for name, layer, x in (
            ("Conv2d, d = 576", nn.Conv2d(64, 32, 3, padding=1), small),
            ("Conv2d, circular", nn.Conv2d(64, 32, 3, padding="same", padding_mode="circular"),
             small),
            ("grouped Conv2d", nn.Conv2d(64, 64, 5, groups=2), torch.randn(4, 64, 9, 9)),
            ("Linear, d = 700", nn.Linear(700, 16), torch.randn(24, 700))):
        d, net = layer.weight[0].numel(), nn.Sequential(layer)
        optimizer = NysAct(net, tcov=1, tinv=1)
        for _ in range(2):
            optimizer.zero_grad()
            y = net(x)
            y.square().mean().backward()
            found = Allocations()
            with found, torch.no_grad():
                hook, = optimizer.hooks.values()
                hook.statistics(layer, {"input": x}, y, dict(hook.layers))
                optimizer.step()
        positions = y[0, 0].numel() if y.dim() == 4 else 1
        patches = len(x) * positions * d * getattr(layer, "groups", 1)
        padded = x[0, 0].numel() if y.dim() == 2 else (x.shape[2] + 4) * (x.shape[3] + 4)
        bound = max(layer.weight.numel() + 32, 2 * len(x) * 10 * positions, len(x) * x.shape[1]
                    * (padded if x.dim() == 4 else 1), 3 * 10 * d)
        size, operation = found.largest
        assert size <= bound < d * d and (x.dim() == 2 or bound < patches), (size, bound)

    net = models.CIFAR_MODELS["resnet20"]()
    optimizer = NysAct(net)
    F.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()
    state = sum(x.numel() for state in optimizer.state.values() for x in state.values()
                if torch.is_tensor(x))
    params, layers = sum(p.numel() for p in net.parameters()), list(optimizer.layers.values())
    Σd = sum(layer.shape[1] for layer in layers)
    Σdm = sum(layer.shape[1] * len(layer.weight) for layer in layers)
    bound = params * (1 + 3 * 10 * Σd / Σdm)
    sketch = sum(math.prod(layer.shape) for layer in layers)
    assert state <= bound
    assert f"{4 * (state - params):,} bytes of statistics" in repr(optimizer)


def test_nysact_precision():
    """Statistics of convolutions are not taken in TF32 or bf16, and the user's modes come back."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has no setting per operation")
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv,
                torch.backends.mkldnn.conv]
    before = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        mine = [backend.fp32_precision for backend in backends]
        for device, ours in (("cpu", backends[1::2]), ("cuda", backends[::2])):
            with contextlib.suppress(KeyError), warnings.catch_warnings():
                warnings.simplefilter("ignore")          # autocast's, where there is no GPU
                with nysact.full_precision(device):
                    assert {backend.fp32_precision for backend in ours} == {"ieee"}
                    raise KeyError
        assert [backend.fp32_precision for backend in backends] == mine
        torch.manual_seed(0)
        conv, x = nn.Conv2d(16, 4, 3), torch.randn(8, 16, 9, 9)
        S = nysact.draw_sketch(1, 145, 5, "gaussian", 0)
        optimizer = NysAct(conv, rank=5, lr=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv(x)
        y.float().sum().backward()
        optimizer.step()
        S = optimizer.layers[conv.weight].sketch(x).double()
        want = nysact.sketched_patches(x.double(), conv, S) / (8 * 49)
        close(optimizer.state[conv.weight]["sketched"], want, 1e-5)
    finally:
        for backend, value in zip(backends, before):
            backend.fp32_precision = value


# ---------------------------------------------------------------------------------------------
# AdaFisher: the mathematics
# ---------------------------------------------------------------------------------------------

def rows_of_conv(x, s, conv):
    """Input patches per group, (groups, R, C/groups·kh·kw), and output gradients (R, out)."""
    probe = copy.deepcopy(conv)         # patches as torch takes them: convolve with unit filters
    C, (kh, kw) = conv.in_channels, conv.kernel_size
    taps = torch.eye(kh * kw, dtype=x.dtype).view(kh * kw, 1, kh, kw).repeat(C, 1, 1, 1)
    probe.groups, probe.bias, probe.weight = C, None, nn.Parameter(taps)
    patches = probe(x).detach()                                             # (N, C·kh·kw, oH, oW)
    patches = patches.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    return patches, s.movedim(1, -1).flatten(0, 2)


def adafisher_step(layer, x, Optimizer=AdaFisher, **options):
    """One step on a random linear function of layer(x); returns s of all output entries, and it."""
    optimizer = Optimizer(layer, **options)
    output = layer(x)
    s = randn(*output.shape)
    (output * s).sum().backward()
    optimizer.step()
    return s, optimizer


def test_adafisher_diagonals():
    """(1) H and S against the diagonals of the dense factors of explicit rows."""
    torch.manual_seed(0)
    got, want = {}, {}

    def check(name, layer, x, X, s_rows):
        s, optimizer = adafisher_step(layer, x)
        X, s = (X, s_rows(s)) if torch.is_tensor(X) else X(x, s)
        X = X if X.dim() == 3 else X[None]                                  # (groups, R, d)
        if layer.bias is not None:
            X = F.pad(X, (0, 1), value=1.0)
        R = X.shape[1]
        got[name, "H"], got[name, "S"] = (optimizer.state[layer.weight][key] for key in "HS")
        want[name, "H"] = torch.stack([(A.T @ A / R).diagonal() for A in X])
        want[name, "S"] = (R ** 2 * s.T @ s / R).diagonal()                 # s of a mean over rows

    x = randn(7, 5)
    for bias in (True, False):
        check(f"linear, bias {bias}", nn.Linear(5, 4, bias).double(), x, x, lambda s: s)
    x = randn(3, 4, 2, 5)
    check("linear, 4-D", nn.Linear(5, 4).double(), x, x.flatten(0, 2), lambda s: s.flatten(0, 2))
    for options in (dict(), dict(padding=1), dict(stride=2, padding=(2, 1)),
                    dict(dilation=2, padding=1), dict(groups=4, bias=False),
                    dict(groups=2, padding="same", dilation=(2, 1)),
                    dict(padding="valid", stride=(1, 3)), dict(padding=2, padding_mode="reflect"),
                    dict(padding=1, padding_mode="circular", groups=2, stride=2)):
        conv = nn.Conv2d(4, 8, (3, 2), **options).double()
        check(f"conv {options}", conv, randn(3, 4, 7, 8),
              lambda x, s: rows_of_conv(x, s, conv), None)
    conv = nn.Conv2d(4, 8, 3, padding=1).double()
    check("conv, unbatched", conv, randn(4, 6, 6),
          lambda x, s: rows_of_conv(x[None], s[None], conv), None)
    close(got, want, 1e-13)


def test_adafisher_norm_layers():
    """(2) H, S, F_ν and F_b against Proposition 3.1's matrices, h from the layer without affine."""
    torch.manual_seed(0)
    got, want = {}, {}
    C = 6
    for name, layer, shape in (("BatchNorm1d", nn.BatchNorm1d(C), (9, C)),
                               ("BatchNorm1d, 3-D", nn.BatchNorm1d(C), (5, C, 4)),
                               ("BatchNorm2d", nn.BatchNorm2d(C), (4, C, 3, 2)),
                               ("BatchNorm2d, eval", nn.BatchNorm2d(C).eval(), (4, C, 3, 2)),
                               ("BatchNorm3d", nn.BatchNorm3d(C), (3, C, 2, 2, 2)),
                               ("LayerNorm", nn.LayerNorm(C), (3, 5, C)),
                               ("LayerNorm, 2-D", nn.LayerNorm((2, 3)), (5, 2, 3)),
                               ("LayerNorm, no bias", nn.LayerNorm(C, bias=False), (3, C)),
                               ("GroupNorm", nn.GroupNorm(3, C), (5, C, 3, 2))):
        layer = layer.double()
        nn.init.zeros_(layer.weight)                # z = ν ⊙ h + b says nothing about h at ν = 0
        x, one = randn(*shape) * 3 + 1, float(name.startswith("Batch"))
        bare = copy.deepcopy(layer)
        nn.init.ones_(bare.weight)
        h = bare(x).detach()                        # b is 0 at first
        s, optimizer = adafisher_step(layer, x)
        last = isinstance(layer, nn.LayerNorm)
        h, s = (y.reshape(-1, C) if last else y.movedim(1, -1).reshape(-1, C) for y in (h, s))
        T = len(h)
        H, S = h.T @ h / T, T ** 2 * s.T @ s / T
        state = optimizer.state[layer.weight]
        got[name, "H"], want[name, "H"] = state["H"][0] + one, H.diagonal()  # up to the constant 1
        got[name, "S"], want[name, "S"] = state["S"], S.diagonal()
        minmax = [adafisher.min_max(v) for v in (want[name, "H"] - one, want[name, "S"])]
        got[name, "ν"] = optimizer.curvature[layer.weight].flatten()
        want[name, "ν"] = minmax[0] * minmax[1]
        if layer.bias is not None:
            got[name, "b"], want[name, "b"] = optimizer.curvature[layer.bias].flatten(), minmax[1]
        product = torch.einsum("xc,xd->cd", h, h) / T * S                    # Hadamard
        close(product.diagonal(), (state["H"][0] + one) * state["S"], 1e-12)
    ν = [key for key in got if key[1] == "ν" and "Batch" in key[0] and "eval" not in key[0]]
    close({key: got.pop(key) for key in ν}, {key: want.pop(key) for key in ν}, 1e-7)
    close(got, want, 1e-12)


def test_adafisher_batch_norm_finding():
    """E[h²] = σ²/(σ² + ε), in float32: what is stored keeps the digits that 1 − ε/σ² loses."""
    torch.manual_seed(0)
    x = torch.randn(64, 5) * torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0]) + 5
    layer = nn.BatchNorm1d(5)
    optimizer = AdaFisher(layer)
    layer(x).square().sum().backward()
    optimizer.step()
    variance = x.double().var(0, correction=0)
    H = optimizer.state[layer.weight]["H"][0].double()
    close(H * (variance + 1e-5) / -1e-5, torch.ones(5), 1e-5)


def test_adafisher_min_max():
    """(4): numpy; constants up to rounding; invariance to shift, scale; a dead layer's F̃ = λ."""
    torch.manual_seed(0)
    v = randn(40).exp()
    n = v.numpy()
    want = torch.tensor((n - n.min()) / (n.max() - n.min()))
    close(adafisher.min_max(v), want, 1e-15)
    close(adafisher.min_max(v * 2.0 ** 30), adafisher.min_max(v), 0)
    close(adafisher.min_max(v * 1e-9 - 3e-9), want, 1e-13)
    for dtype in (torch.float64, torch.float32):
        for value in (0.0, 1.0, -0.3, 1e-30):
            flat = torch.full((9,), value, dtype=dtype)
            flat[::2] *= 1 + torch.finfo(dtype).eps
            close(adafisher.min_max(flat), torch.zeros(9), 0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    net[0].bias.data.fill_(-100.0)                                          # all of ReLU is dead
    optimizer = AdaFisher(net, lr=0.1, damping=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(randn(6, 4)).sum().backward()
    optimizer.step()
    close(net[0].weight, before["0.weight"], 0)
    close(net[2].bias, before["2.bias"] - 0.1 / 0.5 * net[2].bias.grad, 1e-15)


def test_adafisher_kronecker():
    """(5) division by the outer product against H ⊗ S + λI on the column-major vec of [W | b]."""
    torch.manual_seed(0)
    got, want = {}, {}
    for name, layer, x in (("linear", nn.Linear(5, 4), randn(7, 5)),
                           ("linear, no bias", nn.Linear(5, 4, False), randn(7, 5)),
                           ("conv", nn.Conv2d(2, 4, 3), randn(3, 2, 5, 5)),
                           ("conv, groups", nn.Conv2d(4, 6, 2, groups=2), randn(3, 4, 5, 5))):
        layer = layer.double()
        before = [p.detach().clone() for p in layer.parameters()]
        _, optimizer = adafisher_step(layer, x, lr=0.1, damping=0.05)
        H, S = (adafisher.min_max(optimizer.state[layer.weight][key]) for key in "HS")
        after, blocks = [p.detach() for p in layer.parameters()], len(H)
        for i, (h, s) in enumerate(zip(H, S.chunk(blocks))):
            def matrix(tensors):
                parts = [t.chunk(blocks)[i] for t in tensors]
                return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in parts], 1)
            grad = matrix([p.grad for p in layer.parameters()])
            fisher = torch.kron(torch.diag(h), torch.diag(s))
            fisher = fisher + 0.05 * torch.eye(len(fisher), dtype=fisher.dtype)
            step = torch.linalg.solve(fisher, grad.T.flatten()).view(grad.T.shape).T
            got[name, i], want[name, i] = matrix(after), matrix(before) - 0.1 * step
    close(got, want, 1e-13)


def test_adafisher_golden():
    """Numbers worked out by hand for Linear(2, 2), two samples: H, S, F̃, first step; released."""
    def step(**options):
        layer = nn.Linear(2, 2).double()
        for p in layer.parameters():
            nn.init.zeros_(p)
        optimizer = AdaFisher(layer, lr=1e-3, damping=1e-3, **options)
        x = torch.tensor([[1.0, 2], [3, -1]], dtype=torch.float64)
        (layer(x) * torch.tensor([[0.5, -1], [0.25, 0.5]])).sum().backward()
        optimizer.step()
        (S, H), bias = optimizer.curvature[layer.weight], optimizer.curvature[layer.bias]
        fisher = torch.cat([(S * H)[0], bias[:, None]], 1) + 1e-3
        return (optimizer.state[layer.weight]["H"][0], optimizer.state[layer.weight]["S"], fisher,
                torch.cat([layer.weight, layer.bias[:, None]], 1))

    H, S, fisher, moved = step()
    close(H, [5, 2.5, 1], 1e-15)
    close(S, [0.625, 2.5], 1e-15)
    close(fisher, [[0.001, 0.001, 0.001], [1.001, 0.376, 0.001]], 1e-15)
    close(moved, [[-1.25, -0.75, -0.75], [-0.5e-3 / 1.001, 2.5e-3 / 0.376, 0.5]], 1e-15)
    H, S, fisher, _ = step(as_released=True)
    close(H, [0.087999998, 0.08299999925, 0.08], 1e-11)
    close(S, [0.08, 0.087999982933], 1e-11)
    close(fisher, [[0.00803999984, 0.00763999994, 0.0074], [0.008743998322, 0.008303998517,
                                                            0.008039998635]], 1e-9)


def adafisher_in_numpy(W, X, Y, steps, tcov, lr, wd, damping, gamma, beta, decoupled, released):
    """Twenty lines of the paper: a tanh network of two layers [W | b], mean squared error."""
    H, S, m, k = [0, 0], [0, 0], [0, 0], 0
    if released:
        H, S = [1, 1], [1, 1]
    minmax = lambda v, eps=0.0: (v - v.min()) / (v.max() - v.min() + eps)
    for t in range(1, steps + 1):
        x, N = X[t - 1], len(X[t - 1])
        h0 = np.c_[x, np.ones(N)]
        h1 = np.c_[np.tanh(h0 @ W[0].T), np.ones(N)]
        s1 = 2 * (h1 @ W[1].T - Y[t - 1]) / W[1].shape[0]                  # per sample
        s0 = s1 @ W[1][:, :-1] * (1 - h1[:, :-1] ** 2)
        k += (t - 1) % tcov == 0
        for i, (h, s) in enumerate(((h0, s0), (h1, s1))):
            if (t - 1) % tcov == 0 and released:
                H[i] = 0.1 * gamma * H[i] + 0.01 * gamma * minmax((h ** 2).mean(0), 1e-6)
                S[i] = 0.1 * gamma * S[i] + 0.01 * gamma * minmax(((s / N) ** 2).mean(0), 1e-6)
            elif (t - 1) % tcov == 0:
                H[i] = gamma * H[i] + (1 - gamma) * (h ** 2).mean(0)
                S[i] = gamma * S[i] + (1 - gamma) * (s ** 2).mean(0)
            fisher = damping + (np.outer(S[i], H[i]) if released else np.outer(
                minmax(S[i] / (1 - gamma ** k)), minmax(H[i] / (1 - gamma ** k))))
            g = s.T @ h / N + (0 if decoupled else wd * W[i])
            m[i] = beta * m[i] + (1 - beta) * g
            step = m[i] / (1 - beta ** t) / fisher + (wd * W[i] if decoupled else 0)
            W[i] = W[i] - lr * step
    return W


def test_adafisher_transcription():
    """(1) and (3) to (7): twenty steps of both classes against numpy."""
    for Optimizer, released, tcov in itertools.product((AdaFisher, AdaFisherW), (False, True),
                                                       (1, 3)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        X, Y = randn(20, 8, 5), randn(20, 8, 3)
        W = [torch.cat([m.weight, m.bias[:, None]], 1).detach().numpy() for m in (net[0], net[2])]
        options = dict(tcov=tcov, lr=0.01, damping=0.1, gamma=0.7, beta=0.8)
        W = adafisher_in_numpy(W, X.numpy(), Y.numpy(), 20, wd=0.1, released=released,
                               decoupled=Optimizer is AdaFisherW, **options)
        optimizer = Optimizer(net, weight_decay=0.1, as_released=released, **options)
        for x, y in zip(X, Y):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
        got = [torch.cat([m.weight, m.bias[:, None]], 1) for m in (net[0], net[2])]
        close(torch.cat([w.flatten() for w in got]), np.concatenate([w.ravel() for w in W]), 1e-11)


def test_adafisher_decoupled_decay():
    """AdaFisherW takes α·wd·θ off every parameter beside the step, whatever F̃; by groups."""
    moved = {}
    for decay in (0.0, 0.1):
        net = make_net()
        start = {name: p.detach().clone() for name, p in net.named_parameters()}
        named = dict(net.named_parameters())
        groups = [dict(params=[p for p in named.values() if p.dim() > 1], weight_decay=decay),
                  dict(params=[p for p in named.values() if p.dim() < 2])]
        optimizer = AdaFisherW(net, params=groups, lr=0.03)
        usual(net, optimizer, make_data(1))
        moved[decay] = {name: p.detach() for name, p in named.items() if p.grad is not None}
    want = {name: p - 0.03 * 0.1 * start[name] * (p.dim() > 1) for name, p in moved[0.0].items()}
    close(moved[0.1], want, 1e-13)


def test_adafisher_loss_scale():
    """F̃ does not see the loss's scale (S does); with grad_scaler= not even a change of scale."""
    def run(scale_of, **options):
        net, scaler = make_net(), torch.amp.GradScaler("cpu", init_scale=1.0)
        optimizer = AdaFisher(net, tcov=2, **{key: scaler for key in options})
        for i, (x, y) in enumerate(make_data(6)):
            scale = scale_of(i)
            scaler.scale(torch.ones(()))        # makes the scaler's tensor, which update() sets
            scaler.update(scale)
            optimizer.zero_grad()
            (loss_of(net, x, y) * scale).backward()
            for p in net.parameters():
                if p.grad is not None:
                    p.grad /= scale
            optimizer.step()
        return snapshot(net, optimizer)

    want = run(lambda i: 1.0)
    got = {key: value for key, value in run(lambda i: 1000.0).items() if not key.endswith(": S")}
    close(got, {key: want[key] for key in got}, 1e-11)
    close(run(lambda i: 2.0 ** (16 if i < 3 else 8), grad_scaler=True), want, 0)


def kantorovich(r):
    """The least cosine between v and D v for a positive diagonal D with largest/smallest = r."""
    return 2 * r ** 0.5 / (1 + r)


def test_adafisher_as_released_is_momentum_sgd():
    """as_released on a BatchNorm network: F̃'s extreme ratio bounds cosine(update, m̂): 0.9965."""
    torch.manual_seed(0)
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o),
                          nn.ReLU(True)]
    net = nn.Sequential(*block(3, 8), *block(8, 8), nn.Flatten(), nn.Linear(8 * 64, 10)).double()
    rows = {}
    for released in (True, False):
        model = copy.deepcopy(net)
        optimizer = AdaFisher(model, tcov=1, as_released=released)
        low, high, rows[released] = 1.0, 1.0, []
        for _ in range(8):
            low, high = 0.08 * low, 0.08 * high + 0.008                     # of H and of S
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            optimizer.zero_grad()
            F.cross_entropy(model(randn(16, 3, 8, 8) + 0.5), torch.randint(10, (16,))).backward()
            optimizer.step()
            update = before - torch.cat([p.detach().flatten() for p in model.parameters()])
            moment = torch.cat([optimizer.state[p]["momentum_buffer"].flatten()
                                for p in model.parameters()])
            fisher = 1e-3 + torch.cat([(c[0] * c[1] if isinstance(c, tuple) else c).flatten()
                                       for c in optimizer.curvature.values()])
            assert len(fisher) == len(before), "every parameter of a BatchNorm network has its F̃"
            cosine = (update @ moment / update.norm() / moment.norm()).item()
            rows[released].append((cosine, (fisher.max() / fisher.min()).item(),
                                   (1e-3 + high ** 2) / (1e-3 + low ** 2)))
    cosines, ratios, limits = zip(*rows[True])
    at_most(torch.tensor(ratios), torch.tensor(limits))
    at_most(-torch.tensor(cosines), -torch.tensor([kantorovich(r) for r in limits]))
    fixed = 1 + 1e3 / 115 ** 2
    close([kantorovich(limits[0]), kantorovich(limits[2]), kantorovich(fixed)], [0.9965, 0.9992,
                                                                                 0.9993], 6e-5)
    assert max(c for c, _, _ in rows[False]) < 0.9


# ---------------------------------------------------------------------------------------------
# AdaFisher: every parameter moves, and what cannot go on says so
# ---------------------------------------------------------------------------------------------

class PlainViT(nn.Module):
    """A ViT of torch's own layers: class token, positional embedding, nn.MultiheadAttention."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.position = nn.Parameter(randn(1, 1, 8)), nn.Parameter(randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(True), nn.Linear(16, 8))
        self.labels, self.head = nn.Embedding(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        h = self.norm1(x)
        x = x + self.attention(h, h, h)[0]
        h = self.mlp(self.norm2(x))
        h += x
        return self.head(self.norm(h)[:, 0] + self.labels(torch.arange(len(h)) % 4))


def test_adafisher_every_parameter_moves():
    """All tensors of a ViT change in one step; what has no layer by α·m̂, what has by more."""
    torch.manual_seed(0)
    x, y = randn(6, 3, 8, 8), torch.randint(5, (6,))
    for Optimizer, frozen in itertools.product((AdaFisher, AdaFisherW),
                                               ((), ("patch.weight", "patch.bias"))):
        net = PlainViT().double()
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = Optimizer(net, lr=1e-3)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
        assert set(before) - set(moved) == set(frozen), set(before) - set(moved)
        plain = ["token", "position", "labels.weight", "attention.in_proj_weight",
                 "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"]
        close({name: net.get_parameter(name) for name in plain}, {name: before[name] - 1e-3 *
                                                                  net.get_parameter(name).grad for
                                                                  name in plain}, 1e-15)
        assert {p for p in net.parameters() if p not in optimizer.curvature} \
            == {net.get_parameter(name) for name in plain + list(frozen)}
        for line in ("attention.in_proj_weight", "norm1: 8, per channel",
                     "mlp.0: 16×9, outer product"):
            assert line in str(optimizer), str(optimizer)


def test_adafisher_matching():
    """Biases in a group of their own, a tied weight, a layer that runs late, sparse gradients."""
    torch.manual_seed(0)
    x, s, layers = randn(6, 5), randn(6, 4), [nn.Linear(5, 4).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, order in zip(layers, (("weight", "bias"), ("bias", "weight"))):
        optimizer = AdaFisher(layer, params=[dict(params=getattr(layer, name)) for name in order])
        (layer(x) * s).sum().backward()
        optimizer.step()
    close(*(dict(layer.named_parameters()) for layer in layers), 0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.rare, self.late = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4)
            self.head.weight = self.words.weight

        def forward(self, ids, late):
            h = self.words(ids) + self.rare(ids)
            return self.head(self.late(h) if late else h)

    net, ids = Tied().double(), torch.arange(6)
    optimizer = AdaFisher(net, tcov=3, lr=0.01)
    for i in range(5):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(net(ids, i > 0), ids).backward()
        try:
            optimizer.step()
        except RuntimeError as error:            # step 0: the only layer with an F̃ did not run
            assert i == 0 and "no layer" in str(error)
            optimizer.captured = True
            optimizer.step()
        for name, p in net.named_parameters():
            assert torch.equal(p, before[name]) == (name.startswith("late") and i == 0), (name, i)
        assert (net.late.weight in optimizer.curvature) == (i >= 3)
    assert net.words.weight not in optimizer.curvature


def test_adafisher_refuses():
    """A statistic that is not finite names its layer and changes nothing; options out of range."""
    for bad, where in ((torch.inf, "conv1"), (None, "head")):
        net = make_net()
        optimizer = AdaFisher(net, tcov=2, weight_decay=0.1)
        usual(net, optimizer, make_data(2))
        before = snapshot(net, optimizer)
        x, y = make_data(1)[0]
        optimizer.zero_grad()
        loss = loss_of(net, x, y)
        if bad is None:
            (loss * torch.inf).backward()
        else:
            x[0, 0, 0, 0] = bad
            loss_of(net, x, y).backward()
        raises(FloatingPointError, (where, "step 2") if bad else ("step 2",), optimizer.step)
        close(snapshot(net, optimizer), before, 0)
    for name, value in (("lr", -1), ("beta", 1.0), ("damping", 0.0), ("gamma", 1.0),
                        ("gamma", -0.1), ("tcov", 0), ("tcov", 2.5), ("weight_decay", -1e-4),
                        ("lr", float("nan"))):
        raises(ValueError, (name, str(value)), lambda: AdaFisher(make_net(), **{name: value}))
    raises(ValueError, ("tcov", "0.5"), lambda: AdaFisherW(make_net(), params=[
        dict(params=make_net().parameters(), tcov=0.5)]))


# ---- MAC.calibrate on ranks ----

def calibrated_on_ranks(rank, world):
    """Uneven shards, under DDP; the first layer's covariance."""
    model = nn.parallel.DistributedDataParallel(conv_bn_linear())
    optimizer = MAC(model)
    parts = make_data(1, batch=12)[0][0].split([1, 3, 12][:world - 1] + [12 - (1, 4)[world - 2]])
    optimizer.calibrate(parts[rank].split(2))
    return optimizer.state[model.module[0].weight]["covariance"]


@pytest.mark.parametrize("world", (2, 3))
def test_mac_calibrate_on_ranks(world):
    want = rows_and_covariance(conv_bn_linear()[0], [make_data(1, batch=12)[0][0]])[None]
    results = on_ranks(world, calibrated_on_ranks)
    close(results[0], want, 1e-12)
    assert all(torch.equal(result, results[0]) for result in results)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
