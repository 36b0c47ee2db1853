"""Sums of all layers, pooled over the ranks of torch.distributed, and their averages over steps.

One process needs no group.
"""
import hashlib
from math import isfinite

import torch
import torch.distributed as dist

from precision import at_least_float32
from sharding import local


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def pool(layers, numbers):
    """Take the pending sums of layers, and this rank's numbers, and add them up over all ranks.

    Returns [(layer, name, Σ (blocks, ...), rows per block)] for all that the layers measure, the
    numbers, and the (layer, name) of a sum that is not finite, or None. One flat buffer, so that
    ranks agree by one all-reduce, and one look at it finds what is not finite.
    """
    like = max((local(layer.weight) for layer in layers), key=lambda w: w.dtype == torch.float64)
    like = like.new_empty(0, dtype=at_least_float32(like))
    sums, rows, slots = [], [], []
    for layer in layers:
        for name, shape in layer.measured.items():
            total, counts = layer.pending.get(name, (None, [0] * shape[0]))
            total = like.new_zeros(shape) if total is None else total.to(like)
            slots.append((layer, name, torch.Size(shape)))
            sums.append(total.flatten())
            rows += counts
        layer.drop()
    tail = torch.tensor(rows + numbers, dtype=like.dtype, device="cpu").to(like)
    flat = torch.cat([*sums, tail])
    if world_size() > 1:
        dist.all_reduce(flat)
    flat, tail = flat.split([len(flat) - len(tail), len(tail)])
    ends = torch.stack([flat.amin(), flat.amax()]) if len(flat) else tail[:0]
    values = torch.cat([tail, ends]).tolist()
    rows, numbers, ends = values[:len(rows)], values[len(rows):len(tail)], values[len(tail):]
    found, bad = [], None
    parts = flat.split([shape.numel() for *_, shape in slots])
    for (layer, name, shape), part in zip(slots, parts):
        found.append((layer, name, part.view(shape), rows[:shape[0]]))
        rows = rows[shape[0]:]
    if not all(map(isfinite, ends)):                             # nan is both ends
        bad = next((layer, name) for layer, name, total, _ in found if not total.isfinite().all())
    return found, numbers, bad


def agree(layers, merge):
    """What uses have shown of the layers must be the same on all ranks before they reduce.

    merge(layer, everyone) takes over what the uses on each rank have shown. RuntimeError, on all
    ranks, where these do not train the same layers.
    """
    if world_size() == 1:
        return
    facts = {layer.name: layer.found for layer in layers if layer.weight.requires_grad}
    words = repr(sorted((name, sorted(found.items())) for name, found in facts.items()))
    number = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
    ends = torch.tensor([number, -number], dtype=torch.int64).to(layers[0].weight.device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if ends[0].item() == -ends[1].item():
        return
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, facts)
    for theirs in everyone:
        if theirs.keys() != everyone[0].keys():
            raise RuntimeError("ranks train different layers, for example "
                               f"{sorted(theirs.keys() ^ everyone[0].keys())[0]}; each needs all "
                               "of them (ZeroRedundancyOptimizer divides them: use fully_shard)")
    for layer in layers:
        merge(layer, [theirs.get(layer.name, {}) for theirs in everyone])


def running_mean(old, batch, updates, decay):
    """The bias-corrected averages after `updates` batches, in place on all of old.

    With m_k = β m_{k−1} + (1 − β) x_k, m_0 = 0, the corrected m̂_k = m_k/(1 − βᵏ) satisfies
    (1 − βᵏ) m̂_k = β(1 − βᵏ⁻¹) m̂_{k−1} + (1 − β) x_k = (1 − βᵏ − (1 − β)) m̂_{k−1} + (1 − β) x_k:
    m̂_k = m̂_{k−1} + w (x_k − m̂_{k−1}), so the corrected average itself is what is stored.
    """
    torch._foreach_lerp_(old, batch, (1 - decay) / (1 - decay ** updates))
    return old
