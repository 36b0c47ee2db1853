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

On several machines, each of which is given one line: --nnodes 2 --rdzv_backend c10d --rdzv_endpoint
HOST:29500 between torchrun and --nproc_per_node, and an --output_dir that they share.

Every run writes config.json, log.csv, checkpoint.pt and record.json to its own folder. Whatever
ends it (SIGTERM, SIGHUP, Ctrl-C, kill -9), the same command with --resume continues, on the CPU to
the same bits, also in the midst of an epoch; more --epoch extend a run with --schedule constant.
Exit status: 0, or 1 when training diverged or a rank was lost, 2 for a wrong command, 128 + the
signal's number when stopped by one.
"""
import signal
import sys

if __name__ == "__main__":       # until main() listens, Ctrl-C ends the imports without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import text as texts
from flags import (COUNT, COUNT_OR_ZERO, FRACTION, FSDP, NOT_NEGATIVE, OPTIMIZER_FLAGS, POSITIVE,
                   check_compiler, check_fsdp, check_optimizers, chosen, machine_flags,
                   make_optimizer, note_unused, parser_of, several_flags, user_path)
from folder import run_folders
from models import GPT, GPT_SIZES, CausalBlock
from ranks import UsageError, start
from report import describe, train_all
from run import Run, run_script


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

def train_epoch(run, forward, text, epoch):
    """One pass over the training text, or what is left of it after a stop."""
    config, progress, ranks = run.config, run.progress, run.ranks
    model, optimizer = run.parts["model"], run.parts["optimizer"]
    model.train()
    steps = texts.num_windows(text.train, config["context"]) // config["batch_size"]
    batches = itertools.islice(texts.windows(
        text.train, config["context"], config["batch_size"], seed=config["seed"], epoch=epoch),
        progress.step, None)
    for x, y in run.steps(batches, steps, epoch):      # which saves and stops between two of them
        rate = learning_rate(config, epoch * steps + progress.step, config["epochs"] * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        optimizer.zero_grad()
        x, y = x[ranks.rank::ranks.world], y[ranks.rank::ranks.world]
        loss = backward(forward, optimizer, x, y, config)
        if config["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        progress.add(loss, len(x))


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
def evaluate(model, tokens, config, ranks, stop):
    """Mean loss in nats over every token but the first, in windows that do not overlap."""
    model.eval()
    size = config["batch_size"] // ranks.world // config["accumulate"]
    whole, rest = divmod(len(tokens) - 1, config["context"])
    batches = -(-whole // size) + (rest > 0)

    def share():
        """The sum over every world-th batch."""
        sums = [torch.zeros((), device=tokens.device)]
        bar = tqdm(texts.all_windows(tokens, config["context"], size), "valid", batches,
                   leave=False, disable=None if ranks.rank == 0 else True)
        own = itertools.islice(bar, ranks.rank, None, ranks.world)
        for x, y in stop.between(own, alone=not config["fsdp"]):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config["amp"]):
                logits = model(x)
            sums.append(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum"))
        if config["fsdp"] and 0 < batches % ranks.world <= ranks.rank:
            model(tokens[None, :1].long())         # the others' last batch needs this rank's rows
        return torch.stack(sums).cpu().double().sum().item()
    loss = sum(ranks.gather(ranks.together(share))) / (len(tokens) - 1)
    if not math.isfinite(loss):
        raise FloatingPointError("the validation loss is not finite")
    return loss


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
    return texts.spell(tokens[1:], text)


def train(config, text, folder, args, ranks, stop):
    """One run, from its checkpoint if it has one: its record."""
    model, optimizer = build(config, ranks.device, ranks)
    describe(model, optimizer, config, ranks.device, folder, config["seed"] == args.seed[0])
    free = () if config["schedule"] == "cosine" else ("epochs",)    # of which no rate depends
    run = Run(folder, config, dict(model=model, optimizer=optimizer), args, ranks, stop,
              MACHINE + free)
    forward = make_forward(model, optimizer, config, ranks)
    for epoch in range(len(run.rows), config["epochs"]):
        with run.epoch(epoch) as progress:
            train_epoch(run, forward, text, epoch)
            loss, *_ = progress.means()
            valid = evaluate(model, text.valid, config, ranks, stop)
        run.add(f"train {loss:.4f}  valid {valid:.4f}  perplexity {perplexity(valid):.2f}",
                lr=optimizer.param_groups[0]["lr"], train_loss=loss,
                train_perplexity=perplexity(loss), valid_loss=valid,
                valid_perplexity=perplexity(valid))
    if args.sample and (ranks.rank == 0 or config["fsdp"]):
        print(f"sample: {write(model, text, args.sample, config['seed'])!r}", flush=True)
    return run.finish()


# ---------------------------------------------------------------------------------------------
# Model, optimizer, learning rate
# ---------------------------------------------------------------------------------------------

def build(config, device, ranks=None):
    """The network and its optimizer on the device. One seed, one initialisation."""
    torch.manual_seed(config["seed"])
    optim, vocabulary = config["optim"], config["vocabulary"]
    if optim == "kfac" and not config["tied"] and vocabulary > 2 ** 13:
        raise UsageError(f"--optim kfac with --untied would factor the head's {vocabulary}×"
                         f"{vocabulary} matrix: leave out --untied, and the head takes the plain "
                         "step")
    names = ("vocabulary", "context", "layers", "heads", "width", "bias", "tied", "dropout")
    try:
        model = GPT(**{name: config[name] for name in names}).to(device)
        if ranks is not None and config["fsdp"]:
            model = ranks.shard(model, CausalBlock)
        more = dict(loss_terms="tokens") if optim == "kfac" else {}
        return model, make_optimizer(model, parameter_groups(model, config), config,
                                     RECIPES[optim], **more)
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


def make_forward(model, optimizer, config, ranks):
    """Tokens → logits in float32. The optimizer's hooks are on the model before this wraps it."""
    wrapped = model if config["fsdp"] else ranks.wrap(model)
    compiled = torch.compile(wrapped) if config["compile"] else wrapped

    def forward(x):
        # the hooks of a step that feeds statistics would break the compiled graph
        call = wrapped if getattr(optimizer, "collecting", False) else compiled
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config["amp"]):
            return call(x).float()
    forward.no_sync = getattr(wrapped, "no_sync", contextlib.nullcontext)
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
# Recipes and the command line
# ---------------------------------------------------------------------------------------------

# A flag that is not given takes the value of its optimizer's row, and an optimizer takes the flags
# of its row and no others. adafisherw: AdaFisher's language models; adafisher takes the coupled
# decay of its image networks. mac: damping and periods of MAC's nanoGPT folder, decay of its other
# Transformers. The other rates suit small networks (results/shakespeare-search.csv); none are
# published for this task with embeddings that are learned.
SGD = dict(lr=0.3, momentum=0.9, nesterov=False, weight_decay=1e-4, embedding_lr=1.0)
CURVATURE = dict(SGD, decoupled_weight_decay=False, damping=1.0, stat_decay=0.95, tcov=5, tinv=50)
# Embeddings take F̃ = 1, a thousandth of the step of a layer's flat directions: hence embedding_lr.
ADAFISHER = dict(lr=1e-4, beta=0.9, gamma=0.8, tcov=100, averaging="released", damping=1e-3,
                 weight_decay=0.1, embedding_lr=1000.0)
RECIPES = {
    "sgd": SGD,
    "adam": dict(lr=1e-3, weight_decay=0.0, embedding_lr=1.0),
    "adamw": dict(lr=1e-3, weight_decay=0.1, embedding_lr=1.0),
    "mac": dict(CURVATURE, tinv=5, attention=True),
    "nysact": dict(CURVATURE, rank=10, sketch="gaussian"),
    "foof": CURVATURE,
    "kfac": dict(CURVATURE, damping=0.03, fisher="empirical", inverse="factored",
                 weight_sharing="expand", kl_clip=1e-3),
    "adafisher": dict(ADAFISHER, weight_decay=5e-4),
    "adafisherw": ADAFISHER,
}
MACHINE = ("accumulate", "compile")            # what may change when a run is resumed

FLAGS = {
    "what is trained": {
        "dataset": dict(default="wikitext2", choices=texts.TEXTS,
                        help="wikitext2 is read by words; grammar is generated, needs no download "
                        "and is read by characters"),
        "text": dict(type=user_path, help="read this UTF-8 file, plain or .gz, by characters; its "
                     "last tenth is for validation"),
        "data_dir": dict(default="data", type=user_path,
                         help="folder that holds wikitext2, or receives it"),
        "train_file": dict(type=str, help="file of wikitext2's folder to train on; without: "
                           "train.txt"),
        "valid_file": dict(type=str, help="file of wikitext2's folder to evaluate on; without: "
                           "valid.txt, and test.txt for what papers report"),
        "train_size": dict(type=COUNT, help="use the first N training tokens"),
        "valid_size": dict(type=COUNT, help="use the first N validation tokens"),
        "model": dict(default="minigpt", choices=GPT_SIZES, metavar="NAME",
                      help="%(choices)s: sizes, which the next four flags change"),
        "layers": dict(type=COUNT, help="blocks"),
        "heads": dict(type=COUNT, help="heads of attention, a divisor of the width"),
        "width": dict(type=COUNT, help="numbers per token"),
        "context": dict(type=COUNT, help="tokens that the network sees at a time"),
        "untied": dict(default=False, help="give the head a weight of its own, which is "
                       "preconditioned; without: the token embedding's, which is not"),
        "dropout": dict(default=0.0, type=FRACTION, help="dropout"),
        **several_flags("adafisherw")},
    "optimizer (who takes a flag, and the value where it is not given)": {
        **{name: OPTIMIZER_FLAGS[name] for name in OPTIMIZER_FLAGS
           if name not in ("calibrate", "input_covariance")},
        "embedding_lr": dict(type=POSITIVE, help="learning rate of the embeddings, and of a head "
                             "that shares theirs, as a multiple of --lr"),
        "clip": dict(default=1.0, type=NOT_NEGATIVE, help="scale the gradient down to this norm "
                     "before it is preconditioned; 0: never")},
    "training": {
        "batch_size": dict(default=32, type=COUNT,
                           help="windows per step, over all ranks and micro-batches"),
        "accumulate": dict(default=1, type=COUNT, help="take each step's windows in N "
                           "micro-batches"),
        "epochs --epoch": dict(default=50, type=COUNT, help="passes over the training text"),
        "schedule": dict(default="cosine", choices=("cosine", "constant"),
                         help="the learning rate after warm-up; it changes every step"),
        "min_lr": dict(default=0.0, type=FRACTION, help="where cosine ends, as a fraction of --lr"),
        "warmup": dict(default=100, type=COUNT_OR_ZERO,
                       help="steps of linear warm-up; may be more than there are")},
    "machine and files": {
        "sample": dict(default=200, type=COUNT_OR_ZERO,
                       help="tokens that the trained model writes at the end"),
        **FSDP, **machine_flags("runs/TEXT-MODEL-OPTIM/SEED")},
}


def parse(argv):
    """The command line; flags of RECIPES and of the sizes that were not given are None."""
    return parser_of("train_lm.py", __doc__, FLAGS, [RECIPES]).parse_args(argv)


def resolve(args, optim, seed, text):
    """All that decides one run: the flags as given or default, its optimizer's from the recipe."""
    config = dict(dataset=text_name(args), train_file=args.train_file, valid_file=args.valid_file,
                  train_tokens=len(text.train), valid_tokens=len(text.valid),
                  vocabulary=len(text.vocabulary), data=text.fingerprint, model=args.model)
    size = dict(GPT_SIZES[args.model], tied=not args.untied, dropout=args.dropout)
    for name in ("layers", "heads", "width", "context"):
        if getattr(args, name) is not None:
            size[name] = getattr(args, name)
    config.update(size, bias=size.get("bias", True), optim=optim, seed=seed)
    config |= chosen(args, RECIPES[optim])
    for name in ("batch_size", "accumulate", "epochs", "schedule", "min_lr", "warmup", "clip",
                 "amp", "compile", "fsdp"):
        config[name] = getattr(args, name)
    return config


def text_name(args):
    return args.dataset if args.text is None else Path(args.text).name


def check(args, ranks):
    """What is wrong with a command beyond single values, before anything is loaded."""
    check_compiler(args, ranks.device)
    check_fsdp(args, ranks.world)
    check_optimizers(args, args.optim, RECIPES)
    if args.text is not None and args.dataset != "wikitext2":
        note_unused({"dataset"}, "a run with --text")
    if args.schedule == "constant" and args.min_lr:
        note_unused({"min_lr"}, "--schedule constant")
    files = [f"--{name}" for name in ("train_file", "valid_file") if getattr(args, name)]
    if files and (args.text is not None or args.dataset != "wikitext2"):
        raise UsageError(f"{files[0]} chooses among the files of --dataset wikitext2, and not of "
                         f"{text_name(args)}")
    if args.batch_size % (ranks.world * args.accumulate):
        raise UsageError(f"--batch_size {args.batch_size} cannot be shared equally by "
                         f"{ranks.world} ranks with {args.accumulate} micro-batches each "
                         "(--accumulate)")


def load(args):
    """The text, long enough for the command."""
    text = texts.load_text(args.dataset if args.text is None else Path(args.text), args.data_dir,
                           args.train_file, args.valid_file, args.train_size, args.valid_size)
    context = args.context or GPT_SIZES[args.model]["context"]
    count = texts.num_windows(text.train, context)
    if count < args.batch_size:
        raise UsageError(f"the training text has {len(text.train)} {text.unit}s, {count} windows "
                         f"of {context}, fewer than --batch_size {args.batch_size}: lower that or "
                         "--context, or take a longer text")
    if len(text.valid) < 2:
        raise UsageError(f"the validation text has {len(text.valid)} {text.unit}s: at least two "
                         "are needed")
    print(f"{text_name(args)} ({text.source}): {len(text.train):,} training and "
          f"{len(text.valid):,} validation {text.unit}s, {len(text.vocabulary):,} different ones")
    for optim in args.optim[1:]:     # what is wrong with the second is said before the first trains
        build(resolve(args, optim, args.seed[0], text), torch.device("cpu"))
    return text


def share(text, ranks):
    """The text that the first process of each machine has; all of a machine map one copy of it."""
    with tempfile.TemporaryDirectory() as folder:
        files = dict(train=f"{folder}/train.npy", valid=f"{folder}/valid.npy")

        def write_files():
            if text is not None:
                for name, file in files.items():
                    np.save(file, getattr(text, name).numpy())
                return text._replace(**files)
        theirs = ranks.gather(ranks.together(write_files))[ranks.rank - ranks.local]

        def map_files():
            return {name: torch.from_numpy(np.load(getattr(theirs, name), mmap_mode="c"))
                    for name in files}
        return theirs._replace(**ranks.together(map_files))      # then the files may go


def prepare(args, ranks):
    """Everything that can be wrong with a command: the runs' folders, and the text."""
    check(args, ranks)
    return run_folders(args, text_name(args)), load(args) if ranks.local == 0 else None


def run_all(args, stop):
    """One run after another; ends with the table and the record."""
    ranks = start(args.device, stop)
    folders, text = ranks.together(lambda: prepare(args, ranks))
    text = share(text, ranks) if ranks.world > 1 else text
    text = text._replace(train=text.train.to(ranks.device), valid=text.valid.to(ranks.device))
    ranks.agree(dict(optim=args.optim, seed=args.seed, sample=args.sample))
    for optim in args.optim:
        ranks.agree(resolve(args, optim, args.seed[0], text))
    train_all(args, f"{args.model} on {text_name(args)} after epoch {args.epochs}, over all of the "
              "validation text",
              dict(valid_loss=("validation loss", 4), valid_perplexity=("perplexity", 2)),
              lambda optim, seed: train(resolve(args, optim, seed, text), text,
                                        folders[optim, seed], args, ranks, stop),
              dataset=text_name(args), device=ranks.device.type, ranks=ranks.world)


def smoke(stop):
    """Every optimizer there is, head tied or not, with amp, micro-batches and dropout."""
    with tempfile.TemporaryDirectory() as root:
        for name, flags in dict(untied="--untied --model nanogpt --dropout 0.1",
                                amp="--amp --accumulate 2", sampled="--fisher sampled").items():
            optims = "kfac" if name == "sampled" else " ".join(RECIPES)
            argv = ("--dataset grammar --train_size 300 --valid_size 100 --batch_size 4 --epoch 1 "
                    "--context 16 --layers 2 --heads 2 --width 16 --warmup 2 --sample 5 "
                    f"--output_dir {root}/{name} {flags} --optim {optims}").split()
            run_all(parse(argv), stop)
    return list(RECIPES)


def main(argv):
    """Run the command; its exit status."""
    return run_script("train_lm.py", parse, run_all, smoke, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
