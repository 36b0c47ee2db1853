"""What is measured of a network while it trains, or of a run of train_cifar.py that exists.

    training    set_up, training, stages: from flags or a run's folder to networks to look at
    moments     second_moments, attention_matrices, output_gradients
    updates     watch_updates, multiplier, Placebo: what an optimizer's steps are beside SGD's
    surfaces    flat, loss_at, surface
"""
import copy
import itertools
import math
import sys
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
from adafisher import AdaFisher
from covariance import input_covariance, mean_eigenvalue, unpack
from flags import RECIPES, make_optimizer
from logs import labels
from mac import MAC
from models import CIFAR_MODELS, Attention
from patches import Geometry
from pooling import running_mean
from ranks import Diverged, UsageError
from spectra import Moments, top_cosine
from uses import Use


class Setup(NamedTuple):
    data: datasets.Data
    config: dict               # what build takes
    net: nn.Module
    optimizer: torch.optim.Optimizer


def set_up(args, optim=None):
    """The data, the network and the optimizer (default: args.optim) of a figure that trains."""
    optim = optim or args.optim
    config = dict(dataset=args.dataset, model=args.model, optim=optim, seed=args.seed,
                  batch_size=args.batch_size)
    for name, published in RECIPES[optim].items():
        given = getattr(args, name, None)
        config[name] = published if given is None else given
    data = datasets.load(args.dataset, args.data_dir)
    return Setup(data, config, *build(config, data))


def build(config, data):
    """The network and the optimizer with which train_cifar.py begins such a run."""
    torch.manual_seed(config["seed"])
    net = CIFAR_MODELS[config["model"]](data.num_classes, *data.train_images.shape[1:3])
    try:
        return net, make_optimizer(net, net.parameters(), config, RECIPES[config["optim"]])
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def training(setup, steps, text="steps"):
    """Train; yields (0, nan) and after each step (steps taken, its loss). Raises Diverged."""
    data, config, net, optimizer = setup
    yield 0, math.nan
    stream = (batch for epoch in itertools.count() for batch in datasets.batches(
        data.train_images, data.train_labels, config["batch_size"], train=True, mean=data.mean,
        std=data.std, seed=config["seed"], epoch=epoch))
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
        config = dict(saved["config"])
        if config["model"] not in CIFAR_MODELS or config["dataset"] not in datasets.STATISTICS:
            raise KeyError(config["model"])
        for name in ("seed", *RECIPES[config["optim"]]):      # what build() and a caption need
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
    net.zero_grad()
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
    for name in sums:
        layers[name].register_forward_hook(partial(record, name))
    for x, y in tqdm(batches, "moments", disable=None, leave=False):
        F.cross_entropy(net(x), y, reduction="sum").backward()
    images, found = sum(len(y) for _, y in batches), {}
    for name, (A, P, rows) in sums.items():
        G = torch.cat([p.grad.flatten(1) if p.dim() > 1 else p.grad[:, None]
                       for p in layers[name].parameters()], 1).double() / images
        A, P, d = symmetric(A) / rows, symmetric(P) / rows, G.shape[1]
        # the last row of A is E[[a; 1]]
        found[name] = Moments(A[:d, :d], P, A[-1, :d], rows / images, G)
    return found


def project(net, x, name, directions):
    """(rows, k): the rows of this layer's input in training, [a; 1] with a bias, times directions
    (k, d)."""
    net, inputs = copy.deepcopy(net).train(), []
    layer = layers_of(net)[name]
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        net(x)
    directions = directions.to(layer.weight)
    d = layer.weight[0].numel()
    layer.weight = nn.Parameter(directions[:, :d].reshape(-1, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(directions[:, d])
    out = layer.forward(inputs[0]).detach()            # each direction is an output channel
    return (out.flatten(2).mT if out.dim() == 4 else out).flatten(0, -2)


def use_of(module, x, output):
    """The use that a Linear or Conv2d (groups = 1) made of its weight, from x to output."""
    if isinstance(module, nn.Linear):
        return Use("linear", x, None, output.shape, x.numel() // x.shape[-1], slice(None))
    rows = len(x) * output.shape[2] * output.shape[3]
    return Use("conv", x, None, output.shape, rows, slice(None), geometry=Geometry.of(
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
        seeds += [config["seed"]] * (config["seed"] not in seeds)
    setup = Setup(data, config | dict(optim="runs", seed=seeds), net, optimizer)
    return dict(zip(labels(args.runs), paths)), setup


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
