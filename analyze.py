"""What the preconditioners see and do: the figures of their papers, from one command each.

    python analyze.py effect --optim mac       # does the preconditioner do anything? and a placebo
    python analyze.py spectra                  # eigenvalues of A, P and A ⊗ P while it trains
    python analyze.py mean                     # is the mean input the top eigenvector of A?
    python analyze.py attention                # likewise mean attention, of the scores
    python analyze.py convergence              # how fast GD, FOOF, K-FAC, NysAct, MAC contract
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
import io
import itertools
import math
import os
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
import kfac
import mac
import nysact
from adafisher import AdaFisher
from capture import Use
from covariance import (damped_cholesky, input_covariance, mean_eigenvalue, pack, solve_right,
                        unpack)
from mac import MAC
from models import CIFAR_MODELS, Attention
from optimizer import running_mean
from patches import Geometry
from run import (COUNT, OPTIMIZER_FLAGS, POSITIVE, RECIPES, SEED, Diverged, Parser, UsageError,
                 make_optimizer, number, print_anything, user_path, write_file)


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
    """λ_min/λ_max of a Gram matrix (n, n), 0 where it is singular to rounding; λ_min, λ_max.

    Gradient descent on ½‖u − y‖² with du/dt along −gram (u − y) and the step 1/λ_max multiplies the
    slowest component of u − y by 1 − λ_min/λ_max: 1 is one step, 0 never.
    """
    values = torch.linalg.eigvalsh((gram + gram.mT) / 2)
    low, high = values[0].item(), values[-1].item()
    return low / high if low > len(gram) * torch.finfo(gram.dtype).eps * high else 0.0, low, high


def preconditioned_grams(J, moments, first):
    """{method: J B Jᵀ} of one layer: J (n, out, d) holds the gradients of n outputs.

    B is the method's multiplier at its published damping, from the layer's moments: I, (A + ρI)⁻¹,
    the factored (P + …)⁻¹ ⊗ (A + …)⁻¹, (Â + ρI)⁻¹ at the published rank, and ρ(ā āᵀ + ρI)⁻¹, which
    is ρ(A + ρI)⁻¹ in the first layer. They act on rows, so J goes in as one tall gradient.
    """
    n, out, d = J.shape
    A, rows = moments.A[None], J.flatten(0, 1)[None]                        # (1, n·out, d)
    damping = {optim: torch.tensor([RECIPES[optim]["damping"]], dtype=A.dtype)
               for optim in ("foof", "kfac", "nysact", "mac")}
    factor = damped_cholesky(A.clone(), damping["foof"])[0]
    P = moments.P[None] * moments.positions
    factors = [damped_cholesky(M.clone(), x)[0] for M, x in zip(
        (A, P), kfac.dampings(pack(A), pack(P), damping["kfac"]))]
    S = nysact.draw_sketch(1, d, min(RECIPES["nysact"]["rank"], d), "gaussian", seed=0)
    U, values, _ = nysact.nystrom(A @ S, S)
    applied = {
        "GD": rows,
        "FOOF": solve_right(rows, factor),
        "K-FAC": torch.cat([kfac.solve_factored(G[None], *factors) for G in J]),
        "NysAct": nysact.precondition(rows, U, values, damping["nysact"].item()),
        "MAC": damping["mac"] * solve_right(rows, damped_cholesky(A.clone(), damping["mac"])[0])
        if first else mac.precondition(rows, moments.mean[None], damping["mac"].item())}
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
    """How many eigenvalues of a correlation matrix exceed their mean, 1; their share of the sum."""
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
    """10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²) in dB: the diagonal of M, the upper triangle of M̂."""
    return 10 * torch.log10(M.diagonal().square().sum() / noisy.triu(1).square().sum()).item()


def cosine_bound(low, high):
    """The least cos∠(B g, g) for a symmetric B with eigenvalues in [low, high], low > 0.

    Kantorovich: 2√(low·high)/(low + high). Attained by a g with parts √high along the lowest and
    √low along the highest eigenvector; 1 where B is a multiple of the identity.
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
        fisher = optimizer.fisher(optimizer.param_groups[0])
        values = [fisher[p].flatten() - damping for p in params if p in fisher]
        values = torch.cat(values) if values else None
    elif params and "exp_avg_sq" in optimizer.state.get(params[0], {}):      # Adam, AdamW
        group = optimizer.param_groups[0]
        damping, second = group["eps"], [optimizer.state[p] for p in params]
        values = torch.cat([(s["exp_avg_sq"] / (1 - group["betas"][1] ** float(s["step"]))).sqrt()
                            .flatten() for s in second])
    elif "output_covariance" in state:
        return kfac_multiplier(state, damping)
    elif "applied" in state:
        layer, scale = optimizer.layers[weight], damping
        applied = optimizer.gathered([layer], ["applied"])["applied"]
        values = F.pad(applied.square().sum(1, keepdim=True), (0, applied.shape[1] - 1))
    elif "eigenvalues" in state:
        U = state["U"]
        values = F.pad(state["eigenvalues"], (0, U.shape[1] - U.shape[2]))
    elif "factor" in state:
        L = state["factor"].double()     # float32 LAPACK gives up on some matrices with many zeros
        values = torch.linalg.eigvalsh(L @ L.mT) - damping
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
        A, P = (torch.linalg.eigvalsh(L @ L.mT) for L in
                (state["factor"].double(), state["output_factor"].double()))
        damped = A.unsqueeze(2) * P.unsqueeze(1)
    else:
        A, P = state["values"], state["output_values"]
        damped = A.unsqueeze(2) * P.unsqueeze(1) + damping
    a, p = (mean_eigenvalue(state[name]).mean().item()
            for name in ("covariance", "output_covariance"))
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
    config: dict               # what build takes
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
    data = datasets.load(args.dataset, args.data_dir)
    return Setup(data, config, *build(config, data))


def build(config, data):
    """The network and the optimizer with which train_cifar.py begins such a run."""
    torch.manual_seed(config["run"])
    net = CIFAR_MODELS[config["model"]](data.num_classes, *data.train_images.shape[1:3])
    try:
        return net, make_optimizer(net, net.parameters(), dict(config, seed=config["run"]),
                                   RECIPES[config["optim"]])
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def training(setup, steps, text="steps"):
    """Train; yields (0, nan) and after each step (steps taken, its loss). Raises Diverged."""
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
        try:
            optimizer.step()
        except FloatingPointError as error:
            raise Diverged(f"training with {config['optim']} diverged in step {step}: {error}")
        if not (loss.isfinite() and all(p.isfinite().all() for p in net.parameters())):
            raise Diverged(f"training with {config['optim']} diverged in step {step}: try a "
                           "smaller --lr")
        yield step, loss.item()


def stages(args, fractions=(1,)):
    """Yield (when, setup): after these fractions of the steps; of a run, its start and its end.

    A run's folder holds its last checkpoint only; its start is built again from its seed.
    """
    if args.from_run is None:
        setup, wanted = set_up(args), {round(f * args.steps) for f in fractions}
        choose(setup.net, getattr(args, "layer", None), ())       # refused now, not after training
        for step, _ in training(setup, args.steps):
            if step in wanted:
                yield f"step {step}", setup
        return
    config, saved = read_run(args.from_run)
    data = datasets.load(config["dataset"], args.data_dir)
    net, optimizer = build(config, data)
    if 0 in fractions:
        yield "start", Setup(data, config, net, optimizer)
    put_weights(net, saved, config)
    yield f"epoch {saved['epoch']}", Setup(data, config, net, optimizer)


def read_run(folder):
    """The configuration and the checkpoint in a folder that train_cifar.py wrote."""
    path = Path(folder, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = dict(saved["config"], channels_last=False)
        if config["model"] not in CIFAR_MODELS or config["dataset"] not in datasets.STATISTICS:
            raise KeyError(config["model"])
        if "seed" in config:
            config["run"] = config["seed"]                    # as it is called here
        for name in ("run", *RECIPES[config["optim"]]):       # what build() and a caption need
            config[name]
        return config, {name: saved[name] for name in ("epoch", "model")}
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no checkpoint.pt: name a folder written by "
                         "train_cifar.py")
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} is damaged or not a checkpoint of train_cifar.py "
                         f"({type(error).__name__})")


def put_weights(net, saved, config):
    """Load a run's parameters into the network that build() made from its configuration."""
    try:
        net.load_state_dict(saved["model"])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UsageError(f"the checkpoint does not fit this version of {config['model']}: "
                         f"{str(error).splitlines()[0]} Train the run anew")


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
    """{name: Moments} of these layers (groups = 1) over the batches, of a copy of the network."""
    net = copy.deepcopy(net).requires_grad_().train()
    sums = {name: [0, 0, 0] for name in names}       # Σ [a; 1][a; 1]ᵀ and Σ p pᵀ, packed; rows

    def record(name, module, args, output):
        use = use_of(module, args[0].detach().double(), output)
        sums[name][0] = sums[name][0] + input_covariance(use, True)
        sums[name][2] += use.rows
        # a Linear's output on more than two dimensions is a view
        (output._base if output._is_view() else output).register_hook(
            lambda p: add_outputs(name, use, p.reshape(output.shape)))

    def add_outputs(name, use, p):
        sums[name][1] = sums[name][1] + kfac.output_gram(p.double(), use, p.shape[1 if
            use.kind == "conv" else -1], False)

    layers = layers_of(net)
    for name in names:
        layers[name].register_forward_hook(partial(record, name))
    for x, y in tqdm(batches, "moments", disable=None, leave=False):
        F.cross_entropy(net(x), y, reduction="sum").backward()
    images, found = sum(len(y) for _, y in batches), {}
    for name, (A, P, rows) in sums.items():
        weight, bias = layers[name].weight, layers[name].bias
        d = weight[0].numel() + (bias is not None)
        A, P = symmetric(A) / rows, symmetric(P) / rows
        found[name] = Moments(A[:d, :d], P, A[-1, :d], rows / images)   # its last row is E[[a; 1]]
    return found


def use_of(module, x, output):
    """The use that a Linear or Conv2d (groups = 1) made of its weight, from x to output."""
    if isinstance(module, nn.Linear):
        return Use("linear", x, None, output.shape, x.numel() // x.shape[-1], slice(None), 1)
    rows = len(x) * output.shape[2] * output.shape[3]
    return Use("conv", x, None, output.shape, rows, slice(None), 1, geometry=Geometry.of(
        module.weight, module.stride, module.padding, module.dilation))


def symmetric(packed):
    """(d, d) from a packed lower triangle (1, d(d+1)/2) of one block."""
    L = unpack(packed)[0]
    return L + L.tril(-1).mT


def attention_matrices(net, batches):
    """{block: (T, cosines)}: T (N, N) averaged over images and heads, rows summing to 1.

    cosines: top_cosine of every single TᵀT with its own t̄, over heads and the first batch.
    """
    net, found = copy.deepcopy(net).eval(), {}
    # of this very class: a subclass adds biases or masks to the scores
    blocks = {name: module for name, module in net.named_modules() if type(module) is Attention}
    if not blocks:
        raise UsageError("the network has no attention; --model deit_tiny_cifar has")

    def record(name, parent, module, args, output):
        B, N = output.shape[:2]
        q, k, _ = output.double().view(B, N, 3, parent.num_heads, -1).permute(2, 0, 3, 1, 4)
        T = (q @ k.mT * parent.scale).softmax(-1)                                 # (B, h, N, N)
        total, images, cosines = found.get(name, (0, 0, None))
        if cosines is None:
            cosines = top_cosine(T.mT @ T, T.mean(2)).flatten()
        found[name] = total + T.mean(1).sum(0), images + B, cosines
    for name, module in blocks.items():
        module.qkv.register_forward_hook(partial(record, name, module))
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
    grads, found = vmap(grad(logit), (None, 0, 0), chunk_size=16)(params, x.double(), y), {}
    for name in names:
        W, b = grads[f"{name}.weight"].flatten(2), grads.get(f"{name}.bias")
        found[name] = W if b is None else torch.cat([W, b.unsqueeze(2)], 2)
    return found


class PlainMomentum:
    """The moment that an optimizer would keep of raw gradients: heavy ball, or Adam's average."""

    def __init__(self, group):
        self.averages = group.get("momentum") is None
        self.decay = group.get("beta", group.get("betas", (0,))[0]) if self.averages else \
            group["momentum"]
        self.nesterov = group.get("nesterov", False)
        self.moments = {}

    def add(self, p):
        """Take in p.grad; what plain SGD would multiply by −lr."""
        m, k = self.moments.get(p, (torch.zeros_like(p), 0))
        self.moments[p] = m, k + 1
        if self.averages:
            return running_mean([m], [p.grad], k + 1, self.decay)[0]
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
    logs, curves = [], []
    for folder in folders:
        found = sorted(Path(folder).rglob("log.csv"))
        if not found:
            raise UsageError(f"{folder} holds no log.csv: name folders written by train_cifar.py, "
                             "or a folder of such folders")
        logs += found
    for log in logs:
        try:
            with open(log, newline="", encoding="utf-8") as file:
                rows = [[float(row[name]) for name in ("seconds", "train_loss", "test_acc")]
                        for row in csv.DictReader(file)]
            seconds = list(itertools.accumulate(row[0] for row in rows))
            curves.append([(i + 1, seconds[i], *row[1:]) for i, row in enumerate(rows)])
        except (KeyError, TypeError, ValueError, csv.Error):
            rows = []
        if not rows:
            raise UsageError(f"{log} is not a log of train_cifar.py: it lacks a number in one of "
                             "the columns train_loss, test_acc, seconds")
    return dict(zip(labels([log.parent for log in logs]), curves))


def labels(runs):
    """Each run's path below the folder that all have in common."""
    paths = [Path(run).resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


# ---------------------------------------------------------------------------------------------
# 3. Numbers, tables, pictures
# ---------------------------------------------------------------------------------------------

def print_table(columns, rows):
    lines = [list(columns), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
                              for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w)
                        for i, (cell, w) in enumerate(zip(line, widths))))


def write_csv(path, caption, args, columns, rows):
    """The caption, the command and torch's version as comments, then the header and the rows."""
    head = [caption, shlex.join(["python", "analyze.py", *args.argv]), f"torch {torch.__version__}"]
    content = io.StringIO()
    content.writelines(f"# {line}\n" for line in head)
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    write_file(path, lambda file: file.write(content.getvalue().encode()))


def publish(args, setup, when, caption, columns, rows, shown, size, draw):
    """Write FIGURE-MODEL-OPTIM-DATASET.csv and .png, print a table; returns path and caption.

    setup: what was trained, or None. caption: one sentence, to which `setup` and `when` are added.
    columns: names, with units where there are any; rows: tuples; shown: those of the printed table.
    draw: what fills an empty matplotlib figure of `size` inches.
    """
    folder, name, caption = Path(args.output_dir), args.figure, " ".join(caption.split())
    if setup is not None:
        config = setup.config
        name = "-".join([name, config["model"], config["optim"], config["dataset"]])
        seeds = config["run"] if isinstance(config["run"], list) else [config["run"]]
        seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        caption = f"{caption.rstrip('.')} ({config['model']} on {config['dataset']}, " \
            f"{config['optim']}, {when}, {seeds})."
    if args.note:
        caption = f"{caption.rstrip('.')} ({args.note})."
    write_csv(folder / f"{name}.csv", caption, args, columns, rows)
    if shown:
        print_table(columns, shown)
    print("", textwrap.fill(caption, 100), folder / f"{name}.csv", sep="\n")
    try:
        from matplotlib.figure import Figure
        from PIL import Image                        # matplotlib needs it too
    except ImportError:
        print("no picture, since matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return folder / name, caption
    picture, buffer = Figure(figsize=size, layout="constrained", dpi=90), io.BytesIO()
    draw(picture)
    picture.supxlabel(textwrap.fill(caption, int(size[0] * 15.5)), fontsize=8, x=0.01, ha="left")
    picture.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")           # 256 colours are a third of the bytes
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    write_file(folder / f"{name}.png", lambda file: image.save(file, "PNG", optimize=True))
    print(folder / f"{name}.png")
    return folder / name, caption


def finish(axis, xlabel, ylabel, title=None):
    """Words, grid and legend of one panel."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, framealpha=0.5)


def by_layer(axis, names, ylabel, *series):
    """Each of series (values, mark, label) over the layers, in the order of the network."""
    for values, mark, label in series:
        axis.plot(range(len(names)), values, mark, ms=6, mfc="none", label=label)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    finish(axis, "layer", ylabel)


def colours(items):
    """(item, colour from dark to light) for a sequence of things that are ordered."""
    from matplotlib import colormaps
    return [(item, colormaps["viridis"](0.9 * i / max(1, len(items) - 1)))
            for i, item in enumerate(items)]


def evenly(items, count):
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return [items[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]


def columns_of(rows, first):
    """The columns of a table from the index `first` on, as lists."""
    return [list(column) for column in zip(*rows)][first:]


# ---------------------------------------------------------------------------------------------
# 4. The figures; their docstrings are what --help shows
# ---------------------------------------------------------------------------------------------

def effect(args):
    """Does the preconditioner do anything? Each module's update beside that of plain momentum.

    Along the run of any optimizer, without weight decay: cosine and ratio of lengths of the update
    (over −lr) against the momentum of the raw gradients on the same path; the smallest and largest
    eigenvalue of the multiplier B; the cosine that these guarantee while B stands still,
    2√(low·high)/(low + high); and relative damping, damping over the mean eigenvalue of what it is
    added to. Beside it a placebo: plain momentum from the same start on the same batches, each
    module's step multiplied by one constant, its mean ratio of lengths. If the placebo's loss falls
    as fast, then the length of the steps did it and not their direction.
    """
    setup, found, losses = set_up(args), [], {args.optim: []}
    for step, loss, modules in watch_updates(setup, args.steps, max(1, args.steps // 20)):
        losses[args.optim].append(loss)
        found += [(name, step, cosine, ratio, low, high, cosine_bound(low, high), damping)
                  for name, (cosine, ratio, low, high, damping) in modules.items()]
    ratios = {}
    for name, _, _, ratio, *_ in found:
        ratios.setdefault(name, []).append(ratio)
    constants = {name: sum(values) / len(values) for name, values in ratios.items()}
    losses["placebo"] = train_placebo(setup, args.steps, constants)
    padded = losses["placebo"] + [math.nan] * args.steps
    rows = [(*row, losses[args.optim][row[1] - 1], constants[row[0]], padded[row[1] - 1])
            for row in found]
    last = [row for row in rows if row[1] == rows[-1][1] and row[0] in layers_of(setup.net)]
    publish(args, setup, f"{args.steps} steps of {args.batch_size} images", f"""What {args.optim}
        does to the momentum of the gradients, beside a placebo, plain momentum with one constant
        per module that makes its steps as long on average; with cosine 1 and multipliers without
        range it would be SGD.""",
            ("module", "step", "cosine", "length_ratio", "multiplier_min", "multiplier_max",
             "cosine_bound", "relative_damping", "loss", "placebo_constant", "placebo_loss"), rows,
            last, (12, 7), partial(draw_effect, rows=rows, last=last, losses=losses))


def train_placebo(setup, steps, constants):
    """The losses of the Placebo with these constants, up to where it diverges."""
    net, _ = build(setup.config, setup.data)
    placebo, losses = Placebo(net, setup.optimizer.param_groups[0], constants), []
    try:
        config = setup.config | dict(fisher=None)      # labels are sampled for K-FAC alone
        setup = setup._replace(config=config, net=net, optimizer=placebo)
        for step, loss in training(setup, steps, "placebo"):
            losses += [loss] if step else []
    except Diverged:
        print(f"note: the placebo diverged after {len(losses)} steps", file=sys.stderr)
    return losses


def draw_effect(picture, rows, last, losses):
    (cosines, ratios, loss), (bounds, ranges, damping) = picture.subplots(2, 3)
    names = [row[0] for row in last]
    for name, colour in colours(evenly(names, 6)):
        steps, cosine, ratio, *_ = columns_of([row for row in rows if row[0] == name], 1)
        cosines.plot(steps, cosine, ".-", color=colour, label=name)
        ratios.plot(steps, ratio, ".-", color=colour, label=name)
        ratios.axhline(sum(ratio) / len(ratio), color=colour, ls=":", lw=1)
    cosines.axhline(1, color="k", ls=":", lw=1, label="placebo")
    finish(cosines, "step", "cosine with plain momentum")
    ratios.set_yscale("log")
    finish(ratios, "step", "length / plain momentum's\n(dotted: placebo)")
    for (name, values), style in zip(losses.items(), ("-", "--")):
        means = [sum(values[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(values))]
        loss.plot(range(1, len(means) + 1), means, style, label=name)
    finish(loss, "step", "training loss, mean of 10 steps")
    _, cosine, _, low, high, bound, relative, _, constant, _ = columns_of(last, 1)
    by_layer(bounds, names, f"cosine in step {last[0][1]}", (cosine, "o", "measured"),
             (bound, "_", "at least, while B stands still"))
    ranges.vlines(range(len(last)), low, high, lw=3, label="multiplier")
    ranges.set_yscale("log")
    by_layer(ranges, names, "eigenvalues of B, range",
             (constant, "kx", "placebo's constant"))
    damping.set_yscale("log")
    damping.axhline(1, color="k", ls=":", lw=1)
    by_layer(damping, names, "relative damping", (relative, "o", None))


def spectra(args):
    """The 50 largest eigenvalues of A, P and A ⊗ P at the beginning, middle and end of training.

    MAC, figure 1. Without --layer: the first, the middle and the last. A ⊗ P is K-FAC's block but
    for the number of positions of a convolution, by which P is multiplied there.
    """
    rows = []
    for when, setup in stages(args, (0, 0.5, 1)):
        names = choose(setup.net, args.layer, (0, 0.5, 1))
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            for matrix, values in top_eigenvalues(m, 50).items():
                rows += [(name, when, matrix, i + 1, v)
                         for i, v in enumerate(values.tolist()) if v > 1e-12 * values[0]]
    whens = list(dict.fromkeys(row[1] for row in rows))

    def draw(picture):
        axes = picture.subplots(len(names), 3, squeeze=False, sharex=True)
        for name, line in zip(names, axes):
            for axis, matrix in zip(line, ("A", "P", "A ⊗ P")):
                for when, colour in colours(whens):
                    points = [row[3:] for row in rows if row[:3] == (name, when, matrix)]
                    axis.semilogy(*zip(*points), ".-", ms=3, lw=1, color=colour, label=when)
                finish(axis, "index, largest first", "eigenvalue", f"{matrix} of {name}")
    publish(args, setup, f"up to {when}", """Largest eigenvalues of the second moments A of the
        inputs and P of the output gradients of some layers, and of A ⊗ P, their products.""",
            ("layer", "when", "matrix", "index", "eigenvalue"), rows,
            [row for row in rows if row[3] in (1, 10)], (10, 2.4 * len(names) + 1), draw)


def mean(args):
    """Per layer: |cos∠(v₁(A), ā)| with the bound of Proposition 4.1; ‖Σ‖₂ beside ‖ā‖².

    MAC, figure 2. A = ā āᵀ + Σ, v₁ the top eigenvector. From sin θ ≤ ‖Σ‖₂/‖ā‖² a least cosine, 0
    where ‖Σ‖₂ is the larger; and a sharper one that also asks how far Σ turns ā (see alignment).
    MAC itself treats the first layer by A, and the value projection by attended tokens.
    """
    rows = []
    for when, setup in stages(args, (0, 1)):
        names = list(layers_of(setup.net))
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            rows.append((name, when, *alignment(m.A, m.mean).values()))
    before, after = ([row for row in rows if row[1] == w] for w in (rows[0][1], when))
    cosine, bound, sharp, squared, spread, frobenius = columns_of(after, 2)

    def draw(picture):
        left, right = picture.subplots(1, 2)
        by_layer(left, names, "|cos∠(v₁(A), ā)|",
                 (columns_of(before, 2)[0], ".", f"measured, {before[0][1]}"),
                 (cosine, "o", f"measured, {when}"), (sharp, "_", "at least (sharper bound)"),
                 (bound, "x", "at least (‖Σ‖₂/‖ā‖²)"))
        right.set_yscale("log")
        by_layer(right, names, "squared length of an input", (squared, "s", "ā: ‖ā‖²"),
                 (spread, "^", "Σ: ‖Σ‖₂"), (frobenius, "v", "Σ: Frobenius norm"))
    publish(args, setup, when, """How near the top eigenvector of A is to the mean input ā, and how
        large the two parts of A = ā āᵀ + Σ are, of which MAC keeps the first.""",
            ("layer", "when", "cosine", "bound", "sharp_bound", "mean_squared", "spread_spectral",
             "spread_frobenius"), rows, after, (11, 5), draw)


def attention(args):
    """Is attention its column means t̄? Singular values of T; |cos| of its top right one with t̄.

    MAC, figure 3. T (N, N) is averaged over images and heads. It is not symmetric: T = 1 t̄ᵀ + E,
    so the right singular vector is what Proposition 4.1 compares with t̄. Averaging itself brings
    T nearer to rank 1, hence the mean cosine of single images and heads beside it.
    """
    rows = []
    for when, setup in stages(args, (0, 1)):
        for block, (T, cosines) in attention_matrices(setup.net, sample(setup.data, args)).items():
            near = list(alignment(T.mT @ T / len(T), T.mean(0)).values())[:3]
            rows.append((block, when, *near, cosines.mean().item(),
                         *torch.linalg.svdvals(T).tolist()))
    before, after = ([row for row in rows if row[1] == w] for w in (rows[0][1], when))
    cosine, bound, sharp, single = columns_of(after, 2)[:4]

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for (block, _, *_, sigma), colour in colours([(*r[:6], r[6:]) for r in evenly(after, 4)]):
            sigma = [v for v in sigma if v > 1e-12 * sigma[0]]
            left.semilogy(range(1, len(sigma) + 1), sigma, ".-", ms=3, color=colour, label=block)
        finish(left, "index, largest first", f"singular value of T, {when}")
        by_layer(right, [row[0] for row in after], "|cos∠(top right singular vector, t̄)|",
                 (columns_of(before, 2)[0], ".", f"averaged T, {before[0][1]}"),
                 (cosine, "o", f"averaged T, {when}"), (sharp, "_", "at least (sharper bound)"),
                 (single, "x", f"single images and heads, {when}"))
    columns = ["block", "when", "cosine", "bound", "sharp_bound", "single_cosine"]
    columns += [f"sigma_{i + 1}" for i in range(len(rows[0]) - len(columns))]
    publish(args, setup, when, """Singular values of the attention matrix T, averaged over images
        and heads, and how near its top right singular vector is to mean attention t̄.""",
            columns, rows, [], (10, 4.5), draw)
    print_table(columns[:8], [row[:8] for row in after])


def convergence(args):
    """The convergence factor of GD, FOOF, K-FAC, NysAct and MAC along one run of training.

    MAC, figure 4, where the definition is not given; ours: u are the logits of the true labels of
    the first --samples images, J their Jacobian by the weights of all Linear and Conv2d layers, B
    a method's multiplier at its published damping. Steps along −B Jᵀ(u − y) change u by J B Jᵀ, so
    the slowest component shrinks by 1 − c per step of size 1/λ_max, with the factor
    c = λ_min(J B Jᵀ)/λ_max(J B Jᵀ). J B Jᵀ is a sum over layers. An attention block's qkv counts as
    one Linear for all methods, MAC too, which would take the value projection by attended tokens.
    """
    rows, setup = [], set_up(args)
    (x, y), = sample(setup.data, argparse.Namespace(images=args.samples, batch_size=args.samples))
    names = list(layers_of(setup.net))
    for step, _ in training(setup, args.steps):
        if step % max(1, args.steps // 8):
            continue
        moments, grams = second_moments(setup.net, sample(setup.data, args), names), {}
        for name, J in output_gradients(setup.net, x, y, names).items():
            for method, gram in preconditioned_grams(J, moments[name], name == names[0]).items():
                grams[method] = grams.get(method, 0) + gram
        rows += [(method, step, *contraction(gram)) for method, gram in grams.items()]

    def draw(picture):
        axis = picture.subplots()
        for method in grams:
            steps, factor, *_ = columns_of([row for row in rows if row[0] == method], 1)
            axis.semilogy(steps, [c or math.nan for c in factor], "o-", ms=4, label=method)
        finish(axis, "steps of training", "convergence factor λ_min/λ_max")
    publish(args, setup, f"{len(y)} images", """Convergence factor of each method along one run: of
        the slowest component of a least-squares problem on the linearised network, a step leaves
        1 minus this; larger is faster, and all methods are compared at the same weights.""",
            ("method", "step", "factor", "lambda_min", "lambda_max"), rows,
            rows[:len(grams)] + rows[-len(grams):], (7, 5), draw)


def curves(args):
    """Training loss and test accuracy of runs of train_cifar.py, against epochs and seconds.

    MAC, figure 5. RUN is a folder with a log.csv, or one that holds such folders. Seconds are those
    of the training passes, as logged.
    """
    runs = read_curves(args.runs)
    rows = [(label, *row) for label, points in runs.items() for row in points]

    def draw(picture):
        axes = picture.subplots(2, 2, sharey="row", sharex="col")
        for label, points in runs.items():
            epoch, seconds, *values = columns_of(points, 0)
            for line, y in zip(axes, values):
                for axis, x in zip(line, (epoch, seconds)):
                    axis.plot(x, y, ".-", label=label if axis is axes[1, 1] else None)
        losses = [row[3] for row in rows]
        axes[0, 0].set_yscale("log" if max(losses) > 10 * min(losses) else "linear")
        axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
        for line, ylabel in zip(axes, ("training loss", "test accuracy, %")):
            for axis, xlabel in zip(line, ("epoch", "seconds of training")):
                finish(axis, xlabel, ylabel)
    publish(args, None, "", """Training loss and test accuracy after each epoch, against epochs and
        against the seconds of the training passes so far, as logged.""",
            ("run", "epoch", "seconds", "train_loss", "test_accuracy_percent"), rows,
            [(label, *points[-1]) for label, points in runs.items()], (9, 7), draw)


def factors(args):
    """(setup, when, layer to draw, {(layer, "H" or "S"): K-FAC's A or P}) at the end of a run."""
    (when, setup), = stages(args)
    layer, = choose(setup.net, args.layer, (0.5,))
    found = second_moments(setup.net, sample(setup.data, args), list(layers_of(setup.net)))
    matrices = {(name, factor): M for name, m in found.items()
                for factor, M in (("H", m.A), ("S", m.P))}
    for (name, factor), M in matrices.items():
        if not M.any():
            raise UsageError(f"{factor} of {name} is 0, the network is dead: try a smaller --lr")
    return setup, when, layer, matrices


def of_factor(rows, factor, column, scale=1):
    """A column of the rows of H or of S, multiplied by scale."""
    return [scale * row[column] for row in rows if row[1] == factor]


def gershgorin(args):
    """Gershgorin discs of the Kronecker factors, and the share of rows that dominate diagonally.

    AdaFisher, section 3.1. Row i of H (K-FAC's A) or S (its P) gives a disc of centre M_ii and
    radius Σ_{j≠i} |M_ij|; all eigenvalues lie in the union. If radius < centre in all rows, M is
    diagonally dominant. The matrices are taken as they are: bringing their entries to [0, 1] first,
    as in the published picture, would change every eigenvalue. Rows of zeros are left out.
    """
    setup, when, layer, matrices = factors(args)
    rows = []
    for key, M in matrices.items():
        centres, radii = gershgorin_discs(M)
        used = centres > 0
        rows.append((*key, len(M), (radii < centres)[used].double().mean().item(),
                     (radii / centres)[used].median().item(),
                     (radii.sum() / M.abs().sum()).item()))

    def draw(picture):
        from matplotlib.collections import EllipseCollection
        *axes, shares = picture.subplots(1, 3)
        for axis, factor in zip(axes, "HS"):
            M = matrices[layer, factor]
            centres, radii = (x.numpy() for x in gershgorin_discs(M))
            zeros = 0 * centres
            axis.add_collection(EllipseCollection(
                2 * radii, 2 * radii, zeros, units="xy", array=radii, facecolor="none", lw=0.6,
                offsets=list(zip(centres, zeros)), offset_transform=axis.transData))
            axis.plot(torch.linalg.eigvalsh(M), zeros, "k|", ms=9, label="eigenvalues")
            axis.plot(centres, zeros, "r.", ms=3, label="centres M_ii")
            axis.axvline(0, color="k", ls=":", lw=1)
            axis.set_xlim(1.05 * (centres - radii).min(), 1.05 * (centres + radii).max())
            axis.set_ylim(-1.05 * radii.max(), 1.05 * radii.max())
            finish(axis, "real part", "imaginary part", f"{factor} of {layer}: discs")
        by_layer(shares, [row[0] for row in rows if row[1] == "H"], "diagonally dominant rows, %",
                 *((of_factor(rows, factor, 3, 100), mark, factor) for factor, mark in
                   (("H", "o"), ("S", "x"))))
        shares.set_ylim(-5, 105)
    publish(args, setup, when, f"""Gershgorin discs of the Kronecker factors H and S of {layer} (a
        disc that reaches 0 leaves the sign of an eigenvalue open), and the share of diagonally
        dominant rows in all layers.""",
            ("layer", "factor", "rows", "dominant_share", "median_radius_over_centre",
             "off_diagonal_share"), rows, rows, (13, 4.8), draw)


def perturb(args):
    """Eigenvalues of the factors with noise off the diagonal, and how many Kaiser's rule keeps.

    AdaFisher, section 3.1. Kaiser's rule keeps eigenvalues above 1, the mean eigenvalue of a
    correlation matrix, so H and S are brought to unit diagonal first. The noise is symmetric,
    normal, of deviation --noise off the diagonal; Weyl: no eigenvalue moves by more than ‖E‖₂. With
    the diagonal alone, all eigenvalues would be 1: what lies above and below is what a diagonal
    approximation drops.
    """
    setup, when, layer, matrices = factors(args)
    rows, pairs = [], {}
    for key, M in matrices.items():
        R = correlation(M)
        E = symmetric_noise(R, args.noise)
        values, noisy = pairs[key] = [torch.linalg.eigvalsh(X).flip(0) for X in (R, R + E)]
        rows.append((*key, len(R), *kaiser(values), *kaiser(noisy), int((noisy < 0).sum()),
                     (values - noisy).abs().max().item(), torch.linalg.matrix_norm(E, 2).item()))

    def draw(picture):
        *axes, kept = picture.subplots(1, 3)
        for axis, factor in zip(axes, "HS"):
            for values, mark, label in zip(pairs[layer, factor], "ox", ("as it is", "with noise")):
                axis.loglog(range(1, len(values) + 1), values.clamp(min=1e-5), mark, ms=4,
                            mfc="none", label=label)
            axis.axhline(1, color="k", ls=":", label="the diagonal alone; Kaiser's rule")
            finish(axis, "index, largest first", "eigenvalue (below 1e-5 drawn there)",
                   f"{factor} of {layer} at unit diagonal")
        by_layer(kept, [row[0] for row in rows if row[1] == "H"], "share, %", *(
            series for factor, marks in (("H", "os"), ("S", "x+")) for series in (
                ([100 * row[3] / row[2] for row in rows if row[1] == factor], marks[0],
                 f"{factor}: eigenvalues above 1"),
                (of_factor(rows, factor, 4, 100), marks[1], f"{factor}: share of the trace"))))
        kept.set_ylim(-5, 105)
    publish(args, setup, when, f"""Eigenvalues of the factors H and S of {layer} at unit diagonal,
        with and without symmetric noise of deviation {args.noise:g} off the diagonal, and what
        Kaiser's rule keeps in all layers.""",
            ("layer", "factor", "rows", "kept", "kept_share", "noisy_kept", "noisy_kept_share",
             "noisy_negative", "largest_change", "noise_norm"), rows, rows, (13, 4.8), draw)


def fourier(args):
    """What frequencies the Kronecker factors hold, and the ratio of diagonal to off-diagonal in dB.

    AdaFisher, section 3.1: |fft2| of H and S in dB (20 log₁₀), with and without symmetric noise of
    deviation --noise times the mean diagonal entry, and of the diagonal alone, whose transform
    depends on the sum of both frequencies only: ridges. The ratio is
    10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²), M̂ with the noise.
    """
    setup, when, layer, matrices = factors(args)
    noisy = {key: M + symmetric_noise(M, args.noise) for key, M in matrices.items()}
    rows = [(*key, len(M), signal_to_noise(M, M), signal_to_noise(M, noisy[key]))
            for key, M in matrices.items()]

    def draw(picture):
        for line, factor in zip(picture.subplots(2, 4), "HS"):
            M = matrices[layer, factor]
            shown = line[0].imshow(M / M.abs().max(), cmap="gray", interpolation="nearest")
            line[0].set_title(f"{factor} of {layer} / its largest entry", fontsize=9)
            line[0].set(xlabel="column", ylabel="row")
            picture.colorbar(shown, ax=line[0], shrink=0.8)
            for axis, X, title in zip(line[1:], (M, noisy[layer, factor], M.diagonal().diag()),
                                      ("as it is", "with noise", "the diagonal alone")):
                shown = axis.imshow(spectrum(X), vmin=-80, interpolation="nearest",
                                    extent=(-math.pi, math.pi, math.pi, -math.pi))
                axis.set_title(f"spectrum of {factor}, {title}", fontsize=9)
                axis.set(xlabel="frequency, rad", ylabel="frequency, rad")
            picture.colorbar(shown, ax=line[1:], shrink=0.8, label="dB below the largest")
    publish(args, setup, when, f"""The factors H and S of {layer} and their two-dimensional spectra;
        a diagonal matrix would show the ridges of the last column (noise: symmetric, off the
        diagonal, deviation {args.noise:g} of the mean diagonal entry).""",
            ("layer", "factor", "rows", "diagonal_to_upper_dB", "diagonal_to_noisy_upper_dB"), rows,
            rows, (14, 6.5), draw)


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
    paths, setup = run_ends(args) if args.runs else trained_paths(args)
    points = torch.stack([point for path in paths.values() for _, point in path])
    centre, directions, coordinates, shares = principal_plane(points)
    batches, net = sample(setup.data, args), copy.deepcopy(setup.net).train()
    steps = [(label, when) for label, path in paths.items() for when, _ in path]
    rows = [(*step, *at.tolist(), loss_at(net, point, batches),
             loss_at(net, centre + at @ directions, batches))
            for step, at, point in zip(steps, coordinates, points)]
    xs, ys, losses = surface(net, centre, directions, coordinates, batches, args.grid)

    def draw(picture):
        axis = picture.subplots()
        ceiling = 2 * max(row[5] for row in rows)
        filled = axis.contourf(xs, ys, losses.clamp(max=ceiling).log10(), 30, cmap="Greys")
        picture.colorbar(filled, label="log₁₀ of the loss in the plane", shrink=0.8)
        for label in paths:
            line = [row for row in rows if row[0] == label]
            drawn, = axis.plot(*columns_of(line, 2)[:2], "o--" if args.runs else ".-", ms=4,
                               label=f"{label}: {line[-1][4]:.2f}")
            axis.plot(*line[-1][2:4], "*", ms=13, color=drawn.get_color(), mec="k")
        axis.plot([], [], "k*", label="star: the end, and its loss", ms=9)
        axis.set_aspect("equal")
        finish(axis, *(f"principal direction {i + 1} ({100 * share:.1f} % of the iterates' variance"
                       "),\nlength in weights" for i, share in enumerate(shares.tolist())))
    path, caption = publish(args, setup, f"{len(points)} iterates", f"""Paths of
        {', '.join(paths)} {'(straight from start to end)' if args.runs else 'from one start'},
        projected to the plane of the iterates' two leading principal directions (not normalised by
        filter), on the loss in that plane over {sum(len(y) for _, y in batches)} training images,
        which off the plane, at the iterates themselves, is another.""",
        ("path", "when", "direction_1", "direction_2", "loss", "loss_in_plane"), rows,
        [row for row, after in zip(rows, [*rows[1:], ("",)]) if row[0] != after[0]], (8, 6.5), draw)
    write_csv(path.with_name(f"{path.name}-surface.csv"), caption, args,
              ("direction_1", "direction_2", "loss"),
              [(x, y, loss) for y, line in zip(ys.tolist(), losses.tolist())
               for x, loss in zip(xs.tolist(), line)])


def trained_paths(args):
    """{optimizer: [(step, parameters)]} from one seed, and a Setup for the surface."""
    paths = {}
    for optim in args.optim:
        setup = set_up(args, optim)
        paths[optim] = [(step, flat(setup.net)) for step, _ in training(setup, args.steps, optim)
                        if step % max(1, args.steps // 30) == 0 or step == args.steps]
    return paths, setup._replace(config=setup.config | dict(optim="+".join(paths)))


def run_ends(args):
    """{run: [(0, its start), (epoch, its end)]}, and a Setup for the surface."""
    paths, seeds, common = [], [], None
    for folder in args.runs:
        config, saved = read_run(folder)
        what = config["model"], config["dataset"]
        if common is None:
            common, data = what, datasets.load(config["dataset"], args.data_dir)
        if what != common:
            raise UsageError(f"{folder} is {' on '.join(what)}, but {args.runs[0]} is "
                             f"{' on '.join(common)}: one surface takes one network and data set")
        net, optimizer = build(config, data)
        start = flat(net)
        put_weights(net, saved, config)
        paths.append([(0, start), (saved["epoch"], flat(net))])
        seeds += [config["run"]] * (config["run"] not in seeds)
    setup = Setup(data, config | dict(optim="runs", run=seeds), net, optimizer)
    return dict(zip(labels(args.runs), paths)), setup


def nystrom(args):
    """What NysAct's sketch holds of each layer, after training with its published settings.

    λ₁ is the largest eigenvalue of the covariance A that was averaged until the sketch Â in use
    after --steps was renewed, as every --tinv steps; λ̂₁ that of Â; the smallest eigenvalue of the
    preconditioner ρ(Â + ρI)⁻¹ stands beside the true ρ/(ρ + λ₁), where 1 would be plain SGD; and
    the condition number of (Â + ρI)⁻¹(A + ρI), 1 if Â were A, beside that of A + ρI in brackets.
    """
    setup = set_up(args)
    ρ, rank, sketch, tinv = (setup.config[name] for name in ("damping", "rank", "sketch", "tinv"))
    when = f"{args.steps} steps"
    if args.steps % tinv:
        when += f", sketches of step {args.steps // tinv * tinv}"
    # one step more than asked for: what is applied is renewed at the beginning of a step
    averages, loss = train_and_watch(setup, args.steps + 1)
    rows = [sketch_row(layer, averages[layer.weight], setup.optimizer.state[layer.weight], ρ)
            for layer in setup.optimizer.layers.values()]
    print(f"{setup.config['model']} on {args.dataset} after {when}, rank {rank} "
          f"{sketch}, ρ = {ρ:g}, loss {loss:.3f}, torch {torch.__version__}\n"
          "layer                  d      λ₁       λ̂₁   smallest eigenvalue     true   "
          "condition number")
    for name, d, top, seen, smallest, wanted, condition, plain in rows:
        print(f"{name:<18}{d:>6}{top:>8.2f}{seen:>9.2f}{smallest:>22.5f}{wanted:>9.5f}"
              f"{condition:>11.2f} ({plain:.1f})")
    identities = sum(row[4] > 0.999 and row[5] < 0.99 for row in rows)
    print(f"layers whose preconditioner is the identity: {identities} of {len(rows)}")
    names, _, top, seen, _, _, condition, plain = columns_of(rows, 0)

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for axis in (left, right):
            axis.set_yscale("log")
        by_layer(left, names, "largest eigenvalue", (top, "o", "λ₁ of A"),
                 (seen, "x", "λ̂₁ of the sketch"))
        by_layer(right, names, "condition number", (plain, "o", "A + ρI"),
                 (condition, "x", "(Â + ρI)⁻¹(A + ρI)"))
    publish(args, setup, when, f"""What a rank-{rank} {sketch} sketch Â holds of
        each layer's input covariance A, and what its inverse leaves to do.""",
            ("layer", "d", "lambda_1", "sketch_lambda_1", "smallest_eigenvalue", "true_smallest",
             "condition", "condition_plain"), rows, [], (10, 4.5), draw)


def sketch_row(layer, A, state, ρ):
    """Name, d, λ₁, λ̂₁, smallest eigenvalue, the true one, condition number with and without."""
    true, identity = torch.linalg.eigvalsh(A), torch.eye(len(A), dtype=A.dtype)
    if "eigenvalues" in state:
        U, eigenvalues = state["U"].double(), state["eigenvalues"].double()
        seen = eigenvalues.max()
        R = torch.linalg.cholesky(A + ρ * identity)             # similar to (Â + ρI)⁻¹(A + ρI)
        values = torch.linalg.eigvalsh(
            nysact.precondition(R.mT[None], U, eigenvalues, ρ)[0] @ R)
    else:                                                       # d ≤ r: exact
        seen, values = true[-1], torch.ones(2)
    return layer.name, len(A), *map(float, (
        true[-1], seen, ρ / (ρ + seen), ρ / (ρ + true[-1]), values[-1] / values[0],
        (true[-1] + ρ) / (true[0] + ρ)))


def train_and_watch(setup, steps):
    """Train; returns {weight: the average of A that the sketch in use was taken of}, last loss."""
    optimizer, averages = setup.optimizer, {}
    group = optimizer.param_groups[0]

    def watch(module, args, output):
        if optimizer.steps % group["tcov"] == 0:
            use = use_of(module, args[0].detach(), output)
            A = symmetric(input_covariance(use, module.bias is not None)).double() / use.rows
            old, k = averages.get(module.weight, (A, 0))
            old, = running_mean([old], [A], k + 1, group["stat_decay"])
            averages[module.weight] = old, k + 1
    for module in layers_of(setup.net).values():
        module.register_forward_hook(watch)
    for step, loss in training(setup, steps):
        if (step - 1) % group["tinv"] == 0:              # this step renewed the sketches
            sketched = {weight: A.clone() for weight, (A, _) in averages.items()}
    return sketched, loss


# ---------------------------------------------------------------------------------------------
# 5. The command line
# ---------------------------------------------------------------------------------------------

# figure: (function, defaults of its flags); those that are not named are not its flags. lr is that
# of SGD where it trains only to be looked at, the rate of the MAC authors' analysis.
TRAINED = dict(model="resnet20", optim="sgd", steps=60, batch_size=64)
PROBED = TRAINED | dict(lr=0.01, images=256, from_run=None)
FIGURES = {
    "effect": (effect, TRAINED | dict(optim="mac", steps=100)),
    "spectra": (spectra, PROBED | dict(layer=None, layers="+")),
    "mean": (mean, PROBED),
    "attention": (attention, PROBED | dict(model="deit_tiny_cifar", optim="adamw", steps=40,
                                           batch_size=32, images=128)),
    "convergence": (convergence, TRAINED | dict(model="lenet5", lr=0.01, steps=240, images=256,
                                                samples=64)),
    "gershgorin": (gershgorin, PROBED | dict(layer=None)),
    "perturb": (perturb, PROBED | dict(layer=None, noise=1e-3)),
    "fourier": (fourier, PROBED | dict(layer=None, noise=1e-3)),
    "curves": (curves, dict(runs="+")),
    "landscape": (landscape, TRAINED | dict(
        model="lenet5", optim=["sgd", "mac", "kfac"], steps=240, images=256, grid=25, runs="*")),
    "nystrom": (nystrom, dict(model="resnet20", steps=100, batch_size=128)),
}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python analyze.py FIGURE [flags]", allow_abbrev=False)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, (make, defaults) in FIGURES.items():
        lines = inspect.getdoc(make)
        figure = figures.add_parser(name, help=lines.split("\n")[0], description=lines,
                                    formatter_class=argparse.RawDescriptionHelpFormatter,
                                    allow_abbrev=False)
        figure.set_defaults(make=make)
        add_flags(figure, defaults)
    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
    args = parser.parse_args(argv, argparse.Namespace(argv=argv, optim="nysact"))   # of nystrom
    check_runs(args)
    if args.optim == "sgd" and args.lr is None:
        args.lr = FIGURES[args.figure][1].get("lr")
    several = args.optim if isinstance(args.optim, list) else [args.optim]
    for name in sorted({name for recipe in RECIPES.values() for name in recipe}):
        if getattr(args, name, None) is not None and \
                not any(name in RECIPES[optim] for optim in several):
            raise UsageError(f"--{name} has no use in {', '.join(several)}")
    return args


def check_runs(args):
    """Refuse flags of the training where finished runs are looked at, whose own hold."""
    if getattr(args, "from_run", None) is None and not getattr(args, "runs", None):
        return
    given = {word.partition("=")[0] for word in args.argv}
    settled = ["dataset", "run", "model", "optim", "steps", *itertools.chain(*RECIPES.values())]
    for name in settled:
        if f"--{name}" in given:
            raise UsageError(f"--{name} has no use here, where nothing is trained: leave it out, "
                             "and the run's own value holds")


def add_flags(figure, defaults):
    """The flags that the defaults name; with a model, also where data lies and the optimizers'."""
    def flag(name, help, **kwargs):
        if name in defaults:
            shown = defaults[name]
            if isinstance(shown, list):
                shown, kwargs["nargs"] = " ".join(shown), "+"
            figure.add_argument(f"--{name}", default=defaults[name], help=help if shown is None
                                else f"{help} (default {shown})", **kwargs)
    if "runs" in defaults:
        figure.add_argument("runs", type=user_path, nargs=defaults["runs"], metavar="RUN",
                            help="folder that train_cifar.py wrote")
    figure.add_argument("--output_dir", type=user_path, default="figures", metavar="DIR",
                        help="folder of the csv and the PNG, which replace older ones of the same "
                        "name (default %(default)s)")
    figure.add_argument("--note", default="", metavar="TEXT",
                        help="added to the caption, on the data say")
    if "model" not in defaults:
        return
    figure.add_argument("--dataset", default="shapes", choices=list(datasets.STATISTICS),
                        help="default %(default)s, generated")
    figure.add_argument("--data_dir", type=user_path, default="data", metavar="DIR",
                        help="default %(default)s")
    figure.add_argument("--run", type=SEED, default=0, metavar="SEED",
                        help="seed of everything random (default %(default)s)")
    flag("model", "%(choices)s", choices=list(CIFAR_MODELS), metavar="NAME")
    flag("optim", "what trains; of %(choices)s", choices=list(RECIPES), metavar="NAME")
    flag("steps", "steps of training", type=COUNT, metavar="N")
    flag("batch_size", "images per step", type=COUNT, metavar="N")
    flag("images", "images that statistics and losses are taken over", type=COUNT, metavar="N")
    flag("samples", "images of the Jacobian", type=COUNT, metavar="N")
    flag("layer", "layer by its name in the network; an unknown name lists all",
         nargs=defaults.get("layers", 1), metavar="NAME")
    flag("from_run", "take start and end of this run of train_cifar.py, and train nothing",
         type=user_path, metavar="DIR")
    flag("noise", "deviation of the noise off the diagonal, by the mean of the diagonal",
         type=POSITIVE, metavar="X")
    flag("grid", "points of the surface along each axis", metavar="N",
         type=number(int, lambda v: v >= 2, "a whole number of at least 2"))

    group = figure.add_argument_group("optimizer (what is not given is as published)")
    for name, settings in OPTIMIZER_FLAGS.items():
        if name != "calibrate":                      # a pass over all data, in MAC's first layer
            help = settings["help"]
            if name in defaults:
                help = f"{help} (default for sgd {defaults[name]})"
            group.add_argument(f"--{name}", **{**settings, "help": help})


def main(argv):
    """Run the command; its exit status."""
    print_anything()
    try:
        args = parse(argv)
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}")
        args.make(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, Diverged, datasets.DataError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except torch.linalg.LinAlgError:
        print("analyze.py: a matrix of the network has no eigenvalues to working precision, which "
              "means that training diverged: try a smaller --lr", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
