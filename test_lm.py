"""train_lm.py, the GPT and the texts: python test_lm.py (half a minute on a quiet CPU core).

Everything is tiny and on generated or written text, without data or network; what a user runs as a
process is run as one where that matters, and in this process elsewhere, which starts sooner.
"""
import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import text as texts
import train_lm
from models import GPT, GPT_SIZES
from test_download import put
from test_math import close, close_all, raises, run_tests, skip, snapshot

HERE = Path(__file__).resolve().parent
TINY = ("--dataset grammar --train_size 1500 --valid_size 100 --layers 2 --heads 2 --width 16 "
        "--context 16 --batch_size 8 --epoch 2 --warmup 5 --sample 5 --device cpu").split()
MEASURED = ("seconds", "peak_memory")     # the columns that two equal runs may differ in


# ---------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(*argv, status=0):
    """(stdout, stderr) of the script's main function in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = train_lm.main([str(a) for a in argv])
    assert got == status, f"exit status {got}, not {status}:\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def start(cwd, *command):
    """A Python process with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, text=True,
                            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def read_log(folder, without=MEASURED):
    """The rows of log.csv as dicts of text, but for the measured columns."""
    with open(Path(folder, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(tuple(row) == train_lm.COLUMNS for row in rows)
    return [{name: text for name, text in row.items() if name not in without} for row in rows]


def tensors(folder):
    """Every tensor of a checkpoint's model and optimizer, by name."""
    saved = torch.load(Path(folder, "checkpoint.pt"))
    state = {f"{i} {key}": value for i, values in saved["optimizer"]["state"].items()
             for key, value in values.items() if torch.is_tensor(value)}
    return {**saved["model"], **state}


def tiny_gpt(vocabulary=11, context=6, **options):
    """In float64, its weights large enough that everything depends on everything."""
    torch.manual_seed(0)
    net = GPT(vocabulary, context, layers=2, heads=2, width=8, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.5)
    return net


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------

def test_gpt_causal():
    """A changed token changes the logits from there on, and none before."""
    net = tiny_gpt()
    tokens = torch.randint(11, (2, 6))
    before = net(tokens)
    for t in range(6):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = net(changed)
        close(f"logits before token {t}", after[:, :t], before[:, :t], 1e-13)
        assert ((after[:, t:] - before[:, t:]).abs().amax((0, 2)) > 1e-6).all()
    close("a shorter window", net(tokens[:, :4]), before[:, :4], 1e-13)
    raises(ValueError, ["7", "6"], lambda: net(torch.zeros(1, 7, dtype=torch.int64)))
    raises(ValueError, ["3", "8"], lambda: GPT(11, 6, layers=1, heads=3, width=8))


def test_gpt_transcription():
    """The whole network against loops over samples, queries and heads, written from GPT-2."""
    net = tiny_gpt()
    tokens = torch.randint(11, (2, 5))
    want = torch.zeros(2, 5, 11, dtype=torch.float64)
    with torch.no_grad():
        for b in range(2):
            x = torch.stack([net.wte.weight[token] + net.wpe.weight[i]
                             for i, token in enumerate(tokens[b])])
            for block in net.blocks:
                y = block.norm1(x)
                q, k, v = block.attn.qkv(y).chunk(3, dim=1)
                heads = torch.zeros_like(x)
                for head in (slice(0, 4), slice(4, 8)):
                    for i in range(5):
                        weights = (q[i, head] @ k[:i + 1, head].T / 2).softmax(0)
                        heads[i, head] = weights @ v[:i + 1, head]
                x = x + block.attn.proj(heads)
                y = block.fc1(block.norm2(x))
                x = x + block.fc2(y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)))
            want[b] = net.norm(x) @ net.wte.weight.T
        close("GPT", net(tokens), want, 1e-12)


def test_gpt_counts():
    """(V + N)·D + layers·(12·D² + 13·D) + 2·D, without biases 2·D and D; GPT-2's 124,439,808."""
    published = {"minigpt": (40479, 59_637_504), "gpt2_small": (50257, 124_439_808),
                 "nanogpt": (50304, 19_304_704), "char": (65, 809_856)}
    for name, (V, count) in published.items():
        size = GPT_SIZES[name]
        D, in_block, at_end = size["width"], *((13, 2) if size.get("bias", True) else (2, 1))
        formula = (V + size["context"] + at_end) * D + size["layers"] * (12 * D + in_block) * D
        for tied in (True, False):
            with torch.device("meta"):
                net = GPT(V, **size, tied=tied)
            got = sum(p.numel() for p in net.parameters())
            assert got == count + (not tied) * V * D and count == formula, (name, got, formula)
    print(f"    {', '.join(published)}")


def test_gpt_tied():
    """One Parameter, counted, stored and stepped once; its gradient is the sum of both uses."""
    tied, free = tiny_gpt(), tiny_gpt(tied=False)
    with torch.no_grad():
        free.load_state_dict(tied.state_dict())
    tokens, target = torch.randint(11, (2, 6)), torch.randint(11, (12,))
    for net in (tied, free):
        F.cross_entropy(net(tokens).flatten(0, 1), target).backward()
    assert free.head.weight is not free.wte.weight and tied.head.weight is tied.wte.weight
    close("∂ tied = ∂ embedding + ∂ head", tied.wte.weight.grad,
          free.wte.weight.grad + free.head.weight.grad, 1e-13)
    state = tied.state_dict()
    assert state["head.weight"].data_ptr() == state["wte.weight"].data_ptr()
    with folder() as tmp:
        for net, name in ((tied, "tied"), (free, "free")):
            torch.save(net.state_dict(), tmp / name)
        stored = [sum(t.nbytes for t in {t.data_ptr(): t for t in torch.load(tmp / name).values()}
                      .values()) for name in ("tied", "free")]
        assert stored[1] - stored[0] == 11 * 8 * 8, stored
        again = tiny_gpt()
        again.load_state_dict(torch.load(tmp / "tied"))
        assert again.head.weight is again.wte.weight
    assert not torch.equal(free.wte.weight.grad, torch.zeros(11, 8))


# ---------------------------------------------------------------------------------------------
# Loss, rate, steps
# ---------------------------------------------------------------------------------------------

def test_perplexity():
    """exp of the mean nats of single tokens, each from its own window; with a ragged last one."""
    net = tiny_gpt()
    for length in (2, 7, 13, 24):
        tokens = torch.randint(11, (length,))
        nats = []
        for i in range(1, length):
            seen = tokens[(i - 1) // 6 * 6:i]
            nats.append(-net(seen[None])[0, -1].log_softmax(0)[tokens[i]].item())
        for size, parts in ((1, 1), (4, 1), (4, 2)):
            config = dict(context=6, batch_size=size, accumulate=parts, amp=False)
            loss = train_lm.evaluate(net, tokens, config)
            close(f"perplexity of {length} tokens, {size // parts} windows at a time",
                  train_lm.perplexity(loss), math.exp(np.mean(nats)), 1e-6)
    assert train_lm.perplexity(1e4) == math.inf


def test_learning_rate():
    """Linear warm-up from more than zero, then torch's cosine down to the given fraction."""
    config = dict(lr=2.0, warmup=0, schedule="cosine", min_lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.2)
    rates = []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    close("cosine", [train_lm.learning_rate(config, i, 20) for i in range(20)], rates, 1e-12)
    config["warmup"] = 4
    ramp = [train_lm.learning_rate(config, i, 20) for i in range(6)]
    close("warm-up", ramp[:5], [0.4, 0.8, 1.2, 1.6, 2.0], 1e-15)
    assert ramp[5] < 2 and train_lm.learning_rate(config, 2, 3) == ramp[2]
    config["schedule"] = "constant"
    assert train_lm.learning_rate(config, 19, 20) == 2.0


def built(*argv, vocabulary=11):
    """(network, optimizer, config) of a command."""
    args = train_lm.parse([*TINY, *map(str, argv)])
    nothing = torch.zeros(0, dtype=torch.int64)
    text = texts.Text(nothing, nothing, list(range(vocabulary)), "character", "")
    config = train_lm.resolve(args, args.optim[0], 0, text)
    net, optimizer = train_lm.build(config, torch.device("cpu"))
    return net, optimizer, config


def test_embeddings_plain_step():
    """In every optimizer embeddings and a tied head take the plain step, at their own rate."""
    x, y = torch.randint(11, (2, 4, 16))
    for optim in ("sgd", "mac", "nysact", "foof", "kfac", "adafisher", "adafisherw"):
        net, optimizer, _ = built("--optim", optim, "--lr", 0.01, "--weight_decay", 0.1,
                                  "--embedding_lr", 4)
        before = snapshot(net, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["rate"]
        F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        for name in ("wte.weight", "wpe.weight"):
            p = dict(net.named_parameters())[name]
            # decoupled, the decay is of the rate without its multiple: that of all matrices
            decay = 0.1 / 4 if optim == "adafisherw" else 0.1
            want = before[name] - 0.04 * (p.grad + decay * before[name])
            close(f"{optim}, {name}", p, want, 1e-6)
        assert net.head.weight is net.wte.weight
    net, optimizer, _ = built("--optim", "mac", "--untied")
    assert net.head.weight in optimizer.layers and net.wte.weight not in optimizer.layers
    raises(train_lm.UsageError, ["--untied", "40000"],
           lambda: built("--optim", "kfac", "--untied", vocabulary=40_000))


def test_parameter_groups():
    """Every parameter once; no decay on vectors."""
    net, optimizer, _ = built("--optim", "adamw", "--untied")
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == set(net.parameters())
    for group in optimizer.param_groups:
        assert all((p.dim() == 2) == (group["weight_decay"] > 0) for p in group["params"])
    args = train_lm.parse([])
    published = dict(lr=1e-4, damping=1e-3, weight_decay=0.1, tcov=100, layers=4, heads=12,
                     width=768, context=256, tied=True, batch_size=32, epoch=50)
    text = texts.Text(torch.zeros(0), torch.zeros(0), [], "word", "")
    config = train_lm.resolve(args, args.optim[0], 0, text)
    assert args.optim == ["adafisherw"] and published.items() <= config.items(), config


def test_published_steps():
    """The docstring's command on OpenWebText takes the 15,000 steps of MAC's nanoGPT."""
    line = re.search(r"train_lm.py (--text openwebtext.+?)\n\n", train_lm.__doc__, re.DOTALL)[1]
    args = train_lm.parse(shlex.split(line.replace("\\\n", " ")))
    windows = texts.num_windows(range(args.train_size), GPT_SIZES[args.model]["context"])
    assert windows // args.batch_size * args.epoch == 15_000 and windows % args.batch_size == 0
    assert 274_000_000 * 9 // 10 >= args.train_size and args.optim == ["mac"]


def test_sample():
    """Tokens are drawn from the model's chances, one after another, in windows that it can take."""
    class Successor:
        context = 4

        def eval(self):
            pass

        def __call__(self, x):
            assert x.shape[1] <= self.context
            return F.one_hot((x + 1) % 5, 5) * 100.0

    text = texts.Text(torch.zeros(1), torch.zeros(1), list("\nabcd"), "character", "")
    assert train_lm.write(Successor(), text, 7, 0) == "abcd\nab"


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------

def test_run():
    """What a run leaves behind and prints."""
    with folder() as tmp:
        argv = [*TINY, "--optim", "sgd", "mac", "--run", 0, 3, "--output_dir", tmp / "d",
                "--rank", 3]
        out, err = run(*argv)
        assert err.startswith("note:") and "--rank" in err, err
        record = json.loads(out.splitlines()[-1])
        assert [r["optim"] for r in record["results"]] == ["sgd", "mac"]
        for result in record["results"]:
            logs = [read_log(tmp / "d" / result["optim"] / seed) for seed in "03"]
            assert logs[0] != logs[1]
            loss = [float(log[-1]["valid_loss"]) for log in logs]
            close(f"{result['optim']}: mean loss", result["valid_loss_mean"], sum(loss) / 2, 1e-8)
            assert f"{sum(loss) / 2:.4f} ± {abs(loss[0] - loss[1]) / 2 ** 0.5:.4f}" in out
            for row in logs[0] + logs[1]:
                for part in ("train", "valid"):
                    close("perplexity = exp(loss)", float(row[f"{part}_perplexity"]),
                          math.exp(float(row[f"{part}_loss"])), 1e-7)
        place = tmp / "d" / "mac" / "0"
        assert sorted(f.name for f in place.iterdir()) == ["checkpoint.pt", "config.json",
                                                           "log.csv"]
        config = json.loads((place / "config.json").read_text())
        assert config["train_tokens"] == 1500 and "--run 0 3" in config["command"]
        assert any("qkv" in line for line in config["optimizer"])
        assert out.count("sample: '") == 4
        plain = [line for line in out.splitlines()[:-1] if not line.startswith("grammar (")]
        assert max(map(len, plain)) <= 95, max(plain, key=len)


def test_resume():
    """Stopped after an epoch and continued: the same log and the same bits, with dropout."""
    flags = ["--dropout", 0.1, "--epoch", 3, "--optim", "adamw", "mac", "kfac", "adafisherw"]
    with folder() as tmp:
        run(*TINY, *flags, "--output_dir", tmp / "a")
        argv = [str(a) for a in (*TINY, *flags, "--output_dir", tmp / "b")]
        for until in (1, 2):
            with contextlib.redirect_stdout(io.StringIO()):
                train_lm.run_all(train_lm.parse(argv + ["--resume"] * (until > 1)), argv, until)
        (tmp / "b" / "mac" / "checkpoint.pt.tmp").write_bytes(b"half a check")
        run(*argv, "--resume")
        for optim in flags[-4:]:
            a, b = tmp / "a" / optim, tmp / "b" / optim
            assert read_log(a) == read_log(b) and len(read_log(a)) == 3
            x, y = tensors(a), tensors(b)
            assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), optim
        print(f"    {len(x)} tensors of {optim}, bit for bit")
        run(*argv, "--resume")                         # finished: nothing is run again
        for changed, word in ((["--lr", 5], "--lr"), (["--context", 8], "--context")):
            _, err = run(*argv, "--resume", *changed, status=2)
            assert word in err and len(err.splitlines()) == 1, err
        path = b / "checkpoint.pt"
        whole = path.read_bytes()
        torch.save(dict(torch.load(path), config="none"), path)
        assert str(path) in run(*argv, "--resume", status=2)[1]
        path.write_bytes(whole[:-1000])
        assert str(path) in run(*argv, "--resume", status=2)[1]


def test_accumulate():
    """Four micro-batches equal one batch, in every optimizer."""
    optims = [name for name in train_lm.RECIPES if name != "adam"]
    with folder() as tmp:
        for parts in (1, 4):
            run(*TINY, "--epoch", 1, "--optim", *optims, "--accumulate", parts, "--output_dir",
                tmp / str(parts))
        for optim in optims:
            a, b = (tensors(tmp / parts / optim) for parts in "14")
            names = [name for name in a if not name[0].isdigit()]
            close_all(optim, {name: b[name] for name in names}, {name: a[name] for name in names},
                      2e-3 if optim == "adamw" else 2e-4)


def test_ranks():
    """torchrun with two processes: the log of one, and a checkpoint that one continues."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        skip("this torch has no gloo")
    flags = [*TINY, "--optim", "sgd", "mac", "kfac", "nysact", "adafisherw"]
    with folder() as tmp:
        process = start(tmp, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
                        "0", "--standalone", HERE / "train_lm.py", *flags, "--accumulate", 2,
                        "--output_dir", "two")
        run(*flags, "--output_dir", tmp / "one")
        out, err = process.communicate(timeout=170)
        assert process.returncode == 0, out + err
        assert json.loads(out.splitlines()[-1])["ranks"] == 2 and out.count("sample: '") == 5
        for optim in flags[-5:]:
            a, b = (read_log(tmp / name / optim) for name in ("one", "two"))
            for column in ("train_loss", "valid_loss"):
                close(f"{optim}, {column}", [float(row[column]) for row in b],
                      [float(row[column]) for row in a], 1e-5)
        out, _ = run(*flags, "--output_dir", tmp / "two", "--resume")
        assert out.count("resumed after epoch 2 of 2") == 5


def test_interrupt():
    """SIGINT and SIGTERM: one line, exit status 130 and 143, and a run to continue."""
    with folder() as tmp:
        flags = [*TINY, "--optim", "mac", "--epoch", 99999]
        signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
        processes = {number: start(tmp, HERE / "train_lm.py", *flags, "--output_dir", status)
                     for number, status in signals.items()}
        for number, process in processes.items():
            while not process.stdout.readline().startswith("epoch   2/"):
                pass
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            assert process.returncode == signals[number] and "Traceback" not in err, err
            assert "--resume" in err and len(err.strip().splitlines()) == 1, err
            place = tmp / str(signals[number])
            assert len(read_log(place)) >= 2 and tensors(place)


def test_divergence():
    with folder() as tmp:
        _, err = run(*TINY, "--optim", "sgd", "--lr", 1e30, "--clip", 0, "--output_dir", tmp / "d",
                     status=1)
        assert "epoch 1" in err and "--lr" in err and len(err.splitlines()) == 1, err


def test_wrong_commands():
    """One sentence and status 2 for each, and no folder left behind."""
    with folder() as tmp:
        put(tmp, short=b"ab" * 50, binary=b"\xff\xfe\xfa" * 99)
        wrong = {
            "--lr -1": "--lr", "--lr nan": "--lr", "--epoch 0": "--epoch", "--heads 3": "3 heads",
            "--batch_size 0": "--batch_size", "--dropout 1": "--dropout", "--model gpt3": "nanogpt",
            "--optim sgdd": "adamw", "--dataset ptb": "wikitext2", "--embedding_lr 0": "positive",
            "--learning_rate 1": "--learning_rate", "--accumulate 3": "--accumulate",
            "--train_size 999999999": "999999999", "--valid_size 1": "at least two",
            "--train_file x": "--train_file",
            "--batch_size 512 --train_size 100": "fewer than --batch_size",
            "--context 300": "--context", "--schedule linear": "constant", "--run": "--run",
            f"--text {tmp}/none": "none", f"--text {tmp}/binary": "UTF-8",
            f"--text {tmp}/short --train_size 80 --valid_size 9": "--context",
            f"--text {tmp}": str(tmp), f"--output_dir {tmp}/short/x": "short is a file: name",
            "--optim sgd --momentum 0 --nesterov": "esterov",
            "--optim adamw sgd --momentum 0 --nesterov": "esterov",      # before adamw trains
            f"--dataset wikitext2 --data_dir {tmp} --train_file my.txt": "my.txt",
        }
        if not torch.cuda.is_available():
            wrong["--device cuda"] = "--device cuda"
        for command, word in wrong.items():
            _, err = run(*TINY, "--output_dir", tmp / "run", *command.split(), status=2)
            assert word in err and len(err.splitlines()) == 1, (command, err)
        assert not (tmp / "run").exists()
        run(*TINY, "--epoch", 1, "--optim", "sgd", "--output_dir", tmp / "run")
        assert "--resume" in run(*TINY, "--output_dir", tmp / "run", status=2)[1]
    print(f"    {len(wrong)} commands")


def test_smoke_and_help():
    out, _ = run("--smoke")
    assert out.startswith("smoke test passed: sgd adam adamw mac nysact"), out
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        train_lm.parse(["--help"])
    assert all(f"--{name}" in out.getvalue() for name in vars(train_lm.parse([])))
    args = train_lm.parse(["--weight-decay=0.1", "--epochs", "3", "--min-lr", "0.5", "--lr", "1",
                           "--lr", "2"])
    assert (args.weight_decay, args.epoch, args.min_lr, args.lr) == (0.1, 3, 0.5, 2)


if __name__ == "__main__":
    run_tests(globals(), sys.argv[1:])
