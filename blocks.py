"""Layers of one shape as the blocks of one layer: their states and gradients in a row.

A small layer's step costs a GPU the launches of its kernels, so such layers share them.
"""
from itertools import accumulate

import torch

from precision import at_least_float32
from sharding import all_rows, is_sharded, local, local_rows, own_rows

STACK = 2 ** 20  # layers are joined up to this many numbers; beyond, their work outweighs launches


def stacks(grouped):
    """Lists of layers of one shape, and the damping that their groups share."""
    found = {}
    for layer, group in grouped:
        weight = layer.weight
        facts = layer.measured, layer.prepared, layer.found, local_rows(weight)
        kind = (weight.shape, weight.stride(), layer.transposed, repr(facts), layer.bias is None,
                weight.dtype, weight.device, group["damping"])
        found.setdefault(kind, []).append(layer)
    for kind, layers in found.items():
        shapes = [layers[0].weight.shape, *map(torch.Size, layers[0].measured.values())]
        at_once = max(1, STACK // max(shape.numel() for shape in shapes))
        for i in range(0, len(layers), at_once):
            yield layers[i:i + at_once], kind[-1]


def joined(tensors):
    """torch.cat in float32 or better; of all the parts of a tensor, in order, that tensor itself,
    not copied."""
    first = tensors[0]
    whole, ends = first._base, list(accumulate(map(len, tensors), initial=0))
    if len(tensors) == 1:
        whole = first
    elif whole is None or whole.shape != (ends[-1], *first.shape[1:]) or any(
            x._base is not whole or x.stride() != whole.stride()
            or x.storage_offset() != end * whole.stride(0) for x, end in zip(tensors, ends)):
        whole = torch.cat(tensors)
    return whole.to(at_least_float32(whole))


def gradient_matrix(layers, blocks, row_by_row):
    """G = [W.grad | b.grad] of layers of one shape, one below the other: (n·out, d).

    The gradient of a bias that the loss lacks is 0. Of sharded weights G has the rows that are
    here, or all of them if G̃ is not made row by row; where blocks divide the rows, 0 for others.
    """
    def rows(grad):
        if not is_sharded(grad):
            return grad
        gather = not row_by_row or layers[0].transposed
        return all_rows(grad, gather) if gather or blocks > 1 else local(grad)
    G = joined([rows(layer.weight.grad.mT if layer.transposed else layer.weight.grad)
                for layer in layers]).flatten(1)
    if layers[0].bias is None:
        return G
    biases = [rows(torch.zeros_like(layer.bias) if layer.bias.grad is None else layer.bias.grad)
              for layer in layers]
    parts = [grad[layer.bias_rows] for layer, grad in zip(layers, biases)]
    return torch.cat([G, joined(parts)[:, None]], 1)


def replace_gradients(layers, G, raw):
    """Give each layer its part of G, as gradient_matrix made it; raw collects what was there.

    A fused step reads raw memory, so each gradient is laid out in memory as its weight is.
    """
    weight, parts = layers[0].weight, (len(layers), len(G) // len(layers))
    if layers[0].bias is not None:
        give_biases(layers, G[:, -1].to(layers[0].bias.dtype).contiguous().view(parts), raw)
        G = G[:, :-1]
    G = G.to(weight.dtype)
    if not layers[0].transposed:
        G = G.reshape(-1, *weight.shape[1:])
        form = torch.channels_last if weight.dim() == 4 and not weight.is_contiguous() else \
            torch.contiguous_format
        G = G.contiguous(memory_format=form)
    for layer, part in zip(layers, G.unflatten(0, parts)):
        weight, part = layer.weight, part.mT if layer.transposed else part
        if part.stride() != weight.stride():
            part = part.new_empty_strided(part.shape, weight.stride()).copy_(part)
        raw[weight], weight.grad = weight.grad, own_rows(weight, part)


def give_biases(layers, parts, raw):
    for layer, part in zip(layers, parts):
        bias = layer.bias
        if bias.grad is None:
            continue
        if is_sharded(bias) or len(part) == len(bias):
            raw[bias], bias.grad = bias.grad, own_rows(bias, part)
            continue
        if bias not in raw:                  # one bias serves three weights, a third to each
            raw[bias], bias.grad = bias.grad, bias.grad.clone()
        bias.grad[layer.bias_rows] = part
