"""A convolution as a product of matrices: its patches, their sums, and its geometry.

A Conv2d multiplies its weight (out, C/groups·kh·kw) with one column of pixels, a patch, for each
position of its output. Numbers describe it, not a module: padding modes have vanished before
torch is asked for a convolution, since it pads by copies of pixels first.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from precision import at_least_float32


class Geometry(NamedTuple):
    """Of a convolution: per axis (rows, columns); padding by zeros at both ends of each axis."""
    kernel: tuple
    stride: tuple
    dilation: tuple
    padding: tuple            # ((top, bottom), (left, right))
    groups: int

    @classmethod
    def of(cls, weight, stride=1, padding=0, dilation=1, groups=1):
        """From the arguments of torch.conv2d, whatever their form."""
        kernel, stride, dilation = tuple(weight.shape[2:]), pair(stride), pair(dilation)
        if padding == "same":       # torch puts the odd pixel at the end
            total = [d * (k - 1) for d, k in zip(dilation, kernel)]
            ends = tuple((t // 2, t - t // 2) for t in total)
        else:
            ends = tuple((p, p) for p in pair(0 if padding == "valid" else padding))
        return cls(kernel, stride, dilation, ends, groups)


def pair(value):
    """An int or a sequence of one or two, as torch.conv2d takes them: (rows, columns)."""
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * 2 if len(value) == 1 else value


def pad(x, geometry):
    """x (..., H, W) with the zeros around it."""
    rows, columns = geometry.padding
    return F.pad(x, (*columns, *rows))


def patches(x, geometry):
    """The patches of x (B, C, H, W), by one copy: (groups, C/groups·kh·kw, B·oH·oW)."""
    x = pad(x, geometry)
    for dim, k, stride, dilation in zip((2, 3), geometry.kernel, geometry.stride,
                                        geometry.dilation):
        x = x.unfold(dim, dilation * (k - 1) + 1, stride)[..., ::dilation]
    rows = len(x) * x.shape[2] * x.shape[3]                          # of x (B, C, oH, oW, kh, kw)
    return x.permute(1, 4, 5, 0, 2, 3).reshape(geometry.groups, -1, rows)


def patch_sum(image, geometry):
    """Σ a over all patches a of a batch, from the sum of its images (..., C, H, W).

    Patches are linear in the image, so the sum of all images' patches is that of the one summed
    image. Tap (i, j) of channel c sums a grid of its pixels: with R (kh, H) and C (kw, W) telling
    how often tap i meets a row and tap j a column, it is (R x_c Cᵀ)_ij. Returns (..., groups,
    C/groups·kh·kw).
    """
    R, C = (taps(*axis, image.dtype, image.device) for axis in zip(
        image.shape[-2:], geometry.kernel, geometry.stride, geometry.dilation, geometry.padding))
    return (R @ (image @ C.mT)).reshape(*image.shape[:-3], geometry.groups, -1)


@lru_cache(maxsize=256)
def taps(size, k, stride, dilation, ends, dtype, device):
    """(k, size): how often tap i of k meets each pixel of an axis with `ends` zeros around it."""
    positions = (size + sum(ends) - dilation * (k - 1) - 1) // stride + 1
    pixel = (torch.arange(k, device="cpu")[:, None] * dilation - ends[0]
             + torch.arange(positions, device="cpu") * stride)       # (k, positions)
    counts = torch.zeros(k, size, dtype=torch.float64, device="cpu")
    inside = (pixel >= 0) & (pixel < size)
    counts.scatter_add_(1, pixel.clamp(0, size - 1), inside.to(counts.dtype))
    return counts.to(device, dtype)


def image_sum(x):
    """Σ x over the images of a batch (B, C, H, W): (C, H, W)."""
    return x.sum(0, dtype=at_least_float32(x))
