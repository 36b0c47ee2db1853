"""Which weights a model has that may be preconditioned, and the sums that each has pending.

A *layer* is a weight: of nn.Linear, nn.Conv2d, a norm, nn.MultiheadAttention's projections, or
transformers' Conv1D. The class of its module says here only how its gradient is laid out: what it
multiplied, capture.py sees, and then how it is preconditioned, or that it takes the plain step.
"""
import torch.nn as nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Layer:
    """A weight that may be preconditioned: how its gradient is laid out, and its pending sums."""

    def __init__(self, name, weight, bias, kind, blocks=1, bias_rows=None, transposed=False):
        self.name, self.weight, self.bias, self.kind = name, weight, bias, kind
        self.blocks = blocks             # equal blocks of the weight's rows, each with its inputs
        self.transposed = transposed     # the weight is (d, out), not (out, d)
        self.bias_rows = bias_rows or slice(0, self.out)     # its part of a bias that is shared
        # what uses have shown: "plain": why preconditioning ended; "bias": it is no coordinate of a
        self.found = {}
        self.measured = self.prepared = {}   # {name in state: shape (blocks, ...)}, by set_up
        self.on = True                   # does this step's batch count?
        self.backward = None             # the backward pass that brought the latest sums
        self.drop()

    @property
    def active(self):
        return self.weight.requires_grad and "plain" not in self.found

    @property
    def out(self):
        return self.weight.shape[1] if self.transposed else len(self.weight)

    @property
    def d(self):
        """The length of a row: [a; 1] where the layer has a bias."""
        return self.weight.numel() // self.out + (self.bias is not None)

    def drop(self):
        """Forget this step's sums."""
        self.pending = {}                # {name: (Σ over rows, rows per block)}
        self.calls = set()               # the pairs (call of the model, backward pass) behind them

    def add(self, name, total, rows, blocks=slice(None)):
        """Add a sum over rows (blocks, ...), or one sum (1, ...) that is of all these blocks."""
        shape = self.measured[name]
        old, counts = self.pending.get(name, (None, [0] * shape[0]))
        numbers = range(shape[0])[blocks]
        if len(numbers) < shape[0] or len(total) < shape[0]:
            whole = total.new_zeros(shape)
            whole[blocks] = total
            total = whole
        for i in numbers:
            counts[i] += rows
        self.pending[name] = total if old is None else total + old, counts


def candidates(model, kinds):
    """{weight: its Layer} in modules() order, for the kinds that a method preconditions.

    A layer's uses are of one kind; a weight that modules of two kinds share, or that an embedding
    reads, takes the plain step. So does a bias that several weights, or not all uses of one, have.
    """
    every = {}
    for module_name, module in model.named_modules():
        for layer in layers_of(module_name, module):
            every.setdefault(layer.weight, []).append(layer)
    layers, owners = {}, {}
    for weight, same in every.items():
        layer = layers[weight] = same[0]
        if len({(x.kind, x.blocks, x.transposed) for x in same}) > 1:
            layer.found["plain"] = f"{same[0].kind} and {same[-1].kind} share it"
        elif layer.kind == "embedding" or weight.is_complex():
            layer.found["plain"] = "complex" if weight.is_complex() else "an embedding"
        if len({x.bias for x in same}) > 1:
            layer.bias = None
        if layer.bias is not None:
            owners.setdefault((layer.bias, layer.bias_rows.start), []).append(layer)
    for sharing in owners.values():
        for layer in sharing if len(sharing) > 1 else ():
            layer.bias = None
    return {weight: layer for weight, layer in layers.items()
            if layer.kind in kinds and "plain" not in layer.found}


def layers_of(name, module):
    """The Layers of one module itself; parametrized weights are computed, so there are none."""
    own = {key: p for key, p in module._parameters.items()
           if p is not None and p.numel()}          # of a lazy one torch says what to do: an error
    weight, bias = own.get("weight"), own.get("bias")
    if isinstance(module, nn.MultiheadAttention):
        E, b = module.embed_dim, own.get("in_proj_bias")
        if "in_proj_weight" in own:
            yield Layer(f"{name}.in_proj_weight".lstrip("."), own["in_proj_weight"], b,
                        "projection", 3)
        for i, key in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            if key in own:
                yield Layer(f"{name}.{key}".lstrip("."), own[key], b, "projection",
                            bias_rows=slice(i * E, i * E + E))
    elif weight is None:
        return
    elif isinstance(module, EMBEDDINGS):
        yield Layer(name, weight, None, "embedding")
    elif isinstance(module, NORMS):
        yield Layer(name, weight, bias, "norm")
    elif isinstance(module, nn.Conv2d):
        yield Layer(name, weight, bias, "conv", module.groups)
    elif isinstance(module, nn.Linear):
        yield Layer(name, weight, bias, "projection" if isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear) else "linear")
    elif type(module).__name__ == "Conv1D" and weight.dim() == 2 and bias is not None \
            and bias.shape == weight.shape[1:]:             # GPT-2's linear layer in transformers
        yield Layer(name, weight, bias, "linear", transposed=True)
