"""Train an image classifier with MAC, one of its siblings, or a baseline, and log what it costs.

    python train_cifar.py --smoke                 # a few batches of everything, no data, seconds
    python train_cifar.py --dataset shapes --optim mac sgd --epoch 2 --train_size 5000   # generated
    python train_cifar.py --optim mac sgd adamw --epoch 5 --run 0 1 2     # CIFAR-10, mean ± std
    python train_cifar.py --device cuda --amp --channels_last --compile   # MAC for 200 epochs
    python train_cifar.py --dataset cifar100 --model wrn28_10 --schedule_step step --warmup 5
    python train_cifar.py --model resnet110 --optim mac --lr 0.1 --momentum 0.9 --stat_decay 0.95 \\
        --damping 1.0 --tcov 5 --tinv 50 --weight_decay 0.0005 --epoch 200 --run 0   # as published

Every run writes config.json, log.csv and checkpoint.pt to its own folder. The same command with
--resume continues an interrupted run, on the CPU to the same bits. The last line of the output is
a JSON record of the results. Exit status: 0, or 1 when training diverged, 2 for a wrong command,
130 and 143 when interrupted and terminated.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from models import CIFAR_MODELS

# The published recipes. A flag that is not given takes the value of its optimizer's row, and an
# optimizer takes the flags of its row and no others. mac and nysact are the README lines of their
# authors; the baselines and foof, kfac are the scripts in MAC's history; adafisher its paper.
SGD = dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4)
CURVATURE = dict(SGD, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95, tcov=5, tinv=50)
ADAFISHER = dict(lr=1e-3, beta=0.9, gamma=0.8, tcov=100, as_released=False)
RECIPES = {
    "sgd": SGD,
    "adam": dict(lr=1e-3, weight_decay=5e-4),
    "adamw": dict(lr=1e-3, weight_decay=0.5),
    "mac": dict(CURVATURE, calibrate=False),
    "nysact": dict(CURVATURE, rank=10, sketch="gaussian"),
    "foof": CURVATURE,
    "kfac": dict(CURVATURE, damping=0.03, fisher="empirical", inverse="factored",
                 weight_sharing="expand", kl_clip=1e-3),
    "adafisher": dict(ADAFISHER, weight_decay=5e-4, damping=1e-3),
    "adafisherw": dict(ADAFISHER, weight_decay=0.01, damping=3e-3),
}
# What a recipe sets beside its optimizer.
TRAINING = dict.fromkeys(RECIPES, dict(batch_size=128, cutout=0)) | dict.fromkeys(
    ("adafisher", "adafisherw"), dict(batch_size=256, cutout=16))
# A class of torch.optim, or of a file of this folder, imported when its optimizer is asked for.
CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "mac": "MAC", "nysact": "NysAct",
           "foof": "FOOF", "kfac": "KFAC", "adafisher": "AdaFisher", "adafisherw": "AdaFisherW"}
FILES = {"mac": "mac", "nysact": "nysact", "foof": "foof", "kfac": "kfac",
         "adafisher": "adafisher", "adafisherw": "adafisher"}
COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds",
           "peak_memory")


class UsageError(Exception):
    """Its message is the one sentence for the user; exit status 2."""


class Diverged(Exception):
    """Likewise, with exit status 1."""


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

def number(kind, rule, words):
    """An argparse type: a number for which rule holds, described by words in the error."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not rule(value):      # no rule holds for nan
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}")
        return value
    return parse


def user_path(text):
    """An argparse type: a path, with ~ and ~user expanded."""
    try:
        return datasets.expand(text)
    except datasets.DataError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip("."))


# No setting makes sense beyond these limits, where float32 and int64 would overflow.
POSITIVE = number(float, lambda v: 0 < v <= 1e30, "a positive number of at most 1e30")
NOT_NEGATIVE = number(float, lambda v: 0 <= v <= 1e30, "a number from 0 to 1e30")
FRACTION = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
COUNT = number(int, lambda v: 1 <= v <= 10 ** 15, "a whole number from 1 to 10^15")
COUNT_OR_ZERO = number(int, lambda v: 0 <= v <= 10 ** 15, "a whole number from 0 to 10^15")
# What seeds are made into with epochs and ranks stays below the 2^64 that torch takes.
SEED = number(int, lambda v: 0 <= v < 2 ** 31, "a whole number from 0 to 2147483647")


class Parser(argparse.ArgumentParser):
    def error(self, message):    # argparse would print all flags first
        raise UsageError(f"{message} (--help lists the flags)")


def parse(argv):
    """The command line; flags of RECIPES that were not given are None."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python train_cifar.py [flags]", allow_abbrev=False,
                    epilog="- and _ are the same in the names of flags; of a flag given twice the "
                           "last value counts.")

    def flag(group, name, *alias, help, default=None, **kwargs):
        takers = {}              # {published value: optimizers}
        for optim in RECIPES:
            recipe = RECIPES[optim] | TRAINING[optim]
            if name in recipe:
                takers.setdefault(recipe[name], []).append(optim)
        shown = "; ".join(("" if value is False else f"{value} ") + "for " + ", ".join(optims)
                          for value, optims in takers.items())
        if default is not None and default is not False:
            shown = f"default {default[0] if isinstance(default, list) else default}"
        group.add_argument(f"--{name}", *alias, dest=name, default=default,
                           help=f"{help} ({shown})" if shown else help, **kwargs)

    add_run_flags(flag, parser.add_argument_group("what is trained"))
    add_optimizer_flags(flag, parser.add_argument_group(
        "optimizer (who takes a flag, and the published value where it is not given)"))
    add_schedule_flags(flag, parser.add_argument_group("training"))
    add_machine_flags(flag, parser.add_argument_group("machine and files"))
    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
    args = parser.parse_args(argv)
    args.optim, args.run = list(dict.fromkeys(args.optim)), list(dict.fromkeys(args.run))
    return args


def add_run_flags(flag, group):
    flag(group, "dataset", default="cifar10",
         choices=("cifar10", "cifar100", "fashion_mnist", "shapes"),
         help="shapes is generated and needs no download")
    flag(group, "data_dir", default="data", type=user_path, metavar="DIR",
         help="folder that holds the data, or receives them")
    flag(group, "train_size", type=COUNT, metavar="N", help="use the first N training images")
    flag(group, "model", default="resnet20", choices=list(CIFAR_MODELS), metavar="NAME",
         help="%(choices)s")
    flag(group, "optim", "--opt", default=["mac"], nargs="+", choices=list(RECIPES), metavar="NAME",
         help="one or several of %(choices)s; several run one after another on the same data, and "
         "a flag that is given holds for all of them")
    flag(group, "run", default=[0], nargs="+", type=SEED, metavar="SEED",
         help="seed of everything random; several give mean ± std at the end")


def add_optimizer_flags(flag, group):
    flag(group, "lr", type=POSITIVE, metavar="X", help="learning rate")
    flag(group, "momentum", type=FRACTION, metavar="X", help="momentum")
    flag(group, "nesterov", action="store_true", help="Nesterov's momentum")
    flag(group, "weight_decay", type=NOT_NEGATIVE, metavar="X",
         help="L2 penalty; in adamw and adafisherw decoupled")
    flag(group, "decoupled_weight_decay", action="store_true",
         help="shrink the weights directly, not by way of the gradient")
    flag(group, "damping", type=POSITIVE, metavar="X",
         help="what is added to the curvature; large means SGD")
    flag(group, "stat_decay", type=FRACTION, metavar="X",
         help="weight of the past in the moving averages")
    flag(group, "tcov", type=COUNT, metavar="N", help="steps between updates of the statistics")
    flag(group, "tinv", type=COUNT, metavar="N", help="steps between updates of what is applied")
    flag(group, "calibrate", action="store_true",
         help="fix the first layer's covariance by one pass over the data before training, as "
         "published, in place of the average during training")
    flag(group, "rank", type=COUNT, metavar="N", help="columns of the sketch")
    flag(group, "sketch", choices=("gaussian", "subcolumns"), help="kind of the sketch")
    flag(group, "fisher", choices=("empirical", "sampled"),
         help="from the true labels, or from labels sampled from the model")
    flag(group, "inverse", choices=("factored", "eigen"),
         help="damp each factor, or the Kronecker product exactly in its eigenbasis")
    flag(group, "weight_sharing", choices=("expand", "reduce"),
         help="positions of a map count as samples, or are averaged first")
    flag(group, "kl_clip", type=POSITIVE, metavar="X",
         help="bound on the change of the model's output by a step; a large one is none")
    flag(group, "beta", type=FRACTION, metavar="X", help="decay of the first moment")
    flag(group, "gamma", type=FRACTION, metavar="X", help="weight of the past in the factors")
    flag(group, "as_released", action="store_true",
         help="average and normalise as the released code does, not as the paper")


def add_schedule_flags(flag, group):
    flag(group, "batch_size", type=COUNT, metavar="N", help="images per step")
    flag(group, "epoch", "--epochs", default=200, type=COUNT, metavar="N",
         help="passes over the training set")
    flag(group, "schedule", default="cosine", choices=("cosine", "multistep", "constant"),
         help="the learning rate after warm-up")
    flag(group, "schedule_step", default="epoch", choices=("epoch", "step"),
         help="how often the rate changes; as published: every epoch")
    flag(group, "milestones", nargs="+", type=COUNT, metavar="EPOCH",
         help="when multistep multiplies the rate by --lr_decay; without: after one half and three "
         "quarters of the epochs")
    flag(group, "lr_decay", default=0.1, type=POSITIVE, metavar="X", help="factor of multistep")
    flag(group, "warmup", "--warmup_epochs", default=0, type=COUNT_OR_ZERO, metavar="N",
         help="epochs of linear warm-up; may be more than there are")
    flag(group, "label_smoothing", default=0.0, type=FRACTION, metavar="X", help="label smoothing")
    flag(group, "cutout", type=COUNT_OR_ZERO, metavar="N",
         help="side in pixels of a square cut out of every training image")


def add_machine_flags(flag, group):
    flag(group, "device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
         help="auto takes a GPU where there is one")
    flag(group, "amp", action="store_true", default=False, help="bfloat16 autocast")
    flag(group, "channels_last", action="store_true", default=False, help="NHWC memory format")
    flag(group, "compile", action="store_true", default=False, help="torch.compile the model")
    flag(group, "output_dir", type=user_path, metavar="DIR",
         help="folder of the run, with a subfolder per optimizer and per seed where there are "
         "several; without: runs/DATASET-MODEL-OPTIM/SEED. Its log.csv gives accuracies in per "
         "cent, the seconds of the training pass, and peak_memory in MiB: of the GPU in this run, "
         "or without a GPU of the process so far")
    flag(group, "resume", action="store_true", default=False,
         help="continue the runs of the same command, and start those that have not begun")
    flag(group, "smoke", action="store_true", default=False,
         help="try everything for a few batches; other flags have no effect")


def resolve(args, optim, seed, train_size):
    """All that decides one run: the flags as given or default, its optimizer's from the recipe."""
    config = dict(dataset=args.dataset, train_size=train_size, model=args.model, optim=optim,
                  run=seed)
    for name, default in (RECIPES[optim] | TRAINING[optim]).items():
        given = getattr(args, name)
        config[name] = default if given is None else given
    for name in ("epoch", "schedule", "schedule_step", "milestones", "lr_decay",
                 "warmup", "label_smoothing", "amp", "channels_last", "compile"):
        config[name] = getattr(args, name)
    if config["schedule"] != "multistep":
        del config["milestones"], config["lr_decay"]
    elif config["milestones"] is None:
        config["milestones"] = [max(1, args.epoch // 2), max(1, args.epoch * 3 // 4)]
    return config


def check(args):
    """What is wrong with a command beyond single values, before anything is loaded; the device."""
    for optim in args.optim:
        optimizer_class(optim)
    given = {name for recipe in RECIPES.values() for name in recipe
             if getattr(args, name) is not None}
    unused = given - {name for optim in args.optim for name in RECIPES[optim]}
    if unused:
        print("note: no use for", *(f"--{name}" for name in sorted(unused)), "in",
              *args.optim, file=sys.stderr)
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = args.device if args.device != "auto" else next(d for d in there if there[d])
    if not there[device]:
        raise UsageError(f"--device {device}: PyTorch finds none here; --device cpu works")
    if args.compile and device == "cpu" and not os.environ.get("CXX") \
            and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler on the CPU, and none was found")
    return device


def check_folder(folder, resume):
    """Refuse a run's folder that cannot be made, or holds a run that is not to be continued."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    if not place.is_dir():
        raise UsageError(f"{folder} cannot be the run's folder, since {place} is a file: name "
                         "another one with --output_dir")
    files = [folder / name for name in ("config.json", "log.csv", "checkpoint.pt")]
    if any(file.exists() for file in files) and not resume:
        raise UsageError(f"{folder} already holds a run: add --resume to continue it, or name "
                         "another folder with --output_dir")


def run_folders(args):
    """The folder of each (optimizer, seed)."""
    folders = {}
    for optim in args.optim:
        for seed in args.run:
            folder = Path("runs", f"{args.dataset}-{args.model}-{optim}", str(seed))
            if args.output_dir is not None:
                folder = Path(args.output_dir, optim if len(args.optim) > 1 else "",
                              str(seed) if len(args.run) > 1 else "")
            check_folder(folder, args.resume)
            folders[optim, seed] = folder
    return folders


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate
# ---------------------------------------------------------------------------------------------

def optimizer_class(optim):
    if optim not in FILES:
        return getattr(torch.optim, CLASSES[optim])
    if importlib.util.find_spec(FILES[optim]) is None:
        raise UsageError(f"--optim {optim} needs {FILES[optim]}.py beside this script")
    return getattr(importlib.import_module(FILES[optim]), CLASSES[optim])


def build(config, data):
    """The network and its optimizer on the data's device. One seed, one initialisation."""
    torch.manual_seed(config["run"])
    device = data.train_images.device
    try:
        model = CIFAR_MODELS[config["model"]](data.num_classes, *data.train_images.shape[1:3])
        if config["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        model = model.to(device)
        first = model if config["optim"] in FILES else model.parameters()
        flags = {name: config[name] for name in RECIPES[config["optim"]] if name != "calibrate"}
        if config["optim"] == "nysact":
            flags["seed"] = config["run"]      # its sketch is drawn at random
        return model, optimizer_class(config["optim"])(first, **flags)
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def make_forward(model, optimizer, config, device):
    """x → logits in float32. The optimizer's hooks are on the model before this compiles it."""
    compiled = torch.compile(model) if config["compile"] else model

    def forward(x):
        if config["channels_last"]:
            x = x.contiguous(memory_format=torch.channels_last)
        call = model if model.training and getattr(optimizer, "collecting", False) else compiled
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            return call(x).float()
    return forward


def learning_rate(config, epoch, step, steps):
    """The rate at step `step` of `steps` in `epoch`, both from 0: a function of nothing else."""
    unit = 1.0 if config["schedule_step"] == "epoch" else 1.0 / steps
    t = epoch + (0.0 if config["schedule_step"] == "epoch" else step / steps)
    lr, warmup = config["lr"], config["warmup"]
    if t < warmup:               # from the first step on more than zero, and full at t = warmup
        return lr * (t + unit) / (warmup + unit)
    if config["schedule"] == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (config["epoch"] - warmup)))
    if config["schedule"] == "multistep":
        return lr * config["lr_decay"] ** sum(t >= m for m in config["milestones"])
    return lr


def train_batches(data, config, epoch, text):
    """The (x, y) of one pass over the training set, behind a progress bar."""
    passes = datasets.batches(data.train_images, data.train_labels, config["batch_size"],
                              train=True, mean=data.mean, std=data.std, seed=config["run"],
                              epoch=epoch, cutout=config["cutout"])
    total = datasets.num_batches(len(data.train_labels), config["batch_size"], train=True)
    return tqdm(passes, text, total, leave=False, disable=None, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def train_epoch(model, forward, optimizer, data, config, epoch):
    """One pass over the training set: mean loss, accuracy in per cent (both while it learns)."""
    # Dropout and the like depend on (seed, epoch) alone, so a resumed run needs no generator state.
    torch.manual_seed(config["run"] * 1_000_003 + epoch + 1)
    model.train()
    bar = train_batches(data, config, epoch, f"epoch {epoch + 1}/{config['epoch']}")
    total, seen, mean = torch.zeros(2, device=data.train_images.device), 0, 0.0
    for step, (x, y) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch, step, bar.total)
        optimizer.zero_grad()
        logits = forward(x)
        loss = F.cross_entropy(logits, y, label_smoothing=config["label_smoothing"])
        if config.get("fisher") == "sampled":
            optimizer.sample_fisher(logits)
        loss.backward()
        optimizer.step()
        total += torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
        seen += len(y)
        if step % 50 == 49 or step + 1 == bar.total:   # a number read makes the host wait for a GPU
            mean = total[0].item() / seen
            if not math.isfinite(mean):
                raise FloatingPointError("the training loss is not finite")
            bar.set_postfix(loss=f"{mean:.4f}")
    return mean, 100 * total[1].item() / seen


@torch.no_grad()
def evaluate(model, forward, data):
    """Loss and accuracy in per cent over the whole test set."""
    model.eval()
    total = torch.zeros(2, device=data.test_images.device)
    passes = datasets.batches(data.test_images, data.test_labels, 500, train=False,
                              mean=data.mean, std=data.std)
    for x, y in tqdm(passes, "test", -(-len(data.test_labels) // 500), leave=False, disable=None):
        logits = forward(x)
        total += torch.stack([F.cross_entropy(logits, y, reduction="sum"),
                              (logits.argmax(1) == y).sum()])
    loss, correct = total.tolist()
    return loss / len(data.test_labels), 100 * correct / len(data.test_labels)


def train(config, data, folder, args, command, until=None):
    """One run, from its checkpoint if it has one, up to epoch `until`: its log and state size."""
    device = data.train_images.device
    model, optimizer = build(config, data)
    print(f"\n{config['optim']}, seed {config['run']}, in {folder}", flush=True)
    if config["run"] == args.run[0]:
        describe(model, optimizer, config, device)
    rows = begin(config, folder, model, optimizer, args.resume)
    if not rows:
        facts = dict(config, device=str(device), torch=torch.__version__, command=command,
                     optimizer=repr(optimizer).splitlines())
        facts = json.dumps(facts, indent=1, ensure_ascii=False).encode()
        write_file(folder / "config.json", lambda file: file.write(facts))
        if config.get("calibrate"):
            optimizer.calibrate(train_batches(data, config, 0, "calibrate"))
    forward = make_forward(model, optimizer, config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for epoch in range(len(rows), until or config["epoch"]):
        start = time.perf_counter()
        try:
            trained = train_epoch(model, forward, optimizer, data, config, epoch)
            seconds = time.perf_counter() - start
            if not all(p.isfinite().all() for p in model.parameters()):
                raise FloatingPointError("a weight is not finite")
        except FloatingPointError as error:
            raise Diverged(f"training diverged in epoch {epoch + 1} ({error}): try a smaller --lr, "
                           f"a longer --warmup or more --damping; {folder} keeps epoch {epoch}")
        row = (epoch + 1, optimizer.param_groups[0]["lr"], *trained,
               *evaluate(model, forward, data), round(seconds, 3), round(peak_memory(device), 1))
        rows.append(dict(zip(COLUMNS, row)))
        save_checkpoint(folder / "checkpoint.pt", config, rows, model, optimizer)
        write_log(folder, rows)
        print(f"epoch {row[0]:3d}/{config['epoch']}  lr {row[1]:<8.3g} train {row[2]:7.4f} "
              f"{row[3]:6.2f} %  test {row[4]:7.4f} {row[5]:6.2f} %  {seconds:6.1f} s", flush=True)
    return rows, state_bytes(optimizer)


def begin(config, folder, model, optimizer, resume):
    """Make the folder, or restore what it holds: the rows of its log so far."""
    rows = []
    if (folder / "checkpoint.pt").exists():
        rows = load_checkpoint(folder / "checkpoint.pt", config, model, optimizer)
        write_log(folder, rows)
        print(f"resumed after epoch {len(rows)} of {config['epoch']}", flush=True)
    elif resume:
        print(f"--resume: no checkpoint in {folder}, so this run starts anew", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    return rows


def describe(model, optimizer, config, device):
    """What is about to run, in full."""
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else \
        torch.cuda.get_device_name() if device.type == "cuda" else "GPU"
    print(f"{device.type} ({where}), torch {torch.__version__}, {config['model']} with "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(textwrap.fill("  ".join(f"{k}={v}".replace(" ", "") for k, v in config.items()), 80,
                        break_on_hyphens=False))
    if config["optim"] in FILES:
        print(*layers(optimizer)[:25], sep="\n")
        if len(layers(optimizer)) > 25:
            print(f"    ... {len(layers(optimizer)) - 25} lines more, all of them in config.json")
    else:
        print("no layer is preconditioned", flush=True)


def layers(optimizer):
    """What an optimizer of this folder prints below the options that it shares with torch's."""
    return [part for line in repr(optimizer).rpartition("\n)\n")[2].splitlines()
            for part in textwrap.wrap(line, 80, subsequent_indent="    ")]


def state_bytes(optimizer):
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values()
               if torch.is_tensor(v))


def peak_memory(device):
    """MiB: of the GPU since the run began; without one, of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:          # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)     # in bytes on macOS, else KiB


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_file(path, write):
    """All of it or nothing: whoever kills this process finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_log(folder, rows):
    def text(name, value):
        return str(value) if name == "epoch" else f"{value:.9g}"
    lines = [",".join(COLUMNS)] + [",".join(text(c, row[c]) for c in COLUMNS) for row in rows]
    write_file(folder / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def save_checkpoint(path, config, rows, model, optimizer):
    """The seed in config is all the random state there is, see train_epoch."""
    content = dict(config=config, epoch=len(rows), log=rows, model=model.state_dict(),
                   optimizer=optimizer.state_dict())
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path, config, model, optimizer):
    """Put a checkpoint into model and optimizer; the rows of its log."""
    try:
        damaged = zipfile.ZipFile(path).testzip()      # checks what torch.load does not: the CRCs
        if damaged:
            raise zipfile.BadZipFile(damaged)
        saved = torch.load(path, map_location="cpu")
        old, rows = dict(saved["config"]), list(saved["log"])
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read, it is damaged or not a checkpoint of this script "
                         f"({type(error).__name__}); move it away to start this run anew")
    # The way of computing may change between two sessions; what is computed may not.
    differ = [f"--{name} (was {old.get(name)}, now {config.get(name)})"
              for name in {**old, **config} if name not in ("channels_last", "compile")
              and old.get(name) != config.get(name)]
    if differ:
        raise UsageError(f"{path} belongs to another configuration, {', '.join(differ)}: repeat "
                         "its own flags to continue it, or name another folder with --output_dir")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} does not fit this version of {config['model']} and "
                         f"{config['optim']} ({str(error).splitlines()[0]})")
    return rows


# ---------------------------------------------------------------------------------------------
# Several runs, the summary, the smoke test
# ---------------------------------------------------------------------------------------------

def run_all(args, argv, until=None):
    """One run after another; ends with the table and the record."""
    device, folders = check(args), run_folders(args)
    data = datasets.load(args.dataset, args.data_dir, args.train_size)
    if args.smoke:
        data = data._replace(test_images=data.test_images[:48], test_labels=data.test_labels[:48])
    print(f"{args.dataset} ({data.source}): {len(data.train_labels)} training and "
          f"{len(data.test_labels)} test images, {data.num_classes} classes")
    data = data._replace(**{name: getattr(data, name).to(device) for name in data._fields[:4]})
    results = []
    for optim in args.optim:
        logs = []
        for seed in args.run:
            config = resolve(args, optim, seed, len(data.train_labels))
            log, state = train(config, data, folders[optim, seed], args, shlex.join(argv), until)
            logs.append(log)
        acc = [log[-1]["test_acc"] for log in logs]
        results.append(dict(
            optim=optim, run=args.run, test_acc=acc, test_acc_mean=statistics.mean(acc),
            test_acc_std=statistics.stdev(acc) if len(acc) > 1 else None,
            train_loss=statistics.mean(log[-1]["train_loss"] for log in logs),
            seconds_per_epoch=statistics.mean(row["seconds"] for log in logs for row in log),
            peak_memory=max(row["peak_memory"] for log in logs for row in log),
            state_bytes=state, output_dir=[str(folders[optim, seed]) for seed in args.run]))
    if len(args.optim) > 1 or len(args.run) > 1:
        print_table(args, results)
    print(json.dumps(dict(dataset=args.dataset, model=args.model, epoch=args.epoch, device=device,
                          torch=torch.__version__, results=results)), flush=True)


def print_table(args, results):
    print(f"\n{args.model} on {args.dataset} after epoch {args.epoch}, over the whole test set\n"
          "optimizer   seeds   test accuracy, %   train loss   s/epoch   optimizer state")
    for r in results:
        std = "" if r["test_acc_std"] is None else f" ± {r['test_acc_std']:.2f}"
        acc = f"{r['test_acc_mean']:.2f}{std}"
        print(f"{r['optim']:<10}  {len(r['run']):5d}   {acc:>16}   {r['train_loss']:10.4f}   "
              f"{r['seconds_per_epoch']:7.1f}   {r['state_bytes'] / 2 ** 20:11.2f} MiB")


def smoke():
    """Every optimizer there is on three networks, with and without amp, then a resumed run."""
    start = time.perf_counter()
    names = [o for o in RECIPES if o not in FILES or importlib.util.find_spec(FILES[o])]
    with tempfile.TemporaryDirectory() as root:
        def go(folder, *flags, until=None):
            argv = ["--smoke", "--dataset", "shapes", "--train_size", "64", "--batch_size", "16",
                    "--output_dir", str(Path(root, folder)), "--optim", *names, *flags]
            run_all(parse(argv), argv, until)

        for model, size in ("lenet5", "64"), ("resnet20", "32"), ("deit_tiny_cifar", "16"):
            go(model, "--model", model, "--train_size", size, "--epoch", "1")
            go(f"{model}-amp", "--model", model, "--train_size", size, "--epoch", "1", "--amp")
        twice = "--model", "lenet5", "--epoch", "2"
        go("straight", *twice)
        go("resumed", *twice, until=1)
        go("resumed", *twice, "--resume")
        for optim in names:
            a, b = (Path(root, folder, optim, "log.csv").read_text().splitlines()
                    for folder in ("straight", "resumed"))
            if [line.split(",")[:6] for line in a] != [line.split(",")[:6] for line in b]:
                raise Diverged(f"{optim}: a resumed run differs from the uninterrupted one")
    return f"smoke test passed: {' '.join(names)}, {time.perf_counter() - start:.0f} s"


def print_anything():
    """Print what the console or the file has no characters for as \\u03bb, instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def terminate(signum, frame):
    raise KeyboardInterrupt(signum)


def main(argv):
    """Run the command; its exit status."""
    signal.signal(signal.SIGTERM, terminate)
    print_anything()
    try:
        args = parse(argv)
        if args.smoke:
            with contextlib.redirect_stdout(io.StringIO()):
                summary = smoke()
            print(summary)
        else:
            run_all(args, argv)
        return 0
    except KeyboardInterrupt as interrupt:
        print("\nstopped; the same command with --resume continues after the last finished epoch",
              file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (UsageError, Diverged, datasets.DataError, OSError, torch.OutOfMemoryError) as error:
        print(f"train_cifar.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, (Diverged, torch.OutOfMemoryError)) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
