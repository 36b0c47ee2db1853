"""K-FAC: Kronecker-factored approximate curvature, all of it in this one file.

Martens, Grosse. "Optimizing Neural Networks with Kronecker-factored Approximate Curvature". arXiv
1503.05671, ICML 2015. Convolutions: Grosse, Martens, arXiv 1602.01407; weight sharing: Eschenhagen
et al., arXiv 2311.00636; the KL clip: Ba, Grosse, Martens, ICLR 2017.  (Numbers are this file's.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ],  P = E[g gᵀ]           inputs a; g: gradient of a loss term by s = W a
    (2)  F = E[a aᵀ ⊗ g gᵀ] ≈ A ⊗ P          the layer's block of the Fisher matrix
    (3)  factored: G̃ = (P + √λ/π I)⁻¹ G (A + π√λ I)⁻¹,  π² = (tr A / d) / (tr P / out)
    (4)  eigen: G̃ = Q_P [(Q_Pᵀ G Q_A) / (v_P v_Aᵀ + λ)] Q_Aᵀ,  A = Q_A diag(v_A) Q_Aᵀ, P likewise
    (5)  G̃ ← ν G̃,  ν = min(1, √(κ / Σ_layers η²⟨G̃, G⟩))       the KL clip
    (6)  A ← A + w (A_batch − A),  w = (1 − β)/(1 − βᵏ)       bias-corrected average; P likewise
    (7)  under a mean loss: P = N Σ ĝ ĝᵀ, ĝ the gradient that backward() delivers, N loss terms
    (8)  convolution: A[(c,i), (c',j)] = Σ_q x_c(q) x_c'(q+j−i) − border          no patch is formed
    (9)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

WHY (2). One term of the loss has the weight gradient g aᵀ; if inputs are independent of output
gradients, the expectation of the product is the product of expectations (exact for a linear network
with squared loss). A is d×d and P out×out where F is (d·out)×(d·out), and (A ⊗ P)⁻¹ vec(G) =
vec(P⁻¹ G A⁻¹). (4) solves (A ⊗ P + λI) vec(G̃) = vec(G) exactly: Q_A ⊗ Q_P diagonalises it. (3)
damps each factor: (A + π√λ I) ⊗ (P + √λ/π I) = A ⊗ P + λI + two cross terms, whose trace norms this
π balances. Both factors get the same damping relative to their mean eigenvalues, √λ/√(ā p̄). The
two differ at equal λ: the cross terms dominate, which FOOF's paper holds to be why K-FAC works.

WHICH FISHER. 'sampled' is the Fisher: labels drawn from the model's own prediction, so one more
backward pass from the logits to the layers' outputs. 'empirical' takes the g of the training
labels, which backward() brings anyway: another matrix, that vanishes as the labels are fitted.

WEIGHT SHARING: S tokens or positions use one weight. 'expand' takes them for independent examples
(exact in a linear network where each has its own loss), 'reduce' for parts of one (exact where
outputs are averaged before the loss). Under a mean loss of N terms over B samples

    (10) expand: A = Σ_{n,t} a aᵀ / (B S),  P = N Σ_{n,t} ĝ ĝᵀ
         reduce: A = Σ_n ā_n ā_nᵀ / B,  P = N Σ_n (Σ_t ĝ)(Σ_t ĝ)ᵀ,  ā_n the mean of a_{n,t} over t

WHY (7). ĝ = g/N. With micro-batches (each loss weighted by its share) ĝ = g/N with N the terms of
all of them; DDP averages gradients over W ranks, so a rank's ĝ is W g/N, and P = (N/W²) Σ ĝ ĝᵀ. A
GradScaler's scale is divided out of ĝ. The number of terms is that of the model's call: the length
of its first tensor ('samples'), or of the first two dimensions of it ('tokens').

(5) bounds the KL divergence between the model before and after: η²G̃ᵀFG̃/2, and FG̃ ≈ G.

    symbol   in code                     shape
    G        grad, bias_grad             (out, d), (out,); d = C/groups·kh·kw (+ 1 for bias)
    A, P     "covariance",               (blocks, d(d+1)/2): lower triangles by rows; one block per
             "output_covariance"         group of a convolution
    L L'     "factor", "output_factor"   (blocks, d, d), (blocks, out/blocks, ·): Cholesky factors
    Q, v     "vectors", "values", "output_vectors", "output_values"      eigenvectors and values
    λ, β, κ  damping, stat_decay, kl_clip  scalars;  k: state "updates";  η, μ: lr, momentum

COST per layer: statistics about R·(d² + out²) for R rows every tcov steps (less by (8)), factors
(d³ + out³)/3 every tinv steps (eigen: about ten times that), application 2·out·d·(d + out) per
step (eigen twice that), state 1.5·(d² + out²) numbers. Ranks divide the factorisations.

THROWN AWAY: what couples layers; all correlation of inputs with output gradients; with 'expand',
that of positions with each other.

ERRATA, against released implementations (the baselines of later papers), in which
 - P lacks N², so λ depends on the batch size, and damping 0.03 makes K-FAC a scaled SGD (cosine
   above 0.99 with the gradient where it should be 0.9); others divide A and P by positions twice;
 - one `stat_decay` weighs the new batch in K-FAC and the old average elsewhere; damping is added in
   place to the running factor; averages begin at the identity; the KL clip uses the first lr only;
 - "K-FAC" with spatially averaged factors ('reduce' with P short of S²) carries no label;
 - most repeat all factorisations on all ranks, or let statistics differ among ranks.
Norm layers, embeddings and nn.MultiheadAttention take the plain step; a fused qkv is one Linear.

USAGE
    optimizer = KFAC(model, lr=0.1, momentum=0.9, weight_decay=5e-4)    # before torch.compile runs
    optimizer.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    # optimizer.sample_fisher(logits)                                   with fisher='sampled'
    loss.backward()
    optimizer.step()
"""
import inspect
import warnings
import weakref
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from math import isfinite

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of patches or factors at a time
STACK = 2 ** 20  # layers are joined up to this many numbers; beyond, their work outweighs launches


# ---------------------------------------------------------------------------------------------
# 1. The mathematics
# ---------------------------------------------------------------------------------------------

def precondition(grad, bias_grad, blocks, solve):
    """G̃ = solve(G), (3) or (4), with G = [W.grad | b.grad] (blocks, out/blocks, d).

    grad (out, ...) and bias_grad (out,) or None are split into blocks; each block of rows has its
    own A and P. G̃ keeps the memory layout (channels_last or not) of grad.
    """
    G = grad.reshape(blocks, len(grad) // blocks, -1)         # (blocks, out/blocks, d)
    if bias_grad is not None:
        G = torch.cat([G, bias_grad.view(blocks, -1, 1)], 2)
    G = solve(G)
    new_bias = None if bias_grad is None else G[:, :, -1].contiguous().flatten()
    G = G if bias_grad is None else G[:, :, :-1]
    return torch.empty_like(grad).copy_(G.reshape(grad.shape)), new_bias


def solve_right(G, L):
    """G (L Lᵀ)⁻¹ (..., out, d): Y Lᵀ = G, then Z L = Y; from the left, G would be transposed."""
    Y = torch.linalg.solve_triangular(L.mT, G, upper=True, left=False)
    return torch.linalg.solve_triangular(L, Y, upper=False, left=False)


def solve_factored(G, factor, output_factor):
    """(3)  (L' L'ᵀ)⁻¹ G (L Lᵀ)⁻¹ with A + π√λ I = L Lᵀ and P + √λ/π I = L' L'ᵀ."""
    return solve_right(solve_right(G, factor).mT, output_factor).mT


def solve_eigen(G, vectors, values, output_vectors, output_values, damping):
    """(4)"""
    rotated = output_vectors.mT @ G @ vectors
    rotated = rotated / (output_values.unsqueeze(-1) * values.unsqueeze(-2) + damping)
    return output_vectors @ rotated @ vectors.mT


def pi_of(A, P, d, out):
    """(3)  π for packed A and P (blocks, ·), one per block; 1 where a trace is 0."""
    a, p = [packed[:, torch.arange(n).add(1).cumsum(0).sub(1).to(packed.device)].mean(1)
            for packed, n in ((A, d), (P, out))]     # row i of a triangle has i + 1 numbers
    return torch.where((a > 0) & (p > 0), a.sqrt() / p.sqrt(), 1.0)      # a / p may overflow


def damped_cholesky(A, damping):
    """(3)  L with L Lᵀ = A + ρI, and for each A whether rounding forbade it.

    A (..., d, d) ⪰ 0, of which only the lower triangle is read, is overwritten; damping ρ (...). A
    ρ that vanishes beside A's diagonal would leave the size of the step in A's null space to
    rounding errors, even where the factorisation goes through.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    lost = damping < torch.finfo(A.dtype).eps * diagonal.sum(-1)
    diagonal.add_(damping.unsqueeze(-1))
    L, info = torch.linalg.cholesky_ex(A)
    return L, lost | (info != 0)


def eigenbasis(A):
    """(4)  Eigenvectors and values of A (..., d, d) ⪰ 0, and for each A whether that failed.

    Only the lower triangle is read. Float32 LAPACK raises, or returns nan, for some matrices with
    many zeros, as dead features make them: then float64.
    """
    found = A, A[..., 0], torch.ones_like(A[..., 0, 0], dtype=torch.bool)
    for dtype in (A.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(A.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        failed = ~(values.isfinite().all(-1) & vectors.isfinite().all(-1).all(-1))
        found = vectors.to(A.dtype), values.clamp(min=0).to(A.dtype), failed
        if not failed.any():
            break
    return found


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


def running_mean(old, batch, updates, stat_decay):
    """(6)  The bias-corrected averages after `updates` batches, in place on all of old.

    With m_k = β m_{k−1} + (1 − β) x_k, m_0 = 0, the corrected m̂_k = m_k/(1 − βᵏ) satisfies
    (1 − βᵏ) m̂_k = β(1 − βᵏ⁻¹) m̂_{k−1} + (1 − β) x_k = (1 − βᵏ − (1 − β)) m̂_{k−1} + (1 − β) x_k:
    m̂_k = m̂_{k−1} + w (x_k − m̂_{k−1}), so the corrected average itself is what is stored.
    """
    torch._foreach_lerp_(old, batch, (1 - stat_decay) / (1 - stat_decay ** updates))
    return old


def pack(A):
    """The lower triangle, by rows: symmetric (..., d, d) to (..., d(d+1)/2).

    A's leading block is a leading part of it: a border (the coordinate 1 of the bias) is one more
    row at its end.
    """
    return A.flatten(-2).index_select(-1, triangle(A.shape[-1], A.device))


def unpack(packed, d):
    """The lower triangle (..., d, d), zero above."""
    A = packed.new_zeros(*packed.shape[:-1], d * d)
    return A.index_copy_(-1, triangle(d, packed.device), packed).unflatten(-1, (d, d))


def triangle(d, device):
    """Where the lower triangle's entries lie in a flattened d×d matrix, row after row."""
    i, j = torch.tril_indices(d, d, device=device)
    return i * d + j


def gram(a):
    """a aᵀ for a (..., d, n), its lower triangle: zero or unfinished above.

    In strips of 128 rows, each with the columns that its triangle needs: at d = 768 three fifths of
    the whole product's work.
    """
    d = a.shape[-2]
    if d <= 128:
        return a @ a.mT
    A = a.new_zeros(*a.shape[:-1], d)
    for i in range(0, d, 128):
        A[..., i:i + 128, :i + 128] = a[..., i:i + 128, :] @ a[..., :i + 128, :].mT
    return A


def input_gram(x, bias):
    """Σ a aᵀ over all leading dimensions of x, a row of x or, with a bias, [row; 1]; packed."""
    a = x.reshape(-1, x.shape[-1])
    a = a.to(at_least_float32(a))
    A = pack(gram(a.mT[None]))
    return bordered(A, a.sum(0)[None], len(a)) if bias else A


def bordered(A, total, rows):
    """Σ [a; 1][a; 1]ᵀ, packed, from A = Σ a aᵀ, packed, and total = Σ a (blocks, d)."""
    return F.pad(torch.cat([A, total], 1), (0, 1), value=float(rows))


def patches(x, conv):
    """A convolution's patches of x (B, C, H, W), by one copy: (groups, C/groups·kh·kw, B·oH·oW)."""
    x = pad(x, conv)
    for dim, k, stride, dilation in zip((2, 3), conv.kernel_size, conv.stride, conv.dilation):
        x = x.unfold(dim, dilation * (k - 1) + 1, stride)[..., ::dilation]
    rows = len(x) * x.shape[2] * x.shape[3]                          # of x (B, C, oH, oW, kh, kw)
    return x.permute(1, 4, 5, 0, 2, 3).reshape(conv.groups, -1, rows)


def patch_gram(x, conv):
    """Σ a aᵀ over all patches of a convolution: (groups, d, d), from x (B, C, H, W)."""
    x = x.to(at_least_float32(x))
    half = tuple(k // 2 for k in conv.kernel_size)
    padding = {"same": half, "valid": (0, 0)}.get(conv.padding, conv.padding)
    if conv.kernel_size == (1, 1) and padding == (0, 0):      # its patches are pixels
        return pixel_gram(x[:, :, ::conv.stride[0], ::conv.stride[1]], conv.groups)
    if conv.stride == conv.dilation == (1, 1) and padding == half and conv.padding_mode == "zeros" \
            and all(k % 2 and size >= k // 2 for k, size in zip(conv.kernel_size, x.shape[2:])):
        return shift_gram(x, *conv.kernel_size, conv.groups)
    numbers = x[0].numel() * conv.weight[0, 0].numel() // (conv.stride[0] * conv.stride[1])
    total, chunk = 0, max(1, CHUNK // max(1, numbers))
    for part in x.split(chunk):
        total = total + gram(patches(part, conv))
    return total


def pixel_gram(x, groups):
    """Σ a aᵀ over the pixels of x (B, C, H, W): (groups, C/groups, C/groups)."""
    a = x.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))     # (groups, C/groups, B·H·W)
    return gram(a)


def shift_gram(x, kh, kw, groups):
    """(8)  Σ a aᵀ over the patches of a k×k convolution, zero-padded by p = (k−1)/2, stride 1.

    The patch at position q has a_(c,i)(q) = x_c(q + i − p), x being zero outside the image. Were
    the sum over all q of the plane, substituting q for q + i − p would leave only the shift j − i:
        Σ_q a_(c,i)(q) a_(c',j)(q) = Σ_q x_c(q) x_c'(q + j − i) = R[c, c', j−i],
    (2k−1)² numbers for a pair of channels in place of k⁴; and R is the weight gradient of a
    convolution of x with x. The sum is over q inside the image, though, so
        Σ_inside = Σ_q − Σ_{row outside, column inside} − Σ_{column outside, any row}.
    A patch outside along an axis sees the image with p of its k taps there, and only the p
    outermost pixels; such patches are few, and are formed: of the rows above and below with all kw
    taps across, then of the columns to the left and right with all kh taps along.
    """
    C = x.shape[1]
    A = x.new_zeros(C, kh, kw, C // groups, kh, kw)
    width = 16 if groups == 1 else C         # strips of channels: the lower triangle, as in gram()
    for i in range(0, C, width):
        j = i + width
        add_shifts(A[i:j, :, :, :j], x[:, :j], x[:, i:j], groups)
    for u, taps in edges(x, 2, kh):
        u = F.pad(u, (0, 0, kw // 2, kw // 2)).unfold(3, kw, 1)            # (B, C, p, W, p, kw)
        A[:, taps, :, :, taps] -= formed_gram(u, groups)
    for u, taps in edges(x, 3, kw):
        u = F.pad(u, (0, 0, 0, 0, kh - 1, kh - 1)).unfold(2, kh, 1)        # (B, C, H+2p, p, p, kh)
        A[:, :, taps, :, :, taps] -= formed_gram(u.transpose(4, 5), groups)
    return A.view(groups, -1, C // groups * kh * kw)


def add_shifts(A, x, y, groups):
    """A += R[c, c', j−i] for c in y, c' in x, and all taps i, j: A (C_y, kh, kw, c', kh, kw)."""
    kh, kw = A.shape[1:3]
    R = conv2d_weight(x, (len(A), A.shape[3], 2 * kh - 1, 2 * kw - 1), y,
                      padding=(kh - 1, kw - 1), groups=groups)
    # for tap i, the shifts j − i for j = 0 ... k − 1 are a window that begins at −i
    T = R.unfold(2, kh, 1).unfold(3, kw, 1).flip(2, 3)              # (c, c', i_y, i_x, j_y, j_x)
    A += T.permute(0, 2, 3, 1, 4, 5)


def edges(x, dim, k):
    """The patches outside the image at its two ends along one axis: (…, their p taps), which taps.

    x (B, C, H, W) has this axis replaced by p positions, and gains one of p taps.
    """
    p, n = k // 2, x.shape[dim]
    if p:
        zeros = torch.zeros_like(x.narrow(dim, 0, p - 1))
        yield torch.cat((zeros, x.narrow(dim, 0, p)), dim).unfold(dim, p, 1), slice(p + 1, k)
        yield torch.cat((x.narrow(dim, n - p, p), zeros), dim).unfold(dim, p, 1), slice(0, p)


def formed_gram(u, groups):
    """Σ a aᵀ of patches u (B, C, h, w, taps, taps): (C, taps, taps, C/groups, taps, taps)."""
    a = u.permute(1, 4, 5, 0, 2, 3).reshape(groups, -1, len(u) * u.shape[2] * u.shape[3])
    taps = u.shape[4:]
    return gram(a).view(-1, *taps, u.shape[1] // groups, *taps)


def patch_sum(image, conv):
    """Σ a over a convolution's patches, from Σ x over its input images: (..., C, H, W).

    Patches are linear in the image, so the sum of all images' patches is that of the one summed
    image. Tap (i, j) of channel c sums a grid of its pixels: with R (kh, H) and C (kw, W) telling
    how often tap i meets a row and tap j a column, it is (R x̄_c Cᵀ)_ij. Returns (..., groups,
    C/groups·kh·kw).
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    rows, cols = (taps(*axis, mode, image.dtype, image.device) for axis in zip(
        image.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, padding(conv)))
    return (rows @ (image @ cols.mT)).reshape(*image.shape[:-3], conv.groups, -1)


@lru_cache(maxsize=256)
def taps(size, k, stride, dilation, ends, mode, dtype, device):
    """(k, size): how often tap i of k meets each pixel of an axis that is padded at its ends."""
    pixels = torch.arange(1.0, size + 1, dtype=torch.float64, device="cpu")
    shown = F.pad(pixels[None], ends, mode)[0].long()                # of padding by zeros, pixel 0
    first = torch.arange(0, len(shown) - dilation * (k - 1), stride, device="cpu")
    met = shown[torch.arange(k, device="cpu")[:, None] * dilation + first]         # (k, positions)
    counts = torch.zeros(k, size + 1, dtype=torch.float64, device="cpu")
    return counts.scatter_add_(1, met, torch.ones_like(met, dtype=counts.dtype))[:, 1:].to(
        device, dtype)


def padding(conv):
    """((top, bottom), (left, right)) of a convolution, whatever the form of its padding."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":       # torch puts the odd pixel at the end
        total = [dil * (k - 1) for dil, k in zip(conv.dilation, conv.kernel_size)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in conv.padding)


def pad(x, conv):
    """The padded input of a convolution; x (..., H, W)."""
    rows, cols = padding(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, (*cols, *rows), mode=mode)


def image_sum(x):
    """Σ x over the images of a batch: (C, H, W)."""
    return x.sum(0, dtype=at_least_float32(x))


def draw_labels(logits):
    """(1)  One label per row of logits (N, classes), from softmax(logits).

    argmax of p/E, with E exponential, has the law p. Unlike torch.multinomial it lets a nan pass,
    which step() reports with the layer's name, or which a GradScaler skips.
    """
    p = logits.softmax(1)
    return (p / torch.empty_like(p).exponential_()).argmax(1)


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
# 2. Capture: what each kind of module gives its layers, as lists of (sum over rows, rows).
#    With the coordinate 1 of the bias if one of these layers has one; the others cut it off.
# ---------------------------------------------------------------------------------------------

def linear_or_conv(module, inputs, output, bias, reduce):
    """The rows of a Linear or Conv2d: Σ a aᵀ, or with reduce Σ ā āᵀ of (10)."""
    x = next(iter(inputs.values())).detach()
    if isinstance(module, nn.Linear):
        if reduce and x.dim() > 2:
            x = x.flatten(1, -2).mean(1, dtype=at_least_float32(x))               # (B, d)
        return [(input_gram(x, bias), [x.numel() // x.shape[-1]])]
    x = x if x.dim() == 4 else x[None]
    positions = output.shape[-2] * output.shape[-1]
    rows = len(x) if reduce else len(x) * positions
    if reduce:
        a = patch_sum(x.to(at_least_float32(x)), module) / positions              # (B, groups, d)
        A, total = torch.einsum("bgi,bgj->gij", a, a), a.sum(0)
    else:
        A, total = patch_gram(x, module), patch_sum(image_sum(x), module) if bias else None
    return [(bordered(pack(A), total, rows) if bias else pack(A), [rows] * module.groups)]


def output_gram(module, g, reduce):
    """Σ g gᵀ over the rows of a layer's output gradients, or over their sums per sample, packed."""
    g = g.to(at_least_float32(g))
    if isinstance(module, nn.Linear):
        g = g.flatten(1, -2).sum(1) if reduce and g.dim() > 2 else g.reshape(-1, g.shape[-1])
        return pack(gram(g.mT[None]))
    g = g if g.dim() == 4 else g[None]
    return pack(pixel_gram(g.sum((2, 3), keepdim=True) if reduce else g, module.groups))


class Layer:
    """One preconditioned weight: how its gradient is laid out, and this step's sums over rows."""

    what = "inputs"

    def __init__(self, name, weight, bias, how, blocks=1, bias_rows=slice(None)):
        self.name, self.weight, self.how, self.blocks = name, weight, how, blocks
        self.bias, self.bias_rows = bias, bias_rows      # its part of the bias, if that is shared
        self.on = True             # does this step's batch count? Set by step(), read by the hooks
        self.backward = None       # the backward pass that brought the latest sums
        self.outputs = None        # the other factor, an OutputSide
        self.drop()

    @property
    def d(self):
        return self.weight.numel() // len(self.weight) + (self.bias is not None)

    @property
    def shape(self):
        return torch.Size((self.blocks, self.d * (self.d + 1) // 2))

    def drop(self):
        """Forget this step's sums."""
        self.total, self.rows = None, [0] * self.blocks
        self.calls = {}            # of the model, behind these sums: their loss terms
        if self.outputs is not None:
            self.outputs.drop()

    def add(self, total, rows):
        if total.shape != self.shape:
            total = total[tuple(slice(n) for n in self.shape)]   # a bias's coordinate that it lacks
        self.total = total if self.total is None else total + self.total
        self.rows = [n + old for n, old in zip(rows, self.rows)]

    def grads(self):
        """The gradients of the weight and of its part of the bias, 0 where the loss lacks that."""
        if self.bias is None:
            return self.weight.grad, None
        grad = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return self.weight.grad, grad[self.bias_rows]


class OutputSide(Layer):
    """The other factor of a layer: sums over output gradients; its rows are the loss's terms."""

    what = "output gradients"

    @property
    def d(self):
        return len(self.weight) // self.blocks


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
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield name, module, [Layer(name, module.weight, None, "embedding")]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module not in inner:
            yield name, module, [Layer(name, module.weight, module.bias, "Kronecker factors",
                                       getattr(module, "groups", 1))]


class Hook:
    """Forward hook of one module; layers holds (index into its statistics, Layer).

    A copied or unpickled model gets an inert one, so a copy feeds nothing.
    """

    def __init__(self, module=None, statistics=None, gradients=None, calls=None):
        self.module, self.statistics, self.layers = module, statistics, []
        self.gradients, self.calls = gradients, calls
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
                                    any(layer.bias is not None for _, layer in layers))
        shape, call, sampled = output.shape, self.calls.call, []

        def gram(grad):
            grad = found[0][0].new_zeros(shape) if grad is None else grad.reshape(shape)
            with torch.no_grad(), full_precision(grad.device.type):
                return self.gradients(self.module, grad)

        def arrived(grad):
            if self.calls.sampling:
                return
            # Only a forward that is backpropagated counts. Where an earlier backward pass left no
            # gradient, zero_grad on the model has dropped it, and so are the sums that it left.
            backward = torch._C._current_graph_task_id()
            totals = sampled
            if self.calls.tape is None:        # before squaring, where a scaled gradient overflows
                totals = [gram(grad if call.scale == 1.0 else
                               grad.to(at_least_float32(grad)) / call.scale)]
            self.calls.missed = self.calls.missed or not totals
            for i, layer in layers:
                if layer.weight.grad is None and layer.backward != backward:
                    layer.drop()
                layer.backward = backward
                layer.add(*found[i])
                layer.calls[call] = call.terms
                for total in totals:
                    layer.outputs.add(total, [0] * layer.blocks)
        # A Linear's output on more than two dimensions is a view; an in-place activation replaces
        # the view's history, and a hook on it would never fire. Its base sees the gradient always.
        output = output._base if output._is_view() else output
        output.register_hook(arrived)
        if self.calls.tape is not None and torch._C._current_graph_task_id() == -1:
            edge = torch.autograd.graph.get_gradient_edge(output)
            self.calls.tape.append((edge, gram, sampled, call))


class Call:
    """One call of the model: how many terms its loss has, and the scale of its loss."""

    def __init__(self, terms, scale):
        self.terms, self.scale = terms, scale


class Calls:
    """Forward pre-hook of the model. call: its latest; tape: outputs whose gradients to sample.

    tape is None where the gradients are those of the ordinary backward pass.
    """

    def __init__(self, module=None, tokens=False, sampled=False, grad_scaler=None):
        self.module, self.tokens, self.grad_scaler = module, tokens, grad_scaler
        self.on, self.sampling, self.call = True, False, Call(0, 1.0)
        self.tape, self.missed = [] if sampled else None, False

    def __reduce__(self):
        return Calls, ()

    def __call__(self, module, args, kwargs):
        if self.module is module and self.on and torch.is_grad_enabled():
            self.begin(args, kwargs)

    @torch.compiler.disable
    def begin(self, args, kwargs):
        x = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim()), None)
        terms = 0
        if x is not None:
            terms = len(x) * x.shape[1] if self.tokens and x.dim() > 1 else len(x)
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        self.call = Call(terms, scale)

    def forget(self):
        """Drop what a step left over; the tape holds the graph."""
        self.missed, self.call = False, Call(0, 1.0)
        if self.tape is not None:
            self.tape = []


# ---------------------------------------------------------------------------------------------
# 3. The optimizer
# ---------------------------------------------------------------------------------------------

OPTIONS = ("decoupled_weight_decay", "damping", "stat_decay", "tcov", "tinv")
STATISTICS = ("covariance", "factor", "vectors", "values", "output_covariance", "output_factor",
              "output_vectors", "output_values")
sgd_step = inspect.unwrap(torch.optim.SGD.step)   # without the step hooks, which ours already fires


class KFAC(torch.optim.SGD):
    """Momentum SGD on gradients preconditioned by (3) to (5); torch's SGD in all other ways.

    model: its Linear and Conv2d layers whose weights are in the parameter groups are
        preconditioned; all other parameters take the plain step. `print(optimizer)` lists both. The
        model is to be called as a whole: its first tensor tells how many terms the loss has.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set damping, stat_decay, tcov, tinv and what is torch's for itself.
    lr (η), momentum (μ), nesterov, weight_decay (wd), maximize, foreach, fused: torch.optim.SGD's.
        Decay joins after preconditioning; decoupled_weight_decay takes W ← (1 − η·wd)W instead.
    damping (λ): > 0. Large is SGD with lr/λ; small is the natural gradient of each layer.
    stat_decay (β): in [0, 1), the weight of the past in (6).
    tcov: every tcov steps the batch joins the average. tinv: every tinv steps what is applied is
        refreshed from it. Both before the step is taken, beginning with the first.
    fisher: 'empirical', gradients of the ordinary backward pass; 'sampled', of labels drawn by
        sample_fisher(logits), which is to be called before every loss.backward().
    inverse: 'factored' (3) or 'eigen' (4).   weight_sharing: 'expand' or 'reduce' (10).
    loss_terms: the loss is a mean over 'samples', or over 'tokens': all positions of all samples.
        (With fisher='sampled' the logits tell, one term for each row of them.)
    kl_clip (κ): the bound of (5), with each group's current lr; None for no bound.
    grad_scaler: the torch.amp.GradScaler in use, if any; its scale is divided out of P.

    Raises ValueError for an option out of range. step() raises RuntimeError if its first batch
    passed no layer, FloatingPointError if a statistic is not finite (parameters and state stay) or
    cannot be factored (parameters stay).
    """

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=0.03, stat_decay=0.95,
                 tcov=5, tinv=50, fisher="empirical", inverse="factored", weight_sharing="expand",
                 loss_terms="samples", kl_clip=1e-3, grad_scaler=None,
                 maximize=False, foreach=None, fused=None):
        check_choices(fisher=fisher, inverse=inverse, weight_sharing=weight_sharing,
                      loss_terms=loss_terms, kl_clip=kl_clip)
        self.model, self.inverse, self.kl_clip = model, inverse, kl_clip
        self.fisher, self.reduce = fisher, weight_sharing == "reduce"
        self.calls = Calls(model, loss_terms == "tokens", fisher == "sampled", grad_scaler)
        self.layers, self.hooks, self.handles, self.steps, self.captured = {}, {}, [], 0, False
        weakref.finalize(self, remove_hooks, self.handles).atexit = False
        self.handles.append(model.register_forward_pre_hook(self.calls, with_kwargs=True))
        super().__init__(model.parameters() if params is None else params, lr=lr,
                         momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
                         maximize=maximize, foreach=foreach, fused=fused)
        values = (decoupled_weight_decay, damping, stat_decay, tcov, tinv)
        self.defaults.update(zip(OPTIONS, values))
        for group in self.param_groups:
            check_options(self.fill(group))
        # fused SGD would take a GradScaler's steps itself, the skipped ones included
        self._step_supports_amp_scaling = False
        self.find_layers()
        if not self.layers:
            warnings.warn("KFAC: no Linear or Conv2d weight of the model is among the parameters, "
                          "so all of them take the plain momentum-SGD step")

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
                    layer.outputs = OutputSide(name, layer.weight, None, layer.how, layer.blocks)
                    hooked.append((i, self.layers.setdefault(layer.weight, layer)))
            if hooked and module not in self.hooks:
                self.add_hook(module)
            if hooked:
                self.hooks[module].layers = hooked

    def add_hook(self, module):
        statistics = partial(linear_or_conv, reduce=self.reduce)
        gradients = partial(output_gram, reduce=self.reduce)
        self.hooks[module] = Hook(module, statistics, gradients, self.calls)
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
            sgd_step(self)                                                                 # (9)
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
        self.calls.on = any(layer.on for layer in self.layers.values())
        self.calls.forget()

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
        """(6) for the layers due, with the mean over the rows of all micro-batches and ranks."""
        due = [(x, group) for x, group in grouped if self.steps % group["tcov"] == 0]
        if not due:
            return
        for layer, _ in due:
            if layer.weight.grad is None:      # dropped, and no backward pass has come since
                layer.drop()
        terms = sum({call: n for layer, _ in due for call, n in layer.calls.items()}.values())
        missed = self.calls.missed
        failed = missed or not terms and any(any(layer.rows) for layer, _ in due)
        for layer, _ in due:
            layer.outputs.rows = [terms] * layer.blocks
        means, terms, failed = self.pooled(
            [side for layer, _ in due for side in (layer, layer.outputs)], failed)
        if failed:                             # on this rank or another: all raise, none waits
            raise RuntimeError(
                "KFAC: fisher='sampled' needs sample_fisher(logits) before each loss.backward(), "
                "and activation checkpointing with use_reentrant=False"
                if self.fisher == "sampled" else
                "KFAC: the number of loss terms is taken from a call of the model with a tensor, "
                "but only its parts were called, or with no tensor")
        self.captured = self.captured or any(mean is not None for mean in means)
        if not self.captured and any(layer.weight.requires_grad for layer, _ in due):
            raise RuntimeError(
                "KFAC: step() was called, but no layer it preconditions has run and received a "
                "gradient since the last zero_grad(). Was another model or a copy of it trained, "
                "was the model compiled and called before KFAC was made, did zero_grad() come "
                "between backward() and step(), or was backward() not called?")
        averages, outputs = {}, [P for P in means[1::2] if P is not None]
        if outputs and self.fisher == "empirical":
            torch._foreach_mul_(outputs, (terms / world_size()) ** 2)                     # (7)
        for (layer, group), A, P in zip(due, means[::2], means[1::2]):
            if A is None:
                continue
            state = self.state[layer.weight]
            state["updates"] = state.get("updates", 0) + 1
            for name, mean in (("covariance", A), ("output_covariance", P)):
                if name in state:
                    pairs = averages.setdefault((state["updates"], group["stat_decay"]), [])
                    pairs.append((state[name], mean))
                else:
                    state[name] = mean.clone()              # the buffer's memory is not kept
        for weights, pairs in averages.items():
            running_mean(*map(list, zip(*pairs)), *weights)

    def pooled(self, layers, failed):
        """Σ rows / number of rows, per layer; None where no rank saw any. Drops the sums.

        And the number of rows of the last one, and on how many ranks something failed.

        One flat buffer for all layers, so that ranks agree by one all-reduce, and one look at the
        buffer finds what is not finite.
        """
        like = max((layer.weight for layer in layers), key=lambda w: w.dtype == torch.float64)
        like = like.new_empty(0, dtype=at_least_float32(like))
        shapes, rows = [layer.shape for layer in layers], sum((layer.rows for layer in layers), [])
        flat = torch.cat([like.new_zeros(shape.numel()) if layer.total is None else
                          layer.total.to(like).flatten() for layer, shape in zip(layers, shapes)]
                         + [torch.tensor([*rows, failed], dtype=like.dtype, device="cpu").to(like)])
        for layer in layers:
            layer.drop()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        sums, counts = flat.split([len(flat) - len(rows) - 1, len(rows) + 1])
        ends = torch.stack([flat.amin(), flat.amax()])
        *counts, failed, least, most = torch.cat([counts, ends]).tolist()
        parts = sums.split([shape.numel() for shape in shapes])
        if not (isfinite(least) and isfinite(most)):             # nan is both
            bad = next(x for x, total in zip(layers, parts) if not total.isfinite().all())
            raise FloatingPointError(
                f"KFAC: the {bad.what} of layer {bad.name} are not finite in step {self.steps}; no "
                "parameter was changed. Lower the learning rate, or look for the overflow that "
                "caused it")
        blocks = [shape[1:].numel() for shape in shapes for _ in range(shape[0])]
        torch._foreach_div_(sums.split(blocks), [max(n, 1) for n in counts])
        firsts = accumulate((shape[0] for shape in shapes), initial=0)
        means = [part.view(shape).to(layer.weight.device, at_least_float32(layer.weight))
                 if counts[first] else None
                 for layer, shape, part, first in zip(layers, shapes, parts, firsts)]
        return means, counts[-1], failed

    def precondition_gradients(self, grouped, raw):
        """Replace p.grad by G̃ for every layer that has statistics; raw collects what was there."""
        squares = {layer: float(group["lr"]) ** 2 for layer, group in grouped}
        found, inner = [], []                          # G̃ of each stack, and η²⟨G̃, G⟩ of (5)
        for layers, damping in stacks(
                (layer, group) for layer, group in grouped if layer.weight.grad is not None
                and "updates" in self.state.get(layer.weight, {})):
            grad, bias_grad = map(joined, zip(*(layer.grads() for layer in layers)))
            new = precondition(grad, bias_grad, sum(layer.blocks for layer in layers),
                               self.solver([self.state[layer.weight] for layer in layers], damping))
            product = (new[0] * grad).reshape(len(layers), -1).sum(1)
            if bias_grad is not None:
                product = product + (new[1] * bias_grad).view(len(layers), -1).sum(1)
            torch._foreach_mul_(product.split(1), [squares[layer] for layer in layers])
            inner.append(product)
            found.append((layers, *new))
        scale = None if self.kl_clip is None or not inner else kl_scale(
            [x.to(inner[0]) for x in inner], self.kl_clip)
        for layers, *new in found:
            if scale is not None:
                new = [None if x is None else x.mul_(scale.to(x.device)) for x in new]
            replace_grads(layers, *new, raw)

    def solver(self, states, damping):
        def all_of(name):
            return joined([state[name] for state in states])
        if self.inverse == "factored":
            return partial(solve_factored, factor=all_of("factor"),
                           output_factor=all_of("output_factor"))
        return partial(solve_eigen, damping=damping, **{name: all_of(name) for name in (
            "vectors", "values", "output_vectors", "output_values")})

    def refresh(self, grouped):
        """(3) or (4) every tinv steps, or where there is none yet.

        A job is one factor of one layer. Ranks divide the jobs among them and broadcast what they
        got; the jobs of a rank that have equal shapes are done together.
        """
        due, jobs, wanted = [], [], "factor" if self.inverse == "factored" else "vectors"
        for layer, group in grouped:
            state = self.state.get(layer.weight, {})
            if "updates" in state and (self.steps % group["tinv"] == 0 or wanted not in state):
                due.append((layer, group))
                A, P, damping = state["covariance"], state["output_covariance"], group["damping"]
                pi = pi_of(A, P, layer.d, layer.outputs.d)
                jobs += [(layer, "", A, pi * damping ** 0.5, damping),
                         (layer.outputs, "output_", P, damping ** 0.5 / pi, damping)]
        if not jobs:
            return
        world = world_size()
        owners = shares([side.blocks * side.d ** 3 for side, *_ in jobs], world)
        rank = dist.get_rank() if world > 1 else 0
        results = self.decompose(jobs, [i for i, owner in enumerate(owners) if owner == rank])
        if world > 1:
            self.exchange(jobs, owners, results, rank, world)
        for i, (side, prefix, _, _, damping) in enumerate(jobs):
            failed = results[i][-1].bool()
            if prefix and self.inverse == "eigen":
                largest = results[i - 1][1].amax(1) * results[i][1].amax(1)
                failed = failed | (damping < torch.finfo(largest.dtype).eps * largest)
            if failed.any():
                raise FloatingPointError(
                    f"KFAC: the covariance of the {side.what} of layer {side.name} with damping "
                    f"{damping} is not positive definite to rounding; raise damping")
        names = ("factor",) if self.inverse == "factored" else ("vectors", "values")
        found = {}
        for i, (side, prefix, *_) in enumerate(jobs):
            found.setdefault(side.weight, {}).update(
                zip([prefix + name for name in names], results.pop(i)))
        # row-major like what is loaded, so that a resumed run rounds alike; and joined already
        for layers, _ in stacks(due):
            for name in list(found[layers[0].weight]):
                whole = torch.cat([found[layer.weight].pop(name) for layer in layers])
                for layer, part in zip(layers, whole.split(layers[0].blocks)):
                    self.state[layer.weight][name] = part

    def decompose(self, jobs, mine):
        """{job: its tensors and, per block, whether it failed} for the jobs in mine."""
        alike, results = {}, {}
        for i in mine:
            side, _, packed, *_ = jobs[i]
            alike.setdefault((side.d, len(packed), packed.dtype, packed.device), []).append(i)
        for (d, blocks, *_), stack in alike.items():
            at_once = max(1, CHUNK // (blocks * d * d))
            for k in range(0, len(stack), at_once):
                part = stack[k:k + at_once]
                A = unpack(torch.stack([jobs[i][2] for i in part]), d)     # (n, blocks, d, d)
                if self.inverse == "factored":
                    found = damped_cholesky(A, torch.stack([jobs[i][3] for i in part]))
                else:
                    found = eigenbasis(A)
                results.update(zip(part, zip(*found)))
        return results

    def exchange(self, jobs, owners, results, rank, world):
        """Each rank's results to all the others, in one flat buffer."""
        like = max((side.weight for side, *_ in jobs), key=lambda w: w.dtype == torch.float64)
        for r in range(world):
            mine = [i for i, owner in enumerate(owners) if owner == r]
            shapes = [torch.Size(shape) for i in mine for shape in self.result_shapes(jobs[i][0])]
            if r == rank:
                flat = torch.cat([x.to(like.device, at_least_float32(like)).flatten()
                                  for i in mine for x in results[i]] or [like.new_zeros(0)])
            else:
                flat = torch.empty(sum(shape.numel() for shape in shapes), device=like.device,
                                   dtype=at_least_float32(like))
            if mine:
                dist.broadcast(flat, r)
            parts = iter(flat.split([shape.numel() for shape in shapes]))
            for i in mine:     # this rank's own too: one memory layout, one rounding
                A = jobs[i][2]
                results[i] = [next(parts).view(shape).to(A.device, A.dtype)
                              for shape in self.result_shapes(jobs[i][0])]

    def result_shapes(self, side):
        """Of a side's decomposition: L, or vectors and values; and whether it failed."""
        square = (side.blocks, side.d, side.d)
        return [square, (side.blocks,)] if self.inverse == "factored" else \
            [square, (side.blocks, side.d), (side.blocks,)]

    def sample_fisher(self, logits):
        """Sample the labels of (1) from softmax(logits), and take the output gradients they give.

        logits (..., classes), from the forward pass that loss.backward() follows; one loss term for
        each row of them. It changes no .grad and keeps the graph; does nothing if no layer's
        statistics are due in this step. Draws from torch's global generator.
        """
        if self.calls.tape is None:
            raise RuntimeError("KFAC: sample_fisher() needs fisher='sampled'")
        tape = self.calls.tape
        if not tape:
            return
        logits = logits.reshape(-1, logits.shape[-1])
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(at_least_float32(logits))
            loss = F.cross_entropy(logits, draw_labels(logits.detach()), reduction="sum")
        self.calls.sampling = True
        try:
            grads = torch.autograd.grad(loss, [edge for edge, *_ in tape], retain_graph=True,
                                        allow_unused=True)
        finally:
            self.calls.sampling = False
        # the calls that the logits came from; outputs of theirs that do not reach the logits have 0
        calls = list({call: 0 for (*_, call), grad in zip(tape, grads) if grad is not None})
        for call in calls:
            call.terms = len(logits) if call is calls[0] else 0
        for (_, gram, sampled, call), grad in zip(tape, grads):
            if call in calls:
                sampled.append(gram(grad))
        self.calls.tape = [entry for entry in tape if entry[-1] not in calls]

    # ---- the rest of torch's interface ----

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.calls.missed = False
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
        self.steps = max([state.get("step", 0) for state in self.state.values()], default=0)
        for layer in self.layers.values():
            layer.drop()
        self.begin_step()

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:      # a checkpoint of torch's SGD lacks our options
            self.fill(group)
        for name, value in dict(model=None, layers={}, hooks={}, handles=[], calls=Calls(), steps=0,
                                captured=False, inverse="factored", kl_clip=None,
                                fisher="empirical", reduce=False).items():
            self.__dict__.setdefault(name, value)          # an unpickled optimizer has no model

    def __repr__(self):
        lines, size = [], 0
        for layer, group in self.grouped():
            n = sum(side.shape[-1] + side.d ** 2 + (self.inverse == "eigen") * side.d
                    for side in (layer, layer.outputs))
            n = n * layer.blocks * at_least_float32(layer.weight).itemsize
            lines.append(f"  {layer.name}: {len(layer.weight)}×{layer.d}, {layer.how}, {n:,} bytes")
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
        sizes = shape.numel(), layers[0].shape.numel(), layers[0].outputs.shape.numel()
        at_once = max(1, STACK // max(sizes))
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
            ("tinv", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more")):
        if not valid(group[name]):
            raise ValueError(f"KFAC: {name} must be {wanted}, got {group[name]}")


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_choices(kl_clip, **chosen):
    """Raise ValueError, naming the argument and its value, for what is none of the choices."""
    choices = dict(fisher=("empirical", "sampled"), inverse=("factored", "eigen"),
                   weight_sharing=("expand", "reduce"), loss_terms=("samples", "tokens"))
    for name, value in chosen.items():
        if value not in choices[name]:
            raise ValueError(f"KFAC: {name} must be one of {choices[name]}, got {value!r}")
    if kl_clip is not None and not 0 < kl_clip < float("inf"):
        raise ValueError(f"KFAC: kl_clip must be a positive number or None, got {kl_clip}")
