"""Train ResNets, DeiT and Swin on ImageNet, or any folder of classes, with MAC and its siblings.

    python train_imagenet.py --smoke                # a few steps of everything, no data, seconds
    python train_imagenet.py --dummy 256 --model resnet18 --train-crop-size 64 --epochs 1
    python train_imagenet.py --data-path DIR --model resnet18 --opt mac --epochs 16 --amp
    torchrun --nproc_per_node=4 train_imagenet.py --data-path /data/imagenet --model resnet50 \\
        --batch-size 256 --opt mac --lr 0.5 --weight-decay 0.00002 --norm-weight-decay 0.0 \\
        --lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear --epochs 100
    torchrun --nproc_per_node=4 train_imagenet.py --data-dir /data/imagenet --sched cosine --amp \\
        --model deit_small_patch16_224 --batch-size 256 --opt mac --lr 0.5 --epochs 100

There are two recipes, and the model chooses. ResNets follow torchvision's reference training, DeiT
and Swin timm's, as both stood when MAC and NysAct were published; every flag has both spellings.
They differ in the defaults, which --help lists, and in what these words mean:

    --opt sgd           heavy ball | Nesterov
    --norm-weight-decay for normalisation layers | and all biases, positions, class tokens
    --model-ema         weight of a step from the global batch, a plain copy during warm-up | fixed
    mixing and erasing  partner the neighbour, erase before | partner mirrored, erase afterwards

--lr is taken as it is, whatever the batch and the number of processes. It changes once per epoch.
On several machines, one torchrun on each, with an --output_dir that they share:

    torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 8 \\
        train_imagenet.py --data-path /data/imagenet --model resnet50 --amp

Every run writes config.json, log.csv, checkpoint.pt and record.json to its folder. After SIGTERM,
SIGHUP or Ctrl-C (and SIGUSR1, which torchrun does not pass on), or where an image cannot be read,
all ranks save after the same step, and every --checkpoint_minutes in any case. The same command
with --resume continues there, on the CPU to the same bits. On another number of ranks (with
--batch-size and --accum for the same global batch) it continues to rounding, but for mixing,
erasing, dropout and BatchNorm, which are each rank's own. More --epochs extend a run with steplr or
a constant rate. Exit status: 0, or 1 when training diverged or a rank was lost, 2 for a wrong
command or bad data, 128 + a signal's number.
"""
import signal
import sys

if __name__ == "__main__":       # until main() listens, Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import functools
import itertools
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import images
import models
from augment import Finish, eval_transform, train_transform
from flags import (COUNT, COUNT_OR_ZERO, FRACTION, FSDP, NOT_NEGATIVE, OPTIMIZER_FLAGS, POSITIVE,
                   SEED, check_compiler, check_fsdp, check_optimizers, chosen, machine_flags,
                   make_optimizer, note_unused, number, parser_of, user_path)
from folder import check_folder, read_checkpoint
from models import IMAGENET_MODELS, load_pretrained
from ranks import Ranks, UsageError, start, tell
from report import describe, print_record
from run import Run, run_script


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def train_epoch(setup, run, epoch, every):
    """One pass over the training images, or what is left of it after a stop."""
    config, progress, accum = setup.config, run.progress, setup.config["accum"]
    setup.model.train()
    setup.train.set_epoch(epoch, progress.step * accum)
    for group in setup.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    micro, steps = iter(setup.train), -(-len(setup.train) // accum)
    batches = iter(lambda: list(itertools.islice(micro, accum)), [])
    for batch in run.steps(batches, steps, epoch, every):      # which saves and stops between two
        train_step(setup, batch, epoch, progress)
    setup.ranks.average_buffers(setup.model)


def train_step(setup, batches, epoch, progress):
    """One update from micro-batches."""
    config, ranks, optimizer, scaler = setup.config, setup.ranks, setup.optimizer, setup.scaler
    images = sum(len(labels) for _, labels in batches)
    optimizer.zero_grad()
    # the hooks of a step that feeds statistics would break the compiled graph
    call = setup.wrapped if getattr(optimizer, "collecting", False) else setup.step_model
    for i, (x, labels) in enumerate(batches):
        x, labels = (t.to(ranks.device, non_blocking=True) for t in (x, labels))
        seed = config["seed"], epoch, ranks.rank, progress.step * config["accum"] + i
        x, target = setup.finish(x, labels, seed)
        apart = ranks.world > 1 and i + 1 < len(batches) and not config["fsdp"]
        with setup.wrapped.no_sync() if apart else contextlib.nullcontext():   # averaged at last
            logits = logits_of(setup, call, x)
            loss = setup.finish.loss(logits, target)
            if config.get("fisher") == "sampled":
                optimizer.sample_fisher(logits)
            scaler.scale(loss * (len(x) / images)).backward()
        hits = logits.argmax(1) == (target if target.dim() == 1 else target.argmax(1))
        progress.add(loss, len(x), hits.sum())
    if config["clip_grad"]:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(setup.model.parameters(), config["clip_grad"])
    scaler.step(optimizer)
    scaler.update()
    if setup.ema is not None:
        setup.ema.update(setup.model, epoch, progress.step)


@torch.no_grad()
def evaluate(setup, model, text):
    """(loss, top-1, top-5 in per cent) over the whole test set, each image counted once.

    Ranks take images r, r + W, ... and meet in one sum at the end, so shards may differ, or be
    empty. The model is not DDP's, and its buffers agree already.
    """
    model.eval()
    ranks, classes = setup.ranks, setup.finish.num_classes
    double = torch.float32 if ranks.device.type == "mps" else torch.float64

    def share():
        total = torch.zeros(4, dtype=double, device=ranks.device)
        setup.test.set_epoch(0)
        bar = tqdm(setup.test, text, leave=False, disable=ranks.rank > 0 or None)
        for x, labels in setup.stop.between(bar, alone=not setup.config["fsdp"]):
            x, labels = (t.to(ranks.device, non_blocking=True) for t in (x, labels))
            logits = logits_of(setup, model, setup.finish.eval(x))
            hits = logits.topk(min(5, classes)).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total += torch.stack([loss, hits[:, 0].sum(), hits.sum(),
                                  torch.full_like(loss, len(x))])
        first = -(-setup.test.count // ranks.world)            # images of the first rank
        if setup.config["fsdp"] and len(setup.test) < -(-first // setup.config["batch_size"]):
            size = setup.config["val_crop_size"]               # the others' last batch needs this
            logits_of(setup, model, total.new_zeros(1, 3, size, size).float())       # rank's rows
        return total
    loss, top1, top5, count = ranks.total(ranks.together(share)).tolist()
    if count != setup.test.count:
        raise RuntimeError(f"{count:.0f} test images were counted, not {setup.test.count}")
    return loss / count, 100 * top1 / count, 100 * top5 / count


def train(setup, run, every):
    """Epoch after epoch: the record of the run."""
    config = setup.config
    for epoch in range(len(run.rows), config["epochs"]):
        with run.epoch(epoch) as progress:
            train_epoch(setup, run, epoch, every)
            loss, acc, count = progress.means()
            row = dict(zip(("test_loss", "test_acc", "test_top5"),
                           evaluate(setup, setup.model, "test")))
            if setup.ema is not None:
                row.update(zip(("ema_loss", "ema_acc", "ema_top5"),
                               evaluate(setup, setup.ema.model, "ema")))
        other = f"ema {row['ema_acc']:.2f}%" if setup.ema else f"top-5 {row['test_top5']:.2f}%"
        run.add(f"train {loss:.3f} {acc:.1f}%  test {row['test_loss']:.3f} "
                f"{row['test_acc']:.2f}% {other}", lr=learning_rate(config, epoch),
                train_loss=loss, train_acc=acc, **row,
                images_per_second=round(count / progress.seconds, 1),
                data_wait=round(progress.waited / progress.seconds, 4))
    return run.finish()


def calibrate(setup):
    """MAC's first layer: its covariance over one epoch of training images as the network sees them.

    On the batches of epoch 0 with other draws for mixing and erasing than the training's.
    """
    def inputs():
        setup.train.set_epoch(0)
        bar = tqdm(setup.train, "calibrate", leave=False, disable=setup.ranks.rank > 0 or None)
        for i, (x, labels) in enumerate(bar):
            x, labels = x.to(setup.ranks.device), labels.to(setup.ranks.device)
            seed = setup.config["seed"], setup.config["epochs"], setup.ranks.rank, i
            yield setup.finish(x, labels, seed)[0]
    setup.optimizer.calibrate(inputs())


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate, moving average
# ---------------------------------------------------------------------------------------------

class Setup(NamedTuple):
    """What this rank trains with. step_model is what a training step calls: DDP's, compiled."""
    config: dict
    ranks: Ranks
    stop: Any
    train: Any                   # loaders; train is None under --test_only
    test: Any
    finish: Finish
    model: nn.Module
    ema: Any                     # None without --model_ema
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    wrapped: Any = None          # the model in DDP, where there are several processes
    step_model: Any = None       # that, compiled


def learning_rate(config, epoch):
    """The rate of an epoch, counted from 0: a function of nothing else."""
    lr, warmup, low = config["lr"], config["warmup"], config["lr_min"]
    if epoch < warmup:
        first = config["warmup_lr"]
        first = lr * config["warmup_decay"] if first is None else first
        return first + (config["warmup_method"] == "linear") * (lr - first) * epoch / warmup
    if config["schedule"] == "cosine":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * epoch / config["epochs"]))
    epoch, epochs = epoch - warmup, config["epochs"] - warmup
    if config["schedule"] == "cosineannealinglr":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if config["schedule"] == "steplr":
        return lr * config["lr_gamma"] ** (epoch // config["lr_step_size"])
    return lr


BLOCKS = models.BasicBlock, models.Bottleneck, models.Block, models.SwinBlock
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
POSITIONS = ("pos_embed", "cls_token", "dist_token", "relative_position_bias_table")


def parameter_groups(model, config):
    """The parameters, and apart from them those that norm_weight_decay is for, by recipe."""
    if config["norm_weight_decay"] is None:
        return [dict(params=list(model.parameters()))]
    if config["recipe"] == "torchvision":
        apart = {p for module in model.modules() if isinstance(module, NORMS)
                 for p in module.parameters(recurse=False)}
    else:
        apart = {p for name, p in model.named_parameters()
                 if p.ndim <= 1 or name.rpartition(".")[2] in ("bias", *POSITIONS)}
    return [dict(params=[p for p in model.parameters() if p not in apart]),
            dict(params=[p for p in model.parameters() if p in apart],
                 weight_decay=config["norm_weight_decay"])]


def ema_weight(config):
    """Weight of the new value in an update of the moving average."""
    weight = 1 - config["model_ema_decay"]
    if config["recipe"] == "torchvision":
        weight *= config["global_batch"] * config["model_ema_steps"] / config["epochs"]
    return min(1.0, weight)


class EMA:
    """A moving average of a model's parameters and buffers; integer buffers are copied."""

    def __init__(self, model, config, ranks):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.config, self.ranks, self.weight, self.updates = config, ranks, ema_weight(config), 0

    def state_dict(self):
        return dict(model=self.model.state_dict(), updates=self.updates)

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]

    @torch.no_grad()
    def update(self, model, epoch, step):
        """After step `step` of an epoch.

        The ResNets' first update is a copy, as all are in their warm-up; the others' average holds
        the initial weights as well.
        """
        if step % self.config["model_ema_steps"]:
            return
        self.ranks.average_buffers(model)       # so the averages agree too, and survive on one rank
        copies = self.config["recipe"] == "torchvision" and not self.updates
        pairs = list(zip((*self.model.parameters(), *self.model.buffers()),
                         (*model.parameters(), *model.buffers())))
        real = [(old, new.detach()) for old, new in pairs if old.is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*real)), 1.0 if copies else self.weight)
        for old, new in pairs:
            if not old.is_floating_point():
                old.copy_(new)
        warming = self.config["recipe"] == "torchvision" and epoch < self.config["warmup"]
        self.updates = 0 if warming else self.updates + 1


def make_model(config, device):
    """The network as it begins: one seed, one initialisation, the same on all ranks."""
    torch.manual_seed(config["seed"])
    try:
        model = IMAGENET_MODELS[config["model"]](
            num_classes=config["classes"], image_size=config["train_crop_size"],
            drop=config["drop"], drop_path=config["drop_path"])
        if config["pretrained"]:
            load_pretrained(model, config["pretrained"])
    except ValueError as error:
        raise UsageError(str(error))
    except OSError as error:
        raise UsageError(f"{config['pretrained']} cannot be read ({error.strerror}): name a file "
                         "of weights with --pretrained")
    if config["sync_bn"]:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def build(config, ranks, stop, train, test, finish):
    """Model, moving average and optimizer, which hooks the model before it is wrapped."""
    model = make_model(config, ranks.device)
    if config["fsdp"]:
        model = ranks.shard(model, BLOCKS)
    ema = EMA(model, config, ranks) if config["model_ema"] else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config["amp_dtype"] == "float16")
    more = {}
    if config["optim"] in ("kfac", "adafisher", "adafisherw") and scaler.is_enabled():
        more["grad_scaler"] = scaler
    try:
        optimizer = make_optimizer(model, parameter_groups(model, config), config,
                                   RECIPES[config["recipe"]][config["optim"]], **more)
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))
    return Setup(config, ranks, stop, train, test, finish, model, ema, optimizer, scaler)


def wrap(setup):
    """The setup with its model in DDP, which waits for all ranks, and compiled."""
    for module in setup.model.modules():
        if setup.config["grad_checkpointing"] and isinstance(module, BLOCKS):
            module.forward = functools.partial(checkpointed, module, module.forward)
    wrapped = setup.model if setup.config["fsdp"] else setup.ranks.wrap(setup.model)
    step_model = torch.compile(wrapped) if setup.config["compile"] else wrapped
    return setup._replace(wrapped=wrapped, step_model=step_model)


def checkpointed(block, forward, x):
    """forward(x), computed again in the backward pass, where it leaves BatchNorm's buffers alone.

    In a compiled graph both are one function, which updates them once.
    """
    more = {} if torch.compiler.is_compiling() else dict(
        context_fn=lambda: (contextlib.nullcontext(), kept_buffers(block)))
    return checkpoint(forward, x, use_reentrant=False, **more)


@contextlib.contextmanager
def kept_buffers(module):
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:                     # torch ends the second pass by an exception once it has all
        for buffer, value in zip(module.buffers(), before):
            buffer.copy_(value)


def logits_of(setup, model, x):
    """model(x) in float32, under autocast if the run has it."""
    if setup.config["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    dtype = getattr(torch, setup.config["amp_dtype"] or "float32")
    with torch.autocast(setup.ranks.device.type, dtype, enabled=setup.config["amp"]):
        return model(x).float()


# ---------------------------------------------------------------------------------------------
# Recipes and the command line
# ---------------------------------------------------------------------------------------------

# What a model's family sets where a flag is not given: the defaults of the two reference scripts.
RESNET = dict(
    recipe="torchvision", batch_size=32, epochs=90, norm_weight_decay=None, schedule="steplr",
    warmup=0, warmup_method="constant", warmup_decay=0.01, warmup_lr=None, label_smoothing=0.0,
    remode="const", model_ema_decay=0.99998, model_ema_steps=32, drop_path=0.0,
    interpolation="bilinear", train_interpolation="bilinear", color_jitter=0.0, crop_pct=None,
    lr_min=0.0, lr_step_size=30, lr_gamma=0.1, mixup_prob=1.0, mixup_switch_prob=0.5)
DEIT = dict(
    RESNET, recipe="timm", batch_size=128, epochs=300, norm_weight_decay=0.0, schedule="cosine",
    warmup=5, warmup_method="linear", warmup_decay=None, warmup_lr=1e-5, label_smoothing=0.1,
    remode="pixel", model_ema_decay=0.9998, model_ema_steps=1, drop_path=0.0,
    interpolation="bicubic", train_interpolation="random", color_jitter=0.4, crop_pct=0.9)
FAMILIES = {"resnet": RESNET, "deit": DEIT, "swin": dict(DEIT, drop_path=0.1)}

# Likewise what an optimizer sets, in each recipe; it takes these flags and no others. mac and
# nysact are their authors' README lines and code (global batch 1024), kfac on transformers the
# damping of MAC's authors; sgd is the reference scripts' (global batch 256 | 1024) and adamw DeiT's
# (Touvron et al. 2021, table 9, batch 1024). Else foof, kfac and adafisher have no published values
# here: foof and kfac have the two CURVATUREs in common with mac, but not its damping and stat_decay
# for transformers, and the rest is as in train_cifar.py.
CURVATURE = dict(lr=0.5, momentum=0.9, nesterov=False, weight_decay=2e-5,
                 decoupled_weight_decay=True, damping=1.0, stat_decay=0.95, tcov=5, tinv=50)
VIT_CURVATURE = dict(CURVATURE, weight_decay=1e-4, tinv=5)
ADAMW = dict(lr=1e-3, weight_decay=0.05)
ADAFISHER = dict(lr=1e-3, beta=0.9, weight_decay=5e-4, damping=1e-3, gamma=0.8, tcov=100,
                 averaging="released")
ADAFISHERW = dict(ADAFISHER, weight_decay=0.01, damping=3e-3)
KFAC = dict(fisher="empirical", inverse="factored", weight_sharing="expand", kl_clip=1e-3)
RECIPES = {
    "torchvision": {
        "sgd": dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
        "adamw": ADAMW,
        "mac": dict(CURVATURE, input_covariance=True, calibrate=False, attention=True),
        "nysact": dict(CURVATURE, decoupled_weight_decay=False, rank=50, sketch="subcolumns"),
        "foof": CURVATURE,
        "kfac": dict(CURVATURE, damping=0.03, **KFAC),
        "adafisher": ADAFISHER,
        "adafisherw": ADAFISHERW,
    },
    "timm": {
        "sgd": dict(lr=0.4, momentum=0.9, nesterov=True, weight_decay=2e-5),
        "adamw": ADAMW,
        "mac": dict(VIT_CURVATURE, damping=3.0, stat_decay=0.99, input_covariance=True,
                    calibrate=False, attention=True),
        "nysact": dict(VIT_CURVATURE, rank=20, sketch="subcolumns"),
        "foof": VIT_CURVATURE,
        "kfac": dict(VIT_CURVATURE, damping=0.3, **KFAC),
        "adafisher": ADAFISHER,
        "adafisherw": ADAFISHERW,
    },
}
# How a run is computed, which may change between two sessions; what is computed may not.
MACHINE = ("batch_size", "accum", "world", "channels_last", "compile", "pretrained",
           "grad_checkpointing")

PROBABILITY = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
PIXELS = number(int, lambda v: 1 <= v <= 2 ** 14, "a whole number from 1 to 16384")
SHARE = number(float, lambda v: 0.01 <= v <= 1, "a number from 0.01 to 1")
DEVIATION = number(float, lambda v: 0 < v <= 1, "above 0 and at most 1, as pixels are here")
RATIO = number(float, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100")


FLAGS = {
    "what is trained": {
        "data_dir --data_path": dict(type=user_path, help="folder that holds train/CLASS/* and "
                                     "val/CLASS/*, or what images.py pack has written"),
        "dummy": dict(nargs="?", const=4096, type=COUNT, help="train on N random images of 1000 "
                      "classes instead (without N: 4096), and test on a quarter as many"),
        "train_size": dict(type=COUNT, help="train on N of the images, taken evenly from the "
                           "sorted list and so from all classes"),
        "model": dict(default="resnet50", choices=IMAGENET_MODELS, help="%(choices)s"),
        "pretrained": dict(type=user_path, nargs="?", const=True,
                           help="begin with these weights: a checkpoint.pt, or torchvision's or "
                           "timm's file"),
        "optim --opt": dict(default="mac", choices=list(RECIPES["timm"]), help="%(choices)s"),
        "seed --run": dict(default=0, type=SEED, help="of everything random")},
    "optimizer (who takes a flag, and its value where not given; a | b: in ResNets | else)": {
        **{name + dict(weight_decay=" --wd", tinv=" --update", rank=" --rank_size").get(name, ""):
           settings for name, settings in OPTIMIZER_FLAGS.items()},
        "norm_weight_decay": dict(
            type=NOT_NEGATIVE, help="weight decay of normalisation layers, and in DeiT and Swin of "
            "all biases, positions and class tokens; None: as the others"),
        "clip_grad --clip_grad_norm": dict(
            default=0.0, type=NOT_NEGATIVE, help="scale the gradient down to this norm before it "
            "is preconditioned; 0: never")},
    "training": {
        "batch_size -b": dict(type=COUNT, help="images per process and micro-batch"),
        "accum --grad_accum_steps": dict(
            default=1, type=COUNT,
            help="micro-batches per step, which takes processes × batch_size × accum images"),
        "epochs --epoch": dict(type=COUNT, help="passes over the training set"),
        "schedule --lr_scheduler --sched": dict(
            choices=("steplr", "cosineannealinglr", "cosine", "constant"),
            help="the rate after warm-up: a step every --lr_step_size epochs, or a cosine over the "
            "epochs after warm-up, or (cosine) over all, of which warm-up hides the first"),
        "warmup --lr_warmup_epochs --warmup_epochs": dict(
            type=NOT_NEGATIVE, help="epochs of warm-up; may be more than there are"),
        "warmup_method --lr_warmup_method": dict(
            choices=("linear", "constant"),
            help="grow to --lr, or stay at the warm-up's first rate until its end"),
        "warmup_decay --lr_warmup_decay": dict(
            type=PROBABILITY, help="first rate of the warm-up as a fraction of --lr"),
        "warmup_lr": dict(type=NOT_NEGATIVE, help="first rate itself instead"),
        "lr_min --min_lr": dict(type=NOT_NEGATIVE, help="where the cosine ends"),
        "lr_step_size": dict(type=COUNT, help="epochs, of steplr"),
        "lr_gamma": dict(type=POSITIVE, help="factor of steplr"),
        "label_smoothing --smoothing": dict(
            type=FRACTION, help="label smoothing; the test loss is without"),
        "mixup --mixup_alpha": dict(
            default=0.0, type=NOT_NEGATIVE,
            help="mix images in pairs by a share from Beta(X, X); 0 is off"),
        "cutmix --cutmix_alpha": dict(
            default=0.0, type=NOT_NEGATIVE, help="paste a box of another image, of an area from "
            "Beta(X, X) (in the released code from mixup's); of both each batch takes one"),
        "mixup_prob": dict(type=PROBABILITY, help="share of the batches that are mixed at all"),
        "mixup_switch_prob": dict(
            type=PROBABILITY, help="share of them that take cutmix, where both are on"),
        "drop": dict(default=0.0, type=FRACTION, help="dropout before the classifier"),
        "drop_path": dict(
            type=FRACTION, help="stochastic depth: how often the last block is skipped"),
        "model_ema": dict(
            default=False, help="also test an exponential moving average of the weights"),
        "model_ema_steps": dict(type=COUNT, help="steps between its updates"),
        "model_ema_decay": dict(type=FRACTION, help="its decay; in ResNets 1 - decay is scaled by "
                                "global batch × steps / epochs")},
    "images": {
        "auto_augment --aa": dict(
            type=str.lower, help="ta_wide, or RandAugment as rand-m9-mstd0.5-inc1; needs Pillow"),
        "random_erase --reprob": dict(
            default=0.0, type=PROBABILITY, help="share of images that lose a box"),
        "remode": dict(choices=("const", "rand", "pixel"),
                       help="what fills it: zeros, one random colour, or noise"),
        "ra_sampler": dict(default=False, help="repeated augmentation, with --ra_reps"),
        "ra_reps": dict(type=COUNT, help="how often an image comes in a row, on different ranks; "
                        "without: 3"),
        "aug_repeats": dict(type=COUNT_OR_ZERO, help="both in one; 0 is off"),
        "train_crop_size --img_size": dict(
            type=PIXELS, help="side of the training images in pixels; without: 224"),
        "input_size": dict(type=PIXELS, nargs=3, help="the same in another form: 3 N N"),
        "val_crop_size": dict(type=PIXELS, help="side of the test images; without: in ResNets 224, "
                              "else that of the training images"),
        "val_resize_size": dict(type=PIXELS, help="shorter side before this crop; without: in "
                                "ResNets 256, else by --crop_pct"),
        "crop_pct": dict(type=SHARE, help="val_crop_size / val_resize_size, instead"),
        "interpolation": dict(choices=("bilinear", "bicubic"),
                              help="for test images, and in ResNets for both"),
        "train_interpolation": dict(choices=("bilinear", "bicubic", "random"),
                                    help="for training images"),
        "color_jitter": dict(type=NOT_NEGATIVE, help="strength of colour jitter; off where "
                             "--auto_augment is given"),
        "hflip": dict(default=0.5, type=PROBABILITY, help="share of mirrored images"),
        "scale": dict(default=[0.08, 1.0], nargs=2, type=PROBABILITY,
                      help="least and largest share of an image's area in its crop"),
        "ratio": dict(default=[3 / 4, 4 / 3], nargs=2, type=RATIO,
                      help="least and largest width / height of a crop"),
        "mean": dict(default=[0.485, 0.456, 0.406], nargs=3, type=PROBABILITY,
                     help="of the pixels, in red, green and blue"),
        "std": dict(default=[0.229, 0.224, 0.225], nargs=3, type=DEVIATION,
                    help="their deviation")},
    "machine and files": {
        "amp_dtype": dict(
            choices=("bfloat16", "float16"), help="of autocast: without, bfloat16 where the device "
            "has it; float16 as published for DeiT and Swin, with a GradScaler. Without --amp, "
            "matrix products on a GPU are in TF32"),
        "channels_last": dict(default=False, help="NHWC memory format"),
        "grad_checkpointing": dict(
            default=False, help="keep no activations inside of blocks, and compute them again in "
            "the backward pass"),
        "sync_bn": dict(default=False, help="BatchNorm over the images of all GPUs; without, of "
                        "each, and averaged for testing"),
        "workers -j": dict(type=COUNT_OR_ZERO, help="processes per process that read images; "
                           "without, its share of the CPU cores, at most 16"),
        "pin_mem": dict(default=True, help="page-locked memory for copies to a GPU"),
        "print_freq --log_interval": dict(
            default=50, type=COUNT, help="steps between two looks at the loss"),
        "test_only": dict(default=False, help="test the weights of --pretrained, or of the "
                          "checkpoint in the run's folder"),
        **FSDP, **machine_flags("runs/imagenet-MODEL-OPTIM/SEED", amp="--amp_dtype")},
}


def parse(argv):
    """The command line; flags of FAMILIES and RECIPES that were not given are None."""
    return parser_of("train_imagenet.py", __doc__, FLAGS, RECIPES.values(), [FAMILIES]
                     ).parse_args(argv)


def family(model):
    return next(FAMILIES[name] for name in FAMILIES if model.startswith(name))


def resolve(args, ranks):
    """All that decides a run: flags as given, or as its model and its optimizer have them."""
    ours = family(args.model)
    config = dict(model=args.model, optim=args.optim, seed=args.seed)
    config |= chosen(args, ours | RECIPES[ours["recipe"]][args.optim])
    for name in ("clip_grad", "accum", "mixup", "cutmix", "drop", "model_ema", "auto_augment",
                 "random_erase", "hflip", "scale", "ratio", "mean", "std", "amp", "channels_last",
                 "compile", "fsdp", "grad_checkpointing", "sync_bn", "pretrained"):
        config[name] = getattr(args, name)
    if ours is RESNET and args.interpolation and not args.train_interpolation:
        config["train_interpolation"] = args.interpolation
    config["warmup_decay"] = None if args.warmup_lr is not None else config["warmup_decay"]
    config["warmup_lr"] = None if args.warmup_decay is not None else config["warmup_lr"]
    config["amp_dtype"] = amp_dtype(args, ranks.device) if args.amp else None
    repeats = (args.ra_reps or 3) if args.ra_sampler else 1
    repeats = max(1, repeats if args.aug_repeats is None else args.aug_repeats)
    config["repeats"] = repeats if ranks.world > 1 else 1        # one rank would see copies alone
    size = args.input_size[1] if args.input_size else args.train_crop_size or 224
    crop = args.val_crop_size or (224 if ours is RESNET else size)
    resize = args.val_resize_size or (int(crop / config["crop_pct"]) if config["crop_pct"] else 256)
    del config["crop_pct"]
    config.update(train_crop_size=size, val_crop_size=crop, val_resize_size=resize,
                  world=ranks.world, global_batch=ranks.world * config["batch_size"] * args.accum)
    if config["auto_augment"]:
        config["color_jitter"] = 0.0
    return config


def amp_dtype(args, device):
    supported = device.type == "cpu" or device.type == "cuda" and \
        torch.cuda.is_bf16_supported(including_emulation=False)
    return args.amp_dtype or ("bfloat16" if supported else "float16")


def check(args, config, device):
    """What is wrong with a command beyond single values, before anything is loaded."""
    timm = config["recipe"] == "timm"
    if args.data_dir is None and not args.dummy:
        raise UsageError("--data_dir DIR is to name the folder that holds train and val; without "
                         "data, --dummy trains on random images")
    if args.pretrained is True:
        raise UsageError("--pretrained is to name a file, since nothing is downloaded here: the "
                         "weights of this model by torchvision or timm, or a checkpoint.pt")
    if args.warmup_decay is not None and args.warmup_lr is not None:
        raise UsageError("--warmup_decay and --warmup_lr both give the first rate: drop one")
    if args.input_size and args.input_size != [3, args.input_size[1], args.input_size[1]]:
        raise UsageError("--input_size takes 3 N N: colour images, as wide as they are high")
    if timm and config["val_crop_size"] != config["train_crop_size"]:
        raise UsageError(f"--val_crop_size {config['val_crop_size']}: {args.model} tests at the "
                         f"size it is trained at, --train_crop_size {config['train_crop_size']}")
    if timm and config["batch_size"] % 2 and (args.mixup or args.cutmix):
        raise UsageError(f"--batch_size {config['batch_size']}: mixup and cutmix in the recipe of "
                         "DeiT and Swin need an even number")
    if args.ra_sampler and args.aug_repeats not in (None, args.ra_reps or 3):
        raise UsageError(f"--ra_sampler takes each image {args.ra_reps or 3} times (--ra_reps), "
                         f"and --aug_repeats {args.aug_repeats} says otherwise: drop one")
    for name in ("scale", "ratio"):
        least, largest = config[name]
        if least > largest:
            raise UsageError(f"--{name} {least} {largest}: the smaller number is to come first")
    if config["scale"][1] < 0.01:
        raise UsageError(f"--scale {config['scale'][0]} {config['scale'][1]}: the larger share is "
                         "to be at least 0.01, or no crop is left")
    if config["schedule"].startswith("cosine") and config["lr_min"] > config["lr"]:
        raise UsageError(f"--lr_min {config['lr_min']} is above --lr {config['lr']}: the cosine is "
                         "to fall")
    if args.amp_dtype and not args.amp:
        raise UsageError("--amp_dtype is to be given together with --amp")
    if args.sync_bn and device.type != "cuda":
        raise UsageError("--sync_bn needs GPUs")
    check_compiler(args, device)
    check_fsdp(args, config["world"], config["amp_dtype"])
    check_optimizers(args, [args.optim], RECIPES[config["recipe"]])
    note_idle(args, config)


def note_idle(args, config):
    """A note on flags that were given and are without effect."""
    schedule = config["schedule"]
    for names, used, where in (
            ("model_ema_steps model_ema_decay", args.model_ema, "a run without --model_ema"),
            ("mixup_prob", args.mixup or args.cutmix, "a run without --mixup and --cutmix"),
            ("mixup_switch_prob", args.mixup and args.cutmix,
             "a run without both --mixup and --cutmix"),
            ("data_dir", not args.dummy, "a run with --dummy"),
            ("train_crop_size", not args.input_size, "a run with --input_size"),
            ("crop_pct", not args.val_resize_size, "a run with --val_resize_size"),
            ("color_jitter", not args.auto_augment, "a run with --auto_augment"),
            ("remode", args.random_erase, "a run without --random_erase"),
            ("ra_reps", args.ra_sampler, "a run without --ra_sampler"),
            ("warmup_method warmup_decay warmup_lr", config["warmup"], "a run without warm-up"),
            ("lr_step_size lr_gamma", schedule == "steplr", f"--schedule {schedule}"),
            ("lr_min", schedule.startswith("cosine"), f"--schedule {schedule}")):
        if not used:
            note_unused({name for name in names.split() if getattr(args, name) is not None}, where)
    if config["world"] == 1 and (args.ra_sampler or (args.aug_repeats or 0) > 1):
        tell("note: one process alone takes each image once, without repeated augmentation")


# ---------------------------------------------------------------------------------------------
# From the command to the record
# ---------------------------------------------------------------------------------------------

def open_sources(args, config):
    """(training images, test images); the former None under --test_only."""
    if args.dummy:
        training, test = (images.DummyImages(count, config["val_resize_size"], 1000, seed)
                          for seed, count in enumerate((args.dummy, max(1, args.dummy // 4))))
    else:
        training = None if args.test_only else images.open_images(args.data_dir, "train")
        classes = None if training is None else training.classes
        test = images.open_images(args.data_dir, "val", classes)
    if args.train_size and training is not None:
        training = images.FewerImages(training, args.train_size)
    return training, test


def open_loaders(args, config, ranks, training, test):
    """(training loader or None, test loader)"""
    workers = args.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
            else os.cpu_count() or 1
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # timm's names of the options are this script's, but for the policy's
    options = {name: config[name] for name in ("scale", "ratio", "hflip", "color_jitter", "mean")}
    transform = train_transform(
        config["recipe"], config["train_crop_size"], config["train_interpolation"],
        config["auto_augment"], **options)
    same = dict(seed=config["seed"], rank=ranks.rank, world=ranks.world, workers=workers,
                recipe=config["recipe"], pin_memory=args.pin_mem and ranks.device.type == "cuda")
    train = None if training is None else images.ImageLoader(
        training, transform, config["batch_size"], train=True, repeats=config["repeats"],
        accum=config["accum"], **same)
    transform = eval_transform(config["val_resize_size"], config["val_crop_size"],
                               config["interpolation"])
    return train, images.ImageLoader(test, transform, config["batch_size"], train=False, **same)


def run_folder(args):
    folder = Path("runs", f"imagenet-{args.model}-{args.optim}", str(args.seed))
    return folder if args.output_dir is None else Path(args.output_dir)


def prepare(args, ranks, stop):
    """Everything that can be wrong with a command: the Setup."""
    config = resolve(args, ranks)
    check(args, config, ranks.device)
    folder = run_folder(args)
    if not args.test_only:
        check_folder(folder, args.resume)
    elif not args.pretrained:
        config["pretrained"] = folder / "checkpoint.pt"
        if not config["pretrained"].exists():
            raise UsageError(f"--test_only: there is no checkpoint in {folder}; name its folder "
                             "with --output_dir, or weights with --pretrained")
    training, test = open_sources(args, config)
    config.update(train_size=None if training is None else len(training),
                  classes=len(test.classes), data="-".join(
                      source.fingerprint for source in (training, test) if source is not None))
    finish = Finish(
        config["mean"], config["std"], len(test.classes), recipe=config["recipe"],
        erase_prob=config["random_erase"], erase_mode=config["remode"],
        mixup_alpha=config["mixup"], cutmix_alpha=config["cutmix"],
        mixup_prob=config["mixup_prob"], switch_prob=config["mixup_switch_prob"],
        smoothing=config["label_smoothing"])
    loaders = train, _ = open_loaders(args, config, ranks, training, test)
    small = config["recipe"] == "torchvision" and config["train_crop_size"] <= 32
    if small and train is not None and len(train.plan[-1][0]) == 1:      # the last map is 1 × 1
        raise UsageError(f"--batch_size {config['batch_size']} leaves one image for the last batch "
                         f"of a process, and BatchNorm needs two where {config['model']} is given "
                         f"{config['train_crop_size']} pixels: choose another batch size")
    for source, split in ((training, "training"), (test, "test")):
        if source is not None:
            print(f"{len(source)} {split} images of {len(source.classes)} classes: {source.where}")
    print(f"{ranks.world} process{'es' if ranks.world > 1 else ''}, "
          f"{config['global_batch']} images a step")
    return build(config, ranks, stop, *loaders, finish)


def test_only(setup, args):
    """Accuracy of --pretrained, or of the checkpoint in the folder and its moving average."""
    results, saved = {}, {}
    if not args.pretrained:                    # the model has its weights already
        saved = setup.ranks.together(lambda: read_checkpoint(setup.config["pretrained"]))
    if saved.get("ema"):
        ema = copy.deepcopy(setup.model)
        ema.load_state_dict(saved["ema"]["model"])
        results.update(zip(("ema_loss", "ema_acc", "ema_top5"), evaluate(setup, ema, "ema")))
    results.update(zip(("test_loss", "test_acc", "test_top5"),
                       evaluate(setup, setup.model, "test")))
    for name in (name for name in ("ema", "test") if f"{name}_loss" in results):
        print(f"{name}: loss {results[f'{name}_loss']:.4f}, top-1 {results[f'{name}_acc']:.2f}%, "
              f"top-5 {results[f'{name}_top5']:.2f}%")
    return dict(model=setup.config["model"], processes=setup.ranks.world, **results)


def launch(args, stop):
    """The whole command on this rank."""
    ranks = start(args.device, stop)
    if ranks.device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.test_only
        torch.set_float32_matmul_precision("high")       # statistics are exempt, see mac.py
    setup = ranks.together(lambda: prepare(args, ranks, stop))
    config, folder = setup.config, run_folder(args)
    ranks.agree(dict(config, test_size=setup.test.count, print_freq=args.print_freq))
    try:
        if args.test_only:
            print_record(test_only(setup, args))
            return
        describe(setup.model, setup.optimizer, config, ranks.device, folder)
        setup = wrap(setup)
        parts = dict(model=setup.model, optimizer=setup.optimizer, scaler=setup.scaler)
        if setup.ema is not None:
            parts["ema"] = setup.ema
        # the number of epochs plays no part in these rates, nor in an average of constant weight
        free = config["schedule"] in ("steplr", "constant") and not (
            config["model_ema"] and config["recipe"] == "torchvision")
        run = Run(folder, config, parts, args, ranks, stop,
                  (*MACHINE, "epochs") if free else MACHINE)
        if config.get("calibrate") and not run.resumed:
            calibrate(setup)
        print_record(train(setup, run, args.print_freq))
    except RuntimeError as error:
        images.check_workers(error)            # torch's word that a worker was killed
        raise


def smoke(stop):
    """Every optimizer for some steps, with amp, accumulation, mixing and the moving average."""
    resnet = ("--accum 2 --model-ema --mixup 0.2 --cutmix 1 --random-erase 0.5 "
              "--norm-weight-decay 0 --grad-checkpointing")
    todo = [("deit_tiny_patch16_224", optim, "--amp") for optim in RECIPES["timm"]]
    todo += [("resnet18", optim, resnet) for optim in ("sgd", "mac", "nysact")]
    with tempfile.TemporaryDirectory() as root:
        for model, optim, flags in todo:
            argv = ("--dummy 8 --train_crop_size 32 --val_crop_size 32 --val_resize_size 32 "
                    f"--batch_size 4 --workers 0 --device cpu --epochs 1 --model {model} "
                    f"--opt {optim} --output_dir {root}/{model}-{optim} {flags}").split()
            launch(parse(argv), stop)
    return list(RECIPES["timm"])


def main(argv):
    """Run the command; its exit status."""
    return run_script("train_imagenet.py", parse, launch, smoke, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
