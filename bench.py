"""What a step of each optimizer costs in time and memory, as a ratio to SGD's, on this machine.

    python bench.py                                   # ResNet-20, batch 128: some two minutes
    python bench.py --optim mac foof --repeats 30     # closer, where other work disturbs
    python bench.py --model deit_tiny_cifar --tinv 5 --csv deit.csv
    python bench.py --device cuda --amp --channels_last --model resnet50 --compile --repeats 30
    python bench.py --device cuda --amp --model gpt2_small --batch_size 8 --tinv 5
    python bench.py --scaling                         # how one layer's cost grows: three minutes
    python bench.py --launches --model resnet110      # operators that a GPU would have to launch

All optimizers train copies of one network on the same random images, in turn, step by step, in one
process, so that whatever else the machine does meets all of them alike. Steps differ by what is due
in them, by tcov and tinv. Each repeat takes one step of every kind; weighted by how often the kind
comes in a cycle of tinv steps, and divided by SGD's step of that repeat, they are one ratio. Shown
are medians over the repeats, and the quartiles. Times are CPU seconds of one thread, on a GPU
seconds between events on its stream. With --compile the steps that collect no statistics run the
compiled network, as in the training scripts.

    statistics       in the hooks and at the beginning of step()
    factorisation    bringing what is applied up to date
    application      all else in step(), beyond SGD's step()
    parts            1 and these three: steadier than the whole step, as most of that is the same
                     forward and backward passes, which whatever disturbs them makes unequal
    state            numbers kept per parameter, SGD's momentum included
    peak             most bytes allocated in a step in which everything is due, beyond SGD's
"""
import argparse
import contextlib
import copy
import csv
import itertools
import math
import os
import statistics
import sys
import time
from collections import defaultdict

os.environ.setdefault("KINETO_LOG_LEVEL", "99")        # the profiler's own remarks; read when
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from attention import Attention
from capture import Watcher
from flags import COUNT, OURS, RECIPES, TORCH, Parser, note_unused
from models import CIFAR_MODELS, GPT, GPT_SIZES, IMAGENET_MODELS
from optimizer import Preconditioner
from ranks import UsageError, find_device
from report import print_anything

PARTS = ("statistics", "factorisation", "application")
# What is timed of a step: the calls of these methods; what is left of step() is application.
WATCHED = ((Watcher, "record", "statistics"), (Attention, "see", "statistics"),
           (Preconditioner, "add_gradient", "statistics"),
           (Preconditioner, "update_statistics", "statistics"))

# The exponents of d in the operations of PARTS, for a layer d → d: R·d, R·d·r or R·d² for the
# statistics of R rows; nothing, d·r² or d³; d², d²·r or d³. SGD reads and writes d² numbers.
COUNTED = {"mac": (1, 0, 2), "nysact": (1, 1, 2), "foof": (2, 3, 3), "kfac": (2, 3, 3),
           "adafisher": (1, 1, 2), "adafisherw": (1, 1, 2)}


class Clock:
    """Adds up the time of nested spans, each without the spans inside it."""

    def __init__(self, device):
        self.cuda, self.spans, self.open = device == "cuda", [], []
        self.optim = self.due = None         # who takes a step, and what is due in it

    def now(self):
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def span(self, part):
        outer = self.open[-1] if self.open else None
        self.open.append(part)
        start = self.now()
        yield
        self.spans.append((self.optim, self.due, part, outer, start, self.now()))
        self.open.pop()

    def watch(self, owner, name, part):
        """Time every call of owner.name as this part."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            with self.span(part):
                return call(*args, **kwargs)
        setattr(owner, name, timed)

    def read(self):
        """{optimizer: {due: {part: seconds since the last reading}}}."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
        for optim, due, part, outer, start, end in self.spans:
            span = start.elapsed_time(end) / 1e3 if self.cuda else end - start
            seconds[optim][due][part] += span
            if outer is not None:
                seconds[optim][due][outer] -= span
        self.spans.clear()
        return seconds


def watch_all(clock, optims):
    """Let the clock see the parts of these optimizers' steps."""
    for owner, name, part in WATCHED:
        clock.watch(owner, name, part)
    for owner in [OURS[optim] for optim in optims if optim in OURS]:
        if hasattr(owner, "refresh"):
            clock.watch(owner, "refresh", "factorisation")


def make(optim, net, args, **flags):
    """The optimizer with its published options, but for the periods given and the learning rate."""
    flags |= {name: value for name, value in RECIPES[optim].items() if name != "calibrate"}
    for name in ("tcov", "tinv"):
        if name in flags and getattr(args, name):
            flags[name] = getattr(args, name)
    flags["lr"] = flags["lr"] / 10      # random labels: the loss should stay finite
    if optim == "kfac" and isinstance(net, GPT):
        flags["loss_terms"] = "tokens"
    return OURS[optim](net, **flags) if optim in OURS else TORCH[optim](net.parameters(), **flags)


def network(name, device):
    """The network on the device, and a function of a batch size that draws inputs and targets."""
    torch.manual_seed(0)
    if name in GPT_SIZES:
        size, vocabulary = GPT_SIZES[name], 50304
        shape, classes = (size["context"],), vocabulary
        net = GPT(vocabulary=vocabulary, **size)
    elif name in CIFAR_MODELS:
        net, shape, classes = CIFAR_MODELS[name](), (3, 32, 32), 10
    else:
        net, shape, classes = IMAGENET_MODELS[name](), (3, 224, 224), 1000

    def draw(size):
        if name in GPT_SIZES:
            tokens = torch.randint(classes, (size, shape[0] + 1), device=device)
            return tokens[:, :-1], tokens[:, 1:]
        return (torch.randn(size, *shape, device=device),
                torch.randint(classes, (size,), device=device))
    return net.to(device), draw


def train_step(clock, net, optimizer, loss_of, compiled=None):
    """compiled: the network as torch.compile made it, for steps that collect no statistics."""
    plain = compiled is None or getattr(optimizer, "collecting", False)
    with clock.span("forward and backward"):
        optimizer.zero_grad()
        loss_of(net if plain else compiled).backward()
        with clock.span("application"):
            optimizer.step()


def kinds_of(optimizer):
    """{(statistics due?, refresh due?): (a step of this kind, such steps' share of a cycle)}."""
    group = optimizer.param_groups[0]
    tcov = group.get("tcov", 1)
    tinv = group.get("tinv", tcov)
    cycle, kinds = math.lcm(tcov, tinv), {}
    for step in range(cycle):
        due = (step % tcov == 0, step % tinv == 0)
        first, share = kinds.get(due, (cycle + step, 0))
        kinds[due] = first, share + 1 / cycle
    return kinds


def go_to(optimizer, step):
    """Let the coming step be this one, with all that is due in it."""
    if hasattr(optimizer, "begin_step"):
        optimizer.steps = step
        optimizer.begin_step()


def measure(clock, nets, optimizers, losses, repeats, compiled):
    """[{optimizer: {part: seconds per step}}], one for each repeat."""
    kinds = {optim: kinds_of(optimizer) for optim, optimizer in optimizers.items()}
    for clock.optim in nets:         # memory is taken, kernels are chosen, graphs compiled before
        for first, _ in kinds[clock.optim].values():
            go_to(optimizers[clock.optim], first)
            train_step(clock, nets[clock.optim], optimizers[clock.optim], losses[0],
                       compiled.get(clock.optim))
    clock.read()
    results, names, turn = [], list(nets), 0
    for _ in tqdm(range(repeats), "repeats", disable=None, leave=False):
        for clock.due in sorted(set().union(*kinds.values())):
            turn += 1
            for clock.optim in names if turn % 2 else names[::-1]:
                known = kinds[clock.optim]
                if clock.due in known:
                    go_to(optimizers[clock.optim], known[clock.due][0])
                if clock.due in known or len(known) == 1:      # SGD's steps are all of one kind
                    train_step(clock, nets[clock.optim], optimizers[clock.optim],
                               losses[turn % len(losses)], compiled.get(clock.optim))
        results.append({})
        for optim, found in clock.read().items():
            shares = {due: kinds[optim][due][1] for due in found} if len(found) == len(
                kinds[optim]) else dict.fromkeys(found, 1 / len(found))
            results[-1][optim] = {part: sum(shares[due] * parts[part]
                                            for due, parts in found.items())
                                  for part in ("forward and backward", *PARTS)}
    return results


def peak_bytes(step, device):
    """Most bytes that step() holds at a time beyond those before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    # every allocation is an event with its bytes, every release one with minus its bytes
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def bench_network(args):
    """Rows of the table: one dict per optimizer."""
    net, draw = network(args.model, args.device)
    if args.channels_last:
        net = net.to(memory_format=torch.channels_last)
    clock = Clock(args.device)
    watch_all(clock, args.optim)             # before the optimizers take hold of what it times
    nets = {optim: copy.deepcopy(net) for optim in args.optim}
    optimizers = {optim: make(optim, nets[optim], args) for optim in args.optim}
    compiled = {optim: torch.compile(net) for optim, net in nets.items()} if args.compile else {}

    def loss(net, x, y):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            return F.cross_entropy(net(x).float().flatten(0, -2), y.flatten())
    losses = [lambda net, x=x, y=y: loss(net, x, y)
              for x, y in (draw(args.batch_size) for _ in range(4))]
    results = measure(clock, nets, optimizers, losses, args.repeats, compiled)
    rows = []
    for clock.optim, optimizer in optimizers.items():
        rows.append(row_of(clock.optim, results, args.optim[0]))
        go_to(optimizer, 0)              # a multiple of all periods
        rows[-1]["state"] = state_numbers(optimizer) / sum(p.numel() for p in net.parameters())
        rows[-1]["peak"] = peak_bytes(lambda: train_step(clock, nets[clock.optim], optimizer,
                                                         losses[0]), args.device)
    for row in rows[::-1]:
        row["peak"] = (row["peak"] - rows[0]["peak"]) / 2 ** 20
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{args.model}, batch {args.batch_size}, {where}, torch {torch.__version__}, "
          f"{args.repeats} repeats{', compiled' * args.compile}; all times as ratios to SGD's step")
    return rows


def row_of(optim, results, baseline):
    """Medians over the repeats, and quartiles, as ratios to the whole step of the baseline."""
    steps = [sum(result[optim].values()) for result in results]
    whole = [sum(result[baseline].values()) for result in results]
    ratios = [a / b for a, b in zip(steps, whole)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else \
        ratios * 3
    parts = {part: statistics.median((result[optim][part] - result[baseline][part]) / b
                                     for result, b in zip(results, whole)) for part in PARTS}
    return dict(optimizer=optim, seconds=statistics.median(steps), step=statistics.median(ratios),
                low=low, high=high, parts=1 + sum(parts.values())) | parts


def state_numbers(optimizer):
    return sum(v.numel() for s in optimizer.state.values() for v in s.values()
               if torch.is_tensor(v) and v.dim())


def bench_scaling(args):
    """Rows of the table: one dict per optimizer, layer and size, then the exponents, as fitted and
    as counting operations has them for large sizes.

    One layer, hidden in MAC's sense, its input and loss given; the step in which all is due.
    """
    def linear(d):
        return nn.Linear(d, d, bias=False), torch.randn(256, d)

    def channels(c):
        return nn.Conv2d(c, c, 3, padding=1, bias=False), torch.randn(16, c, 16, 16)

    def resolution(size):
        return nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.randn(16, 32, size, size)
    rows = []
    clock = Clock(args.device)
    watch_all(clock, args.optim)
    for what, build, sizes in (("linear, d to d", linear, (256, 512, 1024, 2048, 4096)),
                               ("3×3 conv, channels", channels, (16, 32, 64, 128, 256)),
                               ("3×3 conv, image side", resolution, (8, 16, 32, 64, 128))):
        found = []
        for size in tqdm(sizes, what, disable=None, leave=False):
            torch.manual_seed(0)
            layer, x = (part.to(args.device) for part in build(size))
            found.append(one_layer(clock, layer, x, args))
        for optim in args.optim:
            rows += [dict(optimizer=optim, layer=what, size=size) | parts[optim]
                     for size, parts in zip(sizes, found)]
            rows.append(dict(optimizer=optim, layer=what, size="exponent") | {
                part: exponent(sizes[2:], [parts[optim][part] for parts in found[2:]])
                for part in PARTS})
            counted = COUNTED.get(optim, (0, 0, 2))
            if build is resolution:      # the weight stays as it is, and the rows are its pixels
                counted = (2 if optim in COUNTED else 0, 0, 0)
            rows.append(dict(optimizer=optim, layer=what, size="counted")
                        | dict(zip(PARTS, counted)))
    return rows


def one_layer(clock, layer, x, args, repeats=3):
    """{optimizer: {part: median seconds of a step in which all is due}}."""
    medians = {}
    for clock.optim in args.optim:
        net, seconds = copy.deepcopy(layer), []
        hidden = dict(input_covariance=False) if clock.optim == "mac" else {}
        optimizer = make(clock.optim, net, args, **hidden)
        for _ in range(1 + repeats):          # the first takes memory and chooses kernels
            go_to(optimizer, 0)
            train_step(clock, net, optimizer, lambda net: net(x).square().mean())
            seconds.append(clock.read()[clock.optim][None])
        medians[clock.optim] = {part: statistics.median(s[part] for s in seconds[1:])
                                for part in PARTS}
    return medians


def exponent(sizes, seconds):
    """The slope of log(seconds) over log(size) by least squares; nan where nothing was measured."""
    if min(seconds) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes],
                                        [math.log(t) for t in seconds]).slope


class Operators(TorchDispatchMode):
    """Names the operators that are no views: a GPU launches a kernel, or a few, for each."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        view = any(x.alias_info is not None and not x.alias_info.is_write
                   for x in func._schema.returns)
        if not view and "empty" not in name and name not in ("_unsafe_view", "promote_types"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def bench_launches(args):
    """Rows of the table: one dict per optimizer."""
    (net, draw), clock, rows = network(args.model, args.device), Clock(args.device), []
    x, y = draw(2)
    for optim in tqdm(args.optim, "counting", disable=None, leave=False):
        lists = {} if optim.startswith("adafisher") else dict(foreach=True)      # as on a GPU
        copied, counts = copy.deepcopy(net), []
        optimizer = make(optim, copied, args, **lists)

        def step():
            train_step(clock, copied, optimizer, lambda net: F.cross_entropy(
                net(x).flatten(0, -2), y.flatten()))
        step()                                           # memory is taken
        for first, share in kinds_of(optimizer).values():
            go_to(optimizer, first)
            with Operators() as operators:
                step()
            counts.append((len(operators.names), share))
        mean = sum(count * share for count, share in counts)
        rows.append(dict(optimizer=optim, between=min(counts)[0], due=max(counts)[0], mean=mean,
                         ratio=mean / rows[0]["mean"] if rows else 1.0))
    print(f"{args.model}, torch {torch.__version__}: operators of a step, forward and backward "
          "passes included")
    return rows


# ---------------------------------------------------------------------------------------------
# Tables and the command line
# ---------------------------------------------------------------------------------------------

def show_network(rows):
    print(f"SGD's step takes {rows[0]['seconds']:.4f} s\n"
          "optimizer   step (quartiles)         parts  statistics  factorisation  application  "
          "state  peak, MiB")
    for row in rows:
        print(f"{row['optimizer']:<10} {row['step']:6.3f} ({row['low']:.3f} to {row['high']:.3f})"
              f"{row['parts']:8.3f}  {row['statistics']:10.4f}  {row['factorisation']:13.4f}  "
              f"{row['application']:11.4f}  {row['state']:5.2f}  {row['peak']:9.1f}")


def show_scaling(rows):
    print("milliseconds of the step in which all is due, and the exponent of their growth with the "
          "size,\nfitted to the three largest\noptimizer   layer                     size  "
          "statistics  factorisation  application")
    for row in rows:
        unit = 1e3 if isinstance(row["size"], int) else 1
        print(f"{row['optimizer']:<10}  {row['layer']:<21} {row['size']:>8}"
              + "".join(f"{unit * row[part]:{width}.2f}" for part, width
                        in zip(PARTS, (12, 15, 13))))


def show_launches(rows):
    print("optimizer   nothing due  all due  mean of a cycle  ratio to SGD's")
    for row in rows:
        print(f"{row['optimizer']:<10} {row['between']:>12,} {row['due']:>8,} "
              f"{row['mean']:>16,.1f} {row['ratio']:>15.3f}")


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python bench.py [flags]", allow_abbrev=False)
    parser.add_argument("--optim", nargs="+", choices=list(RECIPES), metavar="NAME",
                        default=["mac", "nysact", "foof", "kfac", "adafisher"],
                        help="of %(choices)s (default mac, nysact, foof, kfac, adafisher); sgd is "
                        "always measured too")
    parser.add_argument("--model", default="resnet20", metavar="NAME",
                        choices=[*CIFAR_MODELS, *IMAGENET_MODELS, *GPT_SIZES],
                        help="%(choices)s (default %(default)s)")
    for name, default in (("batch_size", 128), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=COUNT, metavar="N", default=default,
                            help="default %(default)s")
    for name in "tcov", "tinv":
        parser.add_argument(f"--{name}", type=COUNT, metavar="N",
                            help="for all, in place of the published period")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="default %(default)s")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels_last", action="store_true", help="NHWC memory format")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--scaling", action="store_true",
                       help="one layer of growing size in place of a network")
    other.add_argument("--launches", action="store_true",
                       help="count operators in place of measuring time")
    parser.add_argument("--csv", metavar="FILE", help="write the table to this file too")
    args = parser.parse_args()
    args.optim = ["sgd", *(optim for optim in dict.fromkeys(args.optim) if optim != "sgd")]
    steps = {"amp", "batch_size", "channels_last", "compile", "repeats"}
    for mode, unused in ("scaling", {*steps, "model"}), ("launches", steps):
        if getattr(args, mode):
            note_unused({name for name in unused
                         if getattr(args, name) != parser.get_default(name)}, f"--{mode}")
    find_device(args.device)                           # refuses what is not there
    folder = os.path.dirname(os.path.abspath(args.csv or ""))
    if not os.path.isdir(folder) or os.path.isdir(args.csv or ""):
        raise UsageError(f"--csv {args.csv}: not a file in an existing folder")
    return args


def main():
    """Run the command; its exit status."""
    torch.set_num_threads(1)
    print_anything()
    try:
        args = parse()
        bench, show = (bench_scaling, show_scaling) if args.scaling else \
            (bench_launches, show_launches) if args.launches else (bench_network, show_network)
        rows = bench(args)
        show(rows)
        if args.csv:
            with open(args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
