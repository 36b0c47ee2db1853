"""What the methods have in common: averages of statistics, torch's interface, momentum SGD on G̃.

A method answers five questions, and is a class of one screen then:

    kinds                    {kind of use: how it is preconditioned, in words}: which layers
    set_up(layer)            layer.measured, layer.prepared = {name in state: shape (blocks, ...)}
    measure(layer, use)      {name: Σ over the rows of one use (blocks or 1, ...)}, number of rows;
                             where needs_gradients, measure_gradient(layer, use, grad): {name: Σ}
    prepare(damping, **measured)     {name: what is made of the averages}, which blocks failed
    apply(G, damping, **prepared)    G̃ for G (blocks, out/blocks, d) = [weight | bias]; where
                             row_by_row, each row by itself, so that sharded rows stay apart

What a step does, in order: every tcov steps it takes the sums that capture.py has pending, pools
them over micro-batches by count and over ranks by an all-reduce, and joins them to the averages;
every tinv steps (and for a layer that has none yet) it prepares what is applied; then it puts G̃ =
apply(G) in the place of each layer's gradient, takes torch's SGD step, and puts the raw gradients
back. Layers of one shape go through prepare and apply together, as the blocks of one layer, so a
small network costs a GPU few launches.

    average      m̂ ← m̂ + w (x − m̂),  w = (1 − β)/(1 − βᵏ)         bias-corrected; the k-th update
    SGD          M ← μM + (G̃ + wd·W),  W ← W − ηM

State stands in optimizer.state[weight] under plain names, with "updates" (k) and "step".
"""
import inspect
import warnings
import weakref
from contextlib import suppress

import torch
import torch.nn as nn

from blocks import gradient_matrix, joined, replace_gradients, stacks
from capture import Watcher, remove_hooks, watch
from layers import candidates
from pooling import agree, pool, running_mean
from precision import at_least_float32, full_precision
from sharding import Unsharded, cut_otherwise, is_sharded, local

POSITIVE = (lambda v: 0 < v < float("inf"), "a positive number")
NOT_NEGATIVE = (lambda v: 0 <= v < float("inf"), "a number, 0 or more")
DECAY = (lambda v: 0 <= v < 1, "at least 0 and below 1")
PERIOD = (lambda v: v >= 1 and v % 1 == 0, "a whole number of steps, 1 or more")
sgd_step = inspect.unwrap(torch.optim.SGD.step)   # without the step hooks, which ours already fires


class Preconditioner(torch.optim.Optimizer):
    """Statistics of a model's layers, averaged, kept in the state, restored: all but the update."""

    kinds = {}
    checks = {}                    # option of a group: (is it valid, what is wanted in words)
    needs_gradients = False        # does the method have measure_gradient(layer, use, grad)?
    row_by_row = False             # does a row of G̃ depend on this row of G alone?
    ignores_gradients = False      # True while gradients flow that are no training step's
    failure = "the average of layer {name} cannot be factored with damping {damping}"

    def __init__(self, model, params, torch_options, options):
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: the first argument is the model, a torch.nn.Module, not "
                            f"{type(model).__name__}; parameters are given as params=... (where a "
                            "framework would make the optimizer, make it first and hand it over, "
                            "as in Trainer(optimizers=(optimizer, None)))")
        if isinstance(model, nn.DataParallel):
            raise TypeError(f"{name}: nn.DataParallel runs replicas whose statistics are lost; use "
                            "DistributedDataParallel, or the module inside it on one device")
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
            raise TypeError(f"{name}: FullyShardedDataParallel flattens weights, which leaves no "
                            "rows of them; use torch.distributed.fsdp.fully_shard")
        self.model, self.steps, self.captured, self.hooked = model, 0, False, {}
        self.watcher = Watcher(self)
        weakref.finalize(self, remove_hooks, self.hooked).atexit = False
        self.ready = False             # while torch's constructor adds the first groups
        super().__init__(model.parameters() if params is None else params, **torch_options)
        self.defaults.update(options)
        for group in self.param_groups:
            group.update(self.defaults | group)
            self.check(group)
        # fused SGD would take a GradScaler's steps itself, the skipped ones included
        self._step_supports_amp_scaling = False
        self.ready = True
        self.find_layers()
        if not self.layers:
            warnings.warn(f"{name}: the model has no weight that it could precondition among the "
                          f"parameters ({', '.join(self.kinds)}), so all take the plain step")

    # ---- groups and layers ----

    def check(self, group):
        """Raise ValueError, naming the argument and its value, for what the step cannot use."""
        for name, (valid, wanted) in self.checks.items():
            with suppress(TypeError):                                # of a string, or None
                if valid(group[name]):
                    continue
            raise ValueError(f"{type(self).__name__}: {name} must be {wanted}, got {group[name]!r}")

    def add_param_group(self, param_group):
        if self.ready and isinstance(param_group, dict):
            self.check(self.defaults | param_group)
        super().add_param_group(param_group)
        if self.ready:
            self.find_layers()

    @property
    def layers(self):
        """{weight: Layer} of all weights in the groups that may be preconditioned."""
        return self.watcher.layers

    def find_layers(self):
        """Watch every weight in the groups; again when groups are added."""
        given = {p for group in self.param_groups for p in group["params"]}
        self.watcher.parameter = Unsharded(self.model)
        for weight, layer in self.candidates().items():
            if weight in given and weight not in self.layers:
                bias, sharded = layer.bias, is_sharded(weight)
                if bias is not None and (
                        bias not in given or not bias.requires_grad or is_sharded(bias) != sharded
                        or sharded and layer.bias_rows != slice(0, len(bias))):
                    layer.bias = None             # it takes the plain step, if any
                if sharded and cut_otherwise(weight):
                    layer.found["plain"] = cut_otherwise(weight)
                self.set_up(layer)
                self.layers[weight] = layer
        watch(self.model, self.watcher, self.hooked)
        self.begin_step()

    def part_with_bias(self, layer):
        """The layer was used with another bias than its module's (SwinV2's is computed): from now
        on its rows are a, not [a; 1], and its bias, if it has a gradient, takes the plain step."""
        layer.bias, layer.found["bias"] = None, "apart"
        self.forget(layer)
        self.set_up(layer)

    def forget(self, layer):
        """Drop a layer's statistics: they are not of what its uses have shown since."""
        layer.drop()
        for name in ("updates", "fixed", *layer.measured, *layer.prepared):
            self.state.get(layer.weight, {}).pop(name, None)

    def candidates(self):
        return candidates(self.model, self.kinds)

    def grouped(self):
        """(layer, its group) of active layers, in an order that is the same on all ranks."""
        return [(layer, group) for group in self.param_groups
                for layer in map(self.layers.get, group["params"])
                if layer is not None and layer.active]

    def add_gradient(self, layer, use, grad):
        for name, total in self.measure_gradient(layer, use, grad).items():
            layer.add(name, total, use.rows, use.blocks)

    # ---- the step ----

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):
        """One step, with what is due in it; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.is_trial():
            known = self.captured
            self.take_step()
            if self.captured and not known:
                self.warn_of_plain_steps()
            self.steps += 1
            self.begin_step()
        return loss

    def begin_step(self):
        """Tell the watcher whether the coming step's batch counts; note the step in the state."""
        for layer in self.layers.values():
            layer.on = False                   # its weight may have left the groups
        for group in self.param_groups:
            for layer in filter(None, map(self.layers.get, group["params"])):
                state = self.state.get(layer.weight, {})
                layer.on = self.steps % group["tcov"] == 0 and not state.get("fixed", False)
                if "updates" in state:
                    state["step"] = self.steps
        self.watcher.reset()
        # frozen ones too: who unfreezes them before the coming forward pass does not tell
        self.watcher.on = any(layer.on and "plain" not in layer.found
                              for layer in self.layers.values())

    @property
    def collecting(self):
        """Will the coming forward pass feed statistics? Then a compiled model falls back to
        eager calls: faster is to call the plain model now, and the compiled one otherwise."""
        return self.watcher.on

    # ---- the averages ----

    def update_statistics(self):
        """Join the pending sums of the layers due to their averages."""
        if self.model is None:
            raise RuntimeError(f"{type(self).__name__}: this optimizer was copied or unpickled and "
                               "has no model; make a new one and load this one's state_dict()")
        if not self.captured:
            self.check_parameters()
        if not any(layer.on for layer in self.layers.values()):
            return
        agree(list(self.layers.values()), self.merge)
        due = [(layer, group) for layer, group in self.grouped() if layer.on]
        for layer, _ in due:
            if layer.weight.grad is None:      # dropped, and no backward pass has come since
                layer.drop()
        found = self.pooled([layer for layer, _ in due]) if due else {}
        self.check_captured(found, due)
        averages = {}
        for layer, group in due:
            if layer not in found:             # it rests, or is pruned by now and so computed
                if self.state.get(layer.weight, {}).get("updates") and has_gradient(layer.weight):
                    self.forget(layer)
                continue
            state = self.state[layer.weight]
            state["updates"] = state.get("updates", 0) + 1
            for name in layer.prepared if state["updates"] == 1 else ():
                state.pop(name, None)          # zeros of is_trial()
            for name, mean in found[layer].items():
                if name in state and state["updates"] > 1:
                    state[name] = state[name].to(mean.dtype)    # where the model's was changed
                    olds, means = averages.setdefault(
                        (state["updates"], self.past(group)), ([], []))
                    olds.append(state[name])
                    means.append(mean)
                else:
                    state[name] = mean.clone()                  # the buffer's memory is not kept
        for (updates, decay), (olds, means) in averages.items():
            running_mean(olds, means, updates, decay)

    def past(self, group):
        """β, the weight of the past in the averages."""
        return group["stat_decay"]

    def check_parameters(self):
        """A model that has other parameters by now would stay as it is."""
        if self.layers and not any(is_sharded(weight) for weight in self.layers) \
                and self.layers.keys().isdisjoint(self.model.parameters()):
            name = type(self).__name__
            raise RuntimeError(f"{name}: its parameters are the model's no more: fully_shard() "
                               "replaces a model's parameters, and so does load_state_dict(..., "
                               f"assign=True), so call these before {name} is made (Accelerate's "
                               "prepare() then leaves the model as it is)")

    def check_captured(self, found, due):
        """A step whose gradients came with no statistics at all is no step of this model's."""
        if found:
            self.captured = True
            return
        name = type(self).__name__
        if due and not self.captured or any(
                has_gradient(layer.weight) for layer, _ in due):     # else an empty batch
            raise RuntimeError(
                f"{name}: step() was called, but no layer it preconditions has run and received a "
                "gradient since the last zero_grad(). Was another model or a copy of it trained, "
                f"was the model compiled and called before {name} was made (then call the plain "
                "model while optimizer.collecting), did zero_grad() come between backward() and "
                "step(), was backward() not called, or is every weight computed before it is used "
                "(then take torch.optim)?")

    def pooled(self, layers):
        """{layer: {name: Σ / rows}} of the layers that some rank saw. Drops their sums."""
        slots, totals, bad = pool(layers, self.numbers_to_sum())
        if bad is not None:
            raise FloatingPointError(
                f"{type(self).__name__}: the statistics ({bad[1]}) of layer {bad[0].name} are not "
                f"finite in step {self.steps}; no parameter was changed. Lower the learning rate, "
                "or look for the overflow that caused it")
        self.summed_numbers(totals)
        found, blocks, divisors = {}, [], []
        for layer, name, total, rows in slots:
            each = self.divisors(layer, name, rows)
            if any(each):
                found.setdefault(layer, {})[name] = total
                blocks += total.unbind()
                divisors += [n or 1 for n in each]
        if blocks:
            torch._foreach_div_(blocks, divisors)
        return {layer: {name: mean.to(layer.weight.device, at_least_float32(layer.weight))
                        for name, mean in means.items()} for layer, means in found.items()}

    def numbers_to_sum(self):
        """Numbers of this rank's whose sums over ranks the method wants."""
        return []

    def summed_numbers(self, totals):
        """What became of numbers_to_sum()."""

    def divisors(self, layer, name, rows):
        """By what the sums of a layer's blocks are divided; 0 where there is nothing to average."""
        return rows

    def merge(self, layer, everyone):
        """Take over what the uses on all ranks have shown of a layer."""
        reasons = [found["plain"] for found in everyone if "plain" in found]
        if reasons:
            self.watcher.contradict(layer, reasons[0])
        elif "bias" not in layer.found and any("bias" in found for found in everyone):
            self.part_with_bias(layer)

    # ---- the rest of torch's interface ----

    def is_trial(self):
        """torch.distributed.checkpoint makes the state by a step of zero gradients at lr 0, before
        any other: then the state is made, of zeros, as a checkpoint fills it."""
        if self.steps or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(map(has_gradient, params)):                        # a warm-up that begins at lr 0
            return False
        for p in params:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        for layer, _ in self.grouped():
            state, like = self.state[layer.weight], local(layer.weight)
            state.update(updates=0, step=0)
            for name, shape in (layer.measured | layer.prepared).items():
                state[name] = like.new_zeros(shape, dtype=at_least_float32(like))
        self.begin_step()
        return True

    @torch.compiler.disable
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.watcher.reset()
        for layer in self.layers.values():
            layer.drop()

    def load_state_dict(self, state_dict):
        """As torch's; ValueError if the statistics are another network's or another method's."""
        kept = []                    # what the hooks before loading, these the last, make of it
        last = self.register_load_state_dict_pre_hook(lambda _, given: kept.append(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        # torch has cast the statistics to the weights' dtype: take them again as they were saved
        saved = [i for group in kept[0]["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params):
            if p in self.layers:
                self.set_up(self.layers[p])        # its shapes may follow from loaded options
                self.restore(self.layers[p], kept[0]["state"].get(i, {}))
        self.steps = max([state.get("step", 0) for state in self.state.values()], default=0)
        self.captured = False
        for layer in self.layers.values():
            layer.drop()
        self.begin_step()

    def restore(self, layer, saved):
        """A layer's statistics as they were saved, checked against what it measures."""
        def misfits():
            return [(name, shape) for name, shape in (layer.measured | layer.prepared).items()
                    if name in saved and saved[name].shape != torch.Size(shape)]
        bias = layer.bias
        if bias is not None and misfits():           # had it parted with its bias?
            layer.bias, layer.found["bias"] = None, "apart"
            self.set_up(layer)
            if misfits():
                layer.bias = bias
                del layer.found["bias"]
                self.set_up(layer)
        where = f"of layer {layer.name}"
        for name, shape in misfits():
            raise ValueError(f"{type(self).__name__}: the checkpoint's {name} {where} is "
                             f"{tuple(saved[name].shape)}, this model's {tuple(shape)}; is it of "
                             "another network, or of another version of this program?")
        for name in layer.measured | layer.prepared:
            if name in saved:
                self.state[layer.weight][name] = saved[name].to(
                    layer.weight.device, at_least_float32(layer.weight), copy=True)
            elif name in layer.measured and saved.get("updates"):
                raise ValueError(f"{type(self).__name__}: the checkpoint has no {name} {where}; "
                                 "was it saved with other options?")

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:      # a checkpoint of torch's own lacks our options
            group.update(self.defaults | group)
        if "model" not in self.__dict__:     # copied or unpickled
            self.model, self.steps, self.captured, self.hooked = None, 0, False, {}
            self.watcher, self.ready = Watcher(self), False

    def listed(self):
        """The layers that are preconditioned, and what share of all numbers they have."""
        # one without statistics had its chance: it is computed, or has not run yet
        layers = [layer for layer, _ in self.grouped()
                  if not self.captured or self.state.get(layer.weight, {}).get("updates")]
        given = {p for group in self.param_groups for p in group["params"] if p.requires_grad}
        return layers, sum(layer.out * layer.d for layer in layers) / max(
            1, sum(p.numel() for p in given))

    def warn_of_plain_steps(self):
        layers, share = self.listed()
        if share < 0.5:
            name = type(self).__name__
            warnings.warn(f"{name} preconditions {share:.0%} of the numbers that it was given, in "
                          f"{len(layers)} weights; all others take the plain step. "
                          "print(optimizer) lists them, with the reason where it is known")

    def __repr__(self):
        lines, size, plain, done = [], 0, [], set()
        layers, share = self.listed()
        for layer in layers:
            n = sum(torch.Size(shape).numel() for shapes in (layer.measured, layer.prepared)
                    for shape in shapes.values()) * at_least_float32(layer.weight).itemsize
            lines.append(f"  {layer.name}: {layer.out}×{layer.d}, {self.how(layer)}, {n:,} bytes")
            size += n
            done |= {layer.weight, layer.bias}
        reasons = {p: f" ({layer.found.get('plain', 'no use of it was seen')})"
                   for layer in self.layers.values() for p in (layer.weight, layer.bias)}
        named = dict(self.model.named_parameters()) if self.model is not None else {}
        given = {p for group in self.param_groups for p in group["params"] if p.requires_grad}
        for name, p in zip(named, map(self.watcher.parameter, named.values())):
            if p in given and p not in done:
                plain.append(name.removesuffix(".weight").removesuffix(".bias")
                             + reasons.get(p, ""))
        return "\n".join([super().__repr__(), f"preconditioned: {len(lines)} weights, "
                          f"{share:.1%} of all numbers, {size:,} bytes of statistics"
                          + ("" if self.captured else " to come"), *lines,
                          "plain step: " + (", ".join(dict.fromkeys(plain)) or "nothing else")])

    def how(self, layer):
        """How a layer is preconditioned, in words."""
        return self.kinds[layer.kind]


def has_gradient(p):
    """One that is not zero? Of a sharded p all ranks ask, and get one answer."""
    if p.grad is None:
        return False
    some = p.grad.any()
    return bool(some.full_tensor() if is_sharded(some) else some)


class PreconditionedSGD(Preconditioner, torch.optim.SGD):
    """torch's momentum SGD, in all ways, on preconditioned gradients.

    model: its layers whose weights are in the parameter groups are preconditioned; all other
        parameters take the plain step. `print(optimizer)` lists both.
    params: tensors, (name, tensor) pairs or group dicts; default model.parameters(). A group may
        set any of the options below for itself.
    lr (η), momentum (μ), nesterov, weight_decay (wd), maximize, foreach, fused: torch.optim.SGD's.
        Decay joins after preconditioning; decoupled_weight_decay takes W ← (1 − η·wd)W instead.
    damping (ρ): > 0.   stat_decay (β): in [0, 1), the weight of the past in the averages.
    tcov: every tcov steps the batch joins the average. tinv: every tinv steps what is applied is
        refreshed from it. Both before the step is taken, beginning with the first.

    Raises TypeError if model is none, ValueError for an option out of range. step() raises
    RuntimeError if its batch passed no layer, FloatingPointError if a statistic is not finite
    (parameters and state stay) or cannot be factored (parameters stay).
    """

    checks = dict(lr=NOT_NEGATIVE, momentum=NOT_NEGATIVE, weight_decay=NOT_NEGATIVE,
                  decoupled_weight_decay=(lambda v: v in (True, False), "True or False"),
                  damping=POSITIVE, stat_decay=DECAY, tcov=PERIOD, tinv=PERIOD)

    def __init__(self, given):
        """given: the arguments of a method's constructor by name, as locals() has them there."""
        of_sgd = ("lr", "momentum", "nesterov", "weight_decay", "maximize", "foreach", "fused")
        options = {name: given.get(name, False) for name in self.checks}
        self.check(options)
        super().__init__(given["model"], given["params"],
                         {name: given[name] for name in of_sgd if name in given}, options)

    def take_step(self):
        """Statistics, refresh, precondition, momentum-SGD step. Afterwards p.grad is raw again."""
        raw, decay = {}, []
        try:
            with full_precision(next(iter(self.layers), torch.empty(0)).device.type):
                self.update_statistics()
                self.refresh()
                self.precondition_gradients(raw)
            for group in self.param_groups:
                if group["decoupled_weight_decay"]:
                    decay.append((group, group["weight_decay"]))
                    for p in group["params"]:
                        if p.grad is not None:
                            p.mul_(1 - group["lr"] * group["weight_decay"])
                    group["weight_decay"] = 0.0
            sgd_step(self)
        finally:
            for p, grad in raw.items():
                p.grad = grad
            for group, value in decay:
                group["weight_decay"] = value

    def refresh(self):
        """Prepare what is applied, every tinv steps, or where there is nothing to apply."""
        due = []
        for layer, group in self.grouped():
            state = self.state.get(layer.weight, {})
            if state.get("updates") and (self.steps % group["tinv"] == 0
                                         or any(name not in state for name in layer.prepared)):
                due.append((layer, group))
        parts = list(stacks(due))
        for (layers, damping), (prepared, failed) in zip(parts, self.prepare_all(parts)):
            if failed is not None and failed.any():
                bad = layers[failed.view(len(layers), -1).any(1).int().argmax()]
                raise FloatingPointError(f"{type(self).__name__}: " + self.failure.format(
                    name=bad.name, damping=damping))
            for name, whole in prepared.items():
                # row-major like what is loaded, so that a resumed run rounds alike
                each = whole.contiguous().split(len(whole) // len(layers))
                for layer, part in zip(layers, each):
                    self.state[layer.weight][name] = part

    def prepare_all(self, parts):
        """prepare() for each of these lists of layers of one shape, with their damping."""
        for layers, damping in parts:
            yield self.prepare(damping, **self.gathered(layers, layers[0].measured))

    def gathered(self, layers, names):
        """{name: that state of all these layers, their blocks in a row}."""
        states = [self.state[layer.weight] for layer in layers]
        return {name: joined([state[name] for state in states]) for name in names}

    def precondition_gradients(self, raw):
        """Replace p.grad by G̃ for every layer that has statistics; raw collects what was there."""
        ready = [(layer, group) for layer, group in self.grouped() if layer.weight.grad is not None
                 and self.state.get(layer.weight, {}).get("updates")]
        found = []
        for layers, damping in stacks(ready):
            prepared = self.gathered(layers, layers[0].prepared)
            blocks = len(next(iter(prepared.values())))
            G = gradient_matrix(layers, blocks // len(layers), self.row_by_row)
            G = G.unflatten(0, (blocks, len(G) // blocks))
            prepared = {name: x.to(G.dtype) for name, x in prepared.items()}
            found.append((layers, G, self.apply(G, damping, **prepared)))
        self.rescale(found)
        for layers, _, new in found:
            replace_gradients(layers, new.flatten(0, 1), raw)

    def rescale(self, found):
        """What is to be done with all G̃ together: found lists (layers, G, G̃)."""
