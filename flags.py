"""The command line that the scripts share: types of values, tables of flags, optimizers' recipes.

    parser = parser_of("train.py", __doc__, {"training": {"epochs --epoch": dict(
        default=200, type=COUNT, help="passes over the training set")}, ...}, [RECIPES])
    args = parser.parse_args(argv)

A flag stands in a table as {"name --alias": what argparse takes}, a recipe as {flag: value}.
"""
import argparse
import math
import os
import re
import shlex
import shutil
import sys

import torch

from adafisher import AdaFisher, AdaFisherW
from download import DataError, expand
from foof import FOOF
from kfac import KFAC
from mac import MAC
from nysact import NysAct
from ranks import UsageError, tell

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
    "mac": dict(CURVATURE, input_covariance=True, calibrate=False, attention=True),
    "nysact": dict(CURVATURE, rank=10, sketch="gaussian"),
    "foof": CURVATURE,
    "kfac": dict(CURVATURE, damping=0.03, fisher="empirical", inverse="factored",
                 weight_sharing="expand", kl_clip=1e-3),
    "adafisher": dict(ADAFISHER, weight_decay=5e-4, damping=1e-3),
    "adafisherw": dict(ADAFISHER, weight_decay=0.01, damping=3e-3),
}
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
OURS = {"mac": MAC, "nysact": NysAct, "foof": FOOF, "kfac": KFAC, "adafisher": AdaFisher,
        "adafisherw": AdaFisherW}


# ---------------------------------------------------------------------------------------------
# Types: what a flag's text becomes
# ---------------------------------------------------------------------------------------------

def number(kind, rule, words):
    """An argparse type: a number for which rule holds, described by words in the error."""
    limit = ", at most 1e15" if rule(10 ** 15) else ""           # float32 has room left

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (rule(value) and value <= 1e15):                  # of nan neither holds
            raise argparse.ArgumentTypeError(f"'{text}' is not {words}{limit}")
        return value
    parse.metavar = "N" if kind is int else "X"
    return parse


POSITIVE = number(float, lambda v: v > 0, "a positive number")
NOT_NEGATIVE = number(float, lambda v: v >= 0, "a number from 0 on")
FRACTION = number(float, lambda v: 0 <= v < 1, "a number of at least 0 and below 1")
COUNT = number(int, lambda v: v >= 1, "a whole number from 1 on")
COUNT_OR_ZERO = number(int, lambda v: v >= 0, "a whole number from 0 on")
SEED = number(int, lambda v: 0 <= v < 2 ** 31, "a whole number from 0 to 2147483647")


def user_path(text):
    """An argparse type: a path, with ~ and ~user expanded."""
    if not text:                 # of a variable that is not set; it would mean this very folder
        raise argparse.ArgumentTypeError("it is empty, and is to name a file or a folder")
    try:
        return expand(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip("."))


user_path.metavar = "PATH"


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


SWITCH = dict(type=truth, nargs="?", const=True, metavar="BOOL")


# ---------------------------------------------------------------------------------------------
# Tables of flags
# ---------------------------------------------------------------------------------------------

OPTIMIZER_FLAGS = {
    "lr": dict(type=POSITIVE, help="learning rate, at any batch size"),
    "momentum": dict(type=FRACTION, help="momentum"),
    "nesterov": dict(SWITCH, help="Nesterov's momentum"),
    "weight_decay": dict(type=NOT_NEGATIVE, help="L2 penalty; in adamw and adafisherw decoupled"),
    "decoupled_weight_decay": dict(
        SWITCH, help="shrink the weights directly, not by way of the gradient"),
    "damping": dict(type=POSITIVE, help="what is added to the curvature; large means SGD"),
    "stat_decay": dict(type=FRACTION, help="weight of the past in the averages"),
    "tcov": dict(type=COUNT, help="steps between updates of the statistics"),
    "tinv": dict(type=COUNT, help="steps between updates of what is applied"),
    "input_covariance": dict(
        SWITCH, help="give the first layer its whole covariance, as published; false: its mean "
        "input, as all others"),
    "calibrate": dict(
        SWITCH, help="fix the first layer's covariance by one pass over the data before training, "
        "as published, in place of the average during training"),
    "attention": dict(
        SWITCH, help="give the values of attention the mean input that they are weighed to, as "
        "published; false: the plain mean"),
    "rank": dict(type=COUNT, help="columns of the sketch"),
    "sketch": dict(type=str.lower, choices=("gaussian", "subcolumns"), help="kind of the sketch"),
    "fisher": dict(type=str.lower, choices=("empirical", "sampled"),
                   help="from the true labels, or from labels sampled from the model"),
    "inverse": dict(
        type=str.lower, choices=("factored", "eigen"),
        help="damp each factor, or the Kronecker product exactly in its eigenbasis"),
    "weight_sharing": dict(
        type=str.lower, choices=("expand", "reduce"),
        help="positions of a map, or tokens, count as samples, or are averaged first"),
    "kl_clip": dict(type=POSITIVE,
                    help="bound on the change of the output by a step; a large one is none"),
    "beta": dict(type=FRACTION, help="decay of the first moment"),
    "gamma": dict(type=FRACTION, help="weight of the past in the factors"),
    "averaging": dict(
        type=str.lower, choices=("released", "printed"),
        help="of the factors: as the released code does, or by the paper's equations"),
}


def several_flags(optim):
    """The flags that may be given several values, for as many runs."""
    return {
        "optim --opt": dict(
            default=[optim], nargs="+", choices=[*TORCH, *OURS],
            help="one or several of %(choices)s; several run one after another on the same data, "
            "and a flag that is given holds for all of them"),
        "seed --run": dict(default=[0], nargs="+", type=SEED,
                           help="of everything random; several give mean ± std at the end")}


def machine_flags(place, amp="bfloat16"):
    """What every script can be told about the machine and the files.

    place: the default folder. amp: what autocast takes.
    """
    return {
        "device": dict(
            default="auto", type=device_name, metavar="DEVICE",
            help="auto takes a GPU where there is one, cuda:1 the second; under torchrun each "
            "process takes its own"),
        "amp": dict(default=False, help=f"autocast to {amp}"),
        "compile": dict(default=False, help="torch.compile the model"),
        "output_dir --output": dict(
            type=user_path, help="folder of the run, and where there are several of a subfolder "
            f"for each optimizer and seed; without: {place}. Of its log.csv accuracies are in per "
            "cent, losses in nats, seconds those of the training pass, and peak_memory is in MiB: "
            "of the GPU in this run, or without a GPU of the process so far"),
        "resume": dict(
            default=False, nargs="?", const=True, type=no_value, metavar="",
            help="continue the run of the same command, or start it if it has not begun"),
        "checkpoint_minutes": dict(default=10.0, type=NOT_NEGATIVE,
                                   help="save at least so often, also within an epoch"),
        "smoke": dict(default=False,
                      help="try everything for a few steps; other flags have no effect")}


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


def parser_of(script, manual, tables, *recipes):
    """tables: {title of a group: its flags}. recipes: lists of recipes to show as defaults."""
    parser = Parser(
        description=manual, usage=f"python {script} [flags]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="- and _ are the same in the names of flags, small and capital letters in their "
        "words; of a flag given twice the last value counts. A switch takes true or false, and "
        "means true alone.")
    for title, table in tables.items():
        group = parser.add_argument_group(title)
        for names, settings in table.items():
            name, *alias = names.split()
            values = next(filter(None, (published(name, *those) for those in recipes)), None)
            add_flag(group, name, alias, values, **settings)
    return parser


def add_flag(group, name, alias, values, help, default=None, **more):
    """Switches are known by their default, words by their choices; the help shows the default."""
    if isinstance(default, bool):
        more = SWITCH | more
    elif "choices" in more:
        more = dict(type=str.lower, metavar="NAME" if len(more["choices"]) > 5 else None) | more
    else:
        more = dict(metavar=getattr(more["type"], "metavar", "NAME")) | more
    if values is None and default not in (None, False):
        listed = default if isinstance(default, list) else [default]
        values = "default " + " ".join(f"{v:.3g}" if type(v) is float else str(v) for v in listed)
    group.add_argument(f"--{name}", *alias, dest=name, default=default,
                       help=f"{help} ({values})" if values else help, **more)


def published(name, *recipes):
    """What is taken where a flag is not given: '0.1 for sgd, mac; 0.001 for adam'."""
    takers = {}
    for taker in recipes[0]:
        if name in recipes[0][taker]:
            values = dict.fromkeys(str(recipe[taker][name]) for recipe in recipes)
            takers.setdefault(" | ".join(values), []).append(taker)
    return "; ".join(f"{value} for {', '.join(names)}" for value, names in takers.items())


def chosen(args, recipe):
    """{flag: its value as given, or as in the recipe}"""
    given = {name: getattr(args, name, None) for name in recipe}
    return {name: recipe[name] if value is None else value for name, value in given.items()}


# ---------------------------------------------------------------------------------------------
# What is wrong with a command beyond single values, and the optimizer that it asks for
# ---------------------------------------------------------------------------------------------

def note_unused(names, where):
    if names:
        tell("note: no use for", *(f"--{name}" for name in sorted(names)), "in", where)


def check_optimizers(args, optims, recipes):
    """Note the flags that none of these optimizers takes."""
    given = {name for recipe in recipes.values() for name in recipe
             if getattr(args, name) is not None}
    note_unused(given - {name for optim in optims for name in recipes[optim]}, " ".join(optims))
    if getattr(args, "calibrate", None) and args.input_covariance is False:
        raise UsageError("--calibrate fixes the covariance that --input_covariance false leaves "
                         "out: choose one of them")


def check_compiler(args, device):
    if args.compile and device.type == "cpu" and not os.environ.get("CXX") \
            and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler on the CPU, and none was found")


FSDP = {"fsdp": dict(default=False, help="divide parameters, gradients and momentum among the "
                     "processes of torchrun (torch's fully_shard)")}


def check_fsdp(args, world, amp_dtype=None):
    if args.fsdp and world == 1:
        raise UsageError("--fsdp divides a model among processes: start several with torchrun")
    for name in ("compile", "channels_last", "model_ema"):
        if args.fsdp and getattr(args, name, False):
            raise UsageError(f"--fsdp does not go with --{name}: leave one of them out")
    if args.fsdp and amp_dtype == "float16":       # as given, or of a GPU that has no other
        raise UsageError("--fsdp does not go with --amp in float16: --amp_dtype bfloat16 needs no "
                         "scaling")


def make_optimizer(model, groups, config, recipe, **more):
    """The optimizer of config on groups of parameters; recipe: the flags that it takes."""
    optim = config["optim"]
    flags = {name: config[name] for name in recipe if name not in ("calibrate", "embedding_lr")}
    if optim in TORCH:
        return TORCH[optim](groups, **flags)
    if optim == "nysact":
        more["seed"] = config["seed"]          # its sketch is drawn at random
    return OURS[optim](model, params=groups, **flags, **more)
