"""MAC: mean activation approximated curvature.

Seung, Lee, Ko. "MAC: An Efficient Gradient Preconditioning using Mean Activation Approximated
Curvature". arXiv 2506.08464, ICDM 2025.  (Numbers in parentheses are this file's own; the
paper's numbers of equations are not known.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  ā = E[a]                            mean of the layer's input over all rows
    (2)  F ≈ (ā āᵀ + ρI) ⊗ I                 K-FAC's block A ⊗ P with ā āᵀ for A, and P = I
    (3)  G̃ = ρ G (ā āᵀ + ρI)⁻¹ = G − (G ā) āᵀ / (ρ + ‖ā‖²)
    (4)  ā ← ā + w (ā_batch − ā),  w = (1 − β)/(1 − βᵏ)       bias-corrected average; A₁ likewise
    (5)  first layer: G̃ = ρ G (A₁ + ρI)⁻¹,  A₁ = E[a aᵀ]
    (6)  value projection of attention: ā = E[Xᵀ t̄] over batch and heads,  t̄ = Tᵀ1/N
    (7)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

    symbol   in code                  shape
    G        G                        (blocks, out/blocks, d); d = C/groups·kh·kw in convolutions,
                                      + 1 for bias
    ā        state "mean"             (groups, d) in a convolution; else (2, d), or (4, d) for q, k
                                      and v of nn.MultiheadAttention: the last is that of (6)
             state "applied"          the ā in use, renewed every tinv steps
             state "values"           which rows of W take the last: cut into n equal blocks, those
                                      of v are the blocks i with bit i in this number, above which
                                      bit n is set; −1: no attention was seen
    A₁       state "covariance"       (blocks, d(d+1)/2), its lower triangle by rows; its Cholesky
                                      factor: state "factor" (blocks, d, d); first layer only
             state "fixed"            True after calibrate: A₁ is averaged no more
    ρ, β     damping, stat_decay      numbers;  k: state "updates", this one included
    η, μ     lr, momentum             numbers
    X, T     attention.py             (N, d) tokens, (N, N) attention scores of a head after softmax
    R        rows                     B (linear), B·N (tokens, queries of (6)), B·oH·oW (patches)

WHY THE MEAN. Write the R input rows as ā plus deviations, and let Σ be the covariance of these.
The deviations sum to zero, so the cross terms vanish: A = E[a aᵀ] = ā āᵀ + Σ exactly (the setting
of the paper's Proposition 4.1). ‖Σ‖ is the spectral norm.
Weyl: ‖ā‖² ≤ λ₁(A) ≤ ‖ā‖² + ‖Σ‖, and λ₂(A) ≤ ‖Σ‖.
Projecting A v₁ = λ₁ v₁ off ā gives sin∠(v₁, ā) ≤ ‖Σ‖/‖ā‖².
So where ‖Σ‖ is small beside ‖ā‖², A has one outlier eigenvalue, and it lies along ā.
Keep that one direction of A, and P = I: no covariance is measured, and no inverse is needed.

WHERE IT HOLDS (results/mean-cifar10.txt; images as JPEG). ResNet-20, CIFAR-10, hidden convolutions:
at initialisation ‖Σ‖/‖ā‖² is 0.2 to 0.8, and |cos(v₁, ā)| 0.945 to 0.998. At the published rate it
does not stay so: after 30 steps of SGD with lr 0.1 the ratio is 1.2 to 4.4 and the cosine 0.80 to
0.92: `python analyze.py mean --lr 0.1 --dataset cifar10 --steps 30`.
Inputs out of a LayerNorm have small means: DeiT-Tiny's qkv and fc1 begin at ratios of 6.5 to 11.5,
cosines of 0.24 to 0.33 (`--model deit_tiny_cifar --steps 1`).
The bounds hold in every layer, but the one on the sine is empty where the ratio exceeds 1.
So ā is one large direction of A among several, and MAC damps that one.
P = I is a choice for cost: it does not follow from A's eigenvalues being the larger ones.

WHY (3). With vec stacking columns, (B ⊗ I) vec G = vec(G B) for a symmetric B, so F⁻¹ makes of G
G (ā āᵀ + ρI)⁻¹. Multiply out (ā āᵀ + ρI)(I − ā āᵀ/(ρ + ‖ā‖²)), using āᵀā = ‖ā‖²:
ā āᵀ + ρI − ā āᵀ (‖ā‖² + ρ)/(ρ + ‖ā‖²) = ρI. This is Sherman-Morrison.
So ρ(ā āᵀ + ρI)⁻¹ is that second factor: ρ/(ρ + ‖ā‖²) along ā, 1 in all other directions.
ρ → ∞ is SGD; ρ → 0 projects the mean input out of the gradient.
The factor ρ in front leaves the size of the step to lr ("decoupled damping" is probably this).
The plain inverse is this multiplier divided by ρ, and the same at ρ = 1.

WHY (5). Images normalised to zero mean have ā ≈ 0: their mean says nothing.
So the first layer keeps its small exact covariance (d = 27 for a 3×3 convolution on RGB).
That reason needs a layer which reads the model's input, and reads it alone.
So no layer has A₁ where an embedding, a recurrent layer or projections to q, k, v (known by their
names) come first in modules(). Elsewhere it is the first layer that is trained, as published
(frozen ones may stand before it). input_covariance names another layer, or is False: no layer.

WHY (6). One head: V = X W_Vᵀ, T = softmax(QKᵀ/√d_h), O = T V. So O = (T X) W_Vᵀ.
Then the gradient of W_V is (∂loss/∂O)ᵀ (T X): the rows that W_V multiplies are those of T X.
Their mean is (T X)ᵀ1/N = Xᵀ (Tᵀ1/N) = Xᵀ t̄, with t̄ the column means of T.
In this way the attention scores enter the curvature. q and k keep the mean token.
With a bias, V = X W_Vᵀ + 1bᵀ and T1 = 1, so O = (T X) W_Vᵀ + 1bᵀ: the coordinate 1 stays 1.

COST per layer: statistic O(numel of the input) every tcov steps (first layer 2·R·d² for A₁; of
scaled_dot_product_attention its scores once more, 2·B·N²·d; a softmax that the model forms itself
is only summed, as nn.MultiheadAttention's with need_weights=True), application
4·out·d per step (SGD touches the same out·d numbers; first layer 2·out·d²), state 2d numbers per
group of a convolution, else 4d (6), of nn.MultiheadAttention's q, k, v together 8d. No d×d matrix
but A₁.

THROWN AWAY: all of A but one direction (WHERE IT HOLDS: not a small part), and all of P. In (6)
each head's rows of W_V see their own T X; one ā for all heads pools them.

ERRATA, against the authors' released code, which
 - forms I − āāᵀ/(ρ + ‖ā‖²) as a d×d matrix per layer and multiplies with it; (3) needs no matrix;
 - scales the first layer by (A₁ + ρI)⁻¹ and the others by ρ(·)⁻¹; here ρ(·)⁻¹ everywhere;
 - averages X and T separately in (6), E[X]ᵀE[t̄]; here the mean of the products, at the same cost,
   with masks, and whatever the layout of q, k, v;
 - keeps each rank's statistics to itself, so replicas drift apart; here they are all-reduced;
 - counts steps in step() but averages in the hook, so micro-batches and skipped steps bias ā;
 - loses its state on resume, ignores dilation, and breaks on grouped convolutions.
A₁ is averaged online like ā; `calibrate` fixes it by one pass over the data first, as published.

USAGE
    optimizer = MAC(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention, value_blocks
from capture import Watcher
from covariance import damped_cholesky, input_covariance, solve_right, unpack
from layers import EMBEDDINGS, layers_of
from optimizer import PreconditionedSGD
from patches import image_sum, patch_sum
from precision import at_least_float32, full_precision

FIRST_ELSEWHERE = (*EMBEDDINGS, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
PROJECTION = re.compile(r"(to_?|c_)?(q|k|v|qkv|kv|wqkv|query|key|value|attn|in_proj)"
                        r"(_proj|_lin|_layer)?", re.IGNORECASE)


def plain(W, steps, lr=0.1, momentum=0.9, weight_decay=0.0, damping=1.0, stat_decay=0.95, tcov=5,
          tinv=50, first=False):
    """The method on one weight W (out, d), formula by formula; returns W after the steps.

    steps: for each step a function of W that returns X (R, d), the rows that met W (of an image its
    unfolded patches, of the values T X; a last column of ones for a bias), and G (out, d), the
    gradient by W. first: is it the first layer?
    """
    ρ, β, μ, η = damping, stat_decay, momentum, lr
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    m, k, M = 0, 0, 0
    for t, step in enumerate(steps):
        X, G = step(W)
        if t % tcov == 0:
            batch = X.T @ X / len(X) if first else X.mean(0)               # (1), (5), (6)
            m, k = β * m + (1 - β) * batch, k + 1
            average = m / (1 - β ** k)                                     # (4)
        if t % tinv == 0:
            A = average if first else torch.outer(average, average)        # (2)
            multiplier = ρ * torch.linalg.inv(A + ρ * eye)
        M = μ * M + G @ multiplier + weight_decay * W                      # (3), (7)
        W = W - η * M
    return W


def precondition(G, mean, damping):
    """(3)  G̃ = G − (G ā) āᵀ / (ρ + ‖ā‖²); G (blocks, out/blocks, d), mean ā (blocks, d)."""
    u = G @ mean.unsqueeze(2)                                              # (blocks, out/blocks, 1)
    u = u / (damping + mean.square().sum(1)[:, None, None])
    return torch.addcmul(G, u, mean.unsqueeze(1), value=-1)


def input_sum(use, bias):
    """(1)  Σ a over the rows of a use, or Σ [a; 1] with a bias: (blocks, d)."""
    if use.kind == "conv":
        total = patch_sum(image_sum(use.x), use.geometry)
    else:
        x = use.x.reshape(-1, use.x.shape[-1])
        total = x.sum(0, dtype=at_least_float32(x))[None]
    return F.pad(total, (0, 1), value=float(use.rows)) if bias else total


class MAC(PreconditionedSGD):
    __doc__ = PreconditionedSGD.__doc__ + """
    input_covariance: the first layer by (5); the name of another layer that shall have it; or
        False, all layers by (3). ValueError if there is no such layer, or its d is above 2¹⁴.
    attention: False gives v the mean input, as any other layer has it, in the place of (6).
    """

    first = None                   # the weight of the layer of (5)
    looked = False                 # has it been looked for?
    kinds = dict.fromkeys(("linear", "projection", "conv"), "mean input")
    row_by_row = True
    failure = ("the input covariance of layer {name} plus damping {damping} is not positive "
               "definite to rounding; raise damping")

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, input_covariance=True, attention=True, maximize=False,
                 foreach=None, fused=None):
        self.input_covariance, self.first = input_covariance, None
        super().__init__(locals())
        if attention:
            self.watcher.attention = Attention(self.watcher)

    def set_up(self, layer):
        d = layer.d
        if layer.weight is self.first:
            layer.measured = {"covariance": (layer.blocks, d * (d + 1) // 2)}
            layer.prepared = {"factor": (layer.blocks, d, d)}
        else:
            means = layer.blocks + (layer.kind != "conv")              # the last is of values
            layer.measured, layer.prepared = {"mean": (means, d)}, {"applied": (means, d)}

    def measure(self, layer, use):
        bias = layer.bias is not None
        if layer.weight is self.first:
            return {"covariance": input_covariance(use, bias)}, use.rows                   # (5)
        return {"mean": input_sum(use, bias)}, use.rows                                    # (1)

    def prepare(self, damping, mean=None, covariance=None):
        if covariance is None:
            return {"applied": mean.clone()}, None
        L, failed = damped_cholesky(unpack(covariance), damping)
        return {"factor": L}, failed

    def apply(self, G, damping, applied=None, factor=None):
        if factor is not None:
            return damping * solve_right(G, factor)                                        # (5)
        return precondition(G, applied, damping)                                           # (3)

    def how(self, layer):
        if layer.weight is self.first:
            return "input covariance"
        values = [mean == layer.blocks for mean in self.means_of(layer)]
        return "mean attended input" if all(values) else \
            "mean input, v: mean attended input" if any(values) else "mean input"

    # ---- the first layer ----

    def find_first(self, layers):
        """The weight of the layer of (5), among {weight: Layer} in modules() order, or None."""
        by_name = {layer.name: layer.weight for layer in layers.values()}
        if isinstance(self.input_covariance, str):
            if self.input_covariance not in by_name:
                raise ValueError(f"MAC: input_covariance={self.input_covariance!r} names no layer; "
                                 f"there are {', '.join(by_name)}")
            return by_name[self.input_covariance]
        for name, module in self.model.named_modules() if self.input_covariance else ():
            if isinstance(module, FIRST_ELSEWHERE):
                return None
            for layer in layers_of(name, module):
                if layer.weight in layers and layer.weight.requires_grad:
                    return None if PROJECTION.fullmatch(name.split(".")[-1]) else layer.weight
        return None

    def candidates(self):
        layers = super().candidates()
        if not self.looked:
            self.first, self.looked = self.find_first(layers), True
        first = layers.get(self.first)
        if first is not None and first.d > 2 ** 14:
            raise ValueError(f"MAC: the input covariance of the first layer, {first.name}, would "
                             f"be {first.d}×{first.d}: use input_covariance=False")
        return layers

    @torch.no_grad()
    def calibrate(self, batches):
        """Fix A₁ by one pass over the data, as published, instead of averaging it online.

        batches: input tensors, or tuples that begin with one; the mean is over the rows of all of
        them, on all ranks. The model runs without gradients up to the first use of its first layer;
        its buffers and mode stay as they are. Raises ValueError if no layer has an input
        covariance, or there is no batch.
        """
        layer = self.layers.get(self.first)
        if layer is None:
            raise ValueError("MAC: calibrate() has no first layer with an input covariance")
        model = self.model
        while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        layer.drop()
        try:
            for batch in batches:
                x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not torch.is_tensor(x):
                    raise TypeError("MAC: calibrate() takes batches that are tensors, or tuples "
                                    f"that begin with one, not with {type(x).__name__}")
                try:
                    with Calibration(self):
                        model(x.to(layer.weight.device))
                except Found:
                    pass
        except BaseException:
            layer.drop()
            raise
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
        if not layer.active:
            raise ValueError(f"MAC: calibrate()'s layer, {layer.name}, takes the plain step: "
                             f"{layer.found.get('plain', 'its weight is frozen')}")
        found = self.pooled([layer])
        if not found:
            raise ValueError("MAC: calibrate() got no batch")
        state = self.state[layer.weight]
        state.pop("factor", None)
        state.update(found[layer], updates=1, fixed=True)
        self.captured = True
        self.begin_step()

    # ---- attention: blocks of rows of q, k and v ----

    def set_values(self, layer, rows):
        """Give these rows of a layer's weight, which made values, the mean attended input. False
        where that cannot be: then they keep the plain mean."""
        found = value_blocks(rows, layer.out, layer.blocks)
        known = layer.found.get("values", found)
        if layer.weight is self.first or known is None:
            return False
        self.divide(layer, *(found if known == found else (layer.blocks, ())))
        return bool(layer.found["values"][1])

    def divide(self, layer, blocks, values):
        """Note that the weight's rows are so many equal blocks, and which made values: none, once
        others did than before, for then no mean is right for either."""
        state = self.state.get(layer.weight, {})
        if "values" not in layer.found and values:
            for name in ("mean", "applied"):           # so far v had the plain mean
                if name in state:
                    state[name][-1] = state[name][values[0] * layer.blocks // blocks]
        layer.found["values"] = blocks, tuple(values)
        if "updates" in state:
            state["values"] = self.as_number(layer)

    def means_of(self, layer):
        """Which of its means each block of rows of the weight takes; the last is of values."""
        blocks, values = layer.found.get("values", (layer.blocks, ()))
        return [layer.blocks if i in values else i * layer.blocks // blocks for i in range(blocks)]

    def gathered(self, layers, names):
        found = super().gathered(layers, names)
        if "applied" in found and layers[0].kind != "conv":
            each = found["applied"].unflatten(0, (len(layers), -1))
            found["applied"] = each[:, self.means_of(layers[0])].flatten(0, 1)
        return found

    def as_number(self, layer):
        """Which blocks are of values, in bits, and one above them; −1 if unknown. Always in the
        state, and one number: torch.distributed.checkpoint flattens no lists."""
        blocks, values = layer.found.get("values", (0, ()))
        return 2 ** blocks + sum(2 ** i for i in values) if blocks else -1

    def divisors(self, layer, name, rows):
        """0 where attention was not followed, so that what met v's rows is unknown."""
        return rows if all(rows[i] for i in self.means_of(layer)) else [0] * len(rows)

    def merge(self, layer, everyone):
        super().merge(layer, everyone)
        values = {found["values"] for found in everyone if "values" in found}
        if values and layer.active:
            same = (layer.blocks, ()) if len(values) > 1 else values.pop()
            if layer.found.get("values") != same:
                self.divide(layer, *same)

    def begin_step(self):
        super().begin_step()
        for layer in self.layers.values():
            if layer.kind != "conv" and "updates" in self.state.get(layer.weight, {}):
                self.state[layer.weight]["values"] = self.as_number(layer)

    def restore(self, layer, saved):
        layer.found.pop("values", None)
        super().restore(layer, saved)
        number = saved.get("values", -1)
        if number > 1:
            blocks = number.bit_length() - 1
            layer.found["values"] = blocks, tuple(i for i in range(blocks) if number >> i & 1)


class Found(Exception):
    """Ends a forward pass at the layer that calibrate() looks at."""


class Calibration(Watcher):
    """Adds the input covariance of the first layer to its pending sums, and ends the pass there."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.layers = {optimizer.first: optimizer.layers[optimizer.first]}
        self.parameter = optimizer.watcher.parameter

    def sees(self, out):
        return isinstance(out, torch.Tensor) and out.numel() > 0

    def record(self, found, kind, x, out, bias, **details):
        layer, use = found[0], self.use_of(found, kind, x, out, bias, **details)
        if use is not None:
            with full_precision(out.device.type):
                layer.add("covariance", input_covariance(use, layer.bias is not None), use.rows)
        raise Found
