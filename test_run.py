"""run.py, folder.py, report.py, ranks.py by the three scripts: what ends a run loses nothing.

What a user meets as a process is one here too; the rest calls a script's main() in this process,
which starts sooner. Everything is tiny, on generated data, so accuracies mean nothing.
KILLS=30 pytest test_run.py -k kill has each run killed so often.
"""
import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ranks
import run
from download import DataError
from folder import check_folder, finite, lock, write_file
from ranks import Diverged, Ranks, Stop, UsageError
from report import time_in_words, train_all

HERE = Path(__file__).resolve().parent
# One epoch each; the folder and what a test needs are appended.
CIFAR = ("train_cifar.py --dataset shapes --model lenet5 --train_size 192 --batch_size 32 "
         "--epoch 1 --optim mac --device cpu")
LM = ("train_lm.py --dataset grammar --model char --layers 1 --width 16 --heads 2 --context 16 "
      "--train_size 1200 --valid_size 100 --batch_size 12 --epoch 1 --dropout 0.1 --sample 0 "
      "--optim mac --device cpu")
IMAGENET = ("train_imagenet.py --dummy 36 --model deit_tiny_patch16_224 --img-size 16 --crop-pct 1 "
            "--batch-size 6 --epochs 1 --workers 0 --opt mac --lr 0.01 --device cpu --mixup 0.8 "
            "--cutmix 1 --drop-path 0.2 --model-ema")
SCRIPTS = [CIFAR, LM, IMAGENET]
# The columns that two equal runs may differ in.
MEASURED = ("seconds", "peak_memory", "images_per_second", "data_wait")


# ---------------------------------------------------------------------------------------------
# What the tests of the scripts share
# ---------------------------------------------------------------------------------------------

def name_of(line):
    return line.split()[0].removesuffix(".py")


each_script = pytest.mark.parametrize("line", SCRIPTS, ids=name_of)


def call(line, status=0, terminal=False):
    """(stdout, stderr) of a script's main() in this process, once it returned this status."""
    script, *argv = line.split()
    out, err = io.StringIO(), io.StringIO()
    out.isatty = lambda: terminal
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = importlib.import_module(script.removesuffix(".py")).main(argv)
    assert got == status, f"exit status {got}, not {status}:\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refused(line, status=2):
    """The one sentence with which a script refuses a command."""
    err = [text for text in call(line, status)[1].splitlines() if not text.startswith("note:")]
    assert len(err) == 1, err
    return err[0]


def as_script(line, folder, said, environment):
    """What a forked process does: the same as `python LINE` in the folder."""
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    script, *argv = line.split()
    sys.exit(importlib.import_module(script.removesuffix(".py")).main(argv))


forks = multiprocessing.get_context("forkserver")     # of a process that has imported torch already
forks.set_forkserver_preload(["train_cifar", "train_lm", "train_imagenet"])


class Forked(forks.Process):
    """With subprocess.Popen's names."""

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


class Started:
    """A script as one process in tmp_path, or as so many that meet as torchrun's do.

    launcher: run it as `python LAUNCHER LINE`; else it is forked, which spares importing torch.
    """

    def __init__(self, tmp_path, line, ranks=1, launcher=None, **environment):
        meet = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(*free_ports(1)))
        self.files, self.processes = [], []
        for rank in range(ranks):
            said = tmp_path / f"said-{time.monotonic_ns()}"
            said.touch()
            self.files.append(said)
            own = dict(meet, RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {}
            own |= environment
            if launcher is None:
                self.processes.append(Forked(target=as_script, args=(line, tmp_path, said, own)))
                self.processes[rank].start()
                continue
            with open(said, "w") as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *launcher.split(), HERE / line.split()[0], *line.split()[1:]],
                    cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **own}))

    def text(self):
        return "".join(file.read_text() for file in self.files)

    def wait_for(self, condition, what):
        """Until condition() or the end of the first process; whether it still runs."""
        end = time.monotonic() + 600
        while self.processes[0].poll() is None and not condition():
            assert time.monotonic() < end, f"waited in vain for {what}: {self.text()}"
            time.sleep(0.05)
        return self.processes[0].poll() is None

    def finish(self, status=0):
        """What they said, once they ended with this status."""
        got = [process.wait(600) for process in self.processes]
        assert set(got) == {status}, f"exit status {got}, not {status}:\n{self.text()}"
        return self.text()

    def send(self, number, rank=0):
        self.processes[rank].send_signal(number)

    def kill(self):
        for process in self.processes:
            if isinstance(process, Forked):
                process.kill()
            else:                                      # torchrun is to end its own
                process.terminate()
        return [process.wait() for process in self.processes]


def free_ports(count):
    """Different ones: a port that was given back can be the next one that is given out."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(name="start")
def start_processes(tmp_path):
    """start(line, ranks, ...): Started, which ends with the test."""
    started = []

    def one(*args, **environment):
        started.append(Started(tmp_path, *args, **environment))
        return started[-1]
    yield one
    for process in started:
        process.kill()


def read_log(folder, without=MEASURED):
    """The rows of log.csv as dicts of text, but for the measured columns."""
    with open(Path(folder, "log.csv"), newline="") as file:
        return [{name: text for name, text in row.items() if name not in without}
                for row in csv.DictReader(file)]


def checkpoint(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def same_bits(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_runs(a, b):
    """The logs of two folders, and all that their checkpoints hold beside them."""
    x, y = checkpoint(a), checkpoint(b)
    return read_log(a) == read_log(b) and all(same_bits(x[name], y[name])
                                              for name in x.keys() - {"config", "log"})


def record(out):
    """The summary in the last line of the output."""
    return json.loads(out.splitlines()[-1])


def at_step(monkeypatch, step, what):
    """Call what() within the step of this number, counted from 1 over the whole run."""
    count, add = [0], run.Progress.add

    def counting(*args):
        count[0] += 1
        if count[0] == step:
            what()
        add(*args)
    monkeypatch.setattr(run.Progress, "add", counting)


# ---------------------------------------------------------------------------------------------
# What ends a run
# ---------------------------------------------------------------------------------------------

def more_epochs(line, epochs):
    return f"{line} --epochs {epochs}"


@pytest.mark.parametrize("line, ranks", [(line, 1) for line in SCRIPTS]
                         + [(line, ranks) for line in (LM, IMAGENET) for ranks in (2, 3)]
                         + [(f"{line.replace('--model-ema', '')} --fsdp", 2)
                            for line in (LM, IMAGENET)],
                         ids=lambda value: name_of(value) if isinstance(value, str) else str(value))
def test_kill_and_resume(tmp_path, start, line, ranks):
    """kill -9 at random moments, resumed each time: the log and bits of a run in one go."""
    wanted, rng, kills = int(os.environ.get("KILLS", 2)), random.Random(), 0
    line = more_epochs(line, 3 * wanted)
    straight = start(f"{line} --output_dir straight", ranks)
    while kills < wanted:
        process = start(f"{line} --output_dir killed --resume --checkpoint_minutes 0.002", ranks)
        running = process.wait_for(lambda: "resumed" in process.text() or "anew" in process.text(),
                                   "a first line")
        time.sleep(rng.uniform(0, 1.0))
        if 0 in process.kill():                        # it was faster
            break
        assert running, process.text()
        kills += 1
    start(f"{line} --output_dir killed --resume", ranks).finish()
    straight.finish()
    print(f"killed {kills} times")                     # shown by -rP
    assert len(read_log(tmp_path / "killed")) == 3 * wanted
    assert same_runs(tmp_path / "straight", tmp_path / "killed")


@each_script
@pytest.mark.parametrize("number, step", [
    (signal.SIGINT, 3), (signal.SIGTERM, 6), (signal.SIGUSR1, 8), (signal.SIGHUP, 9)])
def test_signal_within_an_epoch(tmp_path, monkeypatch, line, number, step):
    """One line, status 128 + number, a checkpoint of this very step, and the bits of one go."""
    line = more_epochs(line, 2)
    call(f"{line} --output_dir {tmp_path}/straight")
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)       # pytest under nohup
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        _, err = call(f"{line} --output_dir {tmp_path}/stopped", 128 + number)
    steps = 6                                          # of an epoch in each script's line
    assert len(err.strip().splitlines()) == 1 and "--resume" in err, err
    assert f"in epoch {1 + (step - 1) // steps} after step" in err, err
    saved = checkpoint(tmp_path / "stopped")
    assert saved["epoch"] * steps + saved["partial"]["step"] == step
    out, _ = call(f"{line} --output_dir {tmp_path}/stopped --resume")
    assert "resumed after epoch" in out
    assert same_runs(tmp_path / "straight", tmp_path / "stopped")


def test_signal_in_the_last_step(tmp_path, monkeypatch):
    """What is saved is the epoch's end: ranks have averaged their BatchNorm statistics by then."""
    averaged = []
    monkeypatch.setattr(Ranks, "average_buffers", lambda *_: averaged.append(1))
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    call(f"{IMAGENET} --output_dir {tmp_path}", 143)
    assert averaged and checkpoint(tmp_path)["partial"]["step"] == 6


@each_script
def test_signal_after_a_loss_that_is_not_finite(tmp_path, monkeypatch, line):
    """The last good checkpoint stays, and the end is called what it is."""
    count, add = [0], run.Progress.add

    def broken(self, loss, *args):
        count[0] += 1
        add(self, loss * (1 if count[0] < 8 else math.nan), *args)
        if count[0] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(run.Progress, "add", broken)
    err = refused(f"{more_epochs(line, 2)} --output_dir {tmp_path}/run", 1)
    assert "training diverged in epoch 2" in err, err
    saved = checkpoint(tmp_path / "run")
    assert saved["epoch"] == 1 and saved["partial"] is None


@each_script
def test_signal_in_evaluation(tmp_path, monkeypatch, line):
    """The training of the epoch is not done again."""
    call(f"{line} --output_dir {tmp_path}/straight")
    script = importlib.import_module(name_of(line))
    with monkeypatch.context() as patch:
        evaluate = script.evaluate

        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args)
        patch.setattr(script, "evaluate", interrupted)
        call(f"{line} --output_dir {tmp_path}/stopped", 143)
    assert checkpoint(tmp_path / "stopped")["partial"]["step"] == 6
    monkeypatch.setattr(run.Progress, "add", None)     # no step is taken
    call(f"{line} --output_dir {tmp_path}/stopped --resume")
    assert same_runs(tmp_path / "straight", tmp_path / "stopped")


@each_script
def test_second_signal_within_a_step(tmp_path, monkeypatch, line):
    """It ends the run at once, and nothing half done is saved."""
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    at_step(monkeypatch, 3, twice)
    _, err = call(f"{line} --output_dir {tmp_path}/run", 130)
    assert "--resume" not in err and not (tmp_path / "run/checkpoint.pt").exists(), err


def test_stopped_before_there_is_a_run(tmp_path, monkeypatch):
    """Nothing is promised that does not exist."""
    import data
    monkeypatch.setattr(data, "load", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    _, err = call(f"{CIFAR} --output_dir {tmp_path}/run", 143)
    assert err.strip() == "stopped" and not (tmp_path / "run").exists(), err


def test_interrupt_during_the_imports(start):
    """Ctrl-C ends the process without a traceback."""
    process = start(CIFAR, launcher="")
    time.sleep(0.5)                                    # torch takes seconds
    process.send(signal.SIGINT)
    assert process.processes[0].wait(120) in (-signal.SIGINT, 130)
    assert "Traceback" not in process.text(), process.text()


@pytest.mark.parametrize("line", [LM, IMAGENET], ids=name_of)
def test_stop_while_waiting_to_begin(start, line):
    """SIGTERM ends a rank that waits for others which never come."""
    port, = free_ports(1)
    rank = start(f"{line} --output_dir run", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=str(port))

    def listens():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0
    assert rank.wait_for(listens, "its store"), rank.text()
    time.sleep(1)
    rank.send(signal.SIGTERM)
    assert "stopped while waiting" in rank.finish(143)


def end_of_a_worker():
    """What torch's loaders do: their handler of SIGCHLD, and a worker that ends."""
    stop = Stop()
    with stop.listening():
        signal.signal(signal.SIGCHLD, lambda *_: None)
        stop.watch()
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(6)


def test_the_end_of_a_worker_is_no_end():
    process = Forked(target=end_of_a_worker)
    process.start()
    assert process.wait(120) == 0


def test_stop_while_another_hangs(start):
    """It also ends one that waits for an answer, after 20 seconds of patience."""
    ranks = start(f"{LM} --epochs 999 --output_dir run", 3)
    assert ranks.wait_for(lambda: "epoch   1" in ranks.text(), "an epoch"), ranks.text()
    ranks.send(signal.SIGSTOP, 2)
    time.sleep(1)
    ranks.send(signal.SIGTERM)
    assert ranks.processes[0].wait(120) == 143
    assert "stopped while waiting" in ranks.text()


@each_script
def test_full_disk(tmp_path, line):
    """One sentence with the path, status 2, the old checkpoint whole, and no temporary file."""
    place = tmp_path / "run"
    line = f"{line} --output_dir {place} --checkpoint_minutes 0.000001"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, name in ((100, "config.json"), (20_000, "checkpoint.pt")):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))    # Python ignores the signal
            err = refused(line + " --resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"{place}/{name} cannot be written (File too large)" in err, err
        assert not list(place.glob("*.part")) and not (place / "checkpoint.pt").exists()
    call(line + " --resume")
    before = (place / "checkpoint.pt").read_bytes()
    with pytest.raises(ZeroDivisionError):
        write_file(place / "checkpoint.pt", lambda file: 1 / 0)
    assert (place / "checkpoint.pt").read_bytes() == before and not list(place.glob("*.part"))


@each_script
def test_one_process_owns_a_folder(tmp_path, line):
    """A second one is refused, with --resume too, until the first one has ended, however."""
    (tmp_path / "run").mkdir()
    code = ("import fcntl, sys, time; file = open('run/.lock', 'a'); "
            "fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(999)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                          stdout=subprocess.PIPE) as owner:
        try:
            owner.stdout.readline()
            for flags in ("", " --resume"):
                assert "in use by another process" in refused(
                    f"{line} --output_dir {tmp_path}/run{flags}")
        finally:
            owner.kill()
    call(f"{line} --output_dir {tmp_path}/run --resume")


def look_often(folder):
    for _ in range(2000):
        check_folder(folder, resume=True)


def test_ranks_look_at_a_folder_at_once(tmp_path):
    """None takes another's look for a run that is in progress there."""
    lock(tmp_path).close()
    others = [Forked(target=look_often, args=(tmp_path,)) for _ in range(2)]
    for other in others:
        other.start()
    look_often(tmp_path)
    assert [other.wait(600) for other in others] == [0, 0]


def test_nohup():
    """What ignores the end of the terminal goes on ignoring it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS"])
def test_environment_that_is_no_number(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "two")
    err = refused(f"{CIFAR} --output_dir {tmp_path}/run")
    assert f"{name} is 'two'" in err, err


def test_json_without_nan():
    assert finite(dict(a=[1, float("nan")], b=(2.5, float("inf")), c="x")) == dict(
        a=[1, None], b=[2.5, None], c="x")


@each_script
def test_srun_without_torchrun(tmp_path, monkeypatch, line):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert "torchrun" in refused(f"{line} --output_dir {tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_flags(monkeypatch):
    """Also where one knows a flag that the other has not."""
    monkeypatch.setattr(Ranks, "gather", lambda *_: [dict(lr=1, tcov=5), dict(lr=1, beta=0.9)])
    with pytest.raises(UsageError, match="tcov .5 on rank 0, None on rank 1., beta .None on rank"):
        Ranks().agree({})


def test_more_processes_than_gpus(monkeypatch):
    """All of them refuse, and not only those without a GPU, of which nobody hears."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in "WORLD_SIZE", "LOCAL_WORLD_SIZE":
        monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match="more processes than the 1 GPUs"):
        ranks.start("cuda", Stop())


@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
    (torch.distributed.DistBackendError("NCCL error: Duplicate GPU detected"), "Duplicate GPU")])
def test_errors_of_torch(monkeypatch, capsys, error, said):
    """One line with torch's own words, status 1."""
    def work(args, stop):
        raise error
    monkeypatch.setenv("RANK", "0")
    assert run.run_script("x.py", lambda argv: argparse.Namespace(smoke=False), work, None, []) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_one_of_several_runs_diverges(capsys):
    """The others go on to the table."""
    def train(optim, seed):
        if (optim, seed) == ("sgd", 1):
            raise Diverged("training diverged in epoch 3")
        return dict(seed=seed, test_acc=50.0, train_loss=1.0, seconds_per_epoch=1.0, peak_memory=0,
                    state_bytes=0, output_dir="")
    args = argparse.Namespace(optim=["sgd", "mac"], seed=[0, 1], model="x", epochs=3)
    with pytest.raises(Diverged, match="sgd with seed 1$"):
        train_all(args, "title", dict(test_acc=("accuracy", 2)), train)
    out, err = capsys.readouterr()
    assert [row["run"] for row in record(out)["results"]] == [[0], [0, 1]]
    assert "epoch 3" in err


@each_script
def test_divergence(tmp_path, line):
    """The second epoch's rate is absurd: status 1, one sentence, and the first epoch is kept."""
    flags = {"train_cifar": "--schedule multistep --milestones 1 --lr_decay 1e15 --lr 0.01",
             "train_lm": "--warmup 100 --lr 1e15 --clip 0",
             "train_imagenet": "--lr-scheduler steplr --lr-step-size 1 --lr-gamma 1e15 --warmup 0"}
    for optim in ("sgd", "mac"):
        place = tmp_path / optim
        err = refused(more_epochs(line, 2) + f" {flags[name_of(line)]} --opt {optim} "
                      f"--output_dir {place} --checkpoint_minutes 0", 1)
        assert "training diverged in epoch" in err and "--lr" in err, err
        if "lm" not in line:
            assert "epoch 2" in err and len(read_log(place)) == 1
        for value in checkpoint(place)["model"].values():
            assert value.isfinite().all()


# ---------------------------------------------------------------------------------------------
# What a folder holds, and who may go on with it
# ---------------------------------------------------------------------------------------------

@each_script
def test_files_of_a_run(tmp_path, line):
    """What is left of a run, and what a person and a program see of it."""
    out, err = call(f"{line} --output_dir {tmp_path}/run", terminal=True)
    assert not err and "{" not in out, "a record on the terminal"
    assert max(len(text) for text in out.splitlines() if text.startswith("epoch")) <= 80, out
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        ".lock", "checkpoint.pt", "config.json", "log.csv", "record.json"]
    last = json.loads((tmp_path / "run/record.json").read_text())
    assert last["epoch"] == 1 and last["optim"] == "mac"
    assert f"{last['train_loss']:.9g}" == read_log(tmp_path / "run")[0]["train_loss"]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["lr"] and "--output_dir" in config["command"]
    assert any("mean input" in line for line in config["optimizer"])
    out, _ = call(f"{line} --output_dir {tmp_path}/other")
    assert "mac" in json.dumps(record(out)) and torch.__version__ in out


@each_script
def test_used_folder(tmp_path, line):
    here = f"{line} --output_dir {tmp_path}/run"
    assert "starts anew" in call(here + " --resume")[0]
    before, log = (tmp_path / "run/checkpoint.pt").read_bytes(), read_log(tmp_path / "run", ())
    assert "--resume" in refused(here)
    err = refused(here + " --resume --lr 0.7")
    assert "--lr (was 0." in err and "now 0.7)" in err, err
    err = refused(here + " --resume --optim adamw")
    assert "--optim (was mac, now adamw)" in err and " more: repeat" in err and len(err) < 600, err
    assert "after epoch 1 of 1" in call(here + " --resume")[0]     # it is not run again
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert read_log(tmp_path / "run", ()) == log
    (tmp_path / "file").write_text("")
    assert "file is a file: name another" in refused(f"{line} --output_dir {tmp_path}/file/x")
    (tmp_path / "odd/.lock").mkdir(parents=True)
    assert "odd/.lock cannot be opened" in refused(f"{line} --output_dir {tmp_path}/odd")


@each_script
def test_extended(tmp_path, line):
    """More epochs where the rates do not depend on their number, else the reason why not."""
    constant = "--schedule constant --model-ema 0" if "imagenet" in line else "--schedule constant"
    call(more_epochs(line, 3) + f" {constant} --output_dir {tmp_path}/straight")
    call(f"{line} {constant} --output_dir {tmp_path}/run")
    out, _ = call(more_epochs(line, 3) + f" {constant} --output_dir {tmp_path}/run --resume")
    assert "1 epochs become 3" in out and same_runs(tmp_path / "straight", tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["epochs"] == 3
    err = refused(f"{more_epochs(line, 2)} {constant} --output_dir {tmp_path}/run --resume")
    assert "more than --epochs 2" in err
    cosine = f"{line} --schedule cosine --output_dir {tmp_path}/cosine"
    call(cosine)
    err = refused(cosine + " --epochs 2 --resume")
    assert "--epochs (was 1, now 2); the schedule's rates depend" in err, err


@each_script
def test_damaged_checkpoint(tmp_path, line):
    """Whatever is wrong with the file, it is named and left alone."""
    here, path = f"{line} --output_dir {tmp_path}/run", tmp_path / "run/checkpoint.pt"
    call(here)
    whole, made = path.read_bytes(), [io.BytesIO() for _ in range(3)]
    foreign, old, rows = made
    middle = len(whole) // 2
    torch.save(dict(config="none", log=0), foreign)
    torch.save({**checkpoint(tmp_path / "run"), "model": {}}, old)
    torch.save({**checkpoint(tmp_path / "run"), "log": [3]}, rows)
    for content in (whole[:middle], b"", b"epoch,lr\n" * 99, *(f.getvalue() for f in made),
                    whole[:middle] + bytes(255 - b for b in whole[middle:middle + 64])
                    + whole[middle + 64:]):
        path.write_bytes(content)
        err = refused(here + " --resume")
        assert str(path) in err and "move it away" in err and path.read_bytes() == content


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@each_script
def test_hostile_checkpoint(tmp_path, monkeypatch, line):
    """Its code is not run, whatever the environment says about torch.load's default."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "run").mkdir()
    torch.save(dict(config={}, log=[], partial=None, model=Touch(tmp_path / "executed")),
               tmp_path / "run/checkpoint.pt")
    refused(f"{line} --output_dir {tmp_path}/run --resume")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

@each_script
def test_smoke(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    out, _ = call(f"{name_of(line)}.py --smoke")
    assert re.match("smoke test passed: sgd .*mac nysact foof kfac adafisher adafisherw", out), out
    assert not list(tmp_path.iterdir()), "--smoke left files behind"


@each_script
def test_help(line):
    """It names every flag, also where a console lacks its characters."""
    script, out = importlib.import_module(name_of(line)), io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        script.main(["--help"])
    out.flush()
    text = out.buffer.getvalue().decode()
    assert all(f"--{name}" in text for name in set(vars(script.parse([]))) - {"command"})
    assert " for sgd" in text and "for nysact" in text
    assert script.__doc__.splitlines()[0] in text


@each_script
def test_spelling(line):
    parse = importlib.import_module(name_of(line)).parse
    args = parse("--weight-decay=0.1 --epochs 3 --lr 1 --lr 2 --output-dir a-b --optim MAC "
                 "--schedule Constant --amp --compile False".split())
    assert (args.weight_decay, args.epochs, args.lr, args.output_dir) == (0.1, 3, 2, "a-b")
    assert args.optim in ("mac", ["mac"]) and args.schedule == "constant"
    assert args.amp is True and args.compile is False
    assert parse(["--run", "2147483647"]).seed in (2147483647, [2147483647])


@each_script
@pytest.mark.parametrize("flags, words", {
    "--lr -1": "--lr", "--lr nan": "--lr", "--lr x": "--lr", "--lr 1e150": "at most 1e15",
    "--momentum 1": "below 1 (--help", "--epochs 0": "--epochs", "--damping 0": "--damping",
    f"--epochs 1{400 * '0'}": "at most 1e15", "--tcov 1.5": "--tcov", "--batch_size 0":
    "--batch_size", "--run 2147483648": "from 0 to 2147483647", "--run": "--run",
    "--model resnet21": "invalid choice", "--optim sgdd": "adamw", "--sketch x": "subcolumns",
    "--learning_rate 1": "--learning_rate", "--device tpu": "cuda:N",
    "--resume FILE": "--output_dir", "--amp maybe": "neither true nor false",
    "--data_dir ~who?/x": "'~who?/x'", "--output_dir=": "it is empty", "--data_dir=": "it is empty",
    "--optim sgd --momentum 0 --nesterov": "esterov", "--device cuda:99": "--device cuda:99",
}.items(), ids=lambda text: text[:20])
def test_wrong_values(tmp_path, line, flags, words):
    assert words in refused(f"{line} --output_dir {tmp_path}/run {flags}")
    assert not (tmp_path / "run").exists()


@each_script
def test_home_folders(line):
    """~ is expanded where a shell leaves it, after =."""
    parse = importlib.import_module(name_of(line)).parse
    for path, want in (("~/x", str(Path.home() / "x")), ("a~/~b", "a~/~b")):
        args = parse([f"--data_dir={path}", f"--output_dir={path}"])
        assert args.data_dir == args.output_dir == want


def test_folder_whose_name_is_no_text(tmp_path):
    """Bytes that are no UTF-8, as a locale without it makes of any accent."""
    place = tmp_path / os.fsdecode(b"\xe9")
    call(f"{CIFAR} --output_dir {place}")
    assert str(place) in json.loads((place / "config.json").read_text())["command"]
    assert json.loads((place / "record.json").read_text())["output_dir"] == str(place)


def test_output_that_nobody_reads(tmp_path, monkeypatch):
    """As of `| head`: the run is saved, says so, and goes on."""
    def broken(*words, **_):
        if "step 4/" in words[0]:
            raise BrokenPipeError(32, "Broken pipe")
    check_mended(tmp_path, monkeypatch, f"{IMAGENET} --print-freq 4", run, "print", broken,
                 "Broken pipe")


def check_mended(tmp_path, monkeypatch, line, module, name, broken, words):
    """A run that this ends after step 4 is saved and says so; mended, it equals a straight one."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken, raising=False)
        err = refused(f"{line} --output_dir {tmp_path}/run")
    assert f"{words}; the run is saved in epoch 1 after step 4" in err, err
    call(f"{line} --output_dir {tmp_path}/run --resume")
    call(f"{line} --output_dir {tmp_path}/straight")
    assert same_runs(tmp_path / "straight", tmp_path / "run")


def test_closed_output(tmp_path, monkeypatch):
    """As some services start a program: it trains all the same."""
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, None)
    script, *argv = f"{CIFAR} --output_dir {tmp_path}/run".split()
    assert importlib.import_module(name_of(script)).main(argv) == 0
    assert (tmp_path / "run/record.json").exists()


def test_rank_of_no_world(tmp_path, monkeypatch):
    """A RANK that some cluster sets does not silence a process that is alone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "--lr" in refused(f"{CIFAR} --lr 0")
    assert record(call(f"{CIFAR} --output_dir {tmp_path}/run")[0])["results"]


def test_time_in_words():
    assert [time_in_words(s) for s in (0, 89, 91, 5399, 5401, 36000, 172801, 9e6)] == [
        "0 s", "89 s", "1.5 min", "90 min", "1.5 h", "10 h", "2.0 days", "104 days"]


def test_seeds():
    seeds = {run.seed_of(*numbers) for numbers in (
        (3,), (3, 0), (3, 0, 0), (3, 0, 0, 0), (0, 0, 0, 3), (3, 1, 0, 0), (3, 1, 0))}
    assert len(seeds) == 7 and all(0 <= seed < 2 ** 64 for seed in seeds), seeds


def test_bad_data_within_an_epoch(tmp_path, monkeypatch):
    """What cannot be read is named, the run is saved, and goes on once that is mended."""
    import data
    real = data.batches

    def broken(*args, train, **kwargs):
        for i, batch in enumerate(real(*args, train=train, **kwargs)):
            if train and i == 4:
                raise DataError("7.png cannot be decoded.")
            yield batch
    check_mended(tmp_path, monkeypatch, CIFAR, data, "batches", broken, "7.png cannot be decoded")


def test_resumed_on_other_data(tmp_path, monkeypatch):
    """As many images of the same name, but not the same."""
    call(f"{CIFAR} --output_dir {tmp_path}/run")
    import data
    real = data.load

    def other(*args):
        loaded = real(*args)
        return loaded._replace(train_labels=loaded.train_labels.flip(0))
    monkeypatch.setattr(data, "load", other)
    assert "trained on other data" in refused(f"{CIFAR} --output_dir {tmp_path}/run --resume")


def test_no_script_imports_another():
    for file in HERE.glob("*.py"):
        if not file.name.startswith("test_"):
            words = [line.split()[1].split("_")[0] for line in file.read_text().splitlines()
                     if line.startswith(("from ", "import "))]
            assert not {"train", "bench", "analyze"} & set(words), file
