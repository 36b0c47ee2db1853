"""AdaFisher and AdaFisherW: Adam with a diagonal Fisher matrix in place of its second moment.

Gomes, Zhang, Belilovsky, Wolf, Hosseini. "AdaFisher: Adaptive Second Order Optimization via Fisher
Information". arXiv 2405.16397, ICLR 2025.  (Numbers are this file's; the paper's own stand behind
a P.)

THE UPDATE, for every Linear and Conv2d, rows h̄ = [h; 1] of its input and s = ∂loss/∂output of each
sample, and for every normalisation layer z = ν ⊙ h + b, h its normalised input:

    (1)  H = E[h̄ ⊙ h̄],  S = E[s ⊙ s]       over all rows: the diagonals of K-FAC's two factors
    (2)  z = ν ⊙ h + b:  H = E[h ⊙ h],  S as in (1);  F_ν = H ⊙ S,  F_b = S    (Proposition 3.1)
    (3)  H ← H + w (H_batch − H),  w = (1 − γ)/(1 − γᵏ);  S likewise                  (P3)
    (4)  v′ = (v − min v)/(max v − min v) of each factor;  0 where max v = min v
    (5)  F̃ = λ + S′ H′ᵀ for [W | b],  λ + H′ ⊙ S′ for ν,  λ + S′ for b                (P4)
         F̃ = 1 for a parameter without a layer
    (6)  m̂ ← m̂ + w (g − m̂),  w = (1 − β)/(1 − βᵗ)             bias-corrected first moment
    (7)  AdaFisher:  θ ← θ − α m̂/F̃, the gradient g with wd·θ in it     (entry by entry, no root)
         AdaFisherW: θ ← θ − α (m̂/F̃ + wd·θ)

and with averaging='released', the default, in the place of (3) to (5), from H = S = 1 and in this
order:
    (3r) H ← 0.1γ H + 0.01γ v,  v = (H_batch − min)/(max − min + 10⁻⁶);  S likewise
    (5r) F̃ = λ + S Hᵀ,  λ + H ⊙ S for ν,  λ + (0.1γ)ᵏ S for b    (H of a constant 1, whose v is 0)

    symbol   in code              shape
    H        state "H"            (blocks, d): one block per group of a convolution, three for the
                                  q, k, v of nn.MultiheadAttention; d = in or C/groups·kh·kw, + 1
                                  for a bias. (1, C) in a norm. 'released': the A of (8)
    S        state "S"            (blocks, out/blocks) or (1, C), of s = R·∂(mean loss)/∂output;
                                  'released': of ∂(mean loss)/∂output
    S′, H′   outer, vectors       of layers of one shape: (n, blocks, out/blocks, 1),
                                  (n, blocks, 1, d); as F̃ − λ where that is a vector
    m̂, t     "momentum_buffer", "moments"   both in state: like θ;  steps in which θ had a gradient
    γ, β, λ  gamma, beta, damping           numbers;  k: state "updates";  α, wd: lr, weight_decay
    R        rows                 B (linear), B·N (tokens), B·oH·oW (convolution; BatchNorm alike)

AVERAGING. 'released' is the authors' code, from which every published number comes: at the
published settings (α = λ = 1e-3, γ = 0.8) momentum SGD with lr (1 − β)α/λ = 0.1, after a hidden
warm-up of two refreshes in which α/F̃ is 0.12, then 0.9 of α/λ. 'printed' follows the equations as
the paper prints them: at the same settings it holds most entries back, since the few with F̃ near λ
set the largest step that is stable; a λ = α of about 0.1 with a short warm-up suits it better.

WHY 'released' IS SGD. Unroll (3r) for a constant γ.
 - (8)  H = (0.1γ)ᵏ + c (1 − (0.1γ)ᵏ) A,  c = 0.01γ/(1 − 0.1γ) = 1/115,  A the bias-corrected average
   of v with decay 0.1γ. A is what is stored.
 - v lies in [0, 1], and so does A. 92 % of it is the last batch's.
 - So H and S lie in [0.080, 0.088] after the first refresh, and in [0, 1/115] in the end.
 - S Hᵀ then is at most 1/115² = 7.6e-5 beside λ = 1e-3: the largest F̃ over the smallest is 1.18,
   1.18, 1.08, ... 1.076.
 - A diagonal matrix of this ratio r turns no vector by an angle of cosine below 2√r/(1 + r)
   (Kantorovich): 0.9965 at the first refresh, 0.9992 at the third, 0.9993 in the end.
This is so with and without BatchNorm, wherever every parameter has a layer. So compare with SGD of
a tuned step before crediting the curvature.

WHY NO ROOT. Adam's denominator is the root of a second moment of g. F̃ stands for the Fisher matrix
itself, and a natural gradient divides by the matrix and not by its root.

WHY AN OUTER PRODUCT. K-FAC's block of the Fisher matrix is H ⊗ S with full factors.
The gradient of one row is s h̄ᵀ, so entry (o, i) of [W | b] meets S_o H_i on the block's diagonal.
In the weight's own shape this diagonal is S Hᵀ; the Kronecker product never exists, and F̃ is formed
for the division and forgotten.

WHAT (4) DOES. Every F̃ lies in [λ, 1 + λ], and that of [W | b] reaches both ends, whatever the
curvature. The smallest S_o and the smallest H_i give a whole row and a whole column of [W | b]
F̃ = λ: momentum SGD of step α/λ there. A positive factor of H or S cancels, so the loss's scale does
not matter, and the definition of s (per sample or of the mean loss) does but for batches of unequal
size. A factor that is constant up to rounding (a dead layer, one channel) carries no information:
v′ = 0, F̃ = λ. BatchNorm's h has E[h²] = σ²/(σ² + ε), 1 but for ε; (4) stretches this to [0, 1], so
a BatchNorm's H′ ranks its channels by input variance and by nothing else.

WITHOUT A LAYER: embeddings, positional embeddings, class tokens, layers of other kinds (1-D, 3-D
and transposed convolutions, RMSNorm, InstanceNorm), every raw parameter, and a layer that has not
run in a statistics step; print(optimizer) lists them. They get F̃ = 1, which is the paper's identity
for unsupported layers and its initial F: bias-corrected momentum of step α. That is small beside
the α/λ of flat directions; for F̃ = λ give such parameters a group of their own with lr = α/λ.

COST per layer: statistic O(numel of input and output) every tcov steps, application 2·out·d per
step for forming F̃ beside Adam's own; state out + d numbers, and m̂ (Adam has two such).

THROWN AWAY: everything of the factors off their diagonals, which is most of them (the inputs of a
convolution are far from uncorrelated), and by (4) the size of what is left. (2) drops the terms
between positions and between ν and b: with h = s = 1 at two positions the exact F_ν is 4 and (2)
gives 1. Losses of one graph backpropagated one after the other (retain_graph) count as micro-
batches: S holds their squares without the cross term. Add them up first.

DEPARTURES from the paper. Algorithm 1 refreshes H and S in every step: tcov=1; the default is the
100 of the released code. Left open by the paper and read so: γ weighs the past; the average starts
from the first batch; F_b has no H′ (min-max of its constant ones would be 0/0); all groups of a
convolution share one min-max; GroupNorm takes (2) like LayerNorm. s comes from the training labels:
H and S are of the empirical Fisher.

ERRATA, against the released code, of which 'released' keeps (3r) and (5r) alone. It
 - calls (3r) an average, though a constant 1 settles at 1/115; min-maxes before it (the paper:
   after), with an ε under which most S of a mean loss vanish: the loss's scale and the batch's size
   matter;
 - gives BatchNorm and LayerNorm two numbers, one of which min-max makes 0, instead of (2);
 - divides H of a convolution by its patch length too, pools groups, ignores dilation;
 - matches parameters to layers by position: in Transformers many are never updated (16 of 26.6
   million weights of its Swin), others get a neighbour's F̃;
 - sees gradients times a GradScaler's factor, turns an overflow into 1, counts every micro-batch as
   a refresh, forbids in-place operations, all-reduces each layer in each step.

USAGE
    optimizer = AdaFisher(model, lr=1e-3, weight_decay=5e-4)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""
import torch
import torch.nn.functional as F

from capture import full_precision
from optimizer import DECAY, PERIOD, POSITIVE, Preconditioner, joined, running_mean, stacks, \
    world_size
from patches import at_least_float32, patch_sum


def plain(W, steps, lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3, gamma=0.8, tcov=100,
          averaging="released", decoupled=False):
    """The method on one weight W (out, d), formula by formula; returns W after the steps.

    steps: for each step a function of W that returns X (R, d), the rows that met W (of an image its
    unfolded patches; a last column of ones for a bias), and s (R, out), the gradient of the mean
    loss by what came of each. decoupled: AdaFisherW.
    """
    α, β, γ, λ, wd = lr, beta, gamma, damping, weight_decay
    released = averaging == "released"
    H = S = 1 if released else 0
    k = m = 0
    for t, step in enumerate(steps, 1):
        X, s = step(W)
        if (t - 1) % tcov == 0:
            k += 1
            if released:
                H = 0.1 * γ * H + 0.01 * γ * stretched((X ** 2).mean(0), 1e-6)           # (3r)
                S = 0.1 * γ * S + 0.01 * γ * stretched((s ** 2).mean(0), 1e-6)
                F̃ = λ + torch.outer(S, H)                                                # (5r)
            else:
                H = γ * H + (1 - γ) * (X ** 2).mean(0)                                   # (1), (3)
                S = γ * S + (1 - γ) * ((len(X) * s) ** 2).mean(0)
                F̃ = λ + torch.outer(stretched(S / (1 - γ ** k)), stretched(H / (1 - γ ** k)))
        g = s.T @ X + (0 if decoupled else wd * W)
        m = β * m + (1 - β) * g                                                          # (6)
        W = W - α * (m / (1 - β ** t) / F̃ + (wd * W if decoupled else 0))                # (7)
    return W


def stretched(v, ε=0.0):
    """(4) as it is printed, and the v of (3r)."""
    return (v - v.min()) / (v.max() - v.min() + ε)


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
        squares = row_squares(use.x.reshape(-1, use.x.shape[-1]))[None]
    return F.pad(squares, (0, 1), value=float(use.rows)) if bias else squares


def norm_squares(use):
    """(2)  Σ h ⊙ h over the rows of a norm's use, h its normalised input: (1, C)."""
    x, norm = use.x.to(at_least_float32(use.x)), use.norm
    if "normalized_shape" in norm:
        h = F.layer_norm(x, norm["normalized_shape"], eps=norm["eps"])
        return row_squares(h.flatten(-len(norm["normalized_shape"])).flatten(0, -2))[None]
    if "num_groups" in norm:
        return channel_squares(F.group_norm(x, norm["num_groups"], eps=norm["eps"]))[None]
    return batch_norm_sum(x, norm["mean"], norm["var"], norm["eps"])[None]


def batch_norm_sum(x, m, v, eps):
    """(2)  Σ (h² − 1) over the rows of BatchNorm's input x (B, C, ...), per channel: (C,).

    m, v are those it normalises by, None for the batch's own mean μ and variance σ². Then
    E[(x − m)²]/(v + ε) − 1 = (σ² − v + (μ − m)² − ε)/(v + ε). Min-max does not see the 1; left in,
    float32 would round away what makes the channels differ, −ε/(σ² + ε) when training.
    (SyncBatchNorm's v is that of all ranks; here each rank's own stands in for it.)
    """
    x = x.reshape(*x.shape[:2], -1)
    rows = x.numel() // x.shape[1]
    mean = x.sum((0, 2)) / rows
    var = channel_squares(x - mean[:, None]) / rows
    m, v = (mean, var) if m is None else (m.to(x.dtype), v.to(x.dtype))
    return rows * (var - v + (mean - m).square() - eps) / (v + eps)


# ---- the optimizer ----

class AdaFisher(Preconditioner):
    """Momentum divided by a diagonal Kronecker-factored Fisher matrix, (7); weight decay coupled.

    model: its Linear, Conv2d, BatchNorm, LayerNorm and GroupNorm layers whose weights are in the
        parameter groups get their F̃; all other parameters take the plain step, with F̃ = 1.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below, but grad_scaler, for itself.
    lr (α); beta (β): in [0, 1), the weight of the past in the first moment (6). A schedule that
        cycles momentum (OneCycleLR, CyclicLR) sets the group's "momentum", which then replaces it.
    weight_decay (wd): added to the gradient, so it passes through (6) and is divided by F̃. See
        AdaFisherW.
    damping (λ): > 0. Along flat directions the step is α/λ.
    gamma (γ): in [0, 1), the weight of the past in (3); see (3r).
    tcov: every tcov steps, beginning with the first, the batch joins the averages and F̃ is made
        anew, before the step is taken. 1 as in the paper, 100 as in its experiments.
    averaging: 'released' is the authors' code, with which the published settings are momentum SGD
        of lr (1 − β)α/λ = 0.1 after a warm-up of two refreshes. 'printed' follows the paper's
        equations, which at those settings hold most entries back.
    maximize: ascend instead of descending.
    grad_scaler: the torch.amp.GradScaler in use, if any; its scale is divided out of s. Without, a
        constant scale cancels in 'printed', and one that changes weighs the batches on both sides
        of the change unequally; in 'released' it moves S against its ε, F̃ staying in its bounds.

    Raises TypeError if model is none, ValueError for an option out of range. step() raises
    RuntimeError if its first batch passed no layer, FloatingPointError if a statistic is not
    finite; parameters and state stay.
    """

    kinds = dict(linear="outer product", conv="outer product", norm="per channel")
    checks = dict(lr=(lambda v: 0 <= v < float("inf"), "a number, 0 or more"),
                  weight_decay=(lambda v: 0 <= v < float("inf"), "a number, 0 or more"),
                  beta=DECAY, damping=POSITIVE, gamma=DECAY, tcov=PERIOD,
                  averaging=(lambda v: v in ("released", "printed"), "'released' or 'printed'"))
    needs_gradients = True
    decoupled = False

    def __init__(self, model, *, params=None, lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3,
                 gamma=0.8, tcov=100, averaging="released", maximize=False, grad_scaler=None):
        self.grad_scaler, self.scale, self.outer, self.vectors = grad_scaler, (None, 1.0), None, {}
        # torch's schedulers ask for "momentum" among the defaults and set it in the groups
        super().__init__(model, params, dict(defaults=dict(
            lr=lr, beta=beta, weight_decay=weight_decay, damping=damping, gamma=gamma, tcov=tcov,
            averaging=averaging, maximize=maximize, momentum=None)), {})

    def set_up(self, layer):
        n, rows = layer.weight.numel(), layer.out // layer.blocks
        layer.measured = dict(H=(1, n), S=(1, n)) if layer.kind == "norm" else \
            dict(H=(layer.blocks, layer.d), S=(layer.blocks, rows))

    def measure(self, layer, use):
        H = norm_squares(use) if use.kind == "norm" else input_squares(use, layer.bias is not None)
        return {"H": H}, use.rows

    def measure_gradient(self, layer, use, s):
        backward = torch._C._current_graph_task_id()
        if self.grad_scaler is not None and self.scale[0] != backward:    # reading it waits for
            self.scale = backward, self.grad_scaler.get_scale()           # the GPU: once a backward
        if self.scale[1] != 1.0:     # before squaring: a scaled gradient's square may overflow
            s = s.to(at_least_float32(s)) / self.scale[1]
        if use.kind == "norm":
            last = "normalized_shape" in use.norm
            return {"S": (row_squares(s.reshape(use.rows, -1)) if last
                          else channel_squares(s))[None]}
        S = channel_squares(s) if use.kind == "conv" else row_squares(s.reshape(use.rows, -1))
        return {"S": S.view(-1, layer.out // layer.blocks)}                              # (1)

    # ---- averages ----

    def past(self, group):
        return group["gamma"] * (0.1 if group["averaging"] == "released" else 1.0)   # (3), (8)

    def pooled(self, layers):
        """As the released code has it, min-max comes before the average."""
        self.groups = dict(self.grouped())
        found = super().pooled(layers)
        for layer, means in found.items():
            if self.groups[layer]["averaging"] == "released":
                found[layer] = {name: (v - v.amin()) / (v.amax() - v.amin() + 1e-6)      # (3r)
                                for name, v in means.items()}
        return found

    def divisors(self, layer, name, rows):
        """S is a mean over rows as well, of s times the factor by which it belongs to a mean loss:
        a rank's loss counts 1/ranks, and a row's 1/rows."""
        if name == "H":
            return rows
        if self.groups[layer]["averaging"] == "released":
            return [n * world_size() ** 2 for n in rows]
        return [world_size() ** 2 / n if n else 0 for n in rows]

    def refresh(self):
        """What (5) and (5r) take from the averages, for layers of one shape together."""
        self.outer, self.vectors = [], {}
        known = [(layer, group) for layer, group in self.grouped()
                 if self.state.get(layer.weight, {}).get("updates")]
        for group in self.param_groups:
            for layers, _ in stacks([pair for pair in known if pair[1] is group]):
                H, S = (joined([self.state[layer.weight][name] for layer in layers])
                        .view(len(layers), -1) for name in ("H", "S"))
                of_one = 1.0                                            # of H for a norm's shift
                if group["averaging"] == "printed":
                    H, S = min_max(H), min_max(S)                                        # (4)
                else:
                    k = [[self.state[layer.weight]["updates"]] for layer in layers]
                    of_one = self.past(group) ** torch.tensor(k, dtype=H.dtype).to(H.device)
                    c = 0.01 * group["gamma"] / (1 - self.past(group))
                    H, S = (of_one + c * (1 - of_one) * A for A in (H, S))               # (8)
                self.keep(group, layers, H, S, of_one)

    def keep(self, group, layers, H, S, of_one):
        """H′ (n, blocks·d) and S′ (n, out) of n layers, as `curvature` wants them."""
        n, weight, blocks = len(layers), layers[0].weight, layers[0].blocks
        if layers[0].kind == "norm":
            self.vectors.update(zip([layer.weight for layer in layers],
                                    (H * S).view(n, *weight.shape)))
            of_biases = of_one * S
        else:
            S, H = S.view(n, blocks, -1, 1), H.view(n, blocks, 1, -1)
            of_biases = (S * H[..., -1:]).view(n, -1)
            H = H[..., :weight.numel() // layers[0].out]
            if layers[0].transposed:
                S, H = S.mT, H.mT
            self.outer.append((group, [layer.weight for layer in layers], S, H))
        for layer, part in zip(layers, of_biases):
            if layer.bias is not None and len(part) == layer.bias.numel():
                self.vectors[layer.bias] = part.view(layer.bias.shape)
            elif layer.bias is not None:                     # one bias serves three weights
                whole = part.new_full(layer.bias.shape, 1 - group["damping"])
                self.vectors.setdefault(layer.bias, whole)[layer.bias_rows] = part

    # ---- the step ----

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):
        """Statistics, F̃, moments, step. p.grad stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.is_trial():
            return loss
        with full_precision(next(iter(self.layers), torch.empty(0)).device.type):
            self.update_statistics()
            if self.collecting or self.outer is None:
                self.refresh()
        for group in self.param_groups:
            self.update(group)
        self.steps += 1
        self.begin_step()
        return loss

    def is_trial(self):
        trial = super().is_trial()
        for state in self.state.values() if trial else ():
            state.setdefault("moments", 0)
        return trial

    def update(self, group):
        """(6) and (7) for the parameters of a group that have a gradient, in few kernels."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        lr, decay = float(group["lr"]), group["weight_decay"]
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params]
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay and self.decoupled:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        cycled = group.get("momentum")
        moments = self.moments(params, grads, group["beta"] if cycled is None else cycled)
        for fisher in self.fisher(group):
            some = [p for p in fisher if p in moments]
            if some:
                torch._foreach_addcdiv_(some, [moments.pop(p) for p in some],
                                        [fisher[p] for p in some], value=-lr)            # (7)
        if moments:
            torch._foreach_add_(list(moments), list(moments.values()), alpha=-lr)        # F̃ = 1

    def moments(self, params, grads, beta):
        """(6)  {parameter: m̂}, for parameters of one age together."""
        found, ages = {}, {}
        for p, grad in zip(params, grads):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state.update(momentum_buffer=torch.zeros_like(p), moments=0)
            state["moments"] += 1
            found[p] = state["momentum_buffer"]
            buffers, news = ages.setdefault(state["moments"], ([], []))
            buffers.append(found[p])
            news.append(grad)
        for t, (buffers, news) in ages.items():
            running_mean(buffers, news, t, beta)
        return found

    def fisher(self, group):
        """(5), (5r)  {parameter: F̃} of the group, the weights of one shape at a time."""
        vectors = [p for p in group["params"] if p in self.vectors]
        if vectors:
            yield dict(zip(vectors, torch._foreach_add([self.vectors[p] for p in vectors],
                                                       group["damping"])))
        for of, weights, S, H in self.outer:
            if of is group:
                products = (S * H).view(len(weights), *weights[0].shape)
                yield dict(zip(weights, products.add_(group["damping"])))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.outer = None                                    # to be made of what was loaded


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, W ← (1 − α·wd)W beside the step of (7).

    For Transformers; give biases and normalisation layers a group with weight_decay=0.
    """

    decoupled = True
