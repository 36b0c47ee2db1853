"""What the preconditioners see and do: the figures of their papers, from one command each.

    python analyze.py overview                 # what MAC does, at a glance
    python analyze.py effect --optim mac       # does the preconditioner do anything? and a placebo
    python analyze.py spectra                  # eigenvalues of A, P and A ⊗ P while it trains
    python analyze.py mean                     # is the mean input the top eigenvector of A?
    python analyze.py attention                # likewise mean attention, of the scores
    python analyze.py convergence              # how fast GD, FOOF, K-FAC, NysAct, MAC contract
    python analyze.py gershgorin               # are the Kronecker factors diagonal? Likewise
    python analyze.py perturb                  #     their eigenvalues under noise, and
    python analyze.py fourier                  #     their frequencies and signal-to-noise ratio
    python analyze.py landscape                # several optimizers on one loss surface
    python analyze.py nystrom                  # what NysAct's sketch holds of each layer
    python analyze.py compare runs/A runs/B    # a table and curves of runs of any script

Each takes a minute or two on a CPU, on generated images unless --dataset says otherwise, and writes
its numbers as csv and its picture as PNG (with matplotlib) to --output_dir. FIGURE --help says what
is computed. Where a paper leaves a definition open, the one there is this project's own.

A = E[a aᵀ] and P = E[p pᵀ] are second moments over the rows of a layer (samples, tokens, positions
of a convolution), a its input with a 1 for the bias, p the gradient of the row's own sample's loss
by its output, from the true labels. They are taken in float64 over --images training images without
augmentation, in training mode (BatchNorm by batch), as the optimizers see them. spectra.py has the
formulas, probe.py what is measured of networks and runs.
"""
import argparse
import copy
import csv
import inspect
import io
import itertools
import math
import shlex
import statistics
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch

import data as datasets
import mac
import nysact
from flags import (COUNT, OPTIMIZER_FLAGS, POSITIVE, RECIPES, SEED, Parser, number, user_path)
from folder import write_file
from logs import METRICS, columns_of, compare_rows, group_runs, in_words, mean_std, read_logs
from models import CIFAR_MODELS
from probe import (attention_matrices, choose, layers_of, loss_at, output_gradients, project,
                   run_ends, sample, second_moments, set_up, stages, surface, train_and_watch,
                   train_placebo, trained_paths, training, watch_updates)
from ranks import Diverged, UsageError, tell
from report import print_anything
from spectra import (alignment, contraction, correlation, cosine_bound, gershgorin_discs, kaiser,
                     preconditioned_grams, principal_plane, signal_to_noise, spectrum,
                     symmetric_noise, top_eigenvalues)

NAME = dict(type=str.lower, metavar="NAME")    # of a flag with many choices


# ---------------------------------------------------------------------------------------------
# Numbers, tables, pictures
# ---------------------------------------------------------------------------------------------

def print_table(columns, rows):
    lines = [list(columns), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
                              for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w)
                        for i, (cell, w) in enumerate(zip(line, widths))))


def write_csv(path, caption, args, columns, rows):
    """The caption, the command and torch's version as comments, then the header and the rows."""
    head = [caption, shlex.join(["python", "analyze.py", *args.argv]), f"torch {torch.__version__}"]
    content = io.StringIO()
    content.writelines(f"# {line}\n" for line in head)
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    write_file(path, lambda file: file.write(content.getvalue().encode(errors="backslashreplace")))


def publish(args, setup, when, caption, columns, rows, shown, size, draw):
    """Write FIGURE-MODEL-OPTIM-DATASET.csv and .png, print a table; returns path and caption.

    setup: what was trained, or None. caption: what was found, and what is shown, to which `setup`
    and `when` are added. columns: names, with units where there are any; rows: tuples; shown: those
    of the printed table. draw: what fills an empty matplotlib figure of `size` inches.
    """
    folder, name, caption = Path(args.output_dir), args.figure, " ".join(caption.split())
    details = [args.note] if args.note else []
    if setup is not None:
        config = setup.config
        name = "-".join([name, config["model"], config["optim"], config["dataset"]])
        seeds = config["seed"] if isinstance(config["seed"], list) else [config["seed"]]
        seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        details.insert(0, f"{config['model']} on {config['dataset']}, {config['optim']}, {when}, "
                       f"{seeds}")
    if details:
        caption = f"{caption.rstrip('.')} ({'; '.join(details)})."
    write_csv(folder / f"{name}.csv", caption, args, columns, rows)
    if shown:
        print_table(columns, shown)
    print("", textwrap.fill(caption, 100), folder / f"{name}.csv", sep="\n")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from PIL import Image                        # matplotlib needs it too
    except ImportError:
        print("no picture, since matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return folder / name, caption
    picture, buffer = Figure(figsize=size, layout="constrained", dpi=90), io.BytesIO()
    with rc_context({"axes.formatter.useoffset": False, "axes.labelsize": 9, "xtick.labelsize": 8,
                     "ytick.labelsize": 8}):
        draw(picture)
    picture.supxlabel(textwrap.fill(caption, int(size[0] * 17)), fontsize=8, x=0.01, ha="left")
    picture.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")           # 256 colours are a third of the bytes
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    write_file(folder / f"{name}.png", lambda file: image.save(file, "PNG", optimize=True))
    print(folder / f"{name}.png")
    return folder / name, caption


def finish(axis, xlabel, ylabel, title):
    """Words and grid of one panel; its legend stands above it, where it covers no data."""
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    low, high = axis.get_ylim()
    margin = 0.01 * max(abs(low), abs(high))
    if high - low < margin:                  # all values alike: no ticks such as 0.9999991
        axis.set_ylim(low - margin, high + margin)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, title=title,
                    title_fontsize=9, fontsize=7, borderaxespad=0.2, columnspacing=1,
                    ncols=3 if max(map(len, labels)) < 16 else 2 if len(labels) > 2 else 1)
    else:
        axis.set_title(title, fontsize=9)


def by_layer(axis, names, ylabel, title, *series):
    """Each of series (values, mark, label) over the layers, in the order of the network."""
    for values, mark, label in series:
        axis.plot(range(len(names)), values, mark, ms=6, mfc="none", label=label)
    ticks = range(0, len(names), math.ceil(len(names) / 25))
    axis.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=6)
    finish(axis, "layer", ylabel, title)


def colours(items):
    """(item, colour from dark to light) for a sequence of things that are ordered."""
    from matplotlib import colormaps
    return [(item, colormaps["viridis"](0.9 * i / max(1, len(items) - 1)))
            for i, item in enumerate(items)]


def evenly(items, count):
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return [items[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]


def span(values, digits=3):
    """The smallest and the largest in words: '0.79 to 0.99'."""
    return " to ".join(dict.fromkeys(f"{v:.{digits}g}" for v in (min(values), max(values))))


# ---------------------------------------------------------------------------------------------
# The figures; their docstrings are what --help shows
# ---------------------------------------------------------------------------------------------

def overview(args):
    """What MAC does, at a glance, beside SGD at the same rate.

    Left: inputs a of one layer, seen along their mean ā and along the direction across it in which
    the gradient is longest; and the gradient G, as a step of SGD and as MAC's, G̃ = G − (G ā) āᵀ/(ρ
    + ‖ā‖²), the two drawn at one scale. Middle: the part of its length that a gradient has along
    ā, ‖G ā‖/(‖G‖ ‖ā‖), in each layer but the first (which MAC treats by A itself), and what is left
    of it. Both after --steps of SGD. Right: the loss meanwhile, and that of MAC from the same start
    on the same batches, each a mean over the last 20 steps.
    """
    setup, other = set_up(args), set_up(args, "mac")
    layer, = choose(setup.net, args.layer, (0.5,))
    losses = [[loss for step, loss in training(each, args.steps) if step]
              for each in (setup, other)]
    names, ρ = list(layers_of(setup.net))[1:], other.config["damping"]
    batches = sample(setup.data, args)
    moments = second_moments(setup.net, batches, dict.fromkeys([*names, layer]))

    def steps(name):
        """The mean's direction, G, and G̃."""
        m = moments[name]
        return m.mean / m.mean.norm(), m.G, mac.precondition(m.G[None], m.mean[None], ρ)[0]
    along = []
    for name in names:
        u, *steps_of_both = steps(name)
        along.append([(step @ u).norm().item() / steps_of_both[0].norm().item()
                      for step in steps_of_both])
    u, *arrows = steps(layer)
    across = torch.linalg.svd(arrows[0] - (arrows[0] @ u)[:, None] * u).Vh[0]
    arrows = [[(step @ v).norm().item() for v in (u, across)] for step in arrows]
    points = project(setup.net, batches[0][0], layer, torch.stack([u, across]))
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:1000]]

    sizes = [span([100 * values[i] for values in along], 2) for i in (0, 1)]
    publish(args, setup, f"{args.steps} steps at lr {setup.config['lr']:g}", f"""{sizes[0]} % of a
        gradient's length lie along the mean input of its layer; MAC leaves {sizes[1]} % of that
        length there, and all that lies across. Right: both at the same rate.""",
            ("of", "at", "sgd", "mac"),
            [*(("length along the mean", name, *both) for name, both in zip(names, along)),
             *(("loss", step, *both) for step, both in enumerate(zip(*losses), 1))],
            [("length along the mean", name, *both) for name, both in zip(names, along)],
            (11.1, 3.7), partial(draw_overview, points=points, arrows=arrows, along=along,
                                 losses=losses))


def draw_overview(picture, points, arrows, along, losses):
    left, middle, right = picture.subplots(1, 3, width_ratios=(1.2, 1, 1))
    left.plot(*points.T, ".", ms=3, color="0.75", label="inputs")
    end = 1.1 * points[:, 0].quantile(0.99).item()
    left.set_xlim(-0.1 * end, end)
    size = 0.9 * min(end / arrows[0][0], left.get_ylim()[1] / arrows[0][1])
    for (x, y), colour, label in zip(arrows, ("C0", "C3"), ("step of SGD", "step of MAC")):
        left.annotate("", (size * x, size * y), (0, 0), arrowprops=dict(
            arrowstyle="-|>", color=colour, lw=2.5, mutation_scale=18))
        left.plot([], [], color=colour, lw=2.5, label=label)
    finish(left, "along the mean input ā", "across it",
           "Inputs lie to one side. MAC steps less far that way")
    for values, colour, label in zip(zip(*along), ("C0", "C3"), ("SGD", "MAC")):
        middle.plot(range(2, len(along) + 2), values, "o", ms=5, color=colour, label=label)
    middle.set_ylim(0, 1)
    finish(middle, "layer", "length along ā, over the gradient's",
           "So in every layer (the first is treated otherwise)")
    for values, colour, label in zip(losses, ("C0", "C3"), ("SGD", "MAC")):
        right.plot([statistics.mean(values[max(0, i - 19):i + 1]) for i in range(len(values))],
                   color=colour, label=label)
    finish(right, "step", "training loss", "And the loss falls faster, at the same rate")


def effect(args):
    """Does the preconditioner do anything? Each module's update beside that of plain momentum.

    Along the run of any optimizer, without weight decay: cosine and ratio of lengths of the update
    (over −lr) against the momentum of the raw gradients on the same path; the smallest and largest
    eigenvalue of the multiplier B; the cosine that these guarantee while B stands still,
    2√(low·high)/(low + high); and relative damping, damping over the mean eigenvalue of what it is
    added to. Beside it a placebo: plain momentum from the same start on the same batches, each
    module's step multiplied by one constant, its mean ratio of lengths. If the placebo's loss falls
    as fast, then the length of the steps did it and not their direction.
    """
    setup, found, losses = set_up(args), [], {args.optim: []}
    for step, loss, modules in watch_updates(setup, args.steps, max(1, args.steps // 20)):
        losses[args.optim].append(loss)
        found += [(name, step, cosine, ratio, low, high, cosine_bound(low, high), damping)
                  for name, (cosine, ratio, low, high, damping) in modules.items()]
    ratios = {}
    for name, _, _, ratio, *_ in found:
        ratios.setdefault(name, []).append(ratio)
    constants = {name: statistics.mean(values) for name, values in ratios.items()}
    losses["placebo"] = train_placebo(setup, args.steps, constants)
    padded = losses["placebo"] + [math.nan] * args.steps
    rows = [(*row, losses[args.optim][row[1] - 1], constants[row[0]], padded[row[1] - 1])
            for row in found]
    last = [row for row in rows if row[1] == rows[-1][1] and row[0] in layers_of(setup.net)]
    ends = [statistics.mean(values[-10:]) for values in (losses[args.optim], padded[:args.steps])]
    end = "has diverged" if math.isnan(ends[1]) else f"is at {ends[1]:.3g}"
    publish(args, setup, f"{args.steps} steps of {args.batch_size} images", f"""The loss of
        {args.optim} is {ends[0]:.3g} in the last ten steps; a placebo, plain momentum with one
        constant per module that makes its steps as long on average, {end}: the difference is what
        the directions do. With cosine 1 and multipliers without range {args.optim} would be
        SGD.""",
            ("module", "step", "cosine", "length_ratio", "multiplier_min", "multiplier_max",
             "cosine_bound", "relative_damping", "loss", "placebo_constant", "placebo_loss"), rows,
            last, (12, 8), partial(draw_effect, rows=rows, last=last, losses=losses))


def draw_effect(picture, rows, last, losses):
    (cosines, ratios, loss), (bounds, ranges, damping) = picture.subplots(2, 3)
    names = [row[0] for row in last]
    for name, colour in colours(evenly(names, 6)):
        steps, cosine, ratio, *_ = columns_of([row for row in rows if row[0] == name], 1)
        cosines.plot(steps, cosine, ".-", color=colour, label=name)
        ratios.plot(steps, ratio, ".-", color=colour, label=name)
        ratios.axhline(statistics.mean(ratio), color=colour, ls=":", lw=1)
    cosines.axhline(1, color="k", ls=":", lw=1)
    finish(cosines, "step", "cosine (dotted: placebo)", "Direction: step and plain momentum's")
    ratios.set_yscale("log")
    finish(ratios, "step", "ratio (dotted: placebo)", "Length: step over plain momentum's")
    for (name, values), style in zip(losses.items(), ("-", "--")):
        means = [statistics.mean(values[max(0, i - 9):i + 1]) for i in range(len(values))]
        loss.plot(range(1, len(means) + 1), means, style, label=name)
    finish(loss, "step", "training loss, mean of 10 steps", "Do the directions help?")
    _, cosine, _, low, high, bound, relative, _, constant, _ = columns_of(last, 1)
    by_layer(bounds, names, "cosine", f"Direction in step {last[0][1]}", (cosine, "o", "measured"),
             (bound, "_", "at least, while B stands still"))
    ranges.vlines(range(len(last)), low, high, lw=3, label="eigenvalues of B")
    ranges.set_yscale("log")
    by_layer(ranges, names, "factor", "What the multiplier B does to a gradient",
             (constant, "kx", "placebo's constant"))
    damping.set_yscale("log")
    damping.axhline(1, color="k", ls=":", lw=1)
    by_layer(damping, names, "damping / mean eigenvalue", "Far above 1, damping makes it SGD",
             (relative, "o", None))


def spectra(args):
    """The 50 largest eigenvalues of A, P and A ⊗ P at the beginning, middle and end of training.

    MAC, figure 1. Without --layer: the first, the middle and the last. A ⊗ P is K-FAC's block but
    for the number of positions of a convolution, by which P is multiplied there.
    """
    rows = []
    for when, setup in stages(args, (0, 0.5, 1)):
        names, gaps = choose(setup.net, args.layer, (0, 0.5, 1)), {"A": [], "P": []}
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            for matrix, values in top_eigenvalues(m, 50).items():
                rows += [(name, when, matrix, i + 1, v)
                         for i, v in enumerate(values.tolist()) if v > 1e-12 * values[0]]
            for matrix, M in (("A", m.A), ("P", m.P)):
                gaps[matrix].append((torch.linalg.eigvalsh(M)[-1] / M.trace()).item())
    whens = list(dict.fromkeys(row[1] for row in rows))

    def draw(picture):
        axes = picture.subplots(len(names), 3, squeeze=False, sharex=True)
        for name, line in zip(names, axes):
            for axis, matrix in zip(line, ("A", "P", "A ⊗ P")):
                for when, colour in colours(whens):
                    points = [row[3:] for row in rows if row[:3] == (name, when, matrix)]
                    axis.semilogy(*zip(*points), ".-", ms=3, lw=1, color=colour, label=when)
                finish(axis, "index, largest first" if name == names[-1] else None, "eigenvalue",
                       f"{matrix} of {name}")
    publish(args, setup, f"up to {when}", f"""The largest eigenvalue holds {span(gaps['A'])} of
        the trace of A in the end, and {span(gaps['P'])} of that of P. Shown: the largest
        eigenvalues of the second moments A of the inputs and P of the output gradients of some
        layers, and of A ⊗ P, their products.""",
            ("layer", "when", "matrix", "index", "eigenvalue"), rows,
            [row for row in rows if row[3] in (1, 10)], (10, 2.6 * len(names) + 1), draw)


def mean(args):
    """Per layer: |cos∠(v₁(A), ā)| with the bound of Proposition 4.1; ‖Σ‖₂ beside ‖ā‖².

    MAC, figure 2. A = ā āᵀ + Σ, v₁ the top eigenvector. From sin θ ≤ ‖Σ‖₂/‖ā‖² a least cosine, 0
    where ‖Σ‖₂ is the larger; and a sharper one that also asks how far Σ turns ā (see alignment).
    MAC itself treats the first layer by A, and the value projection by attended tokens.
    """
    rows = []
    for when, setup in stages(args, (0, 1)):
        names = list(layers_of(setup.net))
        for name, m in second_moments(setup.net, sample(setup.data, args), names).items():
            rows.append((name, when, *alignment(m.A, m.mean).values()))
    before, after = ([row for row in rows if row[1] == w] for w in (rows[0][1], when))
    cosine, bound, sharp, squared, spread, frobenius = columns_of(after, 2)

    def draw(picture):
        left, right = picture.subplots(1, 2)
        by_layer(left, names, "|cos∠(v₁(A), ā)|", "Is the top eigenvector of A the mean input?",
                 (columns_of(before, 2)[0], ".", f"measured, {before[0][1]}"),
                 (cosine, "o", f"measured, {when}"), (sharp, "_", "at least (sharper bound)"),
                 (bound, "x", "at least (‖Σ‖₂/‖ā‖²)"))
        right.set_yscale("log")
        by_layer(right, names, "squared length of an input", "A = ā āᵀ + Σ: which is larger?",
                 (squared, "s", "ā: ‖ā‖²"), (spread, "^", "Σ: ‖Σ‖₂"),
                 (frobenius, "v", "Σ: Frobenius norm"))
    ratio = statistics.median(b / a if a else math.inf for a, b in zip(squared, spread))
    publish(args, setup, when, f"""The top eigenvector of A is at a cosine of
        {span(cosine[1:])} to the mean input ā in the layers after the first, and the part Σ of
        A = ā āᵀ + Σ that MAC drops is {ratio:.2g} times as large as what it keeps (‖Σ‖₂/‖ā‖²,
        median of the layers).""",
            ("layer", "when", "cosine", "bound", "sharp_bound", "mean_squared", "spread_spectral",
             "spread_frobenius"), rows, after, (11, 5.3), draw)


def attention(args):
    """Is attention its column means t̄? Singular values of T; |cos| of its top right one with t̄.

    MAC, figure 3. T (N, N) is averaged over images and heads. It is not symmetric: T = 1 t̄ᵀ + E,
    so the right singular vector is what Proposition 4.1 compares with t̄. Averaging itself brings
    T nearer to rank 1, hence the mean cosine of single images and heads beside it.
    """
    rows = []
    for when, setup in stages(args, (0, 1)):
        for block, (T, cosines) in attention_matrices(setup.net, sample(setup.data, args)).items():
            near = list(alignment(T.mT @ T / len(T), T.mean(0)).values())[:3]
            rows.append((block, when, *near, cosines.mean().item(),
                         *torch.linalg.svdvals(T).tolist()))
    before, after = ([row for row in rows if row[1] == w] for w in (rows[0][1], when))
    cosine, bound, sharp, single = columns_of(after, 2)[:4]

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for (block, _, *_, sigma), colour in colours([(*r[:6], r[6:]) for r in evenly(after, 4)]):
            sigma = [v for v in sigma if v > 1e-12 * sigma[0]]
            left.semilogy(range(1, len(sigma) + 1), sigma, ".-", ms=3, color=colour, label=block)
        finish(left, "index, largest first", "singular value", f"T averaged, {when}")
        by_layer(right, [row[0] for row in after], "|cos∠(top right singular vector, t̄)|",
                 "Is T its mean row t̄?",
                 (columns_of(before, 2)[0], ".", f"averaged T, {before[0][1]}"),
                 (cosine, "o", f"averaged T, {when}"), (sharp, "_", "at least (sharper bound)"),
                 (single, "x", f"single images, heads, {when}"))
    columns = ["block", "when", "cosine", "bound", "sharp_bound", "single_cosine"]
    columns += [f"sigma_{i + 1}" for i in range(len(rows[0]) - len(columns))]
    publish(args, setup, when, f"""Mean attention t̄ is at a cosine of {span(cosine)} to the top
        right singular vector of the attention matrix T averaged over images and heads, and of
        {span(single)} in the mean of single ones.""",
            columns, rows, [], (10, 5), draw)
    print_table(columns[:8], [row[:8] for row in after])


def convergence(args):
    """The convergence factor of GD, FOOF, K-FAC, NysAct and MAC along one run of training.

    MAC, figure 4, where the definition is not given; ours: u are the logits of the true labels of
    the first --samples images, J their Jacobian by the weights of all Linear and Conv2d layers, B
    a method's multiplier at its published damping. Steps along −B Jᵀ(u − y) change u by J B Jᵀ, so
    the slowest component shrinks by 1 − c per step of size 1/λ_max, with the factor
    c = λ_min(J B Jᵀ)/λ_max(J B Jᵀ). J B Jᵀ is a sum over layers. An attention block's qkv counts as
    one Linear for all methods, MAC too, which would take the value projection by attended tokens.
    """
    rows, setup = [], set_up(args)
    (x, y), = sample(setup.data, argparse.Namespace(images=args.samples, batch_size=args.samples))
    names = list(layers_of(setup.net))
    for step, _ in training(setup, args.steps):
        if step % max(1, args.steps // 8):
            continue
        moments, grams = second_moments(setup.net, sample(setup.data, args), names), {}
        for name, J in output_gradients(setup.net, x, y, names).items():
            for method, gram in preconditioned_grams(J, moments[name], name == names[0]).items():
                grams[method] = grams.get(method, 0) + gram
        rows += [(method, step, *contraction(gram)) for method, gram in grams.items()]

    def draw(picture):
        axis = picture.subplots()
        for method in grams:
            steps, factor, *_ = columns_of([row for row in rows if row[0] == method], 1)
            axis.semilogy(steps, [c or math.nan for c in factor], "o-", ms=4, label=method)
        finish(axis, "steps of training", "convergence factor c = λ_min/λ_max",
               "How fast the slowest error shrinks, at the same weights")
    ends = ", ".join(f"{method} {100 * c:.2g} %" for method, _, c, *_ in rows[-len(grams):])
    publish(args, setup, f"{len(y)} images", f"""Of the slowest component of a least-squares problem
        on the linearised network one step removes in the end: {ends}. All methods are compared at
        the weights of one run.""",
            ("method", "step", "factor", "lambda_min", "lambda_max"), rows,
            rows[:len(grams)] + rows[-len(grams):], (7, 5), draw)


def factors(args):
    """(setup, when, layer to draw, {(layer, "H" or "S"): K-FAC's A or P}) at the end of a run."""
    (when, setup), = stages(args)
    layer, = choose(setup.net, args.layer, (0.5,))
    found = second_moments(setup.net, sample(setup.data, args), list(layers_of(setup.net)))
    matrices = {(name, factor): M for name, m in found.items()
                for factor, M in (("H", m.A), ("S", m.P))}
    for (name, factor), M in matrices.items():
        if not M.any():
            raise UsageError(f"{factor} of {name} is 0, the network is dead: try a smaller --lr")
    return setup, when, layer, matrices


def of_factor(rows, factor, column, scale=1):
    """A column of the rows of H or of S, multiplied by scale."""
    return [scale * row[column] for row in rows if row[1] == factor]


def gershgorin(args):
    """Gershgorin discs of the Kronecker factors, and the share of rows that dominate diagonally.

    AdaFisher, section 3.1. Row i of H (K-FAC's A) or S (its P) gives a disc of centre M_ii and
    radius Σ_{j≠i} |M_ij|; all eigenvalues lie in the union. If radius < centre in all rows, M is
    diagonally dominant. The matrices are taken as they are, and drawn over their largest
    eigenvalue: bringing their entries to [0, 1] first, as in the published picture, would change
    every eigenvalue. Rows of zeros are left out.
    """
    setup, when, layer, matrices = factors(args)
    rows = []
    for key, M in matrices.items():
        centres, radii = gershgorin_discs(M)
        used = centres > 0
        rows.append((*key, len(M), (radii < centres)[used].double().mean().item(),
                     (radii / centres)[used].median().item(),
                     (radii.sum() / M.abs().sum()).item()))

    def draw(picture):
        *axes, shares = picture.subplots(1, 3)
        for axis, factor in zip(axes, "HS"):
            draw_discs(axis, matrices[layer, factor])
            finish(axis, "real part / largest eigenvalue", "imaginary part", f"{factor} of {layer}")
        by_layer(shares, [row[0] for row in rows if row[1] == "H"], "rows, %",
                 "Rows that dominate diagonally",
                 *((of_factor(rows, factor, 3, 100), mark, factor) for factor, mark in
                   (("H", "o"), ("S", "x"))))
        shares.set_ylim(-5, 105)
    dominant = [statistics.mean(of_factor(rows, factor, 3, 100)) for factor in "HS"]
    publish(args, setup, when, f"""Of a diagonal matrix all rows dominate; of H {dominant[0]:.3g} %
        do, of S {dominant[1]:.3g} % (mean of the layers). Left: Gershgorin discs of {layer}; one
        that reaches 0 leaves the sign of an eigenvalue open.""",
            ("layer", "factor", "rows", "dominant_share", "median_radius_over_centre",
             "off_diagonal_share"), rows, rows, (13, 4.8), draw)


def draw_discs(axis, M):
    """The Gershgorin discs and the eigenvalues of M, over the largest of these."""
    from matplotlib.collections import EllipseCollection
    values = torch.linalg.eigvalsh(M)
    centres, radii = (x.numpy() for x in gershgorin_discs(M / values[-1]))
    zeros = 0 * centres
    axis.add_collection(EllipseCollection(
        2 * radii, 2 * radii, zeros, units="xy", array=radii, facecolor="none", lw=0.6,
        offsets=list(zip(centres, zeros)), offset_transform=axis.transData))
    axis.plot(values / values[-1], zeros, "k|", ms=9, label="eigenvalues")
    axis.plot(centres, zeros, "r.", ms=3, label="centres M_ii")
    axis.axvline(0, color="k", ls=":", lw=1)
    axis.set_xlim(1.05 * (centres - radii).min(), 1.05 * (centres + radii).max())
    axis.set_ylim(-1.05 * radii.max(), 1.05 * radii.max())


def perturb(args):
    """Eigenvalues of the factors with noise off the diagonal, and how many Kaiser's rule keeps.

    AdaFisher, section 3.1. Kaiser's rule keeps eigenvalues above 1, the mean eigenvalue of a
    correlation matrix, so H and S are brought to unit diagonal first. The noise is symmetric,
    normal, of deviation --noise off the diagonal; Weyl: no eigenvalue moves by more than ‖E‖₂. With
    the diagonal alone, all eigenvalues would be 1: what lies above and below is what a diagonal
    approximation drops.
    """
    setup, when, layer, matrices = factors(args)
    rows, pairs = [], {}
    for key, M in matrices.items():
        R = correlation(M)
        E = symmetric_noise(R, args.noise)
        values, noisy = pairs[key] = [torch.linalg.eigvalsh(X).flip(0) for X in (R, R + E)]
        rows.append((*key, len(R), *kaiser(values), *kaiser(noisy), int((noisy < 0).sum()),
                     (values - noisy).abs().max().item(), torch.linalg.matrix_norm(E, 2).item()))

    def draw(picture):
        *axes, kept = picture.subplots(1, 3)
        for axis, factor in zip(axes, "HS"):
            for values, mark, label in zip(pairs[layer, factor], "ox", ("as it is", "with noise")):
                axis.loglog(range(1, len(values) + 1), values.clamp(min=1e-5), mark, ms=4,
                            mfc="none", label=label)
            axis.axhline(1, color="k", ls=":", label="diagonal alone")
            finish(axis, "index, largest first", "eigenvalue (below 1e-5 drawn there)",
                   f"{factor} of {layer} at unit diagonal")
        by_layer(kept, [row[0] for row in rows if row[1] == "H"], "share, %",
                 "What Kaiser's rule keeps", *(
                     series for factor, marks in (("H", "os"), ("S", "x+")) for series in (
                         ([100 * row[3] / row[2] for row in rows if row[1] == factor], marks[0],
                          f"{factor}: eigenvalues above 1"),
                         (of_factor(rows, factor, 4, 100), marks[1],
                          f"{factor}: share of the trace"))))
        kept.set_ylim(-5, 105)
    moved = max(row[8] for row in rows)
    publish(args, setup, when, f"""The eigenvalues above 1, which Kaiser's rule keeps, hold
        {span(of_factor(rows, 'H', 4, 100))} % of the trace of H at unit diagonal and
        {span(of_factor(rows, 'S', 4, 100))} % of that of S, where a diagonal matrix has none.
        Symmetric noise of deviation {args.noise:g} off the diagonal moves none of them by more than
        {moved:.2g}.""",
            ("layer", "factor", "rows", "kept", "kept_share", "noisy_kept", "noisy_kept_share",
             "noisy_negative", "largest_change", "noise_norm"), rows, rows, (13, 4.8), draw)


def fourier(args):
    """What frequencies the Kronecker factors hold, and the ratio of diagonal to off-diagonal in dB.

    AdaFisher, section 3.1: |fft2| of H and S in dB (20 log₁₀), with and without symmetric noise of
    deviation --noise times the mean diagonal entry, and of the diagonal alone, whose transform
    depends on the sum of both frequencies only: ridges. The ratio is
    10 log₁₀(Σᵢ M_ii² / Σ_{i<j} M̂_ij²), M̂ with the noise.
    """
    setup, when, layer, matrices = factors(args)
    noisy = {key: M + symmetric_noise(M, args.noise) for key, M in matrices.items()}
    rows = [(*key, len(M), signal_to_noise(M, M), signal_to_noise(M, noisy[key]))
            for key, M in matrices.items()]

    def draw(picture):
        for line, factor in zip(picture.subplots(2, 4), "HS"):
            M = matrices[layer, factor]
            shown = line[0].imshow((M / M.abs().max()).numpy(), cmap="gray",
                                   interpolation="nearest")
            line[0].set_title(f"{factor} of {layer} / its largest entry", fontsize=9)
            line[0].set(xlabel="column", ylabel="row")
            picture.colorbar(shown, ax=line[0], shrink=0.8)
            for axis, X, title in zip(line[1:], (M, noisy[layer, factor], M.diagonal().diag()),
                                      ("as it is", "with noise", "the diagonal alone")):
                shown = axis.imshow(spectrum(X).numpy(), vmin=-80, interpolation="nearest",
                                    extent=(-math.pi, math.pi, math.pi, -math.pi))
                axis.set_title(f"spectrum of {factor}, {title}", fontsize=9)
                axis.set(xlabel="frequency, rad", ylabel="frequency, rad")
            picture.colorbar(shown, ax=line[1:], shrink=0.8, label="dB below the largest")
    publish(args, setup, when, f"""The diagonal is at {span(of_factor(rows, 'H', 3))} dB to what
        lies above it in H and at {span(of_factor(rows, 'S', 3))} dB in S; below 0 it is the smaller
        part. Of {layer}: the factors and their two-dimensional spectra, where a diagonal matrix
        shows the ridges of the last column (noise: symmetric, off the diagonal, deviation
        {args.noise:g} of the mean diagonal entry).""",
            ("layer", "factor", "rows", "diagonal_to_upper_dB", "diagonal_to_noisy_upper_dB"), rows,
            rows, (14, 7), draw)


def landscape(args):
    """The paths of several optimizers on one loss surface: the plane that holds most of them.

    AdaFisher, section 4. Without RUN: --optim are trained from one seed; the plane is that of the
    two leading principal directions of all their iterates. With RUN, folders of train_cifar.py of
    one network and data set: of each only the last checkpoint exists, so its path is the straight
    line from its start, built again from the seed. The surface is the loss on --images training
    images. Directions have length 1 in the space of the parameters and are not normalised by
    filter: the paths are to scale. An iterate lies off the plane, so its own loss stands beside
    the plane's in the csv.
    """
    paths, setup = run_ends(args) if args.runs else trained_paths(args)
    points = torch.stack([point for path in paths.values() for _, point in path])
    centre, directions, coordinates, shares = principal_plane(points)
    batches, net = sample(setup.data, args), copy.deepcopy(setup.net).train()
    steps = [(label, when) for label, path in paths.items() for when, _ in path]
    rows = [(*step, *at.tolist(), loss_at(net, point, batches),
             loss_at(net, centre + at @ directions, batches))
            for step, at, point in zip(steps, coordinates, points)]
    xs, ys, losses = surface(net, centre, directions, coordinates, batches, args.grid)
    ends = {row[0]: row for row in rows}

    def draw(picture):
        axis = picture.subplots()
        ceiling = 2 * max(row[5] for row in rows)
        filled = axis.contourf(xs, ys, losses.clamp(max=ceiling).log10(), 30, cmap="Greys")
        picture.colorbar(filled, label="log₁₀ of the loss in the plane", shrink=0.8)
        for label, end in ends.items():
            line = [row for row in rows if row[0] == label]
            drawn, = axis.plot(*columns_of(line, 2)[:2], "o--" if args.runs else ".-", ms=4,
                               label=label)
            axis.plot(*end[2:4], "*", ms=13, color=drawn.get_color(), mec="k")
        axis.plot([], [], "k*", label="the end", ms=9)
        axis.set_aspect("equal")
        finish(axis, *(f"principal direction {i + 1}, length in weights\n({100 * share:.1f} % of "
                       "the iterates' variance)" for i, share in enumerate(shares.tolist())),
               "Paths on the loss in the plane that holds most of them")
    said = ", ".join(f"{label} {end[4]:.2f}" for label, end in ends.items())
    path, caption = publish(args, setup, f"{len(points)} iterates", f"""Losses in the end: {said}.
        Paths {'(straight from start to end)' if args.runs else 'from one start'} are
        projected to the plane of the iterates' two leading principal directions (not normalised by
        filter), on the loss in that plane over {sum(len(y) for _, y in batches)} training images,
        which off the plane, at the iterates themselves, is another.""",
        ("path", "when", "direction_1", "direction_2", "loss", "loss_in_plane"), rows,
        list(ends.values()), (8, 2.3 + 5 * min(1.4, ((ys[-1] - ys[0]) / (xs[-1] - xs[0])).item())),
        draw)
    write_csv(path.with_name(f"{path.name}-surface.csv"), caption, args,
              ("direction_1", "direction_2", "loss"),
              [(x, y, loss) for y, line in zip(ys.tolist(), losses.tolist())
               for x, loss in zip(xs.tolist(), line)])


def nystrom(args):
    """What NysAct's sketch holds of each layer, after training with its published settings.

    λ₁ is the largest eigenvalue of the covariance A that was averaged until the sketch Â in use
    after --steps was renewed, as every --tinv steps; λ̂₁ that of Â; the smallest eigenvalue of the
    preconditioner ρ(Â + ρI)⁻¹ stands beside the true ρ/(ρ + λ₁), where 1 would be plain SGD; and
    the condition number of (Â + ρI)⁻¹(A + ρI), 1 if Â were A, beside that of A + ρI.
    """
    setup = set_up(args)
    ρ, rank, sketch, tinv = (setup.config[name] for name in ("damping", "rank", "sketch", "tinv"))
    when = f"{args.steps} steps, ρ = {ρ:g}"
    if args.steps % tinv:
        when += f", sketches of step {args.steps // tinv * tinv}"
    # one step more than asked for: what is applied is renewed at the beginning of a step
    averages, _ = train_and_watch(setup, args.steps + 1)
    rows = [sketch_row(layer, averages[layer.weight], setup.optimizer.state[layer.weight], ρ)
            for layer in setup.optimizer.layers.values()]
    identities = sum(row[4] > 0.999 and row[5] < 0.99 for row in rows)
    names, _, top, seen, _, _, condition, plain = columns_of(rows, 0)

    def draw(picture):
        left, right = picture.subplots(1, 2)
        for axis in (left, right):
            axis.set_yscale("log")
        by_layer(left, names, "largest eigenvalue", "What the sketch sees", (top, "o", "λ₁ of A"),
                 (seen, "x", "λ̂₁ of the sketch"))
        by_layer(right, names, "condition number", "What is left to do", (plain, "o", "A + ρI"),
                 (condition, "x", "(Â + ρI)⁻¹(A + ρI)"))
    publish(args, setup, when, f"""A rank-{rank} {sketch} sketch holds
        {span([100 * b / a for a, b in zip(top, seen)])} % of the largest eigenvalue of a layer's
        input covariance A; preconditioned by it, A + ρI has condition numbers of {span(condition)}
        in place of {span(plain)}. {identities} of {len(rows)} preconditioners are the
        identity.""",
            ("layer", "d", "lambda_1", "sketch_lambda_1", "smallest_eigenvalue", "true_smallest",
             "condition", "condition_plain"), rows, rows, (10, 4.8), draw)


def sketch_row(layer, A, state, ρ):
    """Name, d, λ₁, λ̂₁, smallest eigenvalue, the true one, condition number with and without."""
    true, identity = torch.linalg.eigvalsh(A), torch.eye(len(A), dtype=A.dtype)
    if "eigenvalues" in state:
        U, eigenvalues = state["U"].double(), state["eigenvalues"].double()
        seen = eigenvalues.max()
        R = torch.linalg.cholesky(A + ρ * identity)             # similar to (Â + ρI)⁻¹(A + ρI)
        values = torch.linalg.eigvalsh(
            nysact.precondition(R.mT[None], U, eigenvalues, ρ)[0] @ R)
    else:                                                       # d ≤ r: exact
        seen, values = true[-1], torch.ones(2)
    return layer.name, len(A), *map(float, (
        true[-1], seen, ρ / (ρ + seen), ρ / (ρ + true[-1]), values[-1] / values[0],
        (true[-1] + ρ) / (true[0] + ρ)))


def compare(args):
    """A table and curves of runs of any script: the last epoch, and the difference to the first.

    MAC, figure 5. RUN is a folder that a training script wrote, or one that holds such folders.
    Runs that differ in nothing but the seed are one line, mean ± standard deviation; the difference
    is paired, of runs with the same seed. Accuracy and perplexity are those of the last epoch that
    is logged. Seconds are those of the training passes as logged, whatever else the machine was
    doing: bench.py measures what a step costs.
    """
    groups = group_runs(read_logs(args.runs))
    logs = [log for group in groups.values() for log in group.values()]
    metrics = {log.metric for log in logs}
    if len(metrics) > 1:
        raise UsageError("some of these runs have an accuracy and others a perplexity: compare "
                         "those of pictures and those of text apart")
    metric, = metrics
    for name in ("model", "dataset"):
        values = dict.fromkeys(str(log.config[name]) for log in logs if name in log.config)
        if len(values) > 1:
            tell(f"note: the runs differ in {name}, {', '.join(values)}")
    print_table(("run", "optimizer", "seeds", "epochs", "train loss", METRICS[metric],
                 "difference", "s/epoch"), compare_rows(groups))
    best, value = max(((label, mean_std([log.rows[-1][3] for log in group.values()]))
                       for label, group in groups.items()), key=lambda pair: pair[1][0] * (
                           1 if metric == "test_acc" else -1))
    publish(args, None, "", f"""In the last epoch {best} is best ({METRICS[metric]}:
        {in_words(value)}). Bold: means over seeds. Seconds are those of the training passes as
        logged, on a machine that may have been busy with other things: python bench.py times
        steps.""",
            ("run", "seed", "epoch", "seconds", "train_loss", metric),
            [(label, seed, *row) for label, group in groups.items() for seed, log in group.items()
             for row in log.rows], [], (9, 7.5), partial(draw_curves, groups, METRICS[metric]))


def draw_curves(groups, metric, picture):
    axes = picture.subplots(2, 2, sharey="row", sharex="col")
    for i, (label, group) in enumerate(groups.items()):
        style = dict(color=f"C{i % 10}", ls=("-", "--", ":", "-.")[i // 10 % 4])
        runs = [columns_of(log.rows, 0) for log in group.values()]
        for line, of in zip(axes, (2, 3)):
            for axis, by in zip(line, (0, 1)):
                for run in runs if len(runs) > 1 else ():
                    axis.plot(run[by], run[of], lw=0.7, alpha=0.6, **style)
                axis.plot(*([statistics.mean(point) for point in zip(*(run[k] for run in runs))]
                            for k in (by, of)), marker=".", **style,
                          label=label if axis is axes[0, 0] else None)
    low, high = (end(log.rows[k][2] for group in groups.values() for log in group.values()
                     for k in range(len(log.rows))) for end in (min, max))
    axes[0, 0].set_yscale("log" if 0 < 10 * low < high else "linear")
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    picture.legend(loc="outside upper center", ncols=min(4, len(groups)), fontsize=8)
    for line, ylabel in zip(axes, ("training loss", metric)):
        for axis, xlabel in zip(line, ("epoch", "seconds of training, as logged")):
            axis.grid(alpha=0.3)
            axis.set(ylabel=ylabel, xlabel=xlabel)
            axis.set_title(f"{ylabel.split(',')[0]} by {xlabel.split(' ')[0]}", fontsize=9)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

# figure: (function, defaults of its flags); those that are not named are not its flags. lr is that
# of SGD where it trains only to be looked at, the rate of the MAC authors' analysis.
TRAINED = dict(model="resnet20", optim="sgd", steps=60, batch_size=64)
PROBED = TRAINED | dict(lr=0.01, images=256, from_run=None)
FIGURES = {
    "overview": (overview, TRAINED | dict(lr=0.1, steps=300, images=256, layer=None)),
    "effect": (effect, TRAINED | dict(optim="mac", steps=100)),
    "spectra": (spectra, PROBED | dict(layer=None, layers="+")),
    "mean": (mean, PROBED),
    "attention": (attention, PROBED | dict(model="deit_tiny_cifar", optim="adamw", steps=40,
                                           batch_size=32, images=128)),
    "convergence": (convergence, TRAINED | dict(model="lenet5", lr=0.01, steps=240, images=256,
                                                samples=64)),
    "gershgorin": (gershgorin, PROBED | dict(layer=None)),
    "perturb": (perturb, PROBED | dict(layer=None, noise=1e-3)),
    "fourier": (fourier, PROBED | dict(layer=None, noise=1e-3)),
    "landscape": (landscape, TRAINED | dict(
        model="lenet5", optim=["sgd", "mac", "kfac"], steps=240, images=256, grid=25, runs="*")),
    "nystrom": (nystrom, dict(model="resnet20", steps=100, batch_size=128)),
    "compare": (compare, dict(runs="+")),
}


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="python analyze.py FIGURE [flags]", allow_abbrev=False)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for name, (make, defaults) in FIGURES.items():
        lines = inspect.getdoc(make)
        runs = " RUN ..." if defaults.get("runs") == "+" else ""
        figure = figures.add_parser(name, usage=f"python analyze.py {name}{runs} [flags]",
                                    help=lines.split("\n")[0], description=lines,
                                    formatter_class=argparse.RawDescriptionHelpFormatter,
                                    allow_abbrev=False)
        figure.set_defaults(make=make)
        add_flags(figure, defaults)
    args = parser.parse_args(argv, argparse.Namespace(argv=argv, optim="nysact"))   # of nystrom
    check_runs(args)
    if args.optim == "sgd" and args.lr is None:
        args.lr = FIGURES[args.figure][1].get("lr")
    several = args.optim if isinstance(args.optim, list) else [args.optim]
    for name in sorted({name for recipe in RECIPES.values() for name in recipe}):
        if getattr(args, name, None) is not None and \
                not any(name in RECIPES[optim] for optim in several):
            raise UsageError(f"--{name} has no use in {', '.join(several)}")
    return args


def check_runs(args):
    """Refuse flags of the training where finished runs are looked at, whose own hold."""
    if getattr(args, "from_run", None) is None and not getattr(args, "runs", None):
        return
    given = {word.partition("=")[0].replace("-", "_") for word in args.argv}
    settled = ["dataset", "seed", "run", "model", "optim", "steps"]
    for name in itertools.chain(settled, *RECIPES.values()):
        if f"__{name}" in given:
            raise UsageError(f"--{name} has no use here, where nothing is trained: leave it out, "
                             "and the run's own value holds")


def add_flags(figure, defaults):
    """The flags that the defaults name; with a model, also where data lies and the optimizers'."""
    def flag(name, help, **kwargs):
        if name in defaults:
            shown = defaults[name]
            if isinstance(shown, list):
                shown, kwargs["nargs"] = " ".join(shown), "+"
            figure.add_argument(f"--{name}", default=defaults[name], help=help if shown is None
                                else f"{help} (default {shown})", **kwargs)
    if "runs" in defaults:
        figure.add_argument("runs", type=user_path, nargs=defaults["runs"], metavar="RUN",
                            help="folder that train_cifar.py wrote" if "model" in defaults
                            else "folder that a training script wrote, or one that holds such")
    figure.add_argument("--output_dir", type=user_path, default="figures", metavar="DIR",
                        help="folder of the csv and the PNG, which replace older ones of the same "
                        "name (default %(default)s)")
    figure.add_argument("--note", default="", metavar="TEXT",
                        help="added to the caption, on the data say")
    if "model" not in defaults:
        return
    figure.add_argument("--dataset", default="shapes", choices=list(datasets.STATISTICS),
                        **NAME, help="of %(choices)s (default %(default)s, generated)")
    figure.add_argument("--data_dir", type=user_path, default="data", metavar="DIR",
                        help="default %(default)s")
    figure.add_argument("--seed", "--run", type=SEED, default=0, metavar="SEED",
                        help="of everything random (default %(default)s)")
    flag("model", "%(choices)s", choices=list(CIFAR_MODELS), **NAME)
    flag("optim", "what trains; of %(choices)s", choices=list(RECIPES), **NAME)
    flag("steps", "steps of training", type=COUNT, metavar="N")
    flag("batch_size", "images per step", type=COUNT, metavar="N")
    flag("images", "images that statistics and losses are taken over", type=COUNT, metavar="N")
    flag("samples", "images of the Jacobian", type=COUNT, metavar="N")
    flag("layer", "layer by its name in the network; an unknown name lists all",
         nargs=defaults.get("layers", 1), metavar="NAME")
    flag("from_run", "take start and end of this run of train_cifar.py, and train nothing",
         type=user_path, metavar="DIR")
    flag("noise", "deviation of the noise off the diagonal, by the mean of the diagonal",
         type=POSITIVE, metavar="X")
    flag("grid", "points of the surface along each axis", metavar="N",
         type=number(int, lambda v: v >= 2, "a whole number of at least 2"))

    group = figure.add_argument_group("optimizer (what is not given is as published)")
    for name, settings in OPTIMIZER_FLAGS.items():
        if name != "calibrate":                      # a pass over all data, in MAC's first layer
            help = settings["help"]
            if name in defaults:
                help = f"{help} (default for sgd {defaults[name]})"
            metavar = getattr(settings["type"], "metavar", None)
            group.add_argument(f"--{name}", **{"metavar": metavar, **settings, "help": help})


def main(argv):
    """Run the command; its exit status."""
    print_anything()
    try:
        args = parse(argv)
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}")
        args.make(args)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, Diverged, datasets.DataError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except torch.linalg.LinAlgError:
        print("analyze.py: a matrix of the network has no eigenvalues to working precision, which "
              "means that training diverged: try a smaller --lr", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
