"""Train an image classifier with MAC, one of its siblings, or a baseline, and log what it costs.

    python train_cifar.py --smoke                 # a few batches of everything, no data, seconds
    python train_cifar.py --dataset shapes --optim mac sgd --epoch 2 --train_size 5000   # generated
    python train_cifar.py --optim mac sgd adamw --epoch 5 --run 0 1 2     # CIFAR-10, mean ± std
    python train_cifar.py --device cuda --amp --channels_last --compile   # MAC for 200 epochs
    python train_cifar.py --dataset cifar100 --model wrn28_10 --schedule_step step --warmup 5
    python train_cifar.py --model resnet110 --optim mac --lr 0.1 --momentum 0.9 --stat_decay 0.95 \\
        --damping 1.0 --tcov 5 --tinv 50 --weight_decay 0.0005 --epoch 200 --run 0   # as published

Every run writes config.json, log.csv, checkpoint.pt and record.json to its own folder. Whatever
ends it (SIGTERM, SIGHUP, SIGUSR1, Ctrl-C, kill -9), the same command with --resume continues, on
the CPU to the same bits; more --epoch extend a run where the schedule allows it. Exit status: 0, or
1 when training diverged, 2 for a wrong command, 128 + the signal's number when stopped by one.
"""
import signal
import sys

if __name__ == "__main__":       # until main() listens, Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import itertools
import math
import tempfile

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as datasets
from flags import (COUNT, COUNT_OR_ZERO, FRACTION, NOT_NEGATIVE, OPTIMIZER_FLAGS, POSITIVE,
                   RECIPES, check_compiler, check_optimizers, chosen, machine_flags,
                   make_optimizer, note_unused, parser_of, several_flags, user_path)
from folder import run_folders
from models import CIFAR_MODELS
from ranks import UsageError, start
from report import describe, train_all
from run import Run, run_script


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def train_epoch(run, forward, data, epoch):
    """One pass over the training set, or what is left of it after a stop."""
    config, progress = run.config, run.progress
    model, optimizer = run.parts["model"], run.parts["optimizer"]
    model.train()
    steps = datasets.num_batches(len(data.train_labels), config["batch_size"], train=True)
    batches = itertools.islice(train_batches(data, config, epoch), progress.step, None)
    for x, y in run.steps(batches, steps, epoch):      # which saves and stops between two of them
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch, progress.step, steps)
        optimizer.zero_grad()
        logits = forward(x)
        loss = F.cross_entropy(logits, y, label_smoothing=config["label_smoothing"])
        if config.get("fisher") == "sampled":
            optimizer.sample_fisher(logits)
        loss.backward()
        optimizer.step()
        progress.add(loss, len(y), (logits.argmax(1) == y).sum())


def train_batches(data, config, epoch):
    return datasets.batches(data.train_images, data.train_labels, config["batch_size"],
                            train=True, mean=data.mean, std=data.std, seed=config["seed"],
                            epoch=epoch, cutout=config["cutout"])


@torch.no_grad()
def evaluate(model, forward, data, stop):
    """Loss and accuracy in per cent over the whole test set."""
    model.eval()
    total = torch.zeros(2, device=data.test_images.device)
    batches = datasets.batches(data.test_images, data.test_labels, 500, train=False,
                               mean=data.mean, std=data.std)
    for x, y in stop.between(tqdm(batches, "test", -(-len(data.test_labels) // 500), leave=False,
                                  disable=None)):
        logits = forward(x)
        total += torch.stack([F.cross_entropy(logits, y, reduction="sum"),
                              (logits.argmax(1) == y).sum()])
    loss, correct = total.tolist()
    return loss / len(data.test_labels), 100 * correct / len(data.test_labels)


def train(config, data, folder, args, ranks, stop):
    """One run, from its checkpoint if it has one: its record."""
    model, optimizer = build(config, data)
    describe(model, optimizer, config, ranks.device, folder, config["seed"] == args.seed[0])
    free = () if config["schedule"] == "cosine" else ("epochs",)    # of which no rate depends
    run = Run(folder, config, dict(model=model, optimizer=optimizer), args, ranks, stop,
              MACHINE + free)
    if config.get("calibrate") and not run.resumed:
        optimizer.calibrate(stop.between(tqdm(train_batches(data, config, 0), "calibrate",
                                              leave=False, disable=None)))
    forward = make_forward(model, optimizer, config, ranks.device)
    for epoch in range(len(run.rows), config["epochs"]):
        with run.epoch(epoch) as progress:
            train_epoch(run, forward, data, epoch)
            loss, acc, _ = progress.means()
            test_loss, test_acc = evaluate(model, forward, data, stop)
        lr = optimizer.param_groups[0]["lr"]
        run.add(f"lr {lr:<8.3g} train {loss:.4f} {acc:5.2f}%  "
                f"test {test_loss:.4f} {test_acc:5.2f}%", lr=lr, train_loss=loss, train_acc=acc,
                test_loss=test_loss, test_acc=test_acc)
    return run.finish()


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate
# ---------------------------------------------------------------------------------------------

def build(config, data):
    """The network and its optimizer on the data's device. One seed, one initialisation."""
    torch.manual_seed(config["seed"])
    try:
        model = CIFAR_MODELS[config["model"]](data.num_classes, *data.train_images.shape[1:3])
        if config["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        model = model.to(data.train_images.device)
        return model, make_optimizer(model, model.parameters(), config, RECIPES[config["optim"]])
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def make_forward(model, optimizer, config, device):
    """x → logits in float32. The optimizer's hooks are on the model before this compiles it."""
    compiled = torch.compile(model) if config["compile"] else model

    def forward(x):
        if config["channels_last"]:
            x = x.contiguous(memory_format=torch.channels_last)
        # the hooks of a step that feeds statistics would break the compiled graph
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
        return lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (config["epochs"] - warmup)))
    if config["schedule"] == "multistep":
        return lr * config["lr_decay"] ** sum(t >= m for m in config["milestones"])
    return lr


# ---------------------------------------------------------------------------------------------
# Recipes and the command line
# ---------------------------------------------------------------------------------------------

# What an optimizer's recipe sets beside it, see flags.py.
TRAINING = dict.fromkeys(RECIPES, dict(batch_size=128, cutout=0)) | dict.fromkeys(
    ("adafisher", "adafisherw"), dict(batch_size=256, cutout=16))
MACHINE = ("channels_last", "compile")         # what may change when a run is resumed

FLAGS = {
    "what is trained": {
        "dataset": dict(default="cifar10",
                        choices=("cifar10", "cifar100", "fashion_mnist", "shapes"),
                        help="shapes is generated and needs no download"),
        "data_dir": dict(default="data", type=user_path,
                         help="folder that holds the data, or receives them"),
        "train_size": dict(type=COUNT, help="use the first N training images"),
        "model": dict(default="resnet20", choices=CIFAR_MODELS, help="%(choices)s"),
        **several_flags("mac")},
    "optimizer (who takes a flag, and the published value where it is not given)": OPTIMIZER_FLAGS,
    "training": {
        "batch_size": dict(type=COUNT, help="images per step"),
        "epochs --epoch": dict(default=200, type=COUNT, help="passes over the training set"),
        "schedule": dict(default="cosine", choices=("cosine", "multistep", "constant"),
                         help="the learning rate after warm-up"),
        "schedule_step": dict(default="epoch", choices=("epoch", "step"),
                              help="how often the rate changes; as published: every epoch"),
        "milestones": dict(nargs="+", type=COUNT, help="epochs at which multistep multiplies the "
                           "rate by --lr_decay; without: one half and three quarters of all"),
        "lr_decay": dict(type=POSITIVE, help="factor of multistep; without: 0.1"),
        "warmup --warmup_epochs": dict(default=0, type=NOT_NEGATIVE, help="epochs of linear "
                                       "warm-up; may be more than there are"),
        "label_smoothing": dict(default=0.0, type=FRACTION, help="label smoothing"),
        "cutout": dict(type=COUNT_OR_ZERO, help="side in pixels of a square cut out of every "
                       "training image; 0: none")},
    "machine and files": {
        "channels_last": dict(default=False, help="NHWC memory format"),
        **machine_flags("runs/DATASET-MODEL-OPTIM/SEED")},
}


def parse(argv):
    """The command line; flags of RECIPES and TRAINING that were not given are None."""
    return parser_of("train_cifar.py", __doc__, FLAGS, [RECIPES], [TRAINING]).parse_args(argv)


def resolve(args, optim, seed, data):
    """All that decides one run: the flags as given or default, its optimizer's from the recipe."""
    config = dict(dataset=args.dataset, train_size=len(data.train_labels), data=data.fingerprint,
                  model=args.model, optim=optim, seed=seed)
    config |= chosen(args, RECIPES[optim] | TRAINING[optim])
    for name in ("epochs", "schedule", "schedule_step", "warmup", "label_smoothing", "amp",
                 "channels_last", "compile"):
        config[name] = getattr(args, name)
    if config["schedule"] == "multistep":
        config["milestones"] = args.milestones or [max(1, args.epochs // 2),
                                                   max(1, args.epochs * 3 // 4)]
        config["lr_decay"] = args.lr_decay or 0.1
    return config


def check(args, device):
    """What is wrong with a command beyond single values, before anything is loaded."""
    check_compiler(args, device)
    check_optimizers(args, args.optim, RECIPES)
    if args.schedule != "multistep" or min(args.milestones or [0]) >= args.epochs:
        where = "schedule" if args.schedule != "multistep" else "epochs"
        note_unused({name for name in ("milestones", "lr_decay")
                     if getattr(args, name) is not None}, f"--{where} {getattr(args, where)}")


def run_all(args, stop):
    """One run after another; ends with the table and the record."""
    ranks = start(args.device, stop)
    if ranks.world > 1:
        raise UsageError("train_cifar.py is for one process: start it without torchrun")
    check(args, ranks.device)
    folders = run_folders(args, args.dataset)
    data = datasets.load(args.dataset, args.data_dir, args.train_size)
    print(f"{args.dataset} ({data.source}): {len(data.train_labels)} training and "
          f"{len(data.test_labels)} test images, {data.num_classes} classes")
    if args.smoke:
        data = data._replace(test_images=data.test_images[:48], test_labels=data.test_labels[:48])
    if args.cutout and args.cutout >= 2 * data.train_images.shape[2]:
        note_unused({"cutout"}, f"images of {data.train_images.shape[2]} pixels, of which "
                    f"{args.cutout} leave nothing")
    data = data._replace(**{name: getattr(data, name).to(ranks.device)
                            for name in data._fields[:4]})
    train_all(args, f"{args.model} on {args.dataset} after epoch {args.epochs}, over the whole "
              "test set", {"test_acc": ("test accuracy, %", 2)},
              lambda optim, seed: train(resolve(args, optim, seed, data), data,
                                        folders[optim, seed], args, ranks, stop),
              dataset=args.dataset, device=str(ranks.device))


def smoke(stop):
    """Every optimizer there is on three networks, with and without amp."""
    with tempfile.TemporaryDirectory() as root:
        for model, size in ("lenet5", 64), ("resnet20", 32), ("deit_tiny_cifar", 16):
            for amp in "false", "true":
                line = (f"--smoke --dataset shapes --train_size {size} --batch_size 16 --epoch 1 "
                        f"--model {model} --amp {amp} --output_dir {root}/{model}-{amp} --optim")
                argv = [*line.split(), *RECIPES]
                run_all(parse(argv), stop)
    return list(RECIPES)


def main(argv):
    """Run the command; its exit status."""
    return run_script("train_cifar.py", parse, run_all, smoke, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
