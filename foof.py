"""FOOF: gradient descent on neurons.

Benzing. "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization". arXiv
2201.12250, ICML 2022.  (Numbers are this file's; the paper's own stand behind a P.)

THE UPDATE, for every Linear and Conv2d, with G the gradient of its weight (bias as last column):

    (1)  A = E[a aᵀ]                         second moment of the layer's input over all rows
    (2)  G̃ = argmin_Δ  ½ E‖Δ a − e‖² + ½ ρ‖Δ‖²,  e = R ∂loss/∂s,  s = W a           (P5, halved)
    (3)  G̃ = G (A + ρI)⁻¹                    its solution                           (P6)
    (4)  A ← A + w (A_batch − A),  w = (1 − β)/(1 − βᵏ)       bias-corrected moving average
    (5)  A + ρI = L Lᵀ,  G̃ = G L⁻ᵀ L⁻¹        factored every tinv steps, solved with every step
    (6)  M ← μM + (G̃ + wd·W),  W ← W − ηM                     torch's momentum SGD

    symbol   in code                  shape
    G        G                        (blocks, out/blocks, d); d = C/groups·kh·kw in convolutions,
                                      + 1 for bias; one block per group of a convolution, three for
                                      the q, k, v of nn.MultiheadAttention
    A        state "covariance"       (blocks, d(d+1)/2): its lower triangle by rows
    L        state "factor"           (blocks, d, d): the one in use
    ρ, β     damping, stat_decay      numbers;  k: state "updates", this one included
    η, μ     lr, momentum             numbers
    R        rows                     B (linear), B·N (tokens), B·oH·oW (patches)

WHY (2). Let s = W a be a layer's outputs ("neurons") for its R input rows a.
As if each row had a loss of its own, whose mean is the loss, its gradient is e = R ∂loss/∂s.
Gradient descent on the outputs themselves would move each s by −η e.
A step W − ηΔ moves it by −η Δ a.
In general no Δ has Δ a = e for all rows, so take the best in least squares, and penalise its size.
Each output neuron (row of Δ) is then a ridge regression of its errors on the inputs.

WHY (3). The derivative of (2) by Δ is Δ E[a aᵀ] − E[e aᵀ] + ρΔ.
E[e aᵀ] = Σ ∂loss/∂s aᵀ = G, so where the derivative is zero, Δ (A + ρI) = G.
Beside G nothing but inputs enters: no second derivative, no sampled labels, no second backward.
Yet it is K-FAC with P = I for its output factor; the paper's point is that K-FAC works because its
usual damping drives P there.
ρ → 0 moves the outputs of each row along its own gradient as far as the rows allow.
ρ → ∞ gives SGD's step with lr/ρ.
MAC's multiplier is ρ(ā āᵀ + ρI)⁻¹: at lr = ρ·lr_MAC and wd = wd_MAC/ρ a layer's two steps differ
in A − ā āᵀ alone (its first layer, and what takes the plain step, apart).

COST per layer: statistic R·d² to 2·R·d² every tcov steps, factor d³/3 every tinv steps, application
2·out·d² per step, state 1.5·d² numbers. For a convolution with stride and dilation 1, odd kernel
and "same" padding only the patches at the image's edges are formed: covariance.py, shift_gram.

THROWN AWAY: the loss's curvature in the outputs, and all that couples layers. A convolution's
positions count as rows of equal standing, and so do tokens.

DEPARTURES. The paper steps with the old inverse, then renews it every T steps, then averages A, but
only in the S steps before each inversion (its ResNets: T = 500, S = 10; A from 50 batches before
training). Here, as in the sibling files: average on every tcov-th step, factor on every tinv-th,
then step; the first step already uses the first batch's A.

ERRATA, against the paper and the released implementations:
 - P5, an unhalved square beside λ/2, is solved by P6 with λ/2 for λ; (2) and (3) agree. The paper's
   A is a sum over the batch: its λ = 100 at batch 100 is ρ = 1, its η = 10 is lr 0.1;
 - the author's code sums A over rows for Linear and averages over the batch for convolutions, so
   one ρ means two things; here A is a mean over rows always. It trains no biases (here they are
   the coordinate 1), preconditions inside a backward hook, and ignores momentum for this method;
 - FOOF in the MAC authors' code starts its average at the identity and corrects as if from zero
   (damping ρ + 19 at first), and skips weight decay for 20·tcov steps; in the NysAct authors' it
   counts updates once per layer, and begins with the identity for an inverse. All form (A + ρI)⁻¹;
   here nothing is inverted.

USAGE
    optimizer = FOOF(model, lr=0.1, momentum=0.9, weight_decay=5e-4)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
"""
import torch

from covariance import damped_cholesky, input_covariance, solve_right, unpack
from optimizer import PreconditionedSGD


def plain(W, steps, lr=0.1, momentum=0.9, weight_decay=0.0, damping=1.0, stat_decay=0.95, tcov=5,
          tinv=50):
    """The method on one weight W (out, d), formula by formula; returns W after the steps.

    steps: for each step a function of W that returns X (R, d), the rows that met W (of an image its
    unfolded patches; a last column of ones for a bias), and G (out, d), the gradient by W.
    """
    ρ, β, μ, η = damping, stat_decay, momentum, lr
    eye = torch.eye(W.shape[1], dtype=W.dtype)
    sums, k, M = 0, 0, 0
    for t, step in enumerate(steps):
        X, G = step(W)
        if t % tcov == 0:
            sums, k = β * sums + (1 - β) * X.T @ X / len(X), k + 1
            A = sums / (1 - β ** k)                                        # (1), (4)
        if t % tinv == 0:
            inverse = torch.linalg.inv(A + ρ * eye)
        M = μ * M + G @ inverse + weight_decay * W                         # (3), (6)
        W = W - η * M
    return W


class FOOF(PreconditionedSGD):
    __doc__ = PreconditionedSGD.__doc__

    kinds = dict.fromkeys(("linear", "projection", "conv"), "input covariance")
    row_by_row = True
    failure = ("the input covariance of layer {name} plus damping {damping} is not positive "
               "definite to rounding; raise damping")

    def __init__(self, model, *, params=None, lr=0.1, momentum=0.9, nesterov=False,
                 weight_decay=0.0, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95,
                 tcov=5, tinv=50, maximize=False, foreach=None, fused=None):
        super().__init__(locals())

    def set_up(self, layer):
        d = layer.d
        layer.measured = {"covariance": (layer.blocks, d * (d + 1) // 2)}
        layer.prepared = {"factor": (layer.blocks, d, d)}

    def measure(self, layer, use):
        return {"covariance": input_covariance(use, layer.bias is not None)}, use.rows     # (1)

    def prepare(self, damping, covariance):
        L, failed = damped_cholesky(unpack(covariance), damping)                           # (5)
        return {"factor": L}, failed

    def apply(self, G, damping, factor):
        return solve_right(G, factor)                                                      # (5)
