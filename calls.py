"""Calls of a model, and K-FAC's N: of how many terms the loss that is made of them is the mean.

A call is one forward pass of the model, or of its parts in turn: a part whose input was made from
an earlier part's output goes on with that call, unless it was in it already. What went in and what
came out tell the number:

    'samples'  the first dimension of an argument, which an output has too
    'tokens'   all positions of an output, which an argument has too: (B, S) token ids, (B, S, d),
               (B, C, H, W)
    a number   said by the user

The terms of micro-batches add up, each call's once. Where calls contradict, nothing is guessed.
"""
import threading
from contextlib import suppress
from math import inf, prod

import torch


class Call:
    """One call of the model, or of its parts in turn."""

    def __init__(self, terms=None):
        self.inputs = []          # (shape, is it of floats?) of each tensor that went in
        self.outputs = []         # the shapes of what came out of the last part
        self.parts = []           # the modules that were called
        self.batched = True       # False once a layer took the whole input for a single sample
        self.scale = None         # of its loss by a GradScaler, once asked for
        self.terms = terms        # where they are counted otherwise


class Calls:
    """Tells calls apart, for the watcher that sees forward passes begin and end."""

    def __init__(self):
        self.local, self.latest = threading.local(), Call()

    @property
    def current(self):
        """This thread's; of a checkpoint's rerun on a GPU, which has a thread of its own, the
        latest of all."""
        return getattr(self.local, "current", self.latest)

    def begin(self, module, args, kwargs):
        given = tensors((args, kwargs))
        self.local.entered = None
        training = torch.is_grad_enabled() or any(x.requires_grad for x in given)
        if not training or torch._C._current_graph_task_id() != -1:      # or a checkpoint's rerun
            return
        earlier = next((call for call in map(self.origin, given) if call is not None), None)
        if earlier is not None and module in earlier.parts:      # a cell: each step may have a loss
            earlier = None
        self.local.current = self.local.entered = self.latest = earlier or Call()
        self.current.parts.append(module)
        self.current.inputs += [(x.shape, x.is_floating_point()) for x in given
                                if x.grad_fn is None or earlier is None]

    def end(self, output):
        call = getattr(self.local, "entered", None)
        if call is not None:
            call.outputs = [x.shape for x in tensors(output)]
            for x in tensors(output):
                if x.grad_fn is not None:
                    x.grad_fn.metadata[self] = call

    def origin(self, x):
        """The call from whose output x was made, if any."""
        nodes, seen = [x.grad_fn], {x.grad_fn, None}
        for node in filter(None, nodes):
            if self in node.metadata:
                return node.metadata[self]
            new = {before for before, _ in node.next_functions} - seen
            nodes += new
            seen |= new


def tensors(tree):
    """Those with dimensions among the leaves."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(x) and x.dim()
            and not x.is_nested]


def check_terms(loss_terms):
    with suppress(TypeError, ValueError):
        if loss_terms in ("samples", "tokens") or (
                not isinstance(loss_terms, str) and 0 <= float(loss_terms) < inf):
            return
    raise ValueError(
        f"KFAC: loss_terms must be 'samples', 'tokens' or a number, got {loss_terms!r}")


def count_terms(layers, loss_terms, sequence_first):
    """The terms behind the pending sums of these layers; RuntimeError if that is not known.

    sequence_first: has the model modules that take (positions, samples, ·)?
    """
    check_terms(loss_terms)
    if not isinstance(loss_terms, str):
        return float(loss_terms) if layers else 0
    for layer in layers:
        if len({backward for _, backward in layer.calls}) < len(layer.calls):
            raise unknown(f"layer {layer.name} ran in several calls of the model behind one "
                          "backward pass, whose losses may be added or averaged")
    pairs = {pair for layer in layers for pair in layer.calls}
    total, counted = 0, set()
    for backward in {backward for _, backward in pairs}:
        calls = {call for call, other in pairs if other == backward}     # parts side by side
        terms = {terms_of(call, loss_terms, sequence_first) for call in calls}
        if len(terms) > 1:
            raise unknown(f"parts of the model were called with {sorted(terms)} {loss_terms}")
        total += 0 if calls & counted else terms.pop()
        counted |= calls
    return total


def terms_of(call, loss_terms, sequence_first):
    """The terms of one call, by 'samples' or 'tokens'."""
    if not call.inputs:
        raise unknown("the model, or its part, was called with no tensor")
    given = ", ".join(str(tuple(shape)) for shape, _ in call.inputs[:3])
    if not call.batched:
        raise unknown(f"a layer took the whole input {given} for a single sample")
    for shape, _ in call.inputs:
        if sequence_first and loss_terms == "samples" and any(
                len(out) == 3 and out[:2] == shape[:2] and out[0] != out[1]
                for out in call.outputs):
            raise unknown(f"a module has batch_first=False, so {given} may have samples in its "
                          "second dimension")
    counts = samples if loss_terms == "samples" else positions
    for out in call.outputs:
        known = counts(out) + ([prod(out)] if loss_terms == "tokens" else [])  # one number for each
        for n in (n for went_in in call.inputs for n in counts(*went_in) if n in known):
            return n
    if not call.outputs and len(counts(*call.inputs[0])) == 1:           # the loss is inside
        return counts(*call.inputs[0])[0]
    came = ", ".join(str(tuple(shape)) for shape in call.outputs[:3])
    raise unknown(f"{given} went in and {came} came out, with no number of {loss_terms} in common")


def samples(shape, of_floats=True):
    return [shape[0]]


def positions(shape, of_floats=True):
    """Their number, the likelier first: all dimensions but one of features or classes, the second
    of images and the last of others, or the other way round. Token ids have no such dimension."""
    if len(shape) < 3:
        return [shape[0] if of_floats else prod(shape)]
    last, second = prod(shape[:-1]), shape[0] * prod(shape[2:])
    return [last, second] if len(shape) == 3 else [second, last]


def unknown(why):
    return RuntimeError(
        f"KFAC: how many terms the loss is a mean of is not known: {why}. Say it: "
        "loss_terms=<number> in KFAC(...), or optimizer.loss_terms = <number> before each step(); "
        "then repeat this step's forward and backward passes")
