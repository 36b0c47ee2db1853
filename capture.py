"""What a model shows an optimizer: the uses of its weights, and sums over the rows of these.

How a statistic comes about. A *layer* (layers.py) is a weight that the optimizer may precondition;
a *use* (uses.py) is one call of torch (F.linear, torch.conv2d, a norm, ...) with that weight, or a
slice of its rows. While the optimizer collects, hooks on the model's modules switch a Watcher on
for each forward pass. It sees every such call with the tensors that torch really got, asks the
optimizer to `measure` the use, and keeps the sums until the gradient of the use's output arrives:
then they join the layer's pending sums, so that only forward passes that are backpropagated count.
zero_grad() drops what is pending; step() takes it, pooled over micro-batches by count and over
ranks by one all-reduce, once into the average.

What a weight multiplies is never guessed from a module's class: a subclass that normalises, pads or
drops its input shows what came of that, and a weight that is computed before it is used (a
parametrization, a standardised convolution) shows nothing and takes the plain step; if it was used
before, from the next collecting step on. A use that the layer's statistics cannot describe sends
the layer to the plain step for good, with the reason.

Not seen, hence plain: einsum, custom autograd functions (except SyncBatchNorm's), recurrent layers.
Where a weight is used properly too, one more use of it is not noticed, and its rows are not in the
statistics, if it is by such an operation (except for those in uses.OTHERS), outside any module's
call, of entries that are picked by an index tensor, in the second backward pass of a gradient
penalty, or through functional_call with weights made from it. Gradients that torch.autograd.grad
took and that are put into .grad by hand count the rows of the last such call alone.
"""
import threading
import types
import weakref
from contextlib import suppress
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

from precision import full_precision
from sharding import Unsharded, is_sharded
from uses import SEEN, Use, norm


class Watcher(TorchFunctionMode):
    """Sees, during a model's forward passes, each call of torch that has a weight of a layer.

    Holds its optimizer weakly, and nothing of a forward pass but what was measured.
    """

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = weakref.ref(optimizer)
        self.layers = {}                       # weight: Layer
        self.parameter = Unsharded(nn.Module())    # that a weight in a forward pass stands for
        self.on = True                         # set by step(); constant during a forward pass
        self.local = threading.local()         # inside: watched modules being called, outer first
        self.attention = None                  # follows attention through a forward pass, for MAC
        self.calls = None                      # tells calls of the model apart, for K-FAC

    @property
    def inside(self):
        return self.local.__dict__.setdefault("inside", [])

    @torch.compiler.disable
    def enter(self, module, args, kwargs):
        if not self.inside:
            if torch.jit.is_tracing() or get_proxy_mode() or self.optimizer() is None:
                return                                           # get_proxy_mode: of make_fx
            if self.calls is not None:
                self.calls.begin(module, args, kwargs)
            self.local.optimizer = self.optimizer()    # it lives, and so do its hooks, to the end
            self.__enter__()
        self.inside.append(module)

    @torch.compiler.disable
    def leave(self, module, output=None):
        """End a module's call, and what it called; not if it failed before it was entered."""
        if module not in self.inside:
            return
        while self.inside.pop() is not module:
            pass
        if not self.inside:
            self.__exit__(None, None, None)
            self.local.optimizer = None
            if self.calls is not None:
                self.calls.end(output)
        if self.attention is not None:
            self.attention.left(len(self.inside))

    def reset(self):
        """End a forward pass that was interrupted (Ctrl-C), which calls no hooks."""
        while self.inside:
            self.leave(self.inside[0])

    @torch.compiler.disable
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            self.local.batch = query.shape[1] if query.dim() == 3 else 1
            try:
                with self:                                 # so that its parts are seen
                    return multi_head_attention(*args, **kwargs)
            finally:
                self.local.batch = None
        out = func(*args, **kwargs)
        see = SEEN.get(func)
        if (see is not None or self.attention is not None) and self.sees(out):
            if see is not None:
                see(self, out, *args, **kwargs)
            if self.attention is not None and not out.is_nested:
                self.attention.see(func, out, args, kwargs)
        return out

    def sees(self, out):
        """Numbers that will be backpropagated: no fake or functional tensor, no transform's."""
        return (torch.is_grad_enabled() and isinstance(out, torch.Tensor)
                and type(out).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
                and out.requires_grad and out.numel() > 0 and not is_transformed(out))

    def find(self, weight):
        """(layer, its rows that this tensor holds, is it transposed?) or None."""
        layer = self.layers.get(self.parameter(weight))
        if layer is not None:
            return (layer, slice(0, layer.out), False) if layer.active else None
        base = weight._base if isinstance(weight, torch.Tensor) else None
        layer = self.layers.get(self.parameter(base))
        if layer is None or not layer.active or (
                torch.is_grad_enabled() and weight.is_leaf):        # a view made without gradients
            return None
        if weight.dim() == 2 == base.dim() and weight.shape == base.shape[::-1] \
                and weight.stride() == base.stride()[::-1]:
            return layer, slice(0, layer.out), True
        if weight.shape[1:] == base.shape[1:] and weight.stride() == base.stride() \
                and not layer.transposed:
            first = (weight.storage_offset() - base.storage_offset()) // base.stride(0)
            return layer, slice(first, first + len(weight)), False
        self.contradict(layer, "it is used in another shape")

    def contradict(self, layer, why):
        """From now on the layer takes the plain step; a resumed run finds out anew."""
        layer.found = {"plain": why}
        self.optimizer().forget(layer)

    def use_of(self, found, kind, x, out, bias, **details):
        """The use of a layer by this call, or None if the layer's statistics cannot describe it."""
        layer, rows, _ = found
        if x.is_nested or x.layout is not torch.strided:
            return self.contradict(layer, "its input is nested or sparse")
        blocks, size = slice(0, layer.blocks), layer.out // layer.blocks
        if kind != layer.kind and (kind, layer.kind) != ("linear", "projection"):
            return self.contradict(layer, f"it is used as the weight of a {kind}")
        if rows != slice(0, layer.out):
            if kind != "linear" or rows.start % size or rows.stop % size:
                return self.contradict(layer, "some of its rows are used alone")
            blocks = slice(rows.start // size, rows.stop // size)
        if not self.has_bias(layer, bias, rows):
            self.optimizer().part_with_bias(layer)
        use = Use(kind, x.detach(), out, out.shape, 0, blocks,
                  batch=getattr(self.local, "batch", None), **details)
        if kind == "conv":
            if use.geometry.groups != layer.blocks:
                return self.contradict(layer, "its convolution has other groups")
            if x.dim() == 3:
                use.x, use.shape = use.x[None], torch.Size((1, *out.shape))
            use.rows = use.shape[0] * use.shape[2] * use.shape[3]
        else:
            use.rows = x.numel() // (x.shape[-1] if kind == "linear" else layer.weight.numel())
        return use

    def has_bias(self, layer, bias, rows):
        """Is this the layer's, or the slice of it that belongs to these rows of the weight?"""
        if layer.bias is None:
            return True             # whatever is added to the output takes the plain step
        if not layer.bias.requires_grad:
            return False            # frozen since the layer was found
        if bias is None or self.parameter(bias) is layer.bias:
            return bias is not None and rows == layer.bias_rows == slice(0, len(bias))
        whole = bias._base
        return (whole is not None and self.parameter(whole) is layer.bias
                and bias.stride() == whole.stride()
                and bias.storage_offset() - whole.storage_offset()
                == layer.bias_rows.start + rows.start)

    def record(self, found, kind, x, out, bias, **details):
        """Measure a use of a layer; its sums are pending from when it is backpropagated."""
        layer, optimizer = found[0], self.optimizer()
        use = self.use_of(found, kind, x, out, bias, **details) if layer.on else None
        if use is None:
            return
        if kind == "linear" and self.attention is not None:
            self.attention.note(layer, found[1], x, out)
        with torch.no_grad(), full_precision(out.device.type):
            sums, rows = optimizer.measure(layer, use)
        use.x = use.out = None
        self.when_backpropagated(layer, use, sums, rows, out)

    def when_backpropagated(self, layer, use, sums, rows, out):
        """Add the sums to the layer's pending ones when the gradient of out arrives."""
        # A linear's output on more than two dimensions is a view; an in-place activation replaces
        # the view's history, and a hook on it would never fire. Its base sees the gradient always,
        # and the base's node, what the model's own hooks made of it.
        out = out._base if out._is_view() else out
        # A reentrant checkpoint, or an adjoint method, runs backward passes inside one: theirs are
        # its rows too.
        within = torch._C._current_graph_task_id()                                     # or -1
        out.grad_fn.register_prehook(
            partial(self.arrived, layer, layer.d, use, sums, rows, within, out.output_nr))

    @torch.compiler.disable
    def arrived(self, layer, d, use, sums, rows, within, number, grads):
        grad, optimizer = grads[number], self.optimizer()
        if layer.d != d or grad is None or optimizer is None or optimizer.ignores_gradients \
                or is_transformed(grad) or not reaches(layer.weight):    # d: has a bias gone since?
            return
        backward = torch._C._current_graph_task_id() if within == -1 else within
        # Where an earlier backward pass left no gradient, zero_grad on the model has dropped it,
        # and so are the sums that it left. (A sharded weight may have its gradient elsewhere.)
        earlier = layer.weight.grad is not None or is_sharded(layer.weight)
        if not earlier and layer.backward != backward:
            layer.drop()
        layer.backward = backward
        for name, total in sums.items():
            layer.add(name, total, rows, use.blocks)
        if optimizer.needs_gradients and use.kind != "values":
            with torch.no_grad(), full_precision(grad.device.type):
                optimizer.add_gradient(layer, use, grad.detach().reshape(use.shape))


def reaches(weight):
    """Does this backward pass go to the weight, as one by inputs (a saliency map, the inner part
    of a gradient penalty) does not? Of a sharded weight that is not known, so True."""
    with suppress(RuntimeError):                   # of autograd.grad, where the weight is an input
        return is_sharded(weight) or torch._C._will_engine_execute_node(
            get_gradient_edge(weight).node)
    return True


def is_transformed(x):
    """Is x torch.func's, or a batch of gradients (is_grads_batched)?"""
    return (torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._functorch.is_legacy_batchedtensor(x))


class Hook:
    """Switches the watcher on before a module's forward and off after it.

    A copied or unpickled model gets an inert one, so a copy feeds nothing.
    """

    def __init__(self, watcher=None, module=None):
        self.watcher, self.module = watcher, module

    def __reduce__(self):
        return type(self), ()

    def works(self, module):
        exporting = getattr(torch.compiler, "is_exporting", bool)            # torch 2.6 has none
        return (self.watcher is not None and self.watcher.on and module is self.module
                and not exporting())


class Enter(Hook):
    def __call__(self, module, args, kwargs):
        if self.works(module):
            self.watcher.enter(module, args, kwargs)


class Leave(Hook):
    def __call__(self, module, args, output):
        if self.works(module):
            if isinstance(module, nn.SyncBatchNorm) and args and self.watcher.sees(output) \
                    and output.grad_fn.name() == "SyncBatchNormBackward":
                # over several processes it is an autograd function, which the mode does not see
                norm(self.watcher, output, args[0], module.weight, module.bias, eps=module.eps,
                     mean=None, var=None)
            self.watcher.leave(module, output)


def watch(model, watcher, hooked):
    """Hook the modules that hold layers; any of them may be what a training loop calls.

    hooked: {module: its two handles}, to which the new ones are added.
    """
    def holds(module):
        inner = [holds(child) for child in module.children()]         # so that all are visited
        held = any(inner) or any(p in watcher.layers for p in module._parameters.values())
        if held and module not in hooked:
            hooked[module] = (
                module.register_forward_pre_hook(Enter(watcher, module), with_kwargs=True),
                module.register_forward_hook(Leave(watcher, module), always_call=True))
        return held
    holds(model)


def remove_hooks(hooked):
    """When an optimizer is gone, its hooks should cost the model nothing."""
    for handles in hooked.values():
        for handle in handles:
            handle.remove()


# torch's own function without its first line, which would hand the call back to the watcher
multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__, vars(F) | {"has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__)
