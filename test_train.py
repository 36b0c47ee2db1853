"""train_cifar.py and bench.py, on generated images; see test_run.py for what all scripts share."""
import csv
import io
import math
import shutil
import sys

import pytest
import torch

import train_cifar
from test_run import call, checkpoint, read_log, record, refused, start_processes  # noqa: F401

SMALL = ("train_cifar.py --dataset shapes --train_size 256 --model lenet5 --epoch 1 "
         "--batch_size 64 --device cpu --optim mac --tinv 5")


def test_without_data_and_network(tmp_path, start):
    """`python train_cifar.py` says what can be done, and leaves no run behind."""
    dead = "http://127.0.0.1:9"           # nothing listens there
    proxies = {name: dead for proxy in ("http_proxy", "https_proxy", "all_proxy")
               for name in (proxy, proxy.upper())}
    out = start("train_cifar.py", **proxies, no_proxy="", NO_PROXY="").finish(2)
    assert "--dataset shapes" in out and "Traceback" not in out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("line", [
    "--model resnet110 --optim mac --lr 0.1 --momentum 0.9 --stat_decay 0.95 --damping 1.0 "
    "--tcov 5 --tinv 50 --weight_decay 0.0005 --epoch 200 --run 0",
    "--model resnet32 --optim nysact --lr 0.1 --momentum 0.9 --stat_decay 0.95 --damping 1.0 "
    "--tcov 5 --tinv 50 --weight_decay 0.0005 --rank 10 --sketch gaussian --epoch 200 --run 0"])
def test_published_commands(tmp_path, line):
    out, err = call(f"train_cifar.py {line} --dataset shapes --train_size 64 --batch_size 32 "
                    f"--epoch 1 --output_dir {tmp_path}/run")
    assert not err and record(out)["results"][0]["optim"] in line
    # what the lines give is also what is taken without them
    given = train_cifar.parse(line.split())
    plain = train_cifar.parse(["--optim", *given.optim, "--model", given.model])
    assert resolved(given) == resolved(plain)


def resolved(args):
    data = type("Data", (), dict(train_labels=torch.zeros(50_000), fingerprint="x"))
    return train_cifar.resolve(args, args.optim[0], args.seed[0], data)


def test_defaults():
    config = resolved(train_cifar.parse([]))
    published = dict(dataset="cifar10", model="resnet20", optim="mac", lr=0.1, momentum=0.9,
                     weight_decay=5e-4, damping=1.0, stat_decay=0.95, tcov=5, tinv=50, epochs=200,
                     batch_size=128, schedule="cosine", schedule_step="epoch", seed=0)
    assert published.items() <= config.items(), config
    args = train_cifar.parse("--optim mac sgd mac --run 3 3 1".split())
    assert args.optim == ["mac", "sgd"] and args.seed == [3, 1]


@pytest.mark.parametrize("flags, words", {
    "--dataset mnist": "fashion_mnist", "--label-smoothing 1": "--label_smoothing",
    "--train_size 99999999": "99999999", "--warmup -1": "--warmup", "--schedule x": "multistep",
}.items())
def test_wrong_commands(tmp_path, flags, words):
    assert words in refused(f"{SMALL} --output_dir {tmp_path}/run {flags}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", {
    "--rank 5": "--rank", "--milestones 3": "--milestones", "--lr_decay 0.5": "--lr_decay",
    "--schedule multistep --milestones 1 2": "--milestones in --epochs 1",
    "--cutout 64": "--cutout in images of 32 pixels"}.items())
def test_flags_without_effect(tmp_path, flags, words):
    _, err = call(f"{SMALL} --output_dir {tmp_path}/run {flags}")
    assert err.startswith("note: no use for") and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("schedule, make", {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15]),
    "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}.items())
def test_learning_rate(schedule, make):
    """The schedules are torch's own, and need no state."""
    config = resolved(train_cifar.parse([])) | dict(schedule=schedule, epochs=20,
                                                    milestones=[10, 15], lr_decay=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config["lr"])
    scheduler = make(optimizer)
    for epoch in range(20):
        ours = train_cifar.learning_rate(config, epoch, 3, 10)
        assert abs(ours - optimizer.param_groups[0]["lr"]) < 1e-15
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("unit, different", [("epoch", 8), ("step", 80)])
def test_warmup(unit, different):
    """Linear, and never zero; the same in a run that ends within it."""
    config = resolved(train_cifar.parse([])) | dict(schedule_step=unit, epochs=8, warmup=5)
    rates = [train_cifar.learning_rate(config, e, s, 10) for e in range(8) for s in range(10)]
    ramp, rest = rates[:50], rates[50:]
    assert rates[50] == config["lr"] == max(rates) and min(rates) > 0
    assert ramp == sorted(ramp) and rest == sorted(rest, reverse=True)
    assert len(set(rates)) == different
    part = [train_cifar.learning_rate(config | dict(warmup=2.5), e, 0, 10) for e in range(4)]
    assert 0 < part[0] < part[1] < part[2] < part[3] < config["lr"]
    config["epochs"] = 3
    assert [train_cifar.learning_rate(config, e, s, 10)
            for e in range(3) for s in range(10)] == rates[:30]


def test_same_seed_same_log(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out, _ = call(f"{SMALL} --epoch 2 --output_dir {tmp_path}/{name} --run {seed}")
    a, b, c = (read_log(tmp_path / name) for name in "abc")
    assert a == b and a != c and [row["epoch"] for row in a] == ["1", "2"]
    assert ",".join(read_log(tmp_path / "a", ())[0]) == \
        "epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds,peak_memory"
    assert record(out)["results"][0]["test_acc"] == [float(c[-1]["test_acc"])]
    assert "62,006 parameters" in out


def test_optimizers_and_seeds(tmp_path):
    """One folder each, one table with mean ± std, one record."""
    out, _ = call(f"{SMALL} --optim mac sgd --run 0 3 --output_dir {tmp_path}/d")
    for result in record(out)["results"]:
        acc = [float(read_log(tmp_path / "d" / result["optim"] / seed)[-1]["test_acc"])
               for seed in "03"]
        assert result["test_acc"] == acc and result["run"] == [0, 3]
        mean, std = sum(acc) / 2, abs(acc[0] - acc[1]) / math.sqrt(2)
        assert f"{mean:.2f} ± {std:.2f}" in out, (mean, std, out)
    state = {result["optim"]: result["state_bytes"] for result in record(out)["results"]}
    assert 1 < state["mac"] / state["sgd"] < 1.3, state


def test_options(tmp_path):
    """What is off by default changes the loss as it should."""
    flags = {"plain": "", "amp": "--amp", "last": "--channels_last", "fixed": "--calibrate",
             "mean": "--input_covariance false",
             "steps": "--schedule_step step --warmup 1 --label_smoothing 0.1 --cutout 8",
             "resnet": "--channels_last --amp --model resnet20 --train_size 64"}
    loss = {}
    for name, more in flags.items():
        call(f"{SMALL} --batch_size 16 --output_dir {tmp_path}/{name} {more}")
        loss[name] = float(read_log(tmp_path / name)[0]["train_loss"])
    assert all(map(math.isfinite, loss.values())), loss
    assert abs(loss["last"] - loss["plain"]) < 1e-3 and loss["fixed"] != loss["plain"], loss
    assert loss["mean"] != loss["plain"] and "--calibrate fixes" in refused(
        f"{SMALL} --calibrate --input_covariance false")
    assert 0 < abs(loss["amp"] - loss["plain"]) < 0.1, loss


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compile(tmp_path):
    call(f"{SMALL} --output_dir {tmp_path}/a")
    call(f"{SMALL} --output_dir {tmp_path}/b --compile")
    a, b = (float(read_log(tmp_path / name)[0]["test_loss"]) for name in "ab")
    assert abs(a - b) < 1e-4
    assert not [key for key in checkpoint(tmp_path / "b")["model"] if "_orig_mod" in key]
    call(f"{SMALL} --output_dir {tmp_path}/b --resume")     # and not compiled


def bench(start, tmp_path, flags):
    start(f"bench.py --model lenet5 --csv table.csv {flags}", launcher="").finish()
    with open(tmp_path / "table.csv", newline="") as file:
        return {row.pop("optimizer"): {name: float(text) for name, text in row.items()}
                for row in csv.DictReader(file)}


def test_bench(start, tmp_path):
    rows = bench(start, tmp_path, "--batch_size 4 --repeats 3 --tcov 2 --tinv 4")
    assert list(rows) == ["sgd", "mac", "nysact", "foof", "kfac", "adafisher"]
    for optim, row in rows.items():
        assert row["low"] <= row["step"] <= row["high"], row
        assert (row["statistics"] > 0) == (row["parts"] > 1) == (optim != "sgd"), row
        parts = row["statistics"] + row["factorisation"] + row["application"]
        assert math.isclose(row["parts"], 1 + parts), row
    assert rows["sgd"]["step"] == rows["sgd"]["state"] == 1 and rows["sgd"]["peak"] == 0
    assert 1 < rows["mac"]["state"] < rows["nysact"]["state"] < rows["foof"]["state"]


@pytest.mark.parametrize("model", ("lenet5", "char", "resnet18"))
def test_bench_launches(start, tmp_path, model):
    rows = bench(start, tmp_path, f"--launches --model {model}")
    assert rows["sgd"]["ratio"] == 1 and rows["sgd"]["between"] == rows["sgd"]["due"]
    for row in rows.values():
        assert rows["sgd"]["mean"] <= row["between"] <= row["mean"] <= row["due"], row


def test_bench_prints_to_ascii(monkeypatch, capsys):
    """And says which flags it has no use for."""
    import bench as script
    row = dict.fromkeys(script.PARTS, 0.0) | dict(optimizer="sgd", layer="3×3 conv", size=8)
    monkeypatch.setattr(script, "bench_scaling", lambda args: [row])
    flags = "--scaling --model lenet5 --repeats 3 --tcov 5 --amp"
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert script.main() == 0
    sys.stdout.flush()
    assert b"3\\xd73 conv" in sys.stdout.buffer.getvalue()
    assert capsys.readouterr().err == "note: no use for --amp --model --repeats in --scaling\n"


@pytest.mark.parametrize("flags", ["--repeats 0", "--model resnet", "--scaling --launches",
                                   "--csv no/such/folder.csv --model lenet5 --launches"])
def test_bench_refuses(start, flags):
    assert len(start(f"bench.py {flags}", launcher="").finish(2).splitlines()) == 1
