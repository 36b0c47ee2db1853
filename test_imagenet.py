"""train_imagenet.py: its flags, its arithmetic, its ranks; see test_run.py for what scripts share.

Images are random and tiny, so accuracies mean nothing. What takes several ranks runs in three
processes that are started once; a single check pays for torchrun.
"""
import datetime
import functools
import gc
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import time
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import images
import models
import run
import train_imagenet
from ranks import Ranks, Stop, UsageError
from test_run import (call, checkpoint, free_ports, read_log, record, refused,  # noqa: F401
                      same_runs, start_processes)
from testing import close

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None,
                                  reason="Pillow is not installed (pip install pillow)")
RESNET_LINE = (
    "--data-path /data/imagenet --model resnet50 --batch-size 256 --print-freq 1000 --opt mac "
    "--lr 0.5 --damping 1.0 --weight-decay 0.00002 --lr-scheduler cosineannealinglr "
    "--lr-warmup-epochs 5 --lr-warmup-method linear --auto-augment ta_wide --epochs 100 "
    "--model-ema --random-erase 0.1 --norm-weight-decay 0.0 --label-smoothing 0.1 "
    "--mixup-alpha 0.2 --cutmix-alpha 1.0 --train-crop-size 176 --val-resize-size 232 "
    "--ra-sampler --ra-reps 4 --output-dir ./outputs")
DEIT_LINE = (
    "--model deit_small_patch16_224 --sched cosine --epochs 100 --opt mac --lr 0.5 --damping 3.0 "
    "--tcov 5 --tinv 5 --stat_decay 0.99 --weight-decay 0.0001 --workers 16 --warmup-epochs 5 "
    "--warmup-lr 0.05 --min-lr 0.0 --batch-size 256 --aug-repeats 3 --aa rand-m9-mstd0.5-inc1 "
    "--smoothing 0.1 --remode pixel --reprob 0.25 --drop 0.0 --drop-path 0.0 --mixup 0.8 "
    "--cutmix 1.0 --data-dir /data/imagenet --pin-mem True --amp --log-interval 1000")

# Two networks of a size for tests, one without BatchNorm and one with it.
TINY = {
    "deit_test": lambda num_classes, image_size, drop, drop_path: models.VisionTransformer(
        image_size, 8, 16, 2, 2, num_classes, 3, drop, drop_path),
    "resnet_test": lambda num_classes, image_size, drop, drop_path: models.ResNet(
        models.BasicBlock, (1, 1, 1, 1), (8, 8, 8, 8), num_classes, 3, large_images=True),
}
train_imagenet.IMAGENET_MODELS.update(TINY)
# Global batches of 12 images on up to three ranks; mixing, erasing and dropout are off.
SMALL = ("train_imagenet.py --model deit_test --dummy 36 --img-size 16 --crop-pct 1 --epochs 2 "
         "--warmup 0 --tcov 2 --tinv 2 --lr 0.05 --workers 0 --device cpu")



def parse(flags):
    return train_imagenet.parse(shlex.split(flags.removeprefix("train_imagenet.py")))


def config_of(flags, world=1):
    return train_imagenet.resolve(parse(flags), Ranks(world=world))


@functools.lru_cache
def start_weights():
    config = dict(config_of(SMALL), classes=1000)
    model = train_imagenet.make_model(config, torch.device("cpu"))
    return {name: p.detach().double() for name, p in model.named_parameters()}


def moved(folder):
    """By how much each parameter of a run of the tests' DeiT has moved."""
    return {name: p.double() - start_weights()[name]
            for name, p in checkpoint(folder)["model"].items()}


def same_moves(got, want, tol):
    """All parameters' moves, each relative to its own largest."""
    assert got.keys() == want.keys()
    scale = {name: move.abs().max() if move.any() else 1.0 for name, move in want.items()}
    got, want = (torch.cat([(moves[name] / scale[name]).flatten() for name in scale])
                 for moves in (got, want))
    close(got, want, tol)


# ---------------------------------------------------------------------------------------------
# Flags and arithmetic
# ---------------------------------------------------------------------------------------------

def test_published_lines_parse():
    config = config_of(RESNET_LINE, world=4)
    want = dict(recipe="torchvision", model="resnet50", optim="mac", batch_size=256, lr=0.5,
                damping=1.0, weight_decay=2e-5, norm_weight_decay=0.0, momentum=0.9, tcov=5,
                tinv=50, stat_decay=0.95, decoupled_weight_decay=True, schedule="cosineannealinglr",
                warmup=5, warmup_method="linear", warmup_decay=0.01, warmup_lr=None, epochs=100,
                auto_augment="ta_wide", model_ema=True, model_ema_steps=32, random_erase=0.1,
                remode="const", label_smoothing=0.1, mixup=0.2, cutmix=1.0, train_crop_size=176,
                val_resize_size=232, val_crop_size=224, repeats=4, amp=False,
                interpolation="bilinear", global_batch=1024)
    assert want.items() <= config.items(), set(want.items()) ^ set(want.items() & config.items())
    config = config_of(DEIT_LINE, world=4)
    want = dict(recipe="timm", model="deit_small_patch16_224", optim="mac", schedule="cosine",
                epochs=100, lr=0.5, damping=3.0, tcov=5, tinv=5, stat_decay=0.99, weight_decay=1e-4,
                norm_weight_decay=0.0, warmup=5, warmup_lr=0.05, warmup_decay=None, lr_min=0.0,
                batch_size=256, repeats=3, auto_augment="rand-m9-mstd0.5-inc1", remode="pixel",
                label_smoothing=0.1, random_erase=0.25, drop=0.0, drop_path=0.0, mixup=0.8,
                cutmix=1.0, amp=True, amp_dtype="bfloat16", train_crop_size=224,
                val_resize_size=248, val_crop_size=224, interpolation="bicubic")
    assert want.items() <= config.items(), set(want.items()) ^ set(want.items() & config.items())
    args = parse(DEIT_LINE)
    assert args.pin_mem is True and args.workers == 16 and args.print_freq == 1000
    nysact = config_of(RESNET_LINE + " --opt nysact --rank_size 50")
    assert (nysact["rank"], nysact["sketch"], nysact["decoupled_weight_decay"]) == (
        50, "subcolumns", False)
    assert config_of(DEIT_LINE + " --model swin_tiny_patch4_window7_224")["drop_path"] == 0.0
    assert config_of("--model swin_tiny_patch4_window7_224")["drop_path"] == 0.1
    assert config_of("--model resnet101 --opt sgd")["nesterov"] is False
    assert config_of("--model deit_tiny_patch16_224 --opt sgd")["nesterov"] is True
    assert config_of("--epochs 3 --warmup 5")["epochs"] == 3


@pytest.mark.parametrize("group", [
    "--data-path x/--data-dir x/--data_dir x", "--opt sgd/--optim sgd/--opt SGD",
    "-b 7/--batch-size 7", "--run 7/--seed 7", "--epochs 7/--epoch 7", "--tinv 7/--update 7",
    "--rank 7/--rank_size 7/--rank-size 7", "--wd 0.5/--weight-decay 0.5",
    "--lr-scheduler constant/--sched Constant/--schedule constant",
    "--lr-warmup-epochs 2.5/--warmup-epochs 2.5/--warmup 2.5", "--lr-min 0.5/--min-lr 0.5",
    "--lr-warmup-decay 0.5/--warmup_decay 0.5", "--auto-augment ta_wide/--aa TA_wide",
    "--random-erase 0.5/--reprob 0.5", "--label-smoothing 0.5/--smoothing 0.5",
    "--mixup-alpha 0.5/--mixup 0.5", "--cutmix-alpha 0.5/--cutmix 0.5",
    "--train-crop-size 7/--img-size 7", "-j 7/--workers 7", "--output-dir x/--output x",
    "--print-freq 7/--log-interval 7", "--clip-grad-norm 7/--clip-grad 7",
    "--model-ema/--model_ema 1/--model-ema True", "--pin-mem no/--pin_mem=False"])
def test_aliases(group):
    default = vars(parse(""))
    parsed = [vars(parse(form)) | dict(command="") for form in group.split("/")]
    assert all(p == parsed[0] for p in parsed)
    changed = {name for name in default if parsed[0][name] != default[name]}
    assert len(changed) == 1, changed


@pytest.mark.parametrize("a, b", [
    ("--ra-sampler --ra-reps 4", "--aug-repeats 4"), ("--ra-sampler", "--aug-repeats 3"),
    ("--ra-reps 4", "--aug-repeats 0"), ("--input-size 3 160 160", "--img-size 160"),
    ("--clip-grad 0", ""), ("--model resnet18 --interpolation bicubic",
     "--model resnet18 --interpolation bicubic --train-interpolation bicubic")])
def test_same_in_other_words(a, b):
    deit = "--model deit_tiny_patch16_224 "
    assert config_of(deit + a, 2) == config_of(deit + b, 2)


RESNET = "--model resnet_test --val-resize-size 16 --val-crop-size 16"


@pytest.mark.parametrize("flags, words", {
    "--mixup -1": "--mixup", "--reprob 2": "--random_erase", "--sched x": "cosineannealinglr",
    "--pin-mem maybe": "maybe", "--mix 0.2": "--mix", "--pretrained": "nothing is downloaded",
    "--warmup-lr 1 --warmup-decay 0.5": "--warmup_lr", "--crop-pct 1e-320": "--crop_pct",
    "--val-resize-size 99999": "16384", "--ratio 1e-320 1": "--ratio",
    "--accum 99999999999999999999": "1e15", "--input-size 1 28 28": "3 N N",
    "--amp-dtype float16": "--amp", "--mixup 1 -b 3": "even number",
    "--val-crop-size 32": "--val_crop_size", "--sync-bn": "--sync_bn", "-b 16": "batch",
    "--pretrained nowhere.pt": "nowhere.pt cannot be read", "--pretrained=": "it is empty",
    "--test-only": "checkpoint",
    "--aa nonsense": "nonsense", "--model swin_tiny_patch4_window7_224 --img-size 40": "40",
    "--scale 1 0.5": "first", "--ratio 1.5 0.5": "--ratio", "--std 1 1 0": "--std",
    "--train-size 9": "only 8 training images", f"{RESNET} --dummy 9": "one image",
    "--std 58.395 57.12 57.375": "--std", "--scale 0 0": "--scale 0.0 0.0",
    "--lr-min 5 --lr 0.001": "--lr_min 5.0 is above",
    f"{RESNET} -b 1": "one image", "--ra-sampler --ra-reps 4 --aug-repeats 0": "--aug_repeats 0",
}.items())
def test_wrong_commands(tmp_path, flags, words):
    err = refused(f"{SMALL} --dummy 8 -b 4 {flags} --output-dir {tmp_path}/run")
    assert words in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["", "--amp-dtype float16"])
def test_float16_is_not_divided(monkeypatch, flags):
    """Given, or taken because the GPU has no bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: False)
    ranks, args = Ranks(torch.device("cuda"), world=2), parse(f"{SMALL} --fsdp --amp {flags}")
    with pytest.raises(UsageError, match="--fsdp does not go with --amp in float16"):
        train_imagenet.check(args, train_imagenet.resolve(args, ranks), ranks.device)


def test_no_data(tmp_path):
    assert "--dummy" in refused(f"train_imagenet.py --output-dir {tmp_path}/run")
    assert "/nowhere" in refused(
        f"train_imagenet.py --data-path /nowhere --output-dir {tmp_path}/run")
    assert "Unable to allocate" in refused(
        f"{SMALL} --dummy 1000000000000000 --output-dir {tmp_path}/run", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, name", {
    "--rank 3": "--rank", "--lr-gamma 0.5": "--lr_gamma", "--mixup-prob 0.5":
    "--mixup_prob", "--model-ema-decay 0.9": "--model_ema_decay", "--remode rand": "--remode",
    "--sched constant --min-lr 0.1": "--lr_min", "--warmup-lr 0.1": "--warmup_lr",
    "--data-path x": "--data_dir", "--input-size 3 16 16": "--train_crop_size",
    "--val-resize-size 20": "--crop_pct", "--ra-reps 4": "--ra_reps",
    "--mixup 1 --mixup-switch-prob 0.2": "--mixup_switch_prob",
}.items())
def test_flags_without_effect(tmp_path, flags, name):
    _, err = call(f"{SMALL} -b 12 --epochs 1 {flags} --output-dir {tmp_path}")
    assert err.startswith(f"note: no use for {name} in") and err.count("\n") == 1, err


def test_learning_rates():
    epochs = 0, 1, 2, 3, 4, 5, 6, 10, 25, 50, 75, 90, 95, 98, 99
    table = {RESNET_LINE: (0.005, 0.104, 0.203, 0.302, 0.401, 0.5, 0.49986331, 0.49659033,
                           0.44728513, 0.27064484, 0.08067961, 0.01354569, 0.00340967, 0.00054659,
                           0.00013669),
             DEIT_LINE: (0.05, 0.14, 0.23, 0.32, 0.41, 0.49692209, 0.49557181, 0.48776413,
                         0.42677670, 0.25, 0.07322330, 0.01223587, 0.00307791, 0.00049332,
                         0.00012336)}
    for line, rates in table.items():
        config = config_of(line)
        close([train_imagenet.learning_rate(config, e) for e in epochs], rates, 2e-8)
    # torch's own schedulers, chained as the reference script does
    for flags, make in {
        "--lr-scheduler cosineannealinglr --lr-min 0.01":
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 15, 0.01),
        "--lr-scheduler steplr --lr-step-size 4 --lr-gamma 0.3":
            lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.3),
    }.items():
        for method, kind in (("linear", torch.optim.lr_scheduler.LinearLR),
                             ("constant", torch.optim.lr_scheduler.ConstantLR)):
            config = config_of(f"{flags} --epochs 20 --lr 0.5 --warmup 5 --warmup-method {method}")
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
            with mock.patch("warnings.warn"):
                factor = {"start_factor" if method == "linear" else "factor": 0.01}
                chain = torch.optim.lr_scheduler.SequentialLR(optimizer, [
                    kind(optimizer, total_iters=5, **factor), make(optimizer)], milestones=[5])
                want = []
                for _ in range(20):
                    want.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    chain.step()
            ours = [train_imagenet.learning_rate(config, e) for e in range(20)]
            close(ours, want, 1e-12)


def test_decay_groups():
    sizes = {"resnet50": (55, 25_503_912, 106, 53_120),
             "resnet101": (106, 44_443_816, 208, 105_344),
             "deit_small_patch16_224": (50, 21_912_576, 102, 138_088),
             "swin_tiny_patch4_window7_224": (53, 28_199_424, 120, 88_930)}
    for name, want in sizes.items():
        config = config_of(f"--model {name} --weight-decay 0.3 --norm-weight-decay 0.0")
        with torch.device("meta"):
            model = models.IMAGENET_MODELS[name]()
        groups = train_imagenet.parameter_groups(model, config)
        got = tuple(n for group in groups for n in (
            len(group["params"]), sum(p.numel() for p in group["params"])))
        assert got == want, (name, got)
        assert groups[1]["weight_decay"] == 0.0 and "weight_decay" not in groups[0]
    config = config_of("--model resnet50 --opt sgd")       # no norm weight decay is given
    assert len(train_imagenet.parameter_groups(torch.nn.BatchNorm2d(3), config)) == 1


def test_moving_average():
    config = config_of(RESNET_LINE, world=4)
    close(train_imagenet.ema_weight(config), 0.0065536, 1e-9)      # of ResNet-50 as published
    updates = sum(step % config["model_ema_steps"] == 0 for step in range(1251))
    assert updates == 40, updates
    close(train_imagenet.ema_weight(config_of(DEIT_LINE)), 2e-4, 1e-9)
    config = dict(recipe="torchvision", warmup=1, model_ema_steps=2, model_ema_decay=0.9,
                  global_batch=2, epochs=1)                 # weight 0.1·2·2/1
    for recipe, weight in (("torchvision", 0.4), ("timm", 0.1)):
        net = torch.nn.BatchNorm1d(3).double()
        ema = train_imagenet.EMA(net, dict(config, recipe=recipe), Ranks())
        want = torch.stack([net.weight.detach(), net.running_var])
        for epoch in range(3):
            for step in range(5):
                with torch.no_grad():
                    net.weight.normal_()
                    net.running_var.uniform_()
                    net.num_batches_tracked += 1
                ema.update(net, epoch, step)
                if step % 2 == 0:
                    now = torch.stack([net.weight.detach(), net.running_var])
                    copies = recipe == "torchvision" and (epoch == 0 or (epoch, step) == (1, 0))
                    want = now if copies else (1 - weight) * want + weight * now
        # copies in a ResNet's warm-up, then the average, buffers too
        close(torch.stack([ema.model.weight, ema.model.running_var]), want, 1e-14)
        assert ema.model.num_batches_tracked == net.num_batches_tracked == 15


# ---------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------

def lr_of(optim):
    return 0.001 if optim.startswith("ada") else 0.02          # AdaFisher's own is small


@pytest.mark.parametrize("optim", ["mac", "kfac", "adafisher"])
def test_accumulation(tmp_path, optim):
    """Micro-batches equal one batch, be they of one size or not, and leave out as much."""
    for name, flags in (("parts", "-b 4 --accum 3"), ("whole", "-b 12")):
        call(f"{SMALL} --dummy 40 {flags} --opt {optim} --lr {lr_of(optim)} "
             f"--output-dir {tmp_path}/{name}")
    same_moves(moved(tmp_path / "parts"), moved(tmp_path / "whole"), 1e-4)
    x, labels = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8), torch.randint(1000, (12,))
    runs = []
    for sizes in [6, 4, 2], [12]:
        args = parse(f"{SMALL} -b 12 --opt {optim} --output-dir x")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            setup = train_imagenet.wrap(train_imagenet.prepare(args, Ranks(), Stop()))
        batches = list(zip(x.split(sizes), labels.split(sizes)))
        train_imagenet.train_step(setup, batches, 0, run.Progress(Ranks()))
        runs.append({name: p.detach().double() - start_weights()[name]
                     for name, p in setup.model.named_parameters()})
    same_moves(*runs, 1e-4)


@pytest.mark.parametrize("optim", ["mac", "kfac"])
def test_float16_and_clipping(tmp_path, optim):
    """The GradScaler's first scale overflows, is halved, and steps follow; bf16 has no scaler."""
    losses = {}
    for name, flags in dict(plain="", bf16="--amp", fp16="--amp --amp-dtype float16").items():
        out, _ = call(f"{SMALL} -b 12 --opt {optim} {flags} --clip-grad 1 --epochs 3 "
                      f"--output-dir {tmp_path}/{name}")
        losses[name] = record(out)["train_loss"]
        assert bool(checkpoint(tmp_path / name)["scaler"]) == (name == "fp16")
    for name in ("bf16", "fp16"):
        assert 0 < abs(losses[name] - losses["plain"]) < 0.02, losses


@needs_pillow
def test_mean_reaches_the_policy(monkeypatch):
    """RandAugment fills borders with the mean colour of --mean, not of ImageNet."""
    seen, config = [], defaultdict(lambda: None, mean=[0.1, 0.5, 0.9], recipe="timm")
    monkeypatch.setattr(train_imagenet.images, "ImageLoader",
                        lambda dataset, transform, *args, **options: seen.append(transform))
    config.update(train_crop_size=8, auto_augment="rand-m9-mstd0.5-inc1")
    config.update(val_resize_size=8, val_crop_size=8)
    train_imagenet.open_loaders(mock.Mock(workers=1), config, mock.Mock(), [], [])
    assert seen[0].keywords["policy"].fill == (26, 128, 230)


def test_options_run(tmp_path):
    """What is off by default: it runs, and the checkpoint is tested, and loaded as weights."""
    flags = ("--model resnet_test --val-crop-size 32 --train-crop-size 32 "
             "-b 8 --model-ema --model-ema-steps 1 --mixup 0.2 --cutmix 1 --random-erase 0.5 "
             "--channels_last --calibrate --label-smoothing 0.1 --norm-weight-decay 0 --workers 2 "
             "--train-size 24 --mean 0.5 0.5 0.5 --std 0.2 0.2 0.2")
    out, err = call(f"{SMALL} {flags} --output-dir {tmp_path}/run")
    assert not err and "ema" in out and "24 training images" in out
    log = read_log(tmp_path / "run")
    assert all(math.isfinite(float(v)) for row in log for v in row.values())
    result = record(out)
    assert result["test_acc"] == float(log[-1]["test_acc"])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"] == "resnet_test" and config["classes"] == 1000
    assert config["train_size"] == 24 and config["mean"] == [0.5] * 3
    only = f"{SMALL} {flags} --calibrate false --test-only --output-dir {tmp_path}"
    again = record(call(f"{only}/run")[0])
    for name in ("test_loss", "test_acc", "test_top5", "ema_loss", "ema_acc"):
        assert abs(again[name] - result[name]) < 1e-5, name
    out, _ = call(f"{only}/run", terminal=True)        # where a person reads no record
    for name in ("test", "ema"):
        assert (f"{name}: loss {again[f'{name}_loss']:.4f}, top-1 {again[f'{name}_acc']:.2f}%, "
                f"top-5 {again[f'{name}_top5']:.2f}%\n") in out and "{" not in out
    again = record(call(f"{only}/no --pretrained {tmp_path}/run/checkpoint.pt")[0])
    assert abs(again["test_loss"] - result["test_loss"]) < 1e-5 and not (tmp_path / "no").exists()


@pytest.mark.parametrize("flags", ["--compile", "--grad-checkpointing"])
def test_computed_in_other_ways(tmp_path, flags):
    """Traced by torch.compile (and run eagerly, which spares a compiler), or with activations
    computed twice: the same bits."""
    call(f"{SMALL} -b 12 --drop-path 0.2 --output-dir {tmp_path}/plain")
    eager = functools.partial(torch.compile, backend="eager")
    with mock.patch.object(torch, "compile", eager), mock.patch("shutil.which", bool):
        call(f"{SMALL} -b 12 --drop-path 0.2 {flags} --output-dir {tmp_path}/other")
    assert same_runs(tmp_path / "plain", tmp_path / "other")


def test_checkpointing_and_batchnorm(tmp_path):
    """What is computed twice is counted once: losses, weights and statistics to the bit."""
    line = f"{SMALL} {RESNET} -b 6 --accum 2 --opt mac --output-dir {tmp_path}"
    call(f"{line}/plain")
    call(f"{line}/other --grad-checkpointing")
    assert same_runs(tmp_path / "plain", tmp_path / "other")
    assert checkpoint(tmp_path / "other")["model"]["layer1.0.bn1.num_batches_tracked"] == 2 * 6


def test_resumed_with_other_batches(tmp_path):
    """The same global batch in other parts; another one is refused."""
    call(f"{SMALL} -b 12 --output-dir {tmp_path}")
    err = refused(f"{SMALL} -b 6 --resume --output-dir {tmp_path}")
    assert "--global_batch (was 12, now 6)" in err, err
    out, _ = call(f"{SMALL} -b 6 --accum 2 --resume --output-dir {tmp_path}")
    assert "resumed after epoch 2 of 2" in out and record(out)["epoch"] == 2


def test_killed_worker(tmp_path, monkeypatch):
    """A worker that is killed while the main process trains, and so is not in the loader."""
    def kill(*_):
        multiprocessing.active_children()[0].kill()
        time.sleep(60)                         # torch's handler of SIGCHLD ends this
    monkeypatch.setattr(train_imagenet, "train_step", kill)
    assert "fewer workers" in refused(f"{SMALL} -b 4 --workers 1 --output-dir {tmp_path}")


def test_packed_arrays(tmp_path):
    """Both splits of a folder are used whole, with its classes; half a folder is refused."""
    own_data(tmp_path / "data", 26, 7)
    flags = SMALL.replace("--dummy 36", f"--data-path {tmp_path}/data")
    out, _ = call(f"{flags} -b 5 --output-dir {tmp_path}/run")
    assert "26 training images of 2 classes" in out and "7 test images of 2 classes" in out
    result = record(out)
    assert result["test_top5"] == 100 and abs(result["test_acc"] * 7 / 100 % 1) < 1e-3, result
    (tmp_path / "data/val.packed.json").unlink()
    assert "val" in refused(f"{flags} -b 5 --output-dir {tmp_path}/other")


def own_data(folder, training, test):
    folder.mkdir()
    for split, count in (("train", training), ("val", test)):
        about = dict(count=count, size=16, classes=["0", "1"])
        images.write_packed(folder, split, images.DummyImages(count, 16, 2), about, 0)


def class_folders(folder, split, count, damaged=None):
    for i in range(count):
        file = folder / split / str(2 * i // count) / f"{i}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = bytes((i * j) % 256 for j in range(16 * 16 * 3))
        file.write_bytes(b"no image" if i == damaged else b"P6 16 16 255 " + pixels)


@needs_pillow
@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_image(tmp_path, split):
    """It is named, the run is saved, and goes on once it is mended, as if nothing had been."""
    for name in ("train", "val"):
        class_folders(tmp_path / "data", name, 12)
    flags = SMALL.replace("--dummy 36", f"--data-path {tmp_path}/data") + " -b 2 --workers 1"
    call(f"{flags} --output-dir {tmp_path}/straight")
    whole = (tmp_path / f"data/{split}/1/9.ppm").read_bytes()
    (tmp_path / f"data/{split}/1/9.ppm").write_bytes(b"x" * len(whole))
    err = refused(f"{flags} --output-dir {tmp_path}/run")
    assert "9.ppm" in err and "the run is saved in epoch 1 after step" in err, err
    (tmp_path / f"data/{split}/1/9.ppm").write_bytes(whole)
    assert "steps" in call(f"{flags} --output-dir {tmp_path}/run --resume")[0]
    assert same_runs(tmp_path / "straight", tmp_path / "run")


@needs_pillow
@pytest.mark.parametrize("change", ["class", "file", "label"])
def test_resumed_on_other_images(tmp_path, change):
    for name in ("train", "val"):
        class_folders(tmp_path / "data", name, 12)
    flags = SMALL.replace("--dummy 36", f"--data-path {tmp_path}/data") + " -b 12"
    call(f"{flags} --output-dir {tmp_path}/run")
    train = tmp_path / "data/train"
    if change == "class":
        for name in ("train", "val"):
            (tmp_path / "data" / name / "0").rename(tmp_path / "data" / name / "zebra")
    elif change == "file":
        (train / "0/0.ppm").rename(train / "0/zero.ppm")
    else:
        (train / "0/0.ppm").rename(train / "1/0.ppm")
    assert "other data" in refused(f"{flags} --output-dir {tmp_path}/run --resume")


# ---------------------------------------------------------------------------------------------
# Several ranks, in three processes
# ---------------------------------------------------------------------------------------------

OPTIMIZERS = list(train_imagenet.RECIPES["timm"])
# 256 images are the least for repeated augmentation: two steps on two ranks.
PUBLISHED = ("--dummy 256 --epochs 1 --batch-size 64 --train-crop-size 32 --device cpu "
             "--workers 0 --output-dir outputs")
# For processes that do not know the networks of the tests.
DEIT = SMALL.replace("deit_test", "deit_tiny_patch16_224") + (
    " -b 4 --dummy 48 --print-freq 1 --mixup 0.2 --model-ema")
PATIENCE = datetime.timedelta(seconds=60)
EVAL = "--model resnet_test --train-crop-size 32 --val-resize-size 32 --val-crop-size 32 --epochs 1"


# What goes wrong, on one rank alone but for the last, and what is said of it.
WRONG = {"unreadable": "7.ppm", "missing": "data-2 is not a folder",
         "differing": "train_size (8 on rank 0, 10 on rank 1)",
         "frequent": "print_freq (10 on rank 0, 11 on rank 1)",
         "moved-3 refused": "moved-3 already holds a run"}


def jobs():
    """{name: (ranks, flags, step at which the last rank gets a SIGTERM or None)}

    RANK in the flags is each rank's own number.
    """
    todo = {}
    for optim in OPTIMIZERS:
        lr = "--lr 0.001" if optim.startswith("ada") else ""
        for world in (2, 3):
            todo[f"{optim}-{world}"] = (world, f"{SMALL} -b {12 // world} --opt {optim} {lr}", None)
    todo["accum-2"] = (2, f"{SMALL} -b 2 --accum 3 --opt mac", None)
    todo["fp16-2"] = (2, f"{SMALL} -b 6 --opt kfac --amp --amp-dtype float16 --clip-grad 1", None)
    # ten test images: not all ranks have as many
    ema = f"{SMALL} {EVAL} --model-ema --model-ema-steps 1 --dummy 42"
    todo["eval-2"] = (2, f"{ema} -b 6", None)
    todo["eval-3"] = (3, f"{ema} -b 4", None)
    todo["empty-3"] = (3, f"{SMALL} {EVAL} -b 4 --dummy 12 --model-ema", None)     # 3 test images
    todo["empty-shard-3"] = (3, f"{SMALL} {EVAL} -b 4 --dummy 8", None)            # 2
    todo["fsdp-2"] = (2, f"{SMALL} -b 2 --accum 3 --opt mac --fsdp", None)
    todo["fsdp-eval-3"] = (3, f"{SMALL} {EVAL} -b 4 --dummy 8 --fsdp", None)
    todo["fsdp-moved-3"] = (3, f"{SMALL} -b 4 --opt mac --fsdp", 3)
    todo["fsdp-moved-3 resumed"] = (2, f"{SMALL} -b 6 --opt mac --fsdp --resume", None)
    bits = f"{SMALL} {EVAL} --epochs 3 -b 4 --mixup 0.2 --model-ema --model-ema-steps 1"
    todo["straight-3"] = (3, bits, None)
    todo["stopped-3"] = (3, bits, 4)
    todo["stopped-3 resumed"] = (3, f"{bits} --resume", None)
    todo["moved-3"] = (3, f"{SMALL} -b 4 --opt mac", 3)
    todo["moved-3 resumed"] = (2, f"{SMALL} -b 6 --opt mac --resume", None)
    todo["moved-3 refused"] = (2, f"{SMALL} -b 6 --opt mac", None)
    todo["deit"] = (2, DEIT, None)
    own = f"{SMALL.replace('--dummy 36', '')} -b 2 --data-path data-RANK"
    todo["frequent"] = (2, f"{SMALL} -b 6 --print-freq 1RANK", None)
    todo["missing"] = (3, own, None)                            # there is data-0 and data-1
    todo["differing"] = (2, own, None)                          # of 8 and 10 images
    if importlib.util.find_spec("PIL") is not None:
        todo["published"] = (2, f"train_imagenet.py {DEIT_LINE} {PUBLISHED}", None)
        todo["resnet50"] = (2, f"train_imagenet.py {RESNET_LINE} {PUBLISHED} --val-resize-size 36 "
                            "--val-crop-size 32", None)
        todo["unreadable"] = (2, f"{own.replace('RANK', 'bad')} --test-only --pretrained bad.pt",
                              None)
    return todo


def one_rank(rank, world, root):
    """What each process runs: all jobs, after each of which it notes what it saw."""
    os.chdir(root)
    torch.set_num_threads(1)
    # a rank that waits in vain fails; to begin a job it may wait for all that others run before
    dist.new_group = functools.partial(dist.new_group, timeout=PATIENCE)
    seen = {}
    for name, (ranks, flags, sigterm) in jobs().items():
        if rank < ranks:
            port = Path(root, "ports").read_text().split()[list(jobs()).index(name)]
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            argv = f"{flags.replace('RANK', str(rank))} --output-dir {name.split()[0]}"
            seen[name] = watch(argv, sigterm if rank == ranks - 1 else None)
            gc.collect()               # nothing is to hold a connection open that the next closes
            if dist.is_initialized():
                dist.destroy_process_group()
    torch.save(seen, f"{rank}.pt")


def watch(argv, last=None):
    """Run main(): its status, a digest of all state at each checkpoint, collectives per step.

    last: the step, counted from 1, at whose end this process gets a SIGTERM.
    """
    digests, collectives, steps = [], [0], []
    save, step, all_reduce = run.Run.save, train_imagenet.train_step, dist.all_reduce

    def saving(self):
        state = self.parts["optimizer"].state_dict()["state"]
        tensors = [*self.parts["model"].parameters(), *(v for s in state.values()
                                                         for v in s.values())]
        if "ema" in self.parts:
            ema = self.parts["ema"].model
            tensors += [*ema.parameters(), *ema.buffers()]
        if self.progress is None:              # an epoch is over: BatchNorm statistics agree too
            tensors += [*self.parts["model"].buffers()]
        digest = hashlib.sha256()
        for value in tensors:
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            digest.update(value.detach().clone().numpy().tobytes() if torch.is_tensor(value)
                          else repr(value).encode())
        digests.append(digest.hexdigest())
        save(self)

    def stepping(*args):
        collectives.append(0)
        steps.append(1)
        step(*args)
        if last == len(steps):
            os.kill(os.getpid(), signal.SIGTERM)

    def reducing(tensor, *args, **kwargs):
        collectives[-1] += tensor.is_floating_point()          # but for the ranks' votes
        return all_reduce(tensor, *args, **kwargs)

    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(run.Run, "save", saving), mock.patch("time.sleep"), \
            mock.patch.object(train_imagenet, "train_step", stepping), \
            mock.patch.object(dist, "all_reduce", reducing), \
            redirect_stdout(out), redirect_stderr(err):
        status = train_imagenet.main(shlex.split(argv.removeprefix("train_imagenet.py")))
    return dict(status=status, digests=digests, collectives=collectives, steps=len(steps),
                out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(what each rank saw, the folder with all runs)"""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"          # of a process that has imported torch already
        multiprocessing.get_context(method).set_forkserver_preload(["test_imagenet"])
    root = tmp_path_factory.mktemp("ranks")
    own_data(root / "data-0", 8, 8)
    own_data(root / "data-1", 10, 10)
    class_folders(root / "data-bad", "val", 8, damaged=7)
    model = train_imagenet.make_model(dict(config_of(SMALL), classes=2), torch.device("cpu"))
    torch.save(model.state_dict(), root / "bad.pt")
    (root / "ports").write_text(" ".join(map(str, free_ports(len(jobs())))))
    multiprocessing.start_processes(one_rank, (3, root), 3, start_method=method)
    seen = [torch.load(root / f"{rank}.pt") for rank in range(3)]
    for name in jobs():
        for rank, result in enumerate(seen):
            if name in result:
                want = 2 if name in WRONG else 143 if jobs()[name][2] else 0
                assert result[name]["status"] == want, (name, rank, result[name])
                assert rank == 0 or not result[name]["out"] + result[name]["err"], result[name]
    return seen, root


def test_ranks_agree(ranks):
    """Parameters, statistics, momentum, EMA: the same bits on all ranks with every optimizer."""
    seen, _ = ranks
    for name, result in seen[0].items():
        assert result["digests"] or name in WRONG
        for other in seen[1:]:
            assert name not in other or result["digests"] == other[name]["digests"], name


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_one_collective(ranks, optim):
    """One flat all-reduce in a statistics step (every second here), none in others."""
    # two steps; what comes before them is counted before, and the sums of the epoch after
    counts = ranks[0][0][f"{optim}-3"]["collectives"][1:3]
    assert counts == [0 if optim in ("sgd", "adamw") else 1, 0]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_ranks_equal_one(ranks, tmp_path, optim):
    """One, two and three ranks with the same global batch: the same training."""
    lr = "--lr 0.001" if optim.startswith("ada") else ""
    call(f"{SMALL} -b 12 --opt {optim} {lr} --output-dir {tmp_path}")
    for place in [ranks[1] / f"{optim}-{world}" for world in (2, 3)] + (
            [ranks[1] / "accum-2", ranks[1] / "fsdp-2"] if optim == "mac" else []):
        tol = 2e-2 if optim == "adamw" else 1e-4       # it divides roundings by themselves
        same_moves(moved(place), moved(tmp_path), tol)
        for x, y in zip(read_log(tmp_path), read_log(place), strict=True):
            assert abs(float(x["train_loss"]) - float(y["train_loss"])) < 1e-4, (x, y)
            assert x["test_acc"] == y["test_acc"] and x["lr"] == y["lr"], (x, y)


@pytest.mark.parametrize("name", ["eval-2", "eval-3", "empty-3", "empty-shard-3",
                                  "fsdp-eval-3"])
def test_evaluation(ranks, name):
    """Every test image once, by any number of ranks, with BatchNorm, EMA and empty shards."""
    log, line = read_log(ranks[1] / name)[-1], jobs()[name][1].replace("--fsdp", "")
    result = record(call(f"{line} --test-only --output-dir {ranks[1] / name}")[0])
    for key in ("test_loss", "test_acc", "test_top5", "ema_loss", "ema_acc", "ema_top5"):
        if key in log:                         # without a moving average there is none
            assert abs(result[key] - float(log[key])) < 1e-4 * abs(result[key]) + 1e-9, key


def test_sigterm_on_one_rank(ranks):
    """A SIGTERM to one of three stops all after the same step; --resume continues to the bit."""
    seen, root = ranks
    assert {result["stopped-3"]["steps"] for result in seen} == {4}
    assert "stopped in epoch 2 after step" in seen[0]["stopped-3"]["err"], seen[0]["stopped-3"]
    assert "and" in re.search("resumed after.*", seen[0]["stopped-3 resumed"]["out"])[0]
    assert same_runs(root / "stopped-3", root / "straight-3")


@pytest.mark.parametrize("name, words", WRONG.items())
def test_wrong_on_one_rank(ranks, name, words):
    """What only one rank can find wrong ends all of them, and the first one says it."""
    if name not in ranks[0][0]:
        pytest.skip("Pillow is not installed (pip install pillow)")
    message = ranks[0][0][name]["err"]
    assert words in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("name", ("moved-3", "fsdp-moved-3"))
def test_other_number_of_ranks(ranks, name):
    """Stopped on three ranks in mid-epoch, continued on two: as one run, to rounding."""
    seen, root = ranks
    assert seen[0][name]["steps"] == 3
    same_moves(moved(root / name), moved(root / "mac-2"), 1e-4)
    for x, y in zip(read_log(root / name), read_log(root / "mac-2"), strict=True):
        assert abs(float(x["train_loss"]) - float(y["train_loss"])) < 1e-5, (x, y)


# ---------------------------------------------------------------------------------------------
# As a user runs it
# ---------------------------------------------------------------------------------------------

@needs_pillow
def test_published_lines_run(ranks, tmp_path):
    """Both lines on two ranks, and DeiT's also on one."""
    seen, root = ranks
    for name, model in (("published", "deit_small_patch16_224"), ("resnet50", "resnet50")):
        out = seen[0][name]["out"]
        result = record(out)
        assert result["output_dir"] == name and result["processes"] == 2
        assert result["model"] == model and (root / name / "log.csv").exists()
        assert len(out.splitlines()) < 60 and out.count("training images") == 1, out
    assert math.isfinite(result["ema_loss"])
    alone = f"--model deit_test --img-size 16 --output-dir {tmp_path}/one"
    out, _ = call(f"train_imagenet.py {DEIT_LINE} {PUBLISHED} {alone}")
    assert record(out)["processes"] == 1
    assert train_imagenet.run_folder(parse(DEIT_LINE)) == Path(
        "runs", "imagenet-deit_small_patch16_224-mac", "0")


def test_torchrun_and_sigterm(ranks, tmp_path, start):
    """SIGTERM to torchrun, then --resume: the log of an uninterrupted run, bit for bit."""
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2"
    process = start(f"{DEIT} --output-dir run --workers 1", launcher=launcher)
    assert process.wait_for(lambda: "step 2/" in process.text(), "a step"), process.text()
    process.send(signal.SIGTERM)
    out = process.finish(1)
    assert out.count("stopped in epoch") == 1, out
    out = start(f"{DEIT} --output-dir run --resume", launcher=launcher).finish()
    assert out.count("training images") == 1
    assert read_log(tmp_path / "run") == read_log(ranks[1] / "deit")


def test_help_of_two_recipes():
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        train_imagenet.parse(["--help"])
    text = " ".join(text.getvalue().split())
    assert "1.0 | 3.0 for mac" in text and "(90 for resnet; 300 for deit, swin)" in text
    assert "(0.0 for resnet, deit; 0.1 for swin)" in text
