"""AdaFisher and AdaFisherW: Adam with a diagonal Fisher matrix in place of its second moment.

Gomes, Zhang, Belilovsky, Wolf, Hosseini. "AdaFisher: Adaptive Second Order Optimization via Fisher
Information". arXiv 2405.16397, ICLR 2025.  (Numbers are this file's; the paper's own follow a P.)

THE UPDATE, for every Linear and Conv2d, rows h̄ = [h; 1] of its input, s = R ∂(mean loss)/∂output,
the gradient as if each of the R rows had a loss of its own (other constants cancel in (4)), and for
every normalisation layer z = ν ⊙ h + c, h its normalised input:

    (1)  H = E[h̄ ⊙ h̄],  S = E[s ⊙ s]       over all rows: the diagonals of K-FAC's two factors
    (2)  z = ν ⊙ h + c:  H = E[h ⊙ h],  S as in (1);  F_ν = H ⊙ S,  F_c = S    (Proposition 3.1)
    (3)  H ← H + w (H_batch − H),  w = (1 − γ)/(1 − γᵏ);  S likewise                  (P3)
    (4)  v′ = (v − min v)/(max v − min v) of each factor;  0 where max v = min v      (P4)
    (5)  F̃ = λ + S′ H′ᵀ for [W | b],  λ + H′ ⊙ S′ for ν,  λ + S′ for c                (P4)
         F̃ = 1 for a parameter without a layer
    (6)  m̂ ← m̂ + w (g − m̂),  w = (1 − β)/(1 − βᵗ)             bias-corrected first moment
    (7)  AdaFisher:  θ ← θ − α m̂/F̃, the gradient g with wd·θ in it     (entry by entry, no root)
         AdaFisherW: θ ← θ − α (m̂/F̃ + wd·θ)

and with averaging='released', the default, from H = S = 1, in the place of (3) and (4):

    (3r) H ← 0.1γ H + 0.01γ v,  v = (H_batch − min)/(max − min + 10⁻⁶);  S likewise
         in (5) H and S themselves are H′ and S′; λ + (0.1γ)ᵏ S for c   (H of a constant 1: v = 0)

    symbol   in code              shape
    H        state "H"            (blocks, d): one block per group of a convolution; d = in or
                                  C/groups·kh·kw, + 1 for a bias; (1, C) of a norm. 'released': A
                                  of (8) is stored
    S        state "S"            (blocks, out/blocks); (1, C) of a norm. 'released': the A of its
                                  v, and s without R
    H′, S′   factors              (n, blocks, 1, d), (n, blocks, out/blocks, 1) of n layers of one
                                  shape; (n, C) of norms
    m̂, t     "momentum_buffer", "moments"   in state: like θ;  the steps in which θ had a gradient
    γ, β, λ  gamma, beta, damping           numbers;  k: state "updates";  α, wd: lr, weight_decay
    R        rows                 B (linear), B·N (tokens), B·oH·oW (convolution; BatchNorm alike)

AVERAGING. 'released' is the authors' code, from which every published number comes: at the
published settings (α = λ = 1e-3, β = 0.9, γ = 0.8) it is momentum SGD with lr (1 − β)α/λ = 0.1,
after a hidden warm-up of two refreshes, where λ/F̃ is in 0.11 to 0.14 and 0.82 to 0.96. 'printed'
follows the equations as printed: at the published settings it holds most entries back (ResNet-20,
CIFAR-10 as JPEG, 200 steps: F̃ is 123 λ in the median), and the 3 % with F̃ < 2λ, which make 0.96 of
|update|² (results/adafisher-printed.txt) and move as those of SGD with lr 0.1, decide what α is
stable.

WHY 'released' IS SGD. With γ̂ = 0.1γ, (3r) unrolls to
    (8)  H = γ̂ᵏ + κ (1 − γ̂ᵏ) A,  κ = 0.01γ/(1 − γ̂),  A the average (3) of the v, with γ̂ for γ.
For γ = 0.8, κ is 1/115 (an average would have κ = 1).
All v lie in [0, 1], so A does, and H and S lie in [0.080, 0.088] after the first refresh, in
[0.0064, 0.0151] after the second, and in [0, 1/115] in the end.
S Hᵀ is at most 1/115² = 7.6e-5 then, beside λ = 1e-3.
The largest F̃ over the smallest is at most 1.19, 1.18, 1.08, ... 1.076.
A diagonal matrix whose entries have the ratio r leaves each vector at a cosine of at least
2√r/(1 + r) with what it was (Kantorovich): 0.9965 at the first refresh, 0.9991 at the third, 0.9993
in the end. This is so with or without BatchNorm, wherever every parameter has a layer: compare with
SGD of a tuned step before crediting the curvature.

WHY NO ROOT. Adam's denominator is the root of a second moment of g. F̃ stands for the Fisher matrix
itself, and a natural gradient divides by the matrix and not by its root.

WHY AN OUTER PRODUCT. K-FAC's block of the Fisher matrix is H ⊗ S with full factors.
The gradient of one row is s h̄ᵀ, so entry (o, i) of [W | b] meets S_o H_i on the block's diagonal.
In the weight's own shape that diagonal is S Hᵀ: the Kronecker product never exists, and F̃ is formed
for the division and forgotten.

WHAT (4) DOES. Every F̃ lies in [λ, 1 + λ], and that of [W | b] (of one group) reaches both ends,
whatever the curvature: the smallest S_o and the smallest H_i give a whole row and a whole column
F̃ = λ, momentum SGD of step α/λ. Positive factors of H and S cancel, the loss's scale among them. A
factor that is constant up to rounding (a dead layer, one channel) carries no information: v′ = 0,
F̃ = λ. BatchNorm's h has E[h²] = σ²/(σ² + ε), 1 but for ε; (4) stretches this to [0, 1], so a
BatchNorm's H′ ranks its channels by input variance and by nothing else.

WITHOUT A LAYER: embeddings, class tokens, nn.MultiheadAttention (as published), layers of other
kinds (1-D, 3-D and transposed convolutions, RMSNorm), every raw parameter, and a layer until it has
run in a statistics step; print(optimizer) lists them. F̃ = 1 is the paper's identity for unsupported
layers and its initial F: momentum of step α, small beside the α/λ of flat directions. For F̃ = λ
give such parameters a group of their own with lr = α/λ.

COST per layer: statistic O(numel of input and output) every tcov steps, application 2·out·d per
step for forming F̃ beside Adam's own; state out + d numbers, and m̂ (Adam has two such); and for the
moment of the step F̃, as many numbers as the parameters.

THROWN AWAY: everything of the factors off their diagonals, and by (4) the size of what is left. (2)
drops the terms between positions and between ν and c: with h = s = 1 at two positions the exact F_ν
is 4 and (2) gives 1. Losses of one graph that are backpropagated one after the other (retain_graph)
count as micro-batches: S has their squares without the cross term. Add them up first.

DEPARTURES from the paper. Algorithm 1 refreshes H and S in every step: tcov=1; the default is the
100 of the released code. Left open by the paper and read so: γ weighs the past; the average starts
from the first batch; F_c has no H′ (min-max of its constant ones would be 0/0); all groups of a
convolution share one min-max; GroupNorm takes (2) like LayerNorm. s comes from the training labels:
H and S are of the empirical Fisher.

ERRATA, against the released code, of which 'released' keeps (3r) alone. It
 - min-maxes before it averages (the paper: after), with an ε under which most S of a mean loss
   vanish: the loss's scale and the batch's size matter;
 - gives BatchNorm and LayerNorm two numbers, one of which min-max makes 0, instead of (2);
 - divides H of a convolution by its patch length too, pools groups, ignores dilation;
 - matches parameters to layers by position: in Transformers many are never updated (16 of 26.6
   million weights of its Swin), others get a neighbour's F̃;
 - sees gradients times a GradScaler's factor, turns an overflow into 1, counts every micro-batch as
   a refresh, forbids in-place operations, all-reduces each layer in each step.

USAGE
    optimizer = AdaFisher(model, lr=1e-3, weight_decay=5e-4)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
"""
import torch
import torch.nn.functional as F

from blocks import joined, stacks
from optimizer import DECAY, NOT_NEGATIVE, PERIOD, POSITIVE, Preconditioner
from patches import patch_sum
from pooling import running_mean, world_size
from precision import at_least_float32, full_precision
from sharding import local, local_rows


def plain(W, steps, lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3, gamma=0.8, tcov=100,
          averaging="released", decoupled=False):
    """The method on one weight W (out, d), formula by formula; returns W after the steps.

    steps: for each step a function of W that returns X (R, d), the rows that met W (of an image its
    unfolded patches; a last column of ones for a bias), and s (R, out), the gradient of the mean
    loss by what came of each. decoupled: AdaFisherW.
    """
    α, β, γ, λ, wd = lr, beta, gamma, damping, weight_decay
    H = S = 1 if averaging == "released" else 0
    k = m = 0
    for t, step in enumerate(steps, 1):
        X, s = step(W)
        if (t - 1) % tcov == 0 and averaging == "released":
            H = 0.1 * γ * H + 0.01 * γ * stretched((X ** 2).mean(0), 1e-6)                # (3r)
            S = 0.1 * γ * S + 0.01 * γ * stretched((s ** 2).mean(0), 1e-6)
            F̃ = λ + torch.outer(S, H)                                                     # (5)
        elif (t - 1) % tcov == 0:
            k = k + 1
            H = γ * H + (1 - γ) * (X ** 2).mean(0)                                        # (1)
            S = γ * S + (1 - γ) * ((len(X) * s) ** 2).mean(0)
            mean_H, mean_S = H / (1 - γ ** k), S / (1 - γ ** k)                           # (3)
            F̃ = λ + torch.outer(stretched(mean_S), stretched(mean_H))                     # (4), (5)
        g = s.T @ X + (0 if decoupled else wd * W)
        m = β * m + (1 - β) * g                                                           # (6)
        W = W - α * (m / (1 - β ** t) / F̃ + (wd * W if decoupled else 0))                 # (7)
    return W


def stretched(v, ε=0.0):
    """(4) as it is printed, and the v of (3r): all entries of v together to [0, 1]."""
    spread = v.max() - v.min() + ε
    return (v - v.min()) / spread if spread > 0 else 0 * v


# ---- the mathematics ----

def min_max(v):
    """(4)  v′ along the last dimension: (v − min v)/(max v − min v); 0 where v is constant.

    Constant means a spread of at most 16 roundings of the largest entry: stretched to [0, 1] it
    would be noise. The bound is relative, so a positive factor on v changes nothing.
    """
    low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    spread, largest = high - low, torch.maximum(high, -low)
    return torch.where(spread > 16 * torch.finfo(v.dtype).eps * largest, (v - low) / spread, 0.0)


def row_squares(x):
    """Σ x² over the rows of x (rows, d), or the images of x (B, C, H, W)."""
    return x.to(at_least_float32(x)).square().sum(0)


def channel_squares(x):
    """Σ x² of x (B, C, ...) over all but the channels: (C,); image by image, the memory's order."""
    x = x.reshape(*x.shape[:2], -1)
    return torch.linalg.vector_norm(x, dim=2, dtype=at_least_float32(x)).square().sum(0)


def input_squares(use, bias):
    """(1)  Σ h ⊙ h over the rows of a use, or Σ h̄ ⊙ h̄ with a bias: (1 or groups, d)."""
    if use.kind == "conv":      # padding adds zeros, so squares of patches are patches of squares
        squares = patch_sum(row_squares(use.x), use.geometry)
    else:
        squares = row_squares(use.x.reshape(use.rows, -1))[None]
    return F.pad(squares, (0, 1), value=float(use.rows)) if bias else squares


def norm_squares(use):
    """(2)  Σ h ⊙ h over the rows of a norm's use, h its normalised input: (C,)."""
    x = use.x.to(at_least_float32(use.x))
    if "normalized_shape" in use.norm:
        return row_squares(F.layer_norm(x, **use.norm).reshape(use.rows, -1))
    if "num_groups" in use.norm:
        return channel_squares(F.group_norm(x, **use.norm))
    return batch_norm_sum(x, **use.norm)


def batch_norm_sum(x, eps, mean, var):
    """(2)  Σ (h² − 1) over the rows of BatchNorm's input x (B, C, ...), per channel: (C,).

    With batch mean μ and variance σ², and m and v those it normalises by (given, or else the same),
    E[(x − m)²]/(v + ε) − 1 = (σ² − v + (μ − m)² − ε)/(v + ε). Min-max does not see the 1; left in,
    float32 would round away what makes the channels differ, −ε/(σ² + ε) when training.
    (SyncBatchNorm's v is that of all ranks; here each rank's own stands in for it.)
    """
    x = x.reshape(*x.shape[:2], -1)
    rows = x.numel() // x.shape[1]
    μ = x.sum((0, 2)) / rows
    σ2 = channel_squares(x - μ[:, None]) / rows
    m, v = (μ, σ2) if mean is None else (mean.to(x.dtype), var.to(x.dtype))
    return rows * (σ2 - v + (μ - m).square() - eps) / (v + eps)


# ---- the optimizer ----

class AdaFisher(Preconditioner):
    """Momentum divided by a diagonal Kronecker-factored Fisher matrix, (7); weight decay coupled.

    model: its Linear, Conv2d, BatchNorm, LayerNorm and GroupNorm layers whose weights are in the
        parameter groups get their F̃; all other parameters take the plain step, with F̃ = 1.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below, but grad_scaler, for itself.
    lr (α); beta (β): in [0, 1), the weight of the past in (6). A schedule that cycles momentum
        (OneCycleLR, CyclicLR) sets the group's "momentum", which then stands in beta's place.
    weight_decay (wd): added to the gradient, so it passes through (6) and is divided by F̃. See
        AdaFisherW.
    damping (λ): > 0. The step along flat directions is α/λ.
    gamma (γ): in [0, 1), the weight of the past in (3); see (3r).
    tcov: every tcov steps, beginning with the first, the batch joins the averages and F̃ is made
        anew, before the step is taken. 1 as in the paper, 100 as in its experiments.
    averaging: 'released', the authors' code: at the published settings momentum SGD with
        lr (1 − β)α/λ = 0.1 after a hidden warm-up of two refreshes. 'printed', the paper's
        equations, which at those settings hold most entries back.
    maximize: ascend instead of descending.
    grad_scaler: the torch.amp.GradScaler in use, if any; its scale is divided out of s. Without, a
        constant scale cancels in (4), and one that changes gives the batches before and after it
        unequal weights in (3); in (3r) it moves S against the 10⁻⁶, within the bounds of F̃.

    Raises TypeError if model is none, ValueError for an option out of range. step() raises
    RuntimeError if its first batch passed no layer, FloatingPointError if a statistic is not
    finite; parameters and state stay.
    """

    kinds = dict(linear="outer product", conv="outer product", norm="per channel")
    checks = dict(lr=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE, beta=DECAY, damping=POSITIVE,
                  gamma=DECAY, tcov=PERIOD,
                  averaging=(lambda v: v in ("released", "printed"), "'released' or 'printed'"))
    needs_gradients = True
    decoupled = False

    def __init__(self, model, *, params=None, lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3,
                 gamma=0.8, tcov=100, averaging="released", maximize=False, grad_scaler=None):
        self.grad_scaler, self.scale = grad_scaler, (None, 1.0)     # (backward pass, its scale)
        self.factors = None                                # (parameters of one shape, S′, H′)
        super().__init__(model, params, dict(defaults=dict(
            lr=lr, beta=beta, weight_decay=weight_decay, damping=damping, gamma=gamma, tcov=tcov,
            averaging=averaging, maximize=maximize,
            momentum=None)), {})         # what torch's schedules look for and set in the groups

    def set_up(self, layer):
        n, rows = layer.weight.numel(), layer.out // layer.blocks
        layer.measured = dict(H=(1, n), S=(1, n)) if layer.kind == "norm" else \
            dict(H=(layer.blocks, layer.d), S=(layer.blocks, rows))

    def measure(self, layer, use):
        if use.kind == "norm":
            return {"H": norm_squares(use)[None]}, use.rows
        return {"H": input_squares(use, layer.bias is not None)}, use.rows

    def measure_gradient(self, layer, use, s):
        backward = torch._C._current_graph_task_id()
        if self.grad_scaler is not None and self.scale[0] != backward:    # reading it waits for
            self.scale = backward, self.grad_scaler.get_scale()           # the GPU: once a backward
        if self.scale[1] != 1.0:     # before squaring: a scaled gradient's square may overflow
            s = s.to(at_least_float32(s)) / self.scale[1]
        by_channel = use.kind == "conv" or use.kind == "norm" and "normalized_shape" not in use.norm
        S = channel_squares(s) if by_channel else row_squares(s.reshape(use.rows, -1))
        return {"S": S.view(-1, layer.measured["S"][1])}

    # ---- the averages ----

    def past(self, group):
        return group["gamma"] * (0.1 if group["averaging"] == "released" else 1.0)

    def pooled(self, layers):
        """The means over this step's rows; the released code stretches them before they enter H."""
        self.groups = dict(self.grouped())
        found = super().pooled(layers)
        for layer, means in found.items():
            if self.groups[layer]["averaging"] == "released":
                found[layer] = {name: stretched(v, 1e-6) for name, v in means.items()}   # (3r)
        return found

    def divisors(self, layer, name, rows):
        """S is a mean over rows like H, of s = R·∂(mean loss)/∂output; 'released' has no R there.

        The loss that a rank sees is as many times the mean loss's part as there are ranks.
        """
        if name == "H":
            return rows
        if self.groups[layer]["averaging"] == "released":
            return [R * world_size() ** 2 for R in rows]
        return [world_size() ** 2 / R if R else 0 for R in rows]

    def refresh(self):
        """What (5) takes from the averages, for layers of one shape together."""
        self.factors = []
        known = [(layer, group) for layer, group in self.grouped()
                 if self.state.get(layer.weight, {}).get("updates")]
        for group in self.param_groups:
            for layers, _ in stacks([pair for pair in known if pair[1] is group]):
                H, S = (joined([self.state[layer.weight][name] for layer in layers])
                        .view(len(layers), -1) for name in ("H", "S"))
                if group["averaging"] == "printed":
                    self.keep(layers, min_max(H), min_max(S), 1.0)                       # (4)
                else:
                    k = H.new_tensor([[self.state[layer.weight]["updates"]] for layer in layers])
                    left = self.past(group) ** k
                    gain = 0.01 * group["gamma"] / (1 - self.past(group)) * (1 - left)
                    self.keep(layers, left + gain * H, left + gain * S, left)            # (8)

    def keep(self, layers, H, S, of_shift):
        """S′ and H′ for (5) from H (n, blocks·d), S (n, out); of_shift: the part of H for b, c."""
        if layers[0].kind != "norm":
            H, S = H.view(len(H), layers[0].blocks, 1, -1), S.view(len(S), layers[0].blocks, -1, 1)
            H, of_shift = H[..., :layers[0].weight.numel() // layers[0].out], H[..., -1:]
        if layers[0].transposed:
            H, S = H.mT, S.mT
        self.factors.append(([layer.weight for layer in layers], S, H))
        if layers[0].bias is not None:
            self.factors.append(([layer.bias for layer in layers], S, of_shift))

    # ---- the step ----

    def take_step(self):
        """Statistics, F̃, moments, step. p.grad stays as it is."""
        with full_precision(next(iter(self.layers), torch.empty(0)).device.type):
            self.update_statistics()
            if self.collecting or self.factors is None:
                self.refresh()
        for group in self.param_groups:
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group, params):
        """(7) for the parameters of a group that have a gradient, in few kernels."""
        if not params:
            return
        lr, decay = float(group["lr"]), group["weight_decay"]
        grads = [p.grad.to_dense() if p.grad.is_sparse else local(p.grad) for p in params]
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay and self.decoupled:
            torch._foreach_mul_([local(p) for p in params], 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, [local(p) for p in params], alpha=decay)
        moments = self.moments(group, params, grads)
        fisher = self.fisher(group)
        some, rest = [p for p in params if p in fisher], [p for p in params if p not in fisher]
        if some:
            torch._foreach_addcdiv_([local(p) for p in some], [moments[p] for p in some],
                                    [fisher[p] for p in some], value=-lr)
        if rest:                                                                         # F̃ = 1
            torch._foreach_add_([local(p) for p in rest], [moments[p] for p in rest], alpha=-lr)

    def moments(self, group, params, grads):
        """(6)  {parameter: m̂}; those that have had as many gradients go together."""
        found, ages = {}, {}
        for p, grad in zip(params, grads):
            state = self.state[p]
            if "moments" not in state:
                state.update(momentum_buffer=torch.zeros_like(p), moments=0)
            state["moments"] += 1
            found[p] = local(state["momentum_buffer"])
            buffers, new = ages.setdefault(state["moments"], ([], []))
            buffers.append(found[p])
            new.append(grad)
        β = group["beta"] if group.get("momentum") is None else group["momentum"]
        for t, (buffers, new) in ages.items():
            running_mean(buffers, new, t, β)
        return found

    def fisher(self, group):
        """(5)  {parameter: F̃} of the group's parameters that have a layer."""
        mine, found, products = set(group["params"]), {}, []
        for params, S, H in self.factors:
            if not mine.isdisjoint(params):
                product = (S * H).view(len(params), *params[0].shape)
                products.append(product[:, local_rows(params[0])])
                found.update(zip(params, products[-1]))
        if products:
            torch._foreach_add_(products, group["damping"])
        return found

    # ---- the rest of torch's interface ----

    def is_trial(self):
        trial = super().is_trial()
        for state in self.state.values() if trial else ():
            state.setdefault("moments", 0)
        return trial

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.factors = None                                    # to be made of what was loaded


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, W ← (1 − α·wd)W beside the step of (7).

    For Transformers; give biases and normalisation layers a group with weight_decay=0.
    """

    decoupled = True
