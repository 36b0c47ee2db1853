"""What a person sees of runs: what is about to run, a table of what came of it, the last line."""
import json
import os
import statistics
import sys
import textwrap

import torch

from folder import finite
from ranks import Diverged, tell


def time_in_words(seconds):
    for unit, size, least in (("days", 86400, 2), ("h", 3600, 1.5), ("min", 60, 1.5)):
        if seconds >= least * size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds:.0f} s"


def describe(model, optimizer, config, device, folder, whole=True):
    """What is about to run, and where; the whole of it for the first of several seeds."""
    print(f"\n{config['optim']}, seed {config['seed']}, in {folder}", flush=True)
    if not whole:
        return
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else \
        torch.cuda.get_device_name(device) if device.type == "cuda" else "GPU"
    print(f"{device.type} ({where}), torch {torch.__version__}, {config['model']} with "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(textwrap.fill("  ".join(f"{k}={v}".replace(" ", "") for k, v in config.items()), 80,
                        break_on_hyphens=False))
    # what an optimizer of this folder prints below the options that it shares with torch's
    _, found, layers = repr(optimizer).rpartition("\n)\n")
    lines = [line for text in (layers if found else "no layer is preconditioned").splitlines()
             for line in textwrap.wrap(text, 80, subsequent_indent="    ")]
    print(*lines[:5], sep="\n")
    if len(lines) > 5:
        print(f"    ... {len(lines) - 5} lines more, all of them in config.json")
    sys.stdout.flush()


def train_all(args, title, metrics, train, **facts):
    """train(optim, seed) for each of them, which returns a record; their table, and one record.

    metrics: {name in the records: (heading, digits)}. Raises Diverged at the end if some of
    several runs did.
    """
    results, diverged, several = [], [], len(args.optim) * len(args.seed) > 1
    for optim in args.optim:
        runs = []
        for seed in args.seed:
            try:
                runs.append(train(optim, seed))
            except Diverged as error:
                if not several:
                    raise
                tell(str(error))
                diverged.append(f"{optim} with seed {seed}")
        if not runs:
            continue
        result = dict(optim=optim, run=[run["seed"] for run in runs])
        for name in metrics:
            values = [run[name] for run in runs]
            result |= {name: values, f"{name}_mean": statistics.mean(values),
                       f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}
        for name in "train_loss", "seconds_per_epoch":
            result[name] = statistics.mean(run[name] for run in runs)
        for name in "peak_memory", "state_bytes":
            result[name] = max(run[name] for run in runs)
        results.append(dict(result, output_dir=[run["output_dir"] for run in runs]))
    if several:
        print_table(title, metrics, results)
    print_record(dict(facts, model=args.model, epochs=args.epochs, torch=torch.__version__,
                      results=results))
    if diverged:
        raise Diverged(f"diverged, and not in the table: {', '.join(diverged)}")


def print_table(title, metrics, results):
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
        print(json.dumps(finite(record)), flush=True)


def print_anything():
    """Print what the console or the file has no characters for as \\u03bb, and to nobody where the
    output is closed, instead of failing."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
