"""A sixth method on the shared modules: is the protocol of optimizer.py all that a method needs?

Eva (Zhang, Shi, Li, ICLR 2023) keeps the means of a layer's inputs and of its output gradients, so
both sides of K-FAC's A ⊗ P have rank 1, and the damped inverse is one Sherman-Morrison:

    G̃ = (ā āᵀ ⊗ ḡ ḡᵀ + ρI)⁻¹ G = (G − (ḡᵀ G ā) ḡ āᵀ / (ρ + ‖ā‖²‖ḡ‖²)) / ρ
"""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from foof import FOOF
from kfac import KFAC
from mac import MAC, input_sum
from nysact import NysAct
from optimizer import PreconditionedSGD


class Eva(PreconditionedSGD):
    kinds = dict(linear="mean input and output gradient", conv="mean input and output gradient")
    needs_gradients = True

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, damping=0.03, stat_decay=0.95,
                 tcov=5, tinv=50):
        super().__init__(locals())

    def set_up(self, layer):
        shapes = (layer.blocks, layer.d), (layer.blocks, layer.out // layer.blocks)
        layer.measured = dict(zip(("inputs", "gradients"), shapes))
        layer.prepared = dict(zip(("a", "g"), shapes))

    def measure(self, layer, use):
        return {"inputs": input_sum(use, layer.bias is not None)}, use.rows

    def measure_gradient(self, layer, use, grad):
        """Σ of the rows' gradients of a loss that is a mean over them: times R, their mean."""
        rows = grad.movedim(1, -1) if use.kind == "conv" else grad
        total = rows.reshape(-1, layer.out).sum(0)
        return {"gradients": use.rows * total.view(layer.blocks, -1)[use.blocks]}

    def prepare(self, damping, inputs, gradients):
        return {"a": inputs.clone(), "g": gradients.clone()}, None

    def apply(self, G, damping, a, g):
        a, g = a.unsqueeze(-1), g.unsqueeze(-1)           # (blocks, d, 1), (blocks, out/blocks, 1)
        norm = a.square().sum((1, 2)) * g.square().sum((1, 2))
        along = (g.mT @ G @ a).flatten() / (damping + norm)
        return (G - along[:, None, None] * g @ a.mT) / damping


class Rows(nn.Module):
    """A linear layer or convolution that keeps what it multiplied and what came of it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.x = F.unfold(x, self.layer.kernel_size, padding=self.layer.padding).mT \
            if isinstance(self.layer, nn.Conv2d) else x
        self.out = self.layer(x)
        self.out.retain_grad()
        return self.out

    def means(self):
        x = self.x.detach().reshape(-1, self.x.shape[-1])
        if self.layer.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        g = self.out.grad.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else self.out.grad
        return x.mean(0), g.reshape(-1, g.shape[-1]).sum(0)


@pytest.mark.parametrize("kind", ["linear", "conv", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_eva_against_a_dense_inverse(kind, bias):
    layer, x = {"linear": (nn.Linear(4, 3, bias), torch.randn(7, 4)),
                "tokens": (nn.Linear(4, 3, bias), torch.randn(2, 5, 4)),
                "conv": (nn.Conv2d(2, 3, 3, padding=1, bias=bias), torch.randn(4, 2, 5, 5))}[kind]
    net = Rows(layer).double()
    optimizer = Eva(net, lr=1e-2, momentum=0.0, damping=0.3, tcov=1, tinv=1, stat_decay=0.7)
    average = 0
    for k in range(1, 5):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in net.parameters()]
        net(x.double() + k).square().sum(1).mean().backward()
        optimizer.step()
        a, g = net.means()
        weight = 0.3 / (1 - 0.7 ** k)                              # bias-corrected average
        average = [old + weight * (new - old) for old, new in zip(average or (0, 0), (a, g))]
        a, g = average
        fisher = torch.kron(torch.outer(g, g), torch.outer(a, a))
        grads = [p.grad.flatten(1) if p.dim() > 1 else p.grad[:, None] for p in net.parameters()]
        G = torch.cat(grads, 1)
        want = torch.linalg.solve(fisher + 0.3 * torch.eye(len(fisher)).double(), G.flatten())
        steps = [(old - p.detach()) / 1e-2 for old, p in zip(before, net.parameters())]
        got = torch.cat([s.flatten(1) if s.dim() > 1 else s[:, None] for s in steps], 1)
        torch.testing.assert_close(got.flatten(), want, rtol=1e-9, atol=1e-11)


def test_eva_resumes():
    def run(steps, saved=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
        optimizer = Eva(net, tcov=2, tinv=4)
        for step in range(steps):
            if saved and step == 3:
                net.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            if saved is None or step >= 3:
                optimizer.zero_grad()
                x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(step))
                F.cross_entropy(net(x), torch.arange(8) % 3).backward()
                optimizer.step()
        return net.state_dict(), optimizer.state_dict()
    whole, resumed = run(7)[0], run(7, run(3))[0]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


# ---- what readers of the shared modules found ----

@pytest.mark.parametrize("Optimizer", (FOOF, KFAC, NysAct, MAC))
def test_zeros_of_a_trial_step_are_not_applied(Optimizer):
    """torch.distributed.checkpoint makes a state of zeros; a layer that first runs between two
    refreshes gets what its own statistics give."""
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, late):
            return self.b(self.a(x)) if late else self.a(x)
    ends = []
    for asked in (True, False):
        torch.manual_seed(0)
        net, x, y = Late(), torch.randn(6, 4), torch.arange(6) % 4
        optimizer = Optimizer(net, lr=0.1, tcov=1, tinv=50, **(
            dict(loss_terms=6) if Optimizer is KFAC else {}))
        if asked:
            get_optimizer_state_dict(net, optimizer)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x, step > 0), y).backward()
            optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_refused_checkpoint_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3))
    optimizer, source = FOOF(net), FOOF(other)
    F.cross_entropy(other(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    source.step()
    with pytest.raises(ValueError, match="layer 1 is"):
        optimizer.load_state_dict(source.state_dict())
    assert all(layer.bias is not None and not layer.found for layer in optimizer.layers.values())


def test_values_of_other_rows():
    """After one layer made v by other rows than before, all of its rows take the plain mean."""
    net = nn.Linear(8, 24)
    optimizer = MAC(net, input_covariance=False, tcov=1)
    layer = optimizer.layers[net.weight]
    layer.add("mean", torch.ones(1, 9), 10, slice(0, 1))
    assert optimizer.set_values(layer, np.arange(16, 24))
    assert optimizer.means_of(layer) == [0, 0, 1]
    assert not optimizer.set_values(layer, np.arange(8, 16))
    assert not optimizer.set_values(layer, np.arange(16, 24))
    assert optimizer.means_of(layer) == [0]
    assert layer.pending["mean"][1] == [10, 0]


def test_softmax_by_keyword():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            T = torch.softmax(input=self.q(x) @ x.mT, dim=-1)
            return T @ self.v(x)
    net = Attends()
    optimizer = MAC(net, input_covariance=False)
    net(torch.randn(2, 3, 4)).square().sum().backward()
    optimizer.step()
    assert "mean attended input" in str(optimizer)
