"""What the preconditioners see and do, from one command each.

    python analyze.py nystrom                                   # generated images, two minutes
    python analyze.py nystrom --dataset cifar10 --rank 10       # per layer, after 100 steps

nystrom: train with NysAct's published settings and print, per layer, the largest eigenvalue λ₁ of
the covariance A that was averaged and what the sketch holds for it, λ̂₁; the smallest eigenvalue of
the preconditioner ρ(Â + ρI)⁻¹ beside the true ρ/(ρ + λ₁), where 1 would be plain SGD; and the
condition number of (Â + ρI)⁻¹(A + ρI), 1 if Â were A, with that of A + ρI in brackets.
"""
import argparse
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from models import CIFAR_MODELS
from nysact import NysAct, precondition, running_mean
from train_cifar import COUNT, RECIPES


def covariance(module, x):
    """A = E[a aᵀ] of one batch by explicit patches, float64: (d, d); groups = 1."""
    if isinstance(module, nn.Conv2d):
        a = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        a = a.transpose(1, 2).flatten(0, 1)                     # (B·oH·oW, C·kh·kw)
    else:
        a = x.flatten(0, -2)
    a = a if module.bias is None else F.pad(a, (0, 1), value=1.0)
    return (a.mT @ a).double() / len(a)


def train_and_watch(net, optimizer, batches, steps):
    """Train; returns {weight: the average of A that the optimizer's sketch is of}, last loss."""
    group, averages = optimizer.param_groups[0], {}

    def watch(module, args):
        if optimizer.steps % group["tcov"] == 0:
            A, (old, k) = covariance(module, args[0].detach()), averages.get(module.weight, (0, 0))
            averages[module.weight] = (running_mean(old, A, k + 1, group["stat_decay"]) if k else A,
                                       k + 1)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(watch)
    for _, (x, y) in zip(tqdm(range(steps), "steps", disable=None, leave=False), batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return {weight: A for weight, (A, _) in averages.items()}, loss.item()


def nystrom(args):
    torch.manual_seed(0)
    data = datasets.load(args.dataset, args.data_dir)
    net = CIFAR_MODELS["resnet20"](data.num_classes, *data.train_images.shape[1:3])
    recipe = RECIPES["nysact"] | dict(rank=args.rank, sketch=args.sketch)
    optimizer = NysAct(net, **recipe)
    ρ = recipe["damping"]
    # one step more than asked for: what is applied is refreshed at the beginning of every 50th
    epochs = (batch for epoch in range(args.steps) for batch in datasets.batches(
        data.train_images, data.train_labels, 128, train=True, mean=data.mean, std=data.std,
        seed=0, epoch=epoch))
    averages, loss = train_and_watch(net, optimizer, epochs, args.steps + 1)
    print(f"ResNet-20 on {args.dataset} after {args.steps} steps, rank {args.rank} {args.sketch}, "
          f"ρ = {ρ:g}, loss {loss:.3f}, torch {torch.__version__}\n"
          "layer                  d      λ₁       λ̂₁   smallest eigenvalue     true   "
          "condition number")
    identities = 0
    for layer in optimizer.layers.values():
        A, state = averages[layer.weight], optimizer.state[layer.weight]
        true, identity = torch.linalg.eigvalsh(A), torch.eye(len(A), dtype=A.dtype)
        if "eigenvalues" in state:
            U, eigenvalues = state["U"].double(), state["eigenvalues"].double()
            seen = eigenvalues.max()
            R = torch.linalg.cholesky(A + ρ * identity)         # similar to (Â + ρI)⁻¹(A + ρI)
            values = torch.linalg.eigvalsh(
                precondition(R.mT.contiguous(), None, U, eigenvalues, ρ)[0] @ R)
        else:                                                   # d ≤ r: exact
            seen, values = true[-1], torch.ones(2)
        smallest, wanted = ρ / (ρ + seen), ρ / (ρ + true[-1])
        identities += bool(smallest > 0.999 and wanted < 0.99)
        print(f"{layer.name:<18}{len(A):>6}{true[-1]:>8.2f}{seen:>9.2f}{smallest:>22.5f}"
              f"{wanted:>9.5f}{values[-1] / values[0]:>11.2f} "
              f"({(true[-1] + ρ) / (true[0] + ρ):.1f})")
    print(f"layers whose preconditioner is the identity: {identities} of {len(optimizer.layers)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["nystrom"])
    parser.add_argument("--dataset", default="shapes", choices=list(datasets.STATISTICS),
                        help="default %(default)s")
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="default %(default)s")
    parser.add_argument("--rank", type=COUNT, default=10, help="default %(default)s")
    parser.add_argument("--sketch", choices=("gaussian", "subcolumns"), default="gaussian",
                        help="default %(default)s")
    parser.add_argument("--steps", type=COUNT, default=100, help="default %(default)s")
    args = parser.parse_args()
    try:
        nystrom(args)
    except datasets.DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
