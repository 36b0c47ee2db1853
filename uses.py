"""What each function of torch does with a weight of a layer: the uses that capture.py measures.

Each function here is called after torch's own, with its result `out` and its arguments; it finds
the layer that an argument belongs to, and records the use, or contradicts the layer where its
statistics could not describe it.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from patches import Geometry


@dataclass
class Use:
    """One use of a layer's weight in a forward pass."""
    kind: str                       # "linear", "conv", "norm"; "values", without x and out
    x: torch.Tensor                 # what met the weight: (..., d), (B, C, H, W), a norm's input
    out: torch.Tensor               # what came of it; x and out are dropped once measured
    shape: torch.Size               # of the output, and so of its gradient; 4-D of a convolution
    rows: int                       # how many rows a the weight multiplied
    blocks: slice                   # those of the layer's blocks whose rows of the weight took part
    geometry: Geometry = None       # of a convolution
    norm: dict = None               # of a norm: its other arguments
    batch: int = None               # in nn.MultiheadAttention, whose rows are (positions, batch)
    call: object = None             # the call of the model that it belongs to, where K-FAC asks


def multiplied(watcher, x):
    """x meets a weight; if it is one too, its layer's rows are not what its gradient is made of."""
    found = watcher.find(x)
    if found is not None:
        watcher.contradict(found[0], "it stands on the left of a product")


def linear(watcher, out, input, weight, bias=None):
    multiplied(watcher, input)
    found = watcher.find(weight)
    if found is not None:
        layer, _, turned = found
        if turned != layer.transposed:
            return watcher.contradict(layer, "its transpose is used")
        watcher.record(found, "linear", input, out, bias)


def matmul(watcher, out, input, other=None, mat2=None, bias=None, **rest):
    multiplied(watcher, input)
    other = mat2 if other is None else other               # torch.mm's name for it
    found = watcher.find(other)
    if found is not None:
        layer, rows, turned = found
        if turned == layer.transposed or rows != slice(0, layer.out):
            return watcher.contradict(layer, "its transpose is used")
        watcher.record(found, "linear", input, out, bias)


def addmm(watcher, out, input, mat1, mat2, *, beta=1, alpha=1):
    if alpha == beta == 1:
        matmul(watcher, out, mat1, mat2, bias=input)
    else:
        other(watcher, out, mat1, mat2)


def conv2d(watcher, out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    found = watcher.find(weight)
    if found is not None:
        geometry = Geometry.of(weight, stride, padding, dilation, groups)
        watcher.record(found, "conv", input, out, bias, geometry=geometry)


def norm(watcher, out, x, weight, bias, **rest):
    found = watcher.find(weight)
    if found is not None:
        watcher.record(found, "norm", x, out, bias, norm=rest)


def batch_norm(watcher, out, input, running_mean, running_var, weight=None, bias=None,
               training=False, momentum=0.1, eps=1e-5):
    norm(watcher, out, input, weight, bias, eps=eps, mean=None if training else running_mean,
         var=None if training else running_var)


def layer_norm(watcher, out, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    norm(watcher, out, input, weight, bias, eps=eps, normalized_shape=normalized_shape)


def group_norm(watcher, out, input, num_groups, weight=None, bias=None, eps=1e-5):
    norm(watcher, out, input, weight, bias, eps=eps, num_groups=num_groups)


def other(watcher, out, *args, **kwargs):
    """A product whose rows are not told apart here."""
    for x in torch.utils._pytree.tree_leaves((args, kwargs)):
        found = watcher.find(x) if isinstance(x, torch.Tensor) else None
        if found is not None:
            watcher.contradict(found[0], "it is used in an operation that is not followed")


OTHERS = (torch.einsum, torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.bilinear, torch.mv,
          torch.Tensor.mv, torch.tensordot, torch.inner, torch.Tensor.inner,
          torch.linalg.multi_dot, F.embedding, F.embedding_bag, torch.convolution, torch.conv1d,
          torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
SEEN = dict.fromkeys(OTHERS, other) | {
    F.linear: linear, torch.conv2d: conv2d, torch.addmm: addmm, torch.Tensor.addmm: addmm,
    F.batch_norm: batch_norm, F.layer_norm: layer_norm, F.group_norm: group_norm} | dict.fromkeys(
        (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.linalg.matmul, torch.mm,
         torch.Tensor.mm), matmul)
