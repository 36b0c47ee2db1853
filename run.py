"""What a run is, whatever it trains: its flags, its folder, its end, and what is left afterwards.

A script says what is trained and how; all of them share this:

    flags       types, those in common, and the optimizers' with their published values
    folder      one process owns it; config.json, log.csv, checkpoint.pt, record.json
    epoch       between any two steps a run can be stopped, saved and continued to the same bits
    end         one sentence and an exit status, a record, a table

Files are written whole or not at all. A step's random numbers come from (seed, epoch, step, rank),
so a checkpoint needs no generator's state.
"""
import argparse
import contextlib
import importlib
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
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from download import DataError, expand
from ranks import Stop, UsageError

# The published recipes for small images: a flag that is not given takes the value of its
# optimizer's row, and an optimizer takes the flags of its row and no others. mac and nysact are the
# README lines of their authors; the baselines and foof, kfac are the scripts in MAC's history;
# adafisher its paper.
SGD = dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4)
CURVATURE = dict(SGD, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95, tcov=5, tinv=50)
ADAFISHER = dict(lr=1e-3, beta=0.9, gamma=0.8, tcov=100, averaging="released")
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
# A class of torch.optim, or of a file of this folder, imported when its optimizer is asked for.
CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "mac": "MAC", "nysact": "NysAct",
           "foof": "FOOF", "kfac": "KFAC", "adafisher": "AdaFisher", "adafisherw": "AdaFisherW"}
FILES = {"mac": "mac", "nysact": "nysact", "foof": "foof", "kfac": "kfac",
         "adafisher": "adafisher", "adafisherw": "adafisher"}


class Diverged(Exception):
    """Its message is the one sentence for the user; exit status 1."""


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------

LARGEST = {int: 10 ** 15, float: 1e30}         # beyond these int64 and float32 overflow


def number(kind, rule, words):
    """An argparse type: a number for which rule holds, described by words in the error."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (rule(value) and value <= LARGEST[kind]):     # neither holds for nan
            raise argparse.ArgumentTypeError(
                f"'{text}' is not {words}, at most {LARGEST[kind]:.0e}")
        return value
    return parse


POSITIVE = number(float, lambda v: v > 0, "a positive number")
NOT_NEGATIVE = number(float, lambda v: v >= 0, "a number from 0 on")
FRACTION = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
COUNT = number(int, lambda v: v >= 1, "a whole number from 1 on")
COUNT_OR_ZERO = number(int, lambda v: v >= 0, "a whole number from 0 on")
SEED = number(int, lambda v: 0 <= v < 2 ** 31, "a whole number from 0 to 2147483647")


def user_path(text):
    """An argparse type: a path, with ~ and ~user expanded."""
    try:
        return expand(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip("."))


def truth(text):
    """An argparse type: yes or no."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return words[text.lower()]


def no_value(text):
    """An argparse type for a flag that other scripts give a file."""
    raise argparse.ArgumentTypeError(
        f"it takes no value, and was given '{text}': repeat the run's own flags, of which "
        "--output_dir names the folder that holds its checkpoint.pt")


def device_name(text):
    """An argparse type: auto, cpu, mps, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text.lower()):
        raise argparse.ArgumentTypeError(f"'{text}' is not one of auto, cpu, mps, cuda, cuda:N")
    return text.lower()


# Ready-made arguments of flag().
SWITCH = dict(type=truth, nargs="?", const=True, metavar="BOOL")
NAME = dict(type=str.lower, metavar="NAME")    # of one among choices
WORD = dict(type=str.lower)


class Parser(argparse.ArgumentParser):
    """Whose flags may be spelled with - or _, and whose error is one sentence."""

    def parse_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        args = super().parse_args(
            [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg)
             for arg in given], namespace)
        args.command = shlex.join(given)
        for name in ("optim", "seed"):
            if isinstance(vars(args).get(name), list):
                setattr(args, name, list(dict.fromkeys(vars(args)[name])))
        return args

    def error(self, message):    # argparse would print all flags first
        raise UsageError(f"{message} (--help lists the flags)")


def parser_of(script, manual, more=""):
    return Parser(description=manual, usage=f"python {script} [flags]", allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter,
                  epilog="- and _ are the same in the names of flags, small and capital letters in "
                  "their words; of a flag given twice the last value counts. A switch takes true "
                  "or false, and means true alone." + more)


def flag(group, name, *alias, help, default=None, **kwargs):
    """Add a flag, with its default in its help text."""
    if default not in (None, False):
        values = default if isinstance(default, list) else [default]
        help += " (default " + " ".join(f"{v:.3g}" if v != str(v) else v for v in values) + ")"
    group.add_argument(f"--{name}", *alias, dest=name, default=default, help=help, **kwargs)


def published(name, *recipes):
    """What optimizers take where a flag is not given: '0.1 for sgd, mac; 0.001 for adam'."""
    takers = {}
    for optim in recipes[0]:
        if name in recipes[0][optim]:
            values = dict.fromkeys(str(recipe[optim][name]) for recipe in recipes)
            takers.setdefault(" | ".join(values), []).append(optim)
    return "; ".join(f"{value} for {', '.join(optims)}" for value, optims in takers.items())


OPTIMIZER_FLAGS = {
    "lr": dict(type=POSITIVE, metavar="X", help="learning rate, at any batch size"),
    "momentum": dict(type=FRACTION, metavar="X", help="momentum"),
    "nesterov": dict(SWITCH, help="Nesterov's momentum"),
    "weight_decay": dict(type=NOT_NEGATIVE, metavar="X",
                         help="L2 penalty; in adamw and adafisherw decoupled"),
    "decoupled_weight_decay": dict(
        SWITCH, help="shrink the weights directly, not by way of the gradient"),
    "damping": dict(type=POSITIVE, metavar="X",
                    help="what is added to the curvature; large means SGD"),
    "stat_decay": dict(type=FRACTION, metavar="X", help="weight of the past in the averages"),
    "tcov": dict(type=COUNT, metavar="N", help="steps between updates of the statistics"),
    "tinv": dict(type=COUNT, metavar="N", help="steps between updates of what is applied"),
    "calibrate": dict(
        SWITCH, help="fix the first layer's covariance by one pass over the data before training, "
        "as published, in place of the average during training"),
    "rank": dict(type=COUNT, metavar="N", help="columns of the sketch"),
    "sketch": dict(WORD, choices=("gaussian", "subcolumns"), help="kind of the sketch"),
    "fisher": dict(WORD, choices=("empirical", "sampled"),
                   help="from the true labels, or from labels sampled from the model"),
    "inverse": dict(
        WORD, choices=("factored", "eigen"),
        help="damp each factor, or the Kronecker product exactly in its eigenbasis"),
    "weight_sharing": dict(
        WORD, choices=("expand", "reduce"),
        help="positions of a map, or tokens, count as samples, or are averaged first"),
    "kl_clip": dict(type=POSITIVE, metavar="X",
                    help="bound on the change of the output by a step; a large one is none"),
    "beta": dict(type=FRACTION, metavar="X", help="decay of the first moment"),
    "gamma": dict(type=FRACTION, metavar="X", help="weight of the past in the factors"),
    "averaging": dict(
        WORD, choices=("released", "printed"),
        help="of the factors: as the released code does, or by the paper's equations"),
}


def add_optimizer_flags(group, *recipes, **alias):
    """The flags that occur in the recipes; alias: other names of some."""
    for name, settings in OPTIMIZER_FLAGS.items():
        values = published(name, *recipes)
        if values:
            flag(group, name, *alias.get(name, ()),
                 **{**settings, "help": f"{settings['help']} ({values})"})


def add_several_flags(group, optim):
    """The flags that may be given several values, for as many runs."""
    flag(group, "optim", "--opt", default=[optim], nargs="+", choices=list(RECIPES), **NAME,
         help="one or several of %(choices)s; several run one after another on the same data, and "
         "a flag that is given holds for all of them")
    flag(group, "seed", "--run", default=[0], nargs="+", type=SEED, metavar="SEED",
         help="of everything random; several give mean ± std at the end")


def add_machine_flags(group, place):
    """What every script can be told about the machine and the files. place: the default folder."""
    flag(group, "device", default="auto", type=device_name, metavar="DEVICE",
         help="auto takes a GPU where there is one, cuda:1 the second; under torchrun each process "
         "takes its own")
    flag(group, "amp", default=False, **SWITCH, help="autocast, to bfloat16 unless told otherwise")
    flag(group, "compile", default=False, **SWITCH, help="torch.compile the model")
    flag(group, "output_dir", "--output", type=user_path, metavar="DIR",
         help="folder of the run, and where there are several of a subfolder for each optimizer "
         f"and seed; without: {place}. Of its log.csv accuracies are in per cent, losses in nats, "
         "seconds those of the training pass, and peak_memory is in MiB: of the GPU in this run, "
         "or without a GPU of the process so far")
    flag(group, "resume", default=False, nargs="?", const=True, type=no_value, metavar="",
         help="continue the run of the same command, or start it if it has not begun")
    flag(group, "checkpoint_minutes", default=10.0, type=NOT_NEGATIVE, metavar="X",
         help="save at least so often, also within an epoch")
    flag(group, "smoke", default=False, action="store_true",
         help="try everything for a few steps; other flags have no effect")


def tell(*words):
    """A line on the error output, of the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(*words, file=sys.stderr, flush=True)


def note_unused(names, where):
    if names:
        tell("note: no use for", *(f"--{name}" for name in sorted(names)), "in", where)


def check_optimizers(args, optims, recipes):
    """Refuse optimizers whose file is not there, and note flags that none of them takes."""
    for optim in optims:
        optimizer_class(optim)
    given = {name for recipe in recipes.values() for name in recipe
             if getattr(args, name) is not None}
    note_unused(given - {name for optim in optims for name in recipes[optim]}, " ".join(optims))


def check_compiler(args, device):
    if args.compile and device.type == "cpu" and not os.environ.get("CXX") \
            and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler on the CPU, and none was found")


# ---------------------------------------------------------------------------------------------
# The optimizer
# ---------------------------------------------------------------------------------------------

def optimizer_class(optim):
    if optim not in FILES:
        return getattr(torch.optim, CLASSES[optim])
    if importlib.util.find_spec(FILES[optim]) is None:
        raise UsageError(f"--optim {optim} needs {FILES[optim]}.py beside this script")
    return getattr(importlib.import_module(FILES[optim]), CLASSES[optim])


def make_optimizer(model, groups, config, recipe, **more):
    """The optimizer of config on groups of parameters; recipe: the flags that it takes."""
    optim = config["optim"]
    flags = {name: config[name] for name in recipe if name not in ("calibrate", "embedding_lr")}
    if optim == "nysact":
        more["seed"] = config["seed"]          # its sketch is drawn at random
    if optim in FILES:
        return optimizer_class(optim)(model, params=groups, **flags, **more)
    return optimizer_class(optim)(groups, **flags)


def state_bytes(optimizer):
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values()
               if torch.is_tensor(v))


def seed_of(*numbers):
    """A seed from (seed, epoch, ...)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_file(path, write):
    """All of it or nothing: whoever kills this process finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        while error is not None and not isinstance(error, OSError):
            error = error.__context__          # torch.save hides what the disk said
        if error is None:
            raise
        raise UsageError(f"{path} cannot be written ({error.strerror}); what was there before is "
                         "left as it was")


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def read_checkpoint(path):
    try:
        damaged = zipfile.ZipFile(path).testzip()      # checks what torch.load does not: the CRCs
        if damaged:
            raise zipfile.BadZipFile(damaged)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return dict(saved, config=dict(saved["config"]), log=list(saved["log"]),
                    partial=saved["partial"] and dict(saved["partial"]))
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read, it is damaged or not a checkpoint of this script "
                         f"({type(error).__name__}); move it away to start this run anew")


def check_folder(folder, resume):
    """Refuse a run's folder that cannot be made, or holds a run that is not to be continued."""
    place = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    if not place.is_dir():
        raise UsageError(f"{folder} cannot be the run's folder, since {place} is a file: name "
                         "another one with --output_dir")
    if (folder / ".lock").exists():
        lock(folder).close()
    files = [folder / name for name in ("config.json", "log.csv", "checkpoint.pt")]
    if any(file.exists() for file in files) and not resume:
        raise UsageError(f"{folder} already holds a run: add --resume to continue it, or name "
                         "another folder with --output_dir")


def run_folders(args, name):
    """{(optimizer, seed): folder}, of what --output_dir or a name says."""
    folders = {}
    for optim in args.optim:
        for seed in args.seed:
            folder = Path("runs", f"{name}-{args.model}-{optim}", str(seed))
            if args.output_dir is not None:
                folder = Path(args.output_dir, optim if len(args.optim) > 1 else "",
                              str(seed) if len(args.seed) > 1 else "")
            check_folder(folder, args.resume)
            folders[optim, seed] = folder
    return folders


def lock(folder):
    """Own a run's folder as long as the returned file is open and this process lives.

    A lock of this kind (POSIX) is not inherited by workers, which may outlive a killed process.
    """
    file = open(folder / ".lock", "a")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UsageError(f"{folder} is in use by another process that is running there: wait for "
                         "its end, or name another folder with --output_dir")
    except (ImportError, OSError):             # Windows; a file system without locks
        pass
    return file


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

class Progress:
    """A running epoch: steps taken, seconds, of which waited for data, and this rank's sums."""

    def __init__(self, ranks, saved=None):
        double = torch.float32 if ranks.device.type == "mps" else torch.float64
        self.ranks, self.step, self.seconds, self.waited = ranks, 0, 0.0, 0.0
        self.count, self.sums = 0, torch.zeros(2, dtype=double, device=ranks.device)
        if saved is not None:
            self.step, self.seconds, self.waited = (
                saved[name] for name in ("step", "seconds", "waited"))
            sums = torch.tensor(saved["sums"], dtype=torch.float64)
            if len(sums) == ranks.world:
                sums = sums[ranks.rank]
            else:                # other ranks than then: the first takes it all
                sums = sums.sum(0) * (ranks.rank == 0)
            self.sums.copy_(sums[:2])
            self.count = int(sums[2])

    def add(self, loss, count, hits=0):
        """Count in the mean loss and the hits of so many samples; nothing is read from a GPU."""
        self.sums += torch.stack([loss.detach() * count, torch.as_tensor(hits).to(loss)])
        self.count += count

    def saved(self):
        """For a checkpoint, with the sums of all ranks."""
        sums = self.ranks.gather([*self.sums.tolist(), self.count])
        return dict(step=self.step, seconds=self.seconds, waited=self.waited, sums=sums)

    def means(self):
        """Over all ranks: loss, hits in per cent, samples. Makes the hosts wait for the GPUs."""
        count = self.sums.new_tensor([self.count])
        loss, hits, count = self.ranks.total(torch.cat([self.sums, count])).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError("the training loss is not finite")
        some = max(count, 1)     # none, if a run is saved before its first step
        return loss / some, 100 * hits / some, int(count)


FAILED = 1000                    # beyond all signals


class Run:
    """One run in its folder: what it has done so far, and all that can end or continue it.

    config: all that decides the run, with model, optim, seed, epochs and data, a fingerprint.
    parts: {name in the checkpoint: what has state_dict and load_state_dict}. columns: of log.csv.
    machine: names in config that may change between two sessions, since what is computed does not
    depend on them. All ranks call each method together.
    """

    def __init__(self, folder, config, parts, columns, ranks, stop, minutes, machine=()):
        self.folder, self.config, self.parts, self.columns = folder, config, parts, columns
        self.ranks, self.stop, self.minutes, self.machine = ranks, stop, minutes, machine
        self.rows, self.progress, self.lock, self.within_step = [], None, None, False
        self.first = None                      # what was done when this session's first step began

    # ---------------------------------------------------------------- its beginning

    def begin(self, resume, command):
        """Make the folder, or restore what it holds: rows of finished epochs, progress of one."""
        there = self.ranks.gather((self.folder / "checkpoint.pt").exists())
        if len(set(there)) > 1:
            raise UsageError(f"{self.folder}/checkpoint.pt is there for some processes only: "
                             "--output_dir is to be in a place that all machines share")
        self.ranks.together(lambda: self.restore(there[0], resume, command))
        self.began, self.due = time.monotonic(), time.monotonic() + 60 * self.minutes

    def restore(self, there, resume, command):
        first, extended = self.ranks.rank == 0, False
        if first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                check_folder(self.folder, resume)
                self.lock = lock(self.folder)
            except OSError as error:
                raise UsageError(f"{self.folder} cannot be made ({error.strerror}): name another "
                                 "one with --output_dir")
        if there:
            extended = self.load()
            print(f"resumed after epoch {len(self.rows)} of {self.config['epochs']}"
                  + (f" and {self.progress.step} steps" if self.progress else ""), flush=True)
        elif resume:
            print(f"--resume: no checkpoint in {self.folder}, so this run starts anew", flush=True)
        if first and (not there or extended):
            optimizer = self.parts["optimizer"]
            write_json(self.folder / "config.json", dict(
                self.config, device=str(self.ranks.device), ranks=self.ranks.world,
                torch=torch.__version__, command=command, optimizer=repr(optimizer).splitlines()))
        if first and self.rows:
            self.write_log()

    def load(self):
        """Put the folder's checkpoint into the parts; whether the run goes on for more epochs."""
        path, config = self.folder / "checkpoint.pt", self.config
        saved = read_checkpoint(path)
        old = saved["config"]
        differ = [name for name in {**old, **config}
                  if name not in self.machine and old.get(name) != config.get(name)]
        extended = old.get("epochs") != config["epochs"]
        if differ == ["data"]:
            raise UsageError(f"{path} was trained on other data: the names of files or classes, "
                             "labels or contents have changed since. Restore them to continue it, "
                             "or name another folder with --output_dir")
        if differ:
            names = ", ".join(f"--{name} (was {old.get(name)}, now {config.get(name)})"
                              for name in differ)
            why = "" if differ != ["epochs"] else "; the schedule's rates depend on the number " \
                "of epochs, so the ones done would have been others"
            raise UsageError(f"{path} belongs to another configuration, {names}{why}: repeat its "
                             "own flags and data to continue it, or name another folder with "
                             "--output_dir")
        if len(saved["log"]) + bool(saved["partial"]) > config["epochs"]:
            raise UsageError(f"{path} has more than --epochs {config['epochs']} behind it already")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} does not fit this version of {config['model']} and "
                             f"{config['optim']} ({str(error).splitlines()[0]})")
        self.rows = saved["log"]
        self.progress = saved["partial"] and Progress(self.ranks, saved["partial"])
        if extended:
            print(f"{old['epochs']} epochs become {config['epochs']}: the schedule is the same, so "
                  "this is the run that was begun with so many", flush=True)
        return extended

    # ---------------------------------------------------------------- its epochs

    @contextlib.contextmanager
    def epoch(self, number):
        """Around the training and testing of an epoch, counted from 0: its Progress.

        What ends a run leaves a checkpoint from which nothing is lost; within a step, where a
        model is half changed, it leaves the last one.
        """
        self.progress = self.progress or Progress(self.ranks)
        self.stop.noting = True
        try:
            yield self.progress
        except (KeyboardInterrupt, DataError, UsageError) as error:
            if self.within_step:
                raise
            where = f"in epoch {number + 1} after step {self.progress.step}"
            self.save()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(error.args[0], where)
            raise UsageError(f"{str(error).rstrip('.')}; the run is saved {where}, and --resume "
                             "continues there")
        except FloatingPointError as error:
            raise Diverged(f"training diverged in epoch {number + 1} ({error}): try a smaller "
                           f"--lr, a longer --warmup or more --damping; {self.folder} keeps what "
                           "was before")
        finally:
            self.stop.noting = self.within_step = False

    def steps(self, batches, total, number, every=None):
        """Yield the batches of epoch `number` that are still to come, of `total` in all.

        Between two of them the ranks agree whether to go on: a signal to any of them, or an image
        that one cannot read, ends all after the same step; the first one's clock tells when to
        save. Every 50 steps the loss is read, which makes a host wait for its GPU; or every so
        many, and then a line is printed where there is no bar.
        """
        progress, batches, text = self.progress, iter(batches), self.text(number)
        self.first = self.done(total) if self.first is None else self.first
        bar = tqdm(desc=text, total=total, initial=progress.step, leave=False,
                   disable=self.ranks.rank > 0 or None, dynamic_ncols=True)
        before, start = progress.seconds, time.perf_counter()
        while True:
            problem, waiting = None, time.perf_counter()
            try:
                batch = next(batches) if progress.step < total else None
            except (DataError, OSError) as error:
                problem = str(error)
            progress.waited += time.perf_counter() - waiting
            self.pause(problem, bar, total)
            if batch is None:
                break
            torch.manual_seed(seed_of(self.config["seed"], number, progress.step, self.ranks.rank))
            self.within_step = True
            yield batch
            self.within_step = False
            progress.step += 1
            bar.update()
            if progress.step % (every or 50) == 0 or progress.step == total:
                loss, _, count = progress.means()
                progress.seconds = before + time.perf_counter() - start
                said = f"loss {loss:.4f}, {self.left(total)} left"
                bar.set_postfix_str(said)
                if every and bar.disable and progress.step < total:
                    print(f"{text}  step {progress.step}/{total}  {said}, "
                          f"{count / progress.seconds:.0f} images/s, "
                          f"{progress.waited / progress.seconds:.0%} waiting", flush=True)
            progress.seconds = before + time.perf_counter() - start
        bar.close()
        if not all(p.isfinite().all() for p in self.parts["model"].parameters()):
            raise FloatingPointError("a weight is not finite")

    def pause(self, problem, bar, total):
        """Save if it is time, and end if a signal or a problem came to a rank."""
        late = self.ranks.rank == 0 and time.monotonic() >= self.due
        news = self.ranks.highest(FAILED if problem else self.stop.number or late)
        if news == FAILED:
            raise UsageError(next(filter(None, self.ranks.gather(problem))))
        if news > 1:
            raise KeyboardInterrupt(news)
        if news:
            self.progress.means()              # a loss that is not finite is not saved
            self.save()
            if bar.disable:
                print(f"{self.text(len(self.rows))}  step {self.progress.step}/{total}  saved, "
                      f"{self.left(total)} left", flush=True)

    def add(self, row, text):
        """An epoch is over: log, checkpoint, and a line of at most 80 columns."""
        self.stop.noting = True
        self.rows.append({name: row.get(name) for name in self.columns})
        self.progress = None
        self.save()
        if self.ranks.rank == 0:
            self.write_log()
        end = f"{self.left()} left" if len(self.rows) < self.config["epochs"] else \
            in_words(time.monotonic() - self.began)
        print(f"{self.text(len(self.rows) - 1)}  {text}  {end}", flush=True)
        self.stop.noting = False

    def text(self, number):
        return f"epoch {number + 1:3d}/{self.config['epochs']}"

    def done(self, total=1):
        """Epochs, of which the running one has so many steps."""
        return len(self.rows) + (self.progress.step / total if self.progress else 0)

    def left(self, total=1):
        """The time that is left of the whole run, in words."""
        done = self.done(total)
        if done == self.first:
            return "unknown time"
        rate = (time.monotonic() - self.began) / (done - self.first)
        return in_words(rate * (self.config["epochs"] - done))

    # ---------------------------------------------------------------- what is left of it

    def save(self):
        """Write the checkpoint, by the first rank; nobody goes on, or ends, before it is there.

        Parameters, statistics and what evaluation uses are the same on all ranks. The BatchNorm
        statistics of an unfinished epoch are not, but there DDP goes on with the first rank's in
        any case.
        """
        partial = self.progress and self.progress.saved()

        def write():
            if self.ranks.rank == 0:
                content = dict(config=self.config, epoch=len(self.rows), log=self.rows,
                               partial=partial)
                content |= {name: part.state_dict() for name, part in self.parts.items()}
                write_file(self.folder / "checkpoint.pt", lambda file: torch.save(content, file))
        self.stop.saving = True
        try:
            self.ranks.together(write)
        finally:
            self.stop.saving = False
        self.due = time.monotonic() + 60 * self.minutes

    def write_log(self):
        def text(value):
            return "" if value is None else str(value) if isinstance(value, int) else f"{value:.9g}"
        lines = [",".join(self.columns)] + [",".join(text(row[name]) for name in self.columns)
                                            for row in self.rows]
        write_file(self.folder / "log.csv", lambda file: file.write(
            ("\n".join(lines) + "\n").encode()))

    def finish(self):
        """The record of a finished run, which is written to its folder; others may use that now."""
        config = self.config
        record = dict(model=config["model"], optim=config["optim"], seed=config["seed"],
                      device=str(self.ranks.device), processes=self.ranks.world,
                      torch=torch.__version__, **self.rows[-1],
                      state_bytes=state_bytes(self.parts["optimizer"]), output_dir=str(self.folder))
        if self.ranks.rank == 0:
            write_json(self.folder / "record.json", record)
        if self.lock is not None:
            self.lock.close()
        return record


def in_words(seconds):
    for unit, size, least in (("days", 86400, 2), ("h", 3600, 1.5), ("min", 60, 1.5)):
        if seconds >= least * size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds:.0f} s"


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
# What a person sees
# ---------------------------------------------------------------------------------------------

def describe(model, optimizer, config, device):
    """What is about to run."""
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else \
        torch.cuda.get_device_name(device) if device.type == "cuda" else "GPU"
    print(f"{device.type} ({where}), torch {torch.__version__}, {config['model']} with "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(textwrap.fill("  ".join(f"{k}={v}".replace(" ", "") for k, v in config.items()), 80,
                        break_on_hyphens=False))
    # what an optimizer of this folder prints below the options that it shares with torch's
    lines = repr(optimizer).rpartition("\n)\n")[2].splitlines() if config["optim"] in FILES else \
        ["no layer is preconditioned"]
    lines = [line for text in lines
             for line in textwrap.wrap(text, 80, subsequent_indent="    ")]
    print(*lines[:5], sep="\n")
    if len(lines) > 5:
        print(f"    ... {len(lines) - 5} lines more, all of them in config.json")
    sys.stdout.flush()


def summarise(records, logs, metrics):
    """Of an optimizer's runs, one a seed: metrics after the last epoch, and what they cost."""
    result = dict(optim=records[0]["optim"], run=[record["seed"] for record in records])
    for name in metrics:
        values = [record[name] for record in records]
        result[name] = values
        result[f"{name}_mean"] = statistics.mean(values)
        result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    rows = [row for log in logs for row in log]
    result.update(train_loss=statistics.mean(record["train_loss"] for record in records),
                  seconds_per_epoch=statistics.mean(row["seconds"] for row in rows),
                  peak_memory=max(row["peak_memory"] for row in rows),
                  state_bytes=records[0]["state_bytes"],
                  output_dir=[record["output_dir"] for record in records])
    return result


def print_table(title, metrics, results):
    """metrics: {name in the results: (heading, digits)}"""
    print(f"\n{title}\noptimizer   seeds"
          + "".join(f"  {heading:>18}" for heading, _ in metrics.values())
          + "  train loss  s/epoch      state")
    for r in results:
        line = f"{r['optim']:<10}  {len(r['run']):5d}"
        for name, (_, digits) in metrics.items():
            std = r[f"{name}_std"]
            std = "" if std is None else f" ± {std:.{digits}f}"
            line += f"  {r[f'{name}_mean']:.{digits}f}{std}".rjust(20)
        print(f"{line}  {r['train_loss']:10.4f}  {r['seconds_per_epoch']:7.1f}  "
              f"{r['state_bytes'] / 2 ** 20:5.2f} MiB")


def print_record(record):
    """As the last line, where no person reads it; each run's own is in its folder anyway."""
    if not sys.stdout.isatty():
        print(json.dumps(record), flush=True)


def print_anything():
    """Print what the console or the file has no characters for as \\u03bb, instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------
# From the command to the exit status
# ---------------------------------------------------------------------------------------------

def run_script(script, parse, work, smoke, argv):
    """Run work(args, stop), or smoke(stop), on this rank; the exit status.

    Only the first rank speaks, but for errors that the others cannot know of.
    """
    rank, stop = int(os.environ.get("RANK", 0)), Stop()
    print_anything()
    try:
        with stop.listening(), warnings.catch_warnings(), \
                contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
            if rank:
                warnings.simplefilter("ignore")
            args = parse(argv)
            if args.smoke:
                if "WORLD_SIZE" in os.environ:
                    raise UsageError("--smoke is for one process: start it without torchrun")
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):
                    names = smoke(stop)
                print(f"smoke test passed: {' '.join(names)}, {time.perf_counter() - start:.0f} s")
            else:
                work(args, stop)
        return 0
    except KeyboardInterrupt as interrupt:
        number, *where = interrupt.args or (signal.SIGINT,)
        tell(f"\nstopped {where[0]}; the same command with --resume continues there" if where
             else "\nstopped")
        return 128 + number
    except (UsageError, Diverged) as error:            # of all ranks: the first one says it
        tell(f"{script}: {error}")
        if rank:                 # torchrun ends all ranks when one ends, and the first is to speak
            time.sleep(5)
        return 1 if isinstance(error, Diverged) else 2
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else 2
    except RuntimeError as error:
        if "RANK" not in os.environ or not isinstance(error, dist.DistError) and \
                not re.search("onnection|Timed out", str(error)):
            raise
        tell(f"{script}: another process of this run has ended, which is why this one does")
        return 1
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
