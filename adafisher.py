"""AdaFisher and AdaFisherW: Adam with a diagonal Fisher matrix for its second moment, in one file.

Gomes, Zhang, Belilovsky, Wolf, Hosseini. "AdaFisher: Adaptive Second Order Optimization via Fisher
Information". arXiv 2405.16397, ICLR 2025.  (Numbers in parentheses are this file's own.)

THE UPDATE, for every Linear and Conv2d, rows h̄ = [h; 1] of its input and s = ∂loss/∂output of each
sample, and for every normalisation layer z = ν ⊙ h + b, h its normalised input:

    (1)  H = E[h̄ ⊙ h̄],  S = E[s ⊙ s]        diagonals of K-FAC's two factors, over all rows
    (2)  z = ν ⊙ h + b:  H = E[h ⊙ h],  S as in (1);  F_ν = H ⊙ S,  F_b = S       (Proposition 3.1)
    (3)  H ← H + w (H_batch − H),  w = (1 − γ)/(1 − γᵏ),  and S likewise      bias-corrected average
    (4)  v′ = (v − min v)/(max v − min v) of each factor;  0 where max v = min v
    (5)  F̃ = λ + S′ H′ᵀ for [W | b],  λ + H′ ⊙ S′ for ν,  λ + S′ for b,  1 for what has no layer
    (6)  m̂ ← m̂ + w (g − m̂),  w = (1 − β)/(1 − βᵗ)              bias-corrected first moment
    (7)  AdaFisher:  θ ← θ − α m̂/F̃, the gradient g with wd·θ in it     (entry by entry, no root)
         AdaFisherW: θ ← θ − α (m̂/F̃ + wd·θ)

WHY NO ROOT. Adam's denominator is the root of a second moment of g; F̃ stands for the Fisher matrix
itself, and a natural gradient divides by the matrix and not by its root.

WHY AN OUTER PRODUCT. K-FAC's block is H ⊗ S, and the gradient of one row is s h̄ᵀ: entry (o, i) of
[W | b] meets S_o H_i on the diagonal. So F̃ is S′ H′ᵀ + λ in the weight's own shape; it is formed
for the division and forgotten, and the Kronecker product never exists.

WHAT (4) DOES. Every F̃ lies in [λ, 1 + λ], and that of [W | b] reaches both ends, whatever the
curvature. The smallest S_o and the smallest H_i give a whole row and a whole column of [W | b]
F̃ = λ: momentum SGD of step α/λ there. Positive factors of H or S cancel, so
neither the loss's scale nor the definition of s (per sample or of the mean loss) matters but for
the average; with s counted times the number of rows they do not matter there either. A factor
that is constant up to rounding (a dead layer, one channel) carries no information: v′ = 0, F̃ = λ.

WITHOUT A LAYER: embeddings, positional embeddings, class tokens, nn.MultiheadAttention (it calls
none of its projections as a module), layers of other kinds (1-D, 3-D and transposed convolutions,
RMSNorm, InstanceNorm), every raw parameter, a weight used by layers of two kinds or shared with an
embedding, a bias that is not in the groups together with its weight's
layer, and a layer that has not run in a statistics step. They get F̃ = 1, which is the paper's
identity for unsupported layers and its initial F: bias-corrected momentum of step α. That is a
small step beside the α/λ that flat directions of a layer get; for F̃ = λ give such parameters a
group of their own with lr = α/λ.

    symbol   in code              shape
    H        state "H"            (blocks, d): one row per group of a convolution; d = in or
                                  C/groups·kh·kw, + 1 for bias; (1, C) of a normalisation layer
                                  (of BatchNorm H − 1, see batch_norm_sum)
    S        state "S"            (out,) or (C,), of s = R·∂(mean loss)/∂output
    S′, H′   curvature            (blocks, out/blocks, 1, ...) and (blocks, 1, C/groups, kh, kw)
    m̂, t     "momentum_buffer", "moments"   both in state: like θ;  steps in which θ had a gradient
    γ, β, λ  gamma, beta, damping           scalars;  k: state "updates";  α, wd: lr, weight_decay
    R        rows                 B (linear), B·N (tokens), B·oH·oW (convolution; BatchNorm alike)

COST per layer: statistic O(numel of input and output) every tcov steps, application 2·out·d per
step for forming F̃ beside Adam's own; state out + d numbers, and m̂ (Adam has two such).

THROWN AWAY: everything of H and S off their diagonals, which is most of them (for images the
inputs of a convolution are far from uncorrelated), and by (4) the size of what is left. (2) drops
the terms between positions and between ν and b: with h = s = 1 at two positions the exact F_ν is 4
and (2) gives 1.

DEPARTURES from the paper. Algorithm 1 refreshes H and S in every step: tcov=1. Here the default is
the 100 of the released code, the published recipes' value. Left open by the paper and
read so: γ weighs the past; the average starts from the first batch; F_b has no H′ (min-max of its
constant ones would be 0/0); the groups of a convolution share one min-max; GroupNorm takes (2)
like LayerNorm. s comes from the training labels: H and S are of the empirical Fisher.
A finding: BatchNorm's h has E[h²] = σ²/(σ² + ε), 1 but for ε. (4) stretches this to [0, 1], so a
BatchNorm's H′ ranks its channels by input variance and by nothing else.

ERRATA, against the authors' released code, which
 - averages with 0.1γ·old + 0.01γ·new, no average: a constant 1 settles at 1/115 for γ = 0.8, and
   92 % of the weight is the last batch's;
 - min-maxes each batch before it enters this average (the paper: after), with an absolute ε = 1e-6
   under which most S of a mean loss vanish: results depend on loss scale and batch size.
   as_released=True gives both, from H = S = 1: F̃ = λ + S Hᵀ. What follows, on networks where every
   parameter has a layer (ResNets with BatchNorm): S and H lie in [0.080, 0.088] after the first
   refresh and in [0, 1/115] in the end, so F̃ is nearly constant: largest over smallest 1.18, 1.18,
   1.08, ... 1.076. The update is bias-corrected momentum SGD of step α/λ after a hidden warm-up
   (α/F̃ = 0.12α/λ to 0.9α/λ to α/λ over two refreshes). With r the ratio, the cosine between update
   and m̂ is at least 2√r/(1 + r) (Kantorovich): 0.9965 at the first refresh, 0.9992 at the third,
   0.9993 in the end. Measured with ResNet-20 on CIFAR-10: at least 0.9994 with the released code,
   0.9990 with as_released here, which keeps (2); with (3) and (4) 0.2 to 0.6. So compare with SGD
   of a tuned step before crediting the curvature;
 - gives BatchNorm and LayerNorm two numbers, one of which min-max makes 0, instead of (2);
 - divides H of a convolution by its patch length too, pools groups, ignores dilation;
 - matches parameters to layers by position: in Transformers many are never updated (16 of 26.6
   million weights of its Swin), others get a neighbour's F̃;
 - sees gradients times a GradScaler's factor, turns an overflow into 1; counts every micro-batch as
   a refresh; forbids in-place operations; all-reduces each layer in each step.

USAGE
    optimizer = AdaFisher(model, lr=1e-3, weight_decay=5e-4)            # before torch.compile runs
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
from math import isfinite

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------
# 1. The mathematics
# ---------------------------------------------------------------------------------------------

def min_max(v):
    """(4)  v′ = (v − min v)/(max v − min v), all entries of v together; 0 if v is constant.

    Constant means a spread of at most 16 roundings of the largest entry: stretched to [0, 1] it
    would be noise. The bound is relative, so a positive factor on v changes nothing.
    """
    low, high = v.amin(), v.amax()
    spread, largest = high - low, torch.maximum(high, -low)
    return torch.where(spread > 16 * torch.finfo(v.dtype).eps * largest, (v - low) / spread, 0.0)


def running_mean(old, batch, updates, gamma):
    """(3), (6)  The bias-corrected averages after `updates` batches, in place on all of old.

    With m_k = γ m_{k−1} + (1 − γ) x_k, m_0 = 0, the corrected m̂_k = m_k/(1 − γᵏ) satisfies
    (1 − γᵏ) m̂_k = γ(1 − γᵏ⁻¹) m̂_{k−1} + (1 − γ) x_k = (1 − γᵏ − (1 − γ)) m̂_{k−1} + (1 − γ) x_k:
    m̂_k = m̂_{k−1} + w (x_k − m̂_{k−1}), so the corrected average itself is what is stored.
    """
    torch._foreach_lerp_(old, batch, (1 - gamma) / (1 - gamma ** updates))
    return old


def released_mean(old, batch, gamma):
    """What the released code does for (3) and (4), in place on old, which begins as ones."""
    low, high = batch.amin(), batch.amax()
    return old.mul_(0.1 * gamma).add_((batch - low) / (high - low + 1e-6), alpha=0.01 * gamma)


def outer_factors(H, S, shape):
    """(5)  S′ and H′ shaped to broadcast to S′ H′ᵀ for a weight of this shape; the bias's column.

    H (blocks, d), S (out,). Returns (blocks, out/blocks, 1, ...), (blocks, 1, *shape[1:]) and
    (out,), or None if d has no coordinate of a bias.
    """
    blocks, d = len(H), shape[1:].numel()
    S = S.view(blocks, -1)                                    # (blocks, out/blocks)
    bias = (S * H[:, d:]).flatten() if H.shape[1] > d else None
    H = H[:, :d].reshape(blocks, 1, *shape[1:])
    return S.reshape(*S.shape, *[1] * (len(shape) - 1)), H, bias


def row_squares(x):
    """Σ x² over the rows of x (rows, d), or the images of x (N, ...)."""
    return x.to(at_least_float32(x)).square().sum(0)


def channel_squares(x):
    """Σ x² of x (N, C, ...) over all but the channels: (C,); image by image, the memory's order."""
    x = x.reshape(*x.shape[:2], -1)
    return torch.linalg.vector_norm(x, dim=2, dtype=at_least_float32(x)).square().sum(0)


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


def batch_norm_sum(x, norm):
    """(2)  Σ (h² − 1) over the rows of BatchNorm's input x (N, C, ...), per channel: (C,).

    With batch mean μ and variance σ², and m and v those it normalises by (the same when training),
    E[(x − m)²]/(v + ε) − 1 = (σ² − v + (μ − m)² − ε)/(v + ε). Min-max does not see the 1; left in,
    float32 would round away what makes the channels differ, −ε/(σ² + ε) when training.
    (SyncBatchNorm's v is that of all ranks; here each rank's own stands in for it.)
    """
    x = x.reshape(*x.shape[:2], -1).to(at_least_float32(x))
    rows = x.numel() // x.shape[1]
    mean = x.sum((0, 2)) / rows
    var = channel_squares(x - mean[:, None]) / rows
    m, v = mean, var
    if not norm.training and norm.running_mean is not None:
        m, v = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
    return rows * (var - v + (mean - m).square() - norm.eps) / (v + norm.eps)


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
# 2. Capture: what each kind of module gives its layer: sums over rows of h̄² and of s².
#    All sums carry the coordinate 1 of the bias; a layer without a bias cuts it off.
# ---------------------------------------------------------------------------------------------

def input_squares(module, inputs, output):
    """(1), (2)  Σ h̄ ⊙ h̄ over the rows of a module's input, (blocks, d + 1) or (1, C); rows."""
    x = next(iter(inputs.values())).detach()
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        return F.pad(row_squares(x), (0, 1), value=float(len(x)))[None], len(x)
    if isinstance(module, nn.Conv2d):
        # padding copies pixels or adds zeros, so the squares of patches are the patches of squares
        x = x if x.dim() == 4 else x[None]
        rows = len(x) * output.shape[-2] * output.shape[-1]
        squares = patch_sum(row_squares(x), module)
        return F.pad(squares, (0, 1), value=float(rows)), rows
    if isinstance(module, BATCH_NORM):
        total = batch_norm_sum(x, module)
    elif isinstance(module, nn.LayerNorm):
        h = F.layer_norm(x.to(at_least_float32(x)), module.normalized_shape, eps=module.eps)
        total = row_squares(h.reshape(-1, module.weight.numel()))
    else:
        h = F.group_norm(x.to(at_least_float32(x)), module.num_groups, eps=module.eps)
        total = channel_squares(h)
    return total[None], x.numel() // total.numel()


def output_squares(module, s, scale=1.0):
    """(1)  Σ s ⊙ s over the rows of a module's output gradient, scale divided out: (out,), (C,)."""
    if scale != 1.0:                 # before squaring: the square of a scaled gradient may overflow
        s = s.to(at_least_float32(s)) / scale
    if isinstance(module, (nn.Linear, nn.LayerNorm)):
        last = module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
        return row_squares(s.reshape(-1, last))
    unbatched = isinstance(module, nn.Conv2d) and s.dim() == 3
    return channel_squares(s[None] if unbatched else s)


class Layer:
    """One preconditioned weight: how its gradient is laid out, and this step's sums over rows."""

    def __init__(self, name, weight, bias, how, blocks=1):
        self.name, self.weight, self.how, self.blocks = name, weight, how, blocks
        self.bias = bias
        self.on = True             # does this step's batch count? Set by step(), read by the hooks
        self.backward = None       # the backward pass that brought the latest sums
        self.drop()

    @property
    def shapes(self):
        """The shapes of H and S."""
        out, n = len(self.weight), self.weight.numel()
        if self.how == "per channel":
            return torch.Size((1, n)), torch.Size((n,))
        return torch.Size((self.blocks, n // out + (self.bias is not None))), torch.Size((out,))

    @property
    def sizes(self):
        return [shape.numel() for shape in self.shapes]

    def drop(self):
        """Forget this step's sums."""
        self.total, self.rows = None, 0

    def add(self, H, S, rows):
        if H.shape != self.shapes[0]:
            H = H[:, :self.shapes[0][1]]               # the coordinate of a bias that it lacks
        total = torch.cat([H.flatten(), S])
        self.total = total if self.total is None else total + self.total
        self.rows += rows


BATCH_NORM = nn.modules.batchnorm._BatchNorm           # BatchNorm1d, 2d, 3d and SyncBatchNorm


def known_modules(model):
    """(name, module, its Layers) in modules() order, those that take F̃ = 1 too."""
    inner = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inner.add(module.out_proj)             # a Linear that is never called
            yield name, module, [Layer(name, module.out_proj.weight, None, "plain")]
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield name, module, [Layer(name, module.weight, None, "plain")]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and module not in inner:
            yield name, module, [Layer(name, module.weight, module.bias, "outer product",
                                       getattr(module, "groups", 1))]
        elif isinstance(module, (BATCH_NORM, nn.LayerNorm, nn.GroupNorm)) \
                and module.weight is not None:
            yield name, module, [Layer(name, module.weight, module.bias, "per channel")]


class Hook:
    """Forward hook of one module; layers holds (index into its statistics, Layer).

    A copied or unpickled model gets an inert one, so a copy feeds nothing.
    """

    def __init__(self, module=None, statistics=None, scale=None):
        self.module, self.statistics, self.layers, self.scale = module, statistics, [], scale
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
            H, rows = self.statistics(self.module, dict(zip(self.names, args)) | kwargs, output)

        def arrived(s):
            # Only a forward that is backpropagated counts. Where an earlier backward pass left no
            # gradient, zero_grad on the model has dropped it, and so are the sums that it left.
            backward = torch._C._current_graph_task_id()
            S = output_squares(self.module, s.detach(), self.scale.of(backward))
            for _, layer in layers:
                if layer.weight.grad is None and layer.backward != backward:
                    layer.drop()
                layer.backward = backward
                layer.add(H, S, rows)
        # A Linear's output on more than two dimensions is a view; an in-place activation replaces
        # the view's history, and a hook on it would never fire. Its base sees the gradient always.
        (output._base if output._is_view() else output).register_hook(arrived)


class Scale:
    """A GradScaler's factor, read once in each backward pass: the read waits for the GPU."""

    def __init__(self, grad_scaler):
        self.grad_scaler, self.backward, self.value = grad_scaler, None, 1.0

    def of(self, backward):
        if self.grad_scaler is not None and backward != self.backward:
            self.backward, self.value = backward, self.grad_scaler.get_scale()
        return self.value


# ---------------------------------------------------------------------------------------------
# 3. The optimizer
# ---------------------------------------------------------------------------------------------

OPTIONS = ("lr", "beta", "weight_decay", "damping", "gamma", "tcov", "as_released", "maximize")
STATISTICS = ("H", "S")


class AdaFisher(torch.optim.Optimizer):
    """Momentum divided by a diagonal Kronecker-factored Fisher matrix, (7); weight decay coupled.

    model: its Linear, Conv2d, BatchNorm, LayerNorm and GroupNorm layers whose weights are in the
        parameter groups get their F̃; all other parameters take the plain step, with F̃ = 1.
        `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below, but grad_scaler, for itself.
    lr (α); beta (β): in [0, 1), the weight of the past in the first moment (6).
    weight_decay (wd): added to the gradient, so it passes through (6) and is divided by F̃. See
        AdaFisherW.
    damping (λ): > 0. The step along flat directions is α/λ, along the sharpest α/(1 + λ).
    gamma (γ): in [0, 1), the weight of the past in (3).
    tcov: every tcov steps, beginning with the first, the batch joins the averages and F̃ is made
        anew, before the step is taken. 1 as in the paper, 100 as in its experiments.
    as_released: the released code's moving average and order of min-max (see ERRATA).
    maximize: ascend instead of descending.
    grad_scaler: the torch.amp.GradScaler in use, if any; its scale is divided out of s.

    Raises ValueError for an option out of range. step() raises RuntimeError if its first batch
    passed no layer, FloatingPointError if a statistic is not finite; parameters and state stay.
    """

    decoupled = False

    def __init__(self, model, *, params=None, lr=1e-3, beta=0.9, weight_decay=0.0, damping=1e-3,
                 gamma=0.8, tcov=100, as_released=False, maximize=False, grad_scaler=None):
        values = (lr, beta, weight_decay, damping, gamma, tcov, as_released, maximize)
        super().__init__(model.parameters() if params is None else params,
                         dict(zip(OPTIONS, values)))
        for group in self.param_groups:
            check_options(group)
        self.model, self.scale, self.curvature = model, Scale(grad_scaler), {}
        self.layers, self.hooks, self.handles, self.steps, self.captured = {}, {}, [], 0, False
        weakref.finalize(self, remove_hooks, self.handles).atexit = False
        self.find_layers()
        if not self.layers:
            warnings.warn("AdaFisher: no Linear, Conv2d or normalisation weight of the model is "
                          "among the parameters, so all of them take the plain step with F̃ = 1")

    def fill(self, group):
        for name in OPTIONS:
            group.setdefault(name, self.defaults[name])
        return group

    def add_param_group(self, param_group):
        ready = hasattr(self, "layers")        # not while torch's constructor adds the first groups
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
                owners.setdefault(layer.bias, set()).add(layer.weight)
        for name, module, layers in found:
            hooked = []
            for i, layer in enumerate(layers):
                same = uses[layer.weight]         # of one kind, or else it takes the plain step
                if layer.weight in given and layer.how != "plain" \
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
        self.hooks[module] = Hook(module, input_squares, self.scale)
        self.handles.append(module.register_forward_hook(self.hooks[module], with_kwargs=True))

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure=None):
        """Statistics, F̃, moments, step. p.grad stays as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_statistics(self.grouped())
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(group, params)
        self.steps += 1
        self.begin_step()
        return loss

    def begin_step(self):
        """Tell the hooks whether the coming step's batch counts; note the step in the state."""
        for layer, group in self.grouped():
            layer.on = self.steps % group["tcov"] == 0
        for state in self.state.values():
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
        """(3) for the layers due, with the mean over the rows of all micro-batches and ranks."""
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
                "AdaFisher: step() was called, but no layer it preconditions has run and received "
                "a gradient since the last zero_grad(). Was another model or a copy of it trained, "
                "was the model compiled and called before AdaFisher was made, did zero_grad() come "
                "between backward() and step(), or was backward() not called?")
        # a rank's loss counts 1/W in the mean loss
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        averages, changed = {}, []
        for (layer, group), mean in zip(due, means):
            if mean is None:
                continue
            H, S, rows = mean
            S = S * ((1 if group["as_released"] else rows) / ranks) ** 2
            state = self.state[layer.weight]
            state["updates"] = state.get("updates", 0) + 1
            changed.append((layer, group, state))
            for name, batch in (("H", H), ("S", S)):
                if group["as_released"]:
                    old = state.get(name, torch.ones_like(batch))
                    state[name] = released_mean(old, batch, group["gamma"])
                elif name in state:
                    pairs = averages.setdefault((state["updates"], group["gamma"]), [])
                    pairs.append((state[name], batch))
                else:
                    state[name] = batch.clone()             # the buffer's memory is not kept
        for weights, pairs in averages.items():
            running_mean(*map(list, zip(*pairs)), *weights)
        for layer, group, state in changed:
            self.refresh(layer, group, state)

    def pooled(self, layers):
        """(H, S, rows) per layer, means over the rows; None where no rank saw any. Drops the sums.

        One flat buffer for all layers, so that ranks agree by one all-reduce, and one look at the
        buffer finds what is not finite.
        """
        like = max((layer.weight for layer in layers), key=lambda w: w.dtype == torch.float64)
        like = like.new_empty(0, dtype=at_least_float32(like))
        sizes, rows = [sum(layer.sizes) for layer in layers], [layer.rows for layer in layers]
        flat = torch.cat([like.new_zeros(size) if layer.total is None else layer.total.to(like)
                          for layer, size in zip(layers, sizes)]
                         + [torch.tensor(rows, dtype=like.dtype, device="cpu").to(like)])
        for layer in layers:
            layer.drop()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        sums, counts = flat.split([len(flat) - len(rows), len(rows)])
        ends = torch.stack([flat.amin(), flat.amax()])
        *counts, least, most = torch.cat([counts, ends]).tolist()
        parts = sums.split(sizes)
        if not (isfinite(least) and isfinite(most)):             # nan is both
            bad = next(x.name for x, total in zip(layers, parts) if not total.isfinite().all())
            raise FloatingPointError(
                f"AdaFisher: the inputs or output gradients of layer {bad} are not finite in step "
                f"{self.steps}; no parameter was changed. Lower the learning rate, or look for the "
                "overflow that caused it")
        torch._foreach_div_(parts, [max(n, 1) for n in counts])
        means = []
        for layer, part, n in zip(layers, parts, counts):
            mean = part.to(layer.weight.device, at_least_float32(layer.weight))
            H, S = (x.view(shape) for x, shape in zip(mean.split(layer.sizes), layer.shapes))
            means.append((H, S, n) if n else None)
        return means

    def refresh(self, layer, group, state):
        """(4), (5)  What F̃ takes from the averages: for a weight S′ and H′, else F̃ − λ itself."""
        weight, bias, H, S = layer.weight, layer.bias, state["H"], state["S"]
        released = group["as_released"]
        if not released:
            H, S = min_max(H), min_max(S)
        if layer.how == "per channel":
            ones = (0.1 * group["gamma"]) ** state["updates"] if released else 1.0
            self.curvature[weight] = (H[0] * S).view(weight.shape)
            of_bias = (ones * S).view(weight.shape)  # released_mean takes a constant 1 down to ones
        else:
            S, H, of_bias = outer_factors(H, S, weight.shape)
            self.curvature[weight] = (S, H)
        if bias is not None:
            self.curvature[bias] = of_bias

    def update(self, group, params):
        """(6) and (7) for the parameters of a group that have a gradient, in few kernels."""
        lr, decay = float(group["lr"]), group["weight_decay"]
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params]
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        if decay and self.decoupled:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        moments, by_age = [], {}
        for p, grad in zip(params, grads):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state.update(momentum_buffer=torch.zeros_like(p), moments=0)
            state["moments"] += 1
            moments.append(state["momentum_buffer"])
            by_age.setdefault(state["moments"], []).append((state["momentum_buffer"], grad))
        for t, pairs in by_age.items():
            w = (1 - group["beta"]) / (1 - group["beta"] ** t)
            torch._foreach_lerp_(*map(list, zip(*pairs)), w)                                   # (6)
        pairs = [(p, m) for p, m in zip(params, moments) if p not in self.curvature]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs)), alpha=-lr)                    # (7), F̃ = 1
        pairs = [(p, m) for p, m in zip(params, moments) if p in self.curvature]
        if pairs:
            fisher = [self.curvature[p] for p, _ in pairs]
            fisher = [torch.mul(*x).flatten(0, 1) if isinstance(x, tuple) else x for x in fisher]
            fisher = torch._foreach_add(fisher, group["damping"])                              # (5)
            torch._foreach_addcdiv_(*map(list, zip(*pairs)), fisher, value=-lr)                # (7)

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
        self.curvature.clear()
        for layer, group in self.grouped():
            layer.drop()
            if "updates" in self.state.get(layer.weight, {}):
                self.refresh(layer, group, self.state[layer.weight])
        self.begin_step()

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:      # a checkpoint of torch's Adam lacks our options
            self.fill(group)
        for name, value in dict(model=None, scale=Scale(None), curvature={}, layers={}, hooks={},
                                handles=[], steps=0, captured=False).items():
            self.__dict__.setdefault(name, value)          # an unpickled optimizer has no model

    def __repr__(self):
        lines, size = [], 0
        for layer, group in self.grouped():
            n = sum(layer.sizes) * at_least_float32(layer.weight).itemsize
            d = "" if layer.how == "per channel" else f"×{layer.shapes[0][1]}"
            lines.append(f"  {layer.name}: {layer.sizes[1]}{d}, {layer.how}, {n:,} bytes")
            size += n
        done = set(self.layers) | {layer.bias for layer in self.layers.values()}
        given = {p for group in self.param_groups for p in group["params"]} - done
        named = self.model.named_parameters() if self.model is not None else ()
        plain = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias")
                              for name, p in named if p in given)
        return "\n".join([super().__repr__(), f"preconditioned: {len(lines)} weights, "
                          f"{size:,} bytes of statistics", *lines,
                          "plain step: " + (", ".join(plain) or "nothing else")])


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, W ← (1 − α·wd)W beside the step of (7).

    For Transformers; give biases and normalisation layers a group with weight_decay=0.
    """

    decoupled = True


def remove_hooks(handles):
    """When an optimizer is gone, its hooks should cost the model nothing."""
    for handle in handles:
        handle.remove()


def check_options(group):
    """Raise ValueError, naming the argument and its value, for what the step cannot use."""
    for name, valid, wanted in (
            ("lr", lambda v: 0 <= v < float("inf"), "a number, 0 or more"),
            ("beta", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("weight_decay", lambda v: 0 <= v < float("inf"), "a number, 0 or more"),
            ("damping", lambda v: 0 < v < float("inf"), "a positive number"),
            ("gamma", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("tcov", lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more")):
        if not valid(group[name]):
            raise ValueError(f"AdaFisher: {name} must be {wanted}, got {group[name]}")
