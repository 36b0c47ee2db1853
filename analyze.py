"""What the preconditioners see and do: the figures of their papers, from one command each.

    python analyze.py effect --optim mac       # does the preconditioner do anything? and a placebo
    python analyze.py spectra                  # eigenvalues of A, P and A ⊗ P while it trains
    python analyze.py mean                     # is the mean input the top eigenvector of A?
    python analyze.py attention                # likewise mean attention, of the scores
    python analyze.py convergence              # how fast GD, FOOF, K-FAC, NysAct, MAC would contract
    python analyze.py gershgorin               # are the Kronecker factors diagonal? Likewise
    python analyze.py perturb                  #     their eigenvalues under noise, and
    python analyze.py fourier                  #     their frequencies and signal-to-noise ratio
    python analyze.py curves runs/A runs/B     # loss and accuracy against epochs and seconds
    python analyze.py landscape                # several optimizers on one loss surface
    python analyze.py nystrom                  # what NysAct's sketch holds of each layer

Each takes a minute or two on a CPU, on generated images unless --dataset says otherwise, and writes
its numbers as csv and its picture as PNG (with matplotlib) to --output_dir. FIGURE --help says what
is computed. Where a paper leaves a definition open, the one there is this project's own.

A = E[a aᵀ] and P = E[p pᵀ] are second moments over the rows of a layer (samples, tokens, positions
of a convolution), a its input with a 1 for the bias, p the gradient of the row's own sample's loss
by its output, from the true labels. They are taken in float64 over --images training images without
augmentation, in training mode (BatchNorm by batch), as the optimizers see them.
"""
import argparse
import copy
import csv
import inspect
import itertools
import json
import math
import re
import shlex
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

import data as datasets
import foof
import kfac
import mac
import nysact
from adafisher import AdaFisher
from kfac import running_mean
from mac import MAC
from models import CIFAR_MODELS, Attention
from train_cifar import (COUNT, COUNT_OR_ZERO, POSITIVE, RECIPES, Diverged, Parser, UsageError,
                         add_optimizer_flags, build, write_file)


# ---------------------------------------------------------------------------------------------
# 1. The mathematics
# ---------------------------------------------------------------------------------------------

class Moments(NamedTuple):
    """Second moments of one layer."""
    A: torch.Tensor      # (d, d), the coordinate of a bias last
    P: torch.Tensor      # (out, out)
    mean: torch.Tensor   # ā (d,)
    positions: float     # rows per image; K-FAC's P is this many times P, a sum over positions


def top_eigenvalues(moments, count):
    """The `count` largest eigenvalues of A, P and A ⊗ P, descending, as many as there are.

    Those of A ⊗ P are all products μᵢ νⱼ; the largest `count` have i, j ≤ count.
    """
    tops = {name: torch.linalg.eigvalsh(M).flip(0)[:count].clamp(min=0)
            for name, M in (("A", moments.A), ("P", moments.P))}
    products = tops["A"][:, None] * tops["P"]
    return tops | {"A ⊗ P": products.flatten().sort(descending=True).values[:count]}


def top_cosine(A, mean):
    """|cos∠(v₁, ā)| for the top eigenvector v₁ of A (..., d, d) and ā (..., d); 0 where ā = 0."""
    v = torch.linalg.eigh(A).eigenvectors[..., -1]
    return (v * mean).sum(-1).abs() / mean.norm(dim=-1).clamp(min=torch.finfo(A.dtype).tiny)


def alignment(A, mean):
    """MAC's Proposition 4.1 on one matrix: A = ā āᵀ + Σ, how near v₁(A) is to ā, and two bounds.

    With θ = ∠(v₁, ā), x̂ = ā/‖ā‖ and Q = I − x̂x̂ᵀ: A v₁ = λ₁ v₁ projected by Q reads
    Q Σ v₁ = λ₁ Q v₁, and λ₁ ≥ ‖ā‖², so that  sin θ ≤ ‖Σ‖₂/‖ā‖²  ("bound"). Sharper, with
    b = ‖QΣx̂‖ and s = ‖QΣQ‖₂ < λ₁,  tan θ ≤ b/(λ₁ − s)  ("sharp_bound"). Both as least cosines.
    """
    mu, size = mean.square().sum(), mean.norm().clamp(min=torch.finfo(A.dtype).tiny)
    spread = A - torch.outer(mean, mean)
    x = mean / size
    Q = torch.eye(len(A), dtype=A.dtype) - torch.outer(x, x)
    norm = torch.linalg.eigvalsh(spread).abs().max()
    top, s = torch.linalg.eigvalsh(A)[-1], torch.linalg.eigvalsh(Q @ spread @ Q).abs().max()
    sine = (norm / mu).clamp(max=1) if mu > 0 else torch.ones(())
    tangent = (Q @ spread @ x).norm() / (top - s) if top > s and mu > 0 else torch.inf
    return dict(cosine=top_cosine(A, mean).item(), bound=math.sqrt(1 - sine.item() ** 2),
                sharp_bound=1 / math.sqrt(1 + float(tangent) ** 2), mean_squared=mu.item(),
                spread_spectral=norm.item(), spread_frobenius=spread.norm().item())


def contraction(gram):
    """λ_min/λ_max of a Gram matrix (n, n), or 0 where λ_min is negative by rounding; λ_min, λ_max.

    Gradient descent on ½‖u − y‖² with du/dt along −gram (u − y) and the step 1/λ_max multiplies the
    slowest component of u − y by 1 − λ_min/λ_max: 1 is one step, 0 never.
    """
    values = torch.linalg.eigvalsh((gram + gram.mT) / 2)
    return (values[0] / values[-1]).clamp(min=0).item(), values[0].item(), values[-1].item()


def preconditioned_grams(J, moments, first):
    """{method: J B Jᵀ} of one layer: J (n, out, d) holds the gradients of n outputs.

    B is the method's multiplier at its published damping, from the layer's moments: I, (A + ρI)⁻¹,
    the factored (P + …)⁻¹ ⊗ (A + …)⁻¹, (Â + ρI)⁻¹ at the published rank, and ρ(ā āᵀ + ρI)⁻¹, which
    is ρ(A + ρI)⁻¹ in the first layer. They act on rows, so J goes in as one tall gradient.
    """
    n, out, d = J.shape
    A, rows = moments.A[None], J.flatten(0, 1)                              # (n·out, d)
    damping = {optim: torch.tensor([RECIPES[optim]["damping"]], dtype=A.dtype)
               for optim in ("foof", "kfac", "nysact", "mac")}
    factor = foof.damped_cholesky(A.clone(), damping["foof"])[0]
    P = moments.P[None] * moments.positions
    pi, root = kfac.pi_of(kfac.pack(A), kfac.pack(P), d, out), damping["kfac"].sqrt()
    factors = [kfac.damped_cholesky(M.clone(), x)[0] for M, x in ((A, pi * root), (P, root / pi))]
    S = nysact.draw_sketch(1, d, min(RECIPES["nysact"]["rank"], d), "gaussian", seed=0)
    U, values, _ = nysact.nystrom(A @ S, S)
    applied = {
        "GD": rows,
        "FOOF": foof.precondition(rows, None, factor)[0],
        "K-FAC": torch.cat([kfac.solve_factored(G[None], *factors) for G in J]),
        "NysAct": nysact.precondition(rows, None, U, values, damping["nysact"].item())[0],
        "MAC": mac.precondition_first(
            rows, None, mac.damped_cholesky(A, damping["mac"].item())[0], damping["mac"].item())[0]
        if first else mac.precondition(rows, None, moments.mean[None], damping["mac"].item())[0]}
    return {name: J.flatten(1) @ BJ.reshape(n, -1).mT for name, BJ in applied.items()}


def gershgorin_discs(M):
    """Centres M_ii and radii Σ_{j≠i} |M_ij|; every eigenvalue lies in one of these discs."""
    centres = M.diagonal()
    return centres, M.abs().sum(1) - centres.abs()


def correlation(M):
    """D^(−1/2) M D^(−1/2), D the diagonal of M ⪰ 0, without the rows whose diagonal is 0."""
    diagonal = M.diagonal()
    used = diagonal > torch.finfo(M.dtype).eps * diagonal.max()
    scale = diagonal[used].rsqrt()
    return M[used][:, used] * scale[:, None] * scale


def kaiser(values):
    """How many eigenvalues of a correlation matrix exceed 1, their mean; and their share of n."""
    kept = values > 1 + 64 * torch.finfo(values.dtype).eps * values.max()
    return int(kept.sum()), (values[kept].sum() / values.sum()).item()


def symmetric_noise(M, noise, seed=0):
    """E = Eᵀ, zero on the diagonal, entries normal with deviation noise × the mean of M's diagonal.

    Symmetric, because a covariance stays symmetric; and because eigenvalue routines for symmetric
    matrices would read one triangle of anything else. ‖E‖₂ ≈ 2·deviation·√n (semicircle law).
    """
    generator = torch.Generator().manual_seed(seed)
    E = torch.randn(M.shape, generator=generator, dtype=M.dtype).triu(1)
    return (E + E.mT) * noise * M.diagonal().mean()


def spectrum(M):
    """|fft2(M)|, frequency 0 in the middle; relative to the largest, in dB: 20 log₁₀."""
    size = torch.fft.fftshift(torch.fft.fft2(M)).abs()
    return 20 * (size / size.max()).clamp(min=1e-15).log10()


def signal_to_noise(M, noisy):
    """10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²) in dB: the diagonal of M against the upper triangle of M̂."""
    return 10 * torch.log10(M.diagonal().square().sum() / noisy.triu(1).square().sum()).item()


def cosine_bound(low, high):
    """The least cos∠(B g, g) for a symmetric B with eigenvalues in [low, high], low > 0.

    Kantorovich: 2√(low·high)/(low + high). Attained by g with equal parts, in the right
    proportion, of both ends; 1 where B is a multiple of the identity.
    """
    return 2 * math.sqrt(low / high) / (1 + low / high)


def multiplier(optimizer, module):
    """Smallest and largest eigenvalue of B in G̃ = B G for one module, and its relative damping.

    Relative damping: the damping over the mean eigenvalue of the curvature it is added to, for
    K-FAC of each of its two factors alike, √λ/√(ā p̄). Where there is no curvature: 1, 1, inf.
    K-FAC's clip, a scalar of all layers, is left out; so are the learning rate and momentum.
    """
    weight, params = getattr(module, "weight", None), list(module.parameters(recurse=False))
    state, scale = optimizer.state.get(weight, {}), 1.0
    damping = optimizer.param_groups[0].get("damping")
    if isinstance(optimizer, AdaFisher):
        values = [optimizer.curvature[p] for p in params if p in optimizer.curvature]
        values = [torch.mul(*v) if isinstance(v, tuple) else v for v in values]
        values = torch.cat([v.flatten() for v in values]) if values else None
    elif "exp_avg_sq" in state:
        group = optimizer.param_groups[0]
        damping, second = group["eps"], [optimizer.state[p] for p in params]
        values = torch.cat([(s["exp_avg_sq"] / (1 - group["betas"][1] ** float(s["step"]))).sqrt()
                            .flatten() for s in second])
    elif "output_covariance" in state:
        return kfac_multiplier(state, damping)
    elif "mean" in state:
        applied, scale = state.get("applied", state["mean"]), damping
        values = F.pad(applied.square().sum(1, keepdim=True), (0, applied.shape[1] - 1))
    elif "eigenvalues" in state:
        U = state["U"]
        values = F.pad(state["eigenvalues"], (0, U.shape[1] - U.shape[2]))
    elif "factor" in state:
        values = torch.linalg.eigvalsh(state["factor"] @ state["factor"].mT) - damping
        values, scale = values.clamp(min=0), damping if isinstance(optimizer, MAC) else 1.0
    else:
        values = None
    if values is None:
        return 1.0, 1.0, math.inf
    low, high, mean = values.min().item(), values.max().item(), values.mean().item()
    return scale / (damping + high), scale / (damping + low), damping / max(mean, 1e-300)


def kfac_multiplier(state, damping):
    """multiplier() for (P + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹, or the eigen form, from K-FAC's state."""
    if "factor" in state:
        A, P = (torch.linalg.eigvalsh(L @ L.mT) for L in (state["factor"], state["output_factor"]))
        damped = A.unsqueeze(2) * P.unsqueeze(1)
    else:
        A, P = state["values"], state["output_values"]
        damped = A.unsqueeze(2) * P.unsqueeze(1) + damping
    a, p = (kfac.unpack(state[name], n).diagonal(dim1=1, dim2=2).mean().item() for name, n in
            (("covariance", A.shape[1]), ("output_covariance", P.shape[1])))
    return 1 / damped.max().item(), 1 / damped.min().item(), \
        math.sqrt(damping / max(a * p, 1e-300))


def principal_plane(points):
    """The plane nearest to points (n, D): centre (D,), two directions (2, D), coordinates (n, 2).

    And which share of the variance about the centre each direction holds, (2,).
    """
    centre = points.mean(0)
    _, sigma, V = torch.linalg.svd(points - centre, full_matrices=False)
    shares = sigma.square() / sigma.square().sum().clamp(min=torch.finfo(points.dtype).tiny)
    return centre, V[:2], (points - centre) @ V[:2].mT, shares[:2]


# ---------------------------------------------------------------------------------------------
# 2. Training, and what is measured of a network
# ---------------------------------------------------------------------------------------------

class Setup(NamedTuple):
    data: datasets.Data
    config: dict               # what train_cifar.build takes
    net: nn.Module
    optimizer: torch.optim.Optimizer


def set_up(args, optim=None):
    """The data, the network and the optimizer (default: args.optim) of a figure that trains."""
    optim = optim or args.optim
    config = dict(dataset=args.dataset, model=args.model, optim=optim, run=args.run,
                  batch_size=args.batch_size, channels_last=False)
    for name, published in RECIPES[optim].items():
        given = getattr(args, name, None)
        config[name] = published if given is None else given
    # LeNet-5 has no normalisation layers: the rate of 0.1 that the ResNets take is too much for it
    if args.model == "lenet5" and args.lr is None and config["lr"] == 0.1:
        config["lr"] = 0.01
    data = datasets.load(args.dataset, args.data_dir)
    return Setup(data, config, *build(config, data))


def training(setup, steps, text="steps"):
    """Train; yields (0, nan) and then, after each step, (steps taken, its loss). Raises Diverged."""
    data, config, net, optimizer = setup
    yield 0, math.nan
    stream = (batch for epoch in itertools.count() for batch in datasets.batches(
        data.train_images, data.train_labels, config["batch_size"], train=True, mean=data.mean,
        std=data.std, seed=config["run"], epoch=epoch))
    net.train()
    for step, (x, y) in zip(tqdm(range(1, steps + 1), text, disable=None, leave=False), stream):
        optimizer.zero_grad()
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        if config.get("fisher") == "sampled":
            optimizer.sample_fisher(logits)
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise Diverged(f"training with {config['optim']} diverged in step {step}: try a "
                           "smaller --lr")
        yield step, loss.item()


def stages(args, fractions=(1,)):
    """Yield (when, setup): after these fractions of the steps; of a run, its start and its end.

    A run's folder holds its last checkpoint only; its start is built again from its seed.
    """
    if args.from_run is None:
        setup, wanted = set_up(args), {round(f * args.steps) for f in fractions}
        for step, _ in training(setup, args.steps):
            if step in wanted:
                yield f"step {step}", setup
        return
    config, saved = read_run(args.from_run)
    data = datasets.load(config["dataset"], args.data_dir)
    net, optimizer = build(config, data)
    if 0 in fractions:
        yield "start", Setup(data, config, net, optimizer)
    net.load_state_dict(saved["model"])
    yield f"epoch {saved['epoch']}", Setup(data, config, net, optimizer)


def read_run(folder):
    """The configuration and the checkpoint in a folder that train_cifar.py wrote."""
    path = Path(folder, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = saved["config"]
        return dict(config, channels_last=False), saved
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no checkpoint.pt: name a folder written by "
                         "train_cifar.py")
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} is damaged or not a checkpoint of train_cifar.py "
                         f"({type(error).__name__})")


def sample(data, args):
    """[(x, y)]: the first --images training images, in batches, normalised, not augmented."""
    return list(datasets.batches(data.train_images[:args.images], data.train_labels[:args.images],
                                 args.batch_size, train=False, mean=data.mean, std=data.std))


def layers_of(net):
    """{name: Linear or Conv2d} in modules() order."""
    return {name: module for name, module in net.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))}


def choose(net, wanted, otherwise):
    """The layers asked for, or those at these fractions of the network's depth."""
    names = list(layers_of(net))
    for name in wanted or ():
        if name not in names:
            raise UsageError(f"the network has no layer '{name}'; choose from {', '.join(names)}")
    return wanted or [names[int(f * (len(names) - 1) + 0.5)] for f in otherwise]


def second_moments(net, batches, names):
    """{name: Moments} of these layers over the batches; a copy of the network is used."""
    net = copy.deepcopy(net).requires_grad_().train()
    sums = {name: [0, 0, 0] for name in names}       # Σ [a; 1][a; 1]ᵀ and Σ p pᵀ, packed; rows

    def record(name, module, args, output):
        (total, (rows,)), = kfac.linear_or_conv(module, {"x": args[0].double()}, output, False)
        sums[name][0] = sums[name][0] + total
        sums[name][2] += rows
        # a Linear's output on more than two dimensions is a view
        (output._base if output._is_view() else output).register_hook(
            lambda p: add_outputs(name, module, p.reshape(output.shape)))

    def add_outputs(name, module, p):
        sums[name][1] = sums[name][1] + kfac.output_gram(module, p.double(), False)

    layers = layers_of(net)
    for name in names:
        layers[name].register_forward_hook(partial(record, name))
    for x, y in tqdm(batches, "moments", disable=None, leave=False):
        F.cross_entropy(net(x), y, reduction="sum").backward()
    images, found = sum(len(y) for _, y in batches), {}
    for name, (A, P, rows) in sums.items():
        weight, bias = layers[name].weight, layers[name].bias
        d = weight[0].numel() + (bias is not None)
        A, P = (symmetric(M, n) / rows for M, n in ((A, weight[0].numel() + 1), (P, len(weight))))
        found[name] = Moments(A[:d, :d], P, A[-1, :d], rows / images)   # its last row is E[[a; 1]]
    return found


def symmetric(packed, d):
    """(d, d) from a packed lower triangle (1, d(d+1)/2) of one block."""
    L = kfac.unpack(packed, d)[0]
    return L + L.tril(-1).mT


def attention_matrices(net, batches):
    """{block: (T, cosines)}: T (N, N) averaged over images and heads, rows summing to 1.

    cosines: top_cosine of every single TᵀT with its own t̄, over heads and the first batch.
    """
    net, found, handles = copy.deepcopy(net).eval(), {}, []

    def record(name, parent, module, args, output):
        B, N = output.shape[:2]
        q, k, _ = output.double().view(B, N, 3, parent.num_heads, -1).permute(2, 0, 3, 1, 4)
        T = (q @ k.mT * parent.scale).softmax(-1)                                 # (B, h, N, N)
        total, images, cosines = found.get(name, (0, 0, None))
        if cosines is None:
            cosines = top_cosine(T.mT @ T, T.mean(2)).flatten()
        found[name] = total + T.mean(1).sum(0), images + B, cosines
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            handles.append(module.qkv.register_forward_hook(partial(record, name, module)))
    if not handles:
        raise UsageError("the network has no attention; --model deit_tiny_cifar has")
    with torch.no_grad():
        for x, _ in tqdm(batches, "attention", disable=None, leave=False):
            net(x)
    return {name: (total / images, cosines) for name, (total, images, cosines) in found.items()}


def output_gradients(net, x, y, names):
    """{layer: (n, out, d)}: the gradients of the n logits of the true labels by [W | b].

    Logit i depends on sample i alone: BatchNorm normalises by the moments of x, held fixed.
    """
    net = copy.deepcopy(net).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0                    # the running averages become those of x
    with torch.no_grad():
        net(x)
    net = net.eval().double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def logit(params, x, y):
        return functional_call(net, (params, buffers), (x[None],))[0].gather(0, y[None])[0]
    grads = vmap(grad(logit), (None, 0, 0), chunk_size=16)(params, x.double(), y)
    return {name: torch.cat([grads[f"{name}.{part}"].flatten(2) if part == "weight" else
                             grads[f"{name}.{part}"][..., None] for part in ("weight", "bias")
                             if f"{name}.{part}" in grads], 2) for name in names}


class PlainMomentum:
    """The moment that an optimizer would keep of raw gradients: heavy ball, or Adam's average."""

    def __init__(self, group):
        self.averages, self.nesterov = "momentum" not in group, group.get("nesterov", False)
        self.decay = group.get("momentum", group.get("beta", group.get("betas", (0,))[0]))
        self.moments = {}

    def add(self, p):
        """Take in p.grad; what plain SGD would multiply by −lr."""
        m, k = self.moments.get(p, (torch.zeros_like(p), 0))
        self.moments[p] = m, k + 1
        if self.averages:
            return running_mean(m, p.grad, k + 1, self.decay)
        m.mul_(self.decay).add_(p.grad)
        return p.grad + self.decay * m if self.nesterov else m


class Placebo:
    """SGD with the momentum of an optimizer's group and one constant for each module's step."""

    def __init__(self, net, group, constants):
        self.net, self.plain, self.lr = net, PlainMomentum(group), group["lr"]
        self.constants = constants                                   # {module name: number}

    def zero_grad(self):
        self.net.zero_grad()

    @torch.no_grad()
    def step(self):
        for name, module in self.net.named_modules():
            for p in module.parameters(recurse=False):
                if p.grad is not None:
                    p.sub_(self.plain.add(p), alpha=self.lr * self.constants[name])


def watch_updates(setup, steps, every):
    """Train without weight decay; yields (step, loss, {module: (cosine, ratio, *multiplier)}).

    cosine and ratio of lengths: a module's update over −lr, of all its parameters together,
    against PlainMomentum of the raw gradients on the same path. Every `every` steps; {} between.
    """
    _, _, net, optimizer = setup
    modules = {name: module for name, module in net.named_modules()
               if any(True for _ in module.parameters(recurse=False))}
    group = optimizer.param_groups[0]
    group["weight_decay"], plain, before = 0.0, PlainMomentum(group), {}
    for step, loss in training(setup, steps):
        found = {}
        with torch.no_grad():
            moments = {p: plain.add(p) for p in before}
        for name, module in modules.items() if step and (step - 1) % every == 0 else ():
            params = list(module.parameters(recurse=False))
            u = torch.cat([(before[p] - p.detach()).flatten() for p in params]) / group["lr"]
            m = torch.cat([moments[p].flatten() for p in params])
            tiny = torch.finfo(u.dtype).tiny
            cosine = torch.dot(u / u.norm().clamp(min=tiny), m / m.norm().clamp(min=tiny))
            found[name] = (cosine.item(), (u.norm() / m.norm().clamp(min=tiny)).item(),
                           *multiplier(optimizer, module))
        before = {p: p.detach().clone() for p in net.parameters()}
        if step:
            yield step, loss, found


def flat(net):
    """All parameters as one float64 vector (D,)."""
    return torch.cat([p.detach().flatten().double() for p in net.parameters()])


@torch.no_grad()
def loss_at(net, vector, batches):
    """Mean loss over the batches with these parameters, in training mode. Changes net."""
    vector = vector.to(next(net.parameters()).dtype)
    torch.nn.utils.vector_to_parameters(vector, net.parameters())
    losses = [F.cross_entropy(net(x), y, reduction="sum") for x, y in batches]
    return sum(losses).item() / sum(len(y) for _, y in batches)


def surface(net, centre, directions, coordinates, batches, size):
    """The loss on a size × size grid of the plane around coordinates (n, 2): x, y, loss [y, x]."""
    low, high = coordinates.min(0).values, coordinates.max(0).values
    margin = 0.15 * (high - low).max().clamp(min=1e-12)
    xs, ys = (torch.linspace(float(a - margin), float(b + margin), size, dtype=torch.float64)
              for a, b in zip(low, high))
    net, losses = copy.deepcopy(net).train(), torch.empty(size, size)
    bar = tqdm(total=size * size, desc="surface", disable=None, leave=False)
    for (i, y), (j, x) in itertools.product(enumerate(ys), enumerate(xs)):
        losses[i, j] = loss_at(net, centre + x * directions[0] + y * directions[1], batches)
        bar.update()
    bar.close()
    return xs, ys, losses


def read_curves(folders):
    """{label: [(epoch, seconds since the start, train loss, test accuracy)]} of all runs below."""
    runs = {}
    for folder in folders:
        logs = sorted(Path(folder).rglob("log.csv"))
        if not logs:
            raise UsageError(f"{folder} holds no log.csv: name folders written by train_cifar.py, "
                             "or a folder of such folders")
        for log in logs:
            rows, seconds = [], 0.0
            try:
                with open(log, newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        seconds += float(row["seconds"])
                        rows.append((int(row["epoch"]), seconds, float(row["train_loss"]),
                                     float(row["test_acc"])))
            except (KeyError, TypeError, ValueError):
                raise UsageError(f"{log} is not a log of train_cifar.py: it lacks a number in one "
                                 "of the columns epoch, train_loss, test_acc, seconds")
            runs[label_of(log.parent, folder)] = rows
    return runs


def label_of(run, folder):
    """The run's folder, below the parent of the one that was named."""
    run, parent = run.resolve(), Path(folder).resolve().parent
    return run.relative_to(parent).as_posix()


# ---------------------------------------------------------------------------------------------
# 3. Numbers, tables, pictures
# ---------------------------------------------------------------------------------------------

def text(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_table(columns, rows):
    """Rows in aligned columns; the middle ones of a long table only in the csv."""
    shown = [[text(v) if not isinstance(v, float) else f"{v:.4g}" for v in row] for row in rows]
    if len(shown) > 60:
        left = len(shown) - 40
        shown = shown[:20] + [[f"({left} more)"] + [""] * (len(columns) - 1)] + shown[-20:]
    widths = [max(map(len, column)) for column in zip(columns, *shown)]
    for row in [list(columns), *shown]:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w)
                        for i, (cell, w) in enumerate(zip(row, widths))))


def write_csv(path, caption, args, columns, rows):
    """caption, the command and torch's version as comments, then the header and the rows."""
    head = [caption, shlex.join(["python", "analyze.py", *args.argv]), f"torch {torch.__version__}"]
    lines = [f"# {line}" for line in head] + [",".join(columns)]
    lines += [",".join(text(v) for v in row) for row in rows]
    write_file(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def publish(args, name, caption, columns, rows, draw, size, shown=None):
    """Write NAME.csv and NAME.png and print a table.

    columns: names, with units; rows: tuples. draw: what fills an empty figure of `size` inches.
    shown: the rows of the printed table, if not all; () for none. Older files of the name are
    replaced.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    caption = " ".join(caption.split())
    write_csv(folder / f"{name}.csv", caption, args, columns, rows)
    if shown is None or shown:
        print_table(columns, rows if shown is None else shown)
    print("\n" + textwrap.fill(caption, 100), f"\n{folder / name}.csv", sep="\n")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture, since matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return
    picture = Figure(figsize=size, layout="constrained", dpi=90)
    draw(picture)
    picture.supxlabel(textwrap.fill(caption, int(size[0] * 14.5)), fontsize=8, x=0.01, ha="left")
    write_file(folder / f"{name}.png", lambda file: picture.savefig(file, format="png"))
    print(f"{folder / name}.png")


def where(setup, steps=None):
    """What was trained, for captions."""
    config = setup.config
    return f"{config['model']} on {config['dataset']}, {config['optim']}" + \
        (f", {steps}" if steps else "") + f", seed {config['run']}"


def stem(args, setup):
    config = setup.config
    return f"{args.figure}-{config['model']}-{config['optim']}-{config['dataset']}"


def colours(count):
    from matplotlib import colormaps
    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def spread(items, count):
    """`count` of the items, evenly spaced, the first and the last among them."""
    items = list(items)
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def name_layers(axis, names):
    """One tick for each layer, in the order of the network."""
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_xlabel("layer")


# ---------------------------------------------------------------------------------------------
# 4. The figures. The docstrings are what --help shows
# ---------------------------------------------------------------------------------------------

def spectra(args):
    """The 50 largest eigenvalues of A, P and A ⊗ P at the beginning, middle and end of training.

    MAC, figure 1. Without --layer: the first, middle and last. A ⊗ P is K-FAC's block but for the
    number of positions of a convolution, by which P is multiplied there.
    """
    rows, names = [], None
    for when, setup in stages(args, (0, 0.5, 1)):
        names = choose(setup.net, args.layer, (0, 0.5, 1))
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            for matrix, values in top_eigenvalues(m, 50).items():
                rows += [(name, when, matrix, i + 1, v)
                         for i, v in enumerate(values.tolist()) if v > 1e-12 * values[0]]
    whens = list(dict.fromkeys(row[1] for row in rows))

    def draw(picture):
        axes = picture.subplots(len(names), 3, squeeze=False, sharex=True)
        for i, name in enumerate(names):
            for axis, matrix in zip(axes[i], ("A", "P", "A ⊗ P")):
                for when, colour in zip(whens, colours(len(whens))):
                    points = [row[3:] for row in rows if row[:3] == (name, when, matrix)]
                    axis.semilogy(*zip(*points), ".-", ms=3, lw=1, color=colour, label=when)
                axis.set_title(f"{matrix} of {name}", fontsize=9)
                axis.set_ylabel("eigenvalue")
                axis.grid(alpha=0.3)
        for axis in axes[-1]:
            axis.set_xlabel("index, largest first")
        axes[0, 0].legend(fontsize=8)
    publish(args, stem(args, setup), f"""Largest eigenvalues of the input and output-gradient second
        moments A and P and of A ⊗ P ({where(setup)}): a few large ones above a long tail, and A
        sets the scale.""", ("layer", "when", "matrix", "index", "eigenvalue"), rows, draw,
            (10, 2.4 * len(names) + 1), [row for row in rows if row[3] in (1, 2, 10)])


def mean(args):
    """Per layer: |cos∠(v₁(A), ā)| with the bound of Proposition 4.1; ‖Σ‖₂ beside ‖ā‖².

    MAC, figure 2. A = ā āᵀ + Σ, v₁ the top eigenvector. From sin θ ≤ ‖Σ‖₂/‖ā‖² a least cosine, 0
    where ‖Σ‖₂ is the larger; and a sharper one that also asks how far Σ turns ā (see alignment).
    MAC itself treats the first layer by A, and the value projection by attended tokens.
    """
    rows, keys = [], ("cosine", "bound", "sharp_bound", "mean_squared", "spread_spectral",
                      "spread_frobenius")
    for when, setup in stages(args, (0, 1)):
        names = list(layers_of(setup.net))
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            found = alignment(m.A, m.mean)
            rows.append((name, when, *(found[key] for key in keys)))
    last = [row for row in rows if row[1] == when]

    def draw(picture):
        left, right = picture.subplots(1, 2)
        place = range(len(last))
        left.plot(place, [row[2] for row in rows if row[1] != when], "o", mfc="none", color="grey",
                  label=f"measured, {rows[0][1]}")
        left.plot(place, [row[2] for row in last], "o", color="C0", label=f"measured, {when}")
        left.plot(place, [row[4] for row in last], "_", ms=9, mew=2, color="C1",
                  label="at least (sharper bound)")
        left.plot(place, [row[3] for row in last], "_", ms=9, mew=2, color="C3",
                  label="at least (‖Σ‖₂/‖ā‖²)")
        left.set_ylabel("|cos∠(v₁(A), ā)|")
        left.set_ylim(-0.05, 1.05)
        for key, mark, label in ((5, "ā: ‖ā‖²", "s"), (6, "‖Σ‖₂", "^"), (7, "‖Σ‖ Frobenius", "v")):
            right.semilogy(place, [row[key] for row in last], label, ms=5, label=mark)
        right.set_ylabel("squared length of an input row")
        for axis in (left, right):
            name_layers(axis, names)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    publish(args, stem(args, setup), f"""How near the top eigenvector of A is to the mean input ā,
        and the parts of A = ā āᵀ + Σ ({where(setup, when)}): MAC keeps ā and drops Σ.""",
            ("layer", "when", *keys), rows, draw, (11, 5), last)


def attention(args):
    """Is attention its column means t̄? Singular values of T; |cos| of its top right one with t̄.

    MAC, figure 3. T (N, N) is averaged over images and heads. It is not symmetric: T = 1 t̄ᵀ + E, so
    the right singular vector is what Proposition 4.1 compares with t̄. Averaging itself brings T
    nearer to rank 1, hence the mean cosine of single images and heads beside it.
    """
    rows, values = [], []
    for when, setup in stages(args, (0, 1)):
        for block, (T, cosines) in attention_matrices(setup.net, sample(setup.data, args)).items():
            found = alignment(T.mT @ T / len(T), T.mean(0))
            sigma = torch.linalg.svdvals(T).tolist()
            rows.append((block, when, found["cosine"], found["bound"], found["sharp_bound"],
                         cosines.mean().item(), *sigma))
    columns = ("block", "when", "cosine", "bound", "sharp_bound", "single_cosine")
    values = [f"sigma_{i + 1}" for i in range(len(rows[0]) - len(columns))]
    last = [row for row in rows if row[1] == when]

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for row, colour in zip(spread(last, 4), colours(4)):
            sigma = [v for v in row[6:] if v > 1e-12 * row[6]]
            left.semilogy(range(1, len(sigma) + 1), sigma, ".-", ms=3, lw=1, color=colour,
                          label=row[0])
        left.set_xlabel("index, largest first")
        left.set_ylabel(f"singular value of T, {when}")
        place = range(len(last))
        right.plot(place, [row[2] for row in rows if row[1] != when], "o", mfc="none",
                   color="grey", label=f"averaged T, {rows[0][1]}")
        for key, mark, label in ((2, "o", f"averaged T, {when}"), (4, "_", "at least"),
                                 (5, "x", "single images and heads")):
            right.plot(place, [row[key] for row in last], mark, label=label)
        right.set_ylabel("|cos∠(top right singular vector, t̄)|")
        name_layers(right, [row[0] for row in last])
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    publish(args, stem(args, setup), f"""Singular values of the attention matrix T, and how near its
        top right singular vector is to mean attention t̄ ({where(setup, when)}).""",
            (*columns, *values), rows, draw, (10, 4.5), [row[:7] for row in last])


def convergence(args):
    """The convergence factor of GD, FOOF, K-FAC, NysAct and MAC along one run of training.

    MAC, figure 4, where the definition is not given; ours: u are the logits of the true labels of
    the first --samples images, J their Jacobian by the weights of all Linear and Conv2d layers, B
    a method's multiplier at its published damping. Steps along −B Jᵀ(u − y) change u by J B Jᵀ, so
    the slowest component shrinks by 1 − c per step of size 1/λ_max, with the factor
    c = λ_min(J B Jᵀ)/λ_max(J B Jᵀ). J B Jᵀ is a sum over layers.
    """
    rows, every = [], max(1, args.steps // 8)
    setup = set_up(args)
    (x, y), = datasets.batches(setup.data.train_images[:args.samples],
                               setup.data.train_labels[:args.samples], args.samples, train=False,
                               mean=setup.data.mean, std=setup.data.std)
    names = list(layers_of(setup.net))
    for step, _ in training(setup, args.steps):
        if step % every:
            continue
        moments = second_moments(setup.net, sample(setup.data, args), names)
        grams = {}
        for name, J in output_gradients(setup.net, x, y, names).items():
            for method, gram in preconditioned_grams(J, moments[name], name == names[0]).items():
                grams[method] = grams.get(method, 0) + gram
        rows += [(method, step, *contraction(gram)) for method, gram in grams.items()]

    def draw(picture):
        axis = picture.subplots()
        for method in grams:
            points = [row[1:3] for row in rows if row[0] == method]
            axis.semilogy(*zip(*points), "o-", ms=4, label=method)
        axis.set_xlabel("steps of training")
        axis.set_ylabel("convergence factor λ_min/λ_max")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    publish(args, stem(args, setup), f"""Convergence factor of each method on {args.samples} images,
        along one run ({where(setup)}): least squares on the linearised network shrink by one minus
        it per step. Larger is faster; all are evaluated at the same weights.""",
            ("method", "step", "factor", "lambda_min", "lambda_max"), rows, draw, (7, 5),
            rows[:len(grams)] + rows[-len(grams):])


def effect(args):
    """Does the preconditioner do anything? Every module's update beside that of plain momentum.

    Along the run of any optimizer, without weight decay: cosine and ratio of lengths of the update
    (over −lr) against the momentum of the raw gradients on the same path; the smallest and largest
    eigenvalue of the multiplier B; the cosine that these guarantee to a B that stands still,
    2√(low·high)/(low + high); and relative damping, damping over the mean eigenvalue of what it is
    added to. Beside it a placebo: plain momentum from the same start on the same batches, each
    module's step multiplied by one constant, so that it is as long on average. If the placebo's
    loss falls as fast, then step lengths did it, not directions.
    """
    setup, found, losses = set_up(args), [], {args.optim: []}
    for step, loss, modules in watch_updates(setup, args.steps, max(1, args.steps // 20)):
        losses[args.optim].append(loss)
        found += [(name, step, cosine, ratio, low, high, cosine_bound(low, high), damping)
                  for name, (cosine, ratio, low, high, damping) in modules.items()]
    constants = {}
    for name in dict.fromkeys(row[0] for row in found):
        ratios = [row[3] for row in found if row[0] == name]
        constants[name] = sum(ratios) / len(ratios)
    losses["placebo"] = train_placebo(setup, args.steps, constants)
    padded = losses["placebo"] + [math.nan] * args.steps
    rows = [(*row, losses[args.optim][row[1] - 1], constants[row[0]], padded[row[1] - 1])
            for row in found]
    last = [row for row in rows if row[1] == rows[-1][1] and row[0] in layers_of(setup.net)]
    publish(args, stem(args, setup), f"""What {args.optim} does to the momentum of the gradients
        ({where(setup)}, batches of {args.batch_size}), beside a placebo: plain momentum with one
        constant per module that makes its steps as long on average. Multipliers and relative
        damping are those of step {rows[-1][1]}. Cosine 1 and a multiplier without range would be
        SGD.""",
            ("module", "step", "cosine", "length_ratio", "multiplier_min", "multiplier_max",
             "cosine_bound", "relative_damping", "loss", "placebo_constant", "placebo_loss"), rows,
            partial(draw_effect, rows=rows, last=last, losses=losses), (12, 7), last)


def train_placebo(setup, steps, constants):
    """The losses of the Placebo with these constants, up to where it diverges."""
    net, _ = build(setup.config, setup.data)
    placebo, losses = Placebo(net, setup.optimizer.param_groups[0], constants), []
    try:
        for step, loss in training(setup._replace(net=net, optimizer=placebo), steps, "placebo"):
            losses += [loss] if step else []
    except Diverged:
        print(f"note: the placebo diverged after {len(losses)} steps", file=sys.stderr)
    return losses


def draw_effect(picture, rows, last, losses):
    (cosines, ratios, loss), (bounds, ranges, damping) = picture.subplots(2, 3)
    names, place = [row[0] for row in last], range(len(last))
    few = spread(names, 6)
    for name, colour in zip(few, colours(len(few))):
        points = [row for row in rows if row[0] == name]
        steps = [row[1] for row in points]
        cosines.plot(steps, [row[2] for row in points], ".-", color=colour, label=name)
        ratios.semilogy(steps, [row[3] for row in points], ".-", color=colour, label=name)
        ratios.axhline(points[0][9], color=colour, ls=":", lw=1)
    cosines.axhline(1, color="k", ls=":", lw=1, label="placebo")
    cosines.set_ylabel("cosine of update and plain momentum")
    cosines.legend(fontsize=7)
    ratios.set_ylabel("length of update / plain momentum\n(dotted: the placebo's constant)")
    for (name, values), style in zip(losses.items(), ("-", "--")):
        smooth = [sum(values[max(0, i - 9):i + 1]) / len(values[max(0, i - 9):i + 1])
                  for i in range(len(values))]
        loss.plot(range(1, len(values) + 1), smooth, style, label=name)
    loss.set_ylabel("training loss, mean of 10 steps")
    loss.legend(fontsize=8)
    bounds.plot(place, [row[2] for row in last], "o", ms=4, label="measured")
    bounds.plot(place, [row[6] for row in last], "_", color="C3", label="at least, from its range")
    bounds.set_ylabel(f"cosine in step {last[0][1]}")
    bounds.legend(fontsize=7)
    ranges.vlines(place, [row[4] for row in last], [row[5] for row in last], lw=3, label="multiplier")
    ranges.plot(place, [row[9] for row in last], "kx", ms=4, label="placebo's constant")
    ranges.set_yscale("log")
    ranges.set_ylabel("eigenvalues, smallest to largest")
    ranges.legend(fontsize=7)
    damping.semilogy(place, [row[7] for row in last], "o", ms=4)
    damping.axhline(1, color="k", ls=":", lw=1)
    damping.set_ylabel("damping / mean eigenvalue of the curvature")
    for axis in (cosines, ratios, loss):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in (bounds, ranges, damping):
        name_layers(axis, names)
        axis.grid(alpha=0.3)


def curves(args):
    """Training loss and test accuracy of runs of train_cifar.py, against epochs and seconds.

    MAC, figure 5. RUN is a folder with a log.csv, or one that holds such folders. Seconds are those
    of the training passes, as logged.
    """
    runs = read_curves(args.runs)
    rows = [(label, *row) for label, points in runs.items() for row in points]

    def draw(picture):
        axes = picture.subplots(2, 2, sharey="row")
        for label, points in runs.items():
            for row, y in enumerate((2, 3)):
                for column, x in enumerate((0, 1)):
                    axes[row, column].plot([p[x] for p in points], [p[y] for p in points], ".-",
                                           label=label)
        axes[0, 0].set_yscale("log")
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel("test accuracy, %")
        for axis in axes[1]:
            axis.set_xlabel("epoch" if axis is axes[1, 0] else "seconds of training")
        for axis in axes.flat:
            axis.grid(alpha=0.3, which="both")
        axes[1, 1].legend(fontsize=7)
    publish(args, "curves", """Training loss and test accuracy after each epoch, against epochs and
        against the seconds of the training passes so far (as logged, on whatever machine).""",
            ("run", "epoch", "seconds", "train_loss", "test_accuracy_percent"), rows, draw, (9, 7),
            [(label, *points[-1]) for label, points in runs.items() if points])


def factors(args):
    """(when, setup, {layer: Moments}, the layer to draw) at the end of training or of a run."""
    for when, setup in stages(args):
        layer, = choose(setup.net, args.layer, (0.5,))
        names = list(layers_of(setup.net))
        return when, setup, second_moments(setup.net, sample(setup.data, args), names), layer


def gershgorin(args):
    """Gershgorin discs of the Kronecker factors, and the share of rows that dominate diagonally.

    AdaFisher, section 3.1. Row i of H (K-FAC's A) or S (its P) gives a disc of centre M_ii and
    radius Σ_{j≠i} |M_ij|; all eigenvalues lie in the union. If radius < centre in all rows, M is
    diagonally dominant. The matrices are taken as they are: scaling all entries to [0, 1] first, as
    in the published picture, would change every eigenvalue.
    """
    when, setup, moments, layer = factors(args)
    rows, discs = [], {}
    for name, m in moments.items():
        for factor, M in (("H", m.A), ("S", m.P)):
            centres, radii = gershgorin_discs(M)
            used = centres > 0
            if name == layer:
                discs[factor] = (centres, radii, torch.linalg.eigvalsh(M))
            rows.append((name, factor, len(M), (radii < centres)[used].double().mean().item(),
                         (radii / centres)[used].median().item(),
                         (radii.sum() / M.abs().sum()).item()))

    def draw(picture):
        from matplotlib.collections import EllipseCollection
        *axes, shares = picture.subplots(1, 3)
        for axis, (factor, (centres, radii, values)) in zip(axes, discs.items()):
            points = torch.stack([centres, torch.zeros_like(centres)], 1).numpy()
            size = 2 * radii.numpy()
            axis.add_collection(EllipseCollection(
                size, size, [0] * len(size), units="xy", offsets=points, array=radii.numpy(),
                transOffset=axis.transData, facecolor="none", cmap="viridis", lw=0.6, alpha=0.6))
            axis.plot(values, torch.zeros_like(values), "k|", ms=9, label="eigenvalues")
            axis.plot(centres, torch.zeros_like(centres), "r.", ms=3, label="centres M_ii")
            reach = float((centres + radii).max())
            axis.set_xlim(float((centres - radii).min()) * 1.05, reach * 1.05)
            axis.set_ylim(-float(radii.max()) * 1.05, float(radii.max()) * 1.05)
            axis.set_title(f"{factor} of {layer}", fontsize=9)
            axis.set_xlabel("real part")
            axis.set_ylabel("imaginary part")
            axis.legend(fontsize=7)
        for i, factor in enumerate("HS"):
            shares.plot([100 * row[3] for row in rows if row[1] == factor], "os"[i], ms=5,
                        label=factor)
        shares.set_ylabel("diagonally dominant rows, %")
        shares.set_ylim(-5, 105)
        name_layers(shares, list(moments))
        shares.legend(fontsize=8)
    publish(args, stem(args, setup), f"""Gershgorin discs of the Kronecker factors H and S of
        {layer}, and the share of diagonally dominant rows in all layers ({where(setup, when)}). A
        disc that reaches 0 says nothing about its eigenvalues' sign.""",
            ("layer", "factor", "rows", "dominant_share", "median_radius_over_centre",
             "off_diagonal_share_of_absolute_sum"), rows, draw, (13, 4.8))


def perturb(args):
    """Eigenvalues of the factors with noise off the diagonal, and how many Kaiser's rule keeps.

    AdaFisher, section 3.1. Kaiser's rule keeps eigenvalues above 1, the mean eigenvalue of a
    correlation matrix, so H and S are brought to unit diagonal first. The noise is symmetric,
    normal, of deviation --noise off the diagonal; Weyl: no eigenvalue moves by more than ‖E‖₂. With
    the diagonal alone, all eigenvalues would be 1: what lies above and below is what a diagonal
    approximation drops.
    """
    when, setup, moments, layer = factors(args)
    rows, spectra = [], {}
    for name, m in moments.items():
        for factor, M in (("H", m.A), ("S", m.P)):
            R = correlation(M)
            E = symmetric_noise(R, args.noise)
            values, noisy = torch.linalg.eigvalsh(R).flip(0), torch.linalg.eigvalsh(R + E).flip(0)
            if name == layer:
                spectra[factor] = values, noisy
            rows.append((name, factor, len(R), *kaiser(values), *kaiser(noisy),
                         (values - noisy).abs().max().item(),
                         torch.linalg.matrix_norm(E, 2).item(), int((noisy < 0).sum())))

    def draw(picture):
        *axes, kept = picture.subplots(1, 3)
        for axis, (factor, pair) in zip(axes, spectra.items()):
            for values, mark, label in zip(pair, ("o", "x"), ("eigenvalues", "with noise")):
                shown = values.clamp(min=1e-5)
                axis.loglog(range(1, len(values) + 1), shown, mark, ms=4, mfc="none", label=label)
            axis.axhline(1, color="k", ls=":", label="Kaiser's rule; of the diagonal alone")
            axis.set_title(f"{factor} of {layer}, unit diagonal", fontsize=9)
            axis.set_xlabel("index, largest first")
            axis.set_ylabel("eigenvalue (below 1e-5 drawn there)")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        for i, factor in enumerate("HS"):
            kept.plot([100 * row[3] / row[2] for row in rows if row[1] == factor], "os"[i],
                      ms=5, label=f"{factor}: eigenvalues kept")
            kept.plot([100 * row[4] for row in rows if row[1] == factor], "+x"[i], ms=6,
                      label=f"{factor}: variance they hold")
        kept.set_ylabel("share, %")
        kept.set_ylim(-5, 105)
        name_layers(kept, list(moments))
        kept.legend(fontsize=7)
    publish(args, stem(args, setup), f"""Eigenvalues of the factors H and S of {layer} at unit
        diagonal, with and without symmetric noise of deviation {args.noise:g} off the diagonal, and
        what Kaiser's rule keeps in all layers ({where(setup, when)}).""",
            ("layer", "factor", "rows", "kept", "kept_share", "kept_noisy", "kept_share_noisy",
             "largest_change", "noise_spectral_norm", "negative_noisy"), rows, draw, (13, 4.8))


def fourier(args):
    """What frequencies the Kronecker factors hold, and the ratio of diagonal to off-diagonal in dB.

    AdaFisher, section 3.1: |fft2| of H and S in dB (20 log₁₀), with and without symmetric noise of
    deviation --noise times the mean diagonal entry, and of the diagonal alone, whose transform
    depends on the sum of both frequencies only: ridges. The ratio is
    10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²), M̂ with the noise.
    """
    when, setup, moments, layer = factors(args)
    rows, pictures = [], {}
    for name, m in moments.items():
        for factor, M in (("H", m.A), ("S", m.P)):
            noisy = M + symmetric_noise(M, args.noise)
            rows.append((name, factor, len(M), signal_to_noise(M, M), signal_to_noise(M, noisy)))
            if name == layer:
                pictures[factor] = {"": M / M.abs().max(), "spectrum of {}": spectrum(M),
                                    "spectrum of {} with noise": spectrum(noisy),
                                    "spectrum of {}'s diagonal": spectrum(M.diagonal().diag())}

    def draw(picture):
        axes = picture.subplots(2, 4)
        for line, (factor, images) in zip(axes, pictures.items()):
            for axis, (title, image) in zip(line, images.items()):
                field = bool(title)
                shown = axis.imshow(image, cmap="viridis" if field else "gray",
                                    vmin=-80 if field else None, interpolation="nearest",
                                    extent=(-math.pi, math.pi, math.pi, -math.pi) if field else None)
                axis.set_title(title.format(factor) or f"{factor} of {layer} / largest entry",
                               fontsize=9)
                axis.set_xlabel("frequency, rad" if field else "column")
                axis.set_ylabel("frequency, rad" if field else "row")
                picture.colorbar(shown, ax=axis, shrink=0.8, label="dB" if field else None)
    publish(args, stem(args, setup), f"""The factors H and S of {layer} ({where(setup, when)}) and
        their two-dimensional spectra, 0 dB the largest, below −80 dB dark. A diagonal matrix would
        show the ridges of the last column. Noise: symmetric, deviation {args.noise:g} of the mean
        diagonal entry.""", ("layer", "factor", "rows", "diagonal_to_upper_dB",
                             "diagonal_to_noisy_upper_dB"), rows, draw, (14, 6.5))


def landscape(args):
    """The paths of several optimizers on one loss surface: the plane that holds most of them.

    AdaFisher, section 4. Without RUN: --optim are trained from one seed; the plane is that of the
    two leading principal directions of all their iterates. With RUN, folders of train_cifar.py of
    one network and data set: of each only the last checkpoint exists, so its path is the straight
    line from its start, built again from the seed. The surface is the loss on --images training
    images. Directions have length 1 in the space of the parameters and are not normalised by
    filter: the paths are to scale. An iterate lies off the plane, so its own loss stands beside
    the plane's in the csv.
    """
    paths, setup, how = run_ends(args) if args.runs else trained_paths(args)
    points = torch.stack([point for path in paths.values() for _, point in path])
    centre, directions, coordinates, shares = principal_plane(points)
    batches, net = sample(setup.data, args), copy.deepcopy(setup.net).train()
    rows, i = [], 0
    for label, path in paths.items():
        for when, point in path:
            x, y = coordinates[i].tolist()
            rows.append((label, when, x, y, loss_at(net, point, batches),
                         loss_at(net, centre + coordinates[i] @ directions, batches)))
            i += 1
    xs, ys, losses = surface(setup.net, centre, directions, coordinates, batches, args.grid)

    def draw(picture):
        axis = picture.subplots()
        filled = axis.contourf(xs, ys, losses.clamp(max=2 * max(row[5] for row in rows)).log10(),
                               30, cmap="Greys")
        picture.colorbar(filled, label="log₁₀ of the loss in the plane")
        for label in paths:
            line = [row for row in rows if row[0] == label]
            drawn, = axis.plot([r[2] for r in line], [r[3] for r in line],
                               "o--" if args.runs else ".-", ms=4, lw=1.3,
                               label=f"{label}: {line[-1][4]:.2f}")
            axis.plot(line[-1][2], line[-1][3], "*", ms=13, color=drawn.get_color(), mec="k")
        for axis_of, number in ((axis.set_xlabel, 0), (axis.set_ylabel, 1)):
            axis_of(f"principal direction {number + 1} "
                    f"({100 * shares[number]:.1f} % of the iterates' variance), length in weights")
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(fontsize=8, title="star: the end, and its loss", title_fontsize=8)
    name = f"landscape-{setup.config['model']}-{setup.config['dataset']}"
    caption = f"""{how} Loss on {len(batches[0][1]) * len(batches)} training images
        ({setup.config['model']} on {setup.config['dataset']}) over the plane of the iterates' two
        leading principal directions, not normalised by filter; paths are projected to it."""
    columns = ("path", "when", "direction_1", "direction_2", "loss", "loss_in_plane")
    publish(args, name, caption, columns, rows, draw, (8, 7),
            [row for label in paths for row in [r for r in rows if r[0] == label][::9999]])
    write_csv(Path(args.output_dir, f"{name}-surface.csv"), caption, args,
              ("direction_1", "direction_2", "loss"),
              [(x, y, losses[i, j].item()) for i, y in enumerate(ys.tolist())
               for j, x in enumerate(xs.tolist())])


def trained_paths(args):
    """{optimizer: [(step, parameters)]} from one seed, a Setup, and what was done."""
    paths = {}
    for optim in args.optim:
        setup = set_up(args, optim)
        paths[optim] = [(step, flat(setup.net)) for step, _ in training(setup, args.steps, optim)
                        if step % max(1, args.steps // 30) == 0]
    return paths, setup, f"""Paths of {', '.join(args.optim)}, {args.steps} steps each from one
        start (seed {args.run})."""


def run_ends(args):
    """{run: [(0, its start), (epoch, its end)]}, a Setup, and what was done."""
    paths, first = {}, None
    for folder in args.runs:
        config, saved = read_run(folder)
        if first is None:
            first, data = (config["model"], config["dataset"]), \
                datasets.load(config["dataset"], args.data_dir)
        if (config["model"], config["dataset"]) != first:
            raise UsageError(f"{folder} is {config['model']} on {config['dataset']}, but "
                             f"{args.runs[0]} is {first[0]} on {first[1]}: one surface takes runs "
                             "of one network and data set")
        net, optimizer = build(config, data)
        start = flat(net)
        net.load_state_dict(saved["model"])
        paths[label_of(Path(folder), folder)] = [(0, start), (saved["epoch"], flat(net))]
    return paths, Setup(data, config, net, optimizer), """Straight lines from start to end of runs,
        whose folders hold no iterates between."""


def covariance(module, x):
    """A = E[a aᵀ] of one batch by explicit patches, float64: (d, d); groups = 1."""
    if isinstance(module, nn.Conv2d):
        a = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        a = a.transpose(1, 2).flatten(0, 1)                     # (B·oH·oW, C·kh·kw)
    else:
        a = x.flatten(0, -2)
    a = a if module.bias is None else F.pad(a, (0, 1), value=1.0)
    return (a.mT @ a).double() / len(a)


def train_and_watch(setup, steps):
    """Train; returns {weight: the average of A that the optimizer's sketch is of}, last loss."""
    optimizer, averages = setup.optimizer, {}
    group = optimizer.param_groups[0]

    def watch(module, args):
        if optimizer.steps % group["tcov"] == 0:
            A, (old, k) = covariance(module, args[0].detach()), averages.get(module.weight, (0, 0))
            averages[module.weight] = (running_mean(old, A, k + 1, group["stat_decay"]) if k else A,
                                       k + 1)
    for module in layers_of(setup.net).values():
        module.register_forward_pre_hook(watch)
    for _, loss in training(setup, steps):
        pass
    return {weight: A for weight, (A, _) in averages.items()}, loss


def nystrom(args):
    """What NysAct's sketch holds of each layer, after training with its published settings.

    λ₁ is the largest eigenvalue of the covariance A that was averaged, λ̂₁ that of the sketch Â; the
    smallest eigenvalue of the preconditioner ρ(Â + ρI)⁻¹ stands beside the true ρ/(ρ + λ₁), where
    1 would be plain SGD; and the condition number of (Â + ρI)⁻¹(A + ρI), 1 if Â were A, beside
    that of A + ρI in brackets.
    """
    setup, rows = set_up(args), []
    ρ, rank, sketch = (setup.config[name] for name in ("damping", "rank", "sketch"))
    # one step more than asked for: what is applied is refreshed at the beginning of every 50th
    averages, loss = train_and_watch(setup, args.steps + 1)
    for layer in setup.optimizer.layers.values():
        A, state = averages[layer.weight], setup.optimizer.state[layer.weight]
        true, identity = torch.linalg.eigvalsh(A), torch.eye(len(A), dtype=A.dtype)
        if "eigenvalues" in state:
            U, eigenvalues = state["U"].double(), state["eigenvalues"].double()
            seen = eigenvalues.max()
            R = torch.linalg.cholesky(A + ρ * identity)         # similar to (Â + ρI)⁻¹(A + ρI)
            values = torch.linalg.eigvalsh(
                nysact.precondition(R.mT.contiguous(), None, U, eigenvalues, ρ)[0] @ R)
        else:                                                   # d ≤ r: exact
            seen, values = true[-1], torch.ones(2)
        rows.append((layer.name, len(A), *map(float, (
            true[-1], seen, ρ / (ρ + seen), ρ / (ρ + true[-1]), values[-1] / values[0],
            (true[-1] + ρ) / (true[0] + ρ)))))
    print(f"{setup.config['model']} on {args.dataset} after {args.steps} steps, rank {rank} "
          f"{sketch}, ρ = {ρ:g}, loss {loss:.3f}, torch {torch.__version__}\n"
          "layer                  d      λ₁       λ̂₁   smallest eigenvalue     true   "
          "condition number")
    for name, d, top, seen, smallest, wanted, condition, plain in rows:
        print(f"{name:<18}{d:>6}{top:>8.2f}{seen:>9.2f}{smallest:>22.5f}{wanted:>9.5f}"
              f"{condition:>11.2f} ({plain:.1f})")
    identities = sum(row[4] > 0.999 and row[5] < 0.99 for row in rows)
    print(f"layers whose preconditioner is the identity: {identities} of {len(rows)}")

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for axis, pairs in ((left, ((2, "o", "λ₁ of A"), (3, "x", "λ̂₁ of the sketch"))),
                            (right, ((7, "o", "A + ρI"), (6, "x", "(Â + ρI)⁻¹(A + ρI)")))):
            for key, mark, label in pairs:
                axis.semilogy([row[key] for row in rows], mark, mfc="none", label=label)
            name_layers(axis, [row[0] for row in rows])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        left.set_ylabel("largest eigenvalue")
        right.set_ylabel("condition number")
    publish(args, stem(args, setup), f"""What a rank-{rank} {sketch} sketch holds of each layer's
        input covariance A, and what its inverse leaves ({where(setup, f'step {args.steps}')}).""",
            ("layer", "d", "lambda_1", "sketch_lambda_1", "smallest_eigenvalue", "true_smallest",
             "condition", "condition_plain"), rows, draw, (10, 4.5), ())


# ---------------------------------------------------------------------------------------------
# 5. The command line
# ---------------------------------------------------------------------------------------------

# figure: (function, defaults of its flags); the flags are those that its defaults name
TRAINED = dict(model="resnet20", optim="sgd", steps=60, batch_size=64)
PROBED = TRAINED | dict(images=256, layer=None, from_run=None)
FIGURES = {
    "effect": (effect, TRAINED | dict(optim="mac", steps=100)),
    "spectra": (spectra, PROBED),
    "mean": (mean, {k: v for k, v in PROBED.items() if k != "layer"}),
    "attention": (attention, dict(model="deit_tiny_cifar", optim="adamw", steps=40, batch_size=32,
                                  images=128, from_run=None)),
    "convergence": (convergence, TRAINED | dict(model="lenet5", steps=160, images=256, samples=64)),
    "gershgorin": (gershgorin, PROBED),
    "perturb": (perturb, PROBED | dict(noise=1e-3)),
    "fourier": (fourier, PROBED | dict(noise=1e-3)),
    "curves": (curves, dict(runs="+")),
    "landscape": (landscape, TRAINED | dict(
        model="lenet5", optim=["sgd", "mac", "foof", "kfac", "adamw"], steps=150, images=256,
        grid=25, runs="*")),
    "nystrom": (nystrom, dict(model="resnet20", steps=100, batch_size=128)),
}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python analyze.py FIGURE [flags]", allow_abbrev=False)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE",
                                    title="figures", help="what each shows:")
    for name, (make, defaults) in FIGURES.items():
        lines = inspect.getdoc(make)
        figure = figures.add_parser(name, help=lines.split("\n")[0], description=lines,
                                    formatter_class=argparse.RawDescriptionHelpFormatter,
                                    allow_abbrev=False)
        figure.set_defaults(make=make)
        add_flags(figure, defaults)
    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
    args = parser.parse_args(argv)
    args.argv = argv
    if args.figure == "nystrom":
        args.optim = "nysact"
    elif args.figure == "landscape":
        args.optim = list(dict.fromkeys(args.optim))
    if args.figure != "curves":
        optims = [args.optim] if isinstance(args.optim, str) else args.optim
        for name in sorted({name for recipe in RECIPES.values() for name in recipe}):
            if getattr(args, name, None) is not None and not any(
                    name in RECIPES[optim] for optim in optims):
                raise UsageError(f"--{name} has no use in {', '.join(optims)}")
    return args


def add_flags(figure, defaults):
    """The flags that the defaults name; with a model, also where data lies and the optimizers'."""
    def flag(name, help, **kwargs):
        if name in defaults:
            figure.add_argument(f"--{name}", default=defaults[name], help=help if
                                defaults[name] is None else f"{help} (default %(default)s)",
                                **kwargs)
    if "runs" in defaults:
        figure.add_argument("runs", nargs=defaults["runs"], metavar="RUN",
                            help="folder that train_cifar.py wrote")
    figure.add_argument("--output_dir", default="figures", metavar="DIR",
                        help="folder of the csv and the PNG (default %(default)s)")
    if "model" not in defaults:
        return
    figure.add_argument("--dataset", default="shapes", choices=list(datasets.STATISTICS),
                        help="default %(default)s, generated")
    figure.add_argument("--data_dir", default="data", metavar="DIR", help="default %(default)s")
    figure.add_argument("--run", type=COUNT_OR_ZERO, default=0, metavar="SEED",
                        help="seed of everything random (default %(default)s)")
    several = dict(nargs="+") if isinstance(defaults.get("optim"), list) else {}
    flag("model", "%(choices)s", choices=list(CIFAR_MODELS), metavar="NAME")
    flag("optim", "what trains; of %(choices)s", choices=list(RECIPES), metavar="NAME", **several)
    flag("steps", "steps of training", type=COUNT, metavar="N")
    flag("batch_size", "images per step", type=COUNT, metavar="N")
    flag("images", "images that statistics and losses are taken over", type=COUNT, metavar="N")
    flag("samples", "images of the Jacobian", type=COUNT, metavar="N")
    flag("layer", "layer by name; an unknown one lists all", nargs="+", metavar="NAME")
    flag("from_run", "take start and end of this run of train_cifar.py, and train nothing",
         metavar="DIR")
    flag("noise", "deviation of the noise off the diagonal, by the mean of the diagonal",
         type=POSITIVE, metavar="X")
    flag("grid", "points of the surface along each axis", type=COUNT, metavar="N")

    def optimizer_flag(group, name, *alias, help, default=None, **kwargs):
        if name != "calibrate":
            group.add_argument(f"--{name}", *alias, dest=name, help=help, default=None, **kwargs)
    add_optimizer_flags(optimizer_flag, figure.add_argument_group(
        "optimizer (what is not given is as published; LeNet-5 with 0.01 for a rate of 0.1)"))


def main(argv):
    """Run the command; its exit status."""
    try:
        args = parse(argv)
        args.make(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, Diverged, datasets.DataError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
