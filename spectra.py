"""What can be computed of the second moments A and P of a layer: the formulas of the figures.

Tensors in, tensors and numbers out; probe.py measures the moments, analyze.py draws.
"""
import math
from typing import NamedTuple

import torch

import kfac
import mac
import nysact
from covariance import damped_cholesky, pack, solve_right
from flags import RECIPES


class Moments(NamedTuple):
    """Second moments of one layer."""
    A: torch.Tensor      # (d, d), the coordinate of a bias last
    P: torch.Tensor      # (out, out)
    mean: torch.Tensor   # ā (d,)
    positions: float     # rows per image; K-FAC's P is this many times P, a sum over positions
    G: torch.Tensor = None    # (out, d), the gradient of the mean loss


def top_eigenvalues(moments, count):
    """The `count` largest eigenvalues of A, P and A ⊗ P, descending, as many as there are.

    Those of A ⊗ P are all products μᵢ νⱼ; the largest `count` have i, j ≤ count.
    """
    tops = {name: torch.linalg.eigvalsh(M).flip(0)[:count].clamp(min=0)
            for name, M in (("A", moments.A), ("P", moments.P))}
    products = tops["A"][:, None] * tops["P"]
    return tops | {"A ⊗ P": products.flatten().sort(descending=True).values[:count]}


def top_cosine(A, mean):
    """|cos∠(v₁, ā)| for the top eigenvector v₁ of A (..., d, d) and ā (..., d); 0 where ā = 0."""
    v = torch.linalg.eigh(A).eigenvectors[..., -1]
    return (v * mean).sum(-1).abs() / mean.norm(dim=-1).clamp(min=torch.finfo(A.dtype).tiny)


def alignment(A, mean):
    """MAC's Proposition 4.1 on one matrix: A = ā āᵀ + Σ, how near v₁(A) is to ā, and two bounds.

    With θ = ∠(v₁, ā), x̂ = ā/‖ā‖ and Q = I − x̂x̂ᵀ: A v₁ = λ₁ v₁ projected by Q reads
    Q Σ v₁ = λ₁ Q v₁, and λ₁ ≥ ‖ā‖², so that  sin θ ≤ ‖Σ‖₂/‖ā‖²  ("bound"). Sharper, with
    b = ‖QΣx̂‖ and s = ‖QΣQ‖₂ < λ₁,  tan θ ≤ b/(λ₁ − s)  ("sharp_bound"). Both as least cosines.
    """
    mu, size = mean.square().sum(), mean.norm().clamp(min=torch.finfo(A.dtype).tiny)
    spread = A - torch.outer(mean, mean)
    x = mean / size
    Q = torch.eye(len(A), dtype=A.dtype) - torch.outer(x, x)
    norm = torch.linalg.eigvalsh(spread).abs().max()
    top, s = torch.linalg.eigvalsh(A)[-1], torch.linalg.eigvalsh(Q @ spread @ Q).abs().max()
    sine = (norm / mu).clamp(max=1) if mu > 0 else torch.ones(())
    tangent = (Q @ spread @ x).norm() / (top - s) if top > s and mu > 0 else torch.inf
    return dict(cosine=top_cosine(A, mean).item(), bound=math.sqrt(1 - sine.item() ** 2),
                sharp_bound=1 / math.sqrt(1 + float(tangent) ** 2), mean_squared=mu.item(),
                spread_spectral=norm.item(), spread_frobenius=spread.norm().item())


def contraction(gram):
    """λ_min/λ_max of a Gram matrix (n, n), 0 where it is singular to rounding; λ_min, λ_max.

    Gradient descent on ½‖u − y‖² with du/dt along −gram (u − y) and the step 1/λ_max multiplies the
    slowest component of u − y by 1 − λ_min/λ_max: 1 is one step, 0 never.
    """
    values = torch.linalg.eigvalsh((gram + gram.mT) / 2)
    low, high = values[0].item(), values[-1].item()
    return low / high if low > len(gram) * torch.finfo(gram.dtype).eps * high else 0.0, low, high


def preconditioned_grams(J, moments, first):
    """{method: J B Jᵀ} of one layer: J (n, out, d) holds the gradients of n outputs.

    B is the method's multiplier at its published damping, from the layer's moments: I, (A + ρI)⁻¹,
    the factored (P + …)⁻¹ ⊗ (A + …)⁻¹, (Â + ρI)⁻¹ at the published rank, and ρ(ā āᵀ + ρI)⁻¹, which
    is ρ(A + ρI)⁻¹ in the first layer. They act on rows, so J goes in as one tall gradient.
    """
    n, out, d = J.shape
    A, rows = moments.A[None], J.flatten(0, 1)[None]                        # (1, n·out, d)
    damping = {optim: torch.tensor([RECIPES[optim]["damping"]], dtype=A.dtype)
               for optim in ("foof", "kfac", "nysact", "mac")}
    factor = damped_cholesky(A.clone(), damping["foof"])[0]
    P = moments.P[None] * moments.positions
    factors = [damped_cholesky(M.clone(), x)[0] for M, x in zip(
        (A, P), kfac.dampings(pack(A), pack(P), damping["kfac"]))]
    S = nysact.draw_sketch(1, d, min(RECIPES["nysact"]["rank"], d), "gaussian", seed=0)
    U, values, _ = nysact.nystrom(A @ S, S)
    applied = {
        "GD": rows,
        "FOOF": solve_right(rows, factor),
        "K-FAC": torch.cat([kfac.solve_factored(G[None], *factors) for G in J]),
        "NysAct": nysact.precondition(rows, U, values, damping["nysact"].item()),
        "MAC": damping["mac"] * solve_right(rows, damped_cholesky(A.clone(), damping["mac"])[0])
        if first else mac.precondition(rows, moments.mean[None], damping["mac"].item())}
    return {name: J.flatten(1) @ BJ.reshape(n, -1).mT for name, BJ in applied.items()}


def gershgorin_discs(M):
    """Centres M_ii and radii Σ_{j≠i} |M_ij|; every eigenvalue lies in one of these discs."""
    centres = M.diagonal()
    return centres, M.abs().sum(1) - centres.abs()


def correlation(M):
    """D^(−1/2) M D^(−1/2), D the diagonal of M ⪰ 0, without the rows whose diagonal is 0."""
    diagonal = M.diagonal()
    used = diagonal > torch.finfo(M.dtype).eps * diagonal.max()
    scale = diagonal[used].rsqrt()
    return M[used][:, used] * scale[:, None] * scale


def kaiser(values):
    """How many eigenvalues of a correlation matrix exceed their mean, 1; their share of the sum."""
    kept = values > 1 + 64 * torch.finfo(values.dtype).eps * values.max()
    return int(kept.sum()), (values[kept].sum() / values.sum()).item()


def symmetric_noise(M, noise, seed=0):
    """E = Eᵀ, zero on the diagonal, entries normal with deviation noise × the mean of M's diagonal.

    Symmetric, because a covariance stays symmetric; and because eigenvalue routines for symmetric
    matrices would read one triangle of anything else. ‖E‖₂ ≈ 2·deviation·√n (semicircle law).
    """
    generator = torch.Generator().manual_seed(seed)
    E = torch.randn(M.shape, generator=generator, dtype=M.dtype).triu(1)
    return (E + E.mT) * noise * M.diagonal().mean()


def spectrum(M):
    """|fft2(M)|, frequency 0 in the middle; relative to the largest, in dB: 20 log₁₀."""
    size = torch.fft.fftshift(torch.fft.fft2(M)).abs()
    return 20 * (size / size.max()).clamp(min=1e-15).log10()


def signal_to_noise(M, noisy):
    """10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²) in dB: the diagonal of M, the upper triangle of M̂."""
    return 10 * torch.log10(M.diagonal().square().sum() / noisy.triu(1).square().sum()).item()


def cosine_bound(low, high):
    """The least cos∠(B g, g) for a symmetric B with eigenvalues in [low, high], low > 0.

    Kantorovich: 2√(low·high)/(low + high). Attained by a g with parts √high along the lowest and
    √low along the highest eigenvector; 1 where B is a multiple of the identity.
    """
    return 2 * math.sqrt(low / high) / (1 + low / high)


def principal_plane(points):
    """The plane nearest to points (n, D): centre (D,), two directions (2, D), coordinates (n, 2).

    And which share of the variance about the centre each direction holds, (2,).
    """
    centre = points.mean(0)
    _, sigma, V = torch.linalg.svd(points - centre, full_matrices=False)
    shares = sigma.square() / sigma.square().sum().clamp(min=torch.finfo(points.dtype).tiny)
    return centre, V[:2], (points - centre) @ V[:2].mT, shares[:2]
