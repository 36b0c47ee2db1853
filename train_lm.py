"""Train a GPT on text with MAC, one of its siblings, or a baseline, and log loss and perplexity.

    python train_lm.py --smoke                    # a few batches of everything, no data, seconds
    python train_lm.py --dataset grammar --model char --optim mac sgd --epoch 1     # generated text
    python train_lm.py --text shakespeare.txt --model char --optim mac --epoch 3    # by characters
    python train_lm.py --model char --optim mac adamw --epoch 2       # WikiText-2, a small network
    python train_lm.py --device cuda --amp        # AdaFisherW's published size and settings
    torchrun --nproc_per_node 4 train_lm.py --model gpt2_small --optim mac --amp --accumulate 2

Without flags: AdaFisherW on WikiText-2 with the size (4 layers, 12 heads, width 768, context 256)
and the settings of its paper, but for the embeddings: there they are GPT-1's, frozen, and here they
are learned. MAC's settings on OpenWebText for its 15,000 steps of 32 windows, but by characters,
where its code takes word pieces; the file needs 274 million of them, a tenth for validation:

    python train_lm.py --text openwebtext.txt --train_size 245760512 --epoch 1 --batch_size 32 \\
        --model nanogpt --optim mac --lr 1e-3 --min_lr 0.06 --warmup 2000 --nesterov --tinv 5 \\
        --weight_decay 0.1 --decoupled_weight_decay --clip 1 --amp

Every run writes config.json, log.csv and checkpoint.pt to its own folder. The same command with
--resume continues an interrupted run, on the CPU to the same bits. The last line of the output is
a JSON record of the results. Exit status: 0, or 1 when training diverged, 2 for a wrong command,
130 and 143 when interrupted and terminated.
"""
import argparse
import contextlib
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
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import text as datasets
from models import GPT, GPT_SIZES
from train_cifar import (COUNT, COUNT_OR_ZERO, FILES, FRACTION, NOT_NEGATIVE, POSITIVE, SEED,
                         Diverged, Parser, UsageError, check_folder, describe, optimizer_class,
                         peak_memory, print_anything, state_bytes, terminate, user_path,
                         write_file)

# A flag that is not given takes the value of its optimizer's row, and an optimizer takes the flags
# of its row and no others. adafisherw: AdaFisher's language models; adafisher takes the coupled
# decay of its image networks. mac: damping and periods of MAC's nanoGPT folder, decay of its other
# Transformers. The other rates suit small networks (results/tinyshakespeare/rates.csv); none are
# published for this task with embeddings that are learned.
SGD = dict(lr=0.3, momentum=0.9, nesterov=False, weight_decay=1e-4, embedding_lr=1.0)
CURVATURE = dict(SGD, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95, tcov=5, tinv=50)
# Embeddings take F̃ = 1, a thousandth of the step of a layer's flat directions: hence embedding_lr.
ADAFISHER = dict(lr=1e-4, beta=0.9, gamma=0.8, tcov=100, as_released=False, damping=1e-3,
                 weight_decay=0.1, embedding_lr=1000.0)
RECIPES = {
    "sgd": SGD,
    "adam": dict(lr=1e-3, weight_decay=0.0, embedding_lr=1.0),
    "adamw": dict(lr=1e-3, weight_decay=0.1, embedding_lr=1.0),
    "mac": dict(CURVATURE, tinv=5),
    "nysact": dict(CURVATURE, rank=10, sketch="gaussian"),
    "foof": CURVATURE,
    "kfac": dict(CURVATURE, damping=0.03, fisher="empirical", inverse="factored",
                 weight_sharing="expand", kl_clip=1e-3),
    "adafisher": dict(ADAFISHER, weight_decay=5e-4),
    "adafisherw": ADAFISHER,
}
COLUMNS = ("epoch", "lr", "train_loss", "train_perplexity", "valid_loss", "valid_perplexity",
           "seconds", "peak_memory")
# Of a run's configuration, what follows from the text and from flags of other names.
DERIVED = ("train_tokens", "valid_tokens", "vocabulary", "text_crc32", "tied", "bias")
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # of torchrun


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

def parse(argv):
    """The command line; flags of RECIPES that were not given are None."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python train_lm.py [flags]", allow_abbrev=False,
                    epilog="- and _ are the same in the names of flags; of a flag given twice the "
                           "last value counts.")

    def flag(group, name, *alias, help, default=None, **kwargs):
        takers = {}              # {value in the recipe: optimizers}
        for optim, recipe in RECIPES.items():
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
        "optimizer (who takes a flag, and the value where it is not given)"))
    add_schedule_flags(flag, parser.add_argument_group("training"))
    add_machine_flags(flag, parser.add_argument_group("machine and files"))
    argv = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
    args = parser.parse_args(argv)
    args.optim, args.run = list(dict.fromkeys(args.optim)), list(dict.fromkeys(args.run))
    return args


def add_run_flags(flag, group):
    flag(group, "dataset", default="wikitext2", choices=datasets.TEXTS,
         help="wikitext2 is read by words; grammar is generated, needs no download and is read by "
         "characters")
    flag(group, "text", type=user_path, metavar="FILE", help="read this UTF-8 file, plain or .gz, "
         "by characters; its last tenth is for validation")
    flag(group, "data_dir", default="data", type=user_path, metavar="DIR",
         help="folder that holds wikitext2, or receives it")
    flag(group, "train_file", metavar="NAME",
         help="file of wikitext2's folder to train on (default train.txt)")
    flag(group, "valid_file", metavar="NAME", help="file of wikitext2's folder to evaluate on "
         "(default valid.txt; test.txt for what papers report)")
    flag(group, "train_size", type=COUNT, metavar="N", help="use the first N training tokens")
    flag(group, "valid_size", type=COUNT, metavar="N", help="use the first N validation tokens")
    flag(group, "model", default="minigpt", choices=list(GPT_SIZES), metavar="NAME",
         help="%(choices)s: sizes, which the next four flags change")
    flag(group, "layers", type=COUNT, metavar="N", help="blocks")
    flag(group, "heads", type=COUNT, metavar="N", help="heads of attention, a divisor of the width")
    flag(group, "width", type=COUNT, metavar="N", help="numbers per token")
    flag(group, "context", type=COUNT, metavar="N", help="tokens that the network sees at a time")
    flag(group, "untied", action="store_true", default=False,
         help="give the head a weight of its own, which is preconditioned; without: the token "
         "embedding's, which is not")
    flag(group, "dropout", default=0.0, type=FRACTION, metavar="X", help="dropout")
    flag(group, "optim", "--opt", default=["adafisherw"], nargs="+", choices=list(RECIPES),
         metavar="NAME", help="one or several of %(choices)s; several run one after another on the "
         "same data, and a flag that is given holds for all of them")
    flag(group, "run", default=[0], nargs="+", type=SEED, metavar="SEED",
         help="seed of everything random; several give mean ± std at the end")


def add_optimizer_flags(flag, group):
    flag(group, "lr", type=POSITIVE, metavar="X", help="learning rate")
    flag(group, "embedding_lr", type=POSITIVE, metavar="X", help="learning rate of the embeddings, "
         "and of a head that shares theirs, as a multiple of --lr")
    flag(group, "momentum", type=FRACTION, metavar="X", help="momentum")
    flag(group, "nesterov", action="store_true", help="Nesterov's momentum")
    flag(group, "weight_decay", type=NOT_NEGATIVE, metavar="X", help="L2 penalty on matrices and "
         "embeddings; in adamw and adafisherw decoupled")
    flag(group, "decoupled_weight_decay", action="store_true",
         help="shrink the weights directly, not by way of the gradient")
    flag(group, "damping", type=POSITIVE, metavar="X",
         help="what is added to the curvature; large means SGD")
    flag(group, "stat_decay", type=FRACTION, metavar="X",
         help="weight of the past in the moving averages")
    flag(group, "tcov", type=COUNT, metavar="N", help="steps between updates of the statistics")
    flag(group, "tinv", type=COUNT, metavar="N", help="steps between updates of what is applied")
    flag(group, "rank", type=COUNT, metavar="N", help="columns of the sketch")
    flag(group, "sketch", choices=("gaussian", "subcolumns"), help="kind of the sketch")
    flag(group, "fisher", choices=("empirical", "sampled"),
         help="from the true next tokens, or from tokens sampled from the model")
    flag(group, "inverse", choices=("factored", "eigen"),
         help="damp each factor, or the Kronecker product exactly in its eigenbasis")
    flag(group, "weight_sharing", choices=("expand", "reduce"),
         help="tokens of a window count as samples, or are averaged first")
    flag(group, "kl_clip", type=POSITIVE, metavar="X",
         help="bound on the change of the model's output by a step; a large one is none")
    flag(group, "beta", type=FRACTION, metavar="X", help="decay of the first moment")
    flag(group, "gamma", type=FRACTION, metavar="X", help="weight of the past in the factors")
    flag(group, "as_released", action="store_true",
         help="average and normalise as the released code does, not as the paper")


def add_schedule_flags(flag, group):
    flag(group, "batch_size", default=32, type=COUNT, metavar="N",
         help="windows per step, over all ranks and micro-batches")
    flag(group, "accumulate", default=1, type=COUNT, metavar="N",
         help="take each step's windows in N micro-batches")
    flag(group, "epoch", "--epochs", default=50, type=COUNT, metavar="N",
         help="passes over the training text")
    flag(group, "schedule", default="cosine", choices=("cosine", "constant"),
         help="the learning rate after warm-up; it changes every step")
    flag(group, "min_lr", default=0.0, type=FRACTION, metavar="X",
         help="where cosine ends, as a fraction of --lr")
    flag(group, "warmup", default=100, type=COUNT_OR_ZERO, metavar="N",
         help="steps of linear warm-up; may be more than there are")
    flag(group, "clip", default=1.0, type=NOT_NEGATIVE, metavar="X",
         help="scale the gradient down to this norm before it is preconditioned; 0: never")


def add_machine_flags(flag, group):
    flag(group, "device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
         help="auto takes a GPU where there is one; under torchrun, one for each rank")
    flag(group, "amp", action="store_true", default=False, help="bfloat16 autocast")
    flag(group, "compile", action="store_true", default=False, help="torch.compile the model")
    flag(group, "sample", default=200, type=COUNT_OR_ZERO, metavar="N",
         help="tokens that the trained model writes at the end")
    flag(group, "output_dir", type=user_path, metavar="DIR",
         help="folder of the run, with a subfolder per optimizer and per seed where there are "
         "several; without: runs/TEXT-MODEL-OPTIM/SEED. Its log.csv gives losses in nats per "
         "token, the seconds of the training pass, and peak_memory in MiB: of the GPU in this run, "
         "or without a GPU of the process so far")
    flag(group, "resume", action="store_true", default=False,
         help="continue the runs of the same command, and start those that have not begun")
    flag(group, "smoke", action="store_true", default=False,
         help="try everything for a few batches; other flags have no effect")


def resolve(args, optim, seed, text):
    """All that decides one run: the flags as given or default, its optimizer's from the recipe."""
    config = dict(dataset=text_name(args), train_file=args.train_file, valid_file=args.valid_file,
                  train_tokens=len(text.train), valid_tokens=len(text.valid),
                  vocabulary=len(text.vocabulary), text_crc32=checksum(text), model=args.model)
    size = dict(GPT_SIZES[args.model], tied=not args.untied, dropout=args.dropout)
    for name in ("layers", "heads", "width", "context"):
        if getattr(args, name) is not None:
            size[name] = getattr(args, name)
    config.update(size, bias=size.get("bias", True), optim=optim, run=seed)
    for name, default in RECIPES[optim].items():
        given = getattr(args, name)
        config[name] = default if given is None else given
    for name in ("batch_size", "accumulate", "epoch", "schedule", "min_lr", "warmup", "clip", "amp",
                 "compile"):
        config[name] = getattr(args, name)
    return config


def checksum(text):
    """Of the tokens, which tells two texts of the same name, length and alphabet apart."""
    return zlib.crc32(text.valid.cpu().numpy(), zlib.crc32(text.train.cpu().numpy()))


def text_name(args):
    return args.dataset if args.text is None else Path(args.text).name


def check(args):
    """What is wrong with a command beyond single values, before anything is loaded; the device."""
    given = {name for recipe in RECIPES.values() for name in recipe
             if getattr(args, name) is not None}
    unused = given - {name for optim in args.optim for name in RECIPES[optim]}
    if unused and RANK == 0:
        print("note: no use for", *(f"--{name}" for name in sorted(unused)), "in",
              *args.optim, file=sys.stderr)
    files = [f"--{name}" for name in ("train_file", "valid_file") if getattr(args, name)]
    if files and (args.text is not None or args.dataset != "wikitext2"):
        raise UsageError(f"{files[0]} chooses among the files of --dataset wikitext2, and not of "
                         f"{text_name(args)}")
    if args.batch_size % (RANKS * args.accumulate):
        raise UsageError(f"--batch_size {args.batch_size} cannot be shared equally by {RANKS} "
                         f"ranks with {args.accumulate} micro-batches each (--accumulate)")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    device = args.device if args.device != "auto" else next(d for d in there if there[d])
    if not there[device]:
        raise UsageError(f"--device {device}: PyTorch finds none here; --device cpu works")
    if device == "mps" and RANKS > 1:
        raise UsageError(f"{RANKS} processes cannot share this GPU: use one, or --device cpu")
    if device == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise UsageError(f"torchrun started more processes than the {torch.cuda.device_count()} "
                         "GPUs here: give it --nproc_per_node of at most that")
    if args.compile and device == "cpu" and not os.environ.get("CXX") \
            and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler on the CPU, and none was found")
    return device


def run_folders(args):
    """The folder of each (optimizer, seed)."""
    folders = {}
    for optim in args.optim:
        for seed in args.run:
            folder = Path("runs", f"{text_name(args)}-{args.model}-{optim}", str(seed))
            if args.output_dir is not None:
                folder = Path(args.output_dir, optim if len(args.optim) > 1 else "",
                              str(seed) if len(args.run) > 1 else "")
            check_folder(folder, args.resume)
            folders[optim, seed] = folder
    return folders


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate
# ---------------------------------------------------------------------------------------------

def build(config, device):
    """The network and its optimizer on the device. One seed, one initialisation."""
    torch.manual_seed(config["run"])
    optim, vocabulary = config["optim"], config["vocabulary"]
    if optim == "kfac" and not config["tied"] and vocabulary > 2 ** 13:
        raise UsageError(f"--optim kfac with --untied would factor the head's {vocabulary}×"
                         f"{vocabulary} matrix: leave out --untied, and the head takes the plain "
                         "step")
    names = ("vocabulary", "context", "layers", "heads", "width", "bias", "tied", "dropout")
    try:
        model = GPT(**{name: config[name] for name in names}).to(device)
        flags = {name: config[name] for name in RECIPES[optim] if name != "embedding_lr"}
        if optim == "nysact":
            flags["seed"] = config["run"]      # its sketch is drawn at random
        if optim == "kfac":
            flags["loss_terms"] = "tokens"
        groups = parameter_groups(model, config)
        if optim in FILES:
            return model, optimizer_class(optim)(model, params=groups, **flags)
        return model, optimizer_class(optim)(groups, **flags)
    except ValueError as error:  # an impossible combination, in the words of who refused it
        raise UsageError(str(error))


def parameter_groups(model, config):
    """Matrices, vectors, embeddings: decay for all but the vectors, embedding_lr for the last.

    "rate" is a group's multiple of the learning rate. Decoupled decay is lr·wd a step: in the
    embeddings' group wd is divided by the multiple, so that they shrink as the matrices do.
    """
    embeddings = [model.wte.weight, model.wpe.weight]
    others = [p for p in model.parameters() if not any(p is e for e in embeddings)]
    rate, decay = config["embedding_lr"], config["weight_decay"]
    decoupled = config["optim"] in ("adamw", "adafisherw") or config.get("decoupled_weight_decay")
    return [dict(params=[p for p in others if p.dim() == 2], rate=1.0),
            dict(params=[p for p in others if p.dim() < 2], rate=1.0, weight_decay=0.0),
            dict(params=embeddings, rate=rate, weight_decay=decay / rate if decoupled else decay)]


def make_forward(model, optimizer, config, device):
    """Tokens → logits in float32. The optimizer's hooks are on the model before this wraps it."""
    if RANKS > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    compiled = torch.compile(model) if config["compile"] else model

    def forward(x):
        call = model if getattr(optimizer, "collecting", False) else compiled
        with torch.autocast(device.type, torch.bfloat16, enabled=config["amp"]):
            return call(x).float()
    forward.no_sync = model.no_sync if RANKS > 1 else contextlib.nullcontext
    return forward


def learning_rate(config, step, steps):
    """The rate at step `step` of `steps` in all, from 0: a function of nothing else."""
    lr, warmup = config["lr"], config["warmup"]
    if step < warmup:            # from the first step on more than zero, and full at step = warmup
        return lr * (step + 1) / (warmup + 1)
    if config["schedule"] == "constant":
        return lr
    low = config["min_lr"]
    wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return lr * (low + (1 - low) * wave)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def mean_over_ranks(value):
    """The mean of a tensor over all ranks, on the CPU in float64."""
    if RANKS > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value.cpu().double() / RANKS


def train_epoch(model, forward, optimizer, text, config, epoch):
    """One pass over the training text: mean loss in nats per token, while it learns."""
    # Dropout and the like depend on (seed, epoch, rank) alone: a resumed run needs no random state.
    torch.manual_seed((config["run"] * 1_000_003 + epoch + 1) * 4099 + RANK)
    model.train()
    batches = datasets.windows(text.train, config["context"], config["batch_size"],
                               seed=config["run"], epoch=epoch)
    steps = datasets.num_windows(text.train, config["context"]) // config["batch_size"]
    bar = tqdm(batches, f"epoch {epoch + 1}/{config['epoch']}", steps, leave=False,
               disable=None if RANK == 0 else True, dynamic_ncols=True)
    total, mean = torch.zeros((), device=text.train.device), 0.0
    for step, (x, y) in enumerate(bar):
        rate = learning_rate(config, epoch * steps + step, config["epoch"] * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        optimizer.zero_grad()
        total += backward(forward, optimizer, x[RANK::RANKS], y[RANK::RANKS], config)
        if config["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        if step % 50 == 49 or step + 1 == steps:       # a number read makes the host wait for a GPU
            mean = mean_over_ranks(total).item() / (step + 1)
            if not math.isfinite(mean):
                raise FloatingPointError("the training loss is not finite")
            bar.set_postfix(loss=f"{mean:.4f}")
    return mean


def backward(forward, optimizer, x, y, config):
    """Gradients of the mean loss over this rank's windows (B, T), in micro-batches; the loss."""
    total = 0.0
    for i, (x, y) in enumerate(zip(*(part.chunk(config["accumulate"]) for part in (x, y)))):
        last = i + 1 == config["accumulate"]           # only then do the ranks average gradients
        with contextlib.nullcontext() if last else forward.no_sync():
            logits = forward(x)                                                # (b, T, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / config["accumulate"]
            if config.get("fisher") == "sampled":
                optimizer.sample_fisher(logits)
            loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model, tokens, config):
    """Mean loss in nats over every token but the first, in windows that do not overlap."""
    model.eval()
    size = config["batch_size"] // RANKS // config["accumulate"]
    whole, rest = divmod(len(tokens) - 1, config["context"])
    sums = []
    for i, (x, y) in enumerate(tqdm(datasets.all_windows(tokens, config["context"], size), "valid",
                                    -(-whole // size) + (rest > 0), leave=False,
                                    disable=None if RANK == 0 else True)):
        if i % RANKS == RANK:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config["amp"]):
                logits = model(x)
            sums.append(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum"))
    total = torch.stack(sums).cpu().double().sum() if sums else torch.zeros((), dtype=torch.float64)
    if RANKS > 1:
        total = total.to(tokens.device)
        dist.all_reduce(total)
    return total.item() / (len(tokens) - 1)


def perplexity(loss):
    """exp of nats per token; of a loss that is far beyond any model's, inf."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def write(model, text, count, seed):
    """What the model writes after the end of a line: `count` tokens drawn one by one."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    end = "\n" if text.unit == "character" else "<eos>"
    tokens = [text.vocabulary.index(end) if end in text.vocabulary else 0]
    for _ in range(count):
        x = torch.tensor([tokens[-model.context:]], device=text.train.device)
        chances = model(x)[0, -1].float().softmax(-1).cpu()
        tokens.append(torch.multinomial(chances, 1, generator=generator).item())
    return datasets.spell(tokens[1:], text)


def train(config, text, folder, args, command, until=None):
    """One run, from its checkpoint if it has one, up to epoch `until`: its log and state size."""
    device = text.train.device
    model, optimizer = build(config, device)
    print(f"\n{config['optim']}, seed {config['run']}, in {folder}", flush=True)
    if config["run"] == args.run[0]:
        describe(model, optimizer, config, device)
    rows = begin(config, folder, model, optimizer, text, args.resume)
    if not rows and RANK == 0:
        facts = dict(config, device=device.type, ranks=RANKS, torch=torch.__version__,
                     command=command, optimizer=repr(optimizer).splitlines())
        facts = json.dumps(facts, indent=1, ensure_ascii=False).encode()
        write_file(folder / "config.json", lambda file: file.write(facts))
    forward = make_forward(model, optimizer, config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for epoch in range(len(rows), until or config["epoch"]):
        start = time.perf_counter()
        try:
            trained = train_epoch(model, forward, optimizer, text, config, epoch)
            seconds = time.perf_counter() - start
            if not all(p.isfinite().all() for p in model.parameters()):
                raise FloatingPointError("a weight is not finite")
            valid = evaluate(model, text.valid, config)
            if not math.isfinite(valid):
                raise FloatingPointError("the validation loss is not finite")
        except FloatingPointError as error:
            raise Diverged(f"training diverged in epoch {epoch + 1} ({error}): try a smaller --lr, "
                           f"a longer --warmup or more --damping; {folder} keeps epoch {epoch}")
        row = (epoch + 1, optimizer.param_groups[0]["lr"], trained, perplexity(trained), valid,
               perplexity(valid), round(seconds, 3), round(peak_memory(device), 1))
        rows.append(dict(zip(COLUMNS, row)))
        if RANK == 0:
            save_checkpoint(folder / "checkpoint.pt", config, rows, model, optimizer, text)
            write_log(folder, rows)
        print(f"epoch {row[0]:3d}/{config['epoch']}  lr {row[1]:<8.3g} train {trained:7.4f}  "
              f"valid {valid:7.4f}  perplexity {row[5]:9.2f}  {seconds:6.1f} s", flush=True)
    if args.sample and RANK == 0:
        print(f"sample: {write(model, text, args.sample, config['run'])!r}", flush=True)
    return rows, state_bytes(optimizer)


def begin(config, folder, model, optimizer, text, resume):
    """Make the folder, or restore what it holds: the rows of its log so far."""
    rows = []
    if (folder / "checkpoint.pt").exists():
        rows = load_checkpoint(folder / "checkpoint.pt", config, model, optimizer, text)
        print(f"resumed after epoch {len(rows)} of {config['epoch']}", flush=True)
    elif resume:
        print(f"--resume: no checkpoint in {folder}, so this run starts anew", flush=True)
    if RANKS > 1:
        dist.barrier()           # all have read before the first one writes
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and rows:
        write_log(folder, rows)
    return rows


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_log(folder, rows):
    def text(name, value):
        return str(value) if name == "epoch" else f"{value:.9g}"
    lines = [",".join(COLUMNS)] + [",".join(text(c, row[c]) for c in COLUMNS) for row in rows]
    write_file(folder / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))


def save_checkpoint(path, config, rows, model, optimizer, text):
    """The seed in config is all the random state there is, see train_epoch."""
    content = dict(config=config, epoch=len(rows), log=rows, model=model.state_dict(),
                   optimizer=optimizer.state_dict(), vocabulary=text.vocabulary)
    write_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path, config, model, optimizer, text):
    """Put a checkpoint into model and optimizer; the rows of its log."""
    try:
        damaged = zipfile.ZipFile(path).testzip()      # checks what torch.load does not: the CRCs
        if damaged:
            raise zipfile.BadZipFile(damaged)
        saved = torch.load(path, map_location="cpu")
        old, rows, vocabulary = dict(saved["config"]), list(saved["log"]), saved["vocabulary"]
    except Exception as error:   # torch.load raises half a dozen kinds for a damaged file
        raise UsageError(f"{path} cannot be read, it is damaged or not a checkpoint of this script "
                         f"({type(error).__name__}); move it away to start this run anew")
    # The way of computing may change between two sessions; what is computed may not.
    differ = [f"{'' if name in DERIVED else '--'}{name} "
              f"(was {old.get(name)}, now {config.get(name)})"
              for name in {**old, **config} if name not in ("accumulate", "compile")
              and old.get(name) != config.get(name)]
    if differ:
        raise UsageError(f"{path} belongs to another configuration, {', '.join(differ)}: repeat "
                         "its own flags to continue it, or name another folder with --output_dir")
    if vocabulary != text.vocabulary:
        raise UsageError(f"{path} was trained on a text with other tokens than this one: give that "
                         "text to continue it, or name another folder with --output_dir")
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

def load(args, device):
    """The text, on the device, and long enough for the command."""
    text = datasets.load_text(args.dataset if args.text is None else Path(args.text), args.data_dir,
                              args.train_file, args.valid_file, args.train_size,
                              args.valid_size)
    context = args.context or GPT_SIZES[args.model]["context"]
    count = datasets.num_windows(text.train, context)
    if count < args.batch_size:
        raise UsageError(f"the training text has {len(text.train)} {text.unit}s, {count} windows "
                         f"of {context}, fewer than --batch_size {args.batch_size}: lower that or "
                         "--context, or take a longer text")
    if len(text.valid) < 2:
        raise UsageError(f"the validation text has {len(text.valid)} {text.unit}s: at least two "
                         "are needed")
    print(f"{text_name(args)} ({text.source}): {len(text.train):,} training and "
          f"{len(text.valid):,} validation {text.unit}s, {len(text.vocabulary):,} different ones")
    return text._replace(train=text.train.to(device), valid=text.valid.to(device))


def run_all(args, argv, until=None):
    """One run after another; ends with the table and the record."""
    device, folders = torch.device(check(args)), run_folders(args)
    if RANKS > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()           # all have looked at the folders before the first one writes
    text = load(args, device)
    for optim in args.optim[1:]:     # what is wrong with the second is said before the first trains
        build(resolve(args, optim, args.run[0], text), torch.device("cpu"))
    results = []
    for optim in args.optim:
        logs = []
        for seed in args.run:
            config = resolve(args, optim, seed, text)
            log, state = train(config, text, folders[optim, seed], args, shlex.join(argv), until)
            logs.append(log)
        loss = [log[-1]["valid_loss"] for log in logs]
        results.append(dict(
            optim=optim, run=args.run, valid_loss=loss, valid_loss_mean=statistics.mean(loss),
            valid_loss_std=statistics.stdev(loss) if len(loss) > 1 else None,
            valid_perplexity=[log[-1]["valid_perplexity"] for log in logs],
            train_loss=statistics.mean(log[-1]["train_loss"] for log in logs),
            seconds_per_epoch=statistics.mean(row["seconds"] for log in logs for row in log),
            peak_memory=max(row["peak_memory"] for log in logs for row in log),
            state_bytes=state, output_dir=[str(folders[optim, seed]) for seed in args.run]))
    if len(args.optim) > 1 or len(args.run) > 1:
        print_table(args, results)
    print(json.dumps(dict(dataset=text_name(args), model=args.model, epoch=args.epoch,
                          device=device.type, ranks=RANKS, torch=torch.__version__,
                          results=results)), flush=True)


def print_table(args, results):
    print(f"\n{args.model} on {text_name(args)} after epoch {args.epoch}, over all of the "
          "validation text\n"
          "optimizer   seeds       valid loss   perplexity   train loss   s/epoch        state")
    for r in results:
        std = "" if r["valid_loss_std"] is None else f" ± {r['valid_loss_std']:.4f}"
        loss = f"{r['valid_loss_mean']:.4f}{std}"
        print(f"{r['optim']:<10}  {len(r['run']):5d}  {loss:>15}   "
              f"{statistics.mean(r['valid_perplexity']):10.2f}   {r['train_loss']:10.4f}   "
              f"{r['seconds_per_epoch']:7.1f}   {r['state_bytes'] / 2 ** 20:6.2f} MiB")


def smoke():
    """Every optimizer there is, head tied or not, with amp and micro-batches; a resumed run."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        def go(folder, *flags, until=None):
            argv = shlex.split(
                "--dataset grammar --train_size 300 --valid_size 100 --batch_size 4 --context 16 "
                "--layers 2 --heads 2 --width 16 --warmup 2 --sample 5")
            argv += ["--output_dir", str(Path(root, folder)), "--optim", *RECIPES, *flags]
            run_all(parse(argv), argv, until)

        go("untied", "--untied", "--epoch", "1", "--model", "nanogpt", "--dropout", "0.1")
        go("amp", "--amp", "--epoch", "1", "--accumulate", "2")
        go("sampled", "--epoch", "1", "--optim", "kfac", "--fisher", "sampled")
        go("straight", "--epoch", "2")
        go("resumed", "--epoch", "2", until=1)
        go("resumed", "--epoch", "2", "--resume")
        for optim in RECIPES:
            a, b = (Path(root, folder, optim, "log.csv").read_text().splitlines()
                    for folder in ("straight", "resumed"))
            if [line.split(",")[:6] for line in a] != [line.split(",")[:6] for line in b]:
                raise Diverged(f"{optim}: a resumed run differs from the uninterrupted one")
    return f"smoke test passed: {' '.join(RECIPES)}, {time.perf_counter() - start:.0f} s"


def main(argv):
    """Run the command; its exit status."""
    signal.signal(signal.SIGTERM, terminate)
    print_anything()
    args = None
    try:
        args = parse(argv)
        if args.smoke and RANKS > 1:
            raise UsageError("--smoke is for one process: start it without torchrun")
        if args.smoke:
            with contextlib.redirect_stdout(io.StringIO()):
                summary = smoke()
            print(summary)
        else:
            with contextlib.redirect_stdout(sys.stdout if RANK == 0 else io.StringIO()):
                run_all(args, argv)
        return 0
    except KeyboardInterrupt as interrupt:
        if RANK == 0:
            print("\nstopped; the same command with --resume continues after the last finished "
                  "epoch", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except (UsageError, Diverged, datasets.DataError, OSError, torch.OutOfMemoryError) as error:
        if RANK == 0 or args is not None:      # a rank may find what the others do not
            print(f"train_lm.py{f', rank {RANK}' if RANK else ''}: {error}", file=sys.stderr)
        return 1 if isinstance(error, (Diverged, torch.OutOfMemoryError)) else 2
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
