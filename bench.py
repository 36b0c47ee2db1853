"""What a step of each optimizer costs, as a ratio to SGD's, on this machine.

    python bench.py                                   # all of them, ResNet-20, batch 128: minutes
    python bench.py --optim mac foof --cycles 3       # three cycles of tinv steps, and spread
    python bench.py --optim adafisher --tcov 10       # other periods than the published ones
    python bench.py --model deit_tiny_cifar --tinv 5

All optimizers train copies of one network on the same random images, in turn, step by step, in one
process, so that whatever else the machine does meets all of them alike. A cycle is as many steps
as the longest of their periods tcov and tinv: it holds every cost in its right proportion. The
figures are CPU seconds of one thread; on a GPU, seconds between two synchronisations. State is
counted in numbers per parameter, SGD's momentum included.
"""
import argparse
import copy
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import CIFAR_MODELS
from train_cifar import COUNT, FILES, RECIPES, UsageError, optimizer_class


def make(optim, net, args):
    """The optimizer with its published options, but for the periods given and the learning rate."""
    flags = {name: value for name, value in RECIPES[optim].items() if name != "calibrate"}
    for name in ("tcov", "tinv"):
        if name in flags and getattr(args, name):
            flags[name] = getattr(args, name)
    flags["lr"] = flags["lr"] / 10      # random labels: the loss should stay finite
    return optimizer_class(optim)(net if optim in FILES else net.parameters(), **flags)


def seconds(net, optimizer, x, y):
    """Time of one training step."""
    cuda = x.is_cuda
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(args):
    """{optimizer: seconds per step in each cycle}, {optimizer: state per parameter}."""
    torch.manual_seed(0)
    net = CIFAR_MODELS[args.model]().to(args.device)
    nets = {optim: copy.deepcopy(net) for optim in args.optim}
    optimizers = {optim: make(optim, nets[optim], args) for optim in args.optim}
    x = torch.randn(4, args.batch_size, 3, 32, 32, device=args.device)
    y = torch.randint(10, (4, args.batch_size), device=args.device)
    for optim in args.optim:               # memory is taken and kernels are chosen in a first step
        seconds(nets[optim], optimizers[optim], x[0], y[0])
    cycle = max(max(group.get("tcov", 1), group.get("tinv", 1))
                for o in optimizers.values() for group in o.param_groups)
    times = {optim: [] for optim in args.optim}
    for _ in range(args.cycles):
        total = dict.fromkeys(args.optim, 0.0)
        for step in tqdm(range(cycle), "steps", disable=None, leave=False):
            order = args.optim if step % 2 else args.optim[::-1]
            for optim in order:
                total[optim] += seconds(nets[optim], optimizers[optim], x[step % 4], y[step % 4])
        for optim in args.optim:
            times[optim].append(total[optim] / cycle)
    parameters = sum(p.numel() for p in net.parameters())
    state = {optim: sum(v.numel() for s in optimizers[optim].state.values() for v in s.values()
                        if torch.is_tensor(v) and v.dim()) / parameters for optim in args.optim}
    return cycle, times, state


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", choices=list(RECIPES), metavar="NAME",
                        default=["mac", "nysact", "foof", "kfac", "adafisher"],
                        help="%(choices)s; sgd is always measured too")
    parser.add_argument("--model", default="resnet20", choices=list(CIFAR_MODELS), metavar="NAME",
                        help="%(choices)s (default %(default)s)")
    parser.add_argument("--batch_size", type=COUNT, default=128, help="default %(default)s")
    parser.add_argument("--cycles", type=COUNT, default=1, help="default %(default)s")
    parser.add_argument("--tcov", type=COUNT, help="for all, in place of the published period")
    parser.add_argument("--tinv", type=COUNT, help="likewise")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="default %(default)s")
    args = parser.parse_args()
    args.optim = ["sgd", *(optim for optim in dict.fromkeys(args.optim) if optim != "sgd")]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds none here; --device cpu works")
    torch.set_num_threads(1)
    try:
        cycle, times, state = measure(args)
    except (UsageError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.model}, batch {args.batch_size}, {args.device}, torch {torch.__version__}, "
          f"{args.cycles} cycles of {cycle} steps\n"
          "optimizer    seconds/step   ratio to SGD: median (smallest to largest)   "
          "state/parameters")
    for optim, values in times.items():
        ratios = [value / sgd for value, sgd in zip(values, times["sgd"])]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{optim:<12} {statistics.median(values):12.4f}   {spread:<42}   "
              f"{state[optim]:16.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
