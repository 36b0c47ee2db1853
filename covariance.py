"""The input covariance A = E[a aᵀ] of a layer: measured, packed, factored, solved.

A is symmetric, so its lower triangle is all that is computed, averaged, sent and stored. Of a
convolution the rows a are its patches; where stride and dilation are 1, the kernel is odd and the
padding keeps the image's size, only those at the image's edges are formed (shift_gram); elsewhere
patches are copied in bounded chunks.
"""
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from patches import image_sum, patch_sum, patches
from precision import at_least_float32

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of patches at a time


def input_covariance(use, bias):
    """Σ a aᵀ over the rows a of a use, or [a; 1] with a bias: (blocks, d(d+1)/2), packed."""
    if use.kind == "conv":
        A = pack(patch_gram(use.x, use.geometry))
        return bordered(A, patch_sum(image_sum(use.x), use.geometry), use.rows) if bias else A
    a = use.x.reshape(-1, use.x.shape[-1])
    a = a.to(at_least_float32(a))                                    # (rows, d)
    A = pack(gram(a.mT[None]))
    return bordered(A, a.sum(0)[None], len(a)) if bias else A


def bordered(A, total, rows):
    """Σ [a; 1][a; 1]ᵀ, packed, from A = Σ a aᵀ, packed, and total = Σ a (blocks, d)."""
    return F.pad(torch.cat([A, total], 1), (0, 1), value=float(rows))


# ---- packed and factored ----

def pack(A):
    """The lower triangle, by rows: symmetric (..., d, d) to (..., d(d+1)/2).

    A's leading block is a leading part of it: a border (the coordinate 1 of the bias) is one more
    row at its end.
    """
    return A.flatten(-2).index_select(-1, triangle(A.shape[-1], A.device))


def unpack(packed):
    """The lower triangle (..., d, d), zero above, from (..., d(d+1)/2)."""
    d = side(packed)
    A = packed.new_zeros(*packed.shape[:-1], d * d)
    return A.index_copy_(-1, triangle(d, packed.device), packed).unflatten(-1, (d, d))


def side(packed):
    """d of (..., d(d+1)/2)."""
    return int((2 * packed.shape[-1]) ** 0.5)


def triangle(d, device):
    """Where the lower triangle's entries lie in a flattened d×d matrix, row after row."""
    i, j = torch.tril_indices(d, d, device=device)
    return i * d + j


def mean_eigenvalue(packed):
    """tr A / d of packed A: row i of its triangle has i + 1 numbers, the last on the diagonal."""
    ends = torch.arange(1, side(packed) + 1).cumsum(0) - 1
    return packed[..., ends.to(packed.device)].mean(-1)


def damped_cholesky(A, damping):
    """L with L Lᵀ = A + ρI, and for each A whether rounding forbade it.

    A (..., d, d) ⪰ 0, of which only the lower triangle is read, is overwritten; damping ρ is a
    number or (...). A ρ that vanishes beside A's trace, hence maybe beside λ₁(A), would leave the
    size of the step in A's null space to rounding errors, even where the factorisation goes
    through.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    damping = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    lost = damping < torch.finfo(A.dtype).eps * diagonal.sum(-1)
    diagonal.add_(damping.unsqueeze(-1))
    L, info = torch.linalg.cholesky_ex(A)
    return L, lost | (info != 0)


def eigenbasis(A):
    """Eigenvectors and values of A (..., d, d) ⪰ 0, and for each A whether that failed.

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


def solve_right(G, L):
    """G (L Lᵀ)⁻¹ (..., out, d): Y Lᵀ = G, then Z L = Y; from the left, G would be transposed."""
    Y = torch.linalg.solve_triangular(L.mT, G, upper=True, left=False)
    return torch.linalg.solve_triangular(L, Y, upper=False, left=False)


# ---- sums of outer products; each returns lower triangles, zero or unfinished above ----

def gram(a):
    """a aᵀ for a (..., d, n).

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


def pixel_gram(x, groups):
    """Σ a aᵀ over the pixels of x (B, C, H, W): (groups, C/groups, C/groups)."""
    a = x.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))     # (groups, C/groups, B·H·W)
    return gram(a)


def patch_gram(x, geometry):
    """Σ a aᵀ over all patches of a convolution: (groups, d, d), from x (B, C, H, W)."""
    x = x.to(at_least_float32(x))
    kernel, stride, dilation, padding, groups = geometry
    if kernel == (1, 1) and padding == ((0, 0), (0, 0)):             # its patches are pixels
        return pixel_gram(x[:, :, ::stride[0], ::stride[1]], groups)
    if stride == dilation == (1, 1) and all(
            k % 2 and ends == (k // 2, k // 2) and size >= k // 2
            for k, ends, size in zip(kernel, padding, x.shape[2:])):
        return shift_gram(x, *kernel, groups)
    numbers = x[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1])
    total = 0
    for part in x.split(max(1, CHUNK // max(1, numbers))):
        total = total + gram(patches(part, geometry))
    return total


def shift_gram(x, kh, kw, groups):
    """Σ a aᵀ over the patches of a k×k convolution, zero-padded by p = (k−1)/2, stride 1.

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
