"""MAC: mean activation approximated curvature, all of it in this one file.

Seung, Lee, Ko. "MAC: An Efficient Gradient Preconditioning using Mean Activation Approximated
Curvature". arXiv 2506.08464, ICDM 2025.  (Numbers in parentheses are this file's own.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  ā = E[a]                            mean of the layer's input over all rows
    (2)  F ≈ (ā āᵀ + ρI) ⊗ I                 its Fisher block: K-FAC's A ⊗ P, P = I and A = ā āᵀ
    (3)  G̃ = ρ G (ā āᵀ + ρI)⁻¹ = G − (G ā) āᵀ / (ρ + ‖ā‖²)
    (4)  ā ← ā + w (ā_batch − ā),  w = (1 − β)/(1 − βᵏ)       bias-corrected moving average
    (5)  first layer: G̃ = ρ G (A₁ + ρI)⁻¹,  A₁ = E[a aᵀ]
    (6)  value projection of attention: ā_V = E[Xᵀ t̄] over batch and heads,  t̄ = Tᵀ1/N
    (7)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

WHY THE MEAN. Write the input rows as X = 1 āᵀ + E. The columns of E sum to zero, so
A = XᵀX/R = ā āᵀ + Σ exactly, with Σ = EᵀE/R (Proposition 4.1). Inputs of hidden layers come out of
a ReLU or GELU, and ‖ā‖² outweighs ‖Σ‖: Weyl gives ‖ā‖² ≤ λ₁(A) ≤ ‖ā‖² + ‖Σ‖ and λ₂(A) ≤ ‖Σ‖, and
projecting A v₁ = λ₁ v₁ off ā gives sin∠(v₁, ā) ≤ ‖Σ‖/‖ā‖². So one outlier eigenvalue, along ā,
carries most of A; and the eigenvalues of A, not those of P, set the scale of A ⊗ P, hence P = I.

WHY (3). Sherman-Morrison: (ā āᵀ + ρI)(I − ā āᵀ/(ρ + ‖ā‖²)) = ρI, as multiplying out shows.
The multiplier has eigenvalue ρ/(ρ + ‖ā‖²) along ā and 1 elsewhere: ρ → ∞ is SGD, ρ → 0 projects the
mean input out of the gradient. The factor ρ in front ("decoupled damping") leaves the step size to
lr alone; the plain inverse is this multiplier divided by ρ, and the same at ρ = 1.

WHY (5). Images normalised to zero mean have ā ≈ 0: there the mean says nothing, so the first layer
keeps its small exact covariance (d×d, d = 27 for a 3×3 convolution on RGB).

WHY (6). One head: O = T V with V = X W_Vᵀ and T = softmax(QKᵀ/√d_h), so O = (T X) W_Vᵀ and
G_V = (∂loss/∂O)ᵀ (T X). The rows that W_V sees are those of T X, their mean is Xᵀ t̄ with t̄ the
column means of T: the attention scores enter the curvature. Averaged over batch and heads.

    symbol   in code              shape
    G        grad, bias_grad      (out, d), (out,); d = C/groups·kh·kw in convolutions, + 1 for bias
    ā        state "mean"         (blocks, d): one row per group of a convolution, three for q, k, v
             state "applied"      the ā in use, renewed every tinv steps (none if tcov % tinv == 0)
    A₁, its Cholesky factor       state "covariance", "factor": (blocks, d, d), first layer only
    ρ, β     damping, stat_decay  scalars;  k: state "updates";  η, μ: lr, momentum
    R        rows                 B (linear), B·N (tokens), B·oH·oW (patches)

COST per layer: statistic O(numel of the input) every tcov steps (first layer 2·R·d²; attention its
scores once more, 2·B·N²·D), application 4·out·d per step (SGD touches the same out·d numbers),
state 2d numbers, and from a forward pass with statistics to step() one image of a convolution's
input. No d×d matrix but A₁.

THROWN AWAY: everything of A but its mean direction (‖Σ‖ is 0.2 to 0.9 of ‖ā‖² in early layers of a
ResNet-20, so this is not small), and all of P.

ERRATA, against the authors' released code, which
 - forms I − āāᵀ/(ρ + ‖ā‖²) as a d×d matrix per layer and multiplies with it; (3) needs no matrix;
 - scales the first layer by (A₁ + ρI)⁻¹ and the others by ρ(·)⁻¹; here ρ(·)⁻¹ everywhere;
 - averages X and T separately in (6), E[X]ᵀE[t̄]; here the mean of the products, at the same cost,
   with masks, and by thirds of qkv's own width;
 - keeps each rank's statistics to itself, so replicas drift apart; here they are all-reduced;
 - counts steps in step() but averages in the hook, so micro-batches and skipped steps bias ā;
 - loses its state on resume, ignores dilation, and breaks on grouped convolutions.
A₁ is averaged online like ā; `calibrate` fixes it by one pass over the data first, as published.

USAGE
    optimizer = MAC(model, lr=0.1, momentum=0.9, weight_decay=5e-4)     # before torch.compile runs
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
"""
import inspect
import warnings
import weakref
from collections import namedtuple
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from math import isfinite

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

MASKS = ("attn_mask", "mask", "is_causal")   # the names under which attention modules take them
CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of patches or scores at a time
STACK = 2 ** 20  # layers are joined up to this many numbers; beyond, their work outweighs launches


# ---------------------------------------------------------------------------------------------
# 1. The mathematics
# ---------------------------------------------------------------------------------------------

def precondition(grad, bias_grad, mean, damping):
    """(3)  G̃ = G − (G ā) āᵀ / (ρ + ‖ā‖²), without forming [W | b] or any matrix but G̃.

    grad (out, ...) and bias_grad (out,) or None are split into the blocks of mean (blocks, d); each
    block of rows has its own ā = [a; α], where α is the bias coordinate (1, or less where attention
    falls on added keys, or on none). Gā = G_W a + g_b α; then G_W − (Gā/s) aᵀ and g_b − (Gā/s) α.
    """
    blocks = len(mean)
    G = grad.unflatten(0, (blocks, -1))                       # (blocks, out/blocks, ...)
    d = G.shape[2:].numel()
    a, alpha = mean[:, :d], mean[:, d:]                       # (blocks, d), (blocks, 1 or 0)
    u = (G.flatten(2) @ a.unsqueeze(2)).squeeze(2)            # (blocks, out/blocks), G_W a
    if bias_grad is not None:
        u = u + bias_grad.view(blocks, -1) * alpha
    u = u / (damping + mean.square().sum(1, keepdim=True))    # G ā / (ρ + ‖ā‖²)
    # a broadcast product, so that G̃ keeps the memory layout (channels_last or not) of G
    a = a.reshape(blocks, 1, *G.shape[2:])
    new_grad = torch.addcmul(G, u.reshape(*u.shape, *[1] * (G.dim() - 2)), a, value=-1)
    new_bias = None if bias_grad is None else bias_grad - (u * alpha).flatten()
    return new_grad.flatten(0, 1), new_bias


def precondition_first(grad, bias_grad, factor, damping):
    """(5)  G̃ = ρ G (A₁ + ρI)⁻¹ = ρ G L⁻ᵀ L⁻¹, factor = L (blocks, d, d), A₁ + ρI = L Lᵀ."""
    blocks = len(factor)
    G = grad.reshape(blocks, len(grad) // blocks, -1)         # (blocks, out/blocks, d)
    if bias_grad is not None:
        G = torch.cat([G, bias_grad.view(blocks, -1, 1)], 2)
    G = damping * solve_right(G, factor)
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


def running_mean(old, batch, updates, stat_decay):
    """(4)  The bias-corrected averages after `updates` batches, in place on all of old.

    With m_k = β m_{k−1} + (1 − β) x_k, m_0 = 0, the corrected m̂_k = m_k/(1 − βᵏ) satisfies
    (1 − βᵏ) m̂_k = β(1 − βᵏ⁻¹) m̂_{k−1} + (1 − β) x_k = (1 − βᵏ − (1 − β)) m̂_{k−1} + (1 − β) x_k:
    m̂_k = m̂_{k−1} + w (x_k − m̂_{k−1}), so the corrected average itself is what is stored.
    """
    torch._foreach_lerp_(old, batch, (1 - stat_decay) / (1 - stat_decay ** updates))
    return old


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


def patches(x, conv):
    """A convolution's patches of x (B, C, H, W), by one copy: (groups, C/groups·kh·kw, B·oH·oW)."""
    x = pad(x, conv)
    for dim, k, stride, dilation in zip((2, 3), conv.kernel_size, conv.stride, conv.dilation):
        x = x.unfold(dim, dilation * (k - 1) + 1, stride)[..., ::dilation]
    rows = len(x) * x.shape[2] * x.shape[3]                          # of x (B, C, oH, oW, kh, kw)
    return x.permute(1, 4, 5, 0, 2, 3).reshape(conv.groups, -1, rows)


def patch_gram(x, conv):
    """Σ [a; 1][a; 1]ᵀ over all patches of a convolution, in bounded chunks: (groups, d, d)."""
    numbers = x[0].numel() * conv.weight[0, 0].numel() // (conv.stride[0] * conv.stride[1])
    A, rows, chunk = 0, 0, max(1, CHUNK // max(1, numbers))
    for part in x.to(at_least_float32(x)).split(chunk):
        a = patches(part, conv)                                     # (groups, d − 1, b·oH·oW)
        A, rows = A + a @ a.mT, rows + a.shape[2]
    A, sums = F.pad(A, (0, 1, 0, 1), value=float(rows)), patch_sum(image_sum(x), conv)
    A[:, -1, :-1], A[:, :-1, -1] = sums, sums
    return A


def image_sum(x):
    """Σ x over the images of a batch: (C, H, W)."""
    return x.sum(0, dtype=at_least_float32(x))


def attention_sum(q, k, scale, mask=None, causal=False, bias=None):
    """Tᵀ1 of (6): the attention that each key receives from all queries, (B, h, S).

    q (B, h, L, d_h), k (B, h, S, d_h). mask (M, h or 1, L or 1, S) is boolean (True takes part) or
    added to the scores, M = B, 1, or the number of windows of which the batch holds B/M sets; bias
    (h, L, S) is added. A chunk of the batch at a time. A query that may attend to nothing adds 0.
    """
    B, h, L, S = *q.shape[:3], k.shape[2]
    below = torch.ones(L, S, dtype=torch.bool, device=q.device).tril() if causal else None
    sums, chunk = [], max(1, CHUNK // (h * L * S))
    for i in range(0, B, chunk):
        scores = q[i:i + chunk] @ k[i:i + chunk].mT * scale
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            part = mask[torch.arange(i, i + len(scores), device=mask.device) % len(mask)]
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool \
                else scores + part
        if causal:
            scores = scores.masked_fill(~below, float("-inf"))
        sums.append(scores.softmax(-1).nan_to_num(nan=0.0).sum(2))
    return torch.cat(sums)


def value_sum(X, t):
    """Σ [Xᵀ; 1ᵀ] t over the batch, (1, d + 1), t the mean over heads of Tᵀ1: the rows T X of (6).

    The exact mean of products over batch, heads and queries; X (B, S, d), t (B, h, S or more: keys
    that the module added are no tokens, and leave the coordinate of the bias below 1).
    """
    t = t[..., :X.shape[1]].mean(1)
    return torch.cat([torch.einsum("bsd,bs->d", X, t), t.sum().view(1)])[None]


def input_sum(x):
    """Σ [a; 1] over all leading dimensions of x (..., d): (1, d + 1)."""
    total = x.reshape(-1, x.shape[-1]).sum(0, dtype=at_least_float32(x))
    return F.pad(total, (0, 1), value=x.numel() / x.shape[-1])[None]


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
#    All sums carry the coordinate 1 of the bias; a layer without a bias cuts it off. But of a
#    convolution it is the sum of its images, of which patch_sum is taken for many layers at once.
# ---------------------------------------------------------------------------------------------

def mean_input(module, inputs, output):
    """The rows of a Linear, Σ [a; 1], or the images of a Conv2d, their rows, and its geometry."""
    x = next(iter(inputs.values())).detach()
    if isinstance(module, nn.Linear):
        return [(input_sum(x), [x.numel() // x.shape[-1]])]
    x = x if x.dim() == 4 else x[None]
    geometry = Geometry(*(getattr(module, name) for name in Geometry._fields))
    return [(image_sum(x), len(x) * output.shape[-2] * output.shape[-1], geometry)]


def input_covariance(module, inputs, output):
    """The rows of the first layer, a Linear or Conv2d: Σ [a; 1][a; 1]ᵀ."""
    x = next(iter(inputs.values())).detach()
    if isinstance(module, nn.Linear):
        a = x.reshape(-1, x.shape[-1]).to(at_least_float32(x))
        a = F.pad(a, (0, 1), value=1.0)
        return [((a.mT @ a)[None], [len(a)])]
    x = x if x.dim() == 4 else x[None]
    rows = len(x) * output.shape[-2] * output.shape[-1]
    return [(patch_gram(x, module), [rows] * module.groups)]


def fused_qkv(parent, arguments, module, inputs, output):
    """The rows of a qkv Linear: tokens for q and k, T X for v. parent: the attention module.

    arguments: the MASKS of parent.forward's call. A 3-D mask belongs to the windows of a module
    with a relative position bias, to the heads of any other.
    """
    x = next(iter(inputs.values())).detach()
    X = x.flatten(1, -2) if x.dim() > 2 else x[None]                                # (B, N, D)
    X = X.to(at_least_float32(X))
    qkv = output.detach().to(X.dtype).reshape(*X.shape[:2], 3, parent.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                            # (B, h, N, d_h)
    q, k = normed(getattr(parent, "q_norm", None), q), normed(getattr(parent, "k_norm", None), k)
    scale = getattr(parent, "scale", None)
    table, bias = getattr(parent, "relative_position_bias_table", None), None
    if table is not None:
        N = X.shape[1]
        bias = table.detach()[parent.relative_position_index.view(-1)].view(N, N, -1)
        bias = bias.permute(2, 0, 1)                                                # (h, N, N)
    mask = arguments["mask"] if arguments["attn_mask"] is None else arguments["attn_mask"]
    if mask is not None and mask.dim() == 3 and bias is not None:
        mask = mask[:, None]                                                        # (M, 1, N, N)
    elif mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask is not None and (mask.shape[-1] != X.shape[1] or mask.shape[-2] not in (1, X.shape[1])):
        raise ValueError(
            f"MAC: an attention mask for {X.shape[1]} tokens must be (queries, keys), (heads, "
            f"queries, keys) or (batch, heads, queries, keys), got {tuple(mask.shape)}")
    causal = arguments["is_causal"]
    causal = getattr(parent, "is_causal", False) if causal is None else causal
    t = attention_sum(q, k, q.shape[-1] ** -0.5 if scale is None else scale, mask, causal, bias)
    tokens, rows = input_sum(X), X.shape[0] * X.shape[1]
    return [(torch.cat([tokens, tokens, value_sum(X, t)]), [rows] * 3)]


def normed(norm, y):
    """An attention module's q_norm or k_norm of y, in the dtype of its weights."""
    if norm is None:
        return y
    return norm(y.to(next((p.dtype for p in norm.parameters()), y.dtype))).to(y.dtype)


def multihead_attention(module, inputs, output):
    """The rows of nn.MultiheadAttention's projections q, k, v and out_proj.

    It calls none of them as a module, so q and k are computed here. A row of out_proj is
    concat_h(V_hᵀ t), V_h = X W_hᵀ + 1 b_hᵀ; summed over queries W_h(Xᵀt̄_h) + b_h(1ᵀt̄_h): V is not
    formed.
    """
    query, key, value, mask = attention_inputs(module, inputs)                      # (B, N, d)
    h, E, dtype = module.num_heads, module.embed_dim, query.dtype
    fused = module.in_proj_weight is not None
    W = module.in_proj_weight.chunk(3) if fused else \
        (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    b = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.to(dtype).chunk(3)
    q, k = F.linear(query, W[0].to(dtype), b[0]), F.linear(key, W[1].to(dtype), b[1])
    added = []                                                       # values of keys it adds itself
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.to(dtype).expand(len(k), 1, E)], 1)
        added.append(module.bias_v.to(dtype).view(h, -1))
    if module.add_zero_attn:
        k = F.pad(k, (0, 0, 0, 1))
        added.append(k.new_zeros(h, E // h))
    q, k = [y.unflatten(-1, (h, -1)).transpose(1, 2) for y in (q, k)]               # (B, h, N, d_h)
    mask = None if mask is None else F.pad(mask, (0, len(added)))
    t, S = attention_sum(q, k, (E // h) ** -0.5, mask), value.shape[1]              # (B, h, S + …)
    attended = torch.einsum("bsd,bhs->hd", value, t[..., :S])                       # Σ Xᵀt̄_h
    heads = torch.einsum("hed,hd->he", W[2].to(dtype).view(h, E // h, -1), attended)
    for i, v in enumerate(added):
        heads = heads + v * t[..., S + i].sum(0)[:, None]
    if b[2] is not None:
        heads = heads + b[2].view(h, -1) * t[..., :S].sum((0, 2))[:, None]
    queries, keys = query.shape[0] * query.shape[1], key.shape[0] * key.shape[1]
    sums, rows = [input_sum(query), input_sum(key), value_sum(value, t)], [queries, keys, queries]
    ins = [(torch.cat(sums), rows)] if fused else [(s, [r]) for s, r in zip(sums, rows)]
    return ins + [(F.pad(heads.reshape(1, E), (0, 1), value=float(queries)), [queries])]


def attention_inputs(module, inputs):
    """query, key, value (B, N, d) and the added mask (B or 1, h or 1, L or 1, S) or None."""
    qkv = [inputs[name].detach() for name in ("query", "key", "value")]
    batched = qkv[0].dim() == 3
    if not batched:
        qkv = [x[None] for x in qkv]
    elif not module.batch_first:
        qkv = [x.transpose(0, 1) for x in qkv]
    qkv = [x.to(at_least_float32(x)) for x in qkv]
    mask, padding = inputs.get("attn_mask"), inputs.get("key_padding_mask")
    masks = []
    if mask is not None:
        masks.append(mask[None, None] if mask.dim() == 2 else
                     mask.view(-1, module.num_heads, *mask.shape[1:]))
    if padding is not None:
        masks.append((padding if batched else padding[None])[:, None, None, :])
    # here, unlike in scaled_dot_product_attention, True means: takes no part
    masks = [torch.zeros_like(m, dtype=qkv[0].dtype).masked_fill(m, float("-inf"))
             if m.dtype == torch.bool else m for m in masks]
    return *qkv, sum(masks) if masks else None


Geometry = namedtuple("Geometry", "kernel_size stride padding dilation padding_mode groups")


class Layer:
    """One preconditioned weight: how its gradient is laid out, and this step's sums over rows."""

    def __init__(self, name, weight, bias, how, blocks=1, bias_rows=slice(None)):
        self.name, self.weight, self.how, self.blocks = name, weight, how, blocks
        self.bias, self.bias_rows = bias, bias_rows      # its part of the bias, if that is shared
        self.on = True             # does this step's batch count? Set by step(), read by the hooks
        self.backward = None       # the backward pass that brought the latest sums
        self.drop()

    @property
    def first(self):
        return self.how == "input covariance"

    @property
    def shape(self):
        d = self.weight.numel() // len(self.weight) + (self.bias is not None)
        return torch.Size((self.blocks, d, d) if self.first else (self.blocks, d))

    def drop(self):
        """Forget this step's sums."""
        self.total, self.rows, self.images = None, [0] * self.blocks, {}

    def add(self, total, rows, geometry=None):
        """Add Σ [a; 1] or, of a convolution of this geometry, the sum of its input images."""
        if geometry is not None:
            image, n = self.images.get((geometry, total.shape), (None, 0))
            total = total if image is None else total + image
            self.images[geometry, total.shape] = total, rows + n
            return
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


def add_patches(layers):
    """Turn the images of convolutions into Σ [a; 1], those of one kind by one product."""
    kinds = {}
    for layer in layers:
        for kind, (image, rows) in layer.images.items():
            found = kinds.setdefault((*kind, image.dtype, image.device), [])
            found.append((layer, image, rows))
        layer.images = {}
    for (geometry, *_), found in kinds.items():
        owners, images, rows = zip(*found)
        for layer, total, n in zip(owners, patch_sum(torch.stack(images), geometry), rows):
            if layer.bias is not None:
                total = F.pad(total, (0, 1), value=float(n))
            layer.add(total, [n] * layer.blocks)


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
    """(name, module, attention parent or None, its Layers) in modules() order, embeddings too."""
    parents, inner = {}, set()
    for name, module in model.named_modules():
        qkv, heads = getattr(module, "qkv", None), getattr(module, "num_heads", 0)
        if isinstance(qkv, nn.Linear) and heads and qkv.out_features % (3 * heads) == 0:
            parents[qkv] = module
        if isinstance(module, nn.MultiheadAttention):
            inner.add(module.out_proj)             # a Linear that is never called
            yield name, module, None, attention_layers(name, module)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield name, module, None, [Layer(name, module.weight, None, "embedding")]
        elif module in parents:
            yield name, module, parents[module], [
                Layer(name, module.weight, module.bias, "mean input, v: mean attended input", 3)]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module not in inner:
            yield name, module, None, [Layer(name, module.weight, module.bias, "mean input",
                                             getattr(module, "groups", 1))]


def attention_layers(name, module):
    """in_proj_weight as three blocks, or three weights with their thirds of the bias; out_proj."""
    E, bias, out = module.embed_dim, module.in_proj_bias, module.out_proj
    if module.in_proj_weight is not None:
        ins = [Layer(f"{name}.in_proj_weight", module.in_proj_weight, bias,
                     "mean input, v: mean attended input", 3)]
    else:
        ins = [Layer(f"{name}.{x}_proj_weight", getattr(module, f"{x}_proj_weight"), bias,
                     "mean attended input" if x == "v" else "mean input", 1,
                     slice(i * E, i * E + E)) for i, x in enumerate("qkv")]
    return ins + [Layer(f"{name}.out_proj", out.weight, out.bias, "mean input")]


def first_layer(found):
    """The network's first trainable Linear or Conv2d, if nothing else learns from its input."""
    for _, _, _, layers in found:
        if len(layers) > 1 or layers[0].how != "mean input":
            return None
        if layers[0].weight.requires_grad:
            return layers[0]
    return None


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
        inputs = dict(zip(self.names, args)) | kwargs
        if self.statistics is mean_input:        # sums, which have no need of the following
            found = mean_input(self.module, inputs, output)
        else:
            with torch.no_grad(), full_precision(output.device.type):
                found = self.statistics(self.module, inputs, output)

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


class Arguments:
    """Forward pre-hook of an attention module: keeps the masks of its call for the qkv hook.

    And not the input, nor a mask's graph, which would stay alive.
    """

    def __init__(self, module=None, layer=None):
        self.module, self.layer, self.arguments = module, layer, dict.fromkeys(MASKS)
        self.names = [] if module is None else list(inspect.signature(module.forward).parameters)

    def __reduce__(self):
        return Arguments, ()

    def __call__(self, module, args, kwargs):
        if self.module is module and self.layer.on and torch.is_grad_enabled():
            self.keep(args, kwargs)

    @torch.compiler.disable
    def keep(self, args, kwargs):
        given = dict(zip(self.names, args)) | kwargs
        for name in MASKS:
            x = given.get(name)
            self.arguments[name] = x.detach() if torch.is_tensor(x) else x


# ---------------------------------------------------------------------------------------------
# 3. The optimizer
# ---------------------------------------------------------------------------------------------

OPTIONS = ("decoupled_weight_decay", "damping", "stat_decay", "tcov", "tinv")
STATISTICS = ("mean", "applied", "covariance", "factor")
sgd_step = inspect.unwrap(torch.optim.SGD.step)   # without the step hooks, which ours already fires


class MAC(torch.optim.SGD):
    """Momentum SGD on gradients preconditioned by (3), (5) and (6); torch's SGD in all other ways.

    model: its Linear, Conv2d, fused qkv and nn.MultiheadAttention layers whose weights are in the
        parameter groups are preconditioned; all other parameters take the plain step.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below for itself.
    lr (η), momentum (μ), nesterov, weight_decay (wd), maximize, foreach, fused: torch.optim.SGD's.
        Decay joins after preconditioning; decoupled_weight_decay takes W ← (1 − η·wd)W instead.
    damping (ρ): > 0. Large is SGD, small projects the mean input out of the gradient.
    stat_decay (β): in [0, 1), the weight of the past in (4).
    tcov: every tcov steps the batch joins the average. tinv: every tinv steps what is applied is
        refreshed from it. Both before the step is taken, beginning with the first.
    input_covariance: the first layer by (5); False: by (3) like the others.

    Raises ValueError for an option out of range. step() raises RuntimeError if its first batch
    passed no layer, FloatingPointError if a statistic is not finite (parameters and state stay) or
    the input covariance cannot be factored (parameters stay).
    """

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, input_covariance=True, maximize=False, foreach=None, fused=None):
        self.model, self.input_covariance = model, input_covariance
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
            warnings.warn("MAC: no Linear, Conv2d or attention weight of the model is among the "
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
        first = None
        if self.input_covariance and not any(layer.first for layer in self.layers.values()):
            first = first_layer(found)
        for name, module, parent, layers in found:
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
                if first is not None and hooked[0][1] is first:
                    self.set_first(first)
                self.add_hook(module, parent, hooked[0][1])
            if hooked:
                self.hooks[module].layers = hooked

    def set_first(self, layer):
        layer.how = "input covariance"
        if layer.shape[-1] > 2 ** 14:
            raise ValueError(
                f"MAC: the input covariance of the first layer, {layer.name}, would be "
                f"{layer.shape[-1]}×{layer.shape[-1]}: use input_covariance=False")

    def add_hook(self, module, parent, layer):
        if isinstance(module, nn.MultiheadAttention):
            statistics = multihead_attention
        elif parent is not None:
            arguments = Arguments(parent, layer)
            self.handles.append(parent.register_forward_pre_hook(arguments, with_kwargs=True))
            statistics = partial(fused_qkv, parent, arguments.arguments)
        else:
            statistics = input_covariance if layer.first else mean_input
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
            layer.on = self.steps % group["tcov"] == 0 and not state.get("fixed", False)
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
        if not self.captured and any(layer.weight.requires_grad and layer.on for layer, _ in due):
            raise RuntimeError(
                "MAC: step() was called, but no layer it preconditions has run and received a "
                "gradient since the last zero_grad(). Was another model or a copy of it trained, "
                "was the model compiled and called before MAC was made, did zero_grad() come "
                "between backward() and step(), or was backward() not called?")
        averages = {}
        for (layer, group), mean in zip(due, means):
            state = self.state[layer.weight] if mean is not None else {}
            if mean is None or state.get("fixed"):
                continue
            name = "covariance" if layer.first else "mean"
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
        add_patches(layers)
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
                f"MAC: the inputs of layer {bad} are not finite in step {self.steps}; no "
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
            if layers[0].first:
                new = precondition_first(grad, bias_grad, states[0]["factor"], damping)
            else:
                mean = joined([state.get("applied", state["mean"]) for state in states])
                new = precondition(grad, bias_grad, mean, damping)
            replace_grads(layers, *new, raw)

    def refresh(self, grouped):
        """Bring what is applied up to date every tinv steps, or where there is nothing to apply."""
        due = []
        for layer, group in grouped:
            state = self.state.get(layer.weight, {})
            if not layer.first and group["tcov"] % group["tinv"] == 0:
                state.pop("applied", None)       # the average itself, which no other step changes
            elif "updates" in state and (self.steps % group["tinv"] == 0 or (
                    "factor" if layer.first else "applied") not in state):
                due.append((layer, group))
        for layers, damping in stacks(due):
            states = [self.state[layer.weight] for layer in layers]
            if not layers[0].first:
                means = torch.cat([state["mean"] for state in states])
                for state, mean in zip(states, means.split(layers[0].blocks)):
                    state["applied"] = mean
                continue
            factor, failed = damped_cholesky(states[0]["covariance"], damping)
            if failed.any():
                raise FloatingPointError(
                    f"MAC: the input covariance of layer {layers[0].name} plus damping {damping} "
                    "is not positive definite to rounding; raise damping")
            states[0]["factor"] = factor

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
        for layer, _ in self.grouped():
            state = self.state.get(layer.weight, {})
            if "updates" in state and ("covariance" if layer.first else "mean") not in state:
                raise ValueError(f"MAC: the checkpoint's statistics of layer {layer.name} are of "
                                 "another kind; was it saved with another input_covariance?")
        self.steps = max([state.get("step", 0) for state in self.state.values()], default=0)
        for layer in self.layers.values():
            layer.drop()
        self.begin_step()

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:      # a checkpoint of torch's SGD lacks our options
            self.fill(group)
        for name, value in dict(model=None, layers={}, hooks={}, handles=[], steps=0,
                                captured=False, input_covariance=True).items():
            self.__dict__.setdefault(name, value)          # an unpickled optimizer has no model

    def __repr__(self):
        lines, size = [], 0
        for layer, group in self.grouped():
            copies = 2 if layer.first or group["tcov"] % group["tinv"] else 1
            n = copies * layer.shape.numel() * at_least_float32(layer.weight).itemsize
            lines.append(f"  {layer.name}: {len(layer.weight)}×{layer.shape[-1]}, {layer.how}, "
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

    @torch.no_grad()
    def calibrate(self, batches):
        """Fix A₁ by one pass over the data, as published, instead of averaging it online.

        batches: input tensors, or tuples that begin with one; the mean is over the rows of all of
        them, on all ranks. The model runs without gradients up to its first layer; its buffers and
        mode stay as they are. Raises ValueError if no layer has an input covariance, or no batch.
        """
        layer, hook = next(((layer, hook) for hook in self.hooks.values()
                            for _, layer in hook.layers if layer.first), (None, None))
        if layer is None:
            raise ValueError("MAC: calibrate() has no first layer with an input covariance")

        def collect(module, args, kwargs, output):
            inputs = dict(zip(hook.names, args)) | kwargs
            with full_precision(output.device.type):
                layer.add(*input_covariance(module, inputs, output)[0])
            raise Found
        model = self.model
        while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
            model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        handle = hook.module.register_forward_hook(collect, with_kwargs=True)
        layer.drop()
        try:
            for batch in batches:
                x = batch[0] if isinstance(batch, (tuple, list)) else batch
                try:
                    model(x.to(layer.weight.device))
                except Found:
                    pass
        except BaseException:
            layer.drop()
            raise
        finally:
            handle.remove()
            for buffer, value in buffers:
                buffer.copy_(value)
        (covariance,) = self.pooled([layer])
        if covariance is None:
            raise ValueError("MAC: calibrate() got no batch")
        state = self.state[layer.weight]
        state.pop("factor", None)
        state.update(covariance=covariance, updates=1, fixed=True)
        self.begin_step()


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


class Found(Exception):
    """Ends a forward pass at the layer that calibrate() looks at."""


def check_options(group):
    """Raise ValueError, naming the argument and its value, for what the step cannot use."""
    for name, valid, wanted in (
            ("damping", lambda v: 0 < v < float("inf"), "a positive number"),
            ("stat_decay", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("tcov", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more"),
            ("tinv", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more")):
        if not valid(group[name]):
            raise ValueError(f"MAC: {name} must be {wanted}, got {group[name]}")
