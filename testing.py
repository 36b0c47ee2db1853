"""What the tests share: comparison, a small network of every kind of layer, the six optimizers."""
import copy
import datetime
import inspect
import io
import os
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.utils.checkpoint import checkpoint

import models
from adafisher import AdaFisher, AdaFisherW
from foof import FOOF
from kfac import KFAC
from mac import MAC
from nysact import NysAct


# ---- comparison ----

def close(got, want, tol):
    """|got − want| ≤ tol·max|want|, for tensors, numbers, or each item of dicts of them.

    On a GPU, where sums take another order, tol is ten times as large, and 1e-12 at least.
    """
    if not isinstance(want, dict):
        got, want = {"": got}, {"": want}
    assert got.keys() == want.keys(), f"in one only: {sorted(map(str, got.keys() ^ want.keys()))}"
    errors = {}
    for key in want:
        a, b = (torch.as_tensor(x[key], dtype=torch.float64).detach().cpu() for x in (got, want))
        assert a.shape == b.shape, f"{key}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        error = ((a - b).abs().max() / (b.abs().max() if b.any() else 1.0)).item() \
            if b.numel() else 0.0
        if not error <= (tol if device_type() == "cpu" else max(10 * tol, 1e-12)):
            errors[key] = error
    assert not errors, f"relative errors above {tol:g}: {errors}"


def at_most(values, bounds, tol=1e-12):
    """values ≤ bounds, up to tol times the largest bound."""
    values, bounds = torch.as_tensor(values), torch.as_tensor(bounds)
    assert ((values - bounds) / bounds.abs().max()).max() <= tol, (values, bounds)


def raises(kind, words, call):
    """call() raises this exception, and its text contains each of the words."""
    with pytest.raises(kind) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def device_type():
    """"cpu" or "cuda": where the tests run."""
    return torch.get_default_device().type


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def snapshot(model, optimizer):
    """Every parameter, and every tensor and number of the optimizer's state, by name; whole."""
    values = dict(model.named_parameters())
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            values[f"{name}: {key}"] = value
    values = {key: value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
              for key, value in values.items()}
    return {key: value.detach().double().clone() for key, value in values.items()}


def modules_with(name):
    """The project's loaded modules that have this constant or function."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return [module for module in sys.modules.values() if name in vars(module)
            and os.path.dirname(getattr(module, "__file__", None) or "") == folder]


def set_everywhere(monkeypatch, name, value):
    for module in modules_with(name):
        monkeypatch.setattr(module, name, value)


# ---- a network, its data, its training ----

def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Net(nn.Module):
    """A layer of every kind: convolution, also grouped, fused qkv, nn.MultiheadAttention, linear.

    `checkpointing`: the use_reentrant of activation checkpointing, None without. `repeats`: how
    often the block runs. The layer `extra` sees the first n_extra samples only; it is unused if 0.
    """

    def __init__(self, checkpointing=None, repeats=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 2, stride=2, groups=2, bias=False)
        self.block = models.Block(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.extra = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.checkpointing, self.repeats = checkpointing, repeats

    def forward(self, x, n_extra=0):
        x = F.relu(self.conv1(x))                               # (B, 4, 6, 6)
        x = F.relu(self.conv2(x)).flatten(2).mT                 # (B, 9, 8), nine tokens
        for module in [self.block] * self.repeats + [self.encoder]:
            x = module(x) if self.checkpointing is None else \
                checkpoint(module, x, use_reentrant=self.checkpointing)
        x = x.mean(1)
        if n_extra:
            x = torch.cat([self.extra(x[:n_extra]), x[n_extra:]])
        return self.head(x)


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight (d, out)."""

    def __init__(self, d, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Uses(nn.Module):
    """`layer`, and a function of self and x that uses its weight; `beside`, an ordinary layer."""

    def __init__(self, layer, use, beside=None):
        super().__init__()
        self.layer, self.use, self.beside = layer, use, beside

    def forward(self, x):
        ys = self.use(self, x)
        if self.beside is None:
            return ys
        return [*([ys] if torch.is_tensor(ys) else ys), self.beside(randn(4, 3))]


def make_net(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return Net(**options).to(dtype)


def make_data(steps, batch=6, dtype=torch.float64):
    """Batches of images that are far from zero mean, with their labels; the same on any device."""
    random = dict(generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    data = [(torch.randn(batch, 3, 6, 6, dtype=torch.float64, **random).to(dtype) + 0.5,
             torch.randint(5, (batch,), **random)) for _ in range(steps)]
    return [(x.to(device_type()), y.to(device_type())) for x, y in data]


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def take_step(model, optimizer, loss):
    """One step on this loss; by how much each parameter has moved."""
    optimizer.zero_grad()
    before = parameters(model)
    loss.backward()
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def loop_of(work):
    """The loop that does this with each batch between zero_grad() and step()."""
    def loop(model, optimizer, data):
        for x, y in data:
            optimizer.zero_grad()
            work(model, x, y)
            optimizer.step()
    return loop


usual = loop_of(lambda model, x, y: loss_of(model, x, y).backward())


def trained(make, loop=usual, data=None, net=None, **options):
    """The snapshot after loop(model, optimizer, data)."""
    net = make_net() if net is None else net
    optimizer = make(net, **options)
    loop(net, optimizer, make_data(8) if data is None else data)
    return snapshot(net, optimizer)


def copy_of_run(net, optimizer, fresh, resumed, flat=None):
    """Give another model and its optimizer the state of the first ones: by a checkpoint file, or
    as torch.distributed.checkpoint does, flat or not."""
    if flat is None:
        file = io.BytesIO()
        torch.save([net.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        of_model, of_optimizer = torch.load(file)
        fresh.load_state_dict(of_model)
        resumed.load_state_dict(of_optimizer)
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        set_state_dict(fresh, resumed, model_state_dict=saved[0], optim_state_dict=saved[1],
                       options=options)


# ---- the optimizers ----

def known(Optimizer, options):
    """Those of the options that this class has."""
    names = inspect.signature(Optimizer).parameters
    return {name: value for name, value in options.items() if name in names}


def factory(Optimizer, **settings):
    """Optimizer(model, ...) with these settings; options that it does not have are left out."""
    def make(model, **options):
        return Optimizer(model, **known(Optimizer, settings | options))
    make.Optimizer = Optimizer
    return make


COMMON = dict(lr=0.1, weight_decay=1e-2, tcov=2, tinv=3)
OPTIMIZERS = {       # what holds for all of them is tested with these settings
    "mac": factory(MAC, **COMMON),
    "foof": factory(FOOF, **COMMON),
    "nysact": factory(NysAct, rank=5, **COMMON),
    "kfac": factory(KFAC, **COMMON),
    "adafisher": factory(AdaFisher, averaging="printed", **COMMON | dict(lr=1e-3)),
    "adafisherw": factory(AdaFisherW, **COMMON | dict(lr=1e-3)),
}
SGD_FAMILY = ("mac", "foof", "nysact", "kfac")     # they precondition the gradient for momentum SGD


def only(*names):
    """A test of these optimizers, where the fixture `make` brings all."""
    return pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in names], ids=names)


only_cpu = pytest.mark.only_cpu        # compared with what runs on the CPU


# ---- several processes ----

def one_rank(rank, world, folder, work, arguments):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=120))       # a hang ends as an error
    torch.save(work(rank, world, *arguments), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def on_ranks(world, work, *arguments):
    """[work(rank, world, *arguments) in a process for each rank], joined by gloo.

    A fork server imports torch once for all of them; Windows lacks it.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload(["torch._dynamo", "testing"])
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(one_rank, (world, folder, work, arguments), world,
                                        start_method=method)
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(world)]
