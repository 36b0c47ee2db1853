"""FOOF: gradient descent on neurons, all of it in this one file.

Benzing. "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization". arXiv
2201.12250, ICML 2022.  (Numbers in parentheses are this file's own.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ]                         second moment of the layer's input over all rows
    (2)  G̃ = argmin_Δ  ½ E‖Δ a − e‖² + ½ ρ‖Δ‖²,  e = R ∂loss/∂s,  s = W a       ridge regression
    (3)  G̃ = G (A + ρI)⁻¹                    its solution
    (4)  A ← A + w (A_batch − A),  w = (1 − β)/(1 − βᵏ)       bias-corrected moving average
    (5)  convolution: A[(c,i), (c',j)] = Σ_q x_c(q) x_c'(q+j−i) − border          no patch is formed
    (6)  A + ρI = L Lᵀ,  G̃ = G L⁻ᵀ L⁻¹        factored every tinv steps, solved with every step
    (7)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

WHY (2). Let s = W a be a layer's outputs ("neurons") for its R input rows a, as if each row had a
loss of its own, whose mean is the loss: its gradient is e = R ∂loss/∂s. Gradient descent on the
outputs themselves would move each s by −η e. A step W − ηΔ moves it by −η Δ a; no Δ has Δ a = e for
all rows, so take the best in least squares, with a penalty on its size. Each output neuron (row of
Δ) is a ridge regression of its errors on the inputs, with the same A for all.

WHY (3). The derivative of (2) by Δ is Δ E[a aᵀ] − E[e aᵀ] + ρΔ, and E[e aᵀ] = Σ ∂loss/∂s aᵀ = G:
Δ (A + ρI) = G. Nothing but inputs enters: no second derivative, no labels, no second backward. Yet
it is K-FAC with the output factor P = I, and the paper's point is that K-FAC works because its
usual damping drives P there. ρ → 0 moves the outputs of each row along its own gradient as far as
the rows allow; for ρ → ∞ the step is SGD's with lr/ρ. MAC's multiplier is ρ(·)⁻¹ with ā āᵀ for A:
at lr = ρ·lr_MAC the two differ in A − ā āᵀ alone.

    symbol   in code              shape
    G        grad, bias_grad      (out, d), (out,); d = C/groups·kh·kw in convolutions, + 1 for bias
    A        state "covariance"   (blocks, d(d+1)/2): its lower triangle by rows; blocks: one per
                                  group of a convolution, three for q, k, v
    L        state "factor"       (blocks, d, d): the one in use, renewed every tinv steps
    ρ, β     damping, stat_decay  scalars;  k: state "updates";  η, μ: lr, momentum
    R        rows                 B (linear), B·N (tokens), B·oH·oW (patches)

COST per layer: statistic about R·d² every tcov steps (less by (5)), factor d³/3 every tinv steps,
application 2·out·d² per step, state 1.5·d² numbers.

THROWN AWAY: the loss's curvature in the outputs, and all that couples layers. A convolution's
positions count as rows of equal standing, and so do tokens.

ORDER AND PERIODS. The paper steps with the old inverse, then renews it every T steps, then averages
A, but only in the S steps before each inversion (its ResNets: T = 500, S = 10; Σ from 50 batches
before training). Here, as in the sibling files: average on every tcov-th step, factor on every
tinv-th, then step; the first step already uses the first batch's A.

ERRATA, against the paper and the released implementations:
 - the paper's (5), an unhalved square beside λ/2, is solved by its (6) with λ/2 for λ; (2) and (3)
   agree. Its A is a sum over the batch: its λ = 100 at batch 100 is ρ = 1, its η = 10 is lr 0.1;
 - the author's code sums A over rows for Linear and averages over the batch for convolutions, so
   one ρ means two things; here A is a mean over rows always. It trains no biases (here they are
   the coordinate 1), preconditions inside a backward hook, and ignores momentum for this method;
 - FOOF in the MAC authors' code starts its average at the identity and corrects as if from zero
   (damping ρ + 19 at first), and skips weight decay for 20·tcov steps; in the NysAct authors' it
   counts updates once per layer, and begins with the identity for an inverse. All form (A + ρI)⁻¹;
   here nothing is inverted, statistics are all-reduced and survive resume, and micro-batches pool.

USAGE
    optimizer = FOOF(model, lr=0.1, momentum=0.9, weight_decay=5e-4)    # before torch.compile runs
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""
import inspect
import warnings
import weakref
from contextlib import contextmanager
from functools import lru_cache
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

def precondition(grad, bias_grad, factor):
    """(3), (6)  G̃ = G (A + ρI)⁻¹ = G L⁻ᵀ L⁻¹ with factor = L (blocks, d, d), A + ρI = L Lᵀ.

    grad (out, ...) and bias_grad (out,) or None are split into the blocks of factor; each block of
    rows has its own A. G̃ keeps the memory layout (channels_last or not) of grad.
    """
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
    """(6)  L with L Lᵀ = A + ρI, and for each A whether rounding forbade it.

    A (..., d, d) ⪰ 0, of which only the lower triangle is read, is overwritten; damping (...). A ρ
    that vanishes beside A's trace, hence maybe beside λ₁(A), would leave the size of the step in
    A's null space to rounding errors, even where the factorisation goes through.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    lost = damping < torch.finfo(A.dtype).eps * diagonal.sum(-1)
    diagonal.add_(damping.unsqueeze(-1))
    L, info = torch.linalg.cholesky_ex(A)
    return L, lost | (info != 0)


def running_mean(old, batch, updates, stat_decay):
    """(4)  The bias-corrected averages after `updates` batches, in place on all of old.

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
    """(5)  Σ a aᵀ over the patches of a k×k convolution, zero-padded by p = (k−1)/2, stride 1.

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

def linear_or_conv(module, inputs, output, bias):
    """The rows of a Linear or Conv2d: Σ a aᵀ."""
    x = next(iter(inputs.values())).detach()
    if isinstance(module, nn.Linear):
        return [(input_gram(x, bias), [x.numel() // x.shape[-1]])]
    x = x if x.dim() == 4 else x[None]
    rows, A = len(x) * output.shape[-2] * output.shape[-1], pack(patch_gram(x, module))
    A = bordered(A, patch_sum(image_sum(x), module), rows) if bias else A
    return [(A, [rows] * module.groups)]


def multihead_attention(module, inputs, output, bias):
    """The rows of nn.MultiheadAttention's projections q, k, v: the tokens of their own input.

    out_proj takes the plain step: it is called as no module, and what it multiplies would have to
    be computed again from the attention scores.
    """
    given = [inputs[name] for name in ("query", "key", "value")]
    grams = {x: (input_gram(x, bias), [x.numel() // x.shape[-1]]) for x in dict.fromkeys(given)}
    ins = [grams[x] for x in given]
    if module.in_proj_weight is None:
        return ins
    return [(torch.cat([total for total, _ in ins]), [n for _, rows in ins for n in rows])]


class Layer:
    """One preconditioned weight: how its gradient is laid out, and this step's sums over rows."""

    def __init__(self, name, weight, bias, how, blocks=1, bias_rows=slice(None)):
        self.name, self.weight, self.how, self.blocks = name, weight, how, blocks
        self.bias, self.bias_rows = bias, bias_rows      # its part of the bias, if that is shared
        self.on = True             # does this step's batch count? Set by step(), read by the hooks
        self.backward = None       # the backward pass that brought the latest sums
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
            yield name, module, [Layer(name, module.weight, module.bias, "input covariance",
                                       getattr(module, "groups", 1))]


def attention_layers(name, module):
    """in_proj_weight as three blocks, or three weights with their thirds of the bias."""
    E, bias = module.embed_dim, module.in_proj_bias
    if module.in_proj_weight is not None:
        return [Layer(f"{name}.in_proj_weight", module.in_proj_weight, bias, "input covariance", 3)]
    return [Layer(f"{name}.{x}_proj_weight", getattr(module, f"{x}_proj_weight"), bias,
                  "input covariance", 1, slice(i * E, i * E + E)) for i, x in enumerate("qkv")]


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
                                    any(layer.bias is not None for _, layer in layers))

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

OPTIONS = ("decoupled_weight_decay", "damping", "stat_decay", "tcov", "tinv")
STATISTICS = ("covariance", "factor")
sgd_step = inspect.unwrap(torch.optim.SGD.step)   # without the step hooks, which ours already fires


class FOOF(torch.optim.SGD):
    """Momentum SGD on gradients preconditioned by (3); torch's SGD in all other ways.

    model: its Linear, Conv2d and nn.MultiheadAttention layers (but for its out_proj) whose weights
        are in the parameter groups are preconditioned; all other parameters take the plain step.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below for itself.
    lr (η), momentum (μ), nesterov, weight_decay (wd), maximize, foreach, fused: torch.optim.SGD's.
        Decay joins after preconditioning; decoupled_weight_decay takes W ← (1 − η·wd)W instead.
    damping (ρ): > 0. Large is SGD with lr/ρ; small moves every row's outputs along their gradient.
    stat_decay (β): in [0, 1), the weight of the past in (4).
    tcov: every tcov steps the batch joins the average. tinv: every tinv steps what is applied is
        refreshed from it. Both before the step is taken, beginning with the first.

    Raises ValueError for an option out of range. step() raises RuntimeError if its first batch
    passed no layer, FloatingPointError if a statistic is not finite (parameters and state stay) or
    cannot be factored (parameters stay).
    """

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, maximize=False, foreach=None, fused=None):
        self.model = model
        self.layers, self.hooks, self.handles, self.steps, self.captured = {}, {}, [], 0, False
        weakref.finalize(self, remove_hooks, self.handles).atexit = False
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
            warnings.warn("FOOF: no Linear, Conv2d or attention weight of the model is among the "
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
                "FOOF: step() was called, but no layer it preconditions has run and received a "
                "gradient since the last zero_grad(). Was another model or a copy of it trained, "
                "was the model compiled and called before FOOF was made, did zero_grad() come "
                "between backward() and step(), or was backward() not called?")
        averages = {}
        for (layer, group), mean in zip(due, means):
            if mean is None:
                continue
            state, name = self.state[layer.weight], "covariance"
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
                f"FOOF: the inputs of layer {bad} are not finite in step {self.steps}; no "
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
        for layers, _ in stacks(
                (layer, group) for layer, group in grouped if layer.weight.grad is not None
                and "updates" in self.state.get(layer.weight, {})):
            grad, bias_grad = map(joined, zip(*(layer.grads() for layer in layers)))
            factor = joined([self.state[layer.weight]["factor"] for layer in layers])
            replace_grads(layers, *precondition(grad, bias_grad, factor), raw)

    def refresh(self, grouped):
        """(6) every tinv steps, or where there is no factor yet."""
        due = []
        for layer, group in grouped:
            state = self.state.get(layer.weight, {})
            if "updates" in state and (self.steps % group["tinv"] == 0 or "factor" not in state):
                due.append((layer, group))
        for layers, damping in stacks(due):
            states = [self.state[layer.weight] for layer in layers]
            A = unpack(joined([state["covariance"] for state in states]), layers[0].d)
            factor, failed = damped_cholesky(A, A.new_full((len(A),), damping))
            if failed.any():
                bad = layers[failed.view(len(layers), -1).any(1).int().argmax()]
                raise FloatingPointError(
                    f"FOOF: the input covariance of layer {bad.name} plus damping {damping} is not "
                    "positive definite to rounding; raise damping")
            # row-major like what is loaded, so that a resumed run rounds alike
            for state, part in zip(states, factor.contiguous().split(layers[0].blocks)):
                state["factor"] = part

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
            n = layer.blocks * (layer.shape[-1] + layer.d ** 2)
            n = n * at_least_float32(layer.weight).itemsize
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
            ("tinv", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more")):
        if not valid(group[name]):
            raise ValueError(f"FOOF: {name} must be {wanted}, got {group[name]}")
