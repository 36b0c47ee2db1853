"""train_lm.py and the GPT; see test_run.py for what all scripts share, test_text.py for texts.

Everything is tiny and on generated or written text, without data or network.
"""
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import text as texts
import train_lm
from models import GPT, GPT_SIZES
from ranks import Ranks, Stop, UsageError
from test_run import (call, checkpoint, free_ports, read_log, record, refused,  # noqa: F401
                      start_processes)
from testing import close, on_ranks, raises, snapshot

TINY = ("train_lm.py --dataset grammar --train_size 1500 --valid_size 100 --layers 2 --heads 2 "
        "--width 16 --context 16 --batch_size 8 --epoch 1 --warmup 5 --sample 5 --device cpu")


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
        close(after[:, :t], before[:, :t], 1e-13)
        assert ((after[:, t:] - before[:, t:]).abs().amax((0, 2)) > 1e-6).all()
    close(net(tokens[:, :4]), before[:, :4], 1e-13)
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
        close(net(tokens), want, 1e-12)


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


def test_gpt_tied(tmp_path):
    """One Parameter, counted, stored and stepped once; its gradient is the sum of both uses."""
    tied, free = tiny_gpt(), tiny_gpt(tied=False)
    with torch.no_grad():
        free.load_state_dict(tied.state_dict())
    tokens, target = torch.randint(11, (2, 6)), torch.randint(11, (12,))
    for net in (tied, free):
        F.cross_entropy(net(tokens).flatten(0, 1), target).backward()
    assert free.head.weight is not free.wte.weight and tied.head.weight is tied.wte.weight
    close(tied.wte.weight.grad, free.wte.weight.grad + free.head.weight.grad, 1e-13)
    state = tied.state_dict()
    assert state["head.weight"].data_ptr() == state["wte.weight"].data_ptr()
    stored = {}
    for net, name in ((tied, "tied"), (free, "free")):
        torch.save(net.state_dict(), tmp_path / name)
        tensors = {t.data_ptr(): t.nbytes for t in torch.load(tmp_path / name).values()}
        stored[name] = sum(tensors.values())
    assert stored["free"] - stored["tied"] == 11 * 8 * 8, stored
    again = tiny_gpt()
    again.load_state_dict(torch.load(tmp_path / "tied"))
    assert again.head.weight is again.wte.weight
    assert not torch.equal(free.wte.weight.grad, torch.zeros(11, 8))


# ---------------------------------------------------------------------------------------------
# Loss, rate, steps
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", [2, 7, 13, 24])
def test_perplexity(length):
    """exp of the mean nats of single tokens, each from its own window; with a ragged last one."""
    net = tiny_gpt()
    tokens, nats = torch.randint(11, (length,)), []
    for i in range(1, length):
        seen = tokens[(i - 1) // 6 * 6:i]
        nats.append(-net(seen[None])[0, -1].log_softmax(0)[tokens[i]].item())
    for size, parts in ((1, 1), (4, 1), (4, 2)):           # some windows at a time
        config = dict(context=6, batch_size=size, accumulate=parts, amp=False, fsdp=False)
        loss = train_lm.evaluate(net, tokens, config, Ranks(), Stop())
        close(train_lm.perplexity(loss), math.exp(sum(nats) / len(nats)), 1e-6)
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
    close([train_lm.learning_rate(config, i, 20) for i in range(20)], rates, 1e-12)
    config["warmup"] = 4
    ramp = [train_lm.learning_rate(config, i, 20) for i in range(6)]
    close(ramp[:5], [0.4, 0.8, 1.2, 1.6, 2.0], 1e-15)
    assert ramp[5] < 2 and train_lm.learning_rate(config, 2, 3) == ramp[2]
    config["schedule"] = "constant"
    assert train_lm.learning_rate(config, 19, 20) == 2.0


def built(flags, vocabulary=11):
    """The network and the optimizer of a command."""
    args = train_lm.parse(f"{TINY} {flags}".split()[1:])
    nothing = torch.zeros(0, dtype=torch.int64)
    text = texts.Text(nothing, nothing, [str(i) for i in range(vocabulary)], "character", "")
    config = train_lm.resolve(args, args.optim[0], 0, text)
    return train_lm.build(config, torch.device("cpu"))


@pytest.mark.parametrize("optim", ["sgd", "mac", "nysact", "foof", "kfac", "adafisher",
                                   "adafisherw"])
def test_embeddings_plain_step(optim):
    """In every optimizer embeddings and a tied head take the plain step, at their own rate."""
    x, y = torch.randint(11, (2, 4, 16))
    net, optimizer = built(f"--optim {optim} --lr 0.01 --weight_decay 0.1 --embedding_lr 4")
    before = snapshot(net, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["rate"]
    F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    for name in ("wte.weight", "wpe.weight"):
        p = dict(net.named_parameters())[name]
        # decoupled, the decay is of the rate without its multiple: that of all matrices
        decay = 0.1 / 4 if optim == "adafisherw" else 0.1
        close(p, before[name] - 0.04 * (p.grad + decay * before[name]), 1e-6)
    assert net.head.weight is net.wte.weight


def test_untied():
    """The head's own weight is preconditioned; K-FAC refuses it where that would be too large."""
    net, optimizer = built("--optim mac --untied")
    lines = [line.split(":")[0].strip() for line in repr(optimizer).splitlines() if "mean" in line]
    assert "head" in lines and "wte" not in lines
    raises(UsageError, ["--untied", "40000"],
           lambda: built("--optim kfac --untied", vocabulary=40_000))


def test_parameter_groups():
    """Every parameter once; no decay on vectors."""
    net, optimizer = built("--optim adamw --untied")
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == set(net.parameters())
    for group in optimizer.param_groups:
        assert all((p.dim() == 2) == (group["weight_decay"] > 0) for p in group["params"])
    args = train_lm.parse([])
    published = dict(lr=1e-4, damping=1e-3, weight_decay=0.1, tcov=100, layers=4, heads=12,
                     width=768, context=256, tied=True, batch_size=32, epochs=50)
    text = texts.Text(torch.zeros(0), torch.zeros(0), [], "word", "")
    config = train_lm.resolve(args, args.optim[0], 0, text)
    assert args.optim == ["adafisherw"] and published.items() <= config.items(), config


def test_published_steps():
    """The docstring's command on OpenWebText takes the 15,000 steps of MAC's nanoGPT."""
    line = re.search(r"train_lm.py (--text openwebtext.+?)\n\n", train_lm.__doc__, re.DOTALL)[1]
    args = train_lm.parse(shlex.split(line.replace("\\\n", " ")))
    windows = texts.num_windows(range(args.train_size), GPT_SIZES[args.model]["context"])
    assert windows // args.batch_size * args.epochs == 15_000 and windows % args.batch_size == 0
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

def test_optimizers_and_seeds(tmp_path):
    """One folder each, one table with mean ± std, one record, one sample a run."""
    out, err = call(f"{TINY} --epoch 2 --optim sgd mac --run 0 3 --rank 3 --output_dir {tmp_path}")
    assert err.startswith("note: no use for --rank in sgd mac"), err
    for result, optim in zip(record(out)["results"], ("sgd", "mac"), strict=True):
        logs = [read_log(tmp_path / optim / seed) for seed in "03"]
        assert logs[0] != logs[1] and list(logs[0][0]) == [
            "epoch", "lr", "train_loss", "train_perplexity", "valid_loss", "valid_perplexity"]
        loss = [float(log[-1]["valid_loss"]) for log in logs]
        close(result["valid_loss_mean"], sum(loss) / 2, 1e-8)
        assert f"{sum(loss) / 2:.4f} ± {abs(loss[0] - loss[1]) / 2 ** 0.5:.4f}" in out
        for row in logs[0] + logs[1]:
            for part in ("train", "valid"):
                close(float(row[f"{part}_perplexity"]), math.exp(float(row[f"{part}_loss"])), 1e-7)
    assert out.count("sample: '") == 4


@pytest.mark.parametrize("optim", [name for name in train_lm.RECIPES if name != "adam"])
def test_accumulate(tmp_path, optim):
    """Four micro-batches equal one batch."""
    for parts in (1, 4):
        call(f"{TINY} --epoch 2 --optim {optim} --accumulate {parts} "
             f"--output_dir {tmp_path}/{parts}")
    one, four = (checkpoint(tmp_path / parts)["model"] for parts in "14")
    close(four, one, 2e-3 if optim == "adamw" else 5e-4)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_ranks(tmp_path, start):
    """Two ranks write the log of one, and a checkpoint that one continues."""
    optims = "sgd", "mac", "kfac", "nysact", "adafisherw"
    flags = f"{TINY} --epoch 2 --optim {' '.join(optims)}"
    two = start(f"{flags} --accumulate 2 --output_dir two", 2)
    cut = start(f"{flags} --fsdp --output_dir fsdp", 2)
    call(f"{flags} --output_dir {tmp_path}/one")
    for name, process in dict(two=two, fsdp=cut).items():
        out = process.finish()
        assert record(out)["ranks"] == 2 and out.count("sample: '") == 5
        for optim in optims:
            a, b = (read_log(tmp_path / folder / optim) for folder in ("one", name))
            for column in ("train_loss", "valid_loss"):
                close([float(row[column]) for row in b], [float(row[column]) for row in a], 1e-5)
    out, _ = call(f"{flags} --output_dir {tmp_path}/two --resume")
    assert out.count("resumed after epoch 2 of 2") == 5


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.parametrize("flags, words", {
    "--rank {}": "rank (3 on rank 0, 4 on rank 1)", "--run 0 {}": "seed ([0, 3] on rank 0",
}.items())
def test_ranks_differ(start, flags, words):
    """Also in what a later run takes."""
    where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(*free_ports(1)))
    ranks = [start(f"{TINY} --optim sgd nysact {flags.format(3 + rank)}", RANK=str(rank),
                   LOCAL_RANK=str(rank), **where) for rank in range(2)]
    said, nothing = (process.finish(2) for process in ranks)
    assert words in said.splitlines()[-1] and not nothing, (said, nothing)


def one_copy(rank, world):
    text = texts.load_text("grammar") if rank == 0 else None
    text = train_lm.share(text, Ranks(rank=rank, world=world, local=rank))
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(number, 16) for number in line.split()[0].split("-"))
        places += [line for part in text[:2] if low <= part.data_ptr() < high]
    files = [line.split()[3:6] for line in places]      # device, inode, path
    return text.train.clone(), text.valid.clone(), text.fingerprint, files


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells where memory is on Linux")
def test_ranks_share_the_text():
    """One process reads it; in the memory of all it is the same two files."""
    want = texts.load_text("grammar")
    shared = on_ranks(2, one_copy)
    for train, valid, fingerprint, files in shared:
        assert torch.equal(train, want.train) and torch.equal(valid, want.valid)
        assert fingerprint == want.fingerprint and files == shared[0][3]
        assert [Path(path).name for *_, path in files] == ["train.npy", "valid.npy"], files


@pytest.mark.parametrize("flags, words", {
    "--heads 3": "3 heads", "--dropout 1": "--dropout", "--model gpt3": "nanogpt",
    "--dataset ptb": "wikitext2", "--embedding_lr 0": "positive", "--accumulate 3": "--accumulate",
    "--train_size 999999999": "999999999", "--valid_size 1": "at least two",
    "--train_file x": "--train_file", "--context 300": "--context",
    "--batch_size 512 --train_size 100": "fewer than --batch_size", "--schedule linear": "constant",
    "--text {0}/none": "none", "--text {0}/binary": "UTF-8", "--text {0}": "{0}",
    "--text {0}/short --train_size 80 --valid_size 9": "--context",
    "--optim adamw sgd --momentum 0 --nesterov": "esterov",        # before adamw trains
    "--fsdp": "torchrun",
    "--dataset wikitext2 --data_dir {0} --train_file my.txt": "my.txt",
}.items())
def test_wrong_commands(tmp_path, flags, words):
    (tmp_path / "short").write_bytes(b"ab" * 50)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa" * 99)
    err = refused(f"{TINY} --output_dir {tmp_path}/run {flags.format(tmp_path)}")
    assert words.format(tmp_path) in err and not (tmp_path / "run").exists()


def test_flags_without_effect(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 99)
    out, err = call(f"{TINY} --text {tmp_path}/a.txt --output_dir {tmp_path}/run")
    assert err == "note: no use for --dataset in a run with --text\n" and "a.txt (" in out
    _, err = call(f"{TINY} --schedule constant --min_lr 0.5 --output_dir {tmp_path}/other")
    assert err == "note: no use for --min_lr in --schedule constant\n"
