"""reproduce.py: what is run, once and to its end, and what the tables say of it."""
import argparse
import csv
import io
import sys

import pytest

import reproduce
from download import DataError
from reproduce import Arm, Study, Trial

TINY = ("train_cifar.py --dataset shapes --train_size 16 --batch_size 8 --epoch 1 --model lenet5 "
        "--optim sgd")
BENCH = "".join(f"{optim}  {ratio} (0.9 to 1.1)  0.0  \n" for optim, ratio in
                (("sgd", 1.0), ("mac", 1.05), ("adafisher", 1.0)))


def write(folder, experiment, rows):
    with open(folder / f"{experiment}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("arm", "rate", "seed", "epoch", "train_loss", "test_acc"), *rows])


def test_search_goes_beyond_an_edge(tmp_path, monkeypatch):
    """Once all rates of an arm are known, and its best is the first or the last, one more."""
    arms = {"low": Arm("--optim sgd", (0.01, 0.03, 0.1)), "in": Arm("--optim mac", (0.1, 0.3, 1.0)),
            "high": Arm("--optim foof", (0.01, 0.03, 0.1)), "new": Arm("", (1.0,))}
    monkeypatch.setitem(reproduce.STUDIES, "cifar", Study("search", "compare", 2, arms))
    write(tmp_path, "cifar-search", [
        (arm, f"{lr:g}", 0, epoch, loss if epoch == 2 else 0, 50) for epoch in (1, 2)
        for arm, losses in (("low", (1, 2, 3)), ("in", (2, 1, "")), ("high", ("", 2, 1)))
        for lr, loss in zip(arms[arm].rates, losses)])
    known = {("low", "0.003"), ("high", "0.3"), ("new", "1")}
    trials = list(reproduce.trials(tmp_path, "cifar-search"))
    asked = {trial.key[:2] for trial in trials}
    assert asked == known | {(arm, f"{lr:g}") for arm in arms for lr in arms[arm].rates}
    assert {trial.command for trial in trials if trial.key[:2] == ("low", "0.003")} == {
        "search --optim sgd --lr 0.003"}
    assert [reproduce.best_rate(tmp_path, "cifar", arm) for arm in ("low", "in", "high")] == \
        [0.01, 0.3, 0.1]
    with pytest.raises(DataError, match="cifar-search"):
        list(reproduce.trials(tmp_path, "cifar"))
    del arms["new"]
    arms["in --other"] = Arm("--other", ())                     # at the best rate of "in"
    assert list(reproduce.trials(tmp_path, "cifar-search")) == [
        trial for trial in trials if trial.arm != "new"]
    assert [(trial.arm, trial.lr, trial.seed) for trial in reproduce.trials(tmp_path, "cifar")] == [
        (arm, lr, seed) for seed in range(2) for arm, lr in (
            ("low", 0.01), ("in", 0.3), ("high", 0.1), ("in --other", 0.3))]


def test_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    """Each run once; one that diverges is a result, its numbers left out."""
    trials = [Trial("wild", 1e15, 0, f"{TINY} --lr 1e15")]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "cifar", lambda results, name: trials)
    args = argparse.Namespace(results=tmp_path, data_dir=tmp_path / "my data", jobs=1)
    monkeypatch.chdir(tmp_path)                     # where no script is
    reproduce.run_experiment("cifar", args)
    reproduce.show(tmp_path, "cifar")               # of what it knows, which is nothing
    trials += [Trial("sgd", 0.1, seed, f"{TINY} --data_dir DATA") for seed in (0, 1)]
    reproduce.run_experiment("cifar", args)
    found = reproduce.logs(tmp_path, "cifar")
    assert list(found) == [("wild", "1e+15", "0"), ("sgd", "0.1", "0"), ("sgd", "0.1", "1")]
    assert found["sgd", "0.1", "0"][0]["train_loss"] != found["sgd", "0.1", "1"][0]["train_loss"]
    assert [row["train_loss"] for row in found["wild", "1e+15", "0"]] == [""]
    assert not list(tmp_path.rglob("checkpoint.pt")) and capsys.readouterr().out.count(TINY) == 3
    reproduce.run_experiment("cifar", args)
    assert not capsys.readouterr().out and reproduce.logs(tmp_path, "cifar") == found
    trials.append(Trial("wrong", 1.0, 0, f"{TINY} --model none"))
    with pytest.raises(DataError, match="none"):
        reproduce.run_experiment("cifar", args)


def test_comparison_by_hand(tmp_path, capsys):
    write(tmp_path, "cifar", [
        (arm, "0.1", seed, epoch, 1, acc if epoch == 2 else 0) for epoch in (1, 2)
        for arm, accs in (("sgd", (60, 70)), ("mac", (62, 74))) for seed, acc in enumerate(accs)])
    (tmp_path / "bench-resnet20.txt").write_text(BENCH)
    reproduce.main(["--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    epochs = 1 + 65 / 68                          # the line from 0 to 68 passes SGD's 65 here
    assert lines[-1] == ("| mac | 0.1 | 2 | 68.000 ± 8.485 | 3.000 ± 1.414 | 1.000 ± 0.000 | "
                         f"{epochs:.2f} | {1.05 * epochs:.2f} |")
    assert lines[-2].endswith("| 2.00 | 2.00 |")
    assert reproduce.reached([3, 4], 2) == 1 and reproduce.reached([0, 1], 2) is None


def test_prints_to_ascii(tmp_path, monkeypatch):
    write(tmp_path, "cifar", [("mac", "0.1", seed, 1, 2, 50 + seed) for seed in (0, 1)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert reproduce.main(["--results", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert b"50.500 \\xb1 0.707" in sys.stdout.buffer.getvalue()


def test_without_results(tmp_path, monkeypatch, capsys):
    """Each wrong command gets one sentence; a table needs no bench-resnet20.txt."""
    monkeypatch.chdir(tmp_path)
    for flags, words in (("", "no results in results"), ("--draw", "no results in results"),
                         ("vit", "vit-search")):
        assert reproduce.main(flags.split()) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    write(tmp_path / "results", "cifar", [("mac", "0.1", 0, 1, 2, 50)])
    assert reproduce.main([]) == 0 and "| mac | 0.1 | 1 | 50.000 |" in capsys.readouterr().out


def test_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "bench-resnet20.txt").write_text(BENCH)
    for experiment in "cifar-search", "cifar":
        write(tmp_path, experiment, [("adamw", "0.1", 0, 1, 2, 50), ("mac", "0.1", 0, 1, "", ""),
                                     ("mac", "0.3", 0, 1, 1, 60)][:2 + (experiment != "cifar")])
    reproduce.main(["--results", str(tmp_path), "--draw"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"sensitivity.png",
                                                                       "race.png"}
    assert reproduce.step_ratios(tmp_path)["mac"] == 1.05
