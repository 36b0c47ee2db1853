"""K-FAC: Kronecker-factored approximate curvature.

Martens, Grosse. "Optimizing Neural Networks with Kronecker-factored Approximate Curvature". arXiv
1503.05671, ICML 2015. Convolutions: Grosse, Martens, arXiv 1602.01407; weight sharing: Eschenhagen
et al., arXiv 2311.00636; the KL clip: Ba, Grosse, Martens, ICLR 2017.  (Numbers are this file's;
those of Martens and Grosse stand behind MG, as far as they are established.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ],  P = E[g gᵀ]           inputs a; g: gradient of a loss term by s = W a
    (2)  F = E[a aᵀ ⊗ g gᵀ] ≈ A ⊗ P          the layer's block of the Fisher matrix           (MG1)
    (3)  factored: G̃ = (P + √λ/π I)⁻¹ G (A + π√λ I)⁻¹,  π² = (tr A / d) / (tr P / out)   (MG §6.3)
    (4)  eigen: G̃ = Q_P [(Q_Pᵀ G Q_A) / (v_P v_Aᵀ + λ)] Q_Aᵀ,  A = Q_A diag(v_A) Q_Aᵀ, P likewise
    (5)  G̃ ← ν G̃,  ν = min(1, √(κ / Σ_layers η²⟨G̃, G⟩))       the KL clip
    (6)  A ← A + w (A_batch − A),  w = (1 − β)/(1 − βᵏ)       bias-corrected average; P likewise
    (7)  P_batch = N Σ ĝ ĝᵀ under a loss that is a mean of N terms; ĝ: what backward() delivers
    (8)  expand: A_batch = Σ_{n,t} a aᵀ / (B S),  P_batch = N Σ_{n,t} ĝ ĝᵀ
         reduce: A_batch = Σ_n m mᵀ / B,  P_batch = N Σ_n h hᵀ,  m = Σ_t a / S,  h = Σ_t ĝ
    (9)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

    symbol   in code                     shape
    G        G                           (blocks, out/blocks, d); d = C/groups·kh·kw (+ 1 for bias);
                                         one block per group of a convolution
    A, P     state "covariance",         (blocks, d(d+1)/2), (blocks, ·): lower triangles by rows
             "output_covariance"
    Cholesky factors of (3): "factor", "output_factor"           (blocks, d, d), (blocks, ·, ·)
    Q, v     "vectors", "values", "output_vectors", "output_values"
    N        loss_terms                  from calls of the model, or a number
    λ, β, κ  damping, stat_decay, kl_clip  numbers;  k: state "updates";  η, μ: lr, momentum
    n, t     samples and what shares the weight within one: tokens, positions; B, S: how many

WHY (2). One term of the loss has the weight gradient g aᵀ, and vec(g aᵀ) = a ⊗ g (vec stacks
columns; flatten() in `plain` stacks rows, and there it is g ⊗ a).
The Fisher matrix is the second moment of these: F = E[(a ⊗ g)(a ⊗ g)ᵀ] = E[a aᵀ ⊗ g gᵀ].
If inputs were independent of output gradients, the mean of the product were the product of means.
(With labels drawn from the model they are, in a linear network with squared loss. With training
labels g has the residual in it, which depends on a. Else cumulants of (a, a, g, g) are lost: MG2.)
A is d×d and P out×out, where F is (d·out)×(d·out), and (A ⊗ P)⁻¹ vec(G) = vec(P⁻¹ G A⁻¹).

WHY (4). Q_A ⊗ Q_P diagonalises A ⊗ P, with the products of v_A and v_P for eigenvalues.
So (4) is (A ⊗ P + λI) vec(G̃) = vec(G), solved exactly.

WHY (3). It solves with (A + π√λ I) ⊗ (P + √λ/π I) = A ⊗ P + λI + (√λ/π) A ⊗ I + π√λ I ⊗ P.
The last two, the cross terms, are not asked for. They have traces (√λ/π) out·tr A and π√λ d·tr P.
The sum of these is least where they are equal, and that is π² of (3).
With α = tr A / d and γ = tr P / out, the mean eigenvalues, A + π√λ I = α (A/α + rI), r = √(λ/(αγ)),
and P + √λ/π I = γ (P/γ + rI): relative to its mean eigenvalue each factor is damped by the same r.
At r ≫ 1 the step is the gradient's. (3) and (4) differ at equal λ, for the cross terms are not
small: FOOF's paper holds them to be why K-FAC works.

WHERE IT HOLDS. After 50 steps with the published settings (ResNet-20, CIFAR-10 as JPEG, batch 64,
λ = 0.03) r is 0.4 in the classifier and 0.8 to 15 in the convolutions; the cosine of a layer's step
with that of plain momentum is 0.41 to 0.90, median 0.83; the loss is 1.94, and 2.08 where each
layer's step is plain momentum's, as long: `python analyze.py effect --optim kfac --dataset cifar10
--steps 50`.

WHY (5). The KL divergence between the model before and after a step −ηG̃ is about ½η²⟨G̃, FG̃⟩: it
is zero and least at the step zero, and F is its second derivative there.
(4) is FG̃ = G − λG̃ for F = A ⊗ P, hence ⟨G̃, FG̃⟩ ≤ ⟨G̃, G⟩, and so it is with (3).
A factor ν multiplies the divergence by ν². So (5) keeps it below κ/2. Not counted are momentum,
weight decay and the parameters of the plain step.

WHICH FISHER. 'sampled' is the Fisher: labels drawn from the model's own prediction, so one more
backward pass from the logits to the layers' outputs. 'empirical' takes the g of the training
labels, which backward() brings anyway: another matrix, that vanishes as the labels are fitted.

WHY (8). S tokens or positions t use one weight: sample n has the gradient Σ_t g aᵀ.
'expand' drops the products of different t: Σ_t a aᵀ ⊗ g gᵀ, which by (2) is (mean over t of a aᵀ) ⊗
(sum over t of g gᵀ). This is exact in a linear network where each position has its own loss.
'reduce' takes Σ_t g aᵀ for (Σ_t g) mᵀ, exact where the g of a sample are equal, as they are where
outputs are averaged right after the layer.

WHY (7). Under a mean loss ĝ = g/N. With micro-batches (each loss weighted by its share) ĝ = g/N
too, N the terms of all. DDP averages gradients over D ranks, so a rank's ĝ is D g/N, and P_batch =
(N/D²) Σ ĝ ĝᵀ. A GradScaler's scale is divided out, which torch hands over; after unscale_() it does
not, so that step() asks for KFAC(grad_scaler=scaler).

HOW MANY TERMS. P, and with it what λ means, is proportional to N; calls.py tells how it is counted.
Not seen: several forward passes before the first backward pass under reentrant activation
checkpointing (the last is counted alone); targets that are ignored or masked (ignore_index,
padding, weights); losses over some of the tokens; a sum in place of a mean. Then set
optimizer.loss_terms before step() to the number of terms that were averaged on this rank since
zero_grad(), as int((y != -100).sum()); 1 for a sum. step() raises and asks for the number where
calls contradict: no batch dimension, or not the first one; several calls behind one backward pass,
which may be added or averaged. Losses of one forward pass that are backpropagated one after the
other (retain_graph=True) count as independent: P gains Σ ĝ₁ĝ₁ᵀ + Σ ĝ₂ĝ₂ᵀ, without the products of
ĝ₁ and ĝ₂ that backward() of their sum brings. Add losses first if they share layers.

COST per layer: statistics R·(d² + out²) to twice that for R rows every tcov steps, factors
(d³ + out³)/3 every tinv steps (eigen: about ten times that), application 2·out·d·(d + out) per step
(eigen twice that), state 1.5·(d² + out²) numbers. Ranks divide the factorisations. For 'expand' on
a convolution with stride and dilation 1, odd kernel and "same" padding by zeros only the patches at
the image's edges are formed, for 'reduce' on any none: covariance.py, shift_gram; patches.py,
patch_sum. Else patches are copied, in chunks.

THROWN AWAY: what couples layers; all correlation of inputs with output gradients; with 'expand',
that of positions with each other. Norm layers, embeddings and weights tied to one, recurrent
layers, transposed, 1-D and 3-D convolutions, computed weights, and nn.MultiheadAttention take the
plain step (its q, k, v would be blocks of one weight if `kinds` held "projection").

DEPARTURES. Not taken from Martens and Grosse: the block-tridiagonal inverse (§4.3); the rescaled
step (§6.4) and the adaptation of λ (§6.5), in whose place the KL clip stands; a separate damping of
the factors (§6.6: here √λ); momentum from the quadratic model (§7: here torch's). They add the L2
coefficient to λ (§6.3); here wd joins after the solve. Their average weighs the past by
min(1 − 1/k, 0.95); (6) corrects for its start at zero.

ERRATA, against released implementations (the baselines of later papers), in which
 - P_batch is the mean of ĝ ĝᵀ, 1/N² of (7), so r depends on the batch size, and with λ = 0.03 K-FAC
   is a scaled SGD; others divide A and P by the positions twice;
 - one `stat_decay` weighs the new batch in K-FAC and the old average elsewhere; damping is added in
   place to the running factor; averages begin at the identity; the KL clip uses the first lr only;
 - "K-FAC" with spatially averaged factors ('reduce' with P short of S²) carries no label;
 - most repeat all factorisations on all ranks, or let statistics differ among ranks.

USAGE
    optimizer = KFAC(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    # optimizer.sample_fisher(logits)                                   with fisher='sampled'
    loss.backward()
    optimizer.step()
"""
from math import inf

import torch
import torch.distributed as dist
import torch.nn.functional as F

from calls import Call, Calls, check_terms, count_terms
from covariance import (damped_cholesky, eigenbasis, gram, input_covariance, mean_eigenvalue, pack,
                        pixel_gram, side, solve_right, unpack)
from optimizer import PreconditionedSGD
from patches import patch_sum
from pooling import world_size
from precision import at_least_float32, full_precision

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) are factored at a time


def plain(weights, steps, lr=0.1, momentum=0.9, weight_decay=0.0, damping=0.03, stat_decay=0.95,
          tcov=5, tinv=50, inverse="factored", kl_clip=1e-3):
    """The method on weights W (out, d), formula by formula; returns them after the steps.

    steps: for each step a function of the weights that returns N and, for each W, X (R, d), the
    rows that met it (a last column of ones for a bias), and Ĝ (R, out), the gradients by X Wᵀ.
    """
    λ, β, κ, μ, η = damping, stat_decay, kl_clip, momentum, lr
    A, P, M, solve, k = ([0] * len(weights) for _ in range(5))
    for t, step in enumerate(steps):
        N, rows = step(weights)
        G = [Ĝ.T @ X for X, Ĝ in rows]
        for i, (X, Ĝ) in enumerate(rows):
            if t % tcov == 0:
                k[i] += 1
                w = (1 - β) / (1 - β ** k[i])                              # (6)
                A[i] = A[i] + w * (X.T @ X / len(X) - A[i])                # (1), (8)
                P[i] = P[i] + w * (N * Ĝ.T @ Ĝ - P[i])                     # (7)
            if t % tinv == 0:
                eye_A, eye_P = torch.eye(len(A[i])).to(X), torch.eye(len(P[i])).to(X)
                π = (A[i].trace() / len(A[i]) / (P[i].trace() / len(P[i]))).sqrt()
                solve[i] = torch.linalg.inv(
                    torch.kron(P[i] + λ ** 0.5 / π * eye_P, A[i] + π * λ ** 0.5 * eye_A)  # (3)
                    if inverse == "factored" else
                    torch.kron(P[i], A[i]) + λ * torch.kron(eye_P, eye_A))                # (4)
        U = [(solve[i] @ G[i].flatten()).view_as(G[i]) for i in range(len(G))]
        ν = min(1, (κ / sum(η ** 2 * (u * g).sum() for u, g in zip(U, G))) ** 0.5)        # (5)
        M = [μ * m + ν * u + weight_decay * W for m, u, W in zip(M, U, weights)]
        weights = [W - η * m for W, m in zip(weights, M)]                                 # (9)
    return weights


# ---- statistics ----

def input_gram(use, bias, reduce):
    """(8)  Σ a aᵀ or Σ m mᵀ over the rows of a use, packed, and how many there were."""
    if not reduce:
        return input_covariance(use, bias), use.rows
    x = use.x.to(at_least_float32(use.x))
    if use.kind == "conv":
        m = patch_sum(x, use.geometry) / (use.shape[2] * use.shape[3])     # (B, groups, d)
    else:
        m = by_sample(x, use).mean(1, keepdim=True)                        # (B, 1, d)
    m = F.pad(m, (0, 1), value=1.0) if bias else m
    return pack(gram(m.permute(1, 2, 0))), len(m)


def output_gram(g, use, size, reduce):
    """(8)  Σ ĝ ĝᵀ or Σ h hᵀ of a use's output gradients, packed, in blocks of `size` outputs."""
    g = g.to(at_least_float32(g))
    if use.kind == "conv":
        return pack(pixel_gram(g.sum((2, 3), keepdim=True) if reduce else g, use.geometry.groups))
    g = by_sample(g, use).sum(1) if reduce else g.reshape(-1, g.shape[-1])
    return pack(gram(g.mT.unflatten(0, (-1, size))))                       # of (blocks, size, R)


def by_sample(rows, use):
    """(B, S, ·): the rows of each sample. Of two-dimensional inputs each row is a sample."""
    if use.batch is not None:                                # (positions, batch), however flattened
        return rows.reshape(-1, use.batch, rows.shape[-1]).transpose(0, 1)
    return rows.flatten(1, -2) if rows.dim() > 2 else rows.reshape(-1, 1, rows.shape[-1])


def draw_labels(logits):
    """(1)  One label per row of logits (N, classes), from softmax(logits).

    argmax of p/E, with E exponential, has the law p. Unlike torch.multinomial it lets a nan pass,
    which step() reports with the layer's name, or which a GradScaler skips.
    """
    p = logits.softmax(1)
    return (p / torch.empty_like(p).exponential_()).argmax(1)


# ---- the inverse ----

def dampings(A, P, damping):
    """(3)  π√λ and √λ/π for packed A and P (blocks, ·), one per block; π = 1 where a trace is 0."""
    a, p = mean_eigenvalue(A), mean_eigenvalue(P)
    pi = torch.where((a > 0) & (p > 0), a.sqrt() / p.sqrt(), 1.0)          # a / p may overflow
    return pi * damping ** 0.5, damping ** 0.5 / pi


def solve_factored(G, factor, output_factor):
    """(3)  (L' L'ᵀ)⁻¹ G (L Lᵀ)⁻¹ with A + π√λ I = L Lᵀ and P + √λ/π I = L' L'ᵀ."""
    return solve_right(solve_right(G, factor).mT, output_factor).mT


def solve_eigen(G, vectors, values, output_vectors, output_values, damping):
    """(4)"""
    rotated = output_vectors.mT @ G @ vectors
    rotated = rotated / (output_values.unsqueeze(-1) * values.unsqueeze(-2) + damping)
    return output_vectors @ rotated @ vectors.mT


def kl_scale(inner, kl_clip):
    """(5)  ν from the η²⟨G̃, G⟩ of all layers, without a look at the number on the CPU.

    Sorted, so that the order of parameter groups does not change the rounding.
    """
    total = torch.cat(inner).sort().values.sum().clamp(min=0)
    return (kl_clip / total).sqrt().clamp(max=1.0)


def shares(costs, world):
    """Whose each job is: the longest first, to the rank that has least to do so far."""
    load, owners = [0.0] * world, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = load.index(min(load))
        load[owners[job]] += costs[job]
    return owners


class KFAC(PreconditionedSGD):
    __doc__ = f"""{PreconditionedSGD.__doc__}
    damping is λ: large is SGD with lr/λ, small the natural gradient of each layer.
    fisher: 'empirical', gradients of the ordinary backward pass; 'sampled', of labels drawn by
        sample_fisher(logits), which is to be called before every loss.backward().
    inverse: 'factored' (3) or 'eigen' (4).   weight_sharing: 'expand' or 'reduce' (8), which needs
        as many samples first in a layer's input as in the model's; else it takes the plain step.
    loss_terms: the loss is a mean over 'samples', over 'tokens' (all positions of all samples), or
        over this number of terms, on this rank, in all backward passes of a step; an attribute that
        may change from step to step. (With fisher='sampled' the rows of the logits are the terms.)
    kl_clip (κ): the bound of (5), with each group's current lr; None for no bound.
    grad_scaler: the torch.amp.GradScaler in use; needed if its unscale_() is called before step().
    """

    kinds = dict(linear="Kronecker factors", conv="Kronecker factors")
    needs_gradients = True
    failure = ("the covariances of layer {name} with damping {damping} are not positive definite "
               "to rounding; raise damping")

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=0.03, stat_decay=0.95,
                 tcov=5, tinv=50, fisher="empirical", inverse="factored", weight_sharing="expand",
                 loss_terms="samples", kl_clip=1e-3, grad_scaler=None, maximize=False, foreach=None,
                 fused=None):
        for name, value, choices in (("fisher", fisher, ("empirical", "sampled")),
                                     ("inverse", inverse, ("factored", "eigen")),
                                     ("weight_sharing", weight_sharing, ("expand", "reduce"))):
            if value not in choices:
                raise ValueError(f"KFAC: {name} must be one of {choices}, got {value!r}")
        if kl_clip is not None and not 0 < kl_clip < inf:
            raise ValueError(f"KFAC: kl_clip must be a positive number or None, got {kl_clip}")
        check_terms(loss_terms)
        self.fisher, self.inverse, self.reduce = fisher, inverse, weight_sharing == "reduce"
        self.loss_terms, self.kl_clip, self.grad_scaler = loss_terms, kl_clip, grad_scaler
        super().__init__(locals())
        # a GradScaler then hands its scale over, and leaves it to step() to skip
        self._step_supports_amp_scaling = grad_scaler is None

    def find_layers(self):
        self.sequence_first = any(getattr(module, "batch_first", True) is False
                                  for module in self.model.modules())
        super().find_layers()

    def set_up(self, layer):
        n, layer.measured, layer.prepared = layer.blocks, {}, {}
        for prefix, d in (("", layer.d), ("output_", layer.out // n)):
            layer.measured[prefix + "covariance"] = n, d * (d + 1) // 2
            layer.prepared |= {prefix + "factor": (n, d, d)} if self.inverse == "factored" else {
                prefix + "vectors": (n, d, d), prefix + "values": (n, d)}

    # ---- statistics ----

    def begin_step(self):
        super().begin_step()
        self.watcher.calls = Calls()
        self.tape = []                # the outputs whose gradients sample_fisher() is to take

    def measure(self, layer, use):
        use.call = self.watcher.calls.current
        inputs = [shape for shape, _ in use.call.inputs]
        if inputs and len(inputs[0]) == use.out.dim() == (3 if use.kind == "conv" else 1):
            use.call.batched = False
        if self.sequence_first and use.batch is None and use.x.dim() == 3:
            samples = {shape[0] for shape in inputs}
            if use.x.shape[1] in samples and len(use.x) not in samples:
                use.batch = use.x.shape[1]
        if self.reduce and inputs and use.batch is None and use.call.batched and \
                len(use.x) not in {shape[0] for shape in inputs}:
            self.watcher.contradict(layer, "weight_sharing='reduce' needs its samples first")
            return {}, 0
        if self.fisher == "sampled":
            use.drawn = None
            if torch._C._current_graph_task_id() == -1:      # else an activation checkpoint's rerun
                out = use.out._base if use.out._is_view() else use.out
                self.tape.append((torch.autograd.graph.get_gradient_edge(out), layer, use))
        A, use.rows = input_gram(use, layer.bias is not None, self.reduce)                  # (1)
        return {"covariance": A}, use.rows

    def add_gradient(self, layer, use, grad):
        layer.calls.add((use.call, layer.backward))
        if self.fisher == "sampled":
            P = use.drawn
        else:
            if self.grad_scaler is not None:   # before squaring, where a scaled gradient overflows
                if use.call.scale is None:
                    use.call.scale = self.grad_scaler.get_scale()
                grad = grad.to(at_least_float32(grad)) / use.call.scale
            P = output_gram(grad, use, layer.out // layer.blocks, self.reduce)              # (1)
        if P is not None:
            layer.add("output_covariance", P, use.rows, use.blocks)

    def numbers_to_sum(self):
        """N of this rank, and whether it is not known: then all raise, and none waits."""
        try:
            terms, self.error = self.count_terms(), None
        except (RuntimeError, ValueError) as error:
            terms, self.error = 0, error
        return [terms, self.error is not None]

    def summed_numbers(self, totals):
        terms, failed = totals
        if failed:
            raise self.error or RuntimeError("KFAC: another rank does not know how many terms its "
                                             "loss has, and tells why")
        terms = terms or 1                       # of zeros, where a mean has no terms
        self.share = terms if self.fisher == "sampled" else \
            (self.scale * world_size()) ** 2 / terms                                       # (7)

    def divisors(self, layer, name, rows):
        return rows if name == "covariance" else [self.share if n else 0 for n in rows]

    def count_terms(self):
        """N of this rank; RuntimeError if it is not known."""
        layers = [layer for layer, _ in self.grouped() if layer.calls]
        if self.fisher == "empirical":
            return count_terms(layers, self.loss_terms, self.sequence_first)
        for layer in layers:
            _, drawn = layer.pending.get("output_covariance", (None, None))
            if drawn != layer.pending["covariance"][1]:
                raise RuntimeError(
                    "KFAC: fisher='sampled' needs sample_fisher(logits) before each "
                    "loss.backward(), and activation checkpointing with use_reentrant=False")
        return sum(call.terms for call in {call for layer in layers for call, _ in layer.calls})

    def sample_fisher(self, logits):
        """Sample the labels of (1) from softmax(logits), and take the output gradients they give.

        logits (N, classes) or (B, S, classes), from the forward pass that loss.backward() follows;
        one loss term for each row of them. It changes no .grad and keeps the graph; does nothing if
        no layer's statistics are due in this step. Draws from torch's global generator.

        In a step whose statistics are due, each forward pass with gradients is kept until it comes
        here, or until step(): make passes for anything else (rollouts) under torch.no_grad().
        """
        if self.fisher != "sampled":
            raise RuntimeError("KFAC: sample_fisher() needs fisher='sampled'")
        if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
            raise ValueError(
                f"KFAC: sample_fisher() takes logits (N, classes) or (B, S, classes), got "
                f"{tuple(logits.shape)}. Of images (B, classes, H, W) give logits.movedim(1, -1)"
                ".flatten(0, -2); of one logit z a sample, torch.stack([0 * z, z], -1)")
        if not self.tape:
            return
        logits = logits.flatten(0, -2)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(at_least_float32(logits))
            loss = F.cross_entropy(logits, draw_labels(logits.detach()), reduction="sum")
        self.ignores_gradients = True
        try:
            grads = torch.autograd.grad(loss, [edge for edge, *_ in self.tape], retain_graph=True,
                                        allow_unused=True)
        finally:
            self.ignores_gradients = False
        # the calls that the logits came from; outputs of theirs that do not reach the logits have 0
        calls = {use.call for (_, _, use), grad in zip(self.tape, grads) if grad is not None}
        draw, left = Call(len(logits)), []
        for (edge, layer, use), grad in zip(self.tape, grads):
            if use.call not in calls:
                left.append((edge, layer, use))
                continue
            grad = logits.new_zeros(()).expand(use.shape) if grad is None else grad
            with torch.no_grad(), full_precision(grad.device.type):
                use.drawn = output_gram(grad.reshape(use.shape), use, layer.out // layer.blocks,
                                        self.reduce)
            use.call = draw
        self.tape = left

    # ---- the step ----

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):
        """Statistics, refresh, precondition, momentum-SGD step. Afterwards p.grad is raw again."""
        found_inf, scale = (vars(self).pop(name, None) for name in ("found_inf", "grad_scale"))
        self.scale = 1.0 if scale is None else scale.item()
        if found_inf is None:
            return super().step(closure)
        if found_inf:
            for layer in self.layers.values():
                layer.drop()
        elif scale is None and self.fisher == "empirical":
            raise RuntimeError("KFAC: after unscale_() a GradScaler does not tell its scale, which "
                               "the statistics need: give KFAC(..., grad_scaler=scaler)")
        else:
            for p in (p for group in self.param_groups for p in group["params"]):
                if p.grad is not None:
                    p.grad.mul_(1 / self.scale)
            super().step(closure)
        self.found_inf = self.grad_scale = None                 # the scaler will delete them

    def prepare_all(self, parts):
        """(3) or (4): what each list of layers of one shape, with its damping, is to apply.

        A job is one side of such a list. Ranks divide the jobs among them.
        """
        jobs = []                          # (covariances, packed, and what damps each)
        for layers, damping in parts:
            A, P = self.gathered(layers, ("covariance", "output_covariance")).values()
            jobs += zip((A, P), dampings(A, P, damping))
        owners = shares([len(A) * side(A) ** 3 for A, _ in jobs], world_size())
        rank = dist.get_rank() if world_size() > 1 else 0
        results = self.factored(jobs, [job for job, owner in enumerate(owners) if owner == rank])
        if world_size() > 1:
            for job, owner in enumerate(owners):
                results[job] = self.broadcast(jobs[job][0], owner, results.get(job))
        for i, (layers, damping) in enumerate(parts):
            (*inner, failed), (*outer, failed_too) = results.pop(2 * i), results.pop(2 * i + 1)
            failed = failed.bool() | failed_too.bool()
            if self.inverse == "eigen":    # λ must not vanish beside the largest eigenvalue
                largest = inner[1].amax(1) * outer[1].amax(1)
                failed = failed | (damping < torch.finfo(largest.dtype).eps * largest)
            yield dict(zip(layers[0].prepared, inner + outer)), failed

    def factored(self, jobs, mine):
        """{job: its tensors and, per block, whether it failed} for the jobs in mine; matrices of
        one size together."""
        alike, room, results = {}, {}, {}
        for job in mine:
            A, _ = jobs[job]
            kind = side(A), A.dtype, A.device
            room[kind] = room.get(kind, 0) + len(A) * side(A) ** 2
            alike.setdefault((kind, room[kind] // CHUNK), []).append(job)
        for some in alike.values():
            A = unpack(torch.cat([jobs[job][0] for job in some]))
            damping = torch.cat([jobs[job][1] for job in some])
            found = damped_cholesky(A, damping) if self.inverse == "factored" else eigenbasis(A)
            blocks = [len(jobs[job][0]) for job in some]
            results |= zip(some, zip(*(x.split(blocks) for x in found)))
        return results

    def broadcast(self, A, owner, found):
        """A job's result, from its owner to all ranks."""
        n, d = len(A), side(A)
        shapes = [(n, d, d), (n,)] if self.inverse == "factored" else [(n, d, d), (n, d), (n,)]
        found = [A.new_empty(shape) for shape in shapes] if found is None else \
            [x.to(A.dtype).contiguous() for x in found]
        for x in found:
            dist.broadcast(x, owner)
        return found

    def apply(self, G, damping, **prepared):
        return solve_factored(G, **prepared) if self.inverse == "factored" else \
            solve_eigen(G, damping=damping, **prepared)                                 # (3), (4)

    def rescale(self, found):
        """(5)"""
        if self.kl_clip is None or not found:
            return
        rates = {layer: float(group["lr"]) for layer, group in self.grouped()}
        inner = []
        for layers, G, new in found:
            products = (new * G).view(len(layers), -1).sum(1)
            torch._foreach_mul_(products.split(1), [rates[layer] ** 2 for layer in layers])
            inner.append(products.to(found[0][1]))
        scale = kl_scale(inner, self.kl_clip)
        for _, _, new in found:
            new.mul_(scale.to(new.device))
