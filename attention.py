"""Attention as a use of the value projection's rows: MAC's mean attended input ā_V.

Attention gives O = T V with V = X W_Vᵀ, so O = (T X) W_Vᵀ: the rows that W_V multiplies on the way
to the loss are those of T X, and their sum over queries is Xᵀ t with t = Tᵀ1, the attention that
each token gets from all queries. No layout of q, k and v is guessed. The output of each linear
layer is noted by its memory; whatever views and row-major copies a model makes of it, the offsets
of v's entries in that memory tell which token and which row of the weight each of them is. Then
T comes from the arguments of F.scaled_dot_product_attention, or is the softmax that is multiplied
with v (before dropout, if there is any).

Not followed, so that v takes the plain mean: scores that are changed after their softmax other than
by dropout or a cast (talking heads), attention over channels or without a batch, keys that the
module adds itself, values that are joined or repeated in new memory (cat, stack, index_select,
repeat_interleave; expand and enable_gqa are followed), values, their inputs or scores that are
changed in place, einsum, flex_attention, arguments of products by keyword, and a function (no
module) under reentrant checkpointing. A v that is used besides (a residual) is described by T X
alone.
"""
import threading
import weakref
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import CausalBias
from torch.utils.weak import WeakIdKeyDictionary

from precision import at_least_float32, full_precision
from uses import Use

CHUNK = 2 ** 24  # at most this many numbers (64 MiB in float32) of scores at a time

SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
COPIES = (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone, torch.Tensor.reshape,
          torch.reshape, torch.Tensor.flatten, torch.flatten, torch.Tensor.to, torch.Tensor.float,
          torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.type_as)
SAME_SCORES = (F.dropout, torch.dropout, *COPIES)


def attention_sum(q, k, mask=None, causal=False, scale=None):
    """t = Tᵀ1: the attention that each key receives from all queries, (..., S).

    q (..., L, d_h), k (..., S, d_h) and mask (..., L, S) are broadcast; mask is boolean (True takes
    part) or added to the scores. A chunk of the first dimension at a time. A query that may attend
    to nothing adds 0.
    """
    q, k = q.to(at_least_float32(q)), k.to(at_least_float32(k))
    L, S = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if causal:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    batch = torch.broadcast_shapes((1,), q.shape[:-2], k.shape[:-2],
                                   () if mask is None else mask.shape[:-2])
    q, k = (x.expand(*batch, *x.shape[-2:]) for x in (q, k))
    mask = None if mask is None else mask.expand(*batch, L, S)
    sums, chunk = [], max(1, CHUNK // max(1, q[0, ..., 0].numel() * S))
    for i in range(0, len(q), chunk):
        scores = q[i:i + chunk] @ k[i:i + chunk].mT * scale
        if mask is not None:
            scores = scores + mask[i:i + chunk]
        sums.append(scores.softmax(-1).nan_to_num(nan=0.0).sum(-2))
    return torch.cat(sums)


# ---- where the entries of a tensor come from ----

@dataclass
class Origin:
    """Memory that holds a linear layer's output, row after row: (tokens, columns)."""
    layer: object
    x: weakref.ref                  # the layer's input, as long as the model keeps it
    x_version: int                  # its version then: autocast's copy of it is what was multiplied
    first: int                      # the row of the weight that made column 0
    columns: int
    version: int                    # counts changes in place: after one it holds something else


@dataclass
class Copy:
    """Memory that holds a row-major copy of a tensor in other memory."""
    source: object                  # an Origin or a Copy
    shape: tuple
    strides: tuple                  # of the tensor that was copied, and its offset
    start: int
    version: int


def digits(offsets, radices):
    """The digits of numbers in a mixed radix, as arrays; ValueError if their sum might carry.

    offsets: arrays, one of which per dimension adds up to the offset of an entry.
    """
    found = []
    for step, size in radices:
        parts = [array // step % size for array in offsets]
        if sum(part.max() for part in parts) >= size:
            raise ValueError("not a block of rows and columns")
        found.append(parts)
    return found


def trace(offsets, place):
    """(Origin, token, row of the weight) per dimension, for offsets into a place's memory."""
    if isinstance(place, Origin):
        tokens = 2 ** 62
        (column, token) = digits(offsets, [(1, place.columns), (place.columns, tokens)])
        return place, token, [column[0] + place.first, *column[1:]]
    steps = np.cumprod([1, *place.shape[:0:-1]])[::-1]
    parts = digits(offsets, list(zip(steps.tolist(), place.shape)))
    offsets = [sum(digit[i] * stride for digit, stride in zip(parts, place.strides))
               for i in range(len(offsets))]
    return trace([offsets[0] + place.start, *offsets[1:]], place.source)


def outer_sum(arrays):
    """Σ of arrays, each along a dimension of its own."""
    total = np.zeros((), dtype=np.int64)
    for array in arrays:
        total = total[..., None] + array
    return total


class Attention:
    """Follows linear layers' outputs to attention, within one forward pass of a watched model."""

    def __init__(self, watcher):
        self.watcher = watcher
        self.local = threading.local()            # each thread follows its own forward pass

    @property
    def places(self):
        """memory: Origin or Copy; neither kept alive."""
        return self.local.__dict__.setdefault("places", {})

    @property
    def scores(self):
        """T: Tᵀ1 (..., S) and what else belongs to it."""
        return self.local.__dict__.setdefault("scores", WeakIdKeyDictionary())

    @property
    def inputs(self):
        """(depth, x): inputs of linear layers, which nobody else may hold (the graph keeps a copy
        of what was cast or not contiguous), and how deep in modules they were met."""
        return self.local.__dict__.setdefault("inputs", [])

    def left(self, depth):
        """So many watched modules are still being called: a linear layer is left first, then the
        module that attends."""
        self.inputs[:] = [(met, x) for met, x in self.inputs if met <= depth + 1]
        if depth == 0:
            self.local.__dict__.clear()

    def note(self, layer, rows, x, out):
        """A linear layer's output (..., out) from its input x (..., d)."""
        if fills_memory(out):
            self.inputs.append((len(self.watcher.inside), x))
            self.places[memory(out)] = Origin(layer, weakref.ref(x), version_of(x), rows.start,
                                              out.shape[-1], out._version)

    def place_of(self, x):
        """Where x lies, or None if that is not known, or was written to since."""
        place = self.places.get(memory(x))
        return place if place is not None and place.version == x._version else None

    def sum_of(self, T):
        t, version = self.scores.get(T, (None, None))
        return t if version == T._version else None

    def see(self, func, out, args, kwargs):
        if func is F.scaled_dot_product_attention:
            self.fused(out, *args, **kwargs)
        elif func in SOFTMAX and out.dim() > 2 and (
                args[1] if len(args) > 1 else kwargs.get("dim")) in (-1, out.dim() - 1):
            with torch.no_grad():
                t = out.nan_to_num(nan=0.0).sum(-2, dtype=at_least_float32(out))
            self.scores[out] = t, out._version
        elif not args or not isinstance(args[0], torch.Tensor):
            return
        elif func in PRODUCTS and len(args) == 2:
            t = self.sum_of(args[0])
            if t is not None:
                self.attended(args[1], lambda: t, out.shape[:-2], out)
        elif func in SAME_SCORES and out.shape == args[0].shape and args[0] in self.scores:
            self.scores[out] = self.sum_of(args[0]), out._version
        elif func in COPIES:
            self.copied(args[0], out)

    def copied(self, x, out):
        place = self.place_of(x)
        if place is not None and memory(out) != memory(x) and fills_memory(out):
            self.places[memory(out)] = Copy(place, tuple(x.shape), x.stride(), x.storage_offset(),
                                            out._version)

    def fused(self, out, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False,
              scale=None, enable_gqa=False):
        if out.dim() < 3 or isinstance(attn_mask, CausalBias):           # which holds no numbers
            return
        batch, heads = out.shape[:-2], 1
        if enable_gqa:                                     # so many heads of q share one of v
            heads = query.shape[-3] // value.shape[-3]
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.unsqueeze(-3)
            batch = torch.Size((*batch[:-1], batch[-1] // heads, heads))

        def received():
            t = attention_sum(query, key, attn_mask, is_causal, scale)
            return t.unflatten(-2, (-1, heads)) if enable_gqa else t
        self.attended(value, received, batch, out)

    def attended(self, v, received, batch, out):
        """Measure the rows T X, T (*batch, L, S), of the layer that made v (..., S, d_h)."""
        place = self.place_of(v)
        if place is None:
            return
        v = v.detach().expand(*batch, *v.shape[-2:])
        arrays = [np.array([v.storage_offset()])] + [
            np.arange(n) * stride for n, stride in zip(v.shape, v.stride())]
        try:
            origin, token, row = trace(arrays, place)
            if row[-2].any() or token[-1].any():                 # attention over channels
                return
            shape, token, row = split_dimensions(v.shape, token, row)
        except ValueError:
            return
        x, layer = origin.x(), origin.layer
        if x is None or version_of(x) != origin.x_version or not layer.active \
                or not self.watcher.optimizer().set_values(layer, np.unique(outer_sum(row))):
            return
        with torch.no_grad(), full_precision(out.device.type):
            t = received().expand(*batch, v.shape[-2])
            rows = out.shape[-2] * batch.numel()
            t = t.reshape(shape[:-1])
            others = [i for i, array in enumerate(token[1:-1]) if not array.any()]     # heads
            t = t.sum(others) if others else t                                 # (tokens ...)
            total = weighted_sum(x.detach(), t, outer_sum(
                [token[0][0]] + [a for i, a in enumerate(token[1:-1]) if i not in others]))
            if layer.bias is not None:
                total = torch.cat([total, t.sum()[None]])
        use = Use("values", None, None, out.shape, rows, slice(layer.blocks, None))
        self.watcher.when_backpropagated(layer, use, {"mean": total[None]}, rows, out)


def version_of(x):
    """Counts changes in place; of an inference tensor they are not counted."""
    return None if x.is_inference() else x._version


def fills_memory(x):
    return x.is_contiguous() and x.storage_offset() == 0


def memory(x):
    """The identity of a tensor's memory; does not keep it alive."""
    return StorageWeakRef(x.untyped_storage())


def split_dimensions(shape, token, row):
    """Each dimension along tokens or along rows of the weight; one along both, as (batch·heads,
    S, d_h) has it, becomes two. token and row are (start, per dimension ...)."""
    sizes, tokens, rows = [], [token[0]], [row[0]]
    for n, t, r in zip(shape, token[1:], row[1:]):
        if t.any() and r.any():
            m = int((t == t[0]).sum())                        # so many rows before the next token
            if n % m or not ((t.reshape(-1, m) == t[::m, None]).all()
                             and (r.reshape(-1, m) == r[:m]).all()):
                raise ValueError("not a block of rows and columns")
            sizes += [n // m, m]
            tokens += [t[::m], np.zeros(m, dtype=np.int64)]
            rows += [np.zeros(n // m, dtype=np.int64), r[:m]]
        else:
            sizes.append(n)
            tokens.append(t)
            rows.append(r)
    return sizes, tokens, rows


def weighted_sum(x, t, token):
    """Σ t_i x_i over the tokens i (numbers of rows of x) that t belongs to: (d,)."""
    x = x.reshape(-1, x.shape[-1])
    x, token = x.to(at_least_float32(x)), token.flatten()
    t = t.flatten().to(x)
    if len(token) != len(x) or (token != np.arange(len(x))).any():
        index = torch.from_numpy(token).to(x.device)
        t = t.new_zeros(len(x)).index_add_(0, index, t)
    return t @ x


def value_blocks(rows, out, blocks):
    """(n, which of them): the fewest equal blocks of a weight's rows that these rows are some of.

    None if that takes blocks of single rows. n is a multiple of blocks.
    """
    inside = np.zeros(out, dtype=bool)
    inside[rows] = True
    edges = np.flatnonzero(np.diff(inside)) + 1
    size = gcd(out // blocks, *edges.tolist())
    if size == 1 and out > blocks:
        return None
    return out // size, tuple(np.flatnonzero(inside[::size]).tolist())
