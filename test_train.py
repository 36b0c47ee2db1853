"""train_cifar.py and bench.py as a user runs them: python test_train.py (two minutes, two cores).

Every check starts its script as a process of its own in a temporary folder, on generated images,
without data or network. Settings are tiny, so the accuracies mean nothing.
"""
import contextlib
import csv
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import analyze
import train_cifar
import train_imagenet
import train_lm
from test_math import run_tests, skip

# A shell that starts this in the background lets it, and so its children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).resolve().parent
SMALL = ("--dataset shapes --train_size 256 --model lenet5 --epoch 2 --batch_size 64 "
         "--device cpu --optim mac --tinv 5").split()
MEASURED = ("seconds", "peak_memory")     # the columns that two equal runs may differ in


# ---------------------------------------------------------------------------------------------
# Running the script
# ---------------------------------------------------------------------------------------------

def start(cwd, *argv, script="train_cifar.py", **env):
    """The script as a process; its output through pipes, one thread so that cores are left."""
    command = [sys.executable, str(HERE / script), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, status=0):
    """Its (stdout, stderr), once it ended with this status and no traceback."""
    out, err = process.communicate(timeout=170)
    assert process.returncode == status, \
        f"exit status {process.returncode}, not {status}:\n{out}{err}"
    assert "Traceback" not in err, err
    return out, err


def run(cwd, *argv, status=0, **env):
    return finish(start(cwd, *argv, **env), status)


def refused(cwd, *argv, status=2, **script):
    """The one sentence with which the script refuses a command."""
    out, err = run(cwd, *argv, status=status, **script)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, err
    return lines[0]


def read_log(folder, without=MEASURED):
    """The rows of log.csv as dicts of text, but for the measured columns."""
    with open(Path(folder, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(tuple(row) == train_cifar.COLUMNS for row in rows)
    return [{name: text for name, text in row.items() if name not in without} for row in rows]


def record(out):
    """The summary in the last line of the output."""
    return json.loads(out.splitlines()[-1])


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---------------------------------------------------------------------------------------------
# Starting
# ---------------------------------------------------------------------------------------------

def test_smoke():
    with folder() as tmp:
        begin = time.perf_counter()
        out, _ = run(tmp, "--smoke")
        assert out.splitlines()[-1].startswith("smoke test passed: sgd adam adamw mac"), out
        assert not list(tmp.iterdir()), "--smoke left files behind"
        print(f"    {time.perf_counter() - begin:.0f} s")


def test_no_data_no_network():
    dead = "http://127.0.0.1:9"           # nothing listens there: no network for a downloader
    with folder() as tmp:
        begin = time.perf_counter()
        proxies = {name: dead for proxy in ("http_proxy", "https_proxy", "all_proxy")
                   for name in (proxy, proxy.upper())}
        _, err = run(tmp, status=2, **proxies, no_proxy="", NO_PROXY="")
        assert "--dataset shapes" in err and len(err.splitlines()) < 20, err
        assert not (tmp / "runs").exists(), "a run that could not start left a folder"
        print(f"    {time.perf_counter() - begin:.0f} s")


def test_published_commands():
    mac = ("--model resnet110 --optim mac --lr 0.1 --momentum 0.9 --stat_decay 0.95 --damping 1.0 "
           "--tcov 5 --tinv 50 --weight_decay 0.0005 --epoch 200 --run 0").split()
    nysact = ("--model resnet32 --optim nysact --lr 0.1 --momentum 0.9 --stat_decay 0.95 "
              "--damping 1.0 --tcov 5 --tinv 50 --weight_decay 0.0005 --rank 10 --sketch gaussian "
              "--epoch 200 --run 0").split()
    quick = "--dataset shapes --train_size 64 --batch_size 32 --epoch 1 --output_dir run".split()
    with folder() as a, folder() as b:
        first = start(a, *mac, *quick)
        if (HERE / "nysact.py").exists():
            run(b, *nysact, *quick)
        else:
            assert "nysact.py" in refused(b, *nysact, *quick)
        out, _ = finish(first)
        assert record(out)["results"][0]["optim"] == "mac"
        config = json.loads((a / "run" / "config.json").read_text())
        assert config["model"] == "resnet110" and config["epoch"] == 1


def test_wrong_commands():
    wrong = {
        "--lr -1": "--lr", "--lr nan": "--lr", "--momentum 1": "--momentum", "--epoch 0": "--epoch",
        "--batch_size 0": "--batch_size", "--damping 0": "--damping", "--tcov 1.5": "--tcov",
        "--run -1": "--run", "--run": "--run", "--label-smoothing 1": "--label_smoothing",
        "--model resnet21": "resnet20", "--optim sgdd": "adamw", "--dataset mnist": "fashion_mnist",
        "--schedule linear": "multistep", "--sketch x": "subcolumns",
        "--lr 1e300": "at most 1e30", "--weight_decay 1e300": "to 1e30", "--damping 1e300": "1e30",
        f"--epoch 1{400 * '0'}": "10^15", f"--warmup 1{400 * '0'}": "10^15",
        "--learning_rate 1": "--learning_rate",
        "--dataset shapes --train_size 99999999": "99999999",
        "--optim sgd --momentum 0 --nesterov --dataset shapes --train_size 64": "esterov",
    }
    if not torch.cuda.is_available():
        wrong["--device cuda --dataset shapes"] = "--device cuda"
    with folder() as tmp:
        assert "--lr" in refused(tmp, "--lr", "x")
        for command, word in wrong.items():    # the same function as the script's, without 3 s each
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                status = train_cifar.main(["--output_dir", str(tmp / "run"), *command.split()])
            assert status == 2 and word in err.getvalue(), (command, status, err.getvalue())
            assert len(err.getvalue().splitlines()) == 1, err.getvalue()
        assert not (tmp / "run").exists()
    print(f"    {len(wrong)} commands")


def test_flag_spelling():
    args = train_cifar.parse(["--weight-decay=0.1", "--batch_size", "7", "--epochs", "3", "--lr",
                              "1", "--lr", "2", "--output-dir", "a-b", "--optim", "mac", "sgd",
                              "mac"])
    assert (args.weight_decay, args.batch_size, args.epoch, args.lr) == (0.1, 7, 3, 2)
    assert args.output_dir == "a-b" and args.optim == ["mac", "sgd"]
    config = train_cifar.resolve(train_cifar.parse([]), "mac", 0, 50000)
    published = dict(dataset="cifar10", model="resnet20", lr=0.1, momentum=0.9, weight_decay=5e-4,
                     damping=1.0, stat_decay=0.95, tcov=5, tinv=50, epoch=200, batch_size=128,
                     schedule="cosine", schedule_step="epoch")
    assert published.items() <= config.items(), config
    out, _ = run(HERE, "--help")
    assert all(f"--{name}" in out for name in vars(args))


def test_plain_console():
    """A console without a script's characters gets its manual all the same."""
    for script, argv in ((train_cifar, []), (train_lm, []), (train_imagenet, []),
                         (analyze, ["mean"])):
        out = io.TextIOWrapper(io.BytesIO(), "ascii")
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            script.main([*argv, "--help"])
        out.flush()
        assert b"--output_dir DIR" in out.buffer.getvalue(), script


def test_home_folders():
    """In every script ~ is expanded where a shell leaves it, after =; unknown users are refused."""
    scripts = {train_cifar: "--data_dir= --output_dir=",
               train_lm: "--text= --data_dir= --output_dir=",
               train_imagenet: "--data_dir= --pretrained= --output_dir=",
               analyze: "mean,--from_run= mean,--data_dir= mean,--output_dir= curves,"}
    for script, flags in scripts.items():
        for *figure, flag in (text.split(",") for text in flags.split()):
            name = flag.strip("-=") or "runs"
            for path, want in (("~/x", str(Path.home() / "x")), ("a~/~b", "a~/~b")):
                got = vars(script.parse([*figure, flag + path]))[name]
                assert got in (want, [want]), (flag, got)
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                status = script.main([*figure, f"{flag}~who?/x"])
            assert status == 2 and "'~who?/x'" in err.getvalue(), err.getvalue()
            assert (flag.strip("=") or "RUN") in err.getvalue(), err.getvalue()
            assert len(err.getvalue().splitlines()) == 1, err.getvalue()


def test_learning_rate():
    """The schedules are torch's own, and need no state."""
    config = train_cifar.resolve(train_cifar.parse([]), "sgd", 0, 1)
    weight = torch.nn.Parameter(torch.zeros(1))
    worst = 0.0
    for schedule, make in {
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15]),
        "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    }.items():
        config.update(schedule=schedule, epoch=20, milestones=[10, 15], lr_decay=0.1)
        optimizer = torch.optim.SGD([weight], lr=config["lr"])
        scheduler = make(optimizer)
        for epoch in range(20):
            ours = train_cifar.learning_rate(config, epoch, 3, 10)
            worst = max(worst, abs(ours - optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    assert worst < 1e-15, worst
    for unit in ("epoch", "step"):         # linear, and never zero; also in a run that ends in it
        config.update(schedule="cosine", schedule_step=unit, epoch=8, warmup=5)
        rates = [train_cifar.learning_rate(config, e, s, 10) for e in range(8) for s in range(10)]
        ramp, rest = rates[:50], rates[50:]
        assert rates[50] == config["lr"] == max(rates) and min(rates) > 0
        assert ramp == sorted(ramp) and rest == sorted(rest, reverse=True)
        assert len(set(rates)) == (80 if unit == "step" else 8)
        config.update(epoch=3)
        assert [train_cifar.learning_rate(config, e, s, 10) for e in range(3) for s in range(10)] \
            == rates[:30]
    print(f"    max error {worst:.1e}")


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------

def test_same_seed_same_log():
    with folder() as tmp:
        runs = [start(tmp, *SMALL, "--output_dir", name, "--run", seed)
                for name, seed in (("a", 0), ("b", 0), ("c", 1))]
        outputs = [finish(process)[0] for process in runs]
        a, b, c = (read_log(tmp / name) for name in "abc")
        assert a == b and a != c and [row["epoch"] for row in a] == ["1", "2"]
        files = sorted(file.name for file in (tmp / "a").iterdir())
        assert files == ["checkpoint.pt", "config.json", "log.csv"], files
        result = record(outputs[0])["results"][0]
        assert result["test_acc"] == [float(a[-1]["test_acc"])]
        everything = read_log(tmp / "a", without=())[-1]
        assert all(math.isfinite(float(text)) for text in everything.values())
        lines = outputs[0].splitlines()[:-1]
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        assert "62,006 parameters" in outputs[0] and torch.__version__ in outputs[0]


def test_optimizers_and_seeds():
    with folder() as tmp:
        out, err = run(tmp, *SMALL, "--epoch", 1, "--optim", "mac", "sgd", "--run", 0, 3,
                       "--rank", 5, "--output_dir", "d")
        assert err.startswith("note:") and "--rank" in err, err
        for result in record(out)["results"]:
            logs = [read_log(tmp / "d" / result["optim"] / seed) for seed in "03"]
            acc = [float(log[-1]["test_acc"]) for log in logs]
            assert result["test_acc"] == acc and result["run"] == [0, 3]
            mean, std = sum(acc) / 2, abs(acc[0] - acc[1]) / math.sqrt(2)
            assert f"{mean:.2f} ± {std:.2f}" in out, (mean, std, out)
        state = {result["optim"]: result["state_bytes"] for result in record(out)["results"]}
        assert 1 < state["mac"] / state["sgd"] < 1.3, state


def test_amp_channels_last_calibrate():
    flags = {"plain": [], "amp": ["--amp"], "last": ["--channels_last"], "fixed": ["--calibrate"],
             "steps": "--schedule_step step --warmup 1 --label_smoothing 0.1 --cutout 8".split(),
             "resnet": "--channels_last --amp --model resnet20 --train_size 64".split()}
    with folder() as tmp:
        for names in (("plain", "amp"), ("last", "fixed"), ("steps", "resnet")):    # two at a time
            runs = [start(tmp, *SMALL, "--epoch", 1, "--batch_size", 16, *flags[name],
                          "--output_dir", name) for name in names]
            for process in runs:
                finish(process)
        loss = {name: float(read_log(tmp / name)[0]["train_loss"]) for name in flags}
        assert all(map(math.isfinite, loss.values())), loss
        assert abs(loss["last"] - loss["plain"]) < 1e-3, loss
        assert 0 < abs(loss["amp"] - loss["plain"]) < 0.1, loss
        assert loss["fixed"] != loss["plain"], loss
        print("    loss", *(f"{name} {value:.4f}" for name, value in loss.items()))


def test_compile():
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        skip("no C++ compiler")
    with folder() as tmp:
        plain = start(tmp, *SMALL, "--epoch", 1, "--output_dir", "a")
        run(tmp, *SMALL, "--epoch", 1, "--output_dir", "b", "--compile")
        finish(plain)
        a, b = (float(read_log(tmp / name)[0]["test_loss"]) for name in "ab")
        assert abs(a - b) < 1e-4, (a, b)
        saved = torch.load(tmp / "b" / "checkpoint.pt")
        assert not [key for key in saved["model"] if "_orig_mod" in key]
        run(tmp, *SMALL, "--epoch", 1, "--output_dir", "b", "--resume")     # and not compiled
        print(f"    loss differs by {abs(a - b):.0e}")


def test_divergence():
    """The second epoch's rate is absurd: the run stops and the first epoch's checkpoint stays."""
    with folder() as tmp:
        absurd = "--schedule multistep --milestones 1 --lr_decay 1e30 --output_dir run".split()
        for optim in ("sgd", "mac"):
            shutil.rmtree(tmp / "run", ignore_errors=True)
            error = refused(tmp, *SMALL, *absurd, "--optim", optim, status=1)
            assert "epoch 2" in error and "--lr" in error, error
            saved = torch.load(tmp / "run" / "checkpoint.pt")
            assert saved["epoch"] == 1 == len(read_log(tmp / "run"))
            assert all(value.isfinite().all() for value in saved["model"].values())


# ---------------------------------------------------------------------------------------------
# Stopping and continuing
# ---------------------------------------------------------------------------------------------

def test_kill_and_resume():
    """kill -9 at random moments, then --resume: the log of an uninterrupted run, bit for bit."""
    long = [*SMALL, "--train_size", 1024, "--epoch", 8, "--calibrate"]
    with folder() as tmp:
        straight = start(tmp, *long, "--output_dir", "straight")
        kills, rng = 0, random.Random()
        while True:
            process = start(tmp, *long, "--output_dir", "killed", "--resume")
            if kills == 5:
                finish(process)
                break
            process.stdout.readline()                  # it has begun
            time.sleep(rng.uniform(0, 1.2))
            process.kill()
            process.communicate()
            if process.returncode == 0:                # it was faster
                break
            assert process.returncode == -signal.SIGKILL, process.returncode
            kills += 1
            (tmp / "killed").mkdir(exist_ok=True)
            (tmp / "killed" / "checkpoint.pt.tmp").write_bytes(b"half a check")
        finish(straight)
        a, b = read_log(tmp / "straight"), read_log(tmp / "killed")
        assert a == b and len(a) == 8, f"\n{a}\n{b}"
        x, y = (torch.load(tmp / name / "checkpoint.pt") for name in ("straight", "killed"))
        assert all(torch.equal(x["model"][key], y["model"][key]) for key in x["model"])
        print(f"    {kills} kills")


def test_damaged_checkpoint():
    with folder() as tmp:
        path = tmp / "run" / "checkpoint.pt"
        run(tmp, *SMALL, "--epoch", 1, "--output_dir", "run")
        whole = path.read_bytes()
        middle = len(whole) // 2
        foreign = io.BytesIO()
        torch.save(dict(config="none", log=0), foreign)
        damaged = {"truncated": whole[:middle], "empty": b"", "no checkpoint": b"epoch,lr\n" * 99,
                   "foreign": foreign.getvalue(),
                   "flipped": whole[:middle] + bytes(255 - b for b in whole[middle:middle + 64])
                   + whole[middle + 64:]}
        for name, content in damaged.items():
            path.write_bytes(content)
            err = io.StringIO()
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                status = train_cifar.main([*SMALL, "--epoch", "1", "--output_dir",
                                           str(tmp / "run"), "--resume"])
            assert status == 2 and len(err.getvalue().splitlines()) == 1, (name, err.getvalue())
            assert str(path) in err.getvalue() and path.read_bytes() == content, name
        assert read_log(tmp / "run")[0]["epoch"] == "1"
    print(f"    {', '.join(damaged)}")


def test_bench():
    """bench.py: the rows of each table, in csv too, and wrong commands."""
    def table(cwd, *argv):
        run(cwd, "--model", "lenet5", "--csv", "table.csv", *argv, script="bench.py")
        with open(cwd / "table.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return {row.pop("optimizer"): {k: float(v) for k, v in row.items()} for row in rows}
    with folder() as cwd:
        found = table(cwd, "--batch_size", 4, "--repeats", 3, "--tcov", 2, "--tinv", 4)
        assert list(found) == ["sgd", "mac", "nysact", "foof", "kfac", "adafisher"]
        for optim, row in found.items():
            assert row["low"] <= row["step"] <= row["high"], row
            assert (row["statistics"] > 0) == (row["parts"] > 1) == (optim != "sgd"), row
            parts = row["statistics"] + row["factorisation"] + row["application"]
            assert math.isclose(row["parts"], 1 + parts), row
        assert found["sgd"]["step"] == found["sgd"]["state"] == 1 and found["sgd"]["peak"] == 0
        assert 1 < found["mac"]["state"] < found["nysact"]["state"] < found["foof"]["state"]
        counts = table(cwd, "--launches")
        assert counts["sgd"]["ratio"] == 1 and counts["sgd"]["between"] == counts["sgd"]["due"]
        for row in counts.values():
            assert counts["sgd"]["mean"] <= row["between"] <= row["mean"] <= row["due"], row
        refused(cwd, "--repeats", 0, script="bench.py")
        refused(cwd, "--model", "resnet", script="bench.py")
        refused(cwd, "--csv", "no/such/folder.csv", "--model", "lenet5", "--launches",
                script="bench.py")


def test_used_folder():
    with folder() as tmp:
        here = [*SMALL, "--output_dir", "run"]
        out, _ = run(tmp, *here, "--resume")
        assert "starts anew" in out
        before, log = (tmp / "run" / "checkpoint.pt").stat().st_mtime_ns, read_log(tmp / "run", ())
        assert "--resume" in refused(tmp, *here)
        error = refused(tmp, *here, "--resume", "--lr", 0.2, "--epoch", 3)
        assert all(word in error for word in ("--lr (was 0.1, now 0.2)", "--epoch (was 2, now 3)"))
        out, _ = run(tmp, *here, "--resume")           # a finished run is not run again
        assert "after epoch 2 of 2" in out and record(out)["results"][0]["test_acc"]
        assert (tmp / "run" / "checkpoint.pt").stat().st_mtime_ns == before
        assert read_log(tmp / "run", ()) == log
        (tmp / "file").write_text("")
        error = refused(tmp, *SMALL, "--output_dir", "file/x")
        assert "since file is a file: name another" in error, error


def test_interrupt():
    with folder() as tmp:
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            process = start(tmp, *SMALL, "--epoch", 9999, "--output_dir", status)
            while not process.stdout.readline().startswith("epoch   2/"):
                pass
            process.send_signal(number)
            _, err = finish(process, status)
            assert "--resume" in err, err
            assert len(read_log(tmp / str(status))) >= 2


if __name__ == "__main__":
    run_tests(globals(), sys.argv[1:])
