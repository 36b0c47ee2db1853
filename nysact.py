"""NysAct: Nyström-approximated activation covariance, all of it in this one file.

Seung, Lee, Ko. "NysAct: A Scalable Preconditioned Gradient Descent using Nyström Approximation".
arXiv 2506.08360, IEEE BigData 2024.  (Numbers in parentheses are this file's own.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ],  F ≈ A ⊗ I              FOOF's Fisher block: K-FAC's A ⊗ P with P = I
    (2)  G̃ = G (Â + ρI)⁻¹ = (G − (G U) diag(λ̂/(λ̂ + ρ)) Uᵀ) / ρ,   Â = U diag(λ̂) Uᵀ
    (3)  A_batch S = Xᵀ(X S)/R                sketch: S (d, r) drawn once, A is never formed
    (4)  Y ← Y + w (A_batch S − Y),  w = (1 − β)/(1 − βᵏ)     bias-corrected moving average
    (5)  Y_ν = Y + νS,  L Lᵀ = Sᵀ Y_ν,  U Σ Vᵀ = Y_ν L⁻ᵀ,  λ̂ = max(Σ² − ν, 0)
    (6)  layers with d ≤ r: G̃ = G (A + ρI)⁻¹, exactly
    (7)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

WHY NYSTRÖM. Â = (AS)(SᵀAS)⁻¹(AS)ᵀ needs A only through A S, r columns instead of d. With H = A^½
and P the projection on range(HS), Â = H P H: hence 0 ⪯ Â ⪯ A, Â S = A S, and Â = A where A has rank
≤ r (and S meets it). So (Â + ρI)⁻¹(A + ρI) has no eigenvalue below 1: no direction is damped more
than its curvature asks. P, hence Â, depends on range(S) alone; orthonormal columns serve rounding.
By linearity the average of A_batch S is (average of A)·S, provided that S stays the same.

WHY THE SHIFT, AND L⁻ᵀ. In rounding SᵀAS need not be positive definite: at rank(A) < r it is
singular. (5) is Nyström for A + νI, on both sides, (A + νI)S = Y_ν; with L Lᵀ = Sᵀ Y_ν and
B = Y_ν L⁻ᵀ, B Bᵀ = Y_ν (L Lᵀ)⁻¹ Y_νᵀ. (B = Y_ν L⁻¹ would give (Lᵀ L)⁻¹, another matrix.) The
thin SVD of B has the eigenvectors U and eigenvalues Σ² of B Bᵀ without squaring B; subtracting ν
takes the shift back. ν must be tiny, at the level of rounding: a direction is lost unless λ ≫ ν.

WHY (2). U has orthonormal columns: (Â + ρI)⁻¹ = U diag(1/(λ̂ + ρ)) Uᵀ + (I − U Uᵀ)/ρ, which is 1/ρ
away from U; and 1/ρ − 1/(λ̂ + ρ) = (1/ρ) λ̂/(λ̂ + ρ). Times ρ it is MAC's multiplier, with
U diag(λ̂) Uᵀ for ā āᵀ (take U = ā/‖ā‖, λ̂ = ‖ā‖²); at ρ = 1, in all published settings, both agree.

WHY CONVOLUTIONS NEED NO PATCHES. A row of X is a patch; X S is its product with the r columns of S,
so a convolution with r filters; and Xᵀ(X S) pairs each tap with these outputs over batch and
positions, which is that convolution's weight gradient for the output gradient X S.

WHAT RANK COSTS. Let A = λvvᵀ + σI, one outlier over a flat rest. S catches s = ‖Sᵀv‖² ≈ r/d of v:
vᵀÂv = (λ + σ)²s/(λs + σ) ≈ λ/(1 + σd/(λr)): outliers with λ ≫ σd/r are seen in full. A direction
that is missed takes the step 1/ρ, too long by (λ + ρ)/ρ, so the rank must reach to where λ ≲ ρ.

    symbol   in code              shape
    G        grad, bias_grad      (out, d), (out,); d = C/groups·kh·kw in convolutions, + 1 for bias
    S        layer.sketch()       (blocks, d, r): a block per group of a convolution, three for qkv;
                                  drawn from seed and the weight's place in the model
    Y        state "sketched"     (blocks, d, r)
    U, λ̂     state "U", "eigenvalues"    (blocks, d, r), (blocks, r), renewed every tinv steps
    A, its Cholesky factor        state "covariance", "factor": (blocks, d, d), where d ≤ r
    ρ, β, r  damping, stat_decay, rank   scalars;  k: state "updates";  η, μ: lr, momentum
    R        rows                 B (linear), B·N (tokens), B·oH·oW (patches)

COST per layer: statistic 4R·d·r every tcov steps, (5) O(d·r² + r³) every tinv steps, application
4·out·d·r per step, state 2d·r + r numbers; S, d·r more, is drawn again rather than saved. No d×d
matrix where d > r, and no patch: X S has r numbers per row.

THROWN AWAY: what A does outside r directions, and all of P.

DEPARTURES from the paper, as far as it is known: S orthonormal, not N(0, 1/d); ν tiny, on both
sides; β's correction counts the updates of the average (⌊t/tcov⌋ would divide by zero at first).

ERRATA, against the authors' released code, which
 - solves with L on the wrong side, (Lᵀ L)⁻¹ for (L Lᵀ)⁻¹: eigenvalues off by factors, λ̂ > λ₁(A);
 - draws a new S at each update of an average, which then mixes products with many matrices while
   (5) uses the last: Gaussian ones cancel, Y shrinks; here S is drawn once;
 - shifts SᵀAS only, by more than ρ, and subtracts that from Σ²: λ̂ = 0 unless λ·r/d ≳ 3ρ. With the
   published ρ = 1 a third of a ResNet-20's layers are plain SGD after 100 steps;
 - takes the full SVD, d×d, and stores the inverse as a d×d matrix per layer; (2) needs d×r;
 - keeps each rank's statistics, and random S, to itself; here one S, and sums are all-reduced;
 - counts steps in step() but averages in the hook, so micro-batches and skipped steps bias Y;
 - loses its state on resume, fails in half precision, ignores dilation and padding modes, and
   breaks on grouped convolutions.

USAGE
    optimizer = NysAct(model, lr=0.1, momentum=0.9, weight_decay=5e-4)  # before torch.compile runs
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""
import inspect
import warnings
import weakref
from contextlib import contextmanager
from itertools import accumulate
from math import isfinite

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of X S at a time
STACK = 2 ** 20  # layers are joined up to this many numbers; beyond, their work outweighs launches


# ---------------------------------------------------------------------------------------------
# 1. The mathematics
# ---------------------------------------------------------------------------------------------

def precondition(grad, bias_grad, U, eigenvalues, damping):
    """(2)  G̃ = (G − (G U) diag(λ̂/(λ̂ + ρ)) Uᵀ) / ρ, without forming [W | b] or any matrix but G̃.

    grad (out, ...) and bias_grad (out,) or None are split into the blocks of U (blocks, d, r) and
    eigenvalues (blocks, r); U = [V; u], where u (1, r) is the bias coordinate. GU = G_W V + g_b u;
    with T = GU diag(λ̂/(λ̂ + ρ)) then (G_W − T Vᵀ)/ρ and (g_b − T uᵀ)/ρ.
    """
    G = grad.unflatten(0, (len(U), -1))                       # (blocks, out/blocks, ...)
    d = G.shape[2:].numel()
    V, u = U[:, :d], U[:, d:]                                 # (blocks, d, r), (blocks, 1 or 0, r)
    T = G.flatten(2) @ V                                      # (blocks, out/blocks, r), G_W V
    if bias_grad is not None:
        T = T + bias_grad.view(len(U), -1, 1) * u
    T = T * (eigenvalues / (eigenvalues + damping)).unsqueeze(1)          # (2)
    # G comes first, so that G̃ keeps the memory layout (channels_last or not) of G
    new_grad = (G - (T @ V.mT).view(G.shape)).div_(damping)
    new_bias = None if bias_grad is None else (bias_grad - (T @ u.mT).flatten()) / damping
    return new_grad.flatten(0, 1), new_bias


def precondition_exact(grad, bias_grad, factor):
    """(6)  G̃ = G (A + ρI)⁻¹ = G L⁻ᵀ L⁻¹ with factor = L (blocks, d, d), A + ρI = L Lᵀ."""
    blocks = len(factor)
    G = grad.reshape(blocks, len(grad) // blocks, -1)         # (blocks, out/blocks, d)
    if bias_grad is not None:
        G = torch.cat([G, bias_grad.view(blocks, -1, 1)], 2)
    G = solve_right(G, factor)
    new_bias = None if bias_grad is None else G[:, :, -1].contiguous().flatten()
    G = G if bias_grad is None else G[:, :, :-1]
    return torch.empty_like(grad).copy_(G.reshape(grad.shape)), new_bias


def solve_right(G, L):
    """G (L Lᵀ)⁻¹ (..., out, d): Y Lᵀ = G, then Z L = Y; from the left, G would be transposed."""
    Y = torch.linalg.solve_triangular(L.mT, G, upper=True, left=False)
    return torch.linalg.solve_triangular(L, Y, upper=False, left=False)


def damped_cholesky(A, damping):
    """L with L Lᵀ = A + ρI for A (blocks, d, d) ⪰ 0, and per block whether rounding forbade it.

    A ρ that vanishes beside A's trace, hence maybe beside λ₁(A), would leave the size of the step
    in A's null space to rounding errors, even where the factorisation goes through.
    """
    lost = damping < torch.finfo(A.dtype).eps * A.diagonal(dim1=-2, dim2=-1).sum(-1)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    L, info = torch.linalg.cholesky_ex(A + damping * eye)
    return L, lost | (info != 0)


def nystrom(Y, S):
    """(5)  U (blocks, d, r), λ̂ (blocks, r) with U diag(λ̂) Uᵀ = Y (SᵀY)⁻¹ Yᵀ; is each well?

    Y = A S for some A ⪰ 0, S (blocks, d, r) orthonormal. ν = √d·ε·‖Y‖ bounds the usual rounding of
    Y. Since SᵀY = SᵀAS would be symmetric and ⪰ 0, its asymmetry and its negative eigenvalues show
    the actual rounding (of columns of A, 'subcolumns', only the second), and ν is no less than
    that; far larger, they show that Y belongs to another S.
    """
    finite = torch.finfo(Y.dtype)
    W = S.mT @ Y                                                          # (blocks, r, r)
    size, asymmetry = (torch.linalg.matrix_norm(x, keepdim=True) for x in (Y, W - W.mT))
    # r×r, in float64: float32 LAPACK gives up on some matrices with many zeros. MPS has no float64
    lowest = torch.linalg.eigvalsh(((W + W.mT) / 2).nan_to_num(0, 0, 0).cpu().double())
    lowest = lowest[:, :1, None].to(W)
    rounding = torch.maximum(asymmetry, -2 * lowest)
    shift = torch.maximum(Y.shape[1] ** 0.5 * finite.eps * size, 2 * rounding)
    shift = shift.clamp(min=finite.tiny ** 0.5)                           # (blocks, 1, 1): ν > 0
    Y = Y + shift * S                                                     # (5)  Y_ν
    W = S.mT @ Y
    L, info = torch.linalg.cholesky_ex((W + W.mT) / 2)                    # (5)  L Lᵀ = Sᵀ Y_ν
    B = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)    # (5)  Y_ν L⁻ᵀ
    well = (info == 0) & (rounding <= 1e-3 * size).flatten() & B.isfinite().all(2).all(1)
    # thin, and of zeros where B is not finite: svd would raise without the layer's name
    U, sigma, _ = torch.linalg.svd(B.nan_to_num(0, 0, 0), full_matrices=False)
    return U, (sigma.square() - shift.squeeze(2)).clamp(min=0), well


def draw_sketch(blocks, d, r, kind, seed):
    """S (blocks, d, r) of (3) with SᵀS = I, in float64 on the CPU: the same for every device.

    'gaussian': the orthonormalised columns of a Gaussian matrix. 'subcolumns': r distinct columns
    of the identity, so that A S is r columns of A. r = d: the identity, and A S is A.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if r < d and kind == "gaussian":
        return torch.linalg.qr(torch.randn(
            blocks, d, r, generator=generator, dtype=torch.float64, device="cpu"))[0]
    columns = [torch.arange(d, device="cpu") if r == d else
               torch.randperm(d, generator=generator, device="cpu")[:r] for _ in range(blocks)]
    S = torch.zeros(blocks, d, r, dtype=torch.float64, device="cpu")
    return S.scatter_(1, torch.stack(columns)[:, None], 1.0)              # one 1 in each column


def running_mean(old, batch, updates, stat_decay):
    """(4)  The bias-corrected averages after `updates` batches, in place on all of old.

    With m_k = β m_{k−1} + (1 − β) x_k, m_0 = 0, the corrected m̂_k = m_k/(1 − βᵏ) satisfies
    (1 − βᵏ) m̂_k = β(1 − βᵏ⁻¹) m̂_{k−1} + (1 − β) x_k = (1 − βᵏ − (1 − β)) m̂_{k−1} + (1 − β) x_k:
    m̂_k = m̂_{k−1} + w (x_k − m̂_{k−1}), so the corrected average itself is what is stored.
    """
    torch._foreach_lerp_(old, batch, (1 - stat_decay) / (1 - stat_decay ** updates))
    return old


def sketched_patches(x, conv, S):
    """(3)  Σ a (aᵀ S) over a convolution's input patches: (groups, d, r) from S (groups, d, r).

    X S is a convolution with the columns of S as filters (and its last row as their bias, where
    a ends in 1), Xᵀ(X S) its weight gradient. A bounded chunk of the batch at a time.
    """
    groups, d, r = S.shape
    n = conv.weight[0].numel()                                            # d, less the bias
    filters = S[:, :n].mT.reshape(groups * r, *conv.weight.shape[1:])
    offset = S[:, n].flatten() if d > n else None                         # (groups·r,)
    explicit = isinstance(conv.padding, str) or conv.padding_mode != "zeros"
    how = (conv.stride, 0 if explicit else conv.padding, conv.dilation, groups)
    total, chunk = 0, max(1, CHUNK // (groups * r * x.shape[-2] * x.shape[-1]))
    for part in x.split(chunk):
        part = part.to(S.dtype)
        part = pad(part, conv) if explicit else part
        XS = F.conv2d(part, filters, offset, *how)                        # (b, groups·r, oH, oW)
        AS = conv2d_weight(part, filters.shape, XS, *how).reshape(groups, r, n)     # (3)
        if offset is not None:
            AS = torch.cat([AS, XS.sum((0, 2, 3)).view(groups, r, 1)], 2)
        total = total + AS.mT
    return total


def pad(x, conv):
    """The padded input of a convolution, whatever the form of its padding; x (..., H, W)."""
    if conv.padding == "valid":
        return x
    if conv.padding == "same":       # torch puts the odd pixel at the end
        total = [dil * (k - 1) for dil, k in zip(conv.dilation, conv.kernel_size)]
        (top, bottom), (left, right) = [(t // 2, t - t // 2) for t in total]
    else:
        (top, bottom), (left, right) = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode)


def sketched_rows(x, S):
    """(3)  Σ a (aᵀ S) over all leading dimensions of x (..., n): (d, r) from S (d, r).

    d = n, or n + 1 where a = [x; 1].
    """
    n = x.shape[-1]
    X = x.reshape(-1, n).to(S.dtype)                                      # (R, n)
    XS = torch.addmm(S[n], X, S[:n]) if len(S) > n else X @ S             # (R, r)
    AS = X.mT @ XS                                                        # (3)
    return torch.cat([AS, XS.sum(0, keepdim=True)]) if len(S) > n else AS


def at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


@contextmanager
def full_precision(device_type):
    """float32 products in float32: autocast, TF32 and bf16 modes off inside.

    torch 2.9 gave each backend its own setting and forbids to read the old one once they differ.
    """
    with torch.autocast(device_type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv,
                        torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, value in zip(backends, before):
                    backend.fp32_precision = "none"      # inherited, unless that is another value
                    if backend.fp32_precision != value:
                        backend.fp32_precision = value
        else:
            before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            try:
                torch.set_float32_matmul_precision("highest")
                torch.backends.cudnn.allow_tf32 = False
                yield
            finally:
                torch.set_float32_matmul_precision(before[0])
                torch.backends.cudnn.allow_tf32 = before[1]


# ---------------------------------------------------------------------------------------------
# 2. Capture: what each kind of module gives its layers, {index: (sum over rows, rows)}
# ---------------------------------------------------------------------------------------------

def linear_or_conv(module, inputs, output, layers):
    """The rows of a Linear or Conv2d: Σ a (aᵀ S)."""
    x = next(iter(inputs.values())).detach()
    S = layers[0].sketch(x)
    if isinstance(module, nn.Linear):
        return {0: (sketched_rows(x, S[0])[None], [x.numel() // x.shape[-1]])}
    x = x if x.dim() == 4 else x[None]
    rows = len(x) * output.shape[-2] * output.shape[-1]
    return {0: (sketched_patches(x, module, S), [rows] * module.groups)}


def multihead_attention(module, inputs, output, layers):
    """The rows of nn.MultiheadAttention's projections q, k and v, each with its own input.

    Its out_proj, which it never calls as a module, takes the plain step.
    """
    found = {}
    for i, layer in layers.items():
        names = ("query", "key", "value") if layer.blocks == 3 else (("query", "key", "value")[i],)
        xs = [inputs[name].detach() for name in names]
        sums = [sketched_rows(x, S)[None] for x, S in zip(xs, layer.sketch(xs[0]))]
        found[i] = torch.cat(sums), [x.numel() // x.shape[-1] for x in xs]
    return found


class Layer:
    """One preconditioned weight: how its gradient is laid out, and this step's sums over rows."""

    def __init__(self, name, weight, bias, how, blocks=1, bias_rows=slice(None)):
        self.name, self.weight, self.how, self.blocks = name, weight, how, blocks
        self.bias, self.bias_rows = bias, bias_rows      # its part of the bias, if that is shared
        self.place = self.shape = None      # among the model's weights; (blocks, d, r)
        self.on = True             # does this step's batch count? Set by step(), read by the hooks
        self.backward = None       # the backward pass that brought the latest sums
        self.drop()

    def set_sketch(self, group):
        """Fix S. It is drawn when first needed, from numbers that a checkpoint holds."""
        d = self.weight[0].numel() + (self.bias is not None)
        self.shape = torch.Size((self.blocks, d, min(int(group["rank"]), d)))
        self.kind, self.seed = group["sketch"], int(group["seed"]) * 2 ** 20 + self.place
        self.S, self.how = None, "covariance" if self.exact else f"rank {self.shape[2]} {self.kind}"

    @property
    def exact(self):
        return self.shape[1] == self.shape[2]

    def sketch(self, x):
        """S (blocks, d, r), on the device of x and in its precision, but at least float32."""
        dtype = at_least_float32(x)
        if self.S is None or (self.S.device, self.S.dtype) != (x.device, dtype):
            self.S = draw_sketch(*self.shape, self.kind, self.seed).to(x.device, dtype)
        return self.S

    def drop(self):
        """Forget this step's sums."""
        self.total, self.rows = None, [0] * self.blocks

    def add(self, total, rows):
        self.total = total if self.total is None else total + self.total
        self.rows = [n + old for n, old in zip(rows, self.rows)]

    def grads(self):
        """The gradients of the weight and of its part of the bias, 0 where the loss lacks that."""
        if self.bias is None:
            return self.weight.grad, None
        grad = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return self.weight.grad, grad[self.bias_rows]


def joined(tensors):
    """torch.cat in float32 or better; of Nones None; of all the parts of a tensor, in order, that
    tensor itself, not copied."""
    first = tensors[0]
    if first is None:
        return None
    whole, ends = first._base, list(accumulate(map(len, tensors), initial=0))
    if len(tensors) == 1:
        whole = first
    elif whole is None or whole.shape != (ends[-1], *first.shape[1:]) or any(
            x._base is not whole or x.stride() != whole.stride()
            or x.storage_offset() != end * whole.stride(0) for x, end in zip(tensors, ends)):
        whole = torch.cat(tensors)
    return whole.to(at_least_float32(whole))


def known_modules(model):
    """(name, module, its Layers) in modules() order, embeddings too."""
    inner = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inner.add(module.out_proj)             # a Linear that is never called
            yield name, module, attention_layers(name, module)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield name, module, [Layer(name, module.weight, None, "embedding")]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module not in inner:
            yield name, module, [Layer(name, module.weight, module.bias, "input",
                                       getattr(module, "groups", 1))]


def attention_layers(name, module):
    """in_proj_weight as three blocks, or three weights with their thirds of the bias."""
    E, bias = module.embed_dim, module.in_proj_bias
    if module.in_proj_weight is not None:
        return [Layer(f"{name}.in_proj_weight", module.in_proj_weight, bias, "input", 3)]
    return [Layer(f"{name}.{x}_proj_weight", getattr(module, f"{x}_proj_weight"), bias, "input", 1,
                  slice(i * E, i * E + E)) for i, x in enumerate("qkv")]


class Hook:
    """Forward hook of one module; layers holds (index into its statistics, Layer).

    A copied or unpickled model gets an inert one, so a copy feeds nothing.
    """

    def __init__(self, module=None, statistics=None):
        self.module, self.statistics, self.layers = module, statistics, []
        self.names = [] if module is None else list(inspect.signature(module.forward).parameters)

    def __reduce__(self):
        return Hook, ()

    def __call__(self, module, args, kwargs, output):
        if self.module is module and torch.is_grad_enabled() and any(x.on for _, x in self.layers):
            self.record(args, kwargs, output)

    @torch.compiler.disable
    def record(self, args, kwargs, output):
        output = output[0] if isinstance(output, tuple) else output
        layers = [(i, layer) for i, layer in self.layers if layer.on and layer.weight.requires_grad]
        if not layers or not output.requires_grad or output.numel() == 0:
            return
        with torch.no_grad(), full_precision(output.device.type):
            found = self.statistics(self.module, dict(zip(self.names, args)) | kwargs, output,
                                    dict(layers))

        def arrived(grad):
            # Only a forward that is backpropagated counts. Where an earlier backward pass left no
            # gradient, zero_grad on the model has dropped it, and so are the sums that it left.
            backward = torch._C._current_graph_task_id()
            for i, layer in layers:
                if layer.weight.grad is None and layer.backward != backward:
                    layer.drop()
                layer.backward = backward
                layer.add(*found[i])
        # A Linear's output on more than two dimensions is a view; an in-place activation replaces
        # the view's history, and a hook on it would never fire. Its base sees the gradient always.
        (output._base if output._is_view() else output).register_hook(arrived)


# ---------------------------------------------------------------------------------------------
# 3. The optimizer
# ---------------------------------------------------------------------------------------------

OPTIONS = ("decoupled_weight_decay", "damping", "stat_decay", "tcov", "tinv", "rank", "sketch",
           "seed")
STATISTICS = ("sketched", "U", "eigenvalues", "covariance", "factor")
sgd_step = inspect.unwrap(torch.optim.SGD.step)   # without the step hooks, which ours already fires


class NysAct(torch.optim.SGD):
    """Momentum SGD on gradients preconditioned by (2) or (6); torch's SGD in all other ways.

    model: its Linear, Conv2d and nn.MultiheadAttention layers (but for its out_proj) whose weights
        are in the parameter groups are preconditioned; all other parameters take the plain step.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below for itself.
    lr (η), momentum (μ), nesterov, weight_decay (wd), maximize, foreach, fused: torch.optim.SGD's.
        Decay joins after preconditioning; decoupled_weight_decay takes W ← (1 − η·wd)W instead.
    damping (ρ): > 0. Large is SGD with lr/ρ; 1/ρ scales all directions that the rank leaves out.
    stat_decay (β): in [0, 1), the weight of the past in (4).
    tcov: every tcov steps the batch joins the average. tinv: every tinv steps what is applied is
        refreshed from it. Both before the step is taken, beginning with the first.
    rank (r): columns of the sketch; layers with d ≤ r are exact. sketch: 'gaussian' (orthonormal)
        or 'subcolumns' (r coordinates). seed: of the sketches, the same on all ranks. A layer keeps
        what its group had when it was found; load_state_dict takes the checkpoint's.

    Raises ValueError for an option out of range. step() raises RuntimeError if its first batch
    passed no layer, FloatingPointError if a statistic is not finite (parameters and state stay) or
    cannot be factored (parameters stay).
    """

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, rank=10, sketch="gaussian", seed=0, maximize=False, foreach=None,
                 fused=None):
        self.model = model
        self.layers, self.hooks, self.handles, self.steps, self.captured = {}, {}, [], 0, False
        weakref.finalize(self, remove_hooks, self.handles).atexit = False
        super().__init__(model.parameters() if params is None else params, lr=lr,
                         momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                         maximize=maximize, foreach=foreach, fused=fused)
        values = (decoupled_weight_decay, damping, stat_decay, tcov, tinv, rank, sketch, seed)
        self.defaults.update(zip(OPTIONS, values))
        for group in self.param_groups:
            check_options(self.fill(group))
        # fused SGD would take a GradScaler's steps itself, the skipped ones included
        self._step_supports_amp_scaling = False
        self.find_layers()
        if not self.layers:
            warnings.warn("NysAct: no Linear, Conv2d or attention weight of the model is among the "
                          "parameters, so all of them take the plain momentum-SGD step")

    def fill(self, group):
        for name in OPTIONS:
            group.setdefault(name, self.defaults[name])
        return group

    def add_param_group(self, param_group):
        ready = "damping" in self.defaults     # not while torch's constructor adds the first groups
        if ready and isinstance(param_group, dict):
            check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        if ready:
            self.find_layers()

    def find_layers(self):
        """Hook every module with a weight in the groups; again when groups are added."""
        given = {p for group in self.param_groups for p in group["params"]}
        found, uses, owners = list(known_modules(self.model)), {}, {}
        for *_, layers in found:
            for layer in layers:
                uses.setdefault(layer.weight, []).append((layer.how, layer.blocks, layer.bias))
                if layer.bias_rows == slice(None):     # the thirds of an attention's are disjoint
                    owners.setdefault(layer.bias, set()).add(layer.weight)
                layer.place = len(uses)           # however the parameters are grouped
        for name, module, layers in found:
            hooked = []
            for i, layer in enumerate(layers):
                same = uses[layer.weight]         # of one kind, or else it takes the plain step
                if layer.weight in given and layer.how != "embedding" \
                        and len({use[:2] for use in same}) == 1:
                    if layer.bias is not None and (
                            layer.bias not in given or not layer.bias.requires_grad
                            or len({use[2] for use in same}) > 1
                            or len(owners.get(layer.bias, ())) > 1):
                        layer.bias = None         # it takes the plain step, if any
                    hooked.append((i, self.layers.setdefault(layer.weight, layer)))
            if hooked and module not in self.hooks:
                self.add_hook(module)
            if hooked:
                self.hooks[module].layers = hooked
        for layer, group in self.grouped():
            if layer.shape is None:
                layer.set_sketch(group)

    def add_hook(self, module):
        if isinstance(module, nn.MultiheadAttention):
            statistics = multihead_attention
        else:
            statistics = linear_or_conv
        self.hooks[module] = Hook(module, statistics)
        self.handles.append(module.register_forward_hook(self.hooks[module], with_kwargs=True))

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure=None):
        """Statistics, refresh, precondition, momentum-SGD step. Afterwards p.grad is raw again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw, decay, grouped = {}, [], self.grouped()
        try:
            with full_precision(next(iter(self.layers), torch.empty(0)).device.type):
                self.update_statistics(grouped)
                self.refresh(grouped)
                self.precondition_gradients(grouped, raw)
            for group in self.param_groups:
                if group["decoupled_weight_decay"]:
                    decay.append((group, group["weight_decay"]))
                    for p in group["params"]:
                        if p.grad is not None:
                            p.mul_(1 - group["lr"] * group["weight_decay"])
                    group["weight_decay"] = 0.0
            sgd_step(self)                                                                 # (7)
        finally:
            for p, grad in raw.items():
                p.grad = grad
            for group, value in decay:
                group["weight_decay"] = value
        self.steps += 1
        self.begin_step()
        return loss

    def begin_step(self):
        """Tell the hooks whether the coming step's batch counts; note the step in the state."""
        for layer, group in self.grouped():
            state = self.state.get(layer.weight, {})
            layer.on = self.steps % group["tcov"] == 0
            if "updates" in state:
                state["step"] = self.steps

    @property
    def collecting(self):
        """Will the coming forward pass feed statistics? Then their hooks break a compiled graph:
        call the plain model, and the compiled one otherwise."""
        return any(layer.on for layer in self.layers.values())

    def grouped(self):
        """(layer, its group), in an order that is the same on all ranks."""
        return [(layer, group) for group in self.param_groups
                for layer in map(self.layers.get, group["params"]) if layer is not None]

    def update_statistics(self, grouped):
        """(4) for the layers due, with the mean over the rows of all micro-batches and ranks."""
        due = [(x, group) for x, group in grouped if self.steps % group["tcov"] == 0]
        if not due:
            return
        for layer, _ in due:
            if layer.weight.grad is None:      # dropped, and no backward pass has come since
                layer.drop()
        means = self.pooled([layer for layer, _ in due])
        self.captured = self.captured or any(mean is not None for mean in means)
        if not self.captured and any(layer.weight.requires_grad for layer, _ in due):
            raise RuntimeError(
                "NysAct: step() was called, but no layer it preconditions has run and received a "
                "gradient since the last zero_grad(). Was another model or a copy of it trained, "
                "was the model compiled and called before NysAct was made, did zero_grad() come "
                "between backward() and step(), or was backward() not called?")
        averages = {}
        for (layer, group), mean in zip(due, means):
            if mean is None:
                continue
            state, name = self.state[layer.weight], "covariance" if layer.exact else "sketched"
            state["updates"] = state.get("updates", 0) + 1
            if name in state:
                pairs = averages.setdefault((state["updates"], group["stat_decay"]), [])
                pairs.append((state[name], mean))
            else:
                state[name] = mean.clone()                  # the buffer's memory is not kept
        for weights, pairs in averages.items():
            running_mean(*map(list, zip(*pairs)), *weights)

    def pooled(self, layers):
        """Σ rows / number of rows, per layer; None where no rank saw any. Drops the sums.

        One flat buffer for all layers, so that ranks agree by one all-reduce, and one look at the
        buffer finds what is not finite.
        """
        like = max((layer.weight for layer in layers), key=lambda w: w.dtype == torch.float64)
        like = like.new_empty(0, dtype=at_least_float32(like))
        shapes, rows = [layer.shape for layer in layers], sum((layer.rows for layer in layers), [])
        flat = torch.cat([like.new_zeros(shape.numel()) if layer.total is None else
                          layer.total.to(like).flatten() for layer, shape in zip(layers, shapes)]
                         + [torch.tensor(rows, dtype=like.dtype, device="cpu").to(like)])
        for layer in layers:
            layer.drop()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        sums, counts = flat.split([len(flat) - len(rows), len(rows)])
        ends = torch.stack([flat.amin(), flat.amax()])
        *counts, least, most = torch.cat([counts, ends]).tolist()
        parts = sums.split([shape.numel() for shape in shapes])
        if not (isfinite(least) and isfinite(most)):             # nan is both
            bad = next(x.name for x, total in zip(layers, parts) if not total.isfinite().all())
            raise FloatingPointError(
                f"NysAct: the inputs of layer {bad} are not finite in step {self.steps}; no "
                "parameter was changed. Lower the learning rate, or look for the overflow that "
                "caused it")
        blocks = [shape[1:].numel() for shape in shapes for _ in range(shape[0])]
        torch._foreach_div_(sums.split(blocks), [max(n, 1) for n in counts])
        firsts = accumulate((shape[0] for shape in shapes), initial=0)
        return [part.view(shape).to(layer.weight.device, at_least_float32(layer.weight))
                if counts[first] else None
                for layer, shape, part, first in zip(layers, shapes, parts, firsts)]

    def precondition_gradients(self, grouped, raw):
        """Replace p.grad by G̃ for every layer that has statistics; raw collects what was there."""
        for layers, damping in stacks(
                (layer, group) for layer, group in grouped if layer.weight.grad is not None
                and "updates" in self.state.get(layer.weight, {})):
            states = [self.state[layer.weight] for layer in layers]
            grad, bias_grad = map(joined, zip(*(layer.grads() for layer in layers)))
            if layers[0].exact:
                new = precondition_exact(grad, bias_grad, joined([x["factor"] for x in states]))
            else:
                U, eigenvalues = (joined([x[key] for x in states]) for key in ("U", "eigenvalues"))
                new = precondition(grad, bias_grad, U, eigenvalues, damping)
            replace_grads(layers, *new, raw)

    def refresh(self, grouped):
        """Bring what is applied up to date every tinv steps, or where there is nothing to apply."""
        due = []
        for layer, group in grouped:
            state = self.state.get(layer.weight, {})
            if "updates" in state and (self.steps % group["tinv"] == 0 or (
                    "factor" if layer.exact else "U") not in state):
                due.append((layer, group))
        for layers, damping in stacks(due):
            self.factor(layers, damping)

    def factor(self, layers, damping):
        """(5) or (6) for layers of one shape."""
        states = [self.state[layer.weight] for layer in layers]
        if layers[0].exact:
            names = ("factor",)
            *found, failed = damped_cholesky(joined([x["covariance"] for x in states]), damping)
            why = (f"input covariance of layer {{}} plus damping {damping} is not positive "
                   "definite to rounding; raise damping")
        else:
            names, Y = ("U", "eigenvalues"), joined([x["sketched"] for x in states])
            *found, well = nystrom(Y, joined([layer.sketch(Y) for layer in layers]))
            failed, why = ~well, (
                "sketched covariance of layer {} cannot be factored. Either its inputs are too "
                "large for their precision: scale them down. Or it was averaged with another "
                "sketch: give all ranks the same seed, and resume with the torch release that "
                "wrote the checkpoint")
        if failed.any():
            bad = layers[failed.view(len(layers), -1).any(1).int().argmax()]
            raise FloatingPointError("NysAct: the " + why.format(bad.name))
        for name, whole in zip(names, found):
            # row-major like what is loaded, so that a resumed run rounds alike
            for state, part in zip(states, whole.contiguous().split(layers[0].blocks)):
                state[name] = part

    # ---- the rest of torch's interface ----

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for layer in self.layers.values():
            layer.drop()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # torch has cast the statistics to the weights' dtype: take them again as they were saved
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, (p for group in self.param_groups for p in group["params"])):
            for key, value in state_dict["state"].get(i, {}).items():
                if key in STATISTICS:
                    self.state[p][key] = value.to(p.device, at_least_float32(p), copy=True)
        for layer, group in self.grouped():
            layer.set_sketch(group)
        self.steps = max([state.get("step", 0) for state in self.state.values()], default=0)
        for layer in self.layers.values():
            layer.drop()
        self.begin_step()

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:      # a checkpoint of torch's SGD lacks our options
            self.fill(group)
        for name, value in dict(model=None, layers={}, hooks={}, handles=[], steps=0,
                                captured=False).items():
            self.__dict__.setdefault(name, value)          # an unpickled optimizer has no model

    def __repr__(self):
        lines, size = [], 0
        for layer, group in self.grouped():
            blocks, _, r = layer.shape
            n = 2 * layer.shape.numel() + (0 if layer.exact else blocks * r)
            n *= at_least_float32(layer.weight).itemsize
            lines.append(f"  {layer.name}: {len(layer.weight)}×{layer.shape[1]}, {layer.how}, "
                         f"{n:,} bytes")
            size += n
        done = set(self.layers) | {layer.bias for layer in self.layers.values()}
        given = {p for group in self.param_groups for p in group["params"]} - done
        named = self.model.named_parameters() if self.model is not None else ()
        plain = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias")
                              for name, p in named if p in given)
        return "\n".join([super().__repr__(), f"preconditioned: {len(lines)} weights, "
                          f"{size:,} bytes of statistics", *lines,
                          "plain step: " + (", ".join(plain) or "nothing else")])


def stacks(grouped):
    """Lists of layers of one shape, whose blocks can stand as those of one layer; their damping.

    A small layer's step costs a GPU the launches of its kernels, so such layers share them.
    """
    found = {}
    for layer, group in grouped:
        weight = layer.weight
        kind = (weight.shape, weight.stride(), layer.shape, layer.bias is None, weight.dtype,
                weight.device, group["damping"])
        found.setdefault(kind, []).append(layer)
    for (shape, *_, damping), layers in found.items():
        at_once = max(1, STACK // max(shape.numel(), layers[0].shape.numel()))
        for i in range(0, len(layers), at_once):
            yield layers[i:i + at_once], damping


def replace_grads(layers, grad, bias_grad, raw):
    """Give each layer its part of grad and bias_grad; raw collects what was there."""
    sizes = [len(layer.weight) for layer in layers]
    grads = grad.to(layers[0].weight.dtype).split(sizes)
    bias_grads = [None] * len(layers) if bias_grad is None else bias_grad.split(sizes)
    for layer, new, new_bias in zip(layers, grads, bias_grads):
        weight, bias = layer.weight, layer.bias
        raw[weight], weight.grad = weight.grad, new
        if bias is None or bias.grad is None:
            continue
        if layer.bias_rows == slice(None):
            raw[bias], bias.grad = bias.grad, new_bias.to(bias.dtype)
            continue
        if bias not in raw:                  # one bias serves three weights, a third to each
            raw[bias], bias.grad = bias.grad, bias.grad.clone()
        bias.grad[layer.bias_rows] = new_bias


def remove_hooks(handles):
    """When an optimizer is gone, its hooks should cost the model nothing."""
    for handle in handles:
        handle.remove()


def check_options(group):
    """Raise ValueError, naming the argument and its value, for what the step cannot use."""
    for name, valid, wanted in (
            ("damping", lambda v: 0 < v < float("inf"), "a positive number"),
            ("stat_decay", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("tcov", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more"),
            ("tinv", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more"),
            ("rank", lambda v: v >= 1 and v % 1 == 0, "a whole number, 1 or more"),
            ("sketch", lambda v: v in ("gaussian", "subcolumns"), "'gaussian' or 'subcolumns'"),
            ("seed", lambda v: 0 <= v < 2 ** 32 and v % 1 == 0, "a whole number below 2³²")):
        if not valid(group[name]):
            raise ValueError(f"NysAct: {name} must be {wanted}, got {group[name]}")
