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
They differ in the defaults that --help gives as "a | b", and in what these words mean:

    --opt sgd           heavy ball | Nesterov
    --norm-weight-decay for normalisation layers | and all biases, positions, class tokens
    --model-ema         weight of a step from the global batch, a plain copy during warm-up | fixed
    mixing and erasing  partner the neighbour, erase before | partner mirrored, erase afterwards

--lr is taken as it is, whatever the batch and the number of processes. It changes once per epoch.
Every run writes config.json, log.csv and checkpoint.pt to its folder. After SIGTERM or Ctrl-C all
ranks finish their step and save, and the same command with --resume continues there, on the CPU to
the same bits. On another number of ranks (with --batch-size and --accum for the same global batch)
it continues to rounding, but for mixing, erasing, dropout and BatchNorm, which are each rank's own.
The last line of the output is a JSON record. Exit status: 0, or 1 when training diverged or a rank
was lost, 2 for a wrong command or bad data, 130 and 143 when interrupted and terminated.
"""
import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import images as datasets
from augment import Finish, eval_transform, seed_sequence, train_transform
from models import IMAGENET_MODELS, load_pretrained
from train_cifar import (COUNT, COUNT_OR_ZERO, FILES, FRACTION, NOT_NEGATIVE, POSITIVE, SEED,
                         Diverged, Parser, UsageError, check_folder, describe, number,
                         optimizer_class, peak_memory, print_anything, state_bytes, user_path,
                         write_file)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of ImageNet's pixels, for all models

# What a model's family sets where a flag is not given: the defaults of the two reference scripts.
RESNET = dict(
    recipe="torchvision", batch_size=32, epoch=90, norm_weight_decay=None, schedule="steplr",
    warmup=0, warmup_method="constant", warmup_decay=0.01, warmup_lr=None, label_smoothing=0.0,
    remode="const", model_ema_decay=0.99998, model_ema_steps=32, drop_path=0.0,
    interpolation="bilinear", train_interpolation="bilinear", color_jitter=0.0, crop_pct=None)
DEIT = dict(
    recipe="timm", batch_size=128, epoch=300, norm_weight_decay=0.0, schedule="cosine",
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
                 as_released=False)
ADAFISHERW = dict(ADAFISHER, weight_decay=0.01, damping=3e-3)
KFAC = dict(fisher="empirical", inverse="factored", weight_sharing="expand", kl_clip=1e-3)
RECIPES = {
    "torchvision": {
        "sgd": dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4),
        "adamw": ADAMW,
        "mac": dict(CURVATURE, calibrate=False),
        "nysact": dict(CURVATURE, decoupled_weight_decay=False, rank=50, sketch="subcolumns"),
        "foof": CURVATURE,
        "kfac": dict(CURVATURE, damping=0.03, **KFAC),
        "adafisher": ADAFISHER,
        "adafisherw": ADAFISHERW,
    },
    "timm": {
        "sgd": dict(lr=0.4, momentum=0.9, nesterov=True, weight_decay=2e-5),
        "adamw": ADAMW,
        "mac": dict(VIT_CURVATURE, damping=3.0, stat_decay=0.99, calibrate=False),
        "nysact": dict(VIT_CURVATURE, rank=20, sketch="subcolumns"),
        "foof": VIT_CURVATURE,
        "kfac": dict(VIT_CURVATURE, damping=0.3, **KFAC),
        "adafisher": ADAFISHER,
        "adafisherw": ADAFISHERW,
    },
}
COLUMNS = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds",
           "peak_memory", "test_top5", "ema_loss", "ema_acc", "ema_top5", "images_per_second",
           "data_wait")
# How a run is computed, which may change between two sessions; what is computed may not.
MACHINE = ("batch_size", "accum", "world", "channels_last", "compile", "pretrained")


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

PROBABILITY = number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
PIXELS = number(int, lambda v: 1 <= v <= 2 ** 14, "a whole number from 1 to 16384")
SHARE = number(float, lambda v: 0.01 <= v <= 1, "a number from 0.01 to 1")
RATIO = number(float, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100")


def truth(text):
    """An argparse type: yes or no."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def parse(argv):
    """The command line; flags of FAMILIES and RECIPES that were not given are None."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python train_imagenet.py [flags]", allow_abbrev=False,
                    epilog="- and _ are the same in the names of flags; of a flag given twice the "
                           "last value counts. a | b: for ResNets | for DeiT and Swin. A switch "
                           "takes true or false, and means true alone.")

    def flag(group, name, *alias, help, default=None, switch=False, **kwargs):
        shown = published(name)
        if not shown and default not in (None, False):
            values = default if isinstance(default, list) else [default]
            shown = "default " + " ".join(f"{v:.3g}" if v != str(v) else v for v in values)
        if switch:
            kwargs.update(type=truth, nargs="?", const=True, metavar="BOOL")
        group.add_argument(f"--{name}", *alias, dest=name, default=default,
                           help=f"{help} ({shown})" if shown else help, **kwargs)

    add_run_flags(flag, parser.add_argument_group("what is trained"))
    add_optimizer_flags(flag, parser.add_argument_group(
        "optimizer (who takes a flag, and its value where it is not given)"))
    add_schedule_flags(flag, parser.add_argument_group("training"))
    add_image_flags(flag, parser.add_argument_group("images"))
    add_machine_flags(flag, parser.add_argument_group("machine and files"))
    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
    return parser.parse_args(argv)


def published(name):
    """How --help shows a flag's value in FAMILIES or RECIPES; empty where it is in neither."""
    def both(a, b):
        return f"{a} | {b}" if a != b else "" if a is False else str(a)
    if name in DEIT:
        swin = FAMILIES["swin"][name]
        return "default " + both(RESNET[name], DEIT[name]).replace("None", "none") \
            + (f", for Swin {swin}" if swin != DEIT[name] else "")
    takers = {}                  # {published value: optimizers}
    for optim, recipe in RECIPES["torchvision"].items():
        if name in recipe:
            value = both(recipe[name], RECIPES["timm"][optim][name])
            takers.setdefault(value, []).append(optim)
    return "; ".join(f"{value} for {', '.join(optims)}".strip() for value, optims in takers.items())


def add_run_flags(flag, group):
    flag(group, "data_dir", "--data_path", type=user_path, metavar="DIR",
         help="folder that holds train/CLASS/* and val/CLASS/*, or what images.py pack has written")
    flag(group, "dummy", nargs="?", const=4096, type=COUNT, metavar="N",
         help="train on N random images of 1000 classes instead (without N: 4096), and test on a "
         "quarter as many")
    flag(group, "train_size", type=COUNT, metavar="N",
         help="train on N of the images, taken evenly from the sorted list and so from all classes")
    flag(group, "model", default="resnet50", choices=list(IMAGENET_MODELS), metavar="NAME",
         help="%(choices)s")
    flag(group, "pretrained", type=user_path, metavar="FILE",
         help="begin with these weights: a checkpoint.pt, or torchvision's or timm's file")
    flag(group, "optim", "--opt", default="mac", choices=list(RECIPES["timm"]), metavar="NAME",
         help="%(choices)s")
    flag(group, "seed", "--run", default=0, type=SEED, metavar="SEED",
         help="of everything random")


def add_optimizer_flags(flag, group):
    flag(group, "lr", type=POSITIVE, metavar="X", help="learning rate, at any batch size")
    flag(group, "momentum", type=FRACTION, metavar="X", help="momentum")
    flag(group, "nesterov", switch=True, help="Nesterov's momentum")
    flag(group, "weight_decay", "--wd", type=NOT_NEGATIVE, metavar="X", help="weight decay")
    flag(group, "norm_weight_decay", type=NOT_NEGATIVE, metavar="X",
         help="weight decay of normalisation layers, and in DeiT and Swin of all biases, positions "
         "and class tokens; none means as the others")
    flag(group, "decoupled_weight_decay", switch=True,
         help="shrink the weights directly, not by way of the gradient")
    flag(group, "damping", type=POSITIVE, metavar="X",
         help="what is added to the curvature; large means SGD")
    flag(group, "stat_decay", type=FRACTION, metavar="X",
         help="weight of the past in the moving averages")
    flag(group, "tcov", type=COUNT, metavar="N", help="steps between updates of the statistics")
    flag(group, "tinv", "--update", type=COUNT, metavar="N",
         help="steps between updates of what is applied")
    flag(group, "calibrate", switch=True,
         help="fix the first layer's covariance by one pass over the data before training, as "
         "published, in place of the average during training")
    flag(group, "rank", "--rank_size", type=COUNT, metavar="N", help="columns of the sketch")
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
    flag(group, "as_released", switch=True,
         help="average and normalise as the released code does, not as the paper")
    flag(group, "clip_grad", "--clip_grad_norm", type=POSITIVE, metavar="X",
         help="scale the gradient down to this norm before it is preconditioned")


def add_schedule_flags(flag, group):
    flag(group, "batch_size", "-b", type=COUNT, metavar="N",
         help="images per process and micro-batch")
    flag(group, "accum", "--grad_accum_steps", default=1, type=COUNT, metavar="N",
         help="micro-batches per step, so a step takes processes × batch_size × accum images")
    flag(group, "epoch", "--epochs", type=COUNT, metavar="N", help="passes over the training set")
    flag(group, "schedule", "--lr_scheduler", "--sched",
         choices=("steplr", "cosineannealinglr", "cosine", "constant"),
         help="the rate after warm-up: a step every --lr_step_size epochs, or a cosine over the "
         "epochs after warm-up, or (cosine) over all epochs, of which warm-up hides the first")
    flag(group, "warmup", "--lr_warmup_epochs", "--warmup_epochs", type=COUNT_OR_ZERO, metavar="N",
         help="epochs of warm-up; may be more than there are")
    flag(group, "warmup_method", "--lr_warmup_method", choices=("linear", "constant"),
         help="grow to --lr, or stay at the warm-up's first rate until its end")
    flag(group, "warmup_decay", "--lr_warmup_decay", type=PROBABILITY, metavar="X",
         help="first rate of the warm-up as a fraction of --lr")
    flag(group, "warmup_lr", type=NOT_NEGATIVE, metavar="X", help="first rate itself instead")
    flag(group, "lr_min", "--min_lr", default=0.0, type=NOT_NEGATIVE, metavar="X",
         help="where the cosine ends")
    flag(group, "lr_step_size", default=30, type=COUNT, metavar="N", help="epochs, of steplr")
    flag(group, "lr_gamma", default=0.1, type=POSITIVE, metavar="X", help="factor of steplr")
    flag(group, "label_smoothing", "--smoothing", type=FRACTION, metavar="X",
         help="label smoothing; the test loss is without")
    flag(group, "mixup", "--mixup_alpha", default=0.0, type=NOT_NEGATIVE, metavar="X",
         help="mix images in pairs by a share from Beta(X, X); 0 is off")
    flag(group, "cutmix", "--cutmix_alpha", default=0.0, type=NOT_NEGATIVE, metavar="X",
         help="paste a box of another image, of an area from Beta(X, X) (in the released code from "
         "mixup's); of both each batch takes one")
    flag(group, "mixup_prob", default=1.0, type=PROBABILITY, metavar="X",
         help="share of the batches that are mixed at all")
    flag(group, "mixup_switch_prob", default=0.5, type=PROBABILITY, metavar="X",
         help="share of them that take cutmix, where both are on")
    flag(group, "drop", default=0.0, type=FRACTION, metavar="X",
         help="dropout before the classifier")
    flag(group, "drop_path", type=FRACTION, metavar="X",
         help="stochastic depth: how often the last block is skipped")
    flag(group, "model_ema", default=False, switch=True,
         help="also test an exponential moving average of the weights")
    flag(group, "model_ema_steps", type=COUNT, metavar="N", help="steps between its updates")
    flag(group, "model_ema_decay", type=FRACTION, metavar="X",
         help="its decay; in ResNets 1 - decay is scaled by global batch × steps / epochs")


def add_image_flags(flag, group):
    flag(group, "auto_augment", "--aa", metavar="POLICY",
         help="ta_wide, or RandAugment as in rand-m9-mstd0.5-inc1; needs Pillow")
    flag(group, "random_erase", "--reprob", default=0.0, type=PROBABILITY, metavar="X",
         help="share of images that lose a box")
    flag(group, "remode", choices=("const", "rand", "pixel"),
         help="what fills it: zeros, one random colour, or noise")
    flag(group, "ra_sampler", default=False, switch=True,
         help="repeated augmentation, with --ra_reps")
    flag(group, "ra_reps", default=3, type=COUNT, metavar="N",
         help="how often an image comes in a row, on different ranks")
    flag(group, "aug_repeats", type=COUNT_OR_ZERO, metavar="N", help="both in one; 0 is off")
    flag(group, "train_crop_size", "--img_size", default=224, type=PIXELS, metavar="N",
         help="side of the training images in pixels")
    flag(group, "input_size", type=PIXELS, nargs=3, metavar=("C", "H", "W"),
         help="the same in another form: 3 N N")
    flag(group, "val_crop_size", type=PIXELS, metavar="N",
         help="side of the test images (default 224 | that of the training images)")
    flag(group, "val_resize_size", type=PIXELS, metavar="N",
         help="shorter side before this crop (default 256 | by --crop_pct)")
    flag(group, "crop_pct", type=SHARE, metavar="X",
         help="val_crop_size / val_resize_size, instead")
    flag(group, "interpolation", choices=("bilinear", "bicubic"), help="for test images")
    flag(group, "train_interpolation", choices=("bilinear", "bicubic", "random"),
         help="for training images")
    flag(group, "color_jitter", type=NOT_NEGATIVE, metavar="X",
         help="strength of colour jitter; off where --auto_augment is given")
    flag(group, "hflip", default=0.5, type=PROBABILITY, metavar="X",
         help="share of mirrored images")
    flag(group, "scale", default=[0.08, 1.0], nargs=2, type=PROBABILITY, metavar="X",
         help="least and largest share of an image's area in its crop")
    flag(group, "ratio", default=[3 / 4, 4 / 3], nargs=2, type=RATIO, metavar="X",
         help="least and largest width / height of a crop")


def add_machine_flags(flag, group):
    flag(group, "device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
         help="auto takes a GPU where there is one; under torchrun each process takes its own")
    flag(group, "amp", default=False, switch=True, help="autocast, in training and in testing; "
         "without, matrix products and convolutions on a GPU are in TF32 where it has that")
    flag(group, "amp_dtype", choices=("bfloat16", "float16"),
         help="of autocast: without, bfloat16 where the device has it; float16 as published for "
         "DeiT and Swin, with a GradScaler")
    flag(group, "channels_last", default=False, switch=True, help="NHWC memory format")
    flag(group, "compile", default=False, switch=True, help="torch.compile the model")
    flag(group, "sync_bn", default=False, switch=True,
         help="BatchNorm over the images of all GPUs; without, of each, and averaged for testing")
    flag(group, "workers", "-j", type=COUNT_OR_ZERO, metavar="N",
         help="processes per process that read images; without, its share of the CPU cores, at "
         "most 16")
    flag(group, "pin_mem", default=True, switch=True, help="page-locked memory for copies to a GPU")
    flag(group, "print_freq", "--log_interval", default=50, type=COUNT, metavar="N",
         help="steps between two looks at the loss")
    flag(group, "output_dir", "--output", type=user_path, metavar="DIR",
         help="folder of the run; without: runs/imagenet-MODEL-OPTIM/SEED. Its log.csv gives "
         "accuracies in per cent, the seconds of the training pass, data_wait, the share of it "
         "spent waiting for images, and peak_memory in MiB of the first GPU, or without one of the "
         "first process")
    flag(group, "resume", default=False, action="store_true",
         help="continue the run of the same command, or start it if it has not begun")
    flag(group, "test_only", default=False, switch=True,
         help="test the weights of --pretrained, or of the checkpoint in the run's folder")
    flag(group, "smoke", default=False, action="store_true",
         help="try everything for a few steps; other flags have no effect")


def family(model):
    return next(FAMILIES[name] for name in FAMILIES if model.startswith(name))


def resolve(args, ranks):
    """All that decides a run: flags as given, or as its model and its optimizer have them."""
    ours = family(args.model)
    config = dict(model=args.model, optim=args.optim, seed=args.seed)
    for name, default in (ours | RECIPES[ours["recipe"]][args.optim]).items():
        given = getattr(args, name, None)
        config[name] = default if given is None else given
    for name in ("clip_grad", "accum", "lr_min", "lr_step_size", "lr_gamma", "mixup", "cutmix",
                 "mixup_prob", "mixup_switch_prob", "drop", "model_ema", "auto_augment",
                 "random_erase", "hflip", "scale", "ratio", "amp", "channels_last", "compile",
                 "sync_bn", "pretrained"):
        config[name] = getattr(args, name)
    config["warmup_decay"] = None if args.warmup_lr is not None else config["warmup_decay"]
    config["warmup_lr"] = None if args.warmup_decay is not None else config["warmup_lr"]
    config["amp_dtype"] = amp_dtype(args, ranks.device) if args.amp else None
    repeats = args.ra_reps if args.ra_sampler else 1
    repeats = max(1, repeats if args.aug_repeats is None else args.aug_repeats)
    config["repeats"] = repeats if ranks.world > 1 else 1        # one rank would see copies alone
    size = args.input_size[1] if args.input_size else args.train_crop_size
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


def check(args, config):
    """What is wrong with a command beyond single values, before anything is loaded."""
    optimizer_class(args.optim)
    timm = config["recipe"] == "timm"
    if args.data_dir is None and not args.dummy:
        raise UsageError("--data_dir DIR is to name the folder that holds train and val; without "
                         "data, --dummy trains on random images")
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
    for name in ("scale", "ratio"):
        least, largest = config[name]
        if least > largest:
            raise UsageError(f"--{name} {least} {largest}: the smaller number is to come first")
    if args.amp_dtype and not args.amp:
        raise UsageError("--amp_dtype is to be given together with --amp")
    if config["world"] == 1 and (args.ra_sampler or (args.aug_repeats or 0) > 1):
        tell("note: one process alone takes each image once, without repeated augmentation")
    taken = RECIPES[config["recipe"]][args.optim]
    unused = {name for recipe in RECIPES["timm"].values() for name in recipe
              if getattr(args, name) is not None} - set(taken)
    if unused:
        tell("note: no use for", *(f"--{name}" for name in sorted(unused)), "in", args.optim)


def tell(*words):
    """A line on the error output, of the first rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, file=sys.stderr, flush=True)


def run_folder(args):
    folder = Path("runs", f"imagenet-{args.model}-{args.optim}", str(args.seed))
    folder = folder if args.output_dir is None else Path(args.output_dir)
    check_folder(folder, args.resume or args.test_only)
    return folder


# ---------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------

class Ranks(NamedTuple):
    """This process among those of the run."""
    rank: int
    world: int
    device: torch.device
    group: Any = None            # of gloo, also beside NCCL: for what the hosts tell each other


def start_ranks(args):
    """Join the other processes if torchrun, or another launcher with its variables, began this."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default
                          in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = args.device if args.device != "auto" else next(d for d in there if there[d])
    if not there[kind]:
        raise UsageError(f"--device {kind}: PyTorch finds none here; --device cpu works")
    if kind == "mps" and world > 1:
        raise UsageError(f"{world} processes cannot share this GPU: use one, or --device cpu")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise UsageError(f"torchrun started more processes than the {torch.cuda.device_count()} "
                         "GPUs here: give it --nproc_per_node of at most that")
    if args.sync_bn and kind != "cuda":
        raise UsageError("--sync_bn needs GPUs")
    if args.compile and kind == "cpu" and not os.environ.get("CXX") \
            and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler on the CPU, and none was found")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.test_only
        torch.set_float32_matmul_precision("high")       # statistics are exempt, see mac.py
    if world == 1:
        return Ranks(rank, world, device)
    nccl = kind == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if nccl else "gloo")
    return Ranks(rank, world, device, dist.new_group(backend="gloo"))


def gather(ranks, value):
    """[value of rank 0, value of rank 1, ...] on every rank, of anything that pickle takes."""
    values = [value] * ranks.world
    if ranks.group is not None:
        dist.all_gather_object(values, value, group=ranks.group)
    return values


def together(ranks, work):
    """What work() returns; if it fails on any rank, the same UsageError on all of them.

    A rank that fails waits here for the others, so nothing in work() may wait for another rank.
    """
    result = problem = None
    try:
        result = work()
    except (UsageError, datasets.DataError, OSError) as error:
        problem = str(error)
    problem = next(filter(None, gather(ranks, problem)), None)
    if problem is not None:
        raise UsageError(problem)
    return result


def agree(ranks, facts):
    """Raise UsageError on all ranks unless the facts, a dict, are the same on all of them.

    With other counts of images they would take other numbers of steps, and wait for ever.
    """
    first, *others = gather(ranks, facts)
    for rank, other in enumerate(others, 1):
        differ = [f"{name} ({first[name]} on rank 0, {other[name]} on rank {rank})"
                  for name in first if first[name] != other[name]]
        if differ:
            raise UsageError(f"the processes differ in {', '.join(differ)}: give all of them the "
                             "same command and the same images")


class Stop:
    """SIGTERM and SIGINT. Within `with stop:` they are noted, elsewhere they end the program.

    agreed() makes all ranks learn of a signal to any of them at the same step. The ranks' answers
    of one step are summed up while the next one runs, so nobody waits for them.
    """

    def __init__(self):
        self.number, self.noting, self.group, self.vote = 0, False, None, None

    def __call__(self, number, frame):
        self.number = number
        if not self.noting:
            raise KeyboardInterrupt(number, "")

    def __enter__(self):
        self.noting = True

    def __exit__(self, kind, *_):
        self.noting = False
        if self.number and kind is None:
            raise KeyboardInterrupt(self.number, "")

    def agreed(self, last=False):
        """A signal's number, or 0; for all ranks the same. last: also those that come just now."""
        if self.group is None:
            return self.number
        number = self.count()
        if not number:
            self.ballot = torch.tensor(self.number)
            self.vote = dist.all_reduce(self.ballot, dist.ReduceOp.MAX, self.group, async_op=True)
        return self.count() if last and not number else number

    def count(self):
        vote, self.vote = self.vote, None
        if vote is None:
            return 0
        vote.wait()
        return int(self.ballot)


def average_buffers(model, world):
    """Give all ranks the mean of their BatchNorm statistics; in float64 equal ones stay equal."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    dist.all_reduce(flat)
    for buffer, mean in zip(buffers, (flat / world).split([buffer.numel() for buffer in buffers])):
        buffer.copy_(mean.view_as(buffer))


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate, moving average
# ---------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What this rank trains with. step_model is what a training step calls: DDP's, compiled."""
    config: dict
    ranks: Ranks
    stop: Stop
    train: Any                   # loaders; train is None under --test_only
    test: Any
    finish: Any
    model: nn.Module
    step_model: nn.Module
    ddp: Any                     # None in a single process
    ema: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    print_freq: int


def learning_rate(config, epoch):
    """The rate of an epoch, counted from 0: a function of nothing else."""
    lr, warmup, low = config["lr"], config["warmup"], config["lr_min"]
    if epoch < warmup:
        first = config["warmup_lr"]
        first = lr * config["warmup_decay"] if first is None else first
        return first + (config["warmup_method"] == "linear") * (lr - first) * epoch / warmup
    if config["schedule"] == "cosine":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * epoch / config["epoch"]))
    epoch, epochs = epoch - warmup, config["epoch"] - warmup
    if config["schedule"] == "cosineannealinglr":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if config["schedule"] == "steplr":
        return lr * config["lr_gamma"] ** (epoch // config["lr_step_size"])
    return lr


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
        weight *= config["global_batch"] * config["model_ema_steps"] / config["epoch"]
    return min(1.0, weight)


class EMA:
    """A moving average of a model's parameters and buffers; integer buffers are copied."""

    def __init__(self, model, config, world):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.config, self.world, self.weight, self.updates = config, world, ema_weight(config), 0

    @torch.no_grad()
    def update(self, model, epoch, step):
        """After step `step` of an epoch.

        The ResNets' first update is a copy, as all are in their warm-up; the others' average holds
        the initial weights as well.
        """
        if step % self.config["model_ema_steps"]:
            return
        average_buffers(model, self.world)     # so the averages agree too, and survive on one rank
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
    if config["sync_bn"]:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def make_optimizer(model, config, scaler):
    optim = config["optim"]
    flags = {name: config[name] for name in RECIPES[config["recipe"]][optim] if name != "calibrate"}
    if optim == "nysact":
        flags["seed"] = config["seed"]         # its sketch is drawn at random
    if optim in ("kfac", "adafisher", "adafisherw") and scaler.is_enabled():
        flags["grad_scaler"] = scaler
    groups = parameter_groups(model, config)
    try:
        if optim in FILES:
            return optimizer_class(optim)(model, params=groups, **flags)
        return optimizer_class(optim)(groups, **flags)
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def build(config, ranks, stop, train, test, finish, print_freq=50):
    """Model, moving average and optimizer, which hooks the model before it is wrapped."""
    model = make_model(config, ranks.device)
    ema = EMA(model, config, ranks.world) if config["model_ema"] else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config["amp_dtype"] == "float16")
    optimizer = make_optimizer(model, config, scaler)
    stop.group = ranks.group
    return Run(config, ranks, stop, train, test, finish, model, model, None, ema, optimizer,
               scaler, print_freq)


def wrap(run):
    """The run with its model in DDP, which waits for all ranks, and compiled."""
    step_model, ddp, device = run.model, None, run.ranks.device
    if run.ranks.world > 1:
        devices = [device] if device.type == "cuda" else None
        step_model = ddp = nn.parallel.DistributedDataParallel(run.model, device_ids=devices)
    if run.config["compile"]:
        step_model = torch.compile(step_model)
    return run._replace(step_model=step_model, ddp=ddp)


def logits_of(run, model, x):
    """model(x) in float32, under autocast if the run has it."""
    if run.config["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
    dtype = getattr(torch, run.config["amp_dtype"] or "float32")
    with torch.autocast(run.ranks.device.type, dtype, enabled=run.config["amp"]):
        return model(x).float()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def seed_of(*numbers):
    """A seed from (seed, epoch, ...), so that no generator's state need ever be saved."""
    return int(seed_sequence(*numbers).generate_state(1, np.uint64)[0])


def train_step(run, batches, epoch, step):
    """One update from micro-batches: (Σ loss, Σ correct, images) of this rank, on the device."""
    config, ranks = run.config, run.ranks
    images = sum(len(labels) for _, labels in batches)
    torch.manual_seed(seed_of(config["seed"], epoch, step, ranks.rank))       # dropout, drop_path
    sums = torch.zeros(3, device=ranks.device)
    run.optimizer.zero_grad()
    call = run.step_model
    if getattr(run.optimizer, "collecting", False):     # its hooks would break a compiled graph
        call = run.model if run.ddp is None else run.ddp
    for i, (x, labels) in enumerate(batches):
        x, labels = (t.to(ranks.device, non_blocking=True) for t in (x, labels))
        batch = step * config["accum"] + i
        x, target = run.finish(x, labels, (config["seed"], epoch, ranks.rank, batch))
        alone = run.ddp is not None and i + 1 < len(batches)     # the last one's are averaged
        with run.ddp.no_sync() if alone else contextlib.nullcontext():
            logits = logits_of(run, call, x)
            loss = run.finish.loss(logits, target)
            if config.get("fisher") == "sampled":
                run.optimizer.sample_fisher(logits)
            run.scaler.scale(loss * (len(x) / images)).backward()
        with torch.no_grad():
            hits = logits.argmax(1) == (target if target.dim() == 1 else target.argmax(1))
            sums += torch.stack([loss * len(x), hits.sum(), torch.full_like(loss, len(x))])
    if config["clip_grad"]:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config["clip_grad"])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema is not None:
        run.ema.update(run.model, epoch, step)
    return sums


class Progress:
    """What is known of a running epoch: its steps so far, this rank's sums, and the time."""

    def __init__(self, run, saved=None):
        self.step, self.seconds, self.waited = 0, 0.0, 0.0
        double = torch.float32 if run.ranks.device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=double, device=run.ranks.device)
        if saved is not None:
            self.step, self.seconds, self.waited, sums = saved
            rank, sums = run.ranks.rank, torch.tensor(sums, dtype=torch.float64)
            if len(sums) != run.ranks.world:   # other ranks than then: the first takes it all
                sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, run.ranks.world - 1))
            self.sums.copy_(sums[rank])

    def saved(self, run):
        """For a checkpoint, with the sums of all ranks."""
        return self.step, self.seconds, self.waited, gather(run.ranks, self.sums.tolist())

    def means(self, run):
        """Over all ranks: loss, accuracy in per cent, images. Makes the hosts wait for the GPUs."""
        total = self.sums.clone()
        if run.ranks.world > 1:
            dist.all_reduce(total)
        loss, hits, images = total.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError("the training loss is not finite")
        return loss / images, 100 * hits / images, int(images)


def train_epoch(run, epoch, progress):
    """Go on with an epoch from where progress stands; the number of the signal that stopped it."""
    config = run.config
    steps = -(-len(run.train) // config["accum"])
    run.model.train()
    run.train.set_epoch(epoch, progress.step * config["accum"])
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    text = f"epoch {epoch + 1}/{config['epoch']}"
    bar = tqdm(desc=text, total=steps, initial=progress.step, leave=False,
               disable=run.ranks.rank > 0 or None, dynamic_ncols=True)
    batches, told, before = iter(run.train), 0, progress.seconds
    start = time.perf_counter()
    while progress.step < steps and not told:
        waiting = time.perf_counter()
        micro = list(itertools.islice(batches, config["accum"]))
        progress.waited += time.perf_counter() - waiting
        progress.sums += train_step(run, micro, epoch, progress.step)
        progress.step += 1
        bar.update()
        if progress.step % run.print_freq == 0 or progress.step == steps:
            means = progress.means(run)
            progress.seconds = before + time.perf_counter() - start
            show(bar, text, progress, steps, means)
        told = run.stop.agreed()
    bar.close()
    told = told or run.stop.agreed(last=True)
    progress.means(run)
    progress.seconds = before + time.perf_counter() - start
    if progress.step >= steps:
        average_buffers(run.model, run.ranks.world)
    return told


def show(bar, text, progress, steps, means):
    """Loss and speed behind the bar, or as a line where the output is no terminal."""
    loss, acc, images = means
    speed, wait = images / progress.seconds, progress.waited / progress.seconds
    bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s, {wait:.0%} waiting for data")
    if bar.disable and progress.step < steps:
        print(f"{text}  step {progress.step}/{steps}  loss {loss:.4f}  {acc:.2f} %  "
              f"{speed:.0f} images/s, {wait:.0%} waiting for data", flush=True)


@torch.no_grad()
def evaluate(run, model, text):
    """(loss, top-1, top-5 in per cent) over the whole test set, each image counted once.

    Ranks take images r, r + W, ... and meet in one sum at the end, so shards may differ, or be
    empty. The model is not DDP's, and its buffers agree already.
    """
    model.eval()
    device, classes = run.ranks.device, run.finish.num_classes
    double = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros(4, dtype=double, device=device)
    run.test.set_epoch(0)
    for x, labels in tqdm(run.test, text, leave=False, disable=run.ranks.rank > 0 or None):
        x, labels = (t.to(device, non_blocking=True) for t in (x, labels))
        logits = logits_of(run, model, run.finish.eval(x))
        hits = logits.topk(min(5, classes)).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(x))])
    if run.ranks.world > 1:
        dist.all_reduce(total)
    loss, top1, top5, images = total.tolist()
    if images != run.test.count:
        raise RuntimeError(f"{images:.0f} test images were counted, not {run.test.count}")
    return loss / images, 100 * top1 / images, 100 * top5 / images


def train(run, folder, rows, progress):
    """Epoch after epoch, with a checkpoint after training, and one after testing: the log's rows.

    What stops a run between the two costs no training: --resume begins with the test.
    """
    config, ranks, checkpoint = run.config, run.ranks, folder / "checkpoint.pt"
    for epoch in range(len(rows), config["epoch"]):
        try:
            with run.stop:
                progress = progress or Progress(run)
                told = train_epoch(run, epoch, progress)
                if not all(p.isfinite().all() for p in run.model.parameters()):
                    raise FloatingPointError("a weight is not finite")
                save_checkpoint(checkpoint, run, rows, progress.saved(run))
                if told:
                    where = f" in epoch {epoch + 1} after step {progress.step}"
                    raise KeyboardInterrupt(told, where)
        except FloatingPointError as error:
            raise Diverged(f"training diverged in epoch {epoch + 1} ({error}): try a smaller --lr, "
                           f"a longer --warmup or more --damping; {folder} keeps what was before")
        loss, acc, images = progress.means(run)
        row = dict.fromkeys(COLUMNS)
        row.update(epoch=epoch + 1, lr=learning_rate(config, epoch), train_loss=loss, train_acc=acc,
                   seconds=round(progress.seconds, 3), peak_memory=round(peak_memory(ranks.device)),
                   images_per_second=round(images / progress.seconds, 1),
                   data_wait=round(progress.waited / progress.seconds, 4))
        row["test_loss"], row["test_acc"], row["test_top5"] = evaluate(run, run.model, "test")
        if run.ema is not None:
            row["ema_loss"], row["ema_acc"], row["ema_top5"] = evaluate(run, run.ema.model, "ema")
        rows.append(row)
        progress = None
        save_checkpoint(checkpoint, run, rows, None)
        if ranks.rank == 0:
            write_log(folder, rows)
            print(epoch_line(row, config), flush=True)
    return rows


def epoch_line(row, config):
    ema = "" if row["ema_acc"] is None else f"  ema {row['ema_acc']:.2f} %"
    return (f"epoch {row['epoch']:3d}/{config['epoch']}  lr {row['lr']:<8.3g} "
            f"train {row['train_loss']:7.4f} {row['train_acc']:6.2f} %  "
            f"test {row['test_loss']:7.4f} {row['test_acc']:6.2f} % (top-5 "
            f"{row['test_top5']:.2f}){ema}  {row['seconds']:.1f} s, "
            f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting for data")


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_log(folder, rows):
    def text(name, value):
        return "" if value is None else str(value) if name == "epoch" else f"{value:.9g}"
    lines = [",".join(COLUMNS)] + [",".join(text(c, row[c]) for c in COLUMNS) for row in rows]
    write_file(folder / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def save_checkpoint(path, run, rows, partial):
    """Written by the first rank; nobody goes on, or ends, before it is there.

    rows: of the finished epochs; partial: of the one that runs, see Progress.saved. Parameters,
    statistics and what evaluation uses are the same on all ranks. The BatchNorm statistics of an
    unfinished epoch are not, but there DDP goes on with the first rank's in any case.
    """
    if run.ranks.rank == 0:
        ema = run.ema and dict(model=run.ema.model.state_dict(), updates=run.ema.updates)
        content = dict(config=run.config, epoch=len(rows), log=rows, partial=partial,
                       model=run.model.state_dict(), ema=ema, optimizer=run.optimizer.state_dict(),
                       scaler=run.scaler.state_dict())
        write_file(path, lambda file: torch.save(content, file))
    if run.ranks.group is not None:
        dist.barrier(run.ranks.group)


def read_checkpoint(path):
    try:
        damaged = zipfile.ZipFile(path).testzip()      # checks what torch.load does not: the CRCs
        if damaged:
            raise zipfile.BadZipFile(damaged)
        saved = torch.load(path, map_location="cpu")
        for name in ("config", "log", "partial", "model", "ema", "optimizer", "scaler"):
            saved[name]
        return dict(saved, config=dict(saved["config"]), log=list(saved["log"]))
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read, it is damaged or not a checkpoint of this script "
                         f"({type(error).__name__}); move it away to start this run anew")


def load_checkpoint(path, run):
    """Put a checkpoint into the run; the rows of its log, and the Progress of a running epoch."""
    saved, config = read_checkpoint(path), run.config
    differ = [f"--{name} (was {saved['config'].get(name)}, now {config.get(name)})"
              for name in {**saved["config"], **config} if name not in MACHINE
              and saved["config"].get(name) != config.get(name)]
    if differ:
        raise UsageError(f"{path} belongs to another configuration, {', '.join(differ)}: repeat "
                         "its own flags to continue it, or name another folder with --output_dir")
    try:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
        if run.ema is not None:
            run.ema.model.load_state_dict(saved["ema"]["model"])
            run.ema.updates = saved["ema"]["updates"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} does not fit this version of {config['model']} and "
                         f"{config['optim']} ({str(error).splitlines()[0]})")
    return saved["log"], saved["partial"] and Progress(run, saved["partial"])


# ---------------------------------------------------------------------------------------------
# From the command to the record
# ---------------------------------------------------------------------------------------------

def open_sources(args, config):
    """(training images, test images); the former None under --test_only."""
    if args.dummy:
        training, test = (datasets.DummyImages(count, config["val_resize_size"], 1000, seed)
                          for seed, count in enumerate((args.dummy, max(1, args.dummy // 4))))
    else:
        training = None if args.test_only else datasets.open_images(args.data_dir, "train")
        classes = None if training is None else training.classes
        test = datasets.open_images(args.data_dir, "val", classes)
    if args.train_size and training is not None:
        training = datasets.FewerImages(training, args.train_size)
    return training, test


def open_loaders(args, config, ranks, training, test):
    """(training loader or None, test loader)"""
    workers = args.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
            else os.cpu_count() or 1
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # timm's names of the options are this script's, but for the policy's
    options = {name: config[name] for name in ("scale", "ratio", "hflip", "color_jitter")}
    transform = train_transform(
        config["recipe"], config["train_crop_size"], config["train_interpolation"],
        config["auto_augment"], **options)
    same = dict(seed=config["seed"], rank=ranks.rank, world=ranks.world, workers=workers,
                recipe=config["recipe"], pin_memory=args.pin_mem and ranks.device.type == "cuda")
    train = None if training is None else datasets.ImageLoader(
        training, transform, config["batch_size"], train=True, repeats=config["repeats"], **same)
    transform = eval_transform(config["val_resize_size"], config["val_crop_size"],
                                        config["interpolation"])
    return train, datasets.ImageLoader(test, transform, config["batch_size"], train=False, **same)


def check_last_batch(config, train):
    """Refuse what BatchNorm cannot normalise in training: one image, whose last map is 1 × 1."""
    small = config["recipe"] == "torchvision" and config["train_crop_size"] <= 32
    if small and train is not None and len(train.plan[-1][0]) == 1:
        raise UsageError(f"--batch_size {config['batch_size']} leaves one image for the last batch "
                         f"of a process, and BatchNorm needs two where {config['model']} is given "
                         f"{config['train_crop_size']} pixels: choose another batch size")


def prepare(args, ranks, stop):
    """Everything that can be wrong with a command: the Run, its folder, its log, its Progress."""
    config = resolve(args, ranks)
    check(args, config)
    folder = run_folder(args)
    training, test = open_sources(args, config)
    config.update(train_size=None if training is None else len(training),
                  classes=len(test.classes))
    finish = Finish(
        MEAN, STD, len(test.classes), recipe=config["recipe"], erase_prob=config["random_erase"],
        erase_mode=config["remode"], mixup_alpha=config["mixup"], cutmix_alpha=config["cutmix"],
        mixup_prob=config["mixup_prob"], switch_prob=config["mixup_switch_prob"],
        smoothing=config["label_smoothing"])
    loaders = open_loaders(args, config, ranks, training, test)
    check_last_batch(config, loaders[0])
    if ranks.rank == 0:
        for source, split in ((training, "training"), (test, "test")):
            if source is not None:
                print(f"{len(source)} {split} images of {len(source.classes)} classes: "
                      f"{source.where}")
        print(f"{ranks.world} process{'es' if ranks.world > 1 else ''}, "
              f"{config['global_batch']} images a step")
    return build(config, ranks, stop, *loaders, finish, args.print_freq), folder


def begin(run, folder, args, command):
    """Restore what the folder holds, or make it: the rows of the log and the epoch's Progress."""
    checkpoint = folder / "checkpoint.pt"
    there = gather(run.ranks, os.path.exists(checkpoint))
    if len(set(there)) > 1:
        raise UsageError(f"{checkpoint} is there for some processes only: --output_dir is to be in "
                         "a place that all machines share")
    return together(run.ranks, lambda: restore(run, folder, there[0], args.resume, command))


def restore(run, folder, there, resume, command):
    """What begin does on its rank. there: whether there is a checkpoint."""
    rows, progress = [], None
    if there:
        rows, progress = load_checkpoint(folder / "checkpoint.pt", run)
    elif run.ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        facts = dict(run.config, device=str(run.ranks.device), torch=torch.__version__,
                     command=command, optimizer=repr(run.optimizer).splitlines())
        facts = json.dumps(facts, indent=1, ensure_ascii=False).encode()
        write_file(folder / "config.json", lambda file: file.write(facts))
    if run.ranks.rank == 0 and there:
        write_log(folder, rows)
        print(f"resumed after epoch {len(rows)} of {run.config['epoch']}"
              + (f" and {progress.step} steps" if progress else ""), flush=True)
    elif run.ranks.rank == 0 and resume:
        print(f"--resume: no checkpoint in {folder}, so this run starts anew", flush=True)
    return rows, progress


def calibrate(run):
    """MAC's first layer: its covariance over one epoch of training images as the network sees them.

    On the batches of epoch 0 with other draws for mixing and erasing than the training's.
    """
    def inputs():
        run.train.set_epoch(0)
        for i, (x, labels) in enumerate(tqdm(run.train, "calibrate", leave=False,
                                             disable=run.ranks.rank > 0 or None)):
            x, labels = x.to(run.ranks.device), labels.to(run.ranks.device)
            seed = run.config["seed"], run.config["epoch"], run.ranks.rank, i
            yield run.finish(x, labels, seed)[0]
    run.optimizer.calibrate(inputs())


def load_weights(run, folder):
    """Put the folder's checkpoint into the model; its moving average as another one, or None."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise UsageError(f"--test_only: there is no checkpoint in {folder}; name its folder with "
                         "--output_dir, or weights with --pretrained")
    saved, ema = read_checkpoint(path), None
    try:
        run.model.load_state_dict(saved["model"])
        if saved["ema"]:
            ema = copy.deepcopy(run.model)
            ema.load_state_dict(saved["ema"]["model"])
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit {run.config['model']} with "
                         f"{run.config['classes']} classes ({str(error).splitlines()[0]})")
    return ema


def test_only(run, folder):
    """Accuracy of --pretrained, or of the checkpoint in the folder and its moving average."""
    results, ema = {}, None
    if not run.config["pretrained"]:
        ema = together(run.ranks, lambda: load_weights(run, folder))
    if ema is not None:
        results.update(zip(("ema_loss", "ema_acc", "ema_top5"), evaluate(run, ema, "ema")))
    results.update(zip(("test_loss", "test_acc", "test_top5"), evaluate(run, run.model, "test")))
    return results


def launch(args, argv, stop):
    """The whole command on this rank."""
    ranks = start_ranks(args)
    run, folder = together(ranks, lambda: prepare(args, ranks, stop))
    agree(ranks, dict(run.config, test_size=run.test.count))
    command = shlex.join(["train_imagenet.py", *argv])
    if args.test_only:
        results = test_only(run, folder)
    else:
        if ranks.rank == 0:
            describe(run.model, run.optimizer, run.config, ranks.device)
        run = wrap(run)
        rows, progress = begin(run, folder, args, command)
        if run.config.get("calibrate") and not rows and not progress:
            calibrate(run)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results = train(run, folder, rows, progress)[-1]
        results["state_bytes"] = state_bytes(run.optimizer)
    if ranks.rank == 0:
        print(json.dumps(dict(model=args.model, optim=args.optim, device=str(ranks.device),
                              processes=ranks.world, torch=torch.__version__, **results,
                              output_dir=str(folder))), flush=True)
    if ranks.group is not None:
        dist.destroy_process_group()


def smoke(stop):
    """Every optimizer for some steps, amp, accumulation, EMA, and a run resumed in mid-epoch."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        def go(folder, flags):
            argv = ("--dummy 8 --train_crop_size 32 --val_crop_size 32 --val_resize_size 32 "
                    "--batch_size 4 --workers 0 --device cpu").split()
            argv += ["--output_dir", str(Path(root, folder)), *flags.split()]
            launch(parse(argv), argv, stop)

        for optim in RECIPES["timm"]:
            go(f"deit-{optim}", f"--model deit_tiny_patch16_224 --epochs 1 --opt {optim} --amp")
        for optim in ("sgd", "mac", "nysact"):
            go(f"resnet-{optim}", f"--model resnet18 --epochs 1 --opt {optim} --accum 2 "
               "--model-ema --mixup 0.2 --cutmix 1 --random-erase 0.5 --norm-weight-decay 0")
        twice = "--model deit_tiny_patch16_224 --epochs 2 --warmup 1 --model-ema --drop-path 0.2"
        go("straight", twice)
        stop.number = signal.SIGTERM           # as if it came in the first step
        with contextlib.suppress(KeyboardInterrupt):
            go("resumed", twice)
        stop.number = 0
        go("resumed", f"{twice} --resume")
        a, b = (Path(root, folder, "log.csv").read_text().splitlines()
                for folder in ("straight", "resumed"))
        if [line.split(",")[:6] for line in a] != [line.split(",")[:6] for line in b]:
            raise Diverged("a resumed run differs from the uninterrupted one")
    return f"smoke test passed: {' '.join(RECIPES['timm'])}, {time.perf_counter() - start:.0f} s"


def main(argv):
    """Run the command on this rank; its exit status. Only the first rank speaks, but for errors
    that the others cannot know of."""
    rank = int(os.environ.get("RANK", 0))
    stop = Stop()
    print_anything()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings(), \
                contextlib.redirect_stdout(nowhere) if rank else contextlib.nullcontext():
            if rank:
                warnings.simplefilter("ignore")
            args = parse(argv)
            if args.smoke:
                with contextlib.redirect_stdout(io.StringIO()):
                    summary = smoke(stop)
                print(summary)
            else:
                try:
                    launch(args, argv, stop)
                except RuntimeError as error:
                    datasets.check_workers(error)
                    raise
        return 0
    except KeyboardInterrupt as interrupt:
        number, where = interrupt.args
        tell(f"\nstopped{where}; the same command with --resume continues from the last checkpoint")
        return 128 + number
    except (UsageError, Diverged) as error:            # of all ranks: the first one says it
        tell(f"train_imagenet.py: {error}")
        if rank:                 # torchrun ends all ranks when one ends, and the first is to speak
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            time.sleep(10)
        return 1 if isinstance(error, Diverged) else 2
    except (datasets.DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"train_imagenet.py: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else 2
    except RuntimeError as error:
        if "RANK" not in os.environ or "onnection" not in str(error):
            raise
        tell("train_imagenet.py: another process of this run has ended, which is why this one does")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
