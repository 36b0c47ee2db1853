"""analyze.py: the numbers behind the figures, where the answer is known."""
import functools
import importlib.util
import json
import math
import os
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import analyze
import logs
import models
import nysact
import probe
import spectra
from adafisher import AdaFisher
from attention import attention_sum
from flags import RECIPES
from foof import FOOF
from kfac import KFAC
from mac import MAC
from nysact import NysAct
from ranks import Diverged, UsageError
from testing import at_most, close, randn, raises

f64 = functools.partial(torch.tensor, dtype=torch.float64)


def test_spectra():
    """The largest eigenvalues of A ⊗ P against those of the matrix; a known spectrum."""
    A, P = (Q @ f64(values).diag() @ Q.mT for values, Q in
            zip(([5, 3, 1], [2, 0.5]), (torch.linalg.qr(randn(n, n))[0] for n in (3, 2))))
    tops = spectra.top_eigenvalues(spectra.Moments(A, P, A[0], 1), 4)
    close(tops["A"], [5, 3, 1], 1e-14)
    close(tops["A ⊗ P"], [10, 6, 2.5, 2], 1e-14)
    close(tops["A ⊗ P"], torch.linalg.eigvalsh(torch.kron(A, P)).flip(0)[:4], 1e-14)


def analyze_data(n=12, size=8, classes=3):
    """A data set of random images, as data.load returns them."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    return probe.datasets.Data(images, labels, images, labels, classes, (0.3,) * 3, (0.4,) * 3,
                                 "")


def analyze_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(64, 3, bias=False))


def analyze_setup(optim, net, **options):
    """A Setup of this optimizer on this network and analyze_data()."""
    config = RECIPES[optim] | options | dict(optim=optim, seed=0, batch_size=4)
    flags = {name: config[name] for name in RECIPES[optim] if name != "calibrate"}
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "mac": MAC, "foof": FOOF,
            "nysact": NysAct, "kfac": KFAC, "adafisher": AdaFisher}[optim]
    first = net if optim not in ("sgd", "adamw") else net.parameters()
    return probe.Setup(analyze_data(), config, net, make(first, **flags))


def test_second_moments():
    """A, P and ā over two batches against unfolded patches and a gradient for each sample."""
    net, data = analyze_net().double(), analyze_data()
    x = probe.datasets.normalize(data.train_images, torch.tensor(data.mean),
                                   torch.tensor(data.std)).double()
    y = data.train_labels
    found = probe.second_moments(net, list(zip(x.split(7), y.split(7))), ["0", "3"])
    # matplotlib takes no tensor with a graph, and a graph would hold all activations
    assert not any(M.requires_grad for moments in found.values() for M in moments[:3])
    a = F.pad(F.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1), (0, 1), value=1.0)
    hidden = net[:3](x)
    ps = [[], []]
    for i in range(len(x)):
        s = net[0](x[i:i + 1])
        z = net[3](net[1:3](s))
        p = torch.autograd.grad(F.cross_entropy(z, y[i:i + 1]), (s, z))
        ps[0].append(p[0].flatten(2)[0].mT)
        ps[1].append(p[1])
    for name, rows, p in (("0", a, torch.cat(ps[0])), ("3", hidden, torch.cat(ps[1]))):
        m = found[name]
        close(m.A, rows.mT @ rows / len(rows), 1e-12)
        close(m.mean, rows.mean(0), 1e-12)
        close(m.P, p.mT @ p / len(p), 1e-12)
        layer = net.get_submodule(name)
        G = torch.autograd.grad(F.cross_entropy(net(x), y), list(layer.parameters()))
        close(m.G, torch.cat([g.reshape(len(layer.weight), -1) for g in G], 1), 1e-12)
        assert m.positions == len(rows) / len(x)
    assert all(p.grad is None for p in net.parameters())
    U = randn(2, a.shape[1]), randn(2, 64)
    close(probe.project(net, x, "0", U[0]), a @ U[0].mT, 1e-12)
    close(probe.project(net, x, "3", U[1]), hidden @ U[1].mT, 1e-12)


@pytest.mark.parametrize("figure", sorted(set(analyze.FIGURES) - {"compare"}))
def test_figures(figure, tmp_path, monkeypatch, capsys):
    """Each from its command to its files, on a few images."""
    monkeypatch.setattr(probe.datasets, "load", lambda *_: analyze_data(64, 32, 10))
    model = {"attention": "vit_nano_cifar", "nystrom": "resnet20"}.get(figure, "lenet5")
    sizes = dict(model=model, steps=3, batch_size=8, images=8, samples=8, grid=3)
    known = analyze.FIGURES[figure][1]
    argv = [word for name, value in sizes.items() if name in known
            for word in (f"--{name}", str(value))]
    assert analyze.main([figure, *argv, "--output_dir", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out                     # says where the files are
    for table in tmp_path.glob("*.csv"):
        rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()
                if line[0] != "#"]
        assert len(rows) > 2 and len(set(map(len, rows))) == 1
    if importlib.util.find_spec("matplotlib"):
        assert list(tmp_path.glob("*.png"))
    if figure == "overview":                # MAC starts where SGD does, and is shorter along ā
        values = {(of, at): (float(sgd), float(mac)) for of, at, sgd, mac in rows[1:]}
        assert values["loss", "1"][0] == values["loss", "1"][1] != values["loss", "3"][1]
        assert all(mac < sgd <= 1 for (of, _), (sgd, mac) in values.items() if of != "loss")


def test_mean():
    """Proposition 4.1: a known angle, an isotropic Σ, and both bounds on random matrices."""
    ā, turn = f64([2.0, 0.0]), f64([[1.0, 0.7], [0.7, 0.5]])
    found = spectra.alignment(torch.outer(ā, ā) + turn, ā)
    close(found["cosine"], math.cos(0.5 * math.atan2(2 * 0.7, 4 + 1 - 0.5)), 1e-14)
    close(found["mean_squared"], 4.0, 0)
    close(found["spread_spectral"], 0.75 + math.hypot(0.25, 0.7), 1e-14)
    close(found["bound"], math.sqrt(1 - (found["spread_spectral"] / 4) ** 2), 1e-14)
    close(found["spread_frobenius"], math.sqrt(1 + 0.25 + 2 * 0.49), 1e-14)
    v = f64([0.6, 0.8])            # A of rank 1: all rows ± a multiple of v
    found = spectra.alignment(9 * torch.outer(v, v), 0.5 * v)
    close(found["cosine"], 1.0, 1e-14)
    found = spectra.alignment(torch.outer(ā, ā) + 50 * torch.eye(2), ā)
    close([found[k] for k in ("cosine", "sharp_bound", "bound")], [1.0, 1.0, 0.0], 1e-12)
    for i in range(40):
        X = randn(30, 6).relu() + i / 40
        found = spectra.alignment(X.mT @ X / 30, X.mean(0))
        assert found["bound"] - 1e-9 <= found["sharp_bound"] <= found["cosine"] + 1e-9, found
    found = spectra.alignment(torch.eye(3).double(), torch.zeros(3).double())
    close([found["cosine"], found["bound"], found["sharp_bound"]], [0, 0, 0], 0)


def test_attention():
    """A constant T = 1 t̄ᵀ; the matrices of a network against mac.py's column sums."""
    t = f64([0.5, 0.3, 0.2])
    T = t.expand(3, 3)
    close(torch.linalg.svdvals(T), [math.sqrt(3) * t.norm(), 0, 0], 1e-15)
    close(spectra.top_cosine(T.mT @ T, t), 1.0, 1e-14)
    net = models.VisionTransformer(8, 4, 8, 2, 2, 3, 3).double()
    x = randn(5, 3, 8, 8)
    nn.init.normal_(net.blocks[0].attn.qkv.weight)
    net.blocks[1].attn.qkv.weight.data[:16] = 0       # no scores: T is uniform
    found = probe.attention_matrices(net, [(x[:3], None), (x[3:], None)])
    tokens = net.patch_embed(x)
    tokens = torch.cat([net.cls_token.expand(5, -1, -1), tokens], 1) + net.pos_embed
    q, k, _ = net.blocks[0].attn.qkv(net.blocks[0].norm1(tokens)).view(5, 5, 3, 2, 4).permute(
        2, 0, 3, 1, 4)
    close(found["blocks.0.attn"][0].sum(0), attention_sum(q, k, scale=0.5).mean((0, 1)), 1e-12)
    close(found["blocks.0.attn"][0].sum(1), torch.ones(5), 1e-14)
    close(found["blocks.1.attn"][0], f64([[0.2] * 5] * 5), 1e-14)
    close(found["blocks.1.attn"][1], torch.ones(6), 1e-12)
    raises(UsageError, ("no attention",),
           lambda: probe.attention_matrices(analyze_net(), []))


def test_convergence():
    """Grams against J B Jᵀ with the dense B; the factor as the rate of a linear least squares."""
    n, out, d = 5, 2, 4
    J, X, p = randn(n, out, d), randn(9, d) + 1, randn(9, out)
    m = spectra.Moments(X.mT @ X / 9, p.mT @ p / 9, X.mean(0), 3.0)
    A, P, eye = m.A, 3 * m.P, torch.eye(d).double()
    λ = RECIPES["kfac"]["damping"]
    π = ((A.trace() / d) / (P.trace() / out)).sqrt()
    inverse = {"GD": (eye, 1.0), "FOOF": (torch.linalg.inv(A + eye), 1.0),
               "NysAct": (torch.linalg.inv(A + eye), 1.0),
               "MAC": (torch.linalg.inv(torch.outer(m.mean, m.mean) + eye), 1.0),
               "K-FAC": (torch.linalg.inv(A + π * λ ** 0.5 * eye),
                         torch.linalg.inv(P + λ ** 0.5 / π * torch.eye(out).double()))}
    grams, first = (spectra.preconditioned_grams(J, m, x) for x in (False, True))
    for method, (right, left) in inverse.items():
        left = left if torch.is_tensor(left) else torch.eye(out).double()
        wanted = J.flatten(1) @ torch.kron(left.contiguous(), right.contiguous()) @ J.flatten(1).mT
        close(grams[method], wanted, 1e-12)
    close(first["MAC"], first["FOOF"], 1e-12)

    net = nn.Linear(6, 1, bias=False).double()
    x, y = randn(4, 6), torch.zeros(4, dtype=torch.long)
    J = probe.output_gradients(nn.Sequential(net), x, y, ["0"])["0"]
    close(J[:, 0], x, 1e-15)
    gram = x @ x.mT
    c, low, high = spectra.contraction(gram)
    s = torch.linalg.svdvals(x).square()
    close([c, low, high], [s[-1] / s[0], s[-1], s[0]], 1e-12)
    u = torch.linalg.eigh(gram).eigenvectors[:, 0]       # the slowest error, y = 0
    close(u - gram @ u / high, (1 - c) * u, 1e-12)
    close(spectra.contraction(torch.diag(f64([-1e-18, 1.0])))[0], 0.0, 0)


def test_output_gradients():
    """The Jacobian of a small network by vmap against autograd, sample by sample."""
    net, x, y = analyze_net().double(), randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 2])
    found = probe.output_gradients(net, x, y, ["0", "3"])
    for i in range(4):
        W, b, V = torch.autograd.grad(net(x[i:i + 1])[0, y[i]], list(net.parameters()))
        close(found["0"][i], torch.cat([W.flatten(1), b[:, None]], 1), 1e-12)
        close(found["3"][i], V, 1e-12)


def test_gershgorin_kaiser():
    """A matrix by hand: discs; correlations, Kaiser's rule, symmetric noise and Weyl's bound."""
    M = f64([[4.0, 1, 0], [1, 2, -3], [0, -3, 5]])
    centres, radii = spectra.gershgorin_discs(M)
    close(torch.stack([centres, radii]), [[4, 2, 5], [1, 4, 3]], 0)
    for value in torch.linalg.eigvalsh(M):
        assert ((value - centres).abs() <= radii).any()
    M = f64([[4.0, 0, 2], [0, 0, 0], [2, 0, 9]])      # the second never fires
    R = spectra.correlation(M)
    close(R, [[1, 1 / 3], [1 / 3, 1]], 1e-15)
    kept, share = spectra.kaiser(torch.linalg.eigvalsh(R))
    close([kept, share], [1, 2 / 3], 1e-14)
    assert spectra.kaiser(torch.ones(5).double()) == (0, 0.0), "the identity has none above 1"
    X = randn(40, 60)
    M = X.mT @ X
    E = spectra.symmetric_noise(M, 0.1)
    assert torch.equal(E, E.mT) and not E.diagonal().any()
    off = E[torch.triu(torch.ones(60, 60), 1).bool()]
    close(off.std(), 0.1 * M.diagonal().mean(), 0.05)
    at_most((torch.linalg.eigvalsh(M) - torch.linalg.eigvalsh(M + E)).abs().max(),
            torch.linalg.matrix_norm(E, 2))


def test_fourier():
    """Ridges of a diagonal matrix in closed form; the signal-to-noise ratio by hand."""
    diagonal = torch.rand(7).double() + 0.1
    line, u = torch.fft.fft(diagonal).abs(), torch.arange(7)
    wanted = line[(u[:, None] + u) % 7]
    wanted = torch.fft.fftshift(20 * (wanted / wanted.max()).log10())
    close(spectra.spectrum(diagonal.diag()), wanted, 1e-12)
    M = f64([[3.0, 1, 2], [1, 2, 0], [2, 0, 1]])
    close(spectra.signal_to_noise(M, M), 10 * math.log10(2.8), 1e-14)
    close(spectra.signal_to_noise(M, 2 * M), 10 * math.log10(0.7), 1e-14)


def test_landscape():
    """Gradient descent on a quadratic that leaves a known plane; losses on the grid."""
    Q = torch.linalg.qr(randn(6, 6))[0]
    centre = Q[:, 2]
    steps = [centre + 0.5 ** k * Q[:, 0] + 3 * 0.8 ** k * Q[:, 1] for k in range(12)]
    points = torch.stack(steps)                      # two decaying modes of a quadratic
    middle, directions, at, shares = spectra.principal_plane(points)
    close(directions.mT @ directions, Q[:, :2] @ Q[:, :2].mT, 1e-12)
    close(middle + at @ directions, points, 1e-12)
    close(shares.sum(), 1.0, 1e-12)
    close(shares, at.square().sum(0) / at.square().sum(), 1e-12)
    net, x, y = nn.Linear(3, 2, bias=False).double(), randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    xs, ys, losses = probe.surface(net, middle, directions, at, [(x[:2], y[:2]), (x[2:], y[2:])],
                                     3)
    point = middle + xs[2] * directions[0] + ys[0] * directions[1]
    close(losses[0, 2], F.cross_entropy(x @ point.view(2, 3).mT, y), 1e-6)
    assert xs[0] < at[:, 0].min() and ys[2] > at[:, 1].max()


def test_effect():
    """SGD has cosine 1 and ratio 1; a known multiplier attains the bound; the placebo is SGD."""
    for options in (dict(lr=0.1), dict(lr=0.1, nesterov=True), dict(lr=0.1, momentum=0.0)):
        setup = analyze_setup("sgd", analyze_net().double(), **options)
        setup = setup._replace(net=CastTo64(setup.net))
        seen = list(probe.watch_updates(setup, 4, 2))
        assert [bool(found) for *_, found in seen] == [True, False, True, False]
        found = f64([values for *_, modules in seen for values in modules.values()])
        close(found[:, :4], torch.ones(len(found), 4), 1e-12)
        assert found[:, 4].isinf().all()
        net = CastTo64(analyze_net().double())
        placebo = probe.Placebo(net, setup.optimizer.param_groups[0],
                                  {name: 1.0 for name, _ in net.named_modules()})
        losses = [loss for _, loss in probe.training(
            setup._replace(net=net, optimizer=placebo), 4)][1:]
        close(losses, [loss for _, loss, _ in seen], 1e-12)
    setup = analyze_setup("adafisher", analyze_net(), beta=0.5, tcov=1)
    for _, _, found in probe.watch_updates(setup, 3, 1):
        for cosine, _, low, high, _ in found.values():
            at_most(spectra.cosine_bound(low, high), cosine, 1e-5)
    plain, p = probe.PlainMomentum(dict(betas=(0.9, 0.99))), nn.Parameter(torch.zeros(4).double())
    for t in range(3):
        p.grad = torch.arange(4).double() ** t
        m = plain.add(p)
    close(m, sum(0.1 * 0.9 ** (2 - t) * torch.arange(4).double() ** t for t in range(3)) / (1 - 0.9
                                                                                            ** 3),
          1e-14)
    low, high = 0.2, 3.0
    g = torch.tensor([math.sqrt(high), math.sqrt(low)]).double()
    Bg = f64([low, high]) * g
    close(spectra.cosine_bound(low, high), (Bg @ g) / (Bg.norm() * g.norm()), 1e-14)


class CastTo64(nn.Sequential):
    """A network in float64 for batches in float32."""

    def forward(self, x):
        return super().forward(x.double())


def test_multiplier():
    """Its ends against the eigenvalues of the map from gradients to steps, column by column."""
    for optim, options in (("mac", {}), ("foof", {}), ("nysact", dict(rank=2)), ("kfac", {}),
                           ("kfac", dict(inverse="eigen")), ("adafisher", dict(beta=0.0)),
                           ("adafisher", dict(beta=0.0, averaging="released"))):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        options = dict(lr=1.0, momentum=0.0, weight_decay=0.0, kl_clip=1e30) | options
        known = RECIPES[optim]
        optimizer = analyze_setup(optim, net, **{
            name: value for name, value in options.items() if name in known}).optimizer
        F.cross_entropy(net(randn(6, 3) + 1), torch.arange(6) % 2).backward()
        optimizer.step()                             # the only step with statistics
        for layer in (net[0], net[2]):
            params, columns = list(layer.parameters()), []
            for i in range(sum(p.numel() for p in params)):
                for p in net.parameters():
                    p.grad = torch.zeros_like(p)
                part, j = (params[0], i) if i < params[0].numel() else \
                    (params[1], i - params[0].numel())
                part.grad.view(-1)[j] = 1.0
                before = torch.cat([p.detach().flatten() for p in params])
                optimizer.steps = 1
                optimizer.step()
                columns.append(before - torch.cat([p.detach().flatten() for p in params]))
            values = torch.linalg.eigvals(torch.stack(columns)).real
            low, high, _ = probe.multiplier(optimizer, layer)
            close([low, high], [values.min(), values.max()], 1e-6)
    X = randn(6, 3)
    ā = torch.cat([X.mean(0), torch.ones(1)])
    net = nn.Sequential(nn.Linear(3, 2)).double()
    optimizer = torch.optim.AdamW(net.parameters(), eps=1e-3)
    F.cross_entropy(net(X), torch.arange(6) % 2).backward()
    g = torch.cat([p.grad.flatten() for p in net.parameters()]).abs()
    optimizer.step()
    close(probe.multiplier(optimizer, net[0]), [1 / (g.max() + 1e-3), 1 / (g.min() + 1e-3), 1e-3 /
                                                  g.mean()], 1e-12)
    optimizer.zero_grad()
    optimizer = MAC(net, damping=0.5, input_covariance=False)
    F.cross_entropy(net(X), torch.arange(6) % 2).backward()
    optimizer.step()
    close(probe.multiplier(optimizer, net[0]), [0.5 / (0.5 + ā @ ā), 1.0, 0.5 / (ā @ ā / 4)],
          1e-12)


def test_nystrom():
    """After any number of steps the average is the one that the sketch in use was taken of."""
    for steps in (1, 3, 4, 6, 8):                    # statistics in 0, 2, 4, 6, sketches in 0, 3, 6
        setup = analyze_setup("nysact", analyze_net(), rank=30, tcov=2, tinv=3)
        averages, loss = probe.train_and_watch(setup, steps)
        assert setup.optimizer.steps == steps and math.isfinite(loss)
        exact, sketched = setup.net[0].weight, setup.net[3].weight
        L, A = setup.optimizer.state[exact]["factor"][0].double(), averages[exact]
        close(L @ L.mT - torch.eye(len(A)), A, 1e-5)
        A, state = averages[sketched], setup.optimizer.state[sketched]
        S = setup.optimizer.sketch_of(setup.optimizer.layers[sketched], A)[0]
        close(state["eigenvalues"][0].sort().values, nysact.nystrom(A @ S[None],
                                                                    S[None])[1][0].sort().values,
              1e-4)


SGD_RUN = RECIPES["sgd"] | dict(model="lenet5", dataset="shapes", optim="sgd", seed=0)


def test_csv(tmp_path, monkeypatch, capsys):
    """What a figure writes where matplotlib is missing: its numbers, caption and command."""
    args = analyze.parse(["compare", "a b", "--output_dir", str(tmp_path), "--note", "hand-made"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path, caption = analyze.publish(args, None, "", "Two\n  numbers.", ("x", "y"),
                                    [("p", 1 / 3), ("q", 2)], [], (3, 3), None)
    assert "pip install matplotlib" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["compare.csv"]
    lines = path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# {caption}" == "# Two numbers (hand-made)."
    assert lines[1].startswith("# python analyze.py compare 'a b' --output_dir"), lines[1]
    assert lines[2:] == [f"# torch {torch.__version__}", "x,y", "p,0.333333", "q,2"]


# Of the columns of a log.csv, those that are read.
COLUMNS = {script: ("epoch", "seconds", "train_loss", metric) for script, metric in (
    ("train_cifar", "test_acc"), ("train_lm", "valid_perplexity"))}


def make_run(folder, columns, values, config, file="config.json"):
    """A run's folder, of whose log each epoch has value + column / 100, and 2 s."""
    folder.mkdir(parents=True)
    lines = [",".join(columns)]
    for epoch, value in enumerate(values, 1):
        known = dict(epoch=epoch, seconds=2.0)
        lines.append(",".join(str(known.get(name, value)) for name in columns))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / file).write_text(json.dumps(dict(model="m", optim="mac", seed=0) | config))


def test_compare(tmp_path, capsys, monkeypatch):
    """Means over seeds and paired differences, by hand; what is another run, and what is not."""
    columns = COLUMNS["train_cifar"]
    for name, seed, values, lr in (("mac/0", 0, (50, 70), 1), ("mac/1", 1, (50, 74), 1),
                                   ("sgd/0", 0, (50, 60), 2), ("sgd/1", 1, (40, 66), 2),
                                   ("sgd/2", 2, (40, 90), 2), ("sgd/3", 3, (40,), 2),
                                   ("again", 0, (50, 71), 1), ("sgd/4", 0, (1, 2), 3),
                                   ("sgd/5", 1, (1, 2), 3)):
        make_run(tmp_path / name, columns, values, dict(
            seed=seed, lr=lr, optim="mac" if lr == 1 else "sgd", command=name))
    found = logs.read_logs([tmp_path / "mac", tmp_path])
    groups = logs.group_runs(found)
    assert {label: list(group) for label, group in groups.items()} == {
        "mac": [0, 1], "again": [0], "sgd": [0, 1, 2], "sgd/3": [3],
        "sgd/4, sgd/5": [0, 1]}
    assert groups["mac"][1].rows == [(1, 2.0, 50.0, 50.0), (2, 4.0, 74.0, 74.0)]
    rows = list(logs.compare_rows(groups))
    assert rows[0] == ("mac", "mac", 2, 2, 72.0, "72.00 ± 2.83", "", "2.0")
    assert rows[1][5:7] == ("71.00", "+1.00")
    assert rows[2][2:7] == (3, 2, 72.0, "72.00 ± 15.87", "-9.00 ± 1.41")
    assert rows[3][3:7] == (1, 40.0, "40.00", "no seed in common")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["compare", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert analyze.main(argv) == 0
    assert "-9.00 ± 1.41" not in capsys.readouterr().out, "the first named is another one here"
    make_run(tmp_path / "text", COLUMNS["train_lm"], (3,), {})
    assert analyze.main(argv) == 2
    assert "apart" in capsys.readouterr().err


@pytest.mark.parametrize("script", ("train_cifar", "train_lm"))
def test_drawn_curves(script, tmp_path, capsys):
    """Runs of each script are read, from a record too, and drawn where matplotlib is there."""
    pytest.importorskip("matplotlib")
    for seed, file in enumerate(("config.json", "config.json", "record.json")):
        make_run(tmp_path / str(seed), COLUMNS[script], (2, 1.5), dict(seed=seed, lr=0.1), file)
    assert analyze.main(["compare", str(tmp_path), "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "compare.png").stat().st_size > 1000
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["0, 1", "2"], lines


@pytest.mark.parametrize("name, content, words", (
    ("log.csv", "epoch,seconds\n1,2\n", ("log.csv", "lacks")),
    ("log.csv", "", ("log.csv", "no epoch")),
    ("log.csv", "epoch,seconds,train_loss,test_acc\n1,2,3\n", ("log.csv", "lacks")),
    ("log.csv", '"' + 200_000 * "x", ("log.csv", "lacks")),    # more than csv takes for a field
    ("config.json", "[3]", ("config.json", "damaged")),
    ("config.json", '{"model": "m", "optim": "mac", "seed": [0]}', ("config.json", "seed")),
    ("config.json", None, ("neither config.json nor record.json",))))
def test_damaged_logs(name, content, words, tmp_path):
    make_run(tmp_path / "a", ("epoch", "seconds", "train_loss", "test_acc"), (1,), {})
    if content is None:
        (tmp_path / "a" / name).unlink()
    else:
        (tmp_path / "a" / name).write_text(content)
    raises(UsageError, words, lambda: logs.read_logs([tmp_path]))
    raises(UsageError, ("log.csv", "name folders"), lambda: logs.read_logs([tmp_path / "b"]))


def test_seeds(tmp_path, monkeypatch, capsys):
    """The caption of a surface names the seeds of all runs that are drawn on it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(probe.datasets, "load",
                        lambda *_: analyze_data(n=20, size=32, classes=10))
    runs = [str(tmp_path / name) for name in "abc"]
    for run, seed in zip(runs, (3, 0, 0)):
        os.mkdir(run)
        torch.save(dict(config=SGD_RUN | dict(seed=seed), epoch=1,
                        model=models.lenet5(10).state_dict()), f"{run}/checkpoint.pt")
    for some, seeds in ((runs, "seeds 3, 0"), (runs[1:], "seed 0")):
        assert analyze.main(["landscape", *some, "--grid", "2", "--output_dir", str(tmp_path)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"{2 * len(some)} iterates, {seeds})" in said, said


def test_choose():
    """One sentence for a layer that does not exist."""
    net = analyze_net()
    raises(UsageError, ("no layer 'fc'", "choose from 0, 3"),
           lambda: probe.choose(net, ["0", "fc"], ()))
    assert probe.choose(net, None, (0, 0.5, 1)) == ["0", "3", "3"]
    assert probe.choose(net, ["3"], (0,)) == ["3"]


def test_damaged_folders(tmp_path):
    """One sentence for folders that hold no run, and checkpoints that cannot be read."""
    folder, checkpoint = str(tmp_path), tmp_path / "checkpoint.pt"
    raises(UsageError, (folder, "checkpoint.pt"), lambda: probe.read_run(folder))
    checkpoint.write_bytes(b"no checkpoint")
    raises(UsageError, ("damaged",), lambda: probe.read_run(folder))
    for name in ("lr", "seed"):
        older = {key: value for key, value in SGD_RUN.items() if key != name}
        torch.save(dict(config=older, epoch=1, model={}), checkpoint)
        raises(UsageError, ("not a checkpoint",), lambda: probe.read_run(folder))
    raises(UsageError, ("does not fit", "lenet5"),
           lambda: probe.put_weights(analyze_net(), dict(model={}), SGD_RUN))


def test_flags():
    raises(Diverged, ("diverged in step 1", "raise damping"), lambda: list(
        probe.training(analyze_setup("foof", analyze_net(), damping=1e-30), 2)))
    for argv, words in ((["effect", "--rank", "3"], ("--rank has no use in mac",)),
                        (["compare", "x", "--steps", "3"], ("--steps",)),
                        (["spectrum"], ("spectrum",)), ([], ("FIGURE",)),
                        (["mean", "--run", "2147483648"], ("--run", "2147483647")),
                        (["mean", "--from_run", "x", "--model=lenet5"], ("--model", "own value")),
                        (["perturb", "--from-run=x", "--dataset=shapes"], ("--dataset has no",)),
                        (["spectra", "--rank", "3", "--from_run", "x"], ("--rank", "own value")),
                        (["fourier", "--from_run", "x", "--lr=0.01"], ("--lr has no use",)),
                        (["landscape", "x", "--optim", "sgd", "mac"], ("--optim", "own value")),
                        (["mean", "--from-run", "x", "--weight-decay", "0"], ("--weight_decay",)),
                        (["landscape", "x", "y", "--run=0"], ("--run has no use",)),
                        (["landscape", "x", "--seed", "0"], ("--seed has no use",))):
        raises(UsageError, words, lambda: analyze.parse(argv))
    assert analyze.parse(["nystrom", "--output-dir", "x", "--rank", "3"]).output_dir == "x"
    assert analyze.parse(["effect", "--optim", "MAC", "--model", "LeNet5"]).model == "lenet5"
    kept = "--images 3 --batch_size 2 --data_dir d --output_dir o --note n"
    assert analyze.parse(f"spectra --from_run x --layer a b {kept}".split()).images == 3
    assert analyze.parse(f"landscape x y --grid 2 {kept}".split()).grid == 2
    for flags, lr in (("mean", 0.01), ("mean --lr 0.1", 0.1), ("mean --optim mac", None),
                      ("effect --optim sgd", None)):
        assert analyze.parse(flags.split()).lr == lr, flags
