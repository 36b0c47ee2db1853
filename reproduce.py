"""Run the experiments behind README's tables again, print the tables and draw the figures.

    python reproduce.py                                  # the tables of what results/ holds
    python reproduce.py cifar --data_dir data            # run what is missing there, two at a time
    python reproduce.py all --results mine --jobs 1      # everything from nothing, elsewhere
    python reproduce.py --draw                           # results/figures/sensitivity.png, race.png

An experiment is a list of commands of the training scripts, each of which is printed when it
starts. A run that has ended adds its log to DIR/EXPERIMENT.csv and is not run again; one that was
stopped continues where it was. shakespeare reads tinyshakespeare.txt in the folder of the data.
"""
import argparse
import csv
import io
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from download import DataError, completed
from report import print_anything

# ---------------------------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------------------------

CIFAR = "train_cifar.py --data_dir DATA --amp --channels_last --schedule_step step --warmup 1"
# Batch and augmentation are the same for all, whatever the recipes say.
RESNET = f"{CIFAR} --model resnet20 --batch_size 128 --cutout 0"
VIT = f"{CIFAR} --model vit_nano_cifar --batch_size 128 --cutout 0 --train_size 20000"
TEXT = "train_lm.py --text DATA/tinyshakespeare.txt --model char --sample 0 --amp"

# Half decades around the published rates.
ORDINARY = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SMALL = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


class Arm(NamedTuple):
    """One line of a table: flags, beyond which its optimizer's recipe counts, and the rates tried;
    none: "mac --flag value" takes mac's best."""
    flags: str
    rates: tuple = ORDINARY


class Study(NamedTuple):
    """Optimizers whose rates are searched at equal effort and then compared over seeds."""
    searched: str                # the command of the search, to which an arm's flags are added
    compared: str                # that of the comparison
    seeds: int
    arms: dict


FAMILY = {name: Arm(f"--optim {name}") for name in ("sgd", "mac", "nysact", "foof", "kfac")}
STUDIES = {
    "cifar": Study(f"{RESNET} --train_size 20000 --epoch 2", f"{RESNET} --epoch 5", 3, {
        **FAMILY,
        "adamw": Arm("--optim adamw", SMALL),
        "adafisher": Arm("--optim adafisher", SMALL),
        "adafisher-printed": Arm("--optim adafisher --averaging printed --damping 0.1")}),
    # Does MAC's attention term do anything? Without it v takes the plain mean of its inputs.
    "vit": Study(f"{VIT} --epoch 2", f"{VIT} --epoch 5", 3, {
        "sgd": Arm("--optim sgd --weight_decay 1e-4", ORDINARY[1:]),
        "mac": Arm("--optim mac --weight_decay 1e-4 --tinv 5", ORDINARY[1:]),
        "mac --attention false":
            Arm("--optim mac --weight_decay 1e-4 --tinv 5 --attention false", ()),
        "kfac": Arm("--optim kfac --weight_decay 1e-4", ORDINARY[1:]),
        "adamw": Arm("--optim adamw", SMALL[:5])}),
    "shakespeare": Study(f"{TEXT} --epoch 1 --train_size 400000", f"{TEXT} --epoch 1", 2, {
        **FAMILY,
        "adamw": Arm("--optim adamw", SMALL),
        "adafisherw": Arm("--optim adafisherw", SMALL)}),
}
COLOURS = {arm: f"C{i}" for i, arm in enumerate(dict.fromkeys(
    arm for study in STUDIES.values() for arm in study.arms))}


class Trial(NamedTuple):
    arm: str
    lr: float
    seed: int
    command: str

    @property
    def key(self):
        """As it stands in the first columns of a table's file."""
        return self.arm, f"{self.lr:g}", str(self.seed)


def search(results, name):
    """The rates of each arm; one more where the best of them lies at an edge."""
    study = STUDIES[name]
    for i in (2, 3, 1, 4, 0, 5, 6):                     # the middle first
        for arm, (flags, rates) in study.arms.items():
            if i < len(rates):
                lr = rates[i]
            elif i == 6 and rates and all(lr in last_losses(results, name, arm) for lr in rates):
                lr = beyond(rates, last_losses(results, name, arm))
            else:
                continue
            if lr:
                yield Trial(arm, lr, 0, f"{study.searched} {flags} --lr {lr:g}")


def beyond(rates, losses):
    """The next half decade beyond the best rate if that is the first or the last."""
    best = min(rates, key=losses.get)
    side = {rates[0]: -1, rates[-1]: 1}.get(best)
    return side and float(f"{10 ** (round(2 * math.log10(best)) / 2 + side / 2):.0e}")


def compare(results, name):
    study = STUDIES[name]
    for seed in range(study.seeds):
        for arm, (flags, _) in study.arms.items():
            lr = best_rate(results, name, arm)
            yield Trial(arm, lr, seed, f"{study.compared} {flags} --lr {lr:g}")


def placebo(results, name):
    """AdaFisher as released beside SGD with the rate that it amounts to, (1-β)α/λ = 0.1."""
    same = f"{CIFAR} --model resnet20 --batch_size 256 --cutout 16 --train_size 20000 --epoch 3"
    for seed in range(3):
        yield Trial("adafisher", 0.001, seed, f"{same} --optim adafisher")
        yield Trial("sgd", 0.1, seed, f"{same} --optim sgd --lr 0.1")


VARIANTS = {
    "mac": ("", "--input_covariance false", "--damping 0.1", "--damping 10", "--tinv 5"),
    "nysact": ("", "--rank 5", "--rank 50", "--sketch subcolumns"),
    "foof": ("", "--tinv 5"),
    "kfac": ("", "--fisher sampled", "--tinv 5", "--inverse eigen"),
}


def ablation(results, name):
    """One flag changed at a time."""
    study = STUDIES["cifar"]
    for seed in range(2):
        for arm, variants in VARIANTS.items():
            lr = best_rate(results, "cifar", arm)
            for flags in variants:
                yield Trial(f"{arm} {flags}".strip(), lr, seed,
                            f"{study.searched} --optim {arm} --lr {lr:g} {flags}".strip())


EXPERIMENTS = {"cifar-search": search, "cifar": compare, "placebo": placebo,
               "ablation": ablation, "vit-search": search, "vit": compare,
               "shakespeare-search": search, "shakespeare": compare}


def trials(results, experiment):
    return EXPERIMENTS[experiment](results, experiment.removesuffix("-search"))


# ---------------------------------------------------------------------------------------------
# results/EXPERIMENT.csv: a line for each epoch of each run
# ---------------------------------------------------------------------------------------------

def read(results, experiment):
    """[{column: text}]"""
    path = Path(results, f"{experiment}.csv")
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logs(results, experiment):
    """{(arm, rate, seed): rows}, in the order of the experiment."""
    found = {}
    for row in read(results, experiment):
        found.setdefault((row["arm"], row["rate"], row["seed"]), []).append(row)
    return found


def last_losses(results, name, arm):
    """{rate: training loss of the search's last epoch}; infinite where it diverged."""
    return {float(rate): float(rows[-1]["train_loss"] or math.inf)
            for (a, rate, _), rows in logs(results, f"{name}-search").items() if a == arm}


def best_rate(results, name, arm):
    arm = arm.split()[0]
    losses = last_losses(results, name, arm)
    if not set(STUDIES[name].arms[arm].rates) <= set(losses):
        raise DataError(f"the rates of {arm} are not searched yet: run "
                         f"'python reproduce.py {name}-search' first")
    return min(losses, key=losses.get)


def append(results, experiment, trial, rows):
    """To a file written anew: a first run that diverged at once did not know all columns."""
    path = Path(results, f"{experiment}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read(results, experiment) + [
        dict(zip(("arm", "rate", "seed"), trial.key)) | row for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), "",
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with completed(path) as file:
        file.write(text.getvalue().encode())


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------

def run_experiment(experiment, args):
    """Run what is missing, some at a time, until the experiment asks for no more."""
    lock = threading.Lock()
    while missing := [trial for trial in trials(args.results, experiment)
                      if trial.key not in logs(args.results, experiment)]:
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(lambda trial: run(experiment, trial, args, lock), missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def run(experiment, trial, args, lock):
    """One trial to its end; its log joins the experiment's file, and its checkpoint goes."""
    folder = Path(args.results, "runs", experiment, *(part.replace(" ", "") for part in trial.key))
    words = [word.replace("DATA", str(args.data_dir)) for word in trial.command.split()]
    script, *flags = *words, "--seed", str(trial.seed)
    print("python", shlex.join([script, *flags]), flush=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / script, *flags, "--output_dir", folder,
         "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
    diverged = done.returncode == 1 and "diverged" in done.stderr          # which is a result too
    if done.returncode and not diverged:
        raise DataError(done.stderr.strip() or "a run was stopped")
    log, rows = folder / "log.csv", []
    if log.exists():
        with open(log, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    with lock:
        if diverged:
            rows.append(dict(epoch=len(rows) + 1, train_loss=""))
        append(args.results, experiment, trial, rows)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------

def show(results, experiment):
    found = logs(results, experiment)
    if not found:
        return
    print(f"\n{experiment}\n")
    if experiment.endswith("-search"):
        show_search(found)
    else:
        show_comparison(found, step_ratios(results) if experiment == "cifar" else {})


def show_search(found):
    """Training loss of the last epoch, an arm a line."""
    columns = max(sum(a == arm for a, *_ in found) for arm, *_ in found)
    print("| rate: loss" + " |" * (columns + 1) + "\n|" + "---|" * (columns + 1))
    for arm in dict.fromkeys(arm for arm, *_ in found):
        losses = {float(rate): float(rows[-1]["train_loss"] or math.inf)
                  for (a, rate, _), rows in found.items() if a == arm}
        best = min(losses, key=losses.get)
        print(f"| {arm} | " + " | ".join(
            f"{'**' * (lr == best)}{lr:g}: {losses[lr]:.3f}{'**' * (lr == best)}"
            for lr in sorted(losses)) + " |")


def show_comparison(found, ratios):
    """Last epoch, mean ± std over seeds; what is gained over the first arm, seed by seed; when the
    mean reaches the first arm's last one, in epochs and (where a step's cost is known) in time."""
    metric = "test_acc" if "test_acc" in next(iter(found.values()))[0] else "valid_loss"
    better = -1 if metric == "valid_loss" else 1
    curves, losses = {}, {}
    for (arm, rate, seed), rows in found.items():
        curves.setdefault((arm, rate), {})[seed] = [float(row.get(metric) or math.nan)
                                                       for row in rows]
        losses.setdefault((arm, rate), []).append(float(rows[-1]["train_loss"] or math.nan))
    first = next(iter(curves.values()))
    goal = statistics.mean(better * curve[-1] for curve in first.values())
    print(f"| | rate | seeds | {metric} | gain, paired | train_loss | epochs to the first one's | "
          "time, in its epochs |\n|---|---|---|---|---|---|---|---|")
    for (arm, rate), seeds in curves.items():
        last = [curve[-1] for curve in seeds.values()]
        gains = [better * (seeds[s][-1] - first[s][-1]) for s in seeds if s in first]
        epoch = reached([better * statistics.mean(values) for values in zip(*seeds.values())], goal)
        time = f"{epoch * ratios[arm]:.2f}" if epoch and arm in ratios else ""
        print(f"| {arm} | {rate} | {len(seeds)} | {spread(last)} | {spread(gains)} | "
              f"{spread(losses[arm, rate])} | {f'{epoch:.2f}' if epoch else ''} | {time} |")


def reached(values, goal):
    """The epoch at which a line through the values of the epochs comes up to the goal; or None."""
    for epoch, (before, value) in enumerate(zip([-math.inf, *values], values), 1):
        if value >= goal:
            return epoch - (value - goal) / (value - before)


def spread(values):
    if not values:
        return ""
    text = f"{statistics.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.3f}"


def draw(results):
    """sensitivity.png: how far a wrong rate hurts. race.png: accuracy over epochs and over time."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise DataError("--draw needs matplotlib: pip install matplotlib")
    folder = Path(results, "figures")
    folder.mkdir(parents=True, exist_ok=True)
    studies = [name for name in STUDIES if read(results, f"{name}-search")]
    if studies:
        figure, axes = plt.subplots(1, len(studies), figsize=(7 * len(studies), 4), squeeze=False,
                                    layout="constrained")
        for axis, name in zip(axes[0], studies):
            arms = [arm for arm, (_, rates) in STUDIES[name].arms.items() if rates]
            draw_sensitivity(axis, name, {arm: last_losses(results, name, arm) for arm in arms})
        figure.savefig(folder / "sensitivity.png", dpi=110, bbox_inches="tight")
    if read(results, "cifar"):
        ratios = step_ratios(results)
        if not ratios:
            raise DataError("race.png needs to know what a step costs: run 'python bench.py > "
                            f"{results}/bench-resnet20.txt' first")
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        draw_race(axes, logs(results, "cifar"), ratios)
        figure.savefig(folder / "race.png", dpi=110, bbox_inches="tight")


def draw_sensitivity(axis, name, losses):
    for arm, found in losses.items():
        rates = [lr for lr in sorted(found) if math.isfinite(found[lr])]
        best = min(rates, key=found.get, default=None)
        axis.plot([lr / best for lr in rates], [found[lr] for lr in rates], ".-", label=arm,
                  color=COLOURS[arm])
    axis.set(xscale="log", xlabel="learning rate / the best of this optimizer", title=name,
             ylabel="training loss of the last epoch")
    # what diverged leaves the frame: it is worse than the smallest rates, which hardly train
    slow = max((found[min(found)] for found in losses.values() if found), default=math.inf)
    least = min((min(found.values()) for found in losses.values() if found), default=0)
    axis.set_ylim(0.98 * least, min(axis.get_ylim()[1], 1.15 * slow))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def step_ratios(results):
    """{optimizer: step time as a ratio to SGD's}, as bench.py printed it last, if it did."""
    file = Path(results, "bench-resnet20.txt")
    text = file.read_text(encoding="utf-8").split("\n\n")[0] if file.exists() else ""
    ratios = {optim: float(ratio) for optim, ratio in
              re.findall(r"^(\w+) +([\d.]+) \([\d.]+ to", text, re.M)}
    return ratios and ratios | {"adafisher-printed": ratios["adafisher"], "adamw": 1.0}


def draw_race(axes, found, ratios):
    for arm in dict.fromkeys(arm for arm, *_ in found):
        runs = [[float(row["test_acc"] or math.nan) for row in rows]
                for (a, *_), rows in found.items() if a == arm]
        means = [statistics.mean(values) for values in zip(*runs)]
        axes[0].plot(range(1, len(means) + 1), means, ".-", color=COLOURS[arm])
        last = [run[-1] for run in runs]
        axes[1].errorbar(len(means) * ratios[arm], means[-1],
                         statistics.stdev(last) if last[1:] else None, fmt="o", capsize=3,
                         color=COLOURS[arm], label=f"{arm} ({len(runs)})")
    axes[0].set(xlabel="epoch", ylabel="test accuracy, %", title="while training")
    axes[1].set(xlabel="time, in epochs of SGD (step ratios of bench.py)",
                ylabel="test accuracy, %", title="at the end: accuracy against cost, ± std")
    axes[1].legend(fontsize=8, title="optimizer (seeds)", loc="upper left", bbox_to_anchor=(1, 1))


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT",
                        help=f"what to run: {', '.join(EXPERIMENTS)}; or all")
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="folder of the data")
    parser.add_argument("--results", default="results", metavar="DIR",
                        help="folder of the tables, and of the runs below runs/")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="draw the figures")
    args = parser.parse_args(argv)
    unknown = set(args.experiments) - {*EXPERIMENTS, "all"}
    if unknown or args.jobs < 1:
        parser.error(f"no experiment of this name: {' '.join(unknown)}" if unknown else
                     "--jobs must be 1 or more")
    if "all" in args.experiments:
        args.experiments = list(EXPERIMENTS)
    return args


def main(argv):
    """Run the command; its exit status."""
    print_anything()
    args = parse(argv)
    try:
        for experiment in args.experiments:
            run_experiment(experiment, args)
        if not any(read(args.results, experiment) for experiment in EXPERIMENTS):
            raise DataError(f"there are no results in {args.results} yet: name what to run, one of "
                            f"{', '.join(EXPERIMENTS)}")
        for experiment in args.experiments or EXPERIMENTS:
            show(args.results, experiment)
        if args.draw:
            draw(args.results)
        return 0
    except KeyboardInterrupt:
        return 130
    except (DataError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
