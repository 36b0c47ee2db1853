"""Weights that torch's fully_shard (FSDP2) cuts into rows, a piece for each rank.

Why a piece is enough. The rows of W are outputs, and G (A + ρI)⁻¹ acts on each row of G by itself.
A is a mean over the rows of the batch, of inputs that every layer sees whole: each rank measures
those of its own samples, and the all-reduce that ranks need anyway makes one A of them. So a rank
multiplies its rows of G, steps with its rows of W and its rows of momentum, and no gradient
travels. (AdaFisher's F̃ = λ + S′ H′ᵀ has a row for each entry of S′, of which a rank takes its own.)
P⁻¹ G (A + ρI)⁻¹ mixes rows, so K-FAC gathers G first, and each rank keeps its rows of the result;
so do MAC, NysAct and FOOF where a weight is stored (d, out): its pieces are columns of W.

Which weight it is. fully_shard replaces the parameters of a model by DTensors, which the optimizer
holds; while a module runs, the whole weight, a plain Parameter, stands in the attribute's place.
"""
import torch.nn as nn
from torch.utils.weak import WeakIdKeyDictionary


def is_sharded(p):
    return hasattr(p, "to_local")             # a DTensor, without importing what defines it


def local(x):
    """This rank's part of a tensor that is sharded; any other tensor itself."""
    return x.to_local() if is_sharded(x) else x


def local_rows(p):
    """Which rows of the whole p are here, as torch.chunk divides them; the last ranks may get none.

    Other dimensions of the mesh hold copies (HSDP).
    """
    for i, placement in enumerate(p.placements if is_sharded(p) else ()):
        if placement.is_shard():
            size = -(-len(p) // p.device_mesh.size(i))
            first = min(size * p.device_mesh.get_local_rank(i), len(p))
            return slice(first, min(first + size, len(p)))
    return slice(0, len(p))


def all_rows(x, gather):
    """A whole tensor for one that is sharded; rows of other ranks are gathered from them, or 0."""
    if gather:
        return x.full_tensor()
    whole = local(x).new_zeros(x.shape)
    whole[local_rows(x)] = local(x)
    return whole


def own_rows(p, part):
    """For p, whose rows may be sharded, a tensor of its kind: of its rows here, or of all."""
    if not is_sharded(p):
        return part
    if len(part) == len(p):
        part = part[local_rows(p)].contiguous()
    return type(p.data).from_local(part, p.device_mesh, p.placements, run_check=False,
                                   shape=p.shape, stride=p.stride())


def cut_otherwise(p):
    """Why a weight that is sharded cannot be preconditioned; None if it is cut into rows."""
    from torch.distributed.tensor import Shard
    cuts = [placement for placement in p.placements if not placement.is_replicate()]
    if all(type(cut) is Shard and cut.dim == 0 for cut in cuts) and len(cuts) < 2:
        return None
    return f"its shards, {p.placements}, are no rows"


class Unsharded:
    """Finds the parameter that a whole weight stands for, by the attribute that both are."""

    def __init__(self, model):
        self.places = [(module._parameters, key, p) for module in model.modules()
                       for key, p in module._parameters.items() if p is not None and is_sharded(p)]
        self.known = WeakIdKeyDictionary()

    def __call__(self, x):
        if not self.places or type(x) is not nn.Parameter:
            return x
        if x not in self.known:
            self.known[x] = next((p for own, key, p in self.places if own[key] is x), x)
        return self.known[x]
