"""NysAct: the input covariance by Nyström's approximation, from a few of its products.

Seung, Lee, Ko. "NysAct: A Scalable Preconditioned Gradient Descent using Nyström Approximation".
arXiv 2506.08360, IEEE BigData 2024.  (Numbers are this file's; the paper's are not established.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ]                          second moment of the layer's input over all rows
    (2)  Y = A S = E[a (aᵀS)]                 its sketch: S (d, r) is drawn once, A never formed
    (3)  Y ← Y + w (Y_batch − Y),  w = (1 − β)/(1 − βᵏ)       bias-corrected moving average
    (4)  Â = Y (SᵀY)⁻¹ Yᵀ = U diag(λ̂) Uᵀ      Nyström's approximation of A
    (5)  Y_ν = Y + νS,  L Lᵀ = SᵀY_ν,  Z = Y_ν L⁻ᵀ = U diag(σ) Vᵀ,  λ̂ = max(σ² − ν, 0)
    (6)  G̃ = G (Â + ρI)⁻¹ = (G − (G U) diag(λ̂/(λ̂ + ρ)) Uᵀ)/ρ
    (7)  G̃ = G (A + ρI)⁻¹                     in layers with d ≤ r: FOOF's step, exactly
    (8)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

    symbol   in code                  shape
    G        G                        (blocks, out/blocks, d); d = C/groups·kh·kw in convolutions,
                                      + 1 for bias; one block per group of a convolution, three for
                                      the q, k, v of nn.MultiheadAttention
    S        S                        (blocks, d, r), SᵀS = I; r = rank; drawn from seed and the
                                      layer's place in the model; X S: all rows' aᵀS
    Y        state "sketched"         (blocks, d, r); the paper's C̃ is (1 − βᵏ) Y
    U, λ̂     state "U", "eigenvalues" (blocks, d, r), (blocks, r): those in use
    A, its Cholesky factor            state "covariance", "factor", as in foof.py, where d ≤ r
    ν        shift                    (blocks, 1, 1)
    ρ, β     damping, stat_decay      numbers; β is the paper's β₂, tcov its τ
    k, η, μ  state "updates", lr, momentum
    R        rows                     B (linear), B·N (tokens), B·oH·oW (patches)

WHY (3). Y is linear in A: as long as S stays the same, the average of the batches' Y is the average
of their A, times S.

WHY (4). With Y = A S and A = A^½ A^½, (4) reads Â = A^½ Π A^½, where Π = A^½ S (SᵀAS)⁻¹ SᵀA^½.
Π is symmetric and Π Π = Π, so it projects, onto the range of A^½ S.
A projection has 0 ⪯ Π ⪯ I, so 0 ⪯ Â ⪯ A.
It leaves its range alone, Π A^½ S = A^½ S, so Â S = A S.
If A has rank ≤ r and S meets all of its range, Π leaves all of A^½ alone, so Â = A.
From Â ⪯ A, no eigenvalue of (Â + ρI)⁻¹(A + ρI) is below 1: no direction is damped more than its
curvature asks.
Π depends on range(S) alone; S has orthonormal columns for the sake of rounding.

WHY (5). SᵀY = SᵀAS is singular where A has rank < r, and in rounding it may be indefinite.
So take (4) for A + νI in place of A: its sketch is (A + νI) S = Y_ν.
Z Zᵀ = Y_ν L⁻ᵀ L⁻¹ Y_νᵀ = Y_ν (L Lᵀ)⁻¹ Y_νᵀ is that (4). (With L⁻¹ for L⁻ᵀ it would be another
matrix, of (LᵀL)⁻¹.)
From Z = U diag(σ) Vᵀ follows Z Zᵀ = U diag(σ²) Uᵀ, and Z was not squared to get it.
Subtracting ν takes the shift back.
An eigenvalue far below νd/r is lost to it (WHERE IT HOLDS, with ν for ε), so ν is kept at the level
of rounding.

WHY (6). U has orthonormal columns, so (Â + ρI)⁻¹ = U diag(1/(λ̂ + ρ)) Uᵀ + (I − U Uᵀ)/ρ.
Put 1/(λ̂ + ρ) = (1 − λ̂/(λ̂ + ρ))/ρ, and U Uᵀ cancels.
Times ρ it is MAC's multiplier, with U diag(λ̂) Uᵀ for its ā āᵀ.

NO PATCHES. A row a of a convolution is a patch, and aᵀS its product with r columns.
So all aᵀS together are a convolution of the input, with the columns of S as its r filters.
Σ a (aᵀS) pairs each tap's input with these outputs, over batch and positions: that is how the
weight gradient of this convolution pairs inputs with output gradients, which here are aᵀS.

WHERE IT HOLDS. Let A = κvvᵀ + εI, an outlier κ over a flat rest ε, and c = ‖Sᵀv‖² ≈ r/d.
By (4), vᵀÂv = (κ + ε)² c/(κc + ε), for κ ≫ ε about κ/(1 + εd/(κr)).
So an outlier κ ≫ εd/r is seen in full.
What is not seen takes the step 1/ρ, too long by (κ + ρ)/ρ.
Measured after 100 steps of ResNet-20 on CIFAR-10 (JPEG copy) with r = 10, ρ = 1: the sketch holds
69 to 100 % of each layer's largest eigenvalue, and (Â + ρI)⁻¹(A + ρI) has condition numbers of 1.2
to 25, down from 24 to 475 of A + ρI: `python analyze.py nystrom --dataset cifar10`.

COST per layer: statistic 4R·d·r every tcov steps, (5) O(d·r² + r³) every tinv steps, application
4·out·d·r per step, state 2d·r + r numbers; S, d·r more, is drawn again rather than saved. Where
d > r nothing is d×d, and r numbers a row stand where a patch would.

THROWN AWAY: A outside r directions; the loss's curvature in the outputs; what couples layers.

DEPARTURES from the paper, as far as it is known. It takes (4) of A + ρI, whose sketch is its
Ĉ = Y + ρS, and shifts SᵀĈ by more than ρ; here it is of A, with a tiny ν, and ρ joins in (6). Its S
is Gaussian with variance 1/d; here its columns are orthonormal. k counts the updates of the average
(⌊t/tcov⌋ would divide by zero at first).

ERRATA, against the authors' released code (figures: κ as above, ε = 0.01, ρ = 1), which
 - solves with L on the wrong side, (LᵀL)⁻¹ for (L Lᵀ)⁻¹: at d = 144, r = 50 it takes κ = 1,000 for
   more than 50,000;
 - draws a new S at each update of an average, which then mixes products with many matrices while
   (5) uses the last: Gaussian ones cancel, and Y shrinks;
 - shifts SᵀY only, and subtracts that from σ²: at d = 576, r = 10 it takes κ = 10 for 0 and κ = 100
   for about a third of it, where (5) misses 5 % and 0.6 %;
 - takes the full SVD, d×d, and stores the inverse as a d×d matrix per layer;
 - keeps each rank's statistics, and random S, to itself; here S is one, and sums are all-reduced;
 - counts steps in step() but averages in the hook, so micro-batches and skipped steps bias Y;
 - loses its state on resume, fails in half precision, ignores dilation and padding modes, and
   breaks on grouped convolutions.

USAGE
    optimizer = NysAct(model, lr=0.1, momentum=0.9, weight_decay=5e-4, rank=10)
and then zero_grad(), backward() and step() as with any torch optimizer.
"""
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from covariance import damped_cholesky, input_covariance, solve_right, unpack
from optimizer import PreconditionedSGD
from patches import pad
from precision import at_least_float32

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of X S at a time


def plain(W, S, steps, lr=0.1, momentum=0.9, weight_decay=0.0, damping=1.0, stat_decay=0.95, tcov=5,
          tinv=50):
    """The method on one weight W (out, d) with S (d, r), formula by formula; W after the steps.

    steps: for each step a function of W that returns X (R, d), the rows that met W (of an image its
    unfolded patches; a last column of ones for a bias), and G (out, d), the gradient by W.
    """
    ρ, β, μ, η = damping, stat_decay, momentum, lr
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    C̃, k, M = 0, 0, 0
    for t, step in enumerate(steps):
        X, G = step(W)
        if t % tcov == 0:
            A = X.T @ X / len(X)                                           # (1)
            C̃, k = β * C̃ + (1 - β) * A @ S, k + 1                          # (2)
            Y = C̃ / (1 - β ** k)                                           # (3)
        if t % tinv == 0:
            Â = Y @ torch.linalg.pinv(S.T @ Y, hermitian=True) @ Y.T       # (4)
            inverse = torch.linalg.inv(Â + ρ * eye)
        M = μ * M + G @ inverse + weight_decay * W                         # (6), (8)
        W = W - η * M
    return W


# ---- the sketch ----

def draw_sketch(blocks, d, r, kind, seed):
    """S (blocks, d, r) with SᵀS = I, in float64 on the CPU: the same for every device.

    'gaussian': the orthonormalised columns of a Gaussian matrix. 'subcolumns': r distinct columns
    of the identity, so that A S is r columns of A.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if kind == "gaussian":
        return torch.linalg.qr(torch.randn(
            blocks, d, r, generator=generator, dtype=torch.float64, device="cpu"))[0]
    columns = [torch.randperm(d, generator=generator, device="cpu")[:r] for _ in range(blocks)]
    S = torch.zeros(blocks, d, r, dtype=torch.float64, device="cpu")
    return S.scatter_(1, torch.stack(columns)[:, None], 1.0)              # one 1 in each column


def sketched_rows(x, S):
    """(2)  Σ a (aᵀS) over all leading dimensions of x (..., n): (blocks, d, r) as S.

    a = x, or [x; 1] where d = n + 1. Blocks differ in S alone: their columns stand side by side.
    """
    blocks, d, r = S.shape
    n = x.shape[-1]
    X, S = x.reshape(-1, n).to(S.dtype), S.transpose(0, 1).reshape(d, -1)  # (R, n), (d, blocks·r)
    XS = X @ S if d == n else torch.addmm(S[n], X, S[:n])                 # (R, blocks·r)
    total = X.mT @ XS                                                     # (2)
    if d > n:
        total = torch.cat([total, XS.sum(0, keepdim=True)])
    return total.unflatten(1, (blocks, r)).transpose(0, 1)


def sketched_patches(x, S, geometry):
    """(2)  Σ a (aᵀS) over a convolution's patches a of x (B, C, H, W): (groups, d, r) as S.

    aᵀS is a convolution with the columns of S as filters (and its last row as their bias, where
    a ends in 1), Σ a (aᵀS) its weight gradient. A bounded chunk of the batch at a time.
    """
    groups, d, r = S.shape
    shape = groups * r, x.shape[1] // groups, *geometry.kernel
    n = shape[1] * shape[2] * shape[3]                                    # d, less the bias
    filters, offset = S[:, :n].mT.reshape(shape), S[:, n].flatten() if d > n else None
    (top, bottom), (left, right) = geometry.padding
    apart = (top, left) != (bottom, right)                                # conv2d pads ends alike
    how = geometry.stride, 0 if apart else (top, left), geometry.dilation, groups
    total, chunk = 0, max(1, CHUNK // (groups * r * x.shape[2] * x.shape[3]))
    for part in x.split(chunk):
        part = (pad(part, geometry) if apart else part).to(S.dtype)
        XS = F.conv2d(part, filters, offset, *how)                        # (b, groups·r, oH, oW)
        new = conv2d_weight(part, shape, XS, *how).reshape(groups, r, n)  # (2)
        if offset is not None:
            new = torch.cat([new, XS.sum((0, 2, 3)).view(groups, r, 1)], 2)
        total = total + new.mT
    return total


# ---- what is made of it ----

def nystrom(Y, S):
    """(5)  U (blocks, d, r), λ̂ (blocks, r) with U diag(λ̂) Uᵀ = Y (SᵀY)⁻¹ Yᵀ; which have failed.

    Y = A S for some A ⪰ 0, S (blocks, d, r) orthonormal. ν = √d·ε·‖Y‖ bounds the usual rounding of
    Y. Since SᵀY = SᵀAS would be symmetric and ⪰ 0, its asymmetry and its negative eigenvalues show
    the actual rounding (of columns of A, 'subcolumns', only the second), and ν is no less than
    that; far larger, they show that Y belongs to another S.
    """
    finite = torch.finfo(Y.dtype)
    core = S.mT @ Y                                                       # (blocks, r, r)
    size, asymmetry = (torch.linalg.matrix_norm(x, keepdim=True) for x in (Y, core - core.mT))
    # r×r, in float64: float32 LAPACK gives up on some matrices with many zeros. MPS has no float64
    lowest = torch.linalg.eigvalsh(((core + core.mT) / 2).nan_to_num(0, 0, 0).cpu().double())
    rounding = torch.maximum(asymmetry, -2 * lowest[:, :1, None].to(core))
    shift = torch.maximum(Y.shape[1] ** 0.5 * finite.eps * size, 2 * rounding)
    shift = shift.clamp(min=finite.tiny ** 0.5)                           # (blocks, 1, 1): ν > 0
    Y = Y + shift * S                                                     # (5)  Y_ν
    core = S.mT @ Y
    L, info = torch.linalg.cholesky_ex((core + core.mT) / 2)              # (5)  L Lᵀ = SᵀY_ν
    Z = torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)    # (5)  Y_ν L⁻ᵀ
    failed = (info != 0) | (rounding > 1e-3 * size).flatten() | ~Z.isfinite().all(2).all(1)
    # thin, and of zeros where Z is not finite: svd would raise without the layer's name
    U, σ, _ = torch.linalg.svd(Z.nan_to_num(0, 0, 0), full_matrices=False)
    return U, (σ.square() - shift.squeeze(2)).clamp(min=0), failed


def precondition(G, U, eigenvalues, damping):
    """(6)  G̃ = (G − (G U) diag(λ̂/(λ̂ + ρ)) Uᵀ)/ρ for G (blocks, out/blocks, d)."""
    seen = (G @ U) * (eigenvalues / (eigenvalues + damping)).unsqueeze(1)  # (blocks, out/blocks, r)
    return (G - seen @ U.mT).div_(damping)


class NysAct(PreconditionedSGD):
    __doc__ = f"""{PreconditionedSGD.__doc__}
    rank (r): columns of the sketch; layers with d ≤ r are exact. sketch: 'gaussian' (orthonormal)
        or 'subcolumns' (r coordinates). seed: of the sketches, the same on all ranks. A layer keeps
        what its group had when it was found; load_state_dict takes the checkpoint's.
    """

    kinds = dict.fromkeys(("linear", "projection", "conv"), "sketched covariance")
    row_by_row = True
    checks = PreconditionedSGD.checks | dict(
        rank=(lambda v: v >= 1 and v % 1 == 0, "a whole number, 1 or more"),
        sketch=(lambda v: v in ("gaussian", "subcolumns"), "'gaussian' or 'subcolumns'"),
        seed=(lambda v: 0 <= v < 2 ** 32 and v % 1 == 0, "a whole number from 0 to 2³² − 1"))
    failure = ("the covariance of layer {name} cannot be factored with damping {damping}. Either "
               "its inputs are too large for their precision: scale them down, or raise damping. "
               "Or it was averaged with another sketch: give all ranks the same seed, and resume "
               "with the torch release that wrote the checkpoint")

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, rank=10, sketch="gaussian", seed=0, maximize=False, foreach=None,
                 fused=None):
        super().__init__(locals())

    def candidates(self):
        """Each layer knows its place in the model, however the parameters are grouped."""
        found = super().candidates()
        for place, layer in enumerate(found.values(), 1):
            layer.place = place
        return found

    def set_up(self, layer):
        """The shapes follow from the options of the layer's group, which loading replaces."""
        group = next(group for group in self.param_groups
                     if any(p is layer.weight for p in group["params"]))
        blocks, d, r = layer.blocks, layer.d, int(group["rank"])
        layer.S, seed = None, int(group["seed"]) * 2 ** 20 + layer.place
        layer.drawn_from = blocks, d, r, group["sketch"], seed
        if d <= r:
            layer.measured = {"covariance": (blocks, d * (d + 1) // 2)}
            layer.prepared = {"factor": (blocks, d, d)}
        else:
            layer.measured = {"sketched": (blocks, d, r)}
            layer.prepared = {"U": (blocks, d, r), "eigenvalues": (blocks, r)}

    def how(self, layer):
        _, d, r, kind, _ = layer.drawn_from
        return "covariance" if d <= r else f"rank {r} {kind}"

    def sketch_of(self, layer, like):
        """S, drawn when first needed: on the device of `like`, in its precision or float32."""
        dtype = at_least_float32(like)
        if layer.S is None or (layer.S.device, layer.S.dtype) != (like.device, dtype):
            layer.S = draw_sketch(*layer.drawn_from).to(like.device, dtype)
        return layer.S

    def measure(self, layer, use):
        if "covariance" in layer.measured:
            return {"covariance": input_covariance(use, layer.bias is not None)}, use.rows  # (1)
        S = self.sketch_of(layer, use.x)[use.blocks]
        total = sketched_patches(use.x, S, use.geometry) if use.kind == "conv" else \
            sketched_rows(use.x, S)
        return {"sketched": total}, use.rows                                                # (2)

    def gathered(self, layers, names):
        """With averages of A S comes the S that they were taken with; no checkpoint holds it."""
        found = super().gathered(layers, names)
        if "sketched" in found:
            found["S"] = torch.cat([self.sketch_of(layer, found["sketched"]) for layer in layers])
        return found

    def prepare(self, damping, covariance=None, sketched=None, S=None):
        if sketched is None:
            L, failed = damped_cholesky(unpack(covariance), damping)                        # (7)
            return {"factor": L}, failed
        U, eigenvalues, failed = nystrom(sketched, S)                                       # (5)
        return {"U": U, "eigenvalues": eigenvalues}, failed

    def apply(self, G, damping, factor=None, U=None, eigenvalues=None):
        if U is None:
            return solve_right(G, factor)                                                   # (7)
        return precondition(G, U, eigenvalues, damping)                                     # (6)
