"""train_imagenet.py: its flags, its arithmetic, its ranks, and as a user runs it with torchrun.

    python test_imagenet.py       # 80 seconds of CPU time for two cores; no data, no network

Images are random and tiny, so accuracies mean nothing. What takes several ranks runs in three
processes that are started once; only a few checks pay for torchrun.
"""
import contextlib
import csv
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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

import images as datasets
import models
import train_imagenet
from test_math import close, close_all, raises, run_tests, skip

torch.set_num_threads(1)
# A shell that starts this in the background lets it, and so its children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).resolve().parent
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
# The columns that two equal runs may differ in.
MEASURED = ("seconds", "peak_memory", "images_per_second", "data_wait")

# Two networks of a size for tests, one without BatchNorm and one with it.
TINY = {
    "deit_test": lambda num_classes, image_size, drop, drop_path: models.VisionTransformer(
        image_size, 8, 16, 2, 2, num_classes, 3, drop, drop_path),
    "resnet_test": lambda num_classes, image_size, drop, drop_path: models.ResNet(
        models.BasicBlock, (1, 1, 1, 1), (8, 8, 8, 8), num_classes, 3, large_images=True),
}
train_imagenet.IMAGENET_MODELS.update(TINY)
# Global batches of 12 images on up to three ranks; mixing, erasing and dropout are off.
SMALL = ("--model deit_test --dummy 36 --img-size 16 --crop-pct 1 --epochs 2 --warmup 0 --tcov 2 "
         "--tinv 2 --lr 0.05 --workers 0 --device cpu")


# ---------------------------------------------------------------------------------------------
# Running the script in this process, and as others
# ---------------------------------------------------------------------------------------------

def main(argv, status=0):
    """The script's main() in this process: (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = train_imagenet.main(shlex.split(argv))
    assert got == status, f"status {got}, not {status}: {out.getvalue()[-2000:]}{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def start(cwd, argv):
    """The script as two processes, by torchrun."""
    command = [sys.executable, *"-m torch.distributed.run --nproc_per_node=2 --master_port".split(),
               str(free_ports(1)[0]), str(HERE / "train_imagenet.py"), *shlex.split(argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, status=0):
    """Its (stdout, stderr), once it ended with this status."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, \
        f"exit status {process.returncode}, not {status}:\n{out[-2000:]}{err}"
    return out, err


def free_ports(count):
    """Different ones: a port that was given back can be the next one that is given out."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def read_log(folder):
    """The rows of log.csv as dicts of text, but for the measured columns."""
    with open(Path(folder, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(tuple(row) == train_imagenet.COLUMNS for row in rows)
    return [{name: text for name, text in row.items() if name not in MEASURED} for row in rows]


def checkpoint(folder):
    return torch.load(Path(folder, "checkpoint.pt"))


def moved(folder):
    """By how much each parameter of a run of the tests' DeiT has moved."""
    return {name: p.double() - start_weights()[name]
            for name, p in checkpoint(folder)["model"].items()}


@functools.lru_cache
def start_weights():
    model = train_imagenet.make_model(dict(config_of(SMALL), classes=1000), torch.device("cpu"))
    return {name: p.detach().double() for name, p in model.named_parameters()}


def record(out):
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def config_of(argv, world=1):
    ranks = train_imagenet.Ranks(0, world, torch.device("cpu"))
    return train_imagenet.resolve(train_imagenet.parse(shlex.split(argv)), ranks)


# ---------------------------------------------------------------------------------------------
# Flags and arithmetic
# ---------------------------------------------------------------------------------------------

def test_published_lines_parse():
    config = config_of(RESNET_LINE, world=4)
    want = dict(recipe="torchvision", model="resnet50", optim="mac", batch_size=256, lr=0.5,
                damping=1.0, weight_decay=2e-5, norm_weight_decay=0.0, momentum=0.9, tcov=5,
                tinv=50, stat_decay=0.95, decoupled_weight_decay=True, schedule="cosineannealinglr",
                warmup=5, warmup_method="linear", warmup_decay=0.01, warmup_lr=None, epoch=100,
                auto_augment="ta_wide", model_ema=True, model_ema_steps=32, random_erase=0.1,
                remode="const", label_smoothing=0.1, mixup=0.2, cutmix=1.0, train_crop_size=176,
                val_resize_size=232, val_crop_size=224, repeats=4, amp=False,
                interpolation="bilinear", global_batch=1024)
    assert want.items() <= config.items(), set(want.items()) ^ set(want.items() & config.items())
    config = config_of(DEIT_LINE, world=4)
    want = dict(recipe="timm", model="deit_small_patch16_224", optim="mac", schedule="cosine",
                epoch=100, lr=0.5, damping=3.0, tcov=5, tinv=5, stat_decay=0.99, weight_decay=1e-4,
                norm_weight_decay=0.0, warmup=5, warmup_lr=0.05, warmup_decay=None, lr_min=0.0,
                batch_size=256, repeats=3, auto_augment="rand-m9-mstd0.5-inc1", remode="pixel",
                label_smoothing=0.1, random_erase=0.25, drop=0.0, drop_path=0.0, mixup=0.8,
                cutmix=1.0, amp=True, amp_dtype="bfloat16", train_crop_size=224,
                val_resize_size=248, val_crop_size=224, interpolation="bicubic")
    assert want.items() <= config.items(), set(want.items()) ^ set(want.items() & config.items())
    args = train_imagenet.parse(shlex.split(DEIT_LINE))
    assert args.pin_mem is True and args.workers == 16 and args.print_freq == 1000
    nysact = config_of(RESNET_LINE + " --opt nysact --rank_size 50")
    assert (nysact["rank"], nysact["sketch"], nysact["decoupled_weight_decay"]) == (
        50, "subcolumns", False)
    assert config_of(DEIT_LINE + " --model swin_tiny_patch4_window7_224")["drop_path"] == 0.0
    assert config_of("--model swin_tiny_patch4_window7_224")["drop_path"] == 0.1
    assert config_of("--model resnet101 --opt sgd")["nesterov"] is False
    assert config_of("--model deit_tiny_patch16_224 --opt sgd")["nesterov"] is True
    assert config_of("--epochs 3 --warmup 5")["epoch"] == 3


def test_aliases():
    same = ["--data-path x/--data-dir x/--data_dir x", "--opt sgd/--optim sgd",
            "-b 7/--batch-size 7", "--pin-mem/--pin-mem True/--pin_mem=yes", "--run 7/--seed 7",
            "--epochs 7/--epoch 7", "--tinv 7/--update 7", "--rank 7/--rank_size 7/--rank-size 7",
            "--wd 0.5/--weight-decay 0.5", "--lr-scheduler cosine/--sched cosine",
            "--lr-warmup-epochs 7/--warmup-epochs 7/--warmup 7", "--lr-min 0.5/--min-lr 0.5",
            "--lr-warmup-decay 0.5/--warmup_decay 0.5", "--auto-augment ta_wide/--aa ta_wide",
            "--random-erase 0.5/--reprob 0.5", "--label-smoothing 0.5/--smoothing 0.5",
            "--mixup-alpha 0.5/--mixup 0.5", "--cutmix-alpha 0.5/--cutmix 0.5",
            "--train-crop-size 7/--img-size 7", "-j 7/--workers 7", "--output-dir x/--output x",
            "--print-freq 7/--log-interval 7", "--clip-grad-norm 7/--clip-grad 7",
            "--model-ema/--model_ema 1"]
    default = vars(train_imagenet.parse([]))
    for group in same:
        parsed = [vars(train_imagenet.parse(form.split())) for form in group.split("/")]
        assert all(p == parsed[0] for p in parsed), group
        changed = {name for name in default if parsed[0][name] != default[name]}
        assert len(changed) == (0 if "pin" in group else 1), (group, changed)
    for a, b in (("--ra-sampler --ra-reps 4", "--aug-repeats 4"),
                 ("--ra-sampler", "--aug-repeats 3"), ("--ra-reps 4", "--aug-repeats 0"),
                 ("--input-size 3 160 160", "--img-size 160")):
        deit = "--model deit_tiny_patch16_224 "
        assert config_of(deit + a, 2) == config_of(deit + b, 2), (a, b)
    print(f"    {sum(group.count('/') for group in same) + 4} pairs")


def test_wrong_commands():
    resnet = "--model resnet_test --val-resize-size 16 --val-crop-size 16 "
    dummy = "--dummy 8 --device cpu --workers 0 --model deit_test --img-size 16 --crop-pct 1 -b 4 "
    wrong = {
        "--lr -1": "--lr", "--epochs 0": "--epoch", "--damping 0": "--damping", "--mixup -1":
        "--mixup", "--reprob 2": "--random_erase", "--model resnet21": "resnet18",
        "--opt sgdd": "adamw", "--sched x": "cosineannealinglr", "--pin-mem maybe": "maybe",
        "--learning-rate 1": "--learning_rate", "--mix 0.2": "--mix", "--sketch x": "subcolumns",
        "--epochs 1": "--data_dir", "--data-path /nowhere": "/nowhere", "--resume FILE": "FILE",
        "--dummy 8 --warmup-lr 1 --warmup-decay 0.5": "--warmup_lr",
        dummy + "--crop-pct 1e-320": "--crop_pct", dummy + "--val-resize-size 99999": "16384",
        dummy + "--ratio 1e-320 1": "--ratio", dummy + "--accum 99999999999999999999": "10^15",
        "--dummy 8 --input-size 1 28 28": "3 N N", "--dummy 8 --amp-dtype float16": "--amp",
        dummy + "--mixup 1 -b 3": "even number", dummy + "--val-crop-size 32": "--val_crop_size",
        dummy + "--sync-bn": "--sync_bn", dummy + "-b 16": "batch",
        dummy + "--nesterov --momentum 0 --opt sgd": "esterov",
        dummy + "--pretrained nowhere.pt": "nowhere.pt",
        dummy + "--test-only": "checkpoint", dummy + "--aa nonsense": "nonsense",
        dummy + "--model swin_tiny_patch4_window7_224 --img-size 40": "40",
        dummy + "--scale 1 0.5": "first", dummy + "--ratio 1.5 0.5": "--ratio",
        dummy + "--train-size 9": "only 8 training images",
        dummy + resnet + "--dummy 9": "one image", dummy + resnet + "-b 1": "one image",
    }
    if not torch.cuda.is_available():
        wrong["--dummy 8 --device cuda"] = "--device cuda"
    for script in ("train_imagenet", "train_cifar", "train_lm"):
        parse = importlib.import_module(script).parse
        assert parse(["--run", "2147483647"])
        raises(train_imagenet.UsageError, ["from 0 to 2147483647"],
               lambda: parse(["--run", "2147483648"]))
    with folder() as tmp:
        for command, word in wrong.items():
            _, err = main(f"{command} --output-dir {tmp / 'run'}", status=2)
            assert word in err and len(err.splitlines()) == 1, (command, err)
        assert not (tmp / "run").exists()
        _, err = main(f"{dummy} --dummy 1000000000000000 --output-dir {tmp / 'run'}", status=1)
        assert "Unable to allocate" in err and len(err.splitlines()) == 1, err
        _, err = main(dummy + f"--rank 3 --opt sgd --epochs 1 --output-dir {tmp / 'run'}")
        assert err.startswith("note: no use for --rank"), err
    print(f"    {len(wrong)} commands")


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
        close(f"the published rates, {config['recipe']}",
              [train_imagenet.learning_rate(config, e) for e in epochs], rates, 2e-8)
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
            close(f"{flags.split()[1]}, {method}", ours, want, 1e-12)


def test_seeds():
    seeds = {train_imagenet.seed_of(*numbers) for numbers in (
        (3,), (3, 0), (3, 0, 0), (3, 0, 0, 0), (0, 0, 0, 3), (3, 1, 0, 0), (3, 1, 0))}
    assert len(seeds) == 7 and all(0 <= seed < 2 ** 64 for seed in seeds), seeds


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
        print(f"    {name}: {got}")
    config = config_of("--model resnet50 --opt sgd")       # no norm weight decay is given
    assert len(train_imagenet.parameter_groups(torch.nn.BatchNorm2d(3), config)) == 1


def test_moving_average():
    config = config_of(RESNET_LINE, world=4)
    close("weight of an EMA update, ResNet-50 as published", train_imagenet.ema_weight(config),
          0.0065536, 1e-9)
    updates = sum(step % config["model_ema_steps"] == 0 for step in range(1251))
    assert updates == 40, updates
    close("the same, DeiT: 1 - decay", train_imagenet.ema_weight(config_of(DEIT_LINE)), 2e-4, 1e-9)
    config = dict(recipe="torchvision", warmup=1, model_ema_steps=2, model_ema_decay=0.9,
                  global_batch=2, epoch=1)                 # weight 0.1·2·2/1
    for recipe, weight in (("torchvision", 0.4), ("timm", 0.1)):
        net = torch.nn.BatchNorm1d(3).double()
        ema = train_imagenet.EMA(net, dict(config, recipe=recipe), 1)
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
        close(f"{recipe}: copies in a ResNet's warm-up, then the average, buffers too",
              torch.stack([ema.model.weight, ema.model.running_var]), want, 1e-14)
        assert ema.model.num_batches_tracked == net.num_batches_tracked == 15


# ---------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------

def test_accumulation():
    """Micro-batches equal one batch, be they of one size or not."""
    with folder() as tmp:
        for optim in ("mac", "kfac", "adafisher"):
            runs, lr = [], 0.001 if optim == "adafisher" else 0.02       # AdaFisher's own is small
            for flags in "-b 4 --accum 3", "-b 12":
                place = tmp / optim / flags[3]
                main(f"{SMALL} {flags} --opt {optim} --lr {lr} --output-dir {place}")
                runs.append(moved(place))
            close_all(f"{optim}: six steps of 3×4 images as of 12", *runs, 1e-4)
    x, labels = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8), torch.randint(1000, (12,))
    for optim in ("mac", "kfac", "adafisher"):
        runs = []
        for sizes in [6, 4, 2], [12]:
            args = train_imagenet.parse(f"{SMALL} -b 12 --opt {optim} --output-dir x".split())
            ranks = train_imagenet.Ranks(0, 1, torch.device("cpu"))
            with contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()):
                run, _ = train_imagenet.prepare(args, ranks, train_imagenet.Stop())
            train_imagenet.train_step(run, list(zip(x.split(sizes), labels.split(sizes))), 0, 0)
            runs.append({name: p.detach().double() - start_weights()[name]
                         for name, p in run.model.named_parameters()})
        close_all(f"{optim}: a step of 6 + 4 + 2 images as of 12", *runs, 1e-4)


def test_float16_and_clipping():
    """The GradScaler's first scale overflows, is halved, and steps follow; bf16 has no scaler."""
    with folder() as tmp:
        losses = {}
        for name, flags in dict(plain="", bf16="--amp", fp16="--amp --amp-dtype float16").items():
            for optim in ("mac", "kfac"):
                out, _ = main(f"{SMALL} -b 12 --opt {optim} {flags} --clip-grad 1 --epochs 3 "
                              f"--output-dir {tmp}/{name}-{optim}")
                losses[name, optim] = record(out)["train_loss"]
                scaler = checkpoint(tmp / f"{name}-{optim}")["scaler"]
                assert bool(scaler) == (name == "fp16"), scaler
        for optim in ("mac", "kfac"):
            plain = losses["plain", optim]
            assert 0 < abs(losses["bf16", optim] - plain) < 0.02, losses
            assert 0 < abs(losses["fp16", optim] - plain) < 0.02, losses
    print("   ", {" ".join(key): round(value, 5) for key, value in losses.items()})


def test_options_run():
    """What is off by default: it runs, and is restored by --resume."""
    flags = ("--model resnet_test --val-resize-size 32 --val-crop-size 32 --train-crop-size 32 "
             "-b 8 --model-ema --model-ema-steps 1 --mixup 0.2 --cutmix 1 --random-erase 0.5 "
             "--channels_last --calibrate --label-smoothing 0.1 --norm-weight-decay 0 --workers 2 "
             "--train-size 24")
    with folder() as tmp:
        out, _ = main(f"{SMALL} {flags} --output-dir {tmp}")
        assert "note" not in out and "ema" in out
        log = read_log(tmp)
        assert all(math.isfinite(float(v)) for row in log for v in row.values())
        result = record(out)
        assert result["test_acc"] == float(log[-1]["test_acc"])
        config = json.loads((tmp / "config.json").read_text())
        assert config["model"] == "resnet_test" and config["classes"] == 1000
        assert config["train_size"] == 24 and "24 training images" in out
        assert sorted(f.name for f in tmp.iterdir()) == ["checkpoint.pt", "config.json", "log.csv"]
        # the checkpoint holds plain things, and is tested and loaded as weights
        only = f"{SMALL} {flags} --calibrate false --test-only --output-dir {tmp}"
        again = record(main(only)[0])
        for name in ("test_loss", "test_acc", "test_top5", "ema_loss", "ema_acc"):
            assert abs(again[name] - result[name]) < 1e-5, name
        again = record(main(f"{only}/no --pretrained {tmp}/checkpoint.pt")[0])
        assert abs(again["test_loss"] - result["test_loss"]) < 1e-5
        assert not (tmp / "no").exists()


def test_compile():
    """Traced by torch.compile (and run eagerly, which spares a compiler): the same bits."""
    with folder() as tmp:
        main(f"{SMALL} -b 12 --output-dir {tmp}/plain")
        eager = functools.partial(torch.compile, backend="eager")
        with mock.patch.object(torch, "compile", eager), mock.patch("shutil.which", bool):
            main(f"{SMALL} -b 12 --compile --output-dir {tmp}/traced")
        assert read_log(tmp / "plain") == read_log(tmp / "traced")
        assert not any("_orig_mod" in name for name in checkpoint(tmp / "traced")["model"])


def test_used_folder():
    with folder() as tmp:
        out, _ = main(f"{SMALL} -b 12 --epochs 1 --resume --output-dir {tmp}")
        assert "starts anew" in out
        before, log = (tmp / "checkpoint.pt").read_bytes(), read_log(tmp)
        _, err = main(f"{SMALL} -b 12 --epochs 1 --output-dir {tmp}", status=2)
        assert "--resume" in err, err
        _, err = main(f"{SMALL} -b 12 --epochs 1 --resume --lr 0.2 --output-dir {tmp}", status=2)
        assert "--lr (was 0.05, now 0.2)" in err, err
        _, err = main(f"{SMALL} -b 6 --epochs 1 --resume --output-dir {tmp}", status=2)
        assert "--global_batch (was 12, now 6)" in err, err
        out, _ = main(f"{SMALL} -b 6 --accum 2 --epochs 1 --resume --output-dir {tmp}")
        assert "resumed after epoch 1 of 1" in out and record(out)["epoch"] == 1
        assert (tmp / "checkpoint.pt").read_bytes() == before and read_log(tmp) == log
        torch.save(dict(checkpoint(tmp), config="none"), tmp / "foreign")
        for content in (before[:len(before) // 2], (tmp / "foreign").read_bytes()):
            (tmp / "checkpoint.pt").write_bytes(content)
            _, err = main(f"{SMALL} -b 12 --epochs 1 --resume --output-dir {tmp}", status=2)
            assert "damaged" in err and len(err.splitlines()) == 1, err
        _, err = main(f"{SMALL} -b 12 --output-dir {tmp}/foreign/x", status=2)
        assert "foreign is a file: name another" in err and len(err.splitlines()) == 1, err


def test_killed_worker():
    """A worker that is killed while the main process trains, and so is not in the loader."""
    def kill(run, *_):
        run.train.loader._iterator._workers[0].kill()
        time.sleep(10)                         # torch's handler of SIGCHLD ends this

    with folder() as tmp, mock.patch.object(train_imagenet, "train_step", kill):
        _, err = main(f"{SMALL} -b 4 --workers 1 --output-dir {tmp}", status=2)
    assert "fewer workers" in err and len(err.splitlines()) == 1, err


def test_divergence():
    with folder() as tmp:
        for optim in ("sgd", "mac"):
            flags = f"--lr-scheduler steplr --lr-step-size 1 --lr-gamma 1e30 --opt {optim}"
            _, err = main(f"{SMALL} -b 12 {flags} --output-dir {tmp}/{optim}", status=1)
            assert "epoch 2" in err and "--lr" in err and len(err.splitlines()) <= 2, err
            saved = checkpoint(tmp / optim)
            assert saved["epoch"] == 1 and all(v.isfinite().all() for v in saved["model"].values())


def test_packed_arrays():
    """Both splits of a folder are used whole, with its classes; half a folder is refused."""
    with folder() as tmp:
        for split, count in (("train", 26), ("val", 7)):
            about = dict(count=count, size=16, classes=["0", "1", "2"])
            datasets.write_packed(tmp, split, datasets.DummyImages(count, 16, 3), about, 0)
        flags = SMALL.replace("--dummy 36", f"--data-path {tmp}")
        out, _ = main(f"{flags} -b 5 --output-dir {tmp}/run")
        assert "26 training images of 3 classes" in out and "7 test images of 3 classes" in out
        result = record(out)
        assert result["test_top5"] == 100 and abs(result["test_acc"] * 7 / 100 % 1) < 1e-3, result
        (tmp / "val.packed.json").unlink()
        _, err = main(f"{flags} -b 5 --output-dir {tmp}/other", status=2)
        assert "val" in err and len(err.splitlines()) == 1, err


def test_stop_anywhere():
    """Stopped after each step in turn, with everything random on: the same bits as in one go."""
    flags = (f"{SMALL} -b 12 --drop 0.1 --drop-path 0.3 --mixup 0.8 --cutmix 1 --reprob 0.5 --amp "
             "--model-ema --smoothing 0.1 --dummy 40")
    with folder() as tmp:
        for optim in "mac", "kfac --fisher sampled":
            name = optim.split()[0]
            main(f"{flags} --opt {optim} --output-dir {tmp}/{name}")
            for step in (1, 3, 5):             # the third is the last one of an epoch
                argv = f"{flags} --opt {optim} --output-dir {tmp}/{name}-{step}"
                stopped = watch(argv, step)
                where = f"epoch {1 + step // 4} after step {1 + (step - 1) % 3}"
                assert stopped["status"] == 143 and where in stopped["err"], stopped
                main(f"{argv} --resume")
                assert read_log(tmp / f"{name}-{step}") == read_log(tmp / name)
                a, b = (checkpoint(tmp / folder) for folder in (f"{name}-{step}", name))
                assert all(same_bits(a[part], b[part]) for part in ("model", "ema", "optimizer"))


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


# What goes wrong on one rank alone, and the exit status of each: only --test_only's failure is in
# the midst of work, and ends the other rank by the loss of its connection.
WRONG = {"unreadable": [1, 2], "missing": [2, 2, 2], "differing": [2, 2], "moved-3 refused": [2, 2]}


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
    bits = f"{SMALL} {EVAL} --epochs 3 -b 6 --mixup 0.2 --model-ema --model-ema-steps 1"
    todo["straight-2"] = (2, bits, None)
    todo["stopped-2"] = (2, bits, 4)
    todo["stopped-2 resumed"] = (2, f"{bits} --resume", None)
    todo["moved-3"] = (3, f"{SMALL} -b 4 --opt mac", 3)
    todo["moved-3 resumed"] = (2, f"{SMALL} -b 6 --opt mac --resume", None)
    todo["moved-3 refused"] = (2, f"{SMALL} -b 6 --opt mac", None)
    todo["deit"] = (2, DEIT, None)
    own = f"{SMALL.replace('--dummy 36', '')} -b 2 --data-path data-RANK"
    todo["missing"] = (3, own, None)                            # there is data-0 and data-1
    todo["differing"] = (2, own, None)                          # of 8 and 10 images
    if importlib.util.find_spec("PIL") is not None:
        todo["published"] = (2, f"{DEIT_LINE} {PUBLISHED}", None)
        todo["resnet50"] = (2, f"{RESNET_LINE} {PUBLISHED} --val-resize-size 36 --val-crop-size 32",
                            None)
        todo["unreadable"] = (2, f"{own.replace('RANK', 'bad')} --test-only --pretrained bad.pt",
                              None)
    return todo


def own_data(root):
    """What the jobs of WRONG read: two packed folders, and eight images, the last one damaged."""
    for rank, count in enumerate((8, 10)):
        (root / f"data-{rank}").mkdir()
        for split in ("train", "val"):
            about = dict(count=count, size=16, classes=["0", "1"])
            source = datasets.DummyImages(count, 16, 2)
            datasets.write_packed(root / f"data-{rank}", split, source, about, 0)
    for i in range(8):
        file = root / "data-bad" / "val" / str(i // 4) / f"{i}.ppm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P6 16 16 255 " + bytes(16 * 16 * 3) if i < 7 else b"no image")
    model = train_imagenet.make_model(dict(config_of(SMALL), classes=2), torch.device("cpu"))
    torch.save(model.state_dict(), root / "bad.pt")


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


def watch(argv, last=None, number=signal.SIGTERM):
    """Run main(): its status, a digest of all state at each checkpoint, collectives per step.

    last: the step, counted from 1, at whose end this process gets the signal of this number.
    """
    digests, collectives, steps = [], [], []
    save, step = train_imagenet.save_checkpoint, train_imagenet.train_step
    all_reduce = dist.all_reduce

    def saving(path, run, rows, partial):
        state = run.optimizer.state_dict()["state"]
        tensors = [*run.model.parameters(), *(v for s in state.values() for v in s.values())]
        if run.ema is not None:
            tensors += [*run.ema.model.parameters(), *run.ema.model.buffers()]
        if partial is None:                    # an epoch is over: BatchNorm statistics agree too
            tensors += [*run.model.buffers()]
        digest = hashlib.sha256()
        for value in tensors:
            digest.update(value.detach().numpy().tobytes() if torch.is_tensor(value)
                          else repr(value).encode())
        digests.append(digest.hexdigest())
        save(path, run, rows, partial)

    def stepping(run, *args):
        collectives.append(0)
        steps.append(run.optimizer)
        result = step(run, *args)
        if last == len(steps):
            os.kill(os.getpid(), number)
        return result

    def reducing(tensor, *args, **kwargs):
        if not kwargs.get("async_op"):
            collectives[-1] += 1
        return all_reduce(tensor, *args, **kwargs)

    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(train_imagenet, "save_checkpoint", saving), \
            mock.patch.object(train_imagenet, "train_step", stepping), \
            mock.patch.object(dist, "all_reduce", reducing), mock.patch("time.sleep"), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        collectives.append(0)
        status = train_imagenet.main(shlex.split(argv))
    return dict(status=status, digests=digests, collectives=collectives, steps=len(steps),
                out=out.getvalue(), err=err.getvalue())


def context():
    """How the tests start processes: from one that has imported this file, where that is possible,
    since importing torch takes longer than most of what they do."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_imagenet"])
    return server


@functools.lru_cache
def ranks():
    """(what each rank saw, the folder with all runs)"""
    if not dist.is_available() or not dist.is_gloo_available():
        skip("this torch has no gloo")
    method = context().get_start_method()
    root = tempfile.TemporaryDirectory()
    own_data(Path(root.name))
    Path(root.name, "ports").write_text(" ".join(map(str, free_ports(len(jobs())))))
    multiprocessing.start_processes(one_rank, (3, root.name), 3, start_method=method)
    seen = [torch.load(Path(root.name, f"{rank}.pt")) for rank in range(3)]
    for name in jobs():
        for rank, result in enumerate(seen):
            if name in result:
                want = WRONG[name][rank] if name in WRONG else 143 if jobs()[name][2] else 0
                assert result[name]["status"] == want, (name, rank, result[name])
                silent = not result[name]["out"] + result[name]["err"]
                assert silent or rank == 0 or name == "unreadable", result[name]
    return seen, Path(root.name), root


def test_ranks_agree():
    """Parameters, statistics, momentum, EMA: the same bits on all ranks with every optimizer."""
    seen, *_ = ranks()
    checked = 0
    for name, result in seen[0].items():
        for other in seen[1:]:
            if name in other:
                assert result["digests"] == other[name]["digests"], name
                assert result["digests"] or name in WRONG
                checked += len(result["digests"])
    print(f"    {checked} comparisons in {len(seen[0])} runs")


def test_one_collective():
    """One flat all-reduce in a statistics step (every second here), none in others but for sums."""
    seen, *_ = ranks()
    for optim in OPTIMIZERS:
        # two steps; what comes before them is counted before, and the sums of the epoch after
        counts = seen[0][f"{optim}-3"]["collectives"][1:3]
        assert counts == [0 if optim in ("sgd", "adamw") else 1, 0], (optim, counts)
        print(f"    {optim}: {counts}")


def test_ranks_equal_one():
    """One, two and three ranks with the same global batch: the same training."""
    _, root, _ = ranks()
    with folder() as tmp:
        for optim in OPTIMIZERS:
            lr = "--lr 0.001" if optim.startswith("ada") else ""
            main(f"{SMALL} -b 12 --opt {optim} {lr} --output-dir {tmp}/{optim}")
            one = moved(tmp / optim)
            for world in (2, 3):
                tol = 2e-2 if optim == "adamw" else 1e-4       # it divides roundings by themselves
                close_all(f"{optim}: weights moved on {world} ranks as on one",
                          moved(root / f"{optim}-{world}"), one, tol)
                a, b = (read_log(place) for place in (tmp / optim, root / f"{optim}-{world}"))
                for x, y in zip(a, b):
                    assert abs(float(x["train_loss"]) - float(y["train_loss"])) < 1e-4, (x, y)
                    assert x["test_acc"] == y["test_acc"] and x["lr"] == y["lr"], (x, y)
        close_all("mac: three micro-batches on two ranks", moved(root / "accum-2"),
                  moved(tmp / "mac"), 1e-4)


def test_evaluation():
    """Every test image once, by any number of ranks, with BatchNorm, EMA and empty shards."""
    _, root, _ = ranks()
    for name in ("eval-2", "eval-3", "empty-3", "empty-shard-3"):
        flags, log = jobs()[name][1], read_log(root / name)[-1]
        result = record(main(f"{flags} --test-only --output-dir {root / name}")[0])
        for key in ("test_loss", "test_acc", "test_top5", "ema_loss", "ema_acc", "ema_top5"):
            if log[key]:
                assert abs(result[key] - float(log[key])) < 1e-4 * abs(result[key]) + 1e-9, (
                    name, key, result[key], log[key])
        print(f"    {name}: loss {float(log['test_loss']):.6f}, alone {result['test_loss']:.6f}")


def test_sigterm_on_one_rank():
    """A SIGTERM to one rank stops all after the same step, and --resume continues to the bit."""
    seen, root, _ = ranks()
    stops = [result["stopped-2"]["steps"] for result in seen[:2]]
    assert stops[0] == stops[1] in (4, 5), stops
    assert "stopped in epoch 2 after step" in seen[0]["stopped-2"]["err"], seen[0]["stopped-2"]
    assert "and" in re.search("resumed after.*", seen[0]["stopped-2 resumed"]["out"])[0]
    assert read_log(root / "stopped-2") == read_log(root / "straight-2")
    a, b = (checkpoint(root / name) for name in ("stopped-2", "straight-2"))
    for part in ("model", "ema", "optimizer"):
        assert same_bits(a[part], b[part]), part


def test_wrong_on_one_rank():
    """What only one rank can find wrong ends all of them, and the sentence is said."""
    seen, *_ = ranks()
    messages = {"missing": (0, "data-2 is not a folder"),
                "differing": (0, "train_size (8 on rank 0, 10 on rank 1)"),
                "unreadable": (1, "7.ppm is not an image")}
    for name, (rank, words) in messages.items():
        if name not in seen[0]:
            skip("Pillow is not installed (pip install pillow)")
        message = seen[rank][name]["err"]
        assert words in message and len(message.splitlines()) == 1, message
        print(f"    {message.strip()}")


def same_bits(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_other_number_of_ranks():
    """Stopped on three ranks in mid-epoch, continued on two: as one run, to rounding."""
    seen, root, _ = ranks()
    assert seen[0]["moved-3"]["steps"] in (3, 4)
    assert "moved-3 already holds a run" in seen[0]["moved-3 refused"]["err"]
    close_all("stopped on three ranks, continued on two", moved(root / "moved-3"),
              moved(root / "mac-2"), 1e-4)
    for x, y in zip(read_log(root / "moved-3"), read_log(root / "mac-2"), strict=True):
        assert abs(float(x["train_loss"]) - float(y["train_loss"])) < 1e-5, (x, y)


# ---------------------------------------------------------------------------------------------
# As a user runs it
# ---------------------------------------------------------------------------------------------

def test_published_lines_run():
    """Both lines on two ranks, and DeiT's also on one."""
    if importlib.util.find_spec("PIL") is None:
        skip("the policies of both lines need Pillow")
    seen, root, _ = ranks()
    for name, model in (("published", "deit_small_patch16_224"), ("resnet50", "resnet50")):
        out = seen[0][name]["out"]
        result = record(out)
        assert result["output_dir"] == name and result["processes"] == 2
        assert result["model"] == model and (root / name / "log.csv").exists()
        assert len(out.splitlines()) < 60 and out.count("training images") == 1, out
    assert math.isfinite(result["ema_loss"])
    with folder() as tmp:
        alone = f"--model deit_test --img-size 16 --output-dir {tmp}/one"
        out, _ = main(f"{DEIT_LINE} {PUBLISHED} {alone}")
        assert record(out)["processes"] == 1
        folder_of = train_imagenet.run_folder(train_imagenet.parse(shlex.split(DEIT_LINE)))
        assert folder_of == Path("runs", "imagenet-deit_small_patch16_224-mac", "0")


def test_torchrun_and_sigterm():
    """SIGTERM to torchrun, then --resume: the log of an uninterrupted run, bit for bit."""
    _, root, _ = ranks()
    with folder() as tmp:
        process = start(tmp, f"{DEIT} --workers 1 --output-dir run")
        while "step 2/" not in process.stdout.readline():
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert err.count("stopped in epoch") == 1, err
        saved = checkpoint(tmp / "run")
        assert saved["partial"][0] >= 2 or saved["epoch"], saved["partial"]
        out, _ = finish(start(tmp, f"{DEIT} --workers 1 --output-dir run --resume"))
        assert record(out)["processes"] == 2 and out.count("training images") == 1, out
        assert read_log(tmp / "run") == read_log(root / "deit")
        print(f"    stopped in epoch {saved['epoch'] + 1} after step {saved['partial'][0]}")


def killed(argv, last):
    """watch() until kill -9, which would leave a lock behind that tqdm shares among processes."""
    tqdm.set_lock(threading.RLock())
    watch(argv, last, signal.SIGKILL)


def test_kill_and_resume():
    """kill -9 in mid-epoch, then --resume: the log of an uninterrupted run, bit for bit."""
    flags = f"{SMALL} -b 4 --dummy 16 --mixup 0.2 --model-ema"
    with folder() as tmp:
        argv = f"{flags} --output-dir {tmp}/killed"
        process = context().Process(target=killed, args=(argv, 6))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert checkpoint(tmp / "killed")["epoch"] == 1
        out, _ = main(f"{argv} --workers 1 --resume")
        assert "resumed after epoch 1 of 2" in out
        main(f"{flags} --workers 1 --output-dir {tmp}/straight")
        assert read_log(tmp / "killed") == read_log(tmp / "straight")


def test_interrupt():
    """Ctrl-C: status 130, one line, and a checkpoint of this very step."""
    with folder() as tmp:
        seen = watch(f"{SMALL} -b 4 --workers 2 --output-dir {tmp}", 3, signal.SIGINT)
        assert seen["status"] == 130 and seen["err"].strip().count("\n") == 0, seen
        assert "after step 3" in seen["err"] and "--resume" in seen["err"], seen
        assert checkpoint(tmp)["partial"][0] == 3


def test_smoke_and_help():
    here = os.getcwd()
    with folder() as tmp:
        os.chdir(tmp)
        try:
            begin = time.perf_counter()
            out, _ = main("--smoke")
            print(f"    {time.perf_counter() - begin:.0f} s")
            with contextlib.redirect_stdout(io.StringIO()) as text, \
                    contextlib.suppress(SystemExit):
                train_imagenet.main(["--help"])
        finally:
            os.chdir(here)
        assert not list(tmp.iterdir())
    assert out.startswith("smoke test passed: sgd adamw mac nysact"), out
    text = text.getvalue()
    assert all(f"--{name}" in text for name in vars(train_imagenet.parse([])))
    assert "1.0 | 3.0 for mac" in " ".join(text.split())


if __name__ == "__main__":
    run_tests(globals(), sys.argv[1:])
