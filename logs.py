"""Runs that exist: the logs of any training script, read, brought together by seed and compared."""
import csv
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from ranks import UsageError

METRICS = {"test_acc": "test accuracy, %", "valid_perplexity": "validation perplexity"}


class Log(NamedTuple):
    """The epochs of one run of any script."""
    config: dict
    metric: str                # of METRICS
    rows: list                 # (epoch, seconds since the start, train loss, metric)


def read_logs(folders):
    """{label: Log} of the runs in these folders and below them."""
    logs = {}
    for folder in folders:
        found = sorted(Path(folder).rglob("log.csv"))
        if not found:
            raise UsageError(f"{folder} holds no log.csv: name folders that a training script "
                             "wrote, or a folder of such folders")
        logs |= {log.parent.resolve(): read_log(log) for log in found}
    return dict(zip(labels(logs), logs.values()))


def read_log(path):
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        metric = next(name for name in METRICS if name in rows[0])
        rows = [[float(row[name]) for name in ("epoch", "seconds", "train_loss", metric)]
                for row in rows]
    except (IndexError, KeyError, StopIteration, TypeError, ValueError, csv.Error):
        raise UsageError(f"{path} is not a log of a training script: it has no epoch, or lacks a "
                         f"number under epoch, seconds, train_loss, or {' or '.join(METRICS)}")
    seconds = itertools.accumulate(row[1] for row in rows)
    rows = [(int(epoch), after, *values) for (epoch, _, *values), after in zip(rows, seconds)]
    return Log(read_config(path.parent), metric, rows)


def read_config(folder):
    """What a run's config.json says, or its record.json where that is all there is."""
    path = next((folder / name for name in ("config.json", "record.json")
                 if (folder / name).exists()), None)
    if path is None:
        raise UsageError(f"{folder} has a log.csv, but neither config.json nor record.json to tell "
                         "what was run")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["seed"] = int(config.pop("run" if "run" in config else "seed"))
        which = {name: config[name] for name in ("model", "optim", "seed")}
        return config if path.name == "config.json" else which
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is damaged, or not the configuration of a run: it does not name "
                         "a model, an optimizer and a seed")


def labels(runs):
    """Each run's path below the folder that all have in common."""
    paths = [Path(run).resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


# What may differ between runs that only their seeds tell apart.
INCIDENTAL = {"seed", "command", "optimizer", "torch", "output_dir"}


def group_runs(logs):
    """{label: {seed: Log}} from {label: Log}: runs as long whose configurations agree otherwise."""
    groups, result = {}, {}
    for label, log in logs.items():
        same = {name: value for name, value in log.config.items() if name not in INCIDENTAL}
        key, copies = json.dumps([same, len(log.rows)], sort_keys=True), 0
        while log.config["seed"] in (group := groups.setdefault((key, copies), {})):
            copies += 1
        group[log.config["seed"]] = label, log
    for group in groups.values():
        names = [label for label, _ in group.values()]
        name = Path(os.path.commonpath(names)).as_posix()
        if name in (".", *result):
            name = ", ".join(names)
        result[name] = {seed: log for seed, (_, log) in group.items()}
    return result


def mean_std(values):
    """Mean and standard deviation, None of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(mean_and_std, sign=""):
    average, deviation = mean_and_std
    return f"{average:{sign}.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def columns_of(rows, first):
    """The columns of a table from the index `first` on, as lists."""
    return [list(column) for column in zip(*rows)][first:]


def compare_rows(groups):
    """The rows of the printed table, one for each group."""
    first = next(iter(groups.values()))
    for label, group in groups.items():
        losses, values = columns_of([log.rows[-1] for log in group.values()], 2)
        pairs = [log.rows[-1][3] - first[seed].rows[-1][3] for seed, log in group.items()
                 if seed in first]
        difference = "" if group is first else "no seed in common" if not pairs else \
            in_words(mean_std(pairs), "+")
        log = next(iter(group.values()))
        seconds = statistics.mean(log.rows[-1][1] / len(log.rows) for log in group.values())
        yield (label, log.config["optim"], len(group), log.rows[-1][0], statistics.mean(losses),
               in_words(mean_std(values)), difference, f"{seconds:.1f}")
