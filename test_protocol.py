"""A sixth method on the shared modules: is the protocol of optimizer.py all that a method needs?

Eva (Zhang, Shi, Li, ICLR 2023) keeps the means of a layer's inputs and of its output gradients, so
both sides of K-FAC's A ⊗ P have rank 1, and the damped inverse is one Sherman-Morrison:

    G̃ = (ā āᵀ ⊗ ḡ ḡᵀ + ρI)⁻¹ G = (G − (ḡᵀ G ā) ḡ āᵀ / (ρ + ‖ā‖²‖ḡ‖²)) / ρ
"""
import functools

import numpy as np
import pytest
import torch
import torch.nn as nn

from mac import MAC, input_sum
from optimizer import PreconditionedSGD
from test_math import inverse, watch, whole, with_ones
from testing import close, copy_of_run, make_data, make_net, randn, snapshot, usual


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("build, shape", [
    (functools.partial(nn.Linear, 4, 3), (7, 4)), (functools.partial(nn.Linear, 4, 3), (2, 5, 4)),
    (functools.partial(nn.Conv2d, 2, 3, 3, padding=1), (4, 2, 5, 5))],
    ids=["linear", "tokens", "conv"])
def test_eva_against_a_dense_inverse(build, shape, bias):
    layer, x = build(bias=bias).double(), randn(*shape)
    uses, _ = watch(layer)
    optimizer = Eva(layer, lr=1e-2, momentum=0.0, damping=0.3, tcov=1, tinv=1, stat_decay=0.7)
    average = [0, 0]
    for k in range(1, 5):
        uses.clear()
        optimizer.zero_grad()
        before = whole(layer.weight, layer.bias).detach().clone()
        layer(x + k).square().sum(1).mean().backward()
        optimizer.step()
        (a, g), = uses[layer.weight]
        new = with_ones(a, bias).flatten(0, 2).mean(0), g.flatten(0, 2).sum(0)
        weight = 0.3 / (1 - 0.7 ** k)                              # bias-corrected average
        average = [old + weight * (x - old) for old, x in zip(average, new)]
        a, g = average
        G = whole(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
        want = inverse(torch.kron(torch.outer(g, g), torch.outer(a, a)), 0.3) @ G.flatten()
        close((before - whole(layer.weight, layer.bias)) / 1e-2, want.view_as(G), 1e-9)


def test_eva_resumes():
    nets, data = [make_net() for _ in range(2)], make_data(7)
    optimizers = [Eva(net, tcov=2, tinv=4) for net in nets]
    usual(nets[0], optimizers[0], data[:3])
    copy_of_run(nets[0], optimizers[0], nets[1], optimizers[1])
    for net, optimizer in zip(nets, optimizers):
        usual(net, optimizer, data[3:])
    close(*map(snapshot, nets, optimizers), 0)


# ---- what readers of the shared modules found ----

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
